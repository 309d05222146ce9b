"""Calls of the driver half in unusual orders, in which nothing may be half done or left behind.

Devices that stall, with ATS and page requests, groups, shares, guests and processes; both profiles,
with and without caches.  Every system that the fixture made must end without a stale entry.
"""

import copy
import errno
import gc
import itertools
import pickle

import pytest
from driverhalf import refused
from medium import SystemMedium

from smmufast import AtsFault, Caches, Features, Memory, Smmu, layout
from smmufast.iommu import (
    AUX,
    BLOCKED,
    IDENTITY,
    NOW,
    AddressSpace,
    AttachHandle,
    Busy,
    InvalidArgument,
    IommuError,
    System,
    Viommu,
)
from smmufast.iommu.undo import Undo

RAM = 0x8000_0000
PAGE = 0x1000
PROFILES = pytest.mark.parametrize("profile", [AUX, NOW], ids=["aux", "now"])
FULL = Features.full()


@pytest.fixture(params=[None, Caches.server], ids=["none", "server"])
def make(request, systems):
    """Systems without caches, and with."""
    return lambda *arguments, **more: systems(*arguments, caches=request.param, **more)


def paging(system, device, pa=RAM, iova=PAGE, **more):
    """A paging domain with one page."""
    aux = system.profile is AUX and not more
    domain = system.paging_domain() if aux else device.paging_domain(**more)
    if not aux:
        domain.map(iova, pa, PAGE)
    return domain


def with_main(system, device, pa=RAM):
    """Attach a main domain of stage 1 with one page."""
    domain = paging(system, device)
    device.attach(domain)
    if system.profile is AUX:
        domain.map(PAGE, pa, PAGE)
    return domain


def able(system, device):
    """Let a device have PASIDs in either profile."""
    if system.profile is AUX:
        if device.domain.stage != 1:
            with_main(system, device)
        if device.has_feature("IOPF"):
            device.enable_feature("IOPF")
        device.enable_feature("SVA")
        device.enable_feature("AUX")
    return device


def attach(system, device, domain, pasid=3):
    """Attach a domain to a PASID in either profile; return the PASID."""
    if system.profile is AUX:
        device.attach_aux(domain)
        return domain.pasid(device)
    device.attach_pasid(domain, pasid)
    return pasid


def detach(system, device, domain, pasid):
    """The opposite."""
    if system.profile is AUX:
        device.detach_aux(domain)
    else:
        device.detach_pasid(domain, pasid)


def process(system, pa=RAM, iova=PAGE, **more):
    """A process with one page."""
    space = AddressSpace.of(system, **more)
    space.table.map(iova, pa, PAGE)
    return space


def reached(device, iova=PAGE, pasid=None):
    """The physical address that a device gets at, through its ATC where it has one, or None."""
    try:
        return device.access(iova, pasid=pasid).pa
    except AtsFault:
        return None


def recorder(log, answer=False):
    """A handler that notes the faults that it is asked about."""
    return lambda fault: log.append((fault.pasid, fault.iova)) or answer


def stall(device, iova, pasid=None):
    """Let an access of a device stall, without an interrupt."""
    result = device.smmu.translate(device.sid, iova, ssid=pasid)
    assert result.action == "stall"


def ask(device, iova, pasid=None, *, last=True, group=3):
    """Let a device request a page, without an interrupt."""
    device.smmu.page_request(
        device.sid, iova, ssid=pasid, read=True, last=last, prg_index=group
    )


# --- devices whose faults stall, and others ---


@pytest.mark.parametrize("first", [False, True], ids=["plain_first", "stalling_first"])
def test_a_device_that_stalls_and_one_that_does_not_never_share_a_table(make, first):
    system = make(profile=AUX)
    one = system.device(8, pasid_bits=4, stall=first, ats=True)
    other = system.device(9, pasid_bits=4, stall=not first, ats=True)
    main = with_main(system, one)
    refused(errno.EINVAL, other.attach, main)
    assert (main.users, other.domain, reached(other)) == (1, BLOCKED, None)
    able(system, one)
    aux = system.paging_domain()
    one.attach_aux(aux)
    aux.map(PAGE, RAM + PAGE, PAGE)
    refused(errno.EINVAL, other.attach, main)
    bond = one.bind(process(system, RAM + 2 * PAGE))
    refused(errno.EINVAL, other.attach, main)
    assert reached(one) == RAM
    assert reached(one, pasid=aux.pasid(one)) == RAM + PAGE
    assert reached(one, pasid=bond.pasid) == RAM + 2 * PAGE
    like = system.device(10, pasid_bits=4, stall=first, ats=True)
    like.attach(main)
    assert reached(like) == RAM and reached(like, pasid=bond.pasid) == RAM + 2 * PAGE


@pytest.mark.parametrize("first", [False, True], ids=["plain_first", "stalling_first"])
def test_devices_of_one_group_have_tables_of_their_own_today(make, first):
    """NOW: whether faults stall is a matter of each device, in a group too."""
    system = make()
    group = system.group()
    devices = [
        system.device(8 + n, pasid_bits=4, stall=one, group=group)
        for n, one in enumerate((first, not first))
    ]
    main, other = (paging(system, devices[0], pa) for pa in (RAM, RAM + PAGE))
    group.attach(main)
    devices[0].attach_pasid(other, 3)
    for device in devices:
        assert (reached(device), reached(device, pasid=3)) == (RAM, RAM + PAGE)
        result = device.smmu.translate(device.sid, 0x5000, ssid=3)
        assert result.action == ("stall" if device.stall else "abort")
    system.service()


@pytest.mark.parametrize("model", [0, 1, 2])
@pytest.mark.parametrize("can", [False, True], ids=["plain", "stalls"])
@pytest.mark.parametrize("ats", [False, True], ids=["", "ats"])
def test_every_stall_model_works_at_every_stage(make, model, can, ats):
    system = make(features=FULL.replace(stall_model=model))
    device = system.device(8, pasid_bits=4, stall=can, ats=ats)
    host = device.paging_domain(nest_parent=True)
    two, one = paging(system, device, stage=2), paging(system, device)
    host.map(PAGE, RAM, PAGE)
    for guest in (None, (0b1001, 0), (0b1001, layout.pack("STE", EATS=1) >> 64)):
        for domain in (one, two, host) if guest is None else (Viommu(host).domain(guest),):
            device.replace(domain)
            assert reached(device) == RAM, (domain, guest)
            words = device.iommu.writer.read(device.iommu.ste_address(8))
            fields = layout.unpack("STE", sum(word << 64 * n for n, word in enumerate(words)))
            assert not (fields["S2S"] and fields["EATS"])  # IHI 0070 5.2
            assert bool(fields["EATS"]) == device.ats_enabled
            if model == 2 and domain.stage > 1:
                assert fields["S2S"] == 1 and not device.ats_enabled
            device.replace(IDENTITY)
    device.replace(one)
    space = process(system, RAM + PAGE)
    bond = device.bind(space)
    assert reached(device, pasid=bond.pasid) == RAM + PAGE
    space.exit()
    assert reached(device, pasid=space.pasid) is None
    assert device.translate(PAGE, pasid=space.pasid).pa is None
    assert (device.smmu.stalls, system.service()) == ([], 0)  # quiet: nothing is reported


# --- faults in flight ---


def leave_by_detach(system, device, domain, pasid):
    detach(system, device, domain, pasid)


def leave_by_release(system, device, domain, pasid):
    device.release()
    system.probe(device)
    able(system, device)


def leave_by_shutdown(system, device, domain, pasid):
    device.shutdown()
    for feature in ("IOPF", "SVA", "AUX"):
        if device.has_feature(feature):
            device.enable_feature(feature)


def leave_by_reset(system, device, domain, pasid):
    device.reset_prepare()
    device.reset_done()
    device.detach_pasid(domain, pasid)


LEAVE = [
    (AUX, leave_by_detach), (AUX, leave_by_release), (AUX, leave_by_shutdown),
    (NOW, leave_by_detach), (NOW, leave_by_release), (NOW, leave_by_reset),
]  # fmt: skip


@pytest.mark.parametrize("full", [False, True], ids=["", "full_queue"])
@pytest.mark.parametrize(
    ("profile", "leave"), LEAVE, ids=[f"{p.name}-{f.__name__[9:]}" for p, f in LEAVE]
)
def test_stalls_of_a_pasid_are_never_put_to_its_next_domain(make, profile, leave, full):
    """Also those whose record waits, because the event queue is full (3.12.2)."""
    system = make(profile=profile, features=FULL.replace(eventqs=2))
    device = system.device(8, pasid_bits=4, stall=True)
    able(system, device)
    old, new = paging(system, device), paging(system, device)
    asked = []
    pasid = attach(system, device, old)
    old.iopf = recorder(asked)
    count = 9 if full else 2
    for n in range(count):
        stall(device, 0x10000 + n * PAGE, pasid)
    stalls = device.smmu.stalls
    leave(system, device, old, pasid)
    assert device.smmu.stalls == [] and all(one.done for one in stalls)
    assert old.users == 0
    if profile is AUX:
        old.free()
    new.iopf = recorder(asked, True)
    assert attach(system, device, new) == pasid
    system.service()
    assert asked == []
    known = [report for report in system.reports if report.stalled]
    # none of them is lost; those whose record waits are translated anew, and stall no more
    assert len(known) == min(count, 4)
    assert {report.errno for report in known} == {errno.EFAULT}
    stall(device, 0x10000, pasid)
    new.map(0x10000, RAM, PAGE)
    system.service()
    assert asked == [(pasid, 0x10000)] and device.smmu.stalls == []


def swap_by_replace(device, old, new):
    device.replace(new)


def swap_by_group(device, old, new):
    device.group.set(new)


def swap_by_detach(device, old, new):
    device.detach(old)
    device.attach(new)


def swap_by_claim(device, old, new):
    device.detach(old)
    device.group.claim("vfio")
    device.group.attach(new)


