"""Queues of a capture: rings in mid-history, batches of commands, fillings of event queues."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from smmufast import layout
from smmufast._arguments import in_words, one_of
from smmufast._tools.capture_files import (
    MAX_REQUESTS,
    NEEDED,
    PAGE,
    U32,
    U64,
    CaptureError,
    Line,
    features_of,
    kind_of,
    line_registers,
    read_lines,
    read_meta,
    read_pages,
)
from smmufast._tools.capture_outcomes import read_record
from smmufast.features import Features


class Queue(NamedTuple):
    """A queue of a capture: what lies in its ring, oldest first.

    Where PROD's wrap bit is set and no slot is zero, every slot is a record and the oldest one is
    in the slot at PROD.  Otherwise the slots from 0 to PROD-1 are records.

    Attributes
    ----------
    features : Features
        As recorded.
    base, prod, cons : int
        The queue's registers.
    log2size : int
        The ring has 2^log2size slots.
    first : int
        Slot of the oldest record.
    records : tuple of bytes
        In memory order; the slot of ``records[i]`` is ``(first + i) % 2**log2size``.
    """

    features: Features
    base: int
    prod: int
    cons: int
    log2size: int
    first: int
    records: tuple[bytes, ...]


QUEUES = {
    "commands": ("CMDQ", "cmdqs", 16),
    "events": ("EVENTQ", "eventqs", 32),
    "pages": ("PRIQ", "priqs", 16),
}
QUEUE_PARTS = ("BASE", "PROD", "CONS")


def _ring(registers: Mapping[str, int], features: Features, which: str) -> tuple[int, int, int]:
    """Return where a queue lies: base, log2 of its slots, bytes of a slot."""
    name, limit, size = QUEUES[which]
    fields = layout.unpack(f"{name}_BASE", registers[f"{name}_BASE"])
    log2size = min(fields["LOG2SIZE"], getattr(features, limit))
    return fields["ADDR"] & -(size << log2size), log2size, size


def queue_pages(registers: Mapping[str, int]) -> list[int]:
    """Return the pages that the queues lie in, of which the registers are given."""
    words = (registers[name] for name in ("IDR0", "IDR1", "IDR3", "IDR5", "AIDR"))
    features = Features.from_idr(*words)
    found: set[int] = set()
    for which, (name, _, _) in QUEUES.items():
        if f"{name}_BASE" in registers:
            base, log2size, size = _ring(registers, features, which)
            found.update(range(base & -PAGE, base + (size << log2size), PAGE))
    return sorted(found)


def held_queues(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return which queues a capture of kind "linux" holds, by the names that `load_queue` takes.

    Raises
    ------
    CaptureError
        The capture cannot be read.
    """
    path = os.fspath(path)
    if not os.path.exists(os.path.join(path, "queues.npz")):
        return ()
    registers = read_meta(os.path.join(path, "meta.json")).inner("regs").values
    return tuple(
        which
        for which, (name, _, _) in QUEUES.items()
        if any(f"{name}_{part}" in registers for part in QUEUE_PARTS)
    )


def load_queue(path: str | os.PathLike[str], which: str) -> Queue:
    """Read one queue of a capture of kind "linux": `which` is "commands", "events" or "pages".

    Raises
    ------
    CaptureError
        The capture has no queues, or cannot be read.
    ValueError
        There is no such queue.
    """
    one_of("which", which, QUEUES)
    name = QUEUES[which][0]
    path = os.fspath(path)
    meta = read_meta(os.path.join(path, "meta.json"))
    needed = (*NEEDED, *(f"{name}_{part}" for part in QUEUE_PARTS))
    registers = line_registers(meta, meta.inner("regs").values, needed)
    features = features_of(meta, registers)
    base, prod, cons = (registers[f"{name}_{part}"] for part in QUEUE_PARTS)
    first, log2size, size = _ring(registers, features, which)
    slots = 1 << log2size
    ring = bytearray(size << log2size)
    where = os.path.join(path, "queues.npz")
    if not os.path.exists(where):
        raise CaptureError(where, None, "there is none: the capture holds no queues")
    addresses, pages = read_pages(where)
    for address, page in zip(addresses.tolist(), pages, strict=True):
        start, end = max(address, first), min(address + PAGE, first + len(ring))
        if start < end:
            ring[start - first : end - first] = page[start - address : end - address].tobytes()
    records = [bytes(ring[at : at + size]) for at in range(0, len(ring), size)]
    at = prod & (slots - 1)
    if prod & slots and all(map(any, records)):
        records = records[at:] + records[:at]
    else:
        at, records = 0, records[:at]
    return Queue(features, base, prod, cons, log2size, at, tuple(records))


