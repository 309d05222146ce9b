# cython: binding=False, embedsignature=True, embedsignature.format=clinic
"""Smmu: the hardware half, and its faces."""

cimport cython
cimport numpy as cnp
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.dict cimport PyDict_CheckExact, PyDict_Next, PyDict_Size
from cpython.exc cimport PyErr_Clear, PyErr_Occurred
from cpython.long cimport PyLong_CheckExact
from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memset

from smmufast._facts.bits cimport apart, le64, likely, low_mask, unlikely
from smmufast._engine.cache cimport ctz64
from smmufast._rules.command cimport Effect, command_decode
from smmufast._engine.core cimport Core, caches_give, caches_take, caches_take_gil
from smmufast._facts.layout cimport CMD_PREFETCH_CONFIG, cr0_smmuen, ste_ppar
from smmufast._facts.ints cimport digits_of
from smmufast._engine.memory cimport (
    LOG_FETCHES, LOG_WORDS, Log, Logged, Port, Ram, bytes_from, look_for_signals, out_of_range,
    port_open, raise_port, to_address, to_flag,
)
from smmufast._engine.ats cimport (
    ATS_EXECUTE, ATS_READ, ATS_SUCCESS, ATS_WRITE, AtsAnswer, AtsAsk, ats_request, ats_translated,
    recorded_if_asked, translated_input,
)
from smmufast._engine.batch cimport (
    request_at, store_outcome, store_u8, store_u64, translate_each, translate_hits, translate_plain,
)
from smmufast._engine.vector cimport vector_on, vector_switch
from smmufast._engine.cached cimport (
    deliver, lookup_cached, memo_current, memo_touch, translate_cached, translate_request,
    view_open,
)
from smmufast._rules.config cimport STAGE1_BYPASS, cd_decode
from smmufast._engine.tlb cimport CachesC, Entry, tlb_find_key, tlb_key, tlb_touch
from smmufast._rules.scope cimport KIND_S1
from smmufast._engine.translate cimport (
    CLASS_IN, Leaf, Memo, Syndrome, View, canonical, end_fault, finish_stage1, half_fault, leaf_of,
    memo_holds, open_drivers, ste_decode, ste_fetch, syndrome_set, translate_known, translate_one,
    usable, walk_once,
)
from smmufast._facts.types cimport (
    ABI, ACCESS_INSTR, ACCESS_PRIV, ACCESS_WRITE, ACTION_DISABLED, ACTION_OK, ACTION_STALL,
    FETCH_TT_UPDATE, HOLDS_SYNC, NO_LEVEL, NO_SSID, STATUS_DONE, STATUS_EINVAL, STATUS_EPYTHON,
    STATUS_PENDING, ApiC, BatchC, ColumnC, Context, FetchC, Half, Hw, Outcome, Request, SmmuC,
    WalkC,
)
from smmufast._rules.vmsa cimport half_of
from smmufast._facts.why cimport why_event
from smmufast._engine.walk cimport (
    STEP_ENDED, Walking, walk_answer, walk_begin, walk_fits, walk_holds, walk_leaves,
    walk_overtaken, walk_seal, walk_sealed, walk_tell, walking,
)

from collections.abc import Iterable, Sequence
from pickle import PickleBuffer

from types import MappingProxyType

import os

import numpy as np

from smmufast._arguments import either, in_words, must_be
from smmufast.faults import ACTIONS, FAULTS, FETCH_KINDS, AtsResponse, Event, Fetch, Perm
from smmufast.why import Why

cdef extern from "numpy/arrayobject.h":
    cnp.dtype PyArray_DescrNew(cnp.dtype descr)

cnp.import_array()

open_drivers()
vector_switch(os.environ.get("SMMUFAST_VECTOR") != "0")

cdef extern from *:
    """
    /* Beyond five vectors gcc clears by rep stosq, which takes longer to start than a Result takes
       to be made. */
    static inline __attribute__((always_inline)) void *smmufast_memset(void *p, int c, size_t n)
    {
        if (__builtin_constant_p(n) && n > 64 && n <= 128) {
            memset(p, c, 64);
            memset((char *)p + 64, c, n - 64);
            return p;
        }
        return memset(p, c, n);
    }
    #undef memset
    #define memset(p, c, n) smmufast_memset(p, c, n)
    """

NO_SUBSTREAM = 0xFFFFFFFF
"""In arrays of SubstreamIDs: the transaction has none."""

cdef dict DTYPES = {
    "pa": np.dtype(np.uint64),
    "action": np.dtype(np.uint8),
    "event": np.dtype(np.uint8),
    "fault": np.dtype(np.uint8),
    "perm": np.dtype(np.uint8),
    "level": np.dtype(np.int8),
    "page_lg2": np.dtype(np.uint8),
    "attr": np.dtype(np.uint8),
    "sh": np.dtype(np.uint8),
    "ipa": np.dtype(np.uint64),
    "stage": np.dtype(np.uint8),
    "record": np.dtype("V32"),
    "why": np.dtype(np.uint16),
}
cdef enum:
    OUT_COLUMNS = 13
    IN_COLUMNS = 6     # sid, iova, ssid, and three of bool
    OUT_MASK = (1 << OUT_COLUMNS) - 1
    USUAL = 0b111      # pa, action and event

COLUMNS = MappingProxyType(DTYPES)
"""The columns of a batch and their dtypes."""


cdef object row_dtype(tuple names):
    """The dtype of rows that have some of the columns."""
    fields = list(zip(names, map(DTYPES.get, names), strict=True))
    try:
        return np.dtype(fields, align=True)
    except TypeError as error:  # numpy's word for memory that runs out within
        raise MemoryError() from error


# Arrays that a caller may keep get copies of these: the names in a dtype can be assigned to.
cdef cnp.dtype DEFAULT_ROW = row_dtype(("pa", "action", "event"))
cdef cnp.dtype SEGMENT = np.dtype([("iova", "u8"), ("pa", "u8"), ("length", "u8")])

cdef tuple DEVICES = ("Device-nGnRnE", "Device-nGnRE", "Device-nGRE", "Device-GRE")


cdef extern from "Python.h":
    # cpython.long raises its OverflowError, which names no argument
    unsigned long as_unsigned_long "PyLong_AsUnsignedLong"(object value) noexcept


cdef inline uint64_t as_u64(str name, value, uint64_t last) except? -1:
    """An argument as a number up to `last`, or an error that names it."""
    cdef uint64_t number = 0
    if likely(PyLong_CheckExact(value)):
        if likely(digits_of(value, &number)) and likely(number <= last):
            return number
        # not ...LongLong, which CPython 3.11 converts byte by byte
        number = as_unsigned_long(value)
        if number == <unsigned long>-1 and PyErr_Occurred():
            PyErr_Clear()
            number = to_address(name, value, last)
    else:
        number = to_address(name, value, last)
    if number > last:
        raise out_of_range(name, number, last)
    return number


cdef inline uint32_t as_ssid(value) except? 0xFFFFFFFF:
    cdef uint64_t number
    if value is None:
        return NO_SSID
    number = as_u64("ssid", value, NO_SSID)
    if number > 0xFFFFF and number != NO_SSID:
        raise out_of_range("ssid", number, 0xFFFFF)
    return <uint32_t>number


cdef inline bint as_flag(str name, value) except -1:
    if likely(value is False):
        return False
    return value is True or to_flag(name, value)


cdef inline uint32_t as_access(write, priv, instr) except? 0xFFFFFFFF:
    return (as_flag("write", write) * ACCESS_WRITE | as_flag("priv", priv) * ACCESS_PRIV
            | as_flag("instr", instr) * ACCESS_INSTR)


# --- results ---

cdef object new_tuple = tuple.__new__  # without the Python function that Fetch(...) calls


