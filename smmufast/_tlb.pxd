"""The caches of an SMMU: TLB, walk caches and configuration caches, and what invalidates them.

Not architectural, but for the rules about which request an entry may answer (`tlb_key`) and which
entries a command must hit (`tlbi`, `cfgi_...`): IHI 0070, 3.17 (tags of TLB entries), 4.3
(CFGI_...), 4.4 (TLBI_...).  Invalidation is exact: what a command need not hit stays.

The C names, for the translation and the command queue:

    CachesC       all caches of one SMMU; Caches (below) owns it, `caches.c` lives as long
    Entry         a translation in the TLB
    Table         a table in a walk cache
    Invalidation  a TLBI command, decoded

A cache that is absent never hits, takes nothing, and counts nothing.

None of these functions takes a lock, and none is safe beside another: one CachesC belongs to one
SMMU, whose owner makes their calls one after the other.  Two Smmu never share one.
"""

from libc.stdint cimport int8_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from smmufast._bits cimport low_mask
from smmufast._cache cimport (
    CacheC, c_assert, cache_drop, cache_find, cache_hit, cache_put, cache_touch, cache_victim,
    ctz64, slot_first, slot_second, tags_of,
)
from smmufast._layout cimport (
    CMD_TLBI_EL2_ALL, CMD_TLBI_EL2_ASID, CMD_TLBI_EL2_VA, CMD_TLBI_EL2_VAA, CMD_TLBI_NH_ALL,
    CMD_TLBI_NH_ASID, CMD_TLBI_NH_VA, CMD_TLBI_NH_VAA, CMD_TLBI_NSNH_ALL, CMD_TLBI_S12_VMALL,
    CMD_TLBI_S2_IPA, WORLD_EL2, WORLD_EL2_E2H, WORLD_NS_EL1,
)


cdef enum:
    # kind of an entry: bit 0, stage 1 is in it; bit 1, stage 2 is in it
    KIND_S1 = 1            # input address to IPA, or to PA where there is no stage 2
    KIND_S2 = 2            # IPA to PA
    KIND_COMBINED = 3      # input address to PA, through both stages

    # Entry.flags
    ENTRY_CLEAN1 = 1       # stage 1: writable because of DBM, and still clean
    ENTRY_CLEAN2 = 2       # stage 2 likewise
    ENTRY_CONTIGUOUS = 4   # the leaf's Contiguous bit

    # which cache, by number
    CACHE_STE = 0
    CACHE_CD = 1
    CACHE_TLB = 2
    CACHE_WALK1 = 3
    CACHE_WALK2 = 4
    N_CACHES = 5

    CONFIG_WORDS = 8       # dwords of an STE or a CD
    LG2_MIN = 12           # an entry covers 2^12 to 2^63 bytes
    LG2_MAX = 63


cdef extern from * nogil:
    """
    /* second words of tags in TLB and walk caches */
    #define KEY_VMID_SHIFT 16
    #define KEY_LG2_SHIFT 32
    #define KEY_KIND_SHIFT 38
    #define KEY_WORLD_SHIFT 40
    #define KEY_ASID 0xFFFFULL
    #define KEY_VMID 0xFFFF0000ULL
    #define KEY_LG2 (0x3FULL << 32)
    #define KEY_KIND (3ULL << 38)
    #define KEY_STAGE1 (1ULL << 38)
    #define KEY_WORLD (3ULL << 40)
    #define KEY_GLOBAL (1ULL << 42)
    #define KEY_VALID (1ULL << 63)
    """
    const int KEY_VMID_SHIFT, KEY_LG2_SHIFT, KEY_KIND_SHIFT, KEY_WORLD_SHIFT
    const uint64_t KEY_ASID, KEY_VMID, KEY_LG2, KEY_KIND, KEY_STAGE1, KEY_WORLD, KEY_GLOBAL
    const uint64_t KEY_VALID


