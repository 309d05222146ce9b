"""The twin and the generators are judged here, by other people's captures and by worked numbers.

A test that builds its own system (Bench, in bench.py) has the library give the same outcome by
every face, so each rule's table is the library's test too.

Follows IHI 0070G.b 3.3, 3.4, 5.1-5.5, 6.3, 7.3, 13; DDI 0487 D8.
"""

import collections
import gzip
import itertools
import json
import random
from types import SimpleNamespace

import numpy as np
import ptwriter
import pytest
import reference
import tablegen
from bench import CONTEXT_TABLE, SID, STREAM_TABLE, TABLES, Bench, six
from project import CAPTURES
from reference import (
    ALL_ACCESSES,
    CLASS_IN,
    EVENT_NUMBERS,
    ISH,
    NSH,
    OSH,
    PR,
    PW,
    PX,
    UR,
    UW,
    UX,
    ContextCache,
    default_features,
    event_record,
    features_from_idr,
    translate,
)

# ------------------------------------------------------------------------------------------------
# Captures


def capture(name):
    """Directory of one capture; skips the test where there is none."""
    if not CAPTURES.is_dir():
        pytest.skip("no captures: SMMUFAST_CAPTURES is not set and ../shared/captures is absent")
    if not (CAPTURES / name).is_dir():
        pytest.skip(f"{name} is not among the captures")
    return CAPTURES / name


def json_lines(path):
    """Each line of a compressed file."""
    with gzip.open(path, "rt") as lines:
        for line in lines:
            yield json.loads(line)


def page_reader(pages, first, end):
    """Read function over {page address: bytes}; other RAM in [first, end) is zero."""
    zeros = bytes(4096)

    def read(address, size):
        if not first <= address <= end - size:
            return None
        offset = address & 0xFFF
        return pages.get(address - offset, zeros)[offset : offset + size]

    return read


class LinuxCapture:
    """A kernel's live tables."""

    def __init__(self, name):
        self.directory = capture(name)
        meta = json.loads((self.directory / "meta.json").read_text())
        words = {name: int(text, 16) for name, text in meta["regs"].items()}
        self.features = features_from_idr(
            words["IDR0"], words["IDR1"], words["IDR3"], words["IDR5"], 1
        )
        self.regs = SimpleNamespace(
            strtab_base=words["STRTAB_BASE"],
            strtab_base_cfg=words["STRTAB_BASE_CFG"],
            cr0=words["CR0"],
            cr2=words["CR2"],
            gbpa=0,
        )
        with np.load(self.directory / "pages.npz") as arrays:
            pages = {
                int(address): page.tobytes()
                for address, page in zip(arrays["page_addr"], arrays["pages"], strict=True)
            }
        first = int(meta["ram_base"], 16)
        self.read = page_reader(pages, first, first + meta["ram_size"])
        self.cache = ContextCache()

    def translate(self, sid, iova, **access):
        return translate(self.read, self.features, self.regs, sid, iova, cache=self.cache, **access)


LINUX = (
    "linux-7.3-4k-s1",
    "linux-6.12-4k-s1",
    "linux-7.3-16k-s1",
    "linux-7.3-4k-passthrough",
    "linux-7.3-4k-s2",
)


@pytest.mark.parametrize("name", LINUX)
def test_every_linux_request_ends_where_it_did(name):
    system = LinuxCapture(name)
    seen = collections.Counter()
    for line in json_lines(system.directory / "requests.jsonl.gz"):
        sid, iova, pa = line["sid"], int(line["iova"], 16), int(line["pa"], 16)
        may_read, may_write = bool(line["perm"] & 1), bool(line["perm"] & 2)
        outcome = system.translate(sid, iova, write=not may_read, priv=True)
        assert (outcome.success, outcome.pa) == (True, pa), line
        if line.get("bypass"):
            assert outcome.action == "bypass", line
            seen["bypass"] += 1
            continue
        assert (outcome.action, outcome.stage) == ("ok", line["stage"]), line
        assert (outcome.level, outcome.page_lg2) == (line["level"], line["page_shift"]), line
        assert bool(outcome.perm & PR) == may_read, line
        assert bool(outcome.perm & PW) == may_write, line
        for write, allowed in ((False, may_read), (True, may_write)):
            if not allowed:
                denied = system.translate(sid, iova, write=write, priv=True)
                assert denied.fault == "F_PERMISSION", line
        seen["translated"] += 1
    assert seen["translated"] >= 1000
    assert (seen["bypass"] >= 1000) == name.endswith("passthrough")


@pytest.mark.parametrize("name", LINUX)
def test_every_linux_event_is_the_same_record(name):
    system = LinuxCapture(name)
    count = 0
    for line in json_lines(system.directory / "events.jsonl.gz"):
        outcome = system.translate(line["sid"], int(line["iova"], 16), write=not line["rnw"])
        assert outcome.event is not None, line
        found, expected = (
            comparable_record(record, outcome.fault)
            for record in (outcome.event, bytes.fromhex(line["hex"]))
        )
        assert found == expected, line
        assert outcome.event[0] == EVENT_NUMBERS[outcome.fault] == line["type"], line
        count += 1
    assert count >= 800


# What has to be found in each, so that a change of the files does not empty the test: requests in
# all, those with stage 2, and those that only S2PTW stops.
CASES = {
    "cases-nested-2lvl": (12000, 4900, 270),
    "cases-nested-linear": (9000, 3500, 200),
    "cases-s1only-2lvl": (3200, 0, 0),
    "cases-s2only-linear": (3900, 1700, 0),
}
TRANSLATION_FAULTS = ("F_TRANSLATION", "F_ADDR_SIZE", "F_ACCESS", "F_PERMISSION")


def case_systems(name):
    """(features, read, registers, requests) of each configuration."""
    directory = capture(name)
    with np.load(directory / "pages.npz") as arrays:
        contents = [page.tobytes() for page in arrays["pages"]]
    lines = json_lines(directory / "cases.jsonl.gz")
    header = next(lines)["header"]
    idr = {register: int(text, 16) for register, text in header["idr"].items()}
    features = features_from_idr(idr["IDR0"], idr["IDR1"], idr["IDR3"], idr["IDR5"], idr["AIDR"])
    first, end = (int(text, 16) for text in header["ram"])
    for case in lines:
        pages = {int(address, 16): contents[index] for address, index in case["pages"]}
        cr0 = int(case["cr0"], 16)
        regs = SimpleNamespace(
            strtab_base=int(case["regs"]["STRTAB_BASE"], 16),
            strtab_base_cfg=int(case["regs"]["STRTAB_BASE_CFG"], 16),
            gbpa=int(case["regs"]["GBPA"], 16),
            cr0=cr0,
            cr2=0b10,  # that implementation records C_BAD_STREAMID whatever RECINVSID says
        )
        yield features, page_reader(pages, first, end), regs, case["reqs"]


def comparable_record(record, name):
    """A record as a number without what that implementation does not tell.

    It ignores PnU and InD and leaves them 0, as it does TTRnW, and the IPA has its low 12 bits.
    """
    number = int.from_bytes(record, "little")
    if name in TRANSLATION_FAULTS:
        number &= ~(0xFFF << 192)
    return number & ~(0b11 << 97 | 1 << 108)


RECORD_FIELDS = {"S2": (103, 1), "RnW": (99, 1), "CLASS": (104, 2), "IPA": (192, 64)}


def expected_record(name, line):
    """The record of a request's outcome, with the fields that the architecture has otherwise."""
    number = int.from_bytes(bytes.fromhex(line["out"]["rec"]), "little")
    if name == "F_CD_FETCH":
        number = number & (1 << 128) - 1 | number >> 128 << 192
    differs = dict(text.split(":") for text in line.get("rec_differs", ()))
    for field, text in differs.items():
        lsb, width = RECORD_FIELDS[field]
        number &= ~((1 << width) - 1 << lsb)
        number |= int(text, 0) << lsb
    if name in TRANSLATION_FAULTS and not number >> 103 & 1:  # S2=0: no IPA
        number &= (1 << 192) - 1
    return comparable_record(number.to_bytes(32, "little"), name)


def disagreement(outcome, line, regs, features):
    """What differs between an outcome and what a request is expected to give, or None."""
    differs = line.get("arch_differs")
    expected = differs["arch"] if differs else line["out"]
    kind, iova = expected["k"], int(line["iova"], 16)
    events_on = bool(regs.cr0 & 4)
    if kind == "disable" and iova >> reference.effective_features(features).oas_bits:
        # Cause bypass_oas, which the files do not mark when SMMUEN=0: that implementation lets
        # every address pass; GBPA's bypass aborts beyond OAS without an event.
        kind = "abort"
    if kind in ("ok", "bypass", "disable"):
        action = {"ok": "ok", "bypass": "bypass", "disable": "disabled"}[kind]
        pa = int(expected["pa"], 16) if "pa" in expected else iova
        if (outcome.success, outcome.action, outcome.pa) != (True, action, pa):
            return "outcome"
        if expected.get("stage", outcome.stage) != outcome.stage:
            return "stage"
        if "perm" in expected:
            ours = outcome.perm_s1 if outcome.stage == 3 else outcome.perm
            perm = (1 if ours & PR else 0) | (2 if ours & PW else 0)
            if perm != expected["perm"]:
                return "perm"
        return None
    if outcome.success:
        return "outcome"
    if kind == "event":
        if outcome.fault != expected["name"] or (outcome.event is not None) != events_on:
            return "event"
        if events_on and not differs:
            ours = comparable_record(outcome.event, outcome.fault)
            return None if ours == expected_record(outcome.fault, line) else "record"
        return None
    if outcome.event is not None:
        return "event"
    if kind == "abort" and outcome.fault is not None:
        return "abort"
    return None


