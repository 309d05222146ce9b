"""stale(): which entries of caches and ATCs the tables in memory no longer give, and why."""

import random
import signal
import struct

import pytest
from ptwriter import (
    encode_cd,
    encode_l1cd,
    encode_l1std,
    encode_ste,
    leaf_descriptor,
    stage2_leaf_descriptor,
    table_descriptor,
)

from smmufast import AtsDevice, Caches, Features, Memory, Smmu, StaleEntry, Why
from smmufast._device.stale import look
from smmufast.ats import AtcEntry
from smmufast.iommu import System

STES, L1STDS, CDS, L1CDS, TABLES, SECOND = (n << 28 for n in range(1, 7))
SPLIT = 6
VA, PA = 0x1000, 0x8_0000_0000
CONFIGURATION = {"ste", "cd"}


class World:
    """Streams with eight CDs each, some stage-1 tables and some stage-2 tables.

    Stage-1 table n maps VA to PA + n pages, stage-2 table n the first 1 GiB from n GiB on.
    """

    def __init__(
        self, *, two_level=False, l1cd=False, split=False, caches=None, log2size=4, **more
    ):
        self.memory = Memory()
        self.memory.add_private(0, 1 << 40)
        self.l1cd = l1cd
        caches = caches or Caches(
            ste=(64, 4), cd=(64, 4), tlb=(64, 4), walk1=(64, 4), walk2=(64, 4),
            nested="split" if split else "combined",
        )  # fmt: skip
        self.two_level = two_level
        cfg = log2size | (1 << 16 | SPLIT << 6 if two_level else 0)
        self.smmu = Smmu(
            self.memory, **{"features": Features(oas=5)} | more, caches=caches,
            strtab_base=L1STDS if two_level else STES, strtab_base_cfg=cfg, cr0=0b10101,
        )  # fmt: skip
        for n in range(4):
            self.table(n)
            self.second(n)

    def put(self, address, value):
        self.memory.write_u64(address, value)

    def table(self, n, page=None, ng=1, leaf=None):
        at = TABLES + 0x1_0000 * n
        self.put(at, table_descriptor(12, at + 0x1000))
        self.put(at + 0x1000, table_descriptor(12, at + 0x2000))
        if leaf is None:
            page = PA + 0x1000 * n if page is None else page
            leaf = leaf_descriptor(12, 3, page, attrindx=1, ap=1, af=1, ng=ng)
        self.put(at + 0x2000 + 8 * (VA >> 12), leaf)

    def second(self, n, lower=0):
        """A table of level 1 with blocks of 1 GiB: all but one are where they are."""
        at = SECOND + 0x1_0000 * n
        for gib in range(512):
            pa = (n << 30 if gib == 0 else (gib << 30)) + lower
            self.put(at + 8 * gib, stage2_leaf_descriptor(12, 1, pa, s2ap=3, memattr=15, af=1))

    def ste(self, sid, **fields):
        """Write an STE: stage 1 with substreams unless told otherwise."""
        fields = {
            "v": 1, "config": 0b101, "s1contextptr": self.contexts(sid), "s1cdmax": 3, "s1dss": 2,
            "s1fmt": 1 if self.l1cd else 0, "eats": 1,
        } | fields  # fmt: skip
        if self.l1cd and fields["s1cdmax"]:
            fields["s1cdmax"] = 7
            self.put(self.contexts(sid), encode_word(encode_l1cd(CDS + 0x1000 * sid)))
        at = STES + 64 * sid
        if self.two_level:
            leaf = STES + (sid >> SPLIT << SPLIT + 6)
            self.put(L1STDS + 8 * (sid >> SPLIT), encode_word(encode_l1std(SPLIT + 1, leaf)))
        self.memory.write(at, encode_ste(**fields))

    def contexts(self, sid):
        return L1CDS + 0x1000 * sid if self.l1cd else CDS + 0x1000 * sid

    def cd(self, sid, ssid, n, asid, **fields):
        """Write a CD: table n with an ASID."""
        fields = {
            "v": 1, "aa64": 1, "a": 1, "r": 1, "ips": 5, "t0sz": 25, "epd1": 1, "asid": asid,
            "ttb0": TABLES + 0x1_0000 * n, "mair": 0xFF00,
        } | fields  # fmt: skip
        self.memory.write(CDS + 0x1000 * sid + 64 * ssid, encode_cd(**fields))

    def drop(self, sid, ssid):
        """A CD goes, and software says so of the CD alone."""
        self.memory.write(CDS + 0x1000 * sid + 64 * ssid, bytes(64))
        self.smmu.command("CFGI_CD", StreamID=sid, SubstreamID=ssid, Leaf=1)
        self.smmu.sync()

    def fill(self, sid, ssid=None, **access):
        result = self.smmu.translate(sid, VA, ssid=ssid, **access)
        assert result, result
        return result.pa

    def stale(self):
        return [found.cache for found in self.smmu.stale()]