# A translation, as whoever walked found it: 64 bytes.  After tlb_probe() all but the tags (page,
# lg2, kind, world, vmid, asid, is_global) may be changed in place, such as a CLEAN flag or perm.
cdef struct Entry:
    uint64_t page          # input address >> lg2; all bits above: the sign is in it
    uint64_t address       # output address of the first byte
    uint64_t ipa           # of the first byte: KIND_COMBINED only
    uint32_t sid, ssid     # of the transaction that filled it: no tags
    uint16_t asid, vmid
    uint8_t kind           # KIND_...
    uint8_t world          # WORLD_... of _layout.pxd
    uint8_t is_global      # the stage-1 leaf has nG=0: any ASID matches
    uint8_t lg2            # log2 of the bytes that it covers
    int8_t level           # of the smaller of both pages
    uint8_t perm1, perm2   # PERM_... bits that a stage admits
    uint8_t attr, sh
    uint8_t flags          # ENTRY_...
    uint8_t lg2_s1, lg2_s2          # log2 of each stage's page or block; 0: stage absent
    int8_t level_s1, level_s2
    uint8_t granule_s1, granule_s2  # log2; 0: stage absent
    uint8_t aset
    uint8_t[3] reserved
    uint64_t extra         # for whoever fills it; not read here


# A table that a walk came to, in the walk cache of its stage: 64 bytes.
cdef struct Table:
    uint64_t prefix        # input address >> lg2; all bits above: the sign is in it
    uint64_t table         # address of the table, as the descriptor gives it
    uint64_t output        # KIND_COMBINED: the same after stage 2
    uint64_t bits          # hierarchical attributes of the descriptors above, accumulated
    uint32_t sid, ssid     # of the transaction that filled it: no tags
    uint16_t asid, vmid
    uint8_t kind           # KIND_S1 and KIND_COMBINED: a table of stage 1; KIND_S2: of stage 2
    uint8_t world
    uint8_t lg2            # log2 of the bytes that the table translates
    int8_t level           # of the table: 0 to 3
    uint8_t granule        # log2
    uint8_t[3] reserved
    uint64_t extra         # for whoever fills it; not read here


cdef struct ConfigEntry:
    uint64_t[8] words


# How many entries there are of each size, and which sizes there are any of.
cdef struct Sizes:
    uint64_t mask
    uint32_t[64] live


cdef struct CachesC:
    CacheC[5] cache         # by CACHE_...
    uint64_t config_generation      # changes with every fill, eviction, invalidation of STE or CD
    uint64_t tlb_generation         # likewise of the TLB
    Sizes[4] tlb_sizes     # by kind
    Sizes[4] walk_sizes
    uint64_t[4][4] key_mask         # by kind and world: the tags that there are
    uint32_t globals       # live TLB entries that match any ASID
    uint32_t fractured     # live TLB entries that cover less than the block they are from
    bint split             # nested translations are cached by stage, not combined


# A TLBI command of the Non-secure queue.
cdef struct Invalidation:
    int op                 # CMD_TLBI_... of _layout.pxd; others hit nothing
    uint16_t vmid
    uint16_t vmid_mask     # VMID bits that are compared: CR0.VMW, and 0 without stage 2
    uint16_t asid
    bint leaf              # tables in walk caches stay
    bint all_addresses     # first and last do not matter
    uint64_t first, last   # of the addresses, inclusive; first == last: not a range
    uint8_t granule        # log2, entries of other granules stay; 0: any
    int8_t level           # TTL: translations of leaves at other levels stay; 0: any


# Owned by the class; other modules cimport it and use `caches.c`.
cdef class Caches:
    cdef CachesC* c
    cdef bint taken        # by an Smmu
    cdef tuple geometries


# --- tags ---

cdef inline void caches_set_masks(CachesC* c) noexcept nogil:
    """What a TLB entry is tagged with, by kind and StreamWorld (IHI 0070, 3.17)."""
    memset(c.key_mask, 0, sizeof(c.key_mask))
    c.key_mask[KIND_S1][WORLD_NS_EL1] = KEY_VMID | KEY_ASID | KEY_GLOBAL
    c.key_mask[KIND_COMBINED][WORLD_NS_EL1] = KEY_VMID | KEY_ASID | KEY_GLOBAL
    c.key_mask[KIND_S2][WORLD_NS_EL1] = KEY_VMID
    c.key_mask[KIND_S1][WORLD_EL2_E2H] = KEY_ASID | KEY_GLOBAL


