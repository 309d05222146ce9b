"""Traces: what one batch gives, in memory that does not grow, and one line for bad ones."""

import json
import os
import resource
import struct
import subprocess
import sys

import captures
import numpy as np
import pytest
from command import HOME, run, run_json

from smmufast import Caches, Smmu, layout
from smmufast.capture import REQUEST, Capture
from smmufast.faults import ACTIONS
from smmufast.trace import TraceError, open_trace, translate_chunks, translate_trace

NARROW = np.dtype([("sid", "<u4"), ("ssid", "<u4"), ("iova", "<u8")])
COLUMNS = ("pa", "action", "event", "level")


@pytest.fixture(scope="module")
def configuration():
    """The configuration of the shipped capture."""
    return Capture.load(captures.SHIPPED)[0]


def some_requests(configuration, count, dtype=REQUEST, seed=1):
    """Requests of the capture in any order, some of them elsewhere and by other streams."""
    rng = np.random.default_rng(seed)
    rows = configuration.requests[rng.integers(0, len(configuration.requests), count)].copy()
    rows["iova"][rng.random(count) < 0.2] ^= np.uint64(1 << 33)
    rows["sid"][rng.random(count) < 0.1] += 1
    rows["write"] = rng.random(count) < 0.3
    found = np.zeros(count, dtype)
    for name in found.dtype.names:
        found[name] = rows[name]
    return found


def by_batch(smmu, rows):
    """What one batch over all rows gives."""
    access = {name: rows[name] for name in rows.dtype.names if name not in ("sid", "iova")}
    return smmu.translate_batch(rows["sid"], rows["iova"], columns=COLUMNS, **access)


def counted(expected):
    """Outcomes and events of a batch, counted one by one."""
    actions, events = {}, {}
    for action, event in zip(expected["action"].tolist(), expected["event"].tolist(), strict=True):
        actions[ACTIONS[action]] = actions.get(ACTIONS[action], 0) + 1
        if event:
            name = layout.Event(event).name
            events[name] = events.get(name, 0) + 1
    return actions, events


@pytest.mark.parametrize("dtype", [REQUEST, NARROW], ids=["flags", "narrow"])
@pytest.mark.parametrize("chunk", [1, 97, 1000, 1 << 16])
def test_a_trace_gives_what_one_batch_gives(configuration, tmp_path, dtype, chunk):
    rows = some_requests(configuration, 1000, dtype)
    expected = by_batch(configuration.smmu(), rows)
    assert len(set(expected["action"].tolist())) > 1
    np.save(tmp_path / "trace.npy", rows)
    mapped = np.lib.format.open_memmap(
        tmp_path / "mapped.npy", "w+", expected.dtype, expected.shape
    )
    steps = []
    found = translate_trace(
        configuration.smmu(),
        tmp_path / "trace.npy",
        mapped,
        chunk=chunk,
        progress=lambda done, work: steps.append((done, work)),
    )
    assert (mapped == expected).all()
    assert steps == [(min(end, 1000), 1000) for end in range(chunk, 1000 + chunk, chunk)]
    assert (found.actions, found.events) == counted(expected)
    assert found.requests == 1000
    assert found.rate == 1000 / found.seconds
    del mapped
    assert (np.load(tmp_path / "mapped.npy") == expected).all()

    again = translate_trace(
        configuration.smmu(), rows, tmp_path / "out.npy", chunk=chunk, columns=COLUMNS
    )
    assert (np.load(tmp_path / "out.npy") == expected).all()
    assert (again.actions, again.events) == (found.actions, found.events)
    columns = {"pa": np.zeros(1000, np.uint64), "event": np.zeros(1000, np.uint8)}
    translate_trace(configuration.smmu(), rows, columns, chunk=chunk)
    assert all((columns[name] == expected[name]).all() for name in columns)
    ends = 0
    for start, part in translate_chunks(configuration.smmu(), rows, chunk=chunk, columns=COLUMNS):
        assert start == ends
        assert (part == expected[start : start + len(part)]).all()
        ends += len(part)
    assert ends == 1000


