"""Queues in memory, GERROR and interrupts: the rules of rings, and how a record gets into one.

Sections: IHI 0070 3.5 (circular queues), 3.18 (interrupts), 5.5 (stalled faults), 7.2 (event
queue), 7.5 (global errors), 8 (page request queue), 6.3 (the registers of all of them).

Everything here runs without the GIL, in several threads at once, and again inside itself: a
callback that holds a queue may fault on its own.  A record's slot is taken under a short lock,
the record is written without it, and PROD moves when no record is being written any more.  So
software never sees a slot that is not filled, and nobody waits for a callback.  What follows from
a record (an overflow, an error, an interrupt) shows together with PROD, not before.
"""

from libc.stdint cimport uint32_t, uint64_t

from smmufast._facts.bits cimport le64, load64, low_mask
from smmufast._engine.core cimport (
    IRQ_CMDQ_SYNC, IRQ_EVENTQ, IRQ_GERROR, IRQ_PRIQ, IRQ_SEV, Core, Msi, Overtaking, Queues, Ring,
)
from smmufast._facts.layout cimport cmdq_base_log2size, eventq_cons_ovackflg, eventq_prod_ovflg
from smmufast._engine.memory cimport (
    ACCESS_EVENT, ACCESS_MSI, ACCESS_PRI, FETCH_ABORT, FETCH_OK, FETCH_RAISED, Port, Ram, port_open,
    port_write,
)
from smmufast._facts.types cimport ACTION_STALL, Outcome, Request

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


# --- global errors (7.5) ---

# S6.3.19-1
cdef inline bint gerror_active(const Queues* q, uint32_t error) noexcept nogil:
    return ((q.gerror ^ q.gerrorn) & error) != 0


cdef inline bint gerror_begin(Queues* q, uint32_t error) noexcept nogil:
    """Make an error active; no when it is already: then the new one is lost; the lock is held."""
    if gerror_active(q, error):
        return False
    q.gerror ^= error
    return True


# S6.3.19-2, S7.5-1
cdef inline bint gerror_toggle(Queues* q, uint32_t error) noexcept nogil:
    """Make an error active; no when it is already: then the new one is lost."""
    cdef bint begun
    lock_take(&q.lock)
    begun = gerror_begin(q, error)
    lock_give(&q.lock)
    return begun


# S6.3.20-1, S6.3.20-2
cdef inline uint32_t gerror_acknowledge(Queues* q, uint32_t gerrorn) noexcept nogil:
    """GERRORN is written: the errors that were active and no longer are.

    It holds what was written.  So a bit that differs from GERROR's makes its error active, as
    7.5 defines that, also where software alone made them differ (6.3.20).
    """
    cdef uint32_t before
    lock_take(&q.lock)
    before = q.gerror ^ q.gerrorn
    q.gerrorn = gerrorn
    lock_give(&q.lock)
    return before & ~(q.gerror ^ gerrorn)


# --- rings (3.5.1) ---

# S3.5.1-4, S6.3.27-2
cdef inline uint32_t ring_bits(unsigned int log2size) noexcept nogil:
    """The bits of a position: index and wrap."""
    return <uint32_t>low_mask(log2size + 1)


cdef inline uint32_t ring_index(uint32_t position, unsigned int log2size) noexcept nogil:
    return position & <uint32_t>low_mask(log2size)


# S3.5.1-2, S6.3.28-2
cdef inline uint32_t ring_after(uint32_t position, unsigned int log2size) noexcept nogil:
    """The next position; the wrap bit is inverted when the index starts again."""
    return (position + 1) & ring_bits(log2size)


# S3.5.1-5
cdef inline uint32_t ring_count(
        uint32_t prod, uint32_t cons, unsigned int log2size) noexcept nogil:
    """Entries between CONS and PROD; more than the queue holds when one of them is nonsense."""
    return (prod - cons) & ring_bits(log2size)


# S3.5.1-1, S3.5.1-6
cdef inline bint ring_full(uint32_t prod, uint32_t cons, unsigned int log2size) noexcept nogil:
    """No slot is free.  So it is too when CONS is nonsense: nothing may be overwritten then."""
    return ring_count(prod, cons, log2size) >= <uint32_t>1 << log2size


