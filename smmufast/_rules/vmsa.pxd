"""VMSAv8-64, stages 1 and 2: the rules that make an address of a table descriptor.

Sections: DDI 0487 D8 (translation tables, permissions, memory attributes) as IHI 0070
sections 3.4, 5.4 and 13 use it.  Each function is one rule on values; loops are in
_engine/translate.pxd.  `ia` is the input address, `d` a descriptor in host byte order.
"""

from libc.stdint cimport uint8_t, uint64_t

from smmufast._facts.bits cimport low_mask
from smmufast._facts.layout cimport *
from smmufast._facts.types cimport (
    PERM_PR, PERM_PW, PERM_PX, PERM_UR, PERM_UW, PERM_UX, ACCESS_INSTR, ACCESS_PRIV, ACCESS_WRITE,
    Half,
)


cdef extern from "_facts/descriptor.h":
    const uint64_t TABLE "SMMUFAST_TABLE"
    # bits of a page, or else of a block, whose access flag is set
    uint64_t used_leaf "SMMUFAST_USED"(bint page) noexcept nogil
    unsigned int leaf_code "smmufast_leaf_code"(uint64_t d, uint64_t tables) noexcept nogil


cdef enum:
    # kinds of descriptor
    DESC_INVALID = 0
    DESC_TABLE = 1
    DESC_LEAF = 2
    DESC_RESERVED = 3  # bits [1:0] are 0b01, where the level has no block: invalid too
    # what a translation regime does to permissions
    REGIME_SINGLE = 1  # EL2, EL3: no privilege split
    REGIME_WXN = 2
    REGIME_PAN = 4
    REGIME_EPAN = 8
    REGIME_E0PD0 = 16  # E0PD of the TTB0 half; E0PD1 is the next bit
    REGIME_E0PD1 = 32
    # MAIR bytes
    ATTR_WB = 0xFF     # Normal, inner and outer write-back, read and write allocate
    # shareability codes
    SH_NON = 0
    SH_OUTER = 2
    SH_INNER = 3


# --- table geometry (D8.2) ---

cdef inline unsigned int granule_of_tg0(uint64_t tg) noexcept nogil:
    """lg2 of the granule that CD.TG0 codes, 0 when reserved."""
    return (0x000E100CU >> (8 * tg)) & 0xFF


cdef inline unsigned int granule_of_tg1(uint64_t tg) noexcept nogil:
    """lg2 of the granule that CD.TG1 codes, 0 when reserved."""
    return (0x100C0E00U >> (8 * tg)) & 0xFF


# S2.4-2, S5.2-58, S5.4-3
cdef inline unsigned int tsz_max(unsigned int granule, bint stt) noexcept nogil:
    """Largest legal TxSZ: 39, or with small translation tables 48 (47 for 64 KiB)."""
    if not stt:
        return 39
    return 47 if granule == 16 else 48


# S2.3-1, S3.4-7, S5.4-4, V8.1.8-1
cdef inline unsigned int tsz_min(unsigned int granule, bint ds, unsigned int vax) noexcept nogil:
    """Smallest legal TxSZ of stage 1: 16, or 12 where 52-bit input addresses exist."""
    return 12 if vax >= 1 and (granule == 16 or ds) else 16


# V8.2.8-1, V8.2.8.1-1, V8.2.9.1-1
cdef inline unsigned int levels_below_start(
        unsigned int input_bits, unsigned int granule, unsigned int stride) noexcept nogil:
    """How many levels lie below the first: the first level is 3 minus this."""
    cdef unsigned int indexed = input_bits - granule - 1
    return (
        <unsigned int>(indexed >= stride)
        + <unsigned int>(indexed >= 2 * stride)
        + <unsigned int>(indexed >= 3 * stride)
        + <unsigned int>(indexed >= 4 * stride)
    )


# S5.2-81, S5.4-30, V8.2.5.2-1, V8.2.5.2-2
cdef inline unsigned int table_align_lg2(
        unsigned int input_bits, unsigned int shift, bint wide) noexcept nogil:
    """lg2 of the first table's alignment: its own size, 64 bytes at least for 52-bit outputs."""
    cdef unsigned int lg2 = input_bits - shift + 3
    if wide and lg2 < 6:
        return 6
    return 4 if lg2 < 4 else lg2


