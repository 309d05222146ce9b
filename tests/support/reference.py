"""The slow, obvious twin of the hardware half, written as the specification reads.

Follows IHI 0070G.b: 3.3 (stream table lookup, substreams), 3.4 (address sizes), 3.12 (stalls),
3.13 (updates of access flag and dirty state), 5.5 (fault configuration), 5.1-5.4 (L1STD, STE,
L1CD, CD), 6.3 (registers), 7.3 (event records and their priority), 13 (attributes); and DDI 0487
D8 (VMSAv8-64, both stages).

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
CLASS_CD, CLASS_TT, CLASS_IN = 0b00, 0b01, 0b10

# Kinds of accesses to memory, numbered from 1.
FETCH_KINDS = ("L1STD", "STE", "L1CD", "CD", "TT", "S2TT", "TT update", "S2TT update")

# Bits of a descriptor.
AF = 1 << 10
AP2 = S2AP1 = 1 << 7  # read-only at stage 1, writable at stage 2
DBM = 1 << 51

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
    """Everything that stage 1 offers, no stage 2; keywords replace single fields."""
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
    "s2p", "s1p", "hyp", "ats", "ns1ats", "asid16", "vmid16", "cd2l", "ttendian", "stall_model",
    "term_model", "st_level", "sidsize", "ssidsize", "attr_perms_ovr", "attr_types_ovr", "had",
    "xnx", "fwb", "stt", "e0pd", "epan", "oas", "gran4k", "gran16k", "gran64k", "ds", "vax",
    "arch_minor",
)  # fmt: skip


def effective_features(features):
    """What is modelled of features: AArch64 tables, no access flags of tables, no v3.4 options.

    Adds oas_bits and pointer_msb.  PTWNNC has no say in outcomes.
    """
    effective = SimpleNamespace(**{name: getattr(features, name) for name in _MODELLED})
    effective.httu = min(features.httu, 0b10)
    effective.oas_bits = address_size_bits(features.oas, features.arch_minor)
    effective.pointer_msb = pointer_msb(features.arch_minor)
    return effective


# ------------------------------------------------------------------------------------------------
# Results


@dataclass(slots=True)
class Outcome:
    """One translation's end.

    action: "ok", "bypass", "disabled", "abort", "raz_wi" or "stall"; success is true for the
        first three.
    pa: output address, None unless success.
    fault: name of the event that describes what went wrong, recorded or not; None if none does.
    event: the 32-byte record in memory order, None when none is written.  The STAG is 0.
    level, page_lg2: of the leaf, of the stage with the smaller page, None unless action is "ok".
    perm: mask of UR .. PX, the accesses that both stages permit, as the device makes them: before
        the STE's overrides.  0 for faults other than F_PERMISSION of stage 1, or of stage 2 for
        the address itself.
    perm_s1: what stage 1 alone permits, likewise; everything where it does not translate.
    attr: memory type in MAIR form; sh: shareability code.  None unless success.
    fetches: (kind, level, address, size, data or None) in order; an update has one member more,
        (expected, desired) as little-endian numbers, and its data is what was found.
    stage: bit 0: stage 1 took part, bit 1: stage 2 did, in the translation or in its fault.
    ipa: input of stage 2, 0 unless it gave an output.
    asid, vmid, ng, contiguous: of the translation, 0 where there are none.
    why: the rule that refused, by the library's name for it; None on success.
    """

    success: bool
    action: str
    pa: int | None = None
    fault: str | None = None
    event: bytes | None = None
    level: int | None = None
    page_lg2: int | None = None
    perm: int = 0
    perm_s1: int = 0
    attr: int | None = None
    sh: int | None = None
    fetches: list = field(default_factory=list)
    stage: int = 0
    ipa: int = 0
    asid: int = 0
    vmid: int = 0
    ng: int = 0
    contiguous: int = 0
    why: str | None = None


def event_record(
    name, sid, ssid=None, *, write=None, priv=False, instr=False, event_class=0, iova=0,
    fetch_address=0, stage2=False, ipa=0, descriptor_read=False, stall=False,
):  # fmt: skip
    """Record of an event (7.3).  write=None leaves out the transaction's direction bits."""
    record = EVENT_NUMBERS[name] | sid << 32
    if name == "C_BAD_SUBSTREAMID":
        record |= ((ssid or 0) & 0xFFFFF) << 12
    elif name != "F_STREAM_DISABLED" and ssid is not None:
        record |= 1 << 11 | (ssid & 0xFFFFF) << 12
    if write is not None:
        record |= int(priv) << 97 | int(instr) << 98 | int(not write) << 99
    record |= int(stall) << 95
    record |= int(stage2) << 103
    record |= event_class << 104
    record |= int(descriptor_read) << 108  # TTRnW
    record |= iova << 128
    record |= in_place(fetch_address, 55, 3) << 192
    record |= in_place(ipa, 55, 12) << 192
    return record.to_bytes(32, "little")


def fetch_reported(features, address):
    """FetchAddr (7.3.4): bits beyond OAS are RES0; v3.0 reports the whole address (3.4.3)."""
    if features.arch_minor == 0:
        return address
    return address % (1 << features.oas_bits)


class ConfigurationError(Exception):
    """What stops a transaction before its address matters.

    name None: silent abort.  why: the rule, by the library's name for it.
    """

    def __init__(self, name, why, fetch_address=0):
        super().__init__(name)
        self.name = name
        self.why = why
        self.fetch_address = fetch_address


