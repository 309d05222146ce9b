"""The engine: memory, caches, and what drives the rules through them.

The chain of one request: `lookup.pxd` finds STE and CD, `stage1.pxd` and `stage2.pxd` walk over
`stage.pxd`, and `translate.pxd` is the scalar path that asks them in order; `chain.pxd` is what
they pass on, and how they end.  `cached.pxd` drives them over caches, `walk.pxd` one fetch at a
time, `batch.pxd` for many requests at once.  It knows no device object: what a
call needs comes in the structs of `core.pxd`.
"""
