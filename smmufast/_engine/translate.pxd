"""The chain that the drivers run: configuration lookup, both stages, and its end as an outcome.

Sections: IHI 0070 3.2-3.5, 5.5 (fault control), 7.3 (event records), 15 (translation
procedure).  translate_one is the scalar driver: one request, every fetch through a port; a port
that records makes a trace of it.  cached.pxd is the scalar driver with caches, batch.pxd has the
batch drivers, and walk.pxd the driver of walks whose fetches the host performs.

What leads from one fetch to the next is in two kinds of functions, which the scalar driver and
walk.pxd share: those that say where to read next (ste_first, cd_way, stage2_begin, stage1_begin,
..._down), and those that say what was read (..._read).  Neither reads.

Stage 2 stands in three places: before the fetches of L1CD and CD (cd_place), before each
fetch of a stage-1 descriptor (walk_steps), and after stage 1 (translate_stage2).
"""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int8_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from smmufast._facts.bits cimport apart, le64, likely, load64, low_mask, prefetch, swap64, unlikely
from smmufast._rules.config cimport (
    STAGE1_BYPASS, TERMINATE_A, TERMINATE_R, TERMINATE_S, TERMINATE_SID, admitted, cd_decode,
    cd_first, effective_access, l1cd_next, l1std_next, stage2_decode, ste_aborts, ste_check,
    ste_overrides, ste_stage2, ste_vmid, stream_first, substream, why_of_half,
)
from smmufast._facts.layout cimport *
from smmufast._engine.memory cimport (
    FETCH_ABORT, FETCH_OK, Port, Ram, fetch8, fetch64, port_open, port_swap8, unchanged8,
    unchanged64,
)
from smmufast._engine.tlb cimport (
    ENTRY_CLEAN1, ENTRY_CLEAN2, ENTRY_CONTIGUOUS, CachesC, Entry, Table, tlb_fill, tlb_probe,
    walk_fill, walk_probe,
)
from smmufast._rules.scope cimport KIND_COMBINED, KIND_S1, KIND_S2
from smmufast._facts.hw cimport Hw
from smmufast._facts.types cimport (
    ACCESS_INSTR, ACCESS_PRIV, ACCESS_WRITE, ACTION_ABORT, ACTION_BYPASS, ACTION_DISABLED,
    ACTION_OK, ACTION_RAZ_WI, ACTION_STALL, FETCH_CD, FETCH_L1CD, FETCH_L1STD, FETCH_S2TT,
    FETCH_S2TT_UPDATE, FETCH_STE, FETCH_TT, FETCH_TT_UPDATE, NO_LEVEL, NO_SSID, PERM_PR, PERM_PW,
    BatchC, ColumnC, Context, Half, Outcome, Request, Second,
)
from smmufast._rules.vmsa cimport (
    ATTR_WB, DESC_INVALID, DESC_LEAF, DESC_RESERVED, DESC_TABLE, TABLE, access_flag, clean_s1,
    clean_s2, combine_sh, contiguous, descriptor_kind, dirty_s1, dirty_s2, entry_address,
    first_table, fitting_lg2, half_of, in_range, leaf_address, leaf_permissions, leaf_sh, mair_byte,
    next_table, no_translation, not_global, output_fits, permitted, shareability, stage1_attr,
    stage2_attr, stage2_device, stage2_permitted, with_access_flag,
)
from smmufast._facts.why cimport *


# How a walk may go on, beside 0, why it was refused (WHY_...) and negative stops.
cdef enum:
    CHANGED = 0x10000   # a descriptor changed between its read and its update: walk again
    AT_TABLE = 0x20000  # the descriptor is that of a table, or there is a table to read
    RETRIES = 8         # walks that lose that race before the update counts as failed


# What comes next in a translation.
cdef enum:
    ENDED               # nothing: the outcome is there
    TO_STAGE1           # stage 1 walks
    TO_STAGE2           # stage 2 translates Stages.ipa


cdef extern from *:
    """
    #define smmufast_nowhere UINT64_MAX /* no structure lies there */
    """
    const uint64_t NOWHERE "smmufast_nowhere"


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


# The caches that a chain goes through, and for whom.  Where a chain takes a View*, NULL is a
# chain without caches.
cdef struct View:
    CachesC* c
    uint32_t sid       # of the transaction
    uint32_t ssid
    bint stage2_only   # stage 1 does not translate
    bint nt            # blocks with nT are not cached
    uint64_t begun     # Overtaking.commands when the transaction began
    const uint64_t* commands   # now


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


# S7.3.4-2
cdef inline uint64_t fetch_reported(const Hw* hw, uint64_t address) noexcept nogil:
    """FetchAddr of a record (7.3.4): bits beyond OAS are 0, but v3.0 has all of them (3.4.3)."""
    return address & ~<uint64_t>7 & (~<uint64_t>0 if hw.minor == 0 else ~hw.oas_over)


