"""Mediated devices: a share of a device, with one PASID and one address space."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex

from smmufast.errors import Busy, InvalidArgument

if TYPE_CHECKING:
    from smmufast._smmu import Result
    from smmufast.iommu.device import Device
    from smmufast.iommu.domain import PagingDomain


class Mediated:
    """A mediated device: its parent's hardware, one PASID, one address space.

    Attaching a domain here attaches it to a PASID of the parent: as an auxiliary domain in the
    AUX profile, with a PASID from the system's space in the other.

    Attributes
    ----------
    parent : Device
    domain : PagingDomain or None
    pasid : int or None
        The PASID that the hardware must use for this share.
    """

    def __init__(self, parent: Device) -> None:
        self.parent = parent
        self.domain: PagingDomain | None = None
        self.pasid: int | None = None

    def attach(self, domain: PagingDomain) -> None:
        """Attach a domain; Busy if there is one, else as `attach_aux` or `attach_pasid`."""
        parent = self.parent
        system = parent.system
        with system.lock:
            if self.domain is not None:
                raise Busy("mediated", self, text=f"mediated device has {self.domain!r}")
            if system.profile.aux:
                parent.attach_aux(domain)
                self.pasid = domain.pasid(parent)
            else:
                if not parent.max_pasids:
                    raise InvalidArgument("device", parent, text="the device has no PASIDs")
                pasid = system.take_pasid(1, parent.max_pasids - 1)
                try:
                    parent.attach_pasid(domain, pasid)
                except BaseException:
                    system.give_pasid(pasid)
                    raise
                self.pasid = pasid
            self.domain = domain
            parent.shares.append(self)

    def detach(self, domain: PagingDomain | None = None) -> None:
        """Detach its domain; InvalidArgument if it has none, or another one than was given."""
        parent = self.parent
        system = parent.system
        with system.lock:
            current = self.domain
            if current is None or domain not in (None, current):
                raise InvalidArgument("domain", domain, text=f"{domain!r} is not attached")
            assert self.pasid is not None
            if system.profile.aux:
                parent.detach_aux(current)
            else:
                parent.detach_pasid(current, self.pasid)
                system.give_pasid(self.pasid)
            self.domain = self.pasid = None
            parent.shares.remove(self)

    def translate(self, iova: SupportsIndex, *, write: bool = False) -> Result:
        """Make one access under its PASID; InvalidArgument without a domain."""
        if self.pasid is None:
            raise InvalidArgument("mediated", self, text="mediated device has no domain")
        return self.parent.translate(iova, pasid=self.pasid, write=write)

    def __repr__(self) -> str:
        """Its parent and its PASID."""
        return f"<Mediated of sid {self.parent.sid:#x}: pasid {self.pasid}>"
