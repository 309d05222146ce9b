"""A small system with two streams that stall, and an event queue."""

import small
from ptwriter import leaf_descriptor

from smmufast import Features

QUEUE = small.QUEUES
STALLS, OTHER = 20, 21  # streams whose CD has S=1
CDS = small.MORE_CDS  # from small.BASE
IOVA = small.UNMAPPED
LEAF = small.BASE + small.LEVEL3 + 8 * (IOVA >> 12)
MAPPED = leaf_descriptor(12, 3, 0x4000_7000, ap=1)
FULL = Features.full()


def system(log2size=4, features=FULL, place=True, **registers):
    """(Smmu, interrupts): the small system, two more streams that stall, an event queue."""
    image = small.build()
    small.add_stream(image, STALLS, 0, s=1)
    small.add_stream(image, OTHER, 1, s=1, a=0)
    queue = {"eventq_base": QUEUE | log2size} if place else {}
    return small.device(image, features, **queue | registers)


def stall(smmu, iova=IOVA, sid=STALLS, **access):
    """The Stall of a translation that stalls."""
    before = smmu.stalls
    result = smmu.translate(sid, iova, **access)
    assert result.action == "stall" and result.pa is None
    assert not result
    (held,) = [s for s in smmu.stalls if s not in before]
    return held


def resume(smmu, held, **how):
    smmu.command("RESUME", StreamID=held.sid, STAG=held.stag, **how)
