"""Loops in plain C that do as little as they can, for what the library does in one."""

cimport cython
cimport numpy as cnp
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

import numpy as np

cnp.import_array()


cdef extern from "limits_walk.h" nogil:
    struct table:
        const uint8_t* origin
        uint64_t ttb
        int shape

    struct arrays:
        const uint64_t* iova
        uint64_t* pa
        uint8_t* action
        uint8_t* event
        size_t n

    ctypedef int64_t limits_kernel(const table*, const arrays*, bint) noexcept
    int limits_shape(unsigned, unsigned, unsigned) noexcept
    limits_kernel limits_dependent, limits_plain, limits_bare, limits_pipeline
    limits_kernel limits_staged, limits_flight, limits_vector, limits_cached
    void limits_entries(const table*, const uint64_t*, const uint64_t**, size_t) noexcept
    int64_t limits_ceiling(const table*, const arrays*, const uint64_t**) noexcept


cdef extern from "limits_nested.h" nogil:
    # _nested.pyx has a struct of this name, of another file
    struct nested_table "nested":
        const uint8_t* origin
        uint64_t ttb
        uint64_t s2ttb

    int64_t limits_nested(const nested_table*, const arrays*, bint) noexcept
    int64_t limits_nested_reuse(const nested_table*, const arrays*, bint) noexcept
    int64_t limits_nested_cached(const nested_table*, const arrays*, bint) noexcept


cdef extern from "limits_arrays.h" nogil:
    struct direct:
        const uint64_t* tag
        const uint64_t* output
        uint64_t mask

    struct bitmap:
        pass

    size_t direct_probe(const direct*, const uint64_t*, size_t, uint64_t*) noexcept
    int64_t direct_gather(const direct*, const uint64_t*, size_t, uint64_t*) noexcept
    void fill_each(uint64_t*, size_t, uint64_t, uint64_t) noexcept
    bint fill_vector(uint64_t*, size_t, uint64_t, uint64_t) noexcept
    enum:
        BITMAP_LG2
    void bitmap_clear(bitmap*) noexcept
    void bitmap_free_each(bitmap*, const uint32_t*, size_t) noexcept
    size_t bitmap_alloc_each(bitmap*, uint32_t*, size_t) noexcept
    size_t bitmap_bulk(bitmap*, uint32_t*, size_t) noexcept
    int64_t bitmap_pairs(bitmap*, size_t) noexcept
    int64_t bitmap_pairs_in(bitmap*, size_t, uint32_t, uint32_t) noexcept
    void limits_mark() noexcept


class Unavailable(Exception):
    """The processor lacks what a loop is made of."""


cdef arrays rows(const uint64_t[::1] iova, uint64_t[::1] pa, uint8_t[::1] action,
                 uint8_t[::1] event) except *:
    cdef arrays found
    if pa.shape[0] != iova.shape[0] or action.shape[0] != iova.shape[0] \
            or event.shape[0] != iova.shape[0]:
        raise ValueError("iova and the out arrays differ in length")
    if iova.shape[0] == 0:
        raise ValueError("no address")
    found.iova = &iova[0]
    found.pa = &pa[0]
    found.action = &action[0]
    found.event = &event[0]
    found.n = iova.shape[0]
    return found


