"""Stalled transactions: tags, records that wait, and the three ways in which a stall ends."""

import collections
import random
import threading

import numpy as np
import pytest
import small
from ptwriter import encode_cd, encode_ste, leaf_descriptor
from stalls import CDS, FULL, IOVA, LEAF, MAPPED, OTHER, QUEUE, STALLS, resume, stall, system
from states import Handle, opened, sealed

from smmufast import ACTIONS, Caches, Event, Smmu, layout

CR0 = 5
EVENTQEN = 4
EVENTQ_ABT_ERR = 4


def records(smmu, count, first=0, log2size=4):
    return [
        layout.unpack("F_TRANSLATION",
                      smmu.memory.read(QUEUE + 32 * ((first + i) % (1 << log2size)), 32))
        for i in range(count)
    ]  # fmt: skip


# --- a stall and its record ---


@pytest.mark.rule("S3.12.2-1", "S7.3.13-6")
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


@pytest.mark.rule("S3.12.2.1-1", "S7.3.21-3")
def test_every_stall_has_its_own_record_and_tag():
    smmu, _ = system()
    held = [stall(smmu, sid=sid) for sid in (STALLS, OTHER, STALLS, STALLS)]
    assert smmu.stalls == held
    assert len({s.stag for s in held}) == 4
    assert [r["STAG"] for r in records(smmu, 4)] == [s.stag for s in held]
    assert smmu.read("EVENTQ_PROD") == 4


@pytest.mark.rule("S7.3.21-2")
def test_other_faults_of_the_stream_do_not_stall():
    smmu, _ = system()
    result = smmu.translate(STALLS, IOVA, ssid=3)
    assert result.action == "abort" and result.event.name == "C_BAD_SUBSTREAMID"
    assert smmu.stalls == []


# --- resume ---


@pytest.mark.rule("S3.12.2-3", "S3.12.2.2-2", "S4.3.8-2")
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


@pytest.mark.rule("S3.12.2-5", "S4.6-101", "S4.7.1-2")
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


@pytest.mark.rule("S3.12.2-4")
def test_a_retry_that_faults_otherwise_ends():
    smmu, _ = system()
    held = stall(smmu)
    smmu.memory.write_u64(small.BASE + small.STES + 64 * STALLS, 0)
    resume(smmu, held, Ac=1)
    assert held.done and held.result.action == "abort"
    assert held.result.event.name == "C_BAD_STE"
    assert smmu.read("EVENTQ_PROD") == 2


@pytest.mark.rule("S3.12.2-6", "S3.12.3-1", "S4.6-102", "S4.7.1-3", "S4.7.1-4")
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


@pytest.mark.rule("S3.12.2-9", "S4.6-103", "S4.7.1-7")
@pytest.mark.parametrize("sid, stag", [(STALLS, 1), (OTHER, 0), (STALLS + 1, 0), (0, 0)])
def test_resuming_what_is_not_stalled_has_no_effect(sid, stag):
    smmu, _ = system()
    held = stall(smmu)
    assert held.stag == 0
    smmu.command("RESUME", StreamID=sid, STAG=stag, Ac=1)
    assert smmu.stalls == [held] and not held.done
    assert smmu.read("EVENTQ_PROD") == 1


@pytest.mark.rule("S4.6-104", "S4.7.2-1", "S4.7.2-3")
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


@pytest.mark.rule("S3.12.2-7", "S6.3.9.6-13", "S6.3.9.6-14")
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


@pytest.mark.rule("S3.5.3-4", "S7.2.1-3", "S7.4-3")
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


@pytest.mark.rule("S3.5.4-1", "S3.12.2-12")
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


@pytest.mark.rule("S4.7.2-2")
def test_a_stall_that_waits_can_be_terminated():
    smmu, _ = system(0)
    first, second, third = (stall(smmu, sid=sid) for sid in (OTHER, STALLS, OTHER))
    smmu.command("STALL_TERM", StreamID=STALLS)
    assert second.done and second.stag is None and not second.recorded
    smmu.write("EVENTQ_CONS", 1)
    assert third.recorded
    assert first.recorded


@pytest.mark.rule("S3.12.2-8", "S6.3.6-3")
def test_no_more_are_recorded_than_the_implementation_can_hold():
    smmu, _ = system(features=FULL.replace(stall_max=3))
    held = [stall(smmu) for _ in range(6)]
    assert [s.recorded for s in held] == [True] * 3 + [False] * 3
    resume(smmu, held[1], Ab=1)
    assert [s.recorded for s in held] == [True] * 4 + [False] * 2
    smmu.command("STALL_TERM", StreamID=STALLS)
    assert all(s.done for s in held)
    assert smmu.read("EVENTQ_PROD") == 4


@pytest.mark.rule("S4.7.1-9")
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


