"""Shared virtual addressing: a process's page table under one PASID on every device (F31 to F37).

The page table belongs to something else: the space that owns it, a captured system, whatever wrote
the tables at a TTB.  The driver half reads none of it; it puts TTB0 into a CD.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

from smmufast import layout
from smmufast._driver.tables import Pages, PageTable
from smmufast.errors import (
    Busy,
    InvalidArgument,
    NoProcess,
    NoSpace,
    NotSupported,
    PasidOverflow,
    WrongType,
    instance,
    integer,
)
from smmufast.iommu.attachment import AttachHandle
from smmufast.iommu.domain import PagingDomain, SvaDomain
from smmufast.iommu.profile import take_pasid
from smmufast.iommu.undo import Undo

if TYPE_CHECKING:
    from collections.abc import Callable

    from smmufast.iommu.device import Device
    from smmufast.iommu.fault import PageFault
    from smmufast.iommu.smmu.iommu import Iommu
    from smmufast.iommu.system import System

_ARGUMENTS = {
    "TTB0": "ttb", "T0SZ": "t0sz", "TG0": "tg", "IPS": "ps", "IR0": "irgn", "OR0": "orgn",
    "SH0": "sh",
}  # fmt: skip
_GEOMETRY = ("root", "t0sz", "tg", "ps", "mair", "irgn", "orgn", "sh")


def _check(name: str, value: int) -> None:
    """Refuse what a field of a CD cannot hold."""
    field = layout.CD.field(name)
    if field.address and (value & ~field.mask or value < 0):
        raise InvalidArgument(
            "ttb", value, f"0 to {field.mask:#x} in steps of {1 << field.lsb % 64}"
        )
    if not field.address and not 0 <= value < 1 << field.width:
        raise InvalidArgument(_ARGUMENTS[name], value, f"0 to {(1 << field.width) - 1}")


class ProcessTable(PageTable):
    """The page table of a process: what it unmaps is invalidated for all who share it."""

    def __init__(self, space: AddressSpace, pages: Pages, **geometry: Any) -> None:
        super().__init__(pages, stage=1, **geometry)
        self.space = space

    def flush(self, first: int, last: int, page_lg2: int, tables: bool) -> None:
        """Tell the devices that share the table (F35)."""
        self.space._invalidate(first, last, page_lg2, not tables)

    def close(self) -> None:
        """Free the tables.

        Raises
        ------
        Busy
            The process is bound to a device: a CD points to them.
        """
        self._check_unbound()
        super().close()

    @property
    def ready(self) -> bool:
        """Whether there are tables; Busy to make it False while the process is bound."""
        return bool(PageTable.ready.__get__(self))  # type: ignore[attr-defined]

    @ready.setter
    def ready(self, value: object) -> None:
        if not value:
            self._check_unbound()
        PageTable.ready.__set__(self, value)  # type: ignore[attr-defined]

    def _check_unbound(self) -> None:
        if self.space.bonds:
            raise Busy("table", self, text=f"{self.space!r}: its tables are in use")

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Refuse copies: CDs in memory point to the table."""
        raise WrongType("table", self, text="a process's table is one thing: it has no copies")


