"""Captures: memory images and registers on disk, with what another implementation made of them.

Not architectural, except for the notes on fair comparison below.  A capture is a directory of one
of two kinds.  Numbers in JSON are integers or strings: ``0x`` and hexadecimal digits, or decimal
ones.  A member that is not described here is refused, so that nothing is left out unseen; those
that only tell how a line came about are ``age``, ``type``, ``fam``, ``tag``, ``feats``, ``nrec``
and ``landed``.

Kind "linux": one configuration
-------------------------------
``meta.json``
    An object.  ``regs``: registers by name; STRTAB_BASE, STRTAB_BASE_CFG, CR0, IDR0, IDR1, IDR3
    and IDR5 are needed, AIDR (default 1), CR2 (default 0) and GBPA (default 0x1000) are read,
    others are kept.  The RAM: ``ram_base`` and ``ram_size`` in bytes, or ``regions``, a list of
    [base, size].  ``counts``, an object: how many ``requests``, ``events``, ``pages`` and
    ``queue_pages`` the other files hold; so do the numbers ``truth`` or ``requests``, ``events``
    and ``pages`` beside it.  A file that holds more or fewer is refused.  Anything else is kept.
``pages.npz``
    ``page_addr`` uint64[N], multiples of 4096; ``pages`` uint8[N, 4096].  RAM that no page covers
    reads as zero; outside RAM a read is an external abort.
``requests.jsonl.gz``
    One successful translation a line: ``sid``, ``iova``, ``pa``, ``perm``, ``stage``, ``level``,
    ``page_shift``; ``bypass`` true for one that was not translated.  ``perm`` is what the page
    permits: 1 read, 2 write, 4 execute.  The line is replayed as a read if bit 0 is set, else as a
    write, and each access that ``perm`` denies must give F_PERMISSION.  ``stage`` is 1, 2, or 3
    where both translate.
``events.jsonl.gz``
    One event a line: ``sid``, ``iova``, ``rnw``, ``hex`` (the record in memory order);
    ``action`` is "abort" if absent, "raz_wi" or "stall".
``queues.npz``
    As ``pages.npz``: pages of the command, event and page request queues.  May be absent.  The
    queues are rings in mid-history (`Queue`), at CMDQ_BASE, EVENTQ_BASE and PRIQ_BASE, and their
    registers are among ``regs``.

Lines of both lists may have ``ssid``, ``instr`` and ``priv``.  Where ``priv`` is given, records
are compared to the last bit, and ``perm`` has three bits.  Where it is absent, the implementation
that was recorded took every access as privileged data although its records say PnU=0: such lines
are replayed so, and PnU and InD are not compared.

Kind "cases": many configurations
---------------------------------
``pages.npz``
    ``pages`` uint8[K, 4096].
``cases.jsonl.gz``
    First ``{"header": {"idr": {...}, "ram": [lo, hi], ...}}``, then a configuration a line:
    ``id``, ``cr0``, ``regs``, ``pages`` ([address, index] pairs) and ``reqs``.  A request has
    ``sid``, ``iova``, ``rnw``, and ``out``: ``k`` is "ok" (pa, perm, stage), "event" (name, rec),
    "fault_silent", "abort", "bypass" or "disable".  ``arch_differs`` {cause, arch, why} replaces
    ``out``; ``rec_differs`` lists fields of the record, "NAME:VALUE", to replace.  ``ssid``,
    ``instr`` and ``priv`` are as in the lists of kind "linux".

Command batches
---------------
A file of lines like the lists above, ``queues.jsonl.gz``.  First ``{"header": ..., "idr": {...}}``,
then lines with ``kind``; those of kind "cmds" have ``id``, ``cmds`` (16 bytes each, hexadecimal, in
memory order), the indices ``start`` and ``prod``, and what was read back: ``cons`` (CMDQ_CONS) and
``err`` (its ERR).

Comparing fairly
----------------
These apply to lines without ``priv``; they undo what the recorded implementation does otherwise
than the architecture (IHI 0070 7.3).  PnU and InD are not compared.  Records of class CD and TT
may hold RnW=1 for a write: RnW is that of the transaction.  F_CD_FETCH holds its address in bits
[191:128]: it is moved to FetchAddr.  IPA[11:0] and TTRnW are not compared, nor is IPA where S2=0,
for it is UNKNOWN there.  Configurations of kind "cases" run with CR2.RECINVSID=1, and ignore
STE.S2PTW, since their implementation has no memory attributes.  ``perm`` of a translation by both
stages is what stage 1 permits.  "disable" is recorded for
addresses beyond OAS too, where the architecture has an abort without an event (6.3.14): such
requests have the cause "bypass_oas (SMMUEN=0)".

Each request is taken alone, whatever the others are: hardware updates of tables are not kept, a
transaction that stalls is terminated, and the STAG of its record is not compared.

Limits
------
A capture has at most MAX_REQUESTS requests, MAX_CONFIGURATIONS configurations and MAX_PAGES pages;
a list unpacks to MAX_TEXT bytes and one line of it to MAX_LINE.  What is larger is refused before
it is unpacked any further, whatever the size of the file.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zipfile
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
from numpy.lib import format as npy

from smmufast import layout
from smmufast._arguments import either, flag, in_words, integer, must_be, one_of, shown
from smmufast._device.smmu import NO_SUBSTREAM, Result, Smmu
from smmufast._engine.memory import Memory
from smmufast._files import as_number, refuse_taken, replacing_directory
from smmufast.faults import ExternalAbort
from smmufast.features import Features, modelled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from smmufast._engine.tlb import Caches

__all__ = [
    "ANY",
    "REQUEST",
    "UNTOLD",
    "Batch",
    "Capture",
    "CaptureError",
    "Configuration",
    "Expected",
    "Filling",
    "Queue",
    "held_queues",
    "load_batches",
    "load_events",
    "load_fillings",
    "load_queue",
    "npy_header",
    "translate_alone",
]

PAGE = 4096
MAX_PAGES = 1 << 18
"""Pages that one file may hold (1 GiB)."""
MAX_REQUESTS = 1 << 20
"""Requests and events of one capture; longer traffic is a trace (`smmufast.trace`)."""
MAX_CONFIGURATIONS = 1 << 16
"""Configurations of one capture."""
MAX_HEADER = 10_000
"""Bytes of the header of one array."""
MAX_TEXT = 1 << 28
"""Bytes that one list may unpack to."""
MAX_LINE = 1 << 24
"""Bytes of one line of a list."""
MAX_RAM = 1 << 52
"""Bytes of one region of RAM."""

MAX_REGIONS = 4096
"""Regions of RAM."""

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
"""A request in an array; ssid 0xFFFFFFFF is none."""

_U32 = (1 << 32) - 1
_U64 = (1 << 64) - 1
_NEEDED = ("STRTAB_BASE", "STRTAB_BASE_CFG", "CR0", "IDR0", "IDR1", "IDR3", "IDR5")
_DEFAULTS = {"AIDR": 1, "CR2": 0, "GBPA": 0x1000}
_CR0 = layout.REGISTERS["CR0"]
_EVENTQEN = _CR0.field("EVENTQEN").mask
_SMMUEN = _CR0.field("SMMUEN").mask
_RECINVSID = layout.REGISTERS["CR2"].field("RECINVSID").mask


class CaptureError(ValueError):
    """A capture that cannot be read: which file, which line, and what is wrong.

    Attributes
    ----------
    path : str
    line : int or None
        Counted from 1; None when the file has no lines or the whole of it is meant.
    problem : str
    """

    def __init__(self, path: str, line: int | None, problem: str) -> None:
        """Name the file, the line and the problem."""
        self.path = path
        self.line = line
        self.problem = problem
        super().__init__(f"{path}{'' if line is None else f':{line}'}: {problem}")


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


# --- reading files --------------------------------------------------------------------------------


class _Line:
    """A JSON object and where it stands; its members are asked for by type."""

    __slots__ = ("number", "path", "values")

    def __init__(self, path: str, number: int | None, values: Any) -> None:
        self.path = path
        self.number = number
        if not isinstance(values, dict):
            self.bad(in_words("the JSON", "an object", _kind(values)))
        self.values: dict[str, Any] = values

    def bad(self, problem: str) -> NoReturn:
        raise CaptureError(self.path, self.number, problem)

    def get(self, name: str) -> Any:
        if name not in self.values:
            self.bad(f"{name} is missing")
        return self.values[name]

    def only(self, *names: str) -> None:
        """Refuse an object that has other members than these."""
        for name in self.values:
            if name not in names:
                self.bad(must_be("a member", either(names), name[:70]))

    def number_of(self, name: str, value: Any, last: int, first: int = 0) -> int:
        if type(value) is str:
            found = as_number(value)
            value = value if found is None else found
        if type(value) is not int:
            self.bad(in_words(name, "a number", _kind(value)))
        if not first <= value <= last:
            self.bad(must_be(name, f"{first} to {shown(last)}", value))
        return value

    def integer(self, name: str, last: int, first: int = 0) -> int:
        return self.number_of(name, self.get(name), last, first)

    def flag(self, name: str) -> bool:
        """Return an optional member that is 0 or 1, or false or true."""
        value = self.values.get(name, 0)
        return value if type(value) is bool else bool(self.number_of(name, value, 1))

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            self.bad(in_words(name, "a string", _kind(value)))
        if not value.isprintable():
            self.bad(f"{name}: {value!r} has characters that cannot be shown")
        return value

    def list(self, name: str, length: int | None = None) -> list[Any]:
        value = self.get(name)
        if not isinstance(value, list) or (length is not None and len(value) != length):
            size = "" if length is None else f" of {length}"
            self.bad(in_words(name, f"a list{size}", _kind(value)))
        return value

    def inner(self, name: str) -> _Line:
        """Return a member that is an object itself."""
        value = self.get(name)
        if not isinstance(value, dict):
            self.bad(in_words(name, "an object", _kind(value)))
        return _Line(self.path, self.number, value)


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    return {str: "a string", bool: "a truth value", float: "a fraction", int: "a number"}.get(
        type(value), "null"
    )


def _parse(path: str, number: int | None, text: bytes) -> _Line:
    try:
        values = json.loads(text)
    except RecursionError:
        raise CaptureError(path, number, "not JSON: nested too deeply") from None
    except ValueError as error:
        # also an unknown encoding, and a number of too many digits
        reason = getattr(error, "msg", None) or str(error).partition(";")[0]
        raise CaptureError(path, number, f"not JSON: {reason}") from None
    return _Line(path, number, values)


def _meta(path: str) -> _Line:
    try:
        with open(path, "rb") as file:
            return _parse(path, None, file.read(MAX_LINE))
    except OSError as error:
        raise _open_error(path, error) from None


def _open_error(path: str, error: OSError) -> CaptureError:
    return CaptureError(path, None, error.strerror or str(error))


class _Watch:
    """How far the reading of a directory's files has come, for a report of progress."""

    def __init__(self, path: str, progress: Callable[[int, int], object] | None) -> None:
        self.progress = progress
        self.before = 0
        self.work = 0
        if progress is not None:
            with os.scandir(path) as entries:
                self.work = sum(entry.stat().st_size for entry in entries)

    def at(self, file: Any) -> None:
        """Report how far one file was read; `file` is the compressed one."""
        if self.progress is not None:
            self.progress(min(self.before + file.tell(), self.work), self.work)

    def done(self, path: str) -> None:
        """Count a file that was read to its end."""
        if self.progress is not None:
            self.before += os.path.getsize(path)


