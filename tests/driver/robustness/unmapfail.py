"""The same of an unmap, with everything in the TLB: stores of tables, as the queue has its own."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from mapfail import Medium

from smmufast.errors import InputOutput

PAGE = 4096
medium = Medium()
x, device = medium.domain, medium.device
for left in range(4):
    x.map(0, 0x8000_0000, 4 * PAGE)
    for i in range(4):
        device.translate(i * PAGE)
    medium.left = left
    try:
        x.unmap(0, 4 * PAGE)
    except InputOutput:
        assert x.mapped == 4 * PAGE and all(device.translate(i * PAGE) for i in range(4))
    else:
        raise AssertionError(f"store {left} was not refused")
    assert not medium.system.stale()
    assert x.unmap(0, 4 * PAGE) == 4 * PAGE and x.mapped == 0
    assert not any(device.translate(i * PAGE) for i in range(4))
    assert not medium.system.stale()