@pytest.mark.rule("S3.12.2-10")
@pytest.mark.parametrize("streams", [(STALLS,), (OTHER,), (STALLS, OTHER)])
def test_a_tag_is_used_once_among_all_streams(streams):
    smmu, _ = system(log2size=7)
    held = [stall(smmu, sid=streams[i % len(streams)]) for i in range(100)]
    assert [s.stag for s in held] == list(range(100))
    resume(smmu, held[40], Ab=1)
    resume(smmu, held[60], Ab=1)
    smmu.write("EVENTQ_CONS", smmu.read("EVENTQ_PROD"))
    # all 65,536 were used since
    state, contents = opened(smmu.save())
    state["last_stag"] = 0xFFFF
    again = Smmu.restore(sealed(state, contents), smmu.memory)
    assert [stall(again, sid=STALLS).stag for _ in range(4)] == [40, 60, 100, 101]
    before = again.stalls
    again.command("RESUME", StreamID=STALLS, STAG=0xFFFF, Ab=1)
    for sid in {STALLS, OTHER} - {streams[0]}:  # another stream has no such tag
        again.command("RESUME", StreamID=sid, STAG=0, Ab=1)
    assert again.stalls == before


@pytest.mark.parametrize("ends", ["RESUME", "STALL_TERM", "SMMUEN"])
def test_a_tag_is_free_once_its_stall_is_acknowledged(ends):
    smmu, _ = system()
    held = stall(smmu)
    if ends == "RESUME":
        resume(smmu, held, Ab=1)
    elif ends == "STALL_TERM":
        smmu.command("STALL_TERM", StreamID=STALLS)
    else:
        smmu.write("CR0", CR0 & ~1)
        smmu.write("CR0", CR0)
    assert held.done and held.stag == 0
    state, contents = opened(smmu.save())
    state["last_stag"] = 0xFFFF
    again = Smmu.restore(sealed(state, contents), smmu.memory)
    assert stall(again, sid=OTHER).stag == 0


def test_a_record_that_was_not_written_leaves_its_tag_free():
    smmu, _ = system(eventq_base=0xA000_0000 | 2)
    assert stall(smmu).stag is None
    smmu.memory.add_private(0xA000_0000, 128)
    smmu.write("GERRORN", smmu.gerror)
    assert [held.stag for held in smmu.stalls] == [0]


def test_without_an_event_queue_the_record_is_in_the_result():
    smmu, _ = system(place=False)
    result = smmu.translate(STALLS, IOVA)
    (held,) = smmu.stalls
    assert held.recorded and result.event == held.fault
    assert result.event.fields["STAG"] == held.stag and result.event.fields["Stall"] == 1
    resume(smmu, held, Ab=1)
    assert held.result.action == "abort"


# --- records that wait are not old: 3.12.2, 4.7.3, 7.2.1 ---

CAUSES = ("full", "disabled", "error", "STALL_MAX")


def waiting(cause, count=1, **more):
    """(smmu, its stalls whose record waits, what makes room): and each time what on_resume told."""
    stall_max = 1 if cause == "STALL_MAX" else 100
    smmu, _ = system(0 if cause == "full" else 4, FULL.replace(stall_max=stall_max), **more)
    told = []
    smmu.on_resume = told.append
    first = None
    if cause == "full":
        assert smmu.translate(small.STAGE1, IOVA + 0x1000).action == "abort"
    elif cause == "disabled":
        smmu.write("CR0", smmu.cr0 & ~EVENTQEN)
    elif cause == "error":
        smmu.write("GERRORN", EVENTQ_ABT_ERR)
    else:
        first = stall(smmu)
    held = [stall(smmu, IOVA + 8 * i) for i in range(count)]
    assert not any(s.recorded for s in held)

    def room():
        if cause == "full":
            smmu.write("EVENTQ_CONS", smmu.read("EVENTQ_PROD"))
        elif cause == "disabled":
            smmu.write("CR0", smmu.cr0 | EVENTQEN)
        elif cause == "error":
            smmu.write("GERRORN", 0)
        else:
            resume(smmu, first, Ab=1)
            told.remove(first)

    return smmu, held, room, told


def events(smmu, log2size=4):
    """The event queue's records, oldest first: (name, stalled)."""
    prod = smmu.read("EVENTQ_PROD") & 0xFFFFF
    found = [Event(smmu.memory.read(QUEUE + 32 * (i % (1 << log2size)), 32)) for i in range(prod)]
    return [(event.name, bool(event.stalled)) for event in found]