cdef inline uint64_t tlb_key(
        const CachesC* c, unsigned int kind, unsigned int world, uint16_t vmid,
        uint16_t asid) noexcept nogil:
    """Second word of a tag without its lg2: of entries that are not global."""
    return (
        ((<uint64_t>vmid << KEY_VMID_SHIFT | asid) & c.key_mask[kind][world])
        | <uint64_t>kind << KEY_KIND_SHIFT | <uint64_t>world << KEY_WORLD_SHIFT | KEY_VALID
    )


cdef inline uint64_t global_key(uint64_t key) noexcept nogil:
    """The same of global entries: it has no ASID."""
    return key & ~KEY_ASID | KEY_GLOBAL


cdef inline unsigned int key_lg2(uint64_t key) noexcept nogil:
    return key >> KEY_LG2_SHIFT & 0x3F


cdef inline unsigned int key_kind(uint64_t key) noexcept nogil:
    return key >> KEY_KIND_SHIFT & 3


cdef inline void sizes_add(Sizes* sizes, unsigned int lg2) noexcept nogil:
    sizes.live[lg2] += 1
    sizes.mask |= <uint64_t>1 << lg2


cdef inline void sizes_remove(Sizes* sizes, unsigned int lg2) noexcept nogil:
    sizes.live[lg2] -= 1
    if sizes.live[lg2] == 0:
        sizes.mask &= ~(<uint64_t>1 << lg2)


# --- configuration ---

cdef inline uint64_t cd_set(const CacheC* cache, uint32_t sid, uint32_t index) noexcept nogil:
    return (sid ^ index) & (cache.sets - 1)


cdef inline uint64_t* config_words(const CacheC* cache, uint64_t slot) noexcept nogil:
    return (<ConfigEntry*>cache.entries)[slot].words


cdef inline uint32_t config_probe(
        CacheC* cache, uint64_t set, uint64_t first, uint64_t second,
        uint64_t* words, bint quiet) noexcept nogil:
    cdef int64_t slot = cache_find(cache, set, first, second)
    if slot < 0:
        cache.counters.misses += not quiet
        return 0
    if not quiet:
        cache_hit(cache, slot)
    memcpy(words, config_words(cache, slot), sizeof(ConfigEntry))
    return <uint32_t>slot + 1


cdef inline uint32_t config_fill(
        CachesC* c, CacheC* cache, uint64_t set, uint64_t first, uint64_t second,
        const uint64_t* words) noexcept nogil:
    cdef int64_t slot = cache_find(cache, set, first, second)
    if slot >= 0:
        cache_drop(cache, slot)
        cache.counters.replacements += 1
    slot = cache_victim(cache, set)
    cache_put(cache, slot, first, second)
    memcpy(config_words(cache, slot), words, sizeof(ConfigEntry))
    c.config_generation += 1
    return <uint32_t>slot + 1


cdef inline uint32_t ste_probe(
        CachesC* c, uint32_t sid, uint64_t* words, bint quiet=False) noexcept nogil:
    """Look an STE up: 0, or a handle for ste_touch() and the STE's dwords.

    `quiet`, here and below: nothing is counted, and the replacement is not told.
    """
    cdef CacheC* cache = &c.cache[CACHE_STE]
    if cache.ways == 0:
        return 0
    return config_probe(cache, sid & (cache.sets - 1), sid, KEY_VALID, words, quiet)


cdef inline uint32_t ste_fill(
        CachesC* c, uint32_t sid, const uint64_t* words) noexcept nogil:
    """Keep an STE; returns the handle for ste_touch(), 0 without a cache."""
    cdef CacheC* cache = &c.cache[CACHE_STE]
    if cache.ways == 0:
        return 0
    return config_fill(c, cache, sid & (cache.sets - 1), sid, KEY_VALID, words)


cdef inline void ste_touch(CachesC* c, uint32_t handle) noexcept nogil:
    """What ste_probe() counts and remembers when it hits, without copying.

    `handle` is not 0, and config_generation is what it was when the handle was given.
    """
    cache_hit(&c.cache[CACHE_STE], handle - 1)


