#include "limits_arrays.h"

#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define VECTORS 1
#define AVX512 __attribute__((target("avx512f,avx512dq,avx512vl")))

static bool have_avx512(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl");
}
#endif

enum { PAGE_LG2 = 12 };

/* ---- a table of pages ------------------------------------------------------------------- */

size_t direct_probe(const struct direct *d, const uint64_t *iova, size_t n, uint64_t *output)
{
    const uint64_t *tags = d->tag, *outputs = d->output, mask = d->mask;
    size_t hits = 0;

    for (size_t i = 0; i < n; i++) {
        uint64_t page = iova[i] >> PAGE_LG2, slot = page & mask;

        if (tags[slot] == page) {
            output[i] = outputs[slot] | (iova[i] & ((1ull << PAGE_LG2) - 1));
            hits++;
        } else {
            output[i] = 0;
        }
    }
    return hits;
}

#ifdef VECTORS
static AVX512 int64_t gather(const struct direct *d, const uint64_t *iova, size_t n,
                             uint64_t *output)
{
    const __m512i mask = _mm512_set1_epi64(d->mask);
    const __m512i offset = _mm512_set1_epi64((1ll << PAGE_LG2) - 1);
    const size_t whole = n / 8 * 8;
    int64_t hits = 0;

    for (size_t i = 0; i < whole; i += 8) {
        __m512i address = _mm512_loadu_si512(iova + i);
        __m512i page = _mm512_srli_epi64(address, PAGE_LG2);
        __m512i slot = _mm512_and_epi64(page, mask);
        __mmask8 hit = _mm512_cmpeq_epi64_mask(_mm512_i64gather_epi64(slot, d->tag, 8), page);
        __m512i found = _mm512_mask_i64gather_epi64(_mm512_setzero_si512(), hit, slot, d->output,
                                                    8);

        found = _mm512_mask_or_epi64(found, hit, found, _mm512_and_epi64(address, offset));
        _mm512_storeu_si512(output + i, found);
        hits += __builtin_popcount(hit);
    }
    return hits + direct_probe(d, iova + whole, n - whole, output + whole);
}

/* n is a multiple of eight. */
static AVX512 void stores(uint64_t *entry, size_t n, uint64_t descriptor, uint64_t step)
{
    const __m512i by = _mm512_set1_epi64(8 * step);
    __m512i value = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);

    value = _mm512_mullo_epi64(value, _mm512_set1_epi64(step));
    value = _mm512_add_epi64(value, _mm512_set1_epi64(descriptor));
    for (size_t i = 0; i < n; i += 8) {
        _mm512_storeu_si512(entry + i, value);
        value = _mm512_add_epi64(value, by);
    }
}
#endif

int64_t direct_gather(const struct direct *d, const uint64_t *iova, size_t n, uint64_t *output)
{
#ifdef VECTORS
    if (have_avx512())
        return gather(d, iova, n, output);
#else
    (void)d, (void)iova, (void)n, (void)output;
#endif
    return -1;
}

/* ---- leaf stores ------------------------------------------------------------------------ */

void fill_each(uint64_t *entry, size_t n, uint64_t descriptor, uint64_t step)
{
    for (size_t i = 0; i < n; i++)
        *(volatile uint64_t *)&entry[i] = descriptor + i * step;
}

bool fill_vector(uint64_t *entry, size_t n, uint64_t descriptor, uint64_t step)
{
#ifdef VECTORS
    if (have_avx512()) {
        stores(entry, n, descriptor, step);
        return true;
    }
#else
    (void)entry, (void)n, (void)descriptor, (void)step;
#endif
    return false;
}

/* ---- IDs -------------------------------------------------------------------------------- */

void bitmap_clear(struct bitmap *b)
{
    memset(b, 0xFF, sizeof(*b));
    b->root[0] = (1ull << (sizeof(b->groups) / sizeof(b->groups[0]))) - 1;
}

static inline void take(struct bitmap *b, uint32_t id)
{
    if ((b->ids[id >> 6] &= ~(1ull << (id & 63))))
        return;
    if ((b->words[id >> 12] &= ~(1ull << (id >> 6 & 63))))
        return;
    if ((b->groups[id >> 18] &= ~(1ull << (id >> 12 & 63))))
        return;
    b->root[0] &= ~(1ull << (id >> 18));
}

