"""A small system in which every outcome has a request that gives it, for tests of the faces.

One linear stream table, and a two-level one over the same entries; 4 KiB tables of three levels,
of both stages.
"""

from typing import NamedTuple

import numpy as np
from ptwriter import (
    encode_cd,
    encode_l1cd,
    encode_l1std,
    encode_ste,
    leaf_descriptor,
    stage2_leaf_descriptor,
)
from ptwriter import table_descriptor as table

from smmufast import NO_SUBSTREAM, Memory, Smmu

BASE = 0x8000_0000
SIZE = 0x1_0000  # the stream table, of which the beginning is there, is aligned to four of it
HOLE = 0x100_0000  # from the base: where no memory is
QUEUES = 0x9000_0000  # memory for queues and MSIs, of a `device`

# Offsets of what the image holds.
STES = 0x0000
L1STD = 0x0800
CDS = 0x1000
MORE_CDS = 0x1800  # of streams that tests add
L1CDS = 0x2000
CD_LEAF = 0x3000
LEVEL1 = 0x4000
LEVEL2 = 0x5000
LEVEL3 = 0x6000
STAGE2_LEVEL1 = 0x7000
STAGE2_LEVEL2 = 0x8000
STAGE2_LEVEL3 = 0x9000
GUEST_CDS = 0xA000
GUEST_LEVEL1 = 0xB000
GUEST_LEVEL2 = 0xC000
GUEST_LEVEL3 = 0xD000
GUEST = 0x10_0000  # IPA of offset 0, for the four pages that lie in IPA space

# Streams.
ABORTED, STAGE1, BYPASSED, SUBSTREAMS, INVALID, NO_CD, BAD_CD, NO_TABLE, NEEDS_SSID, SILENT = range(
    10
)
TWO_LEVEL_CD, STAGE2, NESTED, NO_GUEST_CD = range(10, 14)
BEYOND_MEMORY = 0xF00  # within the stream table, outside memory
BEYOND_TABLE = 0x1000

RW, RO, NO_AF, UNMAPPED, TOO_HIGH, RUN, BLOCK = (
    0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000, 0x20_0000,
)  # fmt: skip


class Request(NamedTuple):
    """One transaction."""

    sid: int
    iova: int
    ssid: int | None = None
    write: bool = False
    priv: bool = False
    instr: bool = False

    @property
    def access(self):
        """The keywords of every face."""
        return {"ssid": self.ssid, "write": self.write, "priv": self.priv, "instr": self.instr}


# What must come out, by hand: the physical address of each that succeeds,
PHYSICAL = {
    Request(STAGE1, RW + 0x234): 0x4000_1234,
    Request(STAGE1, RW, write=True): 0x4000_1000,
    Request(STAGE1, RW + 0xFFF, priv=True): 0x4000_1FFF,
    Request(STAGE1, RO + 8): 0x4000_5008,
    Request(STAGE1, RO, instr=True): 0x4000_5000,
    Request(STAGE1, RUN): 0x4000_9000,
    Request(STAGE1, RUN + 0x1000): 0x4000_A000,
    Request(STAGE1, RUN + 0x2000): 0x4000_C000,
    Request(STAGE1, BLOCK + 0x12_3456): 0x5032_3456,
    Request(BYPASSED, 0x1234_5678): 0x1234_5678,
    Request(SUBSTREAMS, RW, ssid=1): 0x4000_1000,
    Request(SUBSTREAMS, 0x9999_0000): 0x9999_0000,  # S1DSS=01
    Request(NEEDS_SSID, RW, ssid=3): 0x4000_1000,
    Request(SILENT, RW): 0x4000_1000,
    Request(TWO_LEVEL_CD, RO, ssid=0x41): 0x4000_5000,
    Request(STAGE2, RW + 0x234, write=True): 0x6000_1234,
    Request(STAGE2, RO + 8, priv=True): 0x6000_5008,
    Request(STAGE2, BLOCK + 0x12_3456): 0x7032_3456,
    Request(NESTED, RW + 0x234): 0x6000_1234,
    Request(NESTED, RO + 8): 0x6000_5008,
    Request(NESTED, RUN + 0xABC, write=True): 0x7020_1ABC,
}

