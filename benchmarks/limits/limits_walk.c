/*
 * DDI 0487 D8.2 to D8.4: VMSAv8-64 descriptors of 48-bit addresses.
 *
 * The shape of the table is a constant argument of an inline function, so that each kernel exists
 * once for each shape.
 */
#include "limits_walk.h"

#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define VECTORS 1
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum { AHEAD = 24, RING = 32, FLIGHT = 32, BLOCK = 128, CACHE_LG2 = 10 };

enum { ABORT = 3, F_TRANSLATION = 0x10, F_ACCESS = 0x12, F_PERMISSION = 0x13 };

#define VALID 1ull
#define TABLE_OR_PAGE 2ull
#define READ_ONLY (1ull << 7)
#define AF (1ull << 10)

/* X(what, number, granule, input size, leaf) */
#define SHAPES(X, what) \
    X(what, 0, 12, 48, 12) X(what, 1, 12, 39, 12) X(what, 2, 12, 30, 12) X(what, 3, 12, 48, 21) \
    X(what, 4, 12, 48, 30) X(what, 5, 14, 47, 14) X(what, 6, 16, 48, 16)

int limits_shape(unsigned granule_lg2, unsigned input_lg2, unsigned leaf_lg2)
{
#define SHAPE(what, number, granule, input, leaf) \
    if (granule_lg2 == granule && input_lg2 == input && leaf_lg2 == leaf) \
        return number;
    SHAPES(SHAPE, )
#undef SHAPE
    return -1;
}

/* A leaf entry that is always invalid stands for every walk that did not come so far. */
static const uint64_t nothing = 0;

/* What is asked of a leaf: these bits ... */
ALWAYS_INLINE uint64_t leaf_mask(bool write)
{
    return VALID | TABLE_OR_PAGE | AF | (write ? READ_ONLY : 0);
}

/* ... are to be these. */
ALWAYS_INLINE uint64_t leaf_wanted(unsigned granule, unsigned leaf)
{
    return VALID | AF | (leaf == granule ? TABLE_OR_PAGE : 0);
}

ALWAYS_INLINE uint64_t table_address(uint64_t descriptor, unsigned granule)
{
    return descriptor & (((1ull << 48) - 1) & ~((1ull << granule) - 1));
}

ALWAYS_INLINE uint64_t output(uint64_t descriptor, uint64_t iova, unsigned leaf)
{
    const uint64_t offset = (1ull << leaf) - 1;

    return (descriptor & ((1ull << 48) - 1) & ~offset) | (iova & offset);
}

/* How far the first table's index is shifted; the levels above `leaf` end in this as well. */
ALWAYS_INLINE unsigned start_shift(unsigned granule, unsigned input)
{
    const unsigned stride = granule - 3;

    return granule + (input - 1 - granule) / stride * stride;
}

ALWAYS_INLINE const uint64_t *entry_at(const uint8_t *origin, uint64_t table, uint64_t iova,
                                       unsigned shift, unsigned granule)
{
    const uint64_t index = iova >> shift & ((1ull << (granule - 3)) - 1);

    return (const uint64_t *)(origin + table) + index;
}

/* The entry of a level, or `nothing`. */
ALWAYS_INLINE const uint64_t *down_to(const uint8_t *origin, uint64_t table, uint64_t iova,
                                      unsigned granule, unsigned input, unsigned level)
{
    unsigned shift = start_shift(granule, input);

    if (iova >> input)
        return &nothing;
#pragma GCC unroll 4
    while (shift != level) {
        uint64_t descriptor = *entry_at(origin, table, iova, shift, granule);

        if ((descriptor & 3) != (VALID | TABLE_OR_PAGE))
            return &nothing;
        table = table_address(descriptor, granule);
        shift -= granule - 3;
    }
    return entry_at(origin, table, iova, level, granule);
}

/* That of the leaf. */
ALWAYS_INLINE const uint64_t *upper(const uint8_t *origin, uint64_t table, uint64_t iova,
                                    unsigned granule, unsigned input, unsigned leaf)
{
    return down_to(origin, table, iova, granule, input, leaf);
}

