"""Walks whose fetches the host performs: their state, invalidations that overtake them, caches."""

import collections
import gc

import numpy as np
import pytest
import small
import walktwin

from smmufast import Caches, Event, Features, Memory, Smmu, layout

STRTAB, CDS, CMDQ, EVENTQ = 0x10000, 0x20000, 0x40000, 0x50000
SID, ASID, VMID = 1, 7, 3
IOVA = 0x1ABC
OLD, NEW = 0x8000_1000, 0x9000_1000
PAGE = 0x7C3  # a valid page, AF=1, read and write, nG=0
FEATURES = Features(oas=5, httu=2)


class Bench:
    """A stream of one page, through stage 1, stage 2 or both, with queues; tables below 1 MiB."""

    def __init__(self, config=0b101, *, caches=None, queue=True, cd=None, ste=None, page=PAGE,
                 **more):  # fmt: skip
        self.memory = Memory()
        self.memory.add_private(0, 1 << 40)
        self.config, self.cd, self.ste = config, cd or {}, ste or {}
        self.write_ste(CDS)
        self.write_cd(0x30000)
        self.tables(0x30000, OLD, page)
        if config & 2:
            self.tables2(0x60000)
        registers = {"strtab_base": STRTAB, "strtab_base_cfg": 4, "eventq_base": EVENTQ | 6}
        registers |= {"cr0": 0b1101, "cmdq_base": CMDQ | 4} if queue else {}
        self.smmu = Smmu(self.memory, FEATURES, caches=caches, **registers, **more)

    def put(self, record, at, **fields):
        """Write a structure."""
        self.memory.write(at, layout.to_bytes(record, layout.pack(record, **fields)))

    def write_ste(self, cds, **changes):
        """The STE of SID."""
        stage2 = {
            "S2T0SZ": 25, "S2SL0": 1, "S2PS": 2, "S2AA64": 1, "S2R": 1,
            "S2AFFD": 1, "S2TTB": 0x60000,
        }  # fmt: skip
        self.put("STE", STRTAB + 64 * SID, V=1, Config=self.config, S1ContextPtr=cds, S2VMID=VMID,
                 **(stage2 if self.config & 2 else {}) | self.ste | changes)  # fmt: skip

    def write_cd(self, table, at=CDS, **changes):
        """A CD whose tables start there."""
        fields = {
            "AA64": 1, "A": 1, "R": 1, "T0SZ": 25, "IPS": 2, "EPD1": 1, "ASID": ASID,
            "TTB0": table, "MAIR0": 0xFF,
        }  # fmt: skip
        self.put("CD", at, V=1, **fields | self.cd | changes)

    def tables(self, at, to, page=PAGE):
        """Three tables of stage 1, which map IOVA's page."""
        self.memory.write_u64(at, at + 0x1003)
        self.memory.write_u64(at + 0x1000, at + 0x2003)
        self.memory.write_u64(at + 0x2008, to | page)

    def tables2(self, at, to=0, attributes=0x7FD):
        """Tables of stage 2: 0 to 1 GiB by blocks of 2 MiB, and the block of each output."""
        self.memory.write_u64(at, at + 0x1003)
        for i in range(512):
            self.memory.write_u64(at + 0x1000 + 8 * i, to + (i << 21) | attributes)
        for block in (OLD, NEW):
            self.memory.write_u64(at + 8 * (block >> 30), at + 0x2003)
            self.memory.write_u64(
                at + 0x2000 + 8 * (block >> 21 & 511), (to + block) >> 21 << 21 | attributes)

    def answer(self, walk, times=None, then=None):
        """Answer fetches, `times` of them or all; what was asked for."""
        asked = []
        while (fetch := walk.request) is not None and (times is None or len(asked) < times):
            asked.append(fetch)
            data = self.memory.read(fetch.address, fetch.size)
            if fetch.swap and int.from_bytes(data, "little") == fetch.swap[0]:
                self.memory.write_u64(fetch.address, fetch.swap[1])
            walk.supply(data)
        return asked

    def walk(self, **access):
        """A walk of IOVA's page."""
        return self.smmu.start_walk(SID, IOVA, **access)

    def pending(self, kind, level=None, **access):
        """A walk that waits for a fetch."""
        walk = self.walk(**access)
        while (walk.request.kind, walk.request.level) != (kind, level):
            self.answer(walk, 1)
        return walk

    def events(self):
        """The records in the event queue."""
        return [Event(self.memory.read(EVENTQ + 32 * i, 32))
                for i in range(self.smmu.read("EVENTQ_PROD"))]  # fmt: skip

    def invalidate(self, *commands):
        """Issue commands, (name, fields)."""
        for name, fields in commands:
            self.smmu.command(name, **fields)

    def overtake(self, *commands):
        """Issue commands and CMD_SYNC."""
        self.invalidate(*commands)
        self.smmu.sync()

    def starts_again(self, walk):
        """Whether a walk is where one is that starts now; with caches that need not be the STE."""
        return walk.request == self.walk().request and walk.request is not None


