"""What is made when it is first needed, by several threads without the GIL, is made once."""

import sys
import threading

import numpy as np
import pytest

from smmufast import Memory, Smmu

BASE = 1 << 30


def rounds(smmus, streams, iova, memory, count):
    """Records that read as zero, of batches that share the first touch of a chunk each round."""
    n = len(smmus)
    start, end = threading.Barrier(n + 1), threading.Barrier(n + 1)
    stop = []

    def work(smmu):
        while True:
            start.wait()
            if stop:
                return
            smmu.translate_batch(streams, iova)
            end.wait()

    threads = [threading.Thread(target=work, args=(smmu,)) for smmu in smmus]
    for thread in threads:
        thread.start()
    lost = 0
    try:
        for k in range(1, count + 1):
            at = [(1 << 40) + (k << 24) + 0x10000 * i for i in range(n)]
            for smmu, base in zip(smmus, at, strict=True):
                smmu.write("CR0", 1)
                smmu.write("EVENTQ_BASE", base | 8)
                smmu.write("EVENTQ_PROD", 0)
                smmu.write("EVENTQ_CONS", 0)
                smmu.write("CR0", 5)
            start.wait()
            end.wait()
            for smmu, base in zip(smmus, at, strict=True):
                assert smmu.read("EVENTQ_PROD") == 200
                records = np.frombuffer(memory.read(base, 6400), np.uint64).reshape(-1, 4)
                lost += int((records[:, 0] == 0).sum())
    finally:
        stop.append(1)
        start.wait()
        for thread in threads:
            thread.join()
    return lost


@pytest.mark.parametrize("count", [300, pytest.param(1500, marks=pytest.mark.slow)])
def test_a_chunk_of_private_memory_that_two_batches_touch_first_is_one(count):
    memory = Memory()
    memory.add_private()
    memory.write_u64(BASE, 0)  # stream 0 is invalid, stream 1 passes
    memory.write_u64(BASE + 64, 0b1001)
    smmus = [
        Smmu(memory, strtab_base=BASE, strtab_base_cfg=1, eventq_base=BASE + 0x10000 * (i + 1) | 8)
        for i in range(2)
    ]
    streams = np.ones(20000, np.uint32)
    streams[-200:] = 0
    old = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        assert rounds(smmus, streams, np.zeros(20000, np.uint64), memory, count) == 0
    finally:
        sys.setswitchinterval(old)
