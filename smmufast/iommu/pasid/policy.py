"""How many PASIDs devices get: the width of a PASID, policies, and the limits that follow.

The width, 20 bits, and 0, which is no address space's, are architectural (IHI 0070
SMMU_IDR1.SSIDSIZE; PCIe PASID).  The policies are those that were proposed or merged (F20-F23).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Final, SupportsIndex

from smmufast._driver.pasid import PasidAllocator
from smmufast.errors import InvalidArgument, NoDevice, NoSpace, NotSupported, PasidOverflow

if TYPE_CHECKING:
    from collections.abc import Sequence

SIZE: Final = 1 << 20
LAST: Final = SIZE - 1


@dataclass(frozen=True, slots=True)
class PasidPolicy:
    """How many PASIDs a device gets.

    Attributes
    ----------
    name : str
    system_wide : bool
        All devices have the limit of the narrowest SMMU that has PASIDs, which is fixed at its
        first use (F21).
    strict : bool
        A device that has fewer PASIDs than that gets none (F22).
    every_smmu : bool
        SMMUs without PASIDs count too, so that one of them takes PASIDs from all devices.
    refuse_late : bool
        An SMMU that comes when the limit is fixed, and is narrower, is refused; else its devices
        do without PASIDs.
    """

    name: str
    system_wide: bool = False
    strict: bool = False
    every_smmu: bool = False
    refuse_late: bool = False


PER_DEVICE: Final = PasidPolicy("per device")
"""Each device has its own limit, and so may be too narrow for a PASID that exists (F20)."""
SYSTEM_WIDE: Final = PasidPolicy("system wide", system_wide=True)
"""No PASID is beyond the narrowest SMMU that has PASIDs (F21), as VT-d's init_dmars has it."""
SYSTEM_WIDE_STRICT: Final = PasidPolicy("system wide, strict", system_wide=True, strict=True)
"""As SYSTEM_WIDE, and a narrower device does without PASIDs (F22)."""
EVERY_SMMU: Final = PasidPolicy("system wide, every SMMU", system_wide=True, every_smmu=True)
"""As SYSTEM_WIDE, over all SMMUs: where one has no PASIDs, no device has any."""


def _width(pasids: int) -> str:
    if pasids & (pasids - 1) or not pasids:
        return f"{pasids} PASIDs"
    return f"{pasids} PASIDs ({pasids.bit_length() - 1} bits)"


