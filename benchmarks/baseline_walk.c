/*
 * IHI 0070 3.3 (stream tables, CDs), 3.4 (address sizes), 5.2 (STE), 5.4 (CD), 7.3 (events);
 * DDI 0487 D8.2 to D8.4 (VMSAv8-64 descriptors, permissions).
 *
 * One address at a time, no prefetch. The granule is a constant argument of an inline function,
 * so that there is one walk for each format; everything else is decided where it is needed.
 */
#include "baseline_walk.h"

#include <string.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define BIT(value, bit) ((unsigned)((value) >> (bit)) & 1u)
#define BITS(value, msb, lsb) ((value) >> (lsb) & (~(uint64_t)0 >> (63 - (msb) + (lsb))))
#define ADDRESS(value, msb, lsb) (BITS(value, msb, lsb) << (lsb))

enum { OAS_LG2 = 52, SIDSIZE = 32, SSIDSIZE = 20, MAX_TXSZ = 48, MAX_TXSZ_64K = 47 };

/* The formats of struct half. */
enum { FORMAT_4K, FORMAT_16K, FORMAT_64K, FORMAT_4K_52, FORMAT_16K_52 };

/* ---- STE and CD ------------------------------------------------------------------------- */

/* False: the address is outside the region, which is at least 64 bytes long. */
static bool read_record(const struct memory *memory, uint64_t address, uint64_t *words, size_t n)
{
    uint64_t offset = address - memory->base;

    if (offset > memory->size - 8 * n)
        return false;
    memcpy(words, memory->bytes + offset, 8 * n);
    return true;
}

/* IHI 0070 3.3.1. Returns an event number, or 0 and the address of the STE. */
static unsigned find_ste(const struct memory *memory, const struct registers *registers,
                         uint32_t sid, uint64_t *address)
{
    uint64_t base = ADDRESS(registers->strtab_base, 51, 6);
    unsigned literal_lg2 = BITS(registers->strtab_base_cfg, 5, 0);
    unsigned size_lg2 = literal_lg2 < SIDSIZE ? literal_lg2 : SIDSIZE;
    unsigned split = BITS(registers->strtab_base_cfg, 10, 6);
    unsigned span, low;
    uint64_t l1std;

    if ((uint64_t)sid >> size_lg2)
        return C_BAD_STREAMID;
    if (BITS(registers->strtab_base_cfg, 17, 16) != 1) {
        *address = (base & ~(((uint64_t)64 << size_lg2) - 1)) + (uint64_t)sid * 64;
        return 0;
    }
    if (split != 8 && split != 10)
        split = 6;
    low = literal_lg2 > split + 3 ? literal_lg2 - split + 3 : 6;
    base &= ~(((uint64_t)1 << low) - 1);
    if (!read_record(memory, base + (uint64_t)(sid >> split) * 8, &l1std, 1))
        return F_STE_FETCH;
    span = BITS(l1std, 4, 0);
    sid &= (1u << split) - 1;
    if (span == 0 || span > split + 1 || sid >> (span - 1))
        return C_BAD_STREAMID;
    *address = ADDRESS(l1std, 51, 5 + span) + (uint64_t)sid * 64;
    return 0;
}

/* IHI 0070 3.3.2. Returns an event number, or 0 and the address of the CD; 0: stage 1 bypass. */
static unsigned find_cd(const struct memory *memory, const uint64_t *ste, uint32_t ssid,
                        bool *bypass, uint64_t *address)
{
    uint64_t base = ADDRESS(ste[0], 51, 6);
    unsigned s1cdmax = BITS(ste[0], 63, 59);
    unsigned s1fmt = BITS(ste[0], 5, 4);
    unsigned s1dss = BITS(ste[1], 1, 0);
    unsigned split, low;
    uint64_t l1cd;

    *bypass = false;
    *address = base;
    if (s1cdmax == 0)
        return ssid == NO_SSID ? 0 : C_BAD_SUBSTREAMID;
    if (ssid == NO_SSID) {
        *bypass = s1dss == 1;
        if (*bypass)
            return 0;
        if (s1dss != 2)
            return F_STREAM_DISABLED;
        ssid = 0;
    } else if (ssid >> s1cdmax) {
        return C_BAD_SUBSTREAMID;
    } else if (ssid == 0 && s1dss == 2) {
        return F_STREAM_DISABLED;
    }
    if (s1fmt == 0 || s1fmt == 3) {
        *address = ADDRESS(base, 51, s1cdmax + 6) + (uint64_t)ssid * 64;
        return 0;
    }
    split = s1fmt == 1 ? 6 : 10;
    low = s1cdmax > split + 3 ? s1cdmax - split + 3 : 6;
    if (!read_record(memory, ADDRESS(base, 51, low) + (uint64_t)(ssid >> split) * 8, &l1cd, 1))
        return F_CD_FETCH;
    if (!BIT(l1cd, 0))
        return C_BAD_SUBSTREAMID;
    *address = ADDRESS(l1cd, 51, split + 6) + (uint64_t)(ssid & ((1u << split) - 1)) * 64;
    return 0;
}

