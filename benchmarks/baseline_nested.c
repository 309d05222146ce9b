/*
 * IHI 0070 3.3 to 3.5, 5.2 (STE), 5.5 (fault control), 15 (translation procedure);
 * DDI 0487 D8.2 to D8.4.
 *
 * The rules of stage 1 are those of baseline_walk.c, taken in whole so that they are inlined.
 */
#include "baseline_nested.h"

#include "baseline_walk.c"

/* What a stage-2 translation is for. */
enum { FOR_DATA, FOR_WALK };

/* The access is denied by a leaf of stage 2. */
ALWAYS_INLINE bool denied(const struct stage2 *stage2, uint64_t leaf, unsigned access, int what)
{
    if (what == FOR_WALK) {
        unsigned memattr = BITS(leaf, 5, 2);
        bool device = (memattr & 12) == 0 || (memattr & 3) == 0;    /* or a reserved code */

        return !BIT(leaf, 6) || (stage2->ptw && device);
    }
    if (access & ACCESS_INSTRUCTION) {
        unsigned xn = BITS(leaf, 54, 53);

        return xn == 2 || xn == (access & ACCESS_PRIVILEGED ? 1 : 3);
    }
    return access & ACCESS_WRITE ? !BIT(leaf, 7) : !BIT(leaf, 6);
}

/* Returns an event number, or 0 and the output address. */
ALWAYS_INLINE unsigned outer(const struct memory *memory, const struct stage2 *stage2,
                             uint64_t ipa, unsigned access, int what, uint64_t *pa)
{
    uint64_t index_mask = stage2->first_mask;
    uint64_t table = stage2->ttb;
    unsigned shift = stage2->start_shift;
    uint64_t descriptor, output, offset;

    if (ipa & stage2->beyond_input)
        return F_TRANSLATION;
    for (;;) {
        offset = table + (ipa >> shift & index_mask) * 8 - memory->base;
        if (offset > memory->size - 8)
            return F_WALK_EABT;
        memcpy(&descriptor, memory->bytes + offset, 8);
        if (!(descriptor & 1))
            return F_TRANSLATION;
        output = ADDRESS(descriptor, 47, 12);
        if (shift == 12 || !(descriptor & 2))
            break;
        if (output & stage2->beyond_output)
            return F_ADDR_SIZE;
        table = output;
        index_mask = 511;
        shift -= 9;
    }
    if (shift == 12 ? !(descriptor & 2) : shift > 30)
        return F_TRANSLATION;
    output &= ~(((uint64_t)1 << shift) - 1);
    if (output & stage2->beyond_output)
        return F_ADDR_SIZE;
    if (!BIT(descriptor, 10) && !stage2->affd)
        return F_ACCESS;
    if (denied(stage2, descriptor, access, what))
        return F_PERMISSION;
    *pa = output | (ipa & (((uint64_t)1 << shift) - 1));
    return 0;
}

/* Stage 1, each descriptor through stage 2. `of_stage2`: the fault is that of stage 2. */
ALWAYS_INLINE unsigned inner(const struct memory *memory, const struct nested *nested,
                             uint64_t iova, unsigned access, uint64_t *ipa, bool *of_stage2)
{
    const struct context *context = &nested->context;
    const struct half *half = &context->half[BIT(iova, 55)];
    int64_t canonical = (int64_t)(iova << half->ignored_top) >> half->ignored_top;
    uint64_t input = iova & half->input_mask;
    uint64_t table = half->ttb, tables = 0;
    unsigned shift = half->start_shift;
    uint64_t descriptor, output, offset, at = 0;
    unsigned fault;

    if (canonical >> half->input_lg2 != half->upper || half->disabled)
        return F_TRANSLATION;
    for (;;) {
        fault = outer(memory, &nested->stage2, table + (input >> shift & 511) * 8, 0, FOR_WALK,
                      &at);
        if (fault) {
            *of_stage2 = true;
            return fault;
        }
        offset = at - memory->base;
        if (offset > memory->size - 8)
            return F_WALK_EABT;
        memcpy(&descriptor, memory->bytes + offset, 8);
        if (!(descriptor & 1))
            return F_TRANSLATION;
        output = ADDRESS(descriptor, 47, 12);
        if (shift == 12 || !(descriptor & 2))
            break;
        if (output & context->beyond_output)
            return F_ADDR_SIZE;
        tables |= descriptor;
        table = output;
        shift -= 9;
    }
    if (shift == 12 ? !(descriptor & 2) : shift > 30)
        return F_TRANSLATION;
    output &= ~(((uint64_t)1 << shift) - 1);
    if (output & context->beyond_output)
        return F_ADDR_SIZE;
    if (!BIT(descriptor, 10) && !context->affd)
        return F_ACCESS;
    if (!permitted(context, access, half->had ? 0 : tables, descriptor))
        return F_PERMISSION;
    *ipa = output | (input & (((uint64_t)1 << shift) - 1));
    return 0;
}

/* ---- STE and CD ------------------------------------------------------------------------- */

