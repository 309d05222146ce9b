"""Configuration lookup: the rules from a StreamID and a SubstreamID to a decoded context.

Sections: IHI 0070 3.3 (stream table, CD table), 5.1-5.4 (structures, ILLEGAL conditions),
3.4 (address sizes), 6.3.9-6.3.15 (GBPA, STRTAB_BASE).  Each function is one rule on what was
fetched: it gives 0, or why it refuses (WHY_...).  Words are little-endian dwords.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from smmufast._facts.bits cimport low_mask
from smmufast._facts.layout cimport *
from smmufast._facts.hw cimport Hw
from smmufast._facts.types cimport (
    ACCESS_INSTR, ACCESS_PRIV, ACCESS_WRITE, FETCH_CD, FETCH_L1CD, FETCH_L1STD, FETCH_STE, NO_SSID,
    Context, Half, Stage2,
)
from smmufast._rules.vmsa cimport (
    ATTR_WB, REGIME_E0PD0, REGIME_E0PD1, REGIME_EPAN, REGIME_PAN, REGIME_SINGLE, REGIME_WXN,
    address_format, block_levels, entering_attr, fitting_levels, granule_of_tg0, granule_of_tg1,
    hierarchical_bits, in_place, leaf_bits, levels_below_start, needed, range_mask, shareability,
    stage2_level, stage2_size_legal, table_align_lg2, table_bits, tsz_max, tsz_min,
)
from smmufast._facts.why cimport *


cdef enum:
    TERMINATE_A = 1   # abort, else RAZ/WI
    TERMINATE_R = 2   # record
    TERMINATE_S = 4   # stall, whatever the others say
    TERMINATE_SID = 8  # C_BAD_STREAMID is recorded as others are: CR2.RECINVSID is not asked
    STAGE1_BYPASS = -1


# --- sizes ---

# S2.1-2, S3.4-3, S5.2-66, S6.3.8-2
cdef inline unsigned int size_bits(unsigned int code, unsigned int minor) noexcept nogil:
    """Bits of an OAS, IPS or S2PS code; 6 and 7 exist from v3.1 and v3.4 on (5.4 CD.IPS)."""
    if code >= 6 and minor == 0:
        code = 5
    if code == 7 and minor < 4:
        code = 6
    return (0x3834302C2A282420ULL >> (8 * code)) & 0xFF


# S5.1-3, S5.2-13
cdef inline uint64_t pointer_mask(unsigned int minor) noexcept nogil:
    """Address bits that a structure's pointer field has: [47:6], [51:6] or [55:6]."""
    return low_mask(48 if minor == 0 else 52 if minor < 4 else 56) & ~low_mask(6)


# --- stream table (3.3.1, 5.1) ---

# S3.3.1.1-1, S6.3.24-3
cdef inline uint64_t strtab_linear_base(uint64_t address, unsigned int log2size) noexcept nogil:
    """STRTAB_BASE.ADDR of a linear table: aligned to what LOG2SIZE itself says (6.3.24)."""
    return address & ~low_mask(log2size + 6 if log2size < 57 else 63)


# S6.3.24-4, S6.3.24-91
cdef inline uint64_t strtab_two_level_base(
        uint64_t address, int log2size, int split) noexcept nogil:
    """STRTAB_BASE.ADDR of a level-1 table: aligned likewise, to 64 bytes at least."""
    cdef int top = log2size - split + 2
    return address & ~low_mask((5 if top < 5 else top) + 1)


# S3.3.1.2-2, S6.3.25-4, S6.3.25-92
cdef inline unsigned int split_of(unsigned int code) noexcept nogil:
    """STRTAB_BASE_CFG.SPLIT: any value but 6, 8 and 10 acts as 6."""
    return code if code == 8 or code == 10 else 6


