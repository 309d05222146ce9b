"""Entries that are kept and dropped: STEs and CDs, translations, tables."""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from smmufast._facts.bits cimport low_mask
from smmufast._engine.cache cimport (
    CacheC, c_assert, cache_drop, cache_find, cache_hit, cache_miss, cache_put, cache_victim, ctz64,
    tag_at,
)
from smmufast._facts.layout cimport CMD_TLBI_S2_IPA
from smmufast._rules.scope cimport (
    Filter, Invalidation, KEY_GLOBAL, KEY_LG2, KEY_LG2_SHIFT, KEY_VALID, KIND_COMBINED, KIND_S1,
    KIND_S2, block_lg2, cfgi_last, filter_key, filter_leaf, filter_of, filter_pass, filter_rivals,
    filter_span, global_key,
)


cdef inline uint32_t config_fill(
        CachesC* c, CacheC* cache, uint64_t set, uint64_t first, uint64_t second,
        const uint64_t* words) noexcept nogil:
    """Keep a structure in place of the one with its tag, or of a victim: its handle."""
    cdef int64_t slot = cache_find(cache, set, first, second, sizeof(ConfigEntry))
    if slot >= 0:
        cache_drop(cache, slot)
        cache.counters.replacements += 1
    slot = cache_victim(cache, set)
    cache_put(cache, slot, first, second)
    memcpy(config_words(cache, slot), words, 8 * CONFIG_WORDS)
    c.config_generation += 1
    return <uint32_t>slot + 1


# S3.20.2-1
cdef uint32_t ste_fill(
        CachesC* c, uint32_t sid, const uint64_t* words) noexcept nogil:
    """Keep an STE; returns the handle for ste_touch(), 0 without a cache."""
    cdef CacheC* cache = &c.cache[CACHE_STE]
    if cache.ways == 0 or cache.quiet:
        return 0
    return config_fill(c, cache, sid & cache.set_mask, sid, KEY_VALID, words)


cdef uint32_t cd_fill(
        CachesC* c, uint32_t sid, uint32_t index, const uint64_t* words) noexcept nogil:
    """Keep a CD; returns the handle for cd_touch(), 0 without a cache."""
    cdef CacheC* cache = &c.cache[CACHE_CD]
    if cache.ways == 0 or cache.quiet:
        return 0
    return config_fill(c, cache, cd_set(cache, sid, index), sid, KEY_VALID | index, words)


cdef inline void config_drop(CachesC* c, CacheC* cache, uint64_t slot) noexcept nogil:
    cache_drop(cache, slot)
    cache.counters.invalidations += 1
    c.config_generation += 1


cdef uint64_t config_drop_sids(
        CachesC* c, CacheC* cache, uint32_t first, uint32_t last) noexcept nogil:
    """Drop the entries of some StreamIDs; returns how many."""
    cdef uint64_t slot, dropped = 0
    if cache.live == 0:
        return 0
    for slot in range(cache.slots):
        if cache.prints[slot] and first <= tag_at(cache, slot).first <= last:
            config_drop(c, cache, slot)
            dropped += 1
    return dropped


# S4.3.4-1, S16.2-3
cdef uint64_t cfgi_cd_all(CachesC* c, uint32_t sid) noexcept nogil:
    """CMD_CFGI_CD_ALL: every CD of a stream.  Returns how many entries went, as all of these."""
    return config_drop_sids(c, &c.cache[CACHE_CD], sid, sid)


# S4.3.3-1, S4.3.3-2, S4.3.3-5, S5.3.1-1
cdef uint64_t cfgi_cd(
        CachesC* c, uint32_t sid, uint32_t ssid, bint leaf) noexcept nogil:
    """CMD_CFGI_CD: one CD.  Level-1 descriptors are not cached, so `leaf` makes no difference."""
    cdef CacheC* cache = &c.cache[CACHE_CD]
    cdef int64_t slot
    if cache.live == 0:
        return 0
    slot = cache_find(
        cache, cd_set(cache, sid, ssid), sid, KEY_VALID | ssid, sizeof(ConfigEntry))
    if slot < 0:
        return 0
    config_drop(c, cache, slot)
    return 1