TLBI = ("TLBI_NH_VA", {"VMID": VMID, "ASID": ASID, "Address": IOVA & ~0xFFF})
TLBI_ASID = ("TLBI_NH_ASID", {"VMID": VMID, "ASID": ASID})
TLBI_S2 = ("TLBI_S12_VMALL", {"VMID": VMID})
CFGI_STE = ("CFGI_STE", {"StreamID": SID, "Leaf": 1})
CFGI_CD = ("CFGI_CD", {"StreamID": SID, "SubstreamID": 0, "Leaf": 1})
EVERY_CACHES = {"no caches": lambda: None, "server": Caches.server, "small": Caches.small,
                "split": lambda: Caches.small(nested="split"),
                "config alone": lambda: Caches(ste=(1, 4), cd=(1, 4))}  # fmt: skip
every_caches = pytest.mark.parametrize("caches", EVERY_CACHES.values(), ids=EVERY_CACHES.keys())


# --- the same as translate() ---


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_a_walk_alone_does_what_translate_does(first):
    assert sum(walktwin.check_alone(first + i) for i in range(10)) > 1000


@pytest.mark.rule("S3.21.3-13")
@pytest.mark.parametrize("first", range(0, 40, 10))
def test_walks_at_once_use_nothing_of_before_a_sync(first):
    ended, restarts, held = np.sum([walktwin.check_together(first + i) for i in range(10)], axis=0)
    assert ended > 200 and restarts > 20 and held > 10


@every_caches
def test_many_walks_at_once_give_what_one_after_the_other_give(caches):
    bare, _ = small.system()
    requests = [r for r in small.REQUESTS if r.sid != small.NO_TABLE]
    rows = [small.row(result) for result in small.translate_each(bare, requests)]
    smmu, _ = small.system(caches=caches())
    walks = [smmu.start_walk(r.sid, r.iova, **r.access) for r in requests]
    while any(not walk.done for walk in walks):
        for walk in walks[::-1]:
            if (fetch := walk.request) is not None:
                data = small.build()[fetch.address - small.BASE :][: fetch.size]
                walk.supply(bytes(data) if len(data) == fetch.size else None)
    assert [small.row(walk.result) for walk in walks] == rows


def test_a_walk_is_not_limited_by_what_is_recorded_of_it():
    # seven updates of eight are lost, of stage 1 and of each walk of stage 2
    bench = Bench(0b111, cd={"HA": 1}, ste={"S2HA": 1}, page=PAGE & ~0x400)
    bench.tables2(0x60000, attributes=0x7FD & ~0x400)
    walk = bench.walk()
    asked, updates = 0, collections.Counter()
    while (fetch := walk.request) is not None:
        asked += 1
        data = bench.memory.read(fetch.address, fetch.size)
        if fetch.swap:
            updates[fetch.kind] += 1
            data = fetch.swap[0] ^ (1 << 55 if updates[fetch.kind] % 8 else 0)
        walk.supply(data)
    assert asked > 600
    assert walk.result.pa == OLD | IOVA & 0xFFF
    assert len(walk.result.fetches) == 128


# --- an invalidation and CMD_SYNC overtake a walk ---


def moved_page(bench):
    """The page's last table is another one; the old one is used for something else."""
    bench.tables(0x33000, NEW)
    bench.memory.write_u64(0x31000, 0x35003)
    return [TLBI]


def moved_cd(bench):
    """The CD names other tables."""
    bench.tables(0x33000, NEW)
    bench.write_cd(0x33000)
    return [CFGI_CD, TLBI_ASID]


def moved_ste(bench):
    """The STE names another CD."""
    bench.tables(0x33000, NEW)
    bench.write_cd(0x33000, 0x28000)
    bench.write_ste(0x28000)
    return [CFGI_STE, TLBI_ASID]


def scrub(bench):
    """What the tables were is something else now."""
    bench.memory.write(0x32000, b"\xa4" * 0x1000)


WAYS = {
    "page": (0b101, moved_page, ("TT", 3)),
    "CD": (0b101, moved_cd, ("TT", 1)),
    "STE": (0b101, moved_ste, ("CD", None)),
    "page, both stages": (0b111, moved_page, ("TT", 3)),
    "CD, both stages": (0b111, moved_cd, ("TT", 1)),
    "STE, both stages": (0b111, moved_ste, ("CD", None)),
}
ways = pytest.mark.parametrize(("config", "move", "waits"), WAYS.values(), ids=WAYS.keys())


