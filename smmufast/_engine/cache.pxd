"""One set-associative structure: what TLB, walk caches and configuration caches are made of.

Not architectural.  How many sets and ways a cache has and which entry gives way is a property of
one implementation; what an entry means, and when it must go, is said in `tlb.pxd`.

An entry starts with its tag, two words.  Apart from the entries, and together for the ways of a
set, lie 32-bit prints of the tags: a probe compares these without a jump (four ways are one
vector), and reads an entry only where the print agrees.  The tag decides.

    prints   way w of set s at slot s * ways + w; 0: the way is empty
    entries  likewise, `stride` bytes each

Replacement state is exact for any number of ways:

    LRU      order[slot]: when it was used last, 0 for an empty way
    FIFO     order[slot]: when it was filled, 0 for an empty way
             (the clock is one that every hit and every fill advance)
    PLRU     order[set]: the bits of a binary tree, set where the next victim is in the upper
             half; ways is a power of two, at most 64
    random   one generator for the whole cache

An empty way is taken before any entry gives way; the lowest one first.  No function takes a lock.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from smmufast._facts.bits cimport likely, low_mask

cdef extern from "<assert.h>" nogil:
    void c_assert "assert"(bint) noexcept

cdef extern from "<stdlib.h>" nogil:
    void* aligned_alloc(size_t alignment, size_t size) noexcept

cdef extern from "_engine/probe.h" nogil:
    # Bit w: print w of four is this one.
    unsigned int match4 "smmufast_match4"(const uint32_t* prints, uint32_t print) noexcept
    # The print of a tag: never 0.
    uint32_t print_of "smmufast_print_of"(uint64_t first, uint64_t second) noexcept

cdef extern from * nogil:
    uint64_t ctz64 "(unsigned)__builtin_ctzll"(uint64_t) noexcept


cdef enum:
    POLICY_LRU = 0
    POLICY_PLRU = 1
    POLICY_FIFO = 2
    POLICY_RANDOM = 3

    PLRU_WAYS_MAX = 64
    LINE = 64


cdef struct Counters:
    uint64_t misses
    uint64_t fills
    uint64_t evictions      # entries that gave way to a fill of their set
    uint64_t replacements   # entries that a fill of the same or of overlapping addresses replaced
    uint64_t invalidations  # entries that were invalidated


# What an entry starts with.
cdef struct Tag:
    uint64_t first
    uint64_t second


cdef struct CacheC:
    uint32_t* prints
    uint64_t* order
    uint8_t* entries
    uint64_t set_mask       # sets - 1
    uint32_t ways           # 0: the cache is absent
    uint32_t policy
    uint64_t clock          # hits and fills, ever
    uint64_t passed         # those of them that are not counted as hits: see cache_hits()
    Counters counters
    uint64_t* path          # of PLRU, by way: the nodes above it, and how they point away
    uint64_t slots          # sets * ways
    uint32_t ways_lg2       # of a power of two
    uint32_t stride
    uint64_t live           # entries
    uint64_t random         # state of the generator, never 0


cdef inline uint64_t order_words(const CacheC* c) noexcept nogil:
    """How many words of replacement state there are."""
    if c.policy == POLICY_RANDOM:
        return 0
    return c.slots // c.ways if c.policy == POLICY_PLRU and c.ways else c.slots


cdef inline uint64_t cache_bytes(const CacheC* c) noexcept nogil:
    """Memory that prints, replacement state and entries take."""
    return c.slots * (4 + c.stride) + 8 * order_words(c)


cdef inline void cache_close(CacheC* c) noexcept nogil:
    free(c.prints)
    free(c.order)
    free(c.path)
    free(c.entries)
    memset(c, 0, sizeof(CacheC))


cdef inline uint64_t random_seeded(uint64_t seed) noexcept nogil:
    """A state of the generator, which is not 0."""
    seed += <uint64_t>0x9E3779B97F4A7C15ULL
    seed = (seed ^ seed >> 30) * <uint64_t>0xBF58476D1CE4E5B9ULL
    seed = (seed ^ seed >> 27) * <uint64_t>0x94D049BB133111EBULL
    return (seed ^ seed >> 31) or 1


cdef inline void* zeroed_lines(size_t bytes) noexcept nogil:
    """Memory of zeros, which starts with a cache line and is at least one line."""
    cdef void* memory
    bytes = (bytes + LINE) // LINE * LINE
    memory = aligned_alloc(LINE, bytes)
    if memory != NULL:
        memset(memory, 0, bytes)
    return memory


cdef inline Tag* tag_at(const CacheC* c, uint64_t slot) noexcept nogil:
    return <Tag*>(c.entries + slot * c.stride)


cdef inline int64_t slot_agreeing(
        const CacheC* c, uint64_t slot, uint64_t found, uint64_t first, uint64_t second,
        size_t stride) noexcept nogil:
    """Of the slots that `found` has a bit for, from `slot` on, the one of this tag; or -1."""
    cdef uint64_t at
    cdef const Tag* tag
    while found:
        at = slot + ctz64(found)
        tag = <const Tag*>(c.entries + at * stride)
        if likely(tag.first == first and tag.second == second):
            return at
        found &= found - 1
    return -1


cdef inline int64_t cache_find(
        const CacheC* c, uint64_t set, uint64_t first, uint64_t second,
        size_t stride) noexcept nogil:
    """The slot of a set that has this tag, or -1.  Nothing is counted.

    `stride` is the cache's own, as a constant.
    """
    cdef uint32_t print = print_of(first, second)
    cdef uint64_t slot, found
    cdef int64_t at
    cdef uint32_t left, way
    if likely(c.ways == 4):
        slot = set * 4
        return slot_agreeing(c, slot, match4(&c.prints[slot], print), first, second, stride)
    if c.ways == 8:
        slot = set * 8
        found = match4(&c.prints[slot], print) | match4(&c.prints[slot + 4], print) << 4
        return slot_agreeing(c, slot, found, first, second, stride)
    slot = set * c.ways
    left = c.ways
    while True:
        found = 0
        way = 0
        while way < left and way < 64:
            # reads on into the next set, or behind the last one
            found |= <uint64_t>match4(&c.prints[slot + way], print) << way
            way += 4
        if left < 64:
            found &= low_mask(left)
        at = slot_agreeing(c, slot, found, first, second, stride)
        if at >= 0 or left <= 64:
            return at
        slot += 64
        left -= 64


cdef inline void plru_paths(CacheC* c) noexcept nogil:
    """Fill path[]: of each way the mask of the nodes above it, and their bits to point away."""
    cdef uint64_t way, node, bit
    for way in range(c.ways):
        c.path[2 * way] = 0
        c.path[2 * way + 1] = 0
        node = way | c.ways
        while node > 1:
            bit = <uint64_t>1 << (node >> 1)
            c.path[2 * way] |= bit
            if not node & 1:
                c.path[2 * way + 1] |= bit
            node >>= 1


cdef inline void plru_touch(CacheC* c, uint64_t slot) noexcept nogil:
    cdef uint64_t* bits = &c.order[slot >> c.ways_lg2]
    cdef const uint64_t* path = &c.path[2 * (slot & (c.ways - 1))]
    bits[0] = bits[0] & ~path[0] | path[1]


cdef inline bint cache_open(
        CacheC* c, uint32_t sets, uint32_t ways, uint32_t policy, uint64_t seed,
        uint32_t stride) noexcept nogil:
    """Make an empty cache; False when there is no memory for it.

    `sets` is a power of two; `stride` is of entries, whose Tag comes first.
    """
    memset(c, 0, sizeof(CacheC))
    c.set_mask = sets - 1
    c.ways = ways
    c.slots = <uint64_t>sets * ways
    c.ways_lg2 = ctz64(ways) if ways else 0
    c.policy = policy
    c.stride = stride
    c.random = random_seeded(seed)
    c.prints = <uint32_t*>zeroed_lines(c.slots * 4 + 12)  # match4() reads on
    c.order = <uint64_t*>zeroed_lines(order_words(c) * 8)
    c.entries = <uint8_t*>zeroed_lines(c.slots * stride)
    c.path = <uint64_t*>zeroed_lines(<size_t>ways * 16 if policy == POLICY_PLRU else 0)
    if c.prints == NULL or c.order == NULL or c.entries == NULL or c.path == NULL:
        cache_close(c)
        return False
    if policy == POLICY_PLRU:
        plru_paths(c)
    return True


cdef inline void cache_hit(CacheC* c, uint64_t slot) noexcept nogil:
    """Count a hit of a slot, and tell the replacement."""
    cdef uint64_t clock = c.clock + 1
    c.clock = clock
    if likely(c.policy == POLICY_LRU):
        c.order[slot] = clock
    elif c.policy == POLICY_PLRU:
        plru_touch(c, slot)


cdef inline void cache_hit_times(CacheC* c, uint64_t slot, uint64_t n) noexcept nogil:
    """What n hits of one slot in a row leave; n is not 0."""
    c.clock += n - 1
    cache_hit(c, slot)


cdef inline uint64_t cache_hits(const CacheC* c) noexcept nogil:
    """The counter of hits, which the clock keeps."""
    return c.clock - c.passed


cdef inline void cache_reset_counters(CacheC* c) noexcept nogil:
    """Set the counters to 0; the clock goes on."""
    c.passed = c.clock
    memset(&c.counters, 0, sizeof(Counters))


cdef inline uint64_t random_below(CacheC* c, uint32_t n) noexcept nogil:
    """The generator's next number, below n."""
    c.random ^= c.random << 13
    c.random ^= c.random >> 7
    c.random ^= c.random << 17
    return (c.random >> 32) * n >> 32


