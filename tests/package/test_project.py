"""What stands around the package is true: version, changes, commands, workflows and hooks."""

import ast
import datetime
import json
import re
import shlex
import tomllib

import pytest
from project import ROOT, TESTS
from setuptools import Distribution

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


# --- the version ---

STATED = re.compile(
    r"^\s*(?:__version__|version|release)\b[\s:=]*[\"']?(\d+\.\d+\.\d+)", re.MULTILINE
)


def version():
    (found,) = STATED.findall(read("smmufast/__init__.py"))
    return found


def test_the_version_stands_in_the_package_and_in_no_other_file_that_can_read_it_there():
    places = [ROOT / "pyproject.toml", ROOT / "setup.py", *(ROOT / "docs").glob("*.py"),
              *(ROOT / "smmufast").rglob("*.py")]  # fmt: skip
    stating = [str(path.relative_to(ROOT)) for path in places if STATED.search(path.read_text())]
    assert stating == ["smmufast/__init__.py"]


def test_a_build_has_the_version_of_the_package(monkeypatch):
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files(["pyproject.toml"])
    assert distribution.get_version() == version()


def test_the_citation_says_what_the_project_says():
    citation = dict(re.findall(r"^([a-z-]+): *\"?([^\"\n>]+)\"?$", read("CITATION.cff"), re.M))
    assert citation["version"] == version()
    assert citation["title"] == PROJECT["name"]
    assert citation["license"] == PROJECT["license"]
    names = re.findall(r"^  - name: \"(.*)\"$", read("CITATION.cff"), re.M)
    assert names == [author["name"] for author in PROJECT["authors"]]
    assert (version(), citation["date-released"]) == releases()[0]


# --- the changes ---

SECTIONS = ["Breaking", "Added", "Changed", "Deprecated", "Removed", "Fixed", "Performance",
            "Security"]  # fmt: skip


def changes():
    """[heading, its sections: [name, text]] of the changes, as they stand."""
    _, *parts = re.split(r"^## (.*)\n", read("CHANGELOG.md"), flags=re.M)
    for heading, text in zip(parts[::2], parts[1::2], strict=True):
        _, *sections = re.split(r"^### (.*)\n", text, flags=re.M)
        yield heading, list(zip(sections[::2], sections[1::2], strict=True))


def releases():
    """(version, date) of each release, the newest first."""
    headings = [heading for heading, _ in changes()]
    assert headings[0] == "[Unreleased]"
    found = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", one) for one in headings[1:]]
    assert None not in found
    return [match.groups() for match in found]


def test_the_changes_tell_each_release_once_with_its_day_the_newest_first():
    numbers = [tuple(map(int, number.split("."))) for number, _ in releases()]
    assert numbers == sorted(set(numbers), reverse=True)
    days = [datetime.date.fromisoformat(day) for _, day in releases()]
    assert days == sorted(days, reverse=True)


def test_the_sections_of_a_release_are_those_of_the_form_in_its_order():
    for _, sections in changes():
        names = [name for name, _ in sections]
        assert names == [name for name in SECTIONS if name in names]
        assert all(text.strip() for _, text in sections)


# --- commands that files name ---

def jobs(text):
    """The jobs of a workflow, as texts."""
    _, rest = text.split("\njobs:\n")
    return re.split(r"^  (?=\w[\w-]*:)", rest, flags=re.M)[1:]


def values(job, name):
    """The values of a variable of a job's matrix."""
    flow = re.search(rf"^ +{name}: (\[\".*\"\])", job, re.M)
    if flow:
        return json.loads(flow[1])
    block = re.search(rf"^( +){name}:\n((?:\1  .*\n)+)", job, re.M)
    return re.findall(r"^ +- (.*)$", block[2], re.M)


def commands(path):
    """What a workflow runs, each variable of a matrix with each of its values."""
    for job in jobs(path.read_text()):
        for line in re.findall(r"^ +- run: (.*)$", job, re.M):
            variable = re.search(r"\$\{\{ matrix\.(\w+) \}\}", line)
            for value in values(job, variable[1]) if variable else [""]:
                command = line.replace(variable[0], value) if variable else line
                yield re.sub(r"\$\{\{.*?\}\}", "1", command)


