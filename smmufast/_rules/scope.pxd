"""The scope of TLBI and CFGI: what entries are tagged with, and which of them a command hits.

A rule of tags says which request an entry may answer; a rule of commands says which entries may not
stay.  Sections: IHI 0070 3.17 (tags of TLB entries), 3.21 (entries that could answer one request),
4.3 (CFGI_...), 4.4 (TLBI_...).
"""

from libc.stdint cimport int8_t, uint8_t, uint16_t, uint32_t, uint64_t

from smmufast._facts.bits cimport low_mask
from smmufast._facts.layout cimport (
    CMD_TLBI_EL2_ALL, CMD_TLBI_EL2_ASID, CMD_TLBI_EL2_VA, CMD_TLBI_EL2_VAA, CMD_TLBI_NH_ALL,
    CMD_TLBI_NH_ASID, CMD_TLBI_NH_VA, CMD_TLBI_NH_VAA, CMD_TLBI_NSNH_ALL, CMD_TLBI_S2_IPA,
    CMD_TLBI_S12_VMALL, WORLD_EL2, WORLD_EL2_E2H, WORLD_NS_EL1,
)


cdef enum:
    # kind of an entry: bit 0, stage 1 is in it; bit 1, stage 2 is in it
    KIND_S1 = 1            # input address to IPA, or to PA where there is no stage 2
    KIND_S2 = 2            # IPA to PA
    KIND_COMBINED = 3      # input address to PA, through both stages


cdef extern from * nogil:
    """
    /* second words of tags in TLB and walk caches */
    #define KEY_VMID_SHIFT 16
    #define KEY_LG2_SHIFT 32
    #define KEY_KIND_SHIFT 38
    #define KEY_WORLD_SHIFT 40
    #define KEY_ASID 0xFFFFULL
    #define KEY_VMID 0xFFFF0000ULL
    #define KEY_LG2 (0x3FULL << 32)
    #define KEY_KIND (3ULL << 38)
    #define KEY_STAGE1 (1ULL << 38)
    #define KEY_WORLD (3ULL << 40)
    #define KEY_GLOBAL (1ULL << 42)
    #define KEY_ASET_SHIFT 43
    #define KEY_ASET (1ULL << 43)
    #define KEY_VALID (1ULL << 63)
    """
    const int KEY_VMID_SHIFT, KEY_LG2_SHIFT, KEY_KIND_SHIFT, KEY_WORLD_SHIFT, KEY_ASET_SHIFT
    const uint64_t KEY_ASID, KEY_VMID, KEY_LG2, KEY_KIND, KEY_STAGE1, KEY_WORLD, KEY_GLOBAL
    const uint64_t KEY_ASET, KEY_VALID


# --- tags ---

cdef inline uint64_t key_tags(unsigned int kind, unsigned int world) noexcept nogil:
    """The tags that an entry of a kind and a StreamWorld has, as bits of its key."""
    if world == WORLD_NS_EL1:
        if kind == KIND_S2:
            return KEY_VMID
        if kind == KIND_S1 or kind == KIND_COMBINED:
            return KEY_VMID | KEY_ASID | KEY_ASET | KEY_GLOBAL
    if world == WORLD_EL2_E2H and kind == KIND_S1:
        return KEY_ASID | KEY_ASET | KEY_GLOBAL
    return 0


# S2.3-3, S3.3.3-4, S3.3.3-6, S3.17-1, S3.17-2, S3.17-3, S3.17-4, S3.17-5, S3.17-9, S3.17.6-2,
# S3.20.1-2, S5.2.1-6, S5.2.1-8, S5.4-24, S5.4.1-8, S5.4.1-9, S6.3.9-6, V8.16.3.1-1, V8.16.3.1-2,
# V8.16.3.1-4, V8.16.3.1-5
cdef inline uint64_t key_of(
        uint64_t tags, unsigned int kind, unsigned int world, uint16_t vmid, uint16_t asid,
        unsigned int aset) noexcept nogil:
    """The key of entries that are not global, without their size; `tags`: key_tags().

    ASET tags these too, which it may; it must tag the global ones (IHI 0070 3.17).
    """
    return (
        ((<uint64_t>aset << KEY_ASET_SHIFT | <uint64_t>vmid << KEY_VMID_SHIFT | asid) & tags)
        | <uint64_t>kind << KEY_KIND_SHIFT | <uint64_t>world << KEY_WORLD_SHIFT | KEY_VALID
    )


