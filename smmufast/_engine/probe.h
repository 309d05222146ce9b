/* Probes of a TLB of four ways: what entries are, and loops over requests that all hit.
 *
 * Not architectural.  A hit is a tag that is equal and rights that suffice; whatever is not as
 * simple is left to the scalar rules (cached.pxd).  There are two loops, one with AVX-512 where
 * the processor has it; both leave what the same hits one by one leave.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef SMMUFAST_PROBE_H
#define SMMUFAST_PROBE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "_engine/vector.h"
#include "smmufast.h"

/* smmufast_entry.flags */
enum {
    SMMUFAST_ENTRY_CLEAN1 = 1,    /* stage 1: writable because of DBM, and still clean */
    SMMUFAST_ENTRY_CLEAN2 = 2,    /* stage 2 likewise */
    SMMUFAST_ENTRY_CONTIGUOUS = 4 /* the leaf's Contiguous bit */
};

/* A translation, as whoever walked found it: a cache line.  What a hit asks for comes first: two
 * words of tag, the output address, the rights. */
typedef struct {
    uint64_t page;    /* input address >> lg2; all bits above: the sign is in it */
    uint64_t key;     /* the other tags; written by tlb_fill() */
    uint64_t address; /* output address of the first byte */
    uint8_t perm1, perm2; /* PERM_... bits that a stage admits */
    uint8_t flags;    /* SMMUFAST_ENTRY_... */
    uint8_t lg2;      /* log2 of the bytes that it covers */
    uint16_t asid, vmid;
    uint64_t ipa;     /* of the first byte: KIND_COMBINED only */
    uint32_t sid, ssid; /* of the transaction that filled it: no tags */
    uint8_t kind;     /* KIND_... */
    uint8_t world;    /* WORLD_... of _facts/layout.pxd */
    uint8_t is_global; /* the stage-1 leaf has nG=0: any ASID matches */
    int8_t level;     /* of the smaller of both pages */
    uint8_t attr, sh;
    uint8_t lg2_s1, lg2_s2; /* log2 of each stage's page or block; 0: stage absent */
    int8_t level_s1, level_s2;
    uint8_t granule_s1, granule_s2; /* log2; 0: stage absent */
    uint8_t aset;     /* CD.ASET: 0 or 1 */
    uint8_t extra[3]; /* for whoever fills it; not read here */
} smmufast_entry;

/* What the requests of one pair have in common, in one half of its addresses, and the TLB as a
 * loop over hits has it at hand. */
typedef struct {
    uint64_t clock;    /* the TLB's own, while the loop goes on */
    uint64_t fixed;    /* address bits that say whether an address is in range */
    uint64_t bits;     /* what they are then */
    uint64_t within;   /* address bits that are translated */
    uint64_t sign;     /* the others, in the TLB */
    uint64_t set_mask;
    uint64_t sized;    /* second word of the tag */
    const uint32_t *prints;
    const smmufast_entry *entries;
    uint64_t *order;       /* of LRU by slot, of PLRU by set; NULL: hits leave nothing */
    const uint64_t *path;  /* of PLRU by way; NULL: another policy */
    const uint8_t *need;   /* by access: the permission */
    uint32_t sid, ssid;
    uint8_t lg2;           /* of all pages */
    uint8_t access;        /* bits of an access that count */
} smmufast_hits;

/* The print of a tag, never 0: bits [55:24] of this, bit 24 set. */
#define SMMUFAST_PRINT_FIRST 0x3C6EF373
#define SMMUFAST_PRINT_SECOND 0x5A308D33
static inline uint32_t smmufast_print_of(uint64_t first, uint64_t second)
{
    return (uint32_t)((first * SMMUFAST_PRINT_FIRST + second * SMMUFAST_PRINT_SECOND) >> 24) | 1;
}

/* Bit w: print w of four is this one. */
#ifdef __SSE2__
#include <emmintrin.h>
static inline unsigned smmufast_match4(const uint32_t *prints, uint32_t print)
{
    __m128i four = _mm_loadu_si128((const __m128i *)prints);
    return (unsigned)_mm_movemask_ps(_mm_castsi128_ps(
        _mm_cmpeq_epi32(four, _mm_set1_epi32((int)print))));
}
#else
static inline unsigned smmufast_match4(const uint32_t *prints, uint32_t print)
{
    return (unsigned)(prints[0] == print) | (unsigned)(prints[1] == print) << 1
        | (unsigned)(prints[2] == print) << 2 | (unsigned)(prints[3] == print) << 3;
}
#endif

