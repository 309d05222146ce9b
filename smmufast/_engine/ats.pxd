"""PCIe ATS: what a translation request is answered, and what becomes of a Translated transaction.

Sections: IHI 0070 3.9.1 (answers to requests, Translated transactions, and which events they
record), 3.13.7.1 (hardware update), 5.2 (STE.EATS), 7.3.6 and 7.3.8 (F_BAD_ATS_TREQ,
F_TRANSL_FORBIDDEN), 13.6 (split-stage ATS, stage 1 that is skipped), 13.7 (permissions), 6.3
(CR0.ATSCHK, CR2.REC_CFG_ATS, IDR3.PASIDTT). The chain is that of translate.pxd and cached.pxd:
the same lookups, walks and hardware updates, through a View or without.

A request is a read of the page; if that grants a write, and the write would mark a page dirty,
it is a write too. So what is granted is what the device's own accesses would meet, and the
tables are left as these would leave them. Split-stage ATS is the same, but the answer gives the
address between the stages.

Choices. Without IDR0.ATS a request is an Unsupported Request and a Translated transaction
aborts, both without an event. No Write takes the write away, except where no table is asked. A
request for split-stage ATS updates the stage-2 leaf of the page too. Translated transactions
beyond the output address size abort; a PASID that they carry selects no CD, for nothing of it
would be used.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from smmufast._engine.cached cimport deliver, view_open
from smmufast._rules.config cimport (
    STAGE1_BYPASS, TERMINATE_A, TERMINATE_R, TERMINATE_SID, cd_decode, effective_access, substream,
)
from smmufast._engine.core cimport Core
from smmufast._facts.layout cimport (
    EVENT_F_BAD_ATS_TREQ, EVENT_F_PERMISSION, EVENT_F_TRANSLATION, EVENT_F_TRANSL_FORBIDDEN,
    EVENT_F_WALK_EABT, cr0_atschk, cr0_eventqen, cr0_smmuen, cr2_rec_cfg_ats, event_set_id,
    event_set_inputaddr, event_set_rnw, event_set_streamid, f_bad_ats_treq_set_id,
    f_bad_ats_treq_set_inputaddr, f_bad_ats_treq_set_p, f_bad_ats_treq_set_r,
    f_bad_ats_treq_set_span, f_bad_ats_treq_set_ssv, f_bad_ats_treq_set_streamid,
    f_bad_ats_treq_set_substreamid, f_bad_ats_treq_set_w, f_bad_ats_treq_set_x, ste_config,
    ste_eats,
)
from smmufast._facts.bits cimport low_mask
from smmufast._engine.memory cimport Port
from smmufast._engine.tlb cimport (
    ENTRY_CLEAN1, ENTRY_CLEAN2, Entry, cd_fill, cd_probe, ste_fill, ste_probe, tlb_probe,
)
from smmufast._rules.scope cimport KIND_COMBINED, KIND_S1
from smmufast._engine.chain cimport (
    CLASS_IN, NOWHERE, Leaf, Syndrome, View, end_fault, end_refused, end_unmapped, syndrome_set,
)
from smmufast._engine.stage cimport leaf_none
from smmufast._engine.stage2 cimport keeps_what_is_read, stage2, tlb_fill_from_walk
from smmufast._engine.lookup cimport Memo, cd_fetch, ste_decode, ste_fetch, ste_substream
from smmufast._engine.stage1 cimport canonical, half_fault, walk_steps
from smmufast._engine.translate cimport (
    end_untranslatable, finish_stage1, finish_stage2, leaf_of, untranslatable, usable,
)
from smmufast._facts.hw cimport Hw
from smmufast._facts.types cimport (
    ACCESS_INSTR, ACCESS_PRIV, ACCESS_WRITE, ACTION_ABORT, ACTION_BYPASS, NO_SSID, Context, Half,
    Outcome, Request,
)
from smmufast._rules.vmsa cimport ATTR_WB, clean_s1, clean_s2, half_of, shareability
from smmufast._facts.why cimport *


cdef enum:
    ATS_SUCCESS
    ATS_UR          # Unsupported Request
    ATS_CA          # Completer Abort

# What an answer grants.
cdef enum:
    ATS_READ = 1
    ATS_WRITE = 2
    ATS_EXECUTE = 4

# STE.EATS, effective.
cdef enum:
    EATS_OFF = 0
    EATS_FULL = 1
    EATS_SPLIT = 2


# A translation request, beside its Request, whose access is ACCESS_PRIV or 0.
cdef struct AtsAsk:
    bint no_write
    bint execute
    unsigned int stu_lg2   # of the device's smallest translation unit


# Its answer.  The outcome is that of the page, or of the fault that kept it from being granted.
cdef struct AtsAnswer:
    int status             # ATS_SUCCESS, ATS_UR, ATS_CA
    unsigned int granted   # ATS_READ ...
    bint split             # the device gets outcome.ipa, which stage 2 will translate
    Outcome outcome


# What both stages say of an address.
cdef struct AtsPages:
    Leaf first
    Leaf second
    uint64_t ipa
    uint64_t pa
    bint clean             # a write would mark a page dirty


# --- rules ---

# S3.9.1-13, S3.9.1.2-3, S3.9.1.2-4, S3.9.1.3-3, S5.2-35, S5.2-38
cdef inline unsigned int eats_effective(const Hw* hw, const uint64_t* ste) noexcept nogil:
    """STE.EATS of a legal STE: split-stage ATS needs ATSCHK, and there is no DPT (5.2)."""
    cdef unsigned int eats = <unsigned int>ste_eats(ste)
    if not hw.ats or ste_config(ste) == 4 or eats == 3:
        return EATS_OFF
    if eats == EATS_SPLIT and not cr0_atschk(hw.cr0):
        return EATS_OFF
    return eats


# S3.9-4, S3.9.1-17, S3.9.1.2-7, S3.13.7.1-3, S3.13.7.2-2, S3.13.7.2-3, S13.1.4-2, S13.7-1, S13.7-4,
# S13.7-5, S13.7-6, S13.7.1-1, S13.7.1-2, S13.7.1-3, S13.7.1-4, S13.7.1-5
cdef inline unsigned int ats_granted(
        const Context* context, const AtsAsk* ask, unsigned int access,
        unsigned int perm) noexcept nogil:
    """What pages that permit `perm` grant to a device that asks with `access` (13.7)."""
    cdef unsigned int granted = 0
    if perm & context.need[access]:
        granted = ATS_READ
        if ask.execute and perm & context.need[access | ACCESS_INSTR]:
            granted |= ATS_EXECUTE
    if not ask.no_write and perm & context.need[access | ACCESS_WRITE]:
        granted |= ATS_WRITE
    return granted


# S2.5-3, S3.9.1.2-11, S6.3.12-4
cdef inline unsigned int recorded_if_asked(const Hw* hw) noexcept nogil:
    """How configuration errors of ATS end: in an abort, recorded with CR2.REC_CFG_ATS."""
    return TERMINATE_A | TERMINATE_R if cr2_rec_cfg_ats(hw.cr2) else TERMINATE_A


# --- ends ---

# S7.3.6-1, S7.3.6-2, S7.3.6-3, S7.3.6-4
cdef inline void end_bad_request(
        const Hw* hw, const Request* request, const AtsAsk* ask, int why,
        AtsAnswer* answer) noexcept nogil:
    """Unsupported Request, and F_BAD_ATS_TREQ."""
    cdef Outcome* outcome = &answer.outcome
    cdef uint64_t* w = outcome.record
    end_refused(outcome, why)
    answer.status = ATS_UR
    outcome.event = EVENT_F_BAD_ATS_TREQ if cr0_eventqen(hw.cr0) else 0
    memset(w, 0, 32)
    f_bad_ats_treq_set_id(w, EVENT_F_BAD_ATS_TREQ)
    f_bad_ats_treq_set_streamid(w, request.sid)
    if request.ssid != NO_SSID:
        f_bad_ats_treq_set_ssv(w, 1)
        f_bad_ats_treq_set_substreamid(w, request.ssid)
    f_bad_ats_treq_set_p(w, (request.access & ACCESS_PRIV) != 0)
    f_bad_ats_treq_set_x(w, ask.execute)
    f_bad_ats_treq_set_w(w, not ask.no_write)
    f_bad_ats_treq_set_r(w, 1)
    f_bad_ats_treq_set_span(w, 1)  # in STUs
    f_bad_ats_treq_set_inputaddr(w, request.iova & ~<uint64_t>0xFFF)


# S3.9.1-3, S3.9.1-4, S3.9.1-5, S3.9.1.2-5, S3.9.1.2-10, S3.9.1.2-14, S3.9.1.2-101, S3.13.7.2-1,
# S5.5-6, S7.3.22-5, S15.2-1
cdef inline void end_request(
        const Hw* hw, const Request* request, const Context* context, int why,
        const Syndrome* syndrome, AtsAnswer* answer) noexcept nogil:
    """A fault on the way: faults of translation grant nothing, all others are a Completer Abort."""
    cdef bint translation = EVENT_F_TRANSLATION <= why_event(why) <= EVENT_F_PERMISSION
    cdef unsigned int access = 0
    if why_event(why) >= EVENT_F_WALK_EABT:
        access = effective_access(context, request.access)
    answer.status = ATS_SUCCESS if translation else ATS_CA
    end_fault(hw, request, &answer.outcome, why, access,
              TERMINATE_A if translation else recorded_if_asked(hw), syndrome)


# S3.9.1.3-4, S7.3.8-1, S7.3.8-2, S7.3.8-3
cdef inline void end_forbidden(
        const Hw* hw, const Request* request, int why, Outcome* outcome) noexcept nogil:
    """Abort, and F_TRANSL_FORBIDDEN."""
    cdef uint64_t* w = outcome.record
    end_refused(outcome, why)
    outcome.event = EVENT_F_TRANSL_FORBIDDEN if cr0_eventqen(hw.cr0) else 0
    memset(w, 0, 32)
    event_set_id(w, EVENT_F_TRANSL_FORBIDDEN)
    event_set_streamid(w, request.sid)
    event_set_rnw(w, (request.access & ACCESS_WRITE) == 0)
    event_set_inputaddr(w, request.iova)


# S3.9.1.1-1, S3.9.1.3-13, S13.6.2-1, S13.6.3-4
cdef inline void end_passed(const Hw* hw, const Request* request, Outcome* outcome) noexcept nogil:
    """A Translated transaction goes on with the attributes that it has, if its address exists."""
    if request.iova & hw.oas_over:
        end_refused(outcome, WHY_TRANSLATED_ADDRESS)
    else:
        end_unmapped(outcome, ACTION_BYPASS, request.iova, 0x3F, ATTR_WB, shareability(ATTR_WB, 0))


# --- configuration lookup, in two parts: EATS is asked for between them ---

# S3.9.2-1
cdef inline int ats_stream(
        const Hw* hw, Port* port, View* view, uint32_t sid, Memo* memo,
        Syndrome* syndrome) noexcept nogil:
    """Find and decode an STE: 0, why not, or a negative stop."""
    cdef uint32_t cached = 0
    cdef int why = 0
    memo.whole = False
    memo.sid = sid
    memo.context.second.on = False
    syndrome_set(syndrome, 0, False, CLASS_IN)
    if <uint64_t>sid >> hw.log2size:
        return WHY_STREAM_BEYOND
    if view != NULL:
        cached = ste_probe(view.c, sid, memo.ste)
    if not cached:
        why = ste_fetch(hw, port, sid, memo, syndrome)
    if why == 0:
        why = ste_decode(hw, memo)
    if (view != NULL and not cached and keeps_what_is_read(view)
            and (why == 0 or why == WHY_STE_CONFIG)):
        ste_fill(view.c, sid, memo.ste)
    return why


# S3.9.1-15
cdef inline int ats_context(
        const Hw* hw, Port* port, View* view, uint32_t ssid, Memo* memo,
        Syndrome* syndrome) noexcept nogil:
    """Find and decode the CD, unless stage 1 is bypassed: 0, why not, or a negative stop."""
    cdef uint32_t cached = 0
    cdef int why = ste_substream(hw, memo, ssid)
    if why or memo.index == STAGE1_BYPASS:
        return why
    if view != NULL:
        cached = cd_probe(view.c, memo.sid, <uint32_t>memo.index, memo.cd)
    if not cached:
        why = cd_fetch(hw, port, view, memo, syndrome)
    if why == 0:
        why = cd_decode(hw, memo.ste, memo.cd, &memo.context)
    if view != NULL and not cached and why == 0 and keeps_what_is_read(view):
        cd_fill(view.c, memo.sid, <uint32_t>memo.index, memo.cd)
    return why


# --- a page in both stages ---

# S3.9.1-6
cdef inline int ats_stage1(
        View* view, const Context* context, Port* port, uint64_t iova, unsigned int access,
        unsigned int kind, AtsPages* pages, bint* known, Syndrome* syndrome) noexcept nogil:
    """The stage-1 page of an address, which may deny the access: 0, why not, or a stop.

    `known`: the TLB has it, of KIND_COMBINED with stage 2; else it may be kept there.
    """
    cdef unsigned int upper = half_of(iova, context.two_ttbs)
    cdef const Half* half = &context.half[upper]
    cdef const Entry* e
    cdef uint64_t va
    cdef int why = half_fault(context, iova, upper, access)
    known[0] = False
    if why:
        return why
    va = canonical(half, iova, upper)
    if view != NULL:
        e = tlb_probe(view.c, kind, context.world, context.vmid, context.asid, context.aset, va)
        if e != NULL and usable(e, access):
            known[0] = True
            leaf_of(e, 1, &pages.first)
            pages.clean = (e.flags & (ENTRY_CLEAN1 | ENTRY_CLEAN2)) != 0
            if kind == KIND_COMBINED:
                leaf_of(e, 2, &pages.second)
                pages.pa = e.address | va & low_mask(e.lg2)
                pages.ipa = e.ipa | va & low_mask(e.lg2)
            else:
                pages.pa = pages.ipa = e.address | va & low_mask(e.lg2)
            return 0
    why = walk_steps(view, context, port, iova, access, &pages.first, syndrome)
    if why == 0 and view != NULL and kind == KIND_S1:
        tlb_fill_from_walk(
            view, context, KIND_S1, va, half, &pages.first, NULL, 0, pages.first.address)
    if why_event(why) == EVENT_F_PERMISSION and not syndrome.s2:
        why = 0
    if why == 0:
        pages.clean = context.hd and clean_s1(pages.first.d)
        pages.pa = pages.ipa = pages.first.address | iova & low_mask(pages.first.shift)
    return why


# S3.9.1.2-8, S3.13.7.1-1, S13.6.3-2, S13.6.4-1, S13.6.5-1, S13.7-10
cdef inline int ats_pages(
        View* view, const Context* context, Port* port, const Request* request, const AtsAsk* ask,
        unsigned int access, bint nested, AtsPages* pages, Syndrome* syndrome) noexcept nogil:
    """What the stages that there are say of an address: 0, why not, or a stop.

    The pages may deny the access.  Where stage 1 grants nothing, stage 2 is not asked.
    """
    cdef const Half* half
    cdef uint64_t iova = request.iova
    cdef unsigned int need = context.need[access], upper, kind = KIND_S1
    cdef bint known = False
    cdef int why = 0
    leaf_none(&pages.first)
    leaf_none(&pages.second)
    pages.first.perm = pages.second.perm = 0x3F
    pages.ipa = pages.pa = iova
    pages.clean = False
    syndrome_set(syndrome, 0, False, CLASS_IN)
    if nested:
        if view != NULL and context.second.on and not view.c.split:
            kind = KIND_COMBINED
        why = ats_stage1(view, context, port, iova, access, kind, pages, &known, syndrome)
        if why or known and kind == KIND_COMBINED:
            return why
    if (not context.second.on
            or not ats_granted(context, ask, request.access, pages.first.perm)):
        return why
    why = stage2(view, context, port, pages.ipa, need, (access & ACCESS_WRITE) != 0, CLASS_IN,
                 &pages.second, &pages.pa, syndrome)
    if why == 0 and kind == KIND_COMBINED and pages.first.perm & need:
        upper = half_of(iova, context.two_ttbs)
        half = &context.half[upper]
        tlb_fill_from_walk(
            view, context, KIND_COMBINED, canonical(half, iova, upper), half, &pages.first,
            &pages.second, pages.ipa, pages.pa)
    if why == 0 or why_event(why) == EVENT_F_PERMISSION:
        why = 0
        pages.pa = pages.second.address | pages.ipa & low_mask(pages.second.shift)
        # the TLB does not say of its stage-2 entries whether they are clean
        if context.second.hd and (pages.second.entry == NOWHERE or clean_s2(pages.second.d)):
            pages.clean = True
    return why


# --- translation requests ---

# S3.9.1-2, S3.9.1-14, S3.9.1.2-9, S3.9.1.2-12, S3.9.1.2-15, S3.13.7.1-2, S3.13.7.1-4, S13.6.4-2,
# S13.6.5-2, S13.7-2, S13.7-3
cdef inline int ats_translate(
        const Hw* hw, Port* port, View* view, const Request* request, const AtsAsk* ask,
        const Memo* memo, AtsAnswer* answer) noexcept nogil:
    """Answer a request whose configuration was looked up: 0, or a negative stop."""
    cdef const Context* context = &memo.context
    cdef Outcome* outcome = &answer.outcome
    cdef AtsPages pages
    cdef Syndrome syndrome
    cdef bint nested = memo.index != STAGE1_BYPASS
    cdef unsigned int access = request.access, granted = 0
    cdef int why, _attempt
    memset(&pages, 0, sizeof(pages))
    if view != NULL:
        view.stage2_only = not nested
    if not nested:
        if untranslatable(hw, request, &syndrome):
            end_untranslatable(hw, request, context, &syndrome, outcome)
            outcome.event = 0
            return 0
        if not context.second.on:
            # no stage is left: the identity, whatever No Write says (13.6.4)
            end_unmapped(outcome, ACTION_BYPASS, request.iova, 0x3F, context.attr, context.sh)
            outcome.page_lg2 = ask.stu_lg2
            answer.granted = ATS_READ | ATS_WRITE
            return 0
    for _attempt in range(2):
        why = ats_pages(view, context, port, request, ask, access, nested, &pages, &syndrome)
        if why < 0:
            return why
        if why:
            end_request(hw, request, context, why, &syndrome, answer)
            return 0
        granted = ats_granted(context, ask, request.access, pages.first.perm & pages.second.perm)
        if not granted & ATS_WRITE or granted & ATS_READ and not pages.clean:
            break
        access |= ACCESS_WRITE
    answer.granted = granted
    if not granted:
        return 0
    if not context.second.on:
        finish_stage1(hw, request, context, 0, &pages.first, &syndrome, outcome)
    else:
        finish_stage2(hw, request, context, nested, 0, &pages.first, &pages.second, pages.ipa,
                      pages.pa, &syndrome, outcome)
    return 0


# S3.9.1-1, S3.9.1.2-1, S3.9.1.2-2, S3.11-7, S6.3.9.6-3, S13.2-3
cdef inline int ats_answer(
        const Hw* hw, Port* port, View* view, const Request* request, const AtsAsk* ask,
        AtsAnswer* answer) noexcept nogil:
    """Answer a translation request: 0, or a negative stop."""
    cdef Memo memo
    cdef Syndrome syndrome
    cdef unsigned int eats = EATS_OFF
    cdef int why
    answer.status = ATS_SUCCESS
    answer.granted = 0
    answer.split = False
    end_unmapped(&answer.outcome, ACTION_ABORT, 0, 0, 0, 0)
    if not hw.ats:
        answer.status = ATS_UR
        end_refused(&answer.outcome, WHY_ATS_ABSENT)
        return 0
    if not cr0_smmuen(hw.cr0):
        end_bad_request(hw, request, ask, WHY_ATS_DISABLED, answer)
        return 0
    why = ats_stream(hw, port, view, request.sid, &memo, &syndrome)
    if why == WHY_STE_CONFIG:
        answer.status = ATS_UR
        end_refused(&answer.outcome, why)
        return 0
    if why == 0:
        eats = eats_effective(hw, memo.ste)
        if eats == EATS_OFF:
            end_bad_request(hw, request, ask, WHY_ATS_EATS, answer)
            return 0
        answer.split = eats == EATS_SPLIT
        why = ats_context(hw, port, view, request.ssid, &memo, &syndrome)
    if why < 0:
        return why
    if why:
        end_request(hw, request, &memo.context, why, &syndrome, answer)
        return 0
    return ats_translate(hw, port, view, request, ask, &memo, answer)


cdef inline int ats_request(
        Core* core, Port* port, const Request* request, const AtsAsk* ask,
        AtsAnswer* answer) noexcept nogil:
    """Answer a translation request with all that follows from it: 0, or a negative stop."""
    cdef View view
    cdef int status
    if core.caches == NULL:
        status = ats_answer(&core.hw, port, NULL, request, ask, answer)
    else:
        view_open(&view, core, request)
        status = ats_answer(&core.hw, port, &view, request, ask, answer)
    return deliver(core, port, request, status, &answer.outcome)


# --- Translated transactions ---

# S3.9.1.3-10, S3.9.1.3-11, S13.7-9
cdef inline void translated_input(const Hw* hw, Request* request) noexcept nogil:
    """What the SMMU knows of a Translated transaction's PASID, privilege and instruction (3.9.1.3).

    Without IDR3.PASIDTT none of them arrives; without a PASID it is unprivileged and Data.
    """
    if not hw.pasidtt:
        request.ssid = NO_SSID
    if request.ssid == NO_SSID:
        request.access &= ACCESS_WRITE


# S3.9.1.3-8, S3.9.1.3-9, S3.9.1.3-12, S3.13.7.1-5, S13.1.4-3, S13.1.4-5, S13.6.3-5, S13.6.3-6,
# S13.7-11, S13.7-12
cdef inline int ats_ipa(
        const Hw* hw, Port* port, View* view, const Request* request, Memo* memo,
        Outcome* outcome) noexcept nogil:
    """Split-stage ATS: the address is an IPA.

    The STE's overrides of privilege and instruction apply, those of attributes do not (13.1.4).
    """
    cdef Context* context = &memo.context
    cdef Leaf first, leaf
    cdef Syndrome syndrome
    cdef uint64_t pa = 0
    cdef int why
    context.attr = ATTR_WB
    context.sh = shareability(ATTR_WB, 0)
    context.second.on = True
    if untranslatable(hw, request, &syndrome):
        end_untranslatable(hw, request, context, &syndrome, outcome)
        return 0
    if view != NULL:
        view.stage2_only = True
    leaf_none(&first)
    leaf_none(&leaf)
    first.perm = 0x3F
    why = stage2(view, context, port, request.iova, context.need[request.access],
                 (request.access & ACCESS_WRITE) != 0, CLASS_IN, &leaf, &pa, &syndrome)
    if why < 0:
        return why
    finish_stage2(hw, request, context, False, why, &first, &leaf, request.iova, pa, &syndrome,
                  outcome)
    return 0


# S2.8-3, S3.9.1-12, S3.9.1.3-1, S3.9.1.3-2, S3.9.1.3-6, S3.9.1.3-7, S3.9.1.3-14, S3.9.1.3-15,
# S3.9.1.3-16, S6.3.9-7, S6.3.9.2-1, S6.3.9.6-6, S7.3.7-3, S7.3.9-5, S7.3.22-6
cdef inline int translated_one(
        const Hw* hw, Port* port, View* view, const Request* request,
        Outcome* outcome) noexcept nogil:
    """One Translated transaction, as translated_input() leaves it: 0, or a negative stop."""
    cdef Memo memo
    cdef Syndrome syndrome
    cdef unsigned int eats = EATS_OFF
    cdef int why
    if not hw.ats:
        end_refused(outcome, WHY_ATS_ABSENT)
        return 0
    if not cr0_smmuen(hw.cr0):
        end_forbidden(hw, request, WHY_TRANSLATED_DISABLED, outcome)
        return 0
    if not cr0_atschk(hw.cr0):
        end_passed(hw, request, outcome)
        return 0
    why = ats_stream(hw, port, view, request.sid, &memo, &syndrome)
    if why < 0:
        return why
    if why == WHY_STE_CONFIG:
        end_refused(outcome, why)
        return 0
    if why == 0:
        eats = eats_effective(hw, memo.ste)
        if eats == EATS_OFF:
            end_forbidden(hw, request, WHY_TRANSLATED_EATS, outcome)
            return 0
        if hw.pasidtt:
            why = substream(hw, memo.ste, request.ssid, &memo.index)
    if why:
        end_fault(hw, request, outcome, why, 0, recorded_if_asked(hw) | TERMINATE_SID, &syndrome)
        return 0
    if eats == EATS_FULL:
        end_passed(hw, request, outcome)
        return 0
    return ats_ipa(hw, port, view, request, &memo, outcome)


cdef inline int ats_translated(
        Core* core, Port* port, const Request* request, Outcome* outcome) noexcept nogil:
    """One Translated transaction with all that follows from it: 0, or a negative stop."""
    cdef View view
    cdef int status
    if core.caches == NULL:
        status = translated_one(&core.hw, port, NULL, request, outcome)
    else:
        view_open(&view, core, request)
        status = translated_one(&core.hw, port, &view, request, outcome)
    return deliver(core, port, request, status, outcome)
