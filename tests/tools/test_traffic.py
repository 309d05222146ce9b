"""Traffic is replayed as it was recorded, and the first thing that differs is found."""

import gzip
import json
import os

import captures
import numpy as np
import pytest
from command import run, run_json
from project import CAPTURES

from smmufast import Caches, CaptureError, Memory, Smmu, layout
from smmufast.traffic import Recorder, Traffic, replay

BASE, SIZE = 0x4000_0000, 0x100_0000
STE, CD, TABLES, EVENTQ, CMDQ = (BASE + at for at in (0, 0x1_0000, 0x2_0000, 0x10_0000, 0x20_0000))
LEAVES = TABLES + 0x2_0000
RECORDED = CAPTURES / "traffic"
recorded = pytest.mark.skipif(not RECORDED.is_dir(), reason="recordings of kernels are not here")


def dword(value):
    return value.to_bytes(8, "little")


def system():
    memory = Memory()
    memory.add_private(BASE, SIZE)
    return Smmu(memory, cr0=0)


def send(recorder, *commands):
    """Put commands and a CMD_SYNC into the queue, as software does."""
    for command in (*commands, layout.pack("SYNC", CS=0)):
        prod = recorder.read("CMDQ_PROD")
        recorder.store(CMDQ + 16 * (prod & 255), command.to_bytes(16, "little"))
        recorder.write("CMDQ_PROD", prod + 1 & 511)
    assert recorder.read("CMDQ_CONS") == recorder.read("CMDQ_PROD")


def boot(recorder):
    """A driver's start, one stream with a few pages."""
    ste = layout.pack("STE", V=1, Config=5, S1CDMax=4, S1DSS=2, S1ContextPtr=CD)
    cd = layout.pack("CD", V=1, AA64=1, A=1, R=1, T0SZ=25, IPS=2, EPD1=1, TTB0=TABLES, ASID=7,
                     MAIR0=0xFF)  # fmt: skip
    recorder.store(STE, layout.to_bytes("STE", ste))
    for i in range(2):
        recorder.store(CD + 64 * i, layout.to_bytes("CD", cd))
    for table in (TABLES, TABLES + 0x1_0000):
        recorder.store(table, dword(table + 0x1_0003))
    recorder.store(LEAVES, b"".join(dword((i + 1) << 12 | 0xF43) for i in range(8)))
    recorder.write("STRTAB_BASE", STE)
    recorder.write("EVENTQ_BASE", EVENTQ | 5)
    recorder.write("CMDQ_BASE", CMDQ | 8)
    recorder.write("CR2", layout.pack("CR2", RECINVSID=1))
    recorder.write("CR0", layout.pack("CR0", SMMUEN=1, EVENTQEN=1, CMDQEN=1))
    assert recorder.read("CR0ACK") == recorder.read("CR0")


def life(recorder):
    """Every kind of record, and a page that is replaced."""
    recorder.translate(0, 0x1000)
    boot(recorder)
    for iova in (0x123, 0x1123, 0x7000, 0x8000, 1 << 40):
        recorder.translate(0, iova, write=True)
        recorder.translate(0, iova, ssid=1, instr=True, priv=True)
    recorder.translate(0, 0x123, ssid=5)
    recorder.translate(9, 0x123)
    recorder.read("EVENTQ_PROD")
    recorder.store(LEAVES, dword(0))
    send(recorder, layout.pack("TLBI_NH_VA", ASID=7, Address=0, Leaf=1))
    recorder.translate(0, 0x123)
    recorder.store(LEAVES, dword(0x9_0F43))
    recorder.translate(0, 0x123)
    recorder.store(STE, layout.to_bytes("STE", layout.pack("STE", V=1, Config=4)))
    send(recorder, layout.pack("CFGI_STE", StreamID=0, Leaf=1))
    recorder.translate(0, 0x123)
    recorder.store(STE, layout.to_bytes("STE", 1))
    send(recorder, layout.pack("CFGI_STE", StreamID=0, Leaf=1))
    recorder.translate(0, 0x123)
    recorder.interrupt("eventq")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("traffic") / "life"
    with Recorder(path, system(), {"host": "a test"}) as recorder:
        life(recorder)
    return path


def lines(path):
    text = gzip.decompress((path / "log.jsonl.gz").read_bytes())
    return [json.loads(line) for line in text.splitlines()]


def changed(whole, path, change):
    """A copy of a recording with other lines."""
    found = lines(whole)
    found = change(found) or found
    path.mkdir()
    (path / "log.jsonl.gz").write_bytes(
        gzip.compress(b"".join(json.dumps(line).encode() + b"\n" for line in found)))
    (path / "pages.npz").write_bytes((whole / "pages.npz").read_bytes())
    return path


@pytest.mark.parametrize("caches", ["none", "small", "server", None])
def test_a_life_is_replayed_without_a_divergence(whole, caches):
    found = replay(whole, caches=caches)
    assert found.divergence is None
    assert set(found.compared) == {"R", "T", "E", "N", "B", "A"}
    assert found.steps == len(lines(whole)) - 1
    assert Traffic(whole).header["host"] == "a test"
    assert found.smmu.read("EVENTQ_PROD") == found.compared["E"]


