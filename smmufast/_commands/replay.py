"""`smmufast replay`: translate every recorded request, or every recorded batch of commands."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from smmufast._commands.captures import load, masked_text
from smmufast._commands.output import Progress, plural, print_json, print_table, rate_text
from smmufast._commands.words import (
    AGREES,
    DIFFERS,
    UNSUPPORTED,
    Add,
    UsageError,
    count_of_times,
    number,
    positive,
)  # fmt: skip

if TYPE_CHECKING:
    from smmufast.replay import Difference, Replay, Tally
    from smmufast.traffic import Replayed


def add(command: Add) -> None:
    """Add `replay`."""
    made = command(
        "replay",
        "Translate every recorded request and compare each outcome.",
        "directory of the capture or of recorded traffic, or a queues.jsonl.gz with batches of "
        "commands",
    )
    made.add_argument(
        "--repeat",
        type=positive,
        default=1,
        metavar="N",
        help="translate each stream's requests N times in batches",
    )
    made.add_argument(
        "--random",
        type=count_of_times,
        default=0,
        metavar="N",
        help="translate N more addresses at random places of the pages hit",
    )
    made.add_argument("--seed", type=number, default=1, metavar="N", help="of --random")
    made.add_argument(
        "--differences",
        type=count_of_times,
        default=3,
        metavar="N",
        help="explain the first N differences (default 3)",
    )
    made.add_argument(
        "--allow-unsupported",
        action="store_true",
        help="do not fail on requests that this version cannot do",
    )
    traffic = made.add_argument_group("for recorded traffic")
    traffic.add_argument(
        "--caches", choices=("none", "small", "server"), help="model these caches (default none)"
    )
    traffic.add_argument(
        "--until", type=positive, metavar="N", help="stop behind line N of the log"
    )
    traffic.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="COMMAND",
        help="leave out every command of this name, such as TLBI_NH_VA: what breaks?",
    )
    made.set_defaults(run=_replay)


def _replay(arguments: argparse.Namespace) -> int:
    """Run `replay`: of a capture, or of what else the argument is."""
    from smmufast.replay import replay

    if os.path.isfile(arguments.capture):
        return _replay_queues(arguments)
    if os.path.exists(os.path.join(arguments.capture, "log.jsonl.gz")):
        return _replay_traffic(arguments)
    if arguments.caches or arguments.until or arguments.drop:
        raise UsageError("--caches, --until, --drop: for recorded traffic, which this is not")
    capture = load(arguments.capture)
    if not any(len(configuration.requests) for configuration in capture):
        raise UsageError(f"{arguments.capture}: no requests are recorded, nothing to replay")
    with Progress("replaying") as progress:
        found = replay(
            capture,
            repeat=arguments.repeat,
            random=arguments.random,
            seed=arguments.seed,
            keep=arguments.differences,
            progress=progress,
        )
    if found.total.differing or found.random_differing:
        status = DIFFERS
    else:
        left_out = found.total.unsupported and not arguments.allow_unsupported
        status = UNSUPPORTED if left_out else AGREES
    if arguments.json:
        print_json(found.as_dict() | {"status": status})
    else:
        _print_replay(found)
        if arguments.random and not found.random:
            print("No request hits a page: no random translations were made.")
    return status


def _replay_queues(arguments: argparse.Namespace) -> int:
    """Run `replay` on a file of batches of commands."""
    from smmufast.replay import replay_queues

    with Progress("replaying") as progress:
        found = replay_queues(arguments.capture, progress)
    if not found.total.requests:
        raise UsageError(f"{arguments.capture}: no batches are recorded, nothing to replay")
    status = DIFFERS if found.total.differing else AGREES
    if arguments.json:
        print_json(found.as_dict() | {"status": status})
        return status
    if found.causes:
        _print_causes(found.causes)
        print()
    for difference in found.differences[: arguments.differences]:
        print(f"Difference: {difference}")
    total = found.total
    print(
        f"{os.path.basename(arguments.capture)}: {total.requests} batches and runs: "
        f"{total.agreeing} agree, {total.differing} differ"
    )
    return status


def _replay_traffic(arguments: argparse.Namespace) -> int:
    """Run `replay` on recorded traffic."""
    from smmufast.capture import CaptureError
    from smmufast.traffic import replay

    try:
        with Progress("replaying") as progress:
            found = replay(
                arguments.capture,
                caches=arguments.caches,
                until=arguments.until,
                drop=arguments.drop,
                progress=progress,
            )
    except CaptureError:
        raise
    except ValueError as error:  # of --drop: a name that no command has
        raise UsageError(f"--{error}") from None
    status = DIFFERS if found.divergence else AGREES
    if arguments.json:
        print_json(found.as_dict() | {"status": status})
        return status
    if found.masked:
        print(masked_text(found.masked) + "\n")
    print_table(
        ("agree", "steps"), ((_LETTERS[op], str(n)) for op, n in sorted(found.compared.items()))
    )
    for cause, times in sorted(found.known.items()):
        print(f"Known: {cause}: {times}")
    if arguments.drop:
        print(_dropped_text(found))
    name = os.path.basename(os.path.abspath(arguments.capture))
    ends = "no divergence" if found.divergence is None else f"diverges at {found.divergence}"
    print(f"{name}: {plural(found.steps, 'step')}; {ends}")
    return status


_LETTERS = {
    "R": "register reads", "T": "translations", "B": "bypasses", "A": "aborts",
    "N": "found it disabled", "E": "events", "I": "interrupts",
}  # fmt: skip


def _dropped_text(found: Replayed) -> str:
    """Say what the commands that were left out were needed for."""
    text = f"Left out: {plural(found.dropped, 'command')}"
    if found.divergence is not None or not found.dropped:
        return text
    if found.stale:
        return (
            f"{text}. Nothing that was asked needed them, but up to {found.stale} entries of "
            "caches were stale"
        )
    return f"{text}. They were needless: nothing that was asked needed them, and no entry was stale"


def _page_sizes(tally: Tally) -> str:
    units = ("", "K", "M", "G", "T", "P")
    return ", ".join(
        f"{1 << lg2 % 10}{units[lg2 // 10]}: {count}"
        for lg2, count in sorted(tally.page_lg2.items())
    )


_COUNTS = ("requests", "agreeing", "differing", "unsupported")


def _print_causes(causes: dict[str, Tally]) -> None:
    """Print the verdicts on what the recorded implementation does otherwise."""
    rows = ((cause, *_counts(tally)) for cause, tally in sorted(causes.items()))
    print_table(("cause", *_COUNTS), rows)


def _counts(tally: Tally) -> tuple[str, str, str, str]:
    return (str(tally.requests), str(tally.agreeing), str(tally.differing), str(tally.unsupported))


def _stream_rate(tally: Tally) -> str:
    """Millions a second, where there were enough to tell."""
    return rate_text(tally.rate) if tally.translations >= 1000 else "-"


def _print_replay(found: Replay) -> None:
    """Print what a replay of a capture found: a table by stream, differences, sums."""
    capture, total = found.capture, found.total
    print(
        f"{capture.name}: {plural(len(capture), 'configuration')}, "
        f"{plural(total.requests, 'request')}"
    )
    if capture.masked:
        print(masked_text(capture.masked))
    print()
    print_table(
        ("stream", *_COUNTS, "page sizes", "million/s"),
        (
            (f"{sid:#x}", *_counts(tally), _page_sizes(tally), _stream_rate(tally))
            for sid, tally in sorted(found.streams.items())
        ),
    )
    if found.causes:
        print()
        _print_causes(found.causes)
    for difference in found.differences:
        _print_difference(difference)
    print()
    if found.random:
        rate = rate_text(found.random / found.random_seconds) if found.random_seconds else "?"
        print(
            f"{plural(found.random, 'random translation')}: {found.random_differing} differ; "
            f"{rate} million/s"
        )
    needs = "".join(f"; {count} need {need}" for need, count in sorted(found.unsupported.items()))
    print(
        f"{plural(total.requests, 'request')}: {total.agreeing} agree, {total.differing} differ, "
        f"{total.unsupported} unsupported{needs}"
    )


def _print_difference(difference: Difference) -> None:
    shown = difference.as_dict()
    cause = f" (cause {shown['cause']})" if shown["cause"] else ""
    print(f"\nDifference: configuration {shown['configuration']}, {shown['where']}{cause}")
    for reason in shown["reasons"]:
        print(f"  {reason}")
    for line in shown["explain"].splitlines():
        print(f"  | {line}".rstrip())