_UNWATCHED = _Watch("", None)
_PIECE = 1 << 20


def _lines(path: str, watch: _Watch = _UNWATCHED) -> Iterator[_Line]:
    """Yield the objects of a compressed list."""
    number = 0
    total = 0
    try:
        with open(path, "rb") as packed, gzip.GzipFile(fileobj=packed) as file:
            while text := file.readline(MAX_LINE + 1):
                number += 1
                total += len(text)
                if not number % 1024:
                    watch.at(packed)
                if len(text) > MAX_LINE:
                    raise CaptureError(path, number, f"longer than {MAX_LINE} bytes")
                if total > MAX_TEXT:
                    raise CaptureError(path, number, f"the list unpacks to over {MAX_TEXT} bytes")
                if text.strip():
                    yield _parse(path, number, text)
        watch.done(path)
    except EOFError:
        raise CaptureError(path, number + 1, "the compressed data is cut off") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise CaptureError(path, number + 1, f"the compressed data is damaged: {error}") from None
    except OSError as error:
        raise _open_error(path, error) from None


def _arrays(
    path: str, watch: _Watch = _UNWATCHED, **wanted: tuple[str, int]
) -> list[NDArray[Any]]:
    """Read arrays of an .npz file, given the dtype and the size of a row in bytes of each.

    Sizes are checked before anything is unpacked, and no objects are read.
    """
    found = []
    try:
        with open(path, "rb") as packed, zipfile.ZipFile(packed) as archive:
            members = set(archive.namelist())
            for name, (dtype, row) in wanted.items():
                if f"{name}.npy" not in members:
                    raise CaptureError(path, None, f"there is no array {name}")
                with archive.open(f"{name}.npy") as file:
                    found.append(_array(path, name, file, np.dtype(dtype), row))
                    watch.at(packed)
        watch.done(path)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise CaptureError(path, None, f"the archive is damaged: {error}") from None
    except (NotImplementedError, RuntimeError) as error:
        # a compression or an encryption that zipfile does not know
        raise CaptureError(path, None, f"the archive cannot be unpacked: {error}") from None
    except OSError as error:
        raise _open_error(path, error) from None
    return found


