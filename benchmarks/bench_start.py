"""What a fresh interpreter costs: an import, against numpy's, and the start of the command."""

import resource
import subprocess
import sys

from questions import LIBRARY, Question, Run


def children_seconds():
    """Return the processor time in seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def interpreter(*arguments):
    """Start an interpreter and wait for its end."""

    def build(_bench):
        def call():
            subprocess.run([sys.executable, "-P", *arguments], check=True, capture_output=True)

        return Run(call, 1)

    return build


QUESTIONS = (
    Question(
        "import in a fresh interpreter",
        "process",
        {
            "import numpy": interpreter("-c", "import numpy"),
            f"from {LIBRARY} import Smmu": interpreter("-c", f"from {LIBRARY} import Smmu"),
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
