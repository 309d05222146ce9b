# cython: binding=False, embedsignature=True, embedsignature.format=clinic
# cython: language_level=3
"""Caches: the class that owns what tlb.pxd describes, with geometry, contents and counters.

Not architectural: sizes, policies and what stays in a cache are properties of one implementation.
"""

cimport cython
cimport numpy as cnp
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int8_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from smmufast._facts.bits cimport le64, low_mask
from smmufast._engine.cache cimport (
    PLRU_WAYS_MAX, POLICY_FIFO, POLICY_LRU, POLICY_PLRU, CacheC, Counters, c_assert, cache_bytes,
    cache_close, cache_drop, cache_find, cache_hit, cache_hits, cache_open, cache_put,
    cache_reset_counters, cache_victim, ctz64, order_words, tag_at,
)
from smmufast._facts.layout cimport (
    CMD_CFGI_CD, CMD_CFGI_CD_ALL, CMD_CFGI_STE, CMD_CFGI_STE_RANGE, CMD_TLBI_S2_IPA, WORLD_NS_EL1,
)
from smmufast._engine.memory cimport (
    Mutex, mutex_close, mutex_drop, mutex_have_gil, mutex_open, to_address, to_flag, to_integer,
)
from smmufast._rules.scope cimport (
    Filter, Invalidation, KEY_GLOBAL, KEY_LG2_SHIFT, KEY_VALID, KIND_COMBINED, KIND_S1, KIND_S2,
    block_lg2, cfgi_last, filter_key, filter_leaf, filter_of, filter_pass, filter_rivals,
    filter_span, global_key, key_tags,
)

from typing import NamedTuple

import numpy as np

from smmufast._arguments import either, in_words, must_be
from smmufast.faults import Perm
from smmufast.layout import Opcode, StreamWorld

cnp.import_array()

POLICIES = ("lru", "plru", "fifo", "random")
"""Replacement policies: true LRU, tree pseudo-LRU, FIFO, random with a seed."""

KINDS = ("", "stage 1", "stage 2", "combined")
"""Kinds of an entry, by number: stage 1 alone, stage 2 alone, both in one; index 0 is none."""

NESTED = ("combined", "split")
"""How nested translations are cached: input address to PA at once, or each stage by itself."""

CACHES = ("ste", "cd", "tlb", "walk1", "walk2")
"""The caches of Caches, in the order of its counters."""

cdef tuple COUNTERS = (
    "hits", "misses", "fills", "evictions", "replacements", "invalidations")
cdef object COUNTERS_DTYPE = np.dtype([("cache", "U8"), *((name, "u8") for name in COUNTERS)])

cdef enum:
    SLOTS_MAX = 1 << 24     # entries of one cache


class Geometry(NamedTuple):
    """Size and replacement of one cache.

    `sets` is a power of two and `ways` at least 1, together at most 2**24 entries; sets=1 makes
    a cache fully associative. `policy` is "lru", "plru", "fifo" or "random"; "plru" wants a power
    of two of at most 64 ways. `seed`, a number of 64 bits, is that of "random".
    """

    sets: int
    ways: int
    policy: str = "lru"
    seed: int = 0


class TlbEntry(NamedTuple):
    """A translation in the TLB.

    `start` is the first input address that it covers, canonical in 64 bits, and `output` where
    that goes; it covers 2**lg2 bytes. `ipa`, of combined entries, lies between. `kind` is one of
    KINDS. `vmid`, `asid` and `is_global` (the leaf has nG=0) are tags as far as `kind` and `world`
    have such tags; `sid` and `ssid` tell which transaction filled it. Each stage has what it
    admits (`perm1`, `perm2`) and its page's `lg2_s1`, `level_s1` and `granule_s1` (log2), or
    0 when it is absent; `level` is that of the smaller page. `clean1` and `clean2`: writable
    through DBM, not dirty yet. `attr` is a MAIR byte. `extra` is the filler's own.
    """

    start: int
    output: int
    lg2: int = 12
    kind: str = "stage 1"
    world: StreamWorld = StreamWorld.NS_EL1
    vmid: int = 0
    asid: int = 0
    is_global: bool = False
    ipa: int = 0
    sid: int = 0
    ssid: int = 0
    level: int = 3
    perm1: Perm = Perm(0x3F)
    perm2: Perm = Perm(0x3F)
    attr: int = 0xFF
    sh: int = 0
    clean1: bool = False
    clean2: bool = False
    contiguous: bool = False
    lg2_s1: int = 0
    lg2_s2: int = 0
    level_s1: int = 3
    level_s2: int = 3
    granule_s1: int = 12
    granule_s2: int = 12
    aset: int = 0
    extra: bytes = bytes(3)


class WalkEntry(NamedTuple):
    """A table in a walk cache.

    The table at address `table` translates the 2**lg2 bytes from the input address `start` on;
    it is one of `level`. `output`, of combined entries, is where stage 2 has it. `bits` are the
    hierarchical attributes of the descriptors above. The rest is as in TlbEntry.
    """

    start: int
    table: int
    lg2: int = 21
    kind: str = "stage 1"
    world: StreamWorld = StreamWorld.NS_EL1
    vmid: int = 0
    asid: int = 0
    output: int = 0
    bits: int = 0
    sid: int = 0
    ssid: int = 0
    level: int = 3
    granule: int = 12
    extra: bytes = bytes(7)


