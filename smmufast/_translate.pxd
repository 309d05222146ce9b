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
    CR0_EVENTQEN, CR0_SMMUEN, CR2_RECINVSID, STAGE1_BYPASS, TERMINATE_A, TERMINATE_R, admitted, cd_decode,
    cd_first, effective_access, l1cd_next, l1std_next, ste_aborts, ste_check, ste_overrides,
    stream_first, substream,
)
from smmufast._layout cimport *
from smmufast._memory cimport FETCH_ABORT, FETCH_OK, Port, Ram, fetch8, fetch64, port_open
from smmufast._types cimport (
    ACCESS_INSTR, ACCESS_PRIV, ACCESS_WRITE, ACTION_ABORT, ACTION_BYPASS, ACTION_DISABLED,
    ACTION_OK, ACTION_RAZ_WI, FETCH_CD, FETCH_L1CD, FETCH_L1STD, FETCH_STE, FETCH_TT, NO_LEVEL,
    NO_SSID, BatchC, ColumnC, Context, Half, Hw, Outcome, Request,
)
from smmufast._vmsa cimport (
    DESC_INVALID, DESC_LEAF, access_flag, contiguous, descriptor_kind, entry_address, half_of,
    hierarchical, in_range, leaf_address, leaf_permissions, leaf_sh, mair_byte, needed, next_table,
    not_global, permitted, shareability, stage1_attr,
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
    if event == EVENT_C_BAD_STREAMID and not hw.cr2 & CR2_RECINVSID:
        recorded = False
    if not hw.cr0 & CR0_EVENTQEN:
        recorded = False
    outcome.pa = 0
    outcome.fault = event
    outcome.event = event if recorded else 0
    outcome.action = ACTION_ABORT if terminate & TERMINATE_A else ACTION_RAZ_WI
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

# A decoded context and the words that it was decoded from: decoding is a function of them, so
# it is done again only when what was fetched differs.
cdef struct Memo:
    uint64_t[8] ste
    uint64_t[8] cd
    bint whole       # ste, cd and context belong together
    Context context


cdef inline bint same_words(const uint64_t* a, const uint64_t* b) noexcept nogil:
    return not ((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3])
                | (a[4] ^ b[4]) | (a[5] ^ b[5]) | (a[6] ^ b[6]) | (a[7] ^ b[7]))


cdef inline int lookup(
        const Hw* hw, Port* port, uint32_t sid, uint32_t ssid, Memo* memo, int* index,
        uint64_t* address) noexcept nogil:
    """Fetch and decode what a (StreamID, SubstreamID) pair meets, into memo.context.

    0; or an event, SILENT_ABORT, or a negative stop.  `index` is that of the CD, or
    STAGE1_BYPASS, and then the context holds the STE's overrides alone.  `address` is that of
    the last fetch.
    """
    cdef uint64_t l1 = 0
    cdef uint64_t[8] ste
    cdef uint64_t[8] cd
    cdef int kind, status, event
    cdef bint known
    kind = stream_first(hw, sid, address)
    if kind == 0:
        return EVENT_C_BAD_STREAMID
    if address[0] & hw.oas_over:
        return EVENT_F_STE_FETCH
    if kind == FETCH_L1STD:
        status = fetch8(port, FETCH_L1STD, NO_LEVEL, address[0], &l1)
        if status:
            return EVENT_F_STE_FETCH if status == FETCH_ABORT else status
        event = l1std_next(hw, l1, sid, address)
        if event:
            return event
        if address[0] & hw.oas_over:
            return EVENT_F_STE_FETCH
    status = fetch64(port, FETCH_STE, address[0], ste)
    if status:
        return EVENT_F_STE_FETCH if status == FETCH_ABORT else status
    known = memo.whole and same_words(ste, memo.ste)
    if not known:
        memo.whole = False
        if not ste_v(ste):
            return EVENT_C_BAD_STE
        if ste_aborts(ste):
            return SILENT_ABORT
        event = ste_check(hw, ste)
        if event:
            return event
        ste_overrides(hw, ste, &memo.context)
    event = substream(hw, ste, ssid, index)
    if event or index[0] == STAGE1_BYPASS:
        return event
    kind = cd_first(hw, ste, <uint32_t>index[0], address)
    if address[0] & hw.oas_over:
        return EVENT_F_CD_FETCH
    if kind == FETCH_L1CD:
        status = fetch8(port, FETCH_L1CD, NO_LEVEL, address[0], &l1)
        if status:
            return EVENT_F_CD_FETCH if status == FETCH_ABORT else status
        event = l1cd_next(hw, ste, l1, <uint32_t>index[0], address)
        if event:
            return event
        if address[0] & hw.oas_over:
            return EVENT_F_CD_FETCH
    status = fetch64(port, FETCH_CD, address[0], cd)
    if status:
        return EVENT_F_CD_FETCH if status == FETCH_ABORT else status
    if known and same_words(cd, memo.cd):
        return 0
    memo.whole = False
    event = cd_decode(hw, ste, cd, &memo.context)
    if event == 0:
        memo.ste = ste
        memo.cd = cd
        memo.whole = True
    return event


