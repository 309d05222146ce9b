"""The chain through caches: the scalar path again, with every lookup asked of a cache first.

Not architectural: what is cached and when.  The rules are those of translate.pxd; here are its
loops once more, with probes and fills.  Sections: IHI 0070 3.17 (TLB tags), 3.21 (what may be
cached), 4.3, 4.4.

What is cached: STEs and CDs that are legal; translations that succeed; tables on the way of a
walk.  Nested translations are one combined entry, or with `split` one of each stage; then the
stage-2 entries also serve table walks and CD fetches.  A TLB entry holds what both leaves say;
what the STE and CD say is asked of the configuration, live.  Permissions are tested on every hit,
and a write to a page that is still clean walks again, to mark it dirty.
"""

from libc.stdint cimport uint32_t, uint64_t

from smmufast._facts.bits cimport likely
from smmufast._rules.config cimport STAGE1_BYPASS, cd_decode
from smmufast._engine.core cimport Core
from smmufast._facts.layout cimport cr0_smmuen
from smmufast._engine.memory cimport FETCH_STOPPED, Port
from smmufast._engine.queue cimport event_deliver, walk_again
from smmufast._engine.tlb cimport cd_fill, cd_probe, config_touch, ste_fill, ste_probe
from smmufast._engine.chain cimport CLASS_IN, RETRIES, TO_STAGE1, TO_STAGE2, Syndrome, View
from smmufast._engine.stage2 cimport keeps_what_is_read, stage2
from smmufast._engine.lookup cimport (
    Memo, cd_fetch, lookup_open, ste_decode, ste_fetch, ste_substream,
)
from smmufast._engine.stage1 cimport walk_steps
from smmufast._engine.translate cimport (
    Stages, end_disabled, end_lookup, stage1_walked, stage2_walked, stages_begin, translate_one,
)
from smmufast._facts.hw cimport Hw
from smmufast._facts.types cimport ACCESS_WRITE, ACTION_STALL, Context, Outcome, Request
from smmufast._facts.why cimport *


# S3.21.1.2-2
cdef inline void view_open(
        View* view, const Core* core, const Request* request) noexcept nogil:
    view.c = core.caches
    view.sid = request.sid
    view.ssid = request.ssid
    view.stage2_only = False
    view.nt = core.hw.bbml == 1  # level 2 ignores nT (3.21.1.3)
    view.commands = &core.overtaking.commands
    view.begun = core.overtaking.commands


# --- configuration ---

cdef extern from *:
    """
    #define SMMUFAST_UNDECODED UINT64_MAX
    """
    # Memo.config_generation of what was looked up and is not whole in the memo.
    const uint64_t UNDECODED "SMMUFAST_UNDECODED"


cdef inline bint memo_current(const Hw* hw, const View* view, const Memo* memo) noexcept nogil:
    """The memo is this pair's, of these registers, and all of it is still cached."""
    return (memo.whole and memo.sid == view.sid and memo.ssid == view.ssid
            and memo.hw_generation == hw.generation
            and memo.config_generation == view.c.config_generation)


cdef inline void memo_touch(const View* view, const Memo* memo) noexcept nogil:
    """What a lookup that finds a current memo's STE and CD leaves in the caches."""
    config_touch(view.c, memo.ste_handle, memo.cd_handle, 1)


cdef inline int ste_look(const Hw* hw, View* view, Memo* memo) noexcept nogil:
    """Ask the cache for the STE of memo.sid: memo.ste_handle; 0, or why not."""
    memo.ste_handle = memo.cd_handle = 0
    if <uint64_t>memo.sid >> hw.log2size:
        return WHY_STREAM_BEYOND
    memo.ste_handle = ste_probe(view.c, memo.sid, memo.ste)
    return 0


cdef inline int ste_take(const Hw* hw, View* view, Memo* memo) noexcept nogil:
    """Decode memo.ste, and keep it if it was read: as ste_decode()."""
    cdef int why = ste_decode(hw, memo)
    if (view != NULL and not memo.ste_handle and keeps_what_is_read(view)
            and (why == 0 or why == WHY_STE_CONFIG)):
        memo.ste_handle = ste_fill(view.c, memo.sid, memo.ste)
    return why


cdef inline int cd_take(const Hw* hw, View* view, Memo* memo) noexcept nogil:
    """Decode memo.cd, and keep it if it was read: as cd_decode()."""
    cdef int why = cd_decode(hw, memo.ste, memo.cd, &memo.context)
    if view != NULL and why == 0 and not memo.cd_handle and keeps_what_is_read(view):
        memo.cd_handle = cd_fill(view.c, memo.sid, <uint32_t>memo.index, memo.cd)
    return why


