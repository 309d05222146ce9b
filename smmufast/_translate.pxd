"""The chain that the drivers run: configuration lookup, stage 1, and its end as an outcome.

Sections: IHI 0070 3.2-3.5, 5.5 (fault control), 7.3 (event records), 15 (translation
procedure).  translate_one is the scalar driver: one request, every fetch through a port.  It
also serves traces (a port that records) and resumable walks (a port that answers from a
script: the chain is a pure function of what was fetched, so it is run again with one answer
more).  translate_many is the batch driver: blocks of requests, the upper levels of all walked
before the first leaf is read.

Stage 2 stands in three places: before the fetches of L1CD and CD (cd_place), before each
fetch of a stage-1 descriptor (walk_nested), and after stage 1 (translate_stage2).
"""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int8_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from smmufast._bits cimport le64, likely, load64, low_mask, prefetch, swap64, unlikely
from smmufast._config cimport (
    STAGE1_BYPASS, TERMINATE_A, TERMINATE_R, TERMINATE_S, admitted,
    cd_decode, cd_first, effective_access, l1cd_next, l1std_next, stage2_decode, ste_aborts,
    ste_check, ste_overrides, ste_stage2, ste_vmid, stream_first, substream,
)
from smmufast._layout cimport *
from smmufast._memory cimport (
    FETCH_ABORT, FETCH_OK, Port, Ram, fetch8, fetch64, port_open, port_swap8, unchanged8,
    unchanged64,
)
from smmufast._types cimport (
    ACCESS_INSTR, ACCESS_PRIV, ACCESS_WRITE, ACTION_ABORT, ACTION_BYPASS, ACTION_DISABLED,
    ACTION_OK, ACTION_RAZ_WI, ACTION_STALL, FETCH_CD, FETCH_L1CD, FETCH_L1STD, FETCH_S2TT,
    FETCH_S2TT_UPDATE, FETCH_STE, FETCH_TT, FETCH_TT_UPDATE, NO_LEVEL, NO_SSID, PERM_PR, PERM_PW,
    BatchC, ColumnC, Context, Half, Hw, Outcome, Request, Second,
)
from smmufast._vmsa cimport (
    DESC_INVALID, DESC_LEAF, access_flag, clean_s1, clean_s2, combine_sh, contiguous,
    descriptor_kind, dirty_s1, dirty_s2, entry_address, first_table, half_of, in_range,
    leaf_address, leaf_permissions, leaf_sh, mair_byte, next_table, not_global, permitted,
    shareability, stage1_attr, stage2_attr, stage2_device, stage2_permitted, with_access_flag,
)


# Beside event numbers.
cdef enum:
    SILENT_ABORT = 256  # STE.Config=0b0xx
    CHANGED = 257       # a descriptor changed between its read and its update: walk again
    AT_TABLE = 258      # the descriptor is that of a table
    RETRIES = 8         # walks that lose that race before the update counts as failed


# What a walk found, whether it faulted or not.
cdef struct Leaf:
    uint64_t d         # the descriptor, in host order
    uint64_t desired   # what hardware update makes of it
    uint64_t tables    # hierarchical attributes above it
    uint64_t entry     # where the last descriptor was fetched
    uint64_t address   # output address of the page
    uint8_t shift      # lg2 of the page
    int8_t level
    uint8_t perm


# What a fault's record says beside the event and the transaction (7.3).
cdef struct Syndrome:
    uint64_t address   # FetchAddr, or the IPA of a stage-2 fault
    uint8_t s2
    uint8_t cls        # CLASS
    uint8_t ttrnw


cdef enum:
    CLASS_CD = 0
    CLASS_TT = 1
    CLASS_IN = 2


# --- ends ---

cdef inline void syndrome_set(
        Syndrome* syndrome, uint64_t address, bint s2, unsigned int cls) noexcept nogil:
    syndrome.address = address
    syndrome.s2 = s2
    syndrome.cls = cls
    syndrome.ttrnw = False


cdef inline void fault_record(
        uint64_t* w, int event, const Request* request, unsigned int access,
        const Syndrome* syndrome) noexcept nogil:
    """The 32-byte record of an event (7.3); what is not said is 0."""
    memset(w, 0, 32)
    event_set_id(w, event)
    event_set_streamid(w, request.sid)
    if event == EVENT_F_STREAM_DISABLED:
        return
    if request.ssid != NO_SSID:
        event_set_ssv(w, event != EVENT_C_BAD_SUBSTREAMID)
        event_set_substreamid(w, request.ssid)
    if event == EVENT_F_STE_FETCH or event == EVENT_F_CD_FETCH or event == EVENT_F_WALK_EABT:
        event_set_fetchaddr(w, syndrome.address & ~<uint64_t>7)
    if event >= EVENT_F_WALK_EABT:
        event_set_pnu(w, (access & ACCESS_PRIV) != 0)
        event_set_ind(w, (access & ACCESS_INSTR) != 0)
        event_set_rnw(w, (access & ACCESS_WRITE) == 0)
        event_set_s2(w, syndrome.s2)
        event_set_class(w, syndrome.cls)
        event_set_inputaddr(w, request.iova)
        if event != EVENT_F_WALK_EABT and syndrome.s2:
            event_set_ipa(w, syndrome.address & ~<uint64_t>0xFFF)
            event_set_ttrnw(w, syndrome.ttrnw)