/* What a hit tells the replacement of four ways: Hits.order, Hits.path, and the clock. */
static inline __attribute__((always_inline)) void smmufast_touch(
    uint64_t *order, const uint64_t *path, uint64_t slot, uint64_t now)
{
    if (path)
        order[slot >> 2] =
            (order[slot >> 2] & ~path[2 * (slot & 3)]) | path[2 * (slot & 3) + 1];
    else if (order)
        order[slot] = now;
}

static inline uint32_t smmufast_word_at(const smmufast_column *c, size_t i)
{
    uint32_t value;
    memcpy(&value, (const char *)c->data + (ptrdiff_t)i * c->stride, 4);
    return value;
}

static inline uint8_t smmufast_byte_at(const smmufast_column *c, size_t i)
{
    return ((const uint8_t *)c->data)[(ptrdiff_t)i * c->stride];
}

/* Every row has its own value, in arrays without gaps; or the column is not wanted. */
static inline int smmufast_dense(const smmufast_batch *b)
{
    return b->iova.stride == 8 && (b->pa.stride == 8 || !b->pa.data)
        && (b->action.stride == 1 || !b->action.data)
        && (b->event.stride == 1 || !b->event.data);
}

/* All rows are of one pair and of one access. */
static inline int smmufast_alike(const smmufast_batch *b)
{
    return b->sid.stride == 0 && b->ssid.stride == 0 && b->access.stride == 0;
}

/* Actions and events of rows [from, to), which hit. */
static inline void smmufast_say_hits(const smmufast_batch *b, size_t from, size_t to, int dense)
{
    char *action = (char *)b->action.data, *event = (char *)b->event.data;
    if (dense) {
        if (action && to != from)
            memset(action + from, SMMUFAST_OK, to - from);
        if (event && to != from)
            memset(event + from, 0, to - from);
        return;
    }
    for (; from < to; from++) {
        if (action)
            action[(ptrdiff_t)from * b->action.stride] = SMMUFAST_OK;
        if (event)
            event[(ptrdiff_t)from * b->event.stride] = 0;
    }
}

/* Flags that an access must not meet: a write walks again to mark a clean page dirty. */
static inline unsigned smmufast_unwanted(unsigned access)
{
    return access & SMMUFAST_WRITE ? SMMUFAST_ENTRY_CLEAN1 | SMMUFAST_ENTRY_CLEAN2 : 0;
}

/* The loop over rows [i, n): how far they hit.  The first row that is anything else is returned,
 * nothing of it done. */
static inline __attribute__((always_inline)) size_t smmufast_each_hit_of(
    smmufast_hits *h, const smmufast_batch *b, size_t i, size_t n, const int alike,
    const int dense)
{
    /* copies, so that the compiler sees that no store changes them */
    const smmufast_column sids = b->sid, ssids = b->ssid, accesses = b->access;
    const char *iova = (const char *)b->iova.data;
    const ptrdiff_t iova_step = dense ? 8 : b->iova.stride;
    char *pa = (char *)b->pa.data;
    const ptrdiff_t pa_step = dense ? 8 : b->pa.stride;
    const uint64_t fixed = h->fixed, bits = h->bits, within = h->within, sign = h->sign;
    const uint64_t set_mask = h->set_mask, sized = h->sized;
    const uint32_t sid = h->sid, ssid = h->ssid;
    const uint8_t *needs = h->need;
    const unsigned lg2 = h->lg2, counted = h->access;
    const uint64_t low = ((uint64_t)1 << lg2) - 1;
    const uint32_t *prints = h->prints;
    const smmufast_entry *entries = h->entries;
    uint64_t *order = h->order;
    const uint64_t *path = h->path;
    uint64_t clock = h->clock;
    const size_t from = i;
    unsigned access, need, unwanted;
    if (i >= n)
        return i;
    access = smmufast_byte_at(&accesses, i) & counted;
    need = needs[access];
    unwanted = smmufast_unwanted(access);
    for (; i < n; i++) {
        uint64_t va, page, slot;
        unsigned found;
        const smmufast_entry *e;
        if (!alike) {
            if (smmufast_word_at(&sids, i) != sid || smmufast_word_at(&ssids, i) != ssid)
                break;
            access = smmufast_byte_at(&accesses, i) & counted;
            need = needs[access];
            unwanted = smmufast_unwanted(access);
        }
        memcpy(&va, iova + (ptrdiff_t)i * iova_step, 8);
        if (__builtin_expect((va & fixed) != bits, 0))
            break;
        page = ((va & within) | sign) >> lg2;
        slot = (page & set_mask) * 4;
        found = smmufast_match4(&prints[slot], smmufast_print_of(page, sized));
        if (__builtin_expect(found == 0, 0))
            break;
        slot += (unsigned)__builtin_ctz(found);
        e = &entries[slot];
        if (__builtin_expect(((e->page ^ page) | (e->key ^ sized) | (e->flags & unwanted)) != 0, 0)
            || __builtin_expect(!(e->perm1 & e->perm2 & need), 0))
            break;
        clock++;
        smmufast_touch(order, path, slot, clock);
        va = e->address | (va & low);
        if (pa)
            memcpy(pa + (ptrdiff_t)i * pa_step, &va, 8);
    }
    h->clock = clock;
    smmufast_say_hits(b, from, i, dense);
    return i;
}

