"""The virtual command: a guest asks its host for PASIDs (docs/domains.md 4.3)."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from smmufast.errors import Busy, IommuError, NoEntry, PasidOverflow
from smmufast.iommu.pasid.policy import LAST
from smmufast.iommu.pasid.space import PasidState

if TYPE_CHECKING:
    from smmufast.iommu.pasid.sets import PasidSet
    from smmufast.iommu.pasid.space import PasidSpace


class VirtualCommand:
    """A backend for a guest: it asks its host for IDs, before any device is known.

    VT-d's virtual command has no arguments: the host chooses from all 20 bits, whatever the guest
    asked its own space for.  The reply to the proposal suggested to pass the range as a hint.
    With either the guest gets an ID in the range that it asked for, or an error.

    Parameters
    ----------
    host : PasidSpace
        The host's.
    host_set : PasidSet, optional
        The guest's set there.
    hint : bool
        The host chooses in the range that the guest asked for.  False, as VT-d's
        intel_vcmd_ioasid_alloc: from all, and what is outside of the range goes back to the host,
        with PasidOverflow.
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
        hint: bool = True,
        caching_mode: bool = True,
        scalable_mode: bool = True,
        pasid_capability: bool = True,
    ) -> None:
        """Offer PASIDs of a host's space to a guest."""
        self.host = host
        self.host_set = host_set
        self.hint = hint
        self.caching_mode = caching_mode
        self.scalable_mode = scalable_mode
        self.pasid_capability = pasid_capability

    def register(self, guest: PasidSpace) -> bool:
        """Register with the guest's space, where the IOMMU has what it takes.

        From then on `host_set` does not end with its last ID: the guest may ask again.

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
            return False
        if self.host_set is not None:
            with self.host._lock:
                self.host_set._kept += 1
        return True

    def alloc(self, min: int, max: int) -> int | None:
        """Return an ID that the host chose; None if it has none, or `min` or `max` cannot be.

        Raises
        ------
        PasidOverflow
            Without a hint: the ID is not in the range, and the host has it again.
        """
        if min < 1 or max > LAST:
            return None
        asked = (min, max) if self.hint else (1, LAST)
        try:
            pasid = self.host.alloc(*asked, pasid_set=self.host_set)
        except IommuError:
            return None
        if not min <= pasid <= max:
            self.host.free(pasid, pasid_set=self.host_set)
            text = (
                f"pasid {pasid:#x} is what the host chose, without a hint: the guest asked for "
                f"{min:#x} to {max:#x}"
            )
            raise PasidOverflow("pasid", pasid, f"{min} to {max}", text=text)
        return pasid

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

    def __repr__(self) -> str:
        """Its host, and whether it gives a hint."""
        return f"<VirtualCommand to {self.host!r}{'' if self.hint else ', without a hint'}>"