def npy_header(
    file: Any, problem: Callable[[str], Exception]
) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of an .npy file: its shape, whether it is in columns, and its dtype.

    `problem` makes the exception for a header that is damaged from what is wrong with it; what
    the file itself raises goes through.
    """
    try:
        mark = file.read(npy.MAGIC_LEN)
        if not mark.startswith(npy.MAGIC_PREFIX):
            raise ValueError(f"no .npy file: it starts with {mark[:6]!r}")
        first = npy.read_magic(io.BytesIO(mark)) == (1, 0)
        # the text of a header is read as a whole: its length must not be believed
        length = file.read(2 if first else 4)
        size = int.from_bytes(length, "little")
        if size > MAX_HEADER:
            raise ValueError(must_be("the header", f"up to {MAX_HEADER} bytes", size))
        text = io.BytesIO(length + file.read(size))
        return npy.read_array_header_1_0(text) if first else npy.read_array_header_2_0(text)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile):
        raise
    except Exception as error:  # numpy does not say what a damaged header may raise
        raise problem(str(error).partition("\n")[0]) from None


def _array(path: str, name: str, file: Any, dtype: np.dtype[Any], row: int) -> NDArray[Any]:
    width = row // dtype.itemsize
    shape, fortran, given = npy_header(
        file, lambda what: CaptureError(path, None, f"{name}: {what}")
    )
    if given != dtype or given.hasobject:
        raise CaptureError(path, None, in_words(f"{name}.dtype", str(dtype), str(given)))
    if shape[1:] != (() if width == 1 else (width,)) or not shape or fortran:
        size = "(N,)" if width == 1 else f"(N, {width}), in rows"
        raise CaptureError(path, None, must_be(f"{name}.shape", size, shape))
    if not 0 <= shape[0] <= MAX_PAGES:
        raise CaptureError(path, None, must_be(name, f"0 to {MAX_PAGES} pages", shape[0]))
    data = bytearray()
    wanted = shape[0] * row
    while len(data) < wanted and (piece := file.read(min(_PIECE, wanted - len(data)))):
        data += piece
    if len(data) != wanted:
        problem = must_be(name, f"{wanted} bytes by its shape {shape}", len(data))
        raise CaptureError(path, None, problem)
    array = np.frombuffer(data, dtype).reshape(shape)
    array.flags.writeable = False
    return array


# --- expected outcomes ----------------------------------------------------------------------------


def _absolute(name: str) -> int:
    field = layout.EVENT.field(name)
    return field.mask << 64 * field.dword


_ALL = (1 << 256) - 1
_PNU_IND = _absolute("PnU") | _absolute("InD")
_TTRNW = _absolute("TTRnW")
_STAG = _absolute("STAG")
_STALL = _absolute("Stall")
_DWORD2 = _U64 << 128
_DWORD3 = _U64 << 192
_IPA_LOW = (PAGE - 1) << 192
_CLASS_TT = 1
_CLASS_IN = 2


def _record(line: _Line, name: str) -> bytes:
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


def _fair(line: _Line, raw: bytes, write: bool, differs: Sequence[Any]) -> tuple[bytes, bytes]:
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
    line: _Line, out: _Line, iova: int, write: bool, queue: bool, oas_bits: int, **more: Any
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
        return Expected("ok", pa=out.integer("pa", _U64), stage=stage, **told)
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
    raw = _record(out, "rec")
    if raw[0] != layout.Event[name]:
        out.bad(in_words("rec", f"of event {name}, as name says", f"of event {raw[0]:#x}"))
    differs = line.list("rec_differs") if "rec_differs" in line.values else ()
    if priv and not differs:
        mask = _comparable(int.from_bytes(raw, "little")).to_bytes(32, "little")
        return Expected("abort", record=raw, mask=mask, **told)
    record, mask = _fair(line, raw, write, differs)
    return Expected("abort", record=record, mask=mask, **told)


_ACCESS = ("sid", "ssid", "iova", "priv", "instr")
"""Members of every line that tells of an access."""


class _Requests:
    """Requests and what is expected of them, as they are read; `before` were read before them."""

    def __init__(self, before: int = 0) -> None:
        self.before = before
        self.rows: list[tuple[int, int, int, bool, bool, bool]] = []
        self.expected: list[Expected] = []

    def array(self) -> NDArray[Any]:
        array = np.array(self.rows, REQUEST)
        array.flags.writeable = False
        return array

    def add(
        self, line: _Line, row: tuple[int, int, int, bool, bool, bool], expected: Expected
    ) -> None:
        if self.before + len(self.rows) == MAX_REQUESTS:
            line.bad(f"more than {MAX_REQUESTS} requests; longer traffic is a trace")
        self.rows.append(row)
        self.expected.append(expected)

    def add_case(self, line: _Line, inner: Any, queue: bool, oas_bits: int) -> None:
        request = _Line(line.path, line.number, inner)
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

    def _common(self, line: _Line) -> tuple[int, int, int, bool, bool, bool]:
        """Return sid, ssid, iova, priv, instr and whether the access is told."""
        ssid = line.integer("ssid", 0xFFFFF) if line.values.get("ssid") is not None else None
        told = "priv" in line.values
        return (
            line.integer("sid", _U32),
            NO_SUBSTREAM if ssid is None else ssid,
            line.integer("iova", _U64),
            line.flag("priv") if told else True,
            line.flag("instr"),
            told,
        )

    def add_translation(self, line: _Line, enabled: bool) -> None:
        line.only(*_ACCESS, "pa", "perm", "stage", "level", "page_shift", "bypass", "age")
        sid, ssid, iova, priv, instr, told = self._common(line)
        bits = 7 if told else 3
        perm = line.integer("perm", 7)
        pa = line.integer("pa", _U64)
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

    def add_event(self, line: _Line) -> None:
        line.only(*_ACCESS, "rnw", "hex", "action", "type")
        sid, ssid, iova, priv, instr, told = self._common(line)
        write = not line.flag("rnw") if "rnw" in line.values else line.bad("rnw is missing")
        action = line.text("action") if "action" in line.values else "abort"
        if action not in ("abort", "raz_wi", "stall"):
            line.bad(must_be("action", "'abort', 'raz_wi' or 'stall'", action))
        record = raw = _record(line, "hex")
        mask = _comparable(int.from_bytes(raw, "little")).to_bytes(32, "little")
        if not told:
            record, mask = _fair(line, raw, write, ())
        expected = Expected(
            action,
            layout.Event(raw[0]).name,
            True,
            record=record,
            mask=mask,
            line=line.number or 0,
        )
        self.add(line, (sid, ssid, iova, write, priv, instr), expected)


# --- translating ----------------------------------------------------------------------------------


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


# --- configurations -------------------------------------------------------------------------------


class Configuration:
    """Memory, registers and requests of one state of an SMMU.

    Attributes
    ----------
    id : str
    registers : dict of str to int
        By name, as recorded.
    features : Features
        As recorded.
    masked : dict of str to int
        Features that were recorded and that this version does not model, with the codes recorded;
        `smmu` leaves them out.
    regions : tuple of (int, int)
        Base and size of the RAM, in bytes, ascending.
    ignore_s2ptw : bool
        For `Smmu`: the recorded implementation has no memory attributes.
    page_addresses : uint64[N]
    requests : array of REQUEST
        Read-only.
    expected : list of Expected
        One for each request.
    source : str
        The file that the requests come from.
    """

    def __init__(
        self,
        id: str,
        registers: dict[str, int],
        features: Features,
        regions: tuple[tuple[int, int], ...],
        page_addresses: NDArray[np.uint64],
        pages: NDArray[np.uint8],
        rows: NDArray[np.intp] | None,
        requests: _Requests,
        source: str,
        sources: Sequence[tuple[int, str]] = (),
        ignore_s2ptw: bool = False,
    ) -> None:
        """Take what `Capture.load` has read and checked."""
        self.id = id
        self.registers = registers
        self.features = features
        self.masked: dict[str, int] = modelled(features)[1]
        self.regions = regions
        self.ignore_s2ptw = ignore_s2ptw
        self.page_addresses = page_addresses
        self.requests = requests.array()
        self.expected = requests.expected
        self.source = source
        self._sources = sources
        self._pages = pages
        self._rows = rows

    def where(self, index: int) -> str:
        """Return the file and line that a request stands in."""
        path = self.source
        for first, other in self._sources:
            if index >= first:
                path = other
        return f"{os.path.basename(path)}:{self.expected[index].line}"

    def _move(self, id: str, directory: str) -> None:
        """Follow the directory that it was read from."""
        self.id = id
        self.source = os.path.join(directory, os.path.basename(self.source))
        self._sources = [
            (first, os.path.join(directory, os.path.basename(other)))
            for first, other in self._sources
        ]

    def page(self, index: int) -> NDArray[np.uint8]:
        """Return the contents of the page at ``page_addresses[index]``: uint8[4096]."""
        page: NDArray[np.uint8] = self._pages[index if self._rows is None else self._rows[index]]
        return page

    def memory(self) -> Memory:
        """Return a new Memory that holds the pages; other RAM reads as zero."""
        memory = Memory()
        for base, size in self.regions:
            memory.add_private(base, size)
        starts = [base for base, _ in self.regions]
        for i, address in enumerate(self.page_addresses.tolist()):
            page = self.page(i)
            if not page.any():
                continue
            k = bisect_left(starts, address + PAGE)
            while k > 0 and sum(self.regions[k - 1]) > address:
                k -= 1
                base, size = self.regions[k]
                first, end = max(base, address), min(base + size, address + PAGE)
                memory.write(first, page[first - address : end - address])
        return memory

    def smmu(self, memory: Memory | None = None, caches: Caches | None = None) -> Smmu:
        """Return a Smmu with the recorded registers, by default over a new `memory()`.

        Its features are those recorded without `masked`, its caches those given.
        """
        return Smmu(
            self.memory() if memory is None else memory,
            modelled(self.features)[0],
            strtab_base=self.registers["STRTAB_BASE"],
            strtab_base_cfg=self.registers["STRTAB_BASE_CFG"],
            cr0=self.registers["CR0"],
            cr2=self.registers["CR2"],
            gbpa=self.registers["GBPA"],
            ignore_s2ptw=self.ignore_s2ptw,
            caches=caches,
        )

    def __repr__(self) -> str:
        """Name it and say how large it is."""
        masked = "".join(f" masked {name}={value}" for name, value in self.masked.items())
        return (
            f"<Configuration {self.id}: {len(self.page_addresses)} pages, "
            f"{len(self.requests)} requests{masked}>"
        )


def _registers(line: _Line, given: Mapping[str, Any], needed: Iterable[str]) -> dict[str, int]:
    registers = dict(_DEFAULTS)
    for name, value in given.items():
        record = layout.REGISTERS.get(name)
        last = _U64 if record is None or record.bytes == 8 else _U32
        registers[name] = line.number_of(name, value, last)
    for name in needed:
        if name not in registers:
            line.bad(f"register {name} is missing")
    return registers


def _features(line: _Line, registers: Mapping[str, int]) -> Features:
    try:
        return Features.from_idr(*(registers[n] for n in ("IDR0", "IDR1", "IDR3", "IDR5", "AIDR")))
    except ValueError as error:
        line.bad(f"identification registers: {error}")


def _regions(line: _Line, pairs: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    regions = tuple(sorted(pairs))
    end = 0
    for base, size in regions:
        if base % 8 or not 0 < size <= MAX_RAM or base + size > _U64 + 1:
            line.bad(
                f"RAM of {size:#x} bytes at {base:#x}: it must start at a multiple of 8, and "
                f"have 1 to {MAX_RAM:#x} bytes"
            )
        if base < end:
            line.bad(f"RAM at {base:#x} overlaps the region before it")
        end = base + size
    if not 0 < len(regions) <= MAX_REGIONS:
        line.bad(must_be("regions", f"1 to {MAX_REGIONS}", len(regions)))
    return regions


def _check_pages(
    path: str,
    number: int | None,
    addresses: NDArray[np.uint64],
    regions: tuple[tuple[int, int], ...],
) -> None:
    """Raise unless every page is aligned, touches RAM and is given once."""
    bad = addresses % np.uint64(PAGE) != 0
    if bad.any():
        raise CaptureError(
            path, number, f"page at {int(addresses[bad][0]):#x}: not a multiple of {PAGE}"
        )
    starts = np.array([base for base, _ in regions], np.uint64)
    lasts = np.array([base + size - 1 for base, size in regions], np.uint64)
    # the last region that starts before the page ends must end after it starts
    before = np.searchsorted(starts, addresses | np.uint64(PAGE - 1), "right") - 1
    touches = (before >= 0) & (lasts[before] >= addresses)
    if not touches.all():
        raise CaptureError(
            path,
            number,
            f"page at {int(addresses[~touches][0]):#x}: outside RAM, "
            "which is " + ", ".join(f"{b:#x} to {b + s - 1:#x}" for b, s in regions[:4]),
        )
    values, counts = np.unique(addresses, return_counts=True)
    if len(values) != len(addresses):
        raise CaptureError(path, number, f"page at {int(values[counts > 1][0]):#x}: given twice")


def _pages_of(path: str, watch: _Watch = _UNWATCHED) -> tuple[NDArray[Any], NDArray[Any]]:
    """Read the addresses and the contents of the pages of a file."""
    addresses, pages = _arrays(path, watch, page_addr=("<u8", 8), pages=("u1", PAGE))
    if len(addresses) != len(pages):
        raise CaptureError(path, None, f"{len(addresses)} addresses for {len(pages)} pages")
    return addresses, pages


_COUNTS = {
    "requests": "lines of requests.jsonl.gz",
    "events": "lines of events.jsonl.gz",
    "pages": "pages of pages.npz",
    "queue_pages": "pages of queues.npz",
}
_RAM = ("ram_base", "ram_size", "regions")
_COUNTED = {"truth": "requests", "requests": "requests", "events": "events", "pages": "pages"}
"""Members of meta.json that are counts too, where they are numbers."""


def _check_counts(meta: _Line, **found: int) -> None:
    """Raise unless the files hold as much as meta.json says."""
    told = []
    if "counts" in meta.values:
        counts = meta.inner("counts")
        counts.only(*_COUNTS)
        told = [(f"counts.{name}", name, counts.integer(name, _U32)) for name in counts.values]
    for name, what in _COUNTED.items():
        if type(count := meta.values.get(name)) is int:
            told.append((name, what, count))
    for name, what, count in told:
        if count != found[what]:
            meta.bad(f"{name} is {count}, but there are {found[what]} {_COUNTS[what]}")


class Capture:
    """A capture: a sequence of configurations with what is expected of them.

    Attributes
    ----------
    path : str
    kind : str
        "linux" (one configuration) or "cases" (many).
    meta : dict
        ``meta.json``, or the header of the list.
    """

    def __init__(
        self, path: str, kind: str, meta: dict[str, Any], configurations: list[Configuration]
    ) -> None:
        """Take what `load` has read."""
        self.path = path
        self.kind = kind
        self.meta = meta
        self._configurations = configurations

    @property
    def name(self) -> str:
        """Last part of the path."""
        return os.path.basename(os.path.abspath(self.path))

    @property
    def masked(self) -> dict[str, int]:
        """Features recorded that this version does not model, as in `Configuration.masked`."""
        return self._configurations[0].masked

    def __len__(self) -> int:
        """Count the configurations."""
        return len(self._configurations)

    def __getitem__(self, index: int) -> Configuration:
        """Return one configuration."""
        return self._configurations[index]

    def __iter__(self) -> Iterator[Configuration]:
        """Iterate over the configurations."""
        return iter(self._configurations)

    def configuration(self, id: str) -> Configuration:
        """Return the configuration of that id, KeyError if there is none."""
        for configuration in self._configurations:
            if configuration.id == id:
                return configuration
        raise KeyError(id)

    def _repr_html_(self) -> str:
        from smmufast._html import table

        pairs = [("path", self.path), ("kind", self.kind), ("configurations", list(self))]
        return table("Capture", pairs)

    def __repr__(self) -> str:
        """Name it and say how large it is."""
        requests = sum(len(c.requests) for c in self)
        return f"<Capture {self.name}: {len(self)} configurations, {requests} requests>"

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        progress: Callable[[int, int], object] | None = None,
    ) -> Capture:
        """Read a capture of either kind.

        Parameters
        ----------
        path : path
        progress : callable, optional
            Called now and then with the bytes read of its files, and all their bytes.

        Raises
        ------
        CaptureError
            It cannot be read: the message names the file, the line and what is wrong.
        """
        path = os.fspath(path)
        if os.path.exists(os.path.join(path, "cases.jsonl.gz")):
            return cls._load_cases(path, _Watch(path, progress))
        if os.path.exists(os.path.join(path, "meta.json")):
            return cls._load_linux(path, _Watch(path, progress))
        if not os.path.exists(path):
            raise CaptureError(path or "''", None, "there is no such directory")
        if not os.path.isdir(path):
            raise CaptureError(path, None, in_words("a capture", "a directory", "a file"))
        raise CaptureError(path, None, "no capture: neither meta.json nor cases.jsonl.gz is there")

    @classmethod
    def _load_linux(cls, path: str, watch: _Watch) -> Capture:
        meta = _meta(os.path.join(path, "meta.json"))
        registers = _registers(meta, meta.inner("regs").values, _NEEDED)
        features = _features(meta, registers)
        if "regions" in meta.values:
            pairs = []
            for item in meta.list("regions"):
                if not isinstance(item, list) or len(item) != 2:
                    meta.bad(in_words("regions", "lists of base and size", _kind(item)))
                base, size = (meta.number_of("regions", value, _U64) for value in item)
                pairs.append((base, size))
        else:
            pairs = [(meta.integer("ram_base", _U64), meta.integer("ram_size", _U64))]
        regions = _regions(meta, pairs)
        where = os.path.join(path, "pages.npz")
        addresses, pages = _pages_of(where, watch)
        _check_pages(where, None, addresses, regions)
        where = os.path.join(path, "queues.npz")
        queue_addresses = np.empty(0, np.uint64)
        if os.path.exists(where):
            queue_addresses, _ = _pages_of(where, watch)
            _check_pages(where, None, queue_addresses, regions)
        requests = _Requests()
        source = os.path.join(path, "requests.jsonl.gz")
        for line in _lines(source, watch):
            requests.add_translation(line, bool(registers["CR0"] & _SMMUEN))
        events = os.path.join(path, "events.jsonl.gz")
        translations = len(requests.rows)
        sources = [(translations, events)]
        for line in _lines(events, watch):
            requests.add_event(line)
        _check_counts(
            meta,
            requests=translations,
            events=len(requests.rows) - translations,
            pages=len(addresses),
            queue_pages=len(queue_addresses),
        )
        name = os.path.basename(os.path.abspath(path))
        configuration = Configuration(
            name, registers, features, regions, addresses, pages, None, requests, source, sources
        )
        return cls(path, "linux", meta.values, [configuration])

    @classmethod
    def _load_cases(cls, path: str, watch: _Watch) -> Capture:
        where = os.path.join(path, "pages.npz")
        (pages,) = _arrays(where, watch, pages=("u1", PAGE))
        where = os.path.join(path, "cases.jsonl.gz")
        lines = _lines(where, watch)
        first = next(lines, None)
        if first is None:
            raise CaptureError(where, None, in_words("the first line", "a header", "missing"))
        header = first.inner("header")
        identification = header.inner("idr").values
        registers = _registers(header, identification, ("IDR0", "IDR1", "IDR3", "IDR5"))
        features = _features(header, registers)
        low, high = (header.number_of("ram", v, _U64) for v in header.list("ram", 2))
        regions = _regions(header, [(low, high - low)])
        configurations = []
        ids: set[str] = set()
        count = 0
        for line in lines:
            line.only("id", "cr0", "regs", "meta", "pages", "reqs")
            id = line.text("id")
            if id in ids:
                line.bad(f"id: {id!r} is that of an earlier configuration")
            if len(ids) == MAX_CONFIGURATIONS:
                line.bad(f"more than {MAX_CONFIGURATIONS} configurations")
            ids.add(id)
            mine = {"CR0": line.integer("cr0", _U32), "CR2": _RECINVSID}
            mine = _registers(line, identification | line.inner("regs").values | mine, _NEEDED)
            pairs = line.list("pages")
            addresses = np.empty(len(pairs), np.uint64)
            rows = np.empty(len(pairs), np.intp)
            for i, pair in enumerate(pairs):
                if not isinstance(pair, list) or len(pair) != 2:
                    line.bad(in_words("pages", "lists of address and index", _kind(pair)))
                addresses[i] = line.number_of("pages", pair[0], _U64)
                rows[i] = line.number_of("pages", pair[1], len(pages) - 1)
            _check_pages(where, line.number, addresses, regions)
            requests = _Requests(count)
            queue = bool(mine["CR0"] & _EVENTQEN)
            for request in line.list("reqs"):
                requests.add_case(line, request, queue, features.oas_bits)
            count += len(requests.rows)
            configurations.append(
                Configuration(
                    id,
                    mine,
                    features,
                    regions,
                    addresses,
                    pages,
                    rows,
                    requests,
                    where,
                    ignore_s2ptw=True,
                )
            )
        if not configurations:
            raise CaptureError(where, None, "a header and no configuration")
        return cls(path, "cases", header.values, configurations)

    @classmethod
    def save(
        cls,
        path: str | os.PathLike[str],
        *,
        smmu: Smmu | None = None,
        memory: Memory | None = None,
        registers: Mapping[str, int] | None = None,
        requests: Iterable[Mapping[str, Any]] = (),
        events: Iterable[Mapping[str, Any]] = (),
        pages: Iterable[int] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> Capture:
        """Write a capture of kind "linux" into a new directory, and return it as `load` does.

        Parameters
        ----------
        path : path
            A directory that does not exist or is empty.
        smmu : Smmu, optional
            Whose memory, registers, features and queues are written.
        memory, registers : Memory, mapping, optional
            In place of `smmu`: registers by name, as the format needs them.
        requests, events : iterable of mapping
            Lines of the format.  A request without ``pa`` is translated now, by itself, and what
            comes of it is written: it needs ``sid`` and ``iova`` and may have ``ssid``, ``write``,
            ``priv`` and ``instr``.
        pages : iterable of int, optional
            Addresses of the pages to write.  By default those that the registers lead to: stream
            table, context descriptors and the tables of both stages.  Pages of zeros are left out.
        meta : mapping, optional
            More members of ``meta.json``.

        The directory takes its name when all of it is written and can be read: a save that is
        interrupted, or has no space, leaves nothing of that name.

        Raises
        ------
        FileExistsError
            The directory holds something, or there is a file of that name.
        OSError
            It cannot be written.
        CaptureError
            A line with ``pa``, an event or a register is none of the format.
        ValueError
            The pages cannot be found because the tables are of a kind that is not modelled or are
            larger than 1 GiB; or a request ends without an event, which the format cannot hold.
        """
        from smmufast import streams

        path = os.fspath(path)
        refuse_taken(path)
        if smmu is None:
            if memory is None or registers is None:
                raise TypeError("save() needs smmu, or memory and registers")
            given = _registers(_Line("registers", None, {}), registers, _NEEDED)
            smmu, masked = _smmu_of(memory, given)
        else:
            if memory is not None or registers is not None:
                raise TypeError("memory and registers must not be given beside smmu")
            memory = smmu.memory
            given = _registers_of(smmu)
            masked = {}
        translated, terminated = _answer(smmu, requests)
        if pages is None:
            pages = streams.pages(smmu, masked)
        addresses = sorted({integer("pages", page, _U64) for page in pages})
        for address in addresses:
            if address % PAGE:
                raise ValueError(must_be("pages", f"multiples of {PAGE}", address))
        tables = _contents(memory, addresses)
        queues = _contents(memory, _queue_pages(given))
        terminated = [*events, *terminated]
        counts = {
            "requests": len(translated),
            "events": len(terminated),
            "pages": len(tables[0]),
            "queue_pages": len(queues[0]),
        }
        with replacing_directory(path) as partial:
            with open(os.path.join(partial, "meta.json"), "w", encoding="utf-8") as file:
                values = _description(meta or {}, counts, given, memory)
                json.dump(values, file, indent=1, default=_plain)
            _write_pages(os.path.join(partial, "pages.npz"), *tables)
            if queues[0] or _unused(given):
                _write_pages(os.path.join(partial, "queues.npz"), *queues)
            _write_lines(os.path.join(partial, "requests.jsonl.gz"), translated)
            _write_lines(os.path.join(partial, "events.jsonl.gz"), terminated)
            try:
                saved = cls.load(partial)
            except CaptureError as error:
                where = os.path.join(path, os.path.basename(error.path))
                raise CaptureError(where, error.line, error.problem) from None
        saved._move(path)
        return saved

    def _move(self, path: str) -> None:
        """Follow the directory, which has another name now."""
        self.path = path
        for configuration in self:
            configuration._move(self.name, path)


# --- queues ---------------------------------------------------------------------------------------


class Queue(NamedTuple):
    """A queue of a capture: what lies in its ring, oldest first.

    Where PROD's wrap bit is set and no slot is zero, every slot is a record and the oldest one is
    in the slot at PROD.  Otherwise the slots from 0 to PROD-1 are records.

    Attributes
    ----------
    features : Features
        As recorded.
    base, prod, cons : int
        The queue's registers.
    log2size : int
        The ring has 2^log2size slots.
    first : int
        Slot of the oldest record.
    records : tuple of bytes
        In memory order; the slot of ``records[i]`` is ``(first + i) % 2**log2size``.
    """

    features: Features
    base: int
    prod: int
    cons: int
    log2size: int
    first: int
    records: tuple[bytes, ...]


_QUEUES = {
    "commands": ("CMDQ", "cmdqs", 16),
    "events": ("EVENTQ", "eventqs", 32),
    "pages": ("PRIQ", "priqs", 16),
}
_QUEUE_PARTS = ("BASE", "PROD", "CONS")


def _ring(registers: Mapping[str, int], features: Features, which: str) -> tuple[int, int, int]:
    """Return where a queue lies: base, log2 of its slots, bytes of a slot."""
    name, limit, size = _QUEUES[which]
    fields = layout.unpack(f"{name}_BASE", registers[f"{name}_BASE"])
    log2size = min(fields["LOG2SIZE"], getattr(features, limit))
    return fields["ADDR"] & -(size << log2size), log2size, size


def _queue_pages(registers: Mapping[str, int]) -> list[int]:
    """Return the pages that the queues lie in, of which the registers are given."""
    words = (registers[name] for name in ("IDR0", "IDR1", "IDR3", "IDR5", "AIDR"))
    features = Features.from_idr(*words)
    found: set[int] = set()
    for which, (name, _, _) in _QUEUES.items():
        if f"{name}_BASE" in registers:
            base, log2size, size = _ring(registers, features, which)
            found.update(range(base & -PAGE, base + (size << log2size), PAGE))
    return sorted(found)


def held_queues(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return which queues a capture of kind "linux" holds, by the names that `load_queue` takes.

    Raises
    ------
    CaptureError
        The capture cannot be read.
    """
    path = os.fspath(path)
    if not os.path.exists(os.path.join(path, "queues.npz")):
        return ()
    registers = _meta(os.path.join(path, "meta.json")).inner("regs").values
    return tuple(
        which
        for which, (name, _, _) in _QUEUES.items()
        if any(f"{name}_{part}" in registers for part in _QUEUE_PARTS)
    )


