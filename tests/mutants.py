"""Plant errors in a copy of the sources, one at a time, and see whether the tests notice.

    python -P tests/mutants.py                       # every mutant; about half an hour
    python -P tests/mutants.py --list
    python -P tests/mutants.py 'tlb-*' s2-nt         # some of them, by name
    python -P tests/mutants.py --keep DIRECTORY      # keep the build, and use what is there

A mutant is a text that one file of the package holds exactly once, the text that takes its place,
and the tests that should fail then.  They are listed in tests/planted/, by what they are about.

All mutants are compiled into one build, in which the environment variable SMMUFAST_MUTANT chooses
one: an expression becomes `(new if chosen else old)`, whole lines become the branches of an `if`.
Mutants whose texts overlap are in separate builds.  Without a chosen mutant the build must pass
all the tests that are named.

It prints how each mutant ended, then the survivors, and exits with 1 if there are any.  A mutant
is killed by a test that fails or crashes, or that does not come to an end.  Whatever else goes
wrong (a text that is not found once, a build that fails, tests that cannot be run) is an error of
the list and ends with 2.  The `test` extra and a C compiler are needed.
"""

import argparse
import ast
import concurrent.futures
import fnmatch
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
CHOICE = "SMMUFAST_MUTANT"
TIMEOUT = 900  # seconds for the tests of one mutant
#: What a test cannot be blamed for: the mutant does not work at all.
BROKEN = ("ImportError", "ModuleNotFoundError", "NameError", "SyntaxError", "UnboundLocalError")

HEADER = f"""\
#ifndef SMMUFAST_MUTANT_H
#define SMMUFAST_MUTANT_H
#include <stdlib.h>
static inline int smmufast_mutant(int n)
{{
    static int chosen = -1;
    if (chosen < 0)
        chosen = getenv("{CHOICE}") ? atoi(getenv("{CHOICE}")) : 0;
    return chosen == n;
}}
#endif
"""
MODULE = f"""\
import os

CHOSEN = int(os.environ.get("{CHOICE}", "0"))


def smmufast_mutant(n):
    return n == CHOSEN
"""
#: How a file knows smmufast_mutant(), by its suffix.
KNOWN = {
    ".pxd": 'cdef extern from "_mutant.h" nogil:\n    bint smmufast_mutant(int n) noexcept\n',
    ".py": "from smmufast._mutant import smmufast_mutant\n",
    ".h": '#include "_mutant.h"\n',
}
KNOWN[".pyx"] = KNOWN[".pxi"] = KNOWN[".pxd"]


class Mutant(NamedTuple):
    """One error: `old`, which `file` holds once, becomes `new`.

    Texts that begin with a space are whole lines, which are statements; others are an expression.
    `tests` are arguments of pytest: names of files below tests/, and what to select of them (`-k`).
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def lines(self):
        return self.old.startswith(" ")


class MisplacedError(Exception):
    """A mutant that cannot be planted."""


def listed():
    """All mutants, in the order in which they are numbered from 1."""
    found = []
    for path in sorted((TESTS / "planted").glob("*.py")):
        found += runpy.run_path(str(path), init_globals={"Mutant": Mutant})["MUTANTS"]
    return found


def found(name):
    """The path of the test file of this name, in whatever folder of tests/ it is."""
    (path,) = TESTS.rglob(name)
    return path


# --- planting ---


def place(mutant, text):
    """Where the mutant's old text is: the first character, and the first behind it."""
    times = text.count(mutant.old)
    if times != 1:
        raise MisplacedError(f"{mutant.name}: {mutant.file} has its text {times} times")
    start = text.index(mutant.old)
    stop = start + len(mutant.old)
    if mutant.lines and ((start and text[start - 1] != "\n") or text[stop : stop + 1] != "\n"):
        raise MisplacedError(f"{mutant.name}: its text is not whole lines")
    return start, stop


def builds(chosen, read):
    """[[(number, mutant, span)]]: mutants whose texts overlap are in different builds.

    Several mutants of the very same text are not in each other's way.
    """
    found = []
    for number, mutant in chosen:
        start, stop = place(mutant, read(mutant.file))
        for build in found:
            if all(
                mutant.file != other.file or ((start, stop) == span and mutant.lines == other.lines)
                or stop <= span[0] or start >= span[1]
                for _, other, span in build
            ):  # fmt: skip
                break
        else:
            build = []
            found.append(build)
        build.append((number, mutant, (start, stop)))
    return found


def deeper(text):
    return "\n".join("    " + line if line.strip() else line for line in text.split("\n"))


