"""Walk: a translation whose fetches and updates the host performs."""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
from libc.stdint cimport uint64_t

from smmufast._engine.core cimport Core, caches_give, caches_take_gil
from smmufast._engine.memory cimport Port, port_open, raise_port, to_flag
from smmufast._facts.types cimport HOLDS_SYNC, STATUS_DONE, STATUS_PENDING
from smmufast._engine.queue cimport walk_enter, walk_leave
from smmufast._engine.walk cimport (
    walk_answer, walk_begin, walk_holds, walk_leaves, walk_overtaken, walk_tell,
)

from smmufast._arguments import must_be


# Walk.status, beside STATUS_DONE and STATUS_PENDING.
cdef enum:
    WALK_CLOSED = 2


@cython.final
@cython.auto_pickle(False)
cdef class Walk:
    """Walk()\n--\n
    A translation whose fetches the host performs, one at a time.

    `request` is the Fetch to perform next, None when the walk is done; answer it by `supply`.
    `result` is the Result, None until then::

        walk = smmu.start_walk(sid, iova)
        while (fetch := walk.request) is not None:
            if fetch.swap is None:
                walk.supply(read(fetch.address, fetch.size))   # None: an external abort
            else:                                              # (expected, desired)
                walk.supply(compare_and_swap(fetch.address, *fetch.swap))

    A fetch with a `swap` is a hardware update, which CD.HA, CD.HD and their like ask for: store
    `desired` in the 8 bytes at the address if they are `expected`, both numbers little-endian,
    and answer with what was there, stored or not.

    A walk that an invalidation (CMD_TLBI_*, CMD_CFGI_*) and then CMD_SYNC overtake uses nothing of
    what it read before: it starts again, and `request` is its first Fetch once more (IHI 0070
    3.21.1).  An answer to what it asked before that is dropped.  So whoever takes time between
    `request` and an update looks at `request` again just before the update, which may be in a
    table that is used for something else by now.  With ``start_walk(…, holds_sync=True)`` the walk
    goes on instead, and CMD_SYNC does not complete before the walk ends.  Clearing CR0.SMMUEN lets
    every walk start again, and then find the SMMU disabled.

    A copy, or one from a pickle, which takes the Smmu with it, has the result if the walk is done;
    else it starts again, as one that was overtaken.
    """

    def __cinit__(self):
        self.status = WALK_CLOSED

    def __init__(self):
        raise TypeError("a Walk is made by Smmu.start_walk")

    def __del__(self):
        if self.status == STATUS_PENDING and walk_holds(&self.walk):
            self.close()

    @property
    def request(self):
        """The Fetch to perform next (its data is None), None when the walk is done or closed."""
        self._look()
        return asked_for(&self.walk.fetch) if self.status == STATUS_PENDING else None

    @property
    def done(self):
        """Whether the walk asks for nothing any more."""
        self._look()
        return self.status != STATUS_PENDING

    @property
    def result(self):
        """The Result, with its fetches; None until the walk is done, or if it was closed."""
        self._look()
        return self.traced if self.status == STATUS_DONE else None

    def supply(self, data):
        """Answer the fetch that is asked for.

        Parameters
        ----------
        data : bytes-like, int or None
            The bytes as they lie in memory, as many as asked for; or their little-endian
            number; or None for an external abort.  Of an update, what was there before it.

        Raises
        ------
        RuntimeError
            The walk is done, or an answer to it is being worked on.
        ValueError
            The size is wrong.
        Exception
            Whatever on_interrupt or a Python memory callback raises.
        """
        cdef Py_buffer view
        cdef unsigned int size
        cdef uint64_t asked = self.answers
        if self.status != STATUS_PENDING:
            raise RuntimeError(
                f"the walk is {'done' if self.status == STATUS_DONE else 'closed'}: "
                "no fetch waits for data")
        if self.answering:
            raise RuntimeError("an answer is being worked on: no fetch waits for data")
        if data is None:
            self._step(False, NULL)
            return
        size = self.walk.fetch.size
        if isinstance(data, int):
            if data < 0 or data >> (8 * size):
                raise ValueError(must_be("data", f"a number of {size} bytes", data))
            data = data.to_bytes(size, "little")
        if not PyObject_CheckBuffer(data):
            raise TypeError(must_be("data", "bytes, a number or None", type(data)))
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if <size_t>view.len != size:
                raise ValueError(must_be("data", f"{size} bytes", view.len))
            # conversions run the caller's code
            if self.answering or self.answers != asked or self.status != STATUS_PENDING:
                raise RuntimeError("the fetch was answered meanwhile")
            self._step(False, view.buf)
        finally:
            PyBuffer_Release(&view)

    def close(self):
        """End the walk without a result; nothing happens if it is done.

        A walk that is dropped is closed.  CMD_SYNC does not wait for it any more.

        Raises
        ------
        RuntimeError
            An answer to it is being worked on.
        Exception
            Whatever a command raises that waited behind the CMD_SYNC.
        """
        cdef Port own
        if self.status != STATUS_PENDING:
            return
        if self.answering:
            raise RuntimeError("an answer is being worked on")
        self.status = WALK_CLOSED
        port_open(&own, self.smmu.core.ram, NULL)
        if walk_leaves(&self.smmu.core, &own, &self.walk) < 0:
            raise_port(&own)

    def __copy__(self):
        return _walk_restored(self.smmu, *walk_kept(self))

    def __reduce__(self):
        return _walk_restored, (self.smmu, *walk_kept(self))

    cdef int _look(self) except -1:
        """Start again if the walk was overtaken."""
        if (self.status == STATUS_PENDING and not self.answering
                and walk_overtaken(&self.smmu.core, &self.walk)):
            self._step(True, NULL)
        return 0

    cdef int _step(self, bint begins, const void* data) except -1:
        """Begin, or answer walk.fetch; an exception of what follows finds the walk done."""
        cdef Core* core = &self.smmu.core
        cdef Port own
        cdef int status, told = 0
        self.answering = True
        self.answers += 1
        port_open(&own, core.ram, NULL)
        caches_take_gil(core)
        if begins:
            status = walk_begin(core, &self.walk, self.traced.log)
        else:
            status = walk_answer(core, &self.walk, self.traced.log, data)
        caches_give(core)
        if status == STATUS_DONE:
            core.ram.users += 1
            told = walk_tell(core, &own, &self.walk)
            core.ram.users -= 1
            self.traced.outcome = self.walk.result
        self.status = status
        self.answering = False
        if status == STATUS_DONE and walk_leaves(core, &own, &self.walk) < 0 or told < 0:
            raise_port(&own)
        return 0

    def _repr_html_(self):
        from smmufast._html import fields, lines
        if self.status == STATUS_PENDING:  # without `request`, which may start it again
            return fields(asked_for(&self.walk.fetch), "Walk at")
        return self.traced._repr_html_() if self.status == STATUS_DONE else lines(repr(self))

    def __repr__(self):
        if self.status == STATUS_DONE:
            return f"<Walk {self.traced!r}>"
        if self.status == WALK_CLOSED:
            return "<Walk closed>"
        return f"<Walk at {asked_for(&self.walk.fetch)!r}>"


