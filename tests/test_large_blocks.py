"""Blocks that are larger than the output address size: only their beginning translates.

Follows IHI 0070 5.2 (S2PS), 5.4 (IPS), 7.3.14; DDI 0487 D8.1.7, D8.7.1, D8.15.1, J1 StageOA.
"""

import numpy as np
import pytest
import twin
from test_reference import SID, Bench, event_record
from test_single_rules import cached
from test_stage2 import Nested, stage2_features, stage2_record

from smmufast import Caches

# granule, its tables' keywords, level of the largest block, its size, codes of IPS and their bits
LARGEST = [
    (12, {"ds": 1, "tsz": 12}, 0, 39, 0, 32),
    (12, {"ds": 1, "tsz": 12}, 0, 39, 1, 36),
    (14, {"ds": 1, "tsz": 12}, 1, 36, 0, 32),
    (16, {"tsz": 12}, 1, 42, 0, 32),
    (16, {"tsz": 12}, 1, 42, 2, 40),
]
INSIDE = [0, 0x1234_5678, -1]  # -1: the last byte with an output address


def stage1(granule_lg2, tables, level, ips):
    bench = Bench(granule_lg2=granule_lg2, **tables)
    bench.write_cd(ips=ips)
    bench.map(0, 0, level, contiguous=1)
    return bench


def stage2(granule_lg2, tables, level, s2ps):
    start = {12: -1, 14: 0, 16: 1}[granule_lg2]
    second = {"granule_lg2": granule_lg2, "start_level": start} | tables
    bench = Nested(config=0b110, second=second)
    bench.write_ste(s2ps=s2ps)
    bench.map2(0, 0, level, contiguous=1)
    return bench


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("granule_lg2", "tables", "level", "size_lg2", "code", "bits"), LARGEST)
def test_an_output_beyond_the_size_is_a_fault_wherever_the_block_begins(
    granule_lg2, tables, level, size_lg2, code, bits, stage
):
    bench = (stage1, stage2)[stage - 1](granule_lg2, tables, level, code)
    for iova in INSIDE:
        iova %= 1 << bits
        outcome = bench.translate(iova)
        assert (outcome.pa, outcome.level, outcome.page_lg2) == (iova, level, bits)
    for iova in (1 << bits, (1 << size_lg2) - 1, 1 << size_lg2 - 1):
        outcome = bench.translate(iova)
        assert outcome.event == (
            event_record("F_ADDR_SIZE", SID, write=False, event_class=2, iova=iova)
            if stage == 1
            else stage2_record("F_ADDR_SIZE", 2, ipa=iova, iova=iova)
        )
        assert outcome.level is None


@pytest.mark.parametrize(("granule_lg2", "tables", "level", "size_lg2", "code", "bits"), LARGEST)
def test_the_largest_blocks_have_no_contiguous_bit(
    granule_lg2, tables, level, size_lg2, code, bits
):
    for bench in (stage1(granule_lg2, tables, level, 6), stage2(granule_lg2, tables, level, 6)):
        outcome = bench.translate((1 << size_lg2) - 1)
        assert (outcome.page_lg2, outcome.contiguous) == (size_lg2, 0)
        (entry,) = entries(bench, (1 << size_lg2) - 1)
        assert (entry.lg2, entry.contiguous) == (size_lg2, False)
    bench.map2(1 << size_lg2, 0, level + 1, contiguous=1)
    assert bench.translate(1 << size_lg2).contiguous == 1


def entries(bench, iova):
    smmu = cached(bench, Caches.server())
    assert smmu.translate(SID, iova)
    return list(smmu.caches.tlb)


@pytest.mark.parametrize("first", [1, 2])
def test_nested_outputs_are_judged_by_each_stage(first):
    # Stage 1 with a block of 4 TiB and 36 bits, stage 2 likewise with 32, or the other way.
    sizes = {1: (0, 1), 2: (1, 0)}[first]
    bench = Nested(
        granule_lg2=16, tsz=12, second={"granule_lg2": 16, "tsz": 12, "start_level": 1}
    )
    bench.write_cd(ips=sizes[0])
    bench.write_ste(s2ps=sizes[1])
    bench.map2(0, 0, 1)  # all of stage 1, and what it needs
    Bench.map(bench, 0, 0, 1)
    found = bench.translate((1 << 32) - 1)
    assert (found.pa, found.ipa, found.page_lg2) == ((1 << 32) - 1, (1 << 32) - 1, 32)
    found = bench.translate(1 << 32)
    assert (found.fault, found.stage) == ("F_ADDR_SIZE", 3)
    assert found.event == (
        event_record("F_ADDR_SIZE", SID, write=False, event_class=2, iova=1 << 32)
        if first == 1
        else stage2_record("F_ADDR_SIZE", 2, ipa=1 << 32, iova=1 << 32)
    )


@pytest.mark.parametrize("nested", ["combined", "split"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_cached_block_answers_for_its_beginning_alone(stage, nested):
    bench = (stage1, stage2)[stage - 1](16, {"tsz": 12}, 1, 0)
    smmu = cached(bench, Caches.server(nested=nested))
    assert smmu.translate(SID, 0x1234_5678).pa == 0x1234_5678
    (entry,) = smmu.caches.tlb
    assert entry.lg2 == 32
    assert smmu.translate(SID, (1 << 32) - 1).page_lg2 == 32
    assert smmu.caches.tlb.hits == 1
    assert smmu.translate(SID, 1 << 33).fault.name == "F_ADDR_SIZE"
    # It goes with any address of the block, as software knows it.
    command = {1: ("TLBI_NH_VAA", "Address"), 2: ("TLBI_S2_IPA", "IPA")}[stage]
    smmu.command(command[0], VMID=entry.vmid, **{command[1]: 1 << 41})
    assert len(smmu.caches.tlb) == 0


@pytest.mark.parametrize("caches", [None, "combined", "split"])
@pytest.mark.parametrize("config", [0b101, 0b110, 0b111])
def test_a_batch_finds_what_single_translations_find(config, caches):
    rng = np.random.default_rng(1)
    features = stage2_features()
    bench = Nested(
        features, config=config, granule_lg2=16, tsz=12,
        second={"granule_lg2": 16, "tsz": 12, "start_level": 1},
    )  # fmt: skip
    bench.write_cd(ips=1)
    bench.write_ste(s2ps=2)
    bench.map2(0, 0, 1)
    Bench.map(bench, 0, 0, 1)
    Bench.map(bench, 1 << 42, 0, 2)
    iovas = rng.integers(0, 1 << 43, 600, dtype=np.uint64)
    iovas[::2] &= np.uint64((1 << 37) - 1)
    iovas[::3] &= np.uint64((1 << 42) - 1)
    single = twin.smmu_of(bench)
    expected = [single.translate(SID, int(iova)) for iova in iovas]
    smmu = twin.smmu_of(bench) if caches is None else cached(bench, Caches.server(nested=caches))
    for columns in (("pa", "action", "event"), None):
        for _ in range(2):
            found = smmu.translate_batch(SID, iovas, columns=columns)
            assert found["pa"].tolist() == [one.pa or 0 for one in expected]
            assert found["event"].tolist() == [
                one.event.number if one.event else 0 for one in expected
            ]
    faults = {one.fault.name for one in expected if one.fault}
    assert "F_ADDR_SIZE" in faults
    assert sum(bool(one) for one in expected) > 100
