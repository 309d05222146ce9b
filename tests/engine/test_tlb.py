"""TLB, walk caches and configuration caches: answers, invalidations and state against a model."""

import contextlib
import copy
import importlib.util
import os
import pickle
import random
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from cachemodel import BY_ADDRESS, COMMANDS, Model, Tlbi, answers, rivals
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from project import TESTS

import smmufast
from smmufast._engine.tlb import Caches, CdEntry, Geometry, SteEntry, TlbEntry, WalkEntry
from smmufast.faults import Perm
from smmufast.layout import Opcode, StreamWorld

KINDS = ("stage 1", "stage 2", "combined")
#: what a page, a block or a run of contiguous ones covers, of every granule
LG2 = (12, 14, 16, 21, 25, 29, 30, 34, 36, 39, 42, 47, 48, 52)
#: what a table translates, of every granule
TABLES = (21, 25, 29, 30, 36, 39, 42, 47, 48)
# granule and level of the table that translates so much (lg2)
REACH = {
    granule + (4 - level) * (granule - 3): (granule, level)
    for granule in (12, 14, 16) for level in range(4)
}  # fmt: skip
BASES = (0, 0x1_0000_0000, 0xFFFF_0000_0000_0000, 0xFFFF_FFFF_FFFF_0000)
VMIDS = (0, 1, 2, 3, 0x8001)
ASIDS = (0, 1, 2, 0xFFFF)


def pick_tags(choose):
    """A kind with a world that has it, a VMID and an ASID."""
    kind = choose.choice(KINDS)
    world = choose.choice(tuple(StreamWorld)) if kind == "stage 1" else StreamWorld.NS_EL1
    return kind, world, choose.choice(VMIDS), choose.choice(ASIDS)


def pick_address(choose):
    page = choose.randrange(1 << choose.choice((2, 4, 11)))
    return (choose.choice(BASES) + (page << choose.choice((12, 12, 21)))) % 2**64


def pick_entry(choose, lg2s=LG2):
    kind, world, vmid, asid = pick_tags(choose)
    lg2 = choose.choice(lg2s)
    more = choose.choice((0, 0, 4, 9))
    return TlbEntry(
        start=pick_address(choose) >> lg2 << lg2,
        output=choose.getrandbits(52),
        lg2=lg2,
        kind=kind,
        world=world,
        vmid=vmid,
        asid=asid,
        is_global=choose.random() < 0.3,
        ipa=choose.getrandbits(52),
        sid=choose.getrandbits(32),
        ssid=choose.getrandbits(32),
        level=choose.randrange(-1, 4),
        perm1=Perm(choose.getrandbits(6)),
        perm2=Perm(choose.getrandbits(6)),
        attr=choose.getrandbits(8),
        sh=choose.randrange(4),
        clean1=choose.random() < 0.5,
        clean2=choose.random() < 0.5,
        contiguous=choose.random() < 0.5,
        lg2_s1=lg2 + more if kind == "combined" else choose.choice((0, lg2)),
        lg2_s2=choose.choice((0, lg2)),
        level_s1=choose.randrange(0, 4),
        level_s2=choose.randrange(0, 4),
        granule_s1=choose.choice((12, 14, 16)),
        granule_s2=choose.choice((12, 14, 16)),
        aset=choose.randrange(2),
        extra=choose.randbytes(3),
    )


def pick_table(choose):
    kind, world, vmid, asid = pick_tags(choose)
    lg2 = choose.choice(TABLES)
    granule, level = REACH[lg2]
    return WalkEntry(
        start=pick_address(choose) >> lg2 << lg2,
        table=choose.getrandbits(52) >> granule << granule,
        lg2=lg2,
        kind=kind,
        world=world,
        vmid=vmid,
        asid=asid,
        output=choose.getrandbits(52) >> granule << granule,
        bits=choose.getrandbits(64),
        sid=choose.getrandbits(32),
        ssid=choose.getrandbits(32),
        level=level,
        granule=granule,
        extra=choose.randbytes(7),
    )


def pick_command(choose):
    op = choose.choice(COMMANDS)
    more = {}
    if op in BY_ADDRESS and choose.random() < 0.95:
        more["address"] = pick_address(choose) + choose.getrandbits(12) & 2**64 - 1
        if choose.random() < 0.5:
            size = choose.randrange(1 << choose.choice((12, 16, 24, 40, 63)))
            more["last"] = min(more["address"] + size, 2**64 - 1)
        more["granule"] = choose.choice((0, 0, 12, 14, 16))
        more["level"] = choose.choice((0, 0, 1, 2, 3))
    mask = choose.choice((0xFFFF, 0xFFFF, 0xFFFE, 0xFFF0, 0))
    return Tlbi(
        op=op,
        vmid=choose.choice(VMIDS),
        asid=choose.choice(ASIDS),
        leaf=choose.random() < 0.5,
        vmid_mask=mask,
        **more,
    )


def send(caches, command):
    """Give a command to the caches; how many entries it dropped."""
    return caches.tlbi(**vars(command))


def compare(caches, model):
    """Everything that can be seen, slot by slot."""
    assert set(caches.counters) == set(model.named())
    for name, expected in model.named().items():
        cache = getattr(caches, name)
        assert list(cache) == expected.live()
        assert len(cache) == len(expected.live())
        assert caches.counters[name] == expected.counters
    assert len(caches) == sum(len(each.live()) for each in model.named().values())


