"""What `import smmufast` costs a fresh interpreter, against `import numpy`, which it needs."""

import pytest
from imports import IMPORTS, import_seconds


@pytest.mark.parametrize("module", IMPORTS)
def test_import(benchmark, module):
    """Time a fresh interpreter that imports one module and ends."""
    benchmark.group = "a fresh interpreter's import"
    benchmark.pedantic(import_seconds, (module,), rounds=7, warmup_rounds=1)
