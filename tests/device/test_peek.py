"""Looking without touching: what would come of an access, and nothing that comes of it."""

import cachetwin
import numpy as np
import pytest

from smmufast import ACTIONS, COLUMNS, Caches, Memory, Smmu, layout

FIELDS = ("action", "pa", "ipa", "stage", "level", "page_lg2", "perm", "attr", "shareability",
          "why")  # fmt: skip
NAMES = tuple(COLUMNS)


def state(side):
    """Everything of a host that an access could leave something in."""
    smmu = side.smmu
    return (
        smmu.save(),
        [bytes(data) for _, data in side.system.memory.regions()],
        smmu.caches.counters if smmu.caches is not None else None,
        [str(stall) for stall in smmu.stalls],
    )


def told(result):
    """What two Results of one access have in common when one of them was looked at."""
    values = [getattr(result, name) for name in FIELDS]
    record = None
    if result.fault is not None:
        record = bytearray(result.fault.record)
        if result.action == "stall":
            record[8:10] = b"\0\0"  # STAG
    return values, record


@pytest.mark.parametrize("first", [0, pytest.param(25, marks=pytest.mark.slow)])
def test_a_look_leaves_everything_as_it_was_and_tells_what_comes(first):
    kinds = set()
    for seed in range(first, first + 25):
        rng, system, requests, queue = cachetwin.prepare(seed)
        geometry = cachetwin.random_caches(rng)
        for caches in (geometry(), None):
            side = cachetwin.Side(system, caches)
            for request in rng.choices(requests, k=30):
                sid, iova, more = cachetwin.arguments(request)
                before = state(side)
                looked = side.smmu.translate(sid, iova, **more, peek=True)
                assert state(side) == before, (seed, request)
                came = side.smmu.translate(sid, iova, **more)
                if queue != "small":  # else a record may be lost, and no transaction stalls
                    assert told(looked) == told(came), (seed, request)
                kinds.add(came.action)
    assert {"ok", "abort", "bypass"} <= kinds


def test_every_face_looks():
    for seed in range(12):
        rng, system, requests, _ = cachetwin.prepare(seed)
        geometry = cachetwin.random_caches(rng)
        for caches in (geometry(), None):
            side = cachetwin.Side(system, caches)
            for request in rng.choices(requests, k=10):
                sid, iova, more = cachetwin.arguments(request)
                side.smmu.translate(sid, iova, **more)
            pool = rng.choices(requests, k=60)
            before = state(side)
            sids = np.array([r.sid for r in pool], np.uint32)
            ssids = np.array([0xFFFFFFFF if r.ssid is None else r.ssid for r in pool], np.uint32)
            iovas = np.array([r.iova for r in pool], np.uint64)
            flags = {name: np.array([getattr(r, name) for r in pool])
                     for name in ("write", "priv", "instr")}  # fmt: skip
            rows = side.smmu.translate_batch(
                sids, iovas, ssid=ssids, columns=NAMES, peek=True, **flags)  # fmt: skip
            assert state(side) == before
            for row, request in zip(rows, pool, strict=True):
                sid, iova, more = cachetwin.arguments(request)
                looked = side.smmu.translate(sid, iova, **more, peek=True)
                assert ACTIONS[row["action"]] == looked.action
                assert row["pa"] == (looked.pa or 0) and row["why"] == (looked.why or 0)
                if looked.action in ("ok", "bypass", "disabled"):
                    assert side.smmu.pa(sid, iova, **more, peek=True) == looked.pa
                else:
                    with pytest.raises(Exception, match="sid"):
                        side.smmu.pa(sid, iova, **more, peek=True)
                size = min(0x5000, (1 << 64) - iova)
                burst = side.smmu.translate_range(sid, iova, size, **more, peek=True)
                assert bool(len(burst)) == (looked.pa is not None)
                if len(burst):
                    assert burst[0][1] == looked.pa
            assert state(side) == before


def test_injected_errors_do_not_count_a_look():
    memory = Memory()
    memory.add_private()
    memory.write_u64(0x4000_0000, 0b1001)
    smmu = Smmu(memory, strtab_base=0x4000_0000, strtab_base_cfg=0)
    memory.inject_error(kind="STE", nth=2)
    assert [smmu.translate(0, 1, peek=True).action for _ in range(5)] == ["bypass"] * 5
    assert smmu.translate(0, 1).action == "bypass"
    assert [smmu.translate(0, 1, peek=True).action for _ in range(5)] == ["abort"] * 5
    assert smmu.translate(0, 1).fault.name == "F_STE_FETCH"
    assert smmu.translate(0, 1).action == "bypass"


def test_what_is_looked_at_may_be_traced_and_flags_are_checked():
    memory = Memory()
    memory.add_private()
    memory.write_u64(0x4000_0000, 0b1001)
    smmu = Smmu(memory, strtab_base=0x4000_0000, strtab_base_cfg=0, caches=Caches.small())
    (fetch,) = smmu.translate(0, 1, trace=True, peek=True).fetches
    assert (fetch.kind, fetch.address) == ("STE", 0x4000_0000)
    assert len(smmu.caches) == 0
    with pytest.raises(TypeError, match="peek must be"):
        smmu.translate(0, 1, peek="yes")
    with pytest.raises(TypeError, match="peek must be"):
        smmu.translate_batch(0, np.zeros(2, np.uint64), peek=3.5)


def test_a_long_batch_is_looked_at_around_its_faults():
    memory = Memory()
    memory.add_private()
    memory.write(0x4000_0000, layout.to_bytes("STE", layout.pack(
        "STE", V=1, Config=5, S1ContextPtr=0x4001_0000)))  # fmt: skip
    memory.write(0x4001_0000, layout.to_bytes("CD", layout.pack(
        "CD", V=1, AA64=1, A=1, R=1, T0SZ=25, IPS=2, EPD1=1, TTB0=0x4002_0000, HA=1, HD=1)))
    memory.write_u64(0x4002_0000, 0x4003_0003)
    memory.write_u64(0x4003_0000, 0x4004_0003)
    for i in range(512):
        memory.write_u64(0x4004_0000 + 8 * i, (i << 12 | 0x743) if i % 8 else i << 12 | 0x343)
    smmu = Smmu(memory, strtab_base=0x4000_0000, strtab_base_cfg=0, eventq_base=0x4010_0000 | 5)
    before = bytes(memory.read(0x4004_0000, 4096))
    iova = np.arange(5000, dtype=np.uint64) % np.uint64(600) << np.uint64(12)
    looked = smmu.translate_batch(0, iova, columns=NAMES, peek=True)
    assert bytes(memory.read(0x4004_0000, 4096)) == before
    assert smmu.read("EVENTQ_PROD") == 0
    came = smmu.translate_batch(0, iova, columns=NAMES)
    assert bytes(memory.read(0x4004_0000, 4096)) != before
    assert smmu.read("EVENTQ_PROD") != 0
    for name in ("pa", "action", "fault", "why", "page_lg2"):
        assert (looked[name] == came[name]).all(), name
    assert (looked["action"] != 0).sum() > 500
