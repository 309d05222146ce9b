"""A failed call changes nothing: each call that needs pages, with each of its allocations failing.

What must be equal before and after: the bytes of stream tables, CD tables and page tables, the
command queue, the SMMU itself, every allocator, and what devices, groups and domains know.
"""

import pytest
from medium import SystemMedium

from smmufast import Caches
from smmufast.iommu import (
    AUX,
    BLOCKED,
    NOW,
    AddressSpace,
    AttachHandle,
    OutOfMemory,
    Viommu,
)
from smmufast.iommu.iova import DmaMapper, IovaAllocator

RAM = 0x8000_0000
PAGE = 0x1000
M = 1 << 20


def tables(memory, table, granule_lg2=12):
    """The bytes of a page table, found from its root as a walk finds them."""
    found = {}

    def walk(address, level, entries):
        data = memory.read(address, 8 * entries)
        found[address] = data
        for n in range(entries if level < 3 else 0):
            d = int.from_bytes(data[8 * n : 8 * n + 8], "little")
            if d & 3 == 3:
                walk(d & 0xFFFF_FFFF_F000, level + 1, 512)

    if table.root:
        bits = table.ias - granule_lg2 - 9 * (3 - table.start_level)
        walk(table.root, table.start_level, 1 << bits)
    return found, table.mapped, table.table_bytes, table.ready


def contexts(memory, table):
    """The bytes of a CD table."""
    if table is None:
        return None
    if not table.fmt:
        return memory.read(table.base, 64 << table.s1cdmax), dict(table.cds)
    level1 = memory.read(table.base, 8 << (table.s1cdmax - 10))
    leaves = {n: memory.read(leaf, 64 << 10) for n, leaf in table.leaves.items()}
    return level1, leaves, dict(table.cds), table.spare, list(table.masters)


def everything(system, domains=(), spaces=(), others=()):
    """Everything that a failed call must leave as it was."""
    memory = system.memory
    seen = {"pages": (system.pages.in_use, system.pages.blocks)}
    seen["pasids"] = list(system.pasids)
    seen["asids"] = list(system.asids)
    for number, iommu in enumerate(system.iommus):
        queue = iommu.queue
        seen["queue", number] = (
            queue.prod, queue.issued, queue.syncs, memory.read(queue.base, 16 << queue.size_lg2)
        )  # fmt: skip
        size = 8 << iommu._l1_lg2
        seen["streams", number] = (
            memory.read(iommu.strtab, size), dict(iommu._spare),
            {n: memory.read(leaf, 64 << 8) for n, leaf in iommu._leaves.items()},
        )  # fmt: skip
        seen["smmu", number] = iommu.smmu.save()
        seen["vmids", number] = list(iommu.vmids)
        seen["devices", number] = dict(iommu.devices)
        seen["atcs", number] = dict(iommu.smmu.devices)
        for device in {*iommu.devices.values()}:
            group = device.group
            seen[device] = (
                device.domain, device.ats_enabled, device.pasid_enabled, device.iopf_users,
                dict(device.enabled_features), dict(device.aux), contexts(memory, device.cd_table),
                group.domain, group.default, group.pasids, list(group.devices),
                dict(device.master.attachments),
            )  # fmt: skip
    for domain in domains:
        seen[domain] = (
            tables(memory, domain), dict(domain.attachments), domain.active, domain.asid,
            domain.vmid, domain.iommu, domain.mode, domain.parent, domain.aux_pasid,
            dict(domain.children),
            contexts(memory, domain.cd_table), domain.invalidations.entries, domain.freed,
        )  # fmt: skip
    for space in spaces:
        seen[space] = space.pasid, list(space.bonds), dict(space.domains), space._system
        seen[space, "table"] = tables(memory, space.table), space.table.active
    for other in others:
        seen[other] = vars(other).copy()
    return seen


def probe(system):
    return (lambda: system.device([0x300, 0x700], pasid_bits=12, ats=True)), {}, 2


def probe_paging(system):
    system.default_domain = "paging"
    call = lambda: system.device([0x300, 0x700], pasid_bits=12, direct=[(RAM, 4 * PAGE)])  # noqa: E731
    return call, {}, 8  # two leaves, four tables, a CD table and its leaf


def probe_into_a_group(system):
    group = system.group()
    first = system.device(1, pasid_bits=12, group=group)
    domain, other = first.paging_domain(), first.paging_domain()
    first.attach(domain)
    for pasid in (5, 1500, 3000):
        first.attach_pasid(other, pasid)
    call = lambda: system.device(0x300, pasid_bits=12, group=group, ats=True)  # noqa: E731
    return call, {"domains": [domain, other]}, 5


