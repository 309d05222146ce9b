"""The entry writer (F42 to F45): transitions of STEs and CDs, their CMD_SYNCs, what is seen."""

import itertools
import random
from types import SimpleNamespace

import pytest

from smmufast import Features, Memory, Smmu, layout
from smmufast.iommu.smmu import entry
from smmufast.iommu.smmu.queue import CommandQueue
from smmufast.iommu.smmu.writer import EntryWriter, cd_used, ste_used

BASE = 0x8000_0000
ENTRY = 0x9000_0000
MASK = (1 << 64) - 1
FEATURES = Features.full()
FAKE_TABLE = 0xF0F0F0F0F0C0


def whole(words):
    """Eight dwords as one number."""
    return sum(word << 64 * i for i, word in enumerate(words))


def dwords(number):
    """The dwords of an entry."""
    return tuple(number >> 64 * i & (1 << 64) - 1 for i in range(8))


class Told(CommandQueue):
    """A queue that calls `told` after each CMD_SYNC."""

    def run(self, words):
        super().run(words)
        self.told()


class Steps:
    """An entry in memory, and what it was at each store and at each CMD_SYNC."""

    def __init__(self, kind, *, safe_bits=True):
        self.memory = Memory()
        self.memory.add_private(0, 1 << 40)
        self.smmu = Smmu(self.memory, cr0=0)
        self.queue = Told(self.smmu, BASE, 8)
        self.queue.told = lambda: self.syncs.append(self.now())
        self.queue.start()
        self.smmu.write("CR0", 8)
        self.kind = kind
        self.writer = EntryWriter(self.queue, self.memory, safe_bits=safe_bits)
        self.stores, self.syncs = [], []
        self.writer.observer = lambda address, index, old: self.stores.append(self.now())

    def now(self):
        return tuple(self.memory.read_u64(ENTRY + 8 * i) for i in range(8))

    def go(self, old, new):
        for i, word in enumerate(old):
            self.memory.write_u64(ENTRY + 8 * i, word)
        self.stores.clear()
        self.syncs.clear()
        if self.kind == "STE":
            update = self.writer.write_ste(ENTRY, new, 5)
        else:
            update = self.writer.write_cd(ENTRY, new, (5, 6), 3)
        assert update.syncs == len(self.syncs)
        return update


def s2_table():
    return SimpleNamespace(
        root=0xDAEDBEEFDEAD0 << 4 & (1 << 52) - 16, t0sz=4, sl0=3, irgn=1, orgn=2, sh=3, tg=2, ps=1,
        fwb=0,
    )  # fmt: skip


def s1(s1dss=2, table=FAKE_TABLE, ats=True, stall=False):
    return entry.ste_cd_table(
        table, fmt=2, s1cdmax=31, s1dss=s1dss, ats=ats, stall=stall, e2h=False, features=FEATURES
    )


def s2(ats=True, stall=False):
    return entry.ste_stage2(s2_table(), 0, stall=stall, ats=ats, features=FEATURES)


def nested_bypass():
    """Both stages, without a substream stage 2 alone, ATS, events merged."""
    words = list(s2(ats=True))
    words[0] = s1()[0] | 7 << 1
    words[1] |= 1 | 1 << 19
    return tuple(words)


