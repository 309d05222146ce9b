"""The driver half: what an operating system does with an SMMUv3.

It allocates PASIDs, ASIDs and VMIDs, writes stream tables, context descriptors and page tables
into memory, and sends the commands that invalidate what the SMMU may have cached.
`System` is where to begin.
"""

import enum as _enum

from smmufast._driver.tables import Gather, Pages, PageTable
from smmufast.errors import (
    AccessDenied,
    Busy,
    Exists,
    InputOutput,
    InvalidArgument,
    IommuError,
    NoDevice,
    NoEntry,
    NoProcess,
    NoSpace,
    NotPermitted,
    NotSupported,
    OutOfMemory,
    OutOfRange,
    PasidOverflow,
    TooBig,
    TryAgain,
    WrongSmmu,
    WrongType,
)
from smmufast.iommu.attachment import AttachHandle
from smmufast.iommu.device import Device
from smmufast.iommu.domain import BLOCKED, IDENTITY, Domain, NestedDomain, PagingDomain
from smmufast.iommu.fault import PageFault, Report
from smmufast.iommu.group import Group
from smmufast.iommu.iova import DmaMapper, IovaAllocator
from smmufast.iommu.mediated import Mediated
from smmufast.iommu.nested import Viommu
from smmufast.iommu.pasid import (
    EVERY_SMMU,
    PER_DEVICE,
    SYSTEM_WIDE,
    SYSTEM_WIDE_STRICT,
    NotifierOrder,
    PasidBackend,
    PasidChange,
    PasidNotice,
    PasidPolicy,
    PasidSet,
    PasidSpace,
    PasidState,
    SetKind,
    VirtualCommand,
)
from smmufast.iommu.profile import AUX, NOW, Profile
from smmufast.iommu.smmu.iommu import Iommu
from smmufast.iommu.sva import AddressSpace, Bond
from smmufast.iommu.system import Cpu, System

__all__ = [
    "AUX",
    "BLOCKED",
    "EVERY_SMMU",
    "IDENTITY",
    "NOW",
    "PER_DEVICE",
    "SYSTEM_WIDE",
    "SYSTEM_WIDE_STRICT",
    "AccessDenied",
    "AddressSpace",
    "AttachHandle",
    "Bond",
    "Busy",
    "Cpu",
    "Device",
    "DmaMapper",
    "Domain",
    "Exists",
    "Gather",
    "Group",
    "InputOutput",
    "InvalidArgument",
    "Iommu",
    "IommuError",
    "IovaAllocator",
    "Mediated",
    "NestedDomain",
    "NoDevice",
    "NoEntry",
    "NoProcess",
    "NoSpace",
    "NotPermitted",
    "NotSupported",
    "NotifierOrder",
    "OutOfMemory",
    "OutOfRange",
    "PageFault",
    "PageTable",
    "Pages",
    "PagingDomain",
    "PasidBackend",
    "PasidChange",
    "PasidNotice",
    "PasidOverflow",
    "PasidPolicy",
    "PasidSet",
    "PasidSpace",
    "PasidState",
    "Profile",
    "Prot",
    "Report",
    "SetKind",
    "System",
    "TooBig",
    "TryAgain",
    "Viommu",
    "VirtualCommand",
    "WrongSmmu",
    "WrongType",
]


class Prot(_enum.IntFlag):
    """What a mapping allows, and how: the `prot` of map."""

    READ = 1
    WRITE = 2
    CACHE = 4
    NOEXEC = 8
    MMIO = 16
    PRIV = 32
