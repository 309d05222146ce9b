"""Captures: what others recorded is what the library gives, and bad files are refused."""

import contextlib
import errno
import gzip
import io
import json
import os
import shutil
import sys
import zipfile

import captures
import nested
import numpy as np
import ptwriter
import pytest
import tablegen
from nested import NESTED, SECOND, small_nested

import smmufast
from smmufast import layout, streams
from smmufast.capture import (
    ANY,
    UNTOLD,
    Capture,
    CaptureError,
    load_queue,
    translate_alone,
)
from smmufast.replay import replay

FOUND = captures.found()

# Requests and events of the captures that are known.
KNOWN = {
    "linux-7.3-4k-s1": 6395 + 892,
    "linux-6.12-4k-s1": 6132 + 892,
    "linux-7.3-16k-s1": 8818 + 1753,
    "linux-7.3-4k-passthrough": 8830 + 892,
    "linux-7.3-4k-s2": 5949 + 810,
    "cases-nested-2lvl": 12_339,
    "cases-nested-linear": 9607,
    "cases-s1only-2lvl": 3279,
    "cases-s2only-linear": 3987,
}
# Requests that a judged cause decides, in the captures of random configurations.
CAUSES = {
    "cases-nested-2lvl": {
        "aptable": 14,
        "aptable+table_size": 4,
        "aptable_perm": 3,
        "block_level": 29,
        "bypass_oas": 32,
        "bypass_oas (SMMUEN=0)": 41,
        "ctxptr55": 16,
        "ctxptr_oas": 39,
        "nested_ttb": 51,
        "nested_ttb|tbi1": 3,
        "prio": 45,
        "prio+block_level": 1,
        "prio+table_size": 2,
        "prio|aptable": 4,
        "s1cdmax": 104,
        "s2_concat": 118,
        "s2_concat+s2_hahd": 7,
        "s2_concat|tbi1": 2,
        "s2_hahd": 153,
        "s2_ipa_silent": 96,
        "s2_ipa_silent+s2_hahd": 4,
        "s2_ipa_silent+s2_small": 3,
        "s2_small": 25,
        "span": 23,
        "span+aptable": 1,
        "stalld_s2": 10,
        "table_size": 7,
        "tbi1": 61,
    },
    "cases-nested-linear": {
        "64k_15_12": 2,
        "aptable": 24,
        "aptable_perm": 9,
        "block_level": 14,
        "bypass_oas": 14,
        "bypass_oas (SMMUEN=0)": 154,
        "ctxptr55": 16,
        "nested_ttb": 71,
        "nested_ttb|tbi1": 2,
        "prio": 34,
        "s1cdmax": 76,
        "s2_concat": 102,
        "s2_hahd": 40,
        "s2_ipa_silent": 77,
        "s2_ipa_silent+s2_hahd": 1,
        "s2_small": 32,
        "table_size": 3,
        "tbi1": 52,
        "tbi1+prio": 1,
    },
    "cases-s1only-2lvl": {
        "aptable": 8,
        "aptable_perm": 1,
        "block_level": 1,
        "bypass_oas": 16,
        "ctxptr_oas": 16,
        "prio": 10,
        "s1cdmax": 73,
        "tbi1": 23,
    },
    "cases-s2only-linear": {
        "64k_15_12": 2,
        "block_level": 2,
        "bypass_oas": 24,
        "prio": 8,
        "prio+block_level": 3,
        "s2_concat": 56,
        "s2_hahd": 68,
        "s2_ipa_silent": 70,
        "s2_ipa_silent+s2_hahd": 6,
        "s2_ipa_silent+s2_small": 3,
        "s2_small": 34,
        "s2t0sz_ps": 29,
        "table_size": 7,
    },
}
STAGE1 = [name for name in KNOWN if name.startswith("linux-") and not name.endswith("s2")]


def test_captures_are_found(capsys):
    with capsys.disabled():
        print(f" [{len(FOUND)} captures, the shipped one included]", end="")
    assert captures.SHIPPED in FOUND
    assert all(path.is_dir() for path in FOUND)


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_request_of_every_capture_agrees(path):
    capture = Capture.load(path)
    found = replay(capture, random=5000)
    assert [difference.as_dict() for difference in found.differences] == []
    assert found.total.differing == found.random_differing == 0
    if not capture.masked:
        assert found.total.unsupported == 0
    if path.name in KNOWN:
        assert capture.masked == {}
        assert found.total.agreeing == KNOWN[path.name]
        if capture.kind == "cases":
            assert {name: tally.agreeing for name, tally in found.causes.items()} == CAUSES[
                path.name
            ]
    if any(tally.page_lg2 for tally in found.streams.values()):
        assert found.random == 5000
    for tallies in (found.streams, found.causes):
        for tally in tallies.values():
            assert tally.requests == tally.agreeing + tally.unsupported > 0
    assert sum(tally.requests for tally in found.streams.values()) == found.total.requests


@pytest.mark.skipif(
    not {path.name for path in FOUND}.issuperset(STAGE1), reason="the four captures are not here"
)
def test_four_kernels_have_30175_translations_and_4429_events():
    translations = events = 0
    for path in FOUND[1:]:
        if path.name in STAGE1:
            (configuration,) = Capture.load(path)
            recorded = [expected.record is not None for expected in configuration.expected]
            events += sum(recorded)
            translations += len(recorded) - sum(recorded)
    assert (translations, events) == (30_175, 4_429)


@pytest.mark.parametrize(
    "path", [p for p in FOUND if p.name.startswith("linux-")], ids=lambda p: p.parent.name + p.name
)
def test_tables_lead_to_every_recorded_page_and_no_other(path):
    capture = Capture.load(path)
    (configuration,) = capture
    smmu = configuration.smmu()
    recorded = [
        address
        for i, address in enumerate(configuration.page_addresses.tolist())
        if configuration.page(i).any()
    ]
    assert streams.pages(smmu, capture.masked) == sorted(recorded)


def test_the_shipped_capture_has_the_form_that_is_documented():
    capture = Capture.load(captures.SHIPPED)
    assert (capture.kind, len(capture), capture.name) == ("linux", 1, "linux-7.3-4k-s1")
    configuration = capture[0]
    assert capture.configuration("linux-7.3-4k-s1") is configuration
    with pytest.raises(KeyError):
        capture.configuration("another")
    assert configuration.features.s2p == 1
    assert configuration.masked == capture.masked == {}
    assert configuration.smmu().features == configuration.features
    assert configuration.features.arch_minor == 1
    lines = captures.read_lines(captures.SHIPPED / "requests.jsonl.gz")
    events = captures.read_lines(captures.SHIPPED / "events.jsonl.gz")
    assert len(configuration.requests) == len(configuration.expected) == len(lines) + len(events)
    for line, request, expected in zip(
        lines, configuration.requests.tolist(), configuration.expected, strict=False
    ):
        assert request == (
            line["sid"],
            smmufast.NO_SUBSTREAM,
            int(line["iova"], 16),
            not line["perm"] & 1,
            True,
            False,
        )
        assert (expected.action, expected.pa) == ("ok", int(line["pa"], 16))
        assert (expected.perm, expected.level, expected.page_lg2, expected.stage) == (
            line["perm"],
            line["level"],
            line["page_shift"],
            1,
        )
    for line, expected in zip(events, configuration.expected[len(lines) :], strict=True):
        assert expected.record.hex() == line["hex"]
        assert expected.fault == layout.Event(line["type"]).name
        # all of the record counts but PnU, InD and the IPA, which stage 1 has not
        assert int.from_bytes(expected.mask, "little") == (1 << 192) - 1 & ~(0b11 << 97)
    assert configuration.where(0) == "requests.jsonl.gz:1"
    assert configuration.where(len(lines) + 4) == "events.jsonl.gz:5"
    with pytest.raises(ValueError, match="read-only"):
        configuration.requests["sid"][0] = 1


