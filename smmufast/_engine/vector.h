/* Both passes over a block of a batch: one row at a time, or eight with AVX-512 where the processor
 * has it.
 *
 * The rules that most requests meet and nothing else: tables whose descriptors
 * are little-endian with the address in place, then one page or block without a fault.  Every
 * number comes from the scalar rules (_rules/vmsa.pxd, batch.pxd) as a mask or a bit table; what does
 * not pass is left to them.  Rows are those of one block, side by side in arrays.
 *
 * Not architectural.  SPDX-License-Identifier: Apache-2.0
 */
#ifndef SMMUFAST_VECTOR_H
#define SMMUFAST_VECTOR_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "_facts/descriptor.h"

/* A pair's home among 2^13 slots: the upper bits of a product. */
#define SMMUFAST_GOLDEN 0x9E3779B97F4A7C15ULL
enum { SMMUFAST_HOME = 64 - 13 };

enum { SMMUFAST_ROWS = 128, SMMUFAST_PADDED = SMMUFAST_ROWS + 8 };

/* What one half of a context asks of its addresses and descriptors; Half says what each is. */
typedef struct {
    uint64_t sign; /* all ones in the upper half */
    uint64_t range_mask;
    uint64_t index_mask;
    uint64_t entry_mask;
    uint64_t table_bits;
    uint64_t low_address;
    uint64_t keep;
    uint64_t leaf_bits;
    uint64_t block_shifts; /* bit s: a block of 2^s bytes is legal */
    uint64_t allowed[8];   /* by access: bit {UXN, PXN, AP[2:1]}: a leaf permits it */
    uint8_t shift;
    uint8_t granule;
    uint8_t stride;
    uint8_t walks; /* the half has tables */
} smmufast_lanes;

/* Rows between their two passes; vectors read and write up to seven rows more. */
typedef struct {
    uint64_t va[SMMUFAST_PADDED] __attribute__((aligned(64)));
    uint64_t first[SMMUFAST_PADDED];       /* the table where the walk begins */
    const uint8_t *entry[SMMUFAST_PADDED]; /* where the leaf lies; NULL: the scalar path's */
    uint64_t held[SMMUFAST_PADDED];        /* leaves already read, as they lie in memory */
    uint64_t tables[SMMUFAST_PADDED];      /* hierarchical attributes that count */
    uint32_t sid[SMMUFAST_PADDED];         /* unless all rows are of one pair */
    uint32_t ssid[SMMUFAST_PADDED];
    uint8_t shift[SMMUFAST_PADDED];        /* lg2 of the page */
    uint8_t shape[SMMUFAST_PADDED];        /* which context, and which half of it */
    uint8_t access[SMMUFAST_PADDED];
    uint64_t start;                        /* row of the batch */
    uint64_t count;
    uint64_t half; /* that all rows of one pair are in; 2: not known */
    uint64_t lg2;  /* of all pages of the block, none of which was read; 0: not known, 1: none yet */
    uint64_t removed; /* tables of all rows in one */
    uint64_t alike;   /* all rows have the access of the first */
} smmufast_rows;

/* Where memory can be read in place: Window. */
typedef struct {
    uint64_t base;
    uint64_t span;
    const uint8_t *data;
} smmufast_window;

/* What the walks of a block were like: groups of eight rows. */
typedef struct {
    uint32_t alike;   /* in one last table; one row at a time, rows in that of the row before */
    uint32_t mixed;   /* not pages alone */
    uint32_t careful; /* some of the last block were mixed, so that is reckoned with */
    uint32_t blocks;  /* blocks of one size alone: lg2 of it is `size` */
    uint32_t size;
    uint32_t lg2;     /* all of the last block were, of this size; 0: no */
} smmufast_last;

/* The table with the leaf of an address: its host address, the address bits above its reach, and
 * how large its leaves are. */
typedef struct {
    const uint8_t *table;
    uint64_t tag;
    uint64_t tables; /* hierarchical attributes that count */
    uint8_t reach;
    uint8_t lg2;
    uint8_t found;
} smmufast_near;

/* Outputs: first row and distance of rows; NULL: not wanted. */
typedef struct {
    char *pa, *action, *event;
    ptrdiff_t pa_stride, action_stride, event_stride;
    uint8_t ok;
} smmufast_out;

/* Walk to the table, all of it in the window, with the leaf of an address: no if there is none. */
static inline int smmufast_near_find(
    const smmufast_lanes *k, const smmufast_window *w, uint64_t table, uint64_t va,
    smmufast_near *near)
{
    uint64_t tables = 0, off, d, size = k->entry_mask + 8;
    unsigned s = k->shift;
    if ((va ^ k->sign) & k->range_mask)
        return 0;
    /* the first table may be smaller, and the bits above it are not of the index */
    if (s == k->granule)
        return 0;
    for (;; s -= k->stride) {
        off = table + ((va & k->index_mask) >> (s - 3) & k->entry_mask) - w->base;
        if (off > w->span)
            return 0;
        if (s != k->shift) {
            off = table - w->base;
            if (off > w->span || w->span - off < size - 8)
                return 0;
            near->table = w->data + off;
            near->lg2 = (uint8_t)s;
            near->reach = (uint8_t)(s + k->stride);
            near->tag = va >> near->reach;
            near->tables = tables & k->keep;
            if (s == k->granule)
                return 1;
            off += va >> (s - 3) & k->entry_mask;
        }
        d = __atomic_load_n((const uint64_t *)(w->data + off), __ATOMIC_RELAXED);
        if ((d & k->table_bits) != SMMUFAST_TABLE)
            return s != k->shift && (k->block_shifts >> s & 1)
                && (d & SMMUFAST_TABLE) == SMMUFAST_BLOCK;
        table = d & k->low_address;
        tables |= d;
    }
}

