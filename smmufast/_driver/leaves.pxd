"""Runs of descriptors in plain memory, several at a time: leaves.h.

Not architectural.  `host` is the host's address of the first descriptor, a multiple of 8; `d` is a
descriptor in host byte order.
"""

from libc.stdint cimport uint8_t, uint64_t

from smmufast._facts.bits cimport le64  # leaves.h uses it


cdef extern from "_driver/leaves.h" nogil:
    bint leaves_here "smmufast_leaves_here"() noexcept
    bint leaves_wide "smmufast_leaves_wide"
    void leaves_fill "smmufast_leaves_fill"(
        uint64_t host, uint64_t n, uint64_t d, uint64_t step) noexcept
    uint64_t leaves_union "smmufast_leaves_union"(uint64_t host, uint64_t n) noexcept
    uint64_t leaves_alike "smmufast_leaves_alike"(
        uint64_t host, uint64_t n, uint64_t mask, uint64_t d) noexcept
    void leaves_each "smmufast_leaves_each"(
        uint64_t host, uint64_t n, uint64_t mask, uint64_t d, uint8_t* out) noexcept


cdef inline void leaves_switch(bint on) noexcept nogil:
    """Let runs use vectors, or not."""
    global leaves_wide
    leaves_wide = on and leaves_here()
