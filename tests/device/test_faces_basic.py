"""The faces of a Smmu: what they take, what they refuse and how, what they give."""

import contextlib
import copy
import enum
import pickle
import sys
import threading

import numpy as np
import pytest
import small
from ptwriter import encode_cd, encode_ste, leaf_descriptor, table_descriptor
from small import BASE, Request

from smmufast import (
    ACTIONS,
    COLUMNS,
    NO_SUBSTREAM,
    Caches,
    ExternalAbort,
    Fault,
    Features,
    Memory,
    Perm,
    Smmu,
    faults,
    layout,
    modelled,
)

PAGES = np.array([small.RW, small.RO, small.UNMAPPED, small.RUN], np.uint64)
PAS = [0x4000_1000, 0x4000_5000, 0, 0x4000_9000]


@pytest.fixture
def smmu():
    return small.system()[0]


# --- translate and its results ---


@pytest.mark.rule("S3.3-1", "S3.3.2-19", "S3.4.2-1", "S3.10.1-1")
@pytest.mark.parametrize("request_", small.PHYSICAL, ids=str)
def test_translate_gives_the_address_that_the_tables_say(smmu, request_):
    result = smmu.translate(request_.sid, request_.iova, **request_.access)
    assert result
    assert result.pa == small.PHYSICAL[request_]
    assert result.event is None
    assert result.fault is None
    found = (result.sid, result.ssid, result.iova)
    assert found == (request_.sid, request_.ssid, request_.iova)
    assert result.write == request_.write
    assert smmu.pa(request_.sid, request_.iova, **request_.access) == result.pa


@pytest.mark.parametrize("number", small.EVENTS)
def test_translate_gives_the_fault_of_each_kind(smmu, number):
    request = small.EVENTS[number]
    result = smmu.translate(request.sid, request.iova, **request.access)
    assert not result
    assert result.pa is None
    assert result.action == "abort"
    assert (result.level, result.page_size, result.page_lg2) == (None, None, None)
    assert (result.memory_type, result.is_global, result.contiguous) == (None, None, None)
    if number == 0:
        assert result.fault is None
        assert result.event is None
    else:
        assert result.event == result.fault
        assert result.event.number == number
        assert result.event.sid == request.sid
        assert len(result.event.record) == 32


def test_a_page_says_all_about_itself(smmu):
    result = smmu.translate(small.STAGE1, small.RO + 8)
    assert (result.level, result.page_lg2, result.page_size) == (3, 12, 4096)
    assert result.perm == Perm.UR | Perm.UX | Perm.PR | Perm.PX
    assert (result.attr, result.memory_type) == (0x44, "Normal-iNC-oNC")
    assert result.shareability == 2
    assert (result.asid, result.is_global, result.contiguous) == (7, False, False)
    block = smmu.translate(small.STAGE1, small.BLOCK)
    assert (block.level, block.page_lg2, block.page_size) == (2, 21, 1 << 21)
    assert (block.attr, block.memory_type) == (0xFF, "Normal-iWB-RA-WA-oWB-RA-WA")
    assert (block.shareability, block.is_global) == (0, True)
    assert smmu.translate(small.STAGE1, small.RUN + 0x2000).contiguous is True


@pytest.mark.parametrize(
    ("level", "lg2"), [(3, 12), (2, 21), (1, 30), (0, 39)]
)
def test_the_size_of_a_page_is_in_bytes_however_large(smmu, level, lg2):
    walk = smmu.start_walk(0, 0x123)
    walk.supply(encode_ste(v=1, config=5))
    walk.supply(encode_cd(v=1, aa64=1, a=1, r=1, t0sz=16, epd1=1, ips=6, ds=1))
    for _ in range(level):
        walk.supply(table_descriptor(12, 0x1000))
    walk.supply(leaf_descriptor(12, level, 1 << 50, ds=True, ap=1))
    assert (walk.result.level, walk.result.page_lg2) == (level, lg2)
    assert walk.result.page_size == 2**lg2
    assert walk.result.pa == 1 << 50 | 0x123


def test_what_is_not_translated_says_so(smmu):
    result = smmu.translate(small.BYPASSED, 0x1234)
    assert (result.action, result.pa, result.perm) == ("bypass", 0x1234, Perm(0x3F))
    assert (result.level, result.page_lg2, result.page_size) == (None, None, None)
    assert (result.asid, result.is_global, result.contiguous) == (None, None, None)
    disabled, _ = small.system(cr0=0)
    result = disabled.translate(small.STAGE1, 0x1234)
    assert (result.action, result.pa, result.perm) == ("disabled", 0x1234, Perm(0x3F))


def test_a_permission_fault_says_what_is_permitted(smmu):
    result = smmu.translate(small.STAGE1, small.RO, write=True)
    assert result.event.name == "F_PERMISSION"
    assert result.perm == Perm.UR | Perm.UX | Perm.PR | Perm.PX
    assert smmu.translate(small.STAGE1, small.UNMAPPED).perm == Perm(0)


def test_a_fault_without_a_record_is_a_fault_all_the_same(smmu):
    result = smmu.translate(small.SILENT, small.UNMAPPED)
    assert not result
    assert result.action == "raz_wi"
    assert result.event is None
    assert result.fault.name == "F_TRANSLATION"
    off, _ = small.system(cr0=1)
    result = off.translate(small.STAGE1, small.UNMAPPED)
    assert (result.action, result.event, result.fault.name) == ("abort", None, "F_TRANSLATION")
    quiet, _ = small.system(cr2=0)
    result = quiet.translate(small.BEYOND_TABLE, 0)
    assert (result.action, result.event, result.fault.name) == ("abort", None, "C_BAD_STREAMID")


def test_actions_are_those_of_the_batch(smmu):
    for request, row in zip(small.REQUESTS, small.batch_rows(smmu), strict=True):
        result = smmu.translate(request.sid, request.iova, **request.access)
        assert result.action == ACTIONS[row[1]]


@pytest.mark.parametrize("registers", ["linear", "two-level"])
def test_a_trace_lists_every_fetch_and_what_it_read(registers):
    regs = small.registers() if registers == "linear" else small.registers_two_level()
    smmu, image = small.system(**regs)
    result = smmu.translate(small.TWO_LEVEL_CD, small.RO, ssid=0x41, trace=True)
    first = [] if registers == "linear" else [("L1STD", None, small.L1STD, 8)]
    assert [(f.kind, f.level, f.address - BASE, f.size) for f in result.fetches] == [
        *first,
        ("STE", None, small.STES + 64 * small.TWO_LEVEL_CD, 64),
        ("L1CD", None, small.L1CDS + 8, 8),
        ("CD", None, small.CD_LEAF + 64, 64),
        ("TT", 1, small.LEVEL1, 8),
        ("TT", 2, small.LEVEL2, 8),
        ("TT", 3, small.LEVEL3 + 8 * (small.RO >> 12), 8),
    ]
    for fetch in result.fetches:
        offset = fetch.address - BASE
        assert fetch.data == bytes(image[offset : offset + fetch.size])
        assert fetch.value == int.from_bytes(fetch.data, "little")