@pytest.mark.rule("S3.21.1-4")
@ways
@every_caches
@pytest.mark.parametrize("queue", [True, False])
def test_a_walk_that_a_sync_overtakes_starts_again(config, move, waits, caches, queue):
    bench = Bench(config, caches=caches(), queue=queue)
    walk = bench.pending(*waits)
    bench.overtake(*move(bench))
    scrub(bench)
    assert not walk.done
    assert bench.starts_again(walk)
    if bench.smmu.caches is None:
        assert walk.request.kind == "STE"
    asked = bench.answer(walk)
    assert walk.result.pa == NEW | IOVA & 0xFFF
    assert bench.events() == []
    assert [fetch[:4] for fetch in walk.result.fetches] == [fetch[:4] for fetch in asked]
    assert bench.smmu.stale() == []
    assert bench.smmu.pa(SID, IOVA) == NEW | IOVA & 0xFFF


@ways
@every_caches
def test_an_answer_to_what_was_asked_before_is_dropped(config, move, waits, caches):
    bench = Bench(config, caches=caches())
    walk = bench.pending(*waits)
    asked = walk.request
    bench.overtake(*move(bench))
    scrub(bench)
    walk.supply(bytes(asked.size))  # invalid, whatever it is
    assert bench.starts_again(walk)
    bench.answer(walk)
    assert walk.result.pa == NEW | IOVA & 0xFFF
    assert bench.events() == []
    assert bench.smmu.stale() == []


def test_an_abort_told_too_late_is_dropped():
    bench = Bench()
    walk = bench.pending("TT", 3)
    bench.overtake(*moved_page(bench))
    walk.supply(None)
    bench.answer(walk)
    assert walk.result.pa == NEW | IOVA & 0xFFF
    assert bench.events() == []


def test_once_the_host_has_seen_the_first_fetch_again_its_answer_counts():
    bench = Bench()
    walk = bench.pending("TT", 3)
    bench.overtake(*moved_page(bench))
    assert walk.request.kind == "STE"
    walk.supply(None)
    assert walk.result.fault.name == "F_STE_FETCH"


def test_the_size_of_a_late_answer_is_that_of_what_was_asked():
    bench = Bench()
    walk = bench.pending("TT", 3)
    bench.overtake(*moved_page(bench))
    with pytest.raises(ValueError, match="data must be 8 bytes, not 64"):
        walk.supply(bytes(64))
    walk.supply(bytes(8))
    assert walk.request.size == 64


@every_caches
def test_an_invalidation_alone_lets_a_walk_go_on_and_nothing_is_kept_of_it(caches):
    bench = Bench(caches=caches())
    walk = bench.pending("TT", 3)
    kept = 0 if bench.smmu.caches is None else len(bench.smmu.caches)
    bench.smmu.command(*TLBI[:1], **TLBI[1])
    assert walk.request.kind == "TT"
    bench.answer(walk)
    assert walk.result.pa == OLD | IOVA & 0xFFF
    assert bench.smmu.caches is None or len(bench.smmu.caches.tlb or ()) == 0
    assert bench.smmu.caches is None or len(bench.smmu.caches) <= kept


@pytest.mark.parametrize("before", [(), ("PREFETCH_CONFIG",), ("ATC_INV",)])
def test_a_sync_without_an_invalidation_overtakes_nothing(before):
    bench = Bench()
    walk = bench.pending("TT", 3)
    for name in before:
        if name != "ATC_INV" or FEATURES.ats:
            bench.smmu.command(name, StreamID=SID)
    bench.smmu.sync()
    assert (walk.request.kind, walk.request.level) == ("TT", 3)
    bench.answer(walk)
    assert len(walk.result.fetches) == 5


def test_an_invalidation_before_the_walk_began_does_not_overtake_it():
    bench = Bench()
    bench.smmu.command(TLBI[0], **TLBI[1])
    walk = bench.pending("TT", 3)
    bench.smmu.sync()
    assert walk.request.level == 3


def test_a_walk_starts_again_each_time_it_is_overtaken():
    bench = Bench()
    walk = bench.walk()
    for times in (1, 2, 3, 4, 4, 3):
        assert walk.request.kind == "STE"
        bench.answer(walk, times)
        bench.overtake(TLBI)
    bench.answer(walk)
    assert len(walk.result.fetches) == 5


def test_a_walk_that_is_done_stays_done():
    bench = Bench()
    walk = bench.walk()
    bench.answer(walk)
    result = walk.result
    bench.overtake(*moved_page(bench), CFGI_STE)
    assert walk.done and walk.request is None
    assert walk.result is result and result.pa == OLD | IOVA & 0xFFF