def test_ram_reads_as_zero_and_the_rest_aborts():
    (configuration,) = Capture.load(captures.SHIPPED)
    memory = configuration.memory()
    ((base, size),) = configuration.regions
    assert memory.read(base, 8) == bytes(8)
    assert memory.read(base + size - 8, 8) == bytes(8)
    for address in (base - 8, base + size):
        with pytest.raises(smmufast.ExternalAbort):
            memory.read(address, 8)
    address = int(configuration.page_addresses[5])
    assert memory.read(address, 4096) == configuration.page(5).tobytes()
    # each memory is its own
    configuration.memory().write(address, b"\xff" * 4096)
    assert memory.read(address, 4096) == configuration.page(5).tobytes()


# --- kind "cases" ---------------------------------------------------------------------------------


def event(name, record=None, **more):
    return {"k": "event", "name": name, "rec": record or record_of(name, **more), "nrec": 1}


def record_of(name, **fields):
    record = layout.EVENTS[layout.Event[name]]
    fields = {"StreamID": captures.SID} | fields
    return layout.to_bytes(record, layout.pack(record, **fields)).hex()


def request(out, iova=0x1000, rnw=1, sid=captures.SID, **more):
    return {"sid": sid, "iova": hex(iova), "rnw": rnw, "fam": "", "tag": "", "out": out} | more


def one(tmp_path, *requests, smmu=True, more=None, **header):
    """A capture of one configuration with these requests."""
    path = captures.cases(
        tmp_path / "cases",
        (captures.small_system() if smmu else None, list(requests), more or {}),
        **header,
    )
    return Capture.load(path)


OK = {"k": "ok", "pa": "0x50001000", "perm": 3, "stage": 1}


def test_outcomes_of_every_kind(tmp_path):
    capture = one(
        tmp_path,
        request(OK, 0x1000),
        request(event("F_PERMISSION", CLASS=2, InputAddr=0x10), 0x10, 0),
        request({"k": "abort"}, sid=5),
        request({"k": "bypass"}, 0x77, sid=4),
        request(event("C_BAD_STREAMID", StreamID=16), sid=16),
    )
    assert capture.kind == "cases"
    (configuration,) = capture
    assert [expected.action for expected in configuration.expected] == [
        "ok",
        "abort",
        "abort",
        "bypass",
        "abort",
    ]
    assert configuration.requests.tolist()[1] == (3, smmufast.NO_SUBSTREAM, 0x10, True, True, False)
    assert configuration.registers["CR2"] == 2
    found = replay(capture)
    assert found.differences == []
    assert found.total.agreeing == 5


def test_what_the_architecture_says_replaces_what_was_recorded(tmp_path):
    differs = {"cause": "prio", "arch": {"k": "event", "name": "F_ACCESS"}, "why": ""}
    capture = one(
        tmp_path,
        request(OK, 0x3000, arch_differs=differs),
        request({"k": "abort"}, arch_differs=differs | {"arch": {"k": "ok", "pa": "0x50001000"}}),
    )
    first, second = capture[0].expected
    assert (first.fault, first.record, first.cause) == ("F_ACCESS", None, "prio")
    assert (second.pa, second.perm, second.cause) == (0x5000_1000, None, "prio")
    found = replay(capture)
    assert found.total.agreeing == found.causes["prio"].agreeing == 2


def test_a_silent_fault_is_some_fault_that_is_not_recorded(tmp_path):
    silent = {"k": "fault_silent"}
    capture = one(tmp_path, request(silent, 0x9000), request(silent, sid=5), request(silent))
    assert [expected.fault for expected in capture[0].expected] == [ANY] * 3
    reasons = [difference.reasons for difference in replay(capture).differences]
    assert reasons == [
        ["event: nothing recorded expected, an event recorded found (F_TRANSLATION)"],
        ["fault: some fault expected, none found"],
        ["action: abort expected, ok found"],
    ]


def test_without_an_event_queue_only_the_abort_counts(tmp_path):
    capture = one(
        tmp_path,
        request({"k": "fault_silent"}, sid=5),
        request({"k": "abort"}, 0x9000),
        request(OK),
        more={"cr0": "0x9"},
    )
    assert [expected.fault for expected in capture[0].expected] == [UNTOLD, UNTOLD, None]
    assert replay(capture).total.agreeing == 3


def test_disabled_lets_pass_what_fits_the_address_size(tmp_path):
    out = {"k": "disable"}
    capture = one(
        tmp_path, request(out, 0xFFF_FFFF_FFFF), request(out, 1 << 44), more={"cr0": "0xc"}
    )
    assert [expected.action for expected in capture[0].expected] == ["disabled", "abort"]
    assert capture[0].expected[1].cause == "bypass_oas (SMMUEN=0)"
    assert replay(capture).total.agreeing == 2


def test_records_are_corrected_to_the_architecture(tmp_path):
    stage2 = {"S2": 1, "CLASS": 1, "InputAddr": 0x10, "RnW": 1, "IPA": 0x5000}
    with_low_bits = int.from_bytes(bytes.fromhex(record_of("F_PERMISSION", **stage2)), "little")
    with_low_bits |= 0x123 << 192
    capture = one(
        tmp_path,
        # the address of F_CD_FETCH stands where InputAddr is in other records
        request(
            event("F_CD_FETCH", (9 | 3 << 32 | 0x8000_0040 << 128).to_bytes(32, "little").hex())
        ),
        # class TT: RnW=1 for a write; the IPA has low bits; TTRnW is never set
        request(event("F_PERMISSION", with_low_bits.to_bytes(32, "little").hex()), 0x10, 0),
        request(
            event("F_TRANSLATION", **(stage2 | {"RnW": 0})),
            0x10,
            0,
            rec_differs=["CLASS:2", "S2:0"],
        ),
        request(
            event("F_TRANSLATION", CLASS=2, InputAddr=0x10),
            0x10,
            0,
            rec_differs=["S2:1", "IPA:0xabcd000"],
        ),
    )
    fields, masks = [], []
    for expected in capture[0].expected:
        fields.append(layout.unpack(expected.fault, expected.record))
        masks.append((1 << 256) - 1 & ~int.from_bytes(expected.mask, "little"))
    assert fields[0]["FetchAddr"] == 0x8000_0040
    assert masks[0] == 0
    assert (fields[1]["RnW"], fields[1]["IPA"]) == (0, 0x5000)
    assert masks[1] == 0b11 << 97 | 1 << 108 | 0xFFF << 192
    assert (fields[2]["CLASS"], fields[2]["S2"]) == (2, 0)
    assert masks[2] == 0b11 << 97 | (1 << 64) - 1 << 192  # stage 1 has no IPA
    assert (fields[3]["S2"], fields[3]["IPA"]) == (1, 0xABC_D000)
    assert masks[3] == 0b11 << 97 | 0xFFF << 192


def test_a_stream_that_needs_what_is_not_modelled_is_counted_apart_whatever_is_expected(tmp_path):
    both = captures.QEMU_IDR | {"IDR0": "0xd44101f"}  # tables of both architectures
    cd = bytearray(captures.small_system().memory.read(captures.CONTEXTS, 64))
    cd[5] &= 0xFD  # AA64
    first = captures.small_system()
    first.memory.write(captures.CONTEXTS, bytes(cd))
    for name, system in (("cd", first), ("ste", captures.small_system(config=0b110))):
        requests = [request(OK), request(event("C_BAD_STE")), request({"k": "bypass"}, sid=4)]
        path = captures.cases(tmp_path / name, (system, requests, {}), idr=both)
        capture = Capture.load(path)
        assert capture.masked == {"ttf": 3}
        assert "masked ttf=3" in repr(capture[0])
        found = replay(capture)
        assert found.unsupported == {"VMSAv8-32 tables": 2}
        assert found.streams[captures.SID].unsupported == 2
        assert (found.total.agreeing, found.total.differing) == (1, 0)
        assert not found
    # where the recorded SMMU has no such tables either, the STE is illegal by rule
    path = captures.cases(tmp_path / "none", (system, requests[1:], {}))
    found = replay(Capture.load(path))
    assert (found.total.agreeing, found.total.unsupported) == (2, 0)
    assert found


