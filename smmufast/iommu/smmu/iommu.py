"""The driver of one SMMU.

It boots the SMMU through its registers, owns its stream table, command queue and VMIDs, and reads
its event and page request queues.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, SupportsIndex

from smmufast import layout
from smmufast._driver.ring import record_waits
from smmufast.errors import Busy, InputOutput, InvalidArgument, NotSupported, OutOfRange
from smmufast.iommu.ids import IdSpace
from smmufast.iommu.smmu import entry
from smmufast.iommu.smmu.invalidations import S1_ASID
from smmufast.iommu.smmu.queue import CommandQueue
from smmufast.iommu.smmu.writer import EntryWriter
from smmufast.iommu.undo import Undo

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from smmufast._device.smmu import Result, Smmu
    from smmufast.features import Features
    from smmufast.iommu.device import Device
    from smmufast.iommu.domain import Domain
    from smmufast.iommu.nested import Viommu
    from smmufast.iommu.system import System

SPLIT: Final = 8  # a leaf of a two-level stream table holds 256 STEs
MAX_L1_LG2: Final = 17

_CR1 = layout.pack(
    "CR1", TABLE_SH=3, TABLE_OC=1, TABLE_IC=1, QUEUE_SH=3, QUEUE_OC=1, QUEUE_IC=1
)  # inner shareable, write-back
_OVFLG = layout.mask("EVENTQ_PROD", "OVFLG")  # as OVACKFLG in CONS, of both queues


#: How a page fault may be answered, and what CMD_PRI_RESP says then (4.6.1).
RESPONSES: Final = {"failure": 0, "invalid": 1, "success": 2}


@dataclass(slots=True, eq=False)
class Record:
    """A record of the event or the page request queue, and whose it was when it was taken.

    Attributes
    ----------
    data : bytes
    fields : dict of str to int
        By the names of the layout EVENT or PRI.
    device : Device or None
        Whose stream it is.
    domain : Domain or None
        What its address is in.
    answered : bool
        The SMMU was told what becomes of it.
    """

    data: bytes
    fields: dict[str, int]
    device: Device | None
    domain: Domain | None
    answered: bool = False

    @property
    def sid(self) -> int:
        """Its StreamID."""
        return self.fields["StreamID"]

    @property
    def pasid(self) -> int | None:
        """Its PASID, if it has one."""
        return self.fields["SubstreamID"] if self.fields["SSV"] else None


def answer(iommu: Iommu, record: Record, response: str) -> None:
    """Tell the SMMU what becomes of a stalled access, or of a group of page requests.

    No CMD_SYNC follows (F62).  An event that did not stall has no answer, nor has a request that
    is not the last of its group, nor a stop marker.
    """
    fields = record.fields
    if "PRGIndex" in fields:
        if not fields["Last"] or is_stop_marker(record):
            return
        more = {} if record.pasid is None else {"SSV": 1, "SubstreamID": record.pasid}
        iommu.queue.issue(
            "PRI_RESP", StreamID=record.sid, PRGIndex=fields["PRGIndex"],
            Resp=RESPONSES[response], **more,
        )  # fmt: skip
    elif fields["Stall"]:
        # retry, or terminate with an abort
        action = {"AC": 1} if response == "success" else {"AB": 1}
        iommu.queue.issue("RESUME", StreamID=record.sid, STAG=fields["STAG"], **action)
    else:
        return
    iommu.queue.submit()


def is_stop_marker(record: Record) -> bool:
    """Whether a page request says that no more come under its PASID: nobody waits for it."""
    fields = record.fields
    asks = fields["R"] or fields["W"] or fields["X"]
    return bool(fields["Last"] and not asks and record.pasid is not None)


class Iommu:
    """The driver of one SMMU.

    Attributes
    ----------
    smmu : Smmu
    queue : CommandQueue
    writer : EntryWriter
        Updates STEs and CDs; set its `observer` to look between two stores, or use `watch`.
    asids, vmids : IdSpace
        `asids` is the system's, `vmids` this SMMU's.
    devices : dict
        StreamID to Device.
    ssid_bits : int
        Width of the PASIDs that devices behind it may have; 0: none, or the policy switched them
        off.

    Raises
    ------
    NotSupported
        The SMMU is one that this driver cannot serve.
    """

    def __init__(self, system: System, smmu: Smmu, number: int) -> None:
        """Set an SMMU up as its driver does: stream table, queues, then CR0."""
        self.system = system
        self.smmu = smmu
        self.queue: CommandQueue
        self.number = number
        self.memory = smmu.memory
        features = smmu.features
        self._refuse_unserved()
        self.sid_bits = features.sidsize
        self.ssid_bits = self._ssid_bits
        self.coherent = bool(features.cohacc)
        self.can_stall = features.stall_model in (0, 2)
        self.stall_force = features.stall_model == 2
        self.e2h = system.e2h and bool(features.hyp)
        self.asids: IdSpace = system.asids
        self.vmids: IdSpace = IdSpace(16 if features.vmid16 else 8, "vmid")
        self.devices: dict[int, Device] = {}
        self.viommus: list[Viommu] = []
        self._leaves: dict[int, int] = {}
        self._spare: dict[int, int] = {}  # leaves that `reserve_ste` has, and nothing points to
        self.page_requests: dict[tuple[int, int | None, int], list[Record]] = {}
        self.overflows: dict[str, int] = {}  # of the event and page request queues
        self.interrupts: set[str] = set()
        self.servicing = threading.RLock()
        self._taken: dict[str, deque[Record]] = {"EVENTQ": deque(), "PRIQ": deque()}

    def _refuse_unserved(self) -> None:
        """Refuse what this driver cannot serve, as arm_smmu_device_hw_probe does."""
        smmu, features, pages = self.smmu, self.smmu.features, self.system.pages
        end = pages.base + pages.size
        why = (
            (not features.ttf & 2, "it has no VMSAv8-64 tables (TTF)"),
            (
                features.ttendian not in (0, 2),
                f"IDR0.TTENDIAN is {features.ttendian}: it reads no little-endian tables, and the "
                "driver writes no others",
            ),
            (
                features.tables_preset,
                "IDR1.TABLES_PRESET is 1: its stream table lies where the hardware wants it, and "
                "the driver makes one of its own",
            ),
            (
                features.queues_preset,
                "IDR1.QUEUES_PRESET is 1: its queues lie where the hardware wants them, and the "
                "driver makes its own",
            ),
            (
                features.rel,
                "IDR1.REL is 1: it has preset bases, relative to its registers, and the driver "
                "sets them",
            ),
            (
                end > 1 << features.oas_bits,
                f"its addresses have {features.oas_bits} bits (OAS), and the driver's tables reach "
                f"to {end - 1:#x}",
            ),
        )
        for refused, reason in why:
            if refused:
                raise NotSupported("smmu", smmu, text=f"smmu is not supported: {reason}")

    # --- PASIDs of devices behind it (F2, F3) ---

    @property
    def _ssid_bits(self) -> int:
        """Width of SubstreamIDs; without two-level CD tables, a linear one of 64 KiB is the limit.

        So arm_smmu_probe_device has it: CTXDESC_LINEAR_CDMAX.
        """
        features = self.smmu.features
        return features.ssidsize if features.cd2l else min(features.ssidsize, 10)

    def pasids_of(self, pasids: int) -> tuple[int, int]:
        """Return SubstreamID bits and max_pasids of a device that has so many PASIDs itself.

        The bits are those of arm_smmu_enable_pasid, rounded down.  Where Linux has
        dev_iommu_get_max_pasids, which need not be a power of two, max_pasids is at most
        ``2**bits`` here, which is what its CD table holds; the policy may make it less.
        """
        bits = min(max(pasids.bit_length() - 1, 0), self.ssid_bits)
        most = self.system.pasids.max_pasids(1 << bits if bits else 0)
        return (bits, most) if most else (0, 0)

    def why_no_pasids(self, pasids: int) -> str:
        """Say why `pasids_of` gives none: the policy and the widths, where it was the policy."""
        own = 1 << max(pasids.bit_length() - 1, 0)
        return self.system.pasids.why_none(own, 1 << self._ssid_bits)

    # --- what the SMMU has (F1) ---

    @cached_property
    def has_sva(self) -> bool:
        """Whether address spaces of processes can be bound (F36)."""
        features, cpu = self.smmu.features, self.system.cpu
        granule = {4096: features.gran4k, 16384: features.gran16k, 65536: features.gran64k}
        return bool(
            features.s1p
            and features.cohacc
            and granule[cpu.granule]
            and features.oas_bits >= cpu.pa_bits
            and (features.asid16 or cpu.asid_bits <= 8)
            and (cpu.va_bits <= 48 or (features.vax and cpu.granule == 65536))
            and (not cpu.bbml2 or features.bbml >= 2)
        )

    def geometry(self, stage: int, granule: int | None = None) -> dict[str, Any]:
        """Give the sizes of a page table of this SMMU, as arguments of `PageTable`.

        Raises
        ------
        NotSupported
            The SMMU does not have the stage, or the granule.
        """
        features = self.smmu.features
        if stage not in (1, 2):
            raise InvalidArgument("stage", stage, "1 or 2")
        if not (features.s1p if stage == 1 else features.s2p):
            raise NotSupported("stage", stage, text=f"the SMMU has no stage {stage}")
        has = {4096: features.gran4k, 16384: features.gran16k, 65536: features.gran64k}
        if granule is None:
            granule = next(size for size, there in has.items() if there)
        elif granule not in tuple(has):
            raise InvalidArgument("granule", granule, "4096, 16384 or 65536")
        if not has[granule]:
            raise NotSupported(
                "granule", granule, text=f"the SMMU has no {granule // 1024}K granule"
            )
        wide = granule == 65536
        oas = min(features.oas_bits, 52 if wide else 48)
        ias = oas if stage == 2 else 52 if wide and features.vax else 48
        return {"granule": granule, "ias": ias, "oas": oas, "fwb": stage == 2 and self.fwb}

    @property
    def fwb(self) -> bool:
        """Whether stage 2 forces write-back, as it does where the SMMU can."""
        return bool(self.smmu.features.fwb)

    # --- boot ---

    def boot(self) -> None:
        """Bring the SMMU up as an operating system does: all streams abort, nothing is cached.

        Raises
        ------
        OutOfMemory
            No pages are left for its stream table and queues; the SMMU is as it was.
        """
        smmu = self.smmu
        features = smmu.features
        with Undo() as undo:
            config = self._place(undo)
            undo.add(setattr, smmu, "on_interrupt", smmu.on_interrupt)
            smmu.on_interrupt = self.interrupts.add
            undo.add(smmu.write, "CR0", 0)
            self._update("CR0", 0)
            smmu.write("CR1", _CR1)
            smmu.write("CR2", layout.pack("CR2", E2H=self.e2h, RECINVSID=1, PTM=1))
            smmu.write("STRTAB_BASE", self.strtab | layout.mask("STRTAB_BASE", "RA"), 8)
            smmu.write("STRTAB_BASE_CFG", config)
            self._start(features)

    def _place(self, undo: Undo) -> int:
        """Find room for the stream table and the queues; returns STRTAB_BASE_CFG."""
        features = self.smmu.features
        two_level = features.st_level and self.sid_bits > SPLIT
        if two_level:
            self._l1_lg2 = min(self.sid_bits - SPLIT, MAX_L1_LG2)
            self.last_sid = (1 << (self._l1_lg2 + SPLIT)) - 1
            self._strtab_size = 8 << self._l1_lg2
            config = layout.pack(
                "STRTAB_BASE_CFG", FMT=1, SPLIT=SPLIT, LOG2SIZE=self._l1_lg2 + SPLIT
            )
        else:
            self._l1_lg2 = -1
            self.last_sid = (1 << self.sid_bits) - 1
            self._strtab_size = 64 << self.sid_bits
            config = layout.pack("STRTAB_BASE_CFG", LOG2SIZE=self.sid_bits)
        self.strtab = self._alloc(self._strtab_size, undo)
        if not two_level:
            self._fill(self.strtab, 1 << self.sid_bits)
        lg2 = min(features.cmdqs, 8)
        self.queue = CommandQueue(self.smmu, self._alloc(16 << lg2, undo), lg2)
        self.writer = EntryWriter(self.queue, self.memory, call=self.system.lock.call)
        self._rings: dict[str, tuple[int, int]] = {}
        self._place_ring("EVENTQ", min(features.eventqs, 10), 32, undo)
        if features.pri:
            self._place_ring("PRIQ", min(features.priqs, 9), 16, undo)
        return config

    def _alloc(self, size: int, undo: Undo) -> int:
        pages = self.system.pages
        base = pages.alloc(size)
        undo.add(pages.free, base, size)
        return base

    def _start(self, features: Features) -> None:
        """Enable one thing after the other, the SMMU last."""
        self.queue.start()
        enables = layout.pack("CR0", CMDQEN=1)
        self._update("CR0", enables)
        self.queue.issue("CFGI_ALL", StreamID=0)
        if features.hyp and features.s1p:
            self.queue.issue("TLBI_EL2_ALL")
        self.queue.issue("TLBI_NSNH_ALL")
        self.queue.sync()
        self._start_ring("EVENTQ")
        enables |= layout.pack("CR0", EVENTQEN=1)
        self._update("CR0", enables)
        if features.pri:
            self._start_ring("PRIQ")
            enables |= layout.pack("CR0", PRIQEN=1)
            self._update("CR0", enables)
        if features.ats:
            enables |= layout.pack("CR0", ATSCHK=1)
            self._update("CR0", enables)
        sources = ["GERROR_IRQEN", "EVENTQ_IRQEN", *["PRIQ_IRQEN"] * features.pri]
        self._update("IRQ_CTRL", layout.mask("IRQ_CTRL", *sources))
        self._update("CR0", enables | layout.pack("CR0", SMMUEN=1))

    def _update(self, register: str, value: int) -> None:
        self.smmu.write(register, value)
        seen = self.smmu.read(register + "ACK")
        if seen != value:
            raise InputOutput(register, seen, text=f"{register}ACK is {seen:#x}, not {value:#x}")

    def _place_ring(self, name: str, lg2: int, size: int, undo: Undo) -> None:
        self._rings[name] = self._alloc(size << lg2, undo), lg2

    def _start_ring(self, name: str) -> None:
        base, lg2 = self._rings[name]
        self.smmu.write(f"{name}_BASE", base | layout.mask(f"{name}_BASE", "WA") | lg2, 8)
        self.smmu.write(f"{name}_PROD", 0)
        self.smmu.write(f"{name}_CONS", 0)

    def _take(self, name: str) -> bytes | None:
        """Take one record out of the event or the page request queue; CONS moves past it."""
        if name not in self._rings or not record_waits(self.smmu, name):
            return None
        base, lg2 = self._rings[name]
        size = 32 if name == "EVENTQ" else 16
        mask = (2 << lg2) - 1
        prod = self.smmu.read(f"{name}_PROD")
        cons = self.smmu.read(f"{name}_CONS")
        if (prod ^ cons) & mask == 0:
            if (prod ^ cons) & _OVFLG:
                self.overflows[name] = self.overflows.get(name, 0) + 1
                self.smmu.write(f"{name}_CONS", prod & _OVFLG | cons & mask)
            return None
        record = self.memory.read(base + size * (cons & mask >> 1), size)
        self.smmu.write(f"{name}_CONS", cons & _OVFLG | (cons + 1 & mask))
        return record

    def next_record(self, name: str) -> Record | None:
        """Take the next record of the event or the page request queue, in order.

        Parameters
        ----------
        name : str
            "EVENTQ" or "PRIQ".

        Returns
        -------
        Record or None
            None when there is no more.
        """
        with self.system.lock.between_changes:
            taken = self._taken[name]
            if taken:
                return taken.popleft()
            word = self._take(name)
            return None if word is None else self._record(name, word)

    def _record(self, name: str, data: bytes) -> Record:
        fields = layout.unpack("EVENT" if name == "EVENTQ" else "PRI", data)
        device = self.devices.get(fields["StreamID"])
        ssid = fields["SubstreamID"] if fields["SSV"] else 0
        domain = None if device is None else device.domain_at(ssid)
        return Record(data, fields, device, domain)

    def drain(self, sids: tuple[int, ...], ssid: int | None) -> None:
        """Answer what waits under an SSID of some streams, or under any: nobody will resolve it.

        It is called when STEs and CDs lead elsewhere, before their domain is forgotten.  Records
        stay to be reported, with the device that they were of.

        Parameters
        ----------
        sids : tuple of int
        ssid : int or None
            0 for what has no PASID; None for everything.
        """
        for name, taken in self._taken.items():
            while (data := self._take(name)) is not None:
                taken.append(self._record(name, data))
            for record in taken:
                sid, pasid = record.sid, record.pasid
                if sid in sids and ssid in (None, pasid or 0) and not record.answered:
                    record.answered = True
                    self.system.lock.insist(answer, self, record, "invalid")
        for key in [key for key in self.page_requests if key[0] in sids]:
            if ssid in (None, key[1] or 0):
                del self.page_requests[key]  # of a group whose last request has not come

    # --- the stream table ---

    def _fill(self, base: int, count: int) -> None:
        """Let new STEs abort, or bypass if the system was told so (F6)."""
        words = (
            entry.ste_abort()
            if self.system.disable_bypass
            else entry.ste_bypass(features=self.smmu.features)
        )
        one = b"".join(word.to_bytes(8, "little") for word in words)
        self.memory.write(base, one * count)

    def reserve_ste(self, sid: int) -> bool:
        """Have the page for the leaf of a stream, which `ste_address` uses; whether it was missing.

        Raises
        ------
        OutOfMemory
            No page is left for it.
        """
        index = sid >> SPLIT
        if self._l1_lg2 < 0 or index in self._leaves or index in self._spare:
            return False
        self._spare[index] = self.system.pages.alloc(64 << SPLIT)
        return True

    def unreserve_ste(self, sid: int) -> None:
        """Give back the page that `reserve_ste` had, if it was not used."""
        leaf = self._spare.pop(sid >> SPLIT, None)
        if leaf is not None:
            self.system.pages.free(leaf, 64 << SPLIT)

    def ste_address(self, sid: int) -> int:
        """Where the STE of a stream is; its leaf is allocated when it is first asked for.

        Raises
        ------
        OutOfRange
            The stream table ends before (ERANGE).
        OutOfMemory
            No page is left for the leaf.
        """
        if not 0 <= sid <= self.last_sid:
            raise OutOfRange("sid", sid, f"0 to {self.last_sid:#x}")
        if self._l1_lg2 < 0:
            return self.strtab + 64 * sid
        index = sid >> SPLIT
        leaf = self._leaves.get(index)
        if leaf is None:
            self.reserve_ste(sid)
            leaf = self._spare[index]
            self._fill(leaf, 1 << SPLIT)
            self.store(self.strtab + 8 * index, leaf | SPLIT + 1)
            self._leaves[index] = self._spare.pop(index)
            # an invalid level-1 descriptor may be cached
            self.queue.issue("CFGI_STE", StreamID=sid, Leaf=0)
            self.queue.sync()
        return leaf + 64 * (sid & (1 << SPLIT) - 1)

    def forget(self, device: Device) -> None:
        """Let the streams of a device go, which abort: others may have them."""
        for sid in device.sids:
            self.devices.pop(sid, None)

    def store(self, address: int, word: int) -> None:
        """Store one 64-bit word of a table."""
        self.memory.write_u64(address, word)

    # --- invalidation ---

    def invalidate_cd(self, sids: Iterable[int], ssid: int, *, leaf: bool = True) -> None:
        """CFGI_CD for each stream, and one CMD_SYNC."""
        words = [
            layout.pack("CFGI_CD", StreamID=sid, SubstreamID=ssid, Leaf=int(leaf)) for sid in sids
        ]
        if words:
            self.queue.run(words)

    def invalidate_atc(self, sid: int, pasid: int = 0) -> None:
        """CMD_ATC_INV of all addresses: of one PASID, or with 0 of all and none; no CMD_SYNC."""
        if pasid:
            self.queue.issue("ATC_INV", StreamID=sid, SubstreamID=pasid, SSV=1, Size=52)
        else:
            self.queue.issue("ATC_INV", StreamID=sid, Size=52)

    def flush_tag(self, kind: int, number: int) -> None:
        """Drop all TLB entries under an ASID or a VMID, once nobody uses it."""
        self.queue.drop(kind, number)

    def flush_asid(self, asid: int) -> None:
        """Drop all TLB entries under an ASID."""
        self.queue.drop(S1_ASID, asid)

    # --- what the SMMU sees meanwhile ---

    @contextmanager
    def watch(
        self, *accesses: tuple[SupportsIndex, SupportsIndex, SupportsIndex | None]
    ) -> Iterator[list[tuple[Result, ...]]]:
        """Ask the SMMU, after each store into an STE or a CD, what becomes of some accesses.

        Parameters
        ----------
        *accesses : (int, int, int or None)
            StreamID, address and SubstreamID of each.

        Yields
        ------
        list of tuple of Result
            Grows by one tuple at each store of a dword: the results of the accesses at that moment.

        Raises
        ------
        Busy
            The writer has an observer.

        >>> from smmufast.iommu import IDENTITY, System
        >>> system = System()
        >>> nic = system.device(8, pasid_bits=4)
        >>> domain = nic.paging_domain()
        >>> domain.map(0x1000, 0x8000_0000, 0x1000)
        >>> nic.attach(IDENTITY)
        >>> with nic.iommu.watch((8, 0x1000, None)) as seen:
        ...     nic.replace(domain)
        >>> [hex(result.pa) for (result,) in seen][-3:]
        ['0x1000', '0x80000000', '0x80000000']
        """
        seen: list[tuple[Result, ...]] = []

        def look(address: int, index: int, old: tuple[int, ...]) -> None:
            seen.append(
                tuple(self.smmu.translate(sid, iova, ssid=ssid) for sid, iova, ssid in accesses)
            )

        if self.writer.observer is not None:
            raise Busy("observer", self.writer.observer, text="the writer has an observer")
        self.writer.observer = look
        try:
            yield seen
        finally:
            self.writer.observer = None

    def __repr__(self) -> str:
        """Its number and its devices."""
        return f"<Iommu {self.number}: {len(set(self.devices.values()))} devices>"
