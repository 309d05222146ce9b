"""Translations through caches: TLB hits beside a bare probe, misses beside the walk alone."""

from functools import partial

import bench_tlb
import numpy as np
import workload
from bench_translate import (
    PLAIN_C,
    SCALAR_CALLS,
    batch_c,
    batch_library,
    empty,
    plain,
    three_integers,
)
from questions import LIBRARY, Question, Run, checked, smmu
from workload import NESTED_SID, SID, STAGE2_SID, STRTAB_LINEAR, STRTAB_NESTED, Out

BARE = "bare probe in plain C"

# Pages that a TLB of 4096 entries in 4 ways holds without a conflict: neighbours.
HIT_PAGES_LG2 = 12
HITS = 1 << 16
KINDS = {"stage 1": SID, "stage 2": STAGE2_SID, "nested, combined": NESTED_SID}

# Pages by far more than there are TLB entries.
MISS_PAGES_LG2 = {"64 K": 16, "16 M": 24}


def image(bench, kind, pages_lg2):
    """Return the image that a kind of stream needs."""
    return bench.image(pages_lg2) if kind == "stage 1" else bench.nested_image(pages_lg2)


def addresses(bench, kind, pages_lg2, order, n):
    """Return addresses of the pages that a stream can reach."""
    iova = getattr(image(bench, kind, pages_lg2), order)(n)
    if kind == "stage 2":
        iova -= np.uint64(workload.IOVA_BASE - workload.DATA_IPA)
    return iova


def expected(bench, kind, pages_lg2, iova):
    """Return where they go, from the permutations alone."""
    if kind == "stage 1":
        return image(bench, kind, pages_lg2).expected(iova)
    return image(bench, kind, pages_lg2).expected(iova, stage2_only=kind == "stage 2")


def cached(bench, kind, pages_lg2):
    """Return a Smmu with caches of a server's size: a TLB of 4096 entries in 4 ways, LRU."""
    from smmufast import Caches

    strtab = STRTAB_LINEAR if kind == "stage 1" else STRTAB_NESTED
    return smmu(image(bench, kind, pages_lg2), strtab, caches=Caches.server())


def bare(kind, order):
    """Probe tags of one word, four to a set, for the same addresses."""

    def build(bench):
        tags = np.full(bench_tlb.ENTRIES, 2**64 - 1, np.uint64)
        probe = bench_tlb.module().Bare(tags, np.zeros_like(tags))
        pages = addresses(bench, kind, HIT_PAGES_LG2, "sequential", 1 << HIT_PAGES_LG2)
        outputs = expected(bench, kind, HIT_PAGES_LG2, pages)
        for page, output in zip(pages.tolist(), outputs.tolist(), strict=True):
            probe.fill(page, output)
        iova = addresses(bench, kind, HIT_PAGES_LG2, order, HITS)
        wanted = expected(bench, kind, HIT_PAGES_LG2, iova)
        out = np.ones(HITS, np.uint64)
        if probe.batch(iova, out) != HITS or (out != wanted).any():
            raise AssertionError("the bare probe gives a wrong address")
        return Run(lambda: probe.batch(iova, out), HITS)

    return build


def hits(kind, order):
    """Call translate_batch for addresses that are all in the TLB."""

    def build(bench):
        device = cached(bench, kind, HIT_PAGES_LG2)
        pages = addresses(bench, kind, HIT_PAGES_LG2, "sequential", 1 << HIT_PAGES_LG2)
        device.translate_batch(KINDS[kind], pages)
        iova = addresses(bench, kind, HIT_PAGES_LG2, order, HITS)
        reference, out = Out.empty(HITS), Out.empty(HITS)
        reference.pa[:] = expected(bench, kind, HIT_PAGES_LG2, iova)
        reference.action[:] = reference.event[:] = 0
        columns = out.columns()

        def call():
            device.translate_batch(KINDS[kind], iova, out=columns)

        misses = device.caches.tlb.misses
        run = checked(call, out, reference, HITS)
        if device.caches.tlb.misses != misses:
            raise AssertionError("a request misses the TLB")
        return run

    return build


