"""Stage 2, alone and under stage 1: one address, arrays."""

from functools import partial

import numpy as np
from bench_translate import SCALAR_CALLS, empty, three_integers
from questions import LIBRARY, Question, Run, checked
from workload import DATA_IPA, IOVA_BASE, NESTED_SID, STAGE2_SID, Out

PLAIN_C = "plain C walk of both stages"
PLAIN_C_STAGE2 = "plain C walk of stage 2"
PYTHON = "pure-Python walk, CD decoded before"

SIZES = {"16 K": 14, "16 M": 24}
SCALAR_PAGES_LG2 = 10


def requests(bench, sid, pages_lg2, n=None):
    """Return addresses of a batch, at random: 64 K, 256 K for tables beyond the caches."""
    n = n or (1 << 16 if pages_lg2 < 20 else 1 << 18)
    iova = bench.nested_image(pages_lg2).random(n)
    if sid == STAGE2_SID:
        iova -= np.uint64(IOVA_BASE - DATA_IPA)
    return iova


def reference(bench, sid, pages_lg2, iova):
    """Return what the image is known to make of mapped addresses."""
    out = Out.empty(len(iova))
    image = bench.nested_image(pages_lg2)
    out.pa[:] = image.expected(iova, stage2_only=sid == STAGE2_SID)
    out.action[:] = out.event[:] = 0
    return out


def batch_c(sid, pages_lg2):
    """Walk an array in plain C."""

    def build(bench):
        iova = requests(bench, sid, pages_lg2)
        out = Out.empty(len(iova))
        c = bench.nested_baselines(pages_lg2).c
        return checked(
            lambda: c.batch(sid, iova, *out.arrays()),
            out,
            reference(bench, sid, pages_lg2, iova),
            len(iova),
        )

    return build


def batch_python(sid, pages_lg2, n=1000):
    """Walk the first n addresses of an array in pure Python, into lists."""

    def build(bench):
        iova = requests(bench, sid, pages_lg2)[:n]
        addresses = iova.tolist()
        baselines = bench.nested_baselines(pages_lg2)
        stages = baselines.configure(sid)
        out = Out([1] * n, [1] * n, [1] * n)

        def call():
            baselines.python(stages, addresses, out)

        call()
        if not out.same(reference(bench, sid, pages_lg2, iova)):
            raise AssertionError("the pure-Python walk gives wrong addresses")
        return Run(call, n)

    return build


def batch_library(sid, pages_lg2):
    """Walk an array with Smmu.translate_batch."""

    def build(bench):
        iova = requests(bench, sid, pages_lg2)
        out = Out.empty(len(iova))
        columns = out.columns()
        smmu = bench.nested_smmu(pages_lg2)
        return checked(
            lambda: smmu.translate_batch(sid, iova, out=columns),
            out,
            reference(bench, sid, pages_lg2, iova),
            len(iova),
        )

    return build


def scalar_c(sid):
    """Decode STE and CD and walk in plain C, from registers on for each address."""

    def build(bench):
        iova = requests(bench, sid, SCALAR_PAGES_LG2, SCALAR_CALLS)
        out = Out.empty(len(iova))
        c = bench.nested_baselines(SCALAR_PAGES_LG2).c
        return checked(
            lambda: c.batch(sid, iova, *out.arrays(), each=True),
            out,
            reference(bench, sid, SCALAR_PAGES_LG2, iova),
            len(iova),
        )

    return build


def of_stream(method, sid, addresses):
    """Call a method for each address."""
    for iova in addresses:
        method(sid, iova)


def scalar_library(sid):
    """Call Smmu.translate for one address."""

    def build(bench):
        iova = requests(bench, sid, SCALAR_PAGES_LG2, SCALAR_CALLS)
        translate = bench.nested_smmu(SCALAR_PAGES_LG2).translate
        wanted = reference(bench, sid, SCALAR_PAGES_LG2, iova).pa.tolist()
        if [translate(sid, address).pa for address in iova.tolist()] != wanted:
            raise AssertionError("translate() gives wrong addresses")
        return Run(partial(of_stream, translate, sid, iova.tolist()), SCALAR_CALLS)

    return build


def _questions():
    for label, pages_lg2 in SIZES.items():
        yield Question(
            f"array, both stages, random, {label} pages",
            "address",
            {
                PLAIN_C: batch_c(NESTED_SID, pages_lg2),
                f"{LIBRARY} translate_batch(out=)": batch_library(NESTED_SID, pages_lg2),
                PYTHON: batch_python(NESTED_SID, pages_lg2),
            },
            main=True,
        )
    for label, pages_lg2 in SIZES.items():
        yield Question(
            f"array, stage 2 alone, random, {label} pages",
            "address",
            {
                PLAIN_C_STAGE2: batch_c(STAGE2_SID, pages_lg2),
                f"{LIBRARY} translate_batch(out=)": batch_library(STAGE2_SID, pages_lg2),
                PYTHON: batch_python(STAGE2_SID, pages_lg2),
            },
        )
    for sid, label in ((NESTED_SID, "both stages"), (STAGE2_SID, "stage 2 alone")):
        yield Question(
            f"one address a call, {label}",
            "call",
            {
                "plain C: STE, CD and walk, in a C loop": scalar_c(sid),
                f"{LIBRARY} translate()": scalar_library(sid),
                "empty method, an object": empty(three_integers, "three"),
            },
        )


QUESTIONS = tuple(_questions())


def test_nested(measure, question, run):
    """Time one run of a question."""
    measure(question, run)
