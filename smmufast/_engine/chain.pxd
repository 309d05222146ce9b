"""What the chain passes on: leaves, syndromes, views; and its ends, which fill an outcome."""

from libc.stdint cimport int8_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from smmufast._rules.config cimport TERMINATE_A, TERMINATE_R, TERMINATE_S, TERMINATE_SID
from smmufast._facts.layout cimport *
from smmufast._engine.tlb cimport CachesC
from smmufast._facts.hw cimport Hw
from smmufast._facts.types cimport (
    ACCESS_INSTR, ACCESS_PRIV, ACCESS_WRITE, ACTION_ABORT, ACTION_RAZ_WI, ACTION_STALL, NO_LEVEL,
    NO_SSID, Outcome, Request,
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
