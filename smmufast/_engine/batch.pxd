"""The batch drivers: many requests, columns in and out, without the global lock.

Blocks of requests: the upper levels of all are walked before the first leaf is read, over the
rules of translate.pxd.  What faults, what needs stage 2 or a hardware update, and everything
through caches or memory that is not plain, goes one by one through the scalar driver.
"""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free as release
from libc.string cimport memcmp, memcpy, memset

from smmufast._facts.bits cimport apart, le64, likely, load64, low_mask, prefetch, unlikely
from smmufast._engine.cache cimport POLICY_LRU, POLICY_PLRU, CacheC, ctz64, plru_touch
from smmufast._engine.cached cimport UNDECODED, deliver, translate_request
from smmufast._rules.config cimport STAGE1_BYPASS, admitted, ste_stage2
from smmufast._engine.core cimport Core
from smmufast._facts.layout cimport cr0_smmuen, pte_s2_set_s2ap, pte_s2_set_xn, ste_v
from smmufast._engine.memory cimport FETCH_OK, Port, fetch8
from smmufast._engine.probe cimport Hits, each_hit, vector_fits, vector_hits
from smmufast._engine.tlb cimport (
    CACHE_CD, CACHE_STE, CACHE_TLB, CachesC, Entry, config_touch, tlb_find_key, tlb_key,
    tlb_probe_sizes,
)
from smmufast._rules.scope cimport KIND_COMBINED, KIND_S1, KIND_S2
from smmufast._engine.translate cimport (
    AT_OTHER, AT_PAGES, CLASS_TT, Descent, Leaf, Memo, Syndrome, descend, descriptor, leaf_perm,
    level_of, lookup, permitted_leaves, stage2, ste_fetch, translate_known, usable,
)
from smmufast._facts.hw cimport Hw
from smmufast._facts.types cimport (
    ACCESS_WRITE, ACTION_OK, FETCH_S2TT, FETCH_TT, NO_SSID, PERM_PR, BatchC, ColumnC, Context, Half,
    Outcome, Request, Second,
)
from smmufast._rules.vmsa cimport (
    DESC_LEAF, TABLE, clean_s1, descriptor_kind, entry_address, first_table, half_of, in_range,
    leaf_address, leaf_sh, mair_byte, shareability, stage1_attr, stage2_permitted, used_leaf,
)

from smmufast._engine.vector cimport (
    EPOCH_LG2, KNOWN_LG2, Known, Lanes, Last, NearTable, Out, Rows, Span, known_home, known_key,
    plain_arrive, plain_down, plain_find, plain_near, slot_home, vector_arrive, vector_down,
    vector_find, vector_known, vector_near, vector_on,
)


cdef enum:
    ROWS = 128        # SMMUFAST_ROWS
    WALKS = 32        # rows of a block whose upper levels are walked before the first leaf is read
    SHAPES = 7        # kinds of context told apart in one call
    SLOTS_LG2 = 13    # pairs remembered in one call, as SMMUFAST_HOME says
    PROBES = 8
    LEFT = 15         # Rows.shape: the scalar driver looks the pair up in its turn
    FEW = 16          # rows that Lanes are worth
    QUIET = 8         # rows that write no memory before a block is set out again
    STREAK = 3        # rows that hit, so that more are expected to
    REST_MIN = 8      # rows for which vectors rest where they did something before
    REST_MAX = 256


# A decoded context.  Pairs that differ in tables and ASID alone have one shape.
cdef struct Shape:
    Memo memo                 # of the pair that had it first
    bint walks                # stage 1, and nothing else, translates
    bint[2] laned             # lanes are filled in
    Lanes[2] lanes


# Where the walk of a pair begins, in one half of its addresses.
cdef struct Slot:
    uint64_t key              # slot_key(); with another epoch it is empty
    uint64_t first            # the first table, aligned, | 2 * shape + half, or LEFT


# Pairs, in open addressing.  It outlives a call, so that a call need not clear it.
cdef struct Pairs:
    uint64_t epoch            # 1 to 1023
    Slot[1 << SLOTS_LG2] slot


# The last two tables of the previous walk: [0] of pages, [1] the one above.
cdef struct Near:
    uint64_t first            # the table where that walk began
    uint64_t[2] tag           # address bits above the table's reach
    uint64_t[2] table
    uint64_t[2] tables        # hierarchical attributes of the tables above it
    unsigned int[2] reach
    unsigned int shape        # of that walk
    unsigned int moved        # walks of this block that ended in another last table
    bint trusted              # few of the last block did, so [0] is asked first


# A batch under way.
cdef struct Run:
    Core* core
    Port* port
    const BatchC* batch
    Pairs* pairs              # NULL: all rows are of one pair, which is shape[0]
    bint more                 # columns other than pa, action and event are wanted
    bint vector
    bint laned                # there are rows enough for Lanes to be filled in
    bint halves               # of one pair, bit 55 of the address selects the shape
    unsigned int shapes
    Shape[SHAPES] shape
    Memo memo                 # of the scalar driver
    Near near
    Last last
    NearTable near_table
    bint direct               # columns as vector_near() wants them
    bint sequence             # the last rows stayed in one table
    Out out


cdef inline void near_forget(Near* near) noexcept nogil:
    near.shape = LEFT
    near.reach[0] = near.reach[1] = 1
    near.tag[0] = near.tag[1] = ~<uint64_t>0  # no address has it
    near.first = 0
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


