"""What a real kernel's driver did, phase by phase, and the commands that it sent meanwhile.

`linux-7.3-commands.jsonl` is an extract of the recorded traffic of Linux 7.3 on an SMMU with
PASIDs: a module calls the kernel's IOMMU API, says what it does, and marks the log.  One line is
one phase: its name, its operations, and the commands, one text for all up to a CMD_SYNC.

    python -P tests/support/kernelcommands.py CAPTURE >tests/support/linux-7.3-commands.jsonl

Without an argument it prints the table of docs/domains.md.
"""

import gzip
import json
import re
import sys
from collections import Counter
from pathlib import Path

from smmufast import Features, layout, modelled
from smmufast.iommu import System

EXTRACT = Path(__file__).with_name("linux-7.3-commands.jsonl")
IDR = (0x88F569B, 0xE739D20, 0x1714, 0xFFFF0476)  # what the kernel read: IDR0, 1, 3 and 5
AIDR = 2
GIB = 1 << 30
COMMAND_QUEUE = 5  # the kind of page, in the log
MARKS = 0xE00  # reads from here on
CALLS = {"AT": "attach_pasid", "DT": "detach_pasid", "A0": "attach", "D0": "detach"}
CMDQ_BASE, CMDQ_PROD = 0x90, 0x98
QUIET = ("Opcode", "CS", "MSH", "MSIAttr")  # how a CMD_SYNC signals is not compared


def spoken(word):
    """A command in words, without fields that are 0."""
    record = layout.command_record(word & 0xFF)
    fields = layout.unpack(record, word).items()
    return " ".join([record.name, *(f"{n}={v:#x}" for n, v in fields if v and n not in QUIET)])


def batches(words):
    """Commands in words, one text up to each CMD_SYNC."""
    told, texts = [], []
    for word in words:
        told.append(spoken(word))
        if told[-1] == "SYNC":
            texts.append("; ".join(told))
            told = []
    return texts + ["; ".join(told)] * bool(told)


# --- the recording ---


def recorded(capture):
    """The commands of each phase of a log: up to a mark."""
    memory, phases, prod, lg2, base = {}, [[]], 0, 0, 0
    with gzip.open(capture / "log.jsonl.gz", "rt", encoding="utf-8") as file:
        next(file)
        for what, *rest in map(json.loads, file):
            if what == "R" and MARKS <= rest[0] < MARKS + 0x100:
                phases.append([])
            elif what in ("S", "D") and rest[3] == COMMAND_QUEUE:
                address, size, value, _ = rest
                for i in range(size):
                    memory[address + i] = value >> 8 * i & 0xFF
            elif what == "W" and rest[0] == CMDQ_BASE:
                base, lg2 = rest[2] & layout.mask("CMDQ_BASE", "ADDR"), rest[2] & 0x1F
            elif what == "W" and rest[0] == CMDQ_PROD:
                while prod != rest[2]:
                    slot = base + 16 * (prod % (1 << lg2))
                    word = bytes(memory.get(slot + i, 0) for i in range(16))
                    phases[-1].append(int.from_bytes(word, "little"))
                    prod = (prod + 1) % (2 << lg2)
    return phases[:-1]


def operations(capture):
    """The name and the operations of each phase, as `Replay` has them."""
    lines = [json.loads(line) for line in (capture / "truth.jsonl").read_text().splitlines()]
    devices, phases, ops = {}, [], []
    for what, *rest in lines:
        if what == "DEV":
            number, _, sid, _, _, _, pasids, *_ = rest
            devices.setdefault(number, ([], int(pasids)))[0].append(int(sid, 16))
        elif what == "MK":
            if not phases:  # another one that the kernel found
                ops = [["device", *device] for device in (*devices.values(), ([0], 0))]
            phases.append((" ".join(rest[1:]), ops))
            ops = []
        elif what in ("DOM", "DK"):
            ops.append(["domain", int(rest[0]), int(rest[1], 16) if what == "DK" else 0])
        elif what in ("DM", "DU"):
            numbers = [int(number, 16) for number in rest[1 : 5 if what == "DM" else 3]]
            ops.append(["map" if what == "DM" else "unmap", int(rest[0]), *numbers])
        elif what in CALLS:
            ops.append([CALLS[what], *map(int, rest[: 3 if what in ("AT", "DT") else 2])])
    return phases


def needed(phases):
    """The operations without mappings that no command depends on.

    Such share no GiB of a domain with what is unmapped, nor with a block of a GiB.
    """
    regions = set()
    for _, ops in phases:
        for what, domain, *rest in ops:
            if what == "unmap" or (what == "map" and rest[2] >= GIB):
                size = rest[1 if what == "unmap" else 2]
                regions |= {(domain, region) for region in gibs(rest[0], size)}

    def matters(what, domain, *rest):
        return what != "map" or any((domain, gib) in regions for gib in gibs(rest[0], rest[2]))

    return [(name, [op for op in ops if matters(*op)]) for name, ops in phases]


