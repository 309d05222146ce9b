# cython: language_level=3
"""What the translation and the command queue do with caches, from another module."""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from smmufast._facts.layout cimport CMD_TLBI_NH_VA, WORLD_NS_EL1
from smmufast._engine.tlb cimport (
    ENTRY_CLEAN1, Caches, CachesC, Entry, Table, caches_invalidate_all, cd_fill, cd_probe, cd_touch,
    cfgi_all, cfgi_ste, ste_fill, ste_probe, ste_touch, tlb_fill, tlb_key, tlb_probe, tlb_probe_key,
    tlb_touch, tlbi, walk_fill, walk_probe,
)
from smmufast._rules.scope cimport KIND_S1, Invalidation


def generations(Caches caches not None):
    return caches.c.config_generation, caches.c.tlb_generation


def sizes():
    return sizeof(Entry), sizeof(Table)


def config(Caches caches not None, str what, uint32_t sid, uint32_t ssid):
    """Fill with words that name the StreamID, or probe; returns handle and first word."""
    cdef uint64_t[8] words
    cdef uint32_t handle
    words[:] = [sid, ssid, 2, 3, 4, 5, 6, 7]
    if what == "ste fill":
        return ste_fill(caches.c, sid, words), words[0]
    if what == "cd fill":
        return cd_fill(caches.c, sid, ssid, words), words[0]
    memset(words, 0xFF, sizeof(words))
    if what == "ste":
        handle = ste_probe(caches.c, sid, words)
    else:
        handle = cd_probe(caches.c, sid, ssid, words)
    return handle, words[0]


def touch(Caches caches not None, str what, uint32_t handle):
    cdef CachesC* c = caches.c
    cdef bint ste = what == "ste"
    with nogil:
        if ste:
            ste_touch(c, handle)
        else:
            cd_touch(c, handle)


def look_up(Caches caches not None, uint64_t address, int asid, bint by_key):
    """The output address of a stage-1 entry, or None."""
    cdef CachesC* c = caches.c
    cdef Entry* e
    with nogil:
        if by_key:
            e = tlb_probe_key(c, KIND_S1, tlb_key(c, KIND_S1, WORLD_NS_EL1, 0, asid, 0), address)
        else:
            e = tlb_probe(c, KIND_S1, WORLD_NS_EL1, 0, asid, 0, address)
    return None if e == NULL else e.address


def look_up_and_touch(Caches caches not None, uint64_t address, int asid, int times):
    """Look up once, then touch what was found."""
    cdef Entry* e = tlb_probe(caches.c, KIND_S1, WORLD_NS_EL1, 0, asid, 0, address)
    for _ in range(times):
        tlb_touch(caches.c, e)


def make_dirty(Caches caches not None, uint64_t address, int asid):
    """Change an entry in place."""
    cdef Entry* e = tlb_probe(caches.c, KIND_S1, WORLD_NS_EL1, 0, asid, 0, address)
    e.flags &= ~<int>ENTRY_CLEAN1


def fill(Caches caches not None, uint64_t page, uint64_t output, int asid):
    cdef Entry e
    cdef Entry* kept
    memset(&e, 0, sizeof(Entry))
    e.kind = KIND_S1
    e.world = WORLD_NS_EL1
    e.page = page
    e.lg2 = 12
    e.address = output
    e.asid = asid
    kept = tlb_fill(caches.c, &e)
    return None if kept == NULL else kept.address


def walk(Caches caches not None, uint64_t prefix, uint64_t table, int asid):
    """Fill a table of 2 MiB and look it up."""
    cdef Table e
    cdef Table* found
    memset(&e, 0, sizeof(Table))
    e.kind = KIND_S1
    e.world = WORLD_NS_EL1
    e.prefix = prefix
    e.lg2 = 21
    e.table = table
    e.asid = asid
    walk_fill(caches.c, &e)
    found = walk_probe(caches.c, KIND_S1, WORLD_NS_EL1, 0, asid, prefix << 21 | 0x1234)
    return None if found == NULL else found.table


def invalidate(Caches caches not None, str what, uint64_t address, int asid):
    cdef Invalidation inv
    memset(&inv, 0, sizeof(Invalidation))
    if what == "va":
        inv.op = CMD_TLBI_NH_VA
        inv.asid = asid
        inv.first = inv.last = address
        return tlbi(caches.c, &inv)
    if what == "other":
        inv.op = 0x60
        return tlbi(caches.c, &inv)
    if what == "ste":
        return cfgi_ste(caches.c, asid, True)
    if what == "config":
        return cfgi_all(caches.c)
    return caches_invalidate_all(caches.c)
