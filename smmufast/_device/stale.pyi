from smmufast._device.smmu import Smmu
from smmufast._engine.tlb import StaleEntry as StaleEntry

def look(smmu: Smmu, *, lookups: int = ...) -> list[StaleEntry]: ...
