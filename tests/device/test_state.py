"""Save and restore: what is restored goes on as the original does; damaged bytes are refused."""

import base64
import copy
import gc
import json
import os
import pickle
import random
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
import small
from ptwriter import leaf_descriptor
from states import Handle, opened, sealed

from smmufast import Caches, ExternalAbort, Features, Memory, Smmu, layout

COMMANDS, EVENTS, PAGES, MSI = 0x9000_0000, 0x9010_0000, 0x9020_0000, 0x9030_0000
QUEUES = 0x40_0000
HELD, OTHER, UPDATED = 20, 21, 22  # streams: two stall, one updates descriptors
IOVA = small.UNMAPPED
ENABLED = 0xF  # CR0: SMMUEN, PRIQEN, EVENTQEN, CMDQEN
SIDS = [small.STAGE1, small.STAGE2, small.NESTED, small.SUBSTREAMS, small.BAD_CD, HELD, OTHER,
        UPDATED]  # fmt: skip
VALUES = [small.RW, small.RO, small.NO_AF, small.UNMAPPED, small.RUN, small.BLOCK, small.TOO_HIGH]


def image():
    data = small.build()
    small.add_stream(data, HELD, 0, s=1)
    small.add_stream(data, OTHER, 1, s=1, a=0, asid=9)
    small.add_stream(data, UPDATED, 2, ha=1, hd=1)
    return data


def row(result):
    """All that a result says."""
    if result.action == "stall":
        return repr(result), result.fault.record, result.event
    return small.row(result)


class Device:
    """What the commands told it; some invalidations fail."""

    def __init__(self, told):
        self.told = told

    def atc_invalidate(self, ssid, address, size, global_):
        self.told.append(("atc", ssid, address, size, global_))
        return address & 0x4000 == 0

    def pri_response(self, ssid, prg_index, code):
        self.told.append(("pri", ssid, prg_index, code))


class Machine:
    """An Smmu, its host, and all that the host was told."""

    def __init__(self, smmu):
        self.smmu = smmu
        self.told = []
        smmu.on_interrupt = self.told.append
        smmu.on_resume = lambda stall: self.told.append((repr(stall), small.row(stall.result)))
        for sid in SIDS[:3]:
            smmu.devices[sid] = Device(self.told)

    def run(self, program):
        """Do what a program says; everything that could be seen."""
        return [getattr(self, name)(*given) for name, *given in program]

    def translate(self, sid, iova, access):
        result = self.smmu.translate(sid, iova, **access)
        return row(result), result.stag

    def batch(self, sid, iova):
        sid, iova = np.array(sid, np.uint32), np.array(iova, np.uint64)
        return small.rows(self.smmu.translate_batch(sid, iova, columns=small.ALL))

    def burst(self, sid, iova, size):
        segments = self.smmu.translate_range(sid, iova, size)
        return list(segments), repr(segments.result)

    def walk(self, sid, iova):
        walk = self.smmu.start_walk(sid, iova)
        while not walk.done:
            fetch = walk.request
            try:
                data = self.smmu.memory.read(fetch.address, fetch.size)
            except ExternalAbort:
                data = None
            walk.supply(data)
        return row(walk.result)

    def write(self, name, value):
        self.smmu.write(name, value)
        return self.smmu.read(name)

    def command(self, name, fields):
        try:
            self.smmu.command(name, **fields)
        except (BufferError, ExternalAbort, PermissionError, ValueError) as error:
            return str(error)

    def resume(self, number, fields):
        if held := [stall for stall in self.smmu.stalls if stall.recorded]:
            stall = held[number % len(held)]
            return self.command("RESUME", {"StreamID": stall.sid, "STAG": stall.stag} | fields)

    def request(self, sid, address, fields):
        return self.smmu.page_request(sid, address, **fields)

    def poke(self, address, data):
        self.smmu.memory.write(address, data)

    def inject(self, fields):
        return self.smmu.memory.inject_error(**fields)

    def clear(self):
        self.smmu.memory.clear_errors()

    def follow(self, cons, prod, mask):
        """Software has read a queue, or acknowledges errors."""
        self.smmu.write(cons, self.smmu.read(prod) & mask)

    def reset(self):
        self.smmu.reset()

    def end(self):
        """All that there is."""
        memory = self.smmu.memory
        return (
            self.smmu.save(),
            memory.read(small.BASE, small.SIZE),
            memory.read(COMMANDS, QUEUES),
            [repr(stall) for stall in self.smmu.stalls],
            self.told,
        )


def machine(chooser, features=None, **more):
    memory = Memory()
    memory.add(image(), small.BASE)
    memory.add_private(COMMANDS, QUEUES)
    size = [chooser.randrange(6) for _ in range(3)]
    queues = {
        "cmdq_base": COMMANDS | size[0],
        "eventq_base": EVENTS | size[1],
        "priq_base": PAGES | size[2],
    }
    queues = {name: base for name, base in queues.items() if chooser.random() < 0.9}
    registers = small.registers() | {"cr0": ENABLED, "cr2": 2} | queues | more
    features = features or Features.full()
    wired = chooser.random() < 0.8 or not features.msi
    smmu = Smmu(memory, features, wired=wired, **registers)
    made = Machine(smmu)
    smmu.write("IRQ_CTRL", chooser.randrange(8))
    if chooser.random() < 0.5:
        for i, name in enumerate(("EVENTQ", "GERROR", "PRIQ")):
            smmu.write(f"{name}_IRQ_CFG0", MSI + 16 * i)
            smmu.write(f"{name}_IRQ_CFG1", 0x1000 + i)
    return made


def caches(chooser):
    """Some caches, or none."""
    if chooser.random() < 0.2:
        return None

    def geometry():
        policy = chooser.choice(["lru", "plru", "fifo", "random"])
        return chooser.choice([
            None, (1, 2, policy), (4, 4, policy), (16, 8, policy, chooser.getrandbits(64)),
        ])  # fmt: skip

    return Caches(
        ste=geometry(), cd=geometry(), tlb=geometry(), walk1=geometry(), walk2=geometry(),
        nested=chooser.choice(["combined", "split"]),
    )  # fmt: skip


