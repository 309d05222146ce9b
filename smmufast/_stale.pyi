from smmufast._smmu import Smmu
from smmufast._tlb import StaleEntry as StaleEntry

def look(smmu: Smmu, *, lookups: int = ...) -> list[StaleEntry]: ...
