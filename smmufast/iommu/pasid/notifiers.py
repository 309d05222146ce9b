"""Who is told of changes."""

from __future__ import annotations

from operator import index
from typing import TYPE_CHECKING, SupportsIndex

from smmufast.errors import Busy, Exists, InvalidArgument, NoEntry
from smmufast.iommu.pasid.notices import (
    Chain,
    Notifier,
    NotifierOrder,
    PasidChange,
    PasidNotice,
    Told,
    tell,
)
from smmufast.iommu.pasid.picked import PasidPicked
from smmufast.iommu.pasid.sets import Owner, PasidSet, SetKind, unallocated

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smmufast.iommu.pasid.policy import PasidPolicy


class PasidNotifiers(PasidPicked):
    """The notifiers of a space."""

    def __init__(self, policy: PasidPolicy, smmu_limits: Sequence[int]) -> None:
        super().__init__(policy, smmu_limits)
        self._spids: dict[int, int] = {}  # of the IDs that have one
        self._notifiers: Chain = ()
        self._mm_notifiers: dict[object, Chain] = {}
        self._serial = 0

    def register_notifier(
        self,
        notifier: Notifier,
        *,
        pasid_set: PasidSet | None = None,
        mm: object = None,
        order: NotifierOrder = NotifierOrder.DEVICE,
    ) -> None:
        """Have a function called when an ID changes.

        ALLOC tells that an ID was allocated, and if a notifier raises, it is freed again.  FREE
        tells, once, that it was freed and that others still hold references.  BIND and UNBIND
        tell of a guest's number, or of what `notify` was called for.  Those of one `order` are
        told in the order of registration.

        Parameters
        ----------
        notifier : callable
            Called with a `PasidNotice`, without a lock, in the thread that made the change.
        pasid_set : PasidSet, optional
            Tell of its IDs only, until it ends.
        mm : object, optional
            Tell of the IDs of this address space's set only.  The set may be made later, and may
            end and be made again.
        order : NotifierOrder

        Raises
        ------
        InvalidArgument
            Both a set and an address space; a set that ended; `order` is none; not callable.
        Exists
            It is registered there already.
        Busy
            It is registered for this address space already, or its set has IDs, whose ALLOC it
            would have missed.
        """
        if not callable(notifier):
            raise InvalidArgument("notifier", notifier, "a callable")
        if not isinstance(order, NotifierOrder):
            raise InvalidArgument("order", order, "a NotifierOrder")
        with self._lock:
            chain = self._registered(pasid_set, mm)
            if any(known == notifier for _, _, known in chain):
                error = Exists if mm is None else Busy
                raise error("notifier", notifier, text=f"notifier {notifier!r} is registered")
            members = None if mm is None else self._mm_sets.get(mm)
            if members is not None and len(members):
                raise Busy("mm", mm, text=f"mm: the set of {mm!r} has IDs")
            self._serial += 1
            self._register(pasid_set, mm, (*chain, (order, self._serial, notifier)))

    def unregister_notifier(
        self, notifier: Notifier, *, pasid_set: PasidSet | None = None, mm: object = None
    ) -> None:
        """Call it no more; the arguments are those that it was registered with.

        Raises
        ------
        NoEntry
            It is not registered there.
        InvalidArgument
            Both a set and an address space; a set that ended.
        """
        with self._lock:
            chain = self._registered(pasid_set, mm)
            left = tuple(known for known in chain if known[2] != notifier)
            if len(left) == len(chain):
                text = f"notifier {notifier!r} is not registered"
                raise NoEntry("notifier", notifier, text=text)
            self._register(pasid_set, mm, left)

    def _registered(self, pasid_set: PasidSet | None, mm: object) -> Chain:
        if pasid_set is not None:
            if mm is not None:
                raise InvalidArgument("mm", mm, "None with a pasid_set")
            self._check_set(pasid_set)
            return pasid_set._notifiers
        return self._notifiers if mm is None else self._mm_notifiers.get(mm, ())

    def _register(self, pasid_set: PasidSet | None, mm: object, chain: Chain) -> None:
        chain = tuple(sorted(chain, key=lambda known: known[:2]))
        if pasid_set is not None:
            pasid_set._notifiers = chain
        elif mm is None:
            self._notifiers = chain
        elif chain:
            self._mm_notifiers[mm] = chain
        else:
            del self._mm_notifiers[mm]

    def notify(self, pasid: SupportsIndex, change: PasidChange) -> None:
        """Tell that an ID was bound or unbound, such as in a table that a driver wrote.

        Raises
        ------
        InvalidArgument
            The ID is not allocated; or the change is ALLOC or FREE, which the space tells itself.
        Exception
            What a notifier raised, after all were told.
        """
        pasid = index(pasid)
        if change not in (PasidChange.BIND, PasidChange.UNBIND):
            raise InvalidArgument("change", change, "PasidChange.BIND or PasidChange.UNBIND")
        with self._lock:
            if pasid not in self._ids:
                raise InvalidArgument("pasid", pasid, text=unallocated(pasid))
            told = self._told(change, pasid, self._owner(pasid))
        tell(told)

    def _chain(self, pasid_set: PasidSet | None) -> Chain:
        """Who is told of the IDs of a set, in order."""
        chain = self._notifiers
        if pasid_set is None:
            return chain
        more = pasid_set._notifiers
        if self._mm_notifiers and pasid_set.kind is SetKind.MM:
            more += self._mm_notifiers.get(pasid_set.token, ())
        return tuple(sorted(chain + more, key=lambda known: known[:2])) if more else chain

    def _told(self, change: PasidChange, pasid: int, owner: Owner | None) -> Told:
        pasid_set, data = (None, None) if owner is None else owner
        notice = PasidNotice(change, pasid, self._spids.get(pasid), pasid_set, data)
        return [(notice, self._chain(pasid_set))]
