"""Blocks of memory: powers of two bytes, aligned to their size, out of one range.

Not architectural.  Which blocks are free is in the host's memory, so that nothing that is written
to the range changes it.  The caller of any function holds the GIL, or a lock that every other
caller holds.  Blocks are joined only when there is none that is large enough: what is given back
and taken again, as tables are, costs a few instructions.
"""

from cpython.ref cimport Py_DECREF
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from smmufast._facts.bits cimport le64, low_mask
from smmufast._engine.memory cimport (
    ACCESS_HOST, FETCH_ABORT, TOUCHED_LG2, Port, port_open, port_read, port_write,
)

cdef extern from *:
    """
    #define smmufast_host(address) ((void *)(uintptr_t)(address))
    """
    void* host_pointer "smmufast_host"(uint64_t address) noexcept nogil

cdef extern from * nogil:
    int ctz "__builtin_ctzll"(uint64_t) noexcept
    int clz "__builtin_clzll"(uint64_t) noexcept


cdef enum:
    SMALLEST_LG2 = 6      # of a block
    MOST_ORDERS = 39      # blocks of 2^6 to 2^44 bytes
    MOST_SUMMARIES = 7    # bits, words of bits, words of words...
    FRAME_LG2 = 12


# Free blocks of one size: a bit for each, and levels of bits that tell which words are not zero.
cdef struct Order:
    uint64_t* free[MOST_SUMMARIES]
    int n_summaries
    uint64_t* taken        # bits of blocks of this size that were handed out


# The table that starts in 4 KiB of memory, as its page table knows it.
cdef struct Frame:
    uint32_t owner         # 0: none starts here
    uint32_t before        # other tables of the owner: number of their frame + 1
    uint32_t after
    uint32_t next          # in a list of tables to be given back, or to be used
    uint16_t entries       # valid descriptors, as far as map and unmap know
    uint8_t level
    uint8_t noted          # among the notes of the tree


cdef enum:
    ACCESS_NO_MEMORY = -100  # Access.status: the host has none to go on with


# How one owner reads and writes memory that is not plain.
cdef struct Access:
    Port port
    int status             # how an access failed first; none is made after it


cdef struct PagesC:
    Access access
    bint plain             # the host's address of a byte is `host` + its address
    uint64_t host
    uint8_t* touched       # as Region.touched, or NULL
    uint64_t region        # base of the region
    uint64_t base
    uint64_t size
    uint64_t origin        # where blocks are counted from; aligned to the largest
    int n_orders
    Order[MOST_ORDERS] orders
    Frame* frames
    uint64_t n_frames
    uint32_t tags          # how many page tables have had theirs
    uint64_t in_use
    uint64_t blocks
    int64_t fail_after     # negative: never
    void* arena            # where orders and frames lie
    size_t arena_size


cdef inline bint bit_of(const uint64_t* bits, uint64_t i) noexcept nogil:
    return bits[i >> 6] >> (i & 63) & 1


cdef inline void order_add(Order* order, uint64_t i) noexcept nogil:
    """A block is free."""
    cdef int k
    cdef uint64_t before
    for k in range(order.n_summaries):
        before = order.free[k][i >> 6]
        order.free[k][i >> 6] = before | <uint64_t>1 << (i & 63)
        if before:
            return
        i >>= 6


cdef inline void order_drop(Order* order, uint64_t i) noexcept nogil:
    """A block is not free any more."""
    cdef int k
    for k in range(order.n_summaries):
        order.free[k][i >> 6] &= ~(<uint64_t>1 << (i & 63))
        if order.free[k][i >> 6]:
            return
        i >>= 6


cdef inline bint order_empty(const Order* order) noexcept nogil:
    return order.free[order.n_summaries - 1][0] == 0


cdef inline uint64_t order_first(const Order* order) noexcept nogil:
    """The lowest free block; there is one."""
    cdef uint64_t i = 0
    cdef int k = order.n_summaries
    while k:
        k -= 1
        i = i << 6 | <uint64_t>ctz(order.free[k][i])
    return i


cdef inline void pages_join(PagesC* p, int last) noexcept nogil:
    """Make one free block of two that are halves of it, in all orders below `last`."""
    cdef int k
    cdef Order* order
    cdef uint64_t i, summary, word, pairs, n_words
    for k in range(last):
        order = &p.orders[k]
        n_words = 1 if order.n_summaries == 1 else (
            ((p.base + p.size - p.origin - 1) >> (SMALLEST_LG2 + k)) >> 6) + 1
        i = 0
        while i < n_words:
            if order.n_summaries > 1:  # the next word that holds a free block
                summary = order.free[1][i >> 6] >> (i & 63)
                if summary == 0:
                    i = (i | 63) + 1
                    continue
                i += <uint64_t>ctz(summary)
            word = order.free[0][i]
            pairs = word & word >> 1 & 0x5555555555555555ULL
            while pairs:
                word = i << 6 | <uint64_t>ctz(pairs)
                pairs &= pairs - 1
                order_drop(order, word)
                order_drop(order, word + 1)
                order_add(&p.orders[k + 1], word >> 1)
            i += 1