def test_a_walk_that_starts_again_may_be_done_by_a_hit():
    bench = Bench(caches=Caches.small())
    walk = bench.pending("TT", 3)
    bench.overtake(TLBI, CFGI_STE)
    assert bench.smmu.pa(SID, IOVA) == OLD | IOVA & 0xFFF
    hits = bench.smmu.caches.tlb.hits
    assert walk.done
    assert walk.request is None
    assert (walk.result.pa, walk.result.fetches) == (OLD | IOVA & 0xFFF, [])
    assert bench.smmu.caches.tlb.hits == hits + 1


def test_no_event_comes_from_old_tables():
    # the walk waits for the last descriptor, which is unmapped by now, and so is the new one
    for caches in EVERY_CACHES.values():
        bench = Bench(caches=caches())
        walk = bench.pending("TT", 3)
        bench.memory.write_u64(0x32008, 0)
        bench.smmu.command(TLBI[0], **TLBI[1])
        late = bench.pending("TT", 3)
        walk.supply(bytes(8))  # before the SYNC: this is of then
        assert [event.name for event in bench.events()] == ["F_TRANSLATION"]
        bench.smmu.sync()
        bench.memory.write_u64(0x32008, NEW | PAGE)
        late.supply(bytes(8))  # began behind the invalidation: nothing overtook it
        assert len(bench.events()) == 2
        walk = bench.pending("TT", 3)
        bench.overtake(TLBI)
        walk.supply(bytes(8))
        bench.answer(walk)
        assert walk.result.pa == NEW | IOVA & 0xFFF
        assert len(bench.events()) == 2


@pytest.mark.parametrize("move", [moved_page, moved_cd, moved_ste])
@pytest.mark.parametrize("performed", [False, True])
@every_caches
def test_a_walk_that_waits_for_its_update_starts_again(move, performed, caches):
    bench = Bench(cd={"HA": 1}, page=PAGE & ~0x400, caches=caches())
    walk = bench.pending("TT update", 3)
    update = walk.request
    assert update.swap == (OLD | PAGE & ~0x400, OLD | PAGE)
    if performed:  # in time
        bench.memory.write_u64(update.address, update.swap[1])
    bench.overtake(*move(bench))
    scrub(bench)
    if performed:
        walk.supply(update.swap[0])
    assert bench.starts_again(walk)
    bench.answer(walk)
    assert walk.result.pa == NEW | IOVA & 0xFFF
    assert bench.memory.read(0x32000, 0x1000) == b"\xa4" * 0x1000
    assert bench.events() == []


def test_an_update_that_was_made_is_not_made_again():
    bench = Bench(cd={"HA": 1}, page=PAGE & ~0x400)
    walk = bench.pending("TT update", 3)
    bench.memory.write_u64(walk.request.address, walk.request.swap[1])
    late = walk.request.swap[0]
    bench.overtake(TLBI)
    walk.supply(late)
    assert [fetch.kind for fetch in bench.answer(walk)] == ["STE", "CD", "TT", "TT", "TT"]
    assert walk.result.pa == OLD | IOVA & 0xFFF


def test_stage_2_alone_starts_again():
    bench = Bench(0b110)
    walk = bench.smmu.start_walk(SID, OLD | 0x123)
    bench.answer(walk, 2)
    assert (walk.request.kind, walk.request.level) == ("S2TT", 2)
    bench.tables2(0x70000, 1 << 32)
    bench.write_ste(0, S2TTB=0x70000)
    bench.overtake(CFGI_STE, TLBI_S2)
    bench.memory.write(0x62000, bytes(0x1000))
    walk.supply(bytes(8))
    bench.answer(walk)
    assert walk.result.pa == 1 << 32 | OLD | 0x123
    assert bench.events() == []


def test_a_walk_that_stalls_after_it_started_again_stalls_once():
    bench = Bench(cd={"S": 1}, page=0)
    walk = bench.pending("TT", 3)
    bench.overtake(TLBI)
    walk.supply(bytes(8))
    bench.answer(walk)
    assert walk.result.action == "stall"
    assert [stall.sid for stall in bench.smmu.stalls] == [SID]
    assert len(bench.events()) == 1


# --- SMMUEN in the middle (6.3.9.6) ---


@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("abort", [False, True])
def test_a_walk_finds_the_smmu_disabled(holds, late, abort):
    bench = Bench(gbpa=0x10_1000 if abort else 0x1000)
    walk = bench.pending("TT", 3, holds_sync=holds)
    bench.smmu.write("CR0", 0b1100)
    if late:
        walk.supply(bytes(8))
    assert walk.done and walk.request is None
    assert walk.result.action == ("abort" if abort else "disabled")
    assert walk.result.fetches == []
    assert bench.events() == []


