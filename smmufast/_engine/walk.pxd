"""The walk whose fetches the host performs: the chain of one translation, a fetch at a time.

Sections: IHI 0070 15 (translation procedure), 3.21.1 and 3.21.3 (walks and invalidation), 4.7.3
(what CMD_SYNC completes).  A path over the functions of translate.pxd and cached.pxd that say
where to read next and what was read.  Where the scalar path is inside of a call, this one has a
step, and what that needs to know is in `Walking`: which structure or level is awaited, what was
decoded so far, and of stage 2 what it translates and for whom.

walk_step() takes the answer to one fetch and goes on to the next.  It reads no memory, allocates
nothing, keeps no pointer and waits for nobody: a walk is its struct, which may be dropped or moved.
So arrays of walks, whose requests and answers are vectors, and walks that wait for other walks need
another loop around it, and nothing in here.

Caches are asked at the step where the walk comes to them, which counts as ever, and filled when it
has read something, unless an invalidation came since it began.  A walk that an invalidation and
CMD_SYNC overtook starts again when the host looks at it or answers it: it may use nothing of what
it read before, not even the answer.  Or it holds CMD_SYNC, which then waits for its end.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from smmufast._facts.bits cimport le64
from smmufast._engine.cached cimport cd_take, deliver, ste_look, ste_take, view_open
from smmufast._rules.config cimport STAGE1_BYPASS
from smmufast._engine.core cimport Core
from smmufast._facts.layout cimport cr0_smmuen
from smmufast._engine.memory cimport FETCH_ABORT, FETCH_OK, Log, Port, log_fetch, port_open
from smmufast._engine.queue cimport walk_again, walk_enter, walk_leave
from smmufast._engine.tlb cimport cd_probe
from smmufast._engine.chain cimport (
    AT_TABLE, CHANGED, CLASS_CD, CLASS_IN, CLASS_TT, ENDED, NOWHERE, RETRIES, TO_STAGE1, Leaf, View,
    syndrome_set,
)
from smmufast._engine.stage cimport (
    Place, descriptor_at, descriptor_read, update_desired, update_expected, update_read,
)
from smmufast._engine.stage2 cimport (
    stage2_answer, stage2_begin, stage2_down, stage2_fault, stage2_keep, stage2_updates,
)
from smmufast._engine.lookup cimport (
    Memo, cd_output, cd_read, cd_way, l1cd_read, l1std_read, lookup_open, ste_first, ste_read,
    ste_substream,
)
from smmufast._engine.stage1 cimport (
    WRITE_DENIED, WRITE_OUTER, WRITE_THROUGH, leaf_fault, race_lost, stage1_begin, stage1_down,
    stage1_stopped, stage1_updates, update_denied, update_way,
)
from smmufast._engine.translate cimport (
    Stages, end_disabled, end_lookup, stage1_walked, stage2_walked, stages_begin,
)
from smmufast._facts.hw cimport Hw
from smmufast._facts.types cimport (
    ACCESS_WRITE, FETCH_CD, FETCH_L1CD, FETCH_L1STD, FETCH_NONE, FETCH_S2TT, FETCH_S2TT_UPDATE,
    FETCH_STE, FETCH_TT, FETCH_TT_UPDATE, HOLDS_SYNC, NO_LEVEL, PERM_PR, PERM_PW, STATUS_DONE,
    STATUS_PENDING, Context, FetchC, Half, Outcome, Request, WalkC,
)
from smmufast._rules.vmsa cimport dirty_s2, entry_address, half_of


cdef enum:
    # The answer to a fetch is awaited:
    STEP_L1STD
    STEP_STE
    STEP_L1CD
    STEP_CD
    STEP_TT             # a descriptor of stage 1
    STEP_TT_UPDATE      # its update
    STEP_OUTER_UPDATE   # that of the leaf of stage 2 that maps it
    STEP_S2TT           # a descriptor of stage 2
    STEP_S2TT_UPDATE    # its update
    # There is no more to do:
    STEP_ENDED
    # Something is known, and the walk goes on:
    STEP_BEGIN          # nothing yet
    STEP_CONFIGURED     # the STE
    STEP_L1CD_PLACED    # Walking.address, where the L1CD lies
    STEP_CD_PLACED      # Walking.address, where the CD lies
    STEP_CONTEXT        # the CD
    STEP_TRANSLATE      # the context
    STEP_STAGE1         # that stage 1 walks
    STEP_DESCRIPTOR     # at which table it is
    STEP_TT_PLACED      # Walking.address, where its descriptor lies
    STEP_TT_WRITABLE    # that the descriptor can be updated
    STEP_STAGE2         # that stage 2 translates Walking.ipa
    STEP_OUT            # Walking.address, where the access goes


# The state of a walk; in smmufast_walk.state.
cdef struct Walking:
    uint64_t seal          # of everything below: that the struct is as it was left
    uint64_t begun         # walk_enter()
    uint8_t step           # STEP_...: what is awaited
    # stage 2: what it translates, and for whom
    uint8_t then           # STEP_... to go on with
    uint8_t need           # as stage2() has them
    uint8_t dirty
    uint8_t cls
    uint8_t tries2
    uint64_t ipa
    uint64_t address       # what the IPA translates to
    Place at2
    int why2               # of its leaf, while that is updated
    # stage 1
    int why1               # likewise
    uint8_t tries1
    uint64_t leaf_ipa      # where its last descriptor lies, before stage 2
    Place at1
    Stages stages          # what was found; `second` also is the leaf that stage 2 walks to now
    Memo memo              # what was decoded


cdef extern from *:
    """
    /* Whether a struct fits in another, which the compiler sees to. */
    #define smmufast_fits(a, b) ((void)sizeof(char[(a) <= (b) ? 1 : -1]))
    #define smmufast_state_size sizeof(((smmufast_walk *)0)->state)
    #define smmufast_state_at offsetof(smmufast_walk, state)
    /* A sum of n words, in four lanes since each step of one waits for the step before. */
    static inline uint64_t smmufast_sum(const uint64_t *words, size_t n)
    {
        uint64_t a[4] = {1, 2, 3, 4};
        size_t i, k;
        for (i = 0; i + 4 <= n; i += 4)
            for (k = 0; k < 4; k++)
                a[k] = (a[k] ^ words[i + k]) * 0x9E3779B97F4A7C15u;
        for (; i < n; i++)
            a[0] = (a[0] ^ words[i]) * 0x9E3779B97F4A7C15u;
        for (k = 1; k < 4; k++)
            a[0] = (a[0] ^ a[0] >> 29 ^ a[k]) * 0x9E3779B97F4A7C15u;
        return a[0] ^ a[0] >> 32;
    }
    """
    void fits "smmufast_fits"(size_t a, size_t b) noexcept nogil
    const size_t STATE_SIZE "smmufast_state_size"
    const size_t STATE_AT "smmufast_state_at"
    uint64_t word_sum "smmufast_sum"(const uint64_t* words, size_t n) noexcept nogil


cdef inline Walking* walking(const WalkC* walk) noexcept nogil:
    """The state of a walk."""
    fits(sizeof(Walking), STATE_SIZE)
    return <Walking*>walk.state


# --- the host's struct ---

cdef inline bint walk_fits(const WalkC* walk) noexcept nogil:
    """The host's struct has room for the state: headers differ in how much they leave."""
    return walk.size >= STATE_AT + sizeof(Walking)


