"""decode(): records in every form, messages of Linux, traces of QEMU, and text of no kind at all.

Follows IHI 0070 4, 5, 6.3, 7.3, 8.1; DDI 0487 D8.3.
"""

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import captures
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import smmufast
from smmufast import Event, Features, layout
from smmufast.decode import KINDS, Decoded, DecodeError, command_why, decode

HOME = Path(smmufast.__file__).resolve().parent.parent


def record_of(*dwords):
    """A record from its dwords."""
    return b"".join(dword.to_bytes(8, "little") for dword in dwords)


def one(data, kind=None, **more):
    (found,) = decode(data, kind, **more)
    return found


# --- events ---

TRANSLATION = (0x0000004200000010, 0x0000020000000000, 0x0000123456789000, 0)
ON_A_WALK = (0x0000000700003813, 0x0000118A00000000, 0x00000000DEAD0000, 0x0000000040001000)
STALLED = (0x0000000100000010, 0x0000020880000005, 0x0000000000008000, 0)
BAD_STE = (0x0000000900000004, 0, 0, 0)
CD_FETCH = (0x0000000900002809, 0, 0, 0x0000000080000040)


@pytest.mark.parametrize(
    ("dwords", "text", "said"),
    [
        (TRANSLATION, "unprivileged write to 0x123456789000 by stream 0x42",
         ["not mapped", "fault of stage 1, on the input address"]),
        (ON_A_WALK, "privileged read of 0xdead0000 by stream 0x7, substream 0x3",
         ["stage 2, met on the walk of stage 1", "0x40001000", "might not be read"]),
        (STALLED, "unprivileged read of 0x8000 by stream 0x1",
         ["CMD_RESUME of stream 0x1 with STAG 0x5"]),
        (BAD_STE, "stream 0x9", ["V=0", "smmufast decode --kind ste", "00:01.1"]),
        (CD_FETCH, "stream 0x9, substream 0x2", ["external abort", "S1ContextPtr", "0x80000040"]),
    ],
    ids=lambda value: hex(value[0]) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_worked_events(dwords, text, said):
    found = one(record_of(*dwords))
    assert (found.kind, found.text) == ("event", text)
    assert found.name == layout.event_record(dwords[0] & 0xFF).name
    assert found.fields == Event(found.record).fields
    for words in said:
        assert words in " ".join(str(found).split())


@pytest.mark.parametrize(
    ("dwords", "s2", "class_", "ipa", "stag", "ttrnw"),
    [
        (TRANSLATION, False, "IN", None, None, None),
        (ON_A_WALK, True, "TT", 0x4000_1000, None, True),
        (STALLED, False, "IN", None, 5, None),
        (BAD_STE, None, None, None, None, None),
        ((0x13, 0x0280 << 32, 0x5678, 0x5000), True, "IN", 0x5000, None, None),
        ((0x13, 0x0180 << 32, 0x5678, 0x5000), True, "TT", 0x5000, None, False),
        ((0x10, 0x0080 << 32, 0x5678, 0x5000), True, "CD", 0x5000, None, None),
        ((0x10, 0x0380 << 32, 0x5678, 0x5000), True, "reserved", 0x5000, None, None),
        ((0x0B, 0x0100 << 32, 0x5678, 0x5000), False, "TT", None, None, None),
    ],
)
def test_events_say_stage_class_ipa_and_stall(dwords, s2, class_, ipa, stag, ttrnw):
    event = Event(record_of(*dwords))
    assert (event.s2, event.class_, event.ipa) == (s2, class_, ipa)
    assert (event.stalled, event.stag, event.ttrnw) == (stag is not None, stag, ttrnw)


def test_the_repr_of_an_event_says_what_is_not_usual():
    assert repr(Event(record_of(*TRANSLATION))) == (
        "<Event F_TRANSLATION sid=0x42 iova=0x123456789000 write>"
    )
    assert repr(Event(record_of(*ON_A_WALK))) == (
        "<Event F_PERMISSION sid=0x7 ssid=0x3 iova=0xdead0000 read s2 class=TT descriptor=read "
        "ipa=0x40001000>"
    )
    assert repr(Event(record_of(*STALLED))).endswith("iova=0x8000 read stag=0x5>")
    assert "class=CD ipa=0x5000" in repr(Event(record_of(0x10, 0x80 << 32, 0, 0x5000)))


@pytest.mark.parametrize("number", layout.EVENTS)
def test_every_event_has_a_meaning(number):
    found = one(record_of(number | 7 << 32, 0, 0, 0))
    assert found.name == layout.EVENTS[number].name
    assert len(found.meaning[0]) > 20
    assert found.check
    assert "bits outside" not in str(found)


def test_numbers_without_an_event_are_told_too():
    assert "reserved" in one(record_of(0x7F, 0, 0, 0)).text
    assert "implementation defined" in one(record_of(0xE3, 0, 0, 0)).text


def test_stages_and_classes_that_do_not_go_together():
    found = one(record_of(0x10, 0x0380 << 32, 0, 0))
    assert "S2=1 and CLASS=3 do not go together." in found.meaning
    assert "S2=0 and CLASS=0 do not go together." in one(record_of(0x10, 0, 0, 0)).meaning


# --- commands ---


@pytest.mark.parametrize(
    ("dwords", "name", "text"),
    [
        ((0x0000004200000003, 1), "CFGI_STE", "forget the cached STE of stream 0x42 and its CDs"),
        ((0x0000004700000004, 2), "CFGI_STE_RANGE",
         "forget the cached STEs of streams 0x40 to 0x47 and their CDs"),
        ((0x0000000000000004, 0x1F), "CFGI_ALL", "forget all cached configuration"),
        ((0x0000004200003005, 0), "CFGI_CD",
         "forget the cached CD of stream 0x42, substream 0x3, and the level-1 descriptor"),
        ((0x0012000100000012, 0x12345001), "TLBI_NH_VA",
         "invalidate stage-1 entries (EL1) of VMID 0x1, ASID 0x12 or global for 0x12345000 (what "
         "maps this 4 KiB page), last level only"),
        ((0x0012000100300012, 0x12340701), "TLBI_NH_VA",
         "invalidate stage-1 entries (EL1) of VMID 0x1, ASID 0x12 or global for 0x12340000 to "
         "0x12347fff (32 KiB, 4K granule, level 3), last level only"),
        ((0x0012000100000011, 0), "TLBI_NH_ASID",
         "invalidate stage-1 entries (EL1) of VMID 0x1, ASID 0x12, global ones not"),
        ((0x000000050000002A, 0x40001001), "TLBI_S2_IPA",
         "invalidate stage-2 entries of VMID 0x5 for the IPA 0x40001000 (what maps this 4 KiB "
         "page), last level only"),
        ((0x30, 0), "TLBI_NSNH_ALL",
         "invalidate all Non-secure entries except those of EL2"),
        ((0x0000000100001044, 5), "RESUME",
         "retry the stalled transaction of stream 0x1 with STAG 0x5"),
        ((0x0000000100002044, 5), "RESUME",
         "abort the stalled transaction of stream 0x1 with STAG 0x5"),
        ((0x0000000100000045, 0), "STALL_TERM",
         "abort every stalled transaction of stream 0x1"),
        ((0x000000000FC01046, 0x1000), "SYNC",
         "wait until the commands before are done, then write 0x0 to 0x1000 (without MSIs: "
         "interrupt)"),
        ((0x2046, 0), "SYNC",
         "wait until the commands before are done, then send an event (SEV)"),
        ((0x0000004200003840, 0x34), "ATC_INV",
         "have the device of stream 0x42, substream 0x3 forget its translations of every address"),
        ((0x0000004200000040, 0x12345001), "ATC_INV",
         "have the device of stream 0x42 forget its translations of 0x12344000 to 0x12345fff"),
        ((0x0000004200000041, 0x2007), "PRI_RESP",
         "answer page request group 0x7 of stream 0x42: success"),
        ((0x0000004200000002, 0x5002), "PREFETCH_ADDR",
         "fetch the translation of 4 addresses from 0x5000 for stream 0x42 early"),
    ],
)  # fmt: skip
def test_worked_commands(dwords, name, text):
    found = one(record_of(*dwords))
    assert (found.kind, found.name, found.meaning) == ("command", name, ())
    assert found.text == text


@pytest.mark.parametrize("name", layout.COMMANDS)
def test_every_command_has_words(name):
    found = one(layout.to_bytes("CMD", layout.pack(name)))
    assert found.name == name
    assert len(found.text) > 10
    secure = name in ("TLBI_EL3_ALL", "TLBI_EL3_VA", "TLBI_SNH_ALL") or "_S_" in name
    assert bool(found.meaning) == secure


@pytest.mark.parametrize(
    ("scale", "ds", "lg2"), [(50, 1, 39), (39, 1, 39), (38, 1, 38), (50, 0, 18), (31, 0, 31)]
)
def test_the_scale_of_a_range_is_that_of_the_features(scale, ds, lg2):
    command = layout.pack("TLBI_NH_VA", Address=0, TG=1, SCALE=scale)
    found = one(layout.to_bytes("CMD", command), features=Features(ds=ds))
    assert f"for 0x0 to {(1 << lg2 + 12) - 1:#x} (" in found.text


def test_commands_are_judged_by_the_features():
    command = layout.to_bytes("CMD", layout.pack("TLBI_S2_IPA", IPA=0x1000))
    assert one(command).meaning == ()
    assert one(command, features=Features(s2p=0)).meaning == (
        "Illegal (CERROR_ILL, S4.1.3-2): it needs stage 2 (IDR0.S2P=0).",
    )
    assert "to 0x1fff" in one(
        layout.to_bytes("CMD", layout.pack("TLBI_NH_VA", Address=0x1000, TG=1, TTL=3))
    ).text  # fmt: skip
    assert "4 KiB page" in one(
        layout.to_bytes("CMD", layout.pack("TLBI_NH_VA", Address=0x1000, TG=1, TTL=3)),
        features=Features(ril=0),
    ).text  # fmt: skip
    for command, name in (
        (layout.pack("SYNC", CS=3), "CMD_CS"),
        (0xFE, "CMD_RESERVED"),
        (0x85, "CMD_IMPDEF"),
    ):
        assert command_why(command.to_bytes(16, "little")).name == name
    # what other SMMUs may have is no fault unless the features say so
    for command, feature in (("CFGI_VMS_PIDM", "mpam"), ("DPTI_ALL", "dpt")):
        data = layout.to_bytes("CMD", layout.pack(command))
        assert command_why(data) is None
        assert command_why(data, Features(**{feature: 1})) is None
        assert command_why(data, Features(**{feature: 0})) is not None


# --- structures and page requests ---


def test_page_requests():
    word = layout.pack("PRI", StreamID=0x42, R=1, W=1, Last=1, PRGIndex=9, Address=0x7000)
    found = one(layout.to_bytes("PRI", word), "pri")
    assert found.text == "page request (read, write) for 0x7000 by stream 0x42"
    assert "group 0x9" in found.meaning[0]
    word = layout.pack("PRI", StreamID=0x42, SSV=1, SubstreamID=5, Last=1)
    assert one(layout.to_bytes("PRI", word), "pri").text == (
        "stop marker of stream 0x42, substream 0x5"
    )


def test_structures():
    ste = layout.pack("STE", V=1, Config=5, S1ContextPtr=0x8000_0000)
    found = one(layout.to_bytes("STE", ste), "ste")
    assert "S1ContextPtr=0x80000000" in found.text
    assert found.meaning == ("Stage 1 translates the stream's addresses.",)
    found = one(layout.to_bytes("STE", ste), "ste", features=Features(s1p=0, hyp=0, s2p=1))
    assert "Illegal (C_BAD_STE, S5.2-7): Config=0b101 asks for stage 1" in found.meaning[1]
    assert "C_BAD_STE" in one(bytes(64), "ste").meaning[0]
    cd = layout.pack("CD", V=1, AA64=1, T0SZ=25, EPD1=1, TTB0=0x4000_0000, A=1, R=1)
    found = one(layout.to_bytes("CD", cd), "cd")
    assert found.meaning == (
        "TTB0 translates 0x0 to 0x7fffffffff, from the table at 0x40000000.",
        "The upper half of the address space is disabled (EPD1=1).",
        "On a fault: abort, record an event.",
    )
    assert "C_BAD_CD" in one(bytes(64), "cd").meaning[0]
    assert one("0x800040009", "l1std").text == (
        "level-2 stream table at 0x800040000 with 256 entries"
    )
    assert "not aligned" in one("0x80000004a", "l1std").meaning[0]
    assert "Span=12 is reserved" in one("0xc", "l1std").text
    assert "Span=0" in one("0x0", "l1std").text
    assert one("0xb0000001", "l1cd").text == "table of context descriptors at 0xb0000000"
    assert "C_BAD_SUBSTREAMID" in one("0", "l1cd").meaning[0]


@pytest.mark.parametrize(
    ("d", "arguments", "name", "text"),
    [
        (0, {}, "PTE_S1", "invalid (4K granule)"),
        (0x4321_0703, {"level": 3}, "PTE_S1", "page of 4 KiB at 0x43210000 (4K granule, level 3)"),
        (0x4321_0703, {}, "PTE_S1", "page (at level 3; else a table) at 0x43210000 (4K granule)"),
        (0x4321_0703, {"level": 1}, "PTE_S1_TABLE", "table at 0x43210000 (4K granule, level 1)"),
        (0x4321_0701, {"level": 2}, "PTE_S1", "block of 2 MiB at 0x43200000 (4K granule, level 2)"),
        (0x4321_0701, {"level": 3}, "PTE_S1", "invalid (4K granule, level 3)"),
        (0x4321_0701, {"level": 0}, "PTE_S1", "invalid (4K granule, level 0)"),
        (0x4321_0701, {"level": 1, "granule": "16K"}, "PTE_S1",
         "invalid (16K granule, level 1)"),
        (0x4321_1703, {"level": 3, "granule": "64K"}, "PTE_S1",
         "page of 64 KiB at 0x1000043210000 (64K granule, level 3)"),
        (0x4321_0703, {"level": 3, "granule": "16K", "stage": 2}, "PTE_S2",
         "page of 16 KiB at 0x43210000 (16K granule, level 3)"),
        (0x4321_0703, {"level": 2, "stage": 2}, "PTE_S2_TABLE",
         "table at 0x43210000 (4K granule, level 2)"),
    ],
)  # fmt: skip
def test_translation_table_descriptors(d, arguments, name, text):
    found = one(hex(d), "pte", **arguments)
    assert (found.kind, found.name, found.text) == ("pte", name, text)
    assert "Addr_" not in str(found)


def test_descriptors_say_access_and_type():
    d = layout.pack("PTE_S1", Valid=1, Type=1, AP=3, UXN=1, AttrIndx=2, DBM=1, Contiguous=1)
    said = " ".join(one(hex(d), "pte", level=3).meaning)
    assert "Access: read for all." in said
    assert "Never executed by unprivileged code." in said
    assert "byte 2 of MAIR" in said
    assert "AF=0" in said
    assert "DBM=1" in said
    assert "Contiguous=1" in said
    d = layout.pack("PTE_S2", Valid=1, Type=1, AF=1, S2AP=1, MemAttr=15)
    said = " ".join(one(hex(d), "pte", level=3, stage=2).meaning)
    assert "Access: read; execution permitted." in said
    assert "OWB_IWB" in said
    table = layout.pack("PTE_S1_TABLE", Valid=1, Type=1, APTable=2)
    assert "APTable1=1: nothing below is writable" in one(hex(table), "pte", level=1).meaning[0]


# --- words ---


FORMS = [
    "0x0000004200000010 0x0000020000000000 0x0000123456789000 0x0000000000000000",
    "0000004200000010 0000020000000000 0000123456789000 0000000000000000",
    "0x4200000010,0x20000000000,0x123456789000,0",
    f"{0x4200000010} {0x20000000000} {0x123456789000} 0",
    "0x00000010 0x00000042 0x00000000 0x00000200 0x56789000 0x00001234 0x00000000 0x00000000",
    record_of(*TRANSLATION).hex(" "),
    record_of(*TRANSLATION).hex(),
    record_of(*TRANSLATION).hex().upper(),
    hex(int.from_bytes(record_of(*TRANSLATION), "little")),
    record_of(*TRANSLATION),
    bytearray(record_of(*TRANSLATION)),
    memoryview(record_of(*TRANSLATION)),
]


@pytest.mark.parametrize("data", FORMS, ids=range(len(FORMS)))
def test_the_forms_of_one_record(data):
    assert one(data, "event").record == record_of(*TRANSLATION)
    assert one(data).record == record_of(*TRANSLATION)


def test_several_records_and_units():
    words = " ".join(f"{dword:#x}" for dword in (*TRANSLATION, *BAD_STE))
    for data in (words, record_of(*TRANSLATION, *BAD_STE)):
        assert [found.name for found in decode(data, "event")] == ["F_TRANSLATION", "C_BAD_STE"]
    assert one("0x10 0x42 0 0x200 0 0 0 0", "event", unit=32).text.endswith("by stream 0x42")
    assert one("0x46 0", unit=64).name == "SYNC"
    assert one("70 0").name == "SYNC"
    assert one("0x46" + " 0" * 15, unit=8).name == "SYNC"
    assert one("46" + " 00" * 15, unit=8).name == "SYNC"


def test_a_number_is_hexadecimal_after_0x_and_in_a_dump_alone():
    assert one("16 0 0 0", "event").name == one("0x10 0 0 0", "event").name == "F_TRANSLATION"
    assert one("10 00 00 00 00 00 00 00", "pte").record == bytes([0x10, *[0] * 7])
    assert one("10", "pte").record == bytes([10, *[0] * 7])
    assert one("0000000000000010", "pte").record == bytes([0x10, *[0] * 7])
    assert one("11", "pte", unit=8 * 8).record[0] == 11
    unclear = ("0000000900000004 0 0 0", "9a 0 0 0", "0x10 00000042", "10 00", "010 0")
    for text in unclear:
        with pytest.raises(DecodeError, match="0x and hexadecimal digits, or decimal ones"):
            decode(text, "event")


def test_eight_digits_are_words_unless_they_make_a_record_as_dwords():
    assert one("00000046 00000000 00000000 00000000").name == "SYNC"
    assert one("00000046 00000000", "command").name == "SYNC"
    assert one("00000010 00000000 00000000 00000000", "event").name == "F_TRANSLATION"


@pytest.mark.parametrize(
    ("data", "arguments", "problem"),
    [
        ("", {"kind": "event"}, "words must be numbers, not nothing"),
        ("10 xyz", {"kind": "event"}, "words must be numbers, not 'xyz'"),
        ("hello", {"unit": 64}, "words must be numbers, not 'hello'"),
        ("1 2 3", {}, "kind must be named for 24 bytes (an event is 32, a command "),
        ("1", {}, "kind must be 'l1std', 'l1cd' or 'pte' for 8 bytes, not None"),
        ("1 2 3 4 5 6 7 8", {}, "kind must be 'ste', 'cd' or 'event' for 64 bytes, not None"),
        (
            "1 2 3",
            {"kind": "command"},
            "words must be 16 bytes for each record of kind command, not 24",
        ),
        (b"", {"kind": "pte"}, "words must be 8 bytes for each record of kind pte, not 0"),
        (b"", {}, "kind must be named for 0 bytes"),
        ("1 0x100000000", {"unit": 32}, "100000000 does not fit 32 bits"),
        ("1 2", {"unit": 16}, "unit must be 64, 32 or 8, not 16"),
        ("1 2", {"kind": "ste2"}, "kind must be 'event', 'command', 'pri'"),
        ("1 2", {"kind": "event", "stage": 3}, "stage must be 1 or 2, not 3"),
        ("1 2", {"granule": "8K"}, "granule must be '4K', '16K' or '64K', not '8K'"),
        ("1 2", {"level": 4}, "level must be -1, 0, 1, 2 or 3, not 4"),
        ("1 2", {"stage": True}, "stage must be 1 or 2, not True"),
        ("1234567890abcdef1", {}, "17 digits are no whole number of bytes"),
        ("0x1234567890abcdef12 1234567890abcdef1", {}, "17 digits are no whole number of bytes"),
        ("1234567890abcdef12", {"unit": 64}, "18 digits does not fit 64 bits"),
    ],
)
def test_bad_words_are_one_clear_error(data, arguments, problem):
    with pytest.raises(DecodeError) as caught:
        decode(data, **arguments)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_numbers_than_the_limit_are_refused(monkeypatch):
    monkeypatch.setattr("smmufast.decode.MOST_WORDS", 8)
    assert len(decode("0 0 0 0 0 0 0 0", "event")) == 2
    with pytest.raises(DecodeError, match="words must be up to 8 numbers, not more"):
        decode("0 " * 9, "event")


def test_features_are_features():
    with pytest.raises(TypeError, match="features must be Features or None, not 'x'"):
        decode("0x46 0", features="x")


def test_what_is_neither_text_nor_bytes_is_a_type_error():
    with pytest.raises(TypeError, match="data must be str or bytes, not 5"):
        decode(5)


def test_as_dict_is_plain():
    shown = one(record_of(*ON_A_WALK)).as_dict()
    assert shown["record"] == record_of(*ON_A_WALK).hex()
    assert shown["fields"]["IPA"] == 0x4000_1000
    assert set(shown) == {
        "kind", "name", "text", "meaning", "check", "fields", "record", "told", "line", "source",
        "client",
    }  # fmt: skip


# --- messages of Linux ---

SMMU = "arm-smmu-v3 arm-smmu-v3.2.auto"


def raw_lines(dwords, device=SMMU, number=None):
    """What the driver prints of a record."""
    number = dwords[0] & 0xFF if number is None else number
    return [
        f"{device}: event 0x{number:02x} received:",
        *(f"{device}: \t0x{dword:016x}" for dword in dwords),
    ]


TOLD = [
    f"{SMMU}: event: F_PERMISSION client: 0000:01:00.0 sid: 0x7 ssid: 0x3 iova: 0xdead0000 "
    "ipa: 0x40001000",
    f'{SMMU}: priv data read s2 "Stage 1 translation table fetch" ttd_read stag: 0x0',
]
DECORATIONS = {
    "plain": "{}",
    "dmesg": "[  131.474962] {}",
    "journal": "Nov 24 01:56:02 host kernel: {}",
    "level": "<3>[  131.474962] {}",
    "quoted": "> > > [  131.4] {}",
    "thread": "[   12.345678][  T123] {}",
    "carriage return": "{}\r",
}


@pytest.mark.parametrize("decoration", DECORATIONS)
def test_raw_events_are_found_behind_any_prefix(decoration):
    log = "\n".join(DECORATIONS[decoration].format(line) for line in raw_lines(ON_A_WALK))
    found = one(log)
    assert found.record == record_of(*ON_A_WALK)
    assert (found.line, found.source, found.told) == (1, "arm-smmu-v3.2.auto", False)


@pytest.mark.rule("L-4")
@pytest.mark.parametrize("decoration", DECORATIONS)
def test_events_in_words_make_the_same_record(decoration):
    log = "\n".join(DECORATIONS[decoration].format(line) for line in TOLD)
    found = one(log)
    assert (found.told, found.client, found.line) == (True, "0000:01:00.0", 1)
    assert found.record == record_of(*ON_A_WALK)
    assert "as far as the message tells it" in str(found)


def test_newer_kernels_print_both_and_it_is_one_event():
    found = one("\n".join([*raw_lines(ON_A_WALK), *TOLD]))
    assert (found.record, found.told) == (record_of(*ON_A_WALK), False)
    assert found.client == "0000:01:00.0"
    assert "client 0000:01:00.0" in str(found)
    # the same event twice is two
    assert len(decode("\n".join([*raw_lines(ON_A_WALK), *TOLD] * 2))) == 2
    # words of another event stand alone
    other = TOLD[0].replace("sid: 0x7", "sid: 0x8")
    assert [f.text[-25:] for f in decode("\n".join([*raw_lines(ON_A_WALK), other, TOLD[1]]))] == [
        "stream 0x7, substream 0x3", "stream 0x8, substream 0x3",
    ]  # fmt: skip


def test_other_lines_between_do_not_matter():
    first, second = raw_lines(TRANSLATION), raw_lines(BAD_STE, "arm-smmu-v3 2b400000.smmu")
    log = ["usb 1-1: new device", first[0], second[0], "audit: type=1400 0x0123456789abcdef"]
    for a, b in zip(first[1:], second[1:], strict=True):
        log += [a, "nvme nvme0: I/O 12 QID 3 timeout", b]
    found = decode("\n".join(log))
    assert [f.record for f in found] == [record_of(*TRANSLATION), record_of(*BAD_STE)]
    assert [f.source for f in found] == ["arm-smmu-v3.2.auto", "2b400000.smmu"]


def test_a_record_that_is_cut_off_is_told_as_far_as_it_goes():
    cut, whole = decode("\n".join([*raw_lines(STALLED)[:3], *raw_lines(BAD_STE)]))
    assert whole.record == record_of(*BAD_STE)
    assert (cut.name, cut.record, cut.told, cut.line) == ("F_TRANSLATION", None, True, 1)
    assert cut.text == "stream 0x1; cut off: 2 of 4 dwords are in the log"
    # what is in the dwords that are missing is not told, not even as 0
    assert cut.fields == {
        "ID": 0x10, "SSV": 0, "SubstreamID": 0, "StreamID": 1, "STAG": 5, "Stall": 1, "PnU": 0,
        "InD": 0, "RnW": 1, "NSIPA": 0, "S2": 0, "CLASS": 2,
    }  # fmt: skip
    assert "What is there says ID=0x10, StreamID=1, STAG=5, Stall=1, RnW=1, CLASS=2." in cut.meaning
    three = one("\n".join(raw_lines(TRANSLATION)[:4]))
    assert three.text.startswith("stream 0x42, address 0x123456789000; cut off: 3 of 4")
    # without the line that announces it, four dwords are needed to be sure
    assert decode("\n".join(raw_lines(TRANSLATION)[1:4])) == []


@pytest.mark.parametrize("number", [*layout.EVENTS, 0x00, 0x0F, 0xE0, 0xFF])
def test_every_event_may_be_cut_off_anywhere(number):
    rec = layout.EVENTS.get(number)
    for count in range(4):
        lines = raw_lines((number | 7 << 32, 0, 0, 0))[: 1 + count]
        lines[0] = lines[0].replace("0x38", f"{number:#04x}")
        found = one("\n".join(lines).replace("event 0x10", f"event {number:#04x}"))
        assert found.name == (f"event {number:#04x}" if rec is None else rec.name)
        assert found.record is None
        assert f"{count} of 4" in found.text if count else "is not in the log" in found.text


def test_a_command_that_is_cut_off_is_named():
    log = [f"{SMMU}: skipping command in error state:", f"{SMMU}: \t0x0000000000000012"]
    skipped = "a command of the queue was skipped"
    assert one("\n".join(log)).text == f"{skipped}; cut off: 1 of 2 dwords are in the log"
    assert one("\n".join(log)).name == "TLBI_NH_VA"
    assert one(log[0]).text == f"{skipped}; its record is not in the log"
    assert one("\n".join([log[0], log[1].replace("12", "ff")])).name == "opcode 0xff"


def test_lines_that_only_announce_events_name_them():
    dwords = (TRANSLATION, TRANSLATION, BAD_STE)
    found = decode("\n".join(raw_lines(record)[0] for record in dwords))
    assert [f.name for f in found] == ["F_TRANSLATION", "F_TRANSLATION", "C_BAD_STE"]
    assert [f.line for f in found] == [1, 2, 3]
    # words of the same event behind it say more, those of another do not replace it
    assert [f.told for f in decode("\n".join([raw_lines(ON_A_WALK)[0], *TOLD]))] == [True]
    other = [TOLD[0].replace("sid: 0x7", "sid: 0x8"), TOLD[1]]
    assert len(decode("\n".join([*raw_lines(ON_A_WALK)[:2], *other]))) == 2


def wrapped(lines, width, prefix="> "):
    """Lines as a mailer breaks and quotes them."""
    out = []
    for line in lines:
        out += textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(prefix + line for line in out)


@pytest.mark.parametrize("stamp", ["[ 1478.907684] ", "Nov 24 01:56:02 build-17 kernel: "])
@pytest.mark.parametrize("prefix", ["", "> ", "> > > ", ">>>> ", "> | "])
@pytest.mark.parametrize("width", [66, 72, 78])
def test_mail_that_is_quoted_and_wrapped(stamp, prefix, width):
    lines = ["usb 1-1: new high-speed USB device number 2 using xhci_hcd, and more than fits"]
    lines += [*raw_lines(ON_A_WALK), *TOLD, *raw_lines(BAD_STE)[:3]]
    lines += ["hisi_zip 0000:31:00.0: qm_axi_rresp [error status=0x1] found and told"]
    lines += [f"{SMMU}: CMD_SYNC timeout at 0x0000b1b7 [hwprod 0x0000b1c0, hwcons 0x0000b1b7]"]
    found = decode(wrapped([stamp + line.replace("\t", " ") for line in lines], width, prefix))
    assert [f.name for f in found] == ["F_PERMISSION", "C_BAD_STE", "CMD_SYNC timeout"]
    assert found[0].record == record_of(*ON_A_WALK)
    assert found[0].client == "0000:01:00.0"
    assert found[1].text == "stream 0x9; cut off: 2 of 4 dwords are in the log"
    assert found[2].fields["PROD"] == 0xB1C0


def test_a_time_stamp_may_stand_on_both_sides_of_a_break():
    lines = raw_lines(STALLED)
    text = "\n".join(f"> {f'47{i}.913691] ' * bool(i)}{line} [" for i, line in enumerate(lines))
    assert one(text).record == record_of(*STALLED)


def test_words_of_the_next_line_are_not_taken_for_a_wrapped_one():
    log = ["smmuv3_record_event SMMU_EVT_C_BAD_CD sid=0x10", "pci sid=0x20, nothing of it"]
    assert one("\n".join(log)).fields["StreamID"] == 0x10


JOURNALS = {
    "json": lambda lines: "\n".join(
        json.dumps({"PRIORITY": "3", "MESSAGE": line, "_HOSTNAME": "x"}) for line in lines
    ),
    "bytes": lambda lines: "\n".join(
        json.dumps({"MESSAGE": list(line.encode())}) for line in lines
    ),
    "pretty": lambda lines: "\n".join(
        '{\n\t"PRIORITY" : "3",\n\t"MESSAGE" : ' + json.dumps(line) + ',\n\t"_PID" : "1"\n}'
        for line in lines
    ),
    "sse": lambda lines: "\n".join("data: " + json.dumps({"MESSAGE": line}) for line in lines),
    "seq": lambda lines: "\n".join("\x1e" + json.dumps({"MESSAGE": line}) for line in lines),
    "dmesg": lambda lines: json.dumps(
        {"dmesg": [{"pri": 3, "time": 1.5, "msg": line} for line in lines]}, indent=3
    ),
    "dmesg in a line": lambda lines: json.dumps({"dmesg": [{"msg": line} for line in lines]}),
    "container": lambda lines: "\n".join(
        json.dumps({"log": line + "\n", "stream": "stdout"}) for line in lines
    ),
}


@pytest.mark.parametrize("form", JOURNALS)
def test_a_journal_in_json(form):
    lines = ["usb 1-1: new device", *raw_lines(ON_A_WALK, "arm-smmu-v3 70c0.iommu"), *TOLD]
    first, second = decode(JOURNALS[form](lines))
    assert (first.record, first.source) == (record_of(*ON_A_WALK), "70c0.iommu")
    assert second.record == record_of(*ON_A_WALK)


def test_json_that_is_none_does_no_harm():
    for text in ('{"MESSAGE": ', '{"a": [' + "[" * 100_000, '{"MESSAGE": null}', '"MESSAGE" : [1,',
                 '{"MESSAGE": [300, "x", {"msg": 5}]}', '["' + "a" * 100):  # fmt: skip
        assert decode(text + "\nx y") == []


SECURE = """\
[error] smmuid:2 unexpected global error reported (0x00000001), this could be serious
[error] smmuid:2 CMDQ error (cons 0x01000022): Illegal command
[error] smmuid:2 skipping command in error state:
[error] \t0x0000000500000004
[error] \t0x0000000000000001
[error] smmuid:2 EVTQ overflow detected -- events lost
"""


def test_a_secure_driver_numbers_its_smmus():
    found = decode(SECURE)
    assert [f.source for f in found] == ["smmuid:2"] * 4
    assert [f.name for f in found] == ["GERROR", "CERROR_ILL", "CFGI_STE_RANGE", "EVTQ overflow"]
    assert found[2].text == "forget the cached STEs of streams 0x4 to 0x7 and their CDs"


def test_a_page_request_without_its_second_line_and_without_permissions():
    head = f"{SMMU}: unexpected PRI request received:"
    assert "not in the log" in one(head).text
    line = f"{SMMU}: \tsid 0x00000300.0x00000: [9L] privileged  access at iova 0x0000000000007000"
    for text in (line, line.replace("  access", " access")):
        assert one(f"{head}\n{text}").text == "privileged page request (no access) for 0x7000 by " \
            "stream 0x300"  # fmt: skip
    assert len(decode(f"{head}\n{line}\n{head}")) == 2


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("start=0x256 - end=0x511", 256, 511),  # decimal digits behind 0x
        ("start=0x100 - end=0x1ff", 0x100, 0x1FF),
        ("start=0x0 - end=0x-1", 0, 0xFFFF_FFFF),
        ("start=0x0 - end=0xffffffff", 0, 0xFFFF_FFFF),
        ("start=0x8 - end=0x9", 8, 9),
        ("start=0x16 - end=0x31", 16, 31),
        ("start=0x5 - end=0x9", 5, 9),  # no range in either
    ],
)
def test_an_old_trace_has_decimal_digits_behind_0x(text, start, end):
    found = one(f"smmuv3_cmdq_cfgi_ste_range {text}")
    assert (found.fields["start"], found.fields["end"]) == (start, end)


