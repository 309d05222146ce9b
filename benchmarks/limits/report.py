"""Prints library ÷ limit; a limit is a plain C loop that does as little as it can.

From the repository's root, with the package and its `test` extra installed::

    python benchmarks/limits/report.py

A minute or two and 4 GiB; `--largest 16M` leaves out the larger working sets and takes 1 GiB.
`--only TEXT` asks for the measures that have the text in their names.  `--limits` prints what the
walks of limits_walk.h take by themselves, over every working set.

In each round the library and its limit are timed in turn, in one process on one processor, and a
ratio is taken within the round.  Shown are the medians of the times, the median of the ratios and
their quartiles, the bound and whether the ratio is within it.  Times are processor time of the
process, but for threads, whose time is what passes on the clock.

What the library does not have is left out, with a line that says so.  Where it has a path of
vectors and a portable one, a child process with SMMUFAST_VECTOR=0 measures the portable one.
"""

import argparse
import dataclasses
import functools
import inspect
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from functools import partial
from itertools import repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench_cached
import bench_limits as limits
import bench_pasid
import bench_tables
import Cython
import timing
import workload
from bench_translate import empty, three_integers
from questions import Run, Workbench, smmu
from workload import SID, STRTAB_LINEAR, Out

VARIABLE = "SMMUFAST_VECTOR"
SIZES = {label.replace(" ", ""): lg2 for label, lg2 in (limits.SIZES | limits.LARGEST).items()}

Build = Callable[[Workbench], Run]


@dataclasses.dataclass(frozen=True)
class Row:
    """A measure: what is timed, what it is divided by, and how large that may become.

    Attributes
    ----------
    bound : float or None
        Of the ratio; None where a row only shows.
    bound_ns : float or None
        Of the library's own time, or with `difference` of what it takes more than the limit.
    clock : function
        Returns seconds.
    """

    measure: str
    smmufast: Build
    limit: Build
    bound: float | None
    bound_ns: float | None = None
    difference: bool = False
    clock: Callable[[], float] = time.process_time
    cpus: int = 1


@dataclasses.dataclass(frozen=True)
class Absent:
    """A measure that the library, or the machine, has nothing for."""

    measure: str
    why: str


# ---- what the library has ---------------------------------------------------------------------


@functools.cache
def has_choice():
    """Whether the library reads SMMUFAST_VECTOR: then it has a path of vectors."""
    import smmufast

    modules = Path(smmufast.__file__).parent.rglob("*.so")
    return any(VARIABLE.encode() in module.read_bytes() for module in modules)


@functools.cache
def has_threads():
    """Whether translate_batch takes `threads`."""
    from smmufast import Smmu

    return "threads" in inspect.signature(Smmu.translate_batch).parameters


# ---- builders ---------------------------------------------------------------------------------


def working_sets(largest):
    """Yield the working sets: a name, and a function that returns their image."""
    for label, pages_lg2 in SIZES.items():
        if pages_lg2 <= largest:
            yield label, functools.cache(partial(workload.Image, pages_lg2))
    if largest > SIZES["16M"]:
        sparse = partial(workload.SparseImage, limits.SPARSE_LG2)
        yield limits.SPARSE, functools.cache(sparse)


def library_walk(image):
    """Return a builder of the library's batch over an image."""
    return lambda _bench: limits.walk_library(image(), limits.random_requests(image()))


def kernel_walk(image, *names):
    """Return a builder of the kernel of these that is the fastest here."""

    def build(_bench):
        iova = limits.random_requests(image())
        runs = [limits.walk_c(image(), name, iova) for name in names]
        if len(runs) == 1:
            return runs[0]
        taken = timing.interleaved([partial(timing.elapsed, run, time.process_time, 1)
                                   for run in runs], timing.MIN_ROUNDS)  # fmt: skip
        return runs[min(range(len(runs)), key=lambda i: statistics.median(taken[i]))]

    return build


