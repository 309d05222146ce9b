"""A batch through caches leaves what the same requests one by one leave, hits above all.

With vectors and without: rows, replacement state, counters, contents and events.
"""

import pickle

import numpy as np
import pytest

from smmufast import ACTIONS, Caches
from smmufast._device.smmu import vectors
from smmufast._engine.tlb import POLICIES
from smmufast.iommu import System

IOVA = 0x34_5600_0000
SIDS = (8, 9)
NONE = 0xFFFF_FFFF
ROW = np.dtype([("pa", "u8"), ("action", "u1"), ("event", "u1")])


@pytest.fixture(params=["vectors", "portable"], autouse=True)
def path(request):
    """Which loop takes the hits."""
    was = vectors()
    vectors(request.param == "vectors")
    yield
    vectors(was)


class Machine:
    """Two devices with a PASID each; pages, some read-only, clean or nowhere, and blocks."""

    def __init__(self, caches, *, blocks=False):
        self.system = System(caches=caches)
        self.smmu = self.system.iommus[0].smmu
        for n, sid in enumerate(SIDS):
            device = self.system.device(sid, pasid_bits=4)
            domains = [device.paging_domain(dirty=n == 0), device.paging_domain()]
            device.attach(domains[0])
            device.attach_pasid(domains[1], 1)
            for domain in domains:
                base = 0x1_0000_1000 + (len(SIDS) * n << 32)
                domain.map(IOVA, base, 0x6_0000)
                domain.map(IOVA + 0x6_0000, base + 0x10_0000, 0x1_0000, 1)  # READ
                if blocks:
                    domain.map(IOVA + 0x20_0000, 0x8000_0000, 0x20_0000)

    def state(self):
        """Return everything that a batch may change but memory."""
        return pickle.dumps(self.smmu.caches), self.smmu.read("EVENTQ_PROD")

    def one_by_one(self, sid, ssid, iova, write):
        """Return the rows of requests, each translated by itself."""
        rows = np.zeros(len(iova), ROW)
        for i in range(len(iova)):
            result = self.smmu.translate(
                int(sid[i]), int(iova[i]), ssid=None if ssid[i] == NONE else int(ssid[i]),
                write=bool(write[i]),
            )  # fmt: skip
            event = 0 if result.event is None else result.event.number
            rows[i] = result.pa or 0, ACTIONS.index(result.action), event
        return rows


def requests(rng, n, *, pages=100, pairs=1, writes=0.3, blocks=False):
    """Return columns of requests, pairs in runs, of which most hit a TLB that holds the pages."""
    page = rng.integers(0, pages, n)
    iova = np.uint64(IOVA) + (page << 12 | rng.integers(0, 1 << 12, n)).astype(np.uint64)
    which = rng.random(n)
    iova[which < 0.01] = rng.integers(0, 1 << 64, int((which < 0.01).sum()), dtype=np.uint64)
    if blocks:
        iova[which > 0.7] += np.uint64(0x20_0000)
    run = np.cumsum(rng.random(n) < 0.03) if pairs > 1 else np.zeros(n, int)
    pair = rng.integers(0, pairs, run[-1] + 1)[run]
    sid = np.where(pair & 1, SIDS[1], SIDS[0]).astype(np.uint32)
    ssid = np.where(pair & 2, 1, NONE).astype(np.uint32)
    return sid, ssid, iova, rng.random(n) < writes


def check(caches, seed, *, blocks=False, batch=None, **kinds):
    """Both ways, over and over: the same rows and the same state after each batch."""
    rng = np.random.default_rng(seed)
    alone, other = Machine(caches, blocks=blocks), Machine(caches, blocks=blocks)
    assert alone.state() == other.state()
    hits = 0
    for n in (1, 40, 7, 400, 8, 33, 64, 300):
        sid, ssid, iova, write = requests(rng, n, blocks=blocks, **kinds)
        rows = (batch or translate)(other.smmu, sid, ssid, iova, write)
        wanted = alone.one_by_one(sid, ssid, iova, write)
        for name in ROW.names:
            assert (rows[name] == wanted[name]).all(), (n, name)
        assert alone.state() == other.state(), n
    if other.smmu.caches.tlb is not None:
        hits = other.smmu.caches.tlb.hits
    return hits


def translate(smmu, sid, ssid, iova, write):
    """Call translate_batch, with what all requests have in common as scalars."""
    if (sid == sid[0]).all() and (ssid == ssid[0]).all():
        sid, ssid = int(sid[0]), None if ssid[0] == NONE else int(ssid[0])
    if (write == write[0]).all():
        write = bool(write[0])
    return smmu.translate_batch(sid, iova, ssid=ssid, write=write)


