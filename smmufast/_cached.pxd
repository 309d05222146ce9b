"""The chain through caches: the scalar driver again, with every lookup asked of a cache first.

Not architectural: what is cached and when.  The rules are those of _translate.pxd; here are its
loops once more, with probes and fills.  Sections: IHI 0070 3.17 (TLB tags), 3.21 (what may be
cached), 4.3, 4.4.

What is cached: STEs and CDs that are legal; translations that succeed; tables on the way of a
walk.  Nested translations are one combined entry, or with `split` one of each stage; then the
stage-2 entries also serve table walks and CD fetches.  A TLB entry holds what both leaves say;
what the STE and CD say is asked of the configuration, live.  Permissions are tested on every hit,
and a write to a page that is still clean walks again, to mark it dirty.
"""

from libc.stdint cimport uint32_t, uint64_t

from smmufast._bits cimport likely, low_mask
from smmufast._config cimport STAGE1_BYPASS, cd_decode
from smmufast._core cimport Core
from smmufast._layout cimport EVENT_C_BAD_STREAMID, EVENT_F_PERMISSION, cr0_smmuen
from smmufast._memory cimport FETCH_STOPPED, Port, port_open
from smmufast._queue cimport event_deliver
from smmufast._tlb cimport (
    ENTRY_CLEAN1, ENTRY_CLEAN2, KIND_COMBINED, KIND_S1, CachesC, Entry, caches_spare, cd_fill,
    cd_probe, config_touch, ste_fill, ste_probe, tlb_probe,
)
from smmufast._translate cimport (
    CLASS_IN, SILENT_ABORT, Leaf, Memo, Syndrome, View, as_said, canonical, cd_fetch, end_disabled,
    end_lookup, end_untranslatable, finish_stage1, finish_stage2, half_fault, keep_entry,
    keeps_what_is_read,
    leaf_none, stage2, ste_decode, ste_fetch, ste_substream, syndrome_set, translate_known,
    translate_one, untranslatable, walk_steps,
)
from smmufast._types cimport (
    ACCESS_WRITE, ACTION_STALL, Context, Half, Hw, Outcome, Request, WalkC,
)
from smmufast._vmsa cimport half_of


cdef inline void view_open(
        View* view, const Core* core, const Request* request, bint quiet) noexcept nogil:
    view.c = core.caches
    view.sid = request.sid
    view.ssid = request.ssid
    view.quiet = quiet
    view.stage2_only = False
    view.nt = core.hw.bbml == 1  # level 2 ignores nT (S3.21.1.3-1)
    view.begun = core.caches.commands


# --- configuration ---

cdef extern from *:
    """
    #define SMMUFAST_UNDECODED UINT64_MAX
    """
    # Memo.generation of what was looked up and is not whole in the memo.
    const uint64_t UNDECODED "SMMUFAST_UNDECODED"


cdef inline bint memo_current(const Hw* hw, const View* view, const Memo* memo) noexcept nogil:
    """The memo is this pair's, of these registers, and all of it is still cached."""
    return (memo.whole and memo.sid == view.sid and memo.ssid == view.ssid
            and memo.edition == hw.edition
            and memo.generation == view.c.config_generation)


cdef inline void memo_touch(const View* view, const Memo* memo) noexcept nogil:
    """What a lookup that finds a current memo's STE and CD leaves in the caches."""
    if not view.quiet:
        config_touch(view.c, memo.ste_handle, memo.cd_handle, 1)


