"""Random lives of systems, short ones: `lives.py` is the machine, and the longer check."""

import lives
import pytest

QUICK = 12


@pytest.mark.parametrize("seed", range(QUICK))
def test_a_life_goes_as_the_model_says(seed):
    lives.live(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(QUICK, 24))
def test_many_lives_go_as_the_model_says(seed):
    lives.live(seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "TLBI_NH_ASID", "TLBI_NH_VA", "TLBI_EL2_ASID", "TLBI_EL2_VA", "TLBI_S12_VMALL", "TLBI_S2_IPA",
    "CFGI_CD", "CFGI_STE", "ATC_INV", "RESUME", "PRI_RESP",
])  # fmt: skip
def test_a_command_that_is_lost_is_noticed(name):
    with pytest.raises(lives.Wrong):
        for seed in range(1000, 1100):
            lives.live(seed, lost=name)


def test_a_life_without_some_of_its_steps_is_the_same_life():
    """Each step draws from a generator of its own, so that failures can be made smaller."""
    steps = [*range(0, 40, 3)]
    logs = [lives.live(5, steps).log for _ in range(2)]
    assert logs[0] == logs[1]
    assert len(logs[0]) > len(lives.live(5, steps[:5]).log)
