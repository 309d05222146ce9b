"""Page tables as a driver writes them: what the entries say, and the way down to one of them.

Sections: DDI 0487 D8.2 (geometry), D8.3 (descriptors), D8.6 (attributes); the contents follow what
Linux writes.  Not architectural: where tables lie (pages.pxd), and what is kept about them.
Nothing here is shared with the walker of the hardware half, whose rules are in _rules/vmsa.pxd:
that the two agree is the test.

Memory holds the mappings and nothing else does.  What the host keeps of a table (Frame) is that it
is one and of whom, as an operating system does of its pages: so a descriptor that somebody else
wrote never makes a page table read, write or give back what is not its own.

Numbers of levels are Arm's, 0 to 3.  `d` is a descriptor in host byte order, `at` and `iova` are
input addresses, `table` the physical address of a table, `entry` that of a descriptor.
"""

from cpython.pythread cimport PyThread_type_lock
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from smmufast._facts.bits cimport le64, likely, load64, low_mask, unlikely
from smmufast._facts.layout cimport PTE_S1_AP2, PTE_S1_CONTIGUOUS, PTE_S1_DBM, PTE_S1_VALID
from smmufast._engine.memory cimport Memory
from smmufast._driver.pages cimport (
    FRAME_LG2, Access, Frame, PagesC, host_pointer, load_slow, put_back, store_slow, store_twice,
)

cdef extern from *:
    """
    #define smmufast_store64(p, v) \
        __atomic_store_n((uint64_t *)(uintptr_t)(p), (v), __ATOMIC_RELAXED)
    #define smmufast_publish64(p, v) \
        __atomic_store_n((uint64_t *)(uintptr_t)(p), (v), __ATOMIC_RELEASE)
    #define smmufast_exchange64(p, v) \
        __atomic_exchange_n((uint64_t *)(uintptr_t)(p), (v), __ATOMIC_ACQ_REL)
    #define smmufast_or64(p, v) \
        __atomic_fetch_or((uint64_t *)(uintptr_t)(p), (v), __ATOMIC_ACQ_REL)
    """
    void store64 "smmufast_store64"(uint64_t p, uint64_t value) noexcept nogil
    void publish64 "smmufast_publish64"(uint64_t p, uint64_t value) noexcept nogil
    uint64_t exchange64 "smmufast_exchange64"(uint64_t p, uint64_t value) noexcept nogil
    uint64_t or64 "smmufast_or64"(uint64_t p, uint64_t value) noexcept nogil


cdef extern from "_facts/descriptor.h":
    const uint64_t TABLE "SMMUFAST_TABLE"  # of a table, or of a page at level 3


cdef enum:
    NOTES = 80            # capacity; never more than 64 at the start of a call
    LONGEST_RUN = 128     # entries that a contiguous hint joins

    # what stands in a descriptor
    KIND_HOLE = 0
    KIND_LEAF = 1
    KIND_TABLE = 2
    KIND_FOREIGN = 3      # a table descriptor that names what is no table of this tree

    # Frame.owner is the tree's tag, and the level of a table that is linked, or
    UNLINKED = 4

# --- page tables ---

# A table that became empty in pieces.
cdef struct Note:
    uint64_t iova
    int level


# A descriptor that an unmap took away.
cdef struct Taken:
    uint64_t table
    uint64_t entry
    uint64_t d
    uint64_t iova
    uint64_t mapped        # bytes that it mapped, or that the table did
    int level


# What one unmap took away, to be put back if memory that is not plain refuses the rest.
cdef struct Journal:
    Taken* taken
    size_t count
    size_t capacity


