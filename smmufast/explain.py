"""explain(): a translation in words, each fetch decoded, then how it ended.

Sections: IHI 0070 3.3 (stream and CD tables), 5 (STE, CD), 7.3 (events); DDI 0487 D8
(translation tables).  The words follow what the translation found; where it was refused, the reason
is the one that the rule gave (`Result.why`).

Where stage 2 translates, each structure that stage 1 reads lies at an IPA: its stage-2 walk is
told before it and indented, under the number of the step that needs it.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from smmufast import layout
from smmufast._arguments import must_be
from smmufast.faults import Event, Fetch, Perm

if TYPE_CHECKING:
    from smmufast._device.smmu import Result, Smmu
    from smmufast.features import Features

__all__ = ["describe_cd", "describe_ste", "explain"]

_U64 = (1 << 64) - 1
_REC_CFG_ATS = layout.mask("CR2", "REC_CFG_ATS")
_RECINVSID = layout.mask("CR2", "RECINVSID")
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


def _span(high: int, low: int) -> str:
    return f"bits {high} to {low}" if high > low else f"bit {low}"


def descriptor_address(d: int, lg2: int, ds: bool) -> int:
    """Return the address bits of a descriptor whose granule is 2^lg2 bytes (DDI 0487 D8.3)."""
    name = {12: "Addr_4K", 14: "Addr_16K"}.get(lg2, "Addr_64K")
    high, at = ("Addr51_48", 48) if lg2 == 16 else ("Addr51_50", 50)
    if ds and lg2 != 16:
        name += "_DS"
    found = d & layout.PTE_S1.field(name).mask
    if ds or lg2 == 16:
        field = layout.PTE_S1.field(high)
        found |= (d & field.mask) >> field.lsb << at
    return found


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


# --- sizes ----------------------------------------------------------------------------------------


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


def _shift(lg2: int, level: int) -> int:
    """Return log2 of what an entry of a level covers."""
    return lg2 + (3 - level) * (lg2 - 3)


def _first_level(lg2: int, bits: int) -> int:
    """Return the level at which stage 1 starts, given the bits of its input."""
    return 4 - -(-(bits - lg2) // (lg2 - 3))


def _s2_ds(ste: dict[str, int], features: Features | None) -> bool:
    return bool(ste["S2DS"] and (features is None or features.ds) and _s2_granule(ste) != 16)


def _granule(cd: dict[str, int], half: int) -> int:
    """Return log2 of a half's granule, 0 for a reserved code."""
    name = layout.CD.field(f"TG{half}").name_of(cd[f"TG{half}"])
    return _GRANULE.get(name, 0)


def _s2_granule(ste: dict[str, int]) -> int:
    """Return log2 of the granule of stage 2, 0 for a reserved code."""
    return _GRANULE.get(layout.STE.field("S2TG").name_of(ste["S2TG"]), 0)


