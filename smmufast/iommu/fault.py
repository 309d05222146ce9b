"""What the event and page request queues say, and who answers (F61 to F65).

A stalled transaction and a PCIe page request become a `PageFault`, which the owner of the address
space resolves; the SMMU is told with CMD_RESUME or CMD_PRI_RESP (IHI 0070 3.12, 4.5, 4.6, 7.3, 8).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from smmufast import layout
from smmufast.iommu.domain import NestedDomain, PagingDomain, SvaDomain
from smmufast.iommu.smmu.iommu import RESPONSES, answer, is_stop_marker

if TYPE_CHECKING:
    from collections.abc import Callable

    from smmufast.iommu.device import Device
    from smmufast.iommu.domain import Domain
    from smmufast.iommu.smmu.iommu import Iommu, Record

#: How often one access may stall in a call of `service` although each time the answer is success.
RETRIES: Final = 16
#: Page requests of one device that wait for the last of their group (Linux: 512 a group).
MOST_WAITING: Final = 512
_EVENTS: Final = {event.value: event.name for event in layout.Event}
_PAGE_FAULTS: Final = ("F_TRANSLATION", "F_ADDR_SIZE", "F_ACCESS", "F_PERMISSION")


@dataclass(frozen=True, slots=True)
class PageFault:
    """An access that waits for a page.

    Attributes
    ----------
    device : Device
    pasid : int or None
    iova : int
    read, write, execute, priv : bool
        What it needs.
    group : int
        The stall tag, or the page request group's index.
    last : bool
        The last one of its group.
    """

    device: Device
    pasid: int | None
    iova: int
    read: bool
    write: bool
    execute: bool
    priv: bool
    group: int
    last: bool

    def _repr_html_(self) -> str:
        from smmufast._html import fields

        return fields(self)


@dataclass(frozen=True, slots=True)
class Report:
    """One record of the event queue, and what became of it.

    Attributes
    ----------
    name : str
        The event, as the architecture spells it, or its number.
    sid : int
    pasid : int or None
    iova : int
    device : Device or None
        Whose stream it is.
    stalled : bool
    stag : int
    write, priv, instr : bool
    ipa : int or None
        Where stage 2 faulted.
    errno : int
        0 if it was resolved; else why not, as a number of the module errno.
    record : bytes
        The record itself; ``layout.format("EVENT", record)`` puts it into words.
    """

    name: str
    sid: int
    pasid: int | None
    iova: int
    device: Device | None
    stalled: bool
    stag: int
    write: bool
    priv: bool
    instr: bool
    ipa: int | None
    errno: int
    record: bytes

    def _repr_html_(self) -> str:
        from smmufast._html import fields

        return fields(self)


def service(iommu: Iommu) -> int:
    """Handle what is in the queues of one SMMU; return how many records there were.

    One thread at a time: the others wait until what it found is answered.  Every record is taken
    and every stalled transaction answered, also when a handler raises: its fault is answered as
    invalid, and the first exception is raised when the queues are empty.  An access that stalls
    once more after RETRIES answers of success is answered as invalid, so that a handler that maps
    nothing does not keep it for ever.
    """
    raised: list[BaseException] = []
    tried: dict[PageFault, int] = {}
    count = 0
    with iommu.servicing:
        iommu.interrupts.clear()
        while (record := iommu.next_record("EVENTQ")) is not None:
            count += 1
            _event(iommu, record, raised, tried)
        while (record := iommu.next_record("PRIQ")) is not None:
            count += 1
            _page_request(iommu, record, raised)
    if raised:
        raise raised[0]
    return count


def _event(
    iommu: Iommu, record: Record, raised: list[BaseException], tried: dict[PageFault, int]
) -> None:
    """Handle one record of the event queue."""
    fields, device = record.fields, record.device
    number = fields["ID"]
    name = _EVENTS.get(number, f"{number:#04x}")
    stalled = bool(fields["Stall"]) and name in _PAGE_FAULTS
    if number not in _EVENTS:
        status = errno.EOPNOTSUPP
    elif device is None:
        status = errno.EINVAL
    elif not stalled:
        status = errno.EOPNOTSUPP
    elif record.answered:
        status = errno.EFAULT
    else:
        fault = PageFault(
            device, record.pasid, fields["InputAddr"], bool(fields["RnW"]) and not fields["InD"],
            not fields["RnW"], bool(fields["InD"]), bool(fields["PnU"]), fields["STAG"], True,
        )  # fmt: skip
        same = replace(fault, group=0)  # the stall tag is another one each time
        tried[same] = tried.get(same, 0) + 1
        if (fields["S2"] and name != "F_TRANSLATION") or tried[same] > RETRIES:
            response = "invalid"
        else:
            response = _ask(fault, record.domain, raised)
        status = 0 if response == "success" else errno.EFAULT
    if stalled and not record.answered:
        _answer(iommu, record, "success" if status == 0 else "invalid", raised)
    if not stalled and not fields["S2"] and isinstance(record.domain, NestedDomain):
        viommu = record.domain.viommu
        if viommu is not None and device is not None and viommu.report(device, record.data):
            status = 0
    report = Report(
        name, record.sid, record.pasid, fields["InputAddr"], device, stalled, fields["STAG"],
        not fields["RnW"], bool(fields["PnU"]), bool(fields["InD"]),
        fields["IPA"] if fields["S2"] else None, status, record.data,
    )  # fmt: skip
    system = iommu.system
    system.reports.append(report)
    if system.on_fault is not None:
        try:
            system.on_fault(report)
        except Exception as error:
            raised.append(error)


def _answer(
    iommu: Iommu, record: Record, response: str, raised: list[BaseException]
) -> None:
    """Answer a record, once; the rest of the queue is still to be read if a host raises."""
    record.answered = True
    try:
        answer(iommu, record, response)
    except Exception as error:
        raised.append(error)


def _ask(fault: PageFault, domain: Domain | None, raised: list[BaseException]) -> str:
    """Ask the owner of the address space that a fault is in (F65)."""
    handler: Callable[[PageFault], bool | str] | None = None
    if fault.device.domain_at(fault.pasid or 0) is not domain:
        return "invalid"  # it changed hands since the record was taken
    if isinstance(domain, SvaDomain):
        if fault.pasid is None or domain.space.exited:
            return "invalid"
        handler = domain.space.handler
    elif isinstance(domain, PagingDomain):
        handler = domain.iopf
    if handler is None:
        return "failure" if not isinstance(domain, SvaDomain) else "invalid"
    try:
        said = handler(fault)
    except Exception as error:
        raised.append(error)
        return "invalid"
    if said in RESPONSES:
        return str(said)
    return "success" if said else "invalid"


def _page_request(iommu: Iommu, record: Record, raised: list[BaseException]) -> None:
    """Handle one record of the page request queue."""
    fields = record.fields
    if record.answered or is_stop_marker(record):
        return
    groups, key = iommu.page_requests, (record.sid, record.pasid, fields["PRGIndex"])
    if not fields["Last"]:
        waiting = sum(len(group) for (sid, *_), group in groups.items() if sid == record.sid)
        if record.device is not None and waiting < MOST_WAITING:
            groups.setdefault(key, []).append(record)
        return
    group = groups.pop(key, [])
    if record.device is not None:
        group.append(record)
    response = "success" if group else "failure"
    for one in group:
        response = _ask(_requested(one), one.domain, raised)
        if response != "success":
            break  # the first error stops the rest
    _answer(iommu, record, response, raised)


def _requested(record: Record) -> PageFault:
    """The page fault that a page request stands for."""
    fields = record.fields
    assert record.device is not None
    return PageFault(
        record.device, record.pasid, fields["Address"], bool(fields["R"]), bool(fields["W"]),
        bool(fields["X"]), bool(fields["Priv"]), fields["PRGIndex"], bool(fields["Last"]),
    )  # fmt: skip