cdef inline int pages_alloc(PagesC* p, unsigned int lg2, uint64_t* address) noexcept nogil:
    """Hand out 2^lg2 bytes, aligned to as much, with whatever they hold; -1 when none are left.

    Free blocks are joined only when there is no block that is large enough.
    """
    cdef int want = <int>lg2 - SMALLEST_LG2, k, attempt
    cdef uint64_t i, at
    if p.fail_after >= 0:
        p.fail_after -= 1
        if p.fail_after < 0:
            return -1
    for attempt in range(2):
        for k in range(want, p.n_orders):
            if order_empty(&p.orders[k]):
                continue
            i = order_first(&p.orders[k])
            order_drop(&p.orders[k], i)
            while k > want:
                k -= 1
                i <<= 1
                order_add(&p.orders[k], i + 1)
            p.orders[k].taken[i >> 6] |= <uint64_t>1 << (i & 63)
            at = p.origin + (i << lg2)
            address[0] = at
            p.in_use += <uint64_t>1 << lg2
            p.blocks += 1
            if p.touched != NULL:
                for i in range((at - p.region) >> TOUCHED_LG2,
                               ((at + (<uint64_t>1 << lg2) - 1 - p.region) >> TOUCHED_LG2) + 1):
                    p.touched[i] = 1
            return 0
        if attempt == 0:
            pages_join(p, p.n_orders - 1)
    return -1


cdef inline int pages_claim(PagesC* p, uint64_t address, unsigned int lg2) noexcept nogil:
    """Hand out one certain block of 2^lg2 bytes, as pages_alloc; -1 if no free block holds it."""
    cdef int want = <int>lg2 - SMALLEST_LG2, k
    cdef uint64_t i
    if (want < 0 or want >= p.n_orders or address < p.base or address - p.base >= p.size
            or address & low_mask(lg2)):
        return -1
    for k in range(want, p.n_orders):
        i = (address - p.origin) >> (SMALLEST_LG2 + k)
        if not bit_of(p.orders[k].free[0], i):
            continue
        order_drop(&p.orders[k], i)
        while k > want:
            k -= 1
            i = (address - p.origin) >> (SMALLEST_LG2 + k)
            order_add(&p.orders[k], i ^ 1)  # the half that it is not in
        p.orders[want].taken[i >> 6] |= <uint64_t>1 << (i & 63)
        p.in_use += <uint64_t>1 << lg2
        p.blocks += 1
        return 0
    return -1


cdef inline int pages_free(PagesC* p, uint64_t address, unsigned int lg2) noexcept nogil:
    """Take back what pages_alloc handed out for this size; -1 if it did not."""
    cdef int k = <int>lg2 - SMALLEST_LG2
    cdef uint64_t i = (address - p.origin) >> lg2
    if (k < 0 or k >= p.n_orders or address < p.base or address - p.base >= p.size
            or address & low_mask(lg2) or not bit_of(p.orders[k].taken, i)):
        return -1
    p.orders[k].taken[i >> 6] &= ~(<uint64_t>1 << (i & 63))
    order_add(&p.orders[k], i)
    p.in_use -= <uint64_t>1 << lg2
    p.blocks -= 1
    return 0


cdef inline void pages_zero(
        PagesC* p, Access* access, uint64_t address, uint64_t size) noexcept nogil:
    """Write zeros; where that fails, at the second try too, the access says how."""
    cdef uint64_t[64] zeros
    cdef uint64_t n
    cdef int _try
    if p.plain:
        memset(<void*>host_pointer(p.host + address), 0, size)
        return
    memset(zeros, 0, sizeof(zeros))
    while size and not access.status:
        n = min(size, <uint64_t>sizeof(zeros))
        for _try in range(2):
            access.status = port_write(&access.port, ACCESS_HOST, address, zeros, n)
            if access.status != FETCH_ABORT:
                break
        address += n
        size -= n


cdef inline uint64_t load_slow(Access* access, uint64_t address) noexcept nogil:
    """Read a descriptor through the port; 0 once an access failed."""
    cdef uint64_t d = 0
    if not access.status:
        access.status = port_read(&access.port, ACCESS_HOST, address, &d, 8)
    return 0 if access.status else le64(d)


cdef inline void store_slow(Access* access, uint64_t address, uint64_t d) noexcept nogil:
    """Write a descriptor through the port, unless an access failed."""
    d = le64(d)
    if not access.status:
        access.status = port_write(&access.port, ACCESS_HOST, address, &d, 8)


cdef inline void store_twice(Access* access, uint64_t address, uint64_t d) noexcept nogil:
    """The same, and once more when it is refused."""
    if not access.status:
        store_slow(access, address, d)
        if access.status == FETCH_ABORT:
            access.status = 0
            store_slow(access, address, d)


cdef inline void access_open(Access* access, Access* like) noexcept nogil:
    """Another access to the same memory, which has not failed."""
    port_open(&access.port, like.port.ram, NULL)
    access.status = 0


cdef inline void access_drop(Access* access) noexcept nogil:
    """Forget how an access failed."""
    access.status = 0
    if access.port.exception != NULL:
        with gil:
            Py_DECREF(<object>access.port.exception)
        access.port.exception = NULL


cdef inline bint holds(Access* access, uint64_t address, uint64_t d) noexcept nogil:
    """Whether memory has a descriptor whose store failed: a callback may store, and then raise."""
    cdef Access own
    cdef bint found
    access_open(&own, access)
    found = load_slow(&own, address) == d and not own.status
    access_drop(&own)
    return found


cdef inline bint put_back(Access* access, uint64_t address, uint64_t d) noexcept nogil:
    """Write a descriptor that must not be lost, at the third try if need be; whether it is so."""
    cdef Access own
    cdef int _try
    for _try in range(3):
        access_open(&own, access)
        store_slow(&own, address, d)
        if not own.status:
            return True
        access_drop(&own)
        if holds(access, address, d):
            return True
    return False