@cython.final
@cython.auto_pickle(False)
cdef class Table:
    """The walks of limits_walk.h, over a stage 1 table in one region of memory.

    Tables must lie within the region: nothing checks where they lead.

    Parameters
    ----------
    buffer
        Contiguous bytes, which must stay alive and unmoved.
    base, ttb
        The physical addresses of the first byte and of the first table.
    granule_lg2, input_lg2, leaf_lg2
        Of the table: its granule, its input addresses, and the pages or blocks it is made of.
    """

    cdef table table
    cdef const uint8_t[::1] buffer
    cdef const uint64_t** entry
    cdef size_t entries

    def __init__(self, const uint8_t[::1] buffer not None, uint64_t base, uint64_t ttb,
                 unsigned granule_lg2=12, unsigned input_lg2=48, unsigned leaf_lg2=12):
        self.buffer = buffer
        self.table.origin = &buffer[0] - base
        self.table.ttb = ttb
        self.table.shape = limits_shape(granule_lg2, input_lg2, leaf_lg2)
        if self.table.shape < 0:
            raise ValueError("there are no loops for a table of this shape")

    def __dealloc__(self):
        free(self.entry)

    cdef int64_t run(self, limits_kernel* kernel, arrays given, bint write) except -1:
        cdef int64_t successes = kernel(&self.table, &given, write)
        if successes < 0:
            raise Unavailable("AVX-512")
        return successes

    def dependent(self, const uint64_t[::1] iova not None, uint64_t[::1] pa not None,
                  uint8_t[::1] action not None, uint8_t[::1] event not None, bint write=False):
        """Walk one after another, each address depending on the result before."""
        return self.run(limits_dependent, rows(iova, pa, action, event), write)

    def plain(self, const uint64_t[::1] iova not None, uint64_t[::1] pa not None,
              uint8_t[::1] action not None, uint8_t[::1] event not None, bint write=False):
        """Walk one at a time."""
        return self.run(limits_plain, rows(iova, pa, action, event), write)

    def bare(self, const uint64_t[::1] iova not None, uint64_t[::1] pa not None,
             uint8_t[::1] action not None, uint8_t[::1] event not None, bint write=False):
        """Walk one at a time and check nothing: every address must be mapped."""
        return self.run(limits_bare, rows(iova, pa, action, event), write)

    def pipeline(self, const uint64_t[::1] iova not None, uint64_t[::1] pa not None,
                 uint8_t[::1] action not None, uint8_t[::1] event not None, bint write=False):
        """Walk the upper levels 24 requests ahead."""
        return self.run(limits_pipeline, rows(iova, pa, action, event), write)

    def staged(self, const uint64_t[::1] iova not None, uint64_t[::1] pa not None,
               uint8_t[::1] action not None, uint8_t[::1] event not None, bint write=False):
        """Walk all levels but the last two 48 requests ahead, the last but one 24 ahead."""
        return self.run(limits_staged, rows(iova, pa, action, event), write)

    def flight(self, const uint64_t[::1] iova not None, uint64_t[::1] pa not None,
               uint8_t[::1] action not None, uint8_t[::1] event not None, bint write=False):
        """Walk 32 at a time, level by level."""
        return self.run(limits_flight, rows(iova, pa, action, event), write)

    def vector(self, const uint64_t[::1] iova not None, uint64_t[::1] pa not None,
               uint8_t[::1] action not None, uint8_t[::1] event not None, bint write=False):
        """Walk blocks of 128 by gathers; raise Unavailable where there are none."""
        return self.run(limits_vector, rows(iova, pa, action, event), write)

    def cached(self, const uint64_t[::1] iova not None, uint64_t[::1] pa not None,
               uint8_t[::1] action not None, uint8_t[::1] event not None, bint write=False):
        """Walk one at a time, last-level tables from a cache."""
        return self.run(limits_cached, rows(iova, pa, action, event), write)

    def find_entries(self, const uint64_t[::1] iova not None):
        """Keep where the leaf entries of mapped addresses are, for ceiling()."""
        cdef size_t i
        free(self.entry)
        self.entries = 0
        self.entry = <const uint64_t**>malloc(8 * <size_t>iova.shape[0] + 8)
        if self.entry == NULL:
            raise MemoryError()
        limits_entries(&self.table, &iova[0], self.entry, iova.shape[0])
        for i in range(<size_t>iova.shape[0]):
            if self.entry[i] == NULL:
                raise ValueError("an address has no leaf table")
        self.entries = iova.shape[0]

    def ceiling(self, const uint64_t[::1] iova not None, uint64_t[::1] pa not None,
                uint8_t[::1] action not None, uint8_t[::1] event not None, bint write=False):
        """Read the leaf entries that find_entries() found for the same addresses."""
        cdef arrays given = rows(iova, pa, action, event)
        if given.n != self.entries:
            raise ValueError("find_entries() was called for other addresses")
        return limits_ceiling(&self.table, &given, self.entry)


@cython.final
@cython.auto_pickle(False)
cdef class Nested:
    """The walks of limits_nested.h; parameters as those of Table, ttb an IPA."""

    cdef nested_table table
    cdef const uint8_t[::1] buffer

    def __init__(self, const uint8_t[::1] buffer not None, uint64_t base, uint64_t ttb,
                 uint64_t s2ttb):
        self.buffer = buffer
        self.table.origin = &buffer[0] - base
        self.table.ttb = ttb
        self.table.s2ttb = s2ttb

    def plain(self, const uint64_t[::1] iova not None, uint64_t[::1] pa not None,
              uint8_t[::1] action not None, uint8_t[::1] event not None, bint write=False):
        """Walk one at a time."""
        cdef arrays given = rows(iova, pa, action, event)
        return limits_nested(&self.table, &given, write)

    def reuse(self, const uint64_t[::1] iova not None, uint64_t[::1] pa not None,
              uint8_t[::1] action not None, uint8_t[::1] event not None, bint write=False):
        """Likewise, with what stage 2 made of tables before."""
        cdef arrays given = rows(iova, pa, action, event)
        return limits_nested_reuse(&self.table, &given, write)

    def cached(self, const uint64_t[::1] iova not None, uint64_t[::1] pa not None,
               uint8_t[::1] action not None, uint8_t[::1] event not None, bint write=False):
        """Likewise, last-level tables of both stages from caches."""
        cdef arrays given = rows(iova, pa, action, event)
        return limits_nested_cached(&self.table, &given, write)


