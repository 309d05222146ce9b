"""Sets of PASIDs, and the capacity that they share (docs/domains.md 4.4)."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Iterator
from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex

from smmufast._driver.pasid import PasidError
from smmufast.errors import AccessDenied, Busy, InvalidArgument, NoEntry, NoSpace
from smmufast.iommu.pasid.notices import Chain, tell
from smmufast.iommu.pasid.policy import SIZE, PasidLimits, PasidPolicy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smmufast.iommu.pasid.space import PasidSpace

Owner = tuple["PasidSet | None", Any]  # set, data: what the allocator keeps for an ID, or None


def unallocated(pasid: int) -> str:
    """What is wrong with a PASID that nobody has."""
    return f"pasid {pasid} is not allocated"


class SetKind(enum.Enum):
    """What the token of a set is: nothing, or an address space, which has at most one set."""

    NULL = "null"
    MM = "mm"


class PasidSet:
    """IDs with one owner, such as those of a guest; made by `PasidSpace.new_set`.

    It ends when the last of its IDs goes (not before it had one), or with `free`; its quota then
    is everybody's again.  `len()`, `in` and iteration, in ascending order, are about its IDs,
    pending ones included.

    Attributes
    ----------
    space : PasidSpace
    kind : SetKind
    token : object
        The address space, if the kind is MM.
    quota : int
        How many IDs it may have.
    alive : bool
        False once it ended.
    """

    def __init__(self, space: PasidSpace, kind: SetKind, token: object, quota: int) -> None:
        """Begin an empty set of a space."""
        self.space = space
        self.kind = kind
        self.token = token
        self.quota = quota
        self.alive = True
        self._members: set[int] = set()
        self._spids: dict[int, int] = {}
        self._notifiers: Chain = ()
        self._kept = 0  # how many calls need it to stay, even without IDs
        self._plain: Owner = (self, None)  # shared by all of its IDs that have no data

    def adjust(self, quota: int) -> None:
        """Change the quota; what it shrinks by is everybody's again.

        Raises
        ------
        InvalidArgument
            The set ended, or `quota` is not positive or less than the IDs that the set has.
        NoSpace
            The space has not as many IDs left.
        """
        space = self.space
        with space._lock:
            space._check_set(self)
            if quota < 1 or quota < len(self._members):
                raise InvalidArgument("quota", quota, f"{max(1, len(self._members))} or more")
            if quota - self.quota > space.available:
                raise NoSpace("quota", quota, f"at most {self.quota + space.available}")
            space._quotas += quota - self.quota
            self.quota = quota

    def free(self) -> None:
        """End the set.

        Raises
        ------
        InvalidArgument
            It ended before.
        Busy
            It has IDs.
        """
        with self.space._lock:
            self.space._check_set(self)
            if self._members:
                text = f"pasid_set: {len(self._members)} of its IDs are allocated"
                raise Busy("pasid_set", self, text=text)
            self.space._end(self)

    def free_all(self) -> None:
        """Free every ID of the set, in ascending order, as `PasidSpace.free` does.

        What a backend refuses ends it there with that error; the IDs before it are freed.
        """
        space = self.space
        with space._lock:
            told = space._free({pasid: space._owner(pasid) for pasid in self})
        tell(told)

    def find_spid(self, spid: SupportsIndex, *, get: bool = False) -> int:
        """Return the PASID that a guest's number stands for.

        Parameters
        ----------
        spid : int
            The guest's number.
        get : bool
            Also take a reference, as `PasidSpace.get`.

        Raises
        ------
        NoEntry
            No ID of the set has this number.
        Busy
            `get`, and the ID is being freed.
        """
        spid = index(spid)
        with self.space._lock:
            if spid not in self._spids:
                raise NoEntry("spid", spid, "a number that attach_spid() gave to an ID of the set")
            pasid = self._spids[spid]
            if get:
                self.space.get(pasid)
            return pasid

    def __contains__(self, pasid: object) -> bool:
        """Whether an ID is of this set."""
        return pasid in self._members

    def __len__(self) -> int:
        """How many IDs it has."""
        return len(self._members)

    def __iter__(self) -> Iterator[int]:
        """Iterate over its IDs as they are now, in ascending order."""
        with self.space._lock:
            return iter(sorted(self._members))

    def __getstate__(self) -> dict[str, Any]:
        """All but its notifiers."""
        return {**self.__dict__, "_notifiers": ()}

    def __repr__(self) -> str:
        """Kind, token, how many of how many; or that it ended."""
        token = "" if self.token is None else f" of {self.token!r}"
        if not self.alive:
            return f"<PasidSet {self.kind.name}{token}: ended>"
        return f"<PasidSet {self.kind.name}{token}: {len(self)} of {self.quota}>"


class PasidSets(PasidLimits):
    """The sets of a space."""

    def __init__(self, policy: PasidPolicy, smmu_limits: Sequence[int]) -> None:
        super().__init__(policy, smmu_limits)
        self._sets: dict[PasidSet, None] = {}
        self._mm_sets: dict[object, PasidSet] = {}
        self._in_sets = 0
        self._capacity = SIZE
        self._capacity_installed = False
        self._reserved = 0
        self._quotas = 0

    @property
    def capacity(self) -> int:
        """How many IDs sets, reservations and the default set may have together."""
        return self._capacity

    @property
    def available(self) -> int:
        """How much of the capacity is not yet a quota, reserved, or used by the default set."""
        return self._capacity - self._reserved - self._quotas - len(self._ids) + self._in_sets

    def install_capacity(self, total: int) -> None:
        """Set the capacity, which is 2**20 before; later calls are ignored, with a warning.

        Raises
        ------
        InvalidArgument
            `total` is more than 2**20, or less than what is in use.
        """
        with self._lock:
            if self._capacity_installed:
                text = f"the capacity is {self._capacity} already: {total} is ignored"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
                return
            used = self._capacity - self.available
            if not max(1, used) <= total <= SIZE:
                raise InvalidArgument("total", total, f"{max(1, used)} to {SIZE}")
            self._capacity = total
            self._capacity_installed = True

    def reserve(self, count: int = 0) -> int:
        """Withhold some of the capacity, of no ID in particular.

        Parameters
        ----------
        count : int
            How much; 0: all that is available.

        Returns
        -------
        int
            How much it is.

        Raises
        ------
        NoSpace
            Less is available.
        InvalidArgument
            `count` is negative.
        """
        with self._lock:
            count = self._quota("count", count)
            self._reserved += count
            return count

    def cancel(self, count: int) -> int:
        """Give some of the reserved capacity back; returns how much is available now.

        Raises
        ------
        InvalidArgument
            `count` is negative, or more than what is reserved.
        """
        with self._lock:
            if not 0 <= count <= self._reserved:
                raise InvalidArgument("count", count, f"0 to {self._reserved}")
            self._reserved -= count
            return self.available

    @property
    def sets(self) -> list[PasidSet]:
        """The sets that have not ended, oldest first."""
        with self._lock:
            return list(self._sets)

    def find_set(self, pasid: SupportsIndex) -> PasidSet | None:
        """Return the set of an ID; None for the default set.

        Raises
        ------
        NoEntry
            It is not allocated.
        """
        owner = self._owner(pasid)
        return None if owner is None else owner[0]

    def find_mm_set(self, token: object) -> PasidSet | None:
        """Return the set of an address space, None if it has none."""
        return self._mm_sets.get(token)

    # --- the steps; `_owner` and `_member` take no lock, others need it ---

    def _owner(self, pasid: SupportsIndex) -> Owner | None:
        """One atomic look: NoEntry, or what the allocator keeps for the ID."""
        try:
            owner: Owner | None = self._ids.find(pasid)
        except PasidError:
            raise NoEntry("pasid", index(pasid), text=unallocated(index(pasid))) from None
        return owner

    def _member(self, pasid: SupportsIndex, pasid_set: PasidSet | None) -> Owner | None:
        """As `_owner`, and AccessDenied unless the ID is of this set, or of any."""
        owner = self._owner(pasid)
        if pasid_set is not None and (owner is None or owner[0] is not pasid_set):
            pasid = index(pasid)
            raise AccessDenied("pasid", pasid, text=f"pasid {pasid:#x} belongs to another set")
        return owner

    @staticmethod
    def _new_owner(pasid_set: PasidSet | None, data: object) -> Owner | None:
        if data is not None:
            return pasid_set, data
        return None if pasid_set is None else pasid_set._plain

    def _check_set(self, pasid_set: PasidSet) -> None:
        if pasid_set.space is not self or not pasid_set.alive:
            raise InvalidArgument("pasid_set", pasid_set, "a set of this space that has not ended")

    def _quota(self, name: str, count: int) -> int:
        """How much of what is available a call asks for: 0 means all."""
        available = self.available
        if count < 0:
            raise InvalidArgument(name, count, "0 or more")
        if count > available:
            raise NoSpace(name, count, f"0 to {available}")
        return count or available

    def _admit(self, pasid_set: PasidSet | None, count: int, data: object) -> Owner | None:
        """Whether a set may have so many IDs more; what the allocator shall keep for them."""
        if pasid_set is None:
            left = self.available
        else:
            self._check_set(pasid_set)
            left = pasid_set.quota - len(pasid_set._members)
        if count > left:
            whose = "the default set" if pasid_set is None else "pasid_set"
            raise NoSpace("count", count, text=f"{whose} may have {left} PASIDs more, not {count}")
        return self._new_owner(pasid_set, data)

    def _end(self, pasid_set: PasidSet) -> None:
        pasid_set.alive = False
        pasid_set._notifiers = ()
        del self._sets[pasid_set]
        if pasid_set.kind is SetKind.MM:
            del self._mm_sets[pasid_set.token]
        self._quotas -= pasid_set.quota
