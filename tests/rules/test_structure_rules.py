"""Rules of STEs and CDs that no other test states alone, and what a change of them takes.

Follows IHI 0070 5.1 to 5.5: pointers, ILLEGAL conditions, and which fields a TLB may keep.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import ptwriter
import pytest
import small
import twin
from bench import (
    CONTEXT_TABLE,
    IOVA,
    SID,
    STREAM_TABLE,
    Bench,
    Nested,
    cached,
    is_illegal,
    mapped,
    nested_system,
    outcome,
    stage2_features,
    stage2_ste,
)
from reference import AF, default_features

from smmufast import Caches

C_BAD_STE = 4
ACCESSES = {}, {"write": True}, {"priv": True}, {"instr": True}


def flip(bench, address, bit):
    """Change one bit of a little-endian number in memory."""
    at = address + bit // 8
    bench.memory.write(at, bytes([bench.memory.read(at, 1)[0] ^ 1 << bit % 8]))


# ------------------------------------------------------------------------------------------------
# Pointers


@pytest.mark.rule("S5.1-3", "S5.2-13", "S5.3-2")
@pytest.mark.parametrize(("minor", "top"), [(0, 47), (1, 51), (2, 51), (3, 51), (4, 55)])
def test_pointers_have_the_bits_of_their_version(minor, top):
    bench = Bench(default_features(arch_minor=minor))
    bench.map(IOVA, 0x5000)
    l1std, l1cd = STREAM_TABLE + 0x800, CONTEXT_TABLE + 0x1000
    bench.regs.strtab_base = l1std
    bench.regs.strtab_base_cfg = 7 | 6 << 6 | 1 << 16
    bench.memory.write(l1std, ptwriter.encode_l1std(7, STREAM_TABLE))
    bench.write_ste(s1fmt=1, s1cdmax=7, s1dss=2, s1contextptr=l1cd)
    bench.memory.write(l1cd, ptwriter.encode_l1cd(CONTEXT_TABLE))
    assert bench.translate(IOVA).pa == 0x5000
    for address in (l1std, STREAM_TABLE + 64 * SID, l1cd):
        for bit in range(44, 56):
            flip(bench, address, bit)
            if address != STREAM_TABLE + 64 * SID or bit < 52:  # above them are other fields
                assert bench.translate(IOVA).success == (bit > top), (address, bit)
            flip(bench, address, bit)


@pytest.mark.rule("S5.2-80", "S5.4-29")
@pytest.mark.parametrize(("minor", "top"), [(0, 47), (1, 51), (3, 51), (4, 51)])
def test_table_bases_have_the_bits_of_their_version(minor, top):
    bench = Bench(default_features(arch_minor=minor), granule_lg2=16)
    bench.map(IOVA, 0x5_0000)
    second = Nested(stage2_features(arch_minor=minor), config=0b110)
    second.map2(IOVA, 0x5000)
    for system, address in ((bench, CONTEXT_TABLE + 8), (second, STREAM_TABLE + 64 * SID + 24)):
        assert system.translate(IOVA).success
        for bit in (46, 47, 48, 51, 52, 55):
            flip(system, address, bit)
            assert system.translate(IOVA).success == (bit > top), bit
            flip(system, address, bit)


@pytest.mark.rule("S5.1-4")
def test_a_stream_table_pointer_beyond_oas_is_f_ste_fetch():
    bench = Bench(default_features(oas=2))
    bench.regs.strtab_base_cfg = 7 | 6 << 6 | 1 << 16
    bench.memory.write(STREAM_TABLE, ptwriter.encode_l1std(7, 1 << 40))
    bench.memory.add((1 << 40), 0x2000)
    found = bench.translate(IOVA, sid=3)
    assert (found.action, found.fault) == ("abort", "F_STE_FETCH")
    assert int.from_bytes(found.event[24:32], "little") == 3 << 6  # bits beyond OAS are RES0
    assert [fetch[0] for fetch in found.fetches] == ["L1STD"]


# ------------------------------------------------------------------------------------------------
# ILLEGAL structures


@pytest.mark.rule("S5.2-60", "S5.4-5")
@pytest.mark.parametrize("minor", [0, 1, 3])
def test_sizes_out_of_range_are_illegal_in_v30_too(minor):
    bench = Bench(default_features(arch_minor=minor, stt=0, ds=0, vax=0))
    for tsz in (15, 40, 63):
        bench.write_cd(t0sz=tsz)
        assert bench.fault(IOVA) == "C_BAD_CD"
    for tsz in (16, 39):
        bench.write_cd(t0sz=tsz)
        assert bench.fault(IOVA) in ("F_TRANSLATION", "F_WALK_EABT")
    bench = Nested(stage2_features(arch_minor=minor, stt=0, ds=0, vax=0), config=0b110)
    for tsz, sl0 in ((15, 2), (11, 2), (40, 0), (63, 0)):
        bench.write_ste(s2t0sz=tsz, s2sl0=sl0)
        assert bench.fault(IOVA) == "C_BAD_STE"
    for tsz, sl0 in ((16, 2), (39, 0)):
        bench.write_ste(s2t0sz=tsz, s2sl0=sl0)
        assert bench.fault(IOVA) != "C_BAD_STE"


@pytest.mark.rule(
    "S5.2-58", "S5.2-59", "S5.2-61", "S5.2-79", "V8.1.10-2", "V8.1.10-3", "V8.1.10-4",
    "V8.2.2-2", "V8.2.8.2-1", "V8.2.8.2-2", "V8.2.9.2-1", "V8.2.9.2-2", "V8.2.10.2-1",
)
@pytest.mark.parametrize("stt", [0, 1])
@pytest.mark.parametrize("ds", [0, 1])
@pytest.mark.parametrize("oas", [0, 2, 3, 4, 5, 6])
def test_shapes_of_stage_2_are_legal_as_the_twin_finds_them(oas, ds, stt):
    """test_stage2.py compares the twin with the tables of DDI 0487 D8.1.10 and D8.2."""
    features = stage2_features(oas=oas, ds=ds, stt=stt)
    shapes = [
        {"s2tg": tg, "s2sl0": sl0, "s2sl0_2": sl2, "s2ds": s2ds, "s2t0sz": t0sz}
        for tg, sl0, sl2, s2ds, t0sz in itertools.product(
            range(3), range(4), (0, 1), (0, 1), range(10, 50)
        )
    ]
    table = b"".join(stage2_ste(**shape).to_bytes(64, "little") for shape in shapes)
    smmu = twin.smmu_of(
        SimpleNamespace(
            features=features,
            regions=lambda: [(STREAM_TABLE, table)],
            regs=SimpleNamespace(strtab_base=STREAM_TABLE, strtab_base_cfg=12, cr0=5, cr2=2),
        )
    )
    rows = smmu.translate_batch(np.arange(len(shapes)), np.zeros(len(shapes), np.uint64))
    found = [event == C_BAD_STE for event in rows["event"].tolist()]
    assert found == [is_illegal(features, **shape) for shape in shapes]
    assert 50 < found.count(False) < found.count(True)


@pytest.mark.rule("S5.2-71", "S5.4-14")
def test_affd_is_ignored_with_hardware_update():
    for stage in (1, 2):
        for update in (0, 1):
            bench, iova, ipa = nested_system()
            slot = bench.map(iova, ipa, af=0) if stage == 1 else bench.map2(ipa, 0x5000, af=0)
            assert bench.fault(iova) == "F_ACCESS"
            if stage == 1:
                bench.write_cd(affd=1, ha=update)
            else:
                bench.write_ste(s2affd=1, s2ha=update)
            unmarked = bench.descriptor(slot)
            assert bench.translate(iova).pa == 0x5000
            assert bool(bench.descriptor(slot) & AF) == bool(update)
            bench.memory.write(slot, unmarked.to_bytes(8, "little"))
            batch = twin.smmu_of(bench).translate_batch(SID, np.full(40, iova, np.uint64))
            assert set(batch["pa"].tolist()) == {0x5000}
            assert bool(bench.descriptor(slot) & AF) == bool(update)


@pytest.mark.rule("S5.4.1.1-1")
def test_epd_and_sizes_decide_together():
    for half, iova in ((0, IOVA), (1, (1 << 64) - 0x1000)):
        other = 1 - half
        good = {f"t{half}sz": 16, f"t{other}sz": 16, "tg1": 2, "ttb0": 0x1000, "ttb1": 0x1000}
        for fields, fault in (
            ({f"epd{half}": 1, f"epd{other}": 0}, "F_TRANSLATION"),
            ({f"epd{half}": 1, f"epd{other}": 1, f"t{half}sz": 63}, "F_TRANSLATION"),
            ({f"epd{half}": 1, f"epd{other}": 1, f"t{other}sz": 63}, "F_TRANSLATION"),
            ({f"epd{half}": 1, f"epd{other}": 0, f"t{half}sz": 63}, "F_TRANSLATION"),
            ({f"epd{half}": 1, f"epd{other}": 0, f"t{other}sz": 63}, "C_BAD_CD"),
            ({f"epd{half}": 0, f"epd{other}": 1, f"t{half}sz": 63}, "C_BAD_CD"),
        ):
            bench = Bench()
            bench.write_cd(**good | fields)
            assert bench.fault(iova) == fault, (half, fields)


# ------------------------------------------------------------------------------------------------
# What a change takes


def rows(smmu):
    """What a stream's accesses find: one by one, and in a batch that a vector driver takes."""
    found = []
    for access in ACCESSES:
        one = small.row(smmu.translate(SID, IOVA, **access))
        batch = smmu.translate_batch(
            SID, np.full(40, IOVA, np.uint64), **access, columns=small.ALL)  # fmt: skip
        assert set(small.rows(batch)) == {one}
        found.append(one)
    return found


