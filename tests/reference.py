"""The slow, obvious twin of the hardware half: stage 1, written as the specification reads.

Follows IHI 0070G.b: 3.3 (stream table lookup, substreams), 3.4 (address sizes), 5.5 (fault
configuration), 5.1-5.4 (L1STD, STE, L1CD, CD), 6.3 (registers), 7.3 (event records and
their priority), 13 (attributes); and DDI 0487 D8 (VMSAv8-64 stage 1).

It imports nothing from the library.  Bit numbers are those of the specification's field tables,
counted from bit 0 of the whole structure.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

# Access bits of Outcome.perm: (unprivileged, privileged) x (data read, write, instruction read).
UR, UW, UX, PR, PW, PX = 1, 2, 4, 8, 16, 32
ALL_ACCESSES = UR | UW | UX | PR | PW | PX

EVENT_NUMBERS = {
    "C_BAD_STREAMID": 0x02,
    "F_STE_FETCH": 0x03,
    "C_BAD_STE": 0x04,
    "F_STREAM_DISABLED": 0x06,
    "C_BAD_SUBSTREAMID": 0x08,
    "F_CD_FETCH": 0x09,
    "C_BAD_CD": 0x0A,
    "F_WALK_EABT": 0x0B,
    "F_TRANSLATION": 0x10,
    "F_ADDR_SIZE": 0x11,
    "F_ACCESS": 0x12,
    "F_PERMISSION": 0x13,
}

# Event CLASS codes.
CLASS_TT, CLASS_IN = 0b01, 0b10

# Shareability codes.
NSH, OSH, ISH = 0b00, 0b10, 0b11

# StreamWorlds.
NS_EL1, EL2, EL2_E2H = "NS-EL1", "EL2", "EL2-E2H"


def bits(value, msb, lsb):
    """Bits [msb:lsb] of value."""
    return (value >> lsb) & ((1 << (msb - lsb + 1)) - 1)


def in_place(value, msb, lsb):
    """Bits [msb:lsb] of value where they stand, all others 0."""
    return value & ((1 << (msb + 1)) - (1 << lsb))


def align_down(value, low_bits):
    """Value with its low_bits lowest bits 0."""
    return value >> low_bits << low_bits


# ------------------------------------------------------------------------------------------------
# Features


_ID_FIELDS = {
    "idr0": (
        "s2p:0 s1p:1 ttf:3:2 cohacc:4 btm:5 httu:7:6 dormhint:8 hyp:9 ats:10 ns1ats:11 asid16:12"
        " msi:13 sev:14 atos:15 pri:16 vmw:17 vmid16:18 cd2l:19 vatos:20 ttendian:22:21"
        " atsrecerr:23 stall_model:25:24 term_model:26 st_level:28:27 rme_impl:30"
    ),
    "idr1": (
        "sidsize:5:0 ssidsize:10:6 priqs:15:11 eventqs:20:16 cmdqs:25:21 attr_perms_ovr:26"
        " attr_types_ovr:27 rel:28 queues_preset:29 tables_preset:30 ecmdq:31"
    ),
    "idr3": (
        "had:2 pbha:3 xnx:4 pps:5 mpam:7 fwb:8 stt:9 ril:10 bbml:12:11 e0pd:13 ptwnnc:14 dpt:15"
        " pasidtt:16 epan:17 s1pi:18 s2pi:19 s2po:20 the:21 mteperm:22 aie:23"
    ),
    "idr5": "oas:2:0 gran4k:4 gran16k:5 gran64k:6 ds:7 d128:8 vax:11:10 stall_max:31:16",
    "aidr": "arch_minor:3:0",
}


def features_from_idr(idr0, idr1, idr3, idr5, aidr):
    """Feature codes as the identification registers hold them."""
    words = {"idr0": idr0, "idr1": idr1, "idr3": idr3, "idr5": idr5, "aidr": aidr}
    features = SimpleNamespace()
    for register, fields in _ID_FIELDS.items():
        for text in fields.split():
            name, msb, *lsb = text.split(":")
            setattr(features, name, bits(words[register], int(msb), int((lsb or [msb])[0])))
    return features


def default_features(**fields):
    """Everything that stage 1 offers; keywords replace single fields."""
    features = features_from_idr(0, 0, 0, 0, 3)
    vars(features).update(
        s1p=1, ttf=2, cohacc=1, hyp=1, asid16=1, vmid16=1, cd2l=1, stall_model=1, st_level=1,
        sidsize=32, ssidsize=20, eventqs=19, cmdqs=19, attr_perms_ovr=1, attr_types_ovr=1,
        had=1, stt=1, ril=1, bbml=2, e0pd=1, epan=1,
        oas=6, gran4k=1, gran16k=1, gran64k=1, ds=1, vax=1,
    )  # fmt: skip
    unknown = set(fields) - set(vars(features))
    if unknown:
        raise TypeError(f"no such feature: {', '.join(sorted(unknown))}")
    vars(features).update(fields)
    return features


DEFAULT_FEATURES = default_features()


def address_size_bits(code, arch_minor):
    """Bits of an OAS or IPS code; the large codes act as the largest one a version knows."""
    if arch_minor == 0:
        code = min(code, 5)
    elif arch_minor < 4:
        code = min(code, 6)
    return (32, 36, 40, 42, 44, 48, 52, 56)[code]


def pointer_msb(arch_minor):
    """Top bit of the pointers in STRTAB_BASE, L1STD, STE and L1CD."""
    return 47 if arch_minor == 0 else 51 if arch_minor < 4 else 55


_MODELLED = (
    "s1p", "hyp", "asid16", "cd2l", "ttendian", "term_model", "st_level", "sidsize", "ssidsize",
    "attr_perms_ovr", "attr_types_ovr", "had", "stt", "e0pd", "epan", "oas",
    "gran4k", "gran16k", "gran64k", "ds", "vax", "arch_minor",
)  # fmt: skip


def effective_features(features):
    """What is modelled of features: stage 1 of AArch64 tables, no HTTU, stall, ATS, v3.4 options.

    Adds oas_bits and pointer_msb.
    """
    effective = SimpleNamespace(**{name: getattr(features, name) for name in _MODELLED})
    effective.s2p = 0
    effective.ttf = 0b10
    effective.httu = 0
    effective.stall_model = 0b01
    effective.oas_bits = address_size_bits(features.oas, features.arch_minor)
    effective.pointer_msb = pointer_msb(features.arch_minor)
    return effective


# ------------------------------------------------------------------------------------------------
# Results


@dataclass(slots=True)
class Outcome:
    """One translation's end.

    action: "ok", "bypass", "disabled", "abort" or "raz_wi"; success is true for the first three.
    pa: output address, None unless success.
    fault: name of the event that describes what went wrong, recorded or not; None if none does.
    event: the 32-byte record in memory order, None when none is written.
    level, page_lg2: of the leaf, None unless action is "ok".
    perm: mask of UR .. PX: the bit of an access is set exactly when the same call made with that
        access would succeed.  0 for faults other than F_PERMISSION.
    attr: memory type in MAIR form; sh: shareability code.  None unless success.
    fetches: (kind, level, address, size, data or None) in order.
    """

    success: bool
    action: str
    pa: int | None = None
    fault: str | None = None
    event: bytes | None = None
    level: int | None = None
    page_lg2: int | None = None
    perm: int = 0
    attr: int | None = None
    sh: int | None = None
    fetches: list = field(default_factory=list)


def event_record(
    name, sid, ssid=None, *, write=None, priv=False, instr=False, event_class=0, iova=0,
    fetch_address=0,
):  # fmt: skip
    """Record of an event (7.3).  write=None leaves out the transaction's direction bits."""
    record = EVENT_NUMBERS[name] | sid << 32
    if name == "C_BAD_SUBSTREAMID":
        record |= ((ssid or 0) & 0xFFFFF) << 12
    elif name != "F_STREAM_DISABLED" and ssid is not None:
        record |= 1 << 11 | (ssid & 0xFFFFF) << 12
    if write is not None:
        record |= int(priv) << 97 | int(instr) << 98 | int(not write) << 99
    record |= event_class << 104
    record |= iova << 128
    record |= in_place(fetch_address, 55, 3) << 192
    return record.to_bytes(32, "little")


