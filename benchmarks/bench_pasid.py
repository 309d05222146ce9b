"""PASID allocation, beside methods that do nothing and numpy's copying of as many integers."""

from functools import partial
from itertools import repeat

import numpy as np
from questions import LIBRARY, Question, Run

CALLS = 1000
SIZE = 1 << 20
FILLS = {
    "0 % full": 0,
    "50 % full": SIZE // 2,
    "99.9 % full": SIZE * 999 // 1000,
    "one left": SIZE - 2,
}
BULKS = {"1 K": 1 << 10, "512 K": 1 << 19}


def allocator(**keywords):
    """Return an allocator of all PASIDs but 0."""
    from smmufast import PasidAllocator

    return PasidAllocator(SIZE, **keywords)


def scattered():
    """Return an allocator half of whose IDs, at random, are allocated."""
    pasids = allocator()
    ids = pasids.alloc_many(SIZE - 1)
    pasids.free_many(ids[np.random.default_rng(1).random(SIZE - 1) < 0.5])
    return pasids


# ---- calls ------------------------------------------------------------------------------------


def three_integers(first, second):
    """Call two methods that take three integers; the second is given what the first returns."""
    for _ in repeat(None, CALLS):
        second(1, 2, first(1, 1 << 19, 3))


def plain(alloc, free):
    """Allocate and free."""
    for _ in repeat(None, CALLS):
        free(alloc())


def ranged(alloc, free):
    """Allocate in a range, and free."""
    for _ in repeat(None, CALLS):
        free(alloc(1000, 0xF_FFFF))


def owned(alloc, free):
    """Allocate for an owner, and free."""
    for _ in repeat(None, CALLS):
        free(alloc(owner="owner"))


def three_integers_once(method):
    """Call a method that takes three integers."""
    for _ in repeat(None, CALLS):
        method(1, 4711, 3)


def once(method):
    """Call a method that takes one ID."""
    for _ in repeat(None, CALLS):
        method(4711)


def contains(pasids):
    """Ask whether an ID is allocated."""
    for _ in repeat(None, CALLS):
        4711 in pasids  # noqa: B015


def empty(loop, *names):
    """Call methods that do nothing."""

    def build(bench):
        nothing = bench.module.Empty()
        return Run(partial(loop, *(getattr(nothing, name) for name in names)), CALLS)

    return build


def pair(loop, fill, *, cyclic=False):
    """Allocate an ID and free it, while the lowest `fill` of them are allocated."""

    def build(_bench):
        pasids = allocator(cyclic=cyclic)
        pasids.alloc_many(fill)
        found = []

        def alloc(*arguments, **keywords):
            found.append(pasids.alloc(*arguments, **keywords))
            return found[-1]

        loop(alloc, pasids.free)
        lowest = max(fill + 1, 1000) if loop is ranged else fill + 1
        if min(found) != lowest or (not cyclic and max(found) != lowest):
            raise AssertionError(f"alloc() gives {min(found)} to {max(found)}, not {lowest}")
        if len(pasids) != fill or found[-1] in pasids:
            raise AssertionError("free() does not free")
        return Run(partial(loop, pasids.alloc, pasids.free), CALLS)

    return build


