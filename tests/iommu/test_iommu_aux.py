"""Auxiliary domains and PASID policies (F15-F23): the AUX profile, as the 2018 proposal had it."""

import errno
import threading

import pytest
from driverhalf import refused, words

from smmufast import Caches, Features, layout
from smmufast.iommu import (
    AUX,
    BLOCKED,
    IDENTITY,
    PER_DEVICE,
    SYSTEM_WIDE,
    SYSTEM_WIDE_STRICT,
    Device,
    OutOfMemory,
)

RAM = 0x8000_0000


@pytest.fixture(params=[None, Caches.server], ids=["none", "server"])
def system(request, systems):
    return systems(caches=request.param, profile=AUX)


def ready(system, sid=1, **more):
    """A device with a main domain of stage 1 and AUX enabled."""
    device = system.device(sid, **({"pasid_bits": 8} | more))
    main = system.paging_domain()
    device.attach(main)
    main.map(0x1000, RAM, 0x1000)
    device.enable_feature("AUX")
    return device, main


def table_bytes(domain):
    """The CD table of a main domain, with its leaves."""
    table = domain.cd_table
    memory = table.iommu.memory
    if not table.fmt:
        return memory.read(table.base, 64 << table.s1cdmax)
    return memory.read(table.base, 8 << (table.s1cdmax - 10)) + b"".join(
        memory.read(leaf, 65536) for leaf in table.leaves.values()
    )


def snapshot(system):
    tables = {}
    for iommu in system.iommus:
        for sid, device in iommu.devices.items():
            tables["ste", sid] = words(system.memory, iommu.ste_address(sid))
            tables["aux", sid] = dict(device.aux)
            tables["features", sid] = dict(device.enabled_features)
            main = device.domain
            if getattr(main, "cd_table", None) is not None:
                tables["cds", sid] = table_bytes(main)
                tables["children", sid] = dict(main.children)
                tables["users", sid] = main.users
        tables["ids"] = len(iommu.asids), len(iommu.vmids)
    tables["pages"] = system.pages.in_use, system.pages.blocks
    tables["pasids"] = len(system.pasids)
    return tables


def test_f15_a_device_has_aux_when_it_has_substreams(systems):
    system = systems(profile=AUX)
    assert system.device(1, pasid_bits=4).has_feature("AUX")
    assert not system.device(2).has_feature("AUX")
    assert not Device(3, pasid_bits=4).has_feature("AUX")  # no SMMU: no error either
    assert not systems().device(1, pasid_bits=4).has_feature("AUX")
    assert not system.device(4, pasid_bits=4).has_feature("no such")
    narrow = systems(profile=AUX, features=Features.full().replace(ssidsize=0))
    assert not narrow.device(1, pasid_bits=4).has_feature("AUX")


def test_f16_enable_refuses_what_is_missing_or_enabled(systems):
    system = systems(profile=AUX)
    device, without = system.device(1, pasid_bits=4), system.device(2)
    refused(errno.ENODEV, without.enable_feature, "AUX")
    refused(errno.EINVAL, device.enable_feature, "no such")
    assert not device.feature_enabled("AUX")
    device.enable_feature("AUX")
    assert device.feature_enabled("AUX")
    refused(errno.EBUSY, device.enable_feature, "AUX")
    refused(errno.ENODEV, Device(7, pasid_bits=4).enable_feature, "AUX")
    refused(errno.EOPNOTSUPP, systems().device(1, pasid_bits=4).enable_feature, "AUX")


def test_f17_disable_is_refused_while_a_domain_is_attached(systems):
    system = systems(profile=AUX)
    device, _ = ready(system)
    aux = system.paging_domain()
    device.attach_aux(aux)
    before = snapshot(system)
    refused(errno.EBUSY, device.disable_feature, "AUX")
    assert snapshot(system) == before
    device.detach_aux(aux)
    device.disable_feature("AUX")
    refused(errno.EINVAL, device.disable_feature, "AUX")