class ConfigurationError(Exception):
    """What stops a transaction before its address matters.  name None: silent abort."""

    def __init__(self, name, fetch_address=0):
        super().__init__(name)
        self.name = name
        self.fetch_address = fetch_address


class StageOneError(Exception):
    """What stops a transaction during stage 1 of its address."""

    def __init__(self, name, fetch_address=0, perm=0):
        super().__init__(name)
        self.name = name
        self.fetch_address = fetch_address
        self.perm = perm


# ------------------------------------------------------------------------------------------------
# Memory attributes (chapter 13)


class Level(NamedTuple):
    """Inner or outer cacheability: kind "NC", "WT" or "WB", and allocation hints."""

    kind: str
    read_alloc: int = 0
    write_alloc: int = 0
    transient: int = 0


class MemoryType(NamedTuple):
    """Device (device is its MAIR byte, the levels None) or Normal (device None)."""

    device: int | None
    outer: Level | None = None
    inner: Level | None = None


NON_CACHEABLE = Level("NC")
DEVICE_NGNRNE = MemoryType(0x00)


def cacheable(memory):
    """Whether a type is Normal and cacheable at one level at least."""
    return memory.device is None and not memory.outer.kind == memory.inner.kind == "NC"


def level_from_nibble(nibble):
    """A half of a MAIR byte of Normal memory."""
    if nibble == 0b0100:
        return NON_CACHEABLE
    kind = "WB" if nibble & 0b0100 else "WT"
    return Level(kind, nibble >> 1 & 1, nibble & 1, int(not nibble & 0b1000))


