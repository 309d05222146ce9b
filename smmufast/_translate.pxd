"""The chain that the drivers run: configuration lookup, stage 1, and its end as an outcome.

Sections: IHI 0070 3.2-3.5, 5.5 (fault control), 7.3 (event records), 15 (translation
procedure).  translate_one is the scalar driver: one request, every fetch through a port.  It
also serves traces (a port that records) and resumable walks (a port that answers from a
script: the chain is a pure function of what was fetched, so it is run again with one answer
more).  translate_many is the batch driver: blocks of requests, the upper levels of all walked
before the first leaf is read.

Stage 2, when it comes, stands in three places: before the fetches of L1CD and CD and before
each fetch of a stage-1 descriptor (the address there is an IPA), and after stage 1 in
translate_one.
"""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int8_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from smmufast._bits cimport le64, likely, load64, low_mask, prefetch, swap64, unlikely
from smmufast._config cimport (
    STAGE1_BYPASS, TERMINATE_A, TERMINATE_R, admitted,
    cd_decode, cd_first, effective_access, l1cd_next, l1std_next, ste_aborts, ste_check,
    ste_overrides, stream_first, substream,
)
from smmufast._layout cimport *
from smmufast._memory cimport (
    FETCH_ABORT, FETCH_OK, Port, Ram, fetch8, fetch64, port_open, unchanged8, unchanged64,
)
from smmufast._types cimport (
    ACCESS_INSTR, ACCESS_PRIV, ACCESS_WRITE, ACTION_ABORT, ACTION_BYPASS, ACTION_DISABLED,
    ACTION_OK, ACTION_RAZ_WI, FETCH_CD, FETCH_L1CD, FETCH_L1STD, FETCH_STE, FETCH_TT, NO_LEVEL,
    NO_SSID, BatchC, ColumnC, Context, Half, Hw, Outcome, Request,
)
from smmufast._vmsa cimport (
    DESC_INVALID, DESC_LEAF, access_flag, contiguous, descriptor_kind, entry_address, half_of,
    in_range, leaf_address, leaf_permissions, leaf_sh, mair_byte, next_table, not_global, permitted,
    shareability, stage1_attr,
)


cdef enum:
    SILENT_ABORT = 256  # beside event numbers: STE.Config=0b0xx


# What a walk found, whether it faulted or not.
cdef struct Leaf:
    uint64_t d         # the descriptor, in host order
    uint64_t tables    # hierarchical attributes above it
    uint64_t address   # output address of the page, or where the descriptor was fetched
    uint8_t shift      # lg2 of the page
    int8_t level
    uint8_t perm


# --- ends ---

cdef inline void fault_record(
        uint64_t* w, int event, const Request* request, unsigned int access,
        uint64_t fetch_address) noexcept nogil:
    """The 32-byte record of a stage-1 event (7.3); what is not said is 0."""
    memset(w, 0, 32)
    event_set_id(w, event)
    event_set_streamid(w, request.sid)
    if event == EVENT_F_STREAM_DISABLED:
        return
    if request.ssid != NO_SSID:
        event_set_ssv(w, event != EVENT_C_BAD_SUBSTREAMID)
        event_set_substreamid(w, request.ssid)
    if event == EVENT_F_STE_FETCH or event == EVENT_F_CD_FETCH or event == EVENT_F_WALK_EABT:
        event_set_fetchaddr(w, fetch_address & ~<uint64_t>7)
    if event >= EVENT_F_WALK_EABT:
        event_set_pnu(w, (access & ACCESS_PRIV) != 0)
        event_set_ind(w, (access & ACCESS_INSTR) != 0)
        event_set_rnw(w, (access & ACCESS_WRITE) == 0)
        event_set_class(w, 1 if event == EVENT_F_WALK_EABT else 2)
        event_set_inputaddr(w, request.iova)