class TranslationError(Exception):
    """What stops a transaction in one of the stages.

    stage2, event_class: which stage, and of what: a CD, a stage-1 descriptor, the input.
    ipa: what stage 2 was asked for.  fetch_address: of a read that aborted.
    allowed: for F_PERMISSION, the accesses that this stage allows; page, region: what it found.
    descriptor_read: F_PERMISSION of stage 2 for a stage-1 descriptor, which was to be read.
    bypassed: an input address that is too large while stage 1 does not translate it.
    why: the rule, by the library's name for it.
    """

    def __init__(
        self, name, why, *, stage2=False, event_class=CLASS_IN, ipa=0, fetch_address=0, allowed=0,
        page=None, region=None, descriptor_read=False, bypassed=False,
    ):  # fmt: skip
        super().__init__(name)
        self.name = name
        self.why = why
        self.stage2 = stage2
        self.event_class = event_class
        self.ipa = ipa
        self.fetch_address = fetch_address
        self.allowed = allowed
        self.page = page
        self.region = region
        self.descriptor_read = descriptor_read
        self.bypassed = bypassed


class DescriptorChangedError(Exception):
    """A descriptor that was to be updated has changed since it was read."""


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
    """MemAttr of stage 2, an STE or GBPA; reserved codes are Device-nGnRnE.  No hints."""
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


def stronger_level(one, two):
    """The less cacheable kind of two levels, with the hints of the first."""
    kind = min(one.kind, two.kind, key=("NC", "WT", "WB").index)
    return with_hints(Level(kind), one.read_alloc, one.write_alloc, one.transient)


def stage2_memory(before, memattr, fwb):
    """Type after stage 2, from the type that entered it and the leaf's MemAttr."""
    if not fwb:
        mine = memory_from_memattr(memattr)
        if before.device is not None and mine.device is not None:
            return MemoryType(min(before.device, mine.device))
        if before.device is not None:
            return before
        if mine.device is not None:
            return mine
        return MemoryType(
            None,
            stronger_level(before.outer, mine.outer),
            stronger_level(before.inner, mine.inner),
        )

    code = memattr & 0b111
    if code == 0b100:
        return DEVICE_NGNRNE
    if code < 0b100:
        mine = code << 2
        return MemoryType(mine if before.device is None else min(before.device, mine))
    if code == 0b101:
        if before.device is not None:
            return before
        return MemoryType(None, NON_CACHEABLE, NON_CACHEABLE)
    if code == 0b110:
        return MemoryType(None, forced_write_back(before.outer), forced_write_back(before.inner))
    return before


def forced_write_back(level):
    """A level made WB: with its hints, or where it was not cacheable RA, WA, non-transient."""
    if level is None or level.kind == "NC":
        return Level("WB", 1, 1, 0)
    return level._replace(kind="WB")


def stage2_is_device(memattr, fwb):
    """Whether stage 2 makes the SMMU's own reads, which are Normal, Device."""
    if fwb:
        return memattr & 0b111 <= 0b100
    return memory_from_memattr(memattr).device is not None


def combined_sh(one, two):
    """The stronger shareability; the reserved code is non-shareable."""
    return OSH if OSH in (one, two) else ISH if ISH in (one, two) else NSH


# ------------------------------------------------------------------------------------------------
# Memory


class Fetcher:
    """Reads and updates memory and keeps the list of what was done.

    read, store: see translate.  cache: emptied whenever memory is changed.
    """

    def __init__(self, read, store, cache, fetches=()):
        self.read = read
        self.store = store
        self.cache = cache
        self.fetches = list(fetches)
        self.updates = 0

    def __call__(self, kind, level, address, size):
        data = self.read(address, size)
        self.fetches.append((kind, level, address, size, data))
        return data

    def swap(self, kind, level, address, byteorder, expected, desired):
        """Replace a descriptor that is still what was read.  Returns False if memory aborts."""
        expected = expected.to_bytes(8, byteorder)
        desired = desired.to_bytes(8, byteorder)
        found = self.read(address, 8)
        as_they_lie = int.from_bytes(expected, "little"), int.from_bytes(desired, "little")
        self.fetches.append((kind, level, address, 8, found, as_they_lie))
        if found is None:
            return False
        if found != expected:
            raise DescriptorChangedError
        if self.store is None:
            raise TypeError("tables that are updated need store")
        self.store(address, desired)
        self.updates += 1
        self.cache.streams.clear()
        return True


# ------------------------------------------------------------------------------------------------
# Configuration: StreamID to STE (3.3.1, 5.1, 5.2)


def fetch_structure(fetch, features, kind, address, size, event):
    """A configuration structure as an integer; beyond OAS it is not fetched."""
    if address >> features.oas_bits:
        raise ConfigurationError(event, f"{kind}_ADDRESS", address)
    data = fetch(kind, None, address, size)
    if data is None:
        raise ConfigurationError(event, f"{kind}_ABORT", address)
    return int.from_bytes(data, "little")


