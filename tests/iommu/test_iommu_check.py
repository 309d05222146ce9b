"""`check`: what is planted is found, and healthy systems of every kind have nothing to find."""

import dataclasses

import pytest
from lives import lose

from smmufast import Caches, Features, layout
from smmufast.iommu import (
    AUX,
    IDENTITY,
    NOW,
    AddressSpace,
    Busy,
    System,
    Viommu,
)
from smmufast.iommu.check import KINDS, Finding, check

RAM = 0x8000_0000
PAGE = 0x1000
MASK = (1 << 64) - 1


# --- healthy systems ---


def now_system(**more):
    """Main domains of both stages, PASIDs, processes, a share, a group; two SMMUs."""
    system = System(2, **more)
    nic = system.device(8, pasid_bits=4, ats=True, pri=True)
    gpu = system.device([9, 10], pasid_bits=12)
    disk = system.device(60, iommu=1, stall=True, pasid_bits=3)
    group = system.group()
    pair = [system.device(sid, pasid_bits=2, group=group) for sid in (11, 12)]
    main, other = nic.paging_domain(), gpu.paging_domain()
    main.map(0x1000, RAM, 0x20_0000)
    nic.replace(main)
    gpu.replace(IDENTITY)
    gpu.attach_pasid(other, gpu.max_pasids - 1)
    gpu.attach_pasid(main, 5)
    group.set(other)
    pair[0].attach_pasid(main, 3)
    two = disk.paging_domain(stage=2)
    two.map(0x4000, RAM, PAGE)
    disk.replace(two)
    process = AddressSpace.of(system)
    process.table.map(0x7000, RAM, PAGE)
    gpu.bind(process)
    share = gpu.mediated()
    share.attach(other)
    unbound = AddressSpace.of(system)
    unbound.table.map(0, RAM, PAGE)
    for device, pasid in ((nic, None), (gpu, process.pasid), (gpu, share.pasid), (disk, None)):
        device.translate(0x7000, pasid=pasid)
        device.translate(0x1000, pasid=pasid)
    nic.access(0x1000)
    return system, [nic, gpu, disk, *pair, process, share, unbound]


def aux_system(**more):
    """Two devices under one main domain, auxiliary domains and processes; one alone."""
    system = System(profile=AUX, **more)
    one, two = (system.device(sid, pasid_bits=4, ats=True) for sid in (1, 2))
    three = system.device(3, pasid_bits=11)
    main, other = system.paging_domain(), system.paging_domain()
    for device, domain in ((one, main), (two, main), (three, other)):
        device.replace(domain)
        for feature in ("AUX", "SVA"):
            device.enable_feature(feature)
    aux = [system.paging_domain() for _ in range(3)]
    one.attach_aux(aux[0])
    two.attach_aux(aux[0])
    two.attach_aux(aux[1])
    three.attach_aux(aux[2])
    for domain in (main, *aux):
        domain.map(0x1000, RAM, PAGE)
    one.detach_aux(aux[0])
    process = AddressSpace.of(system, asid=2)
    process.table.map(0x2000, RAM, PAGE)
    three.bind(process)
    for device in (one, two, three):
        device.translate(0x1000)
        device.translate(0x2000, pasid=process.pasid)
    return system, [one, two, three, process, *aux]


@pytest.mark.parametrize("caches", [None, Caches.small, Caches.server])
@pytest.mark.parametrize("default", ["blocked", "identity", "paging"])
@pytest.mark.parametrize("make", [now_system, aux_system])
def test_a_healthy_system_has_nothing_to_find(make, default, caches):
    system, _ = make(default_domain=default, caches=caches)
    assert check(system) == []


@pytest.mark.parametrize("features", [
    {"st_level": 0, "sidsize": 6}, {"cd2l": 0}, {"ril": 0}, {"ats": 0, "pri": 0},
    {"stall_model": 1}, {"vmid16": 0},
])  # fmt: skip
@pytest.mark.parametrize("make", [now_system, aux_system])
def test_other_smmus_are_healthy_too(make, features):
    system, _ = make(features=Features.full().replace(**features))
    assert check(system) == []