def look_up(loop, owner=None):
    """Look an allocated ID up."""

    def build(_bench):
        pasids = allocator()
        pasids.alloc_many(SIZE // 2, owner=owner)
        if pasids.find(4711) is not owner or 4711 not in pasids or SIZE - 1 in pasids:
            raise AssertionError("an allocated ID is not found")
        return Run(partial(loop, pasids.find if loop is once else pasids), CALLS)

    return build


# ---- bulk -------------------------------------------------------------------------------------


def rows_of(count):
    """Return how many arrays of `count` IDs make a call long enough to time."""
    return max(1, (1 << 18) // count)


def bulk_copy(count):
    """Copy as many integers as there are IDs: what writing them costs anyhow."""

    def build(_bench):
        rows = rows_of(count)
        ids = np.arange(rows * count, dtype=np.uint32).reshape(rows, count)
        pairs = list(zip(np.ones_like(ids), ids, strict=True))

        def call():
            for out, row in pairs:
                np.copyto(out, row)

        return Run(call, ids.size)

    return build


def bulk_scatter(count):
    """Clear as many elements of an array, shuffled: what going to each ID's place costs."""

    def build(_bench):
        taken = np.ones(SIZE, bool)
        ids = np.random.default_rng(1).permutation(rows_of(count) * count).astype(np.uint32)
        arrays = list(ids.reshape(-1, count))

        def call():
            for array in arrays:
                taken[array] = False

        call()
        if taken.sum() != SIZE - ids.size:
            raise AssertionError("numpy clears other elements than it is told")
        return Run(call, ids.size)

    return build


def bulk_alloc(make, count):
    """Allocate `count` IDs at a time, into an array."""

    def build(_bench):
        pasids = make()
        before = set(pasids)
        n = min(count, pasids.available)
        ids = np.zeros((rows_of(count), n), np.uint32)
        outs = list(ids)
        alloc_many = pasids.alloc_many

        def call():
            for out in outs:
                alloc_many(n, out=out)

        def reset():
            if ids.any():
                pasids.free_many(ids.ravel())

        call()
        if not (np.diff(ids.ravel().astype(np.int64)) > 0).all():
            raise AssertionError("alloc_many() does not give ascending IDs")
        if set(pasids) != before | set(ids.ravel().tolist()) or not before.isdisjoint(ids.ravel()):
            raise AssertionError("alloc_many() gives other IDs than it takes")
        return Run(call, ids.size, reset)

    return build


def bulk_free(make, count, *, shuffled):
    """Free `count` IDs at a time."""

    def build(_bench):
        pasids = make()
        before = len(pasids)
        n = min(count, pasids.available)
        ids = pasids.alloc_many(rows_of(count) * n).reshape(-1, n)
        scratch = np.zeros(ids.size, np.uint32)
        order = np.random.default_rng(1).permutation(n) if shuffled else np.arange(n)
        arrays = list(np.ascontiguousarray(ids[:, order]))
        free_many = pasids.free_many

        def call():
            for array in arrays:
                free_many(array)

        def reset():
            if len(pasids) == before:
                pasids.alloc_many(scratch.size, out=scratch)

        call()
        if len(pasids) != before:
            raise AssertionError("free_many() does not free all IDs")
        reset()
        if not np.array_equal(scratch, ids.ravel()):
            raise AssertionError("alloc_many() does not give the same IDs again")
        return Run(call, ids.size, reset)

    return build


def _questions():
    bases = {
        "two empty methods, three integers": empty(three_integers, "three_int", "three_none"),
        "two empty methods, arguments of alloc() and free()": empty(plain, "draw", "drop"),
    }
    for call, loop, cyclic in (
        ("alloc()", plain, False),
        ("cyclic alloc()", plain, True),
        ("alloc(min, max)", ranged, False),
        ("alloc(owner=)", owned, False),
    ):
        yield Question(
            f"PASID {call} and free()",
            "pair",
            bases
            | {
                f"{LIBRARY}, {name}": pair(loop, fill, cyclic=cyclic)
                for name, fill in FILLS.items()
            },
            main=call == "alloc()",
        )
    yield Question(
        "PASID look-up",
        "call",
        {
            "empty method, three integers": empty(three_integers_once, "three"),
            "empty method, one object": empty(once, "drop"),
            f"{LIBRARY} find(), an owner": look_up(once, owner="owner"),
            f"{LIBRARY} find(), no owner": look_up(once),
            f"{LIBRARY} in": look_up(contains),
        },
    )
    states = {"0 % full": allocator, "50 % full, scattered": scattered}
    for label, count in BULKS.items():
        yield Question(
            f"PASID alloc_many(), {label} IDs",
            "ID",
            {"numpy copy": bulk_copy(count)}
            | {f"{LIBRARY}, {name}": bulk_alloc(make, count) for name, make in states.items()},
        )
        yield Question(
            f"PASID free_many(), {label} IDs",
            "ID",
            {
                "numpy copy": bulk_copy(count),
                "numpy, taken[ids] = False, shuffled": bulk_scatter(count),
            }
            | {
                f"{LIBRARY}, {name}, {order}": bulk_free(make, count, shuffled=order == "shuffled")
                for name, make in states.items()
                for order in ("ascending", "shuffled")
            },
        )


QUESTIONS = tuple(_questions())


def test_pasid(measure, question, run):
    """Time pairs of calls, look-ups, and calls for many IDs."""
    measure(question, run)
