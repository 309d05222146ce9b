"""Replay: translate every request of a capture and compare each outcome with the expected one.

Batches of commands and runs that filled an event queue are replayed too, through the registers.
Not architectural; how outcomes are compared is written in `smmufast.capture`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from smmufast import layout
from smmufast._arguments import integer
from smmufast._device.smmu import NO_SUBSTREAM, Result, Smmu
from smmufast._engine.memory import Memory
from smmufast.capture import (
    ANY,
    REQUEST,
    UNTOLD,
    Batch,
    Capture,
    Configuration,
    Expected,
    Filling,
    load_batches,
    load_fillings,
    translate_alone,
)
from smmufast.faults import ACTIONS
from smmufast.features import modelled
from smmufast.streams import unmodelled

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

    from smmufast.features import Features

__all__ = ["Difference", "QueueReplay", "Replay", "Tally", "replay", "replay_queues"]

CHUNK = 1 << 16
"""Random requests that are made at a time."""
STEP = 1 << 10
"""Requests that are compared between reports of progress."""

_COLUMNS = ("pa", "action", "fault", "record")
_STALL = ACTIONS.index("stall")
_PERMISSION = layout.Event.F_PERMISSION
_ACCESSES: tuple[tuple[int, str, dict[str, bool]], ...] = (
    (1, "read", {}),
    (2, "write", {"write": True}),
    (4, "instruction read", {"instr": True}),
)


@dataclass
class Tally:
    """How the requests of a stream, or of a cause, came out.

    Attributes
    ----------
    requests, agreeing, differing, unsupported : int
    page_lg2 : Counter of int
        Translations by log2 of the page size.
    translations, seconds
        Translations made in batches, and the time they took.
    """

    requests: int = 0
    agreeing: int = 0
    differing: int = 0
    unsupported: int = 0
    page_lg2: Counter[int] = field(default_factory=Counter)
    translations: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float | None:
        """Translations a second, None without a measurement."""
        return self.translations / self.seconds if self.seconds else None

    def count(self, verdict: str) -> None:
        """Count one request: "agreeing", "differing" or "unsupported"."""
        self.requests += 1
        setattr(self, verdict, getattr(self, verdict) + 1)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "requests": self.requests,
            "agreeing": self.agreeing,
            "differing": self.differing,
            "unsupported": self.unsupported,
        }


@dataclass
class Difference:
    """A request whose outcome is not the expected one.

    Attributes
    ----------
    configuration : Configuration
    index : int
        Of the request.
    reasons : list of str
        What differs.
    expected : Expected
    result : Result
        With its fetches.
    smmu : Smmu
    """

    configuration: Configuration
    index: int
    reasons: list[str]
    expected: Expected
    result: Result
    smmu: Smmu

    def _repr_html_(self) -> str:
        from smmufast._html import fields

        return fields(self)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        from smmufast.explain import explain

        request = _request(self.configuration, self.index)
        return {
            "configuration": self.configuration.id,
            "where": self.configuration.where(self.index),
            "request": request,
            "reasons": self.reasons,
            "cause": self.expected.cause,
            "explain": explain(self.result, self.smmu),
        }


@dataclass
class Replay:
    """What a replay found.

    Attributes
    ----------
    capture : Capture
    total : Tally
    streams : dict of int to Tally
        By StreamID, over all configurations.
    causes : dict of str to Tally
        By `Expected.cause`.
    unsupported : Counter of str
        Requests that this version cannot do, by what they need.
    differences : list of Difference
        The first ones.
    random, random_differing : int
        Random requests made, and those that did not give the recorded page.
    random_seconds : float
    """

    capture: Capture
    total: Tally = field(default_factory=Tally)
    streams: dict[int, Tally] = field(default_factory=dict)
    causes: dict[str, Tally] = field(default_factory=dict)
    unsupported: Counter[str] = field(default_factory=Counter)
    differences: list[Difference] = field(default_factory=list)
    random: int = 0
    random_differing: int = 0
    random_seconds: float = 0.0

    def _repr_html_(self) -> str:
        from smmufast._html import fields

        return fields(self)

    def __bool__(self) -> bool:
        """Whether nothing differs and nothing was left out."""
        return not (self.total.differing or self.random_differing or self.total.unsupported)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return {
            "capture": self.capture.path,
            "kind": self.capture.kind,
            "configurations": len(self.capture),
            "masked": self.capture.masked,
            **self.total.as_dict(),
            "unsupported_needs": dict(self.unsupported),
            "streams": [
                {
                    "sid": sid,
                    **tally.as_dict(),
                    "page_sizes": {str(1 << lg2): n for lg2, n in sorted(tally.page_lg2.items())},
                    "translations_per_second": tally.rate,
                }
                for sid, tally in sorted(self.streams.items())
            ],
            "causes": [
                {"cause": cause, **tally.as_dict()} for cause, tally in sorted(self.causes.items())
            ],
            "random": {
                "requests": self.random,
                "differing": self.random_differing,
                "translations_per_second": self.random / self.random_seconds
                if self.random_seconds
                else None,
            },
            "differences": [difference.as_dict() for difference in self.differences],
        }


def replay(
    capture: Capture,
    *,
    repeat: int = 1,
    random: int = 0,
    seed: int = 1,
    keep: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> Replay:
    """Translate every request of a capture and compare.

    Each request is translated alone and compared; then the requests of each stream are translated
    by `Smmu.translate_batch`, which must give the same and is timed.  Where the SMMU updates
    tables, a batch may change what its later rows find: a row that differs is tried again alone.
    A request on a stream that needs a feature in `Capture.masked` is counted as unsupported,
    whatever comes of it.

    Parameters
    ----------
    capture : Capture
    repeat : int
        How often the batches run.
    random : int
        That many more accesses at random places of the pages that the requests hit, compared by
        address.
    seed : int
        Of these.
    keep : int
        How many differences are kept whole.
    progress : callable, optional
        Called with work done and all work, in translations.

    Returns
    -------
    Replay

    Raises
    ------
    TypeError, ValueError
        A number is none, or negative; `repeat` is below 1.
    """
    repeat = integer("repeat", repeat, first=1)
    random, keep = integer("random", random), integer("keep", keep)
    run = _Run(Replay(capture), repeat, keep, progress, integer("seed", seed))
    count = sum(len(configuration.requests) for configuration in capture)
    run.work = count * (1 + repeat) + random
    left = random
    for configuration in capture:
        # its share of the random requests, so that all of them are made
        share = round(left * len(configuration.requests) / count) if count else 0
        count -= len(configuration.requests)
        left -= run.configuration(configuration, share)
    run.rest(left)
    return run.found


class _Run:
    def __init__(
        self,
        found: Replay,
        repeat: int,
        keep: int,
        progress: Callable[[int, int], None] | None,
        seed: int,
    ) -> None:
        """Begin with nothing compared."""
        self.found = found
        self.repeat = repeat
        self.keep = keep
        self.progress = progress
        self.random = np.random.default_rng(seed)
        self.work = 0
        self.done = 0
        self.last: tuple[Configuration, Smmu, NDArray[np.uint8]] | None = None

    def rest(self, random: int) -> None:
        """Make the random requests that were left over by configurations without pages."""
        if random and self.last is not None:
            self.more(*self.last, random)

    def step(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.work)

    def configuration(self, configuration: Configuration, random: int) -> int:
        """Replay one configuration; how many random requests were made."""
        smmu = configuration.smmu()
        requests = configuration.requests
        count = len(requests)
        scalar = np.zeros(
            count, [("pa", "u8"), ("action", "u1"), ("fault", "u1"), ("record", "V32")]
        )
        page_lg2 = np.zeros(count, np.uint8)
        verdicts = np.zeros(count, "U11")
        reasons: dict[int, list[str]] = {}
        needs: dict[tuple[int, int], str | None] = {}
        for i, (request, expected) in enumerate(
            zip(requests.tolist(), configuration.expected, strict=True)
        ):
            if i and i % STEP == 0:
                self.step(STEP)
            sid, number, iova, write, priv, instr = request
            ssid = None if number == NO_SUBSTREAM else number
            result = translate_alone(
                smmu, sid, iova, ssid=ssid, write=write, priv=priv, instr=instr
            )
            event = None if result.action == "stall" else result.event  # its STAG is its own
            scalar[i] = (
                result.pa or 0,
                ACTIONS.index(result.action),
                0 if result.fault is None else result.fault.number,
                bytes(32) if event is None else event.record,
            )
            need = None
            if configuration.masked:
                if (sid, number) not in needs:
                    needs[sid, number] = _need(smmu, sid, ssid, configuration.masked)
                need = needs[sid, number]
            if need is not None:
                self.found.unsupported[need] += 1
                verdicts[i] = "unsupported"
                continue
            if wrong := compare(smmu, request, expected, result):
                reasons[i] = wrong
            elif result:
                page_lg2[i] = result.page_lg2 or 12
                if result.page_lg2:
                    self.tally(sid).page_lg2[result.page_lg2] += 1
        self.step((count - 1) % STEP + 1 if count else 0)
        self.batches(configuration, smmu, scalar, verdicts, reasons)
        for i in reasons:
            verdicts[i] = "differing"
        verdicts[verdicts == ""] = "agreeing"
        for sid, expected, verdict in zip(
            requests["sid"].tolist(), configuration.expected, verdicts.tolist(), strict=True
        ):
            self.found.total.count(verdict)
            self.tally(sid).count(verdict)
            if expected.cause is not None:
                self.found.causes.setdefault(expected.cause, Tally()).count(verdict)
        for i, wrong in sorted(reasons.items()):
            if len(self.found.differences) == self.keep:
                break
            sid, number, iova, write, priv, instr = requests[i].item()
            result = translate_alone(
                smmu,
                sid,
                iova,
                ssid=None if number == NO_SUBSTREAM else number,
                write=write,
                priv=priv,
                instr=instr,
                trace=True,
            )
            self.found.differences.append(
                Difference(configuration, i, wrong, configuration.expected[i], result, smmu)
            )
        return self.more(configuration, smmu, page_lg2, random)

    def tally(self, sid: int) -> Tally:
        return self.found.streams.setdefault(sid, Tally())

    def batches(
        self,
        configuration: Configuration,
        smmu: Smmu,
        scalar: NDArray[Any],
        verdicts: NDArray[Any],
        reasons: dict[int, list[str]],
    ) -> None:
        """Translate stream by stream in batches; a batch must give what the calls gave."""
        requests = configuration.requests
        order = np.argsort(requests["sid"], kind="stable")
        edges = np.flatnonzero(np.diff(requests["sid"][order])) + 1
        for indices in np.split(order, edges) if len(order) else ():
            rows = requests[indices]
            out = np.zeros(len(rows), scalar.dtype)
            columns = {name: out[name] for name in _COLUMNS}
            access: dict[str, Any] = {
                name: rows[name] for name in ("ssid", "write", "priv", "instr")
            }
            tally = self.tally(int(rows["sid"][0]))
            for _ in range(self.repeat):
                start = time.perf_counter()
                smmu.translate_batch(rows["sid"], rows["iova"], out=columns, **access)
                tally.seconds += time.perf_counter() - start
                tally.translations += len(rows)
                self.step(len(rows))
                self.let_go(smmu, int(rows["sid"][0]), out)
            for i in indices[_differing(out, scalar[indices])].tolist():
                if verdicts[i] == "unsupported":
                    continue
                if not smmu.features.httu or self.alone_differs(configuration, scalar, i):
                    reasons.setdefault(i, []).append("translate_batch gives another outcome")

    def let_go(self, smmu: Smmu, sid: int, out: NDArray[Any]) -> None:
        """Terminate what a batch of one stream stalled."""
        if (out["action"] == _STALL).any():
            smmu.command("STALL_TERM", StreamID=sid)

    def alone_differs(self, configuration: Configuration, scalar: NDArray[Any], i: int) -> bool:
        """Whether a batch of one request, over the recorded memory, differs from the call."""
        row = configuration.requests[i : i + 1]
        out = np.zeros(1, scalar.dtype)
        access: dict[str, Any] = {name: row[name] for name in ("ssid", "write", "priv", "instr")}
        columns = {name: out[name] for name in _COLUMNS}
        configuration.smmu().translate_batch(row["sid"], row["iova"], out=columns, **access)
        return bool(_differing(out, scalar[i : i + 1])[0])

    def more(
        self, configuration: Configuration, smmu: Smmu, page_lg2: NDArray[np.uint8], random: int
    ) -> int:
        """Translate at random places of the pages hit; how many were made."""
        hits = np.flatnonzero(page_lg2)
        if not len(hits):
            return 0
        self.last = (configuration, smmu, page_lg2)
        addresses = np.array([configuration.expected[i].pa for i in hits.tolist()], np.uint64)
        for start in range(0, random, CHUNK):
            count = min(CHUNK, random - start)
            choice = self.random.integers(0, len(hits), count)
            rows = configuration.requests[hits[choice]]
            offset = self.random.integers(0, 1 << 64, count, np.uint64, endpoint=False)
            mask = (np.uint64(1) << page_lg2[hits[choice]].astype(np.uint64)) - np.uint64(1)
            iova = rows["iova"] & ~mask | offset & mask
            out = np.zeros(count, [("pa", "u8"), ("action", "u1")])
            columns = {name: out[name] for name in ("pa", "action")}
            access: dict[str, Any] = {
                name: rows[name] for name in ("ssid", "write", "priv", "instr")
            }
            began = time.perf_counter()
            smmu.translate_batch(rows["sid"], iova, out=columns, **access)
            for sid in np.unique(rows["sid"][out["action"] == _STALL]).tolist():
                smmu.command("STALL_TERM", StreamID=sid)
            self.found.random_seconds += time.perf_counter() - began
            good = out["action"] < ACTIONS.index("abort")
            good &= out["pa"] == (addresses[choice] & ~mask | offset & mask)
            self.found.random += count
            self.found.random_differing += count - int(good.sum())
            self.step(count)
        return random


def _differing(out: NDArray[Any], scalar: NDArray[Any]) -> NDArray[np.bool]:
    """Return which rows differ; the records of stalls are not compared, for each has its STAG."""
    differing: NDArray[np.bool] = out["record"] != scalar["record"]
    differing &= out["action"] != _STALL
    for name in ("pa", "action", "fault"):
        differing |= out[name] != scalar[name]
    return differing


def _need(smmu: Smmu, sid: int, ssid: int | None, masked: dict[str, int]) -> str | None:
    """Return what a stream's STE, or its CD, asks for that was masked."""
    result = translate_alone(smmu, sid, 0, ssid=ssid, trace=True)
    found = {fetch.kind: fetch.data for fetch in result.fetches or ()}
    ste = found.get("STE")
    return None if ste is None else unmodelled(ste, found.get("CD"), masked)


