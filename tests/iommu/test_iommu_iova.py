"""IovaAllocator against a slow twin; DmaMapper over a stand-in for a domain."""

import doctest
import errno
import random
import sys
import threading
from functools import partial
from itertools import pairwise

import pytest
from reference_iommu_pasid import IovaTwin

from smmufast.errors import Exists, InvalidArgument, IommuError, NoSpace
from smmufast.iommu import iova
from smmufast.iommu.iova import DmaMapper, IovaAllocator

PAGE = 4096


def outcome(call):
    """What a call returns, or the class of its error."""
    try:
        return call()
    except IommuError as error:
        return type(error)


def holes(iovas):
    """The free ranges, checked to be sorted, apart from each other and filed under their size."""
    found = [(first, iovas._holes[first]) for first in iovas._starts]
    assert len(found) == len(iovas._holes)
    for (_, last), (first, _) in pairwise(found):
        assert last + 1 < first
    by_size = [first for starts in iovas._by_size for first in starts]
    assert sorted(by_size) == iovas._starts
    assert all(starts == sorted(starts) for starts in iovas._by_size)
    return found


def free_granules(iovas):
    return {
        granule
        for first, last in holes(iovas)
        for granule in range(first // iovas.granule, (last + 1) // iovas.granule)
    }


@pytest.mark.parametrize("granule", [1, 4096, 65536])
@pytest.mark.parametrize("seed", range(6))
def test_a_random_program_does_what_the_twin_does(seed, granule):
    rng = random.Random(seed)
    first = rng.choice([0, 1, 5]) * granule
    last = first + rng.choice([40, 130, 257]) * granule - 1
    align_limit = rng.choice([None, None, granule * 4, granule // 2 or 1])
    iovas = IovaAllocator(first, last, granule, align_limit=align_limit)
    twin = IovaTwin(first, last, granule, align_limit)
    errors, done = set(), 0
    for _ in range(600):
        kind = rng.choice(["alloc"] * 6 + ["free"] * 5 + ["reserve"])
        if kind == "alloc":
            size = rng.choice([0, 1, granule, rng.randrange(1, 9 * granule), 40 * granule])
            align = rng.choice([None, None, 1, granule, granule * 4, granule * 64, 3, 0, -granule])
            limit = rng.choice([None, None, -1, rng.randrange(last + 2 * granule)])
            calls = [
                lambda each, s=size, a=align, x=limit: each.alloc(s, align=a, limit=x)
                for _ in range(2)
            ]
        elif kind == "free":
            taken = sorted(twin.taken)
            at = rng.choice(taken) if taken and rng.random() < 0.95 else rng.randrange(last)
            size = twin.taken.get(at, granule) - rng.choice([0, 0, granule - 1, granule])
            calls = [lambda each, a=at, s=size: each.free(a, s) for _ in range(2)]
        else:
            low = rng.randrange(-granule, last + granule)
            high = low + rng.randrange(-1, 3 * granule)
            calls = [lambda each, a=low, b=high: each.reserve(a, b) for _ in range(2)]
        before = holes(iovas), list(iovas)
        results = [
            outcome(partial(call, each)) for call, each in zip(calls, (iovas, twin), strict=True)
        ]
        assert results[0] == results[1]
        if isinstance(results[0], type):
            errors.add(results[0])
            assert (holes(iovas), list(iovas)) == before
        else:
            done += 1
        assert free_granules(iovas) == twin.free_granules
        assert list(iovas) == sorted(twin.taken.items())
        assert iovas.reserved == twin.reserved
        assert iovas.available == len(twin.free_granules) * granule
        assert len(iovas) == len(twin.taken)
    assert errors == {InvalidArgument, NoSpace}
    assert done > 100


def test_addresses_come_from_the_top_down():
    iovas = IovaAllocator(PAGE, (1 << 32) - 1, PAGE)
    assert [iovas.alloc(PAGE) for _ in range(3)] == [0xFFFFF000, 0xFFFFE000, 0xFFFFD000]
    iovas.free(0xFFFFE000, PAGE)
    assert iovas.alloc(1) == 0xFFFFE000


def test_a_range_is_aligned_to_its_size_up_to_a_limit():
    iovas = IovaAllocator(0, (1 << 32) - 1, PAGE)
    assert iovas.alloc(3 * PAGE) == 0xFFFFC000
    assert iovas.alloc(2 << 20) == 0xFFC00000
    assert iovas.alloc(PAGE) == 0xFFFFF000
    iovas = IovaAllocator(0, (1 << 32) - 1, PAGE, align_limit=2 * PAGE)
    assert iovas.alloc(3 * PAGE) == 0xFFFFC000
    assert iovas.alloc(5 * PAGE) == 0xFFFF6000
    assert iovas.alloc(5 * PAGE, align=1) == 0xFFFF1000
    assert iovas.alloc(PAGE, align=1 << 20) == 0xFFF00000


def test_a_device_of_32_bits_gets_addresses_that_it_reaches():
    iovas = IovaAllocator(0, (1 << 48) - 1, PAGE)
    low = [iovas.alloc(PAGE, limit=(1 << 32) - 1) for _ in range(2)]
    assert low == [0xFFFFF000, 0xFFFFE000]
    assert iovas.alloc(PAGE) == (1 << 48) - PAGE
    assert iovas.alloc(PAGE, limit=(1 << 32) - 2) == 0xFFFFD000
    with pytest.raises(NoSpace) as caught:
        iovas.alloc(1 << 32, limit=(1 << 32) - 1)
    assert caught.value.errno == errno.ENOSPC


def test_reserved_addresses_are_never_handed_out():
    iovas = IovaAllocator(0, 16 * PAGE - 1, PAGE)
    iovas.reserve(8 * PAGE + 5, 9 * PAGE)  # whole granules
    taken = {iovas.alloc(PAGE) // PAGE for _ in range(14)}
    assert taken == {*range(16)} - {8, 9}
    for call in (
        lambda: iovas.free(8 * PAGE, PAGE),
        lambda: iovas.reserve(0, 0),
        lambda: iovas.reserve(7 * PAGE, 9 * PAGE),
        lambda: iovas.reserve(16 * PAGE, 17 * PAGE),
        lambda: iovas.reserve(5, 4),
    ):
        assert outcome(call) is InvalidArgument
    assert outcome(lambda: iovas.alloc(1)) is NoSpace


def test_regions_that_overlap_are_reserved_once_as_in_linuxs_reserve_iova():
    iovas = IovaAllocator(0, 64 * PAGE - 1, PAGE)
    for first, last in ((8, 9), (8, 9), (9, 12), (6, 8), (20, 21), (5, 30), (40, 40), (31, 31)):
        iovas.reserve(first * PAGE, (last + 1) * PAGE - 1)
    assert iovas.reserved == [(5 * PAGE, 32 * PAGE - 1), (40 * PAGE, 41 * PAGE - 1)]
    assert holes(iovas) == [
        (0, 5 * PAGE - 1), (32 * PAGE, 40 * PAGE - 1), (41 * PAGE, 64 * PAGE - 1)
    ]  # fmt: skip
    at = iovas.alloc(PAGE)
    assert at == 63 * PAGE
    allocated, outside = "is allocated", "is not within <IovaAllocator 0x0 to 0x3ffff"
    for first, last, why in (
        (40, 63, allocated), (30, 64, outside), (63, 63, allocated), (64, 70, outside),
        (-1, 3, outside),
    ):  # fmt: skip
        before = holes(iovas), iovas.reserved
        with pytest.raises(InvalidArgument, match=why) as caught:
            iovas.reserve(first * PAGE, last * PAGE)
        assert caught.value.argument == "first"
        assert (holes(iovas), iovas.reserved) == before
    iovas.free(at, PAGE)
    iovas.reserve(40 * PAGE, 63 * PAGE)
    assert [iovas.alloc(PAGE) // PAGE for _ in range(13)] == [*range(39, 31, -1), *range(4, -1, -1)]
    with pytest.raises(NoSpace):
        iovas.alloc(1)


def test_a_range_is_given_back_whole_and_once():
    iovas = IovaAllocator(0, 64 * PAGE - 1, PAGE)
    at = iovas.alloc(3 * PAGE)
    for wrong in ((at, PAGE), (at + PAGE, 2 * PAGE), (at, 4 * PAGE), (0, PAGE), (at, 0)):
        with pytest.raises(InvalidArgument) as caught:
            iovas.free(*wrong)
        assert caught.value.errno == errno.EINVAL
    assert iovas.find(at) == 3 * PAGE
    iovas.free(at, 2 * PAGE + 1)
    assert iovas.find(at) == 0
    assert outcome(lambda: iovas.free(at, 3 * PAGE)) is InvalidArgument
    assert holes(iovas) == [(0, 64 * PAGE - 1)]


@pytest.mark.parametrize(
    "arguments",
    [(0, PAGE, PAGE), (0, -1, PAGE), (PAGE, PAGE - 1, PAGE), (1, 2 * PAGE - 1, PAGE),
     (-PAGE, PAGE - 1, PAGE), (0, 11, 3), (0, 3, 0)],
)  # fmt: skip
def test_ranges_that_are_not_of_whole_granules_are_refused(arguments):
    with pytest.raises(InvalidArgument):
        IovaAllocator(*arguments)
    with pytest.raises(InvalidArgument):
        IovaAllocator(0, PAGE - 1, PAGE, align_limit=3 * PAGE)


def test_many_holes_of_a_smaller_size_are_not_searched():
    # each hole looked at is one look into the dictionary of holes
    iovas = IovaAllocator(0, (1 << 40) - 1, PAGE)
    for size in (1, 2, 3, 30):
        for at in [iovas.alloc(size * PAGE) for _ in range(2000)][::2]:
            iovas.free(at, size * PAGE)
    looks = []

    class Counted(dict):
        def __getitem__(self, key):
            looks.append(key)
            return super().__getitem__(key)

    iovas._holes = Counted(iovas._holes)
    assert len(holes(iovas)) > 3999
    for size in (1, 2, 3, 29, 30, 31, 32, 500, 5000):
        looks.clear()
        iovas.alloc(size * PAGE)
        assert len(looks) < 25, size


def test_threads_never_get_the_same_addresses():
    iovas = IovaAllocator(0, (1 << 32) - 1, PAGE)
    kept = [[] for _ in range(4)]
    barrier = threading.Barrier(4)

    def work(mine, seed):
        rng = random.Random(seed)
        barrier.wait()
        for _ in range(300):
            size = rng.randrange(1, 5 * PAGE)
            mine.append((iovas.alloc(size), size))
            if rng.random() < 0.5:
                iovas.free(*mine.pop(rng.randrange(len(mine))))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
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
    ranges = sorted(each for mine in kept for each in mine)
    assert [at for at, _ in ranges] == [at for at, _ in iovas]
    assert all(a + size <= b for (a, size), (b, _) in pairwise(ranges))
    assert iovas.available == (1 << 32) - sum(-(-size // PAGE) * PAGE for _, size in ranges)


# --- DmaMapper ---


class Domain:
    """A stand-in for a paging domain: a dictionary of granules, for this test only."""

    def __init__(self, granule=PAGE):
        self.granule = granule
        self.pages = {}
        self.log = []

    def map(self, iova, pa, size, prot):
        assert iova % self.granule == pa % self.granule == size % self.granule == 0
        granules = range(0, size, self.granule)
        if any(iova + at in self.pages for at in granules):
            raise Exists("iova", iova)
        self.pages |= {iova + at: (pa + at, prot) for at in granules}
        self.log.append(("map", iova, size))

    def unmap(self, iova, size):
        for at in range(0, size, self.granule):
            del self.pages[iova + at]
        self.log.append(("unmap", iova, size))
        return size

    def translate(self, iova):
        offset = iova % self.granule
        return self.pages[iova - offset][0] + offset


@pytest.mark.parametrize("granule", [4096, 65536])
def test_a_buffer_of_any_place_and_size_is_mapped_and_unmapped(granule):
    domain = Domain(granule)
    iovas = IovaAllocator(granule, (1 << 40) - 1, granule)
    mapper = DmaMapper(domain, iovas)
    rng = random.Random(granule)
    buffers = []
    for _ in range(200):
        pa, size = rng.randrange(1 << 40), rng.randrange(1, 5 * granule)
        at = mapper.dma_map(pa, size, 1)
        assert domain.translate(at) == pa
        assert domain.translate(at + size - 1) == pa + size - 1
        buffers.append((at, size))
    assert {prot for _, prot in domain.pages.values()} == {1}
    rng.shuffle(buffers)
    for at, size in buffers:
        mapper.dma_unmap(at, size)
    assert domain.pages == {}
    assert (len(iovas), iovas.available) == (0, (1 << 40) - granule)


def test_a_buffer_is_unmapped_before_its_iova_is_free():
    domain = Domain()
    iovas = IovaAllocator(0, 16 * PAGE - 1, PAGE)
    mapper = DmaMapper(domain, iovas)
    at = mapper.dma_map(0x1234, PAGE)
    assert domain.pages[at & -PAGE] == (0x1000, iova.READ_WRITE)
    held = []
    unmap = domain.unmap
    domain.unmap = lambda *arguments: held.append(len(iovas)) or unmap(*arguments)
    mapper.dma_unmap(at, PAGE)
    assert held == [1]
    assert len(iovas) == 0


def test_a_map_that_fails_gives_its_iova_back():
    domain = Domain()
    iovas = IovaAllocator(0, 16 * PAGE - 1, PAGE)
    domain.pages[15 * PAGE] = None
    mapper = DmaMapper(domain, iovas)
    with pytest.raises(Exists):
        mapper.dma_map(0, PAGE)
    assert len(iovas) == 0
    with pytest.raises(InvalidArgument):
        mapper.dma_map(0, 0)
    with pytest.raises(NoSpace):
        mapper.dma_map(0, 17 * PAGE)
    assert domain.log == []


def test_what_is_not_mapped_is_not_unmapped():
    domain = Domain()
    mapper = DmaMapper(domain, IovaAllocator(0, 64 * PAGE - 1, PAGE))
    at = mapper.dma_map(0x1800, 2 * PAGE)
    for wrong in ((at, PAGE), (at + PAGE, PAGE), (0, PAGE), (at, 5 * PAGE)):
        with pytest.raises(InvalidArgument):
            mapper.dma_unmap(*wrong)
    assert domain.log == [("map", at - 0x800, 3 * PAGE)]
    mapper.dma_unmap(at, 2 * PAGE)
    with pytest.raises(InvalidArgument):
        mapper.dma_unmap(at, 2 * PAGE)


def test_a_mapper_for_a_narrow_device_stays_below_its_limit():
    domain = Domain()
    mapper = DmaMapper(domain, IovaAllocator(0, (1 << 48) - 1, PAGE), limit=(1 << 32) - 1)
    assert mapper.dma_map(0x5000, 100) == 0xFFFFF000


def test_the_examples_in_the_docstrings_are_true():
    tried = doctest.testmod(iova)
    assert (tried.failed, tried.attempted) == (0, 5)


def test_the_representation_counts():
    iovas = IovaAllocator(0x1000, 0xFFFF, PAGE)
    iovas.alloc(1)
    assert repr(iovas) == "<IovaAllocator 0x1000 to 0xffff: 1 ranges>"