def test_old_kernels_let_streams_bypass_and_that_is_healthy():
    system, held = now_system(disable_bypass=False)
    assert check(system) == []
    held[0].release()
    assert check(system) == []


def test_other_granules_and_stages_are_healthy():
    system = System()
    kinds = [(1, 16384), (2, 16384), (1, 65536), (2, 65536), (2, 4096)]
    for sid, (stage, granule) in enumerate(kinds):
        device = system.device(sid)
        domain = device.paging_domain(stage=stage, granule=granule)
        device.replace(domain)
        domain.map(0, RAM, granule)
        domain.map(0x20_0000_0000, RAM, granule)
        assert device.translate(0x10).pa == RAM + 0x10
    assert check(system) == []


@pytest.mark.parametrize("config", [0, 4, 5])
def test_a_nested_system_is_healthy(config):
    system = System(caches=Caches.server)
    nic = system.device(8, ats=True)
    host = nic.paging_domain(nest_parent=True)
    host.map(0x4000_0000, RAM, 0x20_0000)
    word = layout.pack("STE", V=1, Config=config, S1ContextPtr=0x4000_0000 * (config == 5))
    nic.attach(Viommu(host).domain((word & MASK, word >> 64 & MASK)))
    nic.translate(0x4000_1000)
    assert check(system) == []
    nic.reset_prepare()
    assert check(system) == []
    nic.reset_done()
    assert check(system) == []


@pytest.mark.parametrize("make", [now_system, aux_system])
def test_what_ends_leaves_nothing_to_find(make):
    system, held = make(caches=Caches.server)
    process = next(one for one in held if isinstance(one, AddressSpace) and one.pasid)
    process.exit()
    assert check(system) == []
    for bond in list(process.bonds):
        bond.unbind()
    assert check(system) == []
    for device in dict.fromkeys(d for iommu in system.iommus for d in iommu.devices.values()):
        device.release()
        assert check(system) == []


def test_a_device_that_is_being_reset_has_nothing_to_find():
    system, held = now_system()
    for device in held[:3]:
        device.reset_prepare()
        assert check(system) == []
        device.reset_done()
    assert check(system) == []


def test_it_is_not_asked_in_the_middle_of_a_change():
    system, held = now_system()
    refused = []

    def look(*_):
        try:
            check(system)
        except Busy as error:
            refused.append(error)

    system.iommus[0].writer.observer = look
    held[0].detach(held[0].domain)
    assert refused


# --- what is planted ---


def kinds(system):
    """The kinds that are found; each finding is a frozen value with a sentence."""
    found = check(system)
    for finding in found:
        assert isinstance(finding, Finding)
        assert finding.kind in KINDS
        assert len(finding.text) > 10
        with pytest.raises(dataclasses.FrozenInstanceError):
            finding.kind = "other"
    assert len(found) == len(set(found))
    return {finding.kind for finding in found}


def poke(memory, record, address, **fields):
    """Change fields of an entry in memory."""
    size = 8 if record.startswith("L1") else 64
    old = layout.unpack(record, memory.read(address, size))
    memory.write(address, layout.to_bytes(record, layout.pack(record, **(old | fields))))


def ste_of(device):
    return device.iommu.ste_address(device.sid)


def attached(**more):
    """A device with a main domain and a PASID of another one."""
    system = System(**more)
    nic = system.device(8, pasid_bits=4)
    main, other = nic.paging_domain(), nic.paging_domain()
    main.map(0x1000, RAM, PAGE)
    other.map(0x1000, RAM, PAGE)
    nic.attach(main)
    nic.attach_pasid(other, 3)
    assert check(system) == []
    return system, nic, main, other