# S3.2-1, S3.3.1-1, S6.3.2-9, S6.3.25-5, S6.3.25-6, S6.3.25-9, S7.3.3-1
cdef inline int stream_first(const Hw* hw, uint32_t sid, uint64_t* address) noexcept nogil:
    """The first fetch of a StreamID, FETCH_L1STD or FETCH_STE; 0 when it is out of range."""
    if <uint64_t>sid >> hw.log2size:
        return 0
    if hw.two_level:
        address[0] = hw.strtab + (<uint64_t>(sid >> hw.split) << 3)
        return FETCH_L1STD
    address[0] = hw.strtab + (<uint64_t>sid << 6)
    return FETCH_STE


# S3.3.1.2-1, S3.3.1.2-3, S3.3.1.2-4, S3.21.3-5, S5.1-1, S5.1-2, S5.1.1-1, S7.3.3-2
cdef inline int l1std_next(
        const Hw* hw, uint64_t l1std, uint32_t sid, uint64_t* address) noexcept nogil:
    """Where the level-2 array that an L1STD names holds the STE of this StreamID."""
    cdef unsigned int span = <unsigned int>l1std_span(&l1std)
    cdef uint64_t index = sid & low_mask(hw.split)
    if span == 0:
        return WHY_STREAM_NO_TABLE
    if span - 1 > hw.split:
        return WHY_STREAM_SPAN
    if index >> (span - 1):
        return WHY_STREAM_SHORT
    address[0] = (l1std_l2ptr(&l1std) & hw.pointer_mask & ~low_mask(span + 5)) + (index << 6)
    return 0


# --- stream table entry (5.2) ---

# S5.2-2, S7.3.7-4
cdef inline bint ste_aborts(const uint64_t* ste) noexcept nogil:
    """Config 0b0xx: terminate without an event, whatever else the STE says."""
    return (ste_config(ste) & 4) == 0


cdef inline bint ste_stage1(const uint64_t* ste) noexcept nogil:
    return ste_config(ste) & 1


cdef inline bint ste_stage2(const uint64_t* ste) noexcept nogil:
    return ste_config(ste) >> 1 & 1


# S2.2-5, S3.3.3-2, S3.17.5-1, S3.17.5-2, S5.2-41, S5.2-42, S6.3.12-3
cdef inline int ste_world(const Hw* hw, const uint64_t* ste) noexcept nogil:
    """StreamWorld of a Non-secure stream: EL1 where STRW is IGNORED."""
    if not hw.s1p or not hw.hyp or ste_config(ste) != 5 or ste_strw(ste) == 0:
        return WORLD_NS_EL1
    return WORLD_EL2_E2H if cr2_e2h(hw.cr2) else WORLD_EL2


# S5.2-24
cdef inline bint substreams(const Hw* hw, const uint64_t* ste) noexcept nogil:
    """Stage 1 has a table of CDs: S1CDMax is not 0, and not IGNORED."""
    return hw.ssidsize != 0 and ste_s1cdmax(ste) != 0


# S3.17-6, S3.17-7, S5.2-54, S5.2-55, V8.1.2-2
cdef inline uint16_t ste_vmid(const Hw* hw, const uint64_t* ste) noexcept nogil:
    """The VMID that tags translations of the stream; 0 where S2VMID is IGNORED."""
    if ste_config(ste) == 4 or not hw.s2p or ste_world(hw, ste) != WORLD_NS_EL1:
        return 0
    return <uint16_t>ste_s2vmid(ste)


# S5.2-36, S5.2-37, S5.2-39
cdef inline int eats_check(const Hw* hw, const uint64_t* ste) noexcept nogil:
    """Full ATS needs a stage 2 that does not stall; split-stage ATS both stages as well."""
    cdef unsigned int eats = <unsigned int>ste_eats(ste)
    if not hw.ats or ste_config(ste) == 4:
        return 0
    if eats == STE_EATS_SPLIT:
        if ste_config(ste) != 7:
            return WHY_STE_EATS_STAGES
        if hw.ns1ats:
            return WHY_STE_EATS_NS1ATS
    if (eats == STE_EATS_SPLIT or eats == STE_EATS_FULL and ste_stage2(ste)) and ste_s2s(ste):
        return WHY_STE_EATS_S2S
    return 0


