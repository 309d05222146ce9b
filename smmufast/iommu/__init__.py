"""The driver half: what an operating system does with an SMMUv3.

It allocates PASIDs, ASIDs and VMIDs, writes stream tables, context descriptors and page tables
into memory, and sends the commands that invalidate what the SMMU may have cached.
"""