# S6.3.26-3, S6.3.26-4
cdef inline uint64_t ring_base(
        uint64_t address, unsigned int log2size, unsigned int entry_lg2) noexcept nogil:
    """BASE.ADDR, aligned to the queue's size, 32 bytes at least (6.3.26)."""
    cdef unsigned int align = log2size + entry_lg2
    return address & ~low_mask(5 if align < 5 else align)


cdef inline uint64_t ring_entry(const Ring* ring, uint32_t position) noexcept nogil:
    """Address of the entry at a position."""
    return ring.base + (<uint64_t>ring_index(position, ring.log2size) << ring.entry_lg2)


# --- registers of a ring (6.3) ---

cdef inline void ring_shown(Ring* ring) noexcept nogil:
    """No record is being written: nothing waits for PROD to move; the lock is held."""
    ring.last = 0
    ring.broken = ring.aborted = ring.overflowed = ring.last_lost = False


cdef inline void ring_forget(Ring* ring) noexcept nogil:
    """Let records that are being written be nobody's; the lock is held."""
    ring.epoch += 1
    ring.writers = 0
    ring.next = ring.prod
    ring_shown(ring)


# S3.4.3-6, S3.5.1-3, S6.3.26-1, S6.3.26-2, S6.3.26-5, S6.3.27-3, S6.3.29-1, S6.3.33-1, S8-5
cdef inline void ring_place(
        Queues* q, Ring* ring, uint64_t base, unsigned int largest,
        uint64_t address_mask) noexcept nogil:
    """BASE: where the queue lies and how many entries it has, `largest` at most.

    Address bits beyond OAS are truncated (3.4.3).
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


# S6.3.95-1, S6.3.97-1
cdef inline void ring_set_prod(Queues* q, Ring* ring, uint32_t value) noexcept nogil:
    lock_take(&q.lock)
    ring.prod = value & ring_bits(ring.log2size)
    ring.ovflg = eventq_prod_ovflg(value)
    ring_forget(ring)
    lock_give(&q.lock)


# S6.3.96-1, S6.3.98-1
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
    PUT_STATUS = 3    # the mask of these; beside them is what shows by now, also of other records:
    PUT_FIRST = 4     # the queue was empty and no longer is
    PUT_LAST = 8      # a Last message was written, or lost to overflow
    PUT_ERROR = 16    # the queue's error became active


# Who writes which record.
cdef struct Slot:
    uint32_t position
    uint32_t epoch
    uint64_t address
    bint last         # a Last message


cdef inline bint ring_overflow(const Ring* ring) noexcept nogil:
    """The overflow condition is present (7.4)."""
    return ring.ovflg != ring.ovackflg


cdef inline int ring_state(const Queues* q, const Ring* ring) noexcept nogil:
    """Whether a record can be written: PUT_WRITTEN, or why not; the lock is held (7.2.1)."""
    if not ring.enabled or ring.broken or gerror_active(q, ring.error):
        return PUT_CLOSED
    if (ring.blocks and (ring.overflowed or ring_overflow(ring))
            or ring_full(ring.next, ring.cons, ring.log2size)):
        return PUT_FULL
    return PUT_WRITTEN


cdef inline bint ring_writable(Queues* q, const Ring* ring) noexcept nogil:
    cdef int status
    lock_take(&q.lock)
    status = ring_state(q, ring)
    lock_give(&q.lock)
    return status == PUT_WRITTEN


cdef inline int ring_lose(Ring* ring, bint last) noexcept nogil:
    """A record is lost to overflow: PUT_LAST if a Last message is and that shows already, or 0.

    While records are being written, software cannot see yet that the queue is full.  Then the
    loss shows when PROD moves (7.4).  The lock is held.
    """
    if ring_overflow(ring):
        return PUT_LAST if last else 0
    if ring.writers:
        ring.overflowed = True
        ring.last_lost = ring.last_lost or last
        return 0
    ring.ovflg ^= 1
    return PUT_LAST if last else 0


# S3.5.1-10, S3.5.3-2, S3.5.3-3, S3.12.1-4, S6.3.9.4-1, S6.3.95-2, S7.2.1-1, S7.2.1-2, S7.2.1-5,
# S7.4-1, S7.4-4, S7.4-5, S7.5-2, S7.5-3, S8-4, S8.1-1, S8.1-2
cdef inline int ring_take(
        Queues* q, Ring* ring, bint overflows, bint last, Slot* slot) noexcept nogil:
    """Take the next slot: PUT_WRITTEN, or why there is none, with what shows (PUT_...).

    `overflows`: a loss is signalled.  `last`: the record is a Last message.
    """
    cdef int status
    lock_take(&q.lock)
    status = ring_state(q, ring)
    if status == PUT_FULL:
        if overflows:
            status |= ring_lose(ring, last)
    elif status == PUT_WRITTEN:
        slot.position = ring.next
        slot.epoch = ring.epoch
        slot.address = ring_entry(ring, ring.next)
        slot.last = last
        ring.next = ring_after(ring.next, ring.log2size)
        ring.writers += 1
    lock_give(&q.lock)
    return status


# S6.3.36-3, S7.4-2
cdef inline int ring_show(Queues* q, Ring* ring) noexcept nogil:
    """No record is being written any more: PROD moves, with all that waited for it (PUT_...).

    Where a record could not be written the queue does not become full.  So records that found no
    slot were lost with those behind that one, not to overflow.  The lock is held.
    """
    cdef int shown = 0
    if ring.broken:
        ring.next = ring.lost
    elif ring.overflowed:
        if not ring_overflow(ring):
            ring.ovflg ^= 1
        if ring.last_lost:
            shown |= PUT_LAST
    if 0 < ring.last <= ring_count(ring.next, ring.prod, ring.log2size):
        shown |= PUT_LAST
    if ring.prod == ring.cons and ring.next != ring.prod:
        shown |= PUT_FIRST
    ring.prod = ring.next
    if ring.aborted and gerror_begin(q, ring.error):
        shown |= PUT_ERROR
    ring_shown(ring)
    return shown


# S7.2.2-4
cdef inline int ring_fail(Queues* q, Ring* ring, bint current) noexcept nogil:
    """A write aborted: PUT_ERROR if the error is active from now on, or 0; the lock is held.

    It becomes active when no record is being written any more (7.2.2).  Of a queue that is
    disabled or was set up anew errors show at once (7.2.1): nobody can wait for other records.
    """
    if current and ring.enabled:
        ring.aborted = True
        return 0
    return PUT_ERROR if gerror_begin(q, ring.error) else 0


# S3.5.1-8, S3.5.2-1, S3.5.2-101, S6.3.9.4-2, S7.2.2-2, S7.2.2-3
cdef inline int ring_give(Queues* q, Ring* ring, const Slot* slot, int fetched) noexcept nogil:
    """A slot is filled, or could not be: how that leaves the queue, and what shows (PUT_...).

    Records behind one that could not be written are lost with it: there are no gaps.
    """
    cdef int status = PUT_WRITTEN if fetched == FETCH_OK else PUT_ABORTED
    cdef bint current
    cdef uint32_t ahead, bits
    lock_take(&q.lock)
    current = slot.epoch == ring.epoch
    if fetched == FETCH_ABORT:
        status |= ring_fail(q, ring, current)
    if current:
        bits = ring_bits(ring.log2size)
        ahead = (slot.position - ring.prod) & bits
        if ring.broken and ahead > (ring.lost - ring.prod) & bits:
            if fetched == FETCH_OK:
                status = PUT_CLOSED
        elif fetched != FETCH_OK:
            ring.broken = True
            ring.lost = slot.position
        elif slot.last and (ring.last == 0 or ahead < ring.last):
            ring.last = ahead + 1
        ring.writers -= 1
        if ring.writers == 0:
            status |= ring_show(q, ring)
    lock_give(&q.lock)
    return status


cdef inline int ring_stop(Queues* q, Ring* ring) noexcept nogil:
    """An error that waits in a queue which is disabled by now shows (7.2.1): 0 or PUT_ERROR."""
    cdef int shown = 0
    lock_take(&q.lock)
    if ring.aborted and not ring.enabled:
        ring.aborted = False
        if gerror_begin(q, ring.error):
            shown = PUT_ERROR
    lock_give(&q.lock)
    return shown


# S3.5.4-2, S7.2.1-6
cdef inline int ring_put(
        Queues* q, Ring* ring, Port* port, const uint64_t* record, bint overflows, bint last,
        int* status) noexcept nogil:
    """Write a record, or learn why not, and what shows (PUT_...): 0, or FETCH_RAISED.

    What shows is to be signalled in either case.
    """
    cdef Slot slot
    cdef uint64_t[4] w
    cdef int fetched
    cdef size_t i, size = <size_t>1 << ring.entry_lg2
    status[0] = ring_take(q, ring, overflows, last, &slot)
    if status[0] != PUT_WRITTEN:
        return 0
    for i in range(size // 8):
        w[i] = le64(record[i])
    fetched = port_write(
        port, ACCESS_EVENT if ring == &q.events else ACCESS_PRI, slot.address, w, size)
    status[0] = ring_give(q, ring, &slot, fetched)
    return fetched if fetched < 0 else 0


# --- interrupts (3.18) ---

# S3.18-4, S4.7.3-9
cdef inline int msi_write(Port* port, uint64_t address, uint32_t data) noexcept nogil:
    """FETCH_OK, FETCH_ABORT or FETCH_RAISED."""
    data = le32(data)
    return port_write(port, ACCESS_MSI, address, &data, 4)


# S3.18.2-7
cdef inline int signal(Queues* q, Port* port, int irq, const Msi* msi) noexcept nogil:
    """An interrupt: its message, if there is one, and its wire as well: 0, or FETCH_RAISED.

    The wire is asserted whatever the message's address is, where there are wires (3.18.2).
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


