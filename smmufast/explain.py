"""explain(): a translation in words, each fetch decoded, then how it ended.

Sections: IHI 0070 3.3 (stream and CD tables), 5 (STE, CD), 7.3 (events); DDI 0487 D8
(translation tables).  The words follow what the translation found; where it ended in a fault the
conditions that give that fault are looked at again, to name the one that holds.

Where stage 2 translates, each structure that stage 1 reads lies at an IPA: its stage-2 walk is
told before it and indented, under the number of the step that needs it.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from smmufast import layout
from smmufast.faults import Event, Fetch, Perm

if TYPE_CHECKING:
    from smmufast._smmu import Result, Smmu
    from smmufast.features import Features

__all__ = ["cd_faults", "describe_cd", "describe_ste", "explain", "ste_faults"]

_U64 = (1 << 64) - 1
_GRANULE = {"4K": 12, "16K": 14, "64K": 16}
_KINDS = {
    "L1STD": "Level-1 stream table descriptor (L1STD)",
    "STE": "Stream table entry (STE)",
    "L1CD": "Level-1 context descriptor (L1CD)",
    "CD": "Context descriptor (CD)",
    "TT": "Translation table descriptor",
    "S2TT": "Stage-2 descriptor",
    "TT update": "Hardware update of the descriptor",
    "S2TT update": "Hardware update of the stage-2 descriptor",
}
_CLASSES = (
    "the fetch of a context descriptor",
    "the walk of stage 1",
    "the access itself",
    "an unknown purpose",
)
_CONFIG = (
    "the stream is blocked: everything aborts, no event",
    "reserved, acts as 0b000: blocked",
    "reserved, acts as 0b000: blocked",
    "reserved, acts as 0b000: blocked",
    "both stages are bypassed",
    "stage 1 translates, stage 2 is bypassed",
    "stage 2 translates, stage 1 is bypassed",
    "stage 1 and stage 2 translate",
)
_AP = (
    "privileged: read and write; unprivileged: none",
    "all: read and write",
    "privileged: read; unprivileged: none",
    "all: read",
)
_PNU = ("unprivileged", "privileged")
_S2AP = ("no read, no write", "read", "write", "read and write")
_XNX = ("all may execute", "unprivileged code may execute", "none may execute",
        "privileged code may execute")  # fmt: skip
_SH = ("non-shareable", "reserved, acts as non-shareable", "outer shareable", "inner shareable")
_DEVICES = ("Device-nGnRnE", "Device-nGnRE", "Device-nGRE", "Device-GRE")
_CACHES = ("reserved", "non-cacheable", "write-through", "write-back")
_FORCED = (
    *_DEVICES,
    "reserved, acts as Device-nGnRnE",
    "Normal, non-cacheable, unless stage 1 says Device",
    "Normal, write-back, whatever stage 1 says",
    "as stage 1 says",
)
_START = {12: (2, 1, 0, 3), 14: (3, 2, 1, 0), 16: (3, 2, 1, None)}
"""Start level of stage 2, by granule and S2SL0."""
_EVENTS = {
    "C_BAD_STREAMID": "the stream table has no entry for this StreamID",
    "F_STE_FETCH": "the stream table could not be read",
    "C_BAD_STE": "the stream table entry is invalid or illegal",
    "F_STREAM_DISABLED": "the stream refuses this kind of transaction",
    "C_BAD_SUBSTREAMID": "the stream has no such substream",
    "F_CD_FETCH": "the context descriptor could not be read",
    "C_BAD_CD": "the context descriptor is invalid or illegal",
    "F_WALK_EABT": "a translation table could not be read",
    "F_TRANSLATION": "the address is not mapped",
    "F_ADDR_SIZE": "an address is too large",
    "F_ACCESS": "the page's access flag is clear",
    "F_PERMISSION": "the page does not permit this access",
}


def _span(high: int, low: int) -> str:
    return f"bits {high} to {low}" if high > low else f"bit {low}"


def _address(d: int, lg2: int, ds: bool) -> int:
    """Return the address bits of a descriptor, low bits included."""
    if lg2 == 16:
        return d & 0x0000_FFFF_FFFF_0000 | (d >> 12 & 15) << 48
    if ds:
        return d & 0x0003_FFFF_FFFF_F000 | (d >> 8 & 3) << 50
    return d & 0x0000_FFFF_FFFF_F000


def _size(lg2: int) -> str:
    """Return a power of two of bytes, as 4 KiB or 2 MiB."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    return f"{1 << lg2 % 10} {units[lg2 // 10]}" if lg2 < 60 else f"2^{lg2} B"


def _bits(value: int, width: int) -> str:
    return f"0b{value:0{width}b}"


def memory_type(attr: int) -> str:
    """Return a MAIR byte in words (DDI 0487 D8.6)."""
    outer, inner = attr >> 4, attr & 15
    if outer == 0:
        reserved = "" if inner in (0, 4, 8, 12) else ", reserved code"
        return _DEVICES[inner >> 2] + reserved

    def level(nibble: int) -> str:
        if nibble == 4:
            return "non-cacheable"
        kind = "write-back" if nibble & 4 else "write-through"
        hints = [name for bit, name in ((2, "read"), (1, "write")) if nibble & bit]
        text = kind + ("" if nibble & 8 else " transient")
        return f"{text}, {' and '.join(hints) or 'no'} allocate"

    if inner == 0:
        return f"Normal, outer {level(outer)}; inner 0b0000 is reserved"
    if outer == inner:
        return f"Normal, {level(outer)}"
    return f"Normal, inner {level(inner)}; outer {level(outer)}"


def stage2_memory_type(code: int, forced: bool) -> str:
    """Return MemAttr of a stage-2 descriptor in words, `forced` with S2FWB (IHI 0070 13.1.3)."""
    if forced:
        return _FORCED[code & 7]
    outer, inner = code >> 2, code & 3
    if outer == 0:
        return _DEVICES[inner]
    if inner == 0:
        return "reserved, acts as Device-nGnRnE"
    if outer == inner:
        return f"Normal, {_CACHES[outer]}"
    return f"Normal, inner {_CACHES[inner]}; outer {_CACHES[outer]}"


# --- what is illegal ------------------------------------------------------------------------------


def _ips(code: int, features: Features | None) -> int:
    """Return the effective output size of a CD, in bits."""
    if features is None:
        return layout.OUTPUT_BITS[code]
    largest = 7 if features.arch_minor >= 4 else 6 if features.arch_minor else 5
    return min(layout.OUTPUT_BITS[min(code, largest)], features.oas_bits)


def _pointer(value: int, features: Features) -> int:
    """Return the address in a pointer field, which has fewer bits in older versions."""
    bits = 48 if features.arch_minor == 0 else 52 if features.arch_minor < 4 else 56
    return value & ((1 << bits) - 1)


def ste_faults(ste: dict[str, int], features: Features) -> list[str]:
    """Return why an STE with V=1 that does not block its stream is illegal (IHI 0070 5.2.2).

    Parameters
    ----------
    ste : dict
        Its fields, from ``layout.unpack("STE", ...)``.
    features : Features
        Of the SMMU that reads it.
    """
    found = []
    if ste["Config"] & 1 and not features.s1p:
        found.append("Config asks for stage 1, which this SMMU does not have (IDR0.S1P=0)")
    if ste["Config"] & 2 and not features.s2p:
        found.append("Config asks for stage 2, which this SMMU does not have (IDR0.S2P=0)")
    if features.ats and ste["Config"] != 4:
        found += _eats_faults(ste, features)
    if ste["Config"] == 5 and features.s1p and features.hyp and ste["STRW"] & 1:
        found.append(f"STRW={_bits(ste['STRW'], 2)} is reserved for a Non-secure stream")
    if ste["Config"] & 1:
        if ste["S1STALLD"] and features.stall_model:
            found.append(
                "S1STALLD=1, but this SMMU has no choice to stall "
                f"(IDR0.STALL_MODEL={features.stall_model})"
            )
        table = ste["S1CDMax"] and features.ssidsize
        if table and ste["S1CDMax"] > features.ssidsize:
            found.append(
                f"S1CDMax={ste['S1CDMax']} is more than the SubstreamID has bits "
                f"(IDR1.SSIDSIZE={features.ssidsize})"
            )
        if table and ste["S1Fmt"] in (1, 2) and not features.cd2l:
            found.append(
                "S1Fmt asks for a two-level CD table, which this SMMU does not have (IDR0.CD2L=0)"
            )
        pointer = _pointer(ste["S1ContextPtr"], features)
        if features.arch_minor and not ste["Config"] & 2 and pointer >> features.oas_bits:
            found.append(
                f"S1ContextPtr={pointer:#x} is beyond the {features.oas_bits} bits of "
                "physical address (IDR5.OAS)"
            )
    tagged = features.s2p and ste["Config"] != 4
    if features.hyp and features.s1p and ste["Config"] == 5 and ste["STRW"]:
        tagged = False  # the EL2 worlds have no VMID
    if tagged and not features.vmid16 and ste["S2VMID"] >> 8:
        found.append(f"S2VMID={ste['S2VMID']:#x}: this SMMU has 8-bit VMIDs (IDR0.VMID16=0)")
    if ste["Config"] & 2:
        found += _stage2_faults(ste, features)
    return found


def _eats_faults(ste: dict[str, int], features: Features) -> list[str]:
    """Return why EATS is illegal, where it is not IGNORED."""
    found = []
    if ste["EATS"] == 2:
        if ste["Config"] != 7:
            found.append("EATS=0b10 (split-stage ATS) needs both stages")
        if features.ns1ats:
            found.append("EATS=0b10, but this SMMU has no split-stage ATS (IDR0.NS1ATS=1)")
    if ste["S2S"] and (ste["EATS"] == 2 or (ste["EATS"] == 1 and ste["Config"] & 2)):
        found.append(f"EATS={_bits(ste['EATS'], 2)}, but stage 2 stalls (S2S=1)")
    return found


def _stage2_faults(ste: dict[str, int], features: Features) -> list[str]:
    """Return why the stage-2 fields of an STE are illegal."""
    found = []
    if not ste["S2AA64"]:
        found.append("S2AA64=0: VMSAv8-32 tables, which this SMMU does not have (IDR0.TTF)")
    if ste["S2S"] and features.stall_model == 1:
        found.append("S2S=1, but this SMMU never stalls (IDR0.STALL_MODEL=1)")
    if not ste["S2S"] and features.stall_model == 2:
        found.append("S2S=0, but this SMMU always stalls (IDR0.STALL_MODEL=2)")
    if features.ttendian == (2 if ste["S2ENDI"] else 3):
        found.append(
            f"S2ENDI={ste['S2ENDI']}: this SMMU reads tables of the other endianness only "
            f"(IDR0.TTENDIAN={features.ttendian})"
        )
    if ((ste["S2HA"] or ste["S2HD"]) and not features.httu) or (ste["S2HD"] and features.httu == 1):
        found.append(
            f"S2HA={ste['S2HA']}, S2HD={ste['S2HD']}: this SMMU does not update tables so "
            f"(IDR0.HTTU={features.httu})"
        )
    lg2 = _s2_granule(ste)
    if not _has_granule(lg2, features):
        found.append(
            f"S2TG={_bits(ste['S2TG'], 2)} is reserved or a granule that this SMMU does not "
            "have (IDR5)"
        )
        return found
    ds = _s2_ds(ste, features)
    oas = features.oas_bits
    low = max(12 if lg2 == 16 or ds else 16, 64 - oas)
    high = _largest_tsz(lg2, features)
    tsz = ste["S2T0SZ"]
    if not low <= tsz <= high:
        found.append(f"S2T0SZ={tsz} is not within {low} to {high}")
    level = _s2_level(ste, features)
    start = f"S2SL0={_bits(ste['S2SL0'], 2)}" + (
        f" with S2SL0_2={ste['S2SL0_2']}" if ds and lg2 == 12 else ""
    )
    if level is None:
        found.append(f"{start} is reserved for this granule on this SMMU")
    else:
        bits = 64 - tsz - _shift(lg2, level)
        # where the tables of a level cannot be concatenated, one must be enough
        most = lg2 - 3 + (0 if (lg2, level) in ((12, -1), (14, 0), (16, 1)) else 4)
        if not 1 <= bits <= most:
            found.append(
                f"S2T0SZ={tsz} does not go with {start}: a start at level {level} takes "
                f"{_shift(lg2, level) + 1} to {_shift(lg2, level) + most} bits of address, "
                f"and these are {64 - tsz}"
            )
    output = _ips(ste["S2PS"], features)
    base = ste["S2TTB"] & ((1 << (48 if features.arch_minor == 0 else 52)) - 1)
    if base >> output:
        found.append(f"S2TTB={base:#x} is beyond the output size of {output} bits (S2PS, OAS)")
    elif base >> 48 and lg2 != 16 and not ds:
        found.append(f"S2TTB={base:#x} is beyond the 48 bits of this granule without S2DS")
    return found


def _shift(lg2: int, level: int) -> int:
    """Return log2 of what an entry of a level covers."""
    return lg2 + (3 - level) * (lg2 - 3)


def _first_level(lg2: int, bits: int) -> int:
    """Return the level at which stage 1 starts, given the bits of its input."""
    return 4 - -(-(bits - lg2) // (lg2 - 3))


def _has_granule(lg2: int, features: Features) -> int:
    return (features.gran4k << 12 | features.gran16k << 14 | features.gran64k << 16) >> lg2 & 1


def _largest_tsz(lg2: int, features: Features) -> int:
    return 39 if not features.stt else 47 if lg2 == 16 else 48


def _s2_ds(ste: dict[str, int], features: Features | None) -> bool:
    return bool(ste["S2DS"] and (features is None or features.ds) and _s2_granule(ste) != 16)


def _s2_level(ste: dict[str, int], features: Features | None) -> int | None:
    """Return the level at which stage 2 starts, None for a reserved code."""
    lg2, code = _s2_granule(ste), ste["S2SL0"]
    ds = _s2_ds(ste, features)
    oas = 52 if features is None else features.oas_bits
    if ste["S2SL0_2"] and ds and lg2 == 12:
        return -1 if not code and oas >= 52 else None
    level = _START[lg2][code]
    if level == 0 and lg2 == 12 and oas < 44:
        return None
    if level == 1 and lg2 != 12 and oas < (42 if lg2 == 14 else 44):
        return None
    if (level == 0 and lg2 == 14 and not (ds and oas >= 52)) or (
        level == 3 and lg2 == 12 and features is not None and not features.stt
    ):
        return None
    return level


def _halves(cd: dict[str, int], two: bool) -> list[int]:
    """Return the halves of the address space that a CD enables."""
    return [n for n in (0, 1) if not (cd[f"EPD{n}"] and two) and (two or not n)]


def _granule(cd: dict[str, int], half: int) -> int:
    """Return log2 of a half's granule, 0 for a reserved code."""
    name = layout.CD.field(f"TG{half}").name_of(cd[f"TG{half}"])
    return _GRANULE.get(name, 0)


def _s2_granule(ste: dict[str, int]) -> int:
    """Return log2 of the granule of stage 2, 0 for a reserved code."""
    return _GRANULE.get(layout.STE.field("S2TG").name_of(ste["S2TG"]), 0)


def _ds(cd: dict[str, int], features: Features | None) -> bool:
    return bool(cd["DS"] and (features is None or features.ds))


def cd_faults(
    cd: dict[str, int], ste: dict[str, int], features: Features, two_ttbs: bool = True
) -> list[str]:
    """Return why a CD with V=1 is illegal (IHI 0070 5.4.1).

    Parameters
    ----------
    cd, ste : dict
        Their fields, from ``layout.unpack``.
    features : Features
        Of the SMMU that reads them.
    two_ttbs : bool
        False in the EL2 world without E2H, which has TTB0 only.
    """
    found = []
    halves = _halves(cd, two_ttbs)
    if cd["S"] and (features.stall_model == 1 or ste["S1STALLD"]):
        found.append("S=1, but the stream cannot stall (IDR0.STALL_MODEL=1 or STE.S1STALLD=1)")
    if not cd["S"] and features.stall_model == 2:
        found.append("S=0, but this SMMU always stalls (IDR0.STALL_MODEL=2)")
    if not cd["A"] and features.term_model:
        found.append("A=0, but this SMMU cannot read as zero (IDR0.TERM_MODEL=1)")
    if not cd["AA64"]:
        found.append("AA64=0: VMSAv8-32 tables, which this SMMU does not have (IDR0.TTF)")
    if halves and features.ttendian == (2 if cd["ENDI"] else 3):
        found.append(
            f"ENDI={cd['ENDI']}: this SMMU reads tables of the other endianness only "
            f"(IDR0.TTENDIAN={features.ttendian})"
        )
    if ((cd["HA"] or cd["HD"]) and not features.httu) or (cd["HD"] and features.httu == 1):
        found.append(
            f"HA={cd['HA']}, HD={cd['HD']}: this SMMU does not update tables so "
            f"(IDR0.HTTU={features.httu})"
        )
    if two_ttbs and not features.asid16 and cd["ASID"] >> 8:
        found.append(f"ASID={cd['ASID']:#x}: this SMMU has 8-bit ASIDs (IDR0.ASID16=0)")
    ips = _ips(cd["IPS"], features)
    ds = _ds(cd, features)
    for n in halves:
        lg2 = _granule(cd, n)
        if not _has_granule(lg2, features):
            found.append(
                f"TG{n}={_bits(cd[f'TG{n}'], 2)} is reserved or a granule that this SMMU "
                "does not have (IDR5)"
            )
            continue
        low = 12 if features.vax and (lg2 == 16 or ds) else 16
        high = _largest_tsz(lg2, features)
        if not low <= cd[f"T{n}SZ"] <= high:
            found.append(f"T{n}SZ={cd[f'T{n}SZ']} is not within {low} to {high}")
        base = cd[f"TTB{n}"] & ((1 << (48 if features.arch_minor == 0 else 52)) - 1)
        if base >> ips:
            found.append(f"TTB{n}={base:#x} is beyond the output size of {ips} bits (IPS, OAS)")
        elif base >> 48 and lg2 != 16 and not ds:
            found.append(f"TTB{n}={base:#x} is beyond the 48 bits of this granule without DS")
    return found


# --- one line each --------------------------------------------------------------------------------

_S2_FLAGS = (
    "S2AA64",
    "S2R",
    "S2S",
    "S2PTW",
    "S2AFFD",
    "S2HA",
    "S2HD",
    "S2ENDI",
    "S2FWB",
    "S2DS",
    "S2SL0_2",
)


def describe_ste(data: bytes) -> str:
    """Return an STE in one line: the fields that count in its configuration."""
    ste = layout.unpack("STE", data)
    config = layout.STE.field("Config").name_of(ste["Config"]).partition(":")[0]
    if not ste["V"]:
        return "V=0 (invalid)"
    parts = [f"Config={_bits(ste['Config'], 3)} ({config})"]
    names: list[str] = []
    if ste["Config"] & 4:
        if ste["Config"] & 1:
            parts.append(f"S1ContextPtr={ste['S1ContextPtr']:#x} S1CDMax={ste['S1CDMax']}")
            names += ["S1STALLD", "STRW"]
            if ste["S1CDMax"]:
                parts.append(f"S1Fmt={ste['S1Fmt']} S1DSS={_bits(ste['S1DSS'], 2)}")
        if ste["Config"] & 2:
            parts.append(
                f"S2TTB={ste['S2TTB']:#x} S2T0SZ={ste['S2T0SZ']} S2SL0={ste['S2SL0']} "
                f"S2TG={layout.STE.field('S2TG').name_of(ste['S2TG'])} "
                f"S2PS={layout.OUTPUT_BITS[ste['S2PS']]} bits"
            )
            flags = [name for name in _S2_FLAGS if ste[name]]
            parts += [" ".join(flags)] if flags else []
        names += ["S2VMID", "MTCFG", "MemAttr", "ALLOCCFG", "SHCFG", "PRIVCFG", "INSTCFG", "EATS"]
    parts += [f"{name}={ste[name]:#x}" for name in names if ste[name]]
    return " ".join(parts)


def describe_cd(data: bytes) -> str:
    """Return a CD in one line."""
    cd = layout.unpack("CD", data)
    if not cd["V"]:
        return "V=0 (invalid)"
    parts = []
    for n in (0, 1):
        if cd[f"EPD{n}"]:
            parts.append(f"EPD{n}=1")
        else:
            granule = layout.CD.field(f"TG{n}").name_of(cd[f"TG{n}"])
            parts.append(f"TTB{n}={cd[f'TTB{n}']:#x} {granule} T{n}SZ={cd[f'T{n}SZ']}")
    parts.append(f"IPS={layout.OUTPUT_BITS[cd['IPS']]} bits ASID={cd['ASID']:#x}")
    flags = (
        "AA64",
        "A",
        "R",
        "S",
        "ENDI",
        "TBI0",
        "TBI1",
        "AFFD",
        "WXN",
        "PAN",
        "EPAN",
        "HA",
        "HD",
        "HAD0",
        "HAD1",
        "E0PD0",
        "E0PD1",
        "DS",
        "ASET",
    )
    parts.append(" ".join(name for name in flags if cd[name]))
    return " ".join(parts)


# --- the whole chain ------------------------------------------------------------------------------


class _Story:
    """A translation being told: what is known so far, and the lines."""

    def __init__(self, result: Result, smmu: Smmu | None) -> None:
        self.result = result
        self.smmu = smmu
        self.features: Features | None = None if smmu is None else smmu.features
        self.fault: Event | None = result.fault
        self.fetches: list[Fetch] = result.fetches or []
        self.traced = result.fetches is not None
        self.l1std: dict[str, int] | None = None
        self.ste: dict[str, int] | None = None
        self.l1cd: dict[str, int] | None = None
        self.cd: dict[str, int] | None = None
        self.descriptor = 0
        self.level: int | None = None
        self.output: int | None = None  # of stage 1: the page, once its descriptor was found
        self.page_lg2 = 0
        self.first = True  # the next stage-1 descriptor is that of the first table
        self.table = 0  # of stage 1, where the next descriptor lies
        self.ipa: int | None = None  # what stage 2 translates
        self.inner_first = True  # the same of stage 2
        self.inner_level: int | None = None
        self.inner = 0  # the last descriptor of stage 2
        self.steps = 0
        self.substeps = 0
        self.open = False  # a step has begun, and stage 2 says where its structure lies
        self.margin = 0
        self.lines: list[str] = []

    def say(self, text: str, indent: int = 0) -> None:
        start = " " * (self.margin + indent)
        if len(start + text) <= 100:
            self.lines.append(start + text)
        else:
            self.lines += textwrap.wrap(
                text, 100, initial_indent=start, subsequent_indent=start + "  "
            )

    def field(self, name: str, value: str, meaning: str) -> None:
        self.say(f"{name}={value}".ljust(25) + f" {meaning}", 5)

    def tell(self) -> str:
        result = self.result
        kind = "write to" if result.write else "read of"
        substream = "" if result.ssid is None else f", substream {result.ssid:#x}"
        self.say(f"A {kind} {result.iova:#x} by stream {result.sid:#x}{substream}.")
        for i, fetch in enumerate(self.fetches):
            self.lines.append("")
            self.fetch(i, fetch)
        untold = self.traced and self.stage2_fault and not self.open
        if untold and self.fault is not None and self.fault.name == "F_TRANSLATION":
            self.lines.append("")
            self.begin()  # stage 2 refused the IPA before it read anything
        self.lines.append("")
        self.end()
        return "\n".join(self.lines)

    # --- steps: a structure that stage 1 reads, or the IPA that it gives ---

    @property
    def stage1(self) -> bool:
        """Whether stage 1 translates this transaction."""
        ste = self.ste
        if ste is None or not ste["Config"] & 1:
            return False
        return not (self.result.ssid is None and self.substreams and ste["S1DSS"] == 1)

    @property
    def stage2(self) -> bool:
        """Whether the STE that was read enables stage 2."""
        return self.ste is not None and self.ste["Config"] & 6 == 6

    @property
    def nested(self) -> bool:
        return self.stage1 and self.stage2

    @property
    def stage2_fault(self) -> bool:
        return self.fault is not None and bool(self.fault.fields.get("S2"))

    @property
    def substreams(self) -> bool:
        """Whether the STE has a table of context descriptors."""
        return bool(
            self.ste is not None
            and self.ste["S1CDMax"]
            and (self.features is None or self.features.ssidsize)
        )

    def begin(self) -> None:
        """Begin a step whose structure lies at an IPA: name it, and the IPA."""
        self.steps += 1
        self.substeps = 0
        self.open = True
        self.inner_first = True
        self.inner_level = None
        if self.stage1 and self.cd is None:
            what, self.ipa = self.context_ipa()
            self.say(f"{self.steps}. {what}, at IPA {self.ipa:#x}:")
        elif self.stage1 and (self.output is None or self.first):
            self.ipa, level = self.table_ipa()
            self.say(f"{self.steps}. {_KINDS['TT']}, level {level}, at IPA {self.ipa:#x}:")
        else:
            self.ipa = self.result.iova
            what = "the input address"
            if self.output is not None:
                what = "the output of stage 1"
                self.ipa = self.output | self.ipa & ((1 << self.page_lg2) - 1)
            self.say(f"{self.steps}. Stage 2 of the access, IPA {self.ipa:#x} ({what}):")

    def pointer(self, value: int) -> int:
        return value if self.features is None else _pointer(value, self.features)

    def context_ipa(self) -> tuple[str, int]:
        """Return what is read next towards the context descriptor, and its IPA (IHI 0070 3.3.2)."""
        ste = self.ste or {}
        index = self.result.ssid or 0
        leaf = {1: 6, 2: 10}.get(ste["S1Fmt"], 0) if self.substreams else 0
        table = ste["S1CDMax"] if self.substreams else 0
        if leaf and self.l1cd is not None:
            base = self.pointer(self.l1cd["L2Ptr"]) & -(1 << leaf + 6)
            return _KINDS["CD"], base + 64 * (index & ((1 << leaf) - 1))
        base = self.pointer(ste["S1ContextPtr"])
        if leaf:
            return _KINDS["L1CD"], (base & -(1 << max(table - leaf + 3, 6))) + 8 * (index >> leaf)
        return _KINDS["CD"], (base & -(1 << table + 6)) + 64 * index

    def table_ipa(self) -> tuple[int, int]:
        """Return the IPA and the level of the stage-1 descriptor that is read next."""
        cd, n = self.cd or {}, self.half
        lg2, bits = _granule(cd, n), 64 - cd[f"T{n}SZ"]
        level = (self.level or 0) + 1
        if self.first:
            level = _first_level(lg2, bits)
            align = bits - _shift(lg2, level) + 3
            wide = _ips(cd["IPS"], self.features) >= 52 or (_ds(cd, self.features) and lg2 != 16)
            base = cd[f"TTB{n}"]
            if self.features is not None:
                base &= (1 << (48 if self.features.arch_minor == 0 else 52)) - 1
            self.table = base & -(1 << max(align, 6 if wide else 4))
        return self.table + 8 * self.index(self.result.iova, lg2, level, bits, self.first)[0], level

    def index(
        self, address: int, lg2: int, level: int, bits: int, first: bool
    ) -> tuple[int, int, int]:
        """Return the entry that an address of so many bits selects, and from where to where."""
        shift = _shift(lg2, level)
        top = bits if first else shift + lg2 - 3
        return address >> shift & ((1 << max(top - shift, 0)) - 1), top - 1, shift

    # --- fetches ---

    def fetch(self, i: int, fetch: Fetch) -> None:
        level = "" if fetch.level is None else f", level {fetch.level}"
        inside = fetch.kind == "S2TT" or (fetch.kind == "S2TT update" and self.open)
        if fetch.kind == "S2TT" and not self.open:
            self.begin()
        if inside:
            self.substeps += 1
            self.margin = 5
            number = f"{self.steps}.{self.substeps}."
            self.say(f"{number} {_KINDS[fetch.kind]}{level}, at {fetch.address:#x}:")
        elif self.open and fetch.swap is None:
            self.open = False
            self.say(f"Stage 2 puts it at {fetch.address:#x}:", 5)
        else:
            self.steps += 1
            self.open = False
            self.say(f"{self.steps}. {_KINDS[fetch.kind]}{level}, at {fetch.address:#x}:")
        if fetch.swap is not None:
            self.tell_update(fetch)
        elif fetch.data is None:
            self.say("the read ended in an external abort", 5)
        else:
            self.tell_data(i, fetch)
        self.margin = 0

    def tell_data(self, i: int, fetch: Fetch) -> None:
        if fetch.kind not in ("TT", "S2TT"):
            data = fetch.data or b""
            words = [data[k : k + 8][::-1].hex() for k in range(0, fetch.size, 8)]
            for k in range(0, len(words), 4):
                self.say(" ".join(f"0x{word}" for word in words[k : k + 4]), 5)
        getattr(self, f"tell_{fetch.kind.lower()}")(i, fetch)

    def tell_l1std(self, i: int, fetch: Fetch) -> None:
        self.l1std = fields = layout.unpack("L1STD", fetch.data)
        span = fields["Span"]
        if span == 0:
            self.field("Span", "0", "there is no level-2 table")
        elif span > 11:
            self.field("Span", str(span), "reserved: acts as none")
        else:
            self.field("Span", str(span), f"the level-2 table has {1 << span - 1} entries")
            self.field("L2Ptr", f"{fields['L2Ptr']:#x}", "where it lies")

    def tell_ste(self, i: int, fetch: Fetch) -> None:
        self.ste = ste = layout.unpack("STE", fetch.data)
        self.field(
            "V",
            str(ste["V"]),
            "the entry is valid" if ste["V"] else "invalid: the rest has no meaning",
        )
        if not ste["V"]:
            return
        self.field("Config", _bits(ste["Config"], 3), _CONFIG[ste["Config"]])
        if not ste["Config"] & 4:
            return
        if ste["Config"] & 1:
            self.tell_stage1(ste)
        if ste["Config"] & 2:
            self.tell_stage2(ste)
        if ste["MTCFG"]:
            name = layout.STE.field("MemAttr").name_of(ste["MemAttr"])
            self.field(
                "MemAttr",
                _bits(ste["MemAttr"], 4),
                f"in place of the device's memory type: {name} (MTCFG=1)",
            )
        if ste["ALLOCCFG"] & 8:
            self.field("ALLOCCFG", _bits(ste["ALLOCCFG"], 4), "replaces the allocation hints")
        for name in ("PRIVCFG", "INSTCFG"):
            if ste[name] & 2:
                code = layout.STE.field(name).name_of(ste[name]).lower()
                override = (
                    ""
                    if self.features is None or self.features.attr_perms_ovr
                    else (", but this SMMU has no such override")
                )
                self.field(name, _bits(ste[name], 2), f"every access counts as {code}{override}")

    def tell_stage1(self, ste: dict[str, int]) -> None:
        pointer, cdmax = ste["S1ContextPtr"], ste["S1CDMax"]
        what = "the table of context descriptors" if cdmax else "the context descriptor"
        self.field("S1ContextPtr", f"{pointer:#x}", f"where {what} lies")
        if cdmax and self.features is not None and not self.features.ssidsize:
            self.field(
                "S1CDMax",
                str(cdmax),
                "ignored: this SMMU has no substreams, so there is one descriptor",
            )
        elif cdmax:
            self.field("S1CDMax", str(cdmax), f"the table covers {1 << cdmax} substreams")
            form = (
                "linear",
                "two levels, 64 descriptors in a leaf",
                "two levels, 1024 descriptors in a leaf",
                "reserved, acts as linear",
            )
            self.field("S1Fmt", _bits(ste["S1Fmt"], 2), form[ste["S1Fmt"]])
            default = (
                "are refused",
                "bypass stage 1",
                "use descriptor 0, which substream 0 may not",
                "are refused (reserved code)",
            )
            self.field(
                "S1DSS",
                _bits(ste["S1DSS"], 2),
                "transactions without a substream " + default[ste["S1DSS"]],
            )
        else:
            self.field("S1CDMax", "0", "one context descriptor; the stream has no substreams")
        if ste["S1STALLD"]:
            self.field("S1STALLD", "1", "faults of stage 1 may not stall")
        if ste["STRW"] and ste["Config"] == 5:
            hyp = self.features is None or self.features.hyp
            world = "EL2 (or EL2-E2H, by CR2.E2H)" if ste["STRW"] == 2 else "reserved"
            self.field(
                "STRW",
                _bits(ste["STRW"], 2),
                f"the world of its translations: {world}"
                if hyp
                else "ignored: this SMMU has no EL2 (IDR0.HYP=0)",
            )

    def tell_stage2(self, ste: dict[str, int]) -> None:
        self.field("S2VMID", f"{ste['S2VMID']:#x}", "the virtual machine")
        if not ste["S2AA64"]:
            self.field("S2AA64", "0", "stage-2 tables of the 32-bit architecture (LPAE)")
            return
        lg2, bits = _s2_granule(ste), 64 - ste["S2T0SZ"]
        self.field(
            "S2TG",
            _bits(ste["S2TG"], 2),
            f"granule of stage 2: {_size(lg2) if lg2 else 'reserved'}",
        )
        self.field(
            "S2T0SZ",
            str(ste["S2T0SZ"]),
            f"stage 2 takes {bits} bits of IPA: 0x0 to {(1 << bits) - 1:#x}",
        )
        if lg2:
            level = _s2_level(ste, self.features)
            counts = ste["S2SL0_2"] and lg2 == 12 and _s2_ds(ste, self.features)
            code = _bits(ste["S2SL0"], 2) + (", S2SL0_2=1" if counts else "")
            more = "reserved for this granule"
            if level is not None:
                more = f"its walk starts at level {level}"
                beyond = bits - _shift(lg2, level) - (lg2 - 3)
                if 0 < beyond <= 4:
                    more += f", in {1 << beyond} tables side by side"
            self.field("S2SL0", code, more)
        self.field("S2TTB", f"{ste['S2TTB']:#x}", "where the first stage-2 table lies")
        self.field(
            "S2PS",
            str(ste["S2PS"]),
            f"output addresses of stage 2 have at most {_ips(ste['S2PS'], self.features)} bits",
        )
        self.field(
            "S2R, S2S",
            f"{ste['S2R']}, {ste['S2S']}",
            "on a fault of stage 2: "
            + (
                "stall, record an event"
                if ste["S2S"]
                else "abort, " + ("record an event" if ste["S2R"] else "record nothing")
            ),
        )
        for flag, feature, meaning in (
            ("S2ENDI", "", "stage-2 descriptors are big-endian"),
            ("S2DS", "ds", "stage-2 descriptors hold 52-bit addresses"),
            ("S2FWB", "fwb", "MemAttr of stage 2 may force write-back"),
            ("S2PTW", "", "stage 1 may not be walked in what stage 2 makes Device memory"),
            ("S2AFFD", "", "the access flag of stage 2 does not matter"),
            ("S2HA", "", "the SMMU sets access flags of stage 2"),
            ("S2HD", "", "the SMMU keeps the dirty state of stage 2"),
        ):
            if not ste[flag]:
                continue
            absent = feature and self.features is not None and not getattr(self.features, feature)
            if flag == "S2PTW" and ste["Config"] != 7:
                meaning = "ignored: stage 1 does not translate"
            if flag == "S2HD" and not ste["S2HA"]:
                meaning = "without effect: S2HA=0"
            self.field(flag, "1", "ignored: this SMMU does not have it" if absent else meaning)

    def tell_l1cd(self, i: int, fetch: Fetch) -> None:
        self.l1cd = fields = layout.unpack("L1CD", fetch.data)
        if fields["V"]:
            self.field("V", "1", "there is a leaf of the table")
            self.field("L2Ptr", f"{fields['L2Ptr']:#x}", "where it lies")
        else:
            self.field("V", "0", "there is no leaf of the table for this substream")

    @property
    def two_ttbs(self) -> bool:
        """Whether bit 55 of the address selects one of two tables (StreamWorld, 3.3.4)."""
        ste = self.ste or {}
        if ste.get("Config") != 5 or ste.get("STRW") != 2:
            return True
        if self.smmu is None:
            # a descriptor was read for an upper address: there are upper tables
            upper = self.result.iova >> 55 & 1
            return bool(upper) and any(fetch.kind == "TT" for fetch in self.fetches)
        return not self.smmu.features.hyp or bool(self.smmu.cr2 & 1)

    @property
    def half(self) -> int:
        return self.result.iova >> 55 & 1 if self.two_ttbs else 0

    def tell_cd(self, i: int, fetch: Fetch) -> None:
        self.cd = cd = layout.unpack("CD", fetch.data)
        if not cd["V"]:
            self.field("V", "0", "invalid: the rest has no meaning")
            return
        self.field("V", "1", "the descriptor is valid")
        if not cd["AA64"]:
            self.field("AA64", "0", "tables of the 32-bit architecture (LPAE)")
            return
        n = self.half
        if self.two_ttbs:
            self.say(
                f"Bit 55 of the address is {n}: TTB{n}, the {('lower', 'upper')[n]} half, "
                "translates it.",
                5,
            )
        else:
            self.say("This world has one table base, TTB0.", 5)
        if cd[f"EPD{n}"] and self.two_ttbs:
            self.field(f"EPD{n}", "1", "but this half is disabled")
        else:
            bits, lg2 = 64 - cd[f"T{n}SZ"], _granule(cd, n)
            name = _size(lg2) if lg2 else "reserved"
            first, last = (0, (1 << bits) - 1) if not n else (_U64 - (1 << bits) + 1, _U64)
            self.field(
                f"T{n}SZ", str(cd[f"T{n}SZ"]), f"{bits} bits of address: {first:#x} to {last:#x}"
            )
            self.field(f"TG{n}", _bits(cd[f"TG{n}"], 2), f"granule (size of a page): {name}")
            self.field(f"TTB{n}", f"{cd[f'TTB{n}']:#x}", "where the first table lies")
        self.field(
            "IPS",
            str(cd["IPS"]),
            f"output addresses have at most {_ips(cd['IPS'], self.features)} bits",
        )
        if self.two_ttbs:
            self.field("ASID", f"{cd['ASID']:#x}", "the address space")
        self.field(
            "A, R",
            f"{cd['A']}, {cd['R']}",
            "on a fault: "
            + ("abort" if cd["A"] else "read zero, ignore writes")
            + (", record an event" if cd["R"] else ", record nothing")
            + (" (but S=1)" if cd["S"] else ""),
        )
        for flag, feature, meaning in (
            (f"TBI{n}", "", "bits 63 to 56 of the address are ignored"),
            ("ENDI", "", "descriptors are big-endian"),
            ("AFFD", "", "the access flag does not matter"),
            ("WXN", "", "writable pages are not executable"),
            ("PAN", "", "privileged data accesses may not touch unprivileged pages"),
            ("EPAN", "epan", "PAN counts executable pages as unprivileged ones"),
            (f"HAD{n}", "had", "attributes in table descriptors are ignored"),
            (f"E0PD{n}", "e0pd", "unprivileged accesses fault"),
            ("DS", "ds", "descriptors hold 52-bit addresses"),
            ("HA", "", "the SMMU sets access flags"),
            ("HD", "", "the SMMU keeps dirty state"),
            ("S", "", "faults stall, and are recorded"),
        ):
            if cd[flag]:
                absent = (
                    feature and self.features is not None and not getattr(self.features, feature)
                )
                self.field(flag, "1", "ignored: this SMMU does not have it" if absent else meaning)

    def number(self, data: bytes, stage: int) -> int:
        """Return the bytes of a descriptor as a number."""
        fields, name = (self.ste, "S2ENDI") if stage == 2 else (self.cd, "ENDI")
        return int.from_bytes(data, "big" if fields is not None and fields[name] else "little")

    def tell_tt(self, i: int, fetch: Fetch) -> None:
        self.descriptor = d = self.number(fetch.data or b"", 1)
        self.level = level = fetch.level or 0
        lg2 = _granule(self.cd, self.half) if self.cd is not None else 0
        self.say(f"{d:#018x}", 5)
        if lg2 and self.cd is not None:
            bits = 64 - self.cd[f"T{self.half}SZ"]
            index, high, low = self.index(self.result.iova, lg2, level, bits, self.first)
            if low <= high < 64:
                at = fetch.address - 8 * index
                table = f"{at:#x}"
                if self.nested and self.ipa is not None:
                    table = f"IPA {self.ipa - 8 * index:#x}"
                self.say(
                    f"Entry {index} ({_span(high, low)} of the address) of the table at {table}.",
                    5,
                )
        self.first = False
        if not d & 1:
            self.say("Bit 0 is 0: invalid, nothing is mapped here.", 5)
        elif level == 3:
            if d & 2:
                self.tell_leaf("page", d, lg2)
            else:
                self.say("Bits 1 to 0 are 0b01, which level 3 does not have: invalid.", 5)
        elif d & 2:
            self.tell_table(i, d, lg2)
        elif self.refused(i, 1):
            self.say(
                "Bits 1 to 0 are 0b01, a block, which this granule does not have at this "
                "level: invalid.",
                5,
            )
        else:
            self.tell_leaf("block", d, lg2)

    def refused(self, i: int, stage: int) -> bool:
        """Whether this fetch is the last, and its stage says that nothing is mapped there."""
        fault = self.fault
        last = i + 1 == len(self.fetches)
        return (
            last
            and fault is not None
            and fault.name == "F_TRANSLATION"
            and fault.fields["S2"] == stage - 1
        )

    def address(self, d: int, lg2: int) -> int:
        """Return the address bits of a stage-1 descriptor, low bits included."""
        return _address(d, lg2, self.cd is not None and _ds(self.cd, self.features))

    def tell_table(self, i: int, d: int, lg2: int) -> None:
        self.table = address = self.address(d, lg2) & -(1 << (lg2 or 12))
        space = "IPA " if self.nested else ""
        self.say(f"Bits 1 to 0 are 0b11: a table, the next one, at {space}{address:#x}.", 5)
        fields = layout.unpack("PTE_S1_TABLE", d)
        ignored = ""
        if (
            self.cd is not None
            and self.cd[f"HAD{self.half}"]
            and (self.features is None or self.features.had)
        ):
            ignored = f" (ignored: HAD{self.half}=1)"
        for name, meaning in (
            ("PXNTable", "nothing below is executable by privileged code"),
            ("UXNTable", "nothing below is executable by unprivileged code"),
            ("APTable0", "nothing below is for unprivileged data accesses"),
            ("APTable1", "nothing below is writable"),
        ):
            if fields[name]:
                self.field(name, "1", meaning + ignored)

    def tell_leaf(self, kind: str, d: int, lg2: int) -> None:
        fields = layout.unpack("PTE_S1", d)
        size = ""
        if lg2:
            shift = self.page_lg2 = _shift(lg2, self.level or 0)
            if shift < 64:
                self.output = self.address(d, lg2) & -(1 << shift)
                size = f" of {_size(shift)} at {'IPA ' * self.nested}{self.output:#x}"
        self.say(f"Bits 1 to 0 are {_bits(d & 3, 2)}: a {kind}{size}.", 5)
        self.field(
            "AF",
            str(fields["AF"]),
            "access flag: " + ("the page may be used" if fields["AF"] else "clear"),
        )
        if self.two_ttbs:
            self.field("AP[2:1]", _bits(fields["AP"], 2), _AP[fields["AP"]])
            for name, who in (("PXN", "privileged"), ("UXN", "unprivileged")):
                self.field(
                    name,
                    str(fields[name]),
                    f"execution by {who} code is {'' if fields[name] else 'not '}forbidden",
                )
        else:
            self.field("AP[2]", str(fields["AP2"]), ("read and write", "read")[fields["AP2"]])
            self.field(
                "XN", str(fields["UXN"]), f"execution is {'' if fields['UXN'] else 'not '}forbidden"
            )
        mair = 0
        if self.cd is not None:
            mair = (self.cd["MAIR0"] | self.cd["MAIR1"] << 32) >> 8 * fields["AttrIndx"] & 0xFF
        self.field(
            "AttrIndx", str(fields["AttrIndx"]), f"MAIR byte {mair:#04x}: {memory_type(mair)}"
        )
        if self.cd is not None and _ds(self.cd, self.features) and lg2 != 16:
            name, code = f"CD.SH{self.half}", self.cd[f"SH{self.half}"]
        else:
            name, code = "SH", fields["SH"]
        self.field(name, _bits(code, 2), _SH[code])
        self.field(
            "nG",
            str(fields["nG"]),
            "of this ASID alone" if fields["nG"] else "of all ASIDs (global)",
        )
        if fields["DBM"] and self.cd is not None and self.cd["HA"] and self.cd["HD"]:
            self.field("DBM", "1", "a write clears AP[2]")
        if fields["Contiguous"]:
            self.field("Contiguous", "1", "one of a group that a TLB may keep as one")

    # --- stage 2 ---

    def tell_s2tt(self, i: int, fetch: Fetch) -> None:
        ste = self.ste or {}
        self.inner = d = self.number(fetch.data or b"", 2)
        self.inner_level = level = fetch.level or 0
        lg2, bits = _s2_granule(ste), 64 - ste["S2T0SZ"]
        self.say(f"{d:#018x}", 5)
        index, high, low = self.index(self.ipa or 0, lg2, level, bits, self.inner_first)
        number, index = index >> lg2 - 3, index & ((1 << lg2 - 3) - 1)
        side = ""
        if high - low >= lg2 - 3:
            tables = _span(high, low + lg2 - 3)
            side = f", number {number} of {1 << high - low - lg2 + 4} side by side ({tables})"
            high = low + lg2 - 4
        self.say(
            f"Entry {index} ({_span(high, low)} of the IPA) of the table at "
            f"{fetch.address - 8 * index:#x}{side}.",
            5,
        )
        self.inner_first = False
        if not d & 1:
            self.say("Bit 0 is 0: invalid, nothing is mapped here.", 5)
        elif level == 3 and not d & 2:
            self.say("Bits 1 to 0 are 0b01, which level 3 does not have: invalid.", 5)
        elif level < 3 and d & 2:
            table = self.inner_address & -(1 << lg2)
            self.say(f"Bits 1 to 0 are 0b11: a table, the next one, at {table:#x}.", 5)
        elif level < 3 and self.refused(i, 2):
            self.say(
                "Bits 1 to 0 are 0b01, a block, which this granule does not have at this "
                "level: invalid.",
                5,
            )
        else:
            self.tell_stage2_leaf("page" if level == 3 else "block", _shift(lg2, level))

    @property
    def inner_address(self) -> int:
        """The address bits of the last stage-2 descriptor, low bits included."""
        ste = self.ste or {}
        return _address(self.inner, _s2_granule(ste), _s2_ds(ste, self.features))

    def tell_stage2_leaf(self, kind: str, shift: int) -> None:
        ste, d = self.ste or {}, self.inner
        fields = layout.unpack("PTE_S2", d)
        at = self.inner_address & -(1 << shift)
        self.say(f"Bits 1 to 0 are {_bits(d & 3, 2)}: a {kind} of {_size(shift)} at {at:#x}.", 5)
        self.field(
            "AF",
            str(fields["AF"]),
            "access flag: " + ("the page may be used" if fields["AF"] else "clear"),
        )
        self.field("S2AP", _bits(fields["S2AP"], 2), _S2AP[fields["S2AP"]])
        if self.features is None or self.features.xnx:
            self.field("XN", _bits(fields["XN"], 2), _XNX[fields["XN"]])
        else:
            self.field("XN[1]", str(fields["XN1"]), _XNX[fields["XN"] & 2])
        if fields["DBM"] and ste["S2HA"] and ste["S2HD"]:
            self.field("DBM", "1", "a write sets S2AP[1]")
        self.field(
            "MemAttr",
            _bits(fields["MemAttr"], 4),
            stage2_memory_type(fields["MemAttr"], self.forced) + " (S2FWB=1)" * self.forced,
        )
        name, code = "SH", fields["SH"]
        if _s2_ds(ste, self.features):
            name, code = "S2SH0", ste["S2SH0"]
        self.field(name, _bits(code, 2), _SH[code])
        if fields["Contiguous"]:
            self.field("Contiguous", "1", "one of a group that a TLB may keep as one")

    @property
    def forced(self) -> bool:
        """Whether MemAttr of stage 2 has the codes of S2FWB."""
        return bool(
            self.ste is not None
            and self.ste["S2FWB"]
            and (self.features is None or self.features.fwb)
        )

    def tell_update(self, fetch: Fetch) -> None:
        stage = 2 if fetch.kind == "S2TT update" else 1
        expected, desired = (
            self.number(word.to_bytes(8, "little"), stage) for word in fetch.swap or (0, 0)
        )
        self.say(f"{expected:#018x} becomes {desired:#018x}", 5)
        prefix = "S2" if stage == 2 else ""
        if (expected ^ desired) >> 10 & 1:
            self.field("AF", "1", f"set, because the page is used ({prefix}HA=1)")
        if (expected ^ desired) >> 7 & 1:
            name, value = ("S2AP[1]", 1) if stage == 2 else ("AP[2]", 0)
            what = "set" if value else "cleared"
            why = "the page is written"
            if stage == 2 and not self.open:
                why = "the descriptor in this page is updated"
            self.field(name, str(value), f"{what}, because {why} ({prefix}HD=1, DBM=1)")
        if fetch.data is None:
            self.say("the update ended in an external abort", 5)
            return
        found = self.number(fetch.data, stage)
        if found == expected:
            if stage == 2:
                self.inner = desired
            else:
                self.descriptor = desired
            return
        self.say(f"But {found:#018x} is there by now: the walk starts again.", 5)
        if stage == 2 and self.open:
            self.inner_first = True
        else:
            self.first = True
            self.output = None

    # --- ends ---

    def end(self) -> None:
        result = self.result
        if result.action == "ok":
            self.end_ok()
        elif result.action == "bypass":
            why = ""
            if self.ste is not None:
                why = (
                    ": the STE bypasses both stages"
                    if self.ste["Config"] == 4
                    else ": without a substream, S1DSS bypasses stage 1"
                )
            self.say(f"Outcome: it passes untranslated, as {result.pa:#x}{why}.")
            self.say(f"Memory type: {result.memory_type}, {_SH[result.shareability]}.", 2)
        elif result.action == "disabled":
            self.say(f"Outcome: the SMMU is disabled (CR0.SMMUEN=0), it passes as {result.pa:#x}.")
            self.say(f"Memory type: {result.memory_type}, {_SH[result.shareability]} (GBPA).", 2)
        elif self.fault is None:
            self.say("Outcome: abort, without an event.")
            self.say(self.silent_reason(), 2)
        else:
            self.end_fault(self.fault)

    def end_ok(self) -> None:
        result = self.result
        lg2 = result.page_lg2 or 0
        offset = result.iova & ((1 << lg2) - 1)
        pa = result.pa or 0
        self.say(f"Outcome: physical address {pa:#x}.")
        self.say(
            f"It is {offset:#x} into the {_size(lg2)} "
            f"{'page' if result.level == 3 else 'block'} at {pa - offset:#x} "
            f"(level {result.level}).",
            2,
        )
        if result.stage == 3:
            if self.traced and self.inner_level is not None:
                inner = _shift(_s2_granule(self.ste or {}), self.inner_level)
                self.say(
                    f"Stage 1 maps {_size(self.page_lg2)}, stage 2 {_size(inner)}: the smaller "
                    "counts.",
                    2,
                )
            self.say(f"Stage 1 permits: {_permitted(result.perm_s1)}.", 2)
        self.say(f"Permitted: {_permitted(result.perm)}.", 2)
        if self.traced and self.two_ttbs and result.perm & (Perm.UW | Perm.PX) == Perm.UW:
            self.say("(What unprivileged code may write, privileged code may not execute.)", 2)
        self.say(f"Memory type: {memory_type(result.attr)}; {_SH[result.shareability]}.", 2)
        if self.traced and self.stage2:
            said = stage2_memory_type(self.inner >> 2 & 15, self.forced)
            other = "stage 1's" if self.stage1 else "what the device and the STE say"
            rule = "by S2FWB=1" if self.forced else f"of this and {other} the stricter counts"
            self.say(f"(Stage 2 says: {said}; {rule}.)", 2)

    def silent_reason(self) -> str:
        if self.ste is not None:
            return "The STE blocks the stream."
        if self.smmu is not None and not self.smmu.cr0 & 1:
            beyond = self.result.iova >> self.smmu.features.oas_bits
            what = (
                "the address is beyond the physical address size"
                if beyond
                else "GBPA.ABORT says so"
            )
            return f"The SMMU is disabled (CR0.SMMUEN=0), and {what}."
        if self.traced:
            return (
                "Nothing was read: the SMMU is disabled (CR0.SMMUEN=0), and GBPA.ABORT=1 or "
                "the address is beyond the physical address size."
            )
        return (
            "Either the STE blocks the stream, or the SMMU is disabled and GBPA.ABORT=1 or the "
            "address is beyond the physical address size."
        )

    def end_fault(self, fault: Event) -> None:
        fields = fault.fields
        what = {
            "raz_wi": "reads give zero, writes are ignored",
            "stall": "it stalls",
        }.get(self.result.action, "abort")
        if self.result.stag is not None:
            what += f" until a CMD_RESUME with STAG={self.result.stag:#x}"
        self.say(f"Outcome: {fault.name} ({_EVENTS.get(fault.name, 'a fault')}); {what}.")
        if self.traced:
            stage = "2" if self.stage2_fault else ""
            reasons: list[str] = getattr(self, f"why{stage}_{fault.name.lower()}", list)()
            for reason in reasons:
                self.say(f"Because {reason}.", 2)
        if "S2" in fields and (fields["S2"] or self.result.stage & 2):
            self.say(self.whose(fields), 2)
        if "PnU" in fields:
            what = "instruction" if fields["InD"] else "data"
            self.say(
                f"The access, after the STE's overrides: {_PNU[fields['PnU']]}, {what}, "
                f"{'read' if fields['RnW'] else 'write'}.",
                2,
            )
        if fault.name == "F_PERMISSION" and fields["CLASS"] == 2:
            if self.result.stage == 3 and fields["S2"]:
                self.say(f"Stage 1 permits: {_permitted(self.result.perm_s1)}.", 2)
            self.say(f"Permitted: {_permitted(self.result.perm)}.", 2)
        if control := self.control(fault):
            self.say(control, 2)
        if self.result.event is None:
            self.say(f"Nothing is recorded{self.unrecorded(fault)}.", 2)
            return
        self.say("The event record:", 2)
        for line in layout.format("EVENT", fault.record).splitlines():
            self.say(line, 4)

    def whose(self, fields: dict[str, int]) -> str:
        """Return which stage found a fault, and what for."""
        stage = 2 if fields["S2"] else 1
        text = f"Stage {stage} found it, for {_CLASSES[fields['CLASS']]}"
        if stage == 2 and (self.ipa is not None or "IPA" in fields):
            ipa = fields.get("IPA", 0) if self.ipa is None else self.ipa
            text += f", at IPA {ipa:#x}"
        kind = layout.EVENT.field("CLASS").name_of(fields["CLASS"]).partition(":")[0]
        return f"{text} (S2={fields['S2']}, CLASS={kind})."

    def control(self, fault: Event) -> str:
        """Return which control decided what becomes of a fault in translation (5.5)."""
        if fault.number < layout.Event.F_TRANSLATION or not self.traced:
            return ""
        if self.stage2_fault and self.ste is not None:
            r, stalls = self.ste["S2R"], self.ste["S2S"]
            text, ends = f"S2R={r}, S2S={stalls}", "abort"
        elif self.cd is not None:
            r, stalls = self.cd["R"], self.cd["S"]
            text, ends = f"A={self.cd['A']}, R={r}, S={stalls}", "abort"
            if not self.cd["A"]:
                ends = "read zero, ignore writes"
        else:
            return "An address that is too large for bypass always aborts, and is recorded."
        if stalls:
            return f"Fault control: {text}: stall, record an event."
        return f"Fault control: {text}: {ends}, {'record an event' if r else 'record nothing'}."

    def unrecorded(self, fault: Event) -> str:
        reasons = []
        if self.smmu is None or not self.smmu.cr0 & layout.REGISTERS["CR0"].field("EVENTQEN").mask:
            reasons.append("CR0.EVENTQEN=0")
        if fault.name == "C_BAD_STREAMID" and (self.smmu is None or not self.smmu.cr2 & 2):
            reasons.append("CR2.RECINVSID=0")
        if fault.number >= layout.Event.F_TRANSLATION:
            control, name = (self.ste, "S2R") if self.stage2_fault else (self.cd, "R")
            if not self.traced or (control is not None and not control[name]):
                reasons.append(f"{'STE' if self.stage2_fault else 'CD'}.{name}=0")
        if not reasons and self.result.action == "stall":
            reasons.append("as many stalls as STALL_MAX are recorded, or the event queue is full")
        elif not reasons:
            reasons.append("the event queue is full")
        return f" ({' or '.join(reasons)})"

    def aborted(self, fetched: str) -> list[str]:
        """Return why a read failed."""
        if self.fetches:
            last = self.fetches[-1]
            what = "read" if last.swap is None else "update"
            if last.data is None:
                return [
                    f"the {what} of the {fetched} at {last.address:#x} ended in an external abort"
                ]
            if last.swap is not None:
                return [f"the {fetched} at {last.address:#x} changed before each of many updates"]
        address = (self.fault.fetch_address if self.fault is not None else 0) or 0
        return [f"the {fetched} would lie at {address:#x}, beyond the physical address size"]

    def why_c_bad_streamid(self) -> list[str]:
        sid = self.result.sid
        if self.l1std is None:
            size = "2^LOG2SIZE"
            if self.smmu is not None:
                log2 = self.smmu.strtab_base_cfg & 63
                size = f"2^{min(log2, self.smmu.features.sidsize)}"
            return [
                f"StreamID {sid:#x} is not below {size}, the size of the stream table "
                "(STRTAB_BASE_CFG)"
            ]
        span = self.l1std["Span"]
        if span == 0 or span > 11:
            return [f"the level-1 descriptor has Span={span}: there is no level-2 table"]
        if self.smmu is not None:
            code = layout.unpack("STRTAB_BASE_CFG", self.smmu.strtab_base_cfg)["SPLIT"]
            split = code if code in (8, 10) else 6
            if span > split + 1:
                return [f"Span={span} is more than the {split} bits of SPLIT allow"]
            return [
                f"entry {sid & ((1 << split) - 1)} is beyond the level-2 table of "
                f"{1 << span - 1} entries"
            ]
        return [
            f"Span={span} is more than SPLIT+1, or the level-2 table of {1 << span - 1} "
            "entries ends before this StreamID"
        ]

    def why_f_ste_fetch(self) -> list[str]:
        return self.aborted("stream table entry or level-1 descriptor")

    def why_f_cd_fetch(self) -> list[str]:
        return self.aborted("context descriptor or level-1 descriptor")

    def why_f_walk_eabt(self) -> list[str]:
        return self.aborted("translation table descriptor")

    def why2_f_walk_eabt(self) -> list[str]:
        return self.aborted("stage-2 descriptor")

    def why2_f_translation(self) -> list[str]:
        if self.inner_level is not None:
            return [f"the level {self.inner_level} descriptor of stage 2 is invalid"]
        if self.ste is None or self.ipa is None:
            return []
        return [
            f"IPA {self.ipa:#x} is beyond the {64 - self.ste['S2T0SZ']} bits that stage 2 takes "
            f"(S2T0SZ={self.ste['S2T0SZ']})"
        ]

    def why2_f_addr_size(self) -> list[str]:
        if self.ste is None:
            return []
        size = _ips(self.ste["S2PS"], self.features)
        table = self.inner_level is not None and self.inner_level < 3 and self.inner & 2
        return [
            f"{'the next table' if table else 'the output'} of stage 2 is at "
            f"{self.inner_address:#x}, beyond the output size of {size} bits (S2PS, OAS)"
        ]

    def why2_f_access(self) -> list[str]:
        return ["the page's stage-2 descriptor has AF=0, and neither S2AFFD nor the SMMU sets it"]

    def why2_f_permission(self) -> list[str]:
        fields = {} if self.fault is None else self.fault.fields
        leaf = layout.unpack("PTE_S2", self.inner)
        ap = f"S2AP={_bits(leaf['S2AP'], 2)}"
        if fields.get("CLASS") != 2:
            what = _CLASSES[fields.get("CLASS", 3)]
            if fields.get("CLASS") == 1 and not fields.get("TTRnW"):
                return [f"the stage-1 descriptor is to be updated, and stage 2 has {ap}: no write"]
            if leaf["S2AP"] & 1:
                memory = stage2_memory_type(leaf["MemAttr"], self.forced)
                return [f"stage 2 makes it Device memory ({memory}), and S2PTW=1 forbids {what}"]
            return [f"{what} reads it, and stage 2 has {ap}: no read"]
        if fields.get("RnW") and fields.get("InD"):
            xn = f"XN={_bits(leaf['XN'], 2)}"
            if self.features is not None and not self.features.xnx:
                xn = f"XN[1]={leaf['XN1']}"
            return [f"stage 2 does not permit {self.access()}: {xn}"]
        return [f"stage 2 does not permit {self.access()}: {ap}"]

    def access(self) -> str:
        """Return the access in words, as it counts after the STE's overrides."""
        fields = {} if self.fault is None else self.fault.fields
        who = _PNU[fields.get("PnU", 0)]
        what = (
            "write"
            if not fields.get("RnW")
            else ("instruction read" if fields.get("InD") else "read")
        )
        return f"{'an' if who[0] == 'u' else 'a'} {who} {what}"

    def why_c_bad_ste(self) -> list[str]:
        if self.ste is None:
            return []
        if not self.ste["V"]:
            return ["it has V=0"]
        if self.features is None:
            names = ["Config", "EATS", "STRW", "S2VMID"]
            if self.ste["Config"] & 1:
                names += ["S1STALLD", "S1CDMax", "S1Fmt", "S1ContextPtr"]
            if self.ste["Config"] & 2:
                names += [*_S2_FLAGS, "S2TG", "S2T0SZ", "S2SL0", "S2PS", "S2TTB"]
            values = ", ".join(f"{name}={self.ste[name]:#x}" for name in names)
            return [
                "it asks for something that this SMMU does not have, or for nonsense: " + values
            ]
        return ste_faults(self.ste, self.features)

    def why_c_bad_cd(self) -> list[str]:
        if self.cd is None or self.ste is None:
            return []
        if not self.cd["V"]:
            return ["it has V=0"]
        if self.features is None:
            names = (
                "AA64",
                "S",
                "A",
                "ENDI",
                "HA",
                "HD",
                "ASID",
                "IPS",
                "TG0",
                "T0SZ",
                "TTB0",
                "TG1",
                "T1SZ",
                "TTB1",
            )
            values = ", ".join(f"{name}={self.cd[name]:#x}" for name in names)
            return [
                "it asks for something that this SMMU does not have, or for nonsense: " + values
            ]
        return cd_faults(self.cd, self.ste, self.features, self.two_ttbs)

    def why_c_bad_substreamid(self) -> list[str]:
        ste = self.ste
        if self.l1cd is not None:
            if not self.l1cd["V"]:
                return ["the level-1 context descriptor has V=0"]
            return [f"the leaf at {self.l1cd['L2Ptr']:#x} is beyond the physical address size"]
        if ste is None:
            return []
        if not ste["Config"] & 1:
            return ["a stream without stage 1 has no substreams"]
        if self.features is not None and not self.features.ssidsize:
            return ["this SMMU has no substreams (IDR1.SSIDSIZE=0)"]
        if not ste["S1CDMax"]:
            return ["the stream has no substreams (S1CDMax=0)"]
        return [
            f"substream {self.result.ssid or 0:#x} is not below 2^{ste['S1CDMax']}, the size "
            "of the table (S1CDMax)"
        ]

    def why_f_stream_disabled(self) -> list[str]:
        if self.ste is None:
            return []
        if self.result.ssid is None:
            return ["it has no substream, and S1DSS refuses such transactions"]
        return [
            "substream 0 may not be used: its descriptor is that of transactions without a "
            "substream (S1DSS=0b10)"
        ]

    def why_f_translation(self) -> list[str]:
        if self.level is not None:
            return [f"the level {self.level} descriptor is invalid"]
        if self.cd is None:
            return []
        cd, n = self.cd, self.half
        if cd[f"EPD{n}"] and self.two_ttbs:
            return [f"TTB{n} is disabled (EPD{n}=1)"]
        bits = 64 - cd[f"T{n}SZ"]
        top = 56 if cd[f"TBI{n}"] else 64
        upper = (self.result.iova & ((1 << top) - 1)) >> bits
        if upper != ((1 << max(top - bits, 0)) - 1 if n else 0):
            return [
                f"bits {top - 1} to {bits} of the address are not all {n}: it is outside the "
                f"{bits} bits that TTB{n} translates (T{n}SZ={cd[f'T{n}SZ']})"
            ]
        return [f"the access is unprivileged, and E0PD{n}=1"]

    def why_f_addr_size(self) -> list[str]:
        if self.cd is None or self.level is None:
            size = "" if self.features is None else f" of {self.features.oas_bits} bits"
            return [f"{self.result.iova:#x} is beyond the physical address size{size} (IDR5.OAS)"]
        lg2 = _granule(self.cd, self.half)
        ips = _ips(self.cd["IPS"], self.features)
        what = "the next table" if self.level < 3 and self.descriptor & 2 else "the output"
        return [
            f"{what} is at {self.address(self.descriptor, lg2):#x}, beyond the output size of "
            f"{ips} bits (IPS, OAS)"
        ]

    def why_f_access(self) -> list[str]:
        return ["the page's descriptor has AF=0, and neither AFFD nor the SMMU sets it"]

    def why_f_permission(self) -> list[str]:
        return [f"{self.access()} is not permitted"]


def _permitted(perm: Perm) -> str:
    """Return a permission mask in words."""
    words = ("read", "write", "execute")
    parts = []
    for who, shift in (("unprivileged", 0), ("privileged", 3)):
        may = [word for k, word in enumerate(words) if int(perm) >> shift + k & 1]
        parts.append(f"{who}: {', '.join(may) or 'nothing'}")
    return "; ".join(parts)


def explain(result: Result, smmu: Smmu | None = None) -> str:
    """Return a translation in words: each fetch decoded (if it was traced), then how it ended.

    Parameters
    ----------
    result : Result
        Of ``translate(..., trace=True)`` or of a resumable walk; without fetches only the end is
        told.
    smmu : Smmu, optional
        That made it.  With it, reasons that depend on the SMMU's features and registers are named;
        without it, what may have been the reason is said.

    Returns
    -------
    str
        Several lines.  Whatever the tables hold, nothing is raised.
    """
    return _Story(result, smmu).tell()