def find_ste(fetch, features, regs, sid):
    """The STE of a StreamID, as a 512-bit integer."""
    base = in_place(regs.strtab_base, features.pointer_msb, 6)
    literal_log2size = bits(regs.strtab_base_cfg, 5, 0)
    log2size = min(literal_log2size, features.sidsize)
    if sid >= 1 << log2size:
        raise ConfigurationError("C_BAD_STREAMID", "STREAM_BEYOND")

    two_level = features.st_level != 0 and bits(regs.strtab_base_cfg, 17, 16) == 0b01
    if not two_level:
        address = align_down(base, literal_log2size + 6) + sid * 64
        return fetch_structure(fetch, features, "STE", address, 64, "F_STE_FETCH")

    split = bits(regs.strtab_base_cfg, 10, 6)
    if split not in (6, 8, 10):
        split = 6
    table = align_down(base, max(5, literal_log2size - split + 2) + 1)
    address = table + (sid >> split) * 8
    l1std = fetch_structure(fetch, features, "L1STD", address, 8, "F_STE_FETCH")

    span = bits(l1std, 4, 0)
    if span == 0:
        raise ConfigurationError("C_BAD_STREAMID", "STREAM_NO_TABLE")
    if span > 11 or span > split + 1:
        raise ConfigurationError("C_BAD_STREAMID", "STREAM_SPAN")
    index = sid & ((1 << split) - 1)
    if index >= 1 << (span - 1):
        raise ConfigurationError("C_BAD_STREAMID", "STREAM_SHORT")
    leaf = align_down(in_place(l1std, features.pointer_msb, 6), 5 + (span - 1) + 1)
    return fetch_structure(fetch, features, "STE", leaf + index * 64, 64, "F_STE_FETCH")


def bad_ste(why):
    """An STE that is refused."""
    return ConfigurationError("C_BAD_STE", why)


def bad_cd(why):
    """A CD that is refused."""
    return ConfigurationError("C_BAD_CD", why)


def check_ste(features, ste):
    """Refuse an STE that is invalid, that terminates, or that is ILLEGAL (5.2)."""
    if not bits(ste, 0, 0):
        raise bad_ste("STE_V")
    config = bits(ste, 3, 1)
    if not config & 0b100:
        raise ConfigurationError(None, "STE_CONFIG")

    if config & 0b001 and not features.s1p:
        raise bad_ste("STE_S1P")
    if config & 0b010 and not features.s2p:
        raise bad_ste("STE_S2P")
    if config == 0b100:
        return

    eats = bits(ste, 93, 92) if features.ats else 0b00
    s2s = bits(ste, 185, 185)
    if eats == 0b10 and config != 0b111:
        raise bad_ste("STE_EATS_STAGES")
    if eats == 0b10 and features.ns1ats:
        raise bad_ste("STE_EATS_NS1ATS")
    if eats in (0b01, 0b10) and config & 0b010 and s2s:
        raise bad_ste("STE_EATS_S2S")
    strw_used = config == 0b101 and features.hyp
    if strw_used and bits(ste, 95, 94) & 0b01:
        raise bad_ste("STE_STRW")
    if config & 0b001:
        check_ste_stage1(features, ste, config)
    # S2VMID is used by the world NS-EL1, with stage 1 alone too.
    el1 = not (strw_used and bits(ste, 95, 94))
    if features.s2p and el1 and bits(ste, 143, 136) and not features.vmid16:
        raise bad_ste("STE_S2VMID")
    if config & 0b010:
        check_ste_stage2(features, ste)


def check_ste_stage1(features, ste, config):
    """Refuse an STE whose fields of stage 1 are ILLEGAL."""
    if bits(ste, 91, 91) and features.stall_model != 0b00:  # S1STALLD
        raise bad_ste("STE_S1STALLD")
    if features.ssidsize:
        s1cdmax = bits(ste, 63, 59)
        s1fmt = bits(ste, 5, 4)
        if s1cdmax > features.ssidsize:
            raise bad_ste("STE_S1CDMAX")
        if s1cdmax and s1fmt in (0b01, 0b10) and not features.cd2l:
            raise bad_ste("STE_CD2L")
    s1contextptr = in_place(ste, features.pointer_msb, 6)
    # In v3.0 such a pointer fails when it is used; so does, in stage 2, one that is an IPA.
    if config == 0b101 and s1contextptr >> features.oas_bits and features.arch_minor >= 1:
        raise bad_ste("STE_S1CONTEXTPTR")


# Start level of stage 2 by granule and S2SL0; with 4 KiB, S2DS=1 and S2SL0_2=1, -1.
_STAGE2_LEVELS = {
    12: {0b00: 2, 0b01: 1, 0b10: 0, 0b11: 3},
    14: {0b00: 3, 0b01: 2, 0b10: 1, 0b11: 0},
    16: {0b00: 3, 0b01: 2, 0b10: 1},
}


def stage2_start(features, ste):
    """(granule_lg2, ds, start level) of stage 2; the level None where S2SL0 is reserved."""
    granule_lg2 = {0b00: 12, 0b01: 16, 0b10: 14}.get(bits(ste, 175, 174))  # S2TG
    s2sl0 = bits(ste, 167, 166)
    ds = bool(features.ds and bits(ste, 195, 195) and granule_lg2 != 16)  # S2DS
    level = _STAGE2_LEVELS.get(granule_lg2, {}).get(s2sl0)
    if granule_lg2 == 12 and ds and bits(ste, 194, 194):  # elsewhere S2SL0_2 is ignored
        level = -1 if s2sl0 == 0b00 else None
    return granule_lg2, ds, level


