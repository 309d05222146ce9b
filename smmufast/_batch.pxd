"""The batch drivers: many requests, columns in and out, without the global lock.

Blocks of requests: the upper levels of all are walked before the first leaf is read, over the
rules of _translate.pxd.  What faults, what needs stage 2 or a hardware update, and everything
through caches or memory that is not plain, goes one by one through the scalar driver.
"""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from smmufast._bits cimport apart, le64, likely, load64, low_mask, prefetch, unlikely
from smmufast._cache cimport (
    POLICY_LRU, POLICY_PLRU, CacheC, ctz64, match4, plru_touch, print_of,
)
from smmufast._cached cimport deliver, translate_request, usable
from smmufast._config cimport STAGE1_BYPASS, admitted
from smmufast._core cimport Core
from smmufast._layout cimport cr0_smmuen
from smmufast._memory cimport FETCH_OK, Port, fetch8
from smmufast._tlb cimport (
    CACHE_TLB, KIND_COMBINED, KIND_S1, KIND_S2, CachesC, Entry, config_touch,
    tlb_key, tlb_probe_sizes,
)
from smmufast._translate cimport (
    AT_OTHER, AT_PAGES, Descent, Memo, Syndrome, descend, descriptor, leaf_perm, level_of, lookup,
    translate_known,
)
from smmufast._types cimport (
    ACCESS_WRITE, ACTION_OK, FETCH_TT, BatchC, ColumnC, Context, Half, Hw, Outcome, Request,
)
from smmufast._vmsa cimport (
    DESC_LEAF, clean_s1, descriptor_kind, entry_address, half_of, in_range, leaf_address, leaf_sh,
    mair_byte, shareability, stage1_attr,
)


cdef enum:
    BLOCK = 32   # requests whose upper levels are walked before the first leaf is read
    SLOTS = 64   # contexts decoded at a time


# A decoded context, kept inside one call, and what follows from it for every request.
cdef struct Slot:
    uint32_t sid
    uint32_t ssid
    uint64_t block            # the last block that uses it, counted from 1; 0: never
    bint walks                # lookup succeeded and stage 1 translates
    Memo memo


# A block of requests between the two passes over it.
cdef struct Block:
    const uint8_t* entry[BLOCK]  # where the leaf lies; NULL: the scalar driver does it
    uint64_t[BLOCK] held         # leaves already read, as they lie in memory
    uint64_t[BLOCK] tables       # hierarchical attributes
    uint8_t[BLOCK] shift         # lg2 of the page
    uint8_t[BLOCK] upper         # the half, as it was when the request was first read
    Slot* slot[BLOCK]            # unless all requests are of one pair
    bint[BLOCK] other            # likewise: slot is not that of the request


# The last two tables of the previous walk: [0] of pages, [1] the one above.
cdef struct Near:
    Slot* slot                # NULL: none
    uint64_t[2] tag           # address bits above the table's reach
    uint64_t[2] table
    uint64_t[2] tables        # hierarchical attributes of the tables above it
    unsigned int[2] reach
    unsigned int moved        # walks of this block that ended in another last table
    bint trusted              # few of the last block did, so [0] is asked first


cdef inline void near_forget(Near* near) noexcept nogil:
    near.slot = NULL
    near.reach[0] = near.reach[1] = 1
    near.tag[0] = near.tag[1] = ~<uint64_t>0  # no address has it
    near.table[0] = near.table[1] = near.tables[0] = near.tables[1] = 0


cdef inline uint32_t load_u32(const ColumnC* column, size_t i) noexcept nogil:
    cdef uint32_t value
    memcpy(&value, <const char*>column.data + <ptrdiff_t>i * column.stride, 4)
    return value


cdef inline uint64_t load_u64(const ColumnC* column, size_t i) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, <const char*>column.data + <ptrdiff_t>i * column.stride, 8)
    return value


cdef inline uint8_t load_u8(const ColumnC* column, size_t i) noexcept nogil:
    return (<const uint8_t*>column.data + <ptrdiff_t>i * column.stride)[0]


cdef inline void store_u8(const ColumnC* column, size_t i, unsigned int value) noexcept nogil:
    if column.data != NULL:
        (<uint8_t*>column.data + <ptrdiff_t>i * column.stride)[0] = <uint8_t>value


