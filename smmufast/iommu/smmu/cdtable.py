"""The CD table of a device, or of a main domain in the AUX profile (F38 to F41)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from smmufast import layout
from smmufast.errors import TooBig
from smmufast.iommu.undo import Undo

if TYPE_CHECKING:
    from smmufast.iommu.device import Device
    from smmufast.iommu.domain import Words
    from smmufast.iommu.smmu.iommu import Iommu

LEAF_LG2: Final = 10  # a leaf of a two-level CD table holds 1024 CDs (S1Fmt 2)
INVALID_CD: Final = (0,) * 8
_V: Final = layout.mask("CD", "V")


class CdTable:
    """The CD table of a device, or of a main domain in the AUX profile.

    Linear up to 1024 CDs, or if the SMMU has no other; else with two levels, whose leaves are
    allocated when a CD in them is first written, and freed with the table.
    """

    __slots__ = (
        "base", "devices", "fmt", "holders", "iommu", "leaves", "s1cdmax", "spare", "used",
    )  # fmt: skip

    def __init__(self, iommu: Iommu, ssid_bits: int) -> None:
        self.iommu = iommu
        self.s1cdmax = ssid_bits
        two = ssid_bits > LEAF_LG2 and iommu.smmu.features.cd2l
        self.fmt = 2 if two else 0
        size = 8 << (ssid_bits - LEAF_LG2) if two else 64 << ssid_bits
        self.base = iommu.system.pages.alloc(size)
        self.leaves: dict[int, int] = {}  # by index in level 1
        self.spare: dict[int, int] = {}  # leaves that `reserve` has, and nothing points to
        self.used = 0  # valid CDs but that of SSID 0
        self.devices: list[Device] = []  # whose STEs point here
        self.holders: dict[int, int] = {}  # AUX: how many devices hold an SVA domain's CD

    def sids(self) -> tuple[int, ...]:
        """Every StreamID that reaches the table."""
        if len(self.devices) == 1:
            return self.devices[0].sids
        return tuple(sid for device in self.devices for sid in device.sids)

    def address(self, ssid: int) -> int | None:
        """Where the CD of a substream is; None while its leaf is missing."""
        if not self.fmt:
            return self.base + 64 * ssid
        leaf = self.leaves.get(ssid >> LEAF_LG2)
        return None if leaf is None else leaf + 64 * (ssid & (1 << LEAF_LG2) - 1)

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
        self.reserve(ssid)
        address = self.address(ssid)
        if address is not None:
            return address
        index = ssid >> LEAF_LG2
        iommu = self.iommu
        leaf = self.spare[index]
        iommu.store(self.base + 8 * index, leaf | 1)
        self.leaves[index] = self.spare.pop(index)
        # an invalid level-1 descriptor may be cached (F39)
        iommu.invalidate_cd(self.sids(), ssid, leaf=False)
        return leaf + 64 * (ssid & (1 << LEAF_LG2) - 1)

    def clear(self, ssid: int) -> None:
        """Make a CD invalid, or leave it as it was."""
        with Undo() as undo:
            self.write(ssid, INVALID_CD, undo)

    def write(self, ssid: int, words: Words, undo: Undo | None = None) -> None:
        """Make a CD what is given, through the entry writer; all zero clears it.

        `undo`, if given, gets what makes it what it was.
        """
        address = self.address(ssid)
        if address is None:
            if not any(words):
                return
            address = self.place(ssid)
        writer = self.iommu.writer
        before = writer.read(address)
        if undo is not None:
            undo.add(partial(self.write, ssid, before))
        try:
            writer.write_cd(address, words, self.sids(), ssid)
        finally:
            if ssid:
                self.used += bool(writer.read(address)[0] & _V) - bool(before[0] & _V)

    def drop_leaf(self, ssid: int) -> None:
        """Take back the leaf that `place` allocated; no CD in it is valid."""
        index = ssid >> LEAF_LG2
        leaf = self.leaves.pop(index, None)
        if leaf is not None:
            self.iommu.store(self.base + 8 * index, 0)
            self.iommu.invalidate_cd(self.sids(), ssid, leaf=False)
            self.iommu.system.pages.free(leaf, 64 << LEAF_LG2)

    def free(self) -> None:
        """Give the pages back; no STE points here any more."""
        pages = self.iommu.system.pages
        for leaf in (*self.leaves.values(), *self.spare.values()):
            pages.free(leaf, 64 << LEAF_LG2)
        pages.free(self.base, 8 << (self.s1cdmax - LEAF_LG2) if self.fmt else 64 << self.s1cdmax)
        self.leaves.clear()
        self.spare.clear()
