"""System.save, restore, copies and pickles: the copy goes on as the original would have."""

import copy
import errno
import pickle
from zlib import crc32

import pytest

from smmufast import Caches, Memory
from smmufast.iommu import (
    AUX,
    IDENTITY,
    NOW,
    AddressSpace,
    AttachHandle,
    IommuError,
    System,
    Viommu,
)
from smmufast.iommu.save import MARK

RAM = 0x8000_0000
PAGE = 0x1000


class Owner(AttachHandle):
    """A handle of a host."""

    def __init__(self, name):
        self.name = name


def refused(number, call, *arguments, **more):
    with pytest.raises(IommuError) as caught:
        call(*arguments, **more)
    assert caught.value.errno == number, caught.value


def small(profile, **more):
    """A system with a bit of everything, and what each address gives."""
    system = System(profile=profile, caches=Caches.server, **more)
    nic = system.device(8, pasid_bits=12, ats=True, pri=True)
    gpu = system.device(9, pasid_bits=12, stall=True)
    if profile is AUX:
        nic.attach(system.paging_domain())
        nic.enable_feature("AUX")
        nic.enable_feature("IOPF")
        nic.enable_feature("SVA")
        domain = system.paging_domain()
        nic.attach_aux(domain)
        pasid = domain.pasid(nic)
    else:
        domain = nic.paging_domain()
        nic.attach(IDENTITY)
        pasid = 2000  # in a leaf of its own
        nic.attach_pasid(domain, pasid, Owner("host"))
    domain.map(0x1000, RAM, 0x20_1000)
    process = AddressSpace.of(system)
    process.table.map(0x5000, RAM + 0x40_0000, PAGE)
    nic.bind(process)
    host = gpu.paging_domain(nest_parent=True)
    host.map(0, RAM + 0x80_0000, 1 << 21)
    guest = Viommu(host)
    guest.add(3, gpu)
    gpu.attach(guest.domain((0b1001, 0)))
    return system, pasid, process.pasid


def looks(system, pasid, shared):
    """What the devices of `small` reach, by every way."""
    devices = system.iommus[0].devices
    nic, gpu = devices[8], devices[9]
    found = []
    for iova in (0, 0x1000, 0x1FFF, 0x5000, 0x20_0000, 0x30_0000):
        for ssid in (None, pasid, shared):
            result = nic.translate(iova, pasid=ssid)
            found.append((iova, ssid, result.pa, result.event and result.event.name))
        found.append(gpu.translate(iova).pa)
    found.append(nic.access(0x1234, pasid=pasid).pa)
    return found


def copies(system):
    yield copy.deepcopy(system)
    yield pickle.loads(pickle.dumps(system))
    buffers = []
    data = pickle.dumps(system, 5, buffer_callback=buffers.append)
    yield pickle.loads(data, buffers=[bytes(each) for each in buffers])
    yield System.restore(system.save(), system.memory.copy(), classes=[Owner])


@pytest.mark.parametrize("profile", [NOW, AUX])
def test_a_copy_goes_on_as_the_original_does(profile):
    system, pasid, shared = small(profile)
    looks(system, pasid, shared)  # with caches filled
    for other in copies(system):
        assert other.profile is profile
        assert other.pages.in_use == system.pages.in_use
        assert other.pages.blocks == system.pages.blocks
        assert list(other.pasids) == list(system.pasids)
        assert list(other.asids) == list(system.asids)
        assert looks(other, pasid, shared) == looks(copy.deepcopy(system), pasid, shared)
        assert other.stale() == []


@pytest.mark.parametrize("profile", [NOW, AUX])
def test_what_a_copy_changes_the_original_keeps(profile):
    system, pasid, shared = small(profile)
    before = looks(system, pasid, shared)
    for other in copies(system):
        nic = other.iommus[0].devices[8]
        domain = nic.domain_at(pasid)
        assert domain.unmap(0x1000, PAGE) == PAGE
        assert nic.translate(0x1000, pasid=pasid).pa is None
        domain.map(0x40_0000_0000, RAM, PAGE)  # tables of its own
        assert nic.translate(0x40_0000_0000, pasid=pasid).pa == RAM
        assert other.stale() == []
        for device in list(other.iommus[0].devices.values()):
            device.release()
        domain.free()
        assert not other.iommus[0].devices
        assert looks(system, pasid, shared) == before


