"""SMMUs that the driver takes over at boot, later, or not at all."""

import pytest
from rawfeatures import raw_of

from smmufast import Caches, Features, Memory, Smmu
from smmufast.iommu import (
    EVERY_SMMU,
    IDENTITY,
    PER_DEVICE,
    SYSTEM_WIDE,
    SYSTEM_WIDE_STRICT,
    AddressSpace,
    Busy,
    Exists,
    InputOutput,
    InvalidArgument,
    Iommu,
    IommuError,
    NotSupported,
    OutOfMemory,
    PasidPolicy,
    System,
)

FULL = Features.full()
NARROW = FULL.replace(ssidsize=8)
NO_PASIDS = FULL.replace(ssidsize=0)
REFUSES = PasidPolicy("none late", system_wide=True, refuse_late=True)
PAGE = 0x1000


def shown(system):
    """What a refused call must leave as it was."""
    return (
        len(system.iommus), system.pages.in_use, system.pages.blocks, system.asids.bits,
        list(system.asids), list(system.pasids), list(system.pasids._smmu_limits),
        [iommu.smmu.save() for iommu in system.iommus],
    )  # fmt: skip


def refused(system, error, *arguments, **more):
    before = shown(system)
    with pytest.raises(error) as caught:
        system.add_iommu(*arguments, **more)
    assert type(caught.value) is error
    assert shown(system) == before
    return caught.value


def reaches(device, pasid=None):
    """Whether what is mapped in a domain of its own is what the device reaches."""
    domain = device.paging_domain()
    if pasid is None:
        device.attach(domain)
    else:
        device.attach_pasid(domain, pasid)
    domain.map(0x10000, 0x2000_0000, PAGE)
    return device.translate(0x10008, pasid=pasid).pa == 0x2000_0008


# --- an SMMU that is added ---


@pytest.mark.parametrize("made", [False, True])
def test_an_smmu_is_added_to_a_running_system_and_serves_its_devices(systems, made):
    system = systems(caches=Caches.server)
    first = system.device(8, pasid_bits=8)
    assert reaches(first)
    if made:
        mine = Smmu(system.memory, FULL, cr0=0, caches=Caches.server())
        iommu = system.add_iommu(smmu=mine)
        assert iommu.smmu is mine
    else:
        iommu = system.add_iommu(FULL, caches=Caches.server)
    assert (iommu.number, system.iommus[1], len(system.iommus)) == (1, iommu, 2)
    second = system.device(8, pasid_bits=8, iommu=1)
    assert second.iommu is iommu
    assert reaches(second)
    assert reaches(second, 7)
    process = AddressSpace.of(system)
    process.table.map(0x7000_0000, 0x3000_0000, PAGE)
    for device in (first, second):
        device.bind(process)
        assert device.translate(0x7000_0001, pasid=process.pasid).pa == 0x3000_0001
    process.table.unmap(0x7000_0000, PAGE)
    for device in (first, second):
        assert device.translate(0x7000_0001, pasid=process.pasid).pa is None
    assert system.device(9, iommu=2 - 1).iommu.number == 1


def test_what_is_added_is_checked_before_anything_changes():
    system = System()
    mine = system.smmu
    alien = Smmu(Memory(), FULL, cr0=0)
    assert refused(system, InvalidArgument, smmu=alien).argument == "smmu"
    refused(system, Exists, smmu=mine)
    for wrong in ({"features": 3}, {"smmu": 3}, {"caches": 3}):
        with pytest.raises(TypeError):
            system.add_iommu(**wrong)
    more = Smmu(system.memory, FULL, cr0=0)
    for name, value in (("features", FULL), ("caches", Caches)):
        assert refused(system, InvalidArgument, smmu=more, **{name: value}).argument == name
    before = more.save()
    refused(system, NotSupported, smmu=Smmu(system.memory, FULL.replace(ttendian=3), cr0=0))
    assert more.save() == before
    with pytest.raises(Exists):
        System(smmu=[more, more], pages=(1 << 44, 1 << 30))


