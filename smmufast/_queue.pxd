"""Queues in memory, GERROR and interrupts: the rules of rings, and how a record gets into one.

Sections: IHI 0070 3.5 (circular queues), 3.18 (interrupts), 5.5 (stalled faults), 7.2 (event
queue), 7.5 (global errors), 8 (page request queue), 6.3 (the registers of all of them).

Everything here runs without the GIL, in several threads at once, and again inside itself: a
callback that holds a queue may fault on its own.  A record's slot is taken under a short lock,
the record is written without it, and PROD moves when no record is being written any more.  So
software never sees a slot that is not filled, and nobody waits for a callback.
"""

from libc.stdint cimport uint32_t, uint64_t

from smmufast._bits cimport le64, load64, low_mask
from smmufast._core cimport (
    IRQ_CMDQ_SYNC, IRQ_EVENTQ, IRQ_GERROR, IRQ_PRIQ, IRQ_SEV, Core, Msi, Overtaking, Queues, Ring,
)
from smmufast._layout cimport cmdq_base_log2size, eventq_cons_ovackflg, eventq_prod_ovflg
from smmufast._memory cimport (
    ACCESS_EVENT, ACCESS_MSI, ACCESS_PRI, FETCH_ABORT, FETCH_OK, FETCH_RAISED, Port, Ram, port_open,
    port_write,
)
from smmufast._types cimport ACTION_STALL, Outcome, Request

cdef extern from *:
    """
    static inline void smmufast_lock(uint32_t *lock)
    {
        while (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE))
            while (__atomic_load_n(lock, __ATOMIC_RELAXED))
                ;
    }
    #define smmufast_unlock(lock) __atomic_store_n((lock), 0, __ATOMIC_RELEASE)
    #if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    #define smmufast_le32(x) (x)
    #else
    #define smmufast_le32(x) __builtin_bswap32(x)
    #endif
    """
    void lock_take "smmufast_lock"(uint32_t* lock) noexcept nogil
    void lock_give "smmufast_unlock"(uint32_t* lock) noexcept nogil
    uint32_t le32 "smmufast_le32"(uint32_t value) noexcept nogil


# Bits of GERROR and GERRORN (6.3.19).
cdef enum:
    GERROR_CMDQ_ERR = 1
    GERROR_EVENTQ_ABT_ERR = 4
    GERROR_PRIQ_ABT_ERR = 8
    GERROR_MSI_CMDQ_ABT_ERR = 16
    GERROR_MSI_EVENTQ_ABT_ERR = 32
    GERROR_MSI_PRIQ_ABT_ERR = 64
    GERROR_MSI_GERROR_ABT_ERR = 128


# --- rings (3.5.1) ---

cdef inline uint32_t ring_bits(unsigned int log2size) noexcept nogil:
    """The bits of a position: index and wrap."""
    return <uint32_t>low_mask(log2size + 1)


cdef inline uint32_t ring_index(uint32_t position, unsigned int log2size) noexcept nogil:
    return position & <uint32_t>low_mask(log2size)


cdef inline uint32_t ring_after(uint32_t position, unsigned int log2size) noexcept nogil:
    """The next position; the wrap bit is inverted when the index starts again."""
    return (position + 1) & ring_bits(log2size)


cdef inline uint32_t ring_count(
        uint32_t prod, uint32_t cons, unsigned int log2size) noexcept nogil:
    """Entries between CONS and PROD; more than the queue holds when one of them is nonsense."""
    return (prod - cons) & ring_bits(log2size)


cdef inline bint ring_full(uint32_t prod, uint32_t cons, unsigned int log2size) noexcept nogil:
    """No slot is free.  So it is too when CONS is nonsense: nothing may be overwritten then."""
    return ring_count(prod, cons, log2size) >= <uint32_t>1 << log2size


cdef inline uint64_t ring_base(
        uint64_t address, unsigned int log2size, unsigned int entry_lg2) noexcept nogil:
    """BASE.ADDR, aligned to the queue's size, 32 bytes at least (6.3.26)."""
    cdef unsigned int align = log2size + entry_lg2
    return address & ~low_mask(5 if align < 5 else align)


cdef inline uint64_t ring_entry(const Ring* ring, uint32_t position) noexcept nogil:
    """Address of the entry at a position."""
    return ring.base + (<uint64_t>ring_index(position, ring.log2size) << ring.entry_lg2)


# --- registers of a ring (6.3) ---