cdef inline void store_u64(const ColumnC* column, size_t i, uint64_t value) noexcept nogil:
    if column.data != NULL:
        memcpy(<char*>column.data + <ptrdiff_t>i * column.stride, &value, 8)


cdef inline void store_record(
        const ColumnC* column, size_t i, const uint64_t* record) noexcept nogil:
    """The record as it lies in memory, or zeros."""
    cdef uint64_t[4] w
    cdef int k
    if column.data != NULL:
        for k in range(4):
            w[k] = le64(record[k]) if record != NULL else 0
        memcpy(<char*>column.data + <ptrdiff_t>i * column.stride, w, 32)


cdef inline void store_outcome(const BatchC* batch, size_t i, const Outcome* o) noexcept nogil:
    store_u64(&batch.pa, i, o.pa)
    store_u8(&batch.action, i, o.action)
    store_u8(&batch.event, i, o.event)
    store_u8(&batch.fault, i, o.fault)
    store_u8(&batch.perm, i, o.perm)
    store_u8(&batch.level, i, <uint8_t>o.level)
    store_u8(&batch.page_lg2, i, o.page_lg2)
    store_u8(&batch.attr, i, o.attr)
    store_u8(&batch.sh, i, o.sh)
    store_u64(&batch.ipa, i, o.ipa)
    store_u8(&batch.stage, i, o.stage)
    store_record(&batch.record, i, <const uint64_t*>o.record if o.event else NULL)


cdef inline void request_at(const BatchC* batch, size_t i, Request* request) noexcept nogil:
    request.iova = load_u64(&batch.iova, i)
    request.sid = load_u32(&batch.sid, i)
    request.ssid = load_u32(&batch.ssid, i)
    request.access = load_u8(&batch.access, i) & 7  # a caller may write there meanwhile
    request.reserved = 0


cdef inline int batch_scalar(
        Core* core, Port* port, Memo* memo, const BatchC* batch, size_t i) noexcept nogil:
    """One request of a batch by the scalar driver."""
    cdef Request request
    cdef Outcome outcome
    cdef int status
    request_at(batch, i, &request)
    status = translate_request(core, port, &request, memo, &outcome)
    if status == 0:
        store_outcome(batch, i, &outcome)
    return status


cdef inline int batch_known(
        Core* core, Port* port, Memo* memo, const BatchC* batch, size_t i) noexcept nogil:
    """One request of a batch by the scalar driver, in the context that its block decoded."""
    cdef Request request
    cdef Outcome outcome
    cdef int status
    request_at(batch, i, &request)
    request.sid = memo.sid
    request.ssid = memo.ssid
    status = translate_known(&core.hw, port, &request, memo, &outcome)
    status = deliver(core, port, &request, status, &outcome)
    if status == 0:
        store_outcome(batch, i, &outcome)
    return status


ctypedef int (*ByOne)(Core*, Port*, Memo*, const BatchC*, size_t) noexcept nogil


cdef inline Slot* slot_of(
        const Hw* hw, Port* port, Slot* slots, uint32_t sid, uint32_t ssid, uint64_t since,
        uint64_t block, Near* near) noexcept nogil:
    """The decoded context of a pair; it is decoded once for as long as it keeps its slot.

    NULL when the slot is taken by another pair of the same block.  What was decoded before the
    block `since` counts no longer.
    """
    cdef uint32_t hashed = (sid * 0x9E3779B1U) ^ ((ssid + 1) * 0x85EBCA6BU)
    cdef Slot* slot = &slots[(hashed >> 16) % SLOTS]
    cdef Syndrome syndrome
    if not (slot.block >= since and slot.sid == sid and slot.ssid == ssid):
        if slot.block == block:
            return NULL
        near_forget(near)
        slot.sid = sid
        slot.ssid = ssid
        slot.memo.whole = False
        # ahead of its turn it updates nothing; a request through stage 2 looks it up in its turn
        port.dry = True
        slot.walks = (
            cr0_smmuen(hw.cr0)
            and lookup(hw, port, sid, ssid, &slot.memo, &syndrome) == 0
            and slot.memo.index != STAGE1_BYPASS and not slot.memo.context.second.on
        )
        port.dry = False
        if slot.memo.context.second.on:
            slot.memo.whole = False
    slot.block = block
    return slot