def encode_word(data):
    return struct.unpack("<Q", data)[0] if isinstance(data, bytes) else data


SHAPES = [{"two_level": a, "l1cd": b} for a in (False, True) for b in (False, True)]


# --- shared tags ---


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("first", [1, 2])
def test_an_entry_is_right_while_another_substream_has_its_asid(shape, first):
    world = World(**shape)
    world.ste(3)
    for ssid in (1, 2):
        world.cd(3, ssid, 0, asid=7)
    world.fill(3, first)
    world.drop(3, first)
    assert world.stale() == []
    world.drop(3, 3 - first)
    found = world.smmu.stale()
    assert [one.cache for one in found] == ["tlb", "walk1", "walk1"]
    for one in found:
        assert one.now is None
        assert one.why == "nobody has its tags now (vmid 0x0, asid 0x7, NS_EL1)"
    world.smmu.command("TLBI_NH_ASID", ASID=7)
    assert world.stale() == []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("other", [0, 2, 9, 15])
def test_an_entry_is_right_while_another_stream_has_its_asid(shape, other):
    world = World(**shape)
    for sid in (8, other):
        world.ste(sid)
        world.cd(sid, 5, 1, asid=0x77)
    world.fill(8, 5)
    world.drop(8, 5)
    assert world.stale() == []
    world.drop(other, 5)
    assert world.stale() == ["tlb", "walk1", "walk1"]


def test_whoever_has_the_asid_and_another_table_does_not_give_the_entry():
    world = World()
    world.ste(3)
    world.cd(3, 1, 0, asid=7)
    world.cd(3, 2, 1, asid=7)
    world.fill(3, 1)
    assert world.stale() == []
    world.drop(3, 1)
    tlb, *tables = world.smmu.stale()
    assert (tlb.cache, tlb.entry.output, tlb.now.output) == ("tlb", PA, PA + 0x1000)
    assert tlb.why == "output: 0x800001000 now, 0x800000000 cached"
    assert [one.why for one in tables] == [
        "table: 0x50011000 now, 0x50001000 cached", "table: 0x50012000 now, 0x50002000 cached",
    ]  # fmt: skip


@pytest.mark.parametrize("asid", [6, 8])
def test_whoever_has_the_table_and_another_asid_does_not_give_the_entry(asid):
    world = World()
    world.ste(3)
    world.cd(3, 1, 0, asid=7)
    world.cd(3, 2, 0, asid=asid)
    world.fill(3, 1)
    world.drop(3, 1)
    assert world.stale() == ["tlb", "walk1", "walk1"]


def test_a_changed_asid_of_the_same_substream_is_told():
    world = World()
    world.ste(3)
    world.cd(3, 1, 0, asid=7)
    world.fill(3, 1)
    world.cd(3, 1, 0, asid=8)
    cd, tlb, *_ = world.smmu.stale()
    assert (cd.cache, cd.why) == ("cd", "ASID: 0x8 now, 0x7 cached")
    assert tlb.why == "nobody has its tags now (vmid 0x0, asid 0x7, NS_EL1)"


