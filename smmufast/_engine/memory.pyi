from collections.abc import Callable
from typing import Any, Literal, NamedTuple, SupportsIndex, TypeAlias, final, overload

from numpy.typing import NDArray
from typing_extensions import Buffer, CapsuleType

from smmufast.faults import ACCESS_KINDS as ACCESS_KINDS
from smmufast.faults import ExternalAbort as ExternalAbort

# numpy's arrays have a buffer, which their stubs say from Python 3.12 on only
_Bytes: TypeAlias = Buffer | NDArray[Any]
_Read: TypeAlias = Callable[[int, int], _Bytes | None]
_Write: TypeAlias = Callable[[int, bytes], Literal[True] | None]
_Swap: TypeAlias = Callable[[int, bytes, bytes], bytes | None]

_Kind: TypeAlias = Literal[
    "L1STD", "STE", "L1CD", "CD", "TT", "S2TT", "TT update", "S2TT update",
    "CMD", "EVENT", "PRI", "MSI",
]  # fmt: skip

class MemoryRegion(NamedTuple):
    base: int
    size: int
    kind: str
    readonly: bool

@final
class Memory:
    def __init__(self) -> None: ...
    def add(self, buffer: _Bytes, base: SupportsIndex, *, readonly: bool | None = None) -> None: ...
    def add_private(
        self,
        base: SupportsIndex = 0,
        size: SupportsIndex = 4503599627370496,
        *,
        huge_pages: bool = False,
        sparse: bool = False,
    ) -> None: ...
    @overload
    def add_callback(
        self, base: SupportsIndex, size: SupportsIndex, read: _Read, write: None = None
    ) -> None: ...
    @overload
    def add_callback(
        self,
        base: SupportsIndex,
        size: SupportsIndex,
        read: _Read,
        write: _Write,
        swap: _Swap | None = None,
    ) -> None: ...
    @overload
    def add_callback(
        self, base: SupportsIndex, size: SupportsIndex, read: CapsuleType, write: None = None
    ) -> None: ...
    def remove(self, base: SupportsIndex) -> None: ...
    @property
    def regions(self) -> list[MemoryRegion]: ...
    def read(self, address: SupportsIndex, size: SupportsIndex) -> bytes: ...
    def fetch(
        self,
        address: SupportsIndex,
        size: SupportsIndex,
        *,
        kind: _Kind | None = None,
        level: SupportsIndex | None = None,
    ) -> bytes: ...
    def write(self, address: SupportsIndex, data: _Bytes) -> None: ...
    def read_u64(self, address: SupportsIndex, *, big_endian: bool = False) -> int: ...
    def write_u64(
        self, address: SupportsIndex, value: SupportsIndex, *, big_endian: bool = False
    ) -> None: ...
    def inject_error(
        self,
        *,
        address: SupportsIndex | None = None,
        size: SupportsIndex | None = None,
        kind: _Kind | None = None,
        level: SupportsIndex | None = None,
        nth: SupportsIndex | None = None,
        count: SupportsIndex | None = None,
    ) -> int: ...
    def remove_error(self, number: SupportsIndex) -> None: ...
    def clear_errors(self) -> None: ...
    def _repr_html_(self) -> str: ...
    def copy(self) -> Memory: ...
    def __copy__(self) -> Memory: ...
    def __deepcopy__(self, memo: object) -> Memory: ...
