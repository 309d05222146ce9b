"""Wrong arguments, ended objects, callbacks that raise or come back, and many threads at once."""

import contextlib
import errno
import random
import sys
import threading

import pytest
from driverhalf import refused

from smmufast import Caches, Features
from smmufast.iommu import (
    AUX,
    IDENTITY,
    AddressSpace,
    AttachHandle,
    Busy,
    Exists,
    InvalidArgument,
    IommuError,
    IovaAllocator,
    NestedDomain,
    NoDevice,
    System,
    Viommu,
    WrongType,
)

RAM = 0x8000_0000
PAGE = 0x1000
STRANGE = ["x", 1.5, None, -1, 1 << 70, [], (), b"a", object()]


def calls(system, device, domain, bad):
    """Each call with a strange argument: its name, the call."""
    return {
        "smmus": lambda: System(bad),
        "features": lambda: System(features=bad if bad is not None else [bad]),
        "profile": lambda: System(profile=bad),
        "pasid_policy": lambda: System(pasid_policy=bad),
        "cpu": lambda: System(cpu=bad if bad is not None else 1),
        "caches": lambda: System(caches=bad if bad is not None else 1),
        "memory": lambda: System(memory=bad if bad is not None else 1, pages=(0, 1 << 20)),
        "smmu": lambda: System(smmu=bad if bad is not None else 1, pages=(0, 1 << 20)),
        "iommu": lambda: system.device(20, iommu=bad),
        "pasid_bits": lambda: system.device(21, pasid_bits=bad),
        "group": lambda: system.device(22, group=bad if bad is not None else 1),
        "probe": lambda: system.probe(bad),
        "attach": lambda: device.attach(bad),
        "replace": lambda: device.replace(bad),
        "attach_pasid": lambda: device.attach_pasid(bad, 1),
        "attach_pasid.pasid": lambda: device.attach_pasid(domain, bad),
        "attach_pasid.handle": lambda: device.attach_pasid(domain, 5, bad or 1),
        "replace_pasid": lambda: device.replace_pasid(bad, 1, AttachHandle()),
        "replace_pasid.pasid": lambda: device.replace_pasid(domain, bad, AttachHandle()),
        "replace_pasid.handle": lambda: device.replace_pasid(domain, 1, bad),
        "detach_pasid": lambda: device.detach_pasid(bad, 1),
        "detach_pasid.pasid": lambda: device.detach_pasid(domain, bad),
        "handle": lambda: device.handle(bad),
        "bind": lambda: device.bind(bad),
        "stage": lambda: device.paging_domain(stage=bad if bad is not None else 0),
        "granule": lambda: device.paging_domain(granule=bad if bad is not None else 0),
        "map": lambda: domain.map(bad, RAM, PAGE),
        "map.pa": lambda: domain.map(0, bad, PAGE),
        "map.prot": lambda: domain.map(0, RAM, PAGE, bad),
        "map_sg": lambda: domain.map_sg(0, [bad]),
        "unmap": lambda: domain.unmap(bad, PAGE),
        "iova_to_phys": lambda: domain.iova_to_phys(bad),
        "identity": lambda: IDENTITY.iova_to_phys(bad),
        "space": lambda: AddressSpace(bad),
        "space.of": lambda: AddressSpace.of(bad),
        "invalidate": lambda: AddressSpace.of(system).invalidate(bad, bad),
        "nested": lambda: NestedDomain(bad, (1, 0)),
        "viommu": lambda: Viommu(bad),
        "mediated": lambda: device.mediated().attach(bad),
        "iovas": lambda: IovaAllocator(0, PAGE - 1).alloc(bad),
    }


@pytest.mark.parametrize("bad", STRANGE, ids=lambda bad: type(bad).__name__)
def test_strange_arguments_are_named_and_change_nothing(systems, bad):
    system = systems()
    device = system.device(8, pasid_bits=8, ats=True)
    domain = device.paging_domain()
    before = system.pages.in_use
    for name, call in calls(system, device, domain, bad).items():
        with pytest.raises(IommuError) as raised:
            call()
        error = raised.value
        assert error.errno > 0 and error.argument and error.argument in str(error), name
        if isinstance(bad, str | float | bytes) and name in ("iommu", "attach_pasid.pasid", "map"):
            assert isinstance(error, TypeError)
    assert (domain.users, domain.mapped, len(system.pasids)) == (0, 0, 0)
    assert system.pages.in_use - before <= 4096  # the first table of a space


