"""Commands: what sixteen bytes of the Non-secure command queue ask for, or that they are illegal.

Sections: IHI 0070 4 (commands), 6.3 (CR0.VMW).  Only the words, the features and CR0 decide; what
an effect does to caches, stalls and queues is written where these are.  RES0 bits are ignored.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from smmufast._facts.bits cimport low_mask
from smmufast._facts.layout cimport *
from smmufast._facts.hw cimport Hw
from smmufast._facts.why cimport *


cdef enum:
    EFFECT_NONE        # nothing to do: also of a command that is ignored, or illegal
    EFFECT_PREFETCH
    EFFECT_CFGI_STE
    EFFECT_CFGI_RANGE
    EFFECT_CFGI_ALL
    EFFECT_CFGI_CD
    EFFECT_CFGI_CD_ALL
    EFFECT_TLBI
    EFFECT_ATC_INV
    EFFECT_PRI_RESP
    EFFECT_RESUME
    EFFECT_STALL_TERM
    EFFECT_SYNC


# What a legal command does; members that its kind does not name are 0.
cdef struct Effect:
    uint8_t kind           # EFFECT_...
    uint8_t op             # the opcode
    uint16_t why           # WHY_..., of an illegal command
    bint leaf              # CFGI_STE, CFGI_CD, TLBI by address: last level only
    bint ssv               # ATC_INV, PRI_RESP, PREFETCH: ssid is valid
    bint global_           # ATC_INV: all substreams
    bint abort             # RESUME without retry: terminate with abort, else RAZ/WI
    bint retry             # RESUME
    uint32_t sid           # CFGI_RANGE: the first of the range
    uint32_t ssid
    uint8_t range_lg2      # CFGI_RANGE: 2^range_lg2 StreamIDs; CFGI_ALL: 32
    uint16_t vmid          # TLBI by VMID: only the bits of vmid_mask
    uint16_t vmid_mask     # bits that are compared; 0: entries of every VMID
    uint16_t asid          # TLBI by ASID
    uint64_t first         # TLBI, ATC_INV, PREFETCH_ADDR: the bytes, first to last
    uint64_t last
    bint all_addresses     # TLBI, ATC_INV: every address; first and last are 0 and 2^64-1
    uint8_t granule        # range TLBI: lg2 of TG; 0: not a range
    uint8_t level          # range TLBI: level of the leaves; 0: any
    uint16_t stag          # RESUME
    uint16_t prg_index     # PRI_RESP
    uint8_t resp
    uint8_t cs             # SYNC: CMD_CS_..., as implemented
    uint8_t size_lg2       # ATC_INV: lg2 of the bytes; PREFETCH_ADDR: of the number of addresses
    uint64_t msi_address   # SYNC by interrupt, all bits; 0: no message
    uint32_t msi_data


# --- legality (4.1) ---

# S2.2-8, S4.1.1-2, S4.1.1-3, S4.1.3-2, S4.3.3-3, S4.3.4-2, S4.4.2-1, S4.4.2.5-1, S4.4.2.7-2,
# S4.4.3.1-4, S4.4.4.1-2, S4.5.1-7, S4.5.2-4, S4.7.1-6, S6.3.1-20
cdef inline int command_missing(const Hw* hw, unsigned int op) noexcept nogil:
    """Why the Non-secure queue does not have this opcode; 0 when it does."""
    if (op == CMD_CFGI_CD or op == CMD_CFGI_CD_ALL or op == CMD_TLBI_NH_ALL
            or op == CMD_TLBI_NH_ASID or op == CMD_TLBI_NH_VA or op == CMD_TLBI_NH_VAA):
        return 0 if hw.s1p else WHY_CMD_S1P
    if (op == CMD_TLBI_EL2_ALL or op == CMD_TLBI_EL2_ASID or op == CMD_TLBI_EL2_VA
            or op == CMD_TLBI_EL2_VAA):
        if not hw.s1p:
            return WHY_CMD_S1P
        return 0 if hw.hyp else WHY_CMD_HYP
    if op == CMD_TLBI_S12_VMALL or op == CMD_TLBI_S2_IPA:
        return 0 if hw.s2p else WHY_CMD_S2P
    if op == CMD_ATC_INV:
        return 0 if hw.ats else WHY_CMD_ATS
    if op == CMD_PRI_RESP:
        return 0 if hw.pri else WHY_CMD_PRI
    if op == CMD_RESUME or op == CMD_STALL_TERM:
        return 0 if hw.stall_model != 1 else WHY_CMD_STALL
    if (op == CMD_PREFETCH_CONFIG or op == CMD_PREFETCH_ADDR or op == CMD_CFGI_STE
            or op == CMD_CFGI_STE_RANGE or op == CMD_TLBI_NSNH_ALL or op == CMD_SYNC):
        return 0
    if op == CMD_CFGI_VMS_PIDM:
        return WHY_CMD_MPAM
    if op == CMD_DPTI_ALL or op == CMD_DPTI_PA:
        return WHY_CMD_DPT
    if (op == CMD_TLBI_EL3_ALL or op == CMD_TLBI_EL3_VA or op == CMD_TLBI_SNH_ALL
            or CMD_TLBI_S_EL2_ALL <= op <= CMD_TLBI_S_EL2_VAA
            or op == CMD_TLBI_S_S12_VMALL or op == CMD_TLBI_S_S2_IPA):
        return WHY_CMD_SECURE
    return WHY_CMD_IMPDEF if 0x80 <= op <= 0x8F else WHY_CMD_RESERVED


# S3.10.2.1-1, S4.1.6-2
cdef inline bint command_has_ssec(unsigned int op) noexcept nogil:
    """The StreamID may be marked as Secure, which the Non-secure queue refuses."""
    return (CMD_PREFETCH_CONFIG <= op <= CMD_CFGI_VMS_PIDM or op == CMD_RESUME
            or op == CMD_STALL_TERM)


# --- TLB invalidation (4.4) ---

# S3.17.6-1, S4.4-5, S4.4.2-2, S6.3.9-5, S6.3.9.1-1
cdef inline uint16_t vmid_compared(const Hw* hw) noexcept nogil:
    """Bits of a VMID that TLB invalidation compares: none without stage 2; CR0.VMW masks low ones.
    """
    cdef unsigned int wild = <unsigned int>cr0_vmw(hw.cr0) if hw.vmw else 0
    if not hw.s2p:
        return 0
    if wild > 4:
        wild = 0
    return <uint16_t>((0xFFFF if hw.vmid16 else 0xFF) & ~low_mask(wild))


# S4.4.1.1-3
cdef inline unsigned int tlbi_scale(const Hw* hw, const uint64_t* words) noexcept nogil:
    """SCALE of a range: five bits, or with DS six of which 39 is the largest value."""
    cdef unsigned int scale = <unsigned int>cmd_scale(words)
    if not hw.ds:
        return scale & 31
    return 39 if scale > 39 else scale


# S2.4-3, S4.4.1.1-1, S4.4.1.1-2, S4.4.1.1-4, S4.4.1.1-5, S4.4.1.1-8, S4.4.1.1-10, S4.4.1.1-11
cdef inline int tlbi_span(
        const Hw* hw, const uint64_t* words, uint64_t address, Effect* effect) noexcept nogil:
    """The addresses of an invalidation by address: a 4 KiB page, or with RIL a range.

    A page meets every entry that holds it, whatever the entry's size.  A range starts at the
    address as given, also if that is not aligned for TG and TTL, and ends at 2^64 at the latest.
    """
    cdef unsigned int tg = <unsigned int>cmd_tg(words)
    cdef unsigned int ttl = <unsigned int>cmd_ttl(words)
    cdef unsigned int num = <unsigned int>cmd_num(words)
    cdef unsigned int scale = tlbi_scale(hw, words)
    effect.leaf = cmd_leaf(words)
    effect.first = address
    if not hw.ril or tg == CMD_TG_NONE:
        effect.last = address | 0xFFF
        return 0
    if tg == CMD_TG_16K and ttl == CMD_TTL_LEVEL_1 and not hw.ds:
        ttl = CMD_TTL_ANY  # reserved
    if num == 0 and scale == 0 and ttl == CMD_TTL_ANY:
        return WHY_CMD_RANGE
    effect.granule = 10 + 2 * tg
    effect.level = ttl
    # 32 * 2^39 * 2^16 is 2^60 bytes at most
    effect.last = address + ((<uint64_t>(num + 1) << scale << effect.granule) - 1)
    if effect.last < address:
        effect.last = ~<uint64_t>0
    return 0


# S4.1.6-3, S4.1.6-4, S4.4-1, S6.3.1-16, S6.3.1-17
cdef inline int tlbi_decode(
        const Hw* hw, const uint64_t* words, unsigned int op, Effect* effect) noexcept nogil:
    """Scope of a TLBI_*: VMID, ASID, addresses; the opcode says the world and the stage."""
    effect.kind = EFFECT_TLBI
    if (op == CMD_TLBI_NH_ALL or op == CMD_TLBI_NH_ASID or op == CMD_TLBI_NH_VA
            or op == CMD_TLBI_NH_VAA or op == CMD_TLBI_S12_VMALL or op == CMD_TLBI_S2_IPA):
        effect.vmid_mask = vmid_compared(hw)
        effect.vmid = <uint16_t>cmd_vmid(words) & effect.vmid_mask
    if (op == CMD_TLBI_NH_ASID or op == CMD_TLBI_NH_VA
            or op == CMD_TLBI_EL2_ASID or op == CMD_TLBI_EL2_VA):
        effect.asid = <uint16_t>(cmd_asid(words) & (0xFFFF if hw.asid16 else 0xFF))
    if (op == CMD_TLBI_NH_VA or op == CMD_TLBI_NH_VAA
            or op == CMD_TLBI_EL2_VA or op == CMD_TLBI_EL2_VAA):
        return tlbi_span(hw, words, cmd_address(words), effect)
    if op == CMD_TLBI_S2_IPA:
        return tlbi_span(hw, words, cmd_ipa(words) & hw.pointer_mask, effect)
    effect.all_addresses = True
    effect.last = ~<uint64_t>0
    return 0


# --- ATS and PRI (4.5) ---

# S4.5.1-1, S4.5.1-2, S4.5.1-3, S4.5.1-5
cdef inline int atc_inv_decode(
        const Hw* hw, const uint64_t* words, Effect* effect) noexcept nogil:
    """A span of 4096 * 2^Size bytes, aligned; 52 is every address, and more is illegal."""
    cdef unsigned int size = <unsigned int>cmd_size(words)
    if size > 52:
        return WHY_CMD_SIZE
    effect.kind = EFFECT_ATC_INV
    effect.global_ = effect.ssv and cmd_g(words)
    effect.size_lg2 = 12 + size
    if size == 52:
        effect.all_addresses = True
        effect.last = ~<uint64_t>0
    else:
        effect.first = cmd_address(words) & ~low_mask(12 + size)
        effect.last = effect.first | low_mask(12 + size)
    return 0


# S4.5.2-1, S4.5.2-2, S8.3-1
cdef inline int pri_resp_decode(const uint64_t* words, Effect* effect) noexcept nogil:
    """An answer to a page request group; the fourth code is none."""
    effect.resp = <uint8_t>cmd_resp(words)
    if effect.resp == 3:
        return WHY_CMD_RESP
    effect.kind = EFFECT_PRI_RESP
    effect.prg_index = <uint16_t>cmd_prgindex(words)
    return 0


# --- stalls and completion ---

# S3.12.2-6, S4.6-102, S4.7.1-1, S4.7.1-3, S4.7.1-4
cdef inline void resume_decode(
        const Hw* hw, const uint64_t* words, Effect* effect) noexcept nogil:
    """Retry, or terminate: with abort where the implementation knows no other way."""
    effect.kind = EFFECT_RESUME
    effect.stag = <uint16_t>cmd_stag(words)
    effect.retry = cmd_ac(words)
    effect.abort = not effect.retry and (cmd_ab(words) or hw.term_model)


# S4.1.6-5, S4.7.3-6, S4.7.3-7, S4.7.3-8, S6.3.1-19
cdef inline int sync_decode(const Hw* hw, const uint64_t* words, Effect* effect) noexcept nogil:
    """How completion is signalled; without SEV there is no event, without MSIs no message."""
    effect.cs = <uint8_t>cmd_cs(words)
    if effect.cs == 3:
        return WHY_CMD_CS
    effect.kind = EFFECT_SYNC
    if effect.cs == CMD_CS_SEV and not hw.sev:
        effect.cs = CMD_CS_NONE
    if effect.cs == CMD_CS_IRQ and hw.msi:
        effect.msi_address = cmd_msiaddress(words)
        effect.msi_data = <uint32_t>cmd_msidata(words)
    return 0


# --- the command ---

# S4.1.3-1, S4.1.5-1, S4.1.6-1, S4.2-2, S4.2.2-3, S4.3.2-1, S4.3.6-1, S4.5.1-6, S4.5.2-3, S7.1-7
cdef inline int command_rules(
        const Hw* hw, const uint64_t* words, unsigned int op, Effect* effect) noexcept nogil:
    """Why a command is illegal, 0 if it is not; of an illegal one, `effect` may be half filled."""
    cdef int why = command_missing(hw, op)
    if why:
        return why
    if command_has_ssec(op) and cmd_ssec(words):
        return WHY_CMD_SSEC
    if CMD_TLBI_NH_ALL <= op <= CMD_TLBI_NSNH_ALL:
        return tlbi_decode(hw, words, op, effect)
    if op == CMD_SYNC:
        return sync_decode(hw, words, effect)
    effect.sid = <uint32_t>cmd_streamid(words)
    if op == CMD_CFGI_STE:
        effect.kind = EFFECT_CFGI_STE
        effect.leaf = cmd_leaf(words)
    elif op == CMD_CFGI_STE_RANGE:
        effect.range_lg2 = <uint8_t>cmd_range(words) + 1
        if effect.range_lg2 == 32:
            effect.kind = EFFECT_CFGI_ALL
            effect.sid = 0
        else:
            effect.kind = EFFECT_CFGI_RANGE
            effect.sid &= ~<uint32_t>low_mask(effect.range_lg2)
    elif op == CMD_CFGI_CD:
        effect.kind = EFFECT_CFGI_CD
        effect.ssid = <uint32_t>cmd_substreamid(words)
        effect.leaf = cmd_leaf(words)
    elif op == CMD_CFGI_CD_ALL:
        effect.kind = EFFECT_CFGI_CD_ALL
    elif op == CMD_RESUME:
        resume_decode(hw, words, effect)
    elif op == CMD_STALL_TERM:
        effect.kind = EFFECT_STALL_TERM
    else:  # of a stream and, where there are substreams, of one of these
        effect.ssv = cmd_ssv(words) and hw.ssidsize != 0
        effect.ssid = <uint32_t>cmd_substreamid(words) if effect.ssv else 0
        if op == CMD_ATC_INV:
            return atc_inv_decode(hw, words, effect)
        if op == CMD_PRI_RESP:
            return pri_resp_decode(words, effect)
        effect.kind = EFFECT_PREFETCH
        if op == CMD_PREFETCH_ADDR:
            effect.size_lg2 = <uint8_t>cmd_prefetchsize(words)
            effect.first = cmd_address(words)
            effect.last = effect.first | 0xFFF
    return 0


# S4.1.3-3, S4.5.1-8, S4.5.2-5, S6.3.9.6-4
cdef inline int command_decode(
        const Hw* hw, const uint64_t* words, Effect* effect) noexcept nogil:
    """The CERROR code of a command of two dwords, NONE or ILL, and what it does.

    An illegal command does nothing, and effect.why says why.  ATC_INV and PRI_RESP are ignored
    while SMMUEN is 0, which counts only for what is legal.
    """
    cdef unsigned int op = <unsigned int>cmd_opcode(words)
    cdef int why
    memset(effect, 0, sizeof(Effect))
    why = command_rules(hw, words, op, effect)
    if why or (op == CMD_ATC_INV or op == CMD_PRI_RESP) and not cr0_smmuen(hw.cr0):
        memset(effect, 0, sizeof(Effect))
    effect.op = <uint8_t>op
    effect.why = <uint16_t>why
    return CMDQ_CONS_ERR_ILL if why else CMDQ_CONS_ERR_NONE
