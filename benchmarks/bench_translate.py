"""Translations: one address, arrays, changing streams, ranges, host-driven walks."""

from functools import partial
from itertools import repeat

import numpy as np
import workload
from questions import LIBRARY, Question, Run, checked
from workload import BASE, SID, SID_SUBSTREAMS, STRTAB_LINEAR, STRTAB_TWO_LEVEL, Out

SIZES = {"1 K": 10, "64 K": 16, "1 M": 20, "16 M": 24}

PLAIN_C = "plain C walk"
NUMPY = "numpy walk, CD decoded before"
PYTHON = "pure-Python walk, CD decoded before"


# ---- one address a call -----------------------------------------------------------------------

SCALAR_PAGES_LG2 = 10
SCALAR_CALLS = 1000


def scalar_addresses(bench):
    """Return addresses whose tables stay in the first-level cache, as ints."""
    return bench.image(SCALAR_PAGES_LG2).random(SCALAR_CALLS).tolist()


def scalar_expected(bench):
    """Return their output addresses."""
    image = bench.image(SCALAR_PAGES_LG2)
    return image.expected(image.random(SCALAR_CALLS)).tolist()


def nothing(addresses):
    """Take each address: what the loops below cost by themselves."""
    for _ in addresses:
        pass


def three_integers(method, addresses):
    """Call a method that takes three integers."""
    for iova in addresses:
        method(SID, iova, 0)


def plain(method, addresses):
    """Call a method for each address of one stream."""
    for iova in addresses:
        method(SID, iova)


def traced(method, addresses):
    """Ask for the fetches too, each of which is an object."""
    for iova in addresses:
        method(SID, iova, trace=True).fetches  # noqa: B018


def by_stream(method, requests):
    """Call a method for each pair of StreamID and address."""
    for sid, iova in requests:
        method(sid, iova)


def three_integers_by_stream(method, requests):
    """Call a method that takes three integers."""
    for sid, iova in requests:
        method(sid, iova, 0)


def scalar_requests(bench):
    """Return pairs: the addresses, each with another StreamID than the ones before."""
    return list(zip(stream_numbers(SCALAR_CALLS).tolist(), scalar_addresses(bench), strict=True))


def empty(loop, name, requests=scalar_addresses):
    """Call a method that does nothing."""

    def build(bench):
        method = getattr(bench.module.Empty(), name)
        return Run(partial(loop, method, requests(bench)), SCALAR_CALLS)

    return build


def loop_alone(bench):
    """Call nothing."""
    return Run(partial(nothing, scalar_addresses(bench)), SCALAR_CALLS)


def scalar(loop, name, requests=scalar_addresses):
    """Call a method of Smmu for one address."""

    def build(bench):
        method = getattr(bench.smmu(SCALAR_PAGES_LG2), name)
        found = []

        def kept(*arguments, **keywords):
            result = method(*arguments, **keywords)
            found.append(getattr(result, "pa", result))
            return result

        loop(kept, requests(bench))
        if found != scalar_expected(bench):
            raise AssertionError(f"{name}() gives wrong addresses")
        return Run(partial(loop, method, requests(bench)), SCALAR_CALLS)

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
    start_walk = bench.smmu(SCALAR_PAGES_LG2).start_walk
    addresses = scalar_addresses(bench)
    data = memoryview(bench.image(SCALAR_PAGES_LG2).buffer)

    def translate(iova):
        walk = start_walk(SID, iova)
        while (fetch := walk.request) is not None:
            offset = fetch.address - BASE
            walk.supply(data[offset : offset + fetch.size])
        return walk.result

    if [translate(iova).pa for iova in addresses] != scalar_expected(bench):
        raise AssertionError("start_walk() gives wrong addresses")

    def call():
        for iova in addresses:
            translate(iova)

    return Run(call, SCALAR_CALLS)


def host_alone(bench):
    """Only read what start_walk() would request: what the host's own part of it costs."""
    translate = bench.smmu(SCALAR_PAGES_LG2).translate
    walks = [translate(SID, iova, trace=True).fetches for iova in scalar_addresses(bench)]
    data = memoryview(bench.image(SCALAR_PAGES_LG2).buffer)

    def read(fetches):
        for fetch in fetches:
            offset = fetch.address - BASE
            data[offset : offset + fetch.size]

    def call():
        for fetches in walks:
            read(fetches)

    return Run(call, SCALAR_CALLS)


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


def batch_library(pages_lg2, order):
    """Walk an array with Smmu.translate_batch."""

    def build(bench):
        iova = bench.requests(pages_lg2, order)
        out = Out.empty(len(iova))
        columns = out.columns()
        smmu = bench.smmu(pages_lg2)
        return checked(
            lambda: smmu.translate_batch(SID, iova, out=columns),
            out,
            bench.reference(pages_lg2, order),
            len(iova),
        )

    return build


