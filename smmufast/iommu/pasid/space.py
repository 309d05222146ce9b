"""The PASIDs of a system: one ID space."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from operator import index
from typing import TYPE_CHECKING, Any, Final, SupportsIndex

import numpy as np

from smmufast._driver.pasid import PasidDuplicate, PasidError
from smmufast.errors import AccessDenied, Busy, Exists, InvalidArgument, NoEntry, NoSpace
from smmufast.iommu.pasid.backends import PasidBackends
from smmufast.iommu.pasid.notices import Chain, PasidChange, PasidNotice, Told, tell
from smmufast.iommu.pasid.policy import PER_DEVICE, PasidPolicy
from smmufast.iommu.pasid.sets import Owner, PasidSet, SetKind, unallocated

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import ArrayLike, NDArray

NO_SPID: Final = (1 << 32) - 1
"""What the kernel calls INVALID_IOASID: no guest's number."""


class PasidState(enum.Enum):
    """FREE, then IDLE, then ACTIVE while others hold references, then FREE_PENDING until they go.

    An ID is freed from IDLE at once, and from ACTIVE when the last reference goes.
    """

    FREE = "free"
    IDLE = "idle"
    ACTIVE = "active"
    FREE_PENDING = "free pending"


class PasidSpace(PasidBackends):
    """The PASIDs of a system: 1 to 2**20 - 1, the lowest free one first.

    Parameters
    ----------
    policy : PasidPolicy
        PER_DEVICE, SYSTEM_WIDE, SYSTEM_WIDE_STRICT, EVERY_SMMU, or one of yours.
    smmu_limits : sequence of int
        ``2**ssid_bits`` of each SMMU.

    `len()`, `in` and iteration, in ascending order, are about the IDs that are allocated, pending
    ones included.

    Notes
    -----
    An ID belongs to the default set, or to a `PasidSet`; a call that names no set is about any.
    Everybody who uses an ID holds a reference: who allocated it the first one, which `free` gives
    back, and others those of `get`, which `put` gives back.

    Errors are those of the kernel where it has one.  Where it has only its invalid ID, a warning
    or nothing: an allocation that fails raises NoSpace, `free` of an unknown ID NoEntry.  A call
    that raises has changed nothing, but for these: `free_many` and `PasidSet.free_all` when a
    backend refuses an ID, and notifiers of FREE and UNBIND that raise, since freeing does not
    depend on them.

    Calls are safe between threads.  `find` takes no lock; it sees an ID, its set and its data at
    one moment.  Notifiers are called without the lock, when the change is made: they may use the
    space, and other threads may too before they are told.

    A PASID that somebody chose (`pick`) is not handed out; it is not allocated for that, and not
    counted as such.

    An ID of the default set without data takes nothing but two of the bits that are there from
    the start, 258 KiB in all.  So does one that was picked once.  Others take more, up to (in
    CPython 3.11): 130 bytes for data, 140 for a set, 120 for an SPID, 80 for references or for
    several picks.

    Copies (`copy.deepcopy`, `pickle`) have the IDs, picks, sets, data, references and SPIDs, and no
    notifiers; no other thread may change the space meanwhile.  A space with a backend cannot be
    copied: its IDs are the backend's.

    Examples
    --------
    >>> from smmufast.iommu.pasid import PasidSpace, SetKind
    >>> pasids = PasidSpace()
    >>> pasids.alloc(), pasids.alloc(min=0x100, data="process 7")
    (1, 256)
    >>> pasids.find(256)
    'process 7'
    >>> guest = pasids.new_set(quota=16)
    >>> pasid = pasids.alloc(pasid_set=guest)
    >>> pasids.attach_spid(pasid, 101)
    >>> pasid, guest.find_spid(101)
    (2, 2)
    >>> pasids.get(pasid)
    >>> pasids.free(pasid), pasids.state(pasid).name    # somebody holds it
    (False, 'FREE_PENDING')
    >>> pasids.put(pasid), guest.alive
    (True, False)
    """

    def __init__(
        self, policy: PasidPolicy = PER_DEVICE, *, smmu_limits: Sequence[int] = ()
    ) -> None:
        super().__init__(policy, smmu_limits)

    # --- IDs ---

    def alloc(
        self,
        min: SupportsIndex = 1,
        max: SupportsIndex | None = None,
        *,
        pasid_set: PasidSet | None = None,
        data: object = None,
    ) -> int:
        """Allocate one PASID.

        Parameters
        ----------
        min, max : int
            First and last to choose from, both included; `max` None, or beyond the limit of the
            system: the last that there is.  To a backend they are hints.
        pasid_set : PasidSet, optional
            Whose it shall be; None: the default set.
        data : object, optional
            What `find` shall return.

        Returns
        -------
        int
            The lowest that is free; from a backend, any.

        Raises
        ------
        NoSpace
            None is free in the range, the set's quota is used up, the quotas of others leave none
            to the default set, or the backend has none.
        InvalidArgument
            `min` is less than 1, `max` less than `min`, or the set ended or is another space's.
        """
        first, most = self._range(min, max)
        with self._lock:
            owner = self._admit(pasid_set, 1, data)
            pasid = self._take(first, most, owner)
            if pasid_set is not None:
                pasid_set._members.add(pasid)
                self._in_sets += 1
            chain = self._chain(pasid_set)
        if chain:
            self._tell_alloc((pasid,), pasid_set, data, chain)
        return pasid

    def alloc_many(
        self,
        count: SupportsIndex,
        min: SupportsIndex = 1,
        max: SupportsIndex | None = None,
        *,
        pasid_set: PasidSet | None = None,
        data: object = None,
    ) -> NDArray[np.uint32]:
        """Allocate several PASIDs: those that as many calls of `alloc` would return, or none.

        Parameters
        ----------
        count : int
            How many; 0 is allowed.
        min, max, pasid_set, data
            As for `alloc`.

        Returns
        -------
        numpy.ndarray
            uint32, of shape (count,).

        Raises
        ------
        NoSpace, InvalidArgument
            As `alloc`; `count` may not be negative.
        """
        count = index(count)
        if count < 0:
            raise InvalidArgument("count", count, "0 or more")
        first, most = self._range(min, max)
        with self._lock:
            owner = self._admit(pasid_set, count, data)
            pasids = self._take_many(count, first, most, owner)
            if pasid_set is not None:
                pasid_set._members.update(pasids.tolist())
                self._in_sets += count
            chain = self._chain(pasid_set)
        if chain:
            self._tell_alloc(pasids.tolist(), pasid_set, data, chain)
        return pasids

    def free(self, pasid: SupportsIndex, *, pasid_set: PasidSet | None = None) -> bool:
        """Give back the reference of who allocated an ID, which frees it if it is the last one.

        While others hold references it is pending: they are told to give theirs back (FREE), it
        can be found, and `get` is refused.  Freeing it again does nothing.

        Parameters
        ----------
        pasid : int
            An allocated one.
        pasid_set : PasidSet, optional
            Refuse the IDs of other sets.

        Returns
        -------
        bool
            False if somebody still holds it.

        Raises
        ------
        NoEntry
            It is not allocated.
        AccessDenied
            It belongs to another set.
        Exception
            What the backend refused it with; what a notifier raised, after all were told.
        """
        pasid = index(pasid)
        with self._lock:
            owner = self._member(pasid, pasid_set)
            if pasid not in self._references:
                self._release({pasid: owner})
                return True
            told = self._free({pasid: owner})
        tell(told)
        return pasid not in self._pending

    def free_many(self, pasids: ArrayLike, *, pasid_set: PasidSet | None = None) -> None:
        """Free several IDs, in any order, as `free` does: all of them or, with an error, none.

        Raises
        ------
        NoEntry, AccessDenied
            As `free`, for one that cannot be freed.
        InvalidArgument
            One is there twice, or `pasids` has not one dimension.
        """
        pasids = np.asarray(pasids)
        if pasids.ndim != 1:
            raise InvalidArgument("pasids", pasids.shape, "one dimension")
        with self._lock:
            plain = pasid_set is None and not (self._in_sets or self._backends or self._picks)
            if plain and self._references:
                plain = self._references.keys().isdisjoint(pasids.tolist())
            if plain:
                try:
                    self._ids.free_many(pasids)
                except PasidDuplicate as error:
                    raise self._twice(error.value) from None
                except PasidError as error:
                    raise NoEntry("pasid", error.value, text=unallocated(error.value)) from None
                return
            freed: dict[int, Owner | None] = {}
            for pasid in pasids.tolist():
                owner = self._member(pasid, pasid_set)
                if pasid in freed:
                    raise self._twice(pasid)
                freed[pasid] = owner
            told = self._free(freed)
        tell(told)

    def find(
        self,
        pasid: SupportsIndex,
        *,
        pasid_set: PasidSet | None = None,
        getter: Callable[[Any], object] | None = None,
    ) -> Any:
        """Return the data of an ID; takes no lock and no reference.

        Parameters
        ----------
        pasid : int
            An allocated one, pending or not.
        pasid_set : PasidSet, optional
            The set that it must belong to; None: any.
        getter : callable, optional
            Called with the data, to take a reference of it; None is returned if it returns False.

        Raises
        ------
        NoEntry
            It is not allocated.
        AccessDenied
            It belongs to another set.
        """
        owner = self._member(pasid, pasid_set)
        data = None if owner is None else owner[1]
        return data if getter is None or getter(data) else None

    def set_data(self, pasid: SupportsIndex, data: object) -> None:
        """Replace what `find` returns for an ID.

        Raises
        ------
        NoEntry
            It is not allocated.
        """
        with self._lock:
            # The old data goes when the lock is given back: its finaliser may call anything.
            owner = self._owner(pasid)
            pasid_set = None if owner is None else owner[0]
            self._ids.set_owner(pasid, self._new_owner(pasid_set, data))

    def get(self, pasid: SupportsIndex, *, pasid_set: PasidSet | None = None) -> None:
        """Take a reference, so that the ID is not handed out again before `put`.

        Raises
        ------
        InvalidArgument
            It is not allocated.
        Busy
            It is being freed.
        AccessDenied
            It belongs to another set.
        """
        pasid = index(pasid)
        with self._lock:
            if pasid not in self._ids:
                raise InvalidArgument("pasid", pasid, text=unallocated(pasid))
            if pasid in self._pending:
                raise Busy("pasid", pasid, text=f"pasid {pasid:#x} is being freed")
            self._member(pasid, pasid_set)
            self._references[pasid] = self._references.get(pasid, 0) + 1

    def put(self, pasid: SupportsIndex, *, pasid_set: PasidSet | None = None) -> bool:
        """Give a reference back; True if it was the last one and the ID is free now.

        An ID that is not allocated, or of another set, is left alone.
        """
        pasid = index(pasid)
        with self._lock:
            try:
                owner = self._member(pasid, pasid_set)
            except (NoEntry, AccessDenied):
                return False
            held = self.references(pasid)
            if held == 1:
                self._release({pasid: owner})
                return True
            if self._references[pasid] == 1:
                del self._references[pasid]
            else:
                self._references[pasid] -= 1
            return False

    def state(self, pasid: SupportsIndex) -> PasidState:
        """Return the state of an ID; FREE for what never can be one, too."""
        pasid = index(pasid)
        with self._lock:
            if pasid not in self._ids:
                return PasidState.FREE
            if pasid in self._pending:
                return PasidState.FREE_PENDING
            return PasidState.ACTIVE if pasid in self._references else PasidState.IDLE

    def references(self, pasid: SupportsIndex) -> int:
        """Return how many references are held: 1 when it was just allocated, 0 when free."""
        pasid = index(pasid)
        with self._lock:
            if pasid not in self._ids:
                return 0
            return self._references.get(pasid, 0) + (pasid not in self._pending)

    def __contains__(self, pasid: SupportsIndex) -> bool:
        """Whether an ID is allocated."""
        return pasid in self._ids

    def __len__(self) -> int:
        """How many IDs are allocated."""
        return len(self._ids)

    def __iter__(self) -> Iterator[int]:
        """Iterate over the allocated IDs in ascending order; changes meanwhile do no harm."""
        return iter(self._ids)

    def __repr__(self) -> str:
        """The policy, and how many IDs are allocated."""
        return f"<PasidSpace {self.policy.name}: {len(self)} allocated, {len(self._sets)} sets>"

    # --- sets (docs/domains.md 4.4) ---

    def new_set(
        self, token: object = None, *, kind: SetKind = SetKind.NULL, quota: int = 0
    ) -> PasidSet:
        """Make a set; its quota is taken from what is available.

        Parameters
        ----------
        token : object
            The address space for MM, which must be hashable; None for NULL.
        kind : SetKind
        quota : int
            How many IDs it may have; 0: all that are available.

        Raises
        ------
        InvalidArgument
            `kind` is neither, MM has no token, NULL has one, or `quota` is negative.
        Exists
            The address space has a set.
        NoSpace
            Fewer IDs than `quota`, or none, are available.
        """
        if not isinstance(kind, SetKind):
            raise InvalidArgument("kind", kind, "SetKind.NULL or SetKind.MM")
        if (kind is SetKind.MM) != (token is not None):
            needs = "an address space" if kind is SetKind.MM else "None"
            raise InvalidArgument("token", token, f"{needs} for a set of kind {kind.name}")
        with self._lock:
            if kind is SetKind.MM and token in self._mm_sets:
                raise Exists("token", token, text=f"token {token!r} has a set")
            quota = self._quota("quota", quota)
            if not quota:
                raise NoSpace("quota", quota, text="quota: no ID is available")
            made = PasidSet(self, kind, token, quota)
            self._sets[made] = None
            if kind is SetKind.MM:
                self._mm_sets[token] = made
            self._quotas += quota
            return made

    # --- guests' numbers ---

    def attach_spid(self, pasid: SupportsIndex, spid: SupportsIndex) -> None:
        """Give an ID of a set the number that a guest knows it by, and tell of it (BIND).

        If a notifier raises, the number is taken away again, and those that were told before are
        told (UNBIND).

        Parameters
        ----------
        pasid : int
            An ID of a set.
        spid : int
            The guest's number, 0 to 2**32 - 2; each set has its own.

        Raises
        ------
        InvalidArgument
            `spid` is out of range or another ID of the set has it; the ID has a number, or belongs
            to the default set.
        NoEntry
            The ID is not allocated.
        """
        pasid, spid = index(pasid), index(spid)
        if not 0 <= spid < NO_SPID:
            raise InvalidArgument("spid", spid, f"0 to {NO_SPID - 1:#x}")
        with self._lock:
            owner = self._owner(pasid)
            pasid_set = None if owner is None else owner[0]
            if pasid_set is None:
                raise InvalidArgument("pasid", pasid, "one that belongs to a set")
            if pasid in self._spids:
                text = f"pasid {pasid:#x} has the SPID {self._spids[pasid]:#x}"
                raise InvalidArgument("pasid", pasid, text=text)
            if spid in pasid_set._spids:
                text = f"spid {spid:#x} stands for PASID {pasid_set._spids[spid]:#x}"
                raise InvalidArgument("spid", spid, text=text)
            pasid_set._spids[spid] = pasid
            self._spids[pasid] = spid
            ((notice, chain),) = self._told(PasidChange.BIND, pasid, owner)
        told = 0
        try:
            for _, _, notifier in chain:
                notifier(notice)
                told += 1
        except BaseException:
            with self._lock:
                if pasid_set._spids.get(spid) == pasid:  # unless a notifier did
                    self._unlink(pasid, pasid_set)
            unbind = PasidNotice(PasidChange.UNBIND, pasid, spid, pasid_set, notice.data)
            with suppress(Exception):
                tell([(unbind, chain[:told])])
            raise

    def detach_spid(self, pasid: SupportsIndex) -> None:
        """Take the guest's number of an ID away, and tell of it (UNBIND).

        Raises
        ------
        NoEntry
            The ID is not allocated, or has none.
        """
        pasid = index(pasid)
        with self._lock:
            owner = self._owner(pasid)
            if owner is None or owner[0] is None or pasid not in self._spids:
                raise NoEntry("pasid", pasid, "an ID that has an SPID")
            told = self._told(PasidChange.UNBIND, pasid, owner)
            self._unlink(pasid, owner[0])
        tell(told)

    def spid(self, pasid: SupportsIndex) -> int | None:
        """Return the guest's number of an ID, None if it has none."""
        return self._spids.get(index(pasid))

    # --- the steps, which need the lock ---

    @staticmethod
    def _twice(pasid: int) -> InvalidArgument:
        return InvalidArgument("pasids", pasid, text=f"pasids: {pasid:#x} is there twice")

    def _free(self, freed: dict[int, Owner | None]) -> Told:
        """Free what nobody else holds, and make the rest pending: who is to be told of it."""
        freed = {pasid: owner for pasid, owner in freed.items() if pasid not in self._pending}
        held = [pasid for pasid in freed if pasid in self._references]
        idle = {pasid: freed[pasid] for pasid in freed if pasid not in self._references}
        self._release(idle)
        self._pending.update(held)
        return [
            told for pasid in held for told in self._told(PasidChange.FREE, pasid, freed[pasid])
        ]

    def _tell_alloc(
        self, pasids: Iterable[int], pasid_set: PasidSet | None, data: object, chain: Chain
    ) -> None:
        """Tell of ALLOC; the first error frees the IDs again.  Called without the lock."""
        try:
            for pasid in pasids:
                notice = PasidNotice(PasidChange.ALLOC, pasid, None, pasid_set, data)
                for _, _, notifier in chain:
                    notifier(notice)
        except BaseException:
            # Who holds references must hear of it; one error is enough.  The set was there before.
            kept = () if pasid_set is None else (pasid_set,)
            with self._lock:
                for each in kept:
                    each._kept += 1
                freed = {pasid: self._owner(pasid) for pasid in pasids if pasid in self._ids}
                told = self._free(freed)
            with suppress(Exception):
                tell(told)
            with self._lock:
                for each in kept:
                    each._kept -= 1
            raise

    # --- copies ---

    def __copy__(self) -> PasidSpace:
        """Refuse: two spaces cannot share their IDs."""
        raise TypeError("a PasidSpace is copied by copy.deepcopy, with its sets and data")

    def __getstate__(self) -> dict[str, Any]:
        """All but the lock and the notifiers; TypeError with a backend."""
        if self._backends:
            raise TypeError("a PasidSpace with a backend cannot be copied: its IDs are elsewhere")
        state = dict(self.__dict__)
        del state["_lock"]
        return state | {"_notifiers": (), "_mm_notifiers": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave."""
        self.__dict__.update(state)
        self._lock = threading.RLock()
