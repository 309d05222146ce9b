"""STEs and CDs as a driver writes them, as eight dwords each (IHI 0070 5.2 and 5.4).

The values are those of Linux: what it leaves at 0 is 0 here.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

from smmufast import layout
from smmufast._arguments import must_be
from smmufast.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smmufast.features import Features

Words = tuple[int, ...]

WRITE_BACK: Final = 1  # S1CIR, S1COR: write-back, read- and write-allocate
INNER_SHAREABLE: Final = 3
INCOMING: Final = 1  # SHCFG
_MASK: Final = (1 << 64) - 1


def _words(record: str, **fields: int) -> Words:
    word = layout.pack(record, **fields)
    return tuple(word >> 64 * i & _MASK for i in range(8))


_CONFIG: Final = layout.STE.field("Config")
_S1CONTEXTPTR: Final = layout.STE.field("S1ContextPtr").mask  # dword 0
_ASID_SHIFT: Final = layout.CD.field("ASID").shift  # dword 0
_MAX_ASID: Final = (1 << layout.CD.field("ASID").width) - 1
_TTB0: Final = layout.CD.field("TTB0").mask  # dword 1, in place


def ste_config(word: int) -> int:
    """Config of an STE, from its first dword."""
    return (word & _CONFIG.mask) >> _CONFIG.shift


_ABORT: Final = _words("STE", V=1)


def ste_abort() -> Words:
    """Every access aborts, without an event."""
    return _ABORT


def ste_bypass(*, features: Features) -> Words:
    """Both stages are bypassed; the shareability is the incoming one."""
    return _words("STE", V=1, Config=4, SHCFG=INCOMING if features.attr_types_ovr else 0)


@functools.lru_cache(maxsize=256)
def _ste(fmt: int, s1cdmax: int, s1dss: int, ats: bool, stalld: bool, e2h: bool) -> Words:
    return _words(
        "STE", V=1, Config=5, S1Fmt=fmt, S1CDMax=s1cdmax, S1DSS=s1dss, S1CIR=WRITE_BACK,
        S1COR=WRITE_BACK, S1CSH=INNER_SHAREABLE, S1STALLD=int(stalld), EATS=int(ats),
        STRW=2 if e2h else 0, SHCFG=INCOMING if s1dss == 1 else 0,
    )  # fmt: skip


def ste_cd_table(
    base: int, *, fmt: int, s1cdmax: int, s1dss: int, ats: bool, stall: bool, e2h: bool,
    features: Features,
) -> Words:  # fmt: skip
    """Stage 1, through the CD table at `base`.

    Parameters
    ----------
    base : int
        Address of the table.
    fmt, s1cdmax, s1dss : int
        The fields of these names.
    ats : bool
        Translation requests are answered.
    stall : bool
        The device can wait for faults to be resolved.
    e2h : bool
        The StreamWorld is EL2-E2H.
    features : Features
    """
    words = _ste(fmt, s1cdmax, s1dss, ats, features.stall_model == 0 and not stall, e2h)
    if base & ~_S1CONTEXTPTR:
        raise InvalidArgument("base", base, f"0 to {_S1CONTEXTPTR:#x}")
    return (words[0] | base, *words[1:])


def ste_stage2(table: Any, vmid: int, *, stall: bool, ats: bool, features: Features) -> Words:
    """Stage 2, through a page table of `_driver.tables`; S2S and EATS exclude each other."""
    rest = _stage2(table, vmid, stall and not ats, features)
    return _words("STE", V=1, Config=6, EATS=int(ats), **rest)


def _stage2(table: Any, vmid: int, stall: bool, features: Features) -> dict[str, int]:
    return {
        "SHCFG": INCOMING if features.attr_types_ovr else 0, "S2VMID": vmid,
        "S2T0SZ": table.t0sz, "S2SL0": table.sl0, "S2IR0": table.irgn, "S2OR0": table.orgn,
        "S2SH0": table.sh, "S2TG": table.tg, "S2PS": table.ps, "S2AA64": 1, "S2PTW": 1, "S2R": 1,
        "S2S": int(stall), "S2TTB": table.root, "S2FWB": int(table.fwb),
    }  # fmt: skip


_V: Final = layout.mask("STE", "V")
_EATS: Final = layout.STE.field("EATS")
_GUEST_0 = layout.pack("STE", V=1, Config=7, S1Fmt=3, S1CDMax=31, S1ContextPtr=(1 << 56) - 64)
_GUEST_1 = layout.pack("STE", S1DSS=3, S1CIR=3, S1COR=3, S1CSH=3, S1STALLD=1, EATS=1) >> 64


def check_guest_ste(words: Sequence[int]) -> None:
    """Refuse a guest's STE that asks for more than a guest may (EINVAL).

    Raises
    ------
    InvalidArgument
        Not two dwords, a Config other than abort, bypass or stage 1, or other bits.
    """
    if len(words) != 2:
        raise InvalidArgument("ste", words, "2 dwords")
    if words[0] & ~_GUEST_0 or words[1] & ~_GUEST_1 or min(words) < 0:
        raise InvalidArgument(
            "ste", words, text="ste has bits that a guest may not set: "
            f"{words[0] & ~_GUEST_0:#x}, {words[1] & ~_GUEST_1:#x}",
        )  # fmt: skip
    if words[0] & _V and ste_config(words[0]) not in (0, 4, 5):
        text = must_be("Config of ste", "0, 4 or 5", ste_config(words[0]))
        raise InvalidArgument("ste", words, text=text)


def eats(words: Sequence[int]) -> int:
    """The EATS field of a guest's STE."""
    return (words[1] & _EATS.mask) >> _EATS.shift