def test_a_freed_domain_is_of_no_use(systems):
    system = systems(caches=Caches.server)
    device = system.device(8, pasid_bits=8)
    domain = device.paging_domain()
    domain.free()
    domain.free()  # twice is once
    domain.close()
    for call in (
        lambda: device.attach(domain), lambda: device.attach_pasid(domain, 1),
        lambda: domain.map(0, RAM, PAGE), lambda: domain.unmap(0, PAGE),
        lambda: domain.iova_to_phys(0), domain.change_asid,
        lambda: setattr(domain, "ready", True), lambda: device.mediated().attach(domain),
    ):  # fmt: skip
        refused(errno.EINVAL, call)
    assert (len(system.asids), len(system.pasids)) == (0, 0)


def test_tables_that_a_cd_points_to_are_not_given_back(systems):
    system = systems(caches=Caches.server)
    device = system.device(8)
    domain = device.paging_domain()
    device.attach(domain)
    domain.map(0, RAM, PAGE)
    refused(errno.EBUSY, domain.close)
    refused(errno.EBUSY, domain.free)
    refused(errno.EBUSY, lambda: setattr(domain, "ready", False))
    assert device.translate(8).pa == RAM + 8
    domain.unmap(0, PAGE)
    refused(errno.EBUSY, lambda: setattr(domain, "ready", False))


def test_the_whole_address_space_can_be_unmapped_at_once(systems):
    """Ranges of 2^36 pages are told in commands that end."""
    for features in (Features.full(), Features.full().replace(ril=0)):
        system = systems(features=features, caches=Caches.server)
        device = system.device(8)
        domain = device.paging_domain()
        device.attach(domain)
        domain.map(0, 0, 1 << 48)
        assert device.translate((1 << 48) - 1).pa == (1 << 48) - 1
        assert domain.unmap(0, 1 << 48) == 1 << 48
        assert not device.translate(0) and not device.translate((1 << 48) - 1)


def test_a_released_device_takes_everything_with_it(systems):
    system = systems(caches=Caches.server)
    device = system.device(9, pasid_bits=8, ats=True, direct=[(0x10_0000, PAGE)])
    main, other = device.paging_domain(), device.paging_domain()
    device.attach(main)
    space = AddressSpace.of(system)
    bond = device.bind(space)
    share = device.mediated()
    share.attach(other)
    device.release()  # although firmware wants memory of it mapped
    assert (share.domain, share.pasid, bond.pasid) == (None, None, 0)
    assert (main.users, other.users, space.bonds) == (0, 0, [])
    assert list(system.pasids) == [space.pasid]
    assert not system.smmu.translate(9, 0)
    for call in (
        lambda: device.attach(main), lambda: device.translate(0), lambda: device.bind(space),
        device.release, device.draw, device.reset_prepare, lambda: device.handle(1),
    ):  # fmt: skip
        with pytest.raises(NoDevice):
            call()
    refused(errno.EINVAL, bond.unbind)
    system.probe(device)
    assert device.translate(0x10_0000).pa == 0x10_0000


def test_a_released_device_leaves_no_half_of_a_request_group(systems):
    system = systems()
    device = system.device(9, pasid_bits=4, ats=True, pri=True)
    space = AddressSpace.of(system, handler=lambda fault: True)
    device.bind(space)
    system.smmu.page_request(9, PAGE, ssid=space.pasid, read=True, last=False, prg_index=5)
    assert system.service() == 1 and len(system.iommus[0].page_requests) == 1
    device.release()
    assert system.iommus[0].page_requests == {}


@pytest.mark.parametrize("profile", [AUX, None], ids=["aux", "now"])
def test_nothing_is_changed_while_a_device_is_being_reset(systems, profile):
    system = systems(caches=Caches.server, **({"profile": AUX} if profile else {}))
    device = system.device(8, pasid_bits=4, ats=True)
    domain = system.paging_domain() if profile else device.paging_domain()
    device.attach(domain)
    domain.map(0, RAM, PAGE)
    if profile:
        device.enable_feature("SVA")
    space = AddressSpace.of(system)
    space.table.map(0x1000, RAM, PAGE)
    bond = device.bind(space)
    device.reset_prepare()
    for call in (
        device.reset_prepare, bond.unbind, domain.free, lambda: device.detach(domain),
        lambda: device.replace(IDENTITY), lambda: device.bind(AddressSpace.of(system)),
    ):  # fmt: skip
        refused(errno.EBUSY, call)
    assert not device.translate(0) and not device.translate(0x1000, pasid=space.pasid)
    device.reset_done()
    refused(errno.EINVAL, device.reset_done)
    assert device.translate(0).pa == device.translate(0x1000, pasid=space.pasid).pa == RAM
    device.reset_prepare()
    space.exit()
    device.reset_done()
    assert device.translate(0).pa == RAM and not device.translate(0x1000, pasid=1)
    device.reset_prepare()
    device.release()
    domain.free()
    assert (len(system.asids), len(system.pasids), bond.pasid) == (0, 0, 0)


