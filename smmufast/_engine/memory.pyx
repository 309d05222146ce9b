# cython: binding=False, embedsignature=True, embedsignature.format=clinic
"""Memory: the host's physical memory, as regions that the SMMU reads in place."""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_CheckBuffer,
    PyObject_GetBuffer,
)
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_FromStringAndSize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.number cimport PyNumber_Index
from cpython.pycapsule cimport PyCapsule_CheckExact, PyCapsule_GetPointer, PyCapsule_IsValid
from cpython.ref cimport Py_DECREF
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memmove, memset

from smmufast._engine.host cimport MADV_HUGEPAGE, MAP_FAILED, madvise, map_zeros, munmap
from smmufast._facts.types cimport FETCH_NONE, NO_LEVEL, CallbacksC

from collections import namedtuple
from pickle import PickleBuffer

from smmufast._arguments import either, in_words, must_be
from smmufast.faults import ACCESS_KINDS, ExternalAbort

cdef extern from *:
    """
    #define smmufast_add_fetch(p, v) __atomic_add_fetch((p), (v), __ATOMIC_RELAXED)
    #define smmufast_load_ptr(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define smmufast_install(p, e, v) __atomic_compare_exchange_n( \
        (p), (e), (v), 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)
    #define smmufast_swap(p, e, d) __atomic_compare_exchange_n( \
        (uint64_t *)(p), (e), (d), 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)
    """
    int64_t add_fetch "smmufast_add_fetch"(int64_t* p, int64_t v) noexcept nogil
    uint8_t* load_chunk "smmufast_load_ptr"(uint8_t** p) noexcept nogil
    uint8_t** load_leaf "smmufast_load_ptr"(uint8_t*** p) noexcept nogil
    # put a pointer where there is none; false: `found` is the one that is there
    bint install_chunk "smmufast_install"(
        uint8_t** p, uint8_t** found, uint8_t* v) noexcept nogil
    bint install_leaf "smmufast_install"(
        uint8_t*** p, uint8_t*** found, uint8_t** v) noexcept nogil
    bint swap_atomic "smmufast_swap"(
        uint8_t* p, uint64_t* expected, uint64_t desired) noexcept nogil


cdef enum:
    CHUNK_LG2 = 24       # 16 MiB
    CHUNK_TABLE_LG2 = 14  # two tables of 2^14: 2^52 bytes
    COPIED = 1 << 22     # bytes that are copied before signals are looked for

cdef uint64_t ONE_MAP_MAX = <uint64_t>1 << 46  # the largest map that a host grants
cdef str SPARSE = "sparse"  # private memory in pieces, where a saved state has huge_pages
cdef int64_t MOST_FETCHES = 0x7FFFFFFFFFFFFFFF

MemoryRegion = namedtuple("MemoryRegion", "base size kind readonly", module="smmufast")
MemoryRegion.__doc__ = """One region: base and size in bytes, kind (a word), readonly."""

cdef tuple REGION_KINDS = ("buffer", "private", "private", "callback", "callback")


# --- no callback while a lock is held ---

cdef extern from *:
    """
    /* What this thread has for itself, and how many calls of the host it is in. */
    static __thread pthread_mutex_t *smmufast_had;
    static __thread int smmufast_inside;
    #define smmufast_had_set(mutex) (smmufast_had = (mutex))
    #define smmufast_inside_add(n) (smmufast_inside += (n))

    /* Wait for a mutex, without the GIL if this thread has that. */
    static void smmufast_mutex_wait(pthread_mutex_t *mutex)
    {
        PyThreadState *state = PyGILState_Check() ? PyEval_SaveThread() : NULL;
        pthread_mutex_lock(mutex);
        if (state)
            PyEval_RestoreThread(state);
    }
    """
    Mutex* mutex_had "smmufast_had"
    int inside "smmufast_inside"
    void had_set "smmufast_had_set"(Mutex* mutex) noexcept nogil
    void inside_add "smmufast_inside_add"(int n) noexcept nogil
    void mutex_wait "smmufast_mutex_wait"(Mutex* mutex) noexcept nogil
    bint mutex_busy "pthread_mutex_trylock"(Mutex* mutex) noexcept nogil
    void mutex_take "pthread_mutex_lock"(Mutex* mutex) noexcept nogil
    void mutex_give "pthread_mutex_unlock"(Mutex* mutex) noexcept nogil


cdef void mutex_have(Mutex* mutex) noexcept nogil:
    """Have a mutex for this thread, which has none and has not the GIL."""
    mutex_take(mutex)
    had_set(mutex)


cdef void mutex_have_gil(Mutex* mutex) noexcept:
    """The same with the GIL, which is given up while somebody else has the mutex."""
    if mutex_busy(mutex):
        mutex_wait(mutex)
    had_set(mutex)