# --- stage 1 (15.2) ---

cdef inline int leaf_fault(
        const Context* context, const Half* half, unsigned int upper, unsigned int access,
        Leaf* leaf) noexcept nogil:
    """What a leaf gives: address size before access flag before permission."""
    cdef uint64_t address = leaf_address(leaf.d, half, leaf.shift)
    if address & context.over:
        return EVENT_F_ADDR_SIZE
    if not (context.affd or access_flag(leaf.d)):
        return EVENT_F_ACCESS
    leaf.address = address
    leaf.perm = permitted(leaf_permissions(leaf.d, leaf.tables), context.regime, upper)
    return 0 if leaf.perm & needed(access) else EVENT_F_PERMISSION


cdef inline int walk(
        const Context* context, Port* port, uint64_t va, unsigned int access,
        Leaf* leaf) noexcept nogil:
    """Walk the tables of one address: 0, an event, or a negative stop."""
    cdef unsigned int upper = half_of(va, context.two_ttbs)
    cdef const Half* half = &context.half[upper]
    cdef uint64_t ia, table, d = 0
    cdef int level, status
    cdef unsigned int shift, kind
    leaf.perm = 0
    if not half.enabled or not in_range(va, half.range_mask, upper):
        return EVENT_F_TRANSLATION
    if not (half.unprivileged or access & ACCESS_PRIV):
        return EVENT_F_TRANSLATION
    ia = va & half.index_mask
    table = half.table
    level = half.level
    shift = half.shift
    leaf.tables = 0
    while True:
        leaf.address = entry_address(half, table, ia, shift)
        status = fetch8(port, FETCH_TT, level, leaf.address, &d)
        if unlikely(status):
            return EVENT_F_WALK_EABT if status == FETCH_ABORT else status
        if context.swap:
            d = swap64(d)
        kind = descriptor_kind(d, level, half.blocks)
        if kind == DESC_INVALID:
            return EVENT_F_TRANSLATION
        if kind == DESC_LEAF:
            break
        table = next_table(d, half)
        if table & context.over:
            return EVENT_F_ADDR_SIZE
        leaf.tables |= hierarchical(d) & half.keep
        level += 1
        shift -= half.stride
    leaf.d = d
    leaf.level = level
    leaf.shift = shift
    return leaf_fault(context, half, upper, access, leaf)


# --- the scalar driver ---

cdef inline void end_bypass(const Hw* hw, const Request* request, const Context* context,
                            unsigned int access, Outcome* outcome) noexcept nogil:
    """Stage 1 bypassed: the address must fit OAS, else abort and record whatever CD says."""
    if request.iova & hw.oas_over:
        end_fault(hw, request, outcome, EVENT_F_ADDR_SIZE, access, TERMINATE_A | TERMINATE_R, 0)
    else:
        end_unmapped(outcome, ACTION_BYPASS, request.iova, 0x3F, context.attr, context.sh)


