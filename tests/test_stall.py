"""Stalled transactions: tags, records that wait, and the three ways in which a stall ends."""

import random
import threading

import numpy as np
import pytest
import small
from ptwriter import encode_cd, encode_ste, leaf_descriptor

from smmufast import Features, Memory, Smmu, layout

QUEUE = 0x9000_0000
STALLS, OTHER = 20, 21  # streams whose CD has S=1
CDS = 0x1800  # from small.BASE
IOVA = small.UNMAPPED
LEAF = small.BASE + small.LEVEL3 + 8 * (IOVA >> 12)
MAPPED = leaf_descriptor(12, 3, 0x4000_7000, ap=1)
FULL = Features.full()
CR0 = 5
EVENTQEN = 4


def system(log2size=4, features=FULL, place=True, **registers):
    """(Smmu, interrupts): the small system, two more streams that stall, an event queue."""
    image = small.build()
    for i, (sid, abort) in enumerate(((STALLS, 1), (OTHER, 0))):
        cd = encode_cd(
            v=1, aa64=1, a=abort, r=1, s=1, t0sz=25, epd1=1, ips=4, asid=7,
            ttb0=small.BASE + small.LEVEL1, mair=0x44FF,
        )  # fmt: skip
        image[CDS + 64 * i : CDS + 64 * i + 64] = cd
        ste = encode_ste(v=1, config=5, s1contextptr=small.BASE + CDS + 64 * i)
        image[small.STES + 64 * sid : small.STES + 64 * sid + 64] = ste
    memory = Memory()
    memory.add(image, small.BASE)
    memory.add_private(QUEUE, 0x100_0000)
    wires = []
    queue = {"eventq_base": QUEUE | log2size} if place else {}
    registers = small.registers() | queue | registers
    smmu = Smmu(memory, features, on_interrupt=wires.append, **registers)
    smmu.write("IRQ_CTRL", 7)
    return smmu, wires


def stall(smmu, iova=IOVA, sid=STALLS, **access):
    """The Stall of a translation that stalls."""
    before = smmu.stalls
    result = smmu.translate(sid, iova, **access)
    assert result.action == "stall" and result.pa is None
    assert not result
    (held,) = [s for s in smmu.stalls if s not in before]
    return held


def records(smmu, count, first=0, log2size=4):
    return [
        layout.unpack("F_TRANSLATION",
                      smmu.memory.read(QUEUE + 32 * ((first + i) % (1 << log2size)), 32))
        for i in range(count)
    ]  # fmt: skip


def resume(smmu, held, **how):
    smmu.command("RESUME", StreamID=held.sid, STAG=held.stag, **how)


# --- a stall and its record ---


def test_a_fault_stalls_with_a_record_that_names_it():
    smmu, wires = system()
    result = smmu.translate(STALLS, IOVA + 8, write=True, priv=True)
    (held,) = smmu.stalls
    assert (held.sid, held.ssid, held.iova) == (STALLS, None, IOVA + 8)
    assert (held.write, held.priv, held.instr, held.access) == (True, True, False, 3)
    assert held.recorded and not held.done and held.result is None
    (record,) = records(smmu, 1)
    assert (record["Stall"], record["STAG"]) == (1, held.stag)
    assert (record["StreamID"], record["InputAddr"], record["RnW"]) == (STALLS, IOVA + 8, 0)
    assert result.event == held.fault
    assert result.event.record == smmu.memory.read(QUEUE, 32)
    assert wires == ["eventq"]
    assert repr(held) == f"<Stall sid=0x14 iova={IOVA + 8:#x} write stag={held.stag:#x}>"


def test_every_stall_has_its_own_record_and_tag():
    smmu, _ = system()
    held = [stall(smmu, sid=sid) for sid in (STALLS, OTHER, STALLS, STALLS)]
    assert smmu.stalls == held
    assert len({(s.sid, s.stag) for s in held}) == 4
    assert [r["STAG"] for r in records(smmu, 4)] == [s.stag for s in held]
    assert smmu.read("EVENTQ_PROD") == 4