static inline uint32_t lowest(const uint64_t *level, uint32_t at)
{
    return at << 6 | __builtin_ctzll(level[at]);
}

int64_t bitmap_alloc_lowest(struct bitmap *b)
{
    uint32_t id;

    if (!b->root[0])
        return -1;
    id = lowest(b->ids, lowest(b->words, lowest(b->groups, __builtin_ctzll(b->root[0]))));
    take(b, id);
    return id;
}

/* Whether a level has a set bit at `at` or further on in its word, and which. */
static inline bool onward(const uint64_t *level, uint32_t at, uint32_t *found)
{
    uint64_t rest = level[at >> 6] & ~0ull << (at & 63);

    if (!rest)
        return false;
    *found = (at & ~63u) | __builtin_ctzll(rest);
    return true;
}

int64_t bitmap_alloc(struct bitmap *b, uint32_t min, uint32_t max)
{
    uint32_t id, at;

    if (!onward(b->ids, min, &id)) {
        at = (min >> 6) + 1;
        if (at >= 1u << (BITMAP_LG2 - 6))
            return -1;
        if (!onward(b->words, at, &at)) {
            at = (at >> 6) + 1;
            if (at >= 1u << (BITMAP_LG2 - 12))
                return -1;
            if (!onward(b->groups, at, &at)) {
                at = (at >> 6) + 1;
                if (at >= 1u << (BITMAP_LG2 - 18) || !onward(b->root, at, &at))
                    return -1;
                at = lowest(b->groups, at);
            }
            at = lowest(b->words, at);
        }
        id = lowest(b->ids, at);
    }
    if (id > max)
        return -1;
    take(b, id);
    return id;
}

void bitmap_free(struct bitmap *b, uint32_t id)
{
    uint64_t before = b->ids[id >> 6];

    b->ids[id >> 6] = before | 1ull << (id & 63);
    if (before)
        return;
    b->words[id >> 12] |= 1ull << (id >> 6 & 63);
    b->groups[id >> 18] |= 1ull << (id >> 12 & 63);
    b->root[0] |= 1ull << (id >> 18);
}

size_t bitmap_bulk(struct bitmap *b, uint32_t *out, size_t n)
{
    size_t done = 0;

    while (done < n && b->root[0]) {
        uint32_t first = lowest(b->words, lowest(b->groups, __builtin_ctzll(b->root[0])));
        uint32_t at = first;

        /* whole words, as many as there are below one word of the level above */
        while (n - done >= 64 && !~b->ids[at]) {
            for (uint32_t i = 0; i < 64; i++)
                out[done + i] = (at << 6) + i;
            done += 64;
            b->ids[at] = 0;
            if (!(++at & 63))
                break;
        }
        if (at == first) {
            uint32_t id = lowest(b->ids, at);

            out[done++] = id;
            take(b, id);
        } else {
            /* all of them leave the level above at once; take() sees to the last */
            b->words[first >> 6] &= ~(~0ull << (first & 63)) | ~(~0ull >> (63 - ((at - 1) & 63)));
            b->words[first >> 6] |= 1ull << ((at - 1) & 63);
            b->ids[at - 1] = 1ull << 63;
            take(b, (at - 1) << 6 | 63);
        }
    }
    return done;
}

size_t bitmap_alloc_each(struct bitmap *b, uint32_t *out, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        int64_t id = bitmap_alloc_lowest(b);

        if (id < 0)
            return i;
        out[i] = id;
    }
    return n;
}

void bitmap_free_each(struct bitmap *b, const uint32_t *ids, size_t n)
{
    for (size_t i = 0; i < n; i++)
        bitmap_free(b, ids[i]);
}

int64_t bitmap_pairs(struct bitmap *b, size_t n)
{
    int64_t id = -1;

    for (size_t i = 0; i < n; i++) {
        id = bitmap_alloc_lowest(b);
        if (id < 0)
            break;
        bitmap_free(b, id);
    }
    return id;
}

int64_t bitmap_pairs_in(struct bitmap *b, size_t n, uint32_t min, uint32_t max)
{
    int64_t id = -1;

    for (size_t i = 0; i < n; i++) {
        id = bitmap_alloc(b, min, max);
        if (id < 0)
            break;
        bitmap_free(b, id);
    }
    return id;
}

void limits_mark(void)
{
    __asm__ volatile("");
}
