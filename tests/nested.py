"""A small system with stage 2, made by hand: one nested stream, and one with stage 2 alone."""

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
