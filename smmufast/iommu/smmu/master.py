"""A device as the driver of its SMMU sees it (Linux: struct arm_smmu_master).

It writes the STEs and CDs that attachments mean, in the order of F67.  Checks and allocations
(`prepare`, `prepare_pasid`) come before the first store, so that what is refused changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from smmufast.errors import Busy, InvalidArgument
from smmufast.iommu.attachment import Attachment
from smmufast.iommu.domain import (
    BLOCKED,
    IDENTITY,
    WITH_CD,
    Cached,
    Domain,
    NestedDomain,
    PagingDomain,
    SvaDomain,
    Words,
    no_pasid_op,
)
from smmufast.iommu.smmu import entry
from smmufast.iommu.smmu.cdtable import CdTable
from smmufast.iommu.smmu.invalidations import ATS, ATS_FULL
from smmufast.iommu.undo import Undo

if TYPE_CHECKING:
    from smmufast.ats import AtsDevice
    from smmufast.iommu.attachment import AttachHandle
    from smmufast.iommu.device import Device
    from smmufast.iommu.profile import Profile
    from smmufast.iommu.smmu.iommu import Iommu

_PLAIN = ("identity", "blocked")
_S1DSS = {"identity": 1, "blocked": 0}


class Master:
    """What the driver of an SMMU knows of a device behind it.

    Attributes
    ----------
    device : Device
        Whose part it is; named in errors and faults, and nothing else.
    sids : tuple of int
    ssid_bits : int
        Width of the SSIDs that its CD tables can have.
    stall : bool
        Its faults stall: it can wait, or the SMMU lets every device wait.
    coherent, has_ats : bool
    ats_enabled : bool
        Its ATCs are on.
    attachments : dict of int to Attachment
        By SSID; 0 is the main domain, and always there.
    own_table : CdTable or None
        The CD table of its own, which the NOW profile has.
    blocked : bool
        It is being reset: its STEs abort, whatever is attached.
    """

    __slots__ = (
        "atcs", "ats_enabled", "attachments", "blocked", "coherent", "device", "has_ats", "iommu",
        "own_table", "sids", "ssid_bits", "stall",
    )  # fmt: skip

    def __init__(self, device: Device, iommu: Iommu, ssid_bits: int, atcs: list[AtsDevice]) -> None:
        """Take a device behind an SMMU; its streams are blocked until it is attached."""
        self.device = device
        self.iommu = iommu
        self.sids = device.sids
        self.ssid_bits = ssid_bits
        self.stall = iommu.can_stall and (device.stall or iommu.stall_force)
        self.coherent = device.coherent
        self.atcs = atcs
        self.has_ats = bool(device.ats and iommu.smmu.features.ats)
        self.ats_enabled = False
        self.blocked = False
        self.own_table: CdTable | None = None
        self.attachments: dict[int, Attachment] = {0: Attachment(self, BLOCKED, 0)}

    # --- what is attached ---

    @property
    def domain(self) -> Domain:
        """The main domain."""
        return self.attachments[0].domain

    @property
    def profile(self) -> Profile:
        """Where CD tables are, and who chooses PASIDs."""
        return self.iommu.system.profile

    @property
    def table(self) -> CdTable | None:
        """The CD table that its STEs point to, or would."""
        return self.profile.table_of(self)

    def domain_at(self, ssid: int) -> Domain | None:
        """What an access under an SSID reaches: in the AUX profile also what others attached."""
        if self.blocked:
            return BLOCKED
        if not ssid or isinstance(self.domain, NestedDomain):
            return self.domain  # a guest chooses its PASIDs itself
        table = self.table
        return None if table is None else table.cds.get(ssid)

    # --- the main domain ---

    def prepare(self, domain: Domain, undo: Undo) -> None:
        """Check a main domain, and allocate what it needs here, before anything is written.

        Parameters
        ----------
        domain : Domain
        undo : Undo
            Gets what takes the allocations back.
        """
        self._check(domain)
        if not isinstance(domain, PagingDomain):
            return
        if domain.iommu is None:
            domain.finalise(self.iommu)
            undo.add(domain.unfinalise)
        if domain.stage == 1:
            table = self.profile.main_table(self, domain, undo)
            if table.reserve(0):
                undo.add(table.unreserve, 0)

    def _check(self, domain: Domain) -> None:
        """Refuse a main domain that this device cannot have; nothing is changed."""
        self.profile.check_main(self, domain)
        table = self.table
        used = 0 if table is None else table.used
        device = self.device
        if isinstance(domain, PagingDomain):
            self._check_coherent(domain)
            if domain.stage == 2 and used:
                raise Busy(
                    "device", device, text="device has PASIDs attached: stage 2 carries none"
                )
        elif isinstance(domain, NestedDomain):
            self._check_coherent(domain.parent)
            if domain.iommu is not self.iommu:
                raise InvalidArgument("domain", domain, text="domain lives on another SMMU")
            if domain.freed:
                raise InvalidArgument("domain", domain, text="the domain's parent was freed")
            if used:
                raise Busy(
                    "device", device, text="device has PASIDs attached: its CD table is ours"
                )
        elif domain.kind not in _PLAIN:
            raise InvalidArgument("domain", domain, text=f"domain is {domain.kind}")
        elif domain is BLOCKED and device.direct:
            raise InvalidArgument(
                "domain", domain, text="firmware wants memory of this device mapped one to one"
            )

    def _check_coherent(self, domain: PagingDomain | SvaDomain) -> None:
        if domain.coherent_only and not self.coherent:
            raise InvalidArgument(
                "device", self.device,
                text="domain enforces coherence, and the device cannot snoop",
            )  # fmt: skip

    def attach(self, domain: Domain) -> None:
        """Attach a main domain that was prepared (F67)."""
        old = self.attachments[0]
        table = self.profile.table_for(self, domain)
        new = Attachment(self, domain, 0, table if domain.stage == 1 else None)
        ats = self._wants_ats(domain, table)
        with Undo() as undo:
            # 1. the new domain is told from now on what it must invalidate here
            new.link()
            undo.add(new.unlink)
            if self.ats_enabled:
                undo.add(self.iommu.system.lock.defer, self._flush_atcs)
            # 2. ATS goes off before an STE that refuses it
            undo.add(setattr, self, "ats_enabled", self.ats_enabled)
            if self.ats_enabled and not ats:
                self._ats_off()
            # 3. CD, then STE
            self._write(domain, table, ats, undo)
            # 4. ATS comes on with empty ATCs, or they are emptied
            self._ats_on(ats)
        # 5. what waits for the old domain is answered, so that nobody else sees it
        self.drain(None if isinstance(old.domain, NestedDomain) else 0)
        self.attachments[0] = new
        # 6. the old domain forgets
        self._left(old)
        old.unlink()

    def _wants_ats(self, domain: Domain, table: CdTable | None) -> bool:
        if domain.kind in _PLAIN:
            return self.has_ats and table is not None and table.used > 0
        if domain.stage > 1 and self.iommu.stall_force:
            return False  # S2S=1 is forced, and excludes EATS (IHI 0070 5.2)
        return self.has_ats and (not isinstance(domain, NestedDomain) or domain.ats)

    def _write(self, domain: Domain, table: CdTable | None, ats: bool, undo: Undo) -> None:
        """Make CD and STEs what a main domain means."""
        if isinstance(domain, PagingDomain) and domain.stage == 1:
            assert table is not None
            if self not in table.masters:
                table.join(self, undo)
            if table.cds.get(0) is not domain:
                table.install(0, domain, undo)
        else:
            self._enter_main(domain, undo)
        self._write_ste(self._ste(domain, table, ats), undo)
        own = self.own_table
        if own is not None and domain.stage != 1:
            own.clear(0, undo)

    def _enter_main(self, domain: Domain, undo: Undo) -> None:
        """Let a domain without a CD know of the ATCs."""
        for cached, ssid, kind in self._main_in_atcs(domain):
            self.enter_atcs(cached, ssid, kind)
            undo.add(self.leave_atcs, cached, ssid, kind)

    @staticmethod
    def _main_in_atcs(domain: Domain) -> list[tuple[Cached, int, int]]:
        """What ATCs may hold of a main domain that has no CD of ours."""
        if isinstance(domain, NestedDomain):
            return [(domain.parent, 0, ATS_FULL)]  # under PASIDs that the guest chose
        if isinstance(domain, PagingDomain) and domain.stage == 2:
            return [(domain, 0, ATS)]
        return []

    def _left(self, old: Attachment) -> None:
        """A main domain is not reached from here any more: no ATC holds it."""
        for cached, ssid, kind in self._main_in_atcs(old.domain):
            self.leave_atcs(cached, ssid, kind)
        table, domain = old.table, old.domain
        if table is None:
            return
        if table is not self.table:  # the AUX profile's, which is the old domain's
            if table.masters == [self]:
                self.iommu.system.lock.insist(table.empty, 0)
            table.leave(self)
        elif table.cds.get(0) is not domain:
            assert isinstance(domain, PagingDomain)
            table.forget(0, domain)

    def _ste(self, domain: Domain, table: CdTable | None, ats: bool) -> Words:
        """The STE of a main domain, with the PASIDs that are in use."""
        iommu = self.iommu
        features = iommu.smmu.features
        if isinstance(domain, PagingDomain) and domain.stage == 2:
            return entry.ste_stage2(
                domain, domain.vmid, stall=self.stall, ats=ats, features=features
            )
        if isinstance(domain, NestedDomain):
            return entry.ste_nested(
                domain.parent, domain.vmid, domain.ste, stall=self.stall, ats=ats,
                features=features,
            )  # fmt: skip
        if domain.kind in _PLAIN and (table is None or not table.used):
            return entry.ste_bypass(features=features) if domain is IDENTITY else entry.ste_abort()
        assert table is not None
        return entry.ste_cd_table(
            table.base, fmt=table.fmt, s1cdmax=table.s1cdmax, s1dss=_S1DSS.get(domain.kind, 2),
            ats=ats, stall=self.stall, e2h=iommu.e2h, features=features,
        )  # fmt: skip

    def _write_ste(self, words: Words, undo: Undo) -> None:
        """Make the STE of each stream what is given, through the entry writer."""
        iommu = self.iommu
        for sid in self.sids:
            address = iommu.ste_address(sid)
            before = iommu.writer.read(address)
            undo.add(iommu.writer.write_ste, address, before, sid)
            iommu.writer.write_ste(address, words, sid)

    # --- PASIDs ---

    def prepare_pasid(
        self, domain: Domain, ssid: int, undo: Undo, main: Domain | None = None
    ) -> None:
        """Check a domain of a PASID, and have the page for its CD; as `prepare`.

        `main` is what the main domain will be by then, if it changes in the same call.
        """
        main = main or self.domain
        if not isinstance(domain, WITH_CD):
            raise no_pasid_op(domain)
        device = self.device
        if domain.iommu is not self.iommu:
            raise InvalidArgument("domain", domain, text="domain lives on another SMMU")
        if domain.stage != 1:
            raise InvalidArgument("domain", domain, text="domain is stage 2: PASIDs are stage 1")
        if main.stage > 1:
            raise InvalidArgument(
                "device", device, text=f"device has {main!r}: there is no CD table of ours"
            )
        self._check_coherent(domain)
        table = self.profile.pasid_table(self, main, undo)
        if table.reserve(ssid):
            undo.add(table.unreserve, ssid)

    def attach_pasid(
        self, domain: PagingDomain | SvaDomain, ssid: int, handle: AttachHandle | None
    ) -> None:
        """Attach a PASID to a domain that was prepared, in the place of another or of none."""
        old = self.attachments.get(ssid)
        table = self.table
        assert table is not None
        new = Attachment(self, domain, ssid, table, handle)
        before = table.cds.get(ssid)
        with Undo() as undo:
            new.link()
            undo.add(new.unlink)
            undo.add(setattr, self, "ats_enabled", self.ats_enabled)
            if before is not domain:
                if table.address(ssid) is None:
                    undo.add(table.drop_leaf, ssid)
                    table.place(ssid)
                first = not table.used
                table.install(ssid, domain, undo)
                if first and self.domain.kind in _PLAIN:  # F26: its STE had no CD table
                    self._write_ste(self._ste(self.domain, table, self.has_ats), undo)
                if self.has_ats and not self.ats_enabled:
                    self._ats_on(True)
                else:
                    for master in table.masters:
                        master.flush_atc(ssid)
        self.attachments[ssid] = new
        if before is not None and before is not domain:
            for master in table.masters:
                master.drain(ssid)
            table.forget(ssid, before)
        if old is not None:
            old.unlink()

    def set_pasid(
        self, domain: Domain | None, ssid: int, handle: AttachHandle | None = None
    ) -> None:
        """Attach a PASID to a domain that was prepared; None detaches it."""
        if domain is None:
            self.detach_pasid(ssid)
        else:
            assert isinstance(domain, WITH_CD)
            self.attach_pasid(domain, ssid, handle)

    def has_leaf(self, ssid: int) -> bool:
        """Whether the CD table has a place for the CD of a substream already."""
        table = self.table
        return table is not None and table.address(ssid) is not None

    def drop_leaf(self, ssid: int) -> None:
        """Take back the place that a CD got in a call that fails."""
        if self.table is not None:
            self.table.drop_leaf(ssid)

    def detach_pasid(self, ssid: int) -> None:
        """Detach a PASID; the last attachment of a CD takes it out of the table.

        Once the CD is invalid, the PASID is detached: what fails after it is raised when the call
        is done.
        """
        old = self.attachments[ssid]
        domain, table, lock = old.domain, old.table, self.iommu.system.lock
        assert table is not None
        assert isinstance(domain, WITH_CD)
        if len(table.masters) > 1 and domain.shares_cd(old):
            lock.insist(self.flush_atc, ssid)  # other devices of the main domain have it
        else:
            with Undo() as undo:
                table.clear(ssid, undo)
            table.flush_atcs(ssid)
            for master in table.masters:
                master.drain(ssid)
            table.forget(ssid, domain)
        del self.attachments[ssid]
        old.unlink()
        if not table.used and self.domain.kind in _PLAIN:
            lock.insist(self._plain_ste)

    def _plain_ste(self) -> None:
        """Go back from a CD table with S1DSS to a plain bypass or abort (F26)."""
        if self.blocked:
            return
        if self.ats_enabled:
            self._flush_atcs()
            self._ats_off()
        with Undo() as undo:
            self._write_ste(self._ste(self.domain, self.table, False), undo)

    # --- ATS ---

    # S3.9.2-2
    def _ats_on(self, on: bool) -> None:
        if on:
            self._flush_atcs()
            self.ats_enabled = True

    def _ats_off(self) -> None:
        self.ats_enabled = False
        for atc in self.atcs:
            atc.clear()

    def _flush_atcs(self) -> None:
        """Empty the ATCs, also of the PASIDs that a guest chose."""
        for sid in self.sids:
            self.iommu.invalidate_atc(sid)
        if isinstance(self.domain, NestedDomain):
            self.flush_guest_atcs()
        self.iommu.queue.sync()

    def flush_guest_atcs(self) -> None:
        """Empty the ATCs of every PASID, without a CMD_SYNC: a guest chooses them itself."""
        if self.ats_enabled and self.ssid_bits:
            for sid in self.sids:
                self.iommu.queue.issue("ATC_INV", StreamID=sid, SSV=1, G=1, Size=52)

    def flush_atc(self, ssid: int) -> None:
        """Empty the ATCs of one PASID."""
        if self.ats_enabled:
            for sid in self.sids:
                self.iommu.invalidate_atc(sid, ssid)
            self.iommu.queue.sync()

    def enter_atcs(self, domain: Cached, ssid: int, kind: int = ATS) -> None:
        """Let a domain know that the ATCs may cache it."""
        if self.has_ats and not self.blocked:
            for sid in self.sids:
                domain.invalidations.insert(self.iommu.queue, kind, sid, ssid)

    def leave_atcs(self, domain: Cached, ssid: int, kind: int = ATS) -> None:
        """Let a domain know that the ATCs hold nothing of it."""
        if self.has_ats and not self.blocked:
            for sid in self.sids:
                domain.invalidations.remove(self.iommu.queue, kind, sid, ssid)

    def _in_atcs(self) -> list[tuple[Cached, int, int]]:
        """What the ATCs may hold: domain, SSID, kind of the entry."""
        table = self.table
        entries = self._main_in_atcs(self.domain)
        if table is not None and self in table.masters:
            entries += [(domain, ssid, ATS) for ssid, domain in table.cds.items()]
        return entries

    # --- faults in flight ---

    def drain(self, ssid: int | None) -> None:
        """Answer every fault that waits under an SSID, or under any, as nobody's.

        What the host's memory refuses meanwhile is raised when the call is done.
        """
        if ssid and not (self.stall or self.device.pri_supported):
            return  # nothing waits under a PASID; a guest's events know whose they are
        self.iommu.system.lock.defer(self.iommu.drain, self.sids, ssid)

    # --- reset (F24) ---

    def block(self) -> None:
        """Let every access abort until `unblock`; no command goes to the device meanwhile."""
        with Undo() as undo:
            undo.add(setattr, self, "ats_enabled", self.ats_enabled)
            if self.ats_enabled:
                self._ats_off()
            self._write_ste(entry.ste_abort(), undo)
        self.drain(None)
        for domain, ssid, kind in self._in_atcs():
            self.leave_atcs(domain, ssid, kind)
        for one in self.attachments.values():
            one.domain.leave_tlbs(one)
        self.blocked = True

    def unblock(self) -> None:
        """Give back what `block` took."""
        table = self.table
        ats = self._wants_ats(self.domain, table)
        with Undo() as undo:
            self.blocked = False
            undo.add(setattr, self, "blocked", True)
            for one in self.attachments.values():
                one.domain.enter_tlbs(one)
                undo.add(one.domain.leave_tlbs, one)
            for domain, ssid, kind in self._in_atcs():
                self.enter_atcs(domain, ssid, kind)
                undo.add(self.leave_atcs, domain, ssid, kind)
            self._write_ste(self._ste(self.domain, table, ats), undo)
            self._ats_on(ats)

    def drop_table(self) -> None:
        """Free the CD table of its own, in which nothing is."""
        table = self.own_table
        if table is not None and not table.cds:
            table.free()
            self.own_table = None
