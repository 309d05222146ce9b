"""Rows of a batch through stage 2, alone or below stage 1."""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy, memset

from smmufast._facts.bits cimport noinline, le64, unlikely
from smmufast._engine.cache cimport ctz64
from smmufast._rules.config cimport STAGE1_BYPASS, ste_stage2
from smmufast._engine.core cimport Core
from smmufast._facts.layout cimport cr0_smmuen, pte_s2_set_s2ap, pte_s2_set_xn, ste_v
from smmufast._engine.memory cimport FETCH_OK, Port, fetch8
from smmufast._engine.chain cimport CLASS_TT, Leaf, Syndrome
from smmufast._engine.stage cimport AT_OTHER, AT_PAGES, Descent, descend, level_of
from smmufast._engine.stage2 cimport stage2
from smmufast._engine.lookup cimport Memo, ste_fetch
from smmufast._facts.types cimport ACTION_OK, FETCH_S2TT, FETCH_TT, PERM_PR, BatchC, Context, Half
from smmufast._rules.vmsa cimport (
    DESC_LEAF, TABLE, descriptor_kind, entry_address, first_table, half_of, stage2_permitted,
)
from smmufast._engine.vector cimport (
    EPOCH_LG2, KNOWN_LG2, Known, Lanes, Out, Rows, known_home, known_key, plain_arrive, plain_find,
    vector_arrive, vector_known, vector_on,
)
from smmufast._engine.batch_block cimport (
    FEW, ROWS, ByOne, Pairs, Run, batch_scalar, load_u32, load_u64, load_u8,
)
from smmufast._engine.batch_contexts cimport half_lanes, lanes_fill, scratch_give, scratch_take
from smmufast._engine.batch_rows cimport rows_alone, run_blocks


# --- both stages ---
# One pair whose context has stage 2.  The first row is the scalar path's, which decodes the
# context in its turn; the rest have the last tables of both stages from a cache of this call.

cdef struct Reuse:
    uint64_t epoch            # 1 to 2^20 - 1
    Known[1 << KNOWN_LG2] first
    Known[1 << KNOWN_LG2] second


cdef inline const uint8_t* in_window(
        const Port* port, uint64_t address, uint64_t size) noexcept nogil:
    """All of a table, on the host; NULL if it is not in the window."""
    cdef uint64_t offset = address - port.window.base
    if offset > port.window.span or port.window.span - offset < size - 8:
        return NULL
    return port.window.data + offset


cdef inline int stage2_table(
        const Half* half, Port* port, uint64_t ipa, const uint8_t** table,
        uint64_t* held, unsigned int* shift) noexcept nogil:
    """Walk stage 2 to the last table of an IPA, or to a block: 0, or 1 for the scalar path."""
    cdef Descent at
    cdef int status
    at.table = first_table(half, ipa)
    at.tables = 0
    at.shift = half.shift
    status = descend(half, port, FETCH_S2TT, ipa, &at, True)
    table[0] = NULL
    held[0] = at.raw
    shift[0] = at.shift
    if status == AT_PAGES:
        table[0] = in_window(port, at.table, half.entry_mask + 8)
        return table[0] == NULL
    return status != AT_OTHER or descriptor_kind(
        le64(at.raw), level_of(half, at.shift), half.fitting) != DESC_LEAF


cdef inline int nested_table(
        const Context* context, const Half* half, Port* port, uint64_t ia,
        const uint8_t** table, uint64_t* held, uint64_t* tables,
        unsigned int* shift) noexcept nogil:
    """The same for stage 1, each table through stage 2."""
    cdef Leaf outer
    cdef Syndrome syndrome
    cdef uint64_t at = half.table, address = 0, d = 0
    cdef int status
    shift[0] = half.shift
    tables[0] = 0
    table[0] = NULL
    while True:
        if shift[0] != half.granule:
            at = entry_address(half, at, ia, shift[0])
        status = stage2(NULL, context, port, at, PERM_PR, False, CLASS_TT, &outer, &address,
                        &syndrome)
        if status:
            return 1  # a fault, or an access flag to be set
        if shift[0] == half.granule:
            if outer.shift < half.granule:
                return 1  # the table has several pages
            table[0] = in_window(port, address, half.entry_mask + 8)
            return table[0] == NULL
        if fetch8(port, FETCH_TT, level_of(half, shift[0]), address, &d) != FETCH_OK:
            return 1
        status = descriptor_kind(d, level_of(half, shift[0]), half.fitting)
        if status == DESC_LEAF:
            held[0] = le64(d)
            return 0
        if (d & half.table_bits) != TABLE:
            return 1
        at = d & half.low_address
        tables[0] |= d
        shift[0] -= half.stride


