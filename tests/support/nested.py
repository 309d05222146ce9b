"""Systems with stage 2, made by hand: one nested stream, and one with stage 2 alone."""

import random

import captures
import ptwriter
from rawfeatures import raw_of

import smmufast

NESTED, SECOND = 3, 4
CONTEXT, TABLES, DATA = 0x8000_0000, 0x8010_0000, 0x80_9000_0000  # IPAs
GUEST = 0x4800_0000  # where stage 2 puts the guest's tables, from CONTEXT on
PAGES = 0x4900_0000  # and its data
STAGE2 = 0x4100_0000

# Pages of the device, by address: what stage 1 and stage 2 say.
READ_ONLY_OUTSIDE, RW, READ_ONLY, NO_AF, UNMAPPED, DEVICE = range(0, 0x6000, 0x1000)
_STAGE1 = ({"ap": 1}, {"ap": 1}, {"ap": 3}, {"ap": 1}, {"ap": 1}, {"ap": 1})
_STAGE2 = (
    {"s2ap": 1},
    {"s2ap": 3},
    {"s2ap": 3},
    {"s2ap": 3, "af": 0},
    None,
    {"s2ap": 3, "memattr": 1, "sh": 0},
)


def physical(ipa):
    """Where stage 2 puts an IPA."""
    return ipa - DATA + PAGES if ipa >= DATA else ipa - CONTEXT + GUEST


def features(**changes):
    """Those of the captures, with other values for some."""
    words = [int(captures.QEMU_IDR[name], 16) for name in ("IDR0", "IDR1", "IDR3", "IDR5")]
    return raw_of(smmufast.Features.from_idr(*words, 1), **changes)


def small_nested(has=None, *, cd=None, stage1=None, tables=None, **ste):
    """A Smmu with both streams.

    has: changes of features.  ste, cd: fields of both STEs, of the CD.  stage1: attributes of
    every stage-1 leaf.  tables: attributes of the stage-2 leaves that map the guest's tables.
    """
    guest = ptwriter.Memory()
    guest.add(CONTEXT, 0x1000)
    inner = ptwriter.PageTables(guest, ptwriter.BumpAllocator(guest, TABLES, 0x4000), 12, 25)
    for i, flags in enumerate(_STAGE1):
        at = {"attrindx": 1, "sh": 3, "ng": 1} | flags | (stage1 or {})
        inner.map(i << 12, DATA + (i << 12), **at)
    fields = {
        "v": 1, "aa64": 1, "a": 1, "r": 1, "ips": 2, "t0sz": 25, "epd1": 1, "ttb0": inner.base,
        "asid": 7, "mair": 0x44FF00,
    }  # fmt: skip
    guest.write(CONTEXT, ptwriter.encode_cd(**fields | (cd or {})))

    memory = ptwriter.Memory()
    memory.add(captures.STREAM_TABLE, 0x1000)
    allocate = ptwriter.BumpAllocator(memory, STAGE2, 0x10_0000)
    # 40 bits from level 1 on: two tables side by side
    outer = ptwriter.Stage2Tables(memory, allocate, 12, 24, start_level=1)
    for base, data in guest.regions():
        for ipa in range(base, base + len(data), 0x1000):
            memory.ensure(physical(ipa))
            memory.write(physical(ipa), guest.read(ipa, 0x1000))
            flags = {"memattr": 15, "s2ap": 3, "sh": 3} | (tables or {})
            outer.map(ipa, physical(ipa), **flags)
    for i, flags in enumerate(_STAGE2):
        if flags is not None:
            ipa = DATA + (i << 12)
            outer.map(ipa, physical(ipa), **{"memattr": 15, "sh": 3} | flags)
    both = {
        "v": 1, "s1contextptr": CONTEXT, "shcfg": 1, "s2vmid": 9, "s2ps": 2, "s2r": 1,
        **outer.ste_fields(), **ste,
    }  # fmt: skip
    for sid, config in ((NESTED, 0b111), (SECOND, 0b110)):
        address = captures.STREAM_TABLE + 64 * sid
        memory.write(address, ptwriter.encode_ste(**{"config": config} | both))
    memory.write(captures.STREAM_TABLE + 64 * 5, ptwriter.encode_ste(v=1))
    real = smmufast.Memory()
    real.add_private(*captures.RAM)
    for base, data in memory.regions():
        real.write(base, data)
    return smmufast.Smmu(
        real, features(**has or {}), strtab_base=captures.STREAM_TABLE, strtab_base_cfg=4
    )


UPPER = 0xFFFF_FF80_0000_0000  # of 39-bit addresses


