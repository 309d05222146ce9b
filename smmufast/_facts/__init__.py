"""Facts: the bits of records and descriptors, the types that pass between modules, the reasons.

Nothing here decides anything.  `layout.pxd` and `layout.h` are generated from `smmufast.layout`.
This room imports nothing of the package.
"""