SHAPES = [
    {"tlb": (1, 8), "walk1": (1, 4), "walk2": (1, 4)},
    {"tlb": (4, 4), "walk1": (2, 2), "walk2": (2, 2)},
    {"tlb": (16, 4, "plru"), "walk1": (4, 4, "plru")},
    {"tlb": (8, 3, "fifo"), "walk2": (8, 1, "fifo")},
    {"tlb": (2, 16, "random", 9), "walk1": (2, 5, "random", 3), "walk2": (1, 3)},
    {"tlb": (128, 4), "walk1": (16, 4), "walk2": (16, 4)},
    {"walk1": (4, 4), "walk2": (4, 4)},
    {"tlb": (1, 40), "walk1": (1, 20), "walk2": (1, 20, "random", 5)},
    {"tlb": (2, 32, "plru"), "walk1": (1, 17, "fifo")},
]
SIZES = {"one size": (12,), "two sizes": (12, 21), "all sizes": LG2}


@pytest.mark.rule("S3.3.3-4", "S3.17-4", "S3.17.1-4")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: " ".join(map(str, shape.values())))
@pytest.mark.parametrize("lg2s", SIZES.values(), ids=SIZES)
def test_random_programs_do_what_the_model_does(shape, lg2s):
    choose = random.Random(f"{shape} {lg2s}")
    caches, model = Caches(**shape), Model(**shape)
    walks = [kind for kind in KINDS if model.walk(kind)]
    for step in range(3000):
        what = choose.random()
        kind, world, vmid, asid = pick_tags(choose)
        tags = {"kind": kind, "world": world, "vmid": vmid, "asid": asid}
        address = pick_address(choose) + choose.getrandbits(12) & 2**64 - 1
        if what < 0.35:
            aset = choose.randrange(2)
            found = caches.lookup(address, **tags, aset=aset)
            assert found == (model.lookup(address, *tags.values(), aset) if model.tlb else None)
        elif what < 0.65:
            entry = pick_entry(choose, lg2s)
            caches.fill(entry)
            if model.tlb:
                model.fill(entry)
        elif what < 0.75:
            found = caches.lookup_walk(address, **tags)
            expected = model.lookup_walk(address, *tags.values()) if kind in walks else None
            assert found == expected
        elif what < 0.85:
            table = pick_table(choose)
            caches.fill_walk(table)
            if table.kind in walks:
                model.fill_walk(table)
        elif what < 0.98:
            # few of those that leave nothing
            command = pick_command(choose)
            if command.op in BY_ADDRESS or choose.random() < 0.3:
                assert send(caches, command) == model.tlbi(command)
        elif what < 0.985:
            caches = caches.copy()
        elif what < 0.99:
            caches = pickle.loads(pickle.dumps(caches))
        elif what < 0.995:
            caches.reset_counters()
            for each in model.named().values():
                each.counters = dict.fromkeys(each.counters, 0)
        if step % 20 == 0:
            compare(caches, model)
    compare(caches, model)


@pytest.mark.rule(
    "S4.4.2.1-1", "S4.4.2.2-1", "S4.4.2.3-1", "S4.4.2.4-1", "S4.4.2.7-1", "S4.4.2.8-1",
    "S4.4.2.9-1", "S4.4.3.1-1", "S4.4.3.2-1", "S4.4.4.1-1", "S16.2-4",
)
@pytest.mark.parametrize("op", COMMANDS)
def test_every_command_hits_and_spares_what_the_model_says(op):
    choose = random.Random(op)
    hit = spared = 0
    for _ in range(60):
        caches, model = Caches(tlb=(1, 64), walk1=(1, 64), walk2=(1, 64)), Model(
            tlb=(1, 64), walk1=(1, 64), walk2=(1, 64))  # fmt: skip
        for _ in range(40):
            entry, table = pick_entry(choose), pick_table(choose)
            caches.fill(entry)
            model.fill(entry)
            caches.fill_walk(table)
            model.fill_walk(table)
        command = pick_command(choose)
        while command.op != op:
            command = pick_command(choose)
        expected = model.tlbi(command)
        assert send(caches, command) == expected
        compare(caches, model)
        hit += expected
        spared += len(caches)
    assert hit > 20
    assert spared > 500


