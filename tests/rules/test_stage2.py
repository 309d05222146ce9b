"""Stage 2 and nested translation, rule by rule: the twin against the specification's numbers.

As in test_reference.py, a system that is built here goes through the twin and every face of the
library; each face has memory of its own, and what it writes is compared.

Follows IHI 0070G.b 3.3, 3.12, 3.13, 5.2, 5.5, 7.3, 13; DDI 0487 D8.
"""

import collections
import itertools
import random

import ptwriter
import pytest
import reference
import small
import tablegen
from bench import (
    CONTEXT_TABLE,
    SID,
    STREAM_TABLE,
    TABLES,
    VMID,
    Nested,
    is_illegal,
    nested_system,
    six,
    stage2_features,
    stage2_record,
    stage2_ste,
)
from reference import (
    AF,
    ALL_ACCESSES,
    AP2,
    CLASS_CD,
    CLASS_IN,
    CLASS_TT,
    ISH,
    NSH,
    OSH,
    PR,
    PW,
    PX,
    S2AP1,
    UR,
    UW,
    UX,
    ContextCache,
    event_record,
    translate,
)


def kinds(outcome):
    """The kinds of fetches, in order."""
    return [fetch[0] for fetch in outcome.fetches]


def value(fetch):
    """What a fetch found, as a little-endian number."""
    return int.from_bytes(fetch[4], "little")


def addresses(outcome, kind):
    """Where the fetches of one kind were."""
    return [fetch[2] for fetch in outcome.fetches if fetch[0] == kind]


# ------------------------------------------------------------------------------------------------
# Worked numbers


def dwords(record):
    return [int.from_bytes(record[at : at + 8], "little") for at in range(0, len(record), 8)]


def test_ptwriter_packs_the_worked_stage_2_encoding():
    ste = ptwriter.encode_ste(
        v=1, config=0b110, shcfg=1, s2vmid=5, s2t0sz=24, s2sl0=1, s2ir0=1, s2or0=1, s2sh0=3,
        s2tg=0, s2ps=5, s2aa64=1, s2ptw=1, s2r=1, s2ttb=0x9000_2000,
    )  # fmt: skip
    assert dwords(ste)[:4] == [0xD, 0x1000_0000_0000, 0x044D_3558_0000_0005, 0x9000_2000]
    assert not any(dwords(ste)[4:])


def test_event_records_of_stage_2_and_stalls_are_the_worked_encodings():
    permission = event_record(
        "F_PERMISSION", 7, 3, write=False, priv=True, stage2=True, event_class=CLASS_TT,
        descriptor_read=True, iova=0xDEAD_0000, ipa=0x4000_1234,
    )  # fmt: skip
    assert dwords(permission) == [0x7_0000_3813, 0x118A_0000_0000, 0xDEAD_0000, 0x4000_1000]
    stalled = event_record(
        "F_TRANSLATION", 1, write=False, event_class=CLASS_IN, iova=0x8000, stall=True
    )
    assert dwords(stalled) == [0x1_0000_0010, 0x208_8000_0000, 0x8000, 0]  # STAG 0


@pytest.mark.rule("S5.2-5", "V8.2.2-1")
def test_40_bits_from_level_1_on_are_two_tables_side_by_side():
    bench = Nested(config=0b110)
    assert bench.second.base % 0x2000 == 0
    ipa = 0x80_4020_1ABC  # IPA[39:30] is 0x201: the second table
    bench.map2(ipa, 0x5000)
    outcome = bench.translate(ipa)
    assert (outcome.pa, outcome.level, outcome.stage) == (0x5ABC, 3, 2)
    assert addresses(outcome, "S2TT")[0] == bench.second.base + 8 * 0x201
    # Base bits [12:0] are treated as 0.
    bench.write_ste(s2ttb=bench.second.base | 0x1FF0)
    assert bench.translate(ipa).pa == 0x5ABC


@pytest.mark.rule("S3.4-13", "S3.4.1-7", "S5.2-57", "V8.1.10-1")
@pytest.mark.parametrize(
    ("granule_lg2", "level", "t0sz", "index"),
    [
        (12, 1, 24, 0x3FF), (12, 1, 21, 0x1FFF), (12, 2, 30, 0x1FFF), (12, 0, 16, 0x1FF),
        (12, -1, 12, 0xF), (12, 3, 43, 0x1FF), (14, 2, 28, 0x7FF), (14, 2, 24, 0x7FFF),
        (14, 0, 12, 0x1F), (14, 3, 48, 0x3), (16, 1, 12, 0x3FF), (16, 2, 18, 0x1FFFF),
        (16, 3, 47, 0x1),
    ],
)  # fmt: skip
def test_the_first_lookup_takes_all_bits_that_are_left(granule_lg2, level, t0sz, index):
    bench = Nested(config=0b110)
    tg = ptwriter.S2TG_CODES[granule_lg2]
    table = 0x4000_0000
    ds = int(t0sz < 16 and granule_lg2 != 16)
    sl2, sl0 = ptwriter.S2SL0_CODES[granule_lg2][level]
    bench.write_ste(s2tg=tg, s2t0sz=t0sz, s2sl0=sl0, s2sl0_2=sl2, s2ds=ds, s2ttb=table)
    entry = table + 8 * index
    bench.memory.ensure(entry, 8)
    outcome = bench.translate((1 << 64 - t0sz) - 1)
    assert outcome.fault == "F_TRANSLATION"
    assert [fetch[1:3] for fetch in outcome.fetches[1:]] == [(level, entry)]
    beyond = bench.translate(1 << 64 - t0sz)
    assert beyond.fault == ("F_TRANSLATION" if t0sz > 12 else "F_ADDR_SIZE")
    assert kinds(beyond) == ["STE"]


@pytest.mark.rule("S5.2-81", "V8.2.5.2-2")
def test_small_first_tables_of_stage_2_are_aligned_to_their_size():
    for t0sz, ps, alignment in ((33, 5, 16), (32, 5, 32), (33, 6, 64), (30, 5, 128)):
        bench = Nested(config=0b110)
        for offset in range(0, 0x100, 16):
            bench.write_ste(s2t0sz=t0sz, s2sl0=1, s2ps=ps, s2ttb=TABLES + offset)
            outcome = bench.translate(0)
            assert addresses(outcome, "S2TT")[0] == TABLES + offset // alignment * alignment


# ------------------------------------------------------------------------------------------------
# ILLEGAL STEs


@pytest.mark.rule("S3.4-15")
@pytest.mark.parametrize("stt", [0, 1])
@pytest.mark.parametrize("ds", [0, 1])
@pytest.mark.parametrize("oas", [0, 2, 3, 4, 5, 6])
def test_legal_shapes_are_those_of_the_table(oas, ds, stt):
    features = stage2_features(oas=oas, ds=ds, stt=stt)
    levels = {
        (granule_lg2, sl2, sl0): level
        for granule_lg2, codes in ptwriter.S2SL0_CODES.items()
        for level, (sl2, sl0) in codes.items()
    }
    legal = 0
    for granule_lg2, tg in ptwriter.S2TG_CODES.items():
        for sl2, sl0, s2ds, t0sz in itertools.product((0, 1), range(4), (0, 1), range(64)):
            # Without IDR5.DS both bits are RES0; S2SL0_2 has a meaning with 4K and S2DS alone.
            bit = sl2 and s2ds and ds and granule_lg2 == 12
            level = levels.get((granule_lg2, int(bit), sl0))
            expected = level is not None and tablegen.legal_stage2_shape(
                features, granule_lg2, level, t0sz, s2ds
            )
            found = not is_illegal(
                features, s2tg=tg, s2sl0=sl0, s2sl0_2=sl2, s2ds=s2ds, s2t0sz=t0sz
            )
            assert found == expected, (granule_lg2, sl2, sl0, s2ds, t0sz)
            legal += found
    assert legal > 50


