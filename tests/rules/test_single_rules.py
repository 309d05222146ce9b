"""Rules of docs/rules.md that no other test states alone: what is cached, and what is ignored."""

import itertools

import numpy as np
import ptwriter
import pytest
import reference
import small
import twin
from bench import (
    CONTEXT_TABLE,
    IOVA,
    SID,
    STREAM_TABLE,
    VMID,
    Bench,
    Nested,
    cached,
    mapped,
    nested_system,
    outcome,
    stage2_features,
)
from rawfeatures import raw_of
from reference import default_features

from smmufast import Caches, Memory, Smmu, layout

# ------------------------------------------------------------------------------------------------
# TLB


@pytest.mark.rule("S4.3-1", "S4.3-101", "S4.7.3-12")
def test_a_cached_translation_is_used_until_it_is_invalidated():
    bench, smmu, slot = mapped()
    assert outcome(smmu) == 0x5000
    bench.tables.write_descriptor(slot, 0)
    assert outcome(smmu, IOVA + 8) == 0x5008
    for command in ("CFGI_ALL", "CFGI_STE_RANGE"):
        smmu.command(command, StreamID=SID, Range=31)
        assert outcome(smmu) == 0x5000  # a TLB needs its own command
    smmu.command("TLBI_NSNH_ALL")
    assert outcome(smmu) == "F_TRANSLATION"


@pytest.mark.rule("V8.15.1.5-1")
def test_permissions_are_tested_on_every_hit():
    bench, smmu, slot = mapped(ap=3)
    assert outcome(smmu) == 0x5000
    bench.tables.write_descriptor(slot, 0)
    assert outcome(smmu, write=True) == "F_PERMISSION"
    assert outcome(smmu, priv=True) == 0x5000
    assert smmu.caches.tlb.hits == 2


@pytest.mark.rule("S3.17-14")
@pytest.mark.parametrize("s2ap", [1, 2])
def test_permissions_of_stage_2_are_tested_on_every_hit(s2ap):
    bench, iova, ipa = nested_system()
    slot = bench.map2(ipa, 0x5000, s2ap=s2ap)
    smmu = cached(bench)
    assert outcome(smmu, iova, write=s2ap == 2) == 0x5000
    bench.second.write_descriptor(slot, 0)
    result = smmu.translate(SID, iova, write=s2ap == 1)
    assert (result.fault.name, result.fault.s2, result.fault.class_) == ("F_PERMISSION", True, "IN")
    assert result.fault.ipa == ipa


@pytest.mark.rule(
    "S3.13.1-3", "S3.17-13", "S3.21.1-1", "V8.2.1-4", "V8.5.1.1-2", "V8.15.1.4-1", "V8.16-1",
)
@pytest.mark.parametrize(
    ("descriptor", "fault"),
    [(0, "F_TRANSLATION"), (1 << 51 | 0xFF3, "F_ACCESS"), (1 << 47 | 0xFFF, "F_ADDR_SIZE")],
)
def test_faults_other_than_of_permission_are_not_cached(descriptor, fault):
    bench, smmu, slot = mapped()
    good = bench.tables.read_descriptor(slot)
    bench.write_cd(ips=4)
    bench.tables.write_descriptor(slot, descriptor & ~(1 << 10) if fault == "F_ACCESS"
                                  else descriptor)  # fmt: skip
    assert outcome(smmu) == fault
    assert len(smmu.caches.tlb) == 0
    bench.tables.write_descriptor(slot, good)
    assert outcome(smmu) == 0x5000


@pytest.mark.rule(
    "S2.3-3", "S3.3.3-6", "S3.17-8", "S5.2.1-8", "S5.4.1-8", "S5.4.1-9", "V8.16.3.1-1",
)
def test_translations_are_shared_by_vmid_and_asid():
    bench = Bench()
    slot = bench.tables.slot(IOVA, 3)
    bench.map(IOVA, 0x5000, ng=1)
    bench.write_cd(asid=3)
    bench.write_cd(1, asid=4)
    bench.write_ste(SID + 1)
    bench.write_ste(SID + 2, s1contextptr=CONTEXT_TABLE + 64)
    smmu = cached(bench)
    assert outcome(smmu) == 0x5000
    bench.tables.write_descriptor(slot, 0)
    assert smmu.translate(SID + 1, IOVA).pa == 0x5000
    assert smmu.translate(SID + 2, IOVA).fault.name == "F_TRANSLATION"


@pytest.mark.rule("S3.17.1-2", "S5.4-24")
@pytest.mark.parametrize("aset", [0, 1])
def test_global_pages_are_shared_within_an_asid_set(aset):
    bench = Bench()
    slot = bench.tables.slot(IOVA, 3)
    bench.map(IOVA, 0x5000, ng=0)
    bench.write_cd(asid=3, aset=0)
    bench.write_cd(1, asid=4, aset=aset)
    bench.write_ste(SID + 1, s1contextptr=CONTEXT_TABLE + 64)
    smmu = cached(bench)
    assert outcome(smmu) == 0x5000
    bench.tables.write_descriptor(slot, 0)
    assert outcome(smmu) == 0x5000
    shared = {0: 0x5000, 1: 0}[aset]
    assert (smmu.translate(SID + 1, IOVA).pa or 0) == shared
    assert smmu.translate_batch(SID + 1, np.full(2, IOVA, np.uint64))["pa"].tolist() == [shared] * 2