cdef inline uint32_t cd_probe(
        CachesC* c, uint32_t sid, uint32_t index, uint64_t* words,
        bint quiet=False) noexcept nogil:
    """Look the CD of a SubstreamID up: 0, or a handle for cd_touch() and the CD's dwords.

    Without substreams `index` is 0.
    """
    cdef CacheC* cache = &c.cache[CACHE_CD]
    if cache.ways == 0:
        return 0
    return config_probe(
        cache, cd_set(cache, sid, index), sid, KEY_VALID | index, words, quiet)


cdef inline uint32_t cd_fill(
        CachesC* c, uint32_t sid, uint32_t index, const uint64_t* words) noexcept nogil:
    """Keep a CD; returns the handle for cd_touch(), 0 without a cache."""
    cdef CacheC* cache = &c.cache[CACHE_CD]
    if cache.ways == 0:
        return 0
    return config_fill(c, cache, cd_set(cache, sid, index), sid, KEY_VALID | index, words)


cdef inline void cd_touch(CachesC* c, uint32_t handle) noexcept nogil:
    """As ste_touch()."""
    cache_hit(&c.cache[CACHE_CD], handle - 1)


cdef inline void config_drop(CachesC* c, CacheC* cache, uint64_t slot) noexcept nogil:
    cache_drop(cache, slot)
    cache.counters.invalidations += 1
    c.config_generation += 1


cdef inline uint64_t config_drop_sids(
        CachesC* c, CacheC* cache, uint32_t first, uint32_t last) noexcept nogil:
    """Drop the entries of some StreamIDs; returns how many."""
    cdef uint64_t slot, dropped = 0
    if cache.live == 0:
        return 0
    for slot in range(<uint64_t>cache.sets * cache.ways):
        if slot_second(cache, slot) and first <= slot_first(cache, slot) <= last:
            config_drop(c, cache, slot)
            dropped += 1
    return dropped


cdef inline uint64_t cfgi_cd_all(CachesC* c, uint32_t sid) noexcept nogil:
    """CMD_CFGI_CD_ALL: every CD of a stream.  Returns how many entries went, as all of these."""
    return config_drop_sids(c, &c.cache[CACHE_CD], sid, sid)


cdef inline uint64_t cfgi_cd(
        CachesC* c, uint32_t sid, uint32_t ssid, bint leaf) noexcept nogil:
    """CMD_CFGI_CD: one CD.  Level-1 descriptors are not cached, so `leaf` makes no difference."""
    cdef CacheC* cache = &c.cache[CACHE_CD]
    cdef int64_t slot
    if cache.live == 0:
        return 0
    slot = cache_find(cache, cd_set(cache, sid, ssid), sid, KEY_VALID | ssid)
    if slot < 0:
        return 0
    config_drop(c, cache, slot)
    return 1


cdef inline uint64_t cfgi_ste(CachesC* c, uint32_t sid, bint leaf) noexcept nogil:
    """CMD_CFGI_STE: an STE and every CD of its stream; `leaf` as for cfgi_cd()."""
    cdef CacheC* cache = &c.cache[CACHE_STE]
    cdef int64_t slot
    cdef uint64_t dropped = cfgi_cd_all(c, sid)
    if cache.live:
        slot = cache_find(cache, sid & (cache.sets - 1), sid, KEY_VALID)
        if slot >= 0:
            config_drop(c, cache, slot)
            dropped += 1
    return dropped


cdef inline uint64_t cfgi_range(
        CachesC* c, uint32_t sid, unsigned int lg2_count) noexcept nogil:
    """CMD_CFGI_STE_RANGE: as cfgi_ste() for 2^lg2_count StreamIDs; low bits of sid are ignored.

    `lg2_count` is the command's Range + 1; 32 and more are all StreamIDs.
    """
    cdef uint32_t low = <uint32_t>low_mask(lg2_count if lg2_count < 32 else 32)
    return (
        config_drop_sids(c, &c.cache[CACHE_STE], sid & ~low, sid | low)
        + config_drop_sids(c, &c.cache[CACHE_CD], sid & ~low, sid | low)
    )


