"""Groups: devices that share their domains, attached all or not at all (F9 to F14, F29)."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Final

from smmufast.errors import Busy, InvalidArgument
from smmufast.iommu.domain import BLOCKED, Domain, domain_of, no_pasid_op
from smmufast.iommu.undo import Undo

if TYPE_CHECKING:
    from smmufast.iommu.device import Device
    from smmufast.iommu.system import System

NO_PASID: Final = 0


class AttachHandle:
    """What a caller gives with a PASID, to find it again when a fault names the PASID.

    Subclass it to keep data of your own.  `domain` is set while it is in use.
    """

    domain: Domain | None = None


class Group:
    """Devices that the hardware cannot tell apart, or that share memory access: one domain.

    Attributes
    ----------
    devices : list of Device
    domain, default : Domain
        The current main domain, and the one that is behind it.
    pasids : dict
        PASID to what is attached there: a Domain, or the AttachHandle that came with it.
    """

    def __init__(self, system: System) -> None:
        self.system = system
        self.devices: list[Device] = []
        self.default: Domain = BLOCKED
        self.domain: Domain = BLOCKED
        self.pasids: dict[int, Domain | AttachHandle] = {}
        self.owner: object = None
        self.resetting = False

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
        if domain is self.domain:
            return
        self.check_reset()
        with Undo() as undo:
            for device in self.devices:
                device.reserve(domain, undo)
            self._set(domain)

    def _set(self, domain: Domain) -> None:
        old = self.domain
        done: list[Device] = []
        tables = [device.cd_table for device in self.devices]
        try:
            for device in self.devices:
                device.install(domain)
                done.append(device)
        except BaseException:
            for device in reversed(done):
                with contextlib.suppress(Exception):
                    device.reinstall(old)
            for device, table in zip(self.devices, tables, strict=True):
                if table is None:
                    device.drop_table()
            raise
        self.domain = domain

    # --- PASIDs ---

    def check_pasid(self, domain: Domain, pasid: int) -> None:
        """Refuse what no device of the group could attach (F24)."""
        if domain.kind not in ("paging", "sva"):
            raise no_pasid_op(domain)
        if pasid <= NO_PASID:
            raise InvalidArgument("pasid", pasid, "1 or more")
        for device in self.devices:
            if device.max_pasids and pasid >= device.max_pasids:
                raise InvalidArgument("pasid", pasid, f"1 to {device.max_pasids - 1}")
        if not any(device.max_pasids for device in self.devices):
            raise InvalidArgument("pasid", pasid, text="the device has no PASIDs")
        self.check_reset()

    def check_reset(self) -> None:
        """Refuse changes while a device is being reset (EBUSY)."""
        if self.resetting:
            raise Busy("group", self, text="group has a device that is being reset")

    def set_pasid(self, domain: Domain | None, pasid: int) -> None:
        """Attach a PASID on all devices or on none; None detaches."""
        self.check_reset()
        old = self.at(pasid)
        members = [device for device in self.devices if device.max_pasids]
        with Undo() as undo:
            if domain is not None:
                for device in members:
                    device.reserve_pasid(domain, pasid, undo)
            self._set_pasid(domain, pasid, old, members)

    def _set_pasid(
        self, domain: Domain | None, pasid: int, old: Domain | None, members: list[Device]
    ) -> None:
        done: list[Device] = []
        tables = [device.cd_table for device in members]
        leaves = [table is not None and table.address(pasid) is not None for table in tables]
        try:
            for device in members:
                device.install_pasid(domain, pasid, old)
                done.append(device)
        except BaseException:
            for device in reversed(done):
                with contextlib.suppress(Exception):
                    device.install_pasid(old, pasid, domain)
            for device, table, leaf in zip(members, tables, leaves, strict=True):
                if table is None:
                    device.drop_table()
                elif not leaf:
                    table.drop_leaf(pasid)
            raise

    def attached(self) -> list[Domain]:
        """The domains of the group and of its PASIDs, as often as they are attached.

        Identity and blocked domains are everybody's, and not counted.
        """
        at = [self.domain, *(self.at(pasid) for pasid in self.pasids)]
        return [domain for domain in at if domain is not None and domain.stage]

    def at(self, pasid: int) -> Domain | None:
        """The domain of a PASID, or None."""
        held = self.pasids.get(pasid)
        return held.domain if isinstance(held, AttachHandle) else held