@pytest.mark.rule("S3.17-6", "S3.17-7", "S5.2-54", "S5.2-55", "V8.1.2-2", "V8.16.3.1-5")
@pytest.mark.parametrize(
    ("s2p", "config", "strw", "vmid"),
    [(1, 0b101, 0, VMID), (1, 0b101, 2, 0), (0, 0b101, 0, 0), (1, 0b111, 0, VMID)],
)
def test_stage_1_alone_is_tagged_by_the_vmid_too(s2p, config, strw, vmid):
    bench, iova, _ = nested_system()
    bench.features.s2p = s2p
    bench.write_ste(config=config, strw=strw)
    if config == 0b101:
        bench.map(iova, 0x5000)
    smmu = cached(bench)
    result = smmu.translate(SID, iova)
    assert result.pa == 0x5000
    (entry,) = smmu.caches.tlb
    assert (result.vmid or 0, entry.vmid) == (vmid, vmid)


@pytest.mark.parametrize("bbml", [0, 1, 2])
def test_blocks_with_nt_are_not_cached(bbml):
    bench = Bench(default_features(bbml=bbml))
    bench.map(0, 0x20_0000, 2, ignored=1 << 16)
    smmu = cached(bench)
    assert outcome(smmu, 0) == 0x20_0000
    assert len(smmu.caches.tlb) == (bbml != 1)