# S2.2-1, S2.2-3, S3.3.2-23, S3.4.3-1, S3.21.3-1, S5-3, S5.2-7, S5.2-8, S5.2-12, S5.2-14, S5.2-18,
# S5.2-33, S5.2-43, S5.2-56, S5.2.2-1, S7.3.5-1
cdef inline int ste_check(const Hw* hw, const uint64_t* ste) noexcept nogil:
    """V=0 and the ILLEGAL conditions of an STE whose Config is not 0b0xx (5.2.2).

    Those of stage 2 are in stage2_decode.
    """
    cdef int why
    if ste_stage1(ste) and not hw.s1p:
        return WHY_STE_S1P
    if ste_stage2(ste) and not hw.s2p:
        return WHY_STE_S2P
    why = eats_check(hw, ste)
    if why:
        return why
    if hw.s1p and hw.hyp and ste_config(ste) == 5 and ste_strw(ste) & 1:
        return WHY_STE_STRW
    if ste_stage1(ste):
        if ste_s1stalld(ste) and hw.stall_model != 0:
            return WHY_STE_S1STALLD
        if hw.ssidsize != 0 and ste_s1cdmax(ste) > hw.ssidsize:
            return WHY_STE_S1CDMAX
        if substreams(hw, ste) and not hw.cd2l and ste_s1fmt(ste) in (1, 2):
            return WHY_STE_CD2L
        # v3.0 leaves a pointer beyond OAS to the fetch, nested translation leaves it to stage 2
        if (hw.minor >= 1 and not ste_stage2(ste)
                and ste_s1contextptr(ste) & hw.pointer_mask & hw.oas_over):
            return WHY_STE_S1CONTEXTPTR
    if not hw.vmid16 and ste_vmid(hw, ste) >> 8:
        return WHY_STE_S2VMID
    return 0


cdef inline int why_of_half(int why, unsigned int upper) noexcept nogil:
    """The reason of TTB0 or TTB1, from that of TTB0: their numbers follow each other."""
    return why + <int>(upper << 8)


# --- substreams and context descriptor tables (3.3.2, 5.3) ---

# S3.2-2, S3.2-4, S3.3.2-2, S3.3.2-3, S3.3.2-4, S3.3.2-5, S3.3.2-6, S3.3.2-7, S3.3.2-8, S3.9-2,
# S5.2-16, S5.2-17, S5.2-19, S5.2-20, S5.2-21, S5.2-22, S5.2-23, S6.3.2-10, S7.3.7-1, S7.3.7-2,
cdef inline void substreams_of(
        const Hw* hw, const uint64_t* ste, uint32_t* least, uint32_t* count) noexcept nogil:
    """SubstreamIDs that have a CD, each that of its number: how many, from which on."""
    least[0] = 1 if ste_s1dss(ste) == STE_S1DSS_SUBSTREAM_0 else 0  # that is for no SubstreamID
    count[0] = 0
    if ste_stage1(ste) and substreams(hw, ste):
        count[0] = (<uint32_t>1 << ste_s1cdmax(ste)) - least[0]


# S7.3.9-1, S7.3.9-2, S13.6.4-4
cdef inline int substream(
        const Hw* hw, const uint64_t* ste, uint32_t ssid, int* index) noexcept nogil:
    """Which CD a transaction uses, or STAGE1_BYPASS, or why none (structures 3.3)."""
    cdef unsigned int dss = <unsigned int>ste_s1dss(ste)
    cdef bint table = ste_stage1(ste) and substreams(hw, ste)
    cdef uint32_t least = 0, count = 0
    index[0] = 0
    if ssid != NO_SSID:
        substreams_of(hw, ste, &least, &count)
        if ssid - least < count:
            index[0] = <int>ssid
            return 0
        if not ste_stage1(ste):
            return WHY_SUBSTREAM_NO_STAGE1
        if not table:
            return WHY_SUBSTREAM_NO_TABLE
        return WHY_SUBSTREAM_0 if ssid < least else WHY_SUBSTREAM_BEYOND
    if not ste_stage1(ste):
        index[0] = STAGE1_BYPASS
    elif table and dss == STE_S1DSS_BYPASS:
        index[0] = STAGE1_BYPASS
    elif table and dss != STE_S1DSS_SUBSTREAM_0:
        return WHY_SUBSTREAM_WANTED
    return 0


