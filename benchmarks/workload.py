"""Tables and requests for the benchmarks, and the check that all baselines agree on them."""

import contextlib
import mmap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import walk_nested
import walk_numpy
import walk_python
from walk_python import Registers, Words

BASE = 0x8000_0000
IOVA_BASE = 0x5500_0000_0000
PA_BASE = 0x20_0000_0000

# What lies where in a table image, from BASE on.
LINEAR_STES = 0x0_0000
L1STDS = 0x1_0000
L2_STES = 0x2_0000
CDS = 0x3_0000
L1CDS = 0x4_0000
L2_CDS = 0x5_0000
TRANSLATION_TABLES = 0x6_0000

STREAMS_LG2 = 10
SPLIT = 8
SUBSTREAMS_LG2 = 10
PAIRS_LG2 = 5

SID = 3
SID_SUBSTREAMS = 5

STRTAB_LINEAR = (BASE + LINEAR_STES, STREAMS_LG2)
STRTAB_TWO_LEVEL = (BASE + L1STDS, 1 << 16 | SPLIT << 6 | STREAMS_LG2)

# Streams of a NestedImage: both stages, stage 2 alone, and stage 1 alone with the same CD.
NESTED_SID, STAGE2_SID, STAGE1_SID = range(3)
NESTED_STREAMS_LG2 = 2
STRTAB_NESTED = (BASE, NESTED_STREAMS_LG2)

# Its addresses before stage 2: where the CD and the tables of stage 1 are, and the data.
GUEST_IPA = 0x40_0000_0000
DATA_IPA = 0x60_0000_0000

PAGE = 0b11 | 1 << 6 | 3 << 8 | 1 << 10 | 1 << 11  # valid page: AP[1], ISH, AF, nG
PAGE_S2 = 0b11 | 15 << 2 | 3 << 6 | 3 << 8 | 1 << 10  # likewise: write-back, S2AP, ISH, AF
TABLE = 0b11