cdef inline int lookup_cached(
        const Hw* hw, Port* port, View* view, Memo* memo, Syndrome* syndrome) noexcept nogil:
    """As lookup(), for view.sid and view.ssid; what is cached is not read."""
    cdef int event = 0
    memo.whole = False
    memo.generation = UNDECODED
    memo.edition = hw.edition
    memo.sid = view.sid
    memo.ssid = view.ssid
    memo.context.second.on = False
    memo.cd_handle = 0
    syndrome_set(syndrome, 0, False, CLASS_IN)
    if <uint64_t>view.sid >> hw.log2size:
        return EVENT_C_BAD_STREAMID
    memo.ste_handle = ste_probe(view.c, view.sid, memo.ste, view.quiet)
    if not memo.ste_handle:
        event = ste_fetch(hw, port, view.sid, memo, syndrome)
    if event == 0:
        event = ste_decode(hw, memo)
    if not memo.ste_handle and keeps_what_is_read(view) and (event == 0 or event == SILENT_ABORT):
        memo.ste_handle = ste_fill(view.c, view.sid, memo.ste)
    if event == 0:
        event = ste_substream(hw, memo, view.ssid)
    if event:
        return event
    if memo.index != STAGE1_BYPASS:
        memo.cd_handle = cd_probe(
            view.c, view.sid, <uint32_t>memo.index, memo.cd, view.quiet)
        if not memo.cd_handle:
            event = cd_fetch(hw, port, view, memo, syndrome)
        if event == 0:
            event = cd_decode(hw, memo.ste, memo.cd, &memo.context)
        if event:
            return event
        if not memo.cd_handle and keeps_what_is_read(view):
            memo.cd_handle = cd_fill(view.c, view.sid, <uint32_t>memo.index, memo.cd)
    memo.whole = memo.ste_handle and (memo.cd_handle or memo.index == STAGE1_BYPASS)
    memo.generation = view.c.config_generation
    return 0


# --- translations ---

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


cdef inline int permission(
        const Leaf* leaf, unsigned int need, bint s2, uint64_t ipa,
        Syndrome* syndrome) noexcept nogil:
    """F_PERMISSION of a cached translation, with its syndrome; or 0."""
    if leaf.perm & need:
        return 0
    syndrome_set(syndrome, ipa, s2, CLASS_IN)
    return EVENT_F_PERMISSION


cdef inline int translate_known_cached(
        const Hw* hw, Port* port, View* view, const Request* request, const Memo* memo,
        Outcome* outcome) noexcept nogil:
    """As translate_known(), through TLB and walk caches."""
    cdef const Context* context = &memo.context
    cdef const Half* half = NULL
    cdef const Entry* e = NULL
    cdef Leaf first, leaf
    cdef Syndrome syndrome
    cdef bint nested = memo.index != STAGE1_BYPASS
    cdef unsigned int access = request.access
    cdef unsigned int need = context.need[access]
    cdef unsigned int kind = KIND_S1, upper
    cdef uint64_t ipa = request.iova, pa = 0, va = 0
    cdef int event = 0
    if not nested and not context.second.on:
        return translate_known(hw, port, request, memo, outcome)
    view.stage2_only = not nested
    if nested:
        upper = half_of(request.iova, context.two_ttbs)
        half = &context.half[upper]
        event = half_fault(context, request.iova, upper, access)
        if likely(event == 0):
            va = canonical(half, request.iova, upper)
            if context.second.on and not view.c.split:
                kind = KIND_COMBINED
            e = tlb_probe(view.c, kind, context.world, context.vmid, context.asid, context.aset, va,
                          view.quiet)
            if likely(e != NULL and not context.second.on):
                if likely(e.perm1 & need and usable(e, access)):
                    # the ordinary hit, without what the others have to set up
                    leaf_of(e, 1, &first)
                    finish_stage1(hw, request, context, 0, &first, &syndrome, outcome)
                    return 0
    leaf_none(&first)
    leaf_none(&leaf)
    syndrome_set(&syndrome, 0, False, CLASS_IN)
    if nested:
        if event == 0:
            if e != NULL and usable(e, access):
                leaf_of(e, 1, &first)
                event = permission(&first, need, False, 0, &syndrome)
                if kind == KIND_COMBINED:
                    leaf_of(e, 2, &leaf)
                    pa = e.address | va & low_mask(e.lg2)
                    ipa = e.ipa | va & low_mask(e.lg2)
                    if event == 0:
                        event = permission(&leaf, need, True, ipa, &syndrome)
                    finish_stage2(hw, request, context, True, event, &first, &leaf, ipa, pa,
                                  &syndrome, outcome)
                    return 0
            else:
                event = walk_steps(
                    view, context, port, request.iova, access, &first, &syndrome)
                if event == 0 and kind == KIND_S1:
                    keep_entry(view, context, KIND_S1, va, half, &first, NULL, 0, first.address)
        if event < 0:
            return event
        if not context.second.on:
            finish_stage1(hw, request, context, event, &first, &syndrome, outcome)
            return 0
        ipa = first.address | (request.iova & low_mask(first.shift))
    else:
        first.perm = 0x3F
        if untranslatable(hw, request, &syndrome):
            end_untranslatable(hw, request, context, &syndrome, outcome)
            return 0
    if event == 0:
        event = stage2(view, context, port, ipa, need, (access & ACCESS_WRITE) != 0, CLASS_IN,
                       &leaf, &pa, &syndrome)
        if event == 0 and kind == KIND_COMBINED:
            keep_entry(view, context, KIND_COMBINED, va, half, &first, &leaf, ipa, pa)
    if event < 0:
        return event
    finish_stage2(
        hw, request, context, nested, event, &first, &leaf, ipa, pa, &syndrome, outcome)
    return 0


