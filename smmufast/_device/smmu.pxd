"""The Smmu for Cython users: translate_c and the structs of smmufast.h, without the GIL."""

from libc.stdint cimport uint64_t

from smmufast._engine.ats cimport AtsAnswer, AtsAsk
from smmufast._engine.memory cimport Log
from smmufast._device.registers cimport Registers
from smmufast._engine.lookup cimport Memo
from smmufast._facts.types cimport Outcome, Request, WalkC


cdef enum:
    MEMOS = 16  # decoded contexts that scalar calls keep, checked against what was fetched


cdef class Smmu(Registers):
    cdef Memo[MEMOS] memos
    cdef int _run(self, const Request* request, Outcome* outcome, Log* log) except -1
    cdef int _ats_open(self, Request* request, AtsAsk* ask, bint no_write, bint execute, bint priv,
                       stu) except -1
    cdef object _ats_response(
        self, const Request* request, const AtsAsk* ask, const AtsAnswer* answer)
    cdef int translate_c(self, const Request* request, Outcome* outcome) noexcept nogil


cdef class Result:
    cdef Outcome outcome
    cdef Request request


cdef class TracedResult(Result):
    cdef Log* log


cdef class Transaction:
    cdef Smmu smmu
    cdef uint64_t begun
    cdef bint inside


cdef class Walk:
    cdef WalkC walk
    cdef int status
    cdef bint answering    # an answer is being worked on
    cdef uint64_t answers  # how many were
    cdef Smmu smmu
    cdef TracedResult traced   # what was fetched so far, and in the end the result
    cdef int _look(self) except -1
    cdef int _step(self, bint begins, const void* data) except -1