@pytest.mark.parametrize("holds", [False, True])
def test_a_walk_is_one_of_the_tables_that_smmuen_was_set_with(holds):
    bench = Bench(caches=Caches.small())
    walk = bench.pending("CD", holds_sync=holds)
    bench.smmu.write("CR0", 0b1100)
    assert bench.memory.read(0, 8) == bytes(8)
    bench.smmu.write("STRTAB_BASE", 0x80000)
    bench.put("STE", 0x80000 + 64 * SID, V=1, Config=0b100)
    for name, fields in (CFGI_STE, TLBI):
        bench.smmu.command(name, **fields)
    bench.smmu.write("CR0", 0b1101)
    asked = walk.request
    assert (asked.kind, asked.address) == ("STE", 0x80000 + 64 * SID)
    bench.answer(walk)
    assert walk.result.action == "bypass"
    bench.smmu.sync()


def test_registers_that_do_not_matter_do_not_disturb_a_walk():
    bench = Bench()
    walk = bench.pending("TT", 3)
    bench.smmu.write("IRQ_CTRL", 5)
    bench.smmu.write("CR2", 0)  # guarded
    bench.smmu.write("GBPA", 1 << 31 | 1 << 20)
    bench.smmu.write("CR0", 0b1001)  # without EVENTQEN
    assert walk.request.level == 3
    walk.supply(bytes(8))
    assert walk.result.fault.name == "F_TRANSLATION"
    assert walk.result.event is None
    bench.smmu.write("CR0", 0b1101)
    assert bench.events() == []


def test_a_reset_ends_the_way_of_a_walk():
    bench = Bench()
    walk = bench.pending("TT", 3)
    bench.smmu.reset()
    assert walk.result.action == "disabled"


# --- a walk that holds CMD_SYNC ---


@ways
@every_caches
def test_cmd_sync_waits_for_a_walk_that_holds_it(config, move, waits, caches):
    bench = Bench(config, caches=caches())
    smmu = bench.smmu
    walk = bench.pending(*waits, holds_sync=True)
    bench.invalidate(*move(bench))
    at = smmu.read("CMDQ_PROD")
    with pytest.raises(RuntimeError, match="command queue: CMD_SYNC waits for walks"):
        smmu.sync()
    assert (smmu.read("CMDQ_CONS"), smmu.read("CMDQ_PROD")) == (at, at + 1)
    smmu.command("TLBI_NSNH_ALL")  # behind it: not consumed either
    assert smmu.read("CMDQ_CONS") == at
    bench.answer(walk)
    assert walk.result.pa == OLD | IOVA & 0xFFF  # with what it had read
    assert smmu.read("CMDQ_CONS") == smmu.read("CMDQ_PROD") == at + 2
    scrub(bench)
    assert smmu.stale() == []
    assert smmu.pa(SID, IOVA) == NEW | IOVA & 0xFFF


def test_the_event_of_the_walk_comes_before_the_sync_that_it_held():
    told = []
    bench = Bench(on_interrupt=lambda name: told.append((name, smmu.read("CMDQ_CONS"))))
    smmu = bench.smmu
    smmu.write("IRQ_CTRL", 5)
    walk = bench.pending("TT", 3, holds_sync=True)
    smmu.command(TLBI[0], **TLBI[1])
    smmu.command("SYNC", CS=1)
    assert (told, smmu.read("CMDQ_CONS")) == ([], 1)
    walk.supply(bytes(8))
    assert told == [("eventq", 1), ("cmdq_sync", 2)]
    assert [event.name for event in bench.events()] == ["F_TRANSLATION"]


def test_cmd_sync_waits_for_the_last_of_several_and_for_no_later_ones():
    bench = Bench()
    smmu = bench.smmu
    before = [bench.pending("TT", 3, holds_sync=True) for _ in range(3)]
    other = bench.pending("TT", 3)
    smmu.command(TLBI[0], **TLBI[1])
    later = bench.pending("TT", 3, holds_sync=True)
    with pytest.raises(RuntimeError):
        smmu.sync()
    assert other.request.level == 3  # not yet complete: it goes on
    for walk in (before[1], before[0]):
        bench.answer(walk)
        assert smmu.read("CMDQ_CONS") == 1
    bench.answer(later)
    assert smmu.read("CMDQ_CONS") == 1
    bench.answer(before[2])
    assert smmu.read("CMDQ_CONS") == 2
    assert other.request.kind == "STE"
    assert {walk.result.pa for walk in (*before, later)} == {OLD | IOVA & 0xFFF}