# V8.2.8-2, V8.2.9-1, V8.2.10-1, V8.2.10-2
cdef inline unsigned int block_levels(
        unsigned int granule, bint ds, unsigned int oas) noexcept nogil:
    """Levels where a block is legal, as a mask: bit level+1."""
    if granule == 12:
        return (1 << 2 | 1 << 3) | (1 << 1 if ds else 0)
    if granule == 14:
        return (1 << 3) | (1 << 2 if ds else 0)
    return (1 << 3) | (1 << 2 if oas >= 52 else 0)


cdef inline unsigned int fitting_levels(
        const Half* half, unsigned int output_bits) noexcept nogil:
    """Of half.blocks, the levels whose blocks are no larger than the output size."""
    cdef unsigned int level, fitting = 0
    for level in range(5):
        if half.granule + (4 - level) * half.stride <= output_bits:
            fitting |= 1 << level
    return half.blocks & fitting


# S5.2-62, V8.1.10-3, V8.1.10-4, V8.2.2-2, V8.2.8.2-1, V8.2.9.2-1, V8.2.10.2-1
cdef inline int stage2_level(
        unsigned int granule, unsigned int sl0, bint sl0_2, bint ds, bint stt,
        unsigned int oas) noexcept nogil:
    """The level where stage 2 starts, that S2SL0 and S2SL0_2 code; 4 when reserved.

    S2SL0_2 counts with 4 KiB and S2DS alone (5.2, NSS2TTWParams), and the levels that only 52-bit
    addresses reach need an output size of 52 bits (S2InvalidSL).
    """
    cdef bint wide = ds and oas >= 52
    if granule == 12:
        if ds and sl0_2:
            return -1 if wide and sl0 == 0 else 4
        if sl0 == 0:
            return 2
        if sl0 == 1:
            return 1
        if sl0 == 2:
            return 0 if oas >= 44 else 4
        return 3 if stt else 4
    if sl0 < 2:
        return 3 - <int>sl0
    if sl0 == 2:
        return 1 if oas >= (42 if granule == 14 else 44) else 4
    return 0 if granule == 14 and wide else 4


# S5.2-61, V8.2.8.2-2, V8.2.9.2-2
cdef inline bint stage2_size_legal(
        unsigned int input_bits, unsigned int granule, int level) noexcept nogil:
    """The first level resolves at least one bit, and at most 16 tables are concatenated."""
    cdef int stride = <int>granule - 3
    cdef int resolved = <int>input_bits - <int>granule - (3 - level) * stride
    cdef bint concatenates = not (
        level == -1 or granule == 14 and level == 0 or granule == 16 and level == 1)
    return 1 <= resolved <= stride + (4 if concatenates else 0)


# V8.2.2-1
cdef inline uint64_t first_table(const Half* half, uint64_t ipa) noexcept nogil:
    """The table of stage 2's first level that translates this IPA: one of those concatenated."""
    return half.table + (ipa >> (half.shift + half.stride) << half.granule)


# S2.8-1, V8.1.7-1, V8.2.8-3
cdef inline void address_format(Half* half, unsigned int granule, bint ds) noexcept nogil:
    """Where descriptors keep their address: bits above 47 have no place, or one of two.

    64 KiB: [51:48] in bits [15:12].  4 and 16 KiB with DS: [49:48] in place, [51:50] in bits
    [9:8], and SH moves to the context.
    """
    half.low_address = 0x0000FFFFFFFFFFFFULL
    half.high_address = 0
    half.high_shift = 0
    half.own_sh = True
    if granule == 16:
        half.high_address = 0xF000
        half.high_shift = 36
    elif ds:
        half.low_address = 0x0003FFFFFFFFFFFFULL
        half.high_address = 0x300
        half.high_shift = 42
        half.own_sh = False
    half.low_address &= ~low_mask(granule)


# --- the input address (D8.2.4, IHI 0070 3.4.1) ---

# V8.1.8-2, V8.2.4-1
cdef inline unsigned int half_of(uint64_t va, bint two_ttbs) noexcept nogil:
    """Which TTB translates this address."""
    return <unsigned int>(va >> 55) & two_ttbs


