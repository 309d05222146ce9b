"""Where IDs come from, and where they go (docs/domains.md 4.3)."""

from __future__ import annotations

import warnings
from contextlib import suppress
from operator import index
from typing import TYPE_CHECKING, Protocol, SupportsIndex

import numpy as np

from smmufast._driver.pasid import PasidError, PasidExhausted
from smmufast.errors import Exists, InvalidArgument, NoSpace, TryAgain
from smmufast.iommu.pasid.notifiers import PasidNotifiers
from smmufast.iommu.pasid.policy import LAST

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from smmufast.iommu.pasid.policy import PasidPolicy
    from smmufast.iommu.pasid.sets import Owner, PasidSet


class PasidBackend(Protocol):
    """Where IDs come from instead of the lowest free one: a guest asks its host, say.

    Its calls are made with the space's lock held.
    """

    def alloc(self, min: int, max: int) -> int | None:
        """Return an ID, or None for none; `min` and `max` are what was asked for, and hints."""

    def free(self, pasid: int) -> None:
        """Take an ID back; an exception refuses it, and the ID stays allocated."""


def _functions(backend: PasidBackend) -> tuple[object, object]:
    """What backends have in common that share one ID space."""
    calls = backend.alloc, backend.free
    return getattr(calls[0], "__func__", calls[0]), getattr(calls[1], "__func__", calls[1])


class PasidBackends(PasidNotifiers):
    """The backends of a space, and the steps that take IDs and give them back."""

    def __init__(self, policy: PasidPolicy, smmu_limits: Sequence[int]) -> None:
        super().__init__(policy, smmu_limits)
        # Of each of these, only the IDs that have some.  An ID that is pending has references.
        self._references: dict[int, int] = {}
        self._pending: set[int] = set()
        # Those that share one ID space are one list; the first list is active.
        self._backends: list[list[PasidBackend]] = []

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

    # --- the steps, which need the lock ---

    @staticmethod
    def _range(min: SupportsIndex, max: SupportsIndex | None) -> tuple[int, int | None]:
        """Return the range that PASIDs are asked from, checked."""
        first = index(min)
        if first < 1:
            raise InvalidArgument("min", first, f"1 to {LAST:#x}")
        if max is None:
            return first, None
        most = index(max)
        if most < first:
            raise InvalidArgument("max", most, f"min, {first:#x}, or more")
        return first, most

    def _take(self, first: int, most: int | None, owner: Owner | None) -> int:
        """Take one PASID from the backends, or from the IDs of the space."""
        last = self.limit - 1
        if self._backends:
            return self._take_given(first, last if most is None else most, owner)
        last = last if most is None else min(most, last)
        if first <= last:
            try:
                return self._ids.alloc(first, last, owner)
            except PasidExhausted:
                pass
        raise self._none_free(1, first, last)

    def _take_given(self, first: int, most: int, owner: Owner | None) -> int:
        """Take what the backend gives."""
        backend = self._backends[0][0]
        picked: list[int] = []  # given back in the end, lest they are given again
        try:
            while (given := backend.alloc(first, most)) is not None:
                with suppress(PasidError):
                    return self._ids.alloc(given, given, owner)
                if given in picked or given in self._ids or not self.picked(given):
                    backend.free(given)
                    text = f"pasid: {backend!r} gave {given}, which is in use or cannot be one"
                    raise NoSpace("pasid", given, text=text)
                picked.append(given)
            text = f"pasid: {backend!r} has none in {first:#x} to {most:#x}"
            raise NoSpace("pasid", None, text=text)
        finally:
            for given in picked:
                backend.free(given)

    def _take_many(
        self, count: int, first: int, most: int | None, owner: Owner | None
    ) -> NDArray[np.uint32]:
        """Take so many PASIDs, or none."""
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

    def _release(self, freed: dict[int, Owner | None]) -> None:
        """Make IDs free, which a backend may refuse."""
        if not self._backends:
            self._forget(freed)
            return
        for pasid, owner in freed.items():
            self._backends[0][0].free(pasid)
            self._forget({pasid: owner})

    def _forget(self, freed: dict[int, Owner | None]) -> None:
        """Make IDs free, with all that is known of them; sets that have no more IDs end."""
        if len(freed) == 1:
            self._ids.free(*freed)
        else:
            self._ids.free_many(np.fromiter(freed, np.uint32, len(freed)))
        self._withhold(freed)
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