cdef inline void nested_missing(
        Run* run, Reuse* reuse, const Lanes* lanes, Rows* rows, size_t i,
        bint stage1) noexcept nogil:
    """Walk to the last table of a row, or to its block; keep the table."""
    cdef const Context* context = &run.memo.context
    cdef uint64_t ia = rows.va[i] & lanes.index_mask, key = known_key(lanes, ia, reuse.epoch)
    cdef uint64_t tables = 0
    cdef const Half* half = &context.second.half
    cdef const uint8_t* table = NULL
    cdef unsigned int shift = 0
    cdef int left
    cdef Known* known = &reuse.second[known_home(key)]
    if stage1:
        half = &context.half[lanes.sign & 1]
        known = &reuse.first[known_home(key)]
        left = nested_table(context, half, run.port, ia, &table, &rows.held[i], &tables, &shift)
    else:
        left = stage2_table(half, run.port, ia, &table, &rows.held[i], &shift)
    if left:
        return
    rows.tables[i] = tables & half.keep
    rows.shift[i] = shift
    rows.entry[i] = <const uint8_t*>&rows.held[i]
    if table != NULL:
        rows.entry[i] = table + (ia >> (half.granule - 3) & half.entry_mask)
        known.key = key
        known.table = <uint64_t><size_t>table | (tables & half.keep) >> 59 << 60


ctypedef void (*NestedMissing)(
    Run*, Reuse*, const Lanes*, Rows*, size_t, bint) noexcept nogil


cdef inline void nested_ask(
        Run* run, Reuse* reuse, const Lanes* lanes, Rows* rows, bint stage1) noexcept nogil:
    """Ask for the leaves of a block at one stage."""
    cdef const Known* known = &reuse.first[0] if stage1 else &reuse.second[0]
    cdef uint64_t[2] missing
    cdef int k
    if run.vector:
        vector_known(lanes, known, reuse.epoch, rows, rows.count, missing)
    else:
        plain_find(lanes, known, reuse.epoch, rows, rows.count, missing)
    for k in range(2):
        while unlikely(missing[k] != 0):
            (<NestedMissing>noinline(<void*>nested_missing))(
                run, reuse, lanes, rows, 64 * k + ctz64(missing[k]), stage1)
            missing[k] &= missing[k] - 1


cdef inline size_t leaves_arrive(
        const Run* run, const Lanes* lanes, const Rows* rows, size_t i,
        const Out* out) noexcept nogil:
    if run.vector:
        return vector_arrive(lanes, rows, i, rows.count, out)
    return plain_arrive(lanes, rows, i, rows.count, out)


cdef inline void nested_lanes(Run* run, Lanes* first, Lanes* second) noexcept nogil:
    """Both halves of stage 1 and stage 2, as the passes over blocks ask for them."""
    cdef const Context* context = &run.memo.context
    cdef unsigned int access, code
    cdef uint64_t leaf
    if run.memo.index != STAGE1_BYPASS:
        lanes_fill(&first[0], context, 0)
        lanes_fill(&first[1], context, 1)
    half_lanes(second, &context.second.half)
    second.sign = 0
    second.walks = True
    if run.memo.index == STAGE1_BYPASS:
        second.range_mask |= run.core.hw.oas_over
    for access in range(8):
        second.allowed[access] = 0
        for code in range(16):  # {XN, S2AP}
            leaf = pte_s2_set_s2ap(pte_s2_set_xn(0, code >> 2), code)
            if stage2_permitted(leaf, context.second.xnx) & context.need[access]:
                second.allowed[access] |= <uint64_t>1 << code


cdef inline bint nested_takes(const Run* run) noexcept nogil:
    """The context that the scalar path left is one for these passes."""
    cdef const Context* context = &run.memo.context
    return (
        cr0_smmuen(run.core.hw.cr0) and run.memo.whole
        and context.second.on and context.second.simple and not context.second.hd
        and (run.memo.index == STAGE1_BYPASS or context.simple))


cdef inline int run_nested(Run* run, Reuse* reuse) noexcept nogil:
    """Translate the rows of one pair, of which the first may turn out to have stage 2."""
    cdef const BatchC* batch = run.batch
    cdef Rows[2] rows         # at stage 1, at stage 2
    cdef Lanes[2] first
    cdef Lanes second
    cdef uint8_t[ROWS] left   # stage 1 leaves the row to the scalar path
    cdef Out ipas
    cdef ByOne scalar = <ByOne>noinline(<void*>batch_scalar)
    cdef size_t start = 0, count, i
    cdef bint takes = False, stage1 = True, again = False, pure = run.port.pure
    cdef const Lanes* lanes
    cdef int status
    ipas.pa = <char*>rows[1].va
    ipas.action = ipas.event = NULL
    ipas.pa_stride = 8
    ipas.action_stride = ipas.event_stride = 1
    ipas.ok = 0
    while start < batch.n:
        if not takes:
            if again:
                status = rows_alone(run, &start)
                if status:
                    return status
                if start == batch.n:
                    break
            run.port.wrote = False
            status = scalar(run.core, run.port, &run.memo, batch, start)
            if status:
                run.port.stopped = start
                return status
            start += 1
            again = True
            takes = not run.port.wrote and nested_takes(run)
            if takes:
                stage1 = run.memo.index != STAGE1_BYPASS
                nested_lanes(run, first, &second)
                reuse.epoch += 1
                if reuse.epoch >> EPOCH_LG2:
                    memset(reuse, 0, sizeof(Reuse))
                    reuse.epoch = 1
            continue
        count = batch.n - start
        if count > ROWS:
            count = ROWS
        rows[0].count = rows[1].count = count
        rows[0].start = 0
        rows[1].start = start
        rows[0].lg2 = rows[1].lg2 = 0
        for i in range(count):
            rows[0].va[i] = load_u64(&batch.iova, start + i)
            rows[0].access[i] = rows[1].access[i] = load_u8(&batch.access, start + i) & 7
        run.port.pure = True  # tables are walked ahead of their turn: nothing is updated
        memset(left, 0, count)
        if stage1:
            lanes = &first[half_of(rows[0].va[0], run.memo.context.two_ttbs)]
            if not lanes.walks:
                memset(left, 1, count)
            else:
                nested_ask(run, reuse, lanes, &rows[0], True)
                i = 0
                while True:
                    i = leaves_arrive(run, lanes, &rows[0], i, &ipas)
                    if i >= count:
                        break
                    left[i] = 1
                    rows[1].va[i] = 0
                    i += 1
                    if i >= count:
                        break
        else:
            memcpy(rows[1].va, rows[0].va, 8 * count)
        nested_ask(run, reuse, &second, &rows[1], False)
        run.port.pure = pure
        for i in range(count):
            if unlikely(left[i]):
                rows[1].entry[i] = NULL
        i = 0
        while True:
            i = leaves_arrive(run, &second, &rows[1], i, &run.out)
            if i >= count:
                break
            status = scalar(run.core, run.port, &run.memo, batch, start + i)
            if status:
                run.port.stopped = start + i
                return status
            i += 1
            if run.port.wrote or not run.memo.whole:
                takes = False
                break
            if i >= count:
                break
        start += i
    return 0