# S3.3.2-9, S5.2-10
cdef inline int cd_leaf_lg2(const Hw* hw, const uint64_t* ste) noexcept nogil:
    """lg2 of the CDs in a leaf of a two-level table, 0 when the table is linear."""
    cdef unsigned int fmt
    if not substreams(hw, ste):
        return 0
    fmt = <unsigned int>ste_s1fmt(ste)
    return 6 if fmt == 1 else 10 if fmt == 2 else 0


# S3.3.2-10, S5.2-9, S5.2-11
cdef inline uint64_t cd_table(const Hw* hw, const uint64_t* ste, int leaf) noexcept nogil:
    """Where the table of CDs is, or with `leaf` the level-1 table of L1CDs.

    Pointer bits below the table's size are RES0 and act as 0.
    """
    cdef uint64_t base = ste_s1contextptr(ste) & hw.pointer_mask
    cdef int cdmax = <int>ste_s1cdmax(ste) if substreams(hw, ste) else 0
    if leaf == 0:
        return base & ~low_mask(cdmax + 6)
    # the level-1 table has 2^(cdmax - leaf) entries of 8 bytes
    if cdmax - leaf + 3 > 6:
        base &= ~low_mask(cdmax - leaf + 3)
    return base


cdef inline uint64_t cd_entry(uint64_t table, int leaf, uint32_t index) noexcept nogil:
    """Where the first fetch towards CD `index` is: of its L1CD, or without `leaf` of itself."""
    return table + (<uint64_t>(index >> leaf) << 3 if leaf else <uint64_t>index << 6)


cdef inline int cd_first(
        const Hw* hw, const uint64_t* ste, uint32_t index, uint64_t* address) noexcept nogil:
    """The first fetch towards CD `index`: FETCH_L1CD or FETCH_CD."""
    cdef int leaf = cd_leaf_lg2(hw, ste)
    address[0] = cd_entry(cd_table(hw, ste, leaf), leaf, index)
    return FETCH_L1CD if leaf else FETCH_CD


# S3.4.3-3, S3.4.3-4, S5.3-1, S5.3-2, S5.3-3, S7.3.9-3
cdef inline int l1cd_leaf(
        const Hw* hw, bint nested, int leaf, uint64_t l1cd, uint32_t index,
        uint64_t* address) noexcept nogil:
    """Where the leaf that an L1CD names holds CD `index`; `nested`: that is an IPA."""
    cdef uint64_t base = l1cd_l2ptr(&l1cd) & hw.pointer_mask & ~low_mask(leaf + 6)
    if not l1cd_v(&l1cd):
        return WHY_L1CD_V
    if base & hw.oas_over and hw.minor >= 1 and not nested:
        return WHY_L1CD_L2PTR
    address[0] = base + ((index & low_mask(leaf)) << 6)
    return 0


cdef inline int l1cd_next(const Hw* hw, const uint64_t* ste, uint64_t l1cd, uint32_t index,
                          uint64_t* address) noexcept nogil:
    """Where the leaf that an L1CD names holds CD `index`, below this STE."""
    return l1cd_leaf(hw, ste_stage2(ste), cd_leaf_lg2(hw, ste), l1cd, index, address)


# --- translation table bases (5.2, 5.4) ---