def load_events(path: str | os.PathLike[str]) -> list[tuple[str, bytes]]:
    """Return the event records that a capture lists beside its requests, and where each stands.

    Raises
    ------
    CaptureError
        The capture cannot be read.
    """
    path = os.fspath(path)
    where = os.path.join(path, "cases.jsonl.gz")
    found = []
    if os.path.exists(where):
        lines = read_lines(where)
        next(lines, None)
        for line in lines:
            for request in line.list("reqs"):
                one = Line(line.path, line.number, request)
                if "out" in one.values and one.inner("out").values.get("k") == "event":
                    record = read_record(one.inner("out"), "rec")
                    found.append((line.text("id"), record))
        return found
    read_meta(os.path.join(path, "meta.json"))
    for line in read_lines(os.path.join(path, "events.jsonl.gz")):
        found.append((f"line {line.number}", read_record(line, "hex")))
    return found


class Batch(NamedTuple):
    """Commands that were given to an SMMU at once, and how far it came.

    Attributes
    ----------
    id : int
    start, prod : int
        CMDQ_CONS and CMDQ_PROD before.
    cons : int
        CMDQ_CONS after.
    err : int
        CMDQ_CONS.ERR after.
    commands : tuple of bytes
        In memory order.
    """

    id: int
    start: int
    prod: int
    cons: int
    err: int
    commands: tuple[bytes, ...]


def load_batches(path: str | os.PathLike[str]) -> tuple[Features, list[Batch]]:
    """Return the features and the command batches of a file of them.

    Raises
    ------
    CaptureError
        The file cannot be read.
    """
    path = os.fspath(path)
    lines = read_lines(path)
    header = next(lines, None)
    if header is None:
        raise CaptureError(path, None, in_words("the first line", "a header", "missing"))
    header.get("header")
    needed = ("IDR0", "IDR1", "IDR3", "IDR5")
    features = features_of(header, line_registers(header, header.inner("idr").values, needed))
    found: list[Batch] = []
    for line in lines:
        if line.text("kind") != "cmds":
            continue
        if len(found) == MAX_REQUESTS:
            line.bad(f"more than {MAX_REQUESTS} batches")
        commands = []
        for text in line.list("cmds"):
            try:
                command = bytes.fromhex(text) if isinstance(text, str) else b""
            except ValueError:
                command = b""
            if len(command) != 16:
                line.bad(in_words("cmds", "16 bytes in hexadecimal each", kind_of(text)))
            commands.append(command)
        start, prod, cons = (line.integer(name, U32) for name in ("start", "prod", "cons"))
        err = line.integer("err", 0x7F)
        found.append(Batch(line.integer("id", U64), start, prod, cons, err, tuple(commands)))
    return features, found


class Filling(NamedTuple):
    """Events that were recorded until the event queue was full, and on.

    Attributes
    ----------
    line : int
        Where it stands in its file.
    log2size : int
        The ring has 2^log2size slots.
    start : int
        EVENTQ_PROD and EVENTQ_CONS before.
    prods : tuple of int
        EVENTQ_PROD after each event.
    """

    line: int
    log2size: int
    start: int
    prods: tuple[int, ...]


def load_fillings(path: str | os.PathLike[str]) -> list[Filling]:
    """Return the runs that filled the event queue, of a file as `load_batches` reads.

    Raises
    ------
    CaptureError
        The file cannot be read.
    """
    found = []
    for line in read_lines(os.fspath(path)):
        if line.values.get("kind") != "evtq_full":
            continue
        log2size = line.integer("log2size", 16)
        prods = []
        for step in line.list("steps"):
            prods.append(Line(line.path, line.number, step).integer("prod", U32))
        start = line.integer("start", (2 << log2size) - 1)
        found.append(Filling(line.number or 0, log2size, start, tuple(prods)))
    return found
