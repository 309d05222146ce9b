"""ATS: translation requests, Translated transactions and a device's ATC against an obvious twin.

The twin follows IHI 0070 3.9.1 and 13.7 over the stages of reference.py: what an answer grants is
found by trying every kind of access on a copy of memory.
"""

import random
from types import SimpleNamespace

import nested
import ptwriter
import pytest
import reference
import small
import tablegen
import twin
from rawfeatures import raw_of
from reference import CLASS_IN, NSH, bits

from smmufast import Features, Memory, Smmu, layout
from smmufast._tlb import Caches
from smmufast.ats import AtsDevice
from smmufast.faults import AtsFault, AtsResponse

ATSCHK, REC_CFG_ATS, RECINVSID = 1 << 4, 1 << 3, 1 << 1
NOTHING = (False, False, False)


# ------------------------------------------------------------------------------------------------
# The twin


class Overlay:
    """Memory as it would be after some writes of 8 bytes."""

    def __init__(self, memory):
        self.memory = memory
        self.written = {}

    def read(self, address, size):
        data = self.memory.read(address, size)
        if data is None:
            return None
        data = bytearray(data)
        for at, word in self.written.items():
            if address <= at < address + size:
                data[at - address : at - address + 8] = word
        return bytes(data)

    def write(self, address, data):
        self.written[address] = data


def fetcher(memory):
    return reference.Fetcher(memory.read, memory.write, reference.ContextCache())


def effective_eats(features, regs, ste):
    """STE.EATS as it counts: 0b00, 0b01 or 0b10 (5.2)."""
    if bits(ste, 3, 1) & 0b011 == 0:
        return 0
    eats = bits(ste, 93, 92)
    if eats == 0b10 and not bits(regs.cr0, 4, 4):
        return 0
    return eats if eats in (0b01, 0b10) else 0


def configuration_record(features, regs, error, sid, ssid):
    """The record of a configuration error of ATS: CR2.REC_CFG_ATS asks for it."""
    wanted = bits(regs.cr2, 3, 3) and features.atsrecerr and bits(regs.cr0, 2, 2)
    if error.name == "C_BAD_STREAMID" and not bits(regs.cr2, 1, 1):
        wanted = False
    if not wanted:
        return None
    return reference.event_record(error.name, sid, ssid, fetch_address=error.fetch_address)


def bad_request_record(regs, sid, iova, ssid, no_write, execute, priv):
    """F_BAD_ATS_TREQ (7.3.6)."""
    if not bits(regs.cr0, 2, 2):
        return None
    record = 0x05 | sid << 32 | (iova >> 12) << 140
    if ssid is not None:
        record |= 1 << 11 | ssid << 12
    record |= priv << 92 | execute << 93 | (not no_write) << 94 | 1 << 95
    return record.to_bytes(32, "little")


def attempt(memory, features, stream, iova, split, write=False, priv=False, instr=False):
    """One access: (what it found or None, the fault or None).

    What it found: pa, page_lg2, attr, sh.  With `split` stage 1 is the only stage.
    """
    priv, instr = stream.overridden(write, priv, instr)
    while True:
        fetch = fetcher(memory)
        try:
            if not split:
                outcome, fault = reference.translate_address(
                    fetch, features, stream, iova, write, priv, instr
                )
                return None if fault else outcome, fault
            page, region = reference.stage1_access(fetch, stream, iova, write, priv, instr)
        except reference.TranslationError as fault:
            return None, fault
        except reference.DescriptorChangedError:
            continue
        kind = stream.context.memory[bits(page.descriptor, 4, 2)]
        sh = region.sh if region.ds else bits(page.descriptor, 9, 8)
        return SimpleNamespace(
            pa=page.pa, page_lg2=page.shift, attr=reference.memory_to_mair(kind),
            sh=reference.consistent_sh(kind, sh),
        ), None  # fmt: skip


def answer(status, *, found=None, size=0, granted=NOTHING, ipa=False, fault=None, record=None):
    """What is compared of an answer."""
    address = None if found is None else found.pa & -size
    kind = None if found is None else (found.attr, found.sh)
    return status, address, size, granted, ipa, kind, fault, record


def expected_request(
    memory, features, regs, sid, iova, ssid=None, no_write=False, execute=False, priv=False,
    stu=4096,
):  # fmt: skip
    """The answer to a translation request, which updates memory."""
    if ssid is None:
        execute = priv = False
    refused = bad_request_record(regs, sid, iova, ssid, no_write, execute, priv)
    if not features.ats:
        return answer("UR")
    if not bits(regs.cr0, 0, 0):
        return answer("UR", fault="F_BAD_ATS_TREQ", record=refused)
    effective = reference.effective_features(features)
    fetch = fetcher(memory)
    try:
        ste = reference.find_ste(fetch, effective, regs, sid)
        reference.check_ste(effective, ste)
        eats = effective_eats(features, regs, ste)
        if not eats:
            return answer("UR", fault="F_BAD_ATS_TREQ", record=refused)
        stream = reference.configure(fetch, effective, regs, sid, ssid)
    except reference.ConfigurationError as error:
        if error.name is None:
            return answer("UR")
        record = configuration_record(features, regs, error, sid, ssid)
        return answer("CA", fault=error.name, record=record)

    def failed(fault):
        if fault.name != "F_WALK_EABT":
            return answer("success", size=stu, fault=fault.name)
        seen_priv, _ = stream.overridden(False, priv, False)
        seen_instr = stream.overridden(False, priv, False)[1]
        record = None
        if bits(regs.cr2, 3, 3) and features.atsrecerr and bits(regs.cr0, 2, 2):
            record = reference.event_record(
                fault.name, sid, ssid, write=False, priv=seen_priv, instr=seen_instr, iova=iova,
                event_class=fault.event_class, stage2=fault.stage2,
                fetch_address=fault.fetch_address,
            )  # fmt: skip
        return answer("CA", fault=fault.name, record=record)

    if stream.cd_fault is not None:
        return failed(stream.cd_fault)
    split = eats == 0b10
    if stream.context is None and (split or stream.stage2 is None):
        if iova >> effective.oas_bits:
            return answer("success", size=stu, fault="F_ADDR_SIZE")
        kind = SimpleNamespace(
            pa=iova, attr=reference.memory_to_mair(stream.entering),
            sh=reference.consistent_sh(stream.entering, stream.entering_sh),
        )  # fmt: skip
        return answer(
            "success", found=kind, size=stu, granted=(True, not no_write, execute), ipa=split
        )

    def tried(memory, **access):
        return attempt(memory, effective, stream, iova, split, priv=priv, **access)

    # A read; what it updates is updated.
    read, fault = tried(memory)
    denied = fault is not None and (fault.name, fault.event_class) == ("F_PERMISSION", CLASS_IN)
    if fault is not None and not denied:
        return failed(fault)
    if denied and not fault.stage2 and not no_write and stream.stage2 is not None and not split:
        # stage 1 may grant a write alone: then stage 2 is asked
        page, fault = attempt(Overlay(memory), effective, stream, iova, True, True, priv)
        if page is not None:
            seen_priv, seen_instr = stream.overridden(False, priv, False)
            try:
                reference.stage2_access(
                    fetcher(memory), stream.stage2, page.pa, CLASS_IN, False, seen_priv, seen_instr
                )
            except reference.TranslationError as fault:
                if fault.name != "F_PERMISSION":
                    return failed(fault)
    written = executed = None
    if not no_write and tried(Overlay(memory), write=True)[0] is not None:
        written, _ = tried(memory, write=True)
    if execute and read is not None:
        executed, _ = tried(Overlay(memory), instr=True)
    found = written or read
    if found is None:
        return answer("success", size=stu)
    granted = (read is not None, written is not None, executed is not None)
    return answer("success", found=found, size=1 << found.page_lg2, granted=granted, ipa=split)