def gibs(iova, size):
    """The GiB that a range touches."""
    return range(iova // GIB, (iova + size - 1) // GIB + 1)


def extract(capture):
    """The lines of the extract."""
    pairs = zip(needed(operations(capture)), recorded(capture), strict=True)
    for (name, ops), words in pairs:
        yield json.dumps({"phase": name, "operations": ops, "commands": batches(words)})


def extracted():
    """The phases of the extract: name, operations, commands."""
    with EXTRACT.open(encoding="utf-8") as file:
        return [tuple(json.loads(line).values()) for line in file]


# --- this driver ---


class Replay:
    """A System that does the operations of the phases."""

    def __init__(self):
        features, _ = modelled(Features.from_idr(*IDR, AIDR))
        self.system = System(features=features, default_domain="paging")
        self.queue = self.system.iommus[0].queue
        self.devices, self.domains = [], {}
        self.told = 0

    def commands(self):
        """The commands since the last time."""
        queue, size = self.queue, 1 << self.queue.size_lg2
        slots = [queue.base + 16 * (i % size) for i in range(self.told, queue.issued)]
        assert len(slots) < size
        self.told = queue.issued
        return batches(int.from_bytes(queue.memory.read(slot, 16), "little") for slot in slots)

    def do(self, what, *rest):
        """One operation."""
        getattr(self, what)(*rest)

    def device(self, sids, pasids):
        """A device with its default domain."""
        bits = max(pasids.bit_length() - 1, 0)
        self.devices.append(self.system.device(sids, pasid_bits=bits, stall=True))

    def domain(self, number, flags):
        """A domain: 1 a nesting parent, 2 with dirty tracking, 8 for PASIDs."""
        self.domains[number] = self.devices[0].paging_domain(
            nest_parent=bool(flags & 1), dirty=bool(flags & 2)
        )

    def map(self, domain, *rest):
        """Map."""
        self.domains[domain].map(*rest)

    def unmap(self, domain, *rest):
        """Unmap."""
        self.domains[domain].unmap(*rest)

    def attach_pasid(self, device, pasid, domain):
        """Attach a PASID."""
        self.devices[device].attach_pasid(self.domains[domain], pasid)

    def detach_pasid(self, device, pasid, domain):
        """Detach a PASID."""
        self.devices[device].detach_pasid(self.domains[domain], pasid)

    def attach(self, device, domain):
        """Attach the main domain."""
        self.devices[device].attach(self.domains[domain])

    def detach(self, device, domain):
        """Detach the main domain."""
        self.devices[device].detach(self.domains[domain])


# --- what differs ---


def together(told):
    """At boot one CMD_SYNC waits for three commands: it completes all that is before it."""
    first = [text.removesuffix("; SYNC") for text in told[:3]]
    if [text.partition(" ")[0] for text in first] != INVALIDATE_ALL:
        return told
    return ["; ".join([*first, "SYNC"]), *told[3:]]


def new_leaves(told):
    """A leaf of the stream table is told of: invalid L1STDs may be cached (3.21.3, 4.3)."""
    made, leaves = [], set()
    for text in told if [text for text in told if text.startswith("CFGI_STE_RANGE")] else ():
        found = re.fullmatch(r"(?:.*; )?(CFGI_STE StreamID=(\w+)) Leaf=0x1; SYNC", text)
        if found and int(found[2], 16) >> 8 not in leaves:
            leaves.add(int(found[2], 16) >> 8)
            made.append(found[1] + "; SYNC")
        made.append(text)
    return made or told


def once(told):
    """A table that is unmapped is dropped with all that it held, and not as a block again."""
    return [
        text
        for before, text in zip(["", *told], told, strict=False)
        if not text.startswith("TLBI") or re.sub(r"Leaf=0x1 TTL=0x\w+ ", "", text) != before
    ]


INVALIDATE_ALL = ["CFGI_STE_RANGE", "TLBI_EL2_ALL", "TLBI_NSNH_ALL"]
RULES = {"a": together, "b": new_leaves, "c": once}


def wanted(told):
    """What this driver is to send where the kernel sent something, and the rules that say so."""
    differs = ""
    for letter, rule in RULES.items():
        changed = rule(told)
        differs += letter * (changed != told)
        told = changed
    return told, differs


def counted(texts):
    """How often each name occurs, in the order in which they come first."""
    counts = Counter(texts)
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def table():
    """The rows of docs/domains.md."""
    for number, (name, ops, told) in enumerate(extracted()):
        changed, differs = wanted(told)
        columns = [
            counted(part.partition(" ")[0] for text in one for part in text.split("; "))
            for one in (told, changed)
        ]
        ours = f"{columns[1]} ({', '.join(differs)})" if differs else "the same"
        did = counted(op[0] for op in ops if op[0] not in ("domain", "map"))
        did = "map" if ops and did == "none" else did
        yield f"| {number} | {name} | {did} | {columns[0]} | {ours} |"


if __name__ == "__main__":
    for text in extract(Path(sys.argv[1])) if len(sys.argv) > 1 else table():
        print(text)
