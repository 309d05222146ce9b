"""Rules of translation tables that no other test states alone, each against the twin too.

Follows DDI 0487 D8.2 to D8.7 and D8.15, as IHI 0070 3.4, 3.13 and 13.1 use them.
"""

import numpy as np
import pytest
import twin
from bench import SID, Bench, Nested, cached, nested_system, stage2_record
from reference import AF, AP2, CLASS_IN, CLASS_TT, PX, S2AP1, default_features, event_record

from smmufast import Caches, Memory, Smmu

IOVA = 0x1234_0000
SHAPES = [(12, 0), (12, 1), (14, 0), (14, 1), (16, 0)]
# Bits of a table descriptor that neither stage looks at: software's, RES0, and NSTable, which
# is of Secure streams.  Bits of the address depend on the format.
TABLE_BITS = {2, 3, 4, 5, 6, 7, 10, 11, 50, *range(51, 59), 63}
# Likewise of leaves: NS, nG of stage 2 aside; GP; software's; PBHA; [63].
LEAF_BITS = {50, *range(55, 64)}


def told(outcome):
    """What a translation says."""
    return outcome.pa, outcome.attr, outcome.sh, outcome.perm, outcome.perm_s1, outcome.page_lg2


def format_bits(granule_lg2, ds):
    """Bits of addresses that a descriptor of this format does not have, [49:8] alone."""
    if granule_lg2 == 16:
        return {48, 49}
    return set(range(12, granule_lg2)) | (set() if ds else {48, 49})


def first_levels(granule_lg2, ds):
    """Keywords of stage-2 tables: the level where they start, and the size of the input."""
    return {"granule_lg2": granule_lg2, "ds": bool(ds), "tsz": 24,
            "start_level": {12: 1, 14: 2, 16: 2}[granule_lg2]}  # fmt: skip


@pytest.mark.rule("V8.2.5.2-3", "V8.2.6.2-1", "V8.3.1.1-2")
@pytest.mark.parametrize(("granule_lg2", "ds"), SHAPES)
def test_bits_of_table_descriptors_without_effect_change_nothing(granule_lg2, ds):
    ignored = TABLE_BITS | format_bits(granule_lg2, ds) | (set() if ds else {8, 9})
    bench = Bench(granule_lg2=granule_lg2, ds=ds)
    bench.map(IOVA, 0x5_0000)
    second = Nested(config=0b110, second=first_levels(granule_lg2, ds))
    second.write_ste(s2ds=ds)
    second.map2(IOVA, 0x5_0000)
    for system, tables, more in ((bench, bench.tables, set()), (second, second.second,
                                                                set(range(59, 63)))):  # fmt: skip
        slot = tables.slot(IOVA, 2)
        sound = tables.read_descriptor(slot)
        expected = told(system.translate(IOVA))
        assert expected[0] == 0x5_0000
        for bit in sorted(ignored | more):
            tables.write_descriptor(slot, sound ^ 1 << bit)
            assert told(system.translate(IOVA)) == expected, bit
        tables.write_descriptor(slot, sound ^ 1 << 20)
        assert told(system.translate(IOVA)) != expected


@pytest.mark.rule("V8.2.8-3", "V8.3.1.2-3")
@pytest.mark.parametrize("level", [2, 3])
@pytest.mark.parametrize(("granule_lg2", "ds"), SHAPES)
def test_bits_of_leaves_without_effect_change_nothing(granule_lg2, ds, level):
    shift = granule_lg2 + (3 - level) * (granule_lg2 - 3)
    low = {bit for bit in range(12, shift) if granule_lg2 != 16 or bit > 15}
    ignored = LEAF_BITS | format_bits(granule_lg2, ds) | low
    bench = Bench(granule_lg2=granule_lg2, ds=ds)
    bench.map(IOVA, 1 << 30, level)
    second = Nested(config=0b110, second=first_levels(granule_lg2, ds))
    second.write_ste(s2ds=ds)
    second.map2(IOVA, 1 << 30, level)
    for system, tables, more in ((bench, bench.tables, {5}), (second, second.second, {11})):
        slot = tables.slot(IOVA, level)
        sound = tables.read_descriptor(slot)
        expected = told(system.translate(IOVA))
        assert expected[0] == 1 << 30 | IOVA & (1 << shift) - 1
        for bit in sorted(ignored | more):
            tables.write_descriptor(slot, sound ^ 1 << bit)
            assert told(system.translate(IOVA)) == expected, bit
        tables.write_descriptor(slot, sound ^ 1 << 30)
        assert told(system.translate(IOVA)) != expected


