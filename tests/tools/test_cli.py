"""The command: what it prints, its exit statuses, and one line for bad input."""

import contextlib
import gzip
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import captures
import nested
import numpy as np
import pytest
from command import HOME, run, run_json, start

import smmufast
from smmufast import layout
from smmufast.capture import Capture
from smmufast.cli import main

EXAMPLES = captures.ROOT / "examples"


def case(**more):
    """One request of a capture of kind "cases"."""
    out = {"k": "ok", "pa": "0x50001000", "perm": 3, "stage": 1}
    return {"sid": captures.SID, "iova": "0x1000", "rnw": 1, "out": out} | more


@pytest.mark.parametrize(("arguments", "status"), [(("decode", "70 0"), 0), (("nothing",), 2)])
def test_a_process_of_its_own_says_the_same(arguments, status):
    process = start(*arguments)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert (err if status else out) == run(*arguments, status=status)


# --- replay ---------------------------------------------------------------------------------------


def test_replay_of_the_shipped_capture_agrees():
    text = run("replay", captures.SHIPPED)
    lines = text.splitlines()
    assert lines[0] == "linux-7.3-4k-s1: 1 configuration, 7287 requests"
    assert lines[-1] == "7287 requests: 7287 agree, 0 differ, 0 unsupported"
    head = lines[2].split()
    assert head[:5] == ["stream", "requests", "agreeing", "differing", "unsupported"]
    rows = {words[0]: words[1:] for words in map(str.split, lines[3:-2])}
    assert rows["0xf8"][:4] == ["3064", "3064", "0", "0"]
    assert " ".join(rows["0xf8"][4:8]) == "4K: 2278, 2M: 350"
    assert float(rows["0xf8"][8]) > 0
    assert sum(int(row[0]) for row in rows.values()) == 7287


def test_replay_as_json():
    found = run_json("replay", captures.SHIPPED, "--repeat", "3", "--random", "0x1000")
    assert found["status"] == 0
    assert (found["requests"], found["agreeing"]) == (7287, 7287)
    assert found["masked"] == {}
    assert found["random"]["requests"] == 4096
    assert found["random"]["differing"] == 0
    assert found["differences"] == []
    assert sum(row["requests"] for row in found["streams"]) == 7287
    stream = next(row for row in found["streams"] if row["sid"] == 0xF8)
    assert stream["page_sizes"] == {"4096": 2278, "2097152": 350}
    assert stream["translations_per_second"] > 0


def test_a_difference_is_explained_and_makes_it_fail(tmp_path):
    wrong = case(
        arch_differs={
            "cause": "aptable",
            "arch": {"k": "ok", "pa": "0x50002000"},
            "why": "",
        }
    )
    requests = [case(), wrong, case(iova="0x0", rnw=1)]
    path = captures.cases(tmp_path / "bad", (captures.small_system(), requests, {}))
    text = run("replay", path, status=1)
    assert "Difference: configuration case-0, cases.jsonl.gz:2 (cause aptable)" in text
    assert "  pa: 0x50002000 expected, 0x50001000 found" in text
    assert "  | Outcome: physical address 0x50001000." in text
    assert text.endswith("3 requests: 1 agree, 2 differ, 0 unsupported\n")
    cause = next(line for line in text.splitlines() if line.startswith("aptable"))
    assert cause.split() == ["aptable", "1", "0", "1", "0"]
    assert text.count("\nDifference: ") == 2
    assert run("replay", path, "--differences", "1", status=1).count("\nDifference: ") == 1
    found = run_json("replay", path, status=1)
    assert found["status"] == 1
    first = found["differences"][0]
    assert first["reasons"] == ["pa: 0x50002000 expected, 0x50001000 found"]
    assert first["request"]["iova"] == 0x1000
    assert first["explain"].startswith("A read of 0x1000 by stream 0x3.")
    assert found["causes"] == [
        {"cause": "aptable", "requests": 1, "agreeing": 0, "differing": 1, "unsupported": 0}
    ]


def test_requests_that_cannot_be_done_fail_unless_allowed(tmp_path):
    # an SMMU with tables of both architectures, and a CD that asks for the smaller ones
    system = captures.small_system()
    cd = bytearray(system.memory.read(captures.CONTEXTS, 64))
    cd[5] &= ~2 & 0xFF
    system.memory.write(captures.CONTEXTS, bytes(cd))
    both = captures.QEMU_IDR | {"IDR0": hex(int(captures.QEMU_IDR["IDR0"], 16) | 3 << 2)}
    requests = [case(), case(sid=4, out={"k": "bypass"})]
    path = captures.cases(tmp_path / "lpae", (system, requests, {}), idr=both)
    text = run("replay", path, status=3)
    assert "The recorded SMMU has TTF=3, which this version does not model" in text.splitlines()[1]
    assert text.endswith("2 requests: 1 agree, 0 differ, 1 unsupported; 1 need VMSAv8-32 tables\n")
    assert run("replay", path, "--allow-unsupported") != ""
    found = run_json("replay", path, status=3)
    assert found["unsupported_needs"] == {"VMSAv8-32 tables": 1}
    assert found["masked"] == {"ttf": 3}
    walked = run("walk", path, "--sid", captures.SID, "--iova", "0x1000")
    assert "TTF=3, which this version does not model" in walked.splitlines()[0]
    # a difference outweighs them
    path = captures.cases(tmp_path / "both", (system, [case(), case(sid=4)], {}), idr=both)
    run("replay", path, status=1)
    run("replay", path, "--allow-unsupported", status=1)


def test_a_capture_without_requests_is_not_taken_for_one_that_agrees(tmp_path):
    Capture.save(tmp_path / "none", smmu=captures.small_system())
    error = run("replay", tmp_path / "none", status=2)
    assert error.endswith("none: no requests are recorded, nothing to replay\n")


