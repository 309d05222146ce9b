"""Result and Segments: what a translation gives, alone and as a burst."""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from smmufast._facts.bits cimport le64
from smmufast._engine.memory cimport LOG_FETCHES, LOG_WORDS, Log, Logged
from smmufast._facts.types cimport (
    ACCESS_WRITE, ACTION_DISABLED, ACTION_OK, ACTION_STALL, FETCH_TT_UPDATE, NO_LEVEL, NO_SSID,
    FetchC, Outcome,
)

from collections.abc import Sequence
import numpy as np

from smmufast._arguments import must_be
from smmufast.faults import ACTIONS, FAULTS, FETCH_KINDS, Event, Fetch, Perm
from smmufast.why import Why


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
