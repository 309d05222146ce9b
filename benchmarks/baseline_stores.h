/* The least that mapping and unmapping can cost: stores, one for each page, without looking. */
#ifndef BASELINE_STORES_H
#define BASELINE_STORES_H

#include <stddef.h>
#include <stdint.h>

/* n descriptors, ascending by `step`. */
void stores_fill(uint64_t *entry, size_t n, uint64_t descriptor, uint64_t step);

/* n descriptors, none of them valid. */
void stores_clear(uint64_t *entry, size_t n);

#endif