@pytest.mark.rule("S5.2.1-4")
def test_a_change_of_config_takes_no_tlb_invalidation():
    bench, smmu, slot = mapped()
    assert outcome(smmu) == 0x5000
    bench.tables.write_descriptor(slot, 0)
    bench.write_ste(config=0b100)
    smmu.command("CFGI_STE", StreamID=SID)
    assert outcome(smmu) == IOVA
    bench.write_ste(config=0b101)
    smmu.command("CFGI_STE", StreamID=SID)
    assert outcome(smmu) == 0x5000


@pytest.mark.rule("S5.2.1-5")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"mtcfg": 1, "memattr": 5}, {"mtcfg": 1, "memattr": 0}, {"alloccfg": 8},
        {"shcfg": 2}, {"privcfg": 2}, {"privcfg": 3}, {"instcfg": 3},
    ],
)  # fmt: skip
def test_overrides_of_an_ste_take_no_tlb_invalidation(fields, nested):
    bench = Nested() if nested else Bench()
    bench.map(IOVA, 0x5000, ap=0, attrindx=1, pxn=1)
    if nested:
        bench.map2(0x5000, 0x5000, memattr=15)
    smmu = cached(bench)
    before = rows(smmu)
    bench.write_ste(**fields)
    assert rows(smmu) == before
    smmu.command("CFGI_STE", StreamID=SID)
    assert rows(smmu) == rows(cached(bench))
    if not {"mtcfg", "alloccfg", "shcfg"} & set(fields):
        assert rows(smmu) != before