cdef inline void half_shape(
        const Hw* hw, Half* half, unsigned int granule, unsigned int below,
        unsigned int input_bits, bint ds, uint64_t ttb, unsigned int output_bits,
        bint affd) noexcept nogil:
    """What follows from a granule, how many levels lie below the first, and the sizes."""
    half.granule = granule
    half.stride = granule - 3
    half.shift = granule + below * half.stride
    half.level = 3 - <int>below
    half.entry_mask = low_mask(half.stride) << 3
    address_format(half, granule, ds)
    half.blocks = block_levels(granule, ds, hw.oas)
    half.fitting = fitting_levels(half, output_bits)
    half.output_bits = output_bits
    half.table_mask = ~low_mask(
        table_align_lg2(input_bits, half.shift, output_bits >= 52 or not half.own_sh))
    half.table = ttb & half.table_mask
    half.index_mask = low_mask(input_bits)
    half.over = ~low_mask(output_bits)
    half.table_bits = table_bits(half, half.over)
    half.leaf_bits = leaf_bits(half, half.over, affd)


# S3.4-8, S5.4-12, V8.1.7-2
cdef inline unsigned int effective_size(const Hw* hw, unsigned int code) noexcept nogil:
    """Bits of an IPS or S2PS code, capped by OAS."""
    cdef unsigned int bits = size_bits(code, hw.minor)
    return hw.oas if bits > hw.oas else bits


# S2.2-6, S3.13-1, S5.2-75, S5.4-23
cdef inline bint httu_illegal(const Hw* hw, bint ha, bint hd) noexcept nogil:
    """Hardware update asked for beyond IDR0.HTTU."""
    return hw.httu == 0 and (ha or hd) or hw.httu == 1 and hd


# S5.2-70
cdef inline bint endian_illegal(const Hw* hw, bint big) noexcept nogil:
    """A descriptor endianness that IDR0.TTENDIAN lacks."""
    return hw.ttendian == 3 and not big or hw.ttendian == 2 and big


# S3.12-14, S3.12-15, S5.2.2-2, S5.4.2-2, S6.3.1-21
cdef inline int stall_check(
        const Hw* hw, bint stalls, int why_never, int why_always) noexcept nogil:
    """Stalling where IDR0.STALL_MODEL has none, or terminating where it is forced."""
    if hw.stall_model == 1 and stalls:
        return why_never
    return why_always if hw.stall_model == 2 and not stalls else 0


# S3.4-21, S3.4-22, S5.2-82, S5.4-31, S7.3.14-3, V8.2.3-2
cdef inline int ttb_check(
        uint64_t ttb, unsigned int granule, bint ds, unsigned int output_bits, int why_beyond,
        int why_48) noexcept nogil:
    """A table base is within the output size, and within 48 bits but for 52-bit formats."""
    if ttb >> output_bits:
        return why_beyond
    return why_48 if granule != 16 and not ds and ttb >> 48 else 0