def load_queue(path: str | os.PathLike[str], which: str) -> Queue:
    """Read one queue of a capture of kind "linux": `which` is "commands", "events" or "pages".

    Raises
    ------
    CaptureError
        The capture has no queues, or cannot be read.
    ValueError
        There is no such queue.
    """
    one_of("which", which, _QUEUES)
    name = _QUEUES[which][0]
    path = os.fspath(path)
    meta = _meta(os.path.join(path, "meta.json"))
    needed = (*_NEEDED, *(f"{name}_{part}" for part in _QUEUE_PARTS))
    registers = _registers(meta, meta.inner("regs").values, needed)
    features = _features(meta, registers)
    base, prod, cons = (registers[f"{name}_{part}"] for part in _QUEUE_PARTS)
    first, log2size, size = _ring(registers, features, which)
    slots = 1 << log2size
    ring = bytearray(size << log2size)
    where = os.path.join(path, "queues.npz")
    if not os.path.exists(where):
        raise CaptureError(where, None, "there is none: the capture holds no queues")
    addresses, pages = _pages_of(where)
    for address, page in zip(addresses.tolist(), pages, strict=True):
        start, end = max(address, first), min(address + PAGE, first + len(ring))
        if start < end:
            ring[start - first : end - first] = page[start - address : end - address].tobytes()
    records = [bytes(ring[at : at + size]) for at in range(0, len(ring), size)]
    at = prod & (slots - 1)
    if prod & slots and all(map(any, records)):
        records = records[at:] + records[:at]
    else:
        at, records = 0, records[:at]
    return Queue(features, base, prod, cons, log2size, at, tuple(records))