cdef struct Tree:
    PagesC* pages
    Journal* journal       # of the unmap under way; NULL in plain memory
    Access* access         # for memory that is not plain
    bint plain             # copies of what pages have
    uint64_t host
    Frame* frames
    uint64_t origin
    uint64_t n_frames
    uint64_t root          # 0: none
    uint64_t root_bytes
    uint32_t tag
    uint32_t tables        # frame + 1 of the first of all tables but the root
    uint8_t start          # level of the root
    uint8_t granule        # lg2
    uint8_t stride         # index bits of a level
    uint8_t[4] shift       # input bits below an entry of a level
    uint8_t[4] run_lg2     # entries that a contiguous hint joins; 0: there is none
    uint8_t leaves         # bit level: a block or page is legal there
    uint8_t used           # bit level: map() uses them
    bint hints             # map() sets contiguous bits
    bint active            # hardware may have cached what is removed
    uint64_t offsets       # offset of the last entry of a table
    uint64_t root_offsets  # and of the root
    uint64_t unaligned     # address bits below the smallest page
    uint64_t input_last
    uint64_t output_last
    uint64_t low_address   # descriptor bits that are address bits in place
    uint64_t high_address  # those that are [51:48]
    uint64_t[64] attributes  # of a leaf, by prot
    uint64_t mapped        # bytes
    uint64_t table_bytes
    int n_notes
    Note[NOTES] notes


# The tables on the way to an entry, and the entry.
cdef struct Path:
    uint64_t[4] table      # by level
    uint64_t entry
    uint64_t d
    int level


# What was removed and is not flushed yet.
cdef struct Batch:
    uint64_t first
    uint64_t last
    unsigned int page_lg2  # 0: no range
    bint unlinked          # tables were removed too
    uint32_t tables        # those, as a list of frames


# A contiguous run that cannot stay one.
cdef struct Run:
    uint64_t table
    int level
    uint64_t entry         # the first
    uint64_t iova
    uint64_t n
    unsigned int shift
    uint64_t at            # what was to be removed when it was found
    int cuts               # how many were found then


cdef struct Segment:
    uint64_t pa
    uint64_t size


# An empty table that a block takes the place of.
cdef struct Conversion:
    uint64_t table         # where the entry is
    int level
    uint64_t entry
    uint64_t d
    uint64_t iova
    uint32_t tables        # once it is taken out: the list of tables that were, this one's first


cdef struct Plan:
    uint64_t[4] reached    # the tables to be made of a level reach so far
    uint64_t n_tables
    uint32_t tables        # these tables
    Conversion* conversions
    size_t n_conversions
    size_t capacity
    uint64_t where         # of a failure
    Path path


cdef inline uint64_t get(const Tree* t, uint64_t entry) noexcept nogil:
    """Read a descriptor."""
    if likely(t.plain):
        return le64(load64(host_pointer(t.host + entry)))
    return load_slow(t.access, entry)


cdef inline void put(const Tree* t, uint64_t entry, uint64_t d) noexcept nogil:
    """Write a descriptor as one store."""
    if likely(t.plain):
        store64(t.host + entry, le64(d))
    else:
        store_slow(t.access, entry, d)


cdef inline void publish(const Tree* t, uint64_t entry, uint64_t d) noexcept nogil:
    """Write a descriptor after everything that was written before."""
    if likely(t.plain):
        publish64(t.host + entry, le64(d))
    else:
        store_twice(t.access, entry, d)


cdef inline bint settle(const Tree* t, uint64_t entry, uint64_t d) noexcept nogil:
    """Write a descriptor when an access failed before; whether memory has it."""
    if t.plain:
        put(t, entry, d)
        return True
    return put_back(t.access, entry, d)


cdef inline uint64_t address_bits(const Tree* t, uint64_t pa) noexcept nogil:
    """An output or table address as a descriptor holds it; 64 KiB: [51:48] in [15:12]."""
    return pa & t.low_address | pa >> 36 & t.high_address


cdef inline uint64_t address_of(const Tree* t, uint64_t d) noexcept nogil:
    """The address that a descriptor holds."""
    return d & t.low_address | (d & t.high_address) << 36