def expected_translated(memory, features, regs, sid, address, ssid=None, write=False):
    """What becomes of a Translated transaction: (action, pa, fault, record, (attr, sh))."""
    if not features.pasidtt:
        ssid = None
    effective = reference.effective_features(features)
    events = bits(regs.cr0, 2, 2)

    def passed():
        if address >> effective.oas_bits:
            return "abort", None, None, None, None
        return "bypass", address, None, None, (0xFF, NSH)

    def forbidden():
        record = 0x07 | sid << 32 | (not write) << 99 | address << 128
        return (
            "abort", None, "F_TRANSL_FORBIDDEN", record.to_bytes(32, "little") if events else None,
            None,
        )  # fmt: skip

    if not features.ats:
        return "abort", None, None, None, None
    if not bits(regs.cr0, 0, 0):
        return forbidden()
    if not bits(regs.cr0, 4, 4):
        return passed()
    try:
        ste = reference.find_ste(fetcher(memory), effective, regs, sid)
        reference.check_ste(effective, ste)
        eats = effective_eats(features, regs, ste)
        if not eats:
            return forbidden()
        if ssid is not None:
            reference.choose_substream(effective, ste, ssid)
    except reference.ConfigurationError as error:
        record = None
        if error.name is not None:
            record = configuration_record(features, regs, error, sid, ssid)
        return "abort", None, error.name, record, None
    if eats == 0b01:
        return passed()
    entering, sh = reference.input_attributes(False, 0, 0, 0, 0)
    stream = reference.Stream(
        privcfg=0, instcfg=0, entering=entering, entering_sh=sh, vmid=0,
        stage2=reference.decode_stage2(effective, ste),
    )  # fmt: skip
    while True:
        try:
            outcome, fault = reference.translate_address(
                fetcher(memory), effective, stream, address, write, False, False
            )
            break
        except reference.DescriptorChangedError:
            continue
    if fault is None:
        return outcome.action, outcome.pa, None, None, (outcome.attr, outcome.sh)
    action, recorded = reference.fault_action(stream, fault)
    record = None
    if recorded and events:
        aborted = fault.name == "F_WALK_EABT"
        record = reference.event_record(
            fault.name, sid, ssid, write=write, iova=address, event_class=fault.event_class,
            stage2=fault.stage2, fetch_address=fault.fetch_address,
            ipa=0 if aborted else reference.in_place(fault.ipa, effective.oas_bits - 1, 12),
        )  # fmt: skip
    return action, None, fault.name, record, None


# --- the library in the same form ---


def request_row(response):
    kind = None if response.address is None else (response.attr, response.shareability)
    return (
        response.status, response.address, response.size,
        (response.read, response.write, response.execute), response.ipa, kind,
        response.fault and response.fault.name, response.event and response.event.record,
    )  # fmt: skip