def make_domain(system):
    return system.device(1).paging_domain, {}, 1


def make_space(system):
    return (lambda: AddressSpace.of(system)), {}, 1


def attach(system):
    device = system.device(1, pasid_bits=12, ats=True)
    domain = device.paging_domain()
    return (lambda: device.attach(domain)), {"domains": [domain]}, 2


def attach_group(system):
    group = system.group()
    devices = [system.device(sid, pasid_bits=4, group=group) for sid in (1, 2, 3)]
    domain = devices[0].paging_domain()
    return (lambda: group.attach(domain)), {"domains": [domain]}, 3


def attach_aux_main(system):
    group = system.group()
    devices = [system.device(sid, pasid_bits=12, group=group) for sid in (1, 2, 3)]
    domain = system.paging_domain()
    assert devices
    return (lambda: group.attach(domain)), {"domains": [domain]}, 3  # page table, CD table, leaf


def replace(system):
    device = system.device(1, pasid_bits=12, ats=True)
    two, one = device.paging_domain(stage=2), device.paging_domain()
    device.attach(two)
    return (lambda: device.replace(one)), {"domains": [one, two]}, 2


def attach_nested(system):
    device = system.device(1, pasid_bits=12, ats=True)
    host = device.paging_domain(nest_parent=True)
    guest = Viommu(host).domain((0b1001, 0))
    return (lambda: device.attach(guest)), {"domains": [host]}, 0


def attach_pasid(system):
    group = system.group()
    devices = [system.device(sid, pasid_bits=12, group=group, ats=True) for sid in (1, 2, 3)]
    domain = devices[0].paging_domain()
    call = lambda: devices[1].attach_pasid(domain, 1500)  # noqa: E731
    return call, {"domains": [domain]}, 6


def attach_pasid_beside_others(system):
    device = system.device(1, pasid_bits=12, ats=True)
    domain = device.paging_domain()
    device.attach(domain)
    device.attach_pasid(domain, 5)
    return (lambda: device.attach_pasid(domain, 1500)), {"domains": [domain]}, 1


def replace_pasid(system):
    device = system.device(1, pasid_bits=12, ats=True)
    one, two = device.paging_domain(), device.paging_domain()
    device.attach_pasid(one, 5)
    call = lambda: device.replace_pasid(two, 5, AttachHandle())  # noqa: E731
    return call, {"domains": [one, two]}, 0


def mediated(system):
    device = system.device(1, pasid_bits=12)
    share, domain = device.mediated(), device.paging_domain()
    return (lambda: share.attach(domain)), {"domains": [domain], "others": [share]}, 2


def bind(system):
    device = system.device(1, pasid_bits=12, stall=True)
    space = AddressSpace.of(system)
    return (lambda: device.bind(space)), {"spaces": [space]}, 2


def ready_for_aux(system):
    device = system.device(1, pasid_bits=12, ats=True)
    main = system.paging_domain()
    device.attach(main)
    for feature in ("AUX", "SVA"):
        device.enable_feature(feature, min_pasid=2000)
    return device, main


def attach_aux(system):
    device, main = ready_for_aux(system)
    domain = system.paging_domain()
    return (lambda: device.attach_aux(domain)), {"domains": [main, domain]}, 2


def enable_feature(system):
    device, main = ready_for_aux(system)
    device.disable_feature("AUX")
    return (lambda: device.enable_feature("AUX")), {"domains": [main]}, 0


def mediated_aux(system):
    device, main = ready_for_aux(system)
    share, domain = device.mediated(), system.paging_domain()
    return (lambda: share.attach(domain)), {"domains": [main, domain], "others": [share]}, 2


def bind_aux(system):
    """The ASID of the process is another domain's, which moves away."""
    device, main = ready_for_aux(system)
    space = AddressSpace.of(system, asid=main.asid)
    return (lambda: device.bind(space)), {"domains": [main], "spaces": [space]}, 1


def attached_domain(system):
    device = system.device(1)
    domain = device.paging_domain()
    device.attach(domain)
    return domain


def map_pages(system):
    domain = attached_domain(system)
    return (lambda: domain.map(M - PAGE, RAM, 4 * M)), {"domains": [domain]}, 5


