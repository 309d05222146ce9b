"""What a stream table leads to: its entries, their context descriptors, and the pages of it all.

Not architectural: where an entry lies is asked of the core.  A walk that is started names its
first fetch, and given an answer its next one; so how an address changes with a bit of the
StreamID, the SubstreamID or the input address tells bases, splits and sizes.  This file knows the
sizes of records, and which descriptors may name a table.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from smmufast import layout
from smmufast._memory import Memory
from smmufast._smmu import Smmu, Walk
from smmufast.faults import ExternalAbort

__all__ = ["ContextRun", "Run", "StreamTable", "contexts", "pages", "stream_table", "streams"]

PAGE = 4096
PIECE = 1 << 20
LARGEST = 1 << 30
"""Bytes of one table that are looked through when no pages are named."""

_ENTRY = layout.RECORDS["STE"].bytes
_POINTER = layout.RECORDS["L1STD"].bytes
_TABLE = layout.pack("PTE_S1_TABLE", Valid=1, Type=1)


class StreamTable(NamedTuple):
    """How the registers lay the stream table out.

    `two_level`; `base`, the address of its first entry; `log2size`, StreamIDs covered as a power
    of two; `split`, StreamID bits that index a level-2 table, None for a linear one.
    """

    two_level: bool
    base: int
    log2size: int
    split: int | None


class Run(NamedTuple):
    """StreamIDs `first` to `last` whose entries are equal.

    `ste` is the entry in memory order, at `address` for the first; None where there is none, and
    `problem` says why.  `path` holds the level-1 descriptor on the way to it.
    """

    first: int
    last: int
    address: int | None
    ste: bytes | None
    problem: str | None
    path: tuple[bytes, ...]


class ContextRun(NamedTuple):
    """Substreams `first` to `last` whose context descriptors are equal; None without substreams.

    `cd` is the descriptor in memory order, at `address` for the first; None where there is none,
    and `problem` says why.
    """

    first: int | None
    last: int | None
    address: int | None
    cd: bytes | None
    problem: str | None
    path: tuple[bytes, ...]


# --- asking the core ------------------------------------------------------------------------------


def _ask(smmu: Smmu, sid: int, answers: Sequence[bytes], **access: Any) -> Walk:
    walk = smmu.start_walk(sid, access.pop("iova", 0), **access)
    for answer in answers:
        if walk.done:
            break
        walk.supply(answer)
    return walk


def _address(walk: Walk) -> int | None:
    return None if walk.request is None else walk.request.address


def _asked(walk: Walk) -> tuple[int, int]:
    """Level (4 when it is no table's) and address of the fetch that a walk waits for."""
    request = walk.request
    if request is None:
        raise RuntimeError("the walk is done")
    return 4 if request.level is None else request.level, request.address


def _reason(walk: Walk) -> str:
    result = walk.result
    if result is None:
        raise RuntimeError("the walk is not done")
    return str(result.action if result.fault is None else result.fault.name)


def _enabled(smmu: Smmu) -> Smmu:
    """Return the same SMMU with SMMUEN=1, without which nothing is looked up."""
    enable = layout.pack("CR0", SMMUEN=1)
    if smmu.cr0 & enable:
        return smmu
    return Smmu(
        smmu.memory,
        smmu.features,
        strtab_base=smmu.strtab_base,
        strtab_base_cfg=smmu.strtab_base_cfg,
        cr0=smmu.cr0 | enable,
        cr2=smmu.cr2,
        gbpa=smmu.gbpa,
    )


def _lowest(bits: int, test: Callable[[int], bool]) -> int:
    """Return the lowest bit for which the test holds, or `bits`."""
    return next((k for k in range(bits) if test(k)), bits)


# --- reading arrays -------------------------------------------------------------------------------


def _spans(memory: Memory) -> list[tuple[int, int]]:
    """Return first and end address of the memory, neighbouring regions joined."""
    spans: list[tuple[int, int]] = []
    for region in memory.regions:
        if spans and spans[-1][1] == region.base:
            spans[-1] = (spans[-1][0], region.base + region.size)
        else:
            spans.append((region.base, region.base + region.size))
    return spans


def _pieces(
    memory: Memory, base: int, size: int, entry: int, present: Sequence[int] | None
) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield an array in pieces: address, size and contents.

    Contents are None where a read aborts, and empty for zeros that were not read: `present` are
    the pages that may hold something else, ascending.
    """
    at, end = base, base + size
    backed = sum(max(min(last, end) - max(first, base), 0) for first, last in _spans(memory))
    if present is None and backed > LARGEST:
        raise ValueError(f"the table at {base:#x} has {backed:#x} bytes; name the pages to look at")
    for first, last in _spans(memory):
        first = base + -(-(max(first, at) - base) // entry) * entry
        last = base + (min(last, end) - base) // entry * entry
        if first >= last:
            continue
        if first > at:
            yield at, first - at, None
        yield from _readable(memory, first, last, entry, present)
        at = last
    if at < end:
        yield at, end - at, None


def _readable(
    memory: Memory, at: int, end: int, entry: int, present: Sequence[int] | None
) -> Iterator[tuple[int, int, bytes | None]]:
    i = 0 if present is None else bisect_right(present, at - PAGE)
    while at < end:
        size = min(PIECE, end - at)
        if present is not None:
            if i == len(present) or present[i] > at:
                size = (end if i == len(present) else min(present[i], end)) - at
                yield at, size, b""
                at += size
                continue
            stop = present[i]
            while i < len(present) and present[i] == stop and stop < at + PIECE:
                stop += PAGE
                i += 1
            size = min(stop, end) - at
        try:
            yield at, size, memory.read(at, size)
        except ExternalAbort:  # a callback that refuses: entry by entry
            for address in range(at, at + size, entry):
                try:
                    yield address, entry, memory.read(address, entry)
                except ExternalAbort:
                    yield address, entry, None
        at += size


def _entries(
    memory: Memory, base: int, count: int, entry: int, present: Sequence[int] | None
) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield runs of equal entries of an array: first index, end index, contents or None."""
    for address, size, data in _pieces(memory, base, count * entry, entry, present):
        first = (address - base) // entry
        end = first + size // entry
        if data is None:
            yield first, end, None
        elif not data:
            yield first, end, bytes(entry)
        else:
            rows = np.frombuffer(data, "<u8").reshape(-1, entry // 8)
            starts = np.flatnonzero((rows[1:] != rows[:-1]).any(axis=1)) + 1
            edges = [0, *starts.tolist(), len(rows)]
            for i, j in pairwise(edges):
                yield first + i, first + j, data[i * entry : (i + 1) * entry]


# --- stream table ---------------------------------------------------------------------------------


def stream_table(smmu: Smmu) -> StreamTable | None:
    """Return the layout of the stream table, None when its base is beyond the address size."""
    smmu = _enabled(smmu)
    request = smmu.start_walk(0, 0).request
    if request is None:
        return None

    def outside(k: int) -> bool:
        walk = smmu.start_walk(1 << k, 0)
        return walk.done and _reason(walk) == "C_BAD_STREAMID"

    log2size = _lowest(32, outside)
    split = None
    if request.kind == "L1STD":
        split = _lowest(log2size, lambda k: _address(smmu.start_walk(1 << k, 0)) != request.address)
    return StreamTable(split is not None, request.address, log2size, split)


def streams(smmu: Smmu, present: Sequence[int] | None = None) -> Iterator[Run]:
    """Yield the entries of the stream table, runs of equal ones as one.

    Parameters
    ----------
    smmu : Smmu
    present : sequence of int, optional
        Addresses of the pages that may hold something, ascending; all other memory is taken to be
        zero.  Without it every byte of the table is read.

    Raises
    ------
    ValueError
        The table is larger than 1 GiB and `present` is not given.
    """
    last: Run | None = None
    for run in _streams(_enabled(smmu), present):
        if last is None:
            last = run
        elif (last.ste, last.problem) == (run.ste, run.problem) and last.last + 1 == run.first:
            last = last._replace(last=run.last)
        else:
            yield last
            last = run
    if last is not None:
        yield last


def _streams(smmu: Smmu, present: Sequence[int] | None) -> Iterator[Run]:
    table = stream_table(smmu)
    if table is None:
        return
    if table.split is None:
        yield from _array(smmu, table.base, 0, 1 << table.log2size, (), present)
        return
    count = 1 << table.log2size - table.split
    for first, end, data in _entries(smmu.memory, table.base, count, _POINTER, present):
        sid = first << table.split
        if data is None:
            problem = "the level-1 descriptor cannot be read (external abort)"
            yield Run(sid, (end << table.split) - 1, None, None, problem, ())
            continue
        walk = _ask(smmu, sid, (data,))
        if walk.done:
            span = layout.unpack("L1STD", data)["Span"]
            problem = f"no level-2 table (Span={span}, {_reason(walk)})"
            yield Run(sid, (end << table.split) - 1, None, None, problem, (data,))
            continue
        _, address = _asked(walk)
        used = _used(smmu, sid, data, table.split)
        for sid in range(first << table.split, end << table.split, 1 << table.split):
            yield from _array(smmu, address, sid, 1 << used, (data,), present)
            if used < table.split:
                problem = f"beyond the level-2 table of {1 << used} entries (C_BAD_STREAMID)"
                yield Run(
                    sid + (1 << used), sid + (1 << table.split) - 1, None, None, problem, (data,)
                )


def _used(smmu: Smmu, sid: int, l1std: bytes, split: int) -> int:
    """Return how many StreamID bits index the level-2 table of an L1STD."""
    return _lowest(split, lambda k: _ask(smmu, sid | 1 << k, (l1std,)).done)


def _array(
    smmu: Smmu,
    base: int,
    sid: int,
    count: int,
    path: tuple[bytes, ...],
    present: Sequence[int] | None,
) -> Iterator[Run]:
    for first, end, data in _entries(smmu.memory, base, count, _ENTRY, present):
        problem = None if data is not None else "the entry cannot be read (F_STE_FETCH)"
        yield Run(sid + first, sid + end - 1, base + first * _ENTRY, data, problem, path)


# --- context descriptors --------------------------------------------------------------------------


def contexts(smmu: Smmu, run: Run, present: Sequence[int] | None = None) -> Iterator[ContextRun]:
    """Yield the context descriptors that the STE of a run leads to; `present` as in `streams`."""
    if run.ste is None:
        return
    smmu = _enabled(smmu)
    path = (*run.path, run.ste)

    def ask(ssid: int | None, *more: bytes) -> Walk:
        return _ask(smmu, run.first, (*path, *more), ssid=ssid)

    first = ask(None)
    if ask(1).done:
        if first.done:
            return
        _, address = _asked(first)
        try:
            yield ContextRun(None, None, address, smmu.memory.read(address, _ENTRY), None, path)
        except ExternalAbort:
            problem = "the context descriptor cannot be read (F_CD_FETCH)"
            yield ContextRun(None, None, address, None, problem, path)
        return
    zero = ask(0) if first.done else first
    request = zero.request
    if request is None:
        return
    log2 = _lowest(20, lambda k: ask(1 << k).done)
    if request.kind == "CD":
        yield from _contexts(smmu, request.address, 0, 1 << log2, path, present)
        return
    leaf = _lowest(log2, lambda k: _address(ask(1 << k)) != request.address)
    count = 1 << log2 - leaf
    for i, j, data in _entries(smmu.memory, request.address, count, _POINTER, present):
        span = (i << leaf, (j << leaf) - 1)
        if data is None:
            problem = "the level-1 descriptor cannot be read (F_CD_FETCH)"
            yield ContextRun(*span, None, None, problem, path)
            continue
        # ask for a SubstreamID other than 0, which S1DSS may refuse
        walk = ask(i << leaf | 1, data)
        if walk.done:
            problem = f"no table of context descriptors ({_reason(walk)})"
            yield ContextRun(*span, None, None, problem, (*path, data))
            continue
        base = _asked(walk)[1] - _ENTRY
        for ssid in range(i << leaf, j << leaf, 1 << leaf):
            yield from _contexts(smmu, base, ssid, 1 << leaf, (*path, data), present)


def _contexts(
    smmu: Smmu,
    base: int,
    ssid: int,
    count: int,
    path: tuple[bytes, ...],
    present: Sequence[int] | None,
) -> Iterator[ContextRun]:
    for i, j, data in _entries(smmu.memory, base, count, _ENTRY, present):
        problem = None if data is not None else "it cannot be read (F_CD_FETCH)"
        yield ContextRun(ssid + i, ssid + j - 1, base + i * _ENTRY, data, problem, path)


# --- pages ----------------------------------------------------------------------------------------


def unmodelled(ste: bytes, cd: bytes | None, masked: Mapping[str, int]) -> str | None:
    """Return what an STE and a CD ask for that the recorded SMMU has and this version has not.

    `masked` are the features taken away, as `Configuration.masked`; None if nothing is asked for.
    """
    fields = layout.unpack("STE", ste)
    if not fields["V"] or not fields["Config"] & 4:
        return None
    if "s2p" in masked and fields["Config"] & 2:
        return "stage 2"
    if not fields["Config"] & 1:
        return None
    if "ats" in masked and fields["EATS"] & 2:
        return "ATS"
    if "stall_model" in masked and fields["S1STALLD"]:
        return "stalls"
    if cd is not None:
        fields = layout.unpack("CD", cd)
        if "stall_model" in masked and (fields["S"] or masked["stall_model"] == 2):
            return "stalls"
        if "httu" in masked and (fields["HA"] or fields["HD"]):
            return "hardware updates of tables"
        if "ttf" in masked and not fields["AA64"]:
            return "VMSAv8-32 tables"
    return None


class _Pages:
    """The pages that tables lie in, and the search for them."""

    def __init__(self, smmu: Smmu) -> None:
        self.smmu = smmu
        self.found: set[int] = set()

    def add(self, address: int, size: int) -> None:
        self.found.update(range(address & -PAGE, address + size, PAGE))

    def add_array(self, base: int, count: int, entry: int) -> None:
        """Add the pages of an array that are not zero throughout."""
        for address, _, data in _pieces(self.smmu.memory, base, count * entry, entry, None):
            for offset in range(-(address % PAGE), len(data or b""), PAGE):
                if (data or b"")[max(offset, 0) : offset + PAGE].strip(b"\0"):
                    self.add(address + max(offset, 0), 1)

    def add_tables(self, sid: int, path: tuple[bytes, ...], ssid: int | None, swap: bool) -> None:
        """Add the translation tables of a context, of both halves of the address space."""
        for iova in (0, (1 << 64) - 1):
            # CD 0 may serve transactions without a SubstreamID only (S1DSS)
            for number in (ssid, None):
                request = self.walk(sid, path, number, iova).request
                if request is not None and request.kind == "TT":
                    self.visited: set[tuple[int, int]] = set()
                    self.geometry: dict[int, tuple[int, int]] = {}
                    # bit 55 selects the half: the tables are indexed by bits below it
                    self.add_table(sid, path, number, iova, 55, swap)
                    break

    def walk(self, sid: int, path: tuple[bytes, ...], ssid: int | None, iova: int) -> Walk:
        return _ask(self.smmu, sid, path, ssid=ssid, iova=iova, priv=True)

    def add_table(
        self,
        sid: int,
        path: tuple[bytes, ...],
        ssid: int | None,
        iova: int,
        below: int,
        swap: bool,
    ) -> None:
        """Add a table and those below it; `below` is the lowest input bit already used."""
        level, address = _asked(self.walk(sid, path, ssid, iova))
        if level not in self.geometry:
            moving = []
            for bit in range(below):
                other = self.walk(sid, path, ssid, iova ^ 1 << bit).request
                if other is not None and other.address != address:
                    moving.append(bit)
            self.geometry[level] = (moving[0], len(moving)) if moving else (below, 0)
        shift, bits = self.geometry[level]
        index = iova >> shift & ((1 << bits) - 1)
        base = address - index * 8
        if (base, level) in self.visited:
            return
        self.visited.add((base, level))
        self.add_array(base, 1 << bits, 8)
        if level == 3:
            return
        for first, end, data in _entries(self.smmu.memory, base, 1 << bits, 8, None):
            number = int.from_bytes(data or bytes(8), "big" if swap else "little")
            if data is None or number & _TABLE != _TABLE:
                continue
            for entry in range(first, end):
                inner = iova ^ (index ^ entry) << shift
                answers = (*path, data)
                if self.walk(sid, answers, ssid, inner).request is not None:
                    self.add_table(sid, answers, ssid, inner, shift, swap)


def pages(smmu: Smmu, masked: Mapping[str, int] | None = None) -> list[int]:
    """Return the addresses of all pages that hold what the registers lead to.

    These are the stream table, tables of context descriptors and stage-1 tables; pages of zeros
    in arrays are left out.

    Parameters
    ----------
    smmu : Smmu
    masked : mapping, optional
        Features that the SMMU of these tables has and this version does not model.

    Raises
    ------
    ValueError
        A table is larger than 1 GiB, or an STE or CD asks for a feature of `masked`.
    """
    smmu = _enabled(smmu)
    masked = masked or {}
    found = _Pages(smmu)
    table = stream_table(smmu)
    if table is None:
        return []
    entry = _POINTER if table.two_level else _ENTRY
    found.add_array(table.base, 1 << table.log2size - (table.split or 0), entry)
    done: set[tuple[bytes, bytes]] = set()
    for run in _streams(smmu, None):
        if run.ste is None or not run.ste.strip(b"\0"):
            continue
        found.add(run.address or 0, (run.last - run.first + 1) * _ENTRY)
        _refuse(run, unmodelled(run.ste, None, masked))
        for context in contexts(smmu, run):
            if context.cd is None or not context.cd.strip(b"\0"):
                continue
            _refuse(run, unmodelled(run.ste, context.cd, masked))
            number = (context.last or 0) - (context.first or 0) + 1
            found.add(context.address or 0, number * _ENTRY)
            if len(context.path) > len(run.path) + 1:
                walk = _ask(smmu, run.first, context.path[:-1], ssid=(context.first or 0) | 1)
                found.add(_address(walk) or 0, _POINTER)
            if (run.ste, context.cd) not in done:
                done.add((run.ste, context.cd))
                found.add_tables(
                    run.first,
                    (*context.path, context.cd),
                    context.first,
                    bool(layout.unpack("CD", context.cd)["ENDI"]),
                )
    return sorted(found.found)


def _refuse(run: Run, feature: str | None) -> None:
    if feature:
        raise ValueError(
            f"stream {run.first:#x} uses {feature}, which this version does not "
            "model: name the pages to write"
        )