cdef inline void end_disabled(const Hw* hw, const Request* request,
                              Outcome* outcome) noexcept nogil:
    """SMMUEN=0: GBPA decides, and nothing is recorded (6.3.14)."""
    if hw.gbpa_abort or request.iova & hw.oas_over:
        return
    end_unmapped(
        outcome, ACTION_DISABLED, request.iova, 0x3F, hw.gbpa_attr, hw.gbpa_sh)


cdef inline int translate_one(
        const Hw* hw, Port* port, const Request* request, Memo* memo,
        Outcome* outcome) noexcept nogil:
    """Translate one request: 0, or a negative stop that leaves no outcome.

    Two calls that run at once, or inside each other, do not share a memo.
    """
    cdef const Context* context = &memo.context
    cdef Leaf leaf
    cdef uint64_t address = 0
    cdef unsigned int access
    cdef int event, index
    cdef const Half* half
    end_unmapped(outcome, ACTION_ABORT, 0, 0, 0, 0)
    if not hw.cr0 & CR0_SMMUEN:
        end_disabled(hw, request, outcome)
        return 0
    event = lookup(hw, port, request.sid, request.ssid, memo, &index, &address)
    if event:
        if event < 0:
            return event
        if event != SILENT_ABORT:
            end_fault(hw, request, outcome, event, 0, TERMINATE_A | TERMINATE_R, address)
        return 0
    access = effective_access(context, request.access)
    if index == STAGE1_BYPASS:
        end_bypass(hw, request, context, access, outcome)
        return 0
    event = walk(context, port, request.iova, access, &leaf)
    if event < 0:
        return event
    outcome.stage = 1
    outcome.asid = context.asid
    outcome.perm = admitted(context, leaf.perm)
    if event == EVENT_F_WALK_EABT:
        end_fault(hw, request, outcome, event, access, TERMINATE_A | TERMINATE_R, leaf.address)
    elif event:
        end_fault(hw, request, outcome, event, access, context.terminate, 0)
    else:
        half = &context.half[half_of(request.iova, context.two_ttbs)]
        outcome.action = ACTION_OK
        outcome.pa = leaf.address | (request.iova & low_mask(leaf.shift))
        outcome.level = leaf.level
        outcome.page_lg2 = leaf.shift
        outcome.attr = stage1_attr(context.attr, mair_byte(context.mair, leaf.d))
        outcome.sh = shareability(outcome.attr, leaf_sh(leaf.d, half))
        outcome.ng = not_global(leaf.d)
        outcome.contiguous = contiguous(leaf.d)
    return 0


# --- the batch driver ---

cdef enum:
    BLOCK = 32   # requests whose upper levels are walked before the first leaf is read
    SLOTS = 64   # contexts decoded at a time

    # where a request of a block stands
    STATE_SCALAR = 0  # the scalar driver does it
    STATE_ENTRY = 1   # its level-3 descriptor is on the way
    STATE_LEAF = 2    # its leaf has been read


# A decoded context, kept inside one call.
cdef struct Slot:
    uint32_t sid
    uint32_t ssid
    uint64_t block            # the last block that uses it, counted from 1; 0: never
    bint walks                # lookup succeeded and stage 1 translates
    uint8_t[2][16] perm       # permitted() by half and leaf_permissions()
    Memo memo


# One request between the two passes over its block.
cdef struct Flight:
    const uint8_t* entry      # STATE_ENTRY: host address of the level-3 descriptor
    uint64_t d                # STATE_LEAF: the leaf
    uint64_t va
    uint64_t tables
    Slot* slot
    uint8_t state
    uint8_t access            # after overrides
    uint8_t shift
    int8_t level


# The leaf table of the previous request.
cdef struct Near:
    Slot* slot                # NULL: none
    uint64_t tag              # address bits above the table's reach
    uint64_t table
    uint64_t tables
    unsigned int reach


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
    store_record(&batch.record, i, o.record if o.event else NULL)


