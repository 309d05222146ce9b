"""Tables of one stage: down to a leaf, and the update of a descriptor (DDI 0487 D8)."""

from libc.stdint cimport uint8_t, uint64_t

from smmufast._facts.bits cimport le64, likely, load64, swap64, unlikely
from smmufast._engine.memory cimport FETCH_ABORT, FETCH_OK, Port, fetch8, port_swap8
from smmufast._facts.types cimport FETCH_S2TT, FETCH_S2TT_UPDATE, NO_LEVEL, Half
from smmufast._rules.vmsa cimport (
    DESC_INVALID, DESC_LEAF, DESC_RESERVED, DESC_TABLE, TABLE, descriptor_kind, entry_address,
    next_table,
)
from smmufast._facts.why cimport *
from smmufast._engine.chain cimport AT_TABLE, CHANGED, Leaf


# --- tables of one stage ---

# Where a walk is: a table whose entries cover 2^shift bytes, and what led there.
cdef struct Descent:
    uint64_t table
    uint64_t tables        # hierarchical attributes above it, to be masked with half.keep
    uint64_t above         # the table above it, 0 if it is where the descent started
    uint64_t tables_above
    uint64_t address       # of the last descriptor read
    uint64_t raw           # the last descriptor, as it lies in memory
    unsigned int shift


# How a descent ends, besides FETCH_ABORT and negative stops.
cdef enum:
    AT_PAGES = 0     # in a table of level 3; nothing of it was read
    AT_OTHER = 2     # at a descriptor that is no ordinary table: a leaf, or a fault


cdef inline int why_of_stage(int why, int kind) noexcept nogil:
    """The reason of the stage that a kind of fetch belongs to, from that of stage 1."""
    return why + ((kind == FETCH_S2TT or kind == FETCH_S2TT_UPDATE) << 8)


cdef inline int why_no_leaf(unsigned int descriptor, int kind) noexcept nogil:
    """Why a descriptor that is no leaf and no good table ends a walk."""
    if descriptor == DESC_INVALID:
        return why_of_stage(WHY_S1_INVALID, kind)
    return why_of_stage(
        WHY_S1_RESERVED if descriptor == DESC_RESERVED else WHY_S1_TABLE, kind)