__attribute__((noinline))
static size_t smmufast_each_hit(smmufast_hits *h, const smmufast_batch *b, size_t i, size_t n)
{
    if (smmufast_alike(b))
        return smmufast_dense(b) ? smmufast_each_hit_of(h, b, i, n, 1, 1)
                                 : smmufast_each_hit_of(h, b, i, n, 1, 0);
    return smmufast_each_hit_of(h, b, i, n, 0, 0);
}

#if defined(__x86_64__) && defined(__GNUC__)

/* Elements of vectors are to be taken from memory, which costs less than from the vector. */
#define SMMUFAST_STORED(array) __asm__("" : "+m"(array))

/* Eight values of 32 bits are this one. */
SMMUFAST_INLINE
static inline int smmufast_same8(const smmufast_column *c, size_t i, uint32_t value)
{
    if (c->stride == 0)
        return smmufast_word_at(c, i) == value;
    return _mm256_cmpeq_epi32_mask(
               _mm256_loadu_si256((const void *)((const char *)c->data + 4 * i)),
               _mm256_set1_epi32((int)value)) == 0xFF;
}

SMMUFAST_INLINE
static inline __m512i smmufast_access8(const smmufast_column *c, size_t i)
{
    if (c->stride == 0)
        return _mm512_set1_epi64(smmufast_byte_at(c, i));
    return _mm512_cvtepu8_epi64(_mm_loadl_epi64((const void *)((const char *)c->data + i)));
}

/* Prints of the set of row j that are those of its tag, all ones each. */
#define SMMUFAST_AGREE(j) \
    _mm_cmpeq_epi32(_mm_loadu_si128((const void *)((const char *)prints + at[j])), \
                    _mm_set1_epi32(((const int32_t *)print)[2 * (j)]))
/* Four prints of two rows each, as bytes. */
#define SMMUFAST_AGREE4(j) \
    _mm_packs_epi16(_mm_packs_epi32(SMMUFAST_AGREE(j), SMMUFAST_AGREE(j + 1)), \
                    _mm_packs_epi32(SMMUFAST_AGREE(j + 2), SMMUFAST_AGREE(j + 3)))

/* Groups of eight side by side: one alone would wait for its loads, each for the one before. */
enum { SMMUFAST_SIDE = 4 };