@pytest.mark.parametrize("fields", [
    {"S1ContextPtr": 0x10_0000}, {"Config": 4}, {"Config": 0}, {"V": 0}, {"S1DSS": 0},
    {"S1CDMax": 5}, {"S1Fmt": 1},
])  # fmt: skip
def test_an_ste_that_differs_is_found(fields):
    system, nic, _, _ = attached()
    poke(system.memory, "STE", ste_of(nic), **fields)
    assert "ste" in kinds(system)
    assert any(finding.sid == 8 for finding in check(system))


@pytest.mark.parametrize("fields", [{"S2VMID": 9}, {"S2TTB": 0x10_0000}, {"S2T0SZ": 20}])
def test_an_ste_of_stage_2_that_differs_is_found(fields):
    system = System()
    nic = system.device(8)
    nic.attach(nic.paging_domain(stage=2))
    assert check(system) == []
    poke(system.memory, "STE", ste_of(nic), **fields)
    assert "ste" in kinds(system)


@pytest.mark.parametrize("fields", [
    {"TTB0": 0x10_0000}, {"ASID": 77}, {"V": 0}, {"T0SZ": 20}, {"EPD0": 1}, {"MAIR0": 0},
])  # fmt: skip
@pytest.mark.parametrize("ssid", [0, 3])
def test_a_cd_that_differs_is_found(fields, ssid):
    system, nic, _, _ = attached()
    poke(system.memory, "CD", nic.master.table.address(ssid), **fields)
    assert "cd" in kinds(system)
    assert any(finding.pasid == (ssid or None) for finding in check(system))


def test_a_valid_cd_where_nothing_is_attached_is_found():
    system, nic, _, _ = attached()
    table = nic.master.table
    system.memory.write(table.address(4), system.memory.read(table.address(3), 64))
    (finding,) = check(system)
    assert (finding.kind, finding.sid, finding.pasid) == ("cd", 8, 4)


def test_the_cd_of_a_process_that_ended_must_be_quiet():
    system, held = now_system()
    process = held[5]
    process.exit()
    address = held[1].master.table.address(process.pasid)
    poke(system.memory, "CD", address, EPD0=0)
    assert "cd" in kinds(system)


def test_two_tables_under_one_asid_are_found():
    system, nic, main, _ = attached()
    poke(system.memory, "CD", nic.master.table.address(3), ASID=main.asid)
    assert {"asid", "cd"} <= kinds(system)


@pytest.mark.parametrize("sid", [3, 9])
def test_a_stream_without_a_device_that_does_not_abort_is_found(sid):
    system, _, _, _ = attached()
    poke(system.memory, "STE", system.iommus[0].ste_address(sid), V=1, Config=4)
    (finding,) = check(system)
    assert (finding.kind, finding.sid) == ("stream", sid)


@pytest.mark.parametrize("way", ["device", "ste"])
def test_ats_that_is_on_at_one_end_is_found(way):
    system = System()
    nic = system.device(8, ats=True)
    nic.attach(nic.paging_domain())
    if way == "device":
        nic.master.ats_enabled = False
    else:
        poke(system.memory, "STE", ste_of(nic), EATS=0)
    assert "ats" in kinds(system)


def test_an_atc_that_holds_something_while_ats_is_off_is_found():
    system = System()
    nic = system.device(8, ats=True)
    domain = nic.paging_domain()
    domain.map(0, RAM, PAGE)
    nic.attach(domain)
    nic.access(0)
    kept = dict(nic.atcs[0]._cache)
    nic.detach(domain)
    nic.atcs[0]._cache.update(kept)
    assert "ats" in kinds(system)


@pytest.mark.parametrize("name", ["TLBI_NH_VA", "ATC_INV"])
def test_a_lost_invalidation_of_an_unmap_is_found(name):
    system = System(caches=Caches.server)
    nic = system.device(8, ats=True)
    domain = nic.paging_domain()
    domain.map(0, RAM, PAGE)
    nic.attach(domain)
    nic.access(0)
    nic.translate(0)
    deaf = lose(nic.iommu.queue, name)
    domain.unmap(0, PAGE)
    assert deaf.lost
    assert kinds(system) == {"stale"}