def test_a_walk_that_began_behind_the_invalidation_holds_nothing():
    bench = Bench()
    bench.smmu.command(TLBI[0], **TLBI[1])
    walk = bench.pending("TT", 3, holds_sync=True)
    bench.smmu.sync()
    assert walk.request.level == 3
    bench.smmu.command(CFGI_STE[0], **CFGI_STE[1])
    with pytest.raises(RuntimeError):
        bench.smmu.sync()
    bench.answer(walk)
    assert bench.smmu.read("CMDQ_CONS") == bench.smmu.read("CMDQ_PROD")


@pytest.mark.parametrize("how", ["close", "drop", "drop in a cycle"])
def test_a_walk_that_is_given_up_holds_cmd_sync_no_more(how):
    bench = Bench()
    walk = bench.pending("TT", 3, holds_sync=True)
    bench.smmu.command(TLBI[0], **TLBI[1])
    with pytest.raises(RuntimeError):
        bench.smmu.sync()
    if how == "close":
        walk.close()
        walk.close()
        assert (walk.done, walk.request, walk.result) == (True, None, None)
        assert repr(walk) == "<Walk closed>"
        with pytest.raises(RuntimeError, match="the walk is closed"):
            walk.supply(bytes(8))
    elif how == "drop":
        del walk
    else:
        cycle = [walk]
        cycle.append(cycle)
        del walk, cycle
    gc.collect()
    assert bench.smmu.read("CMDQ_CONS") == 2
    assert bench.events() == []


def test_what_a_waiting_command_raises_reaches_whoever_ended_the_walk():
    class Device:
        def atc_invalidate(self, *_):
            raise ZeroDivisionError("the device is gone")

    bench = Bench()
    smmu = Smmu(bench.memory, Features(oas=5, ats=1), strtab_base=STRTAB, strtab_base_cfg=4,
                cr0=0b1101, cmdq_base=CMDQ | 4)  # fmt: skip
    smmu.devices[SID] = Device()
    for end in ("answer", "close"):
        walk = smmu.start_walk(SID, IOVA, holds_sync=True)
        smmu.command(TLBI[0], **TLBI[1])
        smmu.command("SYNC")
        smmu.command("ATC_INV", StreamID=SID)
        with pytest.raises(ZeroDivisionError):
            if end == "answer":
                bench.answer(walk)
            else:
                walk.close()
        assert walk.done
        assert (walk.result is None) == (end == "close")
        # the SYNC is complete, and the command that raised waits as it would otherwise
        assert smmu.read("CMDQ_CONS") == (smmu.read("CMDQ_PROD") - 1) % 32
        del smmu.devices[SID]
        smmu.write("CMDQ_PROD", smmu.read("CMDQ_PROD"))
        smmu.devices[SID] = Device()


def test_without_a_command_queue_cmd_sync_is_refused_while_it_is_held():
    bench = Bench(queue=False)
    walk = bench.pending("TT", 3, holds_sync=True)
    bench.smmu.command(TLBI[0], **TLBI[1])
    with pytest.raises(RuntimeError, match="SYNC: CMD_SYNC waits for walks"):
        bench.smmu.sync()
    bench.answer(walk)
    bench.smmu.sync()
    assert walk.result.pa == OLD | IOVA & 0xFFF


def test_clearing_smmuen_lets_cmd_sync_complete():
    bench = Bench()
    walk = bench.pending("TT", 3, holds_sync=True)
    bench.smmu.command(TLBI[0], **TLBI[1])
    with pytest.raises(RuntimeError):
        bench.smmu.sync()
    bench.smmu.write("CR0", 0b1100)
    assert bench.smmu.read("CMDQ_CONS") == 2
    assert walk.result.action == "disabled"
    del walk
    again = Bench()
    walk = again.pending("TT", 3, holds_sync=True)
    again.smmu.write("CR0", 0b1100)
    again.smmu.write("CR0", 0b1101)
    assert walk.request.kind == "STE"  # and holds CMD_SYNC from here on
    again.smmu.command(TLBI[0], **TLBI[1])
    with pytest.raises(RuntimeError):
        again.smmu.sync()
    again.answer(walk)
    assert again.smmu.read("CMDQ_CONS") == 2


def test_cmdqen_0_leaves_the_cmd_sync_where_it_is():
    bench = Bench()
    walk = bench.pending("TT", 3, holds_sync=True)
    bench.smmu.command(TLBI[0], **TLBI[1])
    with pytest.raises(RuntimeError):
        bench.smmu.sync()
    bench.smmu.write("CR0", 0b0101)
    bench.answer(walk)
    assert bench.smmu.read("CMDQ_CONS") == 1
    bench.smmu.write("CR0", 0b1101)
    assert bench.smmu.read("CMDQ_CONS") == 2