def threads(count):
    """Return a builder of a batch over tables in DRAM, by so many threads."""

    def build(bench):
        image = bench.image(24)
        iova = image.random(1 << 22)
        out = Out.empty(len(iova))
        translate_batch, columns = smmu(image, STRTAB_LINEAR).translate_batch, out.columns()

        def call():
            translate_batch(SID, iova, out=columns, threads=count)

        call()
        if not out.same(limits.by_expectation(image, iova)):
            raise AssertionError("threads give other results")
        return Run(call, len(iova))

    return build


def pasid(name, fill):
    """Return a builder: call alloc(), free(), or both, with so many IDs allocated."""

    def build(_bench):
        own = bench_pasid.allocator()
        own.alloc_many(fill)
        if name == "pair":
            return Run(partial(bench_pasid.plain, own.alloc, own.free), bench_pasid.CALLS)
        taken = []

        def alloc():
            method = own.alloc
            for _ in repeat(None, bench_pasid.CALLS):
                method()

        def free():
            method = own.free
            for pasid in taken:
                method(pasid)

        first = min(set(range(1, fill + 2)) - set(own))
        taken.extend(range(first, first + bench_pasid.CALLS))
        give, take = partial(own.free_many, taken), partial(own.alloc_many, bench_pasid.CALLS)

        def before_alloc():
            if first in own:
                give()

        def before_free():
            if first not in own:
                take()

        if name == "alloc":
            alloc()
            if len(own) != fill + bench_pasid.CALLS or taken[-1] not in own:
                raise AssertionError("alloc() gives other IDs")
            return Run(alloc, bench_pasid.CALLS, before_alloc)
        before_free()
        free()
        if len(own) != fill:
            raise AssertionError("free() does not free")
        return Run(free, bench_pasid.CALLS, before_free)

    return build


def nothing(name):
    """Return a builder: call methods that take what alloc() and free() take, and do nothing."""

    def build(bench):
        own = bench.module.Empty()
        draw, drop = own.draw, own.drop
        if name == "pair":
            return Run(partial(bench_pasid.plain, draw, drop), bench_pasid.CALLS)
        given = list(range(1, bench_pasid.CALLS + 1))

        def alloc():
            for _ in repeat(None, bench_pasid.CALLS):
                draw()

        def free():
            for pasid in given:
                drop(pasid)

        return Run(alloc if name == "alloc" else free, bench_pasid.CALLS)

    return build


# ---- the rows ---------------------------------------------------------------------------------


def walk_rows(largest):
    """Yield the batches of one path: that which this process has."""
    vector = has_choice() and os.environ.get(VARIABLE) != "0"
    if vector and not limits.vectors():
        yield Absent("batch, vector path", "this processor has no AVX-512")
        return
    for label, image in working_sets(largest):
        kernels = kernel_walk(image, *(("vector",) if vector else limits.PORTABLE))
        path = "vector path" if vector else "portable path"
        yield Row(f"batch, {path}, {label} pages", library_walk(image), kernels, 1.2)


