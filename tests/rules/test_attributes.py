"""Attributes of memory and of accesses, where no other file asks: IHI 0070 chapter 13."""

import itertools

import pytest
import reference
from bench import SID, Bench, Nested, nested_system, stage2_features
from reference import ALL_ACCESSES, CLASS_IN, ISH, NSH, OSH, PX, UX

DEVICE, NON_CACHEABLE = 0x00, 0x44


@pytest.mark.rule("S13.1.1-4")
@pytest.mark.parametrize("mair", [DEVICE, NON_CACHEABLE, 0xFF])
def test_permissions_do_not_depend_on_the_memory_type(mair):
    """An instruction fetch from Device memory is an access as any other (13.1.1)."""
    bench, iova, ipa = nested_system()
    bench.write_cd(mair=mair)
    for memattr in range(16):
        bench.map2(ipa, 0x5000, memattr=memattr)
        for instr, write in ((True, False), (False, False), (False, True)):
            outcome = bench.translate(iova, instr=instr, write=write)
            assert outcome.success and outcome.perm & UX


@pytest.mark.rule("S13.1.2-1")
def test_a_write_is_data_whatever_the_device_and_the_stream_say():
    """13.1.2: at both stages, and in the record."""
    bench, iova, ipa = nested_system(features=stage2_features(attr_perms_ovr=1, xnx=1))
    bench.map(iova, ipa, uxn=1, pxn=1)
    bench.map2(ipa, 0x5000, xn=0b10)
    for instcfg, instr, priv in itertools.product(range(4), (False, True), (False, True)):
        bench.write_ste(instcfg=instcfg)
        assert bench.translate(iova, write=True, instr=instr, priv=priv).success
    bench.map2(ipa, 0x5000, s2ap=1, xn=0b10)
    record = bench.translate(iova, write=True, instr=True).event
    assert int.from_bytes(record, "little") >> 97 & 7 == 0  # PnU, InD and RnW


@pytest.mark.rule("S13.4.1-2")
def test_privilege_is_told_as_it_came_where_it_does_not_count():
    """13.4.1: in EL2 AP[1] counts as 1, and the record has the privilege of the access."""
    bench = Bench()
    bench.write_ste(strw=2)
    bench.map(0, 0x5000, ap=0)
    for priv in (False, True):
        assert bench.translate(0, priv=priv).success
        outcome = bench.translate(0x1_0000, priv=priv)
        assert outcome.event == reference.event_record(
            "F_TRANSLATION", SID, write=False, priv=priv, iova=0x1_0000, event_class=CLASS_IN
        )


@pytest.mark.rule("S13.4.3-3", "S13.7-13")
@pytest.mark.parametrize("config", [0b110, 0b111])
@pytest.mark.parametrize("xnx", [0, 1])
def test_privilege_counts_in_stage_2_only_for_execution_and_with_xnx(xnx, config):
    """13.4.3."""
    bench = Nested(config=config, features=stage2_features(xnx=xnx))
    kinds = (1, 2)  # reads, writes
    if config == 0b111:
        bench.map(0x1000, 0x1000, ap=3)  # what is writable the privileged may not execute
        kinds = (1,)
    for xn, s2ap in itertools.product(range(4), range(4)):
        bench.map2(0x1000, 0x5000, xn=xn, s2ap=s2ap)
        perm = bench.translate(0x1000).perm
        for unprivileged in kinds:
            assert bool(perm & unprivileged) == bool(perm & unprivileged << 3) == bool(
                s2ap & unprivileged
            )
        by_privilege = {0b00: UX | PX, 0b01: UX, 0b10: 0, 0b11: PX}[xn]
        assert perm & (UX | PX) == (by_privilege if xnx else (0 if xn & 2 else UX | PX))


@pytest.mark.rule("S13.1.7-1", "S13.4.3-2")
def test_hints_pass_through_stage_2_unchanged():
    """13.4.3: stage 2 has none of its own; what it makes non-cacheable has none."""
    bench, iova, ipa = nested_system()
    for hints in range(4):
        for transient in (0, 1):
            level = (0x4 if transient and hints else 0xC) | hints
            bench.write_cd(mair=level << 4 | 0xF)
            bench.map2(ipa, 0x5000, memattr=0b1111)
            assert bench.translate(iova).attr == level << 4 | 0xF
            bench.map2(ipa, 0x5000, memattr=0b1011)  # outer write-through
            assert bench.translate(iova).attr == (level & 0xB) << 4 | 0xF
            bench.map2(ipa, 0x5000, memattr=0b0111)  # outer non-cacheable
            assert bench.translate(iova).attr == 0x4F


def test_a_level_that_enters_without_cache_counts_as_no_allocate():
    """A choice: 13.4.2 speaks of types as a whole, 13.1.7 of levels."""
    bench = Bench()
    bench.map(0, 0x5000)
    bench.write_cd(mair=0xFF)
    for memattr, attr in ((0b0111, 0xCF), (0b1101, 0xFC), (0b0101, 0xFF), (0b0011, 0xFF)):
        bench.write_ste(mtcfg=1, memattr=memattr)
        assert bench.translate(0).attr == attr


def test_hints_are_set_by_the_stream_whether_its_type_is_or_not():
    """A choice: ALLOCCFG with MTCFG=0 is CONSTRAINED UNPREDICTABLE (5.2)."""
    bench = Bench()
    bench.write_ste(config=0b100, alloccfg=0b1100, mtcfg=0)
    assert bench.translate(0).attr == 0xEE
    bench.write_ste(mtcfg=1, memattr=0b1111)
    assert bench.translate(0).attr == 0xEE


@pytest.mark.rule("S13.1.1-2", "S13.1.4-7")
def test_what_is_not_cacheable_is_outer_shareable_and_has_no_hints():
    """13.1.7: whatever overrides, tables and input say, stage by stage."""
    for config in (0b100, 0b110):
        bench = Nested(config=config)
        bench.map2(0x1000, 0x5000, sh=0)
        for memattr, attr in ((0b0000, 0x00), (0b0010, 0x08), (0b0101, 0x44)):
            for shcfg, alloccfg in itertools.product((0, 2, 3), (0b1000, 0b1111)):
                bench.write_ste(mtcfg=1, memattr=memattr, shcfg=shcfg, alloccfg=alloccfg)
                outcome = bench.translate(0x1000)
                assert (outcome.attr, outcome.sh) == (attr, OSH)
                assert outcome.perm == ALL_ACCESSES
        # a level that allocates nothing is not transient
        bench.write_ste(mtcfg=1, memattr=0b1111, shcfg=3, alloccfg=0b1001)
        outcome = bench.translate(0x1000)
        assert (outcome.attr, outcome.sh) == (0xCC, ISH)
        bench.write_ste(shcfg=0)
        assert bench.translate(0x1000).sh == NSH
