"""Names of what a translation can give: actions, permissions, fetches, events, exceptions.

Sections: IHI 0070 7.3 (event records), 5.5 (fault control).
"""

# ruff: noqa: N818 - aborts and faults are the terms of the bus and of the architecture

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from smmufast import layout
from smmufast._arguments import must_be

if TYPE_CHECKING:
    from smmufast._device.smmu import Result
    from smmufast.why import Why

ACTIONS = ("ok", "bypass", "disabled", "abort", "raz_wi", "stall")
"""What becomes of a transaction, by the number that batch columns hold."""

FETCH_KINDS = ("", "L1STD", "STE", "L1CD", "CD", "TT", "S2TT", "TT update", "S2TT update")
ACCESS_KINDS = (*FETCH_KINDS, "CMD", "EVENT", "PRI", "MSI")
"""Kinds of fetch, by number; index 0 is no fetch."""


class Perm(enum.IntFlag):
    """Accesses that a translation admits: unprivileged or privileged; read, write, execute."""

    UR = 1
    UW = 2
    UX = 4
    PR = 8
    PW = 16
    PX = 32


class Invalidated(NamedTuple):
    """What an invalidation of caches covers, as `Smmu.on_invalidate` gets it (IHI 0070 4.3, 4.4).

    A host that keeps translations of its own (a TLB of a processor, pointers into memory) drops
    those that a scope covers.  None stands for "whatever it is".

    Attributes
    ----------
    source : str
        The command, such as "TLBI_NH_VA" or "CFGI_STE"; "CR0" where CR0.SMMUEN is cleared.
    configuration : bool
        STEs and CDs are invalidated; translations through them may be other ones from now on.
    translations : bool
        Translations and tables are.
    sids : (int, int) or None
        First and last StreamID.
    ssid : int or None
        SubstreamID of a CD.
    vmid, asid : int or None
        VMID, ASID; with VMIDs that CR0.VMW groups, one of the group.
    addresses : (int, int) or None
        First and last address: of TLBI_S2_IPA an intermediate one.
    leaf : bool
        The last level alone: tables above it, and level-1 descriptors, are as they were.
    """

    source: str
    configuration: bool
    translations: bool
    sids: tuple[int, int] | None = None
    ssid: int | None = None
    vmid: int | None = None
    asid: int | None = None
    addresses: tuple[int, int] | None = None
    leaf: bool = False

    def _repr_html_(self) -> str:
        from smmufast._html import fields

        return fields(self)


class Fetch(NamedTuple):
    """One read that a walk makes, or one hardware update of a descriptor.

    `kind` is one of FETCH_KINDS; `level` is that of a translation table, else None; `address`
    and `size` are in bytes; `data` is what was read in memory order, None for an external abort
    or when it is not known yet.  An update is a compare-and-swap: `swap` is (expected, desired),
    little-endian numbers as they lie in memory, and `data` is what was there.
    """

    kind: str
    level: int | None
    address: int
    size: int
    data: bytes | None
    swap: tuple[int, int] | None = None

    @property
    def value(self) -> int | None:
        """The data as a little-endian number."""
        return None if self.data is None else int.from_bytes(self.data, "little")

    def _repr_html_(self) -> str:
        from smmufast._html import fields

        return fields(self)


_CLASSES = tuple(name.partition(":")[0] for name in layout.EVENT.field("CLASS").values.values())
_PERMISSION = layout.Event.F_PERMISSION.name


