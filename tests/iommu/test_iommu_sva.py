"""Shared virtual addressing (F31-F37, F47), in both profiles."""

import errno

import pytest
from captures import SHIPPED
from driverhalf import refused, snapshot

from smmufast import Caches, Features, layout
from smmufast.capture import Capture
from smmufast.iommu import (
    AUX,
    NOW,
    SYSTEM_WIDE,
    SYSTEM_WIDE_STRICT,
    AddressSpace,
    Cpu,
    Device,
    OutOfMemory,
)

RAM = 0x8000_0000
VA = 0x7F00_0000_0000


@pytest.fixture(params=["NOW", "AUX"])
def profile(request):
    return {"NOW": NOW, "AUX": AUX}[request.param]


@pytest.fixture
def system(systems, profile):
    return systems(caches=Caches.server, profile=profile)


def able(system, sid, **more):
    """A device that can be bound."""
    device = system.device(sid, **({"pasid_bits": 8} | more))
    if system.profile.aux:
        device.attach(system.paging_domain())
        if device.has_feature("IOPF"):
            device.enable_feature("IOPF")
        device.enable_feature("SVA")
    return device


def process(system, pages=1, **more):
    space = AddressSpace.of(system, **more)
    space.table.map(VA, RAM, 0x1000 * pages)
    return space


def test_f31_bind_refuses_with_the_kernels_numbers(systems, profile):
    system = systems(profile=profile)
    device = able(system, 1)
    space = process(system)
    refused(errno.ENODEV, Device(5, pasid_bits=8).bind, space)
    without = system.device(2)
    if profile is AUX:
        refused(errno.EINVAL, without.bind, space)  # SVA is not enabled
    else:
        refused(errno.ENOSPC, without.bind, space)
    dead = process(system)
    dead.exit()
    refused(errno.EINVAL, device.bind, dead)
    refused(errno.EBUSY, device.bind, _foreign(systems, profile))
    assert (space.pasid, len(system.pasids), space.domains) == (0, 0, {})


def _foreign(systems, profile):
    """A space that is bound in another system."""
    other = systems(profile=profile)
    space = process(other)
    able(other, 1).bind(space)
    return space


def test_f31_no_pasid_is_left(systems, profile):
    system = systems(profile=profile)
    device = able(system, 1, pasid_bits=2)
    spaces = [process(system) for _ in range(4)]
    for space in spaces[:3]:
        device.bind(space)
    before = snapshot(system)
    refused(errno.ENOSPC, device.bind, spaces[3])
    assert snapshot(system) == before


def test_f31_a_pasid_that_holds_something_else_is_busy(systems):
    system = systems()
    one, two = able(system, 1), able(system, 2)
    space = process(system)
    one.bind(space)
    domain = two.paging_domain()
    two.attach_pasid(domain, space.pasid)
    before = snapshot(system)
    refused(errno.EBUSY, two.bind, space)
    assert snapshot(system) == before


def test_f31_every_allocation_of_a_bind_may_fail(systems, profile):
    system = systems(profile=profile, caches=Caches.server)
    device = able(system, 1, pasid_bits=16)
    space = process(system)
    nth = 0
    while True:
        before = snapshot(system)
        system.pages.fail_after(nth)
        try:
            device.bind(space)
        except OutOfMemory:
            assert snapshot(system) == before
            assert (space.pasid, space.bonds, space.domains) == (0, [], {})
            nth += 1
        else:
            break
        finally:
            system.pages.fail_after(None)
    assert nth == (0 if profile is AUX else 2)


def test_f32_the_same_pair_is_one_handle_and_every_device_has_the_same_pasid(system):
    one, two = able(system, 1), able(system, 2)
    space = process(system)
    bond = one.bind(space)
    assert one.bind(space) is bond and bond.references == 2
    other = two.bind(space)
    assert other is not bond and other.pasid == bond.pasid == space.pasid
    assert len(space.domains) == 1  # shared by both
    for device in (one, two):
        assert device.translate(VA + 8, pasid=space.pasid).pa == RAM + 8
    bond.unbind()
    assert one.translate(VA, pasid=space.pasid).pa == RAM
    bond.unbind()
    assert not one.translate(VA, pasid=space.pasid)
    assert two.translate(VA, pasid=space.pasid).pa == RAM
    refused(errno.EINVAL, bond.unbind)


