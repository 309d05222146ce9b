"""Random bytes as stream tables, CDs and page tables: every outcome is defined, all faces agree.

    python -P tests/fuzz_bytes.py [--rounds N | --seconds N] [--seed S]

Each round is one system, named by its seed: random Features and registers, memory in pieces of
exactly the size that is added (so that a sanitizer sees a read beyond it), requests through every
face, injected errors, and memory that is taken away between calls.  sanitize.py runs this under
AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import argparse
import collections
import contextlib
import ctypes
import itertools
import random
import sys
import time
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # python -P leaves this folder out
    sys.path[:0] = [str(Path(__file__).resolve().parent / name) for name in ("", "support")]

import rawfeatures
import small
import tablegen

import smmufast
from smmufast import (
    ACTIONS,
    COLUMNS,
    Caches,
    ExternalAbort,
    Fault,
    Features,
    Memory,
    Smmu,
    layout,
)

ALL_ONES = (1 << 64) - 1
EVENTS = {0, *smmufast.faults.FAULTS}


# --- memory of exact size ---


def exact(data):
    """A writable buffer on the heap that ends where the data ends."""
    buffer = (ctypes.c_char * len(data))()
    ctypes.memmove(buffer, bytes(data), len(data))
    return buffer


def odd(data, shift):
    """As exact, at an address that is not a multiple of 8."""
    return memoryview(exact(bytes(shift) + bytes(data)))[shift:]


def add_piece(rng, memory, base, data):
    """Add one piece of memory in one of the ways that there are."""
    kind = rng.random()
    if kind < 0.6:
        memory.add(exact(data), base)
    elif kind < 0.75:
        memory.add(odd(data, rng.randrange(1, 8)), base)
    elif kind < 0.85:
        memory.add(bytes(data), base)
    elif kind < 0.95:
        memory.add_private(base, len(data))
        memory.write(base, data)
    else:
        data = bytes(data)
        refused = base + 8 * rng.randrange(1 + len(data) // 8)

        def read(address, n):
            return None if address == refused else data[address - base : address - base + n]

        memory.add_callback(base, len(data), read)


def add_pieces(rng, memory, base, data):
    """Add a run of memory, whole or cut at multiples of 8; its end may be missing."""
    if rng.random() < 0.3:
        data = data[: max(1, len(data) - rng.randrange(1, 130))]
    cuts = []
    if rng.random() < 0.4 and len(data) >= 8:
        cuts = sorted(8 * rng.randrange(1, 1 + len(data) // 8) for _ in range(rng.randrange(1, 4)))
    edges = [0, *dict.fromkeys(c for c in cuts if c < len(data)), len(data)]
    for first, end in itertools.pairwise(edges):
        add_piece(rng, memory, base + first, data[first:end])


# --- systems ---


def random_features(rng):
    """Any Features that can be, as far as they are modelled."""
    while True:
        codes = {}
        for name in rawfeatures.NAMES:
            if rng.random() < 0.15:
                codes[name] = rng.choice((0, 1, 1, 2, 3, 5, 6, rng.randrange(33)))
        if codes.get("sidsize", 32) >= 7:
            codes["st_level"] = 1
        with contextlib.suppress(ValueError):
            return smmufast.modelled(Features(**codes))[0]


def features_of_registers(rng):
    """Features of identification registers that hold anything."""
    while True:
        with contextlib.suppress(ValueError):
            words = [rng.getrandbits(32) for _ in range(4)]
            return smmufast.modelled(Features.from_idr(*words, rng.randrange(5)))[0]


def noise(rng):
    """(runs of memory, registers): words that are random, and pointers among them."""
    size = rng.choice((8, 64, 200, 0x1000, 0x1000, 0x4000, 0x8000)) + rng.choice((0, 0, 1, 7, 8))
    base = rng.choice((0, 0x4000_0000, 0xF_FFF0_0000, (1 << 52) - 0x1_0000, 0x1000))
    base = min(base, (1 << 64) - size) & ~7
    words = np.frombuffer(rng.randbytes(size // 8 * 8 + 8), np.uint64).copy()
    inside = (1 << max(0, (size - 1).bit_length())) - 1

    def pointer(mask):
        return base + (rng.getrandbits(40) & inside & mask)

    if rng.random() < 0.85:
        for slot in range(0, len(words) - 8, 8):
            kind = rng.randrange(5)
            if kind == 0:  # a stream table entry
                words[slot] = (
                    pointer(~63) | 1 | rng.choice((5, 5, 5, 5, 4, 0, 7)) << 1
                    | rng.randrange(4) << 4 | rng.choice((0, 0, 0, 2, 8, 20, 31)) << 59
                )  # fmt: skip
                words[slot + 1] &= np.uint64(ALL_ONES ^ (1 << 27 | 1 << 30))
            elif kind == 1:  # a context descriptor
                low = (
                    rng.randrange(12, 49) | rng.randrange(12, 49) << 16 | 1 << 31
                    | rng.randrange(4) << 6 | rng.randrange(4) << 22
                    | rng.choice((0, 1 << 14, 1 << 30)) | rng.randrange(8) << 32
                    | rng.getrandbits(9) << 35 | 1 << 41 | 1 << 46 | rng.getrandbits(1) << 45
                    | rng.getrandbits(1) << 15
                )  # fmt: skip
                words[slot] = low
                words[slot + 1] = pointer(~15) | rng.getrandbits(4)
                words[slot + 2] = pointer(~15)
            elif kind < 4:  # descriptors
                for i in range(slot, slot + 8):
                    words[i] = (
                        pointer(~0xFFF) | rng.choice((0, 0, rng.getrandbits(12) << 52))
                        | rng.getrandbits(10) << 2 | rng.choice((3, 3, 3, 1, 0))
                    )  # fmt: skip
    data = bytearray(words.tobytes()[:size])
    registers = {
        "strtab_base": rng.choice((base, base, base, pointer(~63), rng.getrandbits(64))),
        "strtab_base_cfg": rng.choice((
            rng.randrange(12), 1 << 16 | rng.choice((6, 8, 10)) << 6 | rng.randrange(16),
            rng.getrandbits(32),
        )),
    }  # fmt: skip
    return [(base, data)], registers


def damaged(rng):
    """(runs of memory, registers): the small system with some bits inverted."""
    image = small.build()
    used = [
        *range(small.STES, small.STES + 0x300), *range(small.CDS, small.CDS + 0x300),
        small.L1STD, small.L1CDS + 8, *range(small.LEVEL1, small.LEVEL1 + 8),
        *range(small.LEVEL2, small.LEVEL2 + 16), *range(small.LEVEL3, small.LEVEL3 + 80),
    ]  # fmt: skip
    for _ in range(rng.randrange(12)):
        image[rng.choice(used)] ^= 1 << rng.randrange(8)
    registers = rng.choice((small.registers, small.registers_two_level))()
    if rng.random() < 0.2:
        registers["strtab_base_cfg"] ^= 1 << rng.randrange(20)
    return [(small.BASE, image[: rng.choice((small.SIZE, 0x6050, 0x6048, 0x1040))])], registers


def generated(rng):
    """(runs of memory, registers, features, requests) of the random systems that twin.py uses."""
    if rng.random() < 0.7:
        system = tablegen.random_system(rng)
    else:
        system = tablegen.random_bytes_system(rng)
    features = rawfeatures.raw_of(system.features)
    requests = [
        small.Request(r.sid, r.iova, r.ssid, r.write, r.priv, r.instr) for r in system.requests(60)
    ]
    return system.regions(), dict(vars(system.regs)), features, requests


def random_requests(rng, registers, count):
    """Requests that reach something, mostly."""
    found = list(small.REQUESTS) if rng.random() < 0.5 else []
    bits = registers["strtab_base_cfg"] & 63
    for _ in range(count):
        iova = rng.getrandbits(rng.choice((12, 16, 21, 30, 39, 48, 52, 56, 64)))
        if rng.random() < 0.3:
            iova ^= ALL_ONES
        sid = rng.getrandbits(max(1, min(32, rng.choice((3, 3, 4, 4, bits, 32)))))
        ssid = rng.choice((None, None, None, 0, 1, rng.getrandbits(20)))
        flags = (rng.random() < 0.3, rng.random() < 0.5, rng.random() < 0.2)
        found.append(small.Request(sid, iova, ssid, *flags))
    return found


# --- what must hold ---


def check_defined(smmu, request, result):
    """An outcome is one of those that the architecture has, and its parts fit each other."""
    row = small.row(result)
    pa, action, event, fault, perm, level, page_lg2, attr, sh, ipa, stage, record = row
    assert ACTIONS[action] == result.action
    assert fault in EVENTS
    assert event in (0, fault)
    assert 0 <= perm < 64
    assert sh in (0, 2, 3)
    assert 0 <= stage <= 3
    assert ipa == 0 or (result and stage & 2)
    oas = smmu.features.oas_bits
    if result:
        assert fault == 0
        # a block may be larger than the whole output space: only its base is checked
        assert not pa >> max(oas, page_lg2)
        assert record == bytes(32)
    else:
        assert pa == 0
        assert (level, page_lg2) == (4, 0)
    if result.action == "ok":
        assert -1 <= level <= 3
        assert 12 <= page_lg2 <= 48
        assert pa & (1 << page_lg2) - 1 == request.iova & (1 << page_lg2) - 1
        assert perm
    elif result:
        assert pa == request.iova
    if fault:
        assert result.fault.sid == request.sid
        assert str(result.fault)
    assert repr(result)
    assert (result.memory_type is None) == (not result)
    assert result.page_size == (2**page_lg2 if page_lg2 else None)
    _ = (result.asid, result.is_global, result.contiguous, attr)
    return row


def read_or_none(memory, fetch):
    try:
        return memory.read(fetch.address, fetch.size)
    except ExternalAbort:
        return None


def check_request(smmu, request):
    """One request through every face that takes one; its row."""
    result = smmu.translate(request.sid, request.iova, **request.access)
    row = check_defined(smmu, request, result)
    traced = smmu.translate(request.sid, request.iova, **request.access, trace=True)
    assert small.row(traced) == row, "trace"
    assert len(traced.fetches) <= 80
    walk = smmu.start_walk(request.sid, request.iova, **request.access)
    while (fetch := walk.request) is not None:
        walk.supply(read_or_none(smmu.memory, fetch))
    assert small.row(walk.result) == row, "walk"
    assert walk.result.fetches == traced.fetches, "fetches"
    try:
        assert smmu.pa(request.sid, request.iova, **request.access) == row[0], "pa"
    except Fault as fault:
        assert small.row(fault.result) == row, "result of pa"
    return row


def check_range(rng, smmu, request, row):
    size = min(rng.choice((1, 64, 4096, 1 << 16, 1 << 20)), (1 << 64) - request.iova)
    burst = smmu.translate_range(request.sid, request.iova, size, **request.access)
    if row[1] <= 2:
        assert next(iter(burst))[:2] == (request.iova, row[0]), "range"
    else:
        assert small.row(burst.result) == row, "range"
    total = sum(length for _, _, length in burst)
    assert total == size if burst else total < size


def exact_array(values, dtype, rng):
    """An array on the heap that ends where its last value ends; aligned or not."""
    values = np.asarray(values, dtype)
    return np.frombuffer(odd(values.tobytes(), rng.randrange(8)), dtype)


def exact_out(rng, n):
    """A structured array of every column, packed, at any address; or backwards, or a dict."""
    dtype = np.dtype([(name, COLUMNS[name]) for name in small.ALL])
    out = np.frombuffer(odd(rng.randbytes(dtype.itemsize * n), rng.randrange(8)), dtype)
    return out[::-1] if rng.random() < 0.3 else out


def check_batch(rng, smmu, requests, expected):
    n = len(requests)
    arguments = small.columns(requests)
    arguments = {name: exact_array(a, a.dtype, rng) for name, a in arguments.items()}
    if not arguments["write"].any() and rng.random() < 0.8:
        for name in ("write", "priv", "instr"):
            arguments[name] = False
    out = exact_out(rng, n)
    assert smmu.translate_batch(**arguments, out=out) is out
    assert small.rows(out) == expected, "batch"
    columns = {name: exact_array(np.zeros(n, COLUMNS[name]), COLUMNS[name], rng)
               for name in rng.sample(small.ALL[:-1], 3)}  # fmt: skip
    smmu.translate_batch(**arguments, out=columns)
    for name, array in columns.items():
        assert array.tolist() == [row[small.ALL.index(name)] for row in expected], name


def check_batches_by_access(rng, smmu, requests, rows):
    """Requests of the same stream and access, many at once: what batches reuse is used."""
    groups = collections.defaultdict(list)
    for request, row in zip(requests, rows, strict=True):
        groups[request.sid, request.ssid, request.write, request.priv, request.instr].append(
            (request.iova, row)
        )
    for (sid, ssid, write, priv, instr), members in groups.items():
        members *= rng.randrange(1, 4)
        rng.shuffle(members)
        found = smmu.translate_batch(
            sid, exact_array([iova for iova, _ in members], np.uint64, rng),
            ssid=ssid, write=write, priv=priv, instr=instr, columns=small.ALL,
        )  # fmt: skip
        assert small.rows(found) == [row for _, row in members], "batch by access"


def nonsense_walk(rng, smmu, request):
    """A walk that is told anything at all."""
    walk = smmu.start_walk(request.sid, request.iova, **request.access)
    steps = 0
    while (fetch := walk.request) is not None:
        data = bytearray(rng.randbytes(fetch.size))
        if fetch.size == 64 and rng.random() < 0.7:
            data[0:1] = b"\x0b"  # as an STE: valid, stage 1
            if fetch.kind == "CD":
                data[:8] = (0x4202_8000_0000 | rng.randrange(12, 48) | rng.getrandbits(2) << 6
                            | 1 << 30 | 6 << 32).to_bytes(8, "little")  # fmt: skip
        elif rng.random() < 0.8:
            data[0] |= 3
        walk.supply(exact(data) if rng.random() < 0.95 else None)
        steps += 1
    assert steps <= 80
    check_defined(smmu, request, walk.result)
    assert len(walk.result.fetches) == steps


def play_with_errors(rng, smmu, requests):
    """Injected errors: whatever they hit, a batch is the requests one by one."""
    injections = [
        {
            "kind": rng.choice((None, "STE", "CD", "TT", "L1STD", "L1CD")),
            "level": rng.choice((None, None, None, -1, 1, 3)),
            "nth": rng.choice((None, 1, rng.randrange(1, 30))),
            "count": rng.choice((None, 1, 5)),
        }
        for _ in range(rng.randrange(1, 3))
    ]
    for injection in injections:
        if injection["kind"] != "TT":
            injection["level"] = None  # other structures have none
    found = []
    for one_by_one in (False, True):
        for injection in injections:
            smmu.memory.inject_error(**injection)
        if one_by_one:
            found.append([small.row(r) for r in small.translate_each(smmu, requests)])
        else:
            found.append(small.batch_rows(smmu, requests))
        smmu.memory.clear_errors()
    assert found[0] == found[1], f"injected {injections}"


def random_caches(rng):
    """Caches that are full soon."""
    shapes = ((1, 1), (1, 2), (2, 4), (4, 3), None)
    names = ("ste", "cd", "tlb", "walk1", "walk2")
    return Caches(
        **{name: rng.choice(shapes) for name in names}, nested=rng.choice(("combined", "split"))
    )


def play_with_caches(rng, memory, features, registers, requests):
    """Random bytes through caches: walks, single calls and batches give and leave the same."""
    caches = random_caches(rng)
    one, batched, walked = (
        Smmu(memory, rawfeatures.raw_of(features, httu=0, stall_model=1), **registers, caches=each)
        for each in (caches, caches.copy(), caches.copy())
    )
    for _ in range(3):
        chosen = rng.choices(requests, k=rng.randrange(1, 40))
        rows = [small.row(result) for result in small.translate_each(one, chosen)]
        assert small.batch_rows(batched, chosen) == rows, "batch through caches"
        for request, row in zip(chosen, rows, strict=True):
            walk = walked.start_walk(request.sid, request.iova, **request.access)
            while (fetch := walk.request) is not None:
                walk.supply(read_or_none(memory, fetch))
            assert small.row(walk.result) == row, "walk through caches"
        for other in (batched, walked):
            assert other.caches.__getstate__() == caches.__getstate__(), "caches"
        one.stale()
        command = rng.choice(("TLBI_NSNH_ALL", "CFGI_ALL", "CFGI_STE"))
        for smmu in (one, batched, walked):
            smmu.command(command)
    for request in chosen[:3]:
        nonsense_walk(rng, walked, request)
    walked.stale()


def random_register(rng, places):
    """(name, value): a register, and a value that may even mean something."""
    record = rng.choice(list(layout.REGISTERS.values()))
    if rng.random() < 0.4:
        record = layout.REGISTERS[rng.choice(("CR0", "CMDQ_PROD", "EVENTQ_CONS", "GERRORN"))]
    value = rng.getrandbits(8 * record.bytes)
    if record.name.endswith(("_BASE", "_CFG0")):
        value = rng.choice(places) + (rng.randrange(0x200) & ~31) | rng.randrange(6)
    elif record.name in ("CR0", "IRQ_CTRL"):
        value = rng.choice((value, rng.randrange(32), 15, 15))
    elif record.name.endswith(("PROD", "CONS")):
        value = rng.choice((value, rng.randrange(16), rng.randrange(4)))
    elif record.name == "GERRORN":
        value = rng.choice((value, rng.getrandbits(11)))
    elif record.name == "STRTAB_BASE_CFG":
        value = rng.randrange(16) | rng.randrange(2) << 16 | 8 << 6
    return record.name, value


def random_command(rng):
    """A command of the table with any fields, or any bits."""
    if rng.random() < 0.1:
        return rng.getrandbits(128)
    record = rng.choice(list(layout.COMMANDS.values()))
    fields = {}
    for field in record.fields:
        if field.name not in (*record.fixed, "SSec"):
            value = rng.getrandbits(rng.choice((2, field.width))) & (1 << field.width) - 1
            fields[field.name] = value << field.lsb % 64 if field.address else value
    return layout.pack(record, **fields)


class FuzzedDevice:
    """A device whose answers are anything."""

    def __init__(self, rng):
        self.rng = rng

    def atc_invalidate(self, ssid, address, size, global_):
        assert ssid is None or 0 <= ssid < 1 << 20
        assert 0 <= address <= address + size - 1 < 1 << 64
        if self.rng.random() < 0.1:
            raise TimeoutError("no answer")
        return self.rng.choice((None, True, False))

    def pri_response(self, ssid, prg_index, code):
        assert 0 <= prg_index < 512
        assert code in (0, 1, 2)


def stalling(rng):
    """(Memory, registers, requests): the small system, whose CDs may say that faults stall."""
    image = small.build()
    for offset in range(small.CDS, small.CDS + 0x300, 64):
        image[offset + 5] |= rng.getrandbits(1) << 4  # CD.S
    memory = Memory()
    memory.add(exact(image), small.BASE)
    return memory, small.registers(), small.REQUESTS


def play_with_registers(rng, memory, features, registers, requests):
    """Anything in registers and queues: nothing but what the architecture has comes out."""
    if rng.random() < 0.5:
        memory, registers, requests = stalling(rng)
        features = Features.full().replace(stall_max=rng.choice((0, 1, 3, 100)))
    queues = 0x7FFF_0000_0000 if features.oas_bits >= 48 else 0xF000_0000
    with contextlib.suppress(ValueError):
        memory.add(exact(bytes(rng.choice((0x88, 0x400, 0x400)))), queues)
    wires = []
    wired = not features.msi or rng.random() < 0.8
    smmu = Smmu(memory, features, cr0=0, wired=wired, on_interrupt=wires.append)
    places = [region.base for region in memory.regions] + [rng.getrandbits(56), 0]
    places += [queues] * len(places)
    for sid in range(4):
        smmu.devices[sid] = FuzzedDevice(rng)
    if rng.random() < 0.8:
        for name in ("strtab_base", "strtab_base_cfg"):
            smmu.write(name, registers[name] & (1 << 8 * layout.REGISTERS[name.upper()].bytes) - 1)
        for name in ("CMDQ_BASE", "EVENTQ_BASE", "PRIQ_BASE"):
            offset = rng.choice((0, 0x100, 0x200, 32 * rng.randrange(16)))
            smmu.write(name, rng.choice((queues, queues, *places)) + offset + rng.randrange(4))
        smmu.write("IRQ_CTRL", 7)
        smmu.write("CR0", 15)
    held = []
    smmu.on_resume = held.append
    for _ in range(120):
        step = rng.randrange(8)
        if step < 3:
            smmu.write(*random_register(rng, places))
        elif step == 3:
            size = rng.choice((1, 2, 4, 4, 4, 8))
            smmu.write(rng.randrange(rng.choice((0x220, 0x20000))), rng.getrandbits(8 * size), size)
        elif step == 4:
            base = smmu.cmdq_base & (1 << 56) - 32 & -16 << (smmu.cmdq_base & 31)
            for i in range(8):
                word = random_command(rng)
                with contextlib.suppress(ExternalAbort, PermissionError):
                    memory.write(base + 16 * i, exact(word.to_bytes(16, "little")))
            if rng.random() < 0.8:
                smmu.write("GERRORN", smmu.gerror)
            if rng.random() < 0.8:
                smmu.write("CMDQ_PROD", smmu.read("CMDQ_CONS") + rng.randrange(9) & 15)
        elif step == 5:
            smmu.page_request(
                rng.randrange(8), rng.getrandbits(52) << 12, ssid=rng.choice((None, 5)),
                read=rng.random() < 0.5, last=rng.random() < 0.5,
            )  # fmt: skip
        else:
            request = rng.choice(requests)
            result = smmu.translate(request.sid, request.iova, **request.access)
            assert result.action in ACTIONS
            assert (result.action == "stall") <= (features.stall_model != 1)
            small.batch_rows(smmu, rng.sample(requests, 3))
        if smmu.stalls and rng.random() < 0.3:
            stall = rng.choice(smmu.stalls)
            name = rng.choice(("RESUME", "RESUME", "STALL_TERM"))
            stag = {"STAG": stall.stag or 0, "Ac": rng.getrandbits(1), "Ab": rng.getrandbits(1)}
            with contextlib.suppress(BufferError, ExternalAbort, PermissionError):
                smmu.command(name, StreamID=stall.sid, **(stag if name == "RESUME" else {}))
        assert not smmu.gerror >> 8
        assert smmu.read("CMDQ_CONS") >> 24 < 128
        assert all(stall.done and stall.result is not None for stall in held)
        assert not any(stall.done for stall in smmu.stalls)
    for name, record in layout.REGISTERS.items():
        assert 0 <= smmu.read(name) < 1 << 8 * record.bytes
    assert set(wires) <= ({"eventq", "priq", "gerror", "cmdq_sync", "sev"} if wired else {"sev"})
    smmu.reset()
    assert smmu.stalls == []
    with contextlib.suppress(KeyError):
        memory.remove(queues)


def play_with_memory(rng, smmu, requests):
    """Reads and writes of the host, and regions that come and go between translations."""
    memory = smmu.memory
    regions = memory.regions
    for region in regions:
        for edge in (region.base, region.base + region.size):
            for _ in range(3):
                address = max(0, edge - rng.randrange(80))
                size = rng.randrange(160)
                with contextlib.suppress(ExternalAbort):
                    data = memory.read(address, size)
                    assert len(data) == size
                    with contextlib.suppress(PermissionError):
                        memory.write(address, exact(data) if size else b"")
    order = list(regions)
    rng.shuffle(order)
    for region in order:
        for request in rng.sample(requests, 3):
            smmu.translate(request.sid, request.iova, **request.access)
        memory.remove(region.base)
        for request in rng.sample(requests, 3):
            check_request(smmu, request)
        small.batch_rows(smmu, requests[:20])
    assert memory.regions == []


def round_of(seed):
    """One system and everything that is done with it; Counter of its outcomes."""
    rng = random.Random(seed)
    kind = rng.random()
    if kind < 0.25:
        runs, registers, features, requests = generated(rng)
    else:
        runs, registers = noise(rng) if kind < 0.75 else damaged(rng)
        features = Features() if rng.random() < 0.4 else (
            random_features(rng) if rng.random() < 0.7 else features_of_registers(rng)
        )  # fmt: skip
        requests = random_requests(rng, registers, 30)
        registers |= {
            "cr0": rng.choice((5, 5, 5, 1, 0, rng.getrandbits(32))), "cr2": rng.randrange(8),
            "gbpa": rng.getrandbits(32),
        }  # fmt: skip
    memory = Memory()
    for base, data in runs:
        add_pieces(rng, memory, base, data)
    # faces are compared where a translation leaves nothing behind: no updates, no stalls
    smmu = Smmu(memory, rawfeatures.raw_of(features, httu=0, stall_model=1), **registers)
    rows = [check_request(smmu, request) for request in requests]
    check_batch(rng, smmu, requests, rows)
    check_batches_by_access(rng, smmu, requests, rows)
    for request, row in zip(requests[:10], rows, strict=False):
        check_range(rng, smmu, request, row)
    for request in requests[:3]:
        nonsense_walk(rng, smmu, request)
    play_with_caches(rng, memory, features, registers, requests[:20])
    play_with_errors(rng, smmu, requests[:20])
    play_with_registers(rng, memory, features, registers, requests)
    play_with_memory(rng, smmu, requests)
    return collections.Counter((ACTIONS[row[1]], row[3]) for row in rows)


def run(rounds=None, seconds=None, seed=0, tell=None):
    """Play rounds from a seed on; (rounds, Counter of outcomes).  A failure names its seed."""
    outcomes = collections.Counter()
    start = time.monotonic()
    done = 0
    while done < rounds if seconds is None else time.monotonic() - start < seconds:
        try:
            outcomes += round_of(seed + done)
        except BaseException as error:
            error.add_note(f"fuzz_bytes: seed {seed + done}")
            raise
        done += 1
        if tell and done % 500 == 0:
            tell(f"{done} systems, {outcomes.total()} requests")
    return done, outcomes


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=200, help="systems to try (200)")
    parser.add_argument("--seconds", type=float, help="try for so long instead")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first system (0)")
    arguments = parser.parse_args()
    done, outcomes = run(arguments.rounds, arguments.seconds, arguments.seed, print)
    print(f"{done} systems from seed {arguments.seed}: {outcomes.total()} requests, all defined")
    for (action, fault), count in sorted(outcomes.items()):
        name = smmufast.layout.Event(fault).name if fault else ""
        print(f"{count:8} {action:8} {name}")


if __name__ == "__main__":
    main()