cdef inline void ring_forget(Ring* ring) noexcept nogil:
    """Let records that are being written be nobody's; the lock is held."""
    ring.epoch += 1
    ring.writers = 0
    ring.broken = False
    ring.next = ring.prod


cdef inline void ring_place(
        Queues* q, Ring* ring, uint64_t base, unsigned int largest,
        uint64_t address_mask) noexcept nogil:
    """BASE: where the queue lies and how many entries it has, `largest` at most.

    Address bits beyond OAS are truncated (S3.4.3-6).
    """
    cdef unsigned int log2size = <unsigned int>cmdq_base_log2size(base)
    if log2size > largest:
        log2size = largest
    lock_take(&q.lock)
    ring.log2size = log2size
    ring.base = ring_base(base & (address_mask | 32), log2size, ring.entry_lg2)
    ring.placed = True
    ring.prod &= ring_bits(log2size)
    ring.cons &= ring_bits(log2size)
    ring_forget(ring)
    lock_give(&q.lock)


cdef inline void ring_set_prod(Queues* q, Ring* ring, uint32_t value) noexcept nogil:
    lock_take(&q.lock)
    ring.prod = value & ring_bits(ring.log2size)
    ring.ovflg = eventq_prod_ovflg(value)
    ring_forget(ring)
    lock_give(&q.lock)


cdef inline void ring_set_cons(Queues* q, Ring* ring, uint32_t value) noexcept nogil:
    lock_take(&q.lock)
    ring.cons = value & ring_bits(ring.log2size)
    ring.ovackflg = eventq_cons_ovackflg(value)
    lock_give(&q.lock)


cdef inline void ring_reset(Queues* q, Ring* ring) noexcept nogil:
    """The queue as it is before software sets it up."""
    lock_take(&q.lock)
    ring.base = ring.prod = ring.cons = 0
    ring.log2size = ring.ovflg = ring.ovackflg = 0
    ring.placed = ring.enabled = False
    ring_forget(ring)
    lock_give(&q.lock)


# --- a record into a ring ---

cdef enum:
    PUT_CLOSED = 0    # the queue is disabled, or its error is active
    PUT_FULL = 1
    PUT_ABORTED = 2   # the write ended in an external abort
    PUT_WRITTEN = 3
    PUT_FIRST = 4     # beside one of these: the queue was empty and no longer is


# Who writes which record.
cdef struct Slot:
    uint32_t position
    uint32_t epoch
    uint64_t address


cdef inline int ring_state(const Queues* q, const Ring* ring) noexcept nogil:
    """Whether a record can be written: PUT_WRITTEN, or why not; the lock is held (S7.2.1-1)."""
    if not ring.enabled or ring.broken or (q.gerror ^ q.gerrorn) & ring.error:
        return PUT_CLOSED
    if (ring.blocks and ring.ovflg != ring.ovackflg
            or ring_full(ring.next, ring.cons, ring.log2size)):
        return PUT_FULL
    return PUT_WRITTEN


cdef inline bint ring_writable(Queues* q, const Ring* ring) noexcept nogil:
    cdef int status
    lock_take(&q.lock)
    status = ring_state(q, ring)
    lock_give(&q.lock)
    return status == PUT_WRITTEN


cdef inline int ring_take(Queues* q, Ring* ring, bint overflows, Slot* slot) noexcept nogil:
    """Take the next slot: PUT_WRITTEN, or why there is none; `overflows`: a loss is signalled."""
    cdef int status
    lock_take(&q.lock)
    status = ring_state(q, ring)
    if status == PUT_FULL:
        if overflows and ring.ovflg == ring.ovackflg:
            ring.ovflg ^= 1
    elif status == PUT_WRITTEN:
        slot.position = ring.next
        slot.epoch = ring.epoch
        slot.address = ring_entry(ring, ring.next)
        ring.next = ring_after(ring.next, ring.log2size)
        ring.writers += 1
    lock_give(&q.lock)
    return status


cdef inline int ring_give(Queues* q, Ring* ring, const Slot* slot, bint written) noexcept nogil:
    """A slot is filled, or could not be: how that leaves the queue (PUT_...).

    Records behind one that could not be written are lost with it: there are no gaps.
    """
    cdef int status = PUT_WRITTEN if written else PUT_ABORTED
    cdef uint32_t ahead, bits
    lock_take(&q.lock)
    if slot.epoch == ring.epoch:
        bits = ring_bits(ring.log2size)
        ahead = (slot.position - ring.prod) & bits
        if ring.broken and ahead > (ring.lost - ring.prod) & bits:
            if written:
                status = PUT_CLOSED
        elif not written:
            ring.broken = True
            ring.lost = slot.position
        ring.writers -= 1
        if ring.writers == 0:
            if ring.broken:
                ring.next = ring.lost
                ring.broken = False
            if ring.prod == ring.cons and ring.next != ring.prod:
                status |= PUT_FIRST
            ring.prod = ring.next
    lock_give(&q.lock)
    return status