cdef inline void end_fault(
        const Hw* hw, const Request* request, Outcome* outcome, int event, unsigned int access,
        unsigned int terminate, uint64_t fetch_address) noexcept nogil:
    """Terminate with a fault: CD.A and CD.R (5.5), CR2.RECINVSID and CR0.EVENTQEN decide how."""
    cdef bint recorded = (terminate & TERMINATE_R) != 0
    if event == EVENT_C_BAD_STREAMID and not cr2_recinvsid(hw.cr2):
        recorded = False
    if not cr0_eventqen(hw.cr0):
        recorded = False
    end_unmapped(
        outcome, ACTION_ABORT if terminate & TERMINATE_A else ACTION_RAZ_WI, 0, 0, 0, 0)
    outcome.fault = event
    outcome.event = event if recorded else 0
    fault_record(outcome.record, event, request, access, fetch_address)


cdef inline void end_unmapped(
        Outcome* outcome, unsigned int action, uint64_t pa, unsigned int perm, unsigned int attr,
        unsigned int sh) noexcept nogil:
    """An outcome without a translation and without a fault; the rest is filled in later."""
    outcome.pa = pa
    outcome.action = action
    outcome.event = 0
    outcome.fault = 0
    outcome.perm = perm
    outcome.level = NO_LEVEL
    outcome.page_lg2 = 0
    outcome.attr = attr
    outcome.sh = sh
    outcome.asid = 0
    outcome.ng = 0
    outcome.contiguous = 0
    outcome.stage = 0


# --- configuration lookup (15.1) ---

cdef extern from *:
    """
    #define smmufast_nowhere UINT64_MAX /* no structure lies there */
    """
    const uint64_t NOWHERE "smmufast_nowhere"


# A decoded context and everything that was fetched for it.  It is a function of these, so as
# long as they are what memory holds it need not be decoded again.
cdef struct Memo:
    bint whole            # all of it belongs together
    uint32_t sid
    uint32_t ssid
    uint64_t l1std_at     # addresses; NOWHERE where the table has one level
    uint64_t ste_at
    uint64_t l1cd_at
    uint64_t cd_at
    uint64_t l1std
    uint64_t l1cd
    uint64_t[8] ste
    uint64_t[8] cd
    Context context


cdef inline bint memo_holds(
        const Port* port, const Memo* memo, uint32_t sid, uint32_t ssid) noexcept nogil:
    """The memo is this pair's, and memory still holds what it was decoded from."""
    if not memo.whole or memo.sid != sid or memo.ssid != ssid:
        return False
    if memo.l1std_at != NOWHERE and not unchanged8(port, memo.l1std_at, memo.l1std):
        return False
    if memo.l1cd_at != NOWHERE and not unchanged8(port, memo.l1cd_at, memo.l1cd):
        return False
    return (unchanged64(port, memo.ste_at, memo.ste)
            and unchanged64(port, memo.cd_at, memo.cd))


cdef inline int lookup(
        const Hw* hw, Port* port, uint32_t sid, uint32_t ssid, Memo* memo, int* index,
        uint64_t* address) noexcept nogil:
    """Fetch and decode what a (StreamID, SubstreamID) pair meets, into memo.context.

    0; or an event, SILENT_ABORT, or a negative stop.  `index` is that of the CD, or
    STAGE1_BYPASS, and then the context holds the STE's overrides alone.  `address` is that of
    the last fetch.
    """
    cdef int kind, status, event
    memo.whole = False
    memo.sid = sid
    memo.ssid = ssid
    memo.l1std_at = memo.l1cd_at = NOWHERE
    kind = stream_first(hw, sid, address)
    if kind == 0:
        return EVENT_C_BAD_STREAMID
    if address[0] & hw.oas_over:
        return EVENT_F_STE_FETCH
    if kind == FETCH_L1STD:
        memo.l1std_at = address[0]
        status = fetch8(port, FETCH_L1STD, NO_LEVEL, address[0], &memo.l1std)
        if status:
            return EVENT_F_STE_FETCH if status == FETCH_ABORT else status
        event = l1std_next(hw, memo.l1std, sid, address)
        if event:
            return event
        if address[0] & hw.oas_over:
            return EVENT_F_STE_FETCH
    memo.ste_at = address[0]
    status = fetch64(port, FETCH_STE, address[0], memo.ste)
    if status:
        return EVENT_F_STE_FETCH if status == FETCH_ABORT else status
    if not ste_v(memo.ste):
        return EVENT_C_BAD_STE
    if ste_aborts(memo.ste):
        return SILENT_ABORT
    event = ste_check(hw, memo.ste)
    if event:
        return event
    ste_overrides(hw, memo.ste, &memo.context)
    event = substream(hw, memo.ste, ssid, index)
    if event or index[0] == STAGE1_BYPASS:
        return event
    kind = cd_first(hw, memo.ste, <uint32_t>index[0], address)
    if address[0] & hw.oas_over:
        return EVENT_F_CD_FETCH
    if kind == FETCH_L1CD:
        memo.l1cd_at = address[0]
        status = fetch8(port, FETCH_L1CD, NO_LEVEL, address[0], &memo.l1cd)
        if status:
            return EVENT_F_CD_FETCH if status == FETCH_ABORT else status
        event = l1cd_next(hw, memo.ste, memo.l1cd, <uint32_t>index[0], address)
        if event:
            return event
        if address[0] & hw.oas_over:
            return EVENT_F_CD_FETCH
    memo.cd_at = address[0]
    status = fetch64(port, FETCH_CD, address[0], memo.cd)
    if status:
        return EVENT_F_CD_FETCH if status == FETCH_ABORT else status
    event = cd_decode(hw, memo.ste, memo.cd, &memo.context)
    memo.whole = event == 0
    return event


