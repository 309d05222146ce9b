"""Forks, and the pauses of a long run of commands."""

from libc.stdint cimport int64_t

from smmufast._engine.core cimport Core, Ring
from smmufast._engine.memory cimport callbacks_inside, look_for_signals, mutex_drop, mutex_have_gil
from smmufast._engine.queue cimport lock_give, lock_take, ring_forget

import struct
from _thread import get_ident
import os


# --- processes ---
# A fork finds the caches and queues of every Smmu at rest.  In the child, the threads that were in
# a call are no more: what they announced is taken back.  But for a fork in a callback: there some
# of that may be the callback's own, and memory stays in use, which whoever would change it is told.

cdef Core* cores = NULL    # all that there are
cdef dict forking = {}     # by thread: the Registers whose locks it has meanwhile


cdef void core_enter(Core* core) noexcept:
    global cores
    core.before = NULL
    core.after = cores
    if cores != NULL:
        cores.before = core
    cores = core


cdef void core_leave(Core* core) noexcept:
    global cores
    if core.before != NULL:
        core.before.after = core.after
    elif cores == core:
        cores = core.after
    if core.after != NULL:
        core.after.before = core.before


def _before_fork():
    """Have every lock, so that nobody is inside of what they guard."""
    cdef list all_ = []
    cdef Registers each
    cdef Core* core = cores
    while core != NULL:
        all_.append(<Registers>core.owner)
        core = core.after
    forking[get_ident()] = all_
    for each in all_:  # first those that may be waited for
        if each.core.caches != NULL:
            mutex_have_gil(each.core.caches.mutex)
    for each in all_:
        lock_take(&each.queues.lock)


def _after_fork():
    """Give the locks back."""
    cdef Registers each
    for each in forking.pop(get_ident()):
        lock_give(&each.queues.lock)
        if each.core.caches != NULL:
            mutex_drop(each.core.caches.mutex)


def _after_fork_in_child():
    """The same, and forget the calls of threads that are no more."""
    cdef Registers each
    cdef Ring* ring
    cdef list all_ = forking[get_ident()]
    _after_fork()
    forking.clear()
    if callbacks_inside():
        return
    for each in all_:
        each.core.shared = each.core.handles
        each.core.ram.users = each.core.ram.handles
        each._consuming = each._recording = False
        each._calling = 0
        each._retried = []
        lock_take(&each.queues.lock)
        for name in QUEUES:
            ring = ring_of(each, name)
            if ring.writers:
                ring_forget(ring)
        lock_give(&each.queues.lock)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork,
                    after_in_child=_after_fork_in_child)


cdef extern from *:
    """
    #include <time.h>
    static int64_t smmufast_nanoseconds(void)
    {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    }
    static void smmufast_nap(void)
    {
        struct timespec time = {0, 50000};
        nanosleep(&time, NULL);
    }
    """
    int64_t nanoseconds "smmufast_nanoseconds"() noexcept nogil
    void nap "smmufast_nap"() noexcept nogil

cdef enum:
    LOOK_NS = 1000000      # between two looks for signals
    LOOK_COMMANDS = 4096   # at most
    # Between two releases of the GIL.  A thread that has waited 5 ms asks for the GIL, and only
    # then a release hands it over; one before that wakes the thread, which begins to wait anew.
    RELEASE_NS = 8000000


# How many commands go to the next look, when the last one was, and the last release.
cdef struct Pace:
    int64_t left
    int64_t count
    int64_t since
    int64_t released


cdef Pace pace_begin() noexcept:
    cdef Pace pace
    pace.left = pace.count = 16
    pace.since = pace.released = nanoseconds()
    return pace


cdef int pace_look(Pace* pace) except -1:
    """Let signal handlers run, and other threads once in a while; then as many commands go on
    as take LOOK_NS."""
    cdef int64_t now = nanoseconds()
    cdef int64_t passed = now - pace.since
    if passed > 2 * LOOK_NS:
        pace.count = max(<int64_t>1, pace.count * LOOK_NS // passed)
    elif 2 * passed < LOOK_NS:
        pace.count = min(<int64_t>LOOK_COMMANDS, 2 * pace.count)
    pace.left = pace.count
    if now - pace.released >= RELEASE_NS:
        with nogil:
            pass
        pace.released = nanoseconds()
    look_for_signals()
    pace.since = nanoseconds()
    return 0
