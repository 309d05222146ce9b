"""PasidAllocator against a slow twin; its errors; its promises to threads and finalisers."""

import copy
import doctest
import errno
import gc
import pickle
import random
import sys
import threading
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smmufast._driver import pasid as compiled
from smmufast._driver.pasid import (
    PasidAllocated,
    PasidAllocator,
    PasidDuplicate,
    PasidError,
    PasidExhausted,
    PasidNotAllocated,
    PasidNotReserved,
    PasidOutOfRange,
    PasidRangeEmpty,
    PasidReserved,
)

FREE, ALLOCATED, RESERVED = 0, 1, 2


class Twin:
    """What the allocator does, in the most obvious way: a state for each ID, and a search."""

    def __init__(self, size, first=1, cyclic=False):
        self.state = np.full(size, FREE, np.uint8)
        self.state[:first] = RESERVED
        self.owners = {}
        self.cyclic = cyclic
        self.cursor = 0

    def __len__(self):
        return int(np.count_nonzero(self.state == ALLOCATED))

    def __iter__(self):
        return iter(np.flatnonzero(self.state == ALLOCATED).tolist())

    def __contains__(self, pasid):
        return 0 <= pasid < len(self.state) and self.state[pasid] == ALLOCATED

    @property
    def available(self):
        return int(np.count_nonzero(self.state == FREE))

    @property
    def reserved(self):
        ranges = []
        for pasid in np.flatnonzero(self.state == RESERVED).tolist():
            if ranges and ranges[-1][1] == pasid - 1:
                ranges[-1] = (ranges[-1][0], pasid)
            else:
                ranges.append((pasid, pasid))
        return ranges

    def check(self, pasid):
        if not 0 <= pasid < len(self.state):
            raise PasidOutOfRange("", pasid)

    def check_allocated(self, pasid):
        self.check(pasid)
        if self.state[pasid] == RESERVED:
            raise PasidReserved("", pasid)
        if self.state[pasid] == FREE:
            raise PasidNotAllocated("", pasid)

    def check_range(self, first, last):
        self.check(first)
        self.check(last)
        if first > last:
            raise PasidRangeEmpty("", first)

    def alloc_many(self, count, min=None, max=None, owner=None):
        first = 0 if min is None else min
        last = len(self.state) - 1 if max is None else max
        self.check_range(first, last)
        ids = first + np.flatnonzero(self.state[first : last + 1] == FREE)
        if self.cyclic:
            ids = np.concatenate((ids[ids >= self.cursor], ids[ids < self.cursor]))
        if len(ids) < count:
            raise PasidExhausted("", len(ids))
        ids = ids[:count].tolist()
        for pasid in ids:
            self.state[pasid] = ALLOCATED
            if owner is not None:
                self.owners[pasid] = owner
        if ids:
            self.cursor = ids[-1] + 1
        return ids

    def alloc(self, min=None, max=None, owner=None):
        return self.alloc_many(1, min, max, owner)[0]

    def free_many(self, pasids):
        for i, pasid in enumerate(pasids):
            self.check_allocated(pasid)
            if pasid in pasids[:i]:
                raise PasidDuplicate("", pasid)
        for pasid in pasids:
            self.state[pasid] = FREE
            self.owners.pop(pasid, None)

    def free(self, pasid):
        self.free_many([pasid])

    def find(self, pasid):
        self.check_allocated(pasid)
        return self.owners.get(pasid)

    def set_owner(self, pasid, owner):
        self.check_allocated(pasid)
        self.owners.pop(pasid, None)
        if owner is not None:
            self.owners[pasid] = owner

    def obstacles(self, first, last, wanted):
        return (first + np.flatnonzero(self.state[first : last + 1] != wanted)).tolist()

    def reserve(self, first, last):
        self.check_range(first, last)
        for pasid in self.obstacles(first, last, FREE):
            error = PasidAllocated if self.state[pasid] == ALLOCATED else PasidReserved
            raise error("", pasid)
        self.state[first : last + 1] = RESERVED

    def unreserve(self, first, last):
        self.check_range(first, last)
        for pasid in self.obstacles(first, last, RESERVED):
            raise PasidNotReserved("", pasid)
        self.state[first : last + 1] = FREE


def snapshot(pasids):
    """All of an allocator's state, in a form that compares."""
    return pasids.__reduce__()[2]


def outcome(operation):
    """The result as Python values, or the error and what it is about."""
    try:
        result = operation()
    except PasidError as error:
        return type(error), error.value
    return result.tolist() if isinstance(result, np.ndarray) else result


