"""What a stream table leads to: its entries, their context descriptors, and the pages of it all.

Not architectural: where an entry lies is asked of the core.  A walk that is started names its
first fetch, and given an answer its next one; so how an address changes with a bit of the
StreamID, the SubstreamID or the input address tells bases, splits and sizes.  This file knows the
sizes of records, and which descriptors may name a table.

The tables of a nested stream lie at IPAs.  The core is asked for them with the stream's STE
changed to stage 1 alone, so that it names IPAs, and for the tables of stage 2 with it changed to
stage 2 alone; where stage 2 puts a page it is asked with the page as the context descriptor's.

What tables hold decides how much there is to look at, and a few bytes can say that there is much:
level-1 descriptors that all lead to one table, tables that lead to themselves.  Equal neighbours
are looked at once, and a `Budget` bounds the rest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from smmufast import layout
from smmufast._arguments import integer
from smmufast._device.smmu import Smmu, Walk
from smmufast._engine.memory import Memory
from smmufast.faults import ExternalAbort

__all__ = [
    "Budget",
    "ContextRun",
    "Run",
    "StreamTable",
    "bare",
    "contexts",
    "pages",
    "stream_table",
    "streams",
]

PAGE = 4096
PIECE = 1 << 20
LARGEST = 1 << 30
"""Bytes of one table that are looked through when no pages are named."""

MOST = 1 << 18
"""Tables that are looked into, unless told otherwise."""
MOST_PAGES = 1 << 18
"""Pages that `pages` finds at most, as many as a capture holds (1 GiB)."""

_ENTRY = layout.RECORDS["STE"].bytes
_POINTER = layout.RECORDS["L1STD"].bytes
_TABLE = layout.pack("PTE_S1_TABLE", Valid=1, Type=1)
_NESTED = 0b111
_STAGE2 = ("S2TT", "S2TT update")


class Budget:
    """How many tables may still be looked into: by `streams`, and by `contexts` of its runs.

    Parameters
    ----------
    tables : int
    """

    def __init__(self, tables: int = MOST) -> None:
        """Begin with so many."""
        self.tables = self.left = integer("tables", tables)

    def spend(self) -> bool:
        """Count a table, and return whether it may be looked into."""
        self.left -= 1
        return self.left >= 0

    @property
    def problem(self) -> str:
        """What stands in the place of the tables that are left out."""
        return f"left out: {self.tables} tables were looked into"


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

    `cd` is the descriptor in memory order, at the physical `address` for the first; None where
    there is none, and `problem` says why.
    """

    first: int | None
    last: int | None
    address: int | None
    cd: bytes | None
    problem: str | None
    path: tuple[bytes, ...]


# --- asking the core ------------------------------------------------------------------------------


def _ask(smmu: Smmu, sid: int, answers: Sequence[bytes], **access: Any) -> Walk:
    """Start a walk and answer its first fetches."""
    walk = smmu.start_walk(sid, access.pop("iova", 0), **access)
    for answer in answers:
        if walk.done:
            break
        walk.supply(answer)
    return walk


def _ask_through(smmu: Smmu, sid: int, answers: Sequence[bytes], **access: Any) -> Walk:
    """Start a walk and answer its first fetches, and from memory those of stage 2."""
    walk = smmu.start_walk(sid, access.pop("iova", 0), **access)
    left = list(answers)
    while (request := walk.request) is not None:
        if request.kind in _STAGE2:
            try:
                walk.supply(smmu.memory.read(request.address, request.size))
            except ExternalAbort:
                walk.supply(None)
        elif left:
            walk.supply(left.pop(0))
        else:
            break
    return walk


def _with(ste: bytes, **fields: int) -> bytes:
    """Return an STE with other values in some fields."""
    word = int.from_bytes(ste, "little")
    for name, value in fields.items():
        field = layout.STE.field(name)
        word &= ~(field.mask << 64 * field.dword)
        word |= layout.pack("STE", **{name: value})
    return layout.to_bytes("STE", word)