def test_a_global_entry_is_right_while_any_asid_has_its_page():
    world = World()
    world.table(0, ng=0)
    world.ste(3)
    world.cd(3, 1, 0, asid=7)
    world.cd(3, 2, 0, asid=9)
    world.fill(3, 1)
    world.drop(3, 1)
    assert world.stale() == ["walk1", "walk1"]  # tables are tagged with the ASID
    world.smmu.command("TLBI_NH_ASID", ASID=7)
    assert world.stale() == []
    world.drop(3, 2)
    (found,) = world.smmu.stale()
    assert found.why == "nobody has its tags now (vmid 0x0, NS_EL1)"


def test_aset_is_a_tag_of_translations_and_not_of_tables():
    world = World()
    world.ste(3)
    world.cd(3, 1, 0, asid=7, aset=1)
    world.cd(3, 2, 0, asid=7, aset=0)
    world.fill(3, 1)
    world.drop(3, 1)
    assert world.stale() == ["tlb"]


def test_stage_2_is_right_while_another_stream_has_its_vmid():
    world = World()
    second = {"config": 0b110, "s2aa64": 1, "s2t0sz": 25, "s2sl0": 1, "s2ps": 5, "s2r": 1}
    for sid, n in ((1, 1), (2, 1), (9, 2)):
        world.ste(sid, **second, s2vmid=5, s2ttb=SECOND + 0x1_0000 * n)
    world.fill(1)
    for sid in (1, 2):
        world.ste(sid, config=0)
        world.smmu.command("CFGI_STE", StreamID=sid, Leaf=1)
        found = world.smmu.stale()
        if sid == 1:
            assert found == []
    assert [one.cache for one in found] == ["tlb"]
    assert found[0].why == "output: 0x80000000 now, 0x40000000 cached"
    world.ste(9, config=0)
    assert world.smmu.stale()[0].why == "nobody has its tags now (vmid 0x5, NS_EL1)"


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("other", ["ssid", "sid", "no cd"])
def test_nested_entries_are_right_while_somebody_has_their_tags(split, other):
    world = World(split=split)
    second = {
        "config": 0b111, "s2aa64": 1, "s2t0sz": 25, "s2sl0": 1, "s2ps": 5, "s2r": 1, "s2vmid": 5,
        "s2ttb": SECOND, "eats": 0,
    }  # fmt: skip
    world.ste(3, **second)
    world.cd(3, 1, 0, asid=7)
    if other == "ssid":
        world.cd(3, 2, 0, asid=7)
    else:
        world.ste(9, **second)
        if other == "sid":
            world.cd(9, 4, 0, asid=7)
    world.fill(3, 1)
    world.drop(3, 1)
    stage1 = ["tlb", "walk1", "walk1"]
    assert world.stale() == ([] if other != "no cd" else stage1)
    if other == "sid":
        world.ste(9, **second | {"s2vmid": 6})
        world.smmu.command("CFGI_STE", StreamID=9, Leaf=1)
    elif other == "ssid":
        world.drop(3, 2)
    assert world.stale() == stage1
    world.smmu.command("TLBI_NH_ASID", ASID=7, VMID=5)
    assert world.stale() == []  # the stage 2 of stream 3 is still there
    for sid in (3, 9):
        world.ste(sid, config=0)
        world.smmu.command("CFGI_STE", StreamID=sid, Leaf=1)
    left = [one for one in world.smmu.stale() if one.cache not in CONFIGURATION]
    assert bool(left) == split
    assert {one.why for one in left} <= {"nobody has its tags now (vmid 0x5, NS_EL1)"}