def test_numbers_of_a_trace_without_an_equals_sign():
    assert one("smmuv3_config_cache_inv Config cache INV for sid 24").fields == {"sid": 24}
    found = one("smmu_configs_inv_sid_range Config cache INV SID range from 0x10 to 0x1f")
    assert found.fields == {"start": 0x10, "end": 0x1F}


def test_what_is_behind_the_limit_is_told_to_be_left_out():
    log = "\n".join(raw_lines(BAD_STE) * 3)
    found = decode(log, limit=2)
    assert [f.kind for f in found] == ["event", "event", "limit"]
    assert (found[2].line, "line 11" in found[2].text) == (11, True)
    assert [f.kind for f in decode(log, limit=3)] == ["event"] * 3
    records = decode(record_of(*BAD_STE) * 3, "event", limit=1)
    assert records[1].text == "2 records more: after 1 findings the rest is left out"
    for bad in (0, -1, "2", None):
        with pytest.raises((TypeError, ValueError), match="limit must be"):
            decode(log, limit=bad)


def test_the_announcing_line_may_be_missing():
    assert one("\n".join(raw_lines(TRANSLATION)[1:])).record == record_of(*TRANSLATION)
    # but four numbers of anybody are no event
    assert decode("\n".join(raw_lines(TRANSLATION, "foo bar")[1:])) == []
    assert decode("\n".join(raw_lines((0, 0, 0, 0))[1:])) == []


