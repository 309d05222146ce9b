"""Devices: what a user of the kernel's interface sees (iommu.h).

Arguments, errors, groups and traffic are here; what is written for an attachment, and in which
order, is the master's (`smmufast.iommu.smmu.master`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, SupportsIndex

from smmufast.ats import AtsDevice
from smmufast.errors import (
    Busy,
    InvalidArgument,
    NoDevice,
    NoEntry,
    NoSpace,
    NotSupported,
    WrongType,
    instance,
    integer,
)
from smmufast.iommu import aux, sva
from smmufast.iommu.attachment import AttachHandle
from smmufast.iommu.domain import (
    BLOCKED,
    Domain,
    PagingDomain,
    domain_of,
    is_auxiliary,
    paging_domain,
)
from smmufast.iommu.draw import draw
from smmufast.iommu.group import Group
from smmufast.iommu.mediated import Mediated, shares
from smmufast.iommu.profile import NOW, need, take_pasid
from smmufast.iommu.smmu.master import Master

if TYPE_CHECKING:
    from collections.abc import Callable

    from smmufast._device.smmu import Result, Segments, Smmu, Walk
    from smmufast.iommu.smmu.cdtable import CdTable
    from smmufast.iommu.smmu.iommu import Iommu
    from smmufast.iommu.sva import AddressSpace, Bond
    from smmufast.iommu.system import System


def _pieces(direct: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Check the pieces of memory that firmware wants mapped."""
    instance("direct", direct, Iterable)
    pieces = []
    for piece in direct:
        if not isinstance(piece, tuple | list) or len(piece) != 2:
            raise InvalidArgument("direct", piece, "pairs of address and size")
        pieces.append((integer("direct", piece[0]), integer("direct", piece[1])))
    return tuple(pieces)


