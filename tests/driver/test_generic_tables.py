"""The generic page-table properties of the kernel's tests, at every format; the SMMU is asked too.

Section 5.4 of the facts.  increase_level is left out: the number of levels follows from `ias` and
does not change.  What generic_pt calls -EADDRINUSE is EEXIST here, as F50 has it.
"""

import random
from itertools import pairwise

import pytest
from tablesystem import System

from smmufast.errors import Exists

K, M, G = 1 << 10, 1 << 20, 1 << 30
FORMATS = [
    {"stage": stage, "granule": granule, "ias": ias, "oas": oas}
    for stage in (1, 2)
    for granule, ias, oas in (
        (4 * K, 48, 48), (4 * K, 39, 40), (16 * K, 47, 48), (16 * K, 36, 40), (64 * K, 48, 48),
        (64 * K, 52, 52), (64 * K, 42, 44),
    )
]  # fmt: skip
OA = 0x74A7_1445_DEAD_BEEF


def name(form):
    return "s{stage}-{granule}-{ias}-{oas}".format(**form)


# the addresses and sizes of some tests are those of 4 KiB
of_4k = pytest.mark.parametrize(
    "system", [form for form in FORMATS if form["granule"] == 4 * K], indirect=True, ids=name
)


@pytest.fixture(params=FORMATS, ids=name)
def system(request):
    """A page table and its SMMU; in the end no table page is left."""
    one = System(size=1 << 27, **request.param)
    yield one
    one.table.close()
    assert (one.pages.blocks, one.pages.in_use) == (0, 0)


def sizes_of(table):
    return [1 << bit for bit in range(64) if table.page_sizes >> bit & 1]


def output(table, size):
    """The kernel's test address, aligned, within what the format has."""
    return OA & ((1 << table.oas) - 1) & -size & ~(size if size >> (table.oas - 1) else 0)


def check(system, iova, pa, size, page=None, step=None):
    """Every so-many bytes of a range go where they should, in pages of one size."""
    step = step or system.table.granule
    places = list(range(iova, iova + size, step))
    found, lg2, event = system.many(places)
    assert not event.any()
    assert found.tolist() == [pa + at - iova for at in places]
    assert [system.table.iova_to_phys(at + 5) for at in places[:: max(1, len(places) // 64)]] == [
        pa + at - iova + 5 for at in places[:: max(1, len(places) // 64)]
    ]
    if page is not None:
        assert {1 << int(bits) for bits in lg2} == {page}


def nothing(system, places):
    _, _, event = system.many(list(places))
    assert (event == 0x10).all()
    assert all(system.table.iova_to_phys(at) == 0 for at in places)


def test_map_simple(system):
    table = system.table
    for size in sizes_of(table):
        iova = size * 256
        if iova + size > 1 << table.ias:
            iova = (1 << table.ias) - size
        pa = output(table, size)
        table.map(iova, pa, size)
        check(system, iova, pa, size, page=size, step=max(table.granule, size // 2048))
        assert table.mapped == size
        assert table.unmap(iova, size) == size
        nothing(system, (iova, iova + size - 1))
        assert table.mapped == 0
    every = sizes_of(table)
    at, places = 0, []
    for size in reversed(every):  # each size once, all at the same time
        table.map(at, output(table, size), size)
        places.append((at, size))
        at += size * 2
    for at, size in places:
        check(system, at, output(table, size), size, page=size, step=max(table.granule, size // 64))
    for at, size in places:
        assert table.unmap(at, size) == size
    assert table.mapped == 0


def test_map_table_to_oa(system):
    table = system.table
    sizes = sizes_of(table)
    for small, large in pairwise(sizes):
        count = large // small
        iova, pa = large, output(table, large)
        if iova + large > 1 << table.ias:
            continue
        for n in range(count):
            table.map(iova + n * small, pa + n * small, small)
        check(system, iova, pa, large, page=small, step=max(small, large // 2048))
        with pytest.raises(Exists):
            table.map(iova, pa, large)
        half = count // 2
        assert table.unmap(iova, half * small) == half * small
        with pytest.raises(Exists):
            table.map(iova, pa, large)
        for n in range(half, count):
            assert table.unmap(iova + n * small, small) == small
        table.map(iova, pa, large)  # in the place of the table that is left
        check(system, iova, pa, large, page=large, step=max(small, large // 2048))
        assert table.unmap(iova, large) == large
        assert table.mapped == 0


def test_unmap_split(system):
    table = system.table
    sizes = sizes_of(table)
    for small, large in pairwise(sizes):
        if 3 * large > 1 << table.ias or 2 * large > 1 << table.oas:
            continue
        table.map(large, 0, large)
        table.map(2 * large, large, large)
        assert table.unmap(large, small) == large
        nothing(system, (large, large + small, 2 * large - 1))
        check(system, 2 * large, large, large, page=large, step=max(small, large // 512))
        assert table.unmap(2 * large, large) == large
        assert table.mapped == 0


def test_random_map(system):
    """1000 random ranges: what is in the way is refused and taken away, and the range is mapped."""
    table = system.table
    rng = random.Random(7)
    page = table.granule
    window = min(G, 1 << table.ias) if page > 4 * K else 64 * M
    base = rng.randrange(0, (1 << table.ias) - window + 1, window)
    mapped = {}  # first: (last + 1, pa)
    for _ in range(1000):
        count = 1 << rng.randrange(1, (window // page).bit_length() - 1)
        first, last = sorted(rng.sample(range(0, window // page), 2))
        last = min(last, first + count)
        iova, size = base + first * page, (last - first) * page
        pa = rng.randrange(0, (1 << table.oas) - size, page)
        if rng.random() < 0.5:
            pa = min(pa & -window | iova & (window - 1), (1 << table.oas) - size & -page)
        taken = [at for at, (end, _) in mapped.items() if at < iova + size and iova < end]
        before = table.mapped, table.table_bytes
        if taken:
            with pytest.raises(Exists):
                table.map(iova, pa, size)
            assert (table.mapped, table.table_bytes) == before
        for at in taken:
            end, _ = mapped.pop(at)
            assert table.unmap(at, end - at) == end - at
        table.map(iova, pa, size)
        mapped[iova] = iova + size, pa
        check(system, iova, pa, size, step=max(page, size // 16 & -page))
        edges = [at for at in (iova - page, iova + size) if 0 <= at >> table.ias < 1]
        for at in edges:
            if not any(one <= at < end for one, (end, _) in mapped.items()):
                nothing(system, (at,))
        assert table.mapped == sum(end - at for at, (end, _) in mapped.items())
    for at, (end, _) in mapped.items():
        assert table.unmap(at, end - at) == end - at
    assert table.mapped == 0


@of_4k
def test_pgsize_boundary(system):
    iova, pa, size = 0xFEF8_0000, 0x20_8B95_D000, 0x2_0000
    system.table.map(iova, pa, size)
    check(system, iova, pa, size, page=4 * K)
    assert system.table.unmap(iova, size) == size


@of_4k
def test_mixed(system):
    first, last = 0x3_FE40_0000, 0x4_C060_0000
    system.table.map(first, first, last - first)
    found, at = [], first
    while at < last:
        _, lg2, event = system.many([at])
        assert event[0] == 0
        found.append(1 << int(lg2[0]))
        at += found[-1]
    assert found == [2 * M] * 14 + [G] * 3 + [2 * M] * 3
    assert len(found) == 20
    assert system.table.unmap(first, last - first) == last - first
