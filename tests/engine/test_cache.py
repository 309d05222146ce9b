"""The set-associative structure: contents, order of replacement and counters against a model."""

import random

import numpy as np
import pytest
from cachemodel import Generator, Sets

from smmufast._engine.tlb import POLICIES, Caches, Geometry, SteEntry

GEOMETRIES = [(1, 1), (1, 2), (1, 3), (1, 8), (1, 21), (2, 2), (4, 4), (8, 1), (2, 8), (4, 5),
              (2, 16), (1, 64), (1, 67), (16, 4), (2, 130), (4, 17)]  # fmt: skip
CASES = [
    (sets, ways, policy)
    for sets, ways in GEOMETRIES
    for policy in POLICIES
    if policy != "plru" or ways in (1, 2, 4, 8, 16, 32, 64)
]


def record(n):
    """64 bytes that tell which one it is."""
    return n.to_bytes(64, "little")


def compare(caches, model):
    assert [entry.data for entry in caches.ste] == model.live()
    assert caches.counters["ste"] == model.counters
    assert len(caches.ste) == len(model.live())


@pytest.mark.parametrize(("sets", "ways", "policy"), CASES)
@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_contents_order_of_replacement_and_counters_are_the_models(sets, ways, policy, seed):
    choose = random.Random(f"{sets} {ways} {policy} {seed}")
    caches = Caches(ste=Geometry(sets, ways, policy, seed))
    model = Sets(sets, ways, policy, seed)
    span = 2 * sets * ways + 1
    evicted = 0
    for step in range(1500):
        sid = choose.randrange(span)
        what = choose.random()
        if what < 0.5:
            assert caches.lookup_ste(sid) == model.lookup(sid % sets, sid)
        elif what < 0.93:
            caches.fill_ste(sid, record(step))
            model.fill(sid % sets, sid, record(step))
        elif what < 0.99:
            way = model.find(sid % sets, sid)
            assert caches.cfgi("CFGI_STE", sid=sid) == (way is not None)
            if way is not None:
                model.drop(sid % sets, way, "invalidations")
        elif what < 0.995:
            caches.reset_counters()
            evicted += model.counters["evictions"]
            model.counters = dict.fromkeys(model.counters, 0)
        else:
            caches = caches.copy()
        if step % 16 == 0:
            compare(caches, model)
    compare(caches, model)
    assert evicted + model.counters["evictions"] > 10


@pytest.mark.parametrize("ways", [2, 4, 5, 8, 33])
def test_lru_evicts_what_was_used_longest_ago(ways):
    caches = Caches(ste=(1, ways))
    for sid in range(ways):
        caches.fill_ste(sid, record(sid))
    uses = list(range(ways))
    random.Random(ways).shuffle(uses)
    for sid in uses:
        assert caches.lookup_ste(sid) == record(sid)
    for i, sid in enumerate(uses):
        caches.fill_ste(1000 + i, record(0))
        live = {entry.sid for entry in caches.ste}
        assert sid not in live
        assert live >= set(uses[i + 1 :])


@pytest.mark.parametrize("ways", [2, 3, 4])
def test_fifo_evicts_what_was_filled_longest_ago(ways):
    caches = Caches(ste=(1, ways, "fifo"))
    for sid in range(ways):
        caches.fill_ste(sid, record(sid))
    assert caches.lookup_ste(0)
    caches.fill_ste(1, record(99))  # again: it is the youngest now
    caches.fill_ste(100, record(0))
    assert 0 not in {entry.sid for entry in caches.ste}
    order = [*range(2, ways), 1, 100]
    for i, sid in enumerate(order):
        caches.fill_ste(200 + i, record(0))
        assert sid not in {entry.sid for entry in caches.ste}


def test_plru_never_evicts_what_was_used_last():
    caches = Caches(ste=(1, 8, "plru"))
    choose = random.Random(5)
    for step in range(2000):
        sid = choose.randrange(24)
        if caches.lookup_ste(sid) is None:
            caches.fill_ste(sid, record(sid))
        caches.fill_ste(100 + step, record(step))
        assert sid in {entry.sid for entry in caches.ste}