# --- walk and streams -----------------------------------------------------------------------------


def test_walk_explains():
    text = run("walk", captures.SHIPPED, "--sid", "0x10", "--iova", "0xfffe0fc0")
    assert "A read of 0xfffe0fc0 by stream 0x10." in text
    assert "Outcome: physical address 0x48005fc0." in text
    text = run("walk", captures.SHIPPED, "--sid", 16, "--iova", 0, "--write", "--priv", "--instr")
    assert "A write to 0x0 by stream 0x10." in text
    assert "Outcome: F_TRANSLATION" in text
    assert "privileged, data, write" in text
    text = run("walk", captures.SHIPPED, "--sid", "16", "--iova", "0", "--ssid", "5")
    assert "Outcome: C_BAD_SUBSTREAMID" in text


def test_walk_as_json():
    found = run_json("walk", captures.SHIPPED, "--sid", "0x10", "--iova", "0xfffe0fc0")
    assert [step["kind"] for step in found["fetches"]] == ["L1STD", "STE", "CD", *["TT"] * 4]
    assert (found["action"], found["pa"], found["level"]) == ("ok", 0x4800_5FC0, 3)
    assert found["request"]["ssid"] is None
    assert found["fault"] is None
    found = run_json("walk", captures.SHIPPED, "--sid", "0x10", "--iova", "0", "--write")
    assert found["fault"]["name"] == "F_TRANSLATION"
    assert found["fault"]["recorded"] is True
    assert found["fault"]["fields"]["StreamID"] == 16
    assert len(bytes.fromhex(found["fault"]["record"])) == 32


def test_a_nested_walk_shows_both_stages(tmp_path):
    requests = [{"sid": nested.NESTED, "iova": nested.RW}, {"sid": nested.SECOND, "iova": 1 << 44}]
    Capture.save(tmp_path / "both", smmu=nested.small_nested(), requests=requests)
    arguments = ("walk", tmp_path / "both", "--sid", nested.NESTED, "--iova")
    text = run(*arguments, nested.RW + 8)
    assert "2. Context descriptor (CD), at IPA 0x80000000:" in text
    assert "     2.3. Stage-2 descriptor, level 3, at " in text
    assert "Stage 2 of the access, IPA 0x8090001008 (the output of stage 1):" in text
    text = run(*arguments, nested.UNMAPPED)
    assert "Stage 2 found it, for the access itself, at IPA 0x8090004000 (S2=1, CLASS=IN)." in text
    found = run_json(*arguments, nested.READ_ONLY_OUTSIDE)
    kinds = [step["kind"] for step in found["fetches"]]
    assert kinds == ["STE", *(["S2TT"] * 3 + ["CD"]), *(["S2TT"] * 3 + ["TT"]) * 3, *["S2TT"] * 3]
    assert {step["swap"] for step in found["fetches"]} == {None}
    assert (found["stage"], found["ipa"], found["vmid"], found["asid"]) == (3, nested.DATA, 9, 7)
    assert (found["perm"], found["perm_s1"], found["stag"]) == (0o15, 0o37, None)
    lines = run("streams", tmp_path / "both").splitlines()
    assert any("Config=0b111 (NESTED)" in line and "S2VMID=0x9" in line for line in lines)
    assert any(line.strip().startswith("CD at 0x48000000  TTB0=0x80100000") for line in lines)
    lines = run("replay", tmp_path / "both").splitlines()
    assert lines[-1] == "2 requests: 2 agree, 0 differ, 0 unsupported"


@pytest.mark.parametrize("name", ["cases-nested-2lvl", "cases-s2only-linear"])
def test_replay_prints_the_verdicts_by_cause(name):
    found = {path.name: path for path in captures.found()}
    if name not in found:
        pytest.skip("that capture is not here")
    text = run("replay", found[name])
    table = text.partition("\ncause ")[2]
    counts = re.findall(r"^(\S.*?) +(\d+) +(\d+) +(\d+) +(\d+)$", table, re.MULTILINE)
    assert {"s2_concat", "s2_small", "s2_hahd"} <= {row[0] for row in counts}
    for _, requests, agreeing, differing, unsupported in counts:
        assert int(requests) == int(agreeing) > 0
        assert (differing, unsupported) == ("0", "0")


def test_walk_needs_a_configuration_where_there_are_several(tmp_path):
    system = captures.small_system()
    path = captures.cases(tmp_path / "two", (system, [], {}), (None, [], {}))
    arguments = ("walk", path, "--sid", captures.SID, "--iova", "0x1000")
    assert "--config is needed: two has 2 configurations, case-0 to case-1" in run(
        *arguments, status=2
    )
    assert "Outcome: physical address" in run(*arguments, "--config", "case-0")
    assert "Outcome: C_BAD_STE" in run(*arguments, "--config", "case-1")
    assert "has no configuration 'x'" in run(*arguments, "--config", "x", status=2)


def test_streams_lists_entries_and_collapses_equal_ones():
    lines = run("streams", captures.SHIPPED).splitlines()
    assert lines[0] == (
        "linux-7.3-4k-s1: stream table at 0x44d23000, two levels, split 8, 2^16 StreamIDs"
    )
    assert lines[3].split() == ["0x1-0xf", "STE", "at", "0x5be20040", "Config=0b000", "(ABORT)"]
    assert lines[-1].startswith("0x400-0xffff     STE C_BAD_STREAMID: Span=0 in the level-1")
    assert sum("STAGE_1" in line for line in lines) == 15
    assert sum(line.strip().startswith("CD at ") for line in lines) == 15
    assert (
        "CD at 0x44ee4000  TTB0=0x44eb7000 4K T0SZ=16 EPD1=1 IPS=44 bits ASID=0x1 AA64 A R ASET"
        in lines[2]
    )


