"""Mediated devices: a share of a device, with one PASID and one address space."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, SupportsIndex

from smmufast.errors import Busy, InvalidArgument
from smmufast.iommu import aux
from smmufast.iommu.attachment import AttachHandle
from smmufast.iommu.domain import domain_of
from smmufast.iommu.profile import take_pasid

if TYPE_CHECKING:
    from smmufast._device.smmu import Result, Segments, Walk
    from smmufast.iommu.device import Device
    from smmufast.iommu.domain import Domain, PagingDomain
    from smmufast.iommu.smmu.master import Master


class Shares(AttachHandle):
    """The mediated devices that share one PASID of a parent: one, or those with one domain.

    Two shares of one parent that are given to one guest have one auxiliary domain, and so one
    PASID; the last takes it away (Linux: auxiliary_link_device of VT-d, which counts them).
    """

    def __init__(self) -> None:
        self.members: list[Mediated] = []

    def check_detach(self, pasid: int) -> None:
        """Refuse: each share detaches itself."""
        raise Busy(
            "pasid", pasid, text=f"pasid {pasid:#x} is that of {len(self.members)} mediated devices"
        )

    def belongs_to(self, device: Device) -> bool:
        """Whether the device is the parent."""
        return any(share.parent is device for share in self.members)

    def release(self, device: Device) -> None:
        """End with the parent."""
        for share in list(self.members):
            if share.parent is device:
                device.system.lock.insist(partial(share._detach, leaving=True))


def shares(master: Master) -> list[Mediated]:
    """The mediated devices of a device that have a domain."""
    handles = [one.handle for one in master.attachments.values()]
    return [share for one in handles if isinstance(one, Shares) for share in one.members]


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
        self._handle: Shares | None = None
        self._pasid = 0

    @property
    def domain(self) -> Domain | None:
        """What it is attached to."""
        return None if self._handle is None else self._handle.domain

    def attach(self, domain: PagingDomain) -> None:
        """Attach a domain; Busy if there is one, else as `attach_aux` or `attach_pasid`."""
        parent = self.parent
        system = parent.system
        with system.lock:
            if self._handle is not None:
                raise Busy("mediated", self, text=f"mediated device has {self.domain!r}")
            domain_of(domain)
            handle = self._shared(domain) if system.profile.aux else None
            if handle is None:
                handle = Shares()
                if system.profile.aux:
                    aux.attach(parent, domain, handle)
                    handle.domain = domain
                    self._pasid = domain.aux_pasid
                else:
                    self._pasid = self._take(domain, handle)
            else:
                self._pasid = domain.aux_pasid
            handle.members.append(self)
            self._handle = handle

    def _shared(self, domain: Domain) -> Shares | None:
        """AUX: the shares of the parent that have the domain already."""
        for pasid, held in self.parent.aux.items():
            handle = self.parent.master.attachments[pasid].handle
            if held is domain and isinstance(handle, Shares):
                return handle
        return None

    def _take(self, domain: PagingDomain, handle: Shares) -> int:
        """NOW: attach a PASID that nobody uses."""
        parent = self.parent
        if not parent.max_pasids:
            raise InvalidArgument("device", parent, text=f"device: {parent.why_no_pasids}")
        pasid = take_pasid(parent, 1, parent.max_pasids - 1, self)
        try:
            parent.attach_pasid(domain, pasid, handle)
        except BaseException:
            parent.system.give_pasid(pasid)
            raise
        return pasid

    def detach(self, domain: PagingDomain | None = None) -> None:
        """Detach its domain; InvalidArgument if it has none, or another one than was given."""
        parent = self.parent
        system = parent.system
        with system.lock:
            if self._handle is None or domain not in (None, self.domain):
                raise InvalidArgument("domain", domain, text=f"{domain!r} is not attached")
            self._detach()

    def _detach(self, *, leaving: bool = False) -> None:
        """Take the mediated device off the PASID that it has."""
        parent, handle, pasid = self.parent, self._handle, self._pasid
        system = parent.system
        assert handle is not None
        if len(handle.members) == 1:
            if system.profile.aux:
                parent.master.detach_pasid(pasid)
            else:
                parent.group.set_pasid(None, pasid, leaving=leaving)
                system.give_pasid(pasid)
            handle.domain = None
        handle.members.remove(self)
        self._handle = None

    @property
    def pasid(self) -> int | None:
        """The PASID that the hardware must use for this share; None without a domain."""
        return self._pasid if self._handle is not None else None

    # --- what it does ---

    def _need(self) -> int:
        pasid = self.pasid
        if pasid is None:
            raise InvalidArgument("mediated", self, text="mediated device has no domain")
        return pasid

    def translate(self, iova: SupportsIndex, **more: Any) -> Result:
        """Make one access under its PASID, as `Device.translate`."""
        return self.parent.translate(iova, pasid=self._need(), **more)

    def access(self, iova: SupportsIndex, **more: Any) -> Result:
        """Make one access through the parent's ATC, as `Device.access`."""
        return self.parent.access(iova, pasid=self._need(), **more)

    def translate_batch(self, iova: Any, **more: Any) -> Any:
        """Make many accesses under its PASID, as `Device.translate_batch`."""
        return self.parent.translate_batch(iova, pasid=self._need(), **more)

    def translate_range(
        self, iova: SupportsIndex, size: SupportsIndex, **more: Any
    ) -> Segments:
        """Translate a range of addresses, as `Device.translate_range`."""
        return self.parent.translate_range(iova, size, pasid=self._need(), **more)

    def start_walk(self, iova: SupportsIndex, **more: Any) -> Walk:
        """Begin an access whose fetches the caller answers, as `Device.start_walk`."""
        return self.parent.start_walk(iova, pasid=self._need(), **more)

    def __repr__(self) -> str:
        """Its parent and its PASID."""
        return f"<Mediated of sid {self.parent.sid:#x}: pasid {self.pasid}>"