/* --- one row at a time --- */

static inline uint64_t smmufast_load(const void *at)
{
    return __atomic_load_n((const uint64_t *)at, __ATOMIC_RELAXED);
}

/* First pass over rows [from, to) of one half: walk down to the last table and ask for the entry
 * of each.  A row that is left has no entry; `beyond` has its bit when memory outside of the
 * window is the reason, so that its tables may still be ordinary. */
__attribute__((always_inline))
static inline void smmufast_plain_walks(
    const smmufast_lanes *k, const unsigned granule, const unsigned shift,
    const smmufast_window *w, smmufast_rows *b, size_t from, size_t to, smmufast_last *last,
    uint64_t *beyond)
{
    const uint64_t base = w->base, span = w->span, entry_mask = k->entry_mask;
    const uint64_t table_bits = k->table_bits, low_address = k->low_address;
    const uint64_t index_mask = k->index_mask, sign = k->sign, range_mask = k->range_mask;
    const uint64_t keep = k->keep;
    const uint8_t *data = w->data;
    const unsigned stride = granule - 3;
    uint64_t previous = 0;
    uint32_t alike = 0;
    size_t i;
    for (i = from; i < to; i++) {
        const uint64_t va = b->va[i], ia = va & index_mask;
        uint64_t table = b->first[i], tables = 0, off, d = 0;
        unsigned s = shift;
        off = table + (ia >> (s - 3) & entry_mask) - base;
        if (__builtin_expect(((va ^ sign) & range_mask) != 0, 0)) {
            b->entry[i] = NULL;
            continue;
        }
#pragma GCC unroll 5
        while (s != granule) {
            if (__builtin_expect(off > span, 0))
                goto away;
            d = smmufast_load(data + off);
            if (__builtin_expect((d & table_bits) != SMMUFAST_TABLE, 0))
                goto other;
            table = d & low_address;
            tables |= d;
            s -= stride;
            off = table + (ia >> (s - 3) & entry_mask) - base;
        }
        if (__builtin_expect(off > span, 0))
            goto away;
        b->entry[i] = data + off;
        __builtin_prefetch(data + off);
    found:
        b->shift[i] = (uint8_t)s;
        b->tables[i] = tables & keep;
        alike += table == previous;
        previous = table;
        continue;
    other:
        if ((k->block_shifts >> s & 1) && (d & SMMUFAST_TABLE) == SMMUFAST_BLOCK) {
            b->held[i] = d;
            b->entry[i] = (const uint8_t *)&b->held[i];
            goto found;
        }
        b->entry[i] = NULL;
        continue;
    away:
        b->entry[i] = NULL;
        beyond[i / 64] |= (uint64_t)1 << (i % 64);
    }
    last->alike += alike;
}

__attribute__((noinline))
static void smmufast_plain_down(
    const smmufast_lanes *k, const smmufast_window *w, smmufast_rows *b, size_t from, size_t to,
    smmufast_last *last, uint64_t *beyond)
{
    switch (k->granule << 8 | k->shift) { /* the commonest, with constants */
#define SMMUFAST_WALKS(granule, shift) \
    case (granule) << 8 | (shift): \
        smmufast_plain_walks(k, granule, shift, w, b, from, to, last, beyond); \
        return;
        SMMUFAST_WALKS(12, 39)
        SMMUFAST_WALKS(12, 30)
        SMMUFAST_WALKS(14, 36)
        SMMUFAST_WALKS(16, 42)
#undef SMMUFAST_WALKS
    default:
        smmufast_plain_walks(k, k->granule, k->shift, w, b, from, to, last, beyond);
    }
}

__attribute__((always_inline))
static inline size_t smmufast_plain_leaves(
    const smmufast_lanes *k, const smmufast_rows *b, size_t from, size_t to,
    const smmufast_out *o, const int direct)
{
    const uint64_t leaf_bits = k->leaf_bits, low_address = k->low_address;
    const unsigned granule = k->granule;
    const smmufast_out out = *o;
    size_t i;
    for (i = from; i < to; i++) {
        const ptrdiff_t row = (ptrdiff_t)(b->start + i);
        const unsigned shift = b->shift[i];
        const uint64_t within = ((uint64_t)1 << shift) - 1;
        const uint64_t tables = b->tables[i];
        unsigned code;
        uint64_t d, pa;
        if (__builtin_expect(b->entry[i] == NULL, 0))
            return i;
        d = smmufast_load(b->entry[i]);
        /* a page's bit 1 is set, a block's is not */
        if (__builtin_expect(
                ((d ^ SMMUFAST_USED(shift == granule)) & leaf_bits) != 0, 0))
            return i;
        code = tables ? smmufast_leaf_code(d, tables) : SMMUFAST_LEAF_CODE(d);
        if (__builtin_expect(!(k->allowed[b->access[i]] >> code & 1), 0))
            return i;
        pa = (d & low_address & ~within) | (b->va[i] & within);
        if (direct) {
            memcpy(out.pa + 8 * row, &pa, 8);
            out.action[row] = (char)out.ok;
            out.event[row] = 0;
        } else {
            if (out.pa)
                memcpy(out.pa + row * out.pa_stride, &pa, 8);
            if (out.action)
                out.action[row * out.action_stride] = (char)out.ok;
            if (out.event)
                out.event[row * out.event_stride] = 0;
        }
    }
    return to;
}

/* Second pass over rows [from, to) of one half: read the leaves and write the outputs.  Stops
 * behind the last row before the first that is left, and returns the number of that row. */