class StaleEntry(NamedTuple):
    """A live entry that the tables in memory no longer give: the cache's name and the entry.

    `cache` is one of CACHES, or "atc" for the ATC of a device. `now` is the entry that the tables
    give, None when they give none. `why` says what differs, by field and in hexadecimal:
    ``output: 0x40009000 now, 0x40001000 cached``. `sure` is False where so many contexts have the
    entry's tags that not all were asked: one of the others may give it.
    """

    cache: str
    entry: tuple
    now: tuple | None
    why: str
    sure: bool = True

    def _repr_html_(self):
        from smmufast._html import fields
        return fields(self)


class SteEntry(NamedTuple):
    """An STE in the configuration cache: its StreamID and its 64 bytes."""

    sid: int
    data: bytes


class CdEntry(NamedTuple):
    """A CD in the configuration cache: StreamID, SubstreamID (0 without) and its 64 bytes."""

    sid: int
    ssid: int
    data: bytes


cdef void caches_set_masks(CachesC* c) noexcept nogil:
    """Which tags entries have, by kind and StreamWorld."""
    cdef unsigned int kind, world
    for kind in range(4):
        for world in range(4):
            c.key_mask[kind][world] = key_tags(kind, world)


cdef inline void sizes_seen(Sizes* sizes, const CacheC* cache) noexcept nogil:
    cdef bint one = cache.ways == 4 and sizes.mask and not sizes.mask & (sizes.mask - 1)
    sizes.lone = ctz64(sizes.mask) if one else 0
    sizes.lone_key = <uint64_t>sizes.lone << KEY_LG2_SHIFT


cdef inline void sizes_add(
        Sizes* sizes, const CacheC* cache, unsigned int lg2) noexcept nogil:
    sizes.live[lg2] += 1
    if sizes.live[lg2] == 1:
        sizes.mask |= <uint64_t>1 << lg2
        sizes_seen(sizes, cache)


cdef inline void sizes_remove(
        Sizes* sizes, const CacheC* cache, unsigned int lg2) noexcept nogil:
    sizes.live[lg2] -= 1
    if sizes.live[lg2] == 0:
        sizes.mask &= ~(<uint64_t>1 << lg2)
        sizes_seen(sizes, cache)


# --- configuration ---

cdef inline uint32_t config_fill(
        CachesC* c, CacheC* cache, uint64_t set, uint64_t first, uint64_t second,
        const uint64_t* words) noexcept nogil:
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
    if cache.ways == 0:
        return 0
    return config_fill(c, cache, sid & cache.set_mask, sid, KEY_VALID, words)


cdef uint32_t cd_fill(
        CachesC* c, uint32_t sid, uint32_t index, const uint64_t* words) noexcept nogil:
    """Keep a CD; returns the handle for cd_touch(), 0 without a cache."""
    cdef CacheC* cache = &c.cache[CACHE_CD]
    if cache.ways == 0:
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
    cache.counters.misses += cache.ways != 0 and not quiet
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


cdef Entry* tlb_fill(CachesC* c, const Entry* e) noexcept nogil:
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
    cache.counters.misses += cache.ways != 0
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
    if cache.ways == 0:
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


# --- arguments ---

cdef int number_of(str what, object value, tuple names) except -1:
    if isinstance(value, str) and value in names and value:
        return names.index(value)
    raise ValueError(must_be(what, either(names), value))


cdef int world_of(object world) except -1:
    try:
        return StreamWorld[world] if isinstance(world, str) else StreamWorld(world)
    except (KeyError, ValueError):
        raise ValueError(must_be("world", either(StreamWorld.__members__), world)) from None


cdef uint64_t field(str name, object value, uint64_t last) except? -1:
    return to_address(name, value, last)


cdef int8_t level_of(str name, object value) except? 99:
    number = to_integer(name, value)
    if not -1 <= number <= 3:
        raise ValueError(must_be(name, "-1 to 3", number))
    return number


cdef int check_kind(int kind, int world) except -1:
    if kind != KIND_S1 and world != WORLD_NS_EL1:
        raise ValueError(must_be("kind", "'stage 1' outside of the world NS_EL1", KINDS[kind]))
    return 0


cdef int check_start(uint64_t start, unsigned int lg2) except -1:
    if start & low_mask(lg2):
        raise ValueError(must_be(
            "start", f"a multiple of {<uint64_t>1 << lg2:#x} (lg2 {lg2})", start))
    return 0


cdef unsigned int lg2_of(object value) except? 99:
    cdef uint64_t lg2 = field("lg2", value, LG2_MAX)
    if lg2 < LG2_MIN:
        raise ValueError(must_be("lg2", f"{LG2_MIN} to {LG2_MAX}", lg2))
    return lg2


cdef unsigned int page_lg2_of(str name, object value) except? 99:
    """log2 of a stage's page, 0 without the stage."""
    cdef uint64_t lg2 = field(name, value, LG2_MAX)
    if 0 < lg2 < LG2_MIN:
        raise ValueError(must_be(name, f"0 or {LG2_MIN} to {LG2_MAX}", lg2))
    return lg2


def _geometry_of(name, given):
    """A Geometry of checked numbers, or None."""
    if given is None:
        return None
    try:
        given = Geometry(*given)
    except TypeError:
        raise TypeError(must_be(
            name, "a Geometry (sets, ways, policy, seed) or None", given)) from None
    cdef uint64_t sets = field(f"{name}.sets", given.sets, SLOTS_MAX)
    cdef uint64_t ways = field(f"{name}.ways", given.ways, SLOTS_MAX)
    cdef uint64_t seed = field(f"{name}.seed", given.seed, ~<uint64_t>0)
    cdef int policy = number_of(f"{name}.policy", given.policy, POLICIES)
    if sets == 0 or sets & (sets - 1):
        raise ValueError(must_be(f"{name}.sets", "a power of two", sets))
    if ways == 0 or sets * ways > SLOTS_MAX:
        raise ValueError(must_be(
            f"{name}.ways", f"1 to {SLOTS_MAX // sets} with {sets} sets", ways))
    if policy == POLICY_PLRU and (ways & (ways - 1) or ways > PLRU_WAYS_MAX):
        raise ValueError(must_be(
            f"{name}.ways", f"a power of two up to {PLRU_WAYS_MAX} with the policy 'plru'", ways))
    return Geometry(sets, ways, POLICIES[policy], seed)