cdef inline void store_u16(const ColumnC* column, size_t i, uint16_t value) noexcept nogil:
    if column.data != NULL:
        memcpy(<char*>column.data + <ptrdiff_t>i * column.stride, &value, 2)


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
    store_u16(&batch.why, i, o.why)


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


ctypedef int (*ByOne)(Core*, Port*, Memo*, const BatchC*, size_t) noexcept nogil


# --- contexts ---

cdef extern from *:
    """
    #define smmufast_exchange(p, value) __atomic_exchange_n((p), (value), __ATOMIC_ACQ_REL)
    """
    void* exchange "smmufast_exchange"(void** place, void* value) noexcept nogil


cdef inline void* scratch_take(void** place, size_t size) noexcept nogil:
    """What an earlier call left there, unless another thread has it; NULL without memory."""
    cdef void* found = exchange(place, NULL)
    return found if found != NULL else calloc(1, size)


cdef inline void scratch_give(void** place, void* scratch) noexcept nogil:
    release(exchange(place, scratch))


cdef inline bint same_shape(Memo* memo, Shape* shape) noexcept nogil:
    """Nothing but tables and ASID of the two contexts differ."""
    cdef Context* context = &memo.context
    cdef uint64_t lower = context.half[0].table, upper = context.half[1].table
    cdef uint16_t asid = context.asid
    cdef bint same
    context.half[0].table = shape.memo.context.half[0].table
    context.half[1].table = shape.memo.context.half[1].table
    context.asid = shape.memo.context.asid
    same = memcmp(context, &shape.memo.context, sizeof(Context)) == 0
    context.half[0].table = lower
    context.half[1].table = upper
    context.asid = asid
    return same and (memo.index != STAGE1_BYPASS) == shape.walks


cdef inline bint look_up(Run* run, uint32_t sid, uint32_t ssid, Memo* memo) noexcept nogil:
    """Decode the context of a pair ahead of its turn; no if that is left to the turn.

    Nothing is updated on the way.  What needs stage 2 waits for its turn, and so does every row
    of an SMMU that a callback has disabled.
    """
    cdef Syndrome syndrome
    cdef int event
    if unlikely(not cr0_smmuen(run.core.hw.cr0)):
        return False
    memset(&memo.context, 0, sizeof(Context))  # contexts are compared as bytes
    run.port.dry = True
    event = lookup(&run.core.hw, run.port, sid, ssid, memo, &syndrome)
    run.port.dry = False
    if memo.context.second.on:
        memo.whole = False
    return event == 0 and memo.whole


cdef inline unsigned int shape_of(Run* run, Memo* memo) noexcept nogil:
    """The number of this context's shape; SHAPES if there are too many."""
    cdef unsigned int k
    cdef Shape* shape
    for k in range(run.shapes):
        if same_shape(memo, &run.shape[k]):
            return k
    if run.shapes < SHAPES:
        shape = &run.shape[run.shapes]
        shape.memo = memo[0]
        shape.walks = memo.index != STAGE1_BYPASS
        shape.laned[0] = shape.laned[1] = False
        run.shapes += 1
        return run.shapes - 1
    return SHAPES


cdef inline void lanes_fill(
        Lanes* lanes, const Context* context, unsigned int upper) noexcept nogil:
    """What vectors ask for in one half of a context."""
    cdef const Half* half = &context.half[upper]
    cdef unsigned int access
    lanes.walks = context.simple and half.enabled
    lanes.sign = 0 - <uint64_t>upper
    if not lanes.walks:
        return
    half_lanes(lanes, half)
    for access in range(8):
        lanes.allowed[access] = permitted_leaves[
            context.regime * 12 + upper * 6 + ctz64(context.need[access])]


cdef inline void half_lanes(Lanes* lanes, const Half* half) noexcept nogil:
    cdef unsigned int shift = half.shift
    lanes.range_mask = half.range_mask
    lanes.index_mask = half.index_mask
    lanes.entry_mask = half.entry_mask
    lanes.table_bits = half.table_bits
    lanes.low_address = half.low_address
    lanes.keep = half.keep
    lanes.leaf_bits = half.leaf_bits
    lanes.shift = half.shift
    lanes.granule = half.granule
    lanes.stride = half.stride
    lanes.block_shifts = 0
    while shift != half.granule:
        if half.fitting >> (level_of(half, shift) + 1) & 1:
            lanes.block_shifts |= <uint64_t>1 << shift
        shift -= half.stride


cdef inline const Lanes* lanes_of(Run* run, unsigned int shape) noexcept nogil:
    """Of Rows.shape; NULL when its walks are not for vectors."""
    cdef Shape* found
    cdef unsigned int upper = shape & 1
    if shape == LEFT:
        return NULL
    found = &run.shape[shape >> 1]
    if not found.walks:
        return NULL
    if not found.laned[upper]:
        lanes_fill(&found.lanes[upper], &found.memo.context, upper)
        found.laned[upper] = True
    return &found.lanes[upper] if found.lanes[upper].walks else NULL


cdef inline uint64_t slot_key(
        uint32_t sid, uint32_t ssid, unsigned int upper, uint64_t epoch) noexcept nogil:
    """{StreamID, no SubstreamID, SubstreamID, bit 55 of the address, epoch}."""
    return (<uint64_t>sid << 32 | <uint64_t>(ssid == NO_SSID) << 31
            | <uint64_t>(ssid & 0xFFFFF) << 11 | <uint64_t>upper << 10 | epoch)


