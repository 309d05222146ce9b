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
from reference import CLASS_IN, NSH, bits

import smmufast
from smmufast import Features, Memory, Smmu, layout
from smmufast._tlb import Caches
from smmufast.ats import AtsDevice, PageRequest
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
    features = Features(**{name: getattr(system.features, name) for name in twin.FEATURES})
    return Smmu(real, features, caches=caches, **vars(system.regs))


def caches_of(seed):
    return Caches(nested=("combined", "split")[seed % 2])


def check_requests(seed, cached=False):
    """Compare the requests of one random system; what kinds of answers there were."""
    rng, system, requests = ats_system(seed)
    mine = system.memory.copy()
    caches = caches_of(seed // 4) if cached else None
    smmu = smmu_over(system, mine, caches)
    seen = set()
    for request in requests:
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
            caches.invalidate_all()
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
            ("abort", "F_TRANSLATION"), ("abort", "C_BAD_STE")} <= {s[:2] for s in seen}  # fmt: skip
