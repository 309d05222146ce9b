"""What Cython users import: `from smmufast cimport Memory, Smmu`."""

from smmufast._memory cimport Memory
from smmufast._smmu cimport Result, Smmu, Walk
from smmufast._types cimport Outcome, Request
