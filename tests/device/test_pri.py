"""PRI: page requests, their queue, what answers them, and a device that makes them (IHI 0070 8)."""

import runpy

import pytest
import small
from atssystems import BOTH, QUEUE, full, rights, small_system
from project import ROOT

from smmufast import Caches, Event, PageAnswer, Smmu, layout
from smmufast.ats import AtsDevice
from smmufast.faults import AtsFault

COMMANDS = QUEUE + 0x8000
SUCCESS, INVALID, FAILURE = 2, 1, 0
FIXED = 0x4ABC_D000  # where the host maps what is asked for


def system(log2size=2, cr0=BOTH, **registers):
    """The small system with a page request queue and a command queue."""
    registers.setdefault("priq_base", QUEUE | log2size)
    return small_system(cmdq_base=COMMANDS | 4, cr0=cr0, **registers)


class Host:
    """Software that serves the page request queue as Linux does: in order, by group."""

    def __init__(self, smmu, code=SUCCESS):
        self.smmu = smmu
        self.code = code
        self.served = []
        self.maps = True

    def __call__(self, asked=None):
        smmu = self.smmu
        base, lg2 = smmu.priq_base & ~0x1F, smmu.priq_base & 0x1F
        prod = smmu.read("PRIQ_PROD")
        cons = smmu.read("PRIQ_CONS")
        while cons & 0x7FFF_FFFF != prod & 0x7FFF_FFFF:
            at = base + 16 * (cons & ((1 << lg2) - 1))
            record = layout.unpack("PRI", smmu.memory.read(at, 16))
            self.served.append(record)
            cons = cons & 1 << 31 | (cons + 1) & ((2 << lg2) - 1)
            smmu.write("PRIQ_CONS", cons)
            if record["R"] or record["W"]:
                self.answer(record)
        if (cons ^ prod) >> 31:
            smmu.write("PRIQ_CONS", cons ^ 1 << 31)

    def answer(self, record):
        if self.maps:
            at = small.BASE + small.LEVEL3 + 8 * (record["Address"] >> 12 & 0x1FF)
            self.smmu.memory.write_u64(at, FIXED | 1 << 10 | 1 << 6 | 3)
        if record["Last"]:
            self.smmu.command(
                "PRI_RESP", StreamID=record["StreamID"], SSV=record["SSV"],
                SubstreamID=record["SubstreamID"], PRGIndex=record["PRGIndex"], Resp=self.code,
            )  # fmt: skip
            self.smmu.sync()


# --- the queue ---


@pytest.mark.rule("S8-1")
def test_a_page_request_lies_in_the_queue_as_linux_reads_it():
    smmu = system()
    answer = smmu.page_request(
        0x42, 0x1234_5678_9000, ssid=0xABCDE, read=True, write=True, execute=True, priv=True,
        prg_index=0x155,
    )  # fmt: skip
    assert answer == PageAnswer("queued", None)
    word = int.from_bytes(smmu.memory.read(QUEUE, 16), "little")
    assert word & 0xFFFF_FFFF == 0x42
    assert word >> 32 & 0xFFFFF == 0xABCDE
    assert [word >> bit & 1 for bit in range(58, 64)] == [1, 1, 1, 1, 1, 1]
    assert word >> 64 & 0x1FF == 0x155
    assert word >> 76 << 12 == 0x1234_5678_9000
    assert smmu.read("PRIQ_PROD") == 1
    smmu.page_request(0x42, 0x1000, read=True, execute=True, priv=True, last=False)
    word = int.from_bytes(smmu.memory.read(QUEUE + 16, 16), "little")
    # without a PASID: no Priv, no X
    assert [word >> bit & 1 for bit in range(58, 64)] == [0, 0, 1, 0, 0, 0]


@pytest.mark.rule("S6.3.9.5-1", "S6.3.9.6-5", "S8.2-3")
@pytest.mark.parametrize("smmuen", [0, 1])
@pytest.mark.parametrize("priqen", [0, 1])
def test_a_queue_that_is_not_enabled_fails_requests(smmuen, priqen):
    smmu = system(cr0=BOTH & ~3 | smmuen | priqen << 1)
    on = smmuen and priqen
    for last in (False, True):
        answer = smmu.page_request(1, 0x1000, read=True, last=last)
        assert answer.action == ("queued" if on else "failure")
    assert smmu.page_request(1, 0, ssid=5).action == ("queued" if on else "dropped")
    assert smmu.read("PRIQ_PROD") == (3 if on else 0)