def load_events(path: str | os.PathLike[str]) -> list[tuple[str, bytes]]:
    """Return the event records that a capture lists beside its requests, and where each stands.

    Raises
    ------
    CaptureError
        The capture cannot be read.
    """
    path = os.fspath(path)
    where = os.path.join(path, "cases.jsonl.gz")
    found = []
    if os.path.exists(where):
        lines = _lines(where)
        next(lines, None)
        for line in lines:
            for request in line.list("reqs"):
                one = _Line(line.path, line.number, request)
                if "out" in one.values and one.inner("out").values.get("k") == "event":
                    record = _record(one.inner("out"), "rec")
                    found.append((line.text("id"), record))
        return found
    _meta(os.path.join(path, "meta.json"))
    for line in _lines(os.path.join(path, "events.jsonl.gz")):
        found.append((f"line {line.number}", _record(line, "hex")))
    return found


class Batch(NamedTuple):
    """Commands that were given to an SMMU at once, and how far it came.

    Attributes
    ----------
    id : int
    start, prod : int
        CMDQ_CONS and CMDQ_PROD before.
    cons : int
        CMDQ_CONS after.
    err : int
        CMDQ_CONS.ERR after.
    commands : tuple of bytes
        In memory order.
    """

    id: int
    start: int
    prod: int
    cons: int
    err: int
    commands: tuple[bytes, ...]


