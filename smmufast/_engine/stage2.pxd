"""Stage 2: an IPA to a PA, through caches or without; and what a walk leaves in caches."""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset

from smmufast._facts.bits cimport likely, low_mask, unlikely
from smmufast._facts.layout cimport *
from smmufast._engine.memory cimport Port
from smmufast._engine.tlb cimport (
    ENTRY_CLEAN1, ENTRY_CLEAN2, ENTRY_CONTIGUOUS, Entry, Table, tlb_fill, tlb_probe, walk_fill,
    walk_probe,
)
from smmufast._rules.scope cimport KIND_COMBINED, KIND_S1, KIND_S2
from smmufast._facts.types cimport FETCH_S2TT, FETCH_S2TT_UPDATE, Context, Half, Stage2
from smmufast._rules.vmsa cimport (
    ATTR_WB, access_flag, clean_s1, clean_s2, combine_sh, contiguous, dirty_s2, entry_address,
    first_table, fitting_lg2, leaf_address, leaf_sh, mair_byte, no_translation, not_global,
    output_fits, shareability, stage1_attr, stage2_attr, stage2_device, stage2_permitted,
    with_access_flag,
)
from smmufast._facts.why cimport *
from smmufast._engine.chain cimport (
    AT_TABLE, CHANGED, CLASS_IN, CLASS_TT, NOWHERE, RETRIES, Leaf, Syndrome, View, syndrome_set,
)
from smmufast._engine.stage cimport (
    Descent, Place, descriptor_at, find_leaf, leaf_none, level_of, read_descriptor, update,
)


# --- stage 2 ---

# S2.5-2, S5.2-72, S5.2-73, S13.1.1-4, V8.6.3-2
cdef inline int stage2_denies(
        const Stage2* second, unsigned int need, bint for_walk, const Leaf* leaf) noexcept nogil:
    """F_PERMISSION: the access is not permitted, or S2PTW keeps table walks out of Device."""
    if not leaf.perm & need:
        return WHY_S2_PERMISSION
    return WHY_S2_DEVICE if (
        for_walk and second.ptw and stage2_device(leaf.d, second.fwb)) else 0


# S3.4-17, S3.13.1-2, S5.2-67, S5.2-71, S7.3.22-3, V8.4.2.1-1, V8.15.4-4
cdef inline int stage2_fault(
        const Stage2* second, uint64_t ipa, unsigned int need, bint dirty, bint for_walk,
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
        const Stage2* second, int why, const Leaf* leaf) noexcept nogil:
    """The leaf of stage 2 is to be updated, whose stage2_fault() was this."""
    return (leaf.desired != leaf.d and second.ha
            and (why == 0 or why_event(why) == EVENT_F_PERMISSION))


# V8.5.1.2-3
cdef inline int stage2_end(
        const Stage2* second, Port* port, uint64_t ipa, unsigned int need, bint dirty,
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
        const Stage2* second, Port* port, uint64_t ipa, unsigned int need, bint dirty,
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


cdef inline uint8_t leaf_pack(uint64_t d) noexcept nogil:
    """What a cached translation keeps of its leaf: attributes, SH, nG and Contiguous."""
    return <uint8_t>(pte_s2_memattr(d) | pte_s1_sh(d) << 4 | pte_s1_ng(d) << 6
                     | pte_s1_contiguous(d) << 7)


cdef inline uint64_t leaf_unpack(uint8_t kept) noexcept nogil:
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
cdef inline void tlb_fill_from_walk(
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
        e.extra[0] = leaf_pack(first.d)
        if context.hd and clean_s1(first.d):
            e.flags |= ENTRY_CLEAN1
    if kind & KIND_S2:
        e.lg2_s2 = second.shift
        e.level_s2 = second.level
        e.granule_s2 = context.second.half.granule
        e.perm2 = second.perm
        e.attr = stage2_attr(second.d, context.second.fwb, e.attr)
        e.sh = combine_sh(e.sh, leaf_sh(second.d, &context.second.half))
        e.extra[1] = leaf_pack(second.d)
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
    cdef const Stage2* second = &context.second
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
            leaf.d = leaf_unpack(e.extra[1])
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
        tlb_fill_from_walk(
            view, context, KIND_S2, ipa, &context.second.half, NULL, leaf, ipa, leaf.address)


# S3.21.1-5
cdef inline int stage2_cached(
        View* view, const Context* context, Port* port, uint64_t ipa, unsigned int need,
        bint dirty, unsigned int cls, Leaf* leaf) noexcept nogil:
    cdef const Stage2* second = &context.second
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
    cdef const Stage2* second = &context.second
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