def nibble_from_level(level):
    """The opposite of level_from_nibble."""
    if level.kind == "NC":
        return 0b0100
    allocation = level.read_alloc << 1 | level.write_alloc
    transient = level.transient and allocation
    return (0 if transient else 0b1000) | (0b0100 if level.kind == "WB" else 0) | allocation


def memory_from_mair(byte):
    """Decode one MAIR attribute."""
    outer, inner = byte >> 4, byte & 0xF
    if outer == 0:
        return MemoryType(inner & 0b1100)
    if inner == 0:
        # Reserved, and 0xF0 (Tagged), which is not supported: inner WT Transient, RA and WA.
        return MemoryType(None, level_from_nibble(outer), Level("WT", 1, 1, 1))
    return MemoryType(None, level_from_nibble(outer), level_from_nibble(inner))


def memory_to_mair(memory):
    """Encode as a MAIR attribute."""
    if memory.device is not None:
        return memory.device
    return nibble_from_level(memory.outer) << 4 | nibble_from_level(memory.inner)


def memory_from_memattr(code):
    """MemAttr of an STE or GBPA: coding of stage 2, reserved codes Device-nGnRnE.  No hints."""
    outer, inner = code >> 2, code & 0b11
    if outer == 0:
        return MemoryType(inner << 2)
    if inner == 0:
        return DEVICE_NGNRNE
    kinds = (None, "NC", "WT", "WB")
    return MemoryType(None, Level(kinds[outer]), Level(kinds[inner]))


def with_hints(level, read_alloc, write_alloc, transient):
    """A level given hints, which only a cacheable one takes."""
    if level.kind == "NC":
        return NON_CACHEABLE
    return Level(level.kind, read_alloc, write_alloc, transient)


def input_attributes(override, memattr, mtcfg, alloccfg, shcfg):
    """(type, shareability) after the overrides of an STE or of GBPA.

    A transaction comes as Normal iWB-oWB, non-shareable, read- and write-allocate, non-transient.
    """
    memory = MemoryType(None, Level("WB"), Level("WB"))
    hints = (1, 1, 0)
    sh = NSH
    if override:
        if mtcfg:
            memory = memory_from_memattr(memattr)
        if alloccfg & 0b1000:
            hints = (alloccfg >> 2 & 1, alloccfg >> 1 & 1, alloccfg & 1)
        if shcfg != 0b01:
            sh = shcfg
    if memory.device is None:
        outer, inner = (with_hints(level, *hints) for level in memory[1:])
        memory = MemoryType(None, outer, inner)
    return memory, consistent_sh(memory, sh)


def consistent_sh(memory, sh):
    """Shareability with the reserved code as non-shareable; uncacheable memory is OSH."""
    if not cacheable(memory):
        return OSH
    return NSH if sh == 0b01 else sh


def stage1_memory(entering, memory):
    """Type from the MAIR, its hints combined with those of a cacheable entering type."""
    if memory.device is not None or not cacheable(entering):
        return memory

    def combine(before, level):
        # A non-cacheable entering level has no hints: no-allocate, non-transient.
        return with_hints(
            level,
            before.read_alloc & level.read_alloc,
            before.write_alloc & level.write_alloc,
            before.transient | level.transient,
        )

    return MemoryType(
        None, combine(entering.outer, memory.outer), combine(entering.inner, memory.inner)
    )


# ------------------------------------------------------------------------------------------------
# Configuration: StreamID to STE (3.3.1, 5.1, 5.2)


class Fetcher:
    """Reads memory and keeps the list of what was read."""

    def __init__(self, read):
        self.read = read
        self.fetches = []

    def __call__(self, kind, level, address, size):
        data = self.read(address, size)
        self.fetches.append((kind, level, address, size, data))
        return data


