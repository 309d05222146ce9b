"""Groups: devices that share their domains, attached all or not at all (F9 to F14, F29)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Final

from smmufast.errors import Busy, InvalidArgument
from smmufast.iommu.domain import (
    BLOCKED,
    Domain,
    PagingDomain,
    domain_of,
    is_auxiliary,
    no_pasid_op,
)
from smmufast.iommu.undo import Undo

if TYPE_CHECKING:
    from smmufast.iommu.attachment import AttachHandle, Attachment
    from smmufast.iommu.device import Device
    from smmufast.iommu.smmu.master import Master
    from smmufast.iommu.system import System

NO_PASID: Final = 0


class Group:
    """Devices that the hardware cannot tell apart, or that share memory access: one domain.

    Attributes
    ----------
    devices : list of Device
    default : Domain
        What is behind the current main domain.
    owner : object
        Whoever called `claim`.
    """

    def __init__(self, system: System) -> None:
        self.system = system
        self.devices: list[Device] = []
        self.default: Domain = BLOCKED
        self.owner: object = None

    @property
    def masters(self) -> list[Master]:
        """The driver's part of each device."""
        return [device.master for device in self.devices]

    @property
    def domain(self) -> Domain:
        """The current main domain."""
        return self.devices[0].domain if self.devices else self.default

    @property
    def resetting(self) -> bool:
        """Whether a device of the group is being reset."""
        return any([device.master.blocked for device in self.devices])

    @property
    def pasids(self) -> dict[int, Domain | AttachHandle]:
        """PASID to what is attached there: a Domain, or the AttachHandle that came with it."""
        return {
            ssid: one.handle or one.domain
            for master in self._with_pasids()[:1]
            for ssid, one in master.attachments.items()
            if ssid and not is_auxiliary(one.domain)
        }

    def _with_pasids(self) -> list[Master]:
        return [device.master for device in self.devices if device.max_pasids]

    def __repr__(self) -> str:
        """Its devices and its domain."""
        sids = ", ".join(f"{sid:#x}" for device in self.devices for sid in device.sids)
        return f"<Group of sid {sids}: {self.domain!r}>"

    # --- the main domain ---

    def attach(self, domain: Domain) -> None:
        """Attach every device of the group to a domain (iommu_attach_group).

        Raises
        ------
        Busy
            The current domain is neither the default nor a blocking one.
        InvalidArgument
            The domain is not for this SMMU: try another (soft).
        OutOfMemory
            No page is left for a CD table.
        """
        with self.system.lock:
            domain = domain_of(domain)
            if self.domain is not self.default and self.domain is not BLOCKED:
                raise Busy("group", self, text=f"group has {self.domain!r}: detach it first")
            self.check_reset()
            self.set(domain)

    def detach(self, domain: Domain) -> None:
        """Put the default domain back, or block if the group has an owner.

        A domain that is not the current one: a warning, and nothing is done (F12).
        """
        with self.system.lock:
            if self.domain is not domain:
                warnings.warn(f"{domain!r} is not attached to {self!r}", stacklevel=2)
                return
            self.set(BLOCKED if self.owner is not None else self.default)

    def claim(self, owner: object) -> None:
        """Let a user-space driver own the group: it is blocked while nothing else is attached.

        Raises
        ------
        Busy
            It has another owner, or a domain of its own.
        """
        with self.system.lock:
            if self.owner is not None and self.owner is not owner:
                raise Busy("owner", owner, text="group has another owner")
            if self.owner is None:
                if self.domain is not self.default or self.pasids:
                    raise Busy("group", self, text=f"group has {self.domain!r}")
                self.set(BLOCKED)
                self.owner = owner

    def release(self) -> None:
        """End the ownership: the default domain comes back."""
        with self.system.lock:
            if self.owner is not None:
                self.set(self.default)
                self.owner = None

    def set(self, domain: Domain) -> None:
        """Make a domain the current one, on all devices or on none (F11)."""
        with self.system.lock:
            domain = domain_of(domain)
            if domain is not self.domain:
                self.check_reset()
                self._set(domain)

    def _set(self, domain: Domain) -> None:
        old, masters = self.domain, self.masters
        with Undo() as undo:
            for master in masters:
                master.prepare(domain, undo)
            for master in masters:
                master.attach(domain)
                undo.add(master.attach, old)
        if isinstance(domain, PagingDomain):
            domain.mode = domain.mode or "main"

    def emptied(self) -> None:
        """The last device has left: the default domain that was made for it ends."""
        default = self.default
        if isinstance(default, PagingDomain) and not default.freed and not default.users:
            for child in default.children.values():
                child.parent = None  # it may get another
            default.children.clear()
            default.free()
        self.default, self.owner = BLOCKED, None

    # --- PASIDs ---

    def check_pasid(self, domain: Domain, pasid: int) -> None:
        """Refuse what no device of the group could attach (F24)."""
        if domain.kind not in ("paging", "sva"):
            raise no_pasid_op(domain)
        if pasid <= NO_PASID:
            raise InvalidArgument("pasid", pasid, "1 or more")
        most = self.max_pasids
        if not most:
            text = f"pasid: {self.devices[0].why_no_pasids}"
            raise InvalidArgument("pasid", pasid, text=text)
        if pasid >= most:
            raise InvalidArgument("pasid", pasid, f"1 to {most - 1}")
        self.check_reset()

    def check_reset(self) -> None:
        """Refuse changes while a device is being reset (EBUSY)."""
        if self.resetting:
            raise Busy("group", self, text="group has a device that is being reset")

    def set_pasid(
        self,
        domain: Domain | None,
        pasid: int,
        handle: AttachHandle | None = None,
        *,
        leaving: bool = False,
    ) -> None:
        """Attach a PASID on all devices or on none; None detaches.

        A domain was looked at by `check_pasid` before.  `leaving` is for a device that is released,
        also while it is being reset.
        """
        if domain is None and not leaving:
            self.check_reset()
        with Undo() as undo:
            if domain is not None:
                self.prepare_pasid(domain, pasid, undo)
            self.install_pasid(domain, pasid, handle, undo)

    def prepare_pasid(self, domain: Domain, pasid: int, undo: Undo) -> None:
        """Check a domain of a PASID on every device, and have the pages for its CDs."""
        for master in self._with_pasids():
            master.prepare_pasid(domain, pasid, undo)

    def install_pasid(
        self, domain: Domain | None, pasid: int, handle: AttachHandle | None, undo: Undo
    ) -> None:
        """Attach a PASID, for which `prepare_pasid` was called, on all devices or on none."""
        masters = self._with_pasids()
        old = masters[0].attachments.get(pasid) if masters else None
        for master in masters:
            before = master.attachments.get(pasid)
            leaf = len(masters) == 1 or master.has_leaf(pasid)
            master.set_pasid(domain, pasid, handle)
            if len(masters) == 1:
                break
            if not leaf:
                undo.add(master.drop_leaf, pasid)
            if before is None:
                undo.add(master.detach_pasid, pasid)
            else:
                undo.add(master.set_pasid, before.domain, pasid, before.handle)
        if old is not None and old.handle is not None:
            old.handle.domain = None
        if handle is not None:
            handle.domain = domain

    @property
    def max_pasids(self) -> int:
        """How many PASIDs all of its devices have that have any."""
        each = [one.max_pasids for one in self.devices if one.max_pasids]
        return min(each) if each else 0

    def at(self, pasid: int) -> Domain | None:
        """The domain of a PASID, or None."""
        one = self.attachment(pasid)
        return None if one is None else one.domain

    def attachment(self, pasid: int) -> Attachment | None:
        """What is attached to a PASID, on the first device that has PASIDs."""
        for device in self.devices:
            if device.max_pasids:
                return device.master.attachments.get(pasid) if pasid else None
        return None
