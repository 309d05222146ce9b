"""Logs: what a driver or an emulator said of an SMMUv3, found in any text, as `Decoded`.

Not architectural: the lines that Linux's arm-smmu-v3 driver and secure drivers of its kind print,
and those of QEMU's trace.  They are found behind every prefix, in JSON that a journal exports, and
in mail that is quoted and wrapped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from smmufast import layout
from smmufast.decode import (
    AP,
    EVENTS,
    S2AP,
    Decoded,
    command_in_words,
    event_in_words,
    left_out,
    pri_in_words,
)
from smmufast.faults import Event

if TYPE_CHECKING:
    from smmufast.features import Features

__all__ = ["read_log"]

_U64 = (1 << 64) - 1
_INDEX = (1 << 20) - 1

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
    """Return the finding of a command queue error."""
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


def _sync_timeout(
    at: int | None = None, prod: int | None = None, cons: int | None = None, **more: Any
) -> Decoded:
    """Return a SYNC that did not complete; older kernels do not say where it is."""
    if at is None or prod is None or cons is None:
        return Decoded(
            "sync_timeout",
            "CMD_SYNC timeout",
            "a SYNC did not complete in time; this kernel does not say where it stands",
            (
                "Either the queue is not consumed at all, or the SYNC waits for an ATC_INV that a "
                "device does not answer, or for transactions in flight.",
            ),
            (
                "CMDQ_PROD, CMDQ_CONS and GERROR: CONS that does not move is a queue that stands",
                "the devices that ATS is enabled in, and whether power or clocks are on",
            ),
            **more,
        )
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
_VALUE = re.compile(r"([A-Za-z_][\w.]{0,30}|TT\[[01]\])@?\s?[=:]>?\s{0,2}(0[xX]-?[0-9a-fA-F]{1,16}"
                    r"|-?[0-9]{1,20})(?![\w.])", re.A)  # fmt: skip
_SPOKEN = re.compile(r"\b(sid) (0[xX][0-9a-fA-F]{1,8}|[0-9]{1,10})\b", re.A)
_FROM_TO = re.compile(r"\bfrom (0[xX][0-9a-fA-F]{1,8}) to (0[xX][0-9a-fA-F]{1,8})\b", re.A)
_EVENT_NAME = re.compile(r"\b(?:SMMU_EVT_)?([FCE]_[A-Z_]{3,30})\b", re.A)
_OPCODE_NAME = re.compile(r"\bSMMU_CMD_([A-Z0-9_]{2,30})\b", re.A)
_EXECUTION_ERROR = re.compile(r"Error on ([!-~]{1,40}) command execution: ([0-9]{1,3})\b", re.A)
_IRQS = ("event queue", "page request queue", "CMD_SYNC", "global errors")
_OFFSETS = {rec.offset: name for name, rec in layout.REGISTERS.items() if rec.offset is not None}


def _value(text: str) -> int:
    return int(text.replace("-", ""), 0 if "x" in text.lower() else 10) * (-1 if "-" in text else 1)


def _numbers(text: str) -> dict[str, int]:
    """Return the values that a line of the trace prints by name."""
    if found := _FROM_TO.search(text):
        return {"start": int(found[1], 16), "end": int(found[2], 16)}
    return {name: _value(value) for name, value in (*_SPOKEN.findall(text), *_VALUE.findall(text))}


def _sid_range(text: str) -> dict[str, int]:
    """Return the StreamIDs of a CFGI_STE_RANGE.

    QEMU before version 5.2 prints decimal digits behind 0x.  A range is aligned to its size, a
    power of two: where that holds for one of the two readings alone, it is the right one.
    """
    found = {name: value for name, value in _VALUE.findall(text) if name in ("start", "end")}
    if len(found) < 2:
        return _numbers(text)
    digits = {name: value.lower().replace("0x", "") for name, value in found.items()}
    if all(value.lower().startswith("0x") for value in found.values()):
        for base in (16, 10):
            if not all(value.lstrip("-").isdecimal() for value in digits.values()) and base == 10:
                break
            start, end = (int(digits[name], base) & 0xFFFF_FFFF for name in ("start", "end"))
            size = end - start + 1
            if size > 1 and not size & size - 1 and not start % size:
                return {"start": start, "end": end}
    return _numbers(text)


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
        return event_in_words(layout.to_bytes(rec, word), told=True, **more)
    meaning, check = EVENTS[name]
    return Decoded("event", name, _who(values), (meaning,), check, values, told=True, **more)


def _who(values: dict[str, int]) -> str:
    """Return what a record is about, as far as it is known."""
    who = [f"stream {values['StreamID']:#x}"] if "StreamID" in values else []
    if "SubstreamID" in values and values.get("SSV", 1):
        who.append(f"substream {values['SubstreamID']:#x}")
    if "InputAddr" in values:
        who.append(f"address {values['InputAddr']:#x}")
    return ", ".join(who)


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
    if name == "smmuv3_cmdq_cfgi_ste_range":
        values = _sid_range(rest)
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
    access = AP[fields["AP"]] if stage == 1 else S2AP[fields["S2AP"]]
    return [f"Access: {access}; AF={fields['AF']}."]


# --- lines of Linux's driver ----------------------------------------------------------------------

# Every pattern is bounded, so that a long line of anything costs a time that grows with its length.
_SOURCE = r"([!-~]{1,64}):\s{1,8}"
_HEX = r"0?[xX]?([0-9a-fA-F]{1,16})"
_RECEIVED = re.compile(_SOURCE + r"event 0x([0-9a-fA-F]{1,2}) received:", re.A)
_SKIPPING = re.compile(_SOURCE + r"skipping command in error state:", re.A)
_DWORD = re.compile(r"(?:([!-~]{1,64}):)?\s{0,64}0x([0-9a-fA-F]{16})\s{0,64}$", re.A)
_BARE_DWORD = re.compile(
    r"\s{0,64}(?:\[[ -~]{1,40}?\]\s{0,64}){0,3}0x[0-9a-fA-F]{16}\s{0,64}", re.A
)
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
_PRI_HEAD = re.compile(_SOURCE + r"unexpected PRI request received:", re.A)
_PRI_LINE = re.compile(
    _SOURCE + r"sid " + _HEX + r"\." + _HEX + r": \[([0-9]{1,3})(L?)\] (un)?privileged "
    r"\s{0,8}(R?)(W?)(X?)\s{0,8}access at iova " + _HEX, re.A,
)  # fmt: skip
_QEMU_FAILED = re.compile(
    r"([!-~]{1,64}) translation failed for iova=" + _HEX
    + r" ?\((?:SMMU_EVT_)?([FCE]_[A-Z_]{3,30})\)", re.A,
)  # fmt: skip
_UNHANDLED = ("Nobody handles page requests: the driver answers them with failure.",)
_CLASSES = {
    "CD fetch": 0,
    "Stage 1 translation table fetch": 1,
    "Input address caused fault": 2,
}


# --- the lines of a text --------------------------------------------------------------------------

# What a mailer, a journal or a secure world puts around a line.
_QUOTED = re.compile(r"(?:[ \t]{0,8}[>|]){1,40}[ \t]?", re.A)
_STAMP_BEGINS = re.compile(r"\s{1,8}\[\s{0,8}$", re.A)
_STAMP_ENDS = re.compile(r"\s{0,8}[0-9]{1,9}\.[0-9]{3,9}\]", re.A)
_NUMBERED = re.compile(r"\b(smmuid:[0-9]{1,9}) ", re.A)
_MEMBER = re.compile(r'\s{0,64}"(?:MESSAGE|message|msg|log)"\s{0,8}:\s{0,8}(["\[].*?),?\s{0,64}$')
_MESSAGES = ("MESSAGE", "message", "msg", "log")
_BEGINS = re.compile(
    r"\s{0,8}(?:\[\s{0,8}[0-9]|<[0-9]|[A-Z][a-z]{2} [ 0-9][0-9] [0-9]|[0-9]{4}-[0-9]{2}-"
    r"|[0-9]{1,9}@|\[[a-z]{1,12}\]|\s*$)", re.A,
)  # fmt: skip
_WRAPPED_FROM, _WRAPPED_TO = 60, 100
"""A line that was wrapped is so long at most, and would be longer than that with the next word."""
_PARTS = 4
"""Lines that one line may be wrapped into."""


def _texts(value: Any) -> Iterator[str]:
    """Yield the messages in a value of JSON, wherever they are."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += reversed(one)
        elif isinstance(one, dict):
            found = next((one[name] for name in _MESSAGES if name in one), None)
            if found is None:
                waiting += reversed(one.values())
            else:
                yield from _message(found)


