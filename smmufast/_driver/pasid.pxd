# cython: language_level=3
"""PASIDs: a bitmap of IDs with summary levels, and the free functions that work on it.

Not architectural: which ID is handed out is the driver's own choice. What comes from outside is
that an ID has at most 20 bits (PCIe PASID; IHI 0070, SMMU_IDR1.SSIDSIZE) and that 0 is not given
to an address space.

Every ID is in one of three states: free, allocated, reserved. Two bits hold the state:

    free[]   reserved[]   state
      1          0        free
      0          0        allocated
      0          1        reserved

IDs between `size` and the end of the last word are reserved for ever, so no function masks the
last word. Above `free[]` stand two summary levels: a bit of `filled[]` is set while its word of
`free[]` is not zero, and a bit of `regions[]` while its word of `filled[]` is not zero. With 2^20
IDs these are 16384, 256 and 4 words.

None of these functions takes a lock or needs the GIL. PasidAllocator calls all of them with the
GIL held, or in a critical section of the allocator where Python has no GIL, which is what makes
its methods atomic between Python threads. C callers that share one `Pasids` between threads hold
the GIL or enter that critical section too, or have a lock of their own. The functions know nothing
of owners: an ID that was given an owner is given back by `PasidAllocator.free()`.
"""

from libc.stdint cimport uint32_t, uint64_t

cdef extern from "<assert.h>" nogil:
    void c_assert "assert"(bint) noexcept

cdef extern from * nogil:
    """
    #define PASID_NONE UINT32_MAX
    """
    # No such ID: greater than every last ID, so `pasid <= last` also tells that there is one.
    const uint32_t PASID_NONE
    int ctz "__builtin_ctzll"(uint64_t) noexcept
    int popcount "__builtin_popcountll"(uint64_t) noexcept

cdef enum:
    PASID_SIZE_MAX = 1 << 20

    # states, as bits so that pasid_next() can look for several
    PASID_FREE = 1
    PASID_ALLOCATED = 2
    PASID_RESERVED = 4


cdef struct Pasids:
    uint64_t* free
    uint64_t* filled
    uint64_t* regions
    uint64_t* reserved
    uint32_t size            # IDs are 0 .. size - 1
    uint32_t n_regions       # words in regions[]
    uint32_t n_allocated
    uint32_t n_free
    uint32_t cursor          # next fit: where the next search starts, at most size
    bint cyclic


# Owned by PasidAllocator; other modules cimport the class and use `&allocator.pasids`.
cdef class PasidAllocator:
    cdef Pasids pasids
    cdef dict owners

    cdef uint32_t _allocated_from(self, uint32_t first) noexcept


cdef inline uint64_t pasid_bit(uint32_t i) noexcept nogil:
    return <uint64_t>1 << (i & 63)


cdef inline uint64_t pasid_above(uint32_t i) noexcept nogil:
    """The bits of a word above bit i."""
    return ~<uint64_t>1 << (i & 63)


cdef inline uint64_t pasid_mask(uint32_t word, uint32_t first, uint32_t last) noexcept nogil:
    """The bits of a word whose IDs are in first .. last; the word holds at least one of them."""
    cdef uint64_t mask = ~<uint64_t>0
    if word == first >> 6:
        mask &= ~<uint64_t>0 << (first & 63)
    if word == last >> 6:
        mask &= ~<uint64_t>0 >> (63 - (last & 63))
    return mask


cdef inline int pasid_state(const Pasids* p, uint32_t pasid) noexcept nogil:
    """PASID_FREE, PASID_ALLOCATED or PASID_RESERVED."""
    c_assert(pasid < p.size)
    cdef uint64_t bit = pasid_bit(pasid)
    if p.free[pasid >> 6] & bit:
        return PASID_FREE
    return PASID_RESERVED if p.reserved[pasid >> 6] & bit else PASID_ALLOCATED


cdef inline uint32_t pasid_next(
    const Pasids* p, uint32_t first, uint32_t last, int states
) noexcept nogil:
    """Lowest ID of first .. last that is in one of the states, or PASID_NONE; `last` < size.

    Reads every word on its way; to find a free ID, pasid_find() is quicker.
    """
    cdef uint64_t mask = ~<uint64_t>0 << (first & 63)
    cdef uint64_t found
    cdef uint32_t word, pasid
    c_assert(last < p.size)
    if first > last:
        return PASID_NONE
    for word in range(first >> 6, (last >> 6) + 1):
        found = 0
        if states & PASID_FREE:
            found |= p.free[word]
        if states & PASID_ALLOCATED:
            found |= ~(p.free[word] | p.reserved[word])
        if states & PASID_RESERVED:
            found |= p.reserved[word]
        found &= mask
        if found:
            pasid = word << 6 | <uint32_t>ctz(found)
            return pasid if pasid <= last else PASID_NONE
        mask = ~<uint64_t>0
    return PASID_NONE