def access(chooser):
    return {name: chooser.random() < 0.3 for name in ("write", "priv", "instr")}


def command(chooser):
    sid = chooser.choice(SIDS)
    return chooser.choice([
        ("CFGI_STE", {"StreamID": sid}),
        ("CFGI_CD_ALL", {"StreamID": sid}),
        ("CFGI_ALL", {}),
        ("TLBI_NSNH_ALL", {}),
        ("TLBI_NH_ASID", {"ASID": chooser.choice([7, 9, 11]), "VMID": chooser.choice([0, 9])}),
        ("TLBI_S12_VMALL", {"VMID": 9}),
        ("STALL_TERM", {"StreamID": sid}),
        ("ATC_INV", {"StreamID": sid, "Address": chooser.randrange(16) << 12}),
        ("PRI_RESP", {"StreamID": sid, "PRGIndex": chooser.randrange(4), "Resp": 2}),
        ("SYNC", {"CS": chooser.randrange(3)}),
        ("SYNC", {"CS": 1, "MSIAddress": MSI + 0x100, "MSIData": 5}),
    ])  # fmt: skip


def step(chooser):
    """One thing that a host or its software does."""
    sid = chooser.choice(SIDS)
    iova = chooser.choice(VALUES) + chooser.randrange(3)
    what = chooser.random()
    if what < 0.3:
        return "translate", sid, iova, access(chooser)
    if what < 0.35:
        return "batch", [chooser.choice(SIDS) for _ in range(6)], chooser.choices(VALUES, k=6)
    if what < 0.38:
        return "burst", sid, small.RUN, 0x4000
    if what < 0.41:
        return "walk", sid, iova
    if what < 0.55:
        return "command", *command(chooser)
    if what < 0.65:
        how = chooser.choice([{"Ac": 1}, {}, {"Ab": 1}])
        return "resume", chooser.randrange(100), how
    if what < 0.71:
        fields = access(chooser)
        return "request", sid, chooser.randrange(100) << 12, {
            "ssid": chooser.choice([None, 5]), "prg_index": chooser.randrange(4),
            "read": fields["priv"], "write": fields["write"], "last": fields["instr"],
        }  # fmt: skip
    if what < 0.78:
        leaf = small.BASE + small.LEVEL3 + 8 * (chooser.choice(VALUES[:5]) >> 12)
        pa = 0x4000_0000 + (chooser.randrange(100) << 12)
        entry = leaf_descriptor(12, 3, pa, ap=chooser.choice([1, 3]), af=chooser.randrange(2))
        return "poke", leaf, chooser.choice([bytes(8), entry.to_bytes(8, "little")])
    if what < 0.8:
        return "poke", COMMANDS + 16 * chooser.randrange(8), chooser.randbytes(16)
    if what < 0.81:
        return "inject", chooser.choice([
            {"kind": "TT", "nth": chooser.randrange(1, 9)}, {"kind": "CD", "nth": 2, "count": 2},
        ])  # fmt: skip
    if what < 0.82:
        return ("clear",)
    if what < 0.87:
        return "follow", "EVENTQ_CONS", "EVENTQ_PROD", 0xFFFFFFFF
    if what < 0.89:
        return "follow", "PRIQ_CONS", "PRIQ_PROD", 0xFFFFFFFF
    if what < 0.93:
        return "follow", "GERRORN", "GERROR", 0xFF
    if what < 0.97:
        return "write", "CR0", chooser.choice([ENABLED, ENABLED, ENABLED & ~4, 5, ENABLED & ~1])
    if what < 0.99:
        name = chooser.choice(["IRQ_CTRL", "CR1", "CR2", "EVENTQ_CONS", "CMDQ_PROD", "CMDQ_CONS"])
        return "write", name, chooser.getrandbits(8)
    if what < 0.995:
        name, at = chooser.choice([("EVENTQ", EVENTS), ("CMDQ", COMMANDS), ("PRIQ", PAGES)])
        return "write", f"{name}_BASE", at | chooser.randrange(6)
    return ("reset",) if chooser.random() < 0.3 else ("write", "CR0", ENABLED)


def program(chooser, n):
    return [step(chooser) for _ in range(n)]


FEATURES = [
    Features.full(),
    Features.full().replace(stall_max=2),
    Features.full().replace(stall_max=1, msi=0, sev=0, term_model=1),
    Features.v3_0(),
    Features.minimal(),
    Features.qemu().replace(ttf=2),
]


# --- what is restored goes on as the original ---


@pytest.mark.parametrize("seed", range(120))
def test_two_restored_ones_go_on_as_the_original(seed):
    chooser = random.Random(seed)
    first = machine(chooser, FEATURES[seed % 6], caches=caches(chooser))
    first.run(program(chooser, chooser.randrange(120)))
    saved = first.smmu.save()
    others = []
    for _ in range(2):
        again = Smmu.restore(saved, first.smmu.memory.copy())
        assert again.save() == saved
        assert [repr(s) for s in again.stalls] == [repr(s) for s in first.smmu.stalls]
        assert list(again.warnings) == list(first.smmu.warnings)
        others.append(Machine(again))
    first.told.clear()
    rest = program(chooser, 120)
    seen = first.run(rest)
    end = first.end()
    for other in others:
        assert other.run(rest) == seen
        assert other.end() == end