class Device:
    """A device behind an SMMU, as the operating system sees it.

    `System.device` makes one and probes it.

    Parameters
    ----------
    sids : int or iterable of int
        Its StreamIDs; none for a device that firmware describes without an SMMU.
    pasid_bits : int
        Width of its PASIDs, 0 to 20; 0: none.
    pasids : int, optional
        How many PASIDs it has, where that is no power of two.
    ats, pri, stall : bool
        What it can do: translate ahead, request pages, wait for a fault to be resolved.
    coherent : bool
        False: its accesses cannot snoop (F13).
    direct : iterable of (int, int)
        Address and size of memory that firmware wants mapped one to one.
    group : Group, optional
        That of another device, to share it.

    Attributes
    ----------
    max_pasids : int
        PASIDs are 1 to max_pasids - 1; 0: it has none, or the policy switched them off.
    ats_enabled, pasid_enabled : bool
        What was switched on in the device.
    atcs : list of AtsDevice
        Its ATCs, one for each StreamID, if it has ATS.
    """

    def __init__(
        self,
        sids: SupportsIndex | Iterable[SupportsIndex] = (),
        *,
        pasid_bits: int = 0,
        pasids: int | None = None,
        ats: bool = False,
        pri: bool = False,
        stall: bool = False,
        coherent: bool = True,
        direct: Iterable[tuple[int, int]] = (),
        group: Group | None = None,
    ) -> None:
        """Describe a device; a System takes it by `add`."""
        given = (sids,) if isinstance(sids, SupportsIndex) else sids
        instance("sids", given, Iterable)
        numbers = dict.fromkeys(integer("sid", sid) for sid in given)
        self.sids: tuple[int, ...] = tuple(numbers)
        pasid_bits = integer("pasid_bits", pasid_bits)
        if not 0 <= pasid_bits <= 20:
            raise InvalidArgument("pasid_bits", pasid_bits, "0 to 20")
        if pasids is None:
            pasids = 1 << pasid_bits if pasid_bits else 0
        pasids = integer("pasids", pasids)
        if not 0 <= pasids <= 1 << 20:
            raise InvalidArgument("pasids", pasids, "0 to 1048576")
        if pri and not ats:
            raise InvalidArgument("pri", pri, text="pri is True but ats is False: PRI needs ATS")
        self.pasids = pasids
        self.ats = ats
        self.pri = pri
        self.stall = stall
        self.coherent = coherent
        self.direct = _pieces(direct)
        if group is not None:
            instance("group", group, Group)
        self._wanted_group = group
        self._group: Group | None = None
        self._master: Master | None = None
        self.max_pasids = 0
        self.pasid_enabled = False
        self.enabled_features: dict[str, tuple[int, int]] = {}
        self.iopf_users = 0
        self.mm_exit: Callable[[object], object] | None = None

    @property
    def master(self) -> Master:
        """What the driver of its SMMU knows of it; NoDevice (ENODEV) before it is probed."""
        if self._master is None:
            raise NoDevice("device", self, text="device was not probed")
        return self._master

    @property
    def iommu(self) -> Iommu:
        """The driver of its SMMU; NoDevice (ENODEV) before it is probed."""
        return self.master.iommu

    @property
    def smmu(self) -> Smmu:
        """The SMMU itself; NoDevice (ENODEV) before it is probed."""
        return self.iommu.smmu

    @property
    def group(self) -> Group:
        """Its group; NoDevice (ENODEV) without one, NoEntry (ENOENT) if it has no StreamID."""
        if self._group is None:
            if not self.sids:
                raise NoEntry("device", self, text="device has no StreamID: no SMMU is known")
            raise NoDevice("device", self, text="device has no group: it was not probed")
        return self._group

    @property
    def system(self) -> System:
        """The system that probed it."""
        return self.iommu.system

    @property
    def sid(self) -> int:
        """Its first StreamID."""
        return self.sids[0]

    # --- what it has, where it was probed ---

    @property
    def domain(self) -> Domain:
        """The main domain."""
        return BLOCKED if self._master is None else self._master.domain

    def domain_at(self, pasid: int) -> Domain | None:
        """What an access reaches: under a PASID, or without one for 0."""
        return None if self._master is None else self._master.domain_at(pasid)

    @property
    def cd_table(self) -> CdTable | None:
        """The CD table of its own, which the NOW profile has."""
        return None if self._master is None else self._master.own_table

    @property
    def ssid_bits(self) -> int:
        """Width of the SSIDs that its CD tables can have."""
        return 0 if self._master is None else self._master.ssid_bits

    @property
    def pasids_in_use(self) -> int:
        """CDs that are valid beside that of no PASID."""
        table = self.master.table
        return 0 if table is None else table.used

    @property
    def ats_enabled(self) -> bool:
        """Whether its ATCs are on."""
        return self._master is not None and self._master.ats_enabled

    @property
    def atcs(self) -> list[AtsDevice]:
        """Its ATCs, one for each StreamID, if it has ATS."""
        return [] if self._master is None else self._master.atcs

    @property
    def ats_supported(self) -> bool:
        """Whether it and its SMMU have ATS."""
        return self._master is not None and self._master.has_ats

    @property
    def pri_supported(self) -> bool:
        """Whether it and its SMMU have page requests."""
        return self.pri and self.ats_supported and bool(self.smmu.features.pri)

    @property
    def stall_supported(self) -> bool:
        """Whether its faults stall: it can wait, or the SMMU lets every device wait."""
        return self._master is not None and self._master.stall

    @property
    def aux(self) -> dict[int, PagingDomain]:
        """AUX profile: the auxiliary domains that are attached, by PASID."""
        return {} if self._master is None else aux.attached(self._master)

    @property
    def shares(self) -> list[Mediated]:
        """The mediated devices that have a domain."""
        return [] if self._master is None else shares(self._master)

    @property
    def bonds(self) -> list[Bond]:
        """The address spaces that are bound."""
        return [] if self._master is None else sva.bonds(self)

    # --- probe and release ---

    def _probed(self, iommu: Iommu) -> None:
        """Take its place behind an SMMU; `System.probe` calls it after its checks."""
        features, system = iommu.smmu.features, iommu.system
        ssid_bits, self.max_pasids = iommu.pasids_of(self.pasids)
        self._group = self._wanted_group or Group(system)
        ask = self._ask if self.pri and features.pri else None
        has_ats = self.ats and features.ats
        atcs = [
            AtsDevice(iommu.smmu, sid, on_page_request=ask) for sid in self.sids if has_ats
        ]
        self._master = Master(self, iommu, ssid_bits, atcs)
        self.pasid_enabled = self.max_pasids > 0

    def _unprobed(self) -> None:
        """Leave its place behind an SMMU; nothing is attached."""
        master = self._master
        if master is not None:
            for atc in master.atcs:
                master.iommu.smmu.devices.pop(atc.sid, None)
        self.pasid_enabled = False
        self.max_pasids = 0
        self._group = self._master = None

    def _rejoin(self) -> None:
        """Be known to an SMMU that was made again."""
        for atc in self.atcs:
            atc.on_page_request = self._ask if self.pri_supported else None
            self.smmu.devices[atc.sid] = atc

    def _ask(self, request: object) -> None:
        """A page request was made: the operating system is interrupted."""
        self.system.service()

    def release(self) -> None:
        """Take the device away: everything is detached, its streams abort, its tables are freed.

        What a host's callback raises on the way is raised when the device is gone.  Where the
        host's memory refuses a store, the device stays with what could not be taken from it, and
        another call goes on.
        """
        group = self.group
        with group.system.lock as lock:
            master = self.master
            for handle in [one.handle for one in master.attachments.values()]:
                if handle is not None:
                    lock.defer(handle.release, self)
            alone = not any(one.max_pasids for one in group.devices if one is not self)
            for ssid, one in list(master.attachments.items()):
                if not ssid or (one.handle is not None and one.handle.belongs_to(self)):
                    continue
                if alone and not is_auxiliary(one.domain):
                    lock.insist(partial(group.set_pasid, None, ssid, leaving=True))
                else:
                    lock.insist(master.detach_pasid, ssid)
            if any(master.attachments):
                return
            lock.insist(master.attach, BLOCKED)
            if master.domain is not BLOCKED:
                return
            lock.insist(master.drain, None)
            master.iommu.forget(self)
            for viommu in master.iommu.viommus:
                viommu.forget(self)
            master.drop_table()
            group.devices.remove(self)
            if not group.devices:
                lock.insist(group.emptied)
            self._unprobed()
            self.enabled_features.clear()
            self.mm_exit = None

    # --- PCI capabilities ---

    def enable_pasid(self) -> None:
        """Switch PASIDs on.

        Raises
        ------
        InvalidArgument
            ATS is on: PASIDs go on before it (F5).
        """
        if self.ats_enabled:
            raise InvalidArgument("device", self, text="PASIDs go on before ATS, and ATS is on")
        self.pasid_enabled = True

    def disable_pasid(self) -> None:
        """Switch PASIDs off.

        Raises
        ------
        InvalidArgument
            ATS is on: PASIDs go off after it (F5).
        Busy
            PASIDs are attached.
        """
        if self.ats_enabled:
            raise InvalidArgument("device", self, text="PASIDs go off after ATS, and ATS is on")
        if any(self.master.attachments):
            raise Busy("device", self, text="device has PASIDs attached")
        self.pasid_enabled = False

    # --- domains made for this device ---

    def paging_domain(
        self,
        *,
        stage: int | None = None,
        granule: int | None = None,
        nest_parent: bool = False,
        dirty: bool = False,
        pasid: bool = False,
        contiguous: bool = False,
        user_data: object = None,
    ) -> PagingDomain:
        """Make a paging domain for this device's SMMU (domain_alloc_paging_flags).

        Parameters
        ----------
        stage : int, optional
            1 or 2; stage 1 if the SMMU has it and nothing asks for stage 2.
        granule : int, optional
            4096, 16384 or 65536; the smallest that the SMMU has.
        nest_parent : bool
            Stage 2, below which guests may have their own stage 1.
        dirty : bool
            Stage 1 with hardware dirty state: `read_dirty` tells what was written.
        pasid : bool
            It must be possible to attach it to a PASID: stage 1.
        contiguous : bool
            Set contiguous hints.

        Raises
        ------
        NotSupported
            The SMMU or the stage cannot do it (F8).
        OutOfMemory, Busy
            No table, no ASID or VMID is left.
        """
        with self.system.lock:
            return paging_domain(
                self.iommu, stage=stage, granule=granule, nest_parent=nest_parent, dirty=dirty,
                pasid=pasid, contiguous=contiguous, user_data=user_data,
            )  # fmt: skip

    # --- the main domain ---

    def _alone(self) -> Group:
        group = self.group
        if len(group.devices) != 1:
            raise InvalidArgument(
                "device", self,
                text=f"device shares its group with {len(group.devices) - 1} others",
            )  # fmt: skip
        return group

    def attach(self, domain: Domain) -> None:
        """Attach the device's main domain (iommu_attach_device).

        Raises
        ------
        NoDevice, NoEntry
            It has no group, or no StreamID.
        InvalidArgument
            It shares its group; or the domain is not for this device (soft: try another).
        Busy
            The current domain is neither the default nor a blocking one, or PASIDs are in use
            that the new domain cannot carry.
        WrongSmmu
            AUX profile: the domain lives on another SMMU.
        OutOfMemory
            No page is left for a CD table.
        """
        group = self.group
        with group.system.lock:
            self._alone().attach(domain)

    def detach(self, domain: Domain) -> None:
        """Put the default domain back, as `Group.detach`."""
        group = self.group
        with group.system.lock:
            if len(group.devices) != 1:
                warnings.warn("device shares its group: nothing was detached", stacklevel=2)
                return
            group.detach(domain)

    def replace(self, domain: Domain) -> None:
        """Attach another main domain in place of any other (iommu_group_replace_domain)."""
        group = self.group
        with group.system.lock:
            group.check_reset()
            group.set(domain)

    # --- PASIDs, NOW profile ---

    @property
    def why_no_pasids(self) -> str:
        """Why `max_pasids` is 0: the policy and the widths, if it is the policy's doing."""
        return self.iommu.why_no_pasids(self.pasids)

    def alloc_pasid(self) -> int:
        """Take a PASID that is nobody else's, to attach it (iommu_alloc_global_pasid).

        Raises
        ------
        NoSpace
            None is left, or the device has none (ENOSPC).
        NotSupported
            The AUX profile: a domain owns its PASID there.
        """
        system = self.group.system
        with system.lock:
            need(system.profile, NOW, "alloc_pasid")
            if not self.max_pasids:
                raise NoSpace("device", self, text=f"device: {self.why_no_pasids}")
            return take_pasid(self, 1, self.max_pasids - 1, self)

    def free_pasid(self, pasid: SupportsIndex) -> None:
        """Give back what `alloc_pasid` took (iommu_free_global_pasid).

        While it is attached, nobody gets it.

        Raises
        ------
        NoEntry
            It is not allocated.
        InvalidArgument
            It is a process's, or another device's.
        """
        system = self.group.system
        with system.lock:
            pasid = integer("pasid", pasid)
            if system.pasids.find(pasid) is not self:
                text = f"pasid {pasid:#x} was not allocated by the device"
                raise InvalidArgument("pasid", pasid, text=text)
            system.give_pasid(pasid)

    def attach_pasid(
        self, domain: Domain, pasid: SupportsIndex, handle: AttachHandle | None = None
    ) -> None:
        """Attach a PASID of the device, and of its group, to a domain (iommu_attach_device_pasid).

        Parameters
        ----------
        domain : Domain
            A stage-1 paging domain of this SMMU, or an SVA domain.
        pasid : int
            1 to ``max_pasids - 1``, chosen by the caller.
        handle : AttachHandle, optional
            Found again by `handle`.

        Raises
        ------
        NoDevice
            No group (ENODEV).
        NotSupported
            No PASID can have such a domain; or the AUX profile (EOPNOTSUPP).
        InvalidArgument
            PASID out of range, another SMMU, stage 2, or a main domain without a CD table of ours.
        Busy
            The PASID is in use, by a process or otherwise, or the device is being reset.
        OutOfMemory
            No page is left for CDs.
        """
        group = self.group
        with group.system.lock:
            need(group.system.profile, NOW, "attach_pasid")
            pasid = integer("pasid", pasid)
            group.check_pasid(domain_of(domain), pasid)
            if group.attachment(pasid) is not None:
                raise Busy("pasid", pasid, text=f"pasid {pasid:#x} is in use")
            if handle is not None:
                instance("handle", handle, AttachHandle)
            if handle is not None and handle.domain is not None:
                raise InvalidArgument("handle", handle, text="handle is in use")
            group.set_pasid(domain, pasid, handle)

    def replace_pasid(
        self, domain: Domain, pasid: SupportsIndex, handle: AttachHandle | None
    ) -> None:
        """Attach a PASID to another domain, without a moment between (iommu_replace_device_pasid).

        Raises
        ------
        InvalidArgument
            Nothing is attached there, pasid is 0, or handle is None or in use; else as
            `attach_pasid`.
        """
        group = self.group
        with group.system.lock:
            need(group.system.profile, NOW, "replace_pasid")
            pasid = integer("pasid", pasid)
            group.check_pasid(domain_of(domain), pasid)
            if handle is not None:
                instance("handle", handle, AttachHandle)
            if handle is None or handle.domain is not None:
                raise InvalidArgument("handle", handle, text="handle is missing or in use")
            held = group.attachment(pasid)
            if held is None:
                raise InvalidArgument("pasid", pasid, text=f"pasid {pasid:#x} is not attached")
            if held.handle is not None:
                held.handle.check_detach(pasid)
            group.set_pasid(domain, pasid, handle)

    def detach_pasid(self, domain: Domain, pasid: SupportsIndex) -> None:
        """Block a PASID again (iommu_detach_device_pasid).

        Raises
        ------
        InvalidArgument
            Nothing, or another domain, is attached there.
        """
        group = self.group
        with group.system.lock:
            need(group.system.profile, NOW, "detach_pasid")
            pasid = integer("pasid", pasid)
            held = group.attachment(pasid)
            if held is None or held.domain is not domain:
                raise InvalidArgument(
                    "domain", domain, text=f"domain is not attached to pasid {pasid:#x}: {domain!r}"
                )
            if held.handle is not None:
                held.handle.check_detach(pasid)
            group.set_pasid(None, pasid)

    def handle(self, pasid: SupportsIndex, kind: str | None = None) -> AttachHandle | Domain:
        """Find what is attached to a PASID (iommu_attach_handle_get).

        Returns
        -------
        AttachHandle or Domain
            The handle that came with the PASID, or its domain.

        Raises
        ------
        NoEntry
            Nothing is attached there (ENOENT).
        Busy
            Its domain is not of that kind (EBUSY).
        """
        group = self.group
        pasid = integer("pasid", pasid)
        held = group.attachment(pasid)
        if held is None:
            raise NoEntry("pasid", pasid, text=f"pasid {pasid:#x} is not attached")
        if kind is not None and held.domain.kind != kind:
            raise Busy("kind", kind, text=f"pasid {pasid:#x} has {held.domain!r}, not {kind}")
        return held.handle or held.domain

    # --- features, AUX profile ---

    def has_feature(self, feature: str) -> bool:
        """Whether the device and its SMMU have a feature: "AUX", "SVA" or "IOPF"; never an error.

        Without an SMMU the answer is False.
        """
        return aux.has_feature(self, feature)

    def feature_enabled(self, feature: str) -> bool:
        """Whether a feature was enabled."""
        return feature in self.enabled_features

    def enable_feature(self, feature: str, *, min_pasid: int = 0, max_pasid: int = 0) -> None:
        """Enable a feature (iommu_dev_enable_feature), with limits for its PASIDs.

        Parameters
        ----------
        feature : str
            "AUX", "SVA" or "IOPF".
        min_pasid, max_pasid : int
            Smallest and largest PASID to use; 0: what device and policy allow.  Wider limits are
            clipped.

        Raises
        ------
        NoDevice
            Device or SMMU do not have it (ENODEV).
        Busy
            It is enabled (EBUSY).
        InvalidArgument
            There is no such feature, or max_pasid is below min_pasid.
        """
        aux.enable_feature(self, feature, min_pasid, max_pasid)

    def disable_feature(self, feature: str) -> None:
        """Disable a feature (iommu_dev_disable_feature).

        Raises
        ------
        InvalidArgument
            It is not enabled.
        Busy
            Auxiliary domains are attached, or address spaces are bound.
        """
        aux.disable_feature(self, feature)

    def init(
        self,
        features: Iterable[str] = (),
        *,
        min_pasid: int = 0,
        max_pasid: int = 0,
        mm_exit: Callable[[object], object] | None = None,
    ) -> None:
        """Enable SVA, and what else is named, as the 2018 proposal did (iommu_sva_init_device).

        Parameters
        ----------
        features : iterable of str
            Beside SVA: "AUX", "IOPF".
        min_pasid, max_pasid : int
            As for `enable_feature`.
        mm_exit : callable, optional
            Called with the address space when it ends while it is bound.

        Raises
        ------
        Exists
            It was called before (EEXIST).
        InvalidArgument
            An unknown feature, or limits without a PASID between them.
        NoDevice
            The device does not have it (ENODEV).
        """
        aux.init(self, features, min_pasid, max_pasid, mm_exit)

    def shutdown(self) -> None:
        """Undo `init`: what is bound or attached as auxiliary goes; twice is once."""
        aux.shutdown(self)

    # --- auxiliary domains, AUX profile ---

    def attach_aux(self, domain: Domain) -> None:
        """Attach an auxiliary domain: one more address space, under one PASID that it owns.

        The first attach takes the PASID, the ASID and the page table, and writes the CD into the
        CD table of the device's main domain, its parent.  Every device of the parent can use the
        PASID from then on.

        Raises
        ------
        InvalidArgument
            AUX is not enabled; no main domain of stage 1; the domain was attached as a main
            domain, has another parent, or is no stage-1 paging domain; no PASID is left.
        Busy
            It is attached to this device; or no ASID is left.
        PasidOverflow
            Its PASID is beyond this device's limit.
        OutOfMemory
            No page is left.
        """
        aux.attach(self, domain)

    def detach_aux(self, domain: Domain) -> None:
        """Detach an auxiliary domain; the last device clears the CD and invalidates.

        Raises
        ------
        InvalidArgument
            It is not attached to this device.
        """
        aux.detach(self, domain)

    # --- SVA and mediated devices ---

    def bind(self, space: AddressSpace) -> Bond:
        """Bind a process's address space: `smmufast.iommu.sva.bind`."""
        return sva.bind(self, space)

    def mediated(self) -> Mediated:
        """Make a mediated device: a share of this one, with an address space of its own."""
        return Mediated(self)

    # --- I/O page faults (F64) ---

    def enable_iopf(self) -> None:
        """Let faults of the device be resolved by software; counted.

        Raises
        ------
        NotSupported
            The system has none, or the device has several StreamIDs (EOPNOTSUPP).
        """
        if not self.stall_supported:
            return  # nothing to do: PRI, or no faults that wait
        if not self.system.iopf:
            raise NotSupported("device", self, text="the system has no I/O page faults")
        if len(self.sids) > 1:
            raise NotSupported("device", self, text="device has several StreamIDs")
        self.iopf_users += 1

    def disable_iopf(self) -> None:
        """Count one use less; InvalidArgument if there is none."""
        if not self.stall_supported:
            return
        if not self.iopf_users:
            raise InvalidArgument("device", self, text="I/O page faults are not enabled")
        self.iopf_users -= 1

    # --- reset (F24) ---

    def reset_prepare(self) -> None:
        """Block the device's accesses, with and without PASID, until `reset_done`.

        Raises
        ------
        Busy
            It is being reset, shares its group, or has auxiliary domains.
        """
        group = self.group
        with group.system.lock:
            if group.resetting or len(group.devices) != 1:
                raise Busy("device", self, text="device is being reset, or shares its group")
            if self.aux:
                raise Busy("device", self, text="device has auxiliary domains attached")
            self.master.block()

    def reset_done(self) -> None:
        """Give back what `reset_prepare` blocked; InvalidArgument if that was not called."""
        group = self.group
        with group.system.lock:
            if not self.master.blocked:
                raise InvalidArgument("device", self, text="device is not being reset")
            self.master.unblock()

    # --- what the device does ---

    def _request(
        self, pasid: SupportsIndex | None, sid: SupportsIndex | None
    ) -> tuple[Smmu, int, int | None]:
        """The SMMU, StreamID and SSID of an access."""
        one = self.sids[0] if sid is None else integer("sid", sid)
        if one not in self.sids:
            raise InvalidArgument("sid", one, text=f"sid {one:#x} is not one of the device's")
        if pasid is None:
            return self.smmu, one, None
        if self.pasids and not self.pasid_enabled:
            raise InvalidArgument("pasid", pasid, text="PASIDs are off in the device")
        return self.smmu, one, integer("pasid", pasid)

    def translate(
        self,
        iova: SupportsIndex,
        *,
        pasid: SupportsIndex | None = None,
        write: bool = False,
        priv: bool = False,
        instr: bool = False,
        sid: SupportsIndex | None = None,
    ) -> Result:
        """Make one access; a fault that software resolves is resolved first.

        Parameters
        ----------
        iova : int
            Untranslated address.
        pasid : int, optional
        write, priv, instr : bool
        sid : int, optional
            One of `sids`; the first.

        Returns
        -------
        Result
            Of `Smmu.translate`, or of the stalled access after it was resumed.

        Raises
        ------
        InvalidArgument
            A StreamID of another device, or a PASID while PASIDs are off.
        """
        smmu, one, ssid = self._request(pasid, sid)
        while True:
            result = smmu.translate(one, iova, ssid=ssid, write=write, priv=priv, instr=instr)
            if result.action != "stall":
                break
            stall = next((s for s in smmu.stalls if (s.sid, s.stag) == (one, result.stag)), None)
            if stall is None:
                continue  # another thread has handled it
            self.system.service()
            return stall.result if stall.done and stall.result is not None else result
        if result.event is not None:
            self.system.service()
        return result

    def access(
        self,
        iova: SupportsIndex,
        *,
        pasid: SupportsIndex | None = None,
        write: bool = False,
        instr: bool = False,
        priv: bool = False,
    ) -> Result:
        """Make one access through the device's ATC, where ATS is on; else `translate`.

        Raises
        ------
        AtsFault
            No translation permits it.
        InvalidArgument
            A PASID while PASIDs are off.
        """
        if not self.ats_enabled:
            return self.translate(iova, pasid=pasid, write=write, priv=priv, instr=instr)
        _, _, ssid = self._request(pasid, None)
        return self.atcs[0].access(iova, ssid=ssid, write=write, execute=instr, priv=priv)

    def translate_batch(
        self,
        iova: Any,
        *,
        pasid: Any = None,
        sid: SupportsIndex | None = None,
        **more: Any,
    ) -> Any:
        """Make many accesses at once: `Smmu.translate_batch` with the device's StreamID.

        Parameters
        ----------
        iova : array_like of int
        pasid : int or array_like of int, optional
        sid : int, optional
            One of `sids`; the first.
        **more
            The other arguments of `Smmu.translate_batch`.

        Returns
        -------
        ndarray
            As `Smmu.translate_batch`.  Events wait in the queue for `System.service`.
        """
        plain = isinstance(pasid, SupportsIndex)
        smmu, one, ssid = self._request(pasid if plain else None, sid)
        if pasid is not None and not plain:
            self._request(0, sid)
            ssid = pasid
        return smmu.translate_batch(one, iova, ssid=ssid, **more)

    def translate_range(
        self,
        iova: SupportsIndex,
        size: SupportsIndex,
        *,
        pasid: SupportsIndex | None = None,
        sid: SupportsIndex | None = None,
        **more: Any,
    ) -> Segments:
        """Translate a range of addresses: `Smmu.translate_range` with the device's StreamID."""
        smmu, one, ssid = self._request(pasid, sid)
        return smmu.translate_range(one, iova, size, ssid=ssid, **more)

    def start_walk(
        self,
        iova: SupportsIndex,
        *,
        pasid: SupportsIndex | None = None,
        sid: SupportsIndex | None = None,
        **more: Any,
    ) -> Walk:
        """Begin an access whose fetches the caller answers: `Smmu.start_walk`."""
        smmu, one, ssid = self._request(pasid, sid)
        return smmu.start_walk(one, iova, ssid=ssid, **more)

    def draw(self, *, limit: SupportsIndex = 16) -> str:
        """Draw what its STEs lead to: CD tables, CDs, page tables, as they are in memory.

        Parameters
        ----------
        limit : int
            Lines below one table; what is beyond is counted in the last one.

        Returns
        -------
        str
            Lines of text.

        Raises
        ------
        NoDevice
            It was not probed.
        InvalidArgument
            The limit is below 1.

        Notes
        -----
        Nothing but memory is read: see `smmufast.iommu.draw`.
        """
        return draw(((self.iommu, sid) for sid in self.sids), limit)

    def _repr_html_(self) -> str:
        from smmufast._html import picture

        streams = () if self._master is None else ((self.iommu, sid) for sid in self.sids)
        return picture(self, streams)

    def __repr__(self) -> str:
        """Its streams, PASIDs and main domain."""
        sids = ", ".join(f"{sid:#x}" for sid in self.sids)
        if self._master is None:
            return f"<Device sid {sids}, not probed>"
        return f"<Device sid {sids}: {self.max_pasids} PASIDs, {self.domain!r}>"

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Refuse copies: a device is one thing, which a system knows."""
        raise WrongType("device", self, text=f"{self!r} is part of a system: it has no copies")