def test_streams_as_json_and_limited(tmp_path):
    (found,) = run_json("streams", captures.SHIPPED)["configurations"]
    assert found["table"] == {"two_level": True, "base": 0x44D2_3000, "log2size": 16, "split": 8}
    assert len(found["streams"]) == 31
    assert (found["streams"][0]["first_sid"], found["streams"][-1]["last_sid"]) == (0, 0xFFFF)
    assert bytes.fromhex(found["streams"][0]["contexts"][0]["data"])[3] & 0x80
    assert found["more"] is False
    (found,) = run_json("streams", captures.SHIPPED, "--limit", "4")["configurations"]
    assert len(found["streams"]) + len(found["streams"][0]["contexts"]) == 4
    assert found["more"] is True
    assert run("streams", captures.SHIPPED, "--limit", 4).endswith("There are more: see --limit.\n")
    off = captures.cases(
        tmp_path / "off", (captures.small_system(), [], {"cr0": "0xc"}), (None, [], {})
    )
    text = run("streams", off)
    assert "case-0: stream table at 0x40000000, linear, 2^4 StreamIDs; not used: CR0.SMMUEN=0" in (
        text
    )
    assert "case-1: " in text
    assert "case-0: " not in run("streams", off, "--config", "case-1")
    far = {"regs": {"STRTAB_BASE": "0x100000000000", "STRTAB_BASE_CFG": 4}}
    far = captures.cases(tmp_path / "far", (None, [], far))
    assert "beyond the physical address size" in run("streams", far)


# --- events, commands, decode ---------------------------------------------------------------------


def with_queues(path, commands, events, cmdq_prod=0, eventq_prod=0, pages=2, **registers):
    """Give a small capture rings of 256 commands and 128 events at 0x40020000, 0x40021000."""
    captures.small_capture(path)
    meta = json.loads((path / "meta.json").read_text())
    meta["regs"] |= {
        "CMDQ_BASE": hex(0x4002_0008), "CMDQ_PROD": hex(cmdq_prod), "CMDQ_CONS": hex(cmdq_prod),
        "EVENTQ_BASE": hex(0x4002_1007), "EVENTQ_PROD": hex(eventq_prod),
        "EVENTQ_CONS": "0x0",
    } | registers  # fmt: skip
    (path / "meta.json").write_text(json.dumps(meta))
    data = bytearray(0x2000)
    for i, command in commands.items():
        data[16 * i : 16 * i + 16] = layout.to_bytes("CMD", command)
    for i, record in events.items():
        data[0x1000 + 32 * i : 0x1000 + 32 * i + 32] = record
    contents = np.frombuffer(bytes(data), np.uint8).reshape(2, 4096)
    addresses = np.array([0x4002_0000, 0x4002_1000], np.uint64)
    np.savez_compressed(path / "queues.npz", page_addr=addresses[:pages], pages=contents[:pages])
    return path


SYNC = layout.pack("SYNC", CS=2)
EVENT = layout.to_bytes("C_BAD_STE", layout.pack("C_BAD_STE", StreamID=9))


def test_commands_up_to_prod(tmp_path):
    commands = {0: layout.pack("CFGI_ALL"), 1: SYNC, 2: layout.pack("ATC_INV"), 3: SYNC}
    path = with_queues(tmp_path / "q", commands, {}, cmdq_prod=3)
    lines = run("commands", path).splitlines()
    assert lines[0] == "q: command queue of 256 slots at 0x40020000, PROD=0x3, CONS=0x3"
    assert lines[1].split() == ["0x0", "CFGI_ALL:", "forget", "all", "cached", "configuration"]
    assert lines[3].endswith("; Illegal (CERROR_ILL, S4.5.1-7): it needs ATS (IDR0.ATS=0).")
    assert lines[4:] == ["3 commands: 1 ATC_INV, 1 CFGI_ALL, 1 SYNC"]
    found = run_json("commands", path, "--limit", 1)
    assert found["queue"] == {
        "log2size": 8, "base": 0x4002_0008, "prod": 3, "cons": 3, "first_slot": 0,
    }  # fmt: skip
    assert found["commands"] == [
        {
            "slot": 0,
            "name": "CFGI_ALL",
            "record": layout.to_bytes("CMD", commands[0]).hex(),
            "fields": layout.unpack("CFGI_ALL", commands[0]),
            "text": "forget all cached configuration",
            "meaning": [],
        }
    ]
    assert found["counts"] == {"CFGI_ALL": 1, "SYNC": 1, "ATC_INV": 1}
    assert found["more"] is True
    text = run("commands", path, "--limit", "2")
    assert "There are more: see --limit.\n3 commands: " in text


def test_a_ring_that_has_wrapped_starts_at_prod(tmp_path):
    commands = {i: layout.pack("CFGI_STE", StreamID=i) for i in range(256)}
    path = with_queues(tmp_path / "full", commands, {}, cmdq_prod=0x105)
    found = run_json("commands", path)
    assert [c["slot"] for c in found["commands"]] == [*range(5, 256), *range(5)]
    assert [c["fields"]["StreamID"] for c in found["commands"]] == [*range(5, 256), *range(5)]
    # a slot that was never written says that it has not wrapped
    del commands[200]
    path = with_queues(tmp_path / "not", commands, {}, cmdq_prod=0x105)
    assert len(run_json("commands", path)["commands"]) == 5
    # and without the wrap bit only what is before PROD is sure
    path = with_queues(tmp_path / "odd", {i: SYNC for i in range(256)}, {}, cmdq_prod=0x5)
    assert len(run_json("commands", path)["commands"]) == 5