@pytest.mark.rule("S8.1-2", "S8.1-3")
def test_an_overflow_is_answered_until_it_is_acknowledged():
    smmu = system(log2size=1, features=full(pps=1))
    for group in (1, 2):
        assert smmu.page_request(1, 0x1000, ssid=3, read=True, prg_index=group).action == "queued"
    assert smmu.page_request(1, 0x2000, ssid=3, read=True) == ("success", 3)
    assert smmu.page_request(1, 0x2000, ssid=3, read=True, last=False) == ("dropped", None)
    assert smmu.page_request(1, 0, ssid=3) == ("dropped", None)
    assert smmu.read("PRIQ_PROD") == 2 | 1 << 31
    before = smmu.memory.read(QUEUE, 32)
    smmu.write("PRIQ_CONS", 2)  # room, but no acknowledgement
    assert smmu.page_request(1, 0x2000, read=True) == ("success", None)
    assert smmu.memory.read(QUEUE, 32) == before
    assert smmu.read("PRIQ_PROD") == 2 | 1 << 31
    smmu.write("PRIQ_CONS", 2 | 1 << 31)
    assert smmu.page_request(1, 0x2000, read=True).action == "queued"
    assert smmu.read("PRIQ_PROD") == 3 | 1 << 31


@pytest.mark.rule("S5.2-29", "S6.3.4-14", "S8.1-6")
@pytest.mark.parametrize(("pps", "ppar", "carries"),
                         [(0, 0, False), (0, 1, True), (1, 0, True), (1, 1, True)])  # fmt: skip
def test_pps_and_ppar_say_whether_an_automatic_answer_has_the_pasid(pps, ppar, carries):
    smmu = system(log2size=0, features=full(pps=pps))
    at = small.BASE + small.STES + 64 * small.SUBSTREAMS + 10
    smmu.memory.write(at, bytes([smmu.memory.read(at, 1)[0] | ppar << 2]))
    assert smmu.page_request(small.SUBSTREAMS, 0, ssid=3, read=True).action == "queued"
    answer = smmu.page_request(small.SUBSTREAMS, 0, ssid=3, read=True)
    assert answer == ("success", 3 if carries else None)


@pytest.mark.rule("S8.1-7")
def test_without_a_usable_ste_the_automatic_answer_is_a_failure():
    smmu = system(log2size=0, features=full(pps=0))
    smmu.page_request(small.STAGE1, 0, read=True)
    for sid in (small.INVALID, small.BEYOND_TABLE, small.BEYOND_MEMORY):
        assert smmu.page_request(sid, 0, ssid=3, read=True).action == "failure"
    assert smmu.page_request(small.STAGE2, 0, ssid=3, read=True).action == "success"
    at = small.BASE + small.STES + 64 * small.STAGE2 + 16
    smmu.memory.write_u64(at, smmu.memory.read_u64(at) & ~(1 << 51))  # S2AA64
    assert smmu.page_request(small.STAGE2, 0, ssid=3, read=True).action == "failure"


@pytest.mark.parametrize("ppar", [0, 1])
def test_an_ste_that_aborts_says_whether_the_answer_has_the_pasid(ppar):
    smmu = system(log2size=0, features=full(pps=0))
    at = small.BASE + small.STES + 64 * small.ABORTED + 10
    smmu.memory.write(at, bytes([smmu.memory.read(at, 1)[0] | ppar << 2]))
    smmu.page_request(small.ABORTED, 0, read=True)
    answer = smmu.page_request(small.ABORTED, 0, ssid=3, read=True)
    assert answer == ("success", 3 if ppar else None)


def test_ppar_is_that_of_memory_whatever_a_cache_holds():
    plain = system(log2size=0, features=full(pps=0))
    smmu = Smmu(
        plain.memory, plain.features, caches=Caches.small(), strtab_base=plain.strtab_base,
        strtab_base_cfg=plain.strtab_base_cfg, priq_base=plain.priq_base, cr0=plain.cr0,
    )  # fmt: skip
    assert smmu.translate(small.SUBSTREAMS, small.RW, ssid=3)
    assert len(smmu.caches.ste) == 1
    at = small.BASE + small.STES + 64 * small.SUBSTREAMS + 10
    smmu.memory.write(at, bytes([smmu.memory.read(at, 1)[0] | 1 << 2]))
    smmu.page_request(small.SUBSTREAMS, 0, read=True)
    assert smmu.page_request(small.SUBSTREAMS, 0, ssid=3, read=True) == ("success", 3)


