"""Main domains: topology, attach, replace, detach, groups, PASIDs (F1-F14, F24-F30, F38-F41)."""

import errno

import pytest
from driverhalf import refused, snapshot, words

from smmufast import Caches, Features, layout
from smmufast.iommu import (
    BLOCKED,
    IDENTITY,
    AddressSpace,
    AttachHandle,
    Busy,
    Device,
    InvalidArgument,
    IommuError,
    NestedDomain,
    NoDevice,
    NoEntry,
    NotSupported,
    OutOfMemory,
    OutOfRange,
    Prot,
    System,
    Viommu,
)

RAM = 0x8000_0000
PROFILES_OF_CACHES = [None, Caches.server, Caches.small]


@pytest.fixture(params=PROFILES_OF_CACHES, ids=["none", "server", "small"])
def system(request, systems):
    return systems(caches=request.param)


def ste(device, sid=None):
    iommu = device.iommu
    sid = device.sid if sid is None else sid
    data = iommu.memory.read(iommu.ste_address(sid), 64)
    return layout.unpack("STE", data)


def cd(device, ssid):
    table = device.cd_table
    address = table.address(ssid)
    return None if address is None else layout.unpack("CD", device.iommu.memory.read(address, 64))


# --- topology ---


def test_f01_the_driver_takes_its_limits_from_the_registers(systems):
    full = systems().iommus[0]
    assert (full.ssid_bits, full.sid_bits, full.asids.bits, full.vmids.bits) == (
        20, 32, 16, 16,
    )  # fmt: skip
    assert full.geometry(1) == {"granule": 4096, "ias": 48, "oas": 48, "fwb": False}
    assert full.geometry(2) == {"granule": 4096, "ias": 48, "oas": 48, "fwb": True}
    assert full.geometry(1, 65536)["ias"] == 52
    small = Features.minimal().replace(s1p=1, ssidsize=3, cd2l=0)
    iommu = systems(features=small).iommus[0]
    assert (iommu.ssid_bits, iommu.asids.bits, iommu.vmids.bits) == (3, 8, 8)
    refused(errno.EOPNOTSUPP, iommu.geometry, 2)
    refused(errno.EOPNOTSUPP, iommu.geometry, 1, 16384)
    refused(errno.EINVAL, iommu.geometry, 1, 8192)


@pytest.mark.parametrize(
    ("pasids", "ssidsize", "cd2l", "bits"),
    [(0, 20, 1, 0), (1, 20, 1, 0), (2, 20, 1, 1), (5, 20, 1, 2), (1 << 20, 20, 1, 20),
     (1 << 20, 8, 1, 8), (1 << 16, 20, 0, 10), (256, 20, 0, 8)],
)  # fmt: skip
def test_f02_pasid_bits_are_the_smaller_of_device_and_smmu(systems, pasids, ssidsize, cd2l, bits):
    system = systems(features=Features.full().replace(ssidsize=ssidsize, cd2l=cd2l))
    assert system.device(1, pasids=pasids).ssid_bits == bits


@pytest.mark.parametrize(
    ("pasids", "ssidsize", "most"), [(0, 20, 0), (5, 20, 4), (1 << 20, 20, 1 << 20), (300, 8, 256)]
)
def test_f03_max_pasids_is_the_smaller_of_device_and_smmu(systems, pasids, ssidsize, most):
    system = systems(features=Features.full().replace(ssidsize=ssidsize))
    device = system.device(1, pasids=pasids)
    assert device.max_pasids == most
    assert device.pasid_enabled == (most > 0)


def test_f04_probe_refuses_what_it_cannot_place(systems):
    system = systems(features=Features.full().replace(sidsize=16))
    device = system.device([3, 3, 4])  # a bridge repeats its own
    assert device.sids == (3, 4)
    before = snapshot(system)
    refused(errno.ERANGE, system.device, 1 << 16)
    refused(errno.ERANGE, system.device, -1)
    refused(errno.ENODEV, system.device, [7, 4])
    refused(errno.ENODEV, system.device, 9, iommu=1)
    refused(errno.EBUSY, system.probe, device)
    nowhere = Device(())
    refused(errno.ENOENT, system.probe, nowhere)
    refused(errno.ENOENT, nowhere.attach, IDENTITY)
    refused(errno.ENODEV, Device(77).attach, IDENTITY)
    assert snapshot(system) == before
    assert 7 not in system.iommus[0].devices


def test_f04_every_stream_of_a_device_follows_its_domain(system):
    device = system.device([0x10, 0x111, 0x20000])
    domain = device.paging_domain()
    device.attach(domain)
    domain.map(0x1000, RAM, 0x1000)
    for sid in device.sids:
        assert device.translate(0x1234, sid=sid).pa == RAM + 0x234
    device.release()
    for sid in (0x10, 0x111, 0x20000):
        assert system.smmu.translate(sid, 0x1234).action == "abort"


@pytest.mark.rule("S3.9.2-2")
def test_f05_pasids_go_on_before_ats_and_off_after_it(systems):
    system = systems()
    device = system.device(1, pasid_bits=4, ats=True)
    assert device.pasid_enabled
    device.attach(device.paging_domain())
    assert device.ats_enabled
    refused(errno.EINVAL, device.disable_pasid)
    refused(errno.EINVAL, device.enable_pasid)
    assert device.pasid_enabled
    atc = device.atcs[0]
    device.release()
    assert not device.pasid_enabled and not device.ats_enabled
    assert atc.sid not in system.smmu.devices


