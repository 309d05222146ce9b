from collections.abc import Iterator
from typing import Any, Final, Literal, NamedTuple, NoReturn, Self, SupportsIndex, final

import numpy as np
from numpy.typing import NDArray

from smmufast.faults import Perm
from smmufast.layout import Opcode, StreamWorld

_Geometry = tuple[int, int] | tuple[int, int, str] | tuple[int, int, str, int]
_Kind = Literal["stage 1", "stage 2", "combined"]
_Nested = Literal["combined", "split"]
_Record = bytes | bytearray | memoryview

POLICIES: Final[tuple[str, ...]]
KINDS: Final[tuple[str, ...]]
NESTED: Final[tuple[str, ...]]
CACHES: Final[tuple[str, ...]]

class Geometry(NamedTuple):
    sets: int
    ways: int
    policy: str = "lru"
    seed: int = 0

class TlbEntry(NamedTuple):
    start: int
    output: int
    lg2: int = 12
    kind: str = "stage 1"
    world: StreamWorld = ...
    vmid: int = 0
    asid: int = 0
    is_global: bool = False
    ipa: int = 0
    sid: int = 0
    ssid: int = 0
    level: int = 3
    perm1: Perm = ...
    perm2: Perm = ...
    attr: int = 0xFF
    sh: int = 0
    clean1: bool = False
    clean2: bool = False
    contiguous: bool = False
    lg2_s1: int = 0
    lg2_s2: int = 0
    level_s1: int = 3
    level_s2: int = 3
    granule_s1: int = 12
    granule_s2: int = 12
    aset: int = 0
    extra: bytes = ...

class WalkEntry(NamedTuple):
    start: int
    table: int
    lg2: int = 21
    kind: str = "stage 1"
    world: StreamWorld = ...
    vmid: int = 0
    asid: int = 0
    output: int = 0
    bits: int = 0
    sid: int = 0
    ssid: int = 0
    level: int = 3
    granule: int = 12
    extra: bytes = ...

class StaleEntry(NamedTuple):
    cache: str
    entry: tuple[object, ...]
    now: tuple[object, ...] | None
    why: str
    sure: bool = True
    def _repr_html_(self) -> str: ...

class SteEntry(NamedTuple):
    sid: int
    data: bytes

class CdEntry(NamedTuple):
    sid: int
    ssid: int
    data: bytes

@final
class Cache:
    def __init__(self, *args: object, **kwargs: object) -> NoReturn: ...
    @property
    def name(self) -> str: ...
    @property
    def geometry(self) -> Geometry: ...
    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...
    @property
    def fills(self) -> int: ...
    @property
    def evictions(self) -> int: ...
    @property
    def replacements(self) -> int: ...
    @property
    def invalidations(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...

@final
class Caches:
    def __new__(
        cls,
        *,
        ste: _Geometry | None = None,
        cd: _Geometry | None = None,
        tlb: _Geometry | None = None,
        walk1: _Geometry | None = None,
        walk2: _Geometry | None = None,
        nested: _Nested = "combined",
    ) -> Self: ...
    @classmethod
    def small(cls, *, nested: _Nested = "combined") -> Caches: ...
    @classmethod
    def server(cls, *, nested: _Nested = "combined") -> Caches: ...
    @property
    def ste(self) -> Cache | None: ...
    @property
    def cd(self) -> Cache | None: ...
    @property
    def tlb(self) -> Cache | None: ...
    @property
    def walk1(self) -> Cache | None: ...
    @property
    def walk2(self) -> Cache | None: ...
    @property
    def config_generation(self) -> int: ...
    @property
    def tlb_generation(self) -> int: ...
    @property
    def nested(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def counters(self) -> dict[str, dict[str, int]]: ...
    def counters_array(self) -> NDArray[np.void]: ...
    def reset_counters(self) -> None: ...
    def invalidate_all(self) -> int: ...
    def __len__(self) -> int: ...
    def __bool__(self) -> Literal[True]: ...
    def lookup(
        self,
        address: SupportsIndex,
        *,
        kind: _Kind = "stage 1",
        world: StreamWorld | int | str = "NS_EL1",
        vmid: SupportsIndex = 0,
        asid: SupportsIndex = 0,
        aset: SupportsIndex = 0,
    ) -> TlbEntry | None: ...
    def fill(self, entry: TlbEntry, /) -> None: ...
    def lookup_walk(
        self,
        address: SupportsIndex,
        *,
        kind: _Kind = "stage 1",
        world: StreamWorld | int | str = "NS_EL1",
        vmid: SupportsIndex = 0,
        asid: SupportsIndex = 0,
    ) -> WalkEntry | None: ...
    def fill_walk(self, entry: WalkEntry, /) -> None: ...
    def lookup_ste(self, sid: SupportsIndex) -> bytes | None: ...
    def fill_ste(self, sid: SupportsIndex, data: _Record) -> None: ...
    def lookup_cd(self, sid: SupportsIndex, ssid: SupportsIndex = 0) -> bytes | None: ...
    def fill_cd(self, sid: SupportsIndex, ssid: SupportsIndex, data: _Record) -> None: ...
    def tlbi(
        self,
        op: Opcode | int | str,
        *,
        vmid: SupportsIndex = 0,
        asid: SupportsIndex = 0,
        address: SupportsIndex | None = None,
        last: SupportsIndex | None = None,
        leaf: bool = False,
        granule: int = 0,
        level: SupportsIndex = 0,
        vmid_mask: SupportsIndex = 0xFFFF,
    ) -> int: ...
    def cfgi(
        self,
        op: Opcode | int | str,
        *,
        sid: SupportsIndex = 0,
        ssid: SupportsIndex = 0,
        leaf: bool = False,
        range: SupportsIndex = 31,
    ) -> int: ...
    def _repr_html_(self) -> str: ...
    def copy(self) -> Caches: ...
    def __getstate__(self) -> bytes: ...
    def __setstate__(self, state: bytes) -> None: ...
    def __reduce__(self) -> tuple[Any, ...]: ...
