"""Rows of a batch through stage 1: down to the last tables, then the leaves."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from smmufast._facts.bits cimport noinline, le64, likely, load64, low_mask, prefetch, unlikely
from smmufast._engine.cache cimport ctz64
from smmufast._engine.cached cimport deliver, translate_request
from smmufast._rules.config cimport admitted
from smmufast._engine.memory cimport FETCH_OK, Port, fetch8
from smmufast._engine.stage cimport AT_OTHER, AT_PAGES, Descent, descend, descriptor, level_of
from smmufast._engine.stage1 cimport leaf_perm
from smmufast._engine.translate cimport translate_known
from smmufast._facts.types cimport (
    ACCESS_WRITE, ACTION_OK, FETCH_TT, BatchC, ColumnC, Context, Half, Outcome, Request,
)
from smmufast._rules.vmsa cimport (
    DESC_LEAF, clean_s1, descriptor_kind, entry_address, half_of, in_range, leaf_address, leaf_sh,
    mair_byte, shareability, stage1_attr, used_leaf,
)
from smmufast._engine.vector cimport (
    Lanes, Rows, Span, plain_arrive, plain_down, plain_near, vector_arrive, vector_down,
    vector_find, vector_near,
)
from smmufast._engine.batch_block cimport (
    FULL, LEFT, QUIET, REST, ROWS, WALKS, ByOne, Near, Pairs, Run, Shape, batch_scalar, load_u32,
    load_u64, load_u8, near_forget, store_outcome, store_record, store_u16, store_u64, store_u8,
)
from smmufast._engine.batch_contexts cimport (
    lanes_of, open_contexts, pair_known, pairs_missing,
)
from smmufast._engine.batch_pairs cimport Ways


# --- rows ---

cdef inline void rows_fill(Run* run, Rows* rows, unsigned int upper) noexcept nogil:
    """All rows are in this half of the one context."""
    cdef uint64_t first = run.shape[0].memo.context.half[upper].table
    cdef size_t i, n = run.batch.n if run.batch.n < <size_t>ROWS else <size_t>ROWS
    memset(rows.shape, upper, n)
    for i in range(n):
        rows.first[i] = first
    rows.half = upper


cdef inline void column_u32(
        const ColumnC* column, size_t start, size_t count, uint32_t* into) noexcept nogil:
    cdef size_t i
    if column.stride == 4:
        memcpy(into, <const char*>column.data + 4 * start, 4 * count)
    else:
        for i in range(count):
            into[i] = load_u32(column, start + i)


cdef inline void pairs_read(Run* run, Rows* rows) noexcept nogil:
    """Contexts of a block's rows: those remembered, then all others."""
    cdef Pairs* pairs = run.pairs
    cdef Ways ways
    cdef uint64_t[2] missing
    cdef size_t i
    cdef unsigned int k
    cdef bint keep = pairs.rest == 0
    ways.count = 0
    if not keep:
        pairs.rest -= 1
        for i in range(rows.count):
            ways.row[i] = <uint8_t>i
        ways.count = <unsigned int>rows.count
    elif run.vector:
        vector_find(
            <const uint64_t*>pairs.slot, pairs.epoch, rows, rows.count, missing)
        for k in range(2):
            while missing[k]:
                ways.row[ways.count] = <uint8_t>(64 * k + ctz64(missing[k]))
                ways.count += 1
                missing[k] &= missing[k] - 1
    else:
        for i in range(rows.count):
            if not pair_known(pairs, rows, i):
                ways.row[ways.count] = <uint8_t>i
                ways.count += 1
    if ways.count:
        if keep and pairs.filled >= FULL and 4 * ways.count > rows.count:
            pairs.rest = REST
        pairs_missing(run, rows, &ways, keep)