def check_ste_stage2(features, ste):
    """Refuse an STE whose fields of stage 2 are ILLEGAL."""
    if not bits(ste, 179, 179):  # S2AA64=0, and TTF has no AArch32 tables
        raise bad_ste("STE_S2AA64")
    s2s = bits(ste, 185, 185)
    if s2s and features.stall_model == 0b01:
        raise bad_ste("STE_S2S_NEVER")
    if not s2s and features.stall_model == 0b10:
        raise bad_ste("STE_S2S_ALWAYS")
    s2endi = bits(ste, 180, 180)
    if (features.ttendian == 0b10 and s2endi) or (features.ttendian == 0b11 and not s2endi):
        raise bad_ste("STE_S2ENDI")
    s2ha, s2hd = bits(ste, 184, 184), bits(ste, 183, 183)
    if (s2ha or s2hd) and features.httu == 0b00:
        raise bad_ste("STE_S2HTTU")
    if s2hd and features.httu == 0b01:
        raise bad_ste("STE_S2HTTU")

    granule_lg2, ds, level = stage2_start(features, ste)
    supported = {12: features.gran4k, 14: features.gran16k, 16: features.gran64k}
    if not supported.get(granule_lg2):
        raise bad_ste("STE_S2TG")
    t0sz = bits(ste, 165, 160)
    largest = 39 if not features.stt else 47 if granule_lg2 == 16 else 48
    smallest = max(12 if granule_lg2 == 16 or ds else 16, 64 - features.oas_bits)
    if not smallest <= t0sz <= largest:
        raise bad_ste("STE_S2T0SZ")
    if level is None:
        raise bad_ste("STE_S2SL0")

    # What a start level needs besides.
    if granule_lg2 == 12 and level == 3 and not features.stt:
        raise bad_ste("STE_S2SL0")
    if granule_lg2 == 14 and level == 0 and not ds:
        raise bad_ste("STE_S2SL0")
    physical_bits_needed = {(12, -1): 52, (12, 0): 44, (14, 0): 52, (14, 1): 42, (16, 1): 44}
    if features.oas_bits < physical_bits_needed.get((granule_lg2, level), 0):
        raise bad_ste("STE_S2SL0")
    # The start level resolves some bits, four more than one table has at most.
    per_level = granule_lg2 - 3
    resolved = 64 - t0sz - (granule_lg2 + (3 - level) * per_level)
    concatenated = (granule_lg2, level) not in ((12, -1), (14, 0), (16, 1))
    if not 1 <= resolved <= (per_level + 4 if concatenated else per_level):
        raise bad_ste("STE_S2SL0_SIZE")

    ttb = in_place(bits(ste, 247, 192), 47 if features.arch_minor == 0 else 51, 4)
    if ttb >> stage2_output_bits(features, ste):
        raise bad_ste("STE_S2TTB")
    if granule_lg2 != 16 and not ds and ttb >> 48:
        raise bad_ste("STE_S2TTB_48")


def stage2_output_bits(features, ste):
    """The effective S2PS."""
    return min(address_size_bits(bits(ste, 178, 176), features.arch_minor), features.oas_bits)


def stream_world(features, regs, ste):
    """StreamWorld of a stage-1 stream."""
    nested = bits(ste, 2, 2)
    if nested or not features.hyp or bits(ste, 95, 94) == 0b00:
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
        if not translates:
            raise ConfigurationError("C_BAD_SUBSTREAMID", "SUBSTREAM_NO_STAGE1")
        if not features.ssidsize or s1cdmax == 0:
            raise ConfigurationError("C_BAD_SUBSTREAMID", "SUBSTREAM_NO_TABLE")
        if ssid >= 1 << s1cdmax:
            raise ConfigurationError("C_BAD_SUBSTREAMID", "SUBSTREAM_BEYOND")
        if ssid == 0 and s1dss == 0b10:
            raise ConfigurationError("F_STREAM_DISABLED", "SUBSTREAM_0")
        return ssid
    if not translates:
        return None
    if s1cdmax == 0 or s1dss == 0b10:
        return 0
    if s1dss == 0b01:
        return None
    raise ConfigurationError("F_STREAM_DISABLED", "SUBSTREAM_WANTED")


def fetch_context_structure(fetch, features, stage2, kind, address, size):
    """An L1CD or CD as an integer; its address is an IPA where there is a stage 2."""
    if stage2 is not None:
        address = stage2_access(fetch, stage2, address, CLASS_CD).pa
    return fetch_structure(fetch, features, kind, address, size, "F_CD_FETCH")


def find_cd(fetch, features, ste, stage2, index):
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
        l1cd = fetch_context_structure(fetch, features, stage2, "L1CD", address, 8)
        if not bits(l1cd, 0, 0):
            raise ConfigurationError("C_BAD_SUBSTREAMID", "L1CD_V")
        leaf = align_down(in_place(l1cd, features.pointer_msb, 12), leaf_lg2 + 6)
        too_large = leaf >> features.oas_bits and features.arch_minor >= 1
        if too_large and stage2 is None:
            raise ConfigurationError("C_BAD_SUBSTREAMID", "L1CD_L2PTR")
        address = leaf + (index & ((1 << leaf_lg2) - 1)) * 64
    return fetch_context_structure(fetch, features, stage2, "CD", address, 64)


@dataclass(slots=True)
class Region:
    """The half of an address space that one TTB translates; all of it at stage 2."""

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
    ha: bool
    hd: bool
    wxn: bool
    pan: bool
    epan: bool
    record: bool
    abort: bool
    stall: bool
    asid: int  # 0 in worlds without
    memory: list  # MemoryType by AttrIndx, hints combined


@dataclass(slots=True)
class Stage2:
    """The fields of an STE that say how stage 2 translates."""

    region: Region
    oas_bits: int
    output_bits: int
    byteorder: str
    affd: bool
    ha: bool
    hd: bool
    device_reads_fault: bool  # S2PTW
    fwb: bool
    xnx: bool
    record: bool
    stall: bool


