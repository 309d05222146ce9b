"""The TLB's probe as a batch loop would make it, and the bare one that it is measured against."""

cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport uint16_t, uint64_t

from smmufast._engine.tlb cimport Caches, CachesC, Entry, tlb_key, tlb_probe_key
from smmufast._rules.scope cimport KIND_S1
from smmufast._facts.layout cimport WORLD_NS_EL1


cdef extern from "baseline_probe.h" nogil:
    struct probe:
        uint64_t* tag
        uint64_t* output
        uint64_t sets

    int probe_fill(probe*, uint64_t, uint64_t) noexcept
    size_t probe_batch(const probe*, const uint64_t*, size_t, uint64_t*) noexcept


@cython.final
@cython.auto_pickle(False)
cdef class Bare:
    """The bare probe over arrays of uint64: tags, all ones, and outputs, four for each set."""

    cdef probe probe
    cdef uint64_t[::1] tags, outputs

    def __init__(self, uint64_t[::1] tags not None, uint64_t[::1] outputs not None):
        if tags.shape[0] != outputs.shape[0] or tags.shape[0] % 4:
            raise ValueError("tags and outputs differ in length, or are not four for each set")
        self.tags = tags
        self.outputs = outputs
        self.probe.tag = &tags[0]
        self.probe.output = &outputs[0]
        self.probe.sets = tags.shape[0] // 4

    def fill(self, uint64_t iova, uint64_t output):
        """Put a page in."""
        if probe_fill(&self.probe, iova, output):
            raise ValueError("the set is full")

    def batch(self, const uint64_t[::1] iova not None, uint64_t[::1] out not None):
        """Look every address up; return how many hit."""
        if out.shape[0] < iova.shape[0]:
            raise ValueError("out is shorter than iova")
        return probe_batch(&self.probe, &iova[0], iova.shape[0], &out[0])


cdef size_t probe_each(
        CachesC* c, const uint64_t* iova, size_t n, uint64_t* out, uint16_t asid) noexcept nogil:
    cdef size_t i, hits = 0
    cdef const Entry* e
    cdef uint64_t key = tlb_key(c, KIND_S1, WORLD_NS_EL1, 0, asid, 0)
    for i in range(n):
        e = tlb_probe_key(c, KIND_S1, key, iova[i])
        if e != NULL:
            out[i] = e.address + (iova[i] & ((<uint64_t>1 << e.lg2) - 1))
            hits += 1
        else:
            out[i] = 0
    return hits


def batch(Caches caches not None, const uint64_t[::1] iova not None,
          uint64_t[::1] out not None, uint16_t asid):
    """Look every address up in a TLB; return how many hit."""
    if out.shape[0] < iova.shape[0]:
        raise ValueError("out is shorter than iova")
    return probe_each(caches.c, &iova[0], iova.shape[0], &out[0], asid)
