"""Why something was refused: one name, one rule and one sentence for each refusal.

Sections: IHI 0070 3.3, 3.4, 3.9.1, 4.1, 5.1 to 5.4, 6.3, 7.3, 15; DDI 0487 D8.  No behaviour: each
rule of the compiled modules says by such a number that it refused, and whoever tells people about
it (`Result.explain`, `decode`, `streams`, `warnings`) reads the sentence here.

A number is the event that the refusal leads to (0: none) in its low byte, and above it a count.
Where the two stages, or the two halves of a context's address space, share a rule, their numbers
follow each other.

The generated file
------------------
``_facts/why.pxd`` holds the numbers for Cython.  After a change::

    python -m smmufast.why --write     # rewrites smmufast/_facts/why.pxd
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from smmufast import layout

if TYPE_CHECKING:
    from smmufast.features import Features

__all__ = ["Why"]


_FIELD = re.compile(r"\[([\w.]+)\]")


class Why(enum.IntEnum):
    """The reason of a refusal: a rule that was not met.

    Attributes
    ----------
    rule : str
        The row of docs/rules.md: S and a section of IHI 0070, or V and one of DDI 0487 D, and a
        number.
    text : str
        The reason as half a sentence; a name in brackets is a field whose value counts.
    """

    rule: str
    text: str
    _plain: str

    def __new__(cls, event: str, rule: str, text: str) -> Why:
        """Number a refusal: its event, and above it a count of that event's."""
        number = layout.Event[event].value if event else 0
        count = 1 + sum(other & 0xFF == number for other in cls._member_map_.values())  # type: ignore[operator]
        self = int.__new__(cls, number | count << 8)
        self._value_ = int(self)
        self.rule = rule
        self.text = text
        self._plain = _FIELD.sub(r"\1", text)
        return self

    # --- the SMMU is disabled ---
    GBPA_ABORT = "", "S3.11-3", "the SMMU is disabled (CR0.SMMUEN=0), and GBPA.ABORT=1"
    GBPA_ADDRESS = (
        "", "S3.4-4",
        "the SMMU is disabled (CR0.SMMUEN=0), and the address is beyond the physical address "
        "size (IDR5.OAS)",
    )
    # --- stream table ---
    STREAM_BEYOND = (
        "C_BAD_STREAMID", "S3.3.1-1",
        "[StreamID] is not below 2^LOG2SIZE, the size of the stream table (STRTAB_BASE_CFG)",
    )
    STREAM_NO_TABLE = (
        "C_BAD_STREAMID", "S5.1-1",
        "[Span] in the level-1 descriptor: there is no level-2 table",
    )
    STREAM_SPAN = (
        "C_BAD_STREAMID", "S5.1.1-1",
        "[Span] in the level-1 descriptor is reserved, or more than SPLIT+1 (STRTAB_BASE_CFG)",
    )
    STREAM_SHORT = (
        "C_BAD_STREAMID", "S3.3.1.2-3",
        "the level-2 table of 2^(Span-1) entries ends before this StreamID ([Span])",
    )
    L1STD_ADDRESS = (
        "F_STE_FETCH", "S3.4.3-5",
        "the level-1 stream table descriptor would lie beyond the physical address size "
        "(IDR5.OAS)",
    )
    L1STD_ABORT = (
        "F_STE_FETCH", "S7.3.4-1",
        "the read of the level-1 stream table descriptor ended in an external abort",
    )
    STE_ADDRESS = (
        "F_STE_FETCH", "S3.4.3-5",
        "the stream table entry would lie beyond the physical address size (IDR5.OAS)",
    )
    STE_ABORT = (
        "F_STE_FETCH", "S7.3.4-1",
        "the read of the stream table entry ended in an external abort",
    )
    # --- stream table entry ---
    STE_V = "C_BAD_STE", "S5.2-1", "the stream table entry has V=0"
    STE_CONFIG = "", "S5.2-2", "the stream table entry blocks the stream ([Config])"
    STE_S1P = (
        "C_BAD_STE", "S5.2-7",
        "[Config] asks for stage 1, which this SMMU does not have (IDR0.S1P=0)",
    )
    STE_S2P = (
        "C_BAD_STE", "S5.2-7",
        "[Config] asks for stage 2, which this SMMU does not have (IDR0.S2P=0)",
    )
    STE_EATS_STAGES = (
        "C_BAD_STE", "S5.2-37",
        "[EATS] (split-stage ATS) needs both stages ([Config])",
    )
    STE_EATS_NS1ATS = (
        "C_BAD_STE", "S5.2-37",
        "[EATS], but this SMMU has no split-stage ATS (IDR0.NS1ATS=1)",
    )
    STE_EATS_S2S = "C_BAD_STE", "S5.2-36", "[EATS], but stage 2 stalls ([S2S])"
    STE_STRW = "C_BAD_STE", "S5.2-43", "[STRW] is reserved for a Non-secure stream"
    STE_S1STALLD = (
        "C_BAD_STE", "S5.2-33",
        "[S1STALLD], but this SMMU has no choice to stall ([IDR0.STALL_MODEL])",
    )
    STE_S1CDMAX = (
        "C_BAD_STE", "S5.2-18",
        "[S1CDMax] is more than the SubstreamID has bits ([IDR1.SSIDSIZE])",
    )
    STE_CD2L = (
        "C_BAD_STE", "S5.2-12",
        "[S1Fmt] asks for a two-level CD table, which this SMMU does not have (IDR0.CD2L=0)",
    )
    STE_S1CONTEXTPTR = (
        "C_BAD_STE", "S3.4.3-1",
        "[S1ContextPtr] is beyond the physical address size (IDR5.OAS)",
    )
    STE_S2VMID = "C_BAD_STE", "S5.2-56", "[S2VMID]: this SMMU has 8-bit VMIDs (IDR0.VMID16=0)"
    STE_S2AA64 = (
        "C_BAD_STE", "S5.2-68",
        "S2AA64=0: VMSAv8-32 tables, which this SMMU does not have (IDR0.TTF)",
    )
    STE_S2S_NEVER = (
        "C_BAD_STE", "S5.2.2-2",
        "S2S=1, but this SMMU never stalls (IDR0.STALL_MODEL=1)",
    )
    STE_S2S_ALWAYS = (
        "C_BAD_STE", "S5.2.2-2",
        "S2S=0, but this SMMU always stalls (IDR0.STALL_MODEL=2)",
    )
    STE_S2ENDI = (
        "C_BAD_STE", "S5.2-70",
        "[S2ENDI]: this SMMU reads tables of the other endianness only ([IDR0.TTENDIAN])",
    )
    STE_S2HTTU = (
        "C_BAD_STE", "S5.2-75",
        "[S2HA], [S2HD]: this SMMU does not update tables so ([IDR0.HTTU])",
    )
    STE_S2TG = (
        "C_BAD_STE", "S5.2-65",
        "[S2TG] is reserved or a granule that this SMMU does not have (IDR5)",
    )
    STE_S2T0SZ = (
        "C_BAD_STE", "S5.2-60",
        "[S2T0SZ] is not within what this granule and this SMMU allow",
    )
    STE_S2SL0 = (
        "C_BAD_STE", "S5.2-61",
        "[S2SL0], [S2SL0_2] are reserved for this granule on this SMMU",
    )
    STE_S2SL0_SIZE = (
        "C_BAD_STE", "S5.2-61",
        "[S2T0SZ] does not go with a start at the level of [S2SL0]",
    )
    STE_S2TTB = (
        "C_BAD_STE", "S5.2-82",
        "[S2TTB] is beyond the output size of stage 2 ([S2PS], IDR5.OAS)",
    )
    STE_S2TTB_48 = (
        "C_BAD_STE", "S5.2-82",
        "[S2TTB] is beyond the 48 bits of this granule without S2DS",
    )
    # --- substreams and context descriptor tables ---
    SUBSTREAM_NO_STAGE1 = (
        "C_BAD_SUBSTREAMID", "S3.3.2-2",
        "a stream without stage 1 has no substreams ([Config])",
    )
    SUBSTREAM_NO_TABLE = (
        "C_BAD_SUBSTREAMID", "S3.3.2-3",
        "the stream has no substreams ([S1CDMax], [IDR1.SSIDSIZE])",
    )
    SUBSTREAM_BEYOND = (
        "C_BAD_SUBSTREAMID", "S5.2-17",
        "[SubstreamID] is not below 2^S1CDMax, the size of the CD table ([S1CDMax])",
    )
    SUBSTREAM_0 = (
        "F_STREAM_DISABLED", "S3.3.2-7",
        "substream 0 may not be used: its descriptor is that of transactions without a "
        "substream ([S1DSS])",
    )
    SUBSTREAM_WANTED = (
        "F_STREAM_DISABLED", "S3.3.2-4",
        "it has no substream, and [S1DSS] refuses such transactions",
    )
    L1CD_V = "C_BAD_SUBSTREAMID", "S5.3-1", "the level-1 context descriptor has V=0"
    L1CD_L2PTR = (
        "C_BAD_SUBSTREAMID", "S5.3-3",
        "[L2Ptr] of the level-1 context descriptor is beyond the physical address size "
        "(IDR5.OAS)",
    )
    L1CD_ADDRESS = (
        "F_CD_FETCH", "S7.3.10-1",
        "the level-1 context descriptor would lie beyond the physical address size (IDR5.OAS)",
    )
    L1CD_ABORT = (
        "F_CD_FETCH", "S7.3.10-1",
        "the read of the level-1 context descriptor ended in an external abort",
    )
    CD_ADDRESS = (
        "F_CD_FETCH", "S7.3.10-1",
        "the context descriptor would lie beyond the physical address size (IDR5.OAS)",
    )
    CD_ABORT = (
        "F_CD_FETCH", "S7.3.10-1",
        "the read of the context descriptor ended in an external abort",
    )
    # --- context descriptor ---
    CD_V = "C_BAD_CD", "S5.4-1", "the context descriptor has V=0"
    CD_S_NEVER = "C_BAD_CD", "S5.4.2-2", "S=1, but this SMMU never stalls (IDR0.STALL_MODEL=1)"
    CD_S_ALWAYS = "C_BAD_CD", "S5.4.2-2", "S=0, but this SMMU always stalls (IDR0.STALL_MODEL=2)"
    CD_S_S1STALLD = "C_BAD_CD", "S3.12-7", "S=1, but the stream may not stall (STE.S1STALLD=1)"
    CD_A = "C_BAD_CD", "S5.4.2-3", "A=0, but this SMMU cannot read as zero (IDR0.TERM_MODEL=1)"
    CD_AA64 = (
        "C_BAD_CD", "S5.4-20",
        "AA64=0: VMSAv8-32 tables, which this SMMU does not have (IDR0.TTF)",
    )
    CD_ENDI = (
        "C_BAD_CD", "S5.4-11",
        "[ENDI]: this SMMU reads tables of the other endianness only ([IDR0.TTENDIAN])",
    )
    CD_HTTU = "C_BAD_CD", "S5.4-23", "[HA], [HD]: this SMMU does not update tables so ([IDR0.HTTU])"
    CD_ASID = "C_BAD_CD", "S5.4-26", "[ASID]: this SMMU has 8-bit ASIDs (IDR0.ASID16=0)"
    CD_TG0 = (
        "C_BAD_CD", "S5.4-6",
        "[TG0] is reserved or a granule that this SMMU does not have (IDR5)",
    )
    CD_TG1 = (
        "C_BAD_CD", "S5.4-6",
        "[TG1] is reserved or a granule that this SMMU does not have (IDR5)",
    )
    CD_T0SZ = "C_BAD_CD", "S5.4-5", "[T0SZ] is not within what this granule and this SMMU allow"
    CD_T1SZ = "C_BAD_CD", "S5.4-5", "[T1SZ] is not within what this granule and this SMMU allow"
    CD_TTB0 = "C_BAD_CD", "S5.4-31", "[TTB0] is beyond the output size of stage 1 ([IPS], IDR5.OAS)"
    CD_TTB1 = "C_BAD_CD", "S5.4-31", "[TTB1] is beyond the output size of stage 1 ([IPS], IDR5.OAS)"
    CD_TTB0_48 = "C_BAD_CD", "S5.4-31", "[TTB0] is beyond the 48 bits of this granule without DS"
    CD_TTB1_48 = "C_BAD_CD", "S5.4-31", "[TTB1] is beyond the 48 bits of this granule without DS"
    # --- the input address ---
    BYPASS_ADDRESS = (
        "F_ADDR_SIZE", "S3.4-9",
        "no stage 1 translates the address, and it is beyond the physical address size "
        "(IDR5.OAS)",
    )
    EPD0 = "F_TRANSLATION", "S5.4-9", "TTB0 is disabled (EPD0=1)"
    EPD1 = "F_TRANSLATION", "S5.4-9", "TTB1 is disabled (EPD1=1)"
    T0SZ_RANGE = (
        "F_TRANSLATION", "S3.4-6",
        "the address is outside of the 64-T0SZ bits that TTB0 translates ([T0SZ], [TBI0])",
    )
    T1SZ_RANGE = (
        "F_TRANSLATION", "S3.4-6",
        "the address is outside of the 64-T1SZ bits that TTB1 translates ([T1SZ], [TBI1])",
    )
    E0PD0 = "F_TRANSLATION", "S5.4-28", "the access is unprivileged, and E0PD0=1"
    E0PD1 = "F_TRANSLATION", "S5.4-28", "the access is unprivileged, and E0PD1=1"
    S2T0SZ_RANGE = (
        "F_TRANSLATION", "S3.4-13",
        "the IPA is outside of the 64-S2T0SZ bits that stage 2 takes ([S2T0SZ])",
    )
    # --- translation tables ---
    S1_INVALID = (
        "F_TRANSLATION", "V8.3-1",
        "the stage-1 descriptor ([Level]) is invalid: its bit 0 is 0",
    )
    S2_INVALID = (
        "F_TRANSLATION", "V8.3-1",
        "the stage-2 descriptor ([Level]) is invalid: its bit 0 is 0",
    )
    S1_RESERVED = (
        "F_TRANSLATION", "V8.3-1",
        "the level [Level] descriptor of stage 1 is a block, which its granule does not have "
        "there",
    )
    S2_RESERVED = (
        "F_TRANSLATION", "V8.3-1",
        "the level [Level] descriptor of stage 2 is a block, which its granule does not have "
        "there",
    )
    S1_TABLE = (
        "F_ADDR_SIZE", "S5.4-13",
        "the next table of stage 1 is beyond the output size ([IPS], IDR5.OAS)",
    )
    S2_TABLE = (
        "F_ADDR_SIZE", "S5.2-67",
        "the next table of stage 2 is beyond the output size ([S2PS], IDR5.OAS)",
    )
    S1_OUTPUT = (
        "F_ADDR_SIZE", "S3.4-8",
        "the output of stage 1 is beyond the output size ([IPS], IDR5.OAS)",
    )
    S2_OUTPUT = (
        "F_ADDR_SIZE", "S3.4-17",
        "the output of stage 2 is beyond the output size ([S2PS], IDR5.OAS)",
    )
    S1_AF = (
        "F_ACCESS", "S3.13.1-1",
        "the page's stage-1 descriptor has AF=0, and neither AFFD nor the SMMU sets it",
    )
    S2_AF = (
        "F_ACCESS", "S5.2-71",
        "the page's stage-2 descriptor has AF=0, and neither S2AFFD nor the SMMU sets it",
    )
    S1_PERMISSION = "F_PERMISSION", "S7.3.16-1", "stage 1 does not permit the access"
    S2_PERMISSION = "F_PERMISSION", "S7.3.16-1", "stage 2 does not permit the access"
    S2_DEVICE = (
        "F_PERMISSION", "S5.2-72",
        "stage 2 makes it Device memory, where stage 1 and CDs may not be read (S2PTW=1)",
    )
    S2_UPDATE = (
        "F_PERMISSION", "S3.13.5-1",
        "the stage-1 descriptor is to be updated, and stage 2 does not permit to write it",
    )
    S1_ABORT = (
        "F_WALK_EABT", "S7.3.12-2",
        "the read of a stage-1 descriptor ended in an external abort",
    )
    S2_ABORT = (
        "F_WALK_EABT", "S7.3.12-3",
        "the read of a stage-2 descriptor ended in an external abort",
    )
    S1_UPDATE_ABORT = (
        "F_WALK_EABT", "S7.3.12-1",
        "the update of a stage-1 descriptor ended in an external abort",
    )
    S2_UPDATE_ABORT = (
        "F_WALK_EABT", "S7.3.12-1",
        "the update of a stage-2 descriptor ended in an external abort",
    )
    S1_UPDATE_RACE = (
        "F_WALK_EABT", "V8.5.4-1",
        "the stage-1 descriptor changed before each of many updates",
    )
    S2_UPDATE_RACE = (
        "F_WALK_EABT", "V8.5.4-1",
        "the stage-2 descriptor changed before each of many updates",
    )
    # --- ATS ---
    ATS_ABSENT = "", "S3.9.1-1", "this SMMU has no ATS (IDR0.ATS=0)"
    ATS_DISABLED = (
        "F_BAD_ATS_TREQ", "S6.3.9.6-3",
        "a translation request while the SMMU is disabled (CR0.SMMUEN=0)",
    )
    ATS_EATS = (
        "F_BAD_ATS_TREQ", "S7.3.6-1",
        "a translation request, and the stream does not allow ATS ([EATS], [Config], "
        "CR0.ATSCHK)",
    )
    TRANSLATED_DISABLED = (
        "F_TRANSL_FORBIDDEN", "S6.3.9.6-6",
        "a Translated transaction while the SMMU is disabled (CR0.SMMUEN=0)",
    )
    TRANSLATED_EATS = (
        "F_TRANSL_FORBIDDEN", "S7.3.8-1",
        "a Translated transaction, and the stream does not allow ATS ([EATS], [Config])",
    )
    TRANSLATED_ADDRESS = (
        "", "S3.9.1.1-1",
        "a Translated transaction beyond the physical address size (IDR5.OAS)",
    )
    # --- commands ---
    CMD_RESERVED = "", "S4.1.1-2", "the opcode is reserved"
    CMD_IMPDEF = "", "S4.1.1-3", "the opcode is implementation defined"
    CMD_SECURE = "", "S4.1.3-2", "it belongs to the Secure queue, which this is not"
    CMD_MPAM = "", "S4.1.3-2", "it needs MPAM (IDR3.MPAM), which is not modelled"
    CMD_DPT = "", "S4.1.3-2", "it needs a device permission table (IDR3.DPT), which is not modelled"
    CMD_S1P = "", "S4.1.3-2", "it needs stage 1 (IDR0.S1P=0)"
    CMD_S2P = "", "S4.1.3-2", "it needs stage 2 (IDR0.S2P=0)"
    CMD_HYP = "", "S4.1.3-2", "it needs EL2 streams (IDR0.HYP=0)"
    CMD_ATS = "", "S4.5.1-7", "it needs ATS (IDR0.ATS=0)"
    CMD_PRI = "", "S4.5.2-4", "it needs page requests (IDR0.PRI=0)"
    CMD_STALL = "", "S4.7.1-6", "it needs stalls (IDR0.STALL_MODEL=1)"
    CMD_SSEC = "", "S4.1.6-2", "SSec=1: a Secure stream"
    CMD_CS = "", "S4.7.3-8", "CS=0b11 is reserved"
    CMD_RESP = "", "S4.5.2-2", "Resp=0b11 is reserved"
    CMD_SIZE = "", "S4.5.1-3", "[Size] is more than 52, which is everything"
    CMD_RANGE = "", "S4.4.1.1-10", "TG asks for a range, but NUM, SCALE and TTL are 0"

    @property
    def section(self) -> str:
        """Where the rule stands: in IHI 0070, or with a D in DDI 0487."""
        return self.rule.rpartition("-")[0].replace("V", "D").removeprefix("S")

    @property
    def event(self) -> layout.Event | None:
        """The event that the refusal leads to; None where it has none."""
        return layout.Event(self & 0xFF) if self & 0xFF else None

    def sentence(
        self, fields: Mapping[str, int] | None = None, features: Features | None = None
    ) -> str:
        """Return the reason in words, with the values of what is known.

        Parameters
        ----------
        fields : mapping of str to int, optional
            Of the structures that were read, by the names of the architecture.
        features : Features, optional
            Of the SMMU that refused.

        >>> Why.STE_S1CDMAX.sentence({"S1CDMax": 9})
        'S1CDMax=9 is more than the SubstreamID has bits (IDR1.SSIDSIZE)'
        """
        if not fields and features is None:
            return self._plain

        def named(found: re.Match[str]) -> str:
            name = found[1]
            value = (fields or {}).get(name)
            if "." in name and features is not None:
                value = getattr(features, name.partition(".")[2].lower())
            return name if value is None else f"{name}={_value(name, value)}"

        return _FIELD.sub(named, self.text)


