"""A store, or a look, that memory refuses leaves page tables whole: tests/refusals.py plays it."""


import pytest
from medium import SystemMedium
from refusals import WAYS, Medium, Table, play_all

from smmufast import Caches, ExternalAbort
from smmufast._driver.tables import Gather
from smmufast.errors import InputOutput

RAM = 0x8000_0000
PAGE, M = 4096, 1 << 20


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


def mapfail(medium, device, domain):
    """Stores of a map, of its tables and of the queue: it is there as a whole or not at all."""
    pages = range(2 * M, 10 * M, 2 * M)
    for left in range(12):
        domain.map(2 * M, RAM, PAGE)
        domain.unmap(2 * M, PAGE)
        medium.left = left
        failed = False
        try:
            domain.map(2 * M, RAM, 8 * M)
        except (InputOutput, ExternalAbort):  # the tables', the queue's
            failed = True
        medium.left = None
        there = [at for at in pages if domain.iova_to_phys(at)]
        assert domain.mapped == 2 * M * len(there) == (0 if failed else 8 * M), (left, there)
        for at in pages:
            assert bool(device.translate(at)) == (at in there)
        assert not medium.system.stale()
        domain.unmap(2 * M, 8 * M)


def unmapfail(medium, device, domain):
    """An unmap with everything in the TLB."""
    for left in range(4):  # stores of tables, as the queue has its own
        domain.map(0, RAM, 4 * PAGE)
        for i in range(4):
            device.translate(i * PAGE)
        medium.left = left
        with pytest.raises(InputOutput):
            domain.unmap(0, 4 * PAGE)
        assert domain.mapped == 4 * PAGE and all(device.translate(i * PAGE) for i in range(4))
        assert not medium.system.stale()
        assert domain.unmap(0, 4 * PAGE) == 4 * PAGE and domain.mapped == 0
        assert not any(device.translate(i * PAGE) for i in range(4))
        assert not medium.system.stale()


@pytest.mark.slow
@pytest.mark.parametrize("play", [mapfail, unmapfail], ids=lambda play: play.__name__)
def test_a_domain_of_a_system_survives_a_refused_store(play):
    medium = SystemMedium(refusal=None, caches=Caches.server)
    device = medium.system.device(8)
    domain = device.paging_domain()
    device.attach(domain)
    play(medium, device, domain)
