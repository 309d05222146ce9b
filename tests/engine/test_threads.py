"""Several threads give the rows, the events and the memory that one thread gives."""

import numpy as np
import pytest

from smmufast import COLUMNS
from smmufast.iommu import System

N = 100_000
ROWS = [("pa", "u8"), ("action", "u1"), ("event", "u1")]


def system(pasids=0):
    made = System()
    nic = made.device(8, pasid_bits=4)
    main = nic.paging_domain()
    nic.attach(main)
    main.map(0, 0x8000_1000, 8 << 20)
    for pasid in range(1, 1 + pasids):
        domain = nic.paging_domain()
        nic.attach_pasid(domain, pasid)
        domain.map(0, 0x9000_0000 + (pasid << 28), 8 << 20)
    return made, made.iommus[0].smmu


def addresses(seed=0, size=8 << 20):
    return np.random.default_rng(seed).integers(0, size, N, dtype=np.uint64)


def state(smmu):
    """Return what a batch may leave behind: the event queue and its index."""
    base = smmu.read("EVENTQ_BASE") & (1 << 52) - 32
    return smmu.read("EVENTQ_PROD"), smmu.memory.read(base, 32 << 10)


@pytest.mark.parametrize("threads", [2, 3, 7, 64, 1000])
@pytest.mark.parametrize("columns", [None, list(COLUMNS)])
def test_any_number_of_threads(threads, columns):
    _, smmu = system()
    iova = addresses()
    one = smmu.translate_batch(8, iova, columns=columns)
    many = smmu.translate_batch(8, iova, columns=columns, threads=threads)
    for name in one.dtype.names:
        assert (one[name] == many[name]).all()
    assert (one["action"] == 0).all()


@pytest.mark.parametrize("size", [(8 << 20) + 4096, 16 << 20])
def test_faults_are_recorded_in_order(size):
    """Some addresses are not mapped: events lie in the queue as one thread leaves them."""
    found = []
    for threads in (1, 4):
        _, smmu = system()
        rows = smmu.translate_batch(8, addresses(1, size), threads=threads)
        found.append((*(rows[name].tobytes() for name in rows.dtype.names), *state(smmu)))
    assert found[0] == found[1] and found[0][3]


def test_faults_without_a_queue_are_translated_by_all():
    _, smmu = system()
    smmu.write("CR0", smmu.read("CR0") & ~4)
    iova = addresses(2, 16 << 20)
    one = smmu.translate_batch(8, iova)
    many = smmu.translate_batch(8, iova, threads=2)
    assert (one["pa"] == many["pa"]).all() and (one["action"] == many["action"]).all()
    assert 0 < (one["action"] != 0).mean() < 1


def test_pairs_and_flags_of_each_row():
    _, smmu = system(pasids=3)
    rng = np.random.default_rng(3)
    ssid = rng.choice(np.array([1, 2, 3, 0xFFFFFFFF], np.uint32), N)
    write = rng.integers(0, 2, N).astype(bool)
    one = smmu.translate_batch(8, addresses(4), ssid=ssid, write=write)
    many = smmu.translate_batch(8, addresses(4), ssid=ssid, write=write, threads=3)
    assert (one == many).all() and len(np.unique(one["pa"] >> np.uint64(28))) > 3


def test_outputs_over_inputs():
    _, smmu = system()
    iova = addresses(5, 16 << 20)
    expected = smmu.translate_batch(8, iova, columns=["pa"])["pa"].copy()
    smmu.write("EVENTQ_CONS", smmu.read("EVENTQ_PROD"))
    smmu.translate_batch(8, iova, out={"pa": iova}, threads=4)
    assert (iova == expected).all()


def test_backwards_and_far_apart():
    _, smmu = system()
    wide = np.zeros(2 * N, np.uint64)
    wide[::2] = addresses(6)
    out = np.zeros(N, ROWS)
    smmu.translate_batch(8, wide[::-2][::-1][::-1], out=out[::-1], threads=2)
    again = smmu.translate_batch(8, wide[::-2][::-1][::-1])
    assert (out[::-1] == again).all()


@pytest.mark.parametrize("threads, error", [(0, ValueError), (-1, ValueError), ("2", TypeError)])
def test_what_is_no_number_of_threads(threads, error):
    _, smmu = system()
    with pytest.raises(error, match=r"threads(:| must be) "):
        smmu.translate_batch(8, addresses(), threads=threads)