@pytest.mark.parametrize("sidsize", [6, 8, 16, 32])
def test_f06_new_streams_abort(systems, sidsize):
    features = Features.full().replace(sidsize=sidsize, st_level=int(sidsize > 6))
    system = systems(features=features)
    system.device(3)
    for sid in (3, 4, 63):
        result = system.smmu.translate(sid, 0x1000)
        assert (result.action, result.event) == ("abort", None)
    old = systems(features=features, disable_bypass=False)
    old.device(3)
    assert old.smmu.translate(4, 0x1000).action == "bypass"


# --- main domains ---


def test_f07_every_kind_of_domain_translates_as_its_name_says(system):
    device = system.device(8, pasid_bits=4)
    assert device.domain is BLOCKED
    assert device.translate(0x5000).action == "abort"
    device.attach(IDENTITY)
    assert device.translate(0x5000).pa == 0x5000
    one = device.paging_domain()
    assert one.stage == 1
    device.replace(one)
    one.map(0x5000, RAM, 0x1000)
    assert device.translate(0x5678).pa == RAM + 0x678
    assert device.translate(0x6000).event.name == "F_TRANSLATION"
    two = device.paging_domain(stage=2)
    assert two.stage == 2
    device.replace(two)
    two.map(0x5000, RAM + 0x10000, 0x1000)
    assert device.translate(0x5678).pa == RAM + 0x10678
    device.replace(BLOCKED)
    assert device.translate(0x5678).action == "abort"
    only2 = System(features=Features.full().replace(s1p=0, ssidsize=0))
    assert only2.device(1).paging_domain().stage == 2


def test_f07_a_guest_has_its_own_stage_1_over_the_hosts_stage_2(system):
    device = system.device(8, pasid_bits=4, ats=True)
    host = device.paging_domain(nest_parent=True)
    host.map(0x4000_0000, RAM, 1 << 21)
    viommu = Viommu(host)
    viommu.add(0x77, device)
    bypass = viommu.domain((0b1001, 0))
    device.attach(bypass)
    assert device.translate(0x4000_1234).pa == RAM + 0x1234
    # the guest's own CD and tables, written by the guest into its memory
    guest = {"CD": RAM, "L1": RAM + 0x1000, "L2": RAM + 0x2000, "L3": RAM + 0x3000}
    ipa = {name: address - RAM + 0x4000_0000 for name, address in guest.items()}
    memory = system.memory
    memory.write(guest["CD"], layout.to_bytes("CD", layout.pack(
        "CD", V=1, AA64=1, T0SZ=25, EPD1=1, IPS=5, R=1, A=1, ASID=7, ASET=1, MAIR0=0xFF,
        TTB0=ipa["L1"])))  # fmt: skip
    memory.write_u64(guest["L1"], ipa["L2"] | 3)
    memory.write_u64(guest["L2"], ipa["L3"] | 3)
    memory.write_u64(guest["L3"] + 8 * 5, 0x4000_8000 | 0x743)
    nested = viommu.domain((layout.pack("STE", V=1, Config=5, S1ContextPtr=ipa["CD"]), 0))
    device.replace(nested)
    result = device.translate(0x5678)
    assert (result.pa, result.stage, result.asid, result.vmid) == (RAM + 0x8678, 3, 7, viommu.vmid)
    # the guest unmaps, and says so in its own words
    memory.write_u64(guest["L3"] + 8 * 5, 0)
    command = layout.pack("TLBI_NH_VA", ASID=7, Address=0x5000, Leaf=1)
    assert viommu.invalidate([(command & (1 << 64) - 1, command >> 64)]) == 1
    assert device.translate(0x5678).event.name == "F_TRANSLATION"
    host.unmap(0x4000_0000, 1 << 21)
    assert device.translate(0x5678).event.name in ("F_TRANSLATION", "F_STE_FETCH")
    device.detach(nested)
    assert device.translate(0x5678).action == "abort"
    host.free()


def test_f07_a_guest_can_say_only_what_concerns_it(systems):
    system = systems()
    device = system.device(8)
    host = device.paging_domain(nest_parent=True)
    viommu = Viommu(host)
    viommu.add(1, device)
    device.attach(viommu.domain((0b1001, 0)))
    before = system.iommus[0].queue.issued
    for command in (
        0x04,
        0x46,
        0x30 | 0xFF00_0000_0000,
        0x20,
        0x03 | 1 << 32,
        0x40 | 2 << 32,
        0xEE,
    ):
        if command & 0xFF == 0x30:
            continue  # is a guest's right: its own VMID alone
        refused(errno.EIO, viommu.invalidate, [(0x10, 0), (command, 0)])
    assert system.iommus[0].queue.issued == before
    assert viommu.invalidate([(0x30, 0), (0x05 | 1 << 32, 1), (0x40 | 1 << 32, 52)]) == 3
    refused(errno.EEXIST, viommu.add, 1, device)
    refused(errno.ENOENT, viommu.remove, 2)
    refused(errno.EINVAL, NestedDomain, device.paging_domain(), (1, 0))
    refused(errno.EINVAL, viommu.domain, (1 | 6 << 1, 0))  # stage 2 is the host's
    refused(errno.EINVAL, viommu.domain, (1 | 5 << 1, 1 << 40))
    refused(errno.EINVAL, viommu.domain, (1,))