cdef inline uint64_t walk_sum(const WalkC* walk) noexcept nogil:
    """Of the state, and of what else of the struct the walk will use."""
    cdef const Walking* w = walking(walk)
    return (word_sum(&w.begun, sizeof(Walking) // 8 - 1)
            ^ word_sum(<const uint64_t*>&walk.request, sizeof(Request) // 8)
            ^ word_sum(<const uint64_t*>&walk.fetch, sizeof(FetchC) // 8) ^ walk.flags)


cdef inline void walk_seal(WalkC* walk) noexcept nogil:
    """The host gets its struct back."""
    walking(walk).seal = walk_sum(walk)


cdef inline bint walk_sealed(const WalkC* walk) noexcept nogil:
    """The struct is what walk_seal() left: no index and no shift in it is any other."""
    return walk_fits(walk) and walking(walk).seal == walk_sum(walk)


# --- what a step may do ---

cdef inline int asks(
        WalkC* walk, int step, int kind, int level, uint64_t address,
        unsigned int size) noexcept nogil:
    """Ask the host for a read, and wait for the answer."""
    cdef FetchC* fetch = &walk.fetch
    fetch.address = address
    fetch.expected = fetch.desired = 0
    fetch.size = <unsigned short>size
    fetch.kind = <uint8_t>kind
    fetch.level = <signed char>level
    fetch.reserved = 0
    return step


cdef inline int asks_update(
        WalkC* walk, int step, int kind, const Half* half, const Leaf* leaf) noexcept nogil:
    """Ask the host for a hardware update of leaf.d to leaf.desired, and wait for the answer."""
    asks(walk, step, kind, leaf.level, leaf.entry, 8)
    walk.fetch.expected = update_expected(half, leaf)
    walk.fetch.desired = update_desired(half, leaf)
    return step


cdef inline int asks_s2tt(WalkC* walk, Walking* w) noexcept nogil:
    """Ask the host for the next descriptor of stage 2."""
    cdef const Half* half = &w.memo.context.second.half
    cdef Leaf* leaf = &w.stages.second
    descriptor_at(half, entry_address(half, w.at2.table, w.ipa, w.at2.shift), w.at2.shift, leaf)
    return asks(walk, STEP_S2TT, FETCH_S2TT, leaf.level, leaf.entry, 8)


cdef inline int through_stage2(
        Walking* w, uint64_t ipa, unsigned int need, bint dirty, unsigned int cls,
        int then) noexcept nogil:
    """Let stage 2 translate an IPA to w.address, and go on."""
    w.ipa = ipa
    w.need = <uint8_t>need
    w.dirty = dirty
    w.cls = <uint8_t>cls
    w.then = <uint8_t>then
    w.tries2 = 0
    return STEP_STAGE2


cdef inline int failed(const Hw* hw, WalkC* walk, Walking* w, int why) noexcept nogil:
    """Configuration lookup ends in a refusal."""
    end_lookup(hw, &walk.request, &w.memo.context, why, &w.stages.syndrome, &walk.result)
    return STEP_ENDED


cdef inline int after_stage1(WalkC* walk, Walking* w, int next) noexcept nogil:
    """Go on as stages_begin() and stage1_walked() say."""
    cdef unsigned int access = walk.request.access
    if next == ENDED:
        return STEP_ENDED
    w.tries1 = 0
    if next == TO_STAGE1:
        return STEP_STAGE1
    return through_stage2(w, w.stages.ipa, w.memo.context.need[access],
                          (access & ACCESS_WRITE) != 0, CLASS_IN, STEP_OUT)


cdef inline int stage1_done(
        const Hw* hw, View* view, WalkC* walk, Walking* w, int why) noexcept nogil:
    """A walk of stage 1 ends: it has a leaf or none, or lost a race and walks again."""
    if why == CHANGED:
        w.tries1 += 1
        if w.tries1 < RETRIES:
            return STEP_STAGE1
    return after_stage1(walk, w, stage1_walked(
        hw, view, &walk.request, &w.memo.context, race_lost(why), &w.stages, &walk.result))


cdef inline int stage2_answered(
        const Hw* hw, View* view, WalkC* walk, Walking* w, int why) noexcept nogil:
    """Stage 2 has an address for whoever needed it, or none."""
    why = stage2_answer(
        why, w.ipa, w.cls, &w.stages.second, &w.address, &w.stages.syndrome)
    if why == 0:
        return w.then
    if w.cls == CLASS_CD:
        return failed(hw, walk, w, why)
    if w.cls == CLASS_IN:
        stage2_walked(hw, view, &walk.request, &w.memo, why, &w.stages, &walk.result)
        return STEP_ENDED
    if w.then == STEP_TT_WRITABLE:
        w.stages.syndrome.ttrnw = False
    return stage1_done(hw, view, walk, w, why)


cdef inline int stage2_done(
        const Hw* hw, View* view, WalkC* walk, Walking* w, int why) noexcept nogil:
    """A walk of stage 2 ends, likewise."""
    if why == CHANGED:
        w.tries2 += 1
        if w.tries2 < RETRIES:
            return STEP_STAGE2
    if why == 0:
        stage2_keep(view, &w.memo.context, w.ipa, w.cls, &w.stages.second)
    return stage2_answered(hw, view, walk, w, why)


cdef inline const Half* half_walked(const WalkC* walk, const Walking* w) noexcept nogil:
    """The half of the context that stage 1 walks."""
    return &w.memo.context.half[half_of(walk.request.iova, w.memo.context.two_ttbs)]


# --- what was read ---

cdef inline int read_tt(
        const Hw* hw, View* view, WalkC* walk, Walking* w, int status,
        uint64_t raw) noexcept nogil:
    """A descriptor of stage 1 was read."""
    cdef const Context* context = &w.memo.context
    cdef const Half* half = half_walked(walk, w)
    cdef Leaf* leaf = &w.stages.first
    cdef Leaf* outer = &w.stages.second
    cdef int way, why = descriptor_read(half, FETCH_TT, status, raw, leaf, &w.at1.table)
    if why == AT_TABLE:
        stage1_down(view, context, half, w.stages.va, leaf.d, &w.at1)
        return STEP_DESCRIPTOR
    if why:
        stage1_stopped(why, leaf, &w.stages.syndrome)
        return stage1_done(hw, view, walk, w, why)
    leaf.tables = w.at1.tables
    why = leaf_fault(
        context, half, w.stages.va, half_of(walk.request.iova, context.two_ttbs),
        walk.request.access, leaf, False)
    if not stage1_updates(context, why, leaf, outer):
        return stage1_done(hw, view, walk, w, why)
    w.why1 = why
    if not context.second.on:
        return STEP_TT_WRITABLE
    way = update_way(&context.second, outer)
    if way == WRITE_DENIED:
        return stage1_done(hw, view, walk, w, update_denied(w.leaf_ipa, &w.stages.syndrome))
    if way == WRITE_THROUGH:
        return through_stage2(w, w.leaf_ipa, PERM_PW, True, CLASS_TT, STEP_TT_WRITABLE)
    if way == WRITE_OUTER:
        outer.desired = dirty_s2(outer.d)
        return asks_update(
            walk, STEP_OUTER_UPDATE, FETCH_S2TT_UPDATE, &context.second.half, outer)
    return STEP_TT_WRITABLE


cdef inline int read_s2tt(
        const Hw* hw, View* view, WalkC* walk, Walking* w, int status,
        uint64_t raw) noexcept nogil:
    """A descriptor of stage 2 was read."""
    cdef const Context* context = &w.memo.context
    cdef const Half* half = &context.second.half
    cdef Leaf* leaf = &w.stages.second
    cdef int why = descriptor_read(half, FETCH_S2TT, status, raw, leaf, &w.at2.table)
    if why == AT_TABLE:
        stage2_down(view, context, w.ipa, &w.at2)
        return asks_s2tt(walk, w)
    if why == 0:
        why = stage2_fault(
            &context.second, w.ipa, w.need, w.dirty, w.cls != CLASS_IN, leaf)
        if stage2_updates(&context.second, why, leaf):
            w.why2 = why
            return asks_update(walk, STEP_S2TT_UPDATE, FETCH_S2TT_UPDATE, half, leaf)
    return stage2_done(hw, view, walk, w, why)


cdef inline int read_update(
        const Hw* hw, View* view, WalkC* walk, Walking* w, int status,
        uint64_t found) noexcept nogil:
    """An update was made, or was not, for this was found there."""
    cdef const Half* half = &w.memo.context.second.half
    cdef Leaf* first = &w.stages.first
    cdef Leaf* second = &w.stages.second
    cdef int why
    if w.step == STEP_TT_UPDATE:
        why = update_read(half_walked(walk, w), FETCH_TT_UPDATE, status, found, first)
        if why:
            syndrome_set(&w.stages.syndrome, first.entry, False, CLASS_TT)
        return stage1_done(hw, view, walk, w, why if why else w.why1)
    why = update_read(half, FETCH_S2TT_UPDATE, status, found, second)
    if w.step == STEP_S2TT_UPDATE:
        return stage2_done(hw, view, walk, w, why if why else w.why2)
    if why == 0:
        return STEP_TT_WRITABLE
    syndrome_set(&w.stages.syndrome, second.entry, True, CLASS_TT)
    return stage1_done(hw, view, walk, w, why)


cdef inline int read_structure(
        const Hw* hw, WalkC* walk, Walking* w, int status, const uint64_t* words) noexcept nogil:
    """A structure of the configuration was read."""
    cdef Memo* memo = &w.memo
    cdef int why
    if w.step == STEP_L1STD:
        memo.l1std = words[0]
        why = l1std_read(hw, memo.sid, status, memo, &w.stages.syndrome)
        if why == 0:
            return asks(walk, STEP_STE, FETCH_STE, NO_LEVEL, memo.ste_at, 64)
    elif w.step == STEP_STE:
        memcpy(memo.ste, words, 64)
        why = ste_read(status)
        if why == 0:
            return STEP_CONFIGURED
    elif w.step == STEP_L1CD:
        memo.l1cd = words[0]
        why = l1cd_read(hw, status, memo)
        if why == 0:
            return place(hw, walk, w, FETCH_CD, memo.cd_ipa, STEP_CD_PLACED)
    else:
        memcpy(memo.cd, words, 64)
        why = cd_read(status)
        if why == 0:
            return STEP_CONTEXT
    return failed(hw, walk, w, why)


# --- where to read next ---

cdef inline int place(
        const Hw* hw, WalkC* walk, Walking* w, int kind, uint64_t ipa, int then) noexcept nogil:
    """Find where an L1CD or a CD lies, FETCH_..., and go on."""
    cdef int why
    if w.memo.context.second.on:
        return through_stage2(w, ipa, PERM_PR, False, CLASS_CD, then)
    why = cd_output(hw, ipa, kind, &w.address, &w.stages.syndrome)
    return failed(hw, walk, w, why) if why else then


cdef inline int look_up(const Hw* hw, View* view, WalkC* walk, Walking* w) noexcept nogil:
    """Find the STE."""
    cdef Memo* memo = &w.memo
    cdef int why = 0
    lookup_open(hw, walk.request.sid, walk.request.ssid, memo, &w.stages.syndrome)
    memo.ste_handle = memo.cd_handle = 0
    if view != NULL:
        why = ste_look(hw, view, memo)
        if why == 0 and memo.ste_handle:
            return STEP_CONFIGURED
    if why == 0:
        why = ste_first(hw, memo.sid, memo, &w.stages.syndrome)
    if why:
        return failed(hw, walk, w, why)
    if memo.l1std_at != NOWHERE:
        return asks(walk, STEP_L1STD, FETCH_L1STD, NO_LEVEL, memo.l1std_at, 8)
    return asks(walk, STEP_STE, FETCH_STE, NO_LEVEL, memo.ste_at, 64)


cdef inline int look_up_cd(const Hw* hw, View* view, WalkC* walk, Walking* w) noexcept nogil:
    """The STE is there: find the CD, if stage 1 translates."""
    cdef Memo* memo = &w.memo
    cdef int why = ste_take(hw, view, memo)
    if why == 0:
        why = ste_substream(hw, memo, memo.ssid)
    if why:
        return failed(hw, walk, w, why)
    if memo.index == STAGE1_BYPASS:
        return STEP_TRANSLATE
    if view != NULL:
        memo.cd_handle = cd_probe(view.c, memo.sid, <uint32_t>memo.index, memo.cd)
        if memo.cd_handle:
            return STEP_CONTEXT
    if cd_way(hw, memo):
        return place(hw, walk, w, FETCH_L1CD, memo.l1cd_ipa, STEP_L1CD_PLACED)
    return place(hw, walk, w, FETCH_CD, memo.cd_ipa, STEP_CD_PLACED)


cdef inline int ask_descriptor(WalkC* walk, Walking* w) noexcept nogil:
    """Find where the next descriptor of stage 1 lies."""
    cdef const Half* half = half_walked(walk, w)
    w.leaf_ipa = entry_address(
        half, w.at1.table, w.stages.va & half.index_mask, w.at1.shift)
    if w.memo.context.second.on:
        return through_stage2(w, w.leaf_ipa, PERM_PR, False, CLASS_TT, STEP_TT_PLACED)
    w.address = w.leaf_ipa
    return STEP_TT_PLACED


cdef inline int stage2_walk(const Hw* hw, View* view, WalkC* walk, Walking* w) noexcept nogil:
    """Begin a walk of stage 2."""
    cdef int why = stage2_begin(
        view, &w.memo.context, w.ipa, w.need, w.dirty, w.cls, &w.stages.second, &w.at2)
    if why == AT_TABLE:
        return asks_s2tt(walk, w)
    return stage2_answered(hw, view, walk, w, why)


cdef inline int known(
        const Hw* hw, View* view, WalkC* walk, Walking* w, int step) noexcept nogil:
    """Go on from a step that awaits nothing: the next one."""
    cdef Memo* memo = &w.memo
    cdef const Half* half
    cdef int why
    if step == STEP_BEGIN:
        return look_up(hw, view, walk, w)
    if step == STEP_CONFIGURED:
        return look_up_cd(hw, view, walk, w)
    if step == STEP_L1CD_PLACED:
        memo.l1cd_at = w.stages.syndrome.address = w.address
        return asks(walk, STEP_L1CD, FETCH_L1CD, NO_LEVEL, w.address, 8)
    if step == STEP_CD_PLACED:
        memo.cd_at = w.stages.syndrome.address = w.address
        return asks(walk, STEP_CD, FETCH_CD, NO_LEVEL, w.address, 64)
    if step == STEP_CONTEXT:
        why = cd_take(hw, view, memo)
        return failed(hw, walk, w, why) if why else STEP_TRANSLATE
    if step == STEP_TRANSLATE:
        return after_stage1(walk, w, stages_begin(
            hw, view, &walk.request, memo, &w.stages, &walk.result))
    if step == STEP_STAGE2:
        return stage2_walk(hw, view, walk, w)
    if step == STEP_OUT:
        w.stages.pa = w.address
        stage2_walked(hw, view, &walk.request, memo, 0, &w.stages, &walk.result)
        return STEP_ENDED
    half = half_walked(walk, w)
    if step == STEP_STAGE1:
        stage1_begin(view, &memo.context, half, w.stages.va, &w.stages.first, &w.at1,
                     &w.stages.syndrome)
        return STEP_DESCRIPTOR
    if step == STEP_DESCRIPTOR:
        return ask_descriptor(walk, w)
    if step == STEP_TT_PLACED:
        descriptor_at(half, w.address, w.at1.shift, &w.stages.first)
        return asks(walk, STEP_TT, FETCH_TT, w.stages.first.level, w.address, 8)
    # STEP_TT_WRITABLE
    return asks_update(walk, STEP_TT_UPDATE, FETCH_TT_UPDATE, half, &w.stages.first)


# --- the path ---

cdef inline int walk_on(
        const Hw* hw, View* view, WalkC* walk, int step) noexcept nogil:
    """Go on until a fetch is needed, STATUS_PENDING; or STATUS_DONE with the outcome."""
    cdef Walking* w = walking(walk)
    while step > STEP_ENDED:
        step = known(hw, view, walk, w, step)
    w.step = <uint8_t>step
    if step != STEP_ENDED:
        return STATUS_PENDING
    memset(&walk.fetch, 0, sizeof(FetchC))
    walk.fetch.kind = FETCH_NONE
    walk.fetch.level = NO_LEVEL
    return STATUS_DONE


cdef inline int walk_step(
        const Hw* hw, View* view, WalkC* walk, int status, const uint64_t* words) noexcept nogil:
    """Take the answer to walk.fetch, and go on until the next: as walk_on().

    `status` is FETCH_OK or FETCH_ABORT; `words` are little-endian numbers.
    """
    cdef Walking* w = walking(walk)
    cdef int step
    if w.step == STEP_TT:
        step = read_tt(hw, view, walk, w, status, words[0])
    elif w.step == STEP_S2TT:
        step = read_s2tt(hw, view, walk, w, status, words[0])
    elif w.step <= STEP_CD:
        step = read_structure(hw, walk, w, status, words)
    else:
        step = read_update(hw, view, walk, w, status, words[0])
    return walk_on(hw, view, walk, step)


# --- a walk of one Smmu; whoever calls has the caches for itself ---

cdef inline bint walk_holds(const WalkC* walk) noexcept nogil:
    return (walk.flags & HOLDS_SYNC) != 0


# S3.21.1-4, S3.21.3-13
cdef inline bint walk_overtaken(const Core* core, const WalkC* walk) noexcept nogil:
    """The walk has to start again."""
    return walk_again(core, walking(walk).begun, walk_holds(walk))


cdef inline View* walk_view(View* view, const Core* core, const WalkC* walk) noexcept nogil:
    """The caches as the walk sees them, NULL without."""
    cdef const Walking* w = walking(walk)
    if core.caches == NULL:
        return NULL
    view_open(view, core, &walk.request)
    view.begun = w.begun
    view.stage2_only = w.memo.index == STAGE1_BYPASS
    return view


cdef inline int walk_begin(Core* core, WalkC* walk, Log* log) noexcept nogil:
    """Begin, or begin again: as walk_on().  The log forgets what was fetched before."""
    cdef View view
    cdef Walking* w = walking(walk)
    w.begun = walk_enter(core, walk_holds(walk))
    w.memo.index = 0
    if log != NULL:
        log.count = log.used = 0
    if cr0_smmuen(core.hw.cr0):
        return walk_on(&core.hw, walk_view(&view, core, walk), walk, STEP_BEGIN)
    end_disabled(&core.hw, &walk.request, &walk.result)
    return walk_on(&core.hw, NULL, walk, STEP_ENDED)


cdef inline int walk_answer(
        Core* core, WalkC* walk, Log* log, const void* data) noexcept nogil:
    """Answer walk.fetch by the bytes that lie there, or NULL for an external abort: as walk_on().

    The answer to a walk that was overtaken is dropped, and the walk starts again.
    """
    cdef View view
    cdef uint64_t[8] words
    cdef FetchC* fetch = &walk.fetch
    cdef unsigned int i, count = fetch.size // 8
    if walk_overtaken(core, walk):
        return walk_begin(core, walk, log)
    memset(words, 0, sizeof(words))
    if data != NULL:
        memcpy(words, data, fetch.size)
        for i in range(count):
            words[i] = le64(words[i])
    if log != NULL:
        if fetch.kind >= FETCH_TT_UPDATE:
            words[1] = fetch.expected
            words[2] = fetch.desired
            count = 3
        log_fetch(log, fetch.kind, fetch.level, fetch.address, fetch.size, words, count,
                  data == NULL)
    return walk_step(&core.hw, walk_view(&view, core, walk), walk,
                     FETCH_ABORT if data == NULL else FETCH_OK, words)


cdef inline int walk_tell(Core* core, Port* own, WalkC* walk) noexcept nogil:
    """What follows from the outcome of a walk that is done: its event, or its stall.

    0, or FETCH_RAISED with an exception in `own`.  The caller has the caches no more.
    """
    port_open(own, core.ram, NULL)
    return deliver(core, own, &walk.request, 0, &walk.result)


cdef inline int walk_leaves(Core* core, Port* own, WalkC* walk) noexcept nogil:
    """A walk is under way no more, and its event was told: CMD_SYNC may have waited for it.

    As walk_tell(); a second exception is dropped.
    """
    if walk_holds(walk) and walk_leave(core, walking(walk).begun):
        return core.queues.consume(core.queues.owner, own)
    return 0
