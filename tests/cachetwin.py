"""The library with caches against its brute-force twin, which has none (reference.py).

Run as a program for long comparisons::

    python -P tests/cachetwin.py 10000000 --jobs 2

Over random systems (tablegen.py), with caches of random geometry, two things are compared:

- Tables that stay as they are: three Smmu, each with caches and a copy of memory of its own, take
  the same requests: one by one, in batches, and as resumable walks.  Each gives what the twin
  gives, and after every few requests the three have the same caches, down to the replacement
  state, and the same memory, event queue included.
- Tables that change: after each change and the invalidations that it requires, every translation
  is the twin's over the new tables, and stale() finds nothing.  At the end of each system one
  change goes without: then every translation is the twin's over the old tables or over the new
  ones, and where one is not the new one, stale() has told so.

The architecture leaves open what a cache answers where two contexts share a tag and differ, or
where a page of one is global and the other has it too.  Such requests are left out (lawful).
"""

import argparse
import collections
import concurrent.futures
import multiprocessing
import os
import random
import sys
import time
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # python -P leaves this folder out
    sys.path[:0] = [str(Path(__file__).resolve().parent / name) for name in ("", "support")]

import reference
import tablegen
import twin

import smmufast
from smmufast import layout
from smmufast._engine.tlb import NESTED, POLICIES

ALL = tuple(name for name in smmufast.COLUMNS if name != "why")  # the twin has no reasons
ROW = np.dtype([(name, smmufast.COLUMNS[name]) for name in ALL])
NS_EL1, EL2 = reference.NS_EL1, reference.EL2
PAGE = 0x1000
POOL = 48  # different requests of a system
CHUNKS = 8  # after each of them the caches are compared
CHUNK = 120
CHANGES = 6
ROUNDS = 2  # of requests after each change
QUEUE = 256  # commands


# ------------------------------------------------------------------------------------------------
# Systems


def make_system(seed):
    """(random.Random, a random system): of every kind in turn."""
    rng = random.Random(seed)
    kind = rng.choices(("alone", "nested", "noise", "nested noise"), (30, 55, 5, 10))[0]
    make = {
        "alone": tablegen.random_system,
        "nested": tablegen.random_nested_system,
        "noise": tablegen.random_bytes_system,
        "nested noise": tablegen.random_nested_bytes_system,
    }[kind]
    return rng, make(rng)


def random_caches(rng):
    """What makes Caches: small ones, for then entries give way; some are absent."""
    if rng.random() < 0.1:
        preset, nested = rng.choice(("small", "server")), rng.choice(NESTED)
        return lambda: getattr(smmufast.Caches, preset)(nested=nested)
    given = {"nested": rng.choice(NESTED)}
    for name in ("ste", "cd", "tlb", "walk1", "walk2"):
        if rng.random() < 0.85:
            policy = rng.choice(POLICIES)
            ways = rng.choice((1, 2, 4, 4) if policy == "plru" else (1, 2, 3, 4, 4))
            given[name] = (rng.choice((1, 2, 4, 8)), ways, policy, rng.getrandbits(32))
    if rng.random() < 0.3:
        given["tlb"] = (8, 4)
    return lambda: smmufast.Caches(**given)