def test_an_entry_of_el2_is_right_while_another_stream_of_el2_gives_it():
    for e2h in (0, 1):
        world = World(cr2=2 | e2h)
        for sid in (3, 4):
            world.ste(sid, strw=2, s1cdmax=0)
            world.cd(sid, 0, 0, asid=3)
        world.fill(3)
        world.memory.write(CDS + 0x3000, bytes(64))
        world.smmu.command("CFGI_CD", StreamID=3)
        assert world.stale() == []
        world.ste(4, s1cdmax=0)  # of EL1, with the same ASID
        world.smmu.command("CFGI_STE", StreamID=4, Leaf=1)
        assert world.stale() == ["tlb", "walk1", "walk1"]


def test_what_stale_lists_is_what_no_context_gives():
    """Random tables that change without invalidation, against a search through everything."""
    kinds = {True: 0, False: 0}
    for seed in range(40):
        rng = random.Random(seed)
        world = World(two_level=rng.random() < 0.5, l1cd=rng.random() < 0.5)
        pairs = [(sid, ssid) for sid in range(0, 16, 3) for ssid in range(1, 4)]
        for sid in range(0, 16, 3):
            world.ste(sid)
        contexts = {}

        def write(pair, contexts=contexts, world=world, rng=rng):
            contexts[pair] = rng.choice((None, (rng.randrange(3), rng.randrange(1, 3))))
            if contexts[pair] is None:
                world.memory.write(CDS + 0x1000 * pair[0] + 64 * pair[1], bytes(64))
            else:
                n, asid = contexts[pair]
                world.cd(*pair, n, asid)

        for pair in pairs:
            write(pair)
            if contexts[pair]:
                world.smmu.command("TLBI_NH_ASID", ASID=contexts[pair][1])
                world.fill(*pair)
        for pair in pairs:
            if rng.random() < 0.7:
                write(pair)
        world.smmu.command("CFGI_ALL")
        given = {(asid, PA + 0x1000 * n) for n, asid in filter(None, contexts.values())}
        expected = {
            (e.asid, e.output): (e.asid, e.output) not in given for e in world.smmu.caches.tlb
        }
        listed = {
            (one.entry.asid, one.entry.output) for one in world.smmu.stale() if one.cache == "tlb"
        }
        assert listed == {key for key, wrong in expected.items() if wrong}, seed
        for wrong in expected.values():
            kinds[wrong] += 1
    assert min(kinds.values()) > 10


# --- bounds ---


def test_a_hostile_stream_table_is_looked_through_so_far_and_no_further():
    """2^32 streams of 2^20 CDs each, in memory that counts."""
    reads = []
    ste = encode_ste(v=1, config=0b101, s1contextptr=CDS, s1cdmax=20, s1dss=2)
    cd = encode_cd(v=1, aa64=1, a=1, r=1, ips=5, t0sz=25, epd1=1, asid=9, ttb0=TABLES)

    def read(address, n):
        reads.append(address)
        return (ste if address >= 1 << 40 else cd if address >= CDS else bytes(64))[:n]

    world = World(features=Features(oas=6), caches=Caches.server())
    world.ste(3)
    world.cd(3, 1, 0, asid=7)
    world.fill(3, 1)
    memory = Memory()
    memory.add_callback(0, 1 << 52, read)
    hostile = Smmu.restore(world.smmu.save(), memory)
    hostile.write("CR0", 0)
    hostile.write("STRTAB_BASE", 1 << 40)
    hostile.write("STRTAB_BASE_CFG", 32)
    for lookups in (10, 1000, 5000):
        reads.clear()
        found = look(hostile, lookups=lookups)
        assert {one.cache for one in found} >= {"tlb", "walk1"}
        assert lookups < len(reads) < lookups + 100
        assert {one.why for one in found if one.cache == "tlb"} == {
            "nobody has its tags now (vmid 0x0, asid 0x7, NS_EL1); of those with its tags some "
            "were not asked"
        }
        assert [one.sure for one in found] == [one.cache in CONFIGURATION for one in found]


