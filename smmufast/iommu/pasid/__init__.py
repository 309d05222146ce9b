"""The PASIDs of a system: one ID space, policies, sets, guests' numbers, notifiers, backends.

Not architectural but for the width of a PASID, 20 bits, and for 0, which is no address space's
(IHI 0070 SMMU_IDR1.SSIDSIZE; PCIe PASID).  The rest is what operating systems do, merged (F20-F23;
docs/domains.md 4.1 to 4.3 and 4.5) or proposed (4.4).

Auxiliary domains, address spaces of processes and guests draw from the same `PasidSpace`, so that
they are used at the same time.
"""

from smmufast.iommu.pasid.backends import PasidBackend
from smmufast.iommu.pasid.notices import Notifier, NotifierOrder, PasidChange, PasidNotice
from smmufast.iommu.pasid.policy import (
    EVERY_SMMU,
    LAST,
    PER_DEVICE,
    SIZE,
    SYSTEM_WIDE,
    SYSTEM_WIDE_STRICT,
    PasidPolicy,
)
from smmufast.iommu.pasid.sets import PasidSet, SetKind
from smmufast.iommu.pasid.space import NO_SPID, PasidSpace, PasidState
from smmufast.iommu.pasid.virtual_command import VirtualCommand

__all__ = [
    "EVERY_SMMU",
    "LAST",
    "NO_SPID",
    "PER_DEVICE",
    "SIZE",
    "SYSTEM_WIDE",
    "SYSTEM_WIDE_STRICT",
    "Notifier",
    "NotifierOrder",
    "PasidBackend",
    "PasidChange",
    "PasidNotice",
    "PasidPolicy",
    "PasidSet",
    "PasidSpace",
    "PasidState",
    "SetKind",
    "VirtualCommand",
]
