"""Memory: what its docstrings promise, by itself and under a Smmu."""

import array
import ctypes
import gc
import itertools
import mmap
import os
import pickle
import signal
import sys
import threading
import weakref

import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from small import BASE, SIZE, Request

from smmufast import ExternalAbort, Memory, MemoryRegion, Smmu

LAST = (1 << 64) - 1


# --- zero copy over whatever has a buffer ---


def anonymous_map(size):
    return mmap.mmap(-1, size)


WRITABLE_BUFFERS = {
    "bytearray": bytearray,
    "mmap": anonymous_map,
    "numpy": lambda n: np.zeros(n, np.uint8),
    "numpy 2-D of dwords": lambda n: np.zeros((2, n // 16), np.uint64),
    "array": lambda n: array.array("B", bytes(n)),
    "array of dwords": lambda n: array.array("Q", bytes(n)),
    "memoryview": lambda n: memoryview(bytearray(n)),
    "slice at an odd address": lambda n: memoryview(bytearray(n + 16))[3 : 3 + n],
    "ctypes": lambda n: (ctypes.c_char * n)(),
}


@pytest.mark.parametrize("make", WRITABLE_BUFFERS.values(), ids=WRITABLE_BUFFERS)
def test_writes_to_a_buffer_are_seen_both_ways(make):
    buffer = make(0x1000)
    view = memoryview(buffer).cast("B")
    memory = Memory()
    memory.add(buffer, 0x4000)
    view[0x123:0x128] = b"host!"
    assert memory.read(0x4123, 5) == b"host!"
    memory.write(0x4FF0, b"smmu")
    assert view[0xFF0:0xFF4] == b"smmu"
    assert memory.regions == [MemoryRegion(0x4000, 0x1000, "buffer", False)]


@pytest.mark.parametrize("make", WRITABLE_BUFFERS.values(), ids=WRITABLE_BUFFERS)
def test_every_kind_of_buffer_can_hold_the_tables(make):
    buffer = make(SIZE)
    memoryview(buffer).cast("B")[:] = small.build()
    memory = Memory()
    memory.add(buffer, BASE)
    smmu = Smmu(memory, **small.registers())
    expected, _ = small.system()
    assert small.batch_rows(smmu) == small.batch_rows(expected)
    for request, pa in small.PHYSICAL.items():
        assert smmu.pa(request.sid, request.iova, **request.access) == pa


def test_the_smmu_sees_tables_change_between_calls():
    smmu, image = small.system()
    assert smmu.pa(1, small.RW) == 0x4000_1000
    entry = small.LEVEL3 + 8
    image[entry : entry + 8] = (0x4777_7000 | 0x443).to_bytes(8, "little")
    assert smmu.pa(1, small.RW) == 0x4777_7000
    smmu.memory.write_u64(BASE + entry, 0x4888_8000 | 0x443)
    assert smmu.pa(1, small.RW) == 0x4888_8000
    assert smmu.translate_batch(1, [small.RW])["pa"][0] == 0x4888_8000


READ_ONLY_BUFFERS = {
    "bytes": bytes,
    "memoryview": lambda data: memoryview(data).toreadonly(),
    "numpy": lambda data: np.frombuffer(bytes(data), np.uint8),
}


@pytest.mark.parametrize("make", READ_ONLY_BUFFERS.values(), ids=READ_ONLY_BUFFERS)
def test_a_read_only_buffer_is_a_read_only_region(make):
    image = small.build()
    memory = Memory()
    memory.add(make(image), BASE)
    assert memory.regions[0].readonly
    with pytest.raises(PermissionError, match="0x80000010"):
        memory.write(BASE + 0x10, b"x")
    assert memory.read(BASE, SIZE) == image
    smmu = Smmu(memory, **small.registers())
    assert smmu.pa(1, small.RW) == 0x4000_1000


def test_a_writable_buffer_can_be_added_read_only():
    buffer = bytearray(64)
    memory = Memory()
    memory.add(buffer, 0, readonly=True)
    with pytest.raises(PermissionError):
        memory.write(0, b"x")
    buffer[0] = 5
    assert memory.read(0, 1) == b"\5"
    assert memory.regions == [MemoryRegion(0, 64, "buffer", True)]


@pytest.mark.parametrize(
    "buffer",
    [
        memoryview(bytearray(64))[::2],
        np.zeros(64, np.uint8)[::2],
        np.zeros((4, 4), np.uint64, order="F"),
    ],
    ids=["memoryview", "numpy", "Fortran order"],
)
@pytest.mark.parametrize("readonly", [None, True])
def test_a_buffer_with_gaps_is_refused(buffer, readonly):
    with pytest.raises(BufferError, match=r"buffer must be C-contiguous.* bytes, not this one: "):
        Memory().add(buffer, 0, readonly=readonly)


@pytest.mark.parametrize("thing", [5, "text", None, [1, 2]])
def test_a_thing_without_a_buffer_is_refused(thing):
    with pytest.raises(TypeError, match=f"buffer must be an object .*, not {type(thing).__name__}"):
        Memory().add(thing, 0)


def test_bytes_cannot_be_added_writable():
    with pytest.raises(BufferError, match=r"buffer must be C-contiguous, writable bytes, not "):
        Memory().add(bytes(64), 0, readonly=False)


# --- how long the host's buffer is held ---


def can_be_resized(buffer):
    try:
        buffer.append(0)
    except BufferError:
        return False
    buffer.pop()
    return True


def test_a_buffer_is_held_until_its_region_is_removed():
    buffer = bytearray(64)
    memory = Memory()
    memory.add(buffer, 0)
    assert not can_be_resized(buffer)
    memory.remove(0)
    assert can_be_resized(buffer)
    assert memory.regions == []
    with pytest.raises(ExternalAbort):
        memory.read(0, 1)


def test_a_buffer_is_given_back_when_the_memory_dies():
    buffer = bytearray(64)
    memory = Memory()
    memory.add(buffer, 0)
    del memory
    assert can_be_resized(buffer)


def test_a_refused_buffer_is_not_held():
    buffer = bytearray(64)
    memory = Memory()
    memory.add_private(0, 0x1000)
    with pytest.raises(ValueError, match="overlaps"):
        memory.add(buffer, 0xFF8)
    assert can_be_resized(buffer)
    assert memory.regions == [MemoryRegion(0, 0x1000, "private", False)]


def test_a_map_can_be_closed_after_removal():
    buffer = anonymous_map(0x1000)
    memory = Memory()
    memory.add(buffer, 0)
    with pytest.raises(BufferError):
        buffer.close()
    memory.remove(0)
    buffer.close()
    assert buffer.closed


def test_a_buffer_can_lie_at_two_places_and_in_two_memories():
    buffer = bytearray(64)
    one, two = Memory(), Memory()
    one.add(buffer, 0)
    one.add(buffer, 0x1000, readonly=True)
    two.add(buffer, 0x80)
    one.write(8, b"same")
    assert one.read(0x1008, 4) == two.read(0x88, 4) == b"same"


# --- arguments ---


def filled():
    memory = Memory()
    memory.add(bytearray(0x100), 0x1000)
    memory.add(bytearray(0x100), 0x1200)
    return memory


ADDERS = {
    "add": lambda memory, base, size: memory.add(bytearray(size), base),
    "add_private": lambda memory, base, size: memory.add_private(base, size),
    "add_callback": lambda memory, base, size: memory.add_callback(base, size, lambda a, n: None),
}


@pytest.mark.parametrize("add", ADDERS.values(), ids=ADDERS)
@pytest.mark.parametrize(
    ("base", "size", "words"),
    [
        (0x1000, 0x100, "base: .*0x1000, 0x10ff.* overlaps .*0x1000, 0x10ff"),
        (0x10F8, 0x10, "base: .*overlaps .*0x1000, 0x10ff"),
        (0xFF8, 9, "base: .*overlaps"),
        (0x1100, 0x101, "base: .*overlaps .*0x1200, 0x12ff"),
        (0x800, 0x2000, "base: .*overlaps"),
        (0x1208, 8, "base: .*overlaps"),
        (0x2000, 0, "(size|buffer) must be 1 byte or more, not 0"),
        (0x1000, 0, "(size|buffer) must be 1 byte or more, not 0"),
        (0x2004, 8, "base must be a multiple of 8, not 0x2004"),
        (0x2001, 8, "base must be a multiple of 8, not 0x2001"),
        ((1 << 64) - 8, 9, "(size|buffer) must be 1 to 0x8 bytes .base 0xf{15}8 to 2.64., not 9"),
        (-8, 8, "base must be 0 to 0xffffffffffffffff, not -8"),
        (1 << 64, 8, "base must be .*, not 0x10000000000000000"),
    ],
)
def test_a_region_that_cannot_be_is_refused_and_nothing_changes(add, base, size, words):
    memory = filled()
    before = memory.regions
    with pytest.raises(ValueError, match=words):
        add(memory, base, size)
    assert memory.regions == before


@pytest.mark.parametrize("add", ADDERS.values(), ids=ADDERS)
def test_regions_fit_exactly_into_gaps_and_at_both_ends_of_the_space(add):
    memory = filled()
    add(memory, 0x1100, 0x100)
    add(memory, 0, 0x1000)
    add(memory, (1 << 64) - 0x1000, 0x1000)
    assert [region[:2] for region in memory.regions] == [
        (0, 0x1000), (0x1000, 0x100), (0x1100, 0x100), (0x1200, 0x100),
        ((1 << 64) - 0x1000, 0x1000),
    ]  # fmt: skip


@pytest.mark.parametrize("size", [-1, 1 << 64, (1 << 52) + 1])
def test_private_memory_has_a_legal_size(size):
    with pytest.raises(ValueError, match=r"^size must be .*, not"):
        Memory().add_private(0, size)


@pytest.mark.parametrize("bad", [1.5, "1", None, np.float64(8), [8], np.array([8, 16]), int])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("base", lambda memory, bad: memory.add(bytearray(8), bad)),
        ("base", lambda memory, bad: memory.add_private(bad, 8)),
        ("size", lambda memory, bad: memory.add_private(0, bad)),
        ("base", lambda memory, bad: memory.add_callback(bad, 8, print)),
        ("size", lambda memory, bad: memory.add_callback(0, bad, print)),
        ("base", lambda memory, bad: memory.remove(bad)),
        ("address", lambda memory, bad: memory.read(bad, 8)),
        ("size", lambda memory, bad: memory.read(0, bad)),
        ("address", lambda memory, bad: memory.write(bad, b"12345678")),
        ("address", lambda memory, bad: memory.read_u64(bad)),
        ("address", lambda memory, bad: memory.write_u64(bad, 1)),
        ("value", lambda memory, bad: memory.write_u64(0, bad)),
    ],
)
def test_an_argument_that_is_no_integer_is_named(name, call, bad):
    with pytest.raises(TypeError, match=f"^{name} must be an integer, not {type(bad).__name__}"):
        call(filled(), bad)


