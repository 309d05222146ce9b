"""What one Smmu is made of, as the paths see it.

Sections: IHI 0070 3.5 (circular queues), 3.18 (interrupts), 7.5 (global errors).  The functions
on queues are in queue.pxd.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from smmufast._engine.memory cimport Port, Ram, mutex_drop, mutex_have, mutex_have_gil
from smmufast._engine.tlb cimport CachesC
from smmufast._facts.hw cimport Hw
from smmufast._facts.types cimport Outcome, Request

cdef enum:
    IRQ_EVENTQ
    IRQ_PRIQ
    IRQ_GERROR
    IRQ_CMDQ_SYNC  # its message is the command's
    IRQ_SEV        # no interrupt, but the event of SEV

# A circular queue.  Positions are an index and, above it, the wrap bit.
cdef struct Ring:
    uint64_t base         # of entry 0
    uint32_t prod         # of the next record, as software sees it
    uint32_t next         # the same, but ahead while records are being written
    uint32_t cons         # of the next entry to be read
    uint32_t writers      # records being written
    uint32_t lost         # the first of these that could not be, if `broken`
    uint32_t epoch        # how often the queue was set up: older writers are of no concern
    uint32_t error        # the GERROR bit of an aborted access
    uint32_t last         # of these, how many up to the first Last message; 0: none is one
    uint8_t log2size      # effective
    uint8_t entry_lg2
    uint8_t ovflg
    uint8_t ovackflg
    bint placed           # BASE was written
    bint enabled
    bint blocks           # an overflow that is not acknowledged keeps records out
    bint broken
    # What shows when PROD moves, and not before:
    bint aborted          # `error` is to become active
    bint overflowed       # OVFLG is to be toggled
    bint last_lost        # a Last message was lost to that overflow


# The message of an interrupt.
cdef struct Msi:
    uint64_t address
    uint32_t data
    uint32_t error        # the GERROR bit of an aborted write
    bint sent             # its address is not 0, before it is truncated (4.7.3)
    bint enabled          # IRQ_CTRL enables the source, message and wire


# Which translations were overtaken by invalidations (3.21.1, 3.21.3, 4.7.3).  A walk that a host
# performs remembers `commands` of when it began.  Changed under Queues.lock; queue.pxd has the
# functions.
cdef struct Overtaking:
    uint64_t commands     # CFGI and TLBI commands consumed and times that SMMUEN was cleared, ever
    uint64_t synced       # of these, how many a CMD_SYNC completed: walks from before start again
    uint64_t stopped      # how many there were when SMMUEN was cleared last: so do all walks
    uint64_t holders      # walks under way that hold CMD_SYNC and began since the last command
    uint64_t overtaken    # those that began before: CMD_SYNC waits for them


# The queues and what they signal.  `lock` is held for a few instructions only.
cdef struct Queues:
    uint32_t lock
    uint32_t gerror
    uint32_t gerrorn
    Ring commands
    Ring events
    Ring pages
    Msi[3] msi            # by IRQ_...
    bint wired            # there are wires: they are asserted beside messages
    void* owner           # the Registers, borrowed
    int (*wire)(void* owner, Port* port, int irq) noexcept nogil
    int (*stall)(void* owner, Port* port, const Request* request, Outcome* outcome) noexcept nogil
    int (*consume)(void* owner, Port* port) noexcept nogil  # commands that waited


# What the C face holds on to: it outlives no Smmu.
cdef struct Core:
    Hw hw             # features and registers, digested
    Ram* ram
    void* owner       # the Smmu
    Queues* queues    # never NULL
    Overtaking overtaking
    CachesC* caches   # NULL: nothing is cached
    void* pairs       # of the last batch of many streams; NULL: none, or in use
    void* reuse       # tables of the last batch through stage 2; likewise
    int64_t shared    # uses of the caches without the GIL, under way or announced
    int64_t handles   # of these, C handles
    Core* before      # all that there are
    Core* after


cdef inline void caches_take(Core* core) noexcept nogil:
    """Have the caches for oneself; without the GIL, for whoever has them may wait for it."""
    if core.caches != NULL:
        mutex_have(core.caches.mutex)


cdef inline void caches_give(Core* core) noexcept nogil:
    if core.caches != NULL:
        mutex_drop(core.caches.mutex)


cdef inline void caches_take_gil(Core* core) noexcept:
    """As caches_take, with the GIL, which is given up while somebody else has them."""
    if core.caches != NULL:
        mutex_have_gil(core.caches.mutex)