def test_permissions_of_both_stages_are_stage_1s_alone(tmp_path):
    def one_of(name, perm, **told):
        out = {"k": "ok", "pa": hex(nested.PAGES + nested.READ_ONLY_OUTSIDE), "perm": perm} | told
        line = request(out, nested.READ_ONLY_OUTSIDE, sid=NESTED)
        smmu = small_nested()
        saved = Capture.save(tmp_path / f"{name}-pages", smmu=smmu)
        path = captures.cases(tmp_path / name, (None, [line], {}))
        contents = [np.zeros(4096, np.uint8)]
        held = []
        for i, address in enumerate(saved[0].page_addresses.tolist()):
            held.append([hex(address), len(contents)])
            contents.append(saved[0].page(i))
        np.savez_compressed(path / "pages.npz", pages=np.array(contents))
        lines = captures.read_lines(path / "cases.jsonl.gz")
        lines[1]["pages"] = held
        captures.write_lines(path / "cases.jsonl.gz", lines)
        return [d.reasons for d in replay(Capture.load(path)).differences]

    # stage 1 permits reads and writes, stage 2 reads alone
    assert one_of("both", 3, stage=3) == []
    assert one_of("less", 1, stage=3) == [["permission: 0o1 expected, 0o3 found"]]
    assert one_of("stage", 3, stage=2)[0][:2] == [
        "stage: 2 expected, 3 found",
        "permission: 0o3 expected, 0o1 found",
    ]


# --- replay ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "changes", "reason"),
    [
        (0, {"pa": 0x5000_0124}, "pa: 0x50000124 expected, 0x50000123 found"),
        (0, {"level": 2}, "level: 2 expected, 3 found"),
        (0, {"page_lg2": 21}, "page size: 2^21 expected, 2^12 found"),
        (0, {"stage": 3}, "stage: 3 expected, 1 found"),
        (3, {"stage": 1}, "stage: 1 expected, 0 found"),
        (0, {"perm": 0o7}, "permission: 0o7 expected, 0o5 found"),
        (0, {"perm": 0o4}, "read: F_PERMISSION expected, ok found"),
        (0, {"action": "bypass"}, "action: bypass expected, ok found"),
        (0, {"action": "abort", "fault": "F_ACCESS"}, "action: abort expected, ok found"),
        (4, {"action": "raz_wi"}, "action: raz_wi expected, abort found (F_PERMISSION)"),
        (4, {"recorded": False}, "event: nothing recorded expected, an event recorded found"),
        (4, {"fault": "F_ACCESS"}, "fault: F_ACCESS expected, F_PERMISSION found"),
        (4, {"fault": None}, "fault: none expected, F_PERMISSION found"),
    ],
)
def test_each_difference_is_found_and_named(tmp_path, index, changes, reason):
    capture = captures.small_capture(tmp_path / "small")
    expected = capture[0].expected
    assert expected[index].action == {0: "ok", 3: "bypass"}.get(index, "abort")
    assert replay(capture)
    expected[index] = expected[index]._replace(**changes)
    found = replay(capture)
    assert not found
    assert (found.total.differing, found.total.agreeing) == (1, 7)
    assert found.streams[4 if index == 3 else captures.SID].differing == 1
    (difference,) = found.differences
    assert difference.index == index
    assert any(reason in text for text in difference.reasons), difference.reasons
    assert difference.result.fetches
    assert difference.as_dict()["explain"].startswith("A ")


@pytest.mark.parametrize("bit", [*range(0, 256, 5), 97, 98, 99])
def test_every_bit_of_a_record_counts_unless_it_is_masked(tmp_path, bit):
    capture = captures.small_capture(tmp_path / "small")
    expected = capture[0].expected
    index = next(i for i, e in enumerate(expected) if e.fault == "F_TRANSLATION")
    word = int.from_bytes(expected[index].record, "little") ^ 1 << bit
    expected[index] = expected[index]._replace(record=word.to_bytes(32, "little"))
    assert replay(capture).total.differing == 1
    mask = (1 << 256) - 1 & ~(1 << bit)
    expected[index] = expected[index]._replace(mask=mask.to_bytes(32, "little"))
    assert replay(capture).total.differing == 0


class Lying:
    """A Smmu whose batches are wrong in one row."""

    def __init__(self, smmu, column):
        self.smmu = smmu
        self.features = smmu.features
        self.translate = smmu.translate
        self.column = column

    def translate_batch(self, sid, iova, *, out, **access):
        self.smmu.translate_batch(sid, iova, out=out, **access)
        if self.column in out and sid[0] == captures.SID:
            out[self.column][0] = (
                out[self.column][0].tobytes()[::-1]
                if (self.column == "record")
                else out[self.column][0] + 1
            )


@pytest.mark.parametrize("column", ["pa", "action", "fault"])
def test_a_batch_that_differs_from_the_calls_is_found(tmp_path, column):
    capture = captures.small_capture(tmp_path / "small")
    smmu = Lying(capture[0].smmu(), column)
    capture[0].smmu = lambda: smmu
    found = replay(capture, repeat=2)
    assert found.total.differing == 1
    assert found.differences[0].reasons == ["translate_batch gives another outcome"]
    assert found.total.agreeing == 7


def test_numbers_of_a_replay_are_checked(tmp_path):
    capture = captures.small_capture(tmp_path / "c")
    for name, value in (("repeat", 0), ("random", -1), ("keep", -1), ("seed", "x"), ("seed", -1)):
        with pytest.raises((TypeError, ValueError), match=f"^{name} must be "):
            replay(capture, **{name: value})


def test_random_requests_are_compared_and_all_are_made(tmp_path):
    path = captures.cases(
        tmp_path / "cases",
        (captures.small_system(), [request(OK), request({"k": "bypass"}, sid=4)], {}),
        (
            captures.small_system(),
            [request(event("F_TRANSLATION", CLASS=2, InputAddr=0x9000, RnW=1), 0x9000)],
            {},
        ),
    )
    capture = Capture.load(path)
    seen = []
    found = replay(capture, random=1001, repeat=3, progress=lambda *step: seen.append(step))
    assert (found.random, found.random_differing) == (1001, 0)
    assert found.random_seconds > 0
    assert seen[-1] == (3 + 9 + 1001, 3 + 9 + 1001)
    assert found.streams[captures.SID].translations == 6

    class Shifted(Lying):
        def translate_batch(self, sid, iova, *, out, **access):
            self.smmu.translate_batch(sid, iova, out=out, **access)
            if "fault" not in out:
                out["pa"] += np.uint64(4096)

    first = capture[0].smmu()
    capture[0].smmu = lambda: Shifted(first, "pa")
    found = replay(capture, random=100)
    assert (found.random, found.random_differing, found.total.differing) == (100, 100, 0)
    assert not found


# --- save -----------------------------------------------------------------------------------------


def test_a_hand_made_memory_comes_back_as_it_was(tmp_path):
    smmu = captures.small_system()
    capture = captures.small_capture(tmp_path / "small")
    (configuration,) = capture
    assert configuration.regions == (captures.RAM,)
    assert configuration.masked == {}
    again = configuration.smmu()
    for name in ("strtab_base", "strtab_base_cfg", "cr0", "cr2", "gbpa", "features"):
        assert getattr(again, name) == getattr(smmu, name)
    for address in configuration.page_addresses.tolist():
        assert again.memory.read(address, 4096) == smmu.memory.read(address, 4096)
    assert set(configuration.page_addresses.tolist()) == {
        captures.STREAM_TABLE,
        captures.CONTEXTS,
        captures.TABLES,
        captures.TABLES + 0x1000,
        captures.TABLES + 0x2000,
    }
    # what came of the requests: lines of both lists, in order
    lines = captures.read_lines(tmp_path / "small" / "requests.jsonl.gz")
    assert [(line["pa"], line["perm"], line["priv"], line["bypass"]) for line in lines] == [
        ("0x50000123", 0o5, 0, 0),
        ("0x50001456", 0o3, 1, 0),
        ("0x50002456", 0o7, 0, 0),
        ("0x1234", 0o7, 0, 1),
    ]
    events = [expected.fault for expected in configuration.expected[4:]]
    assert events == ["F_PERMISSION", "F_ACCESS", "F_TRANSLATION", "C_BAD_STE"]
    assert all(expected.mask == b"\xff" * 32 for expected in configuration.expected[4:])
    assert replay(capture).total.agreeing == 8