cdef inline uint64_t pair_first(Run* run, uint32_t sid, uint32_t ssid, uint64_t va) noexcept nogil:
    """Slot.first of a row; the pair is decoded once for as long as it keeps its slot."""
    cdef Pairs* pairs = run.pairs
    cdef unsigned int upper = <unsigned int>(va >> 55) & 1
    cdef uint64_t key = slot_key(sid, ssid, upper, pairs.epoch)
    cdef uint64_t home = slot_home(key)
    cdef Slot* slot
    cdef Slot* free = NULL
    cdef Memo memo
    cdef unsigned int shape
    cdef int k
    for k in range(PROBES):
        slot = &pairs.slot[(home + k) & ((1 << SLOTS_LG2) - 1)]
        if slot.key == key:
            return slot.first
        if (slot.key ^ pairs.epoch) & 1023:
            free = slot
            break
    if free == NULL:
        free = &pairs.slot[home]
    free.key = key
    free.first = LEFT
    if look_up(run, sid, ssid, &memo):
        shape = shape_of(run, &memo)
        upper = half_of(va, memo.context.two_ttbs)
        if shape < SHAPES:
            free.first = 2 * shape
            if memo.index != STAGE1_BYPASS:
                free.first |= memo.context.half[upper].table | upper
    return free.first


cdef inline void open_contexts(Run* run) noexcept nogil:
    """Decode everything anew: memory may have changed."""
    near_forget(&run.near)
    run.near_table.found = False
    run.memo.whole = False
    if run.shapes == SHAPES:
        run.shapes = 0
    if run.pairs != NULL:
        run.pairs.epoch += 1
        if run.pairs.epoch == 1024:
            memset(run.pairs, 0, sizeof(Pairs))
            run.pairs.epoch = 1
        return
    cdef Memo* memo = &run.memo
    if not look_up(run, load_u32(&run.batch.sid, 0), load_u32(&run.batch.ssid, 0), memo):
        run.shapes = 0  # each row by the scalar driver
        return
    if run.shapes == 1 and same_shape(memo, &run.shape[0]):
        run.shape[0].memo = memo[0]
    else:
        run.shapes = 0
        shape_of(run, memo)


# --- rows ---

cdef inline void rows_fill(Run* run, Rows* rows, unsigned int upper) noexcept nogil:
    """All rows are in this half of the one context."""
    cdef uint64_t first = run.shape[0].memo.context.half[upper].table
    cdef size_t i, n = run.batch.n if run.batch.n < <size_t>ROWS else <size_t>ROWS
    memset(rows.shape, upper, n)
    for i in range(n):
        rows.first[i] = first
    rows.half = upper


cdef inline void pair_row(Run* run, Rows* rows, size_t i) noexcept nogil:
    cdef uint64_t first = pair_first(run, rows.sid[i], rows.ssid[i], rows.va[i])
    rows.first[i] = first & ~<uint64_t>15
    rows.shape[i] = first & 15


cdef inline void column_u32(
        const ColumnC* column, size_t start, size_t count, uint32_t* into) noexcept nogil:
    cdef size_t i
    if column.stride == 4:
        memcpy(into, <const char*>column.data + 4 * start, 4 * count)
    else:
        for i in range(count):
            into[i] = load_u32(column, start + i)


cdef inline void rows_read(
        Run* run, Rows* rows, size_t start, size_t count, bint one_pair) noexcept nogil:
    """Take the inputs of a block, once: a caller may write there meanwhile."""
    cdef const BatchC* batch = run.batch
    cdef const Context* context
    cdef size_t i
    cdef uint64_t any_bit = 0, each = ~<uint64_t>0
    cdef uint64_t[2] missing
    cdef unsigned int upper
    cdef int k
    rows.start = start
    rows.count = count
    rows.lg2 = 1
    rows.removed = 0
    rows.alike = batch.access.stride == 0
    if batch.iova.stride == 8:
        memcpy(rows.va, <const char*>batch.iova.data + 8 * start, 8 * count)
    else:
        for i in range(count):
            rows.va[i] = load_u64(&batch.iova, start + i)
    if batch.access.stride:
        for i in range(count):
            rows.access[i] = load_u8(&batch.access, start + i) & 7
    if one_pair:
        if run.halves:
            for i in range(count):
                any_bit |= rows.va[i]
                each &= rows.va[i]
            upper = half_of(any_bit, True)
            if upper == half_of(each, True):
                if rows.half != upper:
                    rows_fill(run, rows, upper)
                return
            rows.half = 2
            context = &run.shape[0].memo.context
            for i in range(count):
                upper = half_of(rows.va[i], True)
                rows.shape[i] = upper
                rows.first[i] = context.half[upper].table
        return
    column_u32(&batch.sid, start, count, rows.sid)
    column_u32(&batch.ssid, start, count, rows.ssid)
    if run.vector:
        vector_find(<const uint64_t*>run.pairs.slot, run.pairs.epoch, rows, count, missing)
        for k in range(2):
            while missing[k]:
                pair_row(run, rows, 64 * k + ctz64(missing[k]))
                missing[k] &= missing[k] - 1
        return
    for i in range(count):
        pair_row(run, rows, i)