class _Guest:
    """Memory as stage 1 of a nested stream sees it; its addresses are IPAs.

    `path` are the answers on the way to the STE.
    """

    def __init__(self, smmu: Smmu, sid: int, path: Sequence[bytes], ste: bytes) -> None:
        self.smmu = smmu
        self.sid = sid
        self.path = path
        self.ste = ste
        self.memory = smmu.memory
        self.pages: dict[int, int | str] = {}

    def page(self, ipa: int) -> int | str:
        """Return the physical address of the page that holds an IPA, or why there is none."""
        ipa &= -PAGE
        if ipa not in self.pages:
            ste = _with(self.ste, S1ContextPtr=ipa, S1CDMax=0)
            walk = _ask_through(self.smmu, self.sid, (*self.path, ste))
            address = _address(walk)
            self.pages[ipa] = _told(walk) if address is None else address
        return self.pages[ipa]


def _physical(memory: Memory | _Guest, address: int) -> int | None:
    if isinstance(memory, _Guest):
        page = memory.page(address)
        return None if isinstance(page, str) else page + address % PAGE
    return address


def _refused(memory: Memory | _Guest, address: int, problem: str) -> str:
    """Return why something at an address cannot be read: stage 2 refuses, or the problem."""
    page = memory.page(address) if isinstance(memory, _Guest) else None
    if isinstance(page, str):
        return f"stage 2 refuses its IPA {address:#x} ({page})"
    return problem


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


def _told(walk: Walk, **fields: int) -> str:
    """Return how a walk was refused, and why."""
    why = None if walk.result is None else walk.result.why
    return _reason(walk) if why is None else f"{_reason(walk)}: {why.sentence(fields)}"


def bare(smmu: Smmu, cr0: int | None = None) -> Smmu:
    """Return an SMMU over the same memory with the same registers, but no queues and no caches.

    Nobody sees the events of what it translates, nor its stalls.
    """
    return Smmu(
        smmu.memory,
        smmu.features,
        strtab_base=smmu.strtab_base,
        strtab_base_cfg=smmu.strtab_base_cfg,
        cr0=smmu.cr0 if cr0 is None else cr0,
        cr2=smmu.cr2,
        gbpa=smmu.gbpa,
        ignore_s2ptw=smmu.ignore_s2ptw,
    )


def _enabled(smmu: Smmu) -> Smmu:
    """Return a bare SMMU with SMMUEN=1, without which nothing is looked up."""
    return bare(smmu, smmu.cr0 | layout.pack("CR0", SMMUEN=1))


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
        raise ValueError(f"the table at {base:#x} has {backed:#x} bytes; {_NAME}")
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
    """Yield pieces of a table: where it begins and ends, and its bytes, None for zeros."""
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