def scattered_nested(seed, first, second, *, has=None, cd=None, tables=None, **ste):
    """(the same two streams, input addresses) where stage 2 puts no two pages side by side.

    first, second: log2 of the granules.  Both halves of stage 1 have pages and blocks of every
    permission, below tables some of which take permissions away; stage 2 has the IPAs of their
    tables and of their pages in its own granule, in any order, and maps some of them read-only.
    has, cd, tables, ste: as for small_nested.
    """
    rng = random.Random(seed)
    page = 1 << second
    guest = ptwriter.Memory()
    guest.add(CONTEXT, 1 << 16)
    allocate = ptwriter.BumpAllocator(guest, TABLES, 1 << 22)
    halves = [ptwriter.PageTables(guest, allocate, first, 25) for _ in range(2)]
    places, ipas = [], set()
    regions = rng.sample(range(1 << 6), 6)
    for half, base in zip(halves, (0, UPPER), strict=True):
        half.slot(base, 2)
        for region in regions:
            # a table of the last level each, in which a few pages lie
            start = base + (region << half.shift(2))
            flags = {"aptable": rng.choice((0, 0, 1, 2)), "pxntable": rng.randrange(2)}
            for index in rng.sample(range(1 << first - 3), 6):
                iova = start + (index << first)
                ipa = DATA + (rng.randrange(1 << 8) << 16)
                half.map(iova, ipa, table_flags=flags, attrindx=1, ap=rng.choice((0, 1, 1, 3)))
                ipas.update(range(ipa, ipa + (1 << first), page))
                places += [iova + rng.randrange(1 << first) for _ in range(2)]
        block = base + (1 << 6 << half.shift(2))
        ipa = DATA + (1 << 30) + (rng.randrange(4) << 30) & -1 << half.shift(2)
        half.map(block, ipa, 2, attrindx=1, ap=1)
        for _ in range(4):
            offset = rng.randrange(1 << half.shift(2))
            ipas.add(ipa + offset & -page)
            places += [block + offset & -8, block + (offset & -page)]
    tables_end = allocate.next
    fields = {
        "v": 1, "aa64": 1, "a": 1, "r": 1, "ips": 4, "t0sz": 25, "t1sz": 25,
        "tg0": {12: 0, 14: 2, 16: 1}[first], "tg1": {12: 2, 14: 1, 16: 3}[first],
        "ttb0": halves[0].base, "ttb1": halves[1].base, "asid": 7, "mair": 0x44FF00,
    }  # fmt: skip
    guest.write(CONTEXT, ptwriter.encode_cd(**fields | (cd or {})))

    memory = ptwriter.Memory()
    memory.add(captures.STREAM_TABLE, 0x1000)
    allocate = ptwriter.BumpAllocator(memory, STAGE2, 1 << 24)
    start = 1 if second == 12 else 2
    outer = ptwriter.Stage2Tables(memory, allocate, second, 24, start_level=start)
    structures = [CONTEXT, *range(TABLES, tables_end, page)]
    frames = [GUEST + page * i for i in range(4 * (len(structures) + len(ipas)))]
    # What lies between them looks like leaves of stage 1: whoever reads there finds a page.
    decoy = ptwriter.leaf_descriptor(first, 3, min(ipas) & -1 << first, attrindx=1, ap=1)
    size = -(-len(frames) * page >> 16 << 16)
    memory.add(GUEST, size)
    memory.write(GUEST, decoy.to_bytes(8, "little") * (size // 8))
    rng.shuffle(frames)
    for ipa in structures:
        frame = frames.pop()
        content = guest.read(ipa, page)
        for offset in range(0, page, 0x1000):
            memory.write(frame + offset, content[offset : offset + 0x1000])
        outer.map(ipa, frame, **{"memattr": 15, "s2ap": 3, "sh": 3} | (tables or {}))
    for ipa in sorted(ipas):
        outer.map(ipa, frames.pop(), memattr=15, s2ap=rng.choice((1, 3, 3)), sh=3)
    both = {
        "v": 1, "s1contextptr": CONTEXT, "shcfg": 1, "s2vmid": 9, "s2ps": 4, "s2r": 1,
        **outer.ste_fields(), **ste,
    }  # fmt: skip
    for sid, config in ((NESTED, 0b111), (SECOND, 0b110)):
        address = captures.STREAM_TABLE + 64 * sid
        memory.write(address, ptwriter.encode_ste(**{"config": config} | both))
    real = smmufast.Memory()
    base, size = captures.RAM
    real.add(bytearray(size), base)  # one window, unlike private memory
    for base, data in memory.regions():
        real.write(base, data)
    rng.shuffle(places)
    smmu = smmufast.Smmu(
        real, features(**has or {}), strtab_base=captures.STREAM_TABLE, strtab_base_cfg=4
    )
    return smmu, places