cdef inline uint32_t pasid_find(const Pasids* p, uint32_t first) noexcept nogil:
    """Lowest free ID from first on, or PASID_NONE."""
    c_assert(first < p.size)
    cdef uint64_t found = p.free[first >> 6] >> (first & 63)
    cdef uint32_t i
    if found:
        return first + <uint32_t>ctz(found)
    i = first >> 6
    found = p.filled[i >> 6] & pasid_above(i)
    i >>= 6
    if not found:
        found = p.regions[i >> 6] & pasid_above(i)
        i >>= 6
        while not found:
            i += 1
            if i >= p.n_regions:
                return PASID_NONE
            found = p.regions[i]
        i = i << 6 | <uint32_t>ctz(found)
        found = p.filled[i]
    i = i << 6 | <uint32_t>ctz(found)
    return i << 6 | <uint32_t>ctz(p.free[i])


cdef inline void pasid_clear_word(Pasids* p, uint32_t word, uint64_t bits) noexcept nogil:
    """Make IDs of one word not free. Counts nothing."""
    cdef uint32_t above = word >> 6
    p.free[word] &= ~bits
    if p.free[word] == 0:
        p.filled[above] &= ~pasid_bit(word)
        if p.filled[above] == 0:
            p.regions[above >> 6] &= ~pasid_bit(above)


cdef inline void pasid_set_word(Pasids* p, uint32_t word, uint64_t bits) noexcept nogil:
    """Make IDs of one word free. Counts nothing."""
    cdef uint32_t above = word >> 6
    cdef uint64_t before = p.free[word]
    p.free[word] = before | bits
    if before == 0:
        p.filled[above] |= pasid_bit(word)
        p.regions[above >> 6] |= pasid_bit(above)


