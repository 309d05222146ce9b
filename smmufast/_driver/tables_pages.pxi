"""Pages: the memory that a driver takes for tables and queues, block by block."""

cimport cython
from cpython.ref cimport Py_DECREF
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free

from smmufast._facts.bits cimport low_mask
from smmufast._engine.host cimport MAP_FAILED, map_zeros, munmap
from smmufast._engine.memory cimport FETCH_RAISED, Memory, Region, port_open
from smmufast._driver.pages cimport (
    ACCESS_NO_MEMORY, FRAME_LG2, SMALLEST_LG2, Access, Frame, PagesC, bit_of, clz, ctz, order_add,
    pages_alloc, pages_claim, pages_free, pages_zero,
)

from smmufast.errors import InputOutput, InvalidArgument, OutOfMemory


cdef object failure_of(Access* access):
    """How an access failed, as an exception, and no longer; None if none did."""
    cdef int status = access.status
    access.status = 0
    if status == FETCH_RAISED:
        error = <object>access.port.exception
        Py_DECREF(error)  # the port's own reference
        access.port.exception = NULL
        return error
    if status == ACCESS_NO_MEMORY:
        return MemoryError()
    return InputOutput("memory", text=REFUSED) if status else None


cdef str REFUSED = "the memory refused an access to a table"


cdef uint64_t size_lg2(object size, uint64_t most) except? 0xFF:
    """lg2 of the block that holds so many bytes."""
    cdef uint64_t n = number("size", size)
    if n == 0:
        raise InvalidArgument("size", size, "1 byte or more")
    if n > most:
        raise OutOfMemory("size", size, f"{most:#x} bytes at most")
    return SMALLEST_LG2 if n <= 1 << SMALLEST_LG2 else 64 - <uint64_t>clz(n - 1)