def test_tables_of_a_copy_are_given_back_as_those_of_the_original():
    system = System()
    device = system.device(8)
    domain = device.paging_domain()
    base = system.pages.in_use, system.pages.blocks
    device.attach(domain)
    for n in range(40):
        domain.map(n << 30, RAM, PAGE)
    domain.unmap(7 << 30, PAGE)
    for other in copies(system):
        mine = other.iommus[0].devices[8]
        its = mine.domain
        assert its.mapped == 39 * PAGE
        assert its.table_bytes == domain.table_bytes
        mine.detach(its)
        its.free()
        mine.release()
    device.detach(domain)
    domain.free()
    device.release()
    assert system.pages.in_use <= base[0] and system.pages.blocks <= base[1]
    assert (other.pages.in_use, other.pages.blocks) == (system.pages.in_use, system.pages.blocks)


def test_what_waits_waits_in_the_copy_too():
    system = System()
    device = system.device(8, pasid_bits=4, stall=True)
    device.attach(IDENTITY)
    asked = []
    process = AddressSpace.of(system, handler=asked.append)
    device.bind(process)
    assert system.smmu.translate(8, 0x7000, ssid=process.pasid).action == "stall"
    other = copy.deepcopy(system)
    mine = other.iommus[0].devices[8]
    space = mine.bonds[0].space
    assert space.handler is None  # the host's
    space.handler = lambda fault: space.table.map(fault.iova, RAM, PAGE) or True
    assert len(other.smmu.stalls) == 1
    assert other.service() == 1
    assert other.smmu.stalls == []
    assert mine.translate(0x7000, pasid=space.pasid).pa == RAM
    assert asked == [] and len(system.smmu.stalls) == 1


def test_a_handle_keeps_its_place():
    system, pasid, _ = small(NOW)
    for other in copies(system):
        nic = other.iommus[0].devices[8]
        handle = nic.handle(pasid)
        assert (type(handle), handle.name) == (Owner, "host")
        nic.detach_pasid(handle.domain, pasid)
        assert handle.domain is None


def test_parts_of_a_system_are_not_copied_alone():
    system, pasid, _ = small(NOW)
    nic = system.iommus[0].devices[8]
    domain, bond = nic.domain_at(pasid), nic.bonds[0]
    for part in (system, nic, domain, bond.space, bond.space.table, bond.domain):
        with pytest.raises(TypeError):
            copy.copy(part)
    for part in (nic, domain, bond.space, bond.space.table, bond.domain):
        for way in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError):
                way(part)


def test_bytes_that_are_no_saved_system_are_refused():
    system, *_ = small(NOW)
    data = system.save()
    memory = system.memory.copy()
    for bad in (b"", data[:-1], data[:100], data[:50] + b"x" + data[51:], b"y" + data):
        refused(errno.EINVAL, System.restore, bad, memory, classes=[Owner])
    refused(errno.EINVAL, System.restore, data, memory)  # Owner is not allowed
    with pytest.raises(TypeError):
        System.restore(data, None)




@pytest.mark.parametrize(
    "name",
    [b"os\nsystem", b"builtins\neval", b"builtins\ngetattr", b"smmufast.capture\nos.system",
     b"smmufast.iommu.save\npickle.loads", b"smmufast.cli\nmain", b"subprocess\nrun"],
)  # fmt: skip
def test_bytes_cannot_call_what_is_not_a_part_of_a_system(name):
    body = b"\x80\x05c" + name + b"\n)R."
    data = MARK + body
    data += crc32(data).to_bytes(4, "little")
    refused(errno.EINVAL, System.restore, data, Memory())


@pytest.mark.parametrize("step", [97, pytest.param(29, marks=pytest.mark.slow)])
def test_every_damaged_byte_is_an_error_or_a_system(step):
    system = System()
    system.device(8).attach(IDENTITY)
    data = system.save()[:-4]
    for at in range(len(MARK), min(len(data), len(MARK) + 4000), step):
        bad = data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :]
        bad += crc32(bad).to_bytes(4, "little")
        try:
            System.restore(bad, system.memory.copy())
        except IommuError as error:
            assert error.errno == errno.EINVAL


@pytest.mark.parametrize("iopf", [False, True])
def test_whether_there_are_page_faults_is_kept(iopf):
    system = System(iopf=iopf)
    assert copy.deepcopy(system).iopf is iopf
