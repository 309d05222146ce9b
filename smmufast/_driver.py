"""What a driver tells an SMMU: commands, entries changed while it looks, invalidations.

The command queue is IHI 0070 3.5 and 4; the used bits of an STE and a CD are those of 5.2 and
5.4 that its other fields make the SMMU read.  How few stores and CMD_SYNCs an update takes, and
how invalidations are gathered, is not architectural: it follows what Linux does (F44, F58 to F60).
"""

from __future__ import annotations

import functools
import struct
import threading
from typing import TYPE_CHECKING, Final, NamedTuple

from smmufast import layout
from smmufast.errors import InputOutput, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from smmufast._memory import Memory
    from smmufast._smmu import Smmu

S1_ASID: Final = 0
S2_VMID: Final = 1
S2_VMID_S1_CLEAR: Final = 2
ATS: Final = 3
ATS_FULL: Final = 4

_ALL: Final = (1 << 64) - 1
_CMDQ_RA: Final = layout.mask("CMDQ_BASE", "RA")
_CONFIG: Final = layout.STE.field("Config")
_SYNC: Final = layout.pack("SYNC")
_DWORDS: Final = struct.Struct("<8Q")
_DWORD: Final = tuple(_ALL << 64 * i for i in range(8))  # the bits of each in an entry
_CERRORS: Final = {
    0: "no error", 1: "illegal command", 2: "abort of a command fetch", 3: "ATC timeout",
}  # fmt: skip


class CommandQueue:
    """The driver's end of a command queue: commands gather until one CMD_SYNC.

    Parameters
    ----------
    smmu : Smmu
    base : int
        Address of the ring in the SMMU's memory, aligned to its size.
    size_lg2 : int
        log2 of the number of commands of 16 bytes.

    Attributes
    ----------
    issued, syncs : int
        Commands so far, and how many of them were CMD_SYNC.
    log : list or None
        A list gets (name, fields) of every command.
    lock : RLock
        Held from a batch's first command to its CMD_SYNC.
    """

    def __init__(self, smmu: Smmu, base: int, size_lg2: int) -> None:
        self.smmu = smmu
        self.memory = smmu.memory
        self.base = base
        self.size_lg2 = size_lg2
        self.prod = 0
        self.issued = 0
        self.syncs = 0
        self.log: list[tuple[str, dict[str, int]]] | None = None
        self.lock = threading.RLock()
        self._size = 1 << size_lg2
        self._mask = 2 * self._size - 1
        self._free = self._size

    def start(self) -> None:
        """Tell the SMMU where the queue is; CR0.CMDQEN must be 0."""
        self.smmu.write("CMDQ_BASE", self.base | _CMDQ_RA | self.size_lg2, 8)
        self.smmu.write("CMDQ_PROD", 0)
        self.smmu.write("CMDQ_CONS", 0)
        self.prod = 0
        self._free = self._size

    def issue(self, name: str, **fields: int) -> None:
        """Put a command into the queue, by its name and fields in `smmufast.layout`.

        Raises
        ------
        ValueError
            No such command or field, or a value that does not fit.
        """
        word = layout.pack(layout.command_record(name), **fields)
        if self.log is not None:
            self.log.append((name, layout.unpack(layout.command_record(name), word)))
        with self.lock:
            self._put((word,))

    def put(self, word0: int, word1: int) -> None:
        """Put a command of two dwords into the queue."""
        if not (0 <= word0 <= _ALL and 0 <= word1 <= _ALL):
            raise InvalidArgument("word0", word0, "dwords of 64 bits")
        with self.lock:
            self._put((word0 | word1 << 64,))

    def _put(self, words: Sequence[int]) -> None:
        """With the lock held: commands into the queue, one write for what lies side by side."""
        done, count = 0, len(words)
        while done < count:
            if not self._free:
                self._ring()
            slot = self.prod & self._mask >> 1
            n = min(count - done, self._free, self._size - slot)
            piece = words if n == count else words[done : done + n]
            data = b"".join([word.to_bytes(16, "little") for word in piece])
            self.memory.write(self.base + 16 * slot, data)
            self.prod = self.prod + n & self._mask
            self._free -= n
            self.issued += n
            done += n

    def _ring(self) -> None:
        """Write PROD, and see that the SMMU has consumed everything."""
        smmu = self.smmu
        smmu.write("CMDQ_PROD", self.prod)
        cons = smmu.read("CMDQ_CONS")
        if cons & self._mask != self.prod:
            if (smmu.read("GERROR") ^ smmu.read("GERRORN")) & 1:
                self._recover(cons)
            raise InputOutput("queue", self, text="the SMMU does not consume commands: CMDQEN?")
        self._free = self._size

    def _recover(self, cons: int) -> None:
        """Put a CMD_SYNC where the error is, acknowledge it, go on, and say what it was."""
        slot = cons & self._mask >> 1
        address = self.base + 16 * slot
        bad = int.from_bytes(self.memory.read(address, 16), "little")
        self.memory.write(address, _SYNC.to_bytes(16, "little"))
        self.smmu.write("GERRORN", self.smmu.read("GERRORN") ^ 1)
        self.smmu.write("CMDQ_PROD", self.prod)
        self._free = self._size
        reason = _CERRORS.get(cons >> 24 & 0x7F, "unknown error")
        raise InputOutput(
            "command", bad, text=f"command {bad & 0xFF:#x} ({bad:#034x}) was refused: {reason}"
        )

    def submit(self) -> None:
        """Let the SMMU consume what was issued, without a CMD_SYNC; errors as `sync`."""
        with self.lock:
            self._ring()

    def sync(self) -> None:
        """Issue CMD_SYNC and wait until everything before it is done.

        Raises
        ------
        InputOutput
            A command was refused; the queue works again.
        Exception
            Whatever a host's callback raises while commands are consumed.
        """
        self.run(())

    def run(self, words: Sequence[int]) -> None:
        """Put commands into the queue, then CMD_SYNC; wait and raise as `sync`."""
        with self.lock:
            words = [*words, _SYNC]
            self._put(words)
            if self.log is not None:
                for word in words:
                    record = layout.command_record(word & 0xFF)
                    self.log.append((record.name, layout.unpack(record, word)))
            self.syncs += 1
            self._ring()