@pytest.mark.rule("S3.12.2-11", "S4.7.3-15", "S7.2.1-4")
@pytest.mark.parametrize("caches", [None, Caches.small, Caches.server])
@pytest.mark.parametrize("cause", CAUSES)
def test_a_page_that_came_meanwhile_lets_what_waits_go_on_without_a_record(cause, caches):
    smmu, held, room, told = waiting(cause, 3, caches=caches and caches())
    before = events(smmu)
    smmu.memory.write_u64(LEAF, MAPPED)
    smmu.command("TLBI_NH_VA", ASID=7, Address=IOVA, Leaf=1)
    smmu.command("SYNC")
    assert told == [] and not any(s.done for s in held)
    room()
    assert told == held and smmu.stalls == []
    assert [s.result.pa for s in held] == [0x4000_7000, 0x4000_7008, 0x4000_7010]
    assert {s.result.action for s in held} == {"ok"}
    assert {s.fault.name for s in held} == {"F_TRANSLATION"}
    assert not any(s.recorded or s.stag is not None for s in held)
    assert events(smmu)[len(before) :] == [] and smmu.read("EVENTQ_PROD") < 3


@pytest.mark.parametrize("caches", [None, Caches.server])
@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize(
    ("config", "event"), [(0b000, None), (None, "C_BAD_STE"), (0b100, None)],
)
def test_what_waits_ends_as_the_configuration_of_now_says(config, event, cause, caches):
    smmu, (held,), room, told = waiting(cause, caches=caches and caches())
    count = smmu.read("EVENTQ_PROD")
    ste = encode_ste(v=config is not None, config=config or 0)
    smmu.memory.write(small.BASE + small.STES + 64 * STALLS, ste)
    smmu.command("CFGI_STE", StreamID=STALLS, Leaf=1)
    smmu.command("SYNC")
    room()
    assert told == [held] and smmu.stalls == []
    assert held.result.action == ("bypass" if config else "abort")
    assert (held.result.event and held.result.event.name) == event
    mask = 1 if cause == "full" else 31
    assert (smmu.read("EVENTQ_PROD") - count) & mask == (event is not None)
    if event:  # in place of the record of the stall
        data = smmu.memory.read(QUEUE + 32 * (count if cause != "full" else 0), 32)
        assert (Event(data).name, bool(Event(data).stalled)) == (event, False)


@pytest.mark.parametrize("cause", CAUSES)
def test_a_cd_that_terminates_by_now_terminates_what_waits(cause):
    smmu, (held,), room, _ = waiting(cause)
    at = small.BASE + CDS
    word = smmu.memory.read_u64(at)
    smmu.memory.write_u64(at, word & ~(1 << 44))  # CD.S
    smmu.command("CFGI_CD", StreamID=STALLS, Leaf=1)
    smmu.command("SYNC")
    room()
    assert held.result.action == "abort" and held.result.event.name == "F_TRANSLATION"
    assert not held.result.event.stalled and not held.recorded
    assert held.fault.stalled


@pytest.mark.rule("S4.7.2.1-1")
def test_the_shutdown_of_a_stream_leaves_no_record_of_a_stall():
    # 4.7.2.1: the STE aborts, CFGI, SYNC, then STALL_TERM; there is no room until the end
    smmu, held, room, told = waiting("full", 2)
    smmu.memory.write(small.BASE + small.STES + 64 * STALLS, encode_ste(v=1, config=0))
    smmu.command("CFGI_STE", StreamID=STALLS, Leaf=1)
    smmu.command("SYNC")
    smmu.command("STALL_TERM", StreamID=STALLS)
    assert told == held and smmu.stalls == []
    room()
    smmu.command("SYNC")
    assert smmu.read("EVENTQ_PROD") == smmu.read("EVENTQ_CONS")


def test_room_for_one_record_serves_those_that_wait_in_order():
    smmu, held, room, told = waiting("full", 3)
    other = stall(smmu, IOVA + 0x8000)  # not mapped, and last
    smmu.memory.write_u64(LEAF, MAPPED)
    room()
    assert told == held and smmu.stalls == [other] and other.recorded
    smmu, held, room, told = waiting("full", 1)
    others = [stall(smmu, IOVA + 0x8000 + 0x1000 * i) for i in range(3)]
    smmu.memory.write_u64(LEAF, MAPPED)
    smmu.memory.write_u64(LEAF + 64 + 8, MAPPED)
    for i in range(3):
        room()
        assert [s.recorded for s in others] == [True, False, i > 0]
        assert told == ([*held, others[1]] if i else held)
    assert smmu.stalls == [others[0], others[2]]


def test_what_waits_meets_another_fault_and_that_is_recorded():
    smmu, (held,), room, _ = waiting("disabled", caches=Caches.server())
    smmu.memory.write_u64(LEAF, leaf_descriptor(12, 3, 0x4000_7000, ap=1, af=0))
    room()
    assert events(smmu) == [("F_ACCESS", True)]
    assert held.recorded and held.fault.name == "F_ACCESS" and not held.done
    resume(smmu, held, Ab=1)
    assert held.result.event.name == "F_ACCESS"


def test_a_retry_that_stalls_once_more_and_waits_is_translated_anew_too():
    smmu, _ = system(0)
    held = stall(smmu)
    resume(smmu, held, Ac=1)  # the queue is full with its own first record
    assert not held.recorded and smmu.stalls == [held]
    smmu.memory.write_u64(LEAF, MAPPED)
    smmu.write("EVENTQ_CONS", 1)
    assert held.result.pa == 0x4000_7000 and smmu.read("EVENTQ_PROD") == 1


