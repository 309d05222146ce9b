"""Whole systems as bytes: what `System.save` writes and `System.restore` reads.

Not architectural.  Everything but the memory is in the bytes: the SMMUs as `Smmu.save` has them,
and the driver half's objects as a pickle that may name nothing but this library's classes, and
those that the caller allows.  Callbacks are the host's, and are left out.
"""

from __future__ import annotations

import io
import pickle
import threading
from collections import Counter, OrderedDict, deque
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet
from zlib import crc32

from smmufast._device import smmu
from smmufast._driver.tables import Pages, PageTable
from smmufast._engine.memory import Memory
from smmufast.ats import AtsDevice
from smmufast.errors import InvalidArgument
from smmufast.iommu.device import Device
from smmufast.iommu.domain import NestedDomain, SvaDomain
from smmufast.iommu.lock import SystemLock
from smmufast.iommu.smmu.iommu import Iommu
from smmufast.iommu.smmu.writer import EntryWriter
from smmufast.iommu.sva import AddressSpace

if TYPE_CHECKING:
    from collections.abc import Iterable

    from smmufast.iommu.system import System

MARK: Final = b"smmufast system 1\n"
_MEMORY: Final = "memory"
_RLOCK: Final = type(threading.RLock())
#: Attributes that hold a function of the host.
_CALLBACKS: Final = (
    "handler", "iopf", "mm_exit", "on_fault", "on_page_request",
)  # fmt: skip
#: What refuses copies of its own, or holds a callback.
_PARTS: Final = (AddressSpace, AtsDevice, Device, Iommu, NestedDomain, SvaDomain)
_MODULES: Final = (
    "smmufast.iommu.", "smmufast.ats", "smmufast.features", "smmufast.faults",
    "smmufast._driver.pasid", "smmufast._driver.ring",
)  # fmt: skip
_OTHERS: Final = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("collections", "deque"): deque,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "Counter"): Counter,
    ("smmufast._device.smmu", "_restored"): smmu._restored,  # type: ignore[attr-defined]
}


def _no_callbacks(state: dict[str, Any]) -> dict[str, Any]:
    kept = dict[str, Any](state)
    # `iopf` of a system is whether it has page faults at all
    kept.update((name, None) for name in _CALLBACKS if callable(state.get(name)))
    if "spaces" in kept:
        kept["spaces"] = [*kept["spaces"]]  # weak, until the system is whole again
    return kept


class _Pickler(pickle.Pickler):
    """Pickles a system as one thing; its parts refuse copies of their own."""

    def __init__(self, file: io.BytesIO, system: System) -> None:
        super().__init__(file, 5)
        self._system = system

    def persistent_id(self, value: object) -> str | None:
        if isinstance(value, Memory):
            if value is not self._system.memory:
                raise InvalidArgument("system", value, text="the system has parts in two memories")
            return _MEMORY
        return None

    def reducer_override(self, value: object) -> Any:
        """Return how a value is pickled that has a lock, or memory of its own."""
        if isinstance(value, SystemLock):
            return SystemLock, ()
        if isinstance(value, _RLOCK):
            return _lock, ()
        if isinstance(value, Pages):
            return _pages, (value.memory, value.base, value.size, value._handed_out())
        if isinstance(value, EntryWriter):
            return EntryWriter, (value.queue, value.memory)
        if isinstance(value, PageTable):
            state = (value.pages, *value._contents(), _no_callbacks(vars(value)))
            return _thing, (type(value),), state, None, None, _set_table
        if value is self._system or isinstance(value, _PARTS):
            return _thing, (type(value),), _no_callbacks(vars(value))
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    """Reads what `_Pickler` wrote; names no function and no class of others."""

    def __init__(self, file: io.BytesIO, memory: Memory, classes: Iterable[type] | None) -> None:
        super().__init__(file)
        self._memory = memory
        self._any = classes is None
        self._classes = {(one.__module__, one.__qualname__): one for one in classes or ()}

    def persistent_load(self, pid: object) -> Memory:
        if pid != _MEMORY:
            raise pickle.UnpicklingError(f"an object {pid!r}, which is none")
        return self._memory

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that a saved system may name."""
        known = {**_OTHERS, **self._classes}.get((module, name))
        if known is not None:
            return known
        if self._any:
            return super().find_class(module, name)
        if module.startswith(_MODULES) and "." not in name:
            found = super().find_class(module, name)
            kind = found if isinstance(found, type) else type(found)  # a class, or a constant
            if kind.__module__.startswith(_MODULES) or found in _MAKERS:
                return found
        raise pickle.UnpicklingError(f"{module}.{name}, which `classes` does not allow")


def save(system: System) -> bytes:
    """Return everything of a system but its memory."""
    file = io.BytesIO()
    with system.lock:
        _Pickler(file, system).dump(system)
    data = MARK + file.getvalue()
    return data + crc32(data).to_bytes(4, "little")


def restore(data: object, memory: Memory, classes: Iterable[type] | None) -> System:
    """Make the system again, over its memory or a copy of it; None allows every class."""
    raw = bytes(memoryview(data))  # type: ignore[arg-type]
    if not raw.startswith(MARK) or crc32(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
        raise InvalidArgument("state", raw[:32], text="state is no saved system, or damaged")
    try:
        system: System = _Unpickler(io.BytesIO(raw[len(MARK) : -4]), memory, classes).load()
        system.spaces = WeakSet(system.spaces)
        for iommu in system.iommus:
            iommu.smmu.on_interrupt = iommu.interrupts.add
            iommu.writer = EntryWriter(
                iommu.queue, memory, call=system.lock.call
            )
            for device in dict.fromkeys(iommu.devices.values()):
                device._rejoin()
    except InvalidArgument:
        raise
    except Exception as error:
        text = f"state cannot be restored: {type(error).__name__}: {error}"
        raise InvalidArgument("state", raw[:32], text=text) from error
    return system


# --- how parts are made again: named in the bytes ---


def _lock() -> Any:
    return threading.RLock()


def _pages(memory: Memory, base: int, size: int, blocks: list[tuple[int, int]]) -> Pages:
    return Pages._restored(memory, base, size, blocks)


def _thing(kind: type[Any]) -> Any:
    """An object without its state, which follows: others may lead to it first."""
    if issubclass(kind, PageTable):
        return kind.__new__(kind)
    return object.__new__(kind)


def _set_table(table: PageTable, state: tuple[Any, ...]) -> None:
    pages, shape, contents, rest = state
    PageTable.__init__(table, pages, **shape, ready=False)
    table._restore(contents)
    vars(table).update(rest)


_MAKERS: Final = (_lock, _pages, _thing, _set_table)