class Event:
    """A 32-byte event record (IHI 0070 7.3); the bytes are the truth, the rest decodes them.

    >>> Event(bytes.fromhex("04000000090000000000000000000000" + "00" * 16))
    <Event C_BAD_STE sid=0x9>
    >>> Event(layout.to_bytes("EVENT", 0x4000_1000 << 192 | 0x118a << 96 | 0x7_0000_3813))
    <Event F_PERMISSION sid=0x7 ssid=0x3 iova=0x0 read s2 class=TT descriptor=read ipa=0x40001000>
    """

    __slots__ = ("_unpacked", "record")

    record: bytes
    _unpacked: tuple[bytes, dict[str, int]] | None  # what it was unpacked from, and the fields

    def __init__(self, record: bytes) -> None:
        """Take the record as it lies in memory."""
        record = bytes(record)
        if len(record) != 32:
            raise ValueError(must_be("record", "32 bytes", len(record)))
        self.record = record
        self._unpacked = None

    def _fields(self) -> dict[str, int]:
        """Unpack the record once: that takes longer than all else here."""
        if self._unpacked is None or self._unpacked[0] is not self.record:
            try:
                kind: str | layout.Record = layout.event_record(self.number)
            except ValueError:
                kind = "EVENT"  # no event has this number: every field that some event has
            self._unpacked = self.record, layout.unpack(kind, self.record)
        return self._unpacked[1]

    @property
    def fields(self) -> dict[str, int]:
        """Every field of this kind of record, by the name that the architecture gives it."""
        return dict(self._fields())

    @property
    def number(self) -> int:
        """Event number."""
        return self.record[0]

    @property
    def name(self) -> str:
        """Event name as the architecture spells it, or the number if it has none."""
        try:
            return layout.Event(self.number).name
        except ValueError:
            return f"{self.number:#04x}"

    @property
    def sid(self) -> int:
        """StreamID."""
        return int.from_bytes(self.record[4:8], "little")

    @property
    def ssid(self) -> int | None:
        """SubstreamID, None when the transaction had none or the record does not hold it."""
        fields = self._fields()
        return fields.get("SubstreamID") if fields.get("SSV", 1) else None

    @property
    def iova(self) -> int | None:
        """Input address, None where the record holds none."""
        return self._fields().get("InputAddr")

    @property
    def write(self) -> bool | None:
        """Whether the access was a write (RnW=0), None where the record does not say."""
        rnw = self._fields().get("RnW")
        return None if rnw is None else not rnw

    @property
    def fetch_address(self) -> int | None:
        """Address of the fetch that failed, None for other events."""
        return self._fields().get("FetchAddr")

    @property
    def s2(self) -> bool | None:
        """Whether it is a fault of stage 2, None where the record does not say."""
        s2 = self._fields().get("S2")
        return None if s2 is None else bool(s2)

    @property
    def class_(self) -> str | None:
        """What was being accessed, None where the record does not say.

        "CD": a context descriptor; "TT": a translation table; "IN": what the input address led
        to; "reserved".
        """
        code = self._fields().get("CLASS")
        return None if code is None else _CLASSES[code]

    @property
    def ipa(self) -> int | None:
        """Page of the intermediate physical address; None unless it is a fault of stage 2."""
        fields = self._fields()
        return fields.get("IPA") if fields.get("S2") else None

    @property
    def stalled(self) -> bool:
        """Whether the transaction waits for a CMD_RESUME."""
        return bool(self._fields().get("Stall"))

    @property
    def stag(self) -> int | None:
        """Tag that the CMD_RESUME of a stalled transaction needs; None for any other."""
        fields = self._fields()
        return fields["STAG"] if fields.get("Stall") else None

    @property
    def ttrnw(self) -> bool | None:
        """Whether the walk read the descriptor that it might not (True) or updated it (False).

        None unless it is an F_PERMISSION of class TT.
        """
        fields = self._fields()
        if "TTRnW" not in fields or _CLASSES[fields["CLASS"]] != "TT" or self.name != _PERMISSION:
            return None
        return bool(fields["TTRnW"])

    def _repr_html_(self) -> str:
        from smmufast._html import lines

        return lines(str(self))

    def __str__(self) -> str:
        """Every field in words."""
        return layout.format("EVENT", self.record)

    def __repr__(self) -> str:
        """Name, stream and what else the record holds."""
        text = f"<Event {self.name} sid={self.sid:#x}"
        if self.ssid is not None:
            text += f" ssid={self.ssid:#x}"
        if self.iova is not None:
            text += f" iova={self.iova:#x}"
        if self.write is not None:
            text += " write" if self.write else " read"
        if self.fetch_address is not None:
            text += f" fetch={self.fetch_address:#x}"
        if self.s2:
            text += " s2"
        if self.class_ in ("CD", "TT"):
            text += f" class={self.class_}"
        if self.ttrnw is not None:
            text += f" descriptor={'read' if self.ttrnw else 'write'}"
        if self.ipa is not None:
            text += f" ipa={self.ipa:#x}"
        if self.stalled:
            text += f" stag={self.stag:#x}"
        return text + ">"

    def __eq__(self, other: object) -> bool:
        """Events are equal when their records are."""
        return isinstance(other, Event) and self.record == other.record

    def __hash__(self) -> int:
        """Hash of the record."""
        return hash(self.record)

    def __reduce__(self) -> tuple[type[Event], tuple[bytes]]:
        """Pickle the record alone."""
        return Event, (self.record,)