def test_what_the_queue_refused_is_translated_anew_too():
    smmu, _ = system(eventq_base=0xA000_0000 | 2, cr0=1)  # there is no memory
    held = stall(smmu)
    smmu.write("CR0", CR0)
    assert smmu.gerror == EVENTQ_ABT_ERR and not held.recorded and held.stag is None
    smmu.memory.add(bytearray(128), 0xA000_0000)
    smmu.memory.write_u64(LEAF, MAPPED)
    smmu.write("GERRORN", EVENTQ_ABT_ERR)
    assert held.result.pa == 0x4000_7000 and smmu.read("EVENTQ_PROD") == 0


@pytest.mark.parametrize("cause", ["full", "disabled", "error"])
def test_a_state_keeps_what_waits_to_be_translated_anew(cause):
    smmu, _, _, _ = waiting(cause, 2)
    again = Smmu.restore(smmu.save(), smmu.memory)
    first, second = again.stalls
    again.memory.write_u64(LEAF, MAPPED)
    again.write("EVENTQ_CONS", again.read("EVENTQ_PROD"))
    again.write("GERRORN", 0)
    again.write("CR0", CR0)
    assert again.stalls == [] and (first.result.pa, second.result.pa) == (0x4000_7000, 0x4000_7008)


@pytest.mark.parametrize("face", ["batch", "many", "range", "pa", "walk", "trace", "C"])
def test_what_stalls_by_any_face_goes_on(face):
    smmu, _ = system(0)
    smmu.translate(small.STAGE1, IOVA + 0x1000)
    if face in ("batch", "many"):
        iova = np.full(2 if face == "batch" else 40, IOVA, np.uint64)
        found = smmu.translate_batch(STALLS, iova, columns=["action", "event"])
        assert found["action"].tolist() == [5] * len(iova) and not found["event"].any()
    elif face == "range":
        assert smmu.translate_range(STALLS, IOVA, 64).result.action == "stall"
    elif face == "pa":
        with pytest.raises(LookupError):
            smmu.pa(STALLS, IOVA)
    elif face == "trace":
        smmu.translate(STALLS, IOVA, trace=True)
    elif face == "C":
        handle = Handle(smmu)
        assert handle.translate(STALLS, IOVA) == 0
        handle.release()
    else:
        walk = smmu.start_walk(STALLS, IOVA)
        while not walk.done:
            walk.supply(smmu.memory.read(walk.request.address, walk.request.size))
    held = smmu.stalls
    assert held and not any(s.recorded for s in held)
    smmu.memory.write_u64(LEAF, MAPPED)
    smmu.write("EVENTQ_CONS", 1)
    assert [s.result.pa for s in held] == [0x4000_7000] * len(held)
    assert smmu.stalls == [] and smmu.read("EVENTQ_PROD") == 1


# --- callbacks in the middle of a translation anew ---


def behind_callback(smmu, at, act):
    """Memory in place of the small system's, that calls `act` when `at` is read."""
    image = bytearray(smmu.memory.read(small.BASE, small.SIZE))
    smmu.memory.remove(small.BASE)

    def read(address, n):
        if address == at:
            act()
        return bytes(image[address - small.BASE : address - small.BASE + n])

    smmu.memory.add_callback(small.BASE, small.SIZE, read)
    return image


def saves(smmu):
    with pytest.raises(RuntimeError, match="save between calls"):
        smmu.save()


ACTS = {
    "STALL_TERM": lambda smmu: smmu.command("STALL_TERM", StreamID=STALLS),
    "SMMUEN": lambda smmu: smmu.write("CR0", smmu.cr0 & ~1),
    "EVENTQEN": lambda smmu: smmu.write("CR0", smmu.cr0 & ~EVENTQEN),
    "CONS": lambda smmu: smmu.write("EVENTQ_CONS", smmu.read("EVENTQ_PROD")),
    "RESUME": lambda smmu: smmu.command("RESUME", StreamID=STALLS, STAG=0, Ac=1),
    "stall": lambda smmu: smmu.translate(OTHER, IOVA),
    "save": saves,
}


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("act", ACTS)
def test_software_may_do_anything_while_a_stall_is_translated_anew(act, mapped):
    smmu, held, room, told = waiting("full", 2)
    acted = []

    def once():
        if not acted:
            acted.append(act)
            ACTS[act](smmu)

    image = behind_callback(smmu, LEAF, once)
    if mapped:
        image[LEAF - small.BASE : LEAF - small.BASE + 8] = MAPPED.to_bytes(8, "little")
    room()
    assert acted == [act]
    others = [s for s in smmu.stalls if s not in held]
    if act in ("STALL_TERM", "SMMUEN"):
        assert told == held and {s.result.action for s in held} == {"abort"}
        assert smmu.stalls == [] and smmu.read("EVENTQ_PROD") == 1
    elif mapped:
        # with EVENTQEN=0 by now the second one is not looked at
        done = held[:1] if act == "EVENTQEN" else held
        assert told == done and {s.result.action for s in done} == {"ok"}
        assert smmu.read("EVENTQ_PROD") == 1
        assert [s for s in smmu.stalls if s in held] == held[len(done) :]
    else:
        assert told == []
        assert [s.recorded for s in held] == [act != "EVENTQEN", False]
    if act == "stall":
        assert len(others) == (not mapped)  # it came meanwhile, and its page is there too
        assert not any(s.recorded for s in others)
    smmu.write("CR0", 4)
    assert smmu.stalls == []


