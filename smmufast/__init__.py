"""An Arm SMMUv3 that other simulators import.

The hardware half: `Memory` is the host's physical memory, `Smmu` translates the accesses of
devices through the tables that lie in it, through `Caches` or without; `AtsDevice` is a device
with an ATC.  `PasidAllocator` hands out PASIDs.  `Capture` reads and writes recorded systems.
"""

import os as _os
import sys as _sys
from importlib.machinery import EXTENSION_SUFFIXES as _SUFFIXES
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from smmufast._device.registers import PageAnswer, RegisterWarning, Stall
    from smmufast._device.smmu import (
        COLUMNS,
        NO_SUBSTREAM,
        Result,
        Segments,
        Smmu,
        Transaction,
        Walk,
    )
    from smmufast._driver.pasid import (
        PasidAllocated,
        PasidAllocator,
        PasidDuplicate,
        PasidError,
        PasidExhausted,
        PasidNotAllocated,
        PasidNotReserved,
        PasidOutOfRange,
        PasidRangeEmpty,
        PasidReserved,
    )
    from smmufast._engine.memory import Memory, MemoryRegion
    from smmufast._engine.tlb import Caches, Geometry, StaleEntry
    from smmufast.ats import AtsDevice, PageRequest
    from smmufast.capture import Capture, CaptureError
    from smmufast.faults import (
        ACTIONS,
        AtsFault,
        AtsResponse,
        Event,
        ExternalAbort,
        Fault,
        Fetch,
        Invalidated,
        Perm,
    )
    from smmufast.features import Features, modelled
    from smmufast.why import Why

__version__ = "0.3.0"

__all__ = [
    "ACTIONS",
    "COLUMNS",
    "NO_SUBSTREAM",
    "AtsDevice",
    "AtsFault",
    "AtsResponse",
    "Caches",
    "Capture",
    "CaptureError",
    "Event",
    "ExternalAbort",
    "Fault",
    "Features",
    "Fetch",
    "Geometry",
    "Invalidated",
    "Memory",
    "MemoryRegion",
    "PageAnswer",
    "PageRequest",
    "PasidAllocated",
    "PasidAllocator",
    "PasidDuplicate",
    "PasidError",
    "PasidExhausted",
    "PasidNotAllocated",
    "PasidNotReserved",
    "PasidOutOfRange",
    "PasidRangeEmpty",
    "PasidReserved",
    "Perm",
    "RegisterWarning",
    "Result",
    "Segments",
    "Smmu",
    "StaleEntry",
    "Stall",
    "Transaction",
    "Walk",
    "Why",
    "get_include",
    "modelled",
]


# Where each name lives.  A module is imported when one of its names is first used: the command
# line starts without numpy, and a host without captures never loads what reads them.
_HOMES = {
    "_engine.memory": ("Memory", "MemoryRegion"),
    "_driver.pasid": tuple(name for name in __all__ if name.startswith("Pasid")),
    "_device.registers": ("PageAnswer", "RegisterWarning", "Stall"),
    "_engine.tlb": ("Caches", "Geometry", "StaleEntry"),
    "_device.smmu": (
        "COLUMNS", "NO_SUBSTREAM", "Result", "Segments", "Smmu", "Transaction", "Walk",
    ),
    "ats": ("AtsDevice", "PageRequest"),
    "capture": ("Capture", "CaptureError"),
    "faults": (
        "ACTIONS", "AtsFault", "AtsResponse", "Event", "ExternalAbort", "Fault", "Fetch",
        "Invalidated", "Perm",
    ),
    "features": ("Features", "modelled"),
    "why": ("Why",),
}  # fmt: skip


# What the modules were called that something outside of this package names: pickles of version
# 0.2, and the capsule of the C face.
_MOVED = {
    f"smmufast._{home.rpartition('.')[2]}": f"smmufast.{home}"
    for home in _HOMES
    if home[0] == "_"
}  # fmt: skip


_MODULES = (
    *(home for home in _HOMES if home[0] != "_"),
    "cli", "decode", "dumps", "errors", "explain", "iommu", "layout", "mappings", "replay",
    "streams", "trace", "traffic",
)  # fmt: skip


def __getattr__(name: str) -> _Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None and name not in _MODULES and f"smmufast.{name}" not in _MOVED:
        raise AttributeError(f"module 'smmufast' has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f"smmufast.{home or name}")
    value = globals()[name] = module if home is None else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


def get_include() -> str:
    """Return the directory that holds smmufast.h and the .pxd files' package."""
    return _os.path.dirname(_os.path.abspath(__file__))


class _Uncompiled:
    """Tells why a compiled module is missing; asked for modules that nothing else finds."""

    @staticmethod
    def find_spec(name: str, path: _Any = None, target: _Any = None) -> None:
        """Say which Python a compiled module is for, where it was built for another one."""
        if not name.startswith("smmufast._"):
            return
        here = _os.path.dirname(_os.path.abspath(__file__))
        python = f"{_sys.implementation.name} {_sys.version_info[0]}.{_sys.version_info[1]}"
        advice = "Install it with this Python."
        if _os.path.exists(_os.path.join(here, "_engine/memory.pyx")):
            advice = (
                "These are the sources, which Python finds first when it is started beside them: "
                "start it elsewhere or with -P to use the package that `pip install .` installs."
            )
        raise ModuleNotFoundError(f"{here} is not compiled for {python}. {advice}", name=name)


class _Moved(_ModuleType):
    """Stands under a name of version 0.2, and has what the module has that is elsewhere now."""

    def __getattr__(self, name: str) -> _Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        import importlib

        return getattr(importlib.import_module(_MOVED[self.__name__]), name)


for _name in _MOVED:
    _sys.modules[_name] = _Moved(_name)
if not any(_os.path.exists(_os.path.join(__path__[0], f"_engine/memory{s}")) for s in _SUFFIXES):
    _sys.meta_path.append(_Uncompiled)
