r"""Benchmarks of smmufast, each against a baseline that is measured in the same run.

The figures to quote are ratios, and they come from a command that interleaves what it compares.
With the package installed (and the `test` extra), from the repository's root::

    python benchmarks/table.py --rounds 15

pytest-benchmark measures the same runs, one after the other, and can save and compare them::

    pytest benchmarks -o python_files='bench_*.py' --benchmark-columns=min,median,iqr,rounds
    pytest benchmarks -o python_files='bench_*.py' -k 'random and 64'
    pytest benchmarks -o python_files='bench_*.py' --benchmark-disable

The last one measures nothing: it makes every check and every run once.

Each group is one question. A row's time is that of a whole call; extra_info (in --benchmark-json)
has how many translations that is. All times are processor time, which leaves out what other
processes took.

Before anything is timed, the three baselines (plain C, numpy, pure Python) must agree on random
tables and random contexts, and everything timed must agree with the plain C walk. The compiled
baselines are built into build/benchmarks with the library's own compiler flags.
"""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # whatever pytest's import mode is

from questions import Workbench


@pytest.fixture(scope="session")
def bench():
    """Images, baselines and library objects."""
    return Workbench()


def pytest_generate_tests(metafunc):
    """Make a test of every run of a module's QUESTIONS."""
    metafunc.parametrize(
        ("question", "run"),
        [
            pytest.param(
                question,
                run,
                id=f"{question.group}: {run}",
                marks=pytest.mark.benchmark(group=question.group, timer=question.clock),
            )
            for question in metafunc.module.QUESTIONS
            for run in question.runs
        ],
    )


@pytest.fixture
def measure(benchmark, bench):
    """Return a function that builds one run of a question, which checks it, and times it."""

    def measure(question, run):
        built = question.runs[run](bench)
        benchmark.name = run
        benchmark.extra_info["items"] = built.items
        benchmark.extra_info["unit"] = question.unit
        if built.reset is None and question.clock is time.process_time:
            benchmark(built.call)
        else:  # each call by itself; and a clock that only child processes advance has no step
            benchmark.pedantic(built.call, setup=built.reset, rounds=15, warmup_rounds=1)

    return measure
