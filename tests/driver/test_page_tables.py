"""Page tables as a driver writes them (F49 to F56), by the kernel's numbers; the Smmu judges."""

import errno

import numpy as np
import pytest
from driverhalf import refused

from smmufast import Caches
from smmufast._driver.tables import Pages, PageTable
from smmufast.iommu import Prot

RAM = 0x8000_0000
K, M, G, T = 1 << 10, 1 << 20, 1 << 30, 1 << 40


@pytest.fixture
def domain(systems):
    device = systems(caches=Caches.server).device(1)
    one = device.paging_domain()
    device.attach(one)
    one.device = device
    return one


def table_of(system, **more):
    return PageTable(system.pages, **more)


@pytest.mark.parametrize(
    ("granule", "ias", "sizes", "start"),
    [(4 * K, 48, (4 * K, 2 * M, G), 0), (4 * K, 39, (4 * K, 2 * M, G), 1),
     (4 * K, 30, (4 * K, 2 * M), 2), (16 * K, 48, (16 * K, 32 * M), 0),
     (16 * K, 47, (16 * K, 32 * M), 1), (16 * K, 36, (16 * K, 32 * M), 2),
     (64 * K, 48, (64 * K, 512 * M), 1), (64 * K, 42, (64 * K, 512 * M), 2)],
)  # fmt: skip
def test_f49_granules_give_page_sizes_and_the_level_where_walks_start(
    systems, granule, ias, sizes, start
):
    table = table_of(systems(), granule=granule, ias=ias)
    assert table.start_level == start
    offered = [1 << bit for bit in range(64) if table.page_sizes >> bit & 1]
    assert offered == [size for size in sizes if size <= 1 << ias]


def test_f50_what_map_refuses(domain):
    system = domain.system
    before = system.pages.in_use, system.pages.blocks
    for arguments in ((0x1001, RAM, 0x1000), (0x1000, RAM + 1, 0x1000), (0x1000, RAM, 0x1800)):
        refused(errno.EINVAL, domain.map, *arguments)
    refused(errno.EINVAL, domain.map, 0x1000, RAM, 0x1000, 0)
    refused(errno.EINVAL, domain.map, 0x1000, RAM, 0x1000, Prot.NOEXEC)
    refused(errno.ERANGE, domain.map, 1 << 48, RAM, 0x1000)
    refused(errno.ERANGE, domain.map, (1 << 48) - 0x1000, RAM, 0x2000)
    refused(errno.ERANGE, domain.map, 0x1000, 1 << 48, 0x1000)
    domain.map(0x1000, RAM, 0)  # nothing
    assert (system.pages.in_use, system.pages.blocks, domain.mapped) == (*before, 0)
    domain.map(0x3000, RAM, 0x1000)
    middle = system.pages.in_use
    refused(errno.EEXIST, domain.map, 0x1000, RAM, 0x4000)
    assert (domain.mapped, system.pages.in_use) == (0x1000, middle)
    assert domain.iova_to_phys(0x1000) == 0
    system.pages.fail_after(0)
    refused(errno.ENOMEM, domain.map, 1 << 40, RAM, 0x1000)
    system.pages.fail_after(None)
    assert system.pages.in_use == middle


def test_f51_a_block_takes_the_place_of_a_table_only_when_it_is_empty(domain):
    domain.map(2 * M, RAM, 4 * K)
    domain.map(2 * M + 8 * K, RAM, 4 * K)
    refused(errno.EEXIST, domain.map, 2 * M, RAM, 2 * M)
    assert domain.device.translate(2 * M + 8 * K).pa == RAM
    domain.unmap(2 * M, 4 * K)
    refused(errno.EEXIST, domain.map, 2 * M, RAM, 2 * M)
    domain.unmap(2 * M + 8 * K, 4 * K)
    domain.map(2 * M, RAM, 2 * M)
    assert domain.device.translate(2 * M + 0x12345).page_size == 2 * M