cdef inline void rows_prepare(Run* run, Rows* rows, bint one_pair) noexcept nogil:
    """Fill in what is the same for all rows of the batch."""
    if run.batch.access.stride == 0:
        memset(rows.access, load_u8(&run.batch.access, 0) & 7, ROWS)
    rows.half = 2
    if one_pair and run.shapes == 0:
        memset(rows.shape, LEFT, ROWS)
    elif one_pair:
        rows_fill(run, rows, 0)


cdef inline void near_keep(
        Near* near, unsigned int shape, uint64_t first, const Half* half, uint64_t va,
        const Descent* at) noexcept nogil:
    """Remember the last two tables of a walk, unless they are the first.

    Addresses in a table's reach are in the range of the half then, for the table above it
    indexes bits beyond the reach.
    """
    cdef unsigned int reach = half.granule + half.stride
    if reach > half.shift:
        return
    near.moved += va >> reach != near.tag[0]
    near.shape = shape
    near.first = first
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
        Rows* rows, size_t i, Port* port, const Context* context, Near* near, bint one_pair,
        bint simple) noexcept nogil:
    """First pass: walk down to the last table and ask for its entry.

    Whatever is not an ordinary walk is left to the scalar driver.  `simple` is
    context.simple.
    """
    cdef uint64_t va = rows.va[i]
    cdef unsigned int upper = rows.shape[i] & 1
    cdef const Half* half = &context.half[upper]
    cdef Descent at
    cdef uint64_t ia, offset, raw = 0
    cdef int status
    rows.entry[i] = NULL
    if not one_pair and (near.first != rows.first[i] or near.shape != rows.shape[i]):
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
            at.table = rows.first[i]
            at.tables = 0
            at.shift = half.shift
        status = descend(half, port, FETCH_TT, ia, &at, simple)
        if unlikely(status != AT_PAGES):
            if status == AT_OTHER and descriptor_kind(
                    descriptor(half, at.raw, simple), level_of(half, at.shift),
                    half.fitting) == DESC_LEAF:
                rows.tables[i] = at.tables & half.keep
                rows.shift[i] = at.shift
                rows.held[i] = at.raw
                rows.entry[i] = <const uint8_t*>&rows.held[i]
            return
        near_keep(near, rows.shape[i], rows.first[i], half, va, &at)
    rows.tables[i] = at.tables & half.keep
    rows.shift[i] = at.shift
    at.address = entry_address(half, at.table, ia, at.shift)
    offset = at.address - port.window.base
    if likely(offset <= port.window.span):
        rows.entry[i] = port.window.data + offset
        prefetch(rows.entry[i])
    elif fetch8(port, FETCH_TT, 3, at.address, &raw) == FETCH_OK:
        rows.held[i] = le64(raw)
        rows.entry[i] = <const uint8_t*>&rows.held[i]


cdef inline int arrive(
        const Rows* rows, size_t i, const Context* context, const BatchC* batch,
        bint more, bint simple) noexcept nogil:
    """Second pass: read the leaf and write the columns.

    0, or 1 when the request is left to the scalar driver.  `more`: columns other than pa,
    action and event are wanted.
    """
    cdef const Half* half
    cdef unsigned int upper, shift, perm, attr, access = rows.access[i]
    cdef uint64_t d, address, va = rows.va[i]
    cdef size_t row = rows.start + i
    if unlikely(rows.entry[i] == NULL):
        return 1
    upper = rows.shape[i] & 1
    half = &context.half[upper]
    shift = rows.shift[i]
    d = descriptor(half, load64(rows.entry[i]), simple)
    # a page's bit 1 is set, a block's is not
    if unlikely((d ^ used_leaf(shift == half.granule)) & half.leaf_bits):
        return 1
    address = leaf_address(d, half, shift) if not simple else (
        d & half.low_address & ~low_mask(shift))
    if not simple and address & half.over:
        return 1
    perm = leaf_perm(context, upper, d, rows.tables[i], simple)
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
        store_u16(&batch.why, row, 0)
    return 0


cdef inline void set_out_row(Run* run, Rows* rows, size_t i, bint one_pair) noexcept nogil:
    cdef const Shape* shape
    if rows.shape[i] == LEFT or not run.shape[rows.shape[i] >> 1].walks:
        rows.entry[i] = NULL
        return
    shape = &run.shape[rows.shape[i] >> 1]
    if likely(shape.memo.context.simple):
        set_out(rows, i, run.port, &shape.memo.context, &run.near, one_pair, True)
    else:
        set_out(rows, i, run.port, &shape.memo.context, &run.near, one_pair, False)


cdef inline size_t run_of(
        const Run* run, const Rows* rows, size_t i, size_t step, bint one_pair) noexcept nogil:
    """The end of the rows from i on that have the shape of row i, looked at by steps of 8."""
    cdef uint8_t shape = rows.shape[i]
    cdef uint64_t eight = shape * <uint64_t>0x0101010101010101, found
    cdef size_t n = i
    if one_pair and (rows.half < 2 or run.shapes == 0):
        return rows.count
    while n + 8 <= rows.count:
        memcpy(&found, &rows.shape[n], 8)
        if found != eight:
            break
        n += 8
    if n + 8 > rows.count or step == 1:
        while n < rows.count and rows.shape[n] == shape:
            n += 1
        if step != 1 and n < rows.count:
            n &= ~<size_t>7
    return n