def decode_stage2(features, ste):
    """The stage 2 of an STE that was checked."""
    granule_lg2, ds, level = stage2_start(features, ste)
    output_bits = stage2_output_bits(features, ste)
    input_bits = 64 - bits(ste, 165, 160)
    resolved = input_bits - (granule_lg2 + (3 - level) * (granule_lg2 - 3))
    ttb = in_place(bits(ste, 247, 192), 47 if features.arch_minor == 0 else 51, 4)
    alignment = max(resolved + 3, 6 if output_bits >= 52 or ds else 4)
    ha, hd = bits(ste, 184, 184), bits(ste, 183, 183)
    return Stage2(
        region=Region(
            enabled=True,
            granule_lg2=granule_lg2,
            ds=ds,
            input_bits=input_bits,
            start_level=level,
            base=align_down(ttb, alignment),
            sh=bits(ste, 173, 172),
        ),
        oas_bits=features.oas_bits,
        output_bits=output_bits,
        byteorder="big" if bits(ste, 180, 180) else "little",
        affd=bool(bits(ste, 181, 181)),
        ha=bool(ha),
        hd=bool(ha and hd),
        device_reads_fault=bool(bits(ste, 182, 182)),
        fwb=bool(features.fwb and bits(ste, 89, 89)),
        xnx=bool(features.xnx),
        record=bool(bits(ste, 186, 186)),
        stall=bool(bits(ste, 185, 185)),
    )


def tables_start(granule_lg2, input_bits):
    """(start level, bits that it resolves) for an input size."""
    per_level = granule_lg2 - 3
    level = 3 - (input_bits - 1 - granule_lg2) // per_level
    return level, input_bits - (granule_lg2 + (3 - level) * per_level)


def decode_region(features, cd, number, ips_bits, e2h_or_el1):
    """One TTB's part of a CD; raises C_BAD_CD where it is ILLEGAL (5.4)."""
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
        raise bad_cd(f"CD_TG{number}")
    cd_ds = bool(features.ds and bits(cd, 186, 186))
    largest = 39 if not features.stt else 47 if granule_lg2 == 16 else 48
    smallest = 12 if features.vax >= 1 and (granule_lg2 == 16 or cd_ds) else 16
    if not smallest <= tsz <= largest:
        raise bad_cd(f"CD_T{number}SZ")

    ds = cd_ds and granule_lg2 != 16
    ttb = in_place(ttb, 47 if features.arch_minor == 0 else 51, 4)
    if ttb >> ips_bits:
        raise bad_cd(f"CD_TTB{number}")
    if granule_lg2 != 16 and not ds and ttb >> 48:
        raise bad_cd(f"CD_TTB{number}_48")

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


def decode_cd(features, world, cd, entering, s1stalld):
    """Check a CD (5.4) and decode it."""
    two_ttbs = world != EL2
    if not bits(cd, 31, 31):  # V
        raise bad_cd("CD_V")
    abort, stall = bits(cd, 46, 46), bits(cd, 44, 44)
    if stall and features.stall_model == 0b01:
        raise bad_cd("CD_S_NEVER")
    if not stall and features.stall_model == 0b10:
        raise bad_cd("CD_S_ALWAYS")
    if stall and s1stalld:
        raise bad_cd("CD_S_S1STALLD")
    if not abort and features.term_model:
        raise bad_cd("CD_A")
    if not bits(cd, 41, 41):  # AA64=0, and TTF has no AArch32 tables
        raise bad_cd("CD_AA64")
    disabled = [bits(cd, 14, 14), bits(cd, 30, 30)] if two_ttbs else [0]  # EPD0, EPD1
    endi = bits(cd, 15, 15)
    if not all(disabled) and (
        (features.ttendian == 0b10 and endi) or (features.ttendian == 0b11 and not endi)
    ):
        raise bad_cd("CD_ENDI")
    ha, hd = bits(cd, 43, 43), bits(cd, 42, 42)
    if (ha or hd) and features.httu == 0b00:
        raise bad_cd("CD_HTTU")
    if hd and features.httu == 0b01:
        raise bad_cd("CD_HTTU")
    if two_ttbs and bits(cd, 63, 56) and not features.asid16:  # ASID[15:8]
        raise bad_cd("CD_ASID")

    ips_bits = min(address_size_bits(bits(cd, 34, 32), features.arch_minor), features.oas_bits)
    regions = [
        decode_region(features, cd, number, ips_bits, two_ttbs)
        for number in range(2 if two_ttbs else 1)
    ]

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
        ha=bool(ha),
        hd=bool(ha and hd),
        wxn=bool(bits(cd, 36, 36)),
        pan=bool(bits(cd, 40, 40)) and two_ttbs,
        epan=bool(features.epan and bits(cd, 123, 123)),
        record=bool(bits(cd, 45, 45)),
        abort=bool(abort),
        stall=bool(stall),
        asid=bits(cd, 63, 48) if two_ttbs else 0,
        memory=memory,
    )


@dataclass(slots=True)
class Stream:
    """What configuration says about one (StreamID, SubstreamID)."""

    privcfg: int
    instcfg: int
    entering: MemoryType
    entering_sh: int
    vmid: int
    stage2: Stage2 | None = None
    context: Context | None = None  # None: stage 1 is bypassed
    cd_fault: TranslationError | None = None  # of stage 2, on the way to the CD

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
    config = bits(ste, 3, 1)
    world = stream_world(features, regs, ste)
    tagged = features.s2p and config != 0b100 and world == NS_EL1
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
        vmid=bits(ste, 143, 128) if tagged else 0,
    )
    if config & 0b010:
        stream.stage2 = decode_stage2(features, ste)
    if index is not None:
        try:
            cd = find_cd(fetch, features, ste, stream.stage2, index)
        except TranslationError as fault:
            stream.cd_fault = fault
        else:
            stream.context = decode_cd(features, world, cd, entering, bits(ste, 91, 91))
    return stream