def documented(name):
    """The commands of a page: code between backticks, and lines of its shell blocks."""
    text = read(name)
    for block in re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S):
        yield from block.splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def wrong(command):
    """What a command names that is not there: files, and options of programs of this repository."""
    program = None
    for word in shlex.split(command, comments=True):
        if re.fullmatch(r"(tests|benchmarks|examples|docs|\.ci)/[\w./-]+", word):
            if not (ROOT / word).exists():
                yield word
            elif word.endswith(".py"):
                program = read(word)
        elif re.match(r"--\w", word) and program and f'"{word.split("=")[0]}"' not in program:
            yield word


NAMED = [
    *((path.name, command) for path in WORKFLOWS for command in commands(path)),
    *((name, command) for name in ("CONTRIBUTING.md", "docs/releasing.md")
      for command in documented(name) if re.search(r"\b(tests|benchmarks)/\S+\.py\b", command)),
]  # fmt: skip


@pytest.mark.parametrize(("where", "command"), NAMED)
def test_what_a_command_names_is_there(where, command):
    assert list(wrong(command)) == []


def test_commands_that_name_what_is_not_there_are_found():
    assert len(NAMED) > 60
    assert list(wrong("python -P tests/twins.py 5")) == ["tests/twins.py"]
    assert list(wrong("python -P tests/twin.py 5 --job 2")) == ["--job"]
    assert list(wrong("tests/sanitize.py --keep x -- tests/twin.py 5 --keep x")) == ["--keep"]


def test_the_command_for_every_test_has_the_blocks_of_the_readme_that_it_asks_for():
    blocks = re.findall(r"^```sh$", read("README.md"), re.M)
    asked = [int(number) for number in re.findall(r"\$\(block (\d+)\)", read(".ci/run"))]
    assert asked and max(asked) <= len(blocks)


def test_programs_that_run_with_dash_p_find_their_neighbours():
    # -P leaves out the folder of the program
    line = (
        "sys.path[:0] = [str(Path(__file__).resolve().parent / name) for name in "
        '("", "support")]'
    )
    started = {word for _, command in NAMED
               for word in re.findall(r"-P (tests/\w+\.py)", command)}  # fmt: skip
    assert len(started) > 12
    neighbours = {path.stem for path in (*TESTS.glob("*.py"), *TESTS.glob("support/*.py"))}
    for name in sorted(started):
        tree = ast.parse(read(name))
        imported = {alias.name for node in tree.body if isinstance(node, ast.Import)
                    for alias in node.names}  # fmt: skip
        imported |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert not imported & neighbours or line in read(name), name


def test_the_weekly_checks_are_longer_checks_that_contributing_tells():
    told = set(re.findall(r"python -P (tests/\w+\.py)", read("CONTRIBUTING.md")))
    told |= set(re.findall(r"-- (tests/\w+\.py)", read("CONTRIBUTING.md")))
    weekly = [word for command in commands(ROOT / ".github/workflows/scheduled.yml")
              for word in re.findall(r"tests/(?!test_)\w+\.py", command)]  # fmt: skip
    assert len(weekly) > 12
    assert set(weekly) <= told


# --- workflows and hooks ---


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_read_and_nothing_else_and_ends(path):
    text = path.read_text()
    assert re.findall(r"^ *permissions:(.*\n(?: +.*\n)*)", text, re.M) == ["\n  contents: read\n"]
    assert "secrets" not in text
    assert re.search(r"^concurrency:\n  group: ", text, re.M)
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")
    for action in re.findall(r"uses: (.*)", text):
        assert re.fullmatch(r"actions/[\w-]+@v\d+", action)
    for job in jobs(text):
        assert re.search(r"^    timeout-minutes: \d+$", job, re.M)


def test_tests_and_wheels_are_for_the_pythons_that_the_project_names():
    named = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"]
             if re.search(r":: 3\.\d+$", line)]  # fmt: skip
    (_, tests, _) = jobs(read(".github/workflows/tests.yml"))
    assert values(tests, "python") == named
    built = [f"cp{number.replace('.', '')}-*" for number in named]
    assert PYPROJECT["tool"]["cibuildwheel"]["build"].split() == built
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_hooks_run_tools_of_the_test_extra_and_fetch_nothing():
    text = read(".pre-commit-config.yaml")
    assert re.findall(r"repo: (.*)", text) == ["local"]
    hooks = text.split("      - id: ")[1:]
    used = [re.search(r"entry: (\S+)", hook)[1] for hook in hooks if "language: system" in hook]
    assert used == ["ruff", "cython-lint", "mypy"]
    assert set(used) <= set(PROJECT["optional-dependencies"]["test"])
    assert len(hooks) - len(used) == text.count("language: pygrep") == 2
