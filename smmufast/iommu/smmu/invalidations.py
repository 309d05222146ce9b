"""Where a domain may be cached, and the commands that invalidate it there (F58 to F60).

How invalidations are gathered is not architectural: it follows what Linux does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from smmufast._driver.ring import (
    ATS,
    ATS_FULL,
    S1_ASID,
    S2_VMID,
    S2_VMID_S1_CLEAR,
    atc_span,
    check_cached,
    invalidate,
    tlb_ranges,
)
from smmufast.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterable

    from smmufast._driver.ring import CommandQueue

__all__ = [
    "ATS", "ATS_FULL", "S1_ASID", "S2_VMID", "S2_VMID_S1_CLEAR", "Entry", "Invalidations",
    "atc_span", "tlb_ranges",
]  # fmt: skip

_ALL: Final = (1 << 64) - 1


class Entry(NamedTuple):
    """Something that may have cached a domain, and how often it is in use."""

    queue: CommandQueue
    kind: int
    id: int
    ssid: int
    users: int


_Key = tuple[int, int, int, int]
_Part = tuple["CommandQueue", list[_Key]]
_NO_PARTS: Final[tuple[int, list[_Part]]] = (-1, [])


class Invalidations:
    """Where a domain may be cached: TLB tags of SMMUs, ATCs of streams; sorted, counted.

    `merge` and `purge` make new ones; `unref` leaves entries that nobody uses as trash.  Whoever
    invalidates while others insert and remove works on the entries of one moment.
    """

    __slots__ = ("_order", "_queues", "_sorted", "_users", "_version")

    def __init__(self, entries: Iterable[tuple[CommandQueue, int, int, int]] = ()) -> None:
        self._users: dict[_Key, int] = {}
        self._queues: dict[int, CommandQueue] = {}
        self._version = 0  # moves after each change
        self._sorted: tuple[int, list[tuple[_Key, int]]] = (-1, [])  # of which version
        self._order: tuple[int, list[_Part]] = _NO_PARTS  # the same
        for queue, kind, number, ssid in entries:
            self.insert(queue, kind, number, ssid)

    def _key(self, queue: CommandQueue, kind: int, number: int, ssid: int) -> _Key:
        order = queue.base  # where it lies: the same in every array
        if self._queues.setdefault(order, queue) is not queue:
            raise InvalidArgument("queue", queue, text="queue lies where another one does")
        return order, kind, number, ssid

    def _rows(self) -> list[tuple[_Key, int]]:
        """Keys and their users, in order."""
        version = self._version
        known, rows = self._sorted
        if known != version:
            # list() first: one step between threads
            rows = list(self._users.items())
            rows.sort()
            self._sorted = version, rows
        return rows

    def insert(self, queue: CommandQueue, kind: int, number: int, ssid: int = 0) -> int:
        """Count one more user of an entry; return how many it has.

        Parameters
        ----------
        queue : CommandQueue
        kind : int
            What it is, and so how it is invalidated.
        number : int
            An ASID, a VMID or a StreamID.
        ssid : int
            Of an ATC; 0 without.

        Raises
        ------
        InvalidArgument
            No such kind, or a number that has too many bits.
        """
        check_cached(kind, number, ssid)
        key = self._key(queue, kind, number, ssid)
        users = self._users.get(key, 0) + 1
        self._users[key] = users
        self._version += 1
        return users

    def remove(self, queue: CommandQueue, kind: int, number: int, ssid: int = 0) -> int:
        """Count one user less; the last takes the entry with it.  Return how many are left.

        Raises
        ------
        InvalidArgument
            There is no such entry.
        """
        key = self._key(queue, kind, number, ssid)
        left = self._used(key, 1) - 1
        if left:
            self._users[key] = left
        else:
            del self._users[key]
        self._version += 1
        return left

    def users(self, queue: CommandQueue, kind: int, number: int, ssid: int = 0) -> int:
        """How many users an entry has; 0 if it is not there."""
        return self._users.get(self._key(queue, kind, number, ssid), 0)

    def _used(self, key: _Key, least: int) -> int:
        users = self._users.get(key, 0)
        if users < least:
            raise InvalidArgument("entry", key, text=f"entry {key} has {users} users, not {least}")
        return users

    def __len__(self) -> int:
        return len(self._users)

    @property
    def entries(self) -> list[Entry]:
        """All entries in order, trash among them."""
        return [
            Entry(self._queues[order], kind, number, ssid, users)
            for (order, kind, number, ssid), users in self._rows()
        ]

    @property
    def trash(self) -> int:
        """How many entries nobody uses."""
        return sum(not users for _, users in self._rows())

    def merge(self, other: Invalidations) -> Invalidations:
        """Return both together: users add up."""
        made = Invalidations()
        made._queues = self._queues | other._queues
        made._users = dict(self._rows())
        for key, users in other._rows():
            made._users[key] = made._users.get(key, 0) + users
        return made

    def unref(self, other: Invalidations) -> int:
        """Take the users of another one away, in place; return how much trash there is then.

        Trash at the end is trimmed.  An entry that is not there, or has fewer users, is an
        InvalidArgument, and nothing is changed.
        """
        rows = other._rows()
        left = {key: self._used(key, users) - users for key, users in rows}
        self._users.update(left)
        self._version += 1
        for key, users in reversed(self._rows()):
            if users:
                break
            del self._users[key]
        self._version += 1
        return self.trash

    def purge(self) -> Invalidations | None:
        """Return what is in use, without the trash; None if there is none."""
        if not self.trash:
            return None
        made = Invalidations()
        made._queues = dict(self._queues)
        made._users = {key: users for key, users in self._rows() if users}
        return made

    def invalidate_all(self) -> None:
        """Drop everything that may be cached: by tag, and whole ATCs of the PASIDs."""
        self.invalidate(0, _ALL, 12, 12, False)

    def invalidate(
        self, first: int, last: int, granule_lg2: int, page_lg2: int, leaf: bool
    ) -> None:
        """Drop what may be cached of some addresses, everywhere; TLBs before ATCs.

        Parameters
        ----------
        first, last : int
            The range, inclusive.
        granule_lg2 : int
            Of the page table.
        page_lg2 : int
            Of the entries that were removed.
        leaf : bool
            Only leaf entries were removed, no table.
        """
        version, parts = self._order
        if version != self._version:
            parts = self._parts()
        invalidate(parts, first, last, granule_lg2, page_lg2, leaf)

    def _parts(self) -> list[_Part]:
        """What is told to each queue until its CMD_SYNC, in this order.

        What was cached through stage 2 is dropped when stage 2 itself is dropped, not before: it
        could be filled again from what is stale.  ATCs come last, since they ask the TLBs.
        """
        version = self._version
        known, parts = self._order
        if known != version:
            rows = [key for key, users in self._rows() if users]
            parts = []
            for kinds in ((S1_ASID, S2_VMID), (S2_VMID_S1_CLEAR,), (ATS, ATS_FULL)):
                for order in dict.fromkeys(key[0] for key in rows):
                    keys = [key for key in rows if key[0] == order and key[1] in kinds]
                    if keys:
                        parts.append((self._queues[order], keys))
            self._order = version, parts
        return parts
