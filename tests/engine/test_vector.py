"""Vectors and the portable path give the same rows, bit for bit, whatever the tables hold."""

import numpy as np
import pytest

from smmufast import ACTIONS, COLUMNS
from smmufast._device.smmu import vectors
from smmufast.iommu import System

pytestmark = pytest.mark.skipif(not vectors(), reason="the processor has no AVX-512")

ROWS = [("pa", "u8"), ("action", "u1"), ("event", "u1")]
IOVA = 0x34_5600_0000
SIDS = (8, 9, 10, 11)


@pytest.fixture(autouse=True)
def afterwards():
    yield
    vectors(True)


class Tables:
    """Devices with a main domain and two PASIDs; pages and blocks, some of them read-only."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.system = System()
        self.smmu = self.system.iommus[0].smmu
        self.memory = self.smmu.memory
        self.devices = [self.system.device(sid, pasid_bits=4) for sid in SIDS]
        self.domains = []
        for device in self.devices:
            main = device.paging_domain()
            device.attach(main)
            self.domains.append(main)
            for pasid in (1, 2):
                self.domains.append(device.paging_domain())
                device.attach_pasid(self.domains[-1], pasid)
        for n, domain in enumerate(self.domains):
            domain.map(IOVA, 0x1_0000_1000 + (n << 30), 0x40_0000)  # pages
            domain.map(IOVA + 0x80_0000, 0x2_0000_0000 + (n << 30), 0x80_0000)  # 2 MiB blocks
            domain.map(IOVA + 0x100_0000, 0x3_0000_1000, 0x10_0000, 1)  # READ
            domain.map((IOVA >> 30) + 4 << 30, 0x40_0000_0000, 1 << 31)  # 1 GiB blocks

    def both(self, call):
        """Return what a call gives with vectors, which is what it gives without."""
        taken = []
        for on in (True, False):
            vectors(on)
            self.smmu.write("EVENTQ_CONS", self.smmu.read("EVENTQ_PROD"))  # there is room again
            taken.append(call())
        for name in taken[0].dtype.names or [...]:  # not the bytes between columns
            assert taken[0][name].tobytes() == taken[1][name].tobytes(), name
        return taken[0]

    def addresses(self, n):
        """Return n addresses: near what is mapped, and some far away or in the upper half."""
        rng = self.rng
        iova = rng.integers(0, 0x140_0000, n, dtype=np.uint64) + np.uint64(IOVA)
        far = rng.random(n)
        iova[far < 0.02] = rng.integers(0, 1 << 64, int((far < 0.02).sum()), dtype=np.uint64)
        some = (far > 0.9) & (far < 0.95)
        iova[some] = rng.integers(0, 1 << 31, int(some.sum()), dtype=np.uint64) + np.uint64(
            (IOVA >> 30) + 4 << 30
        )
        return iova

    def descriptors(self):
        """Return the addresses of the descriptors that walks of these tables read."""
        found = set()
        for sid in SIDS:
            for iova in (IOVA, IOVA + 0x1000, IOVA + 0x80_0000, IOVA + 0x100_0000,
                         (IOVA >> 30) + 4 << 30):  # fmt: skip
                fetches = self.smmu.translate(sid, iova, trace=True).fetches
                found |= {fetch.address for fetch in fetches if fetch.kind == "TT"}
        return sorted(found)


@pytest.mark.parametrize("n", [1, 7, 15, 16, 17, 31, 32, 33, 127, 128, 129, 255, 256, 257, 1000])
def test_any_number_of_rows(n):
    tables = Tables(n)
    iova = tables.addresses(n)
    rows = tables.both(lambda: tables.smmu.translate_batch(8, iova, columns=list(COLUMNS)))
    few = rows[:40]
    for row, address in zip(few, iova, strict=False):
        one = tables.smmu.translate(8, int(address))
        assert (ACTIONS[row["action"]], int(row["pa"])) == (one.action, one.pa or 0)
        assert row["page_lg2"] == (one.page_lg2 or 0)


@pytest.mark.parametrize("bit", range(64))
def test_every_bit_of_a_descriptor(bit):
    """Flipped in each descriptor in turn: tables of each level, blocks and pages."""
    tables = Tables(bit)
    tables.smmu.write("CR0", tables.smmu.read("CR0") & ~4)  # a table may lie in the event queue
    iova = np.concatenate([tables.addresses(160), np.full(40, IOVA, np.uint64)])
    write = tables.rng.integers(0, 2, len(iova)).astype(bool)
    found = tables.descriptors()
    assert len(found) > 8
    for address in found[:: 1 + bit % 2]:
        old = tables.memory.read_u64(address)
        tables.memory.write_u64(address, old ^ 1 << bit)
        tables.both(lambda: tables.smmu.translate_batch(8, iova, write=write))
        tables.both(lambda: tables.smmu.translate_batch(9, iova, priv=True, instr=True))
        tables.both(lambda: tables.smmu.translate_batch(8, iova, columns=list(COLUMNS)))
        tables.memory.write_u64(address, old)


@pytest.mark.parametrize("seed", range(8))
def test_many_pairs_mixed(seed):
    tables = Tables(seed)
    rng = tables.rng
    n = 700
    sid = rng.choice(np.array([*SIDS, 12, 0xFFFFFFFF], np.uint32), n)
    ssid = rng.choice(np.array([1, 2, 3, 0xFFFFFFFF], np.uint32), n)
    iova = tables.addresses(n)
    write = rng.integers(0, 2, n).astype(bool)
    rows = tables.both(lambda: tables.smmu.translate_batch(sid, iova, ssid=ssid, write=write))
    assert len(set(rows["action"])) > 1
    for k in rng.integers(0, n, 60):
        one = tables.smmu.translate(
            int(sid[k]), int(iova[k]), ssid=None if ssid[k] == 0xFFFFFFFF else int(ssid[k]),
            write=bool(write[k]),
        )  # fmt: skip
        assert (ACTIONS[rows["action"][k]], int(rows["pa"][k])) == (one.action, one.pa or 0)


@pytest.mark.parametrize("seed", range(4))
def test_columns_of_any_distance(seed):
    tables = Tables(seed)
    n = 300
    wide = np.zeros(3 * n, np.uint64)
    wide[::3] = tables.addresses(n)

    def structured():
        out = np.zeros(n, ROWS)
        return tables.smmu.translate_batch(8, wide[::3], out=out)

    def in_place():
        out = wide[::3].copy()
        event = np.zeros(2 * n, np.uint8)
        tables.smmu.translate_batch(8, out, out={"pa": out, "event": event[::2]})
        return np.concatenate([out, event.astype(np.uint64)])

    def backwards():
        return np.array(tables.smmu.translate_batch(8, wide[::-3])["pa"])

    rows = tables.both(structured)
    assert (tables.both(in_place)[:n] == rows["pa"]).all()
    tables.both(backwards)


def test_sequences_at_every_distance():
    tables = Tables(0)
    for stride in (8, 64, 4096, 4160, 0x20_0000, 0x4000_0000):
        iova = np.arange(500, dtype=np.uint64) * np.uint64(stride) + np.uint64(IOVA)
        tables.both(lambda iova=iova: tables.smmu.translate_batch(8, iova))
        tables.both(lambda iova=iova: tables.smmu.translate_batch(8, iova[::-1]))


def test_events_are_recorded_in_order():
    """Records of faults lie in the queue in memory as they do without vectors."""
    logs = []
    for on in (True, False):
        vectors(on)
        tables = Tables(5)
        iova = tables.addresses(2000)
        tables.smmu.translate_batch(8, iova)
        base = tables.smmu.read("EVENTQ_BASE") & ~0x1F & (1 << 52) - 1
        logs.append((tables.smmu.read("EVENTQ_PROD"), tables.memory.read(base, 32 * 64)))
    assert logs[0] == logs[1] and logs[0][0]


def test_tables_in_two_regions():
    """What lies outside of the region in use is found all the same."""
    tables = Tables(3)
    memory = tables.memory
    far = 0xF0_0000_0000_00
    memory.add(bytearray(0x2000), far)
    found = tables.smmu.translate(8, IOVA, trace=True).fetches
    above, last = found[-2].address, found[-1].address & ~0xFFF
    memory.write(far, memory.read(last, 0x1000))
    memory.write_u64(above, far | 3)
    iova = tables.addresses(500)
    before = tables.both(lambda: tables.smmu.translate_batch(8, iova))
    memory.write_u64(above, last | 3)
    assert (tables.both(lambda: tables.smmu.translate_batch(8, iova)) == before).all()


def test_the_last_entry_of_a_region():
    tables = Tables(4)
    memory = tables.memory
    far = 0xF1_0000_0000_00
    memory.add(bytearray(0x1000), far)
    found = tables.smmu.translate(8, IOVA, trace=True).fetches
    memory.write(far, memory.read(found[-1].address & ~0xFFF, 0x1000))
    memory.write_u64(found[-2].address, far | 3)
    iova = np.arange(512, dtype=np.uint64) * np.uint64(4096) + np.uint64(IOVA)
    rows = tables.both(lambda: tables.smmu.translate_batch(8, iova))
    assert (rows["pa"] == iova - np.uint64(IOVA) + np.uint64(0x1_0000_1000)).all()


def test_vectors_are_switched():
    assert vectors(False) is False and vectors() is False
    assert vectors(True) is True and vectors() is True