@pytest.mark.rule(
    "S3.20.2-1", "S3.21.3-11", "S4.3-2", "S4.3.1-1", "S4.3.1-2", "S4.3.2-2", "S4.3.3-1",
    "S4.3.4-1", "S5.2.1-3", "S16.2-2", "S16.2-3", "S16.2.2-1",
)
def test_random_configuration_programs_do_what_the_model_does():
    shapes = [(4, 2), (8, 4)], [(1, 5), (2, 3, "fifo")], [(2, 2, "plru"), (4, 4, "random", 7)]
    for ste, cd in shapes:
        choose = random.Random(f"{ste} {cd}")
        caches, model = Caches(ste=ste, cd=cd), Model(ste=ste, cd=cd)
        for step in range(4000):
            sid = choose.choice((*range(12), 2**32 - 1, 2**32 - 2, 2**31))
            ssid = choose.choice((0, 1, 2, 3, 2**20 - 1))
            cd_set = (sid ^ ssid) % model.cd.sets
            data = choose.randbytes(64)
            what = choose.random()
            if what < 0.25:
                found = model.ste.lookup(sid % model.ste.sets, sid)
                assert caches.lookup_ste(sid) == (found and found.data)
            elif what < 0.45:
                caches.fill_ste(sid, data)
                model.ste.fill(sid % model.ste.sets, sid, SteEntry(sid, data))
            elif what < 0.7:
                found = model.cd.lookup(cd_set, (sid, ssid))
                assert caches.lookup_cd(sid, ssid) == (found and found.data)
            elif what < 0.9:
                caches.fill_cd(sid, ssid, data)
                model.cd.fill(cd_set, (sid, ssid), CdEntry(sid, ssid, data))
            elif what < 0.92:
                dropped = caches.cfgi("CFGI_STE", sid=sid, leaf=choose.random() < 0.5)
                assert dropped == model.cfgi([sid])
            elif what < 0.94:
                width = choose.randrange(0, 31)
                low = sid >> width + 1 << width + 1
                dropped = caches.cfgi(Opcode.CFGI_STE_RANGE, sid=sid, range=width)
                assert dropped == model.cfgi(range(low, low + (2 << width)))
            elif what < 0.97:
                assert caches.cfgi("CFGI_CD", sid=sid, ssid=ssid) == model.cfgi([sid], ssid, False)
            elif what < 0.99:
                assert caches.cfgi("cfgi_cd_all", sid=sid) == model.cfgi([sid], None, False)
            elif what < 0.992:
                assert caches.cfgi("CFGI_ALL") == model.cfgi(range(1 << 32))
            else:
                caches = pickle.loads(pickle.dumps(caches))
            if step % 20 == 0:
                compare(caches, model)
        compare(caches, model)
        assert min(model.cd.counters.values()) > 20


# --- what must hold, whatever is filled ---


@pytest.mark.rule("S3.17-3", "S3.20.1-1", "S3.20.1-2")
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(), st.sampled_from(((1, 64), (8, 4), (16, 16), (2, 5, "fifo"))))
def test_no_two_live_entries_answer_one_request(seed, geometry):
    choose = random.Random(seed)
    caches = Caches(tlb=geometry)
    for _ in range(choose.randrange(60)):
        entry = pick_entry(choose)
        caches.fill(entry)
        live = list(caches.tlb)
        assert entry in live
        assert not any(rivals(a, b) for i, a in enumerate(live) for b in live[:i])
        tags = entry.kind, entry.world, entry.vmid, entry.asid, entry.aset
        at = entry.start + choose.randrange(1 << entry.lg2)
        assert [e for e in live if answers(e, *tags, at, e.is_global)] == [entry]
        names = "kind", "world", "vmid", "asid", "aset"
        assert caches.lookup(at, **dict(zip(names, tags, strict=True)))


@pytest.mark.rule("S3.21.1.3-2", "S4.4-3", "S4.4-4", "S4.4.1.1-9")
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers())
def test_after_a_command_what_it_names_is_gone_and_all_else_is_there(seed):
    choose = random.Random(seed)
    caches = Caches(tlb=(1, 128), walk1=(1, 64), walk2=(1, 64))
    for _ in range(choose.randrange(100)):
        caches.fill(pick_entry(choose))
        caches.fill_walk(pick_table(choose))
    before = list(caches.tlb), [*caches.walk1, *caches.walk2]
    command = pick_command(choose)
    generation = caches.tlb_generation
    dropped = send(caches, command)
    entries = [entry for entry in before[0] if not command.hits(entry)]
    tables = [table for table in before[1] if not command.hits_table(table)]
    assert list(caches.tlb) == entries
    assert [*caches.walk1, *caches.walk2] == tables
    assert dropped == sum(map(len, before)) - len(entries) - len(tables)
    assert (caches.tlb_generation == generation) == (entries == before[0])
    for entry in entries:
        tags = {"kind": entry.kind, "world": entry.world, "vmid": entry.vmid, "asid": entry.asid}
        assert caches.lookup(entry.start, **tags, aset=entry.aset) == entry
    assert send(caches, command) == 0


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers())
def test_live_entries_are_fills_less_what_went(seed):
    choose = random.Random(seed)
    caches = Caches(tlb=(4, 4), walk1=(2, 2), walk2=(2, 2), ste=(2, 2), cd=(2, 2))
    for _ in range(choose.randrange(200)):
        caches.fill(pick_entry(choose))
        caches.fill_walk(pick_table(choose))
        caches.fill_ste(choose.randrange(9), bytes(64))
        caches.fill_cd(choose.randrange(9), choose.randrange(9), bytes(64))
        if choose.random() < 0.2:
            send(caches, pick_command(choose))
            caches.cfgi(choose.choice(("CFGI_STE", "CFGI_CD_ALL")), sid=choose.randrange(9))
    for name, counted in caches.counters.items():
        gone = counted["evictions"] + counted["replacements"] + counted["invalidations"]
        assert len(getattr(caches, name)) == counted["fills"] - gone


# --- single rules, by hand ---

PAGE = TlbEntry(0x7000_0000, 0x9000_0000, asid=5, vmid=1)


