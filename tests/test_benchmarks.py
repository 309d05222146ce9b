"""The benchmarks run, agree with each other, and compile their baselines as the library is."""

import ast
import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


def run(*arguments, **environment):
    """Run Python from the repository's root; return its output."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_pytest(*arguments):
    """Run pytest over the benchmarks."""
    return run(
        *("-P", "-m", "pytest", "benchmarks", "-o", "python_files=bench_*.py", "-o", "addopts="),
        *("-q", "-p", "no:cacheprovider", *arguments),
    )


def test_every_run_of_every_question_agrees_with_its_baseline():
    output = run_pytest("--benchmark-disable")
    last = output.strip().splitlines()[-1]
    found = re.fullmatch(r"(\d+) passed in .*", last)  # nothing skipped, deselected or warned about
    assert found, output
    sizes = {
        f"array, {order}, {size} pages"
        for order in ("random", "sequential")
        for size in ("1 K", "64 K", "1 M", "16 M")
    }
    collected = run_pytest("--collect-only", "--import-mode=importlib")
    names = [line for line in collected.splitlines() if "::" in line]
    assert len(names) == int(found[1])
    for group in sizes:
        assert sum(f"[{group}: " in name for name in names) == 4, group


def test_a_run_that_disagrees_is_refused():
    code = """
import numpy as np
import questions
from workload import Out
reference = Out.empty(4)
out = Out.empty(4)
def call():
    out.pa[:] = 1
questions.checked(call, out, reference, 4)
reference.event[3] = 16
try:
    questions.checked(call, out, reference, 4)
except AssertionError as error:
    print(error)
"""
    output = run(
        "-P",
        "-c",
        code,
        PYTHONPATH=os.pathsep.join(
            [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    )
    assert output == "a run disagrees with the plain C walk\n"


def test_the_table_has_a_row_for_every_run(tmp_path):
    file = tmp_path / "table.md"
    printed = run("benchmarks/table.py", "--rounds=7", "--only=PASID look-up", f"--markdown={file}")
    assert file.read_text(encoding="utf-8") == printed
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5
    assert rows[2][0] == "| PASID look-up; per call"
    for row in rows[3:]:
        assert re.fullmatch(r"(\*\*)?\d+\.\d\d(\*\*)? \(\d+\.\d\d–\d+\.\d\d\)", row[4]), row


def constants(path):
    """Return the constants of a script, worked out without running the rest of it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {"os": os}
    for node in tree.body:
        if isinstance(node, ast.Assign) and node.targets[0].id.isupper():
            code = compile(ast.Expression(node.value), str(path), "eval")
            with contextlib.suppress(NameError):
                found[node.targets[0].id] = eval(code, found)
    return tree, found


@pytest.mark.parametrize(
    ("keyword", "name"),
    [("extra_compile_args", "FLAGS"), ("compiler_directives", "DIRECTIVES")],
)
def test_baselines_are_compiled_as_the_library_is(monkeypatch, keyword, name):
    monkeypatch.delenv("CFLAGS", raising=False)
    monkeypatch.delenv("SMMUFAST_DEBUG", raising=False)
    tree, library = constants(ROOT / "setup.py")
    _, baseline = constants(BENCHMARKS / "baseline.py")
    (node,) = (
        node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == keyword
    )
    wanted = eval(compile(ast.Expression(node.value), "setup.py", "eval"), library)
    assert baseline[name] == wanted
    assert len(wanted) >= 4