class PasidLimits:
    """What a policy makes of the limits of SMMUs and devices."""

    def __init__(self, policy: PasidPolicy, smmu_limits: Sequence[int]) -> None:
        self.policy = policy
        self._smmu_limits: list[int] = []
        self._limit: int | None = None if policy.system_wide else SIZE
        self._ids = PasidAllocator(SIZE)
        self._lock = threading.RLock()
        for limit in smmu_limits:
            self.add_smmu(limit)

    def add_smmu(self, max_pasids: int) -> int:
        """Count an SMMU in for the system's limit, which is fixed once it was used.

        Parameters
        ----------
        max_pasids : int
            ``2**ssid_bits`` of the SMMU; 0 or 1: it has no PASIDs.

        Returns
        -------
        int
            How many PASIDs its devices may have: as many, or 0 if it has none, or comes late and
            is narrower than the limit.

        Raises
        ------
        InvalidArgument
            More than 2**20, or negative.
        NotSupported
            It comes late and is narrower, and the policy refuses that.
        """
        if not 0 <= max_pasids <= SIZE:
            raise InvalidArgument("max_pasids", max_pasids, f"0 to {SIZE}")
        with self._lock:
            used = self._limit is not None or len(self._ids) > 0
            late = used and self._too_narrow(max_pasids)
            if late and self.policy.refuse_late:
                text = f"max_pasids: {self._why_late(max_pasids)}; the policy refuses it"
                raise NotSupported("max_pasids", max_pasids, text=text)
            self._smmu_limits.append(max_pasids)
            return 0 if late or max_pasids == 1 else max_pasids

    def _drop_smmu(self, max_pasids: int) -> None:
        """Take back `add_smmu`."""
        with self._lock:
            self._smmu_limits.remove(max_pasids)

    @property
    def limit(self) -> int:
        """All PASIDs are below it; fixed when it is first asked for, or a PASID allocated (F21).

        While there is no SMMU to be counted, only the latter fixes it.
        """
        if self._limit is not None:
            return self._limit
        with self._lock:
            counted = [limit for limit in self._smmu_limits if self._counts(limit)]
            limit = max(min((SIZE, *counted)), 1)
            if self._limit is None and (counted or len(self._ids)):
                self._limit = limit
            return limit if self._limit is None else self._limit

    def _counts(self, max_pasids: int) -> bool:
        """Whether an SMMU has a part in the limit."""
        policy = self.policy
        return policy.system_wide and (max_pasids > 1 or policy.every_smmu)

    def _too_narrow(self, max_pasids: int) -> bool:
        """Whether an SMMU is narrower than a limit in which it has no part: it came late."""
        return self._counts(max_pasids) and max(max_pasids, 1) < self.limit

    def _why_late(self, max_pasids: int) -> str:
        return (
            f"policy {self.policy.name!r}: the SMMU came late and has {_width(max_pasids)}, fewer "
            f"than the system's {_width(self.limit)}"
        )

    def why_none(self, device_max_pasids: int, smmu_max_pasids: int = SIZE) -> str:
        """Say why a device has no PASIDs: for messages.

        Parameters
        ----------
        device_max_pasids, smmu_max_pasids : int
            What the device and its SMMU have.

        Returns
        -------
        str
            The policy and the widths, where the policy switched them off; "" if it has PASIDs.
        """
        limit, name = self.limit, f"policy {self.policy.name!r}"
        if smmu_max_pasids <= 1:
            return "the SMMU has no PASIDs"
        if device_max_pasids <= 1:
            return "the device has no PASIDs"
        if limit == 1:
            return f"{name}: one of the system's SMMUs has no PASIDs, so no device has any"
        if self._too_narrow(smmu_max_pasids):
            return self._why_late(smmu_max_pasids)
        own = min(device_max_pasids, smmu_max_pasids)
        if self.policy.strict and own < limit:
            return f"{name}: the device has {_width(own)}, fewer than the system's {_width(limit)}"
        return ""

    def max_pasids(self, device_max_pasids: int) -> int:
        """Return how many PASIDs a device has: 1 to one less than this; 0 if it has none.

        Parameters
        ----------
        device_max_pasids : int
            Its own limit, which is that of its SMMU too (F3).

        Raises
        ------
        InvalidArgument
            It is negative.
        """
        if device_max_pasids < 0:
            raise InvalidArgument("device_max_pasids", device_max_pasids, "0 or more")
        limit = self.limit
        if self.policy.strict and device_max_pasids < limit:
            return 0
        limit = min(device_max_pasids, limit)
        return limit if limit > 1 else 0

    def device_range(
        self, device_max_pasids: int, min_pasid: int = 0, max_pasid: int = 0
    ) -> tuple[int, int]:
        """Return the first and last PASID to ask `alloc` for, for a device (F20, F22, F23).

        Parameters
        ----------
        device_max_pasids : int
            The device's own limit.
        min_pasid, max_pasid : int
            What its driver asks for, both included; 0 for what the device has.  Wider values are
            clipped.

        Raises
        ------
        NoDevice
            The policy switched PASIDs off for this device.
        NoSpace
            The device has none of its own.
        InvalidArgument
            Nothing is left between the two.
        """
        bound = self._bound(device_max_pasids)
        if not bound:
            text = "device_max_pasids: the device has no PASIDs"
            raise NoSpace("device_max_pasids", device_max_pasids, text=text)
        first = max(min_pasid, 1)
        last = min(max_pasid or LAST, bound - 1)
        if min_pasid < 0 or max_pasid < 0 or first > last:
            text = f"min_pasid {min_pasid} and max_pasid {max_pasid} leave none of 1 to {bound - 1}"
            raise InvalidArgument("min_pasid", min_pasid, f"1 to {bound - 1}", text=text)
        return first, last

    def check(self, pasid: SupportsIndex, device_max_pasids: int) -> None:
        """Refuse a PASID that exists already for a device that is too narrow for it (F20).

        Parameters
        ----------
        pasid : int
            One that was allocated for another device.
        device_max_pasids : int
            This device's own limit.

        Raises
        ------
        PasidOverflow
            It is not below the device's limit.
        NoDevice
            The policy switched PASIDs off for this device (F22).
        """
        pasid = index(pasid)
        bound = self._bound(device_max_pasids)
        if pasid >= bound:
            limit = f"1 to {bound - 1}" if bound else "none: the device has no PASIDs"
            raise PasidOverflow("pasid", pasid, limit)

    def _bound(self, device_max_pasids: int) -> int:
        bound = self.max_pasids(device_max_pasids)
        if not bound and (self.policy.strict or self.limit == 1):
            text = f"device_max_pasids: PASIDs are off: {self.why_none(device_max_pasids)}"
            raise NoDevice("device_max_pasids", device_max_pasids, text=text)
        return bound
