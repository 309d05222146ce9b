"""Batches through stage 2 give what single calls give, whatever bit of a table is flipped."""

import itertools

import numpy as np
import pytest
from nested import (
    DATA,
    NESTED,
    PAGES,
    SECOND,
    STAGE2,
    TABLES,
    physical,
    scattered_nested,
    small_nested,
)

from smmufast import ACTIONS, layout
from smmufast._device.smmu import vectors

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


@pytest.mark.parametrize("affd", [0, 1])
@pytest.mark.parametrize("hd", [0, 1])
@pytest.mark.parametrize("sid", [NESTED, SECOND])
def test_hardware_updates_are_made_in_their_turn(sid, hd, affd):
    """Rows whose descriptors have no access flag update them as single calls do."""
    has = {"httu": 2}
    places = PLACES if sid == NESTED else PLACES + np.uint64(DATA)
    memories = []
    for batch in (True, False):
        smmu = small_nested(has, cd={"ha": 1, "hd": hd, "affd": affd}, stage1={"af": 0}, s2ha=1,
                            s2hd=hd, s2affd=affd)  # fmt: skip
        # rows that write nothing come first: the passes over blocks go ahead then
        iova = np.concatenate([np.full(32, places[2]), np.tile(places, 8)])
        if batch:
            rows = smmu.translate_batch(sid, iova, write=True)
        else:
            rows = [smmu.translate(sid, int(address), write=True) for address in iova]
        memories.append((
            [(int(row["pa"]), ACTIONS[row["action"]]) for row in rows] if batch
            else [(row.pa or 0, row.action) for row in rows],
            smmu.memory.read(STAGE2, 1 << 20), smmu.memory.read(physical(TABLES), 0x4000),
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


@pytest.mark.parametrize(("first", "second"), [(12, 12), (14, 14), (16, 12)])
def test_access_flags_of_the_pages_that_tables_lie_in_are_set(first, second):
    smmu, places = scattered_nested(
        3, first, second, has={"httu": 1}, tables={"af": 0}, s2ha=1, cd={"ha": 1}
    )
    size = 1 << 20
    unmarked = smmu.memory.read(STAGE2, size)
    found = [place for place in places if smmu.translate(NESTED, place)]
    others = 0
    for place in found[1:16]:
        after = []
        # rows that write nothing come first: the passes over blocks go ahead then
        iova = np.array(found[:1] * 32 + [place] * 40, np.uint64)
        for batch in (True, False):
            smmu.memory.write(STAGE2, unmarked)
            for each in [iova] if batch else np.split(iova, len(iova)):
                smmu.translate_batch(NESTED, each)
            after.append(smmu.memory.read(STAGE2, size))
        assert after[0] == after[1]
        smmu.memory.write(STAGE2, unmarked)
        smmu.translate(NESTED, found[0])
        others += smmu.memory.read(STAGE2, size) != after[0]
    assert others > 4


QUEUE = 0x4F00_0000


@pytest.mark.parametrize("what", ["page", "CR0"])
@pytest.mark.parametrize("sid", [NESTED, SECOND])
def test_rows_behind_a_record_see_what_its_interrupt_changed(sid, what):
    """Software answers the first record by moving the page of the rows behind it, or disables."""
    start = 0 if sid == NESTED else DATA
    iova = np.array([start + PAGE] * 20 + [start + 4 * PAGE] + [start + PAGE + 8] * 60, np.uint64)
    found = []
    for batch in (True, False):
        smmu = small_nested()
        smmu.write("CR0", layout.mask("CR0", "SMMUEN"))
        smmu.write("EVENTQ_BASE", QUEUE | 4)
        smmu.write("CR0", layout.mask("CR0", "SMMUEN", "EVENTQEN"))
        smmu.write("IRQ_CTRL", layout.mask("IRQ_CTRL", "EVENTQ_IRQEN"))
        fetches = smmu.translate(sid, start + PAGE, trace=True).fetches
        leaf = [fetch.address for fetch in fetches if fetch.kind.endswith("TT")]
        leaf = [f.address for f in fetches if f.kind == "TT"][-1] if sid == NESTED else leaf[-1]
        there = DATA + 2 * PAGE if sid == NESTED else PAGES + 2 * PAGE

        def interrupt(name, smmu=smmu, memory=smmu.memory, leaf=leaf, there=there):
            if what == "CR0":
                smmu.write("CR0", layout.mask("CR0", "EVENTQEN"))
                return
            # 48 bits of output, of which these pages use the lower 40
            memory.write_u64(leaf, memory.read_u64(leaf) & ~0xFF_FFFF_F000 | there)

        smmu.on_interrupt = interrupt
        if batch:
            found.append(smmu.translate_batch(sid, iova)["pa"].tolist())
        else:
            found.append([smmu.translate(sid, int(address)).pa or 0 for address in iova])
    assert found[0] == found[1]
    then = start + PAGE + 8 if what == "CR0" else PAGES + 2 * PAGE + 8
    assert found[0] == [PAGES + PAGE] * 20 + [0] + [then] * 60


@pytest.mark.parametrize("xnx", [0, 1])
@pytest.mark.parametrize("xn", range(4))
def test_execution_at_stage_2(xn, xnx):
    smmu = small_nested({"xnx": xnx})
    places = np.array([PAGE, PAGE + 8], np.uint64)
    fetches = smmu.translate(NESTED, PAGE, trace=True).fetches
    outer = fetches[-1].address
    inner = [fetch.address for fetch in fetches if fetch.kind == "TT"][-1]
    smmu.memory.write_u64(outer, smmu.memory.read_u64(outer) | xn << 53)
    # read-only at stage 1, or no privileged access might execute there
    smmu.memory.write_u64(inner, smmu.memory.read_u64(inner) | layout.mask("PTE_S1", "AP2"))
    succeeded = []
    for priv in (False, True):
        rows = check(smmu, NESTED, places, instr=True, priv=priv)
        succeeded.append(set(rows["action"].tolist()) == {0})
    both = [True, True]
    expected = {0: both, 1: [True, False], 2: [False, False], 3: [False, True]}[xn] if xnx else (
        both if xn < 2 else [False, False])  # fmt: skip
    assert succeeded == expected


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