def test_bare_dwords_after_the_announcing_line():
    lines = raw_lines(TRANSLATION)
    log = [lines[0], *(line.split("\t")[1] for line in lines[1:])]
    assert one("\n".join(log)).record == record_of(*TRANSLATION)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("event: C_BAD_STE client: (unassigned sid) sid: 0x9 ssid: 0x0", BAD_STE),
        ("event: F_CD_FETCH client: 0000:01:00.0 sid: 0x9 ssid: 0x2 fetch_addr: 0x80000040",
         CD_FETCH),
    ],
)  # fmt: skip
def test_events_of_one_line(words, expected):
    assert one(f"{SMMU}: {words}").record == record_of(*expected)


def test_an_event_whose_second_line_is_lost_has_no_record():
    found = one(TOLD[0])
    assert found.record is None
    assert found.fields == {
        "StreamID": 7, "SSV": 1, "SubstreamID": 3, "InputAddr": 0xDEAD_0000, "IPA": 0x4000_1000,
    }  # fmt: skip
    assert found.text == "stream 0x7, substream 0x3, address 0xdead0000"


def test_stalls_and_writes_in_words():
    log = [
        f"{SMMU}: event: F_TRANSLATION client: x sid: 0x1 ssid: 0x0 iova: 0x8000 ipa: 0x0",
        f'{SMMU}: unpriv inst read s1 "Input address caused fault" stall stag: 0x5',
    ]
    event = Event(one("\n".join(log)).record)
    assert (event.stalled, event.stag, event.fields["InD"], event.write) == (True, 5, 1, False)