cdef int read_extra(object given, uint8_t* extra, Py_ssize_t n) except -1:
    if type(given) is not bytes or len(given) != n:
        raise ValueError(must_be("extra", f"{n} bytes", given))
    memcpy(extra, PyBytes_AS_STRING(given), n)
    return 0


cdef int read_entry(object given, Entry* e) except -1:
    """A TLB entry from a TlbEntry, checked."""
    if not isinstance(given, TlbEntry):
        raise TypeError(must_be("entry", "a TlbEntry", type(given)))
    memset(e, 0, sizeof(Entry))
    e.kind = number_of("kind", given.kind, KINDS)
    e.world = world_of(given.world)
    check_kind(e.kind, e.world)
    e.lg2 = lg2_of(given.lg2)
    e.page = field("start", given.start, ~<uint64_t>0)
    check_start(e.page, e.lg2)
    e.page >>= e.lg2
    e.address = field("output", given.output, ~<uint64_t>0)
    e.ipa = field("ipa", given.ipa, ~<uint64_t>0)
    e.sid = field("sid", given.sid, 0xFFFFFFFF)
    e.ssid = field("ssid", given.ssid, 0xFFFFFFFF)
    e.asid = field("asid", given.asid, 0xFFFF)
    e.vmid = field("vmid", given.vmid, 0xFFFF)
    e.is_global = to_flag("is_global", given.is_global)
    e.level = level_of("level", given.level)
    e.perm1 = field("perm1", int(given.perm1), 0x3F)
    e.perm2 = field("perm2", int(given.perm2), 0x3F)
    e.attr = field("attr", given.attr, 0xFF)
    e.sh = field("sh", given.sh, 3)
    e.flags = (
        (ENTRY_CLEAN1 if to_flag("clean1", given.clean1) else 0)
        | (ENTRY_CLEAN2 if to_flag("clean2", given.clean2) else 0)
        | (ENTRY_CONTIGUOUS if to_flag("contiguous", given.contiguous) else 0)
    )
    e.lg2_s1 = page_lg2_of("lg2_s1", given.lg2_s1)
    e.lg2_s2 = page_lg2_of("lg2_s2", given.lg2_s2)
    e.level_s1 = level_of("level_s1", given.level_s1)
    e.level_s2 = level_of("level_s2", given.level_s2)
    e.granule_s1 = field("granule_s1", given.granule_s1, 16)
    e.granule_s2 = field("granule_s2", given.granule_s2, 16)
    e.aset = to_flag("aset", given.aset)
    read_extra(given.extra, e.extra, sizeof(e.extra))
    return 0


cdef object entry_shown(const Entry* e):
    return TlbEntry(
        start=e.page << e.lg2, output=e.address, lg2=e.lg2, kind=KINDS[e.kind],
        world=StreamWorld(e.world), vmid=e.vmid, asid=e.asid, is_global=e.is_global != 0,
        ipa=e.ipa, sid=e.sid, ssid=e.ssid, level=e.level, perm1=Perm(e.perm1),
        perm2=Perm(e.perm2), attr=e.attr, sh=e.sh, clean1=e.flags & ENTRY_CLEAN1 != 0,
        clean2=e.flags & ENTRY_CLEAN2 != 0, contiguous=e.flags & ENTRY_CONTIGUOUS != 0,
        lg2_s1=e.lg2_s1, lg2_s2=e.lg2_s2, level_s1=e.level_s1, level_s2=e.level_s2,
        granule_s1=e.granule_s1, granule_s2=e.granule_s2, aset=e.aset,
        extra=(<const uint8_t*>e.extra)[:sizeof(e.extra)])


cdef bint translation_possible(const Entry* e) noexcept nogil:
    """Such an entry a walk may leave in the TLB."""
    return (KIND_S1 <= e.kind <= KIND_COMBINED and e.world < 3 and LG2_MIN <= e.lg2 <= LG2_MAX
            and (e.lg2_s1 == 0 or LG2_MIN <= e.lg2_s1 <= LG2_MAX)
            and (e.lg2_s2 == 0 or LG2_MIN <= e.lg2_s2 <= LG2_MAX)
            and -1 <= e.level <= 3 and -1 <= e.level_s1 <= 3 and -1 <= e.level_s2 <= 3
            and e.perm1 < 64 and e.perm2 < 64 and e.sh < 4
            and e.aset < 2 and not e.page >> (64 - e.lg2))


cdef uint64_t table_lg2(unsigned int granule, int level) noexcept nogil:
    """log2 of what a table of a level translates, 0 for no such table."""
    if granule not in (12, 14, 16) or not 0 <= level <= 3:
        return 0
    return granule + (4 - level) * (granule - 3)


