"""The SMMU that a guest sees: its streams, and the invalidations that it sends.

The guest owns its CD tables and stage-1 page tables; its STEs and its commands pass through the
host, which puts in the VMID and the StreamIDs that are real (IHI 0070 4.2 to 4.5).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import SupportsIndex

from smmufast import layout
from smmufast.errors import (
    Busy,
    CommandError,
    Exists,
    InputOutput,
    InvalidArgument,
    NoEntry,
    instance,
    integer,
)
from smmufast.iommu.device import Device
from smmufast.iommu.domain import Domain, NestedDomain, PagingDomain, check_nesting_parent

_BY_VMID = ("TLBI_NH_ALL", "TLBI_NH_ASID", "TLBI_NH_VA", "TLBI_NH_VAA")
_BY_STREAM = ("CFGI_CD", "CFGI_CD_ALL", "ATC_INV")
_OPCODES = {opcode.value: opcode.name for opcode in layout.Opcode}


class Viommu:
    """A guest's SMMU over one stage-2 domain.

    Parameters
    ----------
    parent : PagingDomain
        Made with ``nest_parent=True``.

    Attributes
    ----------
    vmid : int
        What tags everything of the guest: two guests over one parent may use the same ASIDs.
        0 after `close`.
    events : deque of bytes
        The last 1024 events that the guest's own stage 1 gave, with the StreamIDs that the guest
        knows; ``layout.format("EVENT", record)`` puts one into words.

    Raises
    ------
    InvalidArgument
        The parent is not a nesting parent.
    Busy
        No VMID is left.

    >>> from smmufast.iommu import System, Viommu
    >>> system = System()
    >>> nic = system.device(8, pasid_bits=4)
    >>> host = nic.paging_domain(nest_parent=True)
    >>> viommu = Viommu(host)
    >>> viommu.add(0x20, nic)               # the guest knows it by another StreamID
    >>> nic.attach(viommu.domain((0b1001, 0)))   # its STE bypasses stage 1
    >>> host.map(0x4000_0000, 0x8000_0000, 1 << 21)
    >>> hex(nic.translate(0x4000_1234).pa)
    '0x80001234'
    """

    def __init__(self, parent: PagingDomain) -> None:
        check_nesting_parent(parent)
        assert parent.iommu is not None
        self.parent = parent
        self.iommu = parent.iommu
        self.devices: dict[int, Device] = {}
        self.events: deque[bytes] = deque(maxlen=1024)
        with parent.system.lock:
            self.vmid = self.iommu.vmids.alloc(self)
            self.iommu.viommus.append(self)

    def close(self) -> None:
        """End the guest: its VMID is free for others.

        Raises
        ------
        Busy
            A device is attached to a domain of the guest.
        """
        with self.parent.system.lock:
            if not self.vmid:
                return
            for one in self.parent.attachments:
                if self._owns(one.domain):
                    raise Busy("viommu", self, text=f"{one.master.device!r} is attached")
            self.iommu.vmids.free(self.vmid)
            self.iommu.viommus.remove(self)
            self.devices.clear()
            self.vmid = 0

    def _owns(self, domain: Domain) -> bool:
        return isinstance(domain, NestedDomain) and domain.viommu is self

    def add(self, vsid: SupportsIndex, device: Device) -> None:
        """Let the guest know a device by a StreamID of its own.

        Raises
        ------
        Exists
            The guest has a device of that number (EEXIST).
        InvalidArgument
            The device is behind another SMMU, or has several StreamIDs.
        """
        number = integer("vsid", vsid)
        if not 0 <= number < 1 << 32:
            raise InvalidArgument("vsid", number, "0 to 0xffffffff")
        instance("device", device, Device)
        if number in self.devices:
            raise Exists("vsid", number, text=f"vsid {number:#x} is a device of the guest")
        if device.iommu is not self.parent.iommu or len(device.sids) != 1:
            raise InvalidArgument(
                "device", device, text="device has several StreamIDs, or is behind another SMMU"
            )
        self.devices[number] = device

    def remove(self, vsid: SupportsIndex) -> None:
        """Take a device away from the guest.

        Raises
        ------
        NoEntry
            There is none (ENOENT).
        Busy
            The device is attached to a domain of the guest.
        """
        with self.parent.system.lock:
            device = self.devices.get(integer("vsid", vsid))
            if device is None:
                raise NoEntry("vsid", vsid, text=f"vsid {vsid!r} is no device of the guest")
            if self._owns(device.domain):
                raise Busy("vsid", vsid, text=f"{device!r} is attached to the guest's domain")
            del self.devices[integer("vsid", vsid)]

    def forget(self, device: Device) -> None:
        """A device was released: the guest has it no more."""
        for vsid in [vsid for vsid, one in self.devices.items() if one is device]:
            del self.devices[vsid]

    def report(self, device: Device, record: bytes) -> bool:
        """Put an event into `events`, as the guest knows it; whether the guest has the device."""
        for vsid, one in self.devices.items():
            if one is device:
                fields = layout.unpack("EVENT", record) | {"StreamID": vsid}
                self.events.append(layout.to_bytes("EVENT", layout.pack("EVENT", **fields)))
                return True
        return False

    def domain(self, ste: Iterable[int]) -> NestedDomain:
        """Make the domain of a guest's STE, of which the first two dwords are given.

        Raises
        ------
        InvalidArgument
            The guest has ended, or the STE asks for what a guest may not have.
        """
        if not self.vmid:
            raise InvalidArgument("viommu", self, text="viommu was closed")
        return NestedDomain(self.parent, ste, viommu=self)

    def invalidate(self, commands: Iterable[tuple[int, int]]) -> int:
        """Do what a guest's commands ask for, with the real VMID and StreamIDs, and one CMD_SYNC.

        Parameters
        ----------
        commands : iterable of (int, int)
            Commands of two dwords: TLBI_NH_*, TLBI_NSNH_ALL, CFGI_CD, CFGI_CD_ALL, ATC_INV.

        Returns
        -------
        int
            How many there were.

        Raises
        ------
        InputOutput
            A command that a guest may not send, or a StreamID that it does not have (EIO): none
            of them was done.  Or one that the SMMU refuses: the others were done.  `value` is its
            index.
        InvalidArgument
            Something else than pairs of dwords, or the parent was freed.
        """
        done: list[int] = []
        if not self.vmid:
            raise InvalidArgument("viommu", self, text="viommu was closed, or its parent freed")
        instance("commands", commands, Iterable)
        for index, command in enumerate(commands):
            if not isinstance(command, tuple | list) or len(command) != 2:
                raise InvalidArgument("commands", command, "pairs of dwords")
            done.append(self._real(index, *command))
        queue = self.iommu.queue
        with self.parent.system.lock:
            try:
                if done:
                    queue.run(done)
            except CommandError as error:
                bad = error.refused[0]
                if bad.command not in done:
                    raise  # the CMD_SYNC: a device does not answer
                index = done.index(bad.command)
                text = f"command {index}, {_OPCODES[bad.command & 0xFF]}: {bad.reason}"
                raise InputOutput("commands", index, text=text) from error
        return len(done)

    def _real(self, index: int, first: int, second: int) -> int:
        """A guest's command with the numbers that are real."""
        for word in (integer("commands", first), integer("commands", second)):
            if not 0 <= word < 1 << 64:
                raise InvalidArgument("commands", word, "dwords of 64 bits")
        name = _OPCODES.get(first & 0xFF, "unknown")
        vmid = self.vmid
        if name == "TLBI_NSNH_ALL":
            word = layout.pack("TLBI_NH_ALL", VMID=vmid)
        elif name in _BY_VMID:
            word = first | second << 64
            fields = layout.unpack(name, word) | {"VMID": vmid}
            word = layout.pack(name, **fields)
        elif name in _BY_STREAM:
            word = first | second << 64
            fields = layout.unpack(name, word)
            device = self.devices.get(fields["StreamID"])
            if device is None:
                raise InputOutput(
                    "commands", index,
                    text=f"command {index}, {name}: the guest has no sid {fields['StreamID']:#x}",
                )  # fmt: skip
            fields["StreamID"] = device.sid
            fields.pop("SSec", None)
            word = layout.pack(name, **fields)
        else:
            raise InputOutput(
                "commands", index, text=f"command {index} is {name}: not for a guest to send"
            )
        return word