# ------------------------------------------------------------------------------------------------
# Both stages (DDI 0487 D8)


def block_allowed(region, level, oas_bits):
    """Whether a descriptor of a level above 3 may be a block."""
    if region.granule_lg2 == 12:
        return level in (1, 2) or (level == 0 and region.ds)
    if region.granule_lg2 == 14:
        return level == 2 or (level == 1 and region.ds)
    return level == 2 or (level == 1 and oas_bits >= 52)


def output_address(region, descriptor, low_bits):
    """Address held by a descriptor, without its low_bits lowest bits."""
    if region.granule_lg2 == 16:
        return in_place(descriptor, 47, low_bits) | bits(descriptor, 15, 12) << 48
    if region.ds:
        return in_place(descriptor, 49, low_bits) | bits(descriptor, 9, 8) << 50
    return in_place(descriptor, 47, low_bits)


def access_bit(write, priv, instr):
    """The bit of one kind of access."""
    bit = UW if write else UX if instr else UR
    return bit << 3 if priv else bit


@dataclass(slots=True)
class Page:
    """What one stage found for an address."""

    descriptor: int
    address: int  # of the descriptor, in physical memory
    level: int
    shift: int  # log2 of the page or block, or of what of a block the output size admits
    output: int  # address of the page or block
    pa: int = 0  # output of the address itself
    allowed: int = 0


def contiguous(page, region):
    """The Contiguous bit of a leaf, which the largest blocks of a granule do not have."""
    largest = {12: 0, 14: 1, 16: 1}[region.granule_lg2]
    return 0 if page.level == largest else bits(page.descriptor, 52, 52)


# ------------------------------------------------------------------------------------------------
# Stage 2


def stage2_walk(fetch, stage2, ipa, event_class):
    """The leaf of an IPA, checked for its address size."""

    def fault(name, why, **more):
        return TranslationError(name, why, stage2=True, event_class=event_class, ipa=ipa, **more)

    region = stage2.region
    if ipa >> region.input_bits:
        raise fault("F_TRANSLATION", "S2T0SZ_RANGE")
    granule_lg2 = region.granule_lg2
    per_level = granule_lg2 - 3
    table = region.base
    level = region.start_level
    shift = granule_lg2 + (3 - level) * per_level
    index = ipa >> shift  # the first table may be several, one after the other
    while True:
        address = table + index * 8
        data = fetch("S2TT", level, address, 8)
        if data is None:
            raise fault("F_WALK_EABT", "S2_ABORT", fetch_address=address)
        descriptor = int.from_bytes(data, stage2.byteorder)
        kind = descriptor & 0b11
        if kind == 0b11 and level < 3:
            table = output_address(region, descriptor, granule_lg2)
            if table >> stage2.output_bits:
                raise fault("F_ADDR_SIZE", "S2_TABLE")
            level += 1
            shift -= per_level
            index = (ipa >> shift) & ((1 << per_level) - 1)
            continue
        page = kind == 0b11
        block = kind == 0b01 and level < 3 and block_allowed(region, level, stage2.oas_bits)
        if not (page or block):
            raise fault("F_TRANSLATION", "S2_RESERVED" if kind == 0b01 else "S2_INVALID")
        break

    output = output_address(region, descriptor, shift)
    pa = output | (ipa & ((1 << shift) - 1))
    if pa >> stage2.output_bits:
        raise fault("F_ADDR_SIZE", "S2_OUTPUT")
    return Page(descriptor, address, level, min(shift, stage2.output_bits), output, pa)


def stage2_allowed(stage2, leaf):
    """Accesses that a leaf of stage 2 allows; PRIV and INST matter only to execution."""
    allowed = 0
    if bits(leaf, 6, 6):  # S2AP[0]
        allowed |= UR | PR
    if leaf & S2AP1 or (stage2.hd and leaf & DBM):
        allowed |= UW | PW
    if stage2.xnx:
        allowed |= {0b00: UX | PX, 0b01: UX, 0b10: 0, 0b11: PX}[bits(leaf, 54, 53)]
    elif not bits(leaf, 54, 54):
        allowed |= UX | PX
    return allowed


def stage2_access(fetch, stage2, ipa, event_class, write=False, priv=True, instr=False):
    """Translate an IPA for one access; those to CDs and stage-1 descriptors are Data reads."""

    def fault(name, why, **more):
        return TranslationError(name, why, stage2=True, event_class=event_class, ipa=ipa, **more)

    page = stage2_walk(fetch, stage2, ipa, event_class)
    leaf = page.descriptor
    page.allowed = stage2_allowed(stage2, leaf)
    permitted = bool(page.allowed & access_bit(write, priv, instr))
    why = "S2_PERMISSION"
    if permitted and event_class != CLASS_IN and stage2.device_reads_fault:
        permitted = not stage2_is_device(bits(leaf, 5, 2), stage2.fwb)
        why = "S2_DEVICE"

    desired = leaf
    if not leaf & AF:
        if stage2.ha:
            desired |= AF
        elif not stage2.affd:
            raise fault("F_ACCESS", "S2_AF")
    if write and permitted:
        desired |= S2AP1
    if desired != leaf:
        stage2_update(fetch, stage2, page, desired, event_class, ipa)
    if not permitted:
        descriptor_read = event_class == CLASS_TT
        raise fault(
            "F_PERMISSION", why, allowed=page.allowed, page=page, descriptor_read=descriptor_read
        )
    return page