# S4.3-2, S4.3.1-1, S4.3.1-2, S4.3.1-3, S5.1.1-3, S16.2.2-1
cdef uint64_t cfgi_ste(CachesC* c, uint32_t sid, bint leaf) noexcept nogil:
    """CMD_CFGI_STE: an STE and every CD of its stream; `leaf` as for cfgi_cd()."""
    cdef CacheC* cache = &c.cache[CACHE_STE]
    cdef int64_t slot
    cdef uint64_t dropped = cfgi_cd_all(c, sid)
    if cache.live:
        slot = cache_find(cache, sid & cache.set_mask, sid, KEY_VALID, sizeof(ConfigEntry))
        if slot >= 0:
            config_drop(c, cache, slot)
            dropped += 1
    return dropped


# S4.3.2-2, S16.2-2
cdef uint64_t cfgi_range(
        CachesC* c, uint32_t sid, unsigned int lg2_count) noexcept nogil:
    """CMD_CFGI_STE_RANGE: as cfgi_ste() for 2^lg2_count StreamIDs; low bits of sid are ignored.

    `lg2_count` is the command's Range + 1; 32 and more are all StreamIDs.
    """
    cdef uint32_t last = cfgi_last(sid, lg2_count), first = sid & ~cfgi_last(0, lg2_count)
    return (config_drop_sids(c, &c.cache[CACHE_STE], first, last)
            + config_drop_sids(c, &c.cache[CACHE_CD], first, last))


cdef uint64_t cfgi_all(CachesC* c) noexcept nogil:
    """CMD_CFGI_ALL: all configuration."""
    return cfgi_range(c, 0, 32)


# --- which entries ---

cdef inline unsigned int entry_lg2(const Entry* e) noexcept nogil:
    """Log2 of what an invalidation by input address takes an entry for."""
    return block_lg2(e.lg2_s2 if e.kind == KIND_S2 else e.lg2_s1, e.lg2)


cdef inline bint tlb_matches(const CachesC* c, uint64_t slot, const Filter* f) noexcept nogil:
    """Whether a slot holds an entry that a filter passes."""
    cdef const CacheC* cache = &c.cache[CACHE_TLB]
    cdef const Entry* e = &(<Entry*>cache.entries)[slot]
    cdef bint second = e.kind == KIND_S2
    if not cache.prints[slot] or not filter_key(f, e.key):
        return False
    if not filter_leaf(f, e.granule_s2 if second else e.granule_s1,
                       e.level_s2 if second else e.level_s1):
        return False
    if f.all_addresses:
        return True
    return filter_span(f, e.page << e.lg2, entry_lg2(e) if f.blocks else e.lg2)


cdef inline uint32_t* region_of(const CachesC* c, uint64_t start) noexcept nogil:
    """The counter of small entries of the region of an address, and of others that share it."""
    return &c.regions[
        (start >> REGION_LG2) * <uint64_t>0x9E3779B97F4A7C15ULL >> (64 - c.regions_lg2)]


cdef inline bint any_small(const CachesC* c, uint64_t start, unsigned int lg2) noexcept nogil:
    """Whether entries smaller than a region may lie in a block of at least one region.

    A block is often filled beside many pages, and hardly ever over them.
    """
    cdef uint64_t i
    if lg2 > REGION_LG2 + 4:
        return True
    for i in range(<uint64_t>1 << (lg2 - REGION_LG2)):
        if region_of(c, start + (i << REGION_LG2))[0]:
            return True
    return False


cdef inline void tlb_forget(CachesC* c, uint64_t slot) noexcept nogil:
    """What is counted about the entry of a slot, which goes."""
    cdef const Entry* e = &(<Entry*>c.cache[CACHE_TLB].entries)[slot]
    sizes_remove(&c.tlb_sizes[e.kind], &c.cache[CACHE_TLB], e.lg2)
    if e.lg2 < REGION_LG2:
        region_of(c, e.page << e.lg2)[0] -= 1
    c.globals -= (e.key & KEY_GLOBAL) != 0
    c.fractured -= entry_lg2(e) != e.lg2