def test_f08_paging_flags_that_contradict_the_hardware_are_refused(systems):
    device = systems().device(1)
    unsupported = errno.EOPNOTSUPP
    for flags in (
        {"nest_parent": True, "dirty": True}, {"nest_parent": True, "pasid": True},
        {"stage": 2, "dirty": True}, {"stage": 2, "pasid": True}, {"user_data": b""},
        {"nest_parent": True, "stage": 1},
    ):  # fmt: skip
        refused(unsupported, device.paging_domain, **flags)
    for flags, stage in (({}, 1), ({"nest_parent": True}, 2), ({"dirty": True}, 1),
                         ({"pasid": True}, 1), ({"dirty": True, "pasid": True}, 1)):  # fmt: skip
        assert device.paging_domain(**flags).stage == stage
    only1 = systems(features=Features.full().replace(s2p=0)).device(1)
    refused(unsupported, only1.paging_domain, nest_parent=True)
    only2 = systems(features=Features.full().replace(s1p=0, ssidsize=0)).device(1)
    refused(unsupported, only2.paging_domain, pasid=True)
    refused(unsupported, only2.paging_domain, dirty=True)
    plain = systems(features=Features.full().replace(httu=1)).device(1)
    refused(unsupported, plain.paging_domain, dirty=True)


def test_f09_attach_refuses_with_the_kernels_numbers(systems):
    system = systems(2)
    device, other = system.device(1), system.device(1, iommu=1)
    first, second = device.paging_domain(), device.paging_domain()
    device.attach(first)
    before = snapshot(system)
    refused(errno.EBUSY, device.attach, second)
    refused(errno.EBUSY, device.attach, first)
    refused(errno.EINVAL, other.attach, second)
    refused(errno.EINVAL, device.attach, "domain")
    assert snapshot(system) == before
    device.replace(first)  # the same again: nothing is done
    assert snapshot(system) == before
    group = system.group()
    pair = [system.device(sid, group=group) for sid in (4, 5)]
    refused(errno.EINVAL, pair[0].attach, IDENTITY)
    group.attach(IDENTITY)
    assert [one.domain for one in pair] == [IDENTITY, IDENTITY]
    second.free()
    refused(errno.EINVAL, other.attach, second)


def test_f09_resetting_the_same_domain_sends_nothing(systems):
    system = systems()
    device = system.device(1)
    domain = device.paging_domain()
    device.attach(domain)
    issued = system.iommus[0].queue.issued
    device.replace(domain)
    assert system.iommus[0].queue.issued == issued


def test_f10_stage_2_cannot_carry_pasids_but_bypass_and_abort_can(system):
    device = system.device(1, pasid_bits=6)
    main, sub = device.paging_domain(), device.paging_domain()
    device.attach(main)
    sub.map(0x7000, RAM, 0x1000)
    device.attach_pasid(sub, 5)
    two = device.paging_domain(stage=2)
    host = device.paging_domain(nest_parent=True)
    before = snapshot(system)
    refused(errno.EBUSY, device.replace, two)
    refused(errno.EBUSY, device.replace, NestedDomain(host, (0b1001, 0)))
    assert snapshot(system) == before
    device.replace(IDENTITY)
    assert (ste(device)["Config"], ste(device)["S1DSS"]) == (5, 1)
    assert device.translate(0x7000).pa == 0x7000
    assert device.translate(0x7000, pasid=5).pa == RAM
    device.replace(BLOCKED)
    assert (ste(device)["Config"], ste(device)["S1DSS"]) == (5, 0)
    assert not device.translate(0x7000)
    assert device.translate(0x7000, pasid=5).pa == RAM
    device.detach_pasid(sub, 5)
    device.replace(two)


def test_f11_a_failed_attach_leaves_every_device_of_the_group_as_it_was(systems):
    system = systems(caches=Caches.server)
    group = system.group()
    devices = [system.device(sid, pasid_bits=4, group=group) for sid in (1, 2, 3)]
    domain = devices[0].paging_domain()
    nth = 0
    while True:
        before = snapshot(system)
        system.pages.fail_after(nth)
        try:
            group.attach(domain)
        except OutOfMemory:
            assert snapshot(system) == before
            for device in devices:
                assert device.translate(0x1000).action == "abort"
            nth += 1
        else:
            break
        finally:
            system.pages.fail_after(None)
    assert nth == 3  # a CD table each
    assert all(device.domain is domain for device in devices)
    old = group.domain
    foreign = systems(2).device(9, iommu=1).paging_domain()
    before = snapshot(system)
    with pytest.raises(InvalidArgument):
        group.set(foreign)
    assert snapshot(system) == before and group.domain is old


def test_f12_detach_puts_the_default_back_and_warns_of_the_wrong_domain(systems):
    for default, pa in (("blocked", None), ("identity", 0x9000), ("paging", None)):
        system = systems(default_domain=default)
        device = system.device(1)
        behind = device.domain
        domain = device.paging_domain()
        device.attach(domain)
        before = snapshot(system)
        with pytest.warns(UserWarning, match="not attached"):
            device.detach(IDENTITY if behind is not IDENTITY else BLOCKED)
        assert snapshot(system) == before
        assert device.detach(domain) is None
        assert device.domain is behind
        assert device.translate(0x9000).pa == pa
    group = system.group()
    for sid in (4, 5):
        shared = system.device(sid, group=group)
    with pytest.warns(UserWarning, match="shares its group"):
        shared.detach(shared.domain)


def test_f12_an_owned_group_is_blocked_in_between(systems):
    system = systems(default_domain="identity")
    device = system.device(1)
    group = device.group
    group.claim("vfio")
    assert device.domain is BLOCKED
    refused(errno.EBUSY, group.claim, "another")
    domain = device.paging_domain()
    device.attach(domain)
    device.detach(domain)
    assert device.domain is BLOCKED
    group.release()
    assert device.domain is IDENTITY
    device.attach(domain)
    refused(errno.EBUSY, group.claim, "vfio")