def fetch_structure(fetch, features, kind, address, size, event):
    """A configuration structure as an integer; beyond OAS it is not fetched."""
    if address >> features.oas_bits:
        raise ConfigurationError(event, address)
    data = fetch(kind, None, address, size)
    if data is None:
        raise ConfigurationError(event, address)
    return int.from_bytes(data, "little")


def find_ste(fetch, features, regs, sid):
    """The STE of a StreamID, as a 512-bit integer."""
    base = in_place(regs.strtab_base, features.pointer_msb, 6)
    literal_log2size = bits(regs.strtab_base_cfg, 5, 0)
    log2size = min(literal_log2size, features.sidsize)
    if sid >= 1 << log2size:
        raise ConfigurationError("C_BAD_STREAMID")

    two_level = features.st_level != 0 and bits(regs.strtab_base_cfg, 17, 16) == 0b01
    if not two_level:
        address = align_down(base, log2size + 6) + sid * 64
        return fetch_structure(fetch, features, "STE", address, 64, "F_STE_FETCH")

    split = bits(regs.strtab_base_cfg, 10, 6)
    if split not in (6, 8, 10):
        split = 6
    table = align_down(base, max(5, literal_log2size - split + 2) + 1)
    address = table + (sid >> split) * 8
    l1std = fetch_structure(fetch, features, "L1STD", address, 8, "F_STE_FETCH")

    span = bits(l1std, 4, 0)
    if span == 0 or span > 11 or span > split + 1:
        raise ConfigurationError("C_BAD_STREAMID")
    index = sid & ((1 << split) - 1)
    if index >= 1 << (span - 1):
        raise ConfigurationError("C_BAD_STREAMID")
    leaf = align_down(in_place(l1std, features.pointer_msb, 6), 5 + (span - 1) + 1)
    return fetch_structure(fetch, features, "STE", leaf + index * 64, 64, "F_STE_FETCH")


def check_ste(features, ste):
    """Refuse an STE that is invalid, that terminates, or that is ILLEGAL (5.2)."""
    if not bits(ste, 0, 0):
        raise ConfigurationError("C_BAD_STE")
    config = bits(ste, 3, 1)
    if not config & 0b100:
        raise ConfigurationError(None)

    if config & 0b001 and not features.s1p:
        raise ConfigurationError("C_BAD_STE")
    if config & 0b010 and not features.s2p:
        raise ConfigurationError("C_BAD_STE")
    if config == 0b100:
        return

    # Config is 101 from here on.
    if features.hyp and bits(ste, 95, 94) & 0b01:  # STRW
        raise ConfigurationError("C_BAD_STE")
    if bits(ste, 91, 91) and features.stall_model != 0b00:  # S1STALLD
        raise ConfigurationError("C_BAD_STE")
    if features.ssidsize:
        s1cdmax = bits(ste, 63, 59)
        s1fmt = bits(ste, 5, 4)
        if s1cdmax > features.ssidsize:
            raise ConfigurationError("C_BAD_STE")
        if s1cdmax and s1fmt in (0b01, 0b10) and not features.cd2l:
            raise ConfigurationError("C_BAD_STE")
    s1contextptr = in_place(ste, features.pointer_msb, 6)
    # In v3.0 such a pointer fails when it is used.
    if s1contextptr >> features.oas_bits and features.arch_minor >= 1:
        raise ConfigurationError("C_BAD_STE")


def stream_world(features, regs, ste):
    """StreamWorld of a stage-1 stream."""
    if not features.hyp or bits(ste, 95, 94) == 0b00:
        return NS_EL1
    return EL2_E2H if bits(regs.cr2, 0, 0) else EL2


# ------------------------------------------------------------------------------------------------
# Configuration: SubstreamID to CD (3.3.2, 5.3, 5.4)


def choose_substream(features, ste, ssid):
    """Index of the CD to use, or None when stage 1 is bypassed."""
    translates = bits(ste, 1, 1)  # Config[0]
    s1cdmax = bits(ste, 63, 59) if features.ssidsize else 0
    s1dss = bits(ste, 65, 64)
    if ssid is not None:
        if not features.ssidsize or not translates or s1cdmax == 0 or ssid >= 1 << s1cdmax:
            raise ConfigurationError("C_BAD_SUBSTREAMID")
        if ssid == 0 and s1dss == 0b10:
            raise ConfigurationError("F_STREAM_DISABLED")
        return ssid
    if not translates:
        return None
    if s1cdmax == 0 or s1dss == 0b10:
        return 0
    if s1dss == 0b01:
        return None
    raise ConfigurationError("F_STREAM_DISABLED")