SWAPS = [swap_by_replace, swap_by_group, swap_by_detach, swap_by_claim]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("swap", SWAPS, ids=lambda one: one.__name__[8:])
def test_stalls_without_a_pasid_are_never_put_to_the_next_main_domain(make, swap, stage):
    system = make()
    device = system.device(8, stall=True)
    old, new = paging(system, device, stage=stage), paging(system, device, stage=stage)
    asked = []
    old.iopf, new.iopf = recorder(asked), recorder(asked, True)
    device.attach(old)
    stall(device, 0x10000)
    queue = device.iommu.queue
    queue.log = log = []
    swap(device, old, new)
    assert device.smmu.stalls == []
    stall(device, 0x20000)
    (waiting,) = device.smmu.stalls
    new.map(0x20000, RAM, PAGE)
    system.service()
    assert asked == [(None, 0x20000)] and system.reports[-2].device is device
    assert waiting.result.pa == RAM
    queue.log = None
    # one answer each: the tag of the first may be that of another soon
    assert [name for name, _ in log].count("RESUME") == 2


def test_a_replaced_pasid_never_sees_the_faults_of_the_domain_before(make):
    system = make()
    device = system.device(8, pasid_bits=4, stall=True, ats=True, pri=True)
    device.attach(IDENTITY)
    one, two, beside = (paging(system, device) for _ in range(3))
    asked = []
    for domain in (one, two):
        domain.iopf = recorder(asked, "success")
    beside.iopf = recorder([], "success")
    device.attach_pasid(one, 3)
    device.attach_pasid(beside, 4)
    for pasid in (3, 4):
        ask(device, 0x10000, pasid, last=False, group=5)
    system.service()
    for pasid in (3, 4):
        stall(device, 0x10000, pasid)
        ask(device, 0x10000, pasid, last=False)
    device.replace_pasid(two, 3, AttachHandle())
    assert [one.ssid for one in device.smmu.stalls] == [4]  # the neighbour's goes on waiting
    beside.map(0x10000, RAM, PAGE)
    ask(device, 0x20000, 3)
    system.service()
    assert asked == [(3, 0x20000)] and device.smmu.stalls == []
    assert list(device.iommu.page_requests) == [(8, 4, 5), (8, 4, 3)]


@PROFILES
@pytest.mark.parametrize("served", [False, True], ids=["queued", "taken"])
@pytest.mark.parametrize("last", [False, True], ids=["half", "whole"])
def test_page_requests_of_a_process_are_never_put_to_the_next_one(make, profile, served, last):
    system = make(profile=profile)
    device = able(system, system.device(8, pasid_bits=4, ats=True, pri=True))
    asked = []
    old = process(system, handler=recorder(asked))
    bond = device.bind(old)
    pasid = old.pasid
    ask(device, 0x7000, pasid, last=last)
    if served and not last:
        system.service()
    bond.unbind()
    old.exit()
    new = process(system, handler=recorder(asked))
    device.bind(new)
    assert new.pasid == pasid
    ask(device, 0x9000, pasid)
    system.service()
    assert asked == [(pasid, 0x9000)]
    assert device.iommu.page_requests == {}


@PROFILES
def test_an_exit_lets_nobody_answer_for_the_process(make, profile):
    system = make(profile=profile)
    device = able(system, system.device(8, pasid_bits=4, stall=True, ats=True, pri=True))
    asked = []
    space = process(system, handler=recorder(asked, True))
    device.bind(space)
    stall(device, 0x7000, space.pasid)
    ask(device, 0x7000, space.pasid)
    asking = device.atcs[0].request_page(0x8000, ssid=space.pasid)
    space.exit()
    system.service()
    assert (asked, device.smmu.stalls, asking.answer) == ([], [], "invalid")


def test_a_released_device_leaves_nothing_in_flight(make):
    system = make(features=FULL.replace(eventqs=2))
    device = system.device(8, pasid_bits=4, stall=True, ats=True, pri=True)
    asked = []
    main = paging(system, device)
    main.iopf = recorder(asked)
    device.attach(main)
    space = process(system, handler=recorder(asked))
    device.bind(space)
    for n in range(6):
        stall(device, 0x10000 + n * PAGE)
        stall(device, 0x10000 + n * PAGE, space.pasid)
    ask(device, 0x7000)
    ask(device, 0x7000, space.pasid, last=False)
    device.release()
    assert system.smmu.stalls == [] and system.iommus[0].page_requests == {}
    again = system.device(8, pasid_bits=4, stall=True)
    again.attach(main)
    again.bind(space)
    system.service()
    assert asked == [] and any(one.stalled for one in system.reports)


def test_a_released_device_leaves_nothing_in_flight_under_the_pasids_of_others(make):
    """AUX: every device of a main domain can use what one of them attached."""
    system = make(profile=AUX)
    one, two = (system.device(8 + n, pasid_bits=4, stall=True, ats=True, pri=True) for n in (0, 1))
    main = with_main(system, one)
    two.attach(main)
    able(system, one)
    aux = system.paging_domain()
    one.attach_aux(aux)
    asked = []
    aux.iopf = recorder(asked, True)
    for device in (one, two):
        stall(device, 0x10000, 1)
        ask(device, 0x10000, 1, last=False)
    system.service()
    asked.clear()
    for device in (one, two):
        stall(device, 0x10000, 1)
    two.release()
    assert [(each.sid, each.ssid) for each in system.smmu.stalls] == [(8, 1)]
    assert list(system.iommus[0].page_requests) == [(8, 1, 3)]
    aux.map(0x10000, RAM, PAGE)
    system.service()
    assert asked == [(1, 0x10000)] and system.smmu.stalls == []


def test_page_requests_of_unknown_streams_do_not_pile_up(make):
    system = make()
    device = system.device(8, ats=True, pri=True)
    with_main(system, device)
    iommu = device.iommu
    base, _ = iommu._rings["PRIQ"]
    for n in range(40):
        ask(device, 0x7000, last=False, group=n & 511)
        fields = layout.unpack("PRI", system.memory.read(base + 16 * n, 16))
        word = layout.pack("PRI", **fields | {"StreamID": 77})
        system.memory.write(base + 16 * n, layout.to_bytes("PRI", word))
        system.service()
    assert iommu.page_requests == {}
    for n in range(600):
        ask(device, 0x7000, last=False, group=n & 511)
        system.service()
    assert sum(map(len, iommu.page_requests.values())) == 512
    asked = device.atcs[0].request_page(0x7000)
    system.service()
    assert asked.answer == "failure"  # nobody resolves it, but it is answered


# --- guests ---


class Guest:
    """A guest's memory, with CDs and tables that it writes itself; IPA 0x4000_0000 is RAM."""

    IPA = 0x4000_0000

    def __init__(self, system, host, base=0, *, stall=False):
        self.memory, self.base = system.memory, base
        if not host.iova_to_phys(self.IPA):
            host.map(self.IPA, RAM, 1 << 21)
        self.put("CD", 0, V=1, AA64=1, A=1, R=1, S=int(stall), T0SZ=25, IPS=5, EPD1=1,
                 ASID=1, ASET=1, TTB0=self.IPA + base + 0x1000, MAIR0=0xFF)  # fmt: skip
        cd = self.memory.read(RAM + base, 64)
        for ssid in (1, 2, 3):  # the same address space under each PASID, with ASIDs of their own
            fields = layout.unpack("CD", cd) | {"ASID": 1 + ssid}
            self.put("CD", 64 * ssid, **fields)
        self.put("PTE_S1_TABLE", 0x1000, Valid=1, Type=1, Addr_4K=self.IPA + base + 0x2000)
        self.put("PTE_S1_TABLE", 0x2000, Valid=1, Type=1, Addr_4K=self.IPA + base + 0x3000)
        self.map(PAGE, 0x8000)

    def put(self, record, at, **fields):
        word = layout.to_bytes(record, layout.pack(record, **fields))
        self.memory.write(RAM + self.base + at, word)

    def map(self, va, offset):
        """Map a page to the guest's memory at an offset; the guest says nothing to its SMMU."""
        self.put("PTE_S1", 0x3000 + (va >> 12) * 8, Valid=offset > 0, Type=1, AF=1, AP=1, SH=3,
                 nG=1, Addr_4K=self.IPA + offset)  # fmt: skip

    def ste(self, **more):
        word = layout.pack(
            "STE", V=1, Config=5, S1ContextPtr=self.IPA + self.base, S1CDMax=2, S1DSS=2, **more
        )
        return word & (1 << 64) - 1, word >> 64


def words_of(name, **fields):
    """A command as a guest sends it."""
    word = layout.pack(name, **fields)
    return word & (1 << 64) - 1, word >> 64


def nested(make, **more):
    system = make()
    device = system.device(8, pasid_bits=4, **more)
    host = device.paging_domain(nest_parent=True)
    viommu = Viommu(host)
    viommu.add(0x20, device)
    return system, device, host, viommu


def test_two_guests_over_one_parent_may_use_the_same_asids(make):
    system = make()
    one, other = system.device(8), system.device(9)
    host = one.paging_domain(nest_parent=True)
    guests = [Viommu(host), Viommu(host)]
    assert len({host.vmid, *(guest.vmid for guest in guests)}) == 3
    inside = [Guest(system, host), Guest(system, host, 0x10000)]
    inside[1].map(PAGE, 0x1A000)
    for device, guest, its in zip((one, other), guests, inside, strict=True):
        guest.add(0x20, device)
        device.attach(guest.domain(its.ste()))
    for _ in range(2):
        assert (reached(one), reached(other)) == (RAM + 0x8000, RAM + 0x1A000)
    # an invalidation of one leaves the other's entries alone, and reaches its own
    inside[0].map(PAGE, 0x9000)
    inside[1].map(PAGE, 0x1B000)
    guests[0].invalidate([words_of("TLBI_NH_ASID", ASID=1)])
    assert reached(one) == RAM + 0x9000
    guests[1].invalidate([words_of("TLBI_NSNH_ALL")])
    assert reached(other) == RAM + 0x1B000
    # what the host takes away goes from both
    assert host.unmap(0x4000_0000, 1 << 21) == 1 << 21
    assert (reached(one), reached(other)) == (None, None)
    system.service()
    for guest in guests:
        refused(errno.EBUSY, guest.close)
    refused(errno.EBUSY, host.free)
    for device in (one, other):
        device.release()
    vmids = host.iommu.vmids
    assert len(vmids) == 3
    guests[0].close()
    guests[0].close()
    assert len(vmids) == 2
    host.free()  # ends the guests too
    assert (len(vmids), guests[1].vmid) == (0, 0)
    refused(errno.EINVAL, guests[1].domain, (0b1001, 0))
    refused(errno.EINVAL, guests[1].invalidate, [words_of("TLBI_NSNH_ALL")])


