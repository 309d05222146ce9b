"""Devices: attach, detach, replace, PASIDs, auxiliary domains.

The order of an attach is that of F67: the new domain learns where it will be cached, ATS goes off
if it must, CD and STE are written, ATS comes on or is flushed, and the old domain forgets.
Checks and allocations come before the first store, so that what is refused changes nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Final, SupportsIndex

from smmufast.ats import AtsDevice
from smmufast.errors import (
    Busy,
    Exists,
    InvalidArgument,
    NoDevice,
    NoEntry,
    NoSpace,
    NotSupported,
    PasidOverflow,
    WrongSmmu,
    instance,
    integer,
)
from smmufast.iommu.domain import (
    BLOCKED,
    IDENTITY,
    Domain,
    NestedDomain,
    PagingDomain,
    SvaDomain,
    Words,
    domain_of,
    no_pasid_op,
)
from smmufast.iommu.draw import draw
from smmufast.iommu.group import NO_PASID, AttachHandle, Group
from smmufast.iommu.mediated import Mediated
from smmufast.iommu.smmu import entry
from smmufast.iommu.smmu.cdtable import INVALID_CD, CdTable
from smmufast.iommu.smmu.invalidations import ATS, ATS_FULL
from smmufast.iommu.undo import Undo

if TYPE_CHECKING:
    from collections.abc import Callable

    from smmufast._smmu import Result
    from smmufast.iommu.smmu.iommu import Iommu
    from smmufast.iommu.sva import AddressSpace, Bond
    from smmufast.iommu.system import System

FEATURES: Final = ("AUX", "SVA", "IOPF")


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
        self._iommu: Iommu | None = None
        self._group: Group | None = None
        self.domain: Domain = BLOCKED
        self.ssid_bits = 0
        self.max_pasids = 0
        self.pasid_enabled = False
        self.ats_enabled = False
        self.cd_table: CdTable | None = None
        self.atcs: list[AtsDevice] = []
        self.enabled_features: dict[str, tuple[int, int]] = {}
        self.aux: dict[int, PagingDomain] = {}
        self.shares: list[Mediated] = []  # those with a domain
        self.iopf_users = 0
        self.mm_exit: Callable[[object], object] | None = None

    # --- probe and release ---

    @property
    def iommu(self) -> Iommu:
        """The driver of its SMMU; NoDevice (ENODEV) before it is probed."""
        if self._iommu is None:
            raise NoDevice("device", self, text="device was not probed")
        return self._iommu

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

    def probed(self, iommu: Iommu) -> None:
        """Take its place behind an SMMU; `System.probe` calls it after its checks."""
        features = iommu.smmu.features
        bits = max(self.pasids.bit_length() - 1, 0)
        self.ssid_bits = min(bits, iommu.ssid_bits)
        own = min(self.pasids, 1 << iommu.ssid_bits) if self.ssid_bits else 0
        self.max_pasids = iommu.system.pasids.max_pasids(own)
        if not self.max_pasids:
            self.ssid_bits = 0
        self._iommu = iommu
        system = iommu.system
        group = self._wanted_group
        self._group = group if group is not None else Group(system)
        self.ats_supported = bool(self.ats and features.ats)
        self.pri_supported = bool(self.pri and self.ats_supported and features.pri)
        self.stall_supported = bool(self.stall and iommu.can_stall)
        if self.max_pasids:
            self.enable_pasid()
        if self.ats_supported:
            ask = self._ask if self.pri_supported else None
            self.atcs = [AtsDevice(iommu.smmu, sid, on_page_request=ask) for sid in self.sids]

    def unprobed(self) -> None:
        """Leave its place behind an SMMU; nothing is attached."""
        if self._iommu is not None:
            for atc in self.atcs:
                self._iommu.smmu.devices.pop(atc.sid, None)
            waiting = self._iommu.page_requests
            for key in [key for key in waiting if key[0] in self.sids]:
                del waiting[key]  # of groups whose last request never came
        self.atcs.clear()
        self.pasid_enabled = False
        self._group = self._iommu = None

    def _ask(self, request: object) -> None:
        """A page request was made: the operating system is interrupted."""
        self.system.service()

    def release(self) -> None:
        """Take the device away: everything is detached, its streams abort, its tables are freed."""
        with self.system.lock:
            group, iommu = self.group, self.iommu
            if group.resetting:
                self.reset_done()
            for bond in list(iommu.system.bonds_of(self)):
                bond.unbind(force=True)
            for share in list(self.shares):
                share.detach()
            for aux in list(self.aux.values()):
                self.detach_aux(aux)
            for pasid in list(group.pasids) if len(group.devices) == 1 else []:
                group.set_pasid(None, pasid)
                del group.pasids[pasid]
            if len(group.devices) > 1 and self.max_pasids:
                for pasid in group.pasids:
                    self.install_pasid(None, pasid, group.at(pasid))
            self.reinstall(BLOCKED)
            if self.pasid_enabled:
                self.disable_pasid()
            self.drop_table()
            iommu.forget(self)
            group.devices.remove(self)
            if not group.devices:
                group.domain = group.default
            self.unprobed()
            self.enabled_features.clear()

    def drop_table(self) -> None:
        """Free the device's own CD table, if nothing is in it."""
        table = self.cd_table
        if table is not None and not table.used:
            table.free()
            self.cd_table = None

    # --- PCI capabilities ---

    def enable_pasid(self) -> None:
        """Switch PASIDs on; not while ATS is on (F5, EINVAL)."""
        if self.ats_enabled:
            raise InvalidArgument("device", self, text="PASIDs go on before ATS, and ATS is on")
        self.pasid_enabled = True

    def disable_pasid(self) -> None:
        """Switch PASIDs off; not while ATS is on (F5, EINVAL)."""
        if self.ats_enabled:
            raise InvalidArgument("device", self, text="PASIDs go off after ATS, and ATS is on")
        self.pasid_enabled = False

    # S3.9.2-2
    def _ats_on(self) -> None:
        for sid in self.sids:
            self.iommu.invalidate_atc(sid)
        self.iommu.queue.sync()
        self.ats_enabled = True

    def _ats_off(self) -> None:
        self.ats_enabled = False
        for atc in self.atcs:
            atc.clear()

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
            return self.iommu.paging_domain(
                stage=stage, granule=granule, nest_parent=nest_parent, dirty=dirty, pasid=pasid,
                contiguous=contiguous, user_data=user_data,
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
            group.set(domain_of(domain))

    def _check_main(self, domain: Domain) -> None:
        """Refuse a main domain that this device cannot have; nothing is changed."""
        iommu = self.iommu
        aux = iommu.system.profile.aux
        if aux and self.aux:
            raise Busy("device", self, text="device has auxiliary domains under its main domain")
        if aux and "SVA" in self.enabled_features:
            raise Busy("device", self, text="device has SVA enabled under its main domain")
        if isinstance(domain, PagingDomain):
            if aux and domain.mode == "aux":
                raise InvalidArgument(
                    "domain", domain, text="domain was attached as auxiliary, and stays so"
                )
            if domain.iommu is not None and domain.iommu is not iommu:
                wrong = WrongSmmu if aux else InvalidArgument
                raise wrong("domain", domain, text="domain lives on another SMMU")
            if domain.coherent_only and not self.coherent:
                raise InvalidArgument(
                    "device", self, text="domain enforces coherence, and the device cannot snoop"
                )
            if domain.stage == 2 and self.pasids_in_use:
                raise Busy("device", self, text="device has PASIDs attached: stage 2 carries none")
            table = domain.cd_table
            if table is not None and table.s1cdmax != self.ssid_bits:
                raise InvalidArgument(
                    "device", self,
                    text=f"device has {self.ssid_bits}-bit PASIDs, the domain's CD table "
                    f"{table.s1cdmax}-bit ones",
                )  # fmt: skip
        elif isinstance(domain, NestedDomain):
            if domain.iommu is not iommu:
                raise InvalidArgument("domain", domain, text="domain lives on another SMMU")
            if domain.parent.freed:
                raise InvalidArgument("domain", domain, text="the domain's parent was freed")
            if self.pasids_in_use:
                raise Busy("device", self, text="device has PASIDs attached: its CD table is ours")
        elif domain.kind not in ("identity", "blocked"):
            raise InvalidArgument("domain", domain, text=f"domain is {domain.kind}")
        elif domain is BLOCKED and self.direct:
            raise InvalidArgument(
                "domain", domain, text="firmware wants memory of this device mapped one to one"
            )

    @property
    def pasids_in_use(self) -> int:
        """CDs that are valid beside that of no PASID."""
        table = self._table()
        return table.used if table is not None else 0

    def _table(self) -> CdTable | None:
        """The CD table that its STE points to, or would."""
        if self.iommu.system.profile.aux:
            domain = self.domain
            return domain.cd_table if isinstance(domain, PagingDomain) else None
        return self.cd_table

    def own_table(self) -> CdTable:
        """Return the device's own CD table; it is allocated when first needed."""
        if self.cd_table is None:
            self.cd_table = CdTable(self.iommu, self.ssid_bits)
            self.cd_table.devices.append(self)
        return self.cd_table

    def _ste(self, domain: Domain, table: CdTable | None, ats: bool) -> Words:
        """The STE of a main domain, with the PASIDs that are in use."""
        iommu = self.iommu
        if isinstance(domain, PagingDomain) and domain.stage == 2:
            return entry.ste_stage2(
                domain, domain.vmid, stall=self.stall_supported, ats=ats,
                features=iommu.smmu.features,
            )  # fmt: skip
        if isinstance(domain, NestedDomain):
            return entry.ste_nested(
                domain.parent, domain.parent.vmid, domain.ste, stall=self.stall_supported,
                ats=self.ats_supported, features=iommu.smmu.features,
            )  # fmt: skip
        if domain.kind in ("identity", "blocked") and (table is None or not table.used):
            return (
                entry.ste_bypass(features=iommu.smmu.features)
                if domain is IDENTITY
                else entry.ste_abort()
            )
        assert table is not None
        s1dss = {"identity": 1, "blocked": 0}.get(domain.kind, 2)
        return entry.ste_cd_table(
            table.base, fmt=table.fmt, s1cdmax=table.s1cdmax, s1dss=s1dss, ats=ats,
            stall=self.stall_supported, e2h=iommu.e2h, features=iommu.smmu.features,
        )  # fmt: skip

    def write_ste(self, words: Words, undo: Undo | None = None) -> None:
        """Make the STE of each of its streams what is given, through the entry writer.

        `undo`, if given, gets what makes it what it was.
        """
        iommu = self.iommu
        for sid in self.sids:
            address = iommu.ste_address(sid)
            if undo is not None:
                before = iommu.writer.read(address)
                undo.add(partial(iommu.writer.write_ste, address, before, sid))
            iommu.writer.write_ste(address, words, sid)

    def install(self, domain: Domain) -> None:
        """Attach the main domain: the driver's part, for this device alone."""
        with Undo() as undo:
            self.reserve(domain, undo)
            self.reinstall(domain)

    def reserve(self, domain: Domain, undo: Undo) -> None:
        """Check a main domain, and allocate what it needs here, before anything is written.

        Parameters
        ----------
        domain : Domain
        undo : Undo
            Gets what takes the allocations back.
        """
        self._check_main(domain)
        if not isinstance(domain, PagingDomain):
            return
        iommu = self.iommu
        if domain.iommu is None:
            domain.finalise(iommu)
            undo.add(domain.unfinalise)
        if domain.stage == 1:
            if not iommu.system.profile.aux:
                table = self._reserve_table(undo)
            elif domain.cd_table is None:
                table = domain.cd_table = CdTable(iommu, self.ssid_bits)
                undo.add(domain.drop_table)
            else:
                table = domain.cd_table
            if table.reserve(0):
                undo.add(partial(table.unreserve, 0))

    def _reserve_table(self, undo: Undo) -> CdTable:
        if self.cd_table is None:
            undo.add(self.drop_table)
        return self.own_table()

    def reinstall(self, domain: Domain) -> None:
        """Attach a main domain that needs no check and no page any more."""
        iommu = self.iommu
        aux = iommu.system.profile.aux
        old = self.domain
        table = None if aux else self.cd_table
        if aux and isinstance(domain, PagingDomain) and domain.stage == 1:
            table = domain.cd_table
            assert table is not None
            if not table.devices:
                table.write(0, domain.cd(self.stall_supported))
        in_table = table is not None and table.used > 0 and domain.kind in ("identity", "blocked")
        ats = self.ats_supported and (
            in_table
            or isinstance(domain, PagingDomain)
            or (isinstance(domain, NestedDomain) and domain.ats)
        )
        with Undo() as undo:
            self._enter(domain, NO_PASID, undo)
            if aux and isinstance(domain, PagingDomain) and table is not None:
                table.devices.append(self)
                undo.add(partial(table.devices.remove, self))
                for child in domain.children.values():
                    if child.users:
                        self._enter_atcs(child, child.aux_pasid)
                        undo.add(partial(self._leave_atcs, child, child.aux_pasid))
            undo.add(partial(setattr, self, "ats_enabled", self.ats_enabled))
            if self.ats_enabled and not ats:
                self._ats_off()
            if domain.stage == 1 and not aux:
                assert table is not None and isinstance(domain, PagingDomain)
                table.write(0, domain.cd(self.stall_supported), undo)
            self.write_ste(self._ste(domain, table, ats), undo)
            if not aux and domain.stage != 1 and self.cd_table is not None:
                self.cd_table.write(0, INVALID_CD, undo)
            if ats and not self.ats_enabled:
                self._ats_on()
            elif ats:
                for sid in self.sids:
                    iommu.invalidate_atc(sid)
                iommu.queue.sync()
        if isinstance(domain, PagingDomain):
            domain.mode = domain.mode or "main"
        if aux and isinstance(old, PagingDomain) and old.cd_table is not None:
            for child in old.children.values():
                if child.users:
                    self._leave_atcs(child, child.aux_pasid)
            old.cd_table.devices.remove(self)
        self.domain = domain
        self._leave(old, NO_PASID)

    # --- where a domain may be cached ---

    def _enter(self, domain: Domain, pasid: int, undo: Undo) -> None:
        """Let a domain know that this device, with this PASID, may cache it."""
        undo.add(partial(self._leave, domain, pasid))
        cached = domain
        if isinstance(domain, NestedDomain):
            domain.users += 1
            cached = domain.parent
            for sid in self.sids:
                cached.guests[sid] = cached.guests.get(sid, 0) + 1
        if not isinstance(cached, PagingDomain | SvaDomain):
            return
        for kind, number in cached.tags:
            cached.invalidations.insert(self.iommu.queue, kind, number, 0)
        self._enter_atcs(cached, pasid, ATS if cached is domain else ATS_FULL)
        cached.users += 1
        cached.active = cached.cached = True

    def _leave(self, domain: Domain, pasid: int) -> None:
        """Let a domain forget this device; what it filled under the domain's tag goes."""
        cached = domain
        if isinstance(domain, NestedDomain):
            domain.users -= 1
            cached = domain.parent
            for sid in self.sids:
                cached.guests[sid] -= 1
                if not cached.guests[sid]:
                    del cached.guests[sid]
        if not isinstance(cached, PagingDomain | SvaDomain):
            return
        for kind, number in cached.tags:
            cached.invalidations.remove(self.iommu.queue, kind, number, 0)
        self._leave_atcs(cached, pasid, ATS if cached is domain else ATS_FULL)
        cached.users -= 1
        cached.active = cached.users > 0
        # the change is done: what goes wrong now is raised when the call is
        self.iommu.system.lock.defer(cached.flush_tag)

    def _enter_atcs(self, domain: PagingDomain | SvaDomain, pasid: int, kind: int = ATS) -> None:
        for sid in self.sids if self.ats_supported else ():
            domain.invalidations.insert(self.iommu.queue, kind, sid, pasid)

    def _leave_atcs(self, domain: PagingDomain | SvaDomain, pasid: int, kind: int = ATS) -> None:
        for sid in self.sids if self.ats_supported else ():
            domain.invalidations.remove(self.iommu.queue, kind, sid, pasid)

    # --- PASIDs, NOW profile ---

    def _now(self) -> Group:
        if self.iommu.system.profile.aux:
            raise NotSupported(
                "profile", "AUX", text="the AUX profile has no PASIDs that a caller chooses"
            )
        return self.group

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
            self._now()
            pasid = integer("pasid", pasid)
            group.check_pasid(domain_of(domain), pasid)
            if pasid in group.pasids:
                raise Busy("pasid", pasid, text=f"pasid {pasid:#x} is in use")
            if handle is not None:
                instance("handle", handle, AttachHandle)
            if handle is not None and handle.domain is not None:
                raise InvalidArgument("handle", handle, text="handle is in use")
            group.set_pasid(domain, pasid)
            if handle is None:
                group.pasids[pasid] = domain
            else:
                handle.domain = domain
                group.pasids[pasid] = handle

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
            self._now()
            pasid = integer("pasid", pasid)
            group.check_pasid(domain_of(domain), pasid)
            if handle is not None:
                instance("handle", handle, AttachHandle)
            if handle is None or handle.domain is not None:
                raise InvalidArgument("handle", handle, text="handle is missing or in use")
            held = group.pasids.get(pasid)
            if held is None:
                raise InvalidArgument("pasid", pasid, text=f"pasid {pasid:#x} is not attached")
            self._not_bound(pasid)
            if group.at(pasid) is not domain:
                group.set_pasid(domain, pasid)
            if isinstance(held, AttachHandle):
                held.domain = None
            handle.domain = domain
            group.pasids[pasid] = handle

    def detach_pasid(self, domain: Domain, pasid: SupportsIndex) -> None:
        """Block a PASID again (iommu_detach_device_pasid).

        Raises
        ------
        InvalidArgument
            Nothing, or another domain, is attached there.
        """
        group = self.group
        with group.system.lock:
            self._now()
            pasid = integer("pasid", pasid)
            held = group.pasids.get(pasid)
            if held is None or group.at(pasid) is not domain:
                raise InvalidArgument(
                    "domain", domain, text=f"domain: pasid {pasid:#x} is not attached to {domain!r}"
                )
            self._not_bound(pasid)
            group.set_pasid(None, pasid)
            if isinstance(held, AttachHandle):
                held.domain = None
            del group.pasids[pasid]

    def _not_bound(self, pasid: int) -> None:
        domain = self.group.at(pasid)
        if isinstance(domain, SvaDomain):
            raise Busy("pasid", pasid, text=f"pasid {pasid:#x} is bound to {domain.space!r}")

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
        held = group.pasids.get(pasid)
        if held is None:
            raise NoEntry("pasid", pasid, text=f"pasid {pasid:#x} is not attached")
        domain = group.at(pasid)
        assert domain is not None
        if kind is not None and domain.kind != kind:
            raise Busy("kind", kind, text=f"pasid {pasid:#x} has {domain!r}, not {kind}")
        return held

    def reserve_pasid(self, domain: Domain, pasid: int, undo: Undo) -> CdTable:
        """Check a domain of a PASID, and have the pages for its CD; as `reserve`."""
        iommu = self.iommu
        if not isinstance(domain, PagingDomain | SvaDomain):
            raise no_pasid_op(domain)
        if domain.iommu is not iommu:
            raise InvalidArgument("domain", domain, text="domain lives on another SMMU")
        if domain.stage != 1:
            raise InvalidArgument("domain", domain, text="domain is stage 2: PASIDs are stage 1")
        if self.domain.stage > 1:
            raise InvalidArgument(
                "device", self, text=f"device has {self.domain!r}: there is no CD table of ours"
            )
        if domain.coherent_only and not self.coherent:
            raise InvalidArgument(
                "device", self, text="domain enforces coherence, and the device cannot snoop"
            )
        if not iommu.system.profile.aux:
            table = self._reserve_table(undo)
        elif (main := self._table()) is None:
            raise InvalidArgument("device", self, text="device has no main domain of stage 1")
        else:
            table = main
        if table.reserve(pasid):
            undo.add(partial(table.unreserve, pasid))
        return table

    def install_pasid(self, domain: Domain | None, pasid: int, old: Domain | None) -> None:
        """Attach a PASID of this device alone, or detach it with None: the driver's part."""
        iommu = self.iommu
        if domain is None:
            table = self._table()
            assert table is not None
            holders = table.holders.get(pasid, 0) if iommu.system.profile.aux else 0
            if holders <= 1:
                table.clear(pasid)
            table.holders.pop(pasid, None)
            if holders > 1:  # other devices of the main domain have it
                table.holders[pasid] = holders - 1
            iommu.system.lock.defer(self._flush_pasid, pasid)
            if old is not None:
                self._leave(old, pasid)
            if not table.used and self.domain.kind in ("identity", "blocked"):
                iommu.system.lock.defer(self._plain_ste)
            return
        assert isinstance(domain, PagingDomain | SvaDomain)
        with Undo() as undo:
            table = self.reserve_pasid(domain, pasid, undo)
            table.place(pasid)
            first = not table.used
            self._enter(domain, pasid, undo)
            undo.add(partial(setattr, self, "ats_enabled", self.ats_enabled))
            table.write(pasid, domain.cd(self.stall_supported), undo)
            if first and self.domain.kind in ("identity", "blocked"):
                self.write_ste(self._ste(self.domain, table, self.ats_supported), undo)
            if self.ats_supported:
                if self.ats_enabled:
                    self._flush_pasid(pasid)
                else:
                    self._ats_on()
        if iommu.system.profile.aux:
            table.holders[pasid] = table.holders.get(pasid, 0) + 1
        if old is not None:
            self._leave(old, pasid)

    def write_cds(self, domain: PagingDomain) -> None:
        """Write the CDs of a domain again, wherever it is attached to this device (NOW)."""
        table = self.cd_table
        if table is None or self.group.resetting:
            return
        words = domain.cd(self.stall_supported)
        if self.domain is domain:
            table.write(0, words)
        for pasid in self.group.pasids if self.max_pasids else ():
            if self.group.at(pasid) is domain:
                table.write(pasid, words)

    def _flush_pasid(self, pasid: int) -> None:
        """Empty the ATCs of one PASID."""
        if self.ats_enabled:
            for sid in self.sids:
                self.iommu.invalidate_atc(sid, pasid)
            self.iommu.queue.sync()

    def _plain_ste(self) -> None:
        """Go back from a CD table with S1DSS to a plain bypass or abort (F26)."""
        if self.ats_enabled:
            for sid in self.sids:
                self.iommu.invalidate_atc(sid)
            self.iommu.queue.sync()
            self._ats_off()
        self.write_ste(self._ste(self.domain, self.cd_table, False))

    # --- features, AUX profile ---

    def _aux_profile(self, what: str) -> Group:
        if not self.iommu.system.profile.aux:
            raise NotSupported("profile", "NOW", text=f"{what} is of the AUX profile")
        return self.group

    def has_feature(self, feature: str) -> bool:
        """Whether the device and its SMMU have a feature: "AUX", "SVA" or "IOPF"; never an error.

        Without an SMMU the answer is False.
        """
        if self._iommu is None or not self._iommu.system.profile.aux:
            return False
        if feature == "IOPF":
            return self.stall_supported or self.pri_supported
        if feature == "SVA":
            return self.max_pasids > 0 and self._iommu.has_sva
        return feature == "AUX" and self.max_pasids > 0

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
        group = self.group
        with group.system.lock:
            self._aux_profile("enable_feature")
            if feature not in FEATURES:
                raise InvalidArgument("feature", feature, '"AUX", "SVA" or "IOPF"')
            if not self.has_feature(feature):
                raise NoDevice("feature", feature, text=f"device has no {feature}")
            if feature in self.enabled_features:
                raise Busy("feature", feature, text=f"{feature} is enabled")
            if feature == "SVA" and self.has_feature("IOPF") and not self.feature_enabled("IOPF"):
                raise InvalidArgument("feature", feature, text="SVA needs IOPF on this device")
            self.enabled_features[feature] = self._limits(min_pasid, max_pasid)

    def _limits(self, min_pasid: int, max_pasid: int) -> tuple[int, int]:
        min_pasid, max_pasid = integer("min_pasid", min_pasid), integer("max_pasid", max_pasid)
        first = max(min_pasid, 1)
        last = min(max_pasid or self.max_pasids - 1, self.max_pasids - 1)
        if min_pasid < 0 or max_pasid < 0 or (self.max_pasids and last < first):
            raise InvalidArgument(
                "max_pasid", max_pasid, text=f"PASIDs {first} to {last} are none: "
                f"1 to {self.max_pasids - 1} allowed",
            )  # fmt: skip
        return first, last

    def disable_feature(self, feature: str) -> None:
        """Disable a feature (iommu_dev_disable_feature).

        Raises
        ------
        InvalidArgument
            It is not enabled.
        Busy
            Auxiliary domains are attached, or address spaces are bound.
        """
        group = self.group
        with group.system.lock:
            self._aux_profile("disable_feature")
            if feature not in self.enabled_features:
                raise InvalidArgument("feature", feature, text=f"{feature} is not enabled")
            if feature == "AUX" and self.aux:
                raise Busy("feature", feature, text=f"{len(self.aux)} auxiliary domains attached")
            if feature == "IOPF" and "SVA" in self.enabled_features:
                raise Busy("feature", feature, text="SVA is enabled, which needs it")
            if feature == "SVA" and group.system.bonds_of(self):
                raise Busy("feature", feature, text="address spaces are bound")
            del self.enabled_features[feature]

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
        group = self.group
        with group.system.lock:
            self._aux_profile("init")
            names = tuple(features)
            for name in names:
                if name not in ("AUX", "IOPF"):
                    raise InvalidArgument("features", name, '"AUX" or "IOPF"')
            if "SVA" in self.enabled_features:
                raise Exists("device", self, text="device was initialised")
            wanted = dict.fromkeys((*names, "SVA"))
            for name in wanted:
                if not self.has_feature(name):
                    raise NoDevice("feature", name, text=f"device has no {name}")
            limits = self._limits(min_pasid, max_pasid)
            self.enabled_features.update(dict.fromkeys(wanted, limits))
            self.mm_exit = mm_exit

    def shutdown(self) -> None:
        """Undo `init`: what is bound or attached as auxiliary goes; twice is once."""
        group = self.group
        with group.system.lock:
            self._aux_profile("shutdown")
            for bond in list(group.system.bonds_of(self)):
                bond.unbind(force=True)
            for domain in list(self.aux.values()):
                self.detach_aux(domain)
            self.enabled_features.clear()
            self.mm_exit = None

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
        group = self.group
        with group.system.lock:
            self._aux_profile("attach_aux")
            if "AUX" not in self.enabled_features:
                raise InvalidArgument("device", self, text="AUX is not enabled on the device")
            domain_of(domain)
            main = self.domain
            if not isinstance(main, PagingDomain) or main.stage != 1 or main.cd_table is None:
                raise InvalidArgument(
                    "device", self, text=f"device has {main!r}; a main domain of stage 1 is needed"
                )
            if not isinstance(domain, PagingDomain) or domain.stage != 1:
                raise InvalidArgument(
                    "domain", domain, text="an auxiliary domain is a paging domain of stage 1"
                )
            if domain.mode == "main":
                raise InvalidArgument(
                    "domain", domain, text="domain was attached as main domain, and stays so"
                )
            if domain.parent is not None and domain.parent is not main:
                raise InvalidArgument("domain", domain, text="domain has another parent")
            if domain.aux_pasid in self.aux:
                raise Busy("domain", domain, text="domain is attached to this device")
            first, last = self.enabled_features["AUX"]
            if domain.aux_pasid and not first <= domain.aux_pasid <= last:
                raise PasidOverflow("pasid", domain.aux_pasid, f"{first} to {last}")
            self._attach_aux(domain, main, first, last)

    def _attach_aux(self, domain: PagingDomain, main: PagingDomain, first: int, last: int) -> None:
        system, table = self.system, main.cd_table
        assert table is not None
        with Undo() as undo:
            pasid = domain.aux_pasid
            if not pasid:
                try:
                    pasid = system.take_pasid(first, last, data=domain)
                except NoSpace as error:
                    text = f"no PASID is left: {error}"
                    raise InvalidArgument("pasid", None, text=text) from error
                undo.add(partial(system.give_pasid, pasid))
                if not first <= pasid <= last:  # a backend takes the range for a hint
                    raise PasidOverflow("pasid", pasid, f"{first} to {last}")
                domain.finalise(self.iommu)
                undo.add(domain.unfinalise)
            if not domain.users:
                if table.reserve(pasid):
                    undo.add(partial(table.unreserve, pasid))
                for device in table.devices:
                    device._enter_atcs(domain, pasid)
                    undo.add(partial(device._leave_atcs, domain, pasid))
                table.write(pasid, domain.cd(self.stall_supported), undo)
                for device in table.devices:
                    device._flush_pasid(pasid)
        for kind, number in domain.tags:
            domain.invalidations.insert(self.iommu.queue, kind, number, 0)
        domain.mode = "aux"
        domain.parent = main
        domain.aux_pasid = pasid
        main.children[pasid] = domain
        domain.users += 1
        domain.active = domain.cached = True
        self.aux[pasid] = domain

    def detach_aux(self, domain: Domain) -> None:
        """Detach an auxiliary domain; the last device clears the CD and invalidates.

        Raises
        ------
        InvalidArgument
            It is not attached to this device.
        """
        group = self.group
        with group.system.lock:
            self._aux_profile("detach_aux")
            if not isinstance(domain, PagingDomain) or self.aux.get(domain.aux_pasid) is not domain:
                raise InvalidArgument(
                    "domain", domain, text=f"{domain!r} is not attached to the device"
                )
            pasid, parent = domain.aux_pasid, domain.parent
            assert parent is not None and parent.cd_table is not None
            table, lock = parent.cd_table, group.system.lock
            if domain.users > 1:
                lock.defer(self._flush_pasid, pasid)
            else:
                table.clear(pasid)
                for device in table.devices:
                    lock.defer(device._flush_pasid, pasid)
                    device._leave_atcs(domain, pasid)
            del self.aux[pasid]
            for kind, number in domain.tags:
                domain.invalidations.remove(self.iommu.queue, kind, number, 0)
            domain.users -= 1
            domain.active = domain.users > 0
            lock.defer(domain.flush_tag)

    # --- SVA and mediated devices ---

    def bind(self, space: AddressSpace) -> Bond:
        """Bind a process's address space: `smmufast.iommu.sva.bind`."""
        from smmufast.iommu import sva

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
            group.resetting = True
            for domain in group.attached():
                domain.users += 1  # not to be freed meanwhile
            for pasid in group.pasids:
                self.install_pasid(None, pasid, group.at(pasid))
            self.reinstall(BLOCKED)

    def reset_done(self) -> None:
        """Give back what `reset_prepare` blocked."""
        group = self.group
        with group.system.lock:
            if not group.resetting:
                raise InvalidArgument("device", self, text="device is not being reset")
            self.reinstall(group.domain)
            for pasid in group.pasids:
                self.install_pasid(group.at(pasid), pasid, None)
            for domain in group.attached():
                domain.users -= 1
            group.resetting = False

    # --- what the device does ---

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
        """
        smmu = self.iommu.smmu
        one = self.sids[0] if sid is None else integer("sid", sid)
        result = smmu.translate(one, iova, ssid=pasid, write=write, priv=priv, instr=instr)
        if result.action == "stall":
            stall = next((s for s in smmu.stalls if s.stag == result.stag), None)
            if stall is None:  # another thread has handled it
                return self.translate(
                    iova, pasid=pasid, write=write, priv=priv, instr=instr, sid=sid
                )
            self.system.service()
            if stall.done and stall.result is not None:
                return stall.result
        elif result.event is not None:
            self.system.service()
        return result

    def access(
        self,
        iova: SupportsIndex,
        *,
        pasid: int | None = None,
        write: bool = False,
        execute: bool = False,
        priv: bool = False,
    ) -> Result:
        """Make one access through the device's ATC, where ATS is on; else `translate`.

        Raises
        ------
        AtsFault
            No translation permits it.
        """
        if not self.ats_enabled:
            return self.translate(iova, pasid=pasid, write=write, priv=priv, instr=execute)
        return self.atcs[0].access(iova, ssid=pasid, write=write, execute=execute, priv=priv)

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

    def __repr__(self) -> str:
        """Its streams, PASIDs and main domain."""
        sids = ", ".join(f"{sid:#x}" for sid in self.sids)
        if self._iommu is None:
            return f"<Device sid {sids}, not probed>"
        return f"<Device sid {sids}: {self.max_pasids} PASIDs, {self.domain!r}>"