def test_software_may_end_a_stall_at_the_event_that_its_translation_anew_brings():
    smmu, (held,), room, told = waiting("full")
    smmu.memory.write(small.BASE + small.STES + 64 * STALLS, encode_ste(v=0))
    smmu.on_interrupt = lambda name: smmu.command("STALL_TERM", StreamID=STALLS)
    room()
    assert told == [held] and held.result.action == "abort" and held.result.event is None
    assert Event(smmu.memory.read(QUEUE, 32)).name == "C_BAD_STE"
    assert smmu.stalls == []


def test_an_exception_while_a_stall_is_translated_anew_reaches_who_made_room():
    smmu, held, room, told = waiting("full", 2)
    fails = [True]

    def act():
        if fails:
            raise OSError("no")

    behind_callback(smmu, LEAF, act)
    for _ in range(2):
        with pytest.raises(OSError, match="no"):
            room()
        assert smmu.stalls == held and told == []
        assert not any(s.recorded or s.done for s in held)
    with pytest.raises(OSError, match="no"):
        smmu.translate(OTHER, IOVA)  # which would stall, and is not held
    assert smmu.stalls == held
    fails.clear()
    room()
    assert [s.recorded for s in held] == [True, False]
    assert smmu.save()  # nothing is under way


def test_exceptions_of_on_resume_reach_who_made_room_once_all_is_done():
    smmu, held, room, _ = waiting("full", 3)
    told = []

    def resumed(stall):
        told.append(stall)
        raise KeyError(stall.iova)

    smmu.on_resume = resumed
    smmu.memory.write_u64(LEAF, MAPPED)
    with pytest.raises(KeyError, match=str(IOVA)):
        room()
    assert told == held and smmu.stalls == [] and all(s.done for s in held)
    assert smmu.save()


def test_a_host_that_stalls_again_when_it_is_told_is_served():
    smmu, held, room, _ = waiting("full", 2)
    again = []
    smmu.on_resume = lambda stall: again.append(smmu.translate(STALLS, IOVA + 0x8000).action)
    smmu.memory.write_u64(LEAF, MAPPED)
    room()
    assert all(s.done for s in held) and again == ["stall", "stall"]
    assert [s.recorded for s in smmu.stalls] == [True, False]


# --- models ---


@pytest.mark.rule("S3.12-15", "S6.3.1-21")
def test_where_stalling_is_forced_every_fault_stalls():
    smmu, _ = system(features=FULL.replace(stall_model=2))
    assert smmu.translate(small.STAGE1, IOVA).event.name == "C_BAD_CD"  # CD.S=0 is illegal
    stall(smmu)


@pytest.mark.rule("S3.12-14")
def test_without_stalls_the_cd_is_illegal():
    smmu, _ = system(features=FULL.replace(stall_model=1))
    assert smmu.translate(STALLS, IOVA).event.name == "C_BAD_CD"
    assert smmu.stalls == []


# --- batches, bursts ---


@pytest.mark.rule("S5.5-7")
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


def test_threads_of_several_streams_never_share_a_tag():
    smmu, _ = system(8, features=FULL.replace(stall_max=40))
    state, contents = opened(smmu.save())
    state["last_stag"] = 0xFFF0
    smmu = Smmu.restore(sealed(state, contents), smmu.memory)
    held = stall(smmu)

    def run(sid):
        smmu.translate_batch(sid, (1 << 30) + 4096 * np.arange(60, dtype="u8"))

    workers = [threading.Thread(target=run, args=(sid,)) for sid in (STALLS, OTHER, STALLS)]
    for worker in workers:
        worker.start()
    while smmu.stalls != [held] or any(worker.is_alive() for worker in workers):
        now = [s for s in smmu.stalls if s.recorded]
        tags = [s.stag for s in now if s.stag is not None and not s.done]
        assert len(set(tags)) == len(tags)
        for each in now:
            stag = each.stag
            if each is not held and stag is not None:
                smmu.command("RESUME", StreamID=each.sid, STAG=stag, Ab=1)
        smmu.write("EVENTQ_CONS", smmu.read("EVENTQ_PROD"))
    for worker in workers:
        worker.join()
    assert held.recorded and held.stag == 0xFFF1


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
    with pytest.raises(TypeError, match="on_resume must be a callable or None, not int"):
        smmu.on_resume = 5
    with pytest.raises(AttributeError):
        smmu.stalls[0].stag = 7


