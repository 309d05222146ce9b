/* smmufast.h: the C face of smmufast.
 *
 * Requests, results, memory callbacks, and a table of functions that may be
 * called without Python's global lock.  Names are those of the Python face;
 * event numbers are those of IHI 0070 section 7.3.
 *
 *     smmufast_api *api = PyCapsule_Import(SMMUFAST_CAPSULE, 0);
 *     smmufast_smmu *smmu = api->acquire(object);     // with the lock held
 *     api->translate(smmu, &request, &result);        // without it, any thread
 *     api->release(smmu);                             // with the lock held
 *
 * Check api->abi == SMMUFAST_ABI once: the layouts below are those of one ABI.
 * Within an ABI structs only grow at their end.  Those that do say how large
 * they are: api->size is the library's, smmufast_batch.size and
 * smmufast_walk.size are the caller's.
 */
#ifndef SMMUFAST_H
#define SMMUFAST_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SMMUFAST_ABI 3
#define SMMUFAST_CAPSULE "smmufast._smmu._C_API"
#define SMMUFAST_CALLBACKS "smmufast.callbacks2"
#define SMMUFAST_NO_SSID 0xFFFFFFFFu

/* smmufast_request.access: what the device does. */
enum {
    SMMUFAST_WRITE = 1, /* otherwise a read */
    SMMUFAST_PRIV = 2,  /* privileged (PnU=1) */
    SMMUFAST_INSTR = 4  /* instruction read (InD=1); ignored for a write */
};

/* smmufast_result.action: what becomes of the transaction. */
enum {
    SMMUFAST_OK = 0,       /* translated: pa is valid */
    SMMUFAST_BYPASS = 1,   /* the stream bypasses translation: pa == iova */
    SMMUFAST_DISABLED = 2, /* CR0.SMMUEN=0 and GBPA lets it pass: pa == iova */
    SMMUFAST_ABORT = 3,    /* terminated with a bus abort */
    SMMUFAST_RAZ_WI = 4,   /* terminated: reads as zero, writes are ignored */
    SMMUFAST_STALL = 5     /* held until CMD_RESUME or CMD_STALL_TERM */
};

/* smmufast_result.perm: which accesses this translation admits. */
enum {
    SMMUFAST_UR = 1, SMMUFAST_UW = 2, SMMUFAST_UX = 4,
    SMMUFAST_PR = 8, SMMUFAST_PW = 16, SMMUFAST_PX = 32
};

/* smmufast_fetch.kind */
enum {
    SMMUFAST_FETCH_NONE = 0,
    SMMUFAST_FETCH_L1STD = 1,
    SMMUFAST_FETCH_STE = 2,
    SMMUFAST_FETCH_L1CD = 3,
    SMMUFAST_FETCH_CD = 4,
    SMMUFAST_FETCH_TT = 5,         /* a descriptor of stage 1 */
    SMMUFAST_FETCH_S2TT = 6,       /* of stage 2 */
    SMMUFAST_FETCH_TT_UPDATE = 7,  /* hardware update of a stage-1 descriptor: a swap */
    SMMUFAST_FETCH_S2TT_UPDATE = 8
};

/* What the functions return. */
enum {
    SMMUFAST_DONE = 0,    /* the result is complete */
    SMMUFAST_PENDING = 1, /* a walk waits for the data of its fetch */
    SMMUFAST_EINVAL = -1, /* an argument is out of range; nothing was done */
    SMMUFAST_EPYTHON = -2, /* a Python memory callback raised */
    SMMUFAST_ENOMEM = -3   /* there is no memory for it; nothing was done */
};

typedef struct smmufast_request {
    uint64_t iova;
    uint32_t sid;
    uint32_t ssid;   /* 20 bits, or SMMUFAST_NO_SSID */
    uint32_t access; /* SMMUFAST_WRITE | SMMUFAST_PRIV | SMMUFAST_INSTR */
    uint32_t reserved;
} smmufast_request;