def test_overrides_that_stage_2_alone_combines_take_no_tlb_invalidation():
    bench = Nested(config=0b110)
    bench.map2(IOVA, 0x5000, memattr=15)
    smmu = cached(bench)
    seen = [rows(smmu)]
    for fields in ({"mtcfg": 1, "memattr": 5}, {"memattr": 0}, {"memattr": 15, "alloccfg": 8},
                   {"shcfg": 2}):  # fmt: skip
        bench.write_ste(**fields)
        smmu.command("CFGI_STE", StreamID=SID)
        seen.append(rows(smmu))
        assert seen[-1] == rows(cached(bench))
        assert seen[-1] != seen[-2]


@pytest.mark.rule("S5.2.1-6")
def test_entries_of_another_world_are_found_when_it_comes_back():
    bench, smmu, slot = mapped()
    assert outcome(smmu) == 0x5000
    bench.tables.write_descriptor(slot, 0)
    for strw, found in ((2, "F_TRANSLATION"), (0, 0x5000)):
        bench.write_ste(strw=strw)
        smmu.command("CFGI_STE", StreamID=SID)
        assert outcome(smmu) == found


@pytest.mark.rule("S5.4-25", "V8.3.1.2-4")
def test_the_asid_of_el2_is_ignored():
    bench = Bench()
    slot = bench.tables.slot(IOVA, 3)
    bench.map(IOVA, 0x5000, ng=1)
    bench.write_ste(strw=2)
    bench.write_ste(SID + 1, s1contextptr=CONTEXT_TABLE + 64)
    bench.write_cd(asid=3)
    bench.write_cd(1, asid=4)
    for cr2, shared in ((0b10, True), (0b11, False)):
        bench.regs.cr2 = cr2
        found = bench.translate(IOVA)
        assert (found.asid, found.ng) == ((0, 0) if shared else (3, 1))
        smmu = cached(bench)
        result = smmu.translate(SID, IOVA)
        assert (result.pa, result.is_global) == (0x5000, shared)
        (entry,) = smmu.caches.tlb
        assert entry.asid == (0 if shared else 3)
        kept = bench.tables.read_descriptor(slot)
        bench.tables.write_descriptor(slot, 0)
        assert bool(smmu.translate(SID + 1, IOVA)) == shared
        bench.tables.write_descriptor(slot, kept)