def find_cd(fetch, features, ste, index):
    """The CD at an index of the STE's table, as a 512-bit integer."""
    pointer = in_place(ste, features.pointer_msb, 6)
    s1cdmax = bits(ste, 63, 59) if features.ssidsize else 0
    s1fmt = bits(ste, 5, 4)
    if s1cdmax == 0:
        address = pointer
    elif s1fmt in (0b00, 0b11):
        address = align_down(pointer, s1cdmax + 6) + index * 64
    else:
        leaf_lg2 = 6 if s1fmt == 0b01 else 10  # CDs in a leaf table
        table_lg2 = max(6, s1cdmax - leaf_lg2 + 3)  # bytes of the L1 table
        address = align_down(pointer, table_lg2) + (index >> leaf_lg2) * 8
        l1cd = fetch_structure(fetch, features, "L1CD", address, 8, "F_CD_FETCH")
        if not bits(l1cd, 0, 0):
            raise ConfigurationError("C_BAD_SUBSTREAMID")
        leaf = align_down(in_place(l1cd, features.pointer_msb, 12), leaf_lg2 + 6)
        if leaf >> features.oas_bits and features.arch_minor >= 1:
            raise ConfigurationError("C_BAD_SUBSTREAMID")
        address = leaf + (index & ((1 << leaf_lg2) - 1)) * 64
    return fetch_structure(fetch, features, "CD", address, 64, "F_CD_FETCH")


@dataclass(slots=True)
class Region:
    """The half of an address space that one TTB translates."""

    enabled: bool  # not EPD
    granule_lg2: int = 0
    ds: bool = False  # 52-bit descriptor format of 4K and 16K
    input_bits: int = 0
    top_bit: int = 63  # 55 with TBI
    start_level: int = 0
    base: int = 0
    hierarchical: bool = True  # not HAD
    e0pd: bool = False
    sh: int = 0


@dataclass(slots=True)
class Context:
    """A decoded CD."""

    two_ttbs: bool
    regions: list  # Region for TTB0, and TTB1 in worlds that have it
    oas_bits: int
    ips_bits: int
    byteorder: str
    affd: bool
    wxn: bool
    pan: bool
    epan: bool
    record: bool
    abort: bool
    memory: list  # MemoryType by AttrIndx, hints combined
    attr: list  # the same as MAIR bytes


def tables_start(granule_lg2, input_bits):
    """(start level, bits that it resolves) for an input size."""
    per_level = granule_lg2 - 3
    level = 3 - (input_bits - 1 - granule_lg2) // per_level
    return level, input_bits - (granule_lg2 + (3 - level) * per_level)


def decode_region(features, cd, number, ips_bits, e2h_or_el1):
    """One TTB's part of a CD; raises C_BAD_CD where it is ILLEGAL (5.4)."""
    bad = ConfigurationError("C_BAD_CD")
    if number == 0:
        tsz = bits(cd, 5, 0)
        granule_lg2 = {0b00: 12, 0b01: 16, 0b10: 14}.get(bits(cd, 7, 6))
        epd, sh = bits(cd, 14, 14), bits(cd, 13, 12)
        tbi = bits(cd, 38, 38)
        had, e0pd = bits(cd, 65, 65), bits(cd, 66, 66)
        ttb = bits(cd, 119, 68) << 4
    else:
        tsz = bits(cd, 21, 16)
        granule_lg2 = {0b01: 14, 0b10: 12, 0b11: 16}.get(bits(cd, 23, 22))
        epd, sh = bits(cd, 30, 30), bits(cd, 29, 28)
        tbi = bits(cd, 39, 39)
        had, e0pd = bits(cd, 129, 129), bits(cd, 130, 130)
        ttb = bits(cd, 183, 132) << 4
    if epd and e2h_or_el1:
        return Region(enabled=False)

    supported = {12: features.gran4k, 14: features.gran16k, 16: features.gran64k}
    if not supported.get(granule_lg2):
        raise bad
    cd_ds = bool(features.ds and bits(cd, 186, 186))
    largest = 39 if not features.stt else 47 if granule_lg2 == 16 else 48
    smallest = 12 if features.vax >= 1 and (granule_lg2 == 16 or cd_ds) else 16
    if not smallest <= tsz <= largest:
        raise bad

    ds = cd_ds and granule_lg2 != 16
    ttb = in_place(ttb, 47 if features.arch_minor == 0 else 51, 4)
    if ttb >> ips_bits:
        raise bad
    if granule_lg2 != 16 and not ds and ttb >> 48:
        raise bad

    start_level, resolved = tables_start(granule_lg2, 64 - tsz)
    alignment = max(resolved + 3, 6 if ips_bits >= 52 or ds else 4)
    return Region(
        enabled=True,
        granule_lg2=granule_lg2,
        ds=ds,
        input_bits=64 - tsz,
        top_bit=55 if tbi else 63,
        start_level=start_level,
        base=align_down(ttb, alignment),
        hierarchical=not (features.had and had),
        e0pd=bool(features.e0pd and e0pd and e2h_or_el1),
        sh=sh,
    )