def load_batches(path: str | os.PathLike[str]) -> tuple[Features, list[Batch]]:
    """Return the features and the command batches of a file of them.

    Raises
    ------
    CaptureError
        The file cannot be read.
    """
    path = os.fspath(path)
    lines = _lines(path)
    header = next(lines, None)
    if header is None:
        raise CaptureError(path, None, in_words("the first line", "a header", "missing"))
    header.get("header")
    needed = ("IDR0", "IDR1", "IDR3", "IDR5")
    features = _features(header, _registers(header, header.inner("idr").values, needed))
    found: list[Batch] = []
    for line in lines:
        if line.text("kind") != "cmds":
            continue
        if len(found) == MAX_REQUESTS:
            line.bad(f"more than {MAX_REQUESTS} batches")
        commands = []
        for text in line.list("cmds"):
            try:
                command = bytes.fromhex(text) if isinstance(text, str) else b""
            except ValueError:
                command = b""
            if len(command) != 16:
                line.bad(in_words("cmds", "16 bytes in hexadecimal each", _kind(text)))
            commands.append(command)
        start, prod, cons = (line.integer(name, _U32) for name in ("start", "prod", "cons"))
        err = line.integer("err", 0x7F)
        found.append(Batch(line.integer("id", _U64), start, prod, cons, err, tuple(commands)))
    return features, found


