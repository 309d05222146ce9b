"""Injected errors: every kind of access that they reach, one at a time, and their removal."""

import pickle

import pytest
import small
from ptwriter import leaf_descriptor

from smmufast import ExternalAbort, Features, Memory, Smmu, layout
from smmufast._driver.tables import READ, Pages, PageTable
from smmufast._engine.memory import _restored
from smmufast.faults import ACCESS_KINDS

COMMANDS, EVENTS, PAGES, MSIS = 0x4_0000, 0x5_0000, 0x6_0000, 0x7_0000
ALL = 0b1111  # CR0: everything enabled


def gerror(*names):
    return layout.pack("GERROR", **dict.fromkeys(names, 1))


def system(**registers):
    """An SMMU with all queues and all MSIs, whose streams are all invalid."""
    memory = Memory()
    memory.add_private(0, 1 << 40)
    smmu = Smmu(memory, Features(oas=5), cr0=0)
    for name, value in {
        "CMDQ_BASE": COMMANDS | 4, "EVENTQ_BASE": EVENTS | 4, "PRIQ_BASE": PAGES | 4,
        "STRTAB_BASE": 0x1_0000, "STRTAB_BASE_CFG": 4,
        "GERROR_IRQ_CFG0": MSIS, "EVENTQ_IRQ_CFG0": MSIS + 8, "PRIQ_IRQ_CFG0": MSIS + 16,
        "IRQ_CTRL": 7, "CR0": ALL,
    }.items():  # fmt: skip
        smmu.write(name, registers.get(name, value))
    return smmu


def sync(smmu):
    smmu.command("SYNC", CS=1, MSIAddress=MSIS + 24, MSIData=1)


def event(smmu):
    smmu.translate(3, 0)


def page_request(smmu):
    smmu.page_request(3, 0x1000, prg_index=1)


WRITTEN = {sync: MSIS + 24, event: EVENTS, page_request: PAGES}


@pytest.mark.parametrize(
    "kind, address, cause, error",
    [
        ("CMD", COMMANDS, sync, gerror("CMDQ_ERR")),
        ("EVENT", EVENTS, event, gerror("EVENTQ_ABT_ERR")),
        ("PRI", PAGES, page_request, gerror("PRIQ_ABT_ERR")),
        ("MSI", MSIS + 24, sync, gerror("MSI_CMDQ_ABT_ERR")),
        ("MSI", MSIS + 8, event, gerror("MSI_EVENTQ_ABT_ERR")),
        ("MSI", MSIS + 16, page_request, gerror("MSI_PRIQ_ABT_ERR")),
    ],
)
def test_an_injected_error_reaches_queues_and_msis(kind, address, cause, error):
    """By its kind, by its address and by both; other kinds and addresses do not."""
    for injection in ({"kind": kind, "address": address}, {"address": address, "size": 1}):
        smmu = system()
        smmu.memory.inject_error(**injection)
        cause(smmu)
        assert smmu.read("GERROR") == error
    smmu = system()
    for other in ACCESS_KINDS[1:]:
        if other != kind:
            smmu.memory.inject_error(kind=other, address=address)
    for level in range(-1, 4):
        smmu.memory.inject_error(level=level)
    smmu.memory.inject_error(kind=kind, address=address - 0x100, size=0x100)
    smmu.memory.inject_error(kind=kind, address=address + 32)
    cause(smmu)
    assert smmu.read("GERROR") == 0
    assert any(smmu.memory.read(WRITTEN[cause], 8))


def test_a_command_that_cannot_be_fetched_stays_and_is_fetched_again():
    smmu = system()
    number = smmu.memory.inject_error(kind="CMD", nth=2, count=1 << 40)
    smmu.command("CFGI_ALL")
    sync(smmu)
    cons = layout.unpack("CMDQ_CONS", smmu.read("CMDQ_CONS"))
    assert (cons["RD"], cons["ERR"]) == (1, 2)
    assert smmu.read("GERROR") == gerror("CMDQ_ERR")
    assert not any(smmu.memory.read(MSIS + 24, 4))
    smmu.memory.remove_error(number)
    smmu.write("GERRORN", gerror("CMDQ_ERR"))
    assert smmu.read("CMDQ_CONS") & 0xFFFFF == 2
    assert smmu.memory.read(MSIS + 24, 4) == b"\1\0\0\0"


def test_an_event_that_cannot_be_written_is_lost_and_the_next_one_is_there():
    smmu = system()
    smmu.memory.inject_error(kind="EVENT", nth=1, count=1)
    event(smmu)
    assert (smmu.read("EVENTQ_PROD"), smmu.memory.read(EVENTS, 32)) == (0, bytes(32))
    smmu.write("GERRORN", gerror("EVENTQ_ABT_ERR"))
    event(smmu)
    assert smmu.read("EVENTQ_PROD") == 1
    assert smmu.memory.read(EVENTS, 1) == b"\4"


