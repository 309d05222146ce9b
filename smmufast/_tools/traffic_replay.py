"""A replay of traffic under way: what software does is done, what the SMMU does is compared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smmufast import layout
from smmufast._device.smmu import Result, Smmu
from smmufast._engine.memory import Memory
from smmufast._engine.tlb import Caches
from smmufast._tools.capture_files import PAGE, Line
from smmufast._tools.capture_outcomes import fair
from smmufast.faults import Event
from smmufast.features import modelled

if TYPE_CHECKING:
    from smmufast.traffic import Step, Traffic

ENDS = {"B": "bypass", "A": "abort", "N": "disabled"}
IRQS = ("eventq", "priq", "gerror", "cmdq_sync", "sev")
"""Names of interrupts, as `Smmu.on_interrupt` gets them, by number."""


@dataclass
class Divergence:
    """Where a replay went another way.

    Attributes
    ----------
    step : Step
    problem : str
        What was recorded and what was found.
    result : Result or None
        Of a transaction.
    explain : str
        The chain of that transaction in words.
    """

    step: Step
    problem: str
    result: Result | None = None
    explain: str = ""

    def _repr_html_(self) -> str:
        from smmufast._html import fields

        return fields(self)

    def __str__(self) -> str:
        text = f"{self.step}: {self.problem}"
        return f"{text}\n{self.explain}".rstrip()


@dataclass
class Replayed:
    """What a replay found.

    Attributes
    ----------
    steps : int
        That were replayed.
    compared : dict
        How many of each letter agree.
    known : dict
        What differs as is known of the recorded implementation: how often, by cause.
    divergence : Divergence or None
        The first one, where the replay ended.
    dropped : int
        Commands that were left out.
    stale : int
        Most entries that `stale()` listed after a command that was left out.
    masked : dict
        Features of the recorded SMMU that are not modelled, and their codes.
    smmu : Smmu
        As the replay left it.
    """

    smmu: Smmu
    masked: dict[str, int]
    steps: int = 0
    compared: dict[str, int] = field(default_factory=dict)
    known: dict[str, int] = field(default_factory=dict)
    divergence: Divergence | None = None
    dropped: int = 0
    stale: int = 0

    def _repr_html_(self) -> str:
        from smmufast._html import fields

        return fields(self)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        found = self.divergence
        return {
            "steps": self.steps,
            "compared": self.compared,
            "known": self.known,
            "masked": self.masked,
            "dropped": self.dropped,
            "stale": self.stale,
            "divergence": None if found is None else {
                "line": found.step.line,
                "step": str(found.step),
                "problem": found.problem,
                "explain": found.explain,
            },
        }  # fmt: skip


MOST_STALE = 8
"""Stale entries that an explanation lists."""
LOOKS = 64
"""Times that one replay looks for stale entries after a command that was left out."""
_IDENTIFICATION = range(0x1D)  # IDR0 to IDR5 and IIDR, AIDR: of the implementation


class Run:
    """A replay under way."""

    def __init__(self, traffic: Traffic, caches: Caches | None, drop: Collection[str]) -> None:
        """Begin with an SMMU that is switched off and RAM of zeros."""
        self.traffic = traffic
        self.drop = frozenset(drop)
        features, masked = modelled(traffic.features)
        self.memory = Memory()
        base, size = traffic.ram
        self.memory.add_private(base, size)
        self.interrupts: dict[str, int] = {}
        self.smmu = Smmu(
            self.memory, features, cr0=0, cr2=0, gbpa=0x1000, caches=caches,
            on_interrupt=self._interrupted,
        )  # fmt: skip
        self.found = Replayed(self.smmu, masked)
        self.looks = LOOKS
        self.asked: dict[str, Any] = {}  # of the last transaction
        self.does: dict[str, Callable[[Step], Divergence | None]] = {
            "W": self._write, "R": self._read, "S": self._stored, "D": self._stored,
            "P": self._page, "Z": self._zeros, "U": self._nothing, "O": self._remark,
            "T": self._translated, "B": self._ended, "A": self._ended, "N": self._ended,
            "E": self._event, "I": self._interrupt,
        }  # fmt: skip

    def _interrupted(self, name: str) -> None:
        self.interrupts[name] = self.interrupts.get(name, 0) + 1

    def run(self, steps: Iterator[Step], until: int | None) -> Replayed:
        """Replay until a divergence, or behind the line `until`."""
        found = self.found
        for step in steps:
            if until is not None and step.line > until:
                break
            problem = self.does[step.op](step)
            if problem is not None:
                found.divergence = problem
                break
            found.steps += 1
        return found

    def _agree(self, op: str) -> None:
        self.found.compared[op] = self.found.compared.get(op, 0) + 1

    def _know(self, cause: str) -> None:
        self.found.known[cause] = self.found.known.get(cause, 0) + 1

    # --- what software does ---

    def _write(self, step: Step) -> Divergence | None:
        offset, size, value = step.values
        gone = 0
        if self.drop and offset == layout.REGISTERS["CMDQ_PROD"].offset:
            gone = self._leave_out(value)
        self.smmu.write(offset, value, size)
        if gone and self.looks and self.smmu.caches is not None:
            self.looks -= 1
            self.found.stale = max(self.found.stale, len(self.smmu.stale()))
        return None

    def _read(self, step: Step) -> Divergence | None:
        offset, size, value = step.values
        found = self.smmu.read(offset, size)
        if found == value:
            self._agree("R")
        elif offset in _IDENTIFICATION:
            self._know("identification registers of another implementation")
        else:
            return Divergence(step, f"register {offset:#x} gives {found:#x}")
        return None

    def _store(self, step: Step, pa: int, data: bytes) -> Divergence | None:
        base, size = self.traffic.ram
        if not base <= pa <= base + size - len(data):
            return Divergence(step, f"a store outside of RAM ({base:#x}, {size:#x} bytes)")
        self.memory.write(pa, data)
        return None

    def _stored(self, step: Step) -> Divergence | None:
        pa, size, value, _ = step.values
        return self._store(step, pa, value.to_bytes(size, "little"))

    def _page(self, step: Step) -> Divergence | None:
        pa, _, n = step.values
        return self._store(step, pa, self.traffic.pages[n].tobytes())

    def _zeros(self, step: Step) -> Divergence | None:
        return self._store(step, step.values[0], bytes(PAGE))

    def _nothing(self, step: Step) -> Divergence | None:
        return None

    def _remark(self, step: Step) -> Divergence | None:
        self._know(f"remark: {' '.join(step.values)}")
        return None

    # --- what the SMMU does ---

    def _translate(self, step: Step, sid: int, iova: int, **more: Any) -> Result:
        self.asked = {"priv": True, **more, **step.access}
        return self.smmu.translate(sid, iova, **self.asked)

    def _diverge(self, step: Step, problem: str, result: Result) -> Divergence:
        """Return a divergence of a transaction, with its chain in words."""
        from smmufast.explain import explain
        from smmufast.streams import bare

        again = self.smmu.translate(
            result.sid, result.iova, **self.asked, peek=True, trace=True
        )
        text = explain(again, self.smmu)
        if self.smmu.caches is not None:
            without = bare(self.smmu).translate(result.sid, result.iova, **self.asked)
            if (without.action, without.pa) != (result.action, result.pa):
                text += f"\n\nThe tables give {without!r}: caches hold what these do not give."
                for entry in self.smmu.stale()[:MOST_STALE]:
                    start = getattr(entry.entry, "start", None)
                    where = entry.cache if start is None else f"{entry.cache}, {start:#x}"
                    text += f"\n  {where}: {entry.why}"
        return Divergence(step, problem, result, text)

    def _translated(self, step: Step) -> Divergence | None:
        """Compare a transaction that was translated."""
        sid, iova, pa, perm, stage = step.values
        result = self._translate(step, sid, iova, write=not perm & 1)
        if result.action != "ok":
            return self._diverge(step, f"the transaction ends as {result.action}", result)
        bits = result.perm_s1 if stage == 3 else result.perm
        granted = int(bits) >> (3 if self.asked["priv"] else 0) & 3
        if result.pa != pa:
            return self._diverge(step, f"it is translated to {result.pa:#x}", result)
        if granted != perm & 3:
            return self._diverge(step, f"its page permits {granted}", result)
        if result.stage != stage:
            return self._diverge(step, f"stage {result.stage} translates", result)
        self._agree("T")
        return None

    def _ended(self, step: Step) -> Divergence | None:
        sid, iova, _ = step.values
        result = self._translate(step, sid, iova)
        ends = (ENDS[step.op], "raz_wi") if step.op == "A" else (ENDS[step.op],)
        if result.action not in ends or result.event is not None:
            return self._diverge(step, f"the transaction ends as {result.action}", result)
        self._agree(step.op)
        return None

    def _event(self, step: Step) -> Divergence | None:
        """Compare a transaction that ended with an event, record and all."""
        sid, _, raw = step.values
        fields = Event(raw).fields
        more: dict[str, Any] = {"write": not fields.get("RnW", 1)}
        if fields.get("SSV"):
            more["ssid"] = fields["SubstreamID"]
        if step.access:  # told, so that every bit can be compared
            more |= step.access
            wanted, mask = raw, b"\xff" * 32
        else:
            wanted, mask = fair(Line(self.traffic.path, step.line, {}), raw, more["write"])
        result = self._translate(step, sid, fields.get("InputAddr", 0), **more)
        if result.event is None:
            return self._diverge(step, f"the transaction ends as {result.action}", result)
        found = result.event.record
        if any((a ^ b) & m for a, b, m in zip(found, wanted, mask, strict=True)):
            return self._diverge(step, f"the record is {found.hex()}", result)
        self._agree("E")
        if found != raw:
            self._know("bits of records that cannot be compared")
        return None

    def _interrupt(self, step: Step) -> Divergence | None:
        name = IRQS[step.values[0]]
        if self.interrupts.get(name):
            self.interrupts[name] -= 1
            self._agree("I")
        elif name == "eventq":  # an emulator raises one for each event
            self._know(f"interrupts ({name}) beyond the architecture's")
        else:
            return Divergence(step, f"no interrupt {name} is raised")
        return None

    # --- commands that are left out ---

    def _leave_out(self, prod: int) -> int:
        """Put CMD_SYNCs that tell nobody in place of commands that are about to be consumed.

        Returns how many.
        """
        from smmufast.decode import decode

        smmu = self.smmu
        base = layout.unpack("CMDQ_BASE", smmu.read("CMDQ_BASE"))
        lg2 = min(base["LOG2SIZE"], smmu.features.cmdqs)
        place = base["ADDR"] & -(16 << lg2)
        index = smmu.read("CMDQ_CONS") & (2 << lg2) - 1
        nothing = layout.to_bytes("SYNC", layout.pack("SYNC", CS=0))
        gone = 0
        while index != prod & (2 << lg2) - 1:
            at = place + 16 * (index & (1 << lg2) - 1)
            if not self.traffic.ram[0] <= at <= sum(self.traffic.ram) - 16:
                break  # the SMMU finds an external abort there
            (command,) = decode(self.memory.read(at, 16), "command", features=smmu.features)
            if command.name.removeprefix("CMD_") in self.drop:
                self.memory.write(at, nothing)
                gone += 1
            index = index + 1 & (2 << lg2) - 1
        self.found.dropped += gone
        return gone
