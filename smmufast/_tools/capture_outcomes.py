"""Requests of a capture and what each should give, corrected to the architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from smmufast import layout
from smmufast._arguments import either, in_words, must_be
from smmufast._device.smmu import NO_SUBSTREAM, Result, Smmu
from smmufast._files import as_number
from smmufast._tools.capture_files import MAX_REQUESTS, PAGE, U32, U64, Line
from smmufast.faults import ExternalAbort

if TYPE_CHECKING:
    from numpy.typing import NDArray

ANY = "any"
"""In `Expected.fault`: some fault, of a kind that the capture does not tell."""
UNTOLD = "untold"
"""In `Expected.fault`: the capture does not tell whether there was one."""

REQUEST = np.dtype(
    [
        ("sid", "<u4"),
        ("ssid", "<u4"),
        ("iova", "<u8"),
        ("write", "?"),
        ("priv", "?"),
        ("instr", "?"),
    ]
)


class Expected(NamedTuple):
    """What a request of a capture should give; None stands for what is not told.

    Attributes
    ----------
    action : str
        One of ACTIONS.
    fault : str or None
        Name of the fault, None for no fault, ANY or UNTOLD.
    recorded : bool
        Whether the fault is recorded.
    pa : int or None
    perm : int or None
        Accesses permitted with the request's privilege: 1 read, 2 write, 4 execute.
    perm_bits : int
        Bits of `perm` that are told.
    perm_s1 : bool
        Whether `perm` is what stage 1 alone permits.
    stage : int or None
        0 bypass, 1, 2, or 3 for both.
    level : int or None
    page_lg2 : int or None
    record, mask : bytes or None
        The event record in memory order, corrected to the architecture, and its bits that can be
        compared.
    cause : str or None
        Why the recorded implementation and the architecture differ; the values here are the
        architecture's.
    line : int
        Where it stands in its file.
    """

    action: str
    fault: str | None = None
    recorded: bool = False
    pa: int | None = None
    perm: int | None = None
    perm_bits: int = 3
    perm_s1: bool = False
    stage: int | None = None
    level: int | None = None
    page_lg2: int | None = None
    record: bytes | None = None
    mask: bytes | None = None
    cause: str | None = None
    line: int = 0


def _absolute(name: str) -> int:
    field = layout.EVENT.field(name)
    return field.mask << 64 * field.dword


_ALL = (1 << 256) - 1
_PNU_IND = _absolute("PnU") | _absolute("InD")
_TTRNW = _absolute("TTRnW")
_STAG = _absolute("STAG")
_STALL = _absolute("Stall")
_DWORD2 = U64 << 128
_DWORD3 = U64 << 192
_IPA_LOW = (PAGE - 1) << 192
_CLASS_TT = 1
_CLASS_IN = 2


def read_record(line: Line, name: str) -> bytes:
    """Return a member that is an event record: 32 bytes as hexadecimal digits."""
    text = line.text(name)
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        line.bad(f"{name}: not hexadecimal bytes")
    if len(raw) != 32:
        line.bad(must_be(name, "an event record of 32 bytes", len(raw)))
    if raw[0] not in layout.EVENTS:
        line.bad(must_be(f"event number of {name}", "one that there is", raw[0]))
    return raw


def fair(
    line: Line, raw: bytes, write: bool, differs: Sequence[Any] = ()
) -> tuple[bytes, bytes]:
    """Return a record as the architecture has it, and its bits that can be compared."""
    rec = layout.EVENTS[raw[0]]
    word = int.from_bytes(raw, "little")
    mask = _ALL
    if raw[0] == layout.Event.F_CD_FETCH and not word & _DWORD3:
        word = word & ~_DWORD2 | (word & _DWORD2) << 64
    changed = {}
    for item in differs:
        name, _, value = item.partition(":") if isinstance(item, str) else ("", "", "")
        try:
            field = rec.field(name)
            code = as_number(value)
            if code is None:
                raise ValueError
            changed[field.name] = code
            new = layout.pack(rec, **{field.name: code}) & field.mask << 64 * field.dword
        except ValueError:
            line.bad(f"rec_differs: {item!r} is not a field of {rec.name} and its value")
        word = word & ~(field.mask << 64 * field.dword) | new
    fields = layout.unpack(rec, word)
    if "CLASS" in fields:
        if fields["CLASS"] != _CLASS_IN and write:
            word &= ~_absolute("RnW")
        if fields["CLASS"] == _CLASS_TT and "TTRnW" in fields:
            mask &= ~_TTRNW
    if "PnU" in fields:
        mask &= ~_PNU_IND
    if "IPA" in fields:
        # UNKNOWN for a fault of stage 1
        mask &= ~(_IPA_LOW if fields["S2"] else _DWORD3)
    return word.to_bytes(32, "little"), (mask & _comparable(word)).to_bytes(32, "little")


def _comparable(word: int) -> int:
    """Return the bits of a record that do not depend on what else the SMMU did: not STAG."""
    return _ALL & ~_STAG if word & _STALL else _ALL


def _outcome(
    line: Line, out: Line, iova: int, write: bool, queue: bool, oas_bits: int, **more: Any
) -> Expected:
    """Return what an ``out`` or ``arch`` of kind "cases" says."""
    out.only("k", "pa", "perm", "stage", "name", "rec", "nrec", "landed")
    kind = out.text("k")
    told = {"line": line.number, **more}
    priv = "priv" in line.values
    if kind == "ok":
        stage = out.integer("stage", 3, 1) if "stage" in out.values else None
        bits = 7 if priv else 3
        perm = out.integer("perm", bits) if "perm" in out.values else None
        told |= {"perm": perm, "perm_bits": bits, "perm_s1": stage == 3 and not priv}
        return Expected("ok", pa=out.integer("pa", U64), stage=stage, **told)
    if kind in ("bypass", "disable"):
        if kind == "disable" and iova >> oas_bits:
            told["cause"] = "bypass_oas (SMMUEN=0)"
            return Expected("abort", **told)
        action = "bypass" if kind == "bypass" else "disabled"
        return Expected(action, pa=iova, stage=0, **told)
    if kind == "abort":
        return Expected("abort", None if queue else UNTOLD, **told)
    if kind == "fault_silent":
        return Expected("abort", ANY if queue else UNTOLD, **told)
    if kind != "event":
        kinds = ("ok", "event", "fault_silent", "abort", "bypass", "disable")
        out.bad(must_be("k", either(kinds), kind))
    name = out.text("name")
    if name not in layout.Event.__members__:
        out.bad(must_be("name", "that of an event", name))
    told |= {"fault": name, "recorded": queue}
    if "rec" not in out.values:
        return Expected("abort", **told)
    raw = read_record(out, "rec")
    if raw[0] != layout.Event[name]:
        out.bad(in_words("rec", f"of event {name}, as name says", f"of event {raw[0]:#x}"))
    differs = line.list("rec_differs") if "rec_differs" in line.values else ()
    if priv and not differs:
        mask = _comparable(int.from_bytes(raw, "little")).to_bytes(32, "little")
        return Expected("abort", record=raw, mask=mask, **told)
    record, mask = fair(line, raw, write, differs)
    return Expected("abort", record=record, mask=mask, **told)


_ACCESS = ("sid", "ssid", "iova", "priv", "instr")
"""Members of every line that tells of an access."""


class Requests:
    """Requests and what is expected of them, as they are read; `before` were read before them."""

    def __init__(self, before: int = 0) -> None:
        self.before = before
        self.rows: list[tuple[int, int, int, bool, bool, bool]] = []
        self.expected: list[Expected] = []

    def array(self) -> NDArray[Any]:
        """Return the requests as rows of REQUEST."""
        array = np.array(self.rows, REQUEST)
        array.flags.writeable = False
        return array

    def add(
        self, line: Line, row: tuple[int, int, int, bool, bool, bool], expected: Expected
    ) -> None:
        """Add a request and what it should give."""
        if self.before + len(self.rows) == MAX_REQUESTS:
            line.bad(f"more than {MAX_REQUESTS} requests; longer traffic is a trace")
        self.rows.append(row)
        self.expected.append(expected)

    def add_case(self, line: Line, inner: Any, queue: bool, oas_bits: int) -> None:
        """Add a request of kind "cases"."""
        request = Line(line.path, line.number, inner)
        request.only(*_ACCESS, "rnw", "out", "arch_differs", "rec_differs", "fam", "tag", "feats")
        sid, ssid, iova, priv, instr, _ = self._common(request)
        write = not request.integer("rnw", 1)
        if instr and write:
            request.bad(must_be("instr", "0 beside rnw=0 (a write is always data)", 1))
        if "arch_differs" in request.values:
            differs = request.inner("arch_differs")
            differs.only("cause", "arch", "why")
            cause = differs.text("cause")
            out = differs.inner("arch")
            expected = _outcome(request, out, iova, write, queue, oas_bits, cause=cause)
        else:
            expected = _outcome(request, request.inner("out"), iova, write, queue, oas_bits)
        self.add(line, (sid, ssid, iova, write, priv, instr), expected)

    def _common(self, line: Line) -> tuple[int, int, int, bool, bool, bool]:
        """Return sid, ssid, iova, priv, instr and whether the access is told."""
        ssid = line.integer("ssid", 0xFFFFF) if line.values.get("ssid") is not None else None
        told = "priv" in line.values
        return (
            line.integer("sid", U32),
            NO_SUBSTREAM if ssid is None else ssid,
            line.integer("iova", U64),
            line.flag("priv") if told else True,
            line.flag("instr"),
            told,
        )

    def add_translation(self, line: Line, enabled: bool) -> None:
        """Add the accesses that a line of ``requests.jsonl.gz`` tells of."""
        line.only(*_ACCESS, "pa", "perm", "stage", "level", "page_shift", "bypass", "age")
        sid, ssid, iova, priv, instr, told = self._common(line)
        bits = 7 if told else 3
        perm = line.integer("perm", 7)
        pa = line.integer("pa", U64)
        if line.flag("bypass"):
            expected = Expected(
                "bypass" if enabled else "disabled", pa=pa, stage=0, line=line.number or 0
            )
        else:
            stage = line.integer("stage", 3)
            expected = Expected(
                "ok",
                pa=pa,
                perm=perm & bits,
                perm_bits=bits,
                perm_s1=stage == 3 and not told,
                stage=stage,
                level=line.integer("level", 3, -1),
                page_lg2=line.integer("page_shift", 63),
                line=line.number or 0,
            )
            if not perm & (4 if instr else 3):
                line.bad(must_be("perm", "one that permits an access to be replayed", perm))
        self.add(line, (sid, ssid, iova, not instr and not perm & 1, priv, instr), expected)

    def add_event(self, line: Line) -> None:
        """Add the access that a line of ``events.jsonl.gz`` tells of."""
        line.only(*_ACCESS, "rnw", "hex", "action", "type")
        sid, ssid, iova, priv, instr, told = self._common(line)
        write = not line.flag("rnw") if "rnw" in line.values else line.bad("rnw is missing")
        action = line.text("action") if "action" in line.values else "abort"
        if action not in ("abort", "raz_wi", "stall"):
            line.bad(must_be("action", "'abort', 'raz_wi' or 'stall'", action))
        record = raw = read_record(line, "hex")
        mask = _comparable(int.from_bytes(raw, "little")).to_bytes(32, "little")
        if not told:
            record, mask = fair(line, raw, write, ())
        expected = Expected(
            action,
            layout.Event(raw[0]).name,
            True,
            record=record,
            mask=mask,
            line=line.number or 0,
        )
        self.add(line, (sid, ssid, iova, write, priv, instr), expected)


def translate_alone(smmu: Smmu, sid: int, iova: int, **access: Any) -> Result:
    """Translate an access as if it were the only one.

    Hardware updates of tables are not kept, and a transaction that stalls is terminated.
    `access` are the keywords of `Smmu.translate`.
    """
    if smmu.features.httu:
        access.pop("trace", None)
        result = _walk(smmu, sid, iova, access)
    else:
        result = smmu.translate(sid, iova, **access)
    if result.action == "stall":
        smmu.command("STALL_TERM", StreamID=sid)
    return result


def _walk(smmu: Smmu, sid: int, iova: int, access: Mapping[str, Any]) -> Result:
    """Translate by a walk that keeps hardware updates to itself."""
    walk = smmu.start_walk(sid, iova, **access)
    written: dict[int, bytes] = {}
    while (request := walk.request) is not None:
        data: bytes | None = written.get(request.address)
        if data is None:
            try:
                data = smmu.memory.read(request.address, request.size)
            except ExternalAbort:
                data = None
        if request.swap is not None and data is not None:
            expected, desired = request.swap
            if int.from_bytes(data, "little") == expected:
                written[request.address] = desired.to_bytes(8, "little")
        walk.supply(data)
    if walk.result is None:
        raise RuntimeError("the walk is not done")
    return walk.result