/* Rows from i on, 8 * groups of them, which all hit; or no, and nothing is done. */
SMMUFAST_INLINE
static inline int smmufast_hit_groups(
    smmufast_hits *h, const smmufast_batch *b, size_t i, const unsigned groups, const int alike,
    const int lru, const __m512i need_all, const __m512i unwanted_all)
{
    enum { MOST = 8 * SMMUFAST_SIDE };
    uint64_t at[MOST] __attribute__((aligned(64))), print[MOST] __attribute__((aligned(64)));
    uint64_t within_page[MOST] __attribute__((aligned(64)));
    uint64_t tag[2 * MOST] __attribute__((aligned(64))), ask[2 * MOST] __attribute__((aligned(64)));
    const char *iova = (const char *)b->iova.data;
    char *pa = (char *)b->pa.data;
    const __m512i sized = _mm512_set1_epi64((long long)h->sized);
    const uint32_t *prints = h->prints;
    const char *entries = (const char *)h->entries;
    uint64_t *order = h->order;
    const uint64_t clock = h->clock;
    __m512i set[SMMUFAST_SIDE];
    __mmask8 out = 0;
    __m128i wrong[2], lack[2], to[MOST / 2];
    unsigned g, j, none = 0;
#pragma GCC unroll 4
    for (g = 0; g < groups; g++) {
        const __m512i va = _mm512_loadu_si512(iova + 8 * (i + 8 * g));
        const __m512i page = _mm512_srl_epi64(
            _mm512_or_si512(_mm512_and_si512(va, _mm512_set1_epi64((long long)h->within)),
                            _mm512_set1_epi64((long long)h->sign)),
            _mm_cvtsi32_si128(h->lg2));
        if (!alike) {
            const __m512i access = _mm512_and_si512(
                smmufast_access8(&b->access, i + 8 * g), _mm512_set1_epi64(h->access));
            out |= !smmufast_same8(&b->sid, i + 8 * g, h->sid);
            out |= !smmufast_same8(&b->ssid, i + 8 * g, h->ssid);
            _mm512_store_si512(ask + 16 * g, _mm512_permutexvar_epi64(access, need_all));
            _mm512_store_si512(
                ask + 16 * g + 8,
                _mm512_maskz_mov_epi64(
                    _mm512_test_epi64_mask(access, _mm512_set1_epi64(SMMUFAST_WRITE)),
                    unwanted_all));
        }
        out |= _mm512_cmpneq_epi64_mask(
            _mm512_and_si512(va, _mm512_set1_epi64((long long)h->fixed)),
            _mm512_set1_epi64((long long)h->bits));
        /* the offset of a set's prints, 16 bytes */
        set[g] = _mm512_slli_epi64(
            _mm512_and_si512(page, _mm512_set1_epi64((long long)h->set_mask)), 4);
        _mm512_store_si512(at + 8 * g, set[g]);
        _mm512_store_si512(
            print + 8 * g,
            _mm512_or_si512(
                _mm512_srli_epi64(
                    _mm512_add_epi64(
                        _mm512_mullo_epi64(page, _mm512_set1_epi64(SMMUFAST_PRINT_FIRST)),
                        _mm512_set1_epi64((long long)(h->sized * SMMUFAST_PRINT_SECOND))),
                    24),
                _mm512_set1_epi64(1)));
        _mm512_store_si512(
            within_page + 8 * g,
            _mm512_and_si512(
                va, _mm512_set1_epi64((long long)(((uint64_t)1 << h->lg2) - 1))));
        /* rows 0, 2, 4, 6, then the others */
        _mm512_store_si512(tag + 16 * g, _mm512_unpacklo_epi64(page, sized));
        _mm512_store_si512(tag + 16 * g + 8, _mm512_unpackhi_epi64(page, sized));
    }
    if (__builtin_expect(out != 0, 0))
        return 0;
    SMMUFAST_STORED(at);
    SMMUFAST_STORED(print);
    SMMUFAST_STORED(tag);
    SMMUFAST_STORED(within_page);
#pragma GCC unroll 4
    for (g = 0; g < groups; g++) {
        /* four bits a row: the prints that agree */
        const unsigned found = (unsigned)_mm256_movemask_epi8(
            _mm256_set_m128i(SMMUFAST_AGREE4(8 * g + 4), SMMUFAST_AGREE4(8 * g)));
        const unsigned some = found | found >> 1;
        /* the lowest of them, as in the other loop */
        const unsigned way = (~found & (found >> 1 | ~(found >> 2)) & 0x11111111)
            | (~some & 0x11111111) << 1;
        none |= ~(some | some >> 2) & 0x11111111;
        /* the offset of a slot's order, 8 bytes */
        set[g] = _mm512_or_si512(
            _mm512_add_epi64(set[g], set[g]),
            _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(
                (long long)_pdep_u64(way, 0x7878787878787878ULL))));
    }
    if (__builtin_expect(none != 0, 0))
        return 0;
#pragma GCC unroll 4
    for (g = 0; g < groups; g++)
        _mm512_store_si512(at + 8 * g, set[g]);
    SMMUFAST_STORED(at);
    wrong[0] = wrong[1] = lack[0] = lack[1] = _mm_setzero_si128();
