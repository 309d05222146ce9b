"""The host is called while no lock of ours is held; what runs long lets others run; forks.

While the host is called, in a callback of whatever kind, another thread does what needs the caches:
it must get through.  So a host with one lock around everything does not meet itself here.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import small
from project import TESTS

from smmufast import AtsDevice, Caches, Features, Memory, Smmu, layout
from smmufast._device import smmu as compiled
from smmufast._engine.tlb import WalkEntry
from smmufast.faults import AtsFault, Fault

QUEUES = 0x4000_0000


def wait_for(done, what, seconds=20):
    assert done.wait(seconds), f"{what}: another thread could not get through"


class Host:
    """A host that, whenever it is called, lets another thread use the caches, and waits for it."""

    def __init__(self, caches=True, memory=None, **keywords):
        self.calls, self.failed, self.deep = [], None, False
        self.ram = bytearray(small.build())
        self.memory = Memory()
        if memory == "callbacks":
            self.memory.add_callback(small.BASE, len(self.ram), self.read, self.write, self.swap)
        else:
            self.memory.add(self.ram, small.BASE)
        self.memory.add(bytearray(1 << 16), QUEUES)
        self.smmu = Smmu(
            self.memory, Features.full().replace(msi=0), **small.registers(),
            caches=Caches.server() if caches else None, eventq_base=QUEUES | 6,
            cmdq_base=QUEUES + 0x4000 | 6, priq_base=QUEUES + 0x8000 | 6, cr0=0b1111,
            on_interrupt=lambda name: self.called(name), **keywords)  # fmt: skip
        self.smmu.write("IRQ_CTRL", 7)
        self.smmu.on_resume = lambda stall: self.called("resume")
        self.calls.clear()

    def called(self, what):
        self.calls.append(what)
        if self.deep or self.failed or len(self.calls) > 20:
            return
        self.deep = True
        done = threading.Event()

        def other():
            if self.smmu.caches is not None:
                self.smmu.caches.invalidate_all()
                self.smmu.caches.lookup(0)
            self.smmu.command("TLBI_NSNH_ALL")
            self.smmu.read("EVENTQ_PROD")
            done.set()

        thread = threading.Thread(target=other, daemon=True)
        thread.start()
        if not done.wait(20):
            self.failed = what
        self.deep = False

    def read(self, address, n):
        self.called("read")
        return bytes(self.ram[address - small.BASE :][:n])

    def write(self, address, data):
        self.called("write")
        self.ram[address - small.BASE : address - small.BASE + len(data)] = data
        return True

    def swap(self, address, expected, desired):
        self.called("swap")
        at = address - small.BASE
        found = bytes(self.ram[at : at + 8])
        if found == expected:
            self.ram[at : at + 8] = desired
        return found


def c_face(smmu, sid, iova):
    """One translation through the C interface, without the GIL."""

    class Request(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint64 if name == "iova" else ctypes.c_uint32)
                    for name in ("iova", "sid", "ssid", "access", "reserved")]  # fmt: skip

    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table = ctypes.cast(get(compiled._C_API, b"smmufast._smmu._C_API"),
                        ctypes.POINTER(ctypes.c_void_p))  # fmt: skip
    acquire = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(table[1])
    release = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(table[2])
    translate = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 3)(table[3])
    outcome = ctypes.create_string_buffer(256)
    request = Request(iova, sid, 0xFFFFFFFF, 0, 0)
    handle = acquire(smmu)
    try:
        assert translate(handle, ctypes.byref(request), outcome) == 0
    finally:
        release(handle)


BAD = small.UNMAPPED
FACES = {
    "translate": lambda s: s.translate(small.STAGE1, BAD),
    "translate with a trace": lambda s: s.translate(small.STAGE1, BAD, trace=True),
    "pa": lambda s: pa(s),
    "a short batch": lambda s: s.translate_batch(small.STAGE1, [BAD] * 3),
    "a batch": lambda s: s.translate_batch(small.STAGE1, [BAD] * 30),
    "a long batch": lambda s: s.translate_batch(small.STAGE1, np.full(5000, BAD, np.uint64)),
    "a batch of streams": lambda s: s.translate_batch(
        np.array([small.STAGE1, small.NESTED] * 500, np.uint32), np.full(1000, BAD, np.uint64)),
    "a batch of two threads": lambda s: s.translate_batch(
        small.STAGE1, np.full(40000, BAD, np.uint64), threads=2),
    "a burst": lambda s: s.translate_range(small.STAGE1, BAD, 0x1000),
    "an ATS request": lambda s: s.ats_request(small.STAGE1, BAD),
    "an ATS transaction": lambda s: s.ats_translated(small.STAGE1, BAD),
    "a walk": lambda s: walk(s),
    "the C face": lambda s: c_face(s, small.STAGE1, BAD),
    "an event of the host's": lambda s: s.record("F_UUT"),
    "a page request": lambda s: s.page_request(small.STAGE1, 0x1000),
}  # fmt: skip


def pa(smmu):
    with pytest.raises(Fault):
        smmu.pa(small.STAGE1, BAD)


def walk(smmu):
    one = smmu.start_walk(small.STAGE1, BAD)
    while (fetch := one.request) is not None:
        one.supply(smmu.memory.read(fetch.address, fetch.size))
    assert not one.result


@pytest.mark.parametrize("caches", [True, False], ids=["caches", "no caches"])
@pytest.mark.parametrize("face", FACES)
def test_an_interrupt_comes_while_no_lock_is_held(face, caches):
    host = Host(caches)
    host.smmu.write("CR0", host.smmu.read("CR0") | 0b10000)  # ATSCHK
    FACES[face](host.smmu)
    assert {"eventq", "priq"} & set(host.calls), "the face did not interrupt"
    assert not host.failed, f"{host.failed}: a lock was held"


@pytest.mark.parametrize("caches", [True, False], ids=["caches", "no caches"])
@pytest.mark.parametrize("face", FACES)
def test_memory_is_asked_while_no_lock_is_held(face, caches):
    host = Host(caches, "callbacks")
    FACES[face](host.smmu)
    assert not host.failed, f"{host.failed}: a lock was held"
    if face not in ("an event of the host's", "a page request", "an ATS transaction"):
        assert "read" in host.calls


def test_an_update_is_made_while_no_lock_is_held():
    host = Host(True, "callbacks")
    cd = int.from_bytes(host.ram[small.CDS : small.CDS + 64], "little")
    fields = layout.unpack("CD", cd) | {"HA": 1}
    host.ram[small.CDS : small.CDS + 64] = layout.pack("CD", **fields).to_bytes(64, "little")
    for call in (lambda: host.smmu.translate(small.STAGE1, small.NO_AF),
                 lambda: host.smmu.translate_batch(small.STAGE1, [small.NO_AF] * 100)):  # fmt: skip
        host.ram[small.LEVEL3 + 8 * 3 + 1] &= ~4  # AF is 0 again
        host.smmu.caches.invalidate_all()
        call()
        assert not host.failed, f"{host.failed}: a lock was held"
    assert "swap" in host.calls


@pytest.mark.parametrize("face", ["translate", "a batch", "a long batch", "the C face", "a walk"])
def test_a_stall_is_resumed_while_no_lock_is_held(face):
    host = Host()
    cd = int.from_bytes(host.ram[small.CDS : small.CDS + 64], "little")
    fields = layout.unpack("CD", cd) | {"S": 1}
    host.ram[small.CDS : small.CDS + 64] = layout.pack("CD", **fields).to_bytes(64, "little")
    FACES[face](host.smmu) if face != "a walk" else host.smmu.translate(small.STAGE1, BAD)
    assert host.smmu.stalls
    stall = host.smmu.stalls[0]
    host.smmu.command("RESUME", StreamID=stall.sid, STAG=stall.stag)
    assert "resume" in host.calls
    assert not host.failed, f"{host.failed}: a lock was held"


def test_a_device_is_called_while_no_lock_is_held():
    host = Host()

    class Device:
        def atc_invalidate(self, ssid, address, size, global_):
            host.called("atc")

        def pri_response(self, ssid, prg_index, code):
            host.called("pri")

    host.smmu.devices[small.STAGE1] = Device()
    host.smmu.command("ATC_INV", StreamID=small.STAGE1, Size=52)
    host.smmu.command("PRI_RESP", StreamID=small.STAGE1, Resp=2)
    host.smmu.sync()
    assert {"atc", "pri"} <= set(host.calls)
    assert not host.failed, f"{host.failed}: a lock was held"


def test_an_atc_asks_while_no_lock_is_held():
    host = Host(True, "callbacks")
    device = AtsDevice(host.smmu, small.STAGE1)
    with pytest.raises(AtsFault):
        device.access(small.RW)
    assert "read" in host.calls
    assert not host.failed, f"{host.failed}: a lock was held"


def test_a_host_with_one_lock_does_not_meet_itself():
    """One thread in a register write holds it; an interrupt of another one's batch takes it."""
    big = threading.Lock()
    inside = threading.Event()

    def interrupt(name):
        inside.set()
        with big:
            pass

    host = Host()
    host.smmu.on_interrupt = interrupt
    bad = np.full(5000, BAD, np.uint64)
    with big:
        batch = threading.Thread(
            target=lambda: host.smmu.translate_batch(small.STAGE1, bad), daemon=True)
        batch.start()
        wait_for(inside, "the interrupt")
        done = threading.Event()

        def command():
            host.smmu.command("TLBI_NSNH_ALL")
            done.set()

        threading.Thread(target=command, daemon=True).start()
        wait_for(done, "the register write")
    batch.join(20)
    assert not batch.is_alive()


