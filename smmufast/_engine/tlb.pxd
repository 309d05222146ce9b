"""The caches of an SMMU: TLB, walk caches and configuration caches, and what invalidates them.

Not architectural.  Which request an entry may answer and which entries a command must hit are rules
of _rules/scope.pxd (IHI 0070, 3.17, 4.3, 4.4).  Invalidation is exact: what a command need not hit
stays.

The C names, for the translation and the command queue:

    CachesC       all caches of one SMMU; Caches (below) owns it, `caches.c` lives as long
    Entry         a translation in the TLB
    Table         a table in a walk cache

A cache that is absent never hits, takes nothing, and counts nothing.

None of these functions takes a lock, and none is safe beside another: whoever calls one has the
mutex, or the GIL while nobody uses the caches without it.  Two Smmu never share one CachesC.
"""

from libc.stdint cimport int8_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from smmufast._facts.bits cimport likely, unlikely
from smmufast._engine.memory cimport Mutex
from smmufast._engine.cache cimport (
    CacheC, cache_find, cache_hit, cache_hit_times, cache_miss, ctz64, match4, print_of,
)
from smmufast._rules.scope cimport KEY_LG2_SHIFT, KEY_VALID, Invalidation, key_of


cdef enum:
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
    REGION_LG2 = 21


# A translation, as whoever walked found it: 64 bytes, of which probe.h says what each is.  After
# tlb_probe() all but the tags (page, lg2, kind, world, vmid, asid, aset, is_global) may be changed
# in place, such as a CLEAN flag or perm.
cdef extern from "_engine/probe.h":
    enum:
        ENTRY_CLEAN1 "SMMUFAST_ENTRY_CLEAN1"
        ENTRY_CLEAN2 "SMMUFAST_ENTRY_CLEAN2"
        ENTRY_CONTIGUOUS "SMMUFAST_ENTRY_CONTIGUOUS"

    ctypedef struct Entry "smmufast_entry":
        uint64_t page
        uint64_t key
        uint64_t address
        uint8_t perm1, perm2
        uint8_t flags
        uint8_t lg2
        uint16_t asid, vmid
        uint64_t ipa
        uint32_t sid, ssid
        uint8_t kind
        uint8_t world
        uint8_t is_global
        int8_t level
        uint8_t attr, sh
        uint8_t lg2_s1, lg2_s2
        int8_t level_s1, level_s2
        uint8_t granule_s1, granule_s2
        uint8_t aset
        uint8_t[3] extra


# A table that a walk came to, in the walk cache of its stage: 64 bytes.
cdef struct Table:
    uint64_t prefix        # input address >> lg2; all bits above: the sign is in it
    uint64_t key           # the other tags; written by walk_fill()
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
    uint8_t[7] extra       # for whoever fills it; not read here


# An STE or a CD.
cdef struct ConfigEntry:
    uint64_t sid
    uint64_t key           # KEY_VALID; of a CD also its SubstreamID
    uint64_t[8] words      # CONFIG_WORDS, as they were given


# How many entries there are of each size, and which sizes there are any of.
cdef struct Sizes:
    uint64_t mask
    uint64_t lone_key      # of the one size that there is, in four ways: its part of the key
    uint32_t lone          # its log2; 0 with none or several, or other than four ways
    uint32_t[64] live


cdef struct CachesC:
    Mutex* mutex
    CacheC[5] cache         # by CACHE_...
    uint64_t config_generation      # changes with every fill, eviction, invalidation of STE or CD
    uint64_t tlb_generation         # likewise of the TLB
    Sizes[4] tlb_sizes     # by kind
    Sizes[4] walk_sizes
    uint64_t[4][4] key_mask         # by kind and world: the tags that there are
    uint32_t globals       # live TLB entries that match any ASID
    uint32_t fractured     # live TLB entries that cover less than the block they are from
    uint32_t* regions      # TLB entries of less than 2^REGION_LG2, by their region, hashed
    unsigned int regions_lg2        # log2 of how many counters that are
    bint split             # nested translations are cached by stage, not combined


