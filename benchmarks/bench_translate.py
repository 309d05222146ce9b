"""Translations: one address, arrays, changing streams, ranges, host-driven walks."""

import pytest
from questions import QUESTIONS

CASES = [
    pytest.param(question, run, id=f"{question.group}: {run}")
    for question in QUESTIONS
    for run in question.runs
]


@pytest.mark.parametrize(("question", "run"), CASES)
def test_translation(benchmark, bench, question, run):
    """Time one run of a question; the workbench has compared its outcome with plain C."""
    built = question.runs[run](bench)
    benchmark.group = question.group
    benchmark.name = run
    benchmark.extra_info["items"] = built.items
    benchmark.extra_info["unit"] = question.unit
    benchmark(built.call)