cdef inline bint wants_more(const BatchC* batch) noexcept nogil:
    """Columns other than pa, action and event are wanted."""
    return (
        batch.fault.data != NULL or batch.perm.data != NULL or batch.level.data != NULL
        or batch.page_lg2.data != NULL or batch.attr.data != NULL or batch.sh.data != NULL
        or batch.ipa.data != NULL or batch.stage.data != NULL or batch.record.data != NULL
        or batch.why.data != NULL
    )


cdef inline int translate_each(
        Core* core, Port* port, const BatchC* batch) noexcept nogil:
    """Translate a batch one by one: memory that is not plain sees the requests in their order."""
    cdef Memo memo
    cdef size_t i
    cdef int status
    memo.whole = False
    for i in range(batch.n):
        status = batch_scalar(core, port, &memo, batch, i)
        if status:
            port.stopped = i
            return status
    return 0


cdef inline bint through_stage2(Run* run) noexcept nogil:
    """The one pair's STE enables stage 2."""
    cdef Syndrome syndrome
    run.memo.whole = False
    return ste_fetch(&run.core.hw, run.port, load_u32(&run.batch.sid, 0), &run.memo,
                     &syndrome) == 0 and ste_v(run.memo.ste) and ste_stage2(run.memo.ste)


ctypedef int (*NestedRun)(Run*, Reuse*) noexcept nogil


cdef inline int translate_plain(
        Core* core, Port* port, const BatchC* batch) noexcept nogil:
    """Translate a batch of at least one request, in plain memory and with SMMUEN=1."""
    cdef Run run
    cdef bint one_pair = batch.sid.stride == 0 and batch.ssid.stride == 0
    cdef Reuse* reuse
    cdef int status
    run.core = core
    run.port = port
    run.batch = batch
    run.pairs = NULL
    run.more = wants_more(batch)
    run.laned = batch.n >= FEW
    run.vector = vector_on and run.laned
    run.shapes = 0
    run.near.moved = 0
    run.near.trusted = False
    run.sequence = False
    run.last.alike = run.last.mixed = run.last.careful = 0
    run.last.blocks = run.last.size = run.last.lg2 = 0
    run.out.pa = <char*>batch.pa.data
    run.out.action = <char*>batch.action.data
    run.out.event = <char*>batch.event.data
    run.out.pa_stride = batch.pa.stride if batch.pa.data != NULL else 8
    run.out.action_stride = batch.action.stride if batch.action.data != NULL else 1
    run.out.event_stride = batch.event.stride if batch.event.data != NULL else 1
    run.out.ok = ACTION_OK
    run.direct = (
        run.laned and not run.more and one_pair and batch.iova.stride == 8
        and batch.access.stride == 0 and run.out.pa_stride == 8 and run.out.action_stride == 1
        and run.out.event_stride == 1)
    if one_pair and not run.more and batch.n >= FEW and through_stage2(&run):
        reuse = <Reuse*>scratch_take(&core.reuse, sizeof(Reuse))
        if reuse == NULL:
            return translate_each(core, port, batch)
        status = (<NestedRun>noinline(<void*>run_nested))(&run, reuse)
        scratch_give(&core.reuse, reuse)
        return status
    if one_pair:
        return run_blocks(&run, True)
    run.pairs = <Pairs*>scratch_take(&core.pairs, sizeof(Pairs))
    if run.pairs == NULL:
        return translate_each(core, port, batch)
    status = run_blocks(&run, False)
    scratch_give(&core.pairs, run.pairs)
    return status
