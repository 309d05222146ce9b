/* Probes of a TLB of four ways: what entries are, and loops over requests that all hit.
 *
 * Not architectural.  A hit is a tag that is equal and rights that suffice; whatever is not as
 * simple is left to the scalar rules (_cached.pxd).  There are two loops, one with AVX-512 where
 * the processor has it; both leave what the same hits one by one leave.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef SMMUFAST_PROBE_H
#define SMMUFAST_PROBE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "_vector.h"
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
    uint8_t world;    /* WORLD_... of _layout.pxd */
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

/* What a hit tells the replacement of four ways. */
#define SMMUFAST_TOUCH(h, slot, now) \
    do { \
        if ((h)->path) \
            (h)->order[(slot) >> 2] = ((h)->order[(slot) >> 2] & ~(h)->path[2 * ((slot) & 3)]) \
                | (h)->path[2 * ((slot) & 3) + 1]; \
        else if ((h)->order) \
            (h)->order[slot] = (now); \
    } while (0)

static inline uint32_t smmufast_word_at(const smmufast_column *c, size_t i)
{
    uint32_t value;
    memcpy(&value, (const char *)c->data + (ptrdiff_t)i * c->stride, 4);
    return value;
}

static inline uint64_t smmufast_dword_at(const smmufast_column *c, size_t i)
{
    uint64_t value;
    memcpy(&value, (const char *)c->data + (ptrdiff_t)i * c->stride, 8);
    return value;
}

static inline uint8_t smmufast_byte_at(const smmufast_column *c, size_t i)
{
    return ((const uint8_t *)c->data)[(ptrdiff_t)i * c->stride];
}

/* The outputs of a row that hits. */
static inline void smmufast_hit_row(
    const smmufast_column *pa, const smmufast_column *action, const smmufast_column *event,
    size_t i, uint64_t address)
{
    if (pa->data)
        memcpy((char *)pa->data + (ptrdiff_t)i * pa->stride, &address, 8);
    if (action->data)
        ((uint8_t *)action->data)[(ptrdiff_t)i * action->stride] = SMMUFAST_OK;
    if (event->data)
        ((uint8_t *)event->data)[(ptrdiff_t)i * event->stride] = 0;
}

/* Every row has its own value, in an array without gaps. */
static inline int smmufast_dense(const smmufast_batch *b)
{
    return b->iova.stride == 8 && b->pa.stride == 8 && b->action.stride == 1
        && b->event.stride == 1 && b->pa.data && b->action.data && b->event.data;
}

/* All rows are of one pair and of one access. */
static inline int smmufast_alike(const smmufast_batch *b)
{
    return b->sid.stride == 0 && b->ssid.stride == 0 && b->access.stride == 0;
}

/* The loop over rows [i, n): how far they hit.  The first row that is anything else is returned,
 * nothing of it done. */
