"""Configuration lookup: the rules from a StreamID and a SubstreamID to a decoded context.

Sections: IHI 0070 3.3 (stream table, CD table), 5.1-5.4 (structures, ILLEGAL conditions),
3.4 (address sizes), 6.3.9-6.3.15 (GBPA, STRTAB_BASE).  Each function is one rule on what was
fetched: it gives an event number, 0 meaning none.  Words are little-endian dwords.
"""

from libc.stdint cimport uint32_t, uint64_t

from smmufast._bits cimport low_mask
from smmufast._layout cimport *
from smmufast._types cimport (
    ACCESS_INSTR, ACCESS_PRIV, ACCESS_WRITE, FETCH_CD, FETCH_L1CD, FETCH_L1STD, FETCH_STE, NO_SSID,
    Context, Half, Hw,
)
from smmufast._vmsa cimport (
    ATTR_WB, REGIME_E0PD0, REGIME_E0PD1, REGIME_EPAN, REGIME_PAN, REGIME_SINGLE,
    REGIME_WXN, address_format, block_levels, entering_attr, granule_of_tg0, granule_of_tg1,
    hierarchical_bits, leaf_bits, levels_below_start, needed, range_mask, shareability,
    table_align_lg2, table_bits, tsz_max, tsz_min,
)


cdef enum:
    TERMINATE_A = 1   # abort, else RAZ/WI
    TERMINATE_R = 2   # record
    STAGE1_BYPASS = -1


# --- sizes ---

cdef inline unsigned int size_bits(unsigned int code, unsigned int minor) noexcept nogil:
    """Bits of an OAS, IPS or S2PS code; 6 and 7 exist from v3.1 and v3.4 on (5.4 CD.IPS)."""
    if code >= 6 and minor == 0:
        code = 5
    if code == 7 and minor < 4:
        code = 6
    return (0x3834302C2A282420ULL >> (8 * code)) & 0xFF


cdef inline uint64_t pointer_mask(unsigned int minor) noexcept nogil:
    """Address bits that a structure's pointer field has: [47:6], [51:6] or [55:6]."""
    return low_mask(48 if minor == 0 else 52 if minor < 4 else 56) & ~low_mask(6)


# --- stream table (3.3.1, 5.1) ---

cdef inline uint64_t strtab_linear_base(uint64_t address, unsigned int log2size) noexcept nogil:
    """STRTAB_BASE.ADDR of a linear table: aligned to the table's size."""
    return address & ~low_mask(log2size + 6)


cdef inline uint64_t strtab_two_level_base(
        uint64_t address, int log2size, int split) noexcept nogil:
    """STRTAB_BASE.ADDR of a level-1 table: aligned to its size, 64 bytes at least."""
    cdef int top = log2size - split + 2
    return address & ~low_mask((5 if top < 5 else top) + 1)


cdef inline unsigned int split_of(unsigned int code) noexcept nogil:
    """STRTAB_BASE_CFG.SPLIT: any value but 6, 8 and 10 acts as 6."""
    return code if code == 8 or code == 10 else 6


cdef inline int stream_first(const Hw* hw, uint32_t sid, uint64_t* address) noexcept nogil:
    """The first fetch of a StreamID, FETCH_L1STD or FETCH_STE; 0 when it is out of range."""
    if <uint64_t>sid >> hw.log2size:
        return 0
    if hw.two_level:
        address[0] = hw.strtab + (<uint64_t>(sid >> hw.split) << 3)
        return FETCH_L1STD
    address[0] = hw.strtab + (<uint64_t>sid << 6)
    return FETCH_STE


cdef inline int l1std_next(
        const Hw* hw, uint64_t l1std, uint32_t sid, uint64_t* address) noexcept nogil:
    """Where the level-2 array that an L1STD names holds the STE of this StreamID."""
    cdef unsigned int span = <unsigned int>l1std_span(&l1std)
    cdef uint64_t index = sid & low_mask(hw.split)
    if span == 0 or span - 1 > hw.split or index >> (span - 1):
        return EVENT_C_BAD_STREAMID
    address[0] = (l1std_l2ptr(&l1std) & hw.pointer_mask & ~low_mask(span + 5)) + (index << 6)
    return 0


# --- stream table entry (5.2) ---