def test_a_state_is_not_saved_while_a_walk_holds_a_cmd_sync():
    bench = Bench()
    walk = bench.pending("TT", 3, holds_sync=True)
    bench.smmu.command(TLBI[0], **TLBI[1])
    state = bench.smmu.save()  # nothing waits yet
    with pytest.raises(RuntimeError):
        bench.smmu.sync()
    with pytest.raises(RuntimeError, match="save: CMD_SYNC waits for walks"):
        bench.smmu.save()
    bench.answer(walk)
    bench.smmu.save()
    again = Smmu.restore(state, bench.memory)
    again.sync()
    assert again.read("CMDQ_CONS") == 2


def test_a_walk_goes_on_beside_a_state_that_is_saved_and_restored():
    bench = Bench(caches=Caches.small())
    walk = bench.pending("TT", 3)
    again = Smmu.restore(bench.smmu.save(), bench.memory)
    again.command(TLBI[0], **TLBI[1])
    again.sync()
    bench.answer(walk)
    assert walk.result.pa == OLD | IOVA & 0xFFF
    assert len(walk.result.fetches) == 5


# --- caches ---


def test_an_unfinished_walk_has_filled_what_it_has_read():
    smmu, _ = small.system(caches=Caches.small())
    walk = smmu.start_walk(1, small.RW)
    held = []
    while (fetch := walk.request) is not None:
        held.append((fetch.kind, [len(one) for one in (
            smmu.caches.ste, smmu.caches.cd, smmu.caches.tlb, smmu.caches.walk1)]))  # fmt: skip
        walk.supply(smmu.memory.read(fetch.address, fetch.size))
    assert held == [
        ("STE", [0, 0, 0, 0]), ("CD", [1, 0, 0, 0]), ("TT", [1, 1, 0, 0]), ("TT", [1, 1, 0, 1]),
        ("TT", [1, 1, 0, 2]),
    ]  # fmt: skip
    assert len(smmu.caches.tlb) == 1
    assert [one["misses"] for one in smmu.caches.counters.values()] == [1, 1, 1, 1, 0]


def test_walks_at_once_count_as_they_began():
    smmu, _ = small.system(caches=Caches.small())
    walks = [smmu.start_walk(1, small.RW) for _ in range(4)]
    while not all(walk.done for walk in walks):
        for walk in walks:
            if (fetch := walk.request) is not None:
                walk.supply(smmu.memory.read(fetch.address, fetch.size))
    # none of them found what another one was about to read
    counters = smmu.caches.counters
    assert {name: (one["hits"], one["misses"]) for name, one in counters.items()} == {
        "ste": (0, 4), "cd": (0, 4), "tlb": (0, 4), "walk1": (0, 4), "walk2": (0, 0),
    }  # fmt: skip
    late = smmu.start_walk(1, small.RW)
    assert late.done
    assert (smmu.caches.ste.hits, smmu.caches.tlb.hits) == (1, 1)


def test_a_walk_finds_what_another_one_filled_meanwhile():
    smmu, _ = small.system(caches=Caches.small())
    slow = smmu.start_walk(1, small.RW)
    slow.supply(smmu.memory.read(slow.request.address, 64))
    assert slow.request.kind == "CD"
    smmu.translate(1, small.RW)
    slow.supply(smmu.memory.read(slow.request.address, 64))
    assert slow.done  # the TLB was asked after the CD was there
    assert [fetch.kind for fetch in slow.result.fetches] == ["STE", "CD"]
    assert smmu.caches.tlb.hits == 1


@every_caches
def test_a_walk_that_is_given_up_leaves_caches_that_are_right(caches):
    bench = Bench(0b111, caches=caches())
    for times in range(1, 12):
        walk = bench.walk()
        bench.answer(walk, times)
        walk.close()
    assert bench.smmu.stale() == []
    assert bench.smmu.pa(SID, IOVA) == OLD | IOVA & 0xFFF


# --- what a host may do wrong ---


def test_an_interrupt_that_looks_at_the_walk_finds_it_as_it_is():
    seen = []

    def interrupt(name):
        seen.append((name, walk.done))
        with pytest.raises(RuntimeError, match="being worked on"):
            walk.supply(None)
        with pytest.raises(RuntimeError, match="being worked on"):
            walk.close()

    bench = Bench(on_interrupt=interrupt)
    bench.smmu.write("IRQ_CTRL", 4)
    walk = bench.pending("TT", 3, holds_sync=True)
    walk.supply(bytes(8))
    assert seen == [("eventq", False)]
    assert walk.done