def test_other_faults_of_the_stream_do_not_stall():
    smmu, _ = system()
    result = smmu.translate(STALLS, IOVA, ssid=3)
    assert result.action == "abort" and result.event.name == "C_BAD_SUBSTREAMID"
    assert smmu.stalls == []


# --- resume ---


def test_a_retry_goes_on_with_what_memory_says_by_then():
    smmu, _ = system()
    told = []
    smmu.on_resume = told.append
    held = stall(smmu, IOVA + 0x10)
    smmu.memory.write_u64(LEAF, MAPPED)
    resume(smmu, held, Ac=1)
    assert held.done and smmu.stalls == [] and told == [held]
    assert held.result.pa == 0x4000_7010 and held.result.action == "ok"
    assert smmu.read("EVENTQ_PROD") == 1
    assert repr(held) == f"<Stall sid=0x14 iova={IOVA + 0x10:#x} read ok>"


def test_a_retry_that_faults_stalls_again_with_a_new_record():
    smmu, _ = system()
    told = []
    smmu.on_resume = told.append
    held = stall(smmu)
    for count in (2, 3, 4):
        before = held.stag
        resume(smmu, held, Ac=1)
        assert not held.done and held.recorded and held.stag != before and told == []
        assert smmu.stalls == [held]
        assert smmu.read("EVENTQ_PROD") == count
        assert records(smmu, count)[-1]["STAG"] == held.stag
        smmu.command("RESUME", StreamID=STALLS, STAG=before, Ac=1)  # no one's any more
        assert smmu.read("EVENTQ_PROD") == count
    smmu.memory.write_u64(LEAF, MAPPED)
    resume(smmu, held, Ac=1)
    assert held.result.pa == 0x4000_7000


def test_a_retry_that_faults_otherwise_ends():
    smmu, _ = system()
    held = stall(smmu)
    smmu.memory.write_u64(small.BASE + small.STES + 64 * STALLS, 0)
    resume(smmu, held, Ac=1)
    assert held.done and held.result.action == "abort"
    assert held.result.event.name == "C_BAD_STE"
    assert smmu.read("EVENTQ_PROD") == 2


@pytest.mark.parametrize("term_model", [0, 1])
@pytest.mark.parametrize("ab", [0, 1])
def test_termination_aborts_or_reads_zero(ab, term_model):
    smmu, _ = system(features=FULL.replace(term_model=term_model))
    held = stall(smmu)
    resume(smmu, held, Ab=ab)
    assert held.done and smmu.stalls == []
    assert held.result.action == ("abort" if ab or term_model else "raz_wi")
    assert held.result.event == held.fault
    assert held.result.pa is None


@pytest.mark.parametrize("sid, stag", [(STALLS, 1), (OTHER, 0), (STALLS + 1, 0), (0, 0)])
def test_resuming_what_is_not_stalled_has_no_effect(sid, stag):
    smmu, _ = system()
    held = stall(smmu)
    assert held.stag == 0
    smmu.command("RESUME", StreamID=sid, STAG=stag, Ac=1)
    assert smmu.stalls == [held] and not held.done
    assert smmu.read("EVENTQ_PROD") == 1


def test_stall_term_ends_all_of_a_stream():
    smmu, _ = system()
    told = []
    smmu.on_resume = told.append
    held = [stall(smmu, sid=sid) for sid in (STALLS, OTHER, STALLS)]
    smmu.command("STALL_TERM", StreamID=STALLS)
    assert smmu.stalls == [held[1]] and told == [held[0], held[2]]
    assert [s.done for s in held] == [True, False, True]
    assert held[0].result.action == held[2].result.action == "abort"
    later = stall(smmu)
    assert smmu.stalls == [held[1], later]


