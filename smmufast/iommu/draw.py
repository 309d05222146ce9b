"""Pictures of what a stream's STE leads to: CD table, CDs, page tables, in lines of text.

Drawn from the bytes in memory alone (IHI 0070 5.2, 5.3, 5.4; DDI 0487 D8.3): what the driver half
keeps beside them is not asked, so that a picture shows what the SMMU finds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final, SupportsIndex

import numpy as np

from smmufast import layout
from smmufast.errors import InvalidArgument
from smmufast.explain import _address, _first_level, _granule, _s2_granule, _s2_level, _shift
from smmufast.faults import ExternalAbort

if TYPE_CHECKING:
    from smmufast._memory import Memory
    from smmufast.iommu.system import Iommu

_LEAF_LG2: Final = {1: 6, 2: 10}  # S1Fmt: lg2 of the CDs in a leaf of 4 KiB and of 64 KiB
_S1DSS: Final = {0: "no PASID: terminated", 1: "no PASID: bypass", 2: "no PASID: CD 0"}
_UNITS: Final = ("", "K", "M", "G", "T")


def _size(lg2: int) -> str:
    return f"{1 << lg2 % 10}{_UNITS[lg2 // 10]}"


def draw(streams: Iterable[tuple[Iommu, int]], limit: SupportsIndex) -> str:
    """Draw what the STEs of some streams lead to; `Device.draw` says more."""
    most = limit.__index__()
    if most < 1:
        raise InvalidArgument("limit", most, "1 or more")
    lines: list[str] = []
    for iommu, sid in streams:
        picture = Picture(iommu.memory, most)
        picture.stream(sid, iommu.ste_address(sid))
        lines += picture.lines
    return "\n".join(lines)


class _Stage2:
    """Addresses of a guest, as the tables of stage 2 put them into memory."""

    def __init__(self, picture: Picture, ste: dict[str, int]) -> None:
        self._picture = picture
        self._ste = ste

    def pa(self, ipa: int) -> int | None:
        """Return where an intermediate physical address is; None where stage 2 has nothing."""
        lg2, level = _s2_granule(self._ste), _s2_level(self._ste, None)
        if not lg2 or level is None or ipa >> (64 - self._ste["S2T0SZ"]):
            return None
        table = self._ste["S2TTB"]
        while True:
            shift = _shift(lg2, level)
            first = level == _s2_level(self._ste, None)
            index = ipa >> shift & ((1 << 20) - 1 if first else (1 << lg2 - 3) - 1)
            (d,) = self._picture.words(table + 8 * index, 1) or (0,)
            if d & 3 == 3 and level < 3:
                table, level = _address(d, lg2, False), level + 1
            elif d & 1:
                return _address(d, lg2, False) & -(1 << shift) | ipa & (1 << shift) - 1
            else:
                return None


class Picture:
    """The lines of a picture, as they come.

    Parameters
    ----------
    memory : Memory
    limit : int
        Lines below one table or CD table; what is beyond is counted.
    """

    def __init__(self, memory: Memory, limit: int) -> None:
        self.memory = memory
        self.limit = limit
        self.lines: list[str] = []

    def words(self, address: int, count: int) -> list[int] | None:
        """Read dwords; None where memory refuses."""
        try:
            data = self.memory.read(address, 8 * count)
        except ExternalAbort:
            return None
        return [int(word) for word in np.frombuffer(data, "<u8")]

    def stream(self, sid: int, address: int) -> None:
        """Draw what one STE leads to."""
        words = self.words(address, 8)
        if words is None:
            self.lines.append(f"sid {sid:#x}: STE at {address:#x}, which memory refuses")
            return
        ste = layout.unpack("STE", sum(word << 64 * i for i, word in enumerate(words)))
        config = ste["Config"] if ste["V"] else -1
        what = {-1: "invalid", 4: "bypass", 5: "stage 1", 6: "stage 2", 7: "both stages"}
        text = what.get(config, "abort")
        if config & 1 and config > 4 and ste["S1CDMax"]:
            text += f"; {_S1DSS.get(ste['S1DSS'], 'no PASID: reserved S1DSS')}"
        self.lines.append(f"sid {sid:#x}: STE at {address:#x}: {text}")
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

    def _branch(self, prefix: str, last: bool, text: str) -> str:
        """Add a line; return the prefix of what is below it."""
        self.lines.append(f"{prefix}{'└─' if last else '├─'} {text}")
        return prefix + ("   " if last else "│  ")

    def _stage2(self, ste: dict[str, int], last: bool) -> None:
        lg2, level = _s2_granule(ste), _s2_level(ste, None)
        text = f"VMID {ste['S2VMID']}, S2TTB {ste['S2TTB']:#x}"
        below = self._branch("", last, text)
        if lg2 and level is not None:
            bits = 64 - ste["S2T0SZ"]
            self._table(below, ste["S2TTB"], lg2, level, bits, 2, None)

    def _contexts(self, ste: dict[str, int], guest: _Stage2 | None, last: bool) -> None:
        base, bits = ste["S1ContextPtr"], ste["S1CDMax"]
        two = bits and ste["S1Fmt"]
        form = f"level 1 of {_size(bits)} CDs" if two else f"{_size(bits)} CD{'s' * (bits > 0)}"
        below = self._branch("", last, f"CD table at {'IPA ' * bool(guest)}{base:#x}, {form}")
        found = list(self._cds(base, bits, ste["S1Fmt"] if two else 0, guest))
        rows: list[tuple[str, int | None, int]] = []  # text, SSID of a CD, its address
        leaf_of = -1
        for ssid, address, leaf in found:
            if two and leaf != leaf_of:
                leaf_of = leaf
                first = ssid >> _LEAF_LG2[ste["S1Fmt"]] << _LEAF_LG2[ste["S1Fmt"]]
                rows.append((f"[{first >> _LEAF_LG2[ste['S1Fmt']]}] leaf at {leaf:#x}", None, 0))
            rows.append(("", ssid, address))
        shown = rows[: self.limit]
        for index, (text, ssid, address) in enumerate(shown):
            end = index + 1 == len(rows)
            if ssid is None:
                self._branch(below, end, text)
            else:
                self._context(below, end, ssid, address, guest)
        if len(rows) > len(shown):
            self._branch(below, True, f"… {len(rows) - len(shown)} more")

    def _cds(
        self, base: int, bits: int, fmt: int, guest: _Stage2 | None
    ) -> Iterator[tuple[int, int, int]]:
        """Yield SubstreamID, address and leaf of each valid CD."""
        leaves = [(0, base)]
        lg2 = bits
        if fmt:
            lg2 = _LEAF_LG2.get(fmt, 10)
            leaves = []
            for index in range(1 << max(bits - lg2, 0)):
                at = self._at(base + 8 * index, guest)
                word = self.words(at, 1) if at is not None else None
                if word and word[0] & 1:
                    leaves.append((index << lg2, layout.unpack("L1CD", word[0])["L2Ptr"]))
        for first, leaf in leaves:
            for start in range(0, 1 << lg2, 64):  # 4 KiB: the smallest page of a guest
                at = self._at(leaf + 64 * start, guest)
                count = min(64, (1 << lg2) - start)
                found = self.words(at, 8 * count) if at is not None else None
                for index in range(count) if found else ():
                    assert found is not None and at is not None
                    if found[8 * index] >> 31 & 1:
                        yield first + start + index, at + 64 * index, leaf

    @staticmethod
    def _at(address: int, guest: _Stage2 | None) -> int | None:
        return address if guest is None else guest.pa(address)

    def _context(
        self, prefix: str, last: bool, ssid: int, address: int, guest: _Stage2 | None
    ) -> None:
        words = self.words(address, 8) or [0] * 8
        cd = layout.unpack("CD", sum(word << 64 * i for i, word in enumerate(words)))
        text = f"CD {ssid} at {address:#x}: ASID {cd['ASID']}"
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
        count = 1 << max(bits - shift, 0)
        at = self._at(table, guest)
        words = self.words(at, count) if at is not None else None
        if words is None:
            self._branch(prefix, True, f"level {level} table at {table:#x}: memory refuses it")
            return
        rows: list[tuple[str, int, int]] = []  # text, table below, its first input address
        run: list[int] = []  # first index, output, attributes, length
        for index in np.flatnonzero(np.array(words, np.uint64) & np.uint64(1)).tolist():
            d = words[index]
            start = iova + (index << shift)
            if d & 3 == 3 and level < 3:
                rows.append((f"[{index}] level {level + 1} table at", _address(d, lg2, False), start))
                run = []
                continue
            output = _address(d, lg2, False) & -(1 << shift)
            rest = d & ~(_address(-1, lg2, False) | 0xF000 * (lg2 == 16)) & ~(1 << 52)
            if run and [run[0] + run[3], run[1] + (run[3] << shift), run[2]] == [
                index, output, rest,
            ]:  # fmt: skip
                run[3] += 1
                rows.pop()
            else:
                run = [index, output, rest, 1]
            rows.append((self._leaves(run, shift, lg2, level, stage, iova), 0, 0))
        if not rows:
            self._branch(prefix, True, "nothing mapped")
        shown = rows[: self.limit]
        for number, (text, lower, start) in enumerate(shown):
            last = number + 1 == len(rows)
            if not lower:
                self._branch(prefix, last, text)
                continue
            below = self._branch(prefix, last, f"{text} {lower:#x}")
            self._table(below, lower, lg2, level + 1, shift, stage, guest, start)
        if len(rows) > len(shown):
            self._branch(prefix, True, f"… {len(rows) - len(shown)} more")

    @staticmethod
    def _leaves(
        run: list[int], shift: int, lg2: int, level: int, stage: int, iova: int
    ) -> str:
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