def test_f32_each_smmu_has_its_own_domain_of_a_space(systems, profile):
    system = systems(2, profile=profile, caches=Caches.small)
    devices = [system.device(1, iommu=number, pasid_bits=4) for number in (0, 1)]
    space = process(system)
    for device in devices:
        if profile is AUX:
            device.attach(system.paging_domain())
            device.enable_feature("SVA")
        device.bind(space)
        assert device.translate(VA, pasid=space.pasid).pa == RAM
    assert len(space.domains) == 2
    space.table.unmap(VA, 0x1000)
    for device in devices:
        assert not device.translate(VA, pasid=space.pasid)


def test_f33_the_pasid_lives_as_long_as_the_process(system):
    device = able(system, 1)
    space = process(system)
    bond = device.bind(space)
    pasid = bond.pasid
    bond.unbind()
    assert bond.pasid == 0 and space.pasid == pasid and pasid in system.pasids
    assert space.domains == {} and len(system.pasids) == 1
    again = device.bind(space)
    assert again.pasid == pasid
    again.unbind()
    space.exit()
    assert pasid not in system.pasids and space.pasid == 0


def test_f34_after_an_exit_devices_are_refused_without_events(system):
    device = able(system, 1, ats=True)
    space = process(system)
    bond = device.bind(space)
    pasid = bond.pasid
    assert device.translate(VA, pasid=pasid).pa == RAM
    seen = []
    device.iommu.writer.observer = lambda *_: seen.append(
        system.smmu.translate(1, VA + 0x5000, ssid=pasid).fault.name
    )
    space.exit()
    device.iommu.writer.observer = None
    result = device.translate(VA, pasid=pasid)
    assert (result.action, result.fault.name, result.event) == ("abort", "F_TRANSLATION", None)
    assert set(seen) == {"F_TRANSLATION"}  # never C_BAD_CD: the CD stays valid
    table = device.master.table
    cd = layout.unpack("CD", system.memory.read(table.address(pasid), 64))
    assert (cd["V"], cd["EPD0"], cd["TTB0"], cd["S"], cd["R"], cd["T0SZ"]) == (1, 1, 0, 0, 0, 0)
    assert len(device.atcs[0]) == 0
    refused(errno.EINVAL, device.bind, space)
    bond.unbind()
    assert not device.translate(VA, pasid=pasid)
    assert pasid not in system.pasids


def test_f35_a_change_of_the_process_reaches_every_device(system):
    devices = [able(system, sid, ats=True) for sid in (1, 2)]
    space = process(system, pages=8)
    for device in devices:
        device.bind(space)
        assert device.access(VA + 0x3000, pasid=space.pasid).pa == RAM + 0x3000
        assert len(device.atcs[0]) == 1
    space.table.unmap(VA + 0x3000, 0x1000)
    for device in devices:
        assert len(device.atcs[0]) == 0
        assert not device.translate(VA + 0x3000, pasid=space.pasid)
        assert device.translate(VA + 0x4000, pasid=space.pasid).pa == RAM + 0x4000


def test_f35_tables_that_somebody_else_writes(systems):
    system = systems(caches=Caches.server)
    device = able(system, 1)
    memory = system.memory
    l0, l1, l2, l3 = (RAM + 0x10_0000 + 0x1000 * n for n in range(4))
    for table, index, entry in ((l0, 254, l1 | 3), (l1, 0, l2 | 3), (l2, 0, l3 | 3),
                                (l3, 0, RAM | 0x743)):  # fmt: skip
        memory.write_u64(table + 8 * index, entry)
    space = AddressSpace(l0)
    device.bind(space)
    assert device.translate(VA + 4, pasid=space.pasid).pa == RAM + 4
    memory.write_u64(l3, (RAM + 0x1000) | 0x743)
    space.invalidate(VA, VA + 0xFFF)
    assert device.translate(VA + 4, pasid=space.pasid).pa == RAM + 0x1004
    refused(errno.EINVAL, space.invalidate, 5, 4)