def _request(configuration: Configuration, index: int) -> dict[str, Any]:
    request = dict(zip(REQUEST.names or (), configuration.requests[index].item(), strict=True))
    if request["ssid"] == NO_SUBSTREAM:
        request["ssid"] = None
    return request


def compare(
    smmu: Smmu, request: tuple[int, int, int, bool, bool, bool], expected: Expected, result: Result
) -> list[str]:
    """Return what differs between a result and what was expected of it, in words."""
    if result.action != expected.action:
        return [f"action: {expected.action} expected, {result.action} found" + _fault_text(result)]
    if expected.action in ("abort", "raz_wi", "stall"):
        return _compare_fault(expected, result)
    wrong = []
    if result.pa != expected.pa:
        wrong.append(f"pa: {expected.pa:#x} expected, {result.pa:#x} found")
    if expected.stage is not None and result.stage != expected.stage:
        wrong.append(f"stage: {expected.stage} expected, {result.stage} found")
    if expected.level is not None and result.level != expected.level:
        wrong.append(f"level: {expected.level} expected, {result.level} found")
    if expected.page_lg2 is not None and result.page_lg2 != expected.page_lg2:
        wrong.append(f"page size: 2^{expected.page_lg2} expected, 2^{result.page_lg2} found")
    if expected.perm is not None:
        sid, number, iova, _, priv, _ = request
        perm = result.perm_s1 if expected.perm_s1 else result.perm
        found = int(perm) >> (3 if priv else 0) & expected.perm_bits
        if found != expected.perm:
            wrong.append(f"permission: {expected.perm:#o} expected, {found:#o} found")
        for bit, name, access in _ACCESSES:
            if not expected.perm_bits & ~expected.perm & bit:
                continue
            ssid = None if number == NO_SUBSTREAM else number
            denied = translate_alone(smmu, sid, iova, ssid=ssid, priv=priv, **access)
            if denied.fault is None or denied.fault.number != _PERMISSION:
                wrong.append(
                    f"{name}: F_PERMISSION expected, {denied.action} found" + _fault_text(denied)
                )
    return wrong


