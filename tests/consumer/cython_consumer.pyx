"""A Cython user of smmufast: translations in a loop without the global lock."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from smmufast cimport Memory, Outcome, Request, Result, Smmu, Walk


def translate_all(Smmu smmu, const uint32_t[::1] sid, const uint32_t[::1] ssid,
                  const uint64_t[::1] iova, const uint8_t[::1] access, uint64_t[::1] pa,
                  uint8_t[::1] action, uint8_t[::1] event):
    """Translate request after request; returns how many gave no outcome."""
    cdef Request request
    cdef Outcome outcome
    cdef Py_ssize_t i
    cdef int failures = 0
    with nogil:
        for i in range(iova.shape[0]):
            request.sid = sid[i]
            request.ssid = ssid[i]
            request.iova = iova[i]
            request.access = access[i]
            if smmu.translate_c(&request, &outcome):
                failures += 1
                continue
            pa[i] = outcome.pa
            action[i] = outcome.action
            event[i] = outcome.event
    return failures


def status_of(Smmu smmu, uint32_t ssid, uint32_t access):
    """What translate_c returns, and whether it left the outcome alone."""
    cdef Request request
    cdef Outcome outcome
    cdef int status
    request.sid = 1
    request.iova = 0x1000
    request.ssid = ssid
    request.access = access
    outcome.pa = 0x5A5A
    with nogil:
        status = smmu.translate_c(&request, &outcome)
    return status, outcome.pa == 0x5A5A


def memory_of(Smmu smmu):
    """The typed attribute of a typed object."""
    cdef Memory memory = smmu.memory
    return memory


def are_typed(result, walk):
    """Whether two objects are of the types that the package declares."""
    return isinstance(result, Result), isinstance(walk, Walk)