@pytest.mark.rule("S3.21.1.2-2", "V8.7.3-1")
@pytest.mark.parametrize("nested", ["combined", "split"])
@pytest.mark.parametrize("bbml", [0, 1, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_nt_of_either_stage_counts_with_bbml_1_alone(stage, bbml, nested):
    bench, iova, ipa = nested_system()
    bench.features.bbml = bbml
    block = iova & -0x20_0000
    if stage == 1:
        bench.map(block + 0x20_0000, ipa & -0x20_0000, 2, ignored=1 << 16)
        address, pa = block + 0x20_0000 + (ipa & 0x1F_F000), 0x5000
    else:
        other = (ipa & -0x20_0000) + 0x20_0000
        bench.map2(other, 0x40_0000, 2, ignored=1 << 16)
        bench.map(iova + 0x1000, other)
        address, pa = iova + 0x1000, 0x40_0000
    smmu = cached(bench, Caches.server(nested=nested))
    assert outcome(smmu, address) == pa
    kept = {entry.kind for entry in smmu.caches.tlb}
    kinds = {"combined"} if nested == "combined" else {"stage 1", "stage 2"}
    if bbml != 1:
        assert kept == kinds
    elif nested == "combined":
        assert kept == set()
    else:
        missing = block + 0x20_0000 if stage == 1 else other
        kind = f"stage {stage}"
        assert not [e for e in smmu.caches.tlb if e.kind == kind and e.start == missing]


@pytest.mark.parametrize("bbml", [0, 1])
def test_blocks_of_stage_2_with_nt_are_not_cached(bbml):
    bench = Nested(stage2_features(bbml=bbml), config=0b110)
    ipa = 0x66_0020_0000
    bench.map2(ipa, 0x4000_0000, 2, ignored=1 << 16)
    bench.map2(ipa + 0x20_0000, 0x4020_0000, 2)
    smmu = cached(bench)
    assert outcome(smmu, ipa + 8) == 0x4000_0008
    assert len(smmu.caches.tlb) == (bbml == 0)
    assert outcome(smmu, ipa + 0x20_0008) == 0x4020_0008
    assert len(smmu.caches.tlb) == 1 + (bbml == 0)


@pytest.mark.parametrize("how", ["combined", "split"])
@pytest.mark.parametrize(("first", "second"), [*itertools.product((0, 1), repeat=2)])
def test_nested_translations_of_blocks_with_nt_are_not_cached(first, second, how):
    bench = Nested(stage2_features(bbml=1))
    iova, ipa = 0x1240_0000, 0x66_0020_0000
    bench.map(iova, ipa, 2, ignored=first << 16)
    bench.map2(ipa, 0x4000_0000, 2, ignored=second << 16)
    smmu = cached(bench, Caches(tlb=(8, 8), nested=how))
    for _ in range(2):
        assert outcome(smmu, iova + 8) == 0x4000_0008
    kept = {(entry.kind, entry.start) for entry in smmu.caches.tlb}
    if how == "combined":
        assert (("combined", iova) in kept) == (not first and not second)
    else:
        assert (("stage 1", iova) in kept) == (not first)
        assert (("stage 2", ipa) in kept) == (not second)


@pytest.mark.parametrize("page", [1 << 16, 0])
def test_nt_is_an_address_bit_of_pages(page):
    bench = Bench(default_features(bbml=1))
    bench.map(0x3000, 0x5000_0000 | page)
    smmu = cached(bench)
    assert outcome(smmu, 0x3000) == 0x5000_0000 | page
    assert len(smmu.caches.tlb) == 1


@pytest.mark.rule("S3.21.1.2-3", "V8.7.1-1")
def test_the_contiguous_hint_makes_no_larger_entry():
    _, smmu, _ = mapped(contiguous=1)
    assert outcome(smmu) == 0x5000
    (entry,) = smmu.caches.tlb
    assert (entry.lg2, entry.contiguous) == (12, True)
    assert outcome(smmu, IOVA + 0x1000) == "F_TRANSLATION"


@pytest.mark.parametrize("how", ["combined", "split", None])
@pytest.mark.parametrize(("first", "second"), [*itertools.product((False, True), repeat=2)])
def test_the_contiguous_hint_of_both_stages_is_that_of_stage_1(first, second, how):
    bench, iova, ipa = nested_system()
    bench.map(iova, ipa, contiguous=int(first))
    bench.map2(ipa, 0x5000, contiguous=int(second))
    smmu = cached(bench, how and Caches(tlb=(8, 8), nested=how)) if how else twin.smmu_of(bench)
    for _ in range(2):  # walked to, then found
        assert smmu.translate(SID, iova).contiguous is first
    if how:
        found = {e.kind: e.contiguous for e in smmu.caches.tlb if e.start in (iova, ipa)}
        assert found == (
            {"combined": first} if how == "combined" else {"stage 1": first, "stage 2": second}
        )
    bench.write_ste(config=0b110)
    smmu = cached(bench) if how else twin.smmu_of(bench)
    for _ in range(2):
        assert smmu.translate(SID, ipa).contiguous is second


@pytest.mark.parametrize(
    ("command", "fields"),
    [
        ("TLBI_S12_VMALL", {}),
        ("TLBI_NH_ALL", {}),
        ("TLBI_NH_ASID", {"ASID": 3}),
        ("TLBI_NH_VA", {"ASID": 3, "Address": IOVA}),
        ("TLBI_NH_VAA", {"Address": IOVA}),
    ],
)
def test_an_invalidation_spares_other_vmids(command, fields):
    bench = Bench(stage2_features())
    bench.map(IOVA, 0x5000, ng=1)
    bench.write_cd(asid=3)
    bench.write_ste(s2vmid=7)
    bench.write_ste(SID + 1, s2vmid=8)
    smmu = cached(bench)
    for sid in (SID, SID + 1):
        assert smmu.translate(sid, IOVA).pa == 0x5000
    smmu.command(command, VMID=7, **fields)
    assert [entry.vmid for entry in smmu.caches.tlb] == [8]


@pytest.mark.parametrize("aset", [0, 1])
def test_a_context_finds_what_it_filled_whatever_its_asid_set(aset):
    bench = Bench()
    slot = bench.tables.slot(IOVA, 3)
    bench.map(IOVA, 0x5000, ng=1)
    bench.write_cd(asid=3, aset=aset)
    smmu = cached(bench)
    assert outcome(smmu) == 0x5000
    bench.tables.write_descriptor(slot, 0)
    assert outcome(smmu) == 0x5000
    (entry,) = smmu.caches.tlb
    assert entry.aset == aset


def test_pages_without_an_asid_are_global():
    bench = Bench()
    bench.map(IOVA, 0x5000, ng=1)
    for smmu in (twin.smmu_of(bench), cached(bench)):
        for _ in range(2):
            assert smmu.translate(SID, IOVA).is_global is False
    bench.write_ste(strw=2)
    for cr2 in (0b10, 0b11):  # EL2, and with E2H a world that has ASIDs
        bench.regs.cr2 = cr2
        for smmu in (twin.smmu_of(bench), cached(bench)):
            for _ in range(2):
                assert smmu.translate(SID, IOVA).is_global is (cr2 == 0b10)


@pytest.mark.rule("S3.13.3.1-10", "V8.5.2.1-6")
@pytest.mark.parametrize("how", ["combined", "split", "stage 2 alone"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_write_to_a_page_that_is_still_clean_walks_again(stage, how):
    bench, iova, ipa = nested_system()
    bench.write_ste(s2ha=1, s2hd=1)
    bench.write_cd(ha=1, hd=1)
    if how == "stage 2 alone":
        if stage == 1:
            return  # there is none
        bench.write_ste(config=0b110)
        iova = ipa
    if stage == 1:
        slot = bench.map(iova, ipa, ap=3, dbm=1)
        dirty = bench.descriptor(slot) & ~reference.AP2
    else:
        slot = bench.map2(ipa, 0x5000, s2ap=1, dbm=1)
        dirty = bench.descriptor(slot) | reference.S2AP1
    smmu = cached(bench, Caches(tlb=(8, 8), nested="split" if how == "split" else "combined"))
    assert outcome(smmu, iova) == 0x5000
    assert bench.descriptor(slot) != dirty
    assert outcome(smmu, iova, write=True) == 0x5000
    assert bench.descriptor(slot) == dirty
    hits, misses = smmu.caches.tlb.hits, smmu.caches.tlb.misses
    assert outcome(smmu, iova, write=True) == 0x5000
    assert smmu.caches.tlb.hits > hits
    assert smmu.caches.tlb.misses == misses


@pytest.mark.rule("S3.4.1-4", "S4.4.2-3")
def test_commands_by_address_do_not_know_of_ignored_top_bytes():
    bench, smmu, slot = mapped()
    bench.write_cd(tbi0=1)
    tagged = 0x5A << 56 | IOVA
    assert outcome(smmu, tagged) == 0x5000
    bench.tables.write_descriptor(slot, 0)
    assert outcome(smmu) == 0x5000  # one entry serves all tags
    smmu.command("TLBI_NH_VAA", Address=tagged)
    assert outcome(smmu, tagged) == 0x5000
    smmu.command("TLBI_NH_VAA", Address=IOVA)
    assert outcome(smmu, tagged) == "F_TRANSLATION"


@pytest.mark.rule("S3.17-12", "S3.21.1-2", "S4.4.2.3-2")
def test_tables_in_walk_caches_go_unless_only_leaves_are_named():
    bench, smmu, slot = mapped()
    other = IOVA + 0x1000
    assert outcome(smmu) == 0x5000
    bench.tables.write_descriptor(bench.tables.slot(IOVA, 2), 0)
    bench.memory.write(slot + 8, bench.memory.read(slot, 8))
    assert outcome(smmu, other) == 0x5000  # through the table that is cached
    for leaf, found in ((1, 0x5000), (0, "F_TRANSLATION")):
        smmu.command("TLBI_NH_VAA", Address=other, Leaf=leaf)
        assert outcome(smmu, other) == found


def by_walk(smmu, iova):
    """The result of a walk whose fetches are answered from the Smmu's memory."""
    walk = smmu.start_walk(SID, iova)
    while (fetch := walk.request) is not None:
        walk.supply(smmu.memory.read(fetch.address, fetch.size))
    return walk.result


@pytest.mark.parametrize("face", [lambda smmu, iova: smmu.translate(SID, iova), by_walk])
def test_an_update_of_a_table_that_stage_2_has_made_read_only_is_no_read(face):
    """The TLB has the table's page as one that may be written; memory has it no more."""
    bench, iova, ipa = nested_system()
    bench.write_ste(s2ha=1, s2hd=1)
    bench.write_cd(ha=1)
    bench.map(iova + 0x1000, ipa, af=0)
    table = bench.tables.slot(iova, 3) & ~0xFFF
    bench.map_self(table, s2ap=1, dbm=1)
    smmu = cached(bench, Caches.small(nested="split"))
    assert smmu.translate(SID, iova)
    bench.map_self(table, s2ap=1)
    result = face(smmu, iova + 0x1000)
    assert result.fault.name == "F_PERMISSION"
    assert (result.event.s2, result.event.class_, result.event.ttrnw) == (True, "TT", False)


# ------------------------------------------------------------------------------------------------
# Configuration caches


@pytest.mark.rule("S16.2.2-3")
def test_controls_of_permissions_count_when_a_page_is_cached():
    bench, smmu, _ = mapped()
    bench.map(IOVA + 0x1000, 0x6000)
    assert outcome(smmu, instr=True) == 0x5000
    bench.write_cd(wxn=1)
    smmu.command("CFGI_CD", StreamID=SID)
    assert outcome(smmu, instr=True) == 0x5000
    assert outcome(smmu, IOVA + 0x1000, instr=True) == "F_PERMISSION"
    smmu.command("TLBI_NSNH_ALL")
    assert outcome(smmu, instr=True) == "F_PERMISSION"


def test_memory_types_of_hits_are_those_of_the_cd():
    bench, smmu, _ = mapped()
    assert smmu.translate(SID, IOVA).attr == bench.cd["mair"] & 0xFF == 0x44
    bench.write_cd(mair=0x04)
    assert smmu.translate(SID, IOVA).attr == 0x44
    smmu.command("CFGI_CD", StreamID=SID)
    assert (smmu.translate(SID, IOVA).attr, smmu.caches.tlb.hits) == (0x04, 2)


def test_tables_of_another_granule_do_not_serve():
    """Two contexts share an ASID, which software should not do, and have tables of their own."""
    bench = Bench()
    bench.map(IOVA, 0x5000)
    other = ptwriter.PageTables(bench.memory, bench.allocate, 16, 16)
    other.map(IOVA, 0x7_0000, ap=1)
    bench.write_cd(asid=3)
    bench.write_cd(1, ttb0=other.base, tg0=1)
    bench.write_ste(SID + 1, s1contextptr=CONTEXT_TABLE + 64)
    smmu = cached(bench, Caches(walk1=(8, 8)))
    for _ in range(2):
        assert outcome(smmu) == 0x5000
        assert smmu.translate(SID + 1, IOVA).pa == 0x7_0000 | IOVA & 0xFFFF
    assert len(smmu.caches.walk1) > 3


@pytest.mark.rule("S3.21.3-7", "S4.8-1")
def test_structures_are_cached_until_their_command():
    bench, smmu, _ = mapped()
    assert outcome(smmu) == 0x5000
    bench.write_cd(v=0)
    bench.write_ste(v=0)
    assert outcome(smmu) == 0x5000
    smmu.command("CFGI_CD", StreamID=SID)
    assert outcome(smmu) == "C_BAD_CD"
    bench.write_cd(v=1)
    assert outcome(smmu) == 0x5000
    smmu.command("CFGI_STE", StreamID=SID)
    assert outcome(smmu) == "C_BAD_STE"


@pytest.mark.rule("S3.21.3-1", "S3.21.3-8", "S5.2.1-2", "S5.4.1-4")
def test_structures_that_are_not_legal_are_not_cached():
    bench, smmu, _ = mapped()
    for write, bad in ((bench.write_ste, {"v": 0}), (bench.write_ste, {"strw": 1}),
                       (bench.write_cd, {"v": 0}), (bench.write_cd, {"tg0": 3})):  # fmt: skip
        good = {name: {"v": 1}.get(name, 0) for name in bad}
        write(**bad)
        smmu.command("CFGI_ALL")
        assert outcome(smmu).startswith("C_BAD_")
        write(**good)
        assert outcome(smmu) == 0x5000
    # An STE that aborts is legal.
    smmu.command("CFGI_ALL")
    bench.write_ste(config=0)
    assert smmu.translate(SID, IOVA).action == "abort"
    bench.write_ste(config=5)
    assert smmu.translate(SID, IOVA).action == "abort"


@pytest.mark.rule("S4.3.1-3", "S5.1.1-3")
def test_level_1_descriptors_are_read_with_every_structure_that_is_not_cached():
    bench = Bench()
    bench.map(IOVA, 0x5000)
    bench.regs.strtab_base_cfg = 1 << 16 | 6 << 6 | 8
    bench.memory.write(STREAM_TABLE + 0x800, bench.memory.read(STREAM_TABLE, 0x400))
    level1 = (STREAM_TABLE + 0x800 | 7).to_bytes(8, "little")
    bench.memory.write(STREAM_TABLE, level1)
    bench.write_ste(SID + 32)  # the same bytes at another index
    smmu = cached(bench)
    assert outcome(smmu) == 0x5000
    bench.memory.write(STREAM_TABLE, bytes(8))
    assert outcome(smmu) == 0x5000
    assert smmu.translate(SID + 1, IOVA).fault.name == "C_BAD_STREAMID"
    smmu.command("CFGI_STE", StreamID=SID, Leaf=1)
    assert outcome(smmu) == "C_BAD_STREAMID"


@pytest.mark.rule(
    "S3.11-13", "S3.11-15", "S4.2-3", "S6.3.9.6-8", "S6.3.9.6-9", "S6.3.9.6-15", "V8.16-2",
)
def test_caches_keep_what_they_hold_while_the_smmu_is_off():
    bench, smmu, slot = mapped()
    assert outcome(smmu) == 0x5000
    bench.tables.write_descriptor(slot, 0)
    held = len(smmu.caches)
    smmu.write("CR0", 0b100)
    assert smmu.translate(SID, IOVA).action == "disabled"
    smmu.command("PREFETCH_ADDR", StreamID=SID, Address=0x7000_0000)
    assert len(smmu.caches) == held
    smmu.write("CR0", 0b101)
    assert outcome(smmu) == 0x5000


# ------------------------------------------------------------------------------------------------
# Prefetch


@pytest.mark.rule("S3.21.3-6", "S4.2-1", "S4.2-101", "S4.2.1-1", "S4.2.2-1", "S7.2-2")
def test_prefetch_commands_fill_caches_and_record_nothing():
    bench, smmu, slot = mapped()
    smmu.command("PREFETCH_CONFIG", StreamID=SID)
    assert [len(cache) for cache in (smmu.caches.ste, smmu.caches.cd, smmu.caches.tlb)] == [1, 1, 0]
    smmu.command("PREFETCH_ADDR", StreamID=SID, Address=IOVA, Size=3)
    assert [entry.start for entry in smmu.caches.tlb] == [IOVA]  # the first of the addresses
    bench.tables.write_descriptor(slot, 0)
    assert outcome(smmu) == 0x5000
    smmu.memory.add_private(0x9000_0000, 0x1000)
    smmu.write("CR0", 1)
    smmu.write("EVENTQ_BASE", 0x9000_0000 | 3)
    smmu.write("CR0", 5)
    bench.write_cd(s=1)
    for fields in ({"StreamID": SID, "Address": 0x7000}, {"StreamID": SID + 1},
                   {"StreamID": 1 << 20}):  # fmt: skip
        smmu.command("PREFETCH_ADDR", **fields)
        smmu.command("PREFETCH_CONFIG", StreamID=fields["StreamID"])
    assert smmu.read("EVENTQ_PROD") == 0 and smmu.stalls == []


# ------------------------------------------------------------------------------------------------
# Fields that mean nothing

# Hints, properties of fetches, and options that are not modelled.
WITHOUT_EFFECT = {
    "STE": "S1CIR S1COR S1CSH S2HWU59 S2HWU60 S2HWU61 S2HWU62 DRE CONT DCP PPAR MEV SW_RESERVED "
           "S1PIE S1MPAM NSCFG S2IR0 S2OR0 S2HAFT S2PIE S2POE DPT_VMATCH S2NSW S2NSA S2SKL PARTID "
           "S_S2T0SZ S_S2SL0 S_S2TG MECID PMG MPAM_NS AssuredOnly TL0 TL1 VMSPtr S2SW S2SA "
           "S_S2SL0_2 S_S2TTB S_S2SKL " + " ".join(f"S2POI{i}" for i in range(16)),
    "CD": "IR0 OR0 IR1 OR1 UWXN NSCFG0 HAFT PnCH HWU059 HWU060 HWU061 HWU062 SKL0 NSCFG1 AIE PIE "
          "HWU159 HWU160 HWU161 HWU162 AMAIR0 AMAIR1 PARTID PMG "
          + " ".join(f"PII{half}{i}" for half in "UP" for i in range(16)),
}  # fmt: skip
STAGE1 = "S1Fmt S1ContextPtr S1CDMax S1DSS S1CIR S1COR S1CSH S1STALLD STRW"
STAGE2 = ("S2T0SZ S2SL0 S2IR0 S2OR0 S2SH0 S2TG S2PS S2AA64 S2ENDI S2AFFD S2PTW S2HD S2HA S2S S2R "
          "S2SL0_2 S2DS S2TTB S2FWB")  # fmt: skip
OF_CONFIG = {
    "STAGE1": STAGE2, "STAGE2": STAGE1, "NESTED": "STRW",
    "BYPASSED": f"{STAGE1} {STAGE2} S2VMID EATS",
    "ABORTED": " ".join(f.name for f in layout.STE.fields if f.name not in ("V", "Config")),
}  # fmt: skip
IGNORED = [
    *(("STE", sid, WITHOUT_EFFECT["STE"]) for sid in OF_CONFIG),
    *(("STE", sid, names) for sid, names in OF_CONFIG.items()),
    *(("CD", sid, WITHOUT_EFFECT["CD"]) for sid in ("STAGE1", "NESTED")),
    ("CD", "STAGE1", "T1SZ TG1 SH1 TBI1 E0PD1 HAD1 TTB1"),  # EPD1=1
]


@pytest.mark.rule(
    "S3.1-1", "S3.3.2-13", "S5-2", "S5.2-8", "S5.2-28", "S5.2-31", "S5.2-53", "S5.4-16",
    "S5.4-35",
)
@pytest.mark.parametrize(("record", "sid", "names"), IGNORED, ids=lambda value: str(value)[:24])
def test_fields_without_effect_change_nothing(record, sid, names):
    sid = getattr(small, sid)
    at = small.STES + 64 * sid
    if record == "CD":
        at = small.GUEST_CDS if sid == small.NESTED else small.CDS
    requests = [request for request in small.REQUESTS if request.sid == sid]
    assert requests

    def rows(flipped=None):
        image = small.build()
        if flipped is not None:
            (field,) = (f for f in layout.record(record).fields if f.name == flipped)
            word = int.from_bytes(image[at : at + 64], "little")
            word ^= field.mask << 64 * field.dword
            image[at : at + 64] = word.to_bytes(64, "little")
        smmu, _ = small.system(image)
        return [
            small.row(smmu.translate(request.sid, request.iova, **request.access))
            for request in requests
        ]

    expected = rows()
    for name in names.split():
        assert rows(name) == expected, name
    assert rows("V") != expected


@pytest.mark.rule("S3.5.5-1", "S5.2-30", "S7.3.1-1")
def test_identical_events_are_never_merged():
    image = small.build()
    at = small.STES + 64 * small.STAGE1 + 10
    image[at] |= 1 << 3  # MEV is bit 83
    smmu, _ = small.system(image, eventq_base=0x9000_0000 | 3)
    smmu.memory.add_private(0x9000_0000, 0x1000)
    for _ in range(3):
        smmu.translate(small.STAGE1, small.UNMAPPED)
    records = [smmu.memory.read(0x9000_0000 + 32 * i, 32) for i in range(3)]
    assert smmu.read("EVENTQ_PROD") == 3
    assert len(set(records)) == 1 and any(records[0])


# ------------------------------------------------------------------------------------------------
# Priority


@pytest.mark.rule("S3.3.2-16", "S7.2-1", "S7.3.22-1", "S15-1")
def test_of_all_that_is_wrong_the_first_in_order_is_told():
    bench, iova, _ = nested_system()
    beyond = 1 << 60
    bench.write_ste(v=0, s1cdmax=4, s1dss=0)
    bench.write_cd(v=0)
    slot = bench.second.slot(CONTEXT_TABLE, 3)
    sound = bench.second.read_descriptor(slot)
    bench.second.write_descriptor(slot, 0)
    bench.regs.strtab_base = 0x7000_0000
    assert bench.fault(beyond, ssid=99, sid=16) == "C_BAD_STREAMID"
    assert bench.fault(beyond, ssid=99) == "F_STE_FETCH"
    bench.regs.strtab_base = STREAM_TABLE
    assert bench.fault(beyond, ssid=99) == "C_BAD_STE"
    bench.write_ste(v=1)
    assert bench.fault(beyond, ssid=99) == "C_BAD_SUBSTREAMID"
    assert bench.fault(beyond) == "F_STREAM_DISABLED"
    bench.write_ste(s1dss=2)
    found = bench.translate(beyond)
    assert (found.fault, found.stage) == ("F_TRANSLATION", 2)
    bench.map2(CONTEXT_TABLE, 0x7000_0000)
    assert bench.fault(beyond) == "F_CD_FETCH"
    bench.second.write_descriptor(slot, sound)
    assert bench.fault(beyond) == "C_BAD_CD"
    bench.write_cd(v=1)
    found = bench.translate(beyond)
    assert (found.fault, found.stage) == ("F_TRANSLATION", 3)
    assert bench.translate(iova).pa == 0x5000


# ------------------------------------------------------------------------------------------------
# Records, registers, commands


def dwords(record):
    """A record as four numbers in hexadecimal."""
    return " ".join(f"{int.from_bytes(record[i : i + 8], 'little'):016x}" for i in range(0, 32, 8))


@pytest.mark.rule("S3.12.1-2", "S7.3-1", "S7.3-2", "S7.3.13-2", "S7.3.13-4", "L-5")
def test_faults_write_the_worked_encodings():
    bench, _, _ = nested_system()
    bench.memory.add(STREAM_TABLE + 0x1000, 0x1000)
    bench.regs.strtab_base_cfg = 7
    bench.write_ste(0x42)
    assert dwords(bench.translate(0x1234_5678_9000, sid=0x42, write=True).event) == (
        "0000004200000010 0000020000000000 0000123456789000 0000000000000000"
    )
    assert dwords(bench.translate(0, sid=9).event) == (
        "0000000900000004 0000000000000000 0000000000000000 0000000000000000"
    )
    bench.write_ste(7, s1cdmax=4)
    bench.write_cd(3, ttb0=0x4000_1000)
    bench.map2(0x4000_1000, 0x5000, s2ap=0)
    assert dwords(bench.translate(0xDEAD_0000, sid=7, ssid=3, priv=True).event) == (
        "0000000700003813 0000118a00000000 00000000dead0000 0000000040001000"
    )


@pytest.mark.rule("L-6")
def test_a_stall_writes_the_worked_encoding():
    bench = Bench(default_features(stall_model=0, stall_max=8))
    bench.write_cd(s=1)
    bench.write_ste(1)
    smmu = cached(bench)
    found = [smmu.translate(1, 0x8000) for _ in range(6)]
    assert dwords(found[5].event.record) == (  # STAG 5
        "0000000100000010 0000020880000005 0000000000008000 0000000000000000"
    )


@pytest.mark.rule("S6.3.14-2", "S6.3.23-1", "S6.3.32-1", "S6.3.45-1", "S13.2-2")
@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("CR2", 0xF, 0b1011),  # no BTM, no PTM
        ("GBPA", 1 << 31 | 0xF_0000, 0xF_0000),
        ("GERROR_IRQ_CFG2", 0xFF, 0x3F),
        ("EVENTQ_IRQ_CFG2", 0xFF, 0x3F),
        ("PRIQ_IRQ_CFG1", 0x1234_5678, 0x1234_5678),
        ("S2PII", (1 << 64) - 1, 0),
        ("STATUSR", 1, 0),
        ("IDR6", 0xFFFF_FFFF, 0),
    ],
)
def test_registers_without_effect_keep_the_bits_that_there_are(name, value, kept):
    smmu = Smmu(Memory(), cr0=0, cr2=0, gbpa=0)
    smmu.write(name, value)
    assert smmu.read(name) == kept


@pytest.mark.rule("S6.3.34-1", "S6.3.35-1")
def test_page_requests_interrupt_by_a_message():
    memory = Memory()
    memory.add_private(0x9000_0000, 0x2000)
    smmu = Smmu(memory, cr0=3, priq_base=0x9000_0000 | 3)
    smmu.write("PRIQ_IRQ_CFG0", 0x9000_1000)
    smmu.write("PRIQ_IRQ_CFG1", 0xCAFE)
    smmu.write("IRQ_CTRL", 2)
    assert smmu.page_request(1, 0x1000, read=True).action == "queued"
    assert memory.read_u64(0x9000_1000) == 0xCAFE


@pytest.mark.rule("S6.3.21-1", "S6.3.22-1")
def test_global_errors_interrupt_by_a_message():
    memory = Memory()
    memory.add_private(0x9000_0000, 0x1000)
    smmu = Smmu(memory, strtab_base=0xA000_0000, eventq_base=0xB000_0000)
    smmu.write("GERROR_IRQ_CFG0", 0x9000_0008)
    smmu.write("GERROR_IRQ_CFG1", 0xBEEF)
    smmu.write("IRQ_CTRL", 1)
    assert smmu.translate(0, 0).fault.name == "F_STE_FETCH"
    assert smmu.gerror == 1 << 2
    assert memory.read_u64(0x9000_0008) == 0xBEEF


@pytest.mark.rule("S4.1.7-1")
def test_parameters_of_commands_that_name_nothing_have_no_effect():
    _, smmu, _ = mapped()
    assert outcome(smmu) == 0x5000
    before = list(smmu.caches.ste), list(smmu.caches.cd), list(smmu.caches.tlb)
    for name, fields in (
        ("CFGI_STE", {"StreamID": 0xFFFF_FFFF}),
        ("CFGI_CD", {"StreamID": SID, "SubstreamID": 0xF_FFFF}),
        ("CFGI_CD_ALL", {"StreamID": 1 << 31}),
        ("TLBI_NH_ASID", {"ASID": 0xFFFF}),
        ("TLBI_NH_VAA", {"Address": 0xFFFF_FFFF_FFFF_F000}),
    ):
        smmu.command(name, **fields)
        after = list(smmu.caches.ste), list(smmu.caches.cd), list(smmu.caches.tlb)
        assert after == before


@pytest.mark.rule("S3.17-11")
@pytest.mark.parametrize("nested", ["combined", "split"])
def test_nested_translations_are_cached_whole_or_by_stage(nested):
    bench, iova, ipa = nested_system()
    smmu = cached(bench, Caches.server(nested=nested))
    assert outcome(smmu, iova) == 0x5000
    kinds = {entry.kind for entry in smmu.caches.tlb}
    assert kinds == ({"combined"} if nested == "combined" else {"stage 1", "stage 2"})
    bench.second.write_descriptor(bench.second.slot(ipa, 3), 0)
    smmu.command("TLBI_S2_IPA", VMID=VMID, IPA=ipa)
    assert outcome(smmu, iova) == (0x5000 if nested == "combined" else "F_TRANSLATION")


# ------------------------------------------------------------------------------------------------
# Hardware update


@pytest.mark.rule("S3.13-4")
def test_an_update_that_is_always_beaten_ends_as_an_external_abort():
    bench = Bench(default_features(httu=2))
    bench.map(IOVA, 0x5000, af=0)
    slot = bench.tables.slot(IOVA, 3)
    bench.write_cd(ha=1)
    beaten = []

    def swap(address, expected, desired):
        beaten.append(address)
        return bytes(8)

    memory = Memory()
    for base, data in bench.regions():
        if base <= slot < base + len(data):
            memory.add_callback(base, len(data), bench.memory.read, bench.memory.write, swap)
        else:
            memory.add(data, base)
    features = raw_of(bench.features)
    result = Smmu(memory, features, **vars(bench.regs)).translate(SID, IOVA)
    assert beaten == [slot] * 8
    assert (result.action, result.fault.name) == ("abort", "F_WALK_EABT")
    assert result.fault.fields["FetchAddr"] == slot


@pytest.mark.rule("S3.13.3.1-9")
def test_a_page_without_stage_2_permissions_may_be_made_dirty():
    bench, iova, ipa = nested_system()
    bench.write_ste(s2ha=1, s2hd=1)
    slot = bench.map2(ipa, 0x5000, s2ap=0, dbm=1)
    assert bench.fault(iova) == "F_PERMISSION"
    assert bench.translate(iova, write=True).pa == 0x5000
    assert bench.descriptor(slot) & reference.S2AP1


@pytest.mark.rule("S3.13.5-3")
def test_a_stage_1_update_stays_if_its_output_faults():
    bench, iova, _ = nested_system()
    bench.write_cd(ha=1)
    slot = bench.map(iova, 0x70_0000_0000, af=0)  # not in stage 2
    found = bench.translate(iova)
    assert (found.fault, found.stage) == ("F_TRANSLATION", 3)
    assert bench.descriptor(slot) & reference.AF


@pytest.mark.rule("S5.2-62")
def test_the_reserved_bit_of_the_start_level_needs_the_52_bit_format():
    bench, iova, _ = nested_system()
    bench.write_ste(s2sl0=0, s2sl0_2=1, s2t0sz=34)
    found = bench.translate(iova)
    assert found.fault != "C_BAD_STE"
    assert next(fetch[1] for fetch in found.fetches if fetch[0] == "S2TT") == 2
    bench.write_ste(s2sl0=1, s2t0sz=25)
    assert bench.fault(iova) != "C_BAD_STE"
    bench.write_ste(s2ds=1)
    assert bench.fault(iova) == "C_BAD_STE"