def test_command_errors_name_the_command():
    command = layout.pack("ATC_INV", StreamID=0x42, Size=52)
    log = [
        f"{SMMU}: unexpected global error reported (0x00000001), this could be serious",
        f"{SMMU}: CMDQ error (cons 0x01000022): Illegal command",
        f"{SMMU}: skipping command in error state:",
        f"{SMMU}: \t0x{command & (1 << 64) - 1:016x}",
        f"{SMMU}: \t0x{command >> 64:016x}",
    ]
    error, cerror, skipped = decode("\n".join(log), features=Features(ats=0))
    assert (error.kind, error.fields["CMDQ_ERR"]) == ("gerror", 1)
    assert "global errors CMDQ_ERR" in error.text
    assert (cerror.name, cerror.fields) == ("CERROR_ILL", {"ERR": 1, "RD": 0x22})
    assert (skipped.name, skipped.line) == ("ATC_INV", 3)
    assert skipped.meaning == ("Illegal (CERROR_ILL, S4.5.1-7): it needs ATS (IDR0.ATS=0).",)


@pytest.mark.parametrize(
    ("cons", "name", "what"),
    [
        (0x0000_0022, "CERROR_NONE", "no error"),
        (0x0200_0022, "CERROR_ABT", "could not be read"),
        (0x0300_0022, "CERROR_ATC_INV_SYNC", "not answered in time"),
        (0x7F00_0022, "CMDQ error", "unknown code"),
    ],
)
def test_command_error_codes(cons, name, what):
    found = one(f"{SMMU}: CMDQ error (cons 0x{cons:08x}): whatever")
    assert found.name == name
    assert what in found.text


