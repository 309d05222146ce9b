"""A store, or a look, that memory refuses leaves page tables whole: tests/refusals.py plays it."""

import subprocess
import sys
from pathlib import Path

import pytest
from refusals import WAYS, Medium, Table, play_all

from smmufast._driver.tables import Gather
from smmufast.errors import InputOutput

RAM = 0x8000_0000
PAGE = 4096


@pytest.mark.parametrize("way", WAYS)
def test_every_store_is_refused_in_its_turn(way):
    assert play_all((4096,), (way,), step=5) > 50


@pytest.mark.slow
def test_every_store_is_refused_with_every_granule():
    assert play_all((16384, 65536), WAYS, step=23) > 100


def table(**keywords):
    medium = Medium()
    made = Table(medium, True, **keywords)
    made.medium = medium
    made.spans = [(0, 64 * PAGE)]
    return medium, made


def test_a_store_that_is_refused_once_does_not_keep_a_map_from_being_done():
    medium, t = table()
    medium.fail(0, "once")
    t.map(0, RAM, 3 * PAGE)
    assert medium.hit
    assert t.mapped == 3 * PAGE and len(t.check()) == 3


def test_an_unmap_that_is_refused_unmaps_nothing():
    medium, t = table()
    t.map(0, RAM, 8 * PAGE)
    t.fill()
    was = t.check()
    medium.fail(5, "once")
    with pytest.raises(InputOutput, match="refused an access"):
        t.unmap(0, 8 * PAGE)
    assert t.check() == was and t.mapped == 8 * PAGE
    medium.fail(None, None)
    assert t.unmap(0, 8 * PAGE) == 8 * PAGE
    assert t.check() == {}


def test_the_exception_of_a_callback_reaches_who_unmaps_and_nothing_is_unmapped():
    medium, t = table()
    t.map(0, RAM, 4 * PAGE)
    medium.fail(2, "stores and raises")
    with pytest.raises(OSError, match="planted"):
        t.unmap(0, 4 * PAGE)
    medium.fail(None, None)
    assert len(t.check()) == 4


def test_a_gather_takes_no_note_of_an_unmap_that_failed():
    medium, t = table()
    t.map(0, RAM, 4 * PAGE)
    t.fill()
    with Gather(t) as gather:
        assert t.unmap(0, PAGE, gather) == PAGE
        medium.fail(1, "once")
        with pytest.raises(InputOutput, match="refused"):
            t.unmap(PAGE, 3 * PAGE, gather)
        medium.fail(None, None)
    assert len(t.check()) == 3


def test_a_map_flushes_what_a_failed_flush_left():
    """Or hardware would go to the page that was there before."""
    _, t = table()
    t.map(0, RAM, PAGE)
    t.fill()
    good, calls = t.flush, []

    def bad(*arguments):
        calls.append(arguments)
        raise OSError("no flush")

    t.flush = bad
    with pytest.raises(OSError, match="no flush"):
        t.unmap(0, PAGE)
    assert len(calls) == 2  # what was unmapped is not to stay reachable
    with pytest.raises(OSError, match="no flush"):
        t.map(0, RAM + PAGE, PAGE)
    assert t.mapped == 0
    t.flush = good
    t.map(0, RAM + PAGE, PAGE)
    assert t.check() == {0: RAM + PAGE}


def test_a_flush_that_fails_once_is_made_up_for_at_once():
    _, t = table()
    t.map(0, RAM, PAGE)
    t.fill()
    good = t.flush

    def bad_once(*arguments):
        t.flush = good
        raise KeyError("once")

    t.flush = bad_once
    with pytest.raises(KeyError, match="once"):
        t.unmap(0, PAGE)
    assert t.check() == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mapfail", "unmapfail"])
def test_a_domain_of_a_system_survives_a_refused_store(name):
    script = Path(__file__).parent / "robustness" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, "-P", script], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
