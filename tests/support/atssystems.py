"""Small systems whose streams have ATS."""

import nested
import small

from smmufast import Features

ATSCHK, REC_CFG_ATS, RECINVSID = 1 << 4, 1 << 3, 1 << 1
BOTH = 0b10101 | 1 << 1 | 1 << 3  # CR0: everything enabled, ATSCHK
QUEUE = small.QUEUES


def full(**changes):
    return Features.full().replace(**changes)


def small_system(eats=1, features=None, **registers):
    """The small system with EATS in every STE, and memory for queues."""
    image = small.build()
    for sid in range(16):
        at = small.STES + 64 * sid + 11
        image[at] = image[at] & ~0x30 | eats << 4
    smmu, _ = small.system(image, features=features or full(), **{"cr0": BOTH} | registers)
    smmu.memory.add_private(QUEUE, 0x10_0000)
    return smmu


def nested_system(eats=1, has=None, cr0=BOTH, cr2=RECINVSID, **more):
    smmu = nested.small_nested(
        {"ats": 1, "pri": 1, "atsrecerr": 1, "httu": 2, "ssidsize": 4} | (has or {}), eats=eats,
        **more,
    )  # fmt: skip
    smmu.write("CR0", 0)
    smmu.write("CR2", cr2)
    smmu.write("CR0", cr0)
    return smmu


def rights(response):
    return "r" * response.read + "w" * response.write + "x" * response.execute
