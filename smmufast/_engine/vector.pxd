"""Many walks at a time in vectors, where the processor has them: vector.h.

Not architectural: the rules are those of _rules/vmsa.pxd, as masks.
"""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef extern from "_engine/vector.h":
    """
    /* Whether batches use vectors; set when the module is loaded. */
    static int smmufast_vector_on;
    """
    ctypedef struct Lanes "smmufast_lanes":
        uint64_t sign
        uint64_t range_mask
        uint64_t index_mask
        uint64_t entry_mask
        uint64_t table_bits
        uint64_t low_address
        uint64_t keep
        uint64_t leaf_bits
        uint64_t block_shifts
        uint64_t[8] allowed
        uint8_t shift
        uint8_t granule
        uint8_t stride
        uint8_t walks

    ctypedef struct Rows "smmufast_rows":
        uint64_t[136] va
        uint64_t[136] first
        const uint8_t* entry[136]
        uint64_t[136] held
        uint64_t[136] tables
        uint32_t[136] sid
        uint32_t[136] ssid
        uint8_t[136] shift
        uint8_t[136] shape
        uint8_t[136] access
        uint64_t start
        uint64_t count
        uint64_t half
        uint64_t lg2
        uint64_t removed
        uint64_t alike

    ctypedef struct Span "smmufast_window":
        uint64_t base
        uint64_t span
        const uint8_t* data

    ctypedef struct Last "smmufast_last":
        uint32_t alike
        uint32_t mixed
        uint32_t careful
        uint32_t blocks
        uint32_t size
        uint32_t lg2

    ctypedef struct NearTable "smmufast_near":
        uint8_t found

    ctypedef struct Out "smmufast_out":
        char* pa
        char* action
        char* event
        ptrdiff_t pa_stride
        ptrdiff_t action_stride
        ptrdiff_t event_stride
        uint8_t ok

    ctypedef struct Known "smmufast_known":
        uint64_t key
        uint64_t table

    uint64_t known_key "smmufast_known_key"(
        const Lanes* lanes, uint64_t ia, uint64_t epoch) noexcept nogil
    size_t known_home "smmufast_known_home"(uint64_t key) noexcept nogil
    void plain_find "smmufast_plain_find"(
        const Lanes* lanes, const Known* known, uint64_t epoch, Rows* rows, size_t count,
        uint64_t* missing) noexcept nogil
    void vector_known "smmufast_vector_known"(
        const Lanes* lanes, const Known* known, uint64_t epoch, Rows* rows, size_t count,
        uint64_t* missing) noexcept nogil

    enum:
        KNOWN_LG2 "SMMUFAST_KNOWN_LG2"
        EPOCH_LG2 "SMMUFAST_EPOCH_LG2"
        GOLDEN "SMMUFAST_GOLDEN"
        HOME "SMMUFAST_HOME"

    void plain_down "smmufast_plain_down"(
        const Lanes* lanes, const Span* window, Rows* rows, size_t start, size_t end, Last* last,
        uint64_t* beyond) noexcept nogil
    size_t plain_arrive "smmufast_plain_arrive"(
        const Lanes* lanes, const Rows* rows, size_t start, size_t end,
        const Out* out) noexcept nogil
    size_t plain_near "smmufast_plain_near"(
        const Lanes* lanes, const Span* window, uint64_t first, const char* iova,
        unsigned int access, size_t start, size_t end, const Out* out,
        NearTable* near) noexcept nogil
    bint vector_here "smmufast_vector_here"() noexcept nogil
    bint vector_on "smmufast_vector_on"
    void vector_down "smmufast_vector_down"(
        const Lanes* lanes, const Span* window, Rows* rows, size_t start, size_t end, Last* last,
        uint64_t* beyond) noexcept nogil
    void vector_find "smmufast_vector_find"(
        const uint64_t* slots, uint64_t epoch, Rows* rows, size_t count,
        uint64_t* missing) noexcept nogil
    size_t vector_near "smmufast_vector_near"(
        const Lanes* lanes, const Span* window, uint64_t first, const char* iova,
        unsigned int access, size_t start, size_t end, const Out* out,
        NearTable* near) noexcept nogil
    size_t vector_arrive "smmufast_vector_arrive"(
        const Lanes* lanes, const Rows* rows, size_t start, size_t end,
        const Out* out) noexcept nogil


cdef inline uint64_t slot_home(uint64_t key) noexcept nogil:
    """Where a pair is looked for first, of 2^13; its epoch does not count."""
    return ((key >> 10) * <uint64_t>GOLDEN) >> HOME


cdef inline void vector_switch(bint on) noexcept nogil:
    """Let batches use vectors, or not."""
    global vector_on
    vector_on = on and vector_here()