# S3.4.1-3, S5.4-17, V8.8-1
cdef inline uint64_t range_mask(unsigned int input_bits, bint tbi) noexcept nogil:
    """Address bits that must all equal the half's sign: [63:N], or [55:N] with TBI."""
    cdef uint64_t top = 0x00FFFFFFFFFFFFFFULL if tbi else 0xFFFFFFFFFFFFFFFFULL
    return top & ~low_mask(input_bits)


# S3.4.1-2, V8.1.9-2
cdef inline bint in_range(uint64_t va, uint64_t mask, unsigned int upper) noexcept nogil:
    """The address is one of the region's: its bits above N are all 0, or all 1 above."""
    return ((va ^ (0 - <uint64_t>upper)) & mask) == 0


# V8.2.5.1-1, V8.2.8.3-1
cdef inline uint64_t entry_address(
        const Half* half, uint64_t table, uint64_t ia, unsigned int shift) noexcept nogil:
    """Where the descriptor of `ia` lies in a table whose entries cover 2^shift bytes."""
    return table + (ia >> (shift - 3) & half.entry_mask)


# --- descriptors (D8.3) ---

# V8.2.1-2, V8.3-1, V8.3.1.3-1, V8.15.1.1-1
cdef inline unsigned int descriptor_kind(
        uint64_t d, int level, unsigned int blocks) noexcept nogil:
    """What a descriptor is: bits [1:0], and whether a block is legal at this level."""
    if (d & 1) == 0:
        return DESC_INVALID
    if level == 3:
        return DESC_LEAF if d & 2 else DESC_RESERVED
    if d & 2:
        return DESC_TABLE
    return DESC_LEAF if blocks >> (level + 1) & 1 else DESC_RESERVED


# V8.2.5.2-3, V8.3.1.1-1, V8.3.1.1-2
cdef inline uint64_t next_table(uint64_t d, const Half* half) noexcept nogil:
    """Address of the table that a table descriptor names: aligned to the granule."""
    cdef uint64_t address = d & half.low_address
    if half.high_address:
        address |= (d & half.high_address) << half.high_shift
    return address


# V8.3.1.2-3
cdef inline uint64_t leaf_address(
        uint64_t d, const Half* half, unsigned int shift) noexcept nogil:
    """Output address of the block or page of 2^shift bytes."""
    return next_table(d, half) & ~low_mask(shift)


# S3.4-18, V8.1.7-4, V8.7.1.2-1
cdef inline bint output_fits(
        uint64_t address, const Half* half, unsigned int shift, uint64_t ia) noexcept nogil:
    """What comes out of a page or block at `address` is within the effective output size.

    Of a block that is larger than that size, only the first part is (IHI 0070 3.4).
    """
    return ((address | ia & low_mask(shift)) & half.over) == 0


# S3.4-19
cdef inline unsigned int fitting_lg2(const Half* half, unsigned int shift) noexcept nogil:
    """lg2 of a page or block, or of that first part."""
    return half.output_bits if shift > half.output_bits else shift


cdef inline bint access_flag(uint64_t d) noexcept nogil:
    return pte_s1_af(d)


cdef inline bint not_global(uint64_t d) noexcept nogil:
    return pte_s1_ng(d)


# V8.7.1-1, V8.7.1-2
cdef inline bint contiguous(uint64_t d, unsigned int shift) noexcept nogil:
    """The Contiguous bit, which is RES0 in the largest blocks of each granule (D8.7.1)."""
    return shift < 36 and pte_s1_contiguous(d)


# V8.7.3-1
cdef inline bint no_translation(uint64_t d, int level) noexcept nogil:
    """nT: a block that is not to be cached while its size changes (D8.14; IDR3.BBML)."""
    return level < 3 and pte_s1_nt(d)


# --- hardware update of access flag and dirty state (D8.5; HTTU) ---

# S3.13.2-4
cdef inline uint64_t with_access_flag(uint64_t d) noexcept nogil:
    return d | PTE_S1_AF


# S3.13.3.1-1, V8.5.2.1-1, V8.5.2.1-2
cdef inline bint clean_s1(uint64_t d) noexcept nogil:
    """Read-only by AP[2] alone, which DBM lets the hardware clear."""
    return (d & (PTE_S1_DBM | PTE_S1_AP2)) == (PTE_S1_DBM | PTE_S1_AP2)