/* False: the STE's stage 2 is not one that is modelled, or illegal. */
static bool decode_stage2(struct stage2 *stage2, const uint64_t *ste)
{
    static const uint8_t size_lg2[8] = {32, 36, 40, 42, 44, 48, 52, 52};
    static const uint8_t start_shift[4] = {30, 39, 48, 0};          /* levels 2, 1, 0 */
    unsigned input_lg2 = 64 - BITS(ste[2], 37, 32);
    unsigned first = BITS(ste[2], 39, 38);
    unsigned output_lg2 = size_lg2[BITS(ste[2], 50, 48)];
    unsigned index_lg2;

    /* 4 KiB granule, VMSAv8-64, little-endian, no update, no stall, neither FWB nor DS */
    if (BITS(ste[2], 47, 46) || !BIT(ste[2], 51) || BIT(ste[2], 52) || BITS(ste[2], 57, 55)
        || BIT(ste[1], 25) || BITS(ste[3], 3, 2) || first == 3 || input_lg2 > 48)
        return false;
    stage2->start_shift = start_shift[first] - 9;
    if (input_lg2 <= stage2->start_shift || input_lg2 > stage2->start_shift + 13u)
        return false;
    index_lg2 = input_lg2 - stage2->start_shift;
    stage2->ttb = ADDRESS(ste[3], 51, 4);
    if (stage2->ttb >> output_lg2 || stage2->ttb >> 48)
        return false;
    stage2->ttb = ADDRESS(ste[3], 51, index_lg2 + 3);
    stage2->first_mask = ((uint64_t)1 << index_lg2) - 1;
    stage2->beyond_input = ~(uint64_t)0 << input_lg2;
    stage2->beyond_output = ~(uint64_t)0 << output_lg2;
    stage2->affd = BIT(ste[2], 53);
    stage2->ptw = BIT(ste[2], 54);
    stage2->record = BIT(ste[2], 58);
    return true;
}

static bool modelled(const struct half *half)
{
    return half->epd || half->format == FORMAT_4K;
}

void nested_configure(const struct memory *memory, const struct registers *registers,
                      uint32_t sid, struct nested *nested)
{
    struct context *context = &nested->context;
    uint64_t ste[4], cd[4], address;
    unsigned event;

    memset(nested, 0, sizeof(*nested));
    context->events_enabled = BIT(registers->cr0, 2);
    event = find_ste(memory, registers, sid, &address);
    if (event) {
        refuse(context, registers, event);
        return;
    }
    if (!read_record(memory, address, ste, 4)) {
        refuse(context, registers, F_STE_FETCH);
        return;
    }
    context->kind = CONTEXT_UNSUPPORTED;
    nested->stage1 = BIT(ste[0], 1);
    if (!BIT(ste[0], 0) || BITS(ste[0], 3, 2) != 3 || !decode_stage2(&nested->stage2, ste))
        return;
    context->privcfg = BITS(ste[1], 49, 48);
    context->instcfg = BITS(ste[1], 51, 50);
    context->kind = CONTEXT_TRANSLATE;
    if (!nested->stage1)
        return;
    if (BITS(ste[0], 63, 59) || BIT(ste[1], 27)) {
        context->kind = CONTEXT_UNSUPPORTED;
        return;
    }
    event = outer(memory, &nested->stage2, ADDRESS(ste[0], 51, 6), 0, FOR_WALK, &address);
    if (event) {
        refuse(context, registers,
               nested->stage2.record || event == F_WALK_EABT ? event : 0);
        return;
    }
    if (!read_record(memory, address, cd, 4)) {
        refuse(context, registers, F_CD_FETCH);
        return;
    }
    context->two_halves = true;                                     /* always EL1 */
    if (!decode_cd(context, cd)) {
        refuse(context, registers, C_BAD_CD);
        return;
    }
    context->beyond_output = ~(uint64_t)0 << context->output_lg2;
    if (BIT(cd[0], 15) || !modelled(&context->half[0]) || !modelled(&context->half[1]))
        context->kind = CONTEXT_UNSUPPORTED;
}

/* ---- the walk --------------------------------------------------------------------------- */

/* One address with a decoded context and a prepared access. Returns the action. */
ALWAYS_INLINE unsigned both(const struct memory *memory, const struct nested *nested,
                            uint64_t iova, unsigned access, uint64_t *pa, uint8_t *event)
{
    const struct context *context = &nested->context;
    uint64_t ipa = iova;
    bool of_stage2 = false;
    unsigned fault = 0;

    *pa = 0;
    *event = 0;
    if (context->kind != CONTEXT_TRANSLATE) {
        *event = context->event;
        return ACTION_ABORT;
    }
    if (nested->stage1) {
        fault = inner(memory, nested, iova, access, &ipa, &of_stage2);
    } else if (iova >> OAS_LG2) {
        *event = context->events_enabled ? F_ADDR_SIZE : 0;
        return ACTION_ABORT;
    }
    if (!fault) {
        of_stage2 = true;
        fault = outer(memory, &nested->stage2, ipa, access, FOR_DATA, pa);
    }
    if (!fault)
        return ACTION_OK;
    if (!of_stage2)
        return report(context, fault, event);
    if (context->events_enabled && (nested->stage2.record || fault == F_WALK_EABT))
        *event = fault;
    return ACTION_ABORT;
}

int64_t nested_walk(const struct memory *memory_given, const struct nested *nested_given,
                    const uint64_t *iova, size_t n, unsigned access,
                    uint64_t *pa_out, uint8_t *action_out, uint8_t *event_out)
{
    /* Copies, so that the compiler sees that the stores below change neither. */
    const struct memory memory = *memory_given;
    struct nested nested = *nested_given;
    int64_t successes = 0;

    access = prepare(&nested.context, access);
    for (size_t i = 0; i < n; i++) {
        uint64_t pa;
        uint8_t event;
        unsigned action = both(&memory, &nested, iova[i], access, &pa, &event);

        pa_out[i] = pa;
        action_out[i] = action;
        event_out[i] = event;
        successes += action < ACTION_ABORT;
    }
    return successes;
}

unsigned nested_translate(const struct memory *memory, const struct registers *registers,
                          uint32_t sid, uint64_t iova, unsigned access,
                          uint64_t *pa_out, uint8_t *event_out)
{
    struct nested nested;

    nested_configure(memory, registers, sid, &nested);
    access = prepare(&nested.context, access);
    return both(memory, &nested, iova, access, pa_out, event_out);
}