@pytest.mark.parametrize("config", [(1, 4), None], ids=["configuration cached", "not cached"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sets", [32, 16])
def test_hits_leave_what_they_leave_one_by_one(policy, sets, config):
    made = lambda: Caches(ste=config, cd=config, tlb=(sets, 4, policy), walk1=(4, 4))  # noqa: E731
    for kinds in ({"writes": 0}, {"writes": 1}, {}, {"pairs": 4}, {"pairs": 4, "writes": 0}):
        assert check(made, 1, **kinds) > 200


@pytest.mark.parametrize("ways", [1, 2, 8, 3])
def test_other_ways(ways):
    assert check(lambda: Caches(ste=(1, 4), cd=(1, 4), tlb=(32, ways)), 2, pairs=4) > 100


@pytest.mark.parametrize("given", [
    {"ste": (1, 4)}, {"cd": (1, 4)}, {}, {"ste": (1, 1), "cd": (1, 1)},
], ids=["STEs alone", "CDs alone", "neither", "one of each"])  # fmt: skip
def test_configuration_that_is_not_cached(given):
    assert check(lambda: Caches(tlb=(64, 4), **given), 3, pairs=4) > 200


def test_pages_and_blocks_mixed():
    made = lambda: Caches(ste=(1, 4), cd=(1, 4), tlb=(32, 4))  # noqa: E731
    assert check(made, 4, blocks=True, pairs=4) > 200


def structured(smmu, sid, ssid, iova, write):
    out = np.zeros(len(iova), ROW)
    return smmu.translate_batch(sid, iova, ssid=ssid, write=write, out=out)


def one_column(smmu, sid, ssid, iova, write):
    rows = np.zeros(len(iova), ROW)
    once = Machine(None).smmu.translate_batch(sid, iova, ssid=ssid, write=write)
    rows["action"], rows["event"] = once["action"], once["event"]
    pa = iova.copy()
    smmu.translate_batch(sid, pa, ssid=ssid, write=write, out={"pa": pa})  # in place
    rows["pa"] = pa
    return rows


def every_other(smmu, sid, ssid, iova, write):
    sid, ssid, iova, write = (np.repeat(each, 2)[::2] for each in (sid, ssid, iova, write))
    return smmu.translate_batch(sid, iova, ssid=ssid, write=write)


def backwards(smmu, sid, ssid, iova, write):
    iova = iova[::-1].copy()[::-1]
    out = {name: np.zeros(len(iova), ROW[name])[::-1] for name in ROW.names}
    smmu.translate_batch(sid, iova, ssid=ssid, write=write, out=out)
    return out


@pytest.mark.parametrize("how", [structured, one_column, every_other, backwards])
@pytest.mark.parametrize("pairs", [1, 4])
def test_columns_of_any_distance(how, pairs):
    made = lambda: Caches(ste=(1, 4), cd=(1, 4), tlb=(32, 4))  # noqa: E731
    assert check(made, 5, batch=how, pairs=pairs) > 200


@pytest.mark.parametrize("config", [(1, 4), None], ids=["configuration cached", "not cached"])
def test_configuration_that_a_batch_itself_changes(config):
    """An event record lies where a CD was: whoever caches no CDs meets what it has become."""
    rows = []
    for each in (False, True):
        machine = Machine(lambda: Caches(ste=config, cd=config, tlb=(32, 4)))
        smmu, memory = machine.smmu, machine.system.memory
        smmu.translate_batch(8, np.full(8, IOVA, np.uint64))
        found = machine.smmu.translate(8, IOVA, trace=True).fetches
        if config is None:
            [cd] = [fetch.address for fetch in found if fetch.kind == "CD"]
        else:
            [cd] = [
                fetch.address
                for fetch in Machine(None).smmu.translate(8, IOVA, trace=True).fetches
                if fetch.kind == "CD"
            ]
        smmu.write("CR0", smmu.read("CR0") & ~4)  # EVENTQEN
        smmu.write("EVENTQ_BASE", cd)
        smmu.write("EVENTQ_PROD", 0)
        smmu.write("EVENTQ_CONS", 0)
        smmu.write("CR0", smmu.read("CR0") | 4)
        iova = np.full(40, IOVA, np.uint64)
        iova[20] = 0x7000_0000  # unmapped
        if each:
            found = np.array([
                int(smmu.translate(8, int(address)).pa or 0) for address in iova
            ])  # fmt: skip
        else:
            found = smmu.translate_batch(8, iova)["pa"]
        rows.append((found.tolist(), pickle.dumps(smmu.caches), memory.read(cd, 64)))
    assert rows[0] == rows[1]
    assert rows[0][0][19] != 0
    assert (rows[0][0][21] == 0) == (config is None)