def test_a_lost_invalidation_of_a_cd_is_found():
    system, nic, _, other = attached(caches=Caches.server)
    nic.translate(0x1000, pasid=3)
    deaf = lose(nic.iommu.queue, "CFGI_CD")
    nic.detach_pasid(other, 3)
    assert deaf.lost
    assert "stale" in kinds(system)


@pytest.mark.parametrize("name", ["CFGI_CD_ALL", "TLBI_NH_ALL"])
def test_a_lost_invalidation_below_a_guest_is_found(name):
    """The host takes pages of the guest's tables and of its memory away."""
    system = System(caches=Caches.server)
    nic, own = system.device(8), 0x4000_0000
    host = nic.paging_domain(nest_parent=True)
    host.map(own, RAM, 4 * PAGE)
    put = lambda name, at, **fields: system.memory.write(  # noqa: E731
        at, layout.to_bytes(name, layout.pack(name, **fields)))  # fmt: skip
    put("CD", RAM, V=1, AA64=1, A=1, R=1, T0SZ=25, IPS=5, EPD1=1, ASID=1, TTB0=own + PAGE)
    put("PTE_S1_TABLE", RAM + PAGE, Valid=1, Type=1, Addr_4K=own + 2 * PAGE)
    put("PTE_S1_TABLE", RAM + 2 * PAGE, Valid=1, Type=1, Addr_4K=own + 3 * PAGE)
    put("PTE_S1", RAM + 3 * PAGE, Valid=1, Type=1, AF=1, AP=1, SH=3, nG=1, Addr_4K=own)
    word = layout.pack("STE", V=1, Config=5, S1ContextPtr=own)
    nic.attach(Viommu(host).domain((word & MASK, word >> 64 & MASK)))
    assert nic.translate(0x10).pa == RAM + 0x10
    deaf = lose(nic.iommu.queue, name)
    host.unmap(own, 4 * PAGE)
    assert deaf.lost
    assert kinds(system) == {"stale"}


def test_pages_that_are_lost_are_found():
    system, _, _, _ = attached()
    system.pages.alloc(PAGE)
    assert kinds(system) == {"pages"}


def test_pages_that_are_given_back_behind_their_owner_are_found():
    system, nic, main, _ = attached()
    system.pages.free(main.root, PAGE)
    assert kinds(system) == {"pages"}
    system, nic, _, _ = attached()
    table = nic.master.table
    system.pages.free(table.base, 64 << 4)
    assert kinds(system) == {"pages"}


def test_a_page_that_two_tables_lead_to_is_found():
    system, _, main, other = attached()
    entry = system.memory.read(main.root, 8)
    system.memory.write(other.root, entry)
    assert {"table", "pages"} <= kinds(system)


def test_a_page_table_that_leads_elsewhere_is_found():
    system, _, main, _ = attached()
    system.memory.write_u64(main.root, 0x5000 | 3)
    found = {finding.kind: finding for finding in check(system)}
    assert found["table"].address == 0x5000
    system.memory.write_u64(main.root, 0)
    assert kinds(system) == {"pages"}


def test_a_table_that_nobody_points_to_is_found():
    system = System()
    nic = system.device(8, pasid_bits=12)
    domain = nic.paging_domain()
    nic.attach_pasid(domain, 5)
    poke(system.memory, "L1CD", nic.master.table.base, V=0)
    assert "table" in kinds(system)
    system = System()
    nic = system.device(8)
    system.memory.write_u64(system.iommus[0].strtab, 0)
    assert {"table", "ste"} <= kinds(system)


def test_level_1_that_points_to_what_nobody_owns_is_found():
    system = System()
    nic = system.device(8, pasid_bits=12)
    nic.attach_pasid(nic.paging_domain(), 5)
    poke(system.memory, "L1CD", nic.master.table.base + 8, V=1, L2Ptr=0x10_0000)
    assert kinds(system) == {"table"}
    system = System()
    poke(system.memory, "L1STD", system.iommus[0].strtab + 8, Span=9, L2Ptr=0x10_0000)
    assert kinds(system) == {"table"}


