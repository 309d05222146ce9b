"""The hot loops, alone: what builds are compared by and what instructions are counted of.

Only the package and numpy are needed.  Each function takes how many items there are to be, and
returns a Run whose call makes as many.
"""

import functools

import numpy as np
import workload
from workload import NESTED_SID, PAIRS_LG2, SID, STRTAB_LINEAR, STRTAB_NESTED, Out, Run, smmu

TABLES = 0x8000_0000
PAGE = 4096
PA = 0x1_0000_1000  # no block fits


@functools.cache
def image(kind=workload.Image, pages_lg2=16):
    """Return an image, by default one whose leaf tables are in the second-level cache."""
    return kind(pages_lg2)


def batch(order, kind=workload.Image, pages_lg2=16, sid=SID, strtab=STRTAB_LINEAR, caches=None):
    """Translate an array of addresses."""

    def build(n):
        tables = image(kind, pages_lg2)
        iova = getattr(tables, order)(n)
        out = Out.empty(n)
        columns = out.columns()
        own = smmu(tables, strtab, caches=caches() if caches else None)
        if caches:  # every page is in the TLB
            own.translate_batch(sid, tables.sequential(tables.pages))

        def call():
            own.translate_batch(sid, iova, out=columns)

        call()
        mapped = iova - np.uint64(tables.first) < np.uint64(tables.pages << tables.leaf_lg2)
        if not np.array_equal(out.pa, np.where(mapped, tables.expected(iova), np.uint64(0))):
            raise AssertionError("translate_batch() gives wrong addresses")
        return Run(call, n)

    return build


def mixed(n):
    """Translate an array of addresses of 1024 pairs of StreamID and SubstreamID."""
    tables = image(workload.PairsImage, 10)
    iova = tables.random(n)
    pair = np.random.default_rng(3).integers(0, 1 << 2 * PAIRS_LG2, n, np.uint32)
    sid, ssid = pair >> np.uint32(PAIRS_LG2), pair & np.uint32((1 << PAIRS_LG2) - 1)
    out = Out.empty(n)
    columns = out.columns()
    own = smmu(tables, STRTAB_LINEAR)

    def call():
        own.translate_batch(sid, iova, ssid=ssid, out=columns)

    call()
    if not np.array_equal(out.pa, tables.expected(iova)):
        raise AssertionError("translate_batch() gives wrong addresses")
    return Run(call, n)


def scalar(name):
    """Call a method of Smmu for one address after the other."""

    def build(n):
        tables = image()
        iova = tables.random(n)
        method = getattr(smmu(tables, STRTAB_LINEAR), name)
        addresses = iova.tolist()
        found = [getattr(result, "pa", result) for result in (method(SID, a) for a in addresses)]
        if found != tables.expected(iova).tolist():
            raise AssertionError(f"{name}() gives wrong addresses")

        def call():
            for address in addresses:
                method(SID, address)

        return Run(call, n)

    return build


def pasid(name):
    """Allocate, or free, one PASID after the other, with half of them allocated."""

    def build(n):
        from smmufast import PasidAllocator

        own = PasidAllocator()
        own.alloc_many(own.size // 2)
        wanted = own.alloc_many(n)
        ids = wanted.tolist()
        alloc, free = own.alloc, own.free

        def free_each():
            for one in ids:
                free(one)

        def alloc_each():
            for _ in ids:
                alloc()

        def give():
            own.free_many(wanted)

        def take():
            own.alloc_many(n, out=wanted)

        free_each()
        alloc_each()
        if len(own) != own.size // 2 + n or ids[-1] not in own:
            raise AssertionError("alloc() gives other PASIDs than alloc_many()")
        if name == "alloc":
            return Run(alloc_each, n, give)
        give()
        return Run(free_each, n, take)

    return build


def pages(name, each):
    """Map, or unmap, n pages in runs of `each`, in leaf tables that stay."""

    def build(n):
        from smmufast import Memory
        from smmufast.iommu import Pages, PageTable

        memory = Memory()
        memory.add_private(TABLES, 1 << 24)
        own = PageTable(Pages(memory, TABLES, 1 << 24))
        size = each * PAGE
        runs = [(at, PA + at, size) for at in range(0, n * PAGE, size)]
        half = [(at, size) for at in range(0, n * PAGE, size)]
        own.map(n * PAGE, PA, 512 * PAGE)  # where nothing is unmapped, beside the others

        def map_each():
            for iova, pa, length in runs:
                own.map(iova, pa, length)

        def unmap_each():
            for iova, length in half:
                own.unmap(iova, length)

        map_each()
        if own.iova_to_phys(n * PAGE - 1) != PA + n * PAGE - 1:
            raise AssertionError("map() maps something else")
        if name == "map":
            return Run(map_each, n, unmap_each)
        unmap_each()
        if own.mapped != 512 * PAGE:
            raise AssertionError("unmap() leaves pages mapped")
        return Run(unmap_each, n, map_each)

    return build


def server():
    """Return caches of a server's size."""
    from smmufast import Caches

    return Caches.server()


HOT = {
    "translate_batch, random": batch("random"),
    "translate_batch, in sequence": batch("sequential"),
    "translate_batch, one in eight unmapped": batch("partly_unmapped"),
    "translate_batch, 1024 (sid, ssid) mixed": mixed,
    "translate_batch, both stages": batch(
        "random", workload.NestedImage, 14, NESTED_SID, STRTAB_NESTED
    ),
    "translate_batch, TLB hits": batch("random", pages_lg2=12, caches=server),
    "translate()": scalar("translate"),
    "pa()": scalar("pa"),
    "PASID alloc()": pasid("alloc"),
    "PASID free()": pasid("free"),
    "map(), runs of 256 pages": pages("map", 256),
    "unmap(), runs of 256 pages": pages("unmap", 256),
    "map(), one page": pages("map", 1),
    "unmap(), one page": pages("unmap", 1),
}