cdef inline void rows_set_out(Run* run, Rows* rows, bint one_pair) noexcept nogil:
    """First pass over a block."""
    cdef Port* port = run.port
    cdef const Lanes* lanes
    cdef size_t i = 0, k, n
    cdef uint64_t left
    cdef uint64_t[2] beyond
    cdef Span window
    if not run.laned:
        for i in range(rows.count):
            set_out_row(run, rows, i, one_pair)
        # a test that half the requests pass costs more than the walk that it saves
        run.near.trusted = run.near.moved <= rows.count // 8
        run.near.moved = 0
        return
    beyond[0] = beyond[1] = 0
    while i < rows.count:
        n = run_of(run, rows, i, 8, one_pair)
        lanes = lanes_of(run, rows.shape[i]) if n > i else NULL
        if lanes != NULL:
            window.base = port.window.base
            window.span = port.window.span
            window.data = port.window.data
            if run.vector:
                vector_down(lanes, &window, rows, i, n, &run.last, beyond)
            else:
                plain_down(lanes, &window, rows, i, n, &run.last, beyond)
            i = n
            continue
        n = i + 8 if n == i else n
        if n > rows.count:
            n = rows.count
        while i < n:
            beyond[i >> 6] |= <uint64_t>1 << (i & 63)
            i += 1
    run.sequence = one_pair and run.last.alike * (10U if run.vector else 2U) >= rows.count
    if run.last.mixed:
        run.last.lg2 = run.last.size if run.last.blocks * 8 >= rows.count else 0
    run.last.careful = not run.last.lg2 and run.last.mixed * 40 > rows.count  # a fifth of them
    run.last.alike = run.last.mixed = run.last.blocks = run.last.size = 0
    for k in range(2):
        left = beyond[k]
        while unlikely(left != 0):
            i = 64 * k + ctz64(left)
            left &= left - 1
            rows.lg2 = 0
            set_out_row(run, rows, i, one_pair)


cdef inline int row_scalar(Run* run, const Rows* rows, size_t i, bint one_pair) noexcept nogil:
    """One row by the scalar driver, in the context that its block decoded where that is its own."""
    cdef Shape* shape = &run.shape[rows.shape[i] >> 1]
    cdef Request request
    cdef Outcome outcome
    cdef int status
    request.iova = rows.va[i]
    request.access = rows.access[i]
    request.reserved = 0
    if one_pair:
        request.sid = load_u32(&run.batch.sid, 0)
        request.ssid = load_u32(&run.batch.ssid, 0)
    else:
        request.sid = rows.sid[i]
        request.ssid = rows.ssid[i]
    if rows.shape[i] != LEFT and (one_pair or not shape.walks):
        status = translate_known(&run.core.hw, run.port, &request, &shape.memo, &outcome)
        status = deliver(run.core, run.port, &request, status, &outcome)
    else:
        status = translate_request(run.core, run.port, &request, &run.memo, &outcome)
    if status == 0:
        store_outcome(run.batch, rows.start + i, &outcome)
    return status


ctypedef int (*RowScalar)(Run*, const Rows*, size_t, bint) noexcept nogil


cdef inline int rows_arrive(Run* run, Rows* rows, bint one_pair, size_t* done) noexcept nogil:
    """Second pass over a block; `done` rows of it.  Not all, when memory was written."""
    cdef RowScalar scalar = <RowScalar>apart(<void*>row_scalar)
    cdef Shape* shape
    cdef const Lanes* lanes = NULL
    cdef size_t i = 0, n = 0
    cdef int status
    while i < rows.count:
        if run.laned and not run.more:
            if i >= n:
                n = run_of(run, rows, i, 1, one_pair)
                lanes = lanes_of(run, rows.shape[i])
            if lanes != NULL:
                if run.vector:
                    i = vector_arrive(lanes, rows, i, n, &run.out)
                else:
                    i = plain_arrive(lanes, rows, i, n, &run.out)
                if i == n:
                    continue
        status = 1
        if rows.shape[i] != LEFT:
            shape = &run.shape[rows.shape[i] >> 1]
            if likely(shape.memo.context.simple):
                status = arrive(rows, i, &shape.memo.context, run.batch, run.more, True)
            else:
                status = arrive(rows, i, &shape.memo.context, run.batch, run.more, False)
        if unlikely(status):
            run.last.lg2 = 0
            status = scalar(run, rows, i, one_pair)
            if status:
                run.port.stopped = rows.start + i
                return status
            if run.port.wrote:
                done[0] = i + 1
                return 0
        i += 1
    done[0] = rows.count
    return 0


cdef inline size_t run_near(Run* run, size_t start) noexcept nogil:
    """Translate rows in sequence from `start` on; how many.  The next one is not such a row."""
    cdef const BatchC* batch = run.batch
    cdef Port* port = run.port
    cdef unsigned int upper
    cdef const Lanes* lanes
    cdef Span window
    if run.shapes == 0:
        return 0
    upper = half_of(load_u64(&batch.iova, start), run.halves)
    lanes = lanes_of(run, upper)
    if lanes == NULL:
        return 0
    window.base = port.window.base
    window.span = port.window.span
    window.data = port.window.data
    return (vector_near if run.vector else plain_near)(
        lanes, &window, run.shape[0].memo.context.half[upper].table,
        <const char*>batch.iova.data, load_u8(&batch.access, 0) & 7, start, batch.n, &run.out,
        &run.near_table)