@cython.final
@cython.auto_pickle(False)
cdef class Transaction:
    """Transaction()\n--\n
    A transaction of a device between its translation and the end of its access::

        with smmu.transaction():
            pa = smmu.pa(sid, iova)
            read_memory(pa)

    On hardware CMD_SYNC completes an invalidation when the transactions that used the old
    translation are done (IHI 0070 3.21.1, 4.7.3).  So a CMD_SYNC behind an invalidation is not
    consumed, and CMDQ_CONS stays, while a transaction is open that was open before the
    invalidation; when the last of these ends, the queue goes on, in the thread that ends it.
    Whoever opens none pays nothing.
    """

    def __init__(self):
        raise TypeError("a Transaction is made by Smmu.transaction")

    def __enter__(self):
        if self.smmu is None:
            raise RuntimeError("no Smmu made this transaction")
        if self.inside:
            raise RuntimeError("the transaction is open already")
        self.begun = walk_enter(&self.smmu.core, True)
        self.inside = True
        return self

    def __exit__(self, *error):
        self.end()

    def end(self):
        """End the transaction; nothing happens if it is not open.

        Raises
        ------
        Exception
            Whatever a command raises that waited behind the CMD_SYNC.
        """
        cdef Port own
        cdef Core* core = &self.smmu.core
        if not self.inside:
            return
        self.inside = False
        if walk_leave(core, self.begun):
            port_open(&own, core.ram, NULL)
            if core.queues.consume(core.queues.owner, &own) < 0:
                raise_port(&own)

    def __del__(self):
        self.end()

    def __repr__(self):
        return f"<Transaction {'open' if self.inside else 'closed'}>"


cdef tuple walk_kept(Walk walk):
    """(status, result or what it is asked for, whether it holds CMD_SYNC)."""
    walk._look()
    if walk.status == STATUS_DONE:
        return STATUS_DONE, walk.traced, False
    return walk.status, walk.walk.request, walk_holds(&walk.walk)


def _walk_restored(Smmu smmu not None, status, said, holds):
    """Return a Walk from what was pickled or copied."""
    cdef Walk walk = Walk.__new__(Walk)
    cdef TracedResult result
    walk.smmu = smmu
    walk.status = WALK_CLOSED
    if status == STATUS_DONE:
        result = said
        if result is None:
            raise TypeError(must_be("result", "a TracedResult", None))
        walk.traced = result
        walk.walk.request = result.request
        walk.walk.result = result.outcome
        walk.status = STATUS_DONE
        return walk
    walk.walk.request = said
    if not request_legal(&walk.walk.request):
        raise ValueError(must_be("request", "one of a device", said))
    walk.walk.flags = HOLDS_SYNC if to_flag("holds", holds) else 0
    walk.traced = traced()
    walk.traced.request = walk.walk.request
    if status == STATUS_PENDING:
        walk._step(True, NULL)
    return walk
