"""Batches that are too short for the passes by masks, or whose contexts are nothing for them."""

import numpy as np
import pytest
import twin
from test_reference import CONTEXT_TABLE, SID, Bench, default_features

from smmufast import ACTIONS, layout
from smmufast._smmu import vectors

OTHER = SID + 1


@pytest.fixture(params=["vectors", "portable"], autouse=True)
def path(request):
    was = vectors()
    vectors(request.param == "vectors")
    yield
    vectors(was)


def same(bench, rows, **access):
    """Whether a batch of (StreamID, address) gives what single calls give; the addresses found."""
    smmu = twin.smmu_of(bench)
    sid = np.array([sid for sid, _ in rows], np.uint32)
    iova = np.array([iova for _, iova in rows], np.uint64)
    found = smmu.translate_batch(sid, iova, **access)
    for (one_sid, one_iova), row in zip(rows, found, strict=True):
        one = smmu.translate(one_sid, one_iova, **access)
        assert (int(row["pa"]), ACTIONS[row["action"]]) == (one.pa or 0, one.action)
    return found["pa"].tolist()


@pytest.mark.parametrize("endi", [0, 1])
@pytest.mark.parametrize("n", [13, 15, 16, 40])
def test_contexts_that_share_a_first_table_and_read_it_as_another_level(n, endi):
    """39 bits begin at level 1, 48 bits at level 0."""
    bench = Bench(tsz=25, endi=endi)
    page = 0x50_0000
    bench.memory.add(page, 0x1000)
    bench.map(0x1000, page)
    bench.tables.write_descriptor(page + 8 * 7, 0x6003 | 1 << 10 | 1 << 6)  # a page, of level 3
    bench.write_cd(1, t0sz=16)
    bench.write_ste(OTHER, s1contextptr=CONTEXT_TABLE + 64)
    # to the other context, the page that the first one maps is a table of level 3
    rows = [(SID, 0x1008), (OTHER, 1 << 21 | 7 << 12 | 8), (SID, 1 << 21), (OTHER, 0x1000)]
    found = same(bench, (rows * n)[:n])
    assert found[:4] == [page + 8, 0x6008, 0, 0]


@pytest.mark.parametrize("affd", [0, 1])
@pytest.mark.parametrize("n", [13, 40])
def test_hardware_sets_the_access_flag_though_faults_for_it_are_off(n, affd):
    bench = Bench(default_features(httu=2))
    slot = bench.tables.slot(0x1000, 3)
    bench.map(0x1000, 0x5000, af=0)
    bench.write_cd(ha=1, affd=affd)
    assert same(bench, [(SID, 0x1000)] * n) == [0x5000] * n
    assert bench.tables.read_descriptor(slot) & layout.mask("PTE_S1", "AF")


@pytest.mark.parametrize("n", [13, 15, 16, 40])
def test_an_address_beyond_the_range_is_not_that_of_its_low_bits(n):
    bench = Bench(tsz=25)
    bench.map(0x1000, 0x5000)
    far = [0x1000, 1 << 39 | 0x1000, 1 << 63 | 0x1000, 1 << 55 | 0x1000, -1 << 39 & (1 << 64) - 1]
    found = same(bench, [(SID, iova) for iova in (far * n)[:n]])
    assert found[:5] == [0x5000, 0, 0, 0, 0]
