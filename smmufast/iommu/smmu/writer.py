"""Changes an STE or a CD while an SMMU may read it, with few stores and CMD_SYNCs (F44).

The used bits of an STE and a CD are those of IHI 0070 5.2 and 5.4 that its other fields make the
SMMU read.  How few steps an update takes is not architectural: it follows what Linux does.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from smmufast import layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from smmufast._memory import Memory
    from smmufast.iommu.smmu.queue import CommandQueue

_ALL: Final = (1 << 64) - 1
_CONFIG: Final = layout.STE.field("Config")
_DWORDS: Final = struct.Struct("<8Q")
_DWORD: Final = tuple(_ALL << 64 * i for i in range(8))  # the bits of each in an entry


class Update(NamedTuple):
    """How an entry was changed: CMD_SYNCs that it took, and whether it was valid throughout."""

    syncs: int
    hitless: bool


def _mask(record: str, *names: str) -> int:
    """The bits that some fields of a record take."""
    mask = 0
    for name in names:
        mask |= layout.record(record).field(name).absolute
    return mask


_STE_V: Final = _mask("STE", "V")
_STE_CONFIG: Final = _mask("STE", "V", "Config")
_STE_S1: Final = _mask(
    "STE", "S1Fmt", "S1ContextPtr", "S1CDMax", "S1DSS", "S1CIR", "S1COR", "S1CSH", "S1STALLD",
    "STRW", "EATS", "MEV", "S2VMID",
)  # fmt: skip
_STE_S2: Final = _mask(
    "STE", "S2FWB", "EATS", "SHCFG", "MEV", "S2VMID", "S2T0SZ", "S2SL0", "S2IR0", "S2OR0", "S2SH0",
    "S2TG", "S2PS", "S2AA64", "S2ENDI", "S2PTW", "S2S", "S2R", "S2TTB",
)  # fmt: skip
_STE_SHCFG: Final = _mask("STE", "SHCFG")
_STE_MEV: Final = _mask("STE", "MEV")
_STE_EATS: Final = _mask("STE", "EATS")
_STE_S1DSS: Final = _mask("STE", "S1DSS")
_STE_BYPASS_DSS: Final = layout.pack("STE", S1DSS=1)
_STE_S2S: Final = _mask("STE", "S2S")
_CD_V: Final = _mask("CD", "V")
_CD_EPD0: Final = _mask("CD", "EPD0")
_ENTRY: Final = (1 << 512) - 1
_CD_NO_TTB0: Final = _ENTRY & ~_mask("CD", "T0SZ", "TG0", "IR0", "OR0", "SH0", "TTB0")


def ste_used(ste: int) -> int:
    """The bits of an STE, as one number, that the SMMU reads."""
    if not ste & _STE_V:
        return _STE_V
    used = _STE_CONFIG
    config = ste_config(ste)
    if config & 4:
        if config & 1:
            used |= _STE_S1
            if ste & _STE_S1DSS == _STE_BYPASS_DSS:
                used |= _STE_SHCFG
        if config & 2:
            used |= _STE_S2
        if config == 4:
            used |= _STE_SHCFG
    return used


def ste_config(ste: int) -> int:
    """Config of an STE, or of its first dword."""
    return (ste & _CONFIG.mask) >> _CONFIG.shift


def ste_safe(old: int, new: int) -> int:
    """The bits of an STE that may change at any time, though both values use them."""
    low = _STE_EATS & -_STE_EATS
    if not (old | new) & (_STE_EATS ^ low | _STE_S2S):
        return _STE_MEV | low
    return _STE_MEV


def cd_used(cd: int) -> int:
    """The bits of a CD, as one number, that the SMMU reads."""
    if not cd & _CD_V:
        return _CD_V
    return _CD_NO_TTB0 if cd & _CD_EPD0 else _ENTRY


class EntryWriter:
    """Changes STEs and CDs so that the SMMU, which may read them at any time, sees no torn one.

    Parameters
    ----------
    queue : CommandQueue
    memory : Memory
    safe_bits : bool
        Use the bits that may change at any time.
    call : callable, optional
        Calls the observer, with it and its arguments; to let it raise at a better time.

    Attributes
    ----------
    observer : callable or None
        Called as ``observer(address, index, old_words)`` after each store of a dword.
    """

    def __init__(
        self,
        queue: CommandQueue,
        memory: Memory,
        *,
        safe_bits: bool = True,
        call: Callable[..., object] | None = None,
    ) -> None:
        self.queue = queue
        self.memory = memory
        self.safe_bits = safe_bits
        self.call = call or (lambda observer, *arguments: observer(*arguments))
        self.observer: Callable[[int, int, tuple[int, ...]], object] | None = None

    def read(self, address: int) -> tuple[int, ...]:
        """The eight dwords of the entry at `address`."""
        return _DWORDS.unpack(self.memory.read(address, 64))

    def write_ste(self, address: int, words: Sequence[int], sid: int) -> Update:
        """Make the STE at `address`, of stream `sid`, eight dwords; CFGI_STE at each step."""
        command = layout.pack("CFGI_STE", StreamID=sid, Leaf=1)
        safe = ste_safe if self.safe_bits else None
        return self._write(address, words, ste_used, safe, [command])

    def write_cd(
        self, address: int, words: Sequence[int], sids: Iterable[int], ssid: int
    ) -> Update:
        """Make the CD at `address` eight dwords; CFGI_CD of each stream at each step."""
        commands = [
            layout.pack("CFGI_CD", StreamID=sid, SubstreamID=ssid, Leaf=1) for sid in sids
        ]
        return self._write(address, words, cd_used, None, commands)

    def _write(
        self,
        address: int,
        words: Sequence[int],
        used: Callable[[int], int],
        safe: Callable[[int, int], int] | None,
        commands: Sequence[int],
    ) -> Update:
        with self.queue.lock:
            now = int.from_bytes(self.memory.read(address, 64), "little")
            target = int.from_bytes(_DWORDS.pack(*words), "little")
            if now == target:
                return Update(0, True)
            now_used, target_used = used(now), used(target)
            if safe is not None:
                now_used &= ~(safe(now, target) & target_used)
            # all that can change before anybody sees it
            ahead = now ^ (now ^ target) & ~now_used
            critical = [i for i in range(8) if (ahead ^ target) & target_used & _DWORD[i]]
            steps: list[tuple[Iterable[int], int]]
            if not critical:
                steps = [(range(8), target)]
            elif len(critical) == 1:
                (i,) = critical
                steps = [
                    ([k for k in range(8) if k != i], ahead), ([i], target), (range(8), target),
                ]  # fmt: skip
            else:
                steps = [([0], 0), (range(1, 8), target), ([0], target)]
            syncs, hitless = 0, True
            for indices, wanted in steps:
                changed = False
                for i in indices:
                    change = (now ^ wanted) & _DWORD[i]
                    if change:
                        old = now
                        now ^= change
                        self.memory.write_u64(address + 8 * i, now >> 64 * i & _ALL)
                        changed = True
                        if self.observer is not None:
                            self.call(self.observer, address, i, _dwords(old))
                if changed:
                    self.queue.run(commands)
                    syncs += 1
                    hitless = hitless and now & _ALL != 0
            return Update(syncs, hitless)


def _dwords(entry: int) -> tuple[int, ...]:
    return _DWORDS.unpack(entry.to_bytes(64, "little"))