cdef object fetch_of(const Log* log, uint32_t i):
    """An access that was made, as a Fetch."""
    cdef const Logged* fetch = &log.fetch[i]
    cdef uint64_t[8] words
    cdef int k
    data = swap = None
    if not fetch.aborted:
        for k in range(fetch.size // 8):
            words[k] = le64(log.data[fetch.words + k])
        data = PyBytes_FromStringAndSize(<char*>words, fetch.size)
    if fetch.kind >= FETCH_TT_UPDATE:
        swap = (log.data[fetch.words + 1], log.data[fetch.words + 2])
    return new_tuple(Fetch, (
        FETCH_KINDS[fetch.kind], None if fetch.level == NO_LEVEL else fetch.level,
        fetch.address, fetch.size, data, swap))


cdef object asked_for(const FetchC* fetch):
    """An access that a walk asks for, as a Fetch."""
    swap = None
    if fetch.kind >= FETCH_TT_UPDATE:
        swap = (fetch.expected, fetch.desired)
    return new_tuple(Fetch, (
        FETCH_KINDS[fetch.kind], None if fetch.level == NO_LEVEL else fetch.level,
        fetch.address, fetch.size, None, swap))


@cython.freelist(64)
@cython.auto_pickle(False)
cdef class Result:
    """Result()\n--\n
    The outcome of one translation; true when the transaction goes on to memory."""

    def __init__(self):
        raise TypeError("a Result is made by Smmu.translate")

    def __bool__(self):
        return self.outcome.action <= ACTION_DISABLED

    @property
    def sid(self):
        """StreamID of the request."""
        return self.request.sid

    @property
    def ssid(self):
        """SubstreamID of the request, None without one."""
        return None if self.request.ssid == NO_SSID else self.request.ssid

    @property
    def iova(self):
        """Input address of the request."""
        return self.request.iova

    @property
    def write(self):
        """Whether the request was a write."""
        return (self.request.access & ACCESS_WRITE) != 0

    @property
    def action(self):
        """What becomes of the transaction.

        "ok"; "bypass"; "disabled", CR0.SMMUEN=0 and GBPA lets it pass; "abort"; "raz_wi", reads
        as zero and writes are ignored; "stall", the SMMU holds it: see `Smmu.stalls`.
        """
        return ACTIONS[self.outcome.action]

    @property
    def pa(self):
        """Physical address, None when the transaction is terminated."""
        return self.outcome.pa if self.outcome.action <= ACTION_DISABLED else None

    @property
    def ipa(self):
        """Intermediate physical address, the input of stage 2; None if that did not translate."""
        if self.outcome.action == ACTION_OK and self.outcome.stage & 2:
            return self.outcome.ipa
        return None

    @property
    def stage(self):
        """Stages that took part in the translation or its fault: 0, 1, 2, or 3 for both."""
        return self.outcome.stage

    @property
    def fault(self):
        """The fault as an Event, recorded or not; None if there is none that has an event."""
        cdef uint64_t[4] words
        cdef int i
        if not self.outcome.fault:
            return None
        for i in range(4):
            words[i] = le64(self.outcome.record[i])
        return Event(PyBytes_FromStringAndSize(<char*>words, 32))

    @property
    def event(self):
        """The Event that is recorded; None when nothing is.

        A fault is not recorded when CD.R=0 or STE.S2R=0, when the event queue is disabled, full
        or in error, or when it is C_BAD_STREAMID and CR2.RECINVSID=0.
        """
        return self.fault if self.outcome.event else None

    @property
    def why(self):
        """The reason of the fault or of the abort, as a Why; None when nothing was refused."""
        return Why(self.outcome.why) if self.outcome.why else None

    @property
    def level(self):
        """Level of the block or page, -1 to 3; None without a translation."""
        return None if self.outcome.level == NO_LEVEL else self.outcome.level

    @property
    def page_lg2(self):
        """log2 of the block's or page's size in bytes; None without a translation."""
        return self.outcome.page_lg2 if self.outcome.page_lg2 else None

    @property
    def page_size(self):
        """Size of the block or page in bytes; None without a translation."""
        return <uint64_t>1 << self.outcome.page_lg2 if self.outcome.page_lg2 else None

    @property
    def perm(self):
        """Which accesses of the device would succeed at this address, as Perm flags.

        For F_PERMISSION they are those that the page does permit; for other faults none.
        """
        return Perm(self.outcome.perm)

    @property
    def perm_s1(self):
        """As `perm`, by stage 1 alone; all accesses when it does not translate."""
        return Perm(self.outcome.perm_s1)

    @property
    def attr(self):
        """Memory type as one MAIR byte (DDI 0487 D8.6), reserved encodings resolved."""
        return self.outcome.attr

    @property
    def memory_type(self):
        """Memory type in words, None when the transaction is terminated."""
        cdef unsigned int attr = self.outcome.attr
        if self.outcome.action > ACTION_DISABLED:
            return None
        if attr & 0xF0 == 0:
            return DEVICES[attr >> 2 & 3]
        return f"Normal-i{cache_text(attr & 15)}-o{cache_text(attr >> 4)}"

    @property
    def shareability(self):
        """0 non-shareable, 2 outer, 3 inner shareable."""
        return self.outcome.sh

    @property
    def asid(self):
        """ASID of the context descriptor, 0 in worlds without; None without stage 1."""
        return self.outcome.asid if self.outcome.stage & 1 else None

    @property
    def vmid(self):
        """VMID that tags the translation, 0 in worlds without; None when no stage translates."""
        return self.outcome.vmid if self.outcome.stage else None

    @property
    def stag(self):
        """Stall tag of a transaction that is held and recorded, else None."""
        if self.outcome.action == ACTION_STALL and self.outcome.event:
            return self.outcome.stag
        return None

    @property
    def is_global(self):
        """Whether the page is global (nG=0, or no ASID); None without a translation."""
        return None if self.outcome.level == NO_LEVEL else not self.outcome.ng

    @property
    def contiguous(self):
        """The Contiguous bit of the page's descriptor; None without a translation."""
        return None if self.outcome.level == NO_LEVEL else self.outcome.contiguous != 0

    @property
    def fetches(self):
        """Every fetch that was made, in order, as Fetch tuples; None unless trace=True."""
        return None

    def __eq__(self, other):
        if not isinstance(other, Result):
            return NotImplemented
        return said_by(self) == said_by(other) and self.fetches == other.fetches

    def __hash__(self):
        return hash(said_by(self))

    def __copy__(self):
        return self  # nothing of it changes

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return _result_restored, (self.request, self.outcome)

    def explain(self, Smmu smmu=None):
        """Return the translation in words: each fetch decoded (with trace=True), then the end.

        With the Smmu that made it, the condition that made an STE or CD illegal is named.
        """
        from smmufast.explain import explain
        return explain(self, smmu)

    def _repr_html_(self):
        from smmufast._html import fields
        return fields(self, "Result")

    def __repr__(self):
        text = f"<Result {self.action} sid={self.sid:#x}"
        if self.ssid is not None:
            text += f" ssid={self.ssid:#x}"
        text += f" iova={self.iova:#x}"
        if self:
            text += f" pa={self.pa:#x}"
        if self.fault is not None:
            text += f" {self.fault.name}{'' if self.outcome.event else ' (not recorded)'}"
        return text + ">"


@cython.final
@cython.auto_pickle(False)
cdef class TracedResult(Result):
    """A Result that holds every fetch which was made."""

    def __cinit__(self):
        self.log = <Log*>malloc(sizeof(Log))
        if self.log == NULL:
            raise MemoryError()
        self.log.count = 0
        self.log.used = 0

    def __dealloc__(self):
        free(self.log)

    def __reduce__(self):
        return _traced_restored, (
            self.request, self.outcome, PyBytes_FromStringAndSize(<char*>self.log, sizeof(Log)))

    @property
    def fetches(self):
        """Every fetch that was made, in order, as Fetch tuples."""
        cdef uint32_t i
        cdef list found = []
        for i in range(self.log.count):
            found.append(fetch_of(self.log, i))
        return found


cdef tuple said_by(Result result):
    """All that a result says, but for fetches."""
    cdef const Outcome* o = &result.outcome
    return (
        result.request.sid, result.request.ssid, result.request.iova, result.request.access,
        o.action, result.pa, result.ipa, o.stage, o.fault,
        (o.record[0], o.record[1], o.record[2], o.record[3]) if o.fault else None,
        o.event, o.why, o.level, o.page_lg2, o.perm, o.perm_s1, o.attr, o.sh, result.asid,
        result.vmid, result.stag, result.is_global, result.contiguous)


cdef dict OUTCOME_MOST = {
    "action": 5, "event": 0xFF, "fault": 0xFF, "perm": 0x3F, "perm_s1": 0x3F, "level": 4,
    "page_lg2": 63, "sh": 3, "stage": 3, "ng": 1, "contiguous": 1}


cdef int restore_result(Result result, dict request, dict outcome) except -1:
    """Let a result be what a pickle says, once it can be."""
    for name, most in OUTCOME_MOST.items():
        least = -(name == "level")
        if not least <= outcome[name] <= most:
            raise ValueError(must_be(name, f"{least} to {most}", outcome[name]))
    if outcome["why"] not in REASONS:
        raise ValueError(must_be("why", "a reason", outcome["why"]))
    result.request = request
    result.outcome = outcome
    if not request_legal(&result.request):
        raise ValueError(must_be("request", "one of a device", request))
    return 0


cdef frozenset REASONS = frozenset(Why) | {0}


def _result_restored(dict request not None, dict outcome not None):
    """Return the Result of what was pickled."""
    cdef Result result = Result.__new__(Result)
    restore_result(result, request, outcome)
    return result


def _traced_restored(dict request not None, dict outcome not None, bytes log not None):
    """Return the Result of what was pickled, with its fetches."""
    cdef TracedResult result = traced()
    cdef const Logged* fetch
    cdef uint32_t i
    restore_result(result, request, outcome)
    if len(log) != sizeof(Log):
        raise ValueError(must_be("log", f"{sizeof(Log)} bytes", len(log)))
    memcpy(result.log, <const char*>log, sizeof(Log))
    if result.log.count > LOG_FETCHES or result.log.used > LOG_WORDS:
        result.log.count = 0
        raise ValueError("log must be that of a walk")
    for i in range(result.log.count):
        fetch = &result.log.fetch[i]
        if (fetch.kind >= len(FETCH_KINDS) or fetch.size > 64 or not -1 <= fetch.level <= NO_LEVEL
                or fetch.words + (3 if fetch.kind >= FETCH_TT_UPDATE else fetch.size // 8)
                > <int>result.log.used):
            result.log.count = 0
            raise ValueError("log must be that of a walk")
    return result


cdef TracedResult traced():
    """A result with an empty log."""
    return TracedResult.__new__(TracedResult)


cdef str cache_text(unsigned int nibble):
    if nibble == 4:
        return "NC"
    return (("WB" if nibble >> 2 & 1 else "WT")
            + ("" if nibble & 8 else "T")
            + ("-RA" if nibble & 2 else "") + ("-WA" if nibble & 1 else ""))


cdef object why_of(int why):
    """The Why of a number, None for 0."""
    return Why(why) if why else None


cdef int record_in(str name, value, uint64_t* words, size_t n) except -1:
    """The dwords of a record of n bytes."""
    cdef size_t i
    cdef bytes data
    try:
        data = bytes(memoryview(value))
    except TypeError:
        raise TypeError(must_be(name, f"{n} bytes", type(value))) from None
    if <size_t>len(data) != n:
        raise ValueError(must_be(name, f"{n} bytes", len(data)))
    memcpy(words, <const char*>data, n)
    for i in range(n // 8):
        words[i] = le64(words[i])
    return 0


cdef inline object result_error(Result result):
    """The one place where a fault becomes an exception."""
    kind = FAULTS[result.outcome.fault]
    name = result.fault.name if result.outcome.fault else "aborted without an event"
    ssid = "" if result.request.ssid == NO_SSID else f" ssid {result.request.ssid:#x}"
    text = f"{name}: sid {result.request.sid:#x}{ssid} iova {result.request.iova:#x}"
    return kind(f"{text}: {result.why.sentence()}", result)


@cython.final
@cython.auto_pickle(False)
cdef class Segments:
    """Segments()\n--\n
    The physical segments of a DMA burst, in order; true when the whole burst translates.

    `array` has the fields iova, pa and length (uint64, bytes); iterating gives tuples of ints.
    `result` is the Result of the first page that failed, None if none did.
    """

    cdef readonly object array
    cdef readonly object result

    def __init__(self):
        raise TypeError("Segments are made by Smmu.translate_range")

    def __bool__(self):
        return self.result is None

    def __len__(self):
        return len(self.array)

    def __iter__(self):
        return iter(self.array.tolist())

    def __getitem__(self, index):
        """Return a segment (iova, pa, length), or a list of them for a slice."""
        return self.array[index].tolist()

    def __contains__(self, segment):
        return segment in self.array.tolist()

    def __reversed__(self):
        return iter(self.array[::-1].tolist())

    def index(self, segment, *bounds):
        """Return the index of a segment, as list.index does."""
        return self.array.tolist().index(segment, *bounds)

    def count(self, segment):
        """Return how often a segment is there."""
        return self.array.tolist().count(segment)

    def __eq__(self, other):
        if not isinstance(other, Segments):
            return NotImplemented
        return self.array.tolist() == other.array.tolist() and self.result == other.result

    __hash__ = None

    def __copy__(self):
        return _segments_restored(self.array.copy(), self.result)

    def __deepcopy__(self, memo):
        return self.__copy__()

    def __reduce__(self):
        return _segments_restored, (self.array, self.result)

    @property
    def event(self):
        """The event that the burst records, None if there is none."""
        return None if self.result is None else self.result.event

    def _repr_html_(self):
        from smmufast._html import segments
        return segments(self)

    def __repr__(self):
        end = "" if self.result is None else f", then {self.result!r}"
        shown = []
        for segment in self:
            shown.append(tuple(map(hex, segment)))
        return f"<Segments {shown}{end}>"


Sequence.register(Segments)


def _segments_restored(array, Result result=None):
    """Return the Segments of what was pickled."""
    cdef Segments segments = Segments.__new__(Segments)
    if not isinstance(array, np.ndarray) or array.dtype != SEGMENT or array.ndim != 1:
        raise TypeError(must_be("array", "one of segments", type(array)))
    segments.array = array
    segments.result = result
    return segments


# Walk.status, beside STATUS_DONE and STATUS_PENDING.
cdef enum:
    WALK_CLOSED = 2


@cython.final
@cython.auto_pickle(False)
cdef class Walk:
    """Walk()\n--\n
    A translation whose fetches the host performs, one at a time.

    `request` is the Fetch to perform next, None when the walk is done; answer it by `supply`.
    `result` is the Result, None until then::

        walk = smmu.start_walk(sid, iova)
        while (fetch := walk.request) is not None:
            if fetch.swap is None:
                walk.supply(read(fetch.address, fetch.size))   # None: an external abort
            else:                                              # (expected, desired)
                walk.supply(compare_and_swap(fetch.address, *fetch.swap))

    A fetch with a `swap` is a hardware update, which CD.HA, CD.HD and their like ask for: store
    `desired` in the 8 bytes at the address if they are `expected`, both numbers little-endian,
    and answer with what was there, stored or not.

    A walk that an invalidation (CMD_TLBI_*, CMD_CFGI_*) and then CMD_SYNC overtake uses nothing of
    what it read before: it starts again, and `request` is its first Fetch once more (IHI 0070
    3.21.1).  An answer to what it asked before that is dropped.  So whoever takes time between
    `request` and an update looks at `request` again just before the update, which may be in a
    table that is used for something else by now.  With ``start_walk(…, holds_sync=True)`` the walk
    goes on instead, and CMD_SYNC does not complete before the walk ends.  Clearing CR0.SMMUEN lets
    every walk start again, and then find the SMMU disabled.

    A copy, or one from a pickle, which takes the Smmu with it, has the result if the walk is done;
    else it starts again, as one that was overtaken.
    """

    def __cinit__(self):
        self.status = WALK_CLOSED

    def __init__(self):
        raise TypeError("a Walk is made by Smmu.start_walk")

    def __del__(self):
        if self.status == STATUS_PENDING and walk_holds(&self.walk):
            self.close()

    @property
    def request(self):
        """The Fetch to perform next (its data is None), None when the walk is done or closed."""
        self._look()
        return asked_for(&self.walk.fetch) if self.status == STATUS_PENDING else None

    @property
    def done(self):
        """Whether the walk asks for nothing any more."""
        self._look()
        return self.status != STATUS_PENDING

    @property
    def result(self):
        """The Result, with its fetches; None until the walk is done, or if it was closed."""
        self._look()
        return self.traced if self.status == STATUS_DONE else None

    def supply(self, data):
        """Answer the fetch that is asked for.

        Parameters
        ----------
        data : bytes-like, int or None
            The bytes as they lie in memory, as many as asked for; or their little-endian
            number; or None for an external abort.  Of an update, what was there before it.

        Raises
        ------
        RuntimeError
            The walk is done, or an answer to it is being worked on.
        ValueError
            The size is wrong.
        Exception
            Whatever on_interrupt or a Python memory callback raises.
        """
        cdef Py_buffer view
        cdef unsigned int size
        cdef uint64_t asked = self.answers
        if self.status != STATUS_PENDING:
            raise RuntimeError(
                f"the walk is {'done' if self.status == STATUS_DONE else 'closed'}: "
                "no fetch waits for data")
        if self.answering:
            raise RuntimeError("an answer is being worked on: no fetch waits for data")
        if data is None:
            self._step(False, NULL)
            return
        size = self.walk.fetch.size
        if isinstance(data, int):
            if data < 0 or data >> (8 * size):
                raise ValueError(must_be("data", f"a number of {size} bytes", data))
            data = data.to_bytes(size, "little")
        if not PyObject_CheckBuffer(data):
            raise TypeError(must_be("data", "bytes, a number or None", type(data)))
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if <size_t>view.len != size:
                raise ValueError(must_be("data", f"{size} bytes", view.len))
            # conversions run the caller's code
            if self.answering or self.answers != asked or self.status != STATUS_PENDING:
                raise RuntimeError("the fetch was answered meanwhile")
            self._step(False, view.buf)
        finally:
            PyBuffer_Release(&view)

    def close(self):
        """End the walk without a result; nothing happens if it is done.

        A walk that is dropped is closed.  CMD_SYNC does not wait for it any more.

        Raises
        ------
        RuntimeError
            An answer to it is being worked on.
        Exception
            Whatever a command raises that waited behind the CMD_SYNC.
        """
        cdef Port own
        if self.status != STATUS_PENDING:
            return
        if self.answering:
            raise RuntimeError("an answer is being worked on")
        self.status = WALK_CLOSED
        port_open(&own, self.smmu.core.ram, NULL)
        if walk_leaves(&self.smmu.core, &own, &self.walk) < 0:
            raise_port(&own)

    def __copy__(self):
        return _walk_restored(self.smmu, *walk_kept(self))

    def __reduce__(self):
        return _walk_restored, (self.smmu, *walk_kept(self))

    cdef int _look(self) except -1:
        """Start again if the walk was overtaken."""
        if (self.status == STATUS_PENDING and not self.answering
                and walk_overtaken(&self.smmu.core, &self.walk)):
            self._step(True, NULL)
        return 0

    cdef int _step(self, bint begins, const void* data) except -1:
        """Begin, or answer walk.fetch; an exception of what follows finds the walk done."""
        cdef Core* core = &self.smmu.core
        cdef Port own
        cdef int status, told = 0
        self.answering = True
        self.answers += 1
        port_open(&own, core.ram, NULL)
        caches_take_gil(core)
        if begins:
            status = walk_begin(core, &self.walk, self.traced.log)
        else:
            status = walk_answer(core, &self.walk, self.traced.log, data)
        caches_give(core)
        if status == STATUS_DONE:
            core.ram.users += 1
            told = walk_tell(core, &own, &self.walk)
            core.ram.users -= 1
            self.traced.outcome = self.walk.result
        self.status = status
        self.answering = False
        if status == STATUS_DONE and walk_leaves(core, &own, &self.walk) < 0 or told < 0:
            raise_port(&own)
        return 0

    def _repr_html_(self):
        from smmufast._html import fields, lines
        if self.status == STATUS_PENDING:  # without `request`, which may start it again
            return fields(asked_for(&self.walk.fetch), "Walk at")
        return self.traced._repr_html_() if self.status == STATUS_DONE else lines(repr(self))

    def __repr__(self):
        if self.status == STATUS_DONE:
            return f"<Walk {self.traced!r}>"
        if self.status == WALK_CLOSED:
            return "<Walk closed>"
        return f"<Walk at {asked_for(&self.walk.fetch)!r}>"


cdef tuple walk_kept(Walk walk):
    """(status, result or what it is asked for, whether it holds CMD_SYNC)."""
    walk._look()
    if walk.status == STATUS_DONE:
        return STATUS_DONE, walk.traced, False
    return walk.status, walk.walk.request, walk_holds(&walk.walk)


def _walk_restored(Smmu smmu not None, status, said, holds):
    """Return a Walk from what was pickled or copied."""
    cdef Walk walk = Walk.__new__(Walk)
    cdef TracedResult result
    walk.smmu = smmu
    walk.status = WALK_CLOSED
    if status == STATUS_DONE:
        result = said
        if result is None:
            raise TypeError(must_be("result", "a TracedResult", None))
        walk.traced = result
        walk.walk.request = result.request
        walk.walk.result = result.outcome
        walk.status = STATUS_DONE
        return walk
    walk.walk.request = said
    if not request_legal(&walk.walk.request):
        raise ValueError(must_be("request", "one of a device", said))
    walk.walk.flags = HOLDS_SYNC if to_flag("holds", holds) else 0
    walk.traced = traced()
    walk.traced.request = walk.walk.request
    if status == STATUS_PENDING:
        walk._step(True, NULL)
    return walk


# --- vectors ---

def vectors(on=None):
    """Whether batches use the processor's vectors; with an argument, let them or not.

    Results do not depend on it.  Batches do where the processor has AVX-512, unless the
    environment says SMMUFAST_VECTOR=0.

    Parameters
    ----------
    on : bool, optional

    Returns
    -------
    bool
        What holds from now on: False where the processor has none.
    """
    if on is not None:
        vector_switch(to_flag("on", on))
    return bool(vector_on)


# --- columns ---

cdef int refuse_mask(str name, value) except -1:
    """What is masked has no value, and a translation needs one."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(must_be(name, "an array without a mask", type(value)))
    return 0


cdef object as_array(str name, value, dtype):
    """A sequence as an array; of large integers too, which numpy would make floats or objects."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if array.dtype.kind in "fO" and array.ndim == 1 and array.size and not isinstance(
            value, np.ndarray):
        last = 1 if dtype.kind == "b" else np.iinfo(dtype).max
        numbers = []
        for item in value:
            numbers.append(to_address(name, item, last))
        array = np.array(numbers, dtype)
    return array


cdef cnp.ndarray column_in(str name, value, dtype, Py_ssize_t* n):
    """An input as a 1-D array of one dtype, or None for a scalar; `n` is the common length."""
    cdef cnp.ndarray array
    if PyLong_CheckExact(value):
        return None
    if cnp.PyArray_CheckExact(value):
        array = value
    else:
        if isinstance(value, (int, np.integer)) and not isinstance(value, np.ndarray):
            return None
        refuse_mask(name, value)
        array = as_array(name, value, dtype)
    if cnp.PyArray_NDIM(array) == 0:
        return None
    if cnp.PyArray_NDIM(array) != 1:
        raise ValueError(must_be(f"{name}.ndim", "1", array.ndim))
    if <PyObject*>cnp.PyArray_DESCR(array) != <PyObject*>dtype and array.dtype != dtype:
        if array.size == 0 and not isinstance(value, np.ndarray):
            array = array.astype(dtype)  # an empty sequence says nothing of its kind
        if array.dtype.kind not in "biu":
            raise TypeError(in_words(
                f"{name}.dtype", f"{dtype} or another integer", str(array.dtype)))
        last = 1 if dtype.kind == "b" else np.iinfo(dtype).max
        if array.size and (array.dtype.kind == "i" and array.min() < 0 or array.max() > last):
            at = int(array.argmin() if array.min() < 0 else array.argmax())
            raise out_of_range(f"{name}[{at}]", int(array[at]), last)
        array = array.astype(dtype)
    if n[0] >= 0 and cnp.PyArray_DIM(array, 0) != n[0]:
        raise ValueError(must_be(f"len({name})", f"{n[0]} as of the others", array.shape[0]))
    n[0] = cnp.PyArray_DIM(array, 0)
    return array


# The columns of a batch, in the order of COLUMNS and of BatchC: borrowed from DTYPES.
cdef PyObject* column_name[OUT_COLUMNS]
cdef PyObject* column_dtype[OUT_COLUMNS]
cdef dict COLUMN_INDEX = {}


cdef void open_columns() noexcept:
    cdef int k
    for k, name in enumerate(DTYPES):
        column_name[k] = <PyObject*>name
        column_dtype[k] = <PyObject*>DTYPES[name]
        COLUMN_INDEX[name] = k


open_columns()


# Accesses of a batch: the bits of all requests, and arrays of bool for the others, by bit.
cdef struct Flags:
    uint8_t always
    bint by_row
    ColumnC[3] column


# The arrays of a batch, owned: the caller may drop them while the lock is released.  First the
# output columns, then inputs.
cdef struct Held:
    unsigned int columns            # a bit for each that is there
    PyObject* array[OUT_COLUMNS + IN_COLUMNS]


cdef inline void let_go(Held* held) noexcept:
    cdef unsigned int left = held.columns
    while left:
        Py_DECREF(<object>held.array[ctz64(left)])
        left &= left - 1


cdef inline bint fits(PyObject* value, PyObject* dtype, Py_ssize_t n) noexcept:
    """It is a 1-D array of this very dtype and of n elements, or of any number if n is negative."""
    return (
        cnp.PyArray_CheckExact(<object>value)
        and <PyObject*>cnp.PyArray_DESCR(<cnp.ndarray>value) == dtype
        and cnp.PyArray_NDIM(<cnp.ndarray>value) == 1
        and (n < 0 or cnp.PyArray_DIM(<cnp.ndarray>value, 0) == n)
    )


cdef inline bint point_in(ColumnC* column, Held* held, int k, str name, value, dtype,
                          Py_ssize_t* n) except -1:
    """Let an input column point into an array; false for a scalar."""
    cdef cnp.ndarray array
    if PyLong_CheckExact(value):
        return False
    if likely(fits(<PyObject*>value, <PyObject*>dtype, n[0])):
        array = <cnp.ndarray>value
        n[0] = cnp.PyArray_DIM(array, 0)
    else:
        array = column_in(name, value, dtype, n)
        if array is None:
            return False
    Py_INCREF(array)
    held.array[OUT_COLUMNS + k] = <PyObject*>array
    held.columns |= 1U << (OUT_COLUMNS + k)
    column.data = cnp.PyArray_DATA(array)
    column.stride = cnp.PyArray_STRIDE(array, 0)
    return True


cdef inline int flag_in(Flags* flags, Held* held, int bit, str name, value,
                        Py_ssize_t* n) except -1:
    """A bit of every access, or of those that an array says."""
    flags.column[bit].data = NULL
    if value is False:
        return 0
    if value is True:
        flags.always |= 1 << bit
    elif point_in(&flags.column[bit], held, 3 + bit, name, value, BOOL, n):
        flags.by_row = True
    elif to_flag(name, value):
        flags.always |= 1 << bit
    return 0


cdef inline void batch_open(BatchC* batch) noexcept:
    """A batch without columns; those that are pointed somewhere are the same for every row."""
    cdef ColumnC* column = &batch.sid
    while column <= &batch.why:
        column.data = NULL
        column.stride = 0
        column += 1


cdef inline void point_column(BatchC* batch, Held* held, int k, cnp.ndarray array) noexcept:
    """Let an output column point into an array that fits."""
    cdef ColumnC* column = &batch.pa + k
    if unlikely(held.columns >> k & 1):  # a name that equals another, and is not the same
        Py_DECREF(<object>held.array[k])
    Py_INCREF(array)
    held.array[k] = <PyObject*>array
    held.columns |= 1U << k
    column.data = cnp.PyArray_DATA(array)
    column.stride = cnp.PyArray_STRIDE(array, 0)


cdef inline bint point_at_once(
        BatchC* batch, Held* held, PyObject* name, PyObject* array, Py_ssize_t n) noexcept:
    """point_out(), if the name and the dtype are the very objects that are known here."""
    cdef int k = 0
    while column_name[k] != name:
        k += 1
        if k == OUT_COLUMNS:
            return False
    if not fits(array, column_dtype[k], n) or not cnp.PyArray_ISWRITEABLE(<cnp.ndarray>array):
        return False
    point_column(batch, held, k, <cnp.ndarray>array)
    return True


cdef int point_out(BatchC* batch, Held* held, name, array, Py_ssize_t n) except -1:
    """Let one output column point into an array, once its shape and dtype are right."""
    cdef cnp.ndarray found
    if point_at_once(batch, held, <PyObject*>name, <PyObject*>array, n):
        return 0
    if name not in COLUMN_INDEX:
        raise ValueError(must_be("a column of out", either(COLUMNS), name))
    if not isinstance(array, np.ndarray):
        raise TypeError(must_be(f"out[{name!r}]", "a numpy array", type(array)))
    refuse_mask(f"out[{name!r}]", array)
    found = array
    dtype = DTYPES[name]
    if found.dtype != dtype:
        raise TypeError(in_words(f"out[{name!r}].dtype", str(dtype), str(found.dtype)))
    if found.ndim != 1 or found.shape[0] != n:
        raise ValueError(must_be(f"out[{name!r}].shape", f"({n},)", array.shape))
    if not cnp.PyArray_ISWRITEABLE(found):
        raise ValueError(f"out[{name!r}]: the array is read-only")
    point_column(batch, held, COLUMN_INDEX[name], found)
    return 0


# Where a structured array has its columns, by what the last dtype that was checked has.  A dtype's
# names can be assigned to, but then it has another tuple and another dict.
cdef struct Rows:
    int count
    unsigned int columns        # a bit for each
    int[OUT_COLUMNS] column
    Py_ssize_t[OUT_COLUMNS] offset

cdef Rows rows
cdef object rows_names = None
cdef object rows_fields = None


cdef int point_rows(BatchC* batch, Held* held, cnp.ndarray out, Py_ssize_t n) except -1:
    """Let the output columns point into the fields of a structured array: a bit for each."""
    global rows_names, rows_fields
    cdef cnp.dtype dtype = <cnp.dtype><PyObject*>cnp.PyArray_DESCR(out)
    cdef PyObject* names = cnp.PyDataType_NAMES(dtype)
    cdef ColumnC* column
    cdef int k
    if (names == <PyObject*>rows_names
            and cnp.PyDataType_FIELDS(dtype) == <PyObject*>rows_fields
            and cnp.PyArray_CheckExact(out) and cnp.PyArray_NDIM(out) == 1
            and cnp.PyArray_DIM(out, 0) == n and cnp.PyArray_ISWRITEABLE(out)):
        for k in range(rows.count):
            column = &batch.pa + rows.column[k]
            column.data = <char*>cnp.PyArray_DATA(out) + rows.offset[k]
            column.stride = cnp.PyArray_STRIDE(out, 0)
        return rows.columns
    if names == NULL:
        raise TypeError(in_words("out.dtype", "a structured one", str(out.dtype)))
    names_now = <object>names
    fields_now = <object>cnp.PyDataType_FIELDS(dtype)
    for name in names_now:
        point_out(batch, held, name, out[name], n)
    if cnp.PyArray_CheckExact(out):
        rows_names = names_now
        rows_fields = fields_now
        rows.count = 0
        rows.columns = held.columns & OUT_MASK
        for k in range(OUT_COLUMNS):
            column = &batch.pa + k
            if column.data != NULL:
                rows.column[rows.count] = k
                rows.offset[rows.count] = <char*>column.data - <char*>cnp.PyArray_DATA(out)
                rows.count += 1
    return held.columns & OUT_MASK


cdef int point_each(BatchC* batch, Held* held, out, Py_ssize_t n) except -1:
    """Let the output columns point into the arrays of a dict: a bit for each."""
    cdef PyObject* key
    cdef PyObject* value
    cdef Py_ssize_t at = 0, left
    if not PyDict_CheckExact(out):
        for name, array in out.items():
            point_out(batch, held, name, array, n)
        return held.columns & OUT_MASK
    left = PyDict_Size(out)
    while left > 0 and PyDict_Next(out, &at, &key, &value):
        left -= 1
        if likely(point_at_once(batch, held, key, value, n)):
            continue
        name = <object>key
        array = <object>value
        point_out(batch, held, name, array, n)
    return held.columns & OUT_MASK


cdef object make_out(Py_ssize_t n, columns):
    """A structured array with the columns that are wanted."""
    if columns is None:
        return np.empty(n, PyArray_DescrNew(DEFAULT_ROW))
    if isinstance(columns, (str, bytes)) or not isinstance(columns, Iterable):
        raise TypeError(must_be("columns", "names", type(columns)))
    names = tuple(columns)
    for name in names:
        if name not in COLUMNS:
            raise ValueError(must_be("each of columns", either(COLUMNS), name))
    if len(set(names)) != len(names):
        raise ValueError(must_be("columns", "names, each once", names))
    return np.empty(n, row_dtype(names))


cdef void shift_columns(BatchC* batch, size_t by) noexcept nogil:
    """Let every column start `by` rows later."""
    cdef ColumnC* column = &batch.sid
    while column <= &batch.why:
        if column.data != NULL:
            column.data = <char*>column.data + <ptrdiff_t>by * column.stride
        column += 1


cdef Py_ssize_t ssid_wrong(const BatchC* batch) noexcept nogil:
    """Where the first SubstreamID is that is neither one of 20 bits nor none; -1 without."""
    cdef size_t i
    cdef uint32_t ssid
    cdef size_t n = batch.n if batch.ssid.stride else (batch.n > 0)
    for i in range(n):
        memcpy(&ssid, <const char*>batch.ssid.data + <ptrdiff_t>i * batch.ssid.stride, 4)
        if ssid > 0xFFFFF and ssid != NO_SSID:
            return i
    return -1


cdef object ssid_error(const BatchC* batch, Py_ssize_t i):
    cdef uint32_t ssid
    memcpy(&ssid, <const char*>batch.ssid.data + i * batch.ssid.stride, 4)
    return ValueError(must_be(
        f"ssid[{i}]", f"0 to 0xfffff, or {<uint32_t>NO_SSID:#x} for none", ssid))


# Two functions, so that a callback which starts another batch finds no slots on the stack.

cdef int batch_plain(Core* core, Port* port, const BatchC* batch) noexcept nogil:
    return translate_plain(core, port, batch)


cdef int batch_each(Core* core, Port* port, const BatchC* batch) noexcept nogil:
    return translate_each(core, port, batch)


cdef int batch_cached(Core* core, Port* port, const BatchC* batch) noexcept nogil:
    return translate_hits(core, port, batch)


ctypedef int (*Driver)(Core*, Port*, const BatchC*) noexcept nogil

cdef Driver cached = batch_cached

cdef Driver each = batch_each
cdef Driver plain = batch_plain


cdef extern from *:
    """
    /* Batches in plain memory that this thread is in: an interrupt may start one inside another. */
    static __thread int smmufast_deep;
    #define smmufast_deep_set(n) (smmufast_deep = (n))
    """
    const int deep "smmufast_deep"
    void deep_set "smmufast_deep_set"(int n) noexcept nogil

cdef enum:
    DEEP = 8           # any more find no room for their blocks on the stack, and go one by one


cdef int batch_run(Core* core, Port* port, const BatchC* batch) noexcept nogil:
    """Translate a batch: 0, or FETCH_RAISED with the exception in the port.

    The caller has the caches.
    """
    cdef int status
    port_open(port, core.ram, NULL)
    if (core.caches == NULL and core.ram.plain and cr0_smmuen(core.hw.cr0) and batch.n != 0
            and deep < DEEP):
        deep_set(deep + 1)
        status = plain(core, port, batch)
        deep_set(deep - 1)
        return status
    if core.caches == NULL:
        return each(core, port, batch)
    return cached(core, port, batch)


cdef enum:
    PIECE = 1 << 20    # requests between looks for signals
    FLAGS = 512        # requests whose access bytes are made at a time
    SHORT = 64         # requests that take less time than giving up the GIL
    FEW = 12           # requests that the scalar driver does in less time than a batch driver


cdef void join_flags(const Flags* flags, size_t first, size_t n, uint8_t* access) noexcept nogil:
    """The access bytes of n requests."""
    cdef const ColumnC* column
    cdef size_t i
    cdef int k
    memset(access, flags.always, n)
    for k in range(3):
        column = &flags.column[k]
        if column.data != NULL:
            for i in range(n):
                # no jump: which it is cannot be predicted
                access[i] |= <unsigned int>((<const uint8_t*>column.data + <ptrdiff_t>(
                    first + i) * column.stride)[0] != 0) << k


# --- bursts ---

cdef enum:
    BURST_PAGES = 4096   # pages between looks for signals

# How burst_run ends, besides negative stops.
cdef enum:
    BURST_DONE = 0
    BURST_MORE = 1
    BURST_STOPPED = 2    # at a page that fails
    BURST_NO_ROOM = 3


# A row of Segments.array.
cdef struct Row:
    uint64_t iova
    uint64_t pa
    uint64_t length


# A burst under way: the segments so far; of the last page's outcome perm, attr and sh, or all of
# it if it failed.
cdef struct Burst:
    uint64_t rest       # bytes to go
    Row* rows
    size_t count
    size_t capacity
    Outcome outcome


cdef int burst_add(Burst* burst, uint64_t iova, const Outcome* page,
                   uint64_t length) noexcept nogil:
    """Append a page to the last segment, or as a new one: BURST_MORE, or BURST_NO_ROOM."""
    cdef Row* row
    cdef Row* grown
    cdef size_t capacity
    if (burst.count and burst.outcome.perm == page.perm and burst.outcome.attr == page.attr
            and burst.outcome.sh == page.sh):
        row = &burst.rows[burst.count - 1]
        if row.pa + row.length == page.pa:
            row.length += length
            return BURST_MORE
    if burst.count == burst.capacity:
        capacity = 2 * burst.capacity + 8
        grown = <Row*>realloc(burst.rows, capacity * sizeof(Row))
        if grown == NULL:
            return BURST_NO_ROOM
        burst.rows = grown
        burst.capacity = capacity
    row = &burst.rows[burst.count]
    row.iova = iova
    row.pa = page.pa
    row.length = length
    burst.count += 1
    return BURST_MORE


ctypedef int (*ScalarDriver)(Core*, Port*, const Request*, Memo*, Outcome*) noexcept nogil


# S15.2-2, S16.7.1-1
cdef int burst_run(Core* core, Port* port, Memo* memo, Request* request,
                   Burst* burst) noexcept nogil:
    """Translate the next pages of a burst; `request` is that of the next page.

    In plain memory the context is looked up once for all of them; elsewhere every page makes
    all its fetches.
    """
    cdef Outcome page
    cdef uint64_t room
    cdef bint known = False
    cdef int status, _page
    for _page in range(BURST_PAGES):
        if burst.rest == 0:
            return BURST_DONE
        if known and not port.wrote:
            status = deliver(
                core, port, request, translate_known(&core.hw, port, request, memo, &page), &page)
        else:
            port.wrote = False
            status = (<ScalarDriver>apart(<void*>translate_request))(
                core, port, request, memo, &page)
            known = core.caches == NULL and port.ram.plain and memo.whole
        if status:
            return status
        if page.action > ACTION_DISABLED:
            burst.outcome = page
            return BURST_STOPPED
        if page.page_lg2:
            room = (<uint64_t>1 << page.page_lg2) - (request.iova & low_mask(page.page_lg2))
        else:  # untranslated as far as addresses are legal
            room = ~core.hw.oas_over - request.iova + 1
        if room > burst.rest:
            room = burst.rest
        status = burst_add(burst, request.iova, &page, room)
        if status != BURST_MORE:
            return status
        # what burst_add compares; a whole copy would wait for the stores just made
        burst.outcome.perm = page.perm
        burst.outcome.attr = page.attr
        burst.outcome.sh = page.sh
        request.iova += room
        burst.rest -= room
    return BURST_MORE


# --- the Smmu ---

cdef int request_any(Core* core, Port* port, const Request* request, Memo* memo,
                     Outcome* outcome) noexcept nogil:
    return translate_request(core, port, request, memo, outcome)


cdef ScalarDriver through_caches = request_any  # not inlined


cdef const Context* hit_ahead(Smmu smmu, const Request* request, Leaf* leaf) noexcept:
    """The same through caches: a hit in the TLB that is permitted, with all that it counts.

    NULL leaves the caches as they were.
    """
    cdef Core* core = &smmu.core
    cdef CachesC* c = core.caches
    cdef const Memo* memo = &smmu.memos[(request.sid ^ request.ssid) % MEMOS]
    cdef const Context* context = &memo.context
    cdef const Half* half
    cdef const Entry* e
    cdef unsigned int upper
    cdef View view
    if not core.ram.plain or core.shared or not cr0_smmuen(core.hw.cr0):
        return NULL
    view.c = c
    view.sid = request.sid
    view.ssid = request.ssid
    if (not memo_current(&core.hw, &view, memo) or context.second.on
            or memo.index == STAGE1_BYPASS):
        return NULL
    upper = half_of(request.iova, context.two_ttbs)
    half = &context.half[upper]
    if half_fault(context, request.iova, upper, request.access):
        return NULL
    e = tlb_find_key(
        c, KIND_S1,
        tlb_key(c, KIND_S1, context.world, context.vmid, context.asid, context.aset),
        canonical(half, request.iova, upper))
    if e == NULL or not e.perm1 & context.need[request.access] or not usable(e, request.access):
        return NULL
    memo_touch(&view, memo)
    tlb_touch(c, e)
    leaf_of(e, 1, leaf)
    return context


ctypedef const Context* (*Ahead)(Smmu, const Request*, Leaf*) noexcept


cdef inline const Context* find_ahead(
        Smmu smmu, const Request* request, Leaf* leaf) noexcept:
    """The leaf of a request in the commonest case, inlined: the context that it was found in.

    That is plain memory, a context that was decoded before, stage 1 alone, and success; with
    caches, a hit.
    NULL is anything else; then _run() does it from the start.
    """
    cdef Core* core = &smmu.core
    cdef Ram* ram = core.ram
    cdef Port port
    cdef const Memo* memo
    cdef int event
    if unlikely(core.caches != NULL):
        return (<Ahead>apart(<void*>hit_ahead))(smmu, request, leaf)
    if unlikely(not ram.plain or core.shared or not cr0_smmuen(core.hw.cr0)):
        return NULL
    # a pointer that the compiler knows nothing of, or it computes the place again at every use
    memo = <const Memo*>apart(&smmu.memos[(request.sid ^ request.ssid) % MEMOS])
    if unlikely(not memo.context.simple or memo.context.second.on):
        return NULL
    port_open(&port, ram, NULL)
    port.window = ram.window
    if unlikely(not memo_holds(&core.hw, &port, memo, request.sid, request.ssid)):
        return NULL
    event = walk_once(&memo.context, &port, request.iova, request.access, leaf, True)
    if unlikely(ram.window.base != port.window.base):
        ram.window = port.window
    return &memo.context if likely(event == 0) else NULL


cdef inline int run_request(
        Smmu smmu, const Request* request, Outcome* outcome) except -1:
    """The scalar driver; with the GIL, which only callbacks may let go."""
    cdef Leaf leaf
    cdef Syndrome syndrome
    cdef const Context* context = find_ahead(smmu, request, &leaf)
    if unlikely(context == NULL):
        return smmu._run(request, outcome, NULL)
    finish_stage1(&smmu.core.hw, request, context, 0, &leaf, &syndrome, outcome)
    return 0


cdef int run_few(Smmu smmu, const BatchC* batch, bint more) except -1:
    """A batch in plain memory that is not worth the start of a batch driver.

    `more`: columns other than pa, action and event are wanted.
    """
    cdef Request request
    cdef Outcome outcome
    cdef Leaf leaf
    cdef Syndrome syndrome
    cdef const Context* context
    cdef size_t i
    for i in range(batch.n):
        request_at(batch, i, &request)
        context = find_ahead(smmu, &request, &leaf)
        if likely(context != NULL and not more):
            store_u64(&batch.pa, i, leaf.address | (request.iova & low_mask(leaf.shift)))
            store_u8(&batch.action, i, ACTION_OK)
            store_u8(&batch.event, i, 0)
            continue
        if context == NULL:
            smmu._run(&request, &outcome, NULL)
        else:
            finish_stage1(&smmu.core.hw, &request, context, 0, &leaf, &syndrome, &outcome)
        store_outcome(batch, i, &outcome)
    return 0


# --- several threads ---

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


@cython.final
@cython.auto_pickle(False)
cdef class Smmu:
    """Smmu(memory, features=None, *, strtab_base=0, strtab_base_cfg=0, cr0=5, cr2=2, \
gbpa=4096, eventq_base=None, cmdq_base=None, priq_base=None, caches=None, ignore_s2ptw=False, \
wired=True, on_interrupt=None)\n--\n
    An SMMUv3 (Non-secure) over a Memory.

    Parameters
    ----------
    memory : Memory
        Where the stream table, context descriptors, translation tables and queues lie.
    features : Features, optional
        What the implementation has.  A feature that is not modelled is refused with ValueError.
    strtab_base, strtab_base_cfg, cr0, cr2, gbpa : int
        Registers (IHI 0070 6.3) as software left them.  By default CR0 is SMMUEN and EVENTQEN,
        CR2 is RECINVSID, GBPA lets transactions pass with their own attributes.  ``cr0=0`` is a
        device that was reset.
    eventq_base, cmdq_base, priq_base : int, optional
        Registers of the queues.  Until an event queue is placed, here or by a write, events are
        in results alone; until a command queue is placed, `command` executes directly.
    caches : Caches, optional
        TLB, walk caches and configuration caches, which belong to this Smmu alone from now on.
        Without them every call reads the tables again.
    ignore_s2ptw : bool
        Let table walks touch what stage 2 makes Device memory even with STE.S2PTW=1.  Not
        architectural: implementations without memory attributes do so.
    wired : bool
        Whether interrupts have wires: then a source that is enabled asserts its wire, whether it
        sends a message (MSI) or not.  Without, which needs IDR0.MSI, there are messages alone.
    on_interrupt : callable, optional
        Called with the name of each wire that is asserted.

    `read` and `write` are what software sees: every register of both pages (Registers).

    >>> from smmufast import Memory, Smmu
    >>> memory = Memory()
    >>> memory.add_private()
    >>> memory.write_u64(0x4000_0000, 0b1001)      # STE 0: V=1, Config=0b100 (bypass)
    >>> smmu = Smmu(memory, strtab_base=0x4000_0000, strtab_base_cfg=0)
    >>> smmu.translate(0, 0x1234)
    <Result bypass sid=0x0 iova=0x1234 pa=0x1234>
    """

    cdef int _retry(self, const Request* request, Outcome* outcome) except -1:
        return run_request(self, request, outcome)

    cdef object _result(self, const Request* request, const Outcome* outcome):
        cdef Result result = Result.__new__(Result)
        result.request = request[0]
        result.outcome = outcome[0]
        return result

    # S3.21.1-6, S3.21.3-3, S3.21.3-6, S4.2-1, S4.2-3, S4.2-101, S4.2.1-1, S4.2.1-2, S4.2.2-1,
    # S4.2.2-2, S6.3.9.6-9, S7.2-2, V8.5.1.2-5
    cdef int _prefetch(self, const Effect* effect) except -1:
        """CMD_PREFETCH_*: as a read that tells nobody how it ended (IHI 0070 4.2)."""
        cdef Port port
        cdef Memo memo
        cdef View view
        cdef Request request
        cdef Outcome outcome
        cdef Syndrome syndrome
        cdef int status
        if self.core.caches == NULL or not cr0_smmuen(self.core.hw.cr0):
            return 0
        memset(&request, 0, sizeof(request))
        request.sid = effect.sid
        request.ssid = effect.ssid if effect.ssv else NO_SSID
        request.iova = effect.first
        request.access = ACCESS_PRIV
        port_open(&port, self.core.ram, NULL)
        memo.whole = False
        caches_take_gil(&self.core)
        self.core.ram.users += 1
        view_open(&view, &self.core, &request)
        if effect.op == CMD_PREFETCH_CONFIG:
            status = lookup_cached(&self.core.hw, &port, &view, &memo, &syndrome)
        else:
            status = translate_cached(
                &self.core.hw, &port, &view, &request, &memo, &outcome)
        self.core.ram.users -= 1
        caches_give(&self.core)
        if status < 0:
            raise_port(&port)
        return 0

    # --- the rules alone ---

    def check_ste(self, ste):
        """Say why a stream table entry would be refused, by this SMMU's features and registers.

        Parameters
        ----------
        ste : bytes-like
            Its 64 bytes, as in memory.

        Returns
        -------
        Why or None
            The first rule that refuses it (IHI 0070 5.2.2), `Why.STE_CONFIG` for one that blocks
            its stream.  None for an entry that serves transactions.

        >>> from smmufast import Memory, Smmu
        >>> Smmu(Memory()).check_ste(bytes(64))
        <Why.STE_V: 260>
        """
        cdef Memo memo
        record_in("ste", ste, memo.ste, 64)
        return why_of(ste_decode(&self.core.hw, &memo))

    def check_cd(self, cd, ste):
        """Say why a context descriptor would be refused to a stream, as `check_ste` does.

        Parameters
        ----------
        cd, ste : bytes-like
            64 bytes each, as in memory; the STE says what the stream may do.

        Returns
        -------
        Why or None
            The first rule that refuses it (IHI 0070 5.4.1).
        """
        cdef Memo memo
        record_in("cd", cd, memo.cd, 64)
        record_in("ste", ste, memo.ste, 64)
        return why_of(cd_decode(&self.core.hw, memo.ste, memo.cd, &memo.context))

    def check_command(self, command):
        """Say why a command of the Non-secure queue would be illegal (IHI 0070 4.1).

        Parameters
        ----------
        command : bytes-like
            Its 16 bytes, as in memory.

        Returns
        -------
        Why or None
        """
        cdef uint64_t[2] words
        cdef Effect effect
        record_in("command", command, words, 16)
        command_decode(&self.core.hw, words, &effect)
        return why_of(effect.why)

    cdef int _ppar(self, uint32_t sid, uint32_t ssid) except? -2:
        """STE.PPAR, for a response to a page request (8.1); -1 where no STE can be asked.

        That is an event, as of a transaction, if CR2.REC_CFG_ATS asks for these (8.1).
        """
        cdef const Hw* hw = &self.core.hw
        cdef Port port
        cdef Memo memo
        cdef Request request
        cdef Outcome outcome
        cdef Syndrome syndrome
        cdef int why, status = 0
        memset(&request, 0, sizeof(request))
        request.sid = sid
        request.ssid = ssid
        syndrome_set(&syndrome, 0, False, CLASS_IN)
        port_open(&port, self.core.ram, NULL)
        self.core.ram.users += 1
        why = ste_fetch(hw, &port, sid, &memo, &syndrome)
        if why == 0:
            why = ste_decode(hw, &memo)
        if why < 0:
            status = why
        elif why_event(why):
            end_fault(hw, &request, &outcome, why, 0, recorded_if_asked(hw), &syndrome)
            status = deliver(&self.core, &port, &request, 0, &outcome)
        self.core.ram.users -= 1
        if status < 0:
            raise_port(&port)
        return -1 if why_event(why) else <int>ste_ppar(memo.ste)

    cdef void _forget(self) noexcept:
        cdef int i
        for i in range(MEMOS):
            self.memos[i].whole = False

    cdef int translate_c(self, const Request* request, Outcome* outcome) noexcept nogil:
        """Translate one request: STATUS_DONE, STATUS_EINVAL or STATUS_EPYTHON."""
        return api_translate(<SmmuC*>&self.core, request, outcome)

    # S3.3-1, S3.4-1, S3.9-1
    def translate(self, sid, iova, *, ssid=None, write=False, priv=False, instr=False,
                  trace=False):
        """Translate one access of a device.

        Parameters
        ----------
        sid : int
            StreamID, 32 bits.
        iova : int
            Input address, 64 bits.
        ssid : int, optional
            SubstreamID, 20 bits; None for a transaction without one.
        write, priv, instr : bool
            A write instead of a read; privileged; an instruction fetch.
        trace : bool
            Record every fetch in the result.

        Returns
        -------
        Result
            Whatever the tables hold; a fault is a result, not an exception.

        Raises
        ------
        ValueError, TypeError
            An argument is out of range or of another type.
        Exception
            Whatever a Python memory callback raises.
        """
        cdef Result result
        cdef uint64_t to_iova = as_u64("iova", iova, 0xFFFFFFFFFFFFFFFF)
        cdef uint32_t to_sid = <uint32_t>as_u64("sid", sid, 0xFFFFFFFF)
        cdef uint32_t to_ssid = as_ssid(ssid)
        cdef uint32_t access = as_access(write, priv, instr)
        cdef bint tracing = as_flag("trace", trace)
        result = traced() if tracing else Result.__new__(Result)
        # read back at once: what was stored by halves would be waited for
        result.request.iova = to_iova
        result.request.sid = to_sid
        result.request.ssid = to_ssid
        result.request.access = access
        if tracing:
            self._run(&result.request, &result.outcome, (<TracedResult>result).log)
        else:
            run_request(self, &result.request, &result.outcome)
        return result

    def pa(self, sid, iova, *, ssid=None, write=False, priv=False, instr=False):
        """Translate one access and return its physical address alone.

        Arguments as in `translate`.  An access that is terminated raises the Fault of its event:
        `smmufast.faults.FAULTS` has them by event number.  So does one that stalls; it is in
        `stalls` then.
        """
        cdef Request request
        cdef Outcome outcome
        cdef Leaf leaf
        cdef Result result
        request.iova = as_u64("iova", iova, 0xFFFFFFFFFFFFFFFF)
        request.sid = <uint32_t>as_u64("sid", sid, 0xFFFFFFFF)
        request.ssid = as_ssid(ssid)
        request.access = as_access(write, priv, instr)
        request.reserved = 0
        if likely(find_ahead(self, &request, &leaf) != NULL):
            return leaf.address | (request.iova & low_mask(leaf.shift))
        self._run(&request, &outcome, NULL)
        if outcome.action <= ACTION_DISABLED:
            return outcome.pa
        result = Result.__new__(Result)
        result.request = request
        result.outcome = outcome
        raise result_error(result)

    cdef int _run(self, const Request* request, Outcome* outcome, Log* log) except -1:
        """The scalar driver for whatever find_ahead() leaves to it."""
        cdef Port port
        cdef Ram* ram = self.core.ram
        cdef Memo* memo = &self.memos[(request.sid ^ request.ssid) % MEMOS]
        cdef Memo own
        cdef int status
        port_open(&port, ram, log)
        if ram.plain and log == NULL and not self.core.shared:
            port.window = ram.window
            if self.core.caches == NULL:
                status = deliver(
                    &self.core, &port, request,
                    translate_one(&self.core.hw, &port, request, memo, outcome), outcome)
            else:
                status = through_caches(&self.core, &port, request, memo, outcome)
            ram.window = port.window
            if status:
                raise_port(&port)
            return 0
        own.whole = False  # a callback may come back here
        ram.users += 1
        caches_take_gil(&self.core)
        status = through_caches(&self.core, &port, request, &own, outcome)
        caches_give(&self.core)
        ram.users -= 1
        if status:
            raise_port(&port)
        return 0

    def translate_batch(self, sid, iova, *, ssid=None, write=False, priv=False, instr=False,
                        out=None, columns=None, threads=1):
        """Translate many accesses; the global lock is released meanwhile.

        It is kept for up to 64 accesses in plain memory, which take less time than that.

        Parameters
        ----------
        sid, iova : int or 1-D array
            uint32 and uint64; other integer arrays are converted.  Scalars are repeated.
        ssid : int, 1-D array or None
            uint32; NO_SUBSTREAM, 0xFFFFFFFF, is a transaction without one.
        write, priv, instr : bool or 1-D array
            An array of bool, or of 0 and 1 of any integer type.
        out : structured array or dict of 1-D arrays, optional
            Where results go: the columns it has are those that are computed.  With it, and with
            inputs of the dtypes above, nothing is allocated.  A structured array takes less time
            to look at than a dict.  It may be an input itself, row by row.  Otherwise it must not
            overlap the inputs: that is not checked, and rows would be wrong.
        columns : sequence of str, optional
            Without `out`: the columns wanted, by default pa, action and event.
        threads : int
            How many threads share the rows; results do not depend on it.  They share them where
            that is of use: without caches, in memory without callbacks and injected errors, with
            8192 rows for each, outputs that lie apart from inputs, and up to the first row that
            records an event, stalls or updates a descriptor.  64 at most.

        The columns are those of COLUMNS: ``pa`` (uint64, 0 when terminated), ``action`` (uint8,
        index into ACTIONS), ``event`` and ``fault`` (uint8, event number, 0 for none),
        ``perm`` (uint8, Perm), ``level`` (int8, 4 without a translation), ``page_lg2`` (uint8,
        0 likewise), ``attr`` and ``sh`` (uint8), ``ipa`` (uint64, 0 unless stage 2 translates),
        ``stage`` (uint8), ``record`` (32 bytes, zero when nothing is recorded), ``why`` (uint16).
        ``action >= ACTIONS.index("abort")`` are the accesses that are terminated or stall,
        ``layout.Event(number).name`` names an event, ``Event(row["record"])`` decodes a record.

        Returns
        -------
        structured array, or `out`
        """
        cdef BatchC batch
        cdef Held held
        cdef Flags flags
        cdef Py_ssize_t n = -1, wrong
        cdef uint32_t one_sid, one_ssid
        cdef uint64_t one_iova
        cdef bint sids, iovas, ssids = False
        cdef int found, workers = 1
        if threads is not ONE:
            workers = as_threads(threads)
        held.columns = 0
        flags.always = 0
        flags.by_row = False
        batch_open(&batch)
        try:
            sids = point_in(&batch.sid, &held, 0, "sid", sid, U32, &n)
            iovas = point_in(&batch.iova, &held, 1, "iova", iova, U64, &n)
            if ssid is not None:
                ssids = point_in(&batch.ssid, &held, 2, "ssid", ssid, U32, &n)
            flag_in(&flags, &held, 0, "write", write, &n)
            flag_in(&flags, &held, 1, "priv", priv, &n)
            flag_in(&flags, &held, 2, "instr", instr, &n)
            if n < 0:
                raise ValueError(in_words(
                    "sid or iova", "an array (use translate for one request)", "both numbers"))
            if not sids:
                one_sid = <uint32_t>as_u64("sid", sid, 0xFFFFFFFF)
                batch.sid.data = &one_sid
            if not iovas:
                one_iova = as_u64("iova", iova, 0xFFFFFFFFFFFFFFFF)
                batch.iova.data = &one_iova
            batch.n = n
            if not ssids:
                one_ssid = as_ssid(ssid)
                batch.ssid.data = &one_ssid
            else:
                wrong = ssid_wrong(&batch)
                if wrong >= 0:
                    raise ssid_error(&batch, wrong)
            batch.access.data = &flags.always
            if out is None:
                out = make_out(n, columns)
            elif columns is not None:
                raise TypeError(must_be(
                    "columns", "None beside out, whose own columns are filled", columns))
            if isinstance(out, dict):
                found = point_each(&batch, &held, out, n)
            elif cnp.PyArray_Check(out):
                if not cnp.PyArray_CheckExact(out):
                    refuse_mask("out", out)
                found = point_rows(&batch, &held, <cnp.ndarray>out, n)
            else:
                raise TypeError(must_be("out", "a structured array or a dict", type(out)))
            if n <= FEW and self.core.ram.plain and not flags.by_row:
                run_few(self, &batch, found & ~USUAL != 0)
            else:
                run_pieces(self, &batch, &flags, workers)
        finally:
            let_go(&held)
        return out

    def translate_range(self, sid, iova, size, *, ssid=None, write=False, priv=False,
                        instr=False):
        """Translate a DMA burst of `size` bytes into physical segments.

        Pages that follow each other in physical memory with the same type and permissions are
        one segment.  The burst stops at the first page that fails: its Result is
        `Segments.result`, and its segments are those before it.

        Raises
        ------
        ValueError
            An argument is out of range, or the burst would wrap around 2^64.
        """
        cdef Request request
        cdef Burst burst
        cdef Port port
        cdef Memo memo
        cdef int status = BURST_MORE
        cdef Segments segments = Segments.__new__(Segments)
        cdef Result result
        cdef cnp.ndarray array
        memset(&burst, 0, sizeof(burst))
        request.iova = as_u64("iova", iova, 0xFFFFFFFFFFFFFFFF)
        request.sid = <uint32_t>as_u64("sid", sid, 0xFFFFFFFF)
        request.ssid = as_ssid(ssid)
        request.access = as_access(write, priv, instr)
        burst.rest = as_u64("size", size, 0xFFFFFFFFFFFFFFFF)
        if burst.rest and request.iova + (burst.rest - 1) < request.iova:
            raise ValueError(must_be(
                "size", f"0 to {bytes_from('iova', request.iova)}", burst.rest))
        port_open(&port, self.core.ram, NULL)
        memo.whole = False
        self.core.ram.users += 1
        self.core.shared += self.core.caches != NULL
        try:
            while status == BURST_MORE:
                with nogil:
                    caches_take(&self.core)
                    status = burst_run(&self.core, &port, &memo, &request, &burst)
                    caches_give(&self.core)
                if status == BURST_NO_ROOM:
                    raise MemoryError()
                if status < 0:
                    raise_port(&port)
                look_for_signals()
            array = np.empty(burst.count, PyArray_DescrNew(SEGMENT))
            if burst.count:
                memcpy(cnp.PyArray_DATA(array), burst.rows, burst.count * sizeof(Row))
        finally:
            self.core.shared -= self.core.caches != NULL
            self.core.ram.users -= 1
            free(burst.rows)
        if status == BURST_STOPPED:
            result = Result.__new__(Result)
            result.request = request
            result.outcome = burst.outcome
            segments.result = result
        segments.array = array
        return segments

    def start_walk(self, sid, iova, *, ssid=None, write=False, priv=False, instr=False,
                   holds_sync=False):
        """Start a translation whose fetches the host performs.

        The Memory is not read for the walk; an event is put into its event queue, if software
        placed one.  Caches answer as ever, so that a walk may be done at once; they are asked when
        the walk comes to them, and take what it has read.  Several walks may be under way, and end
        in any order.

        Parameters
        ----------
        sid, iova, ssid, write, priv, instr
            As for `translate`.
        holds_sync : bool
            What becomes of the walk when an invalidation overtakes it: if True, a CMD_SYNC behind
            that waits for the walk; otherwise the CMD_SYNC completes, and the walk starts again.
            While CMD_SYNC waits, CMDQ_CONS stays at it, and `sync` raises RuntimeError.

        Returns
        -------
        Walk
        """
        cdef Walk walk = Walk.__new__(Walk)
        cdef Request* request = &walk.walk.request
        request.iova = as_u64("iova", iova, 0xFFFFFFFFFFFFFFFF)
        request.sid = <uint32_t>as_u64("sid", sid, 0xFFFFFFFF)
        request.ssid = as_ssid(ssid)
        request.access = as_access(write, priv, instr)
        walk.walk.flags = HOLDS_SYNC if as_flag("holds_sync", holds_sync) else 0
        walk.smmu = self
        walk.traced = traced()
        walk.traced.request = request[0]
        walk._step(True, NULL)
        return walk

    def stale(self):
        """Look for entries of caches that the tables in memory no longer give.

        Each live entry is looked up again in the Memory, without the caches, without hardware
        updates and without injected errors.  What is found here after tables were changed is what
        an invalidation is missing for.

        A translation or a table is right as long as one context with its tags (VMID, ASID,
        StreamWorld) gives it: that of the transaction that filled it, or another one.  What the
        first does not give is asked of the substreams of its stream, and then of every stream.
        That takes at most 2^22 look-ups of STEs and CDs in one call, where asking a context for
        one entry counts as 64, and of contexts that differ and have the same tags 1024 are asked.
        Entries that none of these gives are listed; where others were left out, not as `sure`.

        The ATC of a device in `devices` is looked through if it has `held`, as AtsDevice has: an
        entry is stale that a new request would not get, or with fewer permissions.

        Returns
        -------
        list of StaleEntry
            In the order of the caches, and of `devices`.
        """
        from smmufast._device.stale import look

        return look(self)

    # --- ATS (3.9.1) ---

    # S3.9-3, S3.9.1-9, S3.9.1.2-6, S13.6.2-2, S13.6.3-1, S13.6.4-3, S13.7-7, S13.7-8
    def ats_request(self, sid, iova, *, ssid=None, no_write=False, execute=False, priv=False,
                    stu=4096):
        """Answer a PCIe ATS translation request for one page.

        It reads the tables as an access would, and updates access flags, and the dirty state if
        it grants a write.  It never stalls.  STE.EATS, with CR0.ATSCHK for split-stage ATS, says
        whether the stream may ask: if not, F_BAD_ATS_TREQ is recorded.  Configuration errors are
        recorded with CR2.REC_CFG_ATS alone, faults of translation never.  Permissions and size
        are those of both stages; with split-stage ATS the address is the one between them.

        Parameters
        ----------
        sid : int
            StreamID, 32 bits.
        iova : int
            Input address, 64 bits; untranslated.
        ssid : int, optional
            PASID, 20 bits; None for a request without one.  Then execute and priv count as False.
        no_write : bool
            The device is not going to write (NW): nothing is marked dirty, and no write is granted
            but by a stream whose only stage S1DSS bypasses, which is the identity.
        execute, priv : bool
            Execute permission is asked for too; the accesses will be privileged.
        stu : int
            The device's smallest translation unit in bytes, a power of two from 4096 on: the size
            of an answer that no page gives.

        Returns
        -------
        AtsResponse

        Raises
        ------
        ValueError, TypeError
            An argument is out of range or of another type.
        Exception
            Whatever a Python memory callback or on_interrupt raises.
        """
        cdef Request request
        cdef AtsAsk ask
        cdef AtsAnswer answer
        request.iova = as_u64("iova", iova, 0xFFFFFFFFFFFFFFFF)
        request.sid = <uint32_t>as_u64("sid", sid, 0xFFFFFFFF)
        request.ssid = as_ssid(ssid)
        self._ats_open(&request, &ask, as_flag("no_write", no_write),
                       as_flag("execute", execute), as_flag("priv", priv), stu)
        ats_ask(&self.core, &request, &ask, &answer)
        return self._ats_response(&request, &ask, &answer)

    cdef int _ats_open(self, Request* request, AtsAsk* ask, bint no_write, bint execute,
                       bint priv, stu) except -1:
        """What a request asks for, beside stream and address."""
        cdef uint64_t unit = as_u64("stu", stu, <uint64_t>1 << 43)
        cdef bint pasid = request.ssid != NO_SSID
        if unit < 4096 or unit & (unit - 1):
            raise ValueError(must_be("stu", "a power of two from 0x1000 on", unit))
        request.access = ACCESS_PRIV if priv and pasid else 0
        request.reserved = 0
        ask.no_write = no_write
        ask.execute = execute and pasid
        ask.stu_lg2 = <uint8_t>ctz64(unit)
        return 0

    cdef object _ats_response(
            self, const Request* request, const AtsAsk* ask, const AtsAnswer* answer):
        """The AtsResponse to a request."""
        cdef Result found = self._result(request, &answer.outcome)
        cdef bint priv = request.access != 0
        cdef uint64_t address, size
        if answer.status != ATS_SUCCESS:
            return AtsResponse(
                ATS_STATUS[answer.status], fault=found.fault, event=found.event, why=found.why)
        if not answer.granted:
            return AtsResponse(
                "success", size=1 << ask.stu_lg2, priv=priv, fault=found.fault, why=found.why)
        size = <uint64_t>1 << answer.outcome.page_lg2
        address = answer.outcome.ipa if answer.split else answer.outcome.pa
        return AtsResponse(
            "success", address & ~(size - 1), size,
            read=answer.granted & ATS_READ != 0, write=answer.granted & ATS_WRITE != 0,
            execute=answer.granted & ATS_EXECUTE != 0, priv=priv, ipa=answer.split,
            attr=answer.outcome.attr, shareability=answer.outcome.sh)

    def ats_translated(self, sid, address, *, ssid=None, write=False, priv=False,
                       instr=False):
        """Take an ATS Translated transaction, whose address an `ats_request` gave.

        With CR0.ATSCHK=0 it passes.  Otherwise STE.EATS says: full ATS lets it pass, split-stage
        ATS translates the address, an intermediate physical one, by stage 2, for the access that
        STE.INSTCFG and PRIVCFG make of it; other streams are refused with F_TRANSL_FORBIDDEN.

        Parameters
        ----------
        sid, address : int
            StreamID, 32 bits; address, 64 bits.
        ssid : int, optional
            PASID, 20 bits; without meaning unless IDR3.PASIDTT is 1.
        write : bool
            A write instead of a read.
        priv, instr : bool
            What the PASID says of the access: without one, or without IDR3.PASIDTT, it is
            unprivileged and data.

        Returns
        -------
        Result
            Its action is "bypass" where the transaction passes, "ok" where stage 2 translates it.
            An address beyond the output address size aborts without an event.

        Raises
        ------
        ValueError, TypeError, Exception
            As for `ats_request`.
        """
        cdef Request request
        cdef Outcome outcome
        request.iova = as_u64("address", address, 0xFFFFFFFFFFFFFFFF)
        request.sid = <uint32_t>as_u64("sid", sid, 0xFFFFFFFF)
        request.ssid = as_ssid(ssid)
        request.access = as_access(write, priv, instr)
        request.reserved = 0
        translated_input(&self.core.hw, &request)
        ats_pass(&self.core, &request, &outcome)
        return self._result(&request, &outcome)

    def __reduce_ex__(self, protocol):
        """Pickle the Smmu with its Memory, as Smmu.save() and Memory do; so copy.deepcopy().

        copy.copy() gives an independent Smmu over the same Memory.  Callbacks and devices are
        the host's and are left out.
        """
        state = self.save()
        return _restored, (self._memory, PickleBuffer(state) if protocol >= 5 else state)

    def _repr_html_(self):
        from smmufast._html import fields
        return fields(self)

    def __repr__(self):
        return (f"Smmu(strtab_base={self.strtab_base:#x}, "
                f"strtab_base_cfg={self.strtab_base_cfg:#x}, cr0={self.cr0:#x}, "
                f"cr2={self.cr2:#x}, gbpa={self.gbpa:#x}, features={self.features!r})")


def _restored(memory, state):
    return Smmu.restore(state, memory)


cdef object U32 = np.dtype(np.uint32)
cdef object U64 = np.dtype(np.uint64)
cdef object BOOL = np.dtype(np.bool_)


# --- the C face ---

cdef bint request_legal(const Request* request) noexcept nogil:
    return ((request.ssid <= 0xFFFFF or request.ssid == NO_SSID)
            and request.access <= (ACCESS_WRITE | ACCESS_PRIV | ACCESS_INSTR))


cdef SmmuC* api_acquire(void* obj) noexcept:
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
    cdef Core* core = <Core*>handle
    cdef Port port
    cdef BatchC batch
    cdef int status
    if not batch_known(given, &batch):
        return STATUS_EINVAL
    if (batch.sid.data == NULL or batch.ssid.data == NULL or batch.iova.data == NULL
            or batch.access.data == NULL or ssid_wrong(&batch) >= 0
            or not accesses_legal(&batch)):
        return STATUS_EINVAL
    caches_take(core)
    status = batch_run(core, &port, &batch)
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


cdef inline bint access_legal(uint64_t offset, uint32_t size) noexcept nogil:
    """What Registers.read() takes; other accesses are impossible on a bus."""
    return offset <= 0x1FFFF and (size == 1 or size == 2 or size == 4 or size == 8)


cdef int api_read(
        SmmuC* handle, uint64_t offset, uint32_t size, uint64_t* value) noexcept nogil:
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
_C_API = PyCapsule_New(&api, "smmufast._smmu._C_API", NULL)
