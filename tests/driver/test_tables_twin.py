"""PageTable against its twin and against the SMMU: random calls, every granule and stage.

What is compared after each call is all of memory: each descriptor of each table.
"""

import random
from functools import partial

import pytest
from reference_iommu_tables import CACHE, MMIO, NOEXEC, PRIV, READ, WRITE, RefusedError, Twin
from tablesystem import System, same

from smmufast._driver.tables import vectors
from smmufast.errors import IommuError

CONFIGURATIONS = [
    {"stage": 1, "granule": 4096},
    {"stage": 1, "granule": 4096, "ias": 39, "oas": 40, "contiguous": True},
    {"stage": 1, "granule": 4096, "ias": 32, "dirty": True, "contiguous": True},
    {"stage": 1, "granule": 4096, "page_sizes": 0x4000_1000},
    {"stage": 1, "granule": 16384, "ias": 47},
    {"stage": 1, "granule": 16384, "contiguous": True, "dirty": True},
    {"stage": 1, "granule": 65536, "oas": 48},
    {"stage": 1, "granule": 65536, "ias": 52, "oas": 52, "contiguous": True},
    {"stage": 1, "granule": 65536, "ias": 29, "oas": 32},
    {"stage": 1, "granule": 4096, "page_sizes": 0x4020_0000},
    {"stage": 2, "granule": 4096, "ias": 40, "oas": 40},
    {"stage": 2, "granule": 4096, "contiguous": True},
    {"stage": 2, "granule": 16384, "ias": 48, "contiguous": True},
    {"stage": 2, "granule": 16384, "ias": 40, "oas": 40, "fwb": True},
    {"stage": 2, "granule": 65536, "ias": 44, "oas": 44},
    {"stage": 2, "granule": 65536, "ias": 52, "oas": 52, "contiguous": True},
]


def name(configuration):
    return ",".join(f"{key}={value}" for key, value in configuration.items())


def both(call, other):
    """What two calls return, which is the same, or the errno that both raise."""
    try:
        wanted = other()
    except RefusedError as refused:
        with pytest.raises(IommuError) as raised:
            call()
        assert raised.value.errno == refused.errno
        return refused
    found = call()
    assert found == wanted
    return found


