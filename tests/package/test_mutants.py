"""The list of planted errors fits the sources, and they are planted as it says."""

import re
import subprocess
import sys

import mutants
import pytest
from mutants import MisplacedError, Mutant

SOURCES = mutants.ROOT / "smmufast"
LISTED = mutants.listed()


def mutant(old, new, name="m", file="x.pxd"):
    return Mutant(name, file, old, new, ())


def plant(text, *found, suffix=".pxd"):
    """The text with these mutants, numbered from 1, without what makes the choice known."""
    placed = [(n, one, mutants.place(one, text)) for n, one in enumerate(found, 1)]
    return mutants.planted(text, placed, suffix).replace(mutants.KNOWN[suffix], "")


def test_there_are_many_and_their_names_are_their_own():
    names = [one.name for one in LISTED]
    assert len(set(names)) == len(names) >= 200
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", name) for name in names)


@pytest.mark.parametrize("one", LISTED, ids=lambda one: one.name)
def test_every_mutant_has_its_place_and_its_tests(one):
    mutants.place(one, (SOURCES / one.file).read_text(encoding="utf-8"))
    assert one.new != one.old
    files = [word for word in one.tests if word.endswith(".py")]
    assert files
    names = []
    for file in files:
        path = mutants.found(file)
        names += re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))
    options = one.tests[len(files) :]
    assert options in ((), ("-k", options[-1] if options else ""))
    if options:
        words = set(re.findall(r"\w+", options[1])) - {"and", "or", "not", "slow"}
        assert any(word in name for word in words for name in names) or not words


def test_a_text_must_be_there_once():
    for text in ("", "a b a b"):
        with pytest.raises(MisplacedError, match=r"m: x.pxd has its text [02] times"):
            mutants.place(mutant("a b", "c"), text)


@pytest.mark.parametrize("text", ["  ab\n", "x  a\n", "   a\n", "  a"])
def test_lines_are_whole(text):
    with pytest.raises(MisplacedError, match=r"whole lines|0 times"):
        mutants.place(mutant("  a", "  c"), text)


def test_an_expression_is_chosen_when_it_is_evaluated():
    assert plant("return a + 1\n", mutant("a + 1", "a")) == (
        "return ((a) if smmufast_mutant(1) else (a + 1))\n"
    )
    assert plant("if a and b:\n", mutant("a and b", "a")) == (
        "if (smmufast_mutant(1) and (a) or not smmufast_mutant(1) and (a and b)):\n"
    )
    text = "#define X_H\nx = a > 1;\n"
    assert plant(text, mutant("a > 1", "a"), suffix=".h") == (
        "#define X_H\nx = (smmufast_mutant(1) ? (a) : (a > 1));\n"
    )


def test_lines_are_branches():
    assert plant("def f():\n    if a:\n        b\n    c\n", mutant("    if a:\n        b", "")) == (
        "def f():\n    if smmufast_mutant(1):\n        pass\n    else:\n        if a:\n"
        "            b\n    c\n"
    )
    assert plant("#define X_H\n  a;\n", mutant("  a;", "  b;"), suffix=".h") == (
        "#define X_H\n  if (smmufast_mutant(1)) {\n  b;\n  } else {\n  a;\n  }\n"
    )


def test_several_mutants_of_one_file_leave_each_other_alone():
    text = "def f(a):\n    return (a + 1, a + 2, a + 3)\n"
    found = (mutant("a + 1", "a"), mutant("a + 3", "7"), mutant("a + 1", "-1"))
    for chosen in range(4):
        scope = {"smmufast_mutant": chosen.__eq__}
        exec(plant(text, *found, suffix=".py"), scope)
        assert scope["f"](10) == [(11, 12, 13), (10, 12, 13), (11, 12, 7), (-1, 12, 13)][chosen]


def test_texts_that_overlap_are_built_apart():
    text = "return a + b + c\n"
    found = [mutant("a + b", "a"), mutant("b + c", "b"), mutant("c", "1"), mutant("a + b", "b")]
    builds = mutants.builds(list(enumerate(found, 1)), {"x.pxd": text}.__getitem__)
    assert [[number for number, *_ in build] for build in builds] == [[1, 3, 4], [2]]


@pytest.mark.parametrize(
    ("text", "before"),
    [
        (
            '# a comment\n"""A docstring\n\nof lines."""\n\nfrom x cimport y\n',
            "\nfrom x cimport y\n",
        ),
        ("from x cimport y\n", "from x cimport y\n"),
    ],
)
def test_the_choice_is_made_known_behind_the_docstring(text, before):
    assert text[mutants.head(text, ".pxd") :] == before
    text = '"""Doc."""\n\nfrom __future__ import annotations\n\nimport os\n'
    assert text[mutants.head(text, ".py") :] == "import os\n"


@pytest.mark.parametrize(
    ("status", "output", "end"),
    [
        (0, "3 passed", ("survived", "")),
        (
            1,
            "FAILED tests/test_x.py::test_y[1] - assert 1 == 2",
            ("killed", "test_x.py::test_y[1]"),
        ),
        (-11, "", ("killed", "signal 11")),
        (None, "", ("killed", "it does not come to an end")),
        (1, "FAILED tests/test_x.py::test_y - NameError: name 'z'", ("error", None)),
        (1, "ERROR tests/test_x.py::test_y - no build", ("error", None)),
        (2, "1 error", ("error", "1 error")),
        (5, "3 deselected", ("error", "3 deselected")),
    ],
)
def test_only_a_test_that_fails_or_crashes_kills(status, output, end):
    found = mutants.verdict(status, output)
    assert found == end or (end[1] is None and found[0] == end[0])


def test_the_command_lists_and_refuses():
    command = [sys.executable, "-P", str(mutants.TESTS / "mutants.py")]
    done = subprocess.run(
        [*command, "--list", "nothing*", "no-entry-*"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "no mutant is named nothing*" in done.stderr
    done = subprocess.run([*command, "--list", "no-entry-*"], capture_output=True, text=True)
    assert done.returncode == 0
    (line,) = done.stdout.splitlines()
    assert line.split()[:2] == ["no-entry-is-global", "_engine/tlb_entries.pxi"]