def stage2_update(fetch, stage2, page, desired, event_class, ipa):
    """Write a stage-2 descriptor."""
    leaf = page.descriptor
    if not fetch.swap("S2TT update", page.level, page.address, stage2.byteorder, leaf, desired):
        raise TranslationError(
            "F_WALK_EABT", "S2_UPDATE_ABORT", stage2=True, event_class=event_class,
            fetch_address=page.address, ipa=ipa,
        )  # fmt: skip
    page.descriptor = desired


def stage2_write_descriptor(fetch, stage2, page, ipa):
    """Ask stage 2 whether a stage-1 descriptor, which was read through it, may be written."""
    if not page.allowed & PW:
        raise TranslationError(
            "F_PERMISSION", "S2_UPDATE", stage2=True, event_class=CLASS_TT, ipa=ipa
        )
    if not page.descriptor & S2AP1:
        stage2_update(fetch, stage2, page, page.descriptor | S2AP1, CLASS_TT, ipa)


# ------------------------------------------------------------------------------------------------
# Stage 1


def select_region(context, iova, priv):
    """The region of an input address, checked against its size."""
    upper = context.two_ttbs and bits(iova, 55, 55)
    number = 1 if upper else 0
    region = context.regions[number]
    if not region.enabled:
        raise TranslationError("F_TRANSLATION", f"EPD{number}")
    above = bits(iova, region.top_bit, region.input_bits)
    ones = (1 << (region.top_bit - region.input_bits + 1)) - 1
    if above != (ones if upper else 0):
        raise TranslationError("F_TRANSLATION", f"T{number}SZ_RANGE")
    if region.e0pd and not priv:
        raise TranslationError("F_TRANSLATION", f"E0PD{number}")
    return region


def stage1_allowed(context, region, leaf, tables):
    """Accesses that a leaf allows; tables is the OR of the table descriptors above it."""
    if not region.hierarchical:
        tables = 0
    writable_clean = context.hd and leaf & DBM
    read_only = (leaf & AP2 and not writable_clean) or bits(tables, 62, 62)  # APTable[1]
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


def stage1_access(fetch, stream, iova, write, priv, instr):
    """Translate an input address; priv and instr are those after the overrides.

    Returns (page, region).
    """
    context, stage2 = stream.context, stream.stage2
    region = select_region(context, iova, priv)
    granule_lg2 = region.granule_lg2
    per_level = granule_lg2 - 3
    va = iova & ((1 << region.input_bits) - 1)
    table = region.base
    tables = 0
    level = region.start_level
    while True:
        shift = granule_lg2 + (3 - level) * per_level
        descriptor_ipa = address = table + ((va >> shift) & ((1 << per_level) - 1)) * 8
        if stage2 is not None:
            mapped = stage2_access(fetch, stage2, descriptor_ipa, CLASS_TT)
            address = mapped.pa
        data = fetch("TT", level, address, 8)
        if data is None:
            raise TranslationError(
                "F_WALK_EABT", "S1_ABORT", event_class=CLASS_TT, fetch_address=address
            )
        descriptor = int.from_bytes(data, context.byteorder)
        kind = descriptor & 0b11
        if kind == 0b11 and level < 3:
            table = output_address(region, descriptor, granule_lg2)
            if table >> context.ips_bits:
                raise TranslationError("F_ADDR_SIZE", "S1_TABLE")
            tables |= descriptor
            level += 1
            continue
        page = kind == 0b11
        block = kind == 0b01 and level < 3 and block_allowed(region, level, context.oas_bits)
        if not (page or block):
            raise TranslationError(
                "F_TRANSLATION", "S1_RESERVED" if kind == 0b01 else "S1_INVALID"
            )
        break

    output = output_address(region, descriptor, shift)
    pa = output | (va & ((1 << shift) - 1))
    if pa >> context.ips_bits:
        raise TranslationError("F_ADDR_SIZE", "S1_OUTPUT")
    allowed = stage1_allowed(context, region, descriptor, tables)
    permitted = bool(allowed & access_bit(write, priv, instr))

    desired = descriptor
    if not descriptor & AF:
        if context.ha:
            desired |= AF
        elif not context.affd:
            raise TranslationError("F_ACCESS", "S1_AF")
    if write and permitted:
        desired &= ~AP2
    # Where this stage refuses the access, stage 2 is not made to fault for the update.
    if desired != descriptor and (permitted or stage2 is None or mapped.allowed & PW):
        if stage2 is not None:
            stage2_write_descriptor(fetch, stage2, mapped, descriptor_ipa)
        if not fetch.swap("TT update", level, address, context.byteorder, descriptor, desired):
            raise TranslationError(
                "F_WALK_EABT", "S1_UPDATE_ABORT", event_class=CLASS_TT, fetch_address=address
            )
    shift = min(shift, context.ips_bits)
    found = Page(descriptor, address, level, shift, output, pa, allowed)
    if not permitted:
        raise TranslationError(
            "F_PERMISSION", "S1_PERMISSION", allowed=allowed, page=found, region=region
        )
    return found, region


# ------------------------------------------------------------------------------------------------
# The whole


class ContextCache:
    """Decoded configuration by (sid, ssid), for many translations of one system.

    Good for one memory, one set of features and one set of registers: make a new one when any of
    them is changed by others than translate.
    """

    def __init__(self):
        self.features = None
        self.streams = {}


def disabled(features, regs, iova):
    """SMMUEN=0: what GBPA says."""
    gbpa = regs.gbpa
    if bits(gbpa, 20, 20):
        return Outcome(success=False, action="abort", why="GBPA_ABORT")
    if iova >> features.oas_bits:
        return Outcome(success=False, action="abort", why="GBPA_ADDRESS")
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
        perm_s1=ALL_ACCESSES,
        attr=memory_to_mair(memory),
        sh=sh,
    )


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