cdef uint64_t tlb_drop_slots(
        CachesC* c, uint64_t first, uint64_t n, const Filter* f) noexcept nogil:
    """Drop what matches among n slots; returns how many."""
    cdef uint64_t slot, dropped = 0
    for slot in range(first, first + n):
        if tlb_matches(c, slot, f):
            tlb_forget(c, slot)
            cache_drop(&c.cache[CACHE_TLB], slot)
            dropped += 1
    return dropped


# S3.21.1.3-2
cdef uint64_t tlb_drop(CachesC* c, uint64_t sizes, const Filter* f) noexcept nogil:
    """Drop every TLB entry that matches; `sizes`: what those that could have.  How many went."""
    cdef CacheC* cache = &c.cache[CACHE_TLB]
    cdef uint64_t left = sizes, page, more, dropped = 0
    cdef unsigned int lg2
    cdef bint scan = f.all_addresses or (f.blocks and c.fractured)
    while left and not scan:
        lg2 = ctz64(left)
        left &= left - 1
        scan = (f.last >> lg2) - (f.first >> lg2) > cache.set_mask
    if scan:
        return tlb_drop_slots(c, 0, cache.slots, f)
    while sizes:
        lg2 = ctz64(sizes)
        sizes &= sizes - 1
        page = f.first >> lg2
        for more in range((f.last >> lg2) - page + 1):
            dropped += tlb_drop_slots(
                c, (page + more & cache.set_mask) * cache.ways, cache.ways, f)
    return dropped


# --- TLB ---

cdef Entry* tlb_probe_sizes(
        CachesC* c, unsigned int kind, uint64_t key, uint64_t address,
        bint quiet) noexcept nogil:
    """tlb_probe_key() of every size in turn."""
    cdef CacheC* cache = &c.cache[CACHE_TLB]
    cdef uint64_t sizes = c.tlb_sizes[kind].mask
    cdef uint64_t page, set, sized
    cdef unsigned int lg2
    cdef int64_t slot
    while sizes:
        lg2 = ctz64(sizes)
        sizes &= sizes - 1
        page = address >> lg2
        set = page & cache.set_mask
        sized = <uint64_t>lg2 << KEY_LG2_SHIFT
        slot = cache_find(cache, set, page, key | sized, sizeof(Entry))
        if slot < 0 and c.globals:
            slot = cache_find(cache, set, page, global_key(key) | sized, sizeof(Entry))
        if slot >= 0:
            if not quiet:
                cache_hit(cache, slot)
            return &(<Entry*>cache.entries)[slot]
    if not quiet:
        cache_miss(cache)
    return NULL


# S3.17.1-1, S3.17.1-4
cdef inline uint64_t entry_key(const CachesC* c, const Entry* e) noexcept nogil:
    cdef uint64_t key = tlb_key(c, e.kind, e.world, e.vmid, e.asid, e.aset)
    if e.is_global and c.key_mask[e.kind][e.world] & KEY_GLOBAL:
        key = global_key(key)
    return key | <uint64_t>e.lg2 << KEY_LG2_SHIFT


# S2.4-4, S3.20.1-1, S3.21.1.3-1, V8.17-1
cdef inline uint64_t tlb_rivals(
        CachesC* c, const Entry* e, uint64_t key, Filter* f) noexcept nogil:
    """A filter for the entries that a request could find instead of this one; their sizes."""
    filter_rivals(f, key)
    f.all_addresses = False
    f.blocks = False
    f.granule = 0
    f.level = 0
    f.first = e.page << e.lg2
    f.last = f.first | low_mask(e.lg2)
    if e.lg2 >= REGION_LG2 and not any_small(c, f.first, e.lg2):
        return c.tlb_sizes[e.kind].mask & ~low_mask(REGION_LG2)
    return c.tlb_sizes[e.kind].mask


cdef inline void tlb_admit(
        CachesC* c, uint64_t slot, const Entry* e, uint64_t key) noexcept nogil:
    """Put an entry into a slot, and count it."""
    cdef CacheC* cache = &c.cache[CACHE_TLB]
    (<Entry*>cache.entries)[slot] = e[0]
    cache_put(cache, slot, e.page, key)
    sizes_add(&c.tlb_sizes[e.kind], cache, e.lg2)
    if e.lg2 < REGION_LG2:
        region_of(c, e.page << e.lg2)[0] += 1
    c.globals += (key & KEY_GLOBAL) != 0
    c.fractured += entry_lg2(e) != e.lg2