def test_the_msi_of_gerror_can_fail_too():
    smmu = system()
    smmu.memory.inject_error(kind="EVENT")
    smmu.memory.inject_error(kind="MSI", address=MSIS)
    event(smmu)
    assert smmu.read("GERROR") == gerror("EVENTQ_ABT_ERR", "MSI_GERROR_ABT_ERR")


@pytest.mark.parametrize("kind", [None, "TT update"])
def test_an_update_of_a_descriptor_can_fail(kind):
    smmu, _ = small.system(bytearray(small.build()), features=Features(oas=4))
    memory = smmu.memory
    leaf = small.BASE + small.LEVEL3 + 8
    cd = next(
        fetch for fetch in smmu.translate(1, small.RW, trace=True).fetches if fetch.kind == "CD"
    )
    memory.write_u64(cd.address, memory.read_u64(cd.address) | layout.CD.field("HA").mask)
    memory.write_u64(leaf, memory.read_u64(leaf) & ~(1 << 10))
    if kind is None:
        number = memory.inject_error(address=leaf, nth=2)  # the read before it is the first
    else:
        number = memory.inject_error(kind=kind)
    result = smmu.translate(1, small.RW)
    assert result.fault.name == "F_WALK_EABT"
    assert not memory.read_u64(leaf) & 1 << 10
    memory.remove_error(number)
    assert smmu.translate(1, small.RW)
    assert memory.read_u64(leaf) & 1 << 10


def test_an_error_without_a_kind_counts_every_access():
    """An event is a fetch of the STE, a write of the record, and an MSI."""
    for nth, error in ((1, 0), (2, gerror("EVENTQ_ABT_ERR")), (3, gerror("MSI_EVENTQ_ABT_ERR"))):
        smmu = system()
        smmu.memory.inject_error(nth=nth)
        event(smmu)
        assert smmu.read("GERROR") == error
        assert smmu.memory.read(EVENTS, 1)[0] == (3 if nth == 1 else 0 if nth == 2 else 4)


def test_what_the_host_and_its_driver_do_meets_no_injected_error():
    memory = Memory()
    memory.add_private(0, 1 << 32)
    memory.inject_error()
    memory.write_u64(0x1000, 5)
    assert memory.read_u64(0x1000) == 5
    table = PageTable(Pages(memory, 0x10_0000, 0x10_0000))
    table.map(0x1000, 0x8000_0000, 0x1000, READ)
    assert table.iova_to_phys(0x1000) == 0x8000_0000


# --- one by one ---


def test_errors_are_removed_one_by_one():
    smmu = system()
    memory = smmu.memory
    first, second, third = (memory.inject_error(kind=kind) for kind in ("EVENT", "CMD", "MSI"))
    assert len({first, second, third}) == 3
    memory.remove_error(second)
    sync(smmu)
    assert smmu.read("GERROR") == gerror("MSI_CMDQ_ABT_ERR", "MSI_GERROR_ABT_ERR")
    event(smmu)
    assert smmu.read("GERROR") & gerror("EVENTQ_ABT_ERR")
    memory.remove_error(first)
    smmu.write("GERRORN", smmu.read("GERROR"))
    event(smmu)
    assert smmu.read("EVENTQ_PROD") == 1
    memory.remove_error(third)
    assert memory.fetch(0, 8) == bytes(8)
    for number in (first, second, third, 0, -1, 1 << 80):
        given = f"{number:#x}" if number > 1 << 16 else number
        with pytest.raises(ValueError, match=f"^number must be .* injected error, not {given}"):
            memory.remove_error(number)
    with pytest.raises(TypeError, match="number must be an integer, not str"):
        memory.remove_error("1")


def test_no_number_is_given_twice():
    memory = Memory()
    numbers = [memory.inject_error() for _ in range(3)]
    memory.clear_errors()
    numbers += [memory.inject_error() for _ in range(2)]
    memory.remove_error(numbers[-1])
    numbers.append(memory.inject_error())
    assert len(set(numbers)) == 6


@pytest.mark.parametrize("way", [Memory.copy, lambda memory: pickle.loads(pickle.dumps(memory))])
def test_a_copy_has_the_errors_with_their_numbers(way):
    memory = Memory()
    memory.add_private(0, 0x1000)
    gone, number = memory.inject_error(address=0), memory.inject_error(address=0x10, nth=2)
    memory.remove_error(gone)
    memory.remove_error(memory.inject_error())
    assert memory.fetch(0x10, 8) == bytes(8)
    other = way(memory)
    with pytest.raises(ExternalAbort):  # the first was counted before
        other.fetch(0x10, 8)
    assert other.inject_error() == number + 2
    other.remove_error(number)
    with pytest.raises(ValueError, match="number must be that of an injected error"):
        other.remove_error(gone)
    memory.remove_error(number)


