"""A block of a batch: its rows, in arrays and lanes."""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from smmufast._facts.bits cimport le64
from smmufast._engine.cached cimport translate_request
from smmufast._engine.core cimport Core
from smmufast._engine.memory cimport Port
from smmufast._engine.lookup cimport Memo
from smmufast._facts.types cimport BatchC, ColumnC, Outcome, Request
from smmufast._engine.vector cimport Lanes, Last, NearTable, Out


cdef enum:
    ROWS = 128        # SMMUFAST_ROWS
    WALKS = 32        # rows of a block whose upper levels are walked before the first leaf is read
    SHAPES = 7        # kinds of context told apart in one call
    SLOTS_LG2 = 13    # pairs remembered in one call, as SMMUFAST_HOME says
    PROBES = 8
    FULL = 2048       # slots that are filled; a pair that comes later finds its context each time
    REST = 64         # blocks whose pairs are not looked up after one that missed a quarter
    LEFT = 15         # Rows.shape: the scalar path looks the pair up in its turn
    FEW = 16          # rows that Lanes are worth
    QUIET = 8         # rows that write no memory before a block is set out again
    STREAK = 3        # rows that hit, so that more are expected to
    REST_MIN = 8      # rows for which vectors rest where they did something before
    REST_MAX = 256


# A decoded context.  Pairs that differ in tables and ASID alone have one shape.
cdef struct Shape:
    Memo memo                 # of the pair that had it first
    bint walks                # stage 1, and nothing else, translates
    uint64_t[8] keep_ste      # bits that an STE and a CD of this shape have in common
    uint64_t[8] keep_cd
    uint64_t[2] free_table    # bits of each TTB that they need not
    bint[2] laned             # lanes are filled in
    Lanes[2] lanes


# Where the walk of a pair begins, in one half of its addresses.
cdef struct Slot:
    uint64_t key              # slot_key(); with another epoch it is empty
    uint64_t first            # the first table, aligned, | 2 * shape + half, or LEFT


# Pairs, in open addressing.  It outlives a call, so that a call need not clear it.
cdef struct Pairs:
    uint64_t epoch            # 1 to 1023
    unsigned int filled       # slots in this epoch
    unsigned int rest         # blocks for which none is looked up, since few were found
    Slot[1 << SLOTS_LG2] slot


# The last two tables of the previous walk: [0] of pages, [1] the one above.
cdef struct Near:
    uint64_t first            # the table where that walk began
    uint64_t[2] tag           # address bits above the table's reach
    uint64_t[2] table
    uint64_t[2] tables        # hierarchical attributes of the tables above it
    unsigned int[2] reach
    unsigned int shape        # of that walk
    unsigned int moved        # walks of this block that ended in another last table
    bint trusted              # few of the last block did, so [0] is asked first


# A batch under way.
cdef struct Run:
    Core* core
    Port* port
    const BatchC* batch
    Pairs* pairs              # NULL: all rows are of one pair, which is shape[0]
    bint more                 # columns other than pa, action and event are wanted
    bint vector
    bint laned                # there are rows enough for Lanes to be filled in
    bint halves               # of one pair, bit 55 of the address selects the shape
    unsigned int shapes
    Shape[SHAPES] shape
    Memo memo                 # of the scalar path
    Near near
    Last last
    NearTable near_table
    bint direct               # columns as vector_near() wants them
    bint sequence             # the last rows stayed in one table
    Out out


cdef inline void near_forget(Near* near) noexcept nogil:
    near.shape = LEFT
    near.reach[0] = near.reach[1] = 1
    near.tag[0] = near.tag[1] = ~<uint64_t>0  # no address has it
    near.first = 0
    near.table[0] = near.table[1] = near.tables[0] = near.tables[1] = 0


cdef inline uint32_t load_u32(const ColumnC* column, size_t i) noexcept nogil:
    cdef uint32_t value
    memcpy(&value, <const char*>column.data + <ptrdiff_t>i * column.stride, 4)
    return value


cdef inline uint64_t load_u64(const ColumnC* column, size_t i) noexcept nogil:
    cdef uint64_t value
    memcpy(&value, <const char*>column.data + <ptrdiff_t>i * column.stride, 8)
    return value


cdef inline uint8_t load_u8(const ColumnC* column, size_t i) noexcept nogil:
    return (<const uint8_t*>column.data + <ptrdiff_t>i * column.stride)[0]


cdef inline void store_u8(const ColumnC* column, size_t i, unsigned int value) noexcept nogil:
    if column.data != NULL:
        (<uint8_t*>column.data + <ptrdiff_t>i * column.stride)[0] = <uint8_t>value


cdef inline void store_u16(const ColumnC* column, size_t i, uint16_t value) noexcept nogil:
    if column.data != NULL:
        memcpy(<char*>column.data + <ptrdiff_t>i * column.stride, &value, 2)


cdef inline void store_u64(const ColumnC* column, size_t i, uint64_t value) noexcept nogil:
    if column.data != NULL:
        memcpy(<char*>column.data + <ptrdiff_t>i * column.stride, &value, 8)


cdef inline void store_record(
        const ColumnC* column, size_t i, const uint64_t* record) noexcept nogil:
    """The record as it lies in memory, or zeros."""
    cdef uint64_t[4] w
    cdef int k
    if column.data != NULL:
        for k in range(4):
            w[k] = le64(record[k]) if record != NULL else 0
        memcpy(<char*>column.data + <ptrdiff_t>i * column.stride, w, 32)


cdef inline void store_outcome(const BatchC* batch, size_t i, const Outcome* o) noexcept nogil:
    """Write a row of the columns that are wanted."""
    store_u64(&batch.pa, i, o.pa)
    store_u8(&batch.action, i, o.action)
    store_u8(&batch.event, i, o.event)
    store_u8(&batch.fault, i, o.fault)
    store_u8(&batch.perm, i, o.perm)
    store_u8(&batch.level, i, <uint8_t>o.level)
    store_u8(&batch.page_lg2, i, o.page_lg2)
    store_u8(&batch.attr, i, o.attr)
    store_u8(&batch.sh, i, o.sh)
    store_u64(&batch.ipa, i, o.ipa)
    store_u8(&batch.stage, i, o.stage)
    store_record(&batch.record, i, <const uint64_t*>o.record if o.event else NULL)
    store_u16(&batch.why, i, o.why)


cdef inline void request_at(const BatchC* batch, size_t i, Request* request) noexcept nogil:
    request.iova = load_u64(&batch.iova, i)
    request.sid = load_u32(&batch.sid, i)
    request.ssid = load_u32(&batch.ssid, i)
    request.access = load_u8(&batch.access, i) & 7  # a caller may write there meanwhile
    request.reserved = 0


cdef inline int batch_scalar(
        Core* core, Port* port, Memo* memo, const BatchC* batch, size_t i) noexcept nogil:
    """One request of a batch by the scalar path."""
    cdef Request request
    cdef Outcome outcome
    cdef int status
    request_at(batch, i, &request)
    status = translate_request(core, port, &request, memo, &outcome)
    if status == 0:
        store_outcome(batch, i, &outcome)
    return status


ctypedef int (*ByOne)(Core*, Port*, Memo*, const BatchC*, size_t) noexcept nogil
