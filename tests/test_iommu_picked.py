"""PASIDs that callers choose and those of the allocator know each other (NOW profile)."""

import pytest

from smmufast import Features
from smmufast.iommu import (
    AUX,
    IDENTITY,
    SYSTEM_WIDE_STRICT,
    AddressSpace,
    Busy,
    InvalidArgument,
    IommuError,
    NoEntry,
    NoSpace,
    NotSupported,
    System,
)

PAGE = 0x1000
RAM = 0x8000_0000


def device_of(system, sid=8, **more):
    device = system.device(sid, pasid_bits=3, **more)
    device.attach(IDENTITY)
    return device


def test_a_process_gets_a_pasid_that_nobody_picked():
    system = System()
    device = device_of(system)
    domain = device.paging_domain()
    device.attach_pasid(domain, 1)
    device.attach_pasid(domain, 3)
    process = AddressSpace.of(system)
    device.bind(process)
    share = device.mediated()
    share.attach(domain)
    assert (process.pasid, share.pasid) == (2, 4)
    assert device.alloc_pasid("mine") == 5
    assert system.pasids.find(5) == "mine"


def test_a_pasid_that_a_process_has_and_somebody_picked_elsewhere_is_busy():
    system = System()
    one, other = device_of(system), device_of(system, 9)
    process = AddressSpace.of(system)
    one.bind(process)
    other.attach_pasid(other.paging_domain(), process.pasid)
    with pytest.raises(Busy):
        other.bind(process)
    assert process.bonds[0].references == 1


@pytest.mark.parametrize("end", ["detach", "replace", "release", "failure"])
def test_a_pasid_that_is_picked_no_more_is_handed_out_again(end):
    system = System()
    device = device_of(system)
    domain = device.paging_domain()
    device.attach_pasid(domain, 1)
    assert device.alloc_pasid() == 2
    device.free_pasid(2)
    if end == "detach":
        device.detach_pasid(domain, 1)
    elif end == "replace":
        from smmufast.iommu import AttachHandle

        other = device.paging_domain()
        device.replace_pasid(other, 1, AttachHandle())
        assert system.pasids.picked(1) == 1
        device.detach_pasid(other, 1)
    elif end == "release":
        device.release()
        device = device_of(system)
    else:
        device.detach_pasid(domain, 1)
        domain.free()
        with pytest.raises(IommuError):
            device.attach_pasid(domain, 1)
    assert system.pasids.picked(1) == 0
    assert device.alloc_pasid() == 1


def test_what_alloc_pasid_gave_can_be_attached_and_freed_while_it_is():
    system = System()
    device = device_of(system)
    pasid = device.alloc_pasid()
    domain = device.paging_domain()
    device.attach_pasid(domain, pasid)
    device.free_pasid(pasid)
    assert device.alloc_pasid() != pasid  # it is attached
    device.detach_pasid(domain, pasid)
    assert device.alloc_pasid() == pasid


def test_alloc_pasid_refuses_with_the_reason():
    system = System(features=Features.full().replace(ssidsize=4), pasid_policy=SYSTEM_WIDE_STRICT)
    wide, narrow = system.device(8, pasid_bits=8), system.device(9, pasid_bits=2)
    none = system.device(10)
    assert wide.max_pasids == 16 and narrow.max_pasids == 0
    process = AddressSpace.of(system)
    for call in (
        narrow.alloc_pasid, lambda: narrow.bind(process),
        lambda: narrow.attach_pasid(narrow.paging_domain(), 1),
        lambda: narrow.mediated().attach(narrow.paging_domain()),
    ):  # fmt: skip
        with pytest.raises(IommuError, match=r"policy 'system wide, strict'.*2 bits.*4 bits"):
            call()
    for call in (none.alloc_pasid, lambda: none.bind(process)):
        with pytest.raises(NoSpace, match="the device has no PASIDs"):
            call()
    for _ in range(15):
        wide.alloc_pasid()
    with pytest.raises(NoSpace):
        wide.alloc_pasid()
    with pytest.raises(NoEntry):
        none.free_pasid(99)
    old = System(profile=AUX).device(8, pasid_bits=4)
    for call in (old.alloc_pasid, lambda: old.free_pasid(1)):
        with pytest.raises(NotSupported, match="needs System"):
            call()
    with pytest.raises(InvalidArgument, match="strict"):
        narrow.attach_pasid(narrow.paging_domain(), 1)


def test_aux_on_a_device_that_the_policy_switched_off_names_the_policy():
    system = System(
        profile=AUX, features=Features.full().replace(ssidsize=4), pasid_policy=SYSTEM_WIDE_STRICT
    )
    device = system.device(9, pasid_bits=2)
    for call in (lambda: device.enable_feature("AUX"), lambda: device.init(["AUX"])):
        with pytest.raises(IommuError, match="system wide, strict"):
            call()