cdef inline void near_keep(
        Near* near, Slot* slot, const Half* half, uint64_t va, const Descent* at) noexcept nogil:
    """Remember the last two tables of a walk, unless they are the first.

    Addresses in a table's reach are in the range of the half then, for the table above it
    indexes bits beyond the reach.
    """
    cdef unsigned int reach = half.granule + half.stride
    if reach > half.shift:
        return
    near.moved += va >> reach != near.tag[0]
    near.slot = slot
    near.reach[0] = reach
    near.tag[0] = va >> reach
    near.table[0] = at.table
    near.tables[0] = at.tables
    reach += half.stride
    if at.above and reach <= half.shift:
        near.reach[1] = reach
        near.tag[1] = va >> reach
        near.table[1] = at.above
        near.tables[1] = at.tables_above


cdef inline void set_out(
        Block* block, size_t i, Port* port, Slot* slot, uint64_t va, Near* near, bint one_pair,
        bint simple) noexcept nogil:
    """First pass: walk down to the last table and ask for its entry.

    Whatever is not an ordinary walk is left to the scalar driver.  `simple` is
    context.simple.
    """
    cdef const Context* context = &slot.memo.context
    cdef unsigned int upper = half_of(va, context.two_ttbs)
    cdef const Half* half = &context.half[upper]
    cdef Descent at
    cdef uint64_t ia, offset, raw = 0
    cdef int status
    block.entry[i] = NULL
    block.upper[i] = upper
    if not one_pair and near.slot != slot:
        near_forget(near)
    if near.trusted and va >> near.reach[0] == near.tag[0]:
        ia = va
        at.table = near.table[0]
        at.tables = near.tables[0]
        at.shift = half.granule
    else:
        if va >> near.reach[1] == near.tag[1]:
            ia = va
            at.table = near.table[1]
            at.tables = near.tables[1]
            at.shift = half.granule + half.stride
        else:
            if not half.enabled or not in_range(va, half.range_mask, upper):
                return
            ia = va & half.index_mask
            at.table = half.table
            at.tables = 0
            at.shift = half.shift
        status = descend(half, port, FETCH_TT, ia, &at, simple)
        if unlikely(status != AT_PAGES):
            if status == AT_OTHER and descriptor_kind(
                    descriptor(half, at.raw, simple), level_of(half, at.shift),
                    half.blocks) == DESC_LEAF:
                block.tables[i] = at.tables & half.keep
                block.shift[i] = at.shift
                block.held[i] = at.raw
                block.entry[i] = <const uint8_t*>&block.held[i]
            return
        near_keep(near, slot, half, va, &at)
    block.tables[i] = at.tables & half.keep
    block.shift[i] = at.shift
    at.address = entry_address(half, at.table, ia, at.shift)
    offset = at.address - port.window.base
    if likely(offset <= port.window.span):
        block.entry[i] = port.window.data + offset
        prefetch(block.entry[i])
    elif fetch8(port, FETCH_TT, 3, at.address, &raw) == FETCH_OK:
        block.held[i] = le64(raw)
        block.entry[i] = <const uint8_t*>&block.held[i]


cdef inline int arrive(
        Block* block, size_t i, Slot* slot, uint64_t va, unsigned int access,
        const BatchC* batch, size_t row, bint more, bint simple) noexcept nogil:
    """Second pass: read the leaf and write the columns.

    0, or 1 when the request is left to the scalar driver.  `more`: columns other than pa,
    action and event are wanted.
    """
    cdef const Context* context = &slot.memo.context
    cdef const Half* half
    cdef unsigned int upper, shift, perm, attr
    cdef uint64_t d, address
    if unlikely(block.entry[i] == NULL):
        return 1
    upper = block.upper[i]
    half = &context.half[upper]
    shift = block.shift[i]
    d = descriptor(half, load64(block.entry[i]), simple)
    # a page's bit 1 is set; a block's is not, as was checked when it was read
    if unlikely(((d | <uint64_t>(shift != half.granule) << 1) ^ 0x403) & half.leaf_bits):
        return 1
    address = leaf_address(d, half, shift) if not simple else (
        d & half.low_address & ~low_mask(shift))
    if not simple and address & half.over:
        return 1
    perm = leaf_perm(context, upper, d, block.tables[i], simple)
    if unlikely(not perm & context.need[access]):
        return 1
    if not simple and context.hd and access & ACCESS_WRITE and clean_s1(d):
        return 1  # to be marked dirty
    store_u64(&batch.pa, row, address | (va & low_mask(shift)))
    store_u8(&batch.action, row, ACTION_OK)
    store_u8(&batch.event, row, 0)
    if more:
        store_u8(&batch.fault, row, 0)
        store_u8(&batch.perm, row, admitted(context, perm))
        store_u8(&batch.level, row, level_of(half, shift))
        store_u8(&batch.page_lg2, row, shift)
        if batch.attr.data != NULL or batch.sh.data != NULL:
            attr = stage1_attr(context.attr, mair_byte(context.mair, d))
            store_u8(&batch.attr, row, attr)
            store_u8(&batch.sh, row, shareability(attr, leaf_sh(d, half)))
        store_u64(&batch.ipa, row, 0)
        store_u8(&batch.stage, row, 1)
        store_record(&batch.record, row, NULL)
    return 0


