"""Loops over requests that all hit a TLB of four ways, and what its entries are: probe.h.

Not architectural.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from smmufast._engine.tlb cimport Entry
from smmufast._facts.types cimport BatchC


cdef extern from "_engine/probe.h":
    ctypedef struct Hits "smmufast_hits":
        uint64_t clock
        uint64_t fixed
        uint64_t bits
        uint64_t within
        uint64_t sign
        uint64_t set_mask
        uint64_t sized
        const uint32_t* prints
        const Entry* entries
        uint64_t* order
        const uint64_t* path
        const uint8_t* need
        uint32_t sid
        uint32_t ssid
        uint8_t lg2
        uint8_t access

    # Rows [start, end) until the first that does not simply hit, whose number is returned.
    size_t each_hit "smmufast_each_hit"(
        Hits* hits, const BatchC* batch, size_t start, size_t end) noexcept nogil
    # Likewise, but eight rows at a time, as far as they all hit; of columns that fit.
    bint vector_fits "smmufast_vector_fits"(const BatchC* batch) noexcept nogil
    size_t vector_hits "smmufast_vector_hits"(
        Hits* hits, const BatchC* batch, size_t start, size_t end) noexcept nogil