cdef inline void rows_read(
        Run* run, Rows* rows, size_t start, size_t count, bint one_pair) noexcept nogil:
    """Take the inputs of a block, once: a caller may write there meanwhile."""
    cdef const BatchC* batch = run.batch
    cdef const Context* context
    cdef size_t i
    cdef uint64_t any_bit = 0, each = ~<uint64_t>0
    cdef unsigned int upper
    rows.start = start
    rows.count = count
    rows.lg2 = 1
    rows.removed = 0
    rows.alike = batch.access.stride == 0
    if batch.iova.stride == 8:
        memcpy(rows.va, <const char*>batch.iova.data + 8 * start, 8 * count)
    else:
        for i in range(count):
            rows.va[i] = load_u64(&batch.iova, start + i)
    if batch.access.stride:
        for i in range(count):
            rows.access[i] = load_u8(&batch.access, start + i) & 7
    if one_pair:
        if run.halves:
            for i in range(count):
                any_bit |= rows.va[i]
                each &= rows.va[i]
            upper = half_of(any_bit, True)
            if upper == half_of(each, True):
                if rows.half != upper:
                    rows_fill(run, rows, upper)
                return
            rows.half = 2
            context = &run.shape[0].memo.context
            for i in range(count):
                upper = half_of(rows.va[i], True)
                rows.shape[i] = upper
                rows.first[i] = context.half[upper].table
        return
    column_u32(&batch.sid, start, count, rows.sid)
    column_u32(&batch.ssid, start, count, rows.ssid)
    pairs_read(run, rows)


cdef inline void rows_prepare(Run* run, Rows* rows, bint one_pair) noexcept nogil:
    """Fill in what is the same for all rows of the batch."""
    if run.batch.access.stride == 0:
        memset(rows.access, load_u8(&run.batch.access, 0) & 7, ROWS)
    rows.half = 2
    if one_pair and run.shapes == 0:
        memset(rows.shape, LEFT, ROWS)
    elif one_pair:
        rows_fill(run, rows, 0)


cdef inline void near_keep(
        Near* near, unsigned int shape, uint64_t first, const Half* half, uint64_t va,
        const Descent* at) noexcept nogil:
    """Remember the last two tables of a walk, unless they are the first.

    Addresses in a table's reach are in the range of the half then, for the table above it
    indexes bits beyond the reach.
    """
    cdef unsigned int reach = half.granule + half.stride
    if reach > half.shift:
        return
    near.moved += va >> reach != near.tag[0]
    near.shape = shape
    near.first = first
    near.reach[0] = reach
    near.tag[0] = va >> reach
    near.table[0] = at.table
    near.tables[0] = at.tables
    reach += half.stride
    if at.above and reach <= half.shift:
        near.reach[1] = reach
        near.tag[1] = va >> reach
        near.table[1] = at.above
        near.tables[1] = at.tables_above


cdef inline void set_out(
        Rows* rows, size_t i, Port* port, const Context* context, Near* near, bint one_pair,
        bint simple) noexcept nogil:
    """First pass: walk down to the last table and ask for its entry.

    Whatever is not an ordinary walk is left to the scalar path.  `simple` is
    context.simple.
    """
    cdef uint64_t va = rows.va[i]
    cdef unsigned int upper = rows.shape[i] & 1
    cdef const Half* half = &context.half[upper]
    cdef Descent at
    cdef uint64_t ia, offset, raw = 0
    cdef int status
    rows.entry[i] = NULL
    if not one_pair and (near.first != rows.first[i] or near.shape != rows.shape[i]):
        near_forget(near)
    if near.trusted and va >> near.reach[0] == near.tag[0]:
        ia = va
        at.table = near.table[0]
        at.tables = near.tables[0]
        at.shift = half.granule
    else:
        if va >> near.reach[1] == near.tag[1]:
            ia = va
            at.table = near.table[1]
            at.tables = near.tables[1]
            at.shift = half.granule + half.stride
        else:
            if not half.enabled or not in_range(va, half.range_mask, upper):
                return
            ia = va & half.index_mask
            at.table = rows.first[i]
            at.tables = 0
            at.shift = half.shift
        status = descend(half, port, FETCH_TT, ia, &at, simple)
        if unlikely(status != AT_PAGES):
            if status == AT_OTHER and descriptor_kind(
                    descriptor(half, at.raw, simple), level_of(half, at.shift),
                    half.fitting) == DESC_LEAF:
                rows.tables[i] = at.tables & half.keep
                rows.shift[i] = at.shift
                rows.held[i] = at.raw
                rows.entry[i] = <const uint8_t*>&rows.held[i]
            return
        near_keep(near, rows.shape[i], rows.first[i], half, va, &at)
    rows.tables[i] = at.tables & half.keep
    rows.shift[i] = at.shift
    at.address = entry_address(half, at.table, ia, at.shift)
    offset = at.address - port.window.base
    if likely(offset <= port.window.span):
        rows.entry[i] = port.window.data + offset
        prefetch(rows.entry[i])
    elif fetch8(port, FETCH_TT, 3, at.address, &raw) == FETCH_OK:
        rows.held[i] = le64(raw)
        rows.entry[i] = <const uint8_t*>&rows.held[i]