cdef uint64_t tlb_drop_rivals(CachesC* c, const Entry* e, uint64_t key) noexcept nogil:
    """Drop what a request could find instead of an entry; returns how many.

    In a set of many ways those of its size and of larger ones are found by their tags, which are
    two: its own, and that of a global entry.  A global entry has rivals of every ASID, for which
    all of the set is looked at, unless every entry is global.
    """
    cdef CacheC* cache = &c.cache[CACHE_TLB]
    cdef Filter rivals
    cdef uint64_t sizes = tlb_rivals(c, e, key, &rivals), larger, sized, page, dropped = 0
    cdef unsigned int lg2, k
    cdef int64_t slot
    if cache.index != NULL and (not key & KEY_GLOBAL or c.globals == cache.live):
        larger = sizes & ~low_mask(e.lg2)
        sizes &= low_mask(e.lg2)
        while larger:
            lg2 = ctz64(larger)
            larger &= larger - 1
            page = rivals.first >> lg2
            for k in range(2 if c.globals and not key & KEY_GLOBAL else 1):
                sized = (global_key(key) if k else key) & ~KEY_LG2
                slot = cache_find(cache, page & cache.set_mask, page,
                                  sized | <uint64_t>lg2 << KEY_LG2_SHIFT, sizeof(Entry))
                if slot >= 0:
                    tlb_forget(c, slot)
                    cache_drop(cache, slot)
                    dropped += 1
    return dropped + tlb_drop(c, sizes, &rivals)


cdef Entry* tlb_fill(CachesC* c, const Entry* e) noexcept nogil:
    """Keep a translation; entries that could answer the same request go.  NULL without a TLB."""
    cdef CacheC* cache = &c.cache[CACHE_TLB]
    cdef uint64_t key, slot
    if cache.ways == 0 or cache.quiet:
        return NULL
    c_assert(LG2_MIN <= e.lg2 <= LG2_MAX and KIND_S1 <= e.kind <= KIND_COMBINED)
    key = entry_key(c, e)
    cache.counters.replacements += tlb_drop_rivals(c, e, key)
    slot = cache_victim(cache, e.page & cache.set_mask)
    if cache.prints[slot]:
        tlb_forget(c, slot)
    tlb_admit(c, slot, e, key)
    c.tlb_generation += 1
    return &(<Entry*>cache.entries)[slot]


# --- walk caches ---

cdef inline CacheC* walk_cache(CachesC* c, unsigned int kind) noexcept nogil:
    return &c.cache[CACHE_WALK2 if kind == KIND_S2 else CACHE_WALK1]


cdef Table* walk_probe(
        CachesC* c, unsigned int kind, unsigned int world, uint16_t vmid, uint16_t asid,
        uint64_t address) noexcept nogil:
    """The deepest cached table on the walk of an address, or NULL; one hit or one miss.

    It lives until the next fill or invalidation.
    """
    cdef CacheC* cache = walk_cache(c, kind)
    cdef uint64_t sizes = c.walk_sizes[kind].mask
    cdef uint64_t key = tlb_key(c, kind, world, vmid, asid, 0)
    cdef uint64_t prefix
    cdef unsigned int lg2
    cdef int64_t slot
    while sizes:
        lg2 = ctz64(sizes)
        sizes &= sizes - 1
        prefix = address >> lg2
        slot = cache_find(
            cache, prefix & cache.set_mask, prefix, key | <uint64_t>lg2 << KEY_LG2_SHIFT,
            sizeof(Table))
        if slot >= 0:
            cache_hit(cache, slot)
            return &(<Table*>cache.entries)[slot]
    cache_miss(cache)
    return NULL


cdef inline uint64_t walk_key(const CachesC* c, const Table* e) noexcept nogil:
    """Tables are not known to be global: their entries have the ASID of who filled them.

    So ASET need not tag them.
    """
    return tlb_key(c, e.kind, e.world, e.vmid, e.asid, 0) | <uint64_t>e.lg2 << KEY_LG2_SHIFT