cdef void mutex_drop(Mutex* mutex) noexcept nogil:
    had_set(NULL)
    mutex_give(mutex)


cdef Mutex* aside() noexcept nogil:
    """The host is to be called: let go of the mutex of this thread, and return it, or NULL."""
    cdef Mutex* had = mutex_had
    inside_add(1)
    if had != NULL:
        mutex_drop(had)
    return had


cdef void resume(Mutex* had) noexcept nogil:
    """The host has returned: have the mutex again that aside() let go of."""
    inside_add(-1)
    if had != NULL:
        if mutex_busy(had):
            mutex_wait(had)
        had_set(had)


cdef int callbacks_inside() noexcept nogil:
    return inside


cdef int look_for_signals() except -1:
    """Let signal handlers run; what they raise is raised."""
    cdef Mutex* had = aside()
    try:
        PyErr_CheckSignals()
    finally:
        resume(had)
    return 0


include "memory_access.pxi"


# --- the owner ---

cdef enum:
    PAGE = 4096
    GAP = 16 * PAGE      # zeros that are kept rather than begin another run


cdef bint zeros(const uint8_t* data, uint64_t n) noexcept nogil:
    """Whether n bytes are all zero; `data` is aligned."""
    cdef const uint64_t* words = <const uint64_t*>data
    cdef uint64_t i, found = 0
    for i in range(n >> 3):
        found |= words[i]
    for i in range(n & ~<uint64_t>7, n):
        found |= data[i]
    return found == 0


cdef inline str span_text(uint64_t base, uint64_t last):
    return f"[{base:#x}, {last:#x}]"


