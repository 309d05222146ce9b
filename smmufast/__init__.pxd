"""What Cython users import: `from smmufast cimport Memory, Smmu`."""

from smmufast._engine.memory cimport Memory
from smmufast._device.smmu cimport Result, Smmu, Walk
from smmufast._facts.types cimport Outcome, Request
