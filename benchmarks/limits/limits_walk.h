/*
 * Stage 1 walks in plain C that do as little as a walk can: what the library's batches are
 * measured against.  Written without the library, and sharing no code with it.
 *
 * A checked kernel asks whether the address is in the input range, whether each descriptor is
 * valid and of the kind that its level wants, the access flag, and the write permission: less
 * than an SMMU asks.  Configuration is not looked up, table addresses are trusted, and all leaves
 * of a table are at one level.  baseline_walk.c makes every check that the library makes.
 */
#ifndef LIMITS_WALK_H
#define LIMITS_WALK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The table: where it is in the host, and its shape, which is one of those of limits_shape(). */
struct table {
    const uint8_t *origin;      /* of physical address 0, were it in the buffer */
    uint64_t ttb;
    int shape;
};

/* What a call reads and writes: n of each. */
struct arrays {
    const uint64_t *iova;
    uint64_t *pa;
    uint8_t *action, *event;
    size_t n;
};

/* The shape of tables of a granule whose input size and leaves are such; -1 when there is none. */
int limits_shape(unsigned granule_lg2, unsigned input_lg2, unsigned leaf_lg2);

/* Each returns how many succeeded, and -1 where the processor lacks what it takes. */
typedef int64_t limits_kernel(const struct table *, const struct arrays *, bool write);

/* One walk after another: each address depends on the result before. */
limits_kernel limits_dependent;
/* One walk at a time, without waiting for the one before. */
limits_kernel limits_plain;
/* Likewise, no check at all: right for mapped addresses only. */
limits_kernel limits_bare;
/* The upper levels of the request AHEAD further on are walked and its leaf entry is prefetched. */
limits_kernel limits_pipeline;
/* Two steps: its last table is looked for twice as far ahead, and the entry that leads there
   prefetched.  Slower than the one above where upper levels are in cache, and faster elsewhere. */
limits_kernel limits_staged;
/* 32 walks in flight, level by level. */
limits_kernel limits_flight;
/* Blocks of 128: upper levels in AVX-512 vectors, each block finished one block later. */
limits_kernel limits_vector;
/* A direct-mapped cache of last-level tables, empty at the start of a call. */
limits_kernel limits_cached;

/* Where the leaf entry of each address is, for limits_ceiling; NULL where a table is missing. */
void limits_entries(const struct table *, const uint64_t *iova, const uint64_t **entry, size_t n);
/* The leaf entry of each address is read and nothing else: right for mapped addresses only. */
int64_t limits_ceiling(const struct table *, const struct arrays *, const uint64_t **entry);

#endif