@cython.final
@cython.auto_pickle(False)
cdef class Memory:
    """Memory()\n--\n
    Physical memory: a sorted set of regions that do not overlap.

    Regions are the host's own buffers, read and written in place; private memory that costs
    only what is touched; and callbacks.  A read outside every region is an external abort.
    Addresses and sizes are in bytes; a base is a multiple of 8.  While a batch translation
    runs in another thread, and inside a callback of a Python face, changing the set of regions
    raises BufferError.

    >>> memory = Memory()
    >>> memory.add(bytearray(4096), 0x4000_0000)
    >>> memory.write_u64(0x4000_0008, 0x1122)
    >>> memory.read(0x4000_0008, 2)
    b'"\\x11'
    """

    def __cinit__(self):
        self.ram.plain = True
        window_shut(&self.ram.window)
        self._callables = {}

    def __init__(self):
        pass  # takes no arguments: __cinit__ alone would ignore them

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.ram.n_regions):
            region_close(&self.ram.regions[i])
        free(self.ram.regions)
        free(self.ram.injections)

    cdef int _check_idle(self) except -1:
        if self.ram.users:
            raise BufferError("memory is in use by a running translation; regions cannot change")
        return 0

    cdef void _refresh(self) noexcept:
        cdef Py_ssize_t i
        window_shut(&self.ram.window)
        self.ram.plain = self.ram.n_injections == 0
        for i in range(self.ram.n_regions):
            if self.ram.regions[i].kind >= REGION_C:
                self.ram.plain = False

    cdef Region* _insert(self, uint64_t base, uint64_t size) except NULL:
        """Make room for a region and return it cleared but for its bounds."""
        cdef Ram* ram = &self.ram
        cdef uint64_t last = base + (size - 1)
        cdef Py_ssize_t i = 0
        cdef Region* regions
        self._check_idle()
        if base & 7:
            raise ValueError(in_words("base", "a multiple of 8", f"{base:#x}"))
        if size == 0:
            raise ValueError(must_be("size", "1 byte or more", size))
        if last < base:
            raise ValueError(must_be("size", f"1 to {bytes_from('base', base)}", size))
        while i < ram.n_regions and ram.regions[i].last < base:
            i += 1
        if i < ram.n_regions and ram.regions[i].base <= last:
            raise ValueError(
                f"base: {span_text(base, last)} overlaps the region "
                f"{span_text(ram.regions[i].base, ram.regions[i].last)}")
        regions = <Region*>realloc(ram.regions, (ram.n_regions + 1) * sizeof(Region))
        if regions == NULL:
            raise MemoryError()
        ram.regions = regions
        memmove(&regions[i + 1], &regions[i], (ram.n_regions - i) * sizeof(Region))
        memset(&regions[i], 0, sizeof(Region))
        ram.n_regions += 1
        regions[i].base = base
        regions[i].last = last
        return &regions[i]

    cdef void _remove(self, Region* region) noexcept:
        """Take a region out of the list."""
        cdef Ram* ram = &self.ram
        ram.n_regions -= 1
        memmove(region, region + 1,
                (ram.n_regions - (region - ram.regions)) * sizeof(Region))
        self._refresh()

    def add(self, buffer, base, *, readonly=None):
        """Add a region over any object with the buffer protocol, without copying.

        Parameters
        ----------
        buffer : bytes-like, C-contiguous
            Its bytes are the region's; it stays exported until the region is removed.
        base : int
            Physical address of the first byte, a multiple of 8.
        readonly : bool, optional
            Refuse writes; by default as the buffer itself is.

        Raises
        ------
        ValueError
            The region overlaps another, wraps around, is empty or its base is unaligned.
        TypeError, BufferError
            The object has no C-contiguous buffer, or readonly=False and it is read-only.
        """
        cdef Py_buffer view
        cdef Region* region
        cdef uint64_t address = to_address("base", base)
        cdef bint sealed = readonly is not None and to_flag("readonly", readonly)
        if not PyObject_CheckBuffer(buffer):
            raise TypeError(must_be("buffer", "an object with the buffer protocol", type(buffer)))
        if readonly is None:
            sealed = memoryview(buffer).readonly
        try:
            PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE if sealed else PyBUF_WRITABLE)
        except (BufferError, ValueError) as error:
            raise BufferError(in_words(
                "buffer", f"C-contiguous{'' if sealed else ', writable'} bytes",
                f"this one: {error}")) from None
        try:
            if view.len == 0:
                raise ValueError(must_be("buffer", "1 byte or more", view.len))
            if address + (<uint64_t>view.len - 1) < address:
                raise ValueError(must_be(
                    "buffer", f"1 to {bytes_from('base', address)}", view.len))
            region = self._insert(address, <uint64_t>view.len)
        except BaseException:
            PyBuffer_Release(&view)
            raise
        region.kind = REGION_BUFFER
        region.writable = not sealed
        region.data = <uint8_t*>view.buf
        region.view = view

    def add_private(self, base=0, size=1 << 52, *, huge_pages=False, sparse=False):
        """Add private memory that reads as zero until written and costs what is touched.

        Its addresses are reserved in the host, up to 2^46 bytes if the host grants them; else it
        is made of pieces of 16 MiB as it is written.  The host leaves it out of core dumps.

        Parameters
        ----------
        base, size : int
            In bytes; by default the whole 52-bit space.
        huge_pages : bool
            Ask the host to back it by huge pages: faster for dense tables, wasteful for
            scattered ones.  Without effect where it is made of pieces.
        sparse : bool
            Make it of pieces whatever its size: nothing is reserved, but page tables and
            queues in it are slower.
        """
        cdef uint64_t address = to_address("base", base)
        cdef uint64_t length = to_address("size", size)
        cdef bint huge = to_flag("huge_pages", huge_pages)
        cdef bint pieces = to_flag("sparse", sparse)
        cdef Region* region
        cdef void* data = MAP_FAILED
        cdef uint8_t*** chunks = NULL
        cdef uint8_t* touched = NULL
        if length > <uint64_t>1 << 52:
            raise ValueError(must_be("size", "1 to 2^52 bytes of private memory", length))
        if 0 < length <= ONE_MAP_MAX and not pieces:
            data = map_zeros(length)
        if data == MAP_FAILED:
            chunks = <uint8_t***>calloc(1 << CHUNK_TABLE_LG2, sizeof(uint8_t**))
            if chunks == NULL:
                raise MemoryError()
        else:
            touched = <uint8_t*>calloc((length - 1 >> TOUCHED_LG2) + 1, 1)
            if touched == NULL:
                munmap(data, length)
                raise MemoryError()
            if huge:
                madvise(data, length, MADV_HUGEPAGE)
        try:
            region = self._insert(address, length)
        except BaseException:
            free(chunks)
            free(touched)
            if data != MAP_FAILED:
                munmap(data, length)
            raise
        region.writable = True
        region.chunks = chunks
        region.touched = touched
        region.huge_pages = huge
        region.kind = REGION_CHUNKED if chunks != NULL else REGION_PRIVATE
        region.data = NULL if chunks != NULL else <uint8_t*>data

    def add_callback(self, base, size, read, write=None, swap=None):
        """Add a region whose accesses the host performs itself.

        Parameters
        ----------
        base, size : int
            In bytes.
        read : callable or capsule
            ``read(address, n)`` returns n bytes, or None for an external abort.  Or a capsule
            named ``smmufast.callbacks2`` over a ``smmufast_callbacks`` struct (smmufast.h),
            which is copied; its functions are called with or without the global lock and must
            not wait for it.
        write : callable, optional
            ``write(address, data)`` returns True when done, None for an external abort.
            Without it the region is read-only.
        swap : callable, optional
            ``swap(address, expected, desired)``, the last two of 8 bytes, stores `desired` if
            `expected` is there, as one atomic step, and returns the 8 bytes that were there;
            None for an external abort.  Without it a hardware update of a descriptor is a read
            and a write.

        An exception that a callable raises ends the translation and reaches its caller.
        """
        cdef CallbacksC callbacks
        cdef Region* region
        cdef uint64_t address = to_address("base", base)
        cdef uint64_t length = to_address("size", size)
        cdef bint capsule = PyCapsule_CheckExact(read)
        if capsule:
            if not PyCapsule_IsValid(read, "smmufast.callbacks2"):
                raise ValueError(must_be("read", "a capsule called 'smmufast.callbacks2'", read))
            if write is not None or swap is not None:
                raise TypeError(must_be(
                    "swap" if write is None else "write",
                    "None beside a capsule, which holds all functions",
                    type(swap if write is None else write)))
            callbacks = (<CallbacksC*>PyCapsule_GetPointer(read, "smmufast.callbacks2"))[0]
            if callbacks.read == NULL:
                raise ValueError("read: the capsule's read function is NULL")
        else:
            if not callable(read):
                raise TypeError(must_be("read", "a callable or a capsule", type(read)))
            if write is not None and not callable(write):
                raise TypeError(must_be("write", "a callable or None", type(write)))
            if swap is not None and (write is None or not callable(swap)):
                raise TypeError(must_be(
                    "swap", "None without write" if write is None else "a callable or None",
                    type(swap)))
        # before the region is there: what is allocated may run finalizers, which may add regions
        key, owned = address, (read, write, swap)
        region = self._insert(address, length)
        try:
            self._callables[key] = owned
        except MemoryError:
            self._remove(region)
            raise
        if capsule:
            region.kind = REGION_C
            region.callbacks = callbacks
            region.writable = callbacks.write != NULL
        else:
            region.kind = REGION_PYTHON
            region.reader = <void*>read
            region.writer = <void*>write
            region.writable = write is not None
            region.swapper = NULL if swap is None else <void*>swap
        self._refresh()

    def remove(self, base):
        """Remove the region that starts at `base`; KeyError if there is none.

        BufferError while buffers of a pickle, out of band, refer to the bytes of this memory.
        """
        cdef uint64_t address = to_address("base", base)
        cdef Region* region = find_region(&self.ram, address)
        cdef Region old
        key = address
        self._check_idle()
        if region == NULL or region.base != address:
            raise KeyError(in_words("base", "that of a region", f"{address:#x}"))
        if self.exports:
            raise BufferError(f"base {address:#x}: {self.exports} buffers of a pickle "
                              "refer to this memory")
        old = region[0]
        self._remove(region)
        region_close(&old)
        self._callables.pop(key, None)  # last, for finalizers may run

    @property
    def regions(self):
        """The regions in ascending order, as MemoryRegion(base, size, kind, readonly) tuples."""
        cdef Py_ssize_t i
        cdef list found = []
        for i in range(self.ram.n_regions):
            region = self.ram.regions[i]
            found.append(MemoryRegion(region.base, region.last - region.base + 1,
                                      REGION_KINDS[region.kind], not region.writable))
        return found

    def read(self, address, size):
        """Read `size` bytes, across regions if need be.  ExternalAbort where there is none."""
        cdef uint64_t where = to_address("address", address)
        cdef uint64_t n = to_address("size", size)
        cdef Port port
        cdef int status
        cdef Region* region
        cdef uint64_t at = where, rest = n, part
        # an absurd size is an abort, not a huge allocation
        while rest:
            region = find_region(&self.ram, at)
            if region == NULL or where + (n - 1) < where:
                raise ExternalAbort(f"address {at:#x}: no region there")
            part = region.last - at
            if part >= rest - 1:
                break
            rest -= part + 1
            at = region.last + 1
        if n > <uint64_t>1 << 62:
            raise MemoryError()
        data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>n)
        port.ram = &self.ram
        port.exception = NULL
        self.ram.users += 1
        status = port_read(&port, ACCESS_HOST, where, PyBytes_AS_STRING(data), n)
        self.ram.users -= 1
        if status == FETCH_RAISED:
            raise_port(&port)
        if status:
            raise ExternalAbort(f"address {where:#x}: a callback refused to read {n} bytes")
        return data

    def fetch(self, address, size, *, kind=None, level=None):
        """Read as the SMMU would, injected errors included: for a host that serves a `Walk`.

        >>> memory = Memory()
        >>> memory.add(bytearray(64), 0x1000)
        >>> number = memory.inject_error(address=0x1008)
        >>> memory.fetch(0x1000, 8), memory.read(0x1008, 8)
        (b'\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00', b'\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00')
        >>> memory.fetch(0x1008, 8)
        Traceback (most recent call last):
        smmufast.faults.ExternalAbort: address 0x1008: an injected error

        Parameters
        ----------
        address, size : int
            In bytes.
        kind, level : str, int, optional
            As `Fetch` has them: an error of a kind or a level hits what is of it.  Without a kind,
            errors of one kind do not hit.

        Raises
        ------
        ExternalAbort
            An injected error hits it, a region is missing, or a callback refuses.
        """
        cdef uint64_t where = to_address("address", address)
        cdef uint64_t n = to_address("size", size)
        cdef int number = FETCH_NONE if kind is None else kind_number(kind)
        cdef int at = NO_LEVEL if level is None else level_number(level, kind)
        if n and injected(&self.ram, number, at, where, n):
            raise ExternalAbort(f"address {where:#x}: an injected error")
        return self.read(where, n)

    def write(self, address, data):
        """Write bytes, across regions if need be.

        Nothing is written unless every byte lies in a writable region: ExternalAbort where
        there is no region, PermissionError where it is read-only.
        """
        cdef uint64_t where = to_address("address", address)
        cdef uint64_t n, at, rest, part
        cdef Py_buffer view
        cdef const uint8_t* source
        cdef uint8_t* target
        cdef Region* region
        cdef Port port
        cdef int dry, status
        if not PyObject_CheckBuffer(data):
            raise TypeError(must_be("data", "bytes", type(data)))
        try:
            PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        except (BufferError, ValueError) as error:
            raise BufferError(in_words(
                "data", "C-contiguous bytes", f"these: {error}")) from None
        self.ram.users += 1
        try:
            n = view.len
            if n and where + (n - 1) < where:
                raise ExternalAbort(f"address {where:#x}: {n} bytes would wrap around 2^64")
            for dry in (1, 0):
                at, rest, source = where, n, <const uint8_t*>view.buf
                while rest:
                    region = find_region(&self.ram, at)
                    if region == NULL:
                        raise ExternalAbort(f"address {at:#x}: no region there")
                    if not region.writable:
                        raise PermissionError(
                            f"address {at:#x}: the region "
                            f"{span_text(region.base, region.last)} is read-only")
                    part = piece_size(region, at, rest)
                    if region.kind == REGION_CHUNKED:
                        target = make_chunk(region, at - region.base)
                        if target == NULL:
                            raise MemoryError()
                        target += at - region.base & ((1 << CHUNK_LG2) - 1)
                    else:
                        target = region.data + (at - region.base)
                    if dry:
                        pass
                    elif region.kind >= REGION_C:
                        port_open(&port, &self.ram, NULL)
                        status = write_piece(&port, region, at, source, part)
                        if status == FETCH_RAISED:
                            raise_port(&port)
                        if status:
                            raise ExternalAbort(
                                f"address {at:#x}: the write callback refused {part} bytes")
                    else:
                        touch(region, at - region.base, part)
                        memmove(target, source, part)
                    at += part
                    source += part
                    rest -= part
        finally:
            self.ram.users -= 1
            PyBuffer_Release(&view)

    def read_u64(self, address, *, big_endian=False):
        """Read eight bytes as a number, little-endian unless told."""
        return int.from_bytes(self.read(address, 8), "big" if big_endian else "little")

    def write_u64(self, address, value, *, big_endian=False):
        """Write a number of eight bytes, little-endian unless told."""
        number = int(to_address("value", value))
        self.write(address, number.to_bytes(8, "big" if big_endian else "little"))

    def inject_error(self, *, address=None, size=None, kind=None, level=None, nth=None, count=None):
        """Make accesses of the SMMU end in an external abort; those of the host are not affected.

        An access matches when it touches [address, address + size), is of the kind and, for
        translation tables, of the level; what is not given matches all.  Fetches of a walk and
        updates of descriptors match, and so do the fetch of a command ("CMD"), the writing of an
        event or of a page request into its queue ("EVENT", "PRI"), and an MSI.  `fetch` does too.

        Parameters
        ----------
        address, size : int, optional
            In bytes; the size is 8 unless given.
        kind : {"L1STD", "STE", "L1CD", "CD", "TT", "S2TT", "TT update", "S2TT update", "CMD", \
                "EVENT", "PRI", "MSI"}, optional
        level : int, optional
            -1 to 3.
        nth : int, optional
            The first matching access that fails, counted from 1 now; by default the first.
        count : int, optional
            How many fail from there on: by default one if nth is given, else all.

        Returns
        -------
        int
            A number that no other error of this Memory has had, for `remove_error`.
        """
        cdef Injection injection
        self._check_idle()
        memset(&injection, 0, sizeof(Injection))
        injection.last = 0xFFFFFFFFFFFFFFFFULL
        if address is not None:
            injection.first = to_address("address", address)
            length = 8 if size is None else to_address("size", size)
            if length == 0 or length - 1 > 0xFFFFFFFFFFFFFFFF - injection.first:
                raise ValueError(must_be(
                    "size", f"1 to {bytes_from('address', injection.first)}", length))
            injection.last = injection.first + (length - 1)
        elif size is not None:
            raise ValueError(must_be("size", "None without address", size))
        injection.kind = FETCH_NONE
        if kind is not None:
            injection.kind = kind_number(kind)
        injection.level = NO_LEVEL
        if level is not None:
            injection.level = level_number(level, kind)
        injection.nth = 1
        injection.count = MOST_FETCHES if nth is None else 1
        if nth is not None:
            if not 1 <= to_integer("nth", nth) <= MOST_FETCHES:
                raise ValueError(must_be("nth", "1 to 2^63 - 1", nth))
            injection.nth = nth
        if count is not None:
            if not 1 <= to_integer("count", count) <= MOST_FETCHES:
                raise ValueError(must_be("count", "1 to 2^63 - 1", count))
            injection.count = count
        injection.number = self._injected + 1
        self._inject(&injection)
        return injection.number

    def remove_error(self, number):
        """Remove one injected error, by the number that `inject_error` returned.

        Raises
        ------
        ValueError
            There is none of that number, or no longer.
        """
        cdef Py_ssize_t i
        self._check_idle()
        wanted = to_integer("number", number)
        for i in range(self.ram.n_injections):
            if self.ram.injections[i].number == wanted:
                self.ram.n_injections -= 1
                memmove(&self.ram.injections[i], &self.ram.injections[i + 1],
                        (self.ram.n_injections - i) * sizeof(Injection))
                self._refresh()
                return
        raise ValueError(must_be("number", "that of an injected error", wanted))

    def clear_errors(self):
        """Remove every injected error."""
        self._check_idle()
        self.ram.n_injections = 0
        self._refresh()

    cdef int _inject(self, const Injection* injection) except -1:
        """Append an injected error."""
        cdef Injection* grown = <Injection*>realloc(
            self.ram.injections, (self.ram.n_injections + 1) * sizeof(Injection))
        if grown == NULL:
            raise MemoryError()
        self.ram.injections = grown
        grown[self.ram.n_injections] = injection[0]
        self._injected = max(self._injected, injection.number)
        self.ram.n_injections += 1
        self._refresh()
        return 0

    # --- copies and pickles ---

    cdef object _span(self, uint8_t* data, uint64_t size, bint readonly):
        """A view of bytes of a region, which lives until the view is released."""
        cdef _Span span = _Span.__new__(_Span)
        span.memory = self
        span.data = data
        span.size = <Py_ssize_t>size
        span.readonly = readonly
        return PickleBuffer(span)

    cdef int _pages(self, uint8_t* data, uint64_t size, uint64_t offset, list found) except -1:
        """Append (offset, view) of each run of pages that hold anything."""
        cdef uint64_t at = 0, end = 0, start = 0, n
        while at < size:
            n = min(size - at, <uint64_t>PAGE)
            if not zeros(data + at, n):
                if end and at - end > GAP:
                    found.append((offset + start, self._span(data + start, end - start, True)))
                    end = 0
                if end == 0:
                    start = at
                end = at + n
            at += n
        if end:
            found.append((offset + start, self._span(data + start, end - start, True)))
        return 0

    cdef list _private(self, Region* region):
        """The contents of private memory, without pages that read as zero."""
        cdef uint64_t size = region.last - region.base + 1
        cdef uint64_t at, n, i, j
        cdef list found = []
        if region.kind == REGION_PRIVATE:
            for i in range((size - 1 >> TOUCHED_LG2) + 1):
                if region.touched[i]:
                    look_for_signals()
                    at = i << TOUCHED_LG2
                    n = min(size - at, <uint64_t>1 << TOUCHED_LG2)
                    self._pages(region.data + at, n, at, found)
            return found
        for i in range(<uint64_t>1 << CHUNK_TABLE_LG2):
            if region.chunks[i] == NULL:
                continue
            for j in range(<uint64_t>1 << CHUNK_TABLE_LG2):
                if region.chunks[i][j] != NULL:
                    look_for_signals()
                    at = (i << CHUNK_TABLE_LG2 | j) << CHUNK_LG2
                    n = min(size - at, <uint64_t>1 << CHUNK_LG2)
                    self._pages(region.chunks[i][j], n, at, found)
        return found

    cdef tuple _contents(self):
        """(regions, injected errors), as _restored() takes them, with views of the bytes."""
        self.ram.users += 1  # a signal's handler changes no region
        try:
            return self._views()
        finally:
            self.ram.users -= 1

    cdef tuple _views(self):
        """What a pickle or a copy has of the regions: which bytes, and what cannot be copied."""
        cdef Region* region
        cdef Injection* each
        cdef Py_ssize_t i
        cdef list regions = [], errors = []
        cdef list refused = []
        cdef dict views = {}
        cdef set writable = set()
        for i in range(self.ram.n_regions):
            region = &self.ram.regions[i]
            if region.kind >= REGION_C:
                refused.append(span_text(region.base, region.last))
            elif region.writable:
                writable.add((<size_t>region.data, region.last - region.base))
        if refused:
            raise TypeError("a Memory with callback regions cannot be copied or pickled: "
                            f"{', '.join(refused)} belong to the host; Smmu.save() leaves the "
                            "memory out")
        for i in range(self.ram.n_regions):
            region = &self.ram.regions[i]
            if region.kind == REGION_BUFFER:
                # regions over the same bytes stay so
                key = <size_t>region.data, region.last - region.base
                if key not in views:
                    views[key] = [self._span(
                        region.data, region.last - region.base + 1, key not in writable)]
                regions.append((region.base, not region.writable, views[key]))
            else:
                how = SPARSE if region.kind == REGION_CHUNKED else bool(region.huge_pages)
                regions.append((region.base, region.last - region.base + 1, how,
                                self._private(region)))
        for i in range(self.ram.n_injections):
            each = &self.ram.injections[i]
            errors.append((each.first, each.last, each.kind, each.level, each.nth, each.count,
                           each.seen, each.number))
        return regions, errors

    def copy(self):
        """Return an independent Memory of equal bytes, with the same injected errors.

        Regions over buffers are bytearrays in the copy, or bytes where they are read-only;
        two that share all their bytes still do.  It takes as long as there are bytes: all of
        buffers, and the pages of private memory that hold anything.  Signals are heard meanwhile.

        Raises
        ------
        TypeError
            There are callback regions, which only the host can copy.
        """
        cdef list regions = []
        cdef dict copies = {}
        given, errors = self._contents()
        for region in given:
            if len(region) == 3:
                base, readonly, shared = region
                if id(shared) not in copies:
                    copies[id(shared)] = [owned(shared[0])]
                region = base, readonly, copies[id(shared)]
            regions.append(region)
        return _restored(regions, errors, self._injected)

    def __copy__(self):
        return self.copy()

    def __deepcopy__(self, memo):
        return self.copy()

    def __reduce_ex__(self, protocol):
        """Pickle regions and injected errors; out of band, the bytes are not copied.

        Private memory goes without the pages that read as zero.  Buffers out of band refer to
        the memory itself: it must not change before they are written, and while they live no
        region can be removed.  What is loaded has bytearrays for buffers, or what the loader
        gave; where that is read-only and the region is not, a copy of it.
        """
        regions, errors = self._contents()
        if protocol < 5:
            for region in regions:
                views = region[len(region) - 1]
                for i, view in enumerate(views):
                    if len(region) == 4:
                        views[i] = view[0], owned(view[1])
                    elif type(view) is PickleBuffer:
                        views[i] = owned(view)
        return _restored, (regions, errors, self._injected)

    def _repr_html_(self):
        from smmufast._html import entries
        regions = self.regions
        return entries("Memory", MemoryRegion._fields, regions, len(regions))

    def __repr__(self):
        return f"Memory({len(self.regions)} regions)"