# --- random programs against a model ---

THIRD = 22
SIDS = (STALLS, OTHER, THIRD)
PAGES = [0x10_0000 + 0x1000 * i for i in range(3)]
# What a stream is configured for: its STE, what its CD says of faults.
MODES = {
    "stall": (5, {"s": 1, "a": 1, "r": 1}), "quiet stall": (5, {"s": 1, "a": 0, "r": 0}),
    "abort": (5, {"s": 0, "a": 1, "r": 1}), "quiet abort": (5, {"s": 0, "a": 1, "r": 0}),
    "raz_wi": (5, {"s": 0, "a": 0, "r": 1}), "bypass": (4, {}), "off": (0, {}),
    "invalid": (None, {}), "bad cd": (5, {"v": 0}),
}  # fmt: skip


class Held:
    """A transaction of the model."""

    def __init__(self, sid, iova, write):
        self.sid, self.iova, self.write = sid, iova, write
        self.old = False  # its record had to wait
        self.done = None  # (action, address, event number or None) once it is


class Model:
    """The text of 3.12.2, 4.7 and 7.2.1, slowly: transactions in lists, and what the queue holds.

    `interrupt` is called, as software is, when the event queue is no longer empty.
    """

    def __init__(self, most, size, interrupt=lambda: None):
        self.most, self.size, self.interrupt = most, size, interrupt
        self.modes = dict.fromkeys(SIDS, "stall")
        self.pages = dict.fromkeys(PAGES)  # None, "ro" or "rw"
        self.order, self.recorded, self.waiting = [], [], []  # outstanding; with a record, without
        self.records = []  # of the queue, ever
        self.told = []  # transactions that software ended or that went on, in order
        self.used = 0
        self.enabled, self.error, self.overflow = True, False, False
        self.recording = False
        self.anew = collections.Counter()  # how it went on with transactions that waited

    def writable(self):
        return self.enabled and not self.error and self.used < self.size

    def put(self, record):
        self.records.append(record)
        self.used += 1
        if self.used == 1:
            self.interrupt()

    def event(self, record):
        """An event of a transaction that is terminated: recorded, or lost."""
        if self.writable():
            self.put(record)
            return True
        if self.enabled and not self.error:
            self.overflow = True
        return False

    def translate(self, t):
        """(action, address, event number or 0, whether it is recorded)."""
        mode = self.modes[t.sid]
        if mode == "bypass":
            return "bypass", t.iova, 0, False
        if mode in ("off", "invalid", "bad cd"):
            number = {"off": 0, "invalid": 0x04, "bad cd": 0x0A}[mode]
            return "abort", None, number, number != 0
        page = self.pages[t.iova & ~0xFFF]
        if page == "rw" or (page == "ro" and not t.write):
            return "ok", t.iova + 0x4000_0000, 0, False
        number = 0x13 if page else 0x10
        if "stall" in mode:
            return "stall", None, number, True
        return mode.split()[-1], None, number, "quiet" not in mode

    def meet(self, t):
        """Translate; whether it stalls.  Else it is done, with its event in the queue or lost."""
        action, address, number, recorded = self.translate(t)
        t.fault = number
        if action == "stall":
            return True
        kept = recorded and self.event((number, t.sid, t.iova, False))
        if t.done is None:  # software that served the event did not end it
            t.done = action, address, number if kept else None
        return False

    def arrive(self, t):
        if self.meet(t):
            self.order.append(t)
            self.waiting.append(t)
            self.flush()
            t.old = True

    def finish(self, t):
        if t in self.order:
            self.order.remove(t)
            (self.recorded if t in self.recorded else self.waiting).remove(t)
            self.told.append(t)

    def flush(self):
        if self.recording:
            return
        self.recording = True
        while self.waiting and len(self.recorded) < self.most and self.writable():
            t = self.waiting[0]
            stalls = not t.old or self.meet(t)
            if t.old:
                self.anew["stall" if stalls else t.done[0], t.done and t.done[2]] += 1
            if not stalls:
                self.finish(t)
            else:
                self.waiting.remove(t)
                self.recorded.append(t)
                self.put((t.fault, t.sid, t.iova, True))
        self.recording = False

    def kill(self, t, action):
        t.done = action, None, t.fault if t in self.recorded else None
        self.finish(t)

    def retry(self, t):
        if not self.meet(t):
            self.finish(t)
        elif t.done is None:  # a new transaction
            self.order.remove(t)
            self.recorded.remove(t)
            self.order.append(t)
            self.waiting.append(t)
            t.old = False
            self.flush()
            t.old = True

    def take(self, count):
        self.used -= count
        self.flush()

    def take_all(self):
        self.take(self.used)

    def term(self, sid):
        for t in list(self.order):
            if sid in (None, t.sid):
                self.kill(t, "abort")
        self.flush()

    def map_all(self):
        self.pages = dict.fromkeys(PAGES, "rw")