def test_f18_aux_attach_refuses_with_the_kernels_numbers(systems):
    system = systems(2, profile=AUX)
    device = system.device(1, pasid_bits=8)
    aux = system.paging_domain()
    refused(errno.EINVAL, device.attach_aux, aux)  # not enabled
    device.enable_feature("AUX")
    refused(errno.EINVAL, device.attach_aux, aux)  # no main domain
    two = system.paging_domain(stage=2)
    device.attach(two)
    refused(errno.EINVAL, device.attach_aux, aux)  # a parent of stage 2
    device.detach(two)
    main = system.paging_domain()
    device.attach(main)
    before = snapshot(system)
    refused(errno.EINVAL, device.attach_aux, system.paging_domain(stage=2))
    refused(errno.EINVAL, device.attach_aux, IDENTITY)
    refused(errno.EINVAL, device.attach_aux, main)  # it owns a CD table
    refused(errno.EINVAL, aux.pasid, device)  # none before the first attach
    refused(errno.EINVAL, device.detach_aux, aux)
    assert snapshot(system) == before
    device.attach_aux(aux)
    other = system.device(2, pasid_bits=8)
    foreign = system.paging_domain()
    other.attach(foreign)
    other.enable_feature("AUX")
    refused(errno.EINVAL, other.attach_aux, aux)  # another parent
    third = system.device(3, pasid_bits=8)
    refused(errno.EINVAL, third.attach, aux)  # as a main domain
    narrow = system.device(4, pasid_bits=4)
    refused(errno.EINVAL, narrow.attach, main)  # another s1cdmax
    far = system.device(1, iommu=1, pasid_bits=8)
    refused(errno.ENXIO, far.attach, main)
    refused(errno.EBUSY, device.attach_aux, aux)
    refused(errno.EOPNOTSUPP, device.attach_pasid, aux, 9)
    refused(errno.EOPNOTSUPP, systems().device(1, pasid_bits=4).attach_aux, aux)


def test_f18_running_out_of_pasids_is_einval_and_leaves_nothing(systems):
    system = systems(profile=AUX)
    device, _ = ready(system, pasid_bits=2)
    domains = [system.paging_domain() for _ in range(4)]
    for domain in domains[:3]:
        device.attach_aux(domain)
    assert [domain.pasid(device) for domain in domains[:3]] == [1, 2, 3]
    before = snapshot(system)
    refused(errno.EINVAL, device.attach_aux, domains[3])
    assert snapshot(system) == before
    refused(errno.ENODEV, domains[3].map, 0x1000, RAM, 0x1000)


def test_f18_every_allocation_of_an_aux_attach_may_fail(systems):
    system = systems(profile=AUX, caches=Caches.server)
    device, _main = ready(system, pasid_bits=16)
    blocker = system.paging_domain()
    device.enabled_features["AUX"] = (2000, 3000)  # a leaf that is not there yet
    nth = 0
    while True:
        before = snapshot(system)
        system.pages.fail_after(nth)
        try:
            device.attach_aux(blocker)
        except OutOfMemory:
            assert snapshot(system) == before
            nth += 1
        else:
            break
        finally:
            system.pages.fail_after(None)
    assert nth == 2  # the page table and the leaf of CDs
    assert blocker.pasid(device) == 2000


def test_f19_modes_are_sticky(systems):
    system = systems(profile=AUX)
    device, main = ready(system)
    aux = system.paging_domain()
    device.attach_aux(aux)
    device.detach_aux(aux)
    other = system.device(2, pasid_bits=8)
    refused(errno.EINVAL, other.attach, aux)
    other.attach(main)
    other.detach(main)
    refused(errno.EINVAL, device.attach_aux, main)
    device.attach_aux(aux)