#pragma GCC unroll 16
    for (j = 0; j < 8 * groups; j += 2) {
        const char *e = entries + 8 * at[j], *f = entries + 8 * at[j + 1];
        const __m128i even = _mm_loadu_si128((const void *)(e + 16));
        const __m128i odd = _mm_loadu_si128((const void *)(f + 16));
        const __m128i rights = _mm_unpackhi_epi64(even, odd);
        const uint64_t *tags = &tag[16 * (j / 8) + j % 8], *asks = &ask[16 * (j / 8) + j % 8];
        /* wrong | (tag ^ entry) */
        wrong[0] = _mm_ternarylogic_epi64(
            wrong[0], _mm_loadu_si128((const void *)e), _mm_load_si128((const void *)tags), 0xF6);
        wrong[1] = _mm_ternarylogic_epi64(
            wrong[1], _mm_loadu_si128((const void *)f), _mm_load_si128((const void *)(tags + 8)),
            0xF6);
        /* lack | need & ~(perm1 & perm2), lack | rights & unwanted */
        lack[0] = _mm_or_si128(
            lack[0],
            _mm_ternarylogic_epi64(
                alike ? _mm512_castsi512_si128(need_all) : _mm_load_si128((const void *)asks),
                rights, _mm_srli_epi64(rights, 8), 0x70));
        lack[1] = _mm_ternarylogic_epi64(
            lack[1], rights,
            alike ? _mm512_castsi512_si128(unwanted_all)
                  : _mm_load_si128((const void *)(asks + 8)),
            0xF8);
        to[j / 2] = _mm_or_si128(_mm_unpacklo_epi64(even, odd),
                                 _mm_load_si128((const void *)&within_page[j]));
    }
    wrong[0] = _mm_or_si128(_mm_or_si128(wrong[0], wrong[1]), _mm_or_si128(lack[0], lack[1]));
    if (__builtin_expect(!_mm_testz_si128(wrong[0], wrong[0]), 0))
        return 0;
#pragma GCC unroll 32
    for (j = 0; j < 8 * groups; j++) {
        if (lru)
            *(uint64_t *)((char *)order + at[j]) = clock + 1 + j;
        else
            smmufast_touch(order, h->path, at[j] >> 3, clock + 1 + j);
    }
    h->clock = clock + 8 * groups;
    if (pa) {
#pragma GCC unroll 16
        for (j = 0; j < 4 * groups; j++)
            _mm_storeu_si128((void *)(pa + 8 * i + 16 * j), to[j]);
    }
    return 1;
}

SMMUFAST_INLINE
static inline size_t smmufast_vector_hits_of(
    smmufast_hits *hits, const smmufast_batch *batch, size_t i, size_t n, const int alike,
    const int lru)
{
    /* copies, so that the compiler sees that no store changes them */
    smmufast_hits h = *hits;
    const smmufast_batch b = *batch;
    const size_t from = i;
    size_t singly = i;
    /* rights as they lie in an entry: perm1, perm2, flags */
    __m512i need = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const void *)h.need));
    __m512i unwanted = _mm512_set1_epi64((long long)smmufast_unwanted(SMMUFAST_WRITE) << 16);
    if (alike) {
        const unsigned access = smmufast_byte_at(&b.access, i) & h.access;
        need = _mm512_set1_epi64(h.need[access]);
        unwanted = _mm512_set1_epi64((long long)smmufast_unwanted(access) << 16);
    }
    while (n - i >= 8) {
        if (i >= singly && n - i >= SMMUFAST_SIDE * 8) {
            if (smmufast_hit_groups(&h, &b, i, SMMUFAST_SIDE, alike, lru, need, unwanted)) {
                i += SMMUFAST_SIDE * 8;
                continue;
            }
            singly = i + SMMUFAST_SIDE * 8;
        }
        if (!smmufast_hit_groups(&h, &b, i, 1, alike, lru, need, unwanted))
            break;
        i += 8;
    }
    hits->clock = h.clock;
    smmufast_say_hits(&b, from, i, 1);
    return i;
}

/* The columns are such as the vector loop takes. */
static inline int smmufast_vector_fits(const smmufast_batch *b)
{
    return smmufast_dense(b) && !(b->sid.stride & ~4) && !(b->ssid.stride & ~4)
        && !(b->access.stride & ~1);
}

/* The same eight rows at a time, of columns that fit; it stops where one of eight is anything
 * else, or where fewer are left. */
SMMUFAST_AVX512
static size_t smmufast_vector_hits(smmufast_hits *h, const smmufast_batch *b, size_t i, size_t n)
{
    const int lru = h->order && !h->path;
    if (n - i < 8)
        return i;
    if (!smmufast_alike(b))
        return lru ? smmufast_vector_hits_of(h, b, i, n, 0, 1)
                   : smmufast_vector_hits_of(h, b, i, n, 0, 0);
    return lru ? smmufast_vector_hits_of(h, b, i, n, 1, 1)
               : smmufast_vector_hits_of(h, b, i, n, 1, 0);
}

#else

static inline int smmufast_vector_fits(const smmufast_batch *b) { (void)b; return 0; }

static size_t smmufast_vector_hits(smmufast_hits *h, const smmufast_batch *b, size_t i, size_t n)
{
    (void)h, (void)b, (void)n;
    return i;
}

#endif
#endif
