"""Runs of descriptors, by vectors and by loops: each length and place against one entry at a time.

Both ways are compared with what numpy says of the entries of one leaf table, all of them looked
at, so that a store beside the run is found.
"""

import numpy as np
import pytest
from tablesystem import pages

from smmufast._driver.tables import PageTable, vectors
from smmufast.errors import Exists

PAGE = 4096
IOVA = 0x4000_0000
PA = 0x12_3456_7000
TABLE = 512
LENGTHS = [*range(1, 35), 63, 64, 65, 127, 128, 129, 200]
PLACES = [0, 1, 3, 7, 8, 9, 100, 311]
DIRTY = 1 << 51 | 3  # DBM, page, and not AP[2]
READ_ONLY = 1 << 7


@pytest.fixture(params=[True, False], ids=["vectors", "loops"], autouse=True)
def way(request):
    before = vectors()
    if vectors(request.param) != request.param:
        pytest.skip("the processor has no AVX-512")
    yield
    vectors(before)


class Table:
    """A PageTable with one leaf table, and its entries."""

    def __init__(self, **keywords):
        self.memory, own = pages(1 << 20)
        self.table = PageTable(own, **keywords)
        self.table.map(IOVA, PA, PAGE)
        self.leaf = int(self.memory.read_u64(self.address()) & ~0xFFF)
        self.first = self.entries()[0]
        self.table.unmap(IOVA, PAGE)

    def address(self):
        """Where the descriptor is that names the leaf table."""
        table = self.table.root
        for shift in (39, 30):
            word = self.memory.read_u64(table + 8 * (IOVA >> shift & 511))
            table = word & ((1 << 48) - 1) & ~0xFFF
        return table + 8 * (IOVA >> 21 & 511)

    def entries(self):
        return np.frombuffer(self.memory.read(self.leaf, 8 * TABLE), np.uint64).copy()

    def put(self, entries):
        self.memory.write(self.leaf, np.asarray(entries, np.uint64).tobytes())

    def leaves(self, place, n):
        """The entries with a run of pages in them."""
        found = np.zeros(TABLE, np.uint64)
        steps = np.arange(n, dtype=np.uint64) * np.uint64(PAGE)
        found[place : place + n] = self.first + steps
        return found


def at(place):
    return IOVA + place * PAGE


@pytest.mark.parametrize("place", PLACES)
def test_a_run_is_written_and_cleared_and_nothing_beside_it(place):
    own = Table()
    for n in LENGTHS:
        own.table.map(at(place), PA, n * PAGE)
        assert np.array_equal(own.entries(), own.leaves(place, n)), n
        assert own.table.unmap(at(place), n * PAGE) == n * PAGE
        assert not own.entries().any(), n


def test_a_whole_table_is_written():
    own = Table()
    own.table.map(IOVA, PA, TABLE * PAGE)
    assert np.array_equal(own.entries(), own.leaves(0, TABLE))


def test_what_software_left_in_invalid_entries_is_written_over_and_kept_beside():
    own = Table()
    rest = np.full(TABLE, 0xDEAD_BEEF_0000_00F0, np.uint64)
    own.put(rest)
    own.table.map(at(5), PA, 40 * PAGE)
    wanted = np.where(own.leaves(5, 40) != 0, own.leaves(5, 40), rest)
    assert np.array_equal(own.entries(), wanted)


@pytest.mark.parametrize("n", [2, 7, 8, 9, 15, 16, 17, 40, 130])
def test_one_valid_entry_anywhere_in_a_run_refuses_it(n):
    own = Table()
    for place in PLACES:
        for taken in range(place, place + n):
            entries = np.zeros(TABLE, np.uint64)
            entries[taken] = 3
            own.put(entries)
            with pytest.raises(Exists):
                own.table.map(at(place), PA, n * PAGE)
            assert np.array_equal(own.entries(), entries)
        for beside in {place - 1, place + n} - {-1, TABLE}:
            entries = np.zeros(TABLE, np.uint64)
            entries[beside] = 3
            own.put(entries)
            own.table.map(at(place), PA, n * PAGE)
            assert np.array_equal(own.entries(), own.leaves(place, n) | entries)


@pytest.mark.parametrize("n", [2, 8, 9, 10, 17, 18, 70])
@pytest.mark.parametrize("hole", [0, 1, 0xFFFF_FFFF_FFFF_FFFC])
def test_an_unmap_ends_at_the_first_hole(n, hole):
    own = Table()
    for place in (0, 5, 300):
        for missing in range(1, n):
            entries = own.leaves(place, n)
            entries[place + missing] = hole  # invalid, or a block where none is legal
            own.put(entries)
            assert own.table.unmap(at(place), n * PAGE) == missing * PAGE
            entries[place : place + missing] = 0
            assert np.array_equal(own.entries(), entries)


@pytest.mark.parametrize("clear", [False, True])
def test_dirty_pages_are_told_one_by_one(clear):
    own = Table(dirty=True)
    rng = np.random.default_rng(1)
    kinds = np.array([0, own.first, own.first | READ_ONLY, own.first & ~np.uint64(2), 1 << 51],
                     np.uint64)  # fmt: skip
    for place in (0, 1, 9, 300):
        for n in (*LENGTHS, 212):
            entries = rng.choice(kinds, TABLE)
            own.put(entries)
            wanted = entries & np.uint64(DIRTY | READ_ONLY) == DIRTY
            found = own.table.read_dirty(at(place), n * PAGE, clear=clear)
            assert np.array_equal(found, wanted[place : place + n])
            if clear:
                run = np.arange(TABLE) - place
                entries[wanted & (run >= 0) & (run < n)] |= np.uint64(READ_ONLY)
            assert np.array_equal(own.entries(), entries)


def test_the_way_can_be_chosen():
    on = vectors()
    assert vectors(False) is False and vectors() is False
    assert vectors(on) is on and vectors() is on
