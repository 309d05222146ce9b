"""Looking without touching: translations that leave nothing behind.

A look goes through the chain with a port that updates nothing and records nothing, and through
copies of what would count: the structs of the caches, which are told to be quiet, and the counts
of injected errors.  Entries are not copied, for a quiet cache writes none.
"""

from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from smmufast._engine.core cimport Core, caches_give, caches_take
from smmufast._engine.cached cimport translate_cached, view_open
from smmufast._engine.chain cimport View
from smmufast._engine.lookup cimport Memo
from smmufast._engine.memory cimport (
    FETCH_STOPPED, Injection, Port, Ram, look_for_signals, port_open, raise_port,
)
from smmufast._engine.tlb cimport N_CACHES, CachesC
from smmufast._engine.translate cimport translate_one
from smmufast._facts.layout cimport cr0_smmuen
from smmufast._facts.types cimport BatchC, Outcome, Request


cdef enum:
    LOOK_NO_ROOM = -4   # how a look ends, beside negative stops
    LOOKS = 1 << 14     # rows between looks for signals

# What a look has of its own.
cdef struct Looking:
    Ram ram
    CachesC caches
    Memo memo


cdef Looking* look_open(Core* core, Port* port, Log* log) noexcept nogil:
    """Begin to look, with the caches in hand; NULL without memory."""
    cdef Looking* looking = <Looking*>malloc(sizeof(Looking))
    cdef size_t size = core.ram.n_injections * sizeof(Injection)
    cdef int i
    if looking == NULL:
        return NULL
    looking.memo.whole = False
    looking.ram = core.ram[0]
    if size:
        looking.ram.injections = <Injection*>malloc(size)
        if looking.ram.injections == NULL:
            free(looking)
            return NULL
        memcpy(looking.ram.injections, core.ram.injections, size)
    if core.caches != NULL:
        looking.caches = core.caches[0]
        for i in range(N_CACHES):
            looking.caches.cache[i].quiet = True
    port_open(port, &looking.ram, log)
    port.dry = True
    return looking


cdef void look_close(Looking* looking) noexcept nogil:
    if looking != NULL:
        if looking.ram.n_injections:
            free(looking.ram.injections)
        free(looking)


cdef int look_one(Core* core, Looking* looking, Port* port, const Request* request,
                  Outcome* outcome) noexcept nogil:
    """What a request would end as; a stall has no STAG."""
    cdef View view
    cdef int status
    if core.caches == NULL:
        status = translate_one(&core.hw, port, request, &looking.memo, outcome)
    else:
        view_open(&view, core, request)
        view.c = &looking.caches
        status = translate_cached(&core.hw, port, &view, request, &looking.memo, outcome)
    outcome.stag = 0
    return status


cdef int look_alone(Core* core, Port* port, Log* log, const Request* request,
                    Outcome* outcome) noexcept nogil:
    """One look, from its start to its end; LOOK_NO_ROOM without memory."""
    cdef Looking* looking
    cdef int status = LOOK_NO_ROOM
    caches_take(core)
    looking = look_open(core, port, log)
    if looking != NULL:
        status = look_one(core, looking, port, request, outcome)
    caches_give(core)
    look_close(looking)
    return status


cdef int look_rows(Core* core, Port* port, const BatchC* batch) noexcept nogil:
    """Look at the rows of a batch: each by itself, unless a batch path does it as well.

    That is without caches, in plain memory, up to a row that records something, stalls or
    updates a descriptor.
    """
    cdef Looking* looking = NULL
    cdef BatchC rest
    cdef Request request
    cdef Outcome outcome
    cdef size_t i = 0
    cdef bint fast = core.caches == NULL and core.ram.plain and cr0_smmuen(core.hw.cr0)
    cdef int status = 0
    while i < batch.n and status == 0:
        if fast:
            rest = batch[0]
            shift_columns(&rest, i)
            rest.n = batch.n - i
            port_open(port, core.ram, NULL)
            port.pure = True
            status = plain(core, port, &rest)
            if status == 0:
                break
            if status != FETCH_STOPPED:
                return status
            i += port.stopped
        if looking == NULL:
            looking = look_open(core, port, NULL)
            if looking == NULL:
                return LOOK_NO_ROOM
        elif fast:
            port_open(port, &looking.ram, NULL)
            port.dry = True
        request_at(batch, i, &request)
        status = look_one(core, looking, port, &request, &outcome)
        if status == 0:
            store_outcome(batch, i, &outcome)
            i += 1
    look_close(looking)
    return status


cdef int look_ended(Port* port, int status) except -1:
    """Raise for a look that did not end."""
    if status == LOOK_NO_ROOM:
        raise MemoryError()
    if status:
        raise_port(port)
    return 0


cdef int look_scalar(Smmu smmu, const Request* request, Outcome* outcome, Log* log) except -1:
    """`translate` and `pa` with `peek`."""
    cdef Core* core = &smmu.core
    cdef Port port
    cdef int status
    core.ram.users += 1
    core.shared += core.caches != NULL
    try:
        with nogil:
            status = look_alone(core, &port, log, request, outcome)
        look_ended(&port, status)
    finally:
        core.shared -= core.caches != NULL
        core.ram.users -= 1
    return 0


cdef int look_pieces(Smmu smmu, const BatchC* batch, const Flags* flags) except -1:
    """`translate_batch` with `peek`, without the GIL."""
    cdef Core* core = &smmu.core
    cdef BatchC piece
    cdef Port port
    cdef uint8_t[FLAGS] accesses
    cdef size_t done = 0, size = FLAGS if flags.by_row else LOOKS
    cdef int status
    core.ram.users += 1
    core.shared += core.caches != NULL
    try:
        while done < batch.n:
            look_for_signals()
            piece = batch[0]
            shift_columns(&piece, done)
            piece.n = size if size < batch.n - done else batch.n - done
            if flags.by_row:
                join_flags(flags, done, piece.n, accesses)
                piece.access.data = accesses
                piece.access.stride = 1
            with nogil:
                caches_take(core)
                status = look_rows(core, &port, &piece)
                caches_give(core)
            look_ended(&port, status)
            done += piece.n
    finally:
        core.shared -= core.caches != NULL
        core.ram.users -= 1
    return 0