def test_threads_give_what_one_gives(configuration, tmp_path):
    rows = some_requests(configuration, 1 << 16, NARROW)
    expected = by_batch(configuration.smmu(), rows)
    np.save(tmp_path / "trace.npy", rows)
    out = np.zeros(len(rows), expected.dtype)
    found = translate_trace(configuration.smmu(), tmp_path / "trace.npy", out, threads=2)
    assert (out == expected).all()
    assert (found.actions, found.events) == counted(expected)
    one = run_json("trace", captures.SHIPPED, tmp_path / "trace.npy", "--threads", "2")
    assert (one["actions"], one["events"]) == counted(expected)


def test_columns_that_the_trace_lacks_are_given(configuration, tmp_path):
    rows = some_requests(configuration, 500, NARROW)
    rows["sid"], rows["ssid"] = 0xF8, 0xFFFF_FFFF
    expected = by_batch(configuration.smmu(), rows)
    np.save(tmp_path / "addresses.npy", rows["iova"])
    for requests in (
        tmp_path / "addresses.npy",
        rows["iova"],
        rows[["iova"]],
        {"iova": rows["iova"]},
        {"iova": rows["iova"].astype(">u8")},
    ):
        found = translate_trace(configuration.smmu(), requests, sid=0xF8, chunk=64)
        assert (found.actions, found.events) == counted(expected)
    writes = translate_trace(configuration.smmu(), rows[["sid", "iova"]], write=True)
    given = {"sid": 0xF8, "iova": rows["iova"], "write": np.ones(500, bool)}
    assert writes.actions == translate_trace(configuration.smmu(), given).actions
    (tmp_path / "raw.bin").write_bytes(rows.tobytes())
    raw = open_trace(tmp_path / "raw.bin", NARROW)
    assert isinstance(raw, np.memmap)
    assert translate_trace(configuration.smmu(), raw).actions == counted(expected)[0]


def test_an_empty_trace_is_one(configuration, tmp_path):
    np.save(tmp_path / "empty.npy", np.zeros(0, NARROW))
    found = translate_trace(configuration.smmu(), tmp_path / "empty.npy", tmp_path / "out.npy")
    assert found.as_dict() == {
        "requests": 0,
        "actions": {},
        "events": {},
        "seconds": found.seconds,
        "translations_per_second": None,
    }
    assert np.load(tmp_path / "out.npy").shape == (0,)


def test_what_stalls_is_terminated_after_its_chunk():
    system = captures.small_system()
    cd = int.from_bytes(system.memory.read(captures.CONTEXTS, 8), "little")
    system.memory.write(captures.CONTEXTS, (cd | 1 << 44 | 1 << 45).to_bytes(8, "little"))  # S, R
    smmu = Smmu(
        system.memory,
        strtab_base=system.strtab_base,
        strtab_base_cfg=system.strtab_base_cfg,
        cr2=system.cr2,
    )
    iova = np.full(1000, 0x7F_0000_0000, np.uint64)
    assert smmu.translate(captures.SID, int(iova[0])).action == "stall"
    smmu.command("STALL_TERM", StreamID=captures.SID)
    for requests in (iova, {"sid": np.full(1000, captures.SID), "iova": iova}):
        sid = captures.SID if requests is iova else None
        found = translate_trace(smmu, requests, sid=sid, chunk=10)
        assert found.actions == {"stall": 1000}
        assert smmu.stalls == []


# --- memory ---------------------------------------------------------------------------------------