@pytest.mark.parametrize("fails", range(4))
def test_an_smmu_for_whose_tables_no_page_is_left_stays_as_it_was(fails):
    system = System(pasid_policy=SYSTEM_WIDE)
    mine = Smmu(system.memory, NARROW.replace(asid16=0), cr0=0)
    before = mine.save(), mine.on_interrupt
    system.pages.fail_after(fails)
    refused(system, OutOfMemory, smmu=mine)
    assert (mine.save(), mine.on_interrupt) == before
    system.pages.fail_after(None)
    assert system.add_iommu(smmu=mine).ssid_bits == 8
    assert reaches(system.device(1, pasid_bits=8, iommu=1), 200)


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_an_smmu_that_does_not_come_up_is_left_alone(monkeypatch, nth):
    system = System()
    mine = Smmu(system.memory, FULL, cr0=0)
    heard = []
    mine.on_interrupt = heard.append
    written = []
    update = Iommu._update

    def fail(self, register, value):
        written.append(register)
        if len(written) == nth:
            raise InputOutput(register)
        update(self, register, value)

    monkeypatch.setattr(Iommu, "_update", fail)
    refused(system, InputOutput, smmu=mine)
    assert (mine.on_interrupt, mine.read("CR0")) == (heard.append, 0)


def test_wide_asids_in_use_keep_out_an_smmu_with_narrow_ones():
    system = System()
    assert system.asids.bits == 16
    for _ in range(255):
        system.asids.alloc("a domain")
    wide = system.asids.alloc("one more")
    error = refused(system, Busy, FULL.replace(asid16=0))
    assert (error.argument, error.value, wide) == ("asid", 256, 256)
    system.asids.free(wide)
    system.add_iommu(FULL.replace(asid16=0))
    assert system.asids.bits == 8
    with pytest.raises(Busy, match="all of 1 to 255 are taken"):
        system.asids.alloc()


# --- its PASIDs ---


def test_f21_an_smmu_without_pasids_takes_none_from_the_others():
    for policy, limit in ((SYSTEM_WIDE, 1 << 8), (EVERY_SMMU, 0), (PER_DEVICE, 1 << 20)):
        system = System(features=[FULL, NO_PASIDS, NARROW], pasid_policy=policy)
        wide, none, narrow = (system.device(1, pasid_bits=20, iommu=i) for i in range(3))
        assert (wide.max_pasids, none.max_pasids) == (limit, 0)
        assert narrow.max_pasids == min(limit, 1 << 8)


def test_f21_before_the_first_device_an_smmu_that_is_added_joins_the_minimum(recwarn):
    system = System(pasid_policy=SYSTEM_WIDE)
    for bits in (12, 8, 16):
        assert system.add_iommu(FULL.replace(ssidsize=bits)).ssid_bits == bits
    assert [
        system.device(1, pasid_bits=20, iommu=i).max_pasids for i in range(4)
    ] == [256] * 4  # fmt: skip
    assert not recwarn


@pytest.mark.parametrize("policy", [SYSTEM_WIDE, SYSTEM_WIDE_STRICT, EVERY_SMMU])
def test_f21_devices_of_a_narrower_smmu_that_comes_late_have_no_pasids(policy):
    system = System(pasid_policy=policy)
    wide = system.device(1, pasid_bits=20)
    assert reaches(wide, 1000)
    with pytest.warns(RuntimeWarning) as told:
        late = system.add_iommu(NARROW)
    assert len(told) == 1
    for part in (repr(policy.name), "256 PASIDs (8 bits)", "1048576 PASIDs (20 bits)"):
        assert part in str(told[0].message)
    device = system.device(1, pasid_bits=20, iommu=late.number)
    assert (device.max_pasids, device.ssid_bits) == (0, 0)
    assert late.why_no_pasids(1 << 20) in str(told[0].message)
    assert reaches(device)
    with pytest.raises(IommuError):
        device.attach_pasid(device.paging_domain(), 1)
    with pytest.raises(IommuError):
        device.bind(AddressSpace.of(system))
    assert system.device(2, pasid_bits=20).max_pasids == 1 << 20  # the others go on


