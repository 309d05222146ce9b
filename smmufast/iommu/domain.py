"""What a device, or one of its PASIDs, is attached to.

A paging domain is a page table with an ASID (stage 1) or a VMID (stage 2).  Identity and blocked
domains hold nothing.  A nested domain is a guest's stage 1 over a stage-2 paging domain.  An SVA
domain is a page table that something else owns: `smmufast.iommu.sva`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Final, SupportsIndex

from smmufast._driver.tables import PageTable
from smmufast.errors import Busy, InvalidArgument, NotSupported, WrongType, instance, integer
from smmufast.iommu.smmu import entry
from smmufast.iommu.smmu.invalidations import (
    S1_ASID,
    S2_VMID,
    S2_VMID_S1_CLEAR,
    Invalidations,
)
from smmufast.iommu.undo import Undo

if TYPE_CHECKING:
    from collections.abc import Callable

    from smmufast.iommu.attachment import Attachment
    from smmufast.iommu.device import Device
    from smmufast.iommu.fault import PageFault
    from smmufast.iommu.nested import Viommu
    from smmufast.iommu.smmu.cdtable import CdTable
    from smmufast.iommu.smmu.iommu import Iommu
    from smmufast.iommu.smmu.master import Master
    from smmufast.iommu.sva import AddressSpace
    from smmufast.iommu.system import System

Words = tuple[int, ...]  # the eight dwords of an STE or a CD


class Domain:
    """What every domain has: its kind, and answers for those that hold no page table."""

    kind: ClassVar[str] = ""
    users: int = 0

    def linked(self, attachment: Attachment) -> None:
        """Something is attached here; domains that hold nothing keep no list."""

    def unlinked(self, attachment: Attachment) -> None:
        """Something is attached here no more."""

    def enter_tlbs(self, attachment: Attachment) -> None:
        """TLBs may hold something of it from now on."""

    def leave_tlbs(self, attachment: Attachment) -> None:
        """Nothing fills TLBs with it from there any more, be it detached or being reset."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Refuse copies: a domain is one thing, which tables in memory lead to."""
        raise WrongType("domain", self, text=f"{self!r} is part of a system: it has no copies")

    @property
    def tags(self) -> tuple[tuple[int, int], ...]:
        """The kinds and numbers by which TLBs are told."""
        return ()

    @property
    def stage(self) -> int:
        """1 or 2 for a page table of that stage, 3 for a guest's over a host's, 0 for none."""
        return 0

    def iova_to_phys(self, iova: SupportsIndex, /) -> int:
        """Translate nothing: 0."""
        _address(iova)
        return 0

    def map(
        self, iova: SupportsIndex, pa: SupportsIndex, size: SupportsIndex, prot: int = 3
    ) -> None:
        """Refuse: only paging domains have mappings (EINVAL)."""
        raise InvalidArgument(
            "domain", self, text=f"domain is {self.kind}; only a paging domain has mappings"
        )

    def unmap(self, iova: SupportsIndex, size: SupportsIndex) -> int:
        """Unmap nothing: 0."""
        return 0

    def __repr__(self) -> str:
        """Its kind."""
        return f"<{self.kind} domain>"


def _address(iova: SupportsIndex) -> int:
    address = integer("iova", iova)
    if not 0 <= address < 1 << 64:
        raise InvalidArgument("iova", address, "0 to 2^64 - 1")
    return address


