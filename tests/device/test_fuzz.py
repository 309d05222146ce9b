"""A short run of fuzz_bytes.py, by itself and under sanitizers (sanitize.py)."""

import re
import subprocess
import sys

import fuzz_bytes
import pytest
import sanitize
from project import TESTS

from smmufast import faults


def test_a_few_random_bytes_have_defined_outcomes():
    assert fuzz_bytes.run(rounds=15, seed=1 << 32)[0] == 15


@pytest.mark.slow
def test_random_bytes_have_defined_outcomes_on_which_all_faces_agree():
    done, outcomes = fuzz_bytes.run(rounds=200, seed=0)
    assert done == 200
    assert {action for action, _ in outcomes} == {"ok", "bypass", "disabled", "abort", "raz_wi"}
    assert {fault for _, fault in outcomes} == set(faults.FAULTS)
    assert outcomes["ok", 0] > 400


def test_a_failure_names_the_seed_of_its_system(monkeypatch):
    def fails(seed):
        raise AssertionError("no")

    monkeypatch.setattr(fuzz_bytes, "round_of", fails)
    with pytest.raises(AssertionError) as caught:
        fuzz_bytes.run(rounds=1, seed=77)
    assert caught.value.__notes__ == ["fuzz_bytes: seed 77"]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """An instrumented build, for every test that wants one."""
    try:
        sanitize.libraries(sanitize.MEMORY)
    except SystemExit as reason:
        pytest.skip(str(reason))
    return tmp_path_factory.mktemp("sanitize")


def sanitized(build, *program):
    return subprocess.run(
        [sys.executable, "-P", TESTS / "sanitize.py", "--keep", build, "--optimise", "0", "--",
         *program],
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_random_bytes_do_no_harm_under_sanitizers(build):
    run = sanitized(build, TESTS / "fuzz_bytes.py", "--rounds", "60", "--seed", "1")
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"60 systems from seed 1: \d+ requests, all defined", run.stdout)


HARMS = {
    "heap-buffer-overflow": "import ctypes; b = (ctypes.c_char * 64)(); "
    "ctypes.string_at(ctypes.addressof(b), 65)",
    "heap-use-after-free": "import ctypes; b = (ctypes.c_char * 64)(); a = ctypes.addressof(b); "
    "del b; ctypes.string_at(a, 64)",
}


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARMS)
def test_the_sanitizers_see_what_they_are_there_for(build, harm):
    run = sanitized(build, "-c", f"import smmufast; {HARMS[harm]}")
    assert run.returncode != 0
    assert harm in run.stderr
