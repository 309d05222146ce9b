"""What a fresh interpreter costs: an import, against numpy's, and the start of the command.

Bytecode is kept in a directory of the benchmark's own, whatever the environment says of it, so
that neither side compiles its sources after the first start.
"""

import functools
import os
import resource
import subprocess
import sys
import tempfile

from questions import LIBRARY, Question, Run


def children_seconds():
    """Return the processor time in seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@functools.cache
def bytecode():
    """Return a directory for bytecode that lasts as long as this process."""
    return tempfile.TemporaryDirectory()


def interpreter(*arguments):
    """Start an interpreter and wait for its end."""

    def build(_bench):
        environment = os.environ | {"PYTHONPYCACHEPREFIX": bytecode().name}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)

        def call():
            subprocess.run(
                [sys.executable, "-P", *arguments],
                check=True,
                capture_output=True,
                env=environment,
            )

        return Run(call, 1)

    return build


QUESTIONS = (
    Question(
        "import in a fresh interpreter",
        "process",
        {
            "import numpy": interpreter("-c", "import numpy"),
            f"import {LIBRARY}": interpreter("-c", f"import {LIBRARY}"),
            f"from {LIBRARY} import Smmu": interpreter("-c", f"from {LIBRARY} import Smmu"),
            f"import {LIBRARY}.iommu": interpreter("-c", f"import {LIBRARY}.iommu"),
        },
        clock=children_seconds,
    ),
    Question(
        "start of the command",
        "process",
        {
            "python -c pass": interpreter("-c", "pass"),
            f"{LIBRARY} --help": interpreter("-m", LIBRARY, "--help"),
        },
        clock=children_seconds,
    ),
)


def test_start(measure, question, run):
    """Time the processor, from a process's start to its end."""
    measure(question, run)
