"""What the operating system's half has compiled: page tables, PASIDs, the command queue.

It writes the bytes that the device reads, and never asks the engine for a translation.
`smmufast.iommu` is its Python.
"""