# --- long runs of commands ---


def long_queue(count_lg2, name="TLBI_NH_VA", **fields):
    memory = Memory()
    memory.add_private(0, 1 << 26)
    smmu = Smmu(memory, cr0=0b1000, cmdq_base=1 << 25 | count_lg2, caches=Caches.server())
    word = layout.pack(name, **fields).to_bytes(16, "little")
    memory.write(1 << 25, word * ((1 << count_lg2) - 1))
    return smmu


LAST = (1 << 19) - 1  # where a long queue ends


def rewind(smmu):
    """The commands of a long queue stand before the SMMU again."""
    smmu.write("CR0", 0)
    smmu.write("CMDQ_PROD", 0)
    smmu.write("CMDQ_CONS", 0)
    smmu.write("CR0", 0b1000)


def test_other_threads_go_on_beside_a_long_run_of_commands():
    smmu = long_queue(19)
    between = threading.Event()

    def look():
        while not between.is_set():
            if 0 < smmu.read("CMDQ_CONS") < LAST:
                between.set()
            time.sleep(0.0005)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    for _ in range(1000):  # a busy machine may let the other thread sleep through a run
        smmu.write("CMDQ_PROD", LAST)
        assert smmu.read("CMDQ_CONS") == LAST
        if between.is_set():
            break
        rewind(smmu)
    assert between.is_set()
    thread.join()


