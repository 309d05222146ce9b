/* What the bits of a translation table descriptor say, for the rules in _rules/vmsa.pxd and for the
 * passes in _engine/vector.h alike.
 *
 * Sections: DDI 0487 D8.3 (descriptors), D8.4 (permissions). */
#ifndef SMMUFAST_DESCRIPTOR_H
#define SMMUFAST_DESCRIPTOR_H

#include <stdint.h>

#include "_facts/layout.h"

/* Of a table, or of a page at level 3; of a block. */
#define SMMUFAST_TABLE (PTE_S1_VALID | PTE_S1_TYPE)
#define SMMUFAST_BLOCK PTE_S1_VALID
/* The same of a page, or else a block, whose access flag is set. */
#define SMMUFAST_USED(page) (SMMUFAST_BLOCK | ((page) ? PTE_S1_TYPE : 0) | PTE_S1_AF)

/* Where the four bits {UXN, PXN, AP[2:1]} come from: of a leaf, and of the tables above it. */
#define SMMUFAST_LEAF_CODE(d) \
    ((unsigned)(((d) >> PTE_S1_AP_LSB & 3) | ((d) >> (PTE_S1_PXN_LSB - 2) & 12)))
#define SMMUFAST_REMOVED(tables) ((tables) >> PTE_S1_TABLE_APTABLE0_LSB & 1)
#define SMMUFAST_ADDED(tables) \
    (((tables) >> (PTE_S1_TABLE_APTABLE1_LSB - 1) & 2) \
     | ((tables) >> (PTE_S1_TABLE_PXNTABLE_LSB - 2) & 12))

/* {UXN, PXN, AP[2:1]} of a leaf after the tables above it: APTable[0] takes AP[1] away, APTable[1]
 * sets AP[2]; UXNTable and PXNTable add. */
static inline unsigned smmufast_leaf_code(uint64_t d, uint64_t tables)
{
    return (SMMUFAST_LEAF_CODE(d) & ~(unsigned)SMMUFAST_REMOVED(tables))
        | (unsigned)SMMUFAST_ADDED(tables);
}

#endif
