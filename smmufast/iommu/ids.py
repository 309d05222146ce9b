"""ASIDs and VMIDs: numbers that a driver hands out (IHI 0070 5.4 CD.ASID, 5.2 STE.S2VMID).

Which number is handed out is the driver's own choice: the lowest free one, and never 0 (F46).
"""

from __future__ import annotations

from operator import index
from typing import TYPE_CHECKING, Any

from smmufast._driver.pasid import PasidAllocated, PasidAllocator, PasidError, PasidExhausted
from smmufast.errors import Busy, InvalidArgument, NoEntry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import SupportsIndex


class IdSpace:
    """Numbers from 1 to ``2**bits - 1``, the lowest free one first; 0 is never handed out.

    `len()`, `in` and iteration are about the numbers that are taken.  Every call but an iteration
    is one atomic step between Python threads, and its cost depends neither on `bits` nor on how
    many numbers are taken.

    Parameters
    ----------
    bits : int
        Width of the number: 8 or 16 for an ASID or VMID, 1 to 20 are possible.  `narrow` takes
        numbers away again.
    name : str
        What the numbers are called in messages.

    Raises
    ------
    InvalidArgument
        `bits` is not 1 to 20.

    Examples
    --------
    >>> from smmufast.iommu.ids import IdSpace
    >>> asids = IdSpace(16, "asid")
    >>> asids.alloc("a domain"), asids.alloc("another")
    (1, 2)
    >>> asids.find(2)
    'another'
    >>> asids.free(1)
    >>> list(asids)
    [2]
    """

    def __init__(self, bits: int, name: str = "id") -> None:
        if not 1 <= bits <= 20:
            raise InvalidArgument("bits", bits, "1 to 20")
        self.bits = bits
        self.name = name
        self._ids = PasidAllocator(1 << bits)

    def alloc(self, data: object = None) -> int:
        """Take the lowest free number.

        Parameters
        ----------
        data : object, optional
            What `find` shall return for it.

        Raises
        ------
        Busy
            All numbers are taken.
        """
        try:
            return self._ids.alloc(owner=data)
        except PasidExhausted:
            text = f"{self.name}: all of 1 to {self._last} are taken"
            raise Busy(self.name, None, text=text) from None

    def claim(self, number: SupportsIndex, data: object = None) -> None:
        """Take one certain number, such as the ASID that a CPU uses already (F47).

        Raises
        ------
        Busy
            The number is taken.
        InvalidArgument
            It is not 1 to ``2**bits - 1``.
        """
        number = index(number)
        if not 0 < number <= self._last:
            raise InvalidArgument(self.name, number, f"1 to {self._last}")
        try:
            self._ids.alloc(number, number, data)
        except PasidExhausted:
            raise Busy(self.name, number, text=f"{self.name} {number} is taken") from None

    @property
    def _last(self) -> int:
        return (1 << self.bits) - 1

    def narrow(self, bits: int) -> None:
        """Hand out narrower numbers from now on; wider `bits` change nothing.

        Raises
        ------
        Busy
            A number that is wider is taken.
        """
        if bits >= self.bits:
            return
        try:
            self._ids.reserve(1 << bits, self._last)
        except PasidAllocated as error:
            text = f"{self.name} {error.value:#x} is taken: not all numbers have {bits} bits"
            raise Busy(self.name, error.value, text=text) from None
        self.bits = bits

    def widen(self, bits: int) -> None:
        """Take `narrow` back, up to the width that the space was made with."""
        if bits > self.bits:
            self._ids.unreserve(1 << self.bits, (1 << bits) - 1)
            self.bits = bits

    def free(self, number: SupportsIndex) -> None:
        """Give a number back.

        Raises
        ------
        NoEntry
            It is not taken.
        """
        try:
            self._ids.free(number)
        except PasidError:
            raise self._unknown(number) from None

    def find(self, number: SupportsIndex) -> Any:
        """Return the data that a number was taken with.

        Raises
        ------
        NoEntry
            It is not taken.
        """
        try:
            return self._ids.find(number)
        except PasidError:
            raise self._unknown(number) from None

    def _unknown(self, number: SupportsIndex) -> NoEntry:
        value = index(number)
        return NoEntry(self.name, value, text=f"{self.name} {value:#x} is not taken")

    @property
    def available(self) -> int:
        """How many numbers are free."""
        return self._ids.available

    def __contains__(self, number: SupportsIndex) -> bool:
        """Whether a number is taken."""
        return number in self._ids

    def __len__(self) -> int:
        """How many numbers are taken."""
        return len(self._ids)

    def __iter__(self) -> Iterator[int]:
        """Iterate over the numbers that are taken, in ascending order."""
        return iter(self._ids)

    def __repr__(self) -> str:
        """The name, and how many are taken."""
        return f"<IdSpace of {self.name}: {len(self)} of {self._last} taken>"