LOOKUPS = {
    "V=0": (small.INVALID, 0x04), "fetch aborts": (small.BEYOND_MEMORY, 0x03),
    "out of range": (small.BEYOND_TABLE, 0x02), "illegal": (small.STAGE2, 0x04),
    "legal": (small.STAGE1, None), "aborts": (small.ABORTED, None),
}  # fmt: skip


@pytest.mark.rule("S8.1-8")
@pytest.mark.parametrize("pps", [0, 1])
@pytest.mark.parametrize("cr2", [0, 2, 8, 8 | 2])
@pytest.mark.parametrize("what", LOOKUPS)
def test_errors_of_looking_ppar_up_are_recorded_if_asked(what, cr2, pps):
    sid, number = LOOKUPS[what]
    smmu = system(log2size=0, features=full(pps=pps), cr2=cr2, eventq_base=QUEUE + 0x4000 | 3)
    if what == "illegal":
        at = small.BASE + small.STES + 64 * sid + 16
        smmu.memory.write_u64(at, smmu.memory.read_u64(at) & ~(1 << 51))  # S2AA64
    smmu.page_request(small.STAGE1, 0, read=True)
    assert smmu.page_request(sid, 0x1000, ssid=5, read=True, last=False).action == "dropped"
    assert smmu.page_request(sid, 0x1000, ssid=5).action == "dropped"  # a stop marker
    assert smmu.page_request(sid, 0x1000, read=True) == ("success", None)
    assert smmu.read("EVENTQ_PROD") == 0  # nothing was looked up
    answer = smmu.page_request(sid, 0x1000, ssid=5, read=True)
    if pps:
        assert answer == ("success", 5) and smmu.read("EVENTQ_PROD") == 0
        return
    assert answer == (("success", None) if number is None else ("failure", None))
    recorded = number is not None and cr2 & 8 and (number != 0x02 or cr2 & 2)
    assert smmu.read("EVENTQ_PROD") == bool(recorded)
    if recorded:
        event = Event(smmu.memory.read(QUEUE + 0x4000, 32))
        assert (event.number, event.sid, event.ssid) == (number, sid, 5)


def test_an_injected_error_at_the_ste_of_ppar_is_an_event_and_a_failure():
    smmu = system(log2size=0, features=full(pps=0), cr2=8, eventq_base=QUEUE + 0x4000 | 3)
    smmu.page_request(small.STAGE1, 0, read=True)
    smmu.memory.inject_error(kind="STE", count=1)
    assert smmu.page_request(small.STAGE1, 0, ssid=5, read=True) == ("failure", None)
    assert smmu.memory.read(QUEUE + 0x4000, 1) == b"\x03"
    assert smmu.page_request(small.STAGE1, 0, ssid=5, read=True) == ("success", None)
    assert smmu.read("EVENTQ_PROD") == 1


@pytest.mark.rule("S8-2", "S8.1-9")
def test_without_substreams_no_message_has_a_pasid():
    smmu = system(log2size=0, features=full(ssidsize=0, pps=0, pasidtt=0))
    answer = smmu.page_request(1, 0x1000, ssid=5, read=True, execute=True, priv=True)
    assert answer.action == "queued"
    word = int.from_bytes(smmu.memory.read(QUEUE, 8), "little")
    assert word == 1 | 1 << 60 | 1 << 62  # StreamID, R, Last
    assert smmu.page_request(1, 0x1000, ssid=5, read=True) == ("success", None)
    # and no message is a stop marker
    assert smmu.page_request(1, 0x1000, ssid=5) == ("success", None)


@pytest.mark.rule("S8.2-1", "S8.2-2", "S16.7.4-6")
def test_a_queue_without_memory_ends_in_priq_abt_err():
    smmu = small_system(priq_base=0xA000_0000 | 2, cr0=BOTH)
    assert smmu.page_request(1, 0x1000, read=True).action == "failure"
    assert layout.unpack("GERROR", smmu.gerror ^ smmu.gerrorn)["PRIQ_ABT_ERR"] == 1
    smmu.memory.add_private(0xA000_0000, 0x1000)
    assert smmu.page_request(1, 0x1000, read=True).action == "failure"
    assert smmu.page_request(1, 0, ssid=1).action == "dropped"
    smmu.write("GERRORN", smmu.gerror)
    assert smmu.page_request(1, 0x1000, read=True).action == "queued"