def _fault_text(result: Result) -> str:
    return "" if result.fault is None else f" ({result.fault.name})"


def _compare_fault(expected: Expected, result: Result) -> list[str]:
    """Return what differs in a transaction that is terminated or stalls."""
    fault = result.fault
    found = "no fault" if fault is None else fault.name
    if (result.event is not None) != expected.recorded:
        what = ("nothing recorded", "an event recorded")
        return [
            f"event: {what[expected.recorded]} expected, "
            f"{what[not expected.recorded]} found ({found})"
        ]
    if expected.fault == ANY and fault is None:
        return ["fault: some fault expected, none found"]
    if expected.fault in (ANY, UNTOLD):
        return []
    if (fault and fault.name) != expected.fault:
        return [f"fault: {expected.fault or 'none'} expected, {found} found"]
    if fault is None or expected.record is None or expected.mask is None:
        return []
    mask = int.from_bytes(expected.mask, "little")
    wanted = int.from_bytes(expected.record, "little")
    differing = (wanted ^ int.from_bytes(fault.record, "little")) & mask
    if not differing:
        return []
    record = layout.event_record(fault.number)
    wrong = [
        f"record, {f.name}: {_field(f, wanted):#x} expected, "
        f"{_field(f, int.from_bytes(fault.record, 'little')):#x} found"
        for f in record.fields
        if differing & f.mask << 64 * f.dword
    ]
    return wrong or [f"record: {expected.record.hex()} expected, {fault.record.hex()} found"]