class Player:
    """Random calls on a page table and its twin, in a few places of the address space."""

    def __init__(self, configuration, seed, **system):
        self.random = random.Random(seed)
        self.configuration = configuration
        self.system = System(**system, **configuration)
        self.table = self.system.table
        self.twin = Twin(**configuration)
        sizes = self.twin.sizes
        self.unit = sizes[-1]
        self.sizes = [size for size in sizes if size << 2 <= 1 << self.twin.ias]
        last = (1 << self.twin.ias) - 1
        # windows: the ends of the space, and places where a larger table begins
        self.windows = [0, last + 1]
        self.windows += [self.random.randrange(last) & -size * 4 for size in sizes for _ in "12"]

    def address(self, bits, size):
        """An address near a window, aligned to some page size."""
        window = self.random.choice(self.windows)
        align = self.random.choice(self.twin.sizes)
        step = self.random.choice([self.unit, align])
        at = window + self.random.randrange(-8, 24) * step
        return max(0, min(at, (1 << bits) - size)) & -self.unit

    def length(self):
        size = self.random.choice(self.twin.sizes) * self.random.choice([1, 1, 1, 2, 3, 5])
        size += self.random.choice([0, 0, self.unit, 3 * self.unit, 17 * self.unit, -self.unit])
        size = max(self.unit, min(size, (1 << self.twin.ias) // 2, self.budget()))
        return size & -self.unit

    def budget(self):
        """Not more than so many smallest pages, which the twin has one by one."""
        return max(self.unit * 300, self.twin.sizes[0] * 2)

    def prot(self):
        return self.random.choice([READ, WRITE, READ | WRITE]) | self.random.choice(
            [0, CACHE, CACHE | NOEXEC, MMIO, PRIV, MMIO | CACHE | NOEXEC | PRIV]
        )

    def output(self, iova, size):
        """An output address, often aligned as the input is."""
        pa = self.random.randrange(1 << self.twin.oas) & -self.unit
        align = self.random.choice(self.twin.sizes + [16 * s for s in self.twin.sizes])
        if self.random.random() < 0.8:
            pa = (pa & -align) + iova % align
        return max(0, min(pa, (1 << self.twin.oas) - size)) & -self.unit

    def mapped_address(self):
        """The beginning of a leaf, if there is any."""
        leaves = list(self.twin.leaves())
        return self.random.choice(leaves).iova if leaves else 0

    def cost(self, iova, pa, size):
        """How many leaves the twin would make."""
        count = 0
        while size and count <= 6000:
            page = next(p for p in self.twin.sizes if p <= size and (iova | pa) % p == 0)
            count += 1
            iova, pa, size = iova + page, pa + page, size - page
        return count

    def map(self):
        size = self.length()
        iova = self.address(self.twin.ias, size)
        pa, prot = self.output(iova, size), self.prot()
        if self.cost(iova, pa, size) > 6000:
            return
        both(
            lambda: self.table.map(iova, pa, size, prot),
            lambda: self.twin.map(iova, pa, size, prot),
        )

    def map_sg(self):
        segments = []
        iova = at = self.address(self.twin.ias, self.unit)
        for _ in range(self.random.randrange(1, 5)):
            size = self.length()
            pa = self.output(at, size)
            if self.random.random() < 0.3 and segments:
                pa = sum(segments[-1])
            if self.random.random() < 0.1:
                size = 0
            if self.cost(at, pa, size) > 3000:
                return
            segments.append((pa, size))
            at += size
        prot = self.prot()
        both(
            lambda: self.table.map_sg(iova, iter(segments), prot),
            lambda: self.twin.map_sg(iova, segments, prot),
        )

    def unmap(self, gather=None):
        size = self.length()
        iova = self.address(self.twin.ias, size)
        if self.random.random() < 0.6:
            iova = self.mapped_address()
        if self.random.random() < 0.1:
            iova = 0 if self.random.random() < 0.5 else iova & -self.twin.sizes[0]
            size = 1 << self.twin.ias
        both(lambda: self.table.unmap(iova, size, gather), lambda: self.twin.unmap(iova, size))

    def dirty(self):
        if self.twin.stage != 1 or not self.twin.dirty:
            return
        size = min(self.length(), 512 * self.unit)
        iova = self.random.choice([self.mapped_address(), self.address(self.twin.ias, size)])
        clear = self.random.random() < 0.7
        both(
            lambda: self.table.read_dirty(iova, size, clear=clear).tolist(),
            lambda: self.twin.read_dirty(iova, size, clear=clear),
        )

    def write(self):
        """A device writes somewhere."""
        if not self.twin.dirty:
            return
        iova = self.mapped_address()
        if self.system.translate(iova, write=True):
            self.twin.write(iova)

    def step(self):
        self.random.choice(
            [self.map, self.map, self.map, self.map_sg, self.unmap, self.unmap, self.unmap,
             self.dirty, self.write]
        )()  # fmt: skip

    def places(self):
        """Addresses at and around what is mapped."""
        leaves = list(self.twin.leaves())
        chosen = self.random.sample(leaves, min(len(leaves), 60))
        for leaf in chosen:
            yield leaf.iova
            yield leaf.iova + leaf.size - 1
            yield leaf.iova + self.random.randrange(leaf.size)
            if leaf.iova:
                yield leaf.iova - 1
            if (leaf.iova + leaf.size) >> self.twin.ias == 0:
                yield leaf.iova + leaf.size
        yield self.random.randrange(1 << self.twin.ias)

    def judge(self):
        """The SMMU, the twin and iova_to_phys agree."""
        places = list(self.places())
        pa, page_lg2, event = self.system.many(places)
        for i, iova in enumerate(places):
            wanted = self.twin.iova_to_phys(iova)
            leaf = self.twin.path(iova)[1]
            assert self.table.iova_to_phys(iova) == wanted
            if leaf is None or (self.twin.stage == 1 and leaf.prot & PRIV) or (
                self.twin.stage == 2 and not leaf.prot & READ
            ):  # fmt: skip
                assert pa[i] == 0 and event[i] == (0x10 if leaf is None else 0x13)
            else:
                assert (pa[i], 1 << int(page_lg2[i]), event[i]) == (wanted, leaf.size, 0)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=name)
@pytest.mark.parametrize(
    "seed, wide",
    [(0, True), *(pytest.param(*more, marks=pytest.mark.slow) for more in [(1, True), (2, False)])],
)
def test_random_calls_write_what_the_twin_writes(configuration, seed, wide, request):
    request.addfinalizer(partial(vectors, vectors()))
    vectors(wide)
    cd = {"ha": 1, "hd": 1} if configuration.get("dirty") else {}
    player = Player(configuration, seed, size=1 << 26, cd=cd)
    for i in range(60):
        player.step()
        same(player.system.memory, player.table, player.twin)
        if i % 10 == 9:
            player.judge()
    player.table.close()
    assert (player.system.pages.blocks, player.system.pages.in_use) == (0, 0)
