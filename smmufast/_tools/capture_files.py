"""Files of captures: lines of JSON, arrays in npz, and what every one of them must satisfy."""

from __future__ import annotations

import gzip
import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.lib import format as npy

from smmufast import layout
from smmufast._arguments import either, in_words, must_be, shown
from smmufast._files import as_number
from smmufast.features import Features

if TYPE_CHECKING:
    from numpy.typing import NDArray

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


"""A request in an array; ssid 0xFFFFFFFF is none."""

U32 = (1 << 32) - 1
U64 = (1 << 64) - 1
NEEDED = ("STRTAB_BASE", "STRTAB_BASE_CFG", "CR0", "IDR0", "IDR1", "IDR3", "IDR5")
_DEFAULTS = {"AIDR": 1, "CR2": 0, "GBPA": 0x1000}
_CR0 = layout.REGISTERS["CR0"]
EVENTQEN = _CR0.field("EVENTQEN").mask
SMMUEN = _CR0.field("SMMUEN").mask
RECINVSID = layout.REGISTERS["CR2"].field("RECINVSID").mask


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


class Line:
    """A JSON object and where it stands; its members are asked for by type."""

    __slots__ = ("number", "path", "values")

    def __init__(self, path: str, number: int | None, values: Any) -> None:
        self.path = path
        self.number = number
        if not isinstance(values, dict):
            self.bad(in_words("the JSON", "an object", kind_of(values)))
        self.values: dict[str, Any] = values

    def bad(self, problem: str) -> NoReturn:
        """Raise for this line."""
        raise CaptureError(self.path, self.number, problem)

    def get(self, name: str) -> Any:
        """Return a member that has to be there."""
        if name not in self.values:
            self.bad(f"{name} is missing")
        return self.values[name]

    def only(self, *names: str) -> None:
        """Refuse an object that has other members than these."""
        for name in self.values:
            if name not in names:
                self.bad(must_be("a member", either(names), name[:70]))

    def number_of(self, name: str, value: Any, last: int, first: int = 0) -> int:
        """Return a value that is a number of the format, from `first` to `last`."""
        if type(value) is str:
            found = as_number(value)
            value = value if found is None else found
        if type(value) is not int:
            self.bad(in_words(name, "a number", kind_of(value)))
        if not first <= value <= last:
            self.bad(must_be(name, f"{first} to {shown(last)}", value))
        return value

    def integer(self, name: str, last: int, first: int = 0) -> int:
        """Return a member that is a number from `first` to `last`."""
        return self.number_of(name, self.get(name), last, first)

    def flag(self, name: str) -> bool:
        """Return an optional member that is 0 or 1, or false or true."""
        value = self.values.get(name, 0)
        return value if type(value) is bool else bool(self.number_of(name, value, 1))

    def text(self, name: str) -> str:
        """Return a member that is a string."""
        value = self.get(name)
        if not isinstance(value, str):
            self.bad(in_words(name, "a string", kind_of(value)))
        if not value.isprintable():
            self.bad(f"{name}: {value!r} has characters that cannot be shown")
        return value

    def list(self, name: str, length: int | None = None) -> list[Any]:
        """Return a member that is a list, of this length if one is given."""
        value = self.get(name)
        if not isinstance(value, list) or (length is not None and len(value) != length):
            size = "" if length is None else f" of {length}"
            self.bad(in_words(name, f"a list{size}", kind_of(value)))
        return value

    def inner(self, name: str) -> Line:
        """Return a member that is an object itself."""
        value = self.get(name)
        if not isinstance(value, dict):
            self.bad(in_words(name, "an object", kind_of(value)))
        return Line(self.path, self.number, value)