__attribute__((noinline))
static size_t smmufast_plain_arrive(
    const smmufast_lanes *k, const smmufast_rows *b, size_t from, size_t to,
    const smmufast_out *o)
{
    if (o->pa && o->action && o->event && o->pa_stride == 8 && o->action_stride == 1
        && o->event_stride == 1)
        return smmufast_plain_leaves(k, b, from, to, o, 1);
    return smmufast_plain_leaves(k, b, from, to, o, 0);
}

/* Translate rows in sequence, from row `from` of the batch on, as long as they stay in one table
 * for a while and none is left; how many.  `near` is the table that they are in; the next one is
 * walked to.  Addresses are read from their column, once. */
__attribute__((noinline))
static size_t smmufast_plain_near(
    const smmufast_lanes *k, const smmufast_window *w, uint64_t first, const char *iova,
    unsigned access, size_t from, size_t to, const smmufast_out *o, smmufast_near *near)
{
    const uint64_t leaf_bits = k->leaf_bits, entry_mask = k->entry_mask;
    const uint64_t allowed = k->allowed[access];
    const smmufast_out out = *o;
    uint64_t wanted = 0, within = 0, address = 0;
    int set = 0;
    size_t i, failed = from;
    for (i = from; i < to; i++) {
        uint64_t va, d, pa;
        memcpy(&va, iova + 8 * i, 8);
        if (__builtin_expect(!set || va >> near->reach != near->tag, 0)) {
            if (set && i - failed < 8)
                break; /* tables change too often */
            failed = i;
            near->found = (uint8_t)smmufast_near_find(k, w, first, va, near);
            if (!near->found)
                break;
            set = 1;
            within = ((uint64_t)1 << near->lg2) - 1;
            address = k->low_address & ~within;
            wanted = SMMUFAST_USED(near->lg2 == k->granule);
        }
        d = smmufast_load(near->table + (va >> (near->lg2 - 3) & entry_mask));
        if (__builtin_expect(((d ^ wanted) & leaf_bits) != 0, 0)
            || __builtin_expect(!(allowed >> smmufast_leaf_code(d, near->tables) & 1), 0))
            break;
        pa = (d & address) | (va & within);
        if (out.pa)
            memcpy(out.pa + 8 * i, &pa, 8);
        if (out.action)
            out.action[i] = (char)out.ok;
        if (out.event)
            out.event[i] = 0;
    }
    return i - from;
}

/* Last tables by the address bits above their reach, for walks that go through stage 2. */
typedef struct {
    uint64_t key;   /* bit 63: upper half; then these bits; [19:0] epoch, with another it is empty */
    uint64_t table; /* host address, and in [63:60] attributes [62:59] of the tables above */
} smmufast_known;

enum { SMMUFAST_KNOWN_LG2 = 10, SMMUFAST_EPOCH_LG2 = 20 };

static inline uint64_t smmufast_known_key(const smmufast_lanes *k, uint64_t ia, uint64_t epoch)
{
    return (k->sign << 63) | (ia >> (k->granule + k->stride)) << SMMUFAST_EPOCH_LG2 | epoch;
}

static inline size_t smmufast_known_home(uint64_t key)
{
    uint64_t tag = key >> SMMUFAST_EPOCH_LG2;
    return (size_t)((tag ^ tag >> SMMUFAST_KNOWN_LG2) & ((1 << SMMUFAST_KNOWN_LG2) - 1));
}

/* The leaf of stage 1 or 2 for rows [0, count) of one half whose last table is known; `missing` has
 * the bits of the others, and rows out of range have no entry. */
__attribute__((noinline))
static void smmufast_plain_find(
    const smmufast_lanes *k, const smmufast_known *known, uint64_t epoch, smmufast_rows *b,
    size_t count, uint64_t *missing)
{
    const uint64_t index_mask = k->index_mask, entry_mask = k->entry_mask;
    const uint64_t sign = k->sign, range_mask = k->range_mask;
    const unsigned granule = k->granule;
    size_t i;
    missing[0] = missing[1] = 0;
    memset(b->shift, (int)granule, count);
    for (i = 0; i < count; i++) {
        const uint64_t va = b->va[i], ia = va & index_mask;
        const uint64_t key = smmufast_known_key(k, ia, epoch);
        const smmufast_known *home = &known[smmufast_known_home(key)];
        const uint64_t table = home->table;
        b->entry[i] = NULL;
        if (__builtin_expect(((va ^ sign) & range_mask) != 0, 0))
            continue;
        if (__builtin_expect(home->key != key, 0)) {
            missing[i / 64] |= (uint64_t)1 << (i % 64);
            continue;
        }
        b->tables[i] = table >> 60 << 59;
        b->entry[i] = (const uint8_t *)(uintptr_t)(table << 4 >> 4)
            + (ia >> (granule - 3) & entry_mask);
        __builtin_prefetch(b->entry[i]);
    }
}

/* --- eight rows at a time --- */

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define SMMUFAST_TARGET "avx512f,avx512dq,avx512bw,avx512vl,bmi,bmi2"
#define SMMUFAST_AVX512 __attribute__((noinline, target(SMMUFAST_TARGET)))
#define SMMUFAST_INLINE __attribute__((always_inline, target(SMMUFAST_TARGET)))

