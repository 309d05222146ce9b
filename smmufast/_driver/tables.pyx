# cython: binding=False, embedsignature=True, embedsignature.format=clinic
"""Page tables in memory: map, unmap, dirty state; and the blocks of memory that they lie in."""

cimport cython
from cpython.exc cimport PyErr_CheckSignals, PyErr_Clear, PyErr_Occurred
from cpython.long cimport PyLong_Check
from cpython.number cimport PyNumber_Index
from cpython.pythread cimport (
    NOWAIT_LOCK, PyThread_acquire_lock, PyThread_allocate_lock, PyThread_free_lock,
    PyThread_get_thread_ident, PyThread_release_lock, PyThread_type_lock,
)
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset
cimport numpy as cnp

from smmufast._facts.bits cimport le64, likely, low_mask, unlikely
from smmufast._facts.ints cimport digits_of
from smmufast._facts.layout cimport (
    pte_s1_set_af, pte_s1_set_ap1, pte_s1_set_ap2, pte_s1_set_attrindx, pte_s1_set_dbm,
    pte_s1_set_ng, pte_s1_set_pxn, pte_s1_set_sh, pte_s1_set_uxn, pte_s2_set_af, pte_s2_set_memattr,
    pte_s2_set_s2ap, pte_s2_set_sh, pte_s2_set_xn,
)
from smmufast._driver.leaves cimport leaves_switch, leaves_wide
from smmufast._engine.memory cimport to_flag
from smmufast._driver.pages cimport (
    FRAME_LG2, SMALLEST_LG2, Frame, PagesC, access_open, bit_of, clz, ctz, pages_free,
)

import os
from collections.abc import Iterable

from smmufast._arguments import in_words, must_be
from smmufast.errors import (
    Busy, Exists, InputOutput, InvalidArgument, NoDevice, NotSupported, OutOfMemory, OutOfRange,
    WrongType, instance,
)

cdef extern from "Python.h":
    # cpython.long raises its OverflowError, which names no argument
    unsigned long as_unsigned_long "PyLong_AsUnsignedLong"(object value) noexcept
    int acquire_interruptibly "PyThread_acquire_lock_timed"(
        PyThread_type_lock lock, long long microseconds, int interruptible) noexcept nogil
    enum:
        PY_LOCK_INTR

cnp.import_array()

READ = 1
WRITE = 2
CACHE = 4
NOEXEC = 8
MMIO = 16
PRIV = 32

cdef enum:
    P_READ = 1
    P_WRITE = 2
    P_CACHE = 4
    P_NOEXEC = 8
    P_MMIO = 16
    P_PRIV = 32

    LARGE = 16384         # granules: from here on a call lets other threads run
    KEPT = 64             # tables that may stay although they became empty

    # PageTable.state
    BUSY = 1              # a call has the table for itself, and the GIL may be anybody's
    NOT_READY = 2
    CLOSED = 4
    SLOW = 8              # memory that is not plain
    OWES = 16             # what was removed is not flushed yet, since that failed

    # how a piece of work ends
    DONE = 0
    STOPPED               # at a hole
    FULL                  # the batch cannot take what comes next
    CUT                   # a contiguous run must be broken up first
    TAKEN                 # something is mapped there
    STRAY                 # a descriptor names what is no table
    CHANGED               # the tables are not as they were
    NO_PAGES
    NO_HOST_MEMORY


# --- vectors ---