def test_f19_every_device_of_a_domain_has_the_same_pasid(system):
    one, main = ready(system)
    two = system.device(2, pasid_bits=8)
    two.attach(main)
    two.enable_feature("AUX")
    aux = system.paging_domain()
    one.attach_aux(aux)
    pasid = aux.pasid(one)
    aux.map(0x1000, RAM + 0x1000, 0x1000)
    # the CD table is the main domain's: every device of the parent can use the PASID
    assert two.translate(0x1000, pasid=pasid).pa == RAM + 0x1000
    two.attach_aux(aux)
    assert aux.pasid(two) == pasid
    one.detach_aux(aux)
    assert two.translate(0x1000, pasid=pasid).pa == RAM + 0x1000
    two.detach_aux(aux)
    assert not two.translate(0x1000, pasid=pasid) and not one.translate(0x1000, pasid=pasid)
    assert aux.pasid(one) == pasid  # until it is freed
    in_space = len(system.pasids)
    aux.free()
    assert len(system.pasids) == in_space - 1


def test_f19_a_page_table_is_built_at_the_first_attach(systems):
    system = systems(profile=AUX)
    device, _ = ready(system)
    aux = system.paging_domain()
    refused(errno.ENODEV, aux.map, 0x1000, RAM, 0x1000)
    assert aux.unmap(0x1000, 0x1000) == 0
    assert aux.iova_to_phys(0x1000) == 0
    device.attach_aux(aux)
    aux.map(0x1000, RAM, 0x1000)
    assert aux.iova_to_phys(0x1234) == RAM + 0x234


def test_f19_domains_are_isolated_and_the_main_domain_does_not_change_by_a_byte(system):
    device, main = ready(system, ats=True)
    ste = words(system.memory, device.iommu.ste_address(1))
    cd0 = words(system.memory, main.cd_table.address(0))
    root = system.memory.read(main.root, 4096)
    before = device.translate(0x1000).pa
    one, two = system.paging_domain(), system.paging_domain()
    device.attach_aux(one)
    device.attach_aux(two)
    one.map(0x10000, RAM + 0x10000, 0x1000)
    two.map(0x20000, RAM + 0x20000, 0x1000)
    p1, p2 = one.pasid(device), two.pasid(device)
    for pasid, iova in ((p1, 0x20000), (p2, 0x10000), (None, 0x10000), (None, 0x20000),
                        (p1, 0x1000), (p2, 0x1000)):  # fmt: skip
        assert device.translate(iova, pasid=pasid).event.name == "F_TRANSLATION"
    assert device.translate(0x10000, pasid=p1).pa == RAM + 0x10000
    assert device.access(0x20000, pasid=p2).pa == RAM + 0x20000
    device.detach_aux(one)
    device.detach_aux(two)
    assert device.translate(0x10000, pasid=p1).event.name == "C_BAD_CD"
    assert words(system.memory, device.iommu.ste_address(1)) == ste
    assert words(system.memory, main.cd_table.address(0)) == cd0
    assert system.memory.read(main.root, 4096) == root
    assert device.translate(0x1000).pa == before


def test_f19_a_parent_is_neither_replaced_nor_freed_under_its_aux_domains(system):
    device, main = ready(system)
    other = system.device(2, pasid_bits=8)
    other.attach(main)
    aux = system.paging_domain()
    device.attach_aux(aux)
    before = snapshot(system)
    for call, argument in ((device.replace, BLOCKED), (device.replace, system.paging_domain()),
                           (device.detach, main)):  # fmt: skip
        refused(errno.EBUSY, call, argument)
    refused(errno.EBUSY, main.free)
    assert snapshot(system) == before
    other.detach(main)  # it has no auxiliary domain
    assert not other.translate(0x1000)
    device.detach_aux(aux)
    device.detach(main)
    refused(errno.EBUSY, main.free)  # the auxiliary domain still names it
    aux.free()
    main.free()