cdef inline int arrive(
        const Rows* rows, size_t i, const Context* context, const BatchC* batch,
        bint more, bint simple) noexcept nogil:
    """Second pass: read the leaf and write the columns.

    0, or 1 when the request is left to the scalar path.  `more`: columns other than pa,
    action and event are wanted.
    """
    cdef const Half* half
    cdef unsigned int upper, shift, perm, attr, access = rows.access[i]
    cdef uint64_t d, address, va = rows.va[i]
    cdef size_t row = rows.start + i
    if unlikely(rows.entry[i] == NULL):
        return 1
    upper = rows.shape[i] & 1
    half = &context.half[upper]
    shift = rows.shift[i]
    d = descriptor(half, load64(rows.entry[i]), simple)
    # a page's bit 1 is set, a block's is not
    if unlikely((d ^ used_leaf(shift == half.granule)) & half.leaf_bits):
        return 1
    address = leaf_address(d, half, shift) if not simple else (
        d & half.low_address & ~low_mask(shift))
    if not simple and address & half.over:
        return 1
    perm = leaf_perm(context, upper, d, rows.tables[i], simple)
    if unlikely(not perm & context.need[access]):
        return 1
    if not simple and context.hd and access & ACCESS_WRITE and clean_s1(d):
        return 1  # to be marked dirty
    store_u64(&batch.pa, row, address | (va & low_mask(shift)))
    store_u8(&batch.action, row, ACTION_OK)
    store_u8(&batch.event, row, 0)
    if more:
        store_u8(&batch.fault, row, 0)
        store_u8(&batch.perm, row, admitted(context, perm))
        store_u8(&batch.level, row, level_of(half, shift))
        store_u8(&batch.page_lg2, row, shift)
        if batch.attr.data != NULL or batch.sh.data != NULL:
            attr = stage1_attr(context.attr, mair_byte(context.mair, d))
            store_u8(&batch.attr, row, attr)
            store_u8(&batch.sh, row, shareability(attr, leaf_sh(d, half)))
        store_u64(&batch.ipa, row, 0)
        store_u8(&batch.stage, row, 1)
        store_record(&batch.record, row, NULL)
        store_u16(&batch.why, row, 0)
    return 0


cdef inline void set_out_row(Run* run, Rows* rows, size_t i, bint one_pair) noexcept nogil:
    cdef const Shape* shape
    if rows.shape[i] == LEFT or not run.shape[rows.shape[i] >> 1].walks:
        rows.entry[i] = NULL
        return
    shape = &run.shape[rows.shape[i] >> 1]
    if likely(shape.memo.context.simple):
        set_out(rows, i, run.port, &shape.memo.context, &run.near, one_pair, True)
    else:
        set_out(rows, i, run.port, &shape.memo.context, &run.near, one_pair, False)


cdef inline size_t run_of(
        const Run* run, const Rows* rows, size_t i, size_t step, bint one_pair) noexcept nogil:
    """The end of the rows from i on that have the shape of row i, looked at by steps of 8."""
    cdef uint8_t shape = rows.shape[i]
    cdef uint64_t eight = shape * <uint64_t>0x0101010101010101, found
    cdef size_t n = i
    if one_pair and (rows.half < 2 or run.shapes == 0):
        return rows.count
    while n + 8 <= rows.count:
        memcpy(&found, &rows.shape[n], 8)
        if found != eight:
            break
        n += 8
    if n + 8 > rows.count or step == 1:
        while n < rows.count and rows.shape[n] == shape:
            n += 1
        if step != 1 and n < rows.count:
            n &= ~<size_t>7
    return n