# S3.9.1-16
class AtsResponse(NamedTuple):
    """The answer to an ATS translation request (IHI 0070 3.9.1): what a device may keep.

    `status` is "success", "UR" (Unsupported Request) or "CA" (Completer Abort).  With success,
    `read`, `write` and `execute` are granted for the `size` bytes from `address` on, as privileged
    if `priv`.  A success may grant nothing: then `address` is None, and `size` is the smallest
    translation unit.  `ipa` says that the address is an intermediate physical one (split-stage
    ATS); permissions and size are those of both stages all the same.  `attr` and `shareability`
    are those that a `Result` of the page has.
    `global_` is False, for pages are not offered to other PASIDs, whose contexts may differ, and
    so is `untranslated_only`.

    `fault` is what kept the request from being granted, as an Event, recorded or not; `event` is
    the Event that is recorded.  Both are None where no fault is to blame: a page that lacks the
    permissions, or a stream that aborts silently.  `why` is the reason of a refusal.
    """

    status: Literal["success", "UR", "CA"]
    address: int | None = None
    size: int = 0
    read: bool = False
    write: bool = False
    execute: bool = False
    priv: bool = False
    global_: bool = False
    untranslated_only: bool = False
    ipa: bool = False
    attr: int = 0
    shareability: int = 0
    fault: Event | None = None
    event: Event | None = None
    why: Why | None = None

    def _repr_html_(self) -> str:
        from smmufast._html import fields

        return fields(self)

    def permits(self, write: bool = False, execute: bool = False) -> bool:
        """Whether it grants an access: a write, an instruction fetch, or a read."""
        return self.write if write else self.execute if execute else self.read


class AtsFault(Exception):
    """A device got no translation that permits its access; `response` is the last answer."""

    response: AtsResponse

    def __init__(self, message: str, response: AtsResponse) -> None:
        """Keep the response beside the message."""
        super().__init__(message, response)
        self.response = response

    def __str__(self) -> str:
        """The message alone."""
        return str(self.args[0])


class ExternalAbort(LookupError):
    """A physical address that no region holds, or a callback that refused."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)


class Fault(Exception):
    """A translation that `Smmu.pa` could not make; `result` says all about it.

    A copy that was pickled has None instead.
    """

    result: Result

    def __init__(self, message: str, result: Result | None) -> None:
        """Keep the result beside the message."""
        super().__init__(message)
        self.result = cast("Result", result)

    def __reduce__(self) -> tuple[type[Fault], tuple[str, None]]:
        """Pickle without the result, which belongs to this process."""
        return type(self), (str(self), None)


class BadStreamId(Fault, LookupError):
    """C_BAD_STREAMID."""


class SteFetchAbort(Fault, LookupError):
    """F_STE_FETCH."""


class BadSte(Fault, ValueError):
    """C_BAD_STE."""


class StreamDisabled(Fault, LookupError):
    """F_STREAM_DISABLED."""


class BadSubstreamId(Fault, LookupError):
    """C_BAD_SUBSTREAMID."""


class CdFetchAbort(Fault, LookupError):
    """F_CD_FETCH."""


class BadCd(Fault, ValueError):
    """C_BAD_CD."""


class WalkAbort(Fault, LookupError):
    """F_WALK_EABT."""


class TranslationFault(Fault, LookupError):
    """F_TRANSLATION."""


class AddressSizeFault(Fault, ValueError):
    """F_ADDR_SIZE."""


class AccessFault(Fault, LookupError):
    """F_ACCESS."""


class PermissionFault(Fault, PermissionError):
    """F_PERMISSION."""


class SilentAbort(Fault):
    """An abort without an event: STE.Config=0b0xx, or GBPA."""


FAULTS: dict[int, type[Fault]] = {
    0x00: SilentAbort,
    0x02: BadStreamId,
    0x03: SteFetchAbort,
    0x04: BadSte,
    0x06: StreamDisabled,
    0x08: BadSubstreamId,
    0x09: CdFetchAbort,
    0x0A: BadCd,
    0x0B: WalkAbort,
    0x10: TranslationFault,
    0x11: AddressSizeFault,
    0x12: AccessFault,
    0x13: PermissionFault,
}
"""The exception of each event number; 0 is an abort without an event."""