cdef inline uint64_t dirty_s1(uint64_t d) noexcept nogil:
    return d & ~PTE_S1_AP2


# S3.13.3.1-9
cdef inline bint clean_s2(uint64_t d) noexcept nogil:
    """Not writable by S2AP[1] alone, which DBM lets the hardware set."""
    return (d & (PTE_S2_DBM | PTE_S2_S2AP1)) == PTE_S2_DBM


# S3.13.3.1-7
cdef inline uint64_t dirty_s2(uint64_t d) noexcept nogil:
    return d | PTE_S2_S2AP1


# Several rules in one comparison.  What does not pass is not decided here: the rules above are.

cdef inline uint64_t table_bits(const Half* half, uint64_t over) noexcept nogil:
    """Bits that read TABLE in a table descriptor whose address has no bit of `over`."""
    return TABLE | half.low_address & over | half.high_address & over >> half.high_shift


cdef inline uint64_t leaf_bits(const Half* half, uint64_t over, bint affd) noexcept nogil:
    """Bits that read TABLE and AF in a page descriptor without a fault before permissions."""
    return table_bits(half, over) | (0 if affd else PTE_S1_AF)


cdef inline bint in_place(const Half* half) noexcept nogil:
    """Once they pass table_bits or leaf_bits, descriptors have no address bits elsewhere."""
    return half.high_address & ~half.table_bits == 0


# --- permissions (D8.4) ---

# S5.4-27, V8.2.6.2-1, V8.4.1.2.2-2
cdef inline uint64_t hierarchical_bits(bint had) noexcept nogil:
    """Bits of a table descriptor that take away from everything below it."""
    if had:
        return 0
    return PTE_S1_TABLE_PXNTABLE | PTE_S1_TABLE_UXNTABLE | PTE_S1_TABLE_APTABLE


# V8.3.1.2-1, V8.4.1.2.2-1, V8.4.1.2.5-1
cdef inline unsigned int leaf_permissions(uint64_t d, uint64_t tables) noexcept nogil:
    """AP[2:1], UXN and PXN of a leaf after the tables above it: {UXN, PXN, AP2, AP1}."""
    return leaf_code(d, tables)


# S2.8-2, S3.3.4-2, S5.4-15, S5.4-18, S5.4.1-3, S13.4.1-1, V8.4.1.2.1-1, V8.4.1.2.1-2, V8.4.1.2.3-1,
# V8.4.1.2.3-2, V8.4.1.2.4-1, V8.4.5.1-1, V8.4.5.1-2
cdef inline unsigned int permitted(
        unsigned int leaf, unsigned int regime, unsigned int upper) noexcept nogil:
    """The accesses that a leaf admits, as PERM_ bits.

    `leaf` comes from leaf_permissions, `upper` is the half (for E0PD).
    """
    cdef bint ap1 = leaf & 1
    cdef bint writable = not leaf & 2
    cdef bint pxn = (leaf & 4) != 0
    cdef bint uxn = (leaf & 8) != 0
    cdef bint wxn = (regime & REGIME_WXN) != 0
    cdef bint uw, ux, px
    cdef unsigned int perm = 0
    if regime & REGIME_SINGLE:
        perm = PERM_PR
        if writable:
            perm |= PERM_PW
        if not uxn and not (wxn and writable):
            perm |= PERM_PX
        return perm | perm >> 3
    uw = ap1 and writable
    ux = not uxn and not (wxn and uw)
    px = not pxn and not uw and not (wxn and writable)
    if not (regime & REGIME_PAN and (ap1 or (regime & REGIME_EPAN and ux))):
        perm = PERM_PR | (PERM_PW if writable else 0)
    if px:
        perm |= PERM_PX
    if regime & (REGIME_E0PD0 << upper):
        return perm
    if ap1:
        perm |= PERM_UR
    if uw:
        perm |= PERM_UW
    if ux:
        perm |= PERM_UX
    return perm


