"""The table of records, and its three views: Python, numpy and the generated Cython.

The expectations are the worked encodings and, for positions, bit arithmetic on one large integer
that is written here on its own.
"""

import ctypes
import doctest
import gzip
import importlib.util
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from project import CAPTURES

from smmufast import layout

PACKAGE = Path(layout.__file__).parent
PXD = PACKAGE / "_facts/layout.pxd"
HEADER = PACKAGE / "_facts/layout.h"
IN_MEMORY = ("L1STD", "STE", "L1CD", "CD", "EVENT", "F_BAD_ATS_TREQ", "CMD")
BY_VALUE = ("PTE_S1", "PTE_S1_TABLE", "PTE_S2", "PTE_S2_TABLE", "CR0", "CR2", "GBPA",
            "STRTAB_BASE", "STRTAB_BASE_CFG", "CMDQ_BASE", "CMDQ_PROD", "CMDQ_CONS",
            "EVENTQ_BASE", "EVENTQ_PROD", "EVENTQ_CONS", "GERROR")  # fmt: skip

every_record = pytest.mark.parametrize("rec", layout.RECORDS.values(), ids=lambda r: r.name)


def bits_of(field):
    return ((1 << (field.msb - field.lsb + 1)) - 1) << field.lsb


def expected_value(field, word):
    """Bits [msb:lsb] of a record; an address field keeps its place in the dword."""
    value = (word & bits_of(field)) >> field.lsb
    return value << field.lsb % 64 if field.address else value


def random_words(rec, count, seed):
    rng = random.Random(f"{rec.name} {seed}")
    return [0, (1 << 8 * rec.bytes) - 1, *(rng.getrandbits(8 * rec.bytes) for _ in range(count))]


def random_value(field, rng):
    value = rng.getrandbits(field.width)
    return value << field.lsb % 64 if field.address else value


# --- the table -----------------------------------------------------------------------------------


@every_record
def test_fields_lie_within_their_record_and_within_one_dword(rec):
    assert rec.bytes == 4 or rec.bytes % 8 == 0
    for f in rec.fields:
        assert 0 <= f.lsb <= f.msb < 8 * rec.bytes
        assert f.lsb // 64 == f.msb // 64


@every_record
def test_only_fields_marked_overlay_share_bits(rec):
    taken = 0
    for f in rec.fields:
        if not f.overlay:
            assert not taken & bits_of(f), f
            taken |= bits_of(f)
    for f in rec.fields:
        # an address field of a descriptor is an alternative even where nothing else has its bits
        if f.overlay and not f.name.startswith("Addr"):
            assert any(bits_of(f) & bits_of(other) for other in rec.fields if other is not f), f


@every_record
def test_named_codes_fit_their_field(rec):
    for f in rec.fields:
        assert all(0 <= code < 1 << f.width for code in f.values), f
        assert f.doc
        assert f.doubt in ("", "one source", "unchecked")


@every_record
def test_fixed_fields_exist(rec):
    for name, value in rec.fixed.items():
        assert value < 1 << rec.field(name).width


GENERIC = [(layout.EVENT, r) for r in layout.EVENTS.values()] + [
    (layout.CMD, r) for r in layout.COMMANDS.values()
]
ELSEWHERE = {
    ("F_BAD_ATS_TREQ", "InputAddr"), ("E_PAGE_REQUEST", "InputAddr"),
    ("F_CFG_CONFLICT", "Reason"), ("PREFETCH_ADDR", "Size"), ("DPTI_PA", "Size"),
    ("DPTI_PA", "Address"),
}  # fmt: skip
OWN = {"Span", "P", "X", "W", "R", "uX", "uW", "uR", "pX", "pW", "pR"}


@pytest.mark.parametrize("generic, rec", GENERIC, ids=[r.name for _, r in GENERIC])
def test_the_generic_record_has_the_fields_of_each_event_and_command(generic, rec):
    for f in rec.fields:
        if f.name in OWN:
            with pytest.raises(ValueError, match="has no field"):
                generic.field(f.name)
            continue
        same = generic.field(f.name)
        agrees = (same.msb, same.lsb, same.address) == (f.msb, f.lsb, f.address)
        assert agrees == ((rec.name, f.name) not in ELSEWHERE), f


@pytest.mark.parametrize(
    "msb, lsb, reason",
    [(64, 60, "not within"), (128, 128, "not within"), (3, 4, "not within"), (70, 60, "crosses")],
)
def test_a_record_refuses_a_misplaced_field(msb, lsb, reason):
    size = 16 if reason == "crosses" or lsb > 64 else 8
    with pytest.raises(ValueError, match=rf"X\.F \[.*\] .*{reason}"):
        layout.Record("X", size, "", (layout.Field("F", msb, lsb),))


def test_a_record_refuses_two_fields_of_one_name():
    with pytest.raises(ValueError, match="X has two fields of one name"):
        layout.Record("X", 8, "", (layout.Field("F", 0, 0), layout.Field("f", 1, 1)))


def test_registers_have_distinct_aligned_offsets():
    offsets = {r.offset: r for r in layout.REGISTERS.values()}
    assert len(offsets) == len(layout.REGISTERS)
    for offset, r in offsets.items():
        assert offset % r.bytes == 0
        assert r.bytes == 4 or offset + 4 not in offsets
    for name, offset in {"IDR0": 0, "IDR5": 0x14, "AIDR": 0x1C, "CR0": 0x20, "GBPA": 0x44,
                         "GERROR": 0x60, "STRTAB_BASE": 0x80, "STRTAB_BASE_CFG": 0x88,
                         "CMDQ_BASE": 0x90, "CMDQ_PROD": 0x98, "CMDQ_CONS": 0x9C,
                         "EVENTQ_BASE": 0xA0, "EVENTQ_PROD": 0x100A8,
                         "PRIQ_CONS": 0x100CC}.items():  # fmt: skip
        assert layout.REGISTERS[name].offset == offset


