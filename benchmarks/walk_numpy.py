"""A stage 1 walk over arrays with numpy: one pass for each level, faults as masks.

The sections are those of walk_python.py, whose decoded context it takes.
"""

import numpy as np
from walk_python import (
    ABORT,
    BYPASS,
    F_ACCESS,
    F_ADDR_SIZE,
    F_PERMISSION,
    F_TRANSLATION,
    F_WALK_EABT,
    OAS_BITS,
    OK,
    first_block_shift,
    override,
    refused_access,
)

# Addresses in flight: their temporaries should stay in the second-level cache.
CHUNK = 8192

U64 = np.uint64


def bit(words, lsb):
    """One bit of each word, as bool."""
    return (words & U64(1 << lsb)) != 0


def permission_table(context, write, priv, instr):
    """Which leaves deny an access, indexed by UXN, PXN, AP[2], AP[1] as bits 3 to 0."""
    return np.array(
        [
            bool(refused_access(context, write, priv, instr, i & 1, i >> 1 & 1, i >> 3, i >> 2 & 1))
            for i in range(16)
        ]
    )


def output_address(descriptor, granule, ds):
    """Bits [51:granule] that a descriptor holds."""
    if granule == 16:
        high = (descriptor & U64(0xF000)) << U64(36)
        return descriptor & U64(0xFFFF_FFFF_0000) | high
    if ds:
        high = (descriptor & U64(0x300)) << U64(42)
        return descriptor & U64((1 << 50) - (1 << granule)) | high
    return descriptor & U64((1 << 48) - (1 << granule))


def walk(words, base, context, half, denied, iova):
    """Walk canonical addresses of one half.

    Parameters
    ----------
    words : ndarray of uint64
        Physical memory from base on.
    base : int
    context : Context
    half : Half
    denied : ndarray of bool
        permission_table().
    iova : ndarray of uint64

    Returns
    -------
    pa : ndarray of uint64
    event : ndarray of uint8
    """
    granule, ds, stride = half.granule, half.ds, half.granule - 3
    pa = np.zeros(len(iova), U64)
    event = np.zeros(len(iova), np.uint8)
    rows = None  # None: every address is still on its way
    live = iova & U64((1 << half.input_bits) - 1)
    table = U64(half.ttb)
    tables = np.zeros(len(iova), U64)
    output_bits = U64(context.output_bits)

    def stop(faulty, number):
        """Give an event to some of the live addresses; return which go on, None for all."""
        nonlocal rows, live, tables
        if not faulty.any():
            return None
        if rows is None:
            rows = np.arange(len(iova))
        event[rows[faulty]] = number
        keep = ~faulty
        rows, live, tables = rows[keep], live[keep], tables[keep]
        return keep

    for shift in range(half.start_shift, granule - 1, -stride):
        index = live >> U64(shift) & U64((1 << stride) - 1)
        index += (table - U64(base)) >> U64(3)
        keep = stop(index >= U64(len(words)), F_WALK_EABT)
        descriptor = words[index if keep is None else index[keep]]
        wrong = descriptor & U64(3) != 3 if shift == granule else ~bit(descriptor, 0)
        if granule < shift and shift > first_block_shift(granule, ds):
            wrong = descriptor & U64(3) != 3
        keep = stop(wrong, F_TRANSLATION)
        if keep is not None:
            descriptor = descriptor[keep]
        output = output_address(descriptor, granule, ds)
        is_leaf = None if shift == granule else ~bit(descriptor, 1)
        if is_leaf is not None and is_leaf.any():
            output[is_leaf] &= U64((1 << 64) - (1 << shift))
        keep = stop(output >> output_bits != 0, F_ADDR_SIZE)
        if keep is not None:
            descriptor, output = descriptor[keep], output[keep]
            is_leaf = None if is_leaf is None else is_leaf[keep]
        if is_leaf is None or is_leaf.any():
            chosen = slice(None) if is_leaf is None else is_leaf
            leaf = descriptor[chosen]
            above = U64(0) if half.had else tables[chosen]
            ap1 = leaf >> U64(6) & ~(above >> U64(61)) & U64(1)
            ap2 = (leaf >> U64(7) | above >> U64(62)) & U64(1)
            pxn = (leaf >> U64(53) | above >> U64(59)) & U64(1)
            uxn = (leaf >> U64(54) | above >> U64(60)) & U64(1)
            code = ap1 | ap2 << U64(1) | pxn << U64(2) | uxn << U64(3)
            fault = denied[code] * np.uint8(F_PERMISSION)
            if not context.affd:
                fault[~bit(leaf, 10)] = F_ACCESS
            result = output[chosen] | live[chosen] & U64((1 << shift) - 1)
            result[fault != 0] = 0
            where = chosen if rows is None else rows[chosen]
            pa[where], event[where] = result, fault
            if is_leaf is None:
                break
            if rows is None:
                rows = np.arange(len(iova))
            rest = ~is_leaf
            rows, live, tables = rows[rest], live[rest], tables[rest]
            descriptor, output = descriptor[rest], output[rest]
        tables |= descriptor
        table = output
        if not len(live):
            break
    return pa, event


def _chunk(memory, base, context, denied, priv, iova):
    """Return pa and event, before CD.A and CD.R, of one chunk."""
    pa = np.zeros(len(iova), U64)
    event = np.full(len(iova), F_TRANSLATION, np.uint8)
    upper = bit(iova, 55) if len(context.halves) == 2 else np.zeros(len(iova), bool)
    for i, half in enumerate(context.halves):
        if half.epd or (half.e0pd and not priv):
            continue
        top = iova << U64(8) >> U64(8) if half.tbi else iova
        ones = ((1 << (56 if half.tbi else 64) - half.input_bits) - 1) * i
        canonical = (upper == bool(i)) & (top >> U64(half.input_bits) == U64(ones))
        if canonical.all():
            return walk(memory, base, context, half, denied, iova)
        pa[canonical], event[canonical] = walk(memory, base, context, half, denied, iova[canonical])
    return pa, event


def translate_batch(
    words, base, context, iova, pa, action, event, write=False, priv=False, instr=False
):
    """Translate an array of addresses with a decoded context.

    Parameters
    ----------
    words : ndarray of uint64
        Physical memory from base on.
    base : int
    context : walk_python.Context
    iova : ndarray of uint64
    pa : ndarray of uint64
        Written; 0 where no address came out.
    action, event : ndarray of uint8
        Written.
    write, priv, instr : bool
    """
    if context.action == ABORT:
        pa[:], action[:], event[:] = 0, ABORT, context.event
        return
    if context.action == BYPASS:
        beyond = iova >> U64(OAS_BITS) != 0
        pa[:] = np.where(beyond, U64(0), iova)
        action[:] = np.where(beyond, ABORT, BYPASS)
        event[:] = beyond * np.uint8(F_ADDR_SIZE if context.events_enabled else 0)
        return
    write, priv, instr = override(context, write, priv, instr)
    denied = permission_table(context, write, priv, instr)
    for start in range(0, len(iova), CHUNK):
        part = slice(start, start + CHUNK)
        pa[part], event[part] = _chunk(words, base, context, denied, priv, iova[part])
        faulty = event[part] != 0
        action[part] = OK
        if faulty.any():
            aborted = event[part] == F_WALK_EABT
            action[part][faulty] = context.fault_action
            action[part][aborted] = ABORT
            if not context.events_enabled:
                event[part] = 0
            elif not context.record:
                event[part][~aborted] = 0