def test_f21_a_narrower_smmu_that_comes_late_is_refused_where_the_policy_says_so(recwarn):
    system = System(pasid_policy=REFUSES)
    system.add_iommu(FULL.replace(ssidsize=16))
    system.device(1, pasid_bits=20)
    error = refused(system, NotSupported, NARROW)
    for part in (repr(REFUSES.name), "256 PASIDs (8 bits)", "65536 PASIDs (16 bits)"):
        assert part in str(error)
    assert system.add_iommu(NO_PASIDS).ssid_bits == 0  # it has none to lose
    late = system.add_iommu(FULL)
    assert system.device(1, pasid_bits=20, iommu=late.number).max_pasids == 1 << 16
    assert not recwarn


def test_f20_per_device_a_late_smmu_has_the_pasids_that_it_has(recwarn):
    system = System()
    assert reaches(system.device(1, pasid_bits=20), 1000)
    late = system.add_iommu(NARROW)
    device = system.device(1, pasid_bits=20, iommu=late.number)
    assert device.max_pasids == 256
    assert reaches(device, 255)
    assert not recwarn


@pytest.mark.parametrize("policy", [PER_DEVICE, SYSTEM_WIDE, SYSTEM_WIDE_STRICT, EVERY_SMMU])
@pytest.mark.parametrize("features", [FULL, NARROW, NO_PASIDS, FULL.replace(cd2l=0)])
def test_f03_max_pasids_is_a_power_of_two_that_the_cd_table_holds(policy, features):
    system = System(features=[features, FULL], pasid_policy=policy)
    iommu = system.iommus[0]
    width = {20: 20, 8: 8, 0: 0}[features.ssidsize]
    width = width if features.cd2l else 10
    for pasids in (0, 1, 2, 3, 5, 8, 255, 256, 257, 1000, 1024, 1025, (1 << 20) - 1, 1 << 20):
        bits = max((b for b in range(21) if 1 << b <= pasids and b <= width), default=0)
        limit = system.pasids.limit
        most = 0 if policy.strict and 1 << bits < limit else min(1 << bits, limit)
        most = most if most > 1 else 0
        assert iommu.pasids_of(pasids) == (bits if most else 0, most)
        why = iommu.why_no_pasids(pasids)
        assert bool(why) == (not most), why
        by_policy = pasids > 1 and width > 0
        assert (policy.name in why) == (not most and by_policy)


# --- what the driver cannot serve ---

UNSERVED = {
    "TTENDIAN": {"ttendian": 3},
    "TABLES_PRESET": {"tables_preset": 1},
    "QUEUES_PRESET": {"queues_preset": 1, "ecmdq": 0},
    "REL": {"rel": 1, "tables_preset": 0, "queues_preset": 0},
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("field", UNSERVED)
def test_f01_what_the_driver_cannot_serve_is_refused_at_boot_with_the_reason(field, late):
    features = raw_of(FULL, **UNSERVED[field])
    if late:
        error = refused(System(), NotSupported, features)
    else:
        with pytest.raises(NotSupported) as caught:
            System(features=features)
        error = caught.value
    assert error.argument == "smmu"
    assert f"{field} is {max(UNSERVED[field].values())}" in str(error)


@pytest.mark.parametrize("ttendian", [0, 2])
def test_f01_little_endian_tables_are_served(systems, ttendian):
    assert reaches(systems(features=FULL.replace(ttendian=ttendian)).device(1))


@pytest.mark.parametrize("late", [False, True])
def test_f01_tables_that_the_smmu_cannot_reach_are_refused(late):
    small = FULL.replace(oas=0)
    memory = Memory()
    memory.add_private(0, 1 << 40)
    where = {"memory": memory, "pages": (0xFFF0_0000, 0x20_0000)}
    with pytest.raises(NotSupported, match=r"32 bits \(OAS\).* reach to 0x1000fffff") as caught:
        if late:
            System(**where).add_iommu(small)
        else:
            System(features=small, **where)
    assert caught.value.argument == "smmu"
    system = System(features=small, memory=memory, pages=(0xF000_0000, 0x1000_0000))
    device = system.device(1)
    device.attach(IDENTITY)
    assert device.translate(0x5000).pa == 0x5000
