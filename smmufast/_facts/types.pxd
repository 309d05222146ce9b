"""The structs that rules, paths and owners share: requests, results, decoded configuration.

The public ones are those of smmufast.h; the rest live on the stack of a path.
"""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int8_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "smmufast.h":
    enum:
        ABI "SMMUFAST_ABI"
        NO_SSID "SMMUFAST_NO_SSID"
        ACCESS_WRITE "SMMUFAST_WRITE"
        ACCESS_PRIV "SMMUFAST_PRIV"
        ACCESS_INSTR "SMMUFAST_INSTR"
        ACTION_OK "SMMUFAST_OK"
        ACTION_BYPASS "SMMUFAST_BYPASS"
        ACTION_DISABLED "SMMUFAST_DISABLED"
        ACTION_ABORT "SMMUFAST_ABORT"
        ACTION_RAZ_WI "SMMUFAST_RAZ_WI"
        ACTION_STALL "SMMUFAST_STALL"
        PERM_UR "SMMUFAST_UR"
        PERM_UW "SMMUFAST_UW"
        PERM_UX "SMMUFAST_UX"
        PERM_PR "SMMUFAST_PR"
        PERM_PW "SMMUFAST_PW"
        PERM_PX "SMMUFAST_PX"
        FETCH_NONE "SMMUFAST_FETCH_NONE"
        FETCH_L1STD "SMMUFAST_FETCH_L1STD"
        FETCH_STE "SMMUFAST_FETCH_STE"
        FETCH_L1CD "SMMUFAST_FETCH_L1CD"
        FETCH_CD "SMMUFAST_FETCH_CD"
        FETCH_TT "SMMUFAST_FETCH_TT"
        FETCH_S2TT "SMMUFAST_FETCH_S2TT"
        FETCH_TT_UPDATE "SMMUFAST_FETCH_TT_UPDATE"
        FETCH_S2TT_UPDATE "SMMUFAST_FETCH_S2TT_UPDATE"
        STATUS_DONE "SMMUFAST_DONE"
        STATUS_PENDING "SMMUFAST_PENDING"
        STATUS_EINVAL "SMMUFAST_EINVAL"
        STATUS_EPYTHON "SMMUFAST_EPYTHON"
        STATUS_ENOMEM "SMMUFAST_ENOMEM"
        HOLDS_SYNC "SMMUFAST_HOLDS_SYNC"

    ctypedef struct Request "smmufast_request":
        uint64_t iova
        uint32_t sid
        uint32_t ssid
        uint32_t access
        uint32_t reserved

    ctypedef struct Outcome "smmufast_result":
        uint64_t pa
        uint64_t ipa
        uint8_t action
        uint8_t event
        uint8_t fault
        uint8_t perm
        uint8_t perm_s1
        int8_t level
        uint8_t page_lg2
        uint8_t attr
        uint8_t sh
        uint8_t stage
        uint16_t asid
        uint16_t vmid
        uint16_t stag
        uint8_t ng
        uint8_t contiguous
        uint16_t why
        uint64_t[4] record

    ctypedef struct AtsC "smmufast_ats":
        uint32_t size
        uint8_t no_write
        uint8_t execute
        uint8_t stu_lg2
        uint8_t status
        uint8_t granted
        uint8_t split
        uint8_t page_lg2
        uint64_t address
        Outcome result

    ctypedef struct FetchC "smmufast_fetch":
        uint64_t address
        uint64_t expected
        uint64_t desired
        uint16_t size
        uint8_t kind
        int8_t level
        uint32_t reserved

    ctypedef struct WalkC "smmufast_walk":
        uint32_t size
        uint32_t flags
        Request request
        Outcome result
        FetchC fetch
        uint64_t* state

    ctypedef struct CallbacksC "smmufast_callbacks":
        int (*read)(void* ctx, uint64_t address, void* buf, size_t n) noexcept nogil
        int (*write)(void* ctx, uint64_t address, const void* buf, size_t n) noexcept nogil
        void* ctx
        int (*swap)(void* ctx, uint64_t address, uint64_t expected, uint64_t desired,
                    uint64_t* found) noexcept nogil

    ctypedef struct ColumnC "smmufast_column":
        void* data
        ptrdiff_t stride

    ctypedef struct BatchC "smmufast_batch":
        size_t n
        size_t size
        ColumnC sid
        ColumnC ssid
        ColumnC iova
        ColumnC access
        ColumnC pa
        ColumnC action
        ColumnC event
        ColumnC fault
        ColumnC perm
        ColumnC level
        ColumnC page_lg2
        ColumnC attr
        ColumnC sh
        ColumnC ipa
        ColumnC stage
        ColumnC record
        ColumnC why

    ctypedef struct SmmuC "smmufast_smmu":
        pass

    ctypedef struct ApiC "smmufast_api":
        uint32_t abi
        uint32_t size
        SmmuC* (*acquire)(void* object) noexcept
        void (*release)(SmmuC* smmu) noexcept
        int (*translate)(SmmuC*, const Request*, Outcome*) noexcept nogil
        int (*translate_batch)(SmmuC*, const BatchC*) noexcept nogil
        int (*walk_start)(SmmuC*, const Request*, WalkC*) noexcept nogil
        int (*walk_supply)(SmmuC*, WalkC*, const void*) noexcept nogil
        int (*read)(SmmuC*, uint64_t offset, uint32_t size, uint64_t* value) noexcept nogil
        int (*write)(SmmuC*, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil
        int (*walk_look)(SmmuC*, WalkC*) noexcept nogil
        int (*walk_drop)(SmmuC*, WalkC*) noexcept nogil
        int (*peek)(SmmuC*, const Request*, Outcome*) noexcept nogil
        int (*peek_batch)(SmmuC*, const BatchC*) noexcept nogil
        int (*ats_request)(SmmuC*, const Request*, AtsC*) noexcept nogil
        int (*ats_translated)(SmmuC*, const Request*, Outcome*) noexcept nogil
        uint64_t (*generation)(SmmuC*) noexcept nogil
        uint64_t (*transaction_open)(SmmuC*) noexcept nogil
        int (*transaction_close)(SmmuC*, uint64_t) noexcept nogil


cdef enum:
    NO_LEVEL = 4  # Outcome.level and FetchC.level when there is none


# What one table base translates: a half of a context's address space, or stage 2's input.
cdef struct Half:
    uint64_t table         # address of the first table, aligned
    uint64_t table_mask    # address bits of a TTB that are of it
    uint64_t range_mask    # address bits that must all equal the half's sign
    uint64_t over          # address bits beyond the effective output size
    uint64_t index_mask    # input bits that index the tables
    uint64_t keep          # descriptor bits [62:59] that are inherited (0 with HAD)
    uint64_t table_bits    # table_bits() and leaf_bits() of _rules/vmsa.pxd
    uint64_t leaf_bits
    uint8_t enabled        # not EPD
    uint8_t unprivileged   # not E0PD
    uint8_t granule        # lg2
    uint8_t stride         # index bits of a level
    uint8_t shift          # lowest input bit that indexes the first table
    int8_t level           # of the first table
    uint8_t blocks         # bit level+1: a block is legal there
    uint8_t fitting        # the same, of blocks that are no larger than the output size
    uint8_t output_bits    # the effective output size
    uint64_t entry_mask    # of an entry's offset in its table
    uint64_t low_address   # descriptor bits that are address bits in place
    uint64_t high_address  # descriptor bits that are address bits elsewhere
    uint8_t high_shift     # by so much
    uint8_t own_sh         # leaves have an SH field
    uint8_t sh             # of mapped memory where they have none
    uint8_t swap           # big-endian descriptors


# Stage 2 as an STE sets it.
cdef struct Stage2:
    Half half
    uint8_t on             # the STE enables it; the rest is valid then
    uint8_t simple         # as Context.simple
    uint8_t affd
    uint8_t ha, hd         # hardware update of the access flag, of the dirty state
    uint8_t xnx            # XN has two bits
    uint8_t fwb            # MemAttr in forced write-back coding
    uint8_t ptw            # table walks do not touch Device memory
    uint8_t terminate      # as Context.terminate


# What a transaction of one (StreamID, SubstreamID) pair meets: STE and CD, decoded.
cdef struct Context:
    Half[2] half
    uint64_t mair
    uint16_t asid
    uint16_t vmid          # S2VMID where it tags translations
    uint8_t world          # WORLD_...
    uint8_t aset           # CD.ASET: the ASID is not shared with processors
    uint8_t two_ttbs       # bit 55 selects, and privilege matters
    uint8_t simple         # descriptors are little-endian, address in place, as they are
    uint8_t affd
    uint8_t ha, hd         # hardware update of the access flag, of the dirty state
    uint8_t regime         # REGIME_... bits for permissions
    uint8_t terminate      # CD.A, CD.R, CD.S as TERMINATE_... bits
    uint8_t access_and     # PRIVCFG and INSTCFG, applied as (access & and) | or
    uint8_t access_or
    uint8_t[8] need        # PERM_ bit that each access of the device needs
    uint8_t attr           # entering translation: the device's, after the STE's overrides
    uint8_t sh
    Stage2 second
