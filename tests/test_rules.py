"""docs/rules.md names functions, tests and causes that exist."""

import gzip
import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "rules.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("| ") and "`" in line
]
RULES = [row for row in ROWS if len(row) == 4]


def test_every_rule_has_a_state():
    assert len(RULES) > 40
    for row in RULES:
        assert re.match(r"implemented|partial:|absent", row[1]), row


@pytest.mark.parametrize("row", RULES, ids=lambda row: row[0][:60])
def test_functions_and_tests_named_exist(row):
    for cell, folder in ((row[2], "smmufast"), (row[3], "tests")):
        file, name = re.fullmatch(r"`([\w.]+): (\w+)`", cell).groups()
        text = (ROOT / folder / file).read_text()
        assert re.search(rf"\b(def|cdef)\b[^\n]*\b{name}\(", text), cell


def causes():
    """Every cause that the captures name."""
    directory = Path(os.environ.get("SMMUFAST_CAPTURES", ROOT.parent / "shared" / "captures"))
    found = set()
    for path in directory.glob("cases-*/cases.jsonl.gz"):
        with gzip.open(path, "rt") as lines:
            next(lines)
            for line in lines:
                for request in json.loads(line)["reqs"]:
                    cause = request.get("arch_differs", {}).get("cause", "")
                    found.update(re.split(r"[+|]", cause))
    return found - {""}


def test_every_cause_of_the_captures_has_a_verdict():
    found = causes()
    if not found:
        pytest.skip("no captures: SMMUFAST_CAPTURES is not set and ../shared/captures is absent")
    verdicts = re.findall(r"^\| (\w+) \| (architecture|not reached) \|", TEXT, re.M)
    judged = {cause for cause, _ in verdicts}
    assert found <= judged