def _ds(cd: dict[str, int], features: Features | None) -> bool:
    return bool(cd["DS"] and (features is None or features.ds))


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
        """Begin with a result; what its fetches say is taken as they are told."""
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
        """Return the whole chain in words."""
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
        """Tell one fetch: a step, or within one where stage 2 serves it."""
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
        """Tell a stream table entry."""
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
        """Tell what an STE says of stage 1."""
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
        """Tell what an STE says of stage 2."""
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
            level = next((fetch.level for fetch in self.fetches if fetch.kind == "S2TT"), None)
            code = _bits(ste["S2SL0"], 2) + (", S2SL0_2=1" if ste["S2SL0_2"] else "")
            more = "codes the level at which its walk starts"
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
        return not self.smmu.features.hyp or bool(self.smmu.cr2 & layout.mask("CR2", "E2H"))

    @property
    def half(self) -> int:
        return self.result.iova >> 55 & 1 if self.two_ttbs else 0

    def tell_cd(self, i: int, fetch: Fetch) -> None:
        """Tell a context descriptor."""
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
        """Tell a descriptor of stage 1."""
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
        return descriptor_address(d, lg2, self.cd is not None and _ds(self.cd, self.features))

    def tell_table(self, i: int, d: int, lg2: int) -> None:
        """Tell a descriptor of stage 1 that names the next table."""
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
        """Tell a page or a block of stage 1."""
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
        if fields["Contiguous"] and self.page_lg2 < 36:  # RES0 in the largest blocks
            self.field("Contiguous", "1", "one of a group that a TLB may keep as one")

    # --- stage 2 ---

    def tell_s2tt(self, i: int, fetch: Fetch) -> None:
        """Tell a descriptor of stage 2."""
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
        return descriptor_address(self.inner, _s2_granule(ste), _s2_ds(ste, self.features))

    def tell_stage2_leaf(self, kind: str, shift: int) -> None:
        """Tell a page or a block of stage 2."""
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
        if fields["Contiguous"] and shift < 36:  # RES0 in the largest blocks
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
        """Tell a hardware update of a descriptor."""
        stage = 2 if fetch.kind == "S2TT update" else 1
        expected, desired = (
            self.number(word.to_bytes(8, "little"), stage) for word in fetch.swap or (0, 0)
        )
        self.say(f"{expected:#018x} becomes {desired:#018x}", 5)
        prefix = "S2" if stage == 2 else ""
        if (expected ^ desired) & layout.mask("PTE_S1", "AF"):
            self.field("AF", "1", f"set, because the page is used ({prefix}HA=1)")
        if (expected ^ desired) & layout.mask("PTE_S1", "AP2"):
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
        """Tell how the transaction ended."""
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
            self.say(self.reason, 2)
        else:
            self.end_fault(self.fault)

    def end_ok(self) -> None:
        """Tell a translation that succeeded."""
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
            code = layout.unpack("PTE_S2", self.inner)["MemAttr"]
            said = stage2_memory_type(code, self.forced)
            other = "stage 1's" if self.stage1 else "what the device and the STE say"
            rule = "by S2FWB=1" if self.forced else f"of this and {other} the stricter counts"
            self.say(f"(Stage 2 says: {said}; {rule}.)", 2)

    @property
    def reason(self) -> str:
        """Why it was refused, with the values of what was read."""
        result = self.result
        if result.why is None:
            return ""
        known = {"StreamID": result.sid, "SubstreamID": result.ssid or 0}
        for fields in (self.l1std, self.ste, self.l1cd, self.cd):
            known |= fields or {}
        level = self.inner_level if self.stage2_fault else self.level
        if level is not None:
            known["Level"] = level
        return f"Because {result.why.sentence(known, self.features)} ({result.why.rule})."

    def end_fault(self, fault: Event) -> None:
        """Tell a fault, its record and its reason."""
        fields = fault.fields
        what = {
            "raz_wi": "reads give zero, writes are ignored",
            "stall": "it stalls",
        }.get(self.result.action, "abort")
        if self.result.stag is not None:
            what += f" until a CMD_RESUME with STAG={self.result.stag:#x}"
        self.say(f"Outcome: {fault.name}; {what}.")
        self.say(self.reason, 2)
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
        """Say why a fault has no record."""
        reasons = []
        if self.smmu is None or not self.smmu.cr0 & layout.mask("CR0", "EVENTQEN"):
            reasons.append("CR0.EVENTQEN=0")
        if fault.name == "C_BAD_STREAMID" and (self.smmu is None or not self.smmu.cr2 & _RECINVSID):
            reasons.append("CR2.RECINVSID=0")
        if fault.number >= layout.Event.F_TRANSLATION:
            control, name = (self.ste, "S2R") if self.stage2_fault else (self.cd, "R")
            if not self.traced or (control is not None and not control[name]):
                reasons.append(f"{'STE' if self.stage2_fault else 'CD'}.{name}=0")
        if not reasons and self.result.action == "stall":
            reasons.append("as many stalls as STALL_MAX are recorded, or the event queue is full")
        elif not reasons:
            reasons.append("the event queue is full")
            known = self.smmu is not None and self.smmu.cr2 & _REC_CFG_ATS
            if fault.number < layout.Event.F_TRANSLATION and not known:
                reasons.append("of a Translated transaction: CR2.REC_CFG_ATS=0")
        return f" ({' or '.join(reasons)})"


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
        That made it.  With it, the values of its features are told beside the reason.

    Returns
    -------
    str
        Several lines.  Whatever the tables hold, nothing is raised, and no walk is without end.

    Raises
    ------
    TypeError
        `result` is no Result, or `smmu` no Smmu.
    """
    from smmufast._device.smmu import Result, Smmu

    if not isinstance(result, Result):
        raise TypeError(must_be("result", "a Result", result))
    if smmu is not None and not isinstance(smmu, Smmu):
        raise TypeError(must_be("smmu", "a Smmu or None", smmu))
    return _Story(result, smmu).tell()