# --- stage 1 (15.2) ---

cdef extern from *:
    """
    /* permitted() of every regime, half and leaf, filled in when the module is loaded. */
    static uint8_t smmufast_permissions[64 * 2 * 16];
    """
    uint8_t* permissions "smmufast_permissions"


cdef inline void fill_permissions() noexcept nogil:
    cdef unsigned int regime, upper, leaf
    for regime in range(64):
        for upper in range(2):
            for leaf in range(16):
                permissions[regime * 32 + upper * 16 + leaf] = permitted(leaf, regime, upper)


cdef inline unsigned int leaf_perm(
        const Context* context, unsigned int upper, uint64_t d, uint64_t tables) noexcept nogil:
    """permitted(), looked up."""
    return permissions[context.regime * 32 + upper * 16 + leaf_permissions(d, tables)]


cdef inline int leaf_fault(
        const Context* context, const Half* half, unsigned int upper, unsigned int need,
        Leaf* leaf) noexcept nogil:
    """What a leaf gives: address size before access flag before permission."""
    cdef uint64_t address = leaf_address(leaf.d, half, leaf.shift)
    if address & context.over:
        return EVENT_F_ADDR_SIZE
    if not (context.affd or access_flag(leaf.d)):
        return EVENT_F_ACCESS
    leaf.address = address
    leaf.perm = leaf_perm(context, upper, leaf.d, leaf.tables)
    return 0 if leaf.perm & need else EVENT_F_PERMISSION


# Where a walk is: a table whose entries cover 2^shift bytes, and what led there.
cdef struct Descent:
    uint64_t table
    uint64_t tables        # hierarchical attributes above it, to be masked with half.keep
    uint64_t above         # the table above it, 0 if it is where the descent started
    uint64_t tables_above
    uint64_t address       # of the last descriptor read
    uint64_t raw           # the last descriptor, as it lies in memory
    unsigned int shift


# How a descent ends, besides FETCH_ABORT and negative stops.
cdef enum:
    AT_PAGES = 0     # in a table of level 3; nothing of it was read
    AT_OTHER = 2     # at a descriptor that is no ordinary table: a leaf, or a fault