def test_a_signal_ends_a_long_run_between_two_commands():
    smmu = long_queue(19)

    class AlarmError(Exception):
        pass

    def alarm(*_):
        raise AlarmError

    old = signal.signal(signal.SIGALRM, alarm)
    try:
        for k in range(1000):  # the alarm may come before the run or after it
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 * (1 + k % 20))
                smmu.write("CMDQ_PROD", LAST)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except AlarmError:
                if 0 < smmu.read("CMDQ_CONS") < LAST:
                    break
            rewind(smmu)
        else:
            pytest.fail("no signal was heard in a run")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    smmu.write("CMDQ_PROD", LAST)  # and it goes on
    assert smmu.read("CMDQ_CONS") == LAST


def test_sync_waits_for_the_run_of_another_thread():
    smmu = long_queue(19)
    run = threading.Thread(target=smmu.write, args=("CMDQ_PROD", (1 << 19) - 1))
    run.start()
    while smmu.read("CMDQ_CONS") == 0 and run.is_alive():
        time.sleep(0.0002)
    smmu.sync()
    assert smmu.read("CMDQ_PROD") == smmu.read("CMDQ_CONS")
    run.join()


def test_caches_are_looked_at_beside_a_batch():
    host = Host()
    iova = np.full(1 << 18, small.RW, np.uint64)
    iova[1::2] = small.RO
    stop = threading.Event()

    def batches():
        while not stop.is_set():
            assert (host.smmu.translate_batch(small.STAGE1, iova)["action"] == 0).all()

    thread = threading.Thread(target=batches)
    thread.start()
    caches = host.smmu.caches
    try:
        for _ in range(60):
            for entry in caches.tlb:
                assert entry.lg2 == 12 and entry.kind == "stage 1"
            caches.lookup(small.RW, asid=7)
            caches.tlbi("TLBI_NH_ALL")
            caches.cfgi("CFGI_ALL")
            caches.fill_walk(WalkEntry(1 << 50, 0))
            caches.copy()
            caches.reset_counters()
            caches.invalidate_all()
    finally:
        stop.set()
        thread.join()
    assert not host.smmu.stale()


# --- forks ---