@pytest.mark.parametrize(
    ("features", "cpu", "able_to"),
    [({}, {}, True), ({"cohacc": 0}, {}, False), ({"oas": 2}, {"pa_bits": 44}, False),
     ({"asid16": 0}, {}, False), ({"asid16": 0}, {"asid_bits": 8}, True),
     ({"gran64k": 0}, {"granule": 65536}, False), ({}, {"granule": 65536, "va_bits": 52}, True),
     ({}, {"va_bits": 52}, False), ({"bbml": 1}, {"bbml2": True}, False),
     ({"s1p": 1, "bbml": 1}, {}, True)],
)  # fmt: skip
def test_f36_sva_needs_an_smmu_that_walks_the_processors_tables(systems, features, cpu, able_to):
    if features.get("oas") == 2:
        features = {**features, "ds": 0, "vax": 0}
    system = systems(features=Features.full().replace(**features), cpu=Cpu(**cpu))
    assert system.iommus[0].has_sva == able_to
    device = system.device(1, pasid_bits=4)
    space = AddressSpace(RAM)
    if able_to:
        device.bind(space)
    else:
        refused(errno.EOPNOTSUPP, device.bind, space)
        assert space.pasid == 0


def test_f37_the_old_profile_enables_sva_first_and_guards_it(systems):
    system = systems(profile=AUX)
    device = system.device(1, pasid_bits=8, stall=True)
    main = system.paging_domain()
    device.attach(main)
    space = process(system)
    refused(errno.EINVAL, device.bind, space)
    refused(errno.EINVAL, device.enable_feature, "SVA")  # faults of this device need IOPF first
    device.enable_feature("IOPF")
    device.enable_feature("SVA")
    refused(errno.EBUSY, device.disable_feature, "IOPF")
    bond = device.bind(space)
    refused(errno.EBUSY, device.disable_feature, "SVA")
    refused(errno.EBUSY, device.replace, system.paging_domain())
    bond.unbind()
    refused(errno.EBUSY, device.detach, main)
    device.disable_feature("SVA")
    device.disable_feature("IOPF")
    device.detach(main)


def test_f37_devices_of_one_main_domain_share_the_cd(systems):
    system = systems(profile=AUX, caches=Caches.server)
    one = able(system, 1)
    two = system.device(2, pasid_bits=8)
    two.attach(one.domain)
    two.enable_feature("SVA")
    space = process(system)
    first, second = one.bind(space), two.bind(space)
    first.unbind()
    assert two.translate(VA, pasid=space.pasid).pa == RAM
    second.unbind()
    assert not two.translate(VA, pasid=space.pasid)


def test_sva_and_auxiliary_domains_share_one_space_of_pasids(systems):
    system = systems(profile=AUX, caches=Caches.server)
    device = able(system, 1)
    device.enable_feature("AUX")
    aux, space = system.paging_domain(), process(system)
    device.attach_aux(aux)
    device.bind(space)
    other = system.paging_domain()
    device.attach_aux(other)
    pasids = [aux.pasid(device), space.pasid, other.pasid(device)]
    assert pasids == [1, 2, 3]
    aux.map(VA, RAM + 0x1000, 0x1000)
    assert device.translate(VA, pasid=1).pa == RAM + 0x1000
    assert device.translate(VA, pasid=2).pa == RAM
    assert not device.translate(VA, pasid=3)