cdef inline int batch_scalar(
        const Hw* hw, Port* port, Memo* memo, const BatchC* batch, size_t i) noexcept nogil:
    """One request of a batch by the scalar driver."""
    cdef Request request
    cdef Outcome outcome
    cdef int status
    request.iova = load_u64(&batch.iova, i)
    request.sid = load_u32(&batch.sid, i)
    request.ssid = load_u32(&batch.ssid, i)
    request.access = load_u8(&batch.access, i)
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
    cdef unsigned int leaf
    cdef int index
    if not (slot.block and slot.sid == sid and slot.ssid == ssid):
        if slot.block == block:
            return NULL
        if near.slot == slot:
            near.slot = NULL
        slot.sid = sid
        slot.ssid = ssid
        slot.walks = (
            lookup(hw, port, sid, ssid, &slot.memo, &index, &address) == 0
            and index != STAGE1_BYPASS
        )
        if slot.walks:
            for leaf in range(16):
                slot.perm[0][leaf] = permitted(leaf, slot.memo.context.regime, 0)
                slot.perm[1][leaf] = permitted(leaf, slot.memo.context.regime, 1)
    slot.block = block
    return slot


cdef inline void set_out(
        Flight* flight, Port* port, Slot* slot, uint64_t va, unsigned int access,
        Near* near) noexcept nogil:
    """First pass: walk down to the last table and ask for its entry.

    Whatever is not an ordinary walk is left to the scalar driver.
    """
    cdef const Context* context = &slot.memo.context
    cdef unsigned int upper = half_of(va, context.two_ttbs)
    cdef const Half* half = &context.half[upper]
    cdef uint64_t ia, table, tables, offset, address, d = 0
    cdef int level
    cdef unsigned int shift
    flight.state = STATE_SCALAR
    flight.slot = slot
    flight.va = va
    flight.access = effective_access(context, access)
    if va >> near.reach == near.tag and near.slot == slot:
        table = near.table
        tables = near.tables
        ia = va
        shift = half.granule
    else:
        if not half.enabled or not in_range(va, half.range_mask, upper):
            return
        ia = va & half.index_mask
        table = half.table
        tables = 0
        level = half.level
        shift = half.shift
        while level < 3:
            address = entry_address(half, table, ia, shift)
            if fetch8(port, FETCH_TT, level, address, &d):
                return
            if context.swap:
                d = swap64(d)
            if (d & 3) != 3:  # no table: a block, or a fault for the scalar driver
                if descriptor_kind(d, level, half.blocks) != DESC_LEAF:
                    return
                flight.d = d
                flight.tables = tables
                flight.level = level
                flight.shift = shift
                flight.state = STATE_LEAF
                return
            table = next_table(d, half)
            if table & context.over:
                return
            tables |= hierarchical(d) & half.keep
            level += 1
            shift -= half.stride
        if half.level < 3:
            near.slot = slot
            near.reach = half.granule + half.stride
            near.tag = va >> near.reach
            near.table = table
            near.tables = tables
    address = entry_address(half, table, ia, shift)
    flight.tables = tables
    flight.level = 3
    flight.shift = shift
    offset = address - port.window.base
    if likely(offset <= port.window.span):
        flight.entry = port.window.data + offset
        prefetch(flight.entry)
        flight.state = STATE_ENTRY
    elif fetch8(port, FETCH_TT, 3, address, &d) == FETCH_OK:
        flight.d = swap64(d) if context.swap else d
        if descriptor_kind(flight.d, 3, half.blocks) == DESC_LEAF:
            flight.state = STATE_LEAF