ABORT, BYPASS = entry.ste_abort(), entry.ste_bypass(features=FEATURES)
STES = {
    "bypass_to_abort": (BYPASS, ABORT, 2, True),
    "abort_to_bypass": (ABORT, BYPASS, 2, True),
    "cdtable_to_abort": (s1(), ABORT, 2, True),
    "abort_to_cdtable": (ABORT, s1(), 2, True),
    "cdtable_to_bypass": (s1(), BYPASS, 3, True),
    "bypass_to_cdtable": (BYPASS, s1(), 3, True),
    "cdtable_s1dss_change": (s1(), s1(s1dss=1), 1, True),
    "cdtable_s1dss_change_back": (s1(s1dss=1), s1(), 1, True),
    "s1dssbypass_to_stebypass": (s1(s1dss=1), BYPASS, 2, True),
    "stebypass_to_s1dssbypass": (BYPASS, s1(s1dss=1), 2, True),
    "s2_to_abort": (s2(), ABORT, 2, True),
    "abort_to_s2": (ABORT, s2(), 2, True),
    "s2_to_bypass": (s2(), BYPASS, 2, True),
    "bypass_to_s2": (BYPASS, s2(), 2, True),
    "s1_to_s2": (s1(), s2(), 3, True),
    "s2_to_s1": (s2(), s1(), 3, True),
    "s1_to_s2_stall": (s1(ats=False, stall=True), s2(ats=False, stall=True), 3, True),
    "s2_to_s1_stall": (s2(ats=False, stall=True), s1(ats=False, stall=True), 3, True),
    "non_hitless": (s1(), s1(s1dss=1, table=0x4B4B4B4B40), 3, False),
    "nested_s1dssbypass_to_s1bypass": (nested_bypass(), s2(ats=False), 3, True),
    "nested_s1bypass_to_s1dssbypass": (s2(ats=False), nested_bypass(), 2, True),
}  # fmt: skip


def space():
    return SimpleNamespace(
        root=s2_table().root, t0sz=4, tg=2, ps=1, irgn=1, orgn=2, sh=3, mair=0xABCDEF012345678
    )


ZERO = (0,) * 8
SVA = entry.cd_sva(space(), 1997, stall=True)
CDS = {
    "cd_s1_set": (ZERO, entry.cd_paging(space(), 1997, stall=False, dirty=False), 2, False),
    "cd_s1_clear": (entry.cd_paging(space(), 1997, stall=False, dirty=False), ZERO, 2, False),
    "cd_s1_change_asid": (entry.cd_paging(space(), 778, stall=False, dirty=False),
                          entry.cd_paging(space(), 1997, stall=False, dirty=False), 1, True),
    "cd_s1_change_asid_back": (entry.cd_paging(space(), 1997, stall=False, dirty=False),
                               entry.cd_paging(space(), 778, stall=False, dirty=False), 1, True),
    "cd_sva_set": (ZERO, SVA, 2, False),
    "cd_sva_clear": (SVA, ZERO, 2, False),
    "cd_sva_release": (SVA, entry.cd_quiet(SVA, stall_force=False), 2, True),
    "cd_sva_unrelease": (entry.cd_quiet(SVA, stall_force=False), SVA, 2, True),
}  # fmt: skip


def check(steps, kind, old, new, update):
    """F45: at each CMD_SYNC and each store the entry is old, new, or invalid."""
    used = ste_used if kind == "STE" else cd_used
    assert steps.now() == new
    for seen in (*steps.stores, *steps.syncs):
        valid = seen[0] & (1 if kind == "STE" else 1 << 31)
        masks = dwords(used(whole(seen)))
        safe = [0] * 8
        if kind == "STE":
            safe[1] = 1 << 19 | 3 << 28
        like = [
            all((a ^ b) & mask & ~free == 0 for a, b, mask, free in
                zip(seen, end, masks, safe, strict=True))
            for end in (old, new)
        ]  # fmt: skip
        assert any(like) or (not valid and not update.hitless)


@pytest.mark.parametrize("name", STES)
def test_f44_transitions_of_an_ste_take_the_kernels_number_of_syncs(name):
    old, new, syncs, hitless = STES[name]
    steps = Steps("STE")
    update = steps.go(old, new)
    assert (update.syncs, update.hitless) == (syncs, hitless)
    assert any(seen[0] == 0 for seen in steps.syncs) != hitless
    check(steps, "STE", old, new, update)


@pytest.mark.parametrize("name", [name for name in STES if name.startswith("nested")])
def test_f44_the_nested_transitions_need_the_safe_bits(name):
    old, new, _, _ = STES[name]
    update = Steps("STE", safe_bits=False).go(old, new)
    assert (update.syncs, update.hitless) == (3, False)