def test_events_of_a_queue(tmp_path):
    path = with_queues(tmp_path / "q", {}, {0: EVENT, 1: EVENT}, eventq_prod=0x8000_0002)
    assert run("events", path).splitlines() == [
        "q: event queue of 128 slots at 0x40021000, PROD=0x80000002, CONS=0x0",
        "0x0      C_BAD_STE sid=0x9",
        "0x1      C_BAD_STE sid=0x9",
        "2 events: 2 C_BAD_STE",
    ]
    found = run_json("events", path)
    assert found["queue"]["log2size"] == 7
    assert found["events"][0] == {
        "where": "0x0", "name": "C_BAD_STE", "record": EVENT.hex(),
        "fields": {"ID": 4, "SSV": 0, "SubstreamID": 0, "StreamID": 9},
    }  # fmt: skip
    # a page that is not there is zero
    path = with_queues(tmp_path / "half", {}, {0: EVENT}, eventq_prod=1, pages=1)
    assert "0x0      0x00 sid=0x0" in run("events", path)


def without_queues(path):
    """The shipped capture, without its queues."""
    path.mkdir()
    for file in captures.SHIPPED.iterdir():
        if file.name != "queues.npz":
            (path / file.name).write_bytes(file.read_bytes())
    return path


def test_events_are_those_of_the_requests_where_the_queue_holds_none(tmp_path):
    path = with_queues(tmp_path / "q", {0: SYNC}, {}, cmdq_prod=1)
    assert run("events", path).splitlines()[0].startswith("q: event queue of 128 slots at 0x4002")
    assert len(run_json("events", path)["events"]) == 4
    meta = json.loads((path / "meta.json").read_text())
    meta["regs"] = {k: v for k, v in meta["regs"].items() if not k.startswith("EVENTQ_")}
    (path / "meta.json").write_text(json.dumps(meta))
    assert run("events", path).splitlines()[0].startswith("line 1   F_PERMISSION")
    assert len(run("commands", path).splitlines()) == 3


def test_events_of_captures_without_queues(tmp_path):
    bare = without_queues(tmp_path / "bare")
    lines = run("events", bare, "--limit", "3").splitlines()
    assert lines[0].startswith("line 1   F_TRANSLATION sid=0xf8 iova=0x3e1cfb963ff8 write")
    assert lines[-2:] == [
        "There are more: see --limit.", "892 events: 613 F_PERMISSION, 279 F_TRANSLATION",
    ]  # fmt: skip
    assert len(run_json("events", bare)["events"]) == 892
    event = {"k": "event", "name": "C_BAD_STE", "rec": EVENT.hex()}
    requests = [case(sid=9, out=event), case()]
    path = captures.cases(tmp_path / "c", (captures.small_system(), requests, {}))
    assert run("events", path) == "case-0   C_BAD_STE sid=0x9\n1 event: 1 C_BAD_STE\n"
    assert "has no command queue" in run("commands", path, status=2)
    assert "queues.npz: there is none" in run("commands", bare, status=2)


def batch_file(path, *lines):
    captures.write_lines(path, [{"header": 1, "idr": captures.QEMU_IDR}, *lines])
    return path


BATCH = {
    "kind": "cmds", "id": 7, "start": "0x0", "prod": "0x2", "cons": "0x1000001", "err": 1,
    "cmds": ["46" + "00" * 15, "ff" + "00" * 15],
}  # fmt: skip


FILLING = {"kind": "evtq_full", "log2size": 1, "start": "0x3"}


def steps(*prods):
    return {"steps": [{"prod": hex(prod), "gerror": "0x5"} for prod in prods]}


def test_replay_of_queues_agrees_but_for_what_the_recorded_smmu_does_otherwise(tmp_path):
    # opcode 0x20 is that of an EL2 which these ID registers have not
    accepted = BATCH | {"id": 8, "cmds": ["20" + "00" * 15] * 2, "cons": "0x2", "err": 0}
    path = batch_file(tmp_path / "queues.jsonl.gz", BATCH, accepted, FILLING | steps(0, 1, 1))
    text = run("replay", path)
    assert text.endswith("queues.jsonl.gz: 3 batches and runs: 3 agree, 0 differ\n")
    assert "accepts illegal commands         1         1          0            0\n" in text
    assert "EVENTQ_ABT_ERR for OVFLG         1         1          0            0\n" in text
    wrong = [
        BATCH | {"cons": "0x2", "err": 0},
        BATCH | {"cons": "0x1000000"},
        BATCH | {"cmds": ["46" + "00" * 15] * 2},
        FILLING | steps(0, 2),
    ]
    path = batch_file(tmp_path / "wrong.jsonl.gz", BATCH, *wrong)
    lines = run("replay", path, "--differences", 4, status=1).splitlines()
    assert lines[-5:] == [
        "Difference: batch 7: CMDQ_CONS 0x2 and error 0 expected, 0x1 and error 1 found",
        "Difference: batch 7: CMDQ_CONS 0x0 and error 1 expected, 0x1 and error 1 found",
        "Difference: batch 7: CMDQ_CONS 0x1 and error 1 expected, 0x2 and error 0 found",
        "Difference: line 6, event 2: EVENTQ_PROD 0x2 expected, 0x1 found",
        "wrong.jsonl.gz: 5 batches and runs: 1 agree, 4 differ",
    ]
    found = run_json("replay", path, status=1)
    assert (found["status"], found["agreeing"], len(found["differences"])) == (1, 1, 4)
    empty = batch_file(tmp_path / "empty.jsonl.gz")
    assert "no batches are recorded, nothing to replay" in run("replay", empty, status=2)
    bad = batch_file(tmp_path / "bad.jsonl.gz", FILLING | {"steps": [1]})
    assert "bad.jsonl.gz:2: the JSON must be an object, not a number" in run(
        "replay", bad, status=2
    )


def test_replay_of_the_recorded_queues_agrees():
    paths = {path.parent / "queues.jsonl.gz" for path in captures.found()}
    paths = [path for path in paths if path.exists()]
    if not paths:
        pytest.skip("no queues.jsonl.gz beside the captures")
    found = run_json("replay", paths[0])
    assert (found["requests"], found["agreeing"]) == (458, 458)
    counts = {row["cause"]: row["agreeing"] for row in found["causes"]}
    assert counts == {"accepts illegal commands": 225, "EVENTQ_ABT_ERR for OVFLG": 8}