# Where a walk goes on from: a table of another reach would let it index beyond levels or tables.
cdef bint table_possible(const Table* e) noexcept nogil:
    """Such a table a walk may leave in a walk cache."""
    return (KIND_S1 <= e.kind <= KIND_COMBINED and e.world < 3
            and e.lg2 == table_lg2(e.granule, e.level) and LG2_MIN <= e.lg2 <= LG2_MAX
            and not (e.table | e.output) & low_mask(e.granule)
            and not e.prefix >> (64 - e.lg2))


cdef int read_walk_entry(object given, Table* e) except -1:
    if not isinstance(given, WalkEntry):
        raise TypeError(must_be("entry", "a WalkEntry", type(given)))
    memset(e, 0, sizeof(Table))
    e.kind = number_of("kind", given.kind, KINDS)
    e.world = world_of(given.world)
    check_kind(e.kind, e.world)
    e.lg2 = lg2_of(given.lg2)
    e.prefix = field("start", given.start, ~<uint64_t>0)
    check_start(e.prefix, e.lg2)
    e.prefix >>= e.lg2
    e.table = field("table", given.table, ~<uint64_t>0)
    e.output = field("output", given.output, ~<uint64_t>0)
    e.bits = field("bits", given.bits, ~<uint64_t>0)
    e.sid = field("sid", given.sid, 0xFFFFFFFF)
    e.ssid = field("ssid", given.ssid, 0xFFFFFFFF)
    e.asid = field("asid", given.asid, 0xFFFF)
    e.vmid = field("vmid", given.vmid, 0xFFFF)
    e.level = level_of("level", given.level)
    e.granule = field("granule", given.granule, 16)
    read_extra(given.extra, e.extra, sizeof(e.extra))
    if e.lg2 != table_lg2(e.granule, e.level):
        raise ValueError(must_be(
            "lg2", f"what a table of level {e.level} translates with granule {e.granule}, "
            f"{table_lg2(e.granule, e.level) or 'of which there is none'}", e.lg2))
    if not table_possible(e):
        raise ValueError(in_words(
            "table, output", f"multiples of 2**{e.granule} (granule)",
            f"{e.table:#x}, {e.output:#x}"))
    return 0


cdef object walk_entry_shown(const Table* e):
    return WalkEntry(
        start=e.prefix << e.lg2, table=e.table, lg2=e.lg2, kind=KINDS[e.kind],
        world=StreamWorld(e.world), vmid=e.vmid, asid=e.asid, output=e.output, bits=e.bits,
        sid=e.sid, ssid=e.ssid, level=e.level, granule=e.granule,
        extra=(<const uint8_t*>e.extra)[:sizeof(e.extra)])


cdef int read_record(str name, object given, uint64_t* words) except -1:
    """The 64 bytes of an STE or CD, as dwords in host byte order."""
    data = bytes(given) if isinstance(given, (bytes, bytearray, memoryview)) else None
    if data is None or len(data) != 64:
        raise ValueError(must_be(
            name, "64 bytes", type(given) if data is None else len(data)))
    for i in range(8):
        words[i] = int.from_bytes(data[8 * i:8 * i + 8], "little")
    return 0


cdef int opcode_of(object op) except -1:
    try:
        return Opcode[op.upper()] if isinstance(op, str) else Opcode(op)
    except (KeyError, ValueError):
        raise ValueError(must_be("op", "an Opcode or its name", op)) from None


cdef bytes record_shown(const uint64_t* words):
    cdef uint64_t[8] little
    cdef int i
    for i in range(8):
        little[i] = le64(words[i])
    return PyBytes_FromStringAndSize(<char*>little, 64)


# --- one cache ---

@cython.final
@cython.auto_pickle(False)
cdef class Cache:
    """One of the caches of a Caches: its geometry, counters and entries.

    `len()` is the number of entries; iterating yields them as they are now, by slot: the ways of
    set 0, then those of set 1.
    """

    cdef Caches caches
    cdef int number

    def __init__(self):
        raise TypeError("a Cache is a part of Caches")

    cdef CacheC* get(self) except NULL:
        if self.caches is None:
            raise TypeError("a Cache is a part of Caches")
        return &self.caches.c.cache[self.number]

    @property
    def name(self):
        """Which cache it is: one of CACHES."""
        return CACHES[self.number]

    @property
    def geometry(self):
        """Sets, ways, policy and seed."""
        self.get()
        return self.caches.geometries[self.number]

    @property
    def hits(self):
        """Look-ups that found an entry."""
        return cache_hits(self.get())

    @property
    def misses(self):
        """Look-ups that found none."""
        return self.get().counters.misses

    @property
    def fills(self):
        """Entries that were put in."""
        return self.get().counters.fills

    @property
    def evictions(self):
        """Entries that gave way to a fill of another one in a full set."""
        return self.get().counters.evictions

    @property
    def replacements(self):
        """Entries that went because a fill could answer the same request."""
        return self.get().counters.replacements

    @property
    def invalidations(self):
        """Entries that commands invalidated."""
        return self.get().counters.invalidations

    @property
    def nbytes(self):
        """Memory of tags, replacement state and entries, in bytes."""
        return cache_bytes(self.get())

    def __len__(self):
        return self.get().live

    def __iter__(self):
        cdef CacheC* c = self.get()
        cdef Mutex* mutex = self.caches.c.mutex
        cdef uint64_t slot, n = 0, i
        cdef char* copies
        cdef list found = []
        mutex_have_gil(mutex)
        copies = <char*>malloc(c.live * c.stride + 1)
        if copies != NULL:
            for slot in range(c.slots):
                if c.prints[slot]:
                    memcpy(copies + n * c.stride, c.entries + slot * c.stride, c.stride)
                    n += 1
        mutex_drop(mutex)
        if copies == NULL:
            raise MemoryError()
        try:
            for i in range(n):
                found.append(self._entry(copies + i * c.stride))
        finally:
            free(copies)
        return iter(found)

    cdef object _entry(self, const char* entry):
        cdef const ConfigEntry* record = <const ConfigEntry*>entry
        if self.number == CACHE_TLB:
            return entry_shown(<const Entry*>entry)
        if self.number >= CACHE_WALK1:
            return walk_entry_shown(<const Table*>entry)
        data = record_shown(record.words)
        if self.number == CACHE_STE:
            return SteEntry(record.sid, data)
        return CdEntry(record.sid, record.key & ~KEY_VALID, data)

    def __repr__(self):
        cdef CacheC* c = self.get()
        sets, ways, policy, _ = self.geometry
        return (f"<Cache {self.name}: {sets} sets of {ways} ways, {policy}, "
                f"{c.live} entries>")