def test_f13_a_coherent_domain_refuses_a_device_that_cannot_snoop(systems):
    system = systems()
    device = system.device(1, coherent=False, pasid_bits=4)
    domain = device.paging_domain()
    domain.enforce_cache_coherency()
    before = snapshot(system)
    refused(errno.EINVAL, device.attach, domain)
    refused(errno.EINVAL, device.attach_pasid, domain, 1)
    assert snapshot(system) == before
    system.device(2).attach(domain)


def test_f14_a_device_with_direct_memory_is_not_blocked(systems):
    for default in ("blocked", "paging"):
        system = systems(default_domain=default)
        device = system.device(1, direct=[(0x9000_0000, 0x2000)])
        assert device.translate(0x9000_1000).pa == 0x9000_1000
        before = snapshot(system)
        refused(errno.EINVAL, device.replace, BLOCKED)
        assert snapshot(system) == before


# --- PASIDs, NOW profile ---


def test_f24_a_pasid_is_refused_with_the_kernels_numbers(systems):
    system = systems()
    device = system.device(1, pasid_bits=4)
    plain = system.device(2)
    main, sub = device.paging_domain(), device.paging_domain()
    device.attach(main)
    device.attach_pasid(sub, 3)
    before = snapshot(system)
    refused(errno.ENODEV, Device(9, pasid_bits=4).attach_pasid, sub, 1)
    for domain in (IDENTITY, BLOCKED, NestedDomain(device.paging_domain(nest_parent=True), (9, 0))):
        refused(errno.EOPNOTSUPP, device.attach_pasid, domain, 1)
    before = snapshot(system)
    refused(errno.EINVAL, device.attach_pasid, sub, 0)
    refused(errno.EINVAL, device.attach_pasid, sub, 16)
    refused(errno.EINVAL, device.attach_pasid, sub, -1)
    refused(errno.EINVAL, plain.attach_pasid, sub, 1)
    refused(errno.EBUSY, device.attach_pasid, sub, 3)
    refused(errno.EBUSY, device.attach_pasid, main, 3)
    refused(errno.EINVAL, device.attach_pasid, "domain", 1)
    assert snapshot(system) == before


def test_f24_a_narrow_member_bounds_the_group_and_one_without_pasids_does_not(systems):
    system = systems()
    group = system.group()
    wide = system.device(1, pasid_bits=8, group=group)
    system.device(2, group=group)
    sub = wide.paging_domain()
    wide.attach_pasid(sub, 255)
    system.device(3, pasid_bits=8, group=group)
    narrow = system.device(4, pasid_bits=20, group=group)
    assert narrow.translate(0, pasid=255).event.name == "F_TRANSLATION"
    system2 = systems()
    group = system2.group()
    wide = system2.device(1, pasid_bits=8, group=group)
    system2.device(2, pasid_bits=2, group=group)
    refused(errno.EINVAL, wide.attach_pasid, wide.paging_domain(), 4)
    wide.attach_pasid(wide.paging_domain(), 3)


def test_f24_a_device_that_is_being_reset_takes_nothing_and_gets_all_back(system):
    device = system.device(1, pasid_bits=4)
    main, sub = device.paging_domain(), device.paging_domain()
    device.attach(main)
    device.attach_pasid(sub, 2)
    main.map(0x1000, RAM, 0x1000)
    sub.map(0x1000, RAM + 0x1000, 0x1000)
    device.reset_prepare()
    assert not device.translate(0x1000) and not device.translate(0x1000, pasid=2)
    refused(errno.EBUSY, device.attach_pasid, sub, 3)
    refused(errno.EBUSY, device.replace, IDENTITY)
    refused(errno.EBUSY, device.reset_prepare)
    device.reset_done()
    assert device.translate(0x1000).pa == RAM
    assert device.translate(0x1000, pasid=2).pa == RAM + 0x1000
    refused(errno.EINVAL, device.reset_done)


def test_f25_what_the_smmu_refuses_for_a_pasid(systems):
    system = systems(2)
    device = system.device(1, pasid_bits=12)
    two = device.paging_domain(stage=2)
    foreign = system.device(1, iommu=1).paging_domain()
    sub = device.paging_domain()
    before = snapshot(system)
    refused(errno.EINVAL, device.attach_pasid, two, 1)
    refused(errno.EINVAL, device.attach_pasid, foreign, 1)
    for nth in range(3):
        system.pages.fail_after(nth)
        if nth < 2:  # the table, and the leaf
            refused(errno.ENOMEM, device.attach_pasid, sub, 1)
    system.pages.fail_after(None)
    assert {k: v for k, v in snapshot(system).items() if k != "pages"} == {
        k: v for k, v in before.items() if k != "pages"
    }
    assert snapshot(system)["pages"] == before["pages"]
    device.attach(two)
    refused(errno.EINVAL, device.attach_pasid, sub, 1)


def test_f25_one_domain_on_many_pasids_and_devices_and_as_main_domain(system):
    devices = [system.device(sid, pasid_bits=12) for sid in (1, 2)]
    domain = devices[0].paging_domain()
    domain.map(0x3000, RAM, 0x1000)
    for device in devices:
        device.attach(domain)
        for pasid in (1, 2, 1023, 1024, 4095):
            device.attach_pasid(domain, pasid)
            assert device.translate(0x3000, pasid=pasid).pa == RAM
    assert domain.users == 12
    domain.unmap(0x3000, 0x1000)
    for device in devices:
        for pasid in (None, 1, 2, 1023, 1024, 4095):
            assert device.translate(0x3000, pasid=pasid).event.name == "F_TRANSLATION"