def test_an_interrupt_that_invalidates_does_not_restart_the_walk_that_ends():
    def interrupt(name):
        bench.overtake(TLBI, CFGI_STE)

    bench = Bench(on_interrupt=interrupt)
    bench.smmu.write("IRQ_CTRL", 4)
    walk = bench.pending("TT", 3)
    walk.supply(bytes(8))
    assert walk.done
    assert walk.result.event.name == "F_TRANSLATION"
    assert len(bench.events()) == 1


def test_an_interrupt_may_invalidate_and_sync_while_its_walk_holds_cmd_sync():
    def interrupt(name):
        bench.smmu.command(TLBI[0], **TLBI[1])
        bench.smmu.command("SYNC")
        seen.append(bench.smmu.read("CMDQ_CONS"))

    seen = []
    bench = Bench(on_interrupt=interrupt)
    bench.smmu.write("IRQ_CTRL", 4)
    walk = bench.pending("TT", 3, holds_sync=True)
    walk.supply(bytes(8))
    assert seen == [1]
    assert bench.smmu.read("CMDQ_CONS") == 2


def test_an_exception_of_an_interrupt_releases_cmd_sync_all_the_same():
    def interrupt(name):
        raise ZeroDivisionError(name)

    bench = Bench(on_interrupt=interrupt)
    bench.smmu.write("IRQ_CTRL", 4)
    walk = bench.pending("TT", 3, holds_sync=True)
    bench.smmu.command(TLBI[0], **TLBI[1])
    bench.smmu.command("SYNC")
    with pytest.raises(ZeroDivisionError):
        walk.supply(bytes(8))
    assert walk.done and bench.smmu.read("CMDQ_CONS") == 2
    assert walk.result.fault.name == "F_TRANSLATION"


def test_a_walk_that_nobody_started_is_none():
    walk = type(Bench().walk())
    empty = walk.__new__(walk)
    assert (empty.done, empty.request, empty.result) == (True, None, None)
    empty.close()
    with pytest.raises(RuntimeError, match="the walk is closed"):
        empty.supply(None)


def test_the_flag_must_be_one_that_can_be_true():
    bench = Bench()
    assert bench.walk(holds_sync=np.True_).request.kind == "STE"
    with pytest.raises(TypeError):
        bench.smmu.start_walk(SID, IOVA, False, holds_sync=True)


# --- a callback of translate() that does the same ---


class Meddler:
    """Memory of a Bench behind callbacks; one read of an address does something else as well."""

    def __init__(self, bench, caches):
        memory = Memory()
        memory.add_callback(0, 1 << 20, self.read, self.write)
        self.bench, self.at, self.what = bench, None, None
        self.smmu = Smmu(
            memory, FEATURES, strtab_base=STRTAB, strtab_base_cfg=4, cr0=0b1101,
            eventq_base=EVENTQ | 6, cmdq_base=CMDQ | 4, caches=caches)  # fmt: skip

    def read(self, address, size):
        data = self.bench.memory.read(address, size)
        if address == self.at:
            self.at = None
            self.what()
        return data

    def write(self, address, data):
        self.bench.memory.write(address, data)
        return True


@pytest.mark.parametrize("face", ["translate", "trace", "pa", "batch", "range"])
@every_caches
def test_a_translation_that_a_callback_overtakes_starts_again(face, caches):
    def meddle():
        for name, fields in moved_page(bench):
            smmu.command(name, **fields)
        smmu.sync()
        scrub(bench)

    bench = Bench()
    meddler = Meddler(bench, caches())
    smmu = meddler.smmu
    meddler.at, meddler.what = 0x31000, meddle  # the last table is known, and not yet read
    if face == "batch":
        found = int(smmu.translate_batch(SID, [IOVA])["pa"][0])
    elif face == "range":
        found = next(iter(smmu.translate_range(SID, IOVA, 4)))[1]
    elif face == "pa":
        found = smmu.pa(SID, IOVA)
    else:
        result = smmu.translate(SID, IOVA, trace=face == "trace")
        found = result.pa
    assert found == NEW | IOVA & 0xFFF
    if face == "trace":
        assert [fetch.level for fetch in result.fetches][-3:] == [1, 2, 3]
        assert len(result.fetches) in (3, 4, 5)
    assert smmu.read("EVENTQ_PROD") == 0
    assert smmu.stale() == []


def test_a_translation_that_is_overtaken_by_each_read_ends():
    def meddle():
        meddler.at = 0x31000
        for name, fields in (TLBI, CFGI_STE):
            meddler.smmu.command(name, **fields)
        meddler.smmu.sync()

    bench = Bench()
    meddler = Meddler(bench, None)
    meddler.at, meddler.what = 0x31000, meddle
    assert meddler.smmu.pa(SID, IOVA) == OLD | IOVA & 0xFFF