cdef inline int kind_of(const Tree* t, uint64_t d, int level) noexcept nogil:
    """What hardware makes of a descriptor; a reserved code is a hole."""
    if level == 3:
        return KIND_LEAF if d & TABLE == TABLE else KIND_HOLE
    if d & TABLE == TABLE:
        return KIND_TABLE
    return KIND_LEAF if d & PTE_S1_VALID and t.leaves >> level & 1 else KIND_HOLE


cdef inline Frame* frame_of(const Tree* t, uint64_t table) noexcept nogil:
    """What is known of a table of the tree, other than the root."""
    return &t.frames[(table - t.origin) >> FRAME_LG2]


cdef inline bint foreign(const Tree* t, uint64_t table, int level) noexcept nogil:
    """No table of this level of the tree starts at this address."""
    cdef uint64_t i = (table - t.origin) >> FRAME_LG2
    return i >= t.n_frames or t.frames[i].owner != t.tag + <uint32_t>level


cdef inline uint64_t offset_of(const Tree* t, uint64_t iova, int level) noexcept nogil:
    """Where in its table the entry of an address is."""
    return iova >> t.shift[level] << 3 & (t.root_offsets if level == t.start else t.offsets)


cdef inline uint64_t entries_of(const Tree* t, int level) noexcept nogil:
    """How many entries a table has."""
    return ((t.root_offsets if level == t.start else t.offsets) >> 3) + 1


cdef inline uint64_t span_mask(const Tree* t, int level) noexcept nogil:
    """Input bits below a table of this level, which is not the root."""
    return low_mask(t.shift[level] + t.stride)


cdef inline int find_from(
        const Tree* t, uint64_t iova, int level, uint64_t table, int lowest,
        Path* p) noexcept nogil:
    """As find, from a table of a level on."""
    cdef int kind
    cdef unsigned int shift = t.shift[level]
    cdef uint64_t offset = offset_of(t, iova, level)
    while True:
        p.table[level] = table
        p.entry = table + offset
        p.d = get(t, p.entry)
        p.level = level
        kind = kind_of(t, p.d, level)
        if kind != KIND_TABLE or level == lowest:
            return kind
        table = address_of(t, p.d)
        level += 1
        if unlikely(foreign(t, table, level)):
            return KIND_FOREIGN
        shift -= t.stride
        offset = iova >> shift << 3 & t.offsets


cdef inline int find(const Tree* t, uint64_t iova, int lowest, Path* p) noexcept nogil:
    """Walk down to what is not a table, to level `lowest` at most; return its kind."""
    return find_from(t, iova, t.start, t.root, lowest, p)


cdef inline bint near(
        const Tree* t, const Path* p, uint64_t before, uint64_t iova) noexcept nogil:
    """The path to an address before names the table of level 2 of another one, too.

    Memory that is not plain is asked again, from the root on: it sees every access.
    """
    return (t.plain and t.start <= 2 and p.level >= 2
            and not (before ^ iova) >> t.shift[1])


cdef inline int find_next(
        const Tree* t, uint64_t iova, int lowest, bint is_near, Path* p) noexcept nogil:
    """As find, for one address after the other."""
    if is_near:
        return find_from(t, iova, 2, p.table[2], lowest, p)
    return find(t, iova, lowest, p)


cdef inline uint64_t translate(const Tree* t, uint64_t iova, int* kind) noexcept nogil:
    """Where an address goes, if it is a leaf that is found."""
    cdef int level = t.start
    cdef unsigned int shift = t.shift[level]
    cdef uint64_t d = get(t, t.root + (iova >> shift << 3)), table
    while True:
        kind[0] = kind_of(t, d, level)
        if kind[0] != KIND_TABLE:
            return address_of(t, d) & ~low_mask(shift) | iova & low_mask(shift)
        table = address_of(t, d)
        level += 1
        if unlikely(foreign(t, table, level)):
            kind[0] = KIND_FOREIGN
            return 0
        shift -= t.stride
        d = get(t, table + (iova >> shift << 3 & t.offsets))