@pytest.mark.parametrize("main", [IDENTITY, BLOCKED], ids=["identity", "blocked"])
def test_f26_the_first_pasid_turns_a_plain_ste_into_a_table_and_the_last_turns_it_back(
    system, main
):
    device = system.device(1, pasid_bits=4, ats=True)
    device.replace(main)
    plain = words(system.memory, device.iommu.ste_address(1))
    sub = device.paging_domain()
    sub.map(0x1000, RAM, 0x1000)
    seen = []

    def look(address, index, old):
        result = system.smmu.translate(1, 0x5000)
        seen.append((result.action, result.pa, result.event))

    device.iommu.writer.observer = look
    device.attach_pasid(sub, 1)
    device.attach_pasid(sub, 2)
    assert device.ats_enabled
    assert ste(device)["Config"] == 5
    assert device.translate(0x1000, pasid=2).pa == RAM
    device.detach_pasid(sub, 1)
    assert ste(device)["Config"] == 5
    device.detach_pasid(sub, 2)
    device.iommu.writer.observer = None
    assert words(system.memory, device.iommu.ste_address(1)) == plain
    assert not device.ats_enabled
    assert seen
    if main is IDENTITY:  # hitless: at every store the stream bypasses
        assert {(action, pa) for action, pa, _ in seen} <= {("ok", 0x5000), ("bypass", 0x5000)}
    else:
        assert {action for action, _, _ in seen} == {"abort"}


def test_f26_a_stage_1_main_domain_keeps_its_ste(systems):
    system = systems()
    device = system.device(1, pasid_bits=4)
    device.attach(device.paging_domain())
    before = words(system.memory, device.iommu.ste_address(1))
    sub = device.paging_domain()
    device.attach_pasid(sub, 1)
    assert words(system.memory, device.iommu.ste_address(1)) == before
    device.detach_pasid(sub, 1)
    assert words(system.memory, device.iommu.ste_address(1)) == before


def test_f27_replacing_a_pasid_shows_the_old_or_the_new_and_keeps_the_old_on_failure(system):
    device = system.device(1, pasid_bits=4)
    device.attach(device.paging_domain())
    one, two = device.paging_domain(), device.paging_domain()
    one.map(0x1000, RAM, 0x1000)
    two.map(0x1000, RAM + 0x1000, 0x1000)
    handle = AttachHandle()
    refused(errno.EINVAL, device.replace_pasid, one, 1, AttachHandle())
    device.attach_pasid(one, 1, handle)
    before = snapshot(system)
    refused(errno.EINVAL, device.replace_pasid, two, 1, None)
    refused(errno.EINVAL, device.replace_pasid, two, 1, handle)
    refused(errno.EINVAL, device.replace_pasid, two, 0, AttachHandle())
    refused(errno.EINVAL, device.replace_pasid, two, 2, AttachHandle())
    refused(errno.EINVAL, device.replace_pasid, device.paging_domain(stage=2), 1, AttachHandle())
    assert {k: v for k, v in snapshot(system).items() if k not in ("pages", ("ids", 0))} == {
        k: v for k, v in before.items() if k not in ("pages", ("ids", 0))
    }
    seen = []
    device.iommu.writer.observer = lambda *_: seen.append(
        system.smmu.translate(1, 0x1000, ssid=1).pa
    )
    fresh = AttachHandle()
    device.replace_pasid(two, 1, fresh)
    device.iommu.writer.observer = None
    # ASID and TTB0 lie in two dwords: the CD is invalid in between, and never torn
    assert seen and set(seen) <= {RAM, None, RAM + 0x1000}
    assert device.translate(0x1000, pasid=1).pa == RAM + 0x1000
    assert (handle.domain, fresh.domain, device.handle(1)) == (None, two, fresh)
    assert (one.users, two.users) == (0, 1)


def test_f28_detach_blocks_the_pasid_and_the_wrong_domain_is_an_error(system):
    device = system.device(1, pasid_bits=4)
    device.attach(device.paging_domain())
    one, two = device.paging_domain(), device.paging_domain()
    one.map(0x1000, RAM, 0x1000)
    device.attach_pasid(one, 1)
    assert device.translate(0x1000, pasid=1).pa == RAM
    before = snapshot(system)
    refused(errno.EINVAL, device.detach_pasid, two, 1)
    refused(errno.EINVAL, device.detach_pasid, one, 2)
    assert snapshot(system) == before
    assert device.detach_pasid(one, 1) is None
    assert device.translate(0x1000, pasid=1).event.name == "C_BAD_CD"
    assert one.users == 0


def test_f29_a_group_attaches_a_pasid_on_all_devices_or_on_none(systems):
    system = systems(caches=Caches.server)
    group = system.group()
    devices = [system.device(sid, pasid_bits=12, group=group) for sid in (1, 2, 3)]
    domain = devices[0].paging_domain()
    domain.map(0x1000, RAM, 0x1000)
    nth = 0
    while True:
        before = snapshot(system)
        system.pages.fail_after(nth)
        try:
            devices[1].attach_pasid(domain, 1500)
        except OutOfMemory:
            assert snapshot(system) == before
            assert domain.users == 0
            nth += 1
        else:
            break
        finally:
            system.pages.fail_after(None)
    assert nth == 6  # a table and a leaf each
    for device in devices:
        assert device.translate(0x1000, pasid=1500).pa == RAM
    devices[2].detach_pasid(domain, 1500)
    for device in devices:
        assert not device.translate(0x1000, pasid=1500)