def test_the_programs_reach_what_there_is_to_save():
    met = dict.fromkeys(
        ("recorded", "waiting", "gerror", "overflow", "cached", "warned", "wrapped", "atc",
         "stopped", "updated"), 0
    )  # fmt: skip
    for seed in range(60):
        chooser = random.Random(seed)
        made = machine(chooser, caches=Caches.small())
        for _ in range(8):
            made.run(program(chooser, 15))
            smmu = made.smmu
            saved = smmu.save()
            length = int.from_bytes(saved[12:16], "little")
            state = json.loads(saved[16 : 16 + length])
            met["recorded"] += any(stall.recorded for stall in smmu.stalls)
            met["waiting"] += any(not stall.recorded for stall in smmu.stalls)
            met["gerror"] += smmu.gerror != smmu.gerrorn
            met["overflow"] += (smmu.read("EVENTQ_PROD") ^ smmu.read("EVENTQ_CONS")) >> 31
            met["cached"] += len(smmu.caches.tlb) > 1
            met["warned"] += len(smmu.warnings) > 0
            met["wrapped"] += smmu.read("CMDQ_PROD") != smmu.read("CMDQ_CONS") & 0xFFFFF
            met["atc"] += state["atc_failed"]
            met["stopped"] += (smmu.gerror ^ smmu.gerrorn) & 1
            met["updated"] += bool(smmu.memory.read_u64(small.BASE + small.LEVEL3 + 24) & 1 << 10)
    assert min(met.values()) > 3, met


def test_every_register_and_queue_comes_back():
    smmu = machine(random.Random(5)).smmu
    smmu.write("CR0", 0)
    smmu.write("GBPA", 0x8010_0000 | 0x3F0F)
    smmu.write("CR1", 0x123)
    smmu.write("GERROR_IRQ_CFG2", 0x1F)
    smmu.write("EVENTQ_PROD", 0x8000_0001)
    smmu.write("EVENTQ_CONS", 0x8000_0000)
    again = Smmu.restore(smmu.save(), smmu.memory)
    for name in layout.REGISTERS:
        assert again.read(name) == smmu.read(name), name
    assert again.features == smmu.features and again.memory is smmu.memory
    assert again.read("EVENTQ_PROD") == 0x8000_0001


def test_stalls_are_new_objects_that_resume():
    chooser = random.Random(0)
    made = machine(chooser, Features.full().replace(stall_max=1), eventq_base=EVENTS | 3)
    for sid in (HELD, OTHER, HELD):
        assert made.smmu.translate(sid, IOVA).action == "stall"
    ended = []
    again = Smmu.restore(made.smmu.save(), made.smmu.memory.copy(), on_resume=ended.append)
    assert [s.recorded for s in again.stalls] == [True, False, False]
    before = again.stalls
    assert not set(before) & set(made.smmu.stalls)
    leaf = small.BASE + small.LEVEL3 + 8 * (IOVA >> 12)
    again.memory.write_u64(leaf, leaf_descriptor(12, 3, 0x4000_7000, ap=1))
    again.command("RESUME", StreamID=HELD, STAG=before[0].stag, Ac=1)
    # those that waited for STALL_MAX meet the page too
    assert again.stalls == [] and ended == before
    assert [s.result.pa for s in before] == [0x4000_7000] * 3
    assert len(made.smmu.stalls) == 3 and not made.smmu.stalls[0].done


def test_presets_and_ignore_s2ptw_are_part_of_it():
    features = Features.full().replace(tables_preset=1, queues_preset=1)
    smmu = Smmu(Memory(), features, strtab_base=0x1000, cmdq_base=0x2003, cr0=0, ignore_s2ptw=True)
    again = Smmu.restore(smmu.save(), smmu.memory)
    again.reset()
    smmu.reset()
    assert again.ignore_s2ptw and again.strtab_base == 0x1000
    assert again.save() == smmu.save()


@pytest.mark.parametrize("seed", range(8))
def test_instances_are_independent(seed):
    alone, together = [], []
    for number in range(3):
        for where in (alone, together):
            chooser = random.Random(100 * seed + number)
            where.append(machine(chooser, caches=caches(chooser)))
    programs = [program(random.Random(900 * seed + i), 150) for i in range(3)]
    for made, steps in zip(alone, programs, strict=True):
        made.run(steps)
    chooser = random.Random(seed)
    left = [list(steps) for steps in programs]
    while any(left):
        number = chooser.choice([i for i in range(3) if left[i]])
        together[number].run([left[number].pop(0)])
        if chooser.random() < 0.05:  # and one of them is another from now on
            old = together[number]
            new = Machine(copy.deepcopy(old.smmu))
            new.told[:] = old.told
            together[number] = new
    for a, b in zip(alone, together, strict=True):
        assert a.end() == b.end()


# --- when nothing can be saved ---


def test_no_state_is_saved_from_a_callback_of_what_runs():
    made = machine(random.Random(0), cmdq_base=COMMANDS | 4, eventq_base=EVENTS | 4)
    smmu = made.smmu
    refused = []

    def attempt(*_):
        with pytest.raises(RuntimeError, match="save between calls"):
            smmu.save()
        refused.append(1)

    smmu.on_interrupt = smmu.on_resume = attempt
    smmu.write("IRQ_CTRL", 7)
    for i in range(3):
        smmu.write(f"{('EVENTQ', 'GERROR', 'PRIQ')[i]}_IRQ_CFG0", 0)
    smmu.translate(HELD, IOVA)
    assert len(refused) == 1  # eventq
    smmu.command("SYNC", CS=1)
    assert len(refused) == 2
    smmu.command("STALL_TERM", StreamID=HELD)
    assert len(refused) == 3
    device = smmu.devices[small.STAGE1]
    device.pri_response = attempt
    smmu.command("PRI_RESP", StreamID=small.STAGE1)
    assert len(refused) == 4
    smmu.write("CR0", 5)
    smmu.write("CMDQ_BASE", COMMANDS)
    smmu.translate(HELD, IOVA)
    smmu.write("CR0", 0)
    assert len(refused) == 5  # on_resume again: the event queue was not empty
    assert Smmu.restore(smmu.save(), smmu.memory).cr0 == 0


def test_no_state_is_saved_while_a_direct_command_calls_its_device():
    smmu = Smmu(Memory())
    refused = []

    class Saves(Device):
        def pri_response(self, *_):
            with pytest.raises(RuntimeError, match="a command is under way"):
                smmu.save()
            refused.append(1)

    smmu.devices[1] = Saves([])
    smmu.command("PRI_RESP", StreamID=1)
    assert refused == [1]
    assert smmu.save() == smmu.save()


