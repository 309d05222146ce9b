"""decode(): records and log lines in words: what happened, what it means, what to look at.

Sections: IHI 0070 4 (commands), 5 (STE, CD), 6.3 (GERROR, CMDQ_CONS), 7.3 (events), 8.1 (page
requests); DDI 0487 D8.3 (translation table descriptors).  Logs are read in `smmufast._log`.

Positions are those of `smmufast.layout`.  Why a command or a structure is refused is asked of an
SMMU with the features that are given (`Why`).
"""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smmufast import layout
from smmufast._arguments import in_words, integer, must_be, one_of
from smmufast._files import as_number
from smmufast.faults import Event

if TYPE_CHECKING:
    from smmufast._device.smmu import Smmu
    from smmufast.features import Features
    from smmufast.why import Why

__all__ = ["KINDS", "DecodeError", "Decoded", "command_why", "decode"]

KINDS = ("event", "command", "pri", "ste", "cd", "l1std", "l1cd", "pte")
"""Kinds of record that `decode` knows by name."""

_RECORDS = {
    "event": "EVENT", "command": "CMD", "pri": "PRI", "ste": "STE", "cd": "CD", "l1std": "L1STD",
    "l1cd": "L1CD",
}  # fmt: skip
MOST = 100_000
"""Findings that `decode` returns, unless told otherwise."""
MOST_WORDS = 1 << 22
"""Numbers of a text."""
GRANULES = {"4K": 12, "16K": 14, "64K": 16}
_U64 = (1 << 64) - 1


class DecodeError(ValueError):
    """What cannot be decoded: the message says what was given and what is wanted."""

    def __init__(self, problem: str) -> None:
        """Take the message."""
        super().__init__(problem)


