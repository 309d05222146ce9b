"""The C face: the function table of smmufast.h, in a capsule."""

from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from smmufast._engine.ats cimport (
    ATS_SUCCESS, AtsAnswer, AtsAsk, ats_request, ats_translated, translated_input,
)
from smmufast._engine.core cimport Core, caches_give, caches_take
from smmufast._engine.queue cimport walk_enter, walk_leave
from smmufast._facts.bits cimport load64, low_mask
from smmufast._engine.memory cimport Port, port_open
from smmufast._engine.cached cimport translate_request
from smmufast._engine.lookup cimport Memo
from smmufast._facts.types cimport (
    ABI, ACCESS_INSTR, ACCESS_PRIV, ACCESS_WRITE, HOLDS_SYNC, NO_SSID, STATUS_DONE, STATUS_EINVAL,
    STATUS_ENOMEM, STATUS_EPYTHON, STATUS_PENDING, ApiC, AtsC, BatchC, Outcome, Request, SmmuC,
    WalkC,
)
from smmufast._engine.walk cimport (
    STEP_ENDED, Walking, walk_answer, walk_begin, walk_fits, walk_leaves, walk_overtaken, walk_seal,
    walk_sealed, walk_tell, walking,
)

from smmufast._arguments import must_be


cdef bint request_legal(const Request* request) noexcept nogil:
    return ((request.ssid <= 0xFFFFF or request.ssid == NO_SSID)
            and request.access <= (ACCESS_WRITE | ACCESS_PRIV | ACCESS_INSTR))


cdef SmmuC* api_acquire(void* obj) noexcept:
    """Hold an Smmu and its memory's regions; NULL with an exception set."""
    cdef Smmu smmu
    try:
        if not isinstance(<object>obj, Smmu):
            raise TypeError(must_be("object", "an Smmu", type(<object>obj)))
    except TypeError as error:
        set_error(error)
        return NULL
    smmu = <Smmu>obj
    Py_INCREF(smmu)
    smmu.core.ram.users += 1
    smmu.core.shared += 1
    smmu.core.handles += 1
    smmu.core.ram.handles += 1
    return <SmmuC*>&smmu.core


cdef extern from "Python.h":
    void PyErr_SetObject(object type, object value) noexcept
    void PyErr_WriteUnraisable(object obj) noexcept


cdef void set_error(error) noexcept:
    PyErr_SetObject(type(error), error)


cdef void api_release(SmmuC* handle) noexcept:
    cdef Core* core = <Core*>handle
    core.ram.users -= 1
    core.shared -= 1
    core.handles -= 1
    core.ram.handles -= 1
    Py_DECREF(<object>core.owner)


cdef int api_end(Port* port, int status) noexcept nogil:
    """FETCH_ codes as STATUS_ codes; a callback's exception is reported as unraisable."""
    if status == 0:
        return STATUS_DONE
    with gil:
        error = <object>port.exception
        Py_DECREF(error)
        PyErr_SetObject(type(error), error)
        PyErr_WriteUnraisable(<object>NULL)
    return STATUS_EPYTHON


cdef int api_translate(SmmuC* handle, const Request* request, Outcome* outcome) noexcept nogil:
    """Smmu.translate, without the GIL."""
    cdef Core* core = <Core*>handle
    cdef Port port
    cdef Memo memo
    cdef Request own = request[0]  # what is checked is what is used
    cdef int status
    if not request_legal(&own):
        return STATUS_EINVAL
    port_open(&port, core.ram, NULL)
    memo.whole = False
    caches_take(core)
    status = translate_request(core, &port, &own, &memo, outcome)
    caches_give(core)
    return api_end(&port, status)


cdef bint accesses_legal(const BatchC* batch) noexcept nogil:
    """No access has bits that have no meaning."""
    cdef const uint8_t* access = <const uint8_t*>batch.access.data
    cdef size_t i
    cdef size_t n = batch.n if batch.access.stride else (batch.n > 0)
    for i in range(n):
        if access[<ptrdiff_t>i * batch.access.stride] > (ACCESS_WRITE | ACCESS_PRIV | ACCESS_INSTR):
            return False
    return True


cdef extern from *:
    """
    #define smmufast_batch_least offsetof(smmufast_batch, pa)
    """
    const size_t BATCH_LEAST "smmufast_batch_least"

cdef enum:
    STRUCT_MOST = 1 << 16  # what is more is no size: older structs have an address there


cdef bint batch_legal(const BatchC* batch) noexcept nogil:
    """All inputs are there, and in range."""
    return (batch.sid.data != NULL and batch.ssid.data != NULL and batch.iova.data != NULL
            and batch.access.data != NULL and ssid_wrong(batch) < 0 and accesses_legal(batch))