@pytest.mark.parametrize("cached", [False, True])
def test_no_state_is_saved_while_another_thread_translates(cached):
    memory = Memory()
    started, go_on = threading.Event(), threading.Event()

    def read(address, n):
        started.set()
        assert go_on.wait(60)
        return bytes(n)

    memory.add_callback(0, 1 << 20, read)
    smmu = Smmu(memory, caches=Caches.small() if cached else None)
    worker = threading.Thread(target=smmu.translate_batch, args=(0, np.zeros(3, np.uint64)))
    worker.start()
    assert started.wait(60)
    outcome = []

    def save():
        try:
            outcome.append(smmu.save())
        except RuntimeError as error:
            outcome.append(error)

    saver = threading.Thread(target=save)  # with caches it waits until these are free
    saver.start()
    if not cached:
        saver.join()
        assert "save between calls" in str(outcome[0])
    go_on.set()
    worker.join()
    saver.join()
    assert len(outcome) == 1
    assert Smmu.restore(smmu.save(), memory).save() == smmu.save()


def test_a_c_handle_does_not_keep_a_state_from_being_saved():
    smmu = machine(random.Random(0), eventq_base=EVENTS | 2, caches=Caches.small()).smmu
    before = smmu.save()
    handle = Handle(smmu)
    assert smmu.save() == before
    assert handle.translate(HELD, IOVA) == 0
    (stall,) = Smmu.restore(smmu.save(), smmu.memory).stalls
    assert (stall.sid, stall.iova, stall.recorded) == (HELD, IOVA, True)
    handle.release()
    assert len(Smmu.restore(smmu.save(), smmu.memory).stalls) == 1


def test_no_state_is_saved_while_a_record_is_being_written():
    memory = Memory()
    memory.add(image(), small.BASE)
    refused = []

    def write(address, data):
        with pytest.raises(RuntimeError, match="a record is being written"):
            smmu.save()
        refused.append(address)
        return True

    memory.add_callback(EVENTS, 0x1000, lambda a, n: bytes(n), write)
    smmu = Smmu(memory, eventq_base=EVENTS | 2, **small.registers())
    handle = Handle(smmu)
    assert handle.translate(small.STAGE1, IOVA) == 0
    handle.release()
    assert refused == [EVENTS]
    assert Smmu.restore(smmu.save(), memory).read("EVENTQ_PROD") == 1


# --- hostile bytes ---


def state(seed=3):
    """A state with stalls, errors, warnings and caches."""
    made = machine(random.Random(seed), caches=Caches(tlb=(2, 2), ste=(1, 2)), eventq_base=EVENTS)
    made.run([("translate", HELD, IOVA, {})] * 3 + [("translate", small.STAGE1, small.RW, {})])
    made.run([("write", 0x11, 1), ("command", "CFGI_ALL", {}), ("translate", small.STAGE2, 0, {})])
    assert len(made.smmu.stalls) == 3 and made.smmu.warnings
    return made


def nest(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def test_a_state_with_any_byte_changed_is_refused():
    saved = state().smmu.save()
    memory = Memory()
    chooser = random.Random(1)
    assert sealed(*opened(saved)) != saved  # spaces
    for i in range(len(saved)):
        damaged = bytearray(saved)
        damaged[i] ^= chooser.randrange(1, 256)
        with pytest.raises(ValueError, match=r"^state(: | must be )"):
            Smmu.restore(damaged, memory)


def test_a_state_that_is_cut_or_too_long_is_refused():
    saved = state().smmu.save()
    for end in range(0, len(saved), 3):
        with pytest.raises(ValueError, match=r"^state(: | must be )"):
            Smmu.restore(saved[:end], Memory())
    for more in (b"\0", saved):
        with pytest.raises(ValueError, match=r"^state(: | must be )"):
            Smmu.restore(saved + more, Memory())
    with pytest.raises(ValueError, match="bytes too many"):
        parsed, contents = opened(saved)
        Smmu.restore(sealed(parsed, contents + b"\0"), Memory())


def test_random_bytes_are_refused():
    chooser = random.Random(7)
    for _ in range(500):
        data = chooser.randbytes(chooser.randrange(200))
        for given in (data, b"smmufast" + data, sealed(data, b"")):
            with pytest.raises(ValueError, match=r"^state(: | must be )"):
                Smmu.restore(given, Memory())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: s.pop("stalls"), "all: stalls is missing"),
        (lambda s: s.update(more=1), "all: 'more' is unknown"),
        (lambda s: s["features"].update(oas=9), "features: "),
        (lambda s: s["features"].update(oas="6"), "features: oas"),
        (lambda s: s["features"].update(oas=nest(400)), "features: oas"),
        (lambda s: s.update(atc_failed=nest(400)), "atc_failed must be a number, not list"),
        (lambda s: s["features"].update(mpam=1), "features must be .*, not mpam=1"),
        (lambda s: s["registers"].pop("CR0"), "registers: CR0 is missing"),
        (lambda s: s["registers"].update(CR0=1 << 31), "CR0 must be bits of .*, not 0x80000000"),
        (lambda s: s["registers"].update(CR0=True), "CR0 must be a number, not bool"),
        (lambda s: s["registers"].update(CR0=-1), "CR0 must be 0 to 0xf.*, not -1"),
        (lambda s: s["registers"].update(GBPA=1 << 31), "GBPA must be bits of .*, not 0x80000000"),
        (lambda s: s["registers"].update(EVENTQ_PROD=2), "EVENTQ_PROD must be 0 to 0x1, not 2"),
        (
            lambda s: s["registers"].update(EVENTQ_CONS=0x80000),
            "EVENTQ_CONS must be .*, not 0x80000",
        ),
        (lambda s: s.update(placed=[1, 1]), "placed must be a list of 3, not one of 2"),
        (lambda s: s.update(placed=[1, 1, 2]), "placed must be 0 to 0x1, not 2"),
        (lambda s: s.update(last_stag=1 << 16), "last_stag must be 0 to 0xffff, not 0x10000"),
        (lambda s: s.update(wired=2), "wired must be 0 to 0x1, not 2"),
        (lambda s: s.pop("wired"), "all: wired is missing"),
        (
            lambda s: (s["features"].update(msi=0), s.update(wired=0)),
            "wired must be 1 to 0x1, not 0",
        ),
        (lambda s: s["stalls"].append(s["stalls"][0]), "stalls: sid 0x14 has STAG 0x0 twice"),
        (lambda s: s["stalls"][0].update(access=8), "access of a stall must be .*, not 8"),
        (
            lambda s: s["stalls"][0].update(ssid=1 << 20),
            "ssid of a stall must be .*, or 0xffffffff for none, not 0x100000",
        ),
        (
            lambda s: s["stalls"][0]["outcome"].update(action=9),
            "action of a stall must be .*, not 9",
        ),
        (lambda s: s["stalls"][0]["outcome"].update(action=0), "not that of a fault that stalls"),
        (lambda s: s["stalls"][0]["outcome"].update(fault=3), "not that of a fault that stalls"),
        (
            lambda s: s["stalls"][0]["outcome"].update(level=-2),
            "level of a stall must be -1 to 0x4, not -2",
        ),
        (
            lambda s: s["stalls"][0]["outcome"]["record"].pop(),
            "record of a stall must be a list of 4, not one of 3",
        ),
        (lambda s: s.update(stalls={}), "stalls must be a list, not dict"),
        (
            lambda s: s.update(warnings=[["CR0", 1]]),
            r"warnings must be lists of two strings, not \['CR0', 1\]",
        ),
        (lambda s: s.update(caches=None), "caches: .* bytes without a geometry"),
        (
            lambda s: s["caches"].update(nested="no"),
            "caches: nested must be 'combined' or 'split', not 'no'",
        ),
        (lambda s: s["caches"]["geometries"].pop(), "caches must be a list of 5, not one of 4"),
        (lambda s: s["caches"]["geometries"].__setitem__(2, [3, 2, "lru", 0]), "caches: "),
        (
            lambda s: s["caches"]["geometries"].__setitem__(2, [[], 2, "lru", 0]),
            "caches must be geometries of .*, not",
        ),
        (lambda s: s["caches"].update(nested=[]), "nested of caches must be a string, not list"),
        (lambda s: s["caches"]["geometries"].__setitem__(2, [4, 2, "lru", 0]), "caches: state: "),
    ],
)
def test_a_state_that_cannot_be_is_refused_by_name(change, why):
    made = state()
    parsed, contents = opened(made.smmu.save())
    assert Smmu.restore(sealed(parsed, contents), Memory()).save() == made.smmu.save()
    change(parsed)
    with pytest.raises(ValueError, match=why):
        Smmu.restore(sealed(parsed, contents), Memory())