def add_queue(rng, system, name, entry_lg2, log2size):
    """Give a system memory for a queue; the value of its BASE register, or None."""
    bits = min(reference.address_size_bits(system.features.oas, system.features.arch_minor), 40)
    size = max(PAGE, 1 << entry_lg2 + log2size)
    for _ in range(20):
        base = rng.randrange((1 << bits) // size) * size
        if system.memory.free(base, size):
            system.memory.add(base, size)
            setattr(system.regs, name, base | log2size)
            return base
    return None


# ------------------------------------------------------------------------------------------------
# What a request means, by the twin


class Overlay:
    """Memory whose writes are forgotten."""

    def __init__(self, read):
        self._read = read
        self._words = {}

    def read(self, address, size):
        """Bytes, with what was written here."""
        data = self._read(address, size)
        if data is None or not self._words:
            return data
        return b"".join(
            self._words.get(address + offset, data[offset : offset + 8])
            for offset in range(0, size, 8)
        )

    def write(self, address, data):
        """Store one descriptor."""
        self._words[address] = data


@dataclass(slots=True)
class Meaning:
    """What the twin finds for one request, and what caches may keep of it."""

    outcome: object
    fetches: list
    world: int | None = None
    cd: int | None = None
    vmid: int = 0
    stream: object = None
    stage2: object = None
    page: object = None  # the leaf of stage 1
    region: object = None
    va: int = 0  # canonical
    walks: tuple = ()  # of stage 2: (ipa, first fetch, fetch after the last, class)

    @property
    def asid(self):
        """The ASID that tags stage 1, 0 in worlds without."""
        return self.stream.context.asid if self.world is not None else 0

    @property
    def regime(self):
        """What ASIDs are of; None without a stage 1."""
        if self.world is None:
            return None
        return self.world, self.vmid if self.world == NS_EL1 else 0

    @property
    def second(self):
        """All of stage 2 that a cache may keep, without how it faults."""
        if self.stage2 is None:
            return None
        return astuple(replace(self.stage2, record=0, stall=0, device_reads_fault=0))

    def claims(self):
        """What tags stand for: (tag, configuration)."""
        if self.stage2 is not None:
            yield ("stage 2", self.vmid), self.second
        if self.world is not None:
            yield ("stage 1", *self.regime, self.asid), (self.cd, self.second)

    def reach(self):
        """(first, last) address of the stage-1 page."""
        mask = (1 << self.page.shift) - 1
        return self.va & ~mask, self.va | mask

    @property
    def sharers(self):
        """What shares global pages: the regime, of one ASID set."""
        return self.regime, self.cd is not None and reference.bits(self.cd, 47, 47)

    def is_global(self):
        """Whether the stage-1 page answers every ASID."""
        return self.page is not None and not reference.bits(self.page.descriptor, 11, 11)

    def updates(self):
        """(address, kind of the descriptor) of each hardware update."""
        return [(f[2], f[0].removesuffix(" update")) for f in self.fetches if len(f) > 5]

    def keeper(self, kind):
        """The configuration that a descriptor is read with."""
        return self.second if kind == "S2TT" else (self.cd, self.second)


@contextmanager
def watched(meaning):
    """Let the twin tell what it finds on the way."""
    names = ("configure", "decode_cd", "decode_stage2", "stage1_access", "stage2_walk")
    old = {name: getattr(reference, name) for name in names}

    def configure(*args):
        meaning.stream = old["configure"](*args)
        meaning.vmid = meaning.stream.vmid
        return meaning.stream

    def decode_cd(features, world, cd, *more):
        context = old["decode_cd"](features, world, cd, *more)
        meaning.world, meaning.cd = world, cd
        return context

    def decode_stage2(features, ste):
        meaning.stage2 = old["decode_stage2"](features, ste)
        meaning.vmid = reference.bits(ste, 143, 128)
        return meaning.stage2

    def stage1_access(fetch, stream, iova, *access):
        context = stream.context
        upper = context.two_ttbs and reference.bits(iova, 55, 55)
        region = meaning.region = context.regions[1 if upper else 0]
        mask = (1 << region.input_bits) - 1
        meaning.va = iova & mask | (tablegen.ALL_ONES & ~mask if upper else 0)
        found = old["stage1_access"](fetch, stream, iova, *access)
        meaning.page = found[0]
        return found

    def stage2_walk(fetch, stage2, ipa, event_class):
        first = len(fetch.fetches)
        try:
            return old["stage2_walk"](fetch, stage2, ipa, event_class)
        finally:
            meaning.walks += ((ipa, first, len(fetch.fetches), event_class),)

    mine = locals()
    for name in names:
        setattr(reference, name, mine[name])
    try:
        yield
    finally:
        for name in names:
            setattr(reference, name, old[name])


def meaning_of(system, request):
    """The Meaning of one request in a system as it is; memory is not changed."""
    meaning = Meaning(None, [])
    overlay = Overlay(system.read)
    with watched(meaning):
        meaning.outcome = reference.translate(
            overlay.read, system.features, system.regs, store=overlay.write, **request._asdict()
        )
    meaning.fetches = meaning.outcome.fetches
    return meaning


def overlaps(fetch, address, size=8):
    """Whether a fetch reads any of some bytes."""
    return fetch[2] < address + size and address < fetch[2] + fetch[3]


def lawful(meanings, before=None, pool=()):
    """Requests that have one answer, with or without caches.

    meanings: dict of Meaning by request.  before: the same before a change; pool: what was lawful
    then.  What tags stood for then, they still do.
    """
    claims, globals_, left = {}, collections.defaultdict(set), []
    changed = {
        request
        for request, meaning in meanings.items()
        if before is not None and list(meaning.claims()) != list(before[request].claims())
    }
    pool = set(pool)
    for request in sorted(meanings, key=lambda one: (one in changed, one not in pool)):
        meaning = meanings[request]
        if all(claims.setdefault(tag, config) == config for tag, config in meaning.claims()):
            left.append(request)
            if meaning.is_global():
                globals_[meaning.sharers].add((meaning.asid, *meaning.reach()))
    updates = {}
    for request in left:
        for address, kind in meanings[request].updates():
            updates.setdefault((address, kind, meanings[request].keeper(kind)), request)
    by_page = collections.defaultdict(list)
    for request in meanings:
        for fetch in meanings[request].fetches:
            by_page[fetch[2] >> 12].append((request, fetch))
    unlawful = set()
    for address, kind, keeper in updates:
        # a descriptor that is something else to others
        for request, fetch in by_page[address >> 12]:
            meaning = meanings[request]
            other = fetch[0].removesuffix(" update")
            if overlaps(fetch, address) and (other != kind or meaning.keeper(kind) != keeper):
                unlawful.add((address, kind, keeper))
    for request in left:
        meaning = meanings[request]
        if any((a, kind, meaning.keeper(kind)) in unlawful for a, kind in meaning.updates()):
            continue
        if any(
            asid != meaning.asid and first <= meaning.va <= last
            for asid, first, last in globals_[meaning.sharers]
        ):
            continue
        yield request


def said_row(outcome):
    """An Outcome as a row of ALL columns."""
    row = twin.expected_row(outcome)
    return (*row[:7], *(row[7] or (0, 0)), *row[8:])


class Twin:
    """The twin over memory of its own; what it said once it remembers until memory changes."""

    def __init__(self, system):
        self.system = system
        self.changes = 0
        self._forget()

    def _forget(self):
        self._said = {}
        self._cache = reference.ContextCache()
        self.changes += 1

    def _store(self, address, data):
        self.system.memory.write(address, data)
        self._said = {}
        self.changes += 1

    def write(self, address, data):
        """What software writes."""
        self.system.memory.write(address, data)
        self._forget()

    def __call__(self, request):
        """(row of ALL columns, what is in no column, fetches)."""
        said = self._said.get(request)
        if said is None:
            outcome = reference.translate(
                self.system.read, self.system.features, self.system.regs, cache=self._cache,
                store=self._store, **request._asdict(),
            )  # fmt: skip
            said = said_row(outcome), twin.extra_row(outcome), outcome.fetches
            self._said[request] = said
        return said


# ------------------------------------------------------------------------------------------------
# The library's faces, in the same form


def arguments(request):
    """(sid, iova, keywords) for translate."""
    call = request._asdict()
    return call.pop("sid"), call.pop("iova"), call


def result_row(result):
    """A Result as the row of a Twin."""
    row = twin.result_row(result)
    return (*row[:7], *(row[7] or (0, 0)), *row[8:])


def check_result(result, said, face):
    """A Result, with what is in no column."""
    row, extra, _ = said
    twin.same(result_row(result), row, face)
    twin.same(twin.extra_result_row(result), extra, face)


def check_fetches(fetches, said, face):
    """Through caches no fetch is made that would not be made without."""
    wanted = collections.Counter((fetch[0], fetch[2]) for fetch in said[2])
    made = collections.Counter((fetch.kind, fetch.address) for fetch in fetches)
    assert made <= wanted, f"{face}: fetches {made - wanted} too many"


def call_once(rng, smmu, request, said):
    """One request by one of the faces that take one; `said`: by the Twin, or None."""
    sid, iova, call = arguments(request)
    face = rng.choices(("translate", "trace", "pa", "range"), (60, 15, 10, 15))[0]
    if face == "pa":
        try:
            pa = smmu.pa(sid, iova, **call)
        except smmufast.Fault as error:
            result = error.result
        else:
            assert said is None or (pa == said[0][0] and said[0][1] <= 2), f"pa: {pa:#x}"
            return
    elif face == "range":
        segments = smmu.translate_range(sid, iova, 1, **call)
        if segments:
            [(_, pa, _)] = segments
            assert said is None or (pa == said[0][0] and said[0][1] <= 2), f"range: {pa:#x}"
            return
        result = segments.result
    else:
        result = smmu.translate(sid, iova, trace=face == "trace", **call)
    if said is not None:
        check_result(result, said, face)
        if face == "trace":
            check_fetches(result.fetches, said, face)


def expected_rows(said):
    """Rows of a batch, as an array."""
    return np.array([row for row, _, _ in said], ROW)


def without_stags(records):
    """Records, with 0 for the STAG of stalls: it depends on the stalls before."""
    data = records.copy().view(np.uint8).reshape(-1, 32)
    data[(data[:, 11] & 0x80) != 0, 8:10] = 0
    return data


def check_columns(found, wanted, requests, face):
    """Columns of a batch against those of the twin's rows."""
    for name in found.dtype.names:
        ours, theirs = found[name], wanted[name]
        if name == "record":
            ours, theirs = without_stags(ours), without_stags(theirs)
            equal = (ours == theirs).all(axis=1)
        else:
            equal = ours == theirs
        if not equal.all():
            i = int(np.flatnonzero(~equal)[0])
            raise AssertionError(
                f"{face}: {requests[i]}: {name} is {ours[i]}, not {theirs[i]}: {wanted[i]}"
            )


def columns_for(rng):
    """Columns of a batch: those by default half of the time, for they have a loop of their own."""
    pick = rng.random()
    if pick < 0.5:
        return rng.choice((("pa",), ("pa", "action", "event"), ("event", "pa")))
    return ALL if pick < 0.8 else tuple(rng.sample(ALL, rng.randint(1, len(ALL))))


def batches_of(rng, requests):
    """The requests in batches, in order: mixed ones, and some of one pair and access."""
    start = 0
    while start < len(requests):
        end = start + rng.choice((1, 2, 10, 50, 200))
        if rng.random() < 0.4:
            same = twin.by_pair(requests[start])
            end = start + 1
            while end < len(requests) and twin.by_pair(requests[end]) == same:
                end += 1
        yield start, requests[start:end]
        start += len(requests[start:end])


def call_batch(rng, smmu, requests, columns):
    """One batch; of a single pair and access scalars, sometimes."""
    pairs = {twin.by_pair(request) for request in requests}
    if len(pairs) > 1 or rng.random() < 0.3:
        return twin.batch(smmu, requests, columns=columns)
    iova = np.array([request.iova for request in requests], np.uint64)
    sid, _, call = arguments(requests[0])
    return smmu.translate_batch(sid, iova, columns=columns, **call)


def draw(rng, pool, count):
    """Requests from a pool, most of them repeated soon, some in runs of one pair."""
    near = rng.sample(pool, min(len(pool), rng.randint(3, 12)))
    drawn = [rng.choice(near if rng.random() < 0.7 else pool) for _ in range(count)]
    if rng.random() < 0.3:
        drawn.sort(key=twin.by_pair)
    return drawn


# ------------------------------------------------------------------------------------------------
# Tables that stay


class Side:
    """A Smmu with caches over a copy of a system's memory."""

    def __init__(self, system, caches):
        self.system = system.with_memory(system.memory.copy())
        self.smmu = twin.smmu_of(self.system)
        assert self.smmu.caches is None
        memory = self.smmu.memory
        registers = vars(system.regs)
        self.smmu = smmufast.Smmu(memory, self.smmu.features, caches=caches, **registers)

    @property
    def caches(self):
        """Its Caches."""
        return self.smmu.caches

    def drain(self):
        """Read every event, as software does."""
        self.smmu.write("EVENTQ_CONS", self.smmu.read("EVENTQ_PROD"))


def counted(caches):
    """(hits, look-ups) of all caches."""
    counters = caches.counters.values()
    hits = sum(one["hits"] for one in counters)
    return hits, hits + sum(one["misses"] for one in counters)


def prepare(seed, small_queue=True):
    """(rng, system, its requests, size of its event queue)."""
    rng, system = make_system(seed)
    queue = rng.choices(("none", "small", "large"), (30, 30 if small_queue else 0, 40))[0]
    if queue != "none":
        add_queue(rng, system, "eventq_base", 5, 3 if queue == "small" else 11)
    if rng.random() < 0.5:
        add_queue(rng, system, "cmdq_base", 4, QUEUE.bit_length() - 1)
        system.regs.cr0 |= 8  # CMDQEN
    requests = list(dict.fromkeys(system.requests(POOL)))
    return rng, system, requests, queue


def step_by_step(smmu, request, size):
    """What translate_range does, by translate alone: the last Result."""
    sid, iova, call = arguments(request)
    rest = size
    segments = []
    while rest:
        result = smmu.translate(sid, iova, **call)
        if not result:
            return segments, result
        if result.page_lg2:
            length = min(rest, result.page_size - (iova & result.page_size - 1))
        else:
            length = min(rest, (1 << smmu.features.oas_bits) - iova)
        segments.append((iova, result.pa, length))
        iova += length
        rest -= length
    return segments, None


def joined(segments):
    """Every byte's address, as runs that do not touch."""
    runs = []
    for iova, pa, length in segments:
        if runs and runs[-1][0] + runs[-1][2] == iova and runs[-1][1] + runs[-1][2] == pa:
            runs[-1][2] += length
        else:
            runs.append([iova, pa, length])
    return runs


def check_burst(rng, sides, request):
    """A burst over several pages, by every side in its own way."""
    one, batched, walked = (side.smmu for side in sides)
    size = rng.choice((PAGE, 3 * PAGE, 0x10_0000)) - (request.iova & 0xFFF)
    size = max(1, min(size, (1 << 64) - request.iova))
    segments, last = step_by_step(one, request, size)
    sid, iova, call = arguments(request)
    for smmu in (batched, walked):
        burst = smmu.translate_range(sid, iova, size, **call)
        twin.same(joined(burst), joined(segments), "range")
        ours, theirs = (None if r is None else result_row(r) for r in (burst.result, last))
        twin.same(ours, theirs, "end of the range")


def check_sides(sides, where):
    """Everything that is left behind is the same."""
    first = sides[0]
    for side, name in zip(sides[1:], ("batches", "walks"), strict=True):
        if side.caches.__getstate__() != first.caches.__getstate__():
            twin.same(side.caches.counters, first.caches.counters, f"{where}: counters of {name}")
            for ours, theirs in zip(
                (side.caches.ste, side.caches.cd, side.caches.tlb, side.caches.walk1,
                 side.caches.walk2),
                (first.caches.ste, first.caches.cd, first.caches.tlb, first.caches.walk1,
                 first.caches.walk2), strict=True,
            ):  # fmt: skip
                if ours is not None:
                    twin.same(list(ours), list(theirs), f"{where}: {ours.name} of {name}")
            raise AssertionError(f"{where}: the replacement state of {name} differs")
        assert side.system.regions() == first.system.regions(), f"{where}: memory of {name}"
        for register in ("EVENTQ_PROD", "GERROR"):
            ours, theirs = side.smmu.read(register), first.smmu.read(register)
            twin.same(ours, theirs, f"{where}: {register} of {name}")
        ours, theirs = (
            [(s.sid, s.ssid, s.iova, s.stag) for s in a.smmu.stalls] for a in (side, first)
        )
        twin.same(ours, theirs, f"{where}: stalls of {name}")


def check_same(seed):
    """Tables that stay: (requests made, hits, look-ups)."""
    rng, system, requests, queue = prepare(seed)
    meanings = {request: meaning_of(system, request) for request in requests}
    pool = list(lawful(meanings))
    if not pool:
        return 0, 0, 0
    geometry = random_caches(rng)
    sides = [Side(system, geometry()) for _ in range(3)]
    one, batched, walked = sides
    spoken = Twin(system)
    made = 0
    # bursts leave the requests of the pool: the twin's memory is not updated for these, and
    # another context may be near
    regimes = collections.defaultdict(set)
    for meaning in meanings.values():
        regimes[meaning.regime].add(meaning.asid)
    bursts = [
        request
        for request in pool
        if not system.features.httu and len(regimes[meanings[request].regime]) == 1
    ]
    # records beyond the queue's end are not in results
    columns = ROW.names if queue != "small" else tuple(set(ALL) - {"event", "record"})
    for number in range(CHUNKS):
        where = f"chunk {number}"
        chunk = draw(rng, pool, rng.randint(1, CHUNK))
        said = []
        for request in chunk:
            said.append(spoken(request))
            told = said[-1] if queue != "small" else None
            try:
                call_once(rng, one.smmu, request, told)
                result = twin.host_walk(walked.smmu, walked.system.memory, *arguments(request)[:2],
                                        **arguments(request)[2])  # fmt: skip
                if told:
                    check_result(result, told, "walk")
                    check_fetches(result.fetches, told, "walk")
            except AssertionError as error:
                raise AssertionError(f"{where}: {request}: {error}") from error
        wanted = expected_rows(said)
        for start, part in batches_of(rng, chunk):
            found = call_batch(rng, batched.smmu, part, columns_for(rng))
            names = [name for name in found.dtype.names if name in columns]
            rows = wanted[start : start + len(part)]
            if names:
                check_columns(found[names], rows, part, f"{where}: batch")
        made += 3 * len(chunk)
        for request in rng.sample(bursts, min(3, len(bursts))):
            check_burst(rng, sides, request)
        check_sides(sides, where)
        if rng.random() < 0.5:
            for side in sides:
                side.drain()
    for side in sides:
        assert side.smmu.stale() == [], f"stale: {side.smmu.stale()}"
    hits, looked = counted(one.caches)
    return made, hits, looked


# ------------------------------------------------------------------------------------------------
# Tables that change


TABLES = {"TT", "S2TT"}
TG = {12: 1, 14: 2, 16: 3}


def order_of(meaning, kind):
    """The byte order of descriptors."""
    return meaning.stage2.byteorder if kind == "S2TT" else meaning.stream.context.byteorder


def region_of(meaning, kind):
    """The Region whose tables they are."""
    return meaning.stage2.region if kind == "S2TT" else meaning.region


def shift_at(region, level):
    """log2 of what a descriptor of a level covers."""
    return region.granule_lg2 + (3 - level) * (region.granule_lg2 - 3)


def is_table(meaning, fetch):
    """Whether a fetched descriptor was that of a table."""
    descriptor = int.from_bytes(fetch[4], order_of(meaning, fetch[0]))
    return fetch[1] < 3 and descriptor & 3 == 3


def split_block(meaning, fetch, spare):
    """[(address, data)] that put a table of smaller leaves in place of a block, or None."""
    kind, level, address, _, data = fetch[:5]
    region, order = region_of(meaning, kind), order_of(meaning, kind)
    descriptor = int.from_bytes(data, order)
    if level == 3 or descriptor & 3 != 1 or (kind == "TT" and meaning.stage2 is not None):
        return None
    granule_lg2, per_level = region.granule_lg2, region.granule_lg2 - 3
    inside = (1 << shift_at(region, level)) - (1 << granule_lg2)
    child = shift_at(region, level + 1)
    table = b"".join(
        (descriptor & ~inside | i << child | (2 if level == 2 else 0)).to_bytes(8, order)
        for i in range(1 << per_level)
    )
    at = spare.pop()
    pointer = tablegen.table_descriptor(granule_lg2, at, ds=region.ds)
    return [(at, table), (address, pointer.to_bytes(8, order))]


def changed_descriptor(rng, meaning, fetch, others):
    """Another descriptor in place of one: its number."""
    kind, level, _, _, data = fetch[:5]
    descriptor = int.from_bytes(data, order_of(meaning, kind))
    if is_table(meaning, fetch) and rng.random() < 0.7:
        return rng.choice((0, descriptor ^ 1, descriptor ^ 1 << rng.choice((59, 60, 61, 62)),
                           *others))  # fmt: skip
    shift = shift_at(region_of(meaning, kind), level)
    return rng.choice((
        0,
        descriptor ^ 1,
        descriptor ^ 1 << rng.choice((6, 7)),
        descriptor ^ 1 << rng.choice((53, 54)),
        descriptor ^ 1 << rng.randrange(shift, max(shift + 1, 40)),
        descriptor ^ 1 << rng.choice((2, 3, 4, 5, 8, 9, 10, 11, 51, 52)),
        descriptor ^ 1 << rng.choice((6, 7, 10, 11)),
        *others,
    ))  # fmt: skip


def random_change(rng, meanings, spare):
    """(the fetch that will read something else, [(address, data)]), or None."""
    meaning = meanings[rng.choice(list(meanings))]
    fetches = [fetch for fetch in meaning.fetches if len(fetch) == 5 and fetch[4] is not None]
    if not fetches:
        return None
    fetch = rng.choice(fetches if rng.random() < 0.5 else fetches[-3:])
    kind, _, address, size, data = fetch
    others = [
        other[4] for m in meanings.values() for other in m.fetches
        if len(other) == 5 and other[:2] == fetch[:2] and other[4] not in (data, None)
    ]  # fmt: skip
    if kind in TABLES:
        if spare and rng.random() < 0.3:
            writes = split_block(meaning, fetch, spare)
            if writes:
                return fetch, writes
        order = order_of(meaning, kind)
        numbers = [int.from_bytes(other, order) for other in others[:2]]
        new = changed_descriptor(rng, meaning, fetch, numbers).to_bytes(8, order)
    elif others and rng.random() < 0.5:
        new = rng.choice(others)
    else:
        word = bytearray(data)
        word[rng.randrange(min(size, 32))] ^= 1 << rng.randrange(8)
        new = bytes(word)
    return (fetch, [(address, new)]) if new != data else None


# What a change requires (3.21.3, 4.3, 4.4).  Each of these gives commands, as (name, fields).


def of_tags(rng, meaning):
    """After a change of configuration: everything with the tags that it had."""
    if meaning.stage2 is not None:
        yield rng.choice((
            ("TLBI_S12_VMALL", {"VMID": meaning.vmid}), ("TLBI_NSNH_ALL", {})
        ))  # fmt: skip
    elif meaning.world == NS_EL1:
        yield rng.choice((("TLBI_NH_ALL", {"VMID": meaning.vmid}), ("TLBI_NSNH_ALL", {})))
    elif meaning.world is not None:
        yield "TLBI_EL2_ALL", {}


def range_fields(rng, region, leaf):
    """Fields of a command by address that make it a range, or none; and log2 of its alignment.

    leaf: the level of the leaf, None if that is not known.
    """
    if rng.random() < 0.5:
        return {}, 12
    granule_lg2 = region.granule_lg2
    level = leaf if leaf and rng.random() < 0.5 else 0
    if level == 1 and granule_lg2 == 14:
        level = 0
    num, scale = rng.randrange(4), rng.randrange(4)
    if not level and not num:
        scale += 1
    alignment = shift_at(region, level) if level else granule_lg2
    return {"TG": TG[granule_lg2], "NUM": num, "SCALE": scale, "TTL": level}, alignment


def of_stage1(rng, meaning, leaf):
    """After a change of a stage-1 descriptor on the walk of an address."""
    guest = meaning.world == NS_EL1
    prefix = "TLBI_NH_" if guest else "TLBI_EL2_"
    tags = {"VMID": meaning.vmid} if guest else {}
    pick = rng.random()
    if pick < 0.1:
        yield prefix + "ALL", tags
    elif pick < 0.15 and guest:
        yield "TLBI_NSNH_ALL", {}
    elif pick < 0.35 and meaning.world != EL2 and not meaning.is_global():
        yield prefix + "ASID", tags | {"ASID": meaning.asid}
    else:
        if pick < 0.75:
            tags["ASID"] = meaning.asid
        page = meaning.page
        span, alignment = range_fields(rng, meaning.region, page and page.level)
        address = {"Address": meaning.va >> alignment << alignment, "Leaf": int(leaf)}
        yield prefix + ("VA" if "ASID" in tags else "VAA"), tags | span | address


def commands_of(rng, system, request, meaning, address, size):
    """What the change of some bytes requires for one request, as far as these are on its way."""
    sid = {"StreamID": request.sid}
    cd = sid | {"SubstreamID": request.ssid or 0}
    for i, fetch in enumerate(meaning.fetches):
        if len(fetch) > 5 or fetch[4] is None or not overlaps(fetch, address, size):
            continue
        kind = fetch[0]
        if kind in ("L1STD", "STE"):
            yield rng.choice((
                ("CFGI_STE", sid | {"Leaf": int(kind == "STE")}),
                ("CFGI_STE_RANGE", sid | {"Range": rng.randrange(31)}), ("CFGI_ALL", {}),
            ))  # fmt: skip
            yield from of_tags(rng, meaning)
        elif kind in ("L1CD", "CD"):
            yield rng.choice((
                ("CFGI_CD", cd | {"Leaf": int(kind == "CD")}), ("CFGI_CD_ALL", sid)
            ))  # fmt: skip
            yield from of_tags(rng, meaning)
        elif kind == "TT":
            yield from of_stage1(rng, meaning, not is_table(meaning, fetch))
        else:
            [(ipa, cls)] = {(ipa, c) for ipa, a, b, c in meaning.walks if a <= i < b}
            if cls == reference.CLASS_CD and system.features.s1p:
                yield "CFGI_CD", cd
            yield from of_stage2(rng, system, meaning, ipa, not is_table(meaning, fetch))


def of_stage2(rng, system, meaning, ipa, leaf):
    """After a change of a stage-2 descriptor on the walk of an IPA."""
    vmid = {"VMID": meaning.vmid}
    pick = rng.random()
    if pick < 0.15:
        yield "TLBI_S12_VMALL", vmid
    elif pick < 0.3:
        yield "TLBI_NSNH_ALL", {}
    else:
        span, alignment = range_fields(rng, meaning.stage2.region, None)
        address = {"IPA": ipa >> alignment << alignment, "Leaf": int(leaf)}
        yield "TLBI_S2_IPA", vmid | span | address
        if system.features.s1p:  # combined entries do not go by IPA
            yield "TLBI_NH_ALL", vmid


def issue(rng, smmu, commands):
    """Let the SMMU have commands: one by one, or many in its queue at once."""
    commands = list(commands)
    while commands:
        n = 1 if rng.random() < 0.5 or not smmu.cmdq_base else rng.randint(1, 100)
        part, commands = commands[:n], commands[n:]
        if n == 1:
            [(name, fields)] = part
            smmu.command(name, **fields)
            continue
        base, prod = smmu.cmdq_base & ~0x1F & (1 << 52) - 1, smmu.read("CMDQ_PROD")
        for name, fields in (*part, ("SYNC", {})):
            record = layout.command_record(name)
            data = layout.to_bytes(record, layout.pack(record, **fields))
            smmu.memory.write(base + 16 * (prod % QUEUE), data)
            prod = (prod + 1) % (2 * QUEUE)
        smmu.write("CMDQ_PROD", prod)
    assert smmu.read("CMDQ_CONS") == smmu.read("CMDQ_PROD"), "the queue stopped"


class Changing:
    """A system whose tables change: the library with caches, and the twin."""

    def __init__(self, seed):
        self.rng, self.system, requests, _ = prepare(seed, small_queue=False)
        registers = vars(self.system.regs)
        self.queues = {registers.get(name, 0) & -PAGE for name in ("eventq_base", "cmdq_base")}
        self.spare = add_spare(self.rng, self.system)
        self.side = Side(self.system, random_caches(self.rng)())
        self.smmu = self.side.smmu
        self.twin = Twin(self.system)
        self.looked = 0
        self.meanings = {request: None for request in requests}
        self.look()
        self.pool = list(lawful(self.meanings))
        self.made = 0

    def look(self):
        """What every request means now; what it meant at the last look."""
        before = self.meanings
        if self.looked != self.twin.changes:
            self.looked = self.twin.changes
            self.meanings = {request: meaning_of(self.system, request) for request in before}
        return before

    def translate(self):
        """Translate some of the pool, and compare."""
        rng = self.rng
        requests = draw(rng, self.pool, rng.randint(1, CHUNK)) if self.pool else []
        self.made += len(requests)
        for _, part in batches_of(rng, requests):
            if rng.random() < 0.5:
                for request in part:
                    try:
                        call_once(rng, self.smmu, request, self.twin(request))
                    except AssertionError as error:
                        raise AssertionError(f"{request}: {error}") from error
                continue
            rows = expected_rows([self.twin(request) for request in part])
            found = call_batch(rng, self.smmu, part, columns_for(rng))
            check_columns(found, rows, part, "batch")
        self.check_stale()
        pairs = zip(self.system.regions(), self.side.system.regions(), strict=True)
        for (base, theirs), (_, ours) in pairs:
            assert ours == theirs or base in self.queues, f"memory at {base:#x} differs"
        self.side.drain()

    def check_stale(self):
        """Nothing is left that the tables do not give."""
        stale = self.smmu.stale()
        assert not stale, f"stale: {stale}"

    def change(self):
        """Change the tables at random: (address, size) of what was changed, or None."""
        self.look()
        for _ in range(10):
            change = random_change(self.rng, self.meanings, self.spare)
            if change:
                break
        else:
            return None
        _, writes = change
        for address, data in writes:
            self.twin.write(address, data)
            self.side.system.memory.write(address, data)
        address, data = writes[-1]
        return address, len(data)

    def required(self, before, address, size):
        """The commands that a change requires."""
        commands = []
        for request, meaning in before.items():
            if meaning.fetches:
                commands += commands_of(self.rng, self.system, request, meaning, address, size)
        unique = {(name, tuple(fields.items())): (name, fields) for name, fields in commands}
        commands = list(unique.values())
        self.rng.shuffle(commands)
        return commands


def add_spare(rng, system):
    """Give a system room for new tables: their addresses."""
    bits = min(reference.address_size_bits(system.features.oas, system.features.arch_minor), 40)
    size = 0x4_0000
    for _ in range(20):
        base = rng.randrange((1 << bits) // size) * size
        if system.memory.free(base, size):
            system.memory.add(base, size)
            return list(range(base, base + size, 0x1_0000))
    return []


def check_changes(seed, without=()):
    """Tables that change: (requests made, changes, commands, translations by old tables).

    without: names of commands that are not issued, to see that the comparison misses them.
    """
    changing = Changing(seed)
    changes = issued = 0
    if not changing.pool:
        return 0, 0, 0, 0
    changing.translate()
    for number in range(CHANGES):
        try:
            changed = changing.change()
            if changed is None:
                break
            changes += 1
            before = changing.look()
            commands = [
                command
                for command in changing.required(before, *changed)
                if command[0] not in without
            ]
            issued += len(commands)
            issue(changing.rng, changing.smmu, commands)
            changing.check_stale()
            changing.pool = list(lawful(changing.meanings, before, changing.pool))
            for _ in range(ROUNDS):
                changing.translate()
        except AssertionError as error:
            raise AssertionError(f"change {number}: {error}") from error
    return changing.made, changes, issued, check_left_out(changing)


def read_once(meaning, address, size):
    """Whether some bytes are fetched as one descriptor, or not at all."""
    kinds = [fetch[0] for fetch in meaning.fetches if overlaps(fetch, address, size)]
    return len(kinds) <= 1 and set(kinds) <= TABLES


def check_left_out(changing):
    """A change without invalidation: how many translations are still by the old tables.

    Each is that of the old tables or of the new ones, and stale() has told that not all are new.
    """
    changed = changing.change()
    if changed is None:
        return 0
    before = changing.look()
    after = changing.meanings
    known = changing.pool
    pool = [request for request in lawful(after, before, known) if request in known]
    stale = changing.smmu.stale()
    old = 0
    for request in draw(changing.rng, pool, CHUNK) if pool else []:
        sid, iova, call = arguments(request)
        found = result_row(changing.smmu.translate(sid, iova, **call))
        if found == changing.twin(request)[0]:
            continue
        old += 1
        assert stale, f"{request}: {found} through caches, and stale() is empty"
        # what is read twice may be old in one place and new in the other
        if all(read_once(one[request], *changed) for one in (before, after)):
            row = said_row(before[request].outcome)
            twin.same(found, row, f"{request}: neither by new tables nor by old ones")
    return old


# ------------------------------------------------------------------------------------------------
# Runs


def check_seeds(first, last):
    """Compare the systems of a range of seeds: [requests, hits, look-ups, by old tables]."""
    made = hits = looked = old = 0
    for seed in range(first, last):
        try:
            same = check_same(seed)
            changed = check_changes(seed)
        except BaseException as error:
            error.add_note(f"cachetwin: seed {seed}")
            raise
        made += same[0] + changed[0]
        hits += same[1]
        looked += same[2]
        old += changed[3]
    return np.array((made, hits, looked, old))


def run(count, jobs, seed=0, progress=None):
    """Compare at least `count` requests in `jobs` processes: as check_seeds."""
    total = np.zeros(4, int)
    step, waiting = 10, set()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        while waiting or total[0] < count:
            while total[0] < count and len(waiting) < 2 * jobs:
                waiting.add(pool.submit(check_seeds, seed, seed + step))
                seed += step
            ready, waiting = concurrent.futures.wait(
                waiting, return_when=concurrent.futures.FIRST_COMPLETED
            )
            total += sum(future.result() for future in ready)
            if progress:
                progress(total[0])
    return total


def main():
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, help="requests to compare")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    options = parser.parse_args()
    start = time.time()

    def progress(done):
        rate = done / (time.time() - start)
        print(f"\r{done:,} of {options.count:,}, {rate:,.0f} a second", end="", file=sys.stderr)

    made, hits, looked, old = run(options.count, options.jobs, options.seed, progress)
    print(
        f"\n{made:,} requests agree; {hits / looked:.0%} of look-ups hit; without invalidation "
        f"{old:,} were by old tables, and stale() told so",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
