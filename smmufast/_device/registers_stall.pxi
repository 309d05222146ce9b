"""Stall: a transaction that waits for CMD_RESUME (IHI 0070 3.12.2)."""

cimport cython
from libc.stdint cimport uint64_t

from smmufast._facts.bits cimport le64
from smmufast._facts.types cimport ACCESS_INSTR, ACCESS_PRIV, ACCESS_WRITE, NO_SSID

from dataclasses import fields

from smmufast.faults import Event
from smmufast.why import Why


# --- stalled transactions ---


@cython.final
@cython.auto_pickle(False)
cdef class Stall:
    """Stall()\n--\n
    A transaction that the SMMU holds (IHI 0070 3.12.2): what the host waits for.

    It is outstanding until `done`: CMD_RESUME retries or ends it, CMD_STALL_TERM and clearing
    CR0.SMMUEN end it.  A retry may stall again, with another `stag`.  One whose record waits is
    translated anew once the record could be written: only if it still stalls it is recorded.
    """

    def __init__(self):
        raise TypeError("a Stall is made by a translation that stalls")

    @property
    def sid(self):
        """StreamID."""
        return self.request.sid

    @property
    def ssid(self):
        """SubstreamID, None without one."""
        return None if self.request.ssid == NO_SSID else self.request.ssid

    @property
    def iova(self):
        """Input address."""
        return self.request.iova

    @property
    def access(self):
        """What the device does, as the bits of smmufast.h: 1 write, 2 privileged, 4 instruction."""
        return self.request.access

    @property
    def write(self):
        """Whether it is a write."""
        return (self.request.access & ACCESS_WRITE) != 0

    @property
    def priv(self):
        """Whether it is privileged."""
        return (self.request.access & ACCESS_PRIV) != 0

    @property
    def instr(self):
        """Whether it fetches an instruction."""
        return (self.request.access & ACCESS_INSTR) != 0

    @property
    def stag(self):
        """Stall tag of its event record; None while the record waits for the event queue."""
        return self._stag

    @property
    def recorded(self):
        """Whether its event was recorded: software can resume it."""
        return self._recorded

    @property
    def fault(self):
        """The fault it stalled at, the latest one, as an Event."""
        cdef uint64_t[4] words
        cdef int i
        for i in range(4):
            words[i] = le64(self.outcome.record[i])
        return Event((<char*>words)[:32])

    @property
    def why(self):
        """The reason of the fault, as a Why; None in a state that version 0.2 saved."""
        return Why(self.outcome.why) if self.outcome.why else None

    @property
    def done(self):
        """Whether it was resumed or terminated, or went on when it was translated anew."""
        return self._done

    @property
    def result(self):
        """The Result of a transaction that is done: of the retry, or abort or raz_wi; else None."""
        return self._result

    def _repr_html_(self):
        from smmufast._html import fields
        return fields(self)

    def __repr__(self):
        text = f"<Stall sid={self.sid:#x}"
        if self.ssid is not None:
            text += f" ssid={self.ssid:#x}"
        text += f" iova={self.iova:#x} {'write' if self.write else 'read'}"
        if self._done:
            return text + f" {self._result.action}>"
        return text + (" waiting>" if self._stag is None else f" stag={self._stag:#x}>")
