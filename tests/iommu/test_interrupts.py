"""A signal whose handler raises, at random instants of driver calls: nothing is held or half made.

Where the driver half is not compiled (a build in place), a handler may run between any two of its
lines; docs/domains.md says so.
"""

import interrupts
import pytest

COMPILED = pytest.mark.skipif(
    not interrupts.COMPILED, reason="the driver half is compiled in an installed package alone"
)


@COMPILED
@pytest.mark.parametrize("seed", [1, 2])
def test_an_interrupted_call_is_done_or_undone_and_holds_nothing(seed):
    found, hit = interrupts.run(400, seed)
    assert found == []
    assert hit


@COMPILED
@pytest.mark.slow
def test_no_interrupt_of_many_leaves_anything():
    found, hit = interrupts.run(1000, 100)
    assert found == []
    assert hit > 100