@pytest.mark.parametrize("bad", [1.5, "1", [8]])
@pytest.mark.parametrize("name", ["address", "level", "nth", "count"])
def test_an_injection_argument_that_is_no_integer_is_named(name, bad):
    memory = Memory()
    with pytest.raises(TypeError, match=f"^{name} must be an integer, not {type(bad).__name__}"):
        memory.inject_error(**{name: bad})
    assert memory.inject_error() == 1


def test_numpy_integers_are_addresses():
    memory = filled()
    memory.write_u64(np.uint64(0x1000), np.uint16(0x1234))
    assert memory.read_u64(np.int64(0x1000)) == 0x1234
    assert memory.read(np.uint32(0x1000), np.int8(2)) == b"\x34\x12"


@pytest.mark.parametrize("bad", [-1, 1 << 64])
def test_addresses_and_values_have_64_bits(bad):
    memory = filled()
    for name, call in (
        ("address", lambda: memory.read(bad, 1)),
        ("size", lambda: memory.read(0x1000, bad)),
        ("address", lambda: memory.write(bad, b"")),
        ("value", lambda: memory.write_u64(0x1000, bad)),
        ("base", lambda: memory.remove(bad)),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be 0 to 0x\w+, not (-1|{bad:#x})"):
            call()


def test_what_is_written_must_be_bytes():
    with pytest.raises(TypeError, match="data must be bytes, not int"):
        filled().write(0x1000, 5)


def test_memory_takes_no_arguments():
    with pytest.raises(TypeError):
        Memory(1)
    with pytest.raises(TypeError):
        Memory(size=1)


def test_removing_what_is_not_there_is_a_key_error():
    memory = filled()
    for base in (0, 0x1008, 0x1100):
        with pytest.raises(KeyError, match="base must be that of a region, not"):
            memory.remove(base)
    assert len(memory.regions) == 2


# --- reads and writes of the host ---


def test_reads_and_writes_cross_regions():
    low, high = bytearray(0x100), bytearray(0x100)
    memory = Memory()
    memory.add(low, 0x1000)
    memory.add(high, 0x1100)
    memory.write(0x10FE, b"abcd")
    assert bytes(low[-2:]) + bytes(high[:2]) == b"abcd"
    assert memory.read(0x10FD, 6) == b"\0abcd\0"
    assert memory.read(0x1000, 0x200) == low + high


@pytest.mark.parametrize(
    ("address", "size", "where"),
    [
        (0, 1, 0),
        (0xFFF, 1, 0xFFF),
        (0xFFF, 2, 0xFFF),
        (0x10FF, 2, 0x1100),
        (0x1300, 1, 0x1300),
        (0x1000, 0x300, 0x1100),
        (0x1000, 1 << 63, 0x1100),
        (LAST, 1, LAST),
        (LAST, 2, LAST),
    ],
)
def test_a_read_outside_is_an_external_abort_that_names_the_address(address, size, where):
    with pytest.raises(ExternalAbort, match=f"address {where:#x}"):
        filled().read(address, size)
    with pytest.raises(LookupError):
        filled().read(address, size)


def test_a_read_does_not_wrap_around_the_end_of_the_space():
    memory = Memory()
    memory.add(bytearray(8), (1 << 64) - 8)
    memory.add(bytearray(8), 0)
    assert memory.read((1 << 64) - 8, 8) == bytes(8)
    with pytest.raises(ExternalAbort):
        memory.read((1 << 64) - 8, 9)
    with pytest.raises(ExternalAbort):
        memory.write((1 << 64) - 8, bytes(9))


def test_nothing_can_be_read_and_written_anywhere():
    memory = filled()
    assert memory.read(0x9999, 0) == b""
    memory.write(0x9999, b"")


def test_more_than_the_host_has_is_a_memory_error():
    memory = Memory()
    memory.add_private()
    with pytest.raises(MemoryError):
        memory.read(0, 1 << 52)


def test_numbers_are_little_endian_unless_told():
    memory = filled()
    memory.write_u64(0x1001, 0x0102_0304_0506_0708)
    assert memory.read(0x1001, 8) == bytes([8, 7, 6, 5, 4, 3, 2, 1])
    assert memory.read_u64(0x1001) == 0x0102_0304_0506_0708
    assert memory.read_u64(0x1001, big_endian=True) == 0x0807_0605_0403_0201
    memory.write_u64(0x1001, 0x0102_0304_0506_0708, big_endian=True)
    assert memory.read(0x1001, 8) == bytes([1, 2, 3, 4, 5, 6, 7, 8])


@pytest.mark.parametrize("after", ["read-only", "nothing", "callback without write"])
@pytest.mark.parametrize("kind", ["buffer", "private", "callback"])
def test_a_write_that_cannot_be_completed_changes_nothing(kind, after):
    memory = Memory()
    written = []
    if kind == "buffer":
        memory.add(bytearray(b"x" * 0x100), 0x1000)
    elif kind == "private":
        memory.add_private(0x1000, 0x100)
        memory.write(0x1000, b"x" * 0x100)
    else:
        memory.add_callback(
            0x1000, 0x100, lambda a, n: b"x" * n, lambda a, data: bool(written.append(data)) or True
        )
    if after == "read-only":
        memory.add(bytes(0x100), 0x1100)
    elif after == "callback without write":
        memory.add_callback(0x1100, 0x100, lambda a, n: bytes(n))
    expected = ExternalAbort if after == "nothing" else PermissionError
    with pytest.raises(expected, match="0x1100"):
        memory.write(0x10F8, bytes(16))
    assert memory.read(0x1000, 0x100) == b"x" * 0x100
    assert written == []


def test_a_buffer_can_be_written_to_itself():
    buffer = bytearray(range(16))
    memory = Memory()
    memory.add(buffer, 0)
    memory.write(4, memoryview(buffer)[:12])
    assert list(buffer) == [0, 1, 2, 3, *range(12)]


class Model:
    """Regions of every kind over one flat bytearray, and a Memory over the same layout."""

    #: base, size, kind
    LAYOUT = (
        (0x0, 0x30, "buffer"),
        (0x30, 0x18, "callback"),
        (0x48, 0x21, "buffer"),
        (0x70, 0x40, "private"),
        (0xB0, 0x10, "read-only"),
        (0xC0, 0x40, "callback"),
    )
    SPAN = 0x110

    def __init__(self):
        self.memory = Memory()
        self.flat = bytearray(self.SPAN)
        self.state = ["hole"] * self.SPAN
        for base, size, kind in self.LAYOUT:
            self.state[base : base + size] = [kind] * size
            if kind == "buffer":
                self.memory.add(bytearray(size), base)
            elif kind == "read-only":
                self.memory.add(bytes(size), base)
            elif kind == "private":
                self.memory.add_private(base, size)
            else:
                store = bytearray(size)

                def read(address, n, base=base, store=store):
                    return store[address - base : address - base + n]

                def write(address, data, base=base, store=store):
                    store[address - base : address - base + len(data)] = data
                    return True

                self.memory.add_callback(base, size, read, write)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, Model.SPAN - 1), st.binary(max_size=0x60)),
        max_size=30,
    )
)
def test_any_program_of_reads_and_writes_agrees_with_flat_memory(program):
    model = Model()
    for write, address, data in program:
        kinds = model.state[address : address + len(data)]
        kinds += ["hole"] * (len(data) - len(kinds))
        if write:
            bad = next((kind for kind in kinds if kind in ("hole", "read-only")), None)
            if bad:
                with pytest.raises(PermissionError if bad == "read-only" else ExternalAbort):
                    model.memory.write(address, data)
            else:
                model.memory.write(address, data)
                model.flat[address : address + len(data)] = data
        elif "hole" in kinds:
            with pytest.raises(ExternalAbort):
                model.memory.read(address, len(data))
        else:
            expected = model.flat[address : address + len(data)]
            assert model.memory.read(address, len(data)) == expected