def crowd(entries, others, last=None):
    """Translations that nobody gives, and others with their ASID and an empty table each.

    The pages of table 0 are cached for a substream that is gone; stream `last` has it.
    """
    large = Caches(ste=(1, 1), cd=(1, 1), tlb=(64, 8), walk1=(4, 4))
    world = World(log2size=12, caches=large)
    for page in range(entries):
        leaf = leaf_descriptor(12, 3, PA + (page << 12), attrindx=1, ap=1, af=1, ng=1)
        world.put(TABLES + 0x2000 + 8 * page, leaf)
    for sid in range(others):
        world.ste(sid)
        world.cd(sid, 1, 0, asid=7, ttb0=(PA << 2) + (sid << 12))
    world.cd(0, 1, 0, asid=7)
    for page in range(entries):
        assert world.smmu.translate(0, page << 12, ssid=1)
    world.drop(0, 1)
    if last is not None:
        world.cd(last, 1, 0, asid=7)
    return world


@pytest.mark.parametrize("lookups", [1, 600, 5000, 20_000])
def test_contexts_that_are_asked_for_many_entries_are_bounded_too(lookups):
    world = crowd(entries=64, others=100)
    reads = []

    def read(address, n):
        reads.append(address)
        return world.memory.read(address, n)

    memory = Memory()
    memory.add_callback(0, 1 << 52, read)
    smmu = Smmu.restore(world.smmu.save(), memory)
    found = look(smmu, lookups=lookups)
    own = 8 * len(found)  # what each entry's own stream gives is asked in any case
    assert len(reads) < lookups + own
    kinds = {(one.cache, one.sure) for one in found}
    assert ("tlb", False) in kinds and ("tlb", True) not in kinds
    assert sum(one.cache == "tlb" for one in found) == 64


def test_an_entry_is_sure_to_be_stale_when_all_with_its_tags_were_asked():
    found = crowd(entries=8, others=100).smmu.stale()
    assert len(found) > 8 and all(one.sure for one in found)
    assert {one.why.partition("(")[0] for one in found} == {
        "sid 0x1, ssid 0x1 gives F_TRANSLATION ",
    }
    assert crowd(entries=8, others=100, last=99).smmu.stale() == []


@pytest.mark.parametrize(("last", "listed"), [(1000, False), (1050, True)])
def test_more_contexts_than_1024_with_the_same_tags_are_not_asked(last, listed):
    found = crowd(entries=1, others=1060, last=last).smmu.stale()
    assert [one.sure for one in found if one.cache == "tlb"] == [False] * listed
    assert not any(one.sure for one in found)


def test_a_look_hears_signals():
    world = crowd(entries=64, others=300)

    def handler(_number, _frame):
        raise InterruptedError

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(InterruptedError):
            while True:
                look(world.smmu)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    world.memory.add_private(1 << 50, 4096)  # nothing holds the memory


def test_parts_of_a_table_that_are_not_there_are_passed_over():
    """2^24 StreamIDs, of which two parts are there: far fewer look-ups than streams."""
    world = World(two_level=True, log2size=24, l1cd=True, features=Features(oas=6))
    far = (1 << 24) - 3
    for sid in (3, far):
        world.ste(sid)
        world.cd(sid, 1, 0, asid=7)
    world.fill(3, 1)
    world.drop(3, 1)
    assert look(world.smmu, lookups=(1 << 18) + 1000) == []
    assert look(world.smmu, lookups=1 << 17) != []


def test_stale_meets_no_injected_error_and_leaves_it_for_translations():
    world = World()
    world.ste(3)
    world.cd(3, 1, 0, asid=7)
    world.fill(3, 1)
    world.memory.inject_error(nth=2, count=1)
    for _ in range(3):
        assert world.stale() == []
    world.smmu.command("TLBI_NH_ALL")
    world.smmu.command("CFGI_ALL")
    assert world.smmu.translate(3, VA, ssid=1).event.name == "F_CD_FETCH"


