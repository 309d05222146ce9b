"""What notifiers are told, and the telling."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smmufast.iommu.pasid.sets import PasidSet


class PasidChange(enum.Enum):
    """What notifiers are told of."""

    ALLOC = "alloc"
    FREE = "free"
    BIND = "bind"
    UNBIND = "unbind"


class NotifierOrder(enum.IntEnum):
    """Who is told first: DMA is stopped where it starts before its tables are taken away."""

    CPU = 0
    IOMMU = 1
    DEVICE = 2


@dataclass(frozen=True, slots=True)
class PasidNotice:
    """What a notifier is called with.

    Attributes
    ----------
    change : PasidChange
    pasid : int
    spid : int or None
        The guest's number for it.
    pasid_set : PasidSet or None
        Its set; None for the default set.
    data : object
        As `PasidSpace.find` returns it.
    """

    change: PasidChange
    pasid: int
    spid: int | None
    pasid_set: PasidSet | None
    data: Any


Notifier = Callable[[PasidNotice], object]

Chain = tuple[tuple[NotifierOrder, int, Notifier], ...]  # order, serial number, who
Told = list[tuple[PasidNotice, Chain]]


def tell(told: Told) -> None:
    """Call every notifier, whatever one raises; the first error is raised in the end."""
    errors = []
    for notice, chain in told:
        for _, _, notifier in chain:
            try:
                notifier(notice)
            except Exception as error:
                errors.append(error)
    for later in errors[1:]:
        errors[0].add_note(f"another notifier raised {later!r}")
    if errors:
        raise errors[0]