@pytest.mark.parametrize("oas", [0, 4, 5])
def test_upper_address_bits_of_64k_descriptors_count_whatever_oas_is(oas):
    for level in (2, 3):
        bench = Bench(default_features(oas=oas), granule_lg2=16)
        bench.map(IOVA, 1 << 30)
        slot = bench.tables.slot(IOVA, level)
        sound = bench.tables.read_descriptor(slot)
        for bit in range(12, 16):
            bench.tables.write_descriptor(slot, sound | 1 << bit)
            assert bench.fault(IOVA) == "F_ADDR_SIZE"
        bench.tables.write_descriptor(slot, sound)
        assert bench.translate(IOVA).success


@pytest.mark.rule("V8.15.1.1-1")
def test_an_invalid_descriptor_outranks_its_address():
    for level in (0, 1, 2, 3):
        bench = Bench()
        bench.write_cd(ips=0)
        bench.map(IOVA, 0x5000)
        slot = bench.tables.slot(IOVA, level)
        sound = bench.tables.read_descriptor(slot)
        for kind in (0b00, 0b10) + ((0b01,) if level in (0, 3) else ()):
            bench.tables.write_descriptor(slot, 1 << 40 | sound & ~3 | kind)
            assert bench.fault(IOVA) == "F_TRANSLATION"
        bench.tables.write_descriptor(slot, 1 << 40 | sound)
        assert bench.fault(IOVA) == "F_ADDR_SIZE"


@pytest.mark.rule("V8.15.1.2-1")
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_a_table_beyond_the_output_size_is_a_fault(level):
    bench = Bench()
    bench.write_cd(ips=1)
    bench.map(IOVA, 0x5000)
    slot = bench.tables.slot(IOVA, level)
    for bit in (36, 40, 47):
        bench.tables.write_descriptor(slot, bench.tables.read_descriptor(slot) | 1 << bit)
        outcome = bench.translate(IOVA)
        assert outcome.event == event_record(
            "F_ADDR_SIZE", SID, write=False, event_class=CLASS_IN, iova=IOVA
        )
    second = Nested(config=0b110)
    second.write_ste(s2ps=1)
    second.map2(IOVA, 0x5000)
    if level:
        slot = second.second.slot(IOVA, level)
        second.second.write_descriptor(slot, second.second.read_descriptor(slot) | 1 << 36)
        outcome = second.translate(IOVA)
        assert outcome.event == stage2_record("F_ADDR_SIZE", CLASS_IN, ipa=IOVA, iova=IOVA)


@pytest.mark.parametrize("had", [0, 1])
def test_tables_restrict_under_stage_2_and_through_walk_caches(had):
    for level, bits in ((0, 1), (1, 2), (2, 8), (0, 4)):
        bench, iova, ipa = nested_system()
        bench.map(iova + 0x1000, ipa, ap=1)
        bench.write_cd(had0=had)
        slot = bench.tables.slot(iova, level)
        # bits of {PXNTable, UXNTable, APTable0, APTable1}
        bench.tables.write_descriptor(slot, bench.descriptor(slot) | bits << 59)
        perm = {0: 0x3F, 1: 0x1F, 2: 0x3B, 4: 0x3C, 8: 0x2D}[0 if had else bits]
        perm &= ~PX  # what the unprivileged may write
        if bits in (4, 8) and not had:
            perm |= PX
        found = bench.translate(iova, priv=True)
        assert found.perm == found.perm_s1 == perm
        for nested in ("combined", "split"):
            smmu = cached(bench, Caches.server(nested=nested))
            for at in (0, 0x1000):  # the second through tables that are cached
                assert smmu.translate(SID, iova + at, priv=True).perm == perm
                assert len(smmu.caches.walk1) > 0


# ------------------------------------------------------------------------------------------------
# Hardware update


