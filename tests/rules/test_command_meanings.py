"""What commands do and leave alone: prefetch, configuration, TLB, stalls (IHI 0070 4.2 to 4.7)."""

import ptwriter
import pytest
from bench import (
    CONTEXT_TABLE,
    IOVA,
    SID,
    VMID,
    Bench,
    Nested,
    cached,
    mapped,
    nested_system,
    outcome,
    stage2_features,
)
from reference import AF, AP2, default_features
from stalls import LEAF, MAPPED, resume, stall, system

QUEUE = 0x9000_0000


def with_event_queue(smmu):
    smmu.memory.add_private(QUEUE, 0x1000)
    smmu.write("CR0", 1)
    smmu.write("EVENTQ_BASE", QUEUE | 3)
    smmu.write("CR0", 5)
    return smmu


# ------------------------------------------------------------------------------------------------
# Prefetch


@pytest.mark.rule("S4.2-2")
def test_a_prefetch_with_a_substream_that_is_not_there_does_nothing():
    for features, filled in ((default_features(), 0), (default_features(ssidsize=0), 1)):
        _, smmu, _ = mapped(features)
        with_event_queue(smmu)
        smmu.command("PREFETCH_CONFIG", StreamID=SID, SSV=1, SubstreamID=3)
        smmu.command("PREFETCH_ADDR", StreamID=SID, SSV=1, SubstreamID=3, Address=IOVA)
        assert len(smmu.caches.cd) == len(smmu.caches.tlb) == filled
        assert smmu.read("EVENTQ_PROD") == 0
    assert outcome(smmu) == 0x5000  # SSIDSIZE=0: it was as without SSV
    assert (smmu.caches.tlb.hits, smmu.caches.tlb.fills) == (1, 1)


@pytest.mark.rule("S4.2.1-2")
def test_a_prefetched_context_marks_its_stage_2_page_accessed():
    bench, _, _ = nested_system()
    bench.write_ste(s2ha=1)
    slot = bench.second.slot(CONTEXT_TABLE, 3)
    bench.second.write_descriptor(slot, bench.descriptor(slot) & ~AF)
    smmu = cached(bench)
    smmu.command("PREFETCH_CONFIG", StreamID=SID + 1)
    assert not bench.descriptor(slot) & AF
    smmu.command("PREFETCH_CONFIG", StreamID=SID)
    assert bench.descriptor(slot) & AF


@pytest.mark.rule("S4.2.2-2", "V8.5.1.2-5")
def test_a_prefetched_address_is_marked_accessed_and_never_dirty():
    bench, iova, ipa = nested_system()
    bench.write_cd(ha=1, hd=1)
    bench.write_ste(s2ha=1, s2hd=1)
    slot = bench.map(iova, ipa, af=0, ap=3, dbm=1)
    slot2 = bench.map2(ipa, 0x5000, af=0, s2ap=1, dbm=1)
    before = bench.descriptor(slot), bench.descriptor(slot2)
    smmu = cached(bench)
    smmu.command("PREFETCH_ADDR", StreamID=SID, Address=iova)
    assert (bench.descriptor(slot), bench.descriptor(slot2)) == (before[0] | AF, before[1] | AF)
    assert outcome(smmu, iova, write=True) == 0x5000
    assert not bench.descriptor(slot) & AP2


# ------------------------------------------------------------------------------------------------
# Configuration


@pytest.mark.rule("S4.3.3-2")
def test_the_cd_of_no_substream_goes_with_substream_0():
    bench, _, _ = mapped()
    bench.write_cd(1)
    bench.write_ste(s1cdmax=4, s1dss=2)
    smmu = cached(bench)
    for ssid in (None, 1):
        assert outcome(smmu, ssid=ssid) == 0x5000
    bench.write_cd(0, v=0)
    bench.write_cd(1)
    smmu.command("CFGI_CD", StreamID=SID, SubstreamID=1)
    assert outcome(smmu, ssid=1) == "C_BAD_CD"
    assert outcome(smmu) == 0x5000
    smmu.command("CFGI_CD", StreamID=SID)
    assert outcome(smmu) == "C_BAD_CD"


@pytest.mark.rule("S4.3.3-4", "S5.4.1-7")
@pytest.mark.parametrize("command", ["CFGI_CD", "CFGI_CD_ALL", "CFGI_STE"])
def test_a_cd_that_streams_share_goes_stream_by_stream(command):
    bench, _, _ = mapped()
    bench.write_ste(SID + 1)
    smmu = cached(bench)
    for sid in (SID, SID + 1):
        assert smmu.translate(sid, IOVA).pa == 0x5000
    bench.write_cd(v=0)
    smmu.command(command, StreamID=SID)
    assert outcome(smmu) == "C_BAD_CD"
    assert smmu.translate(SID + 1, IOVA).pa == 0x5000
    smmu.command(command, StreamID=SID + 1)
    assert smmu.translate(SID + 1, IOVA).fault.name == "C_BAD_CD"


