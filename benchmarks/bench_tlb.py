"""TLB probes that all hit, in a batch loop, beside a bare probe of four ways in plain C."""

import functools

import baseline
import numpy as np
from questions import LIBRARY, Question, Run

ENTRIES = 4096
PROBES = 1 << 14
FIRST_PAGE = 0x1234_0000
ASID = 5
POLICIES = {"LRU": "lru", "PLRU": "plru", "FIFO": "fifo", "random replacement": "random"}


@functools.cache
def module():
    """Return _probe, compiled against the package."""
    import smmufast

    return baseline.load("_probe", "baseline_probe", package=smmufast.get_include())


@functools.cache
def mapping():
    """Return the pages and where they go, in the order in which they are filled."""
    pages = FIRST_PAGE + np.random.default_rng(1).permutation(ENTRIES).astype(np.uint64)
    return pages << np.uint64(12), np.arange(1, ENTRIES + 1, dtype=np.uint64) << np.uint64(20)


@functools.cache
def requests(order):
    """Return addresses within the pages."""
    generator = np.random.default_rng(2)
    pages = generator.integers(0, ENTRIES, PROBES, np.uint64)
    if order == "sequential":
        pages = np.arange(PROBES, dtype=np.uint64) % np.uint64(ENTRIES)
    offsets = generator.integers(0, 1 << 12, PROBES, np.uint64)
    return (np.uint64(FIRST_PAGE) + pages << np.uint64(12)) | offsets


@functools.cache
def expected(order):
    """Return where they go, worked out with numpy."""
    starts, outputs = mapping()
    sort = np.argsort(starts)
    iova = requests(order)
    return outputs[sort][(iova >> np.uint64(12)) - np.uint64(FIRST_PAGE)] | iova & np.uint64(0xFFF)


def checked(call, out, order):
    """Return a Run of call, which fills out, after one call with the right outcome."""
    out[:] = 1
    if call() != PROBES or (out != expected(order)).any():
        raise AssertionError("a probe gives a wrong address")
    return Run(call, PROBES)


def bare(order):
    """Probe tags of one word, four to a set, and read an output of one word."""

    def build(_bench):
        tags = np.full(ENTRIES, 2**64 - 1, np.uint64)
        probe = module().Bare(tags, np.zeros_like(tags))
        for start, output in zip(*map(np.ndarray.tolist, mapping()), strict=True):
            probe.fill(start, output)
        iova, out = requests(order), np.empty(PROBES, np.uint64)
        return checked(lambda: probe.batch(iova, out), out, order)

    return build


def library(order, policy, ways=4):
    """Probe the TLB of Caches: tags, replacement state and counters of an SMMU."""

    def build(_bench):
        from smmufast._engine.tlb import Caches, TlbEntry

        caches = Caches(tlb=(ENTRIES // ways, ways, policy))
        for start, output in zip(*map(np.ndarray.tolist, mapping()), strict=True):
            caches.fill(TlbEntry(start, output, asid=ASID))
        batch = module().batch
        iova, out = requests(order), np.empty(PROBES, np.uint64)
        return checked(lambda: batch(caches, iova, out, ASID), out, order)

    return build


def _questions():
    for order in ("random", "sequential"):
        runs = {"bare probe in plain C": bare(order)}
        runs |= {f"{LIBRARY}, {name}": library(order, POLICIES[name]) for name in POLICIES}
        runs[f"{LIBRARY}, LRU, 8 ways"] = library(order, "lru", 8)
        yield Question(
            f"TLB hits, {ENTRIES} entries in 4 ways, {order}",
            "probe",
            runs,
            main=order == "random",
        )


QUESTIONS = tuple(_questions())


def test_tlb(measure, question, run):
    """Time loops over addresses."""
    measure(question, run)
