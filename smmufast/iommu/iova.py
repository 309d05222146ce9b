"""IOVAs for drivers that do not choose their own: an allocator, and mappings made through it.

Not architectural: addresses are handed out from the top down, as Linux does, so that the small
ones stay free for devices that cannot reach the others.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right, insort
from typing import TYPE_CHECKING, Final, Protocol

from smmufast.errors import InvalidArgument, NoSpace, integer

if TYPE_CHECKING:
    from collections.abc import Iterator

READ_WRITE: Final = 3


class IovaAllocator:
    """Hands out ranges of IOVAs between two addresses, the highest that fits first.

    `len()` is the number of allocated ranges, and iteration is over them: (iova, size),
    ascending.  Calls are safe between threads.  An allocation searches sorted lists of holes, one
    list for each size up to 32 granules and for each power of two above; it looks at several holes
    of a list only while they are misaligned, or large and a little too small.

    Parameters
    ----------
    first, last : int
        The range, both included: whole granules.
    granule : int
        Smallest page size, a power of two; sizes are rounded up to it.
    align_limit : int, optional
        The most that a range is aligned to by itself, a power of two.  Default: its size.

    Raises
    ------
    InvalidArgument
        `granule` or `align_limit` is no power of two, or the range is not of whole granules.

    Examples
    --------
    >>> from smmufast.iommu.iova import IovaAllocator
    >>> iovas = IovaAllocator(0x1000, 0xffff_ffff, 4096)
    >>> hex(iovas.alloc(0x3000))    # aligned to 0x4000
    '0xffffc000'
    >>> hex(iovas.alloc(0x1000, limit=0xff_ffff))
    '0xfff000'
    >>> iovas.free(0xffff_c000, 0x3000)
    """

    def __init__(
        self, first: int, last: int, granule: int = 4096, *, align_limit: int | None = None
    ) -> None:
        """Allocate from `first` to `last`, in units of the granule."""
        for name, value in (("granule", granule), ("align_limit", align_limit)):
            if value is not None and (integer(name, value) < 1 or value & (value - 1)):
                raise InvalidArgument(name, value, "a power of two")
        first, last = integer("first", first), integer("last", last)
        if first < 0 or first % granule:
            raise InvalidArgument("first", first, f"a multiple of {granule:#x}")
        if last < first or (last + 1) % granule:
            raise InvalidArgument("last", last, f"one less than a multiple of {granule:#x}")
        self.first = first
        self.last = last
        self.granule = granule
        self.align_limit = align_limit
        self._lock = threading.Lock()
        self._taken: dict[int, int] = {}  # iova: size
        self._reserved: list[tuple[int, int]] = []  # first, last: ascending, with gaps between
        # The holes: first address to last, the first addresses sorted, and these again by size.
        self._holes: dict[int, int] = {}
        self._starts: list[int] = []
        self._by_size: list[list[int]] = [[] for _ in range(self._size_class(last - first + 1) + 1)]
        self._open(first, last)

    def alloc(self, size: int, *, align: int | None = None, limit: int | None = None) -> int:
        """Allocate a range.

        Parameters
        ----------
        size : int
            Bytes, rounded up to whole granules.
        align : int, optional
            Alignment, a power of two.  Default: the size rounded up to a power of two, at most
            `align_limit`.
        limit : int, optional
            Last address that the device reaches, such as ``2**32 - 1``.

        Returns
        -------
        int
            The highest address that fits.

        Raises
        ------
        NoSpace
            No hole is large enough.
        InvalidArgument
            `size` is not positive, or `align` is no power of two.
        """
        size = self._whole(size)
        if align is None:
            align = 1 << (size - 1).bit_length()
            if self.align_limit is not None:
                align = min(align, self.align_limit)
        elif integer("align", align) < 1 or align & (align - 1):
            raise InvalidArgument("align", align, "a power of two")
        align = max(align, self.granule)
        limit = self.last if limit is None else min(integer("limit", limit), self.last)
        with self._lock:
            iova = self._highest(size, align, limit)
            if iova < 0:
                text = f"size: no {size:#x} bytes aligned to {align:#x} are free up to {limit:#x}"
                raise NoSpace("size", size, text=text)
            self._cut(iova, iova + size - 1)
            self._taken[iova] = size
            return iova

    def free(self, iova: int, size: int) -> None:
        """Give a range back, whole.

        Raises
        ------
        InvalidArgument
            No range of this size was allocated at this address.
        """
        size = self._whole(size)
        with self._lock:
            if self._taken.get(iova) != size:
                text = f"iova: no range of {size:#x} bytes was allocated at {iova:#x}"
                raise InvalidArgument("iova", iova, text=text)
            del self._taken[iova]
            first, last = iova, iova + size - 1
            place = bisect_left(self._starts, first)
            if place < len(self._starts) and self._starts[place] == last + 1:
                last = self._close(self._starts[place])
            if place and self._holes[self._starts[place - 1]] == first - 1:
                first = self._starts[place - 1]
                self._close(first)
            self._open(first, last)

    def reserve(self, first: int, last: int) -> None:
        """Withhold addresses for ever, such as those of a doorbell.

        What is reserved already may be part of it, as in Linux's reserve_iova: firmware's regions
        overlap, and two devices have one doorbell.

        Parameters
        ----------
        first, last : int
            The range, both included; granules that it touches are withheld whole.

        Raises
        ------
        InvalidArgument
            The range is empty, or part of it is outside or allocated.
        """
        if integer("last", last) < integer("first", first):
            raise InvalidArgument("last", last, f"{first:#x} or more")
        begin = first & -self.granule
        end = last | (self.granule - 1)
        with self._lock:
            if begin < self.first or end > self.last:
                text = f"first: {first:#x} to {last:#x} is not within {self!r}"
                raise InvalidArgument("first", first, text=text)
            free = self._free_within(begin, end)
            withheld = [
                (max(low, begin), min(high, end))
                for low, high in self._reserved
                if low <= end and high >= begin
            ]
            if sum(high + 1 - low for low, high in free + withheld) != end + 1 - begin:
                text = f"first: part of {first:#x} to {last:#x} is allocated"
                raise InvalidArgument("first", first, text=text)
            for low, high in free:
                self._cut(low, high)
            merged: list[tuple[int, int]] = []
            for low, high in sorted([*self._reserved, (begin, end)]):
                if merged and low <= merged[-1][1] + 1:
                    merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
                else:
                    merged.append((low, high))
            self._reserved = merged

    @property
    def reserved(self) -> list[tuple[int, int]]:
        """What is reserved, as a new list of ranges (first, last), both included, ascending."""
        return list(self._reserved)

    def find(self, iova: int) -> int:
        """Return the size of the range that was allocated at an address, 0 for none."""
        return self._taken.get(iova, 0)

    @property
    def available(self) -> int:
        """How many bytes are free."""
        with self._lock:
            return sum(last + 1 - first for first, last in self._holes.items())

    def __len__(self) -> int:
        """How many ranges are allocated."""
        return len(self._taken)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Iterate over what is allocated now: (iova, size), ascending."""
        with self._lock:
            return iter(sorted(self._taken.items()))

    def __repr__(self) -> str:
        """The range, and how many ranges are allocated."""
        return f"<IovaAllocator {self.first:#x} to {self.last:#x}: {len(self)} ranges>"

    def _whole(self, size: int) -> int:
        if integer("size", size) < 1:
            raise InvalidArgument("size", size, "1 or more")
        return (size + self.granule - 1) & -self.granule

    def _size_class(self, size: int) -> int:
        granules = size // self.granule
        return granules if granules <= 32 else 27 + granules.bit_length()

    def _highest(self, size: int, align: int, limit: int) -> int:
        """The highest address that fits, or -1."""
        place = bisect_right(self._starts, limit) - 1
        if place < 0:
            return -1
        # The only hole that the limit may cut; whatever fits there is above all others.
        top = self._starts[place]
        iova = (min(self._holes[top], limit) + 1 - size) & -align
        if iova >= top:
            return iova
        best = -1
        for starts in self._by_size[self._size_class(size) :]:
            for at in range(bisect_left(starts, top) - 1, -1, -1):
                first = starts[at]
                if first < best:
                    break
                iova = (self._holes[first] + 1 - size) & -align
                if iova >= first:
                    best = iova
                    break
        return best

    def _free_within(self, first: int, last: int) -> list[tuple[int, int]]:
        """The parts of a range that are free, ascending."""
        found = []
        place = max(bisect_right(self._starts, first) - 1, 0)
        while place < len(self._starts) and self._starts[place] <= last:
            low, high = self._starts[place], self._holes[self._starts[place]]
            if high >= first:
                found.append((max(low, first), min(high, last)))
            place += 1
        return found

    def _cut(self, first: int, last: int) -> None:
        """Take addresses out of the hole that holds them."""
        start = self._starts[bisect_right(self._starts, first) - 1]
        end = self._close(start)
        if start < first:
            self._open(start, first - 1)
        if last < end:
            self._open(last + 1, end)

    def _open(self, first: int, last: int) -> None:
        self._holes[first] = last
        insort(self._starts, first)
        insort(self._by_size[self._size_class(last - first + 1)], first)

    def _close(self, first: int) -> int:
        last = self._holes.pop(first)
        for starts in (self._starts, self._by_size[self._size_class(last - first + 1)]):
            del starts[bisect_left(starts, first)]
        return last


