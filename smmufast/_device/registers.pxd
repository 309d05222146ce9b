"""Registers: the programming interface of an Smmu, which it is built upon."""

from libc.stdint cimport uint32_t, uint64_t

from smmufast._rules.command cimport Effect
from smmufast._engine.core cimport Core, Queues
from smmufast._engine.memory cimport Memory, Port
from smmufast._facts.types cimport Outcome, Request


cdef class Stall:
    cdef Request request
    cdef Outcome outcome      # as it stalled
    cdef Outcome ended        # once it is done
    cdef bint retrying        # it is being translated again
    cdef bint waited          # its record had to wait: what it found may be old
    cdef uint32_t turn        # how often it was written into the event queue
    cdef object _stag
    cdef bint _recorded
    cdef bint _done
    cdef object _result


cdef class Registers:
    cdef Core core
    cdef Queues queues
    cdef Memory _memory
    cdef object _caches
    cdef object _features
    cdef object _on_interrupt
    cdef object _on_resume
    cdef object _on_invalidate
    cdef object _on_command
    cdef object _warnings
    cdef dict _devices
    cdef dict _values         # what plain registers hold, by name
    cdef dict _masks          # bits that are implemented, by name
    # stalls
    cdef dict _stalls         # outstanding, in order; the keys
    cdef dict _tagged         # by STAG a dict by StreamID: of one, but in states of version 0.2
    cdef object _waiting      # those without a record, in order
    cdef list _retried        # those that are being translated again
    cdef list _resumed        # those whose end is to be told
    cdef uint32_t _last_stag
    cdef bint _recording
    # commands
    cdef uint32_t _cerror
    cdef int _command_why     # why a command was illegal (WHY_...)
    cdef uint32_t _restarts   # how often CONS or BASE of the command queue was written
    cdef uint64_t _budget     # commands to consume before the caller gets an answer
    cdef bint _consuming
    cdef unsigned long _consumer  # the thread that does
    cdef bint _atc_failed     # an ATC_INV since the last SYNC
    cdef int _calling         # devices or on_resume, which may call back

    # what Smmu overrides
    cdef int _retry(self, const Request* request, Outcome* outcome) except -1
    cdef object _result(self, const Request* request, const Outcome* outcome)
    cdef int _prefetch(self, const Effect* effect) except -1
    cdef int _ppar(self, uint32_t sid, uint32_t ssid) except? -2
    cdef void _forget(self) noexcept
    cdef int _invalidate(self, const Effect* effect) except -1

    cdef str _locate(self, offset, size, int* shift, int* bits)
    cdef uint64_t _load(self, str name) except? -1
    cdef uint64_t _load_from(self, Queues* q, str name) except? -1
    cdef int _store(self, str name, uint64_t value) except -1
    cdef int _warn(self, str name, str text, str row) except -1
    cdef bint _guarded(self, str name, uint64_t value) except -1
    cdef int _digest_features(self) except -1
    cdef int _digest(self) except -1
    cdef int _digest_stream_table(self) except -1
    cdef int _digest_gbpa(self) except -1
    cdef int _digest_interrupts(self) except -1
    cdef int _place(self, str name) except -1
    cdef int _check_stream_table(self) except -1
    cdef int _check_queue(self, str queue) except -1
    cdef int _set_cr0(self, uint32_t value) except -1
    cdef int _stop_queues(self) except -1
    cdef int _acknowledge(self, uint32_t value) except -1
    cdef int _end(self, Port* port, int status) except -1

    cdef int _hold(self, const Request* request, Outcome* outcome) except -1
    cdef bint _writable(self) noexcept
    cdef int _record(self) except -1
    cdef bint _record_first(self, Stall stall) except -1
    cdef int _tag(self, Stall stall, uint32_t stag) except -1
    cdef int _untag(self, Stall stall) except -1
    cdef int _again(self, Stall stall) except -1
    cdef int _release(self, Stall stall) except -1
    cdef int _finish(self, Stall stall) except -1
    cdef int _kill(self, Stall stall, unsigned int action) except -1
    cdef int _resume(self, uint32_t sid, uint32_t stag, bint retry, bint abort) except -1
    cdef int _terminate(self, object sid) except -1
    cdef int _settle(self) except -1
    cdef int _tell(self, Stall stall) except -1

    cdef uint64_t _put_commands(self, uint32_t prod) except? -1
    cdef int _consume(self) except -1
    cdef int _execute(self, const Effect* effect) except -1
    cdef int _tell_scope(self, const Effect* effect) except -1
    cdef bint _sync_waits(self, const Effect* effect) except -1
    cdef int _complete(self, const Effect* effect, bint room) except -1
    cdef int _command_error(self, uint32_t cerror, int why) except -1
    cdef int _atc_inv(self, const Effect* effect) except -1

    # save and restore
    cdef int _check_still(self, const Queues* q) except -1
    cdef dict _state(self, Queues* q)
    cdef int _take_state(self, dict state) except -1
    cdef int _take_rings(self, dict values, placed) except -1
    cdef int _take_stall(self, saved) except -1