class Filling(NamedTuple):
    """Events that were recorded until the event queue was full, and on.

    Attributes
    ----------
    line : int
        Where it stands in its file.
    log2size : int
        The ring has 2^log2size slots.
    start : int
        EVENTQ_PROD and EVENTQ_CONS before.
    prods : tuple of int
        EVENTQ_PROD after each event.
    """

    line: int
    log2size: int
    start: int
    prods: tuple[int, ...]


def load_fillings(path: str | os.PathLike[str]) -> list[Filling]:
    """Return the runs that filled the event queue, of a file as `load_batches` reads.

    Raises
    ------
    CaptureError
        The file cannot be read.
    """
    found = []
    for line in _lines(os.fspath(path)):
        if line.values.get("kind") != "evtq_full":
            continue
        log2size = line.integer("log2size", 16)
        prods = []
        for step in line.list("steps"):
            prods.append(_Line(line.path, line.number, step).integer("prod", _U32))
        start = line.integer("start", (2 << log2size) - 1)
        found.append(Filling(line.number or 0, log2size, start, tuple(prods)))
    return found


def _registers_of(smmu: Smmu) -> dict[str, int]:
    """Return the registers that the format needs, and those of the queues that there are."""
    features = smmu.features
    queues: dict[str, int] = {}
    for name, _, _ in _QUEUES.values():
        if name == "PRIQ" and not features.pri:
            continue
        mine = {f"{name}_{part}": smmu.read(f"{name}_{part}") for part in _QUEUE_PARTS}
        if any(mine.values()):
            queues |= mine
    return queues | {
        "CR0": smmu.cr0,
        "CR2": smmu.cr2,
        "GBPA": smmu.gbpa,
        "STRTAB_BASE": smmu.strtab_base,
        "STRTAB_BASE_CFG": smmu.strtab_base_cfg,
        "IDR0": features.idr0,
        "IDR1": features.idr1,
        "IDR3": features.idr3,
        "IDR5": features.idr5,
        "AIDR": features.aidr,
    }


