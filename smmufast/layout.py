"""The records of SMMUv3 and VMSAv8-64, bit by bit: the one place where a position is typed.

Encodes IHI 0070 chapters 4 (commands), 5 (stream table entry, context descriptor), 6 (registers),
7 (events) and 8 (page requests), SMMUv3.0 to v3.4, and DDI 0487 D8.3 (VMSAv8-64 descriptors).
No behaviour: what a field leads to is written where it is acted upon.

Conventions
-----------
Bits are absolute within the record, as the architecture counts them in little-endian order: bit
``n`` is bit ``n % 64`` of dword ``n // 64``. No field crosses a dword; a `Record` refuses one that
does. The value of a field is its bits shifted down, except for an address field, whose value is
the address itself: its bits stay where they are in the dword, and the bits below must be zero.
A field marked ``overlay`` shares bits with others of its record and has a meaning only when
something outside the field (an opcode, a granule, a feature) says so. ``doubt`` says that a
position is known from one source only, or was not checked at all.

Field names are spelt as the architecture spells them. Functions that take a name do not look at
its case, so ``pack("CD", T0SZ=16)`` and ``pack("CD", t0sz=16)`` are the same call.

The generated files
-------------------
``_facts/layout.pxd`` holds the same table as Cython inline functions and enumerators,
``_facts/layout.h`` as masks for Cython and C. After a change::

    python -P smmufast/layout.py --write     # rewrites both
    python -P smmufast/layout.py             # prints them

This module imports the standard library only, so that it runs before the package is built.
"""

import enum
import functools
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from dataclasses import field as _field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "COMMANDS",
    "EVENTS",
    "OUTPUT_BITS",
    "RECORDS",
    "REGISTERS",
    "Event",
    "Field",
    "Opcode",
    "Record",
    "StreamWorld",
    "command_record",
    "dtype",
    "event_record",
    "format",
    "from_bytes",
    "get",
    "mask",
    "pack",
    "record",
    "set",
    "to_bytes",
    "unpack",
]


@dataclass(frozen=True)
class Field:
    """One field: a name for bits ``[msb:lsb]`` of a record.

    Attributes
    ----------
    name : str
        As the architecture spells it.
    msb, lsb : int
        First and last bit, absolute within the record, both inclusive.
    doc : str
        What it means, in a few words.
    values : mapping of int to str
        Names of codes, ``"name"`` or ``"name: more"``.
    address : bool
        The value is an address in place: not shifted, and the bits below the field are zero.
    overlay : bool
        Shares bits with other fields of its record.
    doubt : str
        Empty, ``"one source"`` or ``"unchecked"``: how far the position can be trusted.
    """

    name: str
    msb: int
    lsb: int
    doc: str = ""
    values: Mapping[int, str] = _field(default_factory=dict, hash=False)
    address: bool = _field(default=False, kw_only=True)
    overlay: bool = _field(default=False, kw_only=True)
    doubt: str = _field(default="", kw_only=True)

    @functools.cached_property
    def width(self) -> int:
        """Number of bits."""
        return self.msb - self.lsb + 1

    @functools.cached_property
    def dword(self) -> int:
        """Index of the dword that holds the field."""
        return self.lsb // 64

    @functools.cached_property
    def mask(self) -> int:
        """The field's bits within its dword."""
        return ((1 << self.width) - 1) << self.lsb % 64

    @functools.cached_property
    def shift(self) -> int:
        """How far a value moves up in its dword: 0 for an address, which is in place already."""
        return 0 if self.address else self.lsb % 64

    @functools.cached_property
    def absolute(self) -> int:
        """The field's bits within the record as one integer."""
        return self.mask << 64 * self.dword

    @property
    def bits(self) -> str:
        """The bits as the architecture writes them: ``[3:1]``, or ``[0]`` for a single one."""
        return f"[{self.lsb}]" if self.width == 1 else f"[{self.msb}:{self.lsb}]"

    def name_of(self, value: int) -> str:
        """Return the name of a code, or an empty string for one without a name."""
        return self.values.get(value, "")


# How fields of some names are packed: the bits that are there anyway, then of each field the bits
# that its value may have, and how far they move.  None: they have to be looked at one by one.
_Way = tuple[int, tuple[tuple[int, int], ...]] | None