def test_a_look_changes_nothing_in_memory():
    world = World(features=Features(oas=5, httu=2))
    world.ste(3)
    world.cd(3, 1, 0, asid=7, ha=1, hd=1)
    world.table(0, leaf=leaf_descriptor(12, 3, PA, attrindx=1, ap=3, dbm=1, af=1, ng=1))
    world.fill(3, 1)
    device = AtsDevice(world.smmu, 3)
    assert device.access(VA, ssid=1)
    leaf = leaf_descriptor(12, 3, PA, attrindx=1, ap=3, dbm=1, af=0, ng=1)
    world.table(0, leaf=leaf)
    assert world.stale() == []  # hardware would set both again
    assert world.memory.read_u64(TABLES + 0x2000 + 8) == leaf


# --- configuration ---


def test_the_fields_of_an_ste_that_differ_are_named():
    world = World()
    world.ste(3)
    world.cd(3, 1, 0, asid=7)
    world.fill(3, 1)
    world.ste(3, s1dss=1, eats=0)
    (found,) = world.smmu.stale()
    assert isinstance(found, StaleEntry)
    assert (found.cache, found.why) == ("ste", "S1DSS: 0x1 now, 0x2 cached, EATS: 0x0 now, "
                                               "0x1 cached")  # fmt: skip
    world.ste(3, config=0b101, v=0)
    reason = f"C_BAD_STE ({Why.STE_V.sentence()})"
    assert f"sid 0x3 gives {reason} now" in [one.why for one in world.smmu.stale()]


def test_permissions_and_attributes_that_differ_are_named():
    world = World()
    world.ste(3)
    world.cd(3, 1, 0, asid=7)
    world.fill(3, 1)
    world.table(0, leaf=leaf_descriptor(12, 3, PA, attrindx=1, ap=3, uxn=1, pxn=1, af=1, ng=1))
    (found,) = world.smmu.stale()
    assert found.why == "perm1: 0x9 (UR|PR) now, 0x1f (UR|UW|UX|PR|PW) cached"
    world.table(0, leaf=0)
    (found,) = world.smmu.stale()
    reason = f"F_TRANSLATION ({Why.S1_INVALID.sentence()})"
    assert (found.now, found.why) == (None, f"sid 0x3, ssid 0x1 gives {reason} now")


# --- ATCs ---


def ats_world(**more):
    world = World(**more)
    world.ste(3)
    world.cd(3, 1, 0, asid=7)
    return world, AtsDevice(world.smmu, 3)


def clean(world):
    """Invalidate everything but ATCs."""
    for name in ("CFGI_ALL", "TLBI_NH_ALL", "TLBI_NSNH_ALL"):
        world.smmu.command(name)
    world.smmu.sync()


def test_an_atc_that_was_not_told_of_a_detach_is_stale():
    world, device = ats_world()
    assert device.access(VA + 8, ssid=1, write=True).pa == PA + 8
    assert device.held() == [
        AtcEntry(VA, PA, 0x1000, 3, 1, True, True, False, False, False)
    ]
    assert world.stale() == []
    world.memory.write(CDS + 0x3040, bytes(64))
    clean(world)
    (found,) = world.smmu.stale()
    assert (found.cache, found.entry, found.now) == ("atc", device.held()[0], None)
    assert found.why == "a request gets CA now (C_BAD_CD)"
    assert device.access(VA, ssid=1).pa == PA  # it does reach the page
    world.smmu.command("ATC_INV", StreamID=3, SubstreamID=1, SSV=1, Size=52)
    assert world.stale() == []