# --- worked encodings ----------------------------------------------------------------------------

ENCODINGS = [
    # structures
    ("STE", {"V": 1}, "0000000000000001 0000000000000000"),
    ("STE", {"V": 1, "Config": 0b100, "SHCFG": 1}, "0000000000000009 0000100000000000"),
    ("STE", {"V": 1, "Config": 0b101, "S1Fmt": 0b10, "S1ContextPtr": 0x8000_1000, "S1CDMax": 10,
             "S1DSS": 0b10, "S1CIR": 1, "S1COR": 1, "S1CSH": 3, "STRW": 0, "SHCFG": 1,
             "S2VMID": 0}, "500000008000102b 00001000000000d6 0000000000000000"),
    ("STE", {"V": 1, "Config": 0b110, "SHCFG": 1, "S2VMID": 5, "S2T0SZ": 24, "S2SL0": 1,
             "S2IR0": 1, "S2OR0": 1, "S2SH0": 3, "S2TG": 0, "S2PS": 0b101, "S2AA64": 1,
             "S2PTW": 1, "S2R": 1, "S2TTB": 0x9000_2000},
     "000000000000000d 0000100000000000 044d355800000005 0000000090002000"),
    ("CD", {"T0SZ": 16, "TG0": 0, "IR0": 1, "OR0": 1, "SH0": 3, "EPD1": 1, "V": 1, "IPS": 0b101,
            "AA64": 1, "R": 1, "A": 1, "ASET": 1, "ASID": 0x12, "TTB0": 0xA000_3000,
            "MAIR0": 0x04FF44},
     "0012e205c0003510 00000000a0003000 0000000000000000 000000000004ff44"),
    ("L1STD", {"Span": 9, "L2Ptr": 0x8_0004_0000}, "0000000800040009"),
    ("L1CD", {"V": 1, "L2Ptr": 0xB000_0000}, "00000000b0000001"),
    # commands
    ("CFGI_STE", {"StreamID": 0x42, "Leaf": 1}, "0000004200000003 0000000000000001"),
    ("CFGI_ALL", {}, "0000000000000004 000000000000001f"),
    ("CFGI_STE_RANGE", {"Range": 31}, "0000000000000004 000000000000001f"),
    ("CFGI_CD", {"StreamID": 0x42, "SubstreamID": 3, "Leaf": 1},
     "0000004200003005 0000000000000001"),
    ("TLBI_NH_VA", {"VMID": 1, "ASID": 0x12, "Leaf": 1, "Address": 0x1234_5000},
     "0012000100000012 0000000012345001"),
    ("TLBI_NH_VA", {"VMID": 1, "ASID": 0x12, "TG": 1, "SCALE": 3, "NUM": 0, "TTL": 3, "Leaf": 1,
                    "Address": 0x1234_0000}, "0012000100300012 0000000012340701"),
    ("TLBI_S2_IPA", {"VMID": 5, "IPA": 0x4000_1000, "Leaf": 1},
     "000000050000002a 0000000040001001"),
    ("RESUME", {"Ac": 1, "StreamID": 1, "STAG": 5}, "0000000100001044 0000000000000005"),
    ("RESUME", {"Ac": 0, "Ab": 1, "StreamID": 1, "STAG": 5}, "0000000100002044 0000000000000005"),
    ("SYNC", {"CS": 1, "MSH": 3, "MSIAttr": 0xF, "MSIData": 0, "MSIAddress": 0x1000},
     "000000000fc01046 0000000000001000"),
    ("ATC_INV", {"StreamID": 0x42, "SSV": 1, "SubstreamID": 3, "Size": 52},
     "0000004200003840 0000000000000034"),
    ("PRI_RESP", {"StreamID": 0x42, "PRGIndex": 7, "Resp": 2},
     "0000004200000041 0000000000002007"),
    # events
    ("F_TRANSLATION", {"StreamID": 0x42, "CLASS": 2, "InputAddr": 0x1234_5678_9000},
     "0000004200000010 0000020000000000 0000123456789000 0000000000000000"),
    ("F_PERMISSION", {"StreamID": 7, "SSV": 1, "SubstreamID": 3, "PnU": 1, "RnW": 1, "S2": 1,
                      "CLASS": 1, "TTRnW": 1, "InputAddr": 0xDEAD_0000, "IPA": 0x4000_1000},
     "0000000700003813 0000118a00000000 00000000dead0000 0000000040001000"),
    ("F_TRANSLATION", {"StreamID": 1, "STAG": 5, "Stall": 1, "RnW": 1, "CLASS": 2,
                       "InputAddr": 0x8000},
     "0000000100000010 0000020880000005 0000000000008000 0000000000000000"),
    ("C_BAD_STE", {"StreamID": 9},
     "0000000900000004 0000000000000000 0000000000000000 0000000000000000"),
    ("F_CD_FETCH", {"StreamID": 9, "SSV": 1, "SubstreamID": 2, "FetchAddr": 0x8000_0040},
     "0000000900002809 0000000000000000 0000000000000000 0000000080000040"),
    # registers, from the bit tables
    ("GBPA", {"SHCFG": 1}, "1000"),
    ("STRTAB_BASE_CFG", {"LOG2SIZE": 16, "SPLIT": 8, "FMT": 1}, "10210"),
    ("STRTAB_BASE", {"ADDR": 0x4000_0000, "RA": 1}, "4000000040000000"),
    ("CMDQ_BASE", {"ADDR": 0x4100_0000, "LOG2SIZE": 8, "RA": 1}, "4000000041000008"),
    ("CMDQ_CONS", {"RD": 5, "ERR": 1}, "1000005"),
    ("EVENTQ_PROD", {"WR": 3, "OVFLG": 1}, "80000003"),
    ("PRI", {"StreamID": 9, "SubstreamID": 3, "SSV": 1, "Last": 1, "R": 1, "PRGIndex": 7,
             "Address": 0x5000}, "d000000300000009 0000000000005007"),
    # descriptors: a Linux 4K page, a 64K table at 52 bits, a 4K page with DS
    ("PTE_S1", {"Valid": 1, "Type": 1, "AttrIndx": 1, "AP": 1, "SH": 3, "AF": 1, "nG": 1,
                "PXN": 1, "UXN": 1, "Addr_4K": 0x8000_3000}, "60000080003f47"),
    ("PTE_S1_TABLE", {"Valid": 1, "Type": 1, "Addr_64K": 0x1234_0000, "Addr51_48": 0xA,
                      "APTable": 2}, "400000001234a003"),
    ("PTE_S2", {"Valid": 1, "Type": 1, "MemAttr": 0xF, "S2AP": 3, "AF": 1, "XN": 2,
                "Addr_4K_DS": 0x2_0000_0000_7000, "Addr51_50": 2}, "420000000076ff"),
]  # fmt: skip