def test_f30_the_handle_of_a_pasid_is_found_by_kind(systems):
    device = systems().device(1, pasid_bits=4)
    domain = device.paging_domain()

    class Mine(AttachHandle):
        data = 5

    handle = Mine()
    refused(errno.ENOENT, device.handle, 1)
    device.attach_pasid(domain, 1, handle)
    device.attach_pasid(domain, 2)
    assert device.handle(1) is handle and handle.domain is domain
    assert device.handle(1, "paging") is handle
    refused(errno.EBUSY, device.handle, 1, "sva")
    assert device.handle(2) is domain
    refused(errno.EINVAL, device.attach_pasid, domain, 3, handle)
    device.detach_pasid(domain, 1)
    assert handle.domain is None
    refused(errno.ENOENT, device.handle, 1)


# --- CD tables ---


@pytest.mark.parametrize("cd2l", [0, 1])
@pytest.mark.parametrize("bits", [0, 1, 9, 10, 11, 16, 20])
def test_f38_the_cd_table_is_linear_up_to_1024_entries(systems, bits, cd2l):
    system = systems(features=Features.full().replace(cd2l=cd2l))
    device = system.device(1, pasid_bits=bits)
    device.attach(device.paging_domain())
    entry = ste(device)
    wide = bits if cd2l else min(bits, 10)
    assert entry["S1CDMax"] == wide
    assert entry["S1Fmt"] == (2 if wide > 10 else 0)
    last = (1 << wide) - 1
    if wide:
        domain = device.paging_domain()
        domain.map(0x1000, RAM, 0x1000)
        device.attach_pasid(domain, last)
        assert device.translate(0x1000, pasid=last).pa == RAM
        if last < (1 << 20) - 1:
            assert device.translate(0x1000, pasid=last + 1).event.name == "C_BAD_SUBSTREAMID"


def test_f39_leaves_are_lazy_and_their_descriptor_is_invalidated_without_leaf(systems):
    system = systems(caches=Caches.server)
    device = system.device(1, pasid_bits=16)
    device.attach(device.paging_domain())
    table = device.cd_table
    assert list(table.leaves) == [0]
    domain = device.paging_domain()
    assert device.translate(0, pasid=5000).event.name == "C_BAD_SUBSTREAMID"
    assert table.address(5000) is None  # to look is not to allocate
    in_use = system.pages.in_use
    queue = system.iommus[0].queue
    queue.log = []
    device.attach_pasid(domain, 5000)
    named = [(name, fields) for name, fields in queue.log if name == "CFGI_CD"]
    queue.log = None
    assert [fields["Leaf"] for _, fields in named] == [0, *[1] * (len(named) - 1)]
    assert all(fields["SubstreamID"] == 5000 for _, fields in named)
    assert system.pages.in_use == in_use + 65536
    device.detach_pasid(domain, 5000)
    assert system.pages.in_use == in_use + 65536  # clearing frees no leaf
    device.release()
    domain.free()


def test_f40_each_device_has_its_own_cd_table(system):
    one, two = (system.device(sid, pasid_bits=4) for sid in (1, 2))
    main, sub = one.paging_domain(), one.paging_domain()
    one.attach(main)
    two.attach(main)
    sub.map(0x1000, RAM, 0x1000)
    one.attach_pasid(sub, 1)
    assert one.cd_table.base != two.cd_table.base
    assert one.translate(0x1000, pasid=1).pa == RAM
    assert not two.translate(0x1000, pasid=1)
    assert cd(one, 0)["ASID"] == cd(two, 0)["ASID"] == main.asid


def test_f41_used_substreams_are_counted_by_validity_and_zero_is_not(systems):
    system = systems()
    device = system.device(1, pasid_bits=4)
    device.attach(device.paging_domain())
    table = device.cd_table
    assert table.used == 0
    one, two = device.paging_domain(), device.paging_domain()
    device.attach_pasid(one, 1)
    device.attach_pasid(one, 2)
    assert table.used == 2
    device.replace_pasid(two, 1, AttachHandle())
    assert table.used == 2
    device.detach_pasid(two, 1)
    device.detach_pasid(one, 2)
    assert table.used == 0
    refused(errno.E2BIG, table.place, 16)


# --- identifiers, ends ---


def test_f46_asids_are_one_space_and_vmids_each_smmus_own(systems):
    system = systems(2, features=Features.full().replace(asid16=0, vmid16=0))
    one, two = system.device(1), system.device(1, iommu=1)
    domains = [(one if n % 2 else two).paging_domain() for n in range(255)]
    assert sorted(domain.asid for domain in domains) == list(range(1, 256))
    in_use = system.pages.in_use
    refused(errno.EBUSY, one.paging_domain)
    assert system.pages.in_use == in_use
    domains.pop().free()
    one.paging_domain()
    assert [device.paging_domain(stage=2).vmid for device in (one, two)] == [1, 1]


def test_f48_an_asid_is_invalidated_before_it_is_used_again(systems):
    system = systems(caches=Caches.server, features=Features.full().replace(asid16=0))
    device = system.device(1)
    for turn in range(600):  # more than there are ASIDs
        domain = device.paging_domain()
        domain.map(0x1000, RAM + 0x1000 * turn, 0x1000)
        device.attach(domain)
        assert device.translate(0x1000).pa == RAM + 0x1000 * turn
        device.detach(domain)
        domain.free()
    assert len(system.asids) == 0