def is_condition(old, new):
    """Whether an expression is true or not, rather than a value.

    Cython makes an object of an if-expression whose branches are of several types, as conditions
    often are, and takes the operands of `and` and `or` as they come.
    """
    if " if " in old:
        return False
    return new in ("True", "False") or bool(re.search(r"\b(and|or|not)\b| [<>=!]=? ", old))


def alternatives(old, news, suffix, lines):
    """The text that is `old` unless one of `news` ({number: text}) is chosen."""
    c = suffix == ".h"
    if not lines:
        for number, new in news.items():
            chosen = f"smmufast_mutant({number})"
            if c:
                old = f"({chosen} ? ({new}) : ({old}))"
            elif is_condition(old, new):
                old = f"({chosen} and ({new}) or not {chosen} and ({old}))"
            else:
                old = f"(({new}) if {chosen} else ({old}))"
        return old
    indent = old[: len(old) - len(old.lstrip())]
    for number, new in news.items():
        new = new if new.strip() else f"{indent}{';' if c else 'pass'}"
        if c:
            test = f"{indent}if (smmufast_mutant({number})) {{"
            old = f"{test}\n{new}\n{indent}}} else {{\n{old}\n{indent}}}"
        else:
            test = f"{indent}if smmufast_mutant({number}):"
            old = f"{test}\n{deeper(new)}\n{indent}else:\n{deeper(old)}"
    return old


def head(text, suffix):
    """Where a file can be told of smmufast_mutant(): behind its docstring, or its guard."""
    if suffix == ".h":
        return re.search(r"^#define \w+_H\n", text, re.M).end()
    if suffix == ".py":
        lines = text.splitlines(keepends=True)
        for node in ast.parse(text).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not docstring and getattr(node, "module", None) != "__future__":
                return sum(map(len, lines[: node.lineno - 1]))
        return len(text)
    found = re.match(r'(?:#[^\n]*\n|\n)*(?:""".*?"""\n)?', text, re.S)
    return found.end()


def planted(text, mutants, suffix):
    """The text with every mutant in it, of [(number, mutant, span)] that do not overlap."""
    spans = {}
    for number, mutant, span in mutants:
        spans.setdefault(span, {})[number] = mutant
    for (start, stop), here in sorted(spans.items(), reverse=True):
        lines = next(iter(here.values())).lines
        news = {number: mutant.new for number, mutant in here.items()}
        text = text[:start] + alternatives(text[start:stop], news, suffix, lines) + text[stop:]
    at = head(text, suffix)
    return text[:at] + KNOWN[suffix] + text[at:]


# --- builds ---