@pytest.mark.rule("V8.4.1.2.6-1")
def test_a_table_that_forbids_writing_leaves_a_clean_page_clean():
    for aptable, success in ((0, True), (2, False)):
        bench = Nested(config=0b101)
        bench.write_cd(ha=1, hd=1)
        slot = bench.map(IOVA, 0x5000, ap=3, dbm=1)
        table = bench.tables.slot(IOVA, 2)
        bench.tables.write_descriptor(table, bench.descriptor(table) | aptable << 61)
        before = bench.descriptor(slot)
        assert bench.translate(IOVA, write=True).success == success
        assert bench.descriptor(slot) == (before & ~AP2 if success else before)


@pytest.mark.rule("V8.5.2.1-2")
def test_dirty_state_needs_the_bit_of_its_own_stage():
    for dbm1, dbm2 in ((0, 0), (0, 1), (1, 0), (1, 1)):
        bench, iova, ipa = nested_system()
        bench.write_cd(ha=1, hd=1)
        bench.write_ste(s2ha=1, s2hd=1)
        slot1 = bench.map(iova, ipa, ap=3, dbm=dbm1)
        slot2 = bench.map2(ipa, 0x5000, s2ap=1, dbm=dbm2)
        outcome = bench.translate(iova, write=True)
        assert outcome.fault == (None if dbm1 and dbm2 else "F_PERMISSION")
        assert bool(bench.descriptor(slot1) & AP2) == (not dbm1)
        assert bool(bench.descriptor(slot2) & S2AP1) == bool(dbm1 and dbm2)


@pytest.mark.rule("V8.5.1.2-4")
@pytest.mark.parametrize("nested", ["combined", "split"])
def test_what_could_not_be_marked_accessed_is_not_cached(nested):
    bench, iova, ipa = nested_system()
    bench.write_cd(ha=1)
    slot = bench.map(iova, ipa, af=0, ap=3)
    bench.map_self(slot & ~0xFFF, s2ap=1)
    smmu = cached(bench, Caches.server(nested=nested))
    for write in (True, False):  # stage 1 refuses the write; the read may not be marked
        assert smmu.translate(SID, iova, write=write).fault.name == "F_PERMISSION"
        rows = smmu.translate_batch(SID, np.full(9, iova, np.uint64), write=write)
        assert set(rows["event"].tolist()) == {0x13}
        assert not [entry for entry in smmu.caches.tlb if entry.start == iova and entry.kind !=
                    "stage 2"]  # fmt: skip


@pytest.mark.rule("V8.5.4-1")
def test_an_update_that_memory_refuses_is_an_external_abort():
    for stage in (1, 2):
        bench, iova, ipa = nested_system()
        bench.write_cd(ha=1)
        bench.write_ste(s2ha=1)
        slot = bench.map(iova, ipa, af=0) if stage == 1 else bench.map2(ipa, 0x5000, af=0)
        memory = Memory()
        for base, data in bench.regions():
            if base <= slot < base + len(data):
                memory.add_callback(
                    base, len(data), bench.memory.read, bench.memory.write, lambda *_: None
                )
            else:
                memory.add(data, base)
        features = twin.smmu_of(bench).features
        result = Smmu(memory, features, **vars(bench.regs)).translate(SID, iova)
        assert (result.action, result.fault.name) == ("abort", "F_WALK_EABT")
        assert result.fault.fields["FetchAddr"] == slot
        assert (result.fault.s2, result.fault.class_) == (stage == 2, ("TT", "IN")[stage - 1])
        assert not bench.descriptor(slot) & AF


@pytest.mark.rule("V8.5.5-1")
def test_of_contiguous_descriptors_one_is_updated():
    bench, iova, ipa = nested_system()
    bench.write_cd(ha=1, hd=1)
    slots = [bench.map(iova + at, ipa, af=0, ap=3, dbm=1, contiguous=1)
             for at in range(0, 0x3000, 0x1000)]  # fmt: skip
    before = [bench.descriptor(slot) for slot in slots]
    assert bench.translate(iova + 0x1000, write=True).success
    before[1] = before[1] & ~AP2 | AF
    assert [bench.descriptor(slot) for slot in slots] == before
    before[0] |= AF  # that another has the flag is no reason to leave it out
    assert bench.translate(iova).success
    assert [bench.descriptor(slot) for slot in slots] == before


