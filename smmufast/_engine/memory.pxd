"""Physical memory as the SMMU sees it: regions, and the port through which one walk reads.

A port keeps a window on the region it read last, so that a fetch is one bounds check and a
load.  Whatever is not plain memory (callbacks, injected errors, a recorded walk) leaves the
window shut, and every fetch takes the slow path.
"""

from cpython.buffer cimport Py_buffer
from cpython.ref cimport Py_INCREF
from libc.stdint cimport int8_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from smmufast._facts.bits cimport le64, likely, load64
from smmufast._facts.types cimport NO_LEVEL, CallbacksC


cdef extern from "<pthread.h>" nogil:
    ctypedef struct Mutex "pthread_mutex_t":
        pass
    void mutex_open "pthread_mutex_init"(Mutex* mutex, void* attributes) noexcept
    void mutex_close "pthread_mutex_destroy"(Mutex* mutex) noexcept


cdef enum:
    REGION_BUFFER = 0    # a host object's bytes
    REGION_PRIVATE = 1   # one anonymous map
    REGION_CHUNKED = 2   # chunks allocated when first written
    REGION_C = 3         # C callbacks
    REGION_PYTHON = 4    # Python callables

    WINDOW = 64          # the largest read
    TOUCHED_LG2 = 21     # private memory is searched for pages in use by 2 MiB
    LOG_FETCHES = 128    # more are not recorded
    LOG_WORDS = 384


cdef struct Region:
    uint64_t base
    uint64_t last
    uint8_t* data          # host address of base; NULL for chunks and callbacks
    int kind
    bint writable
    uint8_t*** chunks      # REGION_CHUNKED: two levels of pointers
    uint8_t* touched       # REGION_PRIVATE: a byte for each 2^TOUCHED_LG2, set by writes
    bint huge_pages        # REGION_PRIVATE: as asked for
    CallbacksC callbacks   # REGION_C
    void* reader           # REGION_PYTHON: borrowed, the Memory owns them
    void* writer
    void* swapper
    Py_buffer view         # REGION_BUFFER


# What an access of the SMMU is for that is no fetch of a walk (FETCH_...): ACCESS_KINDS.
cdef enum:
    ACCESS_HOST = 0        # none of the SMMU: no injected error hits it
    ACCESS_CMD = 9
    ACCESS_EVENT
    ACCESS_PRI
    ACCESS_MSI


cdef struct Injection:
    uint64_t first
    uint64_t last
    int kind               # FETCH_... or ACCESS_..., or FETCH_NONE for any
    int level              # or NO_LEVEL for any
    int64_t nth            # first matching access that fails, from 1
    int64_t count          # how many fail
    int64_t seen
    int64_t number         # what remove_error() names it by


# Where plain memory can be read in place: 8 bytes at base .. base + span.  Open, it is 64 bytes
# long at least.  Shut, it has base 1, which no 8-byte aligned address is.
cdef struct Window:
    uint64_t base
    uint64_t span
    const uint8_t* data


cdef struct Ram:
    Region* regions        # ascending, not overlapping
    Py_ssize_t n_regions
    Injection* injections
    Py_ssize_t n_injections
    bint plain             # no callbacks, no injected errors
    int64_t users          # walks that need it unchanged
    int64_t handles        # of these, uses that C handles announce
    Window window          # the one that the last scalar call left open


# One access of a trace.  Of an update, the data are what was found, expected and desired.
cdef struct Logged:
    uint64_t address
    uint16_t size          # bytes
    uint8_t kind           # FETCH_...
    int8_t level           # of a translation table, else NO_LEVEL
    uint8_t aborted
    uint16_t words         # where its data starts in Log.data


# The accesses of one translation, in order.
cdef struct Log:
    uint32_t count
    uint32_t used          # words of data
    Logged[LOG_FETCHES] fetch
    uint64_t[LOG_WORDS] data  # little-endian numbers


cdef struct Port:
    Window window
    Ram* ram
    Log* log               # NULL, or where fetches are recorded
    bint dry               # updates of descriptors count as made, and are not
    bint wrote             # memory was written, or a callback ran: what was read may differ now
    bint pure              # whoever would write stops instead (FETCH_STOPPED)
    uint64_t stopped       # then: the row of the batch
    void* exception        # a Python exception raised by a callback, owned