@pytest.mark.parametrize("name", [name for name in STES if not name.startswith("nested")])
def test_f44_the_others_do_not(name):
    old, new, syncs, hitless = STES[name]
    assert Steps("STE", safe_bits=False).go(old, new) == (syncs, hitless)


@pytest.mark.parametrize("name", CDS)
def test_f43_transitions_of_a_cd_take_the_kernels_number_of_syncs(name):
    old, new, syncs, hitless = CDS[name]
    steps = Steps("CD")
    update = steps.go(old, new)
    assert (update.syncs, update.hitless) == (syncs, hitless)
    assert any(seen[0] == 0 for seen in steps.syncs) != hitless
    check(steps, "CD", old, new, update)


def test_f43_an_asid_changes_by_one_store():
    old, new, _, _ = CDS["cd_s1_change_asid"]
    steps = Steps("CD")
    steps.go(old, new)
    assert len(steps.stores) == 1


def test_f42_each_sync_of_a_cd_names_every_stream_and_its_substream():
    steps = Steps("CD")
    steps.queue.log = []
    update = steps.go(ZERO, SVA)
    named = [fields for name, fields in steps.queue.log if name == "CFGI_CD"]
    assert [(f["StreamID"], f["SubstreamID"], f["Leaf"]) for f in named] == [
        (5, 3, 1), (6, 3, 1),
    ] * update.syncs  # fmt: skip


def test_f45_what_does_not_change_takes_no_sync():
    for kind, words in (("STE", s1()), ("CD", SVA)):
        steps = Steps(kind)
        assert steps.go(words, words) == (0, True)
        assert steps.stores == []


def test_f45_between_all_legal_entries_nothing_torn_is_seen():
    steps = Steps("STE")
    entries = {e[0] for e in STES.values()} | {e[1] for e in STES.values()}
    for old, new in itertools.permutations(sorted(entries), 2):
        check(steps, "STE", old, new, steps.go(old, new))


def test_f45_random_entries_end_at_the_target_and_use_whole_dwords():
    rng = random.Random(1)
    legal = sorted({e[0] for e in STES.values()})
    for kind, used in (("STE", ste_used), ("CD", cd_used)):
        steps = Steps(kind)
        for _ in range(300):
            old = list(rng.choice(legal) if kind == "STE" else SVA)
            new = list(rng.choice(legal) if kind == "STE" else SVA)
            for words in (old, new):
                for _ in range(rng.randrange(4)):
                    words[rng.randrange(8)] ^= 1 << rng.randrange(64)
            new = dwords(whole(new) & used(whole(new)))
            update = steps.go(tuple(old), new)
            assert steps.now() == new
            assert update.syncs <= 3
            if not update.hitless:
                assert any(seen[0] == 0 for seen in steps.syncs) or old[0] == 0


def test_the_builders_write_what_the_appendix_says():
    word = sum(value << 64 * i for i, value in enumerate(s1()))
    fields = layout.unpack("STE", word)
    assert {name: fields[name] for name in ("V", "Config", "S1Fmt", "S1CDMax", "S1DSS", "S1CIR",
                                            "S1COR", "S1CSH", "S1STALLD", "EATS", "STRW")} == {
        "V": 1, "Config": 5, "S1Fmt": 2, "S1CDMax": 31, "S1DSS": 2, "S1CIR": 1, "S1COR": 1,
        "S1CSH": 3, "S1STALLD": 1, "EATS": 1, "STRW": 0,
    }  # fmt: skip
    fields = layout.unpack("STE", sum(value << 64 * i for i, value in enumerate(s2())))
    assert {name: fields[name] for name in ("Config", "S2AA64", "S2PTW", "S2R", "S2S", "S2VMID",
                                            "S2TTB")} == {
        "Config": 6, "S2AA64": 1, "S2PTW": 1, "S2R": 1, "S2S": 0, "S2VMID": 0,
        "S2TTB": s2_table().root,
    }  # fmt: skip
    assert (1, *[0] * 7) == ABORT