# and a request for each event; 0 is an abort without one.
EVENTS = {
    0x00: Request(ABORTED, RW),
    0x02: Request(BEYOND_TABLE, RW),
    0x03: Request(BEYOND_MEMORY, RW),
    0x04: Request(INVALID, RW),
    0x06: Request(NEEDS_SSID, RW),
    0x08: Request(STAGE1, RW, ssid=0),
    0x09: Request(NO_CD, RW),
    0x0A: Request(BAD_CD, RW),
    0x0B: Request(NO_TABLE, RW, write=True),
    0x10: Request(STAGE1, UNMAPPED + 0x10, priv=True),
    0x11: Request(STAGE1, TOO_HIGH),
    0x12: Request(STAGE1, NO_AF),
    0x13: Request(STAGE1, RO, write=True),
}

# What stage 2 refuses: the event's number, the stages that took part and its CLASS.
STAGE2_FAULTS = {
    Request(STAGE2, UNMAPPED + 0x10): (0x10, 2, 0b10),
    Request(STAGE2, TOO_HIGH): (0x11, 2, 0b10),
    Request(STAGE2, NO_AF, write=True): (0x12, 2, 0b10),
    Request(STAGE2, RO, write=True): (0x13, 2, 0b10),
    Request(NESTED, NO_AF): (0x12, 3, 0b10),
    Request(NESTED, RO, write=True): (0x13, 3, 0b10),
    Request(NESTED, TOO_HIGH): (0x10, 3, 0b10),
    Request(NESTED, BLOCK, priv=True): (0x10, 3, 0b01),
    Request(NO_GUEST_CD, RW): (0x10, 2, 0b00),
}

REQUESTS = [
    *PHYSICAL,
    *EVENTS.values(),
    *STAGE2_FAULTS,
    Request(SILENT, UNMAPPED),
    Request(SILENT, RO, write=True),
    Request(SUBSTREAMS, RW, ssid=4),
    Request(TWO_LEVEL_CD, RW, ssid=0x81),
    Request(BYPASSED, 1 << 60),
    Request(STAGE1, 0xFFFF_FFFF_FFFF_F000),
    Request(STAGE1, RW, write=True, priv=True, instr=True),
]


def registers(base=BASE):
    """The keywords of Smmu for the linear stream table."""
    return {"strtab_base": base + STES, "strtab_base_cfg": 12}


def registers_two_level(base=BASE):
    """The same streams through a level-1 table, 64 to a leaf."""
    return {"strtab_base": base + L1STD, "strtab_base_cfg": 1 << 16 | 6 << 6 | 12}


def stage1_cd(base=BASE):
    """Fields of the CD of STAGE1."""
    return {
        "v": 1, "aa64": 1, "a": 1, "r": 1, "t0sz": 25, "epd1": 1, "ips": 4, "asid": 7,
        "ttb0": base + LEVEL1, "mair": 0x44FF,
    }  # fmt: skip


