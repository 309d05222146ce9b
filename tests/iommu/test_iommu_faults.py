"""Events, stalls and page requests as the driver handles them (F61-F65)."""

import errno

import pytest
from driverhalf import refused

from smmufast import Caches, Features, layout
from smmufast.iommu import AddressSpace

RAM = 0x8000_0000
VA = 0x7F00_0000_0000


@pytest.fixture(params=[None, Caches.server], ids=["none", "server"])
def system(request, systems):
    return systems(caches=request.param)


def pager(space_of, log, base=RAM):
    """A handler that maps the page that is asked for."""

    def handler(fault):
        log.append(fault)
        page = fault.iova & -0x1000
        space_of[0].table.map(page, base + (page & 0xFF_F000), 0x1000)
        return True

    return handler


def paged(system, **more):
    log, box = [], []
    space = AddressSpace.of(system, handler=pager(box, log))
    box.append(space)
    return space, log


def test_f61_each_event_is_reported_with_what_became_of_it(system):
    device = system.device(1, pasid_bits=4)
    domain = device.paging_domain()
    device.attach(domain)
    told = []
    system.on_fault = told.append
    device.translate(0x5678, write=True)
    device.translate(0x1000, pasid=3)
    device.translate(0x1000, pasid=99)
    system.memory.inject_error(kind="TT", count=1)
    device.translate(0x5678)
    system.memory.clear_errors()
    names = [report.name for report in system.reports]
    assert names == ["F_TRANSLATION", "C_BAD_CD", "C_BAD_SUBSTREAMID", "F_WALK_EABT"]
    assert list(system.reports) == told
    first = told[0]
    assert (first.sid, first.pasid, first.iova, first.device, first.write, first.stalled) == (
        1, None, 0x5678, device, True, False,
    )  # fmt: skip
    assert {report.errno for report in told} == {errno.EOPNOTSUPP}
    assert told[1].pasid == 3


def test_f61_unknown_streams_and_events_are_reports_not_crashes(systems):
    system = systems()
    device = system.device(1)
    device.attach(device.paging_domain())
    iommu = system.iommus[0]
    base, _ = iommu._rings["EVENTQ"]
    system.smmu.translate(1, 0x1000)
    record = bytearray(system.memory.read(base, 32))
    record[4:8] = (77).to_bytes(4, "little")
    system.memory.write(base, record)
    assert system.service() == 1
    system.smmu.translate(1, 0x1000)
    system.memory.write(base + 32, bytes([0xEE]) + bytes(31))
    assert system.service() == 1
    assert [(report.name, report.errno) for report in system.reports] == [
        ("F_TRANSLATION", errno.EINVAL), ("0xee", errno.EOPNOTSUPP),
    ]  # fmt: skip
    for seed in range(50):
        system.smmu.translate(1, 0x1000)
        index = seed + 2
        system.memory.write(
            base + 32 * index, bytes((seed * 37 + n * 91 + n * n * seed) & 0xFF for n in range(32))
        )
        assert system.service() == 1
    assert system.smmu.stalls == []


def test_f61_an_overflow_is_counted_and_acknowledged(systems):
    system = systems(features=Features.full().replace(eventqs=2))
    device = system.device(1)
    device.attach(device.paging_domain())
    for page in range(9):
        system.smmu.translate(1, page << 12)
    assert system.service() == 4
    assert system.iommus[0].overflows == {"EVENTQ": 1}
    system.smmu.translate(1, 0x1000)
    assert system.service() == 1


def test_f62_a_stalled_access_waits_for_its_page(system):
    device = system.device(1, pasid_bits=8, stall=True)
    space, log = paged(system)
    device.bind(space)
    result = device.translate(VA + 0x4567, pasid=space.pasid, write=True)
    assert (result.action, result.pa) == ("ok", RAM + 0x4567)
    (fault,) = log
    assert (fault.device, fault.pasid, fault.iova, fault.write, fault.read, fault.last) == (
        device, space.pasid, VA + 0x4567, True, False, True,
    )  # fmt: skip
    assert system.smmu.stalls == []
    assert system.reports[-1].errno == 0 and system.reports[-1].stalled
    assert device.translate(VA + 0x4000, pasid=space.pasid).pa == RAM + 0x4000
    assert len(log) == 1


def test_f62_nobody_handling_is_an_abort_and_no_sync_follows(systems):
    system = systems()
    device = system.device(1, stall=True)
    domain = device.paging_domain()
    device.attach(domain)
    syncs = system.iommus[0].queue.syncs
    result = device.translate(0x1000)
    assert (result.action, system.smmu.stalls) == ("abort", [])
    assert system.iommus[0].queue.syncs == syncs
    assert system.reports[-1].errno == errno.EFAULT
    domain.iopf = lambda fault: domain.map(fault.iova & -4096, RAM, 4096) or "success"
    assert device.translate(0x1000).pa == RAM
    domain.iopf = lambda fault: "failure"
    assert device.translate(0x9000).action == "abort"