class Pair:
    """The model and an Smmu, that the same is done to."""

    def __init__(self, seed, cached):
        self.rng = rng = random.Random(seed)
        self.log2size = rng.choice((0, 0, 1, 2, 4))
        most = rng.choice((1, 2, 3, 8))
        caches = Caches.small(nested="split") if cached else None
        self.smmu, _ = system(self.log2size, FULL.replace(stall_max=most), caches=caches)
        self.cached = cached
        self.smmu.on_interrupt = self.interrupt
        self.smmu.on_resume = self.resumed
        self.serve = rng.choice(("nothing", "nothing", "take", "take and end", "end", "map"))
        self.model = Model(most, 1 << self.log2size, lambda: self.software(self.model))
        self.twins = {}  # of each Stall, its transaction
        self.told = []
        self.seen = 0
        for sid in SIDS:
            self.configure(sid, "stall")

    # software that serves the interrupt; its half for the model must not ask for anything random

    def interrupt(self, name):
        assert name == "eventq"
        self.software(self)

    def software(self, side):
        if "take" in self.serve:
            side.take_all()
        if "end" in self.serve:
            side.term(OTHER)
        if self.serve == "map":
            side.map_all()

    def take_all(self):
        self.smmu.write("EVENTQ_CONS", self.smmu.read("EVENTQ_PROD") & 0xFFFFF)

    def term(self, sid):
        self.smmu.command("STALL_TERM", StreamID=sid)

    def map_all(self):
        for iova in PAGES:
            self.leaf(iova, "rw")
        self.invalidate()

    # both

    def invalidate(self):
        """What was changed is told to caches; without them it is known."""
        if self.cached:
            for name in ("CFGI_ALL", "TLBI_NSNH_ALL", "SYNC"):
                self.smmu.command(name)

    def leaf(self, iova, page):
        value = leaf_descriptor(12, 3, iova + 0x4000_0000, ap=1 if page == "rw" else 3)
        self.smmu.memory.write_u64(small.BASE + small.LEVEL3 + 8 * (iova >> 12),
                                   value if page else 0)  # fmt: skip

    def configure(self, sid, mode):
        config, more = MODES[mode]
        at = CDS + 64 * (sid - STALLS)
        cd = {
            "v": 1, "aa64": 1, "t0sz": 25, "epd1": 1, "ips": 4, "asid": 7,
            "ttb0": small.BASE + small.LEVEL1, "mair": 0x44FF,
        }  # fmt: skip
        self.smmu.memory.write(small.BASE + at, encode_cd(**cd | more))
        ste = encode_ste(v=config is not None, config=config or 0, s1contextptr=small.BASE + at)
        self.smmu.memory.write(small.BASE + small.STES + 64 * sid, ste)
        self.invalidate()
        self.model.modes[sid] = mode

    def resumed(self, stall):
        self.told.append(stall)

    def access(self):
        rng = self.rng
        t = Held(rng.choice(SIDS), rng.choice(PAGES) + 8 * rng.randrange(8), rng.random() < 0.5)
        before = set(self.smmu.stalls)
        if rng.random() < 0.5:
            result = self.smmu.translate(t.sid, t.iova, write=t.write)
            action, event = result.action, result.event and result.event.number
            pa = result.pa
        else:
            row = self.smmu.translate_batch(
                t.sid, np.array([t.iova], np.uint64), write=t.write,
                columns=["pa", "action", "event"],
            )[0]  # fmt: skip
            action, event = ACTIONS[row["action"]], int(row["event"]) or None
            pa = int(row["pa"]) if action in ("ok", "bypass") else None
        self.model.arrive(t)
        new = [s for s in (*self.smmu.stalls, *self.told) if s not in before and s.iova == t.iova
               and s not in self.twins]  # fmt: skip
        if t in self.model.waiting or t in self.model.recorded or t in self.model.told:
            (stall,) = new
            self.twins[stall] = t
        else:
            assert new == []
        if t.done:
            assert (action, pa, event) == t.done
        else:
            assert action == "stall" and event == (t.fault if t in self.model.recorded else None)

    def resume(self):
        held = [s for s in self.smmu.stalls if s.recorded]
        if not held:
            return
        rng = self.rng
        stall = rng.choice(held)
        ac, ab = rng.getrandbits(1), rng.getrandbits(1)
        self.smmu.command("RESUME", StreamID=stall.sid, STAG=stall.stag, Ac=ac, Ab=ab)
        t = self.twins[stall]
        if ac:
            self.model.retry(t)
        else:
            self.model.kill(t, "abort" if ab else "raz_wi")
        self.model.flush()

    def step(self):
        rng, model, smmu = self.rng, self.model, self.smmu
        kind = rng.choice((
            "access", "access", "access", "access", "take", "resume", "resume", "term", "page",
            "mode", "mode", "mode", "enable", "error", "off", "restore",
        ))  # fmt: skip
        if kind == "access":
            self.access()
        elif kind == "take":
            count = rng.randint(0, model.used)
            cons = smmu.read("EVENTQ_CONS") & 0xFFFFF
            smmu.write("EVENTQ_CONS", (cons + count) % (2 << self.log2size))
            model.take(count)
        elif kind == "resume":
            self.resume()
        elif kind == "term":
            sid = rng.choice(SIDS)
            self.term(sid)
            model.term(sid)
        elif kind == "page":
            iova, page = rng.choice(PAGES), rng.choice((None, None, "ro", "rw"))
            model.pages[iova] = page
            self.leaf(iova, page)
            self.invalidate()
        elif kind == "mode":
            self.configure(rng.choice(SIDS), rng.choice(("stall", "stall", *MODES)))
        elif kind == "enable":
            model.enabled = rng.random() < 0.7
            smmu.write("CR0", 5 if model.enabled else 1)
            model.flush()
        elif kind == "error":  # software may make it active, too
            model.error = rng.random() < 0.4
            smmu.write("GERRORN", EVENTQ_ABT_ERR if model.error else 0)
            model.flush()
        elif kind == "off" and rng.random() < 0.3:
            enabled = EVENTQEN if model.enabled else 0
            smmu.write("CR0", enabled)
            model.term(None)
            assert smmu.translate(STALLS, PAGES[0]).action == "disabled"
            smmu.write("CR0", enabled | 1)
        elif kind == "restore" and rng.random() < 0.3:
            before = smmu.stalls
            self.smmu = Smmu.restore(
                smmu.save(), smmu.memory, on_interrupt=self.interrupt, on_resume=self.resumed
            )
            for old, new in zip(before, self.smmu.stalls, strict=True):
                self.twins[new] = self.twins.pop(old)

    def check(self):
        model, smmu = self.model, self.smmu
        assert [self.twins[s] for s in smmu.stalls] == model.order
        held = [s for s in smmu.stalls if s.recorded]
        assert {self.twins[s] for s in held} == set(model.recorded)
        assert [self.twins[s] for s in smmu.stalls if not s.recorded] == model.waiting
        assert len({s.stag for s in held}) == len(held)
        assert [self.twins[s] for s in self.told] == model.told
        for one, t in self.twins.items():
            assert one.done == (t.done is not None)
            assert one.fault.number in (t.fault, 0x10, 0x13)
            if one.done:
                result = one.result
                event = result.event and result.event.number
                assert (result.action, result.pa, event) == t.done
        prod = smmu.read("EVENTQ_PROD")
        assert (prod >> 31 != smmu.read("EVENTQ_CONS") >> 31) == model.overflow
        assert prod & 0xFFFFF == len(model.records) % (2 << self.log2size)
        for i in range(max(self.seen, len(model.records) - (1 << self.log2size)),
                       len(model.records)):  # fmt: skip
            data = smmu.memory.read(QUEUE + 32 * (i % (1 << self.log2size)), 32)
            event = Event(data)
            number, sid, iova, stalled = model.records[i]
            assert (event.number, event.sid, bool(event.stalled)) == (number, sid, stalled)
            assert number < 0x10 or event.iova == iova
        self.seen = len(model.records)