def test_a_capture_saved_again_is_the_same(tmp_path):
    (configuration,) = capture = Capture.load(captures.SHIPPED)
    saved = Capture.save(
        tmp_path / "again",
        memory=configuration.memory(),
        registers=configuration.registers,
        requests=captures.read_lines(captures.SHIPPED / "requests.jsonl.gz"),
        events=captures.read_lines(captures.SHIPPED / "events.jsonl.gz"),
        meta=capture.meta | {"regions": [[0, 64]]},  # whose counts and RAM are not the new ones
    )
    assert saved.meta["kver"] == capture.meta["kver"]
    assert "truth" not in saved.meta and "regions" not in saved.meta
    assert saved[0].features == configuration.features
    assert saved[0].expected == configuration.expected
    assert (saved[0].requests == configuration.requests).all()
    assert saved[0].regions == configuration.regions
    assert replay(saved).total.agreeing == len(configuration.requests)


NESTED_SYSTEM = pytest.param(tablegen.random_nested_system, marks=pytest.mark.slow)


@pytest.mark.parametrize("maker", [tablegen.random_system, NESTED_SYSTEM])
def test_random_systems_come_back_from_their_captures(tmp_path, maker):
    kinds = set()
    for number, (smmu, system) in enumerate(captures.random_systems(maker, 11, 60)):
        requests = []
        for drawn in system.requests(40):
            access = drawn._asdict()
            sid, iova = access.pop("sid"), access.pop("iova")
            result = translate_alone(smmu, sid, iova, **access)
            if result or result.event is not None:
                requests.append(drawn._asdict())
                kinds.add(result.event.name if result.event else (result.action, result.stage))
                if result.action == "stall":
                    kinds.add("stall")
        saved = Capture.save(tmp_path / str(number), smmu=smmu, requests=requests)
        found = replay(saved)
        assert found.differences == [], system.regs
        assert found.total.agreeing == len(requests)
    assert kinds >= {
        ("ok", 1),
        ("bypass", 0),
        "C_BAD_STREAMID",
        "C_BAD_STE",
        "C_BAD_CD",
        "F_TRANSLATION",
        "F_PERMISSION",
        "F_ADDR_SIZE",
        "C_BAD_SUBSTREAMID",
    }
    if maker is tablegen.random_nested_system:
        assert kinds >= {("ok", 2), ("ok", 3), "stall"}


def test_a_nested_system_comes_back_from_the_pages_behind_its_ipas(tmp_path):
    smmu = small_nested()
    requests = [
        {"sid": NESTED, "iova": page + 8, "write": write}
        for page in range(0, 0x7000, 0x1000)
        for write in (False, True)
    ]
    requests += [{"sid": SECOND, "iova": nested.DATA + nested.RW}, {"sid": SECOND, "iova": 1 << 44}]
    saved = Capture.save(tmp_path / "nested", smmu=smmu, requests=requests)
    lines = captures.read_lines(tmp_path / "nested" / "requests.jsonl.gz")
    assert [(line["stage"], line["perm"], line["page_shift"]) for line in lines] == [
        (3, 0o5, 12),  # stage 2 takes the write away
        (3, 0o7, 12),
        (3, 0o7, 12),
        (3, 0o5, 12),
        (3, 0o7, 12),
        (3, 0o7, 12),
        (2, 0o7, 12),
    ]
    guest = {nested.physical(nested.CONTEXT)} | {
        nested.physical(nested.TABLES + page) for page in range(0, 0x3000, 0x1000)
    }
    found = set(saved[0].page_addresses.tolist())
    assert guest < found
    second = {page for page in found if nested.STAGE2 <= page < nested.STAGE2 + 0x10_0000}
    assert found == guest | second | {captures.STREAM_TABLE}
    # both first tables lead somewhere, to one table of level 2 and one of level 3 each
    assert len(second) == 2 * 3
    assert replay(saved).total.agreeing == len(requests)


def test_hardware_updates_are_not_kept(tmp_path):
    smmu = small_nested(
        {"httu": 2}, s2ha=1, s2hd=1, cd={"ha": 1, "hd": 1}, stage1={"af": 0}, tables={"af": 0}
    )
    (region,) = smmu.memory.regions
    before = smmu.memory.read(region.base, region.size)
    requests = [{"sid": NESTED, "iova": nested.RW, "write": write} for write in (False, True)]
    # what faults because its access flag is clear does so whatever came before
    requests += [{"sid": NESTED, "iova": page} for page in (nested.NO_AF, nested.UNMAPPED)]
    saved = Capture.save(tmp_path / "updates", smmu=smmu, requests=requests)
    assert smmu.memory.read(region.base, region.size) == before
    assert [expected.action for expected in saved[0].expected] == ["ok", "ok", "ok", "abort"]
    found = replay(saved, repeat=2)
    assert (found.total.agreeing, found.total.differing) == (4, 0)
    # the same as a call that keeps them
    kept = smmu.translate(NESTED, nested.RW, write=True, trace=True)
    alone = translate_alone(saved[0].smmu(), NESTED, nested.RW, write=True)
    assert (kept.pa, kept.perm, kept.ipa) == (alone.pa, alone.perm, alone.ipa)
    assert kept.fetches == alone.fetches
    assert sum(fetch.swap is not None for fetch in kept.fetches) > 4
    assert smmu.memory.read(region.base, region.size) != before


def test_streams_that_share_a_descriptor_do_not_disturb_each_other(tmp_path):
    # stream 3 sets the access flag, for stream 6 over the same tables it is a fault
    smmu = small_nested({"httu": 1}, cd={"ha": 1}, stage1={"af": 0})
    cd = bytearray(smmu.memory.read(nested.physical(nested.CONTEXT), 64))
    cd[5] &= 0xF7  # HA
    smmu.memory.write(nested.physical(nested.CONTEXT) + 64, bytes(cd))
    ste = bytearray(smmu.memory.read(captures.STREAM_TABLE + 64 * NESTED, 64))
    ste[:8] = ptwriter.encode_ste(v=1, config=0b111, s1contextptr=nested.CONTEXT + 64)[:8]
    smmu.memory.write(captures.STREAM_TABLE + 64 * 6, bytes(ste))
    requests = [{"sid": sid, "iova": nested.RW} for sid in (NESTED, 6)]
    saved = Capture.save(tmp_path / "shared", smmu=smmu, requests=requests)
    assert [(e.action, e.fault) for e in saved[0].expected] == [("ok", None), ("abort", "F_ACCESS")]
    assert replay(saved).total.agreeing == 2


def test_stalls_come_back_whatever_their_tag(tmp_path):
    smmu = small_nested({"stall_model": 0, "stall_max": 2}, s2s=1, cd={"s": 1})
    pages = [nested.NO_AF, nested.UNMAPPED, nested.READ_ONLY_OUTSIDE, nested.READ_ONLY] * 2
    requests = [{"sid": NESTED, "iova": page, "write": True} for page in pages]
    saved = Capture.save(tmp_path / "stalls", smmu=smmu, requests=requests)
    expected = saved[0].expected
    assert [e.action for e in expected] == ["stall"] * 8
    tags = [layout.unpack("EVENT", e.record)["STAG"] for e in expected]
    assert len(set(tags)) > 1
    found = replay(saved, repeat=3)
    assert (found.total.agreeing, found.total.differing) == (8, 0)
    assert smmu.stalls == []
    expected[0] = expected[0]._replace(fault="F_PERMISSION")
    (difference,) = replay(saved).differences
    assert difference.reasons == ["fault: F_PERMISSION expected, F_ACCESS found"]