def kind_of(value: Any) -> str:
    """Return what JSON calls the kind of a value."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    return {str: "a string", bool: "a truth value", float: "a fraction", int: "a number"}.get(
        type(value), "null"
    )


def _parse(path: str, number: int | None, text: bytes) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise CaptureError(path, number, "not JSON: nested too deeply") from None
    except ValueError as error:
        # also an unknown encoding, and a number of too many digits
        reason = getattr(error, "msg", None) or str(error).partition(";")[0]
        raise CaptureError(path, number, f"not JSON: {reason}") from None


def read_meta(path: str) -> Line:
    """Read ``meta.json``."""
    try:
        with open(path, "rb") as file:
            return Line(path, None, _parse(path, None, file.read(MAX_LINE)))
    except OSError as error:
        raise _open_error(path, error) from None


def _open_error(path: str, error: OSError) -> CaptureError:
    return CaptureError(path, None, error.strerror or str(error))


class Watch:
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


_UNWATCHED = Watch("", None)
_PIECE = 1 << 20


def read_lines(path: str, watch: Watch = _UNWATCHED) -> Iterator[Line]:
    """Yield the objects of a compressed list."""
    for number, value in read_values(path, watch):
        yield Line(path, number, value)


def read_values(
    path: str, watch: Watch = _UNWATCHED, most: int | None = None
) -> Iterator[tuple[int, Any]]:
    """Yield the values of a compressed list, each with its line.

    `most` is how many bytes it may unpack to, by default MAX_TEXT.
    """
    most = MAX_TEXT if most is None else most
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
                if total > most:
                    raise CaptureError(path, number, f"the list unpacks to over {most} bytes")
                if text.strip():
                    yield number, _parse(path, number, text)
        watch.done(path)
    except EOFError:
        raise CaptureError(path, number + 1, "the compressed data is cut off") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise CaptureError(path, number + 1, f"the compressed data is damaged: {error}") from None
    except OSError as error:
        raise _open_error(path, error) from None


def read_arrays(
    path: str, watch: Watch = _UNWATCHED, **wanted: tuple[str, int]
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
    """Read one array of a file, of this type and with rows of so many bytes."""
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


def line_registers(line: Line, given: Mapping[str, Any], needed: Iterable[str]) -> dict[str, int]:
    """Return registers by name, with the defaults of those that are absent."""
    registers = dict(_DEFAULTS)
    for name, value in given.items():
        record = layout.REGISTERS.get(name)
        last = U64 if record is None or record.bytes == 8 else U32
        registers[name] = line.number_of(name, value, last)
    for name in needed:
        if name not in registers:
            line.bad(f"register {name} is missing")
    return registers


def features_of(line: Line, registers: Mapping[str, int]) -> Features:
    """Return what the identification registers say."""
    try:
        return Features.from_idr(*(registers[n] for n in ("IDR0", "IDR1", "IDR3", "IDR5", "AIDR")))
    except ValueError as error:
        line.bad(f"identification registers: {error}")


def check_regions(line: Line, pairs: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return regions of RAM in order; raise unless each can be one and none overlap."""
    regions = tuple(sorted(pairs))
    end = 0
    for base, size in regions:
        if base % 8 or not 0 < size <= MAX_RAM or base + size > U64 + 1:
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


def check_pages(
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


def read_pages(path: str, watch: Watch = _UNWATCHED) -> tuple[NDArray[Any], NDArray[Any]]:
    """Read the addresses and the contents of the pages of a file."""
    addresses, pages = read_arrays(path, watch, page_addr=("<u8", 8), pages=("u1", PAGE))
    if len(addresses) != len(pages):
        raise CaptureError(path, None, f"{len(addresses)} addresses for {len(pages)} pages")
    return addresses, pages


_COUNTS = {
    "requests": "lines of requests.jsonl.gz",
    "events": "lines of events.jsonl.gz",
    "pages": "pages of pages.npz",
    "queue_pages": "pages of queues.npz",
}
RAM = ("ram_base", "ram_size", "regions")
COUNTED = {"truth": "requests", "requests": "requests", "events": "events", "pages": "pages"}
"""Members of meta.json that are counts too, where they are numbers."""


def check_counts(meta: Line, **found: int) -> None:
    """Raise unless the files hold as much as meta.json says."""
    told = []
    if "counts" in meta.values:
        counts = meta.inner("counts")
        counts.only(*_COUNTS)
        told = [(f"counts.{name}", name, counts.integer(name, U32)) for name in counts.values]
    for name, what in COUNTED.items():
        if type(count := meta.values.get(name)) is int:
            told.append((name, what, count))
    for name, what, count in told:
        if count != found[what]:
            meta.bad(f"{name} is {count}, but there are {found[what]} {_COUNTS[what]}")