# S3.18-8, S3.18.1-3, S3.18.2-5, S3.18.2-6, S6.3.16-1, S6.3.19-4, S6.3.30-1, S6.3.31-1, S6.3.34-1,
# S6.3.35-1, S7.5-4, S16.7.4-7
cdef inline int interrupt(Queues* q, Port* port, int irq) noexcept nogil:
    """The interrupt of a source that IRQ_CTRL may enable: 0, or FETCH_RAISED."""
    cdef Msi msi = q.msi[irq]
    return signal(q, port, irq, &msi) if msi.enabled else 0


# S3.18-2, S3.18.2-4, S6.3.21-1, S6.3.22-1, S7.5.1-1
cdef inline int gerror_raise(Queues* q, Port* port, uint32_t error) noexcept nogil:
    """Report a global error and interrupt: 0, or FETCH_RAISED."""
    if not gerror_toggle(q, error) or error == GERROR_MSI_GERROR_ABT_ERR:
        return 0
    return interrupt(q, port, IRQ_GERROR)


cdef inline int ring_signal(
        Queues* q, Port* port, int irq, int put, int wanted) noexcept nogil:
    """The interrupts of what shows (PUT_...): 0, or FETCH_RAISED; `wanted`: what `irq` tells."""
    cdef int status = 0
    if put & wanted:
        status = interrupt(q, port, irq)
    if put & PUT_ERROR and interrupt(q, port, IRQ_GERROR) < 0:
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


# S4.7.3-5
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

# S3.18-1, S3.18-101, S3.18.2-1, S7.2.2-1, S7.2.2-5, S16.7.4-5
cdef inline int event_signal(Queues* q, Port* port, int put) noexcept nogil:
    """The interrupts of what shows after ring_put for the event queue: 0, or FETCH_RAISED."""
    return ring_signal(q, port, IRQ_EVENTQ, put, PUT_FIRST)


# S3.5.3-5
cdef inline int event_put(
        Core* core, Port* port, const uint64_t* record, bint* written) noexcept nogil:
    """Write a record into the event queue, with its interrupt: 0, or FETCH_RAISED."""
    cdef Queues* q = core.queues
    cdef Port own  # the caller's may be that of a trace
    cdef int put = PUT_CLOSED
    cdef int status
    port_open(&own, core.ram, NULL)
    status = ring_put(q, &q.events, &own, record, True, False, &put)
    written[0] = put & PUT_STATUS == PUT_WRITTEN
    if event_signal(q, &own, put) < 0:
        status = FETCH_RAISED
    if status < 0:
        port.exception = own.exception
    return status


# S3.5.3-1, S3.5.5-1, S3.12-13, S4.7.3-14, S7.3.1-1
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