cdef inline int run_blocks(
        Core* core, Port* port, const BatchC* batch, Slot* slots, bint one_pair,
        bint more) noexcept nogil:
    """Both passes over every block.  `one_pair`: all requests have one sid and one ssid."""
    cdef const Hw* hw = &core.hw
    cdef Block block
    cdef Near near
    cdef Memo memo
    cdef Slot* slot = NULL
    cdef size_t start = 0, i, count
    cdef size_t most = BLOCK  # requests of a block
    cdef uint64_t number = 1, since = 1
    cdef uint64_t va
    cdef uint32_t sid, ssid
    cdef unsigned int access
    cdef bint simple = False
    cdef int status
    cdef ByOne scalar = <ByOne>apart(<void*>batch_scalar)
    cdef ByOne known = <ByOne>apart(<void*>batch_known)
    memo.whole = False
    near_forget(&near)
    near.moved = 0
    near.trusted = False
    port.wrote = True
    while start < batch.n:
        if unlikely(port.wrote):
            # contexts may have changed, and the rest of a block that was set out
            port.wrote = False
            near_forget(&near)
            slot = NULL
            since = number
            if one_pair:
                slot = slot_of(hw, port, slots, load_u32(&batch.sid, 0),
                               load_u32(&batch.ssid, 0), since, number, &near)
                simple = slot.memo.context.simple
        count = batch.n - start
        if count > most:
            count = most
        for i in range(count):
            if not one_pair:
                sid = load_u32(&batch.sid, start + i)
                ssid = load_u32(&batch.ssid, start + i)
                if (slot == NULL or slot.sid != sid or slot.ssid != ssid
                        or slot.block != number):
                    slot = slot_of(hw, port, slots, sid, ssid, since, number, &near)
                block.other[i] = slot == NULL
                block.slot[i] = &slots[0] if slot == NULL else slot
                simple = block.slot[i].memo.context.simple
            if not one_pair and slot == NULL or not slot.walks:
                block.entry[i] = NULL
                continue
            va = load_u64(&batch.iova, start + i)
            if likely(simple):
                set_out(&block, i, port, slot, va, &near, one_pair, True)
            else:
                set_out(&block, i, port, slot, va, &near, one_pair, False)
        # a test that half the requests pass costs more than the walk that it saves
        near.trusted = near.moved <= BLOCK // 8
        near.moved = 0
        for i in range(count):
            va = load_u64(&batch.iova, start + i)
            access = load_u8(&batch.access, start + i) & 7
            if not one_pair:
                slot = block.slot[i]
                simple = slot.memo.context.simple
            if likely(simple):
                status = arrive(&block, i, slot, va, access, batch, start + i, more, True)
            else:
                status = arrive(&block, i, slot, va, access, batch, start + i, more, False)
            if unlikely(status):
                if not one_pair and block.other[i]:
                    status = scalar(core, port, &memo, batch, start + i)
                elif slot.memo.whole:
                    status = known(core, port, &slot.memo, batch, start + i)
                else:
                    status = scalar(core, port, &slot.memo, batch, start + i)
                if status:
                    return status
                if port.wrote:
                    count = i + 1
                    break
        start += count
        number += 1
        # where memory is written often, fewer requests are set out in vain
        if port.wrote:
            most = (count + 1) // 2
        elif most < BLOCK:
            most = BLOCK if most > BLOCK // 2 else 2 * most
    return 0


cdef inline bint wants_more(const BatchC* batch) noexcept nogil:
    """Columns other than pa, action and event are wanted."""
    return (
        batch.fault.data != NULL or batch.perm.data != NULL or batch.level.data != NULL
        or batch.page_lg2.data != NULL or batch.attr.data != NULL or batch.sh.data != NULL
        or batch.ipa.data != NULL or batch.stage.data != NULL or batch.record.data != NULL
    )