# S3.21.3-7, S3.21.3-8, S3.21.3-9, S3.21.3-10, S5.2.1-2, S5.4.1-4
cdef inline int lookup_cached(
        const Hw* hw, Port* port, View* view, Memo* memo, Syndrome* syndrome) noexcept nogil:
    """As lookup(), for view.sid and view.ssid; what is cached is not read."""
    cdef int why
    lookup_open(hw, view.sid, view.ssid, memo, syndrome)
    memo.config_generation = UNDECODED
    why = ste_look(hw, view, memo)
    if why == 0 and not memo.ste_handle:
        why = ste_fetch(hw, port, view.sid, memo, syndrome)
    if why == 0:
        why = ste_take(hw, view, memo)
    if why == 0:
        why = ste_substream(hw, memo, view.ssid)
    if why:
        return why
    if memo.index != STAGE1_BYPASS:
        memo.cd_handle = cd_probe(view.c, view.sid, <uint32_t>memo.index, memo.cd)
        if not memo.cd_handle:
            why = cd_fetch(hw, port, view, memo, syndrome)
        if why == 0:
            why = cd_take(hw, view, memo)
        if why:
            return why
    memo.whole = memo.ste_handle and (memo.cd_handle or memo.index == STAGE1_BYPASS)
    memo.config_generation = view.c.config_generation
    return 0


# --- translations ---

# S3.13.1-3, S3.17-11, S3.17-13, S3.21.1-1, S5.2.1-4, S5.2.1-5, S5.4.1-6, V8.16-2
cdef inline int translate_known_cached(
        const Hw* hw, Port* port, View* view, const Request* request, const Memo* memo,
        Outcome* outcome) noexcept nogil:
    """As translate_known(), through TLB and walk caches."""
    cdef const Context* context = &memo.context
    cdef unsigned int access = request.access
    cdef Stages s
    cdef int why
    cdef int next = stages_begin(hw, view, request, memo, &s, outcome)
    if next == TO_STAGE1:
        why = walk_steps(view, context, port, request.iova, access, &s.first, &s.syndrome)
        if why < 0:
            return why
        next = stage1_walked(hw, view, request, context, why, &s, outcome)
    if next == TO_STAGE2:
        why = stage2(view, context, port, s.ipa, context.need[access],
                     (access & ACCESS_WRITE) != 0, CLASS_IN, &s.second, &s.pa, &s.syndrome)
        if why < 0:
            return why
        stage2_walked(hw, view, request, memo, why, &s, outcome)
    return 0


# S6.3.9.6-8, S16.2-5
cdef inline int translate_cached(
        const Hw* hw, Port* port, View* view, const Request* request, Memo* memo,
        Outcome* outcome) noexcept nogil:
    """As translate_one(), through caches; the memo is asked for nothing that is not cached."""
    cdef Syndrome syndrome
    cdef int why
    if not cr0_smmuen(hw.cr0):
        end_disabled(hw, request, outcome)
        return 0
    if memo_current(hw, view, memo):
        memo_touch(view, memo)
    else:
        why = lookup_cached(hw, port, view, memo, &syndrome)
        if why:
            if why < 0:
                return why
            end_lookup(hw, request, &memo.context, why, &syndrome, outcome)
            return 0
    return translate_known_cached(hw, port, view, request, memo, outcome)


cdef inline int deliver(
        Core* core, Port* port, const Request* request, int status,
        Outcome* outcome) noexcept nogil:
    """What follows from an outcome outside of translation: its why, or its stall."""
    if status or likely(not outcome.fault):
        return status
    if outcome.action != ACTION_STALL and (outcome.event == 0 or not core.queues.events.placed):
        return 0  # in the outcome alone
    if port.pure:
        return FETCH_STOPPED
    port.wrote = True
    return event_deliver(core, port, request, outcome)


# S3.3.3-10
cdef inline int translate_request(
        Core* core, Port* port, const Request* request, Memo* memo,
        Outcome* outcome) noexcept nogil:
    """Translate one request with all that follows from it: 0, or a negative stop.

    A translation that an invalidation and CMD_SYNC overtake starts again (3.21.1): a callback may
    have issued them.  One that is overtaken again and again ends with what it has.
    """
    cdef View view
    cdef int status = 0, _try
    for _try in range(RETRIES):
        view.begun = core.overtaking.commands
        if core.caches == NULL:
            status = translate_one(&core.hw, port, request, memo, outcome)
        else:
            view_open(&view, core, request)
            status = translate_cached(&core.hw, port, &view, request, memo, outcome)
        if likely(not walk_again(core, view.begun, False)) or status:
            break
        memo.whole = False
        if port.log != NULL:
            port.log.count = port.log.used = 0
    return deliver(core, port, request, status, outcome)