@cython.final
@cython.auto_pickle(False)
cdef class Direct:
    """A direct-mapped table of 4 KiB pages, of arrays of uint64."""

    cdef direct table
    cdef uint64_t[::1] tags, outputs

    def __init__(self, size_t entries):
        if entries == 0 or entries & entries - 1:
            raise ValueError("entries: not a power of two")
        self.tags = np.full(entries, 2**64 - 1, np.uint64)
        self.outputs = np.zeros(entries, np.uint64)
        self.table.tag = &self.tags[0]
        self.table.output = &self.outputs[0]
        self.table.mask = entries - 1

    def fill(self, uint64_t iova, uint64_t output):
        """Put a page in, in place of what was there."""
        self.tags[iova >> 12 & self.table.mask] = iova >> 12
        self.outputs[iova >> 12 & self.table.mask] = output

    def probe(self, const uint64_t[::1] iova not None, uint64_t[::1] out not None):
        """Look every address up; return how many hit."""
        if out.shape[0] < iova.shape[0]:
            raise ValueError("out is shorter than iova")
        return direct_probe(&self.table, &iova[0], iova.shape[0], &out[0])

    def gather(self, const uint64_t[::1] iova not None, uint64_t[::1] out not None):
        """Likewise, by gathers; raise Unavailable where there are none."""
        cdef int64_t hits
        if out.shape[0] < iova.shape[0]:
            raise ValueError("out is shorter than iova")
        hits = direct_gather(&self.table, &iova[0], iova.shape[0], &out[0])
        if hits < 0:
            raise Unavailable("AVX-512")
        return hits


@cython.final
@cython.auto_pickle(False)
cdef class Leaves:
    """Leaf tables side by side, an array of uint64, and what is stored in them."""

    cdef uint64_t[::1] entries

    def __init__(self, uint64_t[::1] entries not None):
        if entries.shape[0] % 8:
            raise ValueError("entries: not a multiple of eight")
        self.entries = entries

    cdef uint64_t* run(self, uint64_t iova, uint64_t size) except NULL:
        if size == 0 or size & 0x7FFF or iova >> 12 >= <uint64_t>self.entries.shape[0] \
                or size >> 12 > <uint64_t>self.entries.shape[0] - (iova >> 12):
            raise ValueError("beyond the tables, or not in eights")
        return &self.entries[iova >> 12]

    def each(self, uint64_t iova, uint64_t pa, uint64_t size):
        """Store a descriptor for each page."""
        fill_each(self.run(iova, size), size >> 12, pa | 0xE43, 1 << 12)

    def vector(self, uint64_t iova, uint64_t pa, uint64_t size):
        """Likewise, eight in each store; raise Unavailable where that is not possible."""
        if not fill_vector(self.run(iova, size), size >> 12, pa | 0xE43, 1 << 12):
            raise Unavailable("AVX-512")


@cython.final
@cython.auto_pickle(False)
cdef class Bitmap:
    """2**20 IDs, a bitmap with three levels above it; all are free at first."""

    cdef bitmap* bits

    def __cinit__(self):
        self.bits = <bitmap*>malloc(sizeof(bitmap))
        if self.bits == NULL:
            raise MemoryError()
        bitmap_clear(self.bits)

    def __dealloc__(self):
        free(self.bits)

    def alloc_each(self, uint32_t[::1] out not None):
        """Fill out with the lowest free IDs, one at a time; return how many there were."""
        return bitmap_alloc_each(self.bits, &out[0], out.shape[0])

    def bulk(self, uint32_t[::1] out not None):
        """Likewise, by words."""
        return bitmap_bulk(self.bits, &out[0], out.shape[0])

    def free_each(self, const uint32_t[::1] ids not None):
        """Free IDs one at a time."""
        cdef uint32_t every = 0
        cdef size_t i
        for i in range(<size_t>ids.shape[0]):
            every |= ids[i]
        if every >> BITMAP_LG2:
            raise ValueError("no such ID")
        bitmap_free_each(self.bits, &ids[0], ids.shape[0])

    def pairs(self, size_t n):
        """Allocate the lowest free ID and free it, n times; return it, or -1."""
        return bitmap_pairs(self.bits, n)

    def pairs_in(self, size_t n, uint32_t min, uint32_t max):
        """Likewise, the lowest from min to max."""
        if min >> BITMAP_LG2 or max >> BITMAP_LG2:
            raise ValueError("no such ID")
        return bitmap_pairs_in(self.bits, n, min, max)


@cython.final
@cython.auto_pickle(False)
cdef class Empty:
    """Methods that take an array and do nothing with it."""

    def view(self, const uint64_t[::1] a):
        """Take it as a typed memoryview."""

    def array(self, cnp.ndarray a):
        """Take it through numpy's C API; return its first element."""
        if cnp.PyArray_TYPE(a) != cnp.NPY_UINT64 or not cnp.PyArray_IS_C_CONTIGUOUS(a) \
                or cnp.PyArray_SIZE(a) == 0:
            raise ValueError("no contiguous array of uint64")
        return (<const uint64_t*>cnp.PyArray_DATA(a))[0]

    def fresh(self, cnp.ndarray a):
        """Return a new array of as many elements."""
        cdef cnp.npy_intp n = cnp.PyArray_SIZE(a)
        return cnp.PyArray_EMPTY(1, &n, cnp.NPY_UINT64, 0)


def mark():
    """Call limits_mark(), at which a program that counts instructions starts anew."""
    limits_mark()