def test_saving_leaves_the_queues_alone(tmp_path):
    whole = small_nested()
    queue = nested.STAGE2 + 0x80_0000
    smmu = smmufast.Smmu(
        whole.memory,
        whole.features,
        strtab_base=whole.strtab_base,
        strtab_base_cfg=whole.strtab_base_cfg,
        eventq_base=queue | 4,
    )
    requests = [{"sid": NESTED, "iova": nested.UNMAPPED}]
    saved = Capture.save(tmp_path / "quiet", smmu=smmu, requests=requests)
    assert saved[0].expected[0].fault == "F_TRANSLATION"
    assert smmu.memory.read(queue, 64) == bytes(64)
    smmu.translate(NESTED, nested.UNMAPPED)
    assert smmu.memory.read(queue, 64) != bytes(64)


def test_regions_that_hold_part_of_a_page_are_kept(tmp_path):
    whole = captures.small_system()
    memory = smmufast.Memory()
    # the stream table without its last eight entries, and one byte less than a page of contexts
    memory.add(bytearray(whole.memory.read(captures.STREAM_TABLE, 512)), captures.STREAM_TABLE)
    memory.add(bytearray(whole.memory.read(captures.CONTEXTS, 64)), captures.CONTEXTS)
    memory.add_private(captures.TABLES, 0x10_0000)
    memory.write(captures.TABLES, whole.memory.read(captures.TABLES, 0x3000))
    smmu = smmufast.Smmu(memory, whole.features, strtab_base=whole.strtab_base, strtab_base_cfg=4)
    requests = [{"sid": captures.SID, "iova": 0x1000}, {"sid": 8, "iova": 0}]
    saved = Capture.save(tmp_path / "parts", smmu=smmu, requests=requests)
    assert saved[0].regions == tuple((region.base, region.size) for region in memory.regions)
    assert [expected.fault for expected in saved[0].expected] == [None, "F_STE_FETCH"]
    assert replay(saved).total.agreeing == 2


def test_pages_may_be_named(tmp_path):
    smmu = captures.small_system()
    named = [captures.STREAM_TABLE, captures.CONTEXTS, captures.TABLES + 0x9000]
    saved = Capture.save(tmp_path / "named", smmu=smmu, pages=named)
    assert saved[0].page_addresses.tolist() == named[:2]  # the third is zero
    assert len(saved[0].requests) == 0
    with pytest.raises(ValueError, match="pages must be multiples of 4096, not 0x40000800"):
        Capture.save(tmp_path / "odd", smmu=smmu, pages=[0x4000_0800])


def test_what_cannot_be_saved_is_refused(tmp_path):
    smmu = captures.small_system()
    with pytest.raises(ValueError, match="ends without an event"):
        Capture.save(tmp_path / "silent", smmu=smmu, requests=[{"sid": 5, "iova": 0}])
    with pytest.raises(TypeError, match=r"save\(\) needs smmu, or memory and registers"):
        Capture.save(tmp_path / "nothing")
    with pytest.raises(TypeError, match="must not be given beside smmu"):
        Capture.save(tmp_path / "both", smmu=smmu, memory=smmu.memory)
    with pytest.raises(CaptureError, match="register CR0 is missing"):
        Capture.save(
            tmp_path / "registers",
            memory=smmu.memory,
            registers={"STRTAB_BASE": 0, "STRTAB_BASE_CFG": 0},
        )
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    with pytest.raises(FileExistsError, match="not empty"):
        Capture.save(tmp_path / "taken", smmu=smmu)
    huge = smmufast.Memory()
    huge.add_private()
    smmu = smmufast.Smmu(huge, strtab_base_cfg=32)
    with pytest.raises(ValueError, match="name the pages"):
        Capture.save(tmp_path / "huge", smmu=smmu)


# --- files are whole or absent ----------------------------------------------------------------