def random_step(rng, pasids, twin):
    """One operation with random arguments, mostly legal: the pair of calls to compare."""
    size = pasids.size
    stray = [-1, size, size + rng.randrange(1 << 40)]

    def pasid():
        return rng.choice(stray) if rng.random() < 0.02 else rng.randrange(size)

    def allocated(n):
        near = sorted(rng.randrange(size) for _ in range(2))
        ids = np.flatnonzero(twin.state[near[0] : near[1] + 1] == ALLOCATED)[:n] + near[0]
        return ids.tolist()

    def limits():
        first, last = sorted((pasid(), pasid()), reverse=rng.random() < 0.02)
        return {
            **({"min": first} if rng.random() < 0.5 else {}),
            **({"max": last} if rng.random() < 0.5 else {}),
        }

    kind = rng.choice(
        ["alloc"] * 6 + ["free"] * 5 + ["many"] * 2 + ["reserve"] * 2 + ["find", "own"]
    )
    if kind == "alloc":
        name, args, keywords = "alloc", (), limits() if rng.random() < 0.5 else {}
        if rng.random() < 0.3:
            keywords["owner"] = object()
    elif kind == "free":
        ids = allocated(1) if rng.random() < 0.9 else []
        name, args, keywords = "free", (ids[0] if ids else pasid(),), {}
    elif kind == "many" and rng.random() < 0.5:
        count = rng.randrange(min(size, 300) + 2)
        name, args, keywords = "alloc_many", (count,), limits()
        if rng.random() < 0.2:
            keywords["owner"] = object()
    elif kind == "many":
        ids = allocated(rng.randrange(300))
        if rng.random() < 0.3:
            rng.shuffle(ids)
        if rng.random() < 0.2:
            ids.insert(rng.randrange(len(ids) + 1), rng.choice([pasid(), *ids]))
        name, args, keywords = "free_many", (ids,), {}
    elif kind == "reserve":
        first = pasid()
        last = first + rng.randrange(-1, min(size, 200)) if rng.random() < 0.9 else pasid()
        name, args, keywords = rng.choice(["reserve", "unreserve"]), (first, last), {}
    elif kind == "own":
        ids = allocated(1) if rng.random() < 0.9 else []
        owner = rng.choice([None, object()])
        name, args, keywords = "set_owner", (ids[0] if ids else pasid(), owner), {}
    else:
        name, args, keywords = "find", (pasid(),), {}
    return (
        f"{name}(*{args}, **{keywords})",
        lambda: getattr(pasids, name)(*args, **keywords),
        lambda: getattr(twin, name)(*args, **keywords),
    )


def assert_same(pasids, twin):
    assert list(pasids) == list(twin)
    assert pasids.reserved == twin.reserved
    assert {pasid: pasids.find(pasid) for pasid in twin.owners} == twin.owners
    assert [p in pasids for p in range(-1, 130)] == [p in twin for p in range(-1, 130)]


def run_program(seed, steps, size, first, cyclic, compare_every, fill=0):
    rng = random.Random(seed)
    pasids = PasidAllocator(size, first=first, cyclic=cyclic)
    twin = Twin(size, first, cyclic)
    assert pasids.alloc_many(fill).tolist() == twin.alloc_many(fill)
    errors = set()
    for step in range(steps):
        name, real, expected = random_step(rng, pasids, twin)
        before = snapshot(pasids)
        result = outcome(real)
        assert result == outcome(expected), (step, name)
        assert (len(pasids), pasids.available) == (len(twin), twin.available), (step, name)
        if isinstance(result, tuple):
            errors.add(result[0])
            assert snapshot(pasids) == before, (step, name)
        if step % compare_every == 0:
            assert_same(pasids, twin)
        # The summary levels are not part of the state: replace them by freshly made ones.
        if rng.random() < 0.002:
            pasids = rng.choice([PasidAllocator.copy, copy.copy])(pasids)
    assert_same(pasids, twin)
    return errors


@pytest.mark.parametrize("cyclic", [False, True])
@pytest.mark.parametrize(
    ("size", "first"), [(1, 0), (2, 1), (63, 1), (64, 0), (65, 1), (1000, 8), (4096, 1), (4161, 65)]
)
def test_a_random_program_does_what_the_twin_does(size, first, cyclic):
    errors = run_program(
        seed=f"{size} {cyclic}",
        steps=8000,
        size=size,
        first=first,
        cyclic=cyclic,
        compare_every=50,
    )
    # The program reaches every cause of an error.
    assert errors >= {
        PasidExhausted,
        PasidNotAllocated,
        PasidOutOfRange,
        PasidNotReserved,
        *([PasidReserved] if size > 1 else []),
        *([PasidAllocated, PasidRangeEmpty, PasidDuplicate] if size > 2 else []),
    }


@pytest.mark.parametrize(("fill", "cyclic"), [(0, False), (1 << 19, True), ((1 << 20) - 50, False)])
def test_a_random_program_on_all_2_to_the_20_does_what_the_twin_does(fill, cyclic):
    errors = run_program(
        seed=20, steps=500, size=1 << 20, first=1, cyclic=cyclic, compare_every=250, fill=fill
    )
    assert PasidOutOfRange in errors


def test_zero_is_reserved_unless_first_says_otherwise():
    assert PasidAllocator(8).reserved == [(0, 0)]
    assert PasidAllocator(8).alloc(min=0) == 1
    assert PasidAllocator(8, first=0).reserved == []
    assert PasidAllocator(8, first=0).alloc() == 0
    assert PasidAllocator(8, first=3).reserved == [(0, 2)]
    assert PasidAllocator(8, first=8).available == 0
    pasids = PasidAllocator(8)
    pasids.unreserve(0, 0)
    assert pasids.alloc() == 0