@pytest.mark.rule("S3.12.2.1-3", "S4.7.1-8", "S4.7.3-13")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_random_programs_lose_no_stall(seed, cached):
    pair = Pair(seed, cached)
    for _ in range(150):
        pair.step()
        pair.check()


def test_the_programs_meet_every_end_of_a_stall_that_waited():
    met = collections.Counter()
    for seed in range(150):
        pair = Pair(seed, cached=False)
        for _ in range(150):
            pair.step()
        met += pair.model.anew
    assert {
        ("stall", None), ("ok", None), ("bypass", None), ("abort", None), ("abort", 0x04),
        ("abort", 0x0A), ("abort", 0x10), ("raz_wi", 0x10), ("abort", 0x13),
    } <= set(met), met  # fmt: skip


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


def test_an_error_whose_interrupt_maps_the_page_leaves_nothing_to_record():
    smmu, interrupts = refusing(1)

    def interrupt(name):
        interrupts.append(name)
        smmu.memory.write_u64(LEAF, MAPPED)
        smmu.command("TLBI_NH_ALL")
        smmu.command("SYNC")
        smmu.write("GERRORN", smmu.gerror)

    smmu.on_interrupt = interrupt
    result = smmu.translate(STALLS, IOVA)
    assert result.action == "ok" and result.pa == 0x4000_7000
    assert interrupts == ["gerror"] and smmu.read("EVENTQ_PROD") == 0 and smmu.stalls == []


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