static inline __attribute__((always_inline)) size_t smmufast_each_hit_of(
    smmufast_hits *h, const smmufast_batch *b, size_t i, size_t n, const int alike,
    const int dense, const int lru)
{
    /* copies, so that the compiler sees that no store changes them */
    const smmufast_column sids = b->sid, ssids = b->ssid, iovas = b->iova, accesses = b->access;
    const smmufast_column pas = b->pa, actions = b->action, events = b->event;
    const uint64_t fixed = h->fixed, bits = h->bits, within = h->within, sign = h->sign;
    const uint64_t set_mask = h->set_mask, sized = h->sized;
    const uint32_t sid = h->sid, ssid = h->ssid;
    const uint8_t *needs = h->need;
    const unsigned lg2 = h->lg2, counted = h->access;
    const uint64_t low = ((uint64_t)1 << lg2) - 1;
    const uint32_t *prints = h->prints;
    const smmufast_entry *entries = h->entries;
    uint64_t *order = h->order;
    uint64_t clock = h->clock;
    unsigned access = n > i ? smmufast_byte_at(&accesses, i) & counted : 0;
    unsigned need = needs[access];
    for (; i < n; i++) {
        uint64_t va, page, slot;
        unsigned found;
        const smmufast_entry *e;
        if (!alike) {
            if (smmufast_word_at(&sids, i) != sid || smmufast_word_at(&ssids, i) != ssid)
                break;
            access = smmufast_byte_at(&accesses, i) & counted;
            need = needs[access];
        }
        va = dense ? ((const uint64_t *)iovas.data)[i] : smmufast_dword_at(&iovas, i);
        if (__builtin_expect((va & fixed) != bits, 0))
            break;
        page = ((va & within) | sign) >> lg2;
        slot = (page & set_mask) * 4;
        found = smmufast_match4(&prints[slot], smmufast_print_of(page, sized));
        if (__builtin_expect(found == 0, 0))
            break;
        slot += (unsigned)__builtin_ctz(found);
        e = &entries[slot];
        if (__builtin_expect(((e->page ^ page) | (e->key ^ sized)) != 0, 0)
            || __builtin_expect(!(e->perm1 & e->perm2 & need), 0)
            || __builtin_expect((access & SMMUFAST_WRITE)
                                && (e->flags & (SMMUFAST_ENTRY_CLEAN1 | SMMUFAST_ENTRY_CLEAN2)), 0))
            break;
        clock++;
        if (lru)
            order[slot] = clock;
        else
            SMMUFAST_TOUCH(h, slot, clock);
        if (dense) {
            ((uint64_t *)pas.data)[i] = e->address | (va & low);
            ((uint8_t *)actions.data)[i] = SMMUFAST_OK;
            ((uint8_t *)events.data)[i] = 0;
        } else {
            smmufast_hit_row(&pas, &actions, &events, i, e->address | (va & low));
        }
    }
    h->clock = clock;
    return i;
}

__attribute__((noinline))
static size_t smmufast_each_hit(smmufast_hits *h, const smmufast_batch *b, size_t i, size_t n)
{
    int lru = h->order && !h->path;
    if (lru && smmufast_dense(b) && smmufast_alike(b))
        return smmufast_each_hit_of(h, b, i, n, 1, 1, 1);
    if (lru && smmufast_dense(b))
        return smmufast_each_hit_of(h, b, i, n, 0, 1, 1);
    return smmufast_each_hit_of(h, b, i, n, 0, 0, 0);
}

#if defined(__x86_64__) && defined(__GNUC__)

/* Four pieces of 16 bytes of the entries of rows 0, 2, 4, 6, or of the prints of four rows. */
SMMUFAST_INLINE
static inline __m512i smmufast_four(const void *a, const void *b, const void *c, const void *d)
{
    __m512i four = _mm512_castsi128_si512(_mm_loadu_si128(a));
    four = _mm512_inserti32x4(four, _mm_loadu_si128(b), 1);
    four = _mm512_inserti32x4(four, _mm_loadu_si128(c), 2);
    return _mm512_inserti32x4(four, _mm_loadu_si128(d), 3);
}

/* Two words, `from` on, of the entries of eight slots. */
#define SMMUFAST_EVEN(from) \
    smmufast_four(&entries[slots[0]].from, &entries[slots[2]].from, &entries[slots[4]].from, \
                  &entries[slots[6]].from)
#define SMMUFAST_ODD(from) \
    smmufast_four(&entries[slots[1]].from, &entries[slots[3]].from, &entries[slots[5]].from, \
                  &entries[slots[7]].from)

/* Bit j: row i + j has this value. */
SMMUFAST_INLINE
static inline unsigned smmufast_same8(const smmufast_column *c, size_t i, uint32_t value)
{
    unsigned j, same = 0;
    if (c->stride == 4)
        return _mm256_cmpeq_epi32_mask(
            _mm256_loadu_si256((const void *)((const char *)c->data + 4 * i)),
            _mm256_set1_epi32((int)value));
    if (c->stride == 0)
        return smmufast_word_at(c, i) == value ? 0xFF : 0;
    for (j = 0; j < 8; j++)
        same |= (unsigned)(smmufast_word_at(c, i + j) == value) << j;
    return same;
}