def misses_batch(pages_lg2):
    """Call translate_batch for more pages than the TLB holds."""

    def build(bench):
        iova = bench.requests(pages_lg2, "random")
        device = cached(bench, "stage 1", pages_lg2)
        out = Out.empty(len(iova))
        columns = out.columns()
        run = checked(
            lambda: device.translate_batch(SID, iova, out=columns),
            out,
            bench.reference(pages_lg2, "random"),
            len(iova),
        )
        if device.caches.tlb.misses < 0.9 * len(iova):
            raise AssertionError("more than a tenth of the requests hit the TLB")
        return run

    return build


def scalar(name, pages_lg2, *, caches):
    """Call a method of Smmu for one address; each misses, or hits, if there are caches."""

    def build(bench):
        device = cached(bench, "stage 1", pages_lg2) if caches else bench.smmu(pages_lg2)
        method = getattr(device, name)
        iova = scalar_addresses(bench, pages_lg2)
        found = [method(SID, address) for address in iova.tolist()]
        if name == "translate":
            found = [result.pa for result in found]
        if found != bench.image(pages_lg2).expected(iova).tolist():
            raise AssertionError(f"{name}() gives wrong addresses")
        calls = len(iova)
        if caches and pages_lg2 <= HIT_PAGES_LG2:
            device.caches.reset_counters()
            plain(method, iova.tolist())
            if device.caches.tlb.hits != calls:
                raise AssertionError("a request misses the TLB")
        return Run(partial(plain, method, iova.tolist()), calls)

    return build


def scalar_addresses(bench, pages_lg2):
    """Return addresses; where they shall miss, of more pages than the TLB holds."""
    if pages_lg2 <= HIT_PAGES_LG2:
        return bench.image(pages_lg2).random(SCALAR_CALLS)
    return bench.image(pages_lg2).random(1 << 16)


def scalar_ints(pages_lg2):
    """Return a function that gives them as ints."""
    return lambda bench: scalar_addresses(bench, pages_lg2).tolist()


def empty_calls(name, pages_lg2):
    """Call a method that does nothing for the same addresses."""

    def build(bench):
        built = empty(three_integers, name, scalar_ints(pages_lg2))(bench)
        return Run(built.call, len(scalar_addresses(bench, pages_lg2)))

    return build


def _questions():
    for kind in KINDS:
        for order in ("random", "sequential"):
            yield Question(
                f"array, TLB hits, {kind}, {order}",
                "address",
                {BARE: bare(kind, order), f"{LIBRARY} translate_batch(out=)": hits(kind, order)},
                main=kind == "stage 1" and order == "random",
            )
    for label, pages_lg2 in MISS_PAGES_LG2.items():
        yield Question(
            f"array, TLB misses, random, {label} pages",
            "address",
            {
                PLAIN_C: batch_c(pages_lg2, "random"),
                f"{LIBRARY} translate_batch(out=), caches": misses_batch(pages_lg2),
                f"{LIBRARY} translate_batch(out=), none": batch_library(pages_lg2, "random"),
            },
        )
    for name, back in (("translate", "three"), ("pa", "three_int")):
        yield Question(
            f"one address a call, TLB hits, {name}()",
            "call",
            {
                f"{LIBRARY} {name}(), no caches": scalar(name, HIT_PAGES_LG2, caches=False),
                f"{LIBRARY} {name}(), TLB hit": scalar(name, HIT_PAGES_LG2, caches=True),
                "empty method": empty_calls(back, HIT_PAGES_LG2),
            },
            main=name == "translate",
        )
    yield Question(
        "one address a call, TLB misses, 64 K pages",
        "call",
        {
            f"{LIBRARY} translate(), no caches": scalar("translate", 16, caches=False),
            f"{LIBRARY} translate(), TLB miss": scalar("translate", 16, caches=True),
            "empty method": empty_calls("three", 16),
        },
    )


QUESTIONS = tuple(_questions())


def test_cached(measure, question, run):
    """Time one run of a question."""
    measure(question, run)