@pytest.mark.parametrize("name, fields, dwords", ENCODINGS)
def test_worked_encodings_come_out_exactly(name, fields, dwords):
    word = sum(int(d, 16) << 64 * i for i, d in enumerate(dwords.split()))
    assert layout.pack(name, **fields) == word
    raw = layout.to_bytes(name, word)
    assert raw == word.to_bytes(layout.record(name).bytes, "little")
    assert layout.from_bytes(name, raw) == word
    values = layout.unpack(name, raw)
    assert {f: values[f] for f in fields} == fields
    plain = {f.name for f in layout.record(name).fields if not f.overlay}
    rest = plain - set(fields) - set(layout.record(name).fixed)
    if not name.startswith("PTE"):  # there a plain field may hold bits of an address
        assert {f: values[f] for f in rest} == dict.fromkeys(rest, 0)


# --- pack, unpack, bytes -------------------------------------------------------------------------


@every_record
def test_unpack_reads_every_field_and_pack_is_its_inverse(rec):
    named = 0
    for f in rec.fields:
        named |= bits_of(f)
    for word in random_words(rec, 20, "unpack"):
        for name, value in rec.fixed.items():
            word &= ~bits_of(rec.field(name))
            word |= value << rec.field(name).lsb
        values = layout.unpack(rec, word)
        assert list(values) == [f.name for f in rec.fields]
        for f in rec.fields:
            assert values[f.name] == expected_value(f, word), f
        assert layout.pack(rec, **values) == word & named
        assert layout.unpack(rec.name, layout.to_bytes(rec, word)) == values


@every_record
def test_pack_puts_each_field_alone_where_it_belongs(rec):
    fixed = layout.pack(rec)
    for f in rec.fields:
        if f.name in rec.fixed:
            continue
        top = bits_of(f) >> f.lsb << (f.lsb % 64 if f.address else 0)
        assert layout.pack(rec, **{f.name: top}) == fixed | bits_of(f), f


@every_record
def test_fields_that_share_no_bits_are_packed_together(rec):
    rng = random.Random(rec.name)
    for word in random_words(rec, 10, "together"):
        chosen, taken = [], sum(bits_of(rec.field(name)) for name in rec.fixed)
        for f in rng.sample(rec.fields, len(rec.fields)):
            if not bits_of(f) & taken and rng.random() < 0.7:
                chosen.append(f)
                taken |= bits_of(f)
        wanted = layout.pack(rec) | sum(word & bits_of(f) for f in chosen)
        values = {f.name: expected_value(f, word) for f in chosen}
        for given in (values, {name: np.uint64(value) for name, value in values.items()}):
            for _ in range(2):  # the second time it is known how
                assert layout.pack(rec, **given) == wanted
        for f in chosen:
            for wrong in (-1, (bits_of(f) >> f.lsb << (f.lsb % 64 if f.address else 0)) + 1):
                with pytest.raises(ValueError, match=f.name):
                    layout.pack(rec, **values | {f.name: wrong})


def test_names_are_found_in_any_case():
    assert layout.pack("ste", v=1, config=5) == layout.pack("STE", V=1, Config=5) == 0xB
    assert layout.record("f_translation") is layout.EVENTS[0x10]
    assert layout.record(layout.CD) is layout.CD


