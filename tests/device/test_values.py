"""Results, bursts and walks are values; arguments are what they say; caches hold what can be."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import tokenize
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import small
from project import ROOT

from smmufast import NO_SUBSTREAM, Caches, Memory, PasidAllocator, Smmu
from smmufast._engine.tlb import CdEntry, TlbEntry, WalkEntry
from smmufast.iommu import Pages, PageTable

SOURCES = ROOT / "smmufast"


def system(**keywords):
    return small.system(**keywords)[0]


def ask(smmu, request, **more):
    return smmu.translate(request.sid, request.iova, **request.access, **more)


def copies(value):
    yield copy.copy(value)
    yield copy.deepcopy(value)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.loads(pickle.dumps(value, protocol))


# --- values ---


@pytest.mark.parametrize("trace", [False, True])
def test_results_are_equal_when_they_say_the_same(trace):
    smmu, other = system(), system()
    results = [ask(smmu, request, trace=trace) for request in small.REQUESTS]
    for i, result in enumerate(results):
        assert result == ask(other, small.REQUESTS[i], trace=trace)
        assert hash(result) == hash(ask(other, small.REQUESTS[i], trace=trace))
        assert [k for k, one in enumerate(results) if one == result] == [i]
        for again in copies(result):
            assert again == result and repr(again) == repr(result)
            assert again.fetches == result.fetches and again.why == result.why
            assert again.explain() == result.explain()
    assert results[0] != "a result" and results[0] != 1
    assert ask(smmu, small.REQUESTS[0], trace=True) != ask(smmu, small.REQUESTS[0])


def test_a_pickled_result_that_cannot_be_is_refused():
    made, (request, outcome) = ask(system(), small.REQUESTS[0]).__reduce__()
    assert made(request, outcome)
    for wrong in ({"action": 6}, {"action": -1}, {"level": 5}, {"why": 9999}, {"page_lg2": 64}):
        with pytest.raises(ValueError):
            made(request, outcome | wrong)
    with pytest.raises(ValueError):
        made(request | {"ssid": 1 << 20}, outcome)
    with pytest.raises((TypeError, ValueError, KeyError)):
        made({}, {})
    made, (request, outcome, log) = ask(system(), small.REQUESTS[0], trace=True).__reduce__()
    assert made(request, outcome, log).fetches
    for wrong in (b"", log[:-1], b"\xff" * len(log), log[:4] + b"\xff" * 4 + log[8:]):
        with pytest.raises(ValueError):
            made(request, outcome, wrong)


def test_bursts_are_sequences_that_are_equal_copied_and_pickled():
    smmu = system()
    burst = smmu.translate_range(small.STAGE1, small.RUN, 0x4000)
    assert isinstance(burst, Sequence) and len(burst) > 1 and not burst
    rows = list(burst)
    assert burst[0] == rows[0] and burst[-1] == rows[-1] and burst[:2] == rows[:2]
    assert list(reversed(burst)) == rows[::-1] and rows[1] in burst and (0, 0, 0) not in burst
    assert burst.index(rows[1]) == 1 and burst.count(rows[1]) == 1
    with pytest.raises(IndexError):
        burst[len(rows)]
    assert burst == smmu.translate_range(small.STAGE1, small.RUN, 0x4000)
    assert burst != smmu.translate_range(small.STAGE1, small.RUN, 0x1000) and burst != rows
    for again in copies(burst):
        assert again == burst and again.result == burst.result and again.event == burst.event


def drive(walk):
    while (fetch := walk.request) is not None:
        walk.supply(drive.memory.read(fetch.address, fetch.size))
    return walk.result


def test_walks_are_copied_and_pickled():
    smmu = system()
    drive.memory = smmu.memory
    done = smmu.start_walk(small.STAGE1, small.RW)
    result = drive(done)
    for again in copies(done):
        assert again.done and again.result == result
    for n in range(3):
        walk = smmu.start_walk(small.STAGE1, small.RW)
        for _ in range(n):
            fetch = walk.request
            walk.supply(smmu.memory.read(fetch.address, fetch.size))
        for again in copies(walk):
            assert not again.done and drive(again) == result  # it begins again
        assert drive(walk) == result
    walk.close()
    closed = smmu.start_walk(small.STAGE1, small.RW)
    closed.close()
    for again in copies(closed):
        assert again.done and again.result is None


def test_a_copy_of_a_walk_holds_command_sync_as_well():
    memory = Memory()
    memory.add(bytearray(small.build()), small.BASE)
    smmu = Smmu(memory, **small.registers())
    walk = smmu.start_walk(small.STAGE1, small.RW, holds_sync=True)
    other = copy.copy(walk)
    smmu.command("TLBI_NSNH_ALL")
    with pytest.raises(RuntimeError, match="CMD_SYNC waits"):
        smmu.sync()
    walk.close()
    with pytest.raises(RuntimeError, match="CMD_SYNC waits"):
        smmu.sync()
    other.close()
    smmu.sync()


# --- arguments ---


class Bad:
    def __bool__(self):
        raise RuntimeError("bool")


FLAGS = {
    "write": lambda v: system().translate(1, 0, write=v),
    "priv": lambda v: system().pa(small.STAGE1, small.RW, priv=v),
    "instr": lambda v: system().translate_range(1, 0, 8, instr=v),
    "trace": lambda v: system().translate(1, 0, trace=v),
    "holds_sync": lambda v: system().start_walk(1, 0, holds_sync=v),
    "no_write": lambda v: system().ats_request(1, 0, no_write=v),
    "readonly": lambda v: Memory().add(bytearray(8), 0, readonly=v),
    "huge_pages": lambda v: Memory().add_private(0, 4096, huge_pages=v),
    "sparse": lambda v: Memory().add_private(0, 4096, sparse=v),
    "wired": lambda v: system(wired=v),
    "ignore_s2ptw": lambda v: system(ignore_s2ptw=v),
    "last": lambda v: system().page_request(1, 0, last=v),
    "leaf": lambda v: Caches().tlbi("TLBI_NH_ALL", leaf=v),
    "cyclic": lambda v: PasidAllocator(8, cyclic=v),
    "contiguous": lambda v: table(contiguous=v),
    "coherent": lambda v: table(coherent=v),
}


def table(**keywords):
    memory = Memory()
    memory.add_private(0, 1 << 20)
    return PageTable(Pages(memory, 0, 1 << 20), **keywords)


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_true_or_false_and_no_string(name):
    for good in (True, False, 1, 0, np.True_, np.False_):
        if name != "wired":
            FLAGS[name](good)
    for bad in ("no", "", 1.0, [], [1], b"\1", object()):
        with pytest.raises(TypeError, match=f"^{name} must be True or False, not "):
            FLAGS[name](bad)
    for bad in (2, -1, 1 << 70):
        with pytest.raises((ValueError, TypeError), match=f"^{name} must be True or False, not "):
            FLAGS[name](bad)
    with pytest.raises(TypeError, match=f"^{name} must be"):
        FLAGS[name](Bad())


def test_columns_of_flags_are_zero_or_one_of_any_integer_type():
    smmu = system()
    expected = smmu.translate_batch(small.STAGE1, [small.RO] * 2, write=[True, False])
    for dtype in ("u1", "i1", "u8", "i8", "i4", "?"):
        found = smmu.translate_batch(
            small.STAGE1, [small.RO] * 2, write=np.array([1, 0], dtype))  # fmt: skip
        assert (found == expected).all()
    for bad in ([2, 0], [-1, 0]):
        with pytest.raises(ValueError, match=r"^write"):
            smmu.translate_batch(small.STAGE1, [small.RO] * 2, write=np.array(bad))
    for bad in (["yes", "no"], [1.0, 0.0]):
        with pytest.raises(TypeError, match=r"^write"):
            smmu.translate_batch(small.STAGE1, [small.RO] * 2, write=np.array(bad))
    with pytest.raises(TypeError, match=r"^write must be True or False"):
        smmu.translate_batch(small.STAGE1, [small.RO] * 2, write="no")


def test_masked_arrays_are_refused_wherever_an_array_goes():
    smmu = system()
    masked = np.ma.array(np.zeros(2, np.uint64), mask=[0, 1])
    for name, more in (("iova", {}), ("sid", {}), ("ssid", {}), ("write", {})):
        given = {"sid": small.STAGE1, "iova": [small.RW] * 2} | {name: masked.astype(
            {"iova": "u8", "write": "?"}.get(name, "u4"))} | more  # fmt: skip
        with pytest.raises(TypeError, match=f"^{name} must be an array without a mask"):
            smmu.translate_batch(**given)
    with pytest.raises(TypeError, match="without a mask"):
        smmu.translate_batch(1, [0, 0], out={"pa": masked})
    row = np.ma.zeros(2, [("pa", "u8")])
    with pytest.raises(TypeError, match="without a mask"):
        smmu.translate_batch(1, [0, 0], out=row)


def test_lists_of_large_integers_are_columns():
    smmu = system()
    wanted = [small.RW, (1 << 64) - 0x1000, 1 << 63]
    found = smmu.translate_batch(small.STAGE1, wanted)
    assert (found == smmu.translate_batch(small.STAGE1, np.array(wanted, np.uint64))).all()
    found = smmu.translate_batch(small.STAGE1, [np.int64(small.RW), (1 << 64) - 0x1000])
    assert found["pa"][0] == 0x4000_1000
    with pytest.raises(ValueError, match=r"^iova must be 0 to 0xffffffffffffffff, not 0x1"):
        smmu.translate_batch(small.STAGE1, [1 << 64, 0])
    with pytest.raises(ValueError, match=r"^iova must be 0 to 0xffffffffffffffff, not -1"):
        smmu.translate_batch(small.STAGE1, [-1, 1 << 63])
    with pytest.raises(TypeError, match=r"^iova must be an integer, not float"):
        smmu.translate_batch(small.STAGE1, [0.5, 1 << 63])


def test_no_substream_is_none_as_a_scalar_too():
    smmu = system()
    assert ask(smmu, small.REQUESTS[0]) == smmu.translate(
        small.REQUESTS[0].sid, small.REQUESTS[0].iova, ssid=NO_SUBSTREAM)
    assert smmu.translate_batch(1, [small.RW], ssid=NO_SUBSTREAM)["pa"][0] == 0x4000_1000
    with pytest.raises(ValueError, match=r"^ssid must be 0 to 0xfffff, not 0x100000"):
        smmu.translate(1, 0, ssid=1 << 20)


def test_an_empty_allocator_is_true():
    assert PasidAllocator(8) and len(PasidAllocator(8)) == 0


# --- what can be in caches ---


@pytest.mark.parametrize(
    "wrong",
    [{"lg2": 20}, {"level": 2}, {"granule": 14}, {"granule": 13}, {"granule": 0}, {"table": 1},
     {"table": 0x800}, {"output": 8}, {"level": -1}, {"lg2": 30}],
)  # fmt: skip
def test_a_table_that_cannot_be_is_refused(wrong):
    caches = Caches(walk1=(4, 4))
    caches.fill_walk(WalkEntry(0, 0x1000))
    state = caches.__getstate__()
    with pytest.raises(ValueError, match="must be"):
        caches.fill_walk(WalkEntry(0, 0x1000)._replace(**wrong))
    assert caches.__getstate__() == state


def test_a_translation_that_cannot_be_is_refused():
    caches = Caches(tlb=(4, 4))
    for wrong in ({"lg2_s1": 5}, {"lg2_s2": 11}, {"level": 4}, {"level_s1": -2}, {"sh": 4}):
        with pytest.raises(ValueError):
            caches.fill(TlbEntry(0, 0)._replace(**wrong))
    assert len(caches) == 0


def test_states_of_caches_that_cannot_be_are_refused():
    caches = Caches(tlb=(1, 4), walk1=(1, 4))
    caches.fill(TlbEntry(0, 0x1000))
    caches.fill_walk(WalkEntry(0, 0x1000))
    state = caches.__getstate__()
    refused = 0
    for i in range(0, len(state)):
        damaged = bytearray(state)
        damaged[i] ^= 0x80
        other = Caches(tlb=(1, 4), walk1=(1, 4))
        try:
            other.__setstate__(bytes(damaged))
        except ValueError:
            refused += 1
            continue
        assert other.copy().__getstate__() == other.__getstate__()
    assert refused > 100


def test_entries_of_self_referencing_tables_leave_a_state_that_can_be_restored():
    memory = Memory()
    memory.add(bytearray(small.build()), small.BASE)
    page = b"".join((1 << 20 | 3).to_bytes(8, "little") for _ in range(512))
    memory.add(bytearray(page), 1 << 20)
    caches = Caches(walk1=(1, 8), tlb=(4, 4))
    smmu = Smmu(memory, **small.registers(), caches=caches)
    smmu.translate(1, small.RW)
    for level, lg2 in ((3, 21), (2, 30), (1, 39)):
        caches.fill_walk(WalkEntry(0, 1 << 20, lg2, asid=7, level=level))
        smmu.translate(1, small.RW)
        restored = Smmu.restore(smmu.save(), memory)
        assert list(restored.caches.walk1) == list(caches.walk1)


def test_cd_entries_are_shown():
    caches = Caches(cd=(1, 2))
    caches.fill_cd(3, 5, bytes(range(64)))
    assert list(caches.cd) == [CdEntry(3, 5, bytes(range(64)))]


# --- memory ---


def test_a_flag_of_memory_is_asked_once():
    class Once:
        asked = 0

        def __index__(self):
            Once.asked += 1
            return 0

    memory = Memory()
    memory.add(bytearray(8), 0, readonly=Once())
    memory.add_private(4096, 4096, huge_pages=Once())
    assert Once.asked == 2 and [region.readonly for region in memory.regions] == [False, False]


def test_no_callback_region_is_half_there_when_memory_runs_out():
    testcapi = pytest.importorskip("_testcapi")
    failures = 0
    for n in range(1, 40):
        memory, base = Memory(), 0x5000
        for i in range(60):  # the dict of callables is to grow
            memory.add_callback(0x10_0000 + 64 * i, 64, lambda a, k: bytes(k))

        def read(address, n):
            return bytes(n)

        kept = weakref.ref(read)
        testcapi.set_nomemory(n, n + 1)
        try:
            memory.add_callback(base, 4096, read)
            failed = False
        except MemoryError:
            failed = True
        finally:
            testcapi.remove_mem_hooks()
        del read
        gc.collect()
        assert len(memory.regions) == 60 + (not failed)
        if failed:
            failures += 1
            assert kept() is None
        else:
            assert memory.read(base, 8) == bytes(8)
    assert failures


def test_removing_a_region_lets_its_callables_go_last():
    memory = Memory()

    class Reader:
        def __call__(self, address, n):
            return bytes(n)

        def __del__(self):
            seen.append(list(memory.regions))
            memory.add(bytearray(8), 0x9000)

    seen = []
    memory.add_callback(0, 4096, Reader())
    memory.remove(0)
    assert seen == [[]] and [region.base for region in memory.regions] == [0x9000]


# --- the generated code ---


def bracketed_loops(path):
    """Lines where a comprehension or a generator expression stands inside a function."""
    depth, found, indent = 0, [], 0
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.OP and token.string in "([{":
            if depth == 0:
                indent = len(token.line) - len(token.line.lstrip())
            depth += 1
        elif token.type == tokenize.OP and token.string in ")]}":
            depth -= 1
        elif token.type == tokenize.NAME and token.string == "for" and depth and indent:
            found.append(token.start[0])
    return found


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.p[yx][xi]")), ids=lambda path: path.name)
def test_compiled_functions_have_no_comprehensions(path):
    """What Cython makes of one frees twice when something in it fails for want of memory."""
    assert bracketed_loops(path) == []


def test_a_flag_that_raises_crashes_nothing():
    code = (
        "from smmufast import Memory\n"
        "class B:\n"
        "    n = 0\n"
        "    def __bool__(self):\n"
        "        B.n += 1\n"
        "        if B.n == 2:\n"
        "            for i in range(1000): m.add(bytearray(8), 0x100000 + 8 * i)\n"
        "        return False\n"
        "m = Memory()\n"
        "for call in (lambda: m.add(bytearray(64), 0, readonly=B()),\n"
        "             lambda: m.add_private(0, 4096, huge_pages=B())):\n"
        "    try: call()\n"
        "    except TypeError: pass\n"
        "assert m.regions == []\n"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0