# Let the next fetches near an address read its region, or its chunk, in place.
cdef void open_window(Port* port, uint64_t address) noexcept nogil

cdef int fetch_slow(Port* port, int kind, int level, uint64_t address, unsigned int size,
                    uint64_t* words) noexcept nogil


# `kind` is an ACCESS_...
cdef int port_read(Port* port, int kind, uint64_t address, void* into, size_t n) noexcept nogil
cdef int port_write(
    Port* port, int kind, uint64_t address, const void* data, size_t n) noexcept nogil
cdef int port_swap8(Port* port, int kind, int level, uint64_t address, uint64_t expected,
                    uint64_t desired, uint64_t* found) noexcept nogil

# Append an access to a log; of `count` words of data.
cdef void log_fetch(Log* log, int kind, int level, uint64_t address, unsigned int size,
                    const uint64_t* words, unsigned int count, bint aborted) noexcept nogil

cdef object raise_port(Port* port)  # the exception that a callback left there

# --- no callback while a lock is held ---
# A thread has one mutex at most, that of the caches of an Smmu.  Whoever calls the host (a memory
# callback, on_interrupt, on_resume, a device, a signal handler) does so between aside() and
# resume().  What is cached may be other than before, as after a callback that translates.

# Have a mutex: without the GIL, for whoever has it may wait for that; with it, the second.
cdef void mutex_have(Mutex* mutex) noexcept nogil
cdef void mutex_have_gil(Mutex* mutex) noexcept
cdef void mutex_drop(Mutex* mutex) noexcept nogil

cdef Mutex* aside() noexcept nogil           # let go of what this thread has, NULL for nothing
cdef void resume(Mutex* had) noexcept nogil  # have it again; with or without the GIL
cdef int callbacks_inside() noexcept nogil   # how many calls of the host this thread is in
cdef int look_for_signals() except -1        # let their handlers run

cdef object to_integer(str name, value)
cdef object out_of_range(str name, number, last)
cdef str bytes_from(str name, uint64_t first)
cdef int to_flag(str name, value) except -1  # 0 or 1, from what is a truth value
cdef uint64_t to_address(str name, value, uint64_t last=*) except? -1


cdef inline void window_shut(Window* window) noexcept nogil:
    window.base = 1
    window.span = 0
    window.data = NULL


cdef inline void port_open(Port* port, Ram* ram, Log* log) noexcept nogil:
    """A port with its window shut."""
    window_shut(&port.window)
    port.ram = ram
    port.log = log
    port.dry = False
    port.wrote = False
    port.pure = False
    port.stopped = 0
    port.exception = NULL


# How a fetch ends.  Negative codes stop the path: there is no outcome yet.
cdef enum:
    FETCH_OK = 0
    FETCH_ABORT = 1      # external abort
    FETCH_RAISED = -2    # a Python callback raised; the exception is in the port
    FETCH_STOPPED = -3   # memory would be written, which this port must not


cdef inline int port_raised(Port* port, object error) noexcept:
    """Keep the exception of a callback, the first one if there are several: FETCH_RAISED."""
    if port.exception == NULL:
        Py_INCREF(error)
        port.exception = <void*>error
    return FETCH_RAISED


# S3.15-3
cdef inline int fetch8(Port* port, int kind, int level, uint64_t address,
                       uint64_t* value) noexcept nogil:
    """Read one 8-byte descriptor, as a little-endian number; `address` is 8-byte aligned."""
    cdef uint64_t offset = address - port.window.base
    cdef uint64_t slow = 0  # apart from `value`, which then stays in a register
    cdef int status
    if likely(offset <= port.window.span):
        value[0] = le64(load64(port.window.data + offset))
        return FETCH_OK
    status = fetch_slow(port, kind, level, address, 8, &slow)
    value[0] = slow
    return status


cdef inline bint reads64(const Window* window, uint64_t offset) noexcept nogil:
    """The 64 bytes at base + offset can be read in place."""
    return offset <= window.span and window.span - offset >= WINDOW - 8