def short_batch(n, out):
    """Call Smmu.translate_batch for an array of n addresses: what a call costs.

    `out` is "dict", "rows" for a structured array, or None for a new array.
    """

    def build(bench):
        translate_batch = bench.smmu(SCALAR_PAGES_LG2).translate_batch
        iova = bench.image(SCALAR_PAGES_LG2).random(n)
        expected = scalar_expected(bench)[:n]
        filled = Out.empty(n).columns()
        if out == "rows":
            filled = np.ones(n, [(name, column.dtype) for name, column in filled.items()])
        if out is None:

            def call():
                for _ in repeat(None, SCALAR_CALLS):
                    translate_batch(SID, iova)

        else:

            def call():
                for _ in repeat(None, SCALAR_CALLS):
                    translate_batch(SID, iova, out=filled)

        for result in (translate_batch(SID, iova), translate_batch(SID, iova, out=filled)):
            if result["pa"].tolist() != expected:
                raise AssertionError("translate_batch() gives wrong addresses")
        return Run(call, SCALAR_CALLS)

    return build


# ---- configuration lookups --------------------------------------------------------------------

STREAM_PAGES_LG2 = 10
STREAM_REQUESTS = 1 << 14


def stream_numbers(n):
    """Return n StreamIDs whose streams are alike; each comes again after all the others."""
    sid = np.arange(n, dtype=np.uint32) * np.uint32(37) % np.uint32(1 << workload.STREAMS_LG2)
    sid[sid == SID_SUBSTREAMS] = SID
    return sid


def streams(kind, *, library):
    """Give every request a StreamID (and SubstreamID): all the same, or never twice in a row."""

    def build(bench):
        n = STREAM_REQUESTS
        strtab = STRTAB_TWO_LEVEL if kind == "two-level" else STRTAB_LINEAR
        iova = bench.image(STREAM_PAGES_LG2).random(n)
        sid = np.full(n, SID, np.uint32)
        ssid = None
        if kind in ("linear", "two-level"):
            sid = stream_numbers(n)
        elif kind == "substreams":
            sid[:] = SID_SUBSTREAMS
            ssid = np.arange(n, dtype=np.uint32) * np.uint32(37)
            ssid %= np.uint32(1 << workload.SUBSTREAMS_LG2)
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
            "empty method, an object": empty(three_integers, "three"),
            f"{LIBRARY} translate()": scalar(plain, "translate"),
            "plain C: STE, CD and walk, in a C loop": scalar_c,
            PYTHON: scalar_python,
            "the Python loop alone": loop_alone,
        },
        main=True,
    )
    yield Question(
        "one address a call, an int back",
        "call",
        {
            "empty method, an int": empty(three_integers, "three_int"),
            f"{LIBRARY} pa()": scalar(plain, "pa"),
        },
    )
    yield Question(
        "one address a call, changing streams, an object back",
        "call",
        {
            "empty method, an object": empty(three_integers_by_stream, "three", scalar_requests),
            f"{LIBRARY} translate()": scalar(by_stream, "translate", scalar_requests),
        },
    )
    yield Question(
        "one address a call, every fetch seen",
        "call",
        {
            PYTHON: scalar_python,
            f"{LIBRARY} translate(trace=True)": scalar(traced, "translate"),
            f"{LIBRARY} start_walk()": host_driven,
            "the host's part of start_walk() alone": host_alone,
        },
    )
    for order in ("random", "sequential"):
        for label, pages_lg2 in SIZES.items():
            yield Question(
                f"array, {order}, {label} pages",
                "address",
                {
                    PLAIN_C: batch_c(pages_lg2, order),
                    f"{LIBRARY} translate_batch(out=)": batch_library(pages_lg2, order),
                    NUMPY: batch_numpy(pages_lg2, order),
                    PYTHON: batch_python(pages_lg2, order),
                },
                main=order == "random" and label in ("64 K", "16 M"),
            )
    yield Question(
        "array, random, 64 K pages, 1 in 8 unmapped",
        "address",
        {
            PLAIN_C: batch_c(16, "partly_unmapped"),
            f"{LIBRARY} translate_batch(out=)": batch_library(16, "partly_unmapped"),
            NUMPY: batch_numpy(16, "partly_unmapped"),
        },
    )
    for n, label in (1, "one address"), (64, "64 addresses"):
        yield Question(
            f"array of {label}",
            "call",
            {
                "empty method, an object": empty(three_integers, "three"),
                f"{LIBRARY} translate_batch(out=), rows": short_batch(n, "rows"),
                f"{LIBRARY} translate_batch(out=), dict": short_batch(n, "dict"),
                f"{LIBRARY} translate_batch()": short_batch(n, None),
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
                f"{LIBRARY} translate_batch(out=)": streams(kind, library=True),
            },
        )
    yield Question(
        f"range of {RANGE_PAGES} pages",
        "page",
        {PLAIN_C: range_c, f"{LIBRARY} translate_range()": range_library},
    )


QUESTIONS = tuple(_questions())


def test_translation(measure, question, run):
    """Time one run of a question."""
    measure(question, run)
