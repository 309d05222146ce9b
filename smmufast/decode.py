"""decode(): records and log lines in words: what happened, what it means, what to look at.

Sections: IHI 0070 4 (commands), 5 (STE, CD), 6.3 (GERROR, CMDQ_CONS), 7.3 (events), 8.1 (page
requests); DDI 0487 D8.3 (translation table descriptors).  Not architectural: the lines that
Linux's arm-smmu-v3 driver prints, and those of QEMU's trace, which are found in mixed text.

Positions are those of `smmufast.layout`.  Why a command or a structure is refused is asked of an
SMMU with the features that are given (`Why`).
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smmufast import layout
from smmufast.faults import Event

if TYPE_CHECKING:
    from smmufast._smmu import Smmu
    from smmufast.features import Features
    from smmufast.why import Why

__all__ = ["KINDS", "DecodeError", "Decoded", "command_why", "decode"]

KINDS = ("event", "command", "pri", "ste", "cd", "l1std", "l1cd", "pte")
"""Kinds of record that `decode` knows by name."""

_RECORDS = {
    "event": "EVENT", "command": "CMD", "pri": "PRI", "ste": "STE", "cd": "CD", "l1std": "L1STD",
    "l1cd": "L1CD",
}  # fmt: skip
GRANULES = {"4K": 12, "16K": 14, "64K": 16}
_U64 = (1 << 64) - 1
_INDEX = (1 << 20) - 1


class DecodeError(ValueError):
    """What cannot be decoded: the message says what was given and what is wanted."""


@dataclass(frozen=True)
class Decoded:
    """One record or one message, in words; ``str()`` shows all of it.

    Attributes
    ----------
    kind : str
        One of KINDS; or "gerror", "cmdq_error", "sync_timeout", "overflow" (messages of a
        driver), "trace" (a line of QEMU's trace that is none of these).
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
        Whether the record was put together from a message in words, which leaves some bits out.
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
_EVENTS: dict[str, tuple[str, tuple[str, ...]]] = {
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


def _event(record: bytes, **more: Any) -> Decoded:
    event = Event(record)
    fields = event.fields
    if event.name not in _EVENTS:
        owner = "implementation defined" if 0xE0 <= event.number <= 0xEF else "reserved"
        return Decoded(
            "event",
            f"event {event.name}",
            f"stream {event.sid:#x}; this event number is {owner}",
            fields=fields,
            record=record,
            **more,
        )
    meaning, check = _EVENTS[event.name]
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


def _command(record: bytes, features: Features | None, **more: Any) -> Decoded:
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


def _pri(record: bytes, **more: Any) -> Decoded:
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

_AP = (
    "privileged read and write, unprivileged none",
    "read and write for all",
    "privileged read, unprivileged none",
    "read for all",
)
_S2AP = ("no access", "read", "write", "read and write")
_S2XN = ("execution permitted", "unprivileged execution (with XNX)", "no execution",
         "privileged execution (with XNX), else none")  # fmt: skip


def _pte(record: bytes, stage: int, granule: str, level: int | None, ds: bool) -> Decoded:
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
        meaning.append(f"Access: {_AP[fields['AP']]}.")
        never = [who for bit, who in (("PXN", "privileged"), ("UXN", "unprivileged"))
                 if fields[bit]]  # fmt: skip
        meaning.append(f"Never executed by {' and '.join(never)} code." if never
                       else "Execution is not forbidden here.")  # fmt: skip
        meaning.append(f"Its memory type is byte {fields['AttrIndx']} of MAIR.")
    else:
        meaning.append(f"Access: {_S2AP[fields['S2AP']]}; {_S2XN[fields['XN']]}.")
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


# --- messages of a driver -------------------------------------------------------------------------

_GERROR = {
    "CMDQ_ERR": (
        "The command queue stopped at a command: CMDQ_CONS.ERR says why. No more commands are "
        "read until the error is acknowledged in GERRORN."
    ),
    "EVENTQ_ABT_ERR": (
        "A write into the event queue aborted; events are lost until it is acknowledged."
    ),
    "PRIQ_ABT_ERR": (
        "A write into the page request queue aborted; requests are answered with failure."
    ),
    "MSI_CMDQ_ABT_ERR": "The MSI of a CMD_SYNC aborted; the SYNC itself is complete.",
    "MSI_EVENTQ_ABT_ERR": "The MSI of the event queue aborted.",
    "MSI_PRIQ_ABT_ERR": "The MSI of the page request queue aborted.",
    "MSI_GERROR_ABT_ERR": "The MSI of global errors aborted.",
    "SFM_ERR": "The SMMU is in service failure mode: it translates nothing any more.",
    "CMDQP_ERR": "An enhanced command queue has an error.",
    "DPT_ERR": "The device permission table has an error.",
}
_ABORTED = {
    "CMDQ": ("MSI_CMDQ_ABT_ERR", ""),
    "EVTQ": ("MSI_EVENTQ_ABT_ERR", "EVENTQ_ABT_ERR"),
    "PRIQ": ("MSI_PRIQ_ABT_ERR", "PRIQ_ABT_ERR"),
    "GERROR": ("MSI_GERROR_ABT_ERR", ""),
}
_GERROR_CHECK = {
    "ABT": "the addresses of the queues and of the MSIs (EVENTQ_BASE, PRIQ_BASE, *_IRQ_CFG0)",
    "CMDQ": "the command that CMDQ_CONS.RD points to: smmufast decode --kind command",
}


def _gerror(active: int, name: str = "GERROR", **more: Any) -> Decoded:
    """Return the global errors whose bits are set."""
    fields = layout.unpack("GERROR", active & 0xFFFF_FFFF)
    names = [bit for bit, value in fields.items() if value]
    check = []
    if "CMDQ_ERR" in names:
        check.append(_GERROR_CHECK["CMDQ"])
    if any("ABT" in bit for bit in names):
        check.append(_GERROR_CHECK["ABT"])
    text = "global errors " + ", ".join(names) if names else "no error that has a name"
    return Decoded(
        "gerror",
        name,
        f"{text} ({active:#x})",
        tuple(_GERROR[bit] for bit in names),
        tuple(check),
        fields,
        **more,
    )


_CERROR = {
    0: ("no error", ()),
    1: (
        "the command is illegal",
        ("the command itself: its opcode, its reserved bits, and whether the SMMU has the feature",
         "that whoever wrote it knows the identification registers (IDR0, IDR3)"),
    ),
    2: (
        "the command could not be read (external abort)",
        ("that CMDQ_BASE is memory that the SMMU may read",),
    ),
    3: (
        "an ATC_INV before this SYNC was not answered in time",
        ("the device that ATC_INV was sent to: it is gone, hangs, or does not have ATS",),
    ),
}  # fmt: skip


def _cmdq_error(code: int, index: int | None, name: str = "", **more: Any) -> Decoded:
    what, check = _CERROR.get(code, ("unknown code", ()))
    at = "" if index is None else f" at index {index:#x} (CONS.RD)"
    which = f" ({name})" if name else ""
    fields = {"ERR": code} | ({} if index is None else {"RD": index})
    spelt = layout.record("CMDQ_CONS").field("ERR").name_of(code).partition(":")[0]
    return Decoded(
        "cmdq_error",
        f"CERROR_{spelt}" if spelt else "CMDQ error",
        f"the command queue stopped{at}{which}: {what}",
        ("CONS.RD stays at the command until software acknowledges GERROR.CMDQ_ERR.",)
        if code
        else (),
        check,
        fields,
        **more,
    )


def _sync_timeout(at: int, prod: int, cons: int, **more: Any) -> Decoded:
    code = cons >> 24 & 0x7F
    reader = cons & _INDEX
    meaning = []
    check = []
    if reader == at & _INDEX:
        meaning.append(
            "The SMMU has consumed every command before the SYNC, which is not complete: it waits "
            "for an ATC_INV that a device does not answer, or for transactions in flight."
        )
        check.append("the devices whose ATC_INV came before, and whether power or clocks are on")
    else:
        meaning.append(
            f"The SMMU stands at index {reader:#x}, not at the SYNC: it does not consume commands."
        )
        check.append("CR0.CMDQEN, and GERROR.CMDQ_ERR, which stops the queue")
    if code:
        what, more_check = _CERROR.get(code, ("unknown code", ()))
        meaning.append(f"CONS.ERR is {code}: {what}, if GERROR.CMDQ_ERR is active.")
        check += more_check
    return Decoded(
        "sync_timeout",
        "CMD_SYNC timeout",
        f"the SYNC at index {at & _INDEX:#x} did not complete in time "
        f"(PROD.WR={prod & _INDEX:#x}, CONS.RD={reader:#x})",
        tuple(meaning),
        tuple(check),
        {"at": at, "PROD": prod, "CONS": cons},
        **more,
    )


def _overflow(queue: str, **more: Any) -> Decoded:
    what = "Events" if queue == "EVTQ" else "Page requests"
    return Decoded(
        "overflow",
        f"{queue} overflow",
        f"the {'event' if queue == 'EVTQ' else 'page request'} queue was full",
        (f"{what} were discarded: PROD.OVFLG differs from CONS.OVACKFLG.",),
        ("for one fault that repeats, and whether the handler of the queue runs",),
        **more,
    )


# --- lines of QEMU's trace ------------------------------------------------------------------------

_TRACES = {
    "smmu_config_cache_inv": "a cached configuration is forgotten",
    "smmu_configs_inv_sid_range": "cached configurations of a range of streams are forgotten",
    "smmu_get_pte": "a descriptor was read",
    "smmu_inv_notifiers_mr": "a listener of a memory region is told to forget everything",
    "smmu_iotlb_cache_hit": "the translation was in the TLB",
    "smmu_iotlb_cache_miss": "the translation was not in the TLB",
    "smmu_iotlb_insert": "a translation goes into the TLB",
    "smmu_iotlb_inv_all": "the TLB is emptied",
    "smmu_iotlb_inv_asid": "TLB entries of one ASID are dropped",
    "smmu_iotlb_inv_asid_vmid": "TLB entries of one ASID and VMID are dropped",
    "smmu_iotlb_inv_iova": "TLB entries of one address are dropped",
    "smmu_iotlb_inv_ipa": "TLB entries of one intermediate address are dropped",
    "smmu_iotlb_inv_vmid": "TLB entries of one VMID are dropped",
    "smmu_iotlb_inv_vmid_s1": "stage-1 TLB entries of one VMID are dropped",
    "smmu_iotlb_lookup_hit": "the translation was in the TLB",
    "smmu_iotlb_lookup_miss": "the translation was not in the TLB",
    "smmu_ptw_block_pte": "the walk ended at a block",
    "smmu_ptw_invalid_pte": "the walk met an invalid descriptor",
    "smmu_ptw_level": "the walk read a descriptor",
    "smmu_ptw_page_pte": "the walk ended at a page",
    "smmu_reset_exit": "the SMMU was reset",
    "smmuv3_cmdq_cfgi_cd": "CFGI_CD: the cached CDs of a stream are forgotten",
    "smmuv3_cmdq_cfgi_ste": "CFGI_STE: the cached STE of a stream is forgotten",
    "smmuv3_cmdq_cfgi_ste_range": "CFGI_STE_RANGE: the cached STEs of a range are forgotten",
    "smmuv3_cmdq_consume": "the command queue is read",
    "smmuv3_cmdq_consume_out": "the command queue was read up to here",
    "smmuv3_cmdq_tlbi_nh": "TLBI_NH_ALL (or TLBI_NSNH_ALL in older versions)",
    "smmuv3_cmdq_tlbi_nh_asid": "TLBI_NH_ASID: entries of one ASID are dropped",
    "smmuv3_cmdq_tlbi_nh_va": "TLBI_NH_VA: entries of one address are dropped",
    "smmuv3_cmdq_tlbi_nh_vaa": "TLBI_NH_VAA: entries of one address are dropped",
    "smmuv3_cmdq_tlbi_nsnh": "TLBI_NSNH_ALL: all entries are dropped",
    "smmuv3_cmdq_tlbi_s12_vmid": "TLBI_S12_VMALL: entries of one VMID are dropped",
    "smmuv3_config_cache_hit": "the configuration of a stream was cached",
    "smmuv3_config_cache_inv": "a cached configuration is forgotten",
    "smmuv3_config_cache_miss": "the configuration of a stream was not cached",
    "smmuv3_decode_cd": "the context descriptor's output size (bits)",
    "smmuv3_decode_cd_tt": "the context descriptor's table base, size and granule (log2)",
    "smmuv3_find_ste": "the stream table is looked up",
    "smmuv3_find_ste_2lvl": "the two-level stream table is looked up",
    "smmuv3_get_cd": "the context descriptor is read",
    "smmuv3_get_ste": "the stream table entry is read",
    "smmuv3_inv_notifiers_iova": "a listener (such as VFIO or vhost) is told to drop addresses",
    "smmuv3_invalidate_all_caches": "all caches are emptied",
    "smmuv3_notify_flag_add": "a listener (such as VFIO or vhost) was added to a stream",
    "smmuv3_notify_flag_del": "a listener was removed from a stream",
    "smmuv3_range_inval": "TLB entries of a range of addresses are dropped",
    "smmuv3_s1_range_inval": "stage-1 TLB entries of a range of addresses are dropped",
    "smmuv3_s2_range_inval": "stage-2 TLB entries of a range of addresses are dropped",
    "smmuv3_translate_abort": "the transaction was aborted, without an event (STE.Config=0b0xx)",
    "smmuv3_translate_bypass": "the transaction passed untranslated (STE.Config=0b100)",
    "smmuv3_translate_disable": "the transaction passed: the SMMU is disabled (CR0.SMMUEN=0)",
    "smmuv3_translate_success": "the transaction was translated",
    "smmuv3_trigger_irq": "an interrupt was raised",
    "smmuv3_unhandled_cmd": "a command that QEMU does not know",
    "smmuv3_write_gerror": "global errors changed",
    "smmuv3_write_gerrorn": "global errors were acknowledged",
    "smmuv3_write_mmio": "a register was written",
    "smmuv3_write_mmio_idr": "a write to a register that cannot be written",
    "smmuv3_read_mmio": "a register was read",
}
_TRACED_RECORDS = ("smmuv3_record_event", "smmuv3_cmdq_opcode", "smmuv3_cmdq_consume_error")
_TRACE_LINE = re.compile(r"(?<![\w.])(smmu(?:v3)?_[a-z0-9_]{1,40})(?![\w.(])(.*)", re.A)
_VALUE = re.compile(r"([A-Za-z_][\w.]{0,30}|TT\[[01]\])@?\s?[=:]>?\s{0,2}(0[xX][0-9a-fA-F]{1,16}"
                    r"|-?[0-9]{1,20})(?![\w.])", re.A)  # fmt: skip
_EVENT_NAME = re.compile(r"\b(?:SMMU_EVT_)?([FCE]_[A-Z_]{3,30})\b", re.A)
_OPCODE_NAME = re.compile(r"\bSMMU_CMD_([A-Z0-9_]{2,30})\b", re.A)
_EXECUTION_ERROR = re.compile(r"Error on ([!-~]{1,40}) command execution: ([0-9]{1,3})\b", re.A)
_IRQS = ("event queue", "page request queue", "CMD_SYNC", "global errors")
_OFFSETS = {rec.offset: name for name, rec in layout.REGISTERS.items() if rec.offset is not None}


def _numbers(text: str) -> dict[str, int]:
    """Return the values that a line of the trace prints by name."""
    return {name: int(value, 0 if "x" in value.lower() else 10)
            for name, value in _VALUE.findall(text)}  # fmt: skip


#: Fields of events that no message tells.
_UNTOLD = {"ID", "SSV", "SubstreamID", "Reason", "GPCF", "NSIPA"}


def _told_event(name: str, values: dict[str, int], **more: Any) -> Decoded | None:
    """Return an event that only words tell of, None where a value does not fit the record."""
    number = layout.Event.__members__.get(name)
    if number is None:
        return None
    rec = layout.event_record(number)
    have = {f.name for f in rec.fields}
    values = {key: int(value) for key, value in values.items() if key in have}
    try:
        word = layout.pack(rec, **values)
    except ValueError:
        return None
    if have <= values.keys() | _UNTOLD:
        return _event(layout.to_bytes(rec, word), told=True, **more)
    who = [f"stream {values['StreamID']:#x}"] if "StreamID" in values else []
    if "SubstreamID" in values:
        who.append(f"substream {values['SubstreamID']:#x}")
    if "InputAddr" in values:
        who.append(f"address {values['InputAddr']:#x}")
    meaning, check = _EVENTS[name]
    return Decoded("event", name, ", ".join(who), (meaning,), check, values, told=True, **more)


def _trace_register(values: dict[str, int]) -> tuple[str, dict[str, int]]:
    """Return what an access of a register says, and its fields."""
    offset, value = values.get("addr", -1), values.get("val", 0)
    name = _OFFSETS.get(offset)
    if name is None:
        upper = _OFFSETS.get(offset - 4)
        if upper is not None and layout.REGISTERS[upper].bytes == 8:
            return f"{upper}, upper half, is {value:#x}", {}
        return f"offset {offset:#x} is {value:#x}", {}
    try:
        fields = layout.unpack(name, value)
    except ValueError:
        return f"{name} is {value:#x}", {}
    shown = ", ".join(f"{key}={v:#x}" if v > 9 else f"{key}={v}" for key, v in fields.items() if v)
    return f"{name} is {value:#x}" + (f" ({shown})" if shown else ""), fields


def _trace(name: str, rest: str, **more: Any) -> Decoded | None:
    """Return a line of the trace in words, None for one that lacks what its name says."""
    values = _numbers(rest)
    if name == "smmuv3_record_event":
        found = _EVENT_NAME.search(rest)
        told = {"StreamID": values["sid"]} if "sid" in values else {}
        return _told_event(found[1], told, **more) if found else None
    if name == "smmuv3_cmdq_opcode":
        opcode = _OPCODE_NAME.search(rest)
        rec = layout.COMMANDS.get(opcode[1].removeprefix("CMD_")) if opcode else None
        if rec is None:
            return None
        return Decoded("command", rec.name, f"consumed: {rec.doc}", **more)
    if name == "smmuv3_cmdq_consume_error":
        error = _EXECUTION_ERROR.search(rest)
        return _cmdq_error(int(error[2]), None, error[1], **more) if error else None
    text = _TRACES[name]
    meaning: list[str] = []
    if name in ("smmuv3_read_mmio", "smmuv3_write_mmio"):
        said, values = _trace_register(values)
        text = f"{text}: {said}"
    elif name in ("smmuv3_write_gerror", "smmuv3_write_gerrorn"):
        changed = values.get("toggled", values.get("acked", 0))
        names = [key for key, v in layout.unpack("GERROR", changed & 0xFFFF_FFFF).items() if v]
        text = f"{text}: {', '.join(names) or 'none'}"
        meaning = [_GERROR[key] for key in names] if name == "smmuv3_write_gerror" else []
    elif name == "smmuv3_trigger_irq" and 0 <= values.get("irq", -1) < len(_IRQS):
        text = f"{text}: {_IRQS[values['irq']]}"
    else:
        shown = ", ".join(
            f"{key}={value}" if -1 <= value <= 9 else f"{key}={value:#x}"
            for key, value in values.items()
        )
        text = f"{text}: {shown}" if shown else text
        if values.get("perm") in (0, 1, 2, 3) and name == "smmuv3_translate_success":
            permitted = ("nothing", "reads", "writes", "reads and writes")[values["perm"]]
            meaning = [f"The page permits {permitted}."]
        if "stage" in values and "pte" in values and 0 <= values["pte"] <= _U64:
            meaning = _trace_descriptor(values)
    return Decoded("trace", name, text, tuple(meaning), fields=values, **more)


def _trace_descriptor(values: dict[str, int]) -> list[str]:
    """Return what the descriptor of a traced walk says of access."""
    stage = 2 if values["stage"] == 2 else 1
    d = values["pte"]
    if not d & 1:
        return ["The descriptor's bit 0 is 0: nothing is mapped here."]
    fields = layout.unpack(f"PTE_S{stage}", d)
    if values.get("level") != 3 and d & 2:
        return ["The descriptor is a table."]
    access = _AP[fields["AP"]] if stage == 1 else _S2AP[fields["S2AP"]]
    return [f"Access: {access}; AF={fields['AF']}."]


# --- lines of Linux's driver ----------------------------------------------------------------------

# Every pattern is bounded, so that a long line of anything costs a time that grows with its length.
_SOURCE = r"([!-~]{1,64}):\s{1,8}"
_HEX = r"0?[xX]?([0-9a-fA-F]{1,16})"
_RECEIVED = re.compile(_SOURCE + r"event 0x[0-9a-fA-F]{1,2} received:", re.A)
_SKIPPING = re.compile(_SOURCE + r"skipping command in error state:", re.A)
_DWORD = re.compile(r"(?:([!-~]{1,64}):)?\s{0,64}0x([0-9a-fA-F]{16})\s{0,64}$", re.A)
_TOLD = re.compile(
    _SOURCE + r"event: ([!-~]{1,40}) client: ([ -~]{1,80}?) sid: " + _HEX + " ssid: " + _HEX
    + "(?: iova: " + _HEX + " ipa: " + _HEX + "| fetch_addr: " + _HEX + ")?", re.A,
)  # fmt: skip
_DETAIL = re.compile(
    _SOURCE + r"(unpriv|priv) (inst|data) (read|write) s([12]) \"([ -~]{1,60}?)\""
    r"( ttd_read| ttd_write)?( stall)? stag: " + _HEX, re.A,
)  # fmt: skip
_CMDQ = re.compile(_SOURCE + r"CMDQ error \(cons " + _HEX + r"\)", re.A)
_UNEXPECTED = re.compile(_SOURCE + r"unexpected global error reported \(" + _HEX + r"\)", re.A)
_TIMEOUT = re.compile(
    _SOURCE + r"CMD_SYNC timeout(?: at " + _HEX + r" \[hwprod " + _HEX + ", hwcons " + _HEX + ")?",
    re.A,
)
_LOST = re.compile(_SOURCE + r"(EVTQ|PRIQ) overflow detected", re.A)
_WRITE_ABORTED = re.compile(_SOURCE + r"(CMDQ|EVTQ|PRIQ|GERROR)( MSI)? write aborted", re.A)
_FAILURE = re.compile(_SOURCE + r"device has entered Service Failure Mode", re.A)
_PRI_LINE = re.compile(
    _SOURCE + r"sid " + _HEX + r"\." + _HEX + r": \[([0-9]{1,3})(L?)\] (un)?privileged "
    r"(R?)(W?)(X?) access at iova " + _HEX, re.A,
)  # fmt: skip
_QEMU_FAILED = re.compile(
    r"([!-~]{1,64}) translation failed for iova=" + _HEX
    + r" ?\((?:SMMU_EVT_)?([FCE]_[A-Z_]{3,30})\)", re.A,
)  # fmt: skip
_CLASSES = {
    "CD fetch": 0,
    "Stage 1 translation table fetch": 1,
    "Input address caused fault": 2,
}


class _Log:
    """A log being read line by line: what was found, and the records that are not complete."""

    def __init__(self, features: Features | None) -> None:
        self.features = features
        # what makes each finding, once the lines after it have told the rest
        self.found: list[Callable[[], Decoded | None]] = []
        self.pending: dict[str, tuple[str, int, list[int]]] = {}
        self.latest: str | None = None
        self.events: dict[str, dict[str, Any]] = {}
        self.errors: dict[str, int] = {}

    def read(self, text: str) -> list[Decoded]:
        for number, line in enumerate(text.split("\n"), 1):
            self.line(number, line.rstrip("\r"))
        made = (make() for make in self.found)
        return [decoded for decoded in made if decoded is not None]

    def keep(self, make: Callable[..., Decoded | None], *arguments: Any, **more: Any) -> None:
        self.found.append(lambda: make(*arguments, **more))

    def line(self, number: int, line: str) -> None:
        if "0x" in line and self.dword(number, line):
            return
        if "smmu" in line:
            found = _TRACE_LINE.search(line)
            if found is not None and (found[1] in _TRACES or found[1] in _TRACED_RECORDS):
                self.keep(_trace, found[1], found[2], line=number)
                return
        if ":" in line and self.driver(number, line):
            return
        if "translation failed" in line and (found := _QEMU_FAILED.search(line)):
            told = {"InputAddr": int(found[2], 16)}
            self.keep(_told_event, found[3], told, line=number, source=found[1])

    def dword(self, number: int, line: str) -> bool:
        """Take one dword of a record that is printed over several lines."""
        found = _DWORD.search(line)
        if found is None:
            return False
        source = found[1]
        if source is None and line.strip() == f"0x{found[2]}":
            source = self.latest
        if source is None or not (source in self.pending or "arm-smmu-v3" in line):
            return False
        # the line that announces an event may be missing
        kind, start, dwords = self.pending.setdefault(source, ("", number, []))
        dwords.append(int(found[2], 16))
        if len(dwords) == (2 if kind == "command" else 4):
            del self.pending[source]
            self.latest = None
            record = b"".join(dword.to_bytes(8, "little") for dword in dwords)
            if kind == "command":
                self.keep(_command, record, self.features, line=start, source=source)
            elif kind == "event" or record[0] in layout.EVENTS:
                event: dict[str, Any] = {
                    "record": record,
                    "line": start,
                    "source": source,
                    "client": "",
                }
                self.events[source] = event
                self.found.append(lambda: _event(**event))
        return True

    def open(self, kind: str, number: int, source: str) -> None:
        self.pending[source] = (kind, number, [])
        self.latest = source
        self.events.pop(source, None)

    def driver(self, number: int, line: str) -> bool:
        """Take one message of the driver."""
        if " received:" in line and (found := _RECEIVED.search(line)):
            self.open("event", number, found[1])
        elif "skipping command" in line and (found := _SKIPPING.search(line)):
            self.open("command", number, found[1])
        elif " client: " in line and (found := _TOLD.search(line)):
            self.told(number, found)
        elif " stag: " in line and (found := _DETAIL.search(line)):
            self.detail(found)
        elif "CMDQ error" in line and (found := _CMDQ.search(line)):
            cons = int(found[2], 16)
            self.keep(_cmdq_error, cons >> 24 & 0x7F, cons & _INDEX, line=number, source=found[1])
        elif "unexpected global" in line and (found := _UNEXPECTED.search(line)):
            self.errors[found[1]] = active = int(found[2], 16)
            self.keep(_gerror, active, line=number, source=found[1])
        elif "CMD_SYNC timeout" in line and (found := _TIMEOUT.search(line)):
            if found[2] is not None:
                at, prod, cons = (int(found[i], 16) for i in (2, 3, 4))
                self.keep(_sync_timeout, at, prod, cons, line=number, source=found[1])
        elif "overflow detected" in line and (found := _LOST.search(line)):
            self.keep(_overflow, found[2], line=number, source=found[1])
        elif "write aborted" in line and (found := _WRITE_ABORTED.search(line)):
            self.aborted(number, found[1], _ABORTED[found[2]][0 if found[3] else 1])
        elif "Service Failure" in line and (found := _FAILURE.search(line)):
            self.aborted(number, found[1], "SFM_ERR")
        elif "privileged" in line and (found := _PRI_LINE.search(line)):
            self.page_request(number, found)
        else:
            return False
        return True

    def aborted(self, number: int, source: str, bit: str) -> None:
        """Take a message of one global error, unless the line of them all has told it."""
        if not bit:
            return
        active = layout.pack("GERROR", **{bit: 1})
        if not self.errors.get(source, 0) & active:
            self.keep(_gerror, active, line=number, source=source)

    def told(self, number: int, found: re.Match[str]) -> None:
        """Take an event in words: it adds the client to the dwords before it, or stands alone."""
        source, name, client = found[1], found[2], found[3]
        sid, ssid = int(found[4], 16), int(found[5], 16)
        self.pending.pop(source, None)
        known = self.events.get(source)
        if known is not None and known.get("record") is not None:
            event = Event(known["record"])
            if (event.name, event.sid) == (name, sid) and not known["client"]:
                known["client"] = client
                return
        values = {"StreamID": sid}
        if ssid:
            values |= {"SSV": 1, "SubstreamID": ssid}
        if found[6] is not None:
            ipa = int(found[7], 16) & layout.EVENT.field("IPA").mask
            values |= {"InputAddr": int(found[6], 16), "IPA": ipa}
        if found[8] is not None:
            values["FetchAddr"] = int(found[8], 16) & layout.EVENT.field("FetchAddr").mask
        self.events[source] = {"values": values}
        self.keep(_told_event, name, values, line=number, source=source, client=client)

    def detail(self, found: re.Match[str]) -> None:
        """Take the second line of an event in words."""
        values = self.events.get(found[1], {}).get("values")
        if values is None:
            return
        values |= {
            "PnU": found[2] == "priv",
            "InD": found[3] == "inst",
            "RnW": found[4] == "read",
            "S2": found[5] == "2",
            "CLASS": _CLASSES.get(found[6], 3),
            "Stall": found[8] is not None,
            "STAG": int(found[9], 16),
            "TTRnW": found[7] == " ttd_read",
        }

    def page_request(self, number: int, found: re.Match[str]) -> None:
        ssid = int(found[3], 16)
        try:
            word = layout.pack(
                "PRI",
                StreamID=int(found[2], 16),
                SubstreamID=ssid,
                SSV=ssid != 0,
                PRGIndex=int(found[4]),
                Last=found[5] == "L",
                Priv=found[6] is None,
                R=found[7] == "R",
                W=found[8] == "W",
                X=found[9] == "X",
                Address=int(found[10], 16) & layout.PRI.field("Address").mask,
            )
        except ValueError:  # no such request: a number that does not fit
            return
        self.keep(_pri, layout.to_bytes("PRI", word), told=True, line=number, source=found[1])


# --- words ----------------------------------------------------------------------------------------

_TOKEN = re.compile(r"(?:0[xX])?[0-9a-fA-F]+", re.A)


def _bytes_of_kind(kind: str) -> int:
    return 8 if kind == "pte" else layout.record(_RECORDS[kind]).bytes


def _tokens(text: str) -> list[str] | None:
    """Return the numbers of a text that holds nothing else, None for another text."""
    words = text.replace(",", " ").split()
    return words if words and all(map(_TOKEN.fullmatch, words)) else None


def _words(tokens: list[str], size: int | None, unit: int | None) -> bytes:
    """Return what numbers stand for as bytes in memory order; `size` is that of a record."""
    digits = [len(token) - 2 * (token[:2] in ("0x", "0X")) for token in tokens]
    if max(digits) > 16:
        if unit not in (None, 8):
            raise DecodeError(f"words: a number of {max(digits)} digits does not fit {unit} bits")
        return b"".join(_whole(*pair, size) for pair in zip(tokens, digits, strict=True))
    if unit is None:
        unit = _unit(digits, size)
    for token in tokens:
        if int(token, 16) >> unit:
            raise DecodeError(f"words: {token} does not fit {unit} bits")
    return b"".join(int(token, 16).to_bytes(unit // 8, "little") for token in tokens)


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
    features: Features | None,
) -> list[Decoded]:  # fmt: skip
    if kind is None:
        kind = _SIZES.get(len(data))
    if kind is None:
        if len(data) == 64:
            hint = "an STE and a CD have as many, as two events do: say which (kind)"
        elif len(data) == 8:
            hint = "an L1STD, an L1CD and a translation table descriptor have as many: say which"
        else:
            hint = "an event has 32, a command or a page request 16: say which (kind)"
        raise DecodeError(f"words: {_plural(len(data), 'byte')} given; {hint}")
    size = _bytes_of_kind(kind)
    if not data or len(data) % size:
        raise DecodeError(
            f"words: {_plural(len(data), 'byte')} given; a record of kind {kind} has {size}"
        )
    decoders: dict[str, Callable[[bytes], Decoded]] = {
        "event": _event,
        "command": lambda record: _command(record, features),
        "pri": _pri,
        "ste": lambda record: _ste(record, features),
        "cd": _cd,
        "l1std": _l1std,
        "l1cd": _l1cd,
        "pte": lambda record: _pte(
            record, stage, granule, level, features is not None and bool(features.ds)
        ),
    }
    decoder = decoders[kind]
    return [decoder(data[at : at + size]) for at in range(0, len(data), size)]


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
) -> list[Decoded]:
    """Return records, or what a log tells, in words.

    Parameters
    ----------
    data : str or bytes
        Bytes: records in memory order.  Text that holds numbers only (hexadecimal, with or
        without ``0x``): the words of records, first word first.  Any other text: a log, such as
        that of a Linux kernel or a trace of QEMU; lines that tell nothing of an SMMUv3 are left
        out.
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

    Returns
    -------
    list of Decoded
        In the order of `data`; of a log, empty if nothing was found.

    Raises
    ------
    DecodeError
        The words are no whole records, or an argument is not one of those above.
    TypeError
        `data` is neither text nor bytes.

    >>> (one,) = decode("0x0000000900000004 0x0 0x0 0x0", "event")
    >>> one.name, one.fields["StreamID"]
    ('C_BAD_STE', 9)
    >>> print(decode("0012000100300012 0000000012340701")[0].text)  # doctest: +ELLIPSIS
    invalidate stage-1 entries (EL1) of VMID 0x1, ASID 0x12 or global for 0x12340000 to 0x12347fff...
    """  # noqa: E501
    _check("kind", kind, (None, *KINDS))
    _check("unit", unit, (None, 64, 32, 8))
    _check("stage", stage, (1, 2))
    _check("granule", granule, tuple(GRANULES))
    _check("level", level, (None, -1, 0, 1, 2, 3))
    if isinstance(data, str):
        tokens = _tokens(data)
        if tokens is None:
            if kind is not None or unit is not None:
                raise DecodeError(f"words: {_bad_token(data)}; hexadecimal numbers are wanted")
            return _Log(features).read(data)
        raw = _words(tokens, None if kind is None else _bytes_of_kind(kind), unit)
    elif isinstance(data, (bytes, bytearray, memoryview)):
        raw = bytes(data)
    else:
        raise TypeError(f"data: {type(data).__name__} given; str or bytes needed")
    return _records(raw, kind, stage, granule, level, features)


def _check(name: str, value: object, allowed: Iterable[object]) -> None:
    if value not in allowed or isinstance(value, bool):
        shown = ", ".join(str(one) for one in allowed if one is not None)
        raise DecodeError(f"{name}: {value!r} given; {shown} allowed")


def _bad_token(text: str) -> str:
    for word in text.replace(",", " ").split():
        if not _TOKEN.fullmatch(word):
            return f"{word[:40]!r} given"
    return "nothing given"