class Update(NamedTuple):
    """How an entry was changed: CMD_SYNCs that it took, and whether it was valid throughout."""

    syncs: int
    hitless: bool


def _mask(record: str, *names: str) -> int:
    """The bits that some fields of a record take."""
    mask = 0
    for name in names:
        mask |= layout.record(record).field(name).absolute
    return mask


_STE_V: Final = _mask("STE", "V")
_STE_CONFIG: Final = _mask("STE", "V", "Config")
_STE_S1: Final = _mask(
    "STE", "S1Fmt", "S1ContextPtr", "S1CDMax", "S1DSS", "S1CIR", "S1COR", "S1CSH", "S1STALLD",
    "STRW", "EATS", "MEV", "S2VMID",
)  # fmt: skip
_STE_S2: Final = _mask(
    "STE", "S2FWB", "EATS", "SHCFG", "MEV", "S2VMID", "S2T0SZ", "S2SL0", "S2IR0", "S2OR0", "S2SH0",
    "S2TG", "S2PS", "S2AA64", "S2ENDI", "S2PTW", "S2S", "S2R", "S2TTB",
)  # fmt: skip
_STE_SHCFG: Final = _mask("STE", "SHCFG")
_STE_MEV: Final = _mask("STE", "MEV")
_STE_EATS: Final = _mask("STE", "EATS")
_STE_S1DSS: Final = _mask("STE", "S1DSS")
_STE_BYPASS_DSS: Final = layout.pack("STE", S1DSS=1)
_STE_S2S: Final = _mask("STE", "S2S")
_CD_V: Final = _mask("CD", "V")
_CD_EPD0: Final = _mask("CD", "EPD0")
_ENTRY: Final = (1 << 512) - 1
_CD_NO_TTB0: Final = _ENTRY & ~_mask("CD", "T0SZ", "TG0", "IR0", "OR0", "SH0", "TTB0")


def ste_used(ste: int) -> int:
    """The bits of an STE, as one number, that the SMMU reads."""
    if not ste & _STE_V:
        return _STE_V
    used = _STE_CONFIG
    config = ste_config(ste)
    if config & 4:
        if config & 1:
            used |= _STE_S1
            if ste & _STE_S1DSS == _STE_BYPASS_DSS:
                used |= _STE_SHCFG
        if config & 2:
            used |= _STE_S2
        if config == 4:
            used |= _STE_SHCFG
    return used