cdef inline void pasid_summarise(Pasids* p) noexcept nogil:
    """Fill everything that follows from size, free[] and reserved[]."""
    cdef uint32_t words = (p.size + 63) // 64
    cdef uint32_t n_reserved = 0
    cdef uint32_t word
    for word in range((words + 63) // 64):
        p.filled[word] = 0
    for word in range(p.n_regions):
        p.regions[word] = 0
    p.n_free = 0
    for word in range(words):
        p.n_free += <uint32_t>popcount(p.free[word])
        n_reserved += <uint32_t>popcount(p.reserved[word])
        if p.free[word]:
            p.filled[word >> 6] |= pasid_bit(word)
            p.regions[word >> 12] |= pasid_bit(word >> 6)
    p.n_allocated = 64 * words - n_reserved - p.n_free


cdef inline uint32_t pasid_choose(const Pasids* p, uint32_t first, uint32_t last) noexcept nogil:
    """The ID of first .. last that the next allocation hands out, or PASID_NONE.

    Lowest first; with `cyclic`, the lowest from the cursor on, else the lowest from first on.
    """
    cdef uint32_t pasid
    if p.cyclic and first < p.cursor <= last:
        pasid = pasid_find(p, p.cursor)
        if pasid <= last:
            return pasid
    pasid = pasid_find(p, first)
    return pasid if pasid <= last else PASID_NONE


cdef inline void pasid_take(Pasids* p, uint32_t pasid) noexcept nogil:
    """Allocate an ID that is free."""
    c_assert(pasid_state(p, pasid) == PASID_FREE)
    pasid_clear_word(p, pasid >> 6, pasid_bit(pasid))
    p.n_allocated += 1
    p.n_free -= 1
    p.cursor = pasid + 1


cdef inline uint32_t pasid_alloc(Pasids* p, uint32_t first, uint32_t last) noexcept nogil:
    """Allocate one ID of first .. last, where first <= last < size; PASID_NONE if none is free."""
    cdef uint32_t pasid = pasid_choose(p, first, last)
    if pasid != PASID_NONE:
        pasid_take(p, pasid)
    return pasid


cdef inline bint pasid_free(Pasids* p, uint32_t pasid) noexcept nogil:
    """Give an ID back. False, and nothing done, unless it is below size and allocated."""
    if pasid >= p.size or pasid_state(p, pasid) != PASID_ALLOCATED:
        return False
    pasid_set_word(p, pasid >> 6, pasid_bit(pasid))
    p.n_allocated -= 1
    p.n_free += 1
    return True


cdef inline uint32_t pasid_count(
    const Pasids* p, uint32_t first, uint32_t last, uint32_t enough
) noexcept nogil:
    """How many IDs of first .. last are free; stops counting once there are `enough`."""
    cdef uint32_t n = 0
    cdef uint32_t word
    cdef uint64_t bits
    if first == 0 and last == p.size - 1:
        return p.n_free
    first = pasid_find(p, first)
    while first <= last and n < enough:
        word = first >> 6
        bits = p.free[word] & pasid_mask(word, first, last)
        n += 64 if bits == ~<uint64_t>0 else <uint32_t>popcount(bits)
        first = (word + 1) << 6
        if first > last:
            break
        first = pasid_find(p, first)
    return n


cdef inline uint32_t pasid_take_many(
    Pasids* p, uint32_t first, uint32_t last, uint32_t n, uint32_t* out
) noexcept nogil:
    """Allocate up to n IDs of first .. last, lowest first, and write them to out; return how many.
    """
    cdef uint32_t* start = out
    cdef uint32_t word, base, left
    cdef uint64_t bits, taken
    cdef size_t j
    while n and first <= last:
        first = pasid_find(p, first)
        if first > last:
            break
        word = first >> 6
        base = word << 6
        bits = p.free[word] & pasid_mask(word, first, last)
        if bits == ~<uint64_t>0 and n >= 64:
            # The compiler turns this loop into vector stores.
            for j in range(64):
                out[j] = base + <uint32_t>j
            taken = bits
            left = 64
        else:
            left = popcount(bits)
            if left > n:
                left = n
            taken = bits
            for j in range(left):
                out[j] = base + <uint32_t>ctz(bits)
                bits &= bits - 1
            taken ^= bits
        out += left
        n -= left
        pasid_clear_word(p, word, taken)
        first = base + 64
    left = <uint32_t>(out - start)
    if left:
        p.cursor = start[left - 1] + 1
    p.n_allocated += left
    p.n_free -= left
    return left


cdef inline bint pasid_alloc_many(
    Pasids* p, uint32_t first, uint32_t last, uint32_t n, uint32_t* out
) noexcept nogil:
    """Write n IDs to out, those that n calls of pasid_alloc() would return, in that order.

    False, and nothing done, if fewer than n are free in first .. last.
    """
    cdef uint32_t done = 0
    if pasid_count(p, first, last, n) < n:
        return False
    if p.cyclic and first < p.cursor <= last:
        done = pasid_take_many(p, p.cursor, last, n, out)
    if done < n:
        pasid_take_many(p, first, last, n - done, out + done)
    return True


cdef inline bint pasid_is_run(const uint32_t* ids) noexcept nogil:
    """64 consecutive IDs in ascending order."""
    cdef uint32_t difference = 0
    cdef uint32_t j
    if ids[63] != ids[0] + 63:
        return False
    for j in range(64):
        difference |= ids[j] ^ (ids[0] + j)
    return difference == 0


cdef inline size_t pasid_free_many(Pasids* p, const uint32_t* ids, size_t n) noexcept nogil:
    """Give n IDs back, in any order. Returns n.

    If an ID is out of range, not allocated, or there twice, nothing is done, and the index of the
    first such (of two equal ones, the second) is returned.
    """
    cdef size_t done = 0
    cdef size_t j
    cdef uint32_t word
    cdef uint64_t allocated, left
    while done < n:
        if ids[done] >= p.size:
            break
        word = ids[done] >> 6
        allocated = ~(p.free[word] | p.reserved[word])
        if (allocated == ~<uint64_t>0 and n - done >= 64 and not ids[done] & 63
                and pasid_is_run(ids + done)):
            pasid_set_word(p, word, allocated)
            done += 64
            continue
        # What follows in the same word is given back together.
        left = allocated
        while done < n and ids[done] >> 6 == word and left & pasid_bit(ids[done]):
            left ^= pasid_bit(ids[done])
            done += 1
        if left == allocated:
            break
        pasid_set_word(p, word, allocated ^ left)
    if done < n:
        for j in range(done):
            pasid_clear_word(p, ids[j] >> 6, pasid_bit(ids[j]))
        return done
    p.n_allocated -= <uint32_t>n
    p.n_free += <uint32_t>n
    return n


cdef inline uint32_t pasid_reserve(Pasids* p, uint32_t first, uint32_t last) noexcept nogil:
    """Reserve first .. last. PASID_NONE if done, else the lowest ID that is not free."""
    cdef uint32_t word
    cdef uint64_t mask
    cdef uint32_t obstacle = pasid_next(p, first, last, PASID_ALLOCATED | PASID_RESERVED)
    if obstacle != PASID_NONE:
        return obstacle
    for word in range(first >> 6, (last >> 6) + 1):
        mask = pasid_mask(word, first, last)
        pasid_clear_word(p, word, mask)
        p.reserved[word] |= mask
    p.n_free -= last - first + 1
    return PASID_NONE


cdef inline uint32_t pasid_unreserve(Pasids* p, uint32_t first, uint32_t last) noexcept nogil:
    """Make first .. last free. PASID_NONE if done, else the lowest ID that is not reserved."""
    cdef uint32_t word
    cdef uint64_t mask
    cdef uint32_t obstacle = pasid_next(p, first, last, PASID_FREE | PASID_ALLOCATED)
    if obstacle != PASID_NONE:
        return obstacle
    for word in range(first >> 6, (last >> 6) + 1):
        mask = pasid_mask(word, first, last)
        p.reserved[word] &= ~mask
        pasid_set_word(p, word, mask)
    p.n_free += last - first + 1
    return PASID_NONE
