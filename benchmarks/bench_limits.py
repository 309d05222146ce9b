"""The library beside plain C loops that do as little as they can (limits/)."""

import functools
from functools import partial
from itertools import repeat
from pathlib import Path

import baseline
import bench_cached
import bench_pasid
import bench_tables
import bench_tlb
import numpy as np
import workload
from bench_translate import SCALAR_CALLS, empty, scalar_addresses, three_integers
from questions import LIBRARY, Question, Run, checked, smmu
from workload import BASE, NESTED_SID, PAIRS_LG2, SID, STRTAB_LINEAR, STRTAB_NESTED, Out

SIZES = {"1 K": 10, "64 K": 16, "1 M": 20, "16 M": 24}
LARGEST = {"128 M": 27}
SPARSE = "sparse 256 K"
SPARSE_LG2 = 18

KERNELS = {
    "one after another, dependent": "dependent",
    "plain loop, checked": "plain",
    "plain loop, bare": "bare",
    "pipeline, checked": "pipeline",
    "pipeline in two steps, checked": "staged",
    "32 in flight, checked": "flight",
    "vector block, checked": "vector",
    "walk cache in front, checked": "cached",
    "ceiling: leaf entries alone": "ceiling",
}
PORTABLE = ("pipeline", "staged", "flight")

IN_L2 = 16  # log2 of how many leaves are in the second-level cache


@functools.cache
def module():
    """Return _limits."""
    sources = ("limits_walk", "limits_nested", "limits_arrays")
    return baseline.load("_limits", *sources, folder=baseline.HERE / "limits")


@functools.cache
def vectors():
    """Whether the processor has what the vector kernels are made of."""
    wanted = {"avx512f", "avx512dq", "avx512bw", "avx512vl", "bmi2"}
    try:
        return wanted <= set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False


# ---- walks ------------------------------------------------------------------------------------


def table(image):
    """Return the kernels over an image."""
    shape = (image.granule_lg2, image.input_lg2, image.leaf_lg2)
    return module().Table(image.buffer, BASE, image.ttb, *shape)


def random_requests(image):
    """Return addresses of a batch: 64 K of them, 1 M for tables beyond the caches."""
    return image.random(1 << 16 if image.pages_lg2 < 18 else 1 << 20)


def by_expectation(image, iova):
    """Return what mapped addresses become."""
    out = Out.empty(len(iova))
    out.pa[:] = image.expected(iova)
    out.action[:] = out.event[:] = 0
    return out


def walk_c(image, name, iova):
    """Return a Run of a kernel."""
    walks = table(image)
    if name == "ceiling":
        walks.find_entries(iova)
    out = Out.empty(len(iova))
    call = partial(getattr(walks, name), iova, *out.arrays())
    return checked(call, out, by_expectation(image, iova), len(iova))


def walk_library(image, iova, sid=SID, ssid=None):
    """Return a Run of Smmu.translate_batch."""
    out = Out.empty(len(iova))
    call = partial(
        smmu(image, STRTAB_LINEAR).translate_batch, sid, iova, ssid=ssid, out=out.columns()
    )
    return checked(call, out, by_expectation(image, iova), len(iova))


def random_walks(pages_lg2):
    """Return the runs of one working set."""

    def c(name):
        def build(bench):
            image = bench.image(pages_lg2)
            return walk_c(image, name, random_requests(image))

        return build

    def library(bench):
        image = bench.image(pages_lg2)
        return walk_library(image, random_requests(image))

    usable = {label: name for label, name in KERNELS.items() if name != "vector" or vectors()}
    return {label: c(name) for label, name in usable.items()} | {LIBRARY: library}


def in_sequence(stride):
    """Return the runs of addresses a stride apart."""

    def c(bench):
        image = bench.image(IN_L2)
        return walk_c(image, "plain", image.sequential(1 << 16, stride))

    def library(bench):
        image = bench.image(IN_L2)
        return walk_library(image, image.sequential(1 << 16, stride))

    return {"plain loop, checked": c, LIBRARY: library}


@functools.cache
def pairs_image():
    """Return tables in cache, and 1024 pairs of StreamID and SubstreamID that lead to them."""
    return workload.PairsImage(10)


def pairs(mixed):
    """Return a builder: pairs mixed at random, or always the same."""

    def build(_bench):
        image = pairs_image()
        n = 1 << 16
        pair = np.full(n, 3 << PAIRS_LG2 | 7, np.uint32)
        if mixed:
            pair = np.random.default_rng(3).integers(0, 1 << 2 * PAIRS_LG2, n, np.uint32)
        sid, ssid = pair >> np.uint32(PAIRS_LG2), pair & np.uint32((1 << PAIRS_LG2) - 1)
        return walk_library(image, image.random(n), sid, ssid)

    return build