ILLEGAL = [
    # features, STE fields, bad
    ({}, {}, False),
    ({"s2p": 0}, {}, True),
    ({"s1p": 0}, {}, False),
    ({"s1p": 0}, {"config": 0b111}, True),
    ({}, {"s2aa64": 0}, True),
    ({}, {"s2tg": 3}, True),
    ({"gran64k": 0}, {"s2tg": 1}, True),
    ({}, {"s2t0sz": 20}, True),
    ({}, {"s2t0sz": 34}, True),
    ({}, {"s2sl0": 3}, True),
    ({}, {"s2sl0": 3, "s2t0sz": 45}, False),
    ({"stt": 0}, {"s2sl0": 3, "s2t0sz": 39}, True),
    ({"oas": 1}, {}, True),
    ({"oas": 1}, {"s2t0sz": 28}, False),
    ({"oas": 3}, {"s2sl0": 2, "s2t0sz": 24}, True),
    ({"oas": 4}, {"s2sl0": 2, "s2t0sz": 24}, False),
    ({}, {"s2sl0_2": 1}, False),
    ({}, {"s2sl0_2": 1, "s2ds": 1}, True),
    ({}, {"s2sl0_2": 1, "s2ds": 1, "s2sl0": 0, "s2t0sz": 12}, False),
    ({}, {"s2sl0_2": 1, "s2ds": 1, "s2tg": 2}, False),
    ({}, {"s2sl0_2": 1, "s2ds": 1, "s2tg": 1}, False),
    ({}, {"s2tg": 2, "s2ds": 1, "s2sl0": 3, "s2t0sz": 16}, False),
    ({"oas": 5}, {"s2tg": 2, "s2ds": 1, "s2sl0": 3, "s2t0sz": 16}, True),
    ({}, {"s2tg": 2, "s2ds": 0, "s2sl0": 3, "s2t0sz": 16}, True),
    ({"ds": 0}, {"s2sl0_2": 1}, False),
    ({}, {"s2ttb": 1 << 48}, True),
    ({}, {"s2ttb": 1 << 48, "s2ds": 1}, False),
    ({}, {"s2ttb": 1 << 48, "s2tg": 1}, False),
    ({}, {"s2ttb": 1 << 47, "s2ps": 4}, True),
    ({"oas": 4}, {"s2ttb": 1 << 44}, True),
    ({"arch_minor": 0}, {"s2ttb": 1 << 48}, False),
    ({}, {"s2ttb": 1 << 52}, False),
    ({"ttendian": 2}, {"s2endi": 1}, True),
    ({"ttendian": 3}, {"s2endi": 0}, True),
    ({"ttendian": 3}, {"s2endi": 1}, False),
    ({}, {"s2s": 1}, False),
    ({"stall_model": 1}, {"s2s": 1}, True),
    ({"stall_model": 2}, {"s2s": 0}, True),
    ({"stall_model": 2}, {"s2s": 1}, False),
    ({"httu": 0}, {"s2ha": 1}, True),
    ({"httu": 0}, {"s2hd": 1}, True),
    ({"httu": 1}, {"s2ha": 1}, False),
    ({"httu": 1}, {"s2ha": 1, "s2hd": 1}, True),
    ({"httu": 1}, {"s2hd": 1}, True),
    ({}, {"s2hd": 1}, False),
    ({"vmid16": 0}, {"s2vmid": 0x100}, True),
    ({"vmid16": 0}, {"s2vmid": 0xFF}, False),
    ({"vmid16": 0}, {"s2vmid": 0x100, "config": 0b100}, False),
    ({"vmid16": 0}, {"s2vmid": 0x100, "config": 0b101}, True),
    ({"vmid16": 0, "s2p": 0}, {"s2vmid": 0x100, "config": 0b101}, False),
    ({"vmid16": 0}, {"s2vmid": 0x100, "config": 0b101, "strw": 2}, False),
    ({}, {"strw": 3}, False),
    ({}, {"strw": 1, "config": 0b111}, False),
    ({}, {"strw": 1, "config": 0b101}, True),
    ({"stall_model": 1}, {"s1stalld": 1}, False),
    ({"stall_model": 1}, {"s1stalld": 1, "config": 0b111}, True),
    ({}, {"s1stalld": 1, "config": 0b111}, False),
    ({"ats": 1}, {"eats": 2}, True),
    ({"ats": 1}, {"eats": 2, "config": 0b101}, True),
    ({"ats": 1}, {"eats": 2, "config": 0b100}, False),
    ({"ats": 1}, {"eats": 2, "config": 0b111}, False),
    ({"ats": 1}, {"eats": 2, "config": 0b111, "s2s": 1}, True),
    ({"ats": 1, "ns1ats": 1}, {"eats": 2, "config": 0b111}, True),
    ({"ats": 1}, {"eats": 1}, False),
    ({"ats": 1}, {"eats": 1, "s2s": 1}, True),
    ({"ats": 1}, {"eats": 1, "s2s": 1, "config": 0b101}, False),
    ({"ats": 1}, {"eats": 3, "s2s": 1}, False),
    ({}, {"eats": 2, "s2s": 1}, False),
    # Stage 2 alone: the fields of stage 1 have no meaning.
    ({"ssidsize": 8, "cd2l": 0}, {"s1cdmax": 9, "s1fmt": 2, "s1contextptr": 1 << 51}, False),
    # Stage 1 alone: those of stage 2 have none.
    ({}, {"config": 0b101, "s2aa64": 0, "s2t0sz": 63, "s2tg": 3}, False),
    # Nested: the pointer is an IPA, which stage 2 checks.
    ({"oas": 4}, {"config": 0b111, "s1contextptr": 1 << 44}, False),
    ({"oas": 4}, {"config": 0b101, "s1contextptr": 1 << 44}, True),
]


@pytest.mark.rule(
    "S2.2-1", "S2.2-3", "S3.3.2-23", "S3.4-22", "S5.2-7", "S5.2-36", "S5.2-37", "S5.2-39",
    "S5.2-41", "S5.2-56", "S5.2-65", "S5.2-68", "S5.2-70", "S5.2-75", "S5.2-82", "S5.2.1-7",
    "S5.2.2-1", "S5.2.2-2", "V8.1.1-1",
)
@pytest.mark.parametrize(("features", "fields", "bad"), ILLEGAL)
def test_illegal_stes_with_stage_2(features, fields, bad):
    features = stage2_features(**features)
    assert is_illegal(features, **fields) == bad
    bench = Nested(features)
    ste = stage2_ste(**fields).to_bytes(64, "little")
    bench.memory.write(STREAM_TABLE + 64 * SID, ste)
    assert (bench.fault() == "C_BAD_STE") == bad