cdef inline void end_fault(
        const Hw* hw, const Request* request, Outcome* outcome, int event, unsigned int access,
        unsigned int terminate, const Syndrome* syndrome) noexcept nogil:
    """Terminate or stall with a fault (5.5): A, R and S decide how, and CR2.RECINVSID."""
    cdef bint recorded = (terminate & TERMINATE_R) != 0
    cdef unsigned int action = ACTION_ABORT if terminate & TERMINATE_A else ACTION_RAZ_WI
    if event == EVENT_C_BAD_STREAMID and not cr2_recinvsid(hw.cr2):
        recorded = False
    if terminate & TERMINATE_S:
        action = ACTION_STALL
        recorded = True
    if not cr0_eventqen(hw.cr0):
        recorded = False
    end_unmapped(outcome, action, 0, 0, 0, 0)
    outcome.fault = event
    outcome.event = event if recorded else 0
    fault_record(outcome.record, event, request, access, syndrome)
    if terminate & TERMINATE_S:
        event_set_stall(outcome.record, True)


cdef inline void end_unmapped(
        Outcome* outcome, unsigned int action, uint64_t pa, unsigned int perm, unsigned int attr,
        unsigned int sh) noexcept nogil:
    """An outcome without a translation and without a fault; the rest is filled in later."""
    outcome.pa = pa
    outcome.ipa = 0
    outcome.action = action
    outcome.event = 0
    outcome.fault = 0
    outcome.perm = perm
    outcome.perm_s1 = perm
    outcome.level = NO_LEVEL
    outcome.page_lg2 = 0
    outcome.attr = attr
    outcome.sh = sh
    outcome.asid = 0
    outcome.vmid = 0
    outcome.stag = 0
    outcome.ng = 0
    outcome.contiguous = 0
    outcome.stage = 0


# --- tables of one stage ---

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


cdef inline uint64_t descriptor(const Half* half, uint64_t raw, bint simple) noexcept nogil:
    """A descriptor in host order, from its bytes in memory; the reverse is the same."""
    return swap64(le64(raw)) if not simple and half.swap else le64(raw)


cdef inline int descend(
        const Half* half, Port* port, int kind, uint64_t ia, Descent* at,
        bint simple) noexcept nogil:
    """Follow ordinary tables from at.table down to level 3; their addresses are physical.

    `simple`: descriptors are little-endian and hold the address in place.
    """
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
            status = fetch8(port, kind, level_of(half, at.shift), at.address, &at.raw)
            if status:
                return status
            at.raw = le64(at.raw)
            base = port.window.base
            span = port.window.span
            data = port.window.data
        d = descriptor(half, at.raw, simple)
        if unlikely((d & expected) != 3):
            return AT_OTHER
        if not simple and next_table(d, half) & half.over:
            return AT_OTHER
        at.above = at.table
        at.tables_above = at.tables
        at.table = d & half.low_address if simple else next_table(d, half)
        at.tables |= d
        at.shift -= stride
    return AT_PAGES


cdef inline void leaf_none(Leaf* leaf) noexcept nogil:
    """Nothing was found."""
    leaf.d = leaf.desired = leaf.tables = leaf.entry = leaf.address = 0
    leaf.shift = leaf.perm = 0
    leaf.level = NO_LEVEL


cdef inline int find_leaf(
        const Half* half, Port* port, int kind, uint64_t ia, Descent* at, Leaf* leaf,
        bint simple) noexcept nogil:
    """Walk from at.table to the leaf of an address: 0, an event, or a negative stop."""
    cdef uint64_t d = 0
    cdef int status = descend(half, port, kind, ia, at, simple)
    leaf.level = 3
    leaf.entry = at.address
    if status == AT_PAGES:
        leaf.entry = entry_address(half, at.table, ia, at.shift)
        status = fetch8(port, kind, 3, leaf.entry, &d)
        d = descriptor(half, le64(d), simple)
    elif status == AT_OTHER:
        status = FETCH_OK
        d = descriptor(half, at.raw, simple)
        leaf.level = level_of(half, at.shift)
    if unlikely(status):
        return EVENT_F_WALK_EABT if status == FETCH_ABORT else status
    status = descriptor_kind(d, leaf.level, half.blocks)
    if unlikely(status != DESC_LEAF):
        return EVENT_F_TRANSLATION if status == DESC_INVALID else EVENT_F_ADDR_SIZE
    leaf.tables = at.tables & half.keep
    leaf.d = d
    leaf.shift = at.shift
    return 0


