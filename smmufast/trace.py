"""Traces: requests in files and arrays of any length, translated piece by piece.

Not architectural.  A trace has columns: ``sid``, ``ssid`` and ``iova``, of any integer dtype, and
``write``, ``priv`` and ``instr``, which are bool or integers of 0 and 1.  It is a structured array
with fields of these names, a dict of 1-D arrays, a 1-D array of input addresses, or a file of the
first or the last kind.  Other fields are not looked at.  ``capture.REQUEST`` is such a dtype;
without flags, and faster, is ``[("sid", "<u4"), ("ssid", "<u4"), ("iova", "<u8")]``.

Nothing is copied whole.  Pages of a memory-mapped array are given back to the host once their
requests are done, so that a process stays as small as a chunk whatever the length of its trace.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from numpy.lib import format as npy

from smmufast import layout
from smmufast._arguments import either, in_words, integer, must_be
from smmufast._device.smmu import NO_SUBSTREAM
from smmufast._files import replacing
from smmufast.capture import npy_header
from smmufast.faults import ACTIONS

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    from smmufast._device.smmu import Smmu

__all__ = ["CHUNK", "TraceError", "TraceSummary", "open_trace", "translate_chunks",
           "translate_trace"]  # fmt: skip

CHUNK: Final = 1 << 16
"""Requests that are translated at a time, unless told otherwise."""

_LAST: Final = {"sid": (1 << 32) - 1, "ssid": (1 << 20) - 1, "iova": (1 << 64) - 1}
_FLAGS: Final = ("write", "priv", "instr")
_NAMES: Final = (*_LAST, *_FLAGS)
_STALL: Final = ACTIONS.index("stall")
_PAGE: Final = mmap.PAGESIZE

_Path: TypeAlias = "str | os.PathLike[str]"
_Requests: TypeAlias = "_Path | NDArray[Any] | Mapping[str, Any]"
_Progress: TypeAlias = Callable[[int, int], object]


class TraceError(ValueError):
    """A trace that cannot be translated, or results that cannot be kept: where, and what is wrong.

    Attributes
    ----------
    path : str or None
        The file; None for an array.
    row : int or None
        The request, counted from 0; None when the whole is meant.
    """

    def __init__(self, path: str | None, row: int | None, problem: str) -> None:
        """Name the file, the row and the problem."""
        self.path = path
        self.row = row
        name = [] if path is None else [path or "''"]
        parts = [*name, *([] if row is None else [f"row {row}"])]
        super().__init__(": ".join((*parts, problem)))


@dataclass
class TraceSummary:
    """What became of a trace.

    Attributes
    ----------
    requests : int
    actions : dict of str to int
        How many requests had each outcome; those of ACTIONS that occur, in its order.
    events : dict of str to int
        How many requests had an event of each name.
    seconds : float
        From the first request to the last, reading and writing included.
    """

    requests: int = 0
    actions: dict[str, int] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def _repr_html_(self) -> str:
        from smmufast._html import fields

        return fields(self)

    @property
    def rate(self) -> float | None:
        """Translations a second; None of nothing."""
        return self.requests / self.seconds if self.requests and self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as the command prints them with --json."""
        return {
            "requests": self.requests,
            "actions": self.actions,
            "events": self.events,
            "seconds": self.seconds,
            "translations_per_second": self.rate,
        }