class _Constant(Domain):
    """One of the domains that hold nothing: each is one object, also after a copy."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> str:
        return self.kind.upper()


class _Identity(_Constant):
    kind = "identity"

    def iova_to_phys(self, iova: SupportsIndex, /) -> int:
        return _address(iova)


class _Blocked(_Constant):
    kind = "blocked"


#: Addresses pass unchanged: the STE bypasses, or S1DSS does while PASIDs are attached.
IDENTITY: Final = _Identity()
#: Every access without a PASID is terminated.
BLOCKED: Final = _Blocked()


class Cached(Domain):
    """A domain that an SMMU caches: who is attached, and what an invalidation must reach.

    Attributes
    ----------
    attachments : dict
        Every `Attachment`, in the order in which they came; its values mean nothing.
    invalidations : Invalidations
        Where the domain may be cached: TLB tags, counted by attachment, and ATCs.
    """

    attachments: dict[Attachment, None]
    invalidations: Invalidations
    system: System
    active: bool

    @property
    def users(self) -> int:  # type: ignore[override]
        """Attachments: a device counts once, each of its PASIDs once."""
        return len(self.attachments)

    def linked(self, attachment: Attachment) -> None:
        """Keep an attachment: whoever unmaps invalidates for it from now on."""
        self.attachments[attachment] = None
        if not attachment.master.blocked:
            self.enter_tlbs(attachment)

    def unlinked(self, attachment: Attachment) -> None:
        """Forget an attachment."""
        del self.attachments[attachment]
        if not attachment.master.blocked:
            self.leave_tlbs(attachment)

    def enter_tlbs(self, attachment: Attachment) -> None:
        """Count a user of each tag: the domain's, or a guest's above it."""
        queue = attachment.master.iommu.queue
        for kind, number in attachment.domain.tags:
            self.invalidations.insert(queue, kind, number)
        self.active = True

    def leave_tlbs(self, attachment: Attachment) -> None:
        """Count a user less; the last of a tag drops the TLB entries under it (F48).

        What fails meanwhile is raised when the call is done.
        """
        iommu = attachment.master.iommu
        for kind, number in attachment.domain.tags:
            if not self.invalidations.remove(iommu.queue, kind, number):
                self.system.lock.insist(iommu.flush_tag, kind, number)
        self.active = len(self.invalidations) > 0

    def shares_cd(self, attachment: Attachment) -> bool:
        """Whether another device of the same table is attached through the same CD."""
        table, ssid = attachment.table, attachment.ssid
        return any(
            one.table is table and one.ssid == ssid and one is not attachment
            for one in self.attachments
        )

    def tables(self) -> dict[tuple[CdTable, int], None]:
        """Each CD of the domain: its table and its SSID."""
        return {
            (one.table, one.ssid): None for one in self.attachments if one.table is not None
        }


class PagingDomain(PageTable, Cached):
    """A page table of one SMMU, with the ASID or the VMID under which the SMMU caches it.

    `Device.paging_domain` and `System.paging_domain` make one.  `map`, `unmap`, `map_sg`,
    `iova_to_phys` and `read_dirty` are those of `PageTable`; what they take away is invalidated
    in every SMMU and device that may have cached it before they return.

    Attributes
    ----------
    stage : int
        1 or 2.
    asid, vmid : int
        The tag; 0 where the stage has none, or before an auxiliary profile's first attach.
    users : int
        Attachments: a device counts once, each of its PASIDs once.
    parent : PagingDomain or None
        AUX profile: the main domain in whose CD table an auxiliary domain has its CD.
    """

    kind = "paging"

    def __init__(
        self,
        iommu: Iommu,
        *,
        stage: int = 1,
        granule: int | None = None,
        dirty: bool = False,
        nest_parent: bool = False,
        contiguous: bool = False,
        ready: bool = True,
    ) -> None:
        """Make an empty domain; nothing is attached to it."""
        geometry = iommu.geometry(stage, granule)
        super().__init__(
            iommu.system.pages, stage=1 if stage == 1 else 2, dirty=dirty, contiguous=contiguous,
            coherent=iommu.coherent, ready=False, **geometry,
        )  # fmt: skip
        self.granule_lg2 = self.granule.bit_length() - 1
        self.iommu: Iommu | None = iommu if ready else None
        self.system = iommu.system
        self.nest_parent = nest_parent
        self.dirty_tracked = dirty
        self.coherent_only = False
        self.iopf: Callable[[PageFault], bool | str] | None = None
        self.asid = self.vmid = 0
        self.attachments = {}
        self.invalidations = Invalidations()
        self._words: dict[bool, Words] = {}
        # the auxiliary profile
        self.mode: str | None = None
        self.parent: PagingDomain | None = None
        self.aux_pasid = 0
        self.cd_table: CdTable | None = None
        self.children: dict[int, PagingDomain] = {}
        self.freed = False
        if ready:
            self.finalise(iommu)

    def finalise(self, iommu: Iommu) -> None:
        """Take the tag and the top table: from now on the domain lives on this SMMU.

        Raises
        ------
        OutOfMemory, Busy
            No table, no ASID or VMID is left; nothing is taken then.
        """
        ids = iommu.asids if self.stage == 1 else iommu.vmids
        tag = ids.alloc(self)
        try:
            self.ready = True
        except BaseException:
            ids.free(tag)
            raise
        if self.stage == 1:
            self.asid = tag
        else:
            self.vmid = tag
        self.iommu = iommu
        self._words.clear()

    def unfinalise(self) -> None:
        """Give back what `finalise` took, if nothing is attached and nothing is mapped yet."""
        iommu = self.iommu
        assert iommu is not None
        (iommu.asids if self.stage == 1 else iommu.vmids).free(self.asid or self.vmid)
        self.asid = self.vmid = 0
        self.ready = False
        self.iommu = None

    def drop_table(self) -> None:
        """AUX profile: free the CD table, to which no STE points."""
        if self.cd_table is not None:
            self.cd_table.free()
            self.cd_table = None

    def cd(self, stall: bool) -> Words:
        """The context descriptor of this domain, as eight dwords."""
        words = self._words.get(stall)
        if words is None:
            words = entry.cd_paging(self, self.asid, stall=stall, dirty=self.dirty_tracked)
            self._words[stall] = words
        return words

    # --- invalidation ---

    @property
    def tags(self) -> tuple[tuple[int, int], ...]:
        """The kinds and numbers by which TLBs are told: of stage 1, or of stage 2."""
        if self.stage == 1:
            return ((S1_ASID, self.asid),)
        if self.nest_parent:
            return ((S2_VMID, self.vmid), (S2_VMID_S1_CLEAR, self.vmid))
        return ((S2_VMID, self.vmid),)

    def flush(self, first: int, last: int, page_lg2: int, tables: bool) -> None:
        """Invalidate what was unmapped; `PageTable.unmap` calls it while something is attached."""
        self.invalidations.invalidate(first, last, self.granule_lg2, page_lg2, not tables)
        self._flush_guests()

    def _flush_guests(self) -> None:
        """Drop what guests have cached through this domain under PASIDs of their own choice.

        That is CDs, which were fetched through it, and entries of ATCs: those of the invalidation
        array have no PASID, and a device may take them at their word.
        """
        guests = self.guests
        if guests:
            assert self.iommu is not None
            queue = self.iommu.queue
            for master in guests:
                for sid in master.sids:
                    queue.issue("CFGI_CD_ALL", StreamID=sid)
                master.flush_guest_atcs()
            queue.sync()

    @property
    def viommus(self) -> list[Viommu]:
        """The guests above this domain, attached or not."""
        every = () if self.iommu is None else self.iommu.viommus
        return [viommu for viommu in every if viommu.parent is self]

    @property
    def guests(self) -> tuple[Master, ...]:
        """Devices with a guest's stage 1 above this domain."""
        if not self.nest_parent:
            return ()
        return tuple(one.master for one in self.attachments if one.domain is not self)

    def change_asid(self) -> None:
        """Move to another ASID while it is in use; CDs change by one store (F43, F47).

        Raises
        ------
        Busy
            No ASID is left.
        InvalidArgument
            It has none: stage 2, freed, or never attached in the AUX profile.
        """
        with self.system.lock:
            iommu = self.iommu
            if self.freed or iommu is None or not self.asid:
                raise InvalidArgument("domain", self, text="domain has no ASID")
            old, new = self.asid, iommu.asids.alloc(self)
            users = self.invalidations.users(iommu.queue, S1_ASID, old)
            tables = self.tables()
            with Undo() as undo:
                undo.add(iommu.asids.free, new)
                undo.add(iommu.flush_asid, new)
                for _ in range(users):
                    self.invalidations.insert(iommu.queue, S1_ASID, new)
                    undo.add(self.invalidations.remove, iommu.queue, S1_ASID, new)
                for table, ssid in tables:
                    undo.add(table.rewrite, ssid)
                undo.add(self._retag, old)
                self._retag(new)
                for table, ssid in tables:
                    table.rewrite(ssid)
            for _ in range(users):
                self.invalidations.remove(iommu.queue, S1_ASID, old)
            self.system.lock.insist(iommu.flush_asid, old)
            iommu.asids.free(old)

    def _retag(self, asid: int) -> None:
        self.asid = asid
        self._words.clear()

    def flush_all(self) -> None:
        """Invalidate everything that may be cached of this domain."""
        self.invalidations.invalidate_all()
        self._flush_guests()

    # --- properties that others ask for ---

    def enforce_cache_coherency(self) -> None:
        """Refuse devices that cannot snoop from now on (EINVAL).

        Raises
        ------
        InvalidArgument
            A device that cannot snoop is attached.
        """
        with self.system.lock:
            for one in self.attachments:
                if not one.master.coherent:
                    device = one.master.device
                    raise InvalidArgument(
                        "domain", self, text=f"{device!r} is attached, and cannot snoop"
                    )
            self.coherent_only = True

    def pasid(self, device: Device) -> int:
        """Return the PASID that this auxiliary domain owns; the same until it is freed.

        Raises
        ------
        InvalidArgument
            It was never attached as an auxiliary domain.
        """
        if not self.aux_pasid:
            raise InvalidArgument(
                "domain", self, text="domain has no PASID: it was never attached as auxiliary"
            )
        return self.aux_pasid

    def free(self) -> None:
        """Free the page table, the ASID or VMID and the PASID; the domain ends.

        Raises
        ------
        Busy
            Something is attached, it has nested domains, or auxiliary domains live in its CD
            table.
        """
        with self.system.lock:
            if self.freed:
                return
            if self.users or self.children:
                what = f"{self.users} attachments" if self.users else "auxiliary domains"
                raise Busy("domain", self, text=f"domain has {what}: detach first")
            for viommu in self.viommus:
                viommu.close()
            super().close()
            if self.iommu is not None:
                ids = self.iommu.asids if self.stage == 1 else self.iommu.vmids
                ids.free(self.asid or self.vmid)
                self.drop_table()
            if self.aux_pasid:
                if self.parent is not None:
                    del self.parent.children[self.aux_pasid]
                self.system.give_pasid(self.aux_pasid)
                self.aux_pasid = 0
            self.freed = True
            self.asid = self.vmid = 0

    def close(self) -> None:
        """As `free`."""
        self.free()

    @property
    def ready(self) -> bool:
        """Whether there are tables; only a domain without an ASID or VMID can be made to have none.

        Otherwise it is Busy: a CD or an STE may point to them.
        """
        return bool(PageTable.ready.__get__(self))  # type: ignore[attr-defined]

    @ready.setter
    def ready(self, value: object) -> None:
        if not value and (self.asid or self.vmid):
            raise Busy("ready", value, text="ready cannot be False while the domain has a tag")
        PageTable.ready.__set__(self, value)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        """Stage, tag and how much is mapped."""
        if self.freed:
            return "<paging domain, freed>"
        tag = f"asid={self.asid}" if self.stage == 1 else f"vmid={self.vmid}"
        return f"<paging domain stage {self.stage} {tag} {self.mapped:#x} bytes mapped>"