cdef inline void walk_forget(CachesC* c, CacheC* cache, uint64_t slot) noexcept nogil:
    cdef const Table* e = &(<Table*>cache.entries)[slot]
    sizes_remove(&c.walk_sizes[e.kind], cache, e.lg2)


cdef inline void walk_admit(
        CachesC* c, CacheC* cache, uint64_t slot, const Table* e) noexcept nogil:
    (<Table*>cache.entries)[slot] = e[0]
    cache_put(cache, slot, e.prefix, walk_key(c, e))
    sizes_add(&c.walk_sizes[e.kind], cache, e.lg2)


cdef Table* walk_fill(CachesC* c, const Table* e) noexcept nogil:
    """Keep a table; the entry of the same tags goes.  NULL without such a walk cache."""
    cdef CacheC* cache = walk_cache(c, e.kind)
    cdef int64_t slot
    cdef uint64_t set = e.prefix & cache.set_mask
    if cache.ways == 0 or cache.quiet:
        return NULL
    c_assert(LG2_MIN <= e.lg2 <= LG2_MAX and KIND_S1 <= e.kind <= KIND_COMBINED)
    slot = cache_find(cache, set, e.prefix, walk_key(c, e), sizeof(Table))
    if slot >= 0:
        walk_forget(c, cache, slot)
        cache_drop(cache, slot)
        cache.counters.replacements += 1
    slot = cache_victim(cache, set)
    if cache.prints[slot]:
        walk_forget(c, cache, slot)
    walk_admit(c, cache, slot, e)
    return &(<Table*>cache.entries)[slot]


# S3.21.1-2, S4.4.1.1-9
cdef uint64_t walk_drop(CachesC* c, CacheC* cache, const Filter* f) noexcept nogil:
    """Drop every table that matches, at whatever level; returns how many."""
    cdef uint64_t slot, dropped = 0
    cdef const Table* e
    if cache.live == 0:
        return 0
    for slot in range(cache.slots):
        e = &(<Table*>cache.entries)[slot]
        if not cache.prints[slot] or not filter_key(f, e.key):
            continue
        if f.granule and f.granule != e.granule:
            continue
        if f.all_addresses or filter_span(f, e.prefix << e.lg2, e.lg2):
            walk_forget(c, cache, slot)
            cache_drop(cache, slot)
            cache.counters.invalidations += 1
            dropped += 1
    return dropped


# --- invalidation ---

# S3.21.1-3, S4.4-3
cdef uint64_t tlbi(CachesC* c, const Invalidation* inv) noexcept nogil:
    """A TLBI command: returns how many entries went.

    Commands by address leave what is of another granule or level, if they name one, and with
    `leaf` every cached table.  A level is that of leaves: tables go at any level.
    """
    cdef Filter f
    cdef uint64_t sizes, dropped = 0
    if not filter_of(inv, &f):
        return 0
    if c.cache[CACHE_TLB].live:
        if inv.op == CMD_TLBI_S2_IPA:
            sizes = c.tlb_sizes[KIND_S2].mask
        else:
            sizes = c.tlb_sizes[KIND_S1].mask | c.tlb_sizes[KIND_COMBINED].mask
        dropped = tlb_drop(c, sizes, &f)
        c.cache[CACHE_TLB].counters.invalidations += dropped
        c.tlb_generation += dropped != 0
    if f.tables:
        dropped += walk_drop(c, &c.cache[CACHE_WALK1], &f)
        dropped += walk_drop(c, &c.cache[CACHE_WALK2], &f)
    return dropped


cdef uint64_t caches_invalidate_all(CachesC* c) noexcept nogil:
    """Drop everything, as SMMU_S_INIT.INV_ALL does; returns how many entries went."""
    cdef Filter f
    cdef uint64_t dropped = 0, tlb = 0
    memset(&f, 0, sizeof(Filter))
    filter_pass(&f, 0, 0)
    f.all_addresses = True
    if c.cache[CACHE_TLB].live:
        tlb = tlb_drop(c, 0, &f)
        c.cache[CACHE_TLB].counters.invalidations += tlb
        c.tlb_generation += tlb != 0
    dropped = walk_drop(c, &c.cache[CACHE_WALK1], &f) + walk_drop(c, &c.cache[CACHE_WALK2], &f)
    return dropped + tlb + cfgi_all(c)