cdef inline int translate_cached(
        const Hw* hw, Port* port, View* view, const Request* request, Memo* memo,
        Outcome* outcome) noexcept nogil:
    """As translate_one(), through caches; the memo is asked for nothing that is not cached."""
    cdef Syndrome syndrome
    cdef int event
    if not cr0_smmuen(hw.cr0):
        end_disabled(hw, request, outcome)
        return 0
    if memo_current(hw, view, memo):
        memo_touch(view, memo)
    else:
        event = lookup_cached(hw, port, view, memo, &syndrome)
        if event:
            if event < 0:
                return event
            end_lookup(hw, request, &memo.context, event, &syndrome, outcome)
            return 0
    return translate_known_cached(hw, port, view, request, memo, outcome)


cdef inline int walk_cached(
        Core* core, Port* port, const Request* request, WalkC* walk) noexcept nogil:
    """A chain that the log of a resumable walk answers: 0, or FETCH_PENDING.

    Until it comes to its end it leaves the caches as they are, and then as translate_cached()
    would.  What it fills and evicts decides about its own later fetches, so whatever fetches
    runs in a copy first.  Without memory for a copy nothing is kept, nor after an invalidation
    that came since the walk began; request.reserved says when that was.
    """
    cdef CachesC* spare
    cdef Memo memo
    cdef View view
    cdef int status
    view_open(&view, core, request, True)
    port_open(port, NULL, walk, True)
    memo.whole = False
    spare = NULL if walk.count == 0 else caches_spare(view.c)
    if spare != NULL:
        view.c = spare
        view.quiet = False
    if <uint32_t>view.c.commands != request.reserved:
        view.begun = ~view.c.commands
    status = translate_cached(&core.hw, port, &view, request, &memo, &walk.result)
    if status == 0 and (spare != NULL or walk.count == 0):
        view_open(&view, core, request, False)
        if <uint32_t>view.c.commands != request.reserved:
            view.begun = ~view.c.commands
        port_open(port, NULL, walk, True)
        memo.whole = False
        status = translate_cached(&core.hw, port, &view, request, &memo, &walk.result)
    return status


cdef inline int deliver(
        Core* core, Port* port, const Request* request, int status,
        Outcome* outcome) noexcept nogil:
    """What follows from an outcome outside of translation: its event, or its stall."""
    if status or likely(not outcome.fault):
        return status
    if outcome.action != ACTION_STALL and (outcome.event == 0 or not core.queues.events.placed):
        return 0  # in the outcome alone
    if port.pure:
        return FETCH_STOPPED
    port.wrote = True
    return event_deliver(core, port, request, outcome)


cdef inline int translate_request(
        Core* core, Port* port, const Request* request, Memo* memo,
        Outcome* outcome) noexcept nogil:
    """Translate one request with all that follows from it: 0, or a negative stop."""
    cdef View view
    cdef int status
    if core.caches == NULL:
        status = translate_one(&core.hw, port, request, memo, outcome)
    else:
        view_open(&view, core, request, False)
        status = translate_cached(&core.hw, port, &view, request, memo, outcome)
    return deliver(core, port, request, status, outcome)