def ste_config(ste: int) -> int:
    """Config of an STE, or of its first dword."""
    return (ste & _CONFIG.mask) >> _CONFIG.shift


def ste_safe(old: int, new: int) -> int:
    """The bits of an STE that may change at any time, though both values use them."""
    low = _STE_EATS & -_STE_EATS
    if not (old | new) & (_STE_EATS ^ low | _STE_S2S):
        return _STE_MEV | low
    return _STE_MEV


def cd_used(cd: int) -> int:
    """The bits of a CD, as one number, that the SMMU reads."""
    if not cd & _CD_V:
        return _CD_V
    return _CD_NO_TTB0 if cd & _CD_EPD0 else _ENTRY


class EntryWriter:
    """Changes STEs and CDs so that the SMMU, which may read them at any time, sees no torn one.

    Parameters
    ----------
    queue : CommandQueue
    memory : Memory
    safe_bits : bool
        Use the bits that may change at any time.
    call : callable, optional
        Calls the observer, with it and its arguments; to let it raise at a better time.

    Attributes
    ----------
    observer : callable or None
        Called as ``observer(address, index, old_words)`` after each store of a dword.
    """

    def __init__(
        self,
        queue: CommandQueue,
        memory: Memory,
        *,
        safe_bits: bool = True,
        call: Callable[..., object] | None = None,
    ) -> None:
        self.queue = queue
        self.memory = memory
        self.safe_bits = safe_bits
        self.call = call or (lambda observer, *arguments: observer(*arguments))
        self.observer: Callable[[int, int, tuple[int, ...]], object] | None = None

    def read(self, address: int) -> tuple[int, ...]:
        """The eight dwords of the entry at `address`."""
        return _DWORDS.unpack(self.memory.read(address, 64))

    def write_ste(self, address: int, words: Sequence[int], sid: int) -> Update:
        """Make the STE at `address`, of stream `sid`, eight dwords; CFGI_STE at each step."""
        command = layout.pack("CFGI_STE", StreamID=sid, Leaf=1)
        safe = ste_safe if self.safe_bits else None
        return self._write(address, words, ste_used, safe, [command])

    def write_cd(
        self, address: int, words: Sequence[int], sids: Iterable[int], ssid: int
    ) -> Update:
        """Make the CD at `address` eight dwords; CFGI_CD of each stream at each step."""
        commands = [
            layout.pack("CFGI_CD", StreamID=sid, SubstreamID=ssid, Leaf=1) for sid in sids
        ]
        return self._write(address, words, cd_used, None, commands)

    def _write(
        self,
        address: int,
        words: Sequence[int],
        used: Callable[[int], int],
        safe: Callable[[int, int], int] | None,
        commands: Sequence[int],
    ) -> Update:
        with self.queue.lock:
            now = int.from_bytes(self.memory.read(address, 64), "little")
            target = int.from_bytes(_DWORDS.pack(*words), "little")
            if now == target:
                return Update(0, True)
            now_used, target_used = used(now), used(target)
            if safe is not None:
                now_used &= ~(safe(now, target) & target_used)
            # all that can change before anybody sees it
            ahead = now ^ (now ^ target) & ~now_used
            critical = [i for i in range(8) if (ahead ^ target) & target_used & _DWORD[i]]
            steps: list[tuple[Iterable[int], int]]
            if not critical:
                steps = [(range(8), target)]
            elif len(critical) == 1:
                (i,) = critical
                steps = [
                    ([k for k in range(8) if k != i], ahead), ([i], target), (range(8), target),
                ]  # fmt: skip
            else:
                steps = [([0], 0), (range(1, 8), target), ([0], target)]
            syncs, hitless = 0, True
            for indices, wanted in steps:
                changed = False
                for i in indices:
                    change = (now ^ wanted) & _DWORD[i]
                    if change:
                        old = now
                        now ^= change
                        self.memory.write_u64(address + 8 * i, now >> 64 * i & _ALL)
                        changed = True
                        if self.observer is not None:
                            self.call(self.observer, address, i, _dwords(old))
                if changed:
                    self.queue.run(commands)
                    syncs += 1
                    hitless = hitless and now & _ALL != 0
            return Update(syncs, hitless)


def _dwords(entry: int) -> tuple[int, ...]:
    return _DWORDS.unpack(entry.to_bytes(64, "little"))


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