def test_records_are_read_from_any_buffer():
    data = layout.to_bytes("EVENT", layout.pack("C_BAD_STE", StreamID=9))
    wanted = layout.unpack("EVENT", data)
    assert wanted["StreamID"] == 9
    rows = np.frombuffer(data, "<u8")
    for form in (bytearray(data), memoryview(data), rows, np.frombuffer(data, np.uint8),
                 np.frombuffer(data, layout.dtype("EVENT"))[0],
                 int.from_bytes(data, "little")):  # fmt: skip
        assert layout.unpack("EVENT", form) == wanted
    assert layout.unpack("L1CD", np.uint64(0x1001)) == {"V": 1, "L2Ptr": 0x1000}


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("CD", {"T0SZ": 64}, r"CD\.T0SZ must be 0 to 0x3f, not 0x40"),
        ("CD", {"T0SZ": -1}, r"CD\.T0SZ must be 0 to 0x3f, not -1"),
        ("CD", {"TTB0": 8}, r"CD\.TTB0 must be 0 to 0xf{13}0 in steps of 0x10, not 8"),
        ("STE", {"S1ContextPtr": 1 << 56}, r"STE\.S1ContextPtr must be .*, not 0x100000000000000"),
        ("STE", {"S1ContextPtr": -64}, r"STE\.S1ContextPtr must be .*, not -0x40"),
        ("L1CD", {"Span": 1}, "L1CD has no field 'Span'; it has V, L2Ptr"),
        ("STD", {}, "record must be a name of layout.RECORDS, not 'STD'"),
        ("CFGI_STE", {"Opcode": 4}, r"CFGI_STE\.Opcode must be 0x3, not 4"),
        ("CFGI_ALL", {"Range": 3}, r"CFGI_ALL\.Range must be 0x1f, not 3"),
        ("EVENT", {"STAG": 1, "Reason": 3}, r"EVENT\.Reason and EVENT\.STAG share bits"),
        ("CMD", {"StreamID": 9, "VMID": 1}, r"CMD\.VMID and CMD\.StreamID share bits"),
    ],
)
def test_pack_says_what_is_wrong(name, fields, message):
    with pytest.raises(ValueError, match=message):
        layout.pack(name, **fields)


def test_fields_that_share_bits_may_agree_or_leave_them_zero():
    assert layout.pack("EVENT", STAG=3, Reason=3) == 3 << 64
    assert layout.pack("EVENT", STAG=3, Reason=0) == 3 << 64
    assert layout.pack("PTE_S1", Valid=1, Addr_4K=0x4000_0000, nT=1) == 0x4001_0001


@pytest.mark.parametrize("value", [1.0, "1", None])
def test_pack_wants_integers(value):
    with pytest.raises(TypeError):
        layout.pack("CD", V=value)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"\0" * 7, "data must be 8 bytes, as L1CD is, not 7"),
        (b"\0" * 9, "data must be 8 bytes, as L1CD is, not 9"),
        (1 << 64, "data must be a number of 8 bytes, as L1CD is, not 0x10000000000000000"),
        (-1, "data must be a number of 8 bytes, as L1CD is, not -1"),
    ],
)
def test_unpack_wants_a_whole_record(data, message):
    with pytest.raises(ValueError, match=message):
        layout.unpack("L1CD", data)


def test_unpack_refuses_another_event_or_command():
    with pytest.raises(ValueError, match=r"F_ACCESS\.ID must be 0x12, not 0x10"):
        layout.unpack("F_ACCESS", layout.pack("F_TRANSLATION"))
    with pytest.raises(ValueError, match=r"CFGI_ALL\.Range must be 0x1f, not 0"):
        layout.unpack("CFGI_ALL", layout.pack("CFGI_STE_RANGE"))


# --- numbers -------------------------------------------------------------------------------------


def test_events_are_found_by_number_and_by_name():
    assert [e.value for e in layout.Event] == sorted(layout.EVENTS)
    for event in layout.Event:
        rec = layout.event_record(event)
        assert rec is layout.event_record(event.name.lower()) is layout.EVENTS[event]
        assert rec.name == event.name
        assert rec.fixed == {"ID": event}
    for wrong in (0, 0x14, 0xE0, "F_NOTHING"):
        with pytest.raises(ValueError, match="event must be the number or name of one, not "):
            layout.event_record(wrong)


def test_commands_are_found_by_number_and_by_name():
    assert list(layout.Opcode.__members__) == list(layout.COMMANDS)
    for name, opcode in layout.Opcode.__members__.items():
        rec = layout.command_record(name.lower())
        assert rec.name == name
        assert rec.fixed["Opcode"] == opcode
        assert layout.command_record(opcode) is rec or name == "CFGI_ALL"
    assert layout.command_record(0x04).name == "CFGI_STE_RANGE"
    for wrong in (0, 0x08, 0x80, "NOTHING"):
        with pytest.raises(ValueError, match="command must be the opcode or name of one, not "):
            layout.command_record(wrong)


def test_numbers_are_those_of_the_architecture():
    assert layout.Event.F_TRANSLATION == 0x10
    assert layout.Event.C_BAD_SUBSTREAMID == 8
    assert layout.Event.F_WALK_EABT == 0x0B
    assert layout.Opcode.TLBI_NSNH_ALL == 0x30
    assert layout.Opcode.SYNC == 0x46
    assert layout.OUTPUT_BITS == (32, 36, 40, 42, 44, 48, 52, 56)


# --- text ----------------------------------------------------------------------------------------


def test_format_shows_bits_values_and_meanings():
    word = layout.pack("STE", V=1, Config=5, S1ContextPtr=0x8000_1000, TL0=1) | 1 << 57
    assert layout.format("STE", layout.to_bytes("STE", word)).splitlines() == [
        "STE: stream table entry",
        "  V             [0]     1                  valid",
        "  Config        [3:1]   5                  what the stream's transactions meet: "
        "STAGE_1, stage 1 only",
        "  S1ContextPtr  [55:6]  0x80001000         address of the CD or CD table",
        "  TL0           [330]   1                  TopLevel check, TTB0 (one source)",
        "  -                     0x200000000000000  bits outside every field",
    ]