cdef inline void rows_set_out(Run* run, Rows* rows, bint one_pair) noexcept nogil:
    """First pass over a block."""
    cdef Port* port = run.port
    cdef const Lanes* lanes
    cdef size_t i = 0, k, n
    cdef uint64_t left
    cdef uint64_t[2] beyond
    cdef Span window
    if not run.laned:
        for i in range(rows.count):
            set_out_row(run, rows, i, one_pair)
        # a test that half the requests pass costs more than the walk that it saves
        run.near.trusted = run.near.moved <= rows.count // 8
        run.near.moved = 0
        return
    beyond[0] = beyond[1] = 0
    while i < rows.count:
        n = run_of(run, rows, i, 8, one_pair)
        lanes = lanes_of(run, rows.shape[i]) if n > i else NULL
        if lanes != NULL:
            window.base = port.window.base
            window.span = port.window.span
            window.data = port.window.data
            if run.vector:
                vector_down(lanes, &window, rows, i, n, &run.last, beyond)
            else:
                plain_down(lanes, &window, rows, i, n, &run.last, beyond)
            i = n
            continue
        n = i + 8 if n == i else n
        if n > rows.count:
            n = rows.count
        while i < n:
            beyond[i >> 6] |= <uint64_t>1 << (i & 63)
            i += 1
    run.sequence = one_pair and run.last.alike * (10U if run.vector else 2U) >= rows.count
    if run.last.mixed:
        run.last.lg2 = run.last.size if run.last.blocks * 8 >= rows.count else 0
    run.last.careful = not run.last.lg2 and run.last.mixed * 40 > rows.count  # a fifth of them
    run.last.alike = run.last.mixed = run.last.blocks = run.last.size = 0
    for k in range(2):
        left = beyond[k]
        while unlikely(left != 0):
            i = 64 * k + ctz64(left)
            left &= left - 1
            rows.lg2 = 0
            set_out_row(run, rows, i, one_pair)


cdef inline int row_scalar(Run* run, const Rows* rows, size_t i, bint one_pair) noexcept nogil:
    """One row by the scalar path, in the context that its block decoded where that is its own."""
    cdef Shape* shape = &run.shape[rows.shape[i] >> 1]
    cdef Request request
    cdef Outcome outcome
    cdef int status
    request.iova = rows.va[i]
    request.access = rows.access[i]
    request.reserved = 0
    if one_pair:
        request.sid = load_u32(&run.batch.sid, 0)
        request.ssid = load_u32(&run.batch.ssid, 0)
    else:
        request.sid = rows.sid[i]
        request.ssid = rows.ssid[i]
    if rows.shape[i] != LEFT and (one_pair or not shape.walks):
        status = translate_known(&run.core.hw, run.port, &request, &shape.memo, &outcome)
        status = deliver(run.core, run.port, &request, status, &outcome)
    else:
        status = translate_request(run.core, run.port, &request, &run.memo, &outcome)
    if status == 0:
        store_outcome(run.batch, rows.start + i, &outcome)
    return status


ctypedef int (*RowScalar)(Run*, const Rows*, size_t, bint) noexcept nogil