@pytest.mark.parametrize("ats", [False, True], ids=["", "ats"])
def test_a_page_that_the_host_takes_is_reached_by_no_guest(make, ats):
    """The guests' CDs and tables stay: what is cached of the page alone must go."""
    system = make()
    devices = [system.device(8 + n, pasid_bits=4, ats=ats) for n in range(2)]
    host = devices[0].paging_domain(nest_parent=True)
    for page in range(64):
        host.map(Guest.IPA + page * PAGE, RAM + page * PAGE, PAGE)
    for n, device in enumerate(devices):
        guest = Guest(system, host, n * 0x10000)
        viommu = Viommu(host)
        viommu.add(0x20, device)
        device.attach(viommu.domain(guest.ste(EATS=int(ats))))
    for pasid in (None, 2):
        for device in devices:
            assert reached(device, pasid=pasid) == RAM + 0x8000
        host.unmap(Guest.IPA + 0x8000, PAGE)
        for device in devices:
            assert reached(device, pasid=pasid) is None
        host.map(Guest.IPA + 0x8000, RAM + 0x8000, PAGE)
    for device in devices:
        assert reached(device) == RAM + 0x8000


def test_what_a_guest_has_cached_ends_with_its_attachment(make):
    system, device, host, viommu = nested(make)
    guest = Guest(system, host)
    domain = viommu.domain(guest.ste())
    device.attach(domain)
    assert reached(device) == reached(device, pasid=2) == RAM + 0x8000
    device.replace(IDENTITY)
    guest.map(PAGE, 0x9000)  # in between, when it need not tell anybody
    device.replace(domain)
    assert reached(device) == reached(device, pasid=2) == RAM + 0x9000


@pytest.mark.parametrize("pasid", [None, 1, 3])
def test_a_guests_atc_entries_go_when_the_host_unmaps_or_the_guest_leaves(make, pasid):
    system, device, host, viommu = nested(make, ats=True)
    guest = Guest(system, host)
    domain = viommu.domain(guest.ste(EATS=1))
    device.attach(domain)
    assert device.ats_enabled and reached(device, pasid=pasid) == RAM + 0x8000
    host.unmap(Guest.IPA, 1 << 21)
    assert reached(device, pasid=pasid) is None
    host.map(Guest.IPA, RAM, 1 << 21)
    assert reached(device, pasid=pasid) == RAM + 0x8000
    own = paging(system, device, RAM + 0x5000)
    device.replace(own)  # ATS stays on
    assert device.ats_enabled
    assert reached(device, pasid=pasid) == (RAM + 0x5000 if pasid is None else None)
    device.replace(domain)
    assert reached(device, pasid=pasid) == RAM + 0x8000
    device.replace(BLOCKED)
    assert reached(device, pasid=pasid) is None


def test_a_nested_ste_merges_events_and_a_plain_one_does_not(make):
    """Linux sets MEV in arm_smmu_make_nested_cd_table_ste: a guest cannot flood the host."""
    system, device, host, viommu = nested(make)
    guest = Guest(system, host)
    address = device.iommu.ste_address(8)

    def mev():
        return layout.unpack("STE", system.memory.read(address, 64))["MEV"]

    device.attach(viommu.domain(guest.ste()))
    assert mev() == 1
    device.replace(viommu.domain((0b1001, 0)))
    assert mev() == 0
    for domain in (host, IDENTITY, paging(system, device)):
        device.replace(domain)
        assert mev() == 0


@pytest.mark.parametrize("pasid", [None, 2])
def test_a_guest_gets_its_own_events_under_its_own_stream_and_no_others(make, pasid):
    system, device, host, viommu = nested(make)
    guest = Guest(system, host)
    own = paging(system, device)
    device.attach(own)
    device.smmu.translate(8, 0x5000)  # the host's, still in the queue
    device.replace(viommu.domain(guest.ste()))
    system.service()
    assert list(viommu.events) == []
    assert device.translate(0x5000, pasid=pasid).pa is None
    (record,) = viommu.events
    fields = layout.unpack("EVENT", record)
    assert (fields["ID"], fields["StreamID"], fields["InputAddr"]) == (0x10, 0x20, 0x5000)
    assert (fields["SSV"], fields["SubstreamID"]) == ((0, 0) if pasid is None else (1, 2))
    host.unmap(Guest.IPA, 1 << 21)  # what stage 2 refuses is the host's own
    assert device.translate(PAGE, pasid=pasid).pa is None
    assert len(viommu.events) == 1
    host.map(Guest.IPA, RAM, 1 << 21)
    device.smmu.translate(8, 0x6000, ssid=pasid)  # the guest's, still in the queue
    device.replace(IDENTITY)
    system.service()
    assert len(viommu.events) == 2
    device.smmu.translate(8, 1 << 60)
    system.service()
    assert len(viommu.events) == 2 and system.reports[-1].errno


def test_a_guests_stalls_under_a_pasid_are_never_put_to_the_hosts_domain(make):
    system, device, host, viommu = nested(make, stall=True, ats=True, pri=True)
    guest = Guest(system, host, stall=True)
    domain = viommu.domain(guest.ste())
    asked = []
    own = paging(system, device)
    own.iopf = recorder(asked, "success")
    device.attach(domain)
    stall(device, 0x5000, 2)
    ask(device, 0x5000, 2, last=False)
    system.service()
    assert device.smmu.stalls == []
    stall(device, 0x5000, 2)
    ask(device, 0x5000, 2, last=False)
    device.replace(IDENTITY)
    assert device.smmu.stalls == [] and device.iommu.page_requests == {}
    device.attach_pasid(own, 2)
    ask(device, 0x7000, 2)
    system.service()
    assert asked == [(2, 0x7000)]


def test_a_device_is_not_taken_from_a_guest_while_it_is_attached(make):
    system, device, host, viommu = nested(make)
    guest = Guest(system, host)
    device.attach(viommu.domain(guest.ste()))
    refused(errno.EBUSY, viommu.remove, 0x20)
    assert viommu.devices == {0x20: device}
    viommu.invalidate([words_of("CFGI_CD", StreamID=0x20, Leaf=1)])
    device.replace(BLOCKED)
    viommu.remove(0x20)
    refused(errno.ENOENT, viommu.remove, 0x20)
    refused(errno.EIO, viommu.invalidate, [words_of("CFGI_CD", StreamID=0x20)])
    viommu.add(0x21, device)
    device.attach(viommu.domain(guest.ste()))
    device.release()
    assert viommu.devices == {} and reached_sid(system, 8) is None


def reached_sid(system, sid, iova=PAGE):
    return system.smmu.translate(sid, iova).pa


def test_a_guests_commands_are_done_with_the_real_numbers_before_the_call_returns(make):
    system, device, host, viommu = nested(make)
    guest = Guest(system, host)
    device.attach(viommu.domain(guest.ste()))
    assert reached(device, pasid=2) == RAM + 0x8000
    queue = device.iommu.queue
    queue.log = []
    assert viommu.invalidate([]) == 0
    sent = [
        words_of("TLBI_NH_VA", ASID=3, VMID=77, Address=PAGE, Leaf=1),
        words_of("CFGI_CD", StreamID=0x20, SubstreamID=2, Leaf=1),
        words_of("CFGI_CD_ALL", StreamID=0x20),
    ]
    guest.map(PAGE, 0x9000)
    assert viommu.invalidate(sent) == 3
    queue.log = None
    assert reached(device, pasid=2) == reached(device, pasid=3) == RAM + 0x9000
    guest.put("CD", 64 * 2, V=0)
    viommu.invalidate([
        words_of("CFGI_CD", StreamID=0x20, SubstreamID=2, Leaf=1), words_of("TLBI_NH_ASID", ASID=3),
    ])  # fmt: skip
    assert reached(device, pasid=2) is None and reached(device, pasid=3) == RAM + 0x9000


def test_the_failing_command_of_a_guest_is_named(make):
    _, device, _, viommu = nested(make)
    good = words_of("TLBI_NSNH_ALL")
    syncs = device.iommu.queue.syncs
    with pytest.raises(IommuError, match=r"command 2, CFGI_CD: the guest has no sid 0x21") as error:
        viommu.invalidate([good, good, words_of("CFGI_CD", StreamID=0x21)])
    assert error.value.errno == errno.EIO and error.value.value == 2
    with pytest.raises(IommuError, match=r"command 1 is CFGI_STE: not for a guest"):
        viommu.invalidate([good, words_of("CFGI_STE", StreamID=0x20)])
    assert device.iommu.queue.syncs == syncs
    # what only the SMMU finds is named too: an address size that no ATC_INV may have
    with pytest.raises(IommuError, match=r"command 1, ATC_INV.*illegal command") as error:
        viommu.invalidate([good, words_of("ATC_INV", StreamID=0x20, Size=60), good])
    assert error.value.errno == errno.EIO and error.value.value == 1
    assert viommu.invalidate([good]) == 1  # and the queue goes on
    refused(errno.EINVAL, viommu.invalidate, [1])
    refused(errno.EINVAL, viommu.invalidate, [(1 << 64, 0)])


# --- tables that are in use, and ends of things ---


