/*
 * Both stages in plain C, checked as limits_walk.h says: 4 KiB granules and four levels in each.
 * Stage 2 also asks for S2AP; what stage 1 reads must be readable.
 */
#ifndef LIMITS_NESTED_H
#define LIMITS_NESTED_H

#include "limits_walk.h"

struct nested {
    const uint8_t *origin;      /* of physical address 0, were it in the buffer */
    uint64_t ttb;               /* of stage 1, an IPA */
    uint64_t s2ttb;
};

/* Every descriptor of stage 1 is found through four of stage 2. */
int64_t limits_nested(const struct nested *, const struct arrays *, bool write);
/* Where stage 2 puts a table of stage 1 is kept in a direct-mapped cache, empty at first. */
int64_t limits_nested_reuse(const struct nested *, const struct arrays *, bool write);
/* Caches of last-level tables in front of both stages, likewise. */
int64_t limits_nested_cached(const struct nested *, const struct arrays *, bool write);

#endif