def test_a_recorder_may_come_late(tmp_path):
    smmu = system()
    with Recorder(tmp_path / "early", smmu) as recorder:
        boot(recorder)
        recorder.translate(0, 0x9999)
    with Recorder(tmp_path / "late", smmu) as recorder:
        recorder.translate(0, 0x123)
        send(recorder, layout.pack("TLBI_NH_ALL"))
        recorder.translate(0, 0x9000)
        recorder.read("EVENTQ_PROD")
    assert "They were needless" in run(
        "replay", tmp_path / "late", "--caches", "small", "--drop", "TLBI_NH_ALL")  # fmt: skip
    found = replay(tmp_path / "late")
    assert found.divergence is None and found.compared == {"T": 1, "E": 1, "R": 5}


PLANTED = {
    "T": lambda line: [*line[:3], line[3] ^ 0x1000, *line[4:]],
    "R": lambda line: [*line[:3], line[3] ^ 1],
    "E": lambda line: [*line[:3], "0b" + line[3][2:], *line[4:]],
    "B": lambda line: ["A", *line[1:]],
    "A": lambda line: ["B", *line[1:]],
    "N": lambda line: ["B", *line[1:]],
}


@pytest.mark.parametrize("op", PLANTED)
def test_a_planted_divergence_is_found_where_it_is(whole, tmp_path, op):
    found = lines(whole)
    for at in [i for i, line in enumerate(found[1:], 1) if line[0] == op][-2:]:
        def change(lines, at=at):
            lines[at] = PLANTED[op](lines[at])

        path = changed(whole, tmp_path / f"{op}{at}", change)
        diverged = replay(path).divergence
        assert diverged.step.line == at + 1
        assert replay(path, until=at).divergence is None
        if op != "R":
            assert diverged.explain and str(diverged).startswith(f"line {at + 1}: ")
        out = run("replay", path, status=1)
        assert f"diverges at line {at + 1}: " in out
        assert run_json("replay", path, status=1)["divergence"]["line"] == at + 1


def test_a_bit_of_permissions_and_a_stage_are_compared(whole, tmp_path):
    at = next(i for i, line in enumerate(lines(whole)) if i and line[0] == "T")
    for n, (member, value) in enumerate(((4, 1), (5, 2))):
        def change(lines, member=member, value=value):
            lines[at][member] = value

        path = changed(whole, tmp_path / str(n), change)
        assert replay(path).divergence.step.line == at + 1


def test_what_breaks_without_a_command(whole):
    assert replay(whole, drop=["TLBI_NH_VA"]).divergence is None  # nothing is cached
    found = replay(whole, caches="server", drop=["CMD_TLBI_NH_VA"])
    assert (found.dropped, found.divergence.step.op) == (1, "E")
    assert "caches hold what these do not give" in found.divergence.explain
    assert "tlb, 0x0: " in found.divergence.explain
    found = replay(whole, caches="server", drop=["cfgi_ste"])
    assert found.divergence is not None and found.dropped
    found = replay(whole, caches="server", drop=["SYNC"])
    assert found.divergence is None and found.dropped == 3
    assert "Left out: 1 command\n" in run(
        "replay", whole, "--caches", "server", "--drop", "TLBI_NH_VA", status=1)  # fmt: skip


def test_a_command_that_is_missed_by_nobody_shows_in_stale(tmp_path):
    with Recorder(tmp_path / "t", system()) as recorder:
        boot(recorder)
        recorder.translate(0, 0x123)
        recorder.store(LEAVES, dword(0))
        send(recorder, layout.pack("TLBI_NH_ASID", ASID=7))
    found = replay(tmp_path / "t", caches=Caches.server(), drop=["TLBI_NH_ASID"])
    assert found.divergence is None and found.stale == 1
    assert "up to 1 entries of caches were stale" in run(
        "replay", tmp_path / "t", "--caches", "server", "--drop", "TLBI_NH_ASID")  # fmt: skip


BAD = {
    "no list": ({"a": 1}, "a list that begins with a letter"),
    "nothing": ([], "a list that begins with a letter"),
    "unknown letter": (["Q", 1], "the letter of a step must be"),
    "too few": (["W", 0, 4], "a list of 3, not one of 2"),
    "too many": (["U", 1, 2], "a list of 1, not one of 2"),
    "text": (["U", "there"], "pa must be a number"),
    "negative": (["U", -1], "pa must be 0 to"),
    "offset": (["W", 0x20000, 4, 0], "offset must be"),
    "size": (["R", 0x20, 3, 0], "no value of 3 bytes"),
    "value": (["S", BASE, 1, 256, 0], "no value of 1 bytes"),
    "page": (["P", BASE, 0, 99], "n must be one of"),
    "unaligned page": (["Z", BASE + 8, 0], "pa must be a multiple of 4096"),
    "record": (["E", 0, "X", "00"], "an event record of 32 bytes"),
    "event": (["E", 0, "X", "ff" * 32], "event number of record"),
    "access": (["B", 0, 0, 1, {"why": 1}], "a member must be"),
    "ssid": (["T", 0, 0, 0, 1, 1, {"ssid": 1 << 20}], "ssid must be"),
    "nested": (["I", [1]], "n must be a number"),
}