def build(base=BASE):
    """The bytes of memory from `base` on; `base` is a multiple of 4 * SIZE below 2^44."""
    image = bytearray(SIZE)

    def put(offset, data):
        image[offset : offset + len(data)] = data

    def put_descriptor(offset, index, descriptor):
        put(offset + 8 * index, descriptor.to_bytes(8, "little"))

    cd = stage1_cd(base)
    good = encode_cd(**cd)
    put(CDS, good)
    put(CDS + 0x100, encode_cd(**cd | {"v": 0}))
    put(CDS + 0x140, encode_cd(**cd | {"ttb0": base + HOLE}))
    put(CDS + 0x180, encode_cd(**cd | {"a": 0, "r": 0}))
    for ssid in range(4):
        put(CDS + 0x200 + 64 * ssid, good)
    put(L1CDS + 8, encode_l1cd(base + CD_LEAF))
    put(CD_LEAF + 64 * (0x41 & 63), good)

    def put_ste(sid, **fields):
        put(STES + 64 * sid, encode_ste(v=1, **fields))

    put_ste(ABORTED)
    put_ste(STAGE1, config=5, s1contextptr=base + CDS)
    put_ste(BYPASSED, config=4)
    put_ste(SUBSTREAMS, config=5, s1contextptr=base + CDS + 0x200, s1cdmax=2, s1dss=1)
    put_ste(NO_CD, config=5, s1contextptr=base + HOLE)
    put_ste(BAD_CD, config=5, s1contextptr=base + CDS + 0x100)
    put_ste(NO_TABLE, config=5, s1contextptr=base + CDS + 0x140)
    put_ste(NEEDS_SSID, config=5, s1contextptr=base + CDS + 0x200, s1cdmax=2)
    put_ste(SILENT, config=5, s1contextptr=base + CDS + 0x180)
    put_ste(TWO_LEVEL_CD, config=5, s1contextptr=base + L1CDS, s1cdmax=8, s1fmt=1)
    put(L1STD, encode_l1std(7, base + STES))
    put(L1STD + 8 * (BEYOND_MEMORY >> 6), encode_l1std(7, base + HOLE))

    put_descriptor(LEVEL1, 0, table(12, base + LEVEL2))
    put_descriptor(LEVEL2, 0, table(12, base + LEVEL3))
    put_descriptor(LEVEL2, 1, leaf_descriptor(12, 2, 0x5020_0000, ap=1))
    for va, pa, flags in (
        (RW, 0x4000_1000, {"ap": 1}),
        (RO, 0x4000_5000, {"ap": 3, "attrindx": 1, "ng": 1}),
        (NO_AF, 0x4000_6000, {"ap": 1, "af": 0}),
        (TOO_HIGH, 1 << 45, {"ap": 1}),
        (RUN, 0x4000_9000, {"ap": 1}),
        (RUN + 0x1000, 0x4000_A000, {"ap": 1}),
        (RUN + 0x2000, 0x4000_C000, {"ap": 1, "contiguous": 1}),
    ):
        put_descriptor(LEVEL3, va >> 12, leaf_descriptor(12, 3, pa, **flags))
    build_stage2(base, put, put_descriptor, cd)
    return image


def build_stage2(base, put, put_descriptor, cd):
    """The streams with a stage 2: 39 bits of IPA space, and stage-1 tables that lie in it."""
    ste = {
        "v": 1, "s2aa64": 1, "s2t0sz": 25, "s2sl0": 1, "s2ps": 4, "s2r": 1, "s2vmid": 9,
        "s2ttb": base + STAGE2_LEVEL1,
    }  # fmt: skip
    put(STES + 64 * STAGE2, encode_ste(config=6, **ste))
    put(STES + 64 * NESTED, encode_ste(config=7, s1contextptr=GUEST + GUEST_CDS, **ste))
    put(STES + 64 * NO_GUEST_CD, encode_ste(config=7, s1contextptr=UNMAPPED, **ste))

    put_descriptor(STAGE2_LEVEL1, 0, table(12, base + STAGE2_LEVEL2))
    put_descriptor(STAGE2_LEVEL2, 0, table(12, base + STAGE2_LEVEL3))
    normal = {"memattr": 0b1111, "s2ap": 3}
    block = stage2_leaf_descriptor(12, 2, 0x7020_0000, **normal)
    put_descriptor(STAGE2_LEVEL2, BLOCK >> 21, block)
    guest = [
        (GUEST + offset, base + offset, {})
        for offset in (GUEST_CDS, GUEST_LEVEL1, GUEST_LEVEL2, GUEST_LEVEL3)
    ]
    for ipa, pa, flags in (
        (RW, 0x6000_1000, {}),
        (RO, 0x6000_5000, {"s2ap": 1}),
        (NO_AF, 0x6000_6000, {"af": 0}),
        (TOO_HIGH, 1 << 45, {}),
        *guest,
    ):
        leaf = stage2_leaf_descriptor(12, 3, pa, **normal | flags)
        put_descriptor(STAGE2_LEVEL3, ipa >> 12, leaf)

    put(GUEST_CDS, encode_cd(**cd | {"ttb0": GUEST + GUEST_LEVEL1, "asid": 11}))
    put_descriptor(GUEST_LEVEL1, 0, table(12, GUEST + GUEST_LEVEL2))
    put_descriptor(GUEST_LEVEL2, 0, table(12, GUEST + GUEST_LEVEL3))
    put_descriptor(GUEST_LEVEL2, BLOCK >> 21, table(12, UNMAPPED))
    for va, ipa in (
        (RW, RW), (RO, RO), (NO_AF, NO_AF), (TOO_HIGH, 1 << 39), (RUN, BLOCK + 0x1000),
    ):  # fmt: skip
        put_descriptor(GUEST_LEVEL3, va >> 12, leaf_descriptor(12, 3, ipa, ap=1, ng=1))