/* The entry one level further down. */
ALWAYS_INLINE const uint64_t *one_down(const uint8_t *origin, uint64_t descriptor, uint64_t iova,
                                       unsigned granule, unsigned level)
{
    if ((descriptor & 3) != (VALID | TABLE_OR_PAGE))
        return &nothing;
    return entry_at(origin, table_address(descriptor, granule), iova, level, granule);
}

/* Why a leaf did not pass. */
static __attribute__((noinline, cold)) unsigned fault(uint64_t descriptor, unsigned granule,
                                                      unsigned leaf)
{
    if ((descriptor ^ leaf_wanted(granule, leaf)) & (VALID | TABLE_OR_PAGE))
        return F_TRANSLATION;
    return descriptor & AF ? F_PERMISSION : F_ACCESS;
}

/* Writes row i; returns whether the leaf passed. */
ALWAYS_INLINE bool finish(const struct arrays *a, size_t i, uint64_t descriptor, uint64_t mask,
                          unsigned granule, unsigned leaf)
{
    if ((descriptor ^ leaf_wanted(granule, leaf)) & mask) {
        a->pa[i] = 0;
        a->action[i] = ABORT;
        a->event[i] = fault(descriptor, granule, leaf);
        return false;
    }
    a->pa[i] = output(descriptor, a->iova[i], leaf);
    a->action[i] = 0;
    a->event[i] = 0;
    return true;
}

ALWAYS_INLINE int64_t plain(const struct table *t, const struct arrays a, bool write,
                            unsigned granule, unsigned input, unsigned leaf)
{
    const uint8_t *origin = t->origin;
    const uint64_t ttb = t->ttb, mask = leaf_mask(write);
    int64_t successes = 0;

    for (size_t i = 0; i < a.n; i++)
        successes += finish(&a, i, *upper(origin, ttb, a.iova[i], granule, input, leaf), mask,
                            granule, leaf);
    return successes;
}

ALWAYS_INLINE int64_t dependent(const struct table *t, const struct arrays a, bool write,
                                unsigned granule, unsigned input, unsigned leaf)
{
    const uint8_t *origin = t->origin;
    const uint64_t ttb = t->ttb, mask = leaf_mask(write);
    uint64_t last = 0;
    int64_t successes = 0;

    for (size_t i = 0; i < a.n; i++) {
        /* no address has this bit: 0, which the processor has to wait for */
        uint64_t iova = a.iova[i] + (last >> 63);
        uint64_t descriptor = *upper(origin, ttb, iova, granule, input, leaf);

        last = descriptor & ~(1ull << 63);
        __asm__("" : "+r"(last));
        successes += finish(&a, i, descriptor, mask, granule, leaf);
    }
    return successes;
}

ALWAYS_INLINE int64_t bare(const struct table *t, const struct arrays a, bool write,
                           unsigned granule, unsigned input, unsigned leaf)
{
    const uint8_t *origin = t->origin;

    (void)write;
    for (size_t i = 0; i < a.n; i++) {
        uint64_t table = t->ttb;
        unsigned shift = start_shift(granule, input);

#pragma GCC unroll 4
        while (shift != leaf) {
            table = table_address(*entry_at(origin, table, a.iova[i], shift, granule), granule);
            shift -= granule - 3;
        }
        a.pa[i] = output(*entry_at(origin, table, a.iova[i], leaf, granule), a.iova[i], leaf);
    }
    memset(a.action, 0, a.n);
    memset(a.event, 0, a.n);
    return a.n;
}

ALWAYS_INLINE int64_t pipeline(const struct table *t, const struct arrays a, bool write,
                               unsigned granule, unsigned input, unsigned leaf)
{
    const uint8_t *origin = t->origin;
    const uint64_t ttb = t->ttb, mask = leaf_mask(write);
    const uint64_t *ring[RING];
    const size_t first = a.n < AHEAD ? a.n : AHEAD;
    int64_t successes = 0;
    size_t i;

    for (i = 0; i < first; i++) {
        ring[i] = upper(origin, ttb, a.iova[i], granule, input, leaf);
        __builtin_prefetch(ring[i]);
    }
    for (; i < a.n; i++) {
        const uint64_t *entry = upper(origin, ttb, a.iova[i], granule, input, leaf);

        ring[i % RING] = entry;
        __builtin_prefetch(entry);
        successes += finish(&a, i - AHEAD, *ring[(i - AHEAD) % RING], mask, granule, leaf);
    }
    for (i = a.n - first; i < a.n; i++)
        successes += finish(&a, i, *ring[i % RING], mask, granule, leaf);
    return successes;
}