cdef inline uint64_t cfgi_all(CachesC* c) noexcept nogil:
    """CMD_CFGI_ALL: all configuration."""
    return cfgi_range(c, 0, 32)


# --- which entries ---

# Entries by their tags and by addresses.  A tag passes when one of the pairs fits.
cdef struct Filter:
    int n
    uint64_t[3] mask
    uint64_t[3] value
    bint all_addresses
    bint blocks            # an entry stands for the whole block that it is from
    bint tables            # walk caches too
    uint8_t granule
    int8_t level
    uint64_t first, last


cdef inline void filter_pass(Filter* f, uint64_t mask, uint64_t value) noexcept nogil:
    f.mask[f.n] = mask | KEY_VALID
    f.value[f.n] = value | KEY_VALID
    f.n += 1


cdef inline bint filter_key(const Filter* f, uint64_t key) noexcept nogil:
    cdef int i
    for i in range(f.n):
        if key & f.mask[i] == f.value[i]:
            return True
    return False


cdef inline bint filter_span(const Filter* f, uint64_t start, unsigned int lg2) noexcept nogil:
    """Whether a span of addresses and those of the filter overlap."""
    start &= ~low_mask(lg2)
    return start <= f.last and (start | low_mask(lg2)) >= f.first


cdef inline unsigned int block_lg2(const Entry* e) noexcept nogil:
    """Log2 of what an invalidation by input address takes an entry for.

    Software knows the page or block of its own stage.  What is smaller only because of the other
    stage goes with the whole of it.
    """
    cdef unsigned int own = e.lg2_s2 if e.kind == KIND_S2 else e.lg2_s1
    return own if own > e.lg2 else e.lg2


cdef inline bint tlb_matches(const CachesC* c, uint64_t slot, const Filter* f) noexcept nogil:
    cdef const CacheC* cache = &c.cache[CACHE_TLB]
    cdef uint64_t key = slot_second(cache, slot)
    cdef const Entry* e
    cdef unsigned int lg2
    if not filter_key(f, key):
        return False
    e = &(<Entry*>cache.entries)[slot]
    if f.granule and f.granule != (e.granule_s2 if e.kind == KIND_S2 else e.granule_s1):
        return False
    if f.level and f.level != (e.level_s2 if e.kind == KIND_S2 else e.level_s1):
        return False
    if f.all_addresses:
        return True
    lg2 = key_lg2(key)
    return filter_span(
        f, slot_first(cache, slot) << lg2, block_lg2(e) if f.blocks else lg2)


cdef inline void tlb_forget(CachesC* c, uint64_t slot) noexcept nogil:
    """What is counted about the entry of a slot, which goes."""
    cdef uint64_t key = slot_second(&c.cache[CACHE_TLB], slot)
    cdef const Entry* e = &(<Entry*>c.cache[CACHE_TLB].entries)[slot]
    sizes_remove(&c.tlb_sizes[key_kind(key)], key_lg2(key))
    c.globals -= (key & KEY_GLOBAL) != 0
    c.fractured -= block_lg2(e) != e.lg2


cdef inline uint64_t tlb_drop_slots(
        CachesC* c, uint64_t first, uint64_t n, const Filter* f) noexcept nogil:
    """Drop what matches among n slots; returns how many."""
    cdef uint64_t slot, dropped = 0
    for slot in range(first, first + n):
        if tlb_matches(c, slot, f):
            tlb_forget(c, slot)
            cache_drop(&c.cache[CACHE_TLB], slot)
            dropped += 1
    return dropped


cdef inline uint64_t tlb_drop(CachesC* c, uint64_t sizes, const Filter* f) noexcept nogil:
    """Drop every TLB entry that matches; `sizes`: what those that could have.  How many went."""
    cdef CacheC* cache = &c.cache[CACHE_TLB]
    cdef uint64_t left = sizes, page, more, dropped = 0
    cdef unsigned int lg2
    cdef bint scan = f.all_addresses or (f.blocks and c.fractured)
    while left and not scan:
        lg2 = ctz64(left)
        left &= left - 1
        scan = (f.last >> lg2) - (f.first >> lg2) >= cache.sets
    if scan:
        return tlb_drop_slots(c, 0, <uint64_t>cache.sets * cache.ways, f)
    while sizes:
        lg2 = ctz64(sizes)
        sizes &= sizes - 1
        page = f.first >> lg2
        for more in range((f.last >> lg2) - page + 1):
            dropped += tlb_drop_slots(
                c, (page + more & cache.sets - 1) * cache.ways, cache.ways, f)
    return dropped