@cython.final
@cython.auto_pickle(False)
@cython.no_gc_clear  # the memory is let go of last
cdef class Pages:
    """Pages(memory, base, size)\n--\n
    A range of memory that is handed out in blocks of a power of two, aligned to their size.

    Page tables, CD tables, stream tables and queues of a driver lie there.  What is handed out is
    known to the host alone: nothing that is written to the memory changes it.

    Parameters
    ----------
    memory : Memory
        While this object lives, no region of it can be removed.
    base, size : int
        The range in bytes, multiples of 64, 2^44 bytes at most; it lies in one writable region.
        In a buffer or private memory descriptors are read and written in place, 8 bytes at once;
        in other memory (callbacks, private memory beyond 2^46 bytes) through the region.

    Raises
    ------
    InvalidArgument
        The range is none, or not in one writable region.

    Notes
    -----
    Several threads may share it: with the GIL every call is one step.

    Examples
    --------
    >>> from smmufast import Memory
    >>> from smmufast._driver.tables import Pages
    >>> memory = Memory()
    >>> memory.add_private(0x8000_0000, 1 << 20)
    >>> pages = Pages(memory, 0x8000_0000, 1 << 20)
    >>> hex(pages.alloc(5000))
    '0x80000000'
    >>> pages.in_use, pages.blocks
    (8192, 1)
    >>> pages.free(0x8000_0000, 5000)
    """

    def __init__(self, Memory memory not None, base, size):
        # Pages from base on, which one region has to hold, all free.
        cdef PagesC* p = &self.c
        cdef Region* region = NULL
        cdef uint64_t at = number("base", base), n = number("size", size), end, total, k
        cdef uint64_t bits
        cdef uint64_t* arena
        cdef Py_ssize_t i
        cdef int j
        if self.memory is not None:
            raise InvalidArgument("pages", text="the pages have their memory already")
        if n == 0 or n > <uint64_t>1 << 44 or n & 63:
            raise InvalidArgument("size", size, "a multiple of 64 up to 2^44")
        if at & 63:
            raise InvalidArgument("base", base, "a multiple of 64")
        for i in range(memory.ram.n_regions):
            if memory.ram.regions[i].base <= at <= memory.ram.regions[i].last:
                region = &memory.ram.regions[i]
        if region == NULL or region.last - at < n - 1:
            raise InvalidArgument("base", base, text=(
                f"base {at:#x}, size {n:#x}: the range is not in one region of the memory"))
        if not region.writable:
            raise InvalidArgument("base", base, text=f"base {at:#x}: the region is read-only")
        k = 64 - <uint64_t>clz(n - 1)
        p.n_orders = <int>(64 - <uint64_t>clz(n)) - SMALLEST_LG2
        p.origin = at & ~low_mask(max(k, <uint64_t>FRAME_LG2))
        p.base = at
        p.size = n
        end = at + n
        total = 0
        for i in range(p.n_orders):
            bits = ((end - p.origin - 1) >> (SMALLEST_LG2 + i)) + 1
            total += (bits + 63) >> 6
            p.orders[i].n_summaries = 0
            while True:
                bits = (bits + 63) >> 6
                total += bits
                p.orders[i].n_summaries += 1
                if bits == 1:
                    break
        p.n_frames = ((end - p.origin - 1) >> FRAME_LG2) + 1
        p.arena_size = total * 8 + p.n_frames * sizeof(Frame)
        p.arena = map_zeros(p.arena_size)
        if p.arena == MAP_FAILED:
            p.arena = NULL
            raise MemoryError(f"no host memory to keep account of {n:#x} bytes")
        arena = <uint64_t*>p.arena
        for i in range(p.n_orders):
            bits = ((end - p.origin - 1) >> (SMALLEST_LG2 + i)) + 1
            p.orders[i].taken = arena
            arena += (bits + 63) >> 6
            for j in range(p.orders[i].n_summaries):
                bits = (bits + 63) >> 6
                p.orders[i].free[j] = arena
                arena += bits
        p.frames = <Frame*>arena
        while at < end:
            k = 63 - <uint64_t>clz(end - at)
            if at != p.origin:
                k = min(k, <uint64_t>ctz(at - p.origin))
            order_add(&p.orders[k - SMALLEST_LG2], (at - p.origin) >> k)
            at += <uint64_t>1 << k
        p.fail_after = -1
        p.host = <uint64_t><size_t>region.data - region.base
        p.plain = region.data != NULL and not p.host & 7
        p.touched = region.touched
        p.region = region.base
        port_open(&p.access.port, &memory.ram, NULL)
        self.memory = memory
        memory.exports += 1

    def __dealloc__(self):
        if self.c.arena != NULL:
            munmap(self.c.arena, self.c.arena_size)
        if self.memory is not None:
            self.memory.exports -= 1

    cdef int _check(self) except -1:
        """Raise what kept the memory from being written."""
        error = failure_of(&self.c.access)
        if error is not None:
            raise error
        return 0

    def alloc(self, size):
        """Hand out a block of zeros, and return its address.

        Parameters
        ----------
        size : int
            In bytes; rounded up to a power of two, 64 at least.

        Raises
        ------
        OutOfMemory
            No block of that size is left.
        InvalidArgument, TypeError
            The size is 0, negative or no integer.
        InputOutput, Exception
            The memory refused to be written, or what its callback raised.
        """
        cdef unsigned int lg2 = <unsigned int>size_lg2(size, self.c.size)
        cdef uint64_t address = 0
        if pages_alloc(&self.c, lg2, &address):
            raise OutOfMemory("size", size, text=(
                f"no block of {<uint64_t>1 << lg2:#x} bytes is left; {self.c.in_use:#x} of "
                f"{self.c.size:#x} are in use"))
        self.memory.ram.users += 1
        pages_zero(&self.c, &self.c.access, address, <uint64_t>1 << lg2)
        self.memory.ram.users -= 1
        try:
            self._check()
        except BaseException:
            pages_free(&self.c, address, lg2)
            raise
        return address

    def free(self, address, size):
        """Take a block back.

        Parameters
        ----------
        address, size : int
            What `alloc` returned, and a size that is rounded up to the same power of two.

        Raises
        ------
        InvalidArgument
            No block of that size was handed out there, or it was taken back already.
        """
        cdef uint64_t at = number("address", address), n = number("size", size)
        if (n == 0 or n > self.c.size
                or pages_free(&self.c, at, <unsigned int>size_lg2(size, self.c.size))):
            raise InvalidArgument("address", address, text=(
                f"address {at:#x}, size {n:#x}: no such block was handed out"))

    def fail_after(self, n):
        """Let an allocation fail as if no memory were left, once; for tests of what then happens.

        Parameters
        ----------
        n : int or None
            How many succeed before it: 0 is the very next one.  None: none fails.
        """
        cdef uint64_t count
        if n is None:
            self.c.fail_after = -1
            return
        count = number("n", n)
        if count >> 62:
            raise InvalidArgument("n", n, "0 to 2^62 - 1, or None")
        self.c.fail_after = <int64_t>count

    def _handed_out(self):
        """List the blocks that are handed out, in order: address and log2 of the size."""
        cdef PagesC* p = &self.c
        cdef uint64_t at = p.base, end = p.base + p.size, i
        cdef int k
        cdef list blocks = []
        while at < end:
            for k in range(p.n_orders):
                i = (at - p.origin) >> (SMALLEST_LG2 + k)
                if (at - p.origin) & low_mask(SMALLEST_LG2 + k):
                    continue
                if bit_of(p.orders[k].taken, i):
                    blocks.append((at, SMALLEST_LG2 + k))
                    break
                if bit_of(p.orders[k].free[0], i):
                    break
            at += <uint64_t>1 << (SMALLEST_LG2 + k)
        return blocks

    @classmethod
    def _restored(cls, memory, base, size, blocks):
        """Pages of a copied memory with the same blocks handed out, whose contents stay."""
        cdef Pages self = cls(memory, base, size)
        for address, lg2 in blocks:
            if pages_claim(&self.c, address, lg2):
                raise InvalidArgument("blocks", address, "free blocks of the range")
        return self

    @property
    def in_place(self):
        """Whether descriptors are read and written in place."""
        return bool(self.c.plain)

    @property
    def base(self):
        """First address of the range."""
        return self.c.base

    @property
    def size(self):
        """Bytes of the range."""
        return self.c.size

    @property
    def in_use(self):
        """Bytes that are handed out, as rounded up."""
        return self.c.in_use

    @property
    def blocks(self):
        """How many blocks are handed out."""
        return self.c.blocks
