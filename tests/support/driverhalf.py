"""What tests of the driver half share: a call that is refused, and what it must leave as it was."""

import pytest

from smmufast.iommu import IommuError


def refused(number, call, *arguments, **more):
    """The call fails with that errno and changes nothing that can be seen."""
    with pytest.raises(IommuError) as raised:
        call(*arguments, **more)
    assert raised.value.errno == number, raised.value
    return str(raised.value)


def words(memory, address, count=8):
    return tuple(memory.read_u64(address + 8 * i) for i in range(count))


def snapshot(system):
    """Everything that a failed call must leave as it was."""
    memory = system.memory
    tables = {}
    for iommu in system.iommus:
        for sid, device in iommu.devices.items():
            address = iommu.ste_address(sid)
            tables["ste", iommu.number, sid] = words(memory, address)
            tables["domain", sid] = device.domain
            tables["ats", sid] = device.ats_enabled
            tables["pasids", sid] = dict(device.group.pasids)
            table = device.cd_table
            if table is not None:
                tables["used", sid] = table.used, dict(table.leaves)
                for ssid in range(min(1 << table.s1cdmax, 8)):
                    if table.address(ssid) is not None:
                        tables["cd", sid, ssid] = words(memory, table.address(ssid))
            tables["users", sid] = device.domain.users
        tables["ids", iommu.number] = len(iommu.asids), len(iommu.vmids)
    tables["pages"] = system.pages.in_use, system.pages.blocks
    tables["pasid space"] = len(system.pasids)
    return tables
