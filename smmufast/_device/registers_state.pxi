"""A saved state as bytes: a header, JSON, the state of the caches, a checksum."""

from smmufast._engine.tlb cimport Caches

import json
import struct
from operator import attrgetter
from dataclasses import fields
from zlib import crc32

from smmufast._arguments import in_words, must_be
from smmufast._engine.tlb import CACHES as _CACHES
from smmufast.features import Features
from smmufast.why import Why


cdef object STATE_HEADER = struct.Struct("<8sII")  # mark, version, size of the JSON
cdef bytes STATE_MARK = b"smmufast"
cdef int STATE_VERSION = 2
cdef tuple STATE_1 = ("features", "ignore_s2ptw", "registers", "placed", "atc_failed", "last_stag",
                      "stalls", "warnings", "caches")  # of version 1
cdef tuple STATE = (*STATE_1, "wired")
cdef tuple QUEUES = ("CMDQ", "EVENTQ", "PRIQ")
cdef tuple FEATURES = tuple([field.name for field in fields(Features)])
cdef tuple ID_REGISTERS = ("idr0", "idr1", "idr3", "idr5", "aidr")  # Features.from_idr()
cdef tuple REGISTERS = tuple(
    [name for name in WHOLE if name not in READ_ONLY or name == "GERROR"])
cdef dict STALL = {"sid": 0xFFFFFFFF, "ssid": 0xFFFFFFFF, "iova": 0xFFFFFFFFFFFFFFFF, "access": 7,
                   "recorded": 1, "outcome": None}
cdef dict OUTCOME = {
    "pa": 0xFFFFFFFFFFFFFFFF, "ipa": 0xFFFFFFFFFFFFFFFF, "action": 5, "event": 0xFF,
    "fault": 0xFF, "perm": 0x3F, "perm_s1": 0x3F, "level": 4, "page_lg2": 63, "attr": 0xFF,
    "sh": 3, "stage": 3, "asid": 0xFFFF, "vmid": 0xFFFF, "stag": 0xFFFF, "ng": 1, "contiguous": 1,
    "why": 0xFFFF, "record": None,
}  # the largest value of each member


cdef frozenset REASONS = frozenset(Why)


cdef object state_error(str text):
    return ValueError(f"state: {text}")


cdef object saved_number(str what, value, last, first=0):
    """A number of a state, once it is one that can be."""
    if type(value) is not int:
        raise state_error(must_be(what, "a number", type(value)))
    if not first <= value <= last:
        raise state_error(must_be(what, f"{first} to {last:#x}", value))
    return value


cdef dict saved_dict(str what, value, names):
    """An object of a state, once it has the members it must have."""
    if type(value) is not dict:
        raise state_error(must_be(what, "an object", type(value)))
    for name in names:
        if name not in value:
            raise state_error(f"{what}: {name} is missing")
    for name in value:
        if name not in names:
            raise state_error(f"{what}: {name[:40]!r} is unknown")
    return value


cdef list saved_list(str what, value, n=None):
    """A list of a state; of n items."""
    if type(value) is not list or n is not None and len(value) != n:
        raise state_error(in_words(
            what, f"a list{'' if n is None else f' of {n}'}",
            f"one of {len(value)}" if type(value) is list else type(value).__name__))
    return value


cdef dict state_of_1(parsed):
    """A state of version 1 as one of version 2.

    That version had wires which a message kept quiet: they are there from now on.  It had
    PRIQ_IRQ_CFG2.LO where there are no messages, which is RES0 (6.3.36).
    """
    state = saved_dict("all", parsed, STATE_1)
    codes, registers = state["features"], state["registers"]
    if type(codes) is dict and type(registers) is dict and codes.get("msi") == 0:
        registers["PRIQ_IRQ_CFG2"] = 0
    return state | {"wired": 1}


cdef tuple state_parts(state):
    """(the JSON's object, the bytes of the caches) of a state that is whole."""
    try:
        data = bytes(memoryview(state))
    except TypeError:
        raise TypeError(must_be("state", "bytes", type(state))) from None
    if len(data) < STATE_HEADER.size + 4 or data[:8] != STATE_MARK:
        raise ValueError("state: not one that save() made")
    _, version, size = STATE_HEADER.unpack_from(data)
    if not 1 <= version <= STATE_VERSION:
        raise ValueError(must_be("state", f"of version 1 or {STATE_VERSION}", version))
    last = len(data) - 4
    if crc32(data[:last]) != int.from_bytes(data[last:], "little"):
        raise ValueError("state: the checksum is wrong: it is damaged or not whole")
    end = STATE_HEADER.size + size
    if end > last:
        raise ValueError(f"state: {size} bytes of JSON announced; it ends too early")
    try:
        parsed = json.loads(data[STATE_HEADER.size:end])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"state: the JSON cannot be read: {error}") from None
    if version == 1:
        parsed = state_of_1(parsed)
    return saved_dict("all", parsed, STATE), data[end:last]


cdef object id_registers_of = attrgetter(*ID_REGISTERS)
cdef object fields_of = attrgetter(*FEATURES)


cdef object features_saved(features):
    """Features as a state has them: codes, or the ID registers of those that contradict."""
    if features.contradictions:
        return list(id_registers_of(features))
    return dict(zip(FEATURES, fields_of(features), strict=True))


cdef object saved_features(saved):
    """The Features of a state."""
    if type(saved) is list:
        for word in saved_list("features", saved, len(ID_REGISTERS)):
            saved_number("features", word, 0xFFFFFFFF)
    else:
        saved_dict("features", saved, FEATURES)
    try:
        return Features.from_idr(*saved) if type(saved) is list else Features(**saved)
    except (TypeError, ValueError) as error:
        raise state_error(f"features: {error}") from None


cdef object saved_caches(saved, bytes contents):
    """The Caches of a state, None without."""
    if saved is None:
        if contents:
            raise state_error(f"caches: {len(contents)} bytes without a geometry")
        return None
    saved_dict("caches", saved, ("geometries", "nested"))
    given = []
    for each in saved_list("caches", saved["geometries"], len(_CACHES)):
        given.append(None if each is None else tuple(saved_list("caches", each, 4)))
    for each in given:
        if each is not None and tuple(map(type, each)) != (int, int, str, int):
            raise state_error(must_be("caches", "geometries of sets, ways, policy, seed", each))
    if type(saved["nested"]) is not str:
        raise state_error(must_be("nested of caches", "a string", type(saved["nested"])))
    try:
        caches = Caches(**dict(zip(_CACHES, given, strict=True)), nested=saved["nested"])
        caches.__setstate__(contents)
    except (TypeError, ValueError) as error:
        raise state_error(f"caches: {error}") from None
    return caches