def test_f62_a_handler_that_raises_leaves_no_stall_behind(systems):
    system = systems()
    device = system.device(1, pasid_bits=4, stall=True)

    def handler(fault):
        raise KeyError("no such page")

    space = AddressSpace.of(system, handler=handler)
    device.bind(space)
    for page in range(3):
        assert system.smmu.translate(1, page << 12, ssid=space.pasid).action == "stall"
    with pytest.raises(KeyError, match="no such page"):
        system.service()
    assert system.smmu.stalls == []
    assert len(system.reports) == 3


def test_f63_page_requests_without_a_handler_are_denied(systems):
    system = systems()
    device = system.device(1, ats=True, pri=True, pasid_bits=4)
    device.attach(device.paging_domain())
    asked = device.atcs[0].request_page(0x5000, read=True)
    assert asked.answer is None
    system.service()
    assert asked.answer == "failure"


@pytest.mark.parametrize("pasid", [None, 1])
def test_f63_nobody_is_asked_for_a_page_of_a_device_that_is_being_reset(systems, pasid):
    system = systems()
    device = system.device(9, pasid_bits=4, ats=True, pri=True)
    domain = device.paging_domain()
    asked = []
    domain.iopf = lambda fault: asked.append(fault) or True
    device.attach(domain)
    device.attach_pasid(domain, 1)
    device.reset_prepare()
    system.smmu.page_request(9, 0x5000, ssid=pasid, read=True, last=True, prg_index=5)
    assert system.service() == 1
    device.reset_done()
    system.smmu.page_request(9, 0x6000, ssid=pasid, read=True, last=True, prg_index=6)
    assert system.service() == 1 and [fault.iova for fault in asked] == [0x6000]


def test_f63_page_requests_reach_the_process(system):
    device = system.device(1, ats=True, pri=True, pasid_bits=8)
    space, log = paged(system)
    device.bind(space)
    result = device.access(VA + 0x2468, pasid=space.pasid, write=True)
    assert result.pa == RAM + 0x2468
    assert [(fault.iova, fault.write, fault.pasid) for fault in log] == [
        (VA + 0x2000, True, space.pasid)
    ]
    space.table.unmap(VA + 0x2000, 0x1000)
    assert len(device.atcs[0]) == 0
    assert device.access(VA + 0x2468, pasid=space.pasid).pa == RAM + 0x2468
    assert len(log) == 2


def test_f63_a_stop_marker_gets_no_answer(systems):
    system = systems()
    device = system.device(1, ats=True, pri=True, pasid_bits=4)
    space, log = paged(system)
    device.bind(space)
    issued = system.iommus[0].queue.issued
    device.atcs[0].stop(space.pasid)
    assert system.service() == 1
    assert log == [] and system.iommus[0].queue.issued == issued


def test_f64_page_faults_are_counted_and_refused_where_they_cannot_work(systems):
    system = systems()
    plain, one = system.device(1, pasid_bits=4), system.device(2, pasid_bits=4, stall=True)
    many = system.device([3, 4], pasid_bits=4, stall=True)
    plain.enable_iopf()
    assert plain.iopf_users == 0
    one.enable_iopf()
    one.enable_iopf()
    one.disable_iopf()
    one.disable_iopf()
    refused(errno.EINVAL, one.disable_iopf)
    refused(errno.EOPNOTSUPP, many.enable_iopf)
    space = AddressSpace.of(system)
    refused(errno.EOPNOTSUPP, many.bind, space)
    assert (space.pasid, space.domains, len(system.pasids)) == (0, {}, 0)
    bond = one.bind(space)
    assert one.iopf_users == 1
    bond.unbind()
    assert one.iopf_users == 0
    without = systems(iopf=False)
    refused(errno.EOPNOTSUPP, without.device(1, stall=True, pasid_bits=4).enable_iopf)


def test_f65_what_a_process_cannot_answer_is_invalid(systems):
    system = systems()
    device = system.device(1, pasid_bits=4, stall=True)
    calls = []
    space = AddressSpace.of(system, handler=lambda fault: calls.append(fault) or False)
    bond = device.bind(space)
    assert device.translate(VA, pasid=space.pasid).action == "abort"
    assert len(calls) == 1
    space.handler = None
    assert device.translate(VA, pasid=space.pasid).action == "abort"
    space.handler = lambda fault: calls.append(fault) or True
    space.exit()  # dead: nobody is asked
    assert device.translate(VA, pasid=bond.pasid).action == "abort"
    assert len(calls) == 1


def test_f65_the_first_error_of_a_group_stops_the_rest(systems):
    system = systems()
    device = system.device(1, ats=True, pri=True, pasid_bits=4)
    seen = []

    def handler(fault):
        seen.append(fault.iova)
        return fault.iova != VA + 0x1000

    space = AddressSpace.of(system, handler=handler)
    device.bind(space)
    queue = system.iommus[0].queue
    queue.log = []
    for page in range(4):
        system.smmu.page_request(
            1, VA + 0x1000 * page, ssid=space.pasid, read=True, last=page == 3, prg_index=5
        )
    assert system.service() == 4
    assert seen == [VA, VA + 0x1000]
    (answer,) = [fields for name, fields in queue.log if name == "PRI_RESP"]
    queue.log = None
    assert (answer["PRGIndex"], answer["SubstreamID"], answer["Resp"]) == (5, space.pasid, 1)
    assert layout.format("PRI_RESP", layout.pack("PRI_RESP", Resp=1))