cdef inline int rows_alone(Run* run, size_t* start) noexcept nogil:
    """Rows from `start` on by the scalar driver, until as many as QUIET wrote no memory."""
    cdef ByOne scalar = <ByOne>apart(<void*>batch_scalar)
    cdef unsigned int quiet = 0
    cdef int status
    while start[0] < run.batch.n and quiet < QUIET:
        run.port.wrote = False
        status = scalar(run.core, run.port, &run.memo, run.batch, start[0])
        if status:
            run.port.stopped = start[0]
            return status
        quiet = 0 if run.port.wrote else quiet + 1
        start[0] += 1
    return 0


cdef inline int run_blocks(Run* run, bint one_pair) noexcept nogil:
    """Both passes over every block, the second one block later.

    A row that writes memory makes an end of what was set out behind it; where that may happen
    again soon, rows are done alone.
    """
    cdef Rows[2] rows
    cdef size_t n = run.batch.n, start = 0, count, done = 0
    cdef size_t full = ROWS if run.vector else WALKS
    cdef unsigned int now = 0
    cdef bint pending = False, anew = True
    cdef int status
    run.port.wrote = False
    while pending or start < n:
        if unlikely(run.port.wrote):
            start = rows[now ^ 1].start + done
            pending = False
            status = rows_alone(run, &start)
            if status:
                return status
            run.port.wrote = False
            anew = True
            continue
        if unlikely(anew):
            # contexts may have changed
            anew = False
            open_contexts(run)
            run.halves = run.shapes != 0 and run.shape[0].memo.context.two_ttbs
            rows_prepare(run, &rows[0], one_pair)
            rows_prepare(run, &rows[1], one_pair)
        if run.sequence and run.direct and start < n:
            if pending:
                status = rows_arrive(run, &rows[now ^ 1], one_pair, &done)
                if status:
                    return status
                if unlikely(run.port.wrote):
                    continue
                pending = False
            start += run_near(run, start)
        if start < n:
            count = n - start if n - start < full else full
            rows_read(run, &rows[now], start, count, one_pair)
            rows_set_out(run, &rows[now], one_pair)
            start += count
        else:
            rows[now].count = 0
        if pending:
            status = rows_arrive(run, &rows[now ^ 1], one_pair, &done)
            if status:
                return status
            if unlikely(run.port.wrote):
                continue
        pending = rows[now].count != 0
        now ^= 1
    return 0


# --- both stages ---
# One pair whose context has stage 2.  The first row is the scalar driver's, which decodes the
# context in its turn; the rest have the last tables of both stages from a cache of this call.

cdef struct Reuse:
    uint64_t epoch            # 1 to 2^20 - 1
    Known[1 << KNOWN_LG2] first
    Known[1 << KNOWN_LG2] second


cdef inline const uint8_t* in_window(
        const Port* port, uint64_t address, uint64_t size) noexcept nogil:
    """All of a table, on the host; NULL if it is not in the window."""
    cdef uint64_t offset = address - port.window.base
    if offset > port.window.span or port.window.span - offset < size - 8:
        return NULL
    return port.window.data + offset


cdef inline int stage2_table(
        const Half* half, Port* port, uint64_t ipa, const uint8_t** table,
        uint64_t* held, unsigned int* shift) noexcept nogil:
    """Walk stage 2 to the last table of an IPA, or to a block: 0, or 1 for the scalar driver."""
    cdef Descent at
    cdef int status
    at.table = first_table(half, ipa)
    at.tables = 0
    at.shift = half.shift
    status = descend(half, port, FETCH_S2TT, ipa, &at, True)
    table[0] = NULL
    held[0] = at.raw
    shift[0] = at.shift
    if status == AT_PAGES:
        table[0] = in_window(port, at.table, half.entry_mask + 8)
        return table[0] == NULL
    return status != AT_OTHER or descriptor_kind(
        le64(at.raw), level_of(half, at.shift), half.fitting) != DESC_LEAF


cdef inline int nested_table(
        const Context* context, const Half* half, Port* port, uint64_t ia,
        const uint8_t** table, uint64_t* held, uint64_t* tables,
        unsigned int* shift) noexcept nogil:
    """The same for stage 1, each table through stage 2."""
    cdef Leaf outer
    cdef Syndrome syndrome
    cdef uint64_t at = half.table, address = 0, d = 0
    cdef int status
    shift[0] = half.shift
    tables[0] = 0
    table[0] = NULL
    while True:
        if shift[0] != half.granule:
            at = entry_address(half, at, ia, shift[0])
        status = stage2(NULL, context, port, at, PERM_PR, False, CLASS_TT, &outer, &address,
                        &syndrome)
        if status:
            return 1  # a fault, or an access flag to be set
        if shift[0] == half.granule:
            if outer.shift < half.granule:
                return 1  # the table has several pages
            table[0] = in_window(port, address, half.entry_mask + 8)
            return table[0] == NULL
        if fetch8(port, FETCH_TT, level_of(half, shift[0]), address, &d) != FETCH_OK:
            return 1
        status = descriptor_kind(d, level_of(half, shift[0]), half.fitting)
        if status == DESC_LEAF:
            held[0] = le64(d)
            return 0
        if (d & half.table_bits) != TABLE:
            return 1
        at = d & half.low_address
        tables[0] |= d
        shift[0] -= half.stride