static inline int smmufast_vector_here(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

static const uint64_t smmufast_nothing = 0;

/* Eight loads, each of them whole; a lane that is off reads 0.  A gather does it too, and takes
 * longer on Zen 4. */
SMMUFAST_INLINE
static inline __m512i smmufast_load8(__mmask8 on, __m512i at)
{
    const uint64_t *p[8] __attribute__((aligned(64)));
    _mm512_store_si512(
        p, _mm512_mask_mov_epi64(
               _mm512_set1_epi64((long long)(uintptr_t)&smmufast_nothing), on, at));
    return _mm512_set_epi64(*(const long long *)p[7], *(const long long *)p[6],
                            *(const long long *)p[5], *(const long long *)p[4],
                            *(const long long *)p[3], *(const long long *)p[2],
                            *(const long long *)p[1], *(const long long *)p[0]);
}

/* Where the walks of rows [0, count) begin, for the pairs that lie at their home: {key, first} at
 * slots[home], as pair_first() has them.  `missing` has the bits of the others. */
SMMUFAST_AVX512
static void smmufast_vector_find(
    const uint64_t *slots, uint64_t epoch, smmufast_rows *b, size_t count, uint64_t *missing)
{
    const __m512i from = _mm512_set1_epi64((long long)(uintptr_t)slots);
    const __m512i golden = _mm512_set1_epi64((long long)SMMUFAST_GOLDEN);
    const __m512i none = _mm512_set1_epi64(0xFFFFFFFF);
    size_t i;
    missing[0] = missing[1] = 0;
    for (i = 0; i < count; i += 8) {
        __mmask8 rows = count - i >= 8 ? 0xFF : (__mmask8)((1u << (count - i)) - 1), here;
        __m512i sid = _mm512_cvtepu32_epi64(_mm256_loadu_si256((const void *)&b->sid[i]));
        __m512i ssid = _mm512_cvtepu32_epi64(_mm256_loadu_si256((const void *)&b->ssid[i]));
        __m512i pair, at, first;
        pair = _mm512_or_si512(
            _mm512_slli_epi64(sid, 22),
            _mm512_slli_epi64(_mm512_and_si512(ssid, _mm512_set1_epi64(0xFFFFF)), 1));
        pair = _mm512_mask_or_epi64(
            pair, _mm512_cmpeq_epi64_mask(ssid, none), pair, _mm512_set1_epi64(1 << 21));
        pair = _mm512_or_si512(
            pair, _mm512_and_si512(_mm512_srli_epi64(_mm512_loadu_si512(&b->va[i]), 55),
                                   _mm512_set1_epi64(1)));
        at = _mm512_add_epi64(
            from, _mm512_slli_epi64(
                      _mm512_srli_epi64(_mm512_mullo_epi64(pair, golden), SMMUFAST_HOME), 4));
        here = _mm512_mask_cmpeq_epi64_mask(
            rows, smmufast_load8(rows, at),
            _mm512_or_si512(_mm512_slli_epi64(pair, 10), _mm512_set1_epi64((long long)epoch)));
        first = smmufast_load8(rows, _mm512_add_epi64(at, _mm512_set1_epi64(8)));
        _mm512_storeu_si512(&b->first[i], _mm512_andnot_si512(_mm512_set1_epi64(15), first));
        _mm_storel_epi64((void *)&b->shape[i],
                         _mm512_cvtepi64_epi8(_mm512_and_si512(first, _mm512_set1_epi64(15))));
        missing[i / 64] |= (uint64_t)(rows & ~here) << (i % 64);
    }
}

/* What the walks of one half need, in vectors. */
#define SMMUFAST_CONSTANTS \
    const __m512i vbase = _mm512_set1_epi64((long long)w->base); \
    const __m512i vspan = _mm512_set1_epi64((long long)w->span); \
    const __m512i vdata = _mm512_set1_epi64((long long)(uintptr_t)w->data); \
    const __m512i entry_mask = _mm512_set1_epi64((long long)k->entry_mask)

/* Where the entries of eight addresses lie in their tables, from the window's begin; entries cover
 * 2^s bytes. */
#define SMMUFAST_OFFSET(table, ia, s) \
    _mm512_sub_epi64( \
        _mm512_add_epi64( \
            table, _mm512_and_si512( \
                       _mm512_srl_epi64(ia, _mm_cvtsi32_si128((int)(s) - 3)), entry_mask)), \
        vbase)

/* Ask for the entries of eight rows in their tables, whose entries cover 2^s bytes: their host
 * addresses become the rows' entries.  Those of rows that are not `on`, or that lie outside of the
 * window, are `none`. */
SMMUFAST_INLINE
static inline void smmufast_ask8(
    const smmufast_lanes *k, const smmufast_window *w, smmufast_rows *b, size_t i, unsigned s,
    __mmask8 on, __m512i table, __m512i none)
{
    SMMUFAST_CONSTANTS;
    const __m512i ia = _mm512_and_si512(
        _mm512_loadu_si512(&b->va[i]), _mm512_set1_epi64((long long)k->index_mask));
    const __m512i off = SMMUFAST_OFFSET(table, ia, s);
    on = _mm512_mask_cmple_epu64_mask(on, off, vspan);
    _mm512_storeu_si512((void *)&b->entry[i],
                        _mm512_mask_add_epi64(none, on, off, vdata));
}

SMMUFAST_INLINE
static inline void smmufast_prefetch8(const smmufast_rows *b, size_t i)
{
    __builtin_prefetch(b->entry[i]);
    __builtin_prefetch(b->entry[i + 1]);
    __builtin_prefetch(b->entry[i + 2]);
    __builtin_prefetch(b->entry[i + 3]);
    __builtin_prefetch(b->entry[i + 4]);
    __builtin_prefetch(b->entry[i + 5]);
    __builtin_prefetch(b->entry[i + 6]);
    __builtin_prefetch(b->entry[i + 7]);
}

/* Walk rows [from, to) down to tables whose entries cover 2^bottom bytes, a level of all of them at
 * a time: the walk of eight rows alone waits for its loads.  A row has no entry where something on
 * the way was no ordinary table in the window. */
SMMUFAST_INLINE
static inline void smmufast_descend(
    const smmufast_lanes *k, unsigned bottom, const smmufast_window *w, smmufast_rows *b,
    size_t from, size_t to)
{
    const __m512i sign = _mm512_set1_epi64((long long)k->sign);
    const __m512i range_mask = _mm512_set1_epi64((long long)k->range_mask);
    const __m512i table_bits = _mm512_set1_epi64((long long)k->table_bits);
    const __m512i low_address = _mm512_set1_epi64((long long)k->low_address);
    const __m512i three = _mm512_set1_epi64(3);
    const __m512i zero = _mm512_setzero_si512();
    const __m512i nothing = _mm512_set1_epi64((long long)(uintptr_t)&smmufast_nothing);
    const __m512i keep = _mm512_set1_epi64((long long)k->keep);
    __m512i removed = zero;
    unsigned s = k->shift;
    size_t i;
    for (i = from; i < to; i += 8) {
        smmufast_ask8(
            k, w, b, i, s,
            _mm512_testn_epi64_mask(
                _mm512_xor_si512(_mm512_loadu_si512(&b->va[i]), sign), range_mask),
            _mm512_loadu_si512(&b->first[i]), s == bottom ? zero : nothing);
        _mm512_storeu_si512(&b->tables[i], zero);
        if (s == bottom)
            smmufast_prefetch8(b, i);
    }
    while (s != bottom) {
        s -= k->stride;
        for (i = from; i < to; i += 8) {
            const uint64_t *const *at = (const uint64_t *const *)&b->entry[i];
            const __m512i d = _mm512_set_epi64(
                *(const long long *)at[7], *(const long long *)at[6],
                *(const long long *)at[5], *(const long long *)at[4],
                *(const long long *)at[3], *(const long long *)at[2],
                *(const long long *)at[1], *(const long long *)at[0]);
            const __m512i tables = _mm512_or_si512(
                _mm512_loadu_si512(&b->tables[i]), _mm512_and_si512(d, keep));
            removed = _mm512_or_si512(removed, tables);
            _mm512_storeu_si512(&b->tables[i], tables);
            smmufast_ask8(
                k, w, b, i, s,
                _mm512_cmpeq_epi64_mask(_mm512_and_si512(d, table_bits), three),
                _mm512_and_si512(d, low_address), s == bottom ? zero : nothing);
            if (s == bottom)
                smmufast_prefetch8(b, i);
        }
    }
    if (_mm512_test_epi64_mask(removed, removed))
        b->removed = 1;
}

/* The same for eight rows, which may be anything: blocks are held, and what is left is told. */
SMMUFAST_AVX512
static void smmufast_descend_any(
    const smmufast_lanes *k, const smmufast_window *w, smmufast_rows *b, size_t i,
    __mmask8 rows, smmufast_last *last, uint64_t *beyond)
{
    SMMUFAST_CONSTANTS;
    const __m512i three = _mm512_set1_epi64(3);
    const __m512i va = _mm512_loadu_si512(&b->va[i]);
    const __m512i ia = _mm512_and_si512(va, _mm512_set1_epi64((long long)k->index_mask));
    __m512i table = _mm512_loadu_si512(&b->first[i]), tables = _mm512_setzero_si512(), off, d;
    __m512i entry = tables, held = tables, above = tables;
    __m512i lg2 = _mm512_set1_epi64(k->granule);
    __mmask8 in, leaf, blocks = 0, out = 0;
    __mmask8 on = _mm512_mask_testn_epi64_mask(
        rows, _mm512_xor_si512(va, _mm512_set1_epi64((long long)k->sign)),
        _mm512_set1_epi64((long long)k->range_mask));
    unsigned s;
    for (s = k->shift; s != k->granule && on; s -= k->stride) {
        off = SMMUFAST_OFFSET(table, ia, s);
        in = _mm512_mask_cmple_epu64_mask(on, off, vspan);
        out |= on & ~in;
        d = smmufast_load8(in, _mm512_add_epi64(off, vdata));
        if (k->block_shifts >> s & 1) {
            leaf = _mm512_mask_cmpeq_epi64_mask(
                in, _mm512_and_si512(d, three), _mm512_set1_epi64(1));
            held = _mm512_mask_mov_epi64(held, leaf, d);
            above = _mm512_mask_mov_epi64(above, leaf, tables);
            lg2 = _mm512_mask_mov_epi64(lg2, leaf, _mm512_set1_epi64(s));
            blocks |= leaf;
        }
        on = _mm512_mask_cmpeq_epi64_mask(
            in, _mm512_and_si512(d, _mm512_set1_epi64((long long)k->table_bits)), three);
        table = _mm512_and_si512(d, _mm512_set1_epi64((long long)k->low_address));
        tables = _mm512_or_si512(tables, d);
    }
    if (on) {
        off = SMMUFAST_OFFSET(table, ia, k->granule);
        in = _mm512_mask_cmple_epu64_mask(on, off, vspan);
        out |= on & ~in;
        entry = _mm512_maskz_add_epi64(in, off, vdata);
        above = _mm512_mask_mov_epi64(above, in, tables);
    }
    _mm512_storeu_si512(&b->held[i], held);
    entry = _mm512_mask_add_epi64(
        entry, blocks, _mm512_set1_epi64((long long)(uintptr_t)&b->held[i]),
        _mm512_set_epi64(56, 48, 40, 32, 24, 16, 8, 0));
    _mm512_storeu_si512((void *)&b->entry[i], entry);
    _mm512_storeu_si512(&b->tables[i], _mm512_and_si512(above, _mm512_set1_epi64((long long)k->keep)));
    _mm_storel_epi64((void *)&b->shift[i], _mm512_cvtepi64_epi8(lg2));
    smmufast_prefetch8(b, i);
    beyond[i / 64] |= (uint64_t)out << (i % 64);
    b->lg2 = 0;
    last->mixed += on != rows;
    if (blocks == rows) {
        const unsigned size = b->shift[i];
        if (!_mm512_mask_cmpneq_epi64_mask(rows, lg2, _mm512_set1_epi64(size))
            && (!last->size || last->size == size)) {
            last->size = size;
            last->blocks += 1;
        }
    }
    last->alike += !_mm512_cmpneq_epi64_mask(
        _mm512_srli_epi64(va, 30), _mm512_broadcastq_epi64(_mm512_castsi512_si128(
                                       _mm512_srli_epi64(va, 30))));
}

/* Which of the next eight rows there are. */
static inline __mmask8 smmufast_there(size_t rows)
{
    return rows >= 8 ? 0xFF : (__mmask8)((1u << rows) - 1);
}

/* As smmufast_plain_down(); `from` is a multiple of 8. */
SMMUFAST_AVX512
static void smmufast_vector_down(
    const smmufast_lanes *k, const smmufast_window *w, smmufast_rows *b, size_t from, size_t to,
    smmufast_last *last, uint64_t *beyond)
{
    /* blocks are as many levels deep as those of the last block of rows */
    const unsigned bottom =
        last->lg2 && (k->block_shifts >> last->lg2 & 1) ? last->lg2 : k->granule;
    const __m128i reach = _mm_cvtsi32_si128((int)bottom + k->stride);
    size_t i;
    memset(&b->shift[from], (int)bottom, to - from);
    b->lg2 = b->lg2 == 1 || b->lg2 == bottom ? bottom : 0;
    if (last->careful) {
        for (i = from; i < to; i += 8)
            smmufast_descend_any(k, w, b, i, smmufast_there(to - i), last, beyond);
        return;
    }
    smmufast_descend(k, bottom, w, b, from, to);
    for (i = from; i < to; i += 8) {
        const __mmask8 rows = smmufast_there(to - i);
        const __m512i entry = _mm512_loadu_si512((const void *)&b->entry[i]);
        const __m512i ia = _mm512_srl_epi64(_mm512_loadu_si512(&b->va[i]), reach);
        if (__builtin_expect(_mm512_mask_testn_epi64_mask(rows, entry, entry) != 0, 0))
            smmufast_descend_any(k, w, b, i, rows, last, beyond);
        else
            last->alike += !_mm512_mask_cmpneq_epi64_mask(
                rows, ia, _mm512_broadcastq_epi64(_mm512_castsi512_si128(ia)));
    }
}

/* As smmufast_plain_find(). */
SMMUFAST_AVX512
static void smmufast_vector_known(
    const smmufast_lanes *k, const smmufast_known *known, uint64_t epoch, smmufast_rows *b,
    size_t count, uint64_t *missing)
{
    const __m512i sign = _mm512_set1_epi64((long long)k->sign);
    const __m512i range_mask = _mm512_set1_epi64((long long)k->range_mask);
    const __m512i index_mask = _mm512_set1_epi64((long long)k->index_mask);
    const __m512i entry_mask = _mm512_set1_epi64((long long)k->entry_mask);
    const __m512i same = _mm512_set1_epi64((long long)((k->sign << 63) | epoch));
    const __m512i home_mask = _mm512_set1_epi64(((1 << SMMUFAST_KNOWN_LG2) - 1) << 4);
    const __m512i from = _mm512_set1_epi64((long long)(uintptr_t)known);
    const __m128i reach = _mm_cvtsi32_si128(k->granule + k->stride);
    const __m128i index = _mm_cvtsi32_si128(k->granule - 3);
    size_t i;
    missing[0] = missing[1] = 0;
    memset(b->shift, (int)k->granule, count);
    for (i = 0; i < count; i += 8) {
        const __mmask8 rows = count - i >= 8 ? 0xFF : (__mmask8)((1u << (count - i)) - 1);
        const __m512i va = _mm512_loadu_si512(&b->va[i]);
        const __m512i ia = _mm512_and_si512(va, index_mask);
        const __m512i tag = _mm512_srl_epi64(ia, reach);
        /* bit 63 of the key is bit 43 of what home is made of: too far up to count */
        const __m512i home = _mm512_add_epi64(
            from, _mm512_and_si512(
                      _mm512_slli_epi64(
                          _mm512_xor_si512(tag, _mm512_srli_epi64(tag, SMMUFAST_KNOWN_LG2)), 4),
                      home_mask));
        const __m512i key = _mm512_or_si512(_mm512_slli_epi64(tag, SMMUFAST_EPOCH_LG2), same);
        const __mmask8 in = _mm512_mask_testn_epi64_mask(
            rows, _mm512_xor_si512(va, sign), range_mask);
        const __mmask8 here = _mm512_mask_cmpeq_epi64_mask(in, smmufast_load8(in, home), key);
        const __m512i table = smmufast_load8(here, _mm512_add_epi64(home, _mm512_set1_epi64(8)));
        _mm512_storeu_si512(
            &b->tables[i], _mm512_slli_epi64(_mm512_srli_epi64(table, 60), 59));
        _mm512_storeu_si512(
            (void *)&b->entry[i],
            _mm512_maskz_add_epi64(
                here, _mm512_srli_epi64(_mm512_slli_epi64(table, 4), 4),
                _mm512_and_si512(_mm512_srl_epi64(ia, index), entry_mask)));
        missing[i / 64] |= (uint64_t)(in & ~here) << (i % 64);
        smmufast_prefetch8(b, i);
    }
}

/* As smmufast_plain_arrive(), for the commonest block: pages of one size below tables that take
 * nothing away, one access, columns without gaps.  The rows may go on after it. */
SMMUFAST_AVX512
static size_t smmufast_vector_usual(
    const smmufast_lanes *k, const smmufast_rows *b, size_t from, size_t to,
    const smmufast_out *o)
{
    const uint64_t bits = ((uint64_t)1 << b->lg2) - 1;
    const __m512i leaf_bits = _mm512_set1_epi64((long long)k->leaf_bits);
    const __m512i page = _mm512_set1_epi64(SMMUFAST_USED(b->lg2 == k->granule));
    const __m512i address = _mm512_set1_epi64((long long)(k->low_address & ~bits));
    const __m512i within = _mm512_set1_epi64((long long)bits);
    const __m512i allowed = _mm512_set1_epi64((long long)k->allowed[b->access[0]]);
    const __m512i three = _mm512_set1_epi64(3);
    const __m512i twelve = _mm512_set1_epi64(12);
    const __m512i one = _mm512_set1_epi64(1);
    size_t i;
    for (i = from; i + 8 <= to; i += 8) {
        const uint64_t row = b->start + i;
        const __m512i entry = _mm512_loadu_si512((const void *)&b->entry[i]);
        const __m512i d = smmufast_load8(_mm512_test_epi64_mask(entry, entry), entry);
        const __m512i code = _mm512_or_si512(
            _mm512_and_si512(_mm512_srli_epi64(d, PTE_S1_AP_LSB), three),
            _mm512_and_si512(_mm512_srli_epi64(d, PTE_S1_PXN_LSB - 2), twelve));
        /* a row without an entry has read 0, which is no leaf */
        if (__builtin_expect(
                _mm512_mask_test_epi64_mask(
                    _mm512_testn_epi64_mask(_mm512_xor_si512(d, page), leaf_bits),
                    _mm512_srlv_epi64(allowed, code), one) != 0xFF, 0))
            break;
        _mm512_storeu_si512(
            o->pa + 8 * row,
            _mm512_or_si512(
                _mm512_and_si512(d, address),
                _mm512_and_si512(_mm512_loadu_si512(&b->va[i]), within)));
        memset(o->action + row, o->ok, 8);
        memset(o->event + row, 0, 8);
    }
    return i;
}

/* As smmufast_plain_arrive(). */
SMMUFAST_AVX512
static size_t smmufast_vector_arrive(
    const smmufast_lanes *k, const smmufast_rows *b, size_t from, size_t to,
    const smmufast_out *o)
{
    const __m512i one = _mm512_set1_epi64(1);
    const __m512i three = _mm512_set1_epi64(3);
    const __m512i twelve = _mm512_set1_epi64(12);
    const __m512i two = _mm512_set1_epi64(2);
    const __m512i granule = _mm512_set1_epi64(k->granule);
    const __m512i leaf_bits = _mm512_set1_epi64((long long)k->leaf_bits);
    const __m512i page = _mm512_set1_epi64(SMMUFAST_USED(1));
    const __m512i low_address = _mm512_set1_epi64((long long)k->low_address);
    const __m512i allowed = _mm512_loadu_si512(k->allowed);
    size_t i;
    if (b->lg2 > 1 && !b->removed && b->alike && o->pa && o->action && o->event
        && o->pa_stride == 8 && o->action_stride == 1 && o->event_stride == 1)
        from = smmufast_vector_usual(k, b, from, to, o);
    for (i = from; i < to; i += 8) {
        __mmask8 rows = to - i >= 8 ? 0xFF : (__mmask8)((1u << (to - i)) - 1), ok;
        __m512i entry = _mm512_loadu_si512((const void *)&b->entry[i]);
        __m512i tables = _mm512_loadu_si512(&b->tables[i]);
        __m512i shift = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const void *)&b->shift[i]));
        __m512i access = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const void *)&b->access[i]));
        __m512i d, code, block, within, pa;
        uint64_t row = b->start + i;
        ok = _mm512_mask_test_epi64_mask(rows, entry, entry);
        d = smmufast_load8(ok, entry);
        /* a page's bit 1 is set, a block's is not */
        block = _mm512_maskz_mov_epi64(_mm512_cmpneq_epi64_mask(shift, granule), two);
        ok = _mm512_mask_testn_epi64_mask(
            ok, _mm512_xor_si512(_mm512_xor_si512(d, block), page), leaf_bits);
        code = _mm512_or_si512(
            _mm512_and_si512(_mm512_srli_epi64(d, PTE_S1_AP_LSB), three),
            _mm512_and_si512(_mm512_srli_epi64(d, PTE_S1_PXN_LSB - 2), twelve));
        code = _mm512_andnot_si512(
            _mm512_and_si512(_mm512_srli_epi64(tables, PTE_S1_TABLE_APTABLE0_LSB), one), code);
        code = _mm512_or_si512(
            code, _mm512_and_si512(_mm512_srli_epi64(tables, PTE_S1_TABLE_APTABLE1_LSB - 1), two));
        code = _mm512_or_si512(
            code,
            _mm512_and_si512(_mm512_srli_epi64(tables, PTE_S1_TABLE_PXNTABLE_LSB - 2), twelve));
        ok = _mm512_mask_test_epi64_mask(
            ok, _mm512_srlv_epi64(_mm512_permutexvar_epi64(access, allowed), code), one);
        within = _mm512_sub_epi64(_mm512_sllv_epi64(one, shift), one);
        /* low_address, without the page's own bits, from d; the rest from the address */
        pa = _mm512_or_si512(
            _mm512_andnot_si512(within, _mm512_and_si512(d, low_address)),
            _mm512_and_si512(_mm512_loadu_si512(&b->va[i]), within));
        if (__builtin_expect(ok == 0xFF && o->pa_stride == 8 && o->action_stride == 1
                             && o->event_stride == 1, 1)) {
            if (o->pa)
                _mm512_storeu_si512(o->pa + 8 * row, pa);
            if (o->action)
                memset(o->action + row, o->ok, 8);
            if (o->event)
                memset(o->event + row, 0, 8);
        } else {
            uint64_t pas[8];
            unsigned n = (unsigned)__builtin_ctz(~(unsigned)ok), j;
            _mm512_storeu_si512(pas, pa);
            for (j = 0; j < n; j++) {
                if (o->pa)
                    memcpy(o->pa + (ptrdiff_t)(row + j) * o->pa_stride, &pas[j], 8);
                if (o->action)
                    o->action[(ptrdiff_t)(row + j) * o->action_stride] = (char)o->ok;
                if (o->event)
                    o->event[(ptrdiff_t)(row + j) * o->event_stride] = 0;
            }
            if (i + n < to && n < 8)
                return i + n;
        }
    }
    return to;
}

