"""The state of caches as bytes."""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport malloc
from libc.string cimport memcpy

from smmufast._engine.cache cimport (
    POLICY_FIFO, POLICY_LRU, CacheC, Counters, cache_find, cache_put, heap_make, order_words,
)
from smmufast._rules.scope cimport Filter, KEY_VALID, KIND_S2


cdef uint64_t STATE_MARK = 0x32454843414D4D53ULL  # of this layout and byte order


# What is kept of a cache beside its replacement state and its entries.
cdef struct Kept:
    uint64_t clock
    uint64_t passed
    uint64_t random
    uint64_t live
    Counters counters


# What is left of a state.
cdef struct Reader:
    const char* data
    size_t left


cdef int take(Reader* reader, void* out, size_t n) except -1:
    if reader.left < n:
        raise ValueError("state: it ends too early")
    memcpy(out, reader.data, n)
    reader.data += n
    reader.left -= n
    return 0


cdef uint64_t state_size(const CachesC* c) noexcept nogil:
    """How many bytes a state takes now."""
    cdef uint64_t size = 3 * 8
    cdef int number
    cdef const CacheC* cache
    for number in range(N_CACHES):
        cache = &c.cache[number]
        if cache.ways:
            size += (sizeof(Kept) + order_words(cache) * 8
                     + <uint64_t>cache.live * (8 + cache.stride))
    return size


cdef inline char* piece(char* to, const void* data, size_t n) noexcept nogil:
    """Append n bytes; where the next ones go."""
    memcpy(to, data, n)
    return to + n


cdef void state_write(const CachesC* c, char* to) noexcept nogil:
    """Write a state, of state_size() bytes."""
    cdef const CacheC* cache
    cdef Kept kept
    cdef uint64_t slot
    cdef int number
    to = piece(to, &STATE_MARK, 8)
    to = piece(to, &c.config_generation, 8)
    to = piece(to, &c.tlb_generation, 8)
    for number in range(N_CACHES):
        cache = &c.cache[number]
        if cache.ways == 0:
            continue
        kept.clock = cache.clock
        kept.passed = cache.passed
        kept.random = cache.random
        kept.live = cache.live
        kept.counters = cache.counters
        to = piece(to, &kept, sizeof(Kept))
        to = piece(to, cache.order, order_words(cache) * 8)
        for slot in range(cache.slots):
            if cache.prints[slot]:
                to = piece(to, &slot, 8)
                to = piece(to, cache.entries + slot * cache.stride, cache.stride)


cdef char* state_of(CachesC* c, uint64_t* size) except NULL:
    """A state, which the caller frees; the caller has the caches, so no Python runs here."""
    cdef char* state
    size[0] = state_size(c)
    state = <char*>malloc(size[0])
    if state == NULL:
        raise MemoryError()
    state_write(c, state)
    return state


cdef int refuse(str why, int number, uint64_t slot) except -1:
    raise ValueError(f"state: {why} in slot {slot} of {CACHES[number]}")


cdef int admit_config(CachesC* c, int number, uint64_t slot, Reader* reader) except -1:
    """Take an STE or a CD of a state, if it can be there."""
    cdef CacheC* cache = &c.cache[number]
    cdef ConfigEntry e
    cdef uint64_t set
    take(reader, &e, sizeof(ConfigEntry))
    if e.sid >> 32 or e.key & ~<uint64_t>(0xFFFFF if number == CACHE_CD else 0) != KEY_VALID:
        refuse("a record that cannot be", number, slot)
    set = e.sid & cache.set_mask
    if number == CACHE_CD:
        set = cd_set(cache, <uint32_t>e.sid, <uint32_t>e.key)
    if slot // cache.ways != set:
        refuse("an entry of another set", number, slot)
    if cache_find(cache, set, e.sid, e.key, sizeof(ConfigEntry)) >= 0:
        refuse("a second entry of one tag", number, slot)
    cache_put(cache, slot, e.sid, e.key)
    memcpy(config_words(cache, slot), e.words, sizeof(e.words))
    return 0


