"""docs/rules.md, the code and the tests say the same: every row is where it claims to be."""

import collections
import gzip
import json
import re

import pytest
from project import CAPTURES, ROOT, TESTS

from smmufast import Why

TEXT = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
ID = re.compile(r"\b(?:[SV]\d+(?:\.[0-9]+)*-\d+|L-\d+)(?!\d)")
TWINS = ("reference.py", "reference_ats.py", "cachemodel.py")


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def tables():
    """Rows of every section: its heading, the cells."""
    found = collections.defaultdict(list)
    heading = ""
    for line in TEXT.splitlines():
        if line.startswith("#"):
            heading = line
        elif line.startswith("|") and not line.startswith("|--"):
            found[heading].append(cells(line))
    return {heading: rows[1:] for heading, rows in found.items()}  # without the names of columns


TABLES = tables()
LISTS = ("# Rules", "## Choices", "## Doubts")
RULES = {
    row[0]: row
    for heading, rows in TABLES.items()
    if heading not in LISTS and not heading.startswith("## Differences")
    for row in rows
}
LIVE = {name for name, row in RULES.items() if not row[2].startswith("absent")}


def sources():
    """Files that hold rules, and their texts: the package but for what is generated."""
    for path in sorted((ROOT / "smmufast").rglob("*")):
        generated = path.parent.name == "_facts" and path.stem in ("layout", "why", "hw")
        if path.suffix in (".pxd", ".pyx", ".pxi", ".py", ".h") and not generated:
            yield path, path.read_text(encoding="utf-8")


MARK = r"^@pytest\.mark\.rule\(([^)]*)\)\n((?:(?!^def ).*\n)*?)def (\w+)"


def marked():
    """Row IDs of each test, by file and name."""
    found = collections.defaultdict(set)
    for path in sorted(TESTS.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for ids, _, name in re.findall(MARK, text, re.MULTILINE):
            found[path.name, name] |= set(ID.findall(ids))
    return found


MARKED = marked()


# --- the rows ---


def test_rows_are_whole():
    assert len(RULES) > 1000
    assert sum(len(rows) for heading, rows in TABLES.items()
               if heading not in LISTS and not heading.startswith("## Differences")) == len(RULES)
    for name, row in RULES.items():
        assert len(row) == 4 and all(row), row
        assert ID.fullmatch(name), row
        assert re.fullmatch(r"implemented|(partial|absent): .+", row[2]), row
        assert row[3] == "–" or re.fullmatch(r"`[\w/.]+: \w+`(, `[\w/.]+: \w+`)*", row[3]), row
        assert row[3] != "–" or name not in LIVE, row


def test_no_rule_is_there_twice():
    rules = [row[1].lower() for row in RULES.values()]
    assert [rule for rule, n in collections.Counter(rules).items() if n > 1] == []
    for heading in LISTS[1:]:
        topics = [row[1].lower() for row in TABLES[heading]]
        assert len(topics) == len(set(topics)), heading


def test_the_numbers_at_the_head_are_those_of_the_rows():
    chapters = collections.defaultdict(collections.Counter)
    for name, row in RULES.items():
        chapter = re.match(r"[SV]\d+|L", name)[0]
        for counted in (chapter, "all"):
            chapters[counted]["rules"] += 1
            chapters[counted][row[2].partition(":")[0]] += 1
            chapters[counted]["tested"] += name in LIVE and row[3] != "–"
    head = {}
    for row in TABLES["# Rules"]:
        number = re.match(r"(\d+) ", row[0])
        name = f"S{number[1]}" if number else {"DDI 0487 D8": "V8", "all": "all"}.get(row[0], "L")
        head[name] = [int(cell) for cell in row[1:]]
    assert head == {
        name: [count[key] for key in ("rules", "implemented", "partial", "absent", "tested")]
        for name, count in chapters.items()
    }


# --- rows, code and tests ---


def test_every_row_that_is_there_stands_in_the_code():
    found = {name for path, text in sources() if path.name != "why.py" for name in ID.findall(text)}
    twins = {name for file in TWINS
             for name in ID.findall((TESTS / "support" / file).read_text(encoding="utf-8"))}
    assert found - set(RULES) == set()
    assert LIVE - found - twins == set()


def test_every_row_that_is_there_has_its_tests():
    wanted = collections.defaultdict(set)
    for name in LIVE:
        for file, test in re.findall(r"`([\w/.]+): (\w+)`", RULES[name][3]):
            if file in TWINS:
                text = (TESTS / "support" / file).read_text(encoding="utf-8")
                assert name in ID.findall(text), (name, file)
            else:
                wanted[file, test].add(name)
    assert wanted == MARKED


def test_every_reason_has_a_row():
    assert {why.rule for why in Why} <= LIVE


def test_every_twin_and_test_that_is_named_is_defined():
    for file, name in set(re.findall(r"`([\w/.]+\.\w+): (\w+)`", TEXT)):
        beside = ROOT / "smmufast" / file
        path = beside if beside.exists() else next(TESTS.rglob(file))
        text = path.read_text(encoding="utf-8")
        assert re.search(rf"\b{name}\b", text), (file, name)


# --- choices, doubts, differences ---


def test_choices_and_doubts_have_what_is_allowed_and_what_is_done():
    for heading in LISTS[1:]:
        rows = TABLES[heading]
        assert len(rows) > 10
        for row in rows:
            assert len(row) == 6 and all(row), row
    assert [row[0] for row in TABLES["## Choices"]] == [
        f"C{n}" for n in range(1, len(TABLES["## Choices"]) + 1)
    ]


def test_every_difference_has_a_reason():
    for heading in ("QEMU", "Linux", "gem5"):
        rows = TABLES[f"## Differences from {heading}"]
        assert len(rows) > 5
        for row in rows:
            assert len(row) == 3 and all(row), row


def causes():
    """Every cause that the captures name."""
    found = set()
    for path in CAPTURES.glob("cases-*/cases.jsonl.gz"):
        with gzip.open(path, "rt") as lines:
            next(lines)
            for line in lines:
                for request in json.loads(line)["reqs"]:
                    cause = request.get("arch_differs", {}).get("cause", "")
                    found.update(re.split(r"[+|]", cause))
    return found - {""}


def test_every_cause_of_the_captures_has_a_verdict():
    judged = {row[0]: row for row in TABLES["## Differences from QEMU"]}
    for cause in ("bypass_oas (SMMUEN=0)", "s2ptw"):
        assert re.search(r"`[\w./]+: \w+`", judged[cause][2])
    found = causes()
    if not found:
        pytest.skip("no captures: SMMUFAST_CAPTURES is not set and ../shared/captures is absent")
    for cause in found:
        assert judged[cause][1] == "architecture"
        assert re.match(r"`[\w./]+: \w+`: ", judged[cause][2])
