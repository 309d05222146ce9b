"""Rules of event records and their queue that no other test states alone (IHI 0070 7.2 to 7.4)."""

import threading

import pytest
import small
import stalls

from smmufast import Features, Memory, Smmu, layout

QUEUE = 0x9000_0000


# --- FetchAddr ---


@pytest.mark.rule("S7.3.4-2")
@pytest.mark.parametrize("minor", [0, 1, 2, 3])
@pytest.mark.parametrize("two_level", [False, True])
def test_a_fetch_address_has_the_bits_that_addresses_have(minor, two_level):
    features = Features.v3_0() if minor == 0 else Features.v3_2().replace(arch_minor=minor)
    memory = Memory()
    memory.add_private(0, 0x10_0000)
    beyond = 1 << 46 | 0x1_0000
    memory.write(0x2000, layout.pack("L1STD", Span=7, L2Ptr=beyond).to_bytes(8, "little"))
    if two_level:
        registers = {"strtab_base": 0x2000, "strtab_base_cfg": 1 << 16 | 6 << 6 | 8}
    else:
        registers = {"strtab_base": beyond, "strtab_base_cfg": 8}
    smmu = Smmu(memory, features.replace(oas=4), **registers)
    found = smmu.translate(3, 0x1234)
    assert (found.action, found.event.name) == ("abort", "F_STE_FETCH")
    whole = beyond + 64 * 3
    assert found.event.fetch_address == (whole if minor == 0 else whole % (1 << 44))
    batch = smmu.translate_batch(3, [0x1234], columns=["record"])
    assert bytes(batch["record"][0]) == found.event.record


# --- the queue while records are being written ---


@pytest.mark.rule("S7.2.2-3", "S7.2.2-5")
def test_what_lies_behind_a_record_that_could_not_be_written_is_lost_with_it():
    """The first write aborts while the second is under way: that one is written in vain."""
    memory = Memory()
    memory.add(small.build(), small.BASE)
    first_writes, second_writes, first_done = (threading.Event() for _ in range(3))

    def write(address, record):
        if address == QUEUE:
            first_writes.set()
            assert second_writes.wait(30)
            return None
        second_writes.set()
        assert first_done.wait(30)
        return True

    memory.add_callback(QUEUE, 0x1000, lambda address, n: bytes(n), write)
    wires = []
    registers = small.registers() | {"eventq_base": QUEUE | 4}
    smmu = Smmu(memory, on_interrupt=wires.append, **registers)
    smmu.write("IRQ_CTRL", 4)
    found = {}

    def first():
        found["first"] = smmu.translate(small.INVALID, 0)
        first_done.set()

    def second():
        found["second"] = smmu.translate(small.INVALID, 0x1000)

    workers = [threading.Thread(target=first), threading.Thread(target=second)]
    workers[0].start()
    assert first_writes.wait(30)
    workers[1].start()
    for worker in workers:
        worker.join(30)
    assert [found[name].event for name in ("first", "second")] == [None, None]
    assert [found[name].fault.name for name in ("first", "second")] == ["C_BAD_STE"] * 2
    assert smmu.read("EVENTQ_PROD") == 0 and smmu.gerror == 4
    assert wires == []  # the queue is as empty as it was


@pytest.mark.rule("S7.2.1-5")
def test_the_event_of_a_retry_that_terminates_is_lost_where_there_is_no_room():
    smmu, _ = stalls.system(log2size=0)
    held = stalls.stall(smmu)
    smmu.memory.write_u64(small.BASE + small.STES + 64 * held.sid, 0)
    stalls.resume(smmu, held, Ac=1)
    assert held.done and held.result.action == "abort"
    assert (held.result.fault.name, held.result.event) == ("C_BAD_STE", None)
    assert smmu.read("EVENTQ_PROD") == 1 | 1 << 31
    assert smmu.memory.read(stalls.QUEUE, 1) == b"\x10"


def test_queues_that_the_smmu_writes_are_never_read():
    memory = Memory()
    memory.add(small.build(), small.BASE)
    written = []

    def read(address, n):
        raise AssertionError(hex(address))

    memory.add_callback(QUEUE, 0x2000, read, lambda address, data: written.append(address) or True)
    registers = small.registers() | {"eventq_base": QUEUE | 4, "priq_base": QUEUE + 0x1000 | 4}
    smmu = Smmu(memory, cr0=7, **registers)
    assert smmu.translate(small.INVALID, 0).event.name == "C_BAD_STE"
    assert smmu.page_request(1, 0x1000, read=True).action == "queued"
    assert written == [QUEUE, QUEUE + 0x1000]


def test_a_queue_that_is_full_and_in_error_tells_no_overflow():
    memory = Memory()
    memory.add(small.build(), small.BASE)
    memory.add_private(QUEUE, 0x1000)
    smmu = Smmu(memory, eventq_base=0xA000_0000 | 1, **small.registers())
    smmu.translate(small.INVALID, 0)  # no memory is there
    assert smmu.gerror == 4
    smmu.write("EVENTQ_CONS", 2)  # full
    assert smmu.translate(small.INVALID, 0).event is None
    assert smmu.read("EVENTQ_PROD") == 0
    smmu.write("GERRORN", 4)
    assert smmu.translate(small.INVALID, 0).event is None
    assert smmu.read("EVENTQ_PROD") == 1 << 31
