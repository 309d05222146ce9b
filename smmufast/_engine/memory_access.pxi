"""Reading and writing without Python: regions, windows, injected errors, the host."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memmove, memset

from smmufast._facts.bits cimport le64
from smmufast._engine.host cimport MAP_FAILED, map_zeros, munmap
from smmufast._facts.types cimport FETCH_NONE, NO_LEVEL

from smmufast._arguments import must_be


cdef Region* find_region(Ram* ram, uint64_t address) noexcept nogil:
    """The region that holds the address, or NULL."""
    cdef Py_ssize_t low = 0, high = ram.n_regions, middle
    while low < high:
        middle = (low + high) >> 1
        if address > ram.regions[middle].last:
            low = middle + 1
        else:
            high = middle
    if low == ram.n_regions or address < ram.regions[low].base:
        return NULL
    return &ram.regions[low]


cdef uint8_t* chunk_of(Region* region, uint64_t offset) noexcept nogil:
    """The chunk that holds the offset, or NULL while nothing was written there."""
    cdef uint8_t** leaf = load_leaf(&region.chunks[offset >> (CHUNK_LG2 + CHUNK_TABLE_LG2)])
    if leaf == NULL:
        return NULL
    return load_chunk(&leaf[offset >> CHUNK_LG2 & ((1 << CHUNK_TABLE_LG2) - 1)])


cdef uint8_t** make_leaf(uint8_t*** top) noexcept nogil:
    """The table of chunks at `top`; of several threads that make one, the first one's stays."""
    cdef uint8_t** leaf = load_leaf(top)
    cdef uint8_t** found = NULL
    if leaf != NULL:
        return leaf
    leaf = <uint8_t**>calloc(1 << CHUNK_TABLE_LG2, sizeof(uint8_t*))
    if leaf == NULL or install_leaf(top, &found, leaf):
        return leaf
    free(leaf)
    return found


cdef uint8_t* make_chunk(Region* region, uint64_t offset) noexcept nogil:
    """As chunk_of, but allocate it; NULL when the host has no memory left."""
    cdef uint8_t** leaf = make_leaf(&region.chunks[offset >> (CHUNK_LG2 + CHUNK_TABLE_LG2)])
    cdef uint8_t** slot
    cdef uint8_t* found
    cdef void* chunk
    if leaf == NULL:
        return NULL
    slot = &leaf[offset >> CHUNK_LG2 & ((1 << CHUNK_TABLE_LG2) - 1)]
    found = load_chunk(slot)
    if found != NULL:
        return found
    chunk = map_zeros(1 << CHUNK_LG2)
    if chunk == MAP_FAILED:
        return NULL
    if install_chunk(slot, &found, <uint8_t*>chunk):
        return <uint8_t*>chunk
    munmap(chunk, 1 << CHUNK_LG2)
    return found


cdef inline void touch(Region* region, uint64_t offset, uint64_t n) noexcept nogil:
    """Note that n bytes are written, one at least."""
    cdef uint64_t i
    if region.touched != NULL:
        for i in range(offset >> TOUCHED_LG2, (offset + (n - 1) >> TOUCHED_LG2) + 1):
            region.touched[i] = 1


cdef uint64_t piece_size(Region* region, uint64_t address, uint64_t n) noexcept nogil:
    """How many of n bytes one region, and one chunk of it, holds from `address` on."""
    cdef uint64_t rest = region.last - address
    if rest < n - 1:
        n = rest + 1
    if region.kind == REGION_CHUNKED:
        rest = (<uint64_t>1 << CHUNK_LG2) - (address - region.base & ((1 << CHUNK_LG2) - 1))
        if rest < n:
            n = rest
    return n