cdef inline int update(
        const Half* half, Port* port, int kind, Leaf* leaf) noexcept nogil:
    """Write leaf.desired in place of leaf.d, unless that changed: 0, CHANGED, an event, a stop."""
    cdef uint64_t expected = le64(descriptor(half, leaf.d, False))
    cdef uint64_t found = 0
    cdef int status = port_swap8(
        port, kind, leaf.level, leaf.entry, expected,
        le64(descriptor(half, leaf.desired, False)), &found)
    if status:
        return EVENT_F_WALK_EABT if status == FETCH_ABORT else status
    if found != expected:
        return CHANGED
    leaf.d = leaf.desired
    return 0


cdef inline int read_descriptor(
        const Half* half, Port* port, int kind, unsigned int shift, Leaf* leaf,
        uint64_t* table) noexcept nogil:
    """Read the descriptor at leaf.entry, in a table whose entries cover 2^shift bytes.

    0 with a leaf; AT_TABLE with the next table; an event; or a negative stop.
    """
    cdef uint64_t d = 0
    cdef int status
    leaf.level = level_of(half, shift)
    leaf.shift = shift
    status = fetch8(port, kind, leaf.level, leaf.entry, &d)
    if unlikely(status):
        return EVENT_F_WALK_EABT if status == FETCH_ABORT else status
    d = leaf.d = descriptor(half, le64(d), False)
    status = descriptor_kind(d, leaf.level, half.blocks)
    if status == DESC_LEAF:
        return 0
    if status == DESC_INVALID:
        return EVENT_F_TRANSLATION
    table[0] = next_table(d, half)
    return EVENT_F_ADDR_SIZE if table[0] & half.over else AT_TABLE


# --- stage 2 ---

cdef inline int stage2_fault(
        const Second* second, unsigned int need, bint dirty, bint for_walk,
        Leaf* leaf) noexcept nogil:
    """What a leaf of stage 2 gives: address size before access flag before permission."""
    cdef uint64_t d = leaf.d
    leaf.desired = d
    leaf.address = leaf_address(d, &second.half, leaf.shift)
    if leaf.address & second.half.over:
        return EVENT_F_ADDR_SIZE
    if not access_flag(d):
        if second.ha:
            leaf.desired = with_access_flag(d)
        elif not second.affd:
            return EVENT_F_ACCESS
    if second.hd and clean_s2(d):
        d = dirty_s2(d)
    leaf.perm = stage2_permitted(d, second.xnx)
    if not leaf.perm & need or for_walk and second.ptw and stage2_device(d, second.fwb):
        return EVENT_F_PERMISSION
    if dirty and d != leaf.d:
        leaf.desired = dirty_s2(leaf.desired)
    return 0


cdef inline int stage2_end(
        const Second* second, Port* port, unsigned int need, bint dirty, bint for_walk,
        Leaf* leaf) noexcept nogil:
    """What a leaf of stage 2 gives, and its hardware update: 0, an event, CHANGED or a stop."""
    cdef int event = stage2_fault(second, need, dirty, for_walk, leaf)
    cdef int status
    if (second.ha and (event == 0 or event == EVENT_F_PERMISSION)
            and unlikely(leaf.desired != leaf.d)):
        status = update(&second.half, port, FETCH_S2TT_UPDATE, leaf)
        if status:
            return status
    return event


cdef inline int stage2_answer(
        int event, uint64_t ipa, unsigned int cls, const Leaf* leaf, uint64_t* address,
        Syndrome* syndrome) noexcept nogil:
    """How a stage-2 walk ends for whoever needed it: the address, or the syndrome of the event."""
    if likely(event == 0):
        address[0] = leaf.address | ipa & low_mask(leaf.shift)
        return 0
    if event == CHANGED:
        event = EVENT_F_WALK_EABT
    syndrome_set(syndrome, leaf.entry if event == EVENT_F_WALK_EABT else ipa, True, cls)
    syndrome.ttrnw = event == EVENT_F_PERMISSION and cls == CLASS_TT
    return event


cdef inline int stage2_once(
        const Second* second, Port* port, uint64_t ipa, unsigned int need, bint dirty,
        bint for_walk, Leaf* leaf, bint simple) noexcept nogil:
    cdef const Half* half = &second.half
    cdef Descent at
    cdef int event
    leaf_none(leaf)
    if ipa & half.range_mask:
        return EVENT_F_TRANSLATION
    at.table = first_table(half, ipa)
    at.tables = 0
    at.shift = half.shift
    event = find_leaf(half, port, FETCH_S2TT, ipa, &at, leaf, simple)
    return event if event else stage2_end(second, port, need, dirty, for_walk, leaf)


