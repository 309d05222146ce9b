"""What is measured: questions, each with a baseline and what is compared with it.

bench_translate.py and table.py both take their callables from here. Every run that fills arrays is
compared with the plain C walk before it may be timed.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import baseline
import numpy as np
import workload
from workload import BASE, SID, SID_SUBSTREAMS, STRTAB_LINEAR, STRTAB_TWO_LEVEL, Out

SIZES = {"1 K": 10, "64 K": 16, "1 M": 20, "16 M": 24}

PLAIN_C = "plain C walk"
NUMPY = "numpy walk"
PYTHON = "pure-Python walk, CD decoded before"
LIBRARY = "smmufast"


@dataclass(frozen=True)
class Run:
    """One thing to time: call() does `items` translations (or calls)."""

    call: Callable[[], object]
    items: int


@dataclass(frozen=True)
class Question:
    """A baseline, which comes first, and what is compared with it.

    Attributes
    ----------
    group : str
        What the question is about.
    unit : str
        What one item is.
    runs : dict of str to function
        Each takes a Workbench and returns a Run.
    """

    group: str
    unit: str
    runs: dict[str, Callable[["Workbench"], Run]]


class Workbench:
    """Builds images, baselines and library objects, each once and on demand."""

    def __init__(self):
        self.module = baseline.load()
        workload.check_random(self.module)

    @functools.cache  # noqa: B019
    def image(self, pages_lg2):
        """Return the Image of 2**pages_lg2 pages, on which the baselines have been compared."""
        image = workload.Image(pages_lg2)
        workload.check_image(self.module, image)
        return image

    @functools.cache  # noqa: B019
    def baselines(self, pages_lg2, strtab=STRTAB_LINEAR):
        """Return the Baselines over an image."""
        return workload.Baselines(self.module, self.image(pages_lg2).words, strtab)

    @functools.cache  # noqa: B019
    def smmu(self, pages_lg2, strtab=STRTAB_LINEAR):
        """Return a smmufast.Smmu over the same bytes."""
        from smmufast import Features, Memory, Smmu

        memory = Memory()
        memory.add(self.image(pages_lg2).buffer, BASE)
        return Smmu(memory, features=Features(), strtab_base=strtab[0], strtab_base_cfg=strtab[1])

    @functools.cache  # noqa: B019
    def requests(self, pages_lg2, order):
        """Return the addresses of a batch: 64 K of them, 1 M for tables beyond the caches."""
        n = 1 << 16 if pages_lg2 < 20 else 1 << 20
        return getattr(self.image(pages_lg2), order)(n)

    @functools.cache  # noqa: B019
    def reference(self, pages_lg2, order):
        """Return what the plain C walk makes of requests()."""
        iova = self.requests(pages_lg2, order)
        out = Out.empty(len(iova))
        self.baselines(pages_lg2).c.batch(SID, iova, *out.arrays())
        return out


def checked(call, out, reference, items):
    """Return a Run of call, which fills out, after one call with the right outcome."""
    out.pa[:] = 1
    call()
    if not out.same(reference):
        raise AssertionError("a run disagrees with the plain C walk")
    return Run(call, items)


# ---- one address a call -----------------------------------------------------------------------

SCALAR_PAGES_LG2 = 10
SCALAR_CALLS = 1000


def scalar_addresses(bench):
    """Return addresses whose tables stay in the first-level cache, as ints."""
    return bench.image(SCALAR_PAGES_LG2).random(SCALAR_CALLS).tolist()


def empty(name):
    """Call a method that does nothing."""

    def build(bench):
        addresses = scalar_addresses(bench)
        method = getattr(bench.module.Empty(), name)

        def call():
            for iova in addresses:
                method(SID, iova, 0)

        return Run(call, len(addresses))

    return build


def scalar(name, **keywords):
    """Call a method of Smmu for one address."""

    def build(bench):
        addresses = scalar_addresses(bench)
        method = getattr(bench.smmu(SCALAR_PAGES_LG2), name)
        expected = bench.image(SCALAR_PAGES_LG2).expected(np.array(addresses, np.uint64)).tolist()
        for iova, pa in zip(addresses, expected, strict=True):
            result = method(SID, iova, **keywords)
            if getattr(result, "pa", result) != pa:
                raise AssertionError(f"{name} translates {iova:#x} to {result}, not {pa:#x}")

        if keywords:

            def call():
                for iova in addresses:
                    method(SID, iova, **keywords)

        else:

            def call():
                for iova in addresses:
                    method(SID, iova)

        return Run(call, len(addresses))

    return build


def scalar_c(bench):
    """Decode STE and CD and walk in plain C, from registers on for each address."""
    iova = np.array(scalar_addresses(bench), np.uint64)
    out, reference = Out.empty(len(iova)), Out.empty(len(iova))
    baselines = bench.baselines(SCALAR_PAGES_LG2)
    baselines.c.batch(SID, iova, *reference.arrays())
    return checked(
        lambda: baselines.c.one_by_one(SID, iova, *out.arrays()), out, reference, len(iova)
    )


def scalar_python(bench):
    """Walk in pure Python with a context decoded before."""
    addresses = scalar_addresses(bench)
    iova = np.array(addresses, np.uint64)
    out, reference = Out.empty(len(iova)), Out.empty(len(iova))
    baselines = bench.baselines(SCALAR_PAGES_LG2)
    baselines.c.batch(SID, iova, *reference.arrays())
    context = baselines.configure(SID)
    return checked(lambda: baselines.python(context, addresses, out), out, reference, len(iova))


def host_driven(bench):
    """Drive start_walk(): fetch what it requests, supply it, until there is a result."""
    addresses = scalar_addresses(bench)
    image = bench.image(SCALAR_PAGES_LG2)
    start_walk = bench.smmu(SCALAR_PAGES_LG2).start_walk
    data = memoryview(image.buffer)

    def translate(iova):
        walk = start_walk(SID, iova)
        while (fetch := walk.request) is not None:
            offset = fetch.address - BASE
            walk.supply(data[offset : offset + fetch.size])
        return walk.result

    for iova, pa in zip(
        addresses, image.expected(np.array(addresses, np.uint64)).tolist(), strict=True
    ):
        if translate(iova).pa != pa:
            raise AssertionError(f"start_walk() translates {iova:#x} wrongly")

    def call():
        for iova in addresses:
            translate(iova)

    return Run(call, len(addresses))


# ---- arrays -----------------------------------------------------------------------------------


def batch_c(pages_lg2, order):
    """Walk an array in plain C."""

    def build(bench):
        iova = bench.requests(pages_lg2, order)
        out = Out.empty(len(iova))
        c = bench.baselines(pages_lg2).c
        return checked(
            lambda: c.batch(SID, iova, *out.arrays()),
            out,
            bench.reference(pages_lg2, order),
            len(iova),
        )

    return build


def batch_numpy(pages_lg2, order):
    """Walk an array with numpy."""

    def build(bench):
        iova = bench.requests(pages_lg2, order)
        out = Out.empty(len(iova))
        baselines = bench.baselines(pages_lg2)
        context = baselines.configure(SID)
        return checked(
            lambda: baselines.numpy(context, iova, out),
            out,
            bench.reference(pages_lg2, order),
            len(iova),
        )

    return build


def batch_python(pages_lg2, order, n=2000):
    """Walk the first n addresses of an array in pure Python, into lists."""

    def build(bench):
        iova = bench.requests(pages_lg2, order)[:n].tolist()
        whole = bench.reference(pages_lg2, order)
        reference = Out(whole.pa[:n], whole.action[:n], whole.event[:n])
        baselines = bench.baselines(pages_lg2)
        context = baselines.configure(SID)
        out = Out([1] * n, [1] * n, [1] * n)

        def call():
            baselines.python(context, iova, out)

        call()
        if not out.same(reference):
            raise AssertionError("the pure-Python walk disagrees with the plain C walk")
        return Run(call, n)

    return build


def batch_library(pages_lg2, order, *, with_out=True):
    """Walk an array with Smmu.translate_batch."""

    def build(bench):
        iova = bench.requests(pages_lg2, order)
        out = Out.empty(len(iova))
        columns = out.columns()
        smmu = bench.smmu(pages_lg2)
        reference = bench.reference(pages_lg2, order)
        if with_out:
            return checked(
                lambda: smmu.translate_batch(SID, iova, out=columns), out, reference, len(iova)
            )
        result = smmu.translate_batch(SID, iova)
        if not Out(result["pa"], result["action"], result["event"]).same(reference):
            raise AssertionError("translate_batch() disagrees with the plain C walk")
        return Run(lambda: smmu.translate_batch(SID, iova), len(iova))

    return build


# ---- configuration lookups --------------------------------------------------------------------

STREAM_PAGES_LG2 = 10
STREAM_REQUESTS = 1 << 14


def streams(kind, *, library):
    """Give every request a StreamID (and SubstreamID): all the same, or never twice in a row."""

    def build(bench):
        n = STREAM_REQUESTS
        strtab = STRTAB_TWO_LEVEL if kind == "two-level" else STRTAB_LINEAR
        iova = bench.image(STREAM_PAGES_LG2).random(n)
        sid = np.full(n, SID, np.uint32)
        ssid = None
        numbers = np.arange(n, dtype=np.uint32) * np.uint32(37)
        if kind in ("linear", "two-level"):
            sid = numbers % np.uint32(1 << workload.STREAMS_LG2)
            sid[sid == SID_SUBSTREAMS] = SID
        elif kind == "substreams":
            sid[:] = SID_SUBSTREAMS
            ssid = numbers % np.uint32(1 << workload.SUBSTREAMS_LG2)
        out, reference = Out.empty(n), Out.empty(n)
        c = bench.baselines(STREAM_PAGES_LG2, strtab).c
        c.requests(sid, ssid, iova, *reference.arrays())
        if not np.array_equal(reference.pa, bench.image(STREAM_PAGES_LG2).expected(iova)):
            raise AssertionError("the plain C walk finds wrong addresses")
        if library:
            smmu = bench.smmu(STREAM_PAGES_LG2, strtab)
            columns = out.columns()

            def call():
                smmu.translate_batch(sid, iova, ssid=ssid, out=columns)

        else:

            def call():
                c.requests(sid, ssid, iova, *out.arrays())

        return checked(call, out, reference, n)

    return build


# ---- ranges -----------------------------------------------------------------------------------

RANGE_PAGES_LG2 = 16
RANGE_PAGES = 4096


def range_c(bench):
    """Walk the first address of every page of a range in plain C."""
    iova = bench.image(RANGE_PAGES_LG2).sequential(RANGE_PAGES)
    out, reference = Out.empty(len(iova)), Out.empty(len(iova))
    bench.baselines(RANGE_PAGES_LG2).c.one_by_one(SID, iova, *reference.arrays())
    c = bench.baselines(RANGE_PAGES_LG2).c
    return checked(lambda: c.batch(SID, iova, *out.arrays()), out, reference, len(iova))


def range_library(bench):
    """Translate the same range with Smmu.translate_range: its pages do not merge."""
    first = int(bench.image(RANGE_PAGES_LG2).sequential(1)[0])
    size = RANGE_PAGES << 12
    translate_range = bench.smmu(RANGE_PAGES_LG2).translate_range
    found = len(translate_range(SID, first, size))
    if not RANGE_PAGES * 0.9 < found <= RANGE_PAGES:
        raise AssertionError(f"translate_range() finds {found} segments")
    return Run(lambda: translate_range(SID, first, size), RANGE_PAGES)


def _questions():
    yield Question(
        "one address a call, an object back",
        "call",
        {
            "empty method, an object": empty("three"),
            LIBRARY + " translate()": scalar("translate"),
            "plain C: STE, CD and walk": scalar_c,
            PYTHON: scalar_python,
        },
    )
    yield Question(
        "one address a call, an int back",
        "call",
        {"empty method, an int": empty("three_int"), LIBRARY + " pa()": scalar("pa")},
    )
    yield Question(
        "one address a call, every fetch seen",
        "call",
        {
            PYTHON: scalar_python,
            LIBRARY + " translate(trace=True)": scalar("translate", trace=True),
            LIBRARY + " start_walk()": host_driven,
        },
    )
    for order in ("random", "sequential"):
        for label, pages_lg2 in SIZES.items():
            runs = {
                PLAIN_C: batch_c(pages_lg2, order),
                LIBRARY + " translate_batch(out=)": batch_library(pages_lg2, order),
            }
            if order == "random" and label == "64 K":
                runs[LIBRARY + " translate_batch()"] = batch_library(
                    pages_lg2, order, with_out=False
                )
            runs[NUMPY] = batch_numpy(pages_lg2, order)
            if label == "64 K":
                runs[PYTHON] = batch_python(pages_lg2, order)
            yield Question(f"array, {order}, {label} pages", "address", runs)
    yield Question(
        "array, random, 64 K pages, 1 in 8 unmapped",
        "address",
        {
            PLAIN_C: batch_c(16, "partly_unmapped"),
            LIBRARY + " translate_batch(out=)": batch_library(16, "partly_unmapped"),
            NUMPY: batch_numpy(16, "partly_unmapped"),
        },
    )
    for kind, label in (
        ("same", "one stream"),
        ("linear", "changing streams, linear table"),
        ("two-level", "changing streams, two-level table"),
        ("substreams", "changing substreams, two-level table"),
    ):
        yield Question(
            f"array of (sid, iova), {label}",
            "address",
            {
                PLAIN_C: streams(kind, library=False),
                LIBRARY + " translate_batch(out=)": streams(kind, library=True),
            },
        )
    yield Question(
        f"range of {RANGE_PAGES} pages",
        "page",
        {PLAIN_C: range_c, LIBRARY + " translate_range()": range_library},
    )


QUESTIONS = tuple(_questions())