def test_disabling_ends_all():
    smmu, _ = system(1)
    held = [stall(smmu, sid=sid) for sid in (STALLS, OTHER, STALLS)]
    assert [s.recorded for s in held] == [True, True, False]
    smmu.write("CR0", EVENTQEN)
    assert smmu.stalls == []
    assert {s.result.action for s in held} == {"abort"}
    assert [s.result.event is None for s in held] == [False, False, True]
    smmu.write("EVENTQ_CONS", 2)
    assert smmu.read("EVENTQ_PROD") == 2  # what waited is dropped
    smmu.write("CR0", CR0)
    assert stall(smmu).recorded


def test_a_reset_ends_all():
    smmu, _ = system()
    held = stall(smmu)
    smmu.reset()
    assert held.result.action == "abort" and smmu.stalls == []


# --- records that wait ---


def test_stalls_wait_while_the_queue_is_full_and_no_overflow_is_told():
    smmu, wires = system(1)
    held = [stall(smmu) for _ in range(5)]
    assert [s.recorded for s in held] == [True, True, False, False, False]
    assert [s.stag is None for s in held] == [False, False, True, True, True]
    assert smmu.read("EVENTQ_PROD") == 2 and wires == ["eventq"]
    assert repr(held[4]).endswith("waiting>")
    smmu.write("EVENTQ_CONS", 1)
    assert [s.recorded for s in held] == [True] * 3 + [False] * 2
    assert smmu.read("EVENTQ_PROD") == 3
    smmu.write("EVENTQ_CONS", 3)
    assert all(s.recorded for s in held)
    assert [r["STAG"] for r in records(smmu, 2, 3, 1)] == [held[3].stag, held[4].stag]
    assert wires == ["eventq", "eventq"]
    assert smmu.stalls == held


def test_a_stall_that_waits_has_no_event_yet():
    smmu, _ = system(0)
    stall(smmu)
    result = smmu.translate(STALLS, IOVA)
    assert result.action == "stall" and result.event is None
    assert result.fault.name == "F_TRANSLATION"


def test_stalls_wait_while_the_queue_is_disabled():
    smmu, _ = system(cr0=1)
    held = [stall(smmu) for _ in range(2)]
    assert not any(s.recorded for s in held)
    smmu.write("CR0", CR0)
    assert all(s.recorded for s in held)
    assert [r["STAG"] for r in records(smmu, 2)] == [s.stag for s in held]


def test_stalls_wait_while_the_queue_has_an_error():
    smmu, _ = system(eventq_base=0xA000_0000 | 2)
    held = stall(smmu)
    assert not held.recorded and smmu.gerror == 4
    smmu.memory.add(bytearray(128), 0xA000_0000)
    second = stall(smmu)
    assert not second.recorded
    smmu.write("GERRORN", 4)
    assert held.recorded and second.recorded
    assert smmu.read("EVENTQ_PROD") == 2


def test_a_stall_that_waits_can_be_terminated():
    smmu, _ = system(0)
    first, second, third = (stall(smmu, sid=sid) for sid in (OTHER, STALLS, OTHER))
    smmu.command("STALL_TERM", StreamID=STALLS)
    assert second.done and second.stag is None and not second.recorded
    smmu.write("EVENTQ_CONS", 1)
    assert third.recorded
    assert first.recorded


def test_no_more_are_recorded_than_the_implementation_can_hold():
    smmu, _ = system(features=FULL.replace(stall_max=3))
    held = [stall(smmu) for _ in range(6)]
    assert [s.recorded for s in held] == [True] * 3 + [False] * 3
    resume(smmu, held[1], Ab=1)
    assert [s.recorded for s in held] == [True] * 4 + [False] * 2
    smmu.command("STALL_TERM", StreamID=STALLS)
    assert all(s.done for s in held)
    assert smmu.read("EVENTQ_PROD") == 4


def test_tags_are_used_again_but_late():
    smmu, _ = system(features=FULL.replace(stall_max=2))
    seen = []
    first = stall(smmu)
    for i in range(5):
        held = stall(smmu)
        seen.append(held.stag)
        resume(smmu, held, Ab=1)
        smmu.write("EVENTQ_CONS", (i + 2) % 32)
    assert first.stag not in seen and len(set(seen)) == 5


