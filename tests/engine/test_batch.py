"""Batches that are too short for the passes by masks, or whose contexts are nothing for them."""

from functools import partial

import numpy as np
import ptwriter
import pytest
import twin
from bench import CONTEXT_TABLE, SID, Bench, nested_system
from rawfeatures import raw_of
from reference import default_features

from smmufast import ACTIONS, Caches, Memory, Smmu, layout
from smmufast._device.smmu import vectors

OTHER = SID + 1


@pytest.fixture(params=["vectors", "portable"], autouse=True)
def path(request):
    was = vectors()
    vectors(request.param == "vectors")
    yield
    vectors(was)


def by_columns(smmu, sid, iova, **access):
    """A batch whose columns are arrays of their own, as some passes over blocks want them."""
    kinds = {"pa": np.uint64, "action": np.uint8, "event": np.uint8}
    out = {name: np.empty(len(iova), kind) for name, kind in kinds.items()}
    return smmu.translate_batch(sid, iova, out=out, **access)


def same(bench, rows, **access):
    """Whether batches of (StreamID, address) give what single calls give; the addresses found."""
    smmu = twin.smmu_of(bench)
    sids = np.array([sid for sid, _ in rows], np.uint32)
    iovas = np.array([iova for _, iova in rows], np.uint64)
    batches = [(smmu.translate_batch, sids), (partial(by_columns, smmu), sids)]
    if len(set(sids.tolist())) == 1:
        batches += [(face, int(sids[0])) for face, _ in batches]
    found = []
    for face, sid in batches:
        columns = face(sid, iovas, **access)
        actions = [ACTIONS[action] for action in columns["action"]]
        found.append(list(zip(columns["pa"].tolist(), actions, strict=True)))
    single = [smmu.translate(*row, **access) for row in rows]
    expected = [(one.pa or 0, one.action) for one in single]
    assert all(each == expected for each in found)
    return [pa for pa, _ in expected]


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


@pytest.mark.parametrize(("granule_lg2", "level"), [(12, 0), (14, 1), (16, 1)])
def test_blocks_at_levels_that_have_none(granule_lg2, level):
    bench = Bench(default_features(oas=5), granule_lg2=granule_lg2)
    bench.map(0, 0, level)  # AF=1, and whatever else a leaf needs
    assert same(bench, [(SID, iova) for iova in range(0, 40 << 12, 1 << 12)]) == [0] * 40


def in_sequence(bench, iova, step, n, **access):
    """As same(), for one stream: these rows may stay with one table."""
    return same(bench, [(SID, iova + step * i) for i in range(n)], **access)


def test_a_sequence_ends_at_a_block_at_a_level_that_has_none():
    """The rows before it are in one table, so that the next ones are looked for by themselves."""
    bench = Bench(granule_lg2=14)
    edge, page, n = 1 << 36, 1 << 14, 400
    for i in range(n):
        bench.map(edge - page * (n - i), 0x8000_0000 + page * i)
    bench.map(edge, 0, 1)
    found = in_sequence(bench, edge - page * n, page, n + 300)
    assert found == [0x8000_0000 + page * i for i in range(n)] + [0] * 300


@pytest.mark.parametrize("order", ["sequence", "any"])
@pytest.mark.parametrize("had", [0, 1])
@pytest.mark.parametrize(
    ("flags", "access", "wxn"),
    [
        ({"aptable": 1}, {}, 0),
        ({"aptable": 2}, {"write": True}, 0),
        ({"pxntable": 1}, {"priv": True, "instr": True}, 0),
        ({"xntable": 1}, {"instr": True}, 0),
        ({"aptable": 2}, {"instr": True}, 1),  # what cannot be written may be executed
    ],
)
@pytest.mark.parametrize("level", [1, 2])
def test_many_pages_below_a_table_that_takes_permissions_away(
    level, flags, access, wxn, had, order
):
    bench = Bench()
    for at in (1, 2, 3):
        bench.tables.slot(0, at, **(flags if at == level + 1 else {}))
    ap = 0 if "priv" in access else 1
    for i in range(512):
        bench.map(i << 12, 0x8000_0000 + (i << 12), ap=ap)
    bench.write_cd(had0=had, wxn=wxn)
    if order == "sequence":
        found = in_sequence(bench, 0, 1 << 12, 512, **access)
    else:
        pages = np.random.default_rng(1).permutation(512).tolist()
        found = same(bench, [(SID, page << 12) for page in pages], **access)
    assert [pa != 0 for pa in found] == [had != wxn] * 512


QUEUE = 0x9000_0000