def test_a_domain_in_use_is_not_freed_and_a_freed_one_not_used(systems):
    system = systems()
    start = system.pages.in_use
    device = system.device(1)
    domain = device.paging_domain()
    device.attach(domain)
    refused(errno.EBUSY, domain.free)
    device.detach(domain)
    domain.map(0x1000, RAM, 0x1000)
    domain.free()
    domain.free()
    refused(errno.EINVAL, device.attach, domain)
    with pytest.raises(IommuError):
        domain.map(0x1000, RAM, 0x1000)
    device.release()
    assert system.pages.in_use == start + 64 * 256  # the leaf of the stream table stays


def test_mapping_is_for_paging_domains(systems):
    refused(errno.EINVAL, IDENTITY.map, 0, 0, 0x1000)
    assert (IDENTITY.iova_to_phys(0x1234), BLOCKED.iova_to_phys(0x1234)) == (0x1234, 0)
    assert IDENTITY.unmap(0, 0x1000) == 0


def test_f50_permissions_reach_the_device(system):
    device = system.device(1)
    domain = device.paging_domain()
    device.attach(domain)
    domain.map(0x1000, RAM, 0x1000, Prot.READ)
    domain.map(0x2000, RAM, 0x1000, Prot.READ | Prot.WRITE | Prot.NOEXEC)
    domain.map(0x3000, RAM, 0x1000, Prot.READ | Prot.WRITE | Prot.PRIV)
    assert device.translate(0x1000) and not device.translate(0x1000, write=True)
    assert device.translate(0x2000, write=True) and not device.translate(0x2000, instr=True)
    assert device.translate(0x3000, priv=True) and not device.translate(0x3000)


# --- ATS ---


def test_f66_ats_is_on_only_where_smmu_and_device_have_it_and_never_for_a_plain_ste(systems):
    system = systems()
    device = system.device(1, ats=True, pasid_bits=4)
    assert (device.ats_enabled, ste(device)["EATS"]) == (False, 0)
    device.replace(IDENTITY)
    assert (device.ats_enabled, ste(device)["EATS"]) == (False, 0)
    domain = device.paging_domain()
    device.replace(domain)
    assert (device.ats_enabled, ste(device)["EATS"]) == (True, 1)
    device.attach_pasid(domain, 1)
    device.replace(IDENTITY)
    assert (device.ats_enabled, ste(device)["EATS"], ste(device)["S1DSS"]) == (True, 1, 1)
    device.detach_pasid(domain, 1)
    assert (device.ats_enabled, ste(device)["EATS"]) == (False, 0)
    without = systems(features=Features.full().replace(ats=0, pri=0, atsrecerr=0))
    plain = without.device(1, ats=True)
    plain.attach(plain.paging_domain())
    assert (plain.ats_enabled, ste(plain)["EATS"]) == (False, 0)
    refused(errno.EINVAL, Device, 5, pri=True)


def test_f67_the_order_of_an_attach_with_ats(systems):
    system = systems(caches=Caches.server)
    device = system.device(1, ats=True, pasid_bits=4)
    queue = system.iommus[0].queue
    one = device.paging_domain()
    one.map(0x1000, RAM, 0x1000)

    def names(call, *arguments):
        queue.log = []
        call(*arguments)
        log, queue.log = queue.log, None
        return [name for name, _ in log if name != "SYNC"]

    on = names(device.attach, one)
    # the CD, the STE, then the ATC before ATS goes on
    assert on[0] == "CFGI_CD" and on[-1] == "ATC_INV"
    assert "CFGI_STE" in on and "ATC_INV" not in on[:-1]
    assert device.access(0x1000).pa == RAM
    two = device.paging_domain()
    two.map(0x1000, RAM + 0x1000, 0x1000)
    stays = names(device.replace, two)
    assert stays.index("CFGI_CD") < stays.index("ATC_INV") < stays.index("TLBI_NH_ASID")
    assert device.access(0x1000).pa == RAM + 0x1000
    states = []
    device.iommu.writer.observer = lambda *_: states.append(device.ats_enabled)
    device.replace(BLOCKED)
    device.iommu.writer.observer = None
    assert states and not any(states)  # off in the device before the STE says so
    assert len(device.atcs[0]) == 0


def test_f67_both_domains_are_invalidated_while_one_takes_over(systems):
    system = systems(caches=Caches.server)
    device = system.device(1)
    one, two = device.paging_domain(), device.paging_domain()
    for domain, pa in ((one, RAM), (two, RAM + 0x1000)):
        domain.map(0x1000, pa, 0x1000)
    device.attach(one)
    queue = system.iommus[0].queue
    told = []

    def look(address, index, old):
        system.iommus[0].writer.observer = None
        queue.log = []
        one.flush(0, 0xFFF, 12, False)
        two.flush(0, 0xFFF, 12, False)
        told.append({fields["ASID"] for name, fields in queue.log if "ASID" in fields})
        queue.log = None

    system.iommus[0].writer.observer = look
    device.replace(two)
    assert told == [{one.asid, two.asid}]
    assert device.translate(0x1000).pa == RAM + 0x1000