@pytest.mark.rule("S5.4.1-6")
def test_how_faults_end_takes_no_tlb_invalidation():
    bench = Bench(default_features(stall_model=0, stall_max=4))
    slot = bench.tables.slot(IOVA, 3)
    bench.map(IOVA, 0x5000, ap=2)
    smmu = cached(bench)
    assert smmu.translate(SID, IOVA, priv=True).pa == 0x5000
    bench.tables.write_descriptor(slot, 0)
    for a, r, s, action in ((1, 1, 0, "abort"), (0, 1, 0, "raz_wi"), (0, 0, 0, "raz_wi"),
                            (0, 0, 1, "stall")):  # fmt: skip
        bench.write_cd(a=a, r=r, s=s)
        smmu.command("CFGI_CD", StreamID=SID)
        result = smmu.translate(SID, IOVA)
        assert (result.action, result.fault.name) == (action, "F_PERMISSION")
        assert (result.event is not None) == bool(r or s)


def test_epd_is_asked_before_the_tlb():
    bench, smmu, slot = mapped()
    assert outcome(smmu) == 0x5000
    bench.tables.write_descriptor(slot, 0)
    for field in ("epd0", "e0pd0"):
        for value, found in ((1, "F_TRANSLATION"), (0, 0x5000)):
            bench.write_cd(**{field: value})
            smmu.command("CFGI_CD", StreamID=SID)
            counted = smmu.caches.tlb.hits, smmu.caches.tlb.misses
            assert outcome(smmu) == found
            if value:
                assert (smmu.caches.tlb.hits, smmu.caches.tlb.misses) == counted
            batch = smmu.translate_batch(SID, np.full(40, IOVA, np.uint64))
            assert set(batch["pa"].tolist()) == {found if found == 0x5000 else 0}


def test_copies_of_a_structure_that_a_cache_holds_count_until_their_command():
    bench, iova, _ = nested_system()
    smmu = cached(bench, Caches.server())
    assert outcome(smmu, iova) == 0x5000
    bench.write_ste(s2vmid=7)
    assert smmu.translate(SID, iova).vmid != 7
    smmu.command("CFGI_STE", StreamID=SID)
    assert smmu.translate(SID, iova).vmid == 7