def case_outcome(system, line, cache):
    """The twin's outcome of a request: that implementation's accesses are privileged data."""
    features, read, regs = system
    return translate(
        read, features, regs, line["sid"], int(line["iova"], 16),
        write=not line["rnw"], priv=True, cache=cache,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_case_ends_as_expected(name, monkeypatch):
    counts = collections.Counter()
    wrong = []
    decode_stage2 = reference.decode_stage2

    def without_s2ptw(features, ste):
        return decode_stage2(features, ste & ~(1 << 182))

    for features, read, regs, requests in case_systems(name):
        cache, other_cache = ContextCache(), ContextCache()
        for line in requests:
            system = features, read, regs
            outcome = case_outcome(system, line, cache)
            counts["all"] += 1
            counts["stage 2"] += outcome.stage >> 1
            found = disagreement(outcome, line, regs, features)
            if found and outcome.fault == "F_PERMISSION":
                # It has no memory types, so it reads CDs and stage-1 tables that stage 2 makes
                # Device in spite of S2PTW=1.
                with monkeypatch.context() as patch:
                    patch.setattr(reference, "decode_stage2", without_s2ptw)
                    outcome = case_outcome(system, line, other_cache)
                found = disagreement(outcome, line, regs, features)
                counts["S2PTW"] += not found
            if found:
                wrong.append((found, line, outcome))
    assert not wrong, f"{len(wrong)} of {counts['all']}, first: {wrong[:3]}"
    found = counts["all"], counts["stage 2"], counts["S2PTW"]
    assert all(have >= least for have, least in zip(found, CASES[name], strict=True)), found


# ------------------------------------------------------------------------------------------------
# Worked numbers


def walk_steps(outcome):
    """(level, address) of each descriptor fetch."""
    return [fetch[1:3] for fetch in outcome.fetches if fetch[0] == "TT"]


def test_ptwriter_packs_the_worked_encodings():
    def dwords(record):
        return [int.from_bytes(record[at : at + 8], "little") for at in range(0, len(record), 8)]

    assert dwords(ptwriter.encode_ste(v=1, config=0b100, shcfg=1))[:2] == [0x9, 0x1000_0000_0000]
    ste = ptwriter.encode_ste(
        v=1, config=0b101, s1fmt=2, s1contextptr=0x8000_1000, s1cdmax=10, s1dss=2, s1cir=1,
        s1cor=1, s1csh=3, shcfg=1,
    )  # fmt: skip
    assert dwords(ste)[:3] == [0x5000_0000_8000_102B, 0x0000_1000_0000_00D6, 0]
    cd = ptwriter.encode_cd(
        t0sz=16, ir0=1, or0=1, sh0=3, epd1=1, v=1, ips=5, aa64=1, r=1, a=1, aset=1, asid=0x12,
        ttb0=0xA000_3000, mair=0x04FF44,
    )  # fmt: skip
    assert dwords(cd)[:4] == [0x0012_E205_C000_3510, 0xA000_3000, 0, 0x04FF44]
    assert dwords(ptwriter.encode_l1std(9, 0x8_0004_0000)) == [0x8_0004_0009]
    assert dwords(ptwriter.encode_l1cd(0xB000_0000)) == [0xB000_0001]


def test_event_records_are_the_worked_encodings():
    def dwords(record):
        return " ".join(
            f"{int.from_bytes(record[at : at + 8], 'little'):016x}" for at in range(0, 32, 8)
        )

    translation = event_record(
        "F_TRANSLATION", 0x42, write=True, event_class=CLASS_IN, iova=0x1234_5678_9000
    )
    assert dwords(translation) == (
        "0000004200000010 0000020000000000 0000123456789000 0000000000000000"
    )
    assert dwords(event_record("C_BAD_STE", 9)) == (
        "0000000900000004 0000000000000000 0000000000000000 0000000000000000"
    )
    assert dwords(event_record("F_CD_FETCH", 9, 2, fetch_address=0x8000_0040)) == (
        "0000000900002809 0000000000000000 0000000000000000 0000000080000040"
    )


@pytest.mark.rule("V8.2.1-1", "V8.2.5.1-1", "V8.2.8.3-1")
@pytest.mark.parametrize(
    ("granule_lg2", "indices"),
    [
        (12, {0: 0x24, 1: 0xD1, 2: 0xB3, 3: 0x189}),
        (14, {0: 0, 1: 0x123, 2: 0x22B, 3: 0x1E2}),
        (16, {1: 0x4, 2: 0x11A2, 3: 0x1678}),
    ],
)
def test_48_bits_are_indexed_as_worked_out(granule_lg2, indices):
    va = 0x1234_5678_9ABC
    bench = Bench(granule_lg2=granule_lg2)
    bench.map(va, 0x4000_0000)
    outcome = bench.translate(va)
    assert outcome.pa == 0x4000_0000 | va & (1 << granule_lg2) - 1
    steps = walk_steps(outcome)
    mask = (8 << granule_lg2 - 3) - 1
    assert {level: (address & mask) // 8 for level, address in steps} == indices
    assert steps[0][1] & ~mask == bench.tables.base


@pytest.mark.rule("V8.2.9.1-1")
def test_16k_36_bits_start_at_level_2_with_a_full_table():
    bench = Bench(granule_lg2=14, tsz=28)
    bench.map(0xF_FFFF_FFFF, 0x4000_0000)
    # Base bits [13:0] are RES0.
    bench.write_cd(ttb0=bench.tables.base | 0x3FF0)
    outcome = bench.translate(0xF_FFFF_FFFF)
    assert outcome.success
    assert walk_steps(outcome)[0] == (2, bench.tables.base + 0x7FF * 8)


@pytest.mark.rule("S5.4-30", "V8.2.5.2-1")
@pytest.mark.parametrize(
    ("tsz", "ds", "ips", "alignment"),
    [
        # One bit to resolve: two descriptors; two bits: four.
        (24, 0, 5, 16), (23, 0, 5, 32), (22, 0, 5, 64), (21, 0, 5, 128),
        (24, 0, 6, 64), (23, 0, 6, 64), (24, 1, 5, 64), (21, 1, 6, 128),
    ],
)  # fmt: skip
def test_small_first_tables_are_aligned_to_their_size(tsz, ds, ips, alignment):
    bench = Bench(tsz=tsz, ds=ds)
    for offset in range(0, 0x100, 16):
        bench.write_cd(ips=ips, ttb0=bench.tables.base + offset)
        outcome = bench.translate(0)
        assert walk_steps(outcome)[0][1] == bench.tables.base + offset // alignment * alignment


# First T0SZ of each start level, and the last.
START_LEVELS = {
    12: {-1: (12, 15), 0: (16, 24), 1: (25, 33), 2: (34, 42), 3: (43, 48)},
    14: {0: (12, 16), 1: (17, 27), 2: (28, 38), 3: (39, 48)},
    16: {1: (12, 21), 2: (22, 34), 3: (35, 47)},
}


@pytest.mark.rule("S5.4-2", "V8.1.9-1", "V8.2.8-1", "V8.2.8.1-1")
@pytest.mark.parametrize("ttb", [0, 1])
@pytest.mark.parametrize("granule_lg2", [12, 14, 16])
def test_walks_start_at_the_level_of_the_table(granule_lg2, ttb):
    for level, (first, last) in START_LEVELS[granule_lg2].items():
        for tsz in range(first, last + 1):
            bench = Bench(granule_lg2=granule_lg2, tsz=tsz, ttb=ttb, ds=int(granule_lg2 != 16))
            assert bench.tables.start_level == level
            bits = 64 - tsz
            inside = [(1 << bits) - 1, 0, 0x5555_5555_5555_5555 & (1 << bits) - 1]
            for va in inside:
                bench.map(va, 0x8_0000_0000 ^ va & 0x7_FFFF_FFFF)
                iova = va | (-1 << bits) & (1 << 64) - 1 if ttb else va
                outcome = bench.translate(iova)
                assert outcome.success
                assert (
                    outcome.pa
                    == (0x8_0000_0000 ^ va & 0x7_FFFF_FFFF) & -(1 << granule_lg2)
                    | va & (1 << granule_lg2) - 1
                )
                assert [step[0] for step in walk_steps(outcome)] == list(range(level, 4))


TSZ_LIMITS = [
    # granule, features, ds, smallest, largest
    (12, {}, 0, 16, 48),
    (12, {}, 1, 12, 48),
    (14, {}, 0, 16, 48),
    (14, {}, 1, 12, 48),
    (16, {}, 0, 12, 47),
    (12, {"stt": 0}, 0, 16, 39),
    (14, {"stt": 0}, 1, 12, 39),
    (16, {"stt": 0}, 0, 12, 39),
    (12, {"ds": 0}, 1, 16, 48),
    (16, {"vax": 0, "ds": 0}, 0, 16, 47),
]


@pytest.mark.rule(
    "S2.3-1", "S2.4-2", "S3.4-7", "S5.4-3", "S5.4-4", "S5.4-9", "V8.1.8-1", "V8.2.4-2",
)
@pytest.mark.parametrize("ttb", [0, 1])
@pytest.mark.parametrize(("granule_lg2", "fields", "ds", "smallest", "largest"), TSZ_LIMITS)
def test_txsz_outside_its_limits_is_c_bad_cd(granule_lg2, fields, ds, smallest, largest, ttb):
    bench = Bench(default_features(**fields), granule_lg2=granule_lg2, tsz=32, ttb=ttb, ds=ds)
    for tsz in range(64):
        bench.write_cd(**{f"t{ttb}sz": tsz})
        bad = bench.fault(-1 & (1 << 64) - 1 if ttb else 0) == "C_BAD_CD"
        assert bad != (smallest <= tsz <= largest), tsz
    # Nothing is checked for a TTB that is not used.
    bench.write_cd(**{f"epd{ttb}": 1, f"t{ttb}sz": 0})
    assert bench.fault() == "F_TRANSLATION"


# ------------------------------------------------------------------------------------------------
# Streams


@pytest.mark.rule(
    "S3.2-1", "S3.3.1-1", "S5.1.1-2", "S6.3.2-9", "S6.3.12.2-1", "S6.3.25-7", "S6.3.25-9",
    "S7.3.3-1", "S7.3.3-3",
)
def test_streamids_beyond_the_table_are_bad_and_recorded_only_if_asked():
    for cr2, recorded in ((0, False), (0b10, True)):
        bench = Bench(cr2=cr2)
        outcome = bench.translate(sid=16)
        assert (outcome.fault, outcome.event is not None) == ("C_BAD_STREAMID", recorded)
    bench = Bench(default_features(sidsize=2))
    assert bench.fault(sid=3) == "C_BAD_STE"
    assert bench.fault(sid=4) == "C_BAD_STREAMID"


@pytest.mark.rule("S3.3.1.1-1")
def test_linear_base_is_aligned_to_the_table():
    bench = Bench()
    bench.map(0, 0x5000)
    bench.regs.strtab_base |= 0x4000_0000_0000_03C0
    assert bench.translate().pa == 0x5000


@pytest.mark.rule("S6.3.24-3")
@pytest.mark.parametrize("sidsize", [4, 6, 32])
def test_linear_base_is_aligned_to_what_log2size_says(sidsize):
    bench = Bench(default_features(sidsize=sidsize))
    bench.map(0, 0x5000)
    bench.regs.strtab_base_cfg = 9
    bench.regs.strtab_base = STREAM_TABLE | 0x7FC0
    assert bench.translate().pa == 0x5000
    bench.regs.strtab_base = STREAM_TABLE | 0x8000  # another table of 2^9 entries, without memory
    assert bench.fault() == "F_STE_FETCH"


@pytest.mark.parametrize("log2size", [50, 57, 58, 63])
def test_a_linear_table_that_is_larger_than_memory_lies_at_0(log2size):
    bench = Bench()
    bench.memory.add(0, 0x1000)
    bench.memory.write(64 * SID, ptwriter.encode_ste(**bench.ste))
    bench.map(0, 0x5000)
    bench.regs.strtab_base_cfg = log2size
    bench.regs.strtab_base = STREAM_TABLE
    assert bench.translate().pa == 0x5000


@pytest.mark.rule("S3.3.1.2-1", "S3.3.1.2-2", "S5.1-2", "S6.3.25-4", "S6.3.25-5", "S6.3.25-92")
@pytest.mark.parametrize(("code", "split"), [(6, 6), (8, 8), (10, 10), (0, 6), (7, 6), (16, 6)])
def test_split_selects_the_leaf_table(code, split):
    bench = Bench()
    bench.map(0, 0x5000)
    leaf = bench.allocate(64 << split, 64 << split)
    sid = 3 << split | (1 << split) - 1
    bench.regs.strtab_base_cfg = 1 << 16 | code << 6 | 14
    bench.memory.write(STREAM_TABLE + 3 * 8, ptwriter.encode_l1std(split + 1, leaf | 0x7C0))
    bench.memory.write(leaf + 64 * ((1 << split) - 1), ptwriter.encode_ste(**bench.ste))
    outcome = bench.translate(sid=sid)
    assert outcome.pa == 0x5000
    assert [fetch[:3] for fetch in outcome.fetches[:2]] == [
        ("L1STD", None, STREAM_TABLE + 24),
        ("STE", None, leaf + 64 * ((1 << split) - 1)),
    ]


@pytest.mark.rule("S6.3.24-4", "S6.3.24-91")
def test_two_level_base_is_aligned_to_what_log2size_says():
    bench = Bench(default_features(sidsize=8))
    bench.map(0, 0x5000)
    leaf = bench.allocate(64 << 8, 64 << 8)
    bench.memory.write(leaf + 64 * SID, ptwriter.encode_ste(**bench.ste))
    bench.memory.write(STREAM_TABLE, ptwriter.encode_l1std(9, leaf))
    bench.regs.strtab_base_cfg = 1 << 16 | 8 << 6 | 14
    # 64 entries, though SIDSIZE leaves only the first.
    bench.regs.strtab_base = STREAM_TABLE | 0x1C0
    assert bench.translate().success
    bench.regs.strtab_base = STREAM_TABLE | 0x200
    assert bench.fault() == "C_BAD_STREAMID"
    # 8 entries.
    bench.regs.strtab_base_cfg = 1 << 16 | 8 << 6 | 11
    bench.regs.strtab_base = STREAM_TABLE | 0x40
    assert bench.fault() == "C_BAD_STREAMID"


@pytest.mark.rule("S3.3.1.2-3", "S3.3.1.2-4", "S3.21.3-5", "S5.1-1", "S5.1.1-1", "S7.3.3-2")
@pytest.mark.parametrize(
    ("span", "index", "fault"),
    [
        (0, 0, "C_BAD_STREAMID"),
        (1, 0, "C_BAD_STE"),
        (1, 1, "C_BAD_STREAMID"),
        (4, 7, "C_BAD_STE"),
        (4, 8, "C_BAD_STREAMID"),
        (9, 255, "C_BAD_STE"),
        (10, 0, "C_BAD_STREAMID"),
        (11, 0, "C_BAD_STREAMID"),
        (12, 0, "C_BAD_STREAMID"),
        (31, 0, "C_BAD_STREAMID"),
    ],
)
def test_span_limits_the_leaf_table(span, index, fault):
    bench = Bench()
    bench.regs.strtab_base_cfg = 1 << 16 | 8 << 6 | 10
    leaf = bench.allocate(64 << 8, 64 << 8)
    bench.memory.write(STREAM_TABLE, ptwriter.encode_l1std(span, leaf))
    assert bench.fault(sid=index) == fault


@pytest.mark.rule("S3.3.1.1-2", "S6.3.25-91")
def test_fmt_without_two_level_support_is_linear():
    bench = Bench(default_features(st_level=0, sidsize=6))
    bench.map(0, 0x5000)
    bench.regs.strtab_base_cfg |= 1 << 16
    assert bench.translate().success


@pytest.mark.rule("S3.4.3-5", "S3.4.3-10", "S7.3-6", "S7.3.4-1", "S7.3.4-91")
def test_stream_structures_that_cannot_be_read_are_f_ste_fetch():
    bench = Bench(default_features(oas=5))
    bench.regs.strtab_base = 0x7000_0000
    outcome = bench.translate()
    assert outcome.fault == "F_STE_FETCH"
    assert outcome.event == event_record("F_STE_FETCH", SID, fetch_address=0x7000_0140)
    # Beyond OAS no fetch is made, and the record has no more bits than addresses have.
    bench.regs.strtab_base = 0xF_0000_0000_0000
    outcome = bench.translate(ssid=9)
    assert outcome.event == event_record("F_STE_FETCH", SID, 9, fetch_address=0x140)
    assert outcome.fetches == []


@pytest.mark.rule("S3.3.2-1", "S3.21.3-4", "S5.2-1", "S5.2-2", "S5.2-3", "S5.2-4", "S7.3.7-4")
def test_configs():
    bench = Bench()
    bench.map(0, 0x5000)
    for config in range(8):
        bench.write_ste(config=config)
        outcome = bench.translate(iova=0x123)
        expected = {
            0b100: ("bypass", None, 0x123),
            0b101: ("ok", None, 0x5123),
            0b110: ("abort", "C_BAD_STE", None),
            0b111: ("abort", "C_BAD_STE", None),
        }.get(config, ("abort", None, None))
        assert (outcome.action, outcome.fault, outcome.pa) == expected
        assert (outcome.event is not None) == (expected[1] is not None)
    bench.write_ste(config=0, v=0)
    assert bench.fault() == "C_BAD_STE"


@pytest.mark.rule(
    "S2.2-5", "S3.4.3-1", "S5-3", "S5.2-12", "S5.2-18", "S5.2-33", "S5.2-43", "S7.3.5-1",
)
@pytest.mark.parametrize(
    ("features", "fields", "bad"),
    [
        ({"s1p": 0}, {}, True),
        ({"s1p": 0}, {"config": 0b100}, False),
        ({}, {"strw": 1}, True),
        ({}, {"strw": 2}, False),
        ({}, {"strw": 3}, True),
        ({"hyp": 0}, {"strw": 3}, False),
        ({}, {"strw": 3, "config": 0b100}, False),
        ({}, {"s1stalld": 1}, True),
        ({}, {"s1stalld": 1, "config": 0b100}, False),
        ({"ssidsize": 8}, {"s1cdmax": 9, "s1dss": 2}, True),
        ({"ssidsize": 8}, {"s1cdmax": 8, "s1dss": 2}, False),
        ({"ssidsize": 0}, {"s1cdmax": 9}, False),
        ({"cd2l": 0}, {"s1cdmax": 9, "s1fmt": 1, "s1dss": 1}, True),
        ({"cd2l": 0}, {"s1cdmax": 9, "s1fmt": 2, "s1dss": 1}, True),
        ({"cd2l": 0}, {"s1cdmax": 9, "s1fmt": 3, "s1dss": 1}, False),
        ({"cd2l": 0}, {"s1cdmax": 0, "s1fmt": 1}, False),
        ({"cd2l": 0, "ssidsize": 0}, {"s1cdmax": 3, "s1fmt": 1}, False),
        ({"oas": 1}, {"s1contextptr": 1 << 36}, True),
        ({"oas": 1}, {"s1contextptr": 1 << 36, "config": 0b100}, False),
        ({}, {"s1contextptr": CONTEXT_TABLE | 1 << 55}, False),
        ({"arch_minor": 4}, {"s1contextptr": CONTEXT_TABLE | 1 << 55}, True),
        ({}, {"s2vmid": 0x1234, "s2t0sz": 63, "s2tg": 3, "s2s": 1, "eats": 2}, False),
    ],
)
def test_illegal_stes(features, fields, bad):
    bench = Bench(default_features(**features))
    bench.map(0, 0x5000)
    bench.write_ste(**fields)
    outcome = bench.translate()
    assert (outcome.fault == "C_BAD_STE") == bad
    if not bad:
        assert outcome.success


@pytest.mark.rule("S5.2-14")
def test_v30_fetches_a_context_pointer_beyond_oas_and_fails():
    bench = Bench(default_features(arch_minor=0, oas=1))
    bench.write_ste(s1contextptr=1 << 36)
    outcome = bench.translate()
    assert outcome.event == event_record("F_CD_FETCH", SID, fetch_address=1 << 36)
    bench.write_ste(s1contextptr=CONTEXT_TABLE | 1 << 48)
    assert bench.fault() == "F_TRANSLATION"


# ------------------------------------------------------------------------------------------------
# Substreams


SUBSTREAM_RULES = [
    # ssid, STE fields, features, result
    (3, {}, {"ssidsize": 0}, "C_BAD_SUBSTREAMID"),
    (3, {"config": 0b100}, {}, "C_BAD_SUBSTREAMID"),
    (0, {"s1cdmax": 0}, {}, "C_BAD_SUBSTREAMID"),
    (16, {}, {}, "C_BAD_SUBSTREAMID"),
    (0, {"s1dss": 2}, {}, "F_STREAM_DISABLED"),
    (0, {"s1dss": 0}, {}, 0),
    (0, {"s1dss": 1}, {}, 0),
    (0, {"s1dss": 3}, {}, 0),
    (3, {"s1dss": 2}, {}, 3),
    (15, {"s1dss": 0}, {}, 15),
    (None, {"s1cdmax": 0, "s1dss": 0}, {}, 0),
    (None, {"s1dss": 1}, {"ssidsize": 0}, 0),
    (None, {"s1dss": 0}, {}, "F_STREAM_DISABLED"),
    (None, {"s1dss": 3}, {}, "F_STREAM_DISABLED"),
    (None, {"s1dss": 1}, {}, "bypass"),
    (None, {"s1dss": 2}, {}, 0),
    (3, {"config": 0b000}, {}, None),
]


@pytest.mark.rule(
    "S3.2-4", "S3.3.2-3", "S3.3.2-4", "S3.3.2-6", "S3.3.2-7", "S3.3.2-8", "S3.3.2-9", "S3.9-1",
    "S3.9-2", "S5.2-16", "S5.2-17", "S5.2-19", "S5.2-21", "S5.2-23", "S5.2-24", "S6.3.2-10",
    "S7.3.7-2", "S7.3.9-2",
)
@pytest.mark.parametrize(("ssid", "fields", "features", "result"), SUBSTREAM_RULES)
def test_substream_rules(ssid, fields, features, result):
    bench = Bench(default_features(**features))
    bench.map(0x7000, 0x5000)
    bench.write_ste(s1cdmax=4)
    bench.write_ste(**fields)
    for index in range(16):
        bench.write_cd(index)
    outcome = bench.translate(0x7000, ssid=ssid)
    if isinstance(result, int):
        assert outcome.pa == 0x5000
        assert ("CD", None, CONTEXT_TABLE + 64 * result) in [f[:3] for f in outcome.fetches]
    elif result == "bypass":
        assert (outcome.action, outcome.pa) == ("bypass", 0x7000)
        assert [fetch[0] for fetch in outcome.fetches] == ["STE"]
    else:
        assert (outcome.action, outcome.fault) == ("abort", result)
        assert (outcome.event is not None) == (result is not None)


@pytest.mark.rule("S7.3.7-1", "S7.3.9-1")
def test_substream_records():
    bench = Bench()
    bench.write_ste(s1cdmax=4)
    bad = bench.translate(ssid=0x12345).event
    assert int.from_bytes(bad, "little") == SID << 32 | 0x12345 << 12 | 0x08
    for s1dss, ssid in ((0, None), (2, 0)):
        bench.write_ste(s1dss=s1dss)
        disabled = bench.translate(ssid=ssid).event
        assert int.from_bytes(disabled, "little") == SID << 32 | 0x06


@pytest.mark.rule("S3.3.2-10", "S3.21.3-14", "S5-5", "S5.2-9", "S5.2-10", "S5.2-11")
@pytest.mark.parametrize(
    ("s1fmt", "s1cdmax", "ssid", "l1_offset", "cd_offset"),
    [
        (0, 7, 0x55, None, 0x55 * 64),
        (3, 7, 0x55, None, 0x55 * 64),
        (1, 4, 0xF, 0, 0xF * 64),
        (1, 6, 0x3F, 0, 0x3F * 64),
        (1, 12, 0xABC, 0x2A * 8, 0x3C * 64),
        (2, 9, 0x1FF, 0, 0x1FF * 64),
        (2, 12, 0xABC, 2 * 8, 0x2BC * 64),
        (2, 20, 0xFFFFF, 0x3FF * 8, 0x3FF * 64),
    ],
)
def test_context_table_formats(s1fmt, s1cdmax, ssid, l1_offset, cd_offset):
    bench = Bench()
    bench.map(0, 0x5000)
    leaf = 0x4000_0000
    # Bits below the alignment of the table, and of the 64 KB leaf, are treated as 0.
    l1_lg2 = {1: max(6, s1cdmax - 6 + 3), 2: max(6, s1cdmax - 10 + 3)}.get(s1fmt, s1cdmax + 6)
    low = (1 << l1_lg2) - 64
    table = CONTEXT_TABLE + (1 << l1_lg2)
    if l1_offset is None:
        cd_address = table + cd_offset
    else:
        cd_address = leaf + cd_offset
        l2ptr = leaf | (0xF000 if s1fmt == 2 else 0)
        bench.memory.write(table + l1_offset, ptwriter.encode_l1cd(l2ptr))
        bench.memory.ensure(cd_address, 64)
    bench.write_ste(s1fmt=s1fmt, s1cdmax=s1cdmax, s1contextptr=table | low)
    bench.memory.write(cd_address, ptwriter.encode_cd(**bench.cd))
    outcome = bench.translate(ssid=ssid)
    assert outcome.pa == 0x5000
    expected = [("STE", None, STREAM_TABLE + 64 * SID, 64)]
    if l1_offset is not None:
        expected.append(("L1CD", None, table + l1_offset, 8))
    expected.append(("CD", None, cd_address, 64))
    assert [fetch[:4] for fetch in outcome.fetches[: len(expected)]] == expected


@pytest.mark.rule("S3.4.3-3", "S5.3-1", "S5.3-3", "S7.3.9-3", "S7.3.9-4", "S7.3.10-1")
def test_level_1_context_descriptors():
    bench = Bench(default_features(oas=4))
    bench.write_ste(s1fmt=1, s1cdmax=10, s1dss=2)
    outcome = bench.translate()
    assert outcome.fault == "C_BAD_SUBSTREAMID"
    assert outcome.event == event_record("C_BAD_SUBSTREAMID", SID, 0)
    for v, pointer, fault in (
        (0, 0x9000_0000, "C_BAD_SUBSTREAMID"),
        (1, 0x9000_0000, "F_CD_FETCH"),
        (1, 1 << 44, "C_BAD_SUBSTREAMID"),
        (1, 0x9000_0000 | 1 << 52, "F_CD_FETCH"),
    ):
        bench.memory.write(CONTEXT_TABLE + 8, ptwriter.encode_l1cd(pointer, v))
        outcome = bench.translate(ssid=0x41)
        assert outcome.fault == fault
        if fault == "F_CD_FETCH":
            assert outcome.event == event_record(fault, SID, 0x41, fetch_address=0x9000_0040)
    bench.features.arch_minor = 0
    bench.memory.write(CONTEXT_TABLE + 8, ptwriter.encode_l1cd(1 << 44))
    outcome = bench.translate(ssid=0x41)
    assert outcome.event == event_record("F_CD_FETCH", SID, 0x41, fetch_address=(1 << 44) + 0x40)


# ------------------------------------------------------------------------------------------------
# Context descriptors


@pytest.mark.rule(
    "S2.2-2", "S2.2-4", "S3.3.2-21", "S3.4-21", "S3.12-16", "S3.17-10", "S5.4-1", "S5.4-6",
    "S5.4-10", "S5.4-11", "S5.4-20", "S5.4-26", "S5.4-31", "S5.4.1-2", "S5.4.2-1", "S5.4.2-3",
    "S7.3.11-1", "S7.3.14-3", "V8.2.3-2",
)
@pytest.mark.parametrize(
    ("features", "ste", "fields", "bad"),
    [
        ({}, {}, {"v": 0}, True),
        ({}, {}, {"aa64": 0}, True),
        ({}, {}, {"s": 1}, True),
        ({}, {}, {"a": 0}, False),
        ({"term_model": 1}, {}, {"a": 0}, True),
        ({}, {}, {"ha": 1}, True),
        ({}, {}, {"hd": 1}, True),
        ({}, {}, {"haft": 1, "aie": 1, "pie": 1, "nscfg0": 1, "uwxn": 1}, False),
        ({"ttendian": 2}, {}, {"endi": 1}, True),
        ({"ttendian": 3}, {}, {"endi": 0}, True),
        ({"ttendian": 2}, {}, {"endi": 1, "epd0": 1}, False),
        ({"ttendian": 2}, {"strw": 2}, {"endi": 1, "epd0": 1}, True),
        ({"asid16": 0}, {}, {"asid": 0x100}, True),
        ({"asid16": 0}, {}, {"asid": 0xFF}, False),
        ({"asid16": 0}, {"strw": 2}, {"asid": 0x100}, False),
        ({}, {}, {"tg0": 3}, True),
        ({}, {}, {"tg0": 3, "epd0": 1}, False),
        ({}, {"strw": 2}, {"tg0": 3, "epd0": 1}, True),
        ({"gran4k": 0}, {}, {}, True),
        ({"gran16k": 0, "gran64k": 0}, {}, {}, False),
        ({}, {}, {"epd1": 0, "t1sz": 16, "tg1": 0}, True),
        ({}, {"strw": 2}, {"epd1": 0, "t1sz": 16, "tg1": 0}, False),
        ({}, {}, {"ttb0": 1 << 40, "ips": 2}, True),
        ({}, {}, {"ttb0": 1 << 39, "ips": 2}, False),
        ({"oas": 1}, {}, {"ttb0": 1 << 39, "ips": 2}, True),
        ({}, {}, {"ttb0": 1 << 48}, True),
        ({}, {}, {"ttb0": 1 << 48, "ds": 1}, False),
        ({"ds": 0}, {}, {"ttb0": 1 << 48, "ds": 1}, True),
        ({}, {}, {"ttb0": 1 << 48, "tg0": 1}, False),
        ({}, {}, {"ttb0": TABLES | 1 << 52}, False),
        ({"arch_minor": 0}, {}, {"ttb0": TABLES | 1 << 48}, False),
    ],
)
def test_illegal_cds(features, ste, fields, bad):
    bench = Bench(default_features(**features))
    bench.write_ste(**ste)
    bench.write_cd(**fields)
    outcome = bench.translate()
    assert (outcome.fault == "C_BAD_CD") == bad
    if bad:
        assert outcome.event == event_record("C_BAD_CD", SID)


@pytest.mark.rule(
    "S3.12-3", "S3.12.1-1", "S3.12.1-3", "S5.5-1", "S5.5-2", "S5.5-3", "S5.5-101", "S7.3.12-4",
    "V8.15.1.3-1",
)
@pytest.mark.parametrize(
    ("a", "r", "s", "result"),
    [
        (0, 0, 0, ("raz_wi", "F_TRANSLATION", False)),
        (0, 1, 0, ("raz_wi", "F_TRANSLATION", True)),
        (1, 0, 0, ("abort", "F_TRANSLATION", False)),
        (1, 1, 0, ("abort", "F_TRANSLATION", True)),
        # Stall is not modelled: STALL_MODEL=01.
        (0, 0, 1, ("abort", "C_BAD_CD", True)),
        (1, 1, 1, ("abort", "C_BAD_CD", True)),
    ],
)
def test_fault_control(a, r, s, result):
    bench = Bench()
    bench.write_cd(a=a, r=r, s=s)
    outcome = bench.translate(0x1000)
    assert (outcome.action, outcome.fault, outcome.event is not None) == result
    # A walk's external abort and the event queue do not ask the CD.
    bench.write_cd(s=0, ttb0=0x7000_0000)
    outcome = bench.translate(0x1000, write=True)
    assert outcome.event == event_record(
        "F_WALK_EABT", SID, write=True, event_class=1, iova=0x1000, fetch_address=0x7000_0000
    )
    assert outcome.action == "abort"
    bench.regs.cr0 = 1
    outcome = bench.translate(0x1000, write=True)
    assert (outcome.fault, outcome.event) == ("F_WALK_EABT", None)


# ------------------------------------------------------------------------------------------------
# Addresses


@pytest.mark.rule("S3.4-6", "S3.4.1-2", "V8.1.8-2", "V8.1.9-2", "V8.2.4-1")
@pytest.mark.parametrize(
    ("iova", "success"),
    [
        (0x0000_FFFF_FFFF_FFFF, True),
        (0xFFFF_0000_0000_0000, True),
        (0x0001_0000_0000_0000, False),
        (0xFFFE_0000_0000_0000, False),
        (0x0080_0000_0000_0000, False),
        (0x8000_0000_0000_0000, False),
    ],
)
def test_48_bit_halves(iova, success):
    bench = Bench()
    bench.map(0, 0x5000)
    bench.map(0xFFFF_FFFF_FFFF, 0x6000)
    bench.write_cd(epd1=0, t1sz=16, tg1=2, ttb1=bench.tables.base)
    assert bench.translate(iova).success == success


@pytest.mark.rule("S3.4.1-3", "S3.4.1-8", "S5.4-17", "S7.3-4", "V8.8-1", "V8.8.1-1", "V8.8.2-1")
@pytest.mark.parametrize("ttb", [0, 1])
@pytest.mark.parametrize("tbi", [0, 1])
def test_top_byte_is_ignored_where_that_ttb_says_so(ttb, tbi):
    bench = Bench(ttb=ttb, tsz=25)
    bench.map(0x12_3456_7000, 0x5000)
    bench.write_cd(**{f"tbi{ttb}": tbi, f"tbi{1 - ttb}": 1 - tbi})
    canonical = 0x12_3456_7000 | (0xFFFF_FF80_0000_0000 if ttb else 0)
    assert bench.translate(canonical).success
    assert bench.translate(canonical ^ 0x5A << 56).success == bool(tbi)
    assert not bench.translate(canonical ^ 1 << 54).success
    fault = bench.translate(canonical ^ 0x5A << 56, write=True, ssid=None)
    if not tbi:
        assert fault.event == event_record(
            "F_TRANSLATION", SID, write=True, event_class=CLASS_IN, iova=canonical ^ 0x5A << 56
        )


@pytest.mark.rule("S3.3.3-3", "S3.4.1-5", "S3.17.5-1", "S5.2-42", "S5.4.1-1", "V8.1.2-1")
def test_single_ttb_worlds_have_no_upper_half():
    bench = Bench(cr2=0b10)
    bench.map(0, 0x5000)
    bench.write_ste(strw=2)
    bench.write_cd(epd0=1, epd1=0, t1sz=16, tg1=2, ttb1=bench.tables.base)
    assert bench.translate(0).success
    assert bench.fault(0xFFFF_0000_0000_0000) == "F_TRANSLATION"
    good = {"t1sz": 16, "tg1": 2, "ttb1": bench.tables.base}
    for field, bad in (("t1sz", 5), ("tg1", 0), ("ttb1", bench.tables.base | 1 << 50)):
        bench.write_cd(**{field: bad}, ips=5)  # what is RES0 is no reason to refuse the CD
        assert bench.translate(0).success
        bench.write_cd(**{field: good[field]}, ips=6)
    bench.write_cd(tbi0=1)
    assert bench.translate(0xFF00_0000_0000_0000).success
    assert bench.fault(0xFF80_0000_0000_0000) == "F_TRANSLATION"
    bench.regs.cr2 |= 1
    assert bench.translate(0xFFFF_0000_0000_0000).success
    assert bench.fault(0) == "F_TRANSLATION"


@pytest.mark.rule("S2.5-1", "S5.4-28", "V8.2.4.1-1", "V8.15.4-1")
@pytest.mark.parametrize("ttb", [0, 1])
def test_e0pd_stops_unprivileged_accesses(ttb):
    bench = Bench(ttb=ttb)
    bench.map(0, 0x5000)
    iova = 0xFFFF << 48 if ttb else 0
    bench.write_cd(**{f"e0pd{ttb}": 1})
    assert bench.fault(iova, priv=False) == "F_TRANSLATION"
    outcome = bench.translate(iova, priv=True)
    assert outcome.success and not outcome.perm & (UR | UW | UX)
    bench.write_cd(**{f"e0pd{ttb}": 0, f"e0pd{1 - ttb}": 1})
    assert bench.translate(iova, priv=False).success
    bench.write_cd(**{f"e0pd{ttb}": 1})
    bench.write_ste(privcfg=3)
    assert bench.translate(iova, priv=False).success
    bench.features.e0pd = 0
    bench.write_ste(privcfg=2)
    assert bench.translate(iova, priv=True).success


BLOCKS = [
    # granule, ds, OAS, level, log2 size or None
    (12, 0, 6, 0, None),
    (12, 1, 6, 0, 39),
    (12, 0, 6, 1, 30),
    (12, 0, 6, 2, 21),
    (12, 1, 6, -1, None),
    (14, 1, 6, 0, None),
    (14, 0, 6, 1, None),
    (14, 1, 6, 1, 36),
    (14, 0, 6, 2, 25),
    (16, 0, 6, 1, 42),
    (16, 0, 5, 1, None),
    (16, 0, 6, 2, 29),
]


@pytest.mark.rule("S3.21.1.2-1", "V8.2.8-2", "V8.2.9-1", "V8.2.10-1")
@pytest.mark.parametrize(("granule_lg2", "ds", "oas", "level", "size_lg2"), BLOCKS)
def test_blocks_are_allowed_at_some_levels(granule_lg2, ds, oas, level, size_lg2):
    bench = Bench(default_features(oas=oas), granule_lg2=granule_lg2, tsz=16 - 4 * ds, ds=ds)
    va = 0x0000_89AB_CDEF_0123
    # Bits below the block, nT among them, are not looked at.
    bench.map(va, 0x0000_7654_3210_0000, level, ignored=1 << 16)
    outcome = bench.translate(va)
    if size_lg2 is None:
        assert outcome.fault == "F_TRANSLATION"
    else:
        low = (1 << size_lg2) - 1
        assert (outcome.level, outcome.page_lg2) == (level, size_lg2)
        assert outcome.pa == 0x0000_7654_3210_0000 & ~low | va & low


@pytest.mark.rule("S7.3.13-1", "V8.2.1-2", "V8.3-1", "V8.3.1.3-1")
@pytest.mark.parametrize("level", [-1, 0, 1, 2, 3])
def test_invalid_descriptors(level):
    bench = Bench(tsz=12, ds=1)
    slot = bench.tables.slot(0, level)
    kinds = [0b00, 0b10] + ([0b01] if level in (-1, 3) else [])
    for kind in kinds:
        bench.tables.write_descriptor(slot, 0x5540 | kind)
        assert bench.fault() == "F_TRANSLATION"


@pytest.mark.rule("S2.8-1", "S3.4-24", "S3.4.3-8", "S5-1", "S5.4-32", "V8.1.7-1", "V8.3.1.1-1")
@pytest.mark.parametrize("endi", [0, 1])
@pytest.mark.parametrize(
    ("granule_lg2", "ds", "pa"),
    [(12, 1, 0xF_EDCB_A987_6000), (14, 1, 0xF_EDCB_A987_4000), (16, 0, 0xF_EDCB_A987_0000)],
)
def test_52_bit_addresses_in_tables_and_leaves(granule_lg2, ds, pa, endi):
    bench = Bench(granule_lg2=granule_lg2, ds=ds, endi=endi)
    table = 0xC_8000_0000_0000
    bench.memory.add(table, 0x10000)
    top = bench.tables.slot(0, 2)
    bench.tables.write_descriptor(top, ptwriter.table_descriptor(granule_lg2, table, ds=bool(ds)))
    bench.map(0, pa)
    outcome = bench.translate(0xABC)
    assert outcome.pa == pa | 0xABC
    assert walk_steps(outcome)[-1] == (3, table)
    # Two bits less: the table is beyond IPS.
    bench.write_cd(ips=5)
    assert bench.fault(0xABC) == "F_ADDR_SIZE"


@pytest.mark.rule("S3.13.1-1", "S7.3.15-1", "S7.3.22-2", "V8.5.1.1-1", "V8.15.4-3")
def test_address_size_outranks_access_flag_and_permission():
    bench = Bench()
    bench.map(0, 0x1_0000_0000, af=0, ap=0)
    bench.write_cd(ips=0)
    assert bench.fault() == "F_ADDR_SIZE"
    bench.write_cd(ips=1)
    assert bench.fault() == "F_ACCESS"
    bench.write_cd(affd=1)
    assert bench.fault() == "F_PERMISSION"
    assert bench.translate(priv=True).success


@pytest.mark.rule("S3.4-8", "S3.4-20", "S5.4-12", "S5.4-13", "S7.3.14-1", "V8.1.7-2", "V8.1.7-3")
@pytest.mark.parametrize(
    ("minor", "oas", "ips", "bits"),
    [
        (0, 7, 7, 48), (0, 6, 6, 48), (0, 5, 6, 48), (3, 7, 7, 52), (3, 6, 7, 52), (3, 6, 5, 48),
        (3, 2, 7, 40), (4, 7, 7, 52), (4, 7, 6, 52), (3, 0, 5, 32), (3, 6, 0, 32), (3, 6, 3, 42),
    ],
)  # fmt: skip
def test_output_size_is_the_smaller_of_ips_and_oas(minor, oas, ips, bits):
    bench = Bench(default_features(arch_minor=minor, oas=oas), granule_lg2=16)
    bench.write_cd(ips=ips)
    bench.map(0, (1 << bits) - 0x10000)
    assert bench.translate().pa == (1 << bits) - 0x10000
    if bits < 52:
        bench.map(0, 1 << bits)
        assert bench.fault() == "F_ADDR_SIZE"


@pytest.mark.rule("S3.4-5")
def test_bypass_stops_at_oas():
    for fields in ({"config": 0b100}, {"s1cdmax": 4, "s1dss": 1}):
        bench = Bench(default_features(oas=3))
        bench.write_cd(r=0, a=0, tbi0=1)
        bench.write_ste(privcfg=3, **fields)
        last = (1 << 42) - 1
        assert bench.translate(last).pa == last
        outcome = bench.translate(last + 1, instr=True)
        assert outcome.action == "abort"
        assert outcome.event == event_record(
            "F_ADDR_SIZE", SID, write=False, priv=True, instr=True, event_class=CLASS_IN,
            iova=last + 1,
        )  # fmt: skip


@pytest.mark.rule("S2.1-2", "S3.4-3", "S6.3.8-2")
@pytest.mark.parametrize(
    ("minor", "oas", "bits"),
    [
        (0, 0, 32),
        (0, 6, 48),
        (0, 7, 48),
        (1, 6, 52),
        (3, 7, 52),
        (4, 6, 52),
        (4, 7, 56),
        (3, 4, 44),
    ],
)
def test_oas_codes_by_version(minor, oas, bits):
    bench = Bench(default_features(arch_minor=minor, oas=oas))
    bench.write_ste(config=0b100)
    assert bench.translate((1 << bits) - 1).success
    assert bench.fault(1 << bits) == "F_ADDR_SIZE"
    bench.regs.cr0 = 0
    assert bench.translate((1 << bits) - 1).success
    assert not bench.translate(1 << bits).success


@pytest.mark.rule(
    "S3.3.2-14", "S3.3.2-15", "S3.4-4", "S3.11-3", "S3.11-4", "S3.11-5", "S3.11-10",
    "S6.3.9.6-1", "S6.3.9.6-2", "S6.3.9.6-7", "S6.3.9.6-10", "S6.3.14-1", "S6.3.14-3",
    "S6.3.14-4", "S13.2-1",
)
def test_gbpa_decides_while_the_smmu_is_off():
    bench = Bench(default_features(oas=3))
    bench.regs.cr0 = 0b100
    outcome = bench.translate(0x1234, ssid=7)
    assert (outcome.action, outcome.pa, outcome.perm) == ("disabled", 0x1234, ALL_ACCESSES)
    assert (outcome.attr, outcome.sh, outcome.fetches) == (0xFF, NSH, [])
    beyond = bench.translate(1 << 42)
    assert (beyond.action, beyond.fault, beyond.event) == ("abort", None, None)
    # MTCFG, Device-nGnRE; then iWB-oNC, ISH, write-allocate and transient.
    bench.regs.gbpa = 0x11
    assert (bench.translate().attr, bench.translate().sh) == (0x04, OSH)
    bench.regs.gbpa = 0b11 << 12 | 0b1011 << 8 | 0x17
    assert (bench.translate().attr, bench.translate().sh) == (0x45, ISH)
    bench.regs.gbpa |= 1 << 20
    stopped = bench.translate(0x1234)
    assert (stopped.action, stopped.fault, stopped.event) == ("abort", None, None)


# ------------------------------------------------------------------------------------------------
# Permissions


PERMISSIONS = [
    # leaf, table flags, CD fields, EL1 mask, EL2 mask
    ({"ap": 0}, {}, {}, UX | PR | PW | PX, ALL_ACCESSES),
    ({"ap": 1}, {}, {}, UR | UW | UX | PR | PW, ALL_ACCESSES),
    ({"ap": 2}, {}, {}, UX | PR | PX, UR | UX | PR | PX),
    ({"ap": 3}, {}, {}, UR | UX | PR | PX, UR | UX | PR | PX),
    ({"ap": 1, "uxn": 1}, {}, {}, UR | UW | PR | PW, UR | UW | PR | PW),
    ({"ap": 0, "pxn": 1}, {}, {}, UX | PR | PW, ALL_ACCESSES),
    ({"ap": 0}, {}, {"wxn": 1}, UX | PR | PW, UR | UW | PR | PW),
    ({"ap": 1}, {}, {"wxn": 1}, UR | UW | PR | PW, UR | UW | PR | PW),
    ({"ap": 3}, {}, {"wxn": 1}, UR | UX | PR | PX, UR | UX | PR | PX),
    ({"ap": 1}, {"aptable": 1}, {}, UX | PR | PW | PX, ALL_ACCESSES),
    ({"ap": 1}, {"aptable": 2}, {}, UR | UX | PR | PX, UR | UX | PR | PX),
    ({"ap": 1}, {"aptable": 3}, {}, UX | PR | PX, UR | UX | PR | PX),
    ({"ap": 3}, {"xntable": 1}, {}, UR | PR | PX, UR | PR),
    ({"ap": 3}, {"pxntable": 1}, {}, UR | UX | PR, UR | UX | PR | PX),
    (
        {"ap": 1},
        {"aptable": 3, "pxntable": 1, "xntable": 1},
        {"had0": 1},
        UR | UW | UX | PR | PW,
        ALL_ACCESSES,
    ),
    ({"ap": 1}, {}, {"pan": 1}, UR | UW | UX, ALL_ACCESSES),
    ({"ap": 3}, {}, {"pan": 1}, UR | UX | PX, UR | UX | PR | PX),
    ({"ap": 2}, {}, {"pan": 1}, UX | PR | PX, UR | UX | PR | PX),
    ({"ap": 3}, {"aptable": 1}, {"pan": 1}, UX | PR | PX, UR | UX | PR | PX),
    ({"ap": 2}, {}, {"pan": 1, "epan": 1}, UX | PX, UR | UX | PR | PX),
    ({"ap": 2, "uxn": 1}, {}, {"pan": 1, "epan": 1}, PR | PX, UR | PR),
    ({"ap": 3}, {}, {"e0pd0": 1}, PR | PX, UR | UX | PR | PX),
]


@pytest.mark.rule(
    "S3.3.3-2", "S3.3.4-2", "S5.2-44", "S5.4-15", "S5.4-18", "S5.4.1-3", "S6.3.12-3",
    "S13.1.1-3", "S13.4.1-1", "V8.2.12.2-1", "V8.4.1.2.1-1", "V8.4.1.2.1-2", "V8.4.1.2.2-2",
    "V8.4.1.2.3-1", "V8.4.1.2.3-2", "V8.4.1.2.4-1", "V8.4.4-1", "V8.4.5.1-1", "V8.4.5.1-2",
)
@pytest.mark.parametrize(("leaf", "table_flags", "fields", "el1", "el2"), PERMISSIONS)
def test_permissions(leaf, table_flags, fields, el1, el2):
    for strw, cr2, expected in ((0, 0b10, el1), (2, 0b11, el1), (2, 0b10, el2)):
        bench = Bench(cr2=cr2)
        bench.map(0, 0x5000, table_flags=table_flags, **leaf)
        bench.write_cd(**fields)
        bench.write_ste(strw=strw)
        assert six(bench) == expected
        for priv in (False, True):
            outcome = bench.translate(priv=priv)
            if outcome.fault != "F_TRANSLATION":
                assert outcome.perm == expected


@pytest.mark.rule("S2.2-7", "S2.8-2", "S5.4-19", "S5.4-27", "S6.3.2-92", "S6.3.4-18")
def test_features_switch_permission_controls_off():
    bench = Bench(default_features(had=0, epan=0, e0pd=0))
    bench.map(0, 0x5000, ap=2, table_flags={"xntable": 1})
    bench.write_cd(had0=1, pan=1, epan=1, e0pd0=1)
    assert six(bench) == PR | PX
    bench.map(0, 0x5000, ap=3)
    assert six(bench) == UR | PX
    bench = Bench(default_features(epan=0))
    bench.map(0, 0x5000, ap=2)
    bench.write_cd(pan=1, epan=1)
    assert six(bench) == UX | PR | PX


@pytest.mark.rule("V8.4.1.2.2-1", "V8.4.1.2.5-1")
def test_every_table_on_the_way_restricts():
    bench = Bench()
    for level, flags in ((1, {"aptable": 2}), (2, {"pxntable": 1}), (3, {"xntable": 1})):
        bench.tables.slot(0, level, **flags)
    bench.map(0, 0x5000, ap=1)
    assert six(bench) == UR | PR


@pytest.mark.parametrize("ttb", [0, 1])
@pytest.mark.parametrize(
    ("flags", "left"),
    [
        ({"aptable": 1}, UX | PR | PW | PX),
        ({"aptable": 2}, UR | UX | PR | PX),
        ({"aptable": 3}, UX | PR | PX),
        ({"pxntable": 1}, UR | UW | UX | PR | PW),
        ({"xntable": 1}, UR | UW | PR | PW),
    ],
)
def test_had_gives_back_what_tables_take_away(flags, left, ttb):
    bench = Bench(ttb=ttb)
    iova = 0xFFFF << 48 if ttb else 0
    bench.map(0, 0x5000, ap=1, table_flags=flags)
    found = six(bench, iova)
    # what unprivileged accesses may write, privileged ones may not execute
    assert found == left & ~(PX if found & UW else 0)
    bench.write_cd(**{f"had{1 - ttb}": 1})
    assert six(bench, iova) == found
    bench.write_cd(**{f"had{ttb}": 1})
    assert six(bench, iova) == UR | UW | UX | PR | PW
    bench.features.had = 0
    assert six(bench, iova) == found


@pytest.mark.parametrize(("granule_lg2", "level"), [(12, 1), (12, 2), (14, 2), (16, 2)])
def test_bits_between_a_block_and_its_granule_are_ignored(granule_lg2, level):
    bench = Bench(granule_lg2=granule_lg2)
    shift = bench.tables.shift(level)
    below = (1 << shift) - (1 << max(granule_lg2, 16))
    bench.map(0, 3 << shift, level, ignored=below)
    assert bench.translate(0x123).pa == 3 << shift | 0x123
    assert bench.translate((1 << shift) - 8).pa == (4 << shift) - 8


@pytest.mark.rule(
    "S3.3.4-1", "S3.3.4-6", "S5.2-50", "S5.2-51", "S5.2-52", "S7.3-3", "S7.3.16-1", "S13.1-101",
    "S13.1-102", "S13.1.4-1", "S13.1.4-6",
)
@pytest.mark.parametrize("privcfg", [0, 1, 2, 3])
@pytest.mark.parametrize("instcfg", [0, 1, 2, 3])
@pytest.mark.parametrize("override", [0, 1])
def test_overrides_of_privilege_and_instruction(privcfg, instcfg, override):
    bench = Bench(default_features(attr_perms_ovr=override))
    bench.map(0, 0x5000, ap=0, uxn=1, pxn=0)  # PR, PW, PX
    bench.write_ste(privcfg=privcfg, instcfg=instcfg)
    for priv in (False, True):
        for write, instr in ((False, False), (True, False), (False, True), (True, True)):
            outcome = bench.translate(0, write=write, priv=priv, instr=instr)
            effective_priv = {2: False, 3: True}.get(privcfg if override else 0, priv)
            effective_instr = {2: False, 3: True}.get(instcfg if override else 0, instr)
            effective_instr = effective_instr and not write
            assert outcome.success == effective_priv
            assert outcome.perm == six(bench)
            if not outcome.success:
                assert outcome.event == event_record(
                    "F_PERMISSION", SID, write=write, priv=effective_priv,
                    instr=effective_instr, event_class=CLASS_IN,
                )  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Attributes


@pytest.mark.rule("S3.23-1", "S5.4-33", "S5.4-34", "S13.4-1", "S13.4.2-1", "S13.4.3-1", "V8.6.1-1")
@pytest.mark.parametrize(
    ("byte", "attr"),
    [
        (0x00, 0x00), (0x04, 0x04), (0x08, 0x08), (0x0C, 0x0C),
        (0x01, 0x00), (0x06, 0x04), (0x0B, 0x08), (0x0F, 0x0C),
        (0x44, 0x44), (0xBB, 0xBB), (0xFF, 0xFF), (0xF4, 0xF4), (0x4F, 0x4F), (0x37, 0x37),
        (0x80, 0x83), (0x40, 0x43), (0xF0, 0xF3), (0x10, 0x13), (0x88, 0x88), (0xCC, 0xCC),
    ],
)  # fmt: skip
def test_mair(byte, attr):
    bench = Bench()
    bench.map(0, 0x5000, attrindx=5, sh=3)
    bench.write_cd(mair=byte << 40)
    outcome = bench.translate()
    uncacheable = attr < 0x10 or attr == 0x44
    assert (outcome.attr, outcome.sh) == (attr, OSH if uncacheable else ISH)


@pytest.mark.rule("S13.1-93", "S13.1.5-3", "S13.4.2-2")
@pytest.mark.parametrize(
    ("ste", "byte", "attr"),
    [
        # Entering hints RWT meet those of the MAIR.
        ({"alloccfg": 0b1100}, 0xFF, 0xEE),
        ({"alloccfg": 0b1010}, 0xBF, 0x9D),
        ({"alloccfg": 0b1000}, 0xFF, 0xCC),
        ({"alloccfg": 0b1111}, 0xFF, 0x77),
        ({"alloccfg": 0b1111}, 0xEB, 0x63),
        # Transient, and nothing left to allocate.
        ({"alloccfg": 0b1101}, 0xDD, 0xCC),
        ({"alloccfg": 0b0111}, 0xFF, 0xFF),
        # Nothing to combine with.
        ({"alloccfg": 0b1000, "mtcfg": 1, "memattr": 0b0001}, 0xFF, 0xFF),
        ({"alloccfg": 0b1000, "mtcfg": 1, "memattr": 0b0101}, 0xFF, 0xFF),
        ({"alloccfg": 0b1000, "mtcfg": 1, "memattr": 0b1100}, 0x77, 0x77),
        ({"alloccfg": 0b1100, "mtcfg": 1, "memattr": 0b1010}, 0xFF, 0xEE),
        ({"alloccfg": 0b1111}, 0x04, 0x04),
        ({"alloccfg": 0b1111}, 0x44, 0x44),
    ],
)
def test_hints_combine_with_those_that_enter(ste, byte, attr):
    bench = Bench()
    bench.map(0, 0x5000)
    bench.write_cd(mair=byte)
    bench.write_ste(**ste)
    assert bench.translate().attr == attr
    bench.features.attr_types_ovr = 0
    assert bench.translate().attr == byte


@pytest.mark.rule(
    "S3.3.4-4", "S3.3.4-5", "S3.3.4-7", "S5.2-46", "S5.2-47", "S5.2-48", "S5.2-49", "S5.2.1-1",
    "S13.1-91", "S13.1-92", "S13.1.1-1", "S13.1.3-1", "S13.1.4-4", "S13.1.4-8", "S13.3-1",
    "S13.6.1-1",
)
@pytest.mark.parametrize(
    ("ste", "attr", "sh"),
    [
        ({}, 0xFF, NSH),
        ({"shcfg": 0}, 0xFF, NSH),
        ({"shcfg": 2}, 0xFF, OSH),
        ({"shcfg": 3}, 0xFF, ISH),
        ({"memattr": 0b0001}, 0xFF, NSH),
        ({"mtcfg": 1, "memattr": 0b0000}, 0x00, OSH),
        ({"mtcfg": 1, "memattr": 0b0011}, 0x0C, OSH),
        ({"mtcfg": 1, "memattr": 0b0100}, 0x00, OSH),
        ({"mtcfg": 1, "memattr": 0b1000}, 0x00, OSH),
        ({"mtcfg": 1, "memattr": 0b1100}, 0x00, OSH),
        ({"mtcfg": 1, "memattr": 0b0101, "shcfg": 0}, 0x44, OSH),
        ({"mtcfg": 1, "memattr": 0b1001, "shcfg": 3}, 0xB4, ISH),
        ({"mtcfg": 1, "memattr": 0b0111, "shcfg": 0}, 0x4F, NSH),
        ({"mtcfg": 1, "memattr": 0b1110, "alloccfg": 0b1101}, 0x62, NSH),
        ({"alloccfg": 0b1001}, 0xCC, NSH),
    ],
)
def test_bypass_attributes(ste, attr, sh):
    bench = Bench()
    bench.write_ste(config=0b100, **ste)
    outcome = bench.translate()
    assert (outcome.attr, outcome.sh, outcome.perm) == (attr, sh, ALL_ACCESSES)
    bench.features.attr_types_ovr = 0
    outcome = bench.translate()
    assert (outcome.attr, outcome.sh) == (0xFF, NSH)


@pytest.mark.rule("S5.4-8", "V8.6.2-1", "V8.6.2-2", "V8.6.2-3")
def test_shareability_comes_from_the_leaf_or_with_ds_from_the_cd():
    for code, expected in ((0, NSH), (1, NSH), (2, OSH), (3, ISH)):
        bench = Bench()
        bench.map(0, 0x5000, attrindx=1, sh=code)
        bench.write_cd(sh0=3 - code)
        assert bench.translate().sh == expected
        bench = Bench(ds=1)
        bench.map(0, 0x5000, attrindx=1)
        bench.write_cd(sh0=code, sh1=3 - code)
        assert bench.translate().sh == expected
        # 64 KB descriptors have no such format.
        bench = Bench(ds=1, granule_lg2=16)
        bench.map(0, 0x10000, attrindx=1, sh=code)
        bench.write_cd(sh0=3 - code)
        assert bench.translate().sh == expected


# ------------------------------------------------------------------------------------------------
# Generators


def translate_all(system, requests, cache):
    """(request, outcome) of each request."""
    for request in requests:
        yield (
            request,
            translate(system.read, system.features, system.regs, cache=cache, **request._asdict()),
        )


def generated(maker, seed, systems, count):
    """(system, request, outcome) of many requests."""
    rng = random.Random(seed)
    for _ in range(systems):
        system = maker(rng)
        for request, outcome in translate_all(system, system.requests(count), ContextCache()):
            yield system, request, outcome


def test_random_systems_succeed_often_and_fail_in_every_way():
    faults, actions, leaves, kinds, depths = (collections.Counter() for _ in range(5))
    total = 0
    for _system, _request, outcome in generated(tablegen.random_system, 1, 200, 120):
        total += 1
        faults[outcome.fault] += 1
        actions[outcome.action] += 1
        leaves[outcome.level, outcome.page_lg2] += 1
        for kind, level, *_ in outcome.fetches:
            kinds[kind] += 1
            depths[level] += 1
    assert set(EVENT_NUMBERS) <= set(faults), set(EVENT_NUMBERS) - set(faults)
    assert min(faults[name] for name in EVENT_NUMBERS) >= total // 1000
    assert set(actions) == {"ok", "bypass", "disabled", "abort", "raz_wi"}
    assert actions["ok"] + actions["bypass"] + actions["disabled"] >= 0.4 * total
    sizes = {
        (3, 12), (2, 21), (1, 30), (0, 39), (3, 14), (2, 25), (1, 36), (3, 16), (2, 29), (1, 42),
    }  # fmt: skip
    assert sizes <= set(leaves), sizes - set(leaves)
    assert set(kinds) == {"L1STD", "STE", "L1CD", "CD", "TT"}
    assert set(depths) == {None, -1, 0, 1, 2, 3}


def test_random_bytes_get_through_too():
    faults = collections.Counter()
    for _system, _request, outcome in generated(tablegen.random_bytes_system, 2, 40, 100):
        faults[outcome.fault or outcome.action] += 1
    assert {"ok", "bypass", "C_BAD_STE", "C_BAD_CD", "F_TRANSLATION", "F_STE_FETCH"} <= set(faults)


def test_perm_is_what_each_access_would_find():
    checked = 0
    for system, request, outcome in generated(tablegen.random_system, 3, 60, 25):
        if not outcome.success and outcome.fault != "F_PERMISSION":
            assert outcome.perm == 0
            continue
        cache = ContextCache()
        found = 0
        for priv in (False, True):
            for write, instr in ((False, False), (True, False), (False, True)):
                access = request._replace(write=write, priv=priv, instr=instr)
                again = next(translate_all(system, [access], cache))[1]
                if again.success:
                    found |= reference.access_bit(write, priv, instr)
        assert outcome.perm == found
        checked += 1
    assert checked >= 500


def test_outcomes_keep_their_promises():
    for system, request, outcome in generated(tablegen.random_system, 4, 60, 25):
        effective = reference.effective_features(system.features)
        assert outcome.success == (outcome.action in ("ok", "bypass", "disabled"))
        assert outcome.success == (outcome.pa is not None) == (outcome.attr is not None)
        assert (outcome.level is None) == (outcome.page_lg2 is None) == (outcome.action != "ok")
        if outcome.success:
            # A block may be larger than OAS: only where it begins is checked.
            assert outcome.pa >> max(effective.oas_bits, outcome.page_lg2 or 0) == 0
            assert outcome.fault is None and outcome.event is None
        if outcome.action == "ok":
            low = (1 << outcome.page_lg2) - 1
            assert outcome.pa & low == request.iova & low
        if outcome.event is not None:
            number = int.from_bytes(outcome.event, "little")
            assert number & 0xFF == EVENT_NUMBERS[outcome.fault]
            assert number >> 32 & 0xFFFF_FFFF == request.sid
        for kind, _level, address, size, data in outcome.fetches:
            assert size == (64 if kind in ("STE", "CD") else 8)
            assert address % size == 0 and (address + size - 1) >> effective.oas_bits == 0
            assert data == system.read(address, size)


def test_a_cache_changes_nothing():
    rng = random.Random(5)
    for _ in range(20):
        system = tablegen.random_system(rng)
        requests = system.requests(30)
        cached = [outcome for _, outcome in translate_all(system, requests, ContextCache())]
        plain = [outcome for _, outcome in translate_all(system, requests, None)]
        assert cached == plain


@pytest.mark.parametrize("maker", [tablegen.random_system, tablegen.random_bytes_system])
def test_a_seed_names_a_system(maker):
    one, two = maker(random.Random(6)), maker(random.Random(6))
    assert one.regions() == two.regions()
    assert (one.features, one.regs) == (two.features, two.regs)
    assert one.requests(50) == two.requests(50)
    assert one.regions() != maker(random.Random(7)).regions()


def test_regions_are_the_memory_itself():
    system = tablegen.random_system(random.Random(8))
    base, data = system.regions()[0]
    data[8:16] = b"12345678"
    assert system.read(base + 8, 8) == b"12345678"
    ends = [(base, base + len(data)) for base, data in system.regions()]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ends))
    assert system.read(ends[-1][1], 8) is None