def test_an_aux_domain_keeps_its_device_from_a_reset(systems):
    system = systems(profile=AUX)
    device = system.device(8, pasid_bits=4)
    device.attach(system.paging_domain())
    device.enable_feature("AUX")
    aux = system.paging_domain()
    device.attach_aux(aux)
    refused(errno.EBUSY, device.reset_prepare)
    aux.map(0, RAM, PAGE)
    assert device.translate(0, pasid=1).pa == RAM


def test_streams_that_bypass_are_blocked_once_a_device_is_known(systems):
    system = systems(disable_bypass=False)
    assert system.device(3).translate(0x1000).action == "abort"
    assert system.smmu.translate(4, 0x1000).action == "bypass"


def test_a_failed_attach_of_a_group_leaves_the_domain_unused(systems):
    """AUX: the second device has other PASIDs, and the domain is neither main nor ready."""
    system = systems(profile=AUX)
    group = system.group()
    for sid, bits in ((1, 4), (2, 5)):
        system.device(sid, pasid_bits=bits, group=group)
    domain = system.paging_domain()
    used, issued = system.pages.in_use, system.iommus[0].queue.issued
    refused(errno.EINVAL, group.attach, domain)
    assert (domain.mode, domain.iommu, domain.cd_table, domain.asid) == (None, None, None, 0)
    assert (system.pages.in_use, system.iommus[0].queue.issued) == (used, issued)


# --- callbacks ---


def boom(*_):
    raise RuntimeError("boom")


def test_what_an_observer_raises_comes_when_the_change_is_done(systems):
    system = systems(caches=Caches.server)
    device = system.device(8, pasid_bits=4, ats=True)
    domain = device.paging_domain()
    domain.map(0, RAM, PAGE)
    device.iommu.writer.observer = boom
    for attach, detach, pasid in (
        (lambda: device.attach(domain), lambda: device.detach(domain), None),
        (lambda: device.attach_pasid(domain, 3), lambda: device.detach_pasid(domain, 3), 3),
    ):
        with pytest.raises(RuntimeError, match="boom"):
            attach()
        assert device.translate(0, pasid=pasid).pa == RAM and domain.users == 1
        with pytest.raises(RuntimeError, match="boom"):
            detach()
        assert not device.translate(0, pasid=pasid) and domain.users == 0
    device.iommu.writer.observer = None
    assert "free" in repr(system.lock)
    device.attach(domain)  # nothing is left to be raised


def test_an_observer_changes_nothing(systems):
    system = systems(caches=Caches.server)
    device = system.device(8, pasid_bits=4)
    one, two = device.paging_domain(), device.paging_domain()
    device.iommu.writer.observer = lambda *_: device.attach_pasid(two, 7)
    refused(errno.EBUSY, device.attach, one)
    device.iommu.writer.observer = None
    assert (device.domain, two.users) == (one, 0)
    device.attach_pasid(two, 7)
    with device.iommu.watch() as seen:
        with pytest.raises(Busy), device.iommu.watch():
            pass
        device.detach_pasid(two, 7)
    assert seen and not any(seen)
    assert device.iommu.writer.observer is None


def test_a_notifier_of_pasids_changes_nothing(systems):
    system = systems(profile=AUX)
    device = system.device(8, pasid_bits=4)
    device.attach(system.paging_domain())
    device.enable_feature("AUX")
    aux = system.paging_domain()
    system.pasids.register_notifier(lambda notice: device.attach_aux(aux))
    refused(errno.EBUSY, device.attach_aux, aux)
    assert (len(system.pasids), aux.aux_pasid, aux.users, aux.mode) == (0, 0, 0, None)


def test_a_backend_that_gives_too_large_a_pasid_is_an_overflow(systems):
    class Backend:
        def alloc(self, min, max):
            return 900

        def free(self, pasid):
            freed.append(pasid)

    freed = []
    for profile in (AUX, None):
        system = systems(**({"profile": AUX} if profile else {}))
        device = system.device(8, pasid_bits=4)
        if profile:
            device.attach(system.paging_domain())
            device.enable_feature("AUX")
            device.enable_feature("SVA")
        system.pasids.register_backend(Backend())
        used = system.pages.in_use
        if profile:
            refused(errno.EOVERFLOW, device.attach_aux, system.paging_domain())
        refused(errno.EOVERFLOW, device.bind, AddressSpace(RAM))
        assert (len(system.pasids), system.pages.in_use) == (0, used)
    assert freed == [900] * 3