def permuted(pages, n_lg2):
    """Return a fixed bijection of [0, 2**n_lg2) at an array of pages."""
    values = pages.copy()
    for odd in (0x9E37_79B9_7F4A_7C15, 0xBF58_476D_1CE4_E5B9):
        values *= np.uint64(odd)
        values &= np.uint64((1 << n_lg2) - 1)
        values ^= values >> np.uint64(n_lg2 - n_lg2 // 2)
    return values


def pack_ste(cd_address, s1cdmax=0, s1fmt=0, s1dss=0):
    """Return the words of an STE whose stage 1 translates."""
    word0 = 1 | 0b101 << 1 | s1fmt << 4 | cd_address | s1cdmax << 59
    return [word0, s1dss | 1 << 44, 0, 0, 0, 0, 0, 0]


def pack_cd(ttb0, asid=0, granule_lg2=12, input_lg2=48):
    """Return the words of a CD: 48-bit output, TTB0 only."""
    tg0 = {12: 0, 14: 2, 16: 1}[granule_lg2]
    word0 = 64 - input_lg2 | tg0 << 6 | 0b01 << 8 | 0b01 << 10 | 3 << 12 | 1 << 30 | 1 << 31
    word0 |= 5 << 32 | 1 << 41 | 1 << 45 | 1 << 46 | 1 << 47 | asid << 48
    return [word0, ttb0, 0, 0xFF, 0, 0, 0, 0]


class Image:
    """Contiguous virtual pages on permuted physical pages, with the stream table and the CDs.

    Every stream of the two stream tables (linear and two-level, same streams) has an STE and a CD
    of its own and shares the translation tables. Stream SID_SUBSTREAMS has a two-level CD table
    with 2**SUBSTREAMS_LG2 substreams.

    Parameters
    ----------
    pages_lg2 : int
        log2 of how many pages are mapped, from `first` on; 9 to 27.
    granule_lg2, input_lg2 : int
        Of the tables: the granule, and the size of input addresses.
    leaf_lg2 : int, optional
        What a page is: a page of the granule, unless a block is asked for.

    Attributes
    ----------
    buffer : ndarray of uint8
        The bytes of simulated memory from BASE on, aligned to a host page.
    words : ndarray of uint64
        The same bytes.
    pages, first, ttb : int
        How many pages; where the first is; the physical address of the first table.
    """

    def __init__(self, pages_lg2, granule_lg2=12, input_lg2=48, leaf_lg2=None):
        self.pages_lg2 = pages_lg2
        self.pages = 1 << pages_lg2
        self.granule_lg2 = granule_lg2
        self.input_lg2 = input_lg2
        self.leaf_lg2 = granule_lg2 if leaf_lg2 is None else leaf_lg2
        self.first = IOVA_BASE & (1 << input_lg2) - 1
        self.ttb = BASE + TRANSLATION_TABLES
        index_lg2 = granule_lg2 - 3
        shifts = list(range(self.leaf_lg2, input_lg2, index_lg2))[::-1]
        start = TRANSLATION_TABLES
        places = []  # of the first entry of each level
        for shift in shifts:
            places.append(start + (self.first >> shift & (1 << index_lg2) - 1) * 8)
            start += self._tables(shift) << granule_lg2
        self._map_memory(start)
        for place, below, shift in zip(places, places[1:], shifts[1:], strict=False):
            tables = np.arange(self._tables(shift), dtype=np.uint64) << np.uint64(granule_lg2)
            self._put(place, tables + np.uint64(BASE + (below >> granule_lg2 << granule_lg2) | 3))
        for first in range(0, self.pages, 1 << 20):  # by pieces: temporary arrays stay small
            pages = np.arange(first, min(first + (1 << 20), self.pages), dtype=np.uint64)
            self._put(places[-1] + 8 * first, self._output(pages) + np.uint64(self._leaf()))
        self._put_streams()

    def _tables(self, shift):
        """Return how many tables of entries of 2**shift bytes there are."""
        return -(-self.pages << self.leaf_lg2 >> shift + self.granule_lg2 - 3) or 1

    def _leaf(self):
        """Return what a leaf has beside its address."""
        return PAGE if self.leaf_lg2 == self.granule_lg2 else PAGE & ~2

    def _map_memory(self, size):
        self.size = size
        mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(AttributeError, OSError):  # a host that has none
            mapped.madvise(mmap.MADV_HUGEPAGE)
        self.buffer = np.frombuffer(mapped, np.uint8)
        self.words = self.buffer.view(np.uint64)

    def _put(self, offset, values):
        self.words[offset // 8 : offset // 8 + len(values)] = values

    def _cd(self, asid):
        return pack_cd(self.ttb, asid, self.granule_lg2, self.input_lg2)

    def _put_streams(self):
        put = self._put
        for sid in range(1 << STREAMS_LG2):
            if sid == SID_SUBSTREAMS:
                ste = pack_ste(BASE + L1CDS, SUBSTREAMS_LG2, s1fmt=1, s1dss=0)
            else:
                ste = pack_ste(BASE + CDS + sid * 64)
            put(LINEAR_STES + sid * 64, ste)
            put(L2_STES + sid * 64, ste)
            put(CDS + sid * 64, self._cd(sid))
        for ssid in range(1 << SUBSTREAMS_LG2):
            put(L2_CDS + ssid * 64, self._cd(ssid))
        for i in range(1 << STREAMS_LG2 - SPLIT):
            put(L1STDS + i * 8, [BASE + L2_STES + (i << SPLIT + 6) | SPLIT + 1])
        for i in range(1 << SUBSTREAMS_LG2 - 6):
            put(L1CDS + i * 8, [BASE + L2_CDS + i * 4096 | 1])

    def _output(self, pages):
        return (permuted(pages, self.pages_lg2) << np.uint64(self.leaf_lg2)) + np.uint64(PA_BASE)

    def expected(self, iova):
        """Return the output addresses of mapped addresses, from the permutation alone."""
        pages = (iova - np.uint64(self.first)) >> np.uint64(self.leaf_lg2)
        return self._output(pages) + (iova & np.uint64((1 << self.leaf_lg2) - 1))

    def sequential(self, n, stride=None):
        """Return n addresses, each a stride (a page) further on, in turn from the first on."""
        stride = 1 << self.leaf_lg2 if stride is None else stride
        offset = np.arange(n, dtype=np.uint64) * np.uint64(stride)
        return (offset & np.uint64((self.pages << self.leaf_lg2) - 1)) + np.uint64(self.first)

    def random(self, n, seed=1):
        """Return n mapped addresses, uniformly at random."""
        rng = np.random.default_rng(seed)
        offset = rng.integers(0, self.pages << self.leaf_lg2, n, dtype=np.uint64)
        return offset + np.uint64(self.first)

    def partly_unmapped(self, n, seed=2):
        """Return random() with one address in eight, at random, beyond the mapped pages."""
        iova = self.random(n, seed)
        beyond = np.random.default_rng(seed).random(n) < 1 / 8
        iova[beyond] += np.uint64(self.pages << self.leaf_lg2)
        return iova


class PairsImage(Image):
    """An Image whose first 2**PAIRS_LG2 streams have as many substreams each, and no others."""

    def _put_streams(self):
        for sid in range(1 << PAIRS_LG2):
            cds = CDS + (sid << PAIRS_LG2 + 6)
            self._put(LINEAR_STES + sid * 64, pack_ste(BASE + cds, PAIRS_LG2))
            for ssid in range(1 << PAIRS_LG2):
                self._put(cds + ssid * 64, self._cd(sid << PAIRS_LG2 | ssid))


class SparseImage(Image):
    """Pages of 4 KiB so far from each other that each has tables of levels 2 and 3 of its own.

    Parameters
    ----------
    pages_lg2 : int
        9 to 18. A page takes 8 KiB of tables.
    """

    def __init__(self, pages_lg2):
        self.pages_lg2 = pages_lg2
        self.pages = 1 << pages_lg2
        self.granule_lg2 = self.leaf_lg2 = 12
        self.input_lg2 = 48
        self.first = 0
        self.ttb = BASE + TRANSLATION_TABLES
        level1 = TRANSLATION_TABLES + 0x1000
        level2 = level1 + (512 << 12)
        level3 = level2 + (self.pages << 12)
        self._map_memory(level3 + (self.pages << 12))
        rng = np.random.default_rng(pages_lg2)
        page = np.arange(self.pages, dtype=np.uint64)
        index0, index1 = page & np.uint64(511), page >> np.uint64(9)
        index2, index3 = (rng.integers(0, 512, self.pages, dtype=np.uint64) for _ in range(2))
        own2, own3 = (rng.permutation(page) << np.uint64(12) for _ in range(2))
        self._put(TRANSLATION_TABLES, table_descriptors(level1, 512))
        for offset, index, descriptor in (
            (np.uint64(level1) + (index0 << np.uint64(12)), index1, own2 + np.uint64(level2)),
            (own2 + np.uint64(level2), index2, own3 + np.uint64(level3)),
        ):
            self.words[offset // np.uint64(8) + index] = descriptor + np.uint64(BASE | TABLE)
        self.words[(own3 + np.uint64(level3)) // np.uint64(8) + index3] = self._output(
            page
        ) + np.uint64(PAGE)
        number = index0
        for index in (index1, index2, index3):
            number = number << np.uint64(9) | index
        self._mapped = number << np.uint64(12)
        self._order = np.argsort(self._mapped)
        self._put_streams()

    def expected(self, iova):
        """Return the output addresses of mapped addresses."""
        start = iova & ~np.uint64(4095)
        found = np.searchsorted(self._mapped, start, sorter=self._order)
        return self._output(self._order[found].astype(np.uint64)) + (iova & np.uint64(4095))

    def sequential(self, n, stride=None):
        """Return n addresses, one in each next page, in turn from the first on."""
        if stride is not None:
            raise ValueError("these pages have no stride")
        return self._mapped[np.arange(n) % self.pages]

    def random(self, n, seed=1):
        """Return n mapped addresses, uniformly at random."""
        rng = np.random.default_rng(seed)
        offset = rng.integers(0, 4096, n, dtype=np.uint64)
        return self._mapped[rng.integers(0, self.pages, n)] + offset

    def partly_unmapped(self, n, seed=2):
        """Return random() with one address in eight, at random, in the page after a mapped one."""
        iova = self.random(n, seed)
        iova[np.random.default_rng(seed).random(n) < 1 / 8] ^= np.uint64(4096)
        return iova


def table_descriptors(offset, n):
    """Return n table descriptors for consecutive tables from BASE + offset on."""
    return np.arange(n, dtype=np.uint64) * np.uint64(4096) + np.uint64(BASE + offset | TABLE)


class NestedImage:
    """Contiguous virtual pages on permuted IPA pages, and these on permuted physical ones.

    Pages of 4 KiB and four levels in both stages; stage 2 maps what stage 1 reads by pages too.

    Parameters
    ----------
    pages_lg2 : int
        log2 of how many 4 KiB pages are mapped, from IOVA_BASE on; 9 to 27.

    Attributes
    ----------
    buffer, words, pages
        As those of an Image.
    guest : int
        Offset of the CD, which is at GUEST_IPA; the tables of stage 1 follow it.
    leading : ndarray of int
        Indices of the descriptors of stage 2 that lead to the CD.
    """

    first = IOVA_BASE
    leaf_lg2 = 12

    def __init__(self, pages_lg2):
        self.pages_lg2 = pages_lg2
        self.pages = 1 << pages_lg2
        leaf_tables = self.pages >> 9
        level2_tables = -(-leaf_tables >> 9) or 1
        self.guest = 0x1000
        guest_size = 0x1000 * (3 + level2_tables + leaf_tables)
        guest_tables = -(-guest_size >> 21)
        outer = self.guest + guest_size  # tables of stage 2: levels 0 and 1, then 2, then 3
        outer2 = outer + 0x2000
        outer3 = outer2 + 0x1000 * (1 + level2_tables)
        data = outer3 + 0x1000 * guest_tables
        self.size = data + 8 * self.pages
        mapped = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.buffer = np.frombuffer(mapped, np.uint8)
        self.words = self.buffer.view(np.uint64)

        def put(offset, values):
            self.words[offset // 8 : offset // 8 + len(values)] = values

        def guest_tables_at(page, n):
            pages = np.arange(page, page + n, dtype=np.uint64)
            return (pages << np.uint64(12)) + np.uint64(GUEST_IPA | TABLE)

        put(self.guest, pack_cd(GUEST_IPA + 0x1000, asid=1))
        put(self.guest + 0x1000 + (IOVA_BASE >> 39 & 511) * 8, guest_tables_at(2, 1))
        put(self.guest + 0x2000 + (IOVA_BASE >> 30 & 511) * 8, guest_tables_at(3, level2_tables))
        put(self.guest + 0x3000, guest_tables_at(3 + level2_tables, leaf_tables))
        leaves = self.guest + 0x1000 * (3 + level2_tables)
        put(outer + (GUEST_IPA >> 39) * 8, table_descriptors(outer + 0x1000, 1))
        put(outer + 0x1000 + (GUEST_IPA >> 30 & 511) * 8, table_descriptors(outer2, 1))
        put(
            outer + 0x1000 + (DATA_IPA >> 30 & 511) * 8,
            table_descriptors(outer2 + 0x1000, level2_tables),
        )
        self.leading = np.array(
            [
                outer + (GUEST_IPA >> 39) * 8,
                outer + 0x1000 + (GUEST_IPA >> 30 & 511) * 8,
                outer2,
                outer3,
            ]
        )
        self.leading //= 8
        put(outer2, table_descriptors(outer3, guest_tables))
        put(outer2 + 0x1000, table_descriptors(data, leaf_tables))
        guest_pages = np.arange(guest_size >> 12, dtype=np.uint64) << np.uint64(12)
        put(outer3, guest_pages + np.uint64(BASE + self.guest | PAGE_S2))
        for first in range(0, self.pages, 1 << 20):  # by pieces: temporary arrays stay small
            pages = np.arange(first, min(first + (1 << 20), self.pages), dtype=np.uint64)
            onto = permuted(pages, pages_lg2) << np.uint64(12)
            put(leaves + 8 * first, onto + np.uint64(DATA_IPA | PAGE))
            put(data + 8 * first, onto + np.uint64(PA_BASE | PAGE_S2))
        for sid, config, cd in (
            (NESTED_SID, 0b111, GUEST_IPA),
            (STAGE2_SID, 0b110, 0),
            (STAGE1_SID, 0b101, BASE + self.guest),
        ):
            ste = pack_ste(cd)
            ste[0] = 1 | config << 1 | cd
            ste[2] = 2 | 16 << 32 | 2 << 38 | 3 << 44 | 5 << 48 | 1 << 51 | 1 << 54 | 1 << 58
            ste[3] = BASE + outer
            put(64 * sid, ste)

    def expected(self, iova, *, stage2_only=False):
        """Return the output addresses of mapped addresses, from the permutation alone."""
        first = DATA_IPA if stage2_only else IOVA_BASE
        pages = (iova - np.uint64(first)) >> np.uint64(12)
        for _ in range(1 if stage2_only else 2):
            pages = permuted(pages, self.pages_lg2)
        return (pages << np.uint64(12)) + np.uint64(PA_BASE) + (iova & np.uint64(4095))

    sequential = Image.sequential
    random = Image.random


class NestedBaselines:
    """The baselines of streams with stage 2, over the words of a NestedImage.

    Parameters
    ----------
    module
        _nested.
    words : ndarray of uint64
    """

    def __init__(self, module, words):
        self.memory = Words(memoryview(words), BASE)
        self.registers = Registers(*STRTAB_NESTED)
        self.c = module.Walker(
            words.view(np.uint8),
            BASE,
            strtab_base=STRTAB_NESTED[0],
            strtab_base_cfg=STRTAB_NESTED[1],
        )

    def configure(self, sid):
        """Return what python() takes for a stream."""
        stage2 = walk_nested.configure(self.memory, self.registers, sid)
        if sid == STAGE2_SID:
            return stage2, None
        return stage2, walk_python.configure(self.memory, self.registers, STAGE1_SID)

    def python(self, stages, iova, out, **access):
        """Fill out, whose columns are lists or arrays, with the pure-Python walk."""
        walk_nested.translate_batch(
            self.memory, *stages, iova, out.pa, out.action, out.event, **access
        )


def check_nested(module, image):
    """Assert that both baselines find the addresses which the permutations say."""
    baselines = NestedBaselines(module, image.words)
    for sid, first in ((NESTED_SID, IOVA_BASE), (STAGE2_SID, DATA_IPA)):
        both = np.concatenate([image.random(800), image.sequential(200)])
        both -= np.uint64(IOVA_BASE - first)
        beyond = [first + (image.pages << 12), first - 1, 1 << 48, 1 << 55, 0xFFFF << 48]
        iova = np.concatenate([both, np.array(beyond, np.uint64)])
        out = check_nested_agreement(baselines, iova, sid)
        wanted = image.expected(both, stage2_only=sid == STAGE2_SID)
        if not np.array_equal(out.pa[: len(both)], wanted):
            raise AssertionError("the nested baselines agree on wrong addresses")
        if out.action[: len(both)].any() or not out.event[len(both) :].all():
            raise AssertionError("the nested baselines agree on wrong outcomes")


def check_nested_agreement(baselines, iova, sid, **access):
    """Assert that C, C from the registers on, and Python agree; return what they found."""
    c, each, p = (Out.empty(len(iova)) for _ in range(3))
    baselines.c.batch(sid, iova, *c.arrays(), **access)
    baselines.c.batch(sid, iova, *each.arrays(), each=True, **access)
    baselines.python(baselines.configure(sid), iova.tolist(), p, **access)
    for name, other in (("C from the registers on", each), ("pure Python", p)):
        if not c.same(other):
            raise AssertionError(f"nested C and {name} disagree {access}")
    return c


def spoil(image, rng, n):
    """Change n descriptors of a NestedImage at random, but for those that lead to the CD."""
    first = image.guest // 8 + 8
    found = first + np.flatnonzero(image.words[first:])
    bits = [0, 1, 2, 4, 6, 7, 10, 12, 13, 30, 39, 47, 53, 54, 60, 61, 62]
    for at in rng.choice(np.setdiff1d(found, image.leading), n, replace=False):
        image.words[at] ^= np.uint64(1 << int(rng.choice(bits)))


@dataclass(frozen=True)
class Run:
    """One thing to time.

    Attributes
    ----------
    call : function
        What is timed.
    items : int
        How many translations (or calls, or IDs) a call makes.
    reset : function, optional
        Called before every call, untimed.
    """

    call: Callable[[], object]
    items: int
    reset: Callable[[], object] | None = None


@dataclass
class Out:
    """Preallocated results of n requests, in the columns' own types."""

    pa: np.ndarray
    action: np.ndarray
    event: np.ndarray

    @classmethod
    def empty(cls, n):
        """Return arrays that have been written to, so that the host has given them memory."""
        return cls(np.ones(n, np.uint64), np.ones(n, np.uint8), np.ones(n, np.uint8))

    def columns(self):
        """Return the arrays as translate_batch(out=...) takes them."""
        return {"pa": self.pa, "action": self.action, "event": self.event}

    def arrays(self):
        """Return the arrays as the baselines take them."""
        return self.pa, self.action, self.event

    def same(self, other):
        """Whether all columns are equal."""
        return all(np.array_equal(a, b) for a, b in zip(self.arrays(), other.arrays(), strict=True))


def smmu(image, strtab, **registers):
    """Return a smmufast.Smmu over the bytes of an image."""
    from smmufast import Memory, Smmu

    memory = Memory()
    memory.add(image.buffer, BASE)
    return Smmu(memory, strtab_base=strtab[0], strtab_base_cfg=strtab[1], **registers)


class Baselines:
    """The three baselines over one memory and one set of registers.

    Parameters
    ----------
    module
        _baseline.
    words : ndarray of uint64
        Simulated memory from BASE on.
    strtab : (int, int)
        STRTAB_BASE and STRTAB_BASE_CFG.
    """

    def __init__(self, module, words, strtab, cr2=0b10):
        self.words = words
        self.registers = Registers(*strtab, cr2=cr2)
        self.memory = Words(memoryview(words), BASE)
        self.c = module.Walker(
            words.view(np.uint8), BASE, strtab_base=strtab[0], strtab_base_cfg=strtab[1], cr2=cr2
        )

    def configure(self, sid, ssid=None):
        """Return the decoded context, for numpy() and python()."""
        return walk_python.configure(self.memory, self.registers, sid, ssid)

    def numpy(self, context, iova, out, **access):
        """Fill out with the numpy walk."""
        walk_numpy.translate_batch(
            self.words, BASE, context, iova, out.pa, out.action, out.event, **access
        )

    def python(self, context, iova, out, **access):
        """Fill out, whose columns are lists or arrays, with the pure-Python walk."""
        walk_python.translate_batch(
            self.memory, context, iova, out.pa, out.action, out.event, **access
        )


def check_image(module, image):
    """Assert that every baseline finds the addresses which the permutation says."""
    both = np.concatenate([image.random(3000), image.sequential(1000)])
    last = np.uint64(IOVA_BASE + (image.pages << 12))
    beyond = np.array([last, IOVA_BASE - 1, 1 << 48, 1 << 55, 0xFFFF << 48], np.uint64)
    iova = np.concatenate([both, beyond])
    for strtab in (STRTAB_LINEAR, STRTAB_TWO_LEVEL):
        baselines = Baselines(module, image.words, strtab)
        for sid, ssid in ((SID, None), (SID_SUBSTREAMS, 7), (1000, None)):
            out = check_agreement(baselines, iova, sid, ssid)
            if not np.array_equal(out.pa[: len(both)], image.expected(both)):
                raise AssertionError("the baselines agree on wrong addresses")
            if out.action[: len(both)].any() or not out.event[len(both) :].all():
                raise AssertionError("the baselines agree on wrong outcomes")


def check_agreement(baselines, iova, sid, ssid=None, **access):
    """Assert that C, numpy and Python agree; return what they found."""
    c, n, p, one = (Out.empty(len(iova)) for _ in range(4))
    context = baselines.configure(sid, ssid)
    baselines.c.batch(sid, iova, *c.arrays(), ssid=ssid, **access)
    baselines.numpy(context, iova, n, **access)
    baselines.python(context, iova.tolist(), p, **access)
    baselines.c.one_by_one(sid, iova, *one.arrays(), ssid=ssid, write=access.get("write", False))
    requests = Out.empty(len(iova))
    sids = np.full(len(iova), sid, np.uint32)
    ssids = None if ssid is None else np.full(len(iova), ssid, np.uint32)
    write = access.get("write", False)
    baselines.c.requests(sids, ssids, iova, *requests.arrays(), write=write)
    for name, other in (("numpy", n), ("pure Python", p)):
        if not c.same(other):
            different = np.flatnonzero(
                (c.pa != other.pa) | (c.action != other.action) | (c.event != other.event)
            )[0]
            raise AssertionError(
                f"C and {name} disagree on {int(iova[different]):#x} {access}: "
                f"{[int(a[different]) for a in c.arrays()]} and "
                f"{[int(a[different]) for a in other.arrays()]} in {context}"
            )
    if (
        not access.get("priv")
        and not access.get("instr")
        and not (c.same(one) and c.same(requests))
    ):
        raise AssertionError("C one by one disagrees with C over a decoded context")
    return c


def random_memory(rng, granule, ds, n_tables):
    """Return words of random tables that mostly point to each other, from BASE on.

    The first 64 KiB are left to the STE and the CD.
    """
    per_table = 1 << granule - 3
    n = n_tables * per_table
    pool = BASE + 0x1_0000 + (rng.integers(0, n_tables, n, dtype=np.uint64) << np.uint64(granule))
    attributes = np.uint64(0)
    for lsb, chance in (
        (6, 0.8),
        (7, 0.3),
        (10, 0.85),
        (53, 0.3),
        (54, 0.3),
        (59, 0.1),
        (60, 0.1),
        (61, 0.1),
        (62, 0.1),
        (11, 0.5),
        (52, 0.5),
        (55, 0.5),
    ):
        attributes = attributes | (rng.random(n) < chance).astype(np.uint64) << np.uint64(lsb)
    far = rng.random(n)
    pool = np.where(far < 0.04, rng.integers(0, 1 << 48, n, dtype=np.uint64), pool)
    pool &= np.uint64((1 << 48) - (1 << granule))
    high = rng.integers(0, 16, n, dtype=np.uint64)
    high[far > 0.08] = 0
    if granule == 16:
        pool |= high << np.uint64(12)
    elif ds:
        pool |= (high & np.uint64(3)) << np.uint64(8) | high >> np.uint64(2) << np.uint64(48)
    else:
        pool |= high << np.uint64(48)
    kind = rng.choice(np.array([3, 1, 0, 2], np.uint64), n, p=[0.82, 0.1, 0.05, 0.03])
    words = np.zeros(0x1_0000 // 8 + n, np.uint64)
    words[0x1_0000 // 8 :] = pool | attributes | kind
    return words


def random_records(rng, granule, ds, n_tables):
    """Return an STE and a CD: mostly legal, with every control at random."""

    def often(chance):
        return int(rng.random() < chance)

    def size():
        if not often(0.03):
            return int(rng.integers(12 if ds or granule == 16 else 16, 48))
        return int(rng.integers(0, 64))

    def table():
        if often(0.1):
            return int(rng.integers(0, 1 << int(rng.choice([40, 49, 52])))) & ~15
        low = 16 * int(rng.integers(0, 8)) * often(0.3)
        return BASE + 0x1_0000 + (int(rng.integers(0, n_tables)) << granule) + low

    config = int(rng.choice([5, 4, 0, 7], p=[0.94, 0.04, 0.01, 0.01]))
    ste0 = 1 - often(0.02) | config << 1 | BASE + 64
    ste1 = int(rng.choice([0, 2, 1], p=[0.8, 0.18, 0.02])) << 30 | often(0.01) << 27
    ste1 |= int(rng.choice(4, p=[0.7, 0.1, 0.1, 0.1])) << 48
    ste1 |= int(rng.choice(4, p=[0.7, 0.1, 0.1, 0.1])) << 50
    tg0 = {12: 0, 14: 2, 16: 1}[granule]
    tg1 = {12: 2, 14: 1, 16: 3}[granule]
    cd0 = size() | tg0 << 6 | often(0.05) << 14 | size() << 16 | tg1 << 22 | often(0.05) << 30
    cd0 |= 1 << 31 | int(rng.choice(8, p=[0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.1])) << 32
    for lsb, chance in (
        (35, 0.3),
        (36, 0.4),
        (38, 0.4),
        (39, 0.4),
        (40, 0.4),
        (41, 0.98),
        (42, 0.02),
        (43, 0.02),
        (44, 0.02),
        (45, 0.8),
        (46, 0.8),
    ):
        cd0 |= often(chance) << lsb
    cd1 = table() | often(0.3) << 1 | often(0.1) << 2 | often(0.5) << 59
    cd2 = table() | often(0.3) << 1 | often(0.1) << 2 | ds << 58
    return [ste0, ste1], [cd0, cd1, cd2]


def check_random(module, contexts=120, addresses=48, seed=0):
    """Assert that the baselines agree on random tables under random contexts.

    Returns how often each outcome (action, event) was met.
    """
    rng = np.random.default_rng(seed)
    met = {}
    for i in range(contexts):
        granule, ds = ((12, 0), (14, 0), (16, 0), (12, 1), (14, 1))[i % 5]
        n_tables = {12: 24, 14: 8, 16: 4}[granule]
        words = random_memory(rng, granule, ds, n_tables)
        ste, cd = random_records(rng, granule, ds, n_tables)
        words[: len(ste)] = ste
        words[8 : 8 + len(cd)] = cd
        baselines = Baselines(module, words, (BASE, 0), cr2=0b10 | int(rng.random() < 0.5))
        iova = rng.integers(0, 1 << 64, addresses, dtype=np.uint64)
        bits = 64 - np.array([ste_size(cd[0], 0), ste_size(cd[0], 16)], np.uint64)
        low = iova[8:] & ((np.uint64(1) << bits[0]) - np.uint64(1))
        high = iova[8:] | ~((np.uint64(1) << bits[1]) - np.uint64(1))
        iova[8:] = np.where(rng.random(addresses - 8) < 0.5, low, high)
        top = rng.random(addresses) < 0.2
        iova[top] ^= np.uint64(0x5A) << np.uint64(56)
        for mode in range(8):
            access = {"write": bool(mode & 1), "priv": bool(mode & 2), "instr": bool(mode & 4)}
            out = check_agreement(baselines, iova, 0, **access)
            for outcome in zip(out.action.tolist(), out.event.tolist(), strict=True):
                met[outcome] = met.get(outcome, 0) + 1
    return met


def ste_size(cd0, lsb):
    """TxSZ of a CD, kept within what can be shifted by."""
    return min(max(cd0 >> lsb & 63, 12), 60)