def map_sg(system):
    domain = attached_domain(system)
    pieces = [(RAM, PAGE), (RAM + M, 2 * M), (RAM + 8 * M, PAGE)]
    return (lambda: domain.map_sg(M, pieces)), {"domains": [domain]}, 4


def map_over_empty_tables(system):
    """Empty tables would give way to blocks."""
    domain = attached_domain(system)
    for at in (2 * M, 4 * M):
        domain.map(at, RAM, PAGE)
        domain.map(at + PAGE, RAM, PAGE)
        domain.unmap(at, PAGE)
        domain.unmap(at + PAGE, PAGE)
    return (lambda: domain.map(2 * M, RAM, (1 << 30) + PAGE)), {"domains": [domain]}, 2


def dma_map(system):
    domain = attached_domain(system)
    iovas = IovaAllocator(0, (1 << 48) - 1, PAGE)
    mapper = DmaMapper(domain, iovas)
    call = lambda: mapper.dma_map(RAM, 4 * PAGE)  # noqa: E731
    return call, {"domains": [domain]}, 3


CASES = [
    (NOW, probe), (NOW, probe_paging), (NOW, probe_into_a_group), (NOW, make_domain),
    (NOW, make_space), (NOW, attach), (NOW, attach_group), (NOW, replace), (NOW, attach_nested),
    (NOW, attach_pasid), (NOW, attach_pasid_beside_others), (NOW, replace_pasid), (NOW, mediated),
    (NOW, bind), (NOW, map_pages), (NOW, map_sg), (NOW, map_over_empty_tables), (NOW, dma_map),
    (AUX, attach_aux_main), (AUX, attach_aux), (AUX, enable_feature), (AUX, mediated_aux),
    (AUX, bind_aux),
]  # fmt: skip


@pytest.mark.parametrize("caches", [None, Caches.server], ids=["none", "server"])
@pytest.mark.parametrize(("profile", "case"), CASES, ids=[case.__name__ for _, case in CASES])
def test_whichever_allocation_fails_nothing_has_changed(systems, profile, case, caches):
    system = systems(profile=profile, caches=caches)
    call, parts, allocations = case(system)
    for nth in range(allocations):
        before = everything(system, **parts)
        system.pages.fail_after(nth)
        with pytest.raises(OutOfMemory):
            call()
        system.pages.fail_after(None)
        after = everything(system, **parts)
        for what, value in before.items():
            assert after[what] == value, (nth, what)
        assert after.keys() == before.keys()
    system.pages.fail_after(allocations)  # one more than it needs
    call()
    system.pages.fail_after(None)


# --- memory that raises ---


CHANGES = {
    "attach": (lambda d, one, two, space: None, lambda d, one, two, space: d.attach(one)),
    "replace": (
        lambda d, one, two, space: d.attach(one), lambda d, one, two, space: d.replace(two)
    ),
    "detach": (
        lambda d, one, two, space: d.attach(one), lambda d, one, two, space: d.detach(one)
    ),
    "attach_pasid": (
        lambda d, one, two, space: None, lambda d, one, two, space: d.attach_pasid(one, 2)
    ),
    "replace_pasid": (
        lambda d, one, two, space: d.attach_pasid(one, 2),
        lambda d, one, two, space: d.replace_pasid(two, 2, AttachHandle()),
    ),
    "detach_pasid": (
        lambda d, one, two, space: d.attach_pasid(one, 2),
        lambda d, one, two, space: d.detach_pasid(one, 2),
    ),
    "bind": (lambda d, one, two, space: None, lambda d, one, two, space: d.bind(space)),
}  # fmt: skip


@pytest.mark.parametrize("ats", [False, True])
@pytest.mark.parametrize("what", CHANGES)
def test_whichever_write_raises_the_counts_are_right_and_all_works_again(what, ats):
    before, change = CHANGES[what]
    nth = 0
    while True:
        medium = SystemMedium()
        system = medium.system
        device = system.device(8, pasid_bits=4, ats=ats)
        one, two, space = device.paging_domain(), device.paging_domain(), AddressSpace.of(system)
        before(device, one, two, space)
        medium.left = nth
        try:
            change(device, one, two, space)
        except OSError:
            nth += 1
        else:
            break
        held = [device.domain, *(device.group.at(pasid) for pasid in device.group.pasids)]
        assert (one.users, two.users) == (held.count(one), held.count(two))
        assert len(one.invalidations) == (1 + ats) * one.users
        device.replace(BLOCKED)
        for domain in (one, two):
            for pasid in [p for p in device.group.pasids if device.group.at(p) is domain]:
                device.detach_pasid(domain, pasid)
        for bond in list(space.bonds):
            bond.unbind()
        assert (one.users, two.users, device.pasids_in_use) == (0, 0, 0)
        device.attach(one)
        one.map(PAGE, RAM, PAGE)
        assert device.translate(PAGE).pa == RAM
        bond = device.bind(space)
        space.table.map(PAGE, RAM, PAGE)
        assert device.translate(PAGE, pasid=bond.pasid).pa == RAM
    assert nth > 5