def test_f19_a_device_that_joins_the_parent_is_invalidated_too(systems):
    system = systems(profile=AUX, caches=Caches.server)
    one, main = ready(system, ats=True)
    aux = system.paging_domain()
    one.attach_aux(aux)
    aux.map(0x1000, RAM, 0x1000)
    two = system.device(2, pasid_bits=8, ats=True)
    two.attach(main)
    pasid = aux.pasid(one)
    assert two.access(0x1000, pasid=pasid).pa == RAM
    assert len(two.atcs[0]) == 1
    aux.unmap(0x1000, 0x1000)
    assert len(two.atcs[0]) == 0
    aux.map(0x1000, RAM + 0x1000, 0x1000)
    assert two.access(0x1000, pasid=pasid).pa == RAM + 0x1000
    one.detach_aux(aux)
    assert len(two.atcs[0]) == 0


def test_between_the_cd_write_and_the_atc_invalidation_no_other_attach_gets_in(systems):
    system = systems(profile=AUX, caches=Caches.server)
    device, _main = ready(system, ats=True)
    aux, other = system.paging_domain(), system.paging_domain()
    device.attach_aux(aux)
    aux.map(0x1000, RAM, 0x1000)
    pasid = aux.pasid(device)
    assert device.access(0x1000, pasid=pasid).pa == RAM
    order = []
    threads = []

    def intrude():
        device.attach_aux(other)
        order.append("attached")

    def look(address, index, old):
        if not threads:
            threads.append(threading.Thread(target=intrude))
            threads[0].start()
            threads[0].join(0.2)
            order.append("cd" if threads[0].is_alive() else "too early")

    atc = device.atcs[0]
    invalidate = atc.atc_invalidate

    def told(*arguments):
        order.append("atc")
        return invalidate(*arguments)

    atc.atc_invalidate = told
    device.iommu.writer.observer = look
    device.detach_aux(aux)
    device.iommu.writer.observer = None
    threads[0].join(60)
    assert order[0] == "cd" and order.index("atc") < order.index("attached")
    assert len(atc) == 0
    device.detach_aux(other)


def test_f19_freeing_gives_back_the_pasid_the_asid_and_the_pages(systems):
    system = systems(profile=AUX)
    device, _ = ready(system)
    before = snapshot(system)
    aux = system.paging_domain()
    device.attach_aux(aux)
    for number in range(100):
        aux.map(number << 30, RAM, 0x1000)
    refused(errno.EBUSY, aux.free)
    device.detach_aux(aux)
    aux.free()
    assert snapshot(system) == before


# --- PASID policy ---


def two_widths(systems, policy):
    features = [Features.full(), Features.full().replace(ssidsize=6)]
    system = systems(profile=AUX, features=features, pasid_policy=policy)
    return system, system.device(1, pasid_bits=20), system.device(1, pasid_bits=20, iommu=1)


def test_f20_per_device_bounds_each_by_itself(systems):
    _, wide, narrow = two_widths(systems, PER_DEVICE)
    assert (wide.max_pasids, narrow.max_pasids) == (1 << 20, 64)


def test_f21_system_wide_is_the_minimum_over_all_smmus(systems):
    system, wide, narrow = two_widths(systems, SYSTEM_WIDE)
    assert (wide.max_pasids, narrow.max_pasids) == (64, 64)
    assert system.device(9, pasid_bits=3).max_pasids == 8


def test_f22_strict_switches_narrow_devices_off(systems):
    system, wide, narrow = two_widths(systems, SYSTEM_WIDE_STRICT)
    assert (wide.max_pasids, narrow.max_pasids) == (64, 64)
    off = system.device(9, pasid_bits=3)
    assert (off.max_pasids, off.pasid_enabled) == (0, False)
    refused(errno.ENODEV, off.enable_feature, "AUX")
    now = systems(pasid_policy=SYSTEM_WIDE_STRICT)
    device = now.device(1, pasid_bits=19)
    assert device.max_pasids == 0
    refused(errno.EINVAL, device.attach_pasid, device.paging_domain(), 1)


