"""The scalar path: configuration lookup, both stages, and their end as an outcome.

Sections: IHI 0070 3.2-3.5, 5.5 (fault control), 7.3 (event records), 15 (translation
procedure).  translate_one is the scalar path: one request, every fetch through a port; a port
that records makes a trace of it.  cached.pxd is the scalar path with caches, batch.pxd has the
batch paths, and walk.pxd the path of walks whose fetches the host performs.

What leads from one fetch to the next is in two kinds of functions (lookup.pxd, stage1.pxd,
stage2.pxd), which the scalar path and walk.pxd share: those that say where to read next
(ste_first, cd_way, stage2_begin, stage1_begin, ..._down), and those that say what was read
(..._read).  Neither reads.

Stage 2 stands in three places: before the fetches of L1CD and CD (cd_place), before each
fetch of a stage-1 descriptor (walk_steps), and after stage 1 (translate_stage2).
"""

from libc.stdint cimport uint64_t

from smmufast._facts.bits cimport likely, low_mask, unlikely
from smmufast._rules.config cimport (
    STAGE1_BYPASS, TERMINATE_A, TERMINATE_R, admitted, effective_access,
)
from smmufast._facts.layout cimport *
from smmufast._engine.memory cimport Port
from smmufast._engine.tlb cimport ENTRY_CLEAN1, ENTRY_CLEAN2, Entry, tlb_probe
from smmufast._rules.scope cimport KIND_COMBINED, KIND_S1
from smmufast._facts.hw cimport Hw
from smmufast._facts.types cimport (
    ACCESS_WRITE, ACTION_BYPASS, ACTION_DISABLED, ACTION_OK, Context, Half, Outcome, Request,
    Stage2,
)
from smmufast._rules.vmsa cimport (
    combine_sh, contiguous, fitting_lg2, half_of, leaf_sh, mair_byte, not_global, shareability,
    stage1_attr, stage2_attr,
)
from smmufast._facts.why cimport *
from smmufast._engine.chain cimport (
    CLASS_IN, ENDED, TO_STAGE1, TO_STAGE2, Leaf, Syndrome, View, end_fault, end_refused,
    end_unmapped, syndrome_set,
)
from smmufast._engine.stage cimport leaf_none
from smmufast._engine.stage2 cimport leaf_unpack, stage2, tlb_fill_from_walk
from smmufast._engine.lookup cimport Memo, lookup, memo_holds
from smmufast._engine.stage1 cimport canonical, fill_permissions, half_fault, walk, walk_steps


# --- the scalar path ---

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
    cdef const Stage2* second = &context.second
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
        leaf.d = leaf_unpack(e.extra[0])
        leaf.shift = e.lg2_s1
        leaf.level = e.level_s1
        leaf.perm = e.perm1
    else:
        leaf.d = leaf_unpack(e.extra[1])
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
        tlb_fill_from_walk(
            view, context, KIND_S1, s.va, &context.half[half_of(request.iova, context.two_ttbs)],
            &s.first, NULL, 0, s.first.address)
    return stage1_found(hw, request, context, why, s, outcome)


cdef inline void stage2_walked(
        const Hw* hw, View* view, const Request* request, const Memo* memo, int why, Stages* s,
        Outcome* outcome) noexcept nogil:
    """Stage 2 translated s.ipa, or did not: the outcome."""
    cdef const Context* context = &memo.context
    if view != NULL and why == 0 and s.kind == KIND_COMBINED:
        tlb_fill_from_walk(
            view, context, KIND_COMBINED, s.va,
            &context.half[half_of(request.iova, context.two_ttbs)], &s.first, &s.second, s.ipa,
            s.pa)
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


ctypedef int (*Stage2Path)(
    const Hw* hw, Port* port, const Request* request, const Memo* memo,
    Outcome* outcome) noexcept nogil

cdef extern from *:
    """
    /* translate_stage2, out of the way of stage 1: inlined it would slow that down. */
    __attribute__((unused)) static void *smmufast_stage2_path;
    """
    void* stage2_path "smmufast_stage2_path"


cdef inline void open_paths() noexcept nogil:
    """Before the first translation of a module."""
    global stage2_path
    fill_permissions()
    stage2_path = <void*>translate_stage2


# S2.10-2, S5.2-3, S13.4-3, V8.1-2, L-1, L-3
cdef inline int translate_known(
        const Hw* hw, Port* port, const Request* request, const Memo* memo,
        Outcome* outcome) noexcept nogil:
    """Translate one request in a decoded context: 0, or a negative stop."""
    cdef const Context* context = &memo.context
    cdef Syndrome syndrome
    if unlikely(context.second.on):
        return (<Stage2Path>stage2_path)(hw, port, request, memo, outcome)
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