def test_without_an_event_queue_the_record_is_in_the_result():
    smmu, _ = system(place=False)
    result = smmu.translate(STALLS, IOVA)
    (held,) = smmu.stalls
    assert held.recorded and result.event == held.fault
    assert result.event.fields["STAG"] == held.stag and result.event.fields["Stall"] == 1
    resume(smmu, held, Ab=1)
    assert held.result.action == "abort"


# --- models ---


def test_where_stalling_is_forced_every_fault_stalls():
    smmu, _ = system(features=FULL.replace(stall_model=2))
    assert smmu.translate(small.STAGE1, IOVA).event.name == "C_BAD_CD"  # CD.S=0 is illegal
    stall(smmu)


def test_without_stalls_the_cd_is_illegal():
    smmu, _ = system(features=FULL.replace(stall_model=1))
    assert smmu.translate(STALLS, IOVA).event.name == "C_BAD_CD"
    assert smmu.stalls == []


# --- batches, bursts ---


def test_a_batch_stalls_row_by_row():
    smmu, _ = system()
    iova = np.array([small.RW, IOVA, small.RO, IOVA + 0x10], np.uint64)
    found = smmu.translate_batch(STALLS, iova, columns=["pa", "action", "event"])
    assert found["action"].tolist() == [0, 5, 0, 5]
    assert found["event"].tolist() == [0, 0x10, 0, 0x10]
    assert [s.iova for s in smmu.stalls] == [IOVA, IOVA + 0x10]


def test_a_burst_stops_at_a_page_that_stalls():
    smmu, _ = system()
    burst = smmu.translate_range(STALLS, small.RUN, 0x8000)
    assert not burst and burst.result.action == "stall"
    (held,) = smmu.stalls
    assert held.iova == burst.result.iova == small.RUN + 0x3000


def test_threads_lose_no_stall():
    smmu, _ = system(6)
    n, threads = 100, 3

    def run(i):
        smmu.translate_batch(STALLS, (1 << 30) + 4096 * np.arange(n * i, n * i + n, dtype="u8"))

    workers = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    seen = []
    while len(seen) < n * threads:  # software takes the records meanwhile
        cons, prod = smmu.read("EVENTQ_CONS"), smmu.read("EVENTQ_PROD")
        while cons != prod:
            (record,) = records(smmu, 1, cons, 6)
            seen.append(record["InputAddr"])
            cons = (cons + 1) % 128
            smmu.write("EVENTQ_CONS", cons)
            smmu.command("RESUME", StreamID=STALLS, STAG=record["STAG"], Ab=1)
        assert any(worker.is_alive() for worker in workers) or smmu.stalls or len(seen) >= n
    for worker in workers:
        worker.join()
    assert sorted(seen) == [(1 << 30) + 4096 * i for i in range(n * threads)]
    assert smmu.stalls == []


# --- callbacks ---


def test_software_that_is_fast_resumes_within_the_interrupt():
    smmu, _ = system()

    def interrupt(name):
        assert name == "eventq"
        record = layout.unpack("F_TRANSLATION", smmu.memory.read(QUEUE, 32))
        smmu.write("EVENTQ_CONS", smmu.read("EVENTQ_PROD"))
        smmu.memory.write_u64(LEAF, MAPPED)
        smmu.command("RESUME", StreamID=record["StreamID"], STAG=record["STAG"], Ac=1)

    smmu.on_interrupt = interrupt
    result = smmu.translate(STALLS, IOVA + 4)
    assert result.action == "ok" and result.pa == 0x4000_7004
    assert smmu.stalls == []


def test_software_may_terminate_within_the_interrupt_of_a_retry():
    smmu, _ = system()
    held = stall(smmu)
    smmu.write("EVENTQ_CONS", 1)
    smmu.on_interrupt = lambda name: smmu.command("STALL_TERM", StreamID=STALLS)
    resume(smmu, held, Ac=1)
    assert held.done and held.result.action == "abort" and smmu.stalls == []