def test_random_is_told_by_its_seed_and_spread_over_the_ways():
    def victims(seed):
        caches = Caches(ste=(1, 8, "random", seed))
        for sid in range(8):
            caches.fill_ste(sid, record(sid))
        found = []
        for sid in range(8, 4008):
            before = [entry.sid for entry in caches.ste]
            caches.fill_ste(sid, record(sid))
            after = [entry.sid for entry in caches.ste]
            (way,) = (i for i in range(8) if before[i] != after[i])
            found.append(way)
        return found

    first = victims(3)
    assert first == victims(3)
    generator = Generator(3)
    assert first == [generator.below(8) for _ in range(4000)]
    assert first != victims(4)
    assert all(400 < first.count(way) < 600 for way in range(8))


def prints(sids):
    """What the structure compares first: written again here, to find tags that agree in it."""
    second = (1 << 63) * 0x5A308D33 % (1 << 64)
    mixed = sids * np.uint64(0x3C6EF373) + np.uint64(second)
    return mixed >> np.uint64(24) & np.uint64(0xFFFF_FFFF) | np.uint64(1)


@pytest.mark.parametrize(("ways", "policy"), [(4, "lru"), (4, "plru"), (2, "lru"), (8, "lru"),
                                              (7, "fifo"), (40, "lru"), (32, "plru"),
                                              (19, "random")])  # fmt: skip
def test_tags_whose_prints_agree_are_kept_apart(ways, policy):
    sids = np.unique(np.random.default_rng(1).integers(0, 1 << 32, 1 << 20, np.uint64))
    found = prints(sids)
    order = np.argsort(found, kind="stable")
    same = np.flatnonzero(found[order][1:] == found[order][:-1])
    assert len(same) > 20
    for at in same[:20]:
        a, b = (int(sids[order[at + i]]) for i in (0, 1))
        caches = Caches(ste=(1, ways, policy))
        caches.fill_ste(a, record(1))
        assert caches.lookup_ste(b) is None
        caches.fill_ste(b, record(2))
        assert caches.lookup_ste(a) == record(1)
        assert caches.lookup_ste(b) == record(2)
        assert caches.cfgi("CFGI_STE", sid=a) == 1
        assert list(caches.ste) == [SteEntry(b, record(2))]
        assert caches.lookup_ste(b) == record(2)


@pytest.mark.parametrize(("geometry", "message"), [
    ((3, 4), "ste.sets must be a power of two, not 3"),
    ((0, 4), "ste.sets must be a power of two, not 0"),
    ((4, 0), "ste.ways must be 1 to .*, not 0"),
    ((1 << 24, 2), "ste.ways must be 1 to 1 with 16777216 sets, not 2"),
    ((1 << 25, 1), "ste.sets must be 0 to 0x1000000, not 0x2000000"),
    ((-1, 1), "ste.sets must be .*, not -1"),
    ((4, 3, "plru"), "ste.ways must be a power of two up to 64 with the policy 'plru', not 3"),
    ((1, 128, "plru"), "ste.ways must be a power of two up to 64 .*, not 128"),
    ((1, 1, "mru"), "ste.policy must be 'lru', 'plru', 'fifo' or 'random', not 'mru'"),
    ((1, 1, "random", 1 << 64), "ste.seed must be "),
])  # fmt: skip
def test_geometries_that_cannot_be_are_refused(geometry, message):
    with pytest.raises(ValueError, match=message):
        Caches(ste=geometry)


@pytest.mark.parametrize("geometry", [5, (1,), (1, 2, "lru", 0, 0), (1.5, 2), ("1", 2)])
def test_what_is_no_geometry_is_refused(geometry):
    with pytest.raises(TypeError, match="ste"):
        Caches(ste=geometry)


def test_memory_follows_the_geometry():
    small, large = Caches(tlb=(16, 4)), Caches(tlb=(1024, 4))
    assert small.tlb.nbytes == 64 * (64 + 4 + 8)  # entry, print, time of use
    assert large.nbytes - small.nbytes == 4032 * (64 + 4 + 8 + 16)  # and what finds overlaps
    assert Caches(tlb=(16, 4, "random")).tlb.nbytes == 64 * (64 + 4)
    assert Caches(tlb=(16, 4, "plru")).tlb.nbytes == 64 * (64 + 4) + 16 * 8
