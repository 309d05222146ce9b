from collections import deque
from collections.abc import Callable
from typing import (
    Literal,
    NamedTuple,
    NoReturn,
    Protocol,
    Self,
    SupportsIndex,
    final,
    type_check_only,
)

import numpy as np
from typing_extensions import Buffer, disjoint_base

from smmufast._device.smmu import Result
from smmufast._engine.memory import Memory
from smmufast._engine.tlb import Caches as Caches
from smmufast.faults import Event as Event
from smmufast.features import Features as Features
from smmufast.features import modelled as modelled
from smmufast.why import Why as Why

_Flag = bool | np.bool

class RegisterWarning(NamedTuple):
    register: str
    text: str

class PageAnswer(NamedTuple):
    action: Literal["queued", "dropped", "success", "failure"]
    ssid: int | None

@type_check_only
class Device(Protocol):
    def atc_invalidate(
        self, ssid: int | None, address: int, size: int, global_: bool, /
    ) -> bool | None: ...
    def pri_response(self, ssid: int | None, prg_index: int, code: int, /) -> object: ...

@final
class Stall:
    def __init__(self) -> NoReturn: ...
    @property
    def sid(self) -> int: ...
    @property
    def ssid(self) -> int | None: ...
    @property
    def iova(self) -> int: ...
    @property
    def access(self) -> int: ...
    @property
    def write(self) -> bool: ...
    @property
    def priv(self) -> bool: ...
    @property
    def instr(self) -> bool: ...
    @property
    def stag(self) -> int | None: ...
    @property
    def recorded(self) -> bool: ...
    @property
    def fault(self) -> Event: ...
    @property
    def why(self) -> Why | None: ...
    @property
    def done(self) -> bool: ...
    @property
    def result(self) -> Result | None: ...
    def _repr_html_(self) -> str: ...

@disjoint_base
class Registers:
    def __new__(
        cls,
        memory: Memory,
        features: Features | None = None,
        *,
        strtab_base: SupportsIndex = 0,
        strtab_base_cfg: SupportsIndex = 0,
        cr0: SupportsIndex = 5,
        cr2: SupportsIndex = 2,
        gbpa: SupportsIndex = 4096,
        eventq_base: SupportsIndex | None = None,
        cmdq_base: SupportsIndex | None = None,
        priq_base: SupportsIndex | None = None,
        caches: Caches | None = None,
        ignore_s2ptw: _Flag = False,
        wired: _Flag = True,
        on_interrupt: Callable[[str], object] | None = None,
    ) -> Self: ...
    @property
    def caches(self) -> Caches | None: ...
    @property
    def ignore_s2ptw(self) -> bool: ...
    @property
    def wired(self) -> bool: ...
    @property
    def memory(self) -> Memory: ...
    @property
    def features(self) -> Features: ...
    @property
    def strtab_base(self) -> int: ...
    @property
    def strtab_base_cfg(self) -> int: ...
    @property
    def cr0(self) -> int: ...
    @property
    def cr1(self) -> int: ...
    @property
    def cr2(self) -> int: ...
    @property
    def gbpa(self) -> int: ...
    @property
    def irq_ctrl(self) -> int: ...
    @property
    def gerror(self) -> int: ...
    @property
    def gerrorn(self) -> int: ...
    @property
    def eventq_base(self) -> int: ...
    @property
    def cmdq_base(self) -> int: ...
    @property
    def priq_base(self) -> int: ...
    @property
    def on_interrupt(self) -> Callable[[str], object] | None: ...
    @on_interrupt.setter
    def on_interrupt(self, value: Callable[[str], object] | None) -> None: ...
    @property
    def on_resume(self) -> Callable[[Stall], object] | None: ...
    @on_resume.setter
    def on_resume(self, value: Callable[[Stall], object] | None) -> None: ...
    @property
    def stalls(self) -> list[Stall]: ...
    @property
    def devices(self) -> dict[int, Device]: ...
    @property
    def warnings(self) -> deque[RegisterWarning]: ...
    def read(self, offset: SupportsIndex | str, size: SupportsIndex = 4) -> int: ...
    def write(
        self, offset: SupportsIndex | str, value: SupportsIndex, size: SupportsIndex = 4
    ) -> None: ...
    def reset(self) -> None: ...
    def command(self, name: str, **fields: SupportsIndex) -> None: ...
    def sync(self) -> None: ...
    def record(self, name: str, **fields: int) -> bool: ...
    def page_request(
        self,
        sid: SupportsIndex,
        address: SupportsIndex,
        *,
        ssid: SupportsIndex | None = None,
        read: _Flag = False,
        write: _Flag = False,
        execute: _Flag = False,
        priv: _Flag = False,
        last: _Flag = True,
        prg_index: SupportsIndex = 0,
    ) -> PageAnswer: ...
    def save(self) -> bytes: ...
    @classmethod
    def restore(
        cls,
        state: Buffer,
        memory: Memory,
        *,
        on_interrupt: Callable[[str], object] | None = None,
        on_resume: Callable[[Stall], object] | None = None,
    ) -> Self: ...