# Everything but the geometry, as bytes that the caller frees; it has the caches meanwhile.
cdef char* state_of(CachesC* c, uint64_t* size) except NULL


# Owned by the class; other modules cimport it and use `caches.c`.
cdef class Caches:
    cdef CachesC* c
    cdef bint taken        # by an Smmu
    cdef tuple geometries
    cdef bytes _contents(self)


# --- tags ---

cdef inline uint64_t tlb_key(
        const CachesC* c, unsigned int kind, unsigned int world, uint16_t vmid,
        uint16_t asid, unsigned int aset) noexcept nogil:
    """Second word of a tag without its lg2: of entries that are not global."""
    return key_of(c.key_mask[kind][world], kind, world, vmid, asid, aset)


# --- configuration ---

# Keep an STE, a CD; the handle for ste_touch() and cd_touch(), 0 without such a cache.
cdef uint32_t ste_fill(CachesC* c, uint32_t sid, const uint64_t* words) noexcept nogil
cdef uint32_t cd_fill(
    CachesC* c, uint32_t sid, uint32_t index, const uint64_t* words) noexcept nogil

# CMD_CFGI_...; lg2_count is Range + 1.  How many entries went, as all that invalidate return.
cdef uint64_t cfgi_ste(CachesC* c, uint32_t sid, bint leaf) noexcept nogil
cdef uint64_t cfgi_range(CachesC* c, uint32_t sid, unsigned int lg2_count) noexcept nogil
cdef uint64_t cfgi_cd(CachesC* c, uint32_t sid, uint32_t ssid, bint leaf) noexcept nogil
cdef uint64_t cfgi_cd_all(CachesC* c, uint32_t sid) noexcept nogil
cdef uint64_t cfgi_all(CachesC* c) noexcept nogil


cdef inline uint64_t cd_set(const CacheC* cache, uint32_t sid, uint32_t index) noexcept nogil:
    return (sid ^ index) & cache.set_mask


cdef inline uint64_t* config_words(const CacheC* cache, uint64_t slot) noexcept nogil:
    return (<ConfigEntry*>cache.entries)[slot].words


# S3.21.3-11, S4.3.8-3
cdef inline uint32_t config_probe(
        CacheC* cache, uint64_t set, uint64_t first, uint64_t second,
        uint64_t* words) noexcept nogil:
    cdef int64_t slot = cache_find(cache, set, first, second, sizeof(ConfigEntry))
    if slot < 0:
        cache_miss(cache)
        return 0
    cache_hit(cache, slot)
    memcpy(words, config_words(cache, slot), 8 * CONFIG_WORDS)
    return <uint32_t>slot + 1


# S5.2.1-3
cdef inline uint32_t ste_probe(
        CachesC* c, uint32_t sid, uint64_t* words) noexcept nogil:
    """Look an STE up: 0, or a handle for ste_touch() and the STE's dwords."""
    cdef CacheC* cache = &c.cache[CACHE_STE]
    if cache.ways == 0:
        return 0
    return config_probe(cache, sid & cache.set_mask, sid, KEY_VALID, words)


cdef inline void ste_touch(CachesC* c, uint32_t handle) noexcept nogil:
    """What ste_probe() counts and remembers when it hits, without copying.

    `handle` is not 0, and config_generation is what it was when the handle was given.
    """
    cache_hit(&c.cache[CACHE_STE], handle - 1)


cdef inline void config_touch(
        CachesC* c, uint32_t ste_handle, uint32_t cd_handle, uint64_t n) noexcept nogil:
    """ste_touch() and cd_touch() of what has a handle, n times; n is not 0."""
    if ste_handle:
        cache_hit_times(&c.cache[CACHE_STE], ste_handle - 1, n)
    if cd_handle:
        cache_hit_times(&c.cache[CACHE_CD], cd_handle - 1, n)


