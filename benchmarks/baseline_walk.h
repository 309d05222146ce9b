/*
 * The baseline of the translation benchmarks: an SMMUv3 stage 1 walk in plain C, written
 * without the library and sharing no code with it.
 *
 * It models what smmufast.Features(httu=0, stall_model=1, s2p=0) describes (52-bit output, all
 * three granules), with little-endian descriptors only.
 */
#ifndef SMMUFAST_BASELINE_WALK_H
#define SMMUFAST_BASELINE_WALK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* One region of simulated physical memory. */
struct memory {
    const uint8_t *bytes;
    uint64_t base;
    uint64_t size;              /* at least 64 */
};

/* The registers that a translation reads. */
struct registers {
    uint64_t strtab_base;
    uint32_t strtab_base_cfg;
    uint32_t cr0;
    uint32_t cr2;
};

/* What a request asks for; bits of `access`. */
enum { ACCESS_WRITE = 1, ACCESS_PRIVILEGED = 2, ACCESS_INSTRUCTION = 4 };

enum { ACTION_OK, ACTION_BYPASS, ACTION_DISABLED, ACTION_ABORT, ACTION_RAZ_WI };

enum {
    C_BAD_STREAMID = 0x02,
    F_STE_FETCH = 0x03,
    C_BAD_STE = 0x04,
    F_STREAM_DISABLED = 0x06,
    C_BAD_SUBSTREAMID = 0x08,
    F_CD_FETCH = 0x09,
    C_BAD_CD = 0x0A,
    F_WALK_EABT = 0x0B,
    F_TRANSLATION = 0x10,
    F_ADDR_SIZE = 0x11,
    F_ACCESS = 0x12,
    F_PERMISSION = 0x13,
};

#define NO_SSID 0xFFFFFFFFu

/* One half of the input range: TTB0's or TTB1's. */
struct half {
    uint64_t ttb;
    uint64_t input_mask;        /* the input bits that index tables */
    int64_t upper;              /* what the bits above them must be: 0, or -1 in TTB1's half */
    uint8_t input_lg2;
    uint8_t start_shift;        /* lowest input bit that the first table's index holds */
    uint8_t ignored_top;        /* 8 with TBI, else 0 */
    uint8_t format;             /* granule and 52-bit form, see baseline_walk.c */
    bool epd, e0pd, had;
    bool disabled;              /* for the access at hand */
};

enum context_kind { CONTEXT_TRANSLATE, CONTEXT_BYPASS, CONTEXT_ABORT, CONTEXT_UNSUPPORTED };

/* An STE and a CD, decoded. */
struct context {
    struct half half[2];
    enum context_kind kind;
    uint8_t event;              /* why kind is CONTEXT_ABORT; 0: nothing recorded */
    uint64_t beyond_output;     /* the bits that the effective IPS leaves no room for */
    uint8_t output_lg2;
    uint8_t privcfg, instcfg;
    bool two_halves;            /* EL1 and EL2-E2H worlds; else TTB0 only, all privileged */
    bool affd, wxn, pan, epan;
    bool abort, record;         /* CD.A and CD.R */
    bool events_enabled;
};

/* Reads and checks the STE and the CD of a stream. */
void baseline_configure(const struct memory *memory, const struct registers *registers,
                        uint32_t sid, uint32_t ssid, struct context *context);

/*
 * Translates n addresses, one at a time, with one decoded context. Returns how many succeeded.
 * event_out is the number of the recorded event, or 0; pa_out is 0 where no address came out.
 */
int64_t baseline_walk(const struct memory *memory, const struct context *context,
                      const uint64_t *iova, size_t n, unsigned access,
                      uint64_t *pa_out, uint8_t *action_out, uint8_t *event_out);

/* Translates one address from the registers on: STE, CD, walk. Returns the action. */
unsigned baseline_translate(const struct memory *memory, const struct registers *registers,
                            uint32_t sid, uint32_t ssid, uint64_t iova, unsigned access,
                            uint64_t *pa_out, uint8_t *event_out);

/*
 * Translates n requests with a StreamID and, unless ssid is NULL, a SubstreamID each. The STE and
 * the CD are read again whenever these differ from the request before.
 */
int64_t baseline_requests(const struct memory *memory, const struct registers *registers,
                          const uint32_t *sid, const uint32_t *ssid, const uint64_t *iova,
                          size_t n, unsigned access,
                          uint64_t *pa_out, uint8_t *action_out, uint8_t *event_out);

#endif