/* One half of a CD. False: the CD is illegal. */
static bool decode_half(struct half *half, unsigned txsz, unsigned granule_lg2, bool ds,
                        bool epd, uint64_t ttb, unsigned output_lg2)
{
    unsigned stride = granule_lg2 - 3;
    unsigned min_txsz = granule_lg2 == 16 || ds ? 12 : 16;
    unsigned max_txsz = granule_lg2 == 16 ? MAX_TXSZ_64K : MAX_TXSZ;
    unsigned align_lg2;

    half->epd = epd;
    if (epd) {                  /* nothing else of this half is looked at, or checked */
        half->input_lg2 = 48;
        return true;
    }
    if (granule_lg2 == 0 || txsz < min_txsz || txsz > max_txsz || ttb >> output_lg2)
        return false;
    if (granule_lg2 != 16 && !ds && ttb >> 48)
        return false;
    half->input_lg2 = 64 - txsz;
    half->input_mask = ((uint64_t)1 << half->input_lg2) - 1;
    half->start_shift = granule_lg2 + (half->input_lg2 - 1 - granule_lg2) / stride * stride;
    align_lg2 = half->input_lg2 - half->start_shift + 3;
    if (align_lg2 < 6 && (output_lg2 == 52 || (ds && granule_lg2 != 16)))
        align_lg2 = 6;
    half->ttb = ADDRESS(ttb, 51, align_lg2);
    if (granule_lg2 == 16)
        half->format = FORMAT_64K;
    else if (granule_lg2 == 14)
        half->format = ds ? FORMAT_16K_52 : FORMAT_16K;
    else
        half->format = ds ? FORMAT_4K_52 : FORMAT_4K;
    return true;
}

/* IHI 0070 5.4. False: C_BAD_CD. */
static bool decode_cd(struct context *context, const uint64_t *cd)
{
    static const uint8_t size_lg2[8] = {32, 36, 40, 42, 44, 48, 52, 52};
    static const uint8_t tg0_lg2[4] = {12, 16, 14, 0};
    static const uint8_t tg1_lg2[4] = {0, 14, 12, 16};
    struct half *half = context->half;
    bool ds = BIT(cd[2], 58);

    if (!BIT(cd[0], 31) || BIT(cd[0], 44) || !BIT(cd[0], 41))   /* V, S, AA64 */
        return false;
    if (BIT(cd[0], 42) || BIT(cd[0], 43))                       /* HD, HA without HTTU */
        return false;
    context->output_lg2 = size_lg2[BITS(cd[0], 34, 32)];
    context->affd = BIT(cd[0], 35);
    context->wxn = BIT(cd[0], 36);
    context->record = BIT(cd[0], 45);
    context->abort = BIT(cd[0], 46);
    context->pan = context->two_halves && BIT(cd[0], 40);
    context->epan = BIT(cd[1], 59);
    half[0].upper = 0;
    half[0].ignored_top = BIT(cd[0], 38) ? 8 : 0;
    half[0].had = BIT(cd[1], 1);
    half[0].e0pd = context->two_halves && BIT(cd[1], 2);
    if (!decode_half(&half[0], BITS(cd[0], 5, 0), tg0_lg2[BITS(cd[0], 7, 6)], ds,
                     context->two_halves && BIT(cd[0], 14), ADDRESS(cd[1], 51, 4),
                     context->output_lg2))
        return false;
    if (!context->two_halves)
        return true;
    half[1].upper = -1;
    half[1].ignored_top = BIT(cd[0], 39) ? 8 : 0;
    half[1].had = BIT(cd[2], 1);
    half[1].e0pd = BIT(cd[2], 2);
    return decode_half(&half[1], BITS(cd[0], 21, 16), tg1_lg2[BITS(cd[0], 23, 22)], ds,
                       BIT(cd[0], 30), ADDRESS(cd[2], 51, 4), context->output_lg2);
}