def recording(bench, change, caches=None):
    """A Smmu over the very bytes of a Bench, whose first event lets software change something."""
    memory = Memory()
    for base, data in bench.regions():
        memory.add(data, base)
    memory.add_private(QUEUE, 0x1000)
    features = raw_of(bench.features)
    registers = vars(bench.regs) | {"eventq_base": QUEUE | 5}
    smmu = Smmu(memory, features, caches=caches, **registers)
    smmu.write("IRQ_CTRL", layout.mask("IRQ_CTRL", "EVENTQ_IRQEN"))
    smmu.on_interrupt = lambda name: change(smmu)
    return smmu


GOOD, BAD = 0x1000, 0x40_0000


def by_batch_and_singly(build, sids, behind):
    """Rows around one that faults, by a batch and one by one: addresses of both.

    build() makes a Smmu; `sids` are the rows' StreamIDs in turn.
    """
    iova = [GOOD] * 20 + [BAD] + [GOOD] * behind
    sid = [sids[i % len(sids)] for i in range(len(iova))]
    smmu = build()
    one_pair = len(sids) == 1
    rows = smmu.translate_batch(
        sid[0] if one_pair else np.array(sid, np.uint32), np.array(iova, np.uint64)
    )["pa"].tolist()
    smmu = build()
    return rows, [smmu.translate(s, a).pa or 0 for s, a in zip(sid, iova, strict=True)]


@pytest.mark.parametrize("behind", [20, 300])
@pytest.mark.parametrize("sids", [[SID], [SID, OTHER]])
@pytest.mark.parametrize("what", ["leaf", "table", "CD", "STE"])
def test_rows_behind_a_record_see_what_its_interrupt_changed(what, sids, behind):
    """Software answers the first record, which is in the queue while the batch goes on."""

    def build():
        bench = Bench()
        bench.map(GOOD, 0x5000)
        bench.write_ste(OTHER)
        other = ptwriter.PageTables(bench.memory, bench.allocate, 12, 16)
        other.map(GOOD, 0x7000, ap=1)

        def change(smmu):
            if what == "leaf":
                bench.map(GOOD, 0x7000)
            elif what == "table":
                bench.tables.write_descriptor(
                    bench.tables.slot(GOOD, 2), other.read_descriptor(other.slot(GOOD, 2))
                )
            elif what == "CD":
                bench.write_cd(ttb0=other.base)
            else:
                for sid in (SID, OTHER):
                    bench.write_ste(sid, config=0)

        return recording(bench, change)

    rows, singly = by_batch_and_singly(build, sids, behind)
    assert rows == singly
    assert rows == [0x5000] * 20 + [0] + [0 if what == "STE" else 0x7000] * behind


@pytest.mark.parametrize("caches", [Caches.server, lambda: None], ids=["server", "none"])
@pytest.mark.parametrize("what", ["STE", "CR0", "STRTAB_BASE_CFG"])
def test_rows_behind_a_record_meet_the_configuration_that_its_interrupt_left(what, caches):
    def build():
        bench = Bench()
        bench.map(GOOD, 0x5000)

        def change(smmu):
            if what == "STE":
                bench.write_ste(config=0)
                smmu.command("CFGI_STE", StreamID=SID)
            else:
                smmu.write("CR0", layout.mask("CR0", "EVENTQEN"))
                if what == "STRTAB_BASE_CFG":
                    smmu.write(what, 1)  # two streams
                    smmu.write("CR0", layout.mask("CR0", "EVENTQEN", "SMMUEN"))

        return recording(bench, change, caches())

    rows, singly = by_batch_and_singly(build, [SID], 60)
    assert rows == singly
    assert rows == [0x5000] * 20 + [0] + [GOOD if what == "CR0" else 0] * 60


def test_hits_meet_e0pd_as_soon_as_the_cd_has_it():
    bench = Bench()
    bench.map(GOOD, 0x5000)
    smmu = recording(bench, lambda smmu: None, Caches.server())
    iova = np.full(60, GOOD, np.uint64)
    assert set(smmu.translate_batch(SID, iova)["pa"].tolist()) == {0x5000}
    bench.write_cd(e0pd0=1)
    smmu.command("CFGI_CD", StreamID=SID)
    assert smmu.translate(SID, GOOD).fault.name == "F_TRANSLATION"
    assert set(smmu.translate_batch(SID, iova)["pa"].tolist()) == {0}
    assert set(smmu.translate_batch(SID, iova, priv=True)["pa"].tolist()) == {0x5000}