# S3.17.1-2
cdef inline uint64_t global_key(uint64_t key) noexcept nogil:
    """The same of global entries: it has no ASID."""
    return key & ~KEY_ASID | KEY_GLOBAL


# --- commands ---

# A TLBI command of the Non-secure queue.
cdef struct Invalidation:
    int op                 # CMD_TLBI_... of _facts/layout.pxd; others hit nothing
    uint16_t vmid
    uint16_t vmid_mask     # VMID bits that are compared: CR0.VMW, and 0 without stage 2
    uint16_t asid
    bint leaf              # tables in walk caches stay
    bint all_addresses     # first and last do not matter
    uint64_t first, last   # of the addresses, inclusive; first == last: not a range
    uint8_t granule        # log2, entries of other granules stay; 0: any
    int8_t level           # TTL: translations of leaves at other levels stay; 0: any


# Entries by their tags and by addresses.  A tag passes when one of the pairs fits.
cdef struct Filter:
    int n
    uint64_t[3] mask
    uint64_t[3] value
    bint all_addresses
    bint blocks            # an entry stands for the whole block that it is from
    bint tables            # walk caches too
    uint8_t granule
    int8_t level
    uint64_t first, last


cdef inline void filter_pass(Filter* f, uint64_t mask, uint64_t value) noexcept nogil:
    f.mask[f.n] = mask | KEY_VALID
    f.value[f.n] = value | KEY_VALID
    f.n += 1


cdef inline bint filter_key(const Filter* f, uint64_t key) noexcept nogil:
    cdef int i
    for i in range(f.n):
        if key & f.mask[i] == f.value[i]:
            return True
    return False


# S4.4-4
cdef inline bint filter_span(const Filter* f, uint64_t start, unsigned int lg2) noexcept nogil:
    """Whether a span of addresses and those of the filter overlap."""
    start &= ~low_mask(lg2)
    return start <= f.last and (start | low_mask(lg2)) >= f.first


# S4.4.2.4-3
cdef inline unsigned int block_lg2(unsigned int own, unsigned int lg2) noexcept nogil:
    """Log2 of what an invalidation by input address takes an entry of 2^lg2 bytes for.

    `own`: log2 of the page or block of the stage that software knows.  What is smaller only because
    of the other stage goes with the whole of it.
    """
    return own if own > lg2 else lg2


# S4.4.1.1-6, S4.4.1.1-7
cdef inline bint filter_leaf(
        const Filter* f, unsigned int granule, int level) noexcept nogil:
    """Whether a command that names a granule, or a level of leaves, names those of an entry."""
    return ((f.granule == 0 or f.granule == granule)
            and (f.level == 0 or f.level == level))


cdef inline void filter_rivals(Filter* f, uint64_t key) noexcept nogil:
    """The tags of entries that could answer a request which one with this key can answer."""
    f.n = 0
    if key & KEY_GLOBAL:
        filter_pass(f, ~(KEY_ASID | KEY_GLOBAL | KEY_LG2), key & ~(KEY_GLOBAL | KEY_LG2))
    else:
        filter_pass(f, ~KEY_LG2, key & ~KEY_LG2)
        filter_pass(f, ~KEY_LG2, global_key(key) & ~KEY_LG2)