cdef Cache view_of(Caches caches, int number):
    cdef Cache view
    if caches.c.cache[number].ways == 0:
        return None
    view = Cache.__new__(Cache)
    view.caches = caches
    view.number = number
    return view


# --- state as bytes ---

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
        cache.clock = kept.clock
        cache.passed = kept.passed
        cache.random = kept.random or 1
        cache.counters = kept.counters
    if reader.left:
        raise ValueError(f"state: {reader.left} bytes too many")
    c.config_generation = config_generation
    c.tlb_generation = tlb_generation
    return 0


# --- all caches ---

cdef void release(CachesC* c) noexcept nogil:
    cdef int number
    if c != NULL:
        for number in range(N_CACHES):
            cache_close(&c.cache[number])
        if c.mutex != NULL:
            mutex_close(c.mutex)
            free(c.mutex)
        free(c.regions)
        free(c)


cdef CachesC* made(list geometries, bint split) except NULL:
    """New, empty caches."""
    cdef size_t* strides = [
        sizeof(ConfigEntry), sizeof(ConfigEntry), sizeof(Entry), sizeof(Table), sizeof(Table)]
    cdef CachesC* c = <CachesC*>calloc(1, sizeof(CachesC))
    cdef int number
    if c == NULL:
        raise MemoryError()
    c.mutex = <Mutex*>malloc(sizeof(Mutex))
    if c.mutex == NULL:
        release(c)
        raise MemoryError()
    mutex_open(c.mutex, NULL)
    c.split = split
    caches_set_masks(c)
    for number in range(N_CACHES):
        geometry = geometries[number]
        if geometry is None:
            continue
        if not cache_open(&c.cache[number], geometry.sets, geometry.ways,
                          POLICIES.index(geometry.policy), geometry.seed, strides[number]):
            release(c)
            raise MemoryError(f"no memory for {CACHES[number]} of {geometry}")
    c.regions_lg2 = 2
    while <uint64_t>1 << c.regions_lg2 < 4 * c.cache[CACHE_TLB].slots:
        c.regions_lg2 += 1
    c.regions = <uint32_t*>calloc(<size_t>1 << c.regions_lg2, sizeof(uint32_t))
    if c.regions == NULL:
        release(c)
        raise MemoryError(f"no memory for tlb of {geometries[CACHE_TLB]}")
    return c


def _restored(ste, cd, tlb, walk1, walk2, nested):
    return Caches(ste=ste, cd=cd, tlb=tlb, walk1=walk1, walk2=walk2, nested=nested)