@PROFILES
def test_the_tables_of_a_bound_process_are_neither_closed_nor_copied(make, profile):
    system = make(profile=profile)
    device = able(system, system.device(8, pasid_bits=4, ats=True))
    space = process(system)
    bond = device.bind(space)
    table = space.table

    def close():
        table.ready = False

    for call in (table.close, close):
        refused(errno.EBUSY, call)
    for thing, how in itertools.product(
        (space, table, device, device.domain), (copy.copy, copy.deepcopy, pickle.dumps)
    ):
        if thing not in (IDENTITY, BLOCKED):
            with pytest.raises(TypeError, match=r"it has no copies"):
                how(thing)
    assert reached(device, pasid=space.pasid) == RAM
    space.exit()
    refused(errno.EBUSY, table.close)  # the quiet CD is there until the last bond ends
    table.unmap(PAGE, PAGE)
    refused(errno.EBUSY, close)
    bond.unbind()
    used = system.pages.in_use
    close()
    table.close()
    assert system.pages.in_use < used


def test_copies_of_the_constant_domains_are_what_they_were(make):
    system = make()
    device = system.device(8, ats=True)
    for domain, pa in ((IDENTITY, PAGE), (BLOCKED, None)):
        kept = pickle.loads(pickle.dumps(domain))
        for one in (copy.copy(domain), copy.deepcopy([domain])[0], kept):
            assert one is domain
            device.replace(one)
            assert reached(device) == pa
    for profile in (AUX, NOW):
        assert copy.deepcopy(profile) is pickle.loads(pickle.dumps(profile)) is profile


def test_copies_of_domains_are_refused(make):
    system = make()
    device = system.device(8, pasid_bits=4)
    host = device.paging_domain(nest_parent=True)
    device.attach(IDENTITY)
    space = process(system)
    device.bind(space)
    (sva,) = space.domains.values()
    for domain in (paging(system, device), host, Viommu(host).domain((0b1001, 0)), sva):
        for how in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=r"it has no copies"):
                how(domain)


def test_a_freed_domain_is_refused_everywhere_today(make):
    system = make()
    device = system.device(8, pasid_bits=4)
    freed, kept = paging(system, device), paging(system, device)
    parent = device.paging_domain(nest_parent=True)
    viommu = Viommu(parent)
    guest, bypass = viommu.domain((0b1001, 0)), Viommu(parent).domain((0b1001, 0))
    device.attach_pasid(kept, 3)
    viommu.close()
    freed.free()
    freed.free()
    share = device.mediated()
    for domain in (freed, guest):
        for call in (
            lambda d: device.attach(d), lambda d: device.replace(d), lambda d: device.group.set(d),
            lambda d: device.group.attach(d), lambda d: device.attach_pasid(d, 4),
            lambda d: device.replace_pasid(d, 3, AttachHandle()), lambda d: share.attach(d),
        ):  # fmt: skip
            refused(errno.EINVAL, call, domain)
    parent.free()
    for call in (
        lambda: Viommu(freed), lambda: Viommu(parent), lambda: device.group.set(bypass),
        freed.change_asid, lambda: viommu.domain((0b1001, 0)),
    ):  # fmt: skip
        refused(errno.EINVAL, call)
    assert (device.domain, device.group.pasids, share.domain) == (BLOCKED, {3: kept}, None)


def test_a_freed_domain_is_refused_everywhere_in_the_old_profile(make):
    system = make(profile=AUX)
    device = able(system, system.device(8, pasid_bits=4))
    other = system.device(9, pasid_bits=4)
    main, freed = device.domain, paging(system, device)
    device.attach_aux(freed)
    device.detach_aux(freed)
    assert list(system.pasids) == [1]
    freed.free()
    assert list(system.pasids) == []
    unused = system.paging_domain()
    unused.free()
    share = device.mediated()
    for domain in (freed, unused):
        for call in (device.attach_aux, share.attach, other.attach, other.replace, other.group.set):
            refused(errno.EINVAL, call, domain)
    assert (device.aux, other.domain, share.domain, main.children) == ({}, BLOCKED, None, {})


def test_an_exited_process_is_not_bound_again(make):
    system = make()
    device, other = system.device(8, pasid_bits=4), system.device(9, pasid_bits=4)
    for one in (device, other):
        one.attach(IDENTITY)
    space = process(system)
    bond = device.bind(space)
    space.exit()
    for one in (device, other):
        refused(errno.EINVAL, one.bind, space)
    assert (bond.references, other.group.pasids) == (1, {})
    bond.unbind()
    refused(errno.EINVAL, device.bind, space)
    assert (len(system.pasids), len(system.asids), space.domains) == (0, 0, {})


# --- mediated devices ---


@PROFILES
def test_a_share_is_taken_away_by_nobody_else(make, profile):
    system = make(profile=profile)
    device = able(system, system.device(8, pasid_bits=4, ats=True))
    domain, other = paging(system, device), paging(system, device)
    share = device.mediated()
    share.attach(domain)
    if profile is AUX:
        domain.map(PAGE, RAM, PAGE)
        refused(errno.EBUSY, device.detach_aux, domain)
        refused(errno.EBUSY, device.attach_aux, domain)
        refused(errno.EBUSY, device.disable_feature, "AUX")
    else:
        refused(errno.EBUSY, device.detach_pasid, domain, share.pasid)
        refused(errno.EBUSY, device.replace_pasid, other, share.pasid, AttachHandle())
        refused(errno.EBUSY, device.attach_pasid, other, share.pasid)
    refused(errno.EBUSY, domain.free)
    refused(errno.EBUSY, share.attach, other)
    refused(errno.EINVAL, share.detach, other)
    assert share.access(PAGE).pa == share.translate(PAGE).pa == RAM
    assert device.shares == [share]
    pasid = share.pasid
    share.detach(domain)
    assert reached(device, pasid=pasid) is None
    refused(errno.EINVAL, share.detach)
    refused(errno.EINVAL, share.translate, PAGE)
    domain.free()
    assert (device.shares, len(system.pasids), share.domain, share.pasid) == ([], 0, None, None)


def test_two_shares_with_one_auxiliary_domain_are_counted(make):
    system = make(profile=AUX)
    device = able(system, system.device(8, pasid_bits=4, ats=True))
    domain = system.paging_domain()
    one, two = device.mediated(), device.mediated()
    one.attach(domain)
    two.attach(domain)
    domain.map(PAGE, RAM, PAGE)
    assert one.pasid == two.pasid == domain.pasid(device) and domain.users == 1
    one.detach(domain)
    assert two.access(PAGE).pa == RAM and one.domain is None and two.domain is domain
    refused(errno.EBUSY, domain.free)
    two.detach(domain)
    assert reached(device, pasid=1) is None
    domain.free()


@pytest.mark.parametrize(
    ("profile", "end"), [(AUX, "release"), (AUX, "shutdown"), (NOW, "release")]
)
def test_a_share_ends_with_its_parent(make, profile, end):
    system = make(profile=profile)
    device = able(system, system.device(8, pasid_bits=4, ats=True))
    shares = [device.mediated() for _ in range(3)]
    domains = [paging(system, device) for _ in range(2)]
    for share, domain in zip(shares, (domains[0], domains[1], domains[1]), strict=True):
        share.attach(domain)
    pasids = [share.pasid for share in shares]
    getattr(device, end)()
    assert [share.domain for share in shares] == [None] * 3
    assert [domain.users for domain in domains] == [0, 0]
    for pasid in pasids:
        assert system.smmu.translate(8, PAGE, ssid=pasid).pa is None
    for domain in domains:
        domain.free()
    assert len(system.pasids) == 0
    if end == "release":
        refused(errno.ENODEV, shares[0].attach, domains[0])


# --- release and shutdown, whatever callbacks do ---


def boom(*_):
    raise RuntimeError("boom")


CALLBACKS = ["mm_exit", "on_interrupt", "on_fault", "observer", "handler", "on_resume"]


def arm(system, device, space, callback):
    """Let a callback of the host raise from now on."""
    if callback == "mm_exit":
        device.mm_exit = boom
    elif callback == "on_interrupt":
        system.smmu.on_interrupt = boom
    elif callback == "on_fault":
        system.on_fault = boom
    elif callback == "observer":
        device.iommu.writer.observer = boom
    elif callback == "handler":
        space.handler = boom
    else:
        system.smmu.on_resume = boom


ENDS = [
    *((AUX, end) for end in ("release", "shutdown", "exit", "unbind")),
    *((NOW, end) for end in ("release", "exit", "unbind")),
]


@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize(("profile", "end"), ENDS)
def test_whatever_a_callback_raises_what_began_comes_to_its_end(make, profile, callback, end):
    system = make(profile=profile)
    smmu = system.smmu
    device = able(system, system.device(8, pasid_bits=4, stall=True, ats=True))
    main = device.domain if profile is AUX else with_main(system, device)
    extra, space = paging(system, device, RAM + PAGE), process(system, RAM + 2 * PAGE)
    pasid = attach(system, device, extra)
    bond = device.bind(space)
    for one in (None, pasid, space.pasid):
        stall(device, 0x10000, one)
    arm(system, device, space, callback)
    thing = {"release": device, "shutdown": device, "exit": space, "unbind": bond}[end]
    try:
        getattr(thing, end)()
    except RuntimeError as error:
        assert str(error) == "boom"
    smmu.on_interrupt = smmu.on_resume = system.on_fault = system.iommus[0].writer.observer = None
    space.handler = None
    assert smmu.translate(8, PAGE, ssid=1).pa != RAM + 2 * PAGE
    assert smmu.translate(8, PAGE, ssid=2).pa != RAM + 2 * PAGE
    system.service()
    if end == "release":
        assert (main.users, extra.users, bond.pasid, smmu.stalls) == (0, 0, 0, [])
        for one in (None, 1, 2, 3):
            assert smmu.translate(8, PAGE, ssid=one).pa is None
    elif end == "shutdown":
        assert (main.users, extra.users, bond.pasid, device.enabled_features) == (1, 0, 0, {})
    elif end == "exit":
        assert space.exited and bond.references == 1
        bond.unbind()
    if end != "release":
        device.release()
    assert (main.users, extra.users, space.bonds) == (0, 0, [])
    extra.free()
    main.free()
    space.exit()
    space.table.close()
    assert (len(system.asids), len(system.pasids)) == (0, 0)


# --- stores that the host's memory refuses ---