typedef struct smmufast_result {
    uint64_t pa;        /* valid when action is OK, BYPASS or DISABLED */
    uint64_t ipa;       /* input of stage 2; valid when action is OK and stage & 2 */
    uint8_t action;     /* SMMUFAST_OK ... */
    uint8_t event;      /* number of the recorded event, 0 if none */
    uint8_t fault;      /* number of the fault, recorded or not, 0 if none */
    uint8_t perm;       /* SMMUFAST_UR ...: what both stages permit */
    uint8_t perm_s1;    /* what stage 1 permits; all when it does not translate */
    int8_t level;       /* level of the leaf, -1..3; 4 when there is none */
    uint8_t page_lg2;   /* log2 of the leaf's size in bytes; 0 when there is none */
    uint8_t attr;       /* memory type as one MAIR byte */
    uint8_t sh;         /* 0 non-, 2 outer, 3 inner shareable */
    uint8_t stage;      /* 1: stage 1 took part, 2: stage 2 did, 3: both */
    uint16_t asid;      /* of the context descriptor; 0 without stage 1 */
    uint16_t vmid;      /* S2VMID where it tags translations, else 0 */
    uint16_t stag;      /* of a stalled transaction; valid when event != 0 */
    uint8_t ng;         /* the stage-1 leaf's nG bit */
    uint8_t contiguous; /* the leaf's Contiguous bit, stage 1's if it translates */
    uint16_t why;       /* the reason of a refusal, 0 if none: Why in smmufast/why.py */
    uint64_t record[4]; /* the event record, little-endian dwords; valid when fault != 0 */
} smmufast_result;

/* How an ATS translation request ends, and what it is granted. */
enum { SMMUFAST_ATS_SUCCESS = 0, SMMUFAST_ATS_UR = 1, SMMUFAST_ATS_CA = 2 };
enum { SMMUFAST_ATS_READ = 1, SMMUFAST_ATS_WRITE = 2, SMMUFAST_ATS_EXECUTE = 4 };

/* An ATS translation request, beside stream, PASID and address, and its answer (3.9.1). */
typedef struct smmufast_ats {
    uint32_t size;    /* sizeof(smmufast_ats) */
    uint8_t no_write; /* asked: the device is not going to write (NW) */
    uint8_t execute;  /* asked: execute permission too; nothing without a PASID */
    uint8_t stu_lg2;  /* asked: log2 of the smallest translation unit, 12 to 43 */
    uint8_t status;   /* SMMUFAST_ATS_SUCCESS ... */
    uint8_t granted;  /* SMMUFAST_ATS_READ | ...; with 0 `page_lg2` is stu_lg2 */
    uint8_t split;    /* the address is an intermediate one, which stage 2 will translate */
    uint8_t page_lg2; /* log2 of the bytes at `address` */
    uint8_t reserved;
    uint64_t address;
    smmufast_result result; /* of the page, or of the fault that kept it from being granted */
} smmufast_ats;

/* What a walk asks the host to do next: a read, or a hardware update.
 *
 * An update is a compare-and-swap of 8 bytes: `desired` is stored if `expected`
 * is what is found; the answer is what was found, stored or not.  Perform it
 * only while the walk asks for it: see walk_look. */
typedef struct smmufast_fetch {
    uint64_t address;
    uint64_t expected; /* of an update, a little-endian number; else 0 */
    uint64_t desired;
    uint16_t size;     /* bytes: 8 or 64 */
    uint8_t kind;      /* SMMUFAST_FETCH_... */
    int8_t level;      /* of a translation table, else 4 */
    uint32_t reserved;
} smmufast_fetch;

/* smmufast_walk.flags */
enum {
    /* CMD_SYNC does not complete before this walk, if an invalidation overtook it: otherwise the
     * walk starts again.  Such a walk is ended by walk_supply or by walk_drop, and not copied. */
    SMMUFAST_HOLDS_SYNC = 1
};

#define SMMUFAST_WALK_WORDS 128

/* A resumable walk: all of its state, and no pointer.  Set size and flags
 * before walk_start; read `fetch` while it is pending, `result` when it is done. */
typedef struct smmufast_walk {
    uint32_t size;   /* sizeof(smmufast_walk) */
    uint32_t flags;
    smmufast_request request;
    smmufast_result result;
    smmufast_fetch fetch;
    uint64_t state[SMMUFAST_WALK_WORDS]; /* the library's */
} smmufast_walk;

/* Memory that the host reads and writes itself; not 0 means an external abort.
 * Handed to Memory.add_callback in a capsule named SMMUFAST_CALLBACKS. */
typedef struct smmufast_callbacks {
    int (*read)(void *ctx, uint64_t address, void *buf, size_t n);
    int (*write)(void *ctx, uint64_t address, const void *buf, size_t n); /* may be NULL */
    void *ctx;
    /* Store `desired` in the 8 bytes at `address` if they are `expected`, as one atomic step;
     * `found` is what was there.  NULL: an update is a read and a write. */
    int (*swap)(void *ctx, uint64_t address, uint64_t expected, uint64_t desired,
                uint64_t *found);
} smmufast_callbacks;

/* Columns of a batch; a NULL pointer is a column that is not wanted.
 * Strides are in bytes; a stride of 0 repeats one value (inputs only).
 * Outputs must not overlap inputs, but for a column in the very place of another.
 * Columns beyond `size` are not wanted; one that the library does not know is EINVAL. */