# --- TLB ---

cdef inline Entry* tlb_probe(
        CachesC* c, unsigned int kind, unsigned int world, uint16_t vmid, uint16_t asid,
        uint64_t address, bint quiet=False) noexcept nogil:
    """Look an input address up: the entry, which lives until tlb_generation changes, or NULL.

    Counts one hit or one miss.  `kind` is one KIND_...: KIND_S2 takes an IPA.  Addresses are
    canonical: bits beyond the input size repeat the half's sign.
    """
    cdef CacheC* cache = &c.cache[CACHE_TLB]
    cdef uint64_t sizes = c.tlb_sizes[kind].mask
    cdef uint64_t key = tlb_key(c, kind, world, vmid, asid)
    cdef uint64_t page, set, sized
    cdef unsigned int lg2
    cdef int64_t slot
    while sizes:
        lg2 = ctz64(sizes)
        sizes &= sizes - 1
        page = address >> lg2
        set = page & (cache.sets - 1)
        sized = <uint64_t>lg2 << KEY_LG2_SHIFT
        slot = cache_find(cache, set, page, key | sized)
        if slot < 0 and c.globals and c.key_mask[kind][world] & KEY_GLOBAL:
            slot = cache_find(cache, set, page, global_key(key) | sized)
        if slot >= 0:
            if not quiet:
                cache_hit(cache, slot)
            return &(<Entry*>cache.entries)[slot]
    cache.counters.misses += cache.ways != 0 and not quiet
    return NULL


cdef inline void tlb_touch(CachesC* c, const Entry* e) noexcept nogil:
    """What tlb_probe() counts and remembers when it hits this entry.

    tlb_generation is what it was when the entry was found.
    """
    cache_hit(&c.cache[CACHE_TLB], e - <Entry*>c.cache[CACHE_TLB].entries)


cdef inline void filter_rivals(Filter* f, uint64_t key) noexcept nogil:
    """The tags of entries that could answer a request which one with this key can answer."""
    f.n = 0
    if key & KEY_GLOBAL:
        filter_pass(f, ~(KEY_ASID | KEY_GLOBAL | KEY_LG2), key & ~(KEY_GLOBAL | KEY_LG2))
    else:
        filter_pass(f, ~KEY_LG2, key & ~KEY_LG2)
        filter_pass(f, ~KEY_LG2, global_key(key) & ~KEY_LG2)


cdef inline uint64_t entry_key(const CachesC* c, const Entry* e) noexcept nogil:
    cdef uint64_t key = tlb_key(c, e.kind, e.world, e.vmid, e.asid)
    if e.is_global and c.key_mask[e.kind][e.world] & KEY_GLOBAL:
        key = global_key(key)
    return key | <uint64_t>e.lg2 << KEY_LG2_SHIFT


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
    return c.tlb_sizes[e.kind].mask


cdef inline void tlb_admit(
        CachesC* c, uint64_t slot, const Entry* e, uint64_t key) noexcept nogil:
    """Put an entry into a slot, and count it."""
    cdef CacheC* cache = &c.cache[CACHE_TLB]
    cache_put(cache, slot, e.page, key)
    (<Entry*>cache.entries)[slot] = e[0]
    sizes_add(&c.tlb_sizes[e.kind], e.lg2)
    c.globals += (key & KEY_GLOBAL) != 0
    c.fractured += block_lg2(e) != e.lg2