# S3.21.3-14, S3.21.3-15, S5-5
cdef inline int fetch64(Port* port, int kind, uint64_t address, uint64_t* words) noexcept nogil:
    """Read one 64-byte structure, as eight little-endian dwords."""
    cdef uint64_t offset = address - port.window.base
    cdef int i
    if likely(reads64(&port.window, offset)):
        for i in range(8):
            words[i] = le64(load64(port.window.data + offset + 8 * i))
        return FETCH_OK
    return fetch_slow(port, kind, NO_LEVEL, address, 64, words)


cdef inline bint unchanged8(const Port* port, uint64_t address, uint64_t value) noexcept nogil:
    """The dword at `address` still is this one; no when it cannot be read in place."""
    cdef uint64_t offset = address - port.window.base
    return offset <= port.window.span and le64(load64(port.window.data + offset)) == value


cdef extern from *:
    """
    #if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    typedef uint64_t smmufast_pair __attribute__((vector_size(16), aligned(1), may_alias));
    /* A structure in memory is eight dwords; by vectors, since it is compared on every call. */
    static inline int smmufast_same64(const uint8_t *at, const uint64_t *words)
    {
        const smmufast_pair *a = (const smmufast_pair *)at;
        const smmufast_pair *b = (const smmufast_pair *)words;
        smmufast_pair differ = ((a[0] ^ b[0]) | (a[1] ^ b[1])) | ((a[2] ^ b[2]) | (a[3] ^ b[3]));
        return (differ[0] | differ[1]) == 0;
    }
    /* The same, of the bits to be kept. */
    static inline int smmufast_alike64(
        const uint8_t *at, const uint64_t *words, const uint64_t *keep)
    {
        const smmufast_pair *a = (const smmufast_pair *)at;
        const smmufast_pair *b = (const smmufast_pair *)words;
        const smmufast_pair *k = (const smmufast_pair *)keep;
        smmufast_pair differ = (((a[0] ^ b[0]) & k[0]) | ((a[1] ^ b[1]) & k[1]))
                               | (((a[2] ^ b[2]) & k[2]) | ((a[3] ^ b[3]) & k[3]));
        return (differ[0] | differ[1]) == 0;
    }
    #else
    static inline int smmufast_alike64(
        const uint8_t *at, const uint64_t *words, const uint64_t *keep)
    {
        uint64_t differ = 0, word;
        int i;
        for (i = 0; i < 8; i++) {
            memcpy(&word, at + 8 * i, 8);
            differ |= (__builtin_bswap64(word) ^ words[i]) & (keep ? keep[i] : ~0ULL);
        }
        return differ == 0;
    }
    static inline int smmufast_same64(const uint8_t *at, const uint64_t *words)
    {
        return smmufast_alike64(at, words, 0);
    }
    #endif
    """
    bint same64 "smmufast_same64"(const uint8_t* at, const uint64_t* words) noexcept nogil
    bint alike64 "smmufast_alike64"(
        const uint8_t* at, const uint64_t* words, const uint64_t* keep) noexcept nogil


cdef inline bint unchanged64(
        const Port* port, uint64_t address, const uint64_t* words) noexcept nogil:
    """The structure at `address` still is these eight dwords; no if it cannot be read in place."""
    cdef uint64_t offset = address - port.window.base
    return likely(reads64(&port.window, offset)) and same64(port.window.data + offset, words)


cdef class Memory:
    cdef Ram ram
    cdef dict _callables
    cdef int64_t exports    # views of its bytes that pickles hold
    cdef int64_t _injected  # errors, ever: the number of the last one
    cdef object _span(self, uint8_t* data, uint64_t size, bint readonly)
    cdef int _pages(self, uint8_t* data, uint64_t size, uint64_t offset, list found) except -1
    cdef list _private(self, Region* region)
    cdef tuple _contents(self)
    cdef tuple _views(self)
    cdef int _inject(self, const Injection* injection) except -1
    cdef int _check_idle(self) except -1
    cdef Region* _insert(self, uint64_t base, uint64_t size) except NULL
    cdef void _remove(self, Region* region) noexcept
    cdef void _refresh(self) noexcept
