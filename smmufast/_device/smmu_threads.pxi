"""A batch that several threads share."""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc

from smmufast._engine.core cimport Core, caches_give, caches_take, caches_take_gil
from smmufast._facts.layout cimport cr0_smmuen
from smmufast._engine.memory cimport Port, look_for_signals, port_open, raise_port
from smmufast._engine.ats cimport AtsAnswer, AtsAsk, ats_request, ats_translated
from smmufast._facts.types cimport BatchC, ColumnC, Outcome, Request

from smmufast._arguments import must_be


cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long Thread "pthread_t"
    int thread_start "pthread_create"(
        Thread* thread, void* attr, void* (*run)(void*) noexcept nogil, void* what)
    int thread_join "pthread_join"(Thread thread, void** result)

cdef enum:
    THREADS = 64        # at most
    SHARE = 1 << 13     # rows that a thread is worth

# One thread's share of a batch.
cdef struct Share:
    Core* core
    BatchC batch
    Port port
    Thread thread
    size_t start
    int status
    bint started


cdef void* share_run(void* what) noexcept nogil:
    """Translate rows for as long as none of them would write memory."""
    cdef Share* share = <Share*>what
    port_open(&share.port, share.core.ram, NULL)
    share.port.pure = True
    share.status = plain(share.core, &share.port, &share.batch)
    return NULL


cdef int shares_run(Core* core, Port* port, const BatchC* batch, int threads) noexcept nogil:
    """Translate a batch by several threads, with the results of one.

    Translation reads memory, and what only reads it can be done in any order.  From the first
    row on that records an event, stalls or updates a descriptor, one thread does the rest.
    """
    cdef Share[THREADS] shares
    cdef BatchC rest
    cdef size_t n = batch.n, start = 0, stopped = n
    cdef int count, k
    count = <int>(n / SHARE) if n / SHARE < <size_t>threads else threads
    if count > THREADS:
        count = THREADS
    if (count < 2 or core.caches != NULL or not core.ram.plain or not cr0_smmuen(core.hw.cr0)):
        return batch_run(core, port, batch)
    for k in range(count):
        shares[k].core = core
        shares[k].batch = batch[0]
        shares[k].start = start
        shift_columns(&shares[k].batch, start)
        shares[k].batch.n = n / count if k < count - 1 else n - start
        start += shares[k].batch.n
        shares[k].started = k > 0 and thread_start(
            &shares[k].thread, NULL, share_run, &shares[k]) == 0
        if k and not shares[k].started:
            share_run(&shares[k])
    share_run(&shares[0])
    for k in range(count):
        if shares[k].started:
            thread_join(shares[k].thread, NULL)
    for k in range(count):
        if shares[k].status:
            stopped = shares[k].start + shares[k].port.stopped
            break
    port_open(port, core.ram, NULL)
    if stopped == n:
        return 0
    rest = batch[0]
    shift_columns(&rest, stopped)
    rest.n = n - stopped
    return batch_run(core, port, &rest)


# Called through a pointer, so that it takes no room on the stack of every batch.
cdef int (*by_threads)(Core*, Port*, const BatchC*, int) noexcept nogil
by_threads = shares_run


cdef bint apart_from_inputs(const BatchC* batch) noexcept nogil:
    """No output column lies where an input does: rows can be translated twice."""
    cdef const ColumnC* given = &batch.sid
    cdef const ColumnC* made
    cdef const char* low
    cdef const char* high
    cdef const char* first
    cdef const char* last
    while given <= &batch.access:
        column_span(given, batch.n, &low, &high)
        made = &batch.pa
        while made <= &batch.why:
            if made.data != NULL:
                column_span(made, batch.n, &first, &last)
                if first <= high and low <= last:
                    return False
            made += 1
        given += 1
    return True


cdef object ONE = 1


cdef int as_threads(value) except -1:
    cdef uint64_t number = as_u64("threads", value, 0xFFFFFFFF)
    if number == 0:
        raise ValueError(must_be("threads", "1 or more", number))
    return <int>number if number < THREADS else THREADS


cdef void column_span(
        const ColumnC* column, size_t n, const char** low, const char** high) noexcept nogil:
    """The first and the last byte of a column of at most 32 bytes a row, or a little more."""
    cdef const char* data = <const char*>column.data
    cdef ptrdiff_t reach = column.stride * <ptrdiff_t>(n - 1)
    low[0] = data + reach if reach < 0 else data
    high[0] = (data if reach < 0 else data + reach) + 31


cdef int run_pieces(
        Smmu smmu, const BatchC* batch, const Flags* flags, int threads) except -1:
    """A batch, without the GIL; with it while that is shorter than letting it go."""
    cdef Core* core = &smmu.core
    cdef BatchC piece
    cdef Port port
    cdef uint8_t[FLAGS] few_accesses
    cdef uint8_t* accesses = few_accesses
    cdef size_t done = 0, size
    cdef bint keep = batch.n <= SHORT and core.ram.plain
    cdef int status
    if threads > 1 and (batch.n < 2 * SHARE or not apart_from_inputs(batch)):
        threads = 1
    core.ram.users += 1
    core.shared += core.caches != NULL
    try:
        if threads > 1 and flags.by_row:
            accesses = <uint8_t*>malloc(PIECE)
            if accesses == NULL:
                raise MemoryError()
        while done < batch.n:
            if done:
                look_for_signals()
            piece = batch[0]
            shift_columns(&piece, done)
            size = FLAGS if flags.by_row and threads == 1 else PIECE
            piece.n = size if size < batch.n - done else batch.n - done
            if flags.by_row:
                join_flags(flags, done, piece.n, accesses)
                piece.access.data = accesses
                piece.access.stride = 1
            if keep:
                caches_take_gil(core)
                status = batch_run(core, &port, &piece)
                caches_give(core)
            else:
                with nogil:
                    caches_take(core)
                    if threads > 1:
                        status = by_threads(core, &port, &piece, threads)
                    else:
                        status = batch_run(core, &port, &piece)
                    caches_give(core)
            if status:
                raise_port(&port)
            done += piece.n
    finally:
        if accesses != few_accesses:
            free(accesses)
        core.shared -= core.caches != NULL
        core.ram.users -= 1
    return 0


cdef tuple ATS_STATUS = ("success", "UR", "CA")


cdef int ats_ask(Core* core, const Request* request, const AtsAsk* ask,
                 AtsAnswer* answer) except -1:
    """A translation request, with the GIL, which only callbacks may let go."""
    cdef Port port
    cdef int status
    port_open(&port, core.ram, NULL)
    core.ram.users += 1
    caches_take_gil(core)
    status = ats_request(core, &port, request, ask, answer)
    caches_give(core)
    core.ram.users -= 1
    if status:
        raise_port(&port)
    return 0


cdef int ats_pass(Core* core, const Request* request, Outcome* outcome) except -1:
    """A Translated transaction, likewise."""
    cdef Port port
    cdef int status
    port_open(&port, core.ram, NULL)
    core.ram.users += 1
    caches_take_gil(core)
    status = ats_translated(core, &port, request, outcome)
    caches_give(core)
    core.ram.users -= 1
    if status:
        raise_port(&port)
    return 0