def test_the_region_of_a_table_may_end_in_its_middle():
    """What lies behind the region belongs to the host, and looks like more of the table."""
    bench = Bench(granule_lg2=14)
    page, n = 1 << 14, 2048
    for i in range(n):
        bench.map(page * i, 0x8000_0000 + page * i)
    table = bench.tables.slot(0, 3)
    assert table % page == 0
    memory = Memory()
    for base, data in bench.regions():
        if base <= table < base + len(data):
            memory.add(memoryview(data)[: table - base + page // 2], base)
        else:
            memory.add(data, base)
    features = raw_of(bench.features)
    smmu = Smmu(memory, features, **vars(bench.regs))
    for step in (page, page + 8, 5 * page):
        iova = np.arange(0, page * n, step, dtype=np.uint64)
        found = smmu.translate_batch(SID, iova, columns=["pa", "fault"])
        short = by_columns(smmu, SID, iova)["pa"].tolist()
        assert short == found["pa"].tolist() == smmu.translate_batch(SID, iova)["pa"].tolist()
        half = page * n // 2
        assert short == [0x8000_0000 + a if a < half else 0 for a in iova.tolist()]
        assert {int(f) for a, f in zip(iova, found["fault"], strict=True) if a >= half} == {0x0B}


@pytest.mark.parametrize("face", [Smmu.translate_batch, by_columns])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
def test_writes_to_cached_clean_pages_mark_each_dirty(stage, each, face):
    bench, iova, ipa = nested_system()
    bench.write_ste(s2ha=1, s2hd=1)
    bench.write_cd(ha=1, hd=1)
    pages, slots = range(0, 6 << 12, 1 << 12), []
    for page in pages:
        flags = {"ap": 3, "dbm": 1} if stage == 1 else {}
        first = bench.map(iova + page, ipa + page, ng=1, **flags)
        second = bench.map2(ipa + page, 0x5000 + page,
                            **({"s2ap": 1, "dbm": 1} if stage == 2 else {}))  # fmt: skip
        slots.append(first if stage == 1 else second)
    smmu = recording(bench, lambda smmu: None, Caches(tlb=(8, 4), ste=(1, 4), cd=(1, 4)))
    rows = np.repeat(np.array([iova + page for page in pages], np.uint64), 40)
    assert face(smmu, SID, rows)["pa"].all()
    clean = [bench.descriptor(slot) for slot in slots]
    write = np.ones(len(rows), bool) if each else True
    assert face(smmu, SID, rows, write=write)["pa"].all()
    bit = layout.mask("PTE_S1", "AP2") if stage == 1 else layout.mask("PTE_S2", "S2AP1")
    assert [bench.descriptor(slot) for slot in slots] == [d ^ bit for d in clean]


@pytest.mark.parametrize("face", [Smmu.translate_batch, by_columns])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
def test_hits_ask_the_permissions_of_both_stages(stage, each, face):
    bench, iova, ipa = nested_system()
    for i in range(4):
        # pages 1 and 3 are read-only at one stage
        bench.map(iova + (i << 12), ipa + (i << 12), ng=1, ap=3 if stage == 1 and i % 2 else 1)
        bench.map2(ipa + (i << 12), 0x5000 + (i << 12), s2ap=1 if stage == 2 and i % 2 else 3)
    smmu = recording(bench, lambda smmu: None, Caches(tlb=(8, 4), ste=(1, 4), cd=(1, 4)))
    rows = np.repeat(np.arange(4, dtype=np.uint64) << np.uint64(12), 40) + np.uint64(iova)
    assert face(smmu, SID, rows)["pa"].all()
    write = np.ones(len(rows), bool) if each else True
    found = face(smmu, SID, rows, write=write)["pa"].tolist()
    assert found == [(0x5000 + (i // 40 << 12)) * (i // 40 % 2 == 0) for i in range(160)]


def test_hits_are_of_the_very_page():
    """Pages of one set, of which what is compared first agrees; it is written again here."""
    rng = np.random.default_rng(2)
    pages = np.unique(rng.integers(0, 1 << 36, 1 << 18, np.uint64))
    # VALID, the world NS_EL1 (0), the kind stage 1, the size; no VMID, ASID 3
    key = (1 << 63 | 1 << 38 | 12 << 32 | 3) * 0x5A308D33 % (1 << 64)
    found = (pages * np.uint64(0x3C6EF373) + np.uint64(key)) >> np.uint64(24)
    found = found & np.uint64(0xFFFF_FFFF) | np.uint64(1)
    order = np.argsort(found, kind="stable")
    same_print = np.flatnonzero(found[order][1:] == found[order][:-1])
    assert len(same_print) >= 8
    bench = Bench()
    bench.write_cd(asid=3)
    pairs = [[int(pages[order[at + i]]) << 12 for i in (0, 1)] for at in same_print[:8]]
    for mapped, _ in pairs:
        bench.map(mapped, 0x5000, ng=1)
    for mapped, other in pairs:
        smmu = recording(bench, lambda smmu: None, Caches(tlb=(1, 4), ste=(1, 4), cd=(1, 4)))
        rows = np.array([mapped] * 20 + [other] + [mapped] * 4, np.uint64)
        assert smmu.translate_batch(SID, rows)["pa"].tolist() == [0x5000] * 20 + [0] + [0x5000] * 4