@pytest.mark.parametrize("policy", ["per device", "system wide", "strict"])
def test_f20_f21_f22_one_process_on_a_wide_and_a_narrow_accelerator(systems, policy):
    from smmufast.iommu import PER_DEVICE

    value = {"per device": PER_DEVICE, "system wide": SYSTEM_WIDE, "strict": SYSTEM_WIDE_STRICT}
    system = systems(
        features=[Features.full(), Features.full().replace(ssidsize=4)],
        pasid_policy=value[policy],
    )
    wide = system.device(1, pasid_bits=16)
    narrow = system.device(1, pasid_bits=4, iommu=1)
    tiny = system.device(2, pasid_bits=2, iommu=1)
    crowd = [process(system) for _ in range(4)]
    for space in crowd:
        wide.bind(space)
    space = crowd[-1]
    assert space.pasid == 4
    narrow.bind(space)
    if policy == "strict":
        assert tiny.max_pasids == 0
        refused(errno.ENOSPC, tiny.bind, space)  # refused early: it has no PASIDs at all
    else:
        refused(errno.EOVERFLOW, tiny.bind, space)
    many = [process(system) for _ in range(12)]
    if policy == "per device":
        for one in many:
            wide.bind(one)
        refused(errno.EOVERFLOW, narrow.bind, many[-1])
    else:
        for one in many[:11]:
            wide.bind(one)
            narrow.bind(one)
        refused(errno.ENOSPC, wide.bind, many[11])


def test_f47_a_processes_asid_is_shared_and_a_private_domain_moves_away(systems):
    system = systems(profile=AUX, caches=Caches.server)
    device = able(system, 1)
    main = device.domain
    main.map(0x1000, RAM + 0x5000, 0x1000)
    assert device.translate(0x1000).asid == main.asid
    held = main.asid
    space = process(system, asid=held)
    seen = []
    device.iommu.writer.observer = lambda *_: seen.append(system.smmu.translate(1, 0x1000).pa)
    bond = device.bind(space)
    device.iommu.writer.observer = None
    assert set(seen) == {RAM + 0x5000}  # the private domain moved while it worked
    assert main.asid != held and system.asids.find(held) is space
    assert device.translate(VA, pasid=space.pasid).asid == held
    assert device.translate(0x1000).asid == main.asid
    other = process(system, asid=held)
    refused(errno.EINVAL, device.bind, other)
    none = process(system, asid=0)
    refused(errno.ESRCH, device.bind, none)
    bond.unbind()
    assert held not in system.asids
    device.bind(other)
    assert device.translate(VA, pasid=other.pasid).asid == held


def test_f47_no_asid_is_left_to_move_to(systems):
    system = systems(profile=AUX, features=Features.full().replace(asid16=0),
                     cpu=Cpu(asid_bits=8))  # fmt: skip
    device = able(system, 1)
    main = device.domain
    others = [system.asids.alloc() for _ in range(254)]
    space = process(system, asid=main.asid)
    before = snapshot(system)
    refused(errno.ENOSPC, device.bind, space)
    assert snapshot(system) == before and len(others) == 254


def test_f35_the_tables_of_a_captured_kernel_are_an_address_space(systems):
    """A device of ours, bound to what a Linux kernel mapped for its own, goes where that did."""
    configuration = Capture.load(SHIPPED)[0]
    memory, theirs = configuration.memory(), configuration.smmu()
    memory.add_private(1 << 40, 1 << 30)
    system = systems(memory=memory, pages=(1 << 40, 1 << 30), caches=Caches.server)
    device = system.device(8, pasid_bits=8)
    spaces = {}
    agreed = 0
    for request in configuration.requests[::40]:
        sid, iova = int(request["sid"]), int(request["iova"])
        found = theirs.translate(sid, iova, trace=True)
        contexts = [fetch for fetch in found.fetches if fetch.kind == "CD"]
        if not found or not contexts:
            continue
        cd = layout.unpack("CD", contexts[0].data)
        if cd["TTB0"] not in spaces:
            space = AddressSpace(
                cd["TTB0"], t0sz=cd["T0SZ"], tg=cd["TG0"], ps=cd["IPS"], irgn=cd["IR0"],
                orgn=cd["OR0"], sh=cd["SH0"], mair=cd["MAIR0"] | cd["MAIR1"] << 32,
            )  # fmt: skip
            spaces[cd["TTB0"]] = device.bind(space)
        bond = spaces[cd["TTB0"]]
        ours = device.translate(iova, pasid=bond.pasid)
        assert (ours.pa, ours.page_size) == (found.pa, found.page_size)
        agreed += 1
    assert agreed > 100 and len(spaces) > 5