class MappedDomain(Protocol):
    """What `DmaMapper` needs of a domain."""

    def map(self, iova: int, pa: int, size: int, prot: int) -> None:
        """Map whole granules."""

    def unmap(self, iova: int, size: int) -> int:
        """Unmap them again; devices reach them no more when it returns."""


class DmaMapper:
    """Maps buffers of any address and size at IOVAs that it chooses.

    Parameters
    ----------
    domain : PagingDomain
        Where; anything with its `map` and `unmap`.
    iovas : IovaAllocator
        Which; of the domain's granule.
    limit : int, optional
        Last address that the device reaches.
    """

    def __init__(
        self, domain: MappedDomain, iovas: IovaAllocator, *, limit: int | None = None
    ) -> None:
        self.domain = domain
        self.iovas = iovas
        self.limit = limit

    def dma_map(self, pa: int, size: int, prot: int = READ_WRITE) -> int:
        """Map a buffer, with the rest of the granules that it touches.

        Parameters
        ----------
        pa, size : int
            The buffer, in bytes.
        prot : int
            As for the domain's `map`.

        Returns
        -------
        int
            Its IOVA, as far into its granule as `pa`.

        Raises
        ------
        NoSpace, InvalidArgument
            As `IovaAllocator.alloc`.
        IommuError
            As the domain's `map`; the IOVA is free again then.
        """
        if integer("size", size) < 1:
            raise InvalidArgument("size", size, "1 or more")
        if integer("pa", pa) < 0:
            raise InvalidArgument("pa", pa, "0 or more")
        offset, length = self._span(pa, size)
        iova = self.iovas.alloc(length, limit=self.limit)
        try:
            self.domain.map(iova, pa - offset, length, prot)
        except BaseException:
            self.iovas.free(iova, length)
            raise
        return iova + offset

    def dma_unmap(self, iova: int, size: int) -> None:
        """Undo `dma_map`; the arguments are its result and its `size`.

        Raises
        ------
        InvalidArgument
            Nothing of this size is mapped there; nothing was unmapped.
        """
        offset, length = self._span(integer("iova", iova), integer("size", size))
        if self.iovas.find(iova - offset) != length:
            text = f"iova: no buffer of {size:#x} bytes is mapped at {iova:#x}"
            raise InvalidArgument("iova", iova, text=text)
        self.domain.unmap(iova - offset, length)
        self.iovas.free(iova - offset, length)

    def _span(self, address: int, size: int) -> tuple[int, int]:
        granule = self.iovas.granule
        offset = address % granule
        return offset, (offset + size + granule - 1) & -granule
