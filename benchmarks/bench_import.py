"""What `import smmufast` costs a fresh interpreter, against `import numpy`, which it needs."""

import pytest
from imports import IMPORTS, children_seconds, fresh_import


@pytest.mark.benchmark(group="import in a fresh interpreter", timer=children_seconds)
@pytest.mark.parametrize("module", IMPORTS)
def test_import(benchmark, module):
    """Time a fresh interpreter that imports one module and ends: its processor time."""
    benchmark.name = f"import {module}"
    benchmark.pedantic(fresh_import, (module,), rounds=7, warmup_rounds=1)
