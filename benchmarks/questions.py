"""What a question is, and what the questions of the bench_*.py files share.

Each bench_*.py has QUESTIONS: what is measured, beside the baseline that it is measured against.
pytest-benchmark (conftest.py) and table.py both take their callables from there.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import baseline
import workload
from workload import SID, STRTAB_LINEAR, STRTAB_NESTED, Out, Run, smmu

LIBRARY = "smmufast"


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
        Each takes a Workbench and returns a Run whose outcome has been checked.
    main : bool
        Whether it is among the first that a reader looks for.
    clock : function
        Returns processor time in seconds.
    """

    group: str
    unit: str
    runs: dict[str, Callable[["Workbench"], Run]]
    main: bool = False
    clock: Callable[[], float] = time.process_time


class Workbench:
    """Builds images, baselines and library objects, each once and on demand."""

    def __init__(self):
        self.module = baseline.load("_baseline", "baseline_walk")
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
        return smmu(self.image(pages_lg2), strtab)

    @functools.cache  # noqa: B019
    def nested_module(self):
        """Return _nested."""
        return baseline.load("_nested", "baseline_nested")

    @functools.cache  # noqa: B019
    def nested_image(self, pages_lg2):
        """Return the NestedImage of 2**pages_lg2 pages, on which the baselines agree."""
        image = workload.NestedImage(pages_lg2)
        workload.check_nested(self.nested_module(), image)
        return image

    @functools.cache  # noqa: B019
    def nested_baselines(self, pages_lg2):
        """Return the NestedBaselines over an image."""
        return workload.NestedBaselines(self.nested_module(), self.nested_image(pages_lg2).words)

    @functools.cache  # noqa: B019
    def nested_smmu(self, pages_lg2):
        """Return a smmufast.Smmu over the same bytes."""
        return smmu(self.nested_image(pages_lg2), STRTAB_NESTED)

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