cdef object owned(view):
    """A copy of the bytes, which can be written if these can."""
    cdef Py_buffer given
    cdef Py_ssize_t at, n
    cdef char* to
    PyObject_GetBuffer(view, &given, PyBUF_SIMPLE)
    try:
        if given.readonly:
            made = PyBytes_FromStringAndSize(NULL, given.len)
            to = PyBytes_AS_STRING(made)
        else:
            made = PyByteArray_FromStringAndSize(NULL, given.len)
            to = PyByteArray_AS_STRING(made)
        for at in range(0, given.len, COPIED):
            n = min(given.len - at, <Py_ssize_t>COPIED)
            memcpy(to + at, <char*>given.buf + at, n)
            look_for_signals()
    finally:
        PyBuffer_Release(&given)
    return made


def _restored(regions, errors, injected=0):
    """Return the Memory of what was pickled; `injected`: the number of its last error."""
    cdef Memory memory = Memory()
    cdef Injection each
    for region in regions:
        if len(region) == 3 and not region[1] and memoryview(region[2][0]).readonly:
            region[2][0] = bytearray(region[2][0])
    for region in regions:
        if len(region) == 3:
            base, readonly, shared = region
            memory.add(shared[0], base, readonly=readonly)
        else:
            base, size, how, pages = region
            sparse = how == SPARSE
            memory.add_private(base, size, huge_pages=how and not sparse, sparse=sparse)
            for offset, data in pages:
                memory.write(base + offset, data)
                look_for_signals()
    for error in errors:
        if len(error) == 7:  # of version 0.2
            error = *error, memory._injected + 1
        (each.first, each.last, each.kind, each.level, each.nth, each.count, each.seen,
         each.number) = error
        memory._inject(&each)
    memory._injected = max(memory._injected, injected)
    return memory


