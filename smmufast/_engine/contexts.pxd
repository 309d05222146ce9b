"""The contexts that the stream table leads to, one after the other, and the tags of each.

Sections: IHI 0070 3.3 (stream table, context descriptor tables), 3.17 (tags of TLB entries).  The
rules are those of _rules/config.pxd and translate.pxd.  What a level-1 descriptor does not lead to
is left out at once; apart from that each StreamID and each SubstreamID is looked up, in order.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from smmufast._facts.bits cimport low_mask
from smmufast._rules.config cimport STAGE1_BYPASS, cd_decode, cd_leaf_lg2, ste_stage1, substreams
from smmufast._facts.layout cimport ste_s1cdmax
from smmufast._engine.memory cimport Port
from smmufast._engine.tlb cimport CachesC, tlb_key
from smmufast._rules.scope cimport KIND_COMBINED, KIND_S1, KIND_S2, global_key
from smmufast._engine.chain cimport CLASS_IN, NOWHERE, Syndrome, syndrome_set
from smmufast._engine.lookup cimport Memo, cd_fetch, ste_decode, ste_fetch, ste_substream
from smmufast._facts.hw cimport Hw
from smmufast._facts.types cimport NO_SSID, Context


# --- tags ---

cdef extern from * nogil:
    """
    /* Of the key of a table: a bit that the key of a translation never has. */
    #define TAG_TABLE (1ULL << 62)
    """
    const uint64_t TAG_TABLE


# What the entries of one context are tagged with, without addresses and sizes; 0 where it has no
# entries of a sort.
cdef struct Tags:
    uint64_t own           # translations of stage 1, or of both stages
    uint64_t any_asid      # the same, global
    uint64_t table         # tables of stage 1
    uint64_t second        # translations of stage 2
    uint64_t second_table


cdef inline void context_tags(
        const CachesC* c, const Context* context, bint stage1, Tags* tags) noexcept nogil:
    """The tags of a context's entries; `stage1`: its CD was found, and is in it."""
    cdef unsigned int kind = KIND_S1, walked = KIND_S1
    memset(tags, 0, sizeof(Tags))
    if context.second.on:
        walked = KIND_COMBINED
        tags.second = tlb_key(c, KIND_S2, context.world, context.vmid, 0, 0)
        tags.second_table = tags.second | TAG_TABLE
        if not c.split:
            kind = KIND_COMBINED
    if stage1:
        tags.own = tlb_key(c, kind, context.world, context.vmid, context.asid, context.aset)
        tags.any_asid = global_key(tags.own)
        # tables have no ASET
        tags.table = TAG_TABLE | tlb_key(
            c, walked, context.world, context.vmid, context.asid, 0)


# --- one context after the other ---

cdef struct ContextWalk:
    uint64_t next_sid      # to be looked at next
    uint64_t end_sid
    int64_t next_ssid      # of the present stream; -1: without a SubstreamID
    int64_t end_ssid
    bint second_told       # a context of the present stream has had its stage 2
    uint64_t left          # look-ups that may still be made
    # the present context
    uint32_t sid
    uint32_t ssid
    bint stage1            # it has a CD
    Memo memo
    Context stream         # what the STE alone says


cdef inline void contexts_open(
        ContextWalk* walk, uint64_t first, uint64_t end, uint64_t left) noexcept nogil:
    """Begin with a StreamID, and end before another; `left` look-ups at most."""
    memset(walk, 0, sizeof(ContextWalk))
    walk.next_sid = first
    walk.end_sid = end
    walk.left = left


cdef inline int contexts_stream(const Hw* hw, Port* port, ContextWalk* walk) noexcept nogil:
    """Look the next stream up: 1 when it translates, 0 when it does not, or a negative stop."""
    cdef Syndrome syndrome
    cdef Memo* memo = &walk.memo
    cdef uint64_t sid = walk.next_sid
    cdef int why
    syndrome_set(&syndrome, 0, False, CLASS_IN)
    memo.ste_at = NOWHERE
    memo.sid = <uint32_t>sid
    why = ste_fetch(hw, port, <uint32_t>sid, memo, &syndrome)
    if why == 0:
        why = ste_decode(hw, memo)
    if why and hw.two_level and memo.ste_at == NOWHERE:
        sid |= low_mask(hw.split)  # nor are those behind it in its part of the table
    walk.next_sid = sid + 1
    if why:
        return why if why < 0 else 0
    walk.stream = memo.context
    walk.sid = memo.sid
    walk.second_told = False
    walk.next_ssid = -1
    walk.end_ssid = 0
    if ste_stage1(memo.ste) and substreams(hw, memo.ste):
        walk.end_ssid = <int64_t>1 << ste_s1cdmax(memo.ste)
    return 1


cdef inline int contexts_next(const Hw* hw, Port* port, ContextWalk* walk) noexcept nogil:
    """Go on to the next context: 1, 0 at the end, or a negative stop.

    It has a CD, or stage 2, or both; the stage 2 of a stream is told once, though no CD be valid.
    """
    cdef Syndrome syndrome
    cdef Memo* memo = &walk.memo
    cdef int why
    cdef bint second
    while True:
        while walk.next_ssid >= walk.end_ssid:
            if walk.next_sid >= walk.end_sid or walk.left == 0:
                return 0
            walk.left -= 1
            why = contexts_stream(hw, port, walk)
            if why < 0:
                return why
        if walk.left == 0:
            return 0
        walk.ssid = NO_SSID if walk.next_ssid < 0 else <uint32_t>walk.next_ssid
        walk.next_ssid += 1
        syndrome_set(&syndrome, 0, False, CLASS_IN)
        memo.context = walk.stream
        why = ste_substream(hw, memo, walk.ssid)
        walk.stage1 = why == 0 and memo.index != STAGE1_BYPASS
        second = memo.context.second.on
        if walk.stage1:
            walk.left -= 1
            memo.cd_ipa = NOWHERE
            why = cd_fetch(hw, port, NULL, memo, &syndrome)
            if why == 0:
                why = cd_decode(hw, memo.ste, memo.cd, &memo.context)
            elif (why > 0 and memo.l1cd_at != NOWHERE and memo.cd_ipa == NOWHERE
                    and walk.ssid != NO_SSID):
                # nor is there another CD in the leaf that the L1CD would name
                walk.next_ssid = <int64_t>(walk.ssid | low_mask(cd_leaf_lg2(hw, memo.ste))) + 1
            if why < 0:
                return why
            walk.stage1 = why == 0
        if walk.stage1 or second and not walk.second_told:
            walk.second_told = walk.second_told or second
            return 1
