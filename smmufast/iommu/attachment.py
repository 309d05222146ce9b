"""The one record of who is attached where (Linux: struct arm_smmu_master_domain).

A master's `attachments` and a domain's `attachments` are two ways to the same records, and only
`link` and `unlink` change them.  Users, invalidations, guests, bonds, shares and the PASIDs of a
group all follow from them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smmufast.iommu.device import Device
    from smmufast.iommu.domain import Domain
    from smmufast.iommu.smmu.cdtable import CdTable
    from smmufast.iommu.smmu.master import Master


class AttachHandle:
    """What a caller gives with a PASID, to find it again when a fault names the PASID.

    Subclass it to keep data of your own.  `domain` is set while it is in use.
    """

    domain: Domain | None = None

    def check_detach(self, pasid: int) -> None:
        """Refuse that the PASID is taken away by a call that is not the holder's (EBUSY)."""

    def belongs_to(self, device: Device) -> bool:
        """Whether `release` is to end it with the device."""
        return False

    def release(self, device: Device) -> None:
        """The device goes: end what the handle stands for, if that is the device's."""


class Attachment:
    """One domain on one address space of a device.

    Attributes
    ----------
    master : Master
    domain : Domain
    ssid : int
        0 for the main domain.
    table : CdTable or None
        Where its CD is; None for a domain that has none.
    handle : AttachHandle or None
        What the caller gave with a PASID.
    """

    __slots__ = ("domain", "handle", "master", "ssid", "table")

    def __init__(
        self,
        master: Master,
        domain: Domain,
        ssid: int,
        table: CdTable | None = None,
        handle: AttachHandle | None = None,
    ) -> None:
        """Take what is attached to what; nothing is written yet."""
        self.master = master
        self.domain = domain
        self.ssid = ssid
        self.table = table
        self.handle = handle

    def link(self) -> None:
        """Let the domain know that the SMMU may cache it for this master from now on.

        Nobody else gets its PASID meanwhile, whoever chose it.
        """
        self.domain.linked(self)
        if self.ssid:
            self.master.iommu.system.pasids.pick(self.ssid)

    def unlink(self) -> None:
        """Let the domain forget it; nothing in memory leads to the domain from here any more."""
        self.domain.unlinked(self)
        if self.ssid:
            self.master.iommu.system.pasids.unpick(self.ssid)