static void refuse(struct context *context, const struct registers *registers, unsigned event)
{
    context->kind = CONTEXT_ABORT;
    context->event = context->events_enabled ? event : 0;
    if (event == C_BAD_STREAMID && !BIT(registers->cr2, 1))     /* RECINVSID */
        context->event = 0;
}

void baseline_configure(const struct memory *memory, const struct registers *registers,
                        uint32_t sid, uint32_t ssid, struct context *context)
{
    uint64_t ste[4], cd[4], address;
    unsigned event, config, strw;
    bool bypass;

    memset(context, 0, sizeof(*context));
    context->events_enabled = BIT(registers->cr0, 2);
    event = find_ste(memory, registers, sid, &address);
    if (event) {
        refuse(context, registers, event);
        return;
    }
    if (!read_record(memory, address, ste, 4)) {
        refuse(context, registers, F_STE_FETCH);
        return;
    }
    config = BITS(ste[0], 3, 1);
    strw = BITS(ste[1], 31, 30);
    if (BIT(ste[0], 0) && config < 4) {
        refuse(context, registers, 0);
        return;
    }
    if (!BIT(ste[0], 0) || config > 5                           /* no stage 2 */
        || (config == 5 && (BIT(strw, 0)
                            || BIT(ste[1], 27)                  /* S1STALLD, no stall */
                            || BITS(ste[0], 63, 59) > SSIDSIZE))) {
        refuse(context, registers, C_BAD_STE);
        return;
    }
    context->privcfg = BITS(ste[1], 49, 48);
    context->instcfg = BITS(ste[1], 51, 50);
    if (config == 4) {
        if (ssid == NO_SSID)
            context->kind = CONTEXT_BYPASS;
        else
            refuse(context, registers, C_BAD_SUBSTREAMID);
        return;
    }
    event = find_cd(memory, ste, ssid, &bypass, &address);
    if (event) {
        refuse(context, registers, event);
        return;
    }
    if (bypass) {
        context->kind = CONTEXT_BYPASS;
        return;
    }
    if (!read_record(memory, address, cd, 4)) {
        refuse(context, registers, F_CD_FETCH);
        return;
    }
    context->two_halves = strw == 0 || BIT(registers->cr2, 0);  /* EL1, or EL2 with E2H */
    if (!decode_cd(context, cd)) {
        refuse(context, registers, C_BAD_CD);
        return;
    }
    context->beyond_output = ~(uint64_t)0 << context->output_lg2;
    context->kind = BIT(cd[0], 15) ? CONTEXT_UNSUPPORTED : CONTEXT_TRANSLATE;
}

/* ---- the walk --------------------------------------------------------------------------- */

/* Returns the access that the STE's overrides leave; finds which halves refuse all of it. */
static unsigned prepare(struct context *context, unsigned access)
{
    if (context->privcfg == 2)
        access &= ~ACCESS_PRIVILEGED;
    else if (context->privcfg == 3)
        access |= ACCESS_PRIVILEGED;
    if (context->instcfg == 2)
        access &= ~ACCESS_INSTRUCTION;
    else if (context->instcfg == 3)
        access |= ACCESS_INSTRUCTION;
    if (access & ACCESS_WRITE)
        access &= ~ACCESS_INSTRUCTION;
    for (int i = 0; i < 2; i++) {
        struct half *half = &context->half[i];

        half->disabled = half->epd || (half->e0pd && !(access & ACCESS_PRIVILEGED));
    }
    return access;
}