@cython.final
@cython.auto_pickle(False)
@cython.no_gc_clear  # what is exported is released after this
cdef class _Span:
    """Bytes of a Memory, which stay where they are while this is exported."""

    cdef Memory memory
    cdef uint8_t* data
    cdef Py_ssize_t size
    cdef bint readonly

    def __init__(self):
        raise TypeError("a view is made by pickling a Memory")

    def __getbuffer__(self, Py_buffer* view, int flags):
        if self.memory is None:
            raise BufferError("a view is made by pickling a Memory")
        PyBuffer_FillInfo(view, self, self.data, self.size, self.readonly, flags)
        self.memory.exports += 1

    def __releasebuffer__(self, Py_buffer* view):
        self.memory.exports -= 1


cdef void region_close(Region* region) noexcept:
    """Give back what a region holds of the host."""
    cdef uint64_t i, j
    if region.kind == REGION_BUFFER:
        PyBuffer_Release(&region.view)
    elif region.kind == REGION_PRIVATE:
        munmap(region.data, region.last - region.base + 1)
        free(region.touched)
    elif region.kind == REGION_CHUNKED:
        for i in range(<uint64_t>1 << CHUNK_TABLE_LG2):
            if region.chunks[i] != NULL:
                for j in range(<uint64_t>1 << CHUNK_TABLE_LG2):
                    if region.chunks[i][j] != NULL:
                        munmap(region.chunks[i][j], 1 << CHUNK_LG2)
                free(region.chunks[i])
        free(region.chunks)