# What 0.2.0 saved: version 1, without messages, but with PRIQ_IRQ_CFG2.LO; a stall recorded, one
# that waits, in an event queue of one entry.
OLD = zlib.decompress(base64.b64decode(
    "eNq1VM1u2zAMzk57D599sOSfxLm1XVoE2NrODXYpCkOxlViY/2rJSbshb7DX2WvtvOMoUXESNJdh2EkfP8oU+Zmk"
    "rKp+xaR6NxqNrt+PRt8dprJ0xUTJc2fquU7GsoJLZ1r3Zek6K85U32kbLgpubrAuK9JK1E3nTH0wpchJ5EwJQNVI"
    "vKKkJWTHM9511lJd2vKukmmzOaLUa8sP1HJZlc6UAlAVZpTT0niyKn/WcWOATcGyzLA5oRNzL2+6qhC1QqO1JybC"
    "vTZHoIMYD29ZjdSG12ofeLVdGnLdsZpEXwccHGBkccEwZKFUbxIuXltDVC3DzCsp8FRcl21wLYlRB2DD4Ixcp9US"
    "KmW+bZcFM862xUttJ9DRiX2OrdrWNRb/3PMetGvhF3EsuOMlngJF6yqeiqpFUhLMEE7MTFJL0APRIOAb9Ihcim/w"
    "532oUA4W1VdUWoJ4+I5UrCzTir1ASWHohwPT5DYjaUtUbFme5qxAnKOLqsBGU4rXudB/yRgrI/JmaLKNfgvibaqh"
    "ATfV1pwvtXbtXEesoU15ClWprfmohN5PIbM1iluyTPf9o+cSlzxp9dZCQjqm4a8+fficXl48zMxdY13d3T4crPvk"
    "7gNaiQfvhRoQS1CT7ezL7HaxD0IDEsYkJl4wOIZ41p4nwF3feGc4coajxxxmA9XfXN5fONPAi6G3bmZJcpeYawhv"
    "j/Dpc6ccOcPhc8ZYJB+d6dh17pP5oTwa+N54THxLD8UZ6+StY4a8YbR2JBgHEz8KJtY1aP1A7+dzRItkcXG5f/3o"
    "gyOHDgei0J3tR/ixj7DKsoxL7CLRbGDgSORP4K80vcqaipttlynRQOuFuOFMsXpb4UpqaiXWfdNjDLNBdBDYH6wv"
    "LRQtTrKdEQhf266zE87WPC3XKOqwHzRIJbGznDWdbs9JOIljPwhjP3Ip9WG+vGA8DqOJi4l70LqysFNme1sDPgwI"
    "ULt9QJ7vJ9vOsUEBjYM4GtM43LnnFYrpvyrk/S+BYo/EgU98ClvqjUCQ998L5O0FImcEgmhb1tWiXut+etr9/vHr"
    "5x+GHxZy"
))  # fmt: skip