def open_trace(path: _Path, dtype: DTypeLike | None = None) -> NDArray[Any]:
    """Map a file of requests into memory, read-only.

    Parameters
    ----------
    path : str or path
        An .npy file of a structured array or of addresses, see `smmufast.trace`.
    dtype : dtype, optional
        The file is rows of this dtype and nothing else.

    Returns
    -------
    1-D array
        A numpy.memmap; a plain array if the trace is empty.  The file must not shrink while it is
        in use: the host ends a process that reads beyond its end (SIGBUS).

    Raises
    ------
    TraceError
        It cannot be opened, is no .npy file or is cut off, or its dtype is not that of a trace.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if dtype is None:
                shape, _, found = npy_header(file, lambda what: TraceError(path, None, what))
                offset = file.tell()
                if len(shape) != 1 or shape[0] < 0:
                    raise TraceError(path, None, must_be("shape", "(N,)", shape))
                _check_dtype(path, found)
                rows = shape[0]
                if size != offset + rows * found.itemsize:
                    raise TraceError(
                        path,
                        None,
                        must_be(
                            "what is behind the header",
                            f"{rows * found.itemsize} bytes for {rows} rows",
                            size - offset,
                        ),
                    )
            else:
                found, offset = np.dtype(dtype), 0
                _check_dtype(path, found)
                rows, rest = divmod(size, found.itemsize)
                if rest:
                    allowed = f"rows of {found.itemsize} bytes"
                    raise TraceError(path, None, in_words("the file", allowed, f"{size} bytes"))
            if not rows:
                return np.empty(0, found)
            return np.memmap(file, found, "r", offset, (rows,))
    except OSError as error:
        raise TraceError(path, None, error.strerror or str(error)) from None


def _check_column(path: str | None, name: str, dtype: np.dtype[Any]) -> None:
    """Raise unless a column of this name can have this dtype."""
    flag = name in _FLAGS
    if dtype.shape or dtype.kind not in ("biu" if flag else "iu"):
        allowed = "bool, or an integer of 0 and 1" if flag else "an integer"
        raise TraceError(path, None, in_words(f"{name}.dtype", allowed, str(dtype)))


def _check_dtype(path: str | None, dtype: np.dtype[Any]) -> None:
    """Raise unless an array of this dtype can be a trace."""
    if dtype.hasobject:
        raise TraceError(path, None, in_words("dtype", "one without objects", str(dtype)))
    if dtype.names is None:
        _check_column(path, "iova", dtype)
    elif "iova" not in dtype.names:
        raise TraceError(path, None, f"there is no field iova among {', '.join(dtype.names)}")
    else:
        for name in dtype.names:
            if name in _NAMES:
                _check_column(path, name, dtype[name])


class _Mapping:
    """The memory behind an array that is a view of a file, given back as it is used up."""

    def __init__(self, array: NDArray[Any]) -> None:
        """Take an array, and the file that it is mapped from, if it is."""
        self.file: mmap.mmap | None = getattr(array, "_mmap", None)
        self.stride = array.strides[0] if array.ndim else 0
        # the pages of a private mapping ("c") may be the only copy of what was written to them
        if getattr(array, "mode", "c") == "c" or self.stride <= 0:
            self.file = None
        if not hasattr(self.file, "madvise"):  # where the host cannot be told
            self.file = None
        if self.file is not None:
            start = np.frombuffer(self.file, np.uint8).ctypes.data
            self.first = array.ctypes.data - start
            self.done = self.first // _PAGE * _PAGE

    def release(self, rows: int) -> None:
        """Give back the pages of the first rows."""
        if self.file is None:
            return
        end = (self.first + rows * self.stride) // _PAGE * _PAGE
        if end > self.done:
            self.file.madvise(mmap.MADV_DONTNEED, self.done, end - self.done)
            self.done = end


class _Trace:
    """Columns of requests, and the SMMU that translates them."""

    def __init__(
        self,
        smmu: Smmu,
        requests: _Requests,
        constants: Mapping[str, Any],
        chunk: int,
        threads: int,
    ) -> None:
        """Take the arguments of a translation of a trace."""
        self.smmu = smmu
        self.chunk = integer("chunk", chunk, first=1)
        self.threads = threads
        self.path: str | None = None
        if isinstance(requests, (str, os.PathLike)):
            self.path = os.fspath(requests)
            requests = open_trace(requests)
        given: dict[str, Any]
        if isinstance(requests, np.ndarray):
            if requests.ndim != 1:
                raise TraceError(self.path, None, must_be("requests.ndim", "1", requests.ndim))
            _check_dtype(self.path, requests.dtype)
            if requests.dtype.names is None:
                given = {"iova": requests}
            else:
                given = {name: requests[name] for name in _NAMES if name in requests.dtype.names}
            self.mapped = [_Mapping(requests)]
        elif isinstance(requests, Mapping):
            given = {k: v if np.ndim(v) == 0 else np.asanyarray(v) for k, v in requests.items()}
            for name, value in given.items():
                if name not in _NAMES:
                    raise TraceError(None, None, must_be("a column", either(_NAMES), name))
                if isinstance(value, np.ndarray) and value.ndim:
                    if value.ndim != 1:
                        raise TraceError(None, None, must_be(f"{name}.ndim", "1", value.ndim))
                    _check_column(None, name, value.dtype)
            self.mapped = [_Mapping(v) for v in given.values() if isinstance(v, np.ndarray)]
        else:
            raise TypeError(must_be("requests", "a path, an array or a dict", requests))
        for name, value in constants.items():
            if value is None or value is False:
                continue
            if name in given:
                raise TraceError(self.path, None, f"{name} is in the trace and also an argument")
            given[name] = value
        for name, value in given.items():
            if isinstance(value, np.ma.MaskedArray):
                text = must_be(name, "an array without a mask", type(value))
                raise TraceError(None, None, text)
        self.columns = {k: v for k, v in given.items() if isinstance(v, np.ndarray) and v.ndim}
        names = [getattr(column, "filename", None) for column in self.columns.values()]
        self.files = {os.fspath(name) for name in (self.path, *names) if name is not None}
        self.constants = {k: v for k, v in given.items() if k not in self.columns}
        for name in ("sid", "iova"):
            if name not in given:
                raise TraceError(self.path, None, f"there is no {name}, and none is given")
        lengths = {name: len(column) for name, column in self.columns.items()}
        if not lengths:
            raise TraceError(None, None, "no column is an array")
        if len(set(lengths.values())) > 1:
            raise TraceError(None, None, must_be("columns", "of one length", lengths))
        self.total = next(iter(lengths.values()))
        self.action = np.empty(min(chunk, self.total), np.uint8)
        self.event = np.empty(min(chunk, self.total), np.uint8)
        self.actions = np.zeros(len(ACTIONS), np.int64)
        self.events = np.zeros(256, np.int64)

    def translate(self, start: int, out: Mapping[str, NDArray[Any]]) -> int:
        """Translate the chunk from a row on into columns; return the row behind it."""
        stop = min(start + self.chunk, self.total)
        columns = {"action": self.action[: stop - start], "event": self.event[: stop - start]}
        columns.update(out)
        rows = {name: column[start:stop] for name, column in self.columns.items()}
        for name in _FLAGS:
            if name in rows and rows[name].dtype.kind != "b":
                rows[name] = self.flag(start, name, rows[name])
        access: dict[str, Any] = {**rows, **self.constants}
        try:
            self.smmu.translate_batch(**access, out=columns, threads=self.threads)
        except ValueError:
            self.say_which(start, rows)
            raise
        self.count(self.actions, columns["action"])
        self.count(self.events, columns["event"])
        if self.actions[_STALL]:
            self.terminate(rows, columns["action"])
        for mapped in self.mapped:
            mapped.release(stop)
        return stop

    def flag(self, start: int, name: str, column: NDArray[Any]) -> NDArray[np.bool]:
        """Return a column of integers that are 0 or 1 as one of bool."""
        bad = (column != 0) & (column != 1)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            problem = must_be(name, "0 or 1", int(column[row]))
            raise TraceError(self.path, start + row, problem)
        return column.astype(bool)

    def say_which(self, start: int, rows: Mapping[str, NDArray[Any]]) -> None:
        """Raise for the first value that no request can have, if there is one."""
        for name, last in _LAST.items():
            if name not in rows:
                continue
            column = rows[name]
            bad = column > last
            if column.dtype.kind == "i":
                bad |= column < 0
            if name == "ssid":
                bad &= column != NO_SUBSTREAM
            if bad.any():
                row = int(np.flatnonzero(bad)[0])
                none = f", or {NO_SUBSTREAM:#x} for none" if name == "ssid" else ""
                raise TraceError(
                    self.path,
                    start + row,
                    must_be(name, f"0 to {last:#x}{none}", int(column[row])),
                ) from None

    @staticmethod
    def count(into: NDArray[np.int64], column: NDArray[Any]) -> None:
        """Add how often each value is there; most columns are all zero, which is cheap to see."""
        if np.count_nonzero(column):
            into += np.bincount(column, minlength=len(into))
        else:
            into[0] += len(column)

    def terminate(self, rows: Mapping[str, NDArray[Any]], action: NDArray[Any]) -> None:
        """Terminate what has stalled: nobody answers, and the next chunk comes."""
        stalled = action == _STALL
        sids = rows["sid"][stalled] if "sid" in rows else [self.constants["sid"]]
        for sid in np.unique(sids).tolist() if stalled.any() else ():
            self.smmu.command("STALL_TERM", StreamID=sid)

    def summary(self, seconds: float) -> TraceSummary:
        """Return what there was so far."""
        actions = {ACTIONS[i]: n for i, n in enumerate(self.actions.tolist()) if n}
        events = {layout.Event(i).name: n for i, n in enumerate(self.events.tolist()) if n and i}
        return TraceSummary(int(self.actions.sum()), actions, events, seconds)

    def row_dtype(self, columns: Iterable[str] | None) -> np.dtype[Any]:
        """Return the dtype of a row of results."""
        none = np.empty(0, np.uint64)
        more: dict[str, Any] = {"columns": columns}
        dtype: np.dtype[Any] = self.smmu.translate_batch(0, none, **more).dtype
        return dtype


def translate_chunks(
    smmu: Smmu,
    requests: _Requests,
    *,
    sid: int | None = None,
    ssid: int | None = None,
    write: bool = False,
    priv: bool = False,
    instr: bool = False,
    columns: Iterable[str] | None = None,
    chunk: int = CHUNK,
    threads: int = 1,
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Translate a trace, and yield the results of each chunk.

    The arguments, and what is raised, are those of `translate_trace`.

    Yields
    ------
    int, structured array
        The row that the chunk starts at, and its results.  The array is used again for the next
        chunk.
    """
    constants = {"sid": sid, "ssid": ssid, "write": write, "priv": priv, "instr": instr}
    trace = _Trace(smmu, requests, constants, chunk, threads)
    buffer = np.empty(min(chunk, trace.total), trace.row_dtype(columns))
    return _chunks(trace, buffer)