ALWAYS_INLINE int64_t staged(const struct table *t, const struct arrays a, bool write,
                             unsigned granule, unsigned input, unsigned leaf)
{
    const uint8_t *origin = t->origin;
    const uint64_t ttb = t->ttb, mask = leaf_mask(write);
    const uint64_t *last[RING], *ring[RING];
    int64_t successes = 0;

    for (size_t i = 0; i < a.n + 2 * AHEAD; i++) {
        size_t j = i - AHEAD, k = j - AHEAD;            /* beyond a.n where there are none yet */

        if (k < a.n)
            successes += finish(&a, k, *ring[k % RING], mask, granule, leaf);
        if (j < a.n) {
            ring[j % RING] = one_down(origin, *last[j % RING], a.iova[j], granule, leaf);
            __builtin_prefetch(ring[j % RING]);
        }
        if (i < a.n) {
            last[i % RING] = down_to(origin, ttb, a.iova[i], granule, input, leaf + granule - 3);
            __builtin_prefetch(last[i % RING]);
        }
    }
    return successes;
}

ALWAYS_INLINE int64_t flight(const struct table *t, const struct arrays a, bool write,
                             unsigned granule, unsigned input, unsigned leaf)
{
    const uint8_t *origin = t->origin;
    const uint64_t mask = leaf_mask(write);
    const uint64_t *entry[FLIGHT];
    int64_t successes = 0;

    for (size_t start = 0; start < a.n; start += FLIGHT) {
        const size_t n = a.n - start < FLIGHT ? a.n - start : FLIGHT;
        const uint64_t *iova = a.iova + start;
        unsigned shift = start_shift(granule, input);

        for (size_t j = 0; j < n; j++)
            entry[j] = iova[j] >> input ? &nothing
                                        : entry_at(origin, t->ttb, iova[j], shift, granule);
#pragma GCC unroll 4
        while (shift != leaf) {
            shift -= granule - 3;
            for (size_t j = 0; j < n; j++) {
                entry[j] = one_down(origin, *entry[j], iova[j], granule, shift);
                __builtin_prefetch(entry[j]);
            }
        }
        for (size_t j = 0; j < n; j++)
            successes += finish(&a, start + j, *entry[j], mask, granule, leaf);
    }
    return successes;
}

ALWAYS_INLINE int64_t cached(const struct table *t, const struct arrays a, bool write,
                             unsigned granule, unsigned input, unsigned leaf)
{
    struct { uint64_t tag; const uint64_t *entries; } cache[1 << CACHE_LG2], *way;
    const uint8_t *origin = t->origin;
    const uint64_t ttb = t->ttb, mask = leaf_mask(write);
    const unsigned span = leaf + granule - 3;
    const uint64_t index_mask = (1ull << (granule - 3)) - 1;
    int64_t successes = 0;

    memset(cache, 0xFF, sizeof(cache));         /* no address has this tag */
    for (size_t i = 0; i < a.n; i++) {
        const uint64_t iova = a.iova[i], tag = iova >> span, index = iova >> leaf & index_mask;
        const uint64_t *entry;

        way = &cache[tag & ((1 << CACHE_LG2) - 1)];
        if (way->tag == tag) {
            entry = way->entries + index;
        } else {
            entry = upper(origin, ttb, iova, granule, input, leaf);
            if (entry != &nothing) {
                way->tag = tag;
                way->entries = entry - index;
            }
        }
        successes += finish(&a, i, *entry, mask, granule, leaf);
    }
    return successes;
}