cdef inline void nested_missing(
        Run* run, Reuse* reuse, const Lanes* lanes, Rows* rows, size_t i,
        bint stage1) noexcept nogil:
    """Walk to the last table of a row, or to its block; keep the table."""
    cdef const Context* context = &run.memo.context
    cdef uint64_t ia = rows.va[i] & lanes.index_mask, key = known_key(lanes, ia, reuse.epoch)
    cdef uint64_t tables = 0
    cdef const Half* half = &context.second.half
    cdef const uint8_t* table = NULL
    cdef unsigned int shift = 0
    cdef int left
    cdef Known* known = &reuse.second[known_home(key)]
    if stage1:
        half = &context.half[lanes.sign & 1]
        known = &reuse.first[known_home(key)]
        left = nested_table(context, half, run.port, ia, &table, &rows.held[i], &tables, &shift)
    else:
        left = stage2_table(half, run.port, ia, &table, &rows.held[i], &shift)
    if left:
        return
    rows.tables[i] = tables & half.keep
    rows.shift[i] = shift
    rows.entry[i] = <const uint8_t*>&rows.held[i]
    if table != NULL:
        rows.entry[i] = table + (ia >> (half.granule - 3) & half.entry_mask)
        known.key = key
        known.table = <uint64_t><size_t>table | (tables & half.keep) >> 59 << 60


ctypedef void (*NestedMissing)(
    Run*, Reuse*, const Lanes*, Rows*, size_t, bint) noexcept nogil


cdef inline void nested_ask(
        Run* run, Reuse* reuse, const Lanes* lanes, Rows* rows, bint stage1) noexcept nogil:
    """Ask for the leaves of a block at one stage."""
    cdef const Known* known = &reuse.first[0] if stage1 else &reuse.second[0]
    cdef uint64_t[2] missing
    cdef int k
    if run.vector:
        vector_known(lanes, known, reuse.epoch, rows, rows.count, missing)
    else:
        plain_find(lanes, known, reuse.epoch, rows, rows.count, missing)
    for k in range(2):
        while unlikely(missing[k] != 0):
            (<NestedMissing>apart(<void*>nested_missing))(
                run, reuse, lanes, rows, 64 * k + ctz64(missing[k]), stage1)
            missing[k] &= missing[k] - 1


cdef inline size_t leaves_arrive(
        const Run* run, const Lanes* lanes, const Rows* rows, size_t i,
        const Out* out) noexcept nogil:
    if run.vector:
        return vector_arrive(lanes, rows, i, rows.count, out)
    return plain_arrive(lanes, rows, i, rows.count, out)


cdef inline void nested_lanes(Run* run, Lanes* first, Lanes* second) noexcept nogil:
    """Both halves of stage 1 and stage 2, as the passes over blocks ask for them."""
    cdef const Context* context = &run.memo.context
    cdef unsigned int access, code
    cdef uint64_t leaf
    if run.memo.index != STAGE1_BYPASS:
        lanes_fill(&first[0], context, 0)
        lanes_fill(&first[1], context, 1)
    half_lanes(second, &context.second.half)
    second.sign = 0
    second.walks = True
    if run.memo.index == STAGE1_BYPASS:
        second.range_mask |= run.core.hw.oas_over
    for access in range(8):
        second.allowed[access] = 0
        for code in range(16):  # {XN, S2AP}
            leaf = pte_s2_set_s2ap(pte_s2_set_xn(0, code >> 2), code)
            if stage2_permitted(leaf, context.second.xnx) & context.need[access]:
                second.allowed[access] |= <uint64_t>1 << code


cdef inline bint nested_takes(const Run* run) noexcept nogil:
    """The context that the scalar driver left is one for these passes."""
    cdef const Context* context = &run.memo.context
    return (
        cr0_smmuen(run.core.hw.cr0) and run.memo.whole
        and context.second.on and context.second.simple and not context.second.hd
        and (run.memo.index == STAGE1_BYPASS or context.simple))