cdef inline int rows_arrive(Run* run, Rows* rows, bint one_pair, size_t* done) noexcept nogil:
    """Second pass over a block; `done` rows of it.  Not all, when memory was written."""
    cdef RowScalar scalar = <RowScalar>noinline(<void*>row_scalar)
    cdef Shape* shape
    cdef const Lanes* lanes = NULL
    cdef size_t i = 0, n = 0
    cdef int status
    while i < rows.count:
        if run.laned and not run.more:
            if i >= n:
                n = run_of(run, rows, i, 1, one_pair)
                lanes = lanes_of(run, rows.shape[i])
            if lanes != NULL:
                if run.vector:
                    i = vector_arrive(lanes, rows, i, n, &run.out)
                else:
                    i = plain_arrive(lanes, rows, i, n, &run.out)
                if i == n:
                    continue
        status = 1
        if rows.shape[i] != LEFT:
            shape = &run.shape[rows.shape[i] >> 1]
            if likely(shape.memo.context.simple):
                status = arrive(rows, i, &shape.memo.context, run.batch, run.more, True)
            else:
                status = arrive(rows, i, &shape.memo.context, run.batch, run.more, False)
        if unlikely(status):
            run.last.lg2 = 0
            status = scalar(run, rows, i, one_pair)
            if status:
                run.port.stopped = rows.start + i
                return status
            if run.port.wrote:
                done[0] = i + 1
                return 0
        i += 1
    done[0] = rows.count
    return 0


cdef inline size_t run_near(Run* run, size_t start) noexcept nogil:
    """Translate rows in sequence from `start` on; how many.  The next one is not such a row."""
    cdef const BatchC* batch = run.batch
    cdef Port* port = run.port
    cdef unsigned int upper
    cdef const Lanes* lanes
    cdef Span window
    if run.shapes == 0:
        return 0
    upper = half_of(load_u64(&batch.iova, start), run.halves)
    lanes = lanes_of(run, upper)
    if lanes == NULL:
        return 0
    window.base = port.window.base
    window.span = port.window.span
    window.data = port.window.data
    return (vector_near if run.vector else plain_near)(
        lanes, &window, run.shape[0].memo.context.half[upper].table,
        <const char*>batch.iova.data, load_u8(&batch.access, 0) & 7, start, batch.n, &run.out,
        &run.near_table)


cdef inline int rows_alone(Run* run, size_t* start) noexcept nogil:
    """Rows from `start` on by the scalar path, until as many as QUIET wrote no memory."""
    cdef ByOne scalar = <ByOne>noinline(<void*>batch_scalar)
    cdef unsigned int quiet = 0
    cdef int status
    while start[0] < run.batch.n and quiet < QUIET:
        run.port.wrote = False
        status = scalar(run.core, run.port, &run.memo, run.batch, start[0])
        if status:
            run.port.stopped = start[0]
            return status
        quiet = 0 if run.port.wrote else quiet + 1
        start[0] += 1
    return 0


cdef inline int run_blocks(Run* run, bint one_pair) noexcept nogil:
    """Both passes over every block, the second one block later.

    A row that writes memory makes an end of what was set out behind it; where that may happen
    again soon, rows are done alone.
    """
    cdef Rows[2] rows
    cdef size_t n = run.batch.n, start = 0, count, done = 0
    cdef size_t full = ROWS if run.vector else WALKS
    cdef unsigned int now = 0
    cdef bint pending = False, anew = True
    cdef int status
    run.port.wrote = False
    while pending or start < n:
        if unlikely(run.port.wrote):
            start = rows[now ^ 1].start + done
            pending = False
            status = rows_alone(run, &start)
            if status:
                return status
            run.port.wrote = False
            anew = True
            continue
        if unlikely(anew):
            # contexts may have changed
            anew = False
            open_contexts(run)
            run.halves = run.shapes != 0 and run.shape[0].memo.context.two_ttbs
            rows_prepare(run, &rows[0], one_pair)
            rows_prepare(run, &rows[1], one_pair)
        if run.sequence and run.direct and start < n:
            if pending:
                status = rows_arrive(run, &rows[now ^ 1], one_pair, &done)
                if status:
                    return status
                if unlikely(run.port.wrote):
                    continue
                pending = False
            start += run_near(run, start)
        if start < n:
            count = n - start if n - start < full else full
            rows_read(run, &rows[now], start, count, one_pair)
            rows_set_out(run, &rows[now], one_pair)
            start += count
        else:
            rows[now].count = 0
        if pending:
            status = rows_arrive(run, &rows[now ^ 1], one_pair, &done)
            if status:
                return status
            if unlikely(run.port.wrote):
                continue
        pending = rows[now].count != 0
        now ^= 1
    return 0
