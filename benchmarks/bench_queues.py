"""Queues in memory: commands consumed by one write of CMDQ_PROD, events that faults record."""

import struct

import numpy as np
from bench_translate import empty, three_integers
from questions import LIBRARY, Question, Run, checked
from workload import BASE, SID, STRTAB_LINEAR, Out

QUEUE = 0x9000_0000  # beyond any image that is used here
PAGES_LG2 = 12
COMMANDS_LG2 = 12
COMMANDS = 1 << COMMANDS_LG2
EVENTS_LG2 = 12
EVENTS = 1 << EVENTS_LG2
CR0 = 0b1101  # SMMUEN, EVENTQEN, CMDQEN

FIELDS = {
    "CFGI_STE": lambda i: {"StreamID": i & 1023, "Leaf": 1},
    "CFGI_CD": lambda i: {"StreamID": i & 1023, "SubstreamID": 0, "Leaf": 1},
    "TLBI_NH_VA": lambda i: {"ASID": SID, "Address": 0x5500_0000_0000 + (i << 12), "Leaf": 1},
    "TLBI_NH_ASID": lambda i: {"ASID": i & 1023},
}
MIXES = {
    "CFGI_STE": ("CFGI_STE",),
    "TLBI_NH_VA": ("TLBI_NH_VA",),
    "mixed": tuple(FIELDS),
}
PYTHON = "pure-Python loop: unpack, dispatch, decode"


def commands(names):
    """Return the bytes of a full queue: commands by turns, a SYNC at the end."""
    from smmufast import layout

    words = [
        layout.pack(name, **FIELDS[name](i))
        for i, name in zip(range(COMMANDS - 1), names * COMMANDS, strict=False)
    ]
    words.append(layout.pack("SYNC"))
    return b"".join(word.to_bytes(16, "little") for word in words)


class Loop:
    """What a model of the command queue in Python does for each command, but for its effect."""

    def __init__(self, data):
        self.data = data
        self.streams = self.contexts = self.spaces = self.pages = self.syncs = 0
        self.dispatch = {
            0x03: self.cfgi_ste,
            0x05: self.cfgi_cd,
            0x11: self.tlbi_nh_asid,
            0x12: self.tlbi_nh_va,
            0x46: self.sync,
        }

    def cfgi_ste(self, low, high):
        """Take StreamID and Leaf."""
        self.streams += 1
        return low >> 32, high & 1

    def cfgi_cd(self, low, high):
        """Take StreamID, SubstreamID and Leaf."""
        self.contexts += 1
        return low >> 32, low >> 12 & 0xFFFFF, high & 1

    def tlbi_nh_asid(self, low, high):
        """Take VMID and ASID."""
        self.spaces += 1
        return low >> 32 & 0xFFFF, low >> 48

    def tlbi_nh_va(self, low, high):
        """Take VMID, ASID, Leaf and the address."""
        self.pages += 1
        return low >> 32 & 0xFFFF, low >> 48, high & 1, high & ~0xFFF

    def sync(self, low, high):
        """Take CS."""
        self.syncs += 1
        return low >> 12 & 3

    def consume(self):
        """Consume the whole queue once."""
        unpack, dispatch, data = struct.unpack_from, self.dispatch, self.data
        for at in range(0, len(data), 16):
            low, high = unpack("<QQ", data, at)
            dispatch[low & 0xFF](low, high)


def python_loop(names):
    """Consume the commands in Python."""

    def build(_bench):
        loop = Loop(commands(names))
        loop.consume()
        found = {
            "CFGI_STE": loop.streams,
            "CFGI_CD": loop.contexts,
            "TLBI_NH_VA": loop.pages,
            "TLBI_NH_ASID": loop.spaces,
        }
        if sum(found[name] for name in names) != COMMANDS - 1 or loop.syncs != 1:
            raise AssertionError("the Python loop finds other commands")
        return Run(loop.consume, COMMANDS)

    return build


def device(bench, caches=None, **registers):
    """Return a Smmu with memory for a queue."""
    from smmufast import Memory, Smmu

    memory = Memory()
    memory.add(bench.image(PAGES_LG2).buffer, BASE)
    memory.add_private(QUEUE, 1 << 20)
    return Smmu(
        memory,
        strtab_base=STRTAB_LINEAR[0],
        strtab_base_cfg=STRTAB_LINEAR[1],
        caches=caches,
        **registers,
    )


def consume(names, *, caches):
    """Write CMDQ_PROD, which has the library consume the queue."""

    def build(bench):
        from smmufast import Caches

        smmu = device(
            bench,
            Caches.server() if caches else None,
            cr0=CR0,
            cmdq_base=QUEUE | COMMANDS_LG2,
        )
        smmu.memory.write(QUEUE, commands(names))
        write = smmu.write
        prod = 0

        def call():
            nonlocal prod
            prod ^= COMMANDS  # the same index, the other wrap bit: the queue is full
            write("CMDQ_PROD", prod)

        if caches:
            smmu.translate_batch(SID, bench.image(PAGES_LG2).sequential(COMMANDS))
        filled = caches and len(smmu.caches.tlb)
        call()
        if smmu.read("CMDQ_CONS") != prod or smmu.gerror:
            raise AssertionError("the queue is not consumed")
        if caches:
            left = len(smmu.caches.tlb) if "TLBI_NH_VA" in names else len(smmu.caches.ste)
            if filled < COMMANDS // 2 or left > 1:
                raise AssertionError("commands leave entries in the caches")
        return Run(call, COMMANDS)

    return build


def faults(bench):
    """Return addresses beyond the mapped pages."""
    iova = bench.image(PAGES_LG2).random(EVENTS)
    return iova + np.uint64(bench.image(PAGES_LG2).pages << 12)


def events(*, placed):
    """Call translate_batch for addresses that all fault."""

    def build(bench):
        registers = {"eventq_base": QUEUE | EVENTS_LG2} if placed else {}
        smmu = device(bench, **registers)
        iova = faults(bench)
        reference, out = Out.empty(EVENTS), Out.empty(EVENTS)
        bench.baselines(PAGES_LG2).c.batch(SID, iova, *reference.arrays())
        columns = out.columns()

        def call():
            smmu.translate_batch(SID, iova, out=columns)

        def acknowledge():
            smmu.write("EVENTQ_CONS", smmu.read("EVENTQ_PROD"))

        run = checked(call, out, reference, EVENTS)
        if not placed:
            return run
        wanted = device(bench).translate_batch(SID, iova, columns=["record"])["record"]
        if smmu.memory.read(QUEUE, 32 * EVENTS) != wanted.tobytes():
            raise AssertionError("the queue holds other records")
        return Run(call, EVENTS, acknowledge)

    return build


def _questions():
    for label, names in MIXES.items():
        yield Question(
            f"commands, {label}, {COMMANDS} at once",
            "command",
            {
                PYTHON: python_loop(names),
                f"{LIBRARY} write(CMDQ_PROD)": consume(names, caches=False),
                f"{LIBRARY} write(CMDQ_PROD), caches": consume(names, caches=True),
                "empty method, an object": empty(three_integers, "three"),
            },
            main=label == "mixed",
        )
    yield Question(
        "events, a batch in which every address faults",
        "record",
        {
            f"{LIBRARY} translate_batch(out=), in results alone": events(placed=False),
            f"{LIBRARY} translate_batch(out=), into the queue": events(placed=True),
        },
    )


QUESTIONS = tuple(_questions())


def test_queues(measure, question, run):
    """Time one run of a question."""
    measure(question, run)