def test_a_state_of_version_1_still_loads():
    memory = Memory()
    memory.add(image(), small.BASE)
    memory.add_private(COMMANDS, QUEUES)
    told = []
    smmu = Smmu.restore(OLD, memory, on_interrupt=told.append)
    assert smmu.wired  # its messages kept the wires quiet; that choice is no more
    assert smmu.read("PRIQ_IRQ_CFG2") == 0 and smmu.read("PRIQ_BASE") == 0x9080_0001
    assert [(s.sid, s.recorded, s.stag) for s in smmu.stalls] == [(20, True, 0), (21, False, None)]
    first, second = smmu.stalls
    # the first record says what it said; the other transaction meets the tables of now
    smmu.memory.write_u64(
        small.BASE + small.LEVEL3 + 8 * (IOVA >> 12), leaf_descriptor(12, 3, 0x4000_7000, ap=1)
    )
    smmu.write("EVENTQ_CONS", 1)
    assert second.result.pa == 0x4000_7008 and smmu.stalls == [first]
    assert smmu.read("EVENTQ_PROD") == 1
    smmu.command("RESUME", StreamID=20, STAG=0, Ac=1)
    assert first.result.pa == 0x4000_7000
    again = smmu.save()
    assert again[8] == 2 and Smmu.restore(again, memory).save() == again


def test_two_streams_with_one_tag_in_a_state_of_version_1_have_it_until_both_are_acknowledged():
    parsed, contents = opened(OLD)
    first = parsed["stalls"][0]
    parsed["stalls"] = [first, copy.deepcopy(first) | {"sid": 21}]
    parsed["last_stag"] = 0xFFFF
    memory = Memory()
    memory.add(image(), small.BASE)
    memory.add_private(COMMANDS, QUEUES)
    smmu = Smmu.restore(sealed(parsed, contents, 1), memory)
    assert [(s.sid, s.stag) for s in smmu.stalls] == [(20, 0), (21, 0)]
    again = smmu.save()
    assert Smmu.restore(again, memory).save() == again

    def next_tag():
        smmu.write("EVENTQ_CONS", smmu.read("EVENTQ_PROD"))
        parsed, contents = opened(smmu.save())
        parsed["last_stag"] = 0xFFFF
        other = Smmu.restore(sealed(parsed, contents), memory)
        other.translate(21, IOVA)
        return other.stalls[-1].stag

    second = smmu.stalls[1]
    assert next_tag() == 1
    smmu.command("RESUME", StreamID=20, STAG=0, Ab=1)
    assert smmu.stalls == [second] and next_tag() == 1
    smmu.command("RESUME", StreamID=21, STAG=0, Ab=1)
    assert smmu.stalls == [] and next_tag() == 0


def test_damaged_states_of_version_1_are_refused():
    parsed, contents = opened(OLD)
    for change in (
        lambda s: s.update(wired=1), lambda s: s.pop("warnings"), lambda s: s.update(registers=5),
        lambda s: s["registers"].pop("PRIQ_BASE"), lambda s: s.update(features=[]),
        lambda s: s["registers"].update(CR0=1 << 40),
    ):  # fmt: skip
        changed = json.loads(json.dumps(parsed))
        change(changed)
        with pytest.raises(ValueError, match=r"^state(: | must be )"):
            Smmu.restore(sealed(changed, contents, version=1), Memory())
    for text in (b"[]", b"5", b"{}"):
        with pytest.raises(ValueError, match=r"^state(: | must be )"):
            Smmu.restore(sealed(text, b"", version=1), Memory())


@pytest.mark.parametrize("wired", [False, True])
def test_whether_there_are_wires_is_part_of_it(wired):
    smmu = Smmu(Memory(), wired=wired)
    for again in (Smmu.restore(smmu.save(), smmu.memory), copy.deepcopy(smmu)):
        assert again.wired is wired
    smmu.reset()
    assert smmu.wired is wired


def test_deep_and_endless_json_is_refused():
    for text in (b"[" * 200_000, b"9" * 10_000, b"NaN", b"\xff", b"", b"[]", b'{"a":' * 3):
        with pytest.raises(ValueError, match=r"^state(: | must be )"):
            Smmu.restore(sealed(text, b""), Memory())
    for version in (0, 3, 1 << 15):
        with pytest.raises(ValueError, match=f"state must be of version 1 or 2, not {version}"):
            Smmu.restore(sealed(b"{}", b"", version=version), Memory())
    data = b"smmufast" + (2).to_bytes(4, "little") + b"\xff\xff\xff\xff"
    with pytest.raises(ValueError, match="ends too early"):
        Smmu.restore(data + zlib.crc32(data).to_bytes(4, "little"), Memory())


def test_arguments_of_another_kind_are_refused():
    saved = Smmu(Memory()).save()
    with pytest.raises(TypeError, match="state must be bytes, not str"):
        Smmu.restore("smmufast", Memory())
    with pytest.raises(TypeError):
        Smmu.restore(saved, None)
    with pytest.raises(TypeError, match=r"on_interrupt must be .*, not int"):
        Smmu.restore(saved, Memory(), on_interrupt=1)
    with pytest.raises(TypeError, match=r"on_resume must be .*, not int"):
        Smmu.restore(saved, Memory(), on_resume=1)