def test_a_walk_without_an_update_marks_no_page_of_tables_dirty():
    bench, iova, ipa = nested_system()
    bench.write_cd(ha=1, hd=1)
    bench.write_ste(s2ha=1, s2hd=1)
    slot = bench.map(iova, ipa)
    slot2 = bench.map_self(slot & ~0xFFF, s2ap=1, dbm=1)
    for write in (False, True):
        assert bench.translate(iova, write=write).success
        assert not bench.descriptor(slot2) & S2AP1


def test_of_two_faults_of_stage_2_that_of_the_update_is_told():
    bench, iova, _ = nested_system()
    bench.write_cd(ha=1)
    slot = bench.map(iova, 0x70_0000_0000, af=0)  # not in stage 2
    bench.map_self(slot & ~0xFFF, s2ap=1)
    outcome = bench.translate(iova)
    assert outcome.event == stage2_record("F_PERMISSION", CLASS_TT, ipa=slot, iova=iova)


# ------------------------------------------------------------------------------------------------
# Attributes


def test_instructions_of_device_memory_are_not_refused():
    for index in (5, 6):  # Device-nGnRnE would be 3
        bench = Bench()
        bench.write_cd(mair=0x00_04_08_0C_00_00_FF_44)
        bench.map(IOVA, 0x5000, attrindx=index)
        outcome = bench.translate(IOVA, instr=True)
        assert outcome.success and outcome.attr in (0, 4, 8, 12)
    bench, iova, ipa = nested_system()
    bench.map2(ipa, 0x5000, memattr=0)
    outcome = bench.translate(iova, instr=True)
    assert outcome.success and outcome.attr == 0


# ------------------------------------------------------------------------------------------------
# The largest blocks


LARGEST = [
    # granule, DS, T0SZ, level of the largest block, its size
    (12, 1, 12, 0, 39), (14, 1, 12, 1, 36), (16, 0, 12, 1, 42),
]  # fmt: skip


def largest(granule_lg2, ds, tsz, level, config):
    """A Nested whose address 0 is in the largest block of each stage, with Contiguous set."""
    second = {"granule_lg2": granule_lg2, "ds": bool(ds), "tsz": tsz,
              "start_level": {12: -1, 14: 0, 16: 1}[granule_lg2]}  # fmt: skip
    bench = Nested(config=config, granule_lg2=granule_lg2, ds=ds, tsz=tsz, second=second)
    bench.write_ste(s2ds=ds)
    bench.map2(0, 0, level, contiguous=1)  # all of stage 1, and what it needs
    Bench.map(bench, 0, 0, level, contiguous=1)
    return bench


@pytest.mark.rule("V8.7.1-2")
@pytest.mark.parametrize("config", [0b101, 0b110, 0b111])
@pytest.mark.parametrize(("granule_lg2", "ds", "tsz", "level", "size_lg2"), LARGEST)
def test_the_largest_blocks_have_no_contiguous_bit(granule_lg2, ds, tsz, level, size_lg2, config):
    bench = largest(granule_lg2, ds, tsz, level, config)
    found = bench.translate((1 << size_lg2) - 1)
    assert (found.page_lg2, found.contiguous) == (size_lg2, 0)
    smmu = cached(bench, Caches.server())
    for _ in range(2):
        told = smmu.translate(SID, (1 << size_lg2) - 1, trace=True)
        assert not told.contiguous and "Contiguous" not in told.explain()
    assert [entry.contiguous for entry in smmu.caches.tlb] == [False]
    if config == 0b110:
        bench.map2(1 << size_lg2, 0, level + 1, contiguous=1)
    else:
        Bench.map(bench, 1 << size_lg2, 0, level + 1, contiguous=1)
    assert bench.translate(1 << size_lg2).contiguous == 1


@pytest.mark.parametrize("caches", [None, "combined", "split"])
@pytest.mark.parametrize("config", [0b101, 0b110, 0b111])
def test_batches_of_blocks_beyond_the_output_size_find_what_single_translations_find(
    config, caches
):
    rng = np.random.default_rng(1)
    bench = largest(16, 0, 12, 1, config)
    bench.write_cd(ips=1)
    bench.write_ste(s2ps=2)
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
