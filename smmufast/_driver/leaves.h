/* Runs of descriptors in plain memory: read, compared and written eight at a time with AVX-512,
 * where the processor has it, or as the compiler vectorises a loop.
 *
 * A host may walk the tables meanwhile, with loads of 64 bits.  A run starts at a multiple of
 * 8 bytes, so each lane of a vector is one aligned descriptor within one cache line.  Neither the
 * C language nor the instruction sets promise that a vector store is seen lane by lane and each
 * lane whole; processors of today do so, and memory is never written in smaller pieces.  Between
 * descriptors no order is promised either: what must come before or after is written apart.
 *
 * Not architectural.  SPDX-License-Identifier: Apache-2.0
 */
#ifndef SMMUFAST_LEAVES_H
#define SMMUFAST_LEAVES_H

#include <stdint.h>

/* Whether the functions below use AVX-512; set when the module is loaded. */
static int smmufast_leaves_wide;

#define SMMUFAST_ENTRIES(host) ((uint64_t *)(uintptr_t)(host))

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#define SMMUFAST_LEAVES_AVX512 __attribute__((noinline, target("avx512f,avx512bw,avx512vl")))

static inline int smmufast_leaves_here(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512vl");
}

SMMUFAST_LEAVES_AVX512
static void smmufast_fill_wide(uint64_t *entry, uint64_t n, uint64_t d, uint64_t step)
{
    __m512i value, by;
    /* vectors that cross no cache line */
    for (; (uintptr_t)entry & 63 && n; n--, d += step)
        __atomic_store_n(entry++, d, __ATOMIC_RELAXED);
    /* lane i is d + i * step: by bits of i */
    by = _mm512_set1_epi64((long long)step);
    value = _mm512_set1_epi64((long long)d);
    value = _mm512_mask_add_epi64(value, 0xAA, value, by);
    by = _mm512_add_epi64(by, by);
    value = _mm512_mask_add_epi64(value, 0xCC, value, by);
    by = _mm512_add_epi64(by, by);
    value = _mm512_mask_add_epi64(value, 0xF0, value, by);
    by = _mm512_add_epi64(by, by);
    for (; n >= 8; n -= 8, entry += 8) {
        _mm512_store_si512(entry, value);
        value = _mm512_add_epi64(value, by);
    }
    if (n)
        _mm512_mask_storeu_epi64(entry, (__mmask8)((1u << n) - 1), value);
}

SMMUFAST_LEAVES_AVX512
static uint64_t smmufast_union_wide(const uint64_t *entry, uint64_t n)
{
    __m512i found = _mm512_setzero_si512(), more = found;
    for (; n >= 16; n -= 16, entry += 16) {
        found = _mm512_or_si512(found, _mm512_loadu_si512(entry));
        more = _mm512_or_si512(more, _mm512_loadu_si512(entry + 8));
    }
    if (n >= 8) {
        found = _mm512_or_si512(found, _mm512_loadu_si512(entry));
        n -= 8;
        entry += 8;
    }
    if (n)
        more = _mm512_or_si512(more, _mm512_maskz_loadu_epi64((__mmask8)((1u << n) - 1), entry));
    return (uint64_t)_mm512_reduce_or_epi64(_mm512_or_si512(found, more));
}

SMMUFAST_LEAVES_AVX512
static uint64_t smmufast_alike_wide(const uint64_t *entry, uint64_t n, uint64_t mask, uint64_t d)
{
    const __m512i bits = _mm512_set1_epi64((long long)mask), want = _mm512_set1_epi64((long long)d);
    __mmask8 other;
    uint64_t i = 0;
    for (; n - i >= 8; i += 8) {
        other = _mm512_cmpneq_epi64_mask(
            _mm512_and_si512(_mm512_loadu_si512(entry + i), bits), want);
        if (other)
            return i + (uint64_t)__builtin_ctz(other);
    }
    for (; i < n && (__atomic_load_n(entry + i, __ATOMIC_RELAXED) & mask) == d; i++)
        ;
    return i;
}

