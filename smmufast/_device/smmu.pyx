# cython: binding=False, embedsignature=True, embedsignature.format=clinic
"""Smmu: the hardware half, and its faces."""

cimport cython
cimport numpy as cnp
from cpython.exc cimport PyErr_Clear, PyErr_Occurred
from cpython.long cimport PyLong_CheckExact
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from smmufast._facts.bits cimport noinline, likely, low_mask, unlikely
from smmufast._engine.cache cimport ctz64
from smmufast._rules.command cimport Effect, command_decode
from smmufast._engine.core cimport Core, caches_give, caches_take, caches_take_gil
from smmufast._facts.layout cimport CMD_PREFETCH_CONFIG, cr0_smmuen, ste_ppar
from smmufast._facts.ints cimport digits_of
from smmufast._engine.memory cimport (
    Log, Port, Ram, bytes_from, look_for_signals, out_of_range, port_open, raise_port, to_address,
    to_flag,
)
from smmufast._engine.ats cimport (
    ATS_EXECUTE, ATS_READ, ATS_SUCCESS, ATS_WRITE, AtsAnswer, AtsAsk, ats_request, ats_translated,
    recorded_if_asked, translated_input,
)
from smmufast._engine.batch_block cimport request_at, store_outcome, store_u8, store_u64
from smmufast._engine.vector cimport vector_switch
from smmufast._engine.cached cimport (
    deliver, lookup_cached, memo_current, memo_touch, translate_cached, translate_request,
    view_open,
)
from smmufast._rules.config cimport STAGE1_BYPASS, cd_decode
from smmufast._engine.tlb cimport CachesC, Entry, tlb_find_key, tlb_key, tlb_touch
from smmufast._rules.scope cimport KIND_S1
from smmufast._engine.chain cimport CLASS_IN, Leaf, Syndrome, View, end_fault, syndrome_set
from smmufast._engine.lookup cimport Memo, memo_holds, ste_decode, ste_fetch
from smmufast._engine.stage1 cimport canonical, half_fault, walk_once
from smmufast._engine.translate cimport finish_stage1, leaf_of, open_paths, translate_one, usable
from smmufast._facts.hw cimport Hw
from smmufast._facts.types cimport (
    ACCESS_INSTR, ACCESS_PRIV, ACCESS_WRITE, ACTION_DISABLED, ACTION_OK, HOLDS_SYNC, NO_SSID,
    BatchC, Context, Half, Outcome, Request, SmmuC,
)
from smmufast._rules.vmsa cimport half_of
from smmufast._facts.why cimport why_event

from pickle import PickleBuffer
from types import MappingProxyType
import os
import numpy as np

from smmufast._arguments import in_words, must_be
from smmufast.faults import AtsResponse


cdef extern from "numpy/arrayobject.h":
    cnp.dtype PyArray_DescrNew(cnp.dtype descr)

cnp.import_array()

open_paths()
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


include "smmu_results.pxi"


include "smmu_walk.pxi"


include "smmu_columns.pxi"


include "smmu_peek.pxi"


include "smmu_bursts.pxi"


# --- the Smmu ---

cdef int request_any(Core* core, Port* port, const Request* request, Memo* memo,
                     Outcome* outcome) noexcept nogil:
    return translate_request(core, port, request, memo, outcome)


cdef ScalarPath through_caches = request_any  # not inlined


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
        return (<Ahead>noinline(<void*>hit_ahead))(smmu, request, leaf)
    if unlikely(not ram.plain or core.shared or not cr0_smmuen(core.hw.cr0)):
        return NULL
    # a pointer that the compiler knows nothing of, or it computes the place again at every use
    memo = <const Memo*>noinline(&smmu.memos[(request.sid ^ request.ssid) % MEMOS])
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
    """The scalar path; with the GIL, which only callbacks may let go."""
    cdef Leaf leaf
    cdef Syndrome syndrome
    cdef const Context* context = find_ahead(smmu, request, &leaf)
    if unlikely(context == NULL):
        return smmu._run(request, outcome, NULL)
    finish_stage1(&smmu.core.hw, request, context, 0, &leaf, &syndrome, outcome)
    return 0


cdef int run_few(Smmu smmu, const BatchC* batch, bint more) except -1:
    """A batch in plain memory that is not worth the start of a batch path.

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


include "smmu_threads.pxi"


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
                  trace=False, peek=False):
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
        peek : bool
            Look alone: the result is what would come of the access, and nothing else does.  No
            event is recorded and no transaction stalls (its Result has no STAG); no descriptor is
            updated; caches answer as they would, and neither keep nor count anything; injected
            errors do not count it.  Python memory callbacks are called, to read.

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
        if unlikely(peek is not False) and as_flag("peek", peek):
            look_scalar(self, &result.request, &result.outcome,
                        (<TracedResult>result).log if tracing else NULL)
        elif tracing:
            self._run(&result.request, &result.outcome, (<TracedResult>result).log)
        else:
            run_request(self, &result.request, &result.outcome)
        return result

    def pa(self, sid, iova, *, ssid=None, write=False, priv=False, instr=False, peek=False):
        """Translate one access and return its physical address alone.

        Arguments as in `translate`.  An access that is terminated raises the Fault of its event:
        `smmufast.faults.FAULTS` has them by event number.  So does one that stalls; it is in
        `stalls` then, unless with `peek`.
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
        if unlikely(peek is not False) and as_flag("peek", peek):
            look_scalar(self, &request, &outcome, NULL)
        elif likely(find_ahead(self, &request, &leaf) != NULL):
            return leaf.address | (request.iova & low_mask(leaf.shift))
        else:
            self._run(&request, &outcome, NULL)
        if outcome.action <= ACTION_DISABLED:
            return outcome.pa
        result = Result.__new__(Result)
        result.request = request
        result.outcome = outcome
        raise result_error(result)

    cdef int _run(self, const Request* request, Outcome* outcome, Log* log) except -1:
        """The scalar path for whatever find_ahead() leaves to it."""
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
                        out=None, columns=None, threads=1, peek=False):
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
        peek : bool
            Look alone, as `translate` does, by one thread.

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
        cdef bint looks = peek is not False and as_flag("peek", peek)
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
            if looks:
                look_pieces(self, &batch, &flags)
            elif n <= FEW and self.core.ram.plain and not flags.by_row:
                run_few(self, &batch, found & ~USUAL != 0)
            else:
                run_pieces(self, &batch, &flags, workers)
        finally:
            let_go(&held)
        return out

    def translate_range(self, sid, iova, size, *, ssid=None, write=False, priv=False,
                        instr=False, peek=False):
        """Translate a DMA burst of `size` bytes into physical segments.

        Pages that follow each other in physical memory with the same type and permissions are
        one segment.  The burst stops at the first page that fails: its Result is
        `Segments.result`, and its segments are those before it.  With `peek` it is looked at
        alone, as `translate` does.

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
        cdef bint looks = as_flag("peek", peek)
        cdef Looking* looking = NULL
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
                    if looks:
                        look_close(looking)
                        looking = look_open(&self.core, &port, NULL)
                    if looks and looking == NULL:
                        status = BURST_NO_ROOM
                    else:
                        status = burst_run(&self.core, &port, &memo, &request, &burst, looking)
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
            look_close(looking)
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

    def transaction(self):
        """Return a Transaction, to be opened by `with`: a translation and the access it is for.

        A CMD_SYNC behind an invalidation waits for those that were open before it.
        """
        cdef Transaction made = Transaction.__new__(Transaction)
        made.smmu = self
        return made

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


include "smmu_c.pxi"
