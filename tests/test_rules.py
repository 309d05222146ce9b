"""docs/rules.md is whole and current: what it names exists, and what must be named is."""

import collections
import gzip
import json
import os
import re
from pathlib import Path

import pytest

from smmufast import layout

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "rules.md").read_text()

# Sections of the notes on the architecture.
INDEX = {
    "structures": "0 1.1 1.2 2.1 2.2 2.3 2.4 2.5 2.6 2.7 3.1 3.2 3.3 4 4.1 4.2 4.3 4.4 4.5 5",
    "page_tables": "1 1.1 2 2.1 2.2 3.1 3.2 3.3 3.4 3.5 4.1 4.2 4.3 5 6.1 6.2 6.3 7.1 7.2 7.3 7.4 "
    "8 9 10",
    "translation_flow": "1 2 3 4 5 7 8",
    "events": "1 2 3 4.1 4.2 5 6 7 8 9 10",
    "commands": "1 2 3.1 3.2 3.3 4 5 6 7 8.1 8.2 9 10",
    "registers": "1 2 3 4 5 6",
}
# Those that are lists of their own.
LISTS = {
    "translation_flow 6": "## Choices",
    "translation_flow 9": "## Doubts",
    "translation_flow 10": "## Differences from gem5",
}
GROUPS = {f"{notes} {number}" for notes, numbers in INDEX.items() for number in numbers.split()}
EVENTS = "01 02 03 04 05 06 07 08 09 0A 0B 10 11 12 13 20 21 24 25 E0"
COMMANDS = (
    "01 02 03 04 05 06 07 10 11 12 13 18 1A 20 21 22 23 28 2A 30 40 41 44 45 46 50 51 52 53 58 5A "
    "60 70 73 80"
)
PAGE_0 = (
    "000 004 008 00C 010 014 018 01C 020 024 028 02C 030 040 044 048 050 054 060 064 068 070 074 "
    "080 088 090 098 09C 0A0 0A8 0AC 0B0 0B8 0BC 0C0 0C8 0CC 0D0 0D8 0DC 100 108 110 118 130 138 "
    "13C 180 190 200 208 210 E00 FD0"
)
PAGE_1 = "100A8 100AC 100C8 100CC"


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def tables():
    """Rows of every group and of every section: its heading, the cells."""
    found = collections.defaultdict(list)
    heading = ""
    for line in TEXT.splitlines():
        if line.startswith("#"):
            heading = line
        elif line.startswith("|") and not line.startswith("|--"):
            found[heading].append(cells(line))
    return {heading: rows[1:] for heading, rows in found.items()}  # without the names of columns


TABLES = tables()
RULES = {
    heading.removeprefix("### ").split(":")[0]: rows
    for heading, rows in TABLES.items()
    if heading.startswith("### ")
}
ROWS = [(group, *row) for group, rows in RULES.items() for row in rows]
NAMED = sorted(set(re.findall(r"`(\w+\.\w+): (\w+)`", TEXT)))


def words(*groups):
    """The words of the rules of some groups; "A0 to A3" stands for each between."""
    text = " ".join(row[1] for row in ROWS if row[0] in groups)
    for stem, first, last in re.findall(r"\b(\w*?)(\d+) to \1(\d+)\b", text):
        text += "".join(f" {stem}{number:0{len(first)}}" for number in range(int(first), int(last)))
    return set(re.findall(r"\w+", text))


def numbers(group):
    """The numbers that rules of a group start with, and their names."""
    found = [re.match(r"`0x([0-9A-F]+)`(?: (\w+))?", row[0]) for row in RULES[group]]
    return [(match[1], match[2]) for match in found if match]


# --- what is named exists ---


def folder(file):
    return "tests" if (ROOT / "tests" / file).exists() else "smmufast"


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_functions_and_tests_named_are_defined(file, name):
    text = (ROOT / folder(file) / file).read_text()
    assert re.search(rf"^ *(def|cdef|cpdef) ([\w*\[\] ]+[ *])?{name}\(", text, re.MULTILINE)


def test_rows_are_whole():
    assert len(ROWS) > 350
    for group, rule, section, state, function, test in ROWS:
        row = group, rule
        assert re.fullmatch(r"–|D?\d+(\.\d+)*((, | to |; )D?\d+(\.\d+)*)*", section), row
        assert re.fullmatch(r"implemented|(partial|absent): .+", state), row
        for cell, where in ((function, "smmufast"), (test, "tests")):
            if cell == "–":
                assert state.startswith("absent"), row
                continue
            file, name = re.fullmatch(r"`([\w.]+): (\w+)`", cell).groups()
            assert folder(file) == where, row
            if where == "tests":
                twin = file in ("reference.py", "cachemodel.py")
                assert twin or (file.startswith("test_") and name.startswith("test_")), row