class AddressSpace:
    """A process's address space: a page table that something else owns, and one PASID.

    Parameters
    ----------
    ttb : int
        Address of the first table.
    t0sz, tg, ps : int
        As they stand in a CD: size of the input, granule (0 4K, 1 64K, 2 16K), output size.
    mair : int
        Memory attributes, 64 bits.
    irgn, orgn, sh : int
        Attributes of the walks.
    asid : int, optional
        The ASID that the processors use for it: shared in the AUX profile (F47); 0: they have
        none for it.  None: the SMMU's driver takes one of its own.
    handler : callable, optional
        ``handler(fault)`` is called with a `PageFault` of a device: it maps the page and returns
        True, or returns False.

    Attributes
    ----------
    pasid : int
        0 until it is first bound; then the same until it ends.
    exited : bool
    bonds : list of Bond

    >>> from smmufast.iommu import AddressSpace, System
    >>> system = System()
    >>> gpu, nic = system.device(8, pasid_bits=16), system.device(9, pasid_bits=8)
    >>> process = AddressSpace.of(system)
    >>> process.table.map(0x7F00_0000_0000, 0x8000_0000, 0x1000)
    >>> bonds = [device.bind(process) for device in (gpu, nic)]
    >>> [hex(one.translate(0x7F00_0000_0010, pasid=process.pasid).pa) for one in (gpu, nic)]
    ['0x80000010', '0x80000010']
    """

    def __init__(
        self,
        ttb: int,
        *,
        t0sz: int = 16,
        tg: int = 0,
        ps: int = 5,
        mair: int = 0xF4_04_FF_44,
        irgn: int = 1,
        orgn: int = 1,
        sh: int = 3,
        asid: int | None = None,
        handler: Callable[[PageFault], bool | str] | None = None,
    ) -> None:
        """Describe the page table of a process, as the processor walks it."""
        fields = {
            "TTB0": ttb,
            "T0SZ": t0sz,
            "TG0": tg,
            "IPS": ps,
            "IR0": irgn,
            "OR0": orgn,
            "SH0": sh,
        }
        for name, value in fields.items():
            _check(name, integer(_ARGUMENTS[name], value))
        if not 0 <= integer("mair", mair) < 1 << 64:
            raise InvalidArgument("mair", mair, "0 to 2^64 - 1")
        if asid is not None and not 0 <= integer("asid", asid) < 1 << 16:
            raise InvalidArgument("asid", asid, "0 to 65535, or None")
        self.table: PageTable | None = None
        self.root = ttb
        self.t0sz, self.tg, self.ps, self.mair = t0sz, tg, ps, mair
        self.irgn, self.orgn, self.sh = irgn, orgn, sh
        self.asid = asid
        self.handler = handler
        self.pasid = 0
        self.exited = self._exiting = False
        self.domains: dict[Iommu, SvaDomain] = {}
        self._asid_users = 0
        self._system: System | None = None

    @classmethod
    def of(
        cls,
        system: System,
        *,
        asid: int | None = None,
        handler: Callable[[PageFault], bool | str] | None = None,
    ) -> Self:
        """Make a space with a page table of its own, `table`, as the system's processors have it.

        Raises
        ------
        OutOfMemory
            No page is left for its first table.
        """
        cpu = getattr(system, "cpu", None)
        if cpu is None:
            raise WrongType("system", system, "a System")
        space = cls(0, asid=asid, handler=handler)
        wide = cpu.granule == 65536
        table = ProcessTable(
            space, system.pages, granule=cpu.granule, ias=cpu.va_bits,
            oas=min(max(cpu.pa_bits, 32), 52 if wide else 48),
        )  # fmt: skip
        space.table = table
        space._system = system
        system.spaces.add(space)
        for name in _GEOMETRY:
            setattr(space, name, getattr(table, name))
        return space

    @property
    def bonds(self) -> list[Bond]:
        """Its bonds with devices, in the order in which they came about."""
        found = {
            one.handle: None for domain in self.domains.values() for one in domain.attachments
        }
        return sorted((one for one in found if isinstance(one, Bond)), key=lambda one: one.number)

    @property
    def granule_lg2(self) -> int:
        """log2 of the granule in bytes."""
        return {0: 12, 1: 16, 2: 14}.get(self.tg, 12)

    def invalidate(self, first: int, last: int) -> None:
        """Drop what devices may have cached of a range, both ends included (F35).

        Whoever changed the tables calls it; for a table of `of` it is done by itself.

        Raises
        ------
        InvalidArgument
            The range is empty, or beyond 64 bits.
        """
        if not 0 <= integer("first", first) <= integer("last", last) < 1 << 64:
            raise InvalidArgument("last", last, f"{first:#x} to 0xffffffffffffffff")
        self._invalidate(first, last, self.granule_lg2, False)

    def _invalidate(self, first: int, last: int, page_lg2: int, leaf: bool) -> None:
        for domain in list(self.domains.values()):
            domain.invalidations.invalidate(first, last, self.granule_lg2, page_lg2, leaf)

    def exit(self) -> None:
        """End the process: its devices' accesses are refused from now on, without events (F34).

        Each CD becomes quiet, then TLBs and ATCs forget the space.  Bonds stay until they are
        unbound; the PASID is free for others after the last one.  What `mm_exit` of a device
        raises is raised when all that is done.  Another call does again what the host's memory
        refused.
        """
        system = self._system
        if system is None:
            self._exiting = self.exited = True
            return
        with system.lock as lock:
            if not self._exiting:
                self._exiting = True
                for bond in self.bonds:  # a callback may unbind
                    if bond.device.mm_exit is not None and bond.references:
                        lock.defer(bond.device.mm_exit, self)
            elif not self.exited:
                return  # by a callback
            self.exited = True
            for domain in self.domains.values():
                for table, ssid in domain.tables():
                    lock.insist(table.rewrite, ssid)
            for domain in self.domains.values():
                lock.insist(domain.invalidations.invalidate_all)
            self._end()

    def _end(self) -> None:
        """Free the PASID, when the process is gone and nothing is bound."""
        if self.exited and not self.bonds and self.pasid:
            assert self._system is not None
            self._system.give_pasid(self.pasid)
            self.pasid = 0

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Refuse copies: a process is one thing."""
        raise WrongType("space", self, text=f"{self!r} is one thing: it has no copies")

    def __repr__(self) -> str:
        """Its PASID and what is bound."""
        state = ", exited" if self.exited else ""
        return f"<AddressSpace pasid={self.pasid} bound to {len(self.bonds)} devices{state}>"

    # --- the ASID (F47) ---

    def take_asid(self, iommu: Iommu) -> int:
        """Take the ASID for a domain: the processors', or one of the driver's own."""
        if self.asid is None or not iommu.system.profile.aux:
            return iommu.asids.alloc(self)
        if not self.asid:
            raise NoProcess("asid", 0, text="asid is 0: the processors have none for the space")
        if not self._asid_users:
            if self.asid in iommu.asids:
                holder = iommu.asids.find(self.asid)
                if not isinstance(holder, PagingDomain):
                    raise InvalidArgument(
                        "asid", self.asid, text=f"asid {self.asid} is that of another process"
                    )
                try:
                    holder.change_asid()
                except Busy as error:
                    raise NoSpace(
                        "asid", None, text=f"no ASID is left to move to: {error}"
                    ) from error
            iommu.asids.claim(self.asid, self)
        self._asid_users += 1
        return self.asid

    def give_asid(self, iommu: Iommu, asid: int) -> None:
        """Give back what `take_asid` took."""
        if asid == self.asid and iommu.system.profile.aux:
            self._asid_users -= 1
            if self._asid_users:
                return
        iommu.asids.free(asid)


class Bond(AttachHandle):
    """A device, and its group, that shares a process's address space.

    Attributes
    ----------
    device : Device
        Which was bound first, of a group.
    space : AddressSpace
    references : int
        How often it was bound; `unbind` that often ends it.
    """

    _numbers = itertools.count()

    def __init__(self, device: Device, space: AddressSpace) -> None:
        self.device = device
        self.space = space
        self.references = 1
        self.number = next(self._numbers)

    @property
    def pasid(self) -> int:
        """The PASID that the device uses; 0 after the bond ended."""
        return self.space.pasid if self.references else 0

    def unbind(self, *, force: bool = False) -> None:
        """Count one use less; the last, or `force`, takes the PASID away from the device.

        The PASID stays the space's until the process ends (F33).

        Raises
        ------
        InvalidArgument
            The bond ended before.
        """
        system = self.space._system
        assert system is not None
        with system.lock:
            if not self.references:
                raise InvalidArgument("bond", self, text="bond ended before")
            if self.references > 1 and not force:
                self.references -= 1
                return
            self._unbind()

    def _unbind(self, *, leaving: bool = False) -> None:
        self.device.group.set_pasid(None, self.space.pasid, leaving=leaving)
        self.references = 0
        self.device.disable_iopf()
        _drop_domains(self.space)
        self.space._end()

    def check_detach(self, pasid: int) -> None:
        """Refuse: `unbind` ends a bond."""
        raise Busy("pasid", pasid, text=f"pasid {pasid:#x} is bound to {self.space!r}")

    def belongs_to(self, device: Device) -> bool:
        """Whether it is the device that was bound."""
        return self.device is device

    def release(self, device: Device) -> None:
        """End with the device that was bound."""
        if self.belongs_to(device):
            self.device.system.lock.insist(partial(self._unbind, leaving=True))

    def __repr__(self) -> str:
        """What is bound to what."""
        return f"<Bond of sid {self.device.sid:#x} with {self.space!r}>"


def _drop_domains(space: AddressSpace) -> None:
    """Free the domains of a space that nothing uses any more."""
    for iommu, domain in list(space.domains.items()):
        if not domain.users:
            domain.free()
            del space.domains[iommu]


def bonds(device: Device) -> list[Bond]:
    """The bonds of a device with address spaces."""
    handles = [one.handle for one in device.master.attachments.values()]
    return [one for one in handles if isinstance(one, Bond) and one.device is device]


def bind(device: Device, space: AddressSpace) -> Bond:
    """Bind a process's address space to a device (iommu_sva_bind_device).

    Returns
    -------
    Bond
        The same one, counted, if the device or another of its group has it already.

    Raises
    ------
    NoDevice
        The device has no group (ENODEV).
    NotSupported
        The SMMU cannot walk the processors' tables (EOPNOTSUPP).
    InvalidArgument
        The process is gone; AUX profile: SVA is not enabled, or no main domain of stage 1.
    PasidOverflow
        The space has a PASID that is too large for this device (EOVERFLOW).
    NoSpace
        No PASID is left, or the device has none (ENOSPC).
    Busy
        The PASID holds something else on this device, the space is another system's, or no ASID
        is left.
    OutOfMemory
        No page is left for CDs.
    """
    group = device.group
    system = group.system
    instance("space", space, AddressSpace)
    with system.lock:
        held = group.attachment(space.pasid) if space._system is system else None
        if held is not None and isinstance(held.handle, Bond) and held.handle.space is space:
            if space.exited:
                raise InvalidArgument("space", space, text="space has ended")
            held.handle.references += 1
            return held.handle
        iommu = device.iommu
        if not iommu.has_sva:
            raise NotSupported("device", device, text="the SMMU cannot walk the processors' tables")
        if space.exited:
            raise InvalidArgument("space", space, text="space has ended")
        if space._system not in (None, system):
            raise Busy("space", space, text="space is another system's")
        first, last = system.profile.bind_range(device)
        if not device.max_pasids:
            raise NoSpace("device", device, text=f"device: {device.why_no_pasids}")
        with Undo() as undo:
            pasid = space.pasid
            if not pasid:
                pasid = take_pasid(device, first, last, space)
                undo.add(system.give_pasid, pasid)
                held = group.attachment(pasid)
            elif not first <= pasid <= last:
                raise PasidOverflow("pasid", pasid, f"{first} to {last}")
            if held is not None:
                raise Busy("pasid", pasid, text=f"pasid {pasid:#x} holds {held.domain!r}")
            domain = space.domains.get(iommu) or SvaDomain(iommu, space)
            group.check_pasid(domain, pasid)
            undo.add(_drop_domains, space)
            # before an ASID is taken, for which another domain may have to move
            group.prepare_pasid(domain, pasid, undo)
            device.enable_iopf()
            undo.add(device.disable_iopf)
            domain.take_asid()
            space.domains[iommu] = domain
            bond = Bond(device, space)
            group.install_pasid(domain, pasid, bond, undo)
        space.pasid = pasid
        if space._system is None:
            space._system = system
            system.spaces.add(space)
        if space.table is not None:
            space.table.active = True
        return bond
