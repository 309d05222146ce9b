"""The PASIDs of a system: one ID space, policies, sets, guests' numbers, notifiers, backends.

Not architectural but for the width of a PASID, 20 bits, and for 0, which is no address space's
(IHI 0070 SMMU_IDR1.SSIDSIZE; PCIe PASID).  The rest is what operating systems do, merged (F20-F23;
docs/domains.md 4.1 to 4.3 and 4.5) or proposed (4.4).

Auxiliary domains, address spaces of processes and guests draw from the same `PasidSpace`, so that
they are used at the same time.
"""

from __future__ import annotations

import enum
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any, Final, Protocol, SupportsIndex

import numpy as np

from smmufast._pasid import PasidAllocator, PasidDuplicate, PasidError, PasidExhausted
from smmufast.errors import (
    AccessDenied,
    Busy,
    Exists,
    InvalidArgument,
    IommuError,
    NoDevice,
    NoEntry,
    NoSpace,
    PasidOverflow,
    TryAgain,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import ArrayLike, NDArray

SIZE: Final = 1 << 20
LAST: Final = SIZE - 1
NO_SPID: Final = (1 << 32) - 1
"""What the kernel calls INVALID_IOASID: no guest's number."""

_ALLOCATED: Final = "an allocated PASID"


# --- values ---


@dataclass(frozen=True, slots=True)
class PasidPolicy:
    """How many PASIDs a device gets.

    Attributes
    ----------
    name : str
    system_wide : bool
        All devices have the limit of the narrowest SMMU, which is fixed at its first use (F21).
    strict : bool
        A device that has fewer PASIDs than that gets none (F22).
    """

    name: str
    system_wide: bool = False
    strict: bool = False


PER_DEVICE: Final = PasidPolicy("per device")
"""Each device has its own limit, and so may be too narrow for a PASID that exists (F20)."""
SYSTEM_WIDE: Final = PasidPolicy("system wide", system_wide=True)
"""No PASID is beyond the narrowest SMMU (F21); a device may still be narrower."""
SYSTEM_WIDE_STRICT: Final = PasidPolicy("system wide, strict", system_wide=True, strict=True)
"""As SYSTEM_WIDE, and a narrower device does without PASIDs (F22)."""


class PasidState(enum.Enum):
    """FREE, then IDLE, then ACTIVE while others hold references, then FREE_PENDING until they go.

    An ID is freed from IDLE at once, and from ACTIVE when the last reference goes.
    """

    FREE = "free"
    IDLE = "idle"
    ACTIVE = "active"
    FREE_PENDING = "free pending"


class SetKind(enum.Enum):
    """What the token of a set is: nothing, or an address space, which has at most one set."""

    NULL = "null"
    MM = "mm"


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


class PasidBackend(Protocol):
    """Where IDs come from instead of the lowest free one: a guest asks its host, say.

    Its calls are made with the space's lock held.
    """

    def alloc(self, min: int, max: int) -> int | None:
        """Return an ID, or None for none; `min` and `max` are what was asked for, and hints."""

    def free(self, pasid: int) -> None:
        """Take an ID back; an exception refuses it, and the ID stays allocated."""


_Owner = tuple["PasidSet | None", Any]  # set, data: what the allocator keeps for an ID, or None
_Chain = tuple[tuple[NotifierOrder, int, Notifier], ...]  # order, serial number, who
_Told = list[tuple[PasidNotice, _Chain]]


def _functions(backend: PasidBackend) -> tuple[object, object]:
    """What backends have in common that share one ID space."""
    calls = backend.alloc, backend.free
    return getattr(calls[0], "__func__", calls[0]), getattr(calls[1], "__func__", calls[1])


def _tell(told: _Told) -> None:
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


# --- sets ---


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
        self.space = space
        self.kind = kind
        self.token = token
        self.quota = quota
        self.alive = True
        self._members: set[int] = set()
        self._spids: dict[int, int] = {}
        self._notifiers: _Chain = ()
        self._kept = 0  # how many calls need it to stay, even without IDs
        self._plain: _Owner = (self, None)  # shared by all of its IDs that have no data

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
        _tell(told)

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


# --- the space ---


class PasidSpace:
    """The PASIDs of a system: 1 to 2**20 - 1, the lowest free one first.

    Parameters
    ----------
    policy : PasidPolicy
        PER_DEVICE, SYSTEM_WIDE or SYSTEM_WIDE_STRICT.
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

    An ID of the default set without data takes nothing but two of the bits that are there from
    the start, 258 KiB in all.  Others take more, up to (in CPython 3.11): 130 bytes for data, 140
    for a set, 120 for an SPID, 80 for references.

    Copies (`copy.deepcopy`, `pickle`) have the IDs, sets, data, references and SPIDs, and no
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
        self.policy = policy
        self._smmu_limits: list[int] = []
        self._limit: int | None = None
        self._lock = threading.RLock()
        self._ids = PasidAllocator(SIZE)
        # Of each of these, only the IDs that have some.  An ID that is pending has references.
        self._references: dict[int, int] = {}
        self._pending: set[int] = set()
        self._spids: dict[int, int] = {}
        self._sets: dict[PasidSet, None] = {}
        self._mm_sets: dict[object, PasidSet] = {}
        self._in_sets = 0
        self._capacity = SIZE
        self._capacity_installed = False
        self._reserved = 0
        self._quotas = 0
        self._notifiers: _Chain = ()
        self._mm_notifiers: dict[object, _Chain] = {}
        self._serial = 0
        # Those that share one ID space are one list; the first list is active.
        self._backends: list[list[PasidBackend]] = []
        for limit in smmu_limits:
            self.add_smmu(limit)

    # --- policy (F20-F23) ---

    def add_smmu(self, max_pasids: int) -> None:
        """Count an SMMU in for the system's limit; too late once that was used.

        Parameters
        ----------
        max_pasids : int
            ``2**ssid_bits`` of the SMMU; 0 or 1: it has no PASIDs.
        """
        if not 0 <= max_pasids <= SIZE:
            raise InvalidArgument("max_pasids", max_pasids, f"0 to {SIZE}")
        with self._lock:
            self._smmu_limits.append(max_pasids)

    @property
    def limit(self) -> int:
        """All PASIDs are below it; fixed when it is first asked for, or a PASID allocated (F21)."""
        if self._limit is None:
            with self._lock:
                if self._limit is None:
                    limits = self._smmu_limits if self.policy.system_wide else ()
                    self._limit = min((SIZE, *limits))
        return self._limit

    def max_pasids(self, device_max_pasids: int) -> int:
        """Return how many PASIDs a device has: 1 to one less than this; 0 if it has none.

        Parameters
        ----------
        device_max_pasids : int
            Its own limit, which is that of its SMMU too (F3).

        Raises
        ------
        InvalidArgument
            It is negative.
        """
        if device_max_pasids < 0:
            raise InvalidArgument("device_max_pasids", device_max_pasids, "0 or more")
        limit = self.limit
        if self.policy.strict and device_max_pasids < limit:
            return 0
        limit = min(device_max_pasids, limit)
        return limit if limit > 1 else 0

    def device_range(
        self, device_max_pasids: int, min_pasid: int = 0, max_pasid: int = 0
    ) -> tuple[int, int]:
        """Return the first and last PASID to ask `alloc` for, for a device (F20, F22, F23).

        Parameters
        ----------
        device_max_pasids : int
            The device's own limit.
        min_pasid, max_pasid : int
            What its driver asks for, both included; 0 for what the device has.  Wider values are
            clipped.

        Raises
        ------
        NoDevice
            The policy switched PASIDs off for this device.
        NoSpace
            The device has none of its own.
        InvalidArgument
            Nothing is left between the two.
        """
        bound = self._bound(device_max_pasids)
        if not bound:
            text = "device_max_pasids: the device has no PASIDs"
            raise NoSpace("device_max_pasids", device_max_pasids, text=text)
        first = max(min_pasid, 1)
        last = min(max_pasid or LAST, bound - 1)
        if min_pasid < 0 or max_pasid < 0 or first > last:
            text = f"min_pasid {min_pasid} and max_pasid {max_pasid} leave none of 1 to {bound - 1}"
            raise InvalidArgument("min_pasid", min_pasid, f"1 to {bound - 1}", text=text)
        return first, last

    def check(self, pasid: SupportsIndex, device_max_pasids: int) -> None:
        """Refuse a PASID that exists already for a device that is too narrow for it (F20).

        Parameters
        ----------
        pasid : int
            One that was allocated for another device.
        device_max_pasids : int
            This device's own limit.

        Raises
        ------
        PasidOverflow
            It is not below the device's limit.
        NoDevice
            The policy switched PASIDs off for this device (F22).
        """
        pasid = index(pasid)
        bound = self._bound(device_max_pasids)
        if pasid >= bound:
            limit = f"1 to {bound - 1}" if bound else "none: the device has no PASIDs"
            raise PasidOverflow("pasid", pasid, limit)

    def _bound(self, device_max_pasids: int) -> int:
        bound = self.max_pasids(device_max_pasids)
        if not bound and self.policy.strict:
            text = (
                f"device_max_pasids is {device_max_pasids}: PASIDs are off for devices that have "
                f"fewer than the system's {self.limit}"
            )
            raise NoDevice("device_max_pasids", device_max_pasids, text=text)
        return bound

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
        _tell(told)
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
            plain = pasid_set is None and not (self._in_sets or self._backends)
            if plain and self._references:
                plain = self._references.keys().isdisjoint(pasids.tolist())
            if plain:
                try:
                    self._ids.free_many(pasids)
                except PasidDuplicate as error:
                    raise self._twice(error.value) from None
                except PasidError as error:
                    raise NoEntry("pasid", error.value, _ALLOCATED) from None
                return
            freed: dict[int, _Owner | None] = {}
            for pasid in pasids.tolist():
                owner = self._member(pasid, pasid_set)
                if pasid in freed:
                    raise self._twice(pasid)
                freed[pasid] = owner
            told = self._free(freed)
        _tell(told)

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
                raise InvalidArgument("pasid", pasid, _ALLOCATED)
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
                _tell([(unbind, chain[:told])])
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
        _tell(told)

    def spid(self, pasid: SupportsIndex) -> int | None:
        """Return the guest's number of an ID, None if it has none."""
        return self._spids.get(index(pasid))

    # --- notifiers ---

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

    def _registered(self, pasid_set: PasidSet | None, mm: object) -> _Chain:
        if pasid_set is not None:
            if mm is not None:
                raise InvalidArgument("mm", mm, "None with a pasid_set")
            self._check_set(pasid_set)
            return pasid_set._notifiers
        return self._notifiers if mm is None else self._mm_notifiers.get(mm, ())

    def _register(self, pasid_set: PasidSet | None, mm: object, chain: _Chain) -> None:
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
                raise InvalidArgument("pasid", pasid, _ALLOCATED)
            told = self._told(change, pasid, self._owner(pasid))
        _tell(told)

    # --- backends (docs/domains.md 4.3) ---

    def register_backend(self, backend: PasidBackend) -> None:
        """Get IDs from elsewhere.

        The first backend that is registered is active, others wait.  Those whose `alloc` and
        `free` are the same functions (methods of one class) share one ID space; the first of them
        is asked.

        Raises
        ------
        TryAgain
            It would take over, while IDs are allocated that are not a backend's.
        Exists
            It is registered already.
        """
        functions = _functions(backend)
        with self._lock:
            if any(known is backend for group in self._backends for known in group):
                raise Exists("backend", backend, text=f"backend {backend!r} is registered")
            if not self._backends and len(self._ids):
                text = f"backend: {len(self._ids)} IDs are allocated without it"
                raise TryAgain("backend", backend, text=text)
            for group in self._backends:
                if _functions(group[0]) == functions:
                    group.append(backend)
                    return
            self._backends.append([backend])

    def unregister_backend(self, backend: PasidBackend) -> None:
        """Get IDs from the next backend in the order of registration, or from none, instead.

        While others share its ID space its IDs stay; with the last of them they are lost, with a
        warning.  A backend that is not registered gets a warning, too.
        """
        with self._lock:
            groups = [g for g in self._backends if any(known is backend for known in g)]
            if not groups:
                text = f"backend {backend!r} is not registered"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
                return
            (group,) = groups
            active = group is self._backends[0]
            group[:] = [known for known in group if known is not backend]
            if group:
                return
            self._backends.remove(group)
            if active and len(self._ids):
                lost = {pasid: self._owner(pasid) for pasid in self._ids}
                self._forget(lost)
                text = f"{len(lost)} IDs of {backend!r} are lost"
                warnings.warn(text, RuntimeWarning, stacklevel=2)

    @property
    def backend(self) -> PasidBackend | None:
        """Who is asked for IDs; None: the space itself."""
        with self._lock:
            return self._backends[0][0] if self._backends else None

    # --- the steps of which these are made; `_owner` and `_member` take no lock, others need it ---

    def _owner(self, pasid: SupportsIndex) -> _Owner | None:
        """One atomic look: NoEntry, or what the allocator keeps for the ID."""
        try:
            owner: _Owner | None = self._ids.find(pasid)
        except PasidError:
            raise NoEntry("pasid", index(pasid), _ALLOCATED) from None
        return owner

    def _member(self, pasid: SupportsIndex, pasid_set: PasidSet | None) -> _Owner | None:
        """As `_owner`, and AccessDenied unless the ID is of this set, or of any."""
        owner = self._owner(pasid)
        if pasid_set is not None and (owner is None or owner[0] is not pasid_set):
            pasid = index(pasid)
            raise AccessDenied("pasid", pasid, text=f"pasid {pasid:#x} belongs to another set")
        return owner

    @staticmethod
    def _new_owner(pasid_set: PasidSet | None, data: object) -> _Owner | None:
        if data is not None:
            return pasid_set, data
        return None if pasid_set is None else pasid_set._plain

    @staticmethod
    def _twice(pasid: int) -> InvalidArgument:
        return InvalidArgument("pasids", pasid, text=f"pasids: {pasid:#x} is there twice")

    @staticmethod
    def _range(min: SupportsIndex, max: SupportsIndex | None) -> tuple[int, int | None]:
        first = index(min)
        if first < 1:
            raise InvalidArgument("min", first, f"1 to {LAST:#x}")
        if max is None:
            return first, None
        most = index(max)
        if most < first:
            raise InvalidArgument("max", most, f"min, {first:#x}, or more")
        return first, most

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

    def _admit(self, pasid_set: PasidSet | None, count: int, data: object) -> _Owner | None:
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

    def _take(self, first: int, most: int | None, owner: _Owner | None) -> int:
        last = self.limit - 1
        if self._backends:
            backend = self._backends[0][0]
            given = backend.alloc(first, last if most is None else most)
            if given is None:
                raise NoSpace("pasid", None, text=f"pasid: {backend!r} has none")
            try:
                return self._ids.alloc(given, given, owner)
            except PasidError:
                backend.free(given)
            text = f"pasid: {backend!r} gave {given}, which is in use or cannot be one"
            raise NoSpace("pasid", given, text=text)
        last = last if most is None else min(most, last)
        if first <= last:
            try:
                return self._ids.alloc(first, last, owner)
            except PasidExhausted:
                pass
        raise self._none_free(1, first, last)

    def _take_many(
        self, count: int, first: int, most: int | None, owner: _Owner | None
    ) -> NDArray[np.uint32]:
        if self._backends:
            taken: list[int] = []
            try:
                for _ in range(count):
                    taken.append(self._take(first, most, owner))
            except BaseException:
                self._release(dict.fromkeys(taken))  # no set knows them yet
                raise
            return np.array(taken, np.uint32)
        last = self.limit - 1 if most is None else min(most, self.limit - 1)
        if first <= last:
            with suppress(PasidExhausted):
                return self._ids.alloc_many(count, first, last, owner)
        elif not count:
            return np.empty(0, np.uint32)
        raise self._none_free(count, first, last)

    @staticmethod
    def _none_free(count: int, first: int, last: int) -> NoSpace:
        text = f"pasid: fewer than {count} are free in {first:#x} to {last:#x}"
        return NoSpace("pasid", count, text=text)

    def _free(self, freed: dict[int, _Owner | None]) -> _Told:
        """Free what nobody else holds, and make the rest pending: who is to be told of it."""
        freed = {pasid: owner for pasid, owner in freed.items() if pasid not in self._pending}
        held = [pasid for pasid in freed if pasid in self._references]
        idle = {pasid: freed[pasid] for pasid in freed if pasid not in self._references}
        self._release(idle)
        self._pending.update(held)
        return [
            told for pasid in held for told in self._told(PasidChange.FREE, pasid, freed[pasid])
        ]

    def _release(self, freed: dict[int, _Owner | None]) -> None:
        """Make IDs free, which a backend may refuse."""
        if not self._backends:
            self._forget(freed)
            return
        for pasid, owner in freed.items():
            self._backends[0][0].free(pasid)
            self._forget({pasid: owner})

    def _forget(self, freed: dict[int, _Owner | None]) -> None:
        """Make IDs free, with all that is known of them; sets that have no more IDs end."""
        if len(freed) == 1:
            self._ids.free(*freed)
        else:
            self._ids.free_many(np.fromiter(freed, np.uint32, len(freed)))
        if self._references:
            for pasid in freed:
                self._references.pop(pasid, None)
                self._pending.discard(pasid)
        if not self._in_sets:
            return
        by_set: dict[PasidSet, list[int]] = {}
        for pasid, owner in freed.items():
            if owner is not None and owner[0] is not None:
                by_set.setdefault(owner[0], []).append(pasid)
        for pasid_set, pasids in by_set.items():
            pasid_set._members.difference_update(pasids)
            self._in_sets -= len(pasids)
            for pasid in pasids if pasid_set._spids else ():
                if pasid in self._spids:
                    self._unlink(pasid, pasid_set)
            if not pasid_set._members and not pasid_set._kept:
                self._end(pasid_set)

    def _unlink(self, pasid: int, pasid_set: PasidSet) -> None:
        del pasid_set._spids[self._spids.pop(pasid)]

    def _end(self, pasid_set: PasidSet) -> None:
        pasid_set.alive = False
        pasid_set._notifiers = ()
        del self._sets[pasid_set]
        if pasid_set.kind is SetKind.MM:
            del self._mm_sets[pasid_set.token]
        self._quotas -= pasid_set.quota

    def _chain(self, pasid_set: PasidSet | None) -> _Chain:
        """Who is told of the IDs of a set, in order."""
        chain = self._notifiers
        if pasid_set is None:
            return chain
        more = pasid_set._notifiers
        if self._mm_notifiers and pasid_set.kind is SetKind.MM:
            more += self._mm_notifiers.get(pasid_set.token, ())
        return tuple(sorted(chain + more, key=lambda known: known[:2])) if more else chain

    def _told(self, change: PasidChange, pasid: int, owner: _Owner | None) -> _Told:
        pasid_set, data = (None, None) if owner is None else owner
        notice = PasidNotice(change, pasid, self._spids.get(pasid), pasid_set, data)
        return [(notice, self._chain(pasid_set))]

    def _tell_alloc(
        self, pasids: Iterable[int], pasid_set: PasidSet | None, data: object, chain: _Chain
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
                _tell(told)
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


# --- a backend ---


class VirtualCommand:
    """A backend for a guest: it asks its host for IDs, before any device is known.

    As VT-d's virtual command does: the host chooses from all 20 bits, whatever the range asked
    for, and so the guest must expect IDs that are too large for a device (`PasidSpace.check`).

    Parameters
    ----------
    host : PasidSpace
        The host's.
    host_set : PasidSet, optional
        The guest's set there.
    caching_mode, scalable_mode, pasid_capability : bool
        What the guest's IOMMU has.  Without caching mode it is not a guest's.

    Attributes
    ----------
    scalable_mode : bool
        False also once `register` failed: without IDs there is no use for it.

    Examples
    --------
    >>> from smmufast.iommu.pasid import PasidSpace, VirtualCommand
    >>> host, guest = PasidSpace(), PasidSpace()
    >>> host.alloc()
    1
    >>> VirtualCommand(host).register(guest)
    True
    >>> guest.alloc()
    2
    """

    def __init__(
        self,
        host: PasidSpace,
        *,
        host_set: PasidSet | None = None,
        caching_mode: bool = True,
        scalable_mode: bool = True,
        pasid_capability: bool = True,
    ) -> None:
        self.host = host
        self.host_set = host_set
        self.caching_mode = caching_mode
        self.scalable_mode = scalable_mode
        self.pasid_capability = pasid_capability

    def register(self, guest: PasidSpace) -> bool:
        """Register with the guest's space, where the IOMMU has what it takes.

        Returns
        -------
        bool
            False if the guest goes on without: the IOMMU lacks something, or the space refused,
            which also ends scalable mode.
        """
        if not (self.caching_mode and self.scalable_mode and self.pasid_capability):
            return False
        try:
            guest.register_backend(self)
        except IommuError:
            self.scalable_mode = False
        return self.scalable_mode

    def alloc(self, min: int, max: int) -> int | None:
        """Return an ID that the host chose; None if it has none, or `min` or `max` cannot be."""
        if min < 1 or max > LAST:
            return None
        try:
            return self.host.alloc(pasid_set=self.host_set)
        except IommuError:
            return None

    def free(self, pasid: int) -> None:
        """Give an ID back to the host; one that the host took away already is forgotten.

        Raises
        ------
        Busy
            Somebody in the host uses it.
        """
        if self.host.state(pasid) is PasidState.ACTIVE:
            raise Busy("pasid", pasid, text=f"pasid {pasid:#x} is in use in the host")
        with suppress(NoEntry):
            self.host.free(pasid, pasid_set=self.host_set)