cdef inline bint ste_aborts(const uint64_t* ste) noexcept nogil:
    """Config 0b0xx: terminate without an event, whatever else the STE says."""
    return (ste_config(ste) & 4) == 0


cdef inline bint ste_stage1(const uint64_t* ste) noexcept nogil:
    return ste_config(ste) & 1


cdef inline bint ste_stage2(const uint64_t* ste) noexcept nogil:
    return ste_config(ste) >> 1 & 1


cdef inline int ste_world(const Hw* hw, const uint64_t* ste) noexcept nogil:
    """StreamWorld of a Non-secure stream: EL1 where STRW is IGNORED."""
    if not hw.s1p or not hw.hyp or ste_config(ste) != 5 or ste_strw(ste) == 0:
        return WORLD_NS_EL1
    return WORLD_EL2_E2H if cr2_e2h(hw.cr2) else WORLD_EL2


cdef inline bint substreams(const Hw* hw, const uint64_t* ste) noexcept nogil:
    """Stage 1 has a table of CDs: S1CDMax is not 0, and not IGNORED."""
    return hw.ssidsize != 0 and ste_s1cdmax(ste) != 0


cdef inline int ste_check(const Hw* hw, const uint64_t* ste) noexcept nogil:
    """V=0 and the ILLEGAL conditions of an STE whose Config is not 0b0xx (5.2.2)."""
    if ste_stage1(ste) and not hw.s1p:
        return EVENT_C_BAD_STE
    # Stage 2 is not modelled yet: Hw.s2p is 0, so every Config 0b11x ends here.  Its own
    # conditions (EATS, S2TG, S2T0SZ, S2SL0, S2TTB, ...) take their place after this line.
    if ste_stage2(ste) and not hw.s2p:
        return EVENT_C_BAD_STE
    if hw.s1p and hw.hyp and ste_config(ste) == 5 and ste_strw(ste) & 1:
        return EVENT_C_BAD_STE
    if ste_stage1(ste):
        if ste_s1stalld(ste) and hw.stall_model != 0:
            return EVENT_C_BAD_STE
        if hw.ssidsize != 0 and ste_s1cdmax(ste) > hw.ssidsize:
            return EVENT_C_BAD_STE
        if substreams(hw, ste) and not hw.cd2l and ste_s1fmt(ste) in (1, 2):
            return EVENT_C_BAD_STE
        # v3.0 leaves a pointer beyond OAS to the fetch (cd_fetch_fits)
        if hw.minor >= 1 and ste_s1contextptr(ste) & hw.pointer_mask & hw.oas_over:
            return EVENT_C_BAD_STE
    if (ste_config(ste) != 4 and hw.s2p and not hw.vmid16 and ste_s2vmid(ste) >> 8
            and ste_world(hw, ste) == WORLD_NS_EL1):
        return EVENT_C_BAD_STE
    return 0


# --- substreams and context descriptor tables (3.3.2, 5.3) ---

cdef inline int substream(
        const Hw* hw, const uint64_t* ste, uint32_t ssid, int* index) noexcept nogil:
    """Which CD a transaction uses, or STAGE1_BYPASS, or why none (structures 3.3)."""
    cdef unsigned int dss = <unsigned int>ste_s1dss(ste)
    cdef bint table = ste_stage1(ste) and substreams(hw, ste)
    index[0] = 0
    if ssid != NO_SSID:
        if not table or <uint64_t>ssid >> ste_s1cdmax(ste):
            return EVENT_C_BAD_SUBSTREAMID
        if ssid == 0 and dss == 2:
            return EVENT_F_STREAM_DISABLED
        index[0] = <int>ssid
        return 0
    if not ste_stage1(ste):
        index[0] = STAGE1_BYPASS
    elif table and dss == 1:
        index[0] = STAGE1_BYPASS
    elif table and dss != 2:
        return EVENT_F_STREAM_DISABLED
    return 0


cdef inline int cd_leaf_lg2(const Hw* hw, const uint64_t* ste) noexcept nogil:
    """lg2 of the CDs in a leaf of a two-level table, 0 when the table is linear."""
    cdef unsigned int fmt
    if not substreams(hw, ste):
        return 0
    fmt = <unsigned int>ste_s1fmt(ste)
    return 6 if fmt == 1 else 10 if fmt == 2 else 0