def _chunks(trace: _Trace, buffer: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    start = 0
    while start < trace.total:
        found = buffer[: trace.total - start]
        stop = trace.translate(start, {name: found[name] for name in found.dtype.names or ()})
        yield start, found
        start = stop


def translate_trace(
    smmu: Smmu,
    requests: _Requests,
    out: _Path | NDArray[Any] | Mapping[str, NDArray[Any]] | None = None,
    *,
    sid: int | None = None,
    ssid: int | None = None,
    write: bool = False,
    priv: bool = False,
    instr: bool = False,
    columns: Iterable[str] | None = None,
    chunk: int = CHUNK,
    threads: int = 1,
    progress: _Progress | None = None,
) -> TraceSummary:
    """Translate a trace from its first request to its last, in memory that does not grow with it.

    What stalls is terminated after its chunk by CMD_STALL_TERM of its stream.

    Parameters
    ----------
    smmu : Smmu
    requests : path, array or dict
        See `smmufast.trace`.
    out : path, structured array or dict of 1-D arrays, optional
        Where results go.  A path is an .npy file to make, of rows of `columns`; it takes its name
        when it is complete, and may not be that of the trace.  The columns of an array are those
        of `Smmu.translate_batch`; it may be a numpy.memmap.
    sid, ssid, write, priv, instr : int, int, bool, bool, bool, optional
        Of every request, where the trace does not say.
    columns : sequence of str, optional
        For a path: the columns wanted, by default pa, action and event.
    chunk : int
        Requests translated at a time.
    threads : int
        How many share a chunk, as `Smmu.translate_batch` says.
    progress : callable, optional
        Called after each chunk with the requests done and all requests.

    Returns
    -------
    TraceSummary

    Raises
    ------
    TraceError
        A file that cannot be read or written, a dtype that is no trace's, or a value that no
        request can have.  Requests of the chunks before are done.

    >>> import numpy as np
    >>> from smmufast import Memory, Smmu
    >>> from smmufast.trace import translate_trace
    >>> memory = Memory()
    >>> memory.add(bytearray(1 << 16), 0)
    >>> memory.write_u64(0, 0b1001)
    >>> requests = np.zeros(1000, [("sid", "u4"), ("iova", "u8")])
    >>> requests["sid"][:10] = 1
    >>> found = translate_trace(Smmu(memory, strtab_base=0, strtab_base_cfg=1), requests)
    >>> found.actions, found.events
    ({'bypass': 990, 'abort': 10}, {'C_BAD_STE': 10})
    """
    constants = {"sid": sid, "ssid": ssid, "write": write, "priv": priv, "instr": instr}
    trace = _Trace(smmu, requests, constants, chunk, threads)
    began = time.perf_counter()
    with closing(_results(trace, out, columns)) as results:
        for done in results:
            if progress is not None:
                progress(done, trace.total)
    return trace.summary(time.perf_counter() - began)


def _results(
    trace: _Trace,
    out: _Path | NDArray[Any] | Mapping[str, NDArray[Any]] | None,
    columns: Iterable[str] | None,
) -> Generator[int, None, None]:
    """Translate chunk by chunk, and keep the results; yield how many requests are done."""
    if isinstance(out, (str, os.PathLike)):
        yield from _into_file(trace, os.fspath(out), columns)
        return
    if columns is not None:
        raise TypeError("columns are for out= as a path")
    into: dict[str, NDArray[Any]] = {}
    mapped: list[_Mapping] = []
    if isinstance(out, np.ndarray):
        if out.dtype.names is None:
            raise TypeError(in_words("out.dtype", "a structured one", str(out.dtype)))
        into = {name: out[name] for name in out.dtype.names}
        mapped = [_Mapping(out)]
    elif isinstance(out, Mapping):
        into = dict(out)
        mapped = [_Mapping(column) for column in into.values()]
    elif out is not None:
        raise TypeError(must_be("out", "a path, an array or a dict", out))
    for name, column in into.items():
        if getattr(column, "shape", None) != (trace.total,):
            shape = getattr(column, "shape", None)
            raise ValueError(must_be(f"out[{name!r}].shape", f"({trace.total},)", shape))
    start = 0
    while start < trace.total:
        end = start + trace.chunk
        start = trace.translate(start, {name: into[name][start:end] for name in into})
        for one in mapped:
            one.release(start)
        yield start


def _into_file(trace: _Trace, path: str, columns: Iterable[str] | None) -> Iterator[int]:
    """Write an .npy file: beside its place, and there once it is complete."""
    dtype = trace.row_dtype(columns)
    buffer = np.empty(min(trace.chunk, trace.total), dtype)
    header = {
        "descr": npy.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (trace.total,),
    }
    for source in trace.files:
        if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            raise TraceError(path, None, "the results would replace the trace itself")
    try:
        with replacing(path) as file:
            npy.write_array_header_1_0(file, header)
            for start, found in _chunks(trace, buffer):
                file.write(found.view(np.uint8).data)
                yield start + len(found)
    except OSError as error:
        raise TraceError(path, None, error.strerror or str(error)) from None
