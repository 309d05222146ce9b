#include "baseline_probe.h"

int probe_fill(struct probe *probe, uint64_t iova, uint64_t output)
{
    uint64_t page = iova >> PROBE_PAGE_LG2;
    uint64_t *tag = probe->tag + (page & (probe->sets - 1)) * PROBE_WAYS;

    for (unsigned way = 0; way < PROBE_WAYS; way++)
        if (tag[way] == ~(uint64_t)0) {
            tag[way] = page;
            probe->output[tag - probe->tag + way] = output;
            return 0;
        }
    return -1;
}

size_t probe_batch(const struct probe *probe, const uint64_t *iova, size_t n, uint64_t *output)
{
    const uint64_t *tags = probe->tag, *outputs = probe->output;
    uint64_t set_mask = probe->sets - 1;
    size_t hits = 0;

    for (size_t i = 0; i < n; i++) {
        uint64_t page = iova[i] >> PROBE_PAGE_LG2;
        uint64_t slot = (page & set_mask) * PROBE_WAYS;
        const uint64_t *tag = tags + slot;
        /* Which way it is cannot be predicted: no jump depends on it. */
        unsigned way = (unsigned)(tag[1] == page) + 2 * (unsigned)(tag[2] == page)
            + 3 * (unsigned)(tag[3] == page);

        if (tag[way] == page) {
            output[i] = outputs[slot + way]
                | (iova[i] & (((uint64_t)1 << PROBE_PAGE_LG2) - 1));
            hits++;
        } else {
            output[i] = 0;
        }
    }
    return hits;
}
