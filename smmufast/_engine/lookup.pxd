"""Configuration lookup: StreamID to STE, SubstreamID to CD (IHI 0070 15.1)."""

from libc.stdint cimport uint32_t, uint64_t

from smmufast._facts.bits cimport noinline, unlikely
from smmufast._rules.config cimport (
    STAGE1_BYPASS, cd_decode, cd_first, l1cd_next, l1std_next, stage2_decode, ste_aborts, ste_check,
    ste_overrides, ste_stage2, ste_vmid, stream_first, substream,
)
from smmufast._facts.layout cimport *
from smmufast._engine.memory cimport FETCH_ABORT, Port, fetch8, fetch64, unchanged8, unchanged64
from smmufast._facts.hw cimport Hw
from smmufast._facts.types cimport (
    FETCH_CD, FETCH_L1CD, FETCH_L1STD, FETCH_STE, NO_LEVEL, PERM_PR, Context,
)
from smmufast._facts.why cimport *
from smmufast._engine.chain cimport CLASS_CD, CLASS_IN, NOWHERE, Leaf, Syndrome, View, syndrome_set
from smmufast._engine.stage2 cimport stage2


# --- configuration lookup (15.1) ---

# A decoded context and everything that was fetched for it.  It is a function of these, so as
# long as they are what memory holds it need not be decoded again.
cdef struct Memo:
    bint whole            # all of it belongs together
    uint64_t hw_generation  # of the registers that it was decoded by
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
    uint64_t config_generation  # with caches: of the configuration that the handles belong to
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
            or memo.hw_generation != hw.generation):
        return False
    if memo.l1std_at != NOWHERE and not unchanged8(port, memo.l1std_at, memo.l1std):
        return False
    if not unchanged64(port, memo.ste_at, memo.ste):
        return False
    if memo.l1cd_at != NOWHERE:
        if unlikely(memo.context.second.on) and not (<SamePlace>noinline(<void*>same_place))(
                memo, port, memo.l1cd_ipa, memo.l1cd_at):
            return False
        if not unchanged8(port, memo.l1cd_at, memo.l1cd):
            return False
    if memo.cd_at != NOWHERE:
        if unlikely(memo.context.second.on) and not (<SamePlace>noinline(<void*>same_place))(
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
    memo.hw_generation = hw.generation
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