def test_batches_of_commands(tmp_path):
    path = batch_file(tmp_path / "queues.jsonl.gz", BATCH, {"kind": "evtq_full"}, BATCH | {"id": 8})
    assert run("commands", path).splitlines()[:4] == [
        "batch 7: from index 0x0 to 0x2; CMDQ_CONS became 0x1000001 (ERR=1)",
        "  0      SYNC: wait until the commands before are done",
        "  1      opcode 0xff: no command; Illegal (CERROR_ILL, S4.1.1-2): the opcode is reserved.",
        "batch 8: from index 0x0 to 0x2; CMDQ_CONS became 0x1000001 (ERR=1)",
    ]
    found = run_json("commands", path, "--limit", "3")
    assert [len(batch["commands"]) for batch in found["batches"]] == [2, 1]
    assert found["more"] is True
    assert found["counts"] == {"SYNC": 2, "opcode 0xff": 2}
    assert "a file; event records are in the directory of a capture" in run(
        "events", path, status=2
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"cmds": ["46"]}, "cmds must be 16 bytes in hexadecimal each, not a string"),
        ({"cmds": [5]}, "cmds must be 16 bytes in hexadecimal each, not a number"),
        ({"cmds": ["zz" * 16]}, "16 bytes in hexadecimal"),
        ({"cmds": 5}, "cmds must be a list, not a number"),
        ({"err": 128}, "err must be 0 to 127, not 128"),
        ({"start": None}, "start must be a number, not null"),
        ({"kind": 1}, "kind must be a string, not a number"),
    ],
)
def test_bad_batches_are_one_clear_line(tmp_path, change, problem):
    error = run("commands", batch_file(tmp_path / "q.gz", BATCH | change), status=2)
    assert problem in error
    assert "q.gz:2: " in error
    assert error.count("\n") == 1


def test_bad_queues_are_one_clear_line(tmp_path):
    path = with_queues(tmp_path / "q", {}, {}, CMDQ_PROD="zero")
    for command in ("commands", "events"):
        error = run(command, path, status=2)
        assert "CMDQ_PROD must be a number, not a string" in error
        assert error.count("\n") == 1
    (path / "queues.npz").write_bytes(b"no archive")
    meta = json.loads((path / "meta.json").read_text())
    meta["regs"]["CMDQ_PROD"] = "0x0"
    (path / "meta.json").write_text(json.dumps(meta))
    assert "queues.npz: the archive is damaged" in run("commands", path, status=2)
    del meta["regs"]["EVENTQ_BASE"]
    (path / "meta.json").write_text(json.dumps(meta))
    assert "register EVENTQ_BASE is missing" in run("events", path, status=2)
    assert "the first line must be a header, not missing" in run(
        "commands", write(tmp_path / "empty.gz", gzip.compress(b"")), status=2
    )
    assert "no capture" in run("commands", tmp_path, status=2)


def write(path, data):
    path.write_bytes(data)
    return path


LOG = """\
[    1.0] usb 1-1: new device
[    2.0] arm-smmu-v3 smmu.0: event 0x04 received:
[    2.0] arm-smmu-v3 smmu.0: \t0x0000000900000004
[    2.0] arm-smmu-v3 smmu.0: \t0x0000000000000000
[    2.0] arm-smmu-v3 smmu.0: \t0x0000000000000000
[    2.0] arm-smmu-v3 smmu.0: \t0x0000000000000000
"""


def test_decode_of_words():
    text = run("decode", "0x0000000900000004", "0", "0", "0", "--kind", "event")
    assert text.startswith("C_BAD_STE: stream 0x9\n")
    assert "    StreamID  [63:32]  9  stream\n" in text
    assert run("decode", "0x46", "0") == (
        "SYNC: wait until the commands before are done\n    Opcode  [7:0]  0x46  command\n"
    )
    assert run("decode", EVENT.hex(), "--brief") == "C_BAD_STE: stream 0x9\n"
    assert run("decode", given="70 0\n").startswith("SYNC: ")
    (found,) = run_json("decode", EVENT.hex())
    assert (found["name"], found["record"], found["line"]) == ("C_BAD_STE", EVENT.hex(), None)
    arguments = ("--kind", "pte", "--stage", 2, "--granule", "16K", "--level", 3)
    assert run("decode", "0x43210703", *arguments, "--brief") == (
        "PTE_S2: page of 16 KiB at 0x43210000 (16K granule, level 3)\n"
    )
    assert "level -1" in run("decode", "3", "--kind", "pte", "--level", "-1", "--brief")


def test_decode_of_bytes_in_memory_order():
    assert run("decode", "--raw", "--kind", "event", given=EVENT).startswith("C_BAD_STE: stream")
    assert run("decode", "--raw", "--brief", given=EVENT) == "C_BAD_STE: stream 0x9\n"


@pytest.mark.parametrize("kind", ["event", "command", "pri", "ste", "cd", "l1std", "l1cd", "pte"])
def test_decode_knows_the_kinds_that_its_help_names(kind):
    assert kind in run("decode", "--help")
    size = {"event": 32, "command": 16, "pri": 16, "ste": 64, "cd": 64}.get(kind, 8)
    assert run("decode", "--kind", kind, "--raw", given=bytes(size))