cdef object raise_port(Port* port):
    """Raise the exception that a callback left in a port."""
    error = <object>port.exception
    Py_DECREF(error)  # the port's own reference
    port.exception = NULL
    raise error


cdef object to_integer(str name, value):
    """An int from anything that is an integer, or an error that names the argument."""
    try:
        return PyNumber_Index(value)
    except TypeError:
        raise TypeError(must_be(name, "an integer", type(value))) from None


cdef int to_flag(str name, value) except -1:
    """A truth value: True, False or None, 0 or 1; a string, which merely has one, is none."""
    if value is True:
        return 1
    if value is False or value is None:
        return 0
    try:
        number = PyNumber_Index(value)
    except TypeError:
        number = None
        if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
            return value.item()
    if number is None:
        raise TypeError(must_be(name, "True or False", value))
    if number != 0 and number != 1:
        raise ValueError(must_be(name, "True or False", value))
    return number == 1


cdef str answer_to(str call, uint64_t address):
    """What a callback returns, as a message names it."""
    return f"what the {call} callback at {address:#x} returns"


cdef str bytes_from(str name, uint64_t first):
    """How much there is from an address on, as a message tells it."""
    return f"{0x10000000000000000 - first:#x} bytes ({name} {first:#x} to 2^64)"


cdef int kind_number(kind) except -1:
    """The number of a kind of access."""
    if kind not in ACCESS_KINDS[1:]:
        raise ValueError(must_be("kind", either(ACCESS_KINDS[1:]), kind))
    return ACCESS_KINDS.index(kind)


cdef int level_number(level, kind) except -2:
    """A level of tables, for a kind that has one."""
    if kind is not None and "TT" not in kind:
        raise ValueError(must_be(
            "level", f"None with kind {kind!r} (only tables have levels)", level))
    if not -1 <= to_integer("level", level) <= 3:
        raise ValueError(must_be("level", "-1 to 3", level))
    return level


cdef uint64_t to_address(
        str name, value, uint64_t last=0xFFFFFFFFFFFFFFFFULL) except? -1:
    """A number up to `last` from any integer, or an error that names the argument."""
    number = to_integer(name, value)
    if not 0 <= number <= last:
        raise out_of_range(name, number, last)
    return number


cdef object out_of_range(str name, number, last):
    """The error of a number that is not one of 0 to `last`."""
    return ValueError(must_be(name, f"0 to {last:#x}", number))
