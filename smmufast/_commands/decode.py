"""`smmufast decode`: records, kernel messages and traces of QEMU into words."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from smmufast._commands.output import Progress, counted, counts_text, note, print_json
from smmufast._commands.words import AGREES, Add, UsageError, add_limit, level, number

if TYPE_CHECKING:
    from smmufast.decode import Decoded

MAX_INPUT = 1 << 28  # bytes of standard input


def add(command: Add) -> None:
    """Add `decode`."""
    made = command("decode", "Decode records, kernel messages or a QEMU trace into words.", "")
    made.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help="numbers, first word first: 0x... or decimal, or those of a dump, in which each has "
        "2, 8, 16 or more digits; or a log line (default: standard input)",
    )
    made.add_argument(
        "--kind",
        metavar="K",
        help="event, command, pri, ste, cd, l1std, l1cd or pte (default: by the size)",
    )
    made.add_argument(
        "--unit",
        type=number,
        metavar="BITS",
        help="64, 32 or 8 (bytes in memory order) a number (default: by its digits)",
    )
    made.add_argument(
        "--stage", type=number, default=1, metavar="N", help="of a pte: 1 (default) or 2"
    )
    made.add_argument(
        "--granule", default="4K", metavar="G", help="of a pte: 4K (default), 16K or 64K"
    )
    made.add_argument("--level", type=level, metavar="L", help="of a pte: -1 to 3")
    made.add_argument(
        "--raw", action="store_true", help="standard input is records in memory order"
    )
    made.add_argument("--brief", action="store_true", help="one line each")
    add_limit(made, "findings")
    made.set_defaults(run=_decode)


def _decode(arguments: argparse.Namespace) -> int:
    """Run `decode`."""
    from smmufast.decode import DecodeError, decode

    data: str | bytes
    more = False
    if arguments.words:
        if arguments.raw:
            raise UsageError("--raw: reads standard input, but words are given too")
        data = " ".join(arguments.words)
    else:
        data, more = _standard_input()
        if not arguments.raw:
            data = data.decode("utf-8", "replace")
    try:
        with Progress("decoding") as progress:
            found = decode(
                data,
                arguments.kind,
                unit=arguments.unit,
                stage=arguments.stage,
                granule=arguments.granule,
                level=arguments.level,
                limit=arguments.limit,
                progress=progress,
            )
    except DecodeError as error:
        raise UsageError(error) from None
    if more:
        note(f"only the first {MAX_INPUT >> 20} MiB of standard input were read")
    if not found:
        raise UsageError(
            "nothing to decode: neither numbers, nor messages of arm-smmu-v3, nor a trace of QEMU's"
        )
    if arguments.json:
        print_json([decoded.as_dict() for decoded in found])
        return AGREES
    for i, (decoded, times) in enumerate(_runs(found)):
        again = f" ({times} times)" if times > 1 else ""
        if arguments.brief:
            where = "" if decoded.line is None else f"{decoded.line}: "
            print(f"{where}{decoded.name}: {decoded.text}{again}")
            continue
        if i:
            print()
        print(decoded)
        if again:
            print(f"  {again.strip()}")
    if len(found) > 1:
        found = [decoded for decoded in found if decoded.kind != "limit"]
        print(
            ("" if arguments.brief else "\n")
            + counts_text(counted(decoded.name for decoded in found), "finding")
        )
    return AGREES


def _standard_input() -> tuple[bytes, bool]:
    """Return what standard input holds, and whether there is more than is read of it."""
    if sys.stdin is None:
        raise UsageError("standard input is closed, and no words are given")
    if sys.stdin.isatty():
        note("reading standard input, up to Ctrl-D; --help says what else can be given")
    data = sys.stdin.buffer.read(MAX_INPUT + 1)
    return data[:MAX_INPUT], len(data) > MAX_INPUT


def _runs(found: Iterable[Decoded]) -> Iterable[tuple[Decoded, int]]:
    """Yield each finding with how often it comes in a row; their lines do not count."""
    from dataclasses import replace

    first: Decoded | None = None
    times = 0
    for decoded in found:
        if first is not None and replace(decoded, line=first.line) == first:
            times += 1
            continue
        if first is not None:
            yield first, times
        first, times = decoded, 1
    if first is not None:
        yield first, times
