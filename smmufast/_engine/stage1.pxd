"""Stage 1, alone or over stage 2: an input address to an IPA or a PA (IHI 0070 15.2)."""

from libc.stdint cimport uint8_t, uint16_t, uint64_t

from smmufast._facts.bits cimport noinline, likely, unlikely
from smmufast._rules.config cimport effective_access, why_of_half
from smmufast._facts.layout cimport *
from smmufast._engine.memory cimport Port
from smmufast._engine.tlb cimport Table
from smmufast._rules.scope cimport KIND_COMBINED, KIND_S1
from smmufast._facts.types cimport (
    ACCESS_PRIV, ACCESS_WRITE, FETCH_S2TT_UPDATE, FETCH_TT, FETCH_TT_UPDATE, PERM_PR, PERM_PW,
    Context, Half, Stage2,
)
from smmufast._rules.vmsa cimport (
    access_flag, clean_s1, clean_s2, dirty_s1, dirty_s2, entry_address, half_of, in_range,
    leaf_address, leaf_permissions, output_fits, permitted, with_access_flag,
)
from smmufast._facts.why cimport *
from smmufast._engine.chain cimport (
    AT_TABLE, CHANGED, CLASS_IN, CLASS_TT, NOWHERE, RETRIES, Leaf, Syndrome, View, syndrome_set,
)
from smmufast._engine.stage cimport (
    Descent, Place, descriptor_at, find_leaf, leaf_none, read_descriptor, update,
)
from smmufast._engine.stage2 cimport cached_table, keep_table, stage2


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
    """Stage 1 of a context that is known: 0, why not, or a negative stop."""
    cdef unsigned int upper = half_of(va, context.two_ttbs)
    # opaque, or its place is computed again at every use
    cdef const Half* half = <const Half*>noinline(<void*>&context.half[upper])
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


cdef inline int update_way(const Stage2* second, const Leaf* outer) noexcept nogil:
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
    cdef const Stage2* second = &context.second
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