cdef inline int stage2(
        const Second* second, Port* port, uint64_t ipa, unsigned int need, bint dirty,
        unsigned int cls, Leaf* leaf, uint64_t* address, Syndrome* syndrome) noexcept nogil:
    """Translate an IPA by stage 2: 0, an event with its syndrome, or a negative stop.

    `need` is the PERM_ bit that the access needs, `dirty` says that it writes, `cls` what it
    is for: for a table walk or a CD fetch S2PTW counts.
    """
    cdef int event = CHANGED, _try
    cdef bint for_walk = cls != CLASS_IN
    for _try in range(RETRIES):
        if likely(second.simple):
            event = stage2_once(second, port, ipa, need, dirty, for_walk, leaf, True)
        else:
            event = stage2_once(second, port, ipa, need, dirty, for_walk, leaf, False)
        if likely(event != CHANGED):
            break
    return stage2_answer(event, ipa, cls, leaf, address, syndrome)


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
    int index             # of the CD, or STAGE1_BYPASS
    uint32_t sid
    uint32_t ssid
    uint64_t l1std_at     # addresses; NOWHERE where there is no such structure
    uint64_t ste_at
    uint64_t l1cd_at
    uint64_t cd_at
    uint64_t l1cd_ipa     # under stage 2, what was translated into l1cd_at and cd_at
    uint64_t cd_ipa
    uint64_t l1std
    uint64_t l1cd
    uint64_t[8] ste
    uint64_t[8] cd
    Context context


cdef inline bint same_place(
        const Memo* memo, Port* port, uint64_t ipa, uint64_t address) noexcept nogil:
    """Stage 2 still puts a structure where it was."""
    cdef Leaf leaf
    cdef Syndrome syndrome
    cdef uint64_t found = 0
    return stage2(&memo.context.second, port, ipa, PERM_PR, False, CLASS_CD, &leaf, &found,
                  &syndrome) == 0 and found == address


cdef inline bint memo_holds(
        Port* port, const Memo* memo, uint32_t sid, uint32_t ssid) noexcept nogil:
    """The memo is this pair's, and memory still holds what it was decoded from."""
    if not memo.whole or memo.sid != sid or memo.ssid != ssid:
        return False
    if memo.l1std_at != NOWHERE and not unchanged8(port, memo.l1std_at, memo.l1std):
        return False
    if not unchanged64(port, memo.ste_at, memo.ste):
        return False
    if memo.l1cd_at != NOWHERE:
        if memo.context.second.on and not same_place(memo, port, memo.l1cd_ipa, memo.l1cd_at):
            return False
        if not unchanged8(port, memo.l1cd_at, memo.l1cd):
            return False
    if memo.cd_at != NOWHERE:
        if memo.context.second.on and not same_place(memo, port, memo.cd_ipa, memo.cd_at):
            return False
        return unchanged64(port, memo.cd_at, memo.cd)
    return True


cdef inline int cd_place(
        const Hw* hw, Port* port, const Memo* memo, uint64_t* address,
        Syndrome* syndrome) noexcept nogil:
    """Where an L1CD or a CD lies in memory: stage 2 says, else the address must be an output."""
    cdef Leaf leaf
    if memo.context.second.on:
        return stage2(&memo.context.second, port, address[0], PERM_PR, False, CLASS_CD, &leaf,
                      address, syndrome)
    syndrome.address = address[0]
    return EVENT_F_CD_FETCH if address[0] & hw.oas_over else 0


cdef inline int ste_fetch(
        const Hw* hw, Port* port, uint32_t sid, Memo* memo, Syndrome* syndrome) noexcept nogil:
    """Find and read the STE of a StreamID, into memo.ste: 0, an event or a negative stop."""
    cdef uint64_t address = 0
    cdef int kind, status, event
    memo.l1std_at = NOWHERE
    kind = stream_first(hw, sid, &address)
    if kind == 0:
        return EVENT_C_BAD_STREAMID
    syndrome.address = address
    if address & hw.oas_over:
        return EVENT_F_STE_FETCH
    if kind == FETCH_L1STD:
        memo.l1std_at = address
        status = fetch8(port, FETCH_L1STD, NO_LEVEL, address, &memo.l1std)
        if status:
            return EVENT_F_STE_FETCH if status == FETCH_ABORT else status
        event = l1std_next(hw, memo.l1std, sid, &address)
        if event:
            return event
        syndrome.address = address
        if address & hw.oas_over:
            return EVENT_F_STE_FETCH
    memo.ste_at = address
    status = fetch64(port, FETCH_STE, address, memo.ste)
    return EVENT_F_STE_FETCH if status == FETCH_ABORT else status


cdef inline int ste_decode(const Hw* hw, Memo* memo) noexcept nogil:
    """What an STE says of stage 2 and overrides: 0, an event, or SILENT_ABORT."""
    cdef Context* context = &memo.context
    cdef int event
    context.second.on = False
    if not ste_v(memo.ste):
        return EVENT_C_BAD_STE
    if ste_aborts(memo.ste):
        return SILENT_ABORT
    event = ste_check(hw, memo.ste)
    if event == 0 and ste_stage2(memo.ste):
        event = stage2_decode(hw, memo.ste, &context.second)
    if event:
        return event
    ste_overrides(hw, memo.ste, context)
    context.vmid = ste_vmid(hw, memo.ste)
    context.asid = 0
    context.world = WORLD_NS_EL1
    context.simple = False
    return 0


cdef inline int ste_substream(
        const Hw* hw, Memo* memo, uint32_t ssid) noexcept nogil:
    """Which CD, into memo.index: 0 or an event.  From here on stage 2 translates."""
    cdef int event = substream(hw, memo.ste, ssid, &memo.index)
    memo.context.second.on = event == 0 and ste_stage2(memo.ste)
    return event


