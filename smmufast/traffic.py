"""Traffic: everything that reached an SMMU, in order, on disk; recorded by a host, and replayed.

Not architectural.  Traffic is a directory of two files.

``log.jsonl.gz``
    Lines of JSON, numbers as integers.  First an object: ``idr``, the identification registers
    IDR0, IDR1, IDR3, IDR5 and, if it is there, AIDR, as integers or hexadecimal strings;
    ``ram``, [base, size] in bytes; anything else is kept.  Then arrays, in the order of time:

    ``["W", offset, size, value]``
        A register is written.
    ``["R", offset, size, value]``
        A register is read, and gives this.
    ``["S", pa, size, value, kind]``
        Software stores 1, 2, 4, 8 or 16 bytes.  ``["D", …]`` is the same, of a store that was seen
        late.  ``kind`` says into what, and is not looked at: 0 not told, 1 L1STD, 2 STE, 3 CD,
        4 page table, 5 command queue, 6 event queue, 7 L1CD.
    ``["P", pa, kind, n]``, ``["Z", pa, kind]``
        A page holds page n of pages.npz, or zeros, from now on.  ``["U", pa]``: it is not told of
        any more.
    ``["T", sid, iova, pa, perm, stage]``
        A transaction is translated to ``pa``.  ``perm`` is what its page permits: 1 read, 2 write.
    ``["B", sid, iova, write]``, ``["A", …]``, ``["N", …]``
        One that bypasses, is terminated without an event, or finds the SMMU disabled.
    ``["E", sid, name, record]``
        One that ends with an event: its record, as hexadecimal digits in memory order.
    ``["I", n]``
        An interrupt: 0 eventq, 1 priq, 2 gerror, 3 cmdq_sync, 4 sev, as `Smmu.on_interrupt` has it.
    ``["O", text]``
        A remark.

``pages.npz``
    ``pages`` uint8[N, 4096].

A sixth member of T and a fifth of B, A and N, if it is there, is an object: ``ssid``, ``write``,
``priv``, ``instr``, as `Smmu.translate` takes them.  Without, the transaction is taken for
privileged data, as the emulator does of which most recordings are, and its records are compared
as those of a capture without ``priv`` are (smmufast.capture).  Offsets below 0x10000 of registers
that lie in page 1 (queue indices of events and page requests) are those of page 1.

Replaying
---------
`replay` performs stores and register writes, and compares what registers give, how transactions
end, and event records.  It stops at the first divergence.  Interrupts are counted: the emulator
raises one for each event, the architecture one when the queue becomes non-empty.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from smmufast import layout
from smmufast._arguments import in_words, integer, must_be, one_of
from smmufast._device.smmu import Result, Smmu
from smmufast._engine.tlb import Caches
from smmufast._files import refuse_taken, replacing_directory
from smmufast._tools.capture_files import (
    PAGE,
    U32,
    U64,
    Line,
    Watch,
    check_regions,
    features_of,
    line_registers,
    read_arrays,
    read_values,
)  # fmt: skip
from smmufast._tools.capture_outcomes import read_record
from smmufast._tools.capture_queues import queue_pages
from smmufast._tools.capture_writing import contents_of, registers_of, write_pages
from smmufast._tools.traffic_replay import ENDS, IRQS, Divergence, Replayed, Run
from smmufast.features import Features

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

__all__ = ["Divergence", "Recorder", "Replayed", "Step", "Traffic", "replay"]

LOG, PAGES = "log.jsonl.gz", "pages.npz"
MOST = 1 << 36
"""Bytes that the log may unpack to; it is read line by line."""
_SIZES = (1, 2, 4, 8)
_PAGE_1 = 0x10000
_FORMS: dict[str, tuple[tuple[str, int], ...]] = {
    "W": (("offset", 0x1FFFF), ("size", 8), ("value", U64)),
    "S": (("pa", U64), ("size", 16), ("value", (1 << 128) - 1), ("kind", U32)),
    "P": (("pa", U64), ("kind", U32), ("n", U32)),
    "Z": (("pa", U64), ("kind", U32)),
    "U": (("pa", U64),),
    "T": (("sid", U32), ("iova", U64), ("pa", U64), ("perm", 7), ("stage", 3)),
    "B": (("sid", U32), ("iova", U64), ("write", 1)),
    "I": (("n", len(IRQS) - 1),),
}
_FORMS |= {"R": _FORMS["W"], "D": _FORMS["S"], "A": _FORMS["B"], "N": _FORMS["B"]}
_ACCESS = ("ssid", "write", "priv", "instr")
#: Registers of page 1 (IHI 0070 6.2) that have an offset in page 0 too, where nothing else lies.
_INDICES = {
    record.offset - _PAGE_1: record.offset
    for record in layout.REGISTERS.values()
    if record.offset is not None and record.offset >= _PAGE_1
}


class Step(NamedTuple):
    """One thing that happened.

    Attributes
    ----------
    line : int
        Of the log, counted from 1.
    op : str
        The letter of its form.
    values : tuple
        The members behind the letter that are numbers or text, as the form has them.
    access : dict
        What is told of a transaction: keywords of `Smmu.translate`.
    """

    line: int
    op: str
    values: tuple[Any, ...]
    access: Mapping[str, Any] = MappingProxyType({})

    def __str__(self) -> str:
        shown = ", ".join(hex(v) if isinstance(v, int) else str(v) for v in self.values)
        return f"line {self.line}: {self.op} {shown}"


class Traffic:
    """Recorded traffic: what the SMMU has, where RAM is, and the steps in their order.

    Attributes
    ----------
    path : str
    header : dict
        The first line of the log.
    features : Features
        As recorded.
    ram : (int, int)
        Base and size in bytes.
    pages : array of uint8, (N, 4096)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the header and the pages.

        Raises
        ------
        CaptureError
            They cannot be read, or are not of the format.
        """
        self.path = os.fspath(path)
        self._log = os.path.join(self.path, LOG)
        number, value = next(read_values(self._log, most=MOST), (1, None))
        line = Line(self._log, number, value)
        self.header = line.values
        given = {
            name: value
            for name, value in line.inner("idr").values.items()
            if name in ("IDR0", "IDR1", "IDR3", "IDR5", "AIDR")
        }
        self.features: Features = features_of(
            line, line_registers(line, given, ("IDR0", "IDR1", "IDR3", "IDR5"))
        )
        base, size = (line.number_of("ram", value, U64) for value in line.list("ram", 2))
        self.ram = (base, size)
        check_regions(line, [self.ram])
        self.pages: NDArray[np.uint8]
        (self.pages,) = read_arrays(os.path.join(self.path, PAGES), pages=("u1", PAGE))

    def steps(self, progress: Callable[[int, int], object] | None = None) -> Iterator[Step]:
        """Yield the steps; `progress` is called as that of `Capture.load`.

        Raises
        ------
        CaptureError
            A line is not of the format.
        """
        watch = Watch(self.path, progress)
        values = read_values(self._log, watch, MOST)
        next(values, None)
        for number, value in values:
            yield self._step(number, value)

    def _step(self, number: int, value: Any) -> Step:
        """Return a line as a step, every member of it checked."""
        line = Line(self._log, number, {})
        if not isinstance(value, list) or not value or not isinstance(value[0], str):
            line.bad(in_words("a step", "a list that begins with a letter", repr(value)[:40]))
        op, *members = value
        access: dict[str, Any] = {}
        if op == "O":
            return Step(number, op, tuple(str(member) for member in members))
        if op == "E":
            return self._event(line, members)
        if op not in _FORMS:
            line.bad(must_be("the letter of a step", " ".join(sorted({*_FORMS, "E", "O"})), op))
        form = _FORMS[op]
        if op in ("T", *ENDS) and len(members) == len(form) + 1:
            access = self._access(line, members.pop())
        if len(members) != len(form):
            line.bad(in_words(op, f"a list of {len(form)}", f"one of {len(members)}"))
        found = tuple(
            line.number_of(name, member, last)
            for (name, last), member in zip(form, members, strict=True)
        )
        if op in "WRSD":
            sizes = (*_SIZES, 16) if op in "SD" else _SIZES
            if found[1] not in sizes or found[2] >> 8 * found[1]:
                line.bad(f"{op}: {found[2]:#x} is no value of {found[1]} bytes")
            if op in "WR" and found[0] in _INDICES:
                found = (_INDICES[found[0]], *found[1:])
        if op in "PZ" and found[0] % PAGE:
            line.bad(must_be("pa", f"a multiple of {PAGE}", found[0]))
        if op == "P" and found[2] >= len(self.pages):
            line.bad(must_be("n", f"one of {len(self.pages)} pages", found[2]))
        if op in ENDS:
            access = {"write": bool(found[2])} | access
        return Step(number, op, found, access)

    def _access(self, line: Line, value: Any) -> dict[str, Any]:
        told = Line(line.path, line.number, value)
        told.only(*_ACCESS)
        access: dict[str, Any] = {name: told.flag(name) for name in _ACCESS[1:]}
        if told.values.get("ssid") is not None:
            access["ssid"] = told.integer("ssid", 0xFFFFF)
        return access

    def _event(self, line: Line, members: list[Any]) -> Step:
        if len(members) not in (3, 4):
            line.bad(in_words("E", "a list of 3", f"one of {len(members)}"))
        sid = line.number_of("sid", members[0], U32)
        told = Line(line.path, line.number, {"record": members[2]})
        raw = read_record(told, "record")
        access = self._access(line, members[3]) if len(members) == 4 else {}
        return Step(line.number or 0, "E", (sid, str(members[1]), raw), access)

    def _repr_html_(self) -> str:
        from smmufast._html import table

        pairs = [("path", self.path), ("ram", self.ram), ("pages", len(self.pages))]
        return table("Traffic", [*pairs, ("features", self.features), ("header", self.header)])

    def __repr__(self) -> str:
        base, size = self.ram
        return f"<Traffic {self.path}: RAM of {size:#x} bytes at {base:#x}>"


_PRESETS = {"none": None, "small": Caches.small, "server": Caches.server}
#: Registers that say what an SMMU is set to, in an order in which software can write them.
_SETTINGS = (
    "CR1", "CR2", "GBPA", "STRTAB_BASE", "STRTAB_BASE_CFG", "CMDQ_BASE", "CMDQ_PROD", "CMDQ_CONS",
    "EVENTQ_BASE", "EVENTQ_PROD", "EVENTQ_CONS", "PRIQ_BASE", "PRIQ_PROD", "PRIQ_CONS", "IRQ_CTRL",
    "CR0",
)  # fmt: skip


class Recorder:
    """Records what reaches an SMMU, while the host reaches it through this object::

        with Recorder("traffic", smmu) as recorder:
            recorder.store(address, data)         # software's stores to tables and queues
            recorder.write(offset, value)         # its registers
            result = recorder.translate(sid, iova, ssid=5, write=True)

    The directory is there when the block ends without an error: whole, or not at all.  What the
    SMMU is set to, and the pages that its registers lead to, are recorded at the start; stores of
    which the recorder is not told are in no recording.
    """

    def __init__(
        self, path: str | os.PathLike[str], smmu: Smmu, header: Mapping[str, Any] | None = None
    ) -> None:
        """Step into a new directory; `header` has more members for the first line.

        Raises
        ------
        FileExistsError
            The directory holds something, or there is a file of that name.
        ValueError
            The memory has no region, or its tables cannot be followed (`streams.pages`).
        """
        self.smmu = smmu
        refuse_taken(path)
        regions = smmu.memory.regions
        if not regions:
            raise ValueError(in_words("memory", "one with a region", "without"))
        base = min(region.base for region in regions)
        end = max(region.base + region.size for region in regions)
        features = smmu.features
        idr = {name.upper(): getattr(features, name) for name in ("idr0", "idr1", "idr3", "idr5")}
        self._header = {
            **(header or {}), "idr": idr | {"AIDR": features.aidr}, "ram": [base, end - base],
        }  # fmt: skip
        self._path = path
        self._stack = ExitStack()
        self._begin()

    def _begin(self) -> None:
        """Open the files, and write what there is."""
        from smmufast import streams

        smmu = self.smmu
        names = [n for n in _SETTINGS if smmu.features.pri or not n.startswith("PRIQ")]
        registers = {name: smmu.read(name) for name in names}
        pages = {*streams.pages(smmu), *queue_pages(registers_of(smmu))}
        addresses, self._pages = contents_of(smmu.memory, sorted(pages))
        self._partial = self._stack.enter_context(replacing_directory(self._path))
        try:
            raw = self._stack.enter_context(open(os.path.join(self._partial, LOG), "wb"))  # noqa: SIM115
            self._log = self._stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
            self._line(self._header)
            for n, address in enumerate(addresses):
                self._line(["P", address, 0, n])
            for name, value in registers.items():
                record = layout.REGISTERS[name]
                self._line(["W", record.offset, record.bytes, value])
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise

    def _line(self, value: Any) -> None:
        self._log.write(json.dumps(value).encode() + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            write_pages(os.path.join(self._partial, PAGES), [], self._pages)
        self._stack.__exit__(kind, error, trace)

    def write(self, offset: int | str, value: int, size: int | None = None) -> None:
        """Write a register, by offset or by name, as `Smmu.write` does."""
        offset, size = self._register(offset, size)
        self._line(["W", offset, size, int(value)])
        self.smmu.write(offset, value, size)

    def read(self, offset: int | str, size: int | None = None) -> int:
        """Read a register, as `Smmu.read` does."""
        offset, size = self._register(offset, size)
        value = self.smmu.read(offset, size)
        self._line(["R", offset, size, value])
        return value

    def _register(self, offset: int | str, size: int | None) -> tuple[int, int]:
        if isinstance(offset, str):
            record = layout.REGISTERS[offset]
            return record.offset or 0, record.bytes if size is None else size
        return offset, 4 if size is None else size

    def store(self, address: int, data: bytes) -> None:
        """Store bytes, as software does, and in as few pieces as the format has."""
        data = bytes(data)
        self.smmu.memory.write(address, data)
        at = 0
        while at < len(data):
            size = next(
                size for size in (8, 4, 2, 1)
                if not (address + at) % size and at + size <= len(data)
            )  # fmt: skip
            value = int.from_bytes(data[at : at + size], "little")
            self._line(["S", address + at, size, value, 0])
            at += size

    def interrupt(self, name: str) -> None:
        """Tell of an interrupt, by the name that `Smmu.on_interrupt` gets."""
        one_of("name", name, IRQS)
        self._line(["I", IRQS.index(name)])

    def translate(self, sid: int, iova: int, **access: Any) -> Result:
        """Translate an access, as `Smmu.translate` does with the same keywords."""
        result = self.smmu.translate(sid, iova, **access)
        told = {name: access[name] for name in _ACCESS if access.get(name) is not None}
        told = {name: int(value) for name, value in told.items()}
        told.setdefault("priv", 0)
        if result.event is not None:
            record = result.event.record.hex()
            self._line(["E", result.sid, result.event.name, record, told])
        elif result.action == "ok":
            bits = int(result.perm_s1 if result.stage == 3 else result.perm)
            perm = bits >> (3 if told["priv"] else 0) & 3
            self._line(["T", result.sid, result.iova, result.pa, perm, result.stage, told])
        else:
            op = {"bypass": "B", "disabled": "N"}.get(result.action, "A")
            self._line([op, result.sid, result.iova, int(result.write), told])
        return result


def replay(
    traffic: Traffic | str | os.PathLike[str],
    *,
    caches: Caches | str | None = None,
    until: int | None = None,
    drop: Collection[str] = (),
    progress: Callable[[int, int], object] | None = None,
) -> Replayed:
    """Replay traffic, up to its end or to the first divergence.

    Parameters
    ----------
    traffic : Traffic or path
    caches : Caches, "none", "small", "server" or None
        What the SMMU has.
    until : int, optional
        The last line of the log that is replayed.
    drop : collection of str
        Names of commands, such as "TLBI_NH_VA", that are left out: the replay diverges, or
        `Replayed.stale` is not 0, where they are needed.
    progress : callable, optional
        Called as that of `Capture.load`.

    Raises
    ------
    CaptureError
        The traffic cannot be read.
    ValueError
        There is no such command, or no such preset of caches.
    """
    if not isinstance(traffic, Traffic):
        traffic = Traffic(traffic)
    names = sorted(layout.COMMANDS)
    wanted = {name.upper().removeprefix("CMD_") for name in drop}
    for name in wanted:
        one_of("drop", name, names)
    if isinstance(caches, str):
        one_of("caches", caches, _PRESETS)
        make = _PRESETS[caches]
        caches = None if make is None else make()
    if until is not None:
        until = integer("until", until)
    return Run(traffic, caches, wanted).run(traffic.steps(progress), until)