cdef bint batch_known(const BatchC* given, BatchC* batch) noexcept nogil:
    """Take the columns that the caller's struct has; no if it wants some that are not known."""
    cdef const char* data = <const char*>given
    cdef size_t i, size = given.size  # what is checked is what is used
    if not BATCH_LEAST <= size <= STRUCT_MOST:
        return False
    for i in range(sizeof(BatchC), size):
        if data[i]:
            return False
    memset(batch, 0, sizeof(BatchC))
    memcpy(batch, data, size if size < sizeof(BatchC) else sizeof(BatchC))
    return True


cdef int api_translate_batch(SmmuC* handle, const BatchC* given) noexcept nogil:
    """Smmu.translate_batch, without the GIL."""
    cdef Core* core = <Core*>handle
    cdef Port port
    cdef BatchC batch
    cdef int status
    if not batch_known(given, &batch) or not batch_legal(&batch):
        return STATUS_EINVAL
    caches_take(core)
    status = batch_run(core, &port, &batch)
    caches_give(core)
    return api_end(&port, status)


cdef int api_peek(SmmuC* handle, const Request* request, Outcome* outcome) noexcept nogil:
    cdef Port port
    cdef Request own = request[0]
    cdef int status
    if not request_legal(&own):
        return STATUS_EINVAL
    status = look_alone(<Core*>handle, &port, NULL, &own, outcome)
    return STATUS_ENOMEM if status == LOOK_NO_ROOM else api_end(&port, status)


cdef int api_peek_batch(SmmuC* handle, const BatchC* given) noexcept nogil:
    """Smmu.translate_batch with peek, without the GIL."""
    cdef Core* core = <Core*>handle
    cdef Port port
    cdef BatchC batch
    cdef int status
    if not batch_known(given, &batch) or not batch_legal(&batch):
        return STATUS_EINVAL
    caches_take(core)
    status = look_rows(core, &port, &batch)
    caches_give(core)
    return STATUS_ENOMEM if status == LOOK_NO_ROOM else api_end(&port, status)


cdef int api_ats_request(SmmuC* handle, const Request* request, AtsC* ats) noexcept nogil:
    """Smmu.ats_request, without the GIL."""
    cdef Core* core = <Core*>handle
    cdef Port port
    cdef Request own = request[0]
    cdef AtsAsk ask
    cdef AtsAnswer answer
    cdef int status
    if (not request_legal(&own) or not sizeof(AtsC) <= ats.size <= STRUCT_MOST
            or not 12 <= ats.stu_lg2 <= 43):
        return STATUS_EINVAL
    own.access &= ACCESS_PRIV if own.ssid != NO_SSID else 0
    ask.no_write = ats.no_write != 0
    ask.execute = ats.execute != 0 and own.ssid != NO_SSID
    ask.stu_lg2 = ats.stu_lg2
    port_open(&port, core.ram, NULL)
    caches_take(core)
    status = ats_request(core, &port, &own, &ask, &answer)
    caches_give(core)
    if status == 0:
        ats.status = <uint8_t>answer.status
        ats.granted = <uint8_t>answer.granted if answer.status == ATS_SUCCESS else 0
        ats.split = answer.split and ats.granted != 0
        ats.page_lg2 = answer.outcome.page_lg2 if ats.granted else ask.stu_lg2
        ats.address = 0
        if ats.granted:
            ats.address = answer.outcome.ipa if answer.split else answer.outcome.pa
            ats.address &= ~low_mask(ats.page_lg2)
        ats.result = answer.outcome
    return api_end(&port, status)


cdef int api_ats_translated(
        SmmuC* handle, const Request* request, Outcome* outcome) noexcept nogil:
    """Smmu.ats_translated, without the GIL."""
    cdef Core* core = <Core*>handle
    cdef Port port
    cdef Request own = request[0]
    cdef int status
    if not request_legal(&own):
        return STATUS_EINVAL
    own.reserved = 0
    translated_input(&core.hw, &own)
    port_open(&port, core.ram, NULL)
    caches_take(core)
    status = ats_translated(core, &port, &own, outcome)
    caches_give(core)
    return api_end(&port, status)


cdef int api_walk_told(Core* core, WalkC* walk, int status) noexcept nogil:
    """Give the walk back to the host after a step."""
    cdef Port port
    cdef int told = 0, left
    if status == STATUS_DONE:
        told = walk_tell(core, &port, walk)
        left = walk_leaves(core, &port, walk)
        told = told if told else left
    walk_seal(walk)
    return api_end(&port, told) if told < 0 else status