def _parts(
    memory: Memory | _Guest, base: int, count: int, entry: int
) -> Iterator[tuple[int, int, int | None]]:
    """Yield the parts of an array that lie together: first index, end index, physical address.

    The address is None where stage 2 refuses.
    """
    if not isinstance(memory, _Guest):
        yield 0, count, base
        return
    first = 0
    while first < count:
        at = base + first * entry
        end = min(count, first + (PAGE - at % PAGE) // entry)
        yield first, end, _physical(memory, at)
        first = end


def _entries(
    memory: Memory | _Guest, base: int, count: int, entry: int, present: Sequence[int] | None
) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield runs of equal entries of an array: first index, end index, contents or None."""
    if isinstance(memory, _Guest):
        for first, end, address in _parts(memory, base, count, entry):
            if address is None:
                yield first, end, None
                continue
            for i, j, data in _entries(memory.memory, address, end - first, entry, present):
                yield first + i, first + j, data
        return
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


def streams(
    smmu: Smmu, present: Sequence[int] | None = None, budget: Budget | None = None
) -> Iterator[Run]:
    """Yield the entries of the stream table, runs of equal ones as one.

    Parameters
    ----------
    smmu : Smmu
    present : sequence of int, optional
        Addresses of the pages that may hold something, ascending; all other memory is taken to be
        zero.  Without it every byte of the table is read.
    budget : Budget, optional
        By default one of MOST tables.  When it is spent, the StreamIDs behind are one last run,
        whose `problem` says that they are left out.

    Raises
    ------
    ValueError
        The table is larger than 1 GiB and `present` is not given.
    """
    last: Run | None = None
    for run in _streams(_enabled(smmu), present, Budget() if budget is None else budget):
        if last is None:
            last = run
        elif (last.ste, last.problem) == (run.ste, run.problem) and last.last + 1 == run.first:
            last = last._replace(last=run.last)
        else:
            yield last
            last = run
    if last is not None:
        yield last


def _streams(
    smmu: Smmu, present: Sequence[int] | None, budget: Budget, once: bool = False
) -> Iterator[Run]:
    """Yield the runs of `streams`, each of which lies together in memory.

    With `once` a level-2 table to which neighbouring descriptors lead is yielded for the first
    of them alone.
    """
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
            problem = _told(walk, **layout.unpack("L1STD", data))
            yield Run(sid, (end << table.split) - 1, None, None, problem, (data,))
            continue
        if not budget.spend():
            last = (1 << table.log2size) - 1
            yield Run(sid, last, None, None, budget.problem, ())
            return
        _, address = _asked(walk)
        used = _used(smmu, sid, data, table.split)
        runs = list(_array(smmu, address, sid, 1 << used, (data,), present))
        if used < table.split:
            problem = f"beyond the level-2 table of {1 << used} entries (C_BAD_STREAMID)"
            over = sid + (1 << table.split) - 1
            runs.append(Run(sid + (1 << used), over, None, None, problem, (data,)))
        last = (end << table.split) - 1
        if len(runs) == 1:  # the table is the same throughout, and so are its neighbours
            yield runs[0]._replace(last=last)
            continue
        for more in range(0, 1 if once else last - sid + 1, 1 << table.split):
            if more and not budget.spend():
                last = (1 << table.log2size) - 1
                yield Run(sid + more, last, None, None, budget.problem, ())
                return
            for run in runs:
                yield run._replace(first=run.first + more, last=run.last + more)


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
    """Yield the runs of an array of stream table entries."""
    for first, end, data in _entries(smmu.memory, base, count, _ENTRY, present):
        problem = None if data is not None else "the entry cannot be read (F_STE_FETCH)"
        yield Run(sid + first, sid + end - 1, base + first * _ENTRY, data, problem, path)


# --- context descriptors --------------------------------------------------------------------------


def contexts(
    smmu: Smmu, run: Run, present: Sequence[int] | None = None, budget: Budget | None = None
) -> Iterator[ContextRun]:
    """Yield the context descriptors that the STE of a run leads to.

    `present` and `budget` are as in `streams`.
    """
    last: ContextRun | None = None
    for context in _contexts(smmu, run, present, Budget() if budget is None else budget):
        if last is None:
            last = context
        elif (last.cd, last.problem) == (context.cd, context.problem) and (
            context.first == (last.last or 0) + 1
        ):
            last = last._replace(last=context.last)
        else:
            yield last
            last = context
    if last is not None:
        yield last


def _stage1(run: Run) -> tuple[bytes, ...]:
    """Return the answers to the STE of a run; a nested one as stage 1 alone."""
    ste = run.ste or b""
    if layout.unpack("STE", ste)["Config"] == _NESTED:
        ste = _with(ste, Config=0b101, STRW=0, EATS=0)
    return (*run.path, ste)


def _memory_of(smmu: Smmu, run: Run) -> Memory | _Guest:
    """Return the memory that stage 1 of a run's streams reads."""
    if run.ste is not None and layout.unpack("STE", run.ste)["Config"] == _NESTED:
        return _Guest(smmu, run.first, run.path, run.ste)
    return smmu.memory


def _accepted(smmu: Smmu, run: Run) -> bool:
    """Whether the STE of a run is legal, and does not abort."""
    walk = _ask_through(smmu, run.first, (*run.path, run.ste or b""))
    return not (walk.done and _reason(walk) in ("C_BAD_STE", "abort"))


def _context_table(smmu: Smmu, run: Run) -> tuple[int, int, int | None] | None:
    """Return where a run's table of context descriptors lies, None if it has none.

    Its base, log2 of its substreams, and of those in a leaf, None for a linear table.
    """
    stage1 = _stage1(run)

    def ask(ssid: int | None) -> Walk:
        return _ask(smmu, run.first, stage1, ssid=ssid)

    if ask(1).done:
        return None
    request = ask(None).request or ask(0).request
    if request is None:
        return None
    log2 = _lowest(20, lambda k: ask(1 << k).done)
    leaf = None
    if request.kind == "L1CD":
        leaf = _lowest(log2, lambda k: _address(ask(1 << k)) != request.address)
    return request.address, log2, leaf


def _contexts(
    smmu: Smmu, run: Run, present: Sequence[int] | None, budget: Budget, once: bool = False
) -> Iterator[ContextRun]:
    """Yield the runs of `contexts`, each of which lies together in memory; `once` as there."""
    if run.ste is None:
        return
    smmu = _enabled(smmu)
    if not _accepted(smmu, run):
        return
    memory = _memory_of(smmu, run)
    path = (*run.path, run.ste)
    stage1 = _stage1(run)

    def ask(ssid: int | None, *more: bytes) -> Walk:
        return _ask(smmu, run.first, (*stage1, *more), ssid=ssid)

    first = ask(None)
    if first.request is not None and first.request.kind in _STAGE2:
        return  # stage 2 alone
    if first.done and _reason(first) == "C_BAD_STE":
        # a pointer that is too large for stage 1 alone is too large for stage 2
        reason = _told(_ask_through(smmu, run.first, path))
        problem = f"stage 2 refuses the IPA of the context descriptor ({reason})"
        yield ContextRun(None, None, None, None, problem, path)
        return
    table = _context_table(smmu, run)
    if table is None:
        if first.done:
            return
        _, address = _asked(first)
        place = _physical(memory, address)
        for _, _, cd in _entries(memory, address, 1, _ENTRY, None):
            problem = "the context descriptor cannot be read (F_CD_FETCH)"
            why = None if cd is not None else _refused(memory, address, problem)
            yield ContextRun(None, None, place, cd, why, path)
        return
    base, log2, leaf = table
    if leaf is None:
        yield from _table(memory, base, 0, 1 << log2, path, present)
        return
    for i, j, data in _entries(memory, base, 1 << log2 - leaf, _POINTER, present):
        span = (i << leaf, (j << leaf) - 1)
        if data is None:
            problem = "the level-1 descriptor cannot be read (F_CD_FETCH)"
            problem = _refused(memory, base + i * _POINTER, problem)
            yield ContextRun(*span, None, None, problem, path)
            continue
        # ask for a SubstreamID other than 0, which S1DSS may refuse
        walk = ask(i << leaf | 1, data)
        if walk.done:
            walk = _ask_through(smmu, run.first, (*path, data), ssid=i << leaf | 1)
            problem = _told(walk, **layout.unpack("L1CD", data))
            yield ContextRun(*span, None, None, problem, (*path, data))
            continue
        if not budget.spend():
            yield ContextRun(span[0], (1 << log2) - 1, None, None, budget.problem, path)
            return
        at = _asked(walk)[1] - _ENTRY
        runs = list(_table(memory, at, span[0], 1 << leaf, (*path, data), present))
        if len(runs) == 1:  # as with streams
            yield runs[0]._replace(last=span[1])
            continue
        for more in range(0, 1 if once else span[1] - span[0] + 1, 1 << leaf):
            if more and not budget.spend():
                left = (span[0] + more, (1 << log2) - 1)
                yield ContextRun(*left, None, None, budget.problem, path)
                return
            for one in runs:
                start = (one.first or 0) + more
                yield one._replace(first=start, last=(one.last or 0) + more)


def _table(
    memory: Memory | _Guest,
    base: int,
    ssid: int,
    count: int,
    path: tuple[bytes, ...],
    present: Sequence[int] | None,
) -> Iterator[ContextRun]:
    """Yield the context descriptors of an array."""
    for i, j, data in _entries(memory, base, count, _ENTRY, present):
        address = base + i * _ENTRY
        problem = None
        if data is None:
            problem = _refused(memory, address, "it cannot be read (F_CD_FETCH)")
        yield ContextRun(ssid + i, ssid + j - 1, _physical(memory, address), data, problem, path)


# --- pages ----------------------------------------------------------------------------------------


def unmodelled(ste: bytes, cd: bytes | None, masked: Mapping[str, int]) -> str | None:
    """Return what an STE and a CD ask for that the recorded SMMU has and this version has not.

    `masked` are the features taken away, as `Configuration.masked`; None if nothing is asked for.
    """
    fields = layout.unpack("STE", ste)
    if not fields["V"] or not fields["Config"] & 4:
        return None
    second = fields if fields["Config"] & 2 else None
    first = None
    if fields["Config"] & 1 and cd is not None:
        first = layout.unpack("CD", cd)
    for asks, name, value in ((first, "AA64", 0), (second, "S2AA64", 0)):
        if asks is not None and asks[name] == value:
            if "ttf" in masked:
                return "VMSAv8-32 tables"
            if "d128" in masked:
                return "VMSAv9-128 tables"
    for feature, asks, name, what in (
        ("s1pi", first, "PIE", "indirect permissions"),
        ("s2pi", second, "S2PIE", "indirect permissions"),
        ("s2po", second, "S2POE", "permission overlays"),
        ("aie", first, "AIE", "the extension of attribute indices"),
    ):
        if feature in masked and asks is not None and asks[name]:
            return what
    return None


_NAME = "name the pages to look at"


class _Pages:
    """The pages that tables lie in, and the search for them."""

    def __init__(self, smmu: Smmu) -> None:
        self.smmu = smmu
        self.found: set[int] = set()
        self.budget = Budget()

    def add(self, address: int, size: int) -> None:
        wanted = range(address & -PAGE, address + size, PAGE)
        if len(wanted) <= MOST_PAGES:  # else it is refused below, before it takes memory
            self.found.update(wanted)
        if max(len(wanted), len(self.found)) > MOST_PAGES:
            raise ValueError(f"the tables lie in more than {MOST_PAGES} pages; {_NAME}")

    def spend(self) -> None:
        if not self.budget.spend():
            raise ValueError(f"there are more than {self.budget.tables} tables; {_NAME}")

    def add_array(self, memory: Memory | _Guest, base: int, count: int, entry: int) -> None:
        """Add the pages of an array that are not zero throughout."""
        for first, end, at in _parts(memory, base, count, entry):
            if at is None:
                continue
            size = (end - first) * entry
            for address, _, data in _pieces(self.smmu.memory, at, size, entry, None):
                for offset in range(-(address % PAGE), len(data or b""), PAGE):
                    if (data or b"")[max(offset, 0) : offset + PAGE].strip(b"\0"):
                        self.add(address + max(offset, 0), 1)

    def add_stage1(self, run: Run, context: ContextRun) -> None:
        """Add the translation tables of a context, of both halves of the address space."""
        cd = context.cd or b""
        answers = (*_stage1(run), *context.path[len(run.path) + 1 :], cd)
        for iova in (0, (1 << 64) - 1):
            # CD 0 may serve transactions without a SubstreamID only (S1DSS)
            for number in (context.first, None):
                request = self.walk(run.first, answers, number, iova).request
                if request is not None and request.kind == "TT":
                    self.start(_memory_of(self.smmu, run), bool(layout.unpack("CD", cd)["ENDI"]))
                    # bit 55 selects the half: the tables are indexed by bits below it
                    self.add_table(run.first, answers, number, iova, 55)
                    break

    def add_stage2(self, run: Run) -> None:
        """Add the stage-2 tables of a run's streams."""
        ste = run.ste or b""
        answers = (*run.path, _with(ste, Config=0b110, EATS=0))
        if self.walk(run.first, answers, None, 0).request is not None:
            self.start(self.smmu.memory, bool(layout.unpack("STE", ste)["S2ENDI"]))
            self.add_table(run.first, answers, None, 0, 64)

    def start(self, memory: Memory | _Guest, swap: bool) -> None:
        """Begin with tables of another context: where they lie, and whether big-endian."""
        self.memory = memory
        self.byteorder: Literal["big", "little"] = "big" if swap else "little"
        self.visited: set[tuple[int, int]] = set()
        self.geometry: dict[int, tuple[int, int]] = {}

    def walk(self, sid: int, path: tuple[bytes, ...], ssid: int | None, iova: int) -> Walk:
        return _ask(self.smmu, sid, path, ssid=ssid, iova=iova, priv=True)

    def add_table(
        self,
        sid: int,
        path: tuple[bytes, ...],
        ssid: int | None,
        iova: int,
        below: int,
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
        self.add_array(self.memory, base, 1 << bits, 8)
        if level == 3:
            return
        for first, end, data in _entries(self.memory, base, 1 << bits, 8, None):
            number = int.from_bytes(data or bytes(8), self.byteorder)
            if data is None or number & _TABLE != _TABLE:
                continue
            for entry in range(first, end):
                inner = iova ^ (index ^ entry) << shift
                self.spend()
                answers = (*path, data)
                if self.walk(sid, answers, ssid, inner).request is not None:
                    self.add_table(sid, answers, ssid, inner, shift)


def pages(smmu: Smmu, masked: Mapping[str, int] | None = None) -> list[int]:
    """Return the addresses of all pages that hold what the registers lead to.

    These are the stream table, tables of context descriptors and the tables of both stages; pages
    of zeros in arrays are left out.

    Parameters
    ----------
    smmu : Smmu
    masked : mapping, optional
        Features that the SMMU of these tables has and this version does not model.

    Raises
    ------
    ValueError
        A table is larger than 1 GiB, there are more than MOST tables or MOST_PAGES pages, or an
        STE or CD asks for a feature of `masked`.
    """
    smmu = _enabled(smmu)
    masked = masked or {}
    found = _Pages(smmu)
    whole = stream_table(smmu)
    if whole is None:
        return []
    entry = _POINTER if whole.two_level else _ENTRY
    count = 1 << whole.log2size - (whole.split or 0)
    found.add_array(smmu.memory, whole.base, count, entry)
    done: set[tuple[bytes, bytes]] = set()
    for run in _streams(smmu, None, found.budget, once=True):
        if run.problem == found.budget.problem:
            found.spend()
        if run.ste is None or not run.ste.strip(b"\0"):
            continue
        found.add(run.address or 0, _bytes_of(run, whole))
        _refuse(run, unmodelled(run.ste, None, masked))
        if layout.unpack("STE", run.ste)["Config"] & 6 == 6 and (run.ste, b"") not in done:
            done.add((run.ste, b""))
            if _accepted(smmu, run):
                found.add_stage2(run)
        table = _context_table(smmu, run) if _accepted(smmu, run) else None
        if table is not None and table[2] is not None:
            found.add_array(_memory_of(smmu, run), table[0], 1 << table[1] - table[2], _POINTER)
        for context in _contexts(smmu, run, None, found.budget, once=True):
            if context.problem == found.budget.problem:
                found.spend()
            if context.cd is None or not context.cd.strip(b"\0"):
                continue
            _refuse(run, unmodelled(run.ste, context.cd, masked))
            number = (context.last or 0) - (context.first or 0) + 1
            leaf = 1 << 20 if table is None or table[2] is None else 1 << table[2]
            found.add(context.address or 0, min(number, leaf) * _ENTRY)
            if (run.ste, context.cd) not in done:
                done.add((run.ste, context.cd))
                found.add_stage1(run, context)
    return sorted(found.found)


def _bytes_of(run: Run, table: StreamTable) -> int:
    """Return how many bytes the entries of a run lie in, which neighbouring tables may share."""
    entries = run.last - run.first + 1
    return (entries if table.split is None else min(entries, 1 << table.split)) * _ENTRY


def _refuse(run: Run, feature: str | None) -> None:
    if feature:
        raise ValueError(
            f"stream {run.first:#x} uses {feature}, which this version does not "
            "model: name the pages to write"
        )