def test_f52_unmap_returns_bytes_and_stops_at_the_first_hole(domain):
    domain.map(0x1000, RAM, 0x2000)
    domain.map(0x4000, RAM, 0x1000)
    assert domain.unmap(0x1000, 0x4000) == 0x2000
    assert domain.iova_to_phys(0x4000) == RAM
    assert domain.unmap(0x1000, 0x1000) == 0
    assert domain.unmap(0x4001, 0x1000) == 0
    assert domain.unmap(1 << 50, 0x1000) == 0
    domain.map(4 * M, RAM, 4 * M)
    assert domain.unmap(4 * M, 4 * K) == 2 * M  # a block goes as a whole
    assert domain.device.translate(6 * M).pa == RAM + 2 * M
    assert not domain.device.translate(4 * M + 0x10_0000)


def leaf_sizes(device, start, size):
    sizes, at = [], start
    while at < start + size:
        result = device.translate(at)
        sizes.append(result.page_size)
        at += result.page_size
    return sizes


@pytest.mark.parametrize(
    ("iova", "pa", "size", "sizes"),
    [(0, RAM, G, [G]), (0, RAM + 2 * M, G, [2 * M] * 512), (2 * M, RAM + 2 * M, 2 * M, [2 * M]),
     (2 * M - 4 * K, RAM - 4 * K, 2 * M + 8 * K, [4 * K, 2 * M, 4 * K]),
     (0x10000, RAM, 0x3000, [4 * K] * 3), (4 * K, RAM, 2 * M, [4 * K] * 512)],
)  # fmt: skip
def test_f53_the_largest_page_that_fits_is_chosen(domain, iova, pa, size, sizes):
    domain.map(iova, pa, size)
    assert leaf_sizes(domain.device, iova, size) == sizes


def test_f53_a_mixed_range_is_exactly_twenty_entries(domain):
    first, last = 0x3_FE40_0000, 0x4_C060_0000
    domain.map(first, first, last - first)
    sizes = leaf_sizes(domain.device, first, last - first)
    assert len(sizes) == 20
    assert sizes == [2 * M] * 14 + [G] * 3 + [2 * M] * 3


def test_f54_iova_to_phys_reads_the_tables(domain):
    assert domain.iova_to_phys(0x1234) == 0
    domain.map(0x1000, RAM, 0x1000)
    domain.map(2 * G, RAM * 2, G)
    assert domain.iova_to_phys(0x1234) == RAM + 0x234
    assert domain.iova_to_phys(2 * G + 0x1234_5678) == RAM * 2 + 0x1234_5678
    assert domain.iova_to_phys(1 << 60) == 0


def test_f55_what_was_written_is_dirty_until_it_is_cleared(systems):
    device = systems(caches=Caches.server).device(1)
    domain = device.paging_domain(dirty=True)
    device.attach(domain)
    domain.map(0, RAM, 64 * K)
    domain.read_dirty(0, 64 * K)
    assert not domain.read_dirty(0, 64 * K).any()
    device.translate(0x3000)  # a read
    assert device.translate(0x5000, write=True) and device.translate(0x9FFF, write=True)
    dirty = domain.read_dirty(0, 64 * K, clear=False)
    assert np.flatnonzero(dirty).tolist() == [5, 9]
    assert np.flatnonzero(domain.read_dirty(0, 64 * K)).tolist() == [5, 9]
    assert not domain.read_dirty(0, 64 * K).any()
    assert device.translate(0x5000, write=True)  # marked again, though it was cached
    assert np.flatnonzero(domain.read_dirty(0, 64 * K)).tolist() == [5]
    refused(errno.EINVAL, domain.read_dirty, 0, 0)
    refused(errno.EINVAL, domain.read_dirty, 1 << 48, 0x1000)
    refused(errno.EOPNOTSUPP, device.paging_domain().read_dirty, 0, 0x1000)