def translated_row(result):
    return (
        result.action, result.pa, result.fault and result.fault.name,
        result.event and result.event.record,
        (result.attr, result.shareability) if result else None,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Random systems


def ats_system(seed):
    """A random system whose SMMU has ATS, and whose streams mostly may use it."""
    rng = random.Random(seed)
    makes = (
        tablegen.random_system, tablegen.random_nested_system, tablegen.random_nested_system,
        tablegen.random_nested_bytes_system if seed % 8 == 3 else tablegen.random_nested_system,
    )  # fmt: skip
    system = makes[seed % 4](rng)
    features, regs = system.features, system.regs
    features.ats = int(rng.random() < 0.97)
    features.ns1ats = int(rng.random() < 0.05)
    features.atsrecerr = int(rng.random() < 0.8)
    features.pasidtt = int(rng.random() < 0.7)
    regs.cr0 |= ATSCHK * (rng.random() < 0.8)
    regs.cr2 |= REC_CFG_ATS * (rng.random() < 0.6)
    requests = system.requests(60)
    effective = reference.effective_features(features)
    for sid in sorted({request.sid for request in requests}):
        fetch = reference.Fetcher(system.read, None, None)
        try:
            reference.find_ste(fetch, effective, regs, sid)
        except reference.ConfigurationError:
            continue
        if rng.random() < 0.1:
            continue
        # Full ATS, or with both stages split-stage ATS; stage 2 does not stall.
        _, _, address, _, data = fetch.fetches[-1]
        ste = int.from_bytes(data, "little")
        config = bits(ste, 3, 1)
        eats = rng.choice((1, 2)) if config == 0b111 and not features.ns1ats else 1
        ste = ste & ~(3 << 92) | eats << 92
        if config & 0b010 and features.stall_model != 2:
            ste &= ~(1 << 185)
        system.memory.write(address, ste.to_bytes(64, "little"))
    return rng, system, requests


def smmu_over(system, memory, caches=None):
    """A Smmu over other memory of a random system."""
    real = Memory()
    for base, data in memory.regions():
        real.add(data, base)
    features = raw_of(system.features)
    return Smmu(real, features, caches=caches, **vars(system.regs))


def caches_of(seed):
    return Caches.small(nested=("combined", "split")[seed % 2])


def check_translation(system, smmu, request):
    """An ordinary access: what a request left in the caches serves it too."""
    outcome = reference.translate(
        system.read, system.features, system.regs, store=system.memory.write, **request._asdict()
    )
    call = request._asdict()
    result = smmu.translate(call.pop("sid"), call.pop("iova"), **call)
    assert twin.result_row(result) == twin.expected_row(outcome), request


def check_requests(seed, cached=False):
    """Compare the requests of one random system; what kinds of answers there were."""
    rng, system, requests = ats_system(seed)
    mine = system.memory.copy()
    caches = caches_of(seed // 4) if cached else None
    smmu = smmu_over(system, mine, caches)
    seen = set()
    for request in requests:
        if cached:
            caches.invalidate_all()
            if rng.random() < 0.3:
                check_translation(system, smmu, request)
        asked = {
            "ssid": request.ssid, "priv": request.priv, "execute": rng.random() < 0.5,
            "no_write": rng.random() < 0.4, "stu": 4096 << rng.choice((0, 0, 0, 4)),
        }  # fmt: skip
        for _ in range(2 if cached else 1):
            wanted = expected_request(
                system.memory, system.features, system.regs, request.sid, request.iova, **asked
            )
            response = smmu.ats_request(request.sid, request.iova, **asked)
            assert request_row(response) == wanted, (seed, request, asked)
            assert response.priv == (
                response.status == "success" and request.priv and request.ssid is not None
            )
            assert mine.regions() == system.memory.regions(), (seed, request, asked)
        seen.add((wanted[0], wanted[3], wanted[6], wanted[7] is not None))
        if cached:
            check_translation(system, smmu, request)
            assert mine.regions() == system.memory.regions(), (seed, request, asked)
    return seen


def check_translated(seed, cached=False):
    """Compare Translated transactions in one random system; how they ended."""
    rng, system, requests = ats_system(seed)
    mine = system.memory.copy()
    caches = caches_of(seed // 4) if cached else None
    smmu = smmu_over(system, mine, caches)
    seen = set()
    for request in requests:
        ssid = request.ssid if rng.random() < 0.6 else None
        # what a device would send, mostly: an address that it was given
        found = expected_request(
            Overlay(system.memory), system.features, system.regs, request.sid, request.iova, ssid
        )
        address = request.iova if found[1] is None or rng.random() < 0.2 else found[1]
        address ^= rng.getrandbits(11)
        for _ in range(2 if cached else 1):
            wanted = expected_translated(
                system.memory, system.features, system.regs, request.sid, address, ssid,
                request.write,
            )  # fmt: skip
            result = smmu.ats_translated(request.sid, address, ssid=ssid, write=request.write)
            assert translated_row(result) == wanted, (seed, request, ssid, hex(address))
            assert mine.regions() == system.memory.regions(), (seed, request)
        seen.add((wanted[0], wanted[2], wanted[3] is not None))
        if cached:
            caches.invalidate_all()
    return seen


CACHED = pytest.mark.parametrize("cached", [False, True], ids=["without caches", "with caches"])


@CACHED
@pytest.mark.parametrize("seed", range(48))
def test_requests_are_answered_as_the_twin_answers(seed, cached):
    assert check_requests(seed, cached)


@CACHED
@pytest.mark.parametrize("seed", range(48, 80))
def test_translated_transactions_end_as_the_twin_says(seed, cached):
    assert check_translated(seed, cached)


def test_random_systems_reach_every_row():
    seen = set().union(*map(check_requests, range(48)))
    answers = {(status, fault) for status, _, fault, _ in seen}
    for name in ("C_BAD_STREAMID", "C_BAD_STE", "C_BAD_SUBSTREAMID", "F_STREAM_DISABLED",
                 "C_BAD_CD", "F_WALK_EABT"):  # fmt: skip
        assert ("CA", name) in answers
    for name in ("F_TRANSLATION", "F_ADDR_SIZE", "F_ACCESS", "F_PERMISSION", None):
        assert ("success", name) in answers
    assert {("UR", "F_BAD_ATS_TREQ"), ("UR", None)} <= answers
    granted = {rights for status, rights, _, _ in seen if status == "success"}
    assert {NOTHING, (True, False, False), (True, True, False), (True, True, True)} <= granted
    recorded = {event for status, _, fault, event in seen if (status, fault) == ("CA", "C_BAD_CD")}
    assert recorded == {False, True}
    seen = set().union(*map(check_translated, range(48, 80)))
    assert {("bypass", None), ("ok", None), ("abort", None), ("abort", "F_TRANSL_FORBIDDEN"),
            ("abort", "F_TRANSLATION"), ("abort", "C_BAD_STE")} <= {
        end[:2] for end in seen
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Row by row


BOTH = 0b10101 | 1 << 1 | 1 << 3  # CR0: everything enabled, ATSCHK
QUEUE = 0x9000_0000


def full(**changes):
    return Features.full().replace(**changes)


def small_system(eats=1, features=None, **registers):
    """The small system with EATS in every STE, and memory for queues."""
    image = small.build()
    for sid in range(16):
        at = small.STES + 64 * sid + 11
        image[at] = image[at] & ~0x30 | eats << 4
    smmu, _ = small.system(image, features=features or full(), **{"cr0": BOTH} | registers)
    smmu.memory.add_private(QUEUE, 0x10_0000)
    return smmu


def nested_system(eats=1, has=None, cr0=BOTH, **more):
    smmu = nested.small_nested(
        {"ats": 1, "pri": 1, "atsrecerr": 1, "httu": 2, "ssidsize": 4} | (has or {}), eats=eats,
        **more,
    )  # fmt: skip
    smmu.write("CR0", cr0)
    return smmu


def with_caches(smmu, kind):
    """The same SMMU with caches that keep nested translations so, or without."""
    if kind is None:
        return smmu
    return Smmu(
        smmu.memory, smmu.features, caches=Caches.small(nested=kind),
        strtab_base=smmu.strtab_base, strtab_base_cfg=smmu.strtab_base_cfg, cr0=smmu.cr0,
    )  # fmt: skip


EVERY_CACHE = pytest.mark.parametrize("kind", [None, "combined", "split"])


def rights(response):
    return "r" * response.read + "w" * response.write + "x" * response.execute


def test_requests_while_the_smmu_is_off_are_unsupported():
    smmu = small_system(cr0=0b100)
    response = smmu.ats_request(
        small.STAGE1, 0x1234_5678, ssid=3, no_write=True, execute=True, priv=True
    )
    assert response.status == "UR"
    assert response.event.fields == {
        "ID": 5, "SSV": 1, "SubstreamID": 3, "StreamID": small.STAGE1, "Span": 0, "P": 1, "X": 1,
        "W": 0, "R": 1, "InputAddr": 0x1234_5000,
    }  # fmt: skip
    plain = smmu.ats_request(small.STAGE1, 0x1000, execute=True, priv=True).event.fields
    assert (plain["SSV"], plain["P"], plain["X"], plain["W"]) == (0, 0, 0, 1)
    smmu.write("CR0", 0)
    response = smmu.ats_request(small.STAGE1, 0x1000)
    assert (response.status, response.event, response.fault.name) == ("UR", None, "F_BAD_ATS_TREQ")


def test_refusals_lie_in_the_event_queue_as_far_as_it_has_room():
    smmu = small_system(eats=0, eventq_base=QUEUE | 0)
    response = smmu.ats_request(small.STAGE1, 0x1000)
    assert smmu.memory.read(QUEUE, 32) == response.event.record
    assert smmu.read("EVENTQ_PROD") == 1
    response = smmu.ats_request(small.STAGE1, 0x1000)  # it has room for one
    assert response.event is None and response.fault.name == "F_BAD_ATS_TREQ"
    assert smmu.read("EVENTQ_PROD") == 1 | 1 << 31
    assert smmu.ats_translated(small.STAGE1, 0x1000).event is None
    smmu.write("EVENTQ_CONS", 1 | 1 << 31)
    result = smmu.ats_translated(small.STAGE1, 0x1008, write=True)
    assert smmu.memory.read(QUEUE, 32) == result.event.record
    assert result.event.fields == {
        "ID": 7, "StreamID": small.STAGE1, "RnW": 0, "InputAddr": 0x1008,
    }  # fmt: skip


@pytest.mark.parametrize("event", [0x02, 0x03, 0x04, 0x06, 0x08, 0x09, 0x0A, 0x0B])
def test_configuration_errors_are_recorded_if_asked(event):
    request = small.EVENTS[event]
    for cr2, recorded in ((RECINVSID, False), (RECINVSID | REC_CFG_ATS, True),
                          (REC_CFG_ATS, event != 0x02)):  # fmt: skip
        smmu = small_system(cr2=cr2)
        response = smmu.ats_request(request.sid, request.iova, ssid=request.ssid)
        assert (response.status, response.fault.number) == ("CA", event)
        assert (response.event is not None) == recorded
        if event <= 0x04:
            result = smmu.ats_translated(request.sid, request.iova)
            assert (result.action, result.fault.number) == ("abort", event)
            assert (result.event is not None) == recorded
    assert small_system(cr2=RECINVSID | REC_CFG_ATS, features=full(atsrecerr=0)).ats_request(
        request.sid, request.iova, ssid=request.ssid
    ).event is None  # fmt: skip


@pytest.mark.parametrize("event", [0x10, 0x11, 0x12])
def test_faults_of_translation_grant_nothing_and_are_not_recorded(event):
    smmu = small_system(cr2=RECINVSID | REC_CFG_ATS)
    response = smmu.ats_request(small.STAGE1, small.EVENTS[event].iova, stu=0x4000)
    assert (response.status, response.address, response.size) == ("success", None, 0x4000)
    assert rights(response) == "" and response.event is None
    assert response.fault.number == event


def test_streams_that_abort_or_bypass_may_not_ask():
    smmu = small_system()
    response = smmu.ats_request(small.ABORTED, 0)
    assert (response.status, response.fault, response.event) == ("UR", None, None)
    response = smmu.ats_request(small.BYPASSED, 0)
    assert (response.status, response.event.name) == ("UR", "F_BAD_ATS_TREQ")
    result = smmu.ats_translated(small.ABORTED, 0)
    assert (result.action, result.fault) == ("abort", None)
    result = smmu.ats_translated(small.BYPASSED, 0)
    assert (result.action, result.event.name) == ("abort", "F_TRANSL_FORBIDDEN")


@pytest.mark.parametrize(
    ("eats", "cr0", "config", "expected"),
    [(0, 0x15, 7, 0), (1, 0x15, 7, 1), (2, 0x15, 7, 2), (3, 0x15, 7, 0),
     (0, 0x05, 7, 0), (1, 0x05, 7, 1), (2, 0x05, 7, 0), (3, 0x05, 7, 0),
     (1, 0x15, 6, 1), (0, 0x15, 6, 0)],
)  # fmt: skip
def test_effective_eats(eats, cr0, config, expected):
    smmu = nested_system(eats, cr0=cr0)
    sid = nested.NESTED if config == 7 else nested.SECOND
    iova = nested.RW if config == 7 else nested.DATA + nested.RW
    response = smmu.ats_request(sid, iova)
    found = {
        ("UR", None, False): 0, ("success", nested.PAGES + nested.RW, False): 1,
        ("success", nested.DATA + nested.RW, True): 2,
    }[response.status, response.address, response.ipa]  # fmt: skip
    assert found == expected


def test_permissions_of_a_page():
    smmu = small_system()
    sid = small.SUBSTREAMS
    assert rights(smmu.ats_request(small.STAGE1, small.RW)) == "rw"
    assert rights(smmu.ats_request(small.STAGE1, small.RW, no_write=True)) == "r"
    assert rights(smmu.ats_request(small.STAGE1, small.RO)) == "r"
    assert rights(smmu.ats_request(small.STAGE1, small.RO, execute=True)) == "r"  # no PASID
    assert rights(smmu.ats_request(sid, small.RO, ssid=1, execute=True)) == "rx"
    # what the unprivileged may write, the privileged may not execute
    assert rights(smmu.ats_request(sid, small.RW, ssid=1, execute=True)) == "rwx"
    response = smmu.ats_request(sid, small.RW, ssid=1, execute=True, priv=True)
    assert (rights(response), response.priv) == ("rw", True)
    assert not smmu.ats_request(small.STAGE1, small.RW, priv=True).priv
    assert not response.global_ and not response.untranslated_only


def test_an_answer_spans_the_page():
    smmu = small_system()
    response = smmu.ats_request(small.STAGE1, small.BLOCK + 0x12_3456)
    assert (response.address, response.size) == (0x5020_0000, 0x20_0000)
    assert (response.attr, response.shareability) == (0xFF, 0)


def test_stage_1_bypass_is_the_identity():
    smmu = small_system()
    response = smmu.ats_request(small.SUBSTREAMS, 0x9999_1234, stu=0x1_0000)
    assert (response.address, response.size, rights(response)) == (0x9999_0000, 0x1_0000, "rw")
    assert rights(smmu.ats_request(small.SUBSTREAMS, 0x9999_1234, no_write=True)) == "r"
    response = smmu.ats_request(small.SUBSTREAMS, 1 << 60)
    assert (response.fault.name, response.event, rights(response)) == ("F_ADDR_SIZE", None, "")


@EVERY_CACHE
@pytest.mark.parametrize("stage", [1, 2])
def test_a_page_is_marked_dirty_for_a_write_that_is_granted(stage, kind):
    stage1 = {"ap": 3, "dbm": 1, "af": 0} if stage == 1 else {}
    smmu = nested_system(
        1, cd={"ha": 1, "hd": 1}, stage1=stage1, s2ha=1, s2hd=1, tables={"s2ap": 1, "dbm": 1},
    )  # fmt: skip
    smmu = with_caches(smmu, kind)

    def updates(iova, **more):
        before = smmu.memory.read(nested.STAGE2, 0x10_0000)
        tables = smmu.memory.read(nested.physical(nested.TABLES), 0x4000)
        response = smmu.ats_request(nested.NESTED, iova, **more)
        found = rights(response)
        outer = smmu.memory.read(nested.STAGE2, 0x10_0000) != before
        return found, smmu.memory.read(nested.physical(nested.TABLES), 0x4000) != tables, outer

    # the access flag of stage 1 is set by any request; the table's page is marked dirty for it
    assert updates(nested.RW, no_write=True) == ("r", stage == 1, stage == 1)
    assert updates(nested.RW, no_write=True) == ("r", False, False)
    assert updates(nested.RW) == ("rw", stage == 1, False)
    assert updates(nested.RW) == ("rw", False, False)
    # stage 2 denies the write: then stage 1 is not marked either
    assert updates(nested.READ_ONLY_OUTSIDE) == ("r", stage == 1, False)
    assert updates(nested.READ_ONLY_OUTSIDE) == ("r", False, False)


@EVERY_CACHE
def test_a_dirty_mark_that_stage_2_forbids_takes_the_write_away(kind):
    smmu = with_caches(
        nested_system(
            1, cd={"ha": 1, "hd": 1}, stage1={"ap": 3, "dbm": 1}, tables={"s2ap": 1}
        ),
        kind,
    )  # fmt: skip
    for _ in range(2):
        response = smmu.ats_request(nested.NESTED, nested.RW)
        assert (rights(response), response.fault) == ("r", None)
        result = smmu.translate(nested.NESTED, nested.RW, write=True)
        assert (result.event.name, result.event.class_) == ("F_PERMISSION", "TT")


@EVERY_CACHE
def test_an_access_flag_that_stage_2_forbids_grants_nothing(kind):
    # reads count as instruction fetches, which the page does not permit: it grants a write alone
    smmu = with_caches(
        nested_system(
            1, {"attr_perms_ovr": 1}, cd={"ha": 1}, stage1={"af": 0, "uxn": 1},
            tables={"s2ap": 1}, instcfg=3,
        ),
        kind,
    )  # fmt: skip
    for _ in range(2):
        response = smmu.ats_request(nested.NESTED, nested.RW)
        assert (rights(response), response.fault.name) == ("", "F_PERMISSION")
        assert (response.fault.s2, response.fault.class_) == (True, "TT")
    assert rights(smmu.ats_request(nested.NESTED, nested.RW, no_write=True)) == ""


@EVERY_CACHE
def test_a_page_may_grant_a_write_alone(kind):
    smmu = with_caches(nested_system(1, {"attr_perms_ovr": 1}, stage1={"uxn": 1}, instcfg=3), kind)
    for _ in range(2):
        assert rights(smmu.ats_request(nested.NESTED, nested.RW)) == "w"
        assert rights(smmu.ats_request(nested.NESTED, nested.RW, no_write=True)) == ""


def test_a_request_does_not_stall():
    smmu = nested_system(1, {"stall_model": 0, "stall_max": 8}, cd={"s": 1})
    assert smmu.translate(nested.NESTED, nested.UNMAPPED).action == "abort"  # that of stage 2
    assert smmu.translate(nested.NESTED, 0x10_0000).action == "stall"
    (stall,) = smmu.stalls
    response = smmu.ats_request(nested.NESTED, 0x10_0000)
    assert (response.status, rights(response), response.event) == ("success", "", None)
    assert smmu.stalls == [stall]


def test_split_stage_ats_gives_an_ipa_that_stage_2_translates():
    smmu = nested_system(2)
    for page, granted in ((nested.RW, "rw"), (nested.READ_ONLY, "r"),
                          (nested.READ_ONLY_OUTSIDE, "rw"), (nested.UNMAPPED, "rw")):  # fmt: skip
        response = smmu.ats_request(nested.NESTED, page)
        assert response.ipa and response.address == nested.DATA + page
        assert rights(response) == granted
    ipa = nested.DATA + nested.RW + 0x123
    result = smmu.ats_translated(nested.NESTED, ipa, write=True)
    assert (result.action, result.pa, result.ipa, result.stage) == (
        "ok", nested.physical(ipa), ipa, 2,
    )  # fmt: skip
    result = smmu.ats_translated(nested.NESTED, nested.DATA + nested.READ_ONLY_OUTSIDE, write=True)
    assert (result.action, result.event.name, result.event.s2) == ("abort", "F_PERMISSION", True)
    assert (result.event.class_, result.event.iova) == ("IN", nested.DATA)
    result = smmu.ats_translated(nested.NESTED, nested.DATA + nested.UNMAPPED)
    assert (result.event.name, result.event.write) == ("F_TRANSLATION", False)
    result = smmu.ats_translated(nested.NESTED, 1 << 45)  # beyond IAS
    assert (result.event.name, result.event.s2) == ("F_ADDR_SIZE", False)


def test_full_ats_grants_what_both_stages_permit():
    smmu = nested_system(1)
    for page, granted in ((nested.RW, "rw"), (nested.READ_ONLY, "r"),
                          (nested.READ_ONLY_OUTSIDE, "r"), (nested.UNMAPPED, "")):  # fmt: skip
        response = smmu.ats_request(nested.NESTED, page)
        assert not response.ipa and rights(response) == granted
        assert response.address == (nested.PAGES + page if granted else None)
    assert smmu.ats_translated(nested.NESTED, 0x1234).pa == 0x1234


@pytest.mark.parametrize("atschk", [0, 1])
def test_translated_transactions_are_checked_if_asked(atschk):
    smmu = small_system(eats=0, cr0=0b101 | atschk << 4)
    for sid in (small.STAGE1, small.INVALID, small.ABORTED, small.BEYOND_TABLE):
        result = smmu.ats_translated(sid, 0x5000_0000, write=True)
        assert result.action == ("abort" if atschk else "bypass")
    smmu = small_system(eats=1, cr0=0b101 | atschk << 4)
    assert smmu.ats_translated(small.STAGE1, 0x5000_0000).pa == 0x5000_0000
    result = smmu.ats_translated(small.STAGE1, 1 << 52)
    assert (result.action, result.fault, result.pa) == ("abort", None, None)
    smmu.write("CR0", 0b100)
    result = smmu.ats_translated(small.STAGE1, 0x5000_0000)
    assert (result.action, result.event.name) == ("abort", "F_TRANSL_FORBIDDEN")
    smmu.write("CR0", 0)
    assert smmu.ats_translated(small.STAGE1, 0x5000_0000).event is None


@pytest.mark.parametrize("pasidtt", [0, 1])
def test_a_pasid_of_a_translated_transaction_counts_with_pasidtt(pasidtt):
    smmu = small_system(features=full(pasidtt=pasidtt), cr2=RECINVSID | REC_CFG_ATS)
    good = smmu.ats_translated(small.SUBSTREAMS, 0x1000, ssid=3)
    assert (good.action, good.ssid) == ("bypass", 3 if pasidtt else None)
    bad = smmu.ats_translated(small.SUBSTREAMS, 0x1000, ssid=4)
    assert bad.action == ("abort" if pasidtt else "bypass")
    assert (bad.event and bad.event.name) == ("C_BAD_SUBSTREAMID" if pasidtt else None)


def test_without_ats_nothing_is_recorded():
    smmu = small_system(features=full(ats=0))
    assert smmu.ats_request(small.STAGE1, small.RW) == AtsResponse("UR")
    result = smmu.ats_translated(small.STAGE1, 0x1000)
    assert (result.action, result.fault) == ("abort", None)


def test_arguments_are_checked_and_exceptions_of_memory_arrive():
    smmu = small_system()
    for name, call in (
        ("sid", lambda: smmu.ats_request(1 << 32, 0)),
        ("iova", lambda: smmu.ats_request(0, 1 << 64)),
        ("ssid", lambda: smmu.ats_request(0, 0, ssid=1 << 20)),
        ("stu", lambda: smmu.ats_request(0, 0, stu=2048)),
        ("stu", lambda: smmu.ats_request(0, 0, stu=0x3000)),
        ("stu", lambda: smmu.ats_request(0, 0, stu=1 << 44)),
        ("address", lambda: smmu.ats_translated(0, -1)),
        ("ssid", lambda: smmu.ats_translated(0, 0, ssid=-1)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            call()

    def refuse(address, size):
        raise OSError(f"{address:#x}")

    smmu.memory.add_callback(small.BASE + small.HOLE, 0x1000, refuse)
    with pytest.raises(OSError, match="0x"):
        smmu.ats_request(small.NO_CD, 0)
    assert smmu.ats_request(small.STAGE1, small.RW).status == "success"


def test_answers_cannot_be_changed():
    response = small_system().ats_request(small.STAGE1, small.RW)
    with pytest.raises(AttributeError):
        response.write = True


@pytest.mark.parametrize("kind", ["combined", "split"])
def test_requests_fill_the_caches_as_accesses_do(kind):
    for sid, iova in (
        (nested.NESTED, nested.RW),
        (nested.NESTED, nested.READ_ONLY_OUTSIDE),
        (nested.NESTED, nested.UNMAPPED),
        (nested.SECOND, nested.DATA + nested.RW),
        (nested.SECOND, nested.DATA + nested.UNMAPPED),
        (5, 0),  # STE.Config=0b000
    ):
        held = []
        for face in ("translate", "ats_request"):
            smmu = with_caches(nested_system(1), kind)
            getattr(smmu, face)(sid, iova)
            caches = smmu.caches
            held.append([
                (len(cache), cache.hits, cache.misses)
                for cache in (caches.ste, caches.cd, caches.tlb, caches.walk1, caches.walk2)
            ])  # fmt: skip
        assert held[0] == held[1], (sid, iova)
    assert held[0][0] == (1, 0, 1)


@pytest.mark.parametrize("kind", ["combined", "split"])
def test_translated_ipas_are_cached(kind):
    smmu = with_caches(nested_system(2), kind)
    ipa = nested.DATA + nested.RW
    first = smmu.ats_translated(nested.NESTED, ipa)
    hits = smmu.caches.tlb.hits
    assert smmu.ats_translated(nested.NESTED, ipa).pa == first.pa
    assert smmu.caches.tlb.hits == hits + 1
    assert smmu.caches.ste.hits == 1
    response = smmu.ats_request(nested.NESTED, nested.RW)
    hits = smmu.caches.tlb.hits
    assert smmu.ats_request(nested.NESTED, nested.RW) == response
    assert smmu.caches.tlb.hits == hits + 1


def test_caches_serve_requests():
    caches = Caches.small()
    smmu = small_system(caches=caches)
    first = smmu.ats_request(small.STAGE1, small.RW)
    at = small.BASE + small.LEVEL3 + 8 * (small.RW >> 12)
    smmu.memory.write_u64(at, 0)
    assert smmu.ats_request(small.STAGE1, small.RW) == first
    assert smmu.translate(small.STAGE1, small.RW).pa == first.address
    smmu.command("TLBI_NSNH_ALL")
    assert rights(smmu.ats_request(small.STAGE1, small.RW)) == ""


# ------------------------------------------------------------------------------------------------
# A device with an ATC


def device_of(smmu, sid=small.STAGE1, **more):
    return AtsDevice(smmu, sid, **more)


def test_an_atc_asks_once_for_a_page():
    device = device_of(small_system())
    for offset in (0, 8, 0xFF8):
        assert device.access(small.RW + offset).pa == 0x4000_1000 + offset
    assert (device.hits, device.misses, device.requests, len(device)) == (2, 1, 1, 1)
    # the read did not ask for a write
    assert device.access(small.RW, write=True).write
    assert device.access(small.RW).pa == 0x4000_1000
    assert (device.hits, device.misses, device.requests, len(device)) == (3, 2, 2, 1)
    assert device.access(small.BLOCK + 0x12_3456).pa == 0x5032_3456
    assert device.access(small.BLOCK + 0x1F_FFFF).pa == 0x503F_FFFF
    assert (device.misses, len(device)) == (3, 2)


def test_what_is_not_granted_is_a_fault_of_the_device():
    smmu = small_system()
    device = device_of(smmu)
    for iova, write, status in ((small.UNMAPPED, False, "success"), (small.RO, True, "success")):
        with pytest.raises(AtsFault, match="sid 0x1 iova") as caught:
            device.access(iova, write=write)
        assert caught.value.response.status == status
    with pytest.raises(AtsFault, match=r"read not granted \(UR\)"):
        device_of(smmu, small.BYPASSED).access(0)
    with pytest.raises(AtsFault, match=r"read not granted \(CA\)"):
        device_of(smmu, small.INVALID).access(0)
    with pytest.raises(AtsFault, match="execute not granted"):
        device_of(smmu, small.SUBSTREAMS).access(small.RW, ssid=1, execute=True, priv=True)
    assert len(device) == 1  # read-only, but a translation


def test_the_longest_unused_translation_makes_room():
    device = device_of(small_system(), entries=2)
    device.access(small.RUN)
    device.access(small.RUN + 0x1000)
    device.access(small.RUN)
    device.access(small.RUN + 0x2000)
    assert (device.hits, device.misses, len(device)) == (1, 3, 2)
    device.access(small.RUN)
    device.access(small.RUN + 0x1000)
    assert (device.hits, device.misses) == (2, 4)
    none = device_of(small_system(), entries=0)
    for _ in range(3):
        none.access(small.RW)
    assert (none.hits, none.misses, len(none)) == (0, 3, 0)


def filled():
    """(Smmu, device): pages of no PASID, of PASIDs 1 and 2."""
    smmu = small_system(cmdq_base=QUEUE + 0x8000 | 4, cr0=BOTH)
    device = device_of(smmu, small.SUBSTREAMS)
    device.access(small.RW, write=True)
    for ssid in (1, 2):
        for page in (small.RW, small.RO, small.RUN, small.RUN + 0x1000, small.BLOCK):
            device.access(page, ssid=ssid)
    return smmu, device


def held(device):
    """What an ATC holds: {PASID: pages}."""
    found = {}
    for ssid, _, size, start in device._cache:
        found.setdefault(ssid, set()).add((start, size))
    return found


PAGES = {(page, 0x1000) for page in (small.RW, small.RO, small.RUN, small.RUN + 0x1000)}
ALL_PAGES = PAGES | {(small.BLOCK, 0x20_0000)}
PLAIN = {(small.RW, 0x1000)}


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        ({"SSV": 1, "SubstreamID": 1, "Size": 52}, {None: PLAIN, 2: ALL_PAGES}),
        ({"SSV": 1, "SubstreamID": 1, "Address": small.RO},
         {None: PLAIN, 1: ALL_PAGES - {(small.RO, 0x1000)}, 2: ALL_PAGES}),
        # 8 KiB from 0x6000, to which 0x7000 is aligned
        ({"SSV": 1, "SubstreamID": 2, "Address": small.RUN + 0x1000, "Size": 1},
         {None: PLAIN, 1: ALL_PAGES,
          2: ALL_PAGES - {(small.RUN, 0x1000), (small.RUN + 0x1000, 0x1000)}}),
        ({"SSV": 1, "SubstreamID": 1, "Address": small.BLOCK + 0x7000},
         {None: PLAIN, 1: PAGES, 2: ALL_PAGES}),
        ({"SSV": 1, "G": 1, "Size": 52}, {None: PLAIN}),
        ({"SSV": 1, "G": 1, "SubstreamID": 7, "Address": small.RW},
         {None: PLAIN, 1: ALL_PAGES - PLAIN, 2: ALL_PAGES - PLAIN}),
        ({"Size": 52}, {1: ALL_PAGES, 2: ALL_PAGES}),
        ({"G": 1, "Size": 52}, {1: ALL_PAGES, 2: ALL_PAGES}),  # G needs SSV
        ({"Address": small.RO}, {None: PLAIN, 1: ALL_PAGES, 2: ALL_PAGES}),
        ({"SSV": 1, "SubstreamID": 3, "Size": 52}, {None: PLAIN, 1: ALL_PAGES, 2: ALL_PAGES}),
    ],
)  # fmt: skip
def test_atc_inv_drops_what_it_names(fields, left):
    smmu, device = filled()
    assert held(device) == {None: PLAIN, 1: ALL_PAGES, 2: ALL_PAGES}
    smmu.command("ATC_INV", StreamID=small.SUBSTREAMS, **fields)
    assert held(device) == left and device.invalidations == 1
    smmu.sync()


def test_atc_inv_of_another_stream_or_while_off_does_nothing():
    smmu, device = filled()
    smmu.command("ATC_INV", StreamID=small.STAGE1, Size=52)
    smmu.write("CR0", BOTH & ~1)
    smmu.command("ATC_INV", StreamID=small.SUBSTREAMS, Size=52)
    assert device.invalidations == 0 and held(device)[None] == PLAIN
    smmu.write("CR0", BOTH)
    smmu.command("ATC_INV", StreamID=small.SUBSTREAMS, Size=53)
    assert smmu.read("CMDQ_CONS") >> 24 == 1  # CERROR_ILL
    assert device.invalidations == 0


def test_a_device_that_hangs_fails_the_sync():
    smmu, device = filled()
    device.responsive = False
    smmu.command("ATC_INV", StreamID=small.SUBSTREAMS, Size=52)
    with pytest.raises(RuntimeError, match="CERROR_ATC_INV_SYNC"):
        smmu.sync()
    assert smmu.read("CMDQ_CONS") >> 24 == 3
    assert layout.unpack("GERROR", smmu.gerror ^ smmu.gerrorn)["CMDQ_ERR"] == 1
    assert held(device)[1] == ALL_PAGES
    device.responsive = True
    smmu.write("GERRORN", smmu.gerror)
    assert smmu.read("CMDQ_CONS") & 0xFF == smmu.read("CMDQ_PROD")


def test_translations_that_change_while_they_are_asked_for_are_not_kept():
    smmu = small_system()
    device = device_of(smmu)
    answer = device.smmu.ats_request(small.STAGE1, small.RW)

    class Racing:
        devices = smmu.devices

        def ats_request(self, *arguments, **more):
            smmu.command("ATC_INV", StreamID=small.STAGE1, Size=52)
            return answer

    device.smmu = Racing()
    assert device.translate(small.RW) == answer and len(device) == 0


@pytest.mark.parametrize("seed", range(6))
def test_an_atc_that_is_told_what_changes_is_never_wrong(seed):
    rng = random.Random(seed)
    smmu = small_system(caches=Caches.small() if seed % 2 else None)
    device = device_of(smmu, small.SUBSTREAMS, entries=rng.choice((1, 8, 16)))
    pages = [page << 12 for page in range(1, 9)]
    for _ in range(400):
        page, ssid = rng.choice(pages), rng.choice((1, 2))
        if rng.random() < 0.2:
            ap = rng.choice((1, 3))
            leaf = ptwriter.leaf_descriptor(
                12, 3, rng.randrange(1 << 20) << 12, ap=ap, ng=1, af=rng.random() < 0.8
            )
            at = small.BASE + small.LEVEL3 + 8 * (page >> 12)
            smmu.memory.write_u64(at, leaf if rng.random() < 0.8 else 0)
            smmu.command("TLBI_NH_ALL")
            for pasid in (1, 2):
                smmu.command("ATC_INV", StreamID=small.SUBSTREAMS, SSV=1, SubstreamID=pasid,
                             Address=page)  # fmt: skip
        write, iova = rng.random() < 0.4, page + rng.randrange(0x1000)
        wanted = smmu.translate(small.SUBSTREAMS, iova, ssid=ssid, write=write)
        if wanted:
            assert device.access(iova, ssid=ssid, write=write).pa == wanted.pa
        else:
            with pytest.raises(AtsFault):
                device.access(iova, ssid=ssid, write=write)
        assert len(device) <= device.entries
    assert device.hits > 5 and device.misses > 20


def test_devices_are_checked():
    smmu = small_system()
    device = device_of(smmu)
    assert smmu.devices == {small.STAGE1: device}
    for name, call in (
        ("sid", lambda: AtsDevice(smmu, small.STAGE1)),
        ("sid", lambda: AtsDevice(smmu, 1 << 32)),
        ("entries", lambda: AtsDevice(smmu, 2, entries=-1)),
        ("stu", lambda: AtsDevice(smmu, 2, stu=1000)),
        ("credits", lambda: AtsDevice(smmu, 2, credits=513)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            call()
    assert list(smmu.devices) == [small.STAGE1]
    with pytest.raises(ValueError, match=r"^iova: "):
        device.access(1 << 64)
    assert repr(device) == "<AtsDevice sid=0x1 0 of 64 entries, 0 page requests outstanding>"
    device.access(small.RW)
    device.clear()
    assert len(device) == 0 and device.access(small.RW) and device.misses == 3


@pytest.mark.parametrize("at", [small.STES + 64 * small.STAGE1, small.CDS], ids=["STE", "CD"])
def test_what_is_invalidated_while_a_request_reads_it_is_not_cached(at):
    image = small.build()
    place = slice(64 * small.STAGE1, 64 * small.STAGE1 + 64)
    image[place] = ptwriter.encode_ste(
        v=1, config=5, s1contextptr=small.BASE + small.CDS, eats=1
    )
    left = [at]

    def read(address, n):
        offset = address - small.BASE
        data = bytes(image[offset : offset + n])
        if offset in left:
            left.remove(offset)
            image[place] = ptwriter.encode_ste(v=1, config=4)
            smmu.command("CFGI_STE", StreamID=small.STAGE1)
        return data

    memory = Memory()
    memory.add_callback(small.BASE, small.SIZE, read)
    caches = Caches(ste=(16, 4), cd=(16, 4), tlb=(16, 4))
    smmu = Smmu(memory, Features.full(), caches=caches, **small.registers())
    assert smmu.ats_request(small.STAGE1, small.RW).status == "success"
    assert not left and smmu.stale() == [] and len(caches) == 0
    assert smmu.translate(small.STAGE1, small.RW).action == "bypass"