cdef inline int cd_fetch(
        const Hw* hw, Port* port, Memo* memo, Syndrome* syndrome) noexcept nogil:
    """Find and read the CD of memo.index, into memo.cd: 0, an event or a negative stop."""
    cdef uint64_t address = 0
    cdef int status, event
    memo.l1cd_at = NOWHERE
    if cd_first(hw, memo.ste, <uint32_t>memo.index, &address) == FETCH_L1CD:
        memo.l1cd_ipa = address
        event = cd_place(hw, port, memo, &address, syndrome)
        if event:
            return event
        memo.l1cd_at = address
        syndrome.address = address
        status = fetch8(port, FETCH_L1CD, NO_LEVEL, address, &memo.l1cd)
        if status:
            return EVENT_F_CD_FETCH if status == FETCH_ABORT else status
        event = l1cd_next(hw, memo.ste, memo.l1cd, <uint32_t>memo.index, &address)
        if event:
            return event
    memo.cd_ipa = address
    event = cd_place(hw, port, memo, &address, syndrome)
    if event:
        return event
    memo.cd_at = address
    syndrome.address = address
    status = fetch64(port, FETCH_CD, address, memo.cd)
    return EVENT_F_CD_FETCH if status == FETCH_ABORT else status


cdef inline int lookup(
        const Hw* hw, Port* port, uint32_t sid, uint32_t ssid, Memo* memo,
        Syndrome* syndrome) noexcept nogil:
    """Fetch and decode what a (StreamID, SubstreamID) pair meets, into memo.context.

    0; or an event, SILENT_ABORT, or a negative stop.  memo.index is that of the CD, or
    STAGE1_BYPASS, and then the context holds the STE's overrides and stage 2 alone.
    """
    cdef int event
    memo.whole = False
    memo.sid = sid
    memo.ssid = ssid
    memo.context.second.on = False
    syndrome_set(syndrome, 0, False, CLASS_IN)
    event = ste_fetch(hw, port, sid, memo, syndrome)
    if event == 0:
        event = ste_decode(hw, memo)
    if event == 0:
        event = ste_substream(hw, memo, ssid)
    if event == 0 and memo.index == STAGE1_BYPASS:
        memo.l1cd_at = memo.cd_at = NOWHERE
    elif event == 0:
        event = cd_fetch(hw, port, memo, syndrome)
        if event == 0:
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
        const Context* context, unsigned int upper, uint64_t d, uint64_t tables,
        bint simple) noexcept nogil:
    """permitted(), looked up; what the hardware may mark dirty counts as writable."""
    if not simple and context.hd and clean_s1(d):
        d = dirty_s1(d)
    return permissions[context.regime * 32 + upper * 16 + leaf_permissions(d, tables)]


cdef inline int leaf_fault(
        const Context* context, const Half* half, unsigned int upper, unsigned int access,
        Leaf* leaf, bint simple) noexcept nogil:
    """What a leaf gives: address size before access flag before permission."""
    cdef uint64_t address = leaf_address(leaf.d, half, leaf.shift)
    leaf.desired = leaf.d
    if address & half.over:
        return EVENT_F_ADDR_SIZE
    if not access_flag(leaf.d):
        if context.ha:
            leaf.desired = with_access_flag(leaf.d)
        elif not context.affd:
            return EVENT_F_ACCESS
    leaf.address = address
    leaf.perm = leaf_perm(context, upper, leaf.d, leaf.tables, simple)
    if not leaf.perm & context.need[access]:
        return EVENT_F_PERMISSION
    if not simple and context.hd and access & ACCESS_WRITE and clean_s1(leaf.d):
        leaf.desired = dirty_s1(leaf.desired)
    return 0


cdef inline int half_fault(
        const Context* context, uint64_t va, unsigned int upper,
        unsigned int access) noexcept nogil:
    """F_TRANSLATION where no table translates the address: its half, its range, E0PD."""
    cdef const Half* half = &context.half[upper]
    if not half.enabled or not in_range(va, half.range_mask, upper):
        return EVENT_F_TRANSLATION
    if not (half.unprivileged or effective_access(context, access) & ACCESS_PRIV):
        return EVENT_F_TRANSLATION
    return 0


cdef inline int walk_once(
        const Context* context, Port* port, uint64_t va, unsigned int access, Leaf* leaf,
        bint simple) noexcept nogil:
    cdef unsigned int upper = half_of(va, context.two_ttbs)
    cdef const Half* half = &context.half[upper]
    cdef Descent at
    cdef int event, status
    leaf_none(leaf)
    event = half_fault(context, va, upper, access)
    if event:
        return event
    at.table = half.table
    at.tables = 0
    at.shift = half.shift
    event = find_leaf(half, port, FETCH_TT, va & half.index_mask, &at, leaf, simple)
    if unlikely(event):
        return event
    event = leaf_fault(context, half, upper, access, leaf, simple)
    if unlikely(context.ha) and leaf.desired != leaf.d and (
            event == 0 or event == EVENT_F_PERMISSION):
        status = update(half, port, FETCH_TT_UPDATE, leaf)
        if status:
            return status
    return event


