"""The SMMU that a guest sees: its streams, and the invalidations that it sends.

The guest owns its CD tables and stage-1 page tables; its STEs and its commands pass through the
host, which puts in the VMID and the StreamIDs that are real (IHI 0070 4.2 to 4.5).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import SupportsIndex

from smmufast import layout
from smmufast.errors import Exists, InputOutput, InvalidArgument, NoEntry, instance, integer
from smmufast.iommu.device import Device
from smmufast.iommu.domain import NestedDomain, PagingDomain

_BY_VMID = ("TLBI_NH_ALL", "TLBI_NH_ASID", "TLBI_NH_VA", "TLBI_NH_VAA")
_BY_STREAM = ("CFGI_CD", "CFGI_CD_ALL", "ATC_INV")
_OPCODES = {opcode.value: opcode.name for opcode in layout.Opcode}


class Viommu:
    """A guest's SMMU over one stage-2 domain.

    Parameters
    ----------
    parent : PagingDomain
        Made with ``nest_parent=True``; its VMID tags everything of the guest.

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
        if not isinstance(parent, PagingDomain) or not parent.nest_parent or parent.freed:
            raise InvalidArgument(
                "parent", parent, text="parent is not a stage-2 domain made with nest_parent=True"
            )
        self.parent = parent
        self.devices: dict[int, Device] = {}

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
        """Take a device away from the guest; NoEntry if there is none (ENOENT)."""
        if self.devices.pop(integer("vsid", vsid), None) is None:
            raise NoEntry("vsid", vsid, text=f"vsid {vsid!r} is no device of the guest")

    def domain(self, ste: Iterable[int]) -> NestedDomain:
        """Make the domain of a guest's STE, of which the first two dwords are given."""
        return NestedDomain(self.parent, ste)

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
            A command that a guest may not send, or a StreamID that it does not have (EIO); none
            of them was done.
        InvalidArgument
            Something else than pairs of dwords, or the parent was freed.
        """
        done: list[tuple[int, int]] = []
        if self.parent.freed:
            raise InvalidArgument("parent", self.parent, text="parent was freed")
        instance("commands", commands, Iterable)
        for index, command in enumerate(commands):
            if not isinstance(command, tuple | list) or len(command) != 2:
                raise InvalidArgument("commands", command, "pairs of dwords")
            done.append(self._real(index, *command))
        iommu = self.parent.iommu
        assert iommu is not None
        with self.parent.system.lock:
            for first, second in done:
                iommu.queue.put(first, second)
            if done:
                iommu.queue.sync()
        return len(done)

    def _real(self, index: int, first: int, second: int) -> tuple[int, int]:
        for word in (integer("commands", first), integer("commands", second)):
            if not 0 <= word < 1 << 64:
                raise InvalidArgument("commands", word, "dwords of 64 bits")
        name = _OPCODES.get(first & 0xFF, "unknown")
        vmid = self.parent.vmid
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
            if device is None or device._iommu is not self.parent.iommu:
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
        return word & (1 << 64) - 1, word >> 64