def test_what_version_0_2_pickled_gets_numbers():
    errors = [(0, 7, 0, 4, 1, 1 << 60, 0), (8, 15, 2, 4, 1, 1 << 60, 0)]
    memory = _restored([(0, 0x1000, False, [])], errors)
    with pytest.raises(ExternalAbort):
        memory.fetch(0, 8)
    memory.remove_error(1)
    assert memory.fetch(0, 8) == bytes(8)
    memory.remove_error(2)


def test_errors_neither_come_nor_go_while_the_memory_is_in_use():
    memory = Memory()
    caught = []

    def read(address, n):
        for call in (memory.inject_error, lambda: memory.remove_error(number), memory.clear_errors):
            with pytest.raises(BufferError):
                call()
            caught.append(call)
        return bytes(n)

    memory.add_callback(0, 0x1000, read)
    number = memory.inject_error(address=0x800)
    Smmu(memory).translate(0, 0)
    assert len(caught) == 3


# --- as a walk reads ---


def test_a_bus_that_fetches_meets_what_a_translation_meets():
    injections = [
        {"kind": "STE"}, {"kind": "CD", "nth": 2}, {"kind": "TT", "level": 2}, {"level": 3},
        {"address": small.BASE + small.LEVEL2, "size": 0x1000}, {"nth": 7}, {"nth": 3, "count": 2},
        {"kind": "S2TT", "nth": 5}, {"kind": "L1CD"}, {"kind": "EVENT"},
    ]  # fmt: skip
    faults = set()
    for injection in injections:
        ours, _ = small.system()
        theirs, _ = small.system()
        ours.memory.inject_error(**injection)
        theirs.memory.inject_error(**injection)
        for request in small.REQUESTS:
            expected = ours.translate(request.sid, request.iova, **request.access)
            walk = theirs.start_walk(request.sid, request.iova, **request.access)
            while (fetch := walk.request) is not None:
                try:
                    data = theirs.memory.fetch(
                        fetch.address, fetch.size, kind=fetch.kind, level=fetch.level
                    )
                except ExternalAbort:
                    data = None
                walk.supply(data)
            assert small.row(walk.result) == small.row(expected), (injection, request)
            faults.add(expected.fault and expected.fault.name)
    assert {"F_STE_FETCH", "F_CD_FETCH", "F_WALK_EABT", None} <= faults


def test_a_fetch_without_a_kind_meets_errors_without_one():
    memory = Memory()
    memory.add_private(0, 0x1000)
    memory.inject_error(kind="TT", address=0)
    memory.inject_error(level=2, address=8)
    memory.inject_error(address=16)
    assert memory.fetch(0, 16) == bytes(16)
    with pytest.raises(ExternalAbort, match="address 0x0: an injected error"):
        memory.fetch(0, 8, kind="TT", level=1)
    with pytest.raises(ExternalAbort, match="address 0x8: an injected error"):
        memory.fetch(8, 8, kind="S2TT", level=2)
    with pytest.raises(ExternalAbort, match="address 0x10: an injected error"):
        memory.fetch(16, 8)
    with pytest.raises(ExternalAbort, match="no region"):
        memory.fetch(0x1000, 8)
    assert memory.fetch(0, 0) == b""


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"kind": "PTE"}, ValueError, "kind must be 'L1STD', .*, 'CMD', 'EVENT', .*, not 'PTE'"),
        ({"kind": ""}, ValueError, "kind must be .*, not ''"),
        ({"kind": "CMD", "level": 1}, ValueError, "level must be None with kind 'CMD' .*, not 1"),
        ({"kind": "TT", "level": 4}, ValueError, "level must be -1 to 3, not 4"),
        ({"level": "1"}, TypeError, "level must be an integer, not str"),
    ],
)
def test_wrong_kinds_and_levels_are_refused(arguments, error, message):
    memory = Memory()
    memory.add_private(0, 0x1000)
    for call in (lambda **more: memory.fetch(0, 8, **more), memory.inject_error):
        with pytest.raises(error, match=f"^{message}"):
            call(**arguments)
    assert memory.fetch(0, 8) == bytes(8)


def test_a_leaf_is_what_the_test_writer_says():
    """The descriptors that these tests change are those of the small system."""
    smmu, _ = small.system()
    found = smmu.memory.read_u64(small.BASE + small.LEVEL3 + 8)
    assert found & 1 << 10
    assert found & 3 == leaf_descriptor(12, 3, 0) & 3