def test_no_rule_is_there_twice():
    rules = [row[1] for row in ROWS]
    assert [rule for rule, n in collections.Counter(rules).items() if n > 1] == []
    for heading in (*LISTS.values(), "## Differences from QEMU"):
        topics = [tuple(row[:-2]) for row in TABLES[heading]]
        assert len(topics) == len(set(topics)), heading


# --- what must be named is ---


def test_every_section_has_rules():
    assert set(RULES) == GROUPS
    assert all(RULES.values())
    for heading in LISTS.values():
        assert TABLES[heading]


def test_the_index_is_that_of_the_notes():
    notes = ROOT.parent / "shared" / "spec"
    if not notes.exists():
        pytest.skip("the notes on the architecture are not beside this directory")
    found = {
        f"{path.stem} {number}"
        for path in notes.glob("*.md")
        for number in re.findall(r"^###? (\d+(?:\.\d+)?)\.? ", path.read_text(), re.MULTILINE)
    }
    above = {group for group in found if any(other.startswith(group + ".") for other in found)}
    listed = GROUPS | set(LISTS)
    assert listed <= found
    assert found - above <= listed


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("events 2", EVENTS),
        ("commands 2", COMMANDS),
        ("registers 1", PAGE_0),
        ("registers 2", PAGE_1),
    ],
)
def test_every_number_has_a_row(group, expected):
    assert [number for number, _ in numbers(group)] == expected.split()


def test_numbers_go_with_the_names_of_the_records():
    events = {int(number, 16): name for number, name in numbers("events 2")}
    assert {event.value: event.name for event in layout.Event}.items() <= events.items()
    commands = {int(number, 16): name for number, name in numbers("commands 2")}
    aliased = {op.value: op.name for op in layout.Opcode}
    assert aliased.items() <= commands.items()
    registers = {
        name: int(number, 16)
        for page in ("registers 1", "registers 2")
        for number, name in numbers(page)
    }
    for record in layout.REGISTERS.values():
        assert registers[record.name] == record.offset


@pytest.mark.parametrize(
    ("record", "groups"),
    [
        ("L1STD", ["structures 1.2"]),
        ("STE", ["structures 2.1"]),
        ("L1CD", ["structures 3.2"]),
        ("CD", ["structures 4"]),
        ("EVENT", ["events 1", "events 2"]),
        ("CR0", ["registers 4"]),
        ("CR1", ["registers 4"]),
        ("CR2", ["registers 4"]),
        ("GBPA", ["registers 4"]),
        ("IRQ_CTRL", ["registers 4"]),
        ("IDR0", ["registers 3"]),
        ("IDR1", ["registers 3"]),
        ("IDR3", ["registers 3"]),
        ("IDR5", ["registers 3"]),
        ("STRTAB_BASE_CFG", ["structures 1.1"]),
    ],
)
def test_every_field_is_named(record, groups):
    fields = {field.name for field in layout.record(record).fields}
    assert fields - words(*groups) == set()


def test_choices_and_doubts_are_all_there():
    choices = TABLES["## Choices"]
    assert [row[0] for row in choices if row[0] != "–"] == [str(n) for n in range(1, 36)]
    assert [row[0] for row in TABLES["## Doubts"]] == [f"D{n}" for n in range(1, 15)]
    for row in choices + TABLES["## Doubts"]:
        assert len(row) == 4 and all(row), row
        assert re.fullmatch(r"`[\w.]+: \w+`", row[3]), row


def test_every_difference_has_a_reason():
    for heading in ("QEMU", "Linux", "gem5"):
        rows = TABLES[f"## Differences from {heading}"]
        assert len(rows) > 5
        for row in rows:
            assert len(row) == 3 and all(row), row


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
    judged = {row[0]: row for row in TABLES["## Differences from QEMU"]}
    for cause in ("bypass_oas (SMMUEN=0)", "s2ptw"):
        assert re.search(r"`[\w.]+: \w+`", judged[cause][2])
    found = causes()
    if not found:
        pytest.skip("no captures: SMMUFAST_CAPTURES is not set and ../shared/captures is absent")
    for cause in found:
        assert judged[cause][1] == "architecture"
        assert re.match(r"`[\w.]+: \w+`: ", judged[cause][2])