@pytest.mark.parametrize("line, problem", BAD.values(), ids=BAD)
def test_what_is_not_of_the_format_is_refused_by_its_line(whole, tmp_path, line, problem):
    path = changed(whole, tmp_path / "t", lambda lines: lines.insert(3, line))
    with pytest.raises(CaptureError, match=r"log\.jsonl\.gz:4: ") as caught:
        replay(path)
    assert problem in str(caught.value)
    assert problem in run("replay", path, status=2)


def test_stores_outside_of_ram_are_a_divergence(whole, tmp_path):
    path = changed(whole, tmp_path / "t", lambda lines: lines.insert(1, ["Z", BASE - 4096, 0]))
    assert "outside of RAM" in replay(path).divergence.problem


def test_a_queue_outside_of_ram_is_an_abort_whatever_is_left_out(whole, tmp_path):
    def change(lines):
        for line in lines[1:]:
            if line[:2] == ["W", 0x90]:
                line[3] = (1 << 45) | 8

    path = changed(whole, tmp_path / "t", change)
    assert replay(path, drop=["TLBI_NH_VA"]).dropped == 0


def test_an_interrupt_that_is_not_raised_is_a_divergence(whole, tmp_path):
    path = changed(whole, tmp_path / "t", lambda lines: lines.append(["I", 2]))
    assert replay(path).divergence.problem == "no interrupt gerror is raised"


HEADERS = {
    "no idr": ({"ram": [BASE, SIZE]}, "idr is missing"),
    "no ram": ({"idr": {"IDR0": 10, "IDR1": 0, "IDR3": 0, "IDR5": 0}}, "ram is missing"),
    "a list": ([], "the JSON must be an object"),
    "odd ram": ({"idr": {"IDR0": 10, "IDR1": 0, "IDR3": 0, "IDR5": 0}, "ram": [3, 8]}, "RAM of"),
}


@pytest.mark.parametrize("header, problem", HEADERS.values(), ids=HEADERS)
def test_a_header_that_cannot_be_is_refused(whole, tmp_path, header, problem):
    def change(lines):
        lines[0] = header

    with pytest.raises(CaptureError, match=problem):
        Traffic(changed(whole, tmp_path / "t", change))


def test_files_that_are_missing_or_cut_off_are_named(whole, tmp_path):
    path = changed(whole, tmp_path / "t", lambda lines: None)
    log = path / "log.jsonl.gz"
    log.write_bytes(log.read_bytes()[:-20])
    with pytest.raises(CaptureError, match=r"cut off|damaged"):
        replay(path)
    log.write_bytes(b"")
    with pytest.raises(CaptureError):
        replay(path)
    (path / "pages.npz").unlink()
    with pytest.raises(CaptureError):
        replay(path)
    with pytest.raises(CaptureError):
        Traffic(tmp_path / "nowhere")


def test_a_recording_is_whole_or_absent(tmp_path):
    with pytest.raises(ZeroDivisionError), Recorder(tmp_path / "t", system()) as recorder:
        boot(recorder)
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "x").touch()
    with pytest.raises(FileExistsError):
        Recorder(tmp_path / "t", system())
    with pytest.raises(ValueError, match="memory must be one with a region"):
        Recorder(tmp_path / "u", Smmu(Memory(), cr0=0))


def test_options_of_traffic_are_for_traffic(whole):
    error = run("replay", captures.SHIPPED, "--caches", "small", status=2)
    assert "for recorded traffic, which this is not" in error
    assert "--drop must be" in run("replay", whole, "--drop", "NOPE", status=2)
    with pytest.raises(ValueError, match="caches must be"):
        replay(whole, caches="large")
    with pytest.raises(ValueError, match="until must be"):
        replay(whole, until=-1)


@recorded
def test_a_kernel_with_pasids_is_replayed_without_a_divergence():
    for caches in ("none", "small", "server"):
        found = replay(RECORDED / "linux-7.3-pasid-v32", caches=caches)
        assert found.divergence is None and found.compared == {"R": 414}
        assert found.steps == 10490


@recorded
@pytest.mark.slow
@pytest.mark.parametrize("caches", ["none", "small", "server"])
def test_a_kernel_is_replayed_without_a_divergence(caches):
    found = replay(RECORDED / "linux-6.1-4k", caches=caches)
    assert found.divergence is None
    assert found.compared == {"R": 9575, "T": 62670, "E": 5584, "I": 612, "B": 2104}


@recorded
@pytest.mark.parametrize("command", ["TLBI_NH_VA", "TLBI_NH_ASID", "CFGI_STE"])
def test_a_kernel_needs_its_commands(command):
    found = replay(RECORDED / "linux-6.1-4k", caches="server", drop=[command])
    assert found.divergence is not None and found.stale


def test_pages_are_those_of_the_file(whole):
    assert Traffic(whole).pages.dtype == np.uint8
    assert "<Traffic " in repr(Traffic(whole))