@pytest.mark.rule("S3.4-17", "S5.2-66", "S5.2-67")
def test_effective_output_size_is_the_smaller_of_s2ps_and_oas():
    for minor, oas, ps, bits in ((3, 6, 7, 52), (3, 4, 6, 44), (0, 6, 6, 48), (3, 6, 0, 32)):
        second = {"granule_lg2": 16, "tsz": 32, "start_level": 2}
        features = stage2_features(oas=oas, arch_minor=minor)
        bench = Nested(features, config=0b110, second=second)
        bench.write_ste(s2ps=ps)
        bench.map2(0x1_0000, (1 << bits) - 0x10000)
        assert bench.translate(0x1_0000).pa == (1 << bits) - 0x10000
        if bits < 52:
            bench.map2(0x2_0000, 1 << bits)
            assert bench.fault(0x2_0000) == "F_ADDR_SIZE"


# ------------------------------------------------------------------------------------------------
# Stage 2 alone


@pytest.mark.rule("V8.2.10-2")
@pytest.mark.parametrize("endi", [False, True])
@pytest.mark.parametrize(
    ("granule_lg2", "start_level", "ds", "level", "size_lg2"),
    [
        (12, 0, False, 0, None), (12, 0, True, 0, 39), (12, 1, False, 1, 30), (12, 1, True, 2, 21),
        (12, -1, True, -1, None), (14, 1, False, 1, None), (14, 1, True, 1, 36),
        (14, 2, False, 2, 25), (16, 1, False, 1, 42), (16, 2, False, 2, 29), (16, 2, False, 3, 16),
    ],
)  # fmt: skip
def test_stage_2_blocks(granule_lg2, start_level, ds, level, size_lg2, endi):
    t0sz = {-1: 12, 0: 16, 1: 21, 2: 30}[start_level]
    second = {
        "granule_lg2": granule_lg2, "tsz": t0sz, "start_level": start_level, "ds": ds,
        "big_endian": endi,
    }  # fmt: skip
    bench = Nested(config=0b110, second=second)
    ipa = 0x3_89AB_CDEF
    bench.map2(ipa, 0x0000_7654_3210_0000, level)
    outcome = bench.translate(ipa)
    if size_lg2 is None:
        assert outcome.fault == "F_TRANSLATION"
    else:
        low = (1 << size_lg2) - 1
        assert (outcome.level, outcome.page_lg2) == (level, size_lg2)
        assert outcome.pa == 0x0000_7654_3210_0000 & ~low | ipa & low
        assert (outcome.ipa, outcome.vmid, outcome.perm_s1) == (ipa, VMID, ALL_ACCESSES)


@pytest.mark.rule("S3.3.2-17", "S3.4-2", "S3.4-9", "S5.2-22", "V8.1-2", "V8.1.9-3")
@pytest.mark.parametrize("config", [0b110, 0b111])
def test_an_input_that_stage_1_does_not_translate_must_fit_oas(config):
    features = stage2_features(oas=3)
    bench = Nested(features, config=config)
    bench.write_ste(s1cdmax=4, s1dss=1, s2r=0, s2s=1)
    last = (1 << 40) - 1
    bench.map2(last, 0x5000)
    outcome = bench.translate(last)
    assert (outcome.action, outcome.stage, outcome.pa) == ("ok", 2, 0x5FFF)
    beyond = bench.translate(1 << 40)
    assert (beyond.action, beyond.fault, beyond.stage) == ("stall", "F_TRANSLATION", 2)
    too_large = bench.translate(1 << 42)
    assert (too_large.action, too_large.stage) == ("abort", 2)
    assert too_large.event == event_record(
        "F_ADDR_SIZE", SID, write=False, event_class=CLASS_IN, iova=1 << 42
    )


@pytest.mark.rule("S3.3.2-2", "S5.2-20")
def test_substreams_are_bad_for_stage_2_alone():
    bench = Nested(config=0b110)
    assert bench.fault(ssid=0) == "C_BAD_SUBSTREAMID"


@pytest.mark.rule("S3.13.1-2", "S7.3.22-3", "V8.15.4-4")
def test_stage_2_order_within_a_leaf():
    bench = Nested(config=0b110)
    bench.map2(0x1000, 0x1_0000_0000, af=0, s2ap=0)
    bench.write_ste(s2ps=0)
    assert bench.fault(0x1000) == "F_ADDR_SIZE"
    bench.write_ste(s2ps=1)
    assert bench.fault(0x1000) == "F_ACCESS"
    bench.write_ste(s2affd=1)
    outcome = bench.translate(0x1000)
    assert (outcome.fault, outcome.perm_s1, outcome.perm) == ("F_PERMISSION", ALL_ACCESSES, UX | PX)
    assert outcome.event == stage2_record("F_PERMISSION", CLASS_IN, ipa=0x1000, iova=0x1000)


XN = [
    # xnx, XN[1:0], execution
    (1, 0b00, UX | PX), (1, 0b01, UX), (1, 0b10, 0), (1, 0b11, PX),
    (0, 0b00, UX | PX), (0, 0b01, UX | PX), (0, 0b10, 0), (0, 0b11, 0),
]  # fmt: skip


@pytest.mark.rule("S2.3-2", "V8.3.1.2-2", "V8.4.2.1.1-1", "V8.4.2.1.2-1")
@pytest.mark.parametrize(("xnx", "xn", "execution"), XN)
def test_stage_2_permissions(xnx, xn, execution):
    bench = Nested(stage2_features(xnx=xnx), config=0b110)
    for s2ap, data in ((0, 0), (1, UR | PR), (2, UW | PW), (3, UR | PR | UW | PW)):
        bench.map2(0x1000, 0x5000, s2ap=s2ap, xn=xn)
        assert six(bench, 0x1000) == data | execution
        outcome = bench.translate(0x1000)
        assert outcome.perm == data | execution
        bench.write_ste(privcfg=3)
        assert bench.translate(0x1000).perm == sum(
            unpriv | unpriv << 3 for unpriv in (UR, UW, UX) if (data | execution) & unpriv << 3
        )
        bench.write_ste(privcfg=0)


# ------------------------------------------------------------------------------------------------
# Nested


@pytest.mark.rule("S3.3.2-18", "S5.2-6", "V8.2.1-3")
def test_every_fetch_of_stage_1_goes_through_stage_2():
    bench, iova, ipa = nested_system()
    outcome = bench.translate(iova + 0xABC)
    assert (outcome.pa, outcome.ipa, outcome.stage) == (0x5ABC, ipa + 0xABC, 3)
    assert (outcome.level, outcome.page_lg2, outcome.vmid) == (3, 12, VMID)
    walk = ["S2TT"] * 3
    assert kinds(outcome) == ["STE", *walk, "CD", *[*walk, "TT"] * 4, *walk]
    assert [fetch[1] for fetch in outcome.fetches if fetch[0] == "TT"] == [0, 1, 2, 3]


@pytest.mark.rule("S3.3.2-11", "S5.4.1-5", "S15-2", "S15.1-101", "V8.2.3-1")
def test_structures_lie_where_stage_2_puts_them():
    bench, iova, _ = nested_system()
    moved = 0x400_0000
    for page in [CONTEXT_TABLE, *range(TABLES, TABLES + 0x10_0000, 0x1000)]:
        slot = bench.second.slot(page, 3)
        if page < bench.second.base and bench.second.read_descriptor(slot):
            moved += 0x3000
            bench.memory.add(moved, 0x1000)
            bench.memory.write(moved, bench.memory.read(page, 0x1000))
            bench.memory.write(page, bytes(0x1000))
            bench.map2(page, moved)
    outcome = bench.translate(iova)
    assert outcome.pa == 0x5000
    assert all(address >= 0x400_0000 for address in addresses(outcome, "CD"))
    assert all(address >= 0x400_0000 for address in addresses(outcome, "TT")[:1])


