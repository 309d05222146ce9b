"""Tests lie in rooms: a name is one file's, tests import support alone, and its index is true."""

import collections
import re

from project import TESTS

IMPORT = re.compile(r"^\s*(?:from|import) (\w+)", re.MULTILINE)
FILES = [path for path in sorted(TESTS.rglob("*.py")) if path.name not in ("setup.py",)]
SUPPORT = {path.stem for path in (TESTS / "support").glob("*.py")}


def imported(path):
    return set(IMPORT.findall(path.read_text(encoding="utf-8")))


def users():
    """{module of support: those who import it, as the index writes them}."""
    found = collections.defaultdict(set)
    for path in FILES:
        room = path.relative_to(TESTS).parts[0]
        name = f"`{path.stem}`" if room == "support" else room
        for module in imported(path) & SUPPORT - {path.stem}:
            found[module].add(name)
    return found


def test_every_name_is_one_files():
    # docs/rules.md and planted/ name files by it, and one module of a name is imported
    counts = collections.Counter(path.stem for path in FILES)
    assert len(counts) > 120
    assert [name for name, n in counts.items() if n > 1] == []


def test_no_test_file_imports_another():
    tests = {path.stem for path in FILES if path.name.startswith("test_")}
    assert len(tests) > 90
    assert [path.name for path in FILES if imported(path) & tests - {path.stem}] == []


def test_the_index_of_support_names_every_module_its_users_and_what_it_imports():
    text = (TESTS / "support" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (yes|no) \|$", text, re.MULTILINE)
    assert sorted(module for module, *_ in rows) == sorted(SUPPORT)
    found = users()
    for module, what, used, library in rows:
        assert what and set(used.split(", ")) == found[module], module
        imports = "smmufast" in imported(TESTS / "support" / f"{module}.py")
        assert library == ("yes" if imports else "no"), module