# S3.4-15, S3.4-16, S3.12-6, S3.12-17, S5.2-32, S5.2-57, S5.2-59, S5.2-60, S5.2-65, S5.2-68,
# S5.2-74, S5.2-77, S5.2-79, S5.2-80, S5.2.1-7, S5.5-5, V8.1.10-2
cdef inline int stage2_decode(
        const Hw* hw, const uint64_t* ste, Stage2* second) noexcept nogil:
    """Stage 2 of an STE with Config 0b11x, or why it is ILLEGAL (5.2.2)."""
    cdef Half* half = &second.half
    cdef unsigned int granule = granule_of_tg0(ste_s2tg(ste))  # the same codes
    cdef unsigned int tsz = <unsigned int>ste_s2t0sz(ste)
    cdef bint ds = hw.ds and ste_s2ds(ste) and granule != 16
    cdef unsigned int least = 12 if granule == 16 or ds else 16
    cdef unsigned int bits = effective_size(hw, <unsigned int>ste_s2ps(ste))
    cdef uint64_t ttb = ste_s2ttb(ste) & low_mask(48 if hw.minor == 0 else 52)
    cdef int level, why
    if not ste_s2aa64(ste) or not hw.ttf & 2:  # AArch32 tables are not modelled: Hw.ttf is 2
        return WHY_STE_S2AA64
    why = stall_check(hw, ste_s2s(ste), WHY_STE_S2S_NEVER, WHY_STE_S2S_ALWAYS)
    if why:
        return why
    if endian_illegal(hw, ste_s2endi(ste)):
        return WHY_STE_S2ENDI
    if httu_illegal(hw, ste_s2ha(ste), ste_s2hd(ste)):
        return WHY_STE_S2HTTU
    if not hw.granules >> granule & 1:  # granule 0 is a reserved code
        return WHY_STE_S2TG
    if tsz < least or tsz < 64 - <unsigned int>hw.oas or tsz > tsz_max(granule, hw.stt):
        return WHY_STE_S2T0SZ
    level = stage2_level(
        granule, <unsigned int>ste_s2sl0(ste), ste_s2sl0_2(ste), ds, hw.stt, hw.oas)
    if level == 4:
        return WHY_STE_S2SL0
    if not stage2_size_legal(64 - tsz, granule, level):
        return WHY_STE_S2SL0_SIZE
    why = ttb_check(ttb, granule, ds, bits, WHY_STE_S2TTB, WHY_STE_S2TTB_48)
    if why:
        return why
    second.ha = ste_s2ha(ste)
    second.hd = second.ha and ste_s2hd(ste)
    second.affd = ste_s2affd(ste) and not second.ha
    half_shape(hw, half, granule, <unsigned int>(3 - level), 64 - tsz, ds, ttb, bits, second.affd)
    half.range_mask = ~low_mask(64 - tsz)
    half.keep = 0
    half.enabled = half.unprivileged = True
    half.sh = <uint8_t>ste_s2sh0(ste)
    half.swap = ste_s2endi(ste)
    second.simple = not half.swap and in_place(half)
    second.xnx = hw.xnx
    second.fwb = hw.fwb and ste_s2fwb(ste)
    second.ptw = ste_s2ptw(ste) and not hw.ignore_s2ptw
    second.terminate = TERMINATE_A
    if ste_s2r(ste):
        second.terminate |= TERMINATE_R
    if ste_s2s(ste):
        second.terminate |= TERMINATE_S
    return 0


# --- context descriptor (5.4) ---

# S2.2-4, S5.4-2, S5.4-5, S5.4-6, S5.4-29, V8.1.1-1, V8.1.9-1
cdef inline int half_decode(
        const Hw* hw, Half* half, unsigned int granule, unsigned int tsz, bint ds, bint tbi,
        bint had, bint affd, uint64_t ttb, unsigned int ips, unsigned int sh,
        bint swap, unsigned int upper) noexcept nogil:
    """One TTB of a CD, or why its granule, size or address is ILLEGAL (5.4.1)."""
    cdef int why
    if not hw.granules >> granule & 1:  # granule 0 is a reserved code
        return why_of_half(WHY_CD_TG0, upper)
    if tsz < tsz_min(granule, ds, hw.vax) or tsz > tsz_max(granule, hw.stt):
        return why_of_half(WHY_CD_T0SZ, upper)
    ttb &= low_mask(48 if hw.minor == 0 else 52)
    why = ttb_check(ttb, granule, ds, ips, why_of_half(WHY_CD_TTB0, upper),
                    why_of_half(WHY_CD_TTB0_48, upper))
    if why:
        return why
    half_shape(hw, half, granule, levels_below_start(64 - tsz, granule, granule - 3), 64 - tsz, ds,
               ttb, ips, affd)
    half.enabled = True
    half.range_mask = range_mask(64 - tsz, tbi)
    half.keep = hierarchical_bits(had)
    half.sh = sh
    half.swap = swap
    return 0