def test_format_marks_alternatives_and_unchecked_positions():
    text = layout.format("PREFETCH_ADDR", layout.pack("PREFETCH_ADDR", Stride=9))
    assert re.search(r"Stride +\[73:69\] +9 .*\(unchecked\)$", text, re.M)
    text = layout.format("PTE_S1", layout.pack("PTE_S1", Addr_4K=0x8000_0000))
    assert re.search(r"Addr_64K +\[47:16\] +0x80000000 .*\(alternative\)$", text, re.M)


def test_format_shows_zeros_on_demand_and_v_always():
    assert layout.format("CD", 0).splitlines()[1:] == ["  V  [31]  0  valid"]
    shown = layout.format("CD", 0, zeros=True).splitlines()
    assert len(shown) == 1 + len(layout.CD.fields)
    assert any(re.fullmatch(r"  TG0 +\[7:6\] +0  TTB0 granule: 4K", line) for line in shown)


def test_format_of_a_generic_event_or_command_is_that_of_its_number():
    event = layout.pack("F_STE_FETCH", StreamID=7, FetchAddr=0x1008)
    assert layout.format("EVENT", event) == layout.format("F_STE_FETCH", event)
    assert "FetchAddr" in layout.format("EVENT", event)
    command = layout.pack("TLBI_NH_ASID", VMID=1, ASID=2)
    assert layout.format("CMD", command) == layout.format("TLBI_NH_ASID", command)
    assert layout.format("CMD", 0x80).startswith("CMD: ")
    assert layout.format("EVENT", 0xE0).startswith("EVENT: ")


def test_docstring_examples_hold():
    result = doctest.testmod(layout)
    assert result.attempted >= 6
    assert result.failed == 0


# --- arrays --------------------------------------------------------------------------------------


def test_all_records_of_one_size_have_one_dtype():
    assert layout.dtype("STE") == layout.dtype("CD") == np.dtype([("dwords", "<u8", (8,))])
    assert layout.dtype("F_ACCESS") == layout.dtype("EVENT")
    for rec in layout.RECORDS.values():
        if rec.bytes >= 8:
            assert layout.dtype(rec).itemsize == rec.bytes
    with pytest.raises(ValueError, match="CR0 is a 32-bit register"):
        layout.dtype("CR0")


@pytest.mark.parametrize("name", [*IN_MEMORY, "PRI", "PTE_S1", "F_TLB_CONFLICT", "STRTAB_BASE"])
def test_array_fields_are_those_of_each_record(name):
    rec = layout.record(name)
    words = random_words(rec, 10, "array")
    memory = bytearray(b"".join(w.to_bytes(rec.bytes, "little") for w in words))
    records = np.frombuffer(memory, layout.dtype(rec))
    raw = np.frombuffer(memory, "<u8").reshape(len(words), -1)
    plain = raw[:, 0] if rec.dwords == 1 else raw
    rng = random.Random(name)
    for f in rec.fields:
        values = [expected_value(f, w) for w in words]
        for array in (records, plain):
            got = layout.get(array, rec, f.name)
            assert got.dtype == np.uint64
            assert got.tolist() == values
        new = [random_value(f, rng) for _ in words]
        for array in (records, plain):
            before = memory[:]
            layout.set(array, name, f.name.lower(), np.array(new, np.uint64))
            for i, w in enumerate(words):
                place = slice(i * rec.bytes, (i + 1) * rec.bytes)
                wanted = w & ~bits_of(f) | new[i] << (f.lsb - f.lsb % 64 * f.address)
                assert int.from_bytes(memory[place], "little") == wanted
            memory[:] = before


def test_array_values_are_broadcast_over_any_shape():
    tables = np.zeros((2, 3), layout.dtype("CD"))
    layout.set(tables, "CD", "ASID", [1, 2, 0xFFFF])
    layout.set(tables, "CD", "V", True)
    layout.set(tables[0, 1:2], "CD", "TTB0", 0x1000)
    assert layout.get(tables, "CD", "ASID").tolist() == [[1, 2, 0xFFFF]] * 2
    assert layout.get(tables, "CD", "V").tolist() == [[1, 1, 1]] * 2
    assert layout.get(tables, "CD", "TTB0").tolist() == [[0, 0x1000, 0], [0, 0, 0]]
    assert layout.get(tables[1, 2:], "CD", "ASID").shape == (1,)
    one = np.zeros((), layout.dtype("CD"))
    layout.set(one, "CD", "IPS", 5)
    assert int(layout.get(one, "CD", "IPS")) == 5
    none = np.zeros(0, layout.dtype("CD"))
    layout.set(none, "CD", "V", [])
    assert layout.get(none, "CD", "V").shape == (0,)


@pytest.mark.parametrize(
    "values, error, message",
    [
        ([1, 64], ValueError, r"CD\.T0SZ must be 0 to 0x3f, not 0x40"),
        ([1, -2], ValueError, r"CD\.T0SZ must be .*, not -2"),
        ([1.0, 2.0], TypeError, "values must be integers, not float64"),
        ([1 << 70, 0], TypeError, "values must be integers, not object"),
    ],
)
def test_set_says_what_is_wrong_and_changes_nothing(values, error, message):
    array = np.zeros(2, layout.dtype("CD"))
    with pytest.raises(error, match=message):
        layout.set(array, "CD", "T0SZ", values)
    assert not array["dwords"].any()