def test_a_sync_that_does_not_complete():
    line = f"{SMMU}: CMD_SYNC timeout at 0x0000b1b7 [hwprod 0x0000b1c0, hwcons 0x{{}}]"
    found = one(line.format("0000b1b7"))
    assert found.kind == "sync_timeout"
    assert "consumed every command before the SYNC" in found.meaning[0]
    found = one(line.format("0000b100"))
    assert "stands at index 0xb100, not at the SYNC" in found.meaning[0]
    found = one(line.format("0300b1b7"))
    assert "CONS.ERR is 3" in found.meaning[1]
    found = one(f"{SMMU}: CMD_SYNC timeout")  # of older kernels
    assert (found.kind, found.fields) == ("sync_timeout", {})
    assert "does not say where" in found.text


def test_global_errors():
    bits = layout.pack("GERROR", EVENTQ_ABT_ERR=1, SFM_ERR=1)
    log = [
        f"{SMMU}: unexpected global error reported (0x{bits:08x}), this could be serious",
        f"{SMMU}: device has entered Service Failure Mode!",
        f"{SMMU}: EVTQ write aborted -- events may have been lost",
        f"{SMMU}: PRIQ MSI write aborted",
        "arm-smmu-v3 other: CMDQ MSI write aborted",
    ]
    found = decode("\n".join(log))
    # what the line of all bits has told is not told again
    assert [f.line for f in found] == [1, 4, 5]
    assert "EVENTQ_ABT_ERR, SFM_ERR" in found[0].text
    assert "MSI_PRIQ_ABT_ERR" in found[1].text
    assert "MSI_CMDQ_ABT_ERR" in found[2].text
    assert "no error that has a name" in one(
        f"{SMMU}: unexpected global error reported (0x80000000), this could be serious"
    ).text  # fmt: skip