def ste_nested(
    table: Any, vmid: int, guest: Sequence[int], *, stall: bool, ats: bool, features: Features
) -> Words:
    """Write a guest's STE over a host's stage 2: abort, stage 2 alone, or both stages."""
    config = ste_config(guest[0])
    if not guest[0] & _V or config == 0:
        return ste_abort()
    if config == 4:
        return ste_stage2(table, vmid, stall=stall, ats=False, features=features)
    ats = ats and eats(guest) == 1
    two = _words("STE", V=1, Config=7, MEV=1, **_stage2(table, vmid, stall and not ats, features))
    first = guest[0] & ~layout.mask("STE", "V", "Config") | two[0]
    second = guest[1] & ~_EATS.mask | two[1] | (1 << _EATS.shift if ats else 0)
    return (first, second, *two[2:])


@functools.lru_cache(maxsize=256)
def _cd(
    t0sz: int, tg: int, irgn: int, orgn: int, sh: int, ps: int, mair: int, stall: bool, dirty: bool
) -> Words:
    return _words(
        "CD", V=1, AA64=1, EPD1=1, R=1, A=1, ASET=1, S=int(stall), HA=int(dirty), HD=int(dirty),
        T0SZ=t0sz, TG0=tg, IR0=irgn, OR0=orgn, SH0=sh, IPS=ps, MAIR0=mair & 0xFFFF_FFFF,
        MAIR1=mair >> 32,
    )  # fmt: skip


def cd_paging(table: Any, asid: int, *, stall: bool, dirty: bool) -> Words:
    """The CD of a paging domain: TTB0 alone, faults recorded, terminated accesses abort."""
    words = _cd(
        table.t0sz, table.tg, table.irgn, table.orgn, table.sh, table.ps, table.mair, stall, dirty
    )
    root = table.root
    if not 0 <= asid <= _MAX_ASID or root & ~_TTB0:
        raise InvalidArgument("asid", asid, text=f"asid is {asid:#x}, the table at {root:#x}")
    return (words[0] | asid << _ASID_SHIFT, words[1] | root, *words[2:])


def cd_sva(space: Any, asid: int, *, stall: bool) -> Words:
    """The CD of a process's address space."""
    return cd_paging(space, asid, stall=stall, dirty=False)


_QUIET_CLEAR: Final = (
    layout.pack("CD", T0SZ=63, TG0=3, IR0=3, OR0=3, SH0=3),
    layout.pack("CD", TTB0=(1 << 56) - 16) >> 64,
)


def cd_quiet(words: Sequence[int], *, stall_force: bool) -> Words:
    """Make a CD refuse everything without an event, and stay valid (F34)."""
    first = words[0] & ~_QUIET_CLEAR[0] | layout.pack("CD", EPD0=1)
    if not stall_force:
        first &= ~layout.pack("CD", S=1, R=1)
    return (first, words[1] & ~_QUIET_CLEAR[1], *words[2:])