cdef int read_python(Port* port, Region* region, uint64_t address, uint8_t* buf,
                     uint64_t n) noexcept with gil:
    """Read by a Python callable: 0, FETCH_ABORT or FETCH_RAISED."""
    cdef object data
    cdef Py_buffer view
    try:
        data = (<object>region.reader)(address, n)
        if data is None:
            return FETCH_ABORT
        if not PyObject_CheckBuffer(data):
            raise TypeError(must_be(answer_to("read", address), "bytes or None", type(data)))
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if <uint64_t>view.len != n:
                raise ValueError(must_be(answer_to("read", address), f"{n} bytes", view.len))
            memcpy(buf, view.buf, n)
        finally:
            PyBuffer_Release(&view)
        return FETCH_OK
    except BaseException as error:
        return port_raised(port, error)


cdef int read_piece(Port* port, Region* region, uint64_t address, uint8_t* buf,
                    uint64_t n) noexcept nogil:
    """Read n bytes of one region, at most one chunk."""
    cdef uint64_t offset = address - region.base
    cdef uint8_t* chunk
    cdef Mutex* had
    cdef int status = FETCH_OK
    if region.data != NULL:
        memcpy(buf, region.data + offset, n)
    elif region.kind == REGION_CHUNKED:
        chunk = chunk_of(region, offset)
        if chunk == NULL:
            memset(buf, 0, n)
        else:
            memcpy(buf, chunk + (offset & ((1 << CHUNK_LG2) - 1)), n)
    else:
        had = aside()
        if region.kind == REGION_PYTHON:
            status = read_python(port, region, address, buf, n)
        elif region.callbacks.read(region.callbacks.ctx, address, buf, n):
            status = FETCH_ABORT
        resume(had)
    return status


cdef int read_across(Port* port, uint64_t address, void* into, size_t n) noexcept nogil:
    """Read n bytes, across regions if need be: 0, FETCH_ABORT or FETCH_RAISED."""
    cdef Region* region
    cdef uint8_t* buf = <uint8_t*>into
    cdef uint64_t part
    cdef int status
    if n and address + (n - 1) < address:
        return FETCH_ABORT
    while n:
        region = find_region(port.ram, address)
        if region == NULL:
            return FETCH_ABORT
        part = piece_size(region, address, n)
        status = read_piece(port, region, address, buf, part)
        if status:
            return status
        address += part
        buf += part
        n -= part
    return FETCH_OK


cdef bint injected(Ram* ram, int kind, int level, uint64_t address,
                   uint64_t size) noexcept nogil:
    """Whether an injected error hits this access; every matching injection counts it."""
    cdef Py_ssize_t i
    cdef Injection* injection
    cdef int64_t seen
    cdef bint hit = False
    for i in range(ram.n_injections):
        injection = &ram.injections[i]
        if address > injection.last or address + (size - 1) < injection.first:
            continue
        if injection.kind != FETCH_NONE and injection.kind != kind:
            continue
        if injection.level != NO_LEVEL and injection.level != level:
            continue
        seen = add_fetch(&injection.seen, 1)
        if seen >= injection.nth and seen - injection.nth < injection.count:
            hit = True
    return hit


cdef int port_read(Port* port, int kind, uint64_t address, void* into, size_t n) noexcept nogil:
    """Read n bytes that are no fetch of a walk: 0, FETCH_ABORT or FETCH_RAISED."""
    if kind and port.ram.n_injections and injected(port.ram, kind, NO_LEVEL, address, n):
        return FETCH_ABORT
    return read_across(port, address, into, n)


cdef void open_window(Port* port, uint64_t address) noexcept nogil:
    """Let the next fetches near `address` read its region, or its chunk, in place."""
    cdef Region* region = find_region(port.ram, address)
    cdef uint64_t base, size
    cdef uint8_t* data
    if region == NULL:
        return
    base = region.base
    data = region.data
    size = region.last - base + 1
    if region.kind == REGION_CHUNKED:
        data = chunk_of(region, address - region.base)
        base = address - (address - region.base & ((1 << CHUNK_LG2) - 1))
        size = <uint64_t>1 << CHUNK_LG2
        if region.last - base < size - 1:
            size = region.last - base + 1
    # a window serves aligned 8-byte loads, so the host's address must be aligned like ours
    if data == NULL or size < WINDOW or (<uint64_t><size_t>data - base) & 7:
        return
    port.window.base = base
    port.window.span = size - 8
    port.window.data = data