@pytest.mark.parametrize(
    "change, why",
    [
        ({"leaf": 0}, "a request gets success now (F_TRANSLATION)"),
        ({"page": PA + 0x5000}, "address: 0x800005000 now, 0x800000000 cached"),
        ({"leaf": leaf_descriptor(12, 3, PA, attrindx=1, ap=3, af=1, ng=1)},
         "write: 0x0 now, 0x1 cached"),
        ({"leaf": leaf_descriptor(12, 3, PA, attrindx=0, ap=1, af=1, ng=1, uxn=1)}, None),
        ({"leaf": leaf_descriptor(12, 3, PA, attrindx=1, ap=0, af=1, ng=1)},
         "a request is granted nothing now"),
    ],
)  # fmt: skip
def test_an_atc_entry_is_stale_that_a_request_would_not_get(change, why):
    world, device = ats_world()
    device.access(VA, ssid=1, write=True)
    world.table(0, **change)
    clean(world)
    assert [one.why for one in world.smmu.stale()] == ([] if why is None else [why])


def test_an_atc_entry_with_fewer_permissions_than_a_request_would_get_is_right():
    world, device = ats_world()
    world.table(0, leaf=leaf_descriptor(12, 3, PA, attrindx=1, ap=3, af=1, ng=1))
    device.access(VA, ssid=1)
    world.table(0)
    clean(world)
    assert world.stale() == []
    world.table(0, leaf=leaf_descriptor(12, 3, PA, attrindx=1, ap=1, af=1, ng=1))
    device.clear()
    device.access(VA, ssid=1)  # no write asked for: none granted
    assert [entry.write for entry in device.held()] == [False]
    assert world.stale() == []


def test_an_atc_entry_may_be_smaller_than_what_a_request_would_get_but_not_larger():
    world, device = ats_world()
    block = leaf_descriptor(12, 2, PA, attrindx=1, ap=1, af=1, ng=1)
    device.access(VA, ssid=1)
    world.put(TABLES + 0x1000, block)
    world.table(0, page=PA + VA)  # puts the table of pages back
    clean(world)
    assert [one.why for one in world.smmu.stale()] == [
        "address: 0x800001000 now, 0x800000000 cached"
    ]
    device.clear()
    assert device.access(VA, ssid=1).pa == PA + VA
    world.put(TABLES + 0x1000, block)
    clean(world)
    assert world.stale() == []
    device.clear()
    device.access(VA, ssid=1)
    assert [entry.size for entry in device.held()] == [0x20_0000]
    world.table(0, page=PA + VA)
    clean(world)
    (found,) = world.smmu.stale()
    assert found.why.startswith("a request gets success now (F_TRANSLATION)")


def test_an_atc_is_stale_when_its_stream_may_not_ask_any_more():
    world, device = ats_world()
    device.access(VA, ssid=1)
    world.ste(3, eats=0)
    clean(world)
    assert [one.why for one in world.smmu.stale()] == ["a request gets UR now (F_BAD_ATS_TREQ)"]


def test_atcs_are_looked_into_without_caches_too_and_devices_without_an_atc_are_not():
    world, _ = ats_world()
    bare = Smmu(world.memory, world.smmu.features, strtab_base=STES, strtab_base_cfg=4, cr0=0b10101)
    device = AtsDevice(bare, 3)
    device.access(VA, ssid=1)
    bare.devices[5] = object()
    assert bare.stale() == []
    world.table(0, leaf=0)
    assert [one.cache for one in bare.stale()] == ["atc"]
    assert len(device) == 1


def test_a_driver_that_forgets_the_atc_at_a_detach_is_found_out(monkeypatch):
    system = System(caches=Caches.server)
    nic = system.device(8, pasid_bits=8, ats=True)
    domain = nic.paging_domain()
    domain.map(0x1000, 0x9000_0000, 0x1000)
    nic.attach(nic.paging_domain())
    nic.attach_pasid(domain, 5)
    assert nic.access(0x1000, pasid=5).pa == 0x9000_0000
    monkeypatch.setattr(AtsDevice, "atc_invalidate", lambda *arguments: True)
    nic.detach_pasid(domain, 5)
    assert [one.cache for one in system.stale()] == ["atc"]
    assert nic.access(0x1000, pasid=5).pa == 0x9000_0000
