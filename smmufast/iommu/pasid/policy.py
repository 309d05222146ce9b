"""How many PASIDs devices get: the width of a PASID, policies, and the limits that follow.

The width, 20 bits, and 0, which is no address space's, are architectural (IHI 0070
SMMU_IDR1.SSIDSIZE; PCIe PASID).  The policies are those that were proposed or merged (F20-F23).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Final, SupportsIndex

from smmufast.errors import InvalidArgument, NoDevice, NoSpace, PasidOverflow

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
        All devices have the limit of the narrowest SMMU, which is fixed at its first use (F21).
    strict : bool
        A device that has fewer PASIDs than that gets none (F22).
    """

    name: str
    system_wide: bool = False
    strict: bool = False


PER_DEVICE: Final = PasidPolicy("per device")
"""Each device has its own limit, and so may be too narrow for a PASID that exists (F20)."""
SYSTEM_WIDE: Final = PasidPolicy("system wide", system_wide=True)
"""No PASID is beyond the narrowest SMMU (F21); a device may still be narrower."""
SYSTEM_WIDE_STRICT: Final = PasidPolicy("system wide, strict", system_wide=True, strict=True)
"""As SYSTEM_WIDE, and a narrower device does without PASIDs (F22)."""


class PasidLimits:
    """What a policy makes of the limits of SMMUs and devices."""

    def __init__(self, policy: PasidPolicy, smmu_limits: Sequence[int]) -> None:
        self.policy = policy
        self._smmu_limits: list[int] = []
        self._limit: int | None = None
        self._lock = threading.RLock()
        for limit in smmu_limits:
            self.add_smmu(limit)

    def add_smmu(self, max_pasids: int) -> None:
        """Count an SMMU in for the system's limit; too late once that was used.

        Parameters
        ----------
        max_pasids : int
            ``2**ssid_bits`` of the SMMU; 0 or 1: it has no PASIDs.
        """
        if not 0 <= max_pasids <= SIZE:
            raise InvalidArgument("max_pasids", max_pasids, f"0 to {SIZE}")
        with self._lock:
            self._smmu_limits.append(max_pasids)

    @property
    def limit(self) -> int:
        """All PASIDs are below it; fixed when it is first asked for, or a PASID allocated (F21)."""
        if self._limit is None:
            with self._lock:
                if self._limit is None:
                    limits = self._smmu_limits if self.policy.system_wide else ()
                    self._limit = min((SIZE, *limits))
        return self._limit

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
        if not bound and self.policy.strict:
            text = (
                f"device_max_pasids is {device_max_pasids}: PASIDs are off for devices that have "
                f"fewer than the system's {self.limit}"
            )
            raise NoDevice("device_max_pasids", device_max_pasids, text=text)
        return bound