_FIELDS = {
    field.name: field
    for record in ("CMD", "L1CD", "L1STD", "CD", "STE")
    for field in layout.record(record).fields
}


def _value(name: str, value: int) -> str:
    """Return a value as the architecture writes it: codes in binary, addresses and IDs in hex."""
    field = _FIELDS.get(name)
    if field is not None and field.width > 1 and field.values:
        return f"0b{value:0{field.width}b}"
    if field is not None and (field.address or field.width >= 8):
        return f"{value:#x}"
    return str(value)


# --- the generated Cython declarations -----------------------------------------------------------

_HEADER = '''\
# Generated by "python -m smmufast.why --write" from why.py; do not edit.

cdef inline int why_event(int why) noexcept nogil:
    """The number of the event that a refusal leads to; 0 where it has none."""
    return why & 0xFF


cdef enum:
'''


def _pxd() -> str:
    """Return the text of _facts/why.pxd."""
    return _HEADER + "".join(f"    WHY_{why.name} = {why.value:#x}\n" for why in Why)


def _main(arguments: list[str]) -> None:
    from pathlib import Path

    if arguments not in ([], ["--write"]):
        raise SystemExit("usage: python -m smmufast.why [--write]")
    if arguments:
        Path(__file__).parent.joinpath("_facts/why.pxd").write_text(_pxd(), encoding="utf-8")
    else:
        print(_pxd(), end="")


if __name__ == "__main__":
    import sys

    _main(sys.argv[1:])