# S4.3.3-4, S5.4.1-7
cdef inline uint32_t cd_probe(
        CachesC* c, uint32_t sid, uint32_t index, uint64_t* words) noexcept nogil:
    """Look the CD of a SubstreamID up: 0, or a handle for cd_touch() and the CD's dwords.

    Without substreams `index` is 0.
    """
    cdef CacheC* cache = &c.cache[CACHE_CD]
    if cache.ways == 0:
        return 0
    return config_probe(cache, cd_set(cache, sid, index), sid, KEY_VALID | index, words)


cdef inline void cd_touch(CachesC* c, uint32_t handle) noexcept nogil:
    """As ste_touch()."""
    cache_hit(&c.cache[CACHE_CD], handle - 1)


# --- translations and tables ---

# What tlb_probe() leaves: several sizes, other than four ways, a miss.  `quiet`: nothing is
# counted, and the replacement is not told.
cdef Entry* tlb_probe_sizes(
    CachesC* c, unsigned int kind, uint64_t key, uint64_t address, bint quiet) noexcept nogil

# Keep a translation; entries that could answer the same request go.  NULL without a TLB.
cdef Entry* tlb_fill(CachesC* c, const Entry* e) noexcept nogil

# The deepest cached table on the walk of an address, or NULL; one hit or one miss.  It lives until
# the next fill or invalidation.
cdef Table* walk_probe(
    CachesC* c, unsigned int kind, unsigned int world, uint16_t vmid, uint16_t asid,
    uint64_t address) noexcept nogil
# Keep a table; NULL without such a walk cache.
# V8.16.3.1-3
cdef Table* walk_fill(CachesC* c, const Table* e) noexcept nogil

# A TLBI command, and what INV_ALL or a reset does.
cdef uint64_t tlbi(CachesC* c, const Invalidation* inv) noexcept nogil
cdef uint64_t caches_invalidate_all(CachesC* c) noexcept nogil


cdef inline void tlb_touch(CachesC* c, const Entry* e) noexcept nogil:
    """What tlb_probe() counts and remembers when it hits this entry.

    tlb_generation is what it was when the entry was found.
    """
    cache_hit(&c.cache[CACHE_TLB], e - <Entry*>c.cache[CACHE_TLB].entries)


cdef inline Entry* tlb_find_key(
        CachesC* c, unsigned int kind, uint64_t key, uint64_t address) noexcept nogil:
    """tlb_probe_key() in the ordinary case, of which nothing is counted; else NULL.

    The ordinary case: one size, four ways, the first print that agrees is right.
    """
    cdef CacheC* cache = &c.cache[CACHE_TLB]
    cdef unsigned int lg2 = c.tlb_sizes[kind].lone
    cdef uint64_t page, slot, found
    cdef Entry* e
    if unlikely(lg2 == 0):
        return NULL
    page = address >> lg2
    key |= <uint64_t>lg2 << KEY_LG2_SHIFT
    slot = (page & cache.set_mask) * 4
    found = match4(&cache.prints[slot], print_of(page, key))
    if unlikely(found == 0):
        return NULL
    e = &(<Entry*>cache.entries)[slot + ctz64(found)]
    return e if likely(e.page == page and e.key == key) else NULL


cdef inline Entry* tlb_probe_key(
        CachesC* c, unsigned int kind, uint64_t key, uint64_t address) noexcept nogil:
    """tlb_probe() with the key of a context, tlb_key(), that a loop has made before."""
    cdef Entry* e = tlb_find_key(c, kind, key, address)
    if likely(e != NULL):
        tlb_touch(c, e)
        return e
    return tlb_probe_sizes(c, kind, key, address, False)


cdef inline Entry* tlb_probe(
        CachesC* c, unsigned int kind, unsigned int world, uint16_t vmid, uint16_t asid,
        unsigned int aset, uint64_t address) noexcept nogil:
    """Look an input address up: the entry, which lives until tlb_generation changes, or NULL.

    Counts one hit or one miss.  `kind` is one KIND_...: KIND_S2 takes an IPA.  Addresses are
    canonical: bits beyond the input size repeat the half's sign.
    """
    return tlb_probe_key(c, kind, tlb_key(c, kind, world, vmid, asid, aset), address)