def aux_device(system):
    device, main = ready_for_aux(system)
    domain = system.paging_domain()
    return device, main, domain, AddressSpace.of(system)


AUX_CHANGES = {
    "attach_aux": (lambda *_: None, lambda d, domain, space: d.attach_aux(domain)),
    "detach_aux": (
        lambda d, domain, space: d.attach_aux(domain),
        lambda d, domain, space: d.detach_aux(domain),
    ),
    "bind": (lambda *_: None, lambda d, domain, space: d.bind(space)),
    "exit": (lambda d, domain, space: d.bind(space), lambda d, domain, space: space.exit()),
}


@pytest.mark.parametrize("what", AUX_CHANGES)
def test_whichever_write_raises_the_old_profile_works_again(what):
    before, change = AUX_CHANGES[what]
    nth = 0
    while True:
        medium = SystemMedium(profile=AUX)
        system = medium.system
        device, main, domain, space = aux_device(system)
        before(device, domain, space)
        medium.left = nth
        try:
            change(device, domain, space)
        except OSError:
            nth += 1
        else:
            break
        attached = domain in device.aux.values()
        assert domain.users == attached
        assert len(domain.invalidations) == 2 * attached
        assert list(system.pasids) == sorted({domain.aux_pasid, space.pasid} - {0})
        for bond in list(space.bonds):
            bond.unbind()
        if not attached:
            device.attach_aux(domain)
        domain.map(PAGE, RAM, PAGE)
        assert device.translate(PAGE, pasid=domain.aux_pasid).pa == RAM
        device.detach_aux(domain)
        assert (domain.users, device.pasids_in_use, main.users) == (0, 0, 1)
        assert not device.translate(PAGE, pasid=domain.aux_pasid)
    assert nth > 3


def unbind(device, one, two, space):
    space.bonds[0].unbind()


def share(device, one, two, space):
    device.mediated().attach(one)


def end_share(device, one, two, space):
    device.shares[0].detach()


ONE_REFUSED = {
    **CHANGES,
    "unbind": (lambda d, one, two, space: d.bind(space), unbind),
    "exit": (lambda d, one, two, space: d.bind(space), lambda d, one, two, space: space.exit()),
    "share": (lambda *_: None, share),
    "end share": (share, end_share),
    "change_asid": (
        lambda d, one, two, space: (d.attach(one), d.attach_pasid(one, 2)),
        lambda d, one, two, space: one.change_asid(),
    ),
    "free": (lambda *_: None, lambda d, one, two, space: one.free()),
    "reset_prepare": (
        lambda d, one, two, space: (d.attach(one), d.attach_pasid(two, 2)),
        lambda d, one, two, space: d.reset_prepare(),
    ),
    "reset_done": (
        lambda d, one, two, space: (d.attach(one), d.attach_pasid(two, 2), d.reset_prepare()),
        lambda d, one, two, space: d.reset_done(),
    ),
    "release": (
        lambda d, one, two, space: (d.attach(one), d.attach_pasid(two, 2), share(d, one, 0, 0),
                                    d.bind(space)),
        lambda d, one, two, space: d.release(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("ats", [False, True])
@pytest.mark.parametrize("what", ONE_REFUSED)
def test_whichever_store_is_refused_nothing_is_inconsistent(what, ats):
    before, change = ONE_REFUSED[what]
    nth = 0
    while True:
        medium = SystemMedium(caches=Caches.small)
        device = medium.system.device(8, pasid_bits=4, ats=ats)
        one, two = device.paging_domain(), device.paging_domain()
        one.map(PAGE, RAM, PAGE)
        two.map(PAGE, RAM, PAGE)
        space = AddressSpace.of(medium.system)
        before(device, one, two, space)
        device.translate(PAGE)
        device.translate(PAGE, pasid=2)
        medium.left = nth
        try:
            change(device, one, two, space)
        except OSError:
            nth += 1
        else:
            break
        assert medium.system.check() == []
    assert nth >= (what != "free")
    assert medium.system.check() == []
