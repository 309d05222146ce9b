# cython: binding=False, embedsignature=True, embedsignature.format=clinic
# cython: language_level=3
"""Caches: the class that owns what tlb.pxd describes, with geometry, contents and counters.

Not architectural: sizes, policies and what stays in a cache are properties of one implementation.
"""

cimport cython
cimport numpy as cnp
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from smmufast._engine.cache cimport (
    CacheC, Counters, cache_bytes, cache_close, cache_hits, cache_open, cache_reset_counters, ctz64,
)
from smmufast._facts.layout cimport CMD_CFGI_CD, CMD_CFGI_CD_ALL, CMD_CFGI_STE, CMD_CFGI_STE_RANGE
from smmufast._engine.memory cimport (
    Mutex, mutex_close, mutex_drop, mutex_have_gil, mutex_open, to_flag,
)
from smmufast._rules.scope cimport (
    Filter, Invalidation, KEY_LG2_SHIFT, KEY_VALID, filter_of, key_tags,
)

from typing import NamedTuple
import numpy as np

from smmufast._arguments import either, must_be
from smmufast.faults import Perm
from smmufast.layout import StreamWorld

cnp.import_array()

POLICIES = ("lru", "plru", "fifo", "random")
"""Replacement policies: true LRU, tree pseudo-LRU, FIFO, random with a seed."""

KINDS = ("", "stage 1", "stage 2", "combined")
"""Kinds of an entry, by number: stage 1 alone, stage 2 alone, both in one; index 0 is none."""

NESTED = ("combined", "split")
"""How nested translations are cached: input address to PA at once, or each stage by itself."""

CACHES = ("ste", "cd", "tlb", "walk1", "walk2")
"""The caches of Caches, in the order of its counters."""

cdef tuple COUNTERS = (
    "hits", "misses", "fills", "evictions", "replacements", "invalidations")
cdef object COUNTERS_DTYPE = np.dtype([("cache", "U8"), *((name, "u8") for name in COUNTERS)])

cdef enum:
    SLOTS_MAX = 1 << 24     # entries of one cache


class Geometry(NamedTuple):
    """Size and replacement of one cache.

    `sets` is a power of two and `ways` at least 1, together at most 2**24 entries; sets=1 makes
    a cache fully associative. `policy` is "lru", "plru", "fifo" or "random"; "plru" wants a power
    of two of at most 64 ways. `seed`, a number of 64 bits, is that of "random".
    """

    sets: int
    ways: int
    policy: str = "lru"
    seed: int = 0


class TlbEntry(NamedTuple):
    """A translation in the TLB.

    `start` is the first input address that it covers, canonical in 64 bits, and `output` where
    that goes; it covers 2**lg2 bytes. `ipa`, of combined entries, lies between. `kind` is one of
    KINDS. `vmid`, `asid` and `is_global` (the leaf has nG=0) are tags as far as `kind` and `world`
    have such tags; `sid` and `ssid` tell which transaction filled it. Each stage has what it
    admits (`perm1`, `perm2`) and its page's `lg2_s1`, `level_s1` and `granule_s1` (log2), or
    0 when it is absent; `level` is that of the smaller page. `clean1` and `clean2`: writable
    through DBM, not dirty yet. `attr` is a MAIR byte. `extra` is the filler's own.
    """

    start: int
    output: int
    lg2: int = 12
    kind: str = "stage 1"
    world: StreamWorld = StreamWorld.NS_EL1
    vmid: int = 0
    asid: int = 0
    is_global: bool = False
    ipa: int = 0
    sid: int = 0
    ssid: int = 0
    level: int = 3
    perm1: Perm = Perm(0x3F)
    perm2: Perm = Perm(0x3F)
    attr: int = 0xFF
    sh: int = 0
    clean1: bool = False
    clean2: bool = False
    contiguous: bool = False
    lg2_s1: int = 0
    lg2_s2: int = 0
    level_s1: int = 3
    level_s2: int = 3
    granule_s1: int = 12
    granule_s2: int = 12
    aset: int = 0
    extra: bytes = bytes(3)