@pytest.mark.rule("S5.2-15")
@pytest.mark.parametrize("s1fmt", [1, 2])
def test_two_level_context_tables_of_ipas(s1fmt):
    bench, iova, _ = nested_system()
    leaf_lg2 = {1: 6, 2: 10}[s1fmt]
    ssid, leaf_ipa, l1, leaf = 0x155, 0x7_0000_0000, 0x7_1000_0000, 0x600_0000
    bench.memory.add(leaf, 0x10000)
    bench.map2(l1, CONTEXT_TABLE + 0x1000)
    bench.memory.write(
        CONTEXT_TABLE + 0x1000 + 8 * (ssid >> leaf_lg2), ptwriter.encode_l1cd(leaf_ipa)
    )
    at = 64 * (ssid & (1 << leaf_lg2) - 1)
    bench.map2(leaf_ipa + at, leaf + at)
    bench.memory.write(leaf + at, ptwriter.encode_cd(**bench.cd))
    bench.write_ste(s1fmt=s1fmt, s1cdmax=12, s1contextptr=l1)
    outcome = bench.translate(iova, ssid=ssid)
    assert (outcome.pa, kinds(outcome)[:9]) == (
        0x5000, ["STE", *["S2TT"] * 3, "L1CD", *["S2TT"] * 3, "CD"],
    )  # fmt: skip
    # Pointers beyond the IPA space are stage 2's business.
    for field, ipa in (("l1cd", 1 << 45), ("ste", 1 << 45)):
        if field == "ste":
            bench.write_ste(s1contextptr=ipa)
        else:
            address = CONTEXT_TABLE + 0x1000 + 8 * (ssid >> leaf_lg2)
            bench.memory.write(address, ptwriter.encode_l1cd(ipa))
            ipa += at
        outcome = bench.translate(iova, ssid=ssid)
        assert (outcome.fault, outcome.stage) == ("F_TRANSLATION", 2)
        if field == "l1cd":
            assert outcome.event == event_record(
                "F_TRANSLATION", SID, ssid, write=False, stage2=True, event_class=CLASS_CD,
                ipa=ipa, iova=iova,
            )  # fmt: skip
    bench.memory.write(CONTEXT_TABLE + 0x1000 + 8 * (ssid >> leaf_lg2), bytes(8))
    bench.write_ste(s1contextptr=l1)
    outcome = bench.translate(iova, ssid=ssid)
    assert (outcome.fault, outcome.stage) == ("C_BAD_SUBSTREAMID", 0)


@pytest.mark.rule("S7.3.13-5")
def test_bits_of_a_context_pointer_beyond_oas_are_not_in_the_record():
    bench, iova, _ = nested_system(features=stage2_features(oas=4))
    bench.write_ste(s1contextptr=1 << 50 | 1 << 42 | 0x5040)
    outcome = bench.translate(iova)
    assert outcome.event == stage2_record(
        "F_TRANSLATION", CLASS_CD, ipa=1 << 42 | 0x5000, iova=iova
    )


PLACES = [("CD", CLASS_CD, 2), ("TT", CLASS_TT, 3), ("last TT", CLASS_TT, 3), ("data", CLASS_IN, 3)]


def place(bench, name, iova, ipa):
    """(IPA, PA) of what a request reads at some point."""
    if name == "data":
        return ipa, 0x5000
    if name == "CD":
        return CONTEXT_TABLE, CONTEXT_TABLE
    address = bench.tables.slot(iova, 3 if name == "last TT" else 1)
    return address, address


@pytest.mark.rule(
    "S3.4-23", "S3.4.3-9", "S3.12-9", "S3.12-10", "S3.12-11", "S3.12-17", "S7.3-5", "S7.3-91",
    "S7.3.12-3", "S7.3.13-3", "V8.1-3", "V8.15.4-2", "V8.15.4.1-1",
)
@pytest.mark.parametrize("access", [{}, {"write": True, "priv": True}])
@pytest.mark.parametrize(("name", "event_class", "stage"), PLACES)
def test_faults_of_stage_2_are_attributed_to_what_it_was_asked_for(
    name, event_class, stage, access
):
    bench, iova, ipa = nested_system()
    at, _ = place(bench, name, iova, ipa)
    leaf = bench.second.slot(at, 3)
    middle = bench.second.slot(at, 2)
    sound = bench.second.read_descriptor(leaf)
    table = bench.second.read_descriptor(middle)
    # All stage-1 tables are in the same middle table: it stops the first descriptor.
    first = bench.tables.slot(iova, 0) if event_class == CLASS_TT else at
    access = {"write": False} | access

    def check(fault, ipa=at, **more):
        outcome = bench.translate(iova, **access)
        assert (outcome.fault, outcome.action, outcome.stage) == (fault, "abort", stage)
        expected = {"ipa": ipa, "descriptor_read": False} | access | more
        assert outcome.event == stage2_record(fault, event_class, iova=iova, **expected)
        return outcome

    for address, good in ((leaf, sound), (middle, table)):
        for bad, fault in (
            (0, "F_TRANSLATION"),
            (0b01 if address == leaf else 0b10, "F_TRANSLATION"),
            (good | 1 << 47, "F_ADDR_SIZE"),
        ):
            bench.write_ste(s2ps=4)
            bench.second.write_descriptor(address, bad)
            check(fault, at if address == leaf else first)
        bench.second.write_descriptor(address, good)
    bench.second.write_descriptor(leaf, sound & ~AF)
    check("F_ACCESS")
    bench.second.write_descriptor(leaf, sound & ~(0b11 << 6))
    outcome = check("F_PERMISSION", descriptor_read=event_class == CLASS_TT)
    expected = (UX | PX) & outcome.perm_s1 if name == "data" else 0
    assert outcome.perm == expected
    assert bool(outcome.perm_s1) == (name == "data")
    # An external abort of stage 2's own read is recorded in any case, with its address.
    bench.second.write_descriptor(leaf, sound)
    bench.second.write_descriptor(middle, ptwriter.table_descriptor(12, 0x7000_0000))
    bench.write_ste(s2r=0)
    outcome = bench.translate(iova, **access)
    assert outcome.event == event_record(
        "F_WALK_EABT", SID, **access, stage2=True, event_class=event_class, iova=iova,
        fetch_address=0x7000_0000 + 8 * (first >> 12 & 0x1FF),
    )  # fmt: skip
    # Where nothing is recorded, nothing is.
    bench.second.write_descriptor(middle, 0)
    outcome = bench.translate(iova, **access)
    assert (outcome.fault, outcome.event, outcome.action) == ("F_TRANSLATION", None, "abort")


@pytest.mark.rule("S7.3.10-2", "S7.3.12-1", "S7.3.12-2", "V8.15.1.3-2")
def test_external_aborts_of_what_stage_2_has_translated():
    bench, iova, _ = nested_system()
    bench.map2(bench.tables.slot(iova, 3), 0x7000_0000)
    outcome = bench.translate(iova)
    assert outcome.event == event_record(
        "F_WALK_EABT", SID, write=False, event_class=CLASS_TT, iova=iova,
        fetch_address=0x7000_0000 + (bench.tables.slot(iova, 3) & 0xFFF),
    )  # fmt: skip
    bench.map2(CONTEXT_TABLE, 0x7000_0000)
    outcome = bench.translate(iova)
    assert (outcome.stage, outcome.event) == (
        0, event_record("F_CD_FETCH", SID, fetch_address=0x7000_0000),
    )  # fmt: skip