def _field(field: layout.Field, word: int) -> int:
    return (word >> 64 * field.dword & field.mask) >> field.shift


# --- queues ---------------------------------------------------------------------------------------

_RING = 0x4000_0000
_SLOTS_LG2 = 8
"""Of the command queue that the batches were recorded with."""
_INDEX = (1 << 20) - 1  # of a queue, with its wrap bit
_CERROR_ILL = 1
ACCEPTED = "accepts illegal commands"
"""Cause: the recorded implementation goes on where the architecture has CERROR_ILL."""
OVERFLOWS = "EVENTQ_ABT_ERR for OVFLG"
"""Cause: the recorded implementation raises a global error when the event queue is full."""


@dataclass
class QueueReplay:
    """What a replay of queues found.

    Attributes
    ----------
    path : str
    total : Tally
        Batches of commands, and runs that filled an event queue.
    causes : dict of str to Tally
        Of those in which the recorded implementation and the architecture differ.
    differences : list of str
        In words.
    """

    path: str
    total: Tally = field(default_factory=Tally)
    causes: dict[str, Tally] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)

    def _repr_html_(self) -> str:
        from smmufast._html import fields

        return fields(self)

    def count(self, cause: str | None, difference: str | None) -> None:
        """Count one batch or run."""
        verdict = "agreeing" if difference is None else "differing"
        self.total.count(verdict)
        if cause is not None:
            self.causes.setdefault(cause, Tally()).count(verdict)
        if difference is not None:
            self.differences.append(difference)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return {
            "capture": self.path,
            **self.total.as_dict(),
            "causes": [
                {"cause": cause, **tally.as_dict()} for cause, tally in sorted(self.causes.items())
            ],
            "differences": self.differences,
        }