@dataclass(frozen=True)
class Record:
    """A record: its size and its fields.

    Attributes
    ----------
    name : str
        As the architecture spells it.
    bytes : int
        Size in memory: 4, or a multiple of 8.
    doc : str
        One line.
    fields : tuple of Field
        Bits that no field covers are RES0 (or implementation defined).
    fixed : mapping of str to int
        Fields whose value makes the record what it is, such as the opcode of a command.
    offset : int or None
        For a register, its offset in the programming interface.

    Raises
    ------
    ValueError
        If a field leaves the record or crosses a dword, or two fields bear one name.
    """

    name: str
    bytes: int
    doc: str
    fields: tuple[Field, ...]
    fixed: Mapping[str, int] = _field(default_factory=dict, hash=False)
    offset: int | None = None
    _by_name: dict[str, Field] = _field(init=False, repr=False, compare=False)
    _ways: dict[tuple[str, ...], "_Way"] = _field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for f in self.fields:
            if not 0 <= f.lsb <= f.msb < 8 * self.bytes:
                raise ValueError(f"{self.name}.{f.name} {f.bits} is not within {self.bytes} bytes")
            if f.lsb // 64 != f.msb // 64:
                raise ValueError(f"{self.name}.{f.name} {f.bits} crosses a dword")
        object.__setattr__(self, "_by_name", {f.name.lower(): f for f in self.fields})
        if len(self._by_name) != len(self.fields):
            raise ValueError(f"{self.name} has two fields of one name")

    @property
    def dwords(self) -> int:
        """Size in 64-bit words, at least 1."""
        return max(1, self.bytes // 8)

    def field(self, name: str) -> Field:
        """Return the field of that name, in any case.

        Raises
        ------
        ValueError
            If there is none.
        """
        try:
            return self._by_name[name.lower()]
        except KeyError:
            raise ValueError(
                f"{self.name} has no field {name!r}; it has "
                + ", ".join(f.name for f in self.fields)
            ) from None

    def __repr__(self) -> str:
        return f"<Record {self.name}: {self.bytes} bytes, {len(self.fields)} fields>"


# --- numbers ------------------------------------------------------------------------------------


class Event(enum.IntEnum):
    """Event numbers (IHI 0070, 7.3)."""

    F_UUT = 0x01
    C_BAD_STREAMID = 0x02
    F_STE_FETCH = 0x03
    C_BAD_STE = 0x04
    F_BAD_ATS_TREQ = 0x05
    F_STREAM_DISABLED = 0x06
    F_TRANSL_FORBIDDEN = 0x07
    C_BAD_SUBSTREAMID = 0x08
    F_CD_FETCH = 0x09
    C_BAD_CD = 0x0A
    F_WALK_EABT = 0x0B
    F_TRANSLATION = 0x10
    F_ADDR_SIZE = 0x11
    F_ACCESS = 0x12
    F_PERMISSION = 0x13
    F_TLB_CONFLICT = 0x20
    F_CFG_CONFLICT = 0x21
    E_PAGE_REQUEST = 0x24
    F_VMS_FETCH = 0x25


class Opcode(enum.IntEnum):
    """Command opcodes (IHI 0070, 4.1); one opcode is CFGI_STE_RANGE and CFGI_ALL."""

    PREFETCH_CONFIG = 0x01
    PREFETCH_ADDR = 0x02
    CFGI_STE = 0x03
    CFGI_STE_RANGE = 0x04
    CFGI_ALL = 0x04
    CFGI_CD = 0x05
    CFGI_CD_ALL = 0x06
    CFGI_VMS_PIDM = 0x07
    TLBI_NH_ALL = 0x10
    TLBI_NH_ASID = 0x11
    TLBI_NH_VA = 0x12
    TLBI_NH_VAA = 0x13
    TLBI_EL3_ALL = 0x18
    TLBI_EL3_VA = 0x1A
    TLBI_EL2_ALL = 0x20
    TLBI_EL2_ASID = 0x21
    TLBI_EL2_VA = 0x22
    TLBI_EL2_VAA = 0x23
    TLBI_S12_VMALL = 0x28
    TLBI_S2_IPA = 0x2A
    TLBI_NSNH_ALL = 0x30
    ATC_INV = 0x40
    PRI_RESP = 0x41
    RESUME = 0x44
    STALL_TERM = 0x45
    SYNC = 0x46
    TLBI_S_EL2_ALL = 0x50
    TLBI_S_EL2_ASID = 0x51
    TLBI_S_EL2_VA = 0x52
    TLBI_S_EL2_VAA = 0x53
    TLBI_S_S12_VMALL = 0x58
    TLBI_S_S2_IPA = 0x5A
    TLBI_SNH_ALL = 0x60
    DPTI_ALL = 0x70
    DPTI_PA = 0x73


class StreamWorld(enum.IntEnum):
    """Translation regime of a Non-secure stream: what STE.STRW and CR2.E2H select (not a code)."""

    NS_EL1 = 0
    EL2 = 1
    EL2_E2H = 2


# --- codes that several fields share ------------------------------------------------------------

_SH = {
    0: "NSH: non-shareable",
    1: "reserved: as NSH",
    2: "OSH: outer shareable",
    3: "ISH: inner shareable",
}
_SH_OVERRIDE = {0: "NSH", 1: "INCOMING: as the transaction has it", 2: "OSH", 3: "ISH"}
_WALK_CACHE = {
    0: "NC: non-cacheable",
    1: "WB_RA_WA: write-back, read and write allocate",
    2: "WT: write-through, read allocate",
    3: "WB_RA: write-back, no write allocate",
}
_CD_CACHE = {
    0: "NC: non-cacheable",
    1: "WB_RA: write-back, read allocate",
    2: "WT_RA: write-through, read allocate",
    3: "WB: write-back, no read allocate",
}
_QUEUE_CACHE = {0: "NC: non-cacheable", 1: "WB: write-back", 2: "WT: write-through", 3: "reserved"}
_TG0 = {0: "4K", 1: "64K", 2: "16K", 3: "reserved"}
_TG1 = {0: "reserved", 1: "16K", 2: "4K", 3: "64K"}
#: Bits of address that the codes of CD.IPS, STE.S2PS and IDR5.OAS stand for.
OUTPUT_BITS = (32, 36, 40, 42, 44, 48, 52, 56)
_PS = {code: f"{bits} bits" for code, bits in enumerate(OUTPUT_BITS)}
_PRIVCFG = {0: "INCOMING", 1: "incoming, as 00", 2: "UNPRIVILEGED", 3: "PRIVILEGED"}
_INSTCFG = {0: "INCOMING", 1: "incoming, as 00", 2: "DATA", 3: "INSTRUCTION"}
_NSCFG = {0: "INCOMING", 1: "incoming, as 00", 2: "SECURE", 3: "NON_SECURE"}
_ENDI = {0: "little-endian", 1: "big-endian"}
_STAGE2_MEMATTR = {
    0b0000: "DEVICE_NGNRNE", 0b0001: "DEVICE_NGNRE", 0b0010: "DEVICE_NGRE", 0b0011: "DEVICE_GRE",
    0b0100: "reserved", 0b0101: "ONC_INC", 0b0110: "ONC_IWT", 0b0111: "ONC_IWB",
    0b1000: "reserved", 0b1001: "OWT_INC", 0b1010: "OWT_IWT", 0b1011: "OWT_IWB",
    0b1100: "reserved", 0b1101: "OWB_INC", 0b1110: "OWB_IWT", 0b1111: "OWB_IWB",
}  # fmt: skip
_MEMATTR = {
    code: "reserved: as Device-nGnRnE" if name == "reserved" else name
    for code, name in _STAGE2_MEMATTR.items()
}

# --- stream table (IHI 0070, 5.1 and 5.2) --------------------------------------------------------

L1STD = Record("L1STD", 8, "level-1 stream table descriptor", (
    Field("Span", 4, 0, "the level-2 table holds 2^(Span-1) STEs; 0 and 12..31 are invalid"),
    Field("L2Ptr", 55, 6, "address of the level-2 table", address=True),
))  # fmt: skip

STE = Record("STE", 64, "stream table entry", (
    Field("V", 0, 0, "valid"),
    Field("Config", 3, 1, "what the stream's transactions meet",
          {0: "ABORT: no event", 1: "reserved: as 000", 2: "reserved: as 000",
           3: "reserved: as 000", 4: "BYPASS: both stages bypassed", 5: "STAGE_1: stage 1 only",
           6: "STAGE_2: stage 2 only", 7: "NESTED: stage 1 and stage 2"}),
    Field("S1Fmt", 5, 4, "format of the CD table",
          {0: "LINEAR", 1: "TWO_LEVEL_4K: 64 CDs a leaf", 2: "TWO_LEVEL_64K: 1024 CDs a leaf",
           3: "reserved: as linear"}),
    Field("S1ContextPtr", 55, 6, "address of the CD or CD table", address=True),
    Field("S1CDMax", 63, 59, "the CD table covers 2^S1CDMax substreams; 0: one CD, no substreams"),
    Field("S1DSS", 65, 64, "transactions without a substream, when S1CDMax is not 0",
          {0: "TERMINATE", 1: "BYPASS: stage 1 bypassed", 2: "SUBSTREAM_0: use CD 0",
           3: "reserved: as terminate"}),
    Field("S1CIR", 67, 66, "inner cacheability of CD fetches", _CD_CACHE),
    Field("S1COR", 69, 68, "outer cacheability of CD fetches", _CD_CACHE),
    Field("S1CSH", 71, 70, "shareability of CD fetches", _SH),
    *(Field(f"S2HWU{59 + n}", 72 + n, 72 + n, f"hardware may use bit {59 + n} of stage-2 leaves")
      for n in range(4)),
    Field("DRE", 76, 76, "destructive reads allowed"),
    Field("CONT", 80, 77, "2^CONT aligned neighbouring STEs are identical"),
    Field("DCP", 81, 81, "directed cache prefetch allowed"),
    Field("PPAR", 82, 82, "automatic page responses carry the PASID"),
    Field("MEV", 83, 83, "identical events may be merged"),
    Field("SW_RESERVED", 87, 84, "for software"),
    Field("S1PIE", 88, 88, "stage-1 indirect permissions allowed"),
    Field("S2FWB", 89, 89, "stage-2 MemAttr may force write-back"),
    Field("S1MPAM", 90, 90, "PARTID and PMG come from the CD"),
    Field("S1STALLD", 91, 91, "stage 1 may not stall"),
    Field("EATS", 93, 92, "PCIe address translation service",
          {0: "OFF", 1: "FULL", 2: "SPLIT: stage 1 only", 3: "DPT: checked"}),
    Field("STRW", 95, 94, "StreamWorld of a Non-secure stage 1",
          {0: "NS_EL1", 1: "reserved", 2: "EL2: or EL2-E2H", 3: "reserved"}),
    Field("MemAttr", 99, 96, "memory type when MTCFG=1", _MEMATTR),
    Field("MTCFG", 100, 100, "memory type", {0: "incoming", 1: "MemAttr"}),
    Field("ALLOCCFG", 104, 101, "allocation hints: 0xxx incoming, 1RWT read, write, transient"),
    Field("SHCFG", 109, 108, "shareability", _SH_OVERRIDE),
    Field("NSCFG", 111, 110, "Secure streams: NS", _NSCFG),
    Field("PRIVCFG", 113, 112, "privilege", _PRIVCFG),
    Field("INSTCFG", 115, 114, "data or instruction, of reads", _INSTCFG),
    Field("S2VMID", 143, 128, "virtual machine identifier"),
    Field("S2T0SZ", 165, 160, "stage-2 input size is 64-S2T0SZ bits"),
    Field("S2SL0", 167, 166, "stage-2 start level, coded per granule"),
    Field("S2IR0", 169, 168, "stage-2 walk, inner cacheability", _WALK_CACHE),
    Field("S2OR0", 171, 170, "stage-2 walk, outer cacheability", _WALK_CACHE),
    Field("S2SH0", 173, 172, "stage-2 walk, shareability", _SH),
    Field("S2TG", 175, 174, "stage-2 granule", _TG0),
    Field("S2PS", 178, 176, "stage-2 output size", _PS),
    Field("S2AA64", 179, 179, "stage-2 tables", {0: "VMSAv8-32 LPAE", 1: "VMSAv8-64"}),
    Field("S2ENDI", 180, 180, "endianness of stage-2 descriptors", _ENDI),
    Field("S2AFFD", 181, 181, "no stage-2 access flag faults"),
    Field("S2PTW", 182, 182, "stage-1 walk to stage-2 Device memory faults"),
    Field("S2HD", 183, 183, "hardware dirty state, stage 2"),
    Field("S2HA", 184, 184, "hardware access flag, stage 2"),
    Field("S2S", 185, 185, "stall on stage-2 faults"),
    Field("S2R", 186, 186, "record stage-2 faults"),
    Field("S2HAFT", 187, 187, "hardware access flag in tables, stage 2"),
    Field("S2PIE", 188, 188, "stage-2 indirect permissions"),
    Field("S2POE", 189, 189, "stage-2 permission overlays"),
    Field("DPT_VMATCH", 191, 190, "VMID match of the device permission table", doubt="one source"),
    Field("S2NSW", 192, 192, "Secure: NS of stage-2 walks, NS IPA space"),
    Field("S2NSA", 193, 193, "Secure: NS of stage-2 output, NS IPA space"),
    Field("S2SL0_2", 194, 194, "stage-2 start level, third bit"),
    Field("S2DS", 195, 195, "52-bit format of 4K and 16K stage-2 descriptors"),
    Field("S2TTB", 247, 196, "stage-2 table base", address=True),
    Field("S2SKL", 254, 253, "levels skipped (128-bit descriptors)"),
    Field("PARTID", 287, 272, "MPAM partition"),
    Field("S_S2T0SZ", 293, 288, "S2T0SZ of the Secure IPA space"),
    Field("S_S2SL0", 295, 294, "S2SL0 of the Secure IPA space"),
    Field("S_S2TG", 303, 302, "S2TG of the Secure IPA space", _TG0),
    Field("MECID", 319, 304, "Realm memory encryption context"),
    Field("PMG", 327, 320, "MPAM performance monitoring group"),
    Field("MPAM_NS", 328, 328, "MPAM partition space"),
    Field("AssuredOnly", 329, 329, "check AssuredOnly at stage 2", doubt="one source"),
    Field("TL0", 330, 330, "TopLevel check, TTB0", doubt="one source"),
    Field("TL1", 331, 331, "TopLevel check, TTB1", doubt="one source"),
    Field("VMSPtr", 375, 332, "address of the virtual machine structure", address=True),
    Field("S2SW", 384, 384, "Secure: NS of stage-2 walks, Secure IPA space"),
    Field("S2SA", 385, 385, "Secure: NS of stage-2 output, Secure IPA space"),
    Field("S_S2SL0_2", 386, 386, "S2SL0_2 of the Secure IPA space"),
    Field("S_S2TTB", 439, 388, "S2TTB of the Secure IPA space", address=True),
    Field("S_S2SKL", 446, 445, "S2SKL of the Secure IPA space"),
    *(Field(f"S2POI{p}", 4 * p + 451, 4 * p + 448, f"stage-2 overlay permission, index {p}")
      for p in range(16)),
))  # fmt: skip

# --- context descriptors (IHI 0070, 5.3 and 5.4) -------------------------------------------------

L1CD = Record("L1CD", 8, "level-1 context descriptor", (
    Field("V", 0, 0, "valid"),
    Field("L2Ptr", 55, 12, "address of the table of CDs", address=True),
))  # fmt: skip

CD = Record("CD", 64, "context descriptor", (
    Field("T0SZ", 5, 0, "TTB0 covers 64-T0SZ bits of address"),
    Field("TG0", 7, 6, "TTB0 granule", _TG0),
    Field("IR0", 9, 8, "TTB0 walk, inner cacheability", _WALK_CACHE),
    Field("OR0", 11, 10, "TTB0 walk, outer cacheability", _WALK_CACHE),
    Field("SH0", 13, 12, "TTB0 walk, shareability", _SH),
    Field("EPD0", 14, 14, "TTB0 walks disabled"),
    Field("ENDI", 15, 15, "endianness of descriptors", _ENDI),
    Field("T1SZ", 21, 16, "TTB1 covers 64-T1SZ bits of address"),
    Field("TG1", 23, 22, "TTB1 granule", _TG1),
    Field("IR1", 25, 24, "TTB1 walk, inner cacheability", _WALK_CACHE),
    Field("OR1", 27, 26, "TTB1 walk, outer cacheability", _WALK_CACHE),
    Field("SH1", 29, 28, "TTB1 walk, shareability", _SH),
    Field("EPD1", 30, 30, "TTB1 walks disabled"),
    Field("V", 31, 31, "valid"),
    Field("IPS", 34, 32, "stage-1 output size", _PS),
    Field("AFFD", 35, 35, "no access flag faults"),
    Field("WXN", 36, 36, "writable implies execute-never"),
    Field("UWXN", 37, 37, "VMSAv8-32: unprivileged-writable implies privileged execute-never"),
    Field("TBI0", 38, 38, "top byte of TTB0 addresses ignored"),
    Field("TBI1", 39, 39, "top byte of TTB1 addresses ignored"),
    Field("PAN", 40, 40, "privileged access never"),
    Field("AA64", 41, 41, "tables", {0: "VMSAv8-32 LPAE", 1: "VMSAv8-64"}),
    Field("HD", 42, 42, "hardware dirty state"),
    Field("HA", 43, 43, "hardware access flag"),
    Field("S", 44, 44, "stall on faults"),
    Field("R", 45, 45, "record faults"),
    Field("A", 46, 46, "terminated transactions", {0: "read as zero, write ignored", 1: "abort"}),
    Field("ASET", 47, 47, "ASID set not shared with processors"),
    Field("ASID", 63, 48, "address space identifier"),
    Field("NSCFG0", 64, 64, "Secure: NS of the first TTB0 walk"),
    Field("HAD0", 65, 65, "hierarchical attributes of TTB0 tables ignored"),
    Field("E0PD0", 66, 66, "unprivileged access through TTB0 faults"),
    Field("HAFT", 67, 67, "hardware access flag in tables"),
    Field("TTB0", 119, 68, "table base of the lower addresses", address=True),
    Field("PnCH", 122, 122, "Protected bit in place of Contiguous", doubt="one source"),
    Field("EPAN", 123, 123, "PAN also for unprivileged-executable pages"),
    *(Field(f"HWU{59 + n:03}", 124 + n, 124 + n, f"hardware may use bit {59 + n} of TTB0 leaves")
      for n in range(4)),
    Field("SKL0", 127, 126, "TTB0 levels skipped (128-bit descriptors)", overlay=True),
    Field("NSCFG1", 128, 128, "Secure: NS of the first TTB1 walk"),
    Field("HAD1", 129, 129, "hierarchical attributes of TTB1 tables ignored"),
    Field("E0PD1", 130, 130, "unprivileged access through TTB1 faults"),
    Field("AIE", 131, 131, "four-bit attribute index"),
    Field("TTB1", 183, 132, "table base of the upper addresses", address=True),
    Field("DS", 186, 186, "52-bit format of 4K and 16K descriptors"),
    Field("PIE", 187, 187, "indirect permissions"),
    *(Field(f"HWU1{59 + n}", 188 + n, 188 + n, f"hardware may use bit {59 + n} of TTB1 leaves")
      for n in range(4)),
    Field("MAIR0", 223, 192, "memory attributes 0 to 3"),
    Field("MAIR1", 255, 224, "memory attributes 4 to 7"),
    Field("AMAIR0", 287, 256, "implementation-defined attributes 0 to 3"),
    Field("AMAIR1", 319, 288, "implementation-defined attributes 4 to 7"),
    Field("PARTID", 367, 352, "MPAM partition"),
    Field("PMG", 375, 368, "MPAM performance monitoring group"),
    *(Field(f"PIIU{p}", 3 * p + 386, 3 * p + 384, f"unprivileged indirect permission {p}")
      for p in range(16)),
    *(Field(f"PIIP{p}", 3 * p + 450, 3 * p + 448, f"privileged indirect permission {p}")
      for p in range(16)),
))  # fmt: skip

# --- events (IHI 0070, 7.3) ----------------------------------------------------------------------

_ID = Field("ID", 7, 0, "event number")
_SSV = Field("SSV", 11, 11, "SubstreamID valid")
_SSID = Field("SubstreamID", 31, 12, "substream")
_SID = Field("StreamID", 63, 32, "stream")
_STAG = Field("STAG", 79, 64, "stall tag")
_REASON = Field("Reason", 79, 64, "implementation defined")
_GPCF = Field("GPCF", 80, 80, "granule protection check fault")
_STALL = Field("Stall", 95, 95, "the transaction is stalled")
_PNU = Field("PnU", 97, 97, "privilege", {0: "unprivileged", 1: "privileged"})
_IND = Field("InD", 98, 98, "kind", {0: "data", 1: "instruction"})
_RNW = Field("RnW", 99, 99, "direction", {0: "write", 1: "read"})
_NSIPA = Field("NSIPA", 102, 102, "Secure streams: NS of the IPA")
_S2 = Field("S2", 103, 103, "stage", {0: "stage 1", 1: "stage 2"})
_CLASS = Field("CLASS", 105, 104, "what was being accessed",
               {0: "CD: context descriptor fetch", 1: "TT: translation table walk",
                2: "IN: input address", 3: "reserved"})  # fmt: skip
_TTRNW = Field("TTRnW", 108, 108, "direction of the walk's access", {0: "write", 1: "read"})
_INPUT = Field("InputAddr", 191, 128, "input address, all 64 bits", address=True)
_INPUT_PAGE = Field("InputAddr", 191, 140, "page of the input address", address=True)
_IPA = Field("IPA", 247, 204, "page of the intermediate physical address", address=True)
_FETCH = Field("FetchAddr", 247, 195, "physical address of the failed fetch", address=True)

_ACCESS = (_PNU, _IND, _RNW)
_STREAM = (_SSV, _SSID, _SID)
_FAULT = (*_STREAM, _STAG, _STALL, *_ACCESS, _NSIPA, _S2, _CLASS, _INPUT, _IPA)


def _overlay(field: Field) -> Field:
    return replace(field, overlay=True)


EVENT = Record("EVENT", 32, "event: the fields that most events share", (
    _ID, *_STREAM, _STAG, _overlay(_REASON), _GPCF, _STALL, *_ACCESS, _NSIPA, _S2, _CLASS, _TTRNW,
    _INPUT, _IPA, _overlay(_FETCH),
))  # fmt: skip


def _event(name: str, doc: str, *fields: Field) -> Record:
    ordered = sorted((_ID, *fields), key=lambda f: f.lsb)
    return Record(name, 32, doc, tuple(ordered), {"ID": Event[name].value})


#: One record per event, by number.
EVENTS: dict[int, Record] = {r.fixed["ID"]: r for r in (
    _event("F_UUT", "unsupported upstream transaction",
           *_STREAM, _REASON, *_ACCESS, _INPUT),
    _event("C_BAD_STREAMID", "StreamID out of range", *_STREAM),
    _event("F_STE_FETCH", "fetch of an STE or L1STD aborted",
           *_STREAM, _REASON, _GPCF, _FETCH),
    _event("C_BAD_STE", "STE invalid or illegal", *_STREAM),
    _event("F_BAD_ATS_TREQ", "ATS translation request refused",
           *_STREAM, Field("Span", 67, 64, "requested span"),
           Field("P", 92, 92, "privileged"), Field("X", 93, 93, "execute"),
           Field("W", 94, 94, "write"), Field("R", 95, 95, "read"), _INPUT_PAGE),
    _event("F_STREAM_DISABLED", "stream disabled for this kind of transaction", _SID),
    _event("F_TRANSL_FORBIDDEN", "ATS translated transaction refused", _SID, _RNW, _INPUT),
    _event("C_BAD_SUBSTREAMID", "SubstreamID out of range", _SSID, _SID),
    _event("F_CD_FETCH", "fetch of a CD or L1CD aborted", *_STREAM, _REASON, _GPCF, _FETCH),
    _event("C_BAD_CD", "CD invalid or illegal", *_STREAM),
    _event("F_WALK_EABT", "fetch or update of a translation table descriptor aborted",
           *_STREAM, _REASON, _GPCF, *_ACCESS, _S2, _CLASS, _INPUT, _FETCH),
    _event("F_TRANSLATION", "no translation", *_FAULT),
    _event("F_ADDR_SIZE", "output address too large", *_FAULT),
    _event("F_ACCESS", "access flag clear", *_FAULT),
    _event("F_PERMISSION", "permission missing", *_FAULT, _TTRNW),
    _event("F_TLB_CONFLICT", "several TLB entries match",
           *_STREAM, Field("Reason", 79, 64, "implementation defined", doubt="unchecked"),
           *_ACCESS, _NSIPA, _S2, _INPUT, _IPA),
    _event("F_CFG_CONFLICT", "several cached configurations match",
           *_STREAM, Field("Reason", 95, 64, "implementation defined")),
    _event("E_PAGE_REQUEST", "speculative page request hint",
           *_STREAM, *(Field(name, bit, bit, doc) for name, bit, doc in (
               ("uX", 97, "unprivileged execute"), ("uW", 98, "unprivileged write"),
               ("uR", 99, "unprivileged read"), ("pX", 101, "privileged execute"),
               ("pW", 102, "privileged write"), ("pR", 103, "privileged read"))),
           Field("Span", 115, 108, "pages"), _INPUT_PAGE),
    _event("F_VMS_FETCH", "fetch of a virtual machine structure aborted",
           *_STREAM, _REASON, _GPCF, _FETCH),
)}  # fmt: skip

# --- commands (IHI 0070, 4) ----------------------------------------------------------------------

_OPCODE = Field("Opcode", 7, 0, "command")
_GLOBAL = Field("G", 9, 9, "all substreams")
_SSEC = Field("SSec", 10, 10, "Secure StreamID")
_NUM = Field("NUM", 16, 12, "range: (NUM+1) * 2^SCALE granules")
_SCALE = Field("SCALE", 25, 20, "range: see NUM; bit 25 is RES0 without IDR5.DS, the limit is 39")
_AC = Field("Ac", 12, 12, "retry")
_AB = Field("Ab", 13, 13, "terminate with", {0: "read as zero, write ignored", 1: "abort"})
_CS = Field("CS", 13, 12, "completion signal",
            {0: "NONE", 1: "IRQ", 2: "SEV", 3: "reserved: CERROR_ILL"})  # fmt: skip
_MSH = Field("MSH", 23, 22, "shareability of the MSI", _SH)
_MSIATTR = Field("MSIAttr", 27, 24, "memory type of the MSI", _STAGE2_MEMATTR)
_MSIDATA = Field("MSIData", 63, 32, "data of the MSI")
_MSIADDRESS = Field("MSIAddress", 119, 66, "address of the MSI", address=True)
_VMID = Field("VMID", 47, 32, "virtual machine identifier")
_ASID = Field("ASID", 63, 48, "address space identifier")
_LEAF = Field("Leaf", 64, 64, "last level only")
_RANGE = Field("Range", 68, 64, "2^(Range+1) StreamIDs; 31: all")
_PREFETCH_SIZE = Field("Size", 68, 64, "2^Size addresses")
_STRIDE = Field("Stride", 73, 69, "2^(12+Stride) bytes apart", doubt="unchecked")
_ATC_SIZE = Field("Size", 69, 64, "4096 * 2^Size bytes; 52: all")
_TTL128 = Field("TTL128", 71, 71, "level hint is for 128-bit descriptors")
_TTL = Field("TTL", 73, 72, "level hint", {0: "ANY", 1: "LEVEL_1", 2: "LEVEL_2", 3: "LEVEL_3"})
_TG = Field("TG", 75, 74, "granule of a range", {0: "NONE: no range", 1: "4K", 2: "16K", 3: "64K"})
_ADDRESS = Field("Address", 127, 76, "address", address=True)
_CMD_IPA = Field("IPA", 119, 76, "intermediate physical address", address=True)
_PRGINDEX = Field("PRGIndex", 72, 64, "page request group")
_RESP = Field("Resp", 77, 76, "response",
              {0: "FAILURE", 1: "INVALID_REQUEST", 2: "SUCCESS", 3: "reserved"})  # fmt: skip

_TLBI_RANGE = (_NUM, _SCALE, _TTL128, _TTL, _TG)

CMD = Record("CMD", 16, "command: the fields of all, many of which share bits", (
    _OPCODE, _GLOBAL, _SSEC, _SSV,
    _SSID, *map(_overlay, (_NUM, _SCALE, _AC, _AB, _CS, _MSH, _MSIATTR)),
    _SID, *map(_overlay, (_MSIDATA, _VMID, _ASID)),
    *map(_overlay, (
        _LEAF, _RANGE, _ATC_SIZE,
        Field("PrefetchSize", 68, 64, _PREFETCH_SIZE.doc), _STRIDE,
        _PRGINDEX, _STAG, _TTL128, _TTL, _TG, _RESP, _MSIADDRESS, _CMD_IPA)),
    _ADDRESS,
))  # fmt: skip


def _command(name: str, doc: str, *fields: Field, **fixed: int) -> Record:
    ordered = sorted((_OPCODE, *fields), key=lambda f: f.lsb)
    return Record(name, 16, doc, tuple(ordered), {"Opcode": Opcode[name].value, **fixed})


#: One record per command, by name. CFGI_STE_RANGE and CFGI_ALL have one opcode.
COMMANDS: dict[str, Record] = {r.name: r for r in (
    _command("PREFETCH_CONFIG", "fill the configuration cache", _SSEC, *_STREAM),
    _command("PREFETCH_ADDR", "fill the TLB",
             _SSEC, *_STREAM, _PREFETCH_SIZE, _STRIDE, _ADDRESS),
    _command("CFGI_STE", "invalidate one STE", _SSEC, _SID, _LEAF),
    _command("CFGI_STE_RANGE", "invalidate a range of STEs", _SSEC, _SID, _RANGE),
    _command("CFGI_ALL", "invalidate all configuration", _SSEC, _SID, _RANGE, Range=31),
    _command("CFGI_CD", "invalidate one CD", _SSEC, _SSID, _SID, _LEAF),
    _command("CFGI_CD_ALL", "invalidate all CDs of a stream", _SSEC, _SID),
    _command("CFGI_VMS_PIDM", "invalidate MPAM maps",
             _SSEC, Field("VMID", 47, 32, _VMID.doc, doubt="unchecked")),
    _command("TLBI_NH_ALL", "NS-EL1, stage 1, by VMID", _VMID),
    _command("TLBI_NH_ASID", "NS-EL1, stage 1, by ASID", _VMID, _ASID),
    _command("TLBI_NH_VA", "NS-EL1, stage 1, by address and ASID",
             _VMID, _ASID, _LEAF, *_TLBI_RANGE, _ADDRESS),
    _command("TLBI_NH_VAA", "NS-EL1, stage 1, by address",
             _VMID, _LEAF, *_TLBI_RANGE, _ADDRESS),
    _command("TLBI_EL3_ALL", "EL3"),
    _command("TLBI_EL3_VA", "EL3, by address", _LEAF, *_TLBI_RANGE, _ADDRESS),
    _command("TLBI_EL2_ALL", "EL2"),
    _command("TLBI_EL2_ASID", "EL2, by ASID", _ASID),
    _command("TLBI_EL2_VA", "EL2, by address and ASID",
             _ASID, _LEAF, *_TLBI_RANGE, _ADDRESS),
    _command("TLBI_EL2_VAA", "EL2, by address", _LEAF, *_TLBI_RANGE, _ADDRESS),
    _command("TLBI_S12_VMALL", "NS-EL1, both stages, by VMID", _VMID),
    _command("TLBI_S2_IPA", "stage 2, by IPA", _VMID, _LEAF, *_TLBI_RANGE, _CMD_IPA),
    _command("TLBI_NSNH_ALL", "all Non-secure entries but EL2"),
    _command("ATC_INV", "invalidate a device's translation cache",
             _GLOBAL, *_STREAM, _ATC_SIZE, _ADDRESS),
    _command("PRI_RESP", "answer a page request group", *_STREAM, _PRGINDEX, _RESP),
    _command("RESUME", "retry or terminate a stalled transaction",
             _SSEC, _AC, _AB, _SID, _STAG),
    _command("STALL_TERM", "terminate all stalled transactions of a stream", _SSEC, _SID),
    _command("SYNC", "wait for the commands before",
             _CS, _MSH, _MSIATTR, _MSIDATA, _MSIADDRESS),
    _command("TLBI_S_EL2_ALL", "Secure EL2"),
    _command("TLBI_S_EL2_ASID", "Secure EL2, by ASID", _ASID),
    _command("TLBI_S_EL2_VA", "Secure EL2, by address and ASID",
             _ASID, _LEAF, *_TLBI_RANGE, _ADDRESS),
    _command("TLBI_S_EL2_VAA", "Secure EL2, by address", _LEAF, *_TLBI_RANGE, _ADDRESS),
    _command("TLBI_S_S12_VMALL", "Secure EL1, both stages, by VMID", _VMID),
    _command("TLBI_S_S2_IPA", "Secure stage 2, by IPA",
             _VMID, _LEAF, *_TLBI_RANGE, _CMD_IPA),
    _command("TLBI_SNH_ALL", "all Secure entries but EL3 and Secure EL2"),
    _command("DPTI_ALL", "device permission table"),
    _command("DPTI_PA", "device permission table, by address",
             _LEAF, Field("Size", 75, 72, "size code"),
             Field("Address", 119, 76, "physical address", address=True)),
)}  # fmt: skip

# --- page requests (IHI 0070, 8.1) ---------------------------------------------------------------

PRI = Record("PRI", 16, "page request", (
    Field("StreamID", 31, 0, "stream"),
    Field("SubstreamID", 51, 32, "substream"),
    *(Field(name, bit, bit, doc, doubt="one source") for name, bit, doc in (
        ("Priv", 58, "privileged"), ("X", 59, "execute"), ("R", 60, "read"), ("W", 61, "write"),
        ("Last", 62, "last of its group"), ("SSV", 63, "SubstreamID valid"))),
    Field("PRGIndex", 72, 64, "page request group"),
    Field("Address", 127, 76, "page", address=True),
))  # fmt: skip

# --- translation table descriptors (DDI 0487, D8.3) ----------------------------------------------

_VALID = Field("Valid", 0, 0, "valid")
_PTE_ADDRESSES = tuple(
    Field(name, msb, lsb, doc, address=address, overlay=True)
    for name, msb, lsb, address, doc in (
        ("Addr_4K", 47, 12, True, "output or next table, 4K granule"),
        ("Addr_16K", 47, 14, True, "output or next table, 16K granule"),
        ("Addr_64K", 47, 16, True, "output or next table, 64K granule, bits 47 to 16"),
        ("Addr_4K_DS", 49, 12, True, "output or next table, 4K granule and DS, bits 49 to 12"),
        ("Addr_16K_DS", 49, 14, True, "output or next table, 16K granule and DS, bits 49 to 14"),
        ("Addr51_48", 15, 12, False, "64K granule: bits 51 to 48 of the address"),
        ("Addr51_50", 9, 8, False, "4K or 16K granule and DS: bits 51 to 50 of the address"),
    )
)
_TYPE = Field("Type", 1, 1, "level 3: page; above: table", {0: "block", 1: "table or page"})

PTE_S1 = Record("PTE_S1", 8, "stage-1 block or page descriptor", (
    _VALID, _TYPE,
    Field("AttrIndx", 4, 2, "index of the MAIR attribute"),
    Field("NS", 5, 5, "Secure: output is Non-secure"),
    Field("AP", 7, 6, "AP[2:1]",
          {0: "PRIV_RW", 1: "RW", 2: "PRIV_RO", 3: "RO"}),
    Field("AP1", 6, 6, "unprivileged access", overlay=True),
    Field("AP2", 7, 7, "read-only", overlay=True),
    Field("SH", 9, 8, "shareability", _SH),
    Field("AF", 10, 10, "access flag"),
    Field("nG", 11, 11, "not global"),
    Field("nT", 16, 16, "block: not to be cached", overlay=True),
    Field("GP", 50, 50, "guarded page"),
    Field("DBM", 51, 51, "dirty bit modifier"),
    Field("Contiguous", 52, 52, "one of a group of like entries"),
    Field("PXN", 53, 53, "privileged execute-never"),
    Field("UXN", 54, 54, "unprivileged execute-never; EL2: execute-never"),
    Field("Software", 58, 55, "for software"),
    Field("PBHA", 62, 59, "page-based hardware attributes"),
    Field("AttrIndx3", 59, 59, "fourth bit of the index, with AIE", overlay=True),
    *_PTE_ADDRESSES,
))  # fmt: skip

PTE_S1_TABLE = Record("PTE_S1_TABLE", 8, "stage-1 table descriptor", (
    _VALID, _TYPE,
    Field("AF", 10, 10, "access flag, with HAFT"),
    Field("PXNTable", 59, 59, "privileged execute-never below"),
    Field("UXNTable", 60, 60, "unprivileged execute-never below; EL2: execute-never"),
    Field("APTable", 62, 61, "APTable[1:0]"),
    Field("APTable0", 61, 61, "no unprivileged access below", overlay=True),
    Field("APTable1", 62, 62, "no write below", overlay=True),
    Field("NSTable", 63, 63, "Secure: Non-secure below"),
    *_PTE_ADDRESSES,
))  # fmt: skip

PTE_S2 = Record("PTE_S2", 8, "stage-2 block or page descriptor", (
    _VALID, _TYPE,
    Field("MemAttr", 5, 2, "memory type, without FWB", _STAGE2_MEMATTR),
    Field("S2AP", 7, 6, "access",
          {0: "NONE", 1: "RO", 2: "WO", 3: "RW"}),
    Field("S2AP0", 6, 6, "read", overlay=True),
    Field("S2AP1", 7, 7, "write", overlay=True),
    Field("SH", 9, 8, "shareability", _SH),
    Field("AF", 10, 10, "access flag"),
    Field("FnXS", 11, 11, "XS attribute"),
    Field("nT", 16, 16, "block: not to be cached", overlay=True),
    Field("DBM", 51, 51, "dirty bit modifier"),
    Field("Contiguous", 52, 52, "one of a group of like entries"),
    Field("XN", 54, 53, "execute-never",
          {0: "X", 1: "UNPRIV_X: with XNX", 2: "NO_X", 3: "PRIV_X: with XNX; else none"}),
    Field("XN0", 53, 53, "XN[0], with XNX", overlay=True),
    Field("XN1", 54, 54, "XN[1]", overlay=True),
    Field("Software", 58, 55, "for software"),
    Field("PBHA", 62, 59, "page-based hardware attributes"),
    *_PTE_ADDRESSES,
))  # fmt: skip

PTE_S2_TABLE = Record("PTE_S2_TABLE", 8, "stage-2 table descriptor", (
    _VALID, _TYPE,
    Field("AF", 10, 10, "access flag, with HAFT"),
    Field("Software", 58, 55, "for software"),
    *_PTE_ADDRESSES,
))  # fmt: skip

# --- registers (IHI 0070, 6.3) -------------------------------------------------------------------


def _register(offset: int, name: str, doc: str, *fields: Field, size: int = 4) -> Record:
    return Record(name, size, doc, fields, {}, offset)


_CR0 = (
    Field("SMMUEN", 0, 0, "transactions are translated; 0: GBPA applies"),
    Field("PRIQEN", 1, 1, "page request queue enabled"),
    Field("EVENTQEN", 2, 2, "event queue enabled"),
    Field("CMDQEN", 3, 3, "command queue enabled"),
    Field("ATSCHK", 4, 4, "ATS translated transactions are checked"),
    Field("VMW", 8, 6, "VMID wildcard: low bits that do not count, 0 to 4"),
    Field("DPT_WALK_EN", 10, 10, "device permission table walks enabled"),
)
_IRQ_CTRL = (
    Field("GERROR_IRQEN", 0, 0, "interrupts of global errors"),
    Field("PRIQ_IRQEN", 1, 1, "interrupts of the page request queue"),
    Field("EVENTQ_IRQEN", 2, 2, "interrupts of the event queue"),
)
_GERROR = (
    Field("CMDQ_ERR", 0, 0, "command error, see CMDQ_CONS.ERR"),
    Field("EVENTQ_ABT_ERR", 2, 2, "event queue write aborted"),
    Field("PRIQ_ABT_ERR", 3, 3, "page request queue write aborted"),
    Field("MSI_CMDQ_ABT_ERR", 4, 4, "MSI of the command queue aborted"),
    Field("MSI_EVENTQ_ABT_ERR", 5, 5, "MSI of the event queue aborted"),
    Field("MSI_PRIQ_ABT_ERR", 6, 6, "MSI of the page request queue aborted"),
    Field("MSI_GERROR_ABT_ERR", 7, 7, "MSI of global errors aborted"),
    Field("SFM_ERR", 8, 8, "service failure mode entered"),
    Field("CMDQP_ERR", 9, 9, "enhanced command queue error"),
    Field("DPT_ERR", 10, 10, "device permission table error"),
)
_QUEUE_LOG2SIZE = Field("LOG2SIZE", 4, 0, "the queue has 2^LOG2SIZE entries")
_QUEUE_ADDR = Field("ADDR", 55, 5, "address of the queue", address=True)
_MSI_ADDR = Field("ADDR", 55, 2, "address of the MSI; 0: none", address=True)
_MSI_DATA = Field("DATA", 31, 0, "data of the MSI")
_MSI_TYPE = (Field("MemAttr", 3, 0, "memory type of the MSI", _STAGE2_MEMATTR),
             Field("SH", 5, 4, "shareability of the MSI", _SH))  # fmt: skip
_WR = Field("WR", 19, 0, "write index and wrap bit")
_RD = Field("RD", 19, 0, "read index and wrap bit")
_OVFLG = Field("OVFLG", 31, 31, "overflow")
_OVACKFLG = Field("OVACKFLG", 31, 31, "overflow acknowledged")

#: One record per register, by name.
REGISTERS: dict[str, Record] = {r.name: r for r in (
    _register(0x000, "IDR0", "features",
              Field("S2P", 0, 0, "stage 2"),
              Field("S1P", 1, 1, "stage 1"),
              Field("TTF", 3, 2, "table formats",
                    {0: "reserved", 1: "VMSAv8-32 LPAE", 2: "VMSAv8-64", 3: "both"}),
              Field("COHACC", 4, 4, "coherent access to tables and queues"),
              Field("BTM", 5, 5, "broadcast TLB maintenance"),
              Field("HTTU", 7, 6, "table updates by hardware",
                    {0: "none", 1: "access flag", 2: "access flag and dirty state",
                     3: "access flag, also of tables, and dirty state"}),
              Field("DORMHINT", 8, 8, "dormant hint"),
              Field("HYP", 9, 9, "EL2 streams"),
              Field("ATS", 10, 10, "PCIe address translation service"),
              Field("NS1ATS", 11, 11, "no split-stage ATS"),
              Field("ASID16", 12, 12, "16-bit ASIDs"),
              Field("MSI", 13, 13, "message-signalled interrupts"),
              Field("SEV", 14, 14, "wake-up events"),
              Field("ATOS", 15, 15, "address translation operations"),
              Field("PRI", 16, 16, "page request interface"),
              Field("VMW", 17, 17, "VMID wildcard, CR0.VMW"),
              Field("VMID16", 18, 18, "16-bit VMIDs"),
              Field("CD2L", 19, 19, "two-level CD tables"),
              Field("VATOS", 20, 20, "virtual address translation operations"),
              Field("TTENDIAN", 22, 21, "endianness of tables",
                    {0: "both", 1: "reserved", 2: "little-endian", 3: "big-endian"}),
              Field("ATSRECERR", 23, 23, "errors of ATS requests can be recorded"),
              Field("STALL_MODEL", 25, 24, "stalls",
                    {0: "stall and terminate", 1: "terminate only", 2: "stall forced",
                     3: "reserved"}),
              Field("TERM_MODEL", 26, 26, "terminated transactions always abort"),
              Field("ST_LEVEL", 28, 27, "stream table",
                    {0: "linear", 1: "linear and two-level", 2: "reserved", 3: "reserved"}),
              Field("RME_IMPL", 30, 30, "Realm management extension")),
    _register(0x004, "IDR1", "sizes",
              Field("SIDSIZE", 5, 0, "bits of StreamID, at most 32"),
              Field("SSIDSIZE", 10, 6, "bits of SubstreamID, at most 20"),
              Field("PRIQS", 15, 11, "largest LOG2SIZE of the page request queue, at most 19"),
              Field("EVENTQS", 20, 16, "largest LOG2SIZE of the event queue, at most 19"),
              Field("CMDQS", 25, 21, "largest LOG2SIZE of the command queue, at most 19"),
              Field("ATTR_PERMS_OVR", 26, 26, "INSTCFG, PRIVCFG and NSCFG have effect"),
              Field("ATTR_TYPES_OVR", 27, 27, "MTCFG, MemAttr, ALLOCCFG and SHCFG have effect"),
              Field("REL", 28, 28, "preset addresses are relative"),
              Field("QUEUES_PRESET", 29, 29, "queue addresses are preset"),
              Field("TABLES_PRESET", 30, 30, "table addresses are preset"),
              Field("ECMDQ", 31, 31, "enhanced command queues")),
    _register(0x008, "IDR2", "VATOS", Field("BA_VATOS", 9, 0, "page of the VATOS registers")),
    _register(0x00C, "IDR3", "features",
              Field("HAD", 2, 2, "hierarchical attributes can be disabled"),
              Field("PBHA", 3, 3, "page-based hardware attributes"),
              Field("XNX", 4, 4, "stage-2 execute-never by privilege"),
              Field("PPS", 5, 5, "automatic page responses always carry the PASID"),
              Field("MPAM", 7, 7, "memory partitioning and monitoring"),
              Field("FWB", 8, 8, "stage 2 can force write-back"),
              Field("STT", 9, 9, "small translation tables"),
              Field("RIL", 10, 10, "range invalidation and level hints"),
              Field("BBML", 12, 11, "break-before-make level",
                    {0: "level 0", 1: "level 1", 2: "level 2", 3: "reserved"}),
              Field("E0PD", 13, 13, "CD.E0PD"),
              Field("PTWNNC", 14, 14, "stage-1 walks to stage-2 Device memory are Normal-NC"),
              Field("DPT", 15, 15, "device permission table"),
              Field("PASIDTT", 16, 16, "ATS translated transactions carry a PASID"),
              Field("EPAN", 17, 17, "CD.EPAN"),
              Field("S1PI", 18, 18, "stage-1 indirect permissions"),
              Field("S2PI", 19, 19, "stage-2 indirect permissions"),
              Field("S2PO", 20, 20, "stage-2 permission overlays"),
              Field("THE", 21, 21, "translation hardening"),
              Field("MTEPERM", 22, 22, "stage-2 memory tagging permission"),
              Field("AIE", 23, 23, "attribute index extension")),
    _register(0x014, "IDR5", "address sizes",
              Field("OAS", 2, 0, "output address size", _PS),
              Field("GRAN4K", 4, 4, "4K granule"),
              Field("GRAN16K", 5, 5, "16K granule"),
              Field("GRAN64K", 6, 6, "64K granule"),
              Field("DS", 7, 7, "52-bit format of 4K and 16K descriptors"),
              Field("D128", 8, 8, "128-bit descriptors"),
              Field("VAX", 11, 10, "virtual address size",
                    {0: "48 bits", 1: "52 bits", 2: "56 bits", 3: "reserved"}),
              Field("STALL_MAX", 31, 16, "largest number of stalled transactions")),
    _register(0x018, "IIDR", "implementer",
              Field("Implementer", 11, 0, "JEP106 code"), Field("Revision", 15, 12, "minor"),
              Field("Variant", 19, 16, "major"), Field("ProductID", 31, 20, "product")),
    _register(0x01C, "AIDR", "architecture version",
              Field("ARCH_MINOR", 3, 0, "SMMUv3.n"), Field("ARCH_MAJOR", 7, 4, "0: SMMUv3")),
    _register(0x020, "CR0", "enables", *_CR0),
    _register(0x024, "CR0ACK", "enables in effect", *_CR0),
    _register(0x028, "CR1", "attributes of queue and table accesses",
              Field("QUEUE_IC", 1, 0, "inner cacheability", _QUEUE_CACHE),
              Field("QUEUE_OC", 3, 2, "outer cacheability", _QUEUE_CACHE),
              Field("QUEUE_SH", 5, 4, "shareability", _SH),
              Field("TABLE_IC", 7, 6, "inner cacheability", _QUEUE_CACHE),
              Field("TABLE_OC", 9, 8, "outer cacheability", _QUEUE_CACHE),
              Field("TABLE_SH", 11, 10, "shareability", _SH)),
    _register(0x02C, "CR2", "controls",
              Field("E2H", 0, 0, "EL2 streams are EL2-E2H"),
              Field("RECINVSID", 1, 1, "record C_BAD_STREAMID"),
              Field("PTM", 2, 2, "ignore broadcast TLB maintenance"),
              Field("REC_CFG_ATS", 3, 3, "record configuration errors of ATS requests")),
    _register(0x030, "S2PII", "stage-2 base permissions", *(
        Field(f"S2PII{p}", 4 * p + 3, 4 * p, f"permission of index {p}") for p in range(16)),
        size=8),
    _register(0x040, "STATUSR", "status", Field("DORMANT", 0, 0, "nothing is cached")),
    _register(0x044, "GBPA", "transactions while the SMMU is disabled",
              Field("MemAttr", 3, 0, "memory type when MTCFG=1", _MEMATTR),
              Field("MTCFG", 4, 4, "memory type", {0: "incoming", 1: "MemAttr"}),
              Field("ALLOCCFG", 11, 8,
                    "allocation hints: 0xxx incoming, 1RWT read, write, transient"),
              Field("SHCFG", 13, 12, "shareability", _SH_OVERRIDE),
              Field("PRIVCFG", 17, 16, "privilege", _PRIVCFG),
              Field("INSTCFG", 19, 18, "data or instruction, of reads", _INSTCFG),
              Field("ABORT", 20, 20, "abort them all"),
              Field("Update", 31, 31, "write pending")),
    _register(0x050, "IRQ_CTRL", "interrupt enables", *_IRQ_CTRL),
    _register(0x054, "IRQ_CTRLACK", "interrupt enables in effect", *_IRQ_CTRL),
    _register(0x060, "GERROR", "global errors", *_GERROR),
    _register(0x064, "GERRORN", "global errors acknowledged", *_GERROR),
    _register(0x068, "GERROR_IRQ_CFG0", "MSI of errors", _MSI_ADDR, size=8),
    _register(0x070, "GERROR_IRQ_CFG1", "MSI of errors", _MSI_DATA),
    _register(0x074, "GERROR_IRQ_CFG2", "MSI of errors", *_MSI_TYPE),
    _register(0x080, "STRTAB_BASE", "stream table",
              Field("ADDR", 55, 6, "address of the stream table", address=True),
              Field("RA", 62, 62, "read allocate"), size=8),
    _register(0x088, "STRTAB_BASE_CFG", "stream table",
              Field("LOG2SIZE", 5, 0, "2^LOG2SIZE StreamIDs are covered"),
              Field("SPLIT", 10, 6, "level-2 tables resolve SPLIT bits",
                    {6: "4K leaves", 8: "16K leaves", 10: "64K leaves"}),
              Field("FMT", 17, 16, "format",
                    {0: "LINEAR", 1: "TWO_LEVEL", 2: "reserved", 3: "reserved"})),
    _register(0x090, "CMDQ_BASE", "command queue", _QUEUE_LOG2SIZE, _QUEUE_ADDR,
              Field("RA", 62, 62, "read allocate"), size=8),
    _register(0x098, "CMDQ_PROD", "command queue", _WR),
    _register(0x09C, "CMDQ_CONS", "command queue", _RD,
              Field("ERR", 30, 24, "why commands stopped",
                    {0: "NONE", 1: "ILL: illegal command", 2: "ABT: fetch aborted",
                     3: "ATC_INV_SYNC: ATC_INV failed before this SYNC"})),
    _register(0x0A0, "EVENTQ_BASE", "event queue", _QUEUE_LOG2SIZE, _QUEUE_ADDR,
              Field("WA", 62, 62, "write allocate"), size=8),
    _register(0x0B0, "EVENTQ_IRQ_CFG0", "MSI of events", _MSI_ADDR, size=8),
    _register(0x0B8, "EVENTQ_IRQ_CFG1", "MSI of events", _MSI_DATA),
    _register(0x0BC, "EVENTQ_IRQ_CFG2", "MSI of events", *_MSI_TYPE),
    _register(0x0C0, "PRIQ_BASE", "page request queue", _QUEUE_LOG2SIZE, _QUEUE_ADDR,
              Field("WA", 62, 62, "write allocate"), size=8),
    _register(0x0D0, "PRIQ_IRQ_CFG0", "MSI of page requests", _MSI_ADDR, size=8),
    _register(0x0D8, "PRIQ_IRQ_CFG1", "MSI of page requests", _MSI_DATA),
    _register(0x0DC, "PRIQ_IRQ_CFG2", "MSI of page requests", *_MSI_TYPE,
              Field("LO", 31, 31, "for the last of a group only")),
    _register(0x190, "IDR6", "enhanced command queues",
              Field("LOG2NUMQ", 19, 16, "2^LOG2NUMQ queues a page"),
              Field("LOG2NUMP", 27, 24, "2^LOG2NUMP pages")),
    _register(0x100A8, "EVENTQ_PROD", "event queue", _WR, _OVFLG),
    _register(0x100AC, "EVENTQ_CONS", "event queue", _RD, _OVACKFLG),
    _register(0x100C8, "PRIQ_PROD", "page request queue", _WR, _OVFLG),
    _register(0x100CC, "PRIQ_CONS", "page request queue", _RD, _OVACKFLG),
)}  # fmt: skip

#: Every record by name: structures, descriptors, EVENT and CMD, each event and command, registers.
RECORDS: dict[str, Record] = {
    **{r.name: r for r in (L1STD, STE, L1CD, CD, EVENT, CMD, PRI,
                           PTE_S1, PTE_S1_TABLE, PTE_S2, PTE_S2_TABLE)},
    **{r.name: r for r in EVENTS.values()},
    **COMMANDS,
    **REGISTERS,
}  # fmt: skip
_RECORDS_UPPER = {name.upper(): r for name, r in RECORDS.items()}

# --- functions on one record ---------------------------------------------------------------------


def record(name: str | Record) -> Record:
    """Return the record of that name, in any case; a Record is returned as it is.

    Raises
    ------
    ValueError
        If there is none.
    """
    if isinstance(name, Record):
        return name
    found = RECORDS.get(name) or _RECORDS_UPPER.get(name.upper())
    if found is None:
        raise ValueError(_must_be("record", "a name of layout.RECORDS", name))
    return found


def event_record(event: int | str) -> Record:
    """Return the record of an event, given its number or its name.

    >>> event_record(0x10), event_record("C_BAD_STE").fixed
    (<Record F_TRANSLATION: 32 bytes, 14 fields>, {'ID': 4})

    Raises
    ------
    ValueError
        If there is none.
    """
    found = EVENTS.get(_number(event, Event, "event"))
    if found is None:
        raise ValueError(_must_be("event", "the number or name of one", event))
    return found


def command_record(command: int | str) -> Record:
    """Return the record of a command, given its opcode or its name.

    Opcode 0x04 is CFGI_STE_RANGE; CFGI_ALL is found by name.

    >>> command_record(0x46), command_record("CFGI_ALL").fixed
    (<Record SYNC: 16 bytes, 6 fields>, {'Opcode': 4, 'Range': 31})

    Raises
    ------
    ValueError
        If there is none.
    """
    if isinstance(command, str):
        known = COMMANDS.get(command) or COMMANDS.get(command.upper())
        if known is not None:
            return known
    number = _number(command, Opcode, "command")
    for found in COMMANDS.values():
        if found.fixed["Opcode"] == number:
            return found
    raise ValueError(_must_be("command", "the opcode or name of one", number))


def _number(key: int | str, names: type[enum.IntEnum], what: str) -> int:
    if not isinstance(key, str):
        return key
    try:
        return names[key.upper()]
    except KeyError:
        allowed = f"the {'opcode' if names is Opcode else 'number'} or name of one"
        raise ValueError(_must_be(what, allowed, key)) from None


def _check(rec: Record, field: Field, value: int) -> None:
    """Raise a ValueError unless the field can hold the value."""
    if field.address:
        if not value & ~field.mask:
            return
        allowed = f"0 to {field.mask:#x} in steps of {1 << field.lsb % 64:#x}"
    else:
        if 0 <= value < 1 << field.width:
            return
        allowed = f"0 to {(1 << field.width) - 1:#x}"
    raise ValueError(_must_be(f"{rec.name}.{field.name}", allowed, value))


def _must_be(name: str, allowed: str, value: object) -> str:
    """Return the message for an argument; imported late, for the package may not be built yet."""
    from smmufast._arguments import must_be

    return must_be(name, allowed, value)


def pack(rec: str | Record, /, **fields: int) -> int:
    """Return a record as an integer; fields that are not given are zero.

    Fields that make the record what it is (the opcode of a command, the number of an event) are
    filled in. Of two fields that share bits, one must be zero there or both must agree.

    >>> hex(pack("STE", V=1, Config=0b101, S1ContextPtr=0x8000_1000))
    '0x8000100b'
    >>> hex(pack("CFGI_STE", StreamID=0x42, Leaf=1))
    '0x10000004200000003'

    Raises
    ------
    ValueError
        If there is no such field, a value does not fit, or two values meet in the same bits.
    """
    rec = record(rec)
    names = tuple(fields)
    try:
        way = rec._ways[names]
    except KeyError:
        way = _way(rec, names)
        if len(rec._ways) >= _MOST_WAYS:
            rec._ways.clear()
        rec._ways[names] = way
    if way is not None:
        result, moves = way
        for value, (allowed, shift) in zip(fields.values(), moves, strict=True):
            if value.__class__ is not int or value | allowed != allowed:
                break
            result |= value << shift
        else:
            return result
    return _pack_checked(rec, fields)


_MOST_WAYS = 64  # that a record keeps


def _way(rec: Record, names: tuple[str, ...]) -> _Way:
    """How fields of these names are packed; None if some share bits or are fixed."""
    result = filled = 0
    for name, value in rec.fixed.items():
        f = rec.field(name)
        result |= (value << f.shift) << 64 * f.dword
        filled |= f.absolute
    moves = []
    for name in names:
        f = rec.field(name)
        if f.absolute & filled:
            return None
        filled |= f.absolute
        moves.append((f.mask >> f.shift, f.shift + 64 * f.dword))
    return result, tuple(moves)


def _pack_checked(rec: Record, fields: Mapping[str, Any]) -> int:
    """Pack field by field, and say what is wrong."""
    result = filled = 0
    used: list[tuple[Field, int]] = []
    fixed = {name.lower() for name in rec.fixed} if rec.fixed else ()
    for name, value in (*rec.fixed.items(), *fields.items()):
        f = rec.field(name)
        value = operator.index(value)
        if f.name.lower() in fixed and value != rec.fixed[f.name]:
            allowed = f"{rec.fixed[f.name]:#x}"
            raise ValueError(_must_be(f"{rec.name}.{f.name}", allowed, value))
        _check(rec, f, value)
        bits = (value << f.shift) << 64 * f.dword
        for other, before in used if f.absolute & filled else ():
            shared = f.absolute & other.absolute
            if bits & shared and before & shared and (bits ^ before) & shared:
                raise ValueError(f"{rec.name}.{f.name} and {rec.name}.{other.name} share bits")
        used.append((f, bits))
        filled |= f.absolute
        result |= bits
    return result


def mask(rec: str | Record, *names: str) -> int:
    """Return the bits of some fields of a record as one integer.

    >>> hex(mask("CR0", "SMMUEN", "CMDQEN"))
    '0x9'

    Raises
    ------
    ValueError
        If there is no such record or field.
    """
    rec = record(rec)
    return functools.reduce(operator.or_, (rec.field(name).absolute for name in names), 0)


def _extract(field: Field, word: int) -> int:
    return (word >> 64 * field.dword & field.mask) >> field.shift


def _as_int(rec: Record, data: Any) -> int:
    try:
        word = operator.index(data)
    except TypeError:
        return from_bytes(rec, data)
    if not 0 <= word < 1 << 8 * rec.bytes:
        allowed = f"a number of {rec.bytes} bytes, as {rec.name} is"
        raise ValueError(_must_be("data", allowed, word))
    return word


def unpack(rec: str | Record, data: Any) -> dict[str, int]:
    """Return every field of a record, given its bytes in memory order or its integer.

    >>> unpack("L1STD", 0x8_0004_0009)
    {'Span': 9, 'L2Ptr': 34360000512}

    Raises
    ------
    ValueError
        If the size is wrong, or a fixed field (an opcode, an event number) is that of another
        record.
    """
    rec = record(rec)
    word = _as_int(rec, data)
    values = {f.name: _extract(f, word) for f in rec.fields}
    for name, value in rec.fixed.items():
        if values[name] != value:
            raise ValueError(_must_be(f"{rec.name}.{name}", f"{value:#x}", values[name]))
    return values


def to_bytes(rec: str | Record, word: int) -> bytes:
    """Return a record as bytes in memory order, that is little-endian.

    Raises
    ------
    ValueError
        If the integer does not fit.
    """
    rec = record(rec)
    return _as_int(rec, operator.index(word)).to_bytes(rec.bytes, "little")


def from_bytes(rec: str | Record, data: Any) -> int:
    """Return a record as an integer, given its bytes in memory order (any buffer).

    Raises
    ------
    ValueError
        If the size is wrong.
    """
    rec = record(rec)
    raw = memoryview(data).tobytes()
    if len(raw) != rec.bytes:
        raise ValueError(_must_be("data", f"{rec.bytes} bytes, as {rec.name} is", len(raw)))
    return int.from_bytes(raw, "little")


def format(rec: str | Record, data: Any, *, zeros: bool = False) -> str:
    """Return a record as text, one field a line: bits, value, meaning.

    An EVENT or a CMD is shown as the event or command that its number says. Fields that are zero
    are left out, except V and RnW, unless `zeros` is true. ``(alternative)`` marks a field that
    shares bits with another, ``(one source)`` and ``(unchecked)`` a doubtful position. Bits set
    outside every field are shown last.

    >>> print(format("L1CD", 0xB000_0001))
    L1CD: level-1 context descriptor
      V      [0]      1           valid
      L2Ptr  [55:12]  0xb0000000  address of the table of CDs

    Raises
    ------
    ValueError
        If the size is wrong.
    """
    rec = record(rec)
    word = _as_int(rec, data)
    rec = _particular(rec, word)
    rows = []
    rest = word
    for f in rec.fields:
        value = _extract(f, word)
        rest &= ~f.absolute
        if not (value or zeros or f.name in ("V", "RnW")):
            continue
        meaning = f.doc
        if name := f.name_of(value):
            meaning += ": " + name.replace(": ", ", ")
        marks = ["alternative"] * f.overlay + [f.doubt] * bool(f.doubt)
        meaning += "".join(f" ({mark})" for mark in marks)
        rows.append((f.name, f.bits, hex(value) if value > 9 else str(value), meaning))
    if rest:
        rows.append(("-", "", hex(rest), "bits outside every field"))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    lines = [f"{rec.name}: {rec.doc}"]
    for row in rows:
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        lines.append(f"  {cells}  {row[3]}".rstrip())
    return "\n".join(lines)


def _particular(rec: Record, word: int) -> Record:
    """Return the event or command that a generic record is, if it is one."""
    if rec is EVENT:
        return EVENTS.get(word & 0xFF, rec)
    if rec is CMD:
        for found in COMMANDS.values():
            if found.fixed["Opcode"] == word & 0xFF:
                return found
    return rec


# --- functions on arrays of records --------------------------------------------------------------


def dtype(rec: str | Record) -> "np.dtype[Any]":
    """Return the numpy dtype of a record in memory: ``[("dwords", "<u8", (n,))]``.

    All records of one size have the same dtype, so an event queue is one array whatever the
    events are. `get` and `set` name the bit fields, which no dtype can.

    Raises
    ------
    ValueError
        For a 32-bit register.
    """
    import numpy as np

    rec = record(rec)
    if rec.bytes % 8:
        raise ValueError(f"{rec.name} is a 32-bit register; arrays are of whole dwords")
    return np.dtype([("dwords", "<u8", (rec.dwords,))])


def _dwords(rec: Record, array: Any) -> "NDArray[np.uint64]":
    """Return the dwords of an array of records, on a last axis; never a copy."""
    import numpy as np

    if not isinstance(array, np.ndarray):
        raise TypeError(_must_be("array", "a numpy array", type(array)))
    if array.dtype == dtype(rec):
        return array["dwords"]
    if array.dtype == np.dtype("<u8"):
        if rec.dwords == 1:
            return array[..., None]
        if array.ndim and array.shape[-1] == rec.dwords:
            return array
    axis = "one element" if rec.dwords == 1 else f"a last axis of {rec.dwords}"
    allowed = f"of dtype {dtype(rec)}, or of uint64 with {axis} a record"
    raise ValueError(_must_be("array", allowed, (array.dtype, array.shape)))


def get(array: "NDArray[Any]", rec: str | Record, field: str) -> "NDArray[np.uint64]":
    """Return one field of every record of an array.

    Parameters
    ----------
    array : ndarray
        Of ``dtype(rec)`` and any shape; or of uint64, where the last axis counts the dwords of a
        record (for a record of one dword there is no such axis: each element is a record).
    rec : str or Record
        Which record.
    field : str
        Which field.

    Returns
    -------
    ndarray of uint64
        A new array with the shape of the array of records. An address is in place.

    Raises
    ------
    ValueError
        If there is no such field, or the array is not one of such records.
    TypeError
        If it is not a numpy array.
    """
    import numpy as np

    rec = record(rec)
    f = rec.field(field)
    words = _dwords(rec, array)[..., f.dword]
    return (words & np.uint64(f.mask)) >> np.uint64(f.shift)


def set(array: "NDArray[Any]", rec: str | Record, field: str, values: Any) -> None:
    """Set one field of every record of an array, in place; other bits stay.

    Parameters
    ----------
    array : ndarray
        As for `get`.
    rec, field : str
        As for `get`.
    values : int or array_like of int
        Broadcast to the array of records. Addresses are in place.

    Raises
    ------
    ValueError
        If there is no such field, the array is not one of such records, or a value does not fit.
    TypeError
        If it is not a numpy array, or the values are not integers.
    """
    import numpy as np

    rec = record(rec)
    f = rec.field(field)
    given = np.asarray(values)
    if given.size and given.dtype.kind not in "iub":
        raise TypeError(_must_be("values", "integers", given.dtype.type))
    new = given.astype(np.uint64)
    bad = (given < 0) | (new & ~np.uint64(f.mask >> f.shift) != 0)
    if bad.any():
        _check(rec, f, int(given[bad].flat[0]))
    words = _dwords(rec, array)[..., f.dword]
    words[...] = (words & ~np.uint64(f.mask)) | (new << np.uint64(f.shift))


# --- the generated Cython declarations -----------------------------------------------------------

_HEADER = """\
# Generated by "python -P smmufast/layout.py --write" from the table in layout.py; do not edit.
#
# uint64_t <record>_<field>(const uint64_t* w)            value of a field; w: the record's dwords
# void <record>_set_<field>(uint64_t* w, uint64_t value)  set it; bits that do not fit are dropped
# Dwords are in host byte order. An address is in place, not shifted. Translation table
# descriptors (pte_...) and registers are passed by value, and their setters return the new word.
# <RECORD>_<FIELD> is the field's bits in its dword, from _facts/layout.h.
from libc.stdint cimport uint64_t

"""

_C_HEADER = """\
/* Generated by "python -P smmufast/layout.py --write" from the table in layout.py; do not edit.
 *
 * <RECORD>_<FIELD>: the bits of a field within its dword; PTE_..._LSB: its lowest bit. */
#ifndef SMMUFAST_LAYOUT_H
#define SMMUFAST_LAYOUT_H

"""

_IN_MEMORY = ("L1STD", "STE", "L1CD", "CD", "EVENT", "F_BAD_ATS_TREQ", "CMD")
_BY_VALUE = (
    "PTE_S1", "PTE_S1_TABLE", "PTE_S2", "PTE_S2_TABLE",
    "CR0", "CR2", "GBPA", "STRTAB_BASE", "STRTAB_BASE_CFG", "CMDQ_BASE", "CMDQ_PROD", "CMDQ_CONS",
    "EVENTQ_BASE", "EVENTQ_PROD", "EVENTQ_CONS", "GERROR",
)  # fmt: skip
_MASKS_ALONE = ("CR1", "IRQ_CTRL", "PRIQ_BASE", "PRIQ_IRQ_CFG2")


def _enumerators() -> Iterable[tuple[str, int]]:
    """Yield names and values: record sizes, event numbers, opcodes, and the named codes."""
    for name in _IN_MEMORY:
        yield f"{name}_BYTES", RECORDS[name].bytes
    for number, event in EVENTS.items():
        yield f"EVENT_{event.name}", number
    for name, command in COMMANDS.items():
        yield f"CMD_{name}", command.fixed["Opcode"]
    for world in StreamWorld:
        yield f"WORLD_{world.name}", world.value
    for name in (*_IN_MEMORY, *_BY_VALUE):
        for f in RECORDS[name].fields:
            if f.width == 1:
                continue
            for code, text in f.values.items():
                word = text.partition(":")[0]
                if re.fullmatch(r"[0-9A-Z_]+", word):
                    yield f"{name}_{f.name.upper()}_{word}", code


def _masks() -> Iterable[tuple[str, int]]:
    """Yield a name and the bits of every field of the records that compiled code reads."""
    for name in (*_IN_MEMORY, *_BY_VALUE, *_MASKS_ALONE):
        for f in RECORDS[name].fields:
            yield f"{name}_{f.name.upper()}", f.mask


def _lowest_bits() -> Iterable[tuple[str, int]]:
    """Yield a name and the lowest bit of every field of a translation table descriptor."""
    for name in _BY_VALUE[:4]:
        for f in RECORDS[name].fields:
            yield f"{name}_{f.name.upper()}_LSB", f.lsb


def _literal(value: int) -> str:
    return f"0x{value:X}ULL"


def _functions(name: str, by_value: bool) -> Iterable[str]:
    """Yield a getter and a setter per field."""
    for f in RECORDS[name].fields:
        low = name.lower()
        word = "d" if by_value else f"w[{f.dword}]"
        whole = f.width == 64
        up = f"{word} >> {f.shift}" if f.shift else word
        got = up if f.shift + f.width == 64 else (
            f"({up}) & {_literal(f.mask >> f.shift)}" if f.shift
            else f"{word} & {_literal(f.mask)}")  # fmt: skip
        put = f"(value << {f.shift})" if f.shift else "value"
        if not (f.shift and f.shift + f.width == 64):
            put = f"({put} & {_literal(f.mask)})"
        kept = f"({word} & {_literal(~f.mask & (1 << 64) - 1)})"
        new = "value" if whole else f"{kept} | {put}"
        if by_value:
            yield (f"cdef inline uint64_t {low}_{f.name.lower()}(uint64_t d) noexcept nogil:\n"
                   f"    return {got}\n")  # fmt: skip
            yield (f"cdef inline uint64_t {low}_set_{f.name.lower()}"
                   f"(uint64_t d, uint64_t value) noexcept nogil:\n"
                   f"    return {new}\n")  # fmt: skip
        else:
            yield (f"cdef inline uint64_t {low}_{f.name.lower()}"
                   f"(const uint64_t* w) noexcept nogil:\n"
                   f"    return {got}\n")  # fmt: skip
            yield (f"cdef inline void {low}_set_{f.name.lower()}"
                   f"(uint64_t* w, uint64_t value) noexcept nogil:\n"
                   f"    {word} = {new}\n")  # fmt: skip


def _pxd() -> str:
    """Return the text of _facts/layout.pxd."""
    parts = [_HEADER, "cdef enum:\n"]
    parts += [f"    {name} = {value:#x}\n" for name, value in _enumerators()]
    parts += ['\n\ncdef extern from "_facts/layout.h":\n']
    parts += [f"    const uint64_t {name}\n" for name, _ in _masks()]
    for name in _IN_MEMORY:
        parts += [f"\n\n# {name}: {RECORDS[name].doc}\n", "\n".join(_functions(name, False))]
    for name in _BY_VALUE:
        parts += [f"\n\n# {name}: {RECORDS[name].doc}\n", "\n".join(_functions(name, True))]
    return "".join(parts)


def _header() -> str:
    """Return the text of _facts/layout.h."""
    lines = [f"#define {name} {_literal(bits)}\n" for name, bits in _masks()]
    lines += [f"#define {name} {bit}\n" for name, bit in _lowest_bits()]
    return "".join([_C_HEADER, *lines, "\n#endif\n"])


def _main(arguments: list[str]) -> None:
    from pathlib import Path

    if arguments not in ([], ["--write"]):
        raise SystemExit("usage: python -P smmufast/layout.py [--write]")
    for file, text in (("_facts/layout.pxd", _pxd()), ("_facts/layout.h", _header())):
        if arguments:
            Path(__file__).parent.joinpath(file).write_text(text, encoding="utf-8")
        else:
            print(text, end="")


if __name__ == "__main__":
    import sys

    _main(sys.argv[1:])
