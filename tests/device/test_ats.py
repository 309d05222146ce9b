"""ATS: translation requests, Translated transactions and a device's ATC.

Random systems are compared with the obvious twin by atstwin.py.
"""

import itertools
import random

import atstwin
import captures
import nested
import ptwriter
import pytest
import small
from atssystems import (
    BOTH,
    QUEUE,
    REC_CFG_ATS,
    RECINVSID,
    full,
    nested_system,
    rights,
    small_system,
)
from atstwin import check_grid, check_requests, check_translated
from reference_ats import Rights

from smmufast import Features, Memory, Smmu, layout
from smmufast._engine.tlb import Caches
from smmufast.ats import AtsDevice
from smmufast.faults import AtsFault, AtsResponse
from smmufast.why import Why

NOTHING = Rights()


# ------------------------------------------------------------------------------------------------
# Random systems


def seeds(first, last, quick):
    """Numbers of random systems, some of them for the quick tests."""
    return [
        pytest.param(seed, marks=() if seed - first < quick else pytest.mark.slow)
        for seed in range(first, last)
    ]


@pytest.mark.rule("S3.9.1-15", "S13.6.2-2")
@pytest.mark.parametrize("seed", seeds(0, 48, 8))
def test_requests_are_answered_as_the_twin_answers(seed):
    pair, _ = check_requests(seed, cached=True)
    assert pair.compared == 2 * atstwin.PER_SYSTEM


@pytest.mark.parametrize("seed", seeds(48, 80, 8))
def test_translated_transactions_end_as_the_twin_says(seed):
    pair, _ = check_translated(seed, cached=True)
    assert pair.compared == 2 * atstwin.PER_SYSTEM


@pytest.mark.parametrize("cached", [False, True], ids=["without caches", "with caches"])
@pytest.mark.parametrize("seed", seeds(80, 92, 4))
def test_every_permission_size_and_override_is_answered_as_the_twin_answers(seed, cached):
    assert check_grid(seed, cached).compared >= 2 * atstwin.PER_GRID