cdef inline int translate_plain(
        Core* core, Port* port, const BatchC* batch) noexcept nogil:
    """Translate a batch of at least one request, in plain memory and with SMMUEN=1."""
    cdef Slot[SLOTS] slots
    cdef int k
    cdef bint one_pair = batch.sid.stride == 0 and batch.ssid.stride == 0
    cdef bint more = wants_more(batch)
    for k in range(SLOTS):
        slots[k].block = 0
        slots[k].memo.context.simple = False
    if one_pair and not more:
        return run_blocks(core, port, batch, slots, True, False)
    return run_blocks(core, port, batch, slots, one_pair, more)


cdef inline int translate_each(
        Core* core, Port* port, const BatchC* batch) noexcept nogil:
    """Translate a batch one by one: memory that is not plain sees the requests in their order."""
    cdef Memo memo
    cdef size_t i
    cdef int status
    memo.whole = False
    for i in range(batch.n):
        status = batch_scalar(core, port, &memo, batch, i)
        if status:
            return status
    return 0


# --- through caches ---

# A run of requests of one pair whose configuration stays cached, in one half; and the TLB as this
# loop has it at hand.
cdef struct Lane:
    uint64_t clock         # the TLB's own, while the loop goes on
    uint64_t told          # what it was when the caches were last told of hits
    uint64_t key           # TLB tag
    uint64_t sized         # the same for pages of 2^lg2 bytes
    uint64_t fixed         # address bits that say whether an address is in range
    uint64_t bits          # what they are then
    uint64_t within        # address bits that are translated
    uint64_t sign          # the others, in the TLB
    uint64_t set_mask
    const uint32_t* prints
    Entry* entries
    uint64_t* order        # LRU's; NULL: another policy
    unsigned int kind
    unsigned int upper     # which half
    unsigned int lg2       # of all pages in the TLB; 0: they differ, or there are not four ways


cdef inline void lane_flush(Lane* lane, CachesC* c, const Memo* memo) noexcept nogil:
    """Tell the caches of the lookups since they were told last."""
    if lane.clock != lane.told:
        config_touch(c, memo.ste_handle, memo.cd_handle, lane.clock - lane.told)
        c.cache[CACHE_TLB].clock = lane.told = lane.clock


cdef inline void lane_set(
        Lane* lane, const Hw* hw, CachesC* c, const Memo* memo, unsigned int upper) noexcept nogil:
    """The half of an address, or stage 2 alone, as the loop over hits asks for it."""
    cdef const Context* context = &memo.context
    cdef const Half* half = &context.half[upper]
    cdef const CacheC* cache = &c.cache[CACHE_TLB]
    lane.upper = upper
    lane.kind = KIND_S1
    lane.fixed = half.range_mask
    if memo.index == STAGE1_BYPASS:
        half = &context.second.half
        lane.kind = KIND_S2
        lane.fixed = half.range_mask | hw.oas_over
    elif context.second.on:
        lane.kind = KIND_COMBINED
    lane.bits = lane.fixed if upper else 0
    # a half without tables, and one that only the privileged may use, are not for this loop
    if not half.enabled or not half.unprivileged:
        lane.fixed = 0
        lane.bits = 1
    lane.within = half.index_mask
    lane.sign = (0 - <uint64_t>upper) & ~half.index_mask
    lane.key = tlb_key(
        c, lane.kind, context.world, context.vmid, context.asid, context.aset)
    lane.lg2 = c.tlb_sizes[lane.kind].lone
    lane.sized = lane.key | c.tlb_sizes[lane.kind].lone_key
    lane.set_mask = cache.set_mask
    lane.prints = cache.prints
    lane.entries = <Entry*>cache.entries
    lane.order = cache.order if cache.policy == POLICY_LRU else NULL
    lane.clock = lane.told = cache.clock


cdef inline bint lane_takes(const Memo* memo, const CachesC* c) noexcept nogil:
    """Requests of this pair are looked up in the TLB once."""
    return memo.whole and (
        memo.index != STAGE1_BYPASS and not (memo.context.second.on and c.split)
        or memo.index == STAGE1_BYPASS and memo.context.second.on)


