"""Fixtures that several files share."""

import gc

import pytest

# helpers whose assertions tell what they compared
pytest.register_assert_rewrite("bench", "command", "driverhalf", "stalls")


def pytest_collection_finish(session):
    """Keep what the collection made out of every collection of garbage: 0.3 s each otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def systems():
    """Make systems; when the test ends, nothing may be inconsistent in them."""
    from smmufast.iommu import System

    made = []

    def make(*arguments, **more):
        made.append(System(*arguments, **more))
        return made[-1]

    yield make
    for system in made:
        assert system.check() == []