class Stage:
    """A system in the middle of its life, on memory that may refuse."""

    def __init__(self, profile, ats):
        self.medium = SystemMedium(profile=profile)
        self.system = system = self.medium.system
        self.group = system.group()
        more = {"pasid_bits": 4, "ats": ats, "group": self.group}
        self.devices = [system.device(8 + n, **more) for n in range(2)]
        self.device = able_group(system, self.group)
        self.main = self.group.domain
        self.masters = [device.master for device in self.devices]
        self.extra, self.other = paging(system, self.device), paging(system, self.device)
        self.space = process(system)
        self.pasid = self.bond = self.share = None

    @property
    def domains(self):
        return [self.main, self.extra, self.other]

    def joined(self):
        self.devices.append(
            self.system.device(10, pasid_bits=4, ats=True, group=self.group)
        )
        self.masters.append(self.devices[-1].master)

    def sound(self):
        """Nothing that was freed is reached from an STE."""
        system = self.system
        pages = {address for address, _ in system.pages._handed_out()}
        roots = {d.root: d for d in (*self.domains, self.space.table) if d.root}
        read = system.memory.read
        for sid in (8, 9, 10):
            ste = layout.unpack("STE", read(system.iommus[0].ste_address(sid), 64))
            if not ste["V"] or ste["Config"] in (0, 4):
                continue
            assert ste["Config"] == 5
            assert ste["S1ContextPtr"] in pages, (sid, "a freed CD table is reached")
            for ssid in range(1 << ste["S1CDMax"]):
                cd = layout.unpack("CD", read(ste["S1ContextPtr"] + 64 * ssid, 64))
                if cd["V"] and not cd["EPD0"]:
                    assert cd["TTB0"] in roots, (sid, ssid, "a freed page table is reached")
                    owner = roots[cd["TTB0"]]
                    if owner is not self.space.table:
                        assert system.asids.find(cd["ASID"]) is owner

    def whole(self):
        """All devices of the group have what one of them has."""
        for device in self.group.devices:
            assert device.domain is self.group.domain
            if self.system.profile is NOW:
                held = {pasid: one.domain for pasid, one in device.master.attachments.items()}
                assert held.pop(0) is self.group.domain
                assert held == {pasid: self.group.at(pasid) for pasid in self.group.pasids}

    def ends(self):
        """Everything can be taken away, and nothing is left."""
        system = self.system
        if self.share is not None and self.share.domain is not None:
            self.share.detach()
        for device in self.devices:
            if device._master is not None:
                device.release()
        self.sound()
        for domain in self.domains:
            assert domain.users == 0 and len(domain.invalidations) == 0
        assert self.space.bonds == [] and self.space.domains == {}
        for domain in (self.extra, self.other, self.main):
            domain.free()
        self.space.exit()
        self.space.table.close()
        assert (len(system.asids), len(system.pasids)) == (0, 0)
        for sid in (8, 9, 10):
            for ssid in (None, 1, 2, 3):
                assert system.smmu.translate(sid, PAGE, ssid=ssid).pa is None
        assert [m.own_table for m in self.masters] == [None] * len(self.masters)
        assert system.iommus[0].devices == {}


def test_a_device_that_the_memory_keeps_stays_until_it_is_released_again():
    medium = SystemMedium(profile=NOW)
    system = medium.system
    device = system.device(8, pasid_bits=4)
    domain = paging(system, device)
    device.attach_pasid(domain, 2)  # beside a main domain that blocks
    medium.dead, medium.left = True, 0
    with pytest.raises(OSError, match="the medium refuses"):
        device.release()
    assert system.iommus[0].devices == {8: device}
    assert device.domain_at(2) is domain and domain.users == 1
    refused(errno.EBUSY, domain.free)
    medium.left = None
    assert system.check() == []
    device.release()
    assert system.iommus[0].devices == {} and domain.users == 0
    domain.free()
    assert system.check() == []


def able_group(system, group):
    """As `able`, of all devices of a group."""
    device = group.devices[0]
    main = paging(system, device)
    group.attach(main)
    if system.profile is AUX:
        main.map(PAGE, RAM, PAGE)
        for one in group.devices:
            one.enable_feature("AUX")
            one.enable_feature("SVA")
    return device


def give(stage):
    stage.pasid = attach(stage.system, stage.device, stage.extra)


def bind(stage):
    stage.bond = stage.device.bind(stage.space)


def lend(stage):
    stage.share = stage.device.mediated()
    stage.share.attach(stage.extra)


def both(stage):
    give(stage)
    bind(stage)


def reset(stage):
    device = stage.system.device(10, pasid_bits=4, ats=True)
    stage.devices.append(device)
    stage.masters.append(device.master)
    stage.device = device
    able_alone(stage, device)
    device.bind(stage.space)


def able_alone(stage, device):
    if stage.system.profile is AUX:
        device.attach(stage.main)
        device.enable_feature("SVA")


def prepared(stage):
    reset(stage)
    stage.device.reset_prepare()


def nothing(stage):
    pass


def disable(stage):
    """AUX: only devices without features change their main domain."""
    for device in stage.devices:
        for feature in list(device.enabled_features):
            device.disable_feature(feature)


REFUSED = {
    "set": (disable, lambda s: s.group.set(s.other), {NOW, AUX}),
    "set_blocked": (disable, lambda s: s.group.set(BLOCKED), {NOW, AUX}),
    "set_beside": (both, lambda s: s.group.set(IDENTITY), {NOW}),
    "give": (nothing, give, {NOW, AUX}),
    "take": (give, lambda s: detach(s.system, s.device, s.extra, s.pasid), {NOW, AUX}),
    "replace_pasid": (
        give, lambda s: s.device.replace_pasid(s.other, s.pasid, AttachHandle()), {NOW}
    ),
    "bind": (nothing, bind, {NOW, AUX}),
    "unbind": (bind, lambda s: s.bond.unbind(), {NOW, AUX}),
    "exit": (bind, lambda s: s.space.exit(), {NOW, AUX}),
    "lend": (nothing, lend, {NOW, AUX}),
    "back": (lend, lambda s: s.share.detach(), {NOW, AUX}),
    "join": (both, Stage.joined, {NOW, AUX}),
    "release": (both, lambda s: s.device.release(), {NOW, AUX}),
    "release_lent": (lend, lambda s: s.device.release(), {NOW, AUX}),
    "shutdown": (both, lambda s: s.device.shutdown(), {AUX}),
    "change_asid": (both, lambda s: s.extra.change_asid(), {NOW, AUX}),
    "reset_prepare": (reset, lambda s: s.device.reset_prepare(), {NOW, AUX}),
    "reset_done": (prepared, lambda s: s.device.reset_done(), {NOW, AUX}),
}  # fmt: skip
REFUSED_CASES = [
    (profile, what) for what, (_, _, profiles) in REFUSED.items() for profile in (AUX, NOW)
    if profile in profiles
]  # fmt: skip


SLOW = pytest.mark.slow
MANNERS = [
    pytest.param(True, False, id="once_ats"),
    pytest.param(False, False, id="once", marks=SLOW),
    pytest.param(True, True, id="from_then_on_ats", marks=SLOW),
    pytest.param(False, True, id="from_then_on", marks=SLOW),
]


@pytest.mark.parametrize(("ats", "dead"), MANNERS)
@pytest.mark.parametrize(
    ("profile", "what"), REFUSED_CASES, ids=[f"{p.name}-{w}" for p, w in REFUSED_CASES]
)
def test_whichever_store_is_refused_nothing_freed_is_reached(profile, what, ats, dead):
    before, change, _ = REFUSED[what]
    for nth in itertools.count():
        stage = Stage(profile, ats)
        before(stage)
        stage.medium.dead = dead
        stage.medium.left = nth
        try:
            change(stage)
        except OSError:
            stage.sound()
        else:
            assert stage.medium.left is not None
            break
        stage.medium.left = None
        stage.medium.dead = False
        if not dead and not what.startswith("release"):
            stage.whole()
        if what == "exit":
            stage.space.exit()  # again
            for sid in (8, 9):
                assert stage.system.smmu.translate(sid, PAGE, ssid=stage.pasid or 1).pa is None
        if not dead:
            stage.ends()
    assert nth > 2


# --- invalidations: what was cached must not be reached any more ---


def test_a_new_domain_of_a_pasid_is_seen_through_a_warm_atc(make):
    system = make()
    device = system.device(8, pasid_bits=4, ats=True)
    device.attach(IDENTITY)
    one, two = paging(system, device), paging(system, device, RAM + PAGE)
    device.attach_pasid(one, 3)
    assert reached(device, pasid=3) == RAM
    device.replace_pasid(two, 3, AttachHandle())
    assert reached(device, pasid=3) == RAM + PAGE
    assert reached(device) == PAGE
    device.detach_pasid(two, 3)
    assert reached(device, pasid=3) is None


def test_a_new_main_domain_is_seen_through_a_warm_atc_at_every_stage(make):
    system = make()
    device = system.device(8, pasid_bits=4, ats=True)
    domains = [
        paging(system, device, RAM + n * PAGE, stage=1 + n % 2) for n in range(4)
    ]
    for n, domain in enumerate(domains):
        device.replace(domain)
        assert device.ats_enabled and reached(device) == RAM + n * PAGE
    for n, domain in enumerate(domains):
        device.replace(domain)
        assert reached(device) == RAM + n * PAGE
        domain.unmap(PAGE, PAGE)
        assert reached(device) is None
    device.replace(BLOCKED)
    assert not device.ats_enabled and len(device.atcs[0]) == 0


def test_the_last_pasid_of_a_plain_main_domain_empties_the_atc_before_ats_goes_off(make):
    system = make()
    device = system.device(8, pasid_bits=4, ats=True)
    device.attach(IDENTITY)
    domains = [paging(system, device, RAM + n * PAGE) for n in range(2)]
    for n, domain in enumerate(domains):
        device.attach_pasid(domain, 3 + n)
    assert device.ats_enabled and reached(device, pasid=4) == RAM + PAGE and reached(device) == PAGE
    device.detach_pasid(domains[0], 3)
    assert device.ats_enabled and reached(device, pasid=4) == RAM + PAGE
    queue = device.iommu.queue
    queue.log = log = []
    device.detach_pasid(domains[1], 4)
    queue.log = None
    whole = [n for n, (name, fields) in enumerate(log) if name == "ATC_INV" and not fields["SSV"]]
    ste = [n for n, (name, _) in enumerate(log) if name == "CFGI_STE"]
    assert whole and ste and whole[0] < ste[0]
    assert not device.ats_enabled and len(device.atcs[0]) == 0
    assert reached(device) == PAGE and reached(device, pasid=4) is None