def _smmu_of(memory: Memory, given: Mapping[str, int]) -> tuple[Smmu, dict[str, int]]:
    """Return an SMMU with these registers, and the features that it leaves out."""
    kept, masked = modelled(_features(_Line("registers", None, {}), given))
    smmu = Smmu(
        memory,
        kept,
        strtab_base=given["STRTAB_BASE"],
        strtab_base_cfg=given["STRTAB_BASE_CFG"],
        cr0=given["CR0"],
        cr2=given["CR2"],
        gbpa=given["GBPA"],
    )
    return smmu, masked


def _description(
    meta: Mapping[str, Any], counts: Mapping[str, int], given: Mapping[str, int], memory: Memory
) -> dict[str, Any]:
    """Return ``meta.json``: what the files hold, registers and RAM, and more members."""
    values = {name: value for name, value in meta.items() if name not in _RAM}
    for name in _COUNTED:  # those of another capture
        if type(values.get(name)) is int:
            del values[name]
    values["counts"] = dict(counts)
    values["regs"] = {name: hex(value) for name, value in given.items()}
    regions = [(region.base, region.size) for region in memory.regions]
    if len(regions) == 1:
        return values | {"ram_base": hex(regions[0][0]), "ram_size": regions[0][1]}
    return values | {"regions": [[hex(base), hex(size)] for base, size in regions]}


def _unused(given: Mapping[str, int]) -> bool:
    """Whether there are queues, and nothing was ever put into one.

    A ring that was used and has no pages would be taken for one of zeros.
    """
    queues = [name for name, _, _ in _QUEUES.values() if f"{name}_BASE" in given]
    return bool(queues) and not any(given.get(f"{name}_PROD") for name in queues)


def _page(memory: Memory, address: int) -> bytes:
    """Return a page of memory; what no region holds is zero."""
    data = bytearray(PAGE)
    for region in memory.regions:
        first = max(region.base, address)
        end = min(region.base + region.size, address + PAGE)
        if first < end:
            data[first - address : end - address] = memory.read(first, end - first)
    return bytes(data)


def _contents(
    memory: Memory, addresses: Iterable[int]
) -> tuple[list[int], list[NDArray[np.uint8]]]:
    """Return the pages at some addresses, without those of zeros."""
    kept = []
    contents = []
    for address in addresses:
        data = _page(memory, address)
        if data.strip(b"\0"):
            kept.append(address)
            contents.append(np.frombuffer(data, np.uint8))
    return kept, contents


def _write_pages(path: str, addresses: list[int], contents: list[NDArray[np.uint8]]) -> None:
    np.savez_compressed(
        path,
        page_addr=np.array(addresses, np.uint64),
        pages=np.array(contents, np.uint8).reshape(-1, PAGE),
    )


def _plain(value: Any) -> Any:
    """Return a number of numpy's as one of Python's, for JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _write_lines(path: str, lines: Iterable[Mapping[str, Any]]) -> None:
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        for line in lines:
            file.write(json.dumps(dict(line), default=_plain).encode() + b"\n")


def _answer(
    smmu: Smmu, requests: Iterable[Mapping[str, Any]]
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Translate the requests that have no outcome; lines of requests and of events."""
    from smmufast.streams import bare

    smmu = bare(smmu)
    translated: list[Mapping[str, Any]] = []
    terminated: list[Mapping[str, Any]] = []
    for number, request in enumerate(requests):
        if not isinstance(request, Mapping):
            raise TypeError(must_be(f"requests[{number}]", "a dict", request))
        if "pa" in request:
            translated.append(request)
            continue
        for name in ("sid", "iova"):
            if name not in request:
                raise ValueError(f"requests[{number}] has no {name}")
        unknown = set(request) - {"sid", "iova", "ssid", "write", "priv", "instr"}
        if unknown:
            raise ValueError(
                f"requests[{number}] has {min(unknown)!r}; sid, iova, ssid, write, priv and "
                "instr are known, or pa with what was recorded"
            )
        sid = integer("sid", request["sid"], _U32)
        iova = integer("iova", request["iova"], _U64)
        ssid = request.get("ssid")
        ssid = None if ssid is None else integer("ssid", ssid, 0xFFFFF)
        write, priv, instr = (
            flag(name, request.get(name, False)) for name in ("write", "priv", "instr")
        )
        instr &= not write  # a write is always data
        result = translate_alone(smmu, sid, iova, ssid=ssid, write=write, priv=priv, instr=instr)
        line = {"sid": sid, "iova": hex(iova), "priv": int(priv), "instr": int(instr)}
        if ssid is not None:
            line["ssid"] = ssid
        if result.pa is not None:
            translated.append(
                line
                | {
                    "pa": hex(result.pa),
                    "perm": int(result.perm) >> (3 if priv else 0) & 7,
                    "stage": result.stage,
                    "level": -1 if result.level is None else result.level,
                    "page_shift": result.page_lg2 or 0,
                    "bypass": int(result.action != "ok"),
                }
            )
        elif result.event is None:
            raise ValueError(
                f"requests: {result!r} ends without an event; such an outcome cannot be written"
            )
        else:
            line |= {"rnw": int(not write), "hex": result.event.record.hex()}
            if result.action != "abort":
                line["action"] = result.action
            terminated.append(line)
    return translated, terminated