def vectors(on=None):
    """Whether page tables use the processor's vectors; with an argument, let them or not.

    What is written does not depend on it.  They do where the processor has AVX-512, unless the
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
        leaves_switch(to_flag("on", on))
    return bool(leaves_wide)


vectors(os.environ.get("SMMUFAST_VECTOR") != "0")


# --- processes ---

cdef uint64_t forks = 0  # how often this process is the child of a fork


def _forked():
    """Count a fork, in the child."""
    global forks
    forks += 1


os.register_at_fork(after_in_child=_forked)


# --- numbers ---

cdef uint64_t number_slow(str name, value) except? -1:
    try:
        given = PyNumber_Index(value)
    except TypeError:
        raise WrongType(name, value, text=must_be(name, "an integer", type(value))) from None
    if not 0 <= given <= 0xFFFFFFFFFFFFFFFF:
        raise InvalidArgument(name, given, "0 to 2^64 - 1")
    return given


cdef inline uint64_t number(str name, value) except? -1:
    """An argument of 64 bits, or an error that names it."""
    cdef uint64_t given = 0
    if likely(PyLong_Check(value)):
        if likely(digits_of(value, &given)):
            return given
        given = as_unsigned_long(value)
        if likely(given != <unsigned long>-1):
            return given
        if PyErr_Occurred():
            PyErr_Clear()
    return number_slow(name, value)


cdef int flag(str name, value) except -1:
    """An argument that is true or false, or an error that names it."""
    try:
        return to_flag(name, value)
    except (TypeError, ValueError) as error:
        raise WrongType(name, value, text=str(error)) from None


include "tables_pages.pxi"


include "tables_loops.pxi"


# --- the owner ---

cdef tuple SIZES = (32, 36, 40, 42, 44, 48, 52)
cdef dict GRANULES = {4096: 12, 16384: 14, 65536: 16}
cdef dict TG = {12: 0b00, 14: 0b10, 16: 0b01}
cdef dict LEAVES = {12: 0b1110, 14: 0b1100, 16: 0b1100}
# lg2 of the entries that a contiguous hint joins, by level
cdef dict RUNS = {12: (0, 4, 4, 4), 14: (0, 0, 5, 7), 16: (0, 0, 5, 5)}


cdef uint64_t stage1_attributes(unsigned int prot, bint dirty) noexcept:
    """Bits of a leaf of stage 1 with these permissions and memory type."""
    cdef uint64_t d = pte_s1_set_ng(pte_s1_set_af(0, 1), 1)
    if not prot & P_WRITE:
        d = pte_s1_set_ap2(d, 1)
    elif dirty:
        d = pte_s1_set_dbm(d, 1)
    if not prot & P_PRIV:
        d = pte_s1_set_ap1(d, 1)
    if prot & P_MMIO:
        d = pte_s1_set_attrindx(d, 2)
    elif prot & P_CACHE:
        d = pte_s1_set_attrindx(d, 1)
    if prot & P_NOEXEC:
        d = pte_s1_set_uxn(pte_s1_set_pxn(d, 1), 1)
    return pte_s1_set_sh(d, 3 if prot & P_CACHE else 2)


cdef uint64_t stage2_attributes(unsigned int prot, bint fwb) noexcept:
    """Bits of a leaf of stage 2, likewise."""
    cdef uint64_t d = pte_s2_set_s2ap(pte_s2_set_af(0, 1), prot & (P_READ | P_WRITE))
    if prot & P_MMIO:
        d = pte_s2_set_memattr(d, 1)
    elif prot & P_CACHE:
        d = pte_s2_set_memattr(d, 6 if fwb else 15)
    else:
        d = pte_s2_set_memattr(d, 5)
    if prot & P_NOEXEC:
        d = pte_s2_set_xn(d, 2)  # whoever executes; 3 lets privileged accesses, with XNX
    return pte_s2_set_sh(d, 3 if prot & P_CACHE else 2)


cdef bint stage2_starts(int level, int granule, int oas) noexcept:
    """Stage 2 may start at this level: a larger table there would cover more than there is."""
    if granule == 12:
        return level > 0 or oas >= 44
    if granule == 14:
        return level > 1 or level == 1 and oas >= 42
    return level > 1 or oas >= 44


@cython.auto_pickle(False)
@cython.no_gc_clear  # the tables are given back to the pages last
cdef class PageTable:
    """PageTable(pages, *, stage=1, granule=4096, ias=48, oas=48, contiguous=False, dirty=False, \
coherent=True, fwb=False, page_sizes=None, ready=True)\n--\n
    Translation tables of one address space, in VMSAv8-64 format, stage 1 or stage 2.

    What it maps is in memory and nowhere else; whoever writes there changes it.  Tables are
    made as needed and given back when an unmap covers their whole span.  Those that become empty
    in pieces stay for the next map; once there are 64, they are given back by the unmap that
    empties the last one.

    Parameters
    ----------
    pages : Pages
        Where the tables lie.
    stage : {1, 2}
    granule : {4096, 16384, 65536}
        The smallest page.
    ias : int
        Bits of an input address: 25 to 48, or to 52 with 64 KiB.
    oas : int
        Bits of an output address: 32, 36, 40, 42, 44, 48, or 52 with 64 KiB.
    contiguous : bool
        Set the contiguous hint on each aligned run of 16 leaves (16 KiB: 128 pages or 32 blocks;
        64 KiB: 32) that one map fills with one piece of memory.
    dirty : bool
        Stage 1: writable leaves are such that hardware can track whether they were written.
    coherent : bool
        Walks are cacheable and inner shareable; otherwise they are not cacheable.
    fwb : bool
        Stage 2: memory types in the coding of STE.S2FWB.
    page_sizes : int, optional
        Page sizes that map() may use, as the bitmap of what an SMMU supports; by default all of
        the granule.
    ready : bool
        As the attribute.

    Attributes
    ----------
    active : bool
        Hardware may have cached what the tables hold.  What is removed is then told to `flush`
        before tables are given back.  False at first.
    stage, ias, oas, contiguous, dirty, coherent, fwb
        As given.

    Raises
    ------
    InvalidArgument
        A value is not allowed, or does not go with the others.
    NotSupported
        dirty with stage 2.
    OutOfMemory
        No memory is left for the first table.

    Notes
    -----
    Sections: DDI 0487 D8.2, D8.3; IHI 0070 5.2, 5.4.  The contents are those that Linux writes:
    stage 1 leaves have nG and AF, and no unprivileged access only with PRIV.  Stage 2 starts one
    level lower, with up to 16 tables side by side, where the output size admits no other start.

    A call that raises has changed nothing, but for unmap and read_dirty when `flush` raises.  Where
    the memory refuses that something be undone as well, what it holds stays, and counts as mapped.

    Several threads may share it.  A call for 16384 granules or more releases the GIL, and calls of
    other threads for the same table wait for it, as they do while `flush` runs in the middle of a
    call.  A table is complete before an entry leads to it, and each descriptor is written as a
    whole, so that walks of other threads may go on meanwhile.  A call that comes back to a table
    from its own `flush`, or from a callback of its memory, may meet it at work: Busy.

    Examples
    --------
    >>> from smmufast import Memory
    >>> from smmufast._driver.tables import Pages, PageTable
    >>> memory = Memory()
    >>> memory.add_private(0x8000_0000, 1 << 20)
    >>> table = PageTable(Pages(memory, 0x8000_0000, 1 << 20))
    >>> table.map(0x20_0000, 0x4000_0000, 0x20_1000)
    >>> hex(table.iova_to_phys(0x40_0123))
    '0x40200123'
    >>> hex(table.unmap(0x20_0000, 0x20_1000))
    '0x201000'
    >>> table.close()
    """

    def __cinit__(self):
        self.state = CLOSED
        self.lock = PyThread_allocate_lock()
        if self.lock == NULL:
            raise MemoryError("no lock is left for a page table")

    def __init__(self, Pages pages not None, *, stage=1, granule=4096, ias=48, oas=48,
                 contiguous=False, dirty=False, coherent=True, fwb=False, page_sizes=None,
                 ready=True):
        # A table that is checked whole before it takes memory for its root.
        cdef Tree* t = &self.tree
        cdef int level, bits, most
        cdef uint64_t sizes = 0
        cdef bint tracked = flag("dirty", dirty), forced = flag("fwb", fwb)
        cdef bint hints = flag("contiguous", contiguous), shared = flag("coherent", coherent)
        cdef bint begins = flag("ready", ready)
        if self.pages is not None:
            raise InvalidArgument("pages", text="the page table has its pages already")
        if stage not in (1, 2):
            raise InvalidArgument("stage", stage, "1 or 2")
        if granule not in GRANULES:
            raise InvalidArgument("granule", granule, "4096, 16384 or 65536")
        t.granule = GRANULES[granule]
        most = 52 if t.granule == 16 else 48
        bits = <int>min(number("ias", ias), <uint64_t>99)
        if not 25 <= bits <= most:
            raise InvalidArgument("ias", ias, f"25 to {most} with this granule")
        if number("oas", oas) not in SIZES or oas > most:
            raise InvalidArgument(
                "oas", oas, f"{'32, 36, 40, 42, 44, 48' + ', 52' * (most == 52)} with this granule")
        if tracked and stage == 2:
            raise NotSupported("dirty", dirty, text="dirty is tracked by stage 1 only")
        t.stride = t.granule - 3
        for level in range(4):
            t.shift[level] = t.granule + (3 - level) * t.stride
            t.run_lg2[level] = RUNS[t.granule][level]
        t.leaves = LEAVES[t.granule]
        if t.granule == 16 and oas > 48:
            t.leaves |= 1 << 1
        t.start = 3 - (bits - t.granule - 1) // t.stride
        while stage == 2 and not stage2_starts(t.start, t.granule, oas):
            t.start += 1
        if bits - t.shift[t.start] > t.stride + 4:
            raise InvalidArgument("ias", ias, text=(
                f"ias is {ias}: with oas {oas}, stage 2 needs more than 16 tables side by side"))
        t.root_offsets = 8 * low_mask(bits - t.shift[t.start])
        t.root_bytes = max(t.root_offsets + 8, <uint64_t>1 << SMALLEST_LG2)
        t.offsets = 8 * low_mask(t.stride)
        for level in range(t.start, 4):
            if t.leaves >> level & 1 and t.shift[level] <= bits:
                sizes |= <uint64_t>1 << t.shift[level]
        if page_sizes is not None:
            sizes &= number("page_sizes", page_sizes)
        if sizes == 0:
            raise InvalidArgument("page_sizes", page_sizes, text=(
                f"page_sizes is {page_sizes:#x}: no page size of granule {granule} is among them"))
        for level in range(t.start, 4):
            if sizes >> t.shift[level] & 1:
                t.used |= 1 << level
        t.unaligned = low_mask(<unsigned int>ctz(sizes))
        t.input_last = low_mask(bits)
        t.output_last = low_mask(oas)
        t.low_address = low_mask(48) & ~low_mask(t.granule)
        t.high_address = 0xF000 if t.granule == 16 else 0
        t.hints = hints
        for level in range(64):
            t.attributes[level] = (
                stage1_attributes(level, tracked) if stage == 1
                else stage2_attributes(level, forced))
        self.stage, self.ias, self.oas = stage, bits, oas
        self.contiguous, self.dirty = hints, tracked
        self.coherent, self.fwb = shared, forced
        t.pages = &pages.c
        t.access = &self.access
        access_open(t.access, &pages.c.access)
        t.plain, t.host = pages.c.plain, pages.c.host
        t.frames, t.origin, t.n_frames = pages.c.frames, pages.c.origin, pages.c.n_frames
        pages.c.tags += 1
        t.tag = pages.c.tags << 3
        self.pages = pages
        self.state = NOT_READY | (0 if t.plain else SLOW)
        if begins:
            try:
                self._make_root()
            except BaseException:
                self.state = CLOSED
                raise

    def __dealloc__(self):
        if self.pages is not None:
            self._give_all()
        if self.lock != NULL:
            PyThread_free_lock(self.lock)

    # --- what is locked, and what is missing ---

    cdef int _acquire(self) except -1:
        """Take the lock; without the GIL while somebody else has it."""
        cdef int got
        if PyThread_acquire_lock(self.lock, NOWAIT_LOCK):
            return 0
        while True:
            with nogil:
                got = acquire_interruptibly(self.lock, -1, True)
            if got != PY_LOCK_INTR:
                return 0
            PyErr_CheckSignals()

    cdef int _wait(self) except -1:
        """Wait until no call has the table for itself."""
        while self.state & BUSY:
            if self.holder == <unsigned long>PyThread_get_thread_ident():
                raise Busy("table", text="the page table is at work on a call of this thread")
            if self.forks != forks:
                raise Busy("table", text=(
                    "the page table was at work in another thread when this process was forked"))
            self._acquire()
            PyThread_release_lock(self.lock)
        return 0

    cdef int _open(self) except -1:
        """As _wait; raise when it is closed."""
        self._wait()
        if self.state & CLOSED:
            raise InvalidArgument("table", text="the page table is closed")
        return 0

    cdef int _take(self) except -1:
        """Have the table for this call, whoever has the GIL meanwhile."""
        self._wait()
        self._acquire()
        if self.state & (CLOSED | NOT_READY):
            PyThread_release_lock(self.lock)
            raise NoDevice("table", text="the page table was closed meanwhile")
        self.state |= BUSY
        self.holder = <unsigned long>PyThread_get_thread_ident()
        self.forks = forks
        self.pages.memory.ram.users += not self.tree.plain
        return 0

    cdef int _give(self) except -1:
        self.pages.memory.ram.users -= not self.tree.plain
        self.state &= ~BUSY
        PyThread_release_lock(self.lock)
        return 0

    cdef object _failure(self):
        """How an access of this call failed, as an exception, and no longer; or None."""
        return failure_of(&self.access)

    cdef int _check(self) except -1:
        """Raise how an access of this call failed."""
        error = self._failure()
        if error is not None:
            raise error
        return 0

    # --- tables as a whole ---

    cdef int _make_root(self) except -1:
        cdef uint64_t root = self.pages.alloc(self.tree.root_bytes)
        if self.state & NOT_READY:  # a callback of the memory may have been as quick
            self.tree.root = root
            self.tree.table_bytes += self.tree.root_bytes
            self.state &= ~NOT_READY
        else:
            self.pages.free(root, self.tree.root_bytes)
        return 0

    cdef void _give_all(self) noexcept:
        """Give every table back, linked or not, whatever memory holds."""
        cdef Tree* t = &self.tree
        while t.tables:
            table_give(t, t.tables)
        if t.root:
            pages_free(t.pages, t.root, 64 - <unsigned int>clz(t.root_bytes - 1))
        t.root = t.table_bytes = t.mapped = 0
        t.n_notes = 0
        memset(&self.own, 0, sizeof(Batch))
        self._owe()
        self.epoch += 1

    cdef int _end(self, unsigned int state) except -1:
        """Flush everything and give it back."""
        cdef uint64_t epoch = self.epoch
        if self.tree.active and self.tree.root:
            self.flush(0, self.tree.input_last, self.tree.granule, True)
            self._wait()
            if self.epoch != epoch:
                return 0
        self.state |= state
        self._give_all()
        return 0

    def close(self):
        """Give every table back; further calls raise InvalidArgument, but for this one.

        While `active`, the whole address space is flushed first.  An exception of `flush` leaves
        everything as it was.
        """
        self._wait()
        if not self.state & CLOSED:
            self._end(CLOSED)

    @property
    def ready(self):
        """Whether there are tables.

        While there are none, map raises NoDevice, unmap returns 0 and iova_to_phys 0.  Set True
        it makes the first table (OutOfMemory); set False it gives all back, when nothing is
        mapped (Busy).
        """
        return not self.state & (NOT_READY | CLOSED)

    @ready.setter
    def ready(self, value):
        # Whether the root has been made; setting it makes or gives back the root.
        cdef bint ready = flag("ready", value)
        self._open()
        if ready == (not self.state & NOT_READY):
            return
        if ready:
            self._make_root()
            return
        if self.tree.mapped:
            raise Busy("ready", value, text=(
                f"ready cannot be False while {self.tree.mapped:#x} bytes are mapped"))
        self._end(NOT_READY)

    def flush(self, first, last, page_lg2, tables):
        """Invalidate what hardware may have cached; domains override this, here it does nothing.

        Called while `active`, after entries were removed and before tables are given back.

        Parameters
        ----------
        first, last : int
            Input addresses, the last one included.
        page_lg2 : int
            log2 of the size of the pages that were there, the smallest if there were several.
        tables : bool
            Table entries were removed too: what is cached of the tables goes as well.
        """

    cdef void _owe(self) noexcept:
        """Remember whether a flush is owed before anything is mapped."""
        if self.own.page_lg2 or self.own.tables:
            self.state |= OWES
        else:
            self.state &= ~OWES

    cdef int _sync(self, Batch* b) except -1:
        """Flush a batch and give its tables back; if that raises, the batch stays as it is."""
        cdef Batch mine = b[0]
        cdef uint64_t epoch = self.epoch
        if mine.page_lg2 == 0 and mine.tables == 0:
            return 0
        memset(b, 0, sizeof(Batch))
        self._owe()
        if mine.page_lg2 and self.tree.active:
            try:
                self.flush(mine.first, mine.last, mine.page_lg2, bool(mine.unlinked))
            except BaseException:
                if self.epoch == epoch:
                    self._merge(b, &mine)
                    self._owe()
                raise
        if self.epoch == epoch:
            tables_give(&self.tree, mine.tables)
        return 0

    cdef int _sync_surely(self, Batch* b) except -1:
        """The same, at the second try if need be: what was unmapped is not to stay reachable."""
        try:
            self._sync(b)
        except BaseException:
            self._sync(b)
            raise
        return 0

    cdef void _merge(self, Batch* b, const Batch* other) noexcept:
        """Let one batch do the work of another as well."""
        cdef uint32_t each = other.tables
        if other.page_lg2:
            if b.page_lg2:
                b.first, b.last = min(b.first, other.first), max(b.last, other.last)
                b.page_lg2 = min(b.page_lg2, other.page_lg2)
            else:
                b.first, b.last, b.page_lg2 = other.first, other.last, other.page_lg2
        b.unlinked |= other.unlinked
        if each:
            while self.tree.frames[each - 1].next:
                each = self.tree.frames[each - 1].next
            self.tree.frames[each - 1].next = b.tables
            b.tables = other.tables

    cdef object _stray(self, uint64_t iova, const Path* p):
        """The error of a descriptor that leads nowhere."""
        return InputOutput("iova", iova, text=(
            f"iova {iova:#x}: the level {p.level} descriptor {p.d:#x} names "
            f"{address_of(&self.tree, p.d):#x}, which is no table of this page table"))

    # --- map ---

    cdef object _refused(self, uint64_t iova, uint64_t pa, uint64_t size, uint64_t prot):
        """The error of arguments of map, or None."""
        cdef Tree* t = &self.tree
        cdef uint64_t page = t.unaligned + 1
        for name, value in (("iova", iova), ("pa", pa), ("size", size)):
            if value & t.unaligned:
                return InvalidArgument(name, value, f"a multiple of {page:#x}")
        if iova > t.input_last or size and size - 1 > t.input_last - iova:
            return OutOfRange("iova", iova, text=(
                f"iova {iova:#x}, size {size:#x}: beyond {t.input_last:#x}, the last of "
                f"{self.ias} bits"))
        if pa > t.output_last or size and size - 1 > t.output_last - pa:
            return OutOfRange("pa", pa, text=(
                f"pa {pa:#x}, size {size:#x}: beyond {t.output_last:#x}, the last of "
                f"{self.oas} bits"))
        if prot > 63 or not prot & (P_READ | P_WRITE):
            return InvalidArgument("prot", prot, "0 to 0x3f with READ or WRITE among them")
        return None

    cdef int _open_to_map(self) except -1:
        self._open()
        if self.state & NOT_READY:
            raise NoDevice("table", text="the page table is not ready: it has no tables yet")
        if self.state & OWES:
            self._sync(&self.own)  # or hardware would go on to what was mapped there before
            self._wait()
        return 0

    def map(self, iova, pa, size, prot=3):
        """Map a range, by the largest pages that fit; all of it or nothing.

        Parameters
        ----------
        iova, pa, size : int
            Multiples of the smallest page size; 0 bytes map nothing.
        prot : int
            READ, WRITE, CACHE, NOEXEC, MMIO, PRIV; READ or WRITE at least.  At stage 1 WRITE alone
            permits reading, too.

        Raises
        ------
        InvalidArgument
            Not aligned, or neither READ nor WRITE.
        OutOfRange
            Beyond `ias` or `oas`.
        Exists
            Something is mapped within the range.
        OutOfMemory
            No memory is left for a table.
        NoDevice
            Not `ready`.
        InputOutput
            A descriptor on the way names what is no table of this object, or the memory refused.

        Notes
        -----
        An empty table where a block is to be gives way to it, after a flush.
        """
        cdef Tree* t = &self.tree
        cdef uint64_t at = number("iova", iova), to = number("pa", pa), n = number("size", size)
        cdef uint64_t bits = number("prot", prot)
        cdef Segment segment
        if unlikely(self.state):
            self._open_to_map()
        if unlikely((at | to | n) & t.unaligned or at > t.input_last or to > t.output_last
                    or n - 1 > t.input_last - at or n - 1 > t.output_last - to
                    or bits > 63 or not bits & (P_READ | P_WRITE)):
            error = self._refused(at, to, n, bits)
            if error is not None:
                raise error
            return  # 0 bytes
        if likely(t.plain) and map_here(t, at, to, n, t.attributes[bits]):
            return
        segment.pa, segment.size = to, n
        self._map(&segment, 1, at, n, t.attributes[bits])

    def map_sg(self, iova, segments, prot=3):
        """Map pieces of memory one after the other; all of them or none.

        Parameters
        ----------
        iova : int
        segments : iterable of (pa, size)
            Empty pieces are passed over; pieces that continue each other are one.
        prot : int

        Returns
        -------
        int
            Bytes mapped.

        Raises
        ------
        IommuError
            As `map`.
        """
        cdef Tree* t = &self.tree
        cdef uint64_t at = number("iova", iova), bits = number("prot", prot)
        cdef uint64_t to, n, total = 0
        cdef Segment* list_ = NULL
        cdef Segment* grown
        cdef size_t count = 0, capacity = 0
        self._open_to_map()
        try:
            instance("segments", segments, Iterable)
            for piece in segments:
                try:
                    pa, size = piece
                except (TypeError, ValueError):
                    raise InvalidArgument("segments", piece, text=(
                        f"segments has {piece!r}, not a pair of address and size")) from None
                to, n = number("pa", pa), number("size", size)
                error = self._refused(at, to, n, bits)
                if error is not None:
                    raise error
                if n == 0:
                    continue
                if total + n < total or total + n - 1 > t.input_last - at:
                    raise OutOfRange("segments", text=(
                        f"iova {at:#x}: the segments reach beyond {t.input_last:#x}, the last of "
                        f"{self.ias} bits"))
                total += n
                if count and list_[count - 1].pa + list_[count - 1].size == to:
                    list_[count - 1].size += n
                    continue
                if count == capacity:
                    capacity = 2 * capacity + 16
                    grown = <Segment*>realloc(list_, capacity * sizeof(Segment))
                    if grown == NULL:
                        raise MemoryError()
                    list_ = grown
                list_[count].pa, list_[count].size = to, n
                count += 1
            error = self._refused(at, 0, 0, bits)
            if error is not None:
                raise error
            if count:
                self._open_to_map()  # the iterable may have done anything
                self._map(list_, count, at, total, t.attributes[bits])
        finally:
            free(list_)
        return total

    cdef int _map(self, const Segment* segments, size_t count, uint64_t iova, uint64_t size,
                  uint64_t attributes) except -1:
        """Look first, then have the tables, then write."""
        cdef Tree* t = &self.tree
        cdef Plan plan
        cdef int status
        cdef bint held = False
        cdef bint large = t.plain and size >> t.granule >= LARGE
        memset(&plan, 0, sizeof(plan))
        if large or not t.plain:
            self._take()
            held = True
        try:
            while True:
                if large:
                    with nogil:
                        status = plan_segments(t, iova, segments, count, &plan)
                else:
                    status = plan_segments(t, iova, segments, count, &plan)
                if not held and status == DONE and plan.n_conversions:
                    # to be had before the flush; until then it may have changed
                    self._take()
                    held = True
                    free(plan.conversions)
                    memset(&plan, 0, sizeof(plan))
                    continue
                break
            self._check()
            if status == DONE:
                status = allocate(t, &plan)
            self._judge(status, &plan)
            if plan.n_conversions:
                self._convert(&plan)
            if large:
                with nogil:
                    status = write_segments(t, iova, segments, count, attributes, &plan)
            else:
                status = write_segments(t, iova, segments, count, attributes, &plan)
            if status:
                error = self._failure()
                try:
                    self._undo(iova, plan.where)
                finally:
                    if error is not None:
                        raise error
                self._judge(status, &plan)
        finally:
            tables_give(t, plan.tables)
            free(plan.conversions)
            if held:
                self._give()
        return 0

    cdef int _judge(self, int status, const Plan* plan) except -1:
        """Raise what stands in the way of a plan."""
        cdef uint64_t where = plan.where
        if status == TAKEN:
            raise Exists("iova", where, text=f"iova {where:#x} is mapped already")
        if status == STRAY:
            raise self._stray(where, &plan.path)
        if status == NO_PAGES:
            raise OutOfMemory("table", text=(
                f"no memory is left for a table: {plan.n_tables} are needed, "
                f"{self.pages.c.in_use:#x} of {self.pages.c.size:#x} bytes are in use"))
        if status == NO_HOST_MEMORY:
            raise MemoryError()
        if status == CHANGED:
            raise InputOutput("iova", where, text=(
                f"iova {where:#x}: the tables changed while it was being mapped"))
        return 0

    cdef int _convert(self, Plan* plan) except -1:
        """Take empty tables out of the way of blocks; the table is held."""
        cdef Tree* t = &self.tree
        cdef Batch b
        cdef size_t k, done = 0
        cdef Conversion* c
        memset(&b, 0, sizeof(b))
        for k in range(plan.n_conversions):
            c = &plan.conversions[k]
            if refused(t) or put_refused(t, c.entry, 0):
                break
            count_out(t, c.table, c.level, 1)
            batch_cover(t, &b, c.iova, c.iova | low_mask(t.shift[c.level]))
            if not foreign(t, address_of(t, c.d), c.level + 1):
                collect(t, address_of(t, c.d), c.level + 1, &b)
            c.tables = b.tables
            done = k + 1
        try:
            self._check()
            if t.active:
                self.flush(b.first, b.last, b.page_lg2, True)
        except BaseException:
            self._convert_back(plan, done, &b)
            raise
        tables_give(t, b.tables)
        return 0

    cdef void _convert_back(self, Plan* plan, size_t done, Batch* b) noexcept:
        """Put tables back that were taken out; what memory does not take back goes for good."""
        cdef Tree* t = &self.tree
        cdef Batch gone
        cdef Conversion* c
        cdef uint32_t each, end
        cdef bint back
        memset(&gone, 0, sizeof(gone))
        while done:
            done -= 1
            c = &plan.conversions[done]
            back = settle(t, c.entry, c.d)
            if back:
                count_in(t, c.table, c.level, 1)
            else:
                batch_cover(t, &gone, c.iova, c.iova | low_mask(t.shift[c.level]))
                gone.unlinked = True
            end = plan.conversions[done - 1].tables if done else 0
            while b.tables != end:
                each = b.tables
                b.tables = t.frames[each - 1].next
                if back:
                    t.frames[each - 1].owner = t.tag + t.frames[each - 1].level
                else:
                    t.frames[each - 1].next = gone.tables
                    gone.tables = each
        self._merge(&self.own, &gone)
        self._owe()

    cdef int _undo(self, uint64_t iova, uint64_t end) except -1:
        """Take out again what a map wrote below `end`, and flush it: a walk may have met it."""
        cdef Batch b
        memset(&b, 0, sizeof(b))
        undo(&self.tree, iova, end, &b)
        self._merge(&self.own, &b)
        self._owe()
        return self._sync_surely(&self.own)

    # --- unmap ---

    def unmap(self, iova, size, Gather gather=None):
        """Unmap from an address on, up to the first hole.

        A block that is asked for in part goes as a whole if it begins within the range, and stays
        otherwise.  Part of a contiguous run takes the hint from all of its leaves, which are
        absent while the run is flushed.  Tables that the range covers and that hold nothing any
        more go too.

        Parameters
        ----------
        iova, size : int
            Not aligned to the smallest page, or beyond `ias`: nothing is unmapped.
        gather : Gather, optional
            Takes note of what is to be flushed, so that several calls may share a flush.

        Returns
        -------
        int
            Bytes unmapped: less than asked for where there is a hole, more where a block ends
            beyond the range.

        Raises
        ------
        InputOutput
            A descriptor within the range, before the first hole, names what is no table of this
            object; nothing is unmapped.
        InputOutput, Exception
            The memory refused, or what its callback raised: what was unmapped is mapped again.
        Exception
            What `flush` raised, which is called once more then.  What was unmapped stays so.  If
            the second call raises, too, map() flushes first, and tables that were removed are
            given back after a flush that succeeds.
        """
        cdef Tree* t = &self.tree
        cdef uint64_t first = number("iova", iova), n = number("size", size)
        cdef uint64_t at = first, end
        cdef Batch* b = &self.own
        cdef Run run
        cdef Path p
        cdef int status
        cdef bint large
        if unlikely(gather is not None):
            if gather.table is not self:
                raise InvalidArgument("gather", text="the gather is of another page table")
            gather._renew()
            if t.active:
                b = &gather.batch
        if unlikely(self.state):
            self._open()
            if self.state & NOT_READY:
                return 0
        if unlikely((first | n) & t.unaligned or first > t.input_last or n == 0):
            return 0
        end = first + min(n, t.input_last - first + 1)
        large = n >> t.granule >= LARGE
        run.cuts = 0
        run.at = 0
        if (first ^ (end - 1)) >> t.shift[2]:
            self._check_tables(first, end, True)
        if unlikely(not t.plain):
            self._unmap_slow(first, end, &at, b)
        while likely(t.plain):
            if large:
                status = self._remove(first, end, &at, b, &run, NULL)
            else:
                status = remove(t, first, end, &at, b, &run)
            if likely(status <= STOPPED):
                break
            if status == FULL:
                self._sync_surely(b)
            elif status == CUT:
                try:
                    self._break(&run)
                except BaseException:
                    self._sync_surely(&self.own)
                    raise
            elif at == first:
                find(t, at, 3, &p)
                raise self._stray(at, &p)
            else:
                break
            # others may have used it meanwhile
            self._wait()
            if self.state & (NOT_READY | CLOSED):
                return at - first
        if gather is None or not t.active:
            if self.own.page_lg2 or self.own.tables:
                self._sync_surely(&self.own)
        if unlikely(t.n_notes >= KEPT):
            self._wait()
            self._reclaim()
        return at - first

    cdef int _unmap_slow(self, uint64_t first, uint64_t end, uint64_t* at, Batch* b) except -1:
        """The loop of unmap in memory that is not plain: all of it, or nothing.

        Tables are kept until the end, for they may have to be put back.
        """
        cdef Tree* t = &self.tree
        cdef Journal journal
        cdef Run run
        cdef Path p
        cdef uint32_t before = b.tables, kept = 0
        cdef uint64_t epoch = self.epoch
        cdef int status
        memset(&journal, 0, sizeof(journal))
        run.cuts = 0
        run.at = 0
        b.tables = 0
        try:
            while True:
                status = self._remove(first, end, at, b, &run, &journal)
                kept = tables_join(t, b.tables, kept)
                b.tables = 0
                if status == FULL:
                    self._sync_surely(b)
                elif status == CUT:
                    self._break(&run)
                elif status == STRAY and at[0] == first:
                    find(t, first, 3, &p)
                    raise self._stray(first, &p)
                else:
                    break
                # others may have used it meanwhile
                self._wait()
                if self.state & (NOT_READY | CLOSED):
                    break
        except BaseException:
            if self.epoch == epoch:
                if journal.count == 0:
                    kept = 0  # they are where they were
                b.tables = tables_join(t, kept, tables_join(t, b.tables, before))
                kept = before = 0
                if b is &self.own or self.state & OWES:
                    self._sync_surely(&self.own)
            raise
        finally:
            free(journal.taken)
            if self.epoch == epoch:
                b.tables = tables_join(t, kept, tables_join(t, b.tables, before))
        return 0

    cdef int _check_tables(self, uint64_t at, uint64_t end, bint stop) except -1:
        """Raise if a table on the way to a range is none."""
        cdef Tree* t = &self.tree
        cdef Path p
        cdef int status
        if t.plain and (end - at) >> t.granule < LARGE:
            status = all_tables(t, &at, end, stop, &p)
        else:
            self._take()
            try:
                if t.plain:
                    with nogil:
                        status = all_tables(t, &at, end, stop, &p)
                else:
                    status = all_tables(t, &at, end, stop, &p)
                self._check()
            finally:
                self._give()
        if status:
            raise self._stray(at, &p)
        return 0

    cdef int _remove(self, uint64_t first, uint64_t end, uint64_t* at, Batch* b,
                     Run* run, Journal* journal) except -1:
        """Remove with the table held; if that fails, put back all that the journal has."""
        cdef Tree* t = &self.tree
        cdef Batch before = b[0]
        cdef Batch gone
        cdef int status
        error = None
        self._take()
        t.journal = journal
        try:
            if t.plain:
                with nogil:
                    status = remove(t, first, end, at, b, run)
            else:
                status = remove(t, first, end, at, b, run)
            error = self._failure()
            if error is not None:
                memset(&gone, 0, sizeof(gone))
                give_back(t, journal, &gone)
                b[0] = before
                self._merge(&self.own, &gone)
                self._owe()
        finally:
            t.journal = NULL
            self._give()
        if error is not None:
            raise error
        return status

    cdef int _break(self, const Run* run) except -1:
        """Break before make: a run has no leaves while it is flushed, then leaves without hint.

        If that fails it is as it was.  What memory does not take back is unmapped.
        """
        cdef Tree* t = &self.tree
        cdef uint64_t[LONGEST_RUN] kept
        cdef uint64_t i, lost
        self._take()
        try:
            for i in range(run.n):
                kept[i] = get(t, run.entry + 8 * i)
            self._check()
            for i in range(run.n):
                if t.plain:
                    kept[i] = le64(exchange64(t.host + run.entry + 8 * i, 0))
                elif not refused(t):
                    put(t, run.entry + 8 * i, 0)
            try:
                self._check()
                self.flush(run.iova, run.iova + (run.n << run.shift) - 1, run.shift, False)
            except BaseException:
                self._write_run(run, kept, ~<uint64_t>0, False)
                raise
            lost = self._write_run(run, kept, ~PTE_S1_CONTIGUOUS, True)
        finally:
            self._give()
        if lost:
            raise InputOutput("memory", text=(
                f"{REFUSED}; {lost:#x} bytes of the run at {run.iova:#x} are unmapped"))
        return 0

    cdef uint64_t _write_run(self, const Run* run, const uint64_t* kept, uint64_t keep,
                             bint flushed) noexcept:
        """Give a run its leaves back; the bytes of those that memory does not take."""
        cdef Tree* t = &self.tree
        cdef Batch gone
        cdef uint64_t i, lost = 0
        memset(&gone, 0, sizeof(gone))
        for i in range(run.n):
            if settle(t, run.entry + 8 * i, kept[i] & keep) or not kept[i] & PTE_S1_VALID:
                continue
            lost += <uint64_t>1 << run.shift
            count_out(t, run.table, run.level, 1)
            if not flushed:
                batch_cover(t, &gone, run.iova + (i << run.shift),
                            run.iova + (i + 1 << run.shift) - 1)
        t.mapped -= min(t.mapped, lost)
        self._merge(&self.own, &gone)
        self._owe()
        return lost

    cdef int _reclaim(self) except -1:
        """Give the tables back that became empty in pieces."""
        if not self.tree.plain:
            self._take()
        reclaim(&self.tree, &self.own)
        if not self.tree.plain:
            self._give()
        error = self._failure()
        self._sync_surely(&self.own)
        if error is not None and type(error) is not InputOutput:  # or they wait for the next time
            raise error
        return 0

    # --- look-up and dirty state ---

    def iova_to_phys(self, iova):
        """Where an input address goes; 0 where nothing is mapped.

        Raises
        ------
        InputOutput
            A descriptor on the way names what is no table of this object.
        """
        cdef Tree* t = &self.tree
        cdef uint64_t at = number("iova", iova), pa
        cdef int kind
        if unlikely(self.state):
            return self._look_up(at)
        if unlikely(at > t.input_last):
            return 0
        pa = translate(t, at, &kind)
        if likely(kind == KIND_LEAF):
            return pa
        if kind == KIND_FOREIGN:
            return self._look_up(at)
        return 0

    cdef object _look_up(self, uint64_t at):
        """iova_to_phys where that is not simple."""
        cdef Path p
        cdef int kind
        cdef uint64_t pa
        self._open()
        if self.state & NOT_READY or at > self.tree.input_last:
            return 0
        if not self.tree.plain:
            self._take()
        kind = find(&self.tree, at, 3, &p)
        if not self.tree.plain:
            self._give()
            self._check()
        if kind == KIND_FOREIGN:
            raise self._stray(at, &p)
        if kind == KIND_HOLE:
            return 0
        pa = low_mask(self.tree.shift[p.level])
        return address_of(&self.tree, p.d) & ~pa | at & pa

    def read_dirty(self, iova, size, *, clear=True, out=None):
        """Tell which granules were written, by hardware, since they were last made clean.

        A leaf is dirty when it is writable and hardware can track it.  It is so from the start:
        what was just mapped counts as written.

        Parameters
        ----------
        iova, size : int
            Multiples of the granule; at least one.
        clear : bool
            Make clean what was dirty, and flush it while `active`.  A block stays dirty unless all
            of it is in the range.
        out : numpy.ndarray of bool, optional
            Where to put the answer: writable, contiguous, one element for each granule.

        Returns
        -------
        numpy.ndarray of bool
            `out` or a new array, of shape (size / granule,); False where nothing is mapped.

        Raises
        ------
        InvalidArgument
            Stage 2; not aligned, size 0 or beyond `ias`; `out` does not fit.
        NotSupported
            The table was made without dirty.
        InputOutput
            A descriptor within the range names what is no table of this object, or the memory
            refused: what was dirty is so still.
        Exception
            What `flush` raised; what was dirty is clean then, and `out` says what was.
        """
        cdef Tree* t = &self.tree
        cdef uint64_t first = number("iova", iova), n = number("size", size)
        cdef cnp.npy_intp count
        cdef uint8_t* data
        cdef Dirty cleared
        cdef bint clean = flag("clear", clear)
        memset(&cleared, 0, sizeof(cleared))
        self._open()
        if self.stage != 1:
            raise InvalidArgument("stage", self.stage, text="dirty is tracked by stage 1 only")
        if not self.dirty:
            raise NotSupported("dirty", text="the page table was made without dirty")
        if n == 0 or (first | n) & low_mask(t.granule):
            raise InvalidArgument("size", size, text=in_words(
                "iova, size", f"multiples of {1 << t.granule:#x}, and size one at least",
                f"{first:#x}, {n:#x}"))
        if first > t.input_last or n - 1 > t.input_last - first:
            raise InvalidArgument("iova", iova, text=(
                f"iova {first:#x}, size {n:#x}: beyond {t.input_last:#x}, the last of "
                f"{self.ias} bits"))
        count = n >> t.granule
        if out is None:
            out = cnp.PyArray_EMPTY(1, &count, cnp.NPY_BOOL, 0)
        elif (not cnp.PyArray_Check(out) or cnp.PyArray_TYPE(out) != cnp.NPY_BOOL
                or not cnp.PyArray_ISCARRAY(out) or cnp.PyArray_NDIM(out) != 1
                or cnp.PyArray_DIM(out, 0) != count):
            raise InvalidArgument("out", text=(
                f"out must be a writable, contiguous numpy array of bool of shape ({count},)"))
        data = <uint8_t*>cnp.PyArray_DATA(out)
        if self.state & NOT_READY:
            memset(data, 0, count)
            return out
        self._check_tables(first, first + n, False)
        self._take()
        try:
            if t.plain and count >= LARGE:
                with nogil:
                    read_dirty_bits(t, first, first + n, clean, data, &cleared)
            else:
                read_dirty_bits(t, first, first + n, clean, data, &cleared)
            error = self._failure()
            if error is not None:
                if clean:
                    dirty_again(t, first, first + n, data)
                raise error
        finally:
            self._give()
        if cleared.page_lg2 and t.active:
            self.flush(cleared.first, cleared.last, cleared.page_lg2, False)
        return out

    # --- copies, which go with their memory and their pages ---

    def _contents(self):
        """What a copy needs beside the memory: arguments of the constructor, and tables.

        Raises
        ------
        Busy
            A flush failed and is still due.
        """
        cdef Tree* t = &self.tree
        cdef Frame* frame
        cdef uint32_t i = t.tables
        cdef uint64_t sizes = 0
        cdef int k
        cdef list tables = []
        self._wait()
        if self.own.page_lg2 or self.own.tables:
            raise Busy("table", text="an invalidation of the page table failed, and is still due")
        for k in range(t.start, 4):
            if t.used >> k & 1:
                sizes |= <uint64_t>1 << t.shift[k]
        while i:
            frame = &t.frames[i - 1]
            tables.append((i - 1, frame.owner - t.tag, frame.entries, frame.level, frame.noted))
            i = frame.after
        shape = {
            "stage": self.stage, "granule": 1 << t.granule, "ias": self.ias, "oas": self.oas,
            "contiguous": bool(self.contiguous), "dirty": bool(self.dirty),
            "coherent": bool(self.coherent), "fwb": bool(self.fwb), "page_sizes": sizes,
        }
        notes = []
        for k in range(t.n_notes):
            notes.append((t.notes[k].iova, t.notes[k].level))
        return shape, (bool(self.state & CLOSED), bool(self.state & NOT_READY), bool(t.active),
                       t.root, t.mapped, t.table_bytes, tables, notes)

    def _is_block(self, uint64_t address, uint64_t size):
        """Whether the pages have handed out this block."""
        cdef PagesC* p = self.tree.pages
        cdef int lg2
        if p == NULL or size < 64 or size > p.size:
            return False
        lg2 = 64 - clz(size - 1)
        return (p.base <= address < p.base + p.size and not (address - p.origin) & low_mask(lg2)
                and bit_of(p.orders[lg2 - SMALLEST_LG2].taken, (address - p.origin) >> lg2))

    def _restore(self, contents):
        """Take over the tables that `_contents` told of; the pages have their blocks already."""
        cdef Tree* t = &self.tree
        cdef Frame* frame
        cdef uint32_t i
        cdef int k
        closed, not_ready, active, root, mapped, table_bytes, tables, notes = contents
        if root and not self._is_block(root, t.root_bytes):
            raise InvalidArgument("contents", root, "tables in blocks that are handed out")
        if len(notes) > NOTES:
            raise InvalidArgument("contents", notes, f"{NOTES} notes")
        for _, level in notes:
            if not 0 <= level < 4:
                raise InvalidArgument("contents", level, "notes of levels 0 to 3")
        for i, owner, _entries, level, _noted in tables:
            if (not self._is_block(t.origin + (<uint64_t>i << FRAME_LG2), 1 << t.granule)
                    or t.frames[i].owner or owner > UNLINKED or level > UNLINKED):
                raise InvalidArgument("contents", i, "tables in blocks that are handed out")
        if closed:
            self.state |= CLOSED
        if not not_ready:
            self.state &= ~NOT_READY
        t.active, t.root, t.mapped, t.table_bytes = active, root, mapped, table_bytes
        for i, owner, entries, level, noted in reversed(tables):
            frame = &t.frames[i]
            frame.owner = t.tag + <uint32_t>owner
            frame.entries, frame.level, frame.noted = entries, level, noted
            frame.before = frame.next = 0
            frame.after = t.tables
            if t.tables:
                t.frames[t.tables - 1].before = i + 1
            t.tables = i + 1
        for k in range(len(notes)):
            t.notes[k].iova, t.notes[k].level = notes[k]
        t.n_notes = <int>len(notes)

    # --- what an STE or CD says of it ---

    @property
    def active(self):
        """Whether hardware may have cached what the tables hold."""
        return bool(self.tree.active)

    @active.setter
    def active(self, value):
        cdef bint active = flag("active", value)
        self._wait()
        self.tree.active = active

    @property
    def root(self):
        """Address of the first table: TTB0 or S2TTB; 0 while there is none."""
        return self.tree.root

    @property
    def start_level(self):
        """Level of the first table, 0 to 3."""
        return self.tree.start

    @property
    def granule(self):
        """Size of the smallest page of the format in bytes."""
        return 1 << self.tree.granule

    @property
    def page_sizes(self):
        """Page sizes that map() uses, as a bitmap."""
        cdef uint64_t sizes = 0
        cdef int level
        for level in range(4):
            if self.tree.used >> level & 1:
                sizes |= <uint64_t>1 << self.tree.shift[level]
        return sizes

    @property
    def t0sz(self):
        """CD.T0SZ or STE.S2T0SZ."""
        return 64 - self.ias

    @property
    def tg(self):
        """CD.TG0 or STE.S2TG."""
        return TG[self.tree.granule]

    @property
    def sl0(self):
        """STE.S2SL0; 0 for stage 1, which has no such field."""
        if self.stage == 1:
            return 0
        return (2 if self.tree.granule == 12 else 3) - self.tree.start

    @property
    def ps(self):
        """CD.IPS or STE.S2PS."""
        return SIZES.index(self.oas)

    @property
    def mair(self):
        """CD.MAIR: non-cacheable, write-back, Device-nGnRE, inner non-cacheable; 0 for stage 2."""
        return 0xF404_FF44 if self.stage == 1 else 0

    @property
    def irgn(self):
        """CD.IR0 or STE.S2IR0."""
        return 1 if self.coherent else 0

    @property
    def orgn(self):
        """CD.OR0 or STE.S2OR0."""
        return 1 if self.coherent else 0

    @property
    def sh(self):
        """CD.SH0 or STE.S2SH0."""
        return 3 if self.coherent else 2

    @property
    def mapped(self):
        """Bytes that map mapped and unmap has not unmapped."""
        return self.tree.mapped

    @property
    def table_bytes(self):
        """Bytes of all tables, those included that wait for a flush."""
        return self.tree.table_bytes


include "tables_gather.pxi"