cdef inline Entry* tlb_fill(CachesC* c, const Entry* e) noexcept nogil:
    """Keep a translation; entries that could answer the same request go.  NULL without a TLB."""
    cdef CacheC* cache = &c.cache[CACHE_TLB]
    cdef uint64_t key, sizes, slot
    cdef Filter rivals
    if cache.ways == 0:
        return NULL
    c_assert(LG2_MIN <= e.lg2 <= LG2_MAX and KIND_S1 <= e.kind <= KIND_COMBINED)
    key = entry_key(c, e)
    sizes = tlb_rivals(c, e, key, &rivals)
    cache.counters.replacements += tlb_drop(c, sizes, &rivals)
    slot = cache_victim(cache, e.page & (cache.sets - 1))
    if slot_second(cache, slot):
        tlb_forget(c, slot)
    tlb_admit(c, slot, e, key)
    c.tlb_generation += 1
    return &(<Entry*>cache.entries)[slot]


# --- walk caches ---

cdef inline CacheC* walk_cache(CachesC* c, unsigned int kind) noexcept nogil:
    return &c.cache[CACHE_WALK2 if kind == KIND_S2 else CACHE_WALK1]


cdef inline Table* walk_probe(
        CachesC* c, unsigned int kind, unsigned int world, uint16_t vmid, uint16_t asid,
        uint64_t address, bint quiet=False) noexcept nogil:
    """The deepest cached table on the walk of an address, or NULL; one hit or one miss.

    It lives until the next fill or invalidation.
    """
    cdef CacheC* cache = walk_cache(c, kind)
    cdef uint64_t sizes = c.walk_sizes[kind].mask
    cdef uint64_t key = tlb_key(c, kind, world, vmid, asid)
    cdef uint64_t prefix
    cdef unsigned int lg2
    cdef int64_t slot
    while sizes:
        lg2 = ctz64(sizes)
        sizes &= sizes - 1
        prefix = address >> lg2
        slot = cache_find(
            cache, prefix & (cache.sets - 1), prefix, key | <uint64_t>lg2 << KEY_LG2_SHIFT)
        if slot >= 0:
            if not quiet:
                cache_hit(cache, slot)
            return &(<Table*>cache.entries)[slot]
    cache.counters.misses += cache.ways != 0 and not quiet
    return NULL


cdef inline uint64_t walk_key(const CachesC* c, const Table* e) noexcept nogil:
    """Tables are not known to be global: their entries have the ASID of who filled them."""
    return tlb_key(c, e.kind, e.world, e.vmid, e.asid) | <uint64_t>e.lg2 << KEY_LG2_SHIFT


cdef inline void walk_forget(CachesC* c, CacheC* cache, uint64_t slot) noexcept nogil:
    cdef uint64_t key = slot_second(cache, slot)
    sizes_remove(&c.walk_sizes[key_kind(key)], key_lg2(key))


cdef inline void walk_admit(
        CachesC* c, CacheC* cache, uint64_t slot, const Table* e) noexcept nogil:
    cache_put(cache, slot, e.prefix, walk_key(c, e))
    (<Table*>cache.entries)[slot] = e[0]
    sizes_add(&c.walk_sizes[e.kind], e.lg2)


cdef inline Table* walk_fill(CachesC* c, const Table* e) noexcept nogil:
    """Keep a table; the entry of the same tags goes.  NULL without such a walk cache."""
    cdef CacheC* cache = walk_cache(c, e.kind)
    cdef int64_t slot
    cdef uint64_t set = e.prefix & (cache.sets - 1)
    if cache.ways == 0:
        return NULL
    c_assert(LG2_MIN <= e.lg2 <= LG2_MAX and KIND_S1 <= e.kind <= KIND_COMBINED)
    slot = cache_find(cache, set, e.prefix, walk_key(c, e))
    if slot >= 0:
        walk_forget(c, cache, slot)
        cache_drop(cache, slot)
        cache.counters.replacements += 1
    slot = cache_victim(cache, set)
    if slot_second(cache, slot):
        walk_forget(c, cache, slot)
    walk_admit(c, cache, slot, e)
    return &(<Table*>cache.entries)[slot]