class WalkEntry(NamedTuple):
    """A table in a walk cache.

    The table at address `table` translates the 2**lg2 bytes from the input address `start` on;
    it is one of `level`. `output`, of combined entries, is where stage 2 has it. `bits` are the
    hierarchical attributes of the descriptors above. The rest is as in TlbEntry.
    """

    start: int
    table: int
    lg2: int = 21
    kind: str = "stage 1"
    world: StreamWorld = StreamWorld.NS_EL1
    vmid: int = 0
    asid: int = 0
    output: int = 0
    bits: int = 0
    sid: int = 0
    ssid: int = 0
    level: int = 3
    granule: int = 12
    extra: bytes = bytes(7)


class StaleEntry(NamedTuple):
    """A live entry that the tables in memory no longer give: the cache's name and the entry.

    `cache` is one of CACHES, or "atc" for the ATC of a device. `now` is the entry that the tables
    give, None when they give none. `why` says what differs, by field and in hexadecimal:
    ``output: 0x40009000 now, 0x40001000 cached``. `sure` is False where so many contexts have the
    entry's tags that not all were asked: one of the others may give it.
    """

    cache: str
    entry: tuple
    now: tuple | None
    why: str
    sure: bool = True

    def _repr_html_(self):
        from smmufast._html import fields
        return fields(self)


class SteEntry(NamedTuple):
    """An STE in the configuration cache: its StreamID and its 64 bytes."""

    sid: int
    data: bytes


class CdEntry(NamedTuple):
    """A CD in the configuration cache: StreamID, SubstreamID (0 without) and its 64 bytes."""

    sid: int
    ssid: int
    data: bytes


cdef void caches_set_masks(CachesC* c) noexcept nogil:
    """Which tags entries have, by kind and StreamWorld."""
    cdef unsigned int kind, world
    for kind in range(4):
        for world in range(4):
            c.key_mask[kind][world] = key_tags(kind, world)


cdef inline void sizes_seen(Sizes* sizes, const CacheC* cache) noexcept nogil:
    cdef bint one = cache.ways == 4 and sizes.mask and not sizes.mask & (sizes.mask - 1)
    sizes.lone = ctz64(sizes.mask) if one else 0
    sizes.lone_key = <uint64_t>sizes.lone << KEY_LG2_SHIFT


cdef inline void sizes_add(
        Sizes* sizes, const CacheC* cache, unsigned int lg2) noexcept nogil:
    sizes.live[lg2] += 1
    if sizes.live[lg2] == 1:
        sizes.mask |= <uint64_t>1 << lg2
        sizes_seen(sizes, cache)


cdef inline void sizes_remove(
        Sizes* sizes, const CacheC* cache, unsigned int lg2) noexcept nogil:
    sizes.live[lg2] -= 1
    if sizes.live[lg2] == 0:
        sizes.mask &= ~(<uint64_t>1 << lg2)
        sizes_seen(sizes, cache)


include "tlb_entries.pxi"


include "tlb_arguments.pxi"


# --- one cache ---

