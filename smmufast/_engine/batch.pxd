"""The batch paths: many requests, columns in and out, without the global lock.

Blocks of requests: the upper levels of all are walked before the first leaf is read, over the
rules of translate.pxd.  What faults, what needs stage 2 or a hardware update, and everything
through caches or memory that is not plain, goes one by one through the scalar path.
"""

from libc.stdint cimport uint64_t

from smmufast._facts.bits cimport noinline, likely, low_mask, unlikely
from smmufast._engine.cache cimport POLICY_LRU, POLICY_PLRU, CacheC, plru_touch
from smmufast._engine.cached cimport UNDECODED
from smmufast._rules.config cimport STAGE1_BYPASS
from smmufast._engine.core cimport Core
from smmufast._facts.layout cimport cr0_smmuen
from smmufast._engine.memory cimport Port
from smmufast._engine.probe cimport Hits, each_hit, vector_fits, vector_hits
from smmufast._engine.tlb cimport (
    CACHE_CD, CACHE_STE, CACHE_TLB, CachesC, Entry, config_touch, tlb_find_key, tlb_key,
    tlb_probe_sizes,
)
from smmufast._rules.scope cimport KIND_COMBINED, KIND_S1, KIND_S2
from smmufast._engine.lookup cimport Memo
from smmufast._engine.translate cimport usable
from smmufast._facts.hw cimport Hw
from smmufast._facts.types cimport ACTION_OK, BatchC, ColumnC, Context, Half
from smmufast._rules.vmsa cimport half_of
from smmufast._engine.vector cimport vector_on
from smmufast._engine.batch_block cimport (
    REST_MAX, REST_MIN, STREAK, ByOne, batch_scalar, load_u32, load_u64, load_u8, store_u64,
    store_u8,
)
from smmufast._engine.batch_nested cimport wants_more


# --- through caches ---

# A run of requests of one pair whose configuration stays cached, in one half.
cdef struct Lane:
    Hits hits              # what the loops over hits ask for
    uint64_t told          # the TLB's clock when the caches were last told of hits
    uint64_t key           # TLB tag
    unsigned int kind
    unsigned int upper     # which half
    size_t next            # row from which on vectors are tried again
    size_t gap             # rows until then


cdef inline void lane_flush(Lane* lane, CachesC* c, const Memo* memo) noexcept nogil:
    """Tell the caches of the lookups since they were told last."""
    if lane.hits.clock != lane.told:
        config_touch(c, memo.ste_handle, memo.cd_handle, lane.hits.clock - lane.told)
        c.cache[CACHE_TLB].clock = lane.told = lane.hits.clock


cdef inline void lane_set(
        Lane* lane, const Hw* hw, CachesC* c, const Memo* memo, unsigned int upper) noexcept nogil:
    """The half of an address, or stage 2 alone, as the loops over hits ask for it."""
    cdef const Context* context = &memo.context
    cdef const Half* half = &context.half[upper]
    cdef const CacheC* cache = &c.cache[CACHE_TLB]
    cdef Hits* hits = &lane.hits
    lane.upper = upper
    lane.kind = KIND_S1
    hits.fixed = half.range_mask
    if memo.index == STAGE1_BYPASS:
        half = &context.second.half
        lane.kind = KIND_S2
        hits.fixed = half.range_mask | hw.oas_over
    elif context.second.on:
        lane.kind = KIND_COMBINED
    hits.bits = hits.fixed if upper else 0
    # a half without tables, and one that only the privileged may use, are not for these loops
    if not half.enabled or not half.unprivileged:
        hits.fixed = 0
        hits.bits = 1
    hits.within = half.index_mask
    hits.sign = (0 - <uint64_t>upper) & ~half.index_mask
    lane.key = tlb_key(
        c, lane.kind, context.world, context.vmid, context.asid, context.aset)
    hits.lg2 = c.tlb_sizes[lane.kind].lone
    hits.sized = lane.key | c.tlb_sizes[lane.kind].lone_key
    hits.set_mask = cache.set_mask
    hits.prints = cache.prints
    hits.entries = <Entry*>cache.entries
    hits.order = NULL
    hits.path = cache.path if cache.policy == POLICY_PLRU else NULL
    if cache.policy == POLICY_LRU or cache.policy == POLICY_PLRU:
        hits.order = cache.order
    hits.need = &context.need[0]
    hits.sid = memo.sid
    hits.ssid = memo.ssid
    hits.access = 7
    hits.clock = lane.told = cache.clock


cdef inline bint lane_knows(
        const Memo* memo, const Hw* hw, const CachesC* c, const Port* port) noexcept nogil:
    """Every request of this pair meets this configuration.

    It is cached; or, where there is no such cache, it was read from plain memory, which was not
    written since.  A CD that stage 2 leads to goes through the other caches each time.
    """
    cdef bint read = port.ram.plain and not port.wrote
    if memo.hw_generation != hw.generation or memo.config_generation != c.config_generation:
        return False
    if not (memo.ste_handle or (read and c.cache[CACHE_STE].ways == 0)):
        return False
    return (memo.index == STAGE1_BYPASS or memo.cd_handle
            or (read and c.cache[CACHE_CD].ways == 0 and not memo.context.second.on))