cdef inline int ring_put(
        Queues* q, Ring* ring, Port* port, const uint64_t* record, bint overflows,
        int* status) noexcept nogil:
    """Write a record, or learn why not (PUT_...): 0, or FETCH_RAISED."""
    cdef Slot slot
    cdef uint64_t[4] w
    cdef int fetched
    cdef size_t i, size = <size_t>1 << ring.entry_lg2
    status[0] = ring_take(q, ring, overflows, &slot)
    if status[0] != PUT_WRITTEN:
        return 0
    for i in range(size // 8):
        w[i] = le64(record[i])
    fetched = port_write(
        port, ACCESS_EVENT if ring == &q.events else ACCESS_PRI, slot.address, w, size)
    status[0] = ring_give(q, ring, &slot, fetched == FETCH_OK)
    return fetched if fetched < 0 else 0


# --- interrupts and global errors (3.18, 7.5) ---

cdef inline bint gerror_toggle(Queues* q, uint32_t error) noexcept nogil:
    """Make an error active; no when it is already: then the new one is lost."""
    cdef bint inactive
    lock_take(&q.lock)
    inactive = ((q.gerror ^ q.gerrorn) & error) == 0
    if inactive:
        q.gerror ^= error
    lock_give(&q.lock)
    return inactive


cdef inline bint gerror_active(Queues* q, uint32_t error) noexcept nogil:
    return ((q.gerror ^ q.gerrorn) & error) != 0


cdef inline uint32_t gerror_acknowledge(Queues* q, uint32_t gerrorn) noexcept nogil:
    """GERRORN is written: the errors that were active and no longer are.

    It holds what was written.  So a bit that differs from GERROR's makes its error active, as
    7.5 defines that, also where software alone made them differ (S6.3.20-2).
    """
    cdef uint32_t before
    lock_take(&q.lock)
    before = q.gerror ^ q.gerrorn
    q.gerrorn = gerrorn
    lock_give(&q.lock)
    return before & ~(q.gerror ^ gerrorn)


cdef inline int msi_write(Port* port, uint64_t address, uint32_t data) noexcept nogil:
    """FETCH_OK, FETCH_ABORT or FETCH_RAISED."""
    data = le32(data)
    return port_write(port, ACCESS_MSI, address, &data, 4)


cdef inline int signal(Queues* q, Port* port, int irq, const Msi* msi) noexcept nogil:
    """An interrupt: its message, if there is one, and its wire as well: 0, or FETCH_RAISED.

    The wire is asserted whatever the message's address is, where there are wires (S3.18.2-2).
    Neither waits for the other: of two exceptions the first is told.
    """
    cdef int status = FETCH_OK
    if msi.sent:
        status = msi_write(port, msi.address, msi.data)
        if status == FETCH_ABORT:
            status = gerror_raise(q, port, msi.error)
    if q.wired and q.wire(q.owner, port, irq) < 0:
        status = FETCH_RAISED
    return status


cdef inline int interrupt(Queues* q, Port* port, int irq) noexcept nogil:
    """The interrupt of a source that IRQ_CTRL may enable: 0, or FETCH_RAISED."""
    cdef Msi msi = q.msi[irq]
    return signal(q, port, irq, &msi) if msi.enabled else 0


cdef inline int gerror_raise(Queues* q, Port* port, uint32_t error) noexcept nogil:
    """Report a global error and interrupt: 0, or FETCH_RAISED."""
    if not gerror_toggle(q, error) or error == GERROR_MSI_GERROR_ABT_ERR:
        return 0
    return interrupt(q, port, IRQ_GERROR)


cdef inline int ring_signal(
        Queues* q, Port* port, const Ring* ring, int irq, int put, bint wanted) noexcept nogil:
    """What follows from how ring_put ended: 0, or FETCH_RAISED; `wanted`: it interrupts."""
    cdef int status = 0
    if wanted:
        status = interrupt(q, port, irq)
    if put & 3 == PUT_ABORTED and gerror_raise(q, port, ring.error) < 0:
        status = FETCH_RAISED
    return status


# --- walks that invalidations overtake (3.21.1, 3.21.3, 4.7.3) ---
# Which of its reads an invalidation makes old is not asked: every walk under way is overtaken.

cdef inline void overtake(Core* core) noexcept nogil:
    """A CFGI or TLBI command is consumed: what was read before is not kept from now on."""
    cdef Overtaking* o = &core.overtaking
    lock_take(&core.queues.lock)
    o.commands += 1
    o.overtaken += o.holders
    o.holders = 0
    lock_give(&core.queues.lock)


cdef inline void overtake_all(Core* core) noexcept nogil:
    """SMMUEN is cleared: walks start again, and then find it so (6.3.9.6)."""
    cdef Overtaking* o = &core.overtaking
    lock_take(&core.queues.lock)
    o.commands += 1
    o.synced = o.stopped = o.commands
    o.holders = o.overtaken = 0
    lock_give(&core.queues.lock)


cdef inline bint sync_waits(Core* core) noexcept nogil:
    """A CMD_SYNC has to wait for walks that hold it."""
    cdef Overtaking* o = &core.overtaking
    cdef bint waits
    lock_take(&core.queues.lock)
    waits = o.overtaken != 0
    lock_give(&core.queues.lock)
    return waits


cdef inline void sync_done(Core* core) noexcept nogil:
    """A CMD_SYNC is complete: walks that an invalidation before it overtook start again."""
    lock_take(&core.queues.lock)
    core.overtaking.synced = core.overtaking.commands
    lock_give(&core.queues.lock)


cdef inline uint64_t walk_enter(Core* core, bint holds) noexcept nogil:
    """A walk begins, or begins again: what it remembers of that."""
    cdef Overtaking* o = &core.overtaking
    cdef uint64_t begun
    lock_take(&core.queues.lock)
    begun = o.commands
    o.holders += holds
    lock_give(&core.queues.lock)
    return begun


cdef inline bint walk_leave(Core* core, uint64_t begun) noexcept nogil:
    """A walk that holds CMD_SYNC ends: whether it was the last one that was overtaken."""
    cdef Overtaking* o = &core.overtaking
    cdef bint last = False
    lock_take(&core.queues.lock)
    if begun == o.commands:
        o.holders -= o.holders != 0
    elif begun >= o.stopped and o.overtaken:
        o.overtaken -= 1
        last = o.overtaken == 0
    lock_give(&core.queues.lock)
    return last


cdef inline bint walk_again(const Core* core, uint64_t begun, bint holds) noexcept nogil:
    """A walk that began then has to start again."""
    cdef const Overtaking* o = &core.overtaking
    return begun < load64(&o.stopped if holds else &o.synced)


# --- the event queue (7.2) ---

cdef inline int event_signal(Queues* q, Port* port, int put) noexcept nogil:
    """What follows from how ring_put ended for the event queue: 0, or FETCH_RAISED."""
    return ring_signal(q, port, &q.events, IRQ_EVENTQ, put, put & PUT_FIRST)


cdef inline int event_put(
        Core* core, Port* port, const uint64_t* record, bint* written) noexcept nogil:
    """Write a record into the event queue, with its interrupt: 0, or FETCH_RAISED."""
    cdef Queues* q = core.queues
    cdef Port own  # the caller's may be that of a trace
    cdef int put = PUT_CLOSED
    cdef int status
    port_open(&own, core.ram, NULL)
    status = ring_put(q, &q.events, &own, record, True, &put)
    written[0] = put & 3 == PUT_WRITTEN
    if status == 0:
        status = event_signal(q, &own, put)
    if status < 0:
        port.exception = own.exception
    return status


cdef inline int event_deliver(
        Core* core, Port* port, const Request* request, Outcome* outcome) noexcept nogil:
    """Write the record of a fault into the event queue, or hold the transaction as a stall.

    0, or FETCH_RAISED with an exception in the port.  `outcome.event` becomes 0 when the record
    is discarded, or has to wait; a stall that a callback ends meanwhile leaves its final outcome.
    While no event queue was placed, records stay in the outcome alone.
    """
    cdef bint written = False
    cdef int status
    if outcome.action == ACTION_STALL:
        return core.queues.stall(core.owner, port, request, outcome)
    if outcome.event == 0 or not core.queues.events.placed:
        return 0
    status = event_put(core, port, outcome.record, &written)
    if not written:
        outcome.event = 0
    return status
