"""PASID allocation, each question beside methods that do nothing, so that ratios are of one run.

Run with ``pytest benchmarks -o python_files='bench_*.py'``. A time is that of CALLS calls (or pairs
of calls) from Python; in the groups about bulk calls it is that of one call, and `ns_per_id` in the
saved results is its median by ID, of which the empty method there shows how much is the harness.
"""

from itertools import repeat
from statistics import median
from time import perf_counter

import numpy as np
import pytest

from smmufast._pasid import PasidAllocator

CALLS = 1000
SIZE = 1 << 20
FILLS = {
    "empty": 0,
    "half full": SIZE // 2,
    "99.9 % full": SIZE * 999 // 1000,
    "one left": SIZE - 2,
}


def filled(count):
    """Return an allocator of all PASIDs with the lowest `count` of them allocated."""
    pasids = PasidAllocator()
    pasids.alloc_many(count)
    return pasids


# Methods of the same signatures as those measured, and methods of three integers.
SAME, THREE = "the same signature", "three integers"


def empty_pairs(empty, signature):
    """Return a function that calls two methods that do nothing, CALLS times."""
    if signature == SAME:

        def pairs():
            for _ in repeat(None, CALLS):
                empty.drop(empty.draw())

    else:

        def pairs():
            for _ in repeat(None, CALLS):
                empty.three_none(1, 2, empty.three_int(1 << 19, 2, 3))

    return pairs


def empty_calls(empty, signature):
    """Return a function that calls a method that does nothing, CALLS times."""
    if signature == SAME:

        def calls():
            for _ in repeat(None, CALLS):
                empty.drop(4711)

    else:

        def calls():
            for _ in repeat(None, CALLS):
                empty.three(4711, 2, 3)

    return calls


def run(benchmark, function, *baselines):
    """Measure in short rounds, each beside one of every baseline, so that drift cancels out.

    The ratios in the saved results are medians over the rounds.
    """
    times = [[] for _ in baselines]

    def setup():
        for baseline, mine in zip(baselines, times, strict=True):
            start = perf_counter()
            baseline()
            mine.append(perf_counter() - start)

    benchmark.pedantic(function, setup=setup, rounds=200)
    for signature, mine in zip((SAME, THREE), times, strict=False):
        ratios = [a / b for a, b in zip(benchmark.stats.stats.data, mine, strict=True)]
        benchmark.extra_info[f"times an empty method of {signature}"] = median(ratios)


@pytest.fixture
def two_empty(empty):
    """Return the baselines of a pair of calls."""
    return empty_pairs(empty, SAME), empty_pairs(empty, THREE)


@pytest.fixture
def one_empty(empty):
    """Return the baselines of one call."""
    return empty_calls(empty, SAME), empty_calls(empty, THREE)


@pytest.mark.benchmark(group="alloc() and free()")
@pytest.mark.parametrize("signature", [SAME, THREE])
def test_empty_pair(benchmark, empty, signature):
    run(benchmark, empty_pairs(empty, signature))


@pytest.mark.benchmark(group="alloc() and free()")
@pytest.mark.parametrize("cyclic", [False, True], ids=["lowest first", "cyclic"])
@pytest.mark.parametrize("fill", FILLS)
def test_pair(benchmark, two_empty, fill, cyclic):
    pasids = PasidAllocator(cyclic=cyclic)
    pasids.alloc_many(FILLS[fill])

    def pairs():
        for _ in repeat(None, CALLS):
            pasids.free(pasids.alloc())

    run(benchmark, pairs, *two_empty)
    assert len(pasids) == FILLS[fill]


@pytest.mark.benchmark(group="alloc() in a range, or with an owner, and free()")
@pytest.mark.parametrize("signature", [SAME, THREE])
def test_empty_pair_for_ranges(benchmark, empty, signature):
    run(benchmark, empty_pairs(empty, signature))