def decode_cd(features, world, cd, entering):
    """Check a CD (5.4) and decode it."""
    bad = ConfigurationError("C_BAD_CD")
    two_ttbs = world != EL2
    if not bits(cd, 31, 31):  # V
        raise bad
    abort, stall = bits(cd, 46, 46), bits(cd, 44, 44)
    if stall and features.stall_model == 0b01:
        raise bad
    if not abort and features.term_model:
        raise bad
    if not bits(cd, 41, 41):  # AA64=0, and TTF has no AArch32 tables
        raise bad
    if bits(cd, 43, 42) and features.httu == 0:  # HA, HD
        raise bad
    if two_ttbs and bits(cd, 63, 56) and not features.asid16:  # ASID[15:8]
        raise bad

    ips_bits = min(address_size_bits(bits(cd, 34, 32), features.arch_minor), features.oas_bits)
    regions = [
        decode_region(features, cd, number, ips_bits, two_ttbs)
        for number in range(2 if two_ttbs else 1)
    ]
    endi = bits(cd, 15, 15)
    if any(region.enabled for region in regions) and (
        (features.ttendian == 0b10 and endi) or (features.ttendian == 0b11 and not endi)
    ):
        raise bad

    memory = [
        stage1_memory(entering, memory_from_mair(bits(cd, 192 + 8 * index + 7, 192 + 8 * index)))
        for index in range(8)
    ]
    return Context(
        two_ttbs=two_ttbs,
        regions=regions,
        oas_bits=features.oas_bits,
        ips_bits=ips_bits,
        byteorder="big" if endi else "little",
        affd=bool(bits(cd, 35, 35)),
        wxn=bool(bits(cd, 36, 36)),
        pan=bool(bits(cd, 40, 40)) and two_ttbs,
        epan=bool(features.epan and bits(cd, 123, 123)),
        record=bool(bits(cd, 45, 45)),
        abort=bool(abort),
        memory=memory,
        attr=[memory_to_mair(one) for one in memory],
    )


@dataclass(slots=True)
class Stream:
    """What configuration says about one (StreamID, SubstreamID)."""

    privcfg: int
    instcfg: int
    entering: MemoryType
    entering_sh: int
    context: Context | None  # None: stage 1 is bypassed

    def overridden(self, write, priv, instr):
        """(priv, instr) after INSTCFG and PRIVCFG.  A write is always Data."""
        if write:
            instr = False
        elif self.instcfg & 0b10:
            instr = self.instcfg == 0b11
        if self.privcfg & 0b10:
            priv = self.privcfg == 0b11
        return priv, instr


def configure(fetch, features, regs, sid, ssid):
    """Steps from StreamID and SubstreamID to a checked CD."""
    ste = find_ste(fetch, features, regs, sid)
    check_ste(features, ste)
    index = choose_substream(features, ste, ssid)
    entering, entering_sh = input_attributes(
        features.attr_types_ovr,
        memattr=bits(ste, 99, 96),
        mtcfg=bits(ste, 100, 100),
        alloccfg=bits(ste, 104, 101),
        shcfg=bits(ste, 109, 108),
    )
    stream = Stream(
        privcfg=bits(ste, 113, 112) if features.attr_perms_ovr else 0,
        instcfg=bits(ste, 115, 114) if features.attr_perms_ovr else 0,
        entering=entering,
        entering_sh=entering_sh,
        context=None,
    )
    if index is not None:
        cd = find_cd(fetch, features, ste, index)
        stream.context = decode_cd(features, stream_world(features, regs, ste), cd, entering)
    return stream


# ------------------------------------------------------------------------------------------------
# Stage 1 (DDI 0487 D8)