cdef inline int leaf_level(const Tree* t, uint64_t iova, uint64_t pa, uint64_t size) noexcept nogil:
    """The level of the largest page that both addresses are aligned to and that is not too long."""
    cdef int level
    cdef uint64_t page
    for level in range(t.start, 3):
        page = <uint64_t>1 << t.shift[level]
        if t.used >> level & 1 and page <= size and not (iova | pa) & (page - 1):
            return level
    return 3


cdef inline uint64_t run_length(
        const Tree* t, uint64_t iova, uint64_t pa, uint64_t size, int level) noexcept nogil:
    """How many leaves of this level follow each other in one table, and in one piece of memory.

    A larger page can begin only where a table ends.  With 64 KiB, descriptors do not ascend across
    a multiple of 2^48.
    """
    cdef unsigned int shift = t.shift[level]
    cdef uint64_t n = entries_of(t, level) - (offset_of(t, iova, level) >> 3)
    if size >> shift < n:
        n = size >> shift
    if t.high_address and ((<uint64_t>1 << 48) - (pa & low_mask(48))) >> shift < n:
        n = ((<uint64_t>1 << 48) - (pa & low_mask(48))) >> shift
    return n


cdef class Pages:
    cdef PagesC c
    cdef readonly Memory memory
    cdef int _check(self) except -1


cdef class PageTable:
    cdef Tree tree
    cdef Batch own         # flushes that failed, or that are under way
    cdef Access access
    cdef readonly Pages pages
    cdef PyThread_type_lock lock
    cdef uint64_t forks    # how often the process had been forked when the lock was taken
    cdef unsigned long holder  # the thread that has the table, while state has BUSY
    cdef unsigned int state
    cdef uint64_t epoch    # how often all tables were given back
    cdef readonly bint contiguous
    cdef readonly bint dirty
    cdef readonly bint coherent
    cdef readonly bint fwb
    cdef readonly int stage
    cdef readonly int ias
    cdef readonly int oas
    cdef int _acquire(self) except -1
    cdef int _wait(self) except -1
    cdef int _open(self) except -1
    cdef int _open_to_map(self) except -1
    cdef int _take(self) except -1
    cdef int _give(self) except -1
    cdef int _make_root(self) except -1
    cdef void _give_all(self) noexcept
    cdef int _end(self, unsigned int state) except -1
    cdef object _failure(self)
    cdef int _check(self) except -1
    cdef void _owe(self) noexcept
    cdef int _sync(self, Batch* b) except -1
    cdef int _sync_surely(self, Batch* b) except -1
    cdef void _merge(self, Batch* b, const Batch* other) noexcept
    cdef object _stray(self, uint64_t iova, const Path* p)
    cdef object _refused(self, uint64_t iova, uint64_t pa, uint64_t size, uint64_t prot)
    cdef int _map(self, const Segment* segments, size_t count, uint64_t iova, uint64_t size,
                  uint64_t attributes) except -1
    cdef int _judge(self, int status, const Plan* plan) except -1
    cdef int _convert(self, Plan* plan) except -1
    cdef void _convert_back(self, Plan* plan, size_t done, Batch* b) noexcept
    cdef int _undo(self, uint64_t iova, uint64_t end) except -1
    cdef int _check_tables(self, uint64_t at, uint64_t end, bint stop) except -1
    cdef int _remove(self, uint64_t first, uint64_t end, uint64_t* at, Batch* b,
                     Run* run, Journal* journal) except -1
    cdef int _unmap_slow(self, uint64_t first, uint64_t end, uint64_t* at, Batch* b) except -1
    cdef int _break(self, const Run* run) except -1
    cdef uint64_t _write_run(self, const Run* run, const uint64_t* kept, uint64_t keep,
                             bint flushed) noexcept
    cdef int _reclaim(self) except -1
    cdef object _look_up(self, uint64_t at)


cdef class Gather:
    cdef readonly PageTable table
    cdef Batch batch
    cdef uint64_t epoch
    cdef void _renew(self) noexcept