cdef inline bint lane_takes(const Memo* memo, const CachesC* c) noexcept nogil:
    """Requests of this pair are looked up in the TLB once."""
    if memo.index == STAGE1_BYPASS:
        return memo.context.second.on
    return not (memo.context.second.on and c.split)


cdef inline size_t lane_hits(
        Lane* lane, const BatchC* batch, size_t i, bint vector) noexcept nogil:
    """The first row, from i on, that does not simply hit.

    Vectors stop at eight rows of which one does not.  Then they rest, the longer the less they do.
    """
    cdef size_t n = batch.n, from_row
    if not vector:
        return each_hit(&lane.hits, batch, i, n)
    while True:
        if i >= lane.next:
            from_row = i
            i = vector_hits(&lane.hits, batch, i, n)
            if i != from_row:
                lane.gap = REST_MIN
            elif lane.gap < REST_MAX:
                lane.gap *= 2
            lane.next = i + lane.gap
        n = lane.next if lane.next < batch.n else batch.n
        i = each_hit(&lane.hits, batch, i, n)
        if i != n or n == batch.n:
            return i
        n = batch.n


cdef inline int run_hits(
        Core* core, Port* port, const BatchC* batch, bint more, bint alike) noexcept nogil:
    """Translate a batch through caches, in order.  `alike`: but for addresses all rows are."""
    cdef const Hw* hw = &core.hw
    cdef CachesC* c = core.caches
    cdef CacheC* tlb = &c.cache[CACHE_TLB]
    cdef ByOne scalar = <ByOne>noinline(<void*>batch_scalar)
    cdef Memo memo
    cdef Lane lane
    cdef const Context* context = &memo.context
    cdef Entry* e
    # copies, so that the compiler sees that no store changes them
    cdef ColumnC iovas = batch.iova, pas = batch.pa, actions = batch.action, events = batch.event
    cdef size_t i = 0, n = batch.n
    cdef uint64_t va, address
    cdef unsigned int access = 0, upper, streak = 0
    cdef bint takes = False, vector = vector_on and vector_fits(batch)
    cdef int status
    memo.whole = False
    memo.sid = memo.ssid = 0
    memo.hw_generation = 0
    memo.config_generation = UNDECODED
    lane.hits.clock = lane.told = 0
    lane.next = 0
    lane.gap = REST_MIN
    while i < n:
        if streak == STREAK:
            i = lane_hits(&lane, batch, i, vector)
            streak = 0
            if i == n:
                break
        va = load_u64(&iovas, i)
        if likely(takes) and (alike or (memo.sid == load_u32(&batch.sid, i)
                                        and memo.ssid == load_u32(&batch.ssid, i))):
            if unlikely(va & lane.hits.fixed != lane.hits.bits):
                upper = half_of(va, context.two_ttbs)
                if upper != lane.upper:
                    lane_flush(&lane, c, &memo)
                    lane_set(&lane, hw, c, &memo, upper)
            if likely(va & lane.hits.fixed == lane.hits.bits):
                address = va & lane.hits.within | lane.hits.sign
                e = tlb_find_key(c, lane.kind, lane.key, address)
                if likely(e != NULL):
                    streak += 1
                else:
                    streak = 0
                    e = tlb_probe_sizes(c, lane.kind, lane.key, address, True)
                if not alike:
                    access = load_u8(&batch.access, i) & 7
                if (likely(e != NULL) and likely(e.perm1 & e.perm2 & context.need[access])
                        and likely(usable(e, access))):
                    lane.hits.clock += 1
                    if likely(tlb.policy == POLICY_LRU):
                        tlb.order[e - lane.hits.entries] = lane.hits.clock
                    elif tlb.policy == POLICY_PLRU:
                        plru_touch(tlb, e - lane.hits.entries)
                    store_u64(&pas, i, e.address | va & low_mask(e.lg2))
                    store_u8(&actions, i, ACTION_OK)
                    store_u8(&events, i, 0)
                    i += 1
                    continue
        streak = 0
        lane_flush(&lane, c, &memo)
        port.wrote = False
        status = scalar(core, port, &memo, batch, i)
        if status:
            return status
        i += 1
        takes = (not more and cr0_smmuen(hw.cr0) and lane_knows(&memo, hw, c, port)
                 and lane_takes(&memo, c))
        if takes:
            lane_set(&lane, hw, c, &memo, half_of(va, context.two_ttbs))
            access = load_u8(&batch.access, 0) & 7
    lane_flush(&lane, c, &memo)
    return 0


cdef inline int translate_hits(Core* core, Port* port, const BatchC* batch) noexcept nogil:
    """Translate a batch through caches, in order.

    What hits the TLB and is permitted is done in loops of its own, as translate_cached would;
    the rest is done there.  Columns but pa, action and event are left to it as well.
    """
    cdef bint more = wants_more(batch)
    if batch.sid.stride == 0 and batch.ssid.stride == 0 and batch.access.stride == 0:
        return run_hits(core, port, batch, more, True)
    return run_hits(core, port, batch, more, False)