@pytest.mark.benchmark(group="alloc() in a range, or with an owner, and free()")
@pytest.mark.parametrize("fill", FILLS)
def test_range_pair(benchmark, two_empty, fill):
    pasids = filled(FILLS[fill])

    def pairs():
        for _ in repeat(None, CALLS):
            pasids.free(pasids.alloc(1000, SIZE - 1))

    run(benchmark, pairs, *two_empty)


@pytest.mark.benchmark(group="alloc() in a range, or with an owner, and free()")
def test_owner_pair(benchmark, two_empty):
    pasids = filled(SIZE // 2)
    owner = object()

    def pairs():
        for _ in repeat(None, CALLS):
            pasids.free(pasids.alloc(owner=owner))

    run(benchmark, pairs, *two_empty)


@pytest.mark.benchmark(group="find() and in")
@pytest.mark.parametrize("signature", [SAME, THREE])
def test_empty_call(benchmark, empty, signature):
    run(benchmark, empty_calls(empty, signature))


@pytest.mark.benchmark(group="find() and in")
@pytest.mark.parametrize("owner", [None, "owner"])
def test_find(benchmark, one_empty, owner):
    pasids = PasidAllocator()
    pasids.alloc_many(SIZE // 2, owner=owner)

    def calls():
        for _ in repeat(None, CALLS):
            pasids.find(4711)

    run(benchmark, calls, *one_empty)
    assert pasids.find(4711) is owner


@pytest.mark.benchmark(group="find() and in")
def test_contains(benchmark, one_empty):
    pasids = filled(SIZE // 2)

    def calls():
        for _ in repeat(None, CALLS):
            4711 in pasids  # noqa: B015

    run(benchmark, calls, *one_empty)


def scattered():
    """Return a full allocator in which every other ID, at random, was freed again."""
    pasids = filled(SIZE - 1)
    taken = np.random.default_rng(1).integers(0, 2, SIZE - 1).astype(bool)
    pasids.free_many((np.flatnonzero(taken) + 1).astype(np.uint32))
    return pasids


STATES = {"empty": PasidAllocator, "half scattered": scattered}


def bulk(benchmark, setup, call, count):
    benchmark.pedantic(call, setup=setup, rounds=50, warmup_rounds=2)
    benchmark.extra_info["ids"] = count
    benchmark.extra_info["ns_per_id"] = benchmark.stats.stats.median / count * 1e9


@pytest.mark.benchmark(group="alloc_many()")
@pytest.mark.parametrize("count", [1024, 1 << 19])
def test_copy_of_as_many_integers(benchmark, count):
    # What writing that much costs anyhow.
    ids, out = np.arange(count, dtype=np.uint32), np.zeros(count, np.uint32)
    bulk(benchmark, None, lambda: np.copyto(out, ids), count)


@pytest.mark.benchmark(group="alloc_many()")
def test_empty_method_for_alloc_many(benchmark, empty):
    bulk(benchmark, None, lambda: empty.three(1, 2, 3), 1)


@pytest.mark.benchmark(group="alloc_many()")
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("count", [1024, 1 << 19])
def test_alloc_many(benchmark, state, count):
    pasids = STATES[state]()
    count = min(count, pasids.available)
    out = np.zeros(count, np.uint32)

    def setup():
        if out.any():
            pasids.free_many(out)

    bulk(benchmark, setup, lambda: pasids.alloc_many(count, out=out), count)
    assert all(pasid in pasids for pasid in out[:1000].tolist())


@pytest.mark.benchmark(group="free_many()")
@pytest.mark.parametrize("order", ["ascending", "shuffled"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("count", [1024, 1 << 19])
def test_free_many(benchmark, state, order, count):
    pasids = STATES[state]()
    count = min(count, pasids.available)
    ids = np.zeros(count, np.uint32)
    free = pasids.available
    order = slice(None) if order == "ascending" else np.random.default_rng(1).permutation(count)

    def setup():
        return (pasids.alloc_many(count, out=ids)[order],), {}

    bulk(benchmark, setup, pasids.free_many, count)
    assert pasids.available == free


@pytest.mark.benchmark(group="free_many()")
def test_empty_method_for_free_many(benchmark, empty):
    bulk(benchmark, None, lambda: empty.drop(None), 1)