def translate_address(fetch, features, stream, iova, write, priv, instr):
    """Both stages of one address, as far as the STE enables them: (outcome, fault or None)."""
    context, stage2 = stream.context, stream.stage2
    outcome = Outcome(success=True, action="ok", pa=iova, vmid=stream.vmid)
    if stream.cd_fault is not None:
        return outcome, stream.cd_fault
    allowed = ALL_ACCESSES
    memory, sh = stream.entering, stream.entering_sh
    page = None
    if context is not None:
        outcome.stage |= 0b01
        try:
            page, region = stage1_access(fetch, stream, iova, write, priv, instr)
        except TranslationError as fault:
            if fault.name == "F_PERMISSION" and not fault.stage2:
                outcome.perm = outcome.perm_s1 = reported_perm(stream, fault.allowed)
            return outcome, fault
        leaf = page.descriptor
        allowed = page.allowed
        outcome.pa = page.pa
        outcome.asid = context.asid
        outcome.ng = bits(leaf, 11, 11) if context.two_ttbs else 0
        memory = context.memory[bits(leaf, 4, 2)]
        # Its effective value only once the final type is known.
        sh = region.sh if region.ds else bits(leaf, 9, 8)
    elif iova >> features.oas_bits:
        return outcome, TranslationError("F_ADDR_SIZE", "BYPASS_ADDRESS", bypassed=True)
    outcome.perm_s1 = outcome.perm = reported_perm(stream, allowed)

    if stage2 is not None:
        ipa = outcome.pa
        outcome.stage |= 0b10
        try:
            second = stage2_access(fetch, stage2, ipa, CLASS_IN, write, priv, instr)
        except TranslationError as fault:
            both = fault.name == "F_PERMISSION"
            outcome.perm = reported_perm(stream, allowed & fault.allowed) if both else 0
            outcome.perm_s1 = outcome.perm_s1 if both else 0
            return outcome, fault
        leaf2 = second.descriptor
        outcome.ipa = ipa
        outcome.pa = second.pa
        outcome.perm = reported_perm(stream, allowed & second.allowed)
        memory = stage2_memory(memory, bits(leaf2, 5, 2), stage2.fwb)
        sh = combined_sh(sh, stage2.region.sh if stage2.region.ds else bits(leaf2, 9, 8))
        if page is None:
            outcome.contiguous = contiguous(second, stage2.region)
        if page is None or second.shift < page.shift:
            outcome.level, outcome.page_lg2 = second.level, second.shift

    if page is not None:
        outcome.contiguous = contiguous(page, region)
        if outcome.level is None:
            outcome.level, outcome.page_lg2 = page.level, page.shift
    elif stage2 is None:
        outcome.action = "bypass"
    outcome.attr = memory_to_mair(memory)
    outcome.sh = consistent_sh(memory, sh)
    return outcome, None


def fault_action(stream, fault):
    """(action, recorded) of a fault: what CD.A, R, S or STE.S2R, S2S say (5.5)."""
    if fault.name == "F_WALK_EABT" or fault.bypassed:
        return "abort", True
    if fault.stage2:
        if stream.stage2.stall:
            return "stall", True
        return "abort", stream.stage2.record
    if stream.context.stall:
        return "stall", True
    return "abort" if stream.context.abort else "raz_wi", stream.context.record


def translate(
    read, features, regs, sid, iova, ssid=None, write=False, priv=False, instr=False, cache=None,
    store=None,
):  # fmt: skip
    """Translate one transaction.

    read: (address, size) -> bytes, or None for an external abort.
    features: object with the feature codes as attributes (see features_from_idr).
    regs: object with strtab_base, strtab_base_cfg, cr0, cr2, gbpa.
    cache: ContextCache, to decode the configuration of a stream once.
    store: (address, bytes), for tables that have their access flags or dirty state updated.
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
        fetch = Fetcher(read, store, cache)
        try:
            stream = configure(fetch, features, regs, sid, ssid)
        except ConfigurationError as fault:
            stream = fault
        if not fetch.updates:
            cache.streams[sid, ssid] = (stream, list(fetch.fetches))
    else:
        stream, fetches = found
        fetch = Fetcher(read, store, cache, fetches)
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
            why=stream.why,
            event=event_record(
                name, sid, ssid, fetch_address=fetch_reported(features, stream.fetch_address)
            )
            if recorded
            else None,
            fetches=fetch.fetches,
        )

    priv, instr = stream.overridden(write, priv, instr)
    while True:
        try:
            outcome, fault = translate_address(fetch, features, stream, iova, write, priv, instr)
            break
        except DescriptorChangedError:
            continue
    outcome.fetches = fetch.fetches
    if fault is None:
        return outcome

    outcome.success = False
    outcome.pa = None
    outcome.fault = fault.name
    outcome.why = fault.why
    if stream.stage2 is not None:
        outcome.stage |= 0b10
    outcome.action, recorded = fault_action(stream, fault)
    if recorded and events_on:
        aborted_read = fault.name == "F_WALK_EABT"
        outcome.event = event_record(
            fault.name, sid, ssid, write=write, priv=priv, instr=instr, iova=iova,
            event_class=fault.event_class,
            stage2=fault.stage2,
            fetch_address=fetch_reported(features, fault.fetch_address),
            ipa=0 if aborted_read else in_place(fault.ipa, features.oas_bits - 1, 12),
            descriptor_read=fault.descriptor_read,
            stall=outcome.action == "stall",
        )  # fmt: skip
    return outcome