def leaves(value, at=()):
    """Where the numbers of a JSON value are."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*at, key))
    elif isinstance(value, int):
        yield at


@pytest.mark.parametrize("seed", range(6))
def test_numbers_that_are_changed_give_an_error_or_an_smmu_that_works(seed):
    chooser = random.Random(seed)
    made = state()
    saved = made.smmu.save()
    parsed, contents = opened(saved)
    places = list(leaves(parsed))
    refused = 0
    for _ in range(60):
        changed, more = json.loads(json.dumps(parsed)), bytearray(contents)
        for _ in range(chooser.randrange(1, 4)):
            *path, last = chooser.choice(places)
            inner = changed
            for key in path:
                inner = inner[key]
            inner[last] = chooser.choice([
                0, 1, 2, inner[last] ^ 1 << chooser.randrange(33), chooser.getrandbits(64),
            ])  # fmt: skip
        if "caches" not in path and chooser.random() < 0.5:
            more[chooser.randrange(len(more))] ^= chooser.randrange(1, 256)
        if any(g and g[0] * g[1] > 1 << 12 for g in changed["caches"]["geometries"]):
            continue
        try:
            again = Smmu.restore(sealed(changed, bytes(more)), made.smmu.memory.copy())
        except ValueError:
            refused += 1
            continue
        works = Machine(again)
        works.run(program(chooser, 30))
        twin = Smmu.restore(again.save(), again.memory)
        assert twin.save() == again.save()
    assert 0 < refused < 60


# --- memory ---


def filled():
    memory = Memory()
    memory.add(bytearray(range(256)) * 16, 0x1000)
    memory.add(b"read only bytes " * 16, 0x8000)
    memory.add_private(0x10_0000, 0x100_0000)
    memory.add_private(1 << 40, 1 << 40)
    memory.add_private(1 << 51, 1 << 51)  # by chunks
    memory.write(0x10_0FF8, b"at two pages' border")
    memory.write((1 << 40) + (5 << 30), b"far")
    memory.write((1 << 52) - 8, b"last one")
    memory.write((1 << 51) + (3 << 24) - 4, b"two chunks")
    memory.inject_error(address=0x1000, size=64, kind="STE", nth=3, count=2)
    return memory


SPOTS = [(0x1000, 4096), (0x8000, 256), (0x10_0000, 0x4000), ((1 << 40) + (5 << 30), 8),
         ((1 << 52) - 16, 16), ((1 << 51) + (3 << 24) - 16, 32)]  # fmt: skip


def same(a, b):
    assert [tuple(r) for r in a.regions] == [tuple(r) for r in b.regions]
    for address, size in SPOTS:
        assert a.read(address, size) == b.read(address, size)


def out_of_band(value):
    buffers = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return data, buffers


WAYS = {
    "copy": Memory.copy,
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {n}": lambda memory, n=n: pickle.loads(pickle.dumps(memory, protocol=n))
        for n in range(2, 6)
    },
    "out of band": lambda memory: (
        lambda data, buffers: pickle.loads(data, buffers=[bytearray(b) for b in buffers])
    )(*out_of_band(memory)),
    "out of band, read-only": lambda memory: (
        lambda data, buffers: pickle.loads(data, buffers=[bytes(b) for b in buffers])
    )(*out_of_band(memory)),
}


@pytest.mark.parametrize("way", WAYS)
def test_copies_of_memory_are_equal_and_independent(way):
    memory = filled()
    again = WAYS[way](memory)
    same(memory, again)
    with pytest.raises(PermissionError):
        again.write(0x8000, b"x")
    for address in (0x1000, 0x10_0000, 1 << 40, 1 << 51):
        assert memory.read(address, 2) != b"!!"
        again.write(address, b"!!")
        assert memory.read(address, 2) != b"!!"
        memory.write(address, b"??")
        assert again.read(address, 2) == b"!!"
    again.remove(0x1000)
    memory.remove(0x10_0000)


@pytest.mark.parametrize("way", WAYS)
def test_injected_errors_go_on_counting(way):
    memory = Memory()
    memory.add(image(), small.BASE)
    memory.inject_error(kind="STE", nth=3, count=2)
    smmu = Smmu(memory, **small.registers())
    assert smmu.translate(small.STAGE1, small.RW).action == "ok"
    again = Smmu(WAYS[way](memory), **small.registers())
    for each in (smmu, again):
        actions = [each.translate(small.STAGE1, small.RW).action for _ in range(4)]
        assert actions == ["ok", "abort", "abort", "ok"]


def test_only_memory_in_use_is_pickled():
    memory = Memory()
    memory.add_private(0, 1 << 45)
    empty = len(pickle.dumps(memory, protocol=5))
    for i in range(100):
        memory.write(i << 33, b"x")
    assert len(pickle.dumps(memory, protocol=5)) < empty + 100 * 4200
    data, buffers = out_of_band(memory)
    assert [memoryview(b).nbytes for b in buffers] == [4096] * 100
    assert len(data) < empty + 100 * 60
    again = pickle.loads(data, buffers=buffers)
    assert all(again.read(i << 33, 2) == b"x\0" for i in range(100))


def test_writes_of_the_smmu_are_in_use_too():
    chooser = random.Random(2)
    made = machine(chooser, cmdq_base=COMMANDS | 3, eventq_base=EVENTS | 3)
    made.smmu.translate(small.STAGE1, IOVA)
    made.smmu.command("SYNC", CS=1, MSIAddress=MSI + 8, MSIData=0x1234)
    again = made.smmu.memory.copy()
    assert again.read(EVENTS, 1) == b"\x10" and again.read(MSI + 8, 2) == b"\x34\x12"
    assert again.read(COMMANDS, QUEUES) == made.smmu.memory.read(COMMANDS, QUEUES)


def test_updates_of_descriptors_are_in_use_too():
    memory = Memory()
    memory.add_private(0, 1 << 40)
    memory.write(small.BASE, image())
    smmu = Smmu(memory, **small.registers())
    again = copy.deepcopy(smmu)
    leaf = small.BASE + small.LEVEL3 + 8 * (small.NO_AF >> 12)
    assert not again.memory.read_u64(leaf) & 1 << 10
    assert again.translate(UPDATED, small.NO_AF).action == "ok"
    assert again.memory.read_u64(leaf) & 1 << 10
    third = copy.deepcopy(again)
    assert third.memory.read_u64(leaf) & 1 << 10
    assert not memory.read_u64(leaf) & 1 << 10


@pytest.mark.parametrize("seed", range(20))
def test_random_private_memory_comes_back(seed):
    chooser = random.Random(seed)
    memory = Memory()
    size = chooser.choice([1, 7, 4096, 5000, 1 << 21, (1 << 22) + 12, 1 << 40, 1 << 50])
    base = chooser.randrange(1 << 20) << 3
    memory.add_private(base, size)
    spots = []
    for _ in range(12):
        data = chooser.randbytes(chooser.choice([1, 8, 4097, 300_000]))[:size]
        at = chooser.choice([0, size - len(data), chooser.randrange(size - len(data) + 1)])
        memory.write(base + at, data)
        spots.append((base + at, len(data)))
    again = pickle.loads(pickle.dumps(memory, protocol=5))
    for address, n in spots:
        assert again.read(address, n) == memory.read(address, n)
    if size <= 1 << 23:
        assert again.read(base, size) == memory.read(base, size)


def test_out_of_band_buffers_are_the_memory_itself():
    buffer = bytearray(4096)
    memory = Memory()
    memory.add(buffer, 0)
    memory.add_private(0x1_0000, 0x1_0000)
    memory.write(0x1_0000, b"x" * 0x8000)
    data, buffers = out_of_band(memory)
    assert [memoryview(b).nbytes for b in buffers] == [4096, 0x8000]
    memory.write(0, b"late")
    assert bytes(buffers[0])[:4] == b"late"
    again = pickle.loads(data, buffers=buffers)
    again.write(8, b"shared")  # the caller gave these very bytes
    assert buffer[8:14] == b"shared"
    again.write(0x1_0000, b"own")
    assert memory.read(0x1_0000, 3) == b"xxx"
    with pytest.raises(BufferError, match="3 buffers of a pickle refer to this memory"):
        memory.remove(0x1_0000)
    del again
    for held in buffers:
        held.release()
    memory.remove(0x1_0000)
    with pytest.raises(TypeError, match="made by pickling"):
        type(memoryview(out_of_band(memory)[1][0]).obj)()


def test_buffers_out_of_band_outlive_the_memory():
    memory = Memory()
    memory.add_private(0, 1 << 20)
    memory.write(0, b"lives")
    buffers = out_of_band(memory)[1]
    del memory
    gc.collect()
    assert bytes(buffers[0])[:5] == b"lives"


def test_buffers_out_of_band_may_be_in_a_cycle_with_the_memory():
    for _ in range(20):
        memory = Memory()
        memory.add_private(0, 1 << 20)
        memory.write(0, b"cycle")
        buffers = out_of_band(memory)[1]
        buffers.append(memory)
        memory.add_callback(1 << 20, 8, lambda a, n, held=buffers: bytes(held[0])[:n])
        assert memory.read(1 << 20, 5) == b"cycle"
        del memory, buffers
        assert gc.collect() > 0


def test_regions_over_the_same_bytes_stay_so():
    shared = bytearray(64)
    memory = Memory()
    memory.add(shared, 0)
    memory.add(shared, 0x100)
    memory.add(shared, 0x200, readonly=True)
    for way in WAYS.values():
        again = way(memory)
        again.write(0x108, b"seen")
        assert again.read(8, 4) == again.read(0x208, 4) == b"seen"
        with pytest.raises(PermissionError):
            again.write(0x208, b"no")
    assert shared == bytes(64)


def test_callback_regions_are_refused_by_name():
    memory = Memory()
    memory.add_callback(0x4000, 0x1000, lambda a, n: bytes(n))
    memory.add_callback(0x8000, 8, lambda a, n: bytes(n))
    match = r"callback regions cannot be copied or pickled: \[0x4000, 0x4fff\], \[0x8000, 0x8007\]"
    smmu = Smmu(memory)
    for attempt in (Memory.copy, copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=match):
            attempt(memory)
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=match):
            attempt(smmu)
    assert copy.copy(smmu).memory is memory
    assert Smmu.restore(smmu.save(), memory).save() == smmu.save()


# --- the Smmu with its memory ---


@pytest.mark.parametrize("way", [w for w in WAYS if w not in ("copy", "copy.copy")])
def test_an_smmu_goes_with_its_memory(way):
    chooser = random.Random(11)
    first = machine(chooser, caches=Caches.small())
    first.run(program(chooser, 60))
    again = WAYS[way](first.smmu)
    assert again.memory is not first.smmu.memory
    assert again.on_interrupt is None and again.devices == {}
    other = Machine(again)
    first.told.clear()
    rest = program(chooser, 60)
    assert first.run(rest) == other.run(rest)
    assert first.end() == other.end()


def test_two_over_one_memory_stay_so():
    memory = Memory()
    memory.add_private(0, 1 << 20)
    pair = [Smmu(memory), Smmu(memory, gbpa=0x10_1000)]
    for again in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert again[0].memory is again[1].memory is not memory
        assert [s.gbpa for s in again] == [0x1000, 0x10_1000]
    shallow = copy.copy(pair[0])
    assert shallow.memory is memory and shallow is not pair[0]


def test_large_caches_go_out_of_band():
    smmu = Smmu(Memory(), caches=Caches(tlb=(1024, 16)))
    data, buffers = out_of_band(smmu)
    assert len(data) < 200 and len(buffers) == 1
    assert pickle.loads(data, buffers=buffers).save() == smmu.save()


# --- names of version 0.2 ---

OLD_MODULES = {
    "_memory": "_engine.memory", "_tlb": "_engine.tlb", "_smmu": "_device.smmu",
    "_registers": "_device.registers", "_pasid": "_driver.pasid",
}  # fmt: skip


@pytest.mark.parametrize("old", OLD_MODULES)
def test_what_the_modules_of_0_2_held_is_found_under_their_names(old):
    program = (
        "import importlib, sys\n"
        f"old = importlib.import_module('smmufast.{old}')\n"
        f"new = importlib.import_module('smmufast.{OLD_MODULES[old]}')\n"
        f"import smmufast\n"
        f"assert smmufast.{old} is old and not hasattr(old, '__file__')\n"
        "names = [name for name in vars(new) if not name.startswith('__')]\n"
        "assert len(names) > 5 and all(getattr(old, n) is getattr(new, n) for n in names)\n"
        "assert not hasattr(old, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True, env=os.environ)


def test_a_pickle_that_names_a_module_of_0_2_is_loaded():
    memory = Memory()
    memory.add_private(0, 4096)
    memory.write_u64(8, 5)
    text = pickle.dumps(memory, 0).replace(b"smmufast._engine.memory", b"smmufast._memory")
    assert b"smmufast._memory" in text
    assert pickle.loads(text).read_u64(8) == 5