/* DDI 0487 D8.4, with the bits of all tables on the way ORed into `tables`. */
ALWAYS_INLINE bool permitted(const struct context *context, unsigned access, uint64_t tables,
                             uint64_t leaf)
{
    bool read_only = BIT(leaf, 7) | BIT(tables, 62);
    bool user, user_write, uxn, pxn, wxn = context->wxn;

    uxn = BIT(leaf, 54) | BIT(tables, 60);
    if (!context->two_halves) {
        if (access & ACCESS_INSTRUCTION)
            return !uxn && !(wxn && !read_only);
        return !(access & ACCESS_WRITE) || !read_only;
    }
    pxn = BIT(leaf, 53) | BIT(tables, 59);
    user = BIT(leaf, 6) & ~BIT(tables, 61);
    user_write = user && !read_only;
    if (access & ACCESS_INSTRUCTION) {
        if (access & ACCESS_PRIVILEGED)
            return !pxn && !user_write && !(wxn && !read_only);
        return !uxn && !(wxn && user_write);
    }
    if (access & ACCESS_PRIVILEGED) {
        if (context->pan && (user || (context->epan && !uxn)))
            return false;
    } else if (!user) {
        return false;
    }
    return !(access & ACCESS_WRITE) || !read_only;
}

/* The walk of one format. Returns an event number, or 0 and the output address. */
ALWAYS_INLINE unsigned walk(const struct memory *memory, const struct context *context,
                            const struct half *half, uint64_t iova, unsigned access,
                            const unsigned granule_lg2, const bool ds, uint64_t *pa)
{
    const unsigned stride = granule_lg2 - 3;
    const uint64_t index_mask = ((uint64_t)1 << stride) - 1;
    uint64_t input = iova & half->input_mask;
    uint64_t table = half->ttb;
    uint64_t tables = 0;
    unsigned shift = half->start_shift;
    uint64_t descriptor, output, offset;

    for (;;) {
        offset = table + (input >> shift & index_mask) * 8 - memory->base;
        if (offset > memory->size - 8)
            return F_WALK_EABT;
        memcpy(&descriptor, memory->bytes + offset, 8);
        if (!(descriptor & 1))
            return F_TRANSLATION;
        if (granule_lg2 == 16)
            output = ADDRESS(descriptor, 47, 16) | BITS(descriptor, 15, 12) << 48;
        else if (ds)
            output = ADDRESS(descriptor, 49, granule_lg2) | BITS(descriptor, 9, 8) << 50;
        else
            output = ADDRESS(descriptor, 47, granule_lg2);
        if (shift == granule_lg2 || !(descriptor & 2))
            break;
        if (output & context->beyond_output)
            return F_ADDR_SIZE;
        tables |= descriptor;
        table = output;
        shift -= stride;
    }
    if (shift == granule_lg2) {
        if (!(descriptor & 2))
            return F_TRANSLATION;
    } else {
        unsigned level = 3 - (shift - granule_lg2) / stride;
        unsigned first_block = granule_lg2 == 12 ? 1 - ds : granule_lg2 == 14 ? 2 - ds : 1;

        if (shift == 48 && granule_lg2 == 12)                   /* level -1 */
            return F_TRANSLATION;
        if (level < first_block)
            return F_TRANSLATION;
        output &= ~(((uint64_t)1 << shift) - 1);
    }
    if (output & context->beyond_output)
        return F_ADDR_SIZE;
    if (!BIT(descriptor, 10) && !context->affd)
        return F_ACCESS;
    if (!permitted(context, access, half->had ? 0 : tables, descriptor))
        return F_PERMISSION;
    *pa = output | (input & (((uint64_t)1 << shift) - 1));
    return 0;
}

/* Stage 1 of one address. Returns an event number, or 0 and the output address. */
ALWAYS_INLINE unsigned stage1(const struct memory *memory, const struct context *context,
                              uint64_t iova, unsigned access, uint64_t *pa)
{
    const struct half *half = &context->half[context->two_halves & BIT(iova, 55)];
    int64_t canonical = (int64_t)(iova << half->ignored_top) >> half->ignored_top;

    if (canonical >> half->input_lg2 != half->upper || half->disabled)
        return F_TRANSLATION;
    switch (half->format) {
    case FORMAT_4K:
        return walk(memory, context, half, iova, access, 12, false, pa);
    case FORMAT_16K:
        return walk(memory, context, half, iova, access, 14, false, pa);
    case FORMAT_64K:
        return walk(memory, context, half, iova, access, 16, false, pa);
    case FORMAT_4K_52:
        return walk(memory, context, half, iova, access, 12, true, pa);
    default:
        return walk(memory, context, half, iova, access, 14, true, pa);
    }
}