cdef inline int walk(
        const Context* context, Port* port, uint64_t va, unsigned int access, Leaf* leaf,
        Syndrome* syndrome, bint simple) noexcept nogil:
    """Walk the tables of one address: 0, an event, or a negative stop.

    `access` is the device's own, `simple` is context.simple.
    """
    cdef int event = walk_once(context, port, va, access, leaf, simple)
    cdef int _try
    if unlikely(event == CHANGED):
        for _try in range(RETRIES - 1):
            event = walk_once(context, port, va, access, leaf, simple)
            if event != CHANGED:
                break
        else:
            event = EVENT_F_WALK_EABT
    if unlikely(event > 0):
        syndrome_set(syndrome, leaf.entry, False,
                     CLASS_TT if event == EVENT_F_WALK_EABT else CLASS_IN)
    return event


# --- nested: every descriptor of stage 1 lies at an IPA ---

cdef inline int update_nested(
        const Context* context, Port* port, const Half* half, Leaf* leaf, Leaf* outer,
        uint64_t ipa, Syndrome* syndrome) noexcept nogil:
    """Update a stage-1 descriptor: stage 2, whose leaf `outer` maps it, must let it be written."""
    cdef const Second* second = &context.second
    cdef int status
    if not outer.perm & PERM_PW:
        syndrome_set(syndrome, ipa, True, CLASS_TT)
        return EVENT_F_PERMISSION
    if second.hd and clean_s2(outer.d):
        outer.desired = dirty_s2(outer.d)
        status = update(&second.half, port, FETCH_S2TT_UPDATE, outer)
        if status:
            syndrome_set(syndrome, outer.entry, True, CLASS_TT)
            return status
    status = update(half, port, FETCH_TT_UPDATE, leaf)
    if status:
        syndrome_set(syndrome, leaf.entry, False, CLASS_TT)
    return status


cdef inline int stage1_end(
        const Context* context, Port* port, const Half* half, unsigned int upper,
        unsigned int access, Leaf* leaf, Leaf* outer, uint64_t ipa,
        Syndrome* syndrome) noexcept nogil:
    """What a leaf of stage 1 gives, and its hardware update: 0, an event, CHANGED or a stop.

    Under stage 2 the leaf lies at `ipa`, which `outer` maps.
    """
    cdef int event = leaf_fault(context, half, upper, access, leaf, False)
    cdef int status = 0
    if not context.ha or leaf.desired == leaf.d:
        return event
    if context.second.on:
        if event == 0 or event == EVENT_F_PERMISSION and outer.perm & PERM_PW:
            status = update_nested(context, port, half, leaf, outer, ipa, syndrome)
    elif event == 0 or event == EVENT_F_PERMISSION:
        status = update(half, port, FETCH_TT_UPDATE, leaf)
        if status:
            syndrome_set(syndrome, leaf.entry, False, CLASS_TT)
    return status if status else event


cdef inline int walk_nested_once(
        const Context* context, Port* port, uint64_t va, unsigned int access, Leaf* leaf,
        Syndrome* syndrome) noexcept nogil:
    cdef unsigned int upper = half_of(va, context.two_ttbs)
    cdef const Half* half = &context.half[upper]
    cdef Leaf outer
    cdef uint64_t ia = va & half.index_mask
    cdef uint64_t table = half.table, tables = 0, ipa
    cdef unsigned int shift = half.shift
    cdef int event
    leaf_none(leaf)
    leaf_none(&outer)
    syndrome_set(syndrome, 0, False, CLASS_IN)
    event = half_fault(context, va, upper, access)
    if event:
        return event
    while True:
        ipa = entry_address(half, table, ia, shift)
        event = stage2(&context.second, port, ipa, PERM_PR, False, CLASS_TT, &outer, &leaf.entry,
                       syndrome)
        if event:
            return event
        event = read_descriptor(half, port, FETCH_TT, shift, leaf, &table)
        if event != AT_TABLE:
            break
        tables |= leaf.d
        shift -= half.stride
    if event:
        if event == EVENT_F_WALK_EABT:
            syndrome_set(syndrome, leaf.entry, False, CLASS_TT)
        return event
    leaf.tables = tables & half.keep
    return stage1_end(context, port, half, upper, access, leaf, &outer, ipa, syndrome)


cdef inline int walk_nested(
        const Context* context, Port* port, uint64_t va, unsigned int access, Leaf* leaf,
        Syndrome* syndrome) noexcept nogil:
    """Walk the stage-1 tables of one address, each descriptor through stage 2."""
    cdef int event = CHANGED, _try
    for _try in range(RETRIES):
        event = walk_nested_once(context, port, va, access, leaf, syndrome)
        if likely(event != CHANGED):
            return event
    return EVENT_F_WALK_EABT  # the syndrome is that of the last update


# --- the scalar driver ---

