/* DDI 0487 D8.2 to D8.4: VMSAv8-64 descriptors of 48-bit addresses, stages 1 and 2. */
#include "limits_nested.h"

#include <string.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum { CACHE_LG2 = 10 };

enum { ABORT = 3, F_TRANSLATION = 0x10, F_ACCESS = 0x12, F_PERMISSION = 0x13 };

#define ADDRESS (((1ull << 48) - 1) & ~0xFFFull)
#define READ_ONLY (1ull << 7)
#define S2_READ (1ull << 6)
#define S2_WRITE (1ull << 7)
#define AF (1ull << 10)

ALWAYS_INLINE uint64_t entry(const struct nested *t, uint64_t table, uint64_t address,
                             unsigned shift)
{
    return ((const uint64_t *)(t->origin + table))[address >> shift & 511];
}

/* Stage 2 down to its last table. Returns an event number, or 0 and where the table is. */
ALWAYS_INLINE unsigned outer_table(const struct nested *t, uint64_t ipa, uint64_t *table)
{
    uint64_t at = t->s2ttb;

    if (ipa >> 48)
        return F_TRANSLATION;
#pragma GCC unroll 3
    for (unsigned shift = 39; shift > 12; shift -= 9) {
        uint64_t descriptor = entry(t, at, ipa, shift);

        if ((descriptor & 3) != 3)
            return F_TRANSLATION;
        at = descriptor & ADDRESS;
    }
    *table = at;
    return 0;
}

/* A leaf of stage 2. */
ALWAYS_INLINE unsigned outer_leaf(uint64_t descriptor, uint64_t need, uint64_t *page)
{
    if ((descriptor & 3) != 3)
        return F_TRANSLATION;
    if ((descriptor & (need | AF)) != (need | AF))
        return descriptor & AF ? F_PERMISSION : F_ACCESS;
    *page = descriptor & ADDRESS;
    return 0;
}

/* All of stage 2. Returns an event number, or 0 and the physical address of the page. */
ALWAYS_INLINE unsigned outer(const struct nested *t, uint64_t ipa, uint64_t need, uint64_t *page)
{
    uint64_t table = 0;
    unsigned fault = outer_table(t, ipa, &table);

    return fault ? fault : outer_leaf(entry(t, table, ipa, 12), need, page);
}

struct way { uint64_t tag, page; };

ALWAYS_INLINE struct way *way_of(struct way *cache, uint64_t number)
{
    return &cache[number & ((1 << CACHE_LG2) - 1)];
}

/* The same for a table of stage 1, through a cache unless that is NULL. */
ALWAYS_INLINE unsigned of_table(const struct nested *t, struct way *cache, uint64_t ipa,
                                uint64_t *page)
{
    struct way *way;
    unsigned fault;

    if (!cache)
        return outer(t, ipa, S2_READ, page);
    way = way_of(cache, ipa >> 12);
    if (way->tag != ipa) {
        fault = outer(t, ipa, S2_READ, &way->page);
        if (fault)
            return fault;               /* page and tag are as they were */
        way->tag = ipa;
    }
    *page = way->page;
    return 0;
}

/* Stage 1 down to its last table, each through stage 2. */
ALWAYS_INLINE unsigned inner_table(const struct nested *t, struct way *cache, uint64_t iova,
                                   uint64_t *table)
{
    uint64_t ipa = t->ttb;

    if (iova >> 48)
        return F_TRANSLATION;
#pragma GCC unroll 3
    for (unsigned shift = 39; shift > 12; shift -= 9) {
        uint64_t at = 0, descriptor;
        unsigned fault = of_table(t, cache, ipa, &at);

        if (fault)
            return fault;
        descriptor = entry(t, at, iova, shift);
        if ((descriptor & 3) != 3)
            return F_TRANSLATION;
        ipa = descriptor & ADDRESS;
    }
    return of_table(t, cache, ipa, table);
}

/* A leaf of stage 1. */
ALWAYS_INLINE unsigned inner_leaf(uint64_t descriptor, bool write, uint64_t *ipa)
{
    if ((descriptor & 3) != 3)
        return F_TRANSLATION;
    if (!(descriptor & AF))
        return F_ACCESS;
    if (write && (descriptor & READ_ONLY))
        return F_PERMISSION;
    *ipa = descriptor & ADDRESS;
    return 0;
}

/* `fronts`: caches of last-level tables, of stage 1 and of stage 2; NULL: there are none. */
ALWAYS_INLINE unsigned both(const struct nested *t, struct way *cache,
                            struct way (*fronts)[1 << CACHE_LG2], uint64_t iova, bool write,
                            uint64_t *pa)
{
    const uint64_t need = write ? S2_WRITE : S2_READ;
    uint64_t ipa = 0, page = 0, table = 0;
    struct way *way;
    unsigned fault;

    if (!fronts) {
        fault = inner_table(t, cache, iova, &table);
        if (!fault)
            fault = inner_leaf(entry(t, table, iova, 12), write, &ipa);
        if (!fault)
            fault = outer(t, ipa, need, &page);
        *pa = page | (iova & 0xFFF);
        return fault;
    }
    way = way_of(fronts[0], iova >> 21);
    if (way->tag != iova >> 21) {
        fault = inner_table(t, cache, iova, &way->page);
        if (fault)
            return fault;
        way->tag = iova >> 21;
    }
    fault = inner_leaf(entry(t, way->page, iova, 12), write, &ipa);
    if (fault)
        return fault;
    way = way_of(fronts[1], ipa >> 21);
    if (way->tag != ipa >> 21) {
        fault = outer_table(t, ipa, &way->page);
        if (fault)
            return fault;
        way->tag = ipa >> 21;
    }
    fault = outer_leaf(entry(t, way->page, ipa, 12), need, &page);
    *pa = page | (iova & 0xFFF);
    return fault;
}

ALWAYS_INLINE int64_t each(const struct nested *given, struct way *cache,
                           struct way (*fronts)[1 << CACHE_LG2], const struct arrays a, bool write)
{
    const struct nested t = *given;
    int64_t successes = 0;

    for (size_t i = 0; i < a.n; i++) {
        uint64_t pa = 0;
        unsigned fault = both(&t, cache, fronts, a.iova[i], write, &pa);

        a.pa[i] = fault ? 0 : pa;
        a.action[i] = fault ? ABORT : 0;
        a.event[i] = fault;
        successes += !fault;
    }
    return successes;
}

int64_t limits_nested(const struct nested *t, const struct arrays *a, bool write)
{
    return each(t, NULL, NULL, *a, write);
}

int64_t limits_nested_reuse(const struct nested *t, const struct arrays *a, bool write)
{
    struct way cache[1 << CACHE_LG2];

    memset(cache, 0xFF, sizeof(cache));         /* no table has this address */
    return each(t, cache, NULL, *a, write);
}

int64_t limits_nested_cached(const struct nested *t, const struct arrays *a, bool write)
{
    struct way cache[1 << CACHE_LG2], fronts[2][1 << CACHE_LG2];

    memset(cache, 0xFF, sizeof(cache));
    memset(fronts, 0xFF, sizeof(fronts));
    return each(t, cache, fronts, *a, write);
}