def test_decode_of_a_log_counts_what_repeats():
    text = run("decode", "--brief", given=LOG * 3 + "smmuv3_record_event F_ACCESS sid=0x1\n")
    assert text.splitlines() == [
        "2: C_BAD_STE: stream 0x9 (3 times)",
        "19: F_ACCESS: stream 0x1",
        "4 findings: 3 C_BAD_STE, 1 F_ACCESS",
    ]
    text = run("decode", given=LOG)
    assert "(line 2, reported by smmu.0)" in text
    assert text.count("C_BAD_STE") == 1
    assert "\n  (2 times)\n\n2 findings: 2 C_BAD_STE\n" in run("decode", given=LOG * 2)
    assert [found["line"] for found in json.loads(run("decode", "--json", given=LOG * 2))] == [2, 8]
    # bytes that are no text do not stop it
    assert "stream 0x9" in run("decode", given=b"\xff\xfe\x00\n" + LOG.encode())
    line = "arm-smmu-v3 smmu.0: CMDQ error (cons 0x01000022): Illegal command"
    assert run("decode", line).startswith("CERROR_ILL: the command queue stopped at index 0x22")


@pytest.mark.parametrize(
    ("arguments", "given", "problem"),
    [
        (("1", "2", "3"), None, "kind must be named for 24 bytes (an event is 32"),
        (("--kind", "event", "xyz"), None, "words must be numbers, not 'xyz'"),
        (("--kind", "ate", "1"), None, "kind must be 'event', 'command', 'pri'"),
        (("--unit", "7", "1"), None, "unit must be 64, 32 or 8, not 7"),
        (("--level", "9", "1"), None, "level must be -1, 0, 1, 2 or 3, not 9"),
        (("--level", "low", "1"), None, "'low' is not a number"),
        (("--raw", "1"), None, "--raw: reads standard input, but words are given too"),
        ((), "", "nothing to decode"),
        ((), "no line of this tells of an SMMU\n", "nothing to decode"),
        ((), bytes(range(256)), "nothing to decode"),
        (("--raw",), b"123", "kind must be named for 3 bytes (an event is 32"),
        (("\udcff",), None, "nothing to decode"),
    ],
)
def test_bad_words_are_one_clear_line(arguments, given, problem):
    error = run("decode", *arguments, status=2, given=given)
    assert problem in error.splitlines()[-1]
    assert "error: " in error.splitlines()[-1]