ctypedef Entry* (*ProbeSizes)(CachesC*, unsigned int, uint64_t, uint64_t, bint) noexcept nogil


cdef inline Entry* lane_find(const Lane* lane, CachesC* c, uint64_t address) noexcept nogil:
    """As tlb_probe_key(), of which nothing is counted."""
    cdef uint64_t page, slot, found
    cdef Entry* e
    if likely(lane.lg2 != 0):
        page = address >> lane.lg2
        slot = (page & lane.set_mask) * 4
        found = match4(&lane.prints[slot], print_of(page, lane.sized))
        if likely(found != 0):
            e = &lane.entries[slot + ctz64(found)]
            if likely(((e.page ^ page) | (e.key ^ lane.sized)) == 0):
                return e
    return (<ProbeSizes>apart(<void*>tlb_probe_sizes))(c, lane.kind, lane.key, address, True)


cdef inline int run_hits(
        Core* core, Port* port, const BatchC* batch, bint more, bint alike) noexcept nogil:
    """Translate a batch through caches, in order.  `alike`: but for addresses all rows are."""
    cdef const Hw* hw = &core.hw
    cdef CachesC* c = core.caches
    cdef ByOne scalar = <ByOne>apart(<void*>batch_scalar)
    cdef Memo memo
    cdef Lane lane
    cdef const Context* context = &memo.context
    cdef Entry* e
    # copies, so that the compiler sees that no store changes them
    cdef ColumnC iovas = batch.iova, pas = batch.pa, actions = batch.action, events = batch.event
    cdef size_t i, n = batch.n
    cdef uint64_t va, address
    cdef uint32_t sid = 0, ssid = 0
    cdef unsigned int access = 0, need = 0, upper
    cdef bint takes = False
    cdef int status
    memo.whole = False
    memo.sid = memo.ssid = 0
    memo.edition = memo.generation = 0
    lane.clock = lane.told = 0
    lane.fixed = 0
    lane.bits = 1
    lane.upper = 0
    for i in range(n):
        if not alike:
            sid = load_u32(&batch.sid, i)
            ssid = load_u32(&batch.ssid, i)
            access = load_u8(&batch.access, i) & 7
        va = load_u64(&iovas, i)
        if likely(takes) and (alike or likely(memo.sid == sid and memo.ssid == ssid)):
            if unlikely(va & lane.fixed != lane.bits):
                upper = half_of(va, context.two_ttbs)
                if upper != lane.upper:
                    lane_flush(&lane, c, &memo)
                    lane_set(&lane, hw, c, &memo, upper)
            if likely(va & lane.fixed == lane.bits):
                address = va & lane.within | lane.sign
                e = lane_find(&lane, c, address)
                if not alike:
                    need = context.need[access]
                if (likely(e != NULL) and likely(e.perm1 & e.perm2 & need)
                        and likely(usable(e, access))):
                    lane.clock += 1
                    if likely(lane.order != NULL):
                        lane.order[e - lane.entries] = lane.clock
                    elif c.cache[CACHE_TLB].policy == POLICY_PLRU:
                        plru_touch(&c.cache[CACHE_TLB], e - lane.entries)
                    store_u64(&pas, i, e.address | va & low_mask(e.lg2))
                    store_u8(&actions, i, ACTION_OK)
                    store_u8(&events, i, 0)
                    continue
        lane_flush(&lane, c, &memo)
        port.wrote = False
        status = scalar(core, port, &memo, batch, i)
        if status:
            return status
        takes = (not more and cr0_smmuen(hw.cr0) and lane_takes(&memo, c)
                 and memo.edition == hw.edition and memo.generation == c.config_generation)
        if takes:
            lane_set(&lane, hw, c, &memo, half_of(va, context.two_ttbs))
            if alike:
                access = load_u8(&batch.access, 0) & 7
                need = context.need[access]
    lane_flush(&lane, c, &memo)
    return 0


cdef inline int translate_hits(Core* core, Port* port, const BatchC* batch) noexcept nogil:
    """Translate a batch through caches, in order.

    What hits the TLB and is permitted is done in a loop of its own, as translate_cached would;
    the rest is done there.  Columns but pa, action and event are left to it as well.
    """
    cdef bint more = wants_more(batch)
    if batch.sid.stride == 0 and batch.ssid.stride == 0 and batch.access.stride == 0:
        return run_hits(core, port, batch, more, True)
    return run_hits(core, port, batch, more, False)