# --- private memory ---


def resident():
    """Bytes of this process in the host's memory."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def mapped():
    """Bytes of address space that this process has."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("huge_pages", [False, True])
@pytest.mark.parametrize(
    ("base", "size"),
    [(0, 1 << 52), (0, 1 << 46), (0x4000_0000, 1 << 40), (1 << 52, (1 << 46) + 8), (8, 40)],
)
def test_private_memory_reads_as_zero_and_keeps_what_is_written(base, size, huge_pages):
    memory = Memory()
    memory.add_private(base, size, huge_pages=huge_pages)
    assert memory.regions == [MemoryRegion(base, size, "private", False)]
    for offset in (0, size // 2, size - 8):
        assert memory.read(base + offset, 8) == bytes(8)
        memory.write_u64(base + offset, offset | 5)
    for offset in (0, size // 2, size - 8):
        assert memory.read_u64(base + offset) == offset | 5
    with pytest.raises(ExternalAbort):
        memory.read(base + size - 4, 8)
    with pytest.raises(ExternalAbort):
        memory.write(base + size - 4, bytes(8))


@pytest.mark.parametrize("size", [1 << 46, 1 << 52])
def test_private_memory_costs_only_what_is_touched(size):
    before = resident()
    memory = Memory()
    memory.add_private(0, size)
    for i in range(100):
        memory.write(i * (size // 100) & ~7, b"touched")
        assert memory.read((i * (size // 100) & ~7) + 0x10_0000, 64) == bytes(64)
    assert resident() - before < 16 << 20
    del memory
    assert resident() - before < 8 << 20


@pytest.mark.parametrize("size", [40, 1 << 20, 1 << 45])
def test_sparse_memory_reserves_nothing(size):
    before = mapped()
    memory = Memory()
    memory.add_private(0x1000, size, sparse=True)
    memory.write(0x1000 + size - 8, b"written!")
    assert memory.read(0x1000 + size - 8, 8) == b"written!"
    assert memory.read(0x1000 + size // 2 - 4, 4) == bytes(4)
    assert memory.regions == [MemoryRegion(0x1000, size, "private", False)]
    for again in (memory.copy(), pickle.loads(pickle.dumps(memory))):
        assert again.read(0x1000 + size - 8, 8) == b"written!"
    assert mapped() - before < 256 << 20


@pytest.mark.parametrize("kind", ["private", "sparse", "buffer", "read-only"])
@pytest.mark.parametrize(
    "call",
    # by protocol 5 it is pickle that copies, and that hears no signal
    [Memory.copy, lambda memory: pickle.dumps(memory, 4)],
    ids=["copy", "pickle"],
)
def test_copies_hear_signals_and_leave_the_memory_as_it_was(kind, call):
    size = 32 << 20
    memory = Memory()
    if kind in ("buffer", "read-only"):
        memory.add(bytearray(size), 0, readonly=kind == "read-only")
    else:
        memory.add_private(0, size, sparse=kind == "sparse")
        for at in range(8, size, 1 << 20):
            memory.write_u64(at, 1)
    memory.add_private(1 << 40, 4096)
    busy = []

    def handler(_number, _frame):
        try:
            memory.remove(1 << 40)
        except BufferError:
            busy.append(1)
        else:
            memory.add_private(1 << 40, 4096)
        raise InterruptedError

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        for attempt in range(500):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0002 * (1 + attempt % 50))
                call(memory)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except InterruptedError:
                pass
            if busy:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert busy
    memory.remove(1 << 40)
    assert memory.read_u64(8) == (kind not in ("buffer", "read-only"))
    assert memory.copy().read(0, size) == memory.read(0, size)


def left_out_of_dumps(lines):
    """Bytes of the maps that a core dump does not have."""
    size, total = 0, 0
    for line in lines:
        if line.startswith("Size:"):
            size = int(line.split()[1]) << 10
        elif line.startswith("VmFlags:") and "dd" in line.split():
            total += size
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("sparse", [False, True])
def test_core_dumps_leave_private_memory_out(sparse):
    memory = Memory()
    with open("/proc/self/smaps") as maps:
        before = left_out_of_dumps(maps)
    memory.add_private(0, 1 << 24, sparse=sparse)
    memory.write(0, b"written")
    with open("/proc/self/smaps") as maps:
        assert left_out_of_dumps(maps) - before == 1 << 24


CHUNK = 1 << 24


@pytest.mark.parametrize("base", [0, 8, 0x1000])
def test_reads_and_writes_cross_the_chunks_of_a_large_space(base):
    memory = Memory()
    memory.add_private(base, 1 << 47)
    edge = base + 5 * CHUNK
    assert memory.read(edge - 100, 200) == bytes(200)
    data = bytes(range(200))
    memory.write(edge - 100, data)
    assert memory.read(edge - 100, 200) == data
    assert memory.read(edge - 1, 2) == data[99:101]
    # one side written, the other never
    memory.write(edge + 2 * CHUNK - 4, b"left")
    assert memory.read(edge + 2 * CHUNK - 4, 8) == b"left\0\0\0\0"
    # whole chunks
    many = memory.read(edge - CHUNK - 8, 2 * CHUNK + 16)
    assert many.strip(b"\0") == data.strip(b"\0")


@pytest.mark.parametrize("shift", [0, 8, 24, 0x1038])
def test_the_smmu_walks_tables_in_any_chunk(shift):
    # A region base that is not a multiple of 64 lets a structure lie across two chunks.
    edge = (1 << 43) + 7 * CHUNK
    memory = Memory()
    memory.add_private(shift, 1 << 51)
    for base in (edge, edge - 4 * SIZE, edge + 100 * CHUNK):
        memory.write(base, small.build(base))
        smmu = Smmu(memory, **small.registers(base))
        for request, pa in small.PHYSICAL.items():
            assert smmu.pa(request.sid, request.iova, **request.access) == pa
            assert smmu.translate_batch(
                [request.sid], request.iova, ssid=request.ssid, write=request.write,
                priv=request.priv, instr=request.instr,
            )["pa"].tolist() == [pa]  # fmt: skip


@pytest.mark.parametrize(
    "inside", [small.STES + 64 + 24, small.CDS + 40, small.LEVEL3 + 8, small.LEVEL1 + 8]
)
def test_structures_that_lie_across_two_chunks_are_read_whole(inside):
    memory = Memory()
    memory.add_private(BASE + inside - 3 * CHUNK, 1 << 47)  # a chunk ends at BASE + inside
    memory.write(BASE, small.build())
    smmu = Smmu(memory, **small.registers())
    for request, pa in small.PHYSICAL.items():
        assert smmu.pa(request.sid, request.iova, **request.access) == pa
    requests = list(small.PHYSICAL)
    assert [line[0] for line in small.batch_rows(smmu, requests)] == [*small.PHYSICAL.values()]


def test_the_last_chunk_ends_where_its_region_ends():
    memory = Memory()
    table = (1 << 47) + 2 * CHUNK
    memory.add_private(0, table + 0x400)  # 16 STEs, then nothing
    memory.write(table, small.build()[:0x400])
    smmu = Smmu(memory, strtab_base=table, strtab_base_cfg=8)
    for _ in range(2):
        assert smmu.pa(small.BYPASSED, 5) == 5
        event = smmu.translate(16, 5).event
        assert (event.name, event.fetch_address) == ("F_STE_FETCH", table + 0x400)
    sids = [small.BYPASSED, 15, 16, 17, small.BYPASSED, 31]
    events = smmu.translate_batch(sids, 5)["event"].tolist()
    assert events == [0, 4, STE_FETCH, STE_FETCH, 0, STE_FETCH]


def test_untouched_memory_is_an_invalid_stream_table_not_an_abort():
    memory = Memory()
    memory.add_private()
    smmu = Smmu(memory, strtab_base=1 << 50, strtab_base_cfg=8)
    assert smmu.translate(3, 0).event.name == "C_BAD_STE"
    assert smmu.translate_batch([3] * 10, 0)["event"].tolist() == [4] * 10


# --- structures across regions ---


@pytest.mark.parametrize("cut", [small.STES + 64 + 24, small.CDS + 8, small.CDS + 56])
@pytest.mark.parametrize("second", ["buffer", "private", "callback", "read-only"])
def test_a_structure_across_two_regions_is_read_whole(cut, second):
    image = small.build()
    memory = Memory()
    memory.add(image[:cut], BASE)
    rest = bytes(image[cut:])
    if second == "buffer":
        memory.add(bytearray(rest), BASE + cut)
    elif second == "private":
        memory.add_private(BASE + cut, len(rest))
        memory.write(BASE + cut, rest)
    elif second == "callback":
        memory.add_callback(
            BASE + cut, len(rest), lambda a, n: rest[a - BASE - cut : a - BASE - cut + n]
        )
    else:
        memory.add(rest, BASE + cut)
    smmu = Smmu(memory, **small.registers())
    expected, _ = small.system()
    assert small.batch_rows(smmu) == small.batch_rows(expected)
    assert [small.row(r) for r in small.translate_each(smmu)] == small.batch_rows(expected)
    trace = smmu.translate(1, small.RW, trace=True).fetches
    assert [(f.kind, f.address, f.size) for f in trace] == [
        (f.kind, f.address, f.size)
        for f in expected.translate(1, small.RW, trace=True).fetches
    ]


@pytest.mark.parametrize(
    ("cut", "event", "fetch"),
    [
        (small.STES + 64 + 60, "F_STE_FETCH", small.STES + 64),
        (small.CDS + 63, "F_CD_FETCH", small.CDS),
        (small.LEVEL3 + 15, "F_WALK_EABT", small.LEVEL3 + 8),
    ],
)
def test_a_structure_of_which_a_byte_is_missing_is_an_abort(cut, event, fetch):
    memory = Memory()
    memory.add(small.build()[:cut], BASE)
    smmu = Smmu(memory, **small.registers())
    for found in (
        smmu.translate(1, small.RW).event,
        smmu.translate(1, small.RW, trace=True).event,
    ):
        assert found.name == event
        assert found.fetch_address == BASE + fetch
    assert smmu.translate_batch([1], small.RW)["event"].tolist() == [found.number]
    # one byte more and it is there
    if cut == small.LEVEL3 + 15:
        memory.remove(BASE)
        memory.add(small.build()[: cut + 1], BASE)
        assert smmu.pa(1, small.RW) == 0x4000_1000


# --- callbacks ---


class Host:
    """Memory that answers by itself and keeps a diary."""

    def __init__(self, image, base=BASE):
        self.image = image
        self.base = base
        self.reads = []
        self.refuse = None
        self.error = None

    def read(self, address, n):
        self.reads.append((address, n))
        if self.refuse is not None and address == self.refuse:
            return None
        if self.error is not None and len(self.reads) > self.error[0]:
            raise self.error[1]
        return bytes(self.image[address - self.base : address - self.base + n])

    def write(self, address, data):
        self.image[address - self.base : address - self.base + len(data)] = data
        return True


def callback_system(**other):
    host = Host(small.build())
    memory = Memory()
    memory.add_callback(BASE, SIZE, host.read, host.write)
    return Smmu(memory, **small.registers() | other), host


def test_a_callback_region_gives_what_a_buffer_gives():
    smmu, host = callback_system()
    expected, _ = small.system()
    assert small.batch_rows(smmu) == small.batch_rows(expected)
    assert [small.row(r) for r in small.translate_each(smmu)] == small.batch_rows(expected)
    assert smmu.memory.regions == [MemoryRegion(BASE, SIZE, "callback", False)]
    smmu.memory.write(BASE + 8, b"news")
    assert host.image[8:12] == b"news"
    assert smmu.memory.read(BASE + 8, 4) == b"news"


@pytest.mark.rule("S3.15-3")
def test_a_callback_sees_each_fetch_once_and_in_order():
    smmu, host = callback_system()
    result = smmu.translate(1, small.RW, trace=True)
    assert host.reads == [(f.address, f.size) for f in result.fetches]
    assert [size for _, size in host.reads] == [64, 64, 8, 8, 8]


@pytest.mark.rule("S16.7.4-1", "S16.7.4-2", "S16.7.4-3")
@pytest.mark.parametrize(
    ("request_", "offset", "event"),
    [
        (Request(1, small.RW), small.STES + 64, "F_STE_FETCH"),
        (Request(1, small.RW), small.CDS, "F_CD_FETCH"),
        (Request(10, small.RW, ssid=0x41), small.L1CDS + 8, "F_CD_FETCH"),
        (Request(10, small.RW, ssid=0x41), small.CD_LEAF + 64, "F_CD_FETCH"),
        (Request(1, small.RW), small.LEVEL1, "F_WALK_EABT"),
        (Request(1, small.RW), small.LEVEL2, "F_WALK_EABT"),
        (Request(1, small.RW, write=True), small.LEVEL3 + 8, "F_WALK_EABT"),
    ],
)
@pytest.mark.parametrize("how", ["callback", "injected"])
def test_an_external_abort_becomes_the_event_of_its_fetch(request_, offset, event, how):
    smmu, host = callback_system()
    if how == "callback":
        host.refuse = BASE + offset
    else:
        smmu.memory.inject_error(address=BASE + offset)
    result = smmu.translate(request_.sid, request_.iova, **request_.access, trace=True)
    assert not result
    assert result.action == "abort"
    assert result.event.name == event
    assert result.event.fetch_address == BASE + offset
    assert result.fetches[-1].address == BASE + offset
    assert result.fetches[-1].data is None
    assert small.row(result) == small.batch_rows(smmu, [request_])[0]
    host.refuse = None
    smmu.memory.clear_errors()
    assert smmu.translate(request_.sid, request_.iova, **request_.access)


def test_an_aborted_l1std_fetch_is_f_ste_fetch():
    smmu, host = callback_system(**small.registers_two_level())
    host.refuse = BASE + small.L1STD
    event = smmu.translate(1, small.RW).event
    assert (event.name, event.fetch_address) == ("F_STE_FETCH", BASE + small.L1STD)


FACES = {
    "translate": lambda smmu: smmu.translate(1, small.RW),
    "translate with trace": lambda smmu: smmu.translate(1, small.RW, trace=True),
    "pa": lambda smmu: smmu.pa(1, small.RW),
    "batch": lambda smmu: smmu.translate_batch([1, 1], small.RW),
    "batch with flags": lambda smmu: smmu.translate_batch([1, 1], small.RW, write=[True, False]),
    "range": lambda smmu: smmu.translate_range(1, small.RW, 0x1000),
    "read": lambda smmu: smmu.memory.read(BASE, 8),
}


class HostError(Exception):
    pass


@pytest.mark.parametrize("face", FACES.values(), ids=FACES)
@pytest.mark.parametrize("error", [HostError("board on fire"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 2, 4])
def test_an_exception_of_a_callback_reaches_the_caller_and_nothing_is_spoilt(face, error, after):
    smmu, host = callback_system()
    if face is FACES["read"]:
        after = 0
    host.error = (after, error)
    with pytest.raises(type(error)) as caught:
        face(smmu)
    assert caught.value is error
    assert len(host.reads) == after + 1
    host.error = None
    assert face(smmu) is not None
    smmu.memory.add(bytearray(8), 0)  # no walk is left behind that forbids it
    smmu.memory.remove(0)


@pytest.mark.parametrize("face", FACES.values(), ids=FACES)
def test_an_exception_of_a_callback_is_let_go(face):
    smmu, host = callback_system()
    error = HostError()
    host.error = (0, error)
    with pytest.raises(HostError):
        face(smmu)
    host.error = None
    alive = weakref.ref(error)
    del error
    gc.collect()
    assert alive() is None


def test_an_exception_in_a_batch_keeps_the_rows_before_it():
    smmu, host = callback_system()
    out = np.zeros(8, [("pa", "u8")])
    host.error = (5 * 3 + 1, HostError())
    with pytest.raises(HostError):
        smmu.translate_batch(1, [small.RW] * 8, out=out)
    assert out["pa"].tolist() == [0x4000_1000] * 3 + [0] * 5


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"short", "^what the read callback at 0x80000040 returns must be 64 bytes, not 5$"),
        (bytes(65), "returns must be 64 bytes, not 65"),
        (bytearray(), "returns must be 64 bytes, not 0"),
    ],
)
def test_a_callback_must_return_as_many_bytes_as_asked(answer, words):
    memory = Memory()
    memory.add_callback(BASE, SIZE, lambda address, n: answer)
    smmu = Smmu(memory, **small.registers())
    with pytest.raises(ValueError, match=words):
        smmu.translate(1, 0)


def test_a_callback_must_return_bytes():
    memory = Memory()
    memory.add_callback(BASE, SIZE, lambda address, n: 5)
    with pytest.raises(TypeError, match="returns must be bytes or None, not int"):
        Smmu(memory, **small.registers()).translate(1, 0)


@pytest.mark.parametrize("kind", [bytearray, memoryview, lambda b: np.frombuffer(b, np.uint64)])
def test_a_callback_may_return_anything_like_bytes(kind):
    image = bytes(small.build())
    memory = Memory()
    memory.add_callback(BASE, SIZE, lambda a, n: kind(image[a - BASE : a - BASE + n]))
    assert Smmu(memory, **small.registers()).pa(1, small.RW) == 0x4000_1000


def test_a_write_callback_says_whether_it_wrote():
    answers = [True]
    memory = Memory()
    memory.add_callback(0, 64, lambda a, n: bytes(n), lambda a, data: answers[0])
    memory.write(0, b"x")
    answers[0] = None
    with pytest.raises(ExternalAbort, match="0x0: the write callback refused 1 bytes"):
        memory.write(0, b"x")
    for answers[0] in (False, 1, "done"):
        with pytest.raises(TypeError, match=r"True .* or None"):
            memory.write(0, b"x")
    memory.remove(0)


@pytest.mark.parametrize(
    ("read", "write", "error", "words"),
    [
        (5, None, TypeError, "read must be a callable or a capsule, not int"),
        (None, None, TypeError, "read must be a callable or a capsule, not NoneType"),
        (print, 5, TypeError, "write must be a callable or None, not int"),
    ],
)
def test_callbacks_are_callable(read, write, error, words):
    memory = Memory()
    with pytest.raises(error, match=words):
        memory.add_callback(0, 64, read, write)
    assert memory.regions == []


def test_the_memory_may_be_read_inside_a_callback():
    memory = Memory()
    memory.add(small.build(), 0)
    memory.add_callback(BASE, SIZE, lambda address, n: memory.read(address - BASE, n))
    assert Smmu(memory, **small.registers()).pa(1, small.RW) == 0x4000_1000


def test_the_smmu_may_be_used_inside_a_callback():
    inner, _ = small.system()
    memory = Memory()
    # every address of the outer tables is translated by the inner: a private window
    offset = inner.pa(2, 0x1234)
    assert offset == 0x1234

    def read(address, n):
        inner.translate_batch([1] * 100, small.RW)
        return image[inner.pa(2, address) - BASE :][:n]

    image = bytes(small.build())
    memory.add_callback(BASE, SIZE, read)
    outer = Smmu(memory, **small.registers())
    assert small.batch_rows(outer) == small.batch_rows(inner)


# --- C callbacks, through a capsule made without a compiler ---

READ = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t
)


class Callbacks(ctypes.Structure):
    _fields_ = (("read", READ), ("write", READ), ("ctx", ctypes.c_void_p))


def capsule(callbacks, name=b"smmufast.callbacks2"):
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(ctypes.addressof(callbacks), name, None)


class CHost:
    """As Host, behind C function pointers; `last` is what the context pointer held."""

    def __init__(self, image):
        self.image = image
        self.refuse = None
        self.contexts = set()
        self.context = ctypes.c_uint64(0x1234)

        def read(ctx, address, buf, n):
            self.contexts.add(ctypes.cast(ctx, ctypes.POINTER(ctypes.c_uint64))[0])
            if address == self.refuse:
                return -5
            ctypes.memmove(buf, bytes(self.image[address - BASE : address - BASE + n]), n)
            return 0

        def write(ctx, address, buf, n):
            if address == self.refuse:
                return 1
            self.image[address - BASE : address - BASE + n] = ctypes.string_at(buf, n)
            return 0

        self.callbacks = Callbacks(
            READ(read), READ(write), ctypes.cast(ctypes.pointer(self.context), ctypes.c_void_p)
        )


def test_c_callbacks_give_what_a_buffer_gives():
    host = CHost(small.build())
    memory = Memory()
    memory.add_callback(BASE, SIZE, capsule(host.callbacks))
    assert memory.regions == [MemoryRegion(BASE, SIZE, "callback", False)]
    smmu = Smmu(memory, **small.registers())
    expected, _ = small.system()
    assert small.batch_rows(smmu) == small.batch_rows(expected)
    assert host.contexts == {0x1234}
    memory.write(BASE, b"xyz")
    assert host.image[:3] == b"xyz"
    assert memory.read(BASE, 3) == b"xyz"


def test_a_refusal_of_a_c_callback_is_an_external_abort():
    host = CHost(small.build())
    memory = Memory()
    memory.add_callback(BASE, SIZE, capsule(host.callbacks))
    smmu = Smmu(memory, **small.registers())
    host.refuse = BASE + small.LEVEL2
    event = smmu.translate(1, small.RW).event
    assert (event.name, event.fetch_address) == ("F_WALK_EABT", BASE + small.LEVEL2)
    for call in (memory.read, lambda address, n: memory.write(address, bytes(n))):
        with pytest.raises(ExternalAbort, match="refused"):
            call(BASE + small.LEVEL2, 8)
    host.refuse = None
    assert smmu.pa(1, small.RW) == 0x4000_1000


def test_c_callbacks_without_a_write_function_are_read_only():
    host = CHost(small.build())
    host.callbacks.write = READ()
    memory = Memory()
    memory.add_callback(BASE, SIZE, capsule(host.callbacks))
    assert memory.regions[0].readonly
    with pytest.raises(PermissionError):
        memory.write(BASE, b"x")


def test_a_capsule_is_checked():
    host = CHost(small.build())
    memory = Memory()
    with pytest.raises(ValueError, match=r"^read must be .*'smmufast\.callbacks2', not <"):
        memory.add_callback(BASE, SIZE, capsule(host.callbacks, b"other"))
    with pytest.raises(TypeError, match=r"write must be None beside a capsule, .*, not builtin"):
        memory.add_callback(BASE, SIZE, capsule(host.callbacks), print)
    host.callbacks.read = READ()
    with pytest.raises(ValueError, match="read: the capsule's read function is NULL"):
        memory.add_callback(BASE, SIZE, capsule(host.callbacks))
    assert memory.regions == []


def test_the_struct_of_a_capsule_is_copied():
    host = CHost(small.build())
    memory = Memory()
    held = capsule(host.callbacks)
    memory.add_callback(BASE, SIZE, held)
    keep = (host.callbacks.read, host.callbacks.write)
    ctypes.memset(ctypes.addressof(host.callbacks), 0, ctypes.sizeof(host.callbacks))
    assert Smmu(memory, **small.registers()).pa(1, small.RW) == 0x4000_1000
    assert len(keep) == 2


# --- regions do not change under a running translation ---

CHANGES = {
    "add": lambda memory: memory.add(bytearray(8), 0),
    "add_private": lambda memory: memory.add_private(0, 8),
    "add_callback": lambda memory: memory.add_callback(0, 8, print),
    "remove": lambda memory: memory.remove(BASE),
    "inject_error": lambda memory: memory.inject_error(),
    "clear_errors": lambda memory: memory.clear_errors(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("face", FACES.values(), ids=FACES)
def test_a_callback_cannot_change_the_memory_that_asks_it(change, face):
    image = bytes(small.build())
    memory = Memory()
    tries = []

    def read(address, n):
        tries.append(address)
        change(memory)
        return image[address - BASE : address - BASE + n]

    memory.add_callback(BASE, SIZE, read)
    smmu = Smmu(memory, **small.registers())
    before = memory.regions
    with pytest.raises(BufferError, match="in use"):
        face(smmu)
    assert len(tries) == 1
    assert memory.regions == before
    change(memory)


def test_a_write_callback_cannot_change_the_memory_either():
    memory = Memory()
    memory.add_callback(BASE, 8, lambda a, n: bytes(n), lambda a, data: memory.remove(BASE))
    with pytest.raises(BufferError, match="in use"):
        memory.write(BASE, b"x")
    memory.remove(BASE)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_thread_cannot_change_memory_while_a_batch_runs(change):
    image = bytes(small.build())
    memory = Memory()
    inside, leave = threading.Event(), threading.Event()
    found = []

    def read(address, n):
        inside.set()
        assert leave.wait(60)
        return image[address - BASE : address - BASE + n]

    memory.add_callback(BASE, SIZE, read)
    smmu = Smmu(memory, **small.registers())
    thread = threading.Thread(
        target=lambda: found.extend(smmu.translate_batch(1, [small.RW] * 4)["pa"].tolist())
    )
    thread.start()
    try:
        assert inside.wait(60)
        with pytest.raises(BufferError, match="in use"):
            change(memory)
    finally:
        leave.set()
        thread.join()
    assert found == [0x4000_1000] * 4
    change(memory)


# --- injected errors ---


def events_of(smmu, count, request=Request(1, small.RW)):  # noqa: B008
    """Event numbers of the same request, again and again."""
    found = []
    for _ in range(count):
        event = smmu.translate(request.sid, request.iova, **request.access).event
        found.append(event.number if event else 0)
    return found


STE_FETCH, CD_FETCH, WALK_EABT = 0x03, 0x09, 0x0B


@pytest.mark.parametrize(
    ("injection", "expected"),
    [
        ({}, [STE_FETCH] * 4),
        ({"kind": "STE"}, [STE_FETCH] * 4),
        ({"kind": "CD"}, [CD_FETCH] * 4),
        ({"kind": "TT"}, [WALK_EABT] * 4),
        ({"kind": "L1STD"}, [0] * 4),
        ({"kind": "L1CD"}, [0] * 4),
        ({"level": 1}, [WALK_EABT] * 4),
        ({"level": 3}, [WALK_EABT] * 4),
        ({"level": 0}, [0] * 4),
        ({"level": -1}, [0] * 4),
        ({"nth": 1}, [STE_FETCH, 0, 0, 0]),
        ({"nth": 2}, [CD_FETCH, 0, 0, 0]),
        ({"nth": 5}, [WALK_EABT, 0, 0, 0]),
        ({"nth": 6}, [0, STE_FETCH, 0, 0]),
        ({"nth": 2, "count": 2}, [CD_FETCH, STE_FETCH, 0, 0]),
        ({"count": 3}, [STE_FETCH, STE_FETCH, STE_FETCH, 0]),
        ({"kind": "TT", "nth": 4}, [0, WALK_EABT, 0, 0]),
        ({"kind": "TT", "level": 2, "nth": 2, "count": 2}, [0, WALK_EABT, WALK_EABT, 0]),
        ({"address": BASE + small.CDS}, [CD_FETCH] * 4),
        ({"address": BASE + small.CDS + 63, "size": 1}, [CD_FETCH] * 4),
        ({"address": BASE + small.CDS + 64}, [0] * 4),
        ({"address": BASE + small.CDS - 8}, [0] * 4),
        ({"address": BASE + small.CDS - 8, "size": 9}, [CD_FETCH] * 4),
        ({"address": BASE + small.LEVEL3, "size": 0x1000, "nth": 2}, [0, WALK_EABT, 0, 0]),
        ({"address": 0, "size": 1 << 63, "kind": "CD", "nth": 3, "count": 1}, [0, 0, CD_FETCH, 0]),
        ({"nth": (1 << 63) - 1, "count": (1 << 63) - 1}, [0] * 4),
    ],
)
def test_an_injected_error_hits_the_fetches_that_match(injection, expected):
    smmu, _ = small.system()
    assert smmu.memory.inject_error(**injection) == 1
    assert events_of(smmu, 4) == expected
    smmu.memory.clear_errors()
    assert events_of(smmu, 1) == [0]


def test_injections_add_up_and_count_for_themselves():
    smmu, _ = small.system()
    assert smmu.memory.inject_error(kind="CD", nth=2) == 1
    assert smmu.memory.inject_error(kind="TT", nth=2) == 2
    assert events_of(smmu, 3) == [WALK_EABT, CD_FETCH, 0]


def test_an_error_is_counted_from_the_injection_on():
    smmu, _ = small.system()
    events_of(smmu, 3)
    smmu.memory.inject_error(kind="STE", nth=2)
    assert events_of(smmu, 3) == [0, STE_FETCH, 0]


def test_a_clean_slate_after_clear_errors():
    smmu, _ = small.system()
    smmu.memory.inject_error()
    smmu.memory.clear_errors()
    smmu.memory.clear_errors()
    assert events_of(smmu, 2) == [0, 0]
    assert smmu.memory.inject_error(nth=1) == 2  # a number is not used again


def test_injected_errors_do_not_touch_the_host():
    smmu, image = small.system()
    smmu.memory.inject_error()
    assert smmu.memory.read(BASE, SIZE) == image
    smmu.memory.write(BASE, b"\0")
    assert events_of(smmu, 2) == [STE_FETCH] * 2


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"kind": "PTE"}, ValueError, "kind must be 'L1STD', 'STE', 'L1CD', 'CD', 'TT', 'S2TT', "
         "'TT update', 'S2TT update', 'CMD', 'EVENT', 'PRI' or 'MSI', not 'PTE'"),
        ({"kind": ""}, ValueError, "kind must be .*, not ''"),
        ({"kind": 5}, ValueError, "kind must be .*, not 5"),
        ({"level": 4}, ValueError, "level must be -1 to 3, not 4"),
        ({"level": -2}, ValueError, "level must be -1 to 3, not -2"),
        ({"nth": 0}, ValueError, "nth must be 1 to .*, not 0"),
        ({"nth": -1}, ValueError, "nth must be 1 to .*, not -1"),
        ({"nth": 1 << 63}, ValueError, "nth must be 1 to .*, not 0x80{15}"),
        ({"count": 0}, ValueError, "count must be 1 to .*, not 0"),
        ({"count": 1 << 63}, ValueError, "count must be 1 to .*, not 0x80{15}"),
        ({"address": 8, "size": 0}, ValueError, "size must be 1 to 0xf{15}8 bytes .*, not 0"),
        ({"address": 8, "size": LAST}, ValueError, "size .* .address 0x8 to 2.64., not 0xf{16}"),
        ({"address": -8}, ValueError, "address must be .*, not -8"),
        ({"address": 1 << 64}, ValueError, "address must be .*, not 0x10000000000000000"),
    ],
)
def test_an_injection_that_cannot_be_is_refused(arguments, error, words):
    memory = Memory()
    with pytest.raises(error, match=words):
        memory.inject_error(**arguments)
    assert memory.inject_error() == 1


# --- a batch over memory that is not plain ---


def twice(requests):
    return [*requests, *requests]


INJECTIONS = [
    [{"kind": "TT", "nth": 5, "count": 3}],
    [{"nth": 7}, {"kind": "CD", "nth": 3, "count": 4}],
    [{"level": 3, "nth": 2, "count": 2}],
    [{"address": BASE + small.LEVEL3, "size": 0x1000}],
    [{"nth": 20, "count": 40}],
]


@pytest.mark.parametrize("injections", INJECTIONS)
@pytest.mark.parametrize("over", ["buffer", "callback"])
def test_a_batch_with_injected_errors_equals_the_requests_one_by_one(injections, over):
    requests = twice(small.REQUESTS)
    found = []
    for face in (
        lambda smmu: small.batch_rows(smmu, requests),
        lambda smmu: [small.row(r) for r in small.translate_each(smmu, requests)],
        lambda smmu: [small.row(r) for r in small.translate_each(smmu, requests, trace=True)],
    ):
        smmu, _ = small.system() if over == "buffer" else callback_system()
        for injection in injections:
            smmu.memory.inject_error(**injection)
        found.append(face(smmu))
    assert found[0] == found[1] == found[2]
    plain, _ = small.system()
    assert found[0] != small.batch_rows(plain, requests)


def test_a_batch_over_callbacks_reads_in_the_order_of_the_requests():
    requests = twice(small.REQUESTS)
    one, host = callback_system()
    small.batch_rows(one, requests)
    other, diary = callback_system()
    small.translate_each(other, requests)
    assert host.reads == diary.reads


def test_tables_that_a_callback_changes_are_read_anew_within_a_batch():
    smmu, host = callback_system()
    entry = small.LEVEL3 + 8
    read = host.read
    pages = itertools.count(0x4000_0000, 0x1000)

    def moving(address, n):
        if address == BASE + entry:
            return (next(pages) | 0x443).to_bytes(8, "little")
        return read(address, n)

    smmu.memory.remove(BASE)
    smmu.memory.add_callback(BASE, SIZE, moving)
    batch = smmu.translate_batch(1, [small.RW] * 5)
    assert batch["pa"].tolist() == [0x4000_0000 + 0x1000 * i for i in range(5)]


# --- who keeps whom alive ---


def test_a_smmu_keeps_its_memory():
    smmu, _ = small.system()
    gc.collect()
    assert smmu.memory.regions
    assert smmu.pa(1, small.RW) == 0x4000_1000


def test_a_memory_outlives_its_smmu():
    smmu, image = small.system()
    memory = smmu.memory
    walk = smmu.start_walk(1, small.RW)
    del smmu
    gc.collect()
    assert memory.read(BASE, SIZE) == image
    while walk.request:
        walk.supply(memory.read(walk.request.address, walk.request.size))
    assert walk.result.pa == 0x4000_1000
    memory.remove(BASE)


def test_callbacks_are_kept_and_let_go():
    host = Host(small.build())
    memory = Memory()
    memory.add_callback(BASE, SIZE, host.read)
    alive = weakref.ref(host)
    del host
    gc.collect()
    assert alive() is not None
    assert Smmu(memory, **small.registers()).pa(1, small.RW) == 0x4000_1000
    memory.remove(BASE)
    gc.collect()
    assert alive() is None


def test_a_host_that_holds_the_memory_that_calls_it_is_collected():
    class Board(Host):
        pass

    board = Board(small.build())
    board.memory = Memory()
    board.memory.add_callback(BASE, SIZE, board.read)
    board.smmu = Smmu(board.memory, **small.registers())
    assert board.smmu.pa(1, small.RW) == 0x4000_1000
    alive = weakref.ref(board)
    del board
    gc.collect()
    assert alive() is None


def test_many_memories_come_and_go():
    before, space = resident(), mapped()
    for _ in range(300):
        memory = Memory()
        memory.add_private(0, 1 << 47)
        memory.write(5 * CHUNK, b"x")
        memory.add(bytearray(0x1000), 1 << 50)
        memory.add_callback(1 << 51, 8, lambda a, n: bytes(n))
        memory.inject_error()
    del memory
    gc.collect()
    assert resident() - before < 32 << 20
    assert mapped() - space < 1 << 30


def test_the_text_of_a_memory_says_how_many_regions_it_has():
    assert repr(filled()) == "Memory(2 regions)"