class NestedDomain(Domain):
    """A guest's stage 1 over a stage-2 domain: the guest owns the CD table (IPA) and below.

    Parameters
    ----------
    parent : PagingDomain
        A stage-2 domain made with ``nest_parent=True``.
    ste : sequence of int
        The first two dwords of the guest's STE: V, Config (abort, bypass, stage 1), S1Fmt,
        S1ContextPtr, S1CDMax, and S1DSS, S1CIR, S1COR, S1CSH, S1STALLD, EATS.

    Raises
    ------
    InvalidArgument
        The parent is not a nesting parent, or the STE has other bits or another Config.
    """

    kind = "nested"

    @property
    def stage(self) -> int:
        """3: both."""
        return 3

    def __init__(
        self, parent: PagingDomain, ste: Iterable[int], *, viommu: Viommu | None = None
    ) -> None:
        """Nest the stage 1 of a guest, which its STE describes, in a parent's stage 2."""
        instance("ste", ste, Iterable)
        words = tuple(integer("ste", word) for word in ste)
        check_nesting_parent(parent)
        entry.check_guest_ste(words)
        self.parent = parent
        self.viommu = viommu
        self.ste = words[:2]
        # the guest has ATS with a stage 1 of its own (Linux: arm_smmu_validate_vste)
        self.ats = entry.eats(words) == 1 and entry.ste_config(words[0]) == 5
        self.attachments: dict[Attachment, None] = {}
        self.system = parent.system
        self.iommu = parent.iommu

    @property
    def vmid(self) -> int:
        """What tags everything of the guest: the VMID of its Viommu, or of the parent alone."""
        return self.parent.vmid if self.viommu is None else self.viommu.vmid

    @property
    def freed(self) -> bool:
        """Whether its parent or its Viommu has ended."""
        return self.parent.freed or (self.viommu is not None and not self.viommu.vmid)

    @property
    def users(self) -> int:  # type: ignore[override]
        """Devices that are attached."""
        return len(self.attachments)

    @property
    def tags(self) -> tuple[tuple[int, int], ...]:
        """Both stages are cached under the guest's VMID."""
        return ((S2_VMID, self.vmid), (S2_VMID_S1_CLEAR, self.vmid))

    def linked(self, attachment: Attachment) -> None:
        """Keep an attachment; the parent is what is cached, and what is unmapped."""
        self.attachments[attachment] = None
        self.parent.linked(attachment)

    def unlinked(self, attachment: Attachment) -> None:
        """Forget an attachment, here and in the parent."""
        del self.attachments[attachment]
        self.parent.unlinked(attachment)

    def enter_tlbs(self, attachment: Attachment) -> None:
        """As its parent, under the guest's tags."""
        self.parent.enter_tlbs(attachment)

    def leave_tlbs(self, attachment: Attachment) -> None:
        """As its parent."""
        self.parent.leave_tlbs(attachment)


