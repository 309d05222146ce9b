"""The proposal of 2018 and the reply to it, S1 to S12: docs/domains.md says what each asks."""

import pytest

from smmufast import Caches, Memory, Smmu
from smmufast.ats import AtsFault
from smmufast.iommu import (
    AUX,
    IDENTITY,
    NOW,
    AddressSpace,
    Busy,
    InvalidArgument,
    System,
    VirtualCommand,
)

RAM = 0x8000_0000
PAGE = 0x1000


def aux_system(**more):
    """A system of the AUX profile, and a device with a main domain."""
    system = System(profile=AUX, caches=Caches.server)
    device = system.device(8, pasid_bits=6, **more)
    device.attach(system.paging_domain())
    return system, device


# --- S1 ---


@pytest.mark.parametrize("way", ["enable_feature", "init"])
def test_s01_enabling_aux_enables_pasids(way):
    system = System(profile=AUX)
    device = system.device(8, pasid_bits=6)
    device.disable_pasid()
    if way == "init":
        device.init(["AUX"])
    else:
        device.enable_feature("AUX")
    assert device.pasid_enabled


def test_s01_a_device_whose_pasids_are_off_sends_none():
    system, device = aux_system(ats=False)
    device.enable_feature("AUX")
    domain = system.paging_domain()
    device.attach_aux(domain)
    domain.map(PAGE, RAM, PAGE)
    with pytest.raises(Busy):
        device.disable_pasid()  # an auxiliary domain is attached
    device.detach_aux(domain)
    device.disable_pasid()
    for call in (
        lambda: device.translate(PAGE, pasid=1), lambda: device.access(PAGE, pasid=1),
        lambda: device.translate_batch([PAGE], pasid=1),
        lambda: device.translate_batch([PAGE], pasid=[1]),
        lambda: device.translate_range(PAGE, 1, pasid=1),
        lambda: device.start_walk(PAGE, pasid=1),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match="PASIDs are off"):
            call()


def test_s01_what_is_enabled_is_not_enabled_again():
    _, device = aux_system()
    device.enable_feature("AUX", max_pasid=5)
    with pytest.raises(Busy):
        device.init(["AUX"], min_pasid=10)
    assert device.enabled_features == {"AUX": (1, 5)}


def test_s01_iopf_comes_first_whichever_way_sva_is_enabled():
    _, device = aux_system(stall=True)
    with pytest.raises(InvalidArgument, match="IOPF"):
        device.enable_feature("SVA")
    with pytest.raises(InvalidArgument, match="IOPF"):
        device.init()
    assert device.enabled_features == {}
    device.init(["IOPF"])
    assert set(device.enabled_features) == {"SVA", "IOPF"}


# --- S5 ---


def test_s05_processes_and_auxiliary_domains_take_pasids_from_one_space():
    system, device = aux_system()
    device.enable_feature("AUX")
    device.enable_feature("SVA")
    taken = []
    for n in range(10):
        domain, process = system.paging_domain(), AddressSpace.of(system)
        device.attach_aux(domain)
        device.bind(process)
        domain.map(PAGE, RAM + 2 * n * PAGE, PAGE)
        process.table.map(PAGE, RAM + (2 * n + 1) * PAGE, PAGE)
        taken += [domain.pasid(device), process.pasid]
        assert system.pasids.find(taken[-2]) is domain
        assert system.pasids.find(taken[-1]) is process
    assert taken == list(range(1, 21))
    for n, pasid in enumerate(taken):
        assert device.translate(PAGE, pasid=pasid).pa == RAM + n * PAGE


# --- S9 ---


def test_s09_a_guest_gets_a_pasid_before_any_device_is_known():
    host, guest = System(), System()
    assert VirtualCommand(host.pasids).register(guest.pasids)
    pasid = guest.pasids.alloc()
    assert pasid in host.pasids
    guest.pasids.free(pasid)
    assert pasid not in host.pasids


# --- S10 ---


def test_s10_two_shares_of_one_parent_have_one_domain():
    system, device = aux_system()
    device.enable_feature("AUX")
    domain = system.paging_domain()
    one, other = device.mediated(), device.mediated()
    one.attach(domain)
    other.attach(domain)
    domain.map(PAGE, RAM, PAGE)
    assert one.pasid == other.pasid == domain.pasid(device)
    assert device.shares == [one, other] and domain.users == 1
    one.detach()
    assert (one.pasid, one.domain) == (None, None)
    assert other.translate(PAGE).pa == RAM
    other.detach()
    assert domain.users == 0 and device.aux == {}
    assert device.translate(PAGE, pasid=domain.pasid(device)).pa is None