def select_region(context, iova, priv):
    """The region of an input address, checked against its size."""
    upper = context.two_ttbs and bits(iova, 55, 55)
    region = context.regions[1 if upper else 0]
    if not region.enabled:
        raise StageOneError("F_TRANSLATION")
    above = bits(iova, region.top_bit, region.input_bits)
    ones = (1 << (region.top_bit - region.input_bits + 1)) - 1
    if above != (ones if upper else 0):
        raise StageOneError("F_TRANSLATION")
    if region.e0pd and not priv:
        raise StageOneError("F_TRANSLATION")
    return region


def block_allowed(context, region, level):
    """Whether a descriptor of a level above 3 may be a block."""
    if region.granule_lg2 == 12:
        return level in (1, 2) or (level == 0 and region.ds)
    if region.granule_lg2 == 14:
        return level == 2 or (level == 1 and region.ds)
    return level == 2 or (level == 1 and context.oas_bits >= 52)


def output_address(region, descriptor, low_bits):
    """Address held by a descriptor, without its low_bits lowest bits."""
    if region.granule_lg2 == 16:
        return in_place(descriptor, 47, low_bits) | bits(descriptor, 15, 12) << 48
    if region.ds:
        return in_place(descriptor, 49, low_bits) | bits(descriptor, 9, 8) << 50
    return in_place(descriptor, 47, low_bits)


def allowed_accesses(context, region, leaf, tables):
    """Accesses that a leaf allows; tables is the OR of the table descriptors above it."""
    if not region.hierarchical:
        tables = 0
    read_only = bits(leaf, 7, 7) or bits(tables, 62, 62)  # AP[2], APTable[1]
    xn54 = bits(leaf, 54, 54) or bits(tables, 60, 60)  # UXN or XN, and its table bit
    if not context.two_ttbs:
        allowed = PR
        if not read_only:
            allowed |= PW
        if not xn54 and not (context.wxn and not read_only):
            allowed |= PX
        return allowed | allowed // 8  # every access is as a privileged one

    unpriv_read = bits(leaf, 6, 6) and not bits(tables, 61, 61)  # AP[1], APTable[0]
    unpriv_write = unpriv_read and not read_only
    unpriv_exec = not xn54 and not (context.wxn and unpriv_write)
    pxn = bits(leaf, 53, 53) or bits(tables, 59, 59)
    priv_write = not read_only
    priv_exec = not pxn and not unpriv_write and not (context.wxn and priv_write)

    never = context.pan and (unpriv_read or unpriv_write or (context.epan and unpriv_exec))
    allowed = 0
    if not region.e0pd:
        allowed |= (UR if unpriv_read else 0) | (UW if unpriv_write else 0)
        allowed |= UX if unpriv_exec else 0
    if not never:
        allowed |= PR | (PW if priv_write else 0)
    return allowed | (PX if priv_exec else 0)


def access_bit(write, priv, instr):
    """The bit of one kind of access."""
    bit = UW if write else UX if instr else UR
    return bit << 3 if priv else bit


def reported_perm(stream, allowed):
    """Perm as the device sees it: each access goes through the STE's overrides first."""
    if not (stream.privcfg | stream.instcfg) & 0b10:
        return allowed
    perm = 0
    for priv in (False, True):
        for write, instr in ((False, False), (True, False), (False, True)):
            if allowed & access_bit(write, *stream.overridden(write, priv, instr)):
                perm |= access_bit(write, priv, instr)
    return perm


def walk(fetch, stream, iova, write, priv, instr):
    """Translate one address; priv and instr are those after the overrides."""
    context = stream.context
    region = select_region(context, iova, priv)
    granule_lg2 = region.granule_lg2
    per_level = granule_lg2 - 3
    va = iova & ((1 << region.input_bits) - 1)
    table = region.base
    tables = 0
    level = region.start_level
    while True:
        shift = granule_lg2 + (3 - level) * per_level
        address = table + ((va >> shift) & ((1 << per_level) - 1)) * 8
        data = fetch("TT", level, address, 8)
        if data is None:
            raise StageOneError("F_WALK_EABT", fetch_address=address)
        descriptor = int.from_bytes(data, context.byteorder)
        kind = descriptor & 0b11
        if kind == 0b11 and level < 3:
            table = output_address(region, descriptor, granule_lg2)
            if table >> context.ips_bits:
                raise StageOneError("F_ADDR_SIZE")
            tables |= descriptor
            level += 1
            continue
        page = kind == 0b11
        block = kind == 0b01 and level < 3 and block_allowed(context, region, level)
        if not (page or block):
            raise StageOneError("F_TRANSLATION")
        break

    output = output_address(region, descriptor, shift)
    if output >> context.ips_bits:
        raise StageOneError("F_ADDR_SIZE")
    if not bits(descriptor, 10, 10) and not context.affd:
        raise StageOneError("F_ACCESS")
    allowed = allowed_accesses(context, region, descriptor, tables)
    perm = reported_perm(stream, allowed)
    if not allowed & access_bit(write, priv, instr):
        raise StageOneError("F_PERMISSION", perm=perm)
    index = bits(descriptor, 4, 2)
    sh = region.sh if region.ds else bits(descriptor, 9, 8)
    return Outcome(
        success=True,
        action="ok",
        pa=output | (va & ((1 << shift) - 1)),
        level=level,
        page_lg2=shift,
        perm=perm,
        attr=context.attr[index],
        sh=consistent_sh(context.memory[index], sh),
    )