# S2.3-2, S3.3.5-1, S13.4.3-3, S13.7-13, V8.3.1.2-2, V8.4.2.1.1-1, V8.4.2.1.2-1
cdef inline unsigned int stage2_permitted(uint64_t d, bint xnx) noexcept nogil:
    """The accesses that a stage-2 leaf admits, by S2AP and XN; XN alone governs execution."""
    cdef unsigned int xn = <unsigned int>pte_s2_xn(d)
    cdef unsigned int perm = 0
    if pte_s2_s2ap0(d):
        perm = PERM_UR | PERM_PR
    if pte_s2_s2ap1(d):
        perm |= PERM_UW | PERM_PW
    if xn == 0 or xn == 1 and not xnx:
        return perm | PERM_UX | PERM_PX
    if xnx and xn & 1:
        perm |= PERM_UX if xn == 1 else PERM_PX
    return perm


# S13.1.1-3, V8.4.4-1
cdef inline unsigned int needed(unsigned int access) noexcept nogil:
    """The PERM_ bit that an access needs; a write is always Data."""
    cdef unsigned int bit = PERM_UR
    if access & ACCESS_WRITE:
        bit = PERM_UW
    elif access & ACCESS_INSTR:
        bit = PERM_UX
    return bit << 3 if access & ACCESS_PRIV else bit


# --- memory attributes (D8.6; IHI 0070 13.1) ---
# An attribute is one MAIR byte: Device 0000xx00, else outer and inner nibbles:
# 0100 non-cacheable, 00RW write-through transient, 01RW write-back transient,
# 10RW write-through, 11RW write-back.

# S5.4-33, V8.6.1-1
cdef inline unsigned int mair_byte(uint64_t mair, uint64_t d) noexcept nogil:
    """The MAIR byte that a leaf's AttrIndx selects."""
    return <unsigned int>(mair >> (8 * pte_s1_attrindx(d))) & 0xFF


# S3.23-1, S5.4-34
cdef inline unsigned int normal_type(unsigned int attr) noexcept nogil:
    """A MAIR byte with its reserved encodings replaced by what they act as."""
    if attr & 0xF0 == 0:
        return attr & 0x0C
    if attr & 0x0F == 0:
        return attr | 0x03
    return attr


cdef inline bint is_device(unsigned int attr) noexcept nogil:
    return attr & 0xF0 == 0


# S13.1.7-1
cdef inline unsigned int cacheability(
        bint write_back, unsigned int hints, bint transient) noexcept nogil:
    """A nibble of a cacheable level; hints are RW, and without either nothing is transient."""
    if transient and hints:
        return (4 if write_back else 0) | hints
    return (12 if write_back else 8) | hints


cdef inline bint cacheable(unsigned int nibble) noexcept nogil:
    return nibble != 4


cdef inline bint write_back(unsigned int nibble) noexcept nogil:
    return nibble >> 2 & 1


# S13.1.5-3
cdef inline unsigned int combine_hints(unsigned int entering, unsigned int own) noexcept nogil:
    """One level's hints: no-allocate beats allocate, transient beats non-transient."""
    cdef unsigned int hints
    if not cacheable(own):
        return own
    if not cacheable(entering):
        return cacheability(write_back(own), 0, False)
    hints = own & entering & 3
    return cacheability(write_back(own), hints, not (own & 8 and entering & 8))


# S3.3.4-3, S13.1-93, S13.4-1, S13.4.2-1, S13.4.2-2
cdef inline unsigned int stage1_attr(unsigned int entering, unsigned int own) noexcept nogil:
    """Memory type after stage 1: the leaf's, with hints combined if the entering type has any."""
    own = normal_type(own)
    if entering == ATTR_WB or is_device(own) or is_device(entering) or entering == 0x44:
        return own
    return (
        combine_hints(entering >> 4, own >> 4) << 4
        | combine_hints(entering & 15, own & 15)
    )


# S13.1.1-2, S13.4.4-1, V8.6.2-1, V8.6.2-2
cdef inline unsigned int shareability(unsigned int attr, unsigned int sh) noexcept nogil:
    """Device and non-cacheable memory is outer shareable; code 01 acts as non-shareable."""
    if is_device(attr) or attr == 0x44:
        return SH_OUTER
    return SH_NON if sh == 1 else sh