@cython.final
@cython.auto_pickle(False)
cdef class Caches:
    """Caches(*, ste=None, cd=None, tlb=None, walk1=None, walk2=None, nested='combined')\n--\n
    The caches of one SMMU: what is in them, and what hits, misses and commands do to them.

    Not architectural. Each cache is set-associative, of its own geometry, or absent; without any
    argument all are.

    Parameters
    ----------
    ste, cd : Geometry, optional
        The configuration caches: STEs by StreamID, CDs by StreamID and SubstreamID. The set is
        that of the low bits of the StreamID; for CDs, of StreamID exclusive-or SubstreamID.
    tlb : Geometry, optional
        Translations of every size. The set is that of the low bits of the page number: of the
        input address above the entry's own size.
    walk1, walk2 : Geometry, optional
        Walk caches: tables of stage 1 and of stage 2, by what they translate. The set is that of
        the low bits of the input address above the table's reach.
    nested : {"combined", "split"}
        How the TLB keeps nested translations: as one entry of both stages, or as one of each.

    Attributes
    ----------
    ste, cd, tlb, walk1, walk2 : Cache or None
        The caches; None is an absent one.

    Raises
    ------
    TypeError, ValueError
        If a geometry is none, or cannot be.

    Notes
    -----
    A geometry may be given as a tuple: ``tlb=(1024, 4)`` is ``tlb=Geometry(1024, 4, "lru", 0)``.

    Caches belong to one Smmu. The methods here that look at entries or change them wait while a
    batch of another thread uses them; the counters are read as they are.

    `lookup()`, `fill()`, `tlbi()` and their like do what the translation and the commands do, for
    hosts that use the caches by themselves.

    Pickles, copies and `__getstate__()` hold everything, counters and replacement state
    included: a copy goes on as the original would.

    Examples
    --------
    >>> from smmufast._engine.tlb import Caches, TlbEntry
    >>> caches = Caches(tlb=(64, 4))
    >>> caches.lookup(0x1234_5678, asid=7) is None
    True
    >>> caches.fill(TlbEntry(0x1234_5000, 0x8000_0000, asid=7, perm1=0x3))
    >>> found = caches.lookup(0x1234_5678, asid=7)
    >>> hex(found.output), found.perm1
    ('0x80000000', <Perm.UR|UW: 3>)
    >>> caches.tlbi("TLBI_NH_VA", asid=7, address=0x1234_5000)
    1
    >>> caches.tlb.hits, caches.tlb.misses, caches.tlb.invalidations, len(caches.tlb)
    (1, 1, 1, 0)
    """

    def __cinit__(self, *, ste=None, cd=None, tlb=None, walk1=None, walk2=None,
                  nested="combined"):
        given = (ste, cd, tlb, walk1, walk2)
        self.geometries = tuple(map(_geometry_of, CACHES, given))
        if nested not in NESTED:
            raise ValueError(must_be("nested", either(NESTED), nested))
        self.c = made(list(self.geometries), nested == "split")

    def __dealloc__(self):
        release(self.c)

    @classmethod
    def small(cls, *, nested="combined"):
        """Caches of the size of a small SMMU: a TLB of 64 entries, few of the others.

        >>> from smmufast._engine.tlb import Caches
        >>> Caches.small().tlb.geometry
        Geometry(sets=16, ways=4, policy='lru', seed=0)
        """
        return cls(ste=(4, 2), cd=(4, 2), tlb=(16, 4), walk1=(4, 4), walk2=(4, 4), nested=nested)

    @classmethod
    def server(cls, *, nested="combined"):
        """Caches of the size of a server's SMMU: a TLB of 4096 entries.

        >>> from smmufast._engine.tlb import Caches
        >>> [cache.name for cache in (Caches.server().tlb, Caches.server().walk2)]
        ['tlb', 'walk2']
        """
        return cls(ste=(64, 4), cd=(64, 4), tlb=(1024, 4), walk1=(64, 4), walk2=(64, 4),
                   nested=nested)

    @property
    def ste(self):
        """The configuration cache of STEs, or None."""
        return view_of(self, CACHE_STE)

    @property
    def cd(self):
        """The configuration cache of CDs, or None."""
        return view_of(self, CACHE_CD)

    @property
    def tlb(self):
        """The TLB, or None."""
        return view_of(self, CACHE_TLB)

    @property
    def walk1(self):
        """The walk cache of stage 1, or None."""
        return view_of(self, CACHE_WALK1)

    @property
    def walk2(self):
        """The walk cache of stage 2, or None."""
        return view_of(self, CACHE_WALK2)

    @property
    def config_generation(self):
        """A number that changes whenever an STE or a CD is filled, evicted or invalidated."""
        return self.c.config_generation

    @property
    def tlb_generation(self):
        """A number that changes whenever a TLB entry is filled, evicted or invalidated."""
        return self.c.tlb_generation

    @property
    def nested(self):
        """How nested translations are kept: "combined" or "split"."""
        return NESTED[self.c.split]

    @property
    def nbytes(self):
        """Memory of all caches, in bytes."""
        cdef int number
        cdef uint64_t total = sizeof(CachesC) + (sizeof(uint32_t) << self.c.regions_lg2)
        for number in range(N_CACHES):
            total += cache_bytes(&self.c.cache[number])
        return total

    @property
    def counters(self):
        """The counters of every cache that there is, as a new dict of dicts: by cache, by name."""
        found = {}
        for name, *numbers in self.counters_array().tolist():
            found[name] = dict(zip(COUNTERS, numbers, strict=True))
        return found

    def counters_array(self):
        """Return the counters as a structured array with one row per cache that there is.

        Returns
        -------
        numpy.ndarray
            Fields "cache" (its name), "hits", "misses", "fills", "evictions", "replacements" and
            "invalidations", each as the attribute of Cache.
        """
        rows = []
        cdef int number
        cdef CacheC* c
        cdef Counters* n
        for number in range(N_CACHES):
            c = &self.c.cache[number]
            n = &c.counters
            if c.ways:
                rows.append((CACHES[number], cache_hits(c), n.misses, n.fills, n.evictions,
                             n.replacements, n.invalidations))
        return np.array(rows, COUNTERS_DTYPE)

    def reset_counters(self):
        """Set every counter to 0; entries and replacement state stay."""
        cdef int number
        mutex_have_gil(self.c.mutex)
        for number in range(N_CACHES):
            cache_reset_counters(&self.c.cache[number])
        mutex_drop(self.c.mutex)

    def invalidate_all(self):
        """Drop every entry of every cache, counted as invalidations.

        Returns
        -------
        int
            How many entries went.
        """
        cdef uint64_t gone
        mutex_have_gil(self.c.mutex)
        gone = caches_invalidate_all(self.c)
        mutex_drop(self.c.mutex)
        return gone

    def __len__(self):
        """Return the number of entries in all caches."""
        cdef int number
        cdef uint64_t total = 0
        for number in range(N_CACHES):
            total += self.c.cache[number].live
        return total

    def __bool__(self):
        return True

    def _repr_html_(self):
        from smmufast._html import caches
        return caches(self)

    def __repr__(self):
        views = (self.ste, self.cd, self.tlb, self.walk1, self.walk2)
        shown = []
        for view in views:
            if view is not None:
                geometry = view.geometry
                shown.append(f"{view.name} {len(view)}/{geometry.sets * geometry.ways}")
        return f"<Caches: {', '.join(shown) or 'none'}>"

    # --- TLB ---

    def lookup(self, address, *, kind="stage 1", world="NS_EL1", vmid=0, asid=0, aset=0):
        """Look an address up in the TLB; counts one hit or one miss.

        Parameters
        ----------
        address : int
            The input address, canonical in 64 bits; with kind="stage 2" an IPA.
        kind : {"stage 1", "stage 2", "combined"}
            The kind of entry that is wanted; other kinds do not answer.
        world : StreamWorld or str
            The translation regime.
        vmid, asid, aset : int
            Tags of the request, compared as far as the kind and the world have them.

        Returns
        -------
        TlbEntry or None
        """
        cdef int number = number_of("kind", kind, KINDS)
        cdef int regime = world_of(world)
        check_kind(number, regime)
        cdef uint16_t v = field("vmid", vmid, 0xFFFF)
        cdef uint16_t a = field("asid", asid, 0xFFFF)
        cdef uint64_t at = field("address", address, ~<uint64_t>0)
        cdef unsigned int set_ = <unsigned int>field("aset", aset, 1)
        cdef Entry* found
        cdef Entry copy
        mutex_have_gil(self.c.mutex)
        found = tlb_probe(self.c, number, regime, v, a, set_, at)
        if found != NULL:
            copy = found[0]
        mutex_drop(self.c.mutex)
        return None if found == NULL else entry_shown(&copy)

    def fill(self, entry, /):
        """Put a translation into the TLB; nothing happens without one.

        Entries that could answer one of its requests go: those of the same tags that cover one of
        its addresses, whatever their size. A global entry answers for every ASID.

        Parameters
        ----------
        entry : TlbEntry

        Raises
        ------
        TypeError, ValueError
            If it is no TlbEntry or one of its fields cannot be.
        """
        cdef Entry e
        read_entry(entry, &e)
        mutex_have_gil(self.c.mutex)
        tlb_fill(self.c, &e)
        mutex_drop(self.c.mutex)

    # --- walk caches ---

    def lookup_walk(self, address, *, kind="stage 1", world="NS_EL1", vmid=0, asid=0):
        """Look the deepest table of an address up in a walk cache; counts one hit or one miss.

        Parameters
        ----------
        address, kind, world, vmid, asid
            As for `lookup()`. The kind "stage 2" is looked up in `walk2`, others in `walk1`.

        Returns
        -------
        WalkEntry or None
        """
        cdef int number = number_of("kind", kind, KINDS)
        cdef int regime = world_of(world)
        check_kind(number, regime)
        cdef uint16_t v = field("vmid", vmid, 0xFFFF)
        cdef uint16_t a = field("asid", asid, 0xFFFF)
        cdef uint64_t at = field("address", address, ~<uint64_t>0)
        cdef Table* found
        cdef Table copy
        mutex_have_gil(self.c.mutex)
        found = walk_probe(self.c, number, regime, v, a, at)
        if found != NULL:
            copy = found[0]
        mutex_drop(self.c.mutex)
        return None if found == NULL else walk_entry_shown(&copy)

    def fill_walk(self, entry, /):
        """Put a table into the walk cache of its stage; nothing happens without one.

        Parameters
        ----------
        entry : WalkEntry

        Raises
        ------
        TypeError, ValueError
            If it is no WalkEntry or one of its fields cannot be.
        """
        cdef Table e
        read_walk_entry(entry, &e)
        mutex_have_gil(self.c.mutex)
        walk_fill(self.c, &e)
        mutex_drop(self.c.mutex)

    # --- configuration caches ---

    def lookup_ste(self, sid):
        """Look an STE up: its 64 bytes, or None; counts one hit or one miss."""
        cdef uint64_t[8] words
        cdef uint32_t stream = field("sid", sid, 0xFFFFFFFF)
        cdef uint32_t found
        mutex_have_gil(self.c.mutex)
        found = ste_probe(self.c, stream, words)
        mutex_drop(self.c.mutex)
        return record_shown(words) if found else None

    def fill_ste(self, sid, data):
        """Put an STE of 64 bytes into its cache."""
        cdef uint64_t[8] words
        cdef uint32_t stream = field("sid", sid, 0xFFFFFFFF)
        read_record("data", data, words)
        mutex_have_gil(self.c.mutex)
        ste_fill(self.c, stream, words)
        mutex_drop(self.c.mutex)

    def lookup_cd(self, sid, ssid=0):
        """Look a CD up: its 64 bytes, or None; counts one hit or one miss."""
        cdef uint64_t[8] words
        cdef uint32_t stream = field("sid", sid, 0xFFFFFFFF)
        cdef uint32_t index = field("ssid", ssid, 0xFFFFF)
        cdef uint32_t found
        mutex_have_gil(self.c.mutex)
        found = cd_probe(self.c, stream, index, words)
        mutex_drop(self.c.mutex)
        return record_shown(words) if found else None

    def fill_cd(self, sid, ssid, data):
        """Put a CD of 64 bytes into its cache."""
        cdef uint64_t[8] words
        cdef uint32_t stream = field("sid", sid, 0xFFFFFFFF)
        cdef uint32_t index = field("ssid", ssid, 0xFFFFF)
        read_record("data", data, words)
        mutex_have_gil(self.c.mutex)
        cd_fill(self.c, stream, index, words)
        mutex_drop(self.c.mutex)

    # --- commands ---

    def tlbi(self, op, *, vmid=0, asid=0, address=None, last=None, leaf=False, granule=0,
             level=0, vmid_mask=0xFFFF):
        """Invalidate as a TLBI command of the Non-secure queue does (IHI 0070, 4.4).

        Parameters
        ----------
        op : Opcode, int or str
            The command, such as "TLBI_NH_VA".
        vmid, asid : int
            For the commands that have them.
        address, last : int, optional
            For commands by address: the first and the last address, both included. Without
            `last` it is one address; without `address`, all.
        leaf : bool
            For commands by address: tables in walk caches stay.
        granule : int
            log2 of the granule (12, 14, 16); entries of another one stay. 0: of any.
        level : int
            1 to 3: translations of leaves at another level stay. 0: of any.
        vmid_mask : int
            The bits of VMIDs that are compared.

        Returns
        -------
        int
            How many entries went, of the TLB and of the walk caches.

        Raises
        ------
        TypeError, ValueError
            If `op` is no such command or an argument is out of its range.
        """
        cdef Invalidation inv
        cdef Filter f
        cdef uint64_t gone
        memset(&inv, 0, sizeof(Invalidation))
        inv.op = opcode_of(op)
        inv.vmid = field("vmid", vmid, 0xFFFF)
        inv.vmid_mask = field("vmid_mask", vmid_mask, 0xFFFF)
        inv.asid = field("asid", asid, 0xFFFF)
        inv.leaf = to_flag("leaf", leaf)
        inv.all_addresses = address is None
        if granule not in (0, 12, 14, 16):
            raise ValueError(must_be("granule", "12, 14, 16, or 0 for any", granule))
        inv.granule = granule
        inv.level = field("level", level, 3)
        if address is not None:
            inv.first = field("address", address, ~<uint64_t>0)
            inv.last = inv.first
            if last is not None:
                inv.last = field("last", last, ~<uint64_t>0)
                if inv.last < inv.first:
                    raise ValueError(must_be("last", f"{address:#x} (address) or more", last))
        elif last is not None:
            raise ValueError(must_be("last", "None without address", last))
        if not filter_of(&inv, &f):
            raise ValueError(must_be("op", "a TLBI command of the Non-secure queue", op))
        mutex_have_gil(self.c.mutex)
        gone = tlbi(self.c, &inv)
        mutex_drop(self.c.mutex)
        return gone

    def cfgi(self, op, *, sid=0, ssid=0, leaf=False, range=31):
        """Invalidate as a CFGI command does (IHI 0070, 4.3).

        Parameters
        ----------
        op : Opcode, int or str
            "CFGI_STE", "CFGI_STE_RANGE", "CFGI_ALL", "CFGI_CD" or "CFGI_CD_ALL".
        sid, ssid : int
            For the commands that have them.
        leaf : bool
            Makes no difference: descriptors of level 1 are not cached.
        range : int
            Of CFGI_STE_RANGE: 2**(range + 1) aligned StreamIDs; 31 are all, as for CFGI_ALL,
            which is the same opcode.

        Returns
        -------
        int
            How many entries went.

        Raises
        ------
        TypeError, ValueError
            If `op` is no such command or an argument is out of its range.
        """
        cdef int number = opcode_of(op)
        cdef uint32_t stream = field("sid", sid, 0xFFFFFFFF)
        cdef uint32_t index = field("ssid", ssid, 0xFFFFF)
        cdef unsigned int lg2_count = <unsigned int>field("range", range, 31) + 1
        cdef bint only_leaf = to_flag("leaf", leaf)
        cdef uint64_t gone
        if number not in (CMD_CFGI_STE, CMD_CFGI_STE_RANGE, CMD_CFGI_CD, CMD_CFGI_CD_ALL):
            raise ValueError(must_be("op", "a CFGI command of STEs or CDs", op))
        mutex_have_gil(self.c.mutex)
        if number == CMD_CFGI_STE:
            gone = cfgi_ste(self.c, stream, only_leaf)
        elif number == CMD_CFGI_STE_RANGE:
            gone = cfgi_range(self.c, stream, lg2_count)
        elif number == CMD_CFGI_CD:
            gone = cfgi_cd(self.c, stream, index, only_leaf)
        else:
            gone = cfgi_cd_all(self.c, stream)
        mutex_drop(self.c.mutex)
        return gone

    # --- copies ---

    def copy(self):
        """Return independent caches in the same state."""
        other = _restored(*self.geometries, self.nested)
        other.__setstate__(self.__getstate__())
        return other

    def __getstate__(self):
        """Return everything but the geometry, as bytes; equal states behave alike."""
        return self._contents()

    cdef bytes _contents(self):
        cdef uint64_t size = 0
        cdef char* state
        mutex_have_gil(self.c.mutex)
        try:
            state = state_of(self.c, &size)
        finally:
            mutex_drop(self.c.mutex)
        try:
            return PyBytes_FromStringAndSize(state, <Py_ssize_t>size)
        finally:
            free(state)

    def __setstate__(self, state):
        """Take the state of caches of the same geometry.

        Raises
        ------
        ValueError, TypeError
            If it is no such state; nothing is changed.
        RuntimeError
            If an Smmu has these caches: it may be using them.
        """
        cdef Reader reader
        cdef CachesC* c
        cdef CachesC old
        if self.taken:
            raise RuntimeError("caches: an Smmu has them; only its commands change them")
        if type(state) is not bytes:
            raise TypeError(must_be("state", "bytes", type(state)))
        reader.data = PyBytes_AS_STRING(state)
        reader.left = len(state)
        c = made(list(self.geometries), self.c.split)
        try:
            take_state(c, &reader)
            # the struct stays where it is: others hold its address
            old = self.c[0]
            self.c[0] = c[0]
            c[0] = old
            c.mutex, self.c.mutex = self.c.mutex, c.mutex  # which somebody may be waiting for
        finally:
            release(c)

    def __reduce__(self):
        return _restored, (*self.geometries, self.nested), self.__getstate__()