def test_f23_limits_of_the_device_narrow_what_is_allocated(systems):
    system = systems(profile=AUX)
    device = system.device(1, pasid_bits=8)
    device.attach(system.paging_domain())
    device.enable_feature("AUX", min_pasid=20, max_pasid=21)
    domains = [system.paging_domain() for _ in range(3)]
    device.attach_aux(domains[0])
    device.attach_aux(domains[1])
    assert [domain.pasid(device) for domain in domains[:2]] == [20, 21]
    refused(errno.EINVAL, device.attach_aux, domains[2])
    wide = system.device(2, pasid_bits=8)
    wide.enable_feature("AUX", max_pasid=1 << 19)
    assert wide.enabled_features["AUX"] == (1, 255)
    refused(errno.EINVAL, system.device(3, pasid_bits=8).enable_feature, "AUX", min_pasid=256)


def test_f23_the_proposals_own_entry_points(systems):
    system = systems(profile=AUX)
    device = system.device(1, pasid_bits=8)
    refused(errno.EINVAL, device.init, ["no such"])
    refused(errno.ENODEV, system.device(2).init)
    refused(errno.ENODEV, device.init, ["IOPF"])
    assert device.enabled_features == {}
    device.attach(system.paging_domain())
    device.init(["AUX"], min_pasid=5, max_pasid=9)
    refused(errno.EEXIST, device.init)
    aux = system.paging_domain()
    device.attach_aux(aux)
    assert aux.pasid(device) == 5
    device.shutdown()
    assert (device.aux, device.enabled_features, aux.users) == ({}, {}, 0)
    device.shutdown()
    device.init()


def test_f20_a_later_device_that_is_too_narrow_is_refused(systems):
    system = systems(profile=AUX)
    one, main = ready(system)
    two = system.device(2, pasid_bits=8)
    two.attach(main)
    two.enable_feature("AUX", max_pasid=3)
    domains = [system.paging_domain() for _ in range(4)]
    for domain in domains:
        one.attach_aux(domain)
    two.attach_aux(domains[2])
    before = snapshot(system)
    refused(errno.EOVERFLOW, two.attach_aux, domains[3])
    assert snapshot(system) == before


# --- mediated devices ---


@pytest.mark.parametrize("profile", ["AUX", "NOW"])
def test_a_mediated_device_is_one_pasid_of_its_parent(systems, profile):
    from smmufast import iommu

    system = systems(profile=getattr(iommu, profile), caches=Caches.server)
    device = system.device(1, pasid_bits=8)
    device.attach(system.paging_domain() if profile == "AUX" else device.paging_domain())
    if profile == "AUX":
        device.enable_feature("AUX")
    guests = []
    for number in range(3):
        guest = device.mediated()
        domain = system.paging_domain() if profile == "AUX" else device.paging_domain()
        guest.attach(domain)
        domain.map(0x1000, RAM + 0x1000 * number, 0x1000)
        guests.append(guest)
    assert [guest.pasid for guest in guests] == [1, 2, 3]
    for number, guest in enumerate(guests):
        assert guest.translate(0x1000).pa == RAM + 0x1000 * number
        refused(errno.EBUSY, guest.attach, guest.domain)
    refused(errno.EINVAL, guests[0].detach, guests[1].domain)
    pasid = guests[0].pasid
    guests[0].detach()
    refused(errno.EINVAL, guests[0].detach)
    refused(errno.EINVAL, guests[0].translate, 0x1000)
    assert not device.translate(0x1000, pasid=pasid)
    assert guests[1].translate(0x1000).pa == RAM + 0x1000


def test_the_cd_of_an_aux_domain_is_what_the_appendix_says(systems):
    system = systems(profile=AUX)
    device, main = ready(system)
    aux = system.paging_domain()
    device.attach_aux(aux)
    address = main.cd_table.address(aux.pasid(device))
    entry = layout.unpack("CD", system.memory.read(address, 64))
    wanted = {"V": 1, "AA64": 1, "R": 1, "A": 1, "ASET": 1, "EPD1": 1, "ASID": aux.asid,
              "T0SZ": 16, "TTB0": aux.root, "S": 0, "EPD0": 0}  # fmt: skip
    assert {name: entry[name] for name in wanted} == wanted