def system(image=None, base=BASE, **other):
    """(Smmu, image) over a bytearray."""
    image = build(base) if image is None else image
    memory = Memory()
    memory.add(image, base)
    return Smmu(memory, **registers(base) | other), image


def add_stream(image, sid, number=0, **cd):
    """A stream over the tables of STAGE1 with a CD of its own, in which some fields are others."""
    at = MORE_CDS + 64 * number
    image[at : at + 64] = encode_cd(**stage1_cd() | cd)
    ste = encode_ste(v=1, config=5, s1contextptr=BASE + at)
    image[STES + 64 * sid : STES + 64 * sid + 64] = ste


class Wires(list):
    """Names of the interrupts so far."""

    def __call__(self, name):
        self.append(name)

    def take(self):
        found = list(self)
        self.clear()
        return found


def device(image=None, features=None, irqs=0b111, **given):
    """(Smmu, Wires): the small system, memory for queues, and the interrupts that are enabled."""
    memory = Memory()
    memory.add(build() if image is None else image, BASE)
    memory.add_private(QUEUES, 0x400_0000)
    wires = Wires()
    smmu = Smmu(memory, features, on_interrupt=wires, **registers() | given)
    if irqs:
        smmu.write("IRQ_CTRL", irqs)
    return smmu, wires


def columns(requests=REQUESTS):
    """The requests as the keywords of translate_batch."""
    return {
        "sid": np.array([r.sid for r in requests], np.uint32),
        "iova": np.array([r.iova for r in requests], np.uint64),
        "ssid": np.array(
            [NO_SUBSTREAM if r.ssid is None else r.ssid for r in requests], np.uint32
        ),
        "write": np.array([r.write for r in requests]),
        "priv": np.array([r.priv for r in requests]),
        "instr": np.array([r.instr for r in requests]),
    }


def translate_each(smmu, requests=REQUESTS, **more):
    """The Result of each request, one by one."""
    return [smmu.translate(r.sid, r.iova, **r.access, **more) for r in requests]


def row(result):
    """What a batch says of a request, from its Result."""
    record = bytes(32) if result.event is None else result.event.record
    return (
        0 if result.pa is None else result.pa,
        ("ok", "bypass", "disabled", "abort", "raz_wi").index(result.action),
        0 if result.event is None else result.event.number,
        0 if result.fault is None else result.fault.number,
        int(result.perm),
        4 if result.level is None else result.level,
        result.page_lg2 or 0,
        result.attr,
        result.shareability,
        result.ipa or 0,
        result.stage,
        record,
    )


ALL = ("pa", "action", "event", "fault", "perm", "level", "page_lg2", "attr", "sh", "ipa", "stage",
       "record")  # fmt: skip


def rows(batch):
    """The rows of a batch with every column, as `row` gives them."""
    return [(*map(int, line[:-1]), bytes(line[-1])) for line in batch[list(ALL)].tolist()]


def batch_rows(smmu, requests=REQUESTS):
    """The requests through translate_batch, as `row` gives them."""
    return rows(smmu.translate_batch(**columns(requests), columns=ALL))
