"""What a device, or one of its PASIDs, is attached to.

A paging domain is a page table with an ASID (stage 1) or a VMID (stage 2).  Identity and blocked
domains hold nothing.  A nested domain is a guest's stage 1 over a stage-2 paging domain.  An SVA
domain is a page table that something else owns: `smmufast.iommu.sva`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Final, SupportsIndex

from smmufast._tables import PageTable
from smmufast.errors import Busy, InvalidArgument, NotSupported, instance, integer
from smmufast.iommu.smmu import entry
from smmufast.iommu.smmu.invalidations import (
    S1_ASID,
    S2_VMID,
    S2_VMID_S1_CLEAR,
    Invalidations,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from smmufast.iommu.device import Device
    from smmufast.iommu.fault import PageFault
    from smmufast.iommu.smmu.cdtable import CdTable
    from smmufast.iommu.smmu.iommu import Iommu
    from smmufast.iommu.sva import AddressSpace

Words = tuple[int, ...]  # the eight dwords of an STE or a CD


class Domain:
    """What every domain has: its kind, and answers for those that hold no page table."""

    kind: ClassVar[str] = ""
    users: int = 0

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


class _Identity(Domain):
    kind = "identity"

    def iova_to_phys(self, iova: SupportsIndex, /) -> int:
        return _address(iova)


class _Blocked(Domain):
    kind = "blocked"


#: Addresses pass unchanged: the STE bypasses, or S1DSS does while PASIDs are attached.
IDENTITY: Final = _Identity()
#: Every access without a PASID is terminated.
BLOCKED: Final = _Blocked()


class PagingDomain(PageTable, Domain):
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
        self.guests: dict[int, int] = {}  # StreamIDs with a guest's stage 1, how often
        self.asid = self.vmid = 0
        self.users = 0
        self.cached = False  # something was attached, so that the tag may be in a TLB
        self.invalidations = Invalidations()
        self._words: Words | None = None
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
        self._words = None

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
        assert self.iommu is not None
        if self._words is None or self._stall != stall:
            self._stall = stall
            self._words = entry.cd_paging(self, self.asid, stall=stall, dirty=self.dirty_tracked)
        return self._words

    _stall = False

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
        if self.guests:
            # CDs that were fetched through what was unmapped
            assert self.iommu is not None
            for sid in self.guests:
                self.iommu.queue.issue("CFGI_CD_ALL", StreamID=sid)
            self.iommu.queue.sync()

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
            for _ in range(users):
                self.invalidations.insert(iommu.queue, S1_ASID, new)
            self.asid = new
            self._words = None
            if self.cd_table is not None:
                self.cd_table.write(0, self.cd(self._stall))
            elif self.parent is not None and self.users:
                assert self.parent.cd_table is not None
                self.parent.cd_table.write(self.aux_pasid, self.cd(self._stall))
            elif users:
                for device in dict.fromkeys(iommu.devices.values()):
                    device.write_cds(self)
            for _ in range(users):
                self.invalidations.remove(iommu.queue, S1_ASID, old)
            iommu.flush_asid(old)
            iommu.asids.free(old)

    def flush_all(self) -> None:
        """Invalidate everything that may be cached of this domain."""
        self.invalidations.invalidate_all()

    # --- properties that others ask for ---

    def enforce_cache_coherency(self) -> None:
        """Refuse devices that cannot snoop from now on (EINVAL)."""
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
            if self.cached:
                self.flush_tag()
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

    def flush_tag(self) -> None:
        """Drop every TLB entry under the tag, before it is used for something else (F48)."""
        if self.iommu is not None and (self.asid or self.vmid):
            self.iommu.flush_tag(self)

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

    def __init__(self, parent: PagingDomain, ste: Iterable[int]) -> None:
        instance("ste", ste, Iterable)
        words = tuple(integer("ste", word) for word in ste)
        if not isinstance(parent, PagingDomain) or not parent.nest_parent or parent.freed:
            raise InvalidArgument(
                "parent", parent, text="parent is not a stage-2 domain made with nest_parent=True"
            )
        entry.check_guest_ste(words)
        self.parent = parent
        self.ste = words[:2]
        self.ats = entry.eats(words) == 1
        self.users = 0
        self.system = parent.system
        self.iommu = parent.iommu


class SvaDomain(Domain):
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
        self.users = 0
        self.active = self.cached = False
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

    def flush_tag(self) -> None:
        """Drop every TLB entry under the ASID."""
        self.iommu.flush_tag(self)

    def free(self) -> None:
        """Free the ASID; Busy while something is attached."""
        with self.system.lock:
            if self.freed:
                return
            if self.users:
                raise Busy("domain", self, text=f"domain has {self.users} attachments")
            self.space.give_asid(self.iommu, self.asid)
            self.freed = True


def domain_of(value: object) -> Domain:
    """Check that an argument is a domain that was not freed (EINVAL)."""
    if not isinstance(value, Domain):
        raise InvalidArgument("domain", value, text=f"domain is {value!r}, not a domain")
    if getattr(value, "freed", False):
        raise InvalidArgument("domain", value, text="domain was freed")
    return value


def no_pasid_op(domain: Domain) -> NotSupported:
    """The error for a domain that no PASID can have (EOPNOTSUPP)."""
    return NotSupported("domain", domain, text=f"domain is {domain.kind}: no PASID can have it")