cdef inline uint64_t cache_victim(CacheC* c, uint64_t set) noexcept nogil:
    """The slot that the next entry of a set takes: an empty one, else what the policy chooses."""
    cdef uint64_t base = set * c.ways
    cdef uint32_t w, best = 0
    if c.policy == POLICY_LRU or c.policy == POLICY_FIFO:
        for w in range(1, c.ways):
            if c.order[base + w] < c.order[base + best]:
                best = w
        return base + best
    if c.live < c.slots:
        for w in range(c.ways):
            if c.prints[base + w] == 0:
                return base + w
    if c.policy == POLICY_RANDOM:
        return base + random_below(c, c.ways)
    best = 1
    while best < c.ways:
        best = 2 * best | <uint32_t>(c.order[set] >> best & 1)
    return base + (best - c.ways)


cdef inline void cache_put(
        CacheC* c, uint64_t slot, uint64_t first, uint64_t second) noexcept nogil:
    """Give a slot to a new entry, and write its tag; the rest is the caller's to write."""
    cdef Tag* tag = tag_at(c, slot)
    if c.prints[slot]:
        c.counters.evictions += 1
    else:
        c.live += 1
    c.counters.fills += 1
    c.prints[slot] = print_of(first, second)
    tag.first = first
    tag.second = second
    c.clock += 1
    c.passed += 1
    if c.policy == POLICY_LRU or c.policy == POLICY_FIFO:
        c.order[slot] = c.clock
    elif c.policy == POLICY_PLRU:
        plru_touch(c, slot)


cdef inline void cache_drop(CacheC* c, uint64_t slot) noexcept nogil:
    """Empty the slot of an entry."""
    c_assert(c.prints[slot] != 0)
    c.prints[slot] = 0
    c.live -= 1
    if c.policy == POLICY_LRU or c.policy == POLICY_FIFO:
        c.order[slot] = 0
