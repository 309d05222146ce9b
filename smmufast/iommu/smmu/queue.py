"""The command queue of an SMMU, as a driver sees it (IHI 0070 3.5 and 4)."""

from smmufast._driver.ring import CommandQueue

__all__ = ["CommandQueue"]
