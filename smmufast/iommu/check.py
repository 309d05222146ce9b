"""What is inconsistent in a system: memory and hardware against what the driver half believes.

Evidence is read from registers, from memory (stream tables, CD tables, page tables), from caches
and ATCs.  It is compared with the few facts that the functions below ask of the bookkeeping: who
is attached where, and who owns a number or a table.  How an entry is laid out is IHI 0070 5.2 to
5.4 and 6.3; what is compared, and what a finding is called, is this file's choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from smmufast import layout
from smmufast._driver.tables import PageTable
from smmufast.faults import ExternalAbort
from smmufast.iommu.domain import (
    BLOCKED,
    IDENTITY,
    Cached,
    Domain,
    NestedDomain,
    PagingDomain,
    SvaDomain,
)
from smmufast.iommu.smmu.invalidations import ATS, ATS_FULL
from smmufast.iommu.sva import AddressSpace, ProcessTable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from smmufast.iommu.attachment import Attachment
    from smmufast.iommu.device import Device
    from smmufast.iommu.smmu.cdtable import CdTable
    from smmufast.iommu.smmu.iommu import Iommu
    from smmufast.iommu.system import System

# --- what the bookkeeping is asked ---


def _devices(iommu: Iommu) -> list[Device]:
    return list(dict.fromkeys(iommu.devices.values()))


def _attached(device: Device) -> dict[int, Domain]:
    """What is attached to a device, by SSID; 0 is the main domain, and always there."""
    return {ssid: one.domain for ssid, one in device.master.attachments.items()}


def _records(domain: Domain) -> list[Attachment]:
    """What a domain knows of its attachments."""
    return list(domain.attachments) if isinstance(domain, Cached | NestedDomain) else []


def _blocked(device: Device) -> bool:
    """Whether the device is being reset: its STEs abort, whatever is attached."""
    return device.master.blocked


def _table(device: Device) -> CdTable | None:
    """The CD table that its STEs point to, or would."""
    return device.master.table


def _tables(iommu: Iommu, domains: list[PagingDomain]) -> list[CdTable]:
    """Every CD table that somebody owns."""
    held = [device.master.own_table for device in _devices(iommu)]
    held += [domain.cd_table for domain in domains if domain.iommu is iommu]
    return list(dict.fromkeys(table for table in held if table is not None))


def _home(table: CdTable, domains: list[PagingDomain]) -> PagingDomain | None:
    """AUX profile: the main domain whose CD table it is; it may be there while nobody uses it."""
    return next((domain for domain in domains if domain.cd_table is table), None)


def _extents(table: CdTable) -> dict[int, int]:
    """Addresses and sizes of a CD table, as the driver took them."""
    if not table.fmt:
        return {table.base: 64 << table.s1cdmax}
    leaves = dict.fromkeys(table.leaves.values(), 64 << 10)
    return {table.base: 8 << (table.s1cdmax - 10)} | leaves


def _told(domain: Cached) -> set[tuple[object, int, int, int]]:
    """Whom an unmap tells: (queue, kind, number, PASID)."""
    return {entry[:4] for entry in domain.invalidations.entries if entry.users}


def _root(domain: PagingDomain | SvaDomain) -> PageTable | AddressSpace:
    """What has the page table of a domain, and its geometry."""
    return domain.space if isinstance(domain, SvaDomain) else domain


def _spaces(system: System) -> list[AddressSpace]:
    """Processes that are known: those with a PASID, and what the system remembers."""
    owners = [system.pasids.find(pasid) for pasid in system.pasids]
    known = [owner for owner in owners if isinstance(owner, AddressSpace)]
    known += [
        domain.space
        for iommu in system.iommus
        for device in _devices(iommu)
        for domain in _attached(device).values()
        if isinstance(domain, SvaDomain)
    ]
    return list(dict.fromkeys((*known, *getattr(system, "spaces", ()))))


def _blocks(system: System) -> dict[int, int]:
    """What the allocator has handed out: addresses and sizes."""
    return {address: 1 << lg2 for address, lg2 in system.pages._handed_out()}


# --- findings ---

#: What a finding may be called.
KINDS: Final = (
    "register", "stale", "stream", "ste", "ats", "cd", "table", "pages", "pasid", "asid", "vmid",
    "told", "attachment", "waiting",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """Something inconsistent.

    Attributes
    ----------
    kind : str
        One of KINDS.
    text : str
        A sentence.
    iommu, sid, pasid, address : int or None
        Where, as far as it is somewhere; `iommu` is the number of the SMMU.
    """

    kind: str
    text: str
    iommu: int | None = None
    sid: int | None = None
    pasid: int | None = None
    address: int | None = None


def check(system: System) -> list[Finding]:
    """Give everything that is inconsistent; nothing when all is well.

    Not while a call changes the system, nor while a `Gather` holds back what was unmapped.

    Raises
    ------
    Busy
        Called by an observer in the middle of a change.
    """
    with system.lock:
        return _Check(system).run()


# --- evidence ---


def _entry(words: np.ndarray, record: str) -> dict[str, int]:
    return layout.unpack(record, int.from_bytes(words.tobytes(), "little"))


def _power(size: int) -> int:
    """What the allocator hands out for a size."""
    return 1 << max(size - 1, 63).bit_length()


_STE_S1: Final = ("S1Fmt", "S1ContextPtr", "S1CDMax", "S1DSS", "S1CIR", "S1COR", "S1CSH")
_V: Final = np.uint64(layout.mask("CD", "V"))
_NEXT: Final = (layout.mask("PTE_S1_TABLE", "Addr_4K"), 12)


class _Check:
    """One look at a system."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.found: list[Finding] = []
        self.extents: dict[int, tuple[int, str]] = {}  # of the table memory: size and owner
        self.walked: set[PageTable] = set()
        # of all SMMUs, by what memory says: TTB and where it was found
        self.asids: dict[int, tuple[int, str]] = {}
        owners = [system.asids.find(n) for n in system.asids]
        owners += [one.vmids.find(n) for one in system.iommus for n in one.vmids]
        self.domains = list(dict.fromkeys(d for d in owners if isinstance(d, PagingDomain)))

    def run(self) -> list[Finding]:
        """Look everywhere."""
        for iommu in self.system.iommus:
            _Smmu(self, iommu).run()
        self.stale()
        self.numbers()
        self.attached()
        self.pages()
        return self.found

    def add(self, kind: str, text: str, **where: int | None) -> None:
        """Keep a finding; the same one once."""
        finding = Finding(kind, text, **where)
        if finding not in self.found:
            self.found.append(finding)

    def words(self, address: int, count: int) -> np.ndarray:
        """Read dwords; zeros, and a finding, where memory refuses."""
        try:
            return np.frombuffer(self.system.memory.read(address, 8 * count), "<u8")
        except ExternalAbort:
            self.add("table", f"memory refuses {address:#x}, where a table should be",
                     address=address)  # fmt: skip
            return np.zeros(count, "<u8")

    def take(self, address: int, size: int, owner: str) -> bool:
        """Account for a block of the table memory; False if that was done before."""
        before = self.extents.get(address)
        if before is None:
            self.extents[address] = (_power(size), owner)
        elif before[1] != owner:
            self.add("table", f"{address:#x} is of {before[1]} and of {owner}", address=address)
        return before is None

    def inside(self, address: int) -> bool:
        """Whether an address is in the table memory."""
        pages = self.system.pages
        return bool(pages.base <= address < pages.base + pages.size)

    def stale(self) -> None:
        """Caches and ATCs."""
        for number, iommu in enumerate(self.system.iommus):
            for entry in iommu.smmu.stale():
                sid, ssid = (getattr(entry.entry, name, None) for name in ("sid", "ssid"))
                self.add(
                    "stale", f"{entry.cache} holds {entry.entry}: {entry.why}", iommu=number,
                    sid=sid, pasid=ssid, address=getattr(entry.entry, "start", None),
                )  # fmt: skip

    # --- numbers ---

    def numbers(self) -> None:
        """PASIDs, ASIDs and VMIDs that are taken by something that does not have them."""
        system = self.system
        for asid in system.asids:
            owner = system.asids.find(asid)
            if isinstance(owner, AddressSpace):
                has = any(domain.asid == asid for domain in owner.domains.values())
            else:
                has = not isinstance(owner, PagingDomain | SvaDomain) or owner.asid == asid
            if not has or getattr(owner, "freed", False):
                self.add("asid", f"ASID {asid} is taken by {owner!r}, which does not have it")
        for iommu in system.iommus:
            for vmid in iommu.vmids:
                owner = iommu.vmids.find(vmid)
                if getattr(owner, "vmid", vmid) != vmid or getattr(owner, "freed", False):
                    self.add("vmid", f"VMID {vmid} is taken by {owner!r}, which does not have it",
                             iommu=iommu.number)  # fmt: skip
        for pasid in system.pasids:
            owner = system.pasids.find(pasid)
            if isinstance(owner, AddressSpace):
                has = owner.pasid == pasid and bool(owner.bonds or not owner.exited)
            elif isinstance(owner, PagingDomain):
                has = owner.aux_pasid == pasid and not owner.freed
            else:
                has = True  # somebody's whom we do not know
            if not has:
                self.add("pasid", f"PASID {pasid} is taken by {owner!r}, which does not have it",
                         pasid=pasid)  # fmt: skip
        for iommu in system.iommus:
            for device in _devices(iommu):
                for share in device.shares:
                    self.owned(share.pasid, share, iommu, device)
        for space in _spaces(system):
            self.owned(space.pasid, space)
        for domain in self.domains:
            self.owned(domain.aux_pasid, domain)

    def owned(
        self, pasid: int | None, owner: object, iommu: Iommu | None = None,
        device: Device | None = None,
    ) -> None:  # fmt: skip
        """A PASID that something has is taken, and by nothing else."""
        if not pasid:
            return
        where = {
            "pasid": pasid, "iommu": None if iommu is None else iommu.number,
            "sid": None if device is None else device.sid,
        }  # fmt: skip
        if pasid not in self.system.pasids:
            self.add("pasid", f"{owner!r} has PASID {pasid}, which is free", **where)
            return
        other = self.system.pasids.find(pasid)
        # a share has the PASID of its auxiliary domain, or one without data
        if other is not owner and not (other is None or other is getattr(owner, "domain", None)):
            self.add("pasid", f"{owner!r} has PASID {pasid}, which is that of {other!r}", **where)

    # --- who is attached ---

    def attached(self) -> None:
        """Domains that something is attached to: alive, aware of it, with a tag of their own."""
        counts: dict[Domain, list[Attachment]] = {domain: [] for domain in self.domains}
        for space in _spaces(self.system):
            counts |= {domain: [] for domain in space.domains.values()}
        for iommu in self.system.iommus:
            for device in _devices(iommu):
                for ssid, one in device.master.attachments.items():
                    where = {"iommu": iommu.number, "sid": device.sid, "pasid": ssid or None}
                    if one.ssid != ssid or one.master is not device.master:
                        self.add("attachment", f"{one!r} is under SSID {ssid} of {device!r}",
                                 **where)  # fmt: skip
                    counts.setdefault(one.domain, []).append(one)
                    below = one.domain
                    if isinstance(below, NestedDomain):
                        below = below.parent
                        counts.setdefault(below, []).append(one)
                    if isinstance(below, PagingDomain | SvaDomain):
                        self.alive(below, iommu, device, ssid)
        for domain, records in counts.items():
            if isinstance(domain, Cached | NestedDomain) and set(records) != set(_records(domain)):
                self.add("attachment", f"{domain!r} has {len(_records(domain))} attachments, its "
                         f"devices have {len(records)}")  # fmt: skip

    def alive(
        self, domain: PagingDomain | SvaDomain, iommu: Iommu, device: Device, pasid: int
    ) -> None:
        """Check one attachment's domain."""
        where = {"iommu": iommu.number, "sid": device.sid, "pasid": pasid or None}
        if domain.freed:
            self.add("table", f"{domain!r} is attached to {device!r}, and was freed", **where)
            return
        kind, ids, tag = "asid", iommu.asids, domain.asid
        if isinstance(domain, PagingDomain) and domain.stage == 2:
            kind, ids, tag = "vmid", iommu.vmids, domain.vmid
        if tag not in ids:
            self.add(kind, f"{domain!r} has {kind.upper()} {tag}, which is free", **where)
            return
        owner = ids.find(tag)
        if owner is not domain and owner is not getattr(domain, "space", domain):
            self.add(kind, f"{domain!r} has {kind.upper()} {tag}, which is that of {owner!r}",
                     **where)  # fmt: skip

    # --- the table memory ---

    def pages(self) -> None:
        """All that is handed out is reachable, and all that is reachable is handed out."""
        for domain in self.domains:
            self.walk(domain)
        for space in _spaces(self.system):
            if space.table is not None:
                self.walk(space.table)
        blocks = _blocks(self.system)
        for address in blocks.keys() - self.extents.keys():
            self.add("pages", f"nothing leads to {blocks[address]:#x} bytes at {address:#x}, which "
                     "are handed out", address=address)  # fmt: skip
        for address, (size, owner) in self.extents.items():
            if blocks.get(address) != size:
                self.add("pages", f"{owner} has {size:#x} bytes at {address:#x}, which are not "
                         "handed out", address=address)  # fmt: skip

    def walk(self, table: PageTable) -> None:
        """Account for the tables that a page table has in memory."""
        if table in self.walked or not getattr(table, "ready", False):
            return
        self.walked.add(table)
        lg2 = table.granule.bit_length() - 1
        owner = f"page table {table.root:#x}"
        shift = lg2 + (3 - table.start_level) * (lg2 - 3)
        self.walk_level(table.root, table.start_level, 1 << table.ias - shift, lg2, owner)

    def walk_level(self, address: int, level: int, count: int, lg2: int, owner: str) -> None:
        """Account for one table and those below it."""
        if not self.inside(address):
            self.add("table", f"{owner} leads to {address:#x}, outside the table memory",
                     address=address)  # fmt: skip
            return
        if not self.take(address, 8 * count, owner) or level == 3:
            return
        words = self.words(address, count)
        for word in words[words & np.uint64(3) == np.uint64(3)].tolist():
            below = word & _NEXT[0] & -(1 << lg2)
            self.walk_level(below, level + 1, 1 << lg2 - 3, lg2, owner)