def test_f56_the_walk_honours_what_the_tables_say(domain):
    device = domain.device
    domain.map(0x1000, RAM, 0x1000, Prot.READ)
    domain.map(0x2000, RAM, 0x1000, Prot.READ | Prot.WRITE | Prot.NOEXEC)
    domain.map(0x3000, RAM, 0x1000, Prot.READ | Prot.PRIV)
    wanted = [
        (0x1000, {}, None), (0x1000, {"write": True}, "F_PERMISSION"),
        (0x2000, {"write": True}, None), (0x2000, {"instr": True}, "F_PERMISSION"),
        (0x3000, {"priv": True}, None), (0x3000, {}, "F_PERMISSION"),
        (0x4000, {}, "F_TRANSLATION"), (1 << 48, {}, "F_TRANSLATION"),
    ]  # fmt: skip
    for iova, how, event in wanted:
        result = device.translate(iova, **how)
        assert (result.event.name if result.event else None) == event, (hex(iova), how)


def test_f56_64k_tables_reach_52_bits(systems):
    system = systems()
    device = system.device(1)
    domain = device.paging_domain(granule=64 * K)
    assert (domain.ias, domain.oas) == (52, 52)
    device.attach(domain)
    domain.map(0xF_0000_0001_0000, 0xA_0000_0002_0000, 64 * K)
    assert device.translate(0xF_0000_0001_1234).pa == 0xA_0000_0002_1234


CONFIGURATIONS = [
    (sizes, ias, oas)
    for sizes in ((4 * K, 2 * M, G), (16 * K, 32 * M), (64 * K, 512 * M))
    for oas in (32, 36, 40, 42, 44, 48)
    for ias in (32, 36, 40, 42, 44, 48)
    if ias <= oas
]


class Flushed(PageTable):
    """A page table that remembers what it was told to flush."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.flushes = []

    def flush(self, first, last, page_lg2, tables):
        self.flushes.append((first, last, page_lg2, tables))
        assert self.iova_to_phys(first) == 0


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("sizes", "ias", "oas"), CONFIGURATIONS,
    ids=[f"{sizes[0] // K}K-{ias}-{oas}" for sizes, ias, oas in CONFIGURATIONS],
)  # fmt: skip
def test_f49_the_kernels_63_configurations(systems, stage, sizes, ias, oas):
    system = systems()
    granule = sizes[0]
    start = system.pages.in_use
    table = Flushed(system.pages, stage=stage, granule=granule, ias=ias, oas=oas)
    table.active = True
    for iova in (42, G + 42, 2 * G + 42):
        assert table.iova_to_phys(iova) == 0
    usable = [size for size in sizes if size <= 1 << ias]
    for index, size in enumerate(usable):
        iova = index * G // size * size if size <= G else index * size
        if iova + size > 1 << ias:
            continue
        table.map(iova, iova, size, Prot.READ | Prot.WRITE | Prot.NOEXEC | Prot.CACHE)
        refused(errno.EEXIST, table.map, iova, iova + size, size)
        assert table.iova_to_phys(iova + 42) == iova + 42
        assert table.unmap(iova, size) == size
        assert table.iova_to_phys(iova + 42) == 0
        table.map(iova, iova, size, Prot.WRITE)
        assert table.iova_to_phys(iova + 42) == iova + 42
        assert table.unmap(iova, size) == size
    largest = usable[-1]
    last = (1 << ias) - largest
    table.map(last, last, largest)
    assert table.mapped == largest
    assert table.unmap(last, largest) == largest
    assert table.mapped == 0
    # what was flushed were pages of sizes that there are, and was asked for while they were gone
    sizes_flushed = {1 << page_lg2 for _, _, page_lg2, _ in table.flushes}
    assert sizes_flushed == set(usable) and all(size & table.page_sizes for size in sizes_flushed)
    assert all(first <= last < 1 << ias for first, last, _, _ in table.flushes)
    table.close()
    assert system.pages.in_use == start


def test_one_call_maps_gigabytes_and_frees_every_table(systems):
    system = systems()
    pages = Pages(system.memory, 1 << 40, 1 << 40)
    table = PageTable(pages, page_sizes=4096)
    table.map(0, RAM, 4 * G)
    assert table.mapped == 4 * G and table.table_bytes == pages.in_use
    assert table.iova_to_phys(3 * G + 5) == RAM + 3 * G + 5
    assert table.unmap(0, 4 * G) == 4 * G
    table.close()
    assert (pages.in_use, pages.blocks) == (0, 0)