def test_entries_of_one_page_whose_prints_agree_are_kept_apart():
    """They differ in VMID or ASID alone; what is compared first is written again here."""
    tags = np.unique(np.random.default_rng(3).integers(0, 1 << 32, 1 << 18, np.uint64))
    page, lg2 = 0x42, 12
    # VALID, the world NS_EL1 (0), the kind stage 1, the size
    keys = tags | np.uint64(1 << 63 | 1 << 38 | lg2 << 32)
    mixed = keys * np.uint64(0x5A308D33) + np.uint64(page * 0x3C6EF373)
    found = mixed >> np.uint64(24) & np.uint64(0xFFFF_FFFF) | np.uint64(1)
    order = np.argsort(found, kind="stable")
    same = np.flatnonzero(found[order][1:] == found[order][:-1])
    assert len(same) >= 4
    for at in same[:8]:
        a, b = ({"asid": tag & 0xFFFF, "vmid": tag >> 16}
                for tag in (int(tags[order[at + i]]) for i in (0, 1)))  # fmt: skip
        for ways in (4, 8):
            caches = Caches(tlb=(1, ways))
            first = PAGE._replace(start=page << lg2, lg2=lg2, kind="stage 1", output=0x5000, **a)
            caches.fill(first)
            assert caches.lookup(page << lg2, **a).output == 0x5000
            assert caches.lookup(page << lg2, **b) is None
            caches.fill(first._replace(output=0x6000, **b))
            assert caches.lookup(page << lg2, **a).output == 0x5000
            assert caches.lookup(page << lg2, **b).output == 0x6000


@pytest.mark.rule("S3.17.1-1", "S3.17.1-3", "S4.4.2.4-2", "V8.16.3.1-2")
def test_a_global_entry_answers_every_asid_and_goes_by_address_not_by_asid():
    caches = Caches(tlb=(16, 4))
    caches.fill(PAGE._replace(is_global=True))
    assert caches.lookup(0x7000_0FFF, vmid=1, asid=9).output == 0x9000_0000
    assert caches.lookup(0x7000_0FFF, vmid=2, asid=5) is None
    assert caches.tlbi("TLBI_NH_ASID", vmid=1, asid=5) == 0
    assert caches.tlbi("TLBI_NH_VA", vmid=1, asid=77, address=0x7000_0000) == 1


@pytest.mark.rule("S3.17-9", "S4.4-2")
@pytest.mark.parametrize("world", ["NS_EL1", "EL2_E2H"])
@pytest.mark.parametrize("kind", ["stage 1", "combined"])
def test_a_global_entry_answers_its_own_asid_set_alone(world, kind):
    if kind == "combined" and world != "NS_EL1":
        pytest.skip("stage 2 is in the world NS_EL1 only")
    caches = Caches(tlb=(16, 4))
    tags = {"kind": kind, "world": StreamWorld[world]}
    for aset in (0, 1):
        caches.fill(PAGE._replace(output=aset << 12, is_global=True, aset=aset, **tags))
    assert len(caches.tlb) == 2
    for aset in (0, 1):
        assert caches.lookup(PAGE.start, vmid=1, asid=9, aset=aset, **tags).output == aset << 12
    op = "TLBI_NH_VA" if world == "NS_EL1" else "TLBI_EL2_VA"
    assert caches.tlbi(op, vmid=1, asid=3, address=PAGE.start) == 2


@pytest.mark.rule("S3.17-2")
def test_worlds_and_stages_without_asid_have_no_asid_set():
    caches = Caches(tlb=(16, 4))
    for tags in ({"kind": "stage 2"}, {"world": StreamWorld.EL2}):
        caches.fill(PAGE._replace(aset=1, **tags))
        assert caches.lookup(PAGE.start, vmid=1, asid=5, aset=0, **tags)


@pytest.mark.rule("V8.16.3.1-3")
def test_a_table_goes_by_its_asid_whatever_is_global_below():
    caches = Caches(walk1=(16, 4))
    caches.fill_walk(WalkEntry(0x7000_0000, 0x5000, vmid=1, asid=5))
    assert caches.tlbi("TLBI_NH_VA", vmid=1, asid=6, address=0x7000_0000) == 0
    assert caches.tlbi("TLBI_NH_VA", vmid=1, asid=5, address=0x7000_0000, leaf=True) == 0
    assert caches.tlbi("TLBI_NH_VA", vmid=1, asid=5, address=0x7000_0000) == 1


@pytest.mark.rule("S3.17-1", "S3.17-5", "S4.4.2.10-1", "V8.16.3.1-4")
def test_worlds_without_asid_or_vmid_compare_none():
    caches = Caches(tlb=(16, 4))
    caches.fill(PAGE._replace(world=StreamWorld.EL2))
    assert caches.lookup(0x7000_0000, world="EL2", vmid=8, asid=8)
    caches.fill(PAGE._replace(world=StreamWorld.EL2_E2H))
    assert caches.lookup(0x7000_0000, world="EL2_E2H", vmid=8, asid=5)
    assert caches.lookup(0x7000_0000, world="EL2_E2H", vmid=8, asid=8) is None
    assert caches.lookup(0x7000_0000, world="NS_EL1", vmid=1, asid=5) is None
    assert caches.tlbi("TLBI_NSNH_ALL") == 0
    assert caches.tlbi("TLBI_EL2_ASID", asid=5) == 1  # what has ASIDs
    assert caches.tlbi("TLBI_EL2_VA", asid=99, address=0x7000_0000) == 1  # what has none


@pytest.mark.rule("S4.4.3.1-2", "S16.2.1-1")
def test_tlbi_s2_ipa_leaves_combined_entries_and_nh_all_takes_them():
    caches = Caches(tlb=(16, 4), walk1=(4, 4), walk2=(4, 4))
    caches.fill(PAGE._replace(kind="combined", ipa=0x7000_0000))
    caches.fill(PAGE._replace(kind="stage 2"))
    caches.fill_walk(WalkEntry(0x7000_0000, 0x5000, kind="combined", vmid=1, asid=5))
    caches.fill_walk(WalkEntry(0x7000_0000, 0x5000, kind="stage 2", vmid=1))
    assert caches.tlbi("TLBI_S2_IPA", vmid=1, address=0x7000_0000) == 2
    assert [entry.kind for entry in (*caches.tlb, *caches.walk1)] == ["combined"] * 2
    assert caches.tlbi("TLBI_NH_ALL", vmid=1) == 2