# Shapes of equal depth: granule, input size, leaf.
DEPTHS = {
    "2 levels": {"4 KiB pages": (12, 30, 12), "1 GiB blocks": (12, 48, 30)},
    "3 levels": {
        "4 KiB pages": (12, 39, 12),
        "2 MiB blocks": (12, 48, 21),
        "16 KiB pages": (14, 47, 14),
        "64 KiB pages": (16, 48, 16),
    },
}


@functools.cache
def shaped(shape):
    """Return an image of as many leaves as are in the second-level cache."""
    return workload.Image(IN_L2, *shape)


def shaped_c(shape, name):
    """Return a builder of a kernel over tables of a shape."""

    def build(_bench):
        image = shaped(shape)
        return walk_c(image, name, random_requests(image))

    return build


def shaped_library(shape):
    """Return a builder of the library's batch over tables of a shape."""

    def build(_bench):
        image = shaped(shape)
        return walk_library(image, random_requests(image))

    return build


# ---- nested -----------------------------------------------------------------------------------


def nested_table(image):
    """Return the kernels over a NestedImage."""
    s2ttb = int(image.words[8 * NESTED_SID + 3])
    return module().Nested(image.buffer, BASE, workload.GUEST_IPA + 0x1000, s2ttb)


NESTED_LG2 = IN_L2 - 1  # so that the tables of both stages are as large as those of one


def nested_c(name):
    """Return a builder of a kernel of both stages."""

    def build(bench):
        image = bench.nested_image(NESTED_LG2)
        iova = image.random(1 << 16)
        out = Out.empty(len(iova))
        call = partial(getattr(nested_table(image), name), iova, *out.arrays())
        return checked(call, out, by_expectation(image, iova), len(iova))

    return build


def nested_library(bench):
    """Translate an array through both stages."""
    image = bench.nested_image(NESTED_LG2)
    iova = image.random(1 << 16)
    out = Out.empty(len(iova))
    translate_batch = smmu(image, STRTAB_NESTED).translate_batch
    call = partial(translate_batch, NESTED_SID, iova, out=out.columns())
    return checked(call, out, by_expectation(image, iova), len(iova))


def stage1_library(bench):
    """Translate as many addresses through stage 1 alone."""
    image = bench.image(IN_L2)
    return walk_library(image, random_requests(image))


def stage1_c(bench):
    """Walk them in plain C."""
    image = bench.image(IN_L2)
    return walk_c(image, "plain", random_requests(image))


# ---- tables of pages --------------------------------------------------------------------------


def direct(order, name):
    """Return a builder: probe a direct-mapped table of as many entries as a TLB's."""

    def build(_bench):
        entries = module().Direct(bench_tlb.ENTRIES)
        for start, output in zip(*map(np.ndarray.tolist, bench_tlb.mapping()), strict=True):
            entries.fill(start, output)
        iova = bench_tlb.requests(order)
        out = np.empty(len(iova), np.uint64)
        return bench_tlb.checked(partial(getattr(entries, name), iova, out), out, order)

    return build


# ---- stores and IDs ---------------------------------------------------------------------------


