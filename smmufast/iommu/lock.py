"""The lock of a system: one call at a time, and what observers may do meanwhile."""

from smmufast._driver.ring import SystemLock

__all__ = ["SystemLock"]