@pytest.mark.rule("S3.4-14", "S3.12-8", "S7.3.22-4", "S15-3", "V8.1.7-6", "V8.4.3-1", "V8.15.5-1")
def test_faults_of_stage_1_come_before_those_of_stage_2_for_the_output():
    bench, iova, _ = nested_system()
    bench.map(iova, 0x70_0000_0000, ap=2)  # not in stage 2
    outcome = bench.translate(iova)
    assert (outcome.fault, outcome.stage) == ("F_PERMISSION", 3)
    assert outcome.perm == outcome.perm_s1 == UX | PR | PX
    assert outcome.event == event_record(
        "F_PERMISSION", SID, write=False, event_class=CLASS_IN, iova=iova
    )
    outcome = bench.translate(iova, priv=True)
    assert outcome.event == stage2_record(
        "F_TRANSLATION", CLASS_IN, ipa=0x70_0000_0000, iova=iova, priv=True
    )
    # Inside IPS, outside what stage 2 takes.
    bench.map(iova, 1 << 40)
    assert bench.translate(iova).event == stage2_record(
        "F_TRANSLATION", CLASS_IN, ipa=1 << 40, iova=iova
    )
    bench.write_cd(ips=2)
    assert bench.fault(iova) == "F_ADDR_SIZE"


@pytest.mark.rule("V8.1-1")
@pytest.mark.parametrize(
    ("level1", "level2", "level", "size_lg2"),
    [(3, 3, 3, 12), (2, 3, 3, 12), (3, 2, 3, 12), (2, 2, 2, 21), (1, 2, 2, 21), (2, 1, 2, 21)],
)
def test_the_smaller_page_of_both_stages_is_reported(level1, level2, level, size_lg2):
    bench = Nested()
    iova, ipa, pa = 0x40_1234_5678, 0x22_C234_5678, 0x8_0234_5000
    bench.map(iova, ipa, level1, contiguous=1, ng=1)
    bench.map2(ipa & ~0xFFF, pa, level2)
    size1, size2 = (1 << bench.tables.shift(at) for at in (level1, level2))
    ipa = ipa & -size1 | iova & size1 - 1
    outcome = bench.translate(iova)
    if outcome.success:
        assert outcome.ipa == ipa
        assert outcome.pa == pa & -size2 | ipa & size2 - 1
        assert (outcome.level, outcome.page_lg2) == (level, size_lg2)
        assert (outcome.contiguous, outcome.ng) == (1, 1)
    else:
        assert size1 > size2
        assert outcome.fault == "F_TRANSLATION"


@pytest.mark.rule("S13.1.5-4", "V8.4.3-2")
def test_both_stages_permit():
    bench, iova, ipa = nested_system()
    for ap, s2ap, xn in itertools.product(range(4), range(4), range(4)):
        bench.map(iova, ipa, ap=ap)
        bench.map2(ipa, 0x5000, s2ap=s2ap, xn=xn)
        outcome = bench.translate(iova, priv=True)
        if outcome.success:
            assert outcome.perm == six(bench, iova)
            assert outcome.perm & ~outcome.perm_s1 == 0
        else:
            assert outcome.perm == six(bench, iova)


@pytest.mark.rule("S2.5-2", "S5.2-72", "S5.2-73", "S6.3.4-3", "V8.6.3-2")
@pytest.mark.parametrize("fwb", [0, 1])
@pytest.mark.parametrize("memattr", range(16))
def test_s2ptw_refuses_structures_in_device_memory(memattr, fwb):
    device = memattr & 7 <= 4 if fwb else memattr < 4 or memattr & 3 == 0
    for name, event_class, stage in PLACES:
        bench, iova, ipa = nested_system()
        bench.write_ste(s2fwb=fwb)
        at, pa = place(bench, name, iova, ipa)
        bench.map2(at & ~0xFFF, pa & ~0xFFF, memattr=memattr)
        assert bench.translate(iova).success
        bench.write_ste(s2ptw=1)
        outcome = bench.translate(iova)
        refused = device and name != "data"
        assert (outcome.fault == "F_PERMISSION") == refused
        if refused:
            assert outcome.event == stage2_record(
                "F_PERMISSION", event_class, ipa=at, iova=iova,
                descriptor_read=event_class == CLASS_TT,
            )  # fmt: skip
            assert outcome.stage == stage
        # IDR3.PTWNNC has no say.
        bench.features.ptwnnc = 1
        assert bench.translate(iova).fault == outcome.fault


# ------------------------------------------------------------------------------------------------
# Hardware update


@pytest.mark.rule(
    "S3.13.2-1", "S3.13.2-4", "S3.13.4-1", "S3.13.5-4", "V8.5.1.2-1", "V8.5.1.2-3", "V8.5.3-1",
)
def test_access_flags_of_both_stages_are_set():
    bench, iova, ipa = nested_system()
    slots = [bench.second.slot(page, 3) for page in (CONTEXT_TABLE, ipa)]
    tables = [bench.second.slot(bench.tables.slot(iova, at), 3) for at in (0, 1, 2, 3)]
    for slot in slots + tables:
        bench.second.write_descriptor(slot, bench.second.read_descriptor(slot) & ~AF)
    leaf = bench.map(iova, ipa, af=0)
    bench.write_ste(s2ha=1)
    bench.write_cd(ha=1)
    outcome = bench.translate(iova)
    assert outcome.success
    updates = [fetch for fetch in outcome.fetches if len(fetch) > 5]
    second = [slots[0], *dict.fromkeys(tables)]
    assert [(fetch[0], fetch[2]) for fetch in updates] == [
        *(("S2TT update", slot) for slot in second), ("TT update", leaf), ("S2TT update", slots[1]),
    ]  # fmt: skip
    for _, _, _, size, data, (expected, desired) in updates:
        assert (size, int.from_bytes(data, "little")) == (8, expected)
        assert desired == expected | AF
    assert not any(len(fetch) > 5 for fetch in bench.translate(iova).fetches)


@pytest.mark.rule(
    "S3.13-2", "S3.13.2-5", "S3.13.3.1-1", "S3.13.3.1-5", "S3.13.3.1-7", "S3.15-4", "S4.7.3-17",
    "V8.5.1.2-2", "V8.5.2.1-1", "V8.5.2.1-4",
)
@pytest.mark.parametrize("stage", [1, 2])
def test_one_swap_sets_the_flag_and_makes_the_page_dirty(stage):
    bench, iova, ipa = nested_system()
    bench.write_ste(s2ha=1, s2hd=1)
    bench.write_cd(ha=1, hd=1)
    if stage == 1:
        slot = bench.map(iova, ipa, af=0, ap=3, dbm=1)
    else:
        slot = bench.map2(ipa, 0x5000, af=0, s2ap=1, dbm=1)
    before = bench.descriptor(slot)
    read = bench.translate(iova)
    assert read.success and read.perm & UW and read.perm_s1 & UW
    assert bench.descriptor(slot) == before | AF
    bench.memory.write(slot, before.to_bytes(8, "little"))
    write = bench.translate(iova, write=True)
    assert write.success
    desired = before & ~AP2 | AF if stage == 1 else before | S2AP1 | AF
    assert bench.descriptor(slot) == desired
    swaps = [fetch[5] for fetch in write.fetches if len(fetch) > 5 and fetch[2] == slot]
    assert swaps == [(before, desired)]


