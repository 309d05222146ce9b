"""What an argument must be, and the one message for one that is not.

>>> integer("sid", -1, 0xFFFFFFFF)
Traceback (most recent call last):
ValueError: sid must be 0 to 0xffffffff, not -1
>>> integer("sid", "1", 0xFFFFFFFF)
Traceback (most recent call last):
TypeError: sid must be an integer, not str
>>> one_of("granule", "8K", ("4K", "16K", "64K"))
Traceback (most recent call last):
ValueError: granule must be '4K', '16K' or '64K', not '8K'
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

__all__ = ["either", "flag", "in_words", "integer", "must_be", "one_of", "shown"]

LONGEST = 80
"""Characters of a value that a message shows."""


def shown(value: object, *, hexadecimal: bool = False) -> str:
    """Return a value as a message shows it: types by name, of long ones the type.

    Numbers from 0x10000 on are hexadecimal; all from 10 on if asked to be.
    """
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, int) and not isinstance(value, bool):
        if value.bit_length() > 128:
            return "a negative number of many digits" if value < 0 else "a number of many digits"
        if abs(value) >= (10 if hexadecimal else 0x10000):
            return f"{value:#x}"
    try:
        text = repr(value)
    except RecursionError:  # as of lists in lists, which a file may hold
        text = None
    if text is None or len(text) > LONGEST or "\n" in text:
        return f"an object of type {type(value).__name__}"
    return text


def must_be(name: str, allowed: str, value: object) -> str:
    """Return the message for an argument that is not what it must be.

    Where the type is what is wrong, that is the value.  A number is hexadecimal where the limit
    is.  `name` may also be a member of a file or of a saved state.
    """
    return in_words(name, allowed, shown(value, hexadecimal="0x" in allowed))


def in_words(name: str, allowed: str, given: str) -> str:
    """Return the same message where words tell what was given."""
    return f"{name} must be {allowed}, not {given}"


def either(allowed: Iterable[object]) -> str:
    """Return some values as a message lists them, without the empty string and None."""
    *most, last = (repr(one) for one in allowed if one is not None and one != "")
    return f"{', '.join(most)} or {last}" if most else last


def integer(name: str, value: object, last: int | None = None, first: int = 0) -> int:
    """Return an argument that must be an integer from `first` on, up to `last` if given.

    Raises
    ------
    TypeError
        It is no integer; a bool is none.
    ValueError
        It is out of range.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        found = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(must_be(name, "an integer", type(value))) from None
    if found < first or (last is not None and found > last):
        allowed = f"{first} or more" if last is None else f"{shown(first)} to {shown(last)}"
        raise ValueError(must_be(name, allowed, found))
    return found


def flag(name: str, value: object) -> bool:
    """Return an argument that must be true or false: a bool, or the integer 0 or 1.

    Raises
    ------
    TypeError
        It is neither, and no integer.
    ValueError
        It is another integer.
    """
    try:
        found = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
            return bool(value)  # which is no integer
        raise TypeError(must_be(name, "True or False", value)) from None
    if found not in (0, 1):
        raise ValueError(must_be(name, "True or False", value))
    return bool(found)


def one_of(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise a ValueError that names an argument unless it is one of some values."""
    allowed = tuple(allowed)
    # 1 and True are equal, but they are not the same argument
    if not any(type(value) is type(one) and value == one for one in allowed):
        raise ValueError(must_be(name, either(allowed), value))