def other_rows(processors):
    """Yield everything else of the table."""
    for stride in (64, 256, 1024, 4096):
        runs = limits.in_sequence(stride)
        c, library = runs.values()
        yield Row(f"batch, in sequence, every {stride} B ÷ plain checked loop", library, c, 0.4)
    yield Row("1024 (sid, ssid) mixed ÷ one pair", limits.pairs(True), limits.pairs(False), 1.4,
              10, difference=True)  # fmt: skip
    for depth, shapes in limits.DEPTHS.items():
        (_, base), *others = shapes.items()
        for label, shape in others:
            yield Row(
                f"{label} ÷ 4 KiB pages, {depth}",
                limits.shaped_library(shape),
                limits.shaped_library(base),
                1.2,
            )
    yield Row("nested 4K over 4K ÷ stage 1 alone, tables in L2", limits.nested_library,
              limits.stage1_library, 3)  # fmt: skip
    yield Row("  plain C: the same with walk caches in front of both", limits.nested_c("cached"),
              limits.stage1_c, None)  # fmt: skip
    yield Row("  plain C: the same with reuse of tables", limits.nested_c("reuse"),
              limits.stage1_c, None)  # fmt: skip
    yield Row("  plain C: the same without", limits.nested_c("plain"), limits.stage1_c, None)
    yield Row("batch, hits in a 4096-entry 4-way TLB ÷ bare 4-way probe",
              bench_cached.hits("stage 1", "random"), bench_cached.bare("stage 1", "random"),
              1.4)  # fmt: skip
    an_object, an_int = empty(three_integers, "three"), empty(three_integers, "three_int")
    yield Row("translate() ÷ empty method, an object back", limits.scalar_library("translate"),
              an_object, 1.8)  # fmt: skip
    yield Row("pa() ÷ empty method, an int back", limits.scalar_library("pa"), an_int, 1.6)
    yield Row("translate_batch(out=) of one request ÷ empty method", limits.small_batch(1),
              an_object, 3)  # fmt: skip
    yield Row("translate_batch(out=) of 64 requests, a request", limits.small_batch(64),
              lambda bench: limits.walk_c(bench.image(10), "plain", bench.image(10).random(64)),
              None, 5)  # fmt: skip
    size = bench_pasid.SIZE
    for label, fill in bench_pasid.FILLS.items():
        if size - fill > bench_pasid.CALLS:
            for name in ("alloc", "free"):
                yield Row(f"PASID {name}, {label} ÷ empty method", pasid(name, fill),
                          nothing(name), 1.7)  # fmt: skip
    yield Row("PASID alloc and free, one ID left ÷ two empty methods", pasid("pair", size - 2),
              nothing("pair"), 1.7)  # fmt: skip
    yield Row(
        "PASIDs in bulk into an array, each",
        bench_pasid.bulk_alloc(bench_pasid.allocator, bench_pasid.BULKS["512 K"]),
        limits.ids("bulk"),
        None,
        0.3,
    )
    stores = "vector" if limits.vectors() else "each"
    for label, run in {"512 at a time": 1 << 21, "8192 at a time": 1 << 25}.items():
        yield Row(f"map 4K pages, {label}, tables there ÷ vector stores",
                  bench_tables.mapping(run, keep=True), limits.leaf_stores(stores, run),
                  2)  # fmt: skip
    yield Row("map 1 GiB of 4K pages, tables to be made ÷ vector stores",
              bench_tables.mapping(1 << 30, keep=False), limits.leaf_stores(stores, 1 << 30),
              2)  # fmt: skip
    if not has_threads():
        yield Absent("two threads ÷ one", "translate_batch has no argument `threads`")
    elif processors < 2:
        yield Absent("two threads ÷ one", "one processor is allowed")
    else:
        yield Row("two threads ÷ one, tables in DRAM", threads(2), threads(1), 0.55,
                  clock=time.perf_counter, cpus=2)  # fmt: skip


# ---- measuring --------------------------------------------------------------------------------


