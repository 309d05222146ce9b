"""Bits and byte order: masks, single-copy-atomic loads, and how functions are not inlined."""

from libc.stdint cimport uint64_t

cdef extern from *:
    """
    #if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    #define smmufast_le64(x) (x)
    #else
    #define smmufast_le64(x) __builtin_bswap64(x)
    #endif
    #define smmufast_swap64(x) __builtin_bswap64(x)
    /* One load: what was checked is what is used, whoever writes meanwhile. */
    #define smmufast_load64(p) __atomic_load_n((const uint64_t *)(p), __ATOMIC_RELAXED)
    #define smmufast_prefetch(p) __builtin_prefetch((const void *)(p))
    #define smmufast_unlikely(x) __builtin_expect(!!(x), 0)
    #define smmufast_likely(x) __builtin_expect(!!(x), 1)
    static inline void *smmufast_noinline(void *function)
    {
        __asm__("" : "+r"(function));
        return function;
    }
    """
    uint64_t le64 "smmufast_le64"(uint64_t value) noexcept nogil
    uint64_t swap64 "smmufast_swap64"(uint64_t value) noexcept nogil
    uint64_t load64 "smmufast_load64"(const void* p) noexcept nogil
    void prefetch "smmufast_prefetch"(const void* p) noexcept nogil
    bint unlikely "smmufast_unlikely"(bint condition) noexcept nogil
    bint likely "smmufast_likely"(bint condition) noexcept nogil
    # A function that a hot loop seldom calls, kept apart: inlined it would slow the loop down.
    void* noinline "smmufast_noinline"(void* function) noexcept nogil


cdef inline uint64_t low_mask(unsigned int bits) noexcept nogil:
    """Ones in bits [bits-1:0]; bits is 0 to 63."""
    return (<uint64_t>1 << bits) - 1