def test_an_exception_of_the_interrupt_leaves_the_stall():
    smmu, _ = system()

    def interrupt(name):
        raise KeyError(name)

    smmu.on_interrupt = interrupt
    with pytest.raises(KeyError):
        smmu.translate(STALLS, IOVA)
    (held,) = smmu.stalls
    assert held.recorded
    smmu.on_interrupt = None
    resume(smmu, held, Ab=1)
    assert held.done


def test_exceptions_of_on_resume_reach_the_caller_once_all_is_done():
    smmu, _ = system(cmdq_base=QUEUE + 0x10000 | 3, cr0=0xD)
    told = []

    def told_of(held):
        told.append(held)
        raise KeyError(held.iova)

    smmu.on_resume = told_of
    held = [stall(smmu, IOVA + 8 * i) for i in range(3)]
    with pytest.raises(KeyError, match=f"{IOVA}"):
        smmu.command("STALL_TERM", StreamID=STALLS)
    assert told == held and smmu.stalls == []
    assert smmu.read("CMDQ_CONS") == 1


def test_an_exception_in_a_retry_leaves_the_stall_and_the_command():
    smmu, _ = system(cmdq_base=QUEUE + 0x10000 | 3, cr0=0xD)
    held = stall(smmu)
    smmu.memory.remove(small.BASE)
    image = bytearray(small.SIZE)

    def read(address, n):
        raise OSError("no")

    smmu.memory.add_callback(small.BASE, small.SIZE, read)
    with pytest.raises(OSError, match="no"):
        resume(smmu, held, Ac=1)
    assert smmu.read("CMDQ_CONS") == 0
    assert smmu.stalls == [held] and held.recorded and not held.done
    smmu.memory.remove(small.BASE)
    smmu.memory.add(image, small.BASE)
    smmu.command("SYNC")  # everything is invalid by now
    assert smmu.read("CMDQ_CONS") == 2 and held.result.event.name == "C_BAD_STE"


def test_a_record_whose_write_raises_leaves_no_stall():
    smmu, _ = system(eventq_base=0xA000_0000 | 2)

    def write(address, data):
        raise OSError("no")

    smmu.memory.add_callback(0xA000_0000, 128, lambda a, n: bytes(n), write)
    with pytest.raises(OSError, match="no"):
        smmu.translate(STALLS, IOVA)
    assert smmu.stalls == [] and smmu.read("EVENTQ_PROD") == 0


def test_a_stall_is_made_by_translations_alone():
    smmu, _ = system()
    with pytest.raises(TypeError, match="made by a translation"):
        type(stall(smmu))()
    with pytest.raises(TypeError, match="on_resume: int given"):
        smmu.on_resume = 5
    with pytest.raises(AttributeError):
        smmu.stalls[0].stag = 7


# --- random programs against a model ---


class Model:
    """Outstanding stalls as plain lists: recorded ones, and those that wait, in order."""

    def __init__(self, most, size):
        self.most, self.size = most, size
        self.recorded, self.waiting = [], []
        self.used = 0  # entries of the event queue
        self.enabled = True

    def flush(self):
        while (self.waiting and len(self.recorded) < self.most and self.used < self.size
               and self.enabled):  # fmt: skip
            self.recorded.append(self.waiting.pop(0))
            self.used += 1


