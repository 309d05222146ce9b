/*
 * The baseline of the nested benchmarks: stage 2, alone or under stage 1, in plain C, one address
 * at a time.
 *
 * It models what smmufast.Features(httu=0, stall_model=1) describes, with tables of 4 KiB granule
 * and up to 48 bits in both stages and without substreams; other streams are UNSUPPORTED.
 */
#ifndef SMMUFAST_BASELINE_NESTED_H
#define SMMUFAST_BASELINE_NESTED_H

#include "baseline_walk.h"

/* Stage 2 as an STE sets it. */
struct stage2 {
    uint64_t ttb;
    uint64_t beyond_input, beyond_output;
    uint64_t first_mask;        /* of the index into the first tables, which lie side by side */
    uint8_t start_shift;
    bool affd, ptw, record;
};

/* An STE and, unless it has stage 2 alone, a CD. */
struct nested {
    struct context context;
    struct stage2 stage2;
    bool stage1;
};

/* Reads and checks the STE and, through stage 2, the CD. */
void nested_configure(const struct memory *memory, const struct registers *registers,
                      uint32_t sid, struct nested *nested);

/* As baseline_walk(). */
int64_t nested_walk(const struct memory *memory, const struct nested *nested,
                    const uint64_t *iova, size_t n, unsigned access,
                    uint64_t *pa_out, uint8_t *action_out, uint8_t *event_out);

/* As baseline_translate(). */
unsigned nested_translate(const struct memory *memory, const struct registers *registers,
                          uint32_t sid, uint64_t iova, unsigned access,
                          uint64_t *pa_out, uint8_t *event_out);

#endif
