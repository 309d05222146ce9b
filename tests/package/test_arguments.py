"""Arguments of the Python modules: one message, whatever is given."""

import enum
import pathlib
import re

import numpy as np
import pytest

import smmufast
from smmufast._arguments import either, flag, in_words, integer, must_be, one_of, shown
from smmufast._files import as_number

ROOT = pathlib.Path(smmufast.__file__).parent


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
    nested = []
    for _ in range(100_000):
        nested = [nested]
    for value in ("x" * 1000, "a\nb", [0] * 1000, nested, object()):
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


# --- no message has another form ---

SOURCES = {
    file.relative_to(ROOT).as_posix(): file
    for file in sorted(ROOT.rglob("*"))
    if file.suffix in (".py", ".pyx", ".pxi", ".pxd") and file.name != "_arguments.py"
}

OTHER_FORM = re.compile(
    r"""
    (?:^|[ }])(?:given|found|returned);[ ]             # VALUE given; what is allowed
    | [:;][ ].*[ ](?:is|are)[ ](?:allowed|needed|wanted)$
    | ;[ ].*[ ]known$
    | ;[ ].*[ ](?:allowed|needed|wanted)$              # ...; LIMIT needed
    | ,[ ]got[ ]\{ | [ ]cannot[ ]be[ ]\{
    | [ }]must[ ](?:be|have|hold)[ ].*,[ ]not[ ]\{     # the form itself, without must_be()
    """,
    re.VERBOSE,
)


def literals(source):
    """Strings of a source without docstrings and comments; those side by side are one."""
    code = re.sub(r'"""[^"]*(?:"{1,2}[^"]+)*"""|^ *#.*$', "", source, flags=re.MULTILINE)
    code = re.sub(r'(?<=[^"])"\s*\n\s*f?"', "", code)
    return [found[1] for found in re.finditer(r'"((?:[^"\\\n]|\\.)*)"', code)]


@pytest.mark.parametrize("name", SOURCES)
def test_every_message_about_an_argument_is_made_by_must_be(name):
    source = SOURCES[name].read_text(encoding="utf-8")
    assert [text for text in literals(source) if OTHER_FORM.search(text)] == []


@pytest.mark.parametrize(
    "line",
    [
        'raise ValueError(f"lg2: {lg2} given; {LG2_MIN} to {LG2_MAX} allowed")',
        'raise ValueError(f"{what}: {value!r} given; one of "\n    f"{listed} needed")',
        'raise TypeError(f"state: {type(state).__name__} given; bytes needed")',
        'raise state_error(what, f"{value:#x}; {first:#x} to {last:#x} allowed")',
        'raise state_error(what, f"{type(value).__name__} found; a number")',
        'raise TypeError(f"read callback: {data!r} returned; bytes or None")',
        'line.bad(f"{name}: {_kind(value)} found; a list is wanted")',
        'raise E(f"row {row}: {name} {value} found; 0 or 1"\n        " is allowed")',
        'raise ValueError(f"{name} cannot be {value:#x}: 0 to 7 is allowed")',
        'raise ValueError(f"size must be in 1..{last}, got {size}")',
        'raise ValueError(f"{name} must be -1 to 3, not {number}")',
    ],
)
def test_a_message_of_another_form_would_be_found(line):
    source = f'def f():\n    """A value given; another needed."""\n    {line}\n'
    assert any(map(OTHER_FORM.search, literals(source)))
    comment = "# " + line.replace("\n", "\n    # ")
    assert not any(map(OTHER_FORM.search, literals(source.replace(line, comment))))


def test_what_was_given_may_be_a_type_or_words():
    assert must_be("state", "bytes", str) == "state must be bytes, not str"
    assert must_be("size", "0 to 0x20", 33) == "size must be 0 to 0x20, not 0x21"
    assert must_be("size", "0 to 32", 33) == "size must be 0 to 32, not 33"
    assert in_words("dtype", "uint8", ">u8") == "dtype must be uint8, not >u8"
    assert either(("", "lru", None, "fifo")) == "'lru' or 'fifo'"
    assert either(("", "a", "b", "c")) == "'a', 'b' or 'c'"
