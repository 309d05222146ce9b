"""PASIDs that callers choose and PASIDs from the allocator know each other."""

import copy
import errno
from collections import Counter

import pytest

from smmufast import Features
from smmufast.iommu import (
    AUX,
    IDENTITY,
    PER_DEVICE,
    SYSTEM_WIDE_STRICT,
    AddressSpace,
    Busy,
    InvalidArgument,
    IommuError,
    NoEntry,
    NoSpace,
    NotSupported,
    OutOfMemory,
    System,
)

FULL = Features.full()


def attached(system):
    """How often each PASID is attached, from the devices."""
    return Counter(
        ssid
        for iommu in system.iommus
        for device in {*iommu.devices.values()}
        for ssid in device.master.attachments
        if ssid
    )


def consistent(system):
    """The space counts what is attached, no more and no less."""
    pasids, count = system.pasids, attached(system)
    assert {p: pasids.picked(p) for p in range(2100) if pasids.picked(p)} == dict(count)
    return True


def test_a_process_gets_a_pasid_that_nobody_chose(systems):
    system = systems()
    one, other = (system.device(sid, pasid_bits=4) for sid in (8, 9))
    domain = one.paging_domain()
    for pasid in (1, 2, 4):
        one.attach_pasid(domain, pasid)
    domain.map(0x1000, 0x8000_0000, 0x1000)
    spaces = [AddressSpace.of(system) for _ in range(2)]
    one.bind(spaces[0])
    other.bind(spaces[1])  # also where nobody chose: the process may be bound to both
    one.bind(spaces[1])
    assert [space.pasid for space in spaces] == [3, 5]
    share = one.mediated()
    share.attach(one.paging_domain())
    assert share.pasid == 6
    assert consistent(system)
    assert one.translate(0x1000, pasid=4).pa == 0x8000_0000
    one.detach_pasid(domain, 2)
    third = AddressSpace.of(system)
    one.bind(third)
    assert third.pasid == 2
    assert consistent(system)


def test_f31_where_a_process_has_a_pasid_that_was_chosen_elsewhere_it_is_busy(systems):
    system = systems()
    one, other = (system.device(sid, pasid_bits=4) for sid in (8, 9))
    space = AddressSpace.of(system)
    one.bind(space)
    other.attach_pasid(other.paging_domain(), space.pasid)
    with pytest.raises(Busy) as caught:
        other.bind(space)
    assert caught.value.errno == errno.EBUSY
    assert consistent(system)
    for bond in list(space.bonds):
        bond.unbind()
    pasid = space.pasid
    space.exit()
    assert pasid not in system.pasids
    late = AddressSpace.of(system)  # the other device still has it
    one.bind(late)
    assert late.pasid == pasid + 1
    assert consistent(system)


def test_a_device_takes_a_pasid_as_iommu_alloc_global_pasid_does(systems):
    system = systems()
    device, other = (system.device(sid, pasid_bits=3) for sid in (8, 9))
    domain = device.paging_domain()
    device.attach_pasid(domain, 1)
    pasid = device.alloc_pasid()
    assert pasid == 2
    device.attach_pasid(domain, pasid)
    space = AddressSpace.of(system)
    device.bind(space)
    for number, who in ((pasid, other), (space.pasid, device)):
        with pytest.raises(InvalidArgument):
            who.free_pasid(number)
    with pytest.raises(NoEntry):
        device.free_pasid(1)  # attached, and allocated by nobody
    device.free_pasid(pasid)
    assert consistent(system)
    assert [other.alloc_pasid() for _ in range(4)] == [4, 5, 6, 7]
    with pytest.raises(NoSpace) as caught:
        other.alloc_pasid()
    assert caught.value.errno == errno.ENOSPC
    device.detach_pasid(domain, pasid)
    assert other.alloc_pasid() == pasid
    with pytest.raises(NotSupported):
        System(profile=AUX).device(1, pasid_bits=4).alloc_pasid()


def test_a_group_counts_each_of_its_devices_also_those_that_come_and_go(systems):
    system = systems()
    first = system.device(8, pasid_bits=4)
    domain = first.paging_domain()
    first.attach_pasid(domain, 1)
    second = system.device(9, pasid_bits=4, group=first.group)
    third = system.device(10, group=first.group)  # without PASIDs
    assert consistent(system) and system.pasids.picked(1) == 2
    first.release()
    assert consistent(system) and system.pasids.picked(1) == 1
    third.release()
    second.release()
    assert consistent(system) and system.pasids.picked(1) == 0
    assert system.device(8, pasid_bits=4).alloc_pasid() == 1


@pytest.mark.parametrize("fails", range(3))
def test_an_attach_that_fails_chooses_nothing(systems, fails):
    system = systems()
    device = system.device(8, pasid_bits=16)
    domain = device.paging_domain()
    device.attach(IDENTITY)
    system.pages.fail_after(fails)
    try:
        device.attach_pasid(domain, 2000)
    except OutOfMemory:
        assert system.pasids.picked(2000) == 0
    else:
        assert system.pasids.picked(2000) == 1
    finally:
        system.pages.fail_after(None)
    for wrong in (0, 1 << 16, -1):
        with pytest.raises(IommuError):
            device.attach_pasid(domain, wrong)
    assert consistent(system)


def test_a_reset_and_a_replacement_change_nothing_of_what_is_chosen(systems):
    from smmufast.iommu import AttachHandle

    system = systems()
    device = system.device(8, pasid_bits=4)
    device.attach_pasid(device.paging_domain(), 3)
    device.replace_pasid(device.paging_domain(), 3, AttachHandle())
    assert consistent(system)
    device.reset_prepare()
    assert consistent(system)
    device.reset_done()
    assert consistent(system)


def test_a_copy_of_a_system_counts_for_itself(systems):
    system = systems()
    device = system.device(8, pasid_bits=4)
    domain = device.paging_domain()
    device.attach_pasid(domain, 1)
    other = copy.deepcopy(system)
    device.detach_pasid(domain, 1)
    assert consistent(system) and consistent(other)
    assert (system.pasids.picked(1), other.pasids.picked(1)) == (0, 1)


def test_f22_every_refusal_of_a_device_that_the_policy_switched_off_says_so():
    system = System(features=[FULL, FULL.replace(ssidsize=8)], pasid_policy=SYSTEM_WIDE_STRICT)
    narrow = system.device(1, pasid_bits=6)
    calls = (
        lambda: narrow.attach_pasid(narrow.paging_domain(), 1),
        lambda: narrow.bind(AddressSpace.of(system)),
        lambda: narrow.mediated().attach(narrow.paging_domain()),
        narrow.alloc_pasid,
    )
    for call in calls:
        with pytest.raises(IommuError) as caught:
            call()
        for part in ("'system wide, strict'", "64 PASIDs (6 bits)", "256 PASIDs (8 bits)"):
            assert part in str(caught.value)
    assert narrow.why_no_pasids in str(caught.value)
    assert consistent(system)
    none = System(pasid_policy=PER_DEVICE).device(1)
    with pytest.raises(NoSpace, match="the device has no PASIDs"):
        none.alloc_pasid()
