"""A real kernel and this driver do the same: the commands of both, phase by phase."""


import kernelcommands
import pytest
from project import CAPTURES, ROOT

DOC = ROOT / "docs" / "domains.md"
TRAFFIC = CAPTURES / "traffic" / "linux-7.3-pasid-v32"
PHASES = kernelcommands.extracted()


def test_the_commands_are_those_of_the_kernel_but_for_what_the_rules_say():
    replay = kernelcommands.Replay()
    differs = {}
    for number, (_, operations, told) in enumerate(PHASES):
        for operation in operations:
            replay.do(*operation)
        wanted, differs[number] = kernelcommands.wanted(told)
        assert replay.commands() == wanted, number
    assert {n: rules for n, rules in differs.items() if rules} == {0: "ab", 5: "c", 37: "c"}
    assert len(PHASES) == 42


def test_the_page_has_the_table_of_the_phases():
    rows = [line for line in DOC.read_text().splitlines() if line.startswith("| ")]
    found = [row for row in rows if row.split("|")[1].strip().isdigit()]
    assert found == list(kernelcommands.table())


@pytest.mark.skipif(not TRAFFIC.is_dir(), reason="the recorded traffic is not there")
def test_the_extract_is_what_was_recorded():
    lines = kernelcommands.EXTRACT.read_text(encoding="utf-8").splitlines()
    assert list(kernelcommands.extract(TRAFFIC)) == lines