cdef inline int run_nested(Run* run, Reuse* reuse) noexcept nogil:
    """Translate the rows of one pair, of which the first may turn out to have stage 2."""
    cdef const BatchC* batch = run.batch
    cdef Rows[2] rows         # at stage 1, at stage 2
    cdef Lanes[2] first
    cdef Lanes second
    cdef uint8_t[ROWS] left   # stage 1 leaves the row to the scalar driver
    cdef Out ipas
    cdef ByOne scalar = <ByOne>apart(<void*>batch_scalar)
    cdef size_t start = 0, count, i
    cdef bint takes = False, stage1 = True, again = False, pure = run.port.pure
    cdef const Lanes* lanes
    cdef int status
    ipas.pa = <char*>rows[1].va
    ipas.action = ipas.event = NULL
    ipas.pa_stride = 8
    ipas.action_stride = ipas.event_stride = 1
    ipas.ok = 0
    while start < batch.n:
        if not takes:
            if again:
                status = rows_alone(run, &start)
                if status:
                    return status
                if start == batch.n:
                    break
            run.port.wrote = False
            status = scalar(run.core, run.port, &run.memo, batch, start)
            if status:
                run.port.stopped = start
                return status
            start += 1
            again = True
            takes = not run.port.wrote and nested_takes(run)
            if takes:
                stage1 = run.memo.index != STAGE1_BYPASS
                nested_lanes(run, first, &second)
                reuse.epoch += 1
                if reuse.epoch >> EPOCH_LG2:
                    memset(reuse, 0, sizeof(Reuse))
                    reuse.epoch = 1
            continue
        count = batch.n - start
        if count > ROWS:
            count = ROWS
        rows[0].count = rows[1].count = count
        rows[0].start = 0
        rows[1].start = start
        rows[0].lg2 = rows[1].lg2 = 0
        for i in range(count):
            rows[0].va[i] = load_u64(&batch.iova, start + i)
            rows[0].access[i] = rows[1].access[i] = load_u8(&batch.access, start + i) & 7
        run.port.pure = True  # tables are walked ahead of their turn: nothing is updated
        memset(left, 0, count)
        if stage1:
            lanes = &first[half_of(rows[0].va[0], run.memo.context.two_ttbs)]
            if not lanes.walks:
                memset(left, 1, count)
            else:
                nested_ask(run, reuse, lanes, &rows[0], True)
                i = 0
                while True:
                    i = leaves_arrive(run, lanes, &rows[0], i, &ipas)
                    if i >= count:
                        break
                    left[i] = 1
                    rows[1].va[i] = 0
                    i += 1
                    if i >= count:
                        break
        else:
            memcpy(rows[1].va, rows[0].va, 8 * count)
        nested_ask(run, reuse, &second, &rows[1], False)
        run.port.pure = pure
        for i in range(count):
            if unlikely(left[i]):
                rows[1].entry[i] = NULL
        i = 0
        while True:
            i = leaves_arrive(run, &second, &rows[1], i, &run.out)
            if i >= count:
                break
            status = scalar(run.core, run.port, &run.memo, batch, start + i)
            if status:
                run.port.stopped = start + i
                return status
            i += 1
            if run.port.wrote or not run.memo.whole:
                takes = False
                break
            if i >= count:
                break
        start += i
    return 0


cdef inline bint wants_more(const BatchC* batch) noexcept nogil:
    """Columns other than pa, action and event are wanted."""
    return (
        batch.fault.data != NULL or batch.perm.data != NULL or batch.level.data != NULL
        or batch.page_lg2.data != NULL or batch.attr.data != NULL or batch.sh.data != NULL
        or batch.ipa.data != NULL or batch.stage.data != NULL or batch.record.data != NULL
        or batch.why.data != NULL
    )


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
            port.stopped = i
            return status
    return 0


cdef inline bint through_stage2(Run* run) noexcept nogil:
    """The one pair's STE enables stage 2."""
    cdef Syndrome syndrome
    run.memo.whole = False
    return ste_fetch(&run.core.hw, run.port, load_u32(&run.batch.sid, 0), &run.memo,
                     &syndrome) == 0 and ste_v(run.memo.ste) and ste_stage2(run.memo.ste)


ctypedef int (*NestedRun)(Run*, Reuse*) noexcept nogil


cdef inline int translate_plain(
        Core* core, Port* port, const BatchC* batch) noexcept nogil:
    """Translate a batch of at least one request, in plain memory and with SMMUEN=1."""
    cdef Run run
    cdef bint one_pair = batch.sid.stride == 0 and batch.ssid.stride == 0
    cdef Reuse* reuse
    cdef int status
    run.core = core
    run.port = port
    run.batch = batch
    run.pairs = NULL
    run.more = wants_more(batch)
    run.laned = batch.n >= FEW
    run.vector = vector_on and run.laned
    run.shapes = 0
    run.near.moved = 0
    run.near.trusted = False
    run.sequence = False
    run.last.alike = run.last.mixed = run.last.careful = 0
    run.last.blocks = run.last.size = run.last.lg2 = 0
    run.out.pa = <char*>batch.pa.data
    run.out.action = <char*>batch.action.data
    run.out.event = <char*>batch.event.data
    run.out.pa_stride = batch.pa.stride if batch.pa.data != NULL else 8
    run.out.action_stride = batch.action.stride if batch.action.data != NULL else 1
    run.out.event_stride = batch.event.stride if batch.event.data != NULL else 1
    run.out.ok = ACTION_OK
    run.direct = (
        run.laned and not run.more and one_pair and batch.iova.stride == 8
        and batch.access.stride == 0 and run.out.pa_stride == 8 and run.out.action_stride == 1
        and run.out.event_stride == 1)
    if one_pair and not run.more and batch.n >= FEW and through_stage2(&run):
        reuse = <Reuse*>scratch_take(&core.reuse, sizeof(Reuse))
        if reuse == NULL:
            return translate_each(core, port, batch)
        status = (<NestedRun>apart(<void*>run_nested))(&run, reuse)
        scratch_give(&core.reuse, reuse)
        return status
    if one_pair:
        return run_blocks(&run, True)
    run.pairs = <Pairs*>scratch_take(&core.pairs, sizeof(Pairs))
    if run.pairs == NULL:
        return translate_each(core, port, batch)
    status = run_blocks(&run, False)
    scratch_give(&core.pairs, run.pairs)
    return status


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
    if memo.edition != hw.edition or memo.generation != c.config_generation:
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
    cdef ByOne scalar = <ByOne>apart(<void*>batch_scalar)
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
    memo.edition = 0
    memo.generation = UNDECODED
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