class _Smmu:
    """What one SMMU finds in memory, against what its driver believes."""

    def __init__(self, check: _Check, iommu: Iommu) -> None:
        self.check = check
        self.iommu = iommu
        self.stes: dict[int, dict[str, int]] = {}  # of the devices' streams
        self.tables = _tables(iommu, check.domains)

    def add(self, kind: str, text: str, **where: int | None) -> None:
        """Keep a finding of this SMMU."""
        self.check.add(kind, text, iommu=self.iommu.number, **where)

    def run(self) -> None:
        """Look at one SMMU."""
        self.registers()
        self.streams()
        for table in self.tables:
            for address, size in _extents(table).items():
                self.check.take(address, size, f"CD table {table.base:#x}")
            self.contexts(table)
        for device in _devices(self.iommu):
            for sid in device.sids:
                self.ste(device, sid)
        self.told()
        self.waiting()

    # --- registers and queues ---

    def registers(self) -> None:
        """Where the SMMU has its structures, and that its command queue is idle."""
        smmu, iommu = self.iommu.smmu, self.iommu
        take = self.check.take
        wanted = {"CMDQ": (16, iommu.queue.base)}
        wanted |= {name: (32 if name == "EVENTQ" else 16, base)
                   for name, (base, _) in iommu._rings.items()}  # fmt: skip
        for name, (size, base) in wanted.items():
            register = layout.unpack(f"{name}_BASE", smmu.read(f"{name}_BASE", 8))
            if register["ADDR"] != base:
                self.add("register", f"{name}_BASE has {register['ADDR']:#x}, the driver {base:#x}",
                         address=base)  # fmt: skip
            take(base, size << register["LOG2SIZE"], f"{name} of SMMU {iommu.number}")
        prod, cons = smmu.read("CMDQ_PROD"), smmu.read("CMDQ_CONS")
        mask = (2 << iommu.queue.size_lg2) - 1
        if prod & mask != cons & mask or prod & mask != iommu.queue.prod:
            self.add("register", f"CMDQ_PROD is {prod:#x}, CMDQ_CONS {cons:#x}, the driver's "
                     f"{iommu.queue.prod:#x}: commands wait")  # fmt: skip
        if smmu.read("GERROR") != smmu.read("GERRORN"):
            self.add("register", f"GERROR {smmu.read('GERROR'):#x} is not acknowledged")
        if not smmu.read("CR0") & layout.mask("CR0", "SMMUEN"):
            self.add("register", "CR0.SMMUEN is 0")

    def waiting(self) -> None:
        """Stalls and page requests of streams that nobody has."""
        devices = self.iommu.devices
        for stall in self.iommu.smmu.stalls:
            if stall.sid not in devices:
                self.add("waiting", "a transaction stalls, and its stream has no device",
                         sid=stall.sid, pasid=stall.ssid, address=stall.iova)  # fmt: skip
        for sid, pasid, group in self.iommu.page_requests:
            if sid not in devices:
                self.add("waiting", f"page request group {group} waits, and its stream has no "
                         "device", sid=sid, pasid=pasid)  # fmt: skip
        for sid, atc in self.iommu.smmu.devices.items():
            device = devices.get(sid)
            if device is not None and atc not in device.atcs:
                self.add("waiting", "CMD_ATC_INV reaches another ATC than the device's", sid=sid)

    # --- the stream table ---

    def streams(self) -> None:
        """The stream table: who has an STE, and that all others abort."""
        smmu, iommu, words = self.iommu.smmu, self.iommu, self.check.words
        base = layout.unpack("STRTAB_BASE", smmu.read("STRTAB_BASE", 8))["ADDR"]
        config = layout.unpack("STRTAB_BASE_CFG", smmu.read("STRTAB_BASE_CFG"))
        owner = f"stream table of SMMU {iommu.number}"
        if base != iommu.strtab:
            self.add("register", f"STRTAB_BASE has {base:#x}, the driver {iommu.strtab:#x}",
                     address=base)  # fmt: skip
        split, lg2 = config["SPLIT"], config["LOG2SIZE"]
        if not config["FMT"]:
            self.check.take(base, 64 << lg2, owner)
            self.leaf(0, base, 1 << lg2)
            return
        level1 = words(base, 1 << lg2 - split)
        self.check.take(base, 8 << lg2 - split, owner)
        leaves = {}
        for index in np.flatnonzero(level1).tolist():
            descriptor = layout.unpack("L1STD", int(level1[index]))
            leaves[index] = descriptor["L2Ptr"]
            if descriptor["Span"] != split + 1:
                self.add("stream", f"the level-1 descriptor has Span {descriptor['Span']}",
                         sid=index << split, address=base + 8 * index)  # fmt: skip
        for index, leaf in leaves.items():
            if leaf != iommu._leaves.get(index):
                self.add("table", f"level 1 of the stream table points to {leaf:#x}, which "
                         "nobody owns", sid=index << split, address=leaf)  # fmt: skip
                continue
            self.check.take(leaf, 64 << split, owner)
            self.leaf(index << split, leaf, 1 << split)
        for index in iommu._leaves.keys() - leaves.keys():
            self.add("table", f"level 1 does not point to the leaf {iommu._leaves[index]:#x}",
                     sid=index << split, address=iommu._leaves[index])  # fmt: skip

    def leaf(self, first: int, base: int, count: int) -> None:
        """STEs that lie side by side."""
        entries = self.check.words(base, 8 * count).reshape(count, 8)
        config = layout.mask("STE", "Config") | 1
        aborts = entries[:, 0] & np.uint64(config)
        # Config 0b0xx aborts; no valid STE: C_BAD_STE, and no access either
        open_ = np.flatnonzero((aborts & np.uint64(1)).astype(bool) & (aborts >= np.uint64(8)))
        for index in open_.tolist():
            sid = first + index
            if sid in self.iommu.devices:
                continue
            ste = _entry(entries[index], "STE")
            if ste["Config"] == 4 and not self.check.system.disable_bypass:
                continue
            self.add("stream", f"the stream has no device, and its STE has Config {ste['Config']}",
                     sid=sid, address=base + 64 * index)  # fmt: skip
        for sid in self.iommu.devices:
            if first <= sid < first + count:
                self.stes[sid] = _entry(entries[sid - first], "STE")

    def ste(self, device: Device, sid: int) -> None:
        """Compare one STE with what the device is attached to."""
        ste = self.stes.get(sid)
        if ste is None:
            self.add("ste", f"{device!r} has no STE", sid=sid)
            return
        if not ste["V"]:
            self.add("ste", f"the STE of {device!r} is not valid", sid=sid)
            return
        config = ste["Config"] if ste["Config"] & 4 else 0
        wanted = self.wanted_ste(device)
        for name, value in wanted.items():
            found = config if name == "Config" else ste[name]
            if found != value:
                self.add("ste", f"{name} of the STE of {device!r} is {found:#x}, not {value:#x}",
                         sid=sid)  # fmt: skip
        if config == 5 and not any(ste["S1ContextPtr"] == table.base for table in self.tables):
            self.add("table", f"the STE points to a CD table at {ste['S1ContextPtr']:#x}, which "
                     "nobody owns", sid=sid, address=ste["S1ContextPtr"])  # fmt: skip
        if config in (6, 7) and not any(
            ste["S2TTB"] == domain.root for domain in self.check.domains if domain.stage == 2
        ):
            self.add("table", f"the STE points to a page table at {ste['S2TTB']:#x}, which "
                     "nobody owns", sid=sid, address=ste["S2TTB"])  # fmt: skip
        answers = bool(config & 3 and ste["EATS"])
        if device.ats_enabled != answers:
            words = "on" if device.ats_enabled else "off"
            self.add("ats", f"ATS is {words} in {device!r}, and its STE has Config {config}, "
                     f"EATS {ste['EATS']}", sid=sid)  # fmt: skip
        if not device.ats_enabled and any(len(atc) for atc in device.atcs):
            self.add("ats", f"ATS is off in {device!r}, and an ATC holds translations", sid=sid)

    def wanted_ste(self, device: Device) -> dict[str, int]:
        """The fields of the STE that say where it leads."""
        attached = _attached(device)
        main = attached[0]
        if _blocked(device):
            return {"Config": 0}
        if isinstance(main, NestedDomain):
            guest = layout.unpack("STE", main.ste[0] | main.ste[1] << 64)
            config = guest["Config"] if guest["V"] else 0
            if config & 4 == 0:
                return {"Config": 0}
            wanted = {"Config": config | 2, **self.stage2(main.parent), "S2VMID": main.vmid}
            if config & 1:
                wanted |= {name: guest[name] for name in _STE_S1}
            return wanted
        if isinstance(main, PagingDomain) and main.stage == 2:
            return {"Config": 6, **self.stage2(main), "S2VMID": main.vmid}
        table = _table(device)
        if main in (IDENTITY, BLOCKED) and (table is None or len(attached) == 1):
            return {"Config": 4 if main is IDENTITY else 0}
        s1dss = 1 if main is IDENTITY else 0 if main is BLOCKED else 2
        if table is None:
            return {"Config": 5, "S1DSS": s1dss}
        return {
            "Config": 5, "S1DSS": s1dss, "S1ContextPtr": table.base, "S1CDMax": table.s1cdmax,
            **({"S1Fmt": table.fmt} if table.s1cdmax else {}),
        }  # fmt: skip

    def stage2(self, domain: PagingDomain) -> dict[str, int]:
        return {
            "S2TTB": domain.root, "S2T0SZ": domain.t0sz, "S2SL0": domain.sl0, "S2TG": domain.tg,
            "S2PS": domain.ps, "S2AA64": 1,
        }  # fmt: skip

    # --- CD tables ---

    def expected(self, table: CdTable) -> dict[int, tuple[Domain, int]]:
        """What each SSID of a table should lead to, and a stream that uses it."""
        wanted: dict[int, tuple[Domain, int]] = {}
        for device in _devices(self.iommu):
            if _table(device) is not table:
                continue
            for ssid, domain in _attached(device).items():
                if domain.stage != 1:
                    continue
                other = wanted.setdefault(ssid, (domain, device.sid))[0]
                if other is not domain:
                    self.add("cd", f"a CD should be of {other!r} and of {domain!r}",
                             sid=device.sid, pasid=ssid or None)  # fmt: skip
        return wanted

    def contexts(self, table: CdTable) -> None:
        """A CD table: each valid CD is what an attachment says."""
        wanted = self.expected(table)
        home = _home(table, self.check.domains)
        for ssid, (domain, sid) in wanted.items():
            if table.cds.get(ssid) is not domain:
                self.add("attachment", f"{domain!r} is attached, and the CD table has "
                         f"{table.cds.get(ssid)!r}", sid=sid, pasid=ssid or None)  # fmt: skip
        for ssid, address, words in self.valid_cds(table):
            owner: Domain | None = None if ssid else home
            reader: int | None = None
            if ssid in wanted:
                owner, reader = wanted.pop(ssid)
            if owner is None:
                self.add("cd", "a CD is valid, and nothing is attached there",
                         pasid=ssid or None, sid=self.reader(table), address=address)  # fmt: skip
            else:
                assert isinstance(owner, PagingDomain | SvaDomain)
                self.context(_entry(words, "CD"), owner, reader, ssid, address)
        for ssid, (domain, sid) in wanted.items():
            self.add("cd", f"{domain!r} is attached, and its CD is not valid", sid=sid,
                     pasid=ssid or None)  # fmt: skip

    def reader(self, table: CdTable) -> int | None:
        """A stream whose STE points to a table."""
        for sid, ste in self.stes.items():
            if ste["V"] and ste["Config"] == 5 and ste["S1ContextPtr"] == table.base:
                return sid
        return None

    def valid_cds(self, table: CdTable) -> Iterator[tuple[int, int, np.ndarray]]:
        """SSID, address and dwords of each valid CD in memory."""
        words = self.check.words
        leaves = {0: table.base}
        count = 1 << table.s1cdmax
        if table.fmt:
            count = 1024
            level1 = words(table.base, 1 << table.s1cdmax - 10)
            leaves = {}
            for index in np.flatnonzero(level1 & np.uint64(1)).tolist():
                leaf = layout.unpack("L1CD", int(level1[index]))["L2Ptr"]
                if leaf == table.leaves.get(index):
                    leaves[index] = leaf
                else:
                    self.add("table", f"level 1 of CD table {table.base:#x} points to {leaf:#x}, "
                             "which nobody owns", sid=self.reader(table), pasid=index << 10,
                             address=leaf)  # fmt: skip
            for index in table.leaves.keys() - leaves.keys():
                self.add("table", f"level 1 of CD table {table.base:#x} does not point to the "
                         f"leaf {table.leaves[index]:#x}", pasid=index << 10,
                         address=table.leaves[index])  # fmt: skip
        for index, leaf in leaves.items():
            entries = words(leaf, 8 * count).reshape(count, 8)
            for n in np.flatnonzero(entries[:, 0] & _V).tolist():
                yield (index << 10) + n, leaf + 64 * n, entries[n]

    def context(
        self, cd: dict[str, int], domain: PagingDomain | SvaDomain, sid: int | None, ssid: int,
        address: int,
    ) -> None:  # fmt: skip
        """Compare one CD with its domain."""
        where = {"sid": sid, "pasid": ssid or None, "address": address}
        root = _root(domain)
        wanted = {"ASID": domain.asid, "AA64": 1, "EPD1": 1}
        if isinstance(domain, SvaDomain) and domain.space.exited:
            wanted |= {"EPD0": 1}
        else:
            wanted |= {
                "EPD0": 0, "TTB0": root.root, "T0SZ": root.t0sz, "TG0": root.tg, "IPS": root.ps,
                "MAIR0": root.mair & 0xFFFF_FFFF, "MAIR1": root.mair >> 32,
            }  # fmt: skip
            table = root if isinstance(root, PageTable) else root.table
            if isinstance(table, ProcessTable | PagingDomain) and not _is_ready(table):
                self.add("table", f"a CD points to a page table at {cd['TTB0']:#x}, which was "
                         "given back", **where)  # fmt: skip
        for name, value in wanted.items():
            if cd[name] != value:
                self.add("cd", f"{name} of the CD of {domain!r} is {cd[name]:#x}, not {value:#x}",
                         **where)  # fmt: skip
        if not cd["EPD0"]:
            text = f"CD {ssid} at {address:#x}"
            ttb, other = self.check.asids.setdefault(cd["ASID"], (cd["TTB0"], text))
            if ttb != cd["TTB0"]:
                self.add("asid", f"ASID {cd['ASID']} is that of {other} and of {text}, which have "
                         "other page tables", **where)  # fmt: skip

    # --- who is told when something is unmapped ---

    def told(self) -> None:
        """Each domain tells all that may have cached it, by what memory says."""
        queue = self.iommu.queue
        needed: dict[Cached, set[tuple[object, int, int, int]]] = {}
        for device in _devices(self.iommu):
            if _blocked(device):
                continue
            main, table = _attached(device)[0], _table(device)
            below = main.parent if isinstance(main, NestedDomain) else main
            kind = ATS if below is main else ATS_FULL
            reached = {ssid: domain for ssid, (domain, _) in self.expected(table).items()} if (
                table is not None and main.stage < 2) else {}  # fmt: skip
            pairs = [(0, below, kind)]
            pairs += [(ssid, domain, ATS) for ssid, domain in reached.items() if ssid]
            for ssid, domain, one in pairs:
                if not isinstance(domain, Cached):
                    continue
                needs = needed.setdefault(domain, set())
                tags = main.tags if domain is below and main is not below else domain.tags
                needs |= {(queue, tag, number, 0) for tag, number in tags}
                for sid in device.sids:
                    ste = self.stes.get(sid)
                    if ste is not None and ste["Config"] & 4 and ste["EATS"]:
                        needs.add((queue, one, sid, ssid))
        for domain, needs in needed.items():
            for _, kind, number, ssid in sorted(needs - _told(domain), key=lambda one: one[1:]):
                what = "the ATC of sid" if kind >= ATS else "tag"
                self.add("told", f"{domain!r} does not invalidate {what} {number:#x}",
                         sid=number if kind >= ATS else None, pasid=ssid or None)  # fmt: skip


def _is_ready(table: PageTable) -> bool:
    """Whether a page table has a first table."""
    return bool(PageTable.ready.__get__(table))  # type: ignore[attr-defined]