def test_size_1_has_nothing_but_the_reserved_zero():
    pasids = PasidAllocator(1)
    assert (len(pasids), pasids.available, pasids.reserved) == (0, 0, [(0, 0)])
    with pytest.raises(PasidExhausted):
        pasids.alloc()
    pasids.unreserve(0, 0)
    assert pasids.alloc() == 0
    with pytest.raises(PasidExhausted):
        pasids.alloc()


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 127, 128, 4095, 4097, 262145, 1 << 20])
def test_every_id_below_size_is_handed_out_once_and_none_above(size):
    pasids = PasidAllocator(size, first=0)
    last = pasids.alloc(min=size - 1)
    ids = pasids.alloc_many(size - 1)
    assert last == size - 1
    assert ids.tolist() == list(range(size - 1))
    assert (len(pasids), pasids.available) == (size, 0)
    assert list(pasids) == list(range(size))
    for exhausted in (pasids.alloc, lambda: pasids.alloc_many(1), lambda: pasids.alloc(min=last)):
        with pytest.raises(PasidExhausted):
            exhausted()
    assert pasids.alloc_many(0).shape == (0,)
    pasids.free(size // 2)
    assert pasids.alloc() == size // 2
    pasids.free_many(np.arange(size)[::-1])
    assert (len(pasids), pasids.available) == (0, size)
    pasids.reserve(0, size - 1)
    assert pasids.reserved == [(0, size - 1)]
    pasids.unreserve(0, size - 1)
    assert pasids.alloc(min=size - 1) == size - 1


def test_the_lowest_free_id_is_found_from_every_place():
    # A lone free ID, in first and last places of words, and of the words above them.
    places = [0, 1, 63, 64, 4095, 4096, 262143, 262144, 524288, (1 << 20) - 1]
    pasids = PasidAllocator(first=0)
    pasids.alloc_many(1 << 20)
    for place in places:
        pasids.free(place)
        for first in places:
            if first <= place:
                assert pasids.alloc(min=first) == place
                pasids.free(place)
            else:
                with pytest.raises(PasidExhausted):
                    pasids.alloc(min=first)
        assert pasids.alloc(max=place) == place


def used_allocator():
    """Sixteen IDs: 0..2 and 8..9 reserved, 3..5 and 12 allocated, seven free."""
    pasids = PasidAllocator(16, first=3)
    pasids.alloc_many(3, owner="first three")
    pasids.reserve(8, 9)
    pasids.alloc(min=12)
    return pasids


def array(*ids):
    return np.array(ids, np.uint32)


ERRORS = {
    # the operation: its cause, the builtin it also is, what it is about, the message
    "alloc(min=3, max=5)": (PasidExhausted, RuntimeError, 0, "no ID is free in 3..5"),
    "alloc(min=8, max=9)": (PasidExhausted, RuntimeError, 0, "no ID is free in 8..9"),
    "alloc(min=7, max=6)": (
        PasidRangeEmpty, ValueError, 7, "min must be 0 to 6 (max), not 7"),
    "alloc(min=16)": (PasidOutOfRange, ValueError, 16, "min must be 0 to 15, not 16"),
    "alloc(max=-1)": (PasidOutOfRange, ValueError, -1, "max must be 0 to 15, not -1"),
    "alloc(max=1 << 70)": (
        PasidOutOfRange, ValueError, 1 << 70, "max must be 0 to 15, not 0x400000000000000000"),
    "alloc(min=10**5000)": (
        PasidOutOfRange, ValueError, 10**5000,
        "min must be 0 to 15, not a number of many digits"),
    "alloc(min=1.0)": (TypeError, TypeError, None, "min must be an integer, not float"),
    "alloc(max='7')": (TypeError, TypeError, None, "max must be an integer, not str"),
    "alloc_many(8)": (
        PasidExhausted, RuntimeError, 7,
        "count must be 0 to 7, the number of free IDs in 0..15, not 8"),
    "alloc_many(3, min=7, max=10)": (
        PasidExhausted, RuntimeError, 2,
        "count must be 0 to 2, the number of free IDs in 7..10, not 3"),
    "alloc_many(10**5000)": (
        PasidExhausted, RuntimeError, 7,
        "count must be 0 to 7, the number of free IDs in 0..15, not a number of many digits"),
    "alloc_many(-1)": (ValueError, ValueError, None, "count must be 0 or more, not -1"),
    "alloc_many(None)": (TypeError, TypeError, None, "count must be an integer, not NoneType"),
    "alloc_many(0, min=2, max=1)": (
        PasidRangeEmpty, ValueError, 2, "min must be 0 to 1 (max), not 2"),
    "alloc_many(2, out=[0, 0])": (
        TypeError, TypeError, None, "out must be a numpy.ndarray, not list"),
    "alloc_many(2, out=np.zeros(2, np.int32))": (
        TypeError, TypeError, None, "out.dtype must be uint32, not int32"),
    "alloc_many(2, out=np.zeros(3, np.uint32))": (
        ValueError, ValueError, None, "out.shape must be (2,), not (3,)"),
    "alloc_many(2, out=np.zeros((2, 1), np.uint32))": (
        ValueError, ValueError, None, "out.shape must be (2,), not (2, 1)"),
    "alloc_many(2, out=np.zeros(4, np.uint32)[::2])": (
        ValueError, ValueError, None,
        "out must be C-contiguous, aligned, writable and of native byte order"),
    "alloc_many(2, out=np.zeros(2, '>u4'))": (
        ValueError, ValueError, None,
        "out must be C-contiguous, aligned, writable and of native byte order"),
    "alloc_many(2, out=np.frombuffer(bytes(8), np.uint32))": (
        ValueError, ValueError, None,
        "out must be C-contiguous, aligned, writable and of native byte order"),
    "free(6)": (PasidNotAllocated, KeyError, 6, "pasid 6 is free; it must be an allocated ID"),
    "free(8)": (PasidReserved, ValueError, 8, "pasid 8 is reserved; it must be an allocated ID"),
    "free(16)": (PasidOutOfRange, ValueError, 16, "pasid must be 0 to 15, not 16"),
    "free(-1)": (PasidOutOfRange, ValueError, -1, "pasid must be 0 to 15, not -1"),
    "free(-(1 << 70))": (
        PasidOutOfRange, ValueError, -(1 << 70),
        "pasid must be 0 to 15, not -0x400000000000000000"),
    "free(None)": (TypeError, TypeError, None, "pasid must be an integer, not NoneType"),
    "find(6)": (PasidNotAllocated, KeyError, 6, "pasid 6 is free; it must be an allocated ID"),
    "find(0)": (PasidReserved, ValueError, 0, "pasid 0 is reserved; it must be an allocated ID"),
    "find(99)": (PasidOutOfRange, ValueError, 99, "pasid must be 0 to 15, not 99"),
    "find('3')": (TypeError, TypeError, None, "pasid must be an integer, not str"),
    "set_owner(6, 'x')": (
        PasidNotAllocated, KeyError, 6, "pasid 6 is free; it must be an allocated ID"),
    "set_owner(0, 'x')": (
        PasidReserved, ValueError, 0, "pasid 0 is reserved; it must be an allocated ID"),
    "set_owner(16, None)": (PasidOutOfRange, ValueError, 16, "pasid must be 0 to 15, not 16"),
    "__contains__('3')": (TypeError, TypeError, None, "pasid must be an integer, not str"),
    "free_many(array(3, 4, 6))": (
        PasidNotAllocated, KeyError, 6, "pasids[2] = 6 is free; it must be an allocated ID"),
    "free_many(array(3, 9))": (
        PasidReserved, ValueError, 9, "pasids[1] = 9 is reserved; it must be an allocated ID"),
    "free_many(array(3, 4, 3, 5))": (
        PasidDuplicate, ValueError, 3, "pasids[2] = 3 is in the array twice"),
    "free_many(array(3, 16))": (
        PasidOutOfRange, ValueError, 16, "pasids[1] must be 0 to 15, not 16"),
    "free_many([3, 1 << 33])": (
        PasidOutOfRange, ValueError, 1 << 33, "pasids[1] must be 0 to 15, not 0x200000000"),
    "free_many(np.array([4, -3], np.int8))": (
        PasidOutOfRange, ValueError, -3, "pasids[1] must be 0 to 15, not -3"),
    # The first that cannot be freed, whatever is wrong with the later ones.
    "free_many([3, 6, -3])": (
        PasidNotAllocated, KeyError, 6, "pasids[1] = 6 is free; it must be an allocated ID"),
    "free_many(np.array([[3]]))": (
        ValueError, ValueError, None, "pasids.ndim must be 1, not 2"),
    "free_many(3)": (
        ValueError, ValueError, None, "pasids.ndim must be 1, not 0"),
    "free_many([3.0])": (
        TypeError, TypeError, None, "pasids.dtype must be an integer, not float64"),
    "free_many([True])": (TypeError, TypeError, None, "pasids.dtype must be an integer, not bool"),
    "reserve(11, 13)": (
        PasidAllocated, ValueError, 12, "cannot reserve 11..13: 12 is allocated"),
    "reserve(7, 12)": (PasidReserved, ValueError, 8, "cannot reserve 7..12: 8 is reserved"),
    "reserve(7, 6)": (
        PasidRangeEmpty, ValueError, 7, "first must be 0 to 6 (last), not 7"),
    "reserve(-1, 6)": (PasidOutOfRange, ValueError, -1, "first must be 0 to 15, not -1"),
    "reserve(6, 16)": (PasidOutOfRange, ValueError, 16, "last must be 0 to 15, not 16"),
    "reserve(6, None)": (TypeError, TypeError, None, "last must be an integer, not NoneType"),
    "unreserve(8, 10)": (
        PasidNotReserved, ValueError, 10, "cannot unreserve 8..10: 10 is not reserved"),
    "unreserve(2, 3)": (
        PasidNotReserved, ValueError, 3, "cannot unreserve 2..3: 3 is not reserved"),
    "unreserve(9, 8)": (
        PasidRangeEmpty, ValueError, 9, "first must be 0 to 8 (last), not 9"),
    "unreserve(0, 99)": (PasidOutOfRange, ValueError, 99, "last must be 0 to 15, not 99"),
    "unreserve(None, 0)": (TypeError, TypeError, None, "first must be an integer, not NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("operation", ERRORS)
def test_an_error_says_what_is_wrong_and_changes_nothing(operation):
    error, builtin, value, message = ERRORS[operation]
    pasids = used_allocator()
    before = snapshot(pasids)
    with pytest.raises(builtin) as caught:
        eval(f"pasids.{operation}", {"pasids": pasids, "np": np, "array": array})
    assert caught.type is error
    assert str(caught.value) == message
    assert getattr(caught.value, "value", None) == value
    assert snapshot(pasids) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ("0", ValueError, "size must be 1 to 0x100000, not 0"),
        ("(1 << 20) + 1", ValueError, "size must be 1 to 0x100000, not 0x100001"),
        ("10**5000", ValueError, "size must be 1 to 0x100000, not a number of many digits"),
        ("'9'", TypeError, "size must be an integer, not str"),
        ("9, first=10", ValueError, "first must be 0 to 9 (size), not 10"),
        ("9, first=-1", ValueError, "first must be 0 to 9 (size), not -1"),
        ("9, first=None", TypeError, "first must be an integer, not NoneType"),
    ],
)
def test_a_wrong_size_or_first_is_refused(arguments, error, message):
    with pytest.raises(error) as caught:
        eval(f"PasidAllocator({arguments})", {"PasidAllocator": PasidAllocator})
    assert str(caught.value) == message


ERRNOS = {
    PasidError: 0,
    PasidExhausted: errno.ENOSPC,
    PasidNotAllocated: errno.ENOENT,
    PasidAllocated: errno.EBUSY,
    PasidReserved: errno.EBUSY,
    PasidNotReserved: errno.EINVAL,
    PasidDuplicate: errno.EINVAL,
    PasidOutOfRange: errno.ERANGE,
    PasidRangeEmpty: errno.EINVAL,
}


def test_each_error_has_the_errno_of_its_cause():
    values = vars(compiled).values()
    classes = [c for c in values if isinstance(c, type) and issubclass(c, Exception)]
    assert {c: c.errno for c in classes} == ERRNOS
    with pytest.raises(PasidNotAllocated) as caught:
        used_allocator().free(6)
    assert caught.value.errno == errno.ENOENT


@given(
    st.sampled_from(["alloc", "alloc_many", "free", "free_many", "find", "reserve", "unreserve"]),
    st.lists(
        st.one_of(
            st.integers(-3, 20),
            st.integers(),
            st.floats(),
            st.none(),
            st.text(max_size=3),
            st.lists(st.integers(-2, 20), max_size=4),
        ),
        max_size=3,
    ),
)
def test_any_arguments_at_all_give_a_result_or_an_error_that_changes_nothing(name, arguments):
    pasids = used_allocator()
    before = snapshot(pasids)
    try:
        getattr(pasids, name)(*arguments)
    except (PasidError, TypeError, ValueError):
        assert snapshot(pasids) == before
    assert len(pasids) == len(list(pasids))
    assert pasids.size == (
        len(pasids) + pasids.available + sum(last - first + 1 for first, last in pasids.reserved)
    )


def test_errors_can_be_pickled():
    error = pickle.loads(pickle.dumps(PasidNotAllocated("pasid 6 is free", 6)))
    assert (type(error), str(error), error.value) == (PasidNotAllocated, "pasid 6 is free", 6)


def test_whatever_is_usable_as_an_index_is_an_id():
    class Index:
        def __index__(self):
            return 5

    pasids = PasidAllocator(16)
    assert pasids.alloc(min=np.uint8(5), max=Index(), owner="five") == 5
    assert Index() in pasids
    assert np.int64(5) in pasids
    assert pasids.find(Index()) == pasids.find(np.uint16(5)) == "five"
    pasids.free(Index())
    assert pasids.alloc(min=True) == 1
    assert type(pasids.alloc(max=np.int64(2))) is int
    pasids.free(np.uint32(2))
    assert list(pasids) == [1]


@pytest.mark.parametrize("cyclic", [False, True])
def test_alloc_many_gives_what_single_calls_give(cyclic):
    for limits in ({}, {"min": 100}, {"max": 300}, {"min": 70, "max": 200}):
        one = PasidAllocator(400, cyclic=cyclic)
        one.alloc_many(150)
        one.free_many(np.arange(3, 150, 7))
        many = one.copy()
        n = sum(p not in one for p in range(limits.get("min", 1), limits.get("max", 399) + 1))
        assert many.alloc_many(n, **limits).tolist() == [one.alloc(**limits) for _ in range(n)]
        assert snapshot(many) == snapshot(one)


def test_alloc_many_fills_out_or_leaves_it_alone():
    pasids = PasidAllocator(200)
    out = np.full(150, 7, np.uint32)
    assert pasids.alloc_many(100, out=out[20:120]) is not None
    assert out[:20].tolist() + out[120:].tolist() == [7] * 50
    assert out[20:120].tolist() == list(range(1, 101))
    before = out.copy()
    with pytest.raises(PasidExhausted):
        pasids.alloc_many(100, out=out[:100])
    assert (out == before).all()
    fresh = pasids.alloc_many(3)
    assert (fresh.dtype, fresh.shape, fresh.tolist()) == (np.uint32, (3,), [101, 102, 103])


@pytest.mark.parametrize(
    "form",
    [
        *["b", "B", "h", "H", "i", "I", "l", "L", "q", "Q", ">i4", ">u8", ">u4"],
        "list",
        "tuple",
        "strided",
        "readonly",
        "subclass",
    ],
)
def test_free_many_takes_any_one_dimensional_integers(form):
    ids = np.array([1, 100, 5, 2, 64, 63], np.uint32)
    forms = {
        "list": ids.tolist(),
        "tuple": tuple(ids.tolist()),
        "strided": np.repeat(ids, 2)[::2],
        "readonly": np.frombuffer(ids.tobytes(), np.uint32),
        "subclass": ids.view(np.recarray),
    }
    pasids = PasidAllocator(128)
    pasids.alloc_many(127)
    pasids.free_many(forms[form] if form in forms else ids.astype(form))
    assert sorted(set(range(1, 128)) - set(pasids)) == [1, 2, 5, 63, 64, 100]
    pasids.free_many([])
    assert len(pasids) == 121


@pytest.mark.parametrize("n", [1, 63, 64, 65, 128, 200])
def test_free_many_finds_a_duplicate_wherever_it_stands(n):
    pasids = PasidAllocator(320, first=0)
    pasids.alloc_many(320)
    before = snapshot(pasids)
    ids = np.arange(64, 64 + n, dtype=np.uint32)
    for place in range(n + 1):
        for twice in {0, place // 2, max(place - 1, 0), n - 1}:
            with pytest.raises(PasidDuplicate) as caught:
                pasids.free_many(np.insert(ids, place, ids[twice]))
            assert caught.value.value == ids[twice]
            assert snapshot(pasids) == before
    pasids.free_many(ids)
    assert len(pasids) == 320 - n


@pytest.mark.parametrize("place", range(1, 63))
def test_free_many_reads_every_id_of_a_whole_word(place):
    pasids = PasidAllocator(320, first=0)
    pasids.alloc_many(320)
    ids = np.arange(64, 128, dtype=np.uint32)
    ids[place] = 300
    pasids.free_many(ids)
    assert 64 + place in pasids
    assert 300 not in pasids


def test_a_failed_free_many_leaves_the_search_intact():
    pasids = PasidAllocator(1 << 13, first=0)
    pasids.alloc_many(1 << 13)
    with pytest.raises(PasidDuplicate):
        pasids.free_many([*range(1 << 13), 0])
    with pytest.raises(PasidExhausted):
        pasids.alloc()


def test_cyclic_goes_on_after_the_last_id_and_wraps():
    pasids = PasidAllocator(6, cyclic=True)
    assert [pasids.alloc() for _ in range(3)] == [1, 2, 3]
    pasids.free_many([1, 2])
    assert [pasids.alloc() for _ in range(2)] == [4, 5]
    assert pasids.alloc() == 1
    pasids.free(1)
    assert pasids.alloc() == 2
    assert pasids.alloc() == 1


def test_cyclic_stays_within_min_and_max():
    pasids = PasidAllocator(100, cyclic=True)
    pasids.alloc(min=50)
    # Starting point 51: inside the range, above it, below it.
    assert pasids.alloc(min=10, max=60) == 51
    assert pasids.alloc(min=10, max=20) == 10
    assert pasids.alloc(min=70) == 70
    # Wraps to min, not to the lowest of all.
    assert pasids.alloc(min=60, max=71) == 71
    assert pasids.alloc(min=60, max=71) == 60
    with pytest.raises(PasidExhausted):
        pasids.alloc(min=50, max=51)
    assert pasids.alloc() == 61


def test_cyclic_wraps_after_the_very_last_id():
    pasids = PasidAllocator(128, first=0, cyclic=True)
    assert pasids.alloc(min=127) == 127
    assert pasids.alloc() == 0
    pasids.free_many([0, 127])
    assert pasids.alloc_many(128).tolist() == [*range(1, 128), 0]


def test_cyclic_is_not_moved_by_free_or_a_failure():
    pasids = PasidAllocator(64, cyclic=True)
    pasids.alloc_many(10)
    pasids.free_many([3, 4, 5])
    for failing in (lambda: pasids.alloc(min=6, max=9), lambda: pasids.alloc_many(60)):
        with pytest.raises(PasidExhausted):
            failing()
    assert pasids.alloc() == 11
    assert (PasidAllocator(4, cyclic=True).cyclic, PasidAllocator(4).cyclic) == (True, False)


def test_iteration_sees_the_state_at_the_time_it_gets_there():
    pasids = PasidAllocator(1000)
    pasids.alloc_many(5)
    seen = []
    for pasid in pasids:
        seen.append(pasid)
        if pasid == 2:
            # Behind and ahead: freed, allocated, and the present one.
            pasids.free_many([1, 2, 4])
            pasids.alloc(min=700)
            pasids.alloc(max=1)
    assert seen == [1, 2, 3, 5, 700]
    assert list(pasids) == [1, 3, 5, 700]


def test_iterators_are_independent_and_keep_the_allocator_alive():
    pasids = PasidAllocator(300)
    pasids.alloc_many(299)
    first, second = iter(pasids), iter(pasids)
    assert [next(first), next(first), next(second)] == [1, 2, 1]
    del pasids
    assert list(first) == list(range(3, 300))


class Owner:
    """Something that can be referred to weakly."""


def test_an_owner_is_held_until_its_ids_are_freed():
    pasids = PasidAllocator(300)
    owner = Owner()
    alive = weakref.ref(owner)
    pasids.alloc(owner=owner)
    pasids.alloc_many(100, owner=owner)
    pasids.alloc()
    assert pasids.find(1) is pasids.find(101) is owner
    assert pasids.find(102) is None
    del owner
    pasids.free(1)
    pasids.free_many(np.arange(3, 102))
    assert alive() is not None
    assert pasids.find(2) is alive()
    pasids.free(2)
    assert alive() is None
    assert pasids.alloc() == 1
    assert pasids.find(1) is None
    gone = weakref.ref(owner := Owner())
    pasids.alloc(owner=owner)
    del owner, pasids
    assert gone() is None


def test_a_failed_free_many_keeps_the_owners():
    pasids = PasidAllocator(64)
    ids = pasids.alloc_many(4, owner="here")
    with pytest.raises(PasidDuplicate):
        pasids.free_many([*ids, 1])
    assert [pasids.find(pasid) for pasid in ids] == ["here"] * 4


@pytest.mark.parametrize("how", ["free", "free_many", "set_owner", "__setstate__"])
def test_an_owner_that_goes_may_use_the_allocator(how):
    class Chain:
        def __del__(self):
            # The freed ID is free already, and what this takes is not taken away again.
            taken.append(pasids.alloc(owner="from the finaliser"))

    taken = []
    pasids = PasidAllocator(64)
    for _ in range(3):
        pasids.alloc(owner=Chain())
    if how == "free":
        pasids.free(2)
        expected = [2]
    elif how == "set_owner":
        pasids.set_owner(2, None)
        assert pasids.find(2) is None
        expected = [4]
    elif how == "free_many":
        pasids.free_many([2, 3, 1])
        expected = [1, 2, 3]
    else:
        pasids.__setstate__(snapshot(PasidAllocator(64)))
        expected = [1, 2, 3]
    assert taken == expected
    assert [pasids.find(pasid) for pasid in taken] == ["from the finaliser"] * len(taken)
    # Otherwise the finalisers of what is left would find no list to append to.
    pasids.__setstate__(snapshot(PasidAllocator(64)))


def test_a_cycle_of_an_owner_and_its_allocator_is_collected():
    owner = Owner()
    owner.pasids = PasidAllocator(64)
    owner.pasids.alloc(owner=owner)
    alive = weakref.ref(owner)
    del owner
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("how", ["copy", "copy.copy", *range(pickle.HIGHEST_PROTOCOL + 1)])
@pytest.mark.parametrize("cyclic", [False, True])
def test_a_copy_is_equal_and_independent(how, cyclic):
    pasids = PasidAllocator(5000, cyclic=cyclic)
    pasids.alloc_many(4500, owner="many")
    pasids.free_many(np.arange(7, 4000, 3))
    pasids.reserve(4600, 4700)
    if how == "copy":
        other = pasids.copy()
    elif how == "copy.copy":
        other = copy.copy(pasids)
    else:
        other = pickle.loads(pickle.dumps(pasids, protocol=how))
    before = snapshot(pasids)
    assert snapshot(other) == before
    assert (len(other), other.available, other.size) == (
        len(pasids), pasids.available, pasids.size)  # fmt: skip
    other.free(1)
    other.reserve(4800, 4900)
    other.alloc_many(50, owner="other")
    assert snapshot(pasids) == before
    pasids.free(1)
    pasids.reserve(4800, 4900)
    pasids.alloc_many(50, owner="other")
    assert snapshot(other) == snapshot(pasids)


def test_copies_share_the_owner_objects_and_deep_copies_do_not():
    pasids = PasidAllocator(64)
    pasids.alloc(owner=Owner())
    assert pasids.copy().find(1) is copy.copy(pasids).find(1) is pasids.find(1)
    assert copy.deepcopy(pasids).find(1) is not pasids.find(1)
    pasids.find(1).pasids = pasids
    deep = copy.deepcopy(pasids)
    assert deep.find(1).pasids is deep


BITS = [0b1110, ~0b1111 & ((1 << 64) - 1)]  # four IDs: 0 allocated, 1..3 free


def packed(word):
    return word.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ((), ValueError, "values to unpack"),
        (None, TypeError, "NoneType"),
        ((0, 0, b"", b"", {}), ValueError, "a bitmap must be 8 bytes for 4 IDs, not 0"),
        ((0, 0, packed(BITS[0]), bytes(9), {}), ValueError, "must be 8 bytes for 4 IDs, not 9"),
        ((0, 0, [], packed(BITS[1]), {}), TypeError, "bytes"),
        ((0, 0, packed(BITS[0]), None, {}), TypeError, "None"),
        ((0, 0, packed(BITS[0]), packed(BITS[1]), None), TypeError, "None"),
        ((0, 0, packed(BITS[0]), packed(BITS[1]), []), TypeError, "dict"),
        ((0, 5, packed(BITS[0]), packed(BITS[1]), {}), ValueError, "cursor must be 0 to 4, not 5"),
        ((0, "", packed(BITS[0]), packed(BITS[1]), {}), TypeError, "cursor must be an integer"),
        ((0, 0, packed(BITS[0]), packed(BITS[1] | 2), {}), ValueError, "both free and reserved"),
        ((0, 0, packed(BITS[0]), packed(0), {}), ValueError, "an ID above 3 is not reserved"),
        ((0, 0, packed(BITS[0] | 16), packed(BITS[1]), {}), ValueError, "both free and reserved"),
        ((0, 0, packed(BITS[0]), packed(BITS[1]), {1: 0}), ValueError, "1 has an owner and is not"),
        ((0, 0, packed(BITS[0]), packed(BITS[1]), {4: 0}), ValueError, "must be 0 to 3, not 4"),
        ((0, 0, packed(BITS[0]), packed(BITS[1]), {"": 0}), TypeError, "must be an integer"),
    ],
)
def test_a_state_that_no_allocator_can_have_is_refused(state, error, message):
    pasids = PasidAllocator(4)
    pasids.alloc(owner="kept")
    before = snapshot(pasids)
    with pytest.raises(error) as caught:
        pasids.__setstate__(state)
    assert message in str(caught.value)
    assert snapshot(pasids) == before
    pasids.__setstate__((0, 0, packed(BITS[0]), packed(BITS[1]), {0: "zero"}))
    assert (list(pasids), pasids.find(0), pasids.available) == ([0], "zero", 3)