cdef inline void end_disabled(const Hw* hw, const Request* request,
                              Outcome* outcome) noexcept nogil:
    """SMMUEN=0: GBPA decides, and nothing is recorded (6.3.14)."""
    if hw.gbpa_abort or request.iova & hw.oas_over:
        end_unmapped(outcome, ACTION_ABORT, 0, 0, 0, 0)
    else:
        end_unmapped(
            outcome, ACTION_DISABLED, request.iova, 0x3F, hw.gbpa_attr, hw.gbpa_sh)


cdef inline void end_translated(
        const Context* context, const Half* half, uint64_t ia, const Leaf* leaf,
        Outcome* outcome) noexcept nogil:
    """A successful stage 1 as if it were the only one."""
    outcome.pa = leaf.address | (ia & low_mask(leaf.shift))
    outcome.ipa = 0
    outcome.action = ACTION_OK
    outcome.event = 0
    outcome.fault = 0
    outcome.level = leaf.level
    outcome.page_lg2 = leaf.shift
    outcome.attr = stage1_attr(context.attr, mair_byte(context.mair, leaf.d))
    outcome.sh = shareability(outcome.attr, leaf_sh(leaf.d, half))
    outcome.ng = not_global(leaf.d) and context.two_ttbs  # no ASID: nG is ignored
    outcome.contiguous = contiguous(leaf.d)
    outcome.stag = 0


cdef inline void finish_stage1(
        const Hw* hw, const Request* request, const Context* context, int event,
        const Leaf* leaf, const Syndrome* syndrome, Outcome* outcome) noexcept nogil:
    """The outcome of a request that stage 1 alone translates."""
    if unlikely(event):
        end_fault(
            hw, request, outcome, event, effective_access(context, request.access),
            TERMINATE_A | TERMINATE_R if event == EVENT_F_WALK_EABT else context.terminate,
            syndrome)
    else:
        end_translated(context, &context.half[half_of(request.iova, context.two_ttbs)],
                       request.iova, leaf, outcome)
    outcome.stage = 1
    outcome.asid = context.asid
    outcome.vmid = context.vmid
    outcome.perm = outcome.perm_s1 = admitted(context, leaf.perm)


cdef inline void finish_stage2(
        const Hw* hw, const Request* request, const Context* context, bint nested, int event,
        const Leaf* first, const Leaf* leaf, uint64_t ipa, uint64_t pa,
        const Syndrome* syndrome, Outcome* outcome) noexcept nogil:
    """The outcome of a request that stage 2 translates, after stage 1 if `nested`.

    `first` and `leaf` are what each stage found; `leaf` has no permissions if stage 1 failed.
    """
    cdef const Second* second = &context.second
    cdef const Half* half
    cdef unsigned int attr = context.attr, sh = context.sh
    cdef unsigned int perm = 0, perm_s1 = 0
    cdef unsigned int terminate
    if event:
        if event == EVENT_F_WALK_EABT:
            terminate = TERMINATE_A | TERMINATE_R
        else:
            terminate = second.terminate if syndrome.s2 else context.terminate
        end_fault(hw, request, outcome, event, effective_access(context, request.access),
                  terminate, syndrome)
        if event == EVENT_F_PERMISSION and syndrome.cls == CLASS_IN:
            perm_s1 = first.perm
            perm = first.perm & leaf.perm if syndrome.s2 else first.perm
    else:
        if nested:
            half = &context.half[half_of(request.iova, context.two_ttbs)]
            end_translated(context, half, request.iova, first, outcome)
            attr = outcome.attr
            sh = leaf_sh(first.d, half)
        else:
            end_unmapped(outcome, ACTION_OK, 0, 0, 0, 0)
            outcome.contiguous = contiguous(leaf.d)
        outcome.pa = pa
        outcome.ipa = ipa
        if not nested or leaf.shift < first.shift:
            outcome.level = leaf.level
            outcome.page_lg2 = leaf.shift
        outcome.attr = stage2_attr(leaf.d, second.fwb, attr)
        outcome.sh = shareability(outcome.attr, combine_sh(sh, leaf_sh(leaf.d, &second.half)))
        perm_s1 = first.perm
        perm = first.perm & leaf.perm
    outcome.stage = 3 if nested else 2
    outcome.asid = context.asid
    outcome.vmid = context.vmid
    outcome.perm = admitted(context, perm)
    outcome.perm_s1 = admitted(context, perm_s1)


cdef inline int translate_stage1(
        const Hw* hw, Port* port, const Request* request, const Context* context,
        Outcome* outcome) noexcept nogil:
    """Translate one request in a decoded context without stage 2.

    0, or a negative stop without an outcome.
    """
    cdef Leaf leaf
    cdef Syndrome syndrome
    cdef int event
    if likely(context.simple):
        event = walk(context, port, request.iova, request.access, &leaf, &syndrome, True)
    else:
        event = walk(context, port, request.iova, request.access, &leaf, &syndrome, False)
    if event < 0:
        return event
    finish_stage1(hw, request, context, event, &leaf, &syndrome, outcome)
    return 0


cdef inline int untranslatable(
        const Hw* hw, const Request* request, Syndrome* syndrome) noexcept nogil:
    """Stage 1 bypassed: the address must fit IAS or OAS, which are equal."""
    syndrome_set(syndrome, 0, False, CLASS_IN)
    return EVENT_F_ADDR_SIZE if request.iova & hw.oas_over else 0


