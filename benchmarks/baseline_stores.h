/* The least that mapping and unmapping can cost: stores, one for each page, without looking. */
#ifndef BASELINE_STORES_H
#define BASELINE_STORES_H

#include <stddef.h>
#include <stdint.h>

/* n descriptors, ascending by `step`. */
void stores_fill(uint64_t *entry, size_t n, uint64_t descriptor, uint64_t step);

/* n descriptors, none of them valid. */
void stores_clear(uint64_t *entry, size_t n);

/* Which of n page descriptors are writable with DBM: a byte for each. */
void stores_dirty(const uint64_t *entry, size_t n, uint8_t *dirty);

/* The same, and those become read-only, as hardware that writes them meanwhile needs it. */
void stores_clean(uint64_t *entry, size_t n, uint8_t *dirty);

#endif