def figures(row, bench, rounds):
    """Return the row of the table."""
    runs = [row.smmufast(bench), row.limit(bench)]
    samplers = []
    for run in runs:
        times = timing.repeats(run, row.clock)
        samplers.append(partial(timing.elapsed, run, row.clock, times))
        samplers[-1] = partial(per_item, samplers[-1], times * run.items)
    own, limit = timing.interleaved(samplers, rounds)
    ratios = [a / b for a, b in zip(own, limit, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    library_ns, limit_ns = (statistics.median(taken) * 1e9 for taken in (own, limit))
    met, bounds = True, []
    if row.bound is not None:
        bounds.append(f"{row.bound:g}")
        met &= ratio <= row.bound
    if row.bound_ns is not None:
        bounds.append(f"{'+' if row.difference else ''}{row.bound_ns:g} ns")
        met &= library_ns - (limit_ns if row.difference else 0) <= row.bound_ns
    verdict = ("met" if met else "**not met**") if bounds else ""
    kernel = getattr(getattr(runs[1].call, "func", None), "__name__", None)
    chosen = f" ({kernel})" if kernel in limits.PORTABLE else ""
    return (
        f"| {row.measure} | {library_ns:.3g} | {limit_ns:.3g}{chosen} | {ratio:.2f}"
        f" | {low:.2f}–{high:.2f} | {', '.join(bounds)} | {verdict} |"
    )


def per_item(sample, items):
    """Return seconds an item."""
    return sample() / items


def print_limits(largest, rounds):
    """Print what each kernel takes, over every working set: medians of rounds, in ns."""
    names = [name for name in limits.KERNELS.values() if name != "vector" or limits.vectors()]
    columns = {}
    for label, image in working_sets(largest):
        iova = limits.random_requests(image())
        runs = [limits.walk_c(image(), name, iova) for name in names]
        counted = [(run, timing.repeats(run, time.process_time)) for run in runs]
        samples = timing.interleaved(
            [partial(per_item, partial(timing.elapsed, run, time.process_time, times),
                     times * run.items) for run, times in counted], rounds)  # fmt: skip
        columns[label] = [statistics.median(taken) * 1e9 for taken in samples]
    print("| pages | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))
    labels = {name: label for label, name in limits.KERNELS.items()}
    for name, row in zip(names, zip(*columns.values(), strict=True), strict=True):
        print(f"| {labels[name]} | " + " | ".join(f"{value:.3g}" for value in row) + " |")


def compiler():
    """Name what compiled the plain C loops: this Python's own compiler, unless CC says other."""
    name = os.environ.get("CC") or sysconfig.get_config_var("CC")
    try:
        done = subprocess.run([*name.split(), "--version"], capture_output=True, text=True)
    except OSError:
        return name
    return done.stdout.splitlines()[0] if done.stdout else name


def pages_lg2(text):
    """Return log2 of a working set's size, of the command line."""
    if text.upper() not in SIZES:
        raise argparse.ArgumentTypeError(f"not one of {', '.join(SIZES)}")
    return SIZES[text.upper()]


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Print library ÷ limit as a Markdown table.")
    parser.add_argument("--rounds", type=int, default=7, help="at least 7 (default 7)")
    parser.add_argument("--only", default="", help="only measures whose name has this text")
    parser.add_argument("--largest", type=pages_lg2, default=SIZES["128M"],
                        help=f"pages of the largest working set: {', '.join(SIZES)}")  # fmt: skip
    parser.add_argument("--cpu", type=int, help="the processor to run on (default: the idlest)")
    parser.add_argument("--limits", action="store_true", help="print the walks in plain C alone")
    parser.add_argument("--walks", action="store_true", help=argparse.SUPPRESS)  # of the child
    options = parser.parse_args()
    rounds = max(options.rounds, timing.MIN_ROUNDS)
    allowed = os.sched_getaffinity(0)
    cpu = timing.idlest_cpu() if options.cpu is None else options.cpu
    if options.limits:
        os.sched_setaffinity(0, {cpu})
        print_limits(options.largest, rounds)
        return 0
    bench = Workbench()
    if not options.walks:
        print(f"{timing.machine()}, Cython {Cython.__version__}, {compiler()};")
        print(f"{rounds} rounds, interleaved, processor time; ns an item.\n")
        print("| measure | library | limit | ratio | quartiles | at most | |")
        print("|---|---:|---:|---:|---:|---:|---|", flush=True)
    absent = []

    def show(rows):
        for row in rows:
            if isinstance(row, Absent):
                absent.append(row)
                continue
            if options.only not in row.measure:
                continue
            os.sched_setaffinity(0, {cpu} if row.cpus == 1 else allowed)
            print(figures(row, bench, rounds), flush=True)

    portable = os.environ.get(VARIABLE) == "0"
    if not has_choice():
        absent.append(Absent("batch, vector path",
                             f"the library has one path: no module reads {VARIABLE}"))  # fmt: skip
    elif portable and not options.walks:
        absent.append(Absent("batch, vector path", f"{VARIABLE} is 0"))
    show(walk_rows(options.largest))
    if options.walks:
        return 0
    if has_choice() and not portable:
        largest = next(name for name, lg2 in SIZES.items() if lg2 == options.largest)
        asked = [*("--rounds", str(rounds), "--only", options.only, "--cpu", str(cpu)),
                 *("--largest", largest, "--walks")]  # fmt: skip
        os.sched_setaffinity(0, allowed)
        done = subprocess.run([sys.executable, "-P", __file__, *asked],
                              env=os.environ | {VARIABLE: "0"})  # fmt: skip
        if done.returncode:
            return done.returncode
    show(other_rows(len(allowed)))
    for row in absent:
        print(f"\nLeft out: {row.measure}: {row.why}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