def test_overflows_and_page_requests():
    log = [
        f"{SMMU}: EVTQ overflow detected -- events lost",
        f"{SMMU}: PRIQ overflow detected -- requests lost",
        f"{SMMU}: unexpected PRI request received:",
        f"{SMMU}: \tsid 0x00000042.0x00003: [9L] unprivileged RW access at iova 0x0000000000007000",
    ]
    events, requests, request = decode("\n".join(log))
    assert (events.kind, events.name, requests.name) == (
        "overflow", "EVTQ overflow", "PRIQ overflow",
    )  # fmt: skip
    word = layout.pack(
        "PRI", StreamID=0x42, SSV=1, SubstreamID=3, PRGIndex=9, Last=1, R=1, W=1, Address=0x7000
    )
    assert (request.kind, request.record) == ("pri", layout.to_bytes("PRI", word))
    assert decode(log[3].replace("[9L]", "[999L]")) == []


# --- traces of QEMU ---


@pytest.mark.parametrize(
    ("line", "kind", "name", "text"),
    [
        ("smmuv3_record_event SMMU_EVT_F_TRANSLATION sid=0x10", "event", "F_TRANSLATION",
         "stream 0x10"),
        ("smmuv3_record_event F_TRANSLATION sid=16", "event", "F_TRANSLATION", "stream 0x10"),
        ("2@1600000000.5:smmuv3_record_event sec_sid=0 SMMU_EVT_C_BAD_CD sid=0x10", "event",
         "C_BAD_CD", "stream 0x10"),
        ("smmuv3-iommu-memory-region-8-0 translation failed for iova=0xabc (SMMU_EVT_F_ADDR_SIZE)",
         "event", "F_ADDR_SIZE", "address 0xabc"),
        ("smmuv3_cmdq_opcode <--- SMMU_CMD_TLBI_NH_VA", "command", "TLBI_NH_VA",
         "consumed: NS-EL1, stage 1, by address and ASID"),
        ("smmuv3_cmdq_consume_error Error on SMMU_CMD_CFGI_STE command execution: 1",
         "cmdq_error", "CERROR_ILL",
         "the command queue stopped (SMMU_CMD_CFGI_STE): the command is illegal"),
        ("smmuv3_translate_success smmuv3-iommu-memory-region-8-0 sid=0x8 iova=0xfffff000 "
         "translated=0x43210000 perm=0x3 stage=1", "trace", "smmuv3_translate_success",
         "the transaction was translated: sid=8, iova=0xfffff000, translated=0x43210000, perm=3, "
         "stage=1"),
        ("smmuv3_cmdq_cfgi_ste streamid= 0x10", "trace", "smmuv3_cmdq_cfgi_ste",
         "CFGI_STE: the cached STE of a stream is forgotten: streamid=0x10"),
        ("smmuv3_range_inval vmid=0 asid=-1 addr=0xfff0000 tg=1 num_pages=0x1 ttl=3 leaf=1 stage=1",
         "trace", "smmuv3_range_inval",
         "TLB entries of a range of addresses are dropped: vmid=0, asid=-1, addr=0xfff0000, tg=1, "
         "num_pages=1, ttl=3, leaf=1, stage=1"),
        ("smmuv3_write_mmio addr: 0x88 val:0x10210 size: 0x4(0)", "trace", "smmuv3_write_mmio",
         "a register was written: STRTAB_BASE_CFG is 0x10210 (LOG2SIZE=0x10, SPLIT=8, FMT=1)"),
        ("smmuv3_write_mmio addr: 0x84 val:0x1 size: 0x4(0)", "trace", "smmuv3_write_mmio",
         "a register was written: STRTAB_BASE, upper half, is 0x1"),
        ("smmuv3_read_mmio addr: 0x8000 val:0x1 size: 0x4(0)", "trace", "smmuv3_read_mmio",
         "a register was read: offset 0x8000 is 0x1"),
        ("smmuv3_write_gerror toggled=0x1, new GERROR=0x1", "trace", "smmuv3_write_gerror",
         "global errors changed: CMDQ_ERR"),
        ("smmuv3_trigger_irq irq=3", "trace", "smmuv3_trigger_irq",
         "an interrupt was raised: global errors"),
        ("smmu_ptw_page_pte stage=1 level=3 iova=0x1000 base@=0x2000 pte@=0x2008 pte=0x4321074f "
         "page address = 0x43210000", "trace", "smmu_ptw_page_pte",
         "the walk ended at a page: stage=1, level=3, iova=0x1000, base=0x2000, pte=0x4321074f, "
         "address=0x43210000"),
        ("smmuv3_cmdq_tlbi_nsnh ", "trace", "smmuv3_cmdq_tlbi_nsnh",
         "TLBI_NSNH_ALL: all entries are dropped"),
        ("smmuv3_notify_flag_add ADD SMMUNotifier node for iommu mr=smmuv3-0", "trace",
         "smmuv3_notify_flag_add",
         "a listener (such as VFIO or vhost) was added to a stream"),
    ],
)  # fmt: skip
def test_lines_of_the_trace(line, kind, name, text):
    found = one(line)
    assert (found.kind, found.name, found.text) == (kind, name, text)
    # only an event that has no more to it can be put together
    assert (found.record is not None) == (name == "C_BAD_CD")