/* What a stage 1 fault becomes. */
ALWAYS_INLINE unsigned report(const struct context *context, unsigned fault, uint8_t *event)
{
    bool recorded = context->record || fault == F_WALK_EABT;

    *event = context->events_enabled && recorded ? fault : 0;
    return context->abort || fault == F_WALK_EABT ? ACTION_ABORT : ACTION_RAZ_WI;
}

/* One address with a decoded context and a prepared access. Returns the action. */
ALWAYS_INLINE unsigned translate(const struct memory *memory, const struct context *context,
                                 uint64_t iova, unsigned access, uint64_t *pa, uint8_t *event)
{
    unsigned fault;

    *pa = 0;
    *event = 0;
    if (context->kind == CONTEXT_TRANSLATE) {
        fault = stage1(memory, context, iova, access, pa);
        return fault ? report(context, fault, event) : ACTION_OK;
    }
    if (context->kind == CONTEXT_BYPASS) {
        if (iova >> OAS_LG2) {
            *event = context->events_enabled ? F_ADDR_SIZE : 0;
            return ACTION_ABORT;
        }
        *pa = iova;
        return ACTION_BYPASS;
    }
    *event = context->event;
    return ACTION_ABORT;
}

int64_t baseline_walk(const struct memory *memory_given, const struct context *context_given,
                      const uint64_t *iova, size_t n, unsigned access,
                      uint64_t *pa_out, uint8_t *action_out, uint8_t *event_out)
{
    /* Copies, so that the compiler sees that the stores below change neither. */
    const struct memory memory = *memory_given;
    struct context context = *context_given;
    int64_t successes = 0;

    access = prepare(&context, access);
    if (context.kind != CONTEXT_TRANSLATE) {
        for (size_t i = 0; i < n; i++) {
            action_out[i] = translate(&memory, &context, iova[i], access, &pa_out[i],
                                      &event_out[i]);
            successes += action_out[i] < ACTION_ABORT;
        }
        return successes;
    }
    for (size_t i = 0; i < n; i++) {
        uint64_t pa = 0;
        uint8_t event = 0;
        unsigned action = ACTION_OK;
        unsigned fault = stage1(&memory, &context, iova[i], access, &pa);

        if (fault)
            action = report(&context, fault, &event);
        pa_out[i] = pa;
        action_out[i] = action;
        event_out[i] = event;
        successes += !fault;
    }
    return successes;
}

unsigned baseline_translate(const struct memory *memory, const struct registers *registers,
                            uint32_t sid, uint32_t ssid, uint64_t iova, unsigned access,
                            uint64_t *pa_out, uint8_t *event_out)
{
    struct context context;

    baseline_configure(memory, registers, sid, ssid, &context);
    access = prepare(&context, access);
    return translate(memory, &context, iova, access, pa_out, event_out);
}

int64_t baseline_requests(const struct memory *memory, const struct registers *registers,
                          const uint32_t *sid, const uint32_t *ssid, const uint64_t *iova,
                          size_t n, unsigned access,
                          uint64_t *pa_out, uint8_t *action_out, uint8_t *event_out)
{
    struct context context;
    unsigned prepared = access;
    int64_t successes = 0;

    for (size_t i = 0; i < n; i++) {
        if (i == 0 || sid[i] != sid[i - 1] || (ssid && ssid[i] != ssid[i - 1])) {
            baseline_configure(memory, registers, sid[i], ssid ? ssid[i] : NO_SSID, &context);
            prepared = prepare(&context, access);
        }
        action_out[i] = translate(memory, &context, iova[i], prepared, &pa_out[i],
                                  &event_out[i]);
        successes += action_out[i] < ACTION_ABORT;
    }
    return successes;
}
