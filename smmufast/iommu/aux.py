"""Features and auxiliary domains of a device: the AUX profile (F15 to F23).

The 2018 proposal, and Linux 5.2 to 5.17 (iommu_dev_enable_feature, iommu_aux_attach_device).  The
methods of `Device` with these names call these functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, SupportsIndex

from smmufast._arguments import must_be
from smmufast.errors import (
    Busy,
    Exists,
    InvalidArgument,
    NoDevice,
    NoSpace,
    PasidOverflow,
    integer,
)
from smmufast.iommu.domain import Domain, PagingDomain, domain_of, is_auxiliary
from smmufast.iommu.profile import AUX, need, take_pasid
from smmufast.iommu.undo import Undo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from smmufast.iommu.attachment import AttachHandle
    from smmufast.iommu.device import Device
    from smmufast.iommu.smmu.master import Master

FEATURES: Final = ("AUX", "SVA", "IOPF")


# --- features ---


def has_feature(device: Device, feature: str) -> bool:
    """Whether a device and its SMMU have a feature; never an error."""
    if device._master is None or device.system.profile is not AUX:
        return False
    if feature == "IOPF":
        return device.stall_supported or device.pri_supported
    if feature == "SVA":
        return device.max_pasids > 0 and device.iommu.has_sva
    return feature == "AUX" and device.max_pasids > 0


def enable_feature(
    device: Device, feature: str, min_pasid: SupportsIndex, max_pasid: SupportsIndex
) -> None:
    """Enable one feature, with limits for its PASIDs."""
    with device.group.system.lock:
        need(device.system.profile, AUX, "enable_feature")
        if feature not in FEATURES:
            raise InvalidArgument("feature", feature, '"AUX", "SVA" or "IOPF"')
        _enable(device, (feature,), min_pasid, max_pasid)


def init(
    device: Device, features: Iterable[str], min_pasid: SupportsIndex, max_pasid: SupportsIndex,
    mm_exit: Callable[[object], object] | None,
) -> None:  # fmt: skip
    """Enable SVA and what else is named, all or nothing."""
    with device.group.system.lock:
        need(device.system.profile, AUX, "init")
        names = tuple(features)
        for name in names:
            if name not in ("AUX", "IOPF"):
                raise InvalidArgument("features", name, '"AUX" or "IOPF"')
        if "SVA" in device.enabled_features:
            raise Exists("device", device, text="device was initialised")
        _enable(device, tuple(dict.fromkeys((*names, "SVA"))), min_pasid, max_pasid)
        device.mm_exit = mm_exit


def _enable(
    device: Device, features: tuple[str, ...], min_pasid: SupportsIndex, max_pasid: SupportsIndex
) -> None:
    """Enable features of a device, or none of them."""
    enabled = device.enabled_features
    for feature in features:
        if not has_feature(device, feature):
            why = "" if device.max_pasids or feature == "IOPF" else f": {device.why_no_pasids}"
            raise NoDevice("feature", feature, text=f"device has no {feature}{why}")
        if feature in enabled:
            raise Busy("feature", feature, text=f"{feature} is enabled")
    if "SVA" in features and has_feature(device, "IOPF") and not {"IOPF"} & {*features, *enabled}:
        raise InvalidArgument("feature", "SVA", text="SVA needs IOPF on this device")
    limits = _limits(device, integer("min_pasid", min_pasid), integer("max_pasid", max_pasid))
    if not device.pasid_enabled and {"AUX", "SVA"} & {*features}:
        device.enable_pasid()  # S1: if necessary
    enabled.update(dict.fromkeys(features, limits))


def _limits(device: Device, min_pasid: int, max_pasid: int) -> tuple[int, int]:
    """First and last PASID that a feature may use; 0: what device and policy allow."""
    largest = device.max_pasids - 1
    for name, value in (("min_pasid", min_pasid), ("max_pasid", max_pasid)):
        if value < 0:
            raise InvalidArgument(name, value, "0 or more")
    first, last = max(min_pasid, 1), min(max_pasid or largest, largest)
    if max_pasid and max_pasid < min_pasid:
        raise InvalidArgument(
            "max_pasid", max_pasid,
            text=f"max_pasid ({max_pasid}) is below min_pasid ({min_pasid}); this device has "
            f"PASIDs 1 to {largest}",
        )  # fmt: skip
    if device.max_pasids and last < first:
        raise InvalidArgument("min_pasid", min_pasid, f"0 to {largest}")
    return first, last


def disable_feature(device: Device, feature: str) -> None:
    """Disable a feature that nothing uses."""
    with device.group.system.lock:
        need(device.system.profile, AUX, "disable_feature")
        enabled = device.enabled_features
        if feature not in enabled:
            raise InvalidArgument("feature", feature, text=f"{feature} is not enabled")
        if feature == "AUX" and device.aux:
            raise Busy("feature", feature, text=f"{len(device.aux)} auxiliary domains attached")
        if feature == "IOPF" and "SVA" in enabled:
            raise Busy("feature", feature, text="SVA is enabled, which needs it")
        if feature == "SVA" and device.bonds:
            raise Busy("feature", feature, text="address spaces are bound")
        del enabled[feature]


def shutdown(device: Device) -> None:
    """Undo `init`: what is bound or attached goes, whatever a callback raises meanwhile."""
    with device.group.system.lock as lock:
        need(device.system.profile, AUX, "shutdown")
        for one in list(device.master.attachments.values()):
            if one.handle is not None:
                lock.defer(one.handle.release, device)
        for pasid in device.aux:
            lock.insist(device.master.detach_pasid, pasid)
        device.enabled_features.clear()
        device.mm_exit = None


# --- auxiliary domains ---


def attached(master: Master) -> dict[int, PagingDomain]:
    """The auxiliary domains of a device, by PASID."""
    return {
        ssid: one.domain
        for ssid, one in master.attachments.items()
        if isinstance(one.domain, PagingDomain) and ssid and is_auxiliary(one.domain)
    }


def attach(device: Device, domain: Domain, handle: AttachHandle | None = None) -> None:
    """Attach an auxiliary domain; `handle` says who may detach it, if not everybody."""
    with device.group.system.lock:
        need(device.system.profile, AUX, "attach_aux")
        device.group.check_reset()
        if "AUX" not in device.enabled_features:
            raise InvalidArgument("device", device, text="AUX is not enabled on the device")
        domain_of(domain)
        main = device.domain
        if not isinstance(main, PagingDomain) or main.stage != 1 or main.cd_table is None:
            text = must_be("main domain of device", "a paging domain of stage 1", main)
            raise InvalidArgument("device", device, text=text)
        if not isinstance(domain, PagingDomain) or domain.stage != 1:
            raise InvalidArgument(
                "domain", domain, text="an auxiliary domain is a paging domain of stage 1"
            )
        if domain.mode == "main":
            raise InvalidArgument(
                "domain", domain, text="domain was attached as main domain, and stays so"
            )
        if domain.parent is not None and domain.parent is not main:
            raise InvalidArgument("domain", domain, text="domain has another parent")
        if domain.aux_pasid in device.aux:
            raise Busy("domain", domain, text="domain is attached to this device")
        first, last = device.enabled_features["AUX"]
        if domain.aux_pasid and not first <= domain.aux_pasid <= last:
            raise PasidOverflow("pasid", domain.aux_pasid, f"{first} to {last}")
        with Undo() as undo:
            pasid = domain.aux_pasid
            if not pasid:
                pasid = _take(device, domain, first, last)
                undo.add(device.system.give_pasid, pasid)
            if domain.iommu is None:
                domain.finalise(device.iommu)
                undo.add(domain.unfinalise)
            device.master.prepare_pasid(domain, pasid, undo)
            device.master.attach_pasid(domain, pasid, handle)
        domain.mode = "aux"
        domain.parent = main
        domain.aux_pasid = pasid
        main.children[pasid] = domain


def _take(device: Device, domain: PagingDomain, first: int, last: int) -> int:
    try:
        return take_pasid(device, first, last, domain)
    except NoSpace as error:
        raise InvalidArgument("pasid", None, text=f"no PASID is left: {error}") from error


def detach(device: Device, domain: Domain) -> None:
    """Detach an auxiliary domain; the last device clears the CD and invalidates."""
    with device.group.system.lock:
        need(device.system.profile, AUX, "detach_aux")
        pasid = domain.aux_pasid if isinstance(domain, PagingDomain) else 0
        if not pasid or device.aux.get(pasid) is not domain:
            raise InvalidArgument(
                "domain", domain, text=f"{domain!r} is not attached to the device"
            )
        handle = device.master.attachments[pasid].handle
        if handle is not None:
            handle.check_detach(pasid)
        device.master.detach_pasid(pasid)