cdef void log_fetch(Log* log, int kind, int level, uint64_t address, unsigned int size,
                    const uint64_t* words, unsigned int count, bint aborted) noexcept nogil:
    """Append an access to the log of a translation; of `count` words of data."""
    cdef Logged* fetch
    if log.count == LOG_FETCHES or log.used + count > LOG_WORDS:
        return
    fetch = &log.fetch[log.count]
    fetch.address = address
    fetch.size = <unsigned short>size
    fetch.kind = <uint8_t>kind
    fetch.level = <signed char>level
    fetch.aborted = aborted
    fetch.words = <uint16_t>log.used
    log.count += 1
    memcpy(&log.data[log.used], words, 8 * count)
    log.used += count


cdef int fetch_slow(Port* port, int kind, int level, uint64_t address, unsigned int size,
                    uint64_t* words) noexcept nogil:
    """One fetch, wherever its answer comes from; `words` are little-endian numbers."""
    cdef int status
    cdef unsigned int i
    if port.ram.n_injections and injected(port.ram, kind, level, address, size):
        status = FETCH_ABORT
    else:
        status = read_across(port, address, words, size)
    if status == FETCH_OK:
        for i in range(size // 8):
            words[i] = le64(words[i])
        if port.ram.plain and port.log == NULL:
            open_window(port, address)
    if port.log != NULL and status >= 0:
        log_fetch(port.log, kind, level, address, size, words, size // 8, status != FETCH_OK)
    return status


# --- writing without Python ---

cdef int write_python(Port* port, Region* region, uint64_t address, const uint8_t* buf,
                      uint64_t n) noexcept with gil:
    """FETCH_OK, FETCH_ABORT, or FETCH_RAISED with the exception in the port."""
    try:
        done = (<object>region.writer)(
            address, PyBytes_FromStringAndSize(<const char*>buf, n))
        if done is True:
            return FETCH_OK
        if done is None:
            return FETCH_ABORT
        raise TypeError(must_be(
            answer_to("write", address), "True (done) or None (abort)", done))
    except BaseException as error:
        return port_raised(port, error)


cdef int write_piece(Port* port, Region* region, uint64_t address, const uint8_t* buf,
                     uint64_t n) noexcept nogil:
    """Write n bytes of one writable region, at most one chunk."""
    cdef uint64_t offset = address - region.base
    cdef uint8_t* target
    cdef Mutex* had
    cdef int status = FETCH_OK
    if region.data != NULL:
        touch(region, offset, n)
        memmove(region.data + offset, buf, n)
    elif region.kind == REGION_CHUNKED:
        target = make_chunk(region, offset)
        if target == NULL:
            return FETCH_ABORT
        memmove(target + (offset & ((1 << CHUNK_LG2) - 1)), buf, n)
    else:
        had = aside()
        if region.kind == REGION_PYTHON:
            status = write_python(port, region, address, buf, n)
        elif region.callbacks.write(region.callbacks.ctx, address, buf, n):
            status = FETCH_ABORT
        resume(had)
    return status


cdef int port_write(
        Port* port, int kind, uint64_t address, const void* data, size_t n) noexcept nogil:
    """Write n bytes, across regions if need be: 0, FETCH_ABORT or FETCH_RAISED.

    Nothing is written unless every byte lies in a writable region.
    """
    cdef Region* region
    cdef const uint8_t* buf = <const uint8_t*>data
    cdef uint64_t at = address, rest = n, part
    cdef int status
    if n and address + (n - 1) < address:
        return FETCH_ABORT
    if kind and port.ram.n_injections and injected(port.ram, kind, NO_LEVEL, address, n):
        return FETCH_ABORT
    while rest:
        region = find_region(port.ram, at)
        if region == NULL or not region.writable:
            return FETCH_ABORT
        part = piece_size(region, at, rest)
        at += part
        rest -= part
    at, rest = address, n
    while rest:
        region = find_region(port.ram, at)
        part = piece_size(region, at, rest)
        status = write_piece(port, region, at, buf, part)
        if status:
            return status
        at += part
        buf += part
        rest -= part
    return FETCH_OK


cdef int swap_python(Port* port, Region* region, uint64_t address, uint64_t expected,
                     uint64_t desired, uint64_t* found) noexcept with gil:
    """Compare and swap by a Python callable: 0, FETCH_ABORT or FETCH_RAISED."""
    try:
        old = (<object>region.swapper)(
            address, PyBytes_FromStringAndSize(<char*>&expected, 8),
            PyBytes_FromStringAndSize(<char*>&desired, 8))
        if old is None:
            return FETCH_ABORT
        if not isinstance(old, bytes) or len(old) != 8:
            raise TypeError(must_be(
                answer_to("swap", address), "the 8 bytes that were there, or None (abort)", old))
        memcpy(found, PyBytes_AS_STRING(old), 8)
        return FETCH_OK
    except BaseException as error:
        return port_raised(port, error)


cdef int swap_region(Port* port, Region* region, uint64_t address, uint64_t expected,
                     uint64_t desired, uint64_t* found) noexcept nogil:
    """Compare and swap 8 aligned bytes of one writable region; numbers as they lie in memory.

    One atomic operation in plain memory whose host address is aligned as ours is, and where a
    callback region has a function for it; else a read and a write.
    """
    cdef uint64_t offset = address - region.base
    cdef uint8_t* target = NULL
    cdef Mutex* had
    cdef int status
    if region.data != NULL:
        touch(region, offset, 8)
        target = region.data + offset
    elif region.kind == REGION_CHUNKED:
        target = make_chunk(region, offset)
        if target == NULL:
            return FETCH_ABORT
        target += offset & ((1 << CHUNK_LG2) - 1)
    elif region.swapper != NULL or region.kind == REGION_C and region.callbacks.swap != NULL:
        had = aside()
        status = FETCH_OK
        if region.kind == REGION_PYTHON:
            status = swap_python(port, region, address, expected, desired, found)
        elif region.callbacks.swap(region.callbacks.ctx, address, expected, desired, found):
            status = FETCH_ABORT
        resume(had)
        return status
    if target != NULL and not <size_t>target & 7:
        found[0] = expected
        swap_atomic(target, found, desired)
        return FETCH_OK
    status = read_piece(port, region, address, <uint8_t*>found, 8)
    if status or found[0] != expected:
        return status
    return write_piece(port, region, address, <uint8_t*>&desired, 8)


cdef int port_swap8(Port* port, int kind, int level, uint64_t address, uint64_t expected,
                    uint64_t desired, uint64_t* found) noexcept nogil:
    """Compare and swap one 8-byte descriptor; all numbers are little-endian.

    `found` is what was there: the swap took place if it is `expected`.
    """
    cdef Region* region
    cdef uint64_t[3] words
    cdef int status
    words[0] = 0
    words[1] = expected
    words[2] = desired
    if port.dry:
        found[0] = expected
        return FETCH_OK
    if port.pure:
        return FETCH_STOPPED
    port.wrote = True
    region = find_region(port.ram, address)
    if region == NULL or not region.writable or region.last - address < 7:
        status = FETCH_ABORT
    elif port.ram.n_injections and injected(port.ram, kind, level, address, 8):
        status = FETCH_ABORT
    else:
        status = swap_region(port, region, address, le64(expected), le64(desired), words)
        words[0] = le64(words[0])
    found[0] = words[0]
    if port.log != NULL and status >= 0:
        log_fetch(port.log, kind, level, address, 8, words, 3, status != FETCH_OK)
    return status