/* As smmufast_plain_near(), eight rows at a time that have their leaves in one table. */
SMMUFAST_AVX512
static size_t smmufast_vector_near(
    const smmufast_lanes *k, const smmufast_window *w, uint64_t first, const char *iova,
    unsigned access, size_t from, size_t to, const smmufast_out *o, smmufast_near *near)
{
    const __m512i one = _mm512_set1_epi64(1);
    const __m512i three = _mm512_set1_epi64(3);
    const __m512i twelve = _mm512_set1_epi64(12);
    const __m512i entry_mask = _mm512_set1_epi64((long long)k->entry_mask);
    const __m512i leaf_bits = _mm512_set1_epi64((long long)k->leaf_bits);
    const __m512i allowed = _mm512_set1_epi64((long long)k->allowed[access]);
    __m512i wanted = one, within = one, address = one, tag = one, table = one, above = one;
    __m512i removed = one;
    __m128i lg2 = _mm_setzero_si128(), reach = lg2, index = lg2;
    int set = 0;
    size_t i;
    for (i = from; i + 8 <= to; i += 8) {
        const __m512i va = _mm512_loadu_si512(iova + 8 * i);
        __m512i d, page, code;
        uint64_t at;
        if (!set || _mm512_cmpneq_epi64_mask(_mm512_srl_epi64(va, reach), tag)) {
            if (set || !near->found
                || (uint64_t)_mm_cvtsi128_si64(_mm512_castsi512_si128(va)) >> near->reach
                    != near->tag)
                near->found = smmufast_near_find(
                    k, w, first, (uint64_t)_mm_cvtsi128_si64(_mm512_castsi512_si128(va)), near);
            if (!near->found)
                break;
            set = 1;
            lg2 = _mm_cvtsi32_si128(near->lg2);
            index = _mm_cvtsi32_si128(near->lg2 - 3);
            reach = _mm_cvtsi32_si128(near->reach);
            tag = _mm512_set1_epi64((long long)near->tag);
            table = _mm512_set1_epi64((long long)(uintptr_t)near->table);
            within = _mm512_set1_epi64((long long)(((uint64_t)1 << near->lg2) - 1));
            address = _mm512_andnot_si512(within, _mm512_set1_epi64((long long)k->low_address));
            wanted = _mm512_set1_epi64(SMMUFAST_USED(near->lg2 == k->granule));
            removed = _mm512_set1_epi64((long long)SMMUFAST_REMOVED(near->tables));
            above = _mm512_set1_epi64(
                (long long)SMMUFAST_ADDED(near->tables));
            if (_mm512_cmpneq_epi64_mask(_mm512_srl_epi64(va, reach), tag))
                break;
        }
        page = _mm512_srl_epi64(va, lg2);
        if (!_mm512_cmpneq_epi64_mask(
                page, _mm512_broadcastq_epi64(_mm512_castsi512_si128(page)))) {
            at = (uint64_t)_mm_cvtsi128_si64(_mm512_castsi512_si128(va)) >> (near->lg2 - 3);
            d = _mm512_set1_epi64((long long)__atomic_load_n(
                (const uint64_t *)(near->table + (at & k->entry_mask)), __ATOMIC_RELAXED));
        } else {
            d = smmufast_load8(
                0xFF, _mm512_add_epi64(
                          table, _mm512_and_si512(_mm512_srl_epi64(va, index), entry_mask)));
        }
        code = _mm512_or_si512(
            _mm512_andnot_si512(
                removed, _mm512_or_si512(
                             _mm512_and_si512(_mm512_srli_epi64(d, PTE_S1_AP_LSB), three),
                             _mm512_and_si512(_mm512_srli_epi64(d, PTE_S1_PXN_LSB - 2), twelve))),
            above);
        if (_mm512_mask_test_epi64_mask(
                _mm512_testn_epi64_mask(_mm512_xor_si512(d, wanted), leaf_bits),
                _mm512_srlv_epi64(allowed, code), one) != 0xFF)
            break;
        if (o->pa)
            _mm512_storeu_si512(
                o->pa + 8 * i,
                _mm512_or_si512(_mm512_and_si512(d, address), _mm512_and_si512(va, within)));
        if (o->action)
            memset(o->action + i, o->ok, 8);
        if (o->event)
            memset(o->event + i, 0, 8);
    }
    return i - from;
}

#else

static inline int smmufast_vector_here(void) { return 0; }

static void smmufast_vector_find(
    const uint64_t *slots, uint64_t epoch, smmufast_rows *b, size_t count, uint64_t *missing)
{
    (void)slots, (void)epoch, (void)b, (void)count;
    missing[0] = missing[1] = ~(uint64_t)0;
}

#define smmufast_vector_known smmufast_plain_find
#define smmufast_vector_down smmufast_plain_down
#define smmufast_vector_arrive smmufast_plain_arrive
#define smmufast_vector_near smmufast_plain_near

#endif
#endif