HANDLERS = ["unbind", "exit", "release", "raise", "attach", "nothing", "service"]


@pytest.mark.parametrize("what", HANDLERS)
@pytest.mark.parametrize("how", ["stall", "pri"])
def test_a_page_fault_handler_may_do_anything(systems, what, how):
    system = systems(caches=Caches.server)
    stalls = how == "stall"
    device = system.device(8, pasid_bits=8, stall=stalls, ats=not stalls, pri=not stalls)
    count = 0

    def handler(fault):
        nonlocal count
        count += 1
        if what == "unbind":
            bond.unbind()
        elif what == "exit":
            space.exit()
        elif what == "release":
            device.release()
        elif what == "raise":
            raise KeyError("handler")
        elif what == "attach":
            device.attach(domain)
        elif what == "service":
            system.service()
        return True

    space = AddressSpace.of(system, handler=handler)
    domain = device.paging_domain()
    bond = device.bind(space)
    access = device.translate if stalls else device.access
    try:
        assert not access(PAGE, pasid=bond.pasid)
    except (KeyError, Busy):
        assert what in ("raise", "attach")
    except Exception as error:
        assert type(error).__name__ == "AtsFault" and not stalls
    assert 1 <= count <= 20
    assert system.smmu.stalls == []
    assert system.iommus[0].page_requests == {}
    if what == "attach":
        assert device.domain is domain


def test_a_process_ends_whatever_its_callbacks_do(systems):
    system = systems(profile=AUX)
    device = system.device(8, pasid_bits=4)
    device.attach(system.paging_domain())

    def gone(space):
        space.exit()
        for bond in list(space.bonds):
            bond.unbind()
        raise ValueError("gone")

    device.init(mm_exit=gone)
    space = AddressSpace.of(system)
    device.bind(space)
    with pytest.raises(ValueError, match="gone"):
        space.exit()
    assert (space.exited, space.bonds, space.pasid, len(system.pasids)) == (True, [], 0, 0)


# --- threads ---


@pytest.mark.parametrize("ats", [False, True])
def test_threads_map_while_others_attach(systems, ats):
    system = systems(caches=Caches.server)
    devices = [system.device(sid, pasid_bits=6, ats=ats) for sid in range(1, 4)]
    domains = [devices[0].paging_domain() for _ in range(2)]
    errors = []

    def guarded(work):
        def run(number):
            try:
                rng = random.Random(number)
                for _ in range(150):
                    work(rng, number)
            except BaseException as error:
                errors.append(error)

        return run

    def mapping(rng, number):
        domain = domains[number % 2]
        iova = (number << 40) + rng.randrange(64) * PAGE * rng.choice([1, 512])
        size = rng.choice([1, 1, 3, 512, 5000]) * PAGE
        domain.map(iova, RAM + (rng.randrange(100) << 21), size)
        assert domain.unmap(iova, size) == size

    def attaching(rng, number):
        device, domain = devices[number % 3], rng.choice(domains)
        pasid = 1 + number * 10 + rng.randrange(10)
        device.attach_pasid(domain, pasid)
        for _ in range(3):
            device.translate((rng.randrange(4) << 40) + rng.randrange(64) * PAGE, pasid=pasid)
        device.detach_pasid(domain, pasid)

    def overlapping(rng, number):
        domain = domains[number % 2]
        with contextlib.suppress(Exists):
            domain.map(1 << 46, RAM, rng.choice([1, 600]) * PAGE)
        domain.unmap(1 << 46, 600 * PAGE)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [
            threading.Thread(target=guarded(work), args=(number,))
            for work in (mapping, attaching, overlapping)
            for number in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
    assert [(d.users, d.mapped, len(d.invalidations)) for d in domains] == [(0, 0, 0)] * 2


def test_wrong_types_are_type_errors_with_an_errno():
    with pytest.raises(TypeError) as raised:
        System("x")
    assert isinstance(raised.value, WrongType) and raised.value.errno == errno.EINVAL
    assert str(raised.value) == "smmus must be an integer, not str"
    with pytest.raises(InvalidArgument, match="segments has 5, not a pair"):
        System().device(1).paging_domain().map_sg(0, [5])