@pytest.mark.rule("S4.4.2.4-3")
def test_a_combined_entry_goes_with_the_whole_block_of_stage_1():
    caches = Caches(tlb=(64, 4))
    for page in range(512):
        caches.fill(TlbEntry(0x4000_0000 + (page << 12), page << 13, kind="combined", lg2_s1=21))
    assert len(caches.tlb) == 256
    assert caches.tlbi("TLBI_NH_VA", address=0x3FFF_FFFF) == 0
    assert caches.tlbi("TLBI_NH_VA", address=0x4020_0000) == 0
    assert caches.tlbi("TLBI_NH_VA", address=0x401F_F000) == 256


@pytest.mark.rule("S2.4-4", "S3.21.1.3-1", "V8.17-1")
def test_a_page_replaces_a_block_and_a_block_the_pages_under_it():
    caches = Caches(tlb=(16, 4))
    block = TlbEntry(0x4000_0000, 0x8000_0000, lg2=21)
    pages = [TlbEntry(0x4000_0000 + (i << 12), i << 20) for i in range(8)]
    caches.fill(block)
    caches.fill(pages[3])
    assert caches.lookup(0x4000_0000) is None
    for page in pages:
        caches.fill(page)
    assert len(caches.tlb) == 8
    caches.fill(block._replace(asid=1))  # another ASID's
    assert len(caches.tlb) == 9
    caches.fill(block._replace(is_global=True, asid=2))
    assert list(caches.tlb) == [block._replace(is_global=True, asid=2)]
    assert caches.tlb.replacements == 1 + 1 + 9


@pytest.mark.rule("S4.4.1.1-6", "S4.4.1.1-7")
def test_a_range_stops_where_it_says():
    caches = Caches(tlb=(1, 32), walk1=(1, 4))
    for page in range(16):
        caches.fill(TlbEntry(page << 12, 0, granule_s1=12))
    last = (2**64 - 1) >> 12 << 12
    caches.fill(TlbEntry(last, 0, granule_s1=12))
    assert caches.tlbi("TLBI_NH_VAA", address=0x3000, last=0x6FFF, granule=14) == 0
    assert caches.tlbi("TLBI_NH_VAA", address=0x3000, last=0x6FFF, level=2) == 0
    assert caches.tlbi("TLBI_NH_VAA", address=0x3000, last=0x6FFF, granule=12, level=3) == 4
    assert caches.tlbi("TLBI_NH_VAA", address=last, last=2**64 - 1) == 1
    assert caches.tlbi("TLBI_NH_VAA", address=0, last=2**64 - 1) == 12


def test_one_request_counts_once_whatever_sizes_there_are():
    caches = Caches(tlb=(1, 16), walk1=(1, 16))
    for i, lg2 in enumerate(LG2):
        caches.fill(TlbEntry(1 << 60 | i << 55, 0, lg2=lg2))
    for i, lg2 in enumerate(TABLES):
        granule, level = REACH[lg2]
        caches.fill_walk(WalkEntry(1 << 60 | i << 55, 0, lg2, level=level, granule=granule))
    assert caches.lookup(0) is None
    assert caches.lookup(1 << 60 | 5 << 55)
    assert caches.lookup_walk(0) is None
    assert caches.lookup_walk(1 << 60 | 5 << 55)
    for counted in caches.counters.values():
        assert (counted["hits"], counted["misses"]) == (1, 1)


def test_the_deepest_table_is_found():
    caches = Caches(walk1=(4, 4))
    for lg2, level in ((39, 1), (21, 3), (30, 2)):
        caches.fill_walk(WalkEntry(0, level << 12, lg2=lg2, level=level, bits=1 << 60))
    assert caches.lookup_walk(0x1F_FFFF).level == 3
    assert caches.lookup_walk(0x20_0000).level == 2
    assert caches.lookup_walk(0x4000_0000).level == 1
    assert caches.lookup_walk(1 << 39) is None
    assert caches.lookup_walk(0, asid=1) is None


def test_absent_caches_take_nothing_and_count_nothing():
    caches = Caches()
    caches.fill(PAGE)
    caches.fill_walk(WalkEntry(0, 0))
    caches.fill_ste(1, bytes(64))
    caches.fill_cd(1, 1, bytes(64))
    assert caches.lookup(PAGE.start) is caches.lookup_walk(0) is caches.lookup_ste(1) is None
    assert caches.lookup_cd(1, 1) is None
    assert caches.tlbi("TLBI_NSNH_ALL") == caches.cfgi("CFGI_ALL") == caches.invalidate_all() == 0
    assert caches.counters == {} and len(caches) == 0 and caches
    assert caches.ste is caches.cd is caches.tlb is caches.walk1 is caches.walk2 is None
    assert len(caches.counters_array()) == 0
    assert repr(caches) == "<Caches: none>"
    assert repr(Caches(tlb=(16, 4))) == "<Caches: tlb 0/64>"