void limits_entries(const struct table *t, const uint64_t *iova, const uint64_t **entry, size_t n)
{
    for (size_t i = 0; i < n; i++) {
#define ENTRY(what, number, granule, input, leaf) \
        if (t->shape == number) \
            entry[i] = upper(t->origin, t->ttb, iova[i], granule, input, leaf);
        SHAPES(ENTRY, )
#undef ENTRY
        if (entry[i] == &nothing)
            entry[i] = NULL;
    }
}

ALWAYS_INLINE int64_t ceiling(const struct arrays a, const uint64_t **entry, unsigned leaf)
{
    size_t i = 0;

    for (; i + AHEAD < a.n; i++) {
        __builtin_prefetch(entry[i + AHEAD]);
        a.pa[i] = output(*entry[i], a.iova[i], leaf);
    }
    for (; i < a.n; i++)
        a.pa[i] = output(*entry[i], a.iova[i], leaf);
    memset(a.action, 0, a.n);
    memset(a.event, 0, a.n);
    return a.n;
}

int64_t limits_ceiling(const struct table *t, const struct arrays *a, const uint64_t **entry)
{
#define CEILING(what, number, granule, input, leaf) \
    if (t->shape == number) \
        return ceiling(*a, entry, leaf);
    SHAPES(CEILING, )
#undef CEILING
    return -1;
}

#ifdef VECTORS
#define AVX512 __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,bmi2")))
#define VECTOR_INLINE static inline AVX512 __attribute__((always_inline))

/* A gather. One instruction does it too, and takes longer on the processors at hand (Zen 4). */
VECTOR_INLINE __m512i load8(const uint64_t *const *at)
{
    return _mm512_set_epi64(*at[7], *at[6], *at[5], *at[4], *at[3], *at[2], *at[1], *at[0]);
}

VECTOR_INLINE __m512i entry8(__m512i table, __m512i iova, unsigned shift, __m512i index)
{
    __m512i at = _mm512_and_epi64(_mm512_srli_epi64(iova, shift), index);

    return _mm512_add_epi64(_mm512_slli_epi64(at, 3), table);
}

/* The leaf entries of a block of addresses, a level of all of them at a time: one walk alone waits
   for its loads. */
VECTOR_INLINE void upper_block(const uint8_t *origin, uint64_t ttb, const uint64_t *iova,
                               const uint64_t **entry, unsigned granule, unsigned input,
                               unsigned leaf)
{
    const __m512i index = _mm512_set1_epi64((1ll << (granule - 3)) - 1);
    const __m512i address = _mm512_set1_epi64(((1ll << 48) - 1) & ~((1ll << granule) - 1));
    const __m512i kind = _mm512_set1_epi64(VALID | TABLE_OR_PAGE);
    const __m512i none = _mm512_set1_epi64((long long)&nothing);
    const __m512i from = _mm512_set1_epi64((long long)origin);
    const __m512i root = _mm512_set1_epi64((long long)(origin + ttb));
    const __m512i beyond = _mm512_set1_epi64(~0ull << input);
    unsigned shift = start_shift(granule, input);

    for (size_t j = 0; j < BLOCK; j += 8) {
        const __m512i input8 = _mm512_loadu_si512(iova + j);
        __mmask8 alive = _mm512_testn_epi64_mask(input8, beyond);

        _mm512_store_si512(entry + j, _mm512_mask_mov_epi64(
            none, alive, entry8(root, input8, shift, index)));
    }
#pragma GCC unroll 4
    while (shift != leaf) {
        shift -= granule - 3;
        for (size_t j = 0; j < BLOCK; j += 8) {
            const __m512i input8 = _mm512_loadu_si512(iova + j);
            __m512i descriptor = load8(entry + j);
            __m512i table = _mm512_add_epi64(_mm512_and_epi64(descriptor, address), from);
            __mmask8 alive = _mm512_cmpeq_epi64_mask(_mm512_and_epi64(descriptor, kind), kind);

            _mm512_store_si512(entry + j, _mm512_mask_mov_epi64(
                none, alive, entry8(table, input8, shift, index)));
            if (shift == leaf)
                for (size_t k = j; k < j + 8; k++)
                    __builtin_prefetch(entry[k]);
        }
    }
}