@pytest.mark.rule(
    "S3.13.3.1-2", "S3.13.3.1-6", "S5.2-74", "S5.4-22", "V8.5.2.1-3", "V8.5.2.1-7",
    "V8.5.2.2-1", "V8.15.5.1-1",
)
def test_dbm_needs_both_enables_and_nothing_else_in_the_way():
    for ha, hd, success in ((0, 0, False), (1, 0, False), (0, 1, False), (1, 1, True)):
        bench, iova, ipa = nested_system()
        bench.map(iova, ipa, ap=3, dbm=1)
        bench.write_cd(ha=ha, hd=hd)
        assert bench.translate(iova, write=True).success == success
        bench, iova, ipa = nested_system()
        bench.map2(ipa, 0x5000, s2ap=1, dbm=1)
        bench.write_ste(s2ha=ha, s2hd=hd)
        assert bench.translate(iova, write=True).success == success
    bench, iova, ipa = nested_system()
    bench.write_cd(ha=1, hd=1)
    slot = bench.map(iova, ipa, ap=2, dbm=1)
    before = bench.descriptor(slot)
    assert bench.fault(iova, write=True) == "F_PERMISSION"
    assert bench.descriptor(slot) == before
    # WXN and the rule on unprivileged writes see a writable page.
    bench.map(iova, ipa, ap=3, dbm=1)
    assert bench.translate(iova).perm == UR | UW | UX | PR | PW
    bench.write_cd(wxn=1)
    assert bench.translate(iova).perm == UR | UW | PR | PW


@pytest.mark.rule("S3.13.5-1", "S3.13.5-2", "S7.3.16-2", "V8.4.2.1-1", "V8.5.2.1-8")
def test_a_stage_1_update_needs_stage_2_to_permit_the_write():
    bench, iova, ipa = nested_system()
    bench.write_cd(ha=1, hd=1)
    for flags, access in (({"af": 0}, {}), ({"ap": 3, "dbm": 1}, {"write": True})):
        slot = bench.map(iova, ipa, **flags)
        bench.map_self(slot & ~0xFFF, s2ap=1)
        before = bench.descriptor(slot)
        outcome = bench.translate(iova, **access)
        assert outcome.event == stage2_record(
            "F_PERMISSION", CLASS_TT, ipa=slot, iova=iova, **access
        )
        assert (outcome.stage, outcome.perm, outcome.perm_s1) == (3, 0, 0)
        assert bench.descriptor(slot) == before
        # A page of stage 2 that is writable but clean becomes dirty first.
        slot2 = bench.map_self(slot & ~0xFFF, s2ap=1, dbm=1)
        bench.write_ste(s2ha=1, s2hd=1)
        outcome = bench.translate(iova, **access)
        assert outcome.success
        updates = [fetch[0] for fetch in outcome.fetches if len(fetch) > 5]
        assert updates == ["S2TT update", "TT update"]
        assert bench.descriptor(slot2) & S2AP1
        bench.write_ste(s2ha=0, s2hd=0)


@pytest.mark.rule("V8.15.5-2")
def test_a_page_that_stage_1_refuses_is_marked_accessed_only_where_stage_2_lets_it():
    bench, iova, ipa = nested_system()
    bench.write_cd(ha=1)
    for s2ap, marked in ((3, True), (1, False)):
        slot = bench.map(iova, ipa, af=0, ap=0)
        bench.map_self(slot & ~0xFFF, s2ap=s2ap)
        outcome = bench.translate(iova)
        assert outcome.event == event_record(
            "F_PERMISSION", SID, write=False, event_class=CLASS_IN, iova=iova
        )
        assert bool(bench.descriptor(slot) & AF) == marked
    # In stage 2 the same, of its own descriptor.
    bench.write_ste(s2ha=1)
    bench.map(iova, ipa)
    slot2 = bench.map2(ipa, 0x5000, af=0, s2ap=2)
    assert bench.fault(iova) == "F_PERMISSION"
    assert bench.descriptor(slot2) & AF


@pytest.mark.rule("V8.15.4-5")
def test_what_fails_earlier_updates_nothing():
    bench, iova, ipa = nested_system()
    bench.write_cd(ha=1, ips=1)
    slot = bench.map(iova, 1 << 36, af=0)
    assert bench.fault(iova) == "F_ADDR_SIZE"
    assert not bench.descriptor(slot) & AF
    bench.write_ste(s2ha=1, s2ps=1)
    bench.map(iova, ipa & 0xFFFF_FFFF)
    slot2 = bench.map2(ipa & 0xFFFF_FFFF, 1 << 36, af=0)
    assert bench.fault(iova) == "F_ADDR_SIZE"
    assert not bench.descriptor(slot2) & AF


@pytest.mark.rule("S3.13-3", "V8.2.5.2-4", "V8.5.2.1-5")
def test_a_descriptor_that_changes_before_its_update_is_walked_again():
    # The page of the last stage-1 table is also the table of stage 2 that maps it, and one slot is
    # both the stage-1 leaf, big-endian, and the stage-2 leaf of its page, little-endian.
    bench, iova, _ = nested_system(endi=1)
    bench.write_cd(ha=1)
    bench.write_ste(s2ha=1, s2hd=1)
    page = bench.tables.slot(iova, 3) & ~0xFFF
    middle = bench.second.slot(page, 2)
    table = bench.second.read_descriptor(middle) & 0xFFFF_FFFF_F000
    bench.memory.write(page, bench.memory.read(table, 0x1000))
    bench.second.write_descriptor(middle, ptwriter.table_descriptor(12, page))
    entry = page >> 12 & 0x1FF
    descriptor = ptwriter.stage2_leaf_descriptor(
        12, 3, page, s2ap=1, memattr=15, dbm=1, ignored=0b11 << 56 | 1 << 62
    )
    bench.second.write_descriptor(page + 8 * entry, descriptor)
    # Stage 1 wants to set its access flag, which makes the page dirty, in the same 8 bytes.
    outcome = bench.translate(iova & ~0x1F_F000 | entry << 12)
    updates = [(fetch[0], fetch[5][0] == value(fetch)) for fetch in outcome.fetches if fetch[5:]]
    assert updates == [("S2TT update", True), ("TT update", False), ("TT update", True)]
    assert kinds(outcome).count("TT") == 8
    assert bench.descriptor(page + 8 * entry) == descriptor | S2AP1 | AF << 40


# ------------------------------------------------------------------------------------------------
# Stalls


def stalled(outcome):
    """Whether an outcome is a stall, with a record that says so."""
    record = outcome.event is not None and bool(outcome.event[11] & 0x80)
    assert (outcome.action == "stall") == record
    return record


@pytest.mark.rule(
    "S3.3.2-22", "S3.12-6", "S3.12.2-2", "S3.12.5-1", "S5.2-77", "S5.5-4", "S5.5-5", "S5.5-102",
)
def test_faults_stall_where_their_stage_says_so():
    for s, s2s, r, s2r in itertools.product((0, 1), repeat=4):
        bench, iova, ipa = nested_system()
        bench.write_cd(s=s, r=r)
        bench.write_ste(s2s=s2s, s2r=s2r)
        for name, bit, recorded in (("stage 1", s, r), ("data", s2s, s2r), ("CD", s2s, s2r)):
            if name == "stage 1":
                outcome = bench.translate(0)
            else:
                at, _ = place(bench, name, iova, ipa)
                slot = bench.second.slot(at, 3)
                bench.second.write_descriptor(slot, 0)
                outcome = bench.translate(iova)
            assert stalled(outcome) == bool(bit)
            assert (outcome.event is not None) == bool(bit or recorded)
            assert outcome.fault == "F_TRANSLATION" and not outcome.success