def replay_queues(
    path: str | os.PathLike[str], progress: Callable[[int, int], object] | None = None
) -> QueueReplay:
    """Give recorded batches of commands to an SMMU, and fill its event queue, and compare.

    Of a batch CMDQ_CONS is compared; of a run that filled the event queue EVENTQ_PROD after each
    event, without OVFLG.  Where a batch holds a command that is illegal, and that the recorded
    implementation accepts, the comparison ends there.

    Parameters
    ----------
    path : path
        A file as `smmufast.capture.load_batches` reads.
    progress : callable, optional
        Called with the batches and runs done, and all of them.

    Raises
    ------
    CaptureError
        The file cannot be read.
    """
    features, batches = load_batches(path)
    features = modelled(features)[0]
    found = QueueReplay(str(path))
    fillings = load_fillings(path)
    work = len(batches) + len(fillings)
    for done, batch in enumerate(batches):
        found.count(*_batch(features, batch))
        if progress is not None:
            progress(done + 1, work)
    for done, filling in enumerate(fillings, len(batches)):
        found.count(OVERFLOWS, _filling(features, filling))
        if progress is not None:
            progress(done + 1, work)
    return found


def _batch(features: Features, batch: Batch) -> tuple[str | None, str | None]:
    """Return the cause that applies to a batch, and what differs."""
    memory = Memory()
    memory.add_private(_RING, 16 << _SLOTS_LG2)
    smmu = Smmu(memory, features, cr0=0, cmdq_base=_RING | _SLOTS_LG2)
    smmu.write("CMDQ_PROD", batch.start)
    smmu.write("CMDQ_CONS", batch.start)
    smmu.write("CR0", layout.pack("CR0", CMDQEN=1))
    for i, command in enumerate(batch.commands):
        slot = (batch.start + i) % (1 << _SLOTS_LG2)
        memory.write(_RING + 16 * slot, command)
    smmu.write("CMDQ_PROD", batch.prod)
    cons = smmu.read("CMDQ_CONS")
    if (cons & _INDEX, cons >> 24) == (batch.cons & _INDEX, batch.err):
        return None, None
    done = (cons & _INDEX) - batch.start & (2 << _SLOTS_LG2) - 1
    recorded = (batch.cons & _INDEX) - batch.start & (2 << _SLOTS_LG2) - 1
    refused = cons >> 24 == _CERROR_ILL and done < min(recorded, len(batch.commands))
    if refused and _accepted(batch.commands[done]):
        return ACCEPTED, None
    return None, (
        f"batch {batch.id}: CMDQ_CONS {batch.cons & _INDEX:#x} and error {batch.err} expected, "
        f"{cons & _INDEX:#x} and error {cons >> 24} found"
    )