@pytest.mark.rule("S6.3.36-3")
def test_the_interrupt_of_a_last_request_follows_its_entry():
    smmu = system(priq_base=0xA000_0000 | 2)
    smmu.write("PRIQ_IRQ_CFG2", 1 << 31)
    smmu.write("IRQ_CTRL", 0b11)
    told = []
    smmu.on_interrupt = lambda name: told.append((name, smmu.read("PRIQ_PROD")))
    lasts = [True, False, True]  # of requests within the write of another

    def write(address, data):
        while lasts:
            last = lasts.pop()
            assert smmu.page_request(1, 0x2000, read=True, last=last).action == "queued"
            assert smmu.read("PRIQ_PROD") == 0 and told == []
        return True

    smmu.memory.add_callback(0xA000_0000, 64, lambda a, n: bytes(n), write)
    assert smmu.page_request(1, 0x1000, read=True, last=False).action == "queued"
    assert told == [("priq", 4)]  # one for all of them


def test_a_last_request_behind_one_that_aborted_does_not_interrupt():
    smmu = system(priq_base=0xA000_0000 | 2)
    smmu.write("PRIQ_IRQ_CFG2", 1 << 31)
    smmu.write("IRQ_CTRL", 0b11)
    told = []
    smmu.on_interrupt = told.append
    depth = []

    def write(address, data):
        depth.append(1)
        if len(depth) == 1:
            smmu.page_request(1, 0x2000, read=True, last=True)
            return None
        return True

    smmu.memory.add_callback(0xA000_0000, 64, lambda a, n: bytes(n), write)
    assert smmu.page_request(1, 0x1000, read=True, last=True).action == "failure"
    assert smmu.read("PRIQ_PROD") == 0 and told == ["gerror"]


# --- a device that asks ---


@pytest.mark.rule("S3.9.1-10")
def test_a_device_gets_its_page_once_software_has_mapped_it():
    smmu = system()
    host = Host(smmu)
    device = AtsDevice(smmu, small.SUBSTREAMS, on_page_request=host)
    result = device.access(small.UNMAPPED + 0x123, ssid=2, write=True, priv=True)
    assert result.pa == FIXED + 0x123
    (record,) = host.served
    assert {name: record[name] for name in ("R", "W", "X", "Priv", "Last", "SSV")} == {
        "R": 0, "W": 1, "X": 0, "Priv": 1, "Last": 1, "SSV": 1,
    }  # fmt: skip
    assert (record["StreamID"], record["SubstreamID"]) == (small.SUBSTREAMS, 2)
    assert record["Address"] == small.UNMAPPED
    assert (device.requests, device.page_requests, device.outstanding) == (2, 1, [])
    device.access(small.UNMAPPED, ssid=2, priv=True)
    assert (device.hits, len(host.served)) == (1, 1)


def test_a_read_asks_to_read_and_no_pasid_is_none():
    smmu = system()
    host = Host(smmu)
    device = AtsDevice(smmu, small.STAGE1, on_page_request=host)
    assert device.access(small.UNMAPPED, priv=True).pa == FIXED
    (record,) = host.served
    assert (record["R"], record["W"], record["SSV"], record["Priv"]) == (1, 0, 0, 0)


def test_groups_have_indices_of_their_own():
    smmu = system(log2size=10)
    host = Host(smmu)
    device = AtsDevice(smmu, small.STAGE1, on_page_request=host, credits=512)
    asked = [device.request_page(page << 12) for page in range(512)]
    assert sorted(one.prg_index for one in asked) == list(range(512))
    with pytest.raises(BufferError, match="512 outstanding"):
        device.request_page(0)
    assert device.outstanding == asked and not host.served
    host.maps = False
    host()
    assert device.outstanding == [] and {one.answer for one in asked} == {"success"}
    assert repr(asked[3]) == "<PageRequest sid=0x1 address=0x3000 r prg=3 success>"


@pytest.mark.rule("S3.9.1-11")
def test_credits_limit_what_is_outstanding():
    smmu = system()
    seen = []
    device = AtsDevice(smmu, small.STAGE1, on_page_request=seen.append, credits=1)
    for _ in range(2):
        with pytest.raises(AtsFault):
            device.access(small.UNMAPPED)
    assert len(seen) == 1 and device.outstanding == seen and device.page_requests == 1
    assert smmu.read("PRIQ_PROD") == 1
    Host(smmu)()
    assert seen[0].answer == "success" and device.outstanding == []
    assert device.access(small.UNMAPPED).pa == FIXED