def test_a_reset_empties_and_what_is_unmapped_meanwhile_is_not_reached(make):
    system = make()
    device = system.device(8, pasid_bits=4, ats=True, stall=True)
    main, other = (paging(system, device, RAM + n * PAGE) for n in range(2))
    device.attach(main)
    device.attach_pasid(other, 3)
    for domain in (main, other):
        domain.map(2 * PAGE, RAM, PAGE)
    assert reached(device) == RAM and reached(device, pasid=3) == RAM + PAGE
    stall(device, 0x10000, 3)
    stall(device, 0x10000)
    device.reset_prepare()
    assert device.smmu.stalls == [] and not device.ats_enabled
    assert reached(device) is None and reached(device, pasid=3) is None
    queue = device.iommu.queue
    queue.log = log = []
    main.unmap(PAGE, PAGE)
    other.unmap(PAGE, PAGE)
    assert "ATC_INV" not in [name for name, _ in log]  # a device in reset answers nothing
    log.clear()
    device.reset_done()
    queue.log = None
    names = [name for name, _ in log]
    assert names.index("CFGI_STE") < names.index("ATC_INV")
    assert reached(device) is None and reached(device, pasid=3) is None
    assert reached(device, 2 * PAGE) == reached(device, 2 * PAGE, 3) == RAM
    main.unmap(2 * PAGE, PAGE)
    other.unmap(2 * PAGE, PAGE)
    assert reached(device, 2 * PAGE) is None and reached(device, 2 * PAGE, 3) is None


@PROFILES
@pytest.mark.parametrize("e2h", [False, True], ids=["", "e2h"])
def test_a_tag_is_forgotten_before_somebody_else_has_it(make, profile, e2h):
    system = make(profile=profile, e2h=e2h)
    device = able(system, system.device(8, pasid_bits=4))
    for n in range(4):
        domain = paging(system, device, RAM + n * PAGE)
        pasid = attach(system, device, domain)
        if profile is AUX:
            domain.map(PAGE, RAM + n * PAGE, PAGE)
        assert reached(device, pasid=pasid) == RAM + n * PAGE
        asid = domain.asid
        detach(system, device, domain, pasid)
        domain.free()
        space = process(system, RAM + (8 + n) * PAGE)
        bond = device.bind(space)
        assert reached(device, pasid=bond.pasid) == RAM + (8 + n) * PAGE
        assert next(iter(space.domains.values())).asid == asid
        space.exit()
        assert reached(device, pasid=space.pasid) is None
        bond.unbind()
        assert reached(device, pasid=1) is None
    two = [paging(system, device, RAM + n * PAGE, stage=2) for n in (0, 1)]
    other = system.device(9)
    other.attach(two[0])
    assert reached(other) == RAM
    vmid = two[0].vmid
    other.replace(BLOCKED)
    two[0].free()
    again = paging(system, device, RAM + 2 * PAGE, stage=2)
    assert again.vmid == vmid
    other.attach(again)
    assert reached(other) == RAM + 2 * PAGE


def test_an_asid_that_a_domain_left_is_clean_for_the_next(make):
    system = make()
    device = system.device(8, pasid_bits=4)
    device.attach(IDENTITY)
    one, two = paging(system, device), paging(system, device, RAM + PAGE)
    device.attach_pasid(one, 3)
    old = one.asid
    assert reached(device, pasid=3) == RAM
    one.change_asid()
    assert reached(device, pasid=3) == RAM
    taken = paging(system, device, RAM + 2 * PAGE)
    assert old in (taken.asid, two.asid)
    device.attach_pasid(taken, 4)
    assert reached(device, pasid=4) == RAM + 2 * PAGE
    one.unmap(PAGE, PAGE)  # under the new one
    assert reached(device, pasid=3) is None
    device.detach_pasid(one, 3)
    assert len(one.invalidations) == 0


@PROFILES
def test_every_device_of_a_table_is_told_when_a_cd_goes(make, profile):
    """AUX: two devices of one main domain, only one of which is attached; with ATCs."""
    system = make(profile=profile)
    one, two = (system.device(8 + n, pasid_bits=4, ats=True) for n in range(2))
    if profile is NOW:
        shared = paging(system, one)
        for device in (one, two):
            device.attach(IDENTITY)
            device.attach_pasid(shared, 3)
            assert reached(device, pasid=3) == RAM
        one.detach_pasid(shared, 3)
        assert (reached(one, pasid=3), reached(two, pasid=3)) == (None, RAM)
        return
    main = with_main(system, one)
    two.attach(main)
    able(system, one)
    for n in range(3):
        space = process(system, RAM + n * PAGE)
        bond = one.bind(space)
        assert reached(two, pasid=space.pasid) == RAM + n * PAGE
        (bond.unbind, space.exit)[n % 2]()
        assert reached(two, pasid=1) is None and reached(one, pasid=1) is None
        space.exit()
        if bond.references:
            bond.unbind()
        aux = system.paging_domain()
        one.attach_aux(aux)
        aux.map(PAGE, RAM + (8 + n) * PAGE, PAGE)
        assert reached(two, pasid=aux.pasid(one)) == RAM + (8 + n) * PAGE
        aux.unmap(PAGE, PAGE)
        assert reached(two, pasid=aux.pasid(one)) is None
        aux.map(PAGE, RAM, PAGE)
        assert reached(two, pasid=aux.pasid(one)) == RAM
        one.detach_aux(aux)
        assert reached(two, pasid=aux.pasid(one)) is None
        aux.free()


def test_what_one_device_leaves_is_not_in_its_atc_while_others_have_it(make):
    system = make(profile=AUX)
    one, two = (system.device(8 + n, pasid_bits=4, ats=True) for n in range(2))
    main = with_main(system, one)
    two.attach(main)
    for device in (one, two):
        able(system, device)
    aux = system.paging_domain()
    one.attach_aux(aux)
    two.attach_aux(aux)
    aux.map(PAGE, RAM + PAGE, PAGE)
    pasid = aux.pasid(one)
    assert reached(one, pasid=pasid) == reached(two, pasid=pasid) == RAM + PAGE
    entries = len(one.atcs[0])
    one.detach_aux(aux)
    assert len(one.atcs[0]) < entries and reached(two, pasid=pasid) == RAM + PAGE
    two.detach_aux(aux)
    assert reached(one, pasid=pasid) is None and reached(two, pasid=pasid) is None


def test_new_leaves_are_told_and_leaves_that_go_too(make):
    """An invalid descriptor of level 1 may be cached, and so may one that goes (F6, F39)."""
    system = make()
    group = system.group()
    device = system.device([8, 0x300], pasid_bits=12, group=group)
    queue = device.iommu.queue
    queue.log = log = []
    late = system.device(0x700)
    assert ("CFGI_STE", 0x700, 0) in [(n, f.get("StreamID"), f.get("Leaf")) for n, f in log]
    late.release()
    domain = paging(system, device)
    log.clear()
    device.attach_pasid(domain, 1500)
    leaf = [(f["StreamID"], f["SubstreamID"]) for n, f in log if n == "CFGI_CD" and not f["Leaf"]]
    assert leaf == [(8, 1500), (0x300, 1500)]
    # a second member whose memory is full: the first one's new leaf goes again
    second = system.device(9, pasid_bits=12, group=group)
    before = system.pages.in_use
    log.clear()
    original = type(second.master).set_pasid

    def fails(master, *arguments):
        if master is second.master:
            raise RuntimeError("not this one")
        original(master, *arguments)

    patch = pytest.MonkeyPatch()
    patch.setattr(type(second.master), "set_pasid", fails)
    with pytest.raises(RuntimeError, match="not this one"):
        device.attach_pasid(domain, 3000)
    patch.undo()
    queue.log = None
    leaf = [f["StreamID"] for n, f in log if n == "CFGI_CD" and not f["Leaf"]]
    assert leaf == [8, 0x300, 8, 0x300]
    assert system.pages.in_use == before and domain.users == 2
    assert reached(device, pasid=3000) is None
    table = device.master.own_table
    assert system.memory.read_u64(table.base + 8 * 2) == 0 and 2 not in table.leaves


def test_a_rolled_back_replace_leaves_nothing_in_the_atc(make):
    """The device looks while the CD is the new domain's; then the ATC cannot be told."""
    system = make()
    device = system.device(8, pasid_bits=4, ats=True)
    device.attach(IDENTITY)
    one, two = paging(system, device), paging(system, device, RAM + PAGE)
    device.attach_pasid(one, 3)
    assert reached(device, pasid=3) == RAM
    seen = []
    original = type(device.master).flush_atc
    patch = pytest.MonkeyPatch()
    calls = []

    def fails(master, ssid):
        calls.append(ssid)
        if len(calls) == 1:
            device.atcs[0].clear()
            seen.append(reached(device, pasid=3))
            raise OSError("the medium refuses")
        original(master, ssid)

    patch.setattr(type(device.master), "flush_atc", fails)
    with pytest.raises(OSError, match="refuses"):
        device.replace_pasid(two, 3, AttachHandle())
    patch.undo()
    assert RAM + PAGE in seen
    assert reached(device, pasid=3) == RAM and two.users == 0
    assert len(two.invalidations) == 0