@pytest.mark.rule("S3.12-7", "S5.2-34", "S5.4.2-2", "S16.2.2-2")
@pytest.mark.parametrize(
    ("model", "cd", "ste", "fault"),
    [
        (0, {"s": 1}, {}, None),
        (0, {"s": 1}, {"s1stalld": 1}, "C_BAD_CD"),
        (0, {"s": 0}, {"s1stalld": 1}, None),
        (1, {"s": 1}, {}, "C_BAD_CD"),
        (2, {"s": 0}, {"s2s": 1}, "C_BAD_CD"),
        (2, {"s": 1}, {"s2s": 1}, None),
        (2, {"s": 1}, {"s2s": 1, "s1stalld": 1}, "C_BAD_STE"),
    ],
)
def test_stall_models(model, cd, ste, fault):
    bench, iova, _ = nested_system(features=stage2_features(stall_model=model))
    bench.write_ste(**ste)
    bench.write_cd(**cd)
    assert bench.fault(iova) == fault


@pytest.mark.rule("S2.2-6", "S3.13-1", "S5.4-23")
@pytest.mark.parametrize(
    ("httu", "fields", "bad"),
    [
        (0, {"ha": 1}, True), (0, {"hd": 1}, True), (1, {"ha": 1}, False), (1, {"hd": 1}, True),
        (1, {"ha": 1, "hd": 1}, True), (2, {"hd": 1}, False), (2, {"ha": 1, "hd": 1}, False),
    ],
)  # fmt: skip
def test_contexts_with_updates_need_httu(httu, fields, bad):
    bench, iova, _ = nested_system(features=stage2_features(httu=httu))
    bench.write_cd(**fields)
    assert (bench.fault(iova) == "C_BAD_CD") == bad


@pytest.mark.rule("S3.4-10", "S3.12-4", "S5.5-103", "S7.3.14-2")
def test_external_aborts_and_the_size_of_untranslated_inputs_never_stall():
    bench, iova, _ = nested_system(features=stage2_features(oas=4))
    bench.write_cd(s=1)
    bench.write_ste(s2s=1)
    bench.map2(bench.tables.slot(iova, 3), 0x7000_0000)
    outcome = bench.translate(iova)
    assert (outcome.action, outcome.fault) == ("abort", "F_WALK_EABT")
    bench.write_ste(config=0b110)
    outcome = bench.translate(1 << 44)
    assert (outcome.action, outcome.fault) == ("abort", "F_ADDR_SIZE")


# ------------------------------------------------------------------------------------------------
# Attributes

DEVICES = {0: 0x00, 1: 0x04, 2: 0x08, 3: 0x0C}


def strength(kind):
    return {"NC": 0, "WT": 1, "WB": 2}[kind]


KINDS = (None, "NC", "WT", "WB")
MAIR_OF = {"NC": 0x4, "WT": 0xB, "WB": 0xF}


def expected_attr(mair, memattr):
    """Combination of both stages without FWB, from the two tables."""
    outer, inner = memattr >> 2, memattr & 3
    if outer == 0 or inner == 0:
        device = DEVICES[inner] if outer == 0 else 0x00
        return min(device, mair) if mair < 0x10 else device
    if mair < 0x10:
        return mair
    halves = []
    for nibble, mine in ((mair >> 4, KINDS[outer]), (mair & 0xF, KINDS[inner])):
        theirs = {value: name for name, value in MAIR_OF.items()}[nibble]
        halves.append(MAIR_OF[min(theirs, mine, key=strength)])
    return halves[0] << 4 | halves[1]


@pytest.mark.rule(
    "S3.3.2-20", "S3.3.4-3", "S13.1-103", "S13.1.5-1", "S13.1.5-2", "V8.6.5-1", "V8.6.5.1-1",
    "V8.6.5.2-1", "V8.6.7.1-1",
)
@pytest.mark.parametrize("mair", [0x00, 0x04, 0x08, 0x0C, 0x44, 0xBB, 0xFF, 0xF4, 0x4F, 0xBF])
def test_types_of_both_stages_combine(mair):
    bench, iova, ipa = nested_system()
    bench.write_cd(mair=mair)
    for memattr, sh1, sh2 in itertools.product(range(16), (0, 2, 3), range(4)):
        if memattr not in (15, 7, 3) and (sh1, sh2) != (3, 0):
            continue
        bench.map(iova, ipa, sh=sh1)
        bench.map2(ipa, 0x5000, memattr=memattr, sh=sh2)
        outcome = bench.translate(iova)
        attr = expected_attr(mair, memattr)
        assert outcome.attr == attr, memattr
        strongest = OSH if OSH in (sh1, sh2) else ISH if ISH in (sh1, sh2) else NSH
        assert outcome.sh == (OSH if attr < 0x10 or attr == 0x44 else strongest)


FORCED = [
    # MemAttr[2:0], stage 1 type, result
    (0b000, 0x0C, 0x00), (0b001, 0x00, 0x00), (0b001, 0x0C, 0x04), (0b011, 0x08, 0x08),
    (0b000, 0xFF, 0x00), (0b010, 0x44, 0x08), (0b011, 0xBB, 0x0C),
    (0b100, 0xFF, 0x00), (0b100, 0x0C, 0x00),
    (0b101, 0x04, 0x04), (0b101, 0x44, 0x44), (0b101, 0xBB, 0x44), (0b101, 0xFF, 0x44),
    (0b110, 0x00, 0xFF), (0b110, 0x44, 0xFF), (0b110, 0xBB, 0xFF), (0b110, 0xAA, 0xEE),
    (0b110, 0xF4, 0xFF), (0b110, 0xE4, 0xEF),
    (0b111, 0x04, 0x04), (0b111, 0x44, 0x44), (0b111, 0xBB, 0xBB), (0b111, 0xF4, 0xF4),
]  # fmt: skip


@pytest.mark.rule("S2.4-1", "S5.2-32", "S13.1.6-1", "S13.4.4-1", "V8.6.3-1", "V8.6.6-1", "V8.6.6-2")
@pytest.mark.parametrize("ignored", [0, 0b1000])
@pytest.mark.parametrize(("code", "mair", "attr"), FORCED)
def test_forced_write_back(code, mair, attr, ignored):
    bench, iova, ipa = nested_system()
    bench.write_cd(mair=mair)
    bench.write_ste(s2fwb=1)
    bench.map2(ipa, 0x5000, memattr=code | ignored, sh=3)
    bench.map(iova, ipa, sh=0)
    outcome = bench.translate(iova)
    assert (outcome.attr, outcome.sh) == (attr, OSH if attr < 0x10 or attr == 0x44 else ISH)
    # Without the feature the field is RES0.
    bench.features.fwb = 0
    if mair not in (0xAA, 0xE4):
        assert bench.translate(iova).attr == expected_attr(mair, code | ignored)