cdef inline int arrive(
        const Hw* hw, Port* port, const BatchC* batch, bint more, size_t i,
        Flight* flight) noexcept nogil:
    """Second pass: read the leaf and write the columns.

    0, or 1 when the request faults and is left to the scalar driver.  `more`: columns other
    than pa, action and event are wanted.
    """
    cdef const Slot* slot = flight.slot
    cdef const Context* context = &slot.memo.context
    cdef const Half* half
    cdef unsigned int upper, perm, attr
    cdef uint64_t d, address
    if unlikely(flight.state == STATE_SCALAR):
        return 1
    upper = half_of(flight.va, context.two_ttbs)
    half = &context.half[upper]
    if likely(flight.state == STATE_ENTRY):
        d = le64(load64(flight.entry))
        if context.swap:
            d = swap64(d)
        if unlikely((d & 3) != 3):
            return 1
    else:
        d = flight.d
    address = leaf_address(d, half, flight.shift)
    perm = slot.perm[upper][leaf_permissions(d, flight.tables)]
    if unlikely((address & context.over) or not (context.affd or access_flag(d))
                or not perm & needed(flight.access)):
        return 1
    store_u64(&batch.pa, i, address | (flight.va & low_mask(flight.shift)))
    store_u8(&batch.action, i, ACTION_OK)
    store_u8(&batch.event, i, 0)
    if more:
        store_u8(&batch.fault, i, 0)
        store_u8(&batch.perm, i, admitted(context, perm))
        store_u8(&batch.level, i, <uint8_t>flight.level)
        store_u8(&batch.page_lg2, i, flight.shift)
        if batch.attr.data != NULL or batch.sh.data != NULL:
            attr = stage1_attr(context.attr, mair_byte(context.mair, d))
            store_u8(&batch.attr, i, attr)
            store_u8(&batch.sh, i, shareability(attr, leaf_sh(d, half)))
        store_record(&batch.record, i, NULL)
    return 0


cdef inline int translate_many(
        const Hw* hw, Ram* ram, Port* port, const BatchC* batch) noexcept nogil:
    """Translate a batch: 0, or FETCH_RAISED with the exception in the port.

    Memory that is not plain sees the requests one by one, in their order.
    """
    cdef Slot[SLOTS] slots
    cdef Flight[BLOCK] flights
    cdef Near near
    cdef Memo memo
    cdef Slot* slot = NULL
    cdef size_t start, i, count
    cdef uint64_t block = 1
    cdef uint32_t sid, ssid
    cdef int status
    cdef bint one_pair = batch.sid.stride == 0 and batch.ssid.stride == 0
    cdef bint more = (
        batch.fault.data != NULL or batch.perm.data != NULL or batch.level.data != NULL
        or batch.page_lg2.data != NULL or batch.attr.data != NULL or batch.sh.data != NULL
        or batch.record.data != NULL
    )
    port_open(port, ram, NULL, False)
    memo.whole = False
    if not ram.plain or not hw.cr0 & CR0_SMMUEN or batch.n == 0:
        for i in range(batch.n):
            status = batch_scalar(hw, port, &memo, batch, i)
            if status:
                return status
        return 0
    for i in range(SLOTS):
        slots[i].block = 0
        slots[i].memo.whole = False
    near.slot = NULL
    near.reach = 0
    near.tag = near.table = near.tables = 0
    start = 0
    while start < batch.n:
        count = batch.n - start
        if count > BLOCK:
            count = BLOCK
        for i in range(count):
            if not one_pair or slot == NULL:
                sid = load_u32(&batch.sid, start + i)
                ssid = load_u32(&batch.ssid, start + i)
                if (slot == NULL or slot.sid != sid or slot.ssid != ssid
                        or slot.block != block):
                    slot = slot_of(hw, port, slots, sid, ssid, block, &near)
            if slot != NULL and slot.walks:
                set_out(&flights[i], port, slot, load_u64(&batch.iova, start + i),
                        load_u8(&batch.access, start + i), &near)
            else:
                flights[i].state = STATE_SCALAR
        for i in range(count):
            if unlikely(arrive(hw, port, batch, more, start + i, &flights[i])):
                status = batch_scalar(hw, port, &memo, batch, start + i)
                if status:
                    return status
        start += count
        block += 1
    return 0