@pytest.mark.parametrize("seed", range(30))
def test_random_programs_lose_no_stall(seed):
    rng = random.Random(seed)
    log2size = rng.choice((0, 1, 2, 4))
    most = rng.choice((1, 2, 3, 8))
    smmu, _ = system(log2size, features=FULL.replace(stall_max=most))
    model = Model(most, 1 << log2size)
    every = []
    mapped = False
    for _ in range(200):
        step = rng.choice(("fault", "fault", "take", "resume", "resume", "term", "map", "enable"))
        if step == "fault":
            before = smmu.stalls
            result = smmu.translate(rng.choice((STALLS, OTHER)), IOVA)
            if mapped:
                assert result.pa == 0x4000_7000
            else:
                (held,) = [s for s in smmu.stalls if s not in before]
                every.append(held)
                model.waiting.append(held)
        elif step == "take":
            count = rng.randint(0, model.used)
            cons = smmu.read("EVENTQ_CONS")
            smmu.write("EVENTQ_CONS", (cons + count) % (2 << log2size))
            model.used -= count
        elif step == "resume" and model.recorded:
            held = rng.choice(model.recorded)
            ac, ab = rng.getrandbits(1), rng.getrandbits(1)
            model.recorded.remove(held)
            if ac and not mapped:
                model.waiting.append(held)
                # its own tag is free by then, so that it may be recorded at once
            resume(smmu, held, Ac=ac, Ab=ab)
            if not ac:
                assert held.result.action == ("abort" if ab else "raz_wi")
            elif mapped:
                assert held.result.pa == 0x4000_7000
        elif step == "term":
            sid = rng.choice((STALLS, OTHER))
            smmu.command("STALL_TERM", StreamID=sid)
            model.recorded = [s for s in model.recorded if s.sid != sid]
            model.waiting = [s for s in model.waiting if s.sid != sid]
        elif step == "map":
            mapped = rng.random() < 0.4
            smmu.memory.write_u64(LEAF, MAPPED if mapped else 0)
        elif step == "enable":
            model.enabled = rng.random() < 0.7
            smmu.write("CR0", 5 if model.enabled else 1)
        model.flush()
        assert {s for s in smmu.stalls if s.recorded} == set(model.recorded)
        assert [s for s in smmu.stalls if not s.recorded] == model.waiting
        assert all(s.done == (s not in smmu.stalls) for s in every)
        tags = [(s.sid, s.stag) for s in model.recorded]
        assert len(set(tags)) == len(tags)
    assert len(every) > 10


# --- queues that callbacks serve ---


def refusing(times):
    """(smmu, interrupts): its event queue refuses so many records; GERROR is acknowledged."""
    smmu, _ = system(place=False)
    left, data, interrupts = [times], bytearray(0x1000), []

    def write(address, record):
        if left[0]:
            left[0] -= 1
            return None
        at = address - 0xA000_0000
        data[at : at + len(record)] = record
        return True

    def interrupt(name):
        interrupts.append(name)
        if name == "gerror":
            smmu.write("GERRORN", smmu.gerror)

    smmu.memory.add_callback(0xA000_0000, 0x1000, lambda address, n: bytes(n), write)
    smmu.write("CR0", 1)
    smmu.write("EVENTQ_BASE", 0xA000_0000 | 2)
    smmu.write("CR0", 5)
    smmu.on_interrupt = interrupt
    return smmu, interrupts


@pytest.mark.parametrize("times", [0, 1, 4])
def test_a_stall_is_recorded_once_the_interrupt_ends_the_error(times):
    smmu, interrupts = refusing(times)
    held = stall(smmu)
    assert held.recorded
    assert interrupts == ["gerror"] * times + ["eventq"]


def test_a_queue_that_always_refuses_does_not_hang():
    smmu, interrupts = refusing(1 << 40)
    held = stall(smmu)
    assert not held.recorded and not held.done
    assert interrupts == ["gerror"] * 5


def test_memory_does_not_change_while_a_record_is_told_by_msi():
    smmu, _ = system(log2size=0)
    said = []

    def write(address, data):
        with pytest.raises(BufferError, match="in use"):
            smmu.memory.remove(0xA000_0000)
        said.append(address)
        return True

    smmu.memory.add_callback(0xA000_0000, 0x1000, lambda address, n: bytes(n), write)
    smmu.write("IRQ_CTRL", 0)
    smmu.write("EVENTQ_IRQ_CFG0", 0xA000_0000)
    smmu.write("IRQ_CTRL", 4)
    smmu.translate(small.STAGE1, small.UNMAPPED)
    held = stall(smmu)
    assert not held.recorded and len(said) == 1
    smmu.write("EVENTQ_CONS", 1)
    assert held.recorded and len(said) == 2