class Interrupted:
    """Raises KeyboardInterrupt at one of the calls of Python functions that something makes."""

    def __init__(self, at=None):
        self.at, self.calls = at, 0

    def __call__(self, frame, what, argument):
        if what == "call":
            self.calls += 1
            if self.calls == self.at:
                raise KeyboardInterrupt

    def run(self, call):
        sys.setprofile(self)
        try:
            return call()
        finally:
            sys.setprofile(None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_save_leaves_nothing(tmp_path):
    smmu = captures.small_system()

    def save():
        return Capture.save(tmp_path / "c", smmu=smmu, requests=captures.SMALL_REQUESTS)

    counted = Interrupted()
    counted.run(save)
    shutil.rmtree(tmp_path / "c")
    interrupted = whole = 0
    for at in range(1, counted.calls, counted.calls // 150):
        with contextlib.suppress(KeyboardInterrupt):
            Interrupted(at).run(save)
        left = {path.name for path in tmp_path.iterdir()}
        if "c" in left:  # complete: only what is returned was lost
            assert len(Capture.load(tmp_path / "c")[0].requests) == len(captures.SMALL_REQUESTS)
            whole += 1
        interrupted += "c" not in left
        for name in left:
            shutil.rmtree(tmp_path / name)
    assert interrupted > 100
    save()
    assert whole < 40


@pytest.mark.parametrize("name", ["fsync", "rename", "mkdir"])
def test_a_save_that_the_disk_refuses_leaves_nothing(tmp_path, monkeypatch, name):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, refuse)
        with pytest.raises(OSError, match="No space left"):
            captures.small_capture(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
    captures.small_capture(tmp_path / "c")


def test_a_save_is_checked_before_it_takes_its_name(tmp_path):
    smmu = captures.small_system()
    with pytest.raises(CaptureError, match=r"requests.jsonl.gz:1: a member must .*, not 'pasid'"):
        Capture.save(tmp_path / "c", smmu=smmu, requests=[LINE | {"pasid": 3}])
    assert list(tmp_path.iterdir()) == []


def test_a_save_takes_the_place_of_an_empty_directory_and_of_nothing_else(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "link").symlink_to("c")
    saved = captures.small_capture(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert saved[0].where(0) == "requests.jsonl.gz:1"
    assert (saved.name, saved[0].id) == ("link", "link")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="a file of that name"):
        captures.small_capture(tmp_path / "file")
    with pytest.raises(FileExistsError, match="not empty"):
        captures.small_capture(tmp_path / "c")
    captures.small_capture(tmp_path / "new" / "deep" / "c")


def test_a_capture_that_lost_lines_is_refused(tmp_path):
    captures.small_capture(tmp_path / "c")
    for name, lines in (("requests", 4), ("events", 4)):
        path = tmp_path / "c" / f"{name}.jsonl.gz"
        data = path.read_bytes()
        captures.write_lines(path, captures.read_lines(path)[:-1])
        with pytest.raises(CaptureError, match=f"counts.{name} is {lines}, but there are 3 lines"):
            Capture.load(tmp_path / "c")
        path.write_bytes(data)
    Capture.load(tmp_path / "c")


def test_numbers_of_numpy_can_be_saved(tmp_path):
    (row,) = np.array([(captures.SID, 0x1000)], [("sid", "u4"), ("iova", "u8")])
    smmu = captures.small_system()
    request = {"sid": row["sid"], "iova": row["iova"], "priv": np.bool_(True)}
    saved = Capture.save(tmp_path / "c", smmu=smmu, requests=[request], meta={"n": np.int64(3)})
    assert saved[0].requests.tolist() == [(3, 0xFFFFFFFF, 0x1000, False, True, False)]
    assert saved.meta["n"] == 3
    for bad, problem in (
        ({"sid": -1}, "sid must be 0 to 0xffffffff, not -1"),
        ({"iova": 1.5}, "iova must be an integer, not float"),
        ({"ssid": 1 << 20}, "ssid must be 0 to 0xfffff, not 0x100000"),
        ({"priv": "no"}, "priv must be True or False, not 'no'"),
    ):
        with pytest.raises((TypeError, ValueError), match=problem):
            Capture.save(tmp_path / "d", smmu=smmu, requests=[{"sid": 3, "iova": 0} | bad])


def test_a_save_holds_the_queues(tmp_path):
    whole = captures.small_system()
    memory, ring = whole.memory, captures.STREAM_TABLE + 0x10_0000
    smmu = smmufast.Smmu(
        memory, whole.features.replace(pri=1, ats=1), strtab_base=whole.strtab_base,
        strtab_base_cfg=4, cr0=0b1111, cmdq_base=ring | 4, eventq_base=ring | 0x1_0000 | 7,
        priq_base=ring | 0x2_0000 | 3,
    )  # fmt: skip
    empty = Capture.save(tmp_path / "empty", smmu=smmu)
    for which in ("commands", "events", "pages"):
        assert load_queue(empty.path, which).records == ()
    memory.write(ring, layout.to_bytes("SYNC", layout.pack("SYNC", CS=0)) * 3)
    smmu.write("CMDQ_PROD", 3)
    for sid in range(6, 6 + 130):  # of which two find the queue full
        smmu.translate(sid & 7 | 8, 0x1000)
    smmu.page_request(captures.SID, 0x5000, read=True, prg_index=5)
    saved = Capture.save(tmp_path / "c", smmu=smmu)
    commands, events, pages = (load_queue(saved.path, n) for n in ("commands", "events", "pages"))
    assert [layout.unpack("SYNC", r)["Opcode"] for r in commands.records] == [0x46] * 3
    assert (commands.prod, commands.cons, commands.base) == (3, 3, ring | 4)
    assert len(events.records) == 128
    assert events.records[0] == memory.read(ring | 0x1_0000, 32)
    assert events.prod == smmu.read("EVENTQ_PROD")
    assert [layout.unpack("PRI", r)["PRGIndex"] for r in pages.records] == [5]
    with pytest.raises(ValueError, match="which must be 'commands', 'events' or 'pages', not 'x'"):
        load_queue(saved.path, "x")


def test_cases_keep_substreams_privilege_and_instructions(tmp_path):
    silent = {"k": "fault_silent"}
    allowed = OK | {"perm": 7}
    capture = one(
        tmp_path,
        request(OK | {"perm": 1}, 0x0, priv=0, instr=1) | {"out": OK | {"pa": "0x50000000"}},
        request(event("C_BAD_SUBSTREAMID", SubstreamID=7), ssid=7),
        request(allowed, priv=1),
        request(silent, ssid=3),
    )
    rows = capture[0].requests
    assert rows["ssid"].tolist() == [smmufast.NO_SUBSTREAM, 7, smmufast.NO_SUBSTREAM, 3]
    assert rows["priv"].tolist() == [False, True, True, True]
    assert rows["instr"].tolist() == [True, False, False, False]
    assert capture[0].expected[2].perm_bits == 7
    assert capture[0].expected[0].perm_bits == 7


# --- limits -----------------------------------------------------------------------------------


def test_more_requests_than_the_limit_are_refused(tmp_path, monkeypatch):
    captures.small_capture(tmp_path / "c")
    monkeypatch.setattr("smmufast._tools.capture_outcomes.MAX_REQUESTS", 7)
    with pytest.raises(CaptureError, match=r"events.jsonl.gz:4: more than 7 requests"):
        Capture.load(tmp_path / "c")
    monkeypatch.setattr("smmufast._tools.capture_outcomes.MAX_REQUESTS", 8)
    Capture.load(tmp_path / "c")
    configurations = [(captures.small_system(), [request(OK)] * 5, {})] * 2
    path = captures.cases(tmp_path / "cases", *configurations)
    with pytest.raises(CaptureError, match=r"cases.jsonl.gz:3: more than 8 requests"):
        Capture.load(path)


def test_a_bomb_of_pages_costs_what_its_limit_says(tmp_path):
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (262145, 4096), }"
    (tmp_path / "pages.npz").write_bytes(npz_raw("pages", header, 1 << 20))
    captures.write_lines(tmp_path / "cases.jsonl.gz", [])
    with pytest.raises(CaptureError, match="pages must be 0 to 262144 pages, not 0x40001"):
        Capture.load(tmp_path)


def test_a_long_header_is_not_read(tmp_path):
    for version, count in ((b"\x02\x00", 4), (b"\x03\x00", 4), (b"\x01\x00", 2)):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            size = (1 << 8 * count) - 1
            data = b"\x93NUMPY" + version + size.to_bytes(count, "little")
            archive.writestr("pages.npy", data + bytes(1 << 17))
        (tmp_path / "pages.npz").write_bytes(file.getvalue())
        captures.write_lines(tmp_path / "cases.jsonl.gz", [])
        with pytest.raises(CaptureError, match="pages: the header must be up to 10000 bytes, not "):
            Capture.load(tmp_path)


def test_more_configurations_than_the_limit_are_refused(tmp_path, monkeypatch):
    path = captures.cases(tmp_path / "c", *[(captures.small_system(), [request(OK)], {})] * 3)
    monkeypatch.setattr("smmufast.capture.MAX_CONFIGURATIONS", 2)
    with pytest.raises(CaptureError, match=r"cases.jsonl.gz:4: more than 2 configurations"):
        Capture.load(path)


def test_loading_reports_its_progress(tmp_path):
    steps = []
    capture = Capture.load(captures.SHIPPED, lambda done, work: steps.append((done, work)))
    assert len(capture[0].requests) == 7287
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    size = sum(path.stat().st_size for path in captures.SHIPPED.iterdir())
    assert {work for _, work in steps} == {size}


# --- bad input ------------------------------------------------------------------------------------


def npz(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def npz_raw(name, header, size=0):
    """An archive whose array has a header of our own and so many zeros."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        text = header.encode() + b"\n"
        archive.writestr(
            f"{name}.npy",
            b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(size),
        )
    return file.getvalue()


def packed(*lines):
    return gzip.compress("".join(line + "\n" for line in lines).encode())


def meta(**changes):
    values = json.loads((captures.SHIPPED / "meta.json").read_text())
    del values["truth"], values["events"]  # the counts of another capture
    values["regs"] |= changes.pop("regs", {})
    values |= changes
    return json.dumps({k: v for k, v in values.items() if v is not None}).encode()


PAGES = np.zeros((1, 4096), np.uint8)
ADDRESS = np.array([0x4000_0000], np.uint64)
LINE = {"sid": 1, "iova": "0x1", "pa": "0x1", "perm": 3, "stage": 1, "level": 3, "page_shift": 12}


def line(**changes):
    return json.dumps({k: v for k, v in (LINE | changes).items() if v is not None})


LINUX_BAD = {
    "meta missing": ("meta.json", None, "no capture: neither meta.json nor cases.jsonl.gz"),
    "meta not json": ("meta.json", b"{", "meta.json: not JSON"),
    "meta empty": ("meta.json", b"", "meta.json: not JSON"),
    "meta deep": ("meta.json", b"[" * 100_000, "nested too deeply"),
    "meta a list": ("meta.json", b"[]", "the JSON must be an object, not a list of 0"),
    "meta not text": ("meta.json", b"\xff\xfe\xfa", "not JSON"),
    "meta many digits": ("meta.json", b'{"regs": ' + b"9" * 5000 + b"}", "not JSON"),
    "no registers": ("meta.json", meta(regs={}).replace(b'"regs"', b'"reg"'), "regs is missing"),
    "no IDR0": ("meta.json", meta().replace(b"IDR0", b"IDR9"), "register IDR0 is missing"),
    "register a fraction": ("meta.json", meta(regs={"CR0": 1.5}), "a number, not a fraction"),
    "register text": ("meta.json", meta(regs={"CR0": "on"}), "CR0 must be a number, not a string"),
    "register true": ("meta.json", meta(regs={"CR0": True}), "a number, not a truth value"),
    "register large": ("meta.json", meta(regs={"CR0": "0x100000000"}), "0 to 0xffffffff, not 0x1"),
    "register huge": ("meta.json", meta(regs={"CR0": 10**4000}), "0xffffffff, not a number of"),
    "register negative": ("meta.json", meta(regs={"CR0": -1}), "CR0 must be 0 to 0xffffffff, not "),
    "reserved OAS": ("meta.json", meta(regs={"IDR1": "0x3f"}), "identification registers: "),
    "no RAM size": ("meta.json", meta(ram_size=None), "ram_size is missing"),
    "RAM empty": ("meta.json", meta(ram_size=0), "RAM of 0x0 bytes"),
    "RAM absurd": ("meta.json", meta(ram_size=1 << 60), "RAM of 0x1000000000000000 bytes"),
    "RAM odd": ("meta.json", meta(ram_base=4), "it must start at a multiple of 8"),
    "RAM wraps": ("meta.json", meta(ram_base="0xfffffffffffff000"), "RAM of 0x20000000 bytes"),
    "regions a number": ("meta.json", meta(regions=7), "regions must be a list, not a number"),
    "regions of one": ("meta.json", meta(regions=[[1]]), "lists of base and size, not a list of 1"),
    "regions overlap": ("meta.json", meta(regions=[[0, 64], [32, 64]]), "overlaps"),
    "no regions": ("meta.json", meta(regions=[]), "regions must be 1 to 4096, not 0"),
    "pages missing": ("pages.npz", None, "pages.npz: No such file or directory"),
    "pages no archive": ("pages.npz", b"PK", "the archive is damaged"),
    "pages cut": ("pages.npz", npz(page_addr=ADDRESS, pages=PAGES)[:-30], "archive is damaged"),
    "no addresses": ("pages.npz", npz(pages=PAGES), "there is no array page_addr"),
    "addresses int64": (
        "pages.npz",
        npz(page_addr=ADDRESS.astype(np.int64), pages=PAGES),
        "page_addr.dtype must be uint64, not int64",
    ),
    "addresses big-endian": (
        "pages.npz",
        npz(page_addr=ADDRESS.astype(">u8"), pages=PAGES),
        "page_addr.dtype must be uint64, not >u8",
    ),
    "objects": (
        "pages.npz",
        npz(page_addr=np.array([{}], object), pages=PAGES),
        "page_addr.dtype must be uint64, not object",
    ),
    "addresses 2-D": ("pages.npz", npz(page_addr=ADDRESS[None], pages=PAGES), "(N,), not (1, 1)"),
    "addresses 0-D": ("pages.npz", npz(page_addr=ADDRESS[0], pages=PAGES), "must be (N,), not ()"),
    "pages short": ("pages.npz", npz(page_addr=ADDRESS, pages=PAGES[:, :100]), ", not (1, 100)"),
    "pages in columns": (
        "pages.npz",
        npz(
            page_addr=np.repeat(ADDRESS, 2), pages=np.asfortranarray(np.zeros((2, 4096), np.uint8))
        ),
        "pages.shape must be (N, 4096), in rows, not (2, 4096)",
    ),
    "pages fewer": (
        "pages.npz",
        npz(page_addr=ADDRESS, pages=PAGES[:0]),
        "1 addresses for 0 pages",
    ),
    "page odd": (
        "pages.npz",
        npz(page_addr=ADDRESS + np.uint64(64), pages=PAGES),
        "page at 0x40000040: not a multiple of 4096",
    ),
    "page outside": (
        "pages.npz",
        npz(page_addr=ADDRESS * np.uint64(2), pages=PAGES),
        "page at 0x80000000: outside RAM",
    ),
    "page twice": (
        "pages.npz",
        npz(page_addr=np.repeat(ADDRESS, 2), pages=np.repeat(PAGES, 2, 0)),
        "page at 0x40000000: given twice",
    ),
    "header nonsense": ("pages.npz", npz_raw("page_addr", "{'descr': "), "page_addr: "),
    "header of a bomb": (
        "pages.npz",
        npz_raw(
            "page_addr", "{'descr': '<u8', 'fortran_order': False, 'shape': (1099511627776,), }"
        ),
        "page_addr must be 0 to 262144 pages, not 0x10000000000",
    ),
    "header negative": (
        "pages.npz",
        npz_raw("page_addr", "{'descr': '<u8', 'fortran_order': False, 'shape': (-1,), }", 8192),
        "page_addr must be 0 to 262144 pages, not -1",
    ),
    "array cut": (
        "pages.npz",
        npz_raw("page_addr", "{'descr': '<u8', 'fortran_order': False, 'shape': (9,), }", 8),
        "page_addr must be 72 bytes by its shape (9,), not 8",
    ),
    "count of requests": (
        "meta.json", meta(truth=2), "truth is 2, but there are 1 lines of requests.jsonl.gz",
    ),
    "count of events": (
        "meta.json", meta(counts={"events": 5}),
        "counts.events is 5, but there are 0 lines of events.jsonl.gz",
    ),
    "count of pages": ("meta.json", meta(pages=0), "pages is 0, but there are 1 pages of pages.np"),
    "count of queues": ("meta.json", meta(counts={"queue_pages": 1}), "queue_pages is 1, but"),
    "count of what": ("meta.json", meta(counts={"lines": 1}), "be 'requests', 'events', 'pages'"),
    "request with more": ("requests.jsonl.gz", packed(line(pasid=1)), ", not 'pasid'"),
    "event with more": (
        "events.jsonl.gz",
        packed('{"sid":1,"iova":1,"rnw":1,"hex":"00","write":1}'),
        "a member must be 'sid', 'ssid', 'iova', 'priv', 'instr', 'rnw', 'hex'",
    ),
    "queues broken": ("queues.npz", b"no archive", "queues.npz: the archive is damaged"),
    "requests missing": ("requests.jsonl.gz", None, "requests.jsonl.gz: No such file"),
    "requests plain": (
        "requests.jsonl.gz",
        b'{"sid": 1}\n',
        "requests.jsonl.gz:1: the compressed data is damaged",
    ),
    "requests cut": (
        "requests.jsonl.gz",
        packed(line(), line())[:-12],
        "the compressed data is cut off",
    ),
    "requests not json": (
        "requests.jsonl.gz",
        packed(line(), "{"),
        "requests.jsonl.gz:2: not JSON",
    ),
    "requests a list": ("requests.jsonl.gz", packed("[1]"), "an object, not a list of 1"),
    "sid missing": ("requests.jsonl.gz", packed(line(), line(sid=None)), "gz:2: sid is missing"),
    "sid large": ("requests.jsonl.gz", packed(line(sid=1 << 32)), "0xffffffff, not 0x100000000"),
    "iova negative": ("requests.jsonl.gz", packed(line(iova=-1)), "0xffffffffffffffff, not -1"),
    "iova not hex": ("requests.jsonl.gz", packed(line(iova="0xg")), "iova must be a number, not "),
    "ssid large": ("requests.jsonl.gz", packed(line(ssid=1 << 20)), "0 to 0xfffff, not 0x100000"),
    "perm none": ("requests.jsonl.gz", packed(line(perm=0)), "must be one that permits an access"),
    "perm large": ("requests.jsonl.gz", packed(line(perm=8)), "perm must be 0 to 7, not 8"),
    "level": ("requests.jsonl.gz", packed(line(level=4)), "level must be -1 to 3, not 4"),
    "bypass": ("requests.jsonl.gz", packed(line(bypass=2)), "bypass must be 0 to 1, not 2"),
    "event short": (
        "events.jsonl.gz",
        packed('{"sid":1,"iova":1,"rnw":1,"hex":"10"}'),
        "hex must be an event record of 32 bytes, not 1",
    ),
    "event not hex": (
        "events.jsonl.gz",
        packed('{"sid":1,"iova":1,"rnw":1,"hex":"zz"}'),
        "hex: not hexadecimal bytes",
    ),
    "event unknown": (
        "events.jsonl.gz",
        packed('{"sid":1,"iova":1,"rnw":1,"hex":"%s"}' % ("ff" * 32)),
        "event number of hex must be one that there is, not 255",
    ),
    "event without rnw": (
        "events.jsonl.gz",
        packed('{"sid":1,"iova":1,"hex":"00"}'),
        "rnw is missing",
    ),
    "event action": (
        "events.jsonl.gz",
        packed('{"sid":1,"iova":1,"rnw":1,"hex":"","action":"ok"}'),
        "action must be 'abort', 'raz_wi' or 'stall', not 'ok'",
    ),
}


@pytest.mark.parametrize("name", LINUX_BAD)
def test_bad_linux_captures_are_refused_by_file_and_line(tmp_path, name):
    file, content, problem = LINUX_BAD[name]
    good = {
        "meta.json": meta(),
        "pages.npz": npz(page_addr=ADDRESS, pages=PAGES),
        "requests.jsonl.gz": packed(line()),
        "events.jsonl.gz": packed(),
    }
    for other, data in good.items():
        (tmp_path / other).write_bytes(data)
    assert len(Capture.load(tmp_path)[0].requests) == 1
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(CaptureError) as caught:
        Capture.load(tmp_path)
    assert problem in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


HEADER = {"header": {"idr": captures.QEMU_IDR, "ram": [0, 1 << 32]}}
CASE = {
    "id": "a",
    "cr0": 1,
    "regs": {"STRTAB_BASE": 0, "STRTAB_BASE_CFG": 0},
    "pages": [],
    "reqs": [],
}


def case(**changes):
    return json.dumps({k: v for k, v in (CASE | changes).items() if v is not None})


def header(**changes):
    return json.dumps({"header": HEADER["header"] | changes})


OK_OUT = {"k": "ok", "pa": 0}


def case_request(**changes):
    return case(reqs=[request(OK) | changes])


CASES_BAD = {
    "empty": ([], "cases.jsonl.gz: the first line must be a header, not missing"),
    "no header": ([case()], "cases.jsonl.gz:1: header is missing"),
    "only a header": ([header()], "a header and no configuration"),
    "no idr": ([header(idr={}), case()], "gz:1: register IDR0 is missing"),
    "ram of one": ([header(ram=[1]), case()], "ram must be a list of 2, not a list of 1"),
    "ram backwards": ([header(ram=[4096, 0]), case()], "gz:1: RAM of -0x1000 bytes"),
    "no id": ([header(), case(id=None)], "gz:2: id is missing"),
    "id unprintable": ([header(), case(id="\x1b[2J")], "has characters that cannot be shown"),
    "id twice": ([header(), case(), case()], "gz:3: id: 'a' is that of an earlier"),
    "no cr0": ([header(), case(cr0=None)], "gz:2: cr0 is missing"),
    "no base": ([header(), case(regs={})], "gz:2: register STRTAB_BASE is missing"),
    "pages flat": ([header(), case(pages=[1])], "gz:2: pages must be lists of"),
    "pages index": ([header(), case(pages=[[0, 9]])], "gz:2: pages must be 0 to 0, not 9"),
    "pages odd": ([header(), case(pages=[[8, 0]])], "gz:2: page at 0x8: not a multiple of 4096"),
    "pages outside": ([header(), case(pages=[[1 << 32, 0]])], "gz:2: page at 0x100000000: outside"),
    "pages twice": ([header(), case(pages=[[0, 0], [0, 0]])], "gz:2: page at 0x0: given twice"),
    "reqs a number": ([header(), case(reqs=1)], "gz:2: reqs must be a list, not a number"),
    "request a number": ([header(), case(reqs=[1])], "gz:2: the JSON must be an object"),
    "rnw": ([header(), case_request(rnw=2)], "gz:2: rnw must be 0 to 1, not 2"),
    "out": ([header(), case_request(out="ok")], "gz:2: out must be an object, not a string"),
    "kind": ([header(), case_request(out={"k": "fine"})], "or 'disable', not 'fine'"),
    "ok without pa": ([header(), case_request(out={"k": "ok"})], "gz:2: pa is missing"),
    "request with more": ([header(), case_request(pasid=1)], "'feats', not 'pasid'"),
    "outcome with more": ([header(), case_request(out=OK_OUT | {"p": 1})], "'landed', not 'p'"),
    "case with more": ([header(), case(cr1=0)], "gz:2: a member must be 'id', 'cr0'"),
    "a write of instructions": ([header(), case_request(rnw=0, instr=1)], "a write is always data"),
    "ssid": ([header(), case_request(ssid=1 << 20)], "gz:2: ssid must be 0 to 0xfffff"),
    "event name": ([header(), case_request(out={"k": "event", "name": "F"})], "an event, not 'F'"),
    "event of another": (
        [header(), case_request(out=event("C_BAD_STE") | {"name": "C_BAD_CD"})],
        "rec must be of event C_BAD_CD, as name says, not of event 0x4",
    ),
    "differs": ([header(), case_request(arch_differs={"cause": "x"})], "gz:2: arch is missing"),
    "field": (
        [header(), case_request(out=event("C_BAD_STE"), rec_differs=["IPA:1"])],
        "rec_differs: 'IPA:1' is not a field of C_BAD_STE",
    ),
    "field value": (
        [header(), case_request(out=event("F_ACCESS"), rec_differs=["CLASS:9"])],
        "rec_differs: 'CLASS:9' is not a field",
    ),
    "field a number": (
        [header(), case_request(out=event("F_ACCESS"), rec_differs=[1])],
        "rec_differs: 1 is not a field",
    ),
}


@pytest.mark.parametrize("name", CASES_BAD)
def test_bad_cases_are_refused_by_file_and_line(tmp_path, name):
    lines, problem = CASES_BAD[name]
    (tmp_path / "pages.npz").write_bytes(npz(pages=PAGES))
    captures.write_lines(tmp_path / "cases.jsonl.gz", [header(), case_request()])
    assert len(Capture.load(tmp_path)[0].requests) == 1
    captures.write_lines(tmp_path / "cases.jsonl.gz", lines)
    with pytest.raises(CaptureError) as caught:
        Capture.load(tmp_path)
    assert problem in str(caught.value)


def test_a_list_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    captures.small_capture(tmp_path / "small")
    monkeypatch.setattr("smmufast._tools.capture_files.MAX_TEXT", 200)
    with pytest.raises(CaptureError, match=r"requests.jsonl.gz:2: the list unpacks to over 200"):
        Capture.load(tmp_path / "small")
    monkeypatch.setattr("smmufast._tools.capture_files.MAX_LINE", 50)
    with pytest.raises(CaptureError, match=r"longer than 50 bytes|not JSON"):
        Capture.load(tmp_path / "small")


def test_what_is_no_capture_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing", captures.SHIPPED / "meta.json"):
        with pytest.raises(CaptureError, match=r"no capture|no such directory|be a directory, not"):
            Capture.load(path)


def test_damaged_files_never_raise_anything_else(tmp_path):
    """Every byte of a small capture is damaged in turn."""
    captures.small_capture(tmp_path / "small")
    rng = np.random.default_rng(5)
    refused = 0
    for file in sorted((tmp_path / "small").iterdir()):
        data = file.read_bytes()
        for place in rng.integers(0, len(data), 150).tolist():
            damaged = bytearray(data)
            damaged[place] ^= 1 << rng.integers(0, 8)
            file.write_bytes(damaged)
            try:
                replay(Capture.load(tmp_path / "small"))
            except CaptureError:
                refused += 1
        file.write_bytes(data)
    assert refused > 100
    assert replay(Capture.load(tmp_path / "small"))