FORK = """
import os, sys, threading, time
import numpy as np
import small
from smmufast import Caches, Features, Memory, Smmu
with_caches, where = sys.argv[1] == "caches", sys.argv[2]
memory = Memory()
memory.add(bytearray(small.build()), small.BASE)
memory.add(bytearray(1 << 16), 0x4000_0000)
smmu = Smmu(memory, Features.full().replace(msi=0), **small.registers(), cr0=0b1101,
            caches=Caches.server() if with_caches else None, eventq_base=0x4000_0000 | 6,
            cmdq_base=0x4000_4000 | 6)
smmu.write("IRQ_CTRL", 7)
iova = np.full(1 << 18, small.RW, np.uint64)
iova[7::4096] = small.UNMAPPED           # records, too
stop = False
def batches():
    while not stop:
        smmu.translate_batch(small.STAGE1, iova)
def use():
    assert smmu.translate(small.STAGE1, small.RW).pa == 0x4000_1000
    assert (smmu.translate_batch(small.STAGE1, [small.RW] * 1000)["pa"] == 0x4000_1000).all()
    smmu.command("CFGI_ALL"); smmu.command("TLBI_NSNH_ALL"); smmu.sync()
    smmu.write("EVENTQ_CONS", smmu.read("EVENTQ_PROD"))
    before = smmu.read("EVENTQ_PROD")
    assert smmu.translate(small.STAGE1, small.UNMAPPED).event
    assert smmu.read("EVENTQ_PROD") != before
    if smmu.caches is not None:
        list(smmu.caches.tlb); smmu.caches.invalidate_all()
    memory.add(bytearray(64), 0x10_0000); memory.remove(0x10_0000)
    smmu.save()
threads = [threading.Thread(target=batches, daemon=True) for _ in range(2)]
for thread in threads: thread.start()
time.sleep(0.05)
def once():
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            use()
            status = 0
        except BaseException:
            import traceback; traceback.print_exc()
        finally:
            os._exit(status)
    end = time.time() + 20
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: break
        if time.time() > end:
            os.kill(pid, 9); os.waitpid(pid, 0); print("the child hangs"); os._exit(1)
        time.sleep(0.001)
    if status:
        print("the child failed"); os._exit(1)
for _ in range(int(where)): once()
stop = True
for thread in threads: thread.join()
use()
print("fine")
"""


@pytest.mark.parametrize("count", [5, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("caches", ["caches", "none"])
def test_a_fork_beside_a_batch_gives_a_child_that_works(caches, count):
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join(filter(None, [str(TESTS / "support"), *given]))
    done = subprocess.run([sys.executable, "-P", "-c", FORK, caches, str(count)],
                          capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": path})  # fmt: skip
    assert done.returncode == 0 and "fine" in done.stdout, done.stdout + done.stderr[-2000:]


def test_a_fork_in_a_callback_leaves_what_the_callback_uses():
    """The child goes on in the callback; the regions are in use there as before."""
    host = Host()
    told = []

    def interrupt(name):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                host.memory.add(bytearray(64), 0x10_0000)
            except BufferError:
                status = 0
            finally:
                os._exit(status)
        told.append(os.waitpid(pid, 0)[1])

    host.smmu.on_interrupt = interrupt
    host.smmu.translate_batch(small.STAGE1, [BAD] * 100)
    assert told == [0]


def test_a_table_at_work_in_another_thread_is_told_of_in_the_child():
    from smmufast._driver.tables import Pages, PageTable

    inside, go = threading.Event(), threading.Event()
    ram = bytearray(1 << 16)

    def write(address, data):
        if armed:
            inside.set()
            go.wait(20)
        ram[address : address + len(data)] = data
        return True

    armed = []
    memory = Memory()
    memory.add_callback(0, 1 << 16, lambda a, n: bytes(ram[a : a + n]), write)
    table = PageTable(Pages(memory, 0, 1 << 16))
    armed.append(1)
    thread = threading.Thread(target=table.map, args=(0, 0x1000, 0x1000))
    thread.start()
    wait_for(inside, "the callback")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            table.map(0x5000, 0x1000, 0x1000)
        except RuntimeError as error:
            status = "forked" not in str(error)
        finally:
            os._exit(status)
    go.set()
    end = time.time() + 20
    while not (found := os.waitpid(pid, os.WNOHANG))[0] and time.time() < end:
        time.sleep(0.001)
    if not found[0]:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    thread.join()
    assert found[0] and found[1] == 0, "the child hangs, or was not told"
    assert table.mapped == 0x1000