cdef inline int level_of(const Half* half, unsigned int shift) noexcept nogil:
    """The level whose entries cover 2^shift bytes."""
    return 3 - <int>((shift - half.granule) // half.stride)


# S3.4-24, S5-1, V8.2.5.2-4
cdef inline uint64_t descriptor(const Half* half, uint64_t raw, bint simple) noexcept nogil:
    """A descriptor in host order, from its bytes in memory; the reverse is the same."""
    return swap64(le64(raw)) if not simple and half.swap else le64(raw)


cdef inline int descend(
        const Half* half, Port* port, int kind, uint64_t ia, Descent* at,
        bint simple) noexcept nogil:
    """Follow ordinary tables from at.table down to level 3; their addresses are physical.

    `simple`: descriptors are little-endian and hold the address in place.
    """
    cdef uint64_t base = port.window.base
    cdef uint64_t span = port.window.span
    cdef const uint8_t* data = port.window.data
    cdef uint64_t expected = half.table_bits
    cdef uint64_t offset, d
    cdef unsigned int granule = half.granule
    cdef unsigned int stride = half.stride
    cdef int status
    at.above = at.tables_above = at.address = at.raw = 0
    while at.shift != granule:
        at.address = entry_address(half, at.table, ia, at.shift)
        offset = at.address - base
        if likely(offset <= span):
            at.raw = load64(data + offset)
        else:
            status = fetch8(port, kind, level_of(half, at.shift), at.address, &at.raw)
            if status:
                return status
            at.raw = le64(at.raw)
            base = port.window.base
            span = port.window.span
            data = port.window.data
        d = descriptor(half, at.raw, simple)
        if unlikely((d & expected) != TABLE):
            return AT_OTHER
        if not simple and next_table(d, half) & half.over:
            return AT_OTHER
        at.above = at.table
        at.tables_above = at.tables
        at.table = d & half.low_address if simple else next_table(d, half)
        at.tables |= d
        at.shift -= stride
    return AT_PAGES


cdef inline void leaf_none(Leaf* leaf) noexcept nogil:
    """Nothing was found."""
    leaf.d = leaf.desired = leaf.tables = leaf.entry = leaf.address = 0
    leaf.shift = leaf.perm = 0
    leaf.level = NO_LEVEL


cdef inline int find_leaf(
        const Half* half, Port* port, int kind, uint64_t ia, Descent* at, Leaf* leaf,
        bint simple) noexcept nogil:
    """Walk from at.table to the leaf of an address: 0, why not, or a negative stop."""
    cdef uint64_t d = 0
    cdef int status = descend(half, port, kind, ia, at, simple)
    leaf.level = 3
    leaf.entry = at.address
    if status == AT_PAGES:
        leaf.entry = entry_address(half, at.table, ia, at.shift)
        status = fetch8(port, kind, 3, leaf.entry, &d)
        d = descriptor(half, le64(d), simple)
    elif status == AT_OTHER:
        status = FETCH_OK
        d = descriptor(half, at.raw, simple)
        leaf.level = level_of(half, at.shift)
    if unlikely(status):
        return why_of_stage(WHY_S1_ABORT, kind) if status == FETCH_ABORT else status
    status = descriptor_kind(d, leaf.level, half.blocks)
    if unlikely(status != DESC_LEAF):
        return why_no_leaf(status, kind)
    leaf.tables = at.tables & half.keep
    leaf.d = d
    leaf.shift = at.shift
    return 0


cdef inline uint64_t update_expected(const Half* half, const Leaf* leaf) noexcept nogil:
    """What an update of a descriptor expects there, as a little-endian number."""
    return le64(descriptor(half, leaf.d, False))


cdef inline uint64_t update_desired(const Half* half, const Leaf* leaf) noexcept nogil:
    """What it stores."""
    return le64(descriptor(half, leaf.desired, False))


cdef inline int update_read(
        const Half* half, int kind, int status, uint64_t found, Leaf* leaf) noexcept nogil:
    """How an update ended that found this there: 0, CHANGED, why not, or a negative stop."""
    if status:
        return why_of_stage(WHY_S1_UPDATE_ABORT, kind) if status == FETCH_ABORT else status
    if found != update_expected(half, leaf):
        return CHANGED
    leaf.d = leaf.desired
    return 0


# S3.13-2, S3.13.4-1, S3.15-4, S4.7.3-17, V8.5.1.2-2, V8.5.2.1-4, V8.5.3-1, V8.5.4-1, V8.5.5-1
cdef inline int update(
        const Half* half, Port* port, int kind, Leaf* leaf) noexcept nogil:
    """Write leaf.desired in place of leaf.d, unless that changed: 0, CHANGED, why not, a stop."""
    cdef uint64_t found = 0
    cdef int status = port_swap8(
        port, kind, leaf.level, leaf.entry, update_expected(half, leaf),
        update_desired(half, leaf), &found)
    return update_read(half, kind, status, found, leaf)


# Where a walk goes on: at a table whose entries cover 2^shift bytes, below others.
cdef struct Place:
    uint64_t table
    uint64_t tables        # hierarchical attributes above it
    unsigned int shift


cdef inline int descriptor_read(
        const Half* half, int kind, int status, uint64_t raw, Leaf* leaf,
        uint64_t* table) noexcept nogil:
    """What a descriptor is, read at leaf.entry as a little-endian number.

    0 with a leaf; AT_TABLE with the next table; why it is neither; or a negative stop.
    """
    cdef uint64_t d
    if unlikely(status):
        return why_of_stage(WHY_S1_ABORT, kind) if status == FETCH_ABORT else status
    d = leaf.d = descriptor(half, le64(raw), False)
    status = descriptor_kind(d, leaf.level, half.blocks)
    if status == DESC_LEAF:
        return 0
    if status == DESC_TABLE:
        table[0] = next_table(d, half)
        if not table[0] & half.over:
            return AT_TABLE
    return why_no_leaf(status, kind)


cdef inline void descriptor_at(
        const Half* half, uint64_t address, unsigned int shift, Leaf* leaf) noexcept nogil:
    """The descriptor to be read next lies here, in a table whose entries cover 2^shift bytes."""
    leaf.entry = address
    leaf.level = level_of(half, shift)
    leaf.shift = shift


# S3.4.3-8, S16.7.4-3
cdef inline int read_descriptor(
        const Half* half, Port* port, int kind, Leaf* leaf, uint64_t* table) noexcept nogil:
    """Read the descriptor at leaf.entry; as descriptor_read()."""
    cdef uint64_t raw = 0
    cdef int status = fetch8(port, kind, leaf.level, leaf.entry, &raw)
    return descriptor_read(half, kind, status, raw, leaf, table)