def leaf_stores(name, size):
    """Return a builder: store a descriptor for each page of some ranges."""

    def build(_bench):
        count = max(1, bench_tables.RANGES * bench_tables.SPAN // size)
        pages = count * size // bench_tables.PAGE
        entries = np.ones(pages, np.uint64)
        pa = bench_tables.PA
        ranges = [(i * size, pa + i * size, size) for i in range(count)]
        call = partial(bench_tables.three, getattr(module().Leaves(entries), name), ranges)
        call()
        wanted = np.arange(pages, dtype=np.uint64) * np.uint64(4096) + np.uint64(pa | 0xE43)
        if not np.array_equal(entries, wanted):
            raise AssertionError("other descriptors than asked for")
        return Run(call, pages)

    return build


ID_COUNT = 1 << 17
NEARLY_FULL = bench_pasid.SIZE * 999 // 1000


def ids(name):
    """Return a builder of a loop over the bitmap in plain C, compared with PasidAllocator."""

    def build(_bench):
        bits, own = module().Bitmap(), bench_pasid.allocator()
        out, wanted = np.zeros(ID_COUNT, np.uint32), np.zeros(ID_COUNT, np.uint32)
        bits.bulk(out[:1])  # there is no ID 0
        if name in ("pairs", "pairs_in"):
            full = np.zeros(NEARLY_FULL, np.uint32)
            if bits.bulk(full) != NEARLY_FULL:
                raise AssertionError("fewer IDs than there are")
            if not np.array_equal(full, own.alloc_many(NEARLY_FULL)):
                raise AssertionError("other IDs than the library's")
            limits = () if name == "pairs" else (NEARLY_FULL + 10, bench_pasid.SIZE - 1)
            call = partial(getattr(bits, name), ID_COUNT, *limits)
            if call() != own.alloc(*limits):
                raise AssertionError("another ID than the library's")
            return Run(call, ID_COUNT)
        take = bits.bulk if name == "bulk" else bits.alloc_each
        take(out)
        if not np.array_equal(out, own.alloc_many(ID_COUNT, out=wanted)):
            raise AssertionError("other IDs than the library's")
        call, back = take, bits.free_each
        if name == "free_each":
            bits.free_each(out)
            call, back = bits.free_each, bits.bulk

        def reset():
            back(out)

        return Run(partial(call, out), ID_COUNT, reset)

    return build


# ---- calls ------------------------------------------------------------------------------------


def with_array(name):
    """Return a builder: call a method that does nothing with an array."""

    def build(_bench):
        method, array = getattr(module().Empty(), name), np.ones(64, np.uint64)

        def call():
            for _ in repeat(None, SCALAR_CALLS):
                method(array)

        return Run(call, SCALAR_CALLS)

    return build


def small_batch(n):
    """Return a builder: call translate_batch(out=) for arrays of n addresses."""

    def build(bench):
        image = bench.image(10)
        iova = image.random(n)
        out = Out.empty(n)
        translate_batch, columns = smmu(image, STRTAB_LINEAR).translate_batch, out.columns()

        def call():
            for _ in repeat(None, SCALAR_CALLS):
                translate_batch(SID, iova, out=columns)

        return checked(call, out, by_expectation(image, iova), SCALAR_CALLS * n)

    return build


def scalar_library(name):
    """Return a builder: call a method of Smmu for one address."""

    def build(bench):
        method = getattr(bench.smmu(10), name)

        def call():
            for iova in addresses:
                method(SID, iova)

        addresses = scalar_addresses(bench)
        return Run(call, SCALAR_CALLS)

    return build


def _questions():
    for label, pages_lg2 in SIZES.items():
        yield Question(f"limits, random, {label} pages", "address", random_walks(pages_lg2))
    for stride in (64, 4096):
        yield Question(f"limits, every {stride} bytes", "address", in_sequence(stride))
    yield Question(
        "limits, streams and substreams",
        "address",
        {f"{LIBRARY}, one pair": pairs(False), f"{LIBRARY}, 1024 pairs mixed": pairs(True)},
    )
    for depth, shapes in DEPTHS.items():
        runs = {}
        for label, shape in shapes.items():
            runs[f"plain loop, checked, {label}"] = shaped_c(shape, "plain")
            runs[f"pipeline, checked, {label}"] = shaped_c(shape, "pipeline")
            if vectors():
                runs[f"vector block, checked, {label}"] = shaped_c(shape, "vector")
            runs[f"{LIBRARY}, {label}"] = shaped_library(shape)
        yield Question(f"limits, shapes of {depth}", "address", runs)
    yield Question(
        "limits, both stages",
        "address",
        {
            "plain loop of both stages, checked": nested_c("plain"),
            "the same, tables of stage 1 found again": nested_c("reuse"),
            "the same, walk caches in front of both": nested_c("cached"),
            "plain loop of stage 1, checked": stage1_c,
            f"{LIBRARY}, both stages": nested_library,
            f"{LIBRARY}, stage 1 alone": stage1_library,
        },
    )
    probes = {
        "4 ways": bench_tlb.bare("random"),
        "direct-mapped": direct("random", "probe"),
    }
    if vectors():
        probes["direct-mapped, by gathers"] = direct("random", "gather")
    yield Question(
        "limits, a table of 4096 pages",
        "probe",
        probes
        | {
            f"{LIBRARY} translate_batch(out=), TLB hits": bench_cached.hits("stage 1", "random"),
        },
    )
    for label, size in (("512 pages", 1 << 21), ("1 GiB", 1 << 30)):
        runs = {"one store for each": leaf_stores("each", size)}
        if vectors():
            runs["one store for eight"] = leaf_stores("vector", size)
        runs[f"{LIBRARY} map()"] = bench_tables.mapping(size, keep=size < 1 << 30)
        yield Question(f"limits, leaf stores, {label}", "page", runs)
    yield Question(
        "limits, IDs from a bitmap",
        "ID",
        {
            "alloc": ids("alloc_each"),
            "free": ids("free_each"),
            "pair, 99.9 % full": ids("pairs"),
            "pair in [min, max], 99.9 % full": ids("pairs_in"),
            "bulk": ids("bulk"),
            f"{LIBRARY} alloc_many(out=)": bench_pasid.bulk_alloc(
                bench_pasid.allocator, bench_pasid.BULKS["512 K"]
            ),
        },
    )
    yield Question(
        "limits, calls from Python",
        "call",
        {
            "empty method, three integers": empty(three_integers, "three_none"),
            "empty method, an int back": empty(three_integers, "three_int"),
            "empty method, an object back": empty(three_integers, "three"),
            "empty method, an array as a typed memoryview": with_array("view"),
            "empty method, an array through numpy's C interface": with_array("array"),
            "empty method, a new array back": with_array("fresh"),
            f"{LIBRARY} translate_batch(out=), one address": small_batch(1),
        },
    )


QUESTIONS = tuple(_questions())


def test_limits(measure, question, run):
    """Time one run of a question."""
    measure(question, run)