# ------------------------------------------------------------------------------------------------
# The whole


class ContextCache:
    """Decoded configuration by (sid, ssid), for many translations of one unchanging system.

    Good for one memory, one set of features and one set of registers: make a new one when any of
    them changes.
    """

    def __init__(self):
        self.features = None
        self.streams = {}


def disabled(features, regs, iova):
    """SMMUEN=0: what GBPA says."""
    gbpa = regs.gbpa
    if bits(gbpa, 20, 20) or iova >> features.oas_bits:
        return Outcome(success=False, action="abort")
    memory, sh = input_attributes(
        features.attr_types_ovr,
        memattr=bits(gbpa, 3, 0),
        mtcfg=bits(gbpa, 4, 4),
        alloccfg=bits(gbpa, 11, 8),
        shcfg=bits(gbpa, 13, 12),
    )
    return Outcome(
        success=True,
        action="disabled",
        pa=iova,
        perm=ALL_ACCESSES,
        attr=memory_to_mair(memory),
        sh=sh,
    )


def translate(
    read, features, regs, sid, iova, ssid=None, write=False, priv=False, instr=False, cache=None
):
    """Translate one transaction.

    read: (address, size) -> bytes, or None for an external abort.
    features: object with the feature codes as attributes (see features_from_idr).
    regs: object with strtab_base, strtab_base_cfg, cr0, cr2, gbpa.
    cache: ContextCache, to decode the configuration of a stream once.
    """
    if cache is None:
        cache = ContextCache()
    if cache.features is None:
        cache.features = effective_features(features)
    features = cache.features
    if not bits(regs.cr0, 0, 0):
        return disabled(features, regs, iova)

    found = cache.streams.get((sid, ssid))
    if found is None:
        fetch = Fetcher(read)
        try:
            stream = configure(fetch, features, regs, sid, ssid)
        except ConfigurationError as fault:
            stream = fault
        found = cache.streams[sid, ssid] = (stream, fetch.fetches)
    stream, fetches = found
    fetch = Fetcher(read)
    fetch.fetches = list(fetches)
    events_on = bits(regs.cr0, 2, 2)

    if isinstance(stream, ConfigurationError):
        name = stream.name
        recorded = name is not None and events_on
        if name == "C_BAD_STREAMID" and not bits(regs.cr2, 1, 1):  # RECINVSID
            recorded = False
        return Outcome(
            success=False,
            action="abort",
            fault=name,
            event=event_record(name, sid, ssid, fetch_address=stream.fetch_address)
            if recorded
            else None,
            fetches=fetch.fetches,
        )

    priv, instr = stream.overridden(write, priv, instr)
    context = stream.context
    if context is None:
        if not iova >> features.oas_bits:
            return Outcome(
                success=True,
                action="bypass",
                pa=iova,
                perm=ALL_ACCESSES,
                attr=memory_to_mair(stream.entering),
                sh=stream.entering_sh,
                fetches=fetch.fetches,
            )
        fault, recorded, aborts = StageOneError("F_ADDR_SIZE"), True, True
    else:
        try:
            outcome = walk(fetch, stream, iova, write, priv, instr)
        except StageOneError as caught:
            fault = caught
        else:
            outcome.fetches = fetch.fetches
            return outcome
        if fault.name == "F_WALK_EABT":
            recorded, aborts = True, True
        else:
            recorded, aborts = context.record, context.abort

    event = None
    if recorded and events_on:
        event = event_record(
            fault.name, sid, ssid, write=write, priv=priv, instr=instr, iova=iova,
            event_class=CLASS_TT if fault.name == "F_WALK_EABT" else CLASS_IN,
            fetch_address=fault.fetch_address,
        )  # fmt: skip
    return Outcome(
        success=False,
        action="abort" if aborts else "raz_wi",
        fault=fault.name,
        event=event,
        perm=fault.perm,
        fetches=fetch.fetches,
    )
