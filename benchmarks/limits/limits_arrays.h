/* What small tables, leaf stores and ID bitmaps cost in plain C. */
#ifndef LIMITS_ARRAYS_H
#define LIMITS_ARRAYS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A direct-mapped table of pages of 4 KiB. No page has the number ~0, which is an empty entry. */
struct direct {
    const uint64_t *tag, *output;
    uint64_t mask;              /* entries - 1 */
};

/* Look n addresses up, write where they go (0 for a miss); return how many hit. */
size_t direct_probe(const struct direct *, const uint64_t *iova, size_t n, uint64_t *output);
/* The same by AVX-512 gathers; -1 where the processor has none. */
int64_t direct_gather(const struct direct *, const uint64_t *iova, size_t n, uint64_t *output);

/* n descriptors, ascending by `step`: one store each. */
void fill_each(uint64_t *entry, size_t n, uint64_t descriptor, uint64_t step);
/* Eight in each store, of a multiple of eight; false where the processor has no AVX-512. */
bool fill_vector(uint64_t *entry, size_t n, uint64_t descriptor, uint64_t step);

enum { BITMAP_LG2 = 20 };

/* A bit is set where something below it is free. */
struct bitmap {
    uint64_t ids[1 << (BITMAP_LG2 - 6)];
    uint64_t words[1 << (BITMAP_LG2 - 12)];
    uint64_t groups[1 << (BITMAP_LG2 - 18)];
    uint64_t root[1];
};

void bitmap_clear(struct bitmap *);                     /* all free */
/* The lowest free ID from min to max; -1 when there is none. */
int64_t bitmap_alloc(struct bitmap *, uint32_t min, uint32_t max);
int64_t bitmap_alloc_lowest(struct bitmap *);           /* the lowest of all */
void bitmap_free(struct bitmap *, uint32_t id);
/* The lowest `n` free IDs at a time, by words; returns how many there were. */
size_t bitmap_bulk(struct bitmap *, uint32_t *out, size_t n);

/* Loops: n allocations, frees, pairs of both (in [min, max] unless all is allowed). */
size_t bitmap_alloc_each(struct bitmap *, uint32_t *out, size_t n);
void bitmap_free_each(struct bitmap *, const uint32_t *ids, size_t n);
int64_t bitmap_pairs(struct bitmap *, size_t n);        /* each returns the last ID */
int64_t bitmap_pairs_in(struct bitmap *, size_t n, uint32_t min, uint32_t max);

/* Does nothing, under a name that tools find. */
void limits_mark(void);

#endif