@pytest.mark.parametrize("preset", [Caches.small, Caches.server])
@pytest.mark.parametrize("nested", ["combined", "split"])
def test_presets_have_every_cache(preset, nested):
    caches = preset(nested=nested)
    assert caches.nested == nested == pickle.loads(pickle.dumps(caches)).nested
    assert list(caches.counters) == ["ste", "cd", "tlb", "walk1", "walk2"]
    assert caches.tlb.geometry == Geometry({"small": 16, "server": 1024}[preset.__name__], 4)
    caches.fill(PAGE)
    caches.fill_walk(WalkEntry(0, 0))
    caches.fill_walk(WalkEntry(0, 0, kind="stage 2"))
    caches.fill_ste(1, bytes(64))
    caches.fill_cd(1, 1, bytes(64))
    table = caches.counters_array()
    assert table["cache"].tolist() == ["ste", "cd", "tlb", "walk1", "walk2"]
    assert table["fills"].tolist() == [1] * 5
    assert caches.invalidate_all() == 5
    assert caches.counters_array()["invalidations"].tolist() == [1] * 5
    assert len(caches) == 0
    assert caches.lookup(PAGE.start, asid=5, vmid=1) is None


# --- copies and states ---


def filled(seed, **shape):
    choose = random.Random(seed)
    caches = Caches(**shape)
    for _ in range(300):
        play(caches, choose)
    return caches


def play(caches, choose):
    """One step that uses every cache; what came of it."""
    kind, world, vmid, asid = pick_tags(choose)
    sid, ssid = choose.randrange(9), choose.randrange(4)
    address = pick_address(choose)
    found = (
        caches.lookup(address, kind=kind, world=world, vmid=vmid, asid=asid),
        caches.lookup_walk(address, kind=kind, world=world, vmid=vmid, asid=asid),
        caches.lookup_ste(sid),
        caches.lookup_cd(sid, ssid),
    )
    caches.fill(pick_entry(choose))
    caches.fill_walk(pick_table(choose))
    caches.fill_ste(sid, choose.randbytes(64))
    caches.fill_cd(sid, ssid, choose.randbytes(64))
    if choose.random() < 0.1:
        found += (send(caches, pick_command(choose)), caches.cfgi("CFGI_STE", sid=sid))
    return found


POLICY_SHAPES = [
    {name: (4, 4, policy, 5) for name in ("ste", "cd", "tlb", "walk1", "walk2")}
    for policy in ("lru", "plru", "fifo", "random")
]


@pytest.mark.parametrize("shape", POLICY_SHAPES, ids=lambda shape: shape["tlb"][2])
@pytest.mark.parametrize("how", [
    Caches.copy, copy.copy, copy.deepcopy, lambda caches: pickle.loads(pickle.dumps(caches)),
], ids=["copy", "copy.copy", "copy.deepcopy", "pickle"])  # fmt: skip
def test_a_copy_goes_on_as_the_original_and_apart_from_it(shape, how):
    caches = filled(3, **shape)
    other = how(caches)
    assert other.__getstate__() == caches.__getstate__()
    same = random.Random(4), random.Random(4)
    for _ in range(200):
        assert play(caches, same[0]) == play(other, same[1])
    assert other.counters == caches.counters
    state = other.__getstate__()
    assert state == caches.__getstate__()
    caches.invalidate_all()
    assert other.__getstate__() == state != caches.__getstate__()


def test_a_state_is_taken_in_place():
    caches = filled(1, **POLICY_SHAPES[0])
    state = caches.__getstate__()
    tlb, live = caches.tlb, list(caches.tlb)
    caches.invalidate_all()
    assert list(tlb) == []
    caches.__setstate__(state)
    assert list(tlb) == live
    assert caches.__getstate__() == state