def test_a_page_table_that_was_given_back_while_it_is_attached_is_found():
    system, nic, _, other = attached()
    super(type(other), other).close()
    assert "table" in kinds(system)
    assert nic is not None


@pytest.mark.parametrize("kind", ["asid", "vmid", "pasid"])
def test_numbers_that_are_free_and_in_use_are_found(kind):
    system, held = now_system()
    process = held[5]
    if kind == "asid":
        system.asids.free(held[0].domain.asid)
    elif kind == "vmid":
        system.iommus[1].vmids.free(held[2].domain.vmid)
    else:
        system.pasids.free(process.pasid)
    assert kind in kinds(system)


@pytest.mark.parametrize("kind", ["asid", "vmid", "pasid"])
def test_numbers_that_are_taken_twice_are_found(kind):
    system, held = now_system()
    if kind == "asid":
        system.asids.alloc(held[0].domain)
    elif kind == "vmid":
        system.iommus[1].vmids.alloc(held[2].domain)
    else:
        system.pasids.alloc(data=held[5])
    assert kinds(system) == {kind}


@pytest.mark.parametrize("kind", ["asid", "pasid"])
def test_numbers_that_others_have_are_found(kind):
    system, held = now_system()
    if kind == "asid":
        number = held[0].domain.asid
        system.asids.free(number)
        system.asids.claim(number, object())
    else:
        system.pasids.set_data(held[5].pasid, object())
    assert kind in kinds(system)


def test_the_pasid_of_a_share_that_is_free_is_found():
    system, held = now_system()
    system.pasids.free(held[6].pasid)
    assert kinds(system) == {"pasid"}


def test_the_pasid_of_an_auxiliary_domain_that_is_free_is_found():
    system, held = aux_system()
    system.pasids.free(held[-1].aux_pasid)
    assert "pasid" in kinds(system)


def test_a_device_that_a_domain_does_not_tell_is_found():
    system, held = now_system()
    domain, queue = held[0].domain, held[0].iommu.queue
    (kind,) = {entry.kind for entry in domain.invalidations.entries if entry.id == 8}
    domain.invalidations.remove(queue, kind, 8, 0)
    assert kinds(system) == {"told"}


def test_a_wrong_count_of_attachments_is_found():
    system, nic, main, _ = attached()
    main.attachments.clear()
    assert "attachment" in kinds(system)
    system, nic, main, _ = attached()
    nic.master.attachments[3].domain = main
    assert "attachment" in kinds(system)
    system, nic, main, _ = attached()
    nic.master.table.cds[3] = main
    assert "attachment" in kinds(system)


def test_a_stall_of_a_stream_that_nobody_has_is_found():
    system = System()
    nic = system.device(8, stall=True)
    nic.attach(nic.paging_domain())
    assert system.smmu.translate(8, 0x1000).action == "stall"
    assert check(system) == []
    del nic.iommu.devices[8]
    assert "waiting" in kinds(system)


def test_a_page_request_of_a_stream_that_nobody_has_is_found():
    system = System()
    system.device(8, ats=True, pri=True)
    system.iommus[0].page_requests[9, None, 1] = []
    assert kinds(system) == {"waiting"}


def test_registers_that_are_not_the_drivers_are_found():
    system = System()
    system.smmu.write("CR0", 0)
    assert kinds(system) == {"register"}
    system.smmu.write("STRTAB_BASE", 0x10_0000, 8)
    assert "register" in kinds(system)


def test_commands_that_wait_are_found():
    system = System()
    queue = system.iommus[0].queue
    system.memory.write(queue.base + 16 * queue.prod, bytes([0xFF]) * 16)
    system.smmu.write("CMDQ_PROD", queue.prod + 1)
    assert kinds(system) == {"register"}


def test_both_profiles_are_what_they_are():
    assert now_system()[0].profile is NOW
    assert aux_system()[0].profile is AUX