# S5.2-64, S5.4-8, V8.6.2-3, V8.6.7-1
cdef inline unsigned int leaf_sh(uint64_t d, const Half* half) noexcept nogil:
    """SH of a leaf; with the 52-bit format of 4 and 16 KiB it is the CD's."""
    return <unsigned int>pte_s1_sh(d) if half.own_sh else half.sh


# S5.2-46, S13.1.4-7
cdef inline unsigned int override_type(unsigned int code, unsigned int hints,
                                       bint transient) noexcept nogil:
    """MAIR byte of a MemAttr code in stage-2 form (STE.MemAttr, GBPA.MemAttr).

    Reserved codes are Device-nGnRnE.
    """
    cdef unsigned int outer = code >> 2
    cdef unsigned int inner = code & 3
    if outer == 0:
        return inner << 2
    if inner == 0:
        return 0
    outer = 4 if outer == 1 else cacheability(outer == 3, hints, transient)
    inner = 4 if inner == 1 else cacheability(inner == 3, hints, transient)
    return outer << 4 | inner


# S3.3.4-7, S5.2-47, S6.3.14-3, S13.1-91, S13.1-92, S13.1.1-1, S13.1.3-1, S13.1.4-8, S13.6.1-1
cdef inline unsigned int entering_attr(
        bint mtcfg, unsigned int memattr, unsigned int alloccfg) noexcept nogil:
    """Type of a transaction after MTCFG, MemAttr and ALLOCCFG.

    The device's own is Normal write-back, read and write allocate, non-transient.
    ALLOCCFG is 1RWT to override the hints.
    """
    cdef unsigned int hints = 3
    cdef bint transient = False
    if alloccfg & 8:
        hints = alloccfg >> 1 & 3
        transient = alloccfg & 1
    return override_type(memattr if mtcfg else 15, hints, transient)


cdef inline bint stage2_device(uint64_t d, bint fwb) noexcept nogil:
    """A stage-2 leaf makes whatever it maps Device; reserved codes of MemAttr do."""
    cdef unsigned int code = <unsigned int>pte_s2_memattr(d)
    if fwb:
        return code & 7 <= 4
    return code & 12 == 0 or code & 3 == 0


# S13.4.3-2, V8.6.5.2-1
cdef inline unsigned int weaker(unsigned int nibble, unsigned int code) noexcept nogil:
    """One level's cacheability after stage 2 (01 NC, 10 WT, 11 WB): hints stay, NC is strictest."""
    if code == 1 or not cacheable(nibble):
        return 4
    return nibble & ~<unsigned int>4 if code == 2 else nibble


# V8.6.3-1, V8.6.6-2
cdef inline unsigned int forced(unsigned int nibble) noexcept nogil:
    """One level forced to write-back: hints stay, read and write allocate where there are none."""
    return nibble | 4 if cacheable(nibble) else 15


# S2.4-1, S13.1-94, S13.1.5-1, S13.1.6-1, V8.6.5-1, V8.6.5.1-1, V8.6.6-1
cdef inline unsigned int stage2_attr(uint64_t d, bint fwb, unsigned int attr) noexcept nogil:
    """Memory type after stage 2, from that which enters it: combined, or by S2FWB (13.1.3)."""
    cdef unsigned int code = <unsigned int>pte_s2_memattr(d)
    cdef unsigned int device
    if stage2_device(d, fwb):
        if fwb:
            device = (code & 3) << 2 if code & 4 == 0 else 0
        else:
            device = code << 2 if code < 4 else 0
        return attr if is_device(attr) and attr < device else device
    if fwb:
        if code & 7 == 6:
            return 0xFF if is_device(attr) else forced(attr >> 4) << 4 | forced(attr & 15)
        return 0x44 if code & 7 == 5 and not is_device(attr) else attr
    if is_device(attr):
        return attr
    return weaker(attr >> 4, code >> 2) << 4 | weaker(attr & 15, code & 3)


# S13.1.5-2, V8.6.7.1-1
cdef inline unsigned int combine_sh(unsigned int a, unsigned int b) noexcept nogil:
    """The stronger shareability: outer over inner over none; code 01 is none."""
    if a == SH_OUTER or b == SH_OUTER:
        return SH_OUTER
    return SH_INNER if a == SH_INNER or b == SH_INNER else SH_NON
