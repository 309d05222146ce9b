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

A cache of more than MANY ways does not look at all of a set.  An index finds a tag, and of each
set there is a heap of its slots, the next victim first:

    index    slot + 1 in open addressing by print; 0: empty
    heap     slots by set; `keys` has beside each what its rank was when it was put there.  Ranks
             grow in between (a hit), so a victim is one whose key still is its rank; only
             cache_drop() lowers a rank, and finds the slot in the heap by `place`.
    rank     order[slot], or with other policies whether the slot has an entry; then the slot
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from smmufast._facts.bits cimport likely, low_mask, unlikely

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
    MANY = 16       # ways of a set that are looked at one after another
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
    bint quiet              # of a copy: it is looked at alone, and counts and keeps nothing
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
    uint32_t* index         # of many ways; else NULL
    uint64_t index_mask
    uint32_t* heap          # of many ways, but for PLRU; else NULL
    uint64_t* keys
    uint32_t* place


cdef inline uint64_t order_words(const CacheC* c) noexcept nogil:
    """How many words of replacement state there are."""
    if c.policy == POLICY_RANDOM:
        return 0
    return c.slots // c.ways if c.policy == POLICY_PLRU and c.ways else c.slots


cdef inline uint64_t cache_bytes(const CacheC* c) noexcept nogil:
    """Memory that prints, replacement state and entries take, and what finds them."""
    cdef uint64_t bytes = c.slots * (4 + c.stride) + 8 * order_words(c)
    if c.index != NULL:
        bytes += 4 * (c.index_mask + 1)
    if c.heap != NULL:
        bytes += 16 * c.slots
    return bytes


cdef inline void cache_close(CacheC* c) noexcept nogil:
    free(c.index)
    free(c.heap)
    free(c.keys)
    free(c.place)
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


cdef inline bint tag_is(
        const CacheC* c, uint64_t slot, uint64_t first, uint64_t second,
        size_t stride) noexcept nogil:
    """The entry of a slot has this tag.  `stride` is the cache's own, as a constant."""
    cdef const Tag* tag = <const Tag*>(c.entries + slot * stride)
    return likely(tag.first == first and tag.second == second)


cdef inline int64_t slot_agreeing(
        const CacheC* c, uint64_t slot, uint64_t found, uint64_t first, uint64_t second,
        size_t stride) noexcept nogil:
    """Of the slots that `found` has a bit for, from `slot` on, the one of this tag; or -1."""
    cdef uint64_t at
    while found:
        at = slot + ctz64(found)
        if tag_is(c, at, first, second, stride):
            return at
        found &= found - 1
    return -1


# --- many ways ---

cdef inline int64_t index_find(
        const CacheC* c, uint64_t first, uint64_t second, size_t stride) noexcept nogil:
    """The slot of the entry with this tag, or -1."""
    cdef uint32_t print = print_of(first, second), found
    cdef uint64_t at = print >> 1 & c.index_mask
    while True:
        found = c.index[at]
        if found == 0:
            return -1
        found -= 1
        if c.prints[found] == print and tag_is(c, found, first, second, stride):
            return found
        at = (at + 1) & c.index_mask


cdef inline void index_add(CacheC* c, uint64_t slot) noexcept nogil:
    """Make the entry of a slot, which has its print, be found."""
    cdef uint64_t at = c.prints[slot] >> 1 & c.index_mask
    while c.index[at]:
        at = (at + 1) & c.index_mask
    c.index[at] = <uint32_t>slot + 1


cdef inline void index_remove(CacheC* c, uint64_t slot) noexcept nogil:
    """Forget the entry of a slot, which still has its print.

    What lies behind its place moves up where it may: nothing is found across an empty place.
    """
    cdef uint64_t mask = c.index_mask, at = c.prints[slot] >> 1 & mask, next, home
    while c.index[at] != slot + 1:
        at = (at + 1) & mask
    next = at
    while True:
        next = (next + 1) & mask
        if c.index[next] == 0:
            break
        home = c.prints[c.index[next] - 1] >> 1 & mask
        if (next - home & mask) >= (next - at & mask):
            c.index[at] = c.index[next]
            at = next
    c.index[at] = 0


cdef inline uint64_t rank_of(const CacheC* c, uint64_t slot) noexcept nogil:
    """What a slot's key in the heap should be."""
    if c.policy == POLICY_LRU or c.policy == POLICY_FIFO:
        return c.order[slot]
    return c.prints[slot] != 0


cdef inline bint heap_before(
        const CacheC* c, uint64_t key, uint32_t slot, uint64_t at) noexcept nogil:
    """A slot with this key is to go before the one at a place of the heap."""
    return key < c.keys[at] or (key == c.keys[at] and slot < c.heap[at])


cdef inline void heap_put(CacheC* c, uint64_t at, uint64_t key, uint32_t slot) noexcept nogil:
    c.keys[at] = key
    c.heap[at] = slot
    c.place[slot] = <uint32_t>at