cdef inline uint64_t walk_drop(CachesC* c, CacheC* cache, const Filter* f) noexcept nogil:
    """Drop every table that matches, at whatever level; returns how many."""
    cdef uint64_t slot, key, dropped = 0
    if cache.live == 0:
        return 0
    for slot in range(<uint64_t>cache.sets * cache.ways):
        key = slot_second(cache, slot)
        if not filter_key(f, key):
            continue
        if f.granule and f.granule != (<Table*>cache.entries)[slot].granule:
            continue
        if f.all_addresses or filter_span(
                f, slot_first(cache, slot) << key_lg2(key), key_lg2(key)):
            walk_forget(c, cache, slot)
            cache_drop(cache, slot)
            cache.counters.invalidations += 1
            dropped += 1
    return dropped


# --- invalidation ---

cdef inline bint filter_of(const Invalidation* inv, Filter* f) noexcept nogil:
    """What a TLBI command hits (IHI 0070, 4.4); False for those that are not Non-secure."""
    cdef uint64_t ns = <uint64_t>WORLD_NS_EL1 << KEY_WORLD_SHIFT
    cdef uint64_t el2 = <uint64_t>WORLD_EL2 << KEY_WORLD_SHIFT
    cdef uint64_t e2h = <uint64_t>WORLD_EL2_E2H << KEY_WORLD_SHIFT
    cdef uint64_t vmid_mask = <uint64_t>inv.vmid_mask << KEY_VMID_SHIFT
    cdef uint64_t vmid = <uint64_t>inv.vmid << KEY_VMID_SHIFT & vmid_mask
    cdef int op = inv.op
    f.n = 0
    f.blocks = True
    f.tables = True
    f.all_addresses = True
    f.granule = 0
    f.level = 0
    f.first = inv.first
    f.last = inv.last
    if op in (CMD_TLBI_NH_VA, CMD_TLBI_NH_VAA, CMD_TLBI_EL2_VA, CMD_TLBI_EL2_VAA,
              CMD_TLBI_S2_IPA):
        f.tables = not inv.leaf
        f.all_addresses = inv.all_addresses
        f.granule = inv.granule
        f.level = inv.level
    if op == CMD_TLBI_NH_ALL or op == CMD_TLBI_NH_VAA:
        filter_pass(f, KEY_WORLD | KEY_STAGE1 | vmid_mask, ns | KEY_STAGE1 | vmid)
    elif op == CMD_TLBI_NH_ASID or op == CMD_TLBI_NH_VA:
        filter_pass(f, KEY_WORLD | KEY_STAGE1 | vmid_mask | KEY_GLOBAL | KEY_ASID,
                    ns | KEY_STAGE1 | vmid | inv.asid)
        if op == CMD_TLBI_NH_VA:
            filter_pass(f, KEY_WORLD | KEY_STAGE1 | vmid_mask | KEY_GLOBAL,
                        ns | KEY_STAGE1 | vmid | KEY_GLOBAL)
    elif op == CMD_TLBI_EL2_ALL or op == CMD_TLBI_EL2_VAA:
        filter_pass(f, KEY_WORLD, el2)
        filter_pass(f, KEY_WORLD, e2h)
    elif op == CMD_TLBI_EL2_ASID or op == CMD_TLBI_EL2_VA:
        filter_pass(f, KEY_WORLD | KEY_GLOBAL | KEY_ASID, e2h | inv.asid)
        if op == CMD_TLBI_EL2_VA:
            filter_pass(f, KEY_WORLD | KEY_GLOBAL, e2h | KEY_GLOBAL)
            filter_pass(f, KEY_WORLD, el2)
    elif op == CMD_TLBI_S12_VMALL:
        filter_pass(f, KEY_WORLD | vmid_mask, ns | vmid)
    elif op == CMD_TLBI_S2_IPA:
        filter_pass(f, KEY_WORLD | KEY_KIND | vmid_mask,
                    ns | <uint64_t>KIND_S2 << KEY_KIND_SHIFT | vmid)
    elif op == CMD_TLBI_NSNH_ALL:
        filter_pass(f, KEY_WORLD, ns)
    else:
        return False
    return True


cdef inline uint64_t tlbi(CachesC* c, const Invalidation* inv) noexcept nogil:
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


cdef inline uint64_t caches_invalidate_all(CachesC* c) noexcept nogil:
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
