"""What one Smmu is made of, as the drivers see it."""

from smmufast._memory cimport Ram
from smmufast._tlb cimport CachesC
from smmufast._types cimport Hw


# What the C face holds on to: it outlives no Smmu.
cdef struct Core:
    Hw hw             # features and registers, digested
    Ram* ram
    void* owner       # the Smmu
    CachesC* caches   # NULL: nothing is cached
