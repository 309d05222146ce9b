"""Where a domain may be cached, and the commands that invalidate it there (F58 to F60).

How invalidations are gathered is not architectural: it follows what Linux does.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final, NamedTuple

from smmufast import layout
from smmufast.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterable

    from smmufast.iommu.smmu.queue import CommandQueue

S1_ASID: Final = 0
S2_VMID: Final = 1
S2_VMID_S1_CLEAR: Final = 2
ATS: Final = 3
ATS_FULL: Final = 4

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

    def __init__(self, entries: Iterable[tuple[CommandQueue, int, int, int]] = ()) -> None:
        self._users: dict[_Key, int] = {}
        self._queues: dict[int, CommandQueue] = {}
        self._version = 0  # moves after each change
        self._sorted: tuple[int, list[tuple[_Key, int]]] = (-1, [])  # of which version
        self._order: tuple[int, list[_Part]] = _NO_PARTS  # the same
        for queue, kind, number, ssid in entries:
            self.insert(queue, kind, number, ssid)

    def _key(self, queue: CommandQueue, kind: int, number: int, ssid: int) -> _Key:
        for order, known in self._queues.items():
            if known is queue:
                return order, kind, number, ssid
        order = queue.base  # where it lies: the same in every array
        self._queues[order] = queue
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
        """Count one more user of an entry; return how many it has."""
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
        for queue, keys in self._parts():
            words: list[int] = []
            for _, kind, number, ssid in keys:
                words += _words(
                    queue, kind, number, ssid, first, last, granule_lg2, page_lg2, leaf
                )
            queue.run(words)

    def _parts(self) -> list[_Part]:
        """What is told to each queue until its CMD_SYNC, in this order: TLBs before ATCs."""
        version = self._version
        known, parts = self._order
        if known != version:
            rows = [key for key, users in self._rows() if users]
            parts = []
            for ats in (False, True):
                for order in dict.fromkeys(key[0] for key in rows):
                    keys = [key for key in rows if key[0] == order and (key[1] >= ATS) == ats]
                    if keys:
                        parts.append((self._queues[order], keys))
            self._order = version, parts
        return parts


def atc_span(first: int, last: int) -> tuple[int, int]:
    """The one power-of-two span of an ATC_INV that covers a range: address, Size field (F59)."""
    if last - first >= 1 << 63:
        return 0, 52
    start, end = first >> 12, last >> 12
    lg2 = (start ^ end).bit_length()
    if lg2 >= 52:
        return 0, 52
    return (start >> lg2 << lg2) << 12, lg2


def tlb_ranges(
    first: int, last: int, granule_lg2: int, page_lg2: int, leaf: bool, ranges: bool
) -> list[dict[str, int]] | None:
    """The address fields of the TLBI commands that cover a range; None: the whole tag (F60)."""
    size = last - first + 1
    if size >= 1 << 52 or (not ranges and size >= 1 << (2 * granule_lg2 - 3)):
        return None
    if not ranges:
        step = 1 << (page_lg2 if leaf else granule_lg2)
        return [
            {"Address": address, "Leaf": int(leaf)}
            for address in range(first & -step, last + 1, step)
        ]
    address = first >> granule_lg2 << granule_lg2
    pages = (last - address >> granule_lg2) + 1
    if not leaf and pages & 31 == 1:
        pages += 1
    ttl = 4 - (page_lg2 - 3) // (granule_lg2 - 3) if leaf else 0
    made = []
    while pages:
        scale = min((pages & -pages).bit_length() - 1, 31)
        # Num is number - 1, of 5 bits
        number = pages >> scale & 31 if scale < 31 else min(pages >> scale, 32)
        made.append(
            {
                "Address": address & (1 << 64) - 1,
                "Leaf": int(leaf),
                "Scale": scale,
                "Num": number - 1,
                "TG": (granule_lg2 - 10) // 2,
                "TTL": ttl,
            }
        )
        address += number << scale + granule_lg2
        pages -= number << scale
    return made


_FEW: Final = 32  # granules: the commands for so many are remembered


@functools.lru_cache(maxsize=1024)
def _tlbis_at_0(
    name: str, field: str, last: int, granule_lg2: int, page_lg2: int, leaf: bool, ranges: bool
) -> tuple[int, ...]:
    """The TLBI commands for a range that begins at address 0, without their opcode and tag."""
    fields = tlb_ranges(0, last, granule_lg2, page_lg2, leaf, ranges) or ()
    same = layout.pack(name)
    return tuple(layout.pack(name, **_renamed(some, field)) - same for some in fields)


def _renamed(fields: dict[str, int], address: str) -> dict[str, int]:
    """The fields of a TLBI command with the name that this command has for its address."""
    return {address if name == "Address" else name: value for name, value in fields.items()}


def _words(
    queue: CommandQueue, kind: int, number: int, ssid: int, first: int, last: int,
    granule_lg2: int, page_lg2: int, leaf: bool,
) -> list[int]:  # fmt: skip
    """The commands that one entry needs."""
    if kind == ATS_FULL:
        return [layout.pack("ATC_INV", StreamID=number, Size=52)]
    if kind == ATS:
        address, size = atc_span(first, last)
        more = {"SSV": 1, "SubstreamID": ssid} if ssid else {}
        return [layout.pack("ATC_INV", StreamID=number, Address=address, Size=size, **more)]
    if kind == S2_VMID_S1_CLEAR:
        return [layout.pack("TLBI_NH_ALL", VMID=number)]
    ranges = bool(queue.smmu.features.ril)
    if kind == S2_VMID:
        name, whole, field, tag = "TLBI_S2_IPA", "TLBI_S12_VMALL", "IPA", "VMID"
    elif queue.smmu.cr2 & layout.mask("CR2", "E2H"):
        name, whole, field, tag = "TLBI_EL2_VA", "TLBI_EL2_ASID", "Address", "ASID"
    else:
        name, whole, field, tag = "TLBI_NH_VA", "TLBI_NH_ASID", "Address", "ASID"
    size = last - first
    if not (size >> granule_lg2 >= _FEW or last >> 51 or first & (1 << page_lg2) - 1):
        # the same commands as at address 0, further up
        above = layout.pack(name, **{tag: number, field: first})
        at_0 = _tlbis_at_0(name, field, size, granule_lg2, page_lg2, leaf, ranges)
        return [word + above for word in at_0]
    fields = tlb_ranges(first, last, granule_lg2, page_lg2, leaf, ranges)
    if fields is None:
        return [layout.pack(whole, **{tag: number})]
    return [layout.pack(name, **{tag: number}, **_renamed(some, field)) for some in fields]
