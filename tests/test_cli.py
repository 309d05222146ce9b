"""The command: what it prints, its exit statuses, and one line for bad input."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import captures
import pytest

import smmufast
from smmufast.capture import Capture

HOME = Path(smmufast.__file__).resolve().parent.parent
SCRIPT = Path(sys.executable).with_name("smmufast")
COMMAND = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-P", "-m", "smmufast"]
EXAMPLES = captures.ROOT / "examples"


def start(*arguments, **more):
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | more
    # the package that is tested, wherever it was built
    environment = os.environ | {"PYTHONPATH": str(HOME), "COLUMNS": "120"}
    return subprocess.Popen([*COMMAND, *map(str, arguments)], env=environment, **more)


def run(*arguments, status=0):
    process = start(*arguments)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, (process.returncode, out, err)
    assert "Traceback" not in err
    return out if status != 2 else err


def run_json(*arguments, status=0):
    return json.loads(run(*arguments, "--json", status=status))


def case(**more):
    """One request of a capture of kind "cases"."""
    out = {"k": "ok", "pa": "0x50001000", "perm": 3, "stage": 1}
    return {"sid": captures.SID, "iova": "0x1000", "rnw": 1, "out": out} | more


# --- replay ---------------------------------------------------------------------------------------


def test_replay_of_the_shipped_capture_agrees():
    text = run("replay", captures.SHIPPED)
    lines = text.splitlines()
    assert lines[0] == "linux-7.3-4k-s1: 1 configuration, 7287 requests"
    assert "The recorded SMMU has S2P=1, which this version does not model" in lines[1]
    assert lines[-1] == "7287 requests: 7287 agree, 0 differ, 0 unsupported"
    head = lines[3].split()
    assert head[:5] == ["stream", "requests", "agreeing", "differing", "unsupported"]
    rows = {words[0]: words[1:] for words in map(str.split, lines[4:-2])}
    assert rows["0xf8"][:4] == ["3064", "3064", "0", "0"]
    assert " ".join(rows["0xf8"][4:8]) == "4K: 2278, 2M: 350"
    assert float(rows["0xf8"][8]) > 0
    assert sum(int(row[0]) for row in rows.values()) == 7287


def test_replay_as_json():
    found = run_json("replay", captures.SHIPPED, "--repeat", "3", "--random", "0x1000")
    assert found["status"] == 0
    assert (found["requests"], found["agreeing"]) == (7287, 7287)
    assert found["masked"] == {"s2p": 1}
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
    system = captures.small_system(config=0b110)
    path = captures.cases(tmp_path / "s2", (system, [case(), case(sid=4, out={"k": "bypass"})], {}))
    text = run("replay", path, status=3)
    assert text.endswith("2 requests: 1 agree, 0 differ, 1 unsupported; 1 need stage 2\n")
    assert run("replay", path, "--allow-unsupported") != ""
    assert run_json("replay", path, status=3)["unsupported_needs"] == {"stage 2": 1}
    # a difference outweighs them
    path = captures.cases(tmp_path / "both", (system, [case(), case(sid=4)], {}))
    run("replay", path, status=1)
    run("replay", path, "--allow-unsupported", status=1)


def test_a_capture_without_requests_is_not_taken_for_one_that_agrees(tmp_path):
    Capture.save(tmp_path / "none", smmu=captures.small_system())
    error = run("replay", tmp_path / "none", status=2)
    assert error.endswith("none: no requests are recorded, nothing to replay\n")


# --- walk and streams -----------------------------------------------------------------------------


def test_walk_explains():
    text = run("walk", captures.SHIPPED, "--sid", "0x10", "--iova", "0xfffe0fc0")
    assert "S2P=1, which this version does not model" in text.splitlines()[0]
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
    assert lines[-1].startswith("0x400-0xffff     STE no level-2 table (Span=0, C_BAD_STREAMID)")
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


# --- bad input and the rest -----------------------------------------------------------------------


BAD = {
    "nothing": ((), "the following arguments are required: COMMAND"),
    "unknown command": (("play", "x"), "invalid choice: 'play'"),
    "no capture": (("replay",), "the following arguments are required: CAPTURE"),
    "missing capture": (("replay", "/nowhere"), "/nowhere: there is no such directory"),
    "a number": (("walk", "x", "--sid", "ten", "--iova", "0"), "'ten' is not a number"),
    "negative": (("walk", "x", "--sid=-1", "--iova", "0"), "-1 is negative"),
    "no repeat": (("replay", "x", "--repeat", "0"), "at least 1 is needed"),
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
    last = error.splitlines()[-1]
    assert problem in last
    assert "error: " in last


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
    for word in ("replay", "walk", "streams", "exit status"):
        assert word in text
    for command in ("replay", "walk", "streams"):
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
    source.mkdir()
    for name in ("cli.py", "__main__.py", "capture.py", "layout.py", "faults.py", "features.py"):
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
    while b" %" not in shown:
        shown += os.read(terminal, 1 << 16)
    assert b"[." in shown
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


@pytest.mark.parametrize("name", ["replay_capture.py", "dma_burst.py"])
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
    }
    assert wanted[name] in process.stdout
    assert process.stderr == ""
