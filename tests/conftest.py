"""Fixtures that several files share."""

import pytest


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
