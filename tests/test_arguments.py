"""Arguments of the Python modules: one message, whatever is given."""

import enum

import numpy as np
import pytest

from smmufast._arguments import flag, integer, one_of, shown
from smmufast._files import as_number


class Level(enum.IntEnum):
    LAST = 3


@pytest.mark.parametrize("value", [3, np.uint8(3), np.int64(3), Level.LAST])
def test_integers_of_every_type_are_plain_ints(value):
    assert integer("n", value, 7) == 3
    assert type(integer("n", value)) is int


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (-1, ValueError, "sid must be 0 to 0xffffffff, not -1"),
        (1 << 32, ValueError, "sid must be 0 to 0xffffffff, not 0x100000000"),
        (1 << 500, ValueError, "sid must be 0 to 0xffffffff, not a number of many digits"),
        (1.0, TypeError, "sid must be an integer, not float"),
        ("1", TypeError, "sid must be an integer, not str"),
        (None, TypeError, "sid must be an integer, not NoneType"),
        (True, TypeError, "sid must be an integer, not bool"),
        (np.array([1, 2]), TypeError, "sid must be an integer, not ndarray"),
    ],
)
def test_what_is_no_such_integer_is_named(value, kind, message):
    with pytest.raises(kind, match=f"^{message}$"):
        integer("sid", value, 0xFFFF_FFFF)


def test_integers_without_an_end():
    with pytest.raises(ValueError, match=r"^chunk must be 1 or more, not 0$"):
        integer("chunk", 0, first=1)
    assert integer("chunk", 1 << 200, first=1) == 1 << 200


@pytest.mark.parametrize("value", [True, 1, np.True_, np.uint8(1)])
def test_flags_are_truth_values_and_0_and_1(value):
    assert flag("write", value) is True


@pytest.mark.parametrize("value", ["no", "", None, 2, -1, 1.0, [], np.array([True])])
def test_what_merely_has_a_truth_value_is_no_flag(value):
    with pytest.raises((TypeError, ValueError), match=r"^write must be True or False, not "):
        flag("write", value)


def test_one_of_some_values_is_of_their_type():
    one_of("stage", 1, (1, 2))
    for value in (3, True, "1", 1.0):
        with pytest.raises(ValueError, match=r"^stage must be 1 or 2, not "):
            one_of("stage", value, (1, 2))
    with pytest.raises(ValueError, match=r"^unit must be 64, not 'x'$"):
        one_of("unit", "x", (None, 64))


def test_no_message_is_long_or_has_several_lines():
    for value in ("x" * 1000, "a\nb", [0] * 1000, object()):
        assert len(shown(value)) < 100
        assert "\n" not in shown(value)


@pytest.mark.parametrize(
    ("text", "number"),
    [("0x10", 16), ("0XfF", 255), ("10", 10), ("010", 10), ("0", 0), ("9" * 4096, int("9" * 4096)),
     *[(bad, None) for bad in ("", "0x", "x", "-1", "+1", "1_0", "0b1", "0o7", "1e3", " 1", "1 ",
                               "ff", "\N{ARABIC-INDIC DIGIT ONE}", "9" * 5000)]],
)  # fmt: skip
def test_numbers_are_hexadecimal_after_0x_and_else_decimal(text, number):
    assert as_number(text) == number
