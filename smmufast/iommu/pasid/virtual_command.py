"""The virtual command: a guest asks its host for PASIDs (docs/domains.md 4.3)."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from smmufast.errors import Busy, IommuError, NoEntry
from smmufast.iommu.pasid.policy import LAST
from smmufast.iommu.pasid.space import PasidState

if TYPE_CHECKING:
    from smmufast.iommu.pasid.sets import PasidSet
    from smmufast.iommu.pasid.space import PasidSpace


class VirtualCommand:
    """A backend for a guest: it asks its host for IDs, before any device is known.

    As VT-d's virtual command does: the host chooses from all 20 bits, whatever the range asked
    for, and so the guest must expect IDs that are too large for a device (`PasidSpace.check`).

    Parameters
    ----------
    host : PasidSpace
        The host's.
    host_set : PasidSet, optional
        The guest's set there.
    caching_mode, scalable_mode, pasid_capability : bool
        What the guest's IOMMU has.  Without caching mode it is not a guest's.

    Attributes
    ----------
    scalable_mode : bool
        False also once `register` failed: without IDs there is no use for it.

    Examples
    --------
    >>> from smmufast.iommu.pasid import PasidSpace, VirtualCommand
    >>> host, guest = PasidSpace(), PasidSpace()
    >>> host.alloc()
    1
    >>> VirtualCommand(host).register(guest)
    True
    >>> guest.alloc()
    2
    """

    def __init__(
        self,
        host: PasidSpace,
        *,
        host_set: PasidSet | None = None,
        caching_mode: bool = True,
        scalable_mode: bool = True,
        pasid_capability: bool = True,
    ) -> None:
        self.host = host
        self.host_set = host_set
        self.caching_mode = caching_mode
        self.scalable_mode = scalable_mode
        self.pasid_capability = pasid_capability

    def register(self, guest: PasidSpace) -> bool:
        """Register with the guest's space, where the IOMMU has what it takes.

        Returns
        -------
        bool
            False if the guest goes on without: the IOMMU lacks something, or the space refused,
            which also ends scalable mode.
        """
        if not (self.caching_mode and self.scalable_mode and self.pasid_capability):
            return False
        try:
            guest.register_backend(self)
        except IommuError:
            self.scalable_mode = False
        return self.scalable_mode

    def alloc(self, min: int, max: int) -> int | None:
        """Return an ID that the host chose; None if it has none, or `min` or `max` cannot be."""
        if min < 1 or max > LAST:
            return None
        try:
            return self.host.alloc(pasid_set=self.host_set)
        except IommuError:
            return None

    def free(self, pasid: int) -> None:
        """Give an ID back to the host; one that the host took away already is forgotten.

        Raises
        ------
        Busy
            Somebody in the host uses it.
        """
        if self.host.state(pasid) is PasidState.ACTIVE:
            raise Busy("pasid", pasid, text=f"pasid {pasid:#x} is in use in the host")
        with suppress(NoEntry):
            self.host.free(pasid, pasid_set=self.host_set)
