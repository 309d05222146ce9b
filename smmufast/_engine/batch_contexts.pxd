"""Contexts of a batch: pairs that were looked up, and what they have in common."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free as release
from libc.string cimport memcmp, memset

from smmufast._facts.bits cimport likely, unlikely
from smmufast._engine.cache cimport ctz64
from smmufast._rules.config cimport STAGE1_BYPASS
from smmufast._facts.layout cimport cr0_smmuen
from smmufast._engine.chain cimport Syndrome
from smmufast._engine.stage cimport level_of
from smmufast._engine.lookup cimport Memo, lookup
from smmufast._engine.stage1 cimport permitted_leaves
from smmufast._facts.types cimport NO_SSID, Context, Half
from smmufast._rules.vmsa cimport half_of
from smmufast._engine.vector cimport Lanes, Rows, slot_home
from smmufast._engine.batch_block cimport (
    FULL, LEFT, PROBES, SHAPES, SLOTS_LG2, Pairs, Run, Shape, Slot, load_u32, near_forget,
)
from smmufast._engine.batch_pairs cimport Ways, pairs_find, shape_keeps


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
        shape_keeps(&run.core.hw, shape)
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
    """What vectors ask of tables and leaves, from a half."""
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


cdef inline Slot* slot_find(Pairs* pairs, uint64_t key) noexcept nogil:
    """The slot of a pair: with its key, or else an empty one; NULL if there is neither."""
    cdef uint64_t home = slot_home(key)
    cdef Slot* slot
    cdef int k
    for k in range(PROBES):
        slot = &pairs.slot[(home + k) & ((1 << SLOTS_LG2) - 1)]
        if slot.key == key or (slot.key ^ pairs.epoch) & 1023:
            return slot
    return NULL


cdef inline bint pair_known(const Pairs* pairs, Rows* rows, size_t i) noexcept nogil:
    """Rows.first and Rows.shape of a row, if its pair is remembered."""
    cdef uint64_t key = slot_key(
        rows.sid[i], rows.ssid[i], rows.va[i] >> 55 & 1, pairs.epoch)
    cdef const Slot* slot = slot_find(<Pairs*>pairs, key)
    if slot == NULL or slot.key != key:
        return False
    rows.first[i] = slot.first & ~<uint64_t>15
    rows.shape[i] = slot.first & 15
    return True


cdef inline void pair_keep(Pairs* pairs, Slot* slot, uint64_t key, uint64_t first) noexcept nogil:
    """Remember where the walk of a pair begins, while there is room."""
    if slot == NULL or pairs.filled >= FULL:
        return
    pairs.filled += 1
    slot.key = key
    slot.first = first


cdef inline uint64_t pair_decode(Run* run, uint32_t sid, uint32_t ssid, uint64_t va) noexcept nogil:
    """Slot.first of a row whose context is decoded now."""
    cdef Memo memo
    cdef unsigned int shape, upper
    if not look_up(run, sid, ssid, &memo):
        return LEFT
    shape = shape_of(run, &memo)
    if shape == SHAPES:
        return LEFT
    if memo.index == STAGE1_BYPASS:
        return 2 * shape
    upper = half_of(va, memo.context.two_ttbs)
    return 2 * shape | memo.context.half[upper].table | upper


cdef inline void pairs_missing(Run* run, Rows* rows, Ways* ways, bint keep) noexcept nogil:
    """Contexts of the rows in `ways`: those recognised, then others decoded.

    `keep`: pairs are remembered; else only those that were not recognised.
    """
    cdef Pairs* pairs = run.pairs
    cdef Slot* slot
    cdef uint64_t key, first
    cdef unsigned int i, j
    for i in range(ways.count):
        rows.shape[ways.row[i]] = LEFT
    pairs_find(run, rows, ways)
    for j in range(ways.count):
        i = ways.row[j]
        if likely(rows.shape[i] != LEFT):
            if not keep:
                continue
            key = slot_key(rows.sid[i], rows.ssid[i], rows.va[i] >> 55 & 1, pairs.epoch)
            slot = slot_find(pairs, key)
            first = rows.first[i] | rows.shape[i]
        else:
            key = slot_key(rows.sid[i], rows.ssid[i], rows.va[i] >> 55 & 1, pairs.epoch)
            slot = slot_find(pairs, key)
            if slot != NULL and slot.key == key:
                first = slot.first
            else:
                first = pair_decode(run, rows.sid[i], rows.ssid[i], rows.va[i])
            rows.first[i] = first & ~<uint64_t>15
            rows.shape[i] = first & 15
        if slot == NULL or slot.key != key:
            pair_keep(pairs, slot, key, first)


cdef inline void open_contexts(Run* run) noexcept nogil:
    """Decode everything anew: memory may have changed."""
    near_forget(&run.near)
    run.near_table.found = False
    run.memo.whole = False
    if run.shapes == SHAPES:
        run.shapes = 0
    if run.pairs != NULL:
        run.pairs.epoch += 1
        run.pairs.filled = run.pairs.rest = 0
        if run.pairs.epoch == 1024:
            memset(run.pairs, 0, sizeof(Pairs))
            run.pairs.epoch = 1
        return
    cdef Memo* memo = &run.memo
    if not look_up(run, load_u32(&run.batch.sid, 0), load_u32(&run.batch.ssid, 0), memo):
        run.shapes = 0  # each row by the scalar path
        return
    if run.shapes == 1 and same_shape(memo, &run.shape[0]):
        run.shape[0].memo = memo[0]
    else:
        run.shapes = 0
        shape_of(run, memo)
