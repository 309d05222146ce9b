from collections.abc import Iterable, Iterator, Sequence
from typing import (
    Any,
    ClassVar,
    Final,
    Literal,
    NoReturn,
    Self,
    SupportsIndex,
    TypeAlias,
    TypeVar,
    final,
    overload,
)

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer, disjoint_base

from smmufast._device.registers import Registers
from smmufast._engine.tlb import StaleEntry as StaleEntry
from smmufast.faults import ACTIONS as ACTIONS
from smmufast.faults import FAULTS as FAULTS
from smmufast.faults import FETCH_KINDS as FETCH_KINDS
from smmufast.faults import AtsResponse, Event, Fetch, Perm
from smmufast.features import modelled as modelled
from smmufast.why import Why as Why

def vectors(on: bool | None = None) -> bool: ...

NO_SUBSTREAM: Final = 4294967295
COLUMNS: Final[dict[str, np.dtype[Any]]]

_Action: TypeAlias = Literal["ok", "bypass", "disabled", "abort", "raz_wi", "stall"]
_Column: TypeAlias = Literal[
    "pa",
    "action",
    "event",
    "fault",
    "perm",
    "level",
    "page_lg2",
    "attr",
    "sh",
    "ipa",
    "stage",
    "record",
    "why",
]
_Flag: TypeAlias = bool | np.bool
_Integers: TypeAlias = SupportsIndex | Sequence[SupportsIndex] | NDArray[np.integer | np.bool]
_Flags: TypeAlias = _Flag | Sequence[_Flag] | NDArray[np.integer | np.bool]
_Out = TypeVar("_Out", bound=NDArray[np.void] | dict[str, NDArray[Any]])

@disjoint_base
class Result:
    def __init__(self) -> None: ...
    def __bool__(self) -> bool: ...
    @property
    def sid(self) -> int: ...
    @property
    def ssid(self) -> int | None: ...
    @property
    def iova(self) -> int: ...
    @property
    def write(self) -> bool: ...
    @property
    def action(self) -> _Action: ...
    @property
    def pa(self) -> int | None: ...
    @property
    def ipa(self) -> int | None: ...
    @property
    def stage(self) -> int: ...
    @property
    def fault(self) -> Event | None: ...
    @property
    def event(self) -> Event | None: ...
    @property
    def why(self) -> Why | None: ...
    @property
    def level(self) -> int | None: ...
    @property
    def page_lg2(self) -> int | None: ...
    @property
    def page_size(self) -> int | None: ...
    @property
    def perm(self) -> Perm: ...
    @property
    def perm_s1(self) -> Perm: ...
    @property
    def attr(self) -> int: ...
    @property
    def memory_type(self) -> str | None: ...
    @property
    def shareability(self) -> int: ...
    @property
    def asid(self) -> int | None: ...
    @property
    def vmid(self) -> int | None: ...
    @property
    def stag(self) -> int | None: ...
    @property
    def is_global(self) -> bool | None: ...
    @property
    def contiguous(self) -> bool | None: ...
    @property
    def fetches(self) -> list[Fetch] | None: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __copy__(self) -> Self: ...
    def __deepcopy__(self, memo: object) -> Self: ...
    def __reduce__(self) -> tuple[Any, ...]: ...
    def explain(self, smmu: Smmu | None = None) -> str: ...
    def _repr_html_(self) -> str: ...

@final
class TracedResult(Result):
    @property
    def fetches(self) -> list[Fetch]: ...
    def __reduce__(self) -> tuple[Any, ...]: ...

@final
class Segments:
    def __init__(self) -> NoReturn: ...
    @property
    def array(self) -> NDArray[np.void]: ...
    @property
    def result(self) -> Result | None: ...
    @property
    def event(self) -> Event | None: ...
    def __bool__(self) -> bool: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[int, int, int]]: ...
    @overload
    def __getitem__(self, index: SupportsIndex, /) -> tuple[int, int, int]: ...
    @overload
    def __getitem__(self, index: slice, /) -> list[tuple[int, int, int]]: ...
    def __contains__(self, segment: object, /) -> bool: ...
    def __reversed__(self) -> Iterator[tuple[int, int, int]]: ...
    def index(self, segment: object, *bounds: int) -> int: ...
    def count(self, segment: object) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    __hash__: ClassVar[None]  # type: ignore[assignment]
    def _repr_html_(self) -> str: ...
    def __copy__(self) -> Segments: ...
    def __deepcopy__(self, memo: object) -> Segments: ...
    def __reduce__(self) -> tuple[Any, ...]: ...