def test_a_traced_walk_says_what_its_descriptor_permits():
    line = "smmu_ptw_page_pte stage={} level=3 iova=0x1000 base@=0x2000 pte@=0x2008 pte={}"
    assert one(line.format(1, "0x43210747")).meaning == (
        "Access: read and write for all; AF=1.",
    )  # fmt: skip
    assert one(line.format(2, "0x43210747")).meaning == ("Access: read; AF=1.",)
    assert one(line.format(1, "0x0")).meaning == (
        "The descriptor's bit 0 is 0: nothing is mapped here.",
    )  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "hello, world",
        "arm-smmu-v3 fc900000.iommu: ias 48-bit, oas 44-bit (features 0x00001fef)",
        "arm-smmu-v3 fc900000.iommu: allocated 65536 entries for cmdq",
        "smmuv3_translate(SMMUState *s)",
        "smmuv3_something_new sid=0x10",
        "smmuv3_record_event nothing",
        "smmuv3_cmdq_opcode <--- SMMU_CMD_NEW_THING",
        "smmuv3_record_event F_NEW sid=1",
        "smmuv3_record_event F_ACCESS sid=0x100000000",
        f"{SMMU}: event: F_ACCESS client: x sid: 0x100000000 ssid: 0x0 iova: 0x0 ipa: 0x0",
        f'{SMMU}: priv data read s2 "Input address caused fault" stag: 0x0',
    ],
)
def test_lines_that_tell_nothing_are_left_out(text):
    assert decode(text + "\nx y z") == []