cdef inline void heap_down(CacheC* c, uint64_t base, uint64_t i, uint64_t key) noexcept nogil:
    """Give the slot at place i of a set's heap a larger key."""
    cdef uint32_t slot = c.heap[base + i]
    cdef uint64_t child
    while 2 * i + 1 < c.ways:
        child = 2 * i + 1
        if child + 1 < c.ways and heap_before(
                c, c.keys[base + child + 1], c.heap[base + child + 1], base + child):
            child += 1
        if heap_before(c, key, slot, base + child):
            break
        heap_put(c, base + i, c.keys[base + child], c.heap[base + child])
        i = child
    heap_put(c, base + i, key, slot)


cdef inline void heap_lowest(CacheC* c, uint64_t slot) noexcept nogil:
    """A slot is empty now: its key is 0."""
    cdef uint64_t base = slot - slot % c.ways, i = c.place[slot] - base, parent
    while i:
        parent = (i - 1) >> 1
        if not heap_before(c, 0, <uint32_t>slot, base + parent):
            break
        heap_put(c, base + i, c.keys[base + parent], c.heap[base + parent])
        i = parent
    heap_put(c, base + i, 0, <uint32_t>slot)


cdef inline uint32_t heap_first(CacheC* c, uint64_t base) noexcept nogil:
    """The slot of the lowest rank in the set whose slots begin at `base`."""
    cdef uint64_t rank
    while True:
        rank = rank_of(c, c.heap[base])
        if rank == c.keys[base]:
            return c.heap[base]
        heap_down(c, base, 0, rank)


cdef inline void heap_make(CacheC* c) noexcept nogil:
    """Order the heaps anew, by the ranks there are."""
    cdef uint64_t base, i
    for i in range(c.slots):
        heap_put(c, i, rank_of(c, i), <uint32_t>i)
    base = 0
    while base < c.slots:
        i = c.ways >> 1
        while i:
            i -= 1
            heap_down(c, base, i, c.keys[base + i])
        base += c.ways


cdef inline bint many_open(CacheC* c) noexcept nogil:
    """Make what finds one of many ways; False when there is no memory for it."""
    c.index_mask = 64
    while c.index_mask < 2 * c.slots:
        c.index_mask *= 2
    c.index = <uint32_t*>zeroed_lines(c.index_mask * 4)
    c.index_mask -= 1
    if c.index == NULL:
        return False
    if c.policy == POLICY_PLRU:
        return True
    c.heap = <uint32_t*>zeroed_lines(c.slots * 4)
    c.keys = <uint64_t*>zeroed_lines(c.slots * 8)
    c.place = <uint32_t*>zeroed_lines(c.slots * 4)
    if c.heap == NULL or c.keys == NULL or c.place == NULL:
        return False
    heap_make(c)
    return True


# --- one set ---

cdef inline int64_t cache_find(
        const CacheC* c, uint64_t set, uint64_t first, uint64_t second,
        size_t stride) noexcept nogil:
    """The slot of a set that has this tag, or -1.  Nothing is counted.

    `stride` is the cache's own, as a constant.
    """
    cdef uint32_t print = print_of(first, second)
    cdef uint64_t slot, found
    cdef uint32_t way
    if likely(c.ways == 4):
        slot = set * 4
        return slot_agreeing(c, slot, match4(&c.prints[slot], print), first, second, stride)
    if c.ways == 8:
        slot = set * 8
        found = match4(&c.prints[slot], print) | match4(&c.prints[slot + 4], print) << 4
        return slot_agreeing(c, slot, found, first, second, stride)
    if c.index != NULL:
        return index_find(c, first, second, stride)
    slot = set * c.ways
    found = 0
    way = 0
    while way < c.ways:
        # reads on into the next set, or behind the last one
        found |= <uint64_t>match4(&c.prints[slot + way], print) << way
        way += 4
    return slot_agreeing(c, slot, found & low_mask(c.ways), first, second, stride)


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
    if ways > MANY and not many_open(c):
        cache_close(c)
        return False
    return True


cdef inline void cache_hit(CacheC* c, uint64_t slot) noexcept nogil:
    """Count a hit of a slot, and tell the replacement."""
    cdef uint64_t clock = c.clock + 1
    if unlikely(c.quiet):
        return
    c.clock = clock
    if likely(c.policy == POLICY_LRU):
        c.order[slot] = clock
    elif c.policy == POLICY_PLRU:
        plru_touch(c, slot)


cdef inline void cache_hit_times(CacheC* c, uint64_t slot, uint64_t n) noexcept nogil:
    """What n hits of one slot in a row leave; n is not 0."""
    c.clock += n - 1
    cache_hit(c, slot)


cdef inline void cache_miss(CacheC* c) noexcept nogil:
    """Count a miss, if there is a cache; that of a quiet one is counted in the copy."""
    c.counters.misses += c.ways != 0


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
    if c.heap != NULL:
        best = heap_first(c, base)
        if c.policy == POLICY_RANDOM and c.prints[best]:
            return base + random_below(c, c.ways)
        return best
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
        if c.index != NULL:
            index_remove(c, slot)
    else:
        c.live += 1
    c.counters.fills += 1
    c.prints[slot] = print_of(first, second)
    if c.index != NULL:
        index_add(c, slot)
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
    if c.index != NULL:
        index_remove(c, slot)
    c.prints[slot] = 0
    c.live -= 1
    if c.policy == POLICY_LRU or c.policy == POLICY_FIFO:
        c.order[slot] = 0
    if c.heap != NULL:
        heap_lowest(c, slot)