def test_states_that_are_none_are_refused_and_change_nothing():
    caches = filled(1, **POLICY_SHAPES[0])
    state = caches.__getstate__()
    other = filled(2, **POLICY_SHAPES[0])
    before = other.__getstate__()
    for wrong in (b"", state[:-1], state + b"\0", b"\0" * 8 + state[8:], state[: len(state) // 2],
                  filled(1, tlb=(4, 4)).__getstate__()):  # fmt: skip
        with pytest.raises(ValueError, match="state"):
            other.__setstate__(wrong)
    for wrong in (None, bytearray(state), "text"):
        with pytest.raises(TypeError, match="state must be bytes, not"):
            other.__setstate__(wrong)
    assert other.__getstate__() == before


@pytest.mark.parametrize("shape", POLICY_SHAPES, ids=lambda shape: shape["tlb"][2])
def test_damaged_states_are_refused_or_keep_the_rules(shape):
    state = filled(1, **shape).__getstate__()
    choose = random.Random(6)
    taken = 0
    for _ in range(1500):
        damaged = bytearray(state)
        for _ in range(choose.choice((1, 1, 4))):
            damaged[choose.randrange(len(damaged))] = choose.randrange(256)
        caches = Caches(**shape)
        with contextlib.suppress(ValueError):
            caches.__setstate__(bytes(damaged))
            taken += 1
        live = list(caches.tlb)
        assert not any(rivals(a, b) for i, a in enumerate(live) for b in live[:i])
        assert len(live) == len(caches.tlb)
        for _ in range(3):
            play(caches, choose)
    assert 100 < taken < 1500


def test_two_entries_of_one_request_in_a_state_are_refused():
    caches = Caches(tlb=(1, 2))
    caches.fill(PAGE)
    caches.fill(PAGE._replace(asid=6))
    two = caches.__getstate__()
    both = two.replace((6).to_bytes(2, "little") + (1).to_bytes(2, "little"),
                       (5).to_bytes(2, "little") + (1).to_bytes(2, "little"))  # fmt: skip
    assert both != two
    with pytest.raises(ValueError, match="a second entry for one request in slot 1 of tlb"):
        caches.__setstate__(both)
    assert len(caches.tlb) == 2


# --- errors ---


@pytest.mark.parametrize(("call", "message"), [
    (lambda c: c.fill(PAGE._replace(start=0x7000_0001)),
     r"start must be a multiple of 0x1000 \(lg2 12\), not 0x70000001"),
    (lambda c: c.fill(PAGE._replace(lg2=11)), "lg2 must be 12 to 63, not 11"),
    (lambda c: c.fill(PAGE._replace(lg2=64)), "lg2 must be 0 to 0x3f, not 0x40"),
    (lambda c: c.fill(PAGE._replace(kind="stage 3")),
     "kind must be 'stage 1', 'stage 2' or 'combined', not 'stage 3'"),
    (lambda c: c.fill(PAGE._replace(kind="")), "kind must be .*, not ''"),
    (lambda c: c.fill(PAGE._replace(world="EL3")), "world must be 'NS_EL1', 'EL2'.*, not 'EL3'"),
    (lambda c: c.fill(PAGE._replace(world=3)), "world must be .*, not 3"),
    (lambda c: c.fill(PAGE._replace(kind="stage 2", world=StreamWorld.EL2)),
     "kind must be 'stage 1' outside of the world NS_EL1, not 'stage 2'"),
    (lambda c: c.fill(PAGE._replace(asid=0x10000)), "asid must be 0 to 0xffff, not 0x10000"),
    (lambda c: c.fill(PAGE._replace(level=4)), "level must be -1 to 3, not 4"),
    (lambda c: c.fill(PAGE._replace(perm1=64)), "perm1 must be 0 to 0x3f, not 0x40"),
    (lambda c: c.fill(PAGE._replace(extra=b"")), "extra must be 3 bytes, not b''"),
    (lambda c: c.fill_walk(WalkEntry(0x1000, 0)), r"start must be a multiple of 0x.*, not 0x1000"),
    (lambda c: c.fill_ste(1, b"short"), "data must be 64 bytes, not 5"),
    (lambda c: c.fill_cd(1, 1 << 20, bytes(64)), "ssid must be 0 to 0xfffff, not 0x100000"),
    (lambda c: c.fill_ste(1 << 32, bytes(64)), "sid must be 0 to 0xffffffff, not 0x100000000"),
    (lambda c: c.lookup(-1), "address must be"),
    (lambda c: c.lookup(0, kind="stage 2", world="EL2"), "kind must be 'stage 1' outside of"),
    (lambda c: c.lookup_walk(1 << 64), "address must be"),
    (lambda c: c.tlbi("TLBI_NH"), "op must be an Opcode or its name, not 'TLBI_NH'"),
    (lambda c: c.tlbi("TLBI_SNH_ALL"), "op must be a TLBI command of the Non-secure queue, not"),
    (lambda c: c.tlbi(0x1FF), "op must be an Opcode or its name, not 511"),
    (lambda c: c.tlbi("CFGI_STE"), "op must be a TLBI command .*, not 'CFGI_STE'"),
    (lambda c: c.tlbi("TLBI_NH_VA", last=5), "last must be None without address, not 5"),
    (lambda c: c.tlbi("TLBI_NH_VA", address=5, last=4), r"last must be 0x5 .*, not 4"),
    (lambda c: c.tlbi("TLBI_NH_VA", address=5, granule=13), "granule must be 12, .*, not 13"),
    (lambda c: c.tlbi("TLBI_NH_VA", address=5, level=4), "level must be 0 to 0x3, not 4"),
    (lambda c: c.cfgi("TLBI_NH_ALL"), "op must be a CFGI command .*, not 'TLBI_NH_ALL'"),
    (lambda c: c.cfgi("CFGI_VMS_PIDM"), "op must be a CFGI command of STEs or CDs, not"),
    (lambda c: c.cfgi("CFGI_STE_RANGE", range=32), "range must be 0 to 0x1f, not 0x20"),
    (lambda c: Caches(nested="both"), "nested must be 'combined' or 'split', not 'both'"),
])  # fmt: skip
def test_arguments_that_cannot_be_are_refused_by_name(call, message):
    caches = filled(1, **POLICY_SHAPES[0])
    before = caches.__getstate__()
    with pytest.raises(ValueError, match=message):
        call(caches)
    assert caches.__getstate__() == before


@pytest.mark.parametrize("call", [
    lambda c: c.fill((0, 0)), lambda c: c.fill_walk(PAGE), lambda c: c.lookup("0"),
    lambda c: c.lookup(1.5), lambda c: c.fill(PAGE._replace(asid=None)),
    lambda c: c.fill(PAGE._replace(level="x")), lambda c: type(c.tlb)(),
])  # fmt: skip
def test_arguments_of_other_types_are_refused(call):
    caches = filled(1, **POLICY_SHAPES[0])
    before = caches.__getstate__()
    with pytest.raises(TypeError):
        call(caches)
    assert caches.__getstate__() == before


# --- the C interface ---


@pytest.fixture(scope="module")
def consumer(tmp_path_factory):
    """A module that is compiled against the package."""
    directory = tmp_path_factory.mktemp("consumer")
    name = "caches_consumer"
    shutil.copy(TESTS / "consumer" / f"{name}.pyx", directory)
    parent = str(Path(smmufast.__file__).parents[1])
    path = os.pathsep.join([parent, *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-m", "Cython.Build.Cythonize", "-i", f"{name}.pyx"],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": path, "CFLAGS": f"-O0 -I{smmufast.get_include()}"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    found = directory / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    spec = importlib.util.spec_from_file_location(name, found)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_entries_are_cache_lines(consumer):
    assert consumer.sizes() == (64, 64)


def test_another_module_finds_what_python_filled_and_the_other_way_round(consumer):
    caches = Caches(tlb=(16, 4), walk1=(4, 4))
    caches.fill(PAGE._replace(vmid=0))
    for by_key in (False, True):
        assert consumer.look_up(caches, PAGE.start + 5, 5, by_key) == PAGE.output
        assert consumer.look_up(caches, PAGE.start + 5, 6, by_key) is None
    assert (caches.tlb.hits, caches.tlb.misses) == (2, 2)
    assert consumer.fill(caches, 0x42, 0x7777_0000, 3) == 0x7777_0000
    assert caches.lookup(0x42_FFF, asid=3).output == 0x7777_0000
    assert consumer.walk(caches, 0x99, 0x1234_5000, 3) == 0x1234_5000
    assert caches.lookup_walk(0x99 << 21, asid=3).table == 0x1234_5000
    assert consumer.invalidate(caches, "other", 0, 0) == 0
    assert consumer.invalidate(caches, "va", 0x42_000, 3) == 1
    assert consumer.invalidate(caches, "all", 0, 0) == 2
    assert consumer.fill(Caches(), 1, 2, 3) is None
    assert consumer.walk(Caches(), 1, 2, 3) is None


def test_an_entry_may_be_changed_in_place(consumer):
    caches = Caches(tlb=(16, 4))
    caches.fill(PAGE._replace(vmid=0, clean1=True, clean2=True))
    consumer.make_dirty(caches, PAGE.start, 5)
    assert caches.lookup(PAGE.start, asid=5) == PAGE._replace(vmid=0, clean2=True)


@pytest.mark.parametrize("policy", ["lru", "plru", "fifo", "random"])
@pytest.mark.parametrize("what", ["ste", "cd"])
def test_a_touch_is_a_probe_that_copies_nothing(consumer, policy, what):
    a = filled(7, **{name: (2, 4, policy) for name in ("ste", "cd", "tlb")})
    b = a.copy()
    choose = random.Random(8)
    for _ in range(200):
        sid, ssid = choose.randrange(9), choose.randrange(3)
        handle, word = consumer.config(a, what, sid, ssid)
        assert consumer.config(b, what, sid, ssid) == (handle, word)
        assert (handle == 0) == (word == 2**64 - 1)
        if handle:
            for _ in range(choose.randrange(4)):
                consumer.touch(a, what, handle)
                assert consumer.config(b, what, sid, ssid) == (handle, word)
        else:
            new = consumer.config(a, f"{what} fill", sid, ssid)
            assert consumer.config(b, f"{what} fill", sid, ssid) == new
            assert consumer.config(a, what, sid, ssid) == (new[0], sid)
            assert consumer.config(b, what, sid, ssid) == (new[0], sid)
        assert a.__getstate__() == b.__getstate__()
    for absent in (what, f"{what} fill"):
        assert consumer.config(Caches(), absent, 1, 1)[0] == 0


def test_a_touch_of_a_translation_is_a_probe(consumer):
    a = Caches(tlb=(16, 4))
    a.fill(PAGE._replace(vmid=0))
    b = a.copy()
    consumer.look_up_and_touch(a, PAGE.start, 5, 3)
    for _ in range(4):
        assert consumer.look_up(b, PAGE.start, 5, False)
    assert a.__getstate__() == b.__getstate__()


def test_generations_change_with_what_they_are_about_and_nothing_else(consumer):
    caches = Caches(ste=(1, 2), cd=(1, 2), tlb=(1, 2), walk1=(1, 2), walk2=(1, 2))

    def changes(call):
        before = consumer.generations(caches)
        call()
        after = consumer.generations(caches)
        assert after == (caches.config_generation, caches.tlb_generation)
        return tuple(a != b for a, b in zip(before, after, strict=True))

    record = bytes(64)
    neither, configuration, translations = (False, False), (True, False), (False, True)
    assert changes(lambda: caches.fill_ste(1, record)) == configuration
    assert changes(lambda: caches.fill_ste(1, record)) == configuration
    assert changes(lambda: caches.fill_cd(1, 1, record)) == configuration
    assert changes(lambda: caches.lookup_ste(1)) == neither
    assert changes(lambda: caches.lookup_cd(1, 2)) == neither
    assert changes(lambda: caches.cfgi("CFGI_CD", sid=1, ssid=1)) == configuration
    assert changes(lambda: caches.cfgi("CFGI_CD", sid=1, ssid=1)) == neither
    assert changes(lambda: consumer.invalidate(caches, "ste", 0, 1)) == configuration
    assert changes(lambda: consumer.invalidate(caches, "config", 0, 1)) == neither
    assert changes(lambda: caches.fill(PAGE)) == translations
    assert changes(lambda: caches.lookup(PAGE.start, asid=5, vmid=1)) == neither
    assert changes(lambda: caches.lookup(0)) == neither
    assert changes(lambda: caches.fill_walk(WalkEntry(0, 0))) == neither
    assert changes(lambda: caches.tlbi("TLBI_NH_ALL", vmid=0)) == neither  # only the table
    assert changes(lambda: caches.tlbi("TLBI_NH_ALL", vmid=1)) == translations
    assert changes(caches.reset_counters) == neither