def test_set_refuses_a_misaligned_address_and_a_readonly_array():
    array = np.zeros(3, layout.dtype("CD"))
    with pytest.raises(ValueError, match=r"CD\.TTB0 must be 0 to 0xf+0 in steps of 0x10, not 0x18"):
        layout.set(array, "CD", "TTB0", [0x10, 0x18, 0x20])
    array.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        layout.set(array, "CD", "TTB0", 0x10)


@pytest.mark.parametrize(
    "array, error",
    [
        (np.zeros((2, 4), "<u8"), ValueError),
        (np.zeros(8, "<u4"), ValueError),
        (np.zeros((1, 8), ">u8"), ValueError),
        (np.zeros(2, layout.dtype("EVENT")), ValueError),
        (b"\0" * 64, TypeError),
    ],
)
def test_get_refuses_arrays_of_other_things(array, error):
    with pytest.raises(error, match=r"^array must be "):
        layout.get(array, "CD", "V")


# --- the generated Cython ------------------------------------------------------------------------


def run(*arguments, cwd):
    command = [sys.executable, "-I", "-S", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_generated_files_are_current(tmp_path):
    """Also: the generator needs neither an installed package nor numpy (-S hides both)."""
    done = run(str(PACKAGE / "layout.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == PXD.read_text(encoding="utf-8") + HEADER.read_text(encoding="utf-8")


def test_the_generator_writes_beside_itself(tmp_path):
    shutil.copy(PACKAGE / "layout.py", tmp_path)
    (tmp_path / "_facts").mkdir()
    (tmp_path / "_facts/layout.pxd").write_text("stale")
    done = run("layout.py", "--write", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert (tmp_path / "_facts/layout.pxd").read_bytes() == PXD.read_bytes()
    assert (tmp_path / "_facts/layout.h").read_bytes() == HEADER.read_bytes()
    assert run("layout.py", "--wrong", cwd=tmp_path).returncode == 1


@pytest.mark.parametrize("path", [PXD, HEADER], ids=lambda path: path.name)
def test_a_generated_file_says_how_it_is_made(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert "Generated by" in first
    assert "layout.py --write" in first


PROBE = """
from libc.stdint cimport uint64_t
from smmufast._facts.layout cimport *

def enumerators():
    return {{{enumerators}}}

def masks():
    return {{{masks}}}

def read(size_t address):
    cdef const uint64_t* w = <const uint64_t*>address
    return {{{getters}}}

def write(str name, size_t address, uint64_t value):
    cdef uint64_t* w = <uint64_t*>address
    {setters}

def read_value(uint64_t d):
    return {{{value_getters}}}

def write_value(str name, uint64_t d, uint64_t value):
    {value_setters}
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """A Cython module that calls every function of _facts/layout.pxd and knows every enumerator."""
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension
    from setuptools.command.build_ext import build_ext

    text = PXD.read_text(encoding="utf-8")
    getters = re.findall(r"uint64_t (\w+)\(const uint64_t\* w\)", text)
    setters = re.findall(r"void (\w+)\(uint64_t\* w, uint64_t value\)", text)
    value_getters = re.findall(r"uint64_t (\w+)\(uint64_t d\)", text)
    value_setters = re.findall(r"uint64_t (\w+)\(uint64_t d, uint64_t value\)", text)
    assert text.count("cdef inline") == sum(
        map(len, (getters, setters, value_getters, value_setters))
    )
    enumerators = re.findall(r"^    (\w+) = ", text[: text.index("cdef inline")], re.M)
    masks = re.findall(r"^    const uint64_t (\w+)$", text, re.M)
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.pyx").write_text(PROBE.format(
        enumerators=", ".join(f"'{n}': {n}" for n in enumerators),
        masks=", ".join(f"'{n}': {n}" for n in masks),
        getters=", ".join(f"'{n}': {n}(w)" for n in getters),
        setters="\n    ".join(f"if name == '{n}': {n}(w, value); return" for n in setters)
        + "\n    raise KeyError(name)",
        value_getters=", ".join(f"'{n}': {n}(d)" for n in value_getters),
        value_setters="\n    ".join(
            f"if name == '{n}': return {n}(d, value)" for n in value_setters)
        + "\n    raise KeyError(name)",
    ))  # fmt: skip
    build = build_ext(Distribution({"ext_modules": cythonize(
        [Extension("probe", [str(folder / "probe.pyx")], extra_compile_args=["-O0"],
                   include_dirs=[str(PACKAGE)])],
        include_path=[str(PACKAGE.parent)], build_dir=str(folder), language_level=3, quiet=True,
    )}))  # fmt: skip
    build.build_lib = build.build_temp = str(folder)
    build.ensure_finalized()
    build.run()
    spec = importlib.util.spec_from_file_location("probe", next(folder.glob("probe.*.so")))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.names = {"getters": set(getters), "setters": set(setters),
                    "value_getters": set(value_getters),
                    "value_setters": set(value_setters)}  # fmt: skip
    return module


def test_every_field_of_the_hot_records_has_a_getter_and_a_setter(probe):
    def names(records, infix):
        return {
            f"{name}_{infix}{f.name}".lower()
            for name in records
            for f in layout.record(name).fields
        }

    assert probe.names == {
        "getters": names(IN_MEMORY, ""),
        "setters": names(IN_MEMORY, "set_"),
        "value_getters": names(BY_VALUE, ""),
        "value_setters": names(BY_VALUE, "set_"),
    }


def test_masks_are_the_bits_of_their_fields(probe):
    assert probe.masks() == {
        f"{name}_{f.name}".upper(): f.mask
        for name in (*IN_MEMORY, *BY_VALUE, *layout._MASKS_ALONE)
        for f in layout.record(name).fields
    }


def test_mask_joins_fields():
    assert layout.mask("CR0", "SMMUEN", "cmdqen") == 0b1001
    assert layout.mask("STE", "V", "EATS") == 1 | 3 << 92
    assert layout.mask("CD") == 0
    with pytest.raises(ValueError, match="nothing"):
        layout.mask("CR0", "nothing")


@pytest.mark.parametrize("name", IN_MEMORY)
def test_cython_getters_agree_with_unpack(probe, name):
    rec = layout.record(name)
    for word in random_words(rec, 50, "getters"):
        for field, value in rec.fixed.items():
            word &= ~bits_of(rec.field(field))
            word |= value << rec.field(field).lsb
        space = ctypes.create_string_buffer(layout.to_bytes(rec, word), 64)
        got = probe.read(ctypes.addressof(space))
        for field, value in layout.unpack(rec, word).items():
            assert got[f"{name}_{field}".lower()] == value


@pytest.mark.parametrize("name", IN_MEMORY)
def test_cython_setters_change_their_own_bits_only(probe, name):
    rec = layout.record(name)
    rng = random.Random(name)
    for f in rec.fields:
        for word in random_words(rec, 4, f.name):
            for value in (rng.getrandbits(64), 0, (1 << 64) - 1):
                space = ctypes.create_string_buffer(layout.to_bytes(rec, word), 64)
                probe.write(f"{name}_set_{f.name}".lower(), ctypes.addressof(space), value)
                moved = value << (f.lsb - f.lsb % 64 * f.address)
                wanted = word & ~bits_of(f) | moved & bits_of(f)
                assert int.from_bytes(space.raw, "little") == wanted, f


@pytest.mark.rule("V8.3.1.2-1")
@pytest.mark.parametrize("name", BY_VALUE)
def test_cython_functions_on_values_agree_with_unpack(probe, name):
    rec = layout.record(name)
    rng = random.Random(name)
    for word in random_words(rec, 30, "values"):
        got = probe.read_value(word)
        for f in rec.fields:
            assert got[f"{name}_{f.name}".lower()] == expected_value(f, word)
            value = rng.getrandbits(64)
            moved = value << (0 if f.address else f.lsb)
            assert probe.write_value(f"{name}_set_{f.name}".lower(), word, value) == (
                word & ~bits_of(f) | moved & bits_of(f)
            )


def test_cython_enumerators_are_the_numbers_of_the_table(probe):
    found = probe.enumerators()
    for event in layout.Event:
        assert found.pop(f"EVENT_{event.name}") == event
    for name, opcode in layout.Opcode.__members__.items():
        assert found.pop(f"CMD_{name}") == opcode
    for world in layout.StreamWorld:
        assert found.pop(f"WORLD_{world.name}") == world
    for name in IN_MEMORY:
        assert found.pop(f"{name}_BYTES") == layout.record(name).bytes
    for name, value in {
        "STE_CONFIG_ABORT": 0, "STE_CONFIG_BYPASS": 4, "STE_CONFIG_STAGE_1": 5,
        "STE_CONFIG_STAGE_2": 6, "STE_CONFIG_NESTED": 7, "STE_S1FMT_LINEAR": 0,
        "STE_S1FMT_TWO_LEVEL_4K": 1, "STE_S1FMT_TWO_LEVEL_64K": 2, "STE_S1DSS_TERMINATE": 0,
        "STE_S1DSS_BYPASS": 1, "STE_S1DSS_SUBSTREAM_0": 2, "STE_STRW_NS_EL1": 0,
        "STE_STRW_EL2": 2, "CD_TG0_4K": 0, "CD_TG0_64K": 1, "CD_TG0_16K": 2, "CD_TG1_16K": 1,
        "CD_TG1_4K": 2, "CD_TG1_64K": 3, "CMD_TG_4K": 1, "CMD_TG_16K": 2, "CMD_TG_64K": 3,
        "EVENT_CLASS_CD": 0, "EVENT_CLASS_TT": 1, "EVENT_CLASS_IN": 2, "CD_SH0_OSH": 2,
        "GBPA_SHCFG_INCOMING": 1, "STRTAB_BASE_CFG_FMT_TWO_LEVEL": 1, "CMDQ_CONS_ERR_ILL": 1,
    }.items():  # fmt: skip
        assert found.pop(name) == value
    # the rest, too, are codes of fields that bear their name
    for name, value in found.items():
        owners = [
            f
            for record_name in (*IN_MEMORY, *BY_VALUE)
            for f in layout.record(record_name).fields
            if name.startswith(f"{record_name}_{f.name.upper()}_")
            and f.values.get(value, "").partition(":")[0] == name[
                len(f"{record_name}_{f.name}_"):]
        ]  # fmt: skip
        assert owners, name


# --- tables and events of others -----------------------------------------------------------------


@pytest.fixture(scope="module")
def captures():
    """The folder of captured memory, where there is one."""
    if not CAPTURES.is_dir():
        pytest.skip("no captures: set SMMUFAST_CAPTURES")
    return CAPTURES


KERNELS = ["linux-6.12-4k-s1", "linux-7.3-4k-s1", "linux-7.3-16k-s1", "linux-7.3-4k-s2"]


@pytest.mark.parametrize("name", KERNELS)
def test_captured_events_say_what_their_listing_says(captures, name):
    with gzip.open(captures / name / "events.jsonl.gz", "rt") as lines:
        listed = [json.loads(line) for line in lines]
    assert listed
    raw = b"".join(bytes.fromhex(event["hex"]) for event in listed)
    events = np.frombuffer(raw, layout.dtype("EVENT"))
    for field, key in (("ID", "type"), ("StreamID", "sid"), ("RnW", "rnw")):
        assert layout.get(events, "EVENT", field).tolist() == [e[key] for e in listed]
    addresses = layout.get(events, "EVENT", "InputAddr").tolist()
    assert addresses == [int(e["iova"], 16) for e in listed]
    assert set(layout.get(events, "EVENT", "S2").tolist()) == {int(name.endswith("s2"))}
    assert set(layout.get(events, "EVENT", "CLASS").tolist()) == {2}


@pytest.mark.parametrize("name", KERNELS)
def test_captured_stream_tables_read_as_the_kernel_meant_them(captures, name):
    meta = json.loads((captures / name / "meta.json").read_text())
    with np.load(captures / name / "pages.npz") as arrays:
        pages = dict(zip(arrays["page_addr"].tolist(), arrays["pages"], strict=True))

    def read(rec, address):
        page = pages[address & ~0xFFF]
        offset = address & 0xFFF
        return layout.unpack(rec, page[offset : offset + layout.record(rec).bytes])

    base = layout.unpack("STRTAB_BASE", int(meta["regs"]["STRTAB_BASE"], 16))["ADDR"]
    cfg = layout.unpack("STRTAB_BASE_CFG", int(meta["regs"]["STRTAB_BASE_CFG"], 16))
    assert (cfg["FMT"], cfg["LOG2SIZE"], cfg["SPLIT"]) == (1, 16, 8)
    for sid in meta["stream_ids_with_translation"]:
        l1 = read("L1STD", base + (sid >> 8) * 8)
        assert l1["Span"] == 9
        ste = read("STE", l1["L2Ptr"] + (sid & 0xFF) * 64)
        assert ste["V"] == 1
        granule = 2 if "16k" in name else 0
        if name.endswith("s2"):
            assert (ste["Config"], ste["S2AA64"], ste["S2TG"]) == (0b110, 1, granule)
            assert ste["S2TTB"] in pages
        else:
            assert (ste["Config"], ste["S1CDMax"], ste["S1CIR"]) == (0b101, 0, 1)
            cd = read("CD", ste["S1ContextPtr"])
            assert (cd["V"], cd["AA64"], cd["R"], cd["A"], cd["EPD1"]) == (1, 1, 1, 1, 1)
            assert (cd["TG0"], cd["SH0"], cd["IR0"], cd["OR0"]) == (granule, 3, 1, 1)
            assert cd["MAIR0"] & 0xFFFFFF == 0x04FF44
            assert cd["TTB0"] in pages


# --- no bit is typed twice ---

#: How code would name a bit of a register or a structure by its number.
LITERALS = re.compile(
    r"""\b(cr0|cr1|cr2|gbpa|irq_ctrl|strtab_base|strtab_base_cfg)\b\W{0,2}\s*(&|>>)\s*(0x)?\d
      | \b(d|descriptor|leaf|raw|tables|inner)\s*(&|\||\^)\s*(\(?1\s*<<|0x[0-9a-fA-F]+|\d{2,})
      | \b(d|descriptor|leaf|tables|inner)\s*>>\s*\d+
      | \b(ste|cd|cmd|words?|guest|record)\w*(\[\d\])?\s*>>\s*\d+\s*&
      | \b(ste|cd|guest)\w*\[\d\]\s*&\s*(\(?1\s*<<|0x[0-9a-fA-F]+|\d)
      | 1\s*<<\s*6[0-3]\b
    """,
    re.VERBOSE,
)
#: Lines that match and type no position: what they hold is no field of layout.py.
NO_FIELDS = (
    "if last - first >= 1 << 63:",  # a size
    "if n > <uint64_t>1 << 62:",  # a size
    "pairs = word & word >> 1 & 0x5555555555555555ULL",  # of a bitmap
    "return _DEVICES[inner >> 2] + reserved",  # of a MAIR byte
)


def sources():
    generated = {"layout.py", "_facts/layout.pxd", "_facts/layout.h", "_facts/why.pxd"}
    for path in sorted(PACKAGE.rglob("*")):
        name = str(path.relative_to(PACKAGE))
        if path.suffix in (".py", ".pyx", ".pxi", ".pxd", ".h") and name not in generated:
            yield path


def test_no_source_types_the_position_of_a_field():
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in sources()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if LITERALS.search(line.partition("#")[0])
        and line.strip() not in NO_FIELDS
    ]
    assert found == []


@pytest.mark.parametrize("line", [
    "if cr0 & 1:", "smmu.cr2 >> 1 & 1", "d | 1 << 10", "d & 0x403", "d >> 6 & 3",
    "config = ste >> 1 & 7", "words[0] >> 1 & 7", "base | 1 << 62", "guest[0] & 1",
])  # fmt: skip
def test_a_position_that_is_typed_is_found(line):
    assert LITERALS.search(line)
