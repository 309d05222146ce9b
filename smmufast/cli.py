"""The command `smmufast`: replay captures, walk them, list their streams and queues; decode words.

`trace` translates a file of requests through the tables of a capture.

Exit statuses: 0 done, and every outcome agrees; 1 some outcome differs; 2 bad input or usage, or
output that cannot be written; 3 nothing differs, but requests were left out as unsupported;
130 interrupted; 141 the reader of the output went away.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from smmufast._commands import capture, decode, mappings, queues, replay, streams, trace, walk
from smmufast._commands.output import say
from smmufast._commands.words import (
    AGREES,
    BAD_INPUT,
    INTERRUPTED,
    NO_READER,
    STATUSES,
    Parser,
    UsageError,
    Version,
)  # fmt: skip

__all__ = ["main"]

COMMANDS = (replay, walk, trace, streams, mappings, queues, decode, capture)


def _parser() -> argparse.ArgumentParser:
    """Return the parser with all commands."""
    parser = Parser(
        prog="smmufast",
        description="An Arm SMMUv3 model: replay captures, walk them, list their streams and "
        "queues, decode records and logs.",
        epilog=STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=Version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, text: str, capture: str = "directory of the capture"
    ) -> argparse.ArgumentParser:
        """Add a command; each has --json, and most take a capture."""
        made = commands.add_parser(
            name,
            help=text[0].lower() + text[1:].rstrip("."),
            description=text,
            epilog=STATUSES if name == "replay" else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if capture:
            made.add_argument("capture", metavar="CAPTURE", help=capture)
        made.add_argument("--json", action="store_true", help="print one JSON document")
        return made

    for module in COMMANDS:
        module.add(command)
    return parser


def _discard_output() -> None:
    """Write no more: what is left in the buffer must not fail again when Python exits."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_streams() -> None:
    """Make standard output and error able to show every text, and there at all."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before the command started
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; `argv` are the words after its name."""
    try:
        _open_streams()
        try:
            status = _run(_parser().parse_args(argv))
        except SystemExit as end:  # of argparse: bad usage, or help
            status = BAD_INPUT if end.code else AGREES
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return NO_READER
    except OSError as error:  # of standard output: what is read and written else names its file
        _discard_output()
        say(f"standard output: {error.strerror or error}")
        return BAD_INPUT


def _run(arguments: argparse.Namespace) -> int:
    """Run the command that was chosen; what goes wrong is one line."""
    expected: tuple[type[Exception], ...] = (UsageError,)
    try:
        if arguments.command != "decode":  # which needs no numpy, and nothing that is compiled
            from smmufast.capture import CaptureError

            expected = (UsageError, CaptureError)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("smmufast._"):
            raise
        say(
            f"{os.path.dirname(__file__)} is not compiled: install it, and run it outside of the "
            "source directory or with python -P"
        )
        return BAD_INPUT
    try:
        return int(arguments.run(arguments))
    except expected as error:
        say(error)
    except MemoryError:
        say("not enough memory for this input")
    except OSError as error:
        if error.filename is None or isinstance(error, BrokenPipeError):
            raise
        say(f"{os.fspath(error.filename)}: {error.strerror or error}")
    return BAD_INPUT