def test_decoding_imports_nothing_large():
    program = (
        "import sys\nfrom smmufast.cli import main\n"
        "main(['decode', '--kind', 'event', '4', '0', '0', '0'])\n"
        "late = {'numpy', 'smmufast._device.smmu', 'smmufast._engine.memory'}\n"
        "assert not late & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "C_BAD_STE" in done.stdout


# --- bad input and the rest -----------------------------------------------------------------------


BAD = {
    "nothing": ((), "the following arguments are required: COMMAND"),
    "unknown command": (("play", "x"), "invalid choice: 'play'"),
    "no capture": (("replay",), "the following arguments are required: CAPTURE"),
    "missing capture": (("replay", "/nowhere"), "/nowhere: there is no such directory"),
    "missing events": (("events", "/nowhere"), "/nowhere: there is no such directory"),
    "missing commands": (("commands", "/nowhere"), "/nowhere: there is no such directory"),
    "a number": (("walk", "x", "--sid", "ten", "--iova", "0"), "'ten' is not a number"),
    "negative": (("walk", "x", "--sid=-1", "--iova", "0"), "-1 is negative"),
    "no repeat": (
        ("replay", "x", "--repeat", "0"),
        "argument --repeat: it must be 1 or more, not 0",
    ),
    "too many": (
        ("replay", "x", "--random", 1 << 63),
        "argument --random: it must be 0 to 2^63 - 1, not 0x8000",
    ),
    "many digits": (("replay", "x", "--seed", "9" * 5000), "999...' is not a number"),
    "another base": (("replay", "x", "--seed", "0b1"), "'0b1' is not a number (0x... is"),
    "underscores": (("walk", "x", "--sid", "1_0", "--iova", "0"), "'1_0' is not a number"),
    "other digits": (("replay", "x", "--seed", "\N{ARABIC-INDIC DIGIT ONE}"), "is not a number"),
    "an empty name": (("replay", ""), "'': there is no such directory"),
    "a device": (("replay", os.devnull), "/dev/null: a capture must be a directory, not a file"),
    "a file": (("walk", "README.md", "--sid", "0", "--iova", "0"), "a capture must be a directory"),
    "a file to replay": (("replay", captures.SHIPPED / "meta.json"), "meta.json:1: the compressed"),
    "no results to name": (("trace", captures.SHIPPED, "--columns", "pa"), "which need --out"),
    "a StreamID beside others": (("trace", captures.SHIPPED, "--sid", "1"), "--sid, --ssid"),
    "large sid": (("walk", "x", "--sid", hex(1 << 32), "--iova", "0"), "does not fit 32 bits"),
    "large ssid": (
        ("walk", "x", "--sid", "0", "--iova", "0", "--ssid", "0x100000"),
        "does not fit 20 bits",
    ),
    "large iova": (("walk", "x", "--sid", "0", "--iova", hex(1 << 64)), "does not fit 64 bits"),
    "no sid": (("walk", "x", "--iova", "0"), "required: --sid"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_usage_is_one_clear_line(name):
    arguments, problem = BAD[name]
    error = run(*arguments, status=2)
    assert problem in error
    assert error.startswith("smmufast: error: ")
    assert error.count("\n") == 1


def documented():
    """The commands that docs/tools.md lists, with the shipped capture."""
    text = (captures.ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
    listed = text.partition("The commands; CAPTURE")[2]
    block = listed.partition("```console\n")[2].partition("```")[0]
    for line in block.splitlines():
        command = line.partition("#")[0].strip()
        if command.startswith("smmufast"):
            yield command


@pytest.mark.parametrize("command", list(documented()))
def test_the_shipped_example_has_something_for_every_command_that_is_listed(command):
    words = command.replace("0x…", "0x1 0 0 0 0 0 0 0").split()[1:]
    words = [captures.SHIPPED if word == "CAPTURE" else word for word in words]
    if words[0] in ("commands", "events"):
        words += ["--limit", "20"]
    assert len(run(*words).splitlines()) > 2


def test_the_list_names_every_command():
    named = {command.split()[1] for command in documented()}
    assert named == {"replay", "walk", "streams", "events", "commands", "decode", "trace"}


def test_the_shipped_log_is_decoded():
    log = (EXAMPLES / "kernel.log").read_text()
    lines = run("decode", "--brief", given=log).splitlines()
    assert [line.split(": ")[1] for line in lines[:-1]] == [
        "F_TRANSLATION", "GERROR", "CERROR_ILL", "ATC_INV", "CMD_SYNC timeout",
    ]  # fmt: skip


COMMANDS = {
    "replay": ("replay", captures.SHIPPED),
    "walk": ("walk", captures.SHIPPED, "--sid", "16", "--iova", "0"),
    "events": ("events", captures.SHIPPED, "--limit", "9"),
    "decode": ("decode", "0x46", "0"),
    "help": ("--help",),
    "help of one": ("trace", "--help"),
    "version": ("--version",),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_output_that_cannot_be_written_is_one_clear_line(name):
    with open("/dev/full", "wb") as full:
        process = start(*COMMANDS[name], stdout=full)
        error = process.stderr.read()
    assert process.wait(timeout=60) == 2
    assert error == "smmufast: error: standard output: No space left on device\n"


@pytest.mark.parametrize("closed", [0, 1, 2])
@pytest.mark.parametrize("words", [("decode", "0x46", "0"), ("decode",), ("walk", "nowhere")])
def test_streams_that_are_closed_do_no_harm(closed, words):
    process = start(*words, preexec_fn=lambda: os.close(closed), stdin=subprocess.DEVNULL)
    out, error = process.communicate(timeout=60)
    assert process.returncode == (0 if len(words) == 3 else 2)
    assert "Traceback" not in out + error
    if closed == 0 and words == ("decode",):
        assert error == "smmufast: error: standard input is closed, and no words are given\n"


def test_text_that_standard_output_cannot_show_is_escaped(tmp_path, monkeypatch):
    path = tmp_path / "na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve"
    captures.small_capture(path)
    for variable, value in {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}.items():
        monkeypatch.setenv(variable, value)
    process = start("streams", path)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert "ve: stream table at 0x40000000" in out


def test_more_input_than_is_read_is_told(monkeypatch):
    monkeypatch.setattr("smmufast._commands.decode.MAX_INPUT", len(LOG))
    assert "stream 0x9" in run("decode", given=LOG + "more")
    error = run("decode", given="x" * (len(LOG) + 1), status=2)
    assert "only the first 0 MiB of standard input were read" in error
    assert len(run("decode", "--brief", "--limit", "1", given=LOG[:-1]).splitlines()) == 1
    monkeypatch.setattr("smmufast._commands.decode.MAX_INPUT", 1 << 20)
    lines = run("decode", "--brief", "--limit", "1", given=LOG * 3).splitlines()
    assert lines == ["2: C_BAD_STE: stream 0x9", "8: limit: line 8 and those behind it tell more: "
                     "after 1 findings the rest is left out", "1 finding: 1 C_BAD_STE"]  # fmt: skip


def test_a_trace_of_the_requests_of_the_capture():
    found = run_json("trace", captures.SHIPPED)
    assert (found["requests"], found["actions"]) == (7287, {"ok": 6395, "abort": 892})


def test_hostile_captures_are_one_clear_line_or_an_answer(tmp_path):
    captures.small_capture(tmp_path / "good")
    meta = json.loads((tmp_path / "good" / "meta.json").read_text())
    arrays = dict(np.load(tmp_path / "good" / "pages.npz"))
    rng = random.Random(7)
    for number in range(12):
        path = tmp_path / str(number)
        path.mkdir()
        for name in ("requests.jsonl.gz", "events.jsonl.gz"):
            (path / name).write_bytes((tmp_path / "good" / name).read_bytes())
        registers = dict(meta["regs"]) | {f"{queue}_{part}": "0x0" for queue in ("CMDQ", "EVENTQ")
                                          for part in ("BASE", "PROD", "CONS")}  # fmt: skip
        for name in rng.sample(sorted(registers), 3):
            bits = 64 if name.endswith("_BASE") else 32
            registers[name] = hex(int(registers[name], 16) ^ 1 << rng.randrange(bits))
        pages = arrays["pages"].copy()
        for _ in range(200):
            pages[rng.randrange(len(pages)), rng.randrange(4096)] = rng.getrandbits(8)
        itself = int(arrays["page_addr"][-1]) | 3  # a table that leads to itself
        pages[-1] = np.frombuffer(itself.to_bytes(8, "little") * 512, np.uint8)
        for name in ("pages.npz", "queues.npz"):
            np.savez(path / name, page_addr=arrays["page_addr"], pages=pages)
        changed = {key: value for key, value in meta.items() if key != "counts"}
        (path / "meta.json").write_text(json.dumps(changed | {"regs": registers}))
        for words in (("replay",), ("streams",), ("events",), ("commands",), ("trace",),
                      ("walk", "--sid", "3", "--iova", "0x1000")):  # fmt: skip
            arguments = [words[0], str(path), *words[1:], "--json"]
            output, error = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
                status = main(arguments)
            assert status in (0, 1, 2, 3)
            assert error.getvalue().count("\n") == (status == 2)
            if status != 2:
                json.loads(output.getvalue())


@pytest.mark.parametrize("command", ["replay", "walk", "streams"])
def test_bad_captures_are_one_clear_line(tmp_path, command):
    captures.small_capture(tmp_path / "small")
    (tmp_path / "small" / "requests.jsonl.gz").write_bytes(b"no list")
    more = ("--sid", "0", "--iova", "0") if command == "walk" else ()
    error = run(command, tmp_path / "small", *more, status=2)
    assert error.startswith("smmufast: error: ")
    assert "requests.jsonl.gz:1: the compressed data is damaged" in error
    assert error.count("\n") == 1


def test_help_and_version():
    assert run("--version") == f"smmufast {smmufast.__version__}\n"
    text = run("--help")
    commands = ("replay", "walk", "trace", "streams", "events", "commands", "decode")
    for word in (*commands, "exit status"):
        assert word in text
    for command in commands:
        assert "--json" in run(command, "--help")


def test_numpy_is_not_needed_for_the_command_itself():
    # what the package itself imports is not the command's
    code = (
        "import sys; sys.modules['smmufast'] = p = type(sys)('smmufast');"
        f"p.__path__ = [{str(HOME / 'smmufast')!r}];"
        "from smmufast.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'numpy', 'json', 'gzip'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_an_uncompiled_package_is_named(tmp_path):
    source = tmp_path / "smmufast"
    shutil.copytree(Path(smmufast.__file__).parent / "_commands", source / "_commands")
    shutil.copytree(Path(smmufast.__file__).parent / "_tools", source / "_tools")
    for name in ("_arguments.py", "_files.py", "cli.py", "__main__.py", "capture.py", "layout.py",
                 "faults.py", "features.py"):  # fmt: skip
        (source / name).write_bytes((Path(smmufast.__file__).parent / name).read_bytes())
    (source / "__init__.py").write_text("")
    process = subprocess.run(
        [sys.executable, "-m", "smmufast", "replay", str(captures.SHIPPED)],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert "is not compiled: install it" in process.stderr
    assert process.stderr.count("\n") == 1


def test_a_reader_that_goes_away_ends_it_quietly():
    process = start("streams", captures.SHIPPED, "--json", stdout=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=60) in (0, 141)
    assert error == ""
    reader, writer = os.pipe()
    os.close(reader)
    process = start("streams", captures.SHIPPED, stdout=writer)
    os.close(writer)
    error = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert error == ""


def test_long_work_shows_a_bar_and_an_interrupt_ends_it_quietly():
    terminal, errors = os.openpty()
    process = start("replay", captures.SHIPPED, "--random", 10**12, stderr=errors)
    os.close(errors)
    shown = b""
    while b"replaying [" not in shown:
        shown += os.read(terminal, 1 << 16)
    assert b"replaying [...." in shown
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    try:
        while piece := os.read(terminal, 1 << 16):
            shown += piece
    except OSError:  # how a terminal says that its other end is closed
        pass
    os.close(terminal)
    assert shown.decode().split("\r")[-2].strip() == ""  # the bar was wiped
    assert b"Traceback" not in shown


def test_tables_on_a_terminal_say_the_same():
    terminal, writer = os.openpty()
    process = start("replay", captures.SHIPPED, stdout=writer)
    os.close(writer)
    shown = b""
    try:
        while piece := os.read(terminal, 1 << 16):
            shown += piece
    except OSError:
        pass
    os.close(terminal)
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    assert "7287 requests: 7287 agree, 0 differ, 0 unsupported" in text
    (row,) = (line.split() for line in text.splitlines() if line.startswith("0xf8"))
    assert row[1:5] == ["3064", "3064", "0", "0"]


@pytest.mark.parametrize("name", ["replay_capture.py", "dma_burst.py", "nested.py"])
def test_examples_run(name):
    assert len((EXAMPLES / name).read_text().splitlines()) <= 45
    process = subprocess.run(
        [sys.executable, "-P", str(EXAMPLES / name)],
        env=os.environ | {"PYTHONPATH": str(HOME)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    wanted = {
        "replay_capture.py": "stream  0xf8: 3064 of 3064 agree",
        "dma_burst.py": "0x2000 bytes at 0x2000 go to 0x50008000",
        "nested.py": "0x1234 is IPA 0x201234, and that is 0x80201234",
    }
    assert wanted[name] in process.stdout
    assert process.stderr == ""


def commands_of_pages():
    """The commands of the shell blocks of docs/, and what a page shows of their output, or ""."""
    found = {}
    for page in sorted((captures.ROOT / "docs").rglob("*.md")):
        for block, shown in re.findall(
            r"^```sh\n(.*?)^```$(?:\n\n^```text$\n(.*?)^```$)?", page.read_text(encoding="utf-8"),
            re.MULTILINE | re.DOTALL,
        ):  # fmt: skip
            for line in block.splitlines():
                if line.startswith("smmufast "):
                    found[line] = shown or found.get(line, "")
    return found


@pytest.mark.parametrize(("command", "shown"), commands_of_pages().items())
def test_the_commands_of_the_pages_work_and_print_what_is_shown(command, shown, monkeypatch):
    monkeypatch.chdir(captures.ROOT)
    words, _, file = command.partition(" < ")
    given = Path(file).read_bytes() if file else None
    printed = run(*words.split()[1:], given=given)
    assert printed == shown if shown else printed


def test_the_tools_page_has_the_limits():
    from smmufast import decode, streams
    from smmufast._commands.decode import MAX_INPUT
    from smmufast._tools import capture_files

    text = (captures.ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
    for limit in (capture_files.MAX_REQUESTS, capture_files.MAX_CONFIGURATIONS,
                  capture_files.MAX_PAGES, streams.MOST_PAGES, streams.MOST,
                  decode.MOST_WORDS):  # fmt: skip
        assert f"2^{limit.bit_length() - 1}" in text
        assert limit & limit - 1 == 0
    for limit in (capture_files.MAX_TEXT, capture_files.MAX_LINE, MAX_INPUT):
        assert f"{limit >> 20} MiB" in text
    assert f"{capture_files.MAX_HEADER:,} bytes" in text
    assert f"{decode.MOST:,}" in text
    assert streams.LARGEST == 1 << 30
