"""What a stream reaches is what translations of its addresses give."""

import itertools
import random

import captures
import numpy as np
import pytest
import small
import tablegen
import twin
from command import run, run_json

from smmufast import Capture, Memory, Smmu, layout
from smmufast.mappings import LOOKS, mappings

ACCESSES = [{"priv": p, "write": w, "instr": i and not w} for p in (False, True)
            for w in (False, True) for i in (False, True)]  # fmt: skip


def reached(smmu, sid, iova, ssid):
    """The address that some access reaches, by asking them all; None for none."""
    for access in ACCESSES:
        result = smmu.translate(sid, iova, ssid=ssid, peek=True, **access)
        if result.action in ("ok", "bypass", "disabled"):
            return result.pa
    return None


NEAR = 1 << 22


@pytest.mark.parametrize("first", [0, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", ["random_system", "random_nested_system"])
def test_addresses_of_random_systems_are_in_a_range_or_reach_nothing(make, first):
    inside = outside = 0
    for seed in range(first, first + (40 if first else 5)):
        system = getattr(tablegen, make)(random.Random(seed))
        smmu = twin.smmu_of(system)
        for sid, ssid, iova, *_ in system.requests(60):
            if iova >> 55 not in (0, 0x1FF):
                continue  # where the top byte is ignored, a tag of another address
            start, stop = max(0, iova - NEAR), min(1 << 64, iova + NEAR)
            try:
                found = mappings(smmu, sid, ssid, start=start, stop=stop)
            except ValueError as error:
                assert "stream" in str(error)
                continue
            assert found.stopped is None
            at, _ = found.near(iova)
            if at is not None and iova < at.end:
                assert reached(smmu, sid, iova, ssid) == at.pa + iova - at.iova
                inside += 1
            else:
                assert reached(smmu, sid, iova, ssid) is None, (seed, sid, ssid, hex(iova))
                outside += 1
    assert inside > 50 and outside > 20


def test_ranges_go_on_as_long_as_nothing_changes():
    smmu, _ = small.system()
    found = mappings(smmu, small.STAGE1)
    for one, other in itertools.pairwise(found):
        assert one.end <= other.iova
        goes_on = one.end == other.iova and one.pa + one.size == other.pa
        assert not goes_on or one[3:] != other[3:]
    inner = found[1]
    part = mappings(smmu, small.STAGE1, start=inner.iova, stop=inner.iova + 0x1000)
    assert [row.iova for row in part] == [inner.iova]
    assert part[0].size == min(inner.size, 0x1000)
    array = found.array()
    assert array["size"].dtype == np.uint64 and array["iova"].tolist() == [r.iova for r in found]
    assert "UR" in str(found[0])
    assert found.near(0) == (None, found[0]) or found[0].iova == 0


def test_nothing_is_touched_and_caches_are_not_asked():
    smmu, _ = small.system()
    before = smmu.save()
    mappings(smmu, small.STAGE1)
    assert smmu.save() == before


def test_bypass_and_refusals():
    smmu, _ = small.system()
    off = Smmu(smmu.memory, cr0=0)
    (row,) = mappings(off, 3)
    assert (row.iova, row.pa, row.stage) == (0, 0, 0)
    with pytest.raises(ValueError, match=r"stream 0xffff: C_BAD_STREAMID"):
        mappings(Smmu(smmu.memory, strtab_base=smmu.strtab_base, strtab_base_cfg=2), 0xFFFF)
    with pytest.raises(ValueError, match="stop must be"):
        mappings(off, 3, start=5, stop=4)
    with pytest.raises(ValueError, match="sid must be"):
        mappings(off, 1 << 32)


def test_a_table_that_is_its_own_table_ends(monkeypatch):
    assert LOOKS == 1 << 20
    monkeypatch.setattr("smmufast.mappings.LOOKS", 500)
    memory = Memory()
    memory.add_private(0x4000_0000, 1 << 20)
    memory.write(0x4000_0000, layout.to_bytes("STE", layout.pack(
        "STE", V=1, Config=5, S1ContextPtr=0x4001_0000)))  # fmt: skip
    memory.write(0x4001_0000, layout.to_bytes("CD", layout.pack(
        "CD", V=1, AA64=1, A=1, R=1, T0SZ=16, IPS=2, EPD1=1, TTB0=0x4002_0000)))
    memory.write(0x4002_0000, (0x4002_0403 | 0x340).to_bytes(8, "little") * 512)
    found = mappings(Smmu(memory, strtab_base=0x4000_0000, strtab_base_cfg=0), 0)
    assert found.stopped is not None and 0 < found.stopped < 1 << 48


def test_the_command_lists_them_and_a_walk_names_the_nearest():
    out = run("mappings", captures.SHIPPED, "--sid", "0xf8")
    rows = out.splitlines()
    assert rows[-1] == f"{len(rows) - 1} ranges" and len(rows) > 100
    document = run_json("mappings", captures.SHIPPED, "--sid", "0xf8", "--limit", "3")
    assert len(document["mappings"]) == 3 and document["more"] is True
    smmu = Capture.load(captures.SHIPPED)[0].smmu()
    first = document["mappings"][0]
    assert smmu.translate(0xF8, first["iova"], priv=True).pa == first["pa"]
    hole = first["iova"] - 0x1000
    out = run("walk", captures.SHIPPED, "--sid", "0xf8", "--iova", hex(hole))
    assert f"The nearest range above: {first['iova']:#x}-" in out
    nearest = run_json("walk", captures.SHIPPED, "--sid", "0xf8", "--iova", hex(hole))["nearest"]
    assert list(nearest) == ["above"]
    assert "stream 0xffffffff: C_BAD_STREAMID" in run(
        "mappings", captures.SHIPPED, "--sid", "0xffffffff", status=2)  # fmt: skip
