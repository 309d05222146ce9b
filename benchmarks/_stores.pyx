"""What page tables are measured against: bare stores in plain C, and methods that do nothing."""

cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t


cdef extern from "baseline_stores.h" nogil:
    void stores_fill(uint64_t*, size_t, uint64_t, uint64_t) noexcept
    void stores_clear(uint64_t*, size_t) noexcept
    void stores_dirty(const uint64_t*, size_t, uint8_t*) noexcept
    void stores_clean(uint64_t*, size_t, uint8_t*) noexcept


@cython.final
@cython.auto_pickle(False)
cdef class Stores:
    """Leaf tables of 4 KiB pages, side by side, in an array of uint64.

    Parameters
    ----------
    entries
        As many as there are pages.
    """

    cdef uint64_t[::1] entries

    def __init__(self, uint64_t[::1] entries not None):
        self.entries = entries

    def map(self, uint64_t iova, uint64_t pa, uint64_t size):
        """Write a descriptor for each page."""
        cdef uint64_t first = iova >> 12, n = size >> 12
        if n == 0 or first >= <uint64_t>self.entries.shape[0] \
                or n > <uint64_t>self.entries.shape[0] - first:
            raise ValueError("beyond the tables")
        stores_fill(&self.entries[first], n, pa | 0xE43, 1 << 12)

    def unmap(self, uint64_t iova, uint64_t size):
        """Clear the descriptor of each page; return the size."""
        cdef uint64_t first = iova >> 12, n = size >> 12
        if n == 0 or first >= <uint64_t>self.entries.shape[0] \
                or n > <uint64_t>self.entries.shape[0] - first:
            raise ValueError("beyond the tables")
        stores_clear(&self.entries[first], n)
        return size

    def read_dirty(self, uint8_t[::1] dirty not None, bint clear):
        """Tell of each page whether it is dirty; with `clear`, make it clean."""
        if dirty.shape[0] != self.entries.shape[0] or dirty.shape[0] == 0:
            raise ValueError("as many bytes as there are pages")
        if clear:
            stores_clean(&self.entries[0], dirty.shape[0], &dirty[0])
        else:
            stores_dirty(&self.entries[0], dirty.shape[0], &dirty[0])


@cython.final
@cython.auto_pickle(False)
cdef class Empty:
    """Methods that take integers and do nothing."""

    def one_int(self, uint64_t a):
        """Return a, as a new int."""
        return a

    def two_int(self, uint64_t a, uint64_t b):
        """Return b, as a new int."""
        return b

    def three_none(self, uint64_t a, uint64_t b, uint64_t c):
        """Return None."""
        return None

    def three_int(self, uint64_t a, uint64_t b, uint64_t c):
        """Return b, as a new int."""
        return b