def check_nesting_parent(parent: object) -> None:
    """Refuse what no guest can be above (EINVAL)."""
    if not isinstance(parent, PagingDomain) or not parent.nest_parent or parent.freed:
        raise InvalidArgument(
            "parent", parent, text="parent is not a stage-2 domain made with nest_parent=True"
        )


class SvaDomain(Cached):
    """The address space of a process, for the PASIDs of the devices of one SMMU.

    It has an ASID of its own; the page table belongs to the space (`smmufast.iommu.sva`), which
    keeps one such domain for each SMMU that needs it.
    """

    kind = "sva"
    coherent_only = False

    def __init__(self, iommu: Iommu, space: AddressSpace) -> None:
        self.iommu = iommu
        self.system = iommu.system
        self.space = space
        self.invalidations = Invalidations()
        self.attachments = {}
        self.active = False
        self.freed = False
        self.asid = 0

    def take_asid(self) -> None:
        """Take the ASID, if that was not done; errors as `AddressSpace.take_asid`."""
        if not self.asid:
            self.asid = self.space.take_asid(self.iommu)

    @property
    def stage(self) -> int:
        """1."""
        return 1

    @property
    def tags(self) -> tuple[tuple[int, int], ...]:
        """The kind and number by which TLBs are told."""
        return ((S1_ASID, self.asid),)

    def cd(self, stall: bool) -> Words:
        """The context descriptor: of the space's tables, or a quiet one after its exit (F34)."""
        words = entry.cd_sva(self.space, self.asid, stall=stall)
        if self.space.exited:
            return entry.cd_quiet(words, stall_force=self.iommu.stall_force)
        return words

    def free(self) -> None:
        """Free the ASID; Busy while something is attached."""
        with self.system.lock:
            if self.freed:
                return
            if self.users:
                raise Busy("domain", self, text=f"domain has {self.users} attachments")
            self.space.give_asid(self.iommu, self.asid)
            self.freed = True