@cython.final
@cython.auto_pickle(False)
cdef class Cache:
    """One of the caches of a Caches: its geometry, counters and entries.

    `len()` is the number of entries; iterating yields them as they are now, by slot: the ways of
    set 0, then those of set 1.
    """

    cdef Caches caches
    cdef int number

    def __init__(self):
        raise TypeError("a Cache is a part of Caches")

    cdef CacheC* get(self) except NULL:
        if self.caches is None:
            raise TypeError("a Cache is a part of Caches")
        return &self.caches.c.cache[self.number]

    @property
    def name(self):
        """Which cache it is: one of CACHES."""
        return CACHES[self.number]

    @property
    def geometry(self):
        """Sets, ways, policy and seed."""
        self.get()
        return self.caches.geometries[self.number]

    @property
    def hits(self):
        """Look-ups that found an entry."""
        return cache_hits(self.get())

    @property
    def misses(self):
        """Look-ups that found none."""
        return self.get().counters.misses

    @property
    def fills(self):
        """Entries that were put in."""
        return self.get().counters.fills

    @property
    def evictions(self):
        """Entries that gave way to a fill of another one in a full set."""
        return self.get().counters.evictions

    @property
    def replacements(self):
        """Entries that went because a fill could answer the same request."""
        return self.get().counters.replacements

    @property
    def invalidations(self):
        """Entries that commands invalidated."""
        return self.get().counters.invalidations

    @property
    def nbytes(self):
        """Memory of tags, replacement state and entries, in bytes."""
        return cache_bytes(self.get())

    def __len__(self):
        return self.get().live

    def __iter__(self):
        # Entries are copied while the caches are held, and made into objects afterwards.
        cdef CacheC* c = self.get()
        cdef Mutex* mutex = self.caches.c.mutex
        cdef uint64_t slot, n = 0, i
        cdef char* copies
        cdef list found = []
        mutex_have_gil(mutex)
        copies = <char*>malloc(c.live * c.stride + 1)
        if copies != NULL:
            for slot in range(c.slots):
                if c.prints[slot]:
                    memcpy(copies + n * c.stride, c.entries + slot * c.stride, c.stride)
                    n += 1
        mutex_drop(mutex)
        if copies == NULL:
            raise MemoryError()
        try:
            for i in range(n):
                found.append(self._entry(copies + i * c.stride))
        finally:
            free(copies)
        return iter(found)

    cdef object _entry(self, const char* entry):
        cdef const ConfigEntry* record = <const ConfigEntry*>entry
        if self.number == CACHE_TLB:
            return entry_shown(<const Entry*>entry)
        if self.number >= CACHE_WALK1:
            return walk_entry_shown(<const Table*>entry)
        data = record_shown(record.words)
        if self.number == CACHE_STE:
            return SteEntry(record.sid, data)
        return CdEntry(record.sid, record.key & ~KEY_VALID, data)

    def __repr__(self):
        cdef CacheC* c = self.get()
        sets, ways, policy, _ = self.geometry
        return (f"<Cache {self.name}: {sets} sets of {ways} ways, {policy}, "
                f"{c.live} entries>")


cdef Cache view_of(Caches caches, int number):
    cdef Cache view
    if caches.c.cache[number].ways == 0:
        return None
    view = Cache.__new__(Cache)
    view.caches = caches
    view.number = number
    return view


include "tlb_state.pxi"


# --- all caches ---

cdef void release(CachesC* c) noexcept nogil:
    cdef int number
    if c != NULL:
        for number in range(N_CACHES):
            cache_close(&c.cache[number])
        if c.mutex != NULL:
            mutex_close(c.mutex)
            free(c.mutex)
        free(c.regions)
        free(c)


cdef CachesC* made(list geometries, bint split) except NULL:
    """New, empty caches."""
    cdef size_t* strides = [
        sizeof(ConfigEntry), sizeof(ConfigEntry), sizeof(Entry), sizeof(Table), sizeof(Table)]
    cdef CachesC* c = <CachesC*>calloc(1, sizeof(CachesC))
    cdef int number
    if c == NULL:
        raise MemoryError()
    c.mutex = <Mutex*>malloc(sizeof(Mutex))
    if c.mutex == NULL:
        release(c)
        raise MemoryError()
    mutex_open(c.mutex, NULL)
    c.split = split
    caches_set_masks(c)
    for number in range(N_CACHES):
        geometry = geometries[number]
        if geometry is None:
            continue
        if not cache_open(&c.cache[number], geometry.sets, geometry.ways,
                          POLICIES.index(geometry.policy), geometry.seed, strides[number]):
            release(c)
            raise MemoryError(f"no memory for {CACHES[number]} of {geometry}")
    c.regions_lg2 = 2
    while <uint64_t>1 << c.regions_lg2 < 4 * c.cache[CACHE_TLB].slots:
        c.regions_lg2 += 1
    c.regions = <uint32_t*>calloc(<size_t>1 << c.regions_lg2, sizeof(uint32_t))
    if c.regions == NULL:
        release(c)
        raise MemoryError(f"no memory for tlb of {geometries[CACHE_TLB]}")
    return c