cdef inline int cd_first(
        const Hw* hw, const uint64_t* ste, uint32_t index, uint64_t* address) noexcept nogil:
    """The first fetch towards CD `index`: FETCH_L1CD or FETCH_CD.

    Pointer bits below the table's size are RES0 and act as 0.
    """
    cdef uint64_t base = ste_s1contextptr(ste) & hw.pointer_mask
    cdef int leaf = cd_leaf_lg2(hw, ste)
    cdef int cdmax = <int>ste_s1cdmax(ste) if substreams(hw, ste) else 0
    if leaf == 0:
        address[0] = (base & ~low_mask(cdmax + 6)) + (<uint64_t>index << 6)
        return FETCH_CD
    # the level-1 table has 2^(cdmax - leaf) entries of 8 bytes
    if cdmax - leaf + 3 > 6:
        base &= ~low_mask(cdmax - leaf + 3)
    address[0] = base + (<uint64_t>(index >> leaf) << 3)
    return FETCH_L1CD


cdef inline int l1cd_next(const Hw* hw, const uint64_t* ste, uint64_t l1cd, uint32_t index,
                          uint64_t* address) noexcept nogil:
    """Where the leaf that an L1CD names holds CD `index`."""
    cdef int leaf = cd_leaf_lg2(hw, ste)
    cdef uint64_t base = l1cd_l2ptr(&l1cd) & hw.pointer_mask & ~low_mask(leaf + 6)
    if not l1cd_v(&l1cd):
        return EVENT_C_BAD_SUBSTREAMID
    if base & hw.oas_over and hw.minor >= 1:
        return EVENT_C_BAD_SUBSTREAMID
    address[0] = base + ((index & low_mask(leaf)) << 6)
    return 0


# --- context descriptor (5.4) ---

cdef inline int half_decode(
        const Hw* hw, Half* half, unsigned int granule, unsigned int tsz, bint ds, bint tbi,
        bint had, bint affd, uint64_t ttb, unsigned int ips, unsigned int sh) noexcept nogil:
    """One TTB of a CD; C_BAD_CD when its granule, size or address is ILLEGAL (5.4.1)."""
    cdef unsigned int input_bits, below, stride
    if not hw.granules >> granule & 1:  # granule 0 is a reserved code
        return EVENT_C_BAD_CD
    if tsz < tsz_min(granule, ds, hw.vax) or tsz > tsz_max(granule, hw.stt):
        return EVENT_C_BAD_CD
    ttb &= low_mask(48 if hw.minor == 0 else 52)
    if ttb >> ips or (granule != 16 and not ds and ttb >> 48):
        return EVENT_C_BAD_CD
    input_bits = 64 - tsz
    stride = granule - 3
    below = levels_below_start(input_bits, granule, stride)
    half.enabled = True
    half.granule = granule
    half.stride = stride
    half.shift = granule + below * stride
    half.level = 3 - <int>below
    half.entry_mask = low_mask(stride) << 3
    address_format(half, granule, ds)
    half.blocks = block_levels(granule, ds, hw.oas)
    half.table = ttb & ~low_mask(
        table_align_lg2(input_bits, half.shift, ips >= 52 or not half.own_sh))
    half.range_mask = range_mask(input_bits, tbi)
    half.index_mask = low_mask(input_bits)
    half.keep = hierarchical_bits(had)
    half.table_bits = table_bits(half, ~low_mask(ips))
    half.leaf_bits = leaf_bits(half, ~low_mask(ips), affd)
    half.sh = sh
    return 0