@pytest.mark.slow
def test_the_answers_without_caches_are_the_twins_and_of_every_kind():
    seen = set().union(*(check_requests(seed)[1] for seed in range(48)))
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
    seen = set().union(*(check_translated(seed)[1] for seed in range(48, 80)))
    assert {("bypass", None), ("ok", None), ("abort", None), ("abort", "F_TRANSL_FORBIDDEN"),
            ("abort", "F_TRANSLATION"), ("abort", "C_BAD_STE")} <= {
        end[:2] for end in seen
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Row by row


def with_caches(smmu, kind):
    """The same SMMU with caches that keep nested translations so, or without."""
    if kind is None:
        return smmu
    return Smmu(
        smmu.memory, smmu.features, caches=Caches.small(nested=kind),
        strtab_base=smmu.strtab_base, strtab_base_cfg=smmu.strtab_base_cfg, cr0=smmu.cr0,
    )  # fmt: skip


EVERY_CACHE = pytest.mark.parametrize("kind", [None, "combined", "split"])


@pytest.mark.rule(
    "S3.9.1.2-1", "S3.11-7", "S6.3.9.6-3", "S7.3.6-1", "S7.3.6-2", "S7.3.6-3", "S13.2-3",
)
def test_requests_while_the_smmu_is_off_are_unsupported():
    smmu = small_system(cr0=0b100)
    response = smmu.ats_request(
        small.STAGE1, 0x1234_5678, ssid=3, no_write=True, execute=True, priv=True
    )
    assert response.status == "UR"
    assert response.event.fields == {
        "ID": 5, "SSV": 1, "SubstreamID": 3, "StreamID": small.STAGE1, "Span": 1, "P": 1, "X": 1,
        "W": 0, "R": 1, "InputAddr": 0x1234_5000,
    }  # fmt: skip
    plain = smmu.ats_request(small.STAGE1, 0x1000, execute=True, priv=True).event.fields
    assert (plain["SSV"], plain["P"], plain["X"], plain["W"]) == (0, 0, 0, 1)
    smmu.write("CR0", 0)
    response = smmu.ats_request(small.STAGE1, 0x1000)
    assert (response.status, response.event, response.fault.name) == ("UR", None, "F_BAD_ATS_TREQ")


@pytest.mark.rule("S7.3.8-2")
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


@pytest.mark.rule(
    "S2.5-3", "S3.9.1.2-10", "S3.9.1.2-11", "S3.9.1.3-6", "S6.3.1-7", "S6.3.12-4", "S7.3.22-6",
    "S15.2-1",
)
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
            # a Translated transaction does not ask RECINVSID
            assert (result.event is not None) == bool(cr2 & REC_CFG_ATS)
    assert small_system(cr2=RECINVSID | REC_CFG_ATS, features=full(atsrecerr=0)).ats_request(
        request.sid, request.iova, ssid=request.ssid
    ).event is None  # fmt: skip


@pytest.mark.rule("S3.9.1-3", "S3.13.7.2-1", "S7.3.22-5")
@pytest.mark.parametrize("event", [0x10, 0x11, 0x12])
def test_faults_of_translation_grant_nothing_and_are_not_recorded(event):
    smmu = small_system(cr2=RECINVSID | REC_CFG_ATS, eventq_base=QUEUE | 4)
    response = smmu.ats_request(small.STAGE1, small.EVENTS[event].iova, stu=0x4000)
    assert (response.status, response.address, response.size) == ("success", None, 0x4000)
    assert rights(response) == "" and response.event is None
    assert response.fault.number == event
    assert smmu.read("EVENTQ_PROD") == 0
    smmu.translate(small.STAGE1, small.EVENTS[event].iova)
    assert smmu.read("EVENTQ_PROD") == 1


@pytest.mark.rule("S3.9.1.2-2", "S3.9.1.2-3", "S3.9.1.3-2", "S3.9.1.3-3", "S7.3.6-4")
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


@pytest.mark.rule("S3.9.1-13", "S3.9.1.2-4", "S5.2-35", "S5.2-38")
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


@pytest.mark.rule(
    "S3.9-3", "S3.9.1-2", "S3.9.1-16", "S3.13.7.2-2", "S3.13.7.2-3", "S13.7-1", "S13.7-8",
)
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


# INSTCFG and PRIVCFG of sixteen streams, and AP, UXN and PXN of sixteen pages.
STREAMS = [(instcfg, privcfg) for instcfg in range(4) for privcfg in range(4)]
PAGES_OF_EVERY_KIND = [(ap, uxn, pxn) for ap in range(4) for uxn in range(2) for pxn in range(2)]


def permission_system(ovr):
    """Sixteen streams with one context, for SubstreamID 1, over the sixteen pages."""
    base = 0x8000_0000
    image = bytearray(0x8000)

    def put(offset, data):
        image[offset : offset + len(data)] = data

    for sid, (instcfg, privcfg) in enumerate(STREAMS):
        put(64 * sid, ptwriter.encode_ste(
            v=1, config=5, s1contextptr=base + 0x1000, s1cdmax=1, eats=1, instcfg=instcfg,
            privcfg=privcfg,
        ))  # fmt: skip
    put(0x1040, ptwriter.encode_cd(
        v=1, aa64=1, a=1, r=1, t0sz=25, epd1=1, ips=4, ttb0=base + 0x2000, mair=0xFF,
    ))  # fmt: skip
    for level, offset in ((1, 0x2000), (2, 0x3000)):
        table = ptwriter.table_descriptor(12, base + 0x1000 * (level + 2))
        put(offset, table.to_bytes(8, "little"))
    for page, (ap, uxn, pxn) in enumerate(PAGES_OF_EVERY_KIND):
        leaf = ptwriter.leaf_descriptor(12, 3, 0x9000_0000, ap=ap, uxn=uxn, pxn=pxn)
        put(0x4000 + 8 * page, leaf.to_bytes(8, "little"))
    memory = Memory()
    memory.add(image, base)
    features = full(attr_perms_ovr=ovr)
    return Smmu(memory, features, strtab_base=base, strtab_base_cfg=4, cr0=BOTH)


@pytest.mark.rule(
    "S3.9-4", "S13.1.4-2", "S13.7-5", "S13.7-7", "S13.7.1-1", "S13.7.1-2", "S13.7.1-3",
    "S13.7.1-4", "S13.7.1-6",
)
@pytest.mark.parametrize("ovr", [0, 1])
def test_what_a_page_grants_by_overrides_and_privilege(ovr):
    """The rules of IHI 0070 13.7.1, of every page and every request."""
    smmu = permission_system(ovr)
    for sid, (instcfg, privcfg) in enumerate(STREAMS):
        for page, (ap, uxn, pxn) in enumerate(PAGES_OF_EVERY_KIND):
            for priv, execute, no_write in itertools.product((False, True), repeat=3):
                seen = {2: False, 3: True}.get(privcfg if ovr else 0, priv)
                readable = seen or ap in (1, 3)
                writable = ap < 2 and (seen or ap == 1)
                # what the unprivileged may write, the privileged may not execute
                executable = not pxn and ap != 1 if seen else not uxn
                if ovr and instcfg == 3:
                    read = run = executable
                elif ovr and instcfg == 2:
                    read = run = readable
                else:
                    read, run = readable, readable and executable
                wanted = "r" * read + "w" * (writable and not no_write) + "x" * (execute and run)
                answer = smmu.ats_request(
                    sid, page << 12, ssid=1, priv=priv, execute=execute, no_write=no_write
                )
                assert rights(answer) == wanted, (instcfg, privcfg, ap, uxn, pxn, priv)
                # the answer says the privilege of the request, not what it was taken for
                assert answer.priv == priv


@pytest.mark.rule("S3.9.1-17", "S13.7-6")
@EVERY_CACHE
@pytest.mark.parametrize("instcfg", [0, 3])
def test_a_page_that_is_execute_only_grants_nothing_but_to_reads_that_are_fetches(instcfg, kind):
    smmu = nested_system(
        1, {"attr_perms_ovr": 1, "xnx": 1}, s1cdmax=2, s1dss=2, instcfg=instcfg
    )
    set_stage2_leaf(smmu, nested.DATA + nested.RW, s2ap=0, xn=0)
    smmu.memory.write(nested.GUEST + 64, smmu.memory.read(nested.GUEST, 64))
    smmu = with_caches(smmu, kind)
    for _ in range(2):
        answer = smmu.ats_request(nested.NESTED, nested.RW, ssid=1, execute=True)
        assert (answer.status, rights(answer)) == ("success", "rx" if instcfg == 3 else "")
        ordinary = smmu.translate(nested.NESTED, nested.RW, ssid=1, instr=True)
        assert ordinary.action == "ok"


@pytest.mark.rule("S3.9.1-4")
def test_a_request_in_a_context_that_reads_zero_grants_nothing():
    smmu = small_system()
    assert smmu.translate(small.SILENT, small.UNMAPPED).action == "raz_wi"
    response = smmu.ats_request(small.SILENT, small.UNMAPPED)
    assert (response.status, rights(response), response.event) == ("success", "", None)
    assert response.fault.name == "F_TRANSLATION"


@pytest.mark.rule("S13.4-3")
def test_attributes_of_an_answer_are_those_of_an_access():
    """So STE overrides count for them, as for untranslated accesses."""
    for ste in ({}, {"mtcfg": 1, "memattr": 5}, {"alloccfg": 8}, {"shcfg": 2}):
        for eats in (1, 2):
            smmu = nested_system(eats, {"attr_types_ovr": 1}, **SKIPS, **ste)
            iova = nested.DATA + nested.RW
            answer, access = smmu.ats_request(nested.NESTED, iova), smmu.translate(
                nested.NESTED, iova
            )
            assert (answer.attr, answer.shareability) == (access.attr, access.shareability)


def test_an_answer_spans_the_page():
    smmu = small_system()
    response = smmu.ats_request(small.STAGE1, small.BLOCK + 0x12_3456)
    assert (response.address, response.size) == (0x5020_0000, 0x20_0000)
    assert (response.attr, response.shareability) == (0xFF, 0)


@pytest.mark.rule("S3.9.1.2-9", "S13.6.4-2", "S13.6.4-3")
def test_stage_1_bypass_is_the_identity():
    smmu = small_system(eventq_base=QUEUE | 4)
    response = smmu.ats_request(small.SUBSTREAMS, 0x9999_1234, stu=0x1_0000)
    assert (response.address, response.size, rights(response)) == (0x9999_0000, 0x1_0000, "rw")
    # No Write, or what the STE makes of reads, takes nothing away
    assert rights(smmu.ats_request(small.SUBSTREAMS, 0x9999_1234, no_write=True)) == "rw"
    assert rights(smmu.ats_request(small.SUBSTREAMS, (1 << 52) - 1, no_write=True)) == "rw"
    response = smmu.ats_request(small.SUBSTREAMS, 1 << 52)
    assert (response.fault.name, response.event, rights(response)) == ("F_ADDR_SIZE", None, "")
    assert smmu.read("EVENTQ_PROD") == 0


@pytest.mark.rule("S3.9.1-14", "S3.13.7.1-1", "S3.13.7.1-2", "S13.7-2", "S13.7-3", "S13.7-10")
@EVERY_CACHE
@pytest.mark.parametrize("eats", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_page_is_marked_dirty_for_a_write_that_is_granted(stage, eats, kind):
    stage1 = {"ap": 3, "dbm": 1, "af": 0} if stage == 1 else {}
    smmu = nested_system(
        eats, cd={"ha": 1, "hd": 1}, stage1=stage1, s2ha=1, s2hd=1, tables={"s2ap": 1, "dbm": 1},
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


@pytest.mark.rule("S3.9.1.2-15")
@EVERY_CACHE
def test_a_dirty_mark_that_stage_2_forbids_grants_nothing(kind):
    smmu = with_caches(
        nested_system(
            1, cd={"ha": 1, "hd": 1}, stage1={"ap": 3, "dbm": 1}, tables={"s2ap": 1}
        ),
        kind,
    )  # fmt: skip
    for _ in range(2):
        response = smmu.ats_request(nested.NESTED, nested.RW)
        assert (response.status, rights(response), response.fault.name) == (
            "success", "", "F_PERMISSION",
        )  # fmt: skip
        assert (response.fault.s2, response.fault.class_, response.event) == (True, "TT", None)
        result = smmu.translate(nested.NESTED, nested.RW, write=True)
        assert (result.event.name, result.event.class_) == ("F_PERMISSION", "TT")
        # a request that does not ask for the write does not meet it
        assert rights(smmu.ats_request(nested.NESTED, nested.RW, no_write=True)) == "r"


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


@pytest.mark.rule("S13.7.1-5")
@EVERY_CACHE
def test_a_page_may_grant_a_write_alone(kind):
    smmu = with_caches(nested_system(1, {"attr_perms_ovr": 1}, stage1={"uxn": 1}, instcfg=3), kind)
    for _ in range(2):
        assert rights(smmu.ats_request(nested.NESTED, nested.RW)) == "w"
        assert rights(smmu.ats_request(nested.NESTED, nested.RW, no_write=True)) == ""


@pytest.mark.rule("S3.9.1-5", "S3.9.1.2-101", "S5.5-6")
def test_a_request_does_not_stall():
    smmu = nested_system(1, {"stall_model": 0, "stall_max": 8}, cd={"s": 1})
    assert smmu.translate(nested.NESTED, nested.UNMAPPED).action == "abort"  # that of stage 2
    assert smmu.translate(nested.NESTED, 0x10_0000).action == "stall"
    (stall,) = smmu.stalls
    response = smmu.ats_request(nested.NESTED, 0x10_0000)
    assert (response.status, rights(response), response.event) == ("success", "", None)
    assert smmu.stalls == [stall]


@pytest.mark.rule("S3.9.1.2-5", "S3.9.1.2-6", "S13.6.3-1", "S13.6.3-2")
@EVERY_CACHE
@pytest.mark.parametrize("eats", [1, 2])
def test_both_stages_permit_what_is_granted(eats, kind):
    smmu = with_caches(nested_system(eats), kind)
    for _ in range(2):
        for page, granted in ((nested.RW, "rw"), (nested.READ_ONLY, "r"),
                              (nested.READ_ONLY_OUTSIDE, "r")):  # fmt: skip
            response = smmu.ats_request(nested.NESTED, page)
            assert (rights(response), response.size, response.ipa) == (granted, 0x1000, eats == 2)
            assert response.address == (nested.DATA if eats == 2 else nested.PAGES) + page
            assert (response.attr, response.shareability) == (
                (result := smmu.translate(nested.NESTED, page)).attr, result.shareability,
            )  # fmt: skip
        for page, fault in ((nested.UNMAPPED, "F_TRANSLATION"), (nested.NO_AF, "F_ACCESS")):
            response = smmu.ats_request(nested.NESTED, page, stu=0x2000)
            assert (response.status, response.address, response.size) == ("success", None, 0x2000)
            assert (rights(response), response.event) == ("", None)
            assert (response.fault.name, response.fault.s2) == (fault, True)


@pytest.mark.rule("S3.9.1.2-8")
@EVERY_CACHE
@pytest.mark.parametrize("eats", [1, 2])
def test_where_stage_1_grants_nothing_stage_2_is_not_asked(eats, kind):
    # the access flag of the stage-2 leaf of NO_AF would be set
    smmu = with_caches(nested_system(eats, stage1={"ap": 2}, s2ha=1), kind)
    before = smmu.memory.read(nested.STAGE2, 0x10_0000)
    for page in (nested.NO_AF, nested.UNMAPPED):
        response = smmu.ats_request(nested.NESTED, page)
        assert (response.status, rights(response), response.fault) == ("success", "", None)
        assert rights(smmu.ats_request(nested.NESTED, page, no_write=True)) == ""
    assert smmu.memory.read(nested.STAGE2, 0x10_0000) == before


SKIPS = {"s1cdmax": 2, "s1dss": 1}  # without a PASID


@pytest.mark.rule("S13.6.4-1", "S13.6.4-4", "S13.6.5-1", "S13.6.5-2")
@EVERY_CACHE
@pytest.mark.parametrize("eats", [1, 2])
def test_a_request_that_skips_stage_1_is_granted_what_stage_2_permits(eats, kind):
    smmu = with_caches(nested_system(eats, **SKIPS), kind)
    for _ in range(2):
        for page, granted in ((nested.RW, "rw"), (nested.READ_ONLY, "rw"),
                              (nested.READ_ONLY_OUTSIDE, "r")):  # fmt: skip
            iova = nested.DATA + page
            response = smmu.ats_request(nested.NESTED, iova + 8, stu=0x8000)
            assert (rights(response), response.size, response.ipa) == (granted, 0x1000, eats == 2)
            assert response.address == (iova if eats == 2 else nested.physical(iova))
            assert rights(smmu.ats_request(nested.NESTED, iova, no_write=True)) == "r"
        for iova, fault in ((nested.DATA + nested.UNMAPPED, "F_TRANSLATION"),
                            (nested.DATA + nested.NO_AF, "F_ACCESS"),
                            (1 << 44, "F_ADDR_SIZE")):  # fmt: skip
            response = smmu.ats_request(nested.NESTED, iova, stu=0x8000)
            assert (response.status, rights(response), response.size) == ("success", "", 0x8000)
            assert (response.fault.name, response.event) == (fault, None)
            assert response.fault.s2 == (fault != "F_ADDR_SIZE")
    # with a PASID stage 1 is not skipped
    response = smmu.ats_request(nested.NESTED, nested.RW, ssid=0)
    assert (rights(response), response.ipa) == ("rw", eats == 2)


@pytest.mark.parametrize("instcfg", [0, 2, 3])
@pytest.mark.parametrize("eats", [1, 2])
def test_a_skipped_stage_1_leaves_the_overrides_to_stage_2(eats, instcfg):
    ovr = {"attr_perms_ovr": 1, "xnx": 1}
    smmu = nested_system(eats, ovr, **SKIPS, instcfg=instcfg)
    write_only = nested.DATA + nested.RW
    set_stage2_leaf(smmu, write_only, s2ap=3, xn=0b10)
    granted = rights(smmu.ats_request(nested.NESTED, write_only))
    assert granted == ("w" if instcfg == 3 else "rw")


def stage2_leaf_at(ipa):
    """Where the descriptor of an IPA lies in every nested system."""
    result = nested_system().translate(nested.SECOND, ipa, trace=True)
    return [fetch.address for fetch in result.fetches if fetch.kind == "S2TT"][-1]


def set_stage2_leaf(smmu, ipa, **attributes):
    """Give the page of an IPA other attributes."""
    leaf = ptwriter.stage2_leaf_descriptor(
        12, 3, nested.physical(ipa), **{"memattr": 15, "sh": 3} | attributes
    )
    smmu.memory.write_u64(stage2_leaf_at(ipa), leaf)


GRANULES = [(12, 2), (12, 1), (14, 2), (16, 2), (12, 3), (14, 3), (16, 3)]  # with their leaf level


@pytest.mark.rule("S13.6.3-3")
@pytest.mark.parametrize("second", GRANULES, ids=str)
@pytest.mark.parametrize("first", GRANULES, ids=str)
def test_an_answer_has_the_size_of_the_smaller_page_of_both_stages(first, second):
    """Whatever the granules: and both ends of the range lead where an access of them does."""
    memory = ptwriter.Memory()
    inner = ptwriter.PageTables(memory, atstwin.Tables(memory, atstwin.GUEST), first[0], 16)
    contexts = inner.allocate(0x1000, 0x1000)
    outer = ptwriter.Stage2Tables(
        memory, atstwin.Tables(memory, atstwin.STAGE2_TABLES), second[0], 16,
        start_level=0 if second[0] == 12 else 1,
    )  # fmt: skip
    va, ipa, pa = 0x1234_4000_0000, 0x4321_8000_0000, 0x5432_4000_0000
    sizes = [1 << (granule + (3 - level) * (granule - 3)) for granule, level in (first, second)]
    inner.map(va, ipa, first[1], ap=1, attrindx=0)
    probe = ipa | 0x1234_5678 & sizes[0] - 1
    outer.map(probe, pa, second[1], s2ap=3, memattr=15)
    for address, size in inner.allocate.pieces:
        for page in range(address, address + size, 1 << second[0]):
            outer.map(page, page, s2ap=3, memattr=15)
    memory.write(contexts, ptwriter.encode_cd(
        v=1, aa64=1, a=1, r=1, ips=6, t0sz=16, tg0=ptwriter.TG0_CODES[first[0]], epd1=1,
        ttb0=inner.base, mair=0xFF,
    ))  # fmt: skip
    memory.add(atstwin.STREAM_TABLE, 0x1000)
    for sid, eats in ((1, 1), (2, 2)):
        memory.write(atstwin.STREAM_TABLE + 64 * sid, ptwriter.encode_ste(
            v=1, config=7, s1contextptr=contexts, eats=eats, s2vmid=sid, s2ps=6,
            **outer.ste_fields(),
        ))  # fmt: skip
    size = min(sizes)
    iova = (va & -sizes[0]) + (probe - ipa)
    for caches in (None, Caches.small(nested="combined"), Caches.small(nested="split")):
        real = Memory()
        for base, data in memory.regions():
            real.add(data, base)
        smmu = Smmu(real, full(), strtab_base=atstwin.STREAM_TABLE, strtab_base_cfg=4, cr0=BOTH,
                    caches=caches)  # fmt: skip
        for sid in (1, 2, 1, 2):
            start = iova & -size
            for at in (iova, start, start + size - 1):
                answer = smmu.ats_request(sid, at)
                assert answer.fault is None
                assert (answer.size, rights(answer), answer.ipa) == (size, "rw", sid == 2)
                assert answer.address == (probe & -size if sid == 2 else answer.address)
                offset = at - start
                through = smmu.ats_translated(sid, answer.address + offset, write=True)
                assert through.pa == smmu.translate(sid, at, write=True).pa


@pytest.mark.rule("S3.9.1.2-7")
def test_what_is_granted_is_what_accesses_meet():
    """Without hardware updates an answer grants just the accesses that would succeed."""
    letters = set()
    for seed in range(6):
        rng = random.Random(seed)
        system = atstwin.grid_system(rng, httu=0)
        smmu = atstwin.smmu_over(system, system.memory)
        for _, _, probe in system.probes:
            for sid, ssid in rng.sample(system.usable, min(20, len(system.usable))):
                priv = rng.random() < 0.5 and ssid is not None
                answer = smmu.ats_request(sid, probe, ssid=ssid, priv=priv, execute=True)
                if answer.fault is None and answer.address is not None and answer.attr:
                    met = {
                        name: bool(smmu.translate(sid, probe, ssid=ssid, priv=priv, **access))
                        for name, access in (
                            ("r", {}), ("w", {"write": True}), ("x", {"instr": True}),
                        )
                    }  # fmt: skip
                    met["x"] = met["x"] and met["r"] and ssid is not None
                    assert rights(answer) == "".join(name for name in met if met[name])
                    letters.add(rights(answer))
    assert letters == {"r", "rw", "rx", "rwx", "w"}


@pytest.mark.rule("S3.9.1.3-8", "S3.9.1.3-9", "S13.6.3-5")
def test_split_stage_ats_gives_an_ipa_that_stage_2_translates():
    smmu = nested_system(2)
    ipa = nested.DATA + nested.RW + 0x123
    response = smmu.ats_request(nested.NESTED, nested.RW + 0x123)
    assert (response.ipa, response.address) == (True, ipa & -0x1000)
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
    quiet = nested_system(2, s2r=0)
    result = quiet.ats_translated(nested.NESTED, nested.DATA + nested.UNMAPPED)
    assert (result.action, result.fault.name, result.event) == ("abort", "F_TRANSLATION", None)


@pytest.mark.rule(
    "S3.9.1-12", "S3.9.1.1-1", "S3.9.1.3-1", "S3.9.1.3-4", "S3.9.1.3-7", "S6.3.9-7",
    "S6.3.9.6-6", "S7.3.8-1", "S7.3.8-3", "S13.6.3-4",
)
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


# What stage 2 says of execution, and which of (unprivileged, privileged) may.
EXECUTABLE = {0b00: "up", 0b01: "u", 0b10: "", 0b11: "p"}


@pytest.mark.rule("S3.9.1.3-12", "S13.1.4-3", "S13.7-12")
@EVERY_CACHE
@pytest.mark.parametrize("privcfg", range(4))
@pytest.mark.parametrize("instcfg", range(4))
def test_overrides_apply_to_the_ipas_of_split_stage_ats(instcfg, privcfg, kind):
    for xn, may in EXECUTABLE.items():
        for ovr in (0, 1):
            smmu = nested_system(
                2, {"attr_perms_ovr": ovr, "xnx": 1}, instcfg=instcfg, privcfg=privcfg
            )
            ipa = nested.DATA + nested.RW
            set_stage2_leaf(smmu, ipa, s2ap=3, xn=xn)
            smmu = with_caches(smmu, kind)
            instr = ovr and instcfg == 3
            who = "p" if ovr and privcfg == 3 else "u"
            for _ in range(2):
                result = smmu.ats_translated(nested.NESTED, ipa)
                if instr and who not in may:
                    assert (result.action, result.event.name) == ("abort", "F_PERMISSION")
                    fields = result.event.fields
                    assert (fields["InD"], fields["PnU"], fields["RnW"]) == (1, who == "p", 1)
                else:
                    assert (result.action, result.pa) == ("ok", nested.physical(ipa))
                # a write is always data
                assert smmu.ats_translated(nested.NESTED, ipa, write=True).action == "ok"


@pytest.mark.rule("S3.9.1.3-13", "S13.6.2-1")
def test_overrides_do_not_touch_translated_transactions_that_pass():
    smmu = nested_system(1, {"attr_perms_ovr": 1, "attr_types_ovr": 1, "pasidtt": 1}, instcfg=3,
                         privcfg=3, mtcfg=1, memattr=0, shcfg=2, **SKIPS)  # fmt: skip
    for ssid in (None, 1):
        result = smmu.ats_translated(nested.NESTED, 0x1234, ssid=ssid, priv=True, instr=True)
        assert (result.action, result.pa, result.attr, result.shareability) == (
            "bypass", 0x1234, 0xFF, 0,
        )  # fmt: skip


@pytest.mark.rule("S13.1.4-5", "S13.6.3-6")
def test_overrides_of_attributes_do_not_reach_the_ipas_of_split_stage_ats():
    smmu = nested_system(2, {"attr_types_ovr": 1}, mtcfg=1, memattr=0, shcfg=2, alloccfg=8)
    result = smmu.ats_translated(nested.NESTED, nested.DATA + nested.RW)
    assert (result.attr, result.shareability) == (0xFF, 3)
    assert smmu.translate(nested.SECOND, nested.DATA + nested.RW).attr == 0


@pytest.mark.rule("S3.9.1.3-10", "S3.9.1.3-11", "S13.7-9")
@EVERY_CACHE
@pytest.mark.parametrize("pasidtt", [0, 1])
def test_privilege_and_instruction_come_from_the_pasid_with_pasidtt(pasidtt, kind):
    for xn, may in EXECUTABLE.items():
        smmu = nested_system(2, {"pasidtt": pasidtt, "xnx": 1}, s1cdmax=2, s1dss=1)
        ipa = nested.DATA + nested.RW
        set_stage2_leaf(smmu, ipa, s2ap=3, xn=xn)
        smmu = with_caches(smmu, kind)
        for ssid in (None, 1):
            for priv in (False, True):
                counts = pasidtt and ssid is not None
                who = "p" if priv else "u"
                result = smmu.ats_translated(
                    nested.NESTED, ipa, ssid=ssid, priv=priv, instr=True
                )
                assert result.ssid == (ssid if pasidtt else None)
                if counts and who not in may:
                    fields = result.event.fields
                    assert (result.action, result.event.name) == ("abort", "F_PERMISSION")
                    assert (fields["InD"], fields["PnU"]) == (1, priv)
                    assert (fields["SSV"], fields["SubstreamID"]) == (1, ssid)
                else:
                    assert result.action == "ok"
                for write in (False, True):  # as data
                    assert smmu.ats_translated(
                        nested.NESTED, ipa, ssid=ssid, priv=priv, instr=write, write=write
                    )  # fmt: skip


@pytest.mark.rule("S13.7-11")
@pytest.mark.parametrize("pasidtt", [0, 1])
def test_what_a_request_is_granted_may_fail_as_a_translated_transaction(pasidtt):
    """The example of IHI 0070 13.7: without PASIDTT a privileged fetch arrives as unprivileged."""
    smmu = nested_system(
        2, {"pasidtt": pasidtt, "attr_perms_ovr": 1, "xnx": 1}, s1cdmax=2, s1dss=2, instcfg=3,
        stage1={"ap": 0},
    )  # fmt: skip
    set_stage2_leaf(smmu, nested.DATA + nested.RW, s2ap=0, xn=0b11)
    context = smmu.memory.read(nested.GUEST, 64)
    smmu.memory.write(nested.GUEST + 64, context)
    answer = smmu.ats_request(nested.NESTED, nested.RW, ssid=1, priv=True, execute=True)
    assert (answer.status, rights(answer)) == ("success", "rx")
    result = smmu.ats_translated(
        nested.NESTED, answer.address, ssid=1, priv=True, instr=True
    )
    assert result.action == ("ok" if pasidtt else "abort")
    assert (result.fault and result.fault.name) == (None if pasidtt else "F_PERMISSION")
    device = AtsDevice(smmu, nested.NESTED)
    assert device.access(nested.RW, ssid=1, priv=True, execute=True).action == result.action


@pytest.mark.parametrize("pasidtt", [0, 1])
def test_a_device_says_what_its_translated_accesses_are(pasidtt):
    """Also where it uses a translation that no longer permits them."""
    for xn, kinds in ((0b10, [(True, False), (True, True)]), (0b01, [(True, True)])):
        smmu = nested_system(
            2, {"pasidtt": pasidtt, "xnx": 1}, s1cdmax=2, s1dss=2, stage1={"ap": 3}
        )
        smmu.memory.write(nested.GUEST + 64, smmu.memory.read(nested.GUEST, 64))
        device = AtsDevice(smmu, nested.NESTED)
        accesses = [(execute, priv) for execute in (False, True) for priv in (False, True)]
        for execute, priv in accesses:
            assert device.access(nested.RW, ssid=1, execute=execute, priv=priv).action == "ok"
        set_stage2_leaf(smmu, nested.DATA + nested.RW, s2ap=3, xn=xn)
        for execute, priv in accesses:
            result = device.access(nested.RW, ssid=1, execute=execute, priv=priv)
            refused = pasidtt and (execute, priv) in kinds
            assert result.action == ("abort" if refused else "ok")


@pytest.mark.rule("S3.13.7.1-5")
@EVERY_CACHE
def test_translated_ipas_mark_the_stage_2_leaf(kind):
    smmu = nested_system(2, s2ha=1, s2hd=1)
    ipa = nested.DATA + nested.RW
    set_stage2_leaf(smmu, ipa, s2ap=1, dbm=1, af=0)
    at = stage2_leaf_at(ipa)
    smmu = with_caches(smmu, kind)
    flags = []
    for write in (False, False, True, True):
        assert smmu.ats_translated(nested.NESTED, ipa, write=write).action == "ok"
        leaf = smmu.memory.read_u64(at)
        flags.append((leaf >> 10 & 1, leaf >> 7 & 1))
    assert flags == [(1, 0), (1, 0), (1, 1), (1, 1)]


@EVERY_CACHE
@pytest.mark.parametrize("eats", [1, 2])
def test_a_page_that_was_cached_clean_is_marked_dirty_in_stage_2(eats, kind):
    smmu = nested_system(eats, s2ha=1, s2hd=1)
    ipa = nested.DATA + nested.RW
    set_stage2_leaf(smmu, ipa, s2ap=1, dbm=1)
    smmu = with_caches(smmu, kind)
    dirty = []
    for no_write in (True, True, False, False):
        response = smmu.ats_request(nested.NESTED, nested.RW, no_write=no_write)
        assert rights(response) == ("r" if no_write else "rw")
        dirty.append(smmu.memory.read_u64(stage2_leaf_at(ipa)) >> 7 & 1)
    assert dirty == [0, 0, 1, 1]


@pytest.mark.rule("S13.7-4")
def test_without_updates_a_clean_page_grants_no_write_and_a_page_without_af_nothing():
    smmu = nested_system(1, stage1={"ap": 3, "dbm": 1})
    assert rights(smmu.ats_request(nested.NESTED, nested.RW)) == "r"
    smmu = nested_system(1, cd={"ha": 1}, stage1={"ap": 3, "dbm": 1, "af": 0})
    assert rights(smmu.ats_request(nested.NESTED, nested.RW)) == "r"
    smmu = nested_system(1, stage1={"af": 0})
    assert rights(smmu.ats_request(nested.NESTED, nested.RW)) == ""
    smmu = nested_system(1, cd={"affd": 1}, stage1={"af": 0})
    assert rights(smmu.ats_request(nested.NESTED, nested.RW)) == "rw"


@pytest.mark.rule("S3.9.1.2-14")
def test_stage_2_faults_of_a_cd_or_a_table_grant_nothing():
    for changes in ({"s2ap": 0}, {"af": 0}):
        for at in (nested.CONTEXT, nested.TABLES):
            smmu = nested_system(1, cr2=REC_CFG_ATS | RECINVSID)
            set_stage2_leaf(smmu, at, **{"s2ap": 3} | changes)
            response = smmu.ats_request(nested.NESTED, nested.RW)
            assert (response.status, rights(response), response.event) == ("success", "", None)
            assert response.fault.name == ("F_PERMISSION" if "s2ap" in changes else "F_ACCESS")
            assert response.fault.class_ == ("CD" if at == nested.CONTEXT else "TT")


def with_read_only_tables(smmu):
    """The same SMMU, whose guest's tables lie in memory that takes no writes."""
    at = nested.physical(nested.TABLES)
    tables = smmu.memory.read(at, 0x4000)
    memory = Memory()
    memory.add_private(0x4000_0000, at - 0x4000_0000)
    for base, size in ((captures.STREAM_TABLE, 0x1000), (nested.STAGE2, 0x10_0000),
                       (nested.GUEST, 0x1000)):  # fmt: skip
        memory.write(base, smmu.memory.read(base, size))
    memory.add_callback(at, 0x4000, lambda address, n: tables[address - at : address - at + n])
    return Smmu(
        memory, smmu.features, strtab_base=smmu.strtab_base,
        strtab_base_cfg=smmu.strtab_base_cfg, cr0=smmu.cr0, cr2=smmu.cr2,
    )  # fmt: skip


@pytest.mark.rule("S3.9.1.2-12")
@pytest.mark.parametrize("eats", [1, 2])
def test_an_update_that_memory_refuses_is_a_completer_abort(eats):
    for cr2, recorded in ((0, False), (REC_CFG_ATS, True)):
        smmu = with_read_only_tables(
            nested_system(eats, cr2=cr2, cd={"ha": 1, "hd": 1}, stage1={"ap": 3, "dbm": 1})
        )
        response = smmu.ats_request(nested.NESTED, nested.RW)
        assert (response.status, response.fault.name) == ("CA", "F_WALK_EABT")
        assert (response.event is not None) == recorded
        assert rights(smmu.ats_request(nested.NESTED, nested.RW, no_write=True)) == "r"


@pytest.mark.rule("S3.9.1.3-15", "S7.3.7-3")
@pytest.mark.parametrize("pasidtt", [0, 1])
def test_the_default_substream_of_a_translated_transaction_counts_with_pasidtt(pasidtt):
    for s1dss, ssid, event in ((0, None, "F_STREAM_DISABLED"), (3, None, "F_STREAM_DISABLED"),
                               (2, 0, "F_STREAM_DISABLED"), (2, None, None), (1, None, None),
                               (0, 0, None), (0, 3, None), (0, 4, "C_BAD_SUBSTREAMID"),
                               (1, 4, "C_BAD_SUBSTREAMID")):  # fmt: skip
        for eats in (1, 2):
            stream = {"s1cdmax": 2, "s1dss": s1dss}
            smmu = nested_system(eats, {"pasidtt": pasidtt}, cr2=REC_CFG_ATS, **stream)
            result = smmu.ats_translated(nested.NESTED, nested.DATA + nested.RW, ssid=ssid)
            if event is None or not pasidtt:
                assert result.action == ("bypass" if eats == 1 else "ok")
            else:
                assert (result.action, result.event.name) == ("abort", event)
                smmu = nested_system(eats, {"pasidtt": pasidtt}, **stream)
                result = smmu.ats_translated(nested.NESTED, nested.DATA + nested.RW, ssid=ssid)
                assert (result.action, result.event) == ("abort", None)


@pytest.mark.rule("S3.9.1.3-16")
def test_events_of_translated_transactions_come_in_their_order():
    everything = {"cr2": REC_CFG_ATS, "features": full()}
    # a stream that may not use ATS, before its PASID
    result = small_system(eats=0, **everything).ats_translated(small.STAGE1, 0x1000, ssid=9)
    assert result.event.name == "F_TRANSL_FORBIDDEN"
    # an STE that is illegal, before ATS
    result = small_system(eats=2, **everything).ats_translated(small.STAGE1, 0x1000, ssid=9)
    assert result.event.name == "C_BAD_STE"
    # the PASID, before the address
    smmu = nested_system(2, {"pasidtt": 1}, cr2=REC_CFG_ATS, s1cdmax=2)
    assert smmu.ats_translated(nested.NESTED, 1 << 60, ssid=9).event.name == "C_BAD_SUBSTREAMID"
    assert smmu.ats_translated(nested.NESTED, 1 << 60, ssid=3).event.name == "F_ADDR_SIZE"
    # the CD does not count: nothing of it would be used
    smmu.memory.write(nested.GUEST, bytes(64))
    assert smmu.ats_translated(nested.NESTED, nested.DATA + nested.RW, ssid=0).action == "ok"


@pytest.mark.rule("S2.8-3", "S3.9.1.3-14", "S7.3.9-5")
@pytest.mark.parametrize("pasidtt", [0, 1])
def test_a_pasid_of_a_translated_transaction_counts_with_pasidtt(pasidtt):
    smmu = small_system(features=full(pasidtt=pasidtt), cr2=RECINVSID | REC_CFG_ATS)
    good = smmu.ats_translated(small.SUBSTREAMS, 0x1000, ssid=3)
    assert (good.action, good.ssid) == ("bypass", 3 if pasidtt else None)
    bad = smmu.ats_translated(small.SUBSTREAMS, 0x1000, ssid=4)
    assert bad.action == ("abort" if pasidtt else "bypass")
    assert (bad.event and bad.event.name) == ("C_BAD_SUBSTREAMID" if pasidtt else None)


@pytest.mark.rule("S3.9.1-1")
def test_without_ats_nothing_is_recorded():
    smmu = small_system(features=full(ats=0))
    assert smmu.ats_request(small.STAGE1, small.RW) == AtsResponse("UR", why=Why.ATS_ABSENT)
    result = smmu.ats_translated(small.STAGE1, 0x1000)
    assert (result.action, result.fault) == ("abort", None)


@pytest.mark.rule("S3.9.1-9")
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
        with pytest.raises(ValueError, match=f"^{name}(:| must be) "):
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


@pytest.mark.rule("S3.9.1-6")
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
    assert smmu.caches.tlb.hits == hits + (2 if kind == "split" else 1)


@pytest.mark.parametrize("pasidtt", [0, 1])
@pytest.mark.parametrize("kind", ["combined", "split"])
def test_what_ats_leaves_in_the_caches_is_not_stale(kind, pasidtt):
    smmu = with_caches(
        nested_system(
            2, {"attr_types_ovr": 1, "pasidtt": pasidtt}, mtcfg=1, memattr=5, shcfg=3, s1cdmax=2
        ),
        kind,
    )  # fmt: skip
    for page in range(0, 0x6000, 0x1000):
        for ssid in (None, 0):
            smmu.ats_request(nested.NESTED, page, ssid=ssid)
            smmu.ats_translated(nested.NESTED, nested.DATA + page, ssid=ssid)
    assert {entry.kind for entry in smmu.caches.tlb} >= {"stage 2"}
    assert smmu.stale() == []
    set_stage2_leaf(smmu, nested.DATA + nested.RW, s2ap=1)
    assert smmu.stale()


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


@pytest.mark.rule("S3.9.1-7", "S4.5.1-10")
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


@pytest.mark.rule("S3.9.1-8")
def test_invalidations_of_the_tlb_do_not_reach_devices():
    smmu, device = filled()
    for name in ("TLBI_NSNH_ALL", "TLBI_NH_ALL", "TLBI_EL2_ALL"):
        smmu.command(name)
    smmu.command("TLBI_NH_VA", ASID=7, Address=small.RW)
    smmu.command("CFGI_ALL")
    smmu.sync()
    assert held(device) == {None: PLAIN, 1: ALL_PAGES, 2: ALL_PAGES}
    assert device.invalidations == 0


@pytest.mark.rule("S3.9.1.5-1")
def test_an_invalidation_that_a_device_does_not_make_completes_all_the_same():
    smmu = small_system(cmdq_base=QUEUE + 0x8000 | 4)

    class Refusing:
        """It answers with Unsupported Request: in time, and without doing anything."""

        def atc_invalidate(self, ssid, address, size, global_):
            return True

    smmu.devices[small.STAGE1] = Refusing()
    for sid in (small.STAGE1, small.SUBSTREAMS):  # the other has no device
        smmu.command("ATC_INV", StreamID=sid, SSV=1, SubstreamID=0xFFFFF, Size=52)
        smmu.sync()
    assert smmu.read("GERROR") == smmu.read("GERRORN") and smmu.read("CMDQ_CONS") >> 24 == 0


@pytest.mark.rule("S3.9.1.4-1")
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
        with pytest.raises(ValueError, match=f"^{name} "):
            call()
    assert list(smmu.devices) == [small.STAGE1]
    with pytest.raises(ValueError, match=r"^iova must be "):
        device.access(1 << 64)
    assert repr(device) == "<AtsDevice sid=0x1 0 of 64 entries, 0 page requests outstanding>"
    device.access(small.RW)
    device.clear()
    assert len(device) == 0 and device.access(small.RW) and device.misses == 3


@pytest.mark.rule("S3.9.2-1")
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