@pytest.mark.rule("S4.3.3-5", "S5.3.1-1")
def test_level_1_context_descriptors_are_read_with_every_cd_that_is_not_cached():
    bench = Bench()
    bench.map(IOVA, 0x5000)
    leaf = CONTEXT_TABLE + 0x1000
    bench.write_ste(s1fmt=1, s1cdmax=7, s1dss=0)
    bench.memory.write(CONTEXT_TABLE, ptwriter.encode_l1cd(leaf))
    for index in range(2):
        bench.write_cd((leaf - CONTEXT_TABLE) // 64 + index)
    smmu = cached(bench)
    assert outcome(smmu, ssid=0) == 0x5000
    bench.memory.write(CONTEXT_TABLE, bytes(8))
    assert outcome(smmu, ssid=0) == 0x5000
    assert outcome(smmu, ssid=1) == "C_BAD_SUBSTREAMID"
    smmu.command("CFGI_CD", StreamID=SID, Leaf=1)
    assert outcome(smmu, ssid=0) == "C_BAD_SUBSTREAMID"
    bench.memory.write(CONTEXT_TABLE, ptwriter.encode_l1cd(leaf))
    assert outcome(smmu, ssid=0) == outcome(smmu, ssid=1) == 0x5000


# ------------------------------------------------------------------------------------------------
# TLB


@pytest.mark.rule("S4.4.1.1-11")
def test_a_range_that_is_not_aligned_starts_where_it_says():
    bench = Bench()
    for at in range(0, 0x80_0000, 0x20_0000):
        bench.map(at, at, 2)
    for start, left in (
        (0, {0x20_0000, 0x40_0000, 0x60_0000}),
        (0x10_0000, {0x40_0000, 0x60_0000}),
        (0x20_1000, {0, 0x60_0000}),
    ):
        smmu = cached(bench)
        for at in range(0, 0x80_0000, 0x20_0000):
            assert outcome(smmu, at) == at
        # 32 * 2^4 granules are 2 MiB.
        smmu.command("TLBI_NH_VAA", Address=start, TG=1, TTL=2, NUM=31, SCALE=4)
        assert {entry.start for entry in smmu.caches.tlb} == left


@pytest.mark.rule("S4.4.3.1-3")
def test_tlbi_s2_ipa_is_enough_for_stage_2_alone():
    bench = Nested(stage2_features(oas=5), config=0b110)
    ipa = 0x66_7788_9000
    slot = bench.map2(ipa, 0x5000)
    smmu = cached(bench)
    assert outcome(smmu, ipa) == 0x5000
    bench.second.write_descriptor(slot, 0)
    for elsewhere in ({"IPA": ipa | 1 << 50}, {"IPA": ipa ^ 0x1000}, {"IPA": ipa, "VMID": 7}):
        smmu.command("TLBI_S2_IPA", **{"VMID": VMID} | elsewhere)
        assert outcome(smmu, ipa) == 0x5000
    smmu.command("TLBI_S2_IPA", VMID=VMID, IPA=ipa)
    assert outcome(smmu, ipa) == "F_TRANSLATION"


# ------------------------------------------------------------------------------------------------
# Stalls


@pytest.mark.rule("S4.3.8-1", "S4.7.3-16")
def test_invalidations_leave_what_is_stalled_and_recorded():
    smmu, _ = system()
    told = []
    smmu.on_resume = told.append
    held = stall(smmu)
    smmu.memory.write_u64(LEAF, MAPPED)
    for command in ("CFGI_ALL", "TLBI_NSNH_ALL", "SYNC"):
        fields = {"Range": 31} if command == "CFGI_ALL" else {}
        smmu.command(command, **fields)
        assert smmu.stalls == [held] and not held.done and told == []
        assert smmu.read("EVENTQ_PROD") == 1
    resume(smmu, held, Ac=1)
    assert held.result.pa == 0x4000_7000


@pytest.mark.rule("S4.7.1-5")
def test_a_stall_of_stage_2_may_end_as_raz_wi():
    for how, action in (({"Ab": 1}, "abort"), ({}, "raz_wi")):
        bench, iova, ipa = nested_system()
        bench.write_ste(s2s=1)
        bench.second.write_descriptor(bench.second.slot(ipa, 3), 0)
        smmu = with_event_queue(cached(bench))
        assert smmu.translate(SID, iova).action == "stall"
        (held,) = smmu.stalls
        assert held.fault.s2
        smmu.command("RESUME", StreamID=SID, STAG=held.stag, **how)
        assert held.done and held.result.action == action
