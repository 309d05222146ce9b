"""docs/domains.md lists every behaviour, F1 to F67, with tests that exist."""

import re

from project import ROOT, TESTS

DOC = ROOT / "docs" / "domains.md"


def names_of_tests():
    return {
        name
        for path in TESTS.rglob("test_*.py")
        for name in re.findall(r"^def (test_[a-z0-9_]+)", path.read_text(), re.MULTILINE)
    }


def test_every_behaviour_has_a_test_and_every_such_test_is_listed():
    names = names_of_tests()
    rows = re.findall(r"^\| F(\d+) \| .+ \| (.+) \|$", DOC.read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 68))
    for number, listed in rows:
        tests = re.findall(r"`(\w+)`", listed)
        numbered = {name for name in names if re.search(rf"_f0*{number}_", name)}
        assert numbered and set(tests) == numbered, number


def test_what_the_proposal_asks_has_a_call_and_tests_that_exist():
    names = names_of_tests()
    rows = re.findall(r"^\| S(\d+) \| .+ \| .+ \| (.+) \|$", DOC.read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 13))
    for number, listed in rows:
        tests = set(re.findall(r"`(\w+)`", listed))
        assert tests and tests <= names, number
        assert {name for name in names if f"_s{int(number):02}_" in name} <= tests, number


def test_the_page_draws_a_main_an_auxiliary_and_an_sva_domain_and_an_exit():
    shown = re.findall(r"^```text$\n(.+?)^```$", DOC.read_text(), re.MULTILINE | re.DOTALL)
    assert sum("STE at" in text for text in shown) == 4
