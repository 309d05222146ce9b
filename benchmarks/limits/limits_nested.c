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

/* Returns an event number, or 0 and the physical address of the page. */
ALWAYS_INLINE unsigned outer(const struct nested *t, uint64_t ipa, uint64_t need, uint64_t *page)
{
    uint64_t table = t->s2ttb, descriptor = 0;

    if (ipa >> 48)
        return F_TRANSLATION;
#pragma GCC unroll 4
    for (unsigned shift = 39; shift >= 12; shift -= 9) {
        descriptor = ((const uint64_t *)(t->origin + table))[ipa >> shift & 511];
        if ((descriptor & 3) != 3)
            return F_TRANSLATION;
        table = descriptor & ADDRESS;
    }
    if ((descriptor & (need | AF)) != (need | AF))
        return descriptor & AF ? F_PERMISSION : F_ACCESS;
    *page = table;
    return 0;
}

struct way { uint64_t tag, page; };

/* The same for a table of stage 1, through a cache unless that is NULL. */
ALWAYS_INLINE unsigned of_table(const struct nested *t, struct way *cache, uint64_t ipa,
                                uint64_t *page)
{
    struct way *way;
    unsigned fault;

    if (!cache)
        return outer(t, ipa, S2_READ, page);
    way = &cache[ipa >> 12 & ((1 << CACHE_LG2) - 1)];
    if (way->tag != ipa) {
        fault = outer(t, ipa, S2_READ, &way->page);
        if (fault)
            return fault;               /* page and tag are as they were */
        way->tag = ipa;
    }
    *page = way->page;
    return 0;
}

ALWAYS_INLINE unsigned both(const struct nested *t, struct way *cache, uint64_t iova, bool write,
                            uint64_t *pa)
{
    uint64_t ipa = t->ttb, descriptor = 0, page = 0;
    unsigned fault;

    if (iova >> 48)
        return F_TRANSLATION;
#pragma GCC unroll 4
    for (unsigned shift = 39; shift >= 12; shift -= 9) {
        fault = of_table(t, cache, ipa, &page);
        if (fault)
            return fault;
        descriptor = ((const uint64_t *)(t->origin + page))[iova >> shift & 511];
        if ((descriptor & 3) != 3)
            return F_TRANSLATION;
        ipa = descriptor & ADDRESS;
    }
    if (!(descriptor & AF))
        return F_ACCESS;
    if (write && (descriptor & READ_ONLY))
        return F_PERMISSION;
    fault = outer(t, ipa, write ? S2_WRITE : S2_READ, &page);
    *pa = page | (iova & 0xFFF);
    return fault;
}

ALWAYS_INLINE int64_t each(const struct nested *given, struct way *cache, const struct arrays a,
                           bool write)
{
    const struct nested t = *given;
    int64_t successes = 0;

    for (size_t i = 0; i < a.n; i++) {
        uint64_t pa = 0;
        unsigned fault = both(&t, cache, a.iova[i], write, &pa);

        a.pa[i] = fault ? 0 : pa;
        a.action[i] = fault ? ABORT : 0;
        a.event[i] = fault;
        successes += !fault;
    }
    return successes;
}

int64_t limits_nested(const struct nested *t, const struct arrays *a, bool write)
{
    return each(t, NULL, *a, write);
}

int64_t limits_nested_reuse(const struct nested *t, const struct arrays *a, bool write)
{
    struct way cache[1 << CACHE_LG2];

    memset(cache, 0xFF, sizeof(cache));         /* no table has this address */
    return each(t, cache, *a, write);
}