@dataclass(frozen=True)
class Decoded:
    """One record or one message, in words; ``str()`` shows all of it.

    Attributes
    ----------
    kind : str
        One of KINDS; or "gerror", "cmdq_error", "sync_timeout", "overflow" (messages of a
        driver), "trace" (a line of QEMU's trace that is none of these), "limit" (the last one of
        a log that holds more than was asked for: its line is the first that was not looked at).
    name : str
        Name of the event, command, structure or message.
    text : str
        What happened, in a few words.
    meaning : tuple of str
        The rule behind it, a sentence each.
    check : tuple of str
        What to look at.
    fields : dict of str to int
        Fields by the names of the architecture, addresses in place; for a trace, the values
        under the names that it prints.
    record : bytes or None
        The record in memory order; None where only a message tells of it.
    told : bool
        Whether it was put together from a message in words, or from a record that is cut off:
        some bits are not known.
    line : int or None
        Number of the line of text, from 1.
    source, client : str
        The SMMU that printed it, and the device that it names; empty where there is none.
    """

    kind: str
    name: str
    text: str
    meaning: tuple[str, ...] = ()
    check: tuple[str, ...] = ()
    fields: dict[str, int] = field(default_factory=dict)
    record: bytes | None = None
    told: bool = False
    line: int | None = None
    source: str = ""
    client: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values; the record in hexadecimal."""
        return {
            "kind": self.kind,
            "name": self.name,
            "text": self.text,
            "meaning": list(self.meaning),
            "check": list(self.check),
            "fields": self.fields,
            "record": None if self.record is None else self.record.hex(),
            "told": self.told,
            "line": self.line,
            "source": self.source,
            "client": self.client,
        }

    def _repr_html_(self) -> str:
        from smmufast._html import lines

        return lines(str(self))

    def __str__(self) -> str:
        """Heading, meaning, what to check, and every field of the record."""
        lines = _wrap(f"{self.name}: {self.text}", 0)
        origin = [f"line {self.line}"] if self.line is not None else []
        origin += [f"reported by {self.source}"] if self.source else []
        origin += [f"client {self.client}"] if self.client else []
        if origin:
            lines += _wrap("(" + ", ".join(origin) + ")", 2)
        for sentence in self.meaning:
            lines += _wrap(sentence, 2)
        for sentence in self.check:
            lines += _wrap(f"Check {sentence}.", 2)
        if self.record is not None:
            if self.told:
                lines.append("  The record, as far as the message tells it:")
            lines += ["  " + line for line in _table(self)]
        return "\n".join(lines)


def _wrap(text: str, indent: int) -> list[str]:
    start = " " * indent
    return textwrap.wrap(
        text,
        100,
        initial_indent=start,
        subsequent_indent=start + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _table(decoded: Decoded) -> list[str]:
    """Return the fields of a record, a line each."""
    name = decoded.name if decoded.kind == "pte" else _RECORDS[decoded.kind]
    lines = layout.format(name, decoded.record).split("\n")[1:]
    if decoded.kind == "pte":  # the address stands above, once
        lines = [line for line in lines if not line.endswith("(alternative)")]
    return lines


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _size(size: int) -> str:
    """Return a number of bytes, as 4 KiB or 2 MiB."""
    for lg2, unit in ((50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >> lg2 and not size & ((1 << lg2) - 1):
            return f"{size >> lg2} {unit}"
    return f"{size} B"


# --- events ---------------------------------------------------------------------------------------

_INVALIDATED = (
    "that the change of the tables was followed by the invalidation it needs (CFGI_*, TLBI_*) and "
    "a SYNC"
)
EVENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "F_UUT": (
        "The device made a kind of transaction that the SMMU or its interconnect does not support.",
        ("what the implementation's manual says of this Reason",),
    ),
    "C_BAD_STREAMID": (
        "The stream table has no entry for this StreamID: it is beyond STRTAB_BASE_CFG.LOG2SIZE, "
        "or its level-1 descriptor (L1STD) leads to no table or to a smaller one (Span).",
        (
            "that the device really sends the StreamID that firmware describes (iommu-map, IORT)",
            "Span and L2Ptr of the L1STD of this StreamID",
        ),
    ),
    "F_STE_FETCH": (
        "The stream table could not be read: the read ended in an external abort.",
        ("that FetchAddr is memory that the SMMU may read (STRTAB_BASE, L1STD.L2Ptr)",),
    ),
    "C_BAD_STE": (
        "The stream table entry is invalid (V=0), or illegal for this SMMU: a feature that it does "
        "not have, a reserved code, or an address or size out of range.",
        (
            "the 64 bytes of the entry: smmufast decode --kind ste",
            "that CFGI_STE and a SYNC followed the last change of the entry",
        ),
    ),
    "F_BAD_ATS_TREQ": (
        "The device asked for a translation (ATS), which its stream does not allow: STE.EATS is "
        "off, the stream is bypassed, or the SMMU is disabled.",
        ("STE.EATS, and whether ATS was enabled in the device by somebody else",),
    ),
    "F_STREAM_DISABLED": (
        "The stream refuses this transaction: it had no substream where STE.S1DSS=0b00 wants one, "
        "or it used substream 0 where STE.S1DSS=0b10 keeps that for transactions without one.",
        ("STE.S1DSS and S1CDMax, and whether the device was told to send a PASID",),
    ),
    "F_TRANSL_FORBIDDEN": (
        "The device sent an address as already translated (ATS), which its stream does not allow.",
        ("STE.EATS and CR0.ATSCHK, and whether the device may be trusted with ATS",),
    ),
    "C_BAD_SUBSTREAMID": (
        "The stream has no such substream: it is beyond STE.S1CDMax, the stream has no substreams "
        "at all, or the level-1 descriptor (L1CD) of its part of the table is invalid.",
        ("STE.S1CDMax, S1Fmt and the L1CD, and which PASID the device was given",),
    ),
    "F_CD_FETCH": (
        "The context descriptor could not be read: the read ended in an external abort.",
        ("that FetchAddr is memory that the SMMU may read (STE.S1ContextPtr, L1CD.L2Ptr)",),
    ),
    "C_BAD_CD": (
        "The context descriptor is invalid (V=0), or illegal for this SMMU: a feature that it does "
        "not have, a reserved code, or an address or size out of range.",
        (
            "the 64 bytes of the descriptor: smmufast decode --kind cd",
            "that CFGI_CD and a SYNC followed the last change of the descriptor",
        ),
    ),
    "F_WALK_EABT": (
        "A translation table descriptor could not be read or updated: the access ended in an "
        "external abort.",
        (
            "that FetchAddr is memory that the SMMU may access",
            "the table address in the descriptor above, or TTB0, TTB1 or S2TTB",
        ),
    ),
    "F_TRANSLATION": (
        "The address is not mapped: a descriptor on the way is invalid or of a type that its level "
        "does not have, or the address is outside of what the tables cover (TxSZ, S2T0SZ, EPD).",
        (
            "that the driver mapped this very address for this device, and has not unmapped it yet",
            "that the device was given an IOVA and no physical address",
        ),
    ),
    "F_ADDR_SIZE": (
        "An address is too large: that of a table or of a page is beyond the output size (CD.IPS, "
        "STE.S2PS, IDR5.OAS), or an untranslated one is beyond what the SMMU has.",
        ("the descriptors on the way for address bits that should not be set, and IPS or S2PS",),
    ),
    "F_ACCESS": (
        "The page is mapped, but its access flag (AF) is 0 and the SMMU does not set it (HA=0).",
        ("that whoever writes descriptors sets AF, or handles this fault",),
    ),
    "F_PERMISSION": (
        "The page is mapped, but not for this kind of access.",
        (
            "the direction of the mapping: was it made for a read where the device writes, or the "
            "other way round",
            "AP, UXN, PXN of the descriptor, APTable above it, and CD.WXN and PAN; at stage 2, "
            "S2AP and XN",
        ),
    ),
    "F_TLB_CONFLICT": (
        "Several TLB entries match one address: sizes of pages were changed without "
        "break-before-make, or a Contiguous bit is wrong.",
        (_INVALIDATED,),
    ),
    "F_CFG_CONFLICT": (
        "Several cached stream table entries match one StreamID: STE.CONT is not the same over its "
        "group.",
        (_INVALIDATED,),
    ),
    "E_PAGE_REQUEST": (
        "The device says that it will access these pages soon. Nothing failed.",
        (),
    ),
    "F_VMS_FETCH": (
        "The virtual machine structure could not be read: the read ended in an external abort.",
        ("STE.VMSPtr",),
    ),
}
_PERMISSION_NAMES = (("R", "read"), ("W", "write"), ("X", "execute"))


def _access(fields: dict[str, int]) -> str:
    """Return the transaction that an event is about, empty where the record does not hold it."""
    if "InputAddr" not in fields:
        return ""
    address = f"{fields['InputAddr']:#x}"
    if "RnW" not in fields:
        wanted = [what for name, what in _PERMISSION_NAMES if fields.get(name)]
        return f"request ({', '.join(wanted) or 'no access'}) for {address}"
    text = f"read of {address}" if fields["RnW"] else f"write to {address}"
    if fields.get("InD"):
        text = f"instruction {text}"
    if "PnU" in fields:
        text = ("privileged " if fields["PnU"] else "unprivileged ") + text
    return text


def _stage(event: Event) -> list[str]:
    """Return where a fault of translation was met."""
    fields = event.fields
    if "S2" not in fields:
        return []
    at = "" if event.ipa is None else f" {event.ipa:#x}"
    if not event.s2:
        found = {
            "IN": "It is a fault of stage 1, on the input address itself.",
            "TT": "It is a fault of stage 1, on the walk of its tables.",
        }
    else:
        found = {
            "IN": f"It is a fault of stage 2, on the intermediate physical address{at} that the "
            "input address leads to.",
            "TT": f"It is a fault of stage 2, met on the walk of stage 1: a stage-1 descriptor "
            f"lies at the intermediate physical address{at} (page).",
            "CD": "It is a fault of stage 2, met on the way to the context descriptor, which lies "
            f"at the intermediate physical address{at} (page).",
        }
    if "CLASS" not in fields:
        return [f"It is a fault of stage {2 if event.s2 else 1}."]
    told = found.get(event.class_ or "")
    if told is None:
        return [f"S2={fields['S2']} and CLASS={fields['CLASS']} do not go together."]
    if event.ttrnw is not None:
        how = "read" if event.ttrnw else "updated (access flag or dirty state)"
        told = f"{told[:-1]}, and might not be {how}."
    return [told]


def event_in_words(record: bytes, **more: Any) -> Decoded:
    """Put one record of the event queue into words; `more` is of the Decoded."""
    event = Event(record)
    fields = event.fields
    if event.name not in EVENTS:
        owner = "implementation defined" if 0xE0 <= event.number <= 0xEF else "reserved"
        return Decoded(
            "event",
            f"event {event.name}",
            f"stream {event.sid:#x}; this event number is {owner}",
            fields=fields,
            record=record,
            **more,
        )
    meaning, check = EVENTS[event.name]
    who = f"stream {event.sid:#x}"
    if event.ssid is not None:
        who += f", substream {event.ssid:#x}"
    access = _access(fields)
    sentences = [meaning, *_stage(event)]
    checks = list(check)
    if event.stalled:
        sentences.append(
            f"The transaction is stalled: it waits for a CMD_RESUME of stream {event.sid:#x} with "
            f"STAG {event.stag:#x}, or for CMD_STALL_TERM."
        )
    if fields.get("GPCF"):
        sentences.append("It was a granule protection check that failed (GPCF=1).")
    if event.name == "F_PERMISSION" and event.class_ == "IN":
        what = "write" if event.write else "execution" if fields["InD"] else "read"
        side = "privileged" if fields["PnU"] else "unprivileged"
        sentences.append(f"A {side} {what} is not permitted.")
    if event.name == "F_TRANSLATION" and event.iova is not None and event.iova < 0x1000:
        checks.append("for a DMA address that was never set: this one is (almost) 0")
    if event.sid < 1 << 16 and not more.get("client"):
        checks.append(
            f"which device this is: as a PCIe requester, stream {event.sid:#x} is "
            f"{event.sid >> 8:02x}:{event.sid >> 3 & 31:02x}.{event.sid & 7}"
        )
    return Decoded(
        "event",
        event.name,
        f"{access} by {who}" if access else who,
        tuple(sentences),
        tuple(checks),
        fields,
        record,
        **more,
    )


# --- commands -------------------------------------------------------------------------------------

def _command_record(word: int) -> layout.Record | None:
    """Return the record of a command, None for an opcode that no command has."""
    try:
        found = layout.command_record(word & 0xFF)
    except ValueError:
        return None
    if found.name == "CFGI_STE_RANGE" and layout.unpack(found, word)["Range"] == 31:
        return layout.COMMANDS["CFGI_ALL"]
    return found


def _is_range(fields: dict[str, int], features: Features | None) -> bool:
    return bool(fields.get("TG")) and (features is None or bool(features.ril))


@functools.lru_cache(maxsize=4)
def _smmu(features: Features | None) -> Smmu:
    """Return an SMMU to ask: with these features, or with all that are modelled."""
    from smmufast import Memory, Smmu
    from smmufast.features import Features, modelled

    return Smmu(Memory(), modelled(Features.full() if features is None else features)[0])


_ELSEWHERE = ("CMD_MPAM", "CMD_DPT")  # illegal here, for that is not modelled; not so everywhere


def command_why(command: bytes, features: Features | None = None) -> Why | None:
    """Return why a command of the Non-secure queue is illegal (CERROR_ILL, IHI 0070 4.1).

    Parameters
    ----------
    command : bytes
        Its 16 bytes, as in memory.
    features : Features, optional
        Of the SMMU that reads it.  Without them only what no SMMU accepts is found.

    >>> command_why(layout.to_bytes("SYNC", layout.pack("SYNC", CS=3))).sentence()
    'CS=0b11 is reserved'
    """
    why = _smmu(features).check_command(command)
    if why is not None and why.name in _ELSEWHERE:
        wanted = features is None or (features.mpam if why.name == "CMD_MPAM" else features.dpt)
        return None if wanted else why
    return why


def _tlbi_span(fields: dict[str, int], features: Features | None) -> str:
    """Return the addresses of an invalidation by address."""
    first = fields["Address"] if "Address" in fields else fields["IPA"]
    if not _is_range(fields, features):
        return f"{first:#x} (what maps this 4 KiB page)"
    ds = features is None or features.ds
    scale = min(fields["SCALE"], 39) if ds else fields["SCALE"] & 31
    granule = 10 + 2 * fields["TG"]
    size = (fields["NUM"] + 1) << scale + granule
    level = f", level {fields['TTL']}" if fields["TTL"] else ""
    last = min(first + size - 1, _U64)
    return f"{first:#x} to {last:#x} ({_size(size)}, {1 << granule - 10}K granule{level})"


def _tlbi(name: str, fields: dict[str, int], features: Features | None) -> str:
    """Say what a TLBI command invalidates."""
    vmid = f"VMID {fields['VMID']:#x}" if "VMID" in fields else ""
    asid = f"ASID {fields['ASID']:#x}" if "ASID" in fields else ""
    by_address = "Address" in fields or "IPA" in fields
    what = {
        "NH": "stage-1 entries (EL1)",
        "EL2": "EL2 entries",
        "EL3": "EL3 entries",
        "S12": "entries of both stages",
        "S2": "stage-2 entries",
        "NSNH": "all Non-secure entries except those of EL2",
        "S": "Secure entries",
        "SNH": "all Secure entries except those of EL3 and Secure EL2",
    }[name.split("_")[1]]
    text = f"invalidate {what}"
    if vmid:
        text += f" of {vmid}"
    if asid:
        text += f"{', ' if vmid else ' of '}{asid}"
        text += " or global" if by_address else ", global ones not"
    if by_address:
        where = "the IPA " if "IPA" in fields else ""
        text += f" for {where}{_tlbi_span(fields, features)}"
        if fields["Leaf"]:
            text += ", last level only"
    return text


def _sync(fields: dict[str, int]) -> str:
    text = "wait until the commands before are done"
    target = fields["MSIAddress"]
    if fields["CS"] == 1 and target:
        return f"{text}, then write {fields['MSIData']:#x} to {target:#x} (without MSIs: interrupt)"
    after = {1: ", then raise an interrupt", 2: ", then send an event (SEV)"}
    return text + after.get(fields["CS"], "")


def _command_text(name: str, fields: dict[str, int], features: Features | None) -> str:
    """Return what a command asks for."""
    if name.startswith("TLBI_"):
        return _tlbi(name, fields, features)
    if name == "SYNC":
        return _sync(fields)
    sid = f"stream {fields['StreamID']:#x}" if "StreamID" in fields else ""
    if fields.get("SSV"):
        sid += f", substream {fields['SubstreamID']:#x}"
    leaf = "" if fields.get("Leaf", 1) else ", and the level-1 descriptor"
    if name == "PREFETCH_CONFIG":
        return f"fetch the configuration of {sid} early"
    if name == "PREFETCH_ADDR":
        first = f"{fields['Address']:#x}"
        if fields["Size"]:
            first = f"{1 << fields['Size']} addresses from {first}"
        return f"fetch the translation of {first} for {sid} early"
    if name == "CFGI_STE":
        return f"forget the cached STE of {sid} and its CDs{leaf}"
    if name == "CFGI_STE_RANGE":
        span = fields["Range"] + 1
        low = fields["StreamID"] >> span << span
        high = low + (1 << span) - 1
        return f"forget the cached STEs of streams {low:#x} to {high:#x} and their CDs"
    if name == "CFGI_ALL":
        return "forget all cached configuration"
    if name == "CFGI_CD":
        return f"forget the cached CD of {sid}, substream {fields['SubstreamID']:#x}{leaf}"
    if name == "CFGI_CD_ALL":
        return f"forget all cached CDs of {sid}"
    if name == "CFGI_VMS_PIDM":
        return f"forget the cached MPAM map of VMID {fields['VMID']:#x}"
    if name == "ATC_INV":
        if fields["Size"] >= 52:
            where = "every address"
        else:
            size = 4096 << fields["Size"]
            low = fields["Address"] // size * size
            where = f"{low:#x} to {low + size - 1:#x}"
        every = ", all substreams" if fields["G"] and fields["SSV"] else ""
        return f"have the device of {sid}{every} forget its translations of {where}"
    if name == "PRI_RESP":
        answer = layout.record("PRI_RESP").field("Resp").name_of(fields["Resp"]).lower()
        return f"answer page request group {fields['PRGIndex']:#x} of {sid}: {answer}"
    if name == "RESUME":
        how = "retry" if fields["Ac"] else "abort" if fields["Ab"] else "read zero or ignore"
        return f"{how} the stalled transaction of {sid} with STAG {fields['STAG']:#x}"
    if name == "STALL_TERM":
        return f"abort every stalled transaction of {sid}"
    if name == "DPTI_PA":
        return f"forget device permissions of {fields['Address']:#x}"
    return "forget all device permissions"


def command_in_words(record: bytes, features: Features | None, **more: Any) -> Decoded:
    """Put one command into words, and say why it is illegal with some features."""
    word = int.from_bytes(record, "little")
    rec = _command_record(word)
    why = command_why(record, features)
    meaning: tuple[str, ...] = ()
    if why is not None:
        known = layout.unpack("CMD" if rec is None else rec, word)
        meaning = (f"Illegal (CERROR_ILL, {why.rule}): {why.sentence(known, features)}.",)
    if rec is None:
        name = f"opcode {word & 0xFF:#04x}"
        return Decoded(
            "command", name, "no command", meaning, (), layout.unpack("CMD", word), record, **more
        )
    fields = layout.unpack(rec, word)
    text = _command_text(rec.name, fields, features)
    return Decoded("command", rec.name, text, meaning, (), fields, record, **more)


# --- page requests --------------------------------------------------------------------------------


def pri_in_words(record: bytes, **more: Any) -> Decoded:
    """Put one record of the page request queue into words; `more` is of the Decoded."""
    fields = layout.unpack("PRI", record)
    who = f"stream {fields['StreamID']:#x}"
    if fields["SSV"]:
        who += f", substream {fields['SubstreamID']:#x}"
    check: tuple[str, ...] = ()
    if fields["SSV"] and fields["Last"] and not fields["R"] and not fields["W"]:
        text = f"stop marker of {who}"
        meaning = ["The device has stopped using this substream (PASID); no answer is wanted."]
    else:
        wanted = [what for name, what in _PERMISSION_NAMES if fields[name]]
        side = "privileged " if fields["Priv"] else ""
        text = (
            f"{side}page request ({', '.join(wanted) or 'no access'}) for {fields['Address']:#x} "
            f"by {who}"
        )
        meaning = [
            f"The device asks for this page, in request group {fields['PRGIndex']:#x}"
            + (
                ", of which it is the last: CMD_PRI_RESP is to answer the group."
                if fields["Last"]
                else "; more requests of the group follow."
            )
        ]
        check = ("that somebody handles page requests, maps the page and sends CMD_PRI_RESP",)
    return Decoded("pri", "PRI", text, tuple(meaning), check, fields, record, **more)


# --- structures -----------------------------------------------------------------------------------


def _ste(record: bytes, features: Features | None) -> Decoded:
    """Decode a stream table entry."""
    from smmufast.explain import describe_ste

    fields = layout.unpack("STE", record)
    meaning = []
    if not fields["V"]:
        meaning.append("A transaction of this stream ends in C_BAD_STE.")
    elif not fields["Config"] & 4:
        meaning.append("Every transaction of this stream is aborted, without an event.")
    elif fields["Config"] == 4:
        meaning.append("The stream is not translated.")
    else:
        stages = {5: "Stage 1 translates", 6: "Stage 2 translates", 7: "Both stages translate"}
        meaning.append(f"{stages[fields['Config']]} the stream's addresses.")
    if features is not None and fields["V"] and fields["Config"] & 4:
        why = _smmu(features).check_ste(record)
        if why is not None:
            sentence = why.sentence(fields, features)
            meaning.append(f"Illegal (C_BAD_STE, {why.rule}): {sentence}.")
    return Decoded("ste", "STE", describe_ste(record), tuple(meaning), (), fields, record)


def _cd(record: bytes) -> Decoded:
    """Decode a context descriptor."""
    from smmufast.explain import describe_cd

    fields = layout.unpack("CD", record)
    meaning = []
    if not fields["V"]:
        meaning.append("A transaction that uses this descriptor ends in C_BAD_CD.")
    else:
        for n, half in enumerate(("lower", "upper")):
            if fields[f"EPD{n}"]:
                meaning.append(f"The {half} half of the address space is disabled (EPD{n}=1).")
                continue
            bits = 64 - fields[f"T{n}SZ"]
            size = 1 << bits
            first, last = (0, size - 1) if not n else (_U64 + 1 - size, _U64)
            meaning.append(
                f"TTB{n} translates {first:#x} to {last:#x}, from the table at "
                f"{fields[f'TTB{n}']:#x}."
            )
        how = "abort" if fields["A"] else "read zero, ignore writes"
        meaning.append(
            "A fault stalls the transaction."
            if fields["S"]
            else f"On a fault: {how}, record {'an event' if fields['R'] else 'nothing'}."
        )
    return Decoded("cd", "CD", describe_cd(record), tuple(meaning), (), fields, record)


def _l1std(record: bytes) -> Decoded:
    """Decode a level-1 stream table descriptor."""
    fields = layout.unpack("L1STD", record)
    span = fields["Span"]
    meaning: tuple[str, ...] = ()
    if not 0 < span < 12:
        why = "Span=0" if not span else f"Span={span} is reserved"
        text = f"no level-2 stream table ({why})"
        meaning = ("A transaction of its streams ends in C_BAD_STREAMID.",)
    else:
        text = (
            f"level-2 stream table at {fields['L2Ptr']:#x} with "
            f"{1 << span - 1} {'entry' if span == 1 else 'entries'}"
        )
        if fields["L2Ptr"] & ((1 << span + 5) - 1):
            meaning = (
                f"L2Ptr is not aligned to the table's {_size(1 << span + 5)}: its low bits are "
                "ignored.",
            )
    return Decoded("l1std", "L1STD", text, meaning, (), fields, record)


def _l1cd(record: bytes) -> Decoded:
    fields = layout.unpack("L1CD", record)
    meaning: tuple[str, ...] = ()
    if fields["V"]:
        text = f"table of context descriptors at {fields['L2Ptr']:#x}"
    else:
        text = "no table of context descriptors (V=0)"
        meaning = ("A transaction of its substreams ends in C_BAD_SUBSTREAMID.",)
    return Decoded("l1cd", "L1CD", text, meaning, (), fields, record)


# --- translation table descriptors ----------------------------------------------------------------

AP = (
    "privileged read and write, unprivileged none",
    "read and write for all",
    "privileged read, unprivileged none",
    "read for all",
)
S2AP = ("no access", "read", "write", "read and write")
_S2XN = ("execution permitted", "unprivileged execution (with XNX)", "no execution",
         "privileged execution (with XNX), else none")  # fmt: skip


def _pte(record: bytes, stage: int, granule: str, level: int | None, ds: bool) -> Decoded:
    """Decode a descriptor of a translation table."""
    from smmufast.explain import descriptor_address

    d = int.from_bytes(record, "little")
    lg2 = GRANULES[granule]
    table = d & 3 == 3 and level is not None and level < 3
    name = f"PTE_S{stage}_TABLE" if table else f"PTE_S{stage}"
    fields = layout.unpack(name, d)
    address = descriptor_address(d, lg2, ds)
    where = f"{granule} granule" + ("" if level is None else f", level {level}")
    if not d & 1:
        return Decoded(
            "pte", name, f"invalid ({where})",
            ("Bit 0 is 0: nothing is mapped here; an access ends in F_TRANSLATION.",), (),
            fields, record,
        )  # fmt: skip
    if table:
        text = f"table at {address:#x} ({where})"
        meaning = []
        if stage == 1:
            for bit, what in (
                ("PXNTable", "nothing below is executable by privileged code"),
                ("UXNTable", "nothing below is executable by unprivileged code"),
                ("APTable0", "nothing below is for unprivileged accesses"),
                ("APTable1", "nothing below is writable"),
            ):
                if fields[bit]:
                    meaning.append(f"{bit}=1: {what}, unless HAD is set.")
        return Decoded("pte", name, text, tuple(meaning), (), fields, record)
    blocks = {12: (1, 2), 14: (2,), 16: (2,)}[lg2] + ((0,) if lg2 == 12 else (1,)) * ds
    if lg2 == 16:
        blocks += (1,)  # with 52-bit addresses
    if d & 2 == 0 and level is not None and level not in blocks:
        return Decoded(
            "pte", name, f"invalid ({where})",
            (f"Bits 1 to 0 are 0b01, which this granule does not have at level {level}: an access "
             "ends in F_TRANSLATION.",), (), fields, record,
        )  # fmt: skip
    what = "block" if not d & 2 else "page" if level == 3 else "page (at level 3; else a table)"
    meaning = []
    if level is None:
        text = f"{what} at {address:#x} ({where})"
    else:
        shift = lg2 + (3 - level) * (lg2 - 3)
        text = f"{what} of {_size(1 << shift)} at {address & -(1 << shift):#x} ({where})"
    if stage == 1:
        meaning.append(f"Access: {AP[fields['AP']]}.")
        never = [who for bit, who in (("PXN", "privileged"), ("UXN", "unprivileged"))
                 if fields[bit]]  # fmt: skip
        meaning.append(f"Never executed by {' and '.join(never)} code." if never
                       else "Execution is not forbidden here.")  # fmt: skip
        meaning.append(f"Its memory type is byte {fields['AttrIndx']} of MAIR.")
    else:
        meaning.append(f"Access: {S2AP[fields['S2AP']]}; {_S2XN[fields['XN']]}.")
        memory = layout.PTE_S2.field("MemAttr").name_of(fields["MemAttr"])
        meaning.append(f"Memory type: {memory}, unless STE.S2FWB is set.")
    if not fields["AF"]:
        meaning.append(
            "AF=0: the first access ends in F_ACCESS, unless the SMMU sets it (HA) or does not "
            "care (AFFD)."
        )
    if fields["DBM"]:
        meaning.append("DBM=1: with hardware dirty state (HD) it counts as writable.")
    if fields["Contiguous"]:
        meaning.append("Contiguous=1: one of a group of like entries that a TLB may keep as one.")
    return Decoded("pte", name, text, tuple(meaning), (), fields, record)


# --- words ----------------------------------------------------------------------------------------

_WORD = re.compile(r"[^\s,]+")
_TOKEN = re.compile(r"(?:0[xX])?[0-9a-fA-F]+", re.A)


def _bytes_of_kind(kind: str) -> int:
    return 8 if kind == "pte" else layout.record(_RECORDS[kind]).bytes


def _tokens(text: str) -> list[str] | None:
    """Return the numbers of a text that holds nothing else, None for another text."""
    words: list[str] = []
    for found in _WORD.finditer(text):
        if not _TOKEN.fullmatch(found[0]):
            return None
        if len(words) == MOST_WORDS:
            raise DecodeError(in_words("words", f"up to {MOST_WORDS} numbers", "more"))
        words.append(found[0])
    return words or None


_DUMPED = (2, 8, 16)
"""Digits of a byte, a word and a dword in a dump, where all numbers have as many."""


def _words(tokens: list[str], size: int | None, unit: int | None) -> bytes:
    """Return what numbers stand for as bytes in memory order; `size` is that of a record."""
    digits = [len(token) - 2 * (token[:2] in ("0x", "0X")) for token in tokens]
    if max(digits) > 16:
        if unit not in (None, 8):
            raise DecodeError(f"words: a number of {max(digits)} digits does not fit {unit} bits")
        return b"".join(_whole(*pair, size) for pair in zip(tokens, digits, strict=True))
    if unit is None:
        unit = _unit(digits, size)
    values = _values(tokens, digits, unit)
    for token, value in zip(tokens, values, strict=True):
        if value >> unit:
            raise DecodeError(f"words: {token} does not fit {unit} bits")
    return b"".join(value.to_bytes(unit // 8, "little") for value in values)


def _values(tokens: list[str], digits: list[int], unit: int) -> list[int]:
    """Return the numbers of a text: those of a dump, or 0x and decimal ones as everywhere."""
    plain = not any(token[:2] in ("0x", "0X") for token in tokens)
    dumped = len(set(digits)) == 1 and (digits[0] in _DUMPED[1:] or digits[0] == unit // 4)
    if plain and dumped:
        return [int(token, 16) for token in tokens]
    found = []
    for token, count in zip(tokens, digits, strict=True):
        value = as_number(token)
        # as one of several numbers, what looks like a piece of a dump may be meant as either
        unclear = count == len(token) and (count in _DUMPED[1:] or (count > 1 and token[0] == "0"))
        if value is None or unclear:
            allowed = (
                "0x and hexadecimal digits, or decimal ones, or a dump: "
                "2, 8 or 16 digits in every number"
            )
            raise DecodeError(must_be("words", allowed, token))
        found.append(value)
    return found


def _whole(token: str, digits: int, size: int | None) -> bytes:
    """Return a whole record: bytes in memory order, or after ``0x`` one number."""
    if digits < len(token):  # leading zeros may be missing
        wide = size if size is not None and digits <= 2 * size else (digits + 31) // 32 * 16
        return int(token, 16).to_bytes(wide, "little")
    if digits % 2:
        raise DecodeError(f"words: {digits} digits are no whole number of bytes")
    return bytes.fromhex(token)


def _unit(digits: list[int], size: int | None) -> int:
    """Return how wide the numbers are, in bits, by their digits and how many there are."""
    if all(count == 2 for count in digits) and len(digits) % (size or 8) == 0:
        return 8
    if all(count == 8 for count in digits) and len(digits) > 1:
        dwords = size is not None and len(digits) * 8 == size
        return 64 if dwords else 32
    return 64


_SIZES = {32: "event", 16: "command"}


def _records(
    data: bytes, kind: str | None, stage: int, granule: str, level: int | None,
    features: Features | None, limit: int,
) -> list[Decoded]:  # fmt: skip
    """Decode records in memory order, each of the size of its kind."""
    if kind is None:
        kind = _SIZES.get(len(data))
    if kind is None:
        if len(data) == 64:
            allowed = "'ste', 'cd' or 'event' for 64 bytes"
        elif len(data) == 8:
            allowed = "'l1std', 'l1cd' or 'pte' for 8 bytes"
        else:
            sizes = "an event is 32, a command or a page request 16"
            allowed = f"named for {_plural(len(data), 'byte')} ({sizes})"
        raise DecodeError(must_be("kind", allowed, None))
    size = _bytes_of_kind(kind)
    if not data or len(data) % size:
        allowed = f"{size} bytes for each record of kind {kind}"
        raise DecodeError(must_be("words", allowed, len(data)))
    decoders: dict[str, Callable[[bytes], Decoded]] = {
        "event": event_in_words,
        "command": lambda record: command_in_words(record, features),
        "pri": pri_in_words,
        "ste": lambda record: _ste(record, features),
        "cd": _cd,
        "l1std": _l1std,
        "l1cd": _l1cd,
        "pte": lambda record: _pte(
            record, stage, granule, level, features is not None and bool(features.ds)
        ),
    }
    decoder = decoders[kind]
    shown = range(0, len(data), size)[:limit]
    found = [decoder(data[at : at + size]) for at in shown]
    if left := len(data) // size - len(shown):
        found.append(left_out(limit, _plural(left, "record") + " more"))
    return found


def left_out(limit: int, what: str, line: int | None = None) -> Decoded:
    """Return the last finding of a list that would have more than `limit`."""
    text = f"{what}: after {limit} findings the rest is left out"
    return Decoded("limit", "limit", text, line=line)


# L-4
def decode(
    data: str | bytes | bytearray | memoryview,
    kind: str | None = None,
    *,
    unit: int | None = None,
    stage: int = 1,
    granule: str = "4K",
    level: int | None = None,
    features: Features | None = None,
    limit: int = MOST,
    progress: Callable[[int, int], object] | None = None,
) -> list[Decoded]:
    """Return records, or what a log tells, in words.

    Parameters
    ----------
    data : str or bytes
        Bytes: records in memory order.  Text that holds numbers only: the words of records, first
        word first.  They are hexadecimal after ``0x``, else decimal; those of a dump, where every
        number has 2, 8, 16 or more digits, are hexadecimal without it.  Any other text: a log,
        such as that of a Linux kernel or a trace of QEMU, behind any prefix, quoted and wrapped
        by mail or exported as JSON; lines that tell nothing of an SMMUv3 are left out, and a
        record that is cut off is told as far as it goes.
    kind : str, optional
        One of KINDS.  Without it 32 bytes are an event, 16 a command, and a text may be a log.
    unit : int, optional
        Bits of each number of a text: 64, 32 or 8 (bytes in memory order).  By default told by
        their digits: 2 is a byte, 8 a word, more than 16 a whole record (after ``0x`` a number,
        else bytes in memory order), and any other a dword.
    stage, granule, level : int, str, int, optional
        For translation table descriptors: stage 1 or 2; "4K", "16K" or "64K"; level -1 to 3.
    features : Features, optional
        Of the SMMU: then commands and STEs that it refuses are told with the reason.
    limit : int
        Findings, or records, that are wanted at most.
    progress : callable, optional
        Called now and then with the lines of a log that were read, and all its lines.

    Returns
    -------
    list of Decoded
        In the order of `data`; of a log, empty if nothing was found.  Where there is more than
        `limit`, one of kind "limit" stands behind them.

    Raises
    ------
    DecodeError
        The words are no whole records, or an argument is not one of those above.
    TypeError
        `data` is neither text nor bytes, or an argument is of another type.

    >>> (one,) = decode("0x0000000900000004 0x0 0x0 0x0", "event")
    >>> one.name, one.fields["StreamID"]
    ('C_BAD_STE', 9)
    >>> print(decode("0012000100300012 0000000012340701")[0].text)  # doctest: +ELLIPSIS
    invalidate stage-1 entries (EL1) of VMID 0x1, ASID 0x12 or global for 0x12340000 to 0x12347fff...
    """  # noqa: E501
    for name, value, allowed in (
        ("kind", kind, (None, *KINDS)),
        ("unit", unit, (None, 64, 32, 8)),
        ("stage", stage, (1, 2)),
        ("granule", granule, tuple(GRANULES)),
        ("level", level, (None, -1, 0, 1, 2, 3)),
    ):
        try:
            one_of(name, value, allowed)
        except ValueError as error:
            raise DecodeError(str(error)) from None
    limit = integer("limit", limit, first=1)
    if features is not None:
        from smmufast.features import Features

        if not isinstance(features, Features):
            raise TypeError(must_be("features", "Features or None", features))
    if isinstance(data, str):
        tokens = _tokens(data)
        if tokens is None:
            if kind is not None or unit is not None:
                raise DecodeError(in_words("words", "numbers", _bad_token(data)))
            from smmufast._log import read_log

            return read_log(data, features, limit, progress)
        raw = _words(tokens, None if kind is None else _bytes_of_kind(kind), unit)
    elif isinstance(data, (bytes, bytearray, memoryview)):
        raw = bytes(data)
    else:
        raise TypeError(must_be("data", "str or bytes", data))
    return _records(raw, kind, stage, granule, level, features, limit)


def _bad_token(text: str) -> str:
    for found in _WORD.finditer(text):
        if not _TOKEN.fullmatch(found[0]):
            return repr(found[0][:40])
    return "nothing"