/* Eight rows of a column of bytes, or of dwords. */
SMMUFAST_INLINE
static inline __m512i smmufast_bytes8(const smmufast_column *c, size_t i)
{
    uint8_t eight[8];
    unsigned j;
    if (c->stride == 1) {
        memcpy(eight, (const char *)c->data + i, 8);
    } else {
        for (j = 0; j < 8; j++)
            eight[j] = smmufast_byte_at(c, i + j);
    }
    return _mm512_cvtepu8_epi64(_mm_loadl_epi64((const void *)eight));
}

SMMUFAST_INLINE
static inline __m512i smmufast_dwords8(const smmufast_column *c, size_t i)
{
    uint64_t eight[8];
    unsigned j;
    if (c->stride == 8)
        return _mm512_loadu_si512((const char *)c->data + 8 * i);
    for (j = 0; j < 8; j++)
        eight[j] = smmufast_dword_at(c, i + j);
    return _mm512_loadu_si512(eight);
}

SMMUFAST_INLINE
static inline size_t smmufast_vector_hits_of(
    smmufast_hits *h, const smmufast_batch *b, size_t i, size_t n, const int alike,
    const int dense, const int lru)
{
    const smmufast_column sids = b->sid, ssids = b->ssid, iovas = b->iova, accesses = b->access;
    const smmufast_column pas = b->pa, actions = b->action, events = b->event;
    const __m512i fixed = _mm512_set1_epi64((long long)h->fixed);
    const __m512i bits = _mm512_set1_epi64((long long)h->bits);
    const __m512i within = _mm512_set1_epi64((long long)h->within);
    const __m512i sign = _mm512_set1_epi64((long long)h->sign);
    const __m512i set_mask = _mm512_set1_epi64((long long)h->set_mask);
    const __m512i sized = _mm512_set1_epi64((long long)h->sized);
    const __m512i printed = _mm512_set1_epi64((long long)(h->sized * SMMUFAST_PRINT_SECOND));
    const __m512i low = _mm512_set1_epi64((long long)(((uint64_t)1 << h->lg2) - 1));
    const __m512i counted = _mm512_set1_epi64(h->access);
    const __m512i needs = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const void *)h->need));
    const __m128i lg2 = _mm_cvtsi32_si128(h->lg2);
    /* rights: perm1, perm2, flags from bit 0 on */
    const __m512i cleans =
        _mm512_set1_epi64((SMMUFAST_ENTRY_CLEAN1 | SMMUFAST_ENTRY_CLEAN2) << 16);
    const __m512i write = _mm512_set1_epi64(SMMUFAST_WRITE);
    const __m512i lower = _mm512_set_epi32(6, 6, 6, 6, 4, 4, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0);
    const __m512i upper =
        _mm512_set_epi32(14, 14, 14, 14, 12, 12, 12, 12, 10, 10, 10, 10, 8, 8, 8, 8);
    const uint32_t *prints = h->prints;
    const smmufast_entry *entries = h->entries;
    uint64_t *order = h->order;
    uint64_t clock = h->clock;
    __m512i access = _mm512_and_si512(
        _mm512_set1_epi64(smmufast_byte_at(&accesses, i)), counted);
    __m512i need = _mm512_permutexvar_epi64(access, needs);
    __m512i clean = _mm512_maskz_mov_epi64(_mm512_test_epi64_mask(access, write), cleans);
    while (n - i >= 8) {
        uint64_t slots[8] __attribute__((aligned(64))), pa[8];
        __m512i va, page, slot, print, even, odd, address, rights;
        unsigned hit = 0xFF, found, some, way, j, count;
        if (!alike) {
            hit = smmufast_same8(&sids, i, h->sid) & smmufast_same8(&ssids, i, h->ssid);
            if (!(hit & 1))
                break;
            access = _mm512_and_si512(smmufast_bytes8(&accesses, i), counted);
            need = _mm512_permutexvar_epi64(access, needs);
            clean = _mm512_maskz_mov_epi64(_mm512_test_epi64_mask(access, write), cleans);
        }
        va = smmufast_dwords8(&iovas, i);
        hit &= _mm512_cmpeq_epi64_mask(_mm512_and_si512(va, fixed), bits);
        page = _mm512_srl_epi64(_mm512_or_si512(_mm512_and_si512(va, within), sign), lg2);
        slot = _mm512_slli_epi64(_mm512_and_si512(page, set_mask), 2);
        print = _mm512_or_si512(
            _mm512_srli_epi64(
                _mm512_add_epi64(
                    _mm512_mullo_epi64(page, _mm512_set1_epi64(SMMUFAST_PRINT_FIRST)), printed),
                24),
            _mm512_set1_epi64(1));
        _mm512_store_si512(slots, slot);
        found = _mm512_cmpeq_epi32_mask(
            smmufast_four(&prints[slots[0]], &prints[slots[1]], &prints[slots[2]],
                          &prints[slots[3]]),
            _mm512_permutexvar_epi32(lower, print));
        found |= (unsigned)_mm512_cmpeq_epi32_mask(
                     smmufast_four(&prints[slots[4]], &prints[slots[5]], &prints[slots[6]],
                                   &prints[slots[7]]),
                     _mm512_permutexvar_epi32(upper, print))
            << 16;
        /* four bits a row: the lowest way whose print agrees, as in the other loop */
        some = found | found >> 1;
        way = (~found & (found >> 1 | ~(found >> 2)) & 0x11111111) | (~some & 0x11111111) << 1;
        hit &= (unsigned)_pext_u32(some | some >> 2, 0x11111111);
        slot = _mm512_or_si512(
            slot, _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(
                      (long long)_pdep_u64(way, 0x0F0F0F0F0F0F0F0FULL))));
        _mm512_store_si512(slots, slot);
        even = SMMUFAST_EVEN(page);
        odd = SMMUFAST_ODD(page);
        hit &= _mm512_cmpeq_epi64_mask(_mm512_unpacklo_epi64(even, odd), page)
            & _mm512_cmpeq_epi64_mask(_mm512_unpackhi_epi64(even, odd), sized);
        even = SMMUFAST_EVEN(address);
        odd = SMMUFAST_ODD(address);
        address = _mm512_unpacklo_epi64(even, odd);
        rights = _mm512_unpackhi_epi64(even, odd);
        hit &= _mm512_mask_testn_epi64_mask(
            _mm512_test_epi64_mask(
                _mm512_and_si512(rights, _mm512_srli_epi64(rights, 8)), need),
            rights, clean);
        address = _mm512_or_si512(address, _mm512_and_si512(va, low));
        if (__builtin_expect(hit == 0xFF, 1)) {
#pragma GCC unroll 8
            for (j = 0; j < 8; j++) {
                if (lru)
                    order[slots[j]] = clock + 1 + j;
                else
                    SMMUFAST_TOUCH(h, slots[j], clock + 1 + j);
            }
            clock += 8;
            if (dense) {
                _mm512_storeu_si512((char *)pas.data + 8 * i, address);
                memset((char *)actions.data + i, SMMUFAST_OK, 8);
                memset((char *)events.data + i, 0, 8);
                i += 8;
                continue;
            }
            count = 8;
        } else {
            count = (unsigned)__builtin_ctz(~hit);
            for (j = 0; j < count; j++)
                SMMUFAST_TOUCH(h, slots[j], clock + 1 + j);
            clock += count;
        }
        _mm512_storeu_si512(pa, address);
        for (j = 0; j < count; j++)
            smmufast_hit_row(&pas, &actions, &events, i + j, pa[j]);
        i += count;
        if (count < 8)
            break;
    }
    h->clock = clock;
    return i;
}

/* The same eight rows at a time.  The last ones may be too few. */
SMMUFAST_AVX512
static size_t smmufast_vector_hits(smmufast_hits *h, const smmufast_batch *b, size_t i, size_t n)
{
    int lru = h->order && !h->path;
    if (n - i < 8)
        return i;
    if (lru && smmufast_dense(b) && smmufast_alike(b))
        return smmufast_vector_hits_of(h, b, i, n, 1, 1, 1);
    if (lru && smmufast_dense(b))
        return smmufast_vector_hits_of(h, b, i, n, 0, 1, 1);
    return smmufast_vector_hits_of(h, b, i, n, 0, 0, 0);
}

#else

static size_t smmufast_vector_hits(smmufast_hits *h, const smmufast_batch *b, size_t i, size_t n)
{
    (void)h, (void)b, (void)n;
    return i;
}

#endif
#endif