@pytest.mark.parametrize("profile", [AUX, NOW])
def test_s10_nobody_detaches_behind_the_back_of_a_share(profile):
    if profile is AUX:
        system, device = aux_system()
        device.enable_feature("AUX")
        domain = system.paging_domain()
    else:
        system = System(caches=Caches.server)
        device = system.device(8, pasid_bits=6)
        domain = device.paging_domain()
    share = device.mediated()
    share.attach(domain)
    domain.map(PAGE, RAM, PAGE)
    with pytest.raises(Busy):
        if profile is AUX:
            device.detach_aux(domain)
        else:
            device.detach_pasid(domain, share.pasid)
    assert share.translate(PAGE).pa == RAM
    if profile is AUX:
        device.shutdown()
        assert share.domain is None
    device.release()
    assert share.domain is None
    domain.free()
    assert len(system.pasids) == 0


def test_s10_a_share_makes_every_kind_of_access():
    _, device = aux_system()
    device.enable_feature("AUX")
    domain = device.system.paging_domain()
    share = device.mediated()
    with pytest.raises(InvalidArgument):
        share.access(PAGE)
    share.attach(domain)
    domain.map(PAGE, RAM, 2 * PAGE)
    assert share.access(PAGE, write=True).pa == RAM
    assert share.translate(PAGE, priv=True).pa == RAM
    assert share.translate_batch([PAGE, 2 * PAGE])["pa"].tolist() == [RAM, RAM + PAGE]
    assert list(share.translate_range(PAGE, 2 * PAGE)) == [(PAGE, RAM, 2 * PAGE)]
    assert share.start_walk(PAGE).result.pa == RAM  # the caches have it: no fetch


# --- S11 ---


@pytest.mark.parametrize("stage", [1, 2])
def test_s11_the_hardware_half_walks_what_the_driver_half_wrote(stage):
    system = System()
    device = system.device(8, pasid_bits=6)
    domain = device.paging_domain(stage=stage)
    device.attach(domain)
    for n in range(64):
        domain.map(n << 21, RAM + (n * 7 % 64 << 21), 1 << 21)
    found = device.translate_batch([n << 21 | n for n in range(65)])
    assert found["pa"][:64].tolist() == [RAM + (n * 7 % 64 << 21) | n for n in range(64)]
    assert device.translate(64 << 21).pa is None
    assert all(
        system.smmu.translate(8, n << 21).pa == domain.iova_to_phys(n << 21) for n in range(64)
    )


# --- S12 ---


@pytest.mark.parametrize("ats", [False, True])
def test_s12_after_a_detach_nothing_is_reached(ats):
    system, device = aux_system(ats=ats)
    other = system.device(9, pasid_bits=6, ats=ats)
    other.attach(device.domain)
    device.enable_feature("AUX")
    domain = system.paging_domain()
    device.attach_aux(domain)
    pasid = domain.pasid(device)
    domain.map(PAGE, RAM, PAGE)
    for one in (device, other):  # a CD table has no doors between its devices
        assert one.translate(PAGE, pasid=pasid).pa == RAM
        assert one.access(PAGE, pasid=pasid).pa == RAM
    device.detach_aux(domain)
    for one in (device, other):
        assert one.translate(PAGE, pasid=pasid).pa is None
        if ats:
            with pytest.raises(AtsFault):
                one.access(PAGE, pasid=pasid)
    assert system.stale() == []


@pytest.mark.parametrize("wired", [True, False])
@pytest.mark.parametrize("how", ["stall", "queued", "partial"])
def test_s12_faults_in_flight_do_not_reach_the_next_owner(how, wired):
    memory = Memory()
    memory.add_private(0, 1 << 40)
    # without wires, and with no MSI, nobody tells the driver that something was recorded
    smmu = Smmu(memory, cr0=0, caches=Caches.server(), wired=wired)
    system = System(smmu=smmu, pages=(1 << 39, 1 << 38))
    stall = how == "stall"
    device = system.device(8, pasid_bits=4, stall=stall, ats=not stall, pri=not stall)
    device.attach(IDENTITY)
    asked = []

    def process(name):
        return AddressSpace.of(
            system, handler=lambda fault: asked.append((name, fault.iova)) or False
        )

    old, new = process("old"), process("new")
    bond = device.bind(old)
    pasid = old.pasid
    if stall:
        assert smmu.translate(8, 0x7000, ssid=pasid).action == "stall"
    else:
        smmu.page_request(
            8, 0x7000, ssid=pasid, read=True, last=how == "queued", prg_index=3
        )
    if how == "partial":
        system.service()  # it waits in the driver now
    bond.unbind()
    old.exit()
    device.bind(new)
    assert new.pasid == pasid
    if how == "partial":
        smmu.page_request(8, 0x9000, ssid=pasid, read=True, last=True, prg_index=3)
    system.service()
    assert asked == ([("new", 0x9000)] if how == "partial" else [])
    assert smmu.stalls == []