@pytest.mark.parametrize("e2h", [False, True], ids=["", "e2h"])
def test_what_an_smmu_cached_before_the_boot_is_not_reached(e2h):
    """A warm start: whoever ran before left entries under ASIDs and VMIDs that will be used."""
    memory = Memory()
    memory.add_private(0, 1 << 40)
    smmu = Smmu(memory, FULL, cr0=0, caches=Caches.server())

    def run(base, pa):
        system = System(smmu=smmu, pages=(base, 1 << 26), e2h=e2h)
        one, two = system.device(8, pasid_bits=4), system.device(9)
        first = paging(system, one, pa)
        second = paging(system, two, pa, stage=2)
        one.attach(first)
        two.attach(second)
        found = [reached(one), reached(two)]
        return found, (first.asid, second.vmid)

    old, tags = run(0x1000_0000, RAM)
    assert old == [RAM, RAM]
    new, again = run(0x2000_0000, RAM + PAGE)
    assert tags == again
    assert new == [RAM + PAGE, RAM + PAGE]
    third = System(smmu=smmu, pages=(0x3000_0000, 1 << 26), e2h=e2h)
    assert third.smmu.translate(8, PAGE).pa is None and third.stale() == []


# --- groups ---


@PROFILES
@pytest.mark.parametrize("ats", [False, True], ids=["", "ats"])
def test_whoever_joins_a_group_has_what_it_has(make, profile, ats):
    system = make(profile=profile)
    group = system.group()
    one = system.device(8, pasid_bits=4, group=group, ats=ats)
    if profile is AUX:
        main = system.paging_domain()
        group.attach(main)
        one.enable_feature("SVA")
    else:
        main = paging(system, one)
        group.attach(main)
        other = paging(system, one, RAM + PAGE)
        one.attach_pasid(other, 5)
    space = process(system, RAM + 2 * PAGE)
    bond = one.bind(space)
    two = system.device(9, pasid_bits=4, group=group, ats=ats)
    assert reached(two, pasid=space.pasid) == RAM + 2 * PAGE and two.domain is main
    if profile is NOW:
        assert reached(two, pasid=5) == RAM + PAGE
        plain = system.device(10, group=group)  # it has no PASIDs
        assert plain.domain is main and main.users == 3
        plain.release()
    else:
        refused(errno.EINVAL, system.device, 10, group=group)  # no CD table for two widths
    one.release()  # the bond was its own
    assert bond.pasid == 0 and reached(two, pasid=1) is None
    two.release()
    assert (main.users, group.devices, len(system.iommus[0].devices)) == (0, [], 0)
    space.exit()
    space.table.close()
    assert len(system.pasids) == 0


def test_a_group_whose_member_is_being_reset_changes_nothing(make):
    system = make()
    group = system.group()
    one = system.device(8, pasid_bits=4, ats=True, group=group)
    main, other = paging(system, one), paging(system, one, RAM + PAGE)
    group.attach(main)
    one.attach_pasid(other, 3)
    bond = one.bind(process(system))
    one.reset_prepare()
    for call in (
        lambda: system.device(9, pasid_bits=4, group=group), lambda: group.set(IDENTITY),
        lambda: group.attach(IDENTITY), lambda: one.attach_pasid(other, 4), bond.unbind,
        lambda: one.detach_pasid(other, 3), lambda: one.replace_pasid(main, 3, AttachHandle()),
        lambda: one.mediated().attach(other), one.reset_prepare,
    ):  # fmt: skip
        refused(errno.EBUSY, call)
    assert system.iommus[0].devices == {8: one}
    one.reset_done()
    two = system.device(9, pasid_bits=4, ats=True, group=group)
    for device in (one, two):
        assert (reached(device), reached(device, pasid=3)) == (RAM, RAM + PAGE)
    for device in (one, two):
        refused(errno.EBUSY, device.reset_prepare)  # the other would go on
    one.release()
    two.reset_prepare()
    two.release()
    assert (main.users, other.users) == (0, 0)


def test_the_only_member_with_pasids_takes_them_along(make):
    system = make()
    group = system.group()
    plain = system.device(8, group=group)
    able_one = system.device(9, pasid_bits=4, group=group)
    other = paging(system, plain)
    handle = AttachHandle()
    plain.attach_pasid(other, 2, handle)
    assert reached(able_one, pasid=2) == RAM and handle.domain is other
    able_one.release()
    assert (group.pasids, other.users, handle.domain) == ({}, 0, None)
    third = system.device(10, pasid_bits=4, group=group)
    assert reached(third, pasid=2) is None
    plain.attach_pasid(other, 2, handle)
    assert reached(third, pasid=2) == RAM


def test_coherence_that_is_demanded_late_is_refused_where_it_cannot_be(make):
    system = make()
    group = system.group()
    noisy = system.device(8, pasid_bits=4, coherent=False)
    quiet = system.device(9, pasid_bits=4, group=group)
    one, two = paging(system, noisy), paging(system, noisy)
    noisy.attach_pasid(one, 3)
    refused(errno.EINVAL, one.enforce_cache_coherency)
    noisy.reset_prepare()
    noisy.reset_done()
    assert reached(noisy, pasid=3) == RAM
    quiet.attach_pasid(two, 3)
    two.enforce_cache_coherency()
    refused(errno.EINVAL, noisy.attach_pasid, two, 4)
    refused(errno.EINVAL, noisy.attach, two)
    refused(errno.EINVAL, noisy.replace_pasid, two, 3, AttachHandle())
    with pytest.raises(InvalidArgument, match="snoop"):
        system.device(10, pasid_bits=4, coherent=False, group=group)
    assert 10 not in system.iommus[0].devices
    noisy.release()
    one.enforce_cache_coherency()