def test_errors_are_builtins_too():
    for kind, builtin in (
        (InvalidArgument, ValueError), (OutOfRange, ValueError), (Busy, RuntimeError),
        (NoDevice, LookupError), (NoEntry, LookupError), (NotSupported, RuntimeError),
        (OutOfMemory, MemoryError),
    ):  # fmt: skip
        error = kind("pasid", 16, "1 to 15")
        assert isinstance(error, builtin) and isinstance(error, IommuError)
        assert str(error) == "pasid must be 1 to 15, not 16"
        assert (error.argument, error.value, error.limit) == ("pasid", 16, "1 to 15")


def test_f47_a_domain_changes_its_asid_wherever_it_is_attached(system):
    device, other = system.device(1, pasid_bits=4, ats=True), system.device(2, pasid_bits=4)
    domain = device.paging_domain()
    domain.map(0x1000, RAM, 0x1000)
    device.attach(domain)
    device.attach_pasid(domain, 3)
    other.attach_pasid(domain, 5)
    places = ((device, None), (device, 3), (other, 5))
    for one, pasid in places:
        assert one.translate(0x1000, pasid=pasid).pa == RAM
    old = domain.asid
    with device.iommu.watch((1, 0x1000, None), (1, 0x1000, 3), (2, 0x1000, 5)) as seen:
        domain.change_asid()
    assert domain.asid != old and old not in system.asids
    assert len(seen) == 3 and all(one.pa == RAM for results in seen for one in results)
    assert [cd(device, 0)["ASID"], cd(device, 3)["ASID"], cd(other, 5)["ASID"]] == [domain.asid] * 3
    domain.unmap(0x1000, 0x1000)
    for one, pasid in places:
        assert not one.translate(0x1000, pasid=pasid)
    with pytest.raises(InvalidArgument, match="no ASID"):
        device.paging_domain(stage=2).change_asid()


def test_f44_no_moment_of_a_replace_shows_a_torn_entry(system):
    device = system.device(8, pasid_bits=4)
    one, two = device.paging_domain(), device.paging_domain()
    host = device.paging_domain(stage=2)
    for number, domain in enumerate((one, two, host)):
        domain.map(0x1000, RAM + number * 0x1000, 0x1000)
    domains = IDENTITY, BLOCKED, one, two, host
    for old in domains:
        for new in domains:
            if old is new:
                continue
            device.replace(old)
            before = device.translate(0x1000).pa
            with device.iommu.watch((8, 0x1000, None)) as seen:
                device.replace(new)
            after = device.translate(0x1000).pa
            assert seen and before != after
            results = [result for (result,) in seen]
            found = [result.pa for result in results]
            if {old, new} <= {one, two, host}:
                # what differs lies in two dwords, ASID and TTB0 of the CD, or Config and S2VMID of
                # the STE, which stage 1 uses too: the entry is invalid in between
                assert {None, after} <= set(found) <= {before, None, after}
                event = "C_BAD_STE" if host in (old, new) else "C_BAD_CD"
                assert all(r.event.name == event for r in results if r.pa is None)
            else:
                assert set(found) <= {before, after}
                assert all(result.event is None for result in results)
            # once it is new it stays so
            assert found == sorted(found, key=lambda pa: pa == after)


def test_f07_a_guest_that_sends_nonsense_is_refused(systems):
    system = systems()
    device, other = system.device(1), system.device(2)
    host = device.paging_domain(nest_parent=True)
    viommu = Viommu(host)
    viommu.add(1, device)
    issued = device.iommu.queue.issued
    for commands in (5, [5], [(1, 2, 3)], [(-1, 0)], [("a", 0)], [(1 << 64, 0)]):
        refused(errno.EINVAL, viommu.invalidate, commands)
    for commands in ([(0x12, 0), (0xEE, 0)], [(0x46, 0)], [(0x05 | 5 << 32, 0)]):
        refused(errno.EIO, viommu.invalidate, commands)
    assert device.iommu.queue.issued == issued
    viommu.add(2, other)
    other.release()
    issued = device.iommu.queue.issued
    refused(errno.EIO, viommu.invalidate, [(0x05 | 2 << 32, 0)])
    assert device.iommu.queue.issued == issued
    host.free()
    refused(errno.EINVAL, viommu.invalidate, [(0x12, 0)])


@pytest.mark.parametrize("ats", [False, True])
@pytest.mark.parametrize("stall", [False, True])
def test_f66_a_device_that_stalls_and_has_ats_has_legal_entries(systems, ats, stall):
    """EATS and S2S exclude each other: with ATS, stage 2 does not stall."""
    device = systems().device(8, pasid_bits=4, ats=ats, stall=stall)
    host = device.paging_domain(nest_parent=True)
    guest = Viommu(host).domain((0b1001, 0))
    domains = [device.paging_domain(), device.paging_domain(stage=2), host, guest]
    for number, domain in enumerate(domains, 1):
        iova = 0x1000 * number
        (host if domain is guest else domain).map(iova, RAM, 0x1000)
        device.replace(domain)
        assert device.translate(iova).pa == RAM
        if device.ats_enabled:
            assert device.access(iova).pa == RAM


def test_what_belongs_to_another_system_is_refused(systems):
    one, other = systems(), systems()
    device, strange = one.device(1, pasid_bits=4), other.device(1, pasid_bits=4)
    domain = device.paging_domain()
    refused(errno.EINVAL, strange.attach, domain)
    refused(errno.EINVAL, strange.attach_pasid, domain, 1)
    refused(errno.EBUSY, strange.bind, AddressSpace.of(one))
    refused(errno.EINVAL, lambda: other.device(5, group=device.group))
    refused(errno.EBUSY, other.probe, device)
    assert 5 not in other.iommus[0].devices and len(device.group.devices) == 1
