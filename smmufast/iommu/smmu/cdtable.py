"""The CD table of a device, or of a main domain in the AUX profile (F38 to F41)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from smmufast.errors import TooBig
from smmufast.iommu.undo import Undo

if TYPE_CHECKING:
    from smmufast.iommu.domain import PagingDomain, SvaDomain, Words
    from smmufast.iommu.smmu.iommu import Iommu
    from smmufast.iommu.smmu.master import Master

LEAF_LG2: Final = 10  # a leaf of a two-level CD table holds 1024 CDs (S1Fmt 2)
_IN_LEAF: Final = (1 << LEAF_LG2) - 1
INVALID_CD: Final = (0,) * 8


class CdTable:
    """The CD table of a device, or of a main domain in the AUX profile.

    Linear up to 1024 CDs, or if the SMMU has no other; else with two levels, whose leaves are
    allocated when a CD in them is first written, and freed with the table.

    Attributes
    ----------
    masters : list of Master
        Whose STEs point here, or will.
    cds : dict of int to domain
        Whose the valid CDs are, by SSID.  Every master of the table can use them.
    stall : bool
        Whether faults of its masters stall: what CD.S says in each of its CDs.
    """

    __slots__ = ("base", "cds", "fmt", "iommu", "leaves", "masters", "s1cdmax", "spare", "stall")

    def __init__(self, iommu: Iommu, ssid_bits: int, stall: bool) -> None:
        """Take memory for a table of 2^ssid_bits CDs."""
        self.iommu = iommu
        self.s1cdmax = ssid_bits
        self.stall = stall
        two = ssid_bits > LEAF_LG2 and iommu.smmu.features.cd2l
        self.fmt = 2 if two else 0
        size = 8 << (ssid_bits - LEAF_LG2) if two else 64 << ssid_bits
        self.base = iommu.system.pages.alloc(size)
        self.leaves: dict[int, int] = {}  # by index in level 1
        self.spare: dict[int, int] = {}  # leaves that `reserve` has, and nothing points to
        self.masters: list[Master] = []
        self.cds: dict[int, PagingDomain | SvaDomain] = {}

    @property
    def used(self) -> int:
        """CDs that are valid beside that of no PASID."""
        return len(self.cds) - (0 in self.cds)

    def sids(self) -> tuple[int, ...]:
        """Every StreamID that reaches the table."""
        if len(self.masters) == 1:
            return self.masters[0].sids
        return tuple(sid for master in self.masters for sid in master.sids)

    # --- where a CD is ---

    def address(self, ssid: int) -> int | None:
        """Where the CD of a substream is; None while its leaf is missing."""
        if not self.fmt:
            return self.base + 64 * ssid
        leaf = self.leaves.get(ssid >> LEAF_LG2)
        return None if leaf is None else leaf + 64 * (ssid & _IN_LEAF)

    def reserve(self, ssid: int) -> bool:
        """Have the page for the leaf of a substream, which `place` uses; whether it was missing.

        Raises
        ------
        TooBig
            The table has no such substream (E2BIG).
        OutOfMemory
            No page is left for the leaf.
        """
        if ssid >> self.s1cdmax:
            raise TooBig("ssid", ssid, f"0 to {(1 << self.s1cdmax) - 1}")
        index = ssid >> LEAF_LG2
        if not self.fmt or index in self.leaves or index in self.spare:
            return False
        self.spare[index] = self.iommu.system.pages.alloc(64 << LEAF_LG2)
        return True

    def unreserve(self, ssid: int) -> None:
        """Give back the page that `reserve` had, if it was not used."""
        leaf = self.spare.pop(ssid >> LEAF_LG2, None)
        if leaf is not None:
            self.iommu.system.pages.free(leaf, 64 << LEAF_LG2)

    def place(self, ssid: int) -> int:
        """Return where the CD of a substream is; its leaf is put there if it is missing.

        Raises
        ------
        TooBig, OutOfMemory
            As `reserve`.
        """
        address = self.address(ssid) if not ssid >> self.s1cdmax else None
        if address is not None:
            return address
        self.reserve(ssid)
        index = ssid >> LEAF_LG2
        iommu = self.iommu
        leaf = self.spare[index]
        iommu.store(self.base + 8 * index, leaf | 1)
        self.leaves[index] = self.spare.pop(index)
        # an invalid level-1 descriptor may be cached (F39)
        iommu.invalidate_cd(self.sids(), ssid, leaf=False)
        return leaf + 64 * (ssid & _IN_LEAF)

    def drop_leaf(self, ssid: int) -> None:
        """Take back the leaf that `place` allocated; no CD in it is valid."""
        index = ssid >> LEAF_LG2
        leaf = self.leaves.pop(index, None)
        if leaf is not None:
            self.iommu.store(self.base + 8 * index, 0)
            self.iommu.invalidate_cd(self.sids(), ssid, leaf=False)
            self.iommu.system.pages.free(leaf, 64 << LEAF_LG2)

    # --- CDs ---

    def write(self, ssid: int, words: Words) -> None:
        """Make a CD what is given, through the entry writer; all zero clears it."""
        self.iommu.writer.write_cd(self.place(ssid), words, self.sids(), ssid)

    def install(self, ssid: int, domain: PagingDomain | SvaDomain, undo: Undo) -> None:
        """Make a CD a domain's; the ATCs of every master may cache the domain from then on.

        The domain that had the CD before keeps its entries until `forget`.
        """
        old = self.cds.get(ssid)
        for master in self.masters:
            master.enter_atcs(domain, ssid)
            undo.add(master.leave_atcs, domain, ssid)
        undo.add(self.flush_atcs, ssid)
        undo.add(self._restore, ssid, old)
        self.write(ssid, domain.cd(self.stall))
        self.cds[ssid] = domain

    def clear(self, ssid: int, undo: Undo) -> None:
        """Make a CD invalid; the domain keeps its entries until `forget`."""
        old = self.cds.get(ssid)
        if old is None:
            return
        undo.add(self._restore, ssid, old)
        self.write(ssid, INVALID_CD)
        del self.cds[ssid]

    def empty(self, ssid: int) -> None:
        """Make a CD invalid that no STE leads to any more."""
        domain = self.cds.get(ssid)
        if domain is not None:
            with Undo() as undo:
                self.clear(ssid, undo)
            self.forget(ssid, domain)

    def _restore(self, ssid: int, domain: PagingDomain | SvaDomain | None) -> None:
        """Make a CD and what is known of it what they were."""
        if domain is None:
            self.cds.pop(ssid, None)
            self.write(ssid, INVALID_CD)
        else:
            self.cds[ssid] = domain
            self.write(ssid, domain.cd(self.stall))

    def rewrite(self, ssid: int) -> None:
        """Write the CD of a domain again, which has changed."""
        self.write(ssid, self.cds[ssid].cd(self.stall))

    # --- the masters behind it ---

    def forget(self, ssid: int, domain: PagingDomain | SvaDomain) -> None:
        """No ATC has anything of a domain any more whose CD this was."""
        for master in self.masters:
            master.leave_atcs(domain, ssid)

    def flush_atcs(self, ssid: int) -> None:
        """Empty every ATC of one PASID; what one of them raises does not spare the others."""
        lock = self.iommu.system.lock
        for master in self.masters:
            lock.insist(master.flush_atc, ssid)

    def join(self, master: Master, undo: Undo) -> None:
        """One more STE will point here."""
        self.masters.append(master)
        undo.add(self.masters.remove, master)
        for ssid, domain in self.cds.items():
            master.enter_atcs(domain, ssid)
            undo.add(master.leave_atcs, domain, ssid)

    def leave(self, master: Master) -> None:
        """One STE less points here."""
        self.masters.remove(master)
        for ssid, domain in self.cds.items():
            master.leave_atcs(domain, ssid)

    def free(self) -> None:
        """Give the pages back; no STE points here any more."""
        pages = self.iommu.system.pages
        for leaf in (*self.leaves.values(), *self.spare.values()):
            pages.free(leaf, 64 << LEAF_LG2)
        pages.free(self.base, 8 << (self.s1cdmax - LEAF_LG2) if self.fmt else 64 << self.s1cdmax)
        self.leaves.clear()
        self.spare.clear()