# S3.3.3-5, S3.11-14, S3.17.1-3, S4.4-2, S4.4.2.1-1, S4.4.2.2-1, S4.4.2.3-1, S4.4.2.3-2, S4.4.2.4-1,
# S4.4.2.4-2, S4.4.2.7-1, S4.4.2.8-1, S4.4.2.9-1, S4.4.2.10-1, S4.4.3.1-1, S4.4.3.1-2, S4.4.3.1-3,
# S4.4.3.2-1, S4.4.4.1-1, S16.2-4, S16.2.1-1
cdef inline bint filter_of(const Invalidation* inv, Filter* f) noexcept nogil:
    """What a TLBI command hits (IHI 0070, 4.4); False for those that are not Non-secure."""
    cdef uint64_t ns = <uint64_t>WORLD_NS_EL1 << KEY_WORLD_SHIFT
    cdef uint64_t el2 = <uint64_t>WORLD_EL2 << KEY_WORLD_SHIFT
    cdef uint64_t e2h = <uint64_t>WORLD_EL2_E2H << KEY_WORLD_SHIFT
    cdef uint64_t vmid_mask = <uint64_t>inv.vmid_mask << KEY_VMID_SHIFT
    cdef uint64_t vmid = <uint64_t>inv.vmid << KEY_VMID_SHIFT & vmid_mask
    cdef int op = inv.op
    f.n = 0
    f.blocks = True
    f.tables = True
    f.all_addresses = True
    f.granule = 0
    f.level = 0
    f.first = inv.first
    f.last = inv.last
    if op in (CMD_TLBI_NH_VA, CMD_TLBI_NH_VAA, CMD_TLBI_EL2_VA, CMD_TLBI_EL2_VAA,
              CMD_TLBI_S2_IPA):
        f.tables = not inv.leaf
        f.all_addresses = inv.all_addresses
        f.granule = inv.granule
        f.level = inv.level
    if op == CMD_TLBI_NH_ALL or op == CMD_TLBI_NH_VAA:
        filter_pass(f, KEY_WORLD | KEY_STAGE1 | vmid_mask, ns | KEY_STAGE1 | vmid)
    elif op == CMD_TLBI_NH_ASID or op == CMD_TLBI_NH_VA:
        filter_pass(f, KEY_WORLD | KEY_STAGE1 | vmid_mask | KEY_GLOBAL | KEY_ASID,
                    ns | KEY_STAGE1 | vmid | inv.asid)
        if op == CMD_TLBI_NH_VA:
            filter_pass(f, KEY_WORLD | KEY_STAGE1 | vmid_mask | KEY_GLOBAL,
                        ns | KEY_STAGE1 | vmid | KEY_GLOBAL)
    elif op == CMD_TLBI_EL2_ALL or op == CMD_TLBI_EL2_VAA:
        filter_pass(f, KEY_WORLD, el2)
        filter_pass(f, KEY_WORLD, e2h)
    elif op == CMD_TLBI_EL2_ASID or op == CMD_TLBI_EL2_VA:
        filter_pass(f, KEY_WORLD | KEY_GLOBAL | KEY_ASID, e2h | inv.asid)
        if op == CMD_TLBI_EL2_VA:
            filter_pass(f, KEY_WORLD | KEY_GLOBAL, e2h | KEY_GLOBAL)
            filter_pass(f, KEY_WORLD, el2)
    elif op == CMD_TLBI_S12_VMALL:
        filter_pass(f, KEY_WORLD | vmid_mask, ns | vmid)
    elif op == CMD_TLBI_S2_IPA:
        filter_pass(f, KEY_WORLD | KEY_KIND | vmid_mask,
                    ns | <uint64_t>KIND_S2 << KEY_KIND_SHIFT | vmid)
    elif op == CMD_TLBI_NSNH_ALL:
        filter_pass(f, KEY_WORLD, ns)
    else:
        return False
    return True


cdef inline uint32_t cfgi_last(uint32_t sid, unsigned int lg2_count) noexcept nogil:
    """The last StreamID of CMD_CFGI_STE_RANGE, whose low bits count as 0; of 2^32, all."""
    return sid | <uint32_t>low_mask(lg2_count if lg2_count < 32 else 32)
