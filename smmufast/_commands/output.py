"""What commands print: JSON, tables, progress on a terminal, counts and notes."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

MOST_NAMES = 24  # of a summary in words


def print_json(value: Any) -> None:
    """Print one JSON document."""
    import json  # which --help does not need

    json.dump(value, sys.stdout, indent=1)
    print()


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table, its first column to the left; by rich on a terminal."""
    rows = list(rows)
    if sys.stdout.isatty():
        try:
            from rich.console import Console  # type: ignore[import-not-found,unused-ignore]
            from rich.table import Table  # type: ignore[import-not-found,unused-ignore]
            from rich.text import Text  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            pass
        else:
            table = Table(box=None, pad_edge=False, header_style="bold")
            for i, name in enumerate(head):
                table.add_column(name, justify="right" if i else "left", overflow="fold")
            for row in rows:
                table.add_row(*map(Text, row))
            Console().print(table)
            return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


class Progress:
    """A line on the terminal that appears when work takes long, and goes when it is done.

    It is called with the work done, and with all work where that is known.
    """

    WIDTH = 40

    def __init__(self, what: str) -> None:
        self.what = what
        self.stream = sys.stderr if sys.stderr is not None and sys.stderr.isatty() else None
        self.due = time.monotonic() + 0.5
        self.shown = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self.write("")

    def __call__(self, done: int, work: int = 0) -> None:
        if self.stream is None or (now := time.monotonic()) < self.due:
            return
        self.due = now + 0.1
        if work:
            filled = min(self.WIDTH * done // work, self.WIDTH)
            bar = "#" * filled + "." * (self.WIDTH - filled)
            self.write(f"{self.what} [{bar}] {100 * done // work:3d} %")
        else:
            self.write(f"{self.what}: {done}")

    def write(self, text: str) -> None:
        """Put a text in place of the one that is shown."""
        if self.stream is not None:
            self.stream.write(f"\r{text.ljust(self.shown)}" + "\r" * (not text))
            self.stream.flush()
        self.shown = len(text)


def plural(count: int, what: str) -> str:
    """Return a count with its noun: "1 request", "2 requests"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def rate_text(rate: float | None) -> str:
    """Return millions a second; nothing where no rate is known."""
    return "" if rate is None else f"{rate / 1e6:.1f}"


def counts_text(counts: dict[str, int], what: str) -> str:
    """Return how many there are of each name, the most frequent first."""
    total = plural(sum(counts.values()), what)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    names = [f"{count} {name}" for name, count in ordered[:MOST_NAMES]]
    if rest := sum(count for _, count in ordered[MOST_NAMES:]):
        names.append(f"{rest} others")
    return f"{total}: {', '.join(names)}" if names else total


def counted(names: Iterable[str]) -> dict[str, int]:
    """Count how often each name comes."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def say(problem: object) -> None:
    """Print one line that says what is wrong."""
    note("error: " + " ".join(str(problem).split()))


def note(text: str) -> None:
    """Print a line on standard error, if there is one that takes it."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"smmufast: {text}", file=sys.stderr, flush=True)