def put(path, data):
    """Write a file, unless that is what it holds: what is built from it stays new then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != data:
        path.write_bytes(data)


def sources():
    """Every file that the tests may look at, but for what is built."""
    for name in ("pyproject.toml", "setup.py", "README.md", "CONTRIBUTING.md", "LICENSE"):
        yield ROOT / name
    for name in ("smmufast", "tests", "examples", "docs", "benchmarks"):
        for path in sorted((ROOT / name).rglob("*")):
            built = path.suffix in (".so", ".pyc") or (name == "smmufast" and path.suffix == ".c")
            if path.is_file() and not built:
                yield path


def copy(tree, mutants):
    """Copy the sources into `tree`, and plant the mutants."""
    for path in sources():
        data = path.read_bytes()
        here = [one for one in mutants if path == ROOT / "smmufast" / one[1].file]
        if here:
            data = planted(data.decode(), here, path.suffix).encode()
        put(tree / path.relative_to(ROOT), data)
    put(tree / "smmufast" / "_mutant.h", HEADER.encode())
    put(tree / "smmufast" / "_mutant.py", MODULE.encode())


def compiled(tree, log):
    """Compile in place what has changed."""
    flags = os.environ.get("CFLAGS", "-O0")  # the compiler takes longer than the tests
    with open(log, "w") as file:
        done = subprocess.run(
            [sys.executable, "-P", "setup.py", "build_ext", "--inplace"],
            cwd=tree, env=os.environ | {"CFLAGS": flags}, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    if done.returncode:
        raise MisplacedError(f"the build fails: {log} says why")


# --- tests ---


def pytest(tree, number, arguments):
    """(exit status or None, output) of tests with one mutant; 0 is none."""
    captures = os.environ.get("SMMUFAST_CAPTURES", ROOT.parent / "shared" / "captures")
    files = [found(word).relative_to(ROOT) if word.endswith(".py") else word for word in arguments]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pytest", "-q", "-o", "addopts=", "-rfE", "-p",
             "no:cacheprovider", *files],
            cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT,
            errors="replace", stdin=subprocess.DEVNULL,
            env=os.environ | {CHOICE: str(number), "PYTHONPATH": str(tree), "COLUMNS": "200",
                              "SMMUFAST_CAPTURES": str(captures)},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout


def verdict(status, output):
    """("killed", by what), ("survived", ""), or ("error", why), of a run with a mutant."""
    if status is None:
        return "killed", "it does not come to an end"
    if status == 0:
        return "survived", ""
    if status < 0:
        return "killed", f"signal {-status}"
    failed = re.findall(r"^FAILED (\S+?\.py::.*)$", output, re.M)
    if status == 1 and failed:
        test, _, why = failed[0].partition(" - ")
        if why.split(":")[0] in BROKEN:
            return "error", failed[0]
        return "killed", f"{test.removeprefix('tests/')}"
    why = [line for line in output.splitlines() if line.strip()]
    return "error", why[-1] if why else f"pytest ends with {status}"


def selections(mutants):
    """Arguments of pytest that together name the tests of all mutants: by file."""
    whole, some = set(), {}
    for mutant in mutants:
        files = [word for word in mutant.tests if word.endswith(".py")]
        options = mutant.tests[len(files) :]
        for file in files:
            if not options:
                whole.add(file)
            some.setdefault(file, set()).add(options[1] if options else "")
    return [
        (file,) if file in whole else (file, "-k", " or ".join(f"({one})" for one in sorted(keys)))
        for file, keys in some.items()
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="names of mutants, or patterns such as 'tlb-*'")
    parser.add_argument("--list", action="store_true", help="print the mutants and end")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="tests at a time")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="keep or reuse the builds")
    options = parser.parse_args()
    every = list(enumerate(listed(), 1))
    for name in options.names:
        if not any(fnmatch.fnmatchcase(mutant.name, name) for _, mutant in every):
            parser.error(f"no mutant is named {name}")
    chosen = [
        (number, mutant) for number, mutant in every
        if not options.names or any(fnmatch.fnmatchcase(mutant.name, n) for n in options.names)
    ]  # fmt: skip
    if options.list:
        for _, mutant in chosen:
            print(f"{mutant.name:36} {mutant.file:16} {' '.join(mutant.tests)}")
        return 0
    with tempfile.TemporaryDirectory(prefix="smmufast-mutants-") as temporary:
        directory = (options.keep or Path(temporary)).resolve()
        try:
            return run(chosen, directory, options.jobs)
        except MisplacedError as problem:
            print(f"mutants: error: {problem}", file=sys.stderr)
            return 2


def run(chosen, directory, jobs):
    """Build, try every mutant, print what became of each; the exit status."""
    ends = {"killed": [], "survived": [], "error": []}
    read = {}
    for _, mutant in chosen:
        read[mutant.file] = (ROOT / "smmufast" / mutant.file).read_text(encoding="utf-8")

    def say(end, mutant, what):
        ends[end].append(mutant)
        print(f"{end:9} {mutant.name:36} {what}", flush=True)

    rounds = builds(chosen, read.__getitem__)
    for n, build in enumerate(rounds):  # all of them now: the sources may change meanwhile
        copy(directory / f"build{n}", build)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for n, build in enumerate(rounds):
            tree = directory / f"build{n}"
            print(f"building {len(build)} mutants in {tree}", flush=True)
            compiled(tree, directory / f"build{n}.log")
            mutants = [mutant for _, mutant, _ in build]
            alone = {pool.submit(pytest, tree, 0, words): words for words in selections(mutants)}
            for future, words in alone.items():
                if future.result()[0]:
                    print(future.result()[1])
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise MisplacedError(f"without a mutant, {' '.join(words)} fails")
            waiting = {
                pool.submit(pytest, tree, number, ("-x", *mutant.tests)): mutant
                for number, mutant, _ in build
            }
            for future in concurrent.futures.as_completed(waiting):
                end, what = verdict(*future.result())
                mutant = waiting[future]
                say(end, mutant, what)
    counts = ", ".join(f"{len(found)} {end}" for end, found in ends.items())
    print(f"{len(chosen)} mutants: {counts}")
    for mutant in ends["survived"]:
        print(f"\nsurvivor {mutant.name}, {mutant.file}, under {' '.join(mutant.tests)}:")
        print("\n".join(f"- {line}" for line in mutant.old.split("\n")))
        print("\n".join(f"+ {line}" for line in mutant.new.split("\n")))
    return 2 if ends["error"] else 1 if ends["survived"] else 0


if __name__ == "__main__":
    sys.exit(main())