/* A block of rows; returns how many leaves passed. */
VECTOR_INLINE int64_t finish_block(const struct arrays *a, size_t start,
                                   const uint64_t *const *entry, uint64_t bits,
                                   unsigned granule, unsigned leaf)
{
    const __m512i offset = _mm512_set1_epi64((1ll << leaf) - 1);
    const __m512i address = _mm512_set1_epi64(((1ll << 48) - 1) & ~((1ll << leaf) - 1));
    const __m512i wanted = _mm512_set1_epi64(leaf_wanted(granule, leaf));
    const __m512i mask = _mm512_set1_epi64(bits);
    int64_t successes = BLOCK;

    memset(a->action + start, 0, BLOCK);
    memset(a->event + start, 0, BLOCK);
    for (size_t i = start; i < start + BLOCK; i += 8, entry += 8) {
        __m512i descriptor = load8(entry);
        __m512i iova = _mm512_loadu_si512(a->iova + i);
        __mmask8 bad = _mm512_test_epi64_mask(_mm512_xor_epi64(descriptor, wanted), mask);

        _mm512_storeu_si512(a->pa + i,
                            _mm512_or_epi64(_mm512_and_epi64(descriptor, address),
                                            _mm512_and_epi64(iova, offset)));
        if (__builtin_expect(bad != 0, 0))
            for (unsigned j = 0; j < 8; j++)
                successes -= !finish(a, i + j, *entry[j], bits, granule, leaf);
    }
    return successes;
}

VECTOR_INLINE int64_t vector(const struct table *t, const struct arrays a, bool write,
                             unsigned granule, unsigned input, unsigned leaf)
{
    const uint8_t *origin = t->origin;
    const uint64_t ttb = t->ttb, bits = leaf_mask(write);
    const uint64_t *entry[2][BLOCK] __attribute__((aligned(64)));
    const size_t whole = a.n / BLOCK * BLOCK;
    int64_t successes = 0;
    size_t start;

    for (start = 0; start < whole; start += BLOCK) {
        const uint64_t **now = entry[start / BLOCK % 2];

        upper_block(origin, ttb, a.iova + start, now, granule, input, leaf);
        if (start)
            successes += finish_block(&a, start - BLOCK, entry[(start / BLOCK - 1) % 2], bits,
                                      granule, leaf);
    }
    if (whole)
        successes += finish_block(&a, whole - BLOCK, entry[(whole / BLOCK - 1) % 2], bits,
                                  granule, leaf);
    for (; start < a.n; start++)
        successes += finish(&a, start, *upper(origin, ttb, a.iova[start], granule, input, leaf),
                            bits, granule, leaf);
    return successes;
}

#define VECTOR(what, number, granule, input, leaf) \
    static AVX512 int64_t vector_##number(const struct table *t, const struct arrays *a, \
                                          bool write) \
    { \
        return vector(t, *a, write, granule, input, leaf); \
    }
SHAPES(VECTOR, )
#undef VECTOR
#endif

int64_t limits_vector(const struct table *t, const struct arrays *a, bool write)
{
#ifdef VECTORS
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512dq")
        || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")
        || !__builtin_cpu_supports("bmi2"))
        return -1;
    switch (t->shape) {
#define CASE(what, number, granule, input, leaf) \
    case number: \
        return vector_##number(t, a, write);
    SHAPES(CASE, )
#undef CASE
    }
#else
    (void)t, (void)a, (void)write;
#endif
    return -1;
}

#define CASE(kernel, number, granule, input, leaf) \
    case number: \
        return kernel(t, *a, write, granule, input, leaf);
#define KERNEL(kernel) \
    int64_t limits_##kernel(const struct table *t, const struct arrays *a, bool write) \
    { \
        switch (t->shape) { \
        SHAPES(CASE, kernel) \
        } \
        return -1; \
    }
KERNEL(dependent)
KERNEL(plain)
KERNEL(bare)
KERNEL(pipeline)
KERNEL(staged)
KERNEL(flight)
KERNEL(cached)
