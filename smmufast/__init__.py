"""An Arm SMMUv3 that other simulators import.

The hardware half: `Memory` is the host's physical memory, `Smmu` translates the accesses of
devices through the tables that lie in it.  `PasidAllocator` hands out PASIDs.  `Capture` reads
and writes recorded systems.
"""

from typing import TYPE_CHECKING, Any

from smmufast._memory import Memory, MemoryRegion
from smmufast._pasid import (
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
from smmufast._smmu import (
    COLUMNS,
    NO_SUBSTREAM,
    Result,
    Segments,
    Smmu,
    Walk,
    modelled,
)
from smmufast.faults import ACTIONS, Event, ExternalAbort, Fault, Fetch, Perm
from smmufast.features import Features

__version__ = "0.1.0"

__all__ = [
    "ACTIONS",
    "COLUMNS",
    "NO_SUBSTREAM",
    "Capture",
    "CaptureError",
    "Event",
    "ExternalAbort",
    "Fault",
    "Features",
    "Fetch",
    "Memory",
    "MemoryRegion",
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
    "Result",
    "Segments",
    "Smmu",
    "Walk",
    "get_include",
    "modelled",
]


if TYPE_CHECKING:
    from smmufast.capture import Capture, CaptureError


def __getattr__(name: str) -> Any:
    # Captures need json, gzip and zip files, which most hosts never use.
    if name in ("Capture", "CaptureError"):
        from smmufast import capture

        return getattr(capture, name)
    raise AttributeError(f"module 'smmufast' has no attribute {name!r}")


def get_include() -> str:
    """Return the directory that holds smmufast.h and the .pxd files' package."""
    import os

    return os.path.dirname(os.path.abspath(__file__))