def _message(value: Any) -> Iterator[str]:
    """Yield the lines of one message, which a journal may give as a list of bytes."""
    if isinstance(value, list) and all(type(byte) is int and 0 <= byte < 256 for byte in value):
        value = bytes(value).decode("utf-8", "replace")
    if isinstance(value, str):
        yield from value.splitlines()
    else:
        yield from _texts(value)


def _exported(line: str) -> list[str] | None:
    """Return the messages of a line of JSON, None for another line."""
    text = line.lstrip(" \t\x1e").removeprefix("data:").lstrip()
    try:
        if text[:1] == "{" or (text[:1] == "[" and text[1:].lstrip()[:1] in ("{", '"')):
            return list(_texts(json.loads(text)))
        if text[:1] == '"' and (found := _MEMBER.match(line)):
            return list(_message(json.loads(found[1])))
    except (ValueError, RecursionError):
        pass
    return None


def _split(text: str) -> Iterator[str]:
    """Yield the lines of a text one by one: a list of them all may be larger than the text."""
    start = 0
    while (end := text.find("\n", start)) >= 0:
        yield text[start:end]
        start = end + 1
    yield text[start:]


def _unwrapped(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text without what was put around them: number and line.

    Numbers count lines of the text, from 1.
    """
    for number, line in enumerate(_split(text), 1):
        line = line.rstrip("\r")
        if '"' in line:
            exported = _exported(line)
            if exported is not None:
                for message in exported:
                    yield number, message
                continue
        if ">" in line or "|" in line:
            line = _QUOTED.sub("", line, count=1) if _QUOTED.match(line) else line
        if "smmuid:" in line:
            line = _NUMBERED.sub(r"\1: ", line)
        # a time stamp that stands on both sides of a break
        if line[-1:] in "[ \t":
            line = _STAMP_BEGINS.sub("", line)
        if line[:16].lstrip()[:1].isdigit() and (found := _STAMP_ENDS.match(line)):
            line = line[found.end() :]
        yield number, line


def _joined(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text as they were before a mailer wrapped them."""
    start, whole, last, parts = 0, "", "", 0
    for number, line in _unwrapped(text):
        if (
            0 < parts < _PARTS
            and "smmu" in whole
            and "smmu" not in line
            and len(last) <= _WRAPPED_TO
            and not _BEGINS.match(line)  # an empty line begins something too
            and len(last) + 1 + len(line.split(maxsplit=1)[0]) > _WRAPPED_FROM
            and not _DWORD.search(whole)
            and not (_BARE_DWORD.fullmatch(line) and whole.endswith(("received:", "state:")))
        ):
            whole = f"{whole.rstrip()} {line.lstrip()}"
            parts += 1
        else:
            if parts:
                yield start, whole
            start, whole, parts = number, line, 1
        last = line
    if parts:
        yield start, whole


# --- reading a log --------------------------------------------------------------------------------


class _Pending:
    """A record that is printed over several lines, as far as it was read."""

    def __init__(self, kind: str, number: int, source: str, name: str = "") -> None:
        self.kind = kind
        self.name = name
        self.where: dict[str, Any] = {"line": number, "source": source}
        self.client = ""
        self.dwords: list[int] = []
        self.replaced = False

    @property
    def size(self) -> int:
        return 2 if self.kind == "command" else 4

    @property
    def record(self) -> bytes | None:
        """The record once it is complete."""
        if len(self.dwords) < self.size:
            return None
        return b"".join(dword.to_bytes(8, "little") for dword in self.dwords)

    def tell(self, features: Features | None) -> Decoded | None:
        """Return it in words, None for what cannot be told to be a record of an SMMUv3."""
        record = self.record
        if self.replaced:
            return None
        if self.kind == "command":
            if record is not None:
                return command_in_words(record, features, **self.where)
            return self.part("CMD", "a command of the queue was skipped")
        if record is not None:
            if not self.kind and record[0] not in layout.EVENTS:
                return None
            return event_in_words(record, client=self.client, **self.where)
        return self.part("EVENT", "an event was recorded") if self.kind else None

    def part(self, what: str, text: str) -> Decoded:
        """Return a record that is cut off, as far as it goes."""
        first = self.dwords[0] & 0xFF if self.dwords else None
        rec = layout.RECORDS[what]
        if self.kind == "command":
            if first is not None and first in layout.Opcode.__members__.values():
                rec = layout.command_record(first)
                self.name = rec.name
            elif first is not None:
                self.name = f"opcode {first:#04x}"
        elif first is not None or self.name:
            number = int(self.name, 16) if first is None else first
            self.name = f"event {number:#04x}"
            if number in layout.EVENTS:
                rec = layout.event_record(number)
                self.name = rec.name
        word = sum(dword << 64 * i for i, dword in enumerate(self.dwords))
        told = {f.name for f in rec.fields if f.dword < len(self.dwords)}
        values = layout.unpack(rec, word) if told else {}
        fields = {name: value for name, value in values.items() if name in told}
        known = ", ".join(f"{k}={v:#x}" if v > 9 else f"{k}={v}" for k, v in fields.items() if v)
        if self.dwords:
            count = f"{len(self.dwords)} of {self.size} dwords are"
            left = f"{_who(fields) or text}; cut off: {count} in"
        else:
            left = f"{text}; its record is not in"
        meaning, check = EVENTS.get(self.name, ("", ()))
        return Decoded(
            self.kind,
            self.name or "command",
            f"{left} the log",
            (*([meaning] if meaning else []), *([f"What is there says {known}."] if known else [])),
            check,
            fields,
            told=True,
            client=self.client,
            **self.where,
        )


class _Log:
    """A log being read line by line: what was found, and the records that are not complete."""

    def __init__(self, features: Features | None, limit: int) -> None:
        self.features = features
        self.limit = limit
        # what makes each finding, once the lines after it have told the rest
        self.found: list[Callable[[], Decoded | None]] = []
        self.pending: dict[str, _Pending] = {}
        self.latest: str | None = None
        self.events: dict[str, _Pending | dict[str, Any]] = {}
        self.errors: dict[str, int] = {}
        self.asked: dict[str, dict[str, bool]] = {}

    def read(
        self, text: str, progress: Callable[[int, int], object] | None = None
    ) -> list[Decoded]:
        """Return what the lines of a text tell."""
        rest = None
        lines = text.count("\n") + 1
        for number, line in _joined(text):
            if progress is not None and not number % 1024:
                progress(number, lines)
            self.line(number, line)
            if len(self.found) > self.limit:
                rest = number
                del self.found[self.limit :]
                break
        made = (make() for make in self.found)
        found = [decoded for decoded in made if decoded is not None]
        if rest is not None:
            found.append(left_out(self.limit, f"line {rest} and those behind it tell more", rest))
        return found

    def keep(self, make: Callable[..., Decoded | None], *arguments: Any, **more: Any) -> None:
        self.found.append(lambda: make(*arguments, **more))

    def line(self, number: int, line: str) -> None:
        """Take one line: what it is said to be decides who reads it."""
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
        if source is None and _BARE_DWORD.fullmatch(line):
            source = self.latest
        if source is None or not (source in self.pending or "arm-smmu-v3" in line):
            return False
        if source not in self.pending:  # the line that announces an event is missing
            self.open("", number, source)
        pending = self.pending[source]
        pending.dwords.append(int(found[2], 16))
        if pending.record is not None:
            del self.pending[source]
            self.latest = None
        return True

    def open(self, kind: str, number: int, source: str, name: str = "") -> None:
        pending = _Pending(kind, number, source, name)
        self.pending[source] = pending
        if kind:
            self.latest = source
        if kind != "command":
            self.events[source] = pending
        self.found.append(lambda: pending.tell(self.features))

    def driver(self, number: int, line: str) -> bool:
        """Take one message of the driver."""
        if " received:" in line and (found := _RECEIVED.search(line)):
            self.open("event", number, found[1], found[2])
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
            told = [None if found[i] is None else int(found[i], 16) for i in (2, 3, 4)]
            self.keep(_sync_timeout, *told, line=number, source=found[1])
        elif "overflow detected" in line and (found := _LOST.search(line)):
            self.keep(_overflow, found[2], line=number, source=found[1])
        elif "write aborted" in line and (found := _WRITE_ABORTED.search(line)):
            self.aborted(number, found[1], _ABORTED[found[2]][0 if found[3] else 1])
        elif "Service Failure" in line and (found := _FAILURE.search(line)):
            self.aborted(number, found[1], "SFM_ERR")
        elif "unexpected PRI" in line and (found := _PRI_HEAD.search(line)):
            self.page_request_announced(number, found[1])
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
        if isinstance(known, _Pending) and not known.client:
            if known.record is not None:
                event = Event(known.record)
                if (event.name, event.sid) == (name, sid):
                    known.client = client
                    return
            # dwords that are cut off and words of the same event: the words say more
            elif not known.dwords or known.dwords[0] >> 32 == sid:
                known.replaced = True
        values = {"StreamID": sid}
        if ssid:
            values |= {"SSV": 1, "SubstreamID": ssid}
        if found[6] is not None:
            ipa = int(found[7], 16) & layout.EVENT.field("IPA").mask
            values |= {"InputAddr": int(found[6], 16), "IPA": ipa}
        if found[8] is not None:
            values["FetchAddr"] = int(found[8], 16) & layout.EVENT.field("FetchAddr").mask
        self.events[source] = values
        self.keep(_told_event, name, values, line=number, source=source, client=client)

    def detail(self, found: re.Match[str]) -> None:
        """Take the second line of an event in words."""
        values = self.events.get(found[1])
        if not isinstance(values, dict):
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

    def page_request_announced(self, number: int, source: str) -> None:
        """Take the first line of a page request, which counts where the second is missing."""
        self.asked[source] = waiting = {"alone": True}

        def tell() -> Decoded | None:
            text = "a device asked for a page; the line that says which is not in the log"
            more: dict[str, Any] = {"line": number, "source": source}
            return Decoded("pri", "PRI", text, _UNHANDLED, **more) if waiting["alone"] else None

        self.found.append(tell)

    def page_request(self, number: int, found: re.Match[str]) -> None:
        """Take a page request of the driver's log."""
        if found[1] in self.asked:
            self.asked.pop(found[1])["alone"] = False
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
        self.keep(pri_in_words, layout.to_bytes("PRI", word), told=True, line=number,
                  source=found[1])  # fmt: skip


def read_log(
    text: str,
    features: Features | None,
    limit: int,
    progress: Callable[[int, int], object] | None = None,
) -> list[Decoded]:
    """Return what a log tells; behind `limit` findings a last one says what is left out."""
    return _Log(features, limit).read(text, progress)
