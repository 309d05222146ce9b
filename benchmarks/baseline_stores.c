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
