"""What the event and page request queues say, and who answers (F61 to F65).

A stalled transaction and a PCIe page request become a `PageFault`, which the owner of the address
space resolves; the SMMU is told with CMD_RESUME or CMD_PRI_RESP (IHI 0070 3.12, 4.5, 4.6, 7.3, 8).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from smmufast import layout
from smmufast.iommu.domain import PagingDomain, SvaDomain

if TYPE_CHECKING:
    from collections.abc import Callable

    from smmufast.iommu.device import Device
    from smmufast.iommu.smmu.iommu import Iommu

#: How a page fault may be answered.
RESPONSES: Final = ("success", "invalid", "failure")
#: How often one access may stall in a call of `service` although each time the answer is success.
RETRIES: Final = 16
_EVENTS: Final = {event.value: event.name for event in layout.Event}
_PAGE_FAULTS: Final = ("F_TRANSLATION", "F_ADDR_SIZE", "F_ACCESS", "F_PERMISSION")
_PRI_CODES: Final = {"failure": 0, "invalid": 1, "success": 2}


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


def service(iommu: Iommu) -> int:
    """Handle what is in the queues of one SMMU; return how many records there were.

    Every record is taken and every stalled transaction answered, also when a handler raises: its
    fault is answered as invalid, and the first exception is raised when the queues are empty.  An
    access that stalls once more after RETRIES answers of success is answered as invalid, so that
    a handler that maps nothing does not keep it for ever.
    """
    raised: list[BaseException] = []
    tried: dict[PageFault, int] = {}
    count = 0
    for record in iommu.take("EVENTQ"):
        count += 1
        _event(iommu, record, raised, tried)
    for record in iommu.take("PRIQ"):
        count += 1
        _page_request(iommu, record, raised)
    if raised:
        raise raised[0]
    return count


def _event(
    iommu: Iommu, record: bytes, raised: list[BaseException], tried: dict[PageFault, int]
) -> None:
    fields = layout.unpack("EVENT", record)
    number, sid = fields["ID"], fields["StreamID"]
    name = _EVENTS.get(number, f"{number:#04x}")
    device = iommu.devices.get(sid)
    pasid = fields["SubstreamID"] if fields["SSV"] else None
    stalled = bool(fields["Stall"]) and name in _PAGE_FAULTS
    if number not in _EVENTS:
        status = errno.EOPNOTSUPP
    elif device is None:
        status = errno.EINVAL
    elif not stalled:
        status = errno.EOPNOTSUPP
    else:
        fault = PageFault(
            device, pasid, fields["InputAddr"], bool(fields["RnW"]) and not fields["InD"],
            not fields["RnW"], bool(fields["InD"]), bool(fields["PnU"]), fields["STAG"], True,
        )  # fmt: skip
        same = replace(fault, group=0)  # the stall tag is another one each time
        tried[same] = tried.get(same, 0) + 1
        if (fields["S2"] and name != "F_TRANSLATION") or tried[same] > RETRIES:
            answer = "invalid"
        else:
            answer = _answer(fault, raised)
        status = 0 if answer == "success" else errno.EFAULT
    if stalled:
        # retry, or terminate with an abort; no CMD_SYNC follows (F62)
        word = {"AC": 1} if status == 0 else {"AB": 1}
        iommu.queue.issue("RESUME", StreamID=sid, STAG=fields["STAG"], **word)
        try:
            iommu.queue.submit()
        except Exception as error:  # a host's callback; the rest of the queue is still to be read
            raised.append(error)
    report = Report(
        name, sid, pasid, fields["InputAddr"], device, stalled, fields["STAG"],
        not fields["RnW"], bool(fields["PnU"]), bool(fields["InD"]),
        fields["IPA"] if fields["S2"] else None, status, record,
    )  # fmt: skip
    system = iommu.system
    system.reports.append(report)
    if system.on_fault is not None:
        try:
            system.on_fault(report)
        except Exception as error:
            raised.append(error)


def _answer(fault: PageFault, raised: list[BaseException]) -> str:
    """Ask the owner of the address space that a fault is in (F65)."""
    device = fault.device
    if fault.pasid:
        domain = device.aux.get(fault.pasid) or device.group.at(fault.pasid)
    else:
        domain = device.domain
    handler: Callable[[PageFault], bool | str] | None = None
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


def _page_request(iommu: Iommu, record: bytes, raised: list[BaseException]) -> None:
    fields = layout.unpack("PRI", record)
    sid, group = fields["StreamID"], fields["PRGIndex"]
    pasid = fields["SubstreamID"] if fields["SSV"] else None
    asks = fields["R"] or fields["W"] or fields["X"]
    if fields["Last"] and not asks and pasid is not None:
        return  # a stop marker: nobody waits
    waiting = iommu.page_requests.setdefault((sid, pasid, group), [])
    device = iommu.devices.get(sid)
    if device is not None and len(waiting) < 512:
        waiting.append(
            PageFault(
                device,
                pasid,
                fields["Address"],
                bool(fields["R"]),
                bool(fields["W"]),
                bool(fields["X"]),
                bool(fields["Priv"]),
                group,
                bool(fields["Last"]),
            )
        )
    if not fields["Last"]:
        return
    del iommu.page_requests[sid, pasid, group]
    answer = "success" if waiting else "failure"
    for fault in waiting:
        answer = _answer(fault, raised)
        if answer != "success":
            break  # the first error stops the rest
    more = {} if pasid is None else {"SSV": 1, "SubstreamID": pasid}
    iommu.queue.issue("PRI_RESP", StreamID=sid, PRGIndex=group, Resp=_PRI_CODES[answer], **more)
    try:
        iommu.queue.submit()
    except Exception as error:  # a host's callback
        raised.append(error)