def test_a_trace_ends_where_the_translation_ends(smmu):
    kinds = {
        number: [f.kind for f in smmu.translate(r.sid, r.iova, **r.access, trace=True).fetches]
        for number, r in small.EVENTS.items()
    }
    assert kinds == {
        0x00: ["STE"], 0x02: [], 0x03: ["STE"], 0x04: ["STE"], 0x06: ["STE"], 0x08: ["STE"],
        0x09: ["STE", "CD"], 0x0A: ["STE", "CD"], 0x0B: ["STE", "CD", "TT"],
        0x10: ["STE", "CD", "TT", "TT", "TT"], 0x11: ["STE", "CD", "TT", "TT", "TT"],
        0x12: ["STE", "CD", "TT", "TT", "TT"], 0x13: ["STE", "CD", "TT", "TT", "TT"],
    }  # fmt: skip


def test_without_trace_there_is_none(smmu):
    assert smmu.translate(1, 0).fetches is None
    assert smmu.translate(1, 0, trace=False).fetches is None
    assert smmu.translate(1, 0, trace=True).fetches


def test_trace_changes_nothing_else(smmu):
    plain = [small.row(r) for r in small.translate_each(smmu)]
    assert [small.row(r) for r in small.translate_each(smmu, trace=True)] == plain


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (Request(1, 0x1234), "<Result ok sid=0x1 iova=0x1234 pa=0x40001234>"),
        (Request(3, 0x1000, ssid=1), "<Result ok sid=0x3 ssid=0x1 iova=0x1000 pa=0x40001000>"),
        (Request(1, 0x4000), "<Result abort sid=0x1 iova=0x4000 F_TRANSLATION>"),
        (Request(9, 0x4000), "<Result raz_wi sid=0x9 iova=0x4000 F_TRANSLATION (not recorded)>"),
        (Request(0, 0), "<Result abort sid=0x0 iova=0x0>"),
    ],
)
def test_the_text_of_a_result(smmu, request_, text):
    assert repr(smmu.translate(request_.sid, request_.iova, **request_.access)) == text


@pytest.mark.parametrize("number", [n for n in small.EVENTS if n])
def test_the_text_of_an_event_names_it_and_its_stream(smmu, number):
    request = small.EVENTS[number]
    event = smmu.translate(request.sid, request.iova, **request.access).event
    assert repr(event).startswith(f"<Event {event.name} sid={request.sid:#x}")
    assert str(event)


# --- pa ---


@pytest.mark.parametrize("number", faults.FAULTS)
def test_pa_raises_the_exception_of_each_fault(smmu, number):
    request = small.EVENTS[number]
    with pytest.raises(faults.FAULTS[number]) as caught:
        smmu.pa(request.sid, request.iova, **request.access)
    error = caught.value
    assert type(error) is faults.FAULTS[number]
    assert isinstance(error, Fault)
    again = smmu.translate(request.sid, request.iova, **request.access)
    assert small.row(error.result) == small.row(again)
    name = again.event.name if number else "aborted without an event"
    ssid = "" if request.ssid is None else f" ssid {request.ssid:#x}"
    where = f"sid {request.sid:#x}{ssid} iova {request.iova:#x}"
    assert str(error) == f"{name}: {where}: {again.why.sentence()}"


def test_every_event_of_stage_1_has_an_exception_of_its_own():
    kinds = list(faults.FAULTS.values())
    assert len(set(kinds)) == len(kinds) == 13
    assert set(small.EVENTS) == set(faults.FAULTS)


@pytest.mark.parametrize(
    ("number", "builtin"), [(0x10, LookupError), (0x13, PermissionError), (0x04, ValueError)]
)
def test_a_fault_is_also_caught_as_the_builtin_error_of_its_kind(smmu, number, builtin):
    request = small.EVENTS[number]
    with pytest.raises(builtin):
        smmu.pa(request.sid, request.iova, **request.access)


def test_a_fault_that_is_not_recorded_is_raised_too(smmu):
    with pytest.raises(faults.TranslationFault) as caught:
        smmu.pa(small.SILENT, small.UNMAPPED)
    assert caught.value.result.event is None
    disabled, _ = small.system(cr0=0, gbpa=1 << 20)
    with pytest.raises(faults.SilentAbort):
        disabled.pa(1, 0)


# --- arguments of the scalar faces ---

SCALAR_FACES = {
    "translate": lambda smmu, sid, iova, **more: smmu.translate(sid, iova, **more),
    "pa": lambda smmu, sid, iova, **more: smmu.pa(sid, iova, **more),
    "translate_range": lambda smmu, sid, iova, **more: smmu.translate_range(sid, iova, 8, **more),
    "start_walk": lambda smmu, sid, iova, **more: smmu.start_walk(sid, iova, **more),
}
every_scalar_face = pytest.mark.parametrize("face", SCALAR_FACES.values(), ids=SCALAR_FACES)

ARGUMENTS = {
    "sid": ((1 << 32) - 1, lambda face, smmu, v: face(smmu, v, small.RW)),
    "iova": ((1 << 64) - 1, lambda face, smmu, v: face(smmu, 1, v)),
    "ssid": ((1 << 20) - 1, lambda face, smmu, v: face(smmu, 1, small.RW, ssid=v)),
}
every_argument = pytest.mark.parametrize(
    ("name", "most", "call"), [(n, *a) for n, a in ARGUMENTS.items()], ids=ARGUMENTS
)


@every_scalar_face
@every_argument
def test_a_number_out_of_range_is_named_with_what_is_allowed(smmu, face, name, most, call):
    for bad in (-1, most + 1, -(1 << 70), 1 << 70):
        with pytest.raises(ValueError, match=rf"^{name} must be 0 to 0x\w+, not (-1|{bad:#x})$"):
            call(face, smmu, bad)


@every_scalar_face
@every_argument
@pytest.mark.parametrize(
    "bad", [1.0, np.float64(1), "1", b"1", [1], (1,), {}, object(), np.array([1, 2]), 1j]
)
def test_what_is_no_integer_is_named(smmu, face, name, most, call, bad):
    with pytest.raises(TypeError, match=f"^{name} must be an integer, not {type(bad).__name__}"):
        call(face, smmu, bad)


class Sid(enum.IntEnum):
    NIC = 1


class Index:
    def __index__(self):
        return 1


@every_scalar_face
@pytest.mark.parametrize(
    "one", [np.uint8(1), np.int64(1), np.uint64(1), Sid.NIC, Index(), True, np.array(1)]
)
def test_whatever_is_an_integer_will_do(smmu, face, one):
    assert face(smmu, one, small.RW) is not None
    assert smmu.translate(one, small.RW).pa == 0x4000_1000
    assert smmu.translate(small.SUBSTREAMS, small.RW, ssid=one).pa == 0x4000_1000
    assert smmu.translate(small.BYPASSED, one).pa == 1