# S2.2-2, S2.2-7, S3.3.3-3, S3.4.1-5, S3.12-5, S3.12-7, S3.12-16, S3.13.2-2, S3.13.3.1-2, S3.17-10,
# S5.2-34, S5.2-44, S5.4-1, S5.4-10, S5.4-11, S5.4-16, S5.4-19, S5.4-20, S5.4-22, S5.4-25, S5.4-26,
# S5.4-32, S5.4-35, S5.4.1-1, S5.4.1-2, S5.4.1.1-1, S5.4.2-1, S5.4.2-3, S6.3.2-92, S6.3.4-18,
# S7.3.11-1, S16.2.2-2, V8.1.2-1, V8.8.1-1
cdef inline int cd_decode(
        const Hw* hw, const uint64_t* ste, const uint64_t* cd, Context* context) noexcept nogil:
    """A CD's context, or why it is none: V=0, or the CD is ILLEGAL (5.4.1)."""
    cdef int world = ste_world(hw, ste)
    cdef bint two = world != WORLD_EL2
    cdef bint enabled0 = not (two and cd_epd0(cd))
    cdef bint enabled1 = two and not cd_epd1(cd)
    cdef bint ds = hw.ds and cd_ds(cd)
    cdef unsigned int ips
    cdef int why
    if not cd_v(cd):
        return WHY_CD_V
    why = stall_check(hw, cd_s(cd), WHY_CD_S_NEVER, WHY_CD_S_ALWAYS)
    if why:
        return why
    if cd_s(cd) and ste_s1stalld(ste):
        return WHY_CD_S_S1STALLD
    if not cd_a(cd) and hw.term_model:
        return WHY_CD_A
    if not cd_aa64(cd) or not hw.ttf & 2:  # AArch32 tables are not modelled: Hw.ttf is 2
        return WHY_CD_AA64
    if (enabled0 or enabled1) and endian_illegal(hw, cd_endi(cd)):
        return WHY_CD_ENDI
    if httu_illegal(hw, cd_ha(cd), cd_hd(cd)):
        return WHY_CD_HTTU
    if two and not hw.asid16 and cd_asid(cd) >> 8:
        return WHY_CD_ASID
    ips = effective_size(hw, <unsigned int>cd_ips(cd))
    context.ha = cd_ha(cd)
    context.hd = context.ha and cd_hd(cd)
    context.affd = cd_affd(cd) and not context.ha
    context.half[0].enabled = context.half[1].enabled = False
    context.half[0].high_address = context.half[1].high_address = 0
    if enabled0:
        why = half_decode(hw, &context.half[0], granule_of_tg0(cd_tg0(cd)),
                          <unsigned int>cd_t0sz(cd), ds, cd_tbi0(cd), hw.had and cd_had0(cd),
                          context.affd, cd_ttb0(cd), ips,
                          <unsigned int>cd_sh0(cd), cd_endi(cd), 0)
        if why:
            return why
    if enabled1:
        why = half_decode(hw, &context.half[1], granule_of_tg1(cd_tg1(cd)),
                          <unsigned int>cd_t1sz(cd), ds, cd_tbi1(cd), hw.had and cd_had1(cd),
                          context.affd, cd_ttb1(cd), ips,
                          <unsigned int>cd_sh1(cd), cd_endi(cd), 1)
        if why:
            return why
    context.half[0].unprivileged = not (two and hw.e0pd and cd_e0pd0(cd))
    context.half[1].unprivileged = not (hw.e0pd and cd_e0pd1(cd))
    context.mair = cd_mair0(cd) | cd_mair1(cd) << 32
    context.asid = <unsigned short>cd_asid(cd) if two else 0
    context.two_ttbs = two
    context.world = world
    context.aset = cd_aset(cd)
    context.simple = (
        not (cd_endi(cd) or context.hd)
        and in_place(&context.half[0]) and in_place(&context.half[1]))
    context.regime = REGIME_WXN if cd_wxn(cd) else 0
    if not two:
        context.regime |= REGIME_SINGLE
    else:
        if cd_pan(cd):
            context.regime |= REGIME_PAN
        if hw.epan and cd_epan(cd):
            context.regime |= REGIME_EPAN
        if not context.half[0].unprivileged:
            context.regime |= REGIME_E0PD0
        if not context.half[1].unprivileged:
            context.regime |= REGIME_E0PD1
    context.terminate = (
        (TERMINATE_A if cd_a(cd) else 0) | (TERMINATE_R if cd_r(cd) else 0)
        | (TERMINATE_S if cd_s(cd) else 0))
    return 0