@pytest.mark.rule("S13.1-94", "S13.4-2", "S13.5-1", "V8.2.12.1-1")
def test_the_input_combines_with_stage_2_alone():
    bench = Nested(config=0b110)
    for ste, memattr, sh, expected in (
        ({}, 15, 0, (0xFF, NSH)),
        ({}, 15, 3, (0xFF, ISH)),
        ({"shcfg": 2}, 15, 3, (0xFF, OSH)),
        ({}, 10, 0, (0xBB, NSH)),
        ({}, 2, 0, (0x08, OSH)),
        ({"alloccfg": 0b1100}, 15, 0, (0xEE, NSH)),
        ({"mtcfg": 1, "memattr": 1}, 15, 0, (0x04, OSH)),
        ({"mtcfg": 1, "memattr": 1, "s2fwb": 1}, 6, 0, (0xFF, OSH)),
        ({"mtcfg": 1, "memattr": 5, "s2fwb": 1}, 6, 0, (0xFF, OSH)),
    ):
        usual = {"shcfg": 1, "mtcfg": 0, "alloccfg": 0, "s2fwb": 0}
        bench.write_ste(**usual | ste)
        bench.map2(0x1000, 0x5000, memattr=memattr, sh=sh)
        outcome = bench.translate(0x1000)
        assert (outcome.attr, outcome.sh) == expected, ste


@pytest.mark.rule("S5.2-64", "V8.6.7-1")
def test_shareability_of_52_bit_descriptors_is_the_stes():
    second = {"granule_lg2": 12, "tsz": 24, "start_level": 1, "ds": True}
    for code, expected in ((0, NSH), (1, NSH), (2, OSH), (3, ISH)):
        bench = Nested(config=0b110, second=second)
        bench.write_ste(s2sh0=code)
        bench.map2(0x1000, 0x5000)
        assert bench.translate(0x1000).sh == expected


# ------------------------------------------------------------------------------------------------
# The small system


def test_the_small_system_has_the_faults_of_stage_2_that_it_names():
    smmu, _ = small.system()
    for request, (number, stage, event_class) in small.STAGE2_FAULTS.items():
        result = smmu.translate(request.sid, request.iova, **request.access)
        record = int.from_bytes(result.event.record, "little")
        assert (result.event.number, result.stage) == (number, stage), request
        assert (record >> 103 & 1, record >> 104 & 3) == (1, event_class), request


# ------------------------------------------------------------------------------------------------
# Generators


def place_of(outcome):
    """(stage, S2, CLASS) of a fault's record."""
    number = int.from_bytes(outcome.event, "little")
    return outcome.stage, number >> 103 & 1, number >> 104 & 3


def possible_cells():
    """Every (action, event, stage, S2, CLASS) that a recorded fault of an address can have."""
    stage1 = [(stage, 0, CLASS_IN) for stage in (1, 3)]
    stage2 = [(2, 1, CLASS_CD), (2, 1, CLASS_IN), (3, 1, CLASS_TT), (3, 1, CLASS_IN)]
    for name in ("F_TRANSLATION", "F_ADDR_SIZE", "F_ACCESS", "F_PERMISSION"):
        for where in stage1:
            yield from ((action, name, *where) for action in ("abort", "raz_wi", "stall"))
        for where in stage2:
            yield from ((action, name, *where) for action in ("abort", "stall"))
    yield from (("abort", "F_ADDR_SIZE", stage, 0, CLASS_IN) for stage in (0, 2))
    for where in [(1, 0, CLASS_TT), (3, 0, CLASS_TT), *stage2]:
        yield "abort", "F_WALK_EABT", *where


@pytest.mark.rule("S3.3.2-25", "L-3")
@pytest.mark.slow
def test_nested_systems_succeed_mostly_and_fault_in_every_place():
    cells, ends, updates, shapes = (collections.Counter() for _ in range(4))
    rng = random.Random(11)
    for _ in range(1000):
        system = tablegen.random_nested_system(rng)
        cache = ContextCache()
        for request in system.requests(100):
            outcome = translate(
                system.read, system.features, system.regs, cache=cache,
                store=system.memory.write, **request._asdict(),
            )  # fmt: skip
            if outcome.event is not None and outcome.fault in dict.fromkeys(
                name for _, name, *_ in possible_cells()
            ):
                cells[outcome.action, outcome.fault, *place_of(outcome)] += 1
            config = next((f[4][0] >> 1 & 7 for f in outcome.fetches if f[0] == "STE" and f[4]), 0)
            ends[config, outcome.success] += 1
            for fetch in outcome.fetches:
                if len(fetch) > 5:
                    updates[fetch[0]] += 1
                elif fetch[0] == "S2TT":
                    shapes[fetch[1]] += 1
    possible = set(possible_cells())
    assert possible == set(cells), possible ^ set(cells)
    nested = ends[7, True] + ends[7, False]
    assert nested >= 50_000 and ends[6, True] >= 5_000 and ends[5, True] >= 5_000
    assert 0.55 <= ends[7, True] / nested <= 0.72
    assert min(updates["TT update"], updates["S2TT update"]) >= 2000
    assert set(shapes) == {-1, 0, 1, 2, 3}


def test_nested_noise_gets_through_too():
    faults = collections.Counter()
    rng = random.Random(12)
    for _ in range(30):
        system = tablegen.random_nested_bytes_system(rng)
        for request in system.requests(100):
            outcome = translate(
                system.read, system.features, system.regs, store=system.memory.write,
                **request._asdict(),
            )  # fmt: skip
            faults[outcome.fault or outcome.action, outcome.stage] += 1
    for end in (("ok", 2), ("ok", 3), ("F_PERMISSION", 2), ("F_TRANSLATION", 3), ("C_BAD_CD", 0)):
        assert faults[end], end


def test_a_cache_changes_nothing_under_updates_either():
    rng = random.Random(13)
    updated = 0
    for _ in range(60):
        system = tablegen.random_nested_system(rng)
        other = system.with_memory(system.memory.copy())
        cache = ContextCache()
        for request in system.requests(40):
            cached, plain = (
                translate(
                    one.read, one.features, one.regs, cache=kept, store=one.memory.write,
                    **request._asdict(),
                )
                for one, kept in ((system, cache), (other, None))
            )  # fmt: skip
            assert cached == plain
            updated += any(len(fetch) > 5 for fetch in plain.fetches)
        assert system.regions() == other.regions()
    assert updated >= 50


def test_perm_is_what_each_access_finds_without_updates():
    rng = random.Random(14)
    checked = 0
    while checked < 500:
        system = tablegen.random_nested_system(rng)
        if system.features.httu:
            continue
        cache = ContextCache()

        def end(request, system=system, cache=cache):
            return translate(
                system.read, system.features, system.regs, cache=cache, **request._asdict()
            )

        for request in system.requests(30):
            outcome = end(request)
            if not outcome.success and (outcome.fault != "F_PERMISSION" or not outcome.perm_s1):
                continue
            found = 0
            for priv in (False, True):
                for write, instr in ((False, False), (True, False), (False, True)):
                    access = request._replace(write=write, priv=priv, instr=instr)
                    if end(access).success:
                        found |= reference.access_bit(write, priv, instr)
            # Of stage 1 alone, where that refused.
            stage1_alone = not outcome.success and outcome.perm == outcome.perm_s1
            assert found & ~outcome.perm == 0
            assert stage1_alone or found == outcome.perm
            checked += 1


def test_seeds_name_nested_systems():
    for maker in (tablegen.random_nested_system, tablegen.random_nested_bytes_system):
        one, two = maker(random.Random(6)), maker(random.Random(6))
        assert one.regions() == two.regions()
        assert (one.features, one.regs) == (two.features, two.regs)
        assert one.requests(50) == two.requests(50)


def test_updates_need_a_way_to_store():
    bench, iova, ipa = nested_system()
    bench.write_cd(ha=1)
    bench.map(iova, ipa, af=0)
    with pytest.raises(TypeError, match="store"):
        translate(bench.memory.read, bench.features, bench.regs, SID, iova)
