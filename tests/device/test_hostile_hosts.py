"""Hosts that change things under a running call, or come back into it: no crash, no lost error."""

import copy
import pickle
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import small

import smmufast
from smmufast import Event, Fault, Memory, Smmu


def bypass():
    """A Smmu whose stream 0 bypasses."""
    memory = Memory()
    memory.add_private(0, 1 << 20)
    memory.write_u64(0, 0b1001)
    return Smmu(memory)


def test_outputs_live_until_the_batch_ends():
    smmu = bypass()
    n = 1 << 22
    out = {"pa": np.empty(n, "u8"), "record": np.zeros(n, "V32")}
    dropper = threading.Thread(target=lambda: (time.sleep(0.005), out.clear()))
    dropper.start()
    smmu.translate_batch(0, np.zeros(n, "u8"), out=out)
    dropper.join()
    assert out == {}


def test_inputs_that_change_meanwhile_give_some_defined_row():
    smmu, _ = small.system()
    n = 1 << 16
    iova = np.zeros(n, "u8")
    stop = threading.Event()

    def scribble():
        while not stop.is_set():
            iova[:] ^= np.uint64(1 << 55)

    writer = threading.Thread(target=scribble)
    writer.start()
    try:
        for _ in range(30):
            rows = smmu.translate_batch(1, iova, columns=list(smmufast.COLUMNS))
            assert (rows["action"] < len(smmufast.ACTIONS)).all()
            assert (rows["level"] <= 4).all()
    finally:
        stop.set()
        writer.join()


def test_overlapping_outputs_give_some_defined_row():
    smmu = bypass()
    n = 64
    iova = np.zeros(4 * n, "u8")
    out = {"attr": iova.view("u1")[14::8][:n], "level": np.zeros(n, "i1"), "pa": iova[n : 2 * n]}
    assert smmu.translate_batch(0, iova[:n], out=out) is out


def test_a_fetch_is_answered_once_even_by_an_answer_that_answers():
    smmu = bypass()
    walk = smmu.start_walk(0, 0)

    class Answer(int):
        def to_bytes(self, *_arguments):
            walk.supply(bytes(64))
            return bytes(64)

    with pytest.raises(RuntimeError, match=r"answered meanwhile|done"):
        walk.supply(Answer(5))
    assert walk.result.fault.name == "C_BAD_STE"


def test_callbacks_that_start_batches_end_in_a_recursion_error():
    program = """
import numpy as np
from smmufast import Memory, Smmu

memory = Memory()

def read(address, n):
    smmu.translate_batch(0, np.zeros(1, "u8"))
    return bytes(n)

memory.add_callback(0, 4096, read)
smmu = Smmu(memory)
try:
    smmu.translate_batch(0, np.zeros(1, "u8"))
except RecursionError:
    print("recursion")
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "recursion\n"), done.stderr


def test_interrupts_that_start_batches_end_in_a_recursion_error():
    program = """
import numpy as np
from smmufast import Memory, Smmu

memory = Memory()
memory.add_private(0, 1 << 24)
iova = np.arange(64, dtype=np.uint64)
pairs = np.arange(64, dtype=np.uint32) % 4

def interrupt(name):
    smmu.write("EVENTQ_CONS", smmu.read("EVENTQ_PROD"))
    smmu.translate_batch(pairs, iova)

smmu = Smmu(memory, cr0=0, on_interrupt=interrupt)
smmu.write("EVENTQ_BASE", 0x10_0000 | 8)
smmu.write("STRTAB_BASE", 0x20_0000)
smmu.write("STRTAB_BASE_CFG", 4)
smmu.write("IRQ_CTRL", 7)
smmu.write("CR0", 5)
try:
    smmu.translate_batch(3, iova)
except RecursionError:
    print("recursion")
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "recursion\n"), done.stderr


def test_a_traced_result_that_nobody_made_has_no_fetches():
    traced = type(bypass().translate(0, 0, trace=True))
    assert traced.__new__(traced).fetches == []


def test_the_columns_cannot_be_changed():
    with pytest.raises(TypeError):
        smmufast.COLUMNS["pa"] = np.dtype("u1")


def test_faults_can_be_copied_and_pickled():
    with pytest.raises(Fault) as caught:
        bypass().pa(1, 0)
    for again in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert type(again) is type(caught.value)
        assert str(again) == str(caught.value)
        assert again.result is None
    assert caught.value.result.fault.name == "C_BAD_STREAMID"


def test_records_without_a_known_number_have_a_name_and_fields():
    event = Event(bytes(32))
    assert event.name == "0x00"
    assert event.fields["StreamID"] == 0
    assert "0x00" in repr(event)


def test_an_empty_list_is_an_empty_batch():
    assert len(bypass().translate_batch(0, [])) == 0


def test_a_size_needs_an_address():
    with pytest.raises(ValueError, match="size must be None without address, not 8"):
        Memory().inject_error(size=8)


def test_the_limit_named_is_that_of_the_argument():
    with pytest.raises(ValueError, match=r"sid must be 0 to 0xffffffff, not -1"):
        bypass().translate(-1, 0)


def test_only_translation_tables_have_levels():
    with pytest.raises(ValueError, match=r"level must be None with kind 'CD' .*, not 2"):
        Memory().inject_error(kind="CD", level=2)


def test_the_capsule_is_found_before_anything_was_imported():
    program = (
        "import ctypes; import_ = ctypes.pythonapi.PyCapsule_Import; "
        "import_.restype = ctypes.c_void_p; "
        "print(bool(import_(b'smmufast._smmu._C_API', 0)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_a_walk_is_not_answered_again_while_its_end_is_told():
    memory = Memory()
    memory.add_private(0x9000_0000, 0x1000)
    told = []

    def interrupt(name):
        told.append(name)
        smmu.write("EVENTQ_CONS", smmu.read("EVENTQ_PROD"))
        for data in (None, b"", bytes(64)):
            with pytest.raises(RuntimeError, match="being worked on"):
                walk.supply(data)

    smmu = Smmu(memory, eventq_base=0x9000_0004, on_interrupt=interrupt)
    smmu.write("IRQ_CTRL", 4)
    walk = smmu.start_walk(0, 0)
    walk.supply(bytes(64))
    assert walk.done and told == ["eventq"]
    assert smmu.read("EVENTQ_PROD") == 1
