"""One set-associative structure: what TLB, walk caches and configuration caches are made of.

Not architectural.  How many sets and ways a cache has and which entry gives way is a property of
one implementation; what an entry means, and when it must go, is said in `_tlb.pxd`.

An entry has a tag of two words and a payload of `stride` bytes.  The tags of a set lie together,
first words first (four ways are one cache line), so that a probe compares them without a jump
and reads a payload on a hit only.  The second word of an empty way is 0; that of an entry is not.

    tags     set 0: first[way 0..], second[way 0..]; set 1: ...
    entries  payload of way w of set s at slot s * ways + w

Replacement state is exact for any number of ways:

    LRU      order[slot]: when it was used last, 0 for an empty way
    FIFO     order[slot]: when it was filled, 0 for an empty way
    PLRU     order[set]: the bits of a binary tree; ways is a power of two, at most 64
    random   one generator for the whole cache

An empty way is taken before any entry gives way; the lowest one first.  No function takes a lock.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

cdef extern from "<assert.h>" nogil:
    void c_assert "assert"(bint) noexcept

cdef extern from "<stdlib.h>" nogil:
    void* aligned_alloc(size_t alignment, size_t size) noexcept

cdef extern from * nogil:
    int ctz64 "__builtin_ctzll"(uint64_t) noexcept


cdef enum:
    POLICY_LRU = 0
    POLICY_PLRU = 1
    POLICY_FIFO = 2
    POLICY_RANDOM = 3

    PLRU_WAYS_MAX = 64
    LINE = 64


cdef struct Counters:
    uint64_t hits
    uint64_t misses
    uint64_t fills
    uint64_t evictions      # entries that gave way to a fill of their set
    uint64_t replacements   # entries that a fill of the same or of overlapping addresses replaced
    uint64_t invalidations  # entries that were invalidated


cdef struct CacheC:
    uint64_t* tags
    uint64_t* order
    uint8_t* entries
    uint32_t sets           # a power of two; 0 and no ways: the cache is absent
    uint32_t ways
    uint32_t ways_lg2       # of PLRU
    uint32_t policy
    uint32_t stride
    uint32_t live           # entries
    uint64_t clock          # of LRU and FIFO
    uint64_t random         # state of the generator, never 0
    Counters counters


cdef inline uint64_t order_words(const CacheC* c) noexcept nogil:
    """How many words of replacement state there are."""
    if c.policy == POLICY_RANDOM:
        return 0
    return c.sets if c.policy == POLICY_PLRU else <uint64_t>c.sets * c.ways


cdef inline uint64_t cache_bytes(const CacheC* c) noexcept nogil:
    """Memory that tags, replacement state and payloads take."""
    return <uint64_t>c.sets * c.ways * (16 + c.stride) + 8 * order_words(c)


cdef inline void cache_close(CacheC* c) noexcept nogil:
    free(c.tags)
    free(c.order)
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


cdef inline bint cache_open(
        CacheC* c, uint32_t sets, uint32_t ways, uint32_t policy, uint64_t seed,
        uint32_t stride) noexcept nogil:
    """Make an empty cache; False when there is no memory for it.

    `sets` is a power of two.
    """
    memset(c, 0, sizeof(CacheC))
    c.sets = sets
    c.ways = ways
    c.ways_lg2 = ctz64(ways) if ways else 0
    c.policy = policy
    c.stride = stride
    c.random = random_seeded(seed)
    c.tags = <uint64_t*>zeroed_lines(<size_t>sets * ways * 16)
    c.order = <uint64_t*>zeroed_lines(order_words(c) * 8)
    c.entries = <uint8_t*>zeroed_lines(<size_t>sets * ways * stride)
    if c.tags == NULL or c.order == NULL or c.entries == NULL:
        cache_close(c)
        return False
    return True


cdef inline uint64_t* tags_of(const CacheC* c, uint64_t set) noexcept nogil:
    return c.tags + set * 2 * c.ways


cdef inline uint64_t slot_first(const CacheC* c, uint64_t slot) noexcept nogil:
    """First word of a slot's tag."""
    return c.tags[slot + slot // c.ways * c.ways]


cdef inline uint64_t slot_second(const CacheC* c, uint64_t slot) noexcept nogil:
    """Second word of a slot's tag, 0 when it is empty."""
    return c.tags[slot + slot // c.ways * c.ways + c.ways]


cdef inline int way_matching(
        const uint64_t* t, uint32_t ways, uint64_t first, uint64_t second) noexcept nogil:
    """The way of a set that has this tag, or -1.  A constant `ways` makes it free of jumps."""
    cdef uint64_t found = 0
    cdef uint32_t w
    for w in range(ways):
        found |= <uint64_t>(((t[w] ^ first) | (t[ways + w] ^ second)) == 0) << w
    return ctz64(found) if found else -1


cdef inline int64_t cache_find(
        const CacheC* c, uint64_t set, uint64_t first, uint64_t second) noexcept nogil:
    """The slot of a set that has this tag, or -1.  Nothing is counted."""
    cdef const uint64_t* t = tags_of(c, set)
    cdef int64_t way = -1
    cdef uint32_t w
    if c.ways == 4:
        way = way_matching(t, 4, first, second)
    elif c.ways == 8:
        way = way_matching(t, 8, first, second)
    elif c.ways == 2:
        way = way_matching(t, 2, first, second)
    else:
        for w in range(c.ways):
            if t[w] == first and t[c.ways + w] == second:
                way = w
                break
    return way if way < 0 else <int64_t>(set * c.ways) + way


cdef inline void plru_point_away(CacheC* c, uint64_t slot) noexcept nogil:
    """Make every node above a way point to its other half."""
    cdef uint64_t* bits = &c.order[slot >> c.ways_lg2]
    cdef uint64_t node = slot & (c.ways - 1) | c.ways
    while node > 1:
        # a node's bit is set when the next victim is in its upper half
        if node & 1:
            bits[0] &= ~(<uint64_t>1 << (node >> 1))
        else:
            bits[0] |= <uint64_t>1 << (node >> 1)
        node >>= 1


cdef inline void cache_touch(CacheC* c, uint64_t slot) noexcept nogil:
    """Tell the replacement that a slot was used."""
    if c.policy == POLICY_LRU:
        c.clock += 1
        c.order[slot] = c.clock
    elif c.policy == POLICY_PLRU:
        plru_point_away(c, slot)


cdef inline void cache_hit(CacheC* c, uint64_t slot) noexcept nogil:
    """Count a hit of a slot, and tell the replacement."""
    c.counters.hits += 1
    cache_touch(c, slot)


cdef inline uint64_t random_below(CacheC* c, uint32_t n) noexcept nogil:
    """The generator's next number, below n."""
    c.random ^= c.random << 13
    c.random ^= c.random >> 7
    c.random ^= c.random << 17
    return (c.random >> 32) * n >> 32


cdef inline uint64_t cache_victim(CacheC* c, uint64_t set) noexcept nogil:
    """The slot that the next entry of a set takes: an empty one, else what the policy chooses."""
    cdef uint64_t base = set * c.ways
    cdef const uint64_t* second = tags_of(c, set) + c.ways
    cdef uint32_t w, best = 0
    if c.policy == POLICY_LRU or c.policy == POLICY_FIFO:
        for w in range(1, c.ways):
            if c.order[base + w] < c.order[base + best]:
                best = w
        return base + best
    if c.live < c.sets * c.ways:
        for w in range(c.ways):
            if second[w] == 0:
                return base + w
    if c.policy == POLICY_RANDOM:
        return base + random_below(c, c.ways)
    best = 1
    while best < c.ways:
        best = 2 * best | <uint32_t>(c.order[set] >> best & 1)
    return base + (best - c.ways)


cdef inline void cache_put(
        CacheC* c, uint64_t slot, uint64_t first, uint64_t second) noexcept nogil:
    """Give a slot to a new entry; the payload is the caller's to write.  `second` is not 0."""
    cdef uint64_t* t = &c.tags[slot + slot // c.ways * c.ways]
    if t[c.ways]:
        c.counters.evictions += 1
    else:
        c.live += 1
    c.counters.fills += 1
    t[0] = first
    t[c.ways] = second
    if c.policy == POLICY_FIFO:
        c.clock += 1
        c.order[slot] = c.clock
    else:
        cache_touch(c, slot)


cdef inline void cache_drop(CacheC* c, uint64_t slot) noexcept nogil:
    """Empty the slot of an entry."""
    c_assert(slot_second(c, slot) != 0)
    c.tags[slot + slot // c.ways * c.ways + c.ways] = 0
    c.live -= 1
    if c.policy == POLICY_LRU or c.policy == POLICY_FIFO:
        c.order[slot] = 0