def _restored(ste, cd, tlb, walk1, walk2, nested):
    return Caches(ste=ste, cd=cd, tlb=tlb, walk1=walk1, walk2=walk2, nested=nested)


@cython.final
@cython.auto_pickle(False)
cdef class Caches:
    """Caches(*, ste=None, cd=None, tlb=None, walk1=None, walk2=None, nested='combined')\n--\n
    The caches of one SMMU: what is in them, and what hits, misses and commands do to them.

    Not architectural. Each cache is set-associative, of its own geometry, or absent; without any
    argument all are.

    Parameters
    ----------
    ste, cd : Geometry, optional
        The configuration caches: STEs by StreamID, CDs by StreamID and SubstreamID. The set is
        that of the low bits of the StreamID; for CDs, of StreamID exclusive-or SubstreamID.
    tlb : Geometry, optional
        Translations of every size. The set is that of the low bits of the page number: of the
        input address above the entry's own size.
    walk1, walk2 : Geometry, optional
        Walk caches: tables of stage 1 and of stage 2, by what they translate. The set is that of
        the low bits of the input address above the table's reach.
    nested : {"combined", "split"}
        How the TLB keeps nested translations: as one entry of both stages, or as one of each.

    Attributes
    ----------
    ste, cd, tlb, walk1, walk2 : Cache or None
        The caches; None is an absent one.

    Raises
    ------
    TypeError, ValueError
        If a geometry is none, or cannot be.

    Notes
    -----
    A geometry may be given as a tuple: ``tlb=(1024, 4)`` is ``tlb=Geometry(1024, 4, "lru", 0)``.

    Caches belong to one Smmu. The methods here that look at entries or change them wait while a
    batch of another thread uses them; the counters are read as they are.

    `lookup()`, `fill()`, `tlbi()` and their like do what the translation and the commands do, for
    hosts that use the caches by themselves.

    Pickles, copies and `__getstate__()` hold everything, counters and replacement state
    included: a copy goes on as the original would.

    Examples
    --------
    >>> from smmufast._engine.tlb import Caches, TlbEntry
    >>> caches = Caches(tlb=(64, 4))
    >>> caches.lookup(0x1234_5678, asid=7) is None
    True
    >>> caches.fill(TlbEntry(0x1234_5000, 0x8000_0000, asid=7, perm1=0x3))
    >>> found = caches.lookup(0x1234_5678, asid=7)
    >>> hex(found.output), found.perm1
    ('0x80000000', <Perm.UR|UW: 3>)
    >>> caches.tlbi("TLBI_NH_VA", asid=7, address=0x1234_5000)
    1
    >>> caches.tlb.hits, caches.tlb.misses, caches.tlb.invalidations, len(caches.tlb)
    (1, 1, 1, 0)
    """

    def __cinit__(self, *, ste=None, cd=None, tlb=None, walk1=None, walk2=None,
                  nested="combined"):
        given = (ste, cd, tlb, walk1, walk2)
        self.geometries = tuple(map(_geometry_of, CACHES, given))
        if nested not in NESTED:
            raise ValueError(must_be("nested", either(NESTED), nested))
        self.c = made(list(self.geometries), nested == "split")

    def __dealloc__(self):
        release(self.c)

    @classmethod
    def small(cls, *, nested="combined"):
        """Caches of the size of a small SMMU: a TLB of 64 entries, few of the others.

        >>> from smmufast._engine.tlb import Caches
        >>> Caches.small().tlb.geometry
        Geometry(sets=16, ways=4, policy='lru', seed=0)
        """
        return cls(ste=(4, 2), cd=(4, 2), tlb=(16, 4), walk1=(4, 4), walk2=(4, 4), nested=nested)

    @classmethod
    def server(cls, *, nested="combined"):
        """Caches of the size of a server's SMMU: a TLB of 4096 entries.

        >>> from smmufast._engine.tlb import Caches
        >>> [cache.name for cache in (Caches.server().tlb, Caches.server().walk2)]
        ['tlb', 'walk2']
        """
        return cls(ste=(64, 4), cd=(64, 4), tlb=(1024, 4), walk1=(64, 4), walk2=(64, 4),
                   nested=nested)

    @property
    def ste(self):
        """The configuration cache of STEs, or None."""
        return view_of(self, CACHE_STE)

    @property
    def cd(self):
        """The configuration cache of CDs, or None."""
        return view_of(self, CACHE_CD)

    @property
    def tlb(self):
        """The TLB, or None."""
        return view_of(self, CACHE_TLB)

    @property
    def walk1(self):
        """The walk cache of stage 1, or None."""
        return view_of(self, CACHE_WALK1)

    @property
    def walk2(self):
        """The walk cache of stage 2, or None."""
        return view_of(self, CACHE_WALK2)

    @property
    def config_generation(self):
        """A number that changes whenever an STE or a CD is filled, evicted or invalidated."""
        return self.c.config_generation

    @property
    def tlb_generation(self):
        """A number that changes whenever a TLB entry is filled, evicted or invalidated."""
        return self.c.tlb_generation

    @property
    def nested(self):
        """How nested translations are kept: "combined" or "split"."""
        return NESTED[self.c.split]

    @property
    def nbytes(self):
        """Memory of all caches, in bytes."""
        cdef int number
        cdef uint64_t total = sizeof(CachesC) + (sizeof(uint32_t) << self.c.regions_lg2)
        for number in range(N_CACHES):
            total += cache_bytes(&self.c.cache[number])
        return total

    @property
    def counters(self):
        """The counters of every cache that there is, as a new dict of dicts: by cache, by name."""
        found = {}
        for name, *numbers in self.counters_array().tolist():
            found[name] = dict(zip(COUNTERS, numbers, strict=True))
        return found

    def counters_array(self):
        """Return the counters as a structured array with one row per cache that there is.

        Returns
        -------
        numpy.ndarray
            Fields "cache" (its name), "hits", "misses", "fills", "evictions", "replacements" and
            "invalidations", each as the attribute of Cache.
        """
        rows = []
        cdef int number
        cdef CacheC* c
        cdef Counters* n
        for number in range(N_CACHES):
            c = &self.c.cache[number]
            n = &c.counters
            if c.ways:
                rows.append((CACHES[number], cache_hits(c), n.misses, n.fills, n.evictions,
                             n.replacements, n.invalidations))
        return np.array(rows, COUNTERS_DTYPE)

    def reset_counters(self):
        """Set every counter to 0; entries and replacement state stay."""
        cdef int number
        mutex_have_gil(self.c.mutex)
        for number in range(N_CACHES):
            cache_reset_counters(&self.c.cache[number])
        mutex_drop(self.c.mutex)

    def invalidate_all(self):
        """Drop every entry of every cache, counted as invalidations.

        Returns
        -------
        int
            How many entries went.
        """
        cdef uint64_t gone
        mutex_have_gil(self.c.mutex)
        gone = caches_invalidate_all(self.c)
        mutex_drop(self.c.mutex)
        return gone

    def __len__(self):
        """Return the number of entries in all caches."""
        cdef int number
        cdef uint64_t total = 0
        for number in range(N_CACHES):
            total += self.c.cache[number].live
        return total

    def __bool__(self):
        return True

    def _repr_html_(self):
        from smmufast._html import caches
        return caches(self)

    def __repr__(self):
        views = (self.ste, self.cd, self.tlb, self.walk1, self.walk2)
        shown = []
        for view in views:
            if view is not None:
                geometry = view.geometry
                shown.append(f"{view.name} {len(view)}/{geometry.sets * geometry.ways}")
        return f"<Caches: {', '.join(shown) or 'none'}>"

    # --- TLB ---

    def lookup(self, address, *, kind="stage 1", world="NS_EL1", vmid=0, asid=0, aset=0):
        """Look an address up in the TLB; counts one hit or one miss.

        Parameters
        ----------
        address : int
            The input address, canonical in 64 bits; with kind="stage 2" an IPA.
        kind : {"stage 1", "stage 2", "combined"}
            The kind of entry that is wanted; other kinds do not answer.
        world : StreamWorld or str
            The translation regime.
        vmid, asid, aset : int
            Tags of the request, compared as far as the kind and the world have them.

        Returns
        -------
        TlbEntry or None
        """
        cdef int number = number_of("kind", kind, KINDS)
        cdef int regime = world_of(world)
        check_kind(number, regime)
        cdef uint16_t v = field("vmid", vmid, 0xFFFF)
        cdef uint16_t a = field("asid", asid, 0xFFFF)
        cdef uint64_t at = field("address", address, ~<uint64_t>0)
        cdef unsigned int set_ = <unsigned int>field("aset", aset, 1)
        cdef Entry* found
        cdef Entry copy
        mutex_have_gil(self.c.mutex)
        found = tlb_probe(self.c, number, regime, v, a, set_, at)
        if found != NULL:
            copy = found[0]
        mutex_drop(self.c.mutex)
        return None if found == NULL else entry_shown(&copy)

    def fill(self, entry, /):
        """Put a translation into the TLB; nothing happens without one.

        Entries that could answer one of its requests go: those of the same tags that cover one of
        its addresses, whatever their size. A global entry answers for every ASID.

        Parameters
        ----------
        entry : TlbEntry

        Raises
        ------
        TypeError, ValueError
            If it is no TlbEntry or one of its fields cannot be.
        """
        cdef Entry e
        read_entry(entry, &e)
        mutex_have_gil(self.c.mutex)
        tlb_fill(self.c, &e)
        mutex_drop(self.c.mutex)

    # --- walk caches ---

    def lookup_walk(self, address, *, kind="stage 1", world="NS_EL1", vmid=0, asid=0):
        """Look the deepest table of an address up in a walk cache; counts one hit or one miss.

        Parameters
        ----------
        address, kind, world, vmid, asid
            As for `lookup()`. The kind "stage 2" is looked up in `walk2`, others in `walk1`.

        Returns
        -------
        WalkEntry or None
        """
        cdef int number = number_of("kind", kind, KINDS)
        cdef int regime = world_of(world)
        check_kind(number, regime)
        cdef uint16_t v = field("vmid", vmid, 0xFFFF)
        cdef uint16_t a = field("asid", asid, 0xFFFF)
        cdef uint64_t at = field("address", address, ~<uint64_t>0)
        cdef Table* found
        cdef Table copy
        mutex_have_gil(self.c.mutex)
        found = walk_probe(self.c, number, regime, v, a, at)
        if found != NULL:
            copy = found[0]
        mutex_drop(self.c.mutex)
        return None if found == NULL else walk_entry_shown(&copy)

    def fill_walk(self, entry, /):
        """Put a table into the walk cache of its stage; nothing happens without one.

        Parameters
        ----------
        entry : WalkEntry

        Raises
        ------
        TypeError, ValueError
            If it is no WalkEntry or one of its fields cannot be.
        """
        cdef Table e
        read_walk_entry(entry, &e)
        mutex_have_gil(self.c.mutex)
        walk_fill(self.c, &e)
        mutex_drop(self.c.mutex)

    # --- configuration caches ---

    def lookup_ste(self, sid):
        """Look an STE up: its 64 bytes, or None; counts one hit or one miss."""
        cdef uint64_t[8] words
        cdef uint32_t stream = field("sid", sid, 0xFFFFFFFF)
        cdef uint32_t found
        mutex_have_gil(self.c.mutex)
        found = ste_probe(self.c, stream, words)
        mutex_drop(self.c.mutex)
        return record_shown(words) if found else None

    def fill_ste(self, sid, data):
        """Put an STE of 64 bytes into its cache."""
        cdef uint64_t[8] words
        cdef uint32_t stream = field("sid", sid, 0xFFFFFFFF)
        read_record("data", data, words)
        mutex_have_gil(self.c.mutex)
        ste_fill(self.c, stream, words)
        mutex_drop(self.c.mutex)

    def lookup_cd(self, sid, ssid=0):
        """Look a CD up: its 64 bytes, or None; counts one hit or one miss."""
        cdef uint64_t[8] words
        cdef uint32_t stream = field("sid", sid, 0xFFFFFFFF)
        cdef uint32_t index = field("ssid", ssid, 0xFFFFF)
        cdef uint32_t found
        mutex_have_gil(self.c.mutex)
        found = cd_probe(self.c, stream, index, words)
        mutex_drop(self.c.mutex)
        return record_shown(words) if found else None

    def fill_cd(self, sid, ssid, data):
        """Put a CD of 64 bytes into its cache."""
        cdef uint64_t[8] words
        cdef uint32_t stream = field("sid", sid, 0xFFFFFFFF)
        cdef uint32_t index = field("ssid", ssid, 0xFFFFF)
        read_record("data", data, words)
        mutex_have_gil(self.c.mutex)
        cd_fill(self.c, stream, index, words)
        mutex_drop(self.c.mutex)

    # --- commands ---

    def tlbi(self, op, *, vmid=0, asid=0, address=None, last=None, leaf=False, granule=0,
             level=0, vmid_mask=0xFFFF):
        """Invalidate as a TLBI command of the Non-secure queue does (IHI 0070, 4.4).

        Parameters
        ----------
        op : Opcode, int or str
            The command, such as "TLBI_NH_VA".
        vmid, asid : int
            For the commands that have them.
        address, last : int, optional
            For commands by address: the first and the last address, both included. Without
            `last` it is one address; without `address`, all.
        leaf : bool
            For commands by address: tables in walk caches stay.
        granule : int
            log2 of the granule (12, 14, 16); entries of another one stay. 0: of any.
        level : int
            1 to 3: translations of leaves at another level stay. 0: of any.
        vmid_mask : int
            The bits of VMIDs that are compared.

        Returns
        -------
        int
            How many entries went, of the TLB and of the walk caches.

        Raises
        ------
        TypeError, ValueError
            If `op` is no such command or an argument is out of its range.
        """
        cdef Invalidation inv
        cdef Filter f
        cdef uint64_t gone
        memset(&inv, 0, sizeof(Invalidation))
        inv.op = opcode_of(op)
        inv.vmid = field("vmid", vmid, 0xFFFF)
        inv.vmid_mask = field("vmid_mask", vmid_mask, 0xFFFF)
        inv.asid = field("asid", asid, 0xFFFF)
        inv.leaf = to_flag("leaf", leaf)
        inv.all_addresses = address is None
        if granule not in (0, 12, 14, 16):
            raise ValueError(must_be("granule", "12, 14, 16, or 0 for any", granule))
        inv.granule = granule
        inv.level = field("level", level, 3)
        if address is not None:
            inv.first = field("address", address, ~<uint64_t>0)
            inv.last = inv.first
            if last is not None:
                inv.last = field("last", last, ~<uint64_t>0)
                if inv.last < inv.first:
                    raise ValueError(must_be("last", f"{address:#x} (address) or more", last))
        elif last is not None:
            raise ValueError(must_be("last", "None without address", last))
        if not filter_of(&inv, &f):
            raise ValueError(must_be("op", "a TLBI command of the Non-secure queue", op))
        mutex_have_gil(self.c.mutex)
        gone = tlbi(self.c, &inv)
        mutex_drop(self.c.mutex)
        return gone

    def cfgi(self, op, *, sid=0, ssid=0, leaf=False, range=31):
        """Invalidate as a CFGI command does (IHI 0070, 4.3).

        Parameters
        ----------
        op : Opcode, int or str
            "CFGI_STE", "CFGI_STE_RANGE", "CFGI_ALL", "CFGI_CD" or "CFGI_CD_ALL".
        sid, ssid : int
            For the commands that have them.
        leaf : bool
            Makes no difference: descriptors of level 1 are not cached.
        range : int
            Of CFGI_STE_RANGE: 2**(range + 1) aligned StreamIDs; 31 are all, as for CFGI_ALL,
            which is the same opcode.

        Returns
        -------
        int
            How many entries went.

        Raises
        ------
        TypeError, ValueError
            If `op` is no such command or an argument is out of its range.
        """
        cdef int number = opcode_of(op)
        cdef uint32_t stream = field("sid", sid, 0xFFFFFFFF)
        cdef uint32_t index = field("ssid", ssid, 0xFFFFF)
        cdef unsigned int lg2_count = <unsigned int>field("range", range, 31) + 1
        cdef bint only_leaf = to_flag("leaf", leaf)
        cdef uint64_t gone
        if number not in (CMD_CFGI_STE, CMD_CFGI_STE_RANGE, CMD_CFGI_CD, CMD_CFGI_CD_ALL):
            raise ValueError(must_be("op", "a CFGI command of STEs or CDs", op))
        mutex_have_gil(self.c.mutex)
        if number == CMD_CFGI_STE:
            gone = cfgi_ste(self.c, stream, only_leaf)
        elif number == CMD_CFGI_STE_RANGE:
            gone = cfgi_range(self.c, stream, lg2_count)
        elif number == CMD_CFGI_CD:
            gone = cfgi_cd(self.c, stream, index, only_leaf)
        else:
            gone = cfgi_cd_all(self.c, stream)
        mutex_drop(self.c.mutex)
        return gone

    # --- copies ---

    def copy(self):
        """Return independent caches in the same state."""
        other = _restored(*self.geometries, self.nested)
        other.__setstate__(self.__getstate__())
        return other

    def __getstate__(self):
        """Return everything but the geometry, as bytes; equal states behave alike."""
        return self._contents()

    cdef bytes _contents(self):
        """The state, as bytes."""
        cdef uint64_t size = 0
        cdef char* state
        mutex_have_gil(self.c.mutex)
        try:
            state = state_of(self.c, &size)
        finally:
            mutex_drop(self.c.mutex)
        try:
            return PyBytes_FromStringAndSize(state, <Py_ssize_t>size)
        finally:
            free(state)

    def __setstate__(self, state):
        """Take the state of caches of the same geometry.

        Raises
        ------
        ValueError, TypeError
            If it is no such state; nothing is changed.
        RuntimeError
            If an Smmu has these caches: it may be using them.
        """
        cdef Reader reader
        cdef CachesC* c
        cdef CachesC old
        if self.taken:
            raise RuntimeError("caches: an Smmu has them; only its commands change them")
        if type(state) is not bytes:
            raise TypeError(must_be("state", "bytes", type(state)))
        reader.data = PyBytes_AS_STRING(state)
        reader.left = len(state)
        c = made(list(self.geometries), self.c.split)
        try:
            take_state(c, &reader)
            # the struct stays where it is: others hold its address
            old = self.c[0]
            self.c[0] = c[0]
            c[0] = old
            c.mutex, self.c.mutex = self.c.mutex, c.mutex  # which somebody may be waiting for
        finally:
            release(c)

    def __reduce__(self):
        return _restored, (*self.geometries, self.nested), self.__getstate__()