#: Domains that a CD can be of: a tuple, for isinstance.
WITH_CD: Final = (PagingDomain, SvaDomain)


def domain_of(value: object) -> Domain:
    """Check that an argument is a domain that was not freed (EINVAL)."""
    if not isinstance(value, Domain):
        raise InvalidArgument("domain", value, "a domain")
    if getattr(value, "freed", False):
        raise InvalidArgument("domain", value, text="domain was freed")
    return value


def is_auxiliary(domain: Domain) -> bool:
    """Whether a domain was attached as auxiliary, and so has the PASID that it owns."""
    return isinstance(domain, PagingDomain) and domain.mode == "aux"


def no_pasid_op(domain: Domain) -> NotSupported:
    """The error for a domain that no PASID can have (EOPNOTSUPP)."""
    article = "an" if domain.kind[0] in "aeiou" else "a"
    text = f"{article} {domain.kind} domain cannot be attached to a PASID"
    return NotSupported("domain", domain, text=text)


def paging_domain(
    iommu: Iommu,
    *,
    stage: int | None = None,
    granule: int | None = None,
    nest_parent: bool = False,
    dirty: bool = False,
    pasid: bool = False,
    contiguous: bool = False,
    user_data: object = None,
    ready: bool = True,
) -> PagingDomain:
    """Make a paging domain; `Device.paging_domain` says what the arguments are."""
    features = iommu.smmu.features
    if user_data is not None:
        raise NotSupported("user_data", user_data, text="no domain takes user data")
    if nest_parent and (dirty or pasid):
        raise NotSupported(
            "nest_parent", True, text="a nesting parent has no dirty tracking and no PASIDs"
        )
    if nest_parent and not (features.s1p and features.s2p):
        raise NotSupported("nest_parent", True, text="the SMMU cannot nest")
    if (dirty or pasid) and (not features.s1p or stage == 2):
        raise NotSupported(
            "dirty" if dirty else "pasid", True, text="dirty tracking and PASIDs are stage 1"
        )
    if dirty and features.httu < 2:
        raise NotSupported("dirty", True, text="the SMMU has no hardware dirty state (HTTU)")
    if nest_parent and stage == 1:
        raise NotSupported("stage", 1, text="a nesting parent is stage 2")
    if stage is None:
        stage = 2 if nest_parent or not features.s1p else 1
    return PagingDomain(
        iommu, stage=stage, granule=granule, dirty=dirty, nest_parent=nest_parent,
        contiguous=contiguous, ready=ready,
    )  # fmt: skip