def test_a_group_attaches_on_all_devices_or_on_none(make, monkeypatch):
    system = make()
    group = system.group()
    devices = [system.device(8 + n, pasid_bits=4, ats=True, group=group) for n in range(3)]
    one, two = paging(system, devices[0]), paging(system, devices[0], RAM + PAGE)
    group.attach(one)
    last = devices[2].master
    for name, call in (
        ("attach", lambda: group.set(two)), ("set_pasid", lambda: devices[0].attach_pasid(two, 3)),
    ):  # fmt: skip
        original = getattr(type(last), name)

        def fails(master, *arguments, original=original):
            if master is last and two in arguments:
                raise OSError("refused")
            original(master, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(type(last), name, fails)
            with pytest.raises(OSError, match="refused"):
                call()
        assert two.users == 0 and one.users == 3 and group.pasids == {}
        for device in devices:
            assert reached(device) == RAM and reached(device, pasid=3) is None


def test_a_share_of_one_member_stays_when_another_leaves(make):
    system = make()
    group = system.group()
    one, two = (system.device(8 + n, pasid_bits=4, group=group) for n in range(2))
    share, domain = one.mediated(), paging(system, one)
    share.attach(domain)
    assert reached(two, pasid=share.pasid) == RAM
    two.release()
    assert share.translate(PAGE).pa == RAM and share.domain is domain
    one.release()
    assert (share.domain, domain.users, len(system.pasids)) == (None, 0, 0)


# --- plugging in and out ---


def cycles(system, count, profile, prompt):
    """Plug a device in and out, with all that it may have."""
    for _ in range(count):
        device = able(system, system.device(8, pasid_bits=4, ats=True))
        main = device.domain if profile is AUX else with_main_over(system, device)
        domain = paging(system, device)
        attach(system, device, domain)
        share = device.mediated()
        extra = paging(system, device)
        share.attach(extra)
        space = prompt()
        device.bind(space)
        two = device.paging_domain(nest_parent=True)
        Viommu(two)
        device.release()
        for one in (domain, extra, main, two):
            if one not in (IDENTITY, BLOCKED):
                one.free()
        space.exit()
        space.table.close()


def with_main_over(system, device):
    """A main domain instead of the group's default one."""
    domain = paging(system, device)
    device.replace(domain)
    return domain


def growth(profile, count):
    """What is in use after some cycles and after more: numbers, pages, Python objects."""
    system = System(profile=profile, default_domain="paging" if profile is NOW else "blocked")
    seen = []
    for _ in range(2):
        cycles(system, count, profile, lambda: AddressSpace.of(system))
        gc.collect()
        iommu = system.iommus[0]
        seen.append((
            len(system.asids), len(iommu.vmids), len(system.pasids), system.pages.in_use,
            len(iommu.viommus), len(iommu.page_requests), len(iommu.smmu.devices),
            len(gc.get_objects()) // 100,
        ))  # fmt: skip
    return seen


@PROFILES
def test_plugging_devices_in_and_out_leaves_nothing(profile):
    first, second = growth(profile, 20)
    assert first[:-1] == second[:-1] and first[:3] == (0, 0, 0)
    assert second[-1] - first[-1] <= 2


@pytest.mark.slow
def test_ten_thousand_devices_plugged_in_and_out_leave_nothing():
    first, second = growth(NOW, 5000)
    assert first[:-1] == second[:-1] and second[-1] - first[-1] <= 2


def test_8_bits_of_asids_are_enough_for_any_number_of_devices():
    system = System(default_domain="paging", features=FULL.replace(asid16=0))
    for _ in range(300):
        device = system.device(8)
        assert len(system.asids) == 1
        device.release()
    assert len(system.asids) == 0


# --- PASIDs, limits and words ---


def test_pasids_that_are_no_power_of_two_are_what_the_table_has(make):
    system = make()
    for count, most in ((5, 4), (1, 0), (2, 2), (3, 2), (1023, 512)):
        device = system.device(8, pasids=count)
        device.attach(IDENTITY)
        assert device.max_pasids == most
        domain = paging(system, device)
        for pasid in (most, count):
            refused(errno.EINVAL, device.attach_pasid, domain, max(pasid, 1))
        if most:
            device.attach_pasid(domain, most - 1)
            assert reached(device, pasid=most - 1) == RAM
        device.release()


@PROFILES
def test_a_device_whose_pasids_are_off_sends_none(make, profile):
    system = make(profile=profile)
    device = system.device(8, pasid_bits=4)
    device.disable_pasid()
    with pytest.raises(InvalidArgument, match="PASIDs are off in the device"):
        device.translate(PAGE, pasid=1)
    if profile is AUX:
        with_main(system, device)
        device.enable_feature("AUX")
        assert device.pasid_enabled
        refused(errno.EBUSY, device.init, ["AUX"])
        assert "SVA" not in device.enabled_features
        device.init()
        refused(errno.EEXIST, device.init)
        device.shutdown()
        device.shutdown()
        assert device.enabled_features == {}
    else:
        device.enable_pasid()
        device.attach_pasid(paging(system, device), 3)
        refused(errno.EBUSY, device.disable_pasid)


MESSAGES = [
    (AUX, lambda s, d: d.enable_feature("AUX", min_pasid=9, max_pasid=3),
     "max_pasid (3) is below min_pasid (9); this device has PASIDs 1 to 15"),
    (NOW, lambda s, d: s.pasids.find(7), "pasid 7 is not allocated"),
    (NOW, lambda s, d: d.attach_pasid(IDENTITY, 1),
     "an identity domain cannot be attached to a PASID"),
    (NOW, lambda s, d: d.attach_pasid(BLOCKED, 1),
     "a blocked domain cannot be attached to a PASID"),
    (NOW, lambda s, d: d.attach_aux(d.paging_domain()),
     "attach_aux() needs System(profile=AUX); this system follows NOW"),
    (AUX, lambda s, d: d.attach_pasid(d.paging_domain(), 1),
     "attach_pasid() needs System(profile=NOW); this system follows AUX"),
    (NOW, lambda s, d: System(memory=Memory()),
     "pages=(base, size) is required with memory=: where the driver may put its tables"),
    (NOW, lambda s, d: System(profile="AUX"), "profile must be a Profile (AUX or NOW), not 'AUX'"),
]  # fmt: skip


@pytest.mark.parametrize(("profile", "call", "text"), MESSAGES, ids=[text for *_, text in MESSAGES])
def test_an_error_says_what_was_given_and_what_is_allowed(systems, profile, call, text):
    system = systems(profile=profile)
    device = system.device(8, pasid_bits=4)
    with pytest.raises(IommuError) as error:
        call(system, device)
    assert str(error.value) == text


def test_an_observer_that_changes_the_system_is_told_so(systems):
    system = systems()
    device = system.device(8, pasid_bits=4)
    told = []

    def change(*_):
        try:
            device.replace(IDENTITY)
        except Busy as error:
            told.append(str(error))

    device.iommu.writer.observer = change
    device.attach(paging(system, device))
    device.iommu.writer.observer = None
    assert set(told) == {"a callback may not change the system while it is being changed"}


# --- order by order: what each rule and each invalidation is there for ---


def test_neither_a_guest_nor_stage_2_carries_pasids(make):
    system, device, host, viommu = nested(make)
    two, one = paging(system, device, stage=2), paging(system, device)
    guest = viommu.domain((0b1001, 0))
    device.attach_pasid(one, 3)
    for domain in (two, host, guest):
        refused(errno.EBUSY, device.replace, domain)
    assert reached(device, pasid=3) == RAM
    device.detach_pasid(one, 3)
    for domain in (two, host, guest):
        device.replace(domain)
        refused(errno.EINVAL, device.attach_pasid, one, 3)
        refused(errno.EINVAL, device.bind, process(system))
    assert (one.users, len(system.pasids), device.group.pasids) == (0, 0, {})


def test_wide_tables_give_all_their_leaves_back(make):
    system = make()
    start = system.device(8, pasid_bits=12)
    start.release()
    used = system.pages.in_use
    device = system.device(8, pasid_bits=12)
    domain = paging(system, device)
    for pasid in (1, 1024, 3000):
        device.attach_pasid(domain, pasid)
    device.release()
    domain.free()
    assert system.pages.in_use == used


def test_a_guests_cds_are_read_again_after_the_host_unmaps(make):
    system, device, host, viommu = nested(make)
    guest = Guest(system, host)
    device.attach(viommu.domain(guest.ste()))
    assert reached(device) == reached(device, pasid=2) == RAM + 0x8000
    queue = device.iommu.queue
    queue.log = log = []
    host.unmap(Guest.IPA, 1 << 21)
    queue.log = None
    assert "CFGI_CD_ALL" in [name for name, _ in log] and log[-1][0] == "SYNC"
    other = RAM + (1 << 21)
    host.map(Guest.IPA, other, 1 << 21)  # where the tables are, and no CD
    system.memory.write(other + 0x1000, system.memory.read(RAM + 0x1000, 0x3000))
    assert reached(device) is None and reached(device, pasid=2) is None
    host.unmap(Guest.IPA, 1 << 21)
    host.map(Guest.IPA, RAM, 1 << 21)
    host.flush_all()
    assert reached(device) == RAM + 0x8000


def test_a_boot_is_complete_when_it_returns(make):
    system = make(2)
    for iommu in system.iommus:
        assert iommu.queue.syncs >= 1
        assert iommu.smmu.read("CMDQ_CONS") == iommu.smmu.read("CMDQ_PROD") == iommu.queue.prod


def test_faults_of_other_devices_wait_on(make):
    system = make()
    devices = [system.device(8 + n, pasid_bits=4, stall=True) for n in range(2)]
    asked = []
    domains = [paging(system, device) for device in devices]
    for device, domain in zip(devices, domains, strict=True):
        domain.iopf = recorder(asked)
        device.attach(domain)
        device.attach_pasid(domain, 3)
        stall(device, 0x10000)
        stall(device, 0x10000, 3)
    devices[0].replace(BLOCKED)
    devices[0].detach_pasid(domains[0], 3)
    assert [(one.sid, one.ssid) for one in system.smmu.stalls] == [(9, None), (9, 3)]
    system.service()
    assert asked == [(None, 0x10000), (3, 0x10000)] and system.smmu.stalls == []


@PROFILES
def test_a_dead_process_is_reached_through_no_cache(make, profile):
    system = make(profile=profile)
    devices = [able(system, system.device(8 + n, pasid_bits=4, ats=n > 0)) for n in range(2)]
    space = process(system)
    bonds = [device.bind(space) for device in devices]
    for device in devices:
        assert reached(device, pasid=space.pasid) == RAM
    space.exit()
    for device in devices:
        assert reached(device, pasid=space.pasid) is None
    assert len(devices[1].atcs[0]) == 0 and system.stale() == []
    for bond in bonds:
        bond.unbind()
    assert len(system.pasids) == 0


def test_a_pasid_is_taken_from_a_process_by_nobody_else(make):
    system = make()
    device = system.device(8, pasid_bits=4)
    device.attach(IDENTITY)
    space = process(system)
    bond = device.bind(space)
    (domain,) = space.domains.values()
    refused(errno.EBUSY, device.detach_pasid, domain, space.pasid)
    refused(errno.EBUSY, device.replace_pasid, paging(system, device), space.pasid, AttachHandle())
    assert reached(device, pasid=bond.pasid) == RAM
    refused(errno.EBUSY, domain.free)


def test_a_domain_that_goes_while_it_is_asked_is_asked_no_more(make):
    system = make()
    device = system.device(8, pasid_bits=4, ats=True, pri=True)
    device.attach(IDENTITY)
    old, new = paging(system, device), paging(system, device)
    asked = []

    def leaves(fault):
        asked.append(("old", fault.iova))
        device.replace_pasid(new, 3, AttachHandle())
        return True

    old.iopf = leaves
    new.iopf = lambda fault: asked.append(("new", fault.iova)) or True
    device.attach_pasid(old, 3)
    ask(device, 0x7000, 3, last=False)
    ask(device, 0x8000, 3)
    system.service()
    assert asked == [("old", 0x7000)]
    ask(device, 0x9000, 3)
    system.service()
    assert asked[1:] == [("new", 0x9000)]


def test_tlbs_are_told_before_atcs(make):
    """Else an ATC is filled again from what a TLB still holds (4.5.1)."""
    system = make()
    device = system.device(8, pasid_bits=4, ats=True)
    main = with_main(system, device)
    device.attach_pasid(main, 3)
    queue = device.iommu.queue
    queue.log = log = []
    main.unmap(PAGE, PAGE)
    queue.log = None
    names = [name for name, _ in log]
    tlb = next(n for n, name in enumerate(names) if name.startswith("TLBI"))
    assert tlb < names.index("SYNC") < names.index("ATC_INV") and names[-1] == "SYNC"


def test_a_range_larger_than_a_page_leaves_every_atc(make):
    system = make()
    device = system.device(8, pasid_bits=4, ats=True)
    main = device.paging_domain()
    device.attach(main)
    device.attach_pasid(main, 3)
    main.map(0x10000, RAM, 16 * PAGE)
    for page in range(16):
        for pasid in (None, 3):
            assert reached(device, 0x10000 + page * PAGE, pasid) == RAM + page * PAGE
    main.unmap(0x12000, 9 * PAGE)
    for page in range(16):
        for pasid in (None, 3):
            left = None if 2 <= page < 11 else RAM + page * PAGE
            assert reached(device, 0x10000 + page * PAGE, pasid) == left


@pytest.mark.parametrize("stages", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_a_rolled_back_attach_leaves_nothing_in_the_atc(make, monkeypatch, stages):
    system = make()
    device = system.device(8, pasid_bits=4, ats=True)
    one, two = (paging(system, device, RAM + n * PAGE, stage=stages[n]) for n in range(2))
    device.attach(one)
    assert reached(device) == RAM
    seen = []
    original = type(device.master)._ats_on

    def fails(master, on):
        if not seen:
            device.atcs[0].clear()
            seen.append(reached(device))
            raise OSError("the medium refuses")
        original(master, on)

    monkeypatch.setattr(type(device.master), "_ats_on", fails)
    with pytest.raises(OSError, match="refuses"):
        device.replace(two)
    assert seen == [RAM + PAGE] and device.domain is one and device.ats_enabled
    assert reached(device) == RAM and two.users == 0


def test_what_cannot_be_taken_back_stays_as_it_is():
    done = []

    def fails():
        raise KeyError("no")

    with pytest.raises(ValueError, match="first"), Undo() as outer:
        outer.add(done.append, "outer")
        with Undo() as inner:
            inner.add(done.append, "before")
            inner.add(fails)
            inner.add(done.append, "after")
            raise ValueError("first")
    assert done == ["after"]
    with pytest.raises(ValueError, match="first"), Undo() as outer:
        outer.add(done.append, "outer")
        raise ValueError("first")
    assert done == ["after", "outer"]