def _accepted(command: bytes) -> bool:
    """Whether the recorded implementation accepts a command that is illegal."""
    word = int.from_bytes(command, "little")
    op = word & 0xFF
    if op == layout.Opcode.SYNC:
        return layout.unpack("SYNC", word)["CS"] == 3
    if op in (layout.Opcode.PREFETCH_CONFIG, layout.Opcode.PREFETCH_ADDR):
        return bool(word & layout.mask("PREFETCH_CONFIG", "SSec"))
    return op in (0x18, 0x1A, 0x20, 0x21, 0x22, 0x23, 0x40, 0x41, 0x44, 0x45)


def _filling(features: Features, filling: Filling) -> str | None:
    """Return what differs when the event queue is filled."""
    memory = Memory()
    memory.add_private(_RING, max(4096, 32 << filling.log2size))
    smmu = Smmu(memory, features, cr0=0, eventq_base=_RING | filling.log2size)
    smmu.write("EVENTQ_PROD", filling.start)
    smmu.write("EVENTQ_CONS", filling.start)
    smmu.write("CR0", layout.pack("CR0", SMMUEN=1, EVENTQEN=1))
    for i, prod in enumerate(filling.prods):
        smmu.translate(1, 0)  # there is no such stream
        after = smmu.read("EVENTQ_PROD")
        if after & _INDEX != prod & _INDEX:
            return (
                f"line {filling.line}, event {i + 1}: EVENTQ_PROD {prod & _INDEX:#x} expected, "
                f"{after & _INDEX:#x} found"
            )
    return None
