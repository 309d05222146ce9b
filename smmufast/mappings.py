"""What a stream reaches: its mappings, asked of the engine address by address.

Not architectural.  Where nothing is mapped, the descriptor at which the walk ended says how much
that is; every other fact is what a translation answers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from smmufast import layout
from smmufast._arguments import integer, must_be
from smmufast._device.smmu import NO_SUBSTREAM, Result, Smmu
from smmufast.faults import Perm

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["LOOKS", "MappedRange", "Mappings", "mappings"]

LOOKS = 1 << 20
"""Translations that one call may ask for."""
_END = 1 << 64
_TG0 = {0: 12, 1: 16, 2: 14}
_TG1 = {1: 14, 2: 12, 3: 16}
_IN = 2  # CLASS of a fault of the input address
_SMALL = 1 << 16  # bytes of a page
_MANY = 512  # pages that are looked at together
_ACCESSES: tuple[dict[str, bool], ...] = tuple(
    {"priv": priv, **more} for more in ({}, {"write": True}, {"instr": True})
    for priv in (False, True)
)  # fmt: skip


class MappedRange(NamedTuple):
    """Addresses one after another that are mapped alike.

    `size` bytes from `iova` on go to `pa`, with the same permissions and memory type; `stage`: 0
    bypass, 1, 2, or 3 for both.
    """

    iova: int
    pa: int
    size: int
    perm: Perm
    memory_type: str | None
    stage: int

    @property
    def end(self) -> int:
        """The first address behind it; 2^64 behind the last one."""
        return self.iova + self.size

    def __str__(self) -> str:
        kind = "" if self.memory_type is None else f"  {self.memory_type}"
        return f"{self.iova:#x}-{self.end - 1:#x} to {self.pa:#x}  {self.perm.name or 'none'}{kind}"


@dataclass
class Mappings(Sequence[MappedRange]):
    """The mappings of a stream, ascending.

    Attributes
    ----------
    rows : list of MappedRange
    stopped : int or None
        Where the search ended since it had asked for `LOOKS` translations; None if it is whole.
    """

    rows: list[MappedRange] = field(default_factory=list)
    stopped: int | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[MappedRange]:
        return iter(self.rows)

    def near(self, iova: int) -> tuple[MappedRange | None, MappedRange | None]:
        """Return the last mapping that begins at or below an address, and the first one above."""
        i = bisect_right(self.rows, iova, key=lambda row: row.iova)
        return self.rows[i - 1] if i else None, self.rows[i] if i < len(self.rows) else None

    def array(self) -> NDArray[np.void]:
        """Return rows of ``iova``, ``pa``, ``size`` (uint64), ``perm`` and ``stage`` (uint8)."""
        kinds = [("iova", "<u8"), ("pa", "<u8"), ("size", "<u8"), ("perm", "u1"), ("stage", "u1")]
        rows = [(r.iova, r.pa, r.size, int(r.perm), r.stage) for r in self.rows]
        return np.array(rows, kinds)

    def _repr_html_(self) -> str:
        from smmufast._html import entries

        return entries("Mappings", MappedRange._fields, self.rows, len(self.rows))


def mappings(
    smmu: Smmu, sid: int, ssid: int | None = None, *, start: int = 0, stop: int = _END
) -> Mappings:
    """Return what a stream, or one of its substreams, reaches.

    Tables are read as they are in memory; caches, and what the SMMU records, stay as they are.
    Pages that permit no access at all are left out, as are those that the hardware could not
    translate.

    Parameters
    ----------
    smmu : Smmu
    sid : int
    ssid : int, optional
        SubstreamID (PASID).
    start, stop : int
        Addresses from `start` on and below `stop`.

    Raises
    ------
    ValueError
        The stream or the substream has no configuration: the message has the reason.
    """
    from smmufast.streams import bare

    start = integer("start", start, _END - 1)
    stop = integer("stop", stop, _END)
    if stop < start:
        raise ValueError(must_be("stop", f"{start:#x} or more", stop))
    return _Search(bare(smmu), sid, ssid).run(start, stop)


class _Search:
    """A search under way."""

    def __init__(self, smmu: Smmu, sid: int, ssid: int | None) -> None:
        """Find the context of the stream, and which addresses it translates."""
        self.smmu = smmu
        self.sid = sid
        self.ssid = ssid
        self.left = LOOKS
        self.found = Mappings()
        first = self._ask(0, trace=True)
        got = {fetch.kind: fetch.data for fetch in first.fetches or () if fetch.data is not None}
        self.ste = layout.unpack("STE", got["STE"]) if "STE" in got else None
        self.cd = layout.unpack("CD", got["CD"]) if "CD" in got else None
        configuration = first.fault is not None and not any(
            fetch.kind in ("TT", "S2TT") for fetch in first.fetches or ()
        )
        fault = first.fault
        if configuration and fault and fault.name not in ("F_TRANSLATION", "F_ADDR_SIZE"):
            why = "" if first.why is None else f": {first.why.sentence}"
            raise ValueError(f"stream {sid:#x}: {fault.name}{why}")
        if first.action in ("bypass", "disabled"):
            self.ranges = [(0, 1 << smmu.features.oas_bits)]
        elif first.fault is None and first.action != "ok":
            raise ValueError(f"stream {sid:#x}: its transactions end as {first.action}")
        else:
            self.ranges = list(self._halves())

    def _ask(self, iova: int, **access: Any) -> Result:
        self.left -= 1
        return self.smmu.translate(self.sid, iova, ssid=self.ssid, peek=True, **access)

    def _halves(self) -> Iterator[tuple[int, int]]:
        """Yield the input ranges: first address, and the one behind the last."""
        if self.cd is None:
            size = 64 if self.ste is None else 64 - self.ste["S2T0SZ"]
            yield 0, 1 << size
            return
        if not self.cd["EPD0"]:
            yield 0, 1 << 64 - self.cd["T0SZ"]
        if not self.cd["EPD1"]:
            yield _END - (1 << 64 - self.cd["T1SZ"]), _END

    def run(self, start: int, stop: int) -> Mappings:
        """Look at every range, page by page and hole by hole."""
        for first, end in self.ranges:
            at = max(first, start)
            while at < min(end, stop):
                if self.left < len(_ACCESSES) + 2:
                    self.found.stopped = at
                    return self.found
                at = self._next(at, first, min(end, stop))
        return self.found

    def _next(self, at: int, first: int, end: int) -> int:
        """Take what is at an address; the first address behind it."""
        result = self._ask(at, priv=True)
        if result.action in ("bypass", "disabled"):
            self._add(at, result, end)
            return end
        if result.fault is not None and result.fault.name == "F_PERMISSION":
            others = (self._ask(at, **access) for access in _ACCESSES)
            result = next((other for other in others if other.action == "ok"), result)
        if result.action == "ok":
            behind = at - at % (result.page_size or 1) + (result.page_size or 1)
            self._add(at, result, min(behind, end))
            return behind
        hole = self._hole(self._ask(at, priv=True, trace=True), at)
        if hole == 0:
            return end
        behind = at - at % hole + hole
        return self._skip(behind, end) if hole <= _SMALL else behind

    def _skip(self, at: int, end: int) -> int:
        """The first page from an address on that is mapped, or the one `_MANY` on."""
        page = 1 << self._granule(at)
        if self.ste is not None and self.ste["Config"] & 2:
            page = min(page, 1 << _TG0[self.ste["S2TG"]])
        count = min(_MANY, -(-(end - at) // page))
        if count <= 0:
            return at
        self.left -= 1
        iova = np.uint64(at) + np.arange(count, dtype=np.uint64) * np.uint64(page)
        ssid = NO_SUBSTREAM if self.ssid is None else self.ssid
        found = self.smmu.translate_batch(
            self.sid, iova, ssid=ssid, priv=True, columns=("fault",), peek=True
        )
        faults = found["fault"].tolist()
        mapped = (i for i, fault in enumerate(faults) if fault != layout.Event.F_TRANSLATION)
        return at + next(mapped, count) * page

    def _add(self, at: int, result: Result, end: int) -> None:
        """Add a page, to the mapping before it if that goes on."""
        rows = self.found.rows
        page = MappedRange(
            at, result.pa or 0, end - at, result.perm, result.memory_type, result.stage
        )  # fmt: skip
        if rows:
            last = rows[-1]
            if last.end == at and last.pa + last.size == page.pa and last[3:] == page[3:]:
                rows[-1] = last._replace(size=last.size + page.size)
                return
        rows.append(page)

    def _hole(self, result: Result, at: int) -> int:
        """How many bytes the descriptor covers at which a walk ended; 0: all there are.

        Where stage 2 kept a descriptor of stage 1 from being read, that is the descriptor: others
        of its table may lie in a page that is mapped.
        """
        fetches = list(result.fetches or ())
        last = fetches[-1].kind if fetches else ""
        levels = [fetch.level or 0 for fetch in fetches if fetch.kind == "TT"]
        if last not in ("TT", "S2TT"):
            return 0
        second = 0
        if last == "S2TT":
            second = _covers(fetches[-1].level or 0, _TG0[(self.ste or {}).get("S2TG", 0)])
        if self.cd is None:
            return second
        granule = self._granule(at)
        if last == "S2TT" and (result.fault is None or result.fault.fields["CLASS"] != _IN):
            below = levels[-1] + 1 if levels else self._first_level(at, granule)
            return _covers(below, granule)
        mine = _covers(levels[-1], granule)
        return min(mine, second) if second else mine

    def _upper(self, at: int) -> bool:
        return bool(at >> 63 and self.cd is not None and not self.cd["EPD1"])

    def _granule(self, at: int) -> int:
        """lg2 of the granule of stage 1, in the half of an address."""
        cd = self.cd or {}
        return _TG1[cd["TG1"]] if self._upper(at) else _TG0[cd.get("TG0", 0)]

    def _first_level(self, at: int, granule: int) -> int:
        """The level of the first table of stage 1."""
        bits = 64 - (self.cd or {})["T1SZ" if self._upper(at) else "T0SZ"]
        return 4 + (granule - bits) // (granule - 3)


def _covers(level: int, granule: int) -> int:
    """How many bytes a descriptor of a level translates."""
    return 1 << granule + (3 - level) * (granule - 3)