@pytest.mark.rule("S8.3-1")
@pytest.mark.parametrize("code", [SUCCESS, INVALID, FAILURE])
def test_answers_that_help_not(code):
    smmu = system()
    host = Host(smmu, code)
    host.maps = False
    device = AtsDevice(smmu, small.STAGE1, on_page_request=host)
    for _ in range(2):
        assert rights(device.translate(small.UNMAPPED)) == ""
    # after a failure the device asks no more
    assert len(host.served) == (1 if code == FAILURE else 2)
    assert device.pri_enabled == (code != FAILURE)
    assert device.requests == (4 if code == SUCCESS else 2)
    device.pri_enabled = True
    host.code, host.maps = SUCCESS, True
    assert device.access(small.UNMAPPED).pa == FIXED


def test_page_requests_are_for_missing_permissions_alone():
    smmu = system()
    host = Host(smmu)
    for sid in (small.BYPASSED, small.INVALID, small.ABORTED):
        device = AtsDevice(smmu, sid, on_page_request=host)
        assert device.translate(0).status != "success"
    assert host.served == []
    device = AtsDevice(smmu, small.STAGE1, on_page_request=host)
    assert device.access(small.RO, write=True).pa == FIXED  # read-only until it is asked for
    assert len(host.served) == 1


def test_an_automatic_answer_is_an_answer():
    smmu = system(log2size=0, features=full(pps=1))
    smmu.page_request(7, 0, read=True)
    called = []
    device = AtsDevice(smmu, small.SUBSTREAMS, on_page_request=called.append)
    assert rights(device.translate(small.UNMAPPED, ssid=1)) == ""
    assert called == [] and device.outstanding == []
    assert (device.page_requests, device.requests) == (1, 2)  # a success: it asks again
    smmu.write("CR0", BOTH & ~2)
    device.translate(small.UNMAPPED, ssid=1)
    assert not device.pri_enabled and called == []


def test_responses_reach_the_request_that_they_name():
    smmu = system()
    device = AtsDevice(smmu, small.SUBSTREAMS, on_page_request=lambda asked: None)
    first = device.request_page(0x1000, ssid=1)
    second = device.request_page(0x2000, ssid=2)

    def respond(**fields):
        smmu.command("PRI_RESP", StreamID=small.SUBSTREAMS, Resp=SUCCESS, **fields)

    respond(PRGIndex=300)
    respond(PRGIndex=first.prg_index, SSV=1, SubstreamID=2)  # of another PASID
    assert (first.answer, second.answer) == (None, None)
    assert repr(first).endswith("outstanding>")
    respond(PRGIndex=second.prg_index, SSV=1, SubstreamID=2)
    assert (first.answer, second.answer) == (None, "success")
    respond(PRGIndex=first.prg_index)
    respond(PRGIndex=first.prg_index)
    assert first.answer == "success" and device.outstanding == []
    smmu.command("PRI_RESP", StreamID=9, Resp=SUCCESS)  # no such device
    smmu.sync()


def test_a_stop_marker_follows_the_last_request_of_a_pasid():
    smmu = system()
    host = Host(smmu)
    device = AtsDevice(smmu, small.SUBSTREAMS, on_page_request=host)
    device.access(small.RW, ssid=1)
    device.access(small.RW, ssid=2)
    device.stop(1)
    assert len(device) == 1
    host()
    (record,) = host.served
    assert (record["Last"], record["W"], record["R"], record["SSV"]) == (1, 0, 0, 1)
    assert record["SubstreamID"] == 1


def test_software_that_raises_leaves_the_request_outstanding():
    smmu = system()

    def broken(asked):
        raise OSError("no page")

    device = AtsDevice(smmu, small.STAGE1, on_page_request=broken)
    with pytest.raises(OSError, match="no page"):
        device.access(small.UNMAPPED)
    (asked,) = device.outstanding
    assert asked.answer is None
    Host(smmu)()
    assert asked.answer == "success"


def test_an_interrupt_may_serve_the_queue():
    smmu = system()
    host = Host(smmu)
    smmu.write("IRQ_CTRL", 0b111)
    smmu.on_interrupt = lambda name: host() if name == "priq" else None
    seen = []
    device = AtsDevice(smmu, small.STAGE1, on_page_request=seen.append)
    assert device.access(small.UNMAPPED).pa == FIXED
    assert len(host.served) == 1 and seen == []  # answered before anybody had to wait


def test_the_example_does_what_it_says(capsys):
    runpy.run_path(str(ROOT / "examples" / "ats_device.py"))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "write at 0x1000 goes to 0x50003000"
    assert said[3] == "write at 0x2000 goes to 0x50008000"
    assert said[5].startswith("2 hits, 2 misses, 3 requests")
    assert said[-1] == "read at 0x1000 comes from 0x50009000"
