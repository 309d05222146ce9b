"""The two eras of the kernel's interface: where CD tables are, and who chooses PASIDs.

AUX is Linux 5.2 to 5.17 and the 2018 proposal: a main domain owns the CD table of its devices, and
an auxiliary domain owns one PASID in it.  NOW is Linux today: a device owns its CD table, and a
caller attaches any stage-1 domain to any PASID.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

from smmufast.errors import (
    Busy,
    InvalidArgument,
    NotSupported,
    PasidOverflow,
    WrongSmmu,
)
from smmufast.iommu.domain import Domain, PagingDomain
from smmufast.iommu.smmu.cdtable import CdTable

if TYPE_CHECKING:
    from smmufast.iommu.device import Device
    from smmufast.iommu.smmu.master import Master
    from smmufast.iommu.undo import Undo


class Profile(ABC):
    """Which era of the kernel's interface a system follows: AUX or NOW.

    Attributes
    ----------
    name : str
    aux : bool
        Auxiliary domains that own their PASID, and a CD table for each main domain.
    """

    name: str
    aux: bool

    @abstractmethod
    def table_of(self, master: Master) -> CdTable | None:
        """The CD table that the STEs of a device point to, or would."""

    @abstractmethod
    def table_for(self, master: Master, domain: Domain) -> CdTable | None:
        """The same, should a domain that was prepared become the main domain."""

    @abstractmethod
    def main_table(self, master: Master, domain: PagingDomain, undo: Undo) -> CdTable:
        """Allocate the table for the CD of a main domain, if it is missing."""

    @abstractmethod
    def pasid_table(self, master: Master, main: Domain, undo: Undo) -> CdTable:
        """Allocate the table for the CDs of PASIDs beside a main domain, if it is missing."""

    @abstractmethod
    def check_main(self, master: Master, domain: Domain) -> None:
        """Refuse a main domain that the era refuses."""

    @abstractmethod
    def bind_range(self, device: Device) -> tuple[int, int]:
        """First and last PASID that a process may have on a device."""

    def __repr__(self) -> str:
        """Its name."""
        return self.name

    def __reduce__(self) -> str:
        """A profile is one object, also after a copy."""
        return self.name


class _Aux(Profile):
    name = "AUX"
    aux = True

    def table_of(self, master: Master) -> CdTable | None:
        return self.table_for(master, master.domain)

    def table_for(self, master: Master, domain: Domain) -> CdTable | None:
        return domain.cd_table if isinstance(domain, PagingDomain) else None

    def main_table(self, master: Master, domain: PagingDomain, undo: Undo) -> CdTable:
        if domain.cd_table is None:
            domain.cd_table = CdTable(master.iommu, master.ssid_bits, master.stall)
            undo.add(domain.drop_table)
        return domain.cd_table

    def pasid_table(self, master: Master, main: Domain, undo: Undo) -> CdTable:
        table = self.table_for(master, main)
        if table is None:
            raise InvalidArgument(
                "device", master.device, text="device has no main domain of stage 1"
            )
        return table

    def check_main(self, master: Master, domain: Domain) -> None:
        """Refuse a main domain that a device with this profile cannot have."""
        device = master.device
        if device.aux:
            raise Busy("device", device, text="device has auxiliary domains under its main domain")
        if "SVA" in device.enabled_features:
            raise Busy("device", device, text="device has SVA enabled under its main domain")
        if not isinstance(domain, PagingDomain):
            return
        if domain.mode == "aux":
            raise InvalidArgument(
                "domain", domain, text="domain was attached as auxiliary, and stays so"
            )
        if domain.iommu not in (None, master.iommu):
            raise WrongSmmu("domain", domain, text="domain lives on another SMMU")
        table = domain.cd_table
        if table is None:
            return
        if table.s1cdmax != master.ssid_bits:
            raise InvalidArgument(
                "device", device,
                text=f"device has {master.ssid_bits}-bit PASIDs, the domain's CD table "
                f"{table.s1cdmax}-bit ones",
            )  # fmt: skip
        if table.stall != master.stall:
            mine, its = ("stall", "do not") if master.stall else ("do not stall", "do")
            raise InvalidArgument(
                "device", device,
                text=f"faults of the device {mine}, those of the domain's other devices {its}",
            )  # fmt: skip

    def bind_range(self, device: Device) -> tuple[int, int]:
        if "SVA" not in device.enabled_features:
            raise InvalidArgument("device", device, text="SVA is not enabled on the device")
        return device.enabled_features["SVA"]


class _Now(Profile):
    name = "NOW"
    aux = False

    def table_of(self, master: Master) -> CdTable | None:
        return master.own_table

    def table_for(self, master: Master, domain: Domain) -> CdTable | None:
        return master.own_table

    def main_table(self, master: Master, domain: PagingDomain, undo: Undo) -> CdTable:
        return self.pasid_table(master, domain, undo)

    def pasid_table(self, master: Master, main: Domain, undo: Undo) -> CdTable:
        table = master.own_table
        if table is None:
            table = master.own_table = CdTable(master.iommu, master.ssid_bits, master.stall)
            table.masters.append(master)
            undo.add(master.drop_table)
        return table

    def check_main(self, master: Master, domain: Domain) -> None:
        if isinstance(domain, PagingDomain) and domain.iommu not in (None, master.iommu):
            raise InvalidArgument("domain", domain, text="domain lives on another SMMU")

    def bind_range(self, device: Device) -> tuple[int, int]:
        return 1, device.max_pasids - 1


#: Linux 5.2 to 5.17, and the 2018 proposal: auxiliary domains.
AUX: Final[Profile] = _Aux()
#: Linux today: any stage-1 domain on any PASID that the caller chooses.
NOW: Final[Profile] = _Now()


def need(system_profile: Profile, profile: Profile, call: str) -> None:
    """Refuse a call that the other profile has (EOPNOTSUPP)."""
    if system_profile is not profile:
        raise NotSupported(
            "profile", system_profile,
            text=f"{call}() needs System(profile={profile.name}); this system follows "
            f"{system_profile.name}",
        )  # fmt: skip


def take_pasid(device: Device, first: int, last: int, data: object) -> int:
    """Allocate a PASID that a device can use, or none.

    Raises
    ------
    NoSpace
        None is left.
    PasidOverflow
        A backend, for which the range is a hint, gave another.
    """
    system = device.system
    last = min(last, device.group.max_pasids - 1)
    pasid = system.take_pasid(first, last, data=data)
    if not first <= pasid <= last:
        system.give_pasid(pasid)
        raise PasidOverflow("pasid", pasid, f"{first} to {last}")
    return pasid
