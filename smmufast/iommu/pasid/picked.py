"""PASIDs that somebody chose, and that the allocator does not hand out meanwhile.

Linux lets the caller of iommu_attach_device_pasid choose, and iommu_alloc_global_pasid knows
nothing of it; so the PASID that a process gets may be in use on the device (EBUSY).  Here both
look at one bitmap.
"""

from __future__ import annotations

from operator import index
from typing import TYPE_CHECKING, SupportsIndex

from smmufast._driver.pasid import PasidError, PasidReserved
from smmufast.errors import InvalidArgument, NoEntry
from smmufast.iommu.pasid.policy import LAST
from smmufast.iommu.pasid.sets import PasidSets

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from smmufast.iommu.pasid.policy import PasidPolicy


class PasidPicked(PasidSets):
    """The PASIDs that were chosen by hand."""

    def __init__(self, policy: PasidPolicy, smmu_limits: Sequence[int]) -> None:
        super().__init__(policy, smmu_limits)
        # One that was picked once and is not allocated is a reserved bit of the allocator;
        # the others are counted here.
        self._picks: dict[int, int] = {}

    def pick(self, pasid: SupportsIndex) -> None:
        """Count one use more of a PASID that its user chose: `alloc` does not return it.

        It may be allocated: to the same user, who asked for it before, as a process does, or to
        somebody else, which is for the caller to find out.  It stays withheld when it is freed.

        Raises
        ------
        InvalidArgument
            It is not 1 to 2**20 - 1.
        """
        pasid = index(pasid)
        if not 0 < pasid <= LAST:
            raise InvalidArgument("pasid", pasid, f"1 to {LAST:#x}")
        with self._lock:
            if pasid in self._picks or pasid in self._ids:
                self._picks[pasid] = self._picks.get(pasid, 0) + 1
                return
            try:
                self._ids.reserve(pasid, pasid)
            except PasidReserved:
                self._picks[pasid] = 2

    def unpick(self, pasid: SupportsIndex) -> None:
        """Count one use less.

        Raises
        ------
        NoEntry
            Nobody picked it.
        """
        pasid = index(pasid)
        with self._lock:
            count = self._picks.get(pasid)
            if count is None:
                try:
                    self._ids.unreserve(pasid or -1, pasid)  # 0 is reserved for ever
                except PasidError:
                    text = f"pasid {pasid:#x} was not picked"
                    raise NoEntry("pasid", pasid, text=text) from None
            elif count == 1 or (count == 2 and pasid not in self._ids):
                del self._picks[pasid]
            else:
                self._picks[pasid] = count - 1

    def picked(self, pasid: SupportsIndex) -> int:
        """Return how many uses of a PASID were picked; 0 for what never can be one, too."""
        pasid = index(pasid)
        if not 0 < pasid <= LAST:
            return 0
        with self._lock:
            if pasid in self._picks:
                return self._picks[pasid]
            try:
                self._ids.find(pasid)
            except PasidReserved:
                return 1
            except PasidError:
                return 0
            return 0

    def _withhold(self, freed: Iterable[int]) -> None:
        """With the lock: IDs that were allocated are free now, but for those that are picked."""
        for pasid in self._picks.keys() & freed if self._picks else ():
            self._ids.reserve(pasid, pasid)
            if self._picks[pasid] == 1:
                del self._picks[pasid]
