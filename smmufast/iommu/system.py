"""A system: memory, its SMMUs, the driver of each, and what they share.

ASIDs, PASIDs and the pages for tables are the system's; the rest is each driver's
(`smmufast.iommu.smmu`).
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, SupportsIndex
from weakref import WeakSet

from smmufast._device.smmu import Smmu
from smmufast._driver.tables import Pages
from smmufast._engine.memory import Memory
from smmufast.errors import (
    Busy,
    Exists,
    InvalidArgument,
    NoDevice,
    NoEntry,
    OutOfRange,
    WrongType,
    instance,
    integer,
)
from smmufast.features import Features
from smmufast.iommu import check, fault, save
from smmufast.iommu.device import Device
from smmufast.iommu.domain import BLOCKED, IDENTITY, Domain, PagingDomain, paging_domain
from smmufast.iommu.draw import draw
from smmufast.iommu.group import Group
from smmufast.iommu.ids import IdSpace
from smmufast.iommu.lock import SystemLock
from smmufast.iommu.pasid import PER_DEVICE, PasidPolicy, PasidSpace
from smmufast.iommu.profile import NOW, Profile
from smmufast.iommu.smmu.iommu import Iommu
from smmufast.iommu.undo import Undo

if TYPE_CHECKING:
    from collections.abc import Callable

    from smmufast._engine.tlb import Caches, StaleEntry
    from smmufast.iommu.check import Finding
    from smmufast.iommu.sva import AddressSpace

MOST_SMMUS: Final = 4096
MOST_ROOM: Final = 1 << 36  # for tables and queues in memory of the system's own
LEAST_ROOM: Final = 1 << 30  # where the host grants no more


@dataclass(frozen=True, slots=True)
class Cpu:
    """What the processors need of an SMMU that walks their page tables (F36).

    Attributes
    ----------
    granule : int
        Page size in bytes.
    va_bits, pa_bits, asid_bits : int
    bbml2 : bool
        They change page sizes without breaking entries first.
    """

    granule: int = 4096
    va_bits: int = 48
    pa_bits: int = 48
    asid_bits: int = 16
    bbml2: bool = False


def _room(memory: Memory, base: int) -> Pages:
    """Add memory for tables and queues, as much as the host grants in one piece."""
    size = min(MOST_ROOM, base >> 1)
    while True:
        memory.add_private(base, size)
        try:
            pages = Pages(memory, base, size)
        except MemoryError:
            if size <= LEAST_ROOM:
                raise
        else:
            if pages.in_place or size <= LEAST_ROOM:
                return pages
            del pages
        memory.remove(base)
        size >>= 1


class System:
    """Memory, SMMUs and their drivers.

    Parameters
    ----------
    smmus : int
        How many SMMUs to make.
    features : Features or sequence of Features, optional
        Of all of them, or of each; all that is modelled.
    memory : Memory, optional
        Private memory of its own: a lower half that is yours, and above it the tables.  With one
        of yours, `pages` must say where tables go.
    pages : (int, int), optional
        Base and size of the memory that the driver takes for its tables and queues; in memory of
        the system's own they have 64 GiB, which cost what is touched, or what less the host grants.
    caches : callable, optional
        Makes the caches of each SMMU, such as ``Caches.server``; none are modelled.
    smmu : Smmu or sequence of Smmu, optional
        SMMUs of yours, which share a memory, instead.
    profile : Profile
        AUX or NOW.
    pasid_policy : PasidPolicy
        PER_DEVICE, SYSTEM_WIDE, SYSTEM_WIDE_STRICT, EVERY_SMMU, or one of yours.
    default_domain : str
        "blocked", "identity" or "paging": what a group has before and after other domains.
    disable_bypass : bool
        Streams without a device abort; False: they bypass, as old kernels let them.
    e2h : bool
        The operating system runs at EL2, and stage 1 is of the EL2-E2H StreamWorld.
    cpu : Cpu, optional
        What SVA must be able to walk.
    iopf : bool
        The kernel was built with I/O page faults.

    Attributes
    ----------
    reports : deque of Report
        The last 1024 events, as `service` found them.
    on_fault : callable or None
        Called with each `Report`.

    Raises
    ------
    InvalidArgument, NotSupported, OutOfMemory
        Arguments that contradict each other; an SMMU that the driver cannot serve, with the reason;
        no room for tables.

    >>> from smmufast.iommu import System
    >>> system = System()
    >>> nic = system.device(8, pasid_bits=16)
    >>> domain = nic.paging_domain()
    >>> nic.attach(domain)
    >>> domain.map(0x10000, 0x8000_0000, 0x4000)
    >>> hex(nic.translate(0x12345).pa)
    '0x80002345'
    """

    def __init__(
        self,
        smmus: int = 1,
        *,
        features: Features | Iterable[Features] | None = None,
        memory: Memory | None = None,
        pages: tuple[int, int] | None = None,
        caches: Callable[[], Caches] | None = None,
        smmu: Smmu | Iterable[Smmu] | None = None,
        profile: Profile = NOW,
        pasid_policy: PasidPolicy = PER_DEVICE,
        default_domain: str = "blocked",
        disable_bypass: bool = True,
        e2h: bool = False,
        cpu: Cpu | None = None,
        iopf: bool = True,
    ) -> None:
        """Make a system of SMMUs, drivers and one space of PASIDs."""
        if not isinstance(profile, Profile):
            raise InvalidArgument("profile", profile, "a Profile (AUX or NOW)")
        instance("pasid_policy", pasid_policy, PasidPolicy)
        for name, value, kind in (("memory", memory, Memory), ("cpu", cpu, Cpu)):
            if value is not None:
                instance(name, value, kind)
        if caches is not None and not callable(caches):
            raise WrongType("caches", caches, "a callable or None")
        if default_domain not in ("blocked", "identity", "paging"):
            raise InvalidArgument("default_domain", default_domain, "blocked, identity or paging")
        self.lock = SystemLock()
        self.profile = profile
        self.default_domain = default_domain
        self.disable_bypass = disable_bypass
        self.e2h = e2h
        self.iopf = iopf
        mine = self._smmus(smmus, features, memory, pages, cpu, caches, smmu)
        self.cpu = cpu or Cpu(pa_bits=min(48, *(one.features.oas_bits for one in mine)))
        self.memory = mine[0].memory
        if pages is not None:
            self.pages = Pages(self.memory, *pages)
        elif memory is not None or smmu is not None:
            raise InvalidArgument(
                "pages", None,
                text="pages=(base, size) is required with memory=: where the driver may put "
                "its tables",
            )
        self.asids = IdSpace(16, "asid")
        self.pasids = PasidSpace(pasid_policy)
        self.iommus: list[Iommu] = []
        for one in mine:
            self._bring_up(one)
        self.spaces: WeakSet[AddressSpace] = WeakSet()
        self.reports: deque[fault.Report] = deque(maxlen=1024)
        self.on_fault: Callable[[fault.Report], object] | None = None

    def _bring_up(self, smmu: Smmu) -> Iommu:
        """Count an SMMU in for the ASIDs and PASIDs of the system, and boot it."""
        iommu = Iommu(self, smmu, len(self.iommus))
        with Undo() as undo:
            undo.add(self.asids.widen, self.asids.bits)
            self.asids.narrow(16 if smmu.features.asid16 else 8)
            limit = 1 << iommu.ssid_bits
            if not self.pasids.add_smmu(limit):
                iommu.ssid_bits = 0
            undo.add(self.pasids._drop_smmu, limit)
            iommu.boot()
        self.iommus.append(iommu)
        return iommu

    def add_iommu(
        self,
        features: Features | None = None,
        *,
        smmu: Smmu | None = None,
        caches: Callable[[], Caches] | None = None,
    ) -> Iommu:
        """Add an SMMU to the running system, behind which devices can be probed.

        Its PASIDs are a matter of the policy: one that is narrower than the system's limit, which
        the first device fixes, has none for its devices, with a warning, or is refused.  VT-d's
        init_dmars takes the minimum once, at boot, and intel_iommu_add does not look again.

        Parameters
        ----------
        features : Features, optional
            Of an SMMU to make; all that is modelled.
        smmu : Smmu, optional
            One of yours instead, which shares the system's memory.
        caches : callable, optional
            As for `System`, of the SMMU to make.

        Returns
        -------
        Iommu
            Its driver; `number` is for `device(..., iommu=)`.

        Raises
        ------
        NotSupported
            The driver cannot serve it, or the policy refuses it.
        Exists
            The system has it already.
        Busy
            It has 8-bit ASIDs, and wider ones are in use.
        OutOfMemory
            No pages are left for its stream table and queues.
        InvalidArgument
            Both an SMMU and what to make one of; another memory; too many SMMUs.
        """
        if features is not None:
            instance("features", features, Features)
        if caches is not None and not callable(caches):
            raise WrongType("caches", caches, "a callable or None")
        if smmu is not None:
            instance("smmu", smmu, Smmu)
            if features is not None or caches is not None:
                name = "caches" if features is None else "features"
                raise InvalidArgument(name, features or caches, "None with smmu")
        with self.lock:
            if smmu is not None and smmu.memory is not self.memory:
                raise InvalidArgument("smmu", smmu, text="smmu does not share the system's memory")
            if any(one.smmu is smmu for one in self.iommus):
                raise Exists("smmu", smmu, text="smmu is one of the system's")
            if len(self.iommus) >= MOST_SMMUS:
                text = f"the system has {MOST_SMMUS} SMMUs, and may have no more"
                raise InvalidArgument("system", self, text=text)
            if smmu is None:
                made = caches() if caches is not None else None
                smmu = Smmu(self.memory, features or Features.full(), cr0=0, caches=made)
            iommu = self._bring_up(smmu)
            if smmu.features.ssidsize and not iommu.ssid_bits:
                why = iommu.why_no_pasids(1 << 20)
                text = f"{iommu!r}: the PASIDs of its devices are off: {why}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            return iommu

    def _smmus(
        self,
        count: int,
        features: Features | Iterable[Features] | None,
        memory: Memory | None,
        pages: tuple[int, int] | None,
        cpu: Cpu | None,
        caches: Callable[[], Caches] | None,
        smmu: Smmu | Iterable[Smmu] | None,
    ) -> list[Smmu]:
        """Return the SMMUs that the arguments ask for, and the pages for their tables."""
        if smmu is not None:
            instance("smmu", smmu, Smmu, Iterable)
            mine = [smmu] if isinstance(smmu, Smmu) else list(smmu)
            for one in mine:
                instance("smmu", one, Smmu)
            if not mine or any(one.memory is not mine[0].memory for one in mine):
                raise InvalidArgument("smmu", smmu, text="smmu: one or more that share a memory")
            if len(set(map(id, mine))) < len(mine):
                raise Exists("smmu", smmu, text="smmu: one of them is there twice")
            return mine
        if features is None or isinstance(features, Features):
            count = integer("smmus", count)
            if not 1 <= count <= MOST_SMMUS:
                raise InvalidArgument("smmus", count, f"1 to {MOST_SMMUS}")
            each = [features or Features.full()] * count
        else:
            instance("features", features, Iterable)
            each = list(features)
            for some in each:
                instance("features", some, Features)
            if not 1 <= len(each) <= MOST_SMMUS:
                raise InvalidArgument("features", len(each), f"1 to {MOST_SMMUS} elements")
        if memory is None:
            bits = min(45, cpu.pa_bits if cpu else 45, *(one.oas_bits for one in each))
            memory = Memory()
            if pages is None:
                memory.add_private(0, 1 << (bits - 1), sparse=True)
                self.pages = _room(memory, 1 << (bits - 1))
            else:
                memory.add_private(0, 1 << bits)
        return [
            Smmu(memory, one, cr0=0, caches=caches() if caches is not None else None)
            for one in each
        ]

    @property
    def smmu(self) -> Smmu:
        """The first SMMU."""
        return self.iommus[0].smmu

    # --- devices ---

    def device(
        self, sids: SupportsIndex | Iterable[SupportsIndex], *, iommu: int = 0, **more: Any
    ) -> Device:
        """Make a device and probe it; the arguments are those of `Device`.

        Parameters
        ----------
        sids : int or iterable of int
        iommu : int
            Which SMMU it is behind.

        Raises
        ------
        OutOfRange, NoDevice, InvalidArgument, OutOfMemory
            As for `Device` and `probe`.
        """
        device = Device(sids, **more)
        self.probe(device, iommu)
        return device

    def probe(self, device: Device, iommu: int = 0) -> None:
        """Put a device behind an SMMU, with its default domain.

        Raises
        ------
        NoDevice
            There is no such SMMU, or a StreamID belongs to another device (ENODEV).
        NoEntry
            The device has no StreamID (ENOENT).
        OutOfRange
            A StreamID is beyond the stream table (ERANGE).
        Busy
            It was probed (EBUSY).
        OutOfMemory
            No page is left for a stream table's leaf.
        """
        with self.lock:
            instance("device", device, Device)
            if device._master is not None:
                raise Busy("device", device, text="device was probed")
            iommu = integer("iommu", iommu)
            group = device._wanted_group
            if group is not None and group.system is not self:
                raise InvalidArgument("group", group, text="group is another system's")
            if not 0 <= iommu < len(self.iommus):
                raise NoDevice("iommu", iommu, f"0 to {len(self.iommus) - 1}")
            one = self.iommus[iommu]
            if not device.sids:
                raise NoEntry("device", device, text="device has no StreamID")
            for sid in device.sids:
                if not 0 <= sid <= one.last_sid:
                    raise OutOfRange("sid", sid, f"0 to {one.last_sid:#x}")
                if sid in one.devices:
                    raise NoDevice("sid", sid, text=f"sid {sid:#x} belongs to {one.devices[sid]!r}")
            if group is not None:
                group.check_reset()
            with Undo() as undo:
                for sid in device.sids:
                    if one.reserve_ste(sid):
                        undo.add(one.unreserve_ste, sid)
                undo.add(device._unprobed)
                device._probed(one)
                undo.add(self._unlink, device, one)
                for sid in device.sids:
                    one.devices[sid] = device
                self._join(device, undo)

    @staticmethod
    def _unlink(device: Device, iommu: Iommu) -> None:
        for sid in device.sids:
            iommu.devices.pop(sid, None)

    def _join(self, device: Device, undo: Undo) -> None:
        """Let a device enter its group, with the group's domains."""
        group, master = device.group, device.master
        undo.add(setattr, group, "default", group.default)
        if not group.devices:
            group.default = self._default(device, undo)
        domain = group.domain
        master.prepare(domain, undo)
        pasids = group.pasids if device.max_pasids else {}
        for pasid in pasids:
            one = group.attachment(pasid)
            assert one is not None
            master.prepare_pasid(one.domain, pasid, undo, domain)
        undo.add(master.drop_table)
        if domain is not master.domain:
            undo.add(master.attach, BLOCKED)
        master.attach(domain)
        for pasid in pasids:
            one = group.attachment(pasid)
            assert one is not None
            master.set_pasid(one.domain, pasid, one.handle)
            undo.add(master.detach_pasid, pasid)
        group.devices.append(device)

    def _default(self, device: Device, undo: Undo) -> Domain:
        """Return the domain that a device begins with."""
        if self.default_domain == "identity" or (
            self.default_domain == "blocked" and device.direct
        ):
            return IDENTITY
        if self.default_domain == "blocked":
            return BLOCKED
        domain = paging_domain(device.iommu)
        undo.add(domain.free)
        for base, size in device.direct:
            domain.map(base, base, size)
        return domain

    def group(self) -> Group:
        """Make an empty group, for devices that share one: ``device(..., group=group)``."""
        return Group(self)

    # --- domains ---

    def paging_domain(self, **more: Any) -> PagingDomain:
        """Make a paging domain that no device was named for (iommu_domain_alloc).

        It gets its SMMU, ASID and page table when it is first attached; before that it maps
        nothing (ENODEV).  The arguments are those of `Device.paging_domain`.

        Raises
        ------
        NotSupported
            As `Device.paging_domain`.
        """
        with self.lock:
            return paging_domain(self.iommus[0], ready=False, **more)

    # --- PASIDs ---

    def take_pasid(self, first: int, last: int, data: object = None) -> int:
        """Allocate a PASID for the driver half; a notifier cannot change the system meanwhile."""
        with self.lock.closed:
            return self.pasids.alloc(first, last, data=data)

    def give_pasid(self, pasid: int) -> None:
        """Free what `take_pasid` took."""
        with self.lock.closed:
            self.pasids.free(pasid)

    # --- running ---

    def service(self) -> int:
        """Handle every record in the event and page request queues, as interrupts do.

        Returns
        -------
        int
            How many there were.
        """
        return sum(fault.service(iommu) for iommu in self.iommus)

    def stale(self) -> list[StaleEntry]:
        """Look for cache entries of any SMMU that the tables no longer give."""
        return [found for iommu in self.iommus for found in iommu.smmu.stale()]

    # --- copies ---

    def save(self) -> bytes:
        """Return everything of the system but its memory, as bytes for `restore`.

        That is the SMMUs with their caches (`Smmu.save`), devices with their ATCs, domains,
        PASIDs, what is attached and what waits.  Callbacks (handlers, `on_fault`, `mm_exit`,
        observers) are the host's and are left out.  What lies in the memory stays there, and
        equals the state until something changes either.

        Raises
        ------
        TypeError
            An object of the host (a handle, the data of a PASID) cannot be pickled, or PASIDs
            come from a backend.
        RuntimeError, Busy
            A translation or a command is under way; a flush that failed is due.

        >>> from smmufast.iommu import System
        >>> system = System()
        >>> nic = system.device(8)
        >>> domain = nic.paging_domain()
        >>> nic.attach(domain)
        >>> domain.map(0x1000, 0x8000_0000, 0x1000)
        >>> later = System.restore(system.save(), system.memory.copy())
        >>> domain.unmap(0x1000, 0x1000)
        4096
        >>> hex(later.iommus[0].devices[8].translate(0x1000).pa)
        '0x80000000'
        """
        return save.save(self)

    @classmethod
    def restore(
        cls, state: object, memory: Memory, *, classes: Iterable[type] = ()
    ) -> System:
        """Make a system that goes on as the saved one would have.

        Parameters
        ----------
        state : bytes-like
            What `save` returned.
        memory : Memory
            That of the saved one, which must not be used any more then, or a copy as of then.
        classes : iterable of type
            Classes of yours that the state may name: of attach handles, of PASIDs' data.

        Returns
        -------
        System

        Raises
        ------
        InvalidArgument
            The bytes are damaged, or name a class that is neither this library's nor in
            `classes`.
        """
        instance("memory", memory, Memory)
        return save.restore(state, memory, classes)

    def __copy__(self) -> System:
        """Refuse: two systems cannot have the same tables."""
        raise WrongType("system", self, text="a System is copied by copy.deepcopy, with its memory")

    def __deepcopy__(self, memo: object) -> System:
        """Copy it with its memory."""
        with self.lock:
            return save.restore(self.save(), self.memory.copy(), None)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickle it with its memory, which can go out of band (protocol 5)."""
        with self.lock:
            return _restored, (self.save(), self.memory)

    def check(self) -> list[Finding]:
        """Look for whatever is inconsistent: memory and hardware against who is attached where.

        Stale entries of TLBs and ATCs; PASIDs, ASIDs, VMIDs and pages that nobody has, or two;
        tables that nobody owns, and entries that say something else than what is attached.

        Returns
        -------
        list of Finding
            Empty when all is well.
        """
        with self.lock:
            return check.check(self)

    def draw(self, *, limit: SupportsIndex = 16) -> str:
        """Draw what the STEs of all devices lead to, as `Device.draw` does for one.

        Raises
        ------
        InvalidArgument
            The limit is below 1.
        """
        return draw(self._streams(), limit)

    def _streams(self) -> Iterator[tuple[Iommu, int]]:
        return ((iommu, sid) for iommu in self.iommus for sid in sorted(iommu.devices))

    def _repr_html_(self) -> str:
        from smmufast._html import picture

        return picture(self, self._streams())

    def __repr__(self) -> str:
        """Its SMMUs, devices and profile."""
        devices = sum(len(set(iommu.devices.values())) for iommu in self.iommus)
        return f"<System {self.profile.name}: {len(self.iommus)} SMMUs, {devices} devices>"


def _restored(state: bytes, memory: Memory) -> System:
    return save.restore(state, memory, None)