@every_scalar_face
def test_flags_are_keywords(smmu, face):
    with pytest.raises(TypeError):
        smmu.translate(1, small.RW, None, True)
    for name in ("write", "priv", "instr"):
        for value in (True, False, 0, 1, np.True_, np.False_, None):
            result = smmu.translate(1, small.RW, **{name: value})
            assert result.write == (name == "write" and bool(value))


def test_flags_say_what_the_device_does(smmu):
    for number, write, priv, instr in ((i, bool(i & 1), bool(i & 2), bool(i & 4))
                                       for i in range(8)):  # fmt: skip
        access = {"write": write, "priv": priv, "instr": instr}
        fields = smmu.translate(1, small.UNMAPPED, **access).event.fields
        assert fields["RnW"] == (not write), number
        assert fields["PnU"] == priv
        assert fields["InD"] == (instr and not write)


@pytest.mark.rule("S3.4-1")
def test_the_largest_arguments_are_taken(smmu):
    assert smmu.translate(0xFFFF_FFFF, (1 << 64) - 1, ssid=0xFFFFF).event.name == "C_BAD_STREAMID"


# --- the constructor ---


@pytest.mark.parametrize(
    ("name", "bits"),
    [("strtab_base", 64), ("strtab_base_cfg", 32), ("cr0", 32), ("cr2", 32), ("gbpa", 32)],
)
def test_registers_are_checked_and_can_be_read(name, bits):
    memory = Memory()
    for bad in (-1, 1 << bits):
        with pytest.raises(ValueError, match=rf"^{name} must be 0 to 0x\w+, not (-1|{bad:#x})"):
            Smmu(memory, **{name: bad})
    for bad in (1.0, "1", None):
        wanted = f"^{name} must be an integer, not {type(bad).__name__}"
        with pytest.raises(TypeError, match=wanted):
            Smmu(memory, **{name: bad})
    most = Smmu(memory, **{name: (1 << bits) - 1})
    register = layout.REGISTERS[name.upper()]
    fields = sum(field.mask for field in register.fields)
    assert getattr(most, name) & ~fields == 0
    assert {warning.register for warning in most.warnings} >= {register.name}
    with pytest.raises(AttributeError):
        setattr(Smmu(memory), name, 0)


def test_the_default_registers_are_those_of_the_documentation():
    smmu = Smmu(Memory())
    assert (smmu.cr0, smmu.cr2, smmu.gbpa) == (0b101, 0b10, 0x1000)
    assert (smmu.strtab_base, smmu.strtab_base_cfg) == (0, 0)
    assert smmu.features == Features()


def test_a_smmu_needs_a_memory_and_features():
    with pytest.raises(TypeError, match="memory"):
        Smmu(None)
    with pytest.raises(TypeError):
        Smmu()
    with pytest.raises(TypeError, match="memory"):
        Smmu(bytearray(8))
    with pytest.raises(TypeError, match="features must be Features or None, not dict"):
        Smmu(Memory(), {})
    with pytest.raises(TypeError):
        Smmu(Memory(), Features(), 0x1000)


@pytest.mark.rule("S6.3.2-6")
@pytest.mark.parametrize(
    "asked",
    [{"ttf": 3}, {"d128": 1}, {"atos": 1}, {"ttf": 3, "mpam": 1}],
    ids=str,
)  # fmt: skip
def test_a_feature_that_is_not_modelled_is_refused_by_name(asked):
    features = Features(**asked)
    with pytest.raises(ValueError, match=r"^features must be what this version models") as caught:
        Smmu(Memory(), features)
    for name, value in asked.items():
        assert f"{name}={value}" in str(caught.value)
    fewer, taken = modelled(features)
    assert asked.items() <= taken.items()  # with what depends on it
    assert Smmu(Memory(), fewer).features == fewer
    assert modelled(fewer) == (fewer, {})


@pytest.mark.parametrize("kind", ["Smmu", "Result", "Walk", "Segments"])
def test_an_object_that_was_never_initialised_does_no_harm(smmu, kind):
    import smmufast

    thing = getattr(smmufast, kind)
    try:
        made = thing.__new__(thing)
    except TypeError:
        return  # refused at once, which is as good
    calls = {
        "Smmu": ("translate", "pa", "translate_range", "start_walk", "translate_batch"),
        "Walk": ("supply",),
    }
    arguments = {"translate_range": (1, 2, 3), "supply": (b"",), "translate_batch": ([1], 2)}
    for name in calls.get(kind, ()):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            getattr(made, name)(*arguments.get(name, (1, 2)))
    assert repr(type(made))


@pytest.mark.parametrize("kind", ["Result", "Walk", "Segments"])
def test_results_are_made_by_a_smmu_only(kind):
    import smmufast

    with pytest.raises(TypeError, match="made by Smmu"):
        getattr(smmufast, kind)()


def test_a_smmu_is_initialised_once(smmu):
    with contextlib.suppress(RuntimeError, TypeError):
        smmu.__init__(Memory())
    assert smmu.pa(1, small.RW) == 0x4000_1000


@pytest.mark.rule("S2.10-1", "S3.2-5")
def test_several_smmus_live_side_by_side():
    one, image = small.system()
    other = Smmu(one.memory, **small.registers_two_level())
    third, _ = small.system(image=bytearray(image), cr0=0)
    assert one.pa(1, small.RW) == other.pa(1, small.RW) == 0x4000_1000
    assert third.pa(1, small.RW) == small.RW


def test_the_text_of_a_smmu_says_its_registers(smmu):
    text = repr(smmu)
    assert "strtab_base=0x80000000" in text
    assert "cr0=0x5" in text
    assert "Features(" in text


# --- pickling ---


def made_things():
    smmu, _ = small.system()
    return {
        "Result": smmu.translate(1, small.RW),
        "TracedResult": smmu.translate(1, small.RW, trace=True),
        "Walk": smmu.start_walk(1, small.RW),
        "Segments": smmu.translate_range(1, small.RW, 8),
    }


@pytest.mark.parametrize("kind", made_things())
@pytest.mark.parametrize(
    "attempt", [lambda one: pickle.loads(pickle.dumps(one)), copy.copy, copy.deepcopy])
def test_what_a_translation_gives_is_pickled_and_copied(kind, attempt):
    one = made_things()[kind]
    assert repr(attempt(one)) == repr(one)


@pytest.mark.parametrize("number", [n for n in small.EVENTS if n])
def test_events_can_be_pickled_and_compared(smmu, number):
    request = small.EVENTS[number]
    event = smmu.translate(request.sid, request.iova, **request.access).event
    twin = pickle.loads(pickle.dumps(event))
    assert twin == event
    assert hash(twin) == hash(event)
    assert twin.fields == event.fields


# --- translate_batch: inputs ---


def test_a_batch_gives_what_single_translations_give(smmu):
    assert small.batch_rows(smmu) == [small.row(r) for r in small.translate_each(smmu)]


