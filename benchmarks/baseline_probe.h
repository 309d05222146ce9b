/*
 * The baseline of the TLB benchmarks: a bare probe of four ways in plain C, written without the
 * library. It has one page size and no tags but the page, replaces nothing and counts nothing.
 */
#ifndef SMMUFAST_BASELINE_PROBE_H
#define SMMUFAST_BASELINE_PROBE_H

#include <stddef.h>
#include <stdint.h>

enum { PROBE_WAYS = 4, PROBE_PAGE_LG2 = 12 };

/* Ways of a set lie together. A tag is a page number; no page has the number ~0. */
struct probe {
    uint64_t *tag;              /* sets * PROBE_WAYS */
    uint64_t *output;           /* where the page goes, likewise */
    uint64_t sets;              /* a power of two */
};

/* Put a page into an empty way of its set; -1 when there is none. */
int probe_fill(struct probe *probe, uint64_t iova, uint64_t output);

/* Look n addresses up, write where they go (0 for a miss), return how many hit. */
size_t probe_batch(const struct probe *probe, const uint64_t *iova, size_t n, uint64_t *output);

#endif
