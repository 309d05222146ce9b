"""Pictures of what a stream's STE leads to: CD table, CDs, page tables, in lines of text.

Drawn from the bytes in memory alone (IHI 0070 5.2, 5.3, 5.4; DDI 0487 D8.3): what the driver half
keeps beside them is not asked, so that a picture shows what the SMMU finds.  Where stage 2 starts,
and where it puts an address, is asked of an SMMU that is given the STE and reads the same tables.

Tables may lead to themselves: a picture ends after MOST_LINES, and says so in its last line.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, SupportsIndex

import numpy as np

from smmufast import layout
from smmufast.errors import InvalidArgument, integer
from smmufast.explain import (
    _first_level,
    _granule,
    _s2_granule,
    _shift,
    descriptor_address,
)
from smmufast.faults import ExternalAbort

if TYPE_CHECKING:
    from smmufast._device.smmu import Walk
    from smmufast._engine.memory import Memory
    from smmufast.features import Features
    from smmufast.iommu.smmu.iommu import Iommu

MOST_LINES: Final = 20_000
"""Lines of a picture."""

_LEAF_LG2: Final = {1: 6, 2: 10}  # S1Fmt: lg2 of the CDs in a leaf of 4 KiB and of 64 KiB
_S1DSS: Final = {0: "without PASID terminated", 1: "without PASID bypass"}
_UNITS: Final = ("", "K", "M", "G", "T")


def _size(lg2: int) -> str:
    return f"{1 << lg2 % 10}{_UNITS[lg2 // 10]}"


def draw(
    streams: Iterable[tuple[Iommu, int]], limit: SupportsIndex, most_lines: int = MOST_LINES
) -> str:
    """Draw what the STEs of some streams lead to; `Device.draw` says more."""
    most = integer("limit", limit)
    if most < 1:
        raise InvalidArgument("limit", most, "1 or more")
    lines: list[str] = []
    try:
        for iommu, sid in streams:
            picture = Picture(iommu.memory, iommu.smmu.features, most, lines, most_lines)
            picture.stream(sid, iommu.ste_address(sid))
    except _FullError:
        lines.append(f"… more is left out: a picture has {most_lines} lines at most")
    return "\n".join(lines)


class _FullError(Exception):
    """A picture has all the lines that it may have."""


def _output_bits(lg2: int) -> int:
    """Bits of a leaf that say where it leads to, and whether its neighbours continue it."""
    names = ["Addr_64K", "Addr51_48"] if lg2 == 16 else ["Addr_4K"]
    return layout.mask("PTE_S1", "Contiguous", *names)


class _Stage2:
    """Stage 2 of an STE, as an SMMU of its own walks it."""

    def __init__(self, picture: Picture, ste: dict[str, int]) -> None:
        from smmufast._device.smmu import Smmu
        from smmufast._engine.memory import Memory

        self._picture = picture
        alone = {"Config": 6, "EATS": 0, "S2AFFD": 1, "S2HA": 0, "S2HD": 0}
        self._ste = layout.to_bytes("STE", layout.pack("STE", **(ste | alone)))
        # its only stream is 0, and its fetches are answered here
        self._smmu = Smmu(Memory(), picture.features, strtab_base_cfg=0)

    def _walk(self, ipa: int) -> Walk:
        walk = self._smmu.start_walk(0, ipa, priv=True)
        walk.supply(self._ste)
        return walk

    @property
    def start(self) -> tuple[int, int] | None:
        """Level and address of the first table; None where the STE is illegal."""
        request = self._walk(0).request
        return None if request is None else (request.level or 0, request.address)

    def pa(self, ipa: int) -> int | None:
        """Return where an intermediate physical address is; None where stage 2 has nothing."""
        walk = self._walk(ipa)
        while (request := walk.request) is not None:
            words = self._picture.words(request.address, 1)
            walk.supply(None if words is None else words[0].to_bytes(8, "little"))
        return None if walk.result is None else walk.result.pa


class Picture:
    """The lines of a picture, as they come.

    Parameters
    ----------
    memory : Memory
    features : Features
        Of the SMMU that reads the tables.
    limit : int
        Lines below one table or CD table; what is beyond is counted.
    lines : list of str
        Where they go; they are those of the pictures before as well.
    most_lines : int
        How many these may be.
    """

    def __init__(
        self, memory: Memory, features: Features, limit: int, lines: list[str], most_lines: int
    ) -> None:
        self.memory = memory
        self.features = features
        self.limit = limit
        self.lines = lines
        self.most_lines = most_lines

    def array(self, address: int, count: int) -> np.ndarray | None:
        """Read dwords; None where memory refuses."""
        try:
            data = self.memory.read(address, 8 * count)
        except ExternalAbort:
            return None
        return np.frombuffer(data, "<u8").astype(np.uint64)

    def words(self, address: int, count: int) -> list[int] | None:
        """Read dwords as a list; None where memory refuses."""
        found = self.array(address, count)
        return None if found is None else found.tolist()

    def stream(self, sid: int, address: int) -> None:
        """Draw what one STE leads to."""
        words = self.words(address, 8)
        if words is None:
            self._line(f"sid {sid:#x}: STE at {address:#x}, which memory refuses")
            return
        ste = layout.unpack("STE", sum(word << 64 * i for i, word in enumerate(words)))
        config = ste["Config"] if ste["V"] else -1
        what = {-1: "invalid", 4: "bypass", 5: "stage 1", 6: "stage 2", 7: "both stages"}
        text = what.get(config, "abort")
        if config & 1 and config > 4 and ste["S1CDMax"] and ste["S1DSS"] != 2:
            text += f", {_S1DSS.get(ste['S1DSS'], 'S1DSS reserved')}"
        self._line(f"sid {sid:#x}: STE at {address:#x}: {text}")
        if config < 4:
            return
        guest = _Stage2(self, ste) if config == 7 else None
        parts = []
        if config & 2:
            parts.append("stage 2")
        if config & 1:
            parts.append("stage 1")
        for part in parts:
            last = part == parts[-1]
            if part == "stage 1":
                self._contexts(ste, guest, last)
            else:
                self._stage2(ste, last)

    def _line(self, text: str) -> None:
        if len(self.lines) >= self.most_lines:
            raise _FullError
        self.lines.append(text)

    def _branch(self, prefix: str, last: bool, text: str) -> str:
        """Add a line; return the prefix of what is below it."""
        self._line(f"{prefix}{'└─' if last else '├─'} {text}")
        return prefix + ("   " if last else "│  ")

    def _stage2(self, ste: dict[str, int], last: bool) -> None:
        text = f"VMID {ste['S2VMID']}, S2TTB {ste['S2TTB']:#x}"
        below = self._branch("", last, text)
        start = _Stage2(self, ste).start
        if start is not None:
            level, table = start
            self._table(below, table, _s2_granule(ste), level, 64 - ste["S2T0SZ"], 2, None)

    def _contexts(self, ste: dict[str, int], guest: _Stage2 | None, last: bool) -> None:
        """Draw a table of context descriptors."""
        base, bits = ste["S1ContextPtr"], min(ste["S1CDMax"], 20)
        leaf_lg2 = _LEAF_LG2.get(ste["S1Fmt"], 0) if bits else 0
        levels = "two levels, " * bool(leaf_lg2)
        count = f"{_size(bits)} CD{'s' * (bits > 0)}"
        below = self._branch(
            "", last, f"CD table at {'IPA ' * bool(guest)}{base:#x}, {levels}{count}"
        )
        if not leaf_lg2:
            self._leaf(below, base, 0, 1 << bits, guest)
            return
        leaves = self._leaves_of(base, 1 << max(bits - leaf_lg2, 0), guest)
        for number, (index, leaf) in enumerate(leaves[: self.limit]):
            inner = self._branch(below, number + 1 == len(leaves), f"[{index}] CDs at {leaf:#x}")
            self._leaf(inner, leaf, index << leaf_lg2, 1 << leaf_lg2, guest)
        self._more(below, len(leaves), "nothing")

    def _leaves_of(self, base: int, count: int, guest: _Stage2 | None) -> list[tuple[int, int]]:
        """Index and address of each leaf of a two-level CD table."""
        found = []
        for start in range(0, count, 512):  # 4 KiB: the smallest page of a guest
            at = self._at(base + 8 * start, guest)
            words = self.words(at, min(512, count - start)) if at is not None else None
            for index, word in enumerate(words or ()):
                if word & 1:
                    found.append((start + index, layout.unpack("L1CD", word)["L2Ptr"]))
        return found

    def _leaf(self, prefix: str, base: int, first: int, count: int, guest: _Stage2 | None) -> None:
        """Draw the CDs that lie side by side, of substreams from `first` on."""
        found: list[tuple[int, int]] = []
        for start in range(0, count, 64):
            at = self._at(base + 64 * start, guest)
            words = self.array(at, 8 * min(64, count - start)) if at is not None else None
            if words is not None and at is not None:
                valid = np.flatnonzero(words[::8] & np.uint64(layout.mask("CD", "V"))).tolist()
                found += [(first + start + index, at + 64 * index) for index in valid]
        for number, (ssid, address) in enumerate(found[: self.limit]):
            self._context(prefix, number + 1 == len(found), ssid, address, guest)
        self._more(prefix, len(found), "no CD is valid")

    def _more(self, prefix: str, count: int, none: str) -> None:
        """Add a line for what is beyond the limit, or for nothing at all."""
        if not count:
            self._branch(prefix, True, none)
        elif count > self.limit:
            self._branch(prefix, True, f"… {count - self.limit} more")

    @staticmethod
    def _at(address: int, guest: _Stage2 | None) -> int | None:
        return address if guest is None else guest.pa(address)

    def _context(
        self, prefix: str, last: bool, ssid: int, address: int, guest: _Stage2 | None
    ) -> None:
        """Draw one context descriptor and its tables."""
        words = self.words(address, 8) or [0] * 8
        cd = layout.unpack("CD", sum(word << 64 * i for i, word in enumerate(words)))
        whose = f"PASID {ssid}" if ssid else "no PASID"
        text = f"CD {ssid} at {address:#x}: {whose}, ASID {cd['ASID']}"
        if cd["EPD0"]:
            self._branch(prefix, last, f"{text}, quiet (EPD0)")
            return
        lg2 = _granule(cd, 0)
        below = self._branch(prefix, last, f"{text}, TTB0 {cd['TTB0']:#x}")
        if lg2:
            bits = 64 - cd["T0SZ"]
            self._table(below, cd["TTB0"], lg2, _first_level(lg2, bits), bits, 1, guest)

    def _table(
        self, prefix: str, table: int, lg2: int, level: int, bits: int, stage: int,
        guest: _Stage2 | None, iova: int = 0,
    ) -> None:  # fmt: skip
        """Draw a table: one line for each table below, and for leaves that continue each other."""
        shift = _shift(lg2, level)
        count = 1 << max(min(bits - shift, lg2 + 1), 0)  # up to 16 tables side by side
        at = self._at(table, guest)
        words = self.array(at, count) if at is not None else None
        if words is None:
            self._branch(prefix, True, f"level {level} table at {table:#x}: memory refuses it")
            return
        rows: list[tuple[str, int, int]] = []  # text, table below, its first input address
        run: list[int] = []  # first index, output, attributes, length
        for index in np.flatnonzero(words & np.uint64(1)).tolist():
            d = int(words[index])
            start = iova + (index << shift)
            if d & 3 == 3 and level < 3:
                lower = descriptor_address(d, lg2, False)
                rows.append((f"[{index}] level {level + 1} table at", lower, start))
                run = []
                continue
            output = descriptor_address(d, lg2, False) & -(1 << shift)
            rest = d & ~_output_bits(lg2)
            if run and [run[0] + run[3], run[1] + (run[3] << shift), run[2]] == [
                index, output, rest,
            ]:  # fmt: skip
                run[3] += 1
                rows.pop()
            else:
                run = [index, output, rest, 1]
            rows.append((self._leaves(run, shift, lg2, level, stage, iova), 0, 0))
        for number, (text, lower, start) in enumerate(rows[: self.limit]):
            last = number + 1 == len(rows)
            if not lower:
                self._branch(prefix, last, text)
                continue
            below = self._branch(prefix, last, f"{text} {lower:#x}")
            self._table(below, lower, lg2, level + 1, shift, stage, guest, start)
        self._more(prefix, len(rows), "nothing is mapped")

    @staticmethod
    def _leaves(run: list[int], shift: int, lg2: int, level: int, stage: int, iova: int) -> str:
        """Put leaves that continue each other into words."""
        index, output, attributes, count = run
        first = iova + (index << shift)
        entries = f"[{index}]" if count == 1 else f"[{index}..{index + count - 1}]"
        if stage == 1:
            leaf = layout.unpack("PTE_S1", attributes)
            allowed = "read" if leaf["AP"] & 2 else "read write"
            allowed += " privileged" * (not leaf["AP"] & 1)
        else:
            access = layout.unpack("PTE_S2", attributes)["S2AP"]
            allowed = ("no access", "read", "write", "read write")[access]
        return (
            f"{entries} {first:#x} to {first + (count << shift) - 1:#x} -> {output:#x}, "
            f"{count} of {_size(shift)}, {allowed}"
        )