def test_threads_never_get_the_same_id():
    pasids = PasidAllocator(3000)
    interval = sys.getswitchinterval()
    failures = []
    kept = [[] for _ in range(4)]
    barrier = threading.Barrier(4)

    def work(mine, seed):
        rng = random.Random(seed)
        barrier.wait()
        try:
            for _ in range(400):
                ids = [pasids.alloc(owner=seed), *pasids.alloc_many(9, owner=seed).tolist()]
                if any(pasids.find(pasid) != seed for pasid in ids):
                    failures.append(ids)
                rng.shuffle(ids)
                pasids.free(ids.pop())
                pasids.free_many(ids[1:])
                mine.append(ids[0])
        except Exception as error:
            failures.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=work, args=(mine, i), daemon=True)
            for i, mine in enumerate(kept)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
    assert len(pasids) == 1600
    assert sorted(pasid for mine in kept for pasid in mine) == list(pasids)


def test_no_memory_changes_nothing():
    # CPython's own means of making the nth request for memory fail. The array is uint32 so that
    # numpy has no part in it: its where() returns NULL without an exception when memory lacks.
    testcapi = pytest.importorskip("_testcapi")
    pasids = PasidAllocator(4096)
    pasids.alloc_many(1000, owner="many")
    ids = np.arange(300, 600, dtype=np.uint32)
    operations = [
        lambda: pasids.alloc(),
        lambda: pasids.alloc(owner=ids),
        lambda: pasids.alloc_many(900),
        lambda: pasids.alloc_many(900, owner=ids),
        lambda: pasids.free(700),
        lambda: pasids.free_many(ids),
        lambda: pasids.reserve(2000, 2500),
        lambda: pasids.set_owner(700, ids),
        lambda: pasids.copy(),
    ]
    start = snapshot(pasids)
    refusals = []
    for operation in operations:
        refused = 0
        for nth in range(4000):
            pasids.__setstate__(start)
            testcapi.set_nomemory(nth, nth + 1)
            try:
                operation()
                done = True
            except MemoryError:
                done = False
            finally:
                testcapi.remove_mem_hooks()
            if done:
                break
            refused += 1
            assert snapshot(pasids) == start
        assert done
        refusals.append(refused)
    # which of them need memory differs by Python: 3.14 keeps free ints, reserve() needs none
    assert sum(map(bool, refusals)) >= 4, refusals


def test_the_representation_counts():
    assert repr(used_allocator()) == (
        "<PasidAllocator of 16 IDs: 4 allocated, 5 reserved, 7 free>")  # fmt: skip


def test_the_examples_in_the_docstrings_are_true():
    result = doctest.testmod(compiled)
    assert result.attempted > 10
    assert result.failed == 0
