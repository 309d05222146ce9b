"""`smmufast events` and `smmufast commands`: the queues of a capture, oldest first."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from smmufast._commands.output import Progress, counted, counts_text, print_json
from smmufast._commands.words import AGREES, Add, UsageError, add_limit

if TYPE_CHECKING:
    from smmufast.decode import Decoded
    from smmufast.features import Features


def add(command: Add) -> None:
    """Add `events` and `commands`."""
    made = command("events", "List the event records of a capture, oldest first.")
    add_limit(made)
    made.set_defaults(run=_events)
    made = command(
        "commands",
        "List the command queue of a capture, oldest first.",
        "directory of the capture, or a queues.jsonl.gz with batches of commands",
    )
    add_limit(made)
    made.set_defaults(run=_commands)


def _queue_head(name: str, what: str, queue: Any) -> str:
    return (
        f"{name}: {what} queue of {1 << queue.log2size} slots at "
        f"{queue.base & 0xFF_FFFF_FFFF_FFE0:#x}, PROD={queue.prod:#x}, CONS={queue.cons:#x}"
    )


def _queue_json(queue: Any) -> dict[str, int]:
    return {
        "log2size": queue.log2size,
        "base": queue.base,
        "prod": queue.prod,
        "cons": queue.cons,
        "first_slot": queue.first,
    }


def _check_directory(path: str) -> None:
    """Raise as loading does for a path that is no capture at all."""
    from smmufast.capture import Capture

    if not os.path.exists(os.path.join(path, "meta.json")):
        Capture.load(path)


def _events(arguments: argparse.Namespace) -> int:
    """Run `events`."""
    from smmufast.capture import held_queues, load_events, load_queue
    from smmufast.faults import Event

    path = arguments.capture
    if os.path.isfile(path):
        raise UsageError(f"{path}: a file; event records are in the directory of a capture")
    head = queue = None
    records: list[tuple[str, bytes]] = []
    if "events" in held_queues(path):
        queue = load_queue(path, "events")
        slots = 1 << queue.log2size
        records = [
            (f"{(queue.first + i) % slots:#x}", record) for i, record in enumerate(queue.records)
        ]
        head = _queue_head(os.path.basename(os.path.abspath(path)), "event", queue)
    if not records:  # those that the requests ended in are listed beside them
        if not os.path.exists(os.path.join(path, "cases.jsonl.gz")):
            _check_directory(path)
        records = load_events(path)
    found = []
    with Progress("decoding") as progress:
        for i, (where, record) in enumerate(records):
            if not i % 1024:
                progress(i, len(records))
            found.append((where, Event(record)))
    counts = counted(event.name for _, event in found)
    more = len(found) > arguments.limit
    shown = found[: arguments.limit]
    if arguments.json:
        print_json(
            {
                "capture": path,
                "queue": None if queue is None else _queue_json(queue),
                "events": [
                    {
                        "where": where,
                        "name": event.name,
                        "record": event.record.hex(),
                        "fields": event.fields,
                    }
                    for where, event in shown
                ],
                "counts": counts,
                "more": more,
            }
        )
        return AGREES
    if head is not None:
        print(head)
    for where, event in shown:
        print(f"{where:<8} {repr(event)[len('<Event ') : -1]}")
    if more:
        print("There are more: see --limit.")
    print(counts_text(counts, "event"))
    return AGREES


def _commands(arguments: argparse.Namespace) -> int:
    """Run `commands`."""
    from smmufast.capture import load_batches, load_queue

    path = arguments.capture
    if os.path.isfile(path):
        return _command_batches(arguments, *load_batches(path))
    if os.path.exists(os.path.join(path, "cases.jsonl.gz")):
        raise UsageError(f"{path}: this kind of capture has no command queue")
    _check_directory(path)
    queue = load_queue(path, "commands")
    commands, counts = _decoded_commands(queue.records, queue.features, arguments.limit)
    slots = 1 << queue.log2size
    more = len(queue.records) > arguments.limit
    if arguments.json:
        print_json(
            {
                "capture": path,
                "queue": _queue_json(queue),
                "commands": [
                    {"slot": (queue.first + i) % slots} | _command_json(command)
                    for i, command in enumerate(commands)
                ],
                "counts": counts,
                "more": more,
            }
        )
        return AGREES
    print(_queue_head(os.path.basename(os.path.abspath(path)), "command", queue))
    for i, command in enumerate(commands):
        print(f"{(queue.first + i) % slots:<#8x} {_command_line(command)}")
    if more:
        print("There are more: see --limit.")
    print(counts_text(counts, "command"))
    return AGREES


def _decoded_commands(
    records: Sequence[bytes], features: Features, limit: int
) -> tuple[list[Decoded], dict[str, int]]:
    """Return the first commands decoded, and how many there are of each among all."""
    from smmufast.decode import decode

    known: dict[bytes, Decoded] = {}
    names = []
    with Progress("decoding") as progress:
        for i, record in enumerate(records):
            if not i % 256:
                progress(i, len(records))
            if record not in known:
                (known[record],) = decode(record, "command", features=features)
            names.append(known[record].name)
    return [known[record] for record in records[:limit]], counted(names)


def _command_line(command: Decoded) -> str:
    return "; ".join((f"{command.name}: {command.text}", *command.meaning))


def _command_json(command: Decoded) -> dict[str, Any]:
    shown = command.as_dict()
    return {name: shown[name] for name in ("name", "record", "fields", "text", "meaning")}


def _command_batches(
    arguments: argparse.Namespace, features: Features, batches: Sequence[Any]
) -> int:
    """Run `commands` on a file of batches."""
    left = arguments.limit
    documents = []
    names: dict[str, int] = {}
    more = False
    for batch in batches:
        commands, counts = _decoded_commands(batch.commands, features, left)
        for name, count in counts.items():
            names[name] = names.get(name, 0) + count
        if left <= 0 and batch.commands:
            more = True
            continue
        left -= len(commands)
        more |= len(commands) < len(batch.commands)
        if arguments.json:
            documents.append(
                {
                    "id": batch.id,
                    "start": batch.start,
                    "prod": batch.prod,
                    "cons": batch.cons,
                    "err": batch.err,
                    "commands": [_command_json(command) for command in commands],
                }
            )
            continue
        print(
            f"batch {batch.id}: from index {batch.start:#x} to {batch.prod:#x}; "
            f"CMDQ_CONS became {batch.cons:#x} (ERR={batch.err})"
        )
        for i, command in enumerate(commands):
            print(f"  {i:<6} {_command_line(command)}")
    if arguments.json:
        print_json(
            {"capture": arguments.capture, "batches": documents, "counts": names, "more": more}
        )
        return AGREES
    if more:
        print("There are more: see --limit.")
    print(counts_text(names, "command"))
    return AGREES