cdef inline int level_of(const Half* half, unsigned int shift) noexcept nogil:
    """The level whose entries cover 2^shift bytes."""
    return 3 - <int>((shift - half.granule) // half.stride)


cdef inline uint64_t descriptor(const Context* context, uint64_t raw, bint simple) noexcept nogil:
    """A descriptor in host order, from its bytes in memory."""
    return swap64(le64(raw)) if not simple and context.swap else le64(raw)


cdef inline int descend(
        const Context* context, const Half* half, Port* port, uint64_t ia, Descent* at,
        bint simple) noexcept nogil:
    """Follow ordinary tables from at.table down to level 3.  `simple` is context.simple."""
    cdef uint64_t base = port.window.base
    cdef uint64_t span = port.window.span
    cdef const uint8_t* data = port.window.data
    cdef uint64_t expected = half.table_bits
    cdef uint64_t offset, d
    cdef unsigned int granule = half.granule
    cdef unsigned int stride = half.stride
    cdef int status
    at.above = at.tables_above = at.address = at.raw = 0
    while at.shift != granule:
        at.address = entry_address(half, at.table, ia, at.shift)
        offset = at.address - base
        if likely(offset <= span):
            at.raw = load64(data + offset)
        else:
            status = fetch8(port, FETCH_TT, level_of(half, at.shift), at.address, &at.raw)
            if status:
                return status
            at.raw = le64(at.raw)
            base = port.window.base
            span = port.window.span
            data = port.window.data
        d = descriptor(context, at.raw, simple)
        if unlikely((d & expected) != 3):
            return AT_OTHER
        if not simple and next_table(d, half) & context.over:
            return AT_OTHER
        at.above = at.table
        at.tables_above = at.tables
        at.table = d & half.low_address if simple else next_table(d, half)
        at.tables |= d
        at.shift -= stride
    return AT_PAGES


cdef inline int walk(
        const Context* context, Port* port, uint64_t va, unsigned int access, Leaf* leaf,
        bint simple) noexcept nogil:
    """Walk the tables of one address: 0, an event, or a negative stop.

    `access` is the device's own, `simple` is context.simple.
    """
    cdef unsigned int upper = half_of(va, context.two_ttbs)
    cdef const Half* half = &context.half[upper]
    cdef Descent at
    cdef int status
    cdef uint64_t d = 0
    leaf.perm = 0
    leaf.address = 0
    if not half.enabled or not in_range(va, half.range_mask, upper):
        return EVENT_F_TRANSLATION
    if not (half.unprivileged or effective_access(context, access) & ACCESS_PRIV):
        return EVENT_F_TRANSLATION
    va &= half.index_mask
    at.table = half.table
    at.tables = 0
    at.shift = half.shift
    status = descend(context, half, port, va, &at, simple)
    leaf.level = 3
    leaf.address = at.address
    if status == AT_PAGES:
        leaf.address = entry_address(half, at.table, va, at.shift)
        status = fetch8(port, FETCH_TT, 3, leaf.address, &d)
        d = descriptor(context, le64(d), simple)
    elif status == AT_OTHER:
        status = FETCH_OK
        d = descriptor(context, at.raw, simple)
        leaf.level = level_of(half, at.shift)
    if unlikely(status):
        return EVENT_F_WALK_EABT if status == FETCH_ABORT else status
    status = descriptor_kind(d, leaf.level, half.blocks)
    if unlikely(status != DESC_LEAF):
        return EVENT_F_TRANSLATION if status == DESC_INVALID else EVENT_F_ADDR_SIZE
    leaf.tables = at.tables & half.keep
    leaf.d = d
    leaf.shift = at.shift
    return leaf_fault(context, half, upper, context.need[access], leaf)


# --- the scalar driver ---

cdef inline void end_bypass(const Hw* hw, const Request* request, const Context* context,
                            Outcome* outcome) noexcept nogil:
    """Stage 1 bypassed: the address must fit OAS, else abort and record whatever CD says."""
    if request.iova & hw.oas_over:
        end_fault(hw, request, outcome, EVENT_F_ADDR_SIZE,
                  effective_access(context, request.access), TERMINATE_A | TERMINATE_R, 0)
    else:
        end_unmapped(outcome, ACTION_BYPASS, request.iova, 0x3F, context.attr, context.sh)


cdef inline void end_disabled(const Hw* hw, const Request* request,
                              Outcome* outcome) noexcept nogil:
    """SMMUEN=0: GBPA decides, and nothing is recorded (6.3.14)."""
    if hw.gbpa_abort or request.iova & hw.oas_over:
        end_unmapped(outcome, ACTION_ABORT, 0, 0, 0, 0)
    else:
        end_unmapped(
            outcome, ACTION_DISABLED, request.iova, 0x3F, hw.gbpa_attr, hw.gbpa_sh)


cdef inline int translate_stage1(
        const Hw* hw, Port* port, const Request* request, const Context* context,
        Outcome* outcome) noexcept nogil:
    """Translate one request in a decoded context: 0, or a negative stop without an outcome."""
    cdef const Half* half
    cdef Leaf leaf
    cdef int event
    if likely(context.simple):
        event = walk(context, port, request.iova, request.access, &leaf, True)
    else:
        event = walk(context, port, request.iova, request.access, &leaf, False)
    if event < 0:
        return event
    if event:
        end_fault(
            hw, request, outcome, event, effective_access(context, request.access),
            TERMINATE_A | TERMINATE_R if event == EVENT_F_WALK_EABT else context.terminate,
            leaf.address)
    else:
        half = &context.half[half_of(request.iova, context.two_ttbs)]
        outcome.pa = leaf.address | (request.iova & low_mask(leaf.shift))
        outcome.action = ACTION_OK
        outcome.event = 0
        outcome.fault = 0
        outcome.level = leaf.level
        outcome.page_lg2 = leaf.shift
        outcome.attr = stage1_attr(context.attr, mair_byte(context.mair, leaf.d))
        outcome.sh = shareability(outcome.attr, leaf_sh(leaf.d, half))
        outcome.ng = not_global(leaf.d) and context.two_ttbs  # no ASID: nG is ignored
        outcome.contiguous = contiguous(leaf.d)
    outcome.stage = 1
    outcome.asid = context.asid
    outcome.perm = admitted(context, leaf.perm)
    return 0


cdef inline int translate_one(
        const Hw* hw, Port* port, const Request* request, Memo* memo,
        Outcome* outcome) noexcept nogil:
    """Translate one request: 0, or a negative stop that leaves no outcome.

    Two calls that run at once, or inside each other, do not share a memo.
    """
    cdef uint64_t address = 0
    cdef int event = 0, index = 0
    if not cr0_smmuen(hw.cr0):
        end_disabled(hw, request, outcome)
        return 0
    if not memo_holds(port, memo, request.sid, request.ssid):
        event = lookup(hw, port, request.sid, request.ssid, memo, &index, &address)
    if event:
        if event < 0:
            return event
        if event == SILENT_ABORT:
            end_unmapped(outcome, ACTION_ABORT, 0, 0, 0, 0)
        else:
            end_fault(hw, request, outcome, event, 0, TERMINATE_A | TERMINATE_R, address)
        return 0
    if index == STAGE1_BYPASS:
        end_bypass(hw, request, &memo.context, outcome)
        return 0
    return translate_stage1(hw, port, request, &memo.context, outcome)


# --- the batch driver ---

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
    Slot* slot[BLOCK]


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
    store_record(&batch.record, i, <const uint64_t*>o.record if o.event else NULL)


cdef inline int batch_scalar(
        const Hw* hw, Port* port, Memo* memo, const BatchC* batch, size_t i) noexcept nogil:
    """One request of a batch by the scalar driver."""
    cdef Request request
    cdef Outcome outcome
    cdef int status
    request.iova = load_u64(&batch.iova, i)
    request.sid = load_u32(&batch.sid, i)
    request.ssid = load_u32(&batch.ssid, i)
    request.access = load_u8(&batch.access, i) & 7  # a caller may write there meanwhile
    status = translate_one(hw, port, &request, memo, &outcome)
    if status == 0:
        store_outcome(batch, i, &outcome)
    return status


cdef inline Slot* slot_of(
        const Hw* hw, Port* port, Slot* slots, uint32_t sid, uint32_t ssid, uint64_t block,
        Near* near) noexcept nogil:
    """The decoded context of a pair; it is decoded once for as long as it keeps its slot.

    NULL when the slot is taken by another pair of the same block.
    """
    cdef uint32_t hashed = (sid * 0x9E3779B1U) ^ ((ssid + 1) * 0x85EBCA6BU)
    cdef Slot* slot = &slots[(hashed >> 16) % SLOTS]
    cdef uint64_t address
    cdef int index
    if not (slot.block and slot.sid == sid and slot.ssid == ssid):
        if slot.block == block:
            return NULL
        near_forget(near)
        slot.sid = sid
        slot.ssid = ssid
        slot.walks = (
            lookup(hw, port, sid, ssid, &slot.memo, &index, &address) == 0
            and index != STAGE1_BYPASS
        )
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
        Block* block, size_t i, Port* port, Slot* slot, uint64_t va, Near* near,
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
    block.slot[i] = slot
    block.upper[i] = upper
    if near.slot != slot:
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
        status = descend(context, half, port, ia, &at, simple)
        if unlikely(status != AT_PAGES):
            if status == AT_OTHER and descriptor_kind(
                    descriptor(context, at.raw, simple), level_of(half, at.shift),
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
    d = descriptor(context, load64(block.entry[i]), simple)
    # a page's bit 1 is set; a block's is not, as was checked when it was read
    if unlikely(((d | <uint64_t>(shift != half.granule) << 1) ^ 0x403) & half.leaf_bits):
        return 1
    address = leaf_address(d, half, shift) if not simple else (
        d & half.low_address & ~low_mask(shift))
    if not simple and address & context.over:
        return 1
    perm = leaf_perm(context, upper, d, block.tables[i])
    if unlikely(not perm & context.need[access]):
        return 1
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
        store_record(&batch.record, row, NULL)
    return 0


cdef inline int run_blocks(
        const Hw* hw, Port* port, const BatchC* batch, Slot* slots, bint one_pair,
        bint more) noexcept nogil:
    """Both passes over every block.  `one_pair`: all requests have one sid and one ssid."""
    cdef Block block
    cdef Near near
    cdef Memo memo
    cdef Slot* slot = NULL
    cdef size_t start = 0, i, count
    cdef uint64_t number = 1
    cdef uint64_t va
    cdef uint32_t sid, ssid
    cdef unsigned int access
    cdef int status
    memo.whole = False
    near_forget(&near)
    near.moved = 0
    near.trusted = False
    if one_pair:
        slot = slot_of(hw, port, slots, load_u32(&batch.sid, 0), load_u32(&batch.ssid, 0), number,
                       &near)
    while start < batch.n:
        count = batch.n - start
        if count > BLOCK:
            count = BLOCK
        for i in range(count):
            if not one_pair:
                sid = load_u32(&batch.sid, start + i)
                ssid = load_u32(&batch.ssid, start + i)
                if (slot == NULL or slot.sid != sid or slot.ssid != ssid
                        or slot.block != number):
                    slot = slot_of(hw, port, slots, sid, ssid, number, &near)
            if slot == NULL or not slot.walks:
                block.entry[i] = NULL
                block.slot[i] = &slots[0]
                continue
            va = load_u64(&batch.iova, start + i)
            if likely(slot.memo.context.simple):
                set_out(&block, i, port, slot, va, &near, True)
            else:
                set_out(&block, i, port, slot, va, &near, False)
        # a test that half the requests pass costs more than the walk that it saves
        near.trusted = near.moved <= BLOCK // 8
        near.moved = 0
        for i in range(count):
            va = load_u64(&batch.iova, start + i)
            access = load_u8(&batch.access, start + i) & 7
            if not one_pair:
                slot = block.slot[i]
            if likely(slot.memo.context.simple):
                status = arrive(&block, i, slot, va, access, batch, start + i, more, True)
            else:
                status = arrive(&block, i, slot, va, access, batch, start + i, more, False)
            if unlikely(status):
                status = batch_scalar(hw, port, &memo, batch, start + i)
                if status:
                    return status
        start += count
        number += 1
    return 0


cdef inline int translate_plain(
        const Hw* hw, Port* port, const BatchC* batch) noexcept nogil:
    """Translate a batch of at least one request, in plain memory and with SMMUEN=1."""
    cdef Slot[SLOTS] slots
    cdef int k
    cdef bint one_pair = batch.sid.stride == 0 and batch.ssid.stride == 0
    cdef bint more = (
        batch.fault.data != NULL or batch.perm.data != NULL or batch.level.data != NULL
        or batch.page_lg2.data != NULL or batch.attr.data != NULL or batch.sh.data != NULL
        or batch.record.data != NULL
    )
    for k in range(SLOTS):
        slots[k].block = 0
        slots[k].memo.context.simple = False
    if one_pair and not more:
        return run_blocks(hw, port, batch, slots, True, False)
    return run_blocks(hw, port, batch, slots, one_pair, more)


cdef inline int translate_each(
        const Hw* hw, Port* port, const BatchC* batch) noexcept nogil:
    """Translate a batch one by one: memory that is not plain sees the requests in their order."""
    cdef Memo memo
    cdef size_t i
    cdef int status
    memo.whole = False
    for i in range(batch.n):
        status = batch_scalar(hw, port, &memo, batch, i)
        if status:
            return status
    return 0
