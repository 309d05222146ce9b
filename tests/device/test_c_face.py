"""The C and Cython faces: a consumer of each kind is compiled against the package and run."""

import copy
import gc
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import atssystems
import nested
import numpy as np
import pytest
import small
from project import TESTS
from small import BASE, Request

import smmufast
from smmufast import NO_SUBSTREAM, Memory, Smmu, layout
from smmufast.faults import FETCH_KINDS

SOURCES = TESTS / "consumer"
DONE, PENDING, EINVAL, EPYTHON = 0, 1, -1, -2


def environment():
    """Variables for a process that must import the very package that is tested."""
    parent = str(Path(smmufast.__file__).parents[1])
    path = [parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    # -O0: most of the time is the compiler's
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "CFLAGS": "-O0"}


def load(name, directory):
    path = directory / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Where the consumers were built, as a user would build them."""
    directory = tmp_path_factory.mktemp("consumer") / "build"
    shutil.copytree(SOURCES, directory)
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=directory, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return directory


@pytest.fixture(scope="module")
def plain(built):
    return load("plain_consumer", built)


@pytest.fixture(scope="module")
def cython(built):
    return load("cython_consumer", built)


def access_of(request):
    return request.write | request.priv << 1 | request.instr << 2


def c_arguments(request):
    ssid = NO_SUBSTREAM if request.ssid is None else request.ssid
    return request.sid, ssid, request.iova, access_of(request)


def c_columns(requests, **outputs):
    """Columns in the order of smmufast_batch; outputs by name, the others are not wanted."""
    columns = small.columns(requests)
    access = np.array([access_of(r) for r in requests], np.uint8)
    inputs = (columns["sid"], columns["ssid"], columns["iova"], access)
    return (*inputs, *(outputs.get(name) for name in smmufast.COLUMNS))


def expected(requests=small.REQUESTS):
    smmu, _ = small.system()
    return [small.row(result) for result in small.translate_each(smmu, requests)]


# --- Cython ---


def test_a_cython_loop_gives_what_python_gives(cython):
    smmu, _ = small.system()
    sid, ssid, iova, access = c_columns(small.REQUESTS)[:4]
    pa, action, event = (np.zeros(len(sid), t) for t in (np.uint64, np.uint8, np.uint8))
    assert cython.translate_all(smmu, sid, ssid, iova, access, pa, action, event) == 0
    found = zip(pa.tolist(), action.tolist(), event.tolist(), strict=True)
    assert list(found) == [row[:3] for row in expected()]


@pytest.mark.parametrize(
    ("ssid", "access", "status"),
    [
        (NO_SUBSTREAM, 0, DONE),
        (0xFFFFF, 7, DONE),
        (0x100000, 0, EINVAL),
        (NO_SUBSTREAM - 1, 0, EINVAL),
        (0, 8, EINVAL),
    ],
)
def test_translate_c_refuses_what_is_out_of_range_and_does_nothing(cython, ssid, access, status):
    smmu, _ = small.system()
    assert cython.status_of(smmu, ssid, access) == (status, status == EINVAL)


def test_cython_users_have_the_types(cython):
    smmu, _ = small.system()
    assert cython.memory_of(smmu) is smmu.memory
    result, walk = smmu.translate(1, 0), smmu.start_walk(1, 0)
    assert cython.are_typed(result, walk) == (True, True)
    assert cython.are_typed(walk, result) == (False, False)
    with pytest.raises(TypeError):
        cython.memory_of(smmu.memory)


# --- plain C ---


def test_the_capsule_says_its_version(plain):
    abi, size, known = plain.version()
    assert abi == 3
    assert size == known


def test_c_translate_gives_what_python_gives(plain):
    smmu, _ = small.system()
    found = [plain.translate(smmu, *c_arguments(r)) for r in small.REQUESTS]
    assert found == [(DONE, row) for row in expected()]


def test_c_walks_from_a_copy_give_what_python_reads_in_place(plain):
    smmu, image = small.system()
    copy = bytes(image)
    image[:] = bytes(len(image))  # the walk never looks at the Smmu's own memory
    straight, _ = small.system()
    for request, row in zip(small.REQUESTS, expected(), strict=True):
        status, result, fetches = plain.walk(smmu, BASE, copy, *c_arguments(request))
        assert (status, result) == (DONE, row)
        trace = straight.translate(request.sid, request.iova, **request.access, trace=True).fetches
        kinds = FETCH_KINDS
        assert [
            (kinds[kind], None if level == 4 else level, address, size, bool(aborted))
            for kind, level, address, size, aborted in fetches
        ] == [(f.kind, f.level, f.address, f.size, f.data is None) for f in trace]


def test_c_batch_gives_what_python_gives(plain):
    smmu, _ = small.system()
    outputs = {
        name: np.full(len(small.REQUESTS), 0x55, smmufast.COLUMNS[name])
        if name != "record" else np.frombuffer(bytearray(b"U" * 32 * len(small.REQUESTS)), "V32")
        for name in small.ALL
    }  # fmt: skip
    assert plain.batch(smmu, c_columns(small.REQUESTS, **outputs)) == DONE
    found = [
        (*map(int, line[:-1]), bytes(line[-1]))
        for line in zip(*(outputs[name].tolist() for name in small.ALL), strict=True)
    ]
    assert found == expected()


# --- walks, step by step ---


class CWalk:
    """A walk whose struct is a bytearray."""

    def __init__(self, plain, smmu, sid=1, iova=small.RW, access=0, holds=False):
        self.plain, self.smmu = plain, smmu
        self.struct = bytearray(b"\xee" * plain.sizes()[0])
        self.status = plain.step("start", smmu, self.struct, sid, iova, access, int(holds))

    @property
    def fetch(self):
        """What it asks for: kind, level, address, size, expected, desired."""
        kind, *rest = self.plain.fetch_of(self.struct)
        return FETCH_KINDS[kind], *rest

    def supply(self, data=None):
        """Answer, by default from memory."""
        _, _, address, size, *_ = self.fetch
        data = self.smmu.memory.read(address, size) if data is None else data
        self.status = self.plain.step("supply", self.smmu, self.struct, data)
        return self.status

    def until(self, *fetch):
        """Answer until it asks for this."""
        while self.status == PENDING and self.fetch[: len(fetch)] != fetch:
            self.supply()
        return self

    def look(self):
        """Look at it again."""
        self.status = self.plain.step("look", self.smmu, self.struct)
        return self.status

    def drop(self):
        """End it."""
        return self.plain.step("drop", self.smmu, self.struct)


def commands(smmu, *names):
    for name in names:
        smmu.command(name)


@pytest.mark.parametrize("caches", [None, "small"])
@pytest.mark.parametrize("late", [False, True])
def test_a_c_walk_that_a_sync_overtakes_starts_again(plain, caches, late):
    smmu, image = small.system(caches=caches and small_caches())
    walk = CWalk(plain, smmu).until("TT", 3)
    image[small.LEVEL3 + 8 : small.LEVEL3 + 16] = (0x5000_0000 | 0x443).to_bytes(8, "little")
    commands(smmu, "TLBI_NSNH_ALL", "CFGI_STE_RANGE")
    assert walk.look() == PENDING and walk.fetch[0] == "TT"
    smmu.command("CFGI_STE_RANGE", Range=31)
    smmu.sync()
    if late:
        assert walk.supply(bytes(8)) == PENDING  # dropped
    else:
        assert walk.fetch[0] == "TT"
        assert walk.look() == PENDING
    assert walk.fetch[0] == "STE"
    walk.until("never")
    assert (walk.status, walk.look()) == (DONE, DONE)
    assert plain.result_of(walk.struct)[0] == 0x5000_0000


def test_a_c_walk_holds_cmd_sync_until_it_ends_or_is_dropped(plain):
    for end in ("answer", "drop"):
        smmu, _ = small.system(cr0=0b1101, cmdq_base=0x1_0002)
        smmu.memory.add_private(0, 1 << 20)
        walk = CWalk(plain, smmu, holds=True).until("TT", 3)
        commands(smmu, "TLBI_NSNH_ALL", "SYNC")
        assert smmu.read("CMDQ_CONS") == 1
        if end == "answer":
            assert walk.supply() == DONE
            assert plain.result_of(walk.struct)[0] == 0x4000_1000
        else:
            assert walk.drop() == DONE
            assert (walk.supply(bytes(8)), walk.look(), walk.drop()) == (EINVAL,) * 3
        assert smmu.read("CMDQ_CONS") == 2


def test_a_c_walk_that_is_forgotten_holds_nothing(plain):
    smmu, _ = small.system(cr0=0b1101, cmdq_base=0x1_0002)
    smmu.memory.add_private(0, 1 << 20)
    CWalk(plain, smmu).until("TT", 3)
    commands(smmu, "TLBI_NSNH_ALL", "SYNC")
    assert smmu.read("CMDQ_CONS") == 2


def test_a_c_walk_finds_the_smmu_disabled(plain):
    smmu, _ = small.system()
    walk = CWalk(plain, smmu).until("TT", 3)
    smmu.write("CR0", 0b100)
    assert walk.look() == DONE
    assert plain.result_of(walk.struct)[:2] == (small.RW, 2)


def test_a_c_walk_that_is_copied_is_two(plain):
    smmu, _ = small.system(caches=small_caches())
    first = CWalk(plain, smmu).until("TT", 2)
    second = copy.copy(first)
    second.struct = bytearray(first.struct)
    first.struct[:8] = bytes(8)  # its size: nobody's any more
    assert first.supply(bytes(8)) == EINVAL
    assert second.until("never").status == DONE
    assert plain.result_of(second.struct)[0] == 0x4000_1000


def test_a_c_walk_names_the_update_that_it_asks_for(plain):
    bench = nested.small_nested({"httu": 2}, cd={"ha": 1}, stage1={"af": 0}, s2ha=1, s2hd=1)
    walk = CWalk(plain, bench, nested.NESTED, nested.RW)
    host = bench.start_walk(nested.NESTED, nested.RW)
    while (fetch := host.request) is not None:
        level = 4 if fetch.level is None else fetch.level
        assert walk.fetch == (fetch.kind, level, fetch.address, fetch.size,
                              *(fetch.swap or (0, 0)))  # fmt: skip
        data = fetch.swap[0].to_bytes(8, "little") if fetch.swap else None
        walk.supply(data)
        host.supply(data or bench.memory.read(fetch.address, fetch.size))
    assert walk.status == DONE
    assert plain.result_of(walk.struct)[0] == host.result.pa
    assert walk.fetch[0] is None or walk.fetch[0] == FETCH_KINDS[0]


def test_a_walk_whose_struct_was_written_to_is_refused(plain):
    smmu, _ = small.system(caches=small_caches())
    walk = CWalk(plain, smmu).until("TT", 2)
    size, state = plain.sizes()
    assert size - state == 128 * 8
    result = 32  # the result is the host's
    before = smmu.caches.__getstate__()
    changed = accepted = 0
    for at in range(size):
        if result <= at < result + 72:
            continue
        other = copy.copy(walk)
        other.struct = bytearray(walk.struct)
        other.struct[at] ^= 0x81
        if plain.step("supply", smmu, other.struct, bytes(8)) == EINVAL:
            changed += 1
            assert plain.step("look", smmu, other.struct) == EINVAL
            assert plain.step("drop", smmu, other.struct) == EINVAL
        else:
            accepted += 1
            assert at < 4 or at >= state + 800  # a larger size; words that are spare
    assert changed > 800
    assert accepted < 240
    assert walk.until("never").status == DONE
    assert smmu.caches.__getstate__() != before


@pytest.mark.parametrize("name", small.ALL)
def test_a_c_batch_fills_only_the_columns_that_are_wanted(plain, name):
    smmu, _ = small.system()
    out = np.zeros(len(small.REQUESTS), smmufast.COLUMNS[name])
    assert plain.batch(smmu, c_columns(small.REQUESTS, **{name: out})) == DONE
    column = small.ALL.index(name)
    found = [bytes(v) if name == "record" else int(v) for v in out.tolist()]
    assert found == [row[column] for row in expected()]


def test_a_c_batch_gives_reasons(plain):
    smmu, _ = small.system()
    out = np.full(len(small.REQUESTS), 0x5555, np.uint16)
    assert plain.batch(smmu, c_columns(small.REQUESTS, why=out)) == DONE
    reasons = [result.why for result in small.translate_each(smmu)]
    assert out.tolist() == [0 if why is None else int(why) for why in reasons]


def test_a_c_batch_repeats_single_inputs(plain):
    smmu, _ = small.system()
    iova = np.arange(small.RW, small.RW + 0x100, dtype=np.uint64)
    pa = np.zeros(0x100, np.uint64)
    one = (np.uint32(1), np.uint32(NO_SUBSTREAM), iova, np.uint8(0))
    assert plain.batch(smmu, (*one, pa, *[None] * 12)) == DONE
    assert pa.tolist() == list(range(0x4000_1000, 0x4000_1100))


@pytest.mark.parametrize("over", ["buffer", "callback"])
def test_c_threads_translate_at_once(plain, over):
    image = bytes(small.build())
    memory = Memory()
    if over == "buffer":
        memory.add(image, BASE)
    else:
        memory.add_callback(BASE, len(image), plain.host(BASE, image))
    smmu = Smmu(memory, **small.registers())
    requests = small.REQUESTS * 10
    translations, differences = plain.race(smmu, BASE, image, c_columns(requests), 2, 20)
    assert (translations, differences) == (2 * 20 * len(requests), 0)


# A stream left out has the ASID of another one, and other tables.
LAWFUL = [request for request in small.REQUESTS if request.sid != small.NO_TABLE]


def small_caches():
    return smmufast.Caches(ste=(1, 4), cd=(1, 4), tlb=(2, 2), walk1=(1, 2), walk2=(1, 2))


def test_c_through_caches_gives_and_leaves_what_python_does(plain):
    ours, _ = small.system(caches=small_caches())
    single, image = small.system(caches=small_caches())
    batched, _ = small.system(caches=small_caches())
    walked, _ = small.system(caches=small_caches())
    _, *columns, _ = small.ALL
    out = {name: np.zeros(len(LAWFUL), smmufast.COLUMNS[name]) for name in ("pa", *columns)}
    for _ in range(3):
        rows = [small.row(result) for result in small.translate_each(ours, LAWFUL)]
        assert rows == expected(LAWFUL)
        assert [plain.translate(single, *c_arguments(r)) for r in LAWFUL] == [
            (DONE, row) for row in rows
        ]
        assert plain.batch(batched, c_columns(LAWFUL, **out)) == DONE
        assert list(zip(*(a.tolist() for a in out.values()), strict=True)) == [
            row[:-1] for row in rows
        ]
        for request, row in zip(LAWFUL, rows, strict=True):
            found = plain.walk(walked, BASE, bytes(image), *c_arguments(request))
            assert found[:2] == (DONE, row)
        for other in (single, batched, walked):
            assert other.caches.__getstate__() == ours.caches.__getstate__()
    assert ours.caches.tlb.hits > 0


def test_c_threads_share_the_caches(plain):
    smmu, image = small.system(caches=small_caches())
    requests = LAWFUL * 5
    race = plain.race(smmu, BASE, bytes(image), c_columns(requests), 3, 10)
    assert race == (3 * 10 * len(requests), 0)
    assert smmu.caches.tlb.hits > 0
    assert smmu.stale() == []


def test_arguments_out_of_range_are_einval_and_nothing_is_done(plain):
    smmu, _ = small.system()
    smmu.memory.inject_error(kind="STE")
    found = plain.misuse(smmu)
    assert found == {
        "translate ssid": EINVAL, "walk_start ssid": EINVAL,
        "translate access": EINVAL, "walk_start access": EINVAL, "result untouched": 1,
        "walk_supply not started": EINVAL, "walk_look not started": EINVAL,
        "walk_drop not started": EINVAL, "walk_start size": EINVAL, "walk_start flags": EINVAL,
        "walk_start": PENDING, "walk_supply abort": DONE, "walk_supply done": EINVAL,
        "walk_look done": DONE, "walk_drop done": EINVAL, "walk still done": 1,
        "batch sid": EINVAL, "batch ssid": EINVAL, "batch iova": EINVAL, "batch access": EINVAL,
        "batch ssid value": EINVAL, "batch access value": EINVAL, "batch size": EINVAL,
        "batch newer column": EINVAL, "batch of ABI 2": EINVAL, "batch untouched": 1,
        "batch empty": DONE, "batch untouched when empty": 1, "batch newer": DONE,
        "batch written": 1, "batch older": DONE, "batch of the size": 1,
    }  # fmt: skip


@pytest.mark.parametrize("thing", [None, 5, Memory(), Smmu])
def test_acquiring_what_is_no_smmu_is_a_type_error(plain, thing):
    with pytest.raises(TypeError, match=f"object must be an Smmu, not {type(thing).__name__}"):
        plain.hold(thing)


def test_a_held_smmu_lives_and_its_memory_does_not_change(plain):
    smmu, image = small.system()
    memory = smmu.memory
    handle = plain.hold(smmu)
    second = plain.hold(smmu)
    del smmu
    gc.collect()
    assert plain.translate_held(handle, 1, small.RW)[1][0] == 0x4000_1000
    image[small.LEVEL3 + 8] = 0  # the bytes may change
    assert plain.translate_held(handle, 1, small.RW)[1][2] == 0x10
    del handle
    with pytest.raises(BufferError, match="in use"):
        memory.remove(BASE)
    del second
    memory.remove(BASE)


def test_a_smmu_that_is_held_and_let_go_is_freed(plain):
    memory = Memory()
    image = bytearray(small.build())
    memory.add(image, BASE)
    plain.hold(Smmu(memory, **small.registers()))
    del memory
    gc.collect()
    image.append(0)  # nobody holds the buffer any more
    assert len(image) == small.SIZE + 1


# --- memory that C answers for ---


def test_memory_behind_c_callbacks_gives_what_a_buffer_gives(plain):
    image = small.build()
    host = plain.host(BASE, image)
    memory = Memory()
    memory.add_callback(BASE, small.SIZE, host)
    smmu = Smmu(memory, **small.registers())
    assert small.batch_rows(smmu) == expected()
    before = plain.reads(host)
    result = smmu.translate(1, small.RW, trace=True)
    assert plain.reads(host) - before == len(result.fetches) == 5
    memory.write(BASE + small.LEVEL3 + 8, bytes(8))
    assert memory.read_u64(BASE + small.LEVEL3 + 8) == 0
    assert smmu.translate(1, small.RW).event.name == "F_TRANSLATION"


def test_the_host_behind_c_callbacks_lives_as_long_as_its_region(plain):
    memory = Memory()
    memory.add_callback(BASE, small.SIZE, plain.host(BASE, small.build()))
    gc.collect()
    smmu = Smmu(memory, **small.registers())
    assert smmu.pa(1, small.RW) == 0x4000_1000


def test_a_region_beyond_what_c_answers_for_is_an_abort(plain):
    memory = Memory()
    memory.add_callback(BASE, 1 << 40, plain.host(BASE, small.build()))
    smmu = Smmu(memory, **small.registers())
    event = smmu.translate(small.BEYOND_MEMORY, 0).event
    assert (event.name, event.fetch_address) == ("F_STE_FETCH", BASE + 64 * small.BEYOND_MEMORY)


# --- Python memory under the C face ---


def test_a_python_callback_answers_c_threads(plain):
    image = bytes(small.build())
    memory = Memory()
    memory.add_callback(BASE, small.SIZE, lambda a, n: image[a - BASE : a - BASE + n])
    smmu = Smmu(memory, **small.registers())
    requests = small.REQUESTS
    translations, differences = plain.race(smmu, BASE, image, c_columns(requests), 2, 3)
    assert (translations, differences) == (2 * 3 * len(requests), 0)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_an_exception_of_a_python_callback_is_epython_and_is_reported(plain, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda info: seen.append(info.exc_value))

    def read(address, n):
        raise ZeroDivisionError("the board is gone")

    memory = Memory()
    memory.add_callback(BASE, small.SIZE, read)
    smmu = Smmu(memory, **small.registers())
    status, _ = plain.translate(smmu, *c_arguments(Request(1, small.RW)))
    assert status == EPYTHON
    pa = np.zeros(2, np.uint64)
    columns = c_columns([Request(1, small.RW)] * 2, pa=pa)
    assert plain.batch(smmu, columns) == EPYTHON
    assert [str(error) for error in seen] == ["the board is gone"] * 2
    memory.remove(BASE)


# --- registers ---

CR0, GERROR, CMDQ_BASE, CMDQ_PROD, CMDQ_CONS = 0x20, 0x60, 0x90, 0x98, 0x9C


def test_c_registers_are_those_of_python(plain):
    smmu, _ = small.system(cr0=0)
    smmu.memory.add_private(0, 1 << 20)
    assert plain.mmio(smmu, CMDQ_BASE, 8, 0x1_0003) == DONE
    assert plain.mmio(smmu, CMDQ_BASE + 4, 4) == (DONE, 0)
    smmu.memory.write(0x1_0000, bytes([0x46]) + bytes(15) + bytes([0xFF]) + bytes(15))
    assert plain.mmio(smmu, CR0, 4, 0b1001) == DONE
    assert plain.mmio(smmu, CMDQ_PROD, 4, 2) == DONE
    # the first command is consumed, the second illegal, and the error is there at once
    assert plain.mmio(smmu, CMDQ_CONS, 4) == (DONE, 1 << 24 | 1)
    assert plain.mmio(smmu, GERROR, 4) == (DONE, 1)
    for offset in (0, 0x0C, 0x14, 0x80, 0x94, 0x100A8, 0x1FFFC):
        for size in (1, 2, 4, 8):
            assert plain.mmio(smmu, offset, size) == (DONE, smmu.read(offset, size))
    assert plain.translate(smmu, *c_arguments(Request(small.STAGE1, small.RW)))[0] == DONE


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [(0x20000, 4, 0), (1 << 40, 4, 0), (CR0, 3, 0), (CR0, 0, 0), (CR0, 4, 1 << 32), (CR0, 1, 256)],
)  # fmt: skip
def test_an_access_that_no_bus_carries_is_einval(plain, offset, size, value):
    smmu, _ = small.system()
    assert plain.mmio(smmu, offset, size, value) == EINVAL
    if not value:
        assert plain.mmio(smmu, offset, size) == (EINVAL, 0x5A)
    assert smmu.cr0 == 0b101


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_what_an_interrupt_raises_is_epython_in_c(plain, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda info: seen.append(info.exc_value))

    def on_interrupt(name):
        raise ZeroDivisionError(name)

    smmu, _ = small.system(cr0=0b1001, cmdq_base=0x1_0000, on_interrupt=on_interrupt)
    smmu.write("IRQ_CTRL", 1)
    # the queue lies outside of memory: CERROR_ABT
    assert plain.mmio(smmu, CMDQ_PROD, 4, 1) == EPYTHON
    assert [str(error) for error in seen] == ["gerror"]
    assert smmu.read("CMDQ_CONS") == 2 << 24


# --- the header ---


def test_the_include_directory_holds_the_header_and_the_declarations():
    directory = Path(smmufast.get_include())
    for name in (
        "smmufast.h", "__init__.pxd", "_device/smmu.pxd", "_engine/memory.pxd", "_facts/types.pxd",
    ):  # fmt: skip
        assert (directory / name).is_file()


@pytest.mark.parametrize("language", ["c", "c++"])
def test_the_header_stands_alone(language, tmp_path):
    compiler = sysconfig.get_config_var("CXX" if language == "c++" else "CC").split()
    if language == "c++" and shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler {compiler[0]}; smmufast needs a C compiler only")
    source = tmp_path / ("user.cpp" if language == "c++" else "user.c")
    source.write_text(
        '#include "smmufast.h"\n#include "smmufast.h"\n'
        "int main(void)\n"
        "{ return sizeof(smmufast_request) != 24 || sizeof(smmufast_result) != 72; }\n"
    )
    program = tmp_path / "user"
    command = [*compiler, "-x", language, "-Wall", "-Wextra", "-Wpedantic", "-Werror",
               f"-I{smmufast.get_include()}", str(source), "-o", str(program)]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert subprocess.run([program]).returncode == 0


# --- looking, and ATS ---


def test_c_looks_and_leaves_everything_as_it_was(plain):
    smmu, _ = small.system()
    requests = small.REQUESTS
    for request in requests:
        before = smmu.save()
        found = plain.translate(smmu, *c_arguments(request), "peek")
        assert smmu.save() == before
        assert found[0] == DONE
        looked = smmu.translate(request.sid, request.iova, **request.access, peek=True)
        assert found[1] == small.row(looked)
    outputs = {name: np.zeros(len(requests), smmufast.COLUMNS[name]) for name in ("pa", "action")}
    before = smmu.save()
    assert plain.batch(smmu, c_columns(requests, **outputs), 1) == DONE
    assert smmu.save() == before
    straight, _ = small.system()
    assert plain.batch(straight, c_columns(requests, **(
        wanted := {name: np.zeros_like(column) for name, column in outputs.items()}))) == DONE
    assert (outputs["pa"] == wanted["pa"]).all() and (outputs["action"] == wanted["action"]).all()
    assert plain.translate(smmu, 0, 1 << 20, 0, 0, "peek")[0] == EINVAL
    assert plain.translate(smmu, 0, 0, 0, 8, "peek")[0] == EINVAL


@pytest.mark.parametrize("make", ["small_system", "nested_system"])
@pytest.mark.parametrize("eats", [0, 1, 2])
def test_c_asks_for_translations_and_takes_translated_ones(plain, make, eats):
    none = NO_SUBSTREAM
    for ssid in (None, 1):
        for no_write, execute, priv, stu in ((0, 0, 0, 12), (1, 1, 1, 21), (0, 1, 0, 12)):
            for iova in (0, 0x1000, 0x5123, 0x7000, 1 << 40, (1 << 64) - 1):
                systems = [getattr(atssystems, make)(eats) for _ in range(2)]
                c, python = (s[0] if isinstance(s, tuple) else s for s in systems)
                found = plain.ats(c, 0, none if ssid is None else ssid, iova, 2 * priv,
                                  no_write, execute, stu, 0)  # fmt: skip
                said = python.ats_request(0, iova, ssid=ssid, no_write=bool(no_write),
                                          execute=bool(execute), priv=bool(priv), stu=1 << stu)
                status, ended, granted, split, address, size, event = found
                assert status == DONE
                assert ("success", "UR", "CA")[ended] == said.status
                assert granted == said.read | said.write << 1 | said.execute << 2
                assert event == (0 if said.event is None else said.event.number)
                if granted:
                    assert (address, size, bool(split)) == (said.address, said.size, said.ipa)
                elif said.status == "success":
                    assert size == said.size == 1 << stu
                passed = plain.translate(c, 0, none, address, 0, "ats_translated")
                result = python.ats_translated(0, address)
                assert passed == (DONE, small.row(result))
                assert c.save() == python.save()
    for size, stu, ssid in ((8, 12, none), (0, 11, none), (0, 44, none), (0, 12, 1 << 20)):
        assert plain.ats(c, 0, ssid, 0, 0, 0, 0, stu, size)[0] == EINVAL


def test_c_polls_the_generation_and_holds_cmd_sync_by_a_transaction(plain):
    smmu, _ = small.system()
    smmu.memory.add_private(small.QUEUES, 0x1_0000)
    smmu.write("CR0", 0)
    smmu.write("CMDQ_BASE", small.QUEUES | 4)
    smmu.write("CR0", 0b1101)
    before = plain.told(smmu, "generation")
    assert before == smmu.generation

    def put(*names):
        for name in names:
            prod = smmu.read("CMDQ_PROD")
            command = layout.pack(name).to_bytes(16, "little")
            smmu.memory.write(small.QUEUES + 16 * prod, command)
            smmu.write("CMDQ_PROD", prod + 1)

    opened = plain.told(smmu, "open")
    put("TLBI_NH_ALL", "SYNC")
    assert plain.told(smmu, "generation") == smmu.generation > before
    assert smmu.read("CMDQ_CONS") == 1
    late = plain.told(smmu, "open")
    assert plain.told(smmu, "close", opened) == DONE
    assert smmu.read("CMDQ_CONS") == 2
    assert plain.told(smmu, "close", late) == DONE
    smmu.on_interrupt = None
    opened = plain.told(smmu, "open")
    put("TLBI_NH_ALL", "SYNC")
    assert plain.told(smmu, "close", opened) == DONE
    assert smmu.read("CMDQ_CONS") == 4
