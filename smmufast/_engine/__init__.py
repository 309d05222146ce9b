"""The engine: memory, caches, and what drives the rules through them.

`translate.pxd` goes from a request to its outcome; `cached.pxd` does so over caches, `walk.pxd`
one fetch at a time, `batch.pxd` for many requests at once.  It knows no device object: what a
call needs comes in the structs of `core.pxd`.
"""