cdef int admit_translation(CachesC* c, uint64_t slot, Reader* reader) except -1:
    """Take a translation of a state, if it can be there."""
    cdef CacheC* cache = &c.cache[CACHE_TLB]
    cdef Entry e
    cdef Filter rivals
    cdef uint64_t key, sizes
    take(reader, &e, sizeof(Entry))
    if not translation_possible(&e):
        refuse("a translation that cannot be", CACHE_TLB, slot)
    if slot // cache.ways != e.page & cache.set_mask:
        refuse("an entry of another set", CACHE_TLB, slot)
    key = entry_key(c, &e)
    sizes = tlb_rivals(c, &e, key, &rivals)
    if tlb_drop(c, sizes, &rivals):
        refuse("a second entry for one request", CACHE_TLB, slot)
    tlb_admit(c, slot, &e, key)
    return 0


cdef int admit_table(CachesC* c, int number, uint64_t slot, Reader* reader) except -1:
    """Take a table of a state, if it can be there."""
    cdef CacheC* cache = &c.cache[number]
    cdef Table e
    cdef uint64_t set
    take(reader, &e, sizeof(Table))
    if not table_possible(&e) or (e.kind == KIND_S2) != (number == CACHE_WALK2):
        refuse("a table that cannot be", number, slot)
    set = e.prefix & cache.set_mask
    if slot // cache.ways != set:
        refuse("an entry of another set", number, slot)
    if cache_find(cache, set, e.prefix, walk_key(c, &e), sizeof(Table)) >= 0:
        refuse("a second entry of one tag", number, slot)
    walk_admit(c, cache, slot, &e)
    return 0


cdef bint order_possible(const CacheC* cache, const char* order, uint64_t clock) noexcept nogil:
    """When each slot was used last: 0 for an empty one alone, and in the past."""
    cdef uint64_t slot, at
    if cache.policy != POLICY_LRU and cache.policy != POLICY_FIFO:
        return True
    for slot in range(cache.slots):
        memcpy(&at, order + 8 * slot, 8)
        if (at == 0) != (cache.prints[slot] == 0) or at > clock:
            return False
    return True


cdef int take_state(CachesC* c, Reader* reader) except -1:
    """Fill empty caches from a state."""
    cdef uint64_t mark, config_generation, tlb_generation, slot, last, words
    cdef CacheC* cache
    cdef Kept kept
    cdef const char* order
    cdef int number
    take(reader, &mark, 8)
    if mark != STATE_MARK:
        raise ValueError("state: not one of Caches of this version and byte order")
    take(reader, &config_generation, 8)
    take(reader, &tlb_generation, 8)
    for number in range(N_CACHES):
        cache = &c.cache[number]
        if cache.ways == 0:
            continue
        take(reader, &kept, sizeof(Kept))
        words = order_words(cache)
        order = reader.data
        take(reader, cache.order, words * 8)
        last = 0
        for i in range(kept.live):
            take(reader, &slot, 8)
            if slot >= cache.slots or (i and slot <= last):
                raise ValueError(f"state: slot {slot} of {CACHES[number]} out of order")
            last = slot
            if number == CACHE_TLB:
                admit_translation(c, slot, reader)
            elif number >= CACHE_WALK1:
                admit_table(c, number, slot, reader)
            else:
                admit_config(c, number, slot, reader)
        if kept.passed > kept.clock or not order_possible(cache, order, kept.clock):
            raise ValueError(f"state: a replacement state of {CACHES[number]} that cannot be")
        memcpy(cache.order, order, words * 8)
        if cache.heap != NULL:
            heap_make(cache)
        cache.clock = kept.clock
        cache.passed = kept.passed
        cache.random = kept.random or 1
        cache.counters = kept.counters
    if reader.left:
        raise ValueError(f"state: {reader.left} bytes too many")
    c.config_generation = config_generation
    c.tlb_generation = tlb_generation
    return 0
