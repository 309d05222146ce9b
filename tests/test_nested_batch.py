"""Batches through stage 2 give what single calls give, whatever bit of a table is flipped."""

import itertools

import numpy as np
import pytest
from nested import DATA, NESTED, PAGES, SECOND, scattered_nested, small_nested

from smmufast import ACTIONS
from smmufast._smmu import vectors

PAGE = 0x1000
PLACES = np.arange(0, 7 * PAGE, 0x804, dtype=np.uint64)


@pytest.fixture(params=["vectors", "portable"], autouse=True)
def path(request):
    """Which passes over a block of rows are taken."""
    was = vectors()
    vectors(request.param == "vectors")
    yield
    vectors(was)


def descriptors(smmu, sid, places):
    """Return the addresses of every descriptor that these walks read."""
    found = {}
    for iova in places:
        for fetch in smmu.translate(sid, int(iova), trace=True).fetches:
            if fetch.kind in ("TT", "S2TT"):
                found[fetch.address] = fetch.level
    return sorted(found)


def check(smmu, sid, places, **access):
    """Compare a batch, long enough for the passes over blocks, with single calls."""
    iova = np.tile(places, 1 + 100 // len(places))
    rows = smmu.translate_batch(sid, iova, **access)
    for k, address in enumerate(places):
        one = smmu.translate(sid, int(address), **access)
        some = rows[k :: len(places)]
        assert set(some["pa"]) == {one.pa or 0}
        assert {ACTIONS[action] for action in some["action"]} == {one.action}
    return rows


@pytest.mark.parametrize("bit", range(64))
@pytest.mark.parametrize("sid", [NESTED, SECOND])
def test_every_bit_of_a_descriptor(sid, bit):
    smmu = small_nested()
    places = PLACES if sid == NESTED else PLACES + np.uint64(DATA)
    found = descriptors(smmu, sid, places)
    assert len(found) > 6
    for address in found:
        old = smmu.memory.read_u64(address)
        smmu.memory.write_u64(address, old ^ 1 << bit)
        check(smmu, sid, places)
        check(smmu, sid, places, write=True, priv=bool(bit & 1))
        smmu.memory.write_u64(address, old)


@pytest.mark.parametrize("sid", [NESTED, SECOND])
def test_ordinary_rows(sid):
    smmu = small_nested()
    places = PLACES if sid == NESTED else PLACES + np.uint64(DATA)
    rows = check(smmu, sid, places)
    assert rows["pa"][2] == PAGES + PAGE + 8 and len(set(rows["action"])) > 1


def test_a_batch_sees_what_changed_since_the_last():
    smmu = small_nested()
    places = PLACES[2:4]
    before = check(smmu, NESTED, places)["pa"][0]
    leaf = smmu.translate(NESTED, int(places[0]), trace=True).fetches[-1].address
    smmu.memory.write_u64(leaf, smmu.memory.read_u64(leaf) + 0x10_0000)
    assert check(smmu, NESTED, places)["pa"][0] == before + 0x10_0000


def test_hardware_updates_are_made_in_their_turn():
    """Rows whose descriptors have no access flag update them as single calls do."""
    has = {"httu": 2}
    places = PLACES
    memories = []
    for batch in (True, False):
        smmu = small_nested(has, cd={"ha": 1, "hd": 1}, stage1={"af": 0}, s2ha=1, s2hd=1)
        iova = np.tile(places, 8)
        if batch:
            rows = smmu.translate_batch(NESTED, iova, write=True)
        else:
            rows = [smmu.translate(NESTED, int(address), write=True) for address in iova]
        memories.append((
            [(int(row["pa"]), ACTIONS[row["action"]]) for row in rows] if batch
            else [(row.pa or 0, row.action) for row in rows],
            [smmu.memory.read(region.base, min(region.size, 1 << 20))
             for region in smmu.memory.regions],
        ))  # fmt: skip
    assert memories[0] == memories[1]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("first", "second"), [*itertools.product((12, 14, 16), repeat=2)])
def test_tables_and_pages_that_stage_2_scatters(first, second, seed):
    """A table of stage 1 may be several pages of stage 2, and then lies in several places."""
    smmu, places = scattered_nested(seed, first, second)
    places = np.array(places, np.uint64)
    for access in ({}, {"write": True}, {"priv": True}, {"instr": True}):
        rows = check(smmu, NESTED, places, **access)
        assert rows["pa"].any()
        assert access or len(set(rows["action"])) > 1


@pytest.mark.parametrize("n", [15, 16, 17, 40, 128, 129, 300])
def test_any_number_of_scattered_rows(n):
    smmu, places = scattered_nested(n, 16, 12)
    iova = np.resize(np.array(places, np.uint64), n)
    rows = smmu.translate_batch(NESTED, iova)
    for row, address in zip(rows, iova.tolist(), strict=True):
        one = smmu.translate(NESTED, address)
        assert (int(row["pa"]), ACTIONS[row["action"]]) == (one.pa or 0, one.action)


@pytest.mark.parametrize("sid", [NESTED, SECOND])
def test_inputs_of_stage_2_end_at_oas_or_at_their_range(sid):
    smmu, places = scattered_nested(5, 12, 12)
    far = [DATA | 1 << bit for bit in range(40, 64)] + [DATA, places[0]]
    check(smmu, sid, np.array(far, np.uint64))