# --- everything else ---


def test_a_mixed_log_is_in_order():
    log = ["boot", *raw_lines(TRANSLATION), *TOLD, "x", "smmuv3_record_event F_ACCESS sid=0x1"]
    assert [(f.name, f.line) for f in decode("\n".join(log))] == [
        ("F_TRANSLATION", 2), ("F_PERMISSION", 7), ("F_ACCESS", 10),
    ]  # fmt: skip


PIECES = [
    *raw_lines(ON_A_WALK), *TOLD, "smmuv3_record_event", "smmuv3_write_mmio addr: 0x88 val:",
    "smmu_ptw_page_pte stage=1 level=3 pte=0x3", f"{SMMU}: CMDQ error (cons 0x", "0x01000022)",
    f"{SMMU}: skipping command in error state:", f"{SMMU}: unexpected global error reported (0x1)",
    f"{SMMU}: CMD_SYNC timeout at 0x1 [hwprod 0x1, hwcons 0x1]", "EVTQ overflow detected",
    f"{SMMU}: sid 0x42.0x3: [9L] unprivileged RW access at iova 0x7000", "-1", "0x" + "f" * 40,
    "smmuv3_write_gerror toggled=0xffffffffffffffff", "smmuv3_trigger_irq irq=-1",
    "translation failed for iova=0x1 (F_ACCESS)", "\x00", "\udcff", "\N{ARABIC-INDIC DIGIT ONE}",
]  # fmt: skip
SCRAPS = st.lists(
    st.sampled_from(PIECES) | st.text(max_size=12) | st.from_regex(r"(0x)?[0-9a-f]{1,20}"),
    max_size=12,
)
OPTIONS = {
    "kind": st.sampled_from([None, *KINDS]),
    "unit": st.sampled_from([None, 64, 32, 8]),
    "stage": st.sampled_from([1, 2]),
    "granule": st.sampled_from(["4K", "16K", "64K"]),
    "level": st.sampled_from([None, -1, 0, 1, 2, 3]),
    "features": st.sampled_from([None, Features(), Features(ds=0, ril=0, s1p=0, hyp=0)]),
}


def tried(data, options):
    """What decode gives; nothing but its own error comes out, and everything can be shown."""
    try:
        found = decode(data, **options)
    except DecodeError as error:
        assert "\n" not in str(error)
        return
    for decoded in found:
        assert isinstance(decoded, Decoded)
        assert str(decoded).startswith(decoded.name)
        str(decoded).encode("ascii")
        assert decoded.as_dict()["kind"] == decoded.kind


@given(SCRAPS, st.sampled_from(["\n", " ", ""]), st.fixed_dictionaries({}, optional=OPTIONS))
@example(["smmuv3_read_mmio addr: -5 val:-5"], " ", {})
@example(["0x" + "f" * 64], " ", {"kind": "pte"})
def test_no_text_does_harm(scraps, between, options):
    tried(between.join(scraps), options)


@given(st.binary(max_size=160), st.fixed_dictionaries({}, optional=OPTIONS))
def test_no_bytes_do_harm(data, options):
    tried(data, options)
    tried(data.hex(" "), options)


@given(st.sampled_from(KINDS), st.data(), st.fixed_dictionaries({}, optional=OPTIONS))
def test_every_record_can_be_shown(kind, data, options):
    size = {"event": 32, "command": 16, "pri": 16, "ste": 64, "cd": 64}.get(kind, 8)
    record = data.draw(st.binary(min_size=size, max_size=size))
    found = one(record, kind, **{k: v for k, v in options.items() if k not in ("kind", "unit")})
    assert found.record == record
    assert found.kind == kind
    assert str(found)


@pytest.mark.parametrize(
    "line",
    ["a" * 200_000, "a:" * 100_000, "0x" * 100_000, "smmu_" * 40_000, "smmuv3_" + "a" * 200_000,
     "x: " * 70_000 + " client:  stag: ", "smmuv3_read_mmio " + "a=" * 100_000,
     "arm-smmu-v3 x:" + " " * 200_000 + "0x0", "f" * 1_000_000, "translation failed " * 10_000],
    ids=range(10),
)  # fmt: skip
def test_a_long_line_takes_no_long_time(line):
    start = time.process_time()
    try:
        decode(line)
        decode(f"arm-smmu-v3 0x CMDQ error privileged stag: client: {line}")
    except DecodeError:
        pass
    assert time.process_time() - start < 5


def recorded_events():
    for path in captures.found():
        if (path / "events.jsonl.gz").exists():
            yield from captures.read_lines(path / "events.jsonl.gz")


def test_events_of_captures_are_decoded():
    names = set()
    for line in recorded_events():
        found = one(line["hex"])
        names.add(found.name)
        assert found.fields["StreamID"] == line["sid"]
        assert f"{'read of' if line['rnw'] else 'write to'} {line['iova']} by" in found.text
        log = "\n".join(raw_lines([int.from_bytes(found.record[i : i + 8], "little")
                                   for i in range(0, 32, 8)]))  # fmt: skip
        assert one(log).record == found.record
    assert {"F_TRANSLATION", "F_PERMISSION"} <= names


def test_numpy_is_not_needed_to_decode():
    code = (
        "import sys; sys.modules['smmufast'] = p = type(sys)('smmufast');"
        f"p.__path__ = [{str(HOME / 'smmufast')!r}];"
        "from smmufast.cli import main\n"
        "assert main(['decode', '--kind', 'ste', *'10000000']) == 0\n"
        "assert not {'numpy', 'gzip'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("STE: Config=0b000 (ABORT)")