SMMUFAST_LEAVES_AVX512
static void smmufast_each_wide(
    const uint64_t *entry, uint64_t n, uint64_t mask, uint64_t d, uint8_t *out)
{
    const __m512i bits = _mm512_set1_epi64((long long)mask), want = _mm512_set1_epi64((long long)d);
    uint64_t i, k, equal;
    for (i = 0; n - i >= 64; i += 64) {
        equal = 0;
        for (k = 0; k < 64; k += 8)
            equal |= (uint64_t)_mm512_cmpeq_epi64_mask(
                         _mm512_and_si512(_mm512_loadu_si512(entry + i + k), bits), want)
                << k;
        _mm512_storeu_si512(out + i, _mm512_maskz_set1_epi8(equal, 1));
    }
    for (; i < n; i++)
        out[i] = (__atomic_load_n(entry + i, __ATOMIC_RELAXED) & mask) == d;
}

#else

static inline int smmufast_leaves_here(void) { return 0; }

static void smmufast_each_wide(
    const uint64_t *entry, uint64_t n, uint64_t mask, uint64_t d, uint8_t *out)
{
    (void)entry, (void)n, (void)mask, (void)d, (void)out;
}

static void smmufast_fill_wide(uint64_t *entry, uint64_t n, uint64_t d, uint64_t step)
{
    (void)entry, (void)n, (void)d, (void)step;
}

static uint64_t smmufast_union_wide(const uint64_t *entry, uint64_t n)
{
    (void)entry, (void)n;
    return 0;
}

static uint64_t smmufast_alike_wide(const uint64_t *entry, uint64_t n, uint64_t mask, uint64_t d)
{
    (void)entry, (void)n, (void)mask, (void)d;
    return 0;
}

#endif

/* A call of its own costs as much as so many stores. */
enum { SMMUFAST_LEAVES_FEW = 8 };

/* n descriptors from a host address on: d, d + step, ... */
static inline void smmufast_leaves_fill(uint64_t host, uint64_t n, uint64_t d, uint64_t step)
{
    uint64_t *entry = SMMUFAST_ENTRIES(host);
    if (n > SMMUFAST_LEAVES_FEW && smmufast_leaves_wide) {
        smmufast_fill_wide(entry, n, d, step);
        return;
    }
    if (n > SMMUFAST_LEAVES_FEW) {
        for (uint64_t i = 0; i < n; i++, d += step)
            entry[i] = smmufast_le64(d);
        return;
    }
    /* Of plain stores of zeros gcc would make `rep stos`, which takes 25 ns to begin. */
    for (uint64_t i = 0; i < n; i++, d += step)
        __atomic_store_n(entry + i, smmufast_le64(d), __ATOMIC_RELAXED);
}

/* Every bit that is set in one of n descriptors. */
static inline uint64_t smmufast_leaves_union(uint64_t host, uint64_t n)
{
    const uint64_t *entry = SMMUFAST_ENTRIES(host);
    uint64_t found = 0;
    if (n > SMMUFAST_LEAVES_FEW && smmufast_leaves_wide)
        return smmufast_union_wide(entry, n);
    for (uint64_t i = 0; i < n; i++)
        found |= entry[i];
    return smmufast_le64(found);
}

/* How many of n descriptors, from the first on, are `d` in the bits of a mask. */
static inline uint64_t smmufast_leaves_alike(uint64_t host, uint64_t n, uint64_t mask, uint64_t d)
{
    const uint64_t *entry = SMMUFAST_ENTRIES(host);
    uint64_t i;
    if (n > SMMUFAST_LEAVES_FEW && smmufast_leaves_wide)
        return smmufast_alike_wide(entry, n, mask, d);
    mask = smmufast_le64(mask);
    d = smmufast_le64(d);
    for (i = 0; i < n && (__atomic_load_n(entry + i, __ATOMIC_RELAXED) & mask) == d; i++)
        ;
    return i;
}

/* A byte for each of n descriptors: 1 if it is `d` in the bits of a mask, else 0. */
static inline void smmufast_leaves_each(
    uint64_t host, uint64_t n, uint64_t mask, uint64_t d, uint8_t *out)
{
    const uint64_t *entry = SMMUFAST_ENTRIES(host);
    if (n > SMMUFAST_LEAVES_FEW && smmufast_leaves_wide) {
        smmufast_each_wide(entry, n, mask, d, out);
        return;
    }
    mask = smmufast_le64(mask);
    d = smmufast_le64(d);
    for (uint64_t i = 0; i < n; i++)
        out[i] = (entry[i] & mask) == d;
}

#endif