# S3.4.1-8, S3.12.1-2, S5.2-30, S7.3-1, S7.3-2, S7.3-3, S7.3-4, S7.3-5, S7.3-6, S7.3.9-4, S7.3.12-4,
# S7.3.13-4, S7.3.13-5, S13.4.1-2, V8.8.2-1, L-5
cdef inline void fault_record(
        const Hw* hw, uint64_t* w, int event, const Request* request, unsigned int access,
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
        event_set_fetchaddr(w, fetch_reported(hw, syndrome.address))
    if event >= EVENT_F_WALK_EABT:
        event_set_pnu(w, (access & ACCESS_PRIV) != 0)
        event_set_ind(w, (access & ACCESS_INSTR) != 0)
        event_set_rnw(w, (access & ACCESS_WRITE) == 0)
        event_set_s2(w, syndrome.s2)
        event_set_class(w, syndrome.cls)
        event_set_inputaddr(w, request.iova)
        if event != EVENT_F_WALK_EABT and syndrome.s2:
            event_set_ipa(w, syndrome.address & ~(hw.oas_over | 0xFFF))
            event_set_ttrnw(w, syndrome.ttrnw)


# S3.3.2-22, S3.12-3, S3.12.1-1, S3.12.1-3, S3.12.2-2, S5.1.1-2, S5.5-2, S5.5-3, S5.5-4,
# S6.3.12.2-1, S7.3.3-3
cdef inline void end_fault(
        const Hw* hw, const Request* request, Outcome* outcome, int why, unsigned int access,
        unsigned int terminate, const Syndrome* syndrome) noexcept nogil:
    """Terminate or stall with a fault (5.5): A, R and S decide how, and CR2.RECINVSID."""
    cdef int event = why_event(why)
    cdef bint recorded = (terminate & TERMINATE_R) != 0
    cdef unsigned int action = ACTION_ABORT if terminate & TERMINATE_A else ACTION_RAZ_WI
    if (event == EVENT_C_BAD_STREAMID
            and not (cr2_recinvsid(hw.cr2) or terminate & TERMINATE_SID)):
        recorded = False
    if terminate & TERMINATE_S:
        action = ACTION_STALL  # whoever holds it records it
    if not cr0_eventqen(hw.cr0):
        recorded = False
    end_refused(outcome, why)
    outcome.action = action
    outcome.event = event if recorded else 0
    fault_record(hw, outcome.record, event, request, access, syndrome)
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
    outcome.why = 0
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


cdef inline void end_refused(Outcome* outcome, int why) noexcept nogil:
    """Abort for a reason, which may be a fault; nothing is recorded yet."""
    end_unmapped(outcome, ACTION_ABORT, 0, 0, 0, 0)
    outcome.fault = why_event(why)
    outcome.why = why


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


cdef inline int why_of_stage(int why, int kind) noexcept nogil:
    """The reason of the stage that a kind of fetch belongs to, from that of stage 1."""
    return why + ((kind == FETCH_S2TT or kind == FETCH_S2TT_UPDATE) << 8)


cdef inline int why_no_leaf(unsigned int descriptor, int kind) noexcept nogil:
    """Why a descriptor that is no leaf and no good table ends a walk."""
    if descriptor == DESC_INVALID:
        return why_of_stage(WHY_S1_INVALID, kind)
    return why_of_stage(
        WHY_S1_RESERVED if descriptor == DESC_RESERVED else WHY_S1_TABLE, kind)


cdef inline int level_of(const Half* half, unsigned int shift) noexcept nogil:
    """The level whose entries cover 2^shift bytes."""
    return 3 - <int>((shift - half.granule) // half.stride)


# S3.4-24, S5-1, V8.2.5.2-4
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
        if unlikely((d & expected) != TABLE):
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
    """Walk from at.table to the leaf of an address: 0, why not, or a negative stop."""
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
        return why_of_stage(WHY_S1_ABORT, kind) if status == FETCH_ABORT else status
    status = descriptor_kind(d, leaf.level, half.blocks)
    if unlikely(status != DESC_LEAF):
        return why_no_leaf(status, kind)
    leaf.tables = at.tables & half.keep
    leaf.d = d
    leaf.shift = at.shift
    return 0


cdef inline uint64_t update_expected(const Half* half, const Leaf* leaf) noexcept nogil:
    """What an update of a descriptor expects there, as a little-endian number."""
    return le64(descriptor(half, leaf.d, False))


cdef inline uint64_t update_desired(const Half* half, const Leaf* leaf) noexcept nogil:
    """What it stores."""
    return le64(descriptor(half, leaf.desired, False))


cdef inline int update_read(
        const Half* half, int kind, int status, uint64_t found, Leaf* leaf) noexcept nogil:
    """How an update ended that found this there: 0, CHANGED, why not, or a negative stop."""
    if status:
        return why_of_stage(WHY_S1_UPDATE_ABORT, kind) if status == FETCH_ABORT else status
    if found != update_expected(half, leaf):
        return CHANGED
    leaf.d = leaf.desired
    return 0


# S3.13-2, S3.13.4-1, S3.15-4, S4.7.3-17, V8.5.1.2-2, V8.5.2.1-4, V8.5.3-1, V8.5.4-1, V8.5.5-1
cdef inline int update(
        const Half* half, Port* port, int kind, Leaf* leaf) noexcept nogil:
    """Write leaf.desired in place of leaf.d, unless that changed: 0, CHANGED, why not, a stop."""
    cdef uint64_t found = 0
    cdef int status = port_swap8(
        port, kind, leaf.level, leaf.entry, update_expected(half, leaf),
        update_desired(half, leaf), &found)
    return update_read(half, kind, status, found, leaf)


# Where a walk goes on: at a table whose entries cover 2^shift bytes, below others.
cdef struct Place:
    uint64_t table
    uint64_t tables        # hierarchical attributes above it
    unsigned int shift


cdef inline int descriptor_read(
        const Half* half, int kind, int status, uint64_t raw, Leaf* leaf,
        uint64_t* table) noexcept nogil:
    """What a descriptor is, read at leaf.entry as a little-endian number.

    0 with a leaf; AT_TABLE with the next table; why it is neither; or a negative stop.
    """
    cdef uint64_t d
    if unlikely(status):
        return why_of_stage(WHY_S1_ABORT, kind) if status == FETCH_ABORT else status
    d = leaf.d = descriptor(half, le64(raw), False)
    status = descriptor_kind(d, leaf.level, half.blocks)
    if status == DESC_LEAF:
        return 0
    if status == DESC_TABLE:
        table[0] = next_table(d, half)
        if not table[0] & half.over:
            return AT_TABLE
    return why_no_leaf(status, kind)


cdef inline void descriptor_at(
        const Half* half, uint64_t address, unsigned int shift, Leaf* leaf) noexcept nogil:
    """The descriptor to be read next lies here, in a table whose entries cover 2^shift bytes."""
    leaf.entry = address
    leaf.level = level_of(half, shift)
    leaf.shift = shift


# S3.4.3-8, S16.7.4-3
cdef inline int read_descriptor(
        const Half* half, Port* port, int kind, Leaf* leaf, uint64_t* table) noexcept nogil:
    """Read the descriptor at leaf.entry; as descriptor_read()."""
    cdef uint64_t raw = 0
    cdef int status = fetch8(port, kind, leaf.level, leaf.entry, &raw)
    return descriptor_read(half, kind, status, raw, leaf, table)


# --- stage 2 ---

# S2.5-2, S5.2-72, S5.2-73, S13.1.1-4, V8.6.3-2
cdef inline int stage2_denies(
        const Second* second, unsigned int need, bint for_walk, const Leaf* leaf) noexcept nogil:
    """F_PERMISSION: the access is not permitted, or S2PTW keeps table walks out of Device."""
    if not leaf.perm & need:
        return WHY_S2_PERMISSION
    return WHY_S2_DEVICE if (
        for_walk and second.ptw and stage2_device(leaf.d, second.fwb)) else 0


# S3.4-17, S3.13.1-2, S5.2-67, S5.2-71, S7.3.22-3, V8.4.2.1-1, V8.15.4-4
cdef inline int stage2_fault(
        const Second* second, uint64_t ipa, unsigned int need, bint dirty, bint for_walk,
        Leaf* leaf) noexcept nogil:
    """What a leaf of stage 2 gives: address size before access flag before permission."""
    cdef uint64_t d = leaf.d
    cdef int why
    leaf.desired = d
    leaf.address = leaf_address(d, &second.half, leaf.shift)
    if not output_fits(leaf.address, &second.half, leaf.shift, ipa):
        return WHY_S2_OUTPUT
    if not access_flag(d):
        if second.ha:
            leaf.desired = with_access_flag(d)
        elif not second.affd:
            return WHY_S2_AF
    if second.hd and clean_s2(d):
        d = dirty_s2(d)
    leaf.perm = stage2_permitted(d, second.xnx)
    why = stage2_denies(second, need, for_walk, leaf)
    if why:
        return why
    if dirty and d != leaf.d:
        leaf.desired = dirty_s2(leaf.desired)
    return 0


cdef inline bint stage2_updates(
        const Second* second, int why, const Leaf* leaf) noexcept nogil:
    """The leaf of stage 2 is to be updated, whose stage2_fault() was this."""
    return (leaf.desired != leaf.d and second.ha
            and (why == 0 or why_event(why) == EVENT_F_PERMISSION))


# V8.5.1.2-3
cdef inline int stage2_end(
        const Second* second, Port* port, uint64_t ipa, unsigned int need, bint dirty,
        bint for_walk, Leaf* leaf) noexcept nogil:
    """What a leaf of stage 2 gives, and its hardware update: 0, why not, CHANGED or a stop."""
    cdef int why = stage2_fault(second, ipa, need, dirty, for_walk, leaf)
    cdef int status
    if unlikely(stage2_updates(second, why, leaf)):
        status = update(&second.half, port, FETCH_S2TT_UPDATE, leaf)
        if status:
            return status
    return why


# S3.12-9, S3.12-10, S3.12-11, S7.3-91, S7.3.12-3, S7.3.13-3, V8.1-3, V8.15.1.3-2, V8.15.4.1-1
cdef inline int stage2_answer(
        int why, uint64_t ipa, unsigned int cls, const Leaf* leaf, uint64_t* address,
        Syndrome* syndrome) noexcept nogil:
    """How a stage-2 walk ends for whoever needed it: the address, or the syndrome of a fault."""
    cdef int event
    if likely(why == 0):
        address[0] = leaf.address | ipa & low_mask(leaf.shift)
        return 0
    if why == CHANGED:
        why = WHY_S2_UPDATE_RACE
    event = why_event(why)
    syndrome_set(syndrome, leaf.entry if event == EVENT_F_WALK_EABT else ipa, True, cls)
    syndrome.ttrnw = event == EVENT_F_PERMISSION and cls == CLASS_TT
    return why


# S3.4-13, S3.4-14, S3.4.1-7, V8.1.7-6, V8.1.10-1
cdef inline int stage2_once(
        const Second* second, Port* port, uint64_t ipa, unsigned int need, bint dirty,
        bint for_walk, Leaf* leaf, bint simple) noexcept nogil:
    cdef const Half* half = &second.half
    cdef Descent at
    cdef int event
    leaf_none(leaf)
    if ipa & half.range_mask:
        return WHY_S2T0SZ_RANGE
    at.table = first_table(half, ipa)
    at.tables = 0
    at.shift = half.shift
    event = find_leaf(half, port, FETCH_S2TT, ipa, &at, leaf, simple)
    return event if event else stage2_end(second, port, ipa, need, dirty, for_walk, leaf)


cdef inline uint8_t said(uint64_t d) noexcept nogil:
    """What a cached translation keeps of its leaf: attributes, SH, nG and Contiguous."""
    return <uint8_t>(pte_s2_memattr(d) | pte_s1_sh(d) << 4 | pte_s1_ng(d) << 6
                     | pte_s1_contiguous(d) << 7)


cdef inline uint64_t as_said(uint8_t kept) noexcept nogil:
    """A leaf descriptor that says the same."""
    cdef uint64_t d = pte_s1_set_contiguous(0, kept >> 7)
    return pte_s2_set_memattr(pte_s1_set_sh(pte_s1_set_ng(d, kept >> 6), kept >> 4), kept)


cdef inline bint keeps_what_is_read(const View* view) noexcept nogil:
    """No invalidation came meanwhile, from a callback or during a resumable walk."""
    return view.begun == view.commands[0]


# S3.17-12
cdef inline void keep_table(
        View* view, const Context* context, const Half* half, unsigned int kind,
        uint64_t address, unsigned int shift, uint64_t table, uint64_t tables) noexcept nogil:
    """Let a walk cache have a table that translates 2^shift bytes around an address."""
    cdef Table e
    if not keeps_what_is_read(view):
        return
    memset(&e, 0, sizeof(e))
    e.prefix = address >> shift
    e.table = table
    e.bits = tables
    e.sid = view.sid
    e.ssid = view.ssid
    e.asid = context.asid if kind & KIND_S1 else 0
    e.vmid = context.vmid
    e.kind = kind
    e.world = context.world
    e.lg2 = shift
    e.level = level_of(half, shift - half.stride)
    e.granule = half.granule
    walk_fill(view.c, &e)


cdef inline const Table* cached_table(
        View* view, const Context* context, const Half* half, unsigned int kind,
        uint64_t address) noexcept nogil:
    """The deepest table on the walk of an address that is cached, below the first; NULL if none."""
    cdef const Table* e = walk_probe(
        view.c, kind, context.world, context.vmid, context.asid, address)
    if e == NULL or e.granule != half.granule or e.lg2 > half.shift:
        return NULL
    return e


# S3.3-2, S3.17-8, S3.20.1-3, S3.21.1.2-3, S16.2.2-3, V8.1.7-5, V8.2.1-4, V8.5.1.1-2, V8.5.1.2-4,
# V8.15.1.4-1, V8.16-1
cdef inline void keep_entry(
        View* view, const Context* context, unsigned int kind, uint64_t input,
        const Half* half, const Leaf* first, const Leaf* second, uint64_t ipa,
        uint64_t pa) noexcept nogil:
    """Let the TLB have a translation, by what the leaves of its stages say."""
    cdef Entry e
    cdef unsigned int lg2
    cdef uint64_t within
    if not keeps_what_is_read(view):
        return
    if view.nt and (kind & KIND_S1 and no_translation(first.d, first.level)
                    or kind & KIND_S2 and no_translation(second.d, second.level)):
        return
    memset(&e, 0, sizeof(e))
    e.kind = kind
    e.sid = view.sid
    e.ssid = view.ssid
    e.vmid = context.vmid
    e.world = context.world
    e.perm1 = e.perm2 = 0x3F
    # of stage 2 alone: as for write-back, whatever the stream or stage 1 makes of it
    e.attr = ATTR_WB
    if kind & KIND_S1:
        e.attr = stage1_attr(context.attr, mair_byte(context.mair, first.d))
        e.sh = leaf_sh(first.d, half)
        e.aset = context.aset
        e.asid = context.asid
        e.is_global = not not_global(first.d)
        e.lg2 = fitting_lg2(half, first.shift)
        e.lg2_s1 = first.shift
        e.level = e.level_s1 = first.level
        e.granule_s1 = half.granule
        e.perm1 = first.perm
        e.extra[0] = said(first.d)
        if context.hd and clean_s1(first.d):
            e.flags |= ENTRY_CLEAN1
    if kind & KIND_S2:
        e.lg2_s2 = second.shift
        e.level_s2 = second.level
        e.granule_s2 = context.second.half.granule
        e.perm2 = second.perm
        e.attr = stage2_attr(second.d, context.second.fwb, e.attr)
        e.sh = combine_sh(e.sh, leaf_sh(second.d, &context.second.half))
        e.extra[1] = said(second.d)
        if context.second.hd and clean_s2(second.d):
            e.flags |= ENTRY_CLEAN2
        lg2 = fitting_lg2(&context.second.half, second.shift)
        if kind == KIND_S2 or lg2 < e.lg2:
            e.lg2 = lg2
            e.level = second.level
    if (contiguous(second.d, second.shift) if kind == KIND_S2
            else contiguous(first.d, first.shift)):
        e.flags |= ENTRY_CONTIGUOUS
    e.sh = shareability(e.attr, e.sh)
    within = low_mask(e.lg2)
    e.page = input >> e.lg2
    e.address = pa & ~within
    if kind == KIND_COMBINED:
        e.ipa = ipa & ~within
    tlb_fill(view.c, &e)


cdef inline bint keeps_stage2(const View* view, unsigned int cls) noexcept nogil:
    """Translations by stage 2 alone have entries of their own, which answer for this purpose."""
    return view.c.split or view.stage2_only and cls == CLASS_IN


cdef inline int stage2_begin(
        View* view, const Context* context, uint64_t ipa, unsigned int need, bint dirty,
        unsigned int cls, Leaf* leaf, Place* at) noexcept nogil:
    """Where a walk of stage 2 begins: AT_TABLE; or 0 or why not, if nothing is to be read."""
    cdef const Second* second = &context.second
    cdef const Half* half = &second.half
    cdef const Table* found
    cdef const Entry* e
    leaf_none(leaf)
    if ipa & half.range_mask:
        return WHY_S2T0SZ_RANGE
    at.table = first_table(half, ipa)
    at.tables = 0
    at.shift = half.shift
    if view == NULL:
        return AT_TABLE
    if keeps_stage2(view, cls):
        e = tlb_probe(view.c, KIND_S2, context.world, context.vmid, 0, 0, ipa)
        if e != NULL and not (dirty and e.flags & ENTRY_CLEAN2):
            leaf.d = as_said(e.extra[1])
            leaf.address = e.address
            leaf.shift = e.lg2
            leaf.level = e.level
            leaf.perm = e.perm2
            leaf.entry = NOWHERE
            return stage2_denies(second, need, cls != CLASS_IN, leaf)
    found = cached_table(view, context, half, KIND_S2, ipa)
    if found != NULL:
        at.table = found.table
        at.shift = found.lg2 - half.stride
    return AT_TABLE


cdef inline void stage2_down(
        View* view, const Context* context, uint64_t ipa, Place* at) noexcept nogil:
    """A table of stage 2 was found, at.table: go down to it."""
    cdef const Half* half = &context.second.half
    if view != NULL:
        keep_table(view, context, half, KIND_S2, ipa, at.shift, at.table, 0)
    at.shift -= half.stride


cdef inline void stage2_keep(
        View* view, const Context* context, uint64_t ipa, unsigned int cls,
        const Leaf* leaf) noexcept nogil:
    """A walk of stage 2 came to its end and permits the access."""
    if view != NULL and keeps_stage2(view, cls):
        keep_entry(view, context, KIND_S2, ipa, &context.second.half, NULL, leaf, ipa,
                   leaf.address)


# S3.21.1-5
cdef inline int stage2_cached(
        View* view, const Context* context, Port* port, uint64_t ipa, unsigned int need,
        bint dirty, unsigned int cls, Leaf* leaf) noexcept nogil:
    cdef const Second* second = &context.second
    cdef const Half* half = &second.half
    cdef Place at
    cdef int event = stage2_begin(view, context, ipa, need, dirty, cls, leaf, &at)
    if event != AT_TABLE:
        return event
    while True:
        descriptor_at(half, entry_address(half, at.table, ipa, at.shift), at.shift, leaf)
        event = read_descriptor(half, port, FETCH_S2TT, leaf, &at.table)
        if event != AT_TABLE:
            break
        stage2_down(view, context, ipa, &at)
    if event == 0:
        event = stage2_end(second, port, ipa, need, dirty, cls != CLASS_IN, leaf)
    if event == 0:
        stage2_keep(view, context, ipa, cls, leaf)
    return event


cdef inline int stage2(
        View* view, const Context* context, Port* port, uint64_t ipa, unsigned int need,
        bint dirty, unsigned int cls, Leaf* leaf, uint64_t* address,
        Syndrome* syndrome) noexcept nogil:
    """Translate an IPA by stage 2: 0, why not with its syndrome, or a negative stop.

    `need` is the PERM_ bit that the access needs, `dirty` says that it writes, `cls` what it
    is for: for a table walk or a CD fetch S2PTW counts.
    """
    cdef const Second* second = &context.second
    cdef int event = CHANGED, _try
    cdef bint for_walk = cls != CLASS_IN
    for _try in range(RETRIES):
        if view != NULL:
            event = stage2_cached(view, context, port, ipa, need, dirty, cls, leaf)
        elif likely(second.simple):
            event = stage2_once(second, port, ipa, need, dirty, for_walk, leaf, True)
        else:
            event = stage2_once(second, port, ipa, need, dirty, for_walk, leaf, False)
        if likely(event != CHANGED):
            break
    return stage2_answer(event, ipa, cls, leaf, address, syndrome)


# --- configuration lookup (15.1) ---

# A decoded context and everything that was fetched for it.  It is a function of these, so as
# long as they are what memory holds it need not be decoded again.
cdef struct Memo:
    bint whole            # all of it belongs together
    uint64_t edition      # of the registers that it was decoded by
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
    uint64_t generation   # with caches: of the configuration that the handles belong to
    uint32_t ste_handle
    uint32_t cd_handle
    Context context


cdef inline bint same_place(
        const Memo* memo, Port* port, uint64_t ipa, uint64_t address) noexcept nogil:
    """Stage 2 still puts a structure where it was."""
    cdef Leaf leaf
    cdef Syndrome syndrome
    cdef uint64_t found = 0
    return stage2(NULL, &memo.context, port, ipa, PERM_PR, False, CLASS_CD, &leaf, &found,
                  &syndrome) == 0 and found == address


ctypedef bint (*SamePlace)(const Memo*, Port*, uint64_t, uint64_t) noexcept nogil


# S3.3.3-1, S16.2-1, L-2
cdef inline bint memo_holds(
        const Hw* hw, Port* port, const Memo* memo, uint32_t sid, uint32_t ssid) noexcept nogil:
    """The memo is this pair's, and registers and memory still hold what it was decoded from."""
    if (not memo.whole or memo.sid != sid or memo.ssid != ssid
            or memo.edition != hw.edition):
        return False
    if memo.l1std_at != NOWHERE and not unchanged8(port, memo.l1std_at, memo.l1std):
        return False
    if not unchanged64(port, memo.ste_at, memo.ste):
        return False
    if memo.l1cd_at != NOWHERE:
        if unlikely(memo.context.second.on) and not (<SamePlace>apart(<void*>same_place))(
                memo, port, memo.l1cd_ipa, memo.l1cd_at):
            return False
        if not unchanged8(port, memo.l1cd_at, memo.l1cd):
            return False
    if memo.cd_at != NOWHERE:
        if unlikely(memo.context.second.on) and not (<SamePlace>apart(<void*>same_place))(
                memo, port, memo.cd_ipa, memo.cd_at):
            return False
        return unchanged64(port, memo.cd_at, memo.cd)
    return True


cdef inline int output_fault(
        const Hw* hw, uint64_t address, int why, Syndrome* syndrome) noexcept nogil:
    """The reason, if a structure's address is no output address."""
    syndrome.address = address
    return why if address & hw.oas_over else 0


cdef inline int structure_read(int status, int why) noexcept nogil:
    """How the read of a structure ended: 0, the reason if it aborted, or a negative stop."""
    return why if status == FETCH_ABORT else status


cdef inline int ste_first(
        const Hw* hw, uint32_t sid, Memo* memo, Syndrome* syndrome) noexcept nogil:
    """Where the way to an STE begins: at memo.l1std_at, or if that is NOWHERE at memo.ste_at.

    0, or why not.
    """
    cdef uint64_t address = 0
    cdef int kind = stream_first(hw, sid, &address)
    memo.l1std_at = NOWHERE
    if kind == 0:
        return WHY_STREAM_BEYOND
    if kind == FETCH_L1STD:
        memo.l1std_at = address
        return output_fault(hw, address, WHY_L1STD_ADDRESS, syndrome)
    memo.ste_at = address
    return output_fault(hw, address, WHY_STE_ADDRESS, syndrome)


cdef inline int l1std_read(
        const Hw* hw, uint32_t sid, int status, Memo* memo, Syndrome* syndrome) noexcept nogil:
    """What memo.l1std says, which was read: memo.ste_at; 0, why not, or a negative stop."""
    cdef int why = structure_read(status, WHY_L1STD_ABORT)
    if why == 0:
        why = l1std_next(hw, memo.l1std, sid, &memo.ste_at)
    return why if why else output_fault(hw, memo.ste_at, WHY_STE_ADDRESS, syndrome)


cdef inline int ste_read(int status) noexcept nogil:
    """How the read of an STE ended: 0, why not, or a negative stop."""
    return structure_read(status, WHY_STE_ABORT)


# S3.2-5, S3.4.3-5, S3.4.3-10, S3.10.1-1, S5.1-4, S7.3.4-1, S7.3.4-91, S16.7.4-1
cdef inline int ste_fetch(
        const Hw* hw, Port* port, uint32_t sid, Memo* memo, Syndrome* syndrome) noexcept nogil:
    """Find and read the STE of a StreamID, into memo.ste: 0, why not or a negative stop."""
    cdef int why = ste_first(hw, sid, memo, syndrome)
    if why == 0 and memo.l1std_at != NOWHERE:
        why = l1std_read(
            hw, sid, fetch8(port, FETCH_L1STD, NO_LEVEL, memo.l1std_at, &memo.l1std), memo,
            syndrome)
    return why if why else ste_read(fetch64(port, FETCH_STE, memo.ste_at, memo.ste))


# S3.1-1, S3.3.2-1, S3.3.2-14, S5-2, S5.2-1, S5.2-28, S5.2-31, S5.2-53
cdef inline int ste_decode(const Hw* hw, Memo* memo) noexcept nogil:
    """What an STE says of stage 2 and overrides: 0, or why it serves no transaction."""
    cdef Context* context = &memo.context
    cdef int why
    context.second.on = False
    if not ste_v(memo.ste):
        return WHY_STE_V
    if ste_aborts(memo.ste):
        return WHY_STE_CONFIG
    why = ste_check(hw, memo.ste)
    if why == 0 and ste_stage2(memo.ste):
        why = stage2_decode(hw, memo.ste, &context.second)
    if why:
        return why
    ste_overrides(hw, memo.ste, context)
    context.vmid = ste_vmid(hw, memo.ste)
    context.asid = 0
    context.aset = 0
    context.two_ttbs = False
    context.world = WORLD_NS_EL1
    context.simple = False
    return 0


# S3.2-3, S3.3.2-13, S3.21.3-4
cdef inline int ste_substream(
        const Hw* hw, Memo* memo, uint32_t ssid) noexcept nogil:
    """Which CD, into memo.index: 0, or why none.  From here on stage 2 translates."""
    memo.context.second.on = ste_stage2(memo.ste)
    return substream(hw, memo.ste, ssid, &memo.index)


cdef inline bint cd_way(const Hw* hw, Memo* memo) noexcept nogil:
    """Where the way to the CD of memo.index begins, before stage 2: at memo.l1cd_ipa; or, then
    this is False, at memo.cd_ipa."""
    cdef uint64_t address = 0
    memo.l1cd_at = NOWHERE
    if cd_first(hw, memo.ste, <uint32_t>memo.index, &address) == FETCH_L1CD:
        memo.l1cd_ipa = address
        return True
    memo.cd_ipa = address
    return False


cdef inline int l1cd_read(const Hw* hw, int status, Memo* memo) noexcept nogil:
    """What memo.l1cd says, which was read: memo.cd_ipa; 0, why not, or a negative stop."""
    if status:
        return structure_read(status, WHY_L1CD_ABORT)
    return l1cd_next(hw, memo.ste, memo.l1cd, <uint32_t>memo.index, &memo.cd_ipa)


cdef inline int cd_read(int status) noexcept nogil:
    """How the read of a CD ended: 0, why not, or a negative stop."""
    return structure_read(status, WHY_CD_ABORT)


cdef inline int cd_output(
        const Hw* hw, uint64_t ipa, int kind, uint64_t* address,
        Syndrome* syndrome) noexcept nogil:
    """Where an L1CD or a CD lies, FETCH_..., without stage 2: 0, or why not."""
    address[0] = ipa
    return output_fault(
        hw, ipa, WHY_L1CD_ADDRESS if kind == FETCH_L1CD else WHY_CD_ADDRESS, syndrome)


# S3.3.2-11, S3.3.2-12, S3.4-23, S3.4.3-2, S3.4.3-11, S3.13.2-3, S3.13.3.1-8, S5.2-15, S15-2,
# S15.1-101
cdef inline int cd_place(
        const Hw* hw, Port* port, View* view, const Memo* memo, uint64_t ipa, int kind,
        uint64_t* address, Syndrome* syndrome) noexcept nogil:
    """Where an L1CD or a CD lies in memory: stage 2 says, else the address must be an output."""
    cdef Leaf leaf
    cdef int why
    if memo.context.second.on:
        why = stage2(view, &memo.context, port, ipa, PERM_PR, False, CLASS_CD, &leaf, address,
                     syndrome)
        if why == 0:
            syndrome.address = address[0]
        return why
    return cd_output(hw, ipa, kind, address, syndrome)


# S5.3-4, S7.3.10-1, S7.3.10-2, S16.7.4-2
cdef inline int cd_fetch(
        const Hw* hw, Port* port, View* view, Memo* memo, Syndrome* syndrome) noexcept nogil:
    """Find and read the CD of memo.index, into memo.cd: 0, why not or a negative stop."""
    cdef int why = 0
    if cd_way(hw, memo):
        why = cd_place(hw, port, view, memo, memo.l1cd_ipa, FETCH_L1CD, &memo.l1cd_at,
                       syndrome)
        if why == 0:
            why = l1cd_read(
                hw, fetch8(port, FETCH_L1CD, NO_LEVEL, memo.l1cd_at, &memo.l1cd), memo)
    if why == 0:
        why = cd_place(hw, port, view, memo, memo.cd_ipa, FETCH_CD, &memo.cd_at, syndrome)
    return why if why else cd_read(fetch64(port, FETCH_CD, memo.cd_at, memo.cd))


cdef inline void lookup_open(
        const Hw* hw, uint32_t sid, uint32_t ssid, Memo* memo, Syndrome* syndrome) noexcept nogil:
    """Nothing of a pair is known yet."""
    memo.whole = False
    memo.edition = hw.edition
    memo.sid = sid
    memo.ssid = ssid
    memo.context.second.on = False
    syndrome_set(syndrome, 0, False, CLASS_IN)


# S3.3.2-16, S3.21.3-2, S7.2-1, S7.3.22-1, S15-1
cdef inline int lookup(
        const Hw* hw, Port* port, uint32_t sid, uint32_t ssid, Memo* memo,
        Syndrome* syndrome) noexcept nogil:
    """Fetch and decode what a (StreamID, SubstreamID) pair meets, into memo.context.

    0, why not, or a negative stop.  memo.index is that of the CD, or STAGE1_BYPASS, and then the
    context holds the STE's overrides and stage 2 alone.
    """
    cdef int why
    lookup_open(hw, sid, ssid, memo, syndrome)
    why = ste_fetch(hw, port, sid, memo, syndrome)
    if why == 0:
        why = ste_decode(hw, memo)
    if why == 0:
        why = ste_substream(hw, memo, ssid)
    if why == 0 and memo.index == STAGE1_BYPASS:
        memo.l1cd_at = memo.cd_at = NOWHERE
    elif why == 0:
        why = cd_fetch(hw, port, NULL, memo, syndrome)
        if why == 0:
            why = cd_decode(hw, memo.ste, memo.cd, &memo.context)
    memo.whole = why == 0
    return why


# --- stage 1 (15.2) ---

cdef extern from *:
    """
    /* permitted() of every regime, half and leaf, filled in when the module is loaded. */
    static uint8_t smmufast_permissions[64 * 2 * 16];
    /* The same by PERM_ bit: bit n says that leaf n has it. */
    static uint16_t smmufast_leaves[64 * 2 * 6];
    """
    uint8_t* permissions "smmufast_permissions"
    uint16_t* permitted_leaves "smmufast_leaves"


cdef inline void fill_permissions() noexcept nogil:
    cdef unsigned int regime, upper, leaf, bit
    for regime in range(64):
        for upper in range(2):
            for leaf in range(16):
                permissions[regime * 32 + upper * 16 + leaf] = permitted(leaf, regime, upper)
                for bit in range(6):
                    if permitted(leaf, regime, upper) >> bit & 1:
                        permitted_leaves[regime * 12 + upper * 6 + bit] |= 1 << leaf


# S3.13.3.1-4, V8.4.1.2.6-1, V8.5.2.1-3, V8.5.2.1-7, V8.5.2.2-1, V8.15.5.1-1
cdef inline unsigned int leaf_perm(
        const Context* context, unsigned int upper, uint64_t d, uint64_t tables,
        bint simple) noexcept nogil:
    """permitted(), looked up; what the hardware may mark dirty counts as writable."""
    if not simple and context.hd and clean_s1(d):
        d = dirty_s1(d)
    return permissions[context.regime * 32 + upper * 16 + leaf_permissions(d, tables)]


# S3.13.1-1, S3.13.2-1, S3.13.3.1-5, S3.13.3.1-6, S3.21.1.2-1, S5.4-13, S5.4-14, S7.3.14-1,
# S7.3.15-1, S7.3.16-1, S7.3.22-2, V8.1.7-3, V8.5.1.1-1, V8.5.1.2-1, V8.15.1.2-1, V8.15.4-3,
# V8.15.4-5
cdef inline int leaf_fault(
        const Context* context, const Half* half, uint64_t va, unsigned int upper,
        unsigned int access, Leaf* leaf, bint simple) noexcept nogil:
    """What a leaf gives: address size before access flag before permission."""
    cdef uint64_t address = leaf_address(leaf.d, half, leaf.shift)
    leaf.desired = leaf.d
    if not output_fits(address, half, leaf.shift, va):
        return WHY_S1_OUTPUT
    if not access_flag(leaf.d):
        if context.ha:
            leaf.desired = with_access_flag(leaf.d)
        elif not context.affd:
            return WHY_S1_AF
    leaf.address = address
    leaf.perm = leaf_perm(context, upper, leaf.d, leaf.tables, simple)
    if not leaf.perm & context.need[access]:
        return WHY_S1_PERMISSION
    if not simple and context.hd and access & ACCESS_WRITE and clean_s1(leaf.d):
        leaf.desired = dirty_s1(leaf.desired)
    return 0


# S2.5-1, S3.4-6, S5.4-9, S5.4-28, S7.3.13-1, V8.2.4-2, V8.2.4.1-1, V8.15.4-1
cdef inline int half_fault(
        const Context* context, uint64_t va, unsigned int upper,
        unsigned int access) noexcept nogil:
    """F_TRANSLATION where no table translates the address: its half, its range, E0PD."""
    cdef const Half* half = &context.half[upper]
    if not half.enabled:
        return why_of_half(WHY_EPD0, upper)
    if not in_range(va, half.range_mask, upper):
        return why_of_half(WHY_T0SZ_RANGE, upper)
    if not (half.unprivileged or effective_access(context, access) & ACCESS_PRIV):
        return why_of_half(WHY_E0PD0, upper)
    return 0


cdef inline int walk_once(
        const Context* context, Port* port, uint64_t va, unsigned int access, Leaf* leaf,
        bint simple) noexcept nogil:
    cdef unsigned int upper = half_of(va, context.two_ttbs)
    # opaque, or its place is computed again at every use
    cdef const Half* half = <const Half*>apart(<void*>&context.half[upper])
    cdef Descent at
    cdef int why, status
    leaf_none(leaf)
    why = half_fault(context, va, upper, access)
    if why:
        return why
    at.table = half.table
    at.tables = 0
    at.shift = half.shift
    why = find_leaf(half, port, FETCH_TT, va & half.index_mask, &at, leaf, simple)
    if unlikely(why):
        return why
    why = leaf_fault(context, half, va, upper, access, leaf, simple)
    if unlikely(context.ha) and leaf.desired != leaf.d and (
            why == 0 or why_event(why) == EVENT_F_PERMISSION):
        status = update(half, port, FETCH_TT_UPDATE, leaf)
        if status:
            return status
    return why


# S3.13-4, S7.3.12-1, S7.3.13-2, V8.15.1.3-1
cdef inline int walk(
        const Context* context, Port* port, uint64_t va, unsigned int access, Leaf* leaf,
        Syndrome* syndrome, bint simple) noexcept nogil:
    """Walk the tables of one address: 0, why not, or a negative stop.

    `access` is the device's own, `simple` is context.simple.
    """
    cdef int why = walk_once(context, port, va, access, leaf, simple)
    cdef int _try
    if unlikely(why == CHANGED):
        for _try in range(RETRIES - 1):
            why = walk_once(context, port, va, access, leaf, simple)
            if why != CHANGED:
                break
        else:
            why = WHY_S1_UPDATE_RACE
    if unlikely(why > 0):
        syndrome_set(syndrome, leaf.entry, False,
                     CLASS_TT if why_event(why) == EVENT_F_WALK_EABT else CLASS_IN)
    return why


# --- nested: every descriptor of stage 1 lies at an IPA ---

# What is to be done before a descriptor of stage 1 is written.
cdef enum:
    WRITE_NOW         # nothing
    WRITE_DENIED      # it cannot be: stage 2 forbids it
    WRITE_THROUGH     # stage 2 is walked for a write
    WRITE_OUTER       # the leaf of stage 2 is marked dirty


cdef inline int update_way(const Second* second, const Leaf* outer) noexcept nogil:
    """How a descriptor of stage 1 is written that `outer`, a leaf of stage 2, maps."""
    if not outer.perm & PERM_PW:
        return WRITE_DENIED
    if outer.entry == NOWHERE and second.hd:
        return WRITE_THROUGH  # from the TLB, which does not say where the leaf lies
    return WRITE_OUTER if second.hd and clean_s2(outer.d) else WRITE_NOW


cdef inline int update_denied(uint64_t ipa, Syndrome* syndrome) noexcept nogil:
    """Stage 2 does not let the descriptor at an IPA be written."""
    syndrome_set(syndrome, ipa, True, CLASS_TT)
    return WHY_S2_UPDATE


# S3.13.5-1, S3.13.5-2, S7.3.16-2, V8.5.2.1-8
cdef inline int update_nested(
        View* view, const Context* context, Port* port, const Half* half, Leaf* leaf, Leaf* outer,
        uint64_t ipa, Syndrome* syndrome) noexcept nogil:
    """Update a stage-1 descriptor: stage 2, whose leaf `outer` maps it, must let it be written."""
    cdef const Second* second = &context.second
    cdef uint64_t address = 0
    cdef int status, way = update_way(second, outer)
    if way == WRITE_DENIED:
        return update_denied(ipa, syndrome)
    if way == WRITE_THROUGH:
        status = stage2(view, context, port, ipa, PERM_PW, True, CLASS_TT, outer, &address,
                        syndrome)
        if status:
            syndrome.ttrnw = False
            return status
    elif way == WRITE_OUTER:
        outer.desired = dirty_s2(outer.d)
        status = update(&second.half, port, FETCH_S2TT_UPDATE, outer)
        if status:
            syndrome_set(syndrome, outer.entry, True, CLASS_TT)
            return status
    status = update(half, port, FETCH_TT_UPDATE, leaf)
    if status:
        syndrome_set(syndrome, leaf.entry, False, CLASS_TT)
    return status


cdef inline bint stage1_updates(
        const Context* context, int why, const Leaf* leaf, const Leaf* outer) noexcept nogil:
    """The leaf of stage 1 is to be updated, whose leaf_fault() was this.

    A page that does not permit the access is, if stage 2 lets it be written: `outer` maps it.
    """
    if leaf.desired == leaf.d or not context.ha:
        return False
    if why_event(why) != EVENT_F_PERMISSION:
        return why == 0
    return not context.second.on or outer.perm & PERM_PW


# S3.13.2-5, S3.13.5-3, S3.13.5-4, V8.15.5-2
cdef inline int stage1_end(
        View* view, const Context* context, Port* port, const Half* half, uint64_t va,
        unsigned int upper, unsigned int access, Leaf* leaf, Leaf* outer, uint64_t ipa,
        Syndrome* syndrome) noexcept nogil:
    """What a leaf of stage 1 gives, and its hardware update: 0, why not, CHANGED or a stop.

    Under stage 2 the leaf lies at `ipa`, which `outer` maps.
    """
    cdef int why = leaf_fault(context, half, va, upper, access, leaf, False)
    cdef int status
    if not stage1_updates(context, why, leaf, outer):
        return why
    if context.second.on:
        status = update_nested(view, context, port, half, leaf, outer, ipa, syndrome)
    else:
        status = update(half, port, FETCH_TT_UPDATE, leaf)
        if status:
            syndrome_set(syndrome, leaf.entry, False, CLASS_TT)
    return status if status else why


# S3.4.1-4, S4.4.2-3
cdef inline uint64_t canonical(
        const Half* half, uint64_t va, unsigned int upper) noexcept nogil:
    """An input address in range, as caches know it: bits beyond the range repeat the half."""
    return va & half.index_mask | (0 - <uint64_t>upper) & ~half.index_mask


cdef inline unsigned int stage1_kind(const Context* context) noexcept nogil:
    """Which tables of the walk caches are those of this walk."""
    return KIND_COMBINED if context.second.on else KIND_S1


cdef inline void stage1_begin(
        View* view, const Context* context, const Half* half, uint64_t va, Leaf* leaf, Place* at,
        Syndrome* syndrome) noexcept nogil:
    """Where a walk of stage 1 begins, of a canonical address."""
    cdef const Table* found
    leaf_none(leaf)
    syndrome_set(syndrome, 0, False, CLASS_IN)
    at.table = half.table
    at.tables = 0
    at.shift = half.shift
    if view != NULL:
        found = cached_table(view, context, half, stage1_kind(context), va)
        if found != NULL:
            at.table = found.table
            at.tables = found.bits
            at.shift = found.lg2 - half.stride


cdef inline void stage1_down(
        View* view, const Context* context, const Half* half, uint64_t va, uint64_t d,
        Place* at) noexcept nogil:
    """A table of stage 1 was found, at.table, that descriptor `d` names: go down to it."""
    at.tables |= d & half.keep
    if view != NULL:
        keep_table(
            view, context, half, stage1_kind(context), va, at.shift, at.table, at.tables)
    at.shift -= half.stride


cdef inline void stage1_stopped(int why, const Leaf* leaf, Syndrome* syndrome) noexcept nogil:
    """A descriptor of stage 1 is no leaf, or could not be read."""
    if why_event(why) == EVENT_F_WALK_EABT:
        syndrome_set(syndrome, leaf.entry, False, CLASS_TT)


# S3.3.2-18, S3.4.3-9, S3.13.4-2, S5.4.1-5, S7.3.12-2, S7.3.22-4, V8.2.1-1, V8.2.1-3, V8.2.3-1,
# V8.15.4-2
cdef inline int walk_steps_once(
        View* view, const Context* context, Port* port, uint64_t va, unsigned int access,
        Leaf* leaf, Syndrome* syndrome) noexcept nogil:
    cdef unsigned int upper = half_of(va, context.two_ttbs)
    cdef const Half* half = &context.half[upper]
    cdef Leaf outer
    cdef Place at
    cdef uint64_t ipa
    cdef int why
    leaf_none(&outer)
    va = canonical(half, va, upper)
    stage1_begin(view, context, half, va, leaf, &at, syndrome)
    while True:
        ipa = entry_address(half, at.table, va & half.index_mask, at.shift)
        if context.second.on:
            why = stage2(view, context, port, ipa, PERM_PR, False, CLASS_TT, &outer,
                         &leaf.entry, syndrome)
            if why:
                return why
        else:
            leaf.entry = ipa
        descriptor_at(half, leaf.entry, at.shift, leaf)
        why = read_descriptor(half, port, FETCH_TT, leaf, &at.table)
        if why != AT_TABLE:
            break
        stage1_down(view, context, half, va, leaf.d, &at)
    if why:
        stage1_stopped(why, leaf, syndrome)
        return why
    leaf.tables = at.tables
    return stage1_end(view, context, port, half, va, upper, access, leaf, &outer, ipa, syndrome)


cdef inline int race_lost(int why) noexcept nogil:
    """What a walk of stage 1 ends with that lost the race for an update for the last time."""
    return WHY_S1_UPDATE_RACE if why == CHANGED else why


# S3.3.2-25, S3.13-3, S5.2-6, V8.5.2.1-5
cdef inline int walk_steps(
        View* view, const Context* context, Port* port, uint64_t va, unsigned int access,
        Leaf* leaf, Syndrome* syndrome) noexcept nogil:
    """Walk the stage-1 tables of one address, each descriptor through stage 2 if there is one.

    half_fault() found nothing wrong with it.
    """
    cdef int why = CHANGED, _try
    for _try in range(RETRIES):
        why = walk_steps_once(view, context, port, va, access, leaf, syndrome)
        if likely(why != CHANGED):
            break
    return race_lost(why)  # the syndrome is that of the last update


# --- the scalar driver ---

# S3.3.2-15, S3.4-4, S3.11-3, S3.11-10, S3.11-15, S6.3.9.6-2, S6.3.9.6-7, S6.3.9.6-10, S7.2.1-7
cdef inline void end_disabled(const Hw* hw, const Request* request,
                              Outcome* outcome) noexcept nogil:
    """SMMUEN=0: GBPA decides, and nothing is recorded (6.3.14)."""
    if hw.gbpa_abort:
        end_refused(outcome, WHY_GBPA_ABORT)
    elif request.iova & hw.oas_over:
        end_refused(outcome, WHY_GBPA_ADDRESS)
    else:
        end_unmapped(
            outcome, ACTION_DISABLED, request.iova, 0x3F, hw.gbpa_attr, hw.gbpa_sh)


# S3.4-20, S3.4.2-1, S13.1-103, S13.4.3-1, V8.3.1.2-4
cdef inline void end_translated(
        const Context* context, const Half* half, uint64_t ia, const Leaf* leaf,
        Outcome* outcome) noexcept nogil:
    """A successful stage 1 as if it were the only one."""
    outcome.pa = leaf.address | (ia & low_mask(leaf.shift))
    outcome.ipa = 0
    outcome.action = ACTION_OK
    outcome.event = 0
    outcome.fault = 0
    outcome.why = 0
    outcome.level = leaf.level
    outcome.page_lg2 = fitting_lg2(half, leaf.shift)
    outcome.attr = stage1_attr(context.attr, mair_byte(context.mair, leaf.d))
    outcome.sh = shareability(outcome.attr, leaf_sh(leaf.d, half))
    outcome.ng = not_global(leaf.d) and context.two_ttbs  # no ASID: nG is ignored
    outcome.contiguous = contiguous(leaf.d, leaf.shift)
    outcome.stag = 0


# S3.3.2-19, S5.5-1, S5.5-101, S7.3.21-2
cdef inline void finish_stage1(
        const Hw* hw, const Request* request, const Context* context, int why,
        const Leaf* leaf, const Syndrome* syndrome, Outcome* outcome) noexcept nogil:
    """The outcome of a request that stage 1 alone translates."""
    if unlikely(why):
        end_fault(
            hw, request, outcome, why, effective_access(context, request.access),
            TERMINATE_A | TERMINATE_R if why_event(why) == EVENT_F_WALK_EABT else context.terminate,
            syndrome)
    else:
        end_translated(context, &context.half[half_of(request.iova, context.two_ttbs)],
                       request.iova, leaf, outcome)
    outcome.stage = 1
    outcome.asid = context.asid
    outcome.vmid = context.vmid
    outcome.perm = outcome.perm_s1 = admitted(context, leaf.perm)


# S3.3.2-20, S3.12-4, S3.12-8, S3.12.5-1, S5.5-103, S13.4-2, S13.5-1, S13.6.3-3, V8.4.3-2
cdef inline void finish_stage2(
        const Hw* hw, const Request* request, const Context* context, bint nested, int why,
        const Leaf* first, const Leaf* leaf, uint64_t ipa, uint64_t pa,
        const Syndrome* syndrome, Outcome* outcome) noexcept nogil:
    """The outcome of a request that stage 2 translates, after stage 1 if `nested`.

    `first` and `leaf` are what each stage found; `leaf` has no permissions if stage 1 failed.
    """
    cdef const Second* second = &context.second
    cdef const Half* half
    cdef unsigned int attr = context.attr, sh = context.sh
    cdef unsigned int perm = 0, perm_s1 = 0
    cdef unsigned int terminate, lg2
    if why:
        if why_event(why) == EVENT_F_WALK_EABT:
            terminate = TERMINATE_A | TERMINATE_R
        else:
            terminate = second.terminate if syndrome.s2 else context.terminate
        end_fault(hw, request, outcome, why, effective_access(context, request.access),
                  terminate, syndrome)
        if why_event(why) == EVENT_F_PERMISSION and syndrome.cls == CLASS_IN:
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
            outcome.contiguous = contiguous(leaf.d, leaf.shift)
        outcome.pa = pa
        outcome.ipa = ipa
        lg2 = fitting_lg2(&second.half, leaf.shift)
        if not nested or lg2 < outcome.page_lg2:
            outcome.level = leaf.level
            outcome.page_lg2 = lg2
        outcome.attr = stage2_attr(leaf.d, second.fwb, attr)
        outcome.sh = shareability(outcome.attr, combine_sh(sh, leaf_sh(leaf.d, &second.half)))
        perm_s1 = first.perm
        perm = first.perm & leaf.perm
    outcome.stage = 3 if nested else 2
    outcome.asid = context.asid
    outcome.vmid = context.vmid
    outcome.perm = admitted(context, perm)
    outcome.perm_s1 = admitted(context, perm_s1)


# S5.2-4, V8.2.12.2-1
cdef inline int translate_stage1(
        const Hw* hw, Port* port, const Request* request, const Context* context,
        Outcome* outcome) noexcept nogil:
    """Translate one request in a decoded context without stage 2.

    0, or a negative stop without an outcome.
    """
    cdef Leaf leaf
    cdef Syndrome syndrome
    cdef int why
    if likely(context.simple):
        why = walk(context, port, request.iova, request.access, &leaf, &syndrome, True)
    else:
        why = walk(context, port, request.iova, request.access, &leaf, &syndrome, False)
    if why < 0:
        return why
    finish_stage1(hw, request, context, why, &leaf, &syndrome, outcome)
    return 0


# S3.4-2, S3.4-5, S3.4-11, S3.4-12, V8.1.9-3
cdef inline int untranslatable(
        const Hw* hw, const Request* request, Syndrome* syndrome) noexcept nogil:
    """Stage 1 bypassed: the address must fit IAS or OAS, which are equal."""
    syndrome_set(syndrome, 0, False, CLASS_IN)
    return WHY_BYPASS_ADDRESS if request.iova & hw.oas_over else 0


# S3.4-9, S3.4-10, S7.3.14-2, V8.2.12.1-1
cdef inline void end_untranslatable(
        const Hw* hw, const Request* request, const Context* context, const Syndrome* syndrome,
        Outcome* outcome) noexcept nogil:
    """That fault aborts and is recorded, whatever the configuration says."""
    end_fault(hw, request, outcome, WHY_BYPASS_ADDRESS, effective_access(context, request.access),
              TERMINATE_A | TERMINATE_R, syndrome)
    outcome.stage = 2 if context.second.on else 0
    outcome.vmid = context.vmid if context.second.on else 0


cdef inline void end_bypass(
        const Request* request, const Context* context, Outcome* outcome) noexcept nogil:
    """Neither stage translates."""
    end_unmapped(outcome, ACTION_BYPASS, request.iova, 0x3F, context.attr, context.sh)


# --- through TLB entries, or by walks ---

# S3.13.3.1-10, V8.5.2.1-6
cdef inline bint usable(const Entry* e, unsigned int access) noexcept nogil:
    """A write through a page that is still clean walks again, to mark it dirty."""
    return not (access & ACCESS_WRITE and e.flags & (ENTRY_CLEAN1 | ENTRY_CLEAN2))


cdef inline void leaf_of(const Entry* e, unsigned int stage, Leaf* leaf) noexcept nogil:
    """What an entry says of one stage; its output address is that of the entry."""
    leaf.address = e.address
    if stage == 1:
        leaf.d = as_said(e.extra[0])
        leaf.shift = e.lg2_s1
        leaf.level = e.level_s1
        leaf.perm = e.perm1
    else:
        leaf.d = as_said(e.extra[1])
        leaf.shift = e.lg2_s2
        leaf.level = e.level_s2
        leaf.perm = e.perm2


# S3.17-14, V8.15.1.5-1
cdef inline int permission(
        const Leaf* leaf, unsigned int need, bint s2, uint64_t ipa,
        Syndrome* syndrome) noexcept nogil:
    """Why a cached translation does not permit an access, with the syndrome; or 0."""
    if leaf.perm & need:
        return 0
    syndrome_set(syndrome, ipa, s2, CLASS_IN)
    return WHY_S2_PERMISSION if s2 else WHY_S1_PERMISSION


# A translation under way in a decoded context: what its stages found so far.
cdef struct Stages:
    uint64_t va            # input address, canonical
    uint64_t ipa           # into stage 2
    uint64_t pa            # out of it
    Leaf first             # of stage 1
    Leaf second            # of stage 2
    Syndrome syndrome
    unsigned int kind      # of the TLB entry that answers, or will be kept


cdef inline int stage1_found(
        const Hw* hw, const Request* request, const Context* context, int why, Stages* s,
        Outcome* outcome) noexcept nogil:
    """Stage 1 gave a leaf, or none: ENDED with the outcome, or TO_STAGE2."""
    if not context.second.on:
        finish_stage1(hw, request, context, why, &s.first, &s.syndrome, outcome)
        return ENDED
    s.ipa = s.first.address | (request.iova & low_mask(s.first.shift))
    if why == 0:
        return TO_STAGE2
    finish_stage2(hw, request, context, True, why, &s.first, &s.second, s.ipa, 0, &s.syndrome,
                  outcome)
    return ENDED


cdef inline int stages_begin(
        const Hw* hw, View* view, const Request* request, const Memo* memo, Stages* s,
        Outcome* outcome) noexcept nogil:
    """What is known of a translation without a walk.

    ENDED with the outcome; or which stage walks, TO_STAGE1 or TO_STAGE2.
    """
    cdef const Context* context = &memo.context
    cdef const Half* half
    cdef const Entry* e = NULL
    cdef unsigned int upper, access = request.access
    cdef unsigned int need = context.need[access]
    cdef int why
    s.kind = KIND_S1
    if view != NULL:
        view.stage2_only = memo.index == STAGE1_BYPASS
    if memo.index == STAGE1_BYPASS:
        if untranslatable(hw, request, &s.syndrome):
            end_untranslatable(hw, request, context, &s.syndrome, outcome)
            return ENDED
        if not context.second.on:
            end_bypass(request, context, outcome)
            return ENDED
        leaf_none(&s.first)
        s.first.perm = 0x3F
        s.ipa = request.iova
        return TO_STAGE2
    upper = half_of(request.iova, context.two_ttbs)
    half = &context.half[upper]
    why = half_fault(context, request.iova, upper, access)
    s.va = canonical(half, request.iova, upper)
    if view != NULL and likely(why == 0):
        if context.second.on and not view.c.split:
            s.kind = KIND_COMBINED
        e = tlb_probe(
            view.c, s.kind, context.world, context.vmid, context.asid, context.aset, s.va)
        if likely(e != NULL and not context.second.on):
            if likely(e.perm1 & need and usable(e, access)):
                # the ordinary hit, without what the others have to set up
                leaf_of(e, 1, &s.first)
                finish_stage1(hw, request, context, 0, &s.first, &s.syndrome, outcome)
                return ENDED
    leaf_none(&s.first)
    leaf_none(&s.second)
    syndrome_set(&s.syndrome, 0, False, CLASS_IN)
    if why == 0:
        if e == NULL or not usable(e, access):
            return TO_STAGE1
        leaf_of(e, 1, &s.first)
        why = permission(&s.first, need, False, 0, &s.syndrome)
        if s.kind == KIND_COMBINED:
            leaf_of(e, 2, &s.second)
            s.pa = e.address | s.va & low_mask(e.lg2)
            s.ipa = e.ipa | s.va & low_mask(e.lg2)
            if why == 0:
                why = permission(&s.second, need, True, s.ipa, &s.syndrome)
            finish_stage2(hw, request, context, True, why, &s.first, &s.second, s.ipa, s.pa,
                          &s.syndrome, outcome)
            return ENDED
    return stage1_found(hw, request, context, why, s, outcome)


cdef inline int stage1_walked(
        const Hw* hw, View* view, const Request* request, const Context* context, int why,
        Stages* s, Outcome* outcome) noexcept nogil:
    """The walk of stage 1 came to its end: as stage1_found()."""
    if view != NULL and why == 0 and s.kind == KIND_S1:
        keep_entry(view, context, KIND_S1, s.va,
                   &context.half[half_of(request.iova, context.two_ttbs)], &s.first, NULL, 0,
                   s.first.address)
    return stage1_found(hw, request, context, why, s, outcome)


cdef inline void stage2_walked(
        const Hw* hw, View* view, const Request* request, const Memo* memo, int why, Stages* s,
        Outcome* outcome) noexcept nogil:
    """Stage 2 translated s.ipa, or did not: the outcome."""
    cdef const Context* context = &memo.context
    if view != NULL and why == 0 and s.kind == KIND_COMBINED:
        keep_entry(view, context, KIND_COMBINED, s.va,
                   &context.half[half_of(request.iova, context.two_ttbs)], &s.first, &s.second,
                   s.ipa, s.pa)
    finish_stage2(hw, request, context, memo.index != STAGE1_BYPASS, why, &s.first, &s.second,
                  s.ipa, s.pa, &s.syndrome, outcome)


# S3.3.2-17, S5.2-5, S15-3, V8.1-1, V8.4.3-1, V8.15.5-1
cdef inline int translate_stage2(
        const Hw* hw, Port* port, const Request* request, const Memo* memo,
        Outcome* outcome) noexcept nogil:
    """Translate one request in a decoded context with stage 2, after stage 1 if there is one.

    0, or a negative stop.  translate_known_cached() is the same with caches, in a function of its
    own: NULL has to be a constant here.
    """
    cdef const Context* context = &memo.context
    cdef unsigned int access = request.access
    cdef Stages s
    cdef int why
    cdef int next = stages_begin(hw, NULL, request, memo, &s, outcome)
    if next == TO_STAGE1:
        why = walk_steps(NULL, context, port, request.iova, access, &s.first, &s.syndrome)
        if why < 0:
            return why
        next = stage1_walked(hw, NULL, request, context, why, &s, outcome)
    if next == TO_STAGE2:
        why = stage2(NULL, context, port, s.ipa, context.need[access],
                     (access & ACCESS_WRITE) != 0, CLASS_IN, &s.second, &s.pa, &s.syndrome)
        if why < 0:
            return why
        stage2_walked(hw, NULL, request, memo, why, &s, outcome)
    return 0


# S3.3.2-21, S3.12-2, S5.5-102
cdef inline void end_lookup(
        const Hw* hw, const Request* request, const Context* context, int why,
        const Syndrome* syndrome, Outcome* outcome) noexcept nogil:
    """Configuration lookup failed; stage 2 of a CD fetch is the one part that may be told how."""
    if why_event(why) == 0:
        end_refused(outcome, why)
    elif context.second.on and syndrome.s2:
        end_fault(hw, request, outcome, why, effective_access(context, request.access),
                  TERMINATE_A | TERMINATE_R if why_event(why) == EVENT_F_WALK_EABT
                  else context.second.terminate, syndrome)
        outcome.stage = 2
        outcome.vmid = context.vmid
    else:
        end_fault(hw, request, outcome, why, 0, TERMINATE_A | TERMINATE_R, syndrome)


ctypedef int (*Stage2Driver)(
    const Hw* hw, Port* port, const Request* request, const Memo* memo,
    Outcome* outcome) noexcept nogil

cdef extern from *:
    """
    /* translate_stage2, out of the way of stage 1: inlined it would slow that down. */
    __attribute__((unused)) static void *smmufast_stage2_driver;
    """
    void* stage2_driver "smmufast_stage2_driver"


cdef inline void open_drivers() noexcept nogil:
    """Before the first translation of a module."""
    global stage2_driver
    fill_permissions()
    stage2_driver = <void*>translate_stage2


# S2.10-2, S5.2-3, S13.4-3, V8.1-2, L-1, L-3
cdef inline int translate_known(
        const Hw* hw, Port* port, const Request* request, const Memo* memo,
        Outcome* outcome) noexcept nogil:
    """Translate one request in a decoded context: 0, or a negative stop."""
    cdef const Context* context = &memo.context
    cdef Syndrome syndrome
    if unlikely(context.second.on):
        return (<Stage2Driver>stage2_driver)(hw, port, request, memo, outcome)
    if likely(memo.index != STAGE1_BYPASS):
        return translate_stage1(hw, port, request, context, outcome)
    if untranslatable(hw, request, &syndrome):
        end_untranslatable(hw, request, context, &syndrome, outcome)
    else:
        end_bypass(request, context, outcome)
    return 0


# S3.11-5, S3.11-11, S6.3.9.6-1
cdef inline int translate_one(
        const Hw* hw, Port* port, const Request* request, Memo* memo,
        Outcome* outcome) noexcept nogil:
    """Translate one request: 0, or a negative stop that leaves no outcome.

    Two calls that run at once, or inside each other, do not share a memo.
    """
    cdef Syndrome syndrome
    cdef int why
    if not cr0_smmuen(hw.cr0):
        end_disabled(hw, request, outcome)
        return 0
    if not memo_holds(hw, port, memo, request.sid, request.ssid):
        why = lookup(hw, port, request.sid, request.ssid, memo, &syndrome)
        if unlikely(why):
            if why < 0:
                return why
            end_lookup(hw, request, &memo.context, why, &syndrome, outcome)
            return 0
    return translate_known(hw, port, request, memo, outcome)