cdef int api_walk_begin(Core* core, WalkC* walk) noexcept nogil:
    cdef int status
    caches_take(core)
    status = walk_begin(core, walk, NULL)
    caches_give(core)
    return api_walk_told(core, walk, status)


cdef int api_walk_start(SmmuC* handle, const Request* request, WalkC* walk) noexcept nogil:
    cdef Request own = request[0]
    if (not request_legal(&own) or not walk_fits(walk) or walk.size > STRUCT_MOST
            or walk.flags & ~<uint32_t>HOLDS_SYNC):
        return STATUS_EINVAL
    memset(walk.state, 0, sizeof(Walking))
    walk.request = own
    return api_walk_begin(<Core*>handle, walk)


cdef inline bint walk_pends(const WalkC* walk) noexcept nogil:
    """The struct is that of a walk, as the library left it, and its fetch is not answered."""
    return walk_sealed(walk) and walking(walk).step < STEP_ENDED


cdef int api_walk_supply(SmmuC* handle, WalkC* walk, const void* data) noexcept nogil:
    cdef Core* core = <Core*>handle
    cdef int status
    if not walk_pends(walk):
        return STATUS_EINVAL
    caches_take(core)
    status = walk_answer(core, walk, NULL, data)
    caches_give(core)
    return api_walk_told(core, walk, status)


cdef int api_walk_look(SmmuC* handle, WalkC* walk) noexcept nogil:
    cdef Core* core = <Core*>handle
    if not walk_sealed(walk):
        return STATUS_EINVAL
    if walking(walk).step == STEP_ENDED:
        return STATUS_DONE
    return api_walk_begin(core, walk) if walk_overtaken(core, walk) else STATUS_PENDING


cdef int api_walk_drop(SmmuC* handle, WalkC* walk) noexcept nogil:
    cdef Core* core = <Core*>handle
    cdef Port port
    cdef int status
    if not walk_pends(walk):
        return STATUS_EINVAL
    port_open(&port, core.ram, NULL)
    status = walk_leaves(core, &port, walk)
    memset(walk.state, 0, sizeof(Walking))
    return api_end(&port, status)


cdef uint64_t api_generation(SmmuC* handle) noexcept nogil:
    cdef const Core* core = <Core*>handle
    return load64(&core.overtaking.commands) + load64(&core.hw.generation)


cdef uint64_t api_transaction_open(SmmuC* handle) noexcept nogil:
    return walk_enter(<Core*>handle, True)


cdef int api_transaction_close(SmmuC* handle, uint64_t opened) noexcept nogil:
    cdef Core* core = <Core*>handle
    cdef Port port
    cdef int status = 0
    if walk_leave(core, opened):
        port_open(&port, core.ram, NULL)
        status = core.queues.consume(core.queues.owner, &port)
    return api_end(&port, status)


cdef inline bint access_legal(uint64_t offset, uint32_t size) noexcept nogil:
    """What Registers.read() takes; other accesses are impossible on a bus."""
    return offset <= 0x1FFFF and (size == 1 or size == 2 or size == 4 or size == 8)


cdef int api_read(
        SmmuC* handle, uint64_t offset, uint32_t size, uint64_t* value) noexcept nogil:
    """Smmu.read: an exception is reported as unraisable."""
    if not access_legal(offset, size):
        return STATUS_EINVAL
    with gil:
        try:
            value[0] = (<Smmu>(<Core*>handle).owner).read(offset, size)
        except BaseException as error:
            set_error(error)
            PyErr_WriteUnraisable(<object>NULL)
            return STATUS_EPYTHON
    return STATUS_DONE


cdef int api_write(
        SmmuC* handle, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
    """Smmu.write: an exception is reported as unraisable."""
    if not access_legal(offset, size) or size < 8 and value >> 8 * size:
        return STATUS_EINVAL
    with gil:
        try:
            (<Smmu>(<Core*>handle).owner).write(offset, value, size)
        except BaseException as error:
            set_error(error)
            PyErr_WriteUnraisable(<object>NULL)
            return STATUS_EPYTHON
    return STATUS_DONE


cdef ApiC api
api.abi = ABI
api.size = sizeof(ApiC)
api.acquire = api_acquire
api.release = api_release
api.translate = api_translate
api.translate_batch = api_translate_batch
api.walk_start = api_walk_start
api.walk_supply = api_walk_supply
api.read = api_read
api.write = api_write
api.walk_look = api_walk_look
api.walk_drop = api_walk_drop
api.peek = api_peek
api.peek_batch = api_peek_batch
api.ats_request = api_ats_request
api.ats_translated = api_ats_translated
api.generation = api_generation
api.transaction_open = api_transaction_open
api.transaction_close = api_transaction_close
_C_API = PyCapsule_New(&api, "smmufast._smmu._C_API", NULL)