def flags(request):
    return {"write": request.write, "priv": request.priv, "instr": request.instr}


@pytest.mark.parametrize("caches", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4, 5, 33, 64, 65])
def test_a_batch_of_any_length_gives_what_single_translations_give(n, caches):
    smmu = small.system(caches=Caches.server() if caches else None)[0]
    dtype = np.dtype([(name, COLUMNS[name]) for name in small.ALL])
    checked = 0
    for kind in sorted({tuple(flags(r).values()) for r in small.REQUESTS}):
        alike = [r for r in small.REQUESTS if tuple(flags(r).values()) == kind]
        alike *= -(-n // len(alike))
        for start in range(0, len(alike) - n + 1, n):
            requests = alike[start : start + n]
            expected = [small.row(r) for r in small.translate_each(smmu, requests)]
            given = small.columns(requests) | flags(requests[0])
            out = np.full(n, 0x55, np.uint8).repeat(dtype.itemsize).view(dtype)
            for _ in range(2):  # the second time its dtype is known
                assert smmu.translate_batch(**given, out=out) is out
                assert small.rows(out) == expected
                out = np.zeros(n, dtype)
            usual = {name: np.full(n, 0x55, COLUMNS[name]) for name in ("pa", "action", "event")}
            smmu.translate_batch(**given, out=usual)
            assert list(zip(*usual.values(), strict=True)) == [row[:3] for row in expected]
            checked += n
    assert checked >= n


def test_scalars_are_repeated(smmu):
    assert smmu.translate_batch(1, PAGES)["pa"].tolist() == PAS
    assert smmu.translate_batch([1, 2, 9], small.RW)["pa"].tolist() == [
        0x4000_1000, small.RW, 0x4000_1000
    ]  # fmt: skip
    found = smmu.translate_batch(small.SUBSTREAMS, small.RW, ssid=[0, 1, 4, NO_SUBSTREAM])
    assert found["pa"].tolist() == [0x4000_1000, 0x4000_1000, 0, small.RW]
    found = smmu.translate_batch(1, small.RO, write=[True, False])
    assert found["event"].tolist() == [0x13, 0]
    assert smmu.translate_batch([7], 0x1000, ssid=None, write=True)["event"].tolist() == [0x0B]


INPUTS = {
    "list": list,
    "tuple": tuple,
    "uint64": lambda a: np.array(a, np.uint64),
    "int64": lambda a: np.array(a, np.int64),
    "uint32": lambda a: np.array(a, np.uint32),
    "int16": lambda a: np.array(a, np.int16),
    "big-endian": lambda a: np.array(a, ">u8"),
    "every other": lambda a: np.array([a, a], np.uint64).T.reshape(-1)[::2],
    "backwards": lambda a: np.array(a[::-1], np.uint64)[::-1],
    "unaligned": lambda a: np.frombuffer(
        b"x" + np.array(a, np.uint64).tobytes(), np.uint8
    )[1:].view(np.uint64),
    "a field": lambda a: np.array([(1, v) for v in a], [("x", "u1"), ("v", "u8")])["v"],
    "read-only": lambda a: np.frombuffer(np.array(a, np.uint64).tobytes(), np.uint64),
    "memoryview": lambda a: memoryview(np.array(a, np.uint64)),
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_inputs_may_be_anything_like_an_array_of_integers(smmu, make):
    assert smmu.translate_batch(1, make(PAGES.tolist()))["pa"].tolist() == PAS
    assert smmu.translate_batch(make([1, 2, 1]), small.RW)["pa"].tolist() == [
        0x4000_1000, small.RW, 0x4000_1000
    ]  # fmt: skip
    found = smmu.translate_batch(small.NEEDS_SSID, small.RW, ssid=make([1, 3]))
    assert found["pa"].tolist() == [0x4000_1000] * 2


def test_strides_of_uint32_inputs_are_honoured(smmu):
    sids = np.array([1, 99, 2, 99, 1, 99], np.uint32)[::2]
    ssids = np.array([NO_SUBSTREAM, 5] * 3, np.uint32)[::-2][:3]
    assert smmu.translate_batch(sids, small.RW, ssid=np.full(3, NO_SUBSTREAM, np.uint32))[
        "pa"
    ].tolist() == [0x4000_1000, small.RW, 0x4000_1000]
    assert smmu.translate_batch(1, [small.RW] * 3, ssid=ssids)["event"].tolist() == [8, 8, 8]
    flags = np.array([True, False, False, False])[::3]
    assert smmu.translate_batch(1, [small.RO] * 2, write=flags)["event"].tolist() == [0x13, 0]


@pytest.mark.parametrize("flag", ["write", "priv", "instr"])
@pytest.mark.parametrize("n", [1, 5, 4095, 4096, 4097, 9000])
def test_flags_may_be_arrays_of_any_length(smmu, flag, n):
    values = np.arange(n) % 3 == 0
    found = smmu.translate_batch(1, np.full(n, small.UNMAPPED, np.uint64), columns=["record"],
                                 **{flag: values})["record"]  # fmt: skip
    records = np.frombuffer(found.tobytes(), np.uint8).reshape(n, 32)
    bit = {"write": 3, "priv": 1, "instr": 2}[flag]
    told = records[:, 12] >> bit & 1
    assert (told == (~values if flag == "write" else values)).all()


@pytest.mark.parametrize("value", [True, False, np.True_, np.False_, 1, 0])
def test_flags_may_be_scalars(smmu, value):
    found = smmu.translate_batch(1, [small.RO, small.RW], write=value)
    assert found["event"].tolist() == [0x13 if value else 0, 0]


@pytest.mark.parametrize("sid", [[], np.empty(0, np.uint32)], ids=["list", "array"])
@pytest.mark.parametrize("iova", [np.empty(0, np.uint64), 0], ids=["array", "scalar"])
def test_a_batch_of_nothing_is_an_empty_array(smmu, sid, iova):
    sid = np.asarray(sid, np.uint32)
    found = smmu.translate_batch(sid, iova)
    assert found.shape == (0,)
    assert found.dtype.names == ("pa", "action", "event")
    out = np.empty(0, [("pa", "u8")])
    assert smmu.translate_batch(sid, iova, out=out) is out
    assert smmu.translate_batch(sid, iova, write=np.empty(0, bool)).shape == (0,)


BAD_BATCHES = [
    ({"sid": [-1]}, ValueError, r"^sid\[0\] must be 0 to 0xffffffff, not -1$"),
    ({"sid": [1 << 32]}, ValueError, r"^sid\[0\] must be .*, not 0x100000000$"),
    ({"sid": np.array([5, -7])}, ValueError, r"^sid\[1\] must be .*, not -7$"),
    ({"sid": -1}, ValueError, "^sid must be 0 to 0xffffffff, not -1"),
    ({"sid": 1 << 32}, ValueError, "^sid must be 0 to 0xffffffff, not 0x100000000"),
    ({"iova": [-1]}, ValueError, r"^iova\[0\] must be .*, not -1$"),
    ({"iova": [1 << 64]}, ValueError, "^iova must be .*, not 0x10000000000000000"),
    ({"sid": [1], "iova": 1 << 64}, ValueError, "^iova must be .*, not 0x10000000000000000"),
    ({"sid": [1], "iova": -1}, ValueError, "^iova must be 0 to 0xffffffffffffffff, not -1"),
    ({"ssid": [1 << 20]}, ValueError, r"^ssid\[0\] must be 0 to 0xfffff, .*, not 0x100000$"),
    ({"ssid": np.array([NO_SUBSTREAM, NO_SUBSTREAM - 1], np.uint32), "iova": [0, 0]}, ValueError,
     r"^ssid\[1\] must be 0 to 0xfffff, or 0xffffffff for none, not 0xfffffffe$"),
    ({"ssid": [-1]}, ValueError, r"^ssid\[0\] must be .*, not -1$"),
    ({"ssid": 1 << 20}, ValueError, "^ssid must be 0 to 0xfffff, not 0x100000"),
    ({"ssid": 0xFFFF_FFFE}, ValueError, "^ssid must be 0 to 0xfffff, not 0xfffffffe"),
    ({"iova": [1.0]}, TypeError, "^iova must be an integer, not float"),
    ({"sid": ["1"]}, TypeError, r"^sid\.dtype must be uint32 or another integer, not <U1$"),
    ({"sid": [1], "iova": 1.0}, TypeError, "^iova must be an integer, not float"),
    ({"sid": "1"}, TypeError, "^sid must be an integer, not str"),
    ({"sid": None}, TypeError, "^sid must be an integer, not NoneType"),
    ({"iova": [[1, 2]]}, ValueError, r"^iova\.ndim must be 1, not 2$"),
    ({"sid": [1, 2]}, ValueError, r"^len\((sid|iova)\) must be . as of the others, not .$"),
    ({"ssid": [1, 2]}, ValueError, r"^len\(ssid\) must be 1 as of the others, not 2$"),
    ({"write": [True, False]}, ValueError, r"^len\(write\) must be 1 as of the others, not 2$"),
    ({"write": [[True]]}, ValueError, r"^write\.ndim must be 1, not 2$"),
    ({"write": [2]}, ValueError, r"^write\[0\] must be 0 to 0x1, not 2$"),
    ({"priv": [1.0]}, TypeError, "^priv must be an integer, not float"),
    ({"instr": np.array([1.0])}, TypeError, r"^instr\.dtype must be bool or an.*, not float64$"),
    ({"sid": 1, "iova": 1}, ValueError, "^sid or iova must be an array .*, not both numbers$"),
    ({"sid": 1, "iova": np.uint64(1)}, ValueError, "^sid or iova must be an array .*, not"),
    ({"iova": [[1], [1, 2]]}, (ValueError, TypeError), "^iova: "),
    ({"columns": ["pa", "colour"]}, ValueError, "^each of columns must be 'pa', .*, not 'colour'"),
    ({"columns": "pa"}, TypeError, "^columns must be names, not str$"),
    ({"columns": ["pa", "pa"]}, ValueError, "^columns must be names, each once, not .*pa.*pa"),
    ({"columns": [5]}, ValueError, "^each of columns must be .*, not 5$"),
    ({"columns": 5}, TypeError, "^columns must be names, not int$"),
    ({"columns": ["pa"], "out": np.empty(1, [("pa", "u8")])}, TypeError,
     r"^columns must be None beside out, .*, not \['pa'\]$"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD_BATCHES, ids=lambda v: str(v)[:50])
def test_a_bad_argument_of_a_batch_is_named(smmu, change, error, words):
    arguments = {"sid": 1, "iova": [small.RW]} | change
    with pytest.raises(error, match=words):
        smmu.translate_batch(**arguments)
    assert smmu.translate_batch(1, [small.RW])["pa"].tolist() == [0x4000_1000]


# --- translate_batch: outputs ---


def test_the_columns_wanted_are_those_given(smmu):
    for names in (["pa"], ["record", "level"], small.ALL, ("sh", "attr", "pa"), iter(["fault"])):
        names = list(names)
        found = smmu.translate_batch(1, PAGES, columns=iter(names))
        assert list(found.dtype.names) == names
        for name in names:
            assert found.dtype[name] == COLUMNS[name]
            expected = smmu.translate_batch(1, PAGES, columns=small.ALL)[name]
            assert found[name].tolist() == expected.tolist()


def test_no_columns_at_all_is_an_array_of_the_right_length(smmu):
    assert len(smmu.translate_batch(1, PAGES, columns=[])) == len(PAGES)


def test_a_structured_out_is_filled_and_returned(smmu):
    out = np.full(4, 0x55, [("event", "u1"), ("pa", "u8"), ("level", "i1")])
    assert smmu.translate_batch(1, PAGES, out=out) is out
    assert out["pa"].tolist() == PAS
    assert out["event"].tolist() == [0, 0, 0x10, 0]
    assert out["level"].tolist() == [3, 3, 4, 3]


def test_a_dict_out_is_filled_and_returned(smmu):
    out = {"pa": np.empty(4, np.uint64), "perm": np.empty(4, np.uint8)}
    arrays = dict(out)
    assert smmu.translate_batch(1, PAGES, out=out) is out
    assert all(out[name] is arrays[name] for name in arrays)
    assert out["pa"].tolist() == PAS
    assert out["perm"].tolist()[2] == 0
    assert smmu.translate_batch(1, PAGES, out={}) == {}


@pytest.mark.parametrize("n", [1, 4])
def test_fields_of_out_are_found_where_its_dtype_has_them_now(smmu, n):
    dtype = np.dtype([("pa", "u8"), ("ipa", "u8"), ("event", "u1")])
    for names, pa in (("pa", "ipa", "event"), 0), (("ipa", "pa", "event"), 1):
        dtype.names = names
        out = np.full(n, 0x55, np.uint8).repeat(dtype.itemsize).view(dtype)
        smmu.translate_batch(1, PAGES[:n], out=out)
        assert out["pa"].tolist() == out[names[pa]].tolist() == PAS[:n]
        assert out["ipa"].tolist() == [0] * n
    # the same names elsewhere, and an array that does not fit after one that did
    wide = np.zeros(n, {"names": names, "formats": ["u8", "u8", "u1"], "offsets": [24, 8, 3]})
    smmu.translate_batch(1, PAGES[:n], out=wide)
    assert wide["pa"].tolist() == PAS[:n]
    with pytest.raises(ValueError, match=r"\.shape must be \(\d,\), not \(\d,\)"):
        smmu.translate_batch(1, PAGES[:n], out=np.zeros(n + 1, dtype))
    wide.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        smmu.translate_batch(1, PAGES[:n], out=wide)
    dtype.names = ("ipa", "other", "event")
    with pytest.raises(ValueError, match=r"^a column of out must be .*, not 'other'"):
        smmu.translate_batch(1, PAGES[:n], out=np.zeros(n, dtype))


class Rows(np.ndarray):
    """Its columns are elsewhere."""

    def __getitem__(self, name):
        return self.columns[name]


class Columns(dict):
    """Its items are others."""

    def items(self):
        return self.others.items()


def test_an_out_of_another_class_says_itself_where_its_columns_are(smmu):
    dtype = [("pa", "u8"), ("event", "u1")]
    first = np.zeros(4, dtype)
    smmu.translate_batch(1, PAGES, out=first)
    out = np.zeros(4, first.dtype).view(Rows)
    out.columns = {"pa": np.zeros(4, np.uint64), "event": np.zeros(4, np.uint8)}
    smmu.translate_batch(1, PAGES, out=out)
    assert out.columns["pa"].tolist() == PAS
    assert out.view(np.ndarray)["pa"].tolist() == [0] * 4
    smmu.translate_batch(1, PAGES, out=first)
    assert first["pa"].tolist() == PAS
    out = Columns(pa=np.zeros(4, np.uint64))
    out.others = {"pa": np.zeros(4, np.uint64)}
    smmu.translate_batch(1, PAGES, out=out)
    assert out.others["pa"].tolist() == PAS
    assert out["pa"].tolist() == [0] * 4


def test_a_name_in_out_need_not_be_the_same_object(smmu):
    name = "".join(["p", "a"])
    assert name is not sys.intern("pa")
    out = {name: np.zeros(4, np.uint64)}
    smmu.translate_batch(1, PAGES, out=out)
    assert out["pa"].tolist() == PAS


def sentinel(n):
    return np.full(n, 0x5555_5555_5555_5555, np.uint64)


def test_outs_with_any_stride_are_filled_and_nothing_else_is(smmu):
    wide = sentinel(12)
    smmu.translate_batch(1, PAGES, out={"pa": wide[1::3]})
    assert wide[1::3].tolist() == PAS
    assert wide[0::3].tolist() == wide[2::3].tolist() == sentinel(4).tolist()
    back = sentinel(6)
    smmu.translate_batch(1, PAGES, out={"pa": back[4:0:-1]})
    assert back[1:5].tolist() == PAS[::-1]
    assert back[0] == back[5] == sentinel(1)[0]
    columns = np.zeros((4, 3), np.uint8)
    smmu.translate_batch(1, PAGES, out={"event": columns[:, 1]})
    assert columns.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0x10, 0], [0, 0, 0]]


@pytest.mark.parametrize("step", [1, 2, -1, -2])
def test_packed_rows_at_odd_addresses_are_filled(smmu, step):
    row = np.dtype([("x", "u1"), ("pa", "u8"), ("record", "V32"), ("action", "u1")])
    wanted = row[["pa", "record", "action"]]
    raw = np.frombuffer(bytearray(b"U" * (row.itemsize * 9 + 1)), np.uint8)[1:].view(row)
    out = raw[:8].view(wanted)[::step][:4]
    assert smmu.translate_batch(1, PAGES, out=out) is out
    assert out["pa"].tolist() == PAS
    assert out["action"].tolist() == [0, 0, 3, 0]
    records = [bytes(r) for r in out["record"].tolist()]
    assert records[0] == records[1] == records[3] == bytes(32)
    assert records[2] == smmu.translate(1, small.UNMAPPED).event.record
    assert (raw["x"] == 0x55).all()


def test_every_column_of_a_fault_and_of_a_success_is_written(smmu):
    dtype = np.dtype([(name, COLUMNS[name]) for name in small.ALL])
    expected = [small.row(r) for r in small.translate_each(smmu)]
    for fill in (0x00, 0xAA, 0xFF):
        size = dtype.itemsize * len(small.REQUESTS)
        out = np.frombuffer(bytearray([fill]) * size, dtype)
        smmu.translate_batch(**small.columns(), out=out)
        assert small.rows(out) == expected


def test_results_may_replace_their_inputs(smmu):
    iova = PAGES.copy()
    out = {"pa": iova}
    assert smmu.translate_batch(1, iova, out=out) is out
    assert iova.tolist() == PAS
    # over more than one block, with faults among them
    many = np.tile(PAGES, 1000)
    smmu.translate_batch(1, many, out={"pa": many})
    assert many.tolist() == PAS * 1000
    # ... and with flags by row
    many = np.tile(PAGES, 3000)
    smmu.translate_batch(1, many, write=np.zeros(len(many), bool), out={"pa": many})
    assert many.tolist() == PAS * 3000


def test_results_may_replace_inputs_within_rows(smmu):
    rows = np.zeros(4, [("sid", "u4"), ("pa", "u8"), ("event", "u1")])
    rows["sid"] = 1
    rows["pa"] = PAGES
    smmu.translate_batch(rows["sid"], rows["pa"], out=rows[["pa", "event"]])
    assert rows["pa"].tolist() == PAS
    assert rows["sid"].tolist() == [1] * 4


def read_only(array):
    array.flags.writeable = False
    return array


BAD_OUTS = [
    ({"pa": np.zeros(3, np.uint64)}, ValueError, r"^out\['pa'\]\.shape must be \(4,\), not \(3"),
    ({"pa": np.zeros((4, 1), np.uint64)}, ValueError, r"^out\['pa'\]\.shape must .*, not \(4, 1"),
    ({"pa": np.zeros(4, np.int64)}, TypeError, r"^out\['pa'\]\.dtype must be uint64, not int64$"),
    ({"pa": np.zeros(4, ">u8")}, TypeError, r"^out\['pa'\]\.dtype must be uint64, not >u8$"),
    ({"pa": np.zeros(4, np.float64)}, TypeError, r"^out\['pa'\]\.dtype must be .*, not float64$"),
    ({"level": np.zeros(4, np.uint8)}, TypeError, r"^out\['level'\]\.dtype must be int8, not"),
    ({"record": np.zeros(4, "V31")}, TypeError, r"^out\['record'\]\.dtype must be .*, not \|V31$"),
    ({"colour": np.zeros(4, np.uint8)}, ValueError, "^a column of out must .*, not 'colour'$"),
    ({5: np.zeros(4, np.uint8)}, ValueError, "^a column of out must be .*, not 5$"),
    ({"pa": [0] * 4}, TypeError, r"^out\['pa'\] must be a numpy array, not list$"),
    ({"pa": bytearray(32)}, TypeError, r"^out\['pa'\] must be a numpy array, not bytearray$"),
    ({"pa": read_only(np.zeros(4, np.uint64))}, ValueError, r"^out\['pa'\]: the array is read-on"),
    (np.zeros(4, np.uint64), TypeError, r"^out\.dtype must be a structured one, not uint64$"),
    (np.zeros(3, [("pa", "u8")]), ValueError, r"^out\['pa'\]\.shape must be .*, not \(3,\)"),
    (np.zeros((4, 1), [("pa", "u8")]), ValueError, r"^out\['pa'\]\.shape must be .*, not \(4, 1\)"),
    (np.zeros(4, [("pa", "u4")]), TypeError, r"^out\['pa'\]\.dtype must be .*, not uint32$"),
    (np.zeros(4, [("address", "u8")]), ValueError, "^a column of out must be .*, not 'address'$"),
    (read_only(np.zeros(4, [("pa", "u8")])), ValueError, r"^out\['pa'\]: the array is read-only"),
    ([0] * 4, TypeError, "^out must be a structured array or a dict, not list$"),
    (5, TypeError, "^out must be a structured array or a dict, not int$"),
]


@pytest.mark.parametrize(("out", "error", "words"), BAD_OUTS, ids=lambda v: str(v)[:50])
def test_an_out_that_does_not_fit_is_named_and_left_alone(smmu, out, error, words):
    before = copy.deepcopy(out)
    with pytest.raises(error, match=words):
        smmu.translate_batch(1, PAGES, out=out)
    if isinstance(out, np.ndarray):
        assert out.tobytes() == before.tobytes()


def test_a_good_column_beside_a_bad_one_is_left_alone(smmu):
    pa = sentinel(4)
    with pytest.raises(TypeError):
        smmu.translate_batch(1, PAGES, out={"pa": pa, "event": np.empty(4, np.uint16)})
    assert pa.tolist() == sentinel(4).tolist()


# --- translate_range ---


def test_a_burst_is_cut_where_physical_memory_is(smmu):
    found = smmu.translate_range(1, small.RUN + 0x800, 0x2000)
    assert found
    assert list(found) == [
        (small.RUN + 0x800, 0x4000_9800, 0x1800),
        (small.RUN + 0x2000, 0x4000_C000, 0x800),
    ]
    assert found.array.dtype.names == ("iova", "pa", "length")
    assert found.array["length"].sum() == 0x2000
    assert (found.result, found.event, len(found)) == (None, None, 2)
    assert repr(found) == "<Segments [('0x6800', '0x40009800', '0x1800'), " \
                          "('0x8000', '0x4000c000', '0x800')]>"  # fmt: skip


def test_a_burst_stops_at_the_first_fault(smmu):
    found = smmu.translate_range(1, small.RW, 0x4000, write=True)
    assert not found
    assert list(found) == [(small.RW, 0x4000_1000, 0x1000)]
    assert found.result.iova == small.RO
    assert found.event.name == "F_PERMISSION"
    assert found.event.iova == small.RO
    assert found.event.write


def test_a_burst_that_fails_at_once_has_no_segments(smmu):
    found = smmu.translate_range(1, small.UNMAPPED + 5, 10)
    assert not found
    assert (len(found), found.result.iova) == (0, small.UNMAPPED + 5)


def test_a_burst_of_nothing_asks_nothing(smmu):
    found = smmu.translate_range(1, small.UNMAPPED, 0)
    assert found
    assert list(found) == []


def test_a_burst_within_a_block_or_a_bypassed_stream_is_one_segment(smmu):
    found = smmu.translate_range(1, small.BLOCK + 5, (1 << 21) - 5)
    assert list(found) == [(small.BLOCK + 5, 0x5020_0005, (1 << 21) - 5)]
    found = smmu.translate_range(small.BYPASSED, 0x1000, 1 << 40)
    assert list(found) == [(0x1000, 0x1000, 1 << 40)]
    past = smmu.translate_range(small.BYPASSED, (1 << 52) - 0x1000, 0x2000)
    assert list(past) == [((1 << 52) - 0x1000, (1 << 52) - 0x1000, 0x1000)]
    assert past.event.name == "F_ADDR_SIZE"


@pytest.mark.parametrize("request_", small.REQUESTS, ids=str)
def test_a_burst_of_one_byte_is_a_translation(smmu, request_):
    result = smmu.translate(request_.sid, request_.iova, **request_.access)
    found = smmu.translate_range(request_.sid, request_.iova, 1, **request_.access)
    assert bool(found) == bool(result)
    if result:
        assert list(found) == [(request_.iova, result.pa, 1)]
    else:
        assert small.row(found.result) == small.row(result)


def test_the_size_of_a_burst_is_checked(smmu):
    for bad in (-1, 1 << 64):
        with pytest.raises(ValueError, match=rf"^size must be 0 to 0x\w+, not (-1|{bad:#x})"):
            smmu.translate_range(1, 0, bad)
    with pytest.raises(TypeError, match=r"^size must be an integer, not float"):
        smmu.translate_range(1, 0, 1.0)
    with pytest.raises(ValueError, match=r"^size must be 0 to 0x10 bytes \(iova 0xf+0 .*not 0x11"):
        smmu.translate_range(1, (1 << 64) - 16, 17)
    end = smmu.translate_range(1, (1 << 64) - 16, 16)
    assert end.event.name == "F_TRANSLATION"


# --- the column of reasons ---


@pytest.mark.parametrize("more", [(), ("pa", "action"), small.ALL])
@pytest.mark.parametrize("times", [1, 40])
def test_the_column_of_reasons_says_what_results_say(smmu, more, times):
    requests = small.REQUESTS * times
    reasons = [0 if r.why is None else int(r.why) for r in small.translate_each(smmu)] * times
    assert 0 in reasons and len(set(reasons)) > 10
    given = small.columns(requests)
    rows = smmu.translate_batch(**given, columns=(*more, "why"))
    assert rows.dtype["why"] == np.uint16
    assert rows["why"].tolist() == reasons
    apart = {"why": np.full(3 * len(requests), 0x5555, np.uint16)[1::3]}
    smmu.translate_batch(**given, out=apart)
    assert apart["why"].tolist() == reasons
    odd = np.zeros(len(requests), [("byte", "u1"), ("why", "u2")])[["why"]]
    odd["why"] = 0x5555
    smmu.translate_batch(**given, out=odd)
    assert odd["why"].tolist() == reasons


def test_pages_that_translate_have_no_reason(smmu):
    out = {"why": np.full(1000, 0x5555, np.uint16), "level": np.zeros(1000, np.int8)}
    smmu.translate_batch(1, np.full(1000, small.RW, np.uint64), out=out)
    assert not out["why"].any()


@pytest.mark.parametrize("kind", ["u1", "i2", "u4", "f2"])
def test_the_column_of_reasons_is_of_its_own_dtype(smmu, kind):
    with pytest.raises(TypeError, match=r"^out\['why'\]\.dtype must be uint16, not "):
        smmu.translate_batch(1, np.zeros(3, np.uint64), out={"why": np.zeros(3, kind)})


# --- start_walk ---


def answer(walk, image):
    """Supply a walk from an image until it is done; returns its requests."""
    asked = []
    while (fetch := walk.request) is not None:
        asked.append(fetch)
        offset = fetch.address - BASE
        data = bytes(image[offset : offset + fetch.size]) if 0 <= offset < len(image) else b""
        walk.supply(data if len(data) == fetch.size else None)
    return asked


@pytest.mark.parametrize("request_", small.REQUESTS, ids=str)
def test_a_walk_asks_for_what_a_trace_shows_and_ends_alike(smmu, request_):
    image = small.build()
    walk = smmu.start_walk(request_.sid, request_.iova, **request_.access)
    asked = answer(walk, image)
    traced = smmu.translate(request_.sid, request_.iova, **request_.access, trace=True)
    assert [f[:4] for f in asked] == [f[:4] for f in traced.fetches]
    assert all(f.data is None for f in asked)
    assert walk.done
    assert walk.result.fetches == traced.fetches
    assert small.row(walk.result) == small.row(traced)
    assert repr(walk.result) == repr(traced)


def test_a_walk_is_told_the_data_in_three_ways(smmu):
    image = small.build()
    for convert in (bytes, bytearray, memoryview, np.array,
                    lambda data: int.from_bytes(data, "little")):  # fmt: skip
        walk = smmu.start_walk(1, small.RW)
        while walk.request:
            offset = walk.request.address - BASE
            walk.supply(convert(memoryview(image)[offset : offset + walk.request.size]))
        assert walk.result.pa == 0x4000_1000


@pytest.mark.parametrize(
    ("after", "event"), [(0, "F_STE_FETCH"), (1, "F_CD_FETCH"), (2, "F_WALK_EABT")]
)
def test_a_walk_is_told_of_an_external_abort(smmu, after, event):
    image = small.build()
    walk = smmu.start_walk(1, small.RW)
    for _ in range(after):
        offset = walk.request.address - BASE
        walk.supply(bytes(image[offset : offset + walk.request.size]))
    address = walk.request.address
    walk.supply(None)
    assert walk.done
    assert walk.result.event.name == event
    assert walk.result.event.fetch_address == address
    assert walk.result.fetches[-1].data is None


def test_a_pending_walk_has_no_result_and_a_done_one_no_request(smmu):
    walk = smmu.start_walk(1, small.RW)
    assert (walk.done, walk.result) == (False, None)
    assert walk.request == walk.request
    assert "STE" in repr(walk)
    answer(walk, small.build())
    assert (walk.done, walk.request) == (True, None)
    assert repr(walk) == "<Walk <Result ok sid=0x1 iova=0x1000 pa=0x40001000>>"
    with pytest.raises(RuntimeError, match="the walk is done"):
        walk.supply(bytes(8))


def test_a_walk_without_fetches_is_done_at_once(smmu):
    walk = smmu.start_walk(small.BEYOND_TABLE, 0)
    assert walk.done
    assert walk.result.event.name == "C_BAD_STREAMID"
    assert walk.result.fetches == []


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"", ValueError, "^data must be 64 bytes, not 0$"),
        (bytes(63), ValueError, "^data must be 64 bytes, not 63$"),
        (bytes(65), ValueError, "^data must be 64 bytes, not 65$"),
        (-1, ValueError, "^data must be a number of 64 bytes, not -1$"),
        (1 << 512, ValueError, "^data must be a number of 64 bytes, not a number of many digits$"),
        ("text", TypeError, "^data must be bytes, a number or None, not str$"),
        ([0] * 64, TypeError, "^data must be .*, not list$"),
        (1.0, TypeError, "^data must be .*, not float$"),
    ],
)
def test_data_that_does_not_fit_is_refused_and_the_walk_goes_on(smmu, data, error, words):
    walk = smmu.start_walk(1, small.RW)
    before = walk.request
    with pytest.raises(error, match=words):
        walk.supply(data)
    assert walk.request == before
    answer(walk, small.build())
    assert walk.result.pa == 0x4000_1000