cdef inline void end_untranslatable(
        const Hw* hw, const Request* request, const Context* context, const Syndrome* syndrome,
        Outcome* outcome) noexcept nogil:
    """That fault aborts and is recorded, whatever the configuration says."""
    end_fault(hw, request, outcome, EVENT_F_ADDR_SIZE, effective_access(context, request.access),
              TERMINATE_A | TERMINATE_R, syndrome)
    outcome.stage = 2 if context.second.on else 0
    outcome.vmid = context.vmid if context.second.on else 0


cdef inline int translate_stage2(
        const Hw* hw, Port* port, const Request* request, const Context* context, bint nested,
        Outcome* outcome) noexcept nogil:
    """Translate one request in a decoded context with stage 2, after stage 1 if `nested`."""
    cdef Leaf first, leaf
    cdef Syndrome syndrome
    cdef uint64_t ipa = request.iova, pa = 0
    cdef int event = 0
    leaf_none(&leaf)
    leaf_none(&first)
    if nested:
        event = walk_nested(context, port, request.iova, request.access, &first, &syndrome)
        ipa = first.address | (request.iova & low_mask(first.shift))
    else:
        first.perm = 0x3F
        if untranslatable(hw, request, &syndrome):
            end_untranslatable(hw, request, context, &syndrome, outcome)
            return 0
    if event == 0:
        event = stage2(&context.second, port, ipa, context.need[request.access],
                       (request.access & ACCESS_WRITE) != 0, CLASS_IN, &leaf, &pa, &syndrome)
    if event < 0:
        return event
    finish_stage2(hw, request, context, nested, event, &first, &leaf, ipa, pa, &syndrome, outcome)
    return 0


cdef inline void end_lookup(
        const Hw* hw, const Request* request, const Context* context, int event,
        const Syndrome* syndrome, Outcome* outcome) noexcept nogil:
    """Configuration lookup failed; stage 2 of a CD fetch is the one part that may be told how."""
    if event == SILENT_ABORT:
        end_unmapped(outcome, ACTION_ABORT, 0, 0, 0, 0)
    elif context.second.on and syndrome.s2:
        end_fault(hw, request, outcome, event, effective_access(context, request.access),
                  TERMINATE_A | TERMINATE_R if event == EVENT_F_WALK_EABT
                  else context.second.terminate, syndrome)
        outcome.stage = 2
        outcome.vmid = context.vmid
    else:
        end_fault(hw, request, outcome, event, 0, TERMINATE_A | TERMINATE_R, syndrome)


cdef inline int translate_known(
        const Hw* hw, Port* port, const Request* request, const Memo* memo,
        Outcome* outcome) noexcept nogil:
    """Translate one request in a decoded context: 0, or a negative stop."""
    cdef const Context* context = &memo.context
    cdef Syndrome syndrome
    if unlikely(context.second.on):
        return translate_stage2(
            hw, port, request, context, memo.index != STAGE1_BYPASS, outcome)
    if likely(memo.index != STAGE1_BYPASS):
        return translate_stage1(hw, port, request, context, outcome)
    if untranslatable(hw, request, &syndrome):
        end_untranslatable(hw, request, context, &syndrome, outcome)
    else:
        end_unmapped(outcome, ACTION_BYPASS, request.iova, 0x3F, context.attr, context.sh)
    return 0


cdef inline int translate_one(
        const Hw* hw, Port* port, const Request* request, Memo* memo,
        Outcome* outcome) noexcept nogil:
    """Translate one request: 0, or a negative stop that leaves no outcome.

    Two calls that run at once, or inside each other, do not share a memo.
    """
    cdef Syndrome syndrome
    cdef int event
    if not cr0_smmuen(hw.cr0):
        end_disabled(hw, request, outcome)
        return 0
    if not memo_holds(port, memo, request.sid, request.ssid):
        event = lookup(hw, port, request.sid, request.ssid, memo, &syndrome)
        if unlikely(event):
            if event < 0:
                return event
            end_lookup(hw, request, &memo.context, event, &syndrome, outcome)
            return 0
    return translate_known(hw, port, request, memo, outcome)


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
    bint[BLOCK] other            # slot is not that of the request
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
    cdef Syndrome syndrome
    if not (slot.block and slot.sid == sid and slot.ssid == ssid):
        if slot.block == block:
            return NULL
        near_forget(near)
        slot.sid = sid
        slot.ssid = ssid
        slot.walks = (
            lookup(hw, port, sid, ssid, &slot.memo, &syndrome) == 0
            and slot.memo.index != STAGE1_BYPASS and not slot.memo.context.second.on
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
            block.other[i] = slot == NULL
            if slot == NULL or not slot.walks:
                block.entry[i] = NULL
                block.slot[i] = &slots[0] if slot == NULL else slot
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
                # the memo of a slot that walks is in use by the rest of the block
                status = batch_scalar(
                    hw, port, &memo if slot.walks or block.other[i] else &slot.memo, batch,
                    start + i)
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
