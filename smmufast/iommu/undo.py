"""What takes back the beginning of a call that fails."""

from smmufast._driver.ring import Undo

__all__ = ["Undo"]
