"""What takes back the beginning of a call that fails."""

from smmufast._ring import Undo

__all__ = ["Undo"]