typedef struct smmufast_column {
    void *data;
    ptrdiff_t stride;
} smmufast_column;

typedef struct smmufast_batch {
    size_t n;
    size_t size;            /* sizeof(smmufast_batch) */
    smmufast_column sid;    /* uint32 */
    smmufast_column ssid;   /* uint32, SMMUFAST_NO_SSID for none */
    smmufast_column iova;   /* uint64 */
    smmufast_column access; /* uint8: SMMUFAST_WRITE | ... */
    smmufast_column pa;       /* uint64; 0 when the request fails */
    smmufast_column action;   /* uint8 */
    smmufast_column event;    /* uint8 */
    smmufast_column fault;    /* uint8 */
    smmufast_column perm;     /* uint8 */
    smmufast_column level;    /* int8 */
    smmufast_column page_lg2; /* uint8 */
    smmufast_column attr;     /* uint8 */
    smmufast_column sh;       /* uint8 */
    smmufast_column ipa;      /* uint64 */
    smmufast_column stage;    /* uint8 */
    smmufast_column record;   /* 32 bytes, zero when nothing is recorded */
    smmufast_column why;      /* uint16 */
} smmufast_batch;

typedef struct smmufast_smmu smmufast_smmu;

typedef struct smmufast_api {
    uint32_t abi;  /* SMMUFAST_ABI */
    uint32_t size; /* sizeof(smmufast_api) of the library */
    /* With the lock: hold a Smmu and its Memory unchanged until release.
     * NULL with a Python exception if the object is no Smmu. */
    smmufast_smmu *(*acquire)(void *object);
    void (*release)(smmufast_smmu *smmu);
    /* Without the lock, from any thread. */
    int (*translate)(smmufast_smmu *smmu, const smmufast_request *request,
                     smmufast_result *result);
    int (*translate_batch)(smmufast_smmu *smmu, const smmufast_batch *batch);
    /* PENDING: walk->fetch is to be performed next.  DONE: walk->result is there. */
    int (*walk_start)(smmufast_smmu *smmu, const smmufast_request *request,
                      smmufast_walk *walk);
    /* data: fetch.size bytes as they lie in memory, or NULL for an external abort.  If the walk was
     * overtaken since it was looked at last, that is dropped: walk->fetch is the first one again. */
    int (*walk_supply)(smmufast_smmu *smmu, smmufast_walk *walk, const void *data);
    /* Registers as software accesses them, with all that follows from a write, commands
     * included.  They take the lock themselves: call with it or without.  The offset is in bytes
     * from the start of page 0, up to 0x1FFFF; size is 1, 2, 4 or 8 bytes. */
    int (*read)(smmufast_smmu *smmu, uint64_t offset, uint32_t size, uint64_t *value);
    int (*write)(smmufast_smmu *smmu, uint64_t offset, uint32_t size, uint64_t value);
    /* Look at a walk again, without the lock: one that was overtaken starts again here. */
    int (*walk_look)(smmufast_smmu *smmu, smmufast_walk *walk);
    /* End a walk without a result.  Others than those that hold CMD_SYNC may just be forgotten. */
    int (*walk_drop)(smmufast_smmu *smmu, smmufast_walk *walk);
    /* As translate and translate_batch, but look alone: no event, no stall, no update of a
     * descriptor, nothing kept or counted by caches.  SMMUFAST_ENOMEM without memory for it. */
    int (*peek)(smmufast_smmu *smmu, const smmufast_request *request, smmufast_result *result);
    int (*peek_batch)(smmufast_smmu *smmu, const smmufast_batch *batch);
    /* An ATS translation request; of request->access only SMMUFAST_PRIV counts. */
    int (*ats_request)(
        smmufast_smmu *smmu, const smmufast_request *request, smmufast_ats *ats);
    /* An ATS Translated transaction, whose address is in `iova`. */
    int (*ats_translated)(
        smmufast_smmu *smmu, const smmufast_request *request, smmufast_result *result);
    /* A number that grows with every invalidation and with every register write that sets up
     * translation: while it is the same, translations that the host keeps still hold. */
    uint64_t (*generation)(smmufast_smmu *smmu);
    /* A transaction from before its translation to the end of its access (4.7.3): a CMD_SYNC
     * behind an invalidation waits for those that were open before it.  `open` gives what `close`
     * takes, once, in any thread; close() may consume commands. */
    uint64_t (*transaction_open)(smmufast_smmu *smmu);
    int (*transaction_close)(smmufast_smmu *smmu, uint64_t opened);
} smmufast_api;

#ifdef __cplusplus
}
#endif
#endif