@final
class Transaction:
    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...
    def end(self) -> None: ...

@final
class Walk:
    def __init__(self) -> NoReturn: ...
    @property
    def request(self) -> Fetch | None: ...
    @property
    def done(self) -> bool: ...
    @property
    def result(self) -> Result | None: ...
    def _repr_html_(self) -> str: ...
    def __copy__(self) -> Walk: ...
    def __reduce__(self) -> tuple[Any, ...]: ...
    def supply(self, data: Buffer | NDArray[Any] | int | None) -> None: ...
    def close(self) -> None: ...

@final
class Smmu(Registers):
    def check_ste(self, ste: Buffer) -> Why | None: ...
    def check_cd(self, cd: Buffer, ste: Buffer) -> Why | None: ...
    def check_command(self, command: Buffer) -> Why | None: ...
    def translate(
        self,
        sid: SupportsIndex,
        iova: SupportsIndex,
        *,
        ssid: SupportsIndex | None = None,
        write: _Flag = False,
        priv: _Flag = False,
        instr: _Flag = False,
        trace: bool = False,
        peek: bool = False,
    ) -> Result: ...
    def pa(
        self,
        sid: SupportsIndex,
        iova: SupportsIndex,
        *,
        ssid: SupportsIndex | None = None,
        write: _Flag = False,
        priv: _Flag = False,
        instr: _Flag = False,
        peek: bool = False,
    ) -> int: ...
    @overload
    def translate_batch(
        self,
        sid: _Integers,
        iova: _Integers,
        *,
        ssid: _Integers | None = None,
        write: _Flags = False,
        priv: _Flags = False,
        instr: _Flags = False,
        out: None = None,
        columns: Iterable[_Column] | None = None,
        threads: SupportsIndex = 1,
        peek: bool = False,
    ) -> NDArray[np.void]: ...
    @overload
    def translate_batch(
        self,
        sid: _Integers,
        iova: _Integers,
        *,
        ssid: _Integers | None = None,
        write: _Flags = False,
        priv: _Flags = False,
        instr: _Flags = False,
        out: _Out,
        columns: None = None,
        threads: SupportsIndex = 1,
        peek: bool = False,
    ) -> _Out: ...
    def translate_range(
        self,
        sid: SupportsIndex,
        iova: SupportsIndex,
        size: SupportsIndex,
        *,
        ssid: SupportsIndex | None = None,
        write: _Flag = False,
        priv: _Flag = False,
        instr: _Flag = False,
        peek: bool = False,
    ) -> Segments: ...
    def start_walk(
        self,
        sid: SupportsIndex,
        iova: SupportsIndex,
        *,
        ssid: SupportsIndex | None = None,
        write: _Flag = False,
        priv: _Flag = False,
        instr: _Flag = False,
        holds_sync: _Flag = False,
    ) -> Walk: ...
    def transaction(self) -> Transaction: ...
    def stale(self) -> list[StaleEntry]: ...
    def _repr_html_(self) -> str: ...
    def ats_request(
        self,
        sid: SupportsIndex,
        iova: SupportsIndex,
        *,
        ssid: SupportsIndex | None = None,
        no_write: _Flag = False,
        execute: _Flag = False,
        priv: _Flag = False,
        stu: SupportsIndex = 4096,
    ) -> AtsResponse: ...
    def ats_translated(
        self,
        sid: SupportsIndex,
        address: SupportsIndex,
        *,
        ssid: SupportsIndex | None = None,
        write: _Flag = False,
        priv: _Flag = False,
        instr: _Flag = False,
    ) -> Result: ...