def test_many_walks_may_be_under_way(smmu):
    image = small.build()
    walks = [smmu.start_walk(r.sid, r.iova, **r.access) for r in small.REQUESTS]
    while any(not walk.done for walk in walks):
        for walk in walks:
            if (fetch := walk.request) is not None:
                offset = fetch.address - BASE
                data = bytes(image[offset : offset + fetch.size]) if offset < len(image) else b""
                walk.supply(data or None)
    assert [small.row(walk.result) for walk in walks] == small.batch_rows(smmu)


def test_a_walk_never_reads_the_memory(smmu):
    smmu = Smmu(Memory(), **small.registers())
    walk = smmu.start_walk(1, small.RW)
    answer(walk, small.build())
    assert walk.result.pa == 0x4000_1000
    with pytest.raises(ExternalAbort):
        smmu.memory.read(BASE, 1)


# --- threads ---


def test_several_threads_use_one_smmu_at_once(smmu):
    requests = small.REQUESTS * 200
    arguments = small.columns(requests)
    expected = small.batch_rows(smmu, requests)
    scalar = [small.row(r) for r in small.translate_each(smmu)]
    start = threading.Barrier(4)
    wrong = []

    def batches():
        start.wait()
        for _ in range(20):
            if small.rows(smmu.translate_batch(**arguments, columns=small.ALL)) != expected:
                wrong.append("batch")

    def singles():
        start.wait()
        for _ in range(30):
            if [small.row(r) for r in small.translate_each(smmu)] != scalar:
                wrong.append("single")

    threads = [threading.Thread(target=t) for t in (batches, batches, singles, singles)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    smmu.memory.add(bytearray(8), 0)


@pytest.mark.rule("S3.21.3-15")
def test_tables_may_be_rewritten_while_a_batch_runs(smmu):
    # Each entry holds one of two pages; a batch sees one or the other, never a mixture.
    image = small.build()
    smmu, image = small.system(image)
    entry = small.LEVEL3 + 8
    words = np.array([0x4777_7000 | 0x443, 0x4888_8000 | 0x443], "<u8")
    view = np.frombuffer(image, "<u8")
    stop = threading.Event()

    def rewrite():
        while not stop.is_set():
            for word in words:
                view[entry // 8] = word

    view[entry // 8] = words[0]
    writer = threading.Thread(target=rewrite)
    writer.start()
    seen = set()
    try:
        for _ in range(50):
            seen |= set(smmu.translate_batch(1, np.full(5000, small.RW, np.uint64))["pa"].tolist())
    finally:
        stop.set()
        writer.join()
    assert seen <= {0x4777_7000, 0x4888_8000}
    assert seen


def test_the_other_threads_run_while_a_batch_does(smmu):
    # A batch over a callback that waits for another thread can only end if that thread runs.
    image = bytes(small.build())
    asked, answered = threading.Event(), threading.Event()

    def read(address, n):
        asked.set()
        assert answered.wait(60)
        return image[address - BASE : address - BASE + n]

    memory = Memory()
    memory.add_callback(BASE, small.SIZE, read)
    slow = Smmu(memory, **small.registers())
    found = []
    thread = threading.Thread(target=lambda: found.append(slow.translate_batch([1], small.RW)))
    thread.start()
    assert asked.wait(60)
    assert smmu.pa(1, small.RW) == 0x4000_1000
    answered.set()
    thread.join()
    assert found[0]["pa"].tolist() == [0x4000_1000]