# --- overrides by STE and GBPA (13.1, 6.3.14) ---

# S3.3.4-1, S5.2-51, S13.1-101, S13.1-102, S13.1.2-1, S13.1.5-4
cdef inline unsigned int effective_access(
        const Context* context, unsigned int access) noexcept nogil:
    """The access after overrides; a write is always Data."""
    access = (access & context.access_and) | context.access_or
    if access & ACCESS_WRITE:
        access &= ~<unsigned int>ACCESS_INSTR
    return access


# S5.2-50, S13.1.4-1
cdef inline void override_access(
        Context* context, unsigned int privcfg, unsigned int instcfg) noexcept nogil:
    """PRIVCFG and INSTCFG: 0b10 clears, 0b11 sets, 0b0x leaves the device's own."""
    cdef unsigned int keep = ACCESS_WRITE | ACCESS_PRIV | ACCESS_INSTR
    cdef unsigned int force = 0, access
    if privcfg & 2:
        keep &= ~<unsigned int>ACCESS_PRIV
        if privcfg & 1:
            force |= ACCESS_PRIV
    if instcfg & 2:
        keep &= ~<unsigned int>ACCESS_INSTR
        if instcfg & 1:
            force |= ACCESS_INSTR
    context.access_and = keep
    context.access_or = force
    for access in range(8):
        context.need[access] = needed(effective_access(context, access))


cdef inline unsigned int admitted(const Context* context, unsigned int perm) noexcept nogil:
    """Which of the device's own accesses a leaf admits, given what it permits after overrides."""
    cdef unsigned int kind, access, found = 0
    if context.access_or == 0 and context.access_and == (ACCESS_WRITE | ACCESS_PRIV | ACCESS_INSTR):
        return perm
    for kind in range(6):
        access = ACCESS_PRIV if kind >= 3 else 0
        if kind % 3:
            access |= ACCESS_WRITE if kind % 3 == 1 else ACCESS_INSTR
        if perm & context.need[access]:
            found |= 1 << kind
    return found


# S3.3.4-4, S5.2-48, S5.2-49, S13.1.4-4
cdef inline void override_attr(Context* context, bint allowed, bint mtcfg, unsigned int memattr,
                               unsigned int alloccfg, unsigned int shcfg) noexcept nogil:
    """Memory type and shareability that enter translation (the device's are WB and NSH)."""
    context.attr = ATTR_WB
    context.sh = 0
    if allowed:
        context.attr = entering_attr(mtcfg, memattr, alloccfg)
        context.sh = 0 if shcfg == 1 else shcfg  # 01: the device's own
    context.sh = shareability(context.attr, context.sh)


# S3.3.4-5, S3.3.4-6, S5.2-52, S5.2.1-1, S13.1.4-6, S13.3-1, S13.7.1-6
cdef inline void ste_overrides(const Hw* hw, const uint64_t* ste, Context* context) noexcept nogil:
    override_access(context, <unsigned int>ste_privcfg(ste) if hw.attr_perms_ovr else 0,
                    <unsigned int>ste_instcfg(ste) if hw.attr_perms_ovr else 0)
    override_attr(context, hw.attr_types_ovr, ste_mtcfg(ste), <unsigned int>ste_memattr(ste),
                  <unsigned int>ste_alloccfg(ste), <unsigned int>ste_shcfg(ste))