cdef inline int cd_decode(
        const Hw* hw, const uint64_t* ste, const uint64_t* cd, Context* context) noexcept nogil:
    """A CD's context; C_BAD_CD when V=0 or the CD is ILLEGAL (5.4.1)."""
    cdef int world = ste_world(hw, ste)
    cdef bint two = world != WORLD_EL2
    cdef bint enabled0 = not (two and cd_epd0(cd))
    cdef bint enabled1 = two and not cd_epd1(cd)
    cdef bint ds = hw.ds and cd_ds(cd)
    cdef unsigned int ips
    cdef int event
    if not cd_v(cd):
        return EVENT_C_BAD_CD
    if cd_s(cd) and (hw.stall_model == 1 or ste_s1stalld(ste)):
        return EVENT_C_BAD_CD
    if not cd_s(cd) and hw.stall_model == 2:
        return EVENT_C_BAD_CD
    if not cd_a(cd) and hw.term_model:
        return EVENT_C_BAD_CD
    if not cd_aa64(cd) or not hw.ttf & 2:  # AArch32 tables are not modelled: Hw.ttf is 2
        return EVENT_C_BAD_CD
    if (enabled0 or enabled1) and (hw.ttendian == 3 and not cd_endi(cd)
                                   or hw.ttendian == 2 and cd_endi(cd)):
        return EVENT_C_BAD_CD
    if (cd_ha(cd) or cd_hd(cd)) and hw.httu == 0 or cd_hd(cd) and hw.httu == 1:
        return EVENT_C_BAD_CD
    if two and not hw.asid16 and cd_asid(cd) >> 8:
        return EVENT_C_BAD_CD
    ips = size_bits(<unsigned int>cd_ips(cd), hw.minor)
    if ips > hw.oas:
        ips = hw.oas
    context.half[0].enabled = context.half[1].enabled = False
    context.half[0].high_address = context.half[1].high_address = 0
    if enabled0:
        event = half_decode(hw, &context.half[0], granule_of_tg0(cd_tg0(cd)),
                            <unsigned int>cd_t0sz(cd), ds, cd_tbi0(cd), hw.had and cd_had0(cd),
                            cd_affd(cd), cd_ttb0(cd), ips,
                            <unsigned int>cd_sh0(cd))
        if event:
            return event
    if enabled1:
        event = half_decode(hw, &context.half[1], granule_of_tg1(cd_tg1(cd)),
                            <unsigned int>cd_t1sz(cd), ds, cd_tbi1(cd), hw.had and cd_had1(cd),
                            cd_affd(cd), cd_ttb1(cd), ips,
                            <unsigned int>cd_sh1(cd))
        if event:
            return event
    context.half[0].unprivileged = not (two and hw.e0pd and cd_e0pd0(cd))
    context.half[1].unprivileged = not (hw.e0pd and cd_e0pd1(cd))
    context.over = ~low_mask(ips)
    context.mair = cd_mair0(cd) | cd_mair1(cd) << 32
    context.asid = <unsigned short>cd_asid(cd) if two else 0
    context.two_ttbs = two
    context.swap = cd_endi(cd)
    context.simple = not (
        cd_endi(cd) or context.half[0].high_address or context.half[1].high_address)
    context.affd = cd_affd(cd)
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
    context.terminate = (TERMINATE_A if cd_a(cd) else 0) | (TERMINATE_R if cd_r(cd) else 0)
    return 0


# --- overrides by STE and GBPA (13.1, 6.3.14) ---

cdef inline unsigned int effective_access(
        const Context* context, unsigned int access) noexcept nogil:
    """The access after overrides; a write is always Data."""
    access = (access & context.access_and) | context.access_or
    if access & ACCESS_WRITE:
        access &= ~<unsigned int>ACCESS_INSTR
    return access


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


cdef inline void override_attr(Context* context, bint allowed, bint mtcfg, unsigned int memattr,
                               unsigned int alloccfg, unsigned int shcfg) noexcept nogil:
    """Memory type and shareability that enter translation (the device's are WB and NSH)."""
    context.attr = ATTR_WB
    context.sh = 0
    if allowed:
        context.attr = entering_attr(mtcfg, memattr, alloccfg)
        context.sh = 0 if shcfg == 1 else shcfg  # 01: the device's own
    context.sh = shareability(context.attr, context.sh)


cdef inline void ste_overrides(const Hw* hw, const uint64_t* ste, Context* context) noexcept nogil:
    override_access(context, <unsigned int>ste_privcfg(ste) if hw.attr_perms_ovr else 0,
                    <unsigned int>ste_instcfg(ste) if hw.attr_perms_ovr else 0)
    override_attr(context, hw.attr_types_ovr, ste_mtcfg(ste), <unsigned int>ste_memattr(ste),
                  <unsigned int>ste_alloccfg(ste), <unsigned int>ste_shcfg(ste))
