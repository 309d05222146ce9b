#include "baseline_stores.h"

void stores_fill(uint64_t *entry, size_t n, uint64_t descriptor, uint64_t step)
{
    for (size_t i = 0; i < n; i++)
        entry[i] = descriptor + i * step;
}

void stores_clear(uint64_t *entry, size_t n)
{
    for (size_t i = 0; i < n; i++)
        entry[i] = 0;
}

void stores_dirty(const uint64_t *entry, size_t n, uint8_t *dirty)
{
    const uint64_t dbm = (uint64_t)1 << 51, read_only = 1 << 7;

    for (size_t i = 0; i < n; i++)
        dirty[i] = (entry[i] & (dbm | read_only | 3)) == (dbm | 3);
}

void stores_clean(uint64_t *entry, size_t n, uint8_t *dirty)
{
    const uint64_t dbm = (uint64_t)1 << 51, read_only = 1 << 7;

    for (size_t i = 0; i < n; i++) {
        dirty[i] = (entry[i] & (dbm | read_only | 3)) == (dbm | 3);
        if (dirty[i])
            __atomic_fetch_or(&entry[i], read_only, __ATOMIC_ACQ_REL);
    }
}