PEAK = """
import sys
import numpy as np
from smmufast import Memory, Smmu
from smmufast.trace import open_trace, translate_trace
memory = Memory()
memory.add(bytearray(1 << 16), 0)
memory.write_u64(0, 0b1001)
smmu = Smmu(memory, strtab_base=0, strtab_base_cfg=0)
trace, out, mapped = sys.argv[1:]
requests = np.load(trace, mmap_mode="r") if mapped == "array" else trace
if mapped == "array":
    rows = np.lib.format.open_memmap(out, "w+", [("pa", "u8"), ("action", "u1")], requests.shape)
    found = translate_trace(smmu, requests, rows)
else:
    found = translate_trace(smmu, requests, out)
assert set(found.actions) == {"bypass"}, found
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("kind", ["file", "array"])
def test_memory_does_not_grow_with_the_trace(tmp_path, kind):
    def peak(count):
        rows = np.zeros(count, NARROW)
        rows["ssid"] = 0xFFFF_FFFF
        np.save(tmp_path / "trace.npy", rows)
        arguments = [str(tmp_path / "trace.npy"), str(tmp_path / f"out{count}.npy"), kind]
        done = subprocess.run(
            [sys.executable, "-P", "-c", PEAK, *arguments],
            env=os.environ | {"PYTHONPATH": str(HOME)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout) << 10

    small, large = peak(1 << 17), peak(1 << 22)  # 2 and 64 MiB, and as much of results by half
    assert large - small < 8 << 20


def test_a_private_mapping_keeps_what_was_written_to_it(configuration, tmp_path):
    rows = some_requests(configuration, 5000, NARROW)
    np.save(tmp_path / "trace.npy", np.zeros(5000, NARROW))
    private = np.load(tmp_path / "trace.npy", mmap_mode="c")
    private[:] = rows
    found = translate_trace(configuration.smmu(), private, chunk=100)
    assert (np.asarray(private) == rows).all()
    assert found.actions == counted(by_batch(configuration.smmu(), rows))[0]


# --- bad traces -----------------------------------------------------------------------------------


def npy(text, data=b""):
    """The bytes of an .npy file with this header."""
    header = text.encode().ljust(118 - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def saved(array):
    """The bytes of the .npy file of an array."""
    from io import BytesIO

    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


ROWS = np.zeros(10, NARROW)
PLAIN = "{'descr': '<u8', 'fortran_order': False, 'shape': (%s), }"
BAD = {
    "text": (b"sid,iova\n1,2\n", "no .npy file: it starts with b'sid,io'"),
    "nothing": (b"", "no .npy file: it starts with b''"),
    "version": (b"\x93NUMPY\x09\x00" + bytes(100), ""),
    "header cut off": (saved(ROWS)[:40], "EOF: reading array header"),
    "header no dict": (npy("[]"), "Header is not a dictionary"),
    "header without shape": (npy("{'descr': '<u8'}"), "Header does not contain the correct keys"),
    "header too deep": (npy("(" * 117), ""),
    "data cut off": (
        saved(ROWS)[:-1],
        "what is behind the header must be 160 bytes for 10 rows, not 159",
    ),
    "more data": (
        saved(ROWS) + b"x",
        "what is behind the header must be 160 bytes for 10 rows, not 161",
    ),
    "huge shape": (npy(PLAIN % f"{1 << 62},"), "rows, not 0"),
    "negative shape": (npy(PLAIN % "-4,"), "shape must be (N,), not (-4,)"),
    "no shape": (npy(PLAIN % ""), "shape must be (N,), not ()"),
    "two dimensions": (saved(np.zeros((2, 2), "u8")), "shape must be (N,), not (2, 2)"),
    "floats": (saved(np.zeros(2)), "iova.dtype must be an integer, not float64"),
    "objects": (
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"),
        "dtype must be one without objects, not object",
    ),
    "no iova": (saved(np.zeros(2, [("sid", "u4")])), "there is no field iova among sid"),
    "no sid": (saved(np.zeros(2, [("iova", "u8")])), "there is no sid, and none is given"),
    "a sid of text": (
        saved(np.zeros(2, [("sid", "U4"), ("iova", "u8")])),
        "sid.dtype must be an integer, not <U4",
    ),
    "a subarray": (
        saved(np.zeros(2, [("sid", "u4", 2), ("iova", "u8")])),
        "sid.dtype must be an integer, not (",
    ),
    "write of fractions": (
        saved(np.zeros(2, [("sid", "u4"), ("iova", "u8"), ("write", "f4")])),
        "write.dtype must be bool, or an integer of 0 and 1, not float32",
    ),
    "write of other numbers": (
        saved(np.array([(1, 0, 1), (1, 0, 2)], [("sid", "u4"), ("iova", "u8"), ("write", "u1")])),
        "row 1: write must be 0 or 1, not 2",
    ),
    "ssid": (
        saved(np.array([(1, 0, 0)] * 7 + [(1, 1 << 20, 0)], NARROW)),
        "row 7: ssid must be 0 to 0xfffff, or 0xffffffff for none, not 0x100000",
    ),
    "sid": (
        saved(np.array([(1, 0), (1 << 32, 0)], [("sid", "u8"), ("iova", "u8")])),
        "row 1: sid must be 0 to 0xffffffff, not 0x100000000",
    ),
    "a negative address": (
        saved(np.array([(1, -2)], [("sid", "u4"), ("iova", "i8")])),
        "row 0: iova must be 0 to 0xffffffffffffffff, not -2",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_traces_are_one_line(configuration, tmp_path, name):
    data, problem = BAD[name]
    path = tmp_path / "trace.npy"
    path.write_bytes(data)
    with pytest.raises(TraceError) as caught:
        translate_trace(configuration.smmu(), path, tmp_path / "out.npy")
    assert caught.value.path == str(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert problem in str(caught.value)
    assert os.listdir(tmp_path) == ["trace.npy"]  # no part of a result
    said = run("trace", captures.SHIPPED, path, "--out", tmp_path / "out.npy", status=2)
    assert said == f"smmufast: error: {' '.join(str(caught.value).split())}\n"


def test_damaged_headers_never_do_more_than_that(tmp_path):
    rng = np.random.default_rng(5)
    good = saved(ROWS)
    path = tmp_path / "trace.npy"
    refused = 0
    for _ in range(400):
        data = bytearray(good)
        for _ in range(int(rng.integers(1, 4))):
            data[int(rng.integers(0, 128))] = int(rng.integers(0, 256))
        path.write_bytes(
            data[: int(rng.integers(0, len(data) + 1))] if rng.random() < 0.3 else data
        )
        try:
            assert open_trace(path).nbytes <= 160
        except TraceError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 200 < refused < 400


def test_bad_arrays_and_places(configuration, tmp_path):
    smmu = configuration.smmu()
    for requests, problem in (
        (np.zeros((2, 2), NARROW), r"requests\.ndim must be 1, not 2"),
        (np.zeros(2), r"iova\.dtype must be an integer, not float64"),
        ({"sid": 1, "iova": 2}, "no column is an array"),
        (
            {"sid": np.zeros(2, int), "iova": np.zeros(3, int)},
            "columns must be of one length, not {.*3}",
        ),
        ({"sid": np.zeros((2, 2), int), "iova": np.zeros(2, int)}, r"sid\.ndim must be 1, not 2"),
        ({"sid": 1, "iova": np.zeros(2, int), "wr": True}, "a column must be .*, not 'wr'"),
        ({"sid": 1, "iova": np.zeros(2)}, r"iova\.dtype must be an integer, not float64"),
    ):
        with pytest.raises(TraceError, match=problem):
            translate_trace(smmu, requests)
    with pytest.raises(TraceError, match="sid is in the trace and also an argument"):
        translate_trace(smmu, ROWS, sid=1)
    with pytest.raises(TypeError, match="requests must be a path, an array or a dict, not 3"):
        translate_trace(smmu, 3)
    with pytest.raises(ValueError, match="chunk must be 1 or more, not 0"):
        translate_trace(smmu, ROWS, chunk=0)
    with pytest.raises(TypeError, match="columns are for out= as a path"):
        translate_trace(smmu, ROWS, columns=["pa"])
    with pytest.raises(TypeError, match="out must be a path, an array or a dict, not 3"):
        translate_trace(smmu, ROWS, 3)
    with pytest.raises(TypeError, match=r"out\.dtype must be a structured one, not uint64"):
        translate_trace(smmu, ROWS, np.zeros(10, np.uint64))
    with pytest.raises(ValueError, match=r"out\['pa'\]\.shape must be \(10,\), not \(9,\)"):
        translate_trace(smmu, ROWS, {"pa": np.zeros(9, np.uint64)})
    with pytest.raises(TraceError, match="No such file"):
        translate_trace(smmu, ROWS, tmp_path / "nowhere" / "out.npy")
    (tmp_path / "here").mkdir()
    with pytest.raises(TraceError, match="here: Is a directory"):
        translate_trace(smmu, ROWS, tmp_path / "here")
    assert os.listdir(tmp_path) == ["here"]
    for path, problem in ((tmp_path / "none.npy", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(TraceError, match=problem):
            open_trace(path)
    (tmp_path / "raw.bin").write_bytes(bytes(17))
    with pytest.raises(TraceError, match="the file must be rows of 16 bytes, not 17 bytes"):
        open_trace(tmp_path / "raw.bin", NARROW)


def test_a_full_disk_is_one_line(configuration, tmp_path):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    np.save(tmp_path / "trace.npy", some_requests(configuration, 20000, NARROW))
    code = f"""
import signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from smmufast.cli import main
sys.exit(main(["trace", {str(captures.SHIPPED)!r}, {str(tmp_path / "trace.npy")!r},
               "--out", {str(tmp_path / "out.npy")!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=os.environ | {"PYTHONPATH": str(HOME)},
        capture_output=True,
        text=True,
        preexec_fn=limited,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"smmufast: error: {tmp_path / 'out.npy'}: File too large\n"
    assert os.listdir(tmp_path) == ["trace.npy"]


def test_flags_may_be_integers_of_0_and_1(configuration):
    rows = some_requests(configuration, 3000)
    expected = by_batch(configuration.smmu(), rows)
    for dtype in ("u1", "i8", ">u4"):
        columns = {name: rows[name] for name in rows.dtype.names}
        columns |= {name: rows[name].astype(dtype) for name in ("write", "priv", "instr")}
        found = translate_trace(configuration.smmu(), columns, chunk=1000)
        assert (found.actions, found.events) == counted(expected)


def test_a_masked_array_is_refused(configuration):
    masked = np.ma.masked_array(np.zeros(3, np.uint64), [0, 1, 0])
    with pytest.raises(TraceError, match="iova must be an array without a mask, not MaskedArray"):
        translate_trace(configuration.smmu(), {"sid": 1, "iova": masked})


def test_results_never_replace_the_trace(configuration, tmp_path):
    path = tmp_path / "trace.npy"
    np.save(path, some_requests(configuration, 2000, NARROW))
    (tmp_path / "link").symlink_to("trace.npy")
    os.link(path, tmp_path / "other.npy")
    data = path.read_bytes()
    smmu = configuration.smmu()
    mapped = open_trace(path)
    columns = {name: mapped[name] for name in mapped.dtype.names}
    for requests in (path, mapped, mapped[::2], columns):
        for out in (path, tmp_path / "link", tmp_path / "other.npy"):
            with pytest.raises(TraceError, match="would replace the trace itself"):
                translate_trace(smmu, requests, out)
    said = run("trace", captures.SHIPPED, path, "--out", path, status=2)
    assert said.endswith("trace.npy: the results would replace the trace itself\n")
    said = run("trace", captures.SHIPPED, path, "--out", captures.SHIPPED / "pages.npz", status=2)
    assert said.endswith("pages.npz is a part of the capture\n")
    assert path.read_bytes() == data


def test_leftovers_of_a_killed_run_stop_nobody(configuration, tmp_path):
    path, out = tmp_path / "trace.npy", tmp_path / "out.npy"
    np.save(path, some_requests(configuration, 20000, NARROW))
    code = f"""
import os, signal, sys
from smmufast import trace
from smmufast.capture import Capture
smmu = Capture.load({str(captures.SHIPPED)!r})[0].smmu()
def progress(done, work): os.kill(os.getpid(), signal.SIGKILL)
trace.translate_trace(smmu, {str(path)!r}, {str(out)!r}, chunk=100, progress=progress)
"""
    environment = os.environ | {"PYTHONPATH": str(HOME)}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment)
    assert done.returncode < 0
    left = {name for name in os.listdir(tmp_path) if name.endswith(".part")}
    assert len(left) == 1
    assert not out.exists()
    for leftover in (None, tmp_path / "out.npy.part"):
        if leftover is not None:
            leftover.touch()
        translate_trace(configuration.smmu(), path, out)
        assert len(np.load(out)) == 20000
    # one that is interrupted while it can still run leaves nothing
    out.unlink()

    def interrupt(done, work):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        translate_trace(configuration.smmu(), path, out, chunk=100, progress=interrupt)
    assert {name for name in os.listdir(tmp_path) if name.startswith(".")} == left


def test_what_is_no_regular_file_is_written_in_place(configuration, tmp_path):
    rows = some_requests(configuration, 100, NARROW)
    translate_trace(configuration.smmu(), rows, os.devnull)
    assert os.path.exists(os.devnull) and not os.path.isfile(os.devnull)
    with pytest.raises(TraceError, match="/dev/full: No space left on device"):
        translate_trace(configuration.smmu(), rows, "/dev/full")
    # a link stays one, and leads to the new file
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to("place/out.npy")
    translate_trace(configuration.smmu(), rows, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(np.load(tmp_path / "place" / "out.npy")) == 100
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "place" / "out.npy").stat().st_mode & 0o777 == 0o666 & ~umask


# --- the command ----------------------------------------------------------------------------------


def test_the_command_counts_and_writes(configuration, tmp_path):
    rows = some_requests(configuration, 2000)
    expected = by_batch(configuration.smmu(), rows)
    actions, events = counted(expected)
    np.save(tmp_path / "trace.npy", rows)
    out = tmp_path / "out.npy"
    text = run("trace", captures.SHIPPED, tmp_path / "trace.npy", "--out", out,
               "--columns", ",".join(COLUMNS))  # fmt: skip
    lines = text.splitlines()
    assert lines[0].split() == ["outcome", "requests"]
    assert lines[-1].startswith("2000 requests: ")
    assert lines[-1].endswith(" million/s")
    shown = {words[0]: int(words[1]) for words in map(str.split, lines[1:-2])}
    assert shown == actions | events
    assert (np.load(out) == expected).all()
    found = run_json("trace", captures.SHIPPED, tmp_path / "trace.npy")
    assert (found["actions"], found["events"], found["requests"]) == (actions, events, 2000)
    assert found["translations_per_second"] > 0
    assert found["trace"] == str(tmp_path / "trace.npy")
    np.save(tmp_path / "addresses.npy", rows["iova"])
    one = run_json("trace", captures.SHIPPED, tmp_path / "addresses.npy", "--sid", "0xf8")
    assert one["actions"] == translate_trace(configuration.smmu(), rows["iova"], sid=0xF8).actions
    json.dumps(found)


def test_the_command_models_caches(configuration, tmp_path):
    rows = some_requests(configuration, 2000, NARROW)
    np.save(tmp_path / "trace.npy", rows)
    arguments = ("trace", captures.SHIPPED, tmp_path / "trace.npy", "--caches", "server")
    caches = Caches.server()
    configuration.smmu(caches=caches).translate_batch(rows["sid"], rows["iova"], ssid=rows["ssid"])
    counters = caches.counters
    assert counters["tlb"]["hits"] > 0
    assert run_json(*arguments)["caches"] == counters
    lines = run(*arguments).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("cache "))
    assert lines[head].split()[1:] == list(counters["tlb"])
    for line, (name, counts) in zip(lines[head + 1 :], counters.items(), strict=False):
        assert line.split() == [name, *map(str, counts.values())]
    assert run_json(*arguments[:-2])["caches"] is None


def test_options_of_the_command_that_do_not_go(tmp_path):
    np.save(tmp_path / "trace.npy", ROWS)
    arguments = ("trace", captures.SHIPPED, tmp_path / "trace.npy")
    for more, problem in (
        (("--sid", "1"), "sid is in the trace and also an argument"),
        (("--sid", hex(1 << 32)), "--sid: 0x100000000 does not fit 32 bits"),
        (("--ssid", "0x100000"), "--ssid: 0x100000 does not fit 20 bits"),
        (("--threads", hex(1 << 32)), "--threads: 0x100000000 does not fit 16 bits"),
        (("--columns", "pa"), "--columns: of the results, which need --out"),
        (("--out", tmp_path / "o.npy", "--columns", "pa,pa"), "each once, not 'pa,pa'"),
        (("--out", tmp_path / "o.npy", "--columns", "px"), "each once, not 'px'"),
        (("--config", "none"), "has no configuration 'none'"),
    ):
        said = run(*arguments, *more, status=2)
        assert problem in said
        assert said.count("\n") == 1
    said = run("trace", tmp_path / "none", tmp_path / "trace.npy", status=2)
    assert "there is no such directory" in said
