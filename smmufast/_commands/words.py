"""What every command has: numbers, usage errors, exit statuses, options that several share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

from smmufast._arguments import must_be
from smmufast._commands.output import note
from smmufast._files import as_number

AGREES, DIFFERS, BAD_INPUT, UNSUPPORTED, INTERRUPTED, NO_READER = 0, 1, 2, 3, 130, 141

STATUSES = """\
exit status:
  0  done, and every outcome agrees
  1  some outcome differs
  2  bad input or usage, or output that cannot be written
  3  nothing differs, but requests were left out as unsupported
"""


class UsageError(Exception):
    """Arguments that do not go with the capture."""


def number(text: str) -> int:
    """Return a number that is given as 0x... or in decimal."""
    value = as_number(text)
    if value is None:
        if text[:1] == "-" and as_number(text[1:]) is not None:
            raise argparse.ArgumentTypeError(f"{shorten(text)} is negative")
        raise argparse.ArgumentTypeError(
            f"{shorten(text)!r} is not a number (0x... is hexadecimal, else decimal)"
        )
    return value


def shorten(text: str) -> str:
    """Return what a message shows of an argument."""
    return text if len(text) <= 40 else f"{text[:40]}..."


def positive(text: str) -> int:
    """Return a number of 1 or more."""
    if number := count_of_times(text):
        return number
    raise argparse.ArgumentTypeError(must_be("it", "1 or more", 0))


def count_of_times(text: str) -> int:
    """Return how often something is to be done."""
    if number(text) >> 63:
        raise argparse.ArgumentTypeError(must_be("it", "0 to 2^63 - 1", number(text)))
    return number(text)


def level(text: str) -> int:
    """Return the level of a descriptor, which alone may be negative."""
    return -1 if text == "-1" else number(text)


class Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit."""
        note(f"error: {message} ({self.prog} --help says more)")
        sys.exit(BAD_INPUT)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help; argparse would not tell that it could not."""
        if message:
            print(message, end="", file=file)


class Version(argparse.Action):
    """Print the version, which is looked up only then."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from smmufast import __version__

        print(f"smmufast {__version__}")
        parser.exit()


class Add(Protocol):
    """Adds a command to the parser, and returns the command's own parser for its options.

    `capture` is the help of its first argument, a capture; "" where it takes none.
    """

    def __call__(
        self, name: str, text: str, capture: str = "directory of the capture"
    ) -> argparse.ArgumentParser: ...


def add_limit(parser: argparse.ArgumentParser, what: str = "lines") -> None:
    """Add `--limit`."""
    parser.add_argument(
        "--limit",
        type=positive,
        default=100_000,
        metavar="N",
        help=f"stop after N {what} (default 100000)",
    )


def check_bits(**values: tuple[int | None, int]) -> None:
    """Raise for an option whose number is too large."""
    for name, (value, bits) in values.items():
        if value is not None and value >> bits:
            shown = f"{value:#x}" if value.bit_length() <= 128 else "a number of many digits"
            raise UsageError(f"--{name}: {shown} does not fit {bits} bits")
