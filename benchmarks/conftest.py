r"""Benchmarks of smmufast, each against a baseline that is measured in the same run.

With the package installed (and the `test` extra), from the repository's root::

    pytest benchmarks -o python_files='bench_*.py' --benchmark-timer=time.process_time \
        --benchmark-columns=min,median,iqr,rounds

or only some of it::

    pytest benchmarks -o python_files='bench_*.py' -k 'random and 64'

Each group is one question. A row's time is that of a whole call; extra_info (in --benchmark-json)
has how many translations that is. Processor time leaves out what other processes took. The rows of
a group are timed one after the other, so the figures to quote, which are ratios, come from another
command, which interleaves what it compares::

    python benchmarks/table.py

Before anything is timed, the three baselines (plain C, numpy, pure Python) must agree on random
tables and random contexts, and everything timed must agree with the plain C walk. The compiled
baselines are built into build/benchmarks with the library's own compiler flags.
"""

import pytest
from questions import Workbench


@pytest.fixture(scope="session")
def bench():
    """Images, baselines and library objects."""
    return Workbench()


@pytest.fixture(scope="session")
def empty(bench):
    """An object whose methods three, three_int and three_none do nothing."""
    return bench.module.Empty()
