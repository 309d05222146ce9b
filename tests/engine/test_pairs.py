"""Batches of many pairs: a context is recognised by bytes, and every bit of them counts."""

import itertools
import random

import numpy as np
import pytest

from smmufast import ACTIONS, Features, Memory, Smmu, layout

BASE = 1 << 32
PAGES = BASE + (8 << 20)  # tables of every context: 16 KiB each
COUNT = 5000  # contexts: more than a call remembers
COLUMNS = ("pa", "action", "event", "fault", "perm", "level", "page_lg2", "attr", "stage",
           "why")


def words(record, **fields):
    return np.frombuffer(layout.to_bytes(record, layout.pack(record, **fields)), np.uint64)


class Many:
    """One SMMU whose streams, or whose PASIDs, have contexts that differ in tables and ASIDs."""

    def __init__(self, streams, two_level, tables=3, features=None, regions=()):
        self.streams = streams
        self.ram = np.zeros((16 << 20) // 8, np.uint64)
        memory = Memory()
        ends = (0, *regions, 8 * len(self.ram))
        for first, end in itertools.pairwise(ends):
            memory.add(self.ram[first // 8 : end // 8], BASE + first)
        for i in range(tables):
            at = PAGES + i * 0x4000
            # but for the first entry of level 0, which is used, tables of another context
            self.words(at, 512)[:] = PAGES + (i + 1) % tables * 0x4000 + 0x1000 | 3
            for level in range(3):
                self.put(at + 0x1000 * level, at + 0x1000 * (level + 1) | 3)
            leaf = np.arange(512, dtype=np.uint64) << np.uint64(12) | np.uint64(0x743)
            leaf |= np.uint64(0x4000_0000 * (i + 1))
            leaf[7::8] = 0
            self.words(at + 0x3000, 512)[:] = leaf
        self.cds = self.words(BASE, 8 * COUNT).reshape(COUNT, 8)
        self.cds[:] = words("CD", V=1, AA64=1, A=1, R=1, T0SZ=16, T1SZ=16, TG1=2, IPS=5,
                            MAIR0=0xFF, ASET=1)  # fmt: skip
        rank = np.arange(COUNT, dtype=np.uint64)
        self.cds[:, 1] |= np.uint64(PAGES) + rank % np.uint64(tables) * np.uint64(0x4000)
        self.cds[:, 2] |= np.uint64(PAGES) + (rank + np.uint64(1)) % np.uint64(tables) * np.uint64(
            0x4000
        )
        self.cds[:, 0] |= rank << np.uint64(48)
        ste, level1 = BASE + (2 << 20), BASE + (4 << 20)
        if not streams:
            self.stes = self.words(ste, 8).reshape(1, 8)
            self.stes[0] = words("STE", V=1, Config=5, S1CDMax=13, S1Fmt=2 if two_level else 0,
                                 S1DSS=2, S1ContextPtr=level1 if two_level else BASE)  # fmt: skip
            for i in range(8):
                self.put(level1 + 8 * i, BASE + (i << 16) | 1)
            self.smmu = Smmu(memory, features, strtab_base=ste, strtab_base_cfg=0)
            return
        self.stes = self.words(ste, 8 * COUNT).reshape(COUNT, 8)
        self.stes[:] = words("STE", V=1, Config=5)
        self.stes[:, 0] |= np.uint64(BASE) + rank * np.uint64(64)
        if two_level:
            for i in range(32):
                self.put(level1 + 8 * i, ste + (i << 14) | 9)
        self.smmu = Smmu(
            memory,
            features,
            strtab_base=level1 if two_level else ste,
            strtab_base_cfg=layout.pack("STRTAB_BASE_CFG", FMT=two_level, SPLIT=8, LOG2SIZE=13),
        )

    def words(self, address, count):
        at = (address - BASE) // 8
        return self.ram[at : at + count]

    def put(self, address, value):
        self.words(address, 1)[0] = value

    def batch(self, which, va, **access):
        sid, ssid = (which, None) if self.streams else (0, which)
        return self.smmu.translate_batch(sid, va, ssid=ssid, columns=COLUMNS, **access)

    def agrees(self, which, va, rows=None, **access):
        """A batch gives what its requests give one by one."""
        found = self.batch(which, va, **access)
        for i in range(len(va)) if rows is None else rows:
            one = self.batch(which[i : i + 1], va[i : i + 1], **access)
            for name in COLUMNS:
                assert found[name][i] == one[name][0], (name, i, which[i], hex(int(va[i])))
        return found


def requests(rng, n, upper=0.2):
    which = np.array([rng.randrange(1, COUNT) for _ in range(n)], np.uint32)
    va = np.array(
        [rng.randrange(1 << 21) | (0xFFFF << 48 if rng.random() < upper else 0) for _ in range(n)],
        np.uint64,
    )
    return which, va


SHAPES = pytest.mark.parametrize("two_level", [False, True], ids=["linear", "two levels"])
#: CDs, STEs, level-1 tables and page tables; in one region, or each in its own, or cut in two
REGIONS = pytest.mark.parametrize("regions", [
    (), (2 << 20, 4 << 20, 8 << 20), (1 << 16, 3 << 20, 8 << 20),
], ids=["one region", "four regions", "tables in two regions"])  # fmt: skip
KINDS = pytest.mark.parametrize("streams", [False, True], ids=["PASIDs", "streams"])


@KINDS
@SHAPES
@REGIONS
def test_many_pairs_get_what_each_gets_alone(streams, two_level, regions):
    many = Many(streams, two_level, regions=regions)
    rng = random.Random(3)
    which, va = requests(rng, 9000)
    found = many.agrees(which, va, rng.sample(range(9000), 400))
    assert (found["action"] == 0).sum() > 7000 and (found["event"] != 0).sum() > 500
    # the tables are those of the context, by its number
    ok = found["action"] == 0
    upper = va >> np.uint64(63)
    table = (which.astype(np.uint64) + upper) % np.uint64(3)
    wanted = np.uint64(0x4000_0000) * (table + np.uint64(1)) | va & np.uint64(0x1FFFFF)
    assert (found["pa"][ok] == wanted[ok]).all()


@KINDS
@SHAPES
def test_a_structure_that_changes_is_seen_by_the_next_call(streams, two_level):
    many = Many(streams, two_level)
    rng = random.Random(4)
    which, va = requests(rng, 3000, upper=0)
    va &= np.uint64(0x6FFF)
    assert (many.batch(which, va)["action"] == 0).all()
    many.cds[1::2, 0] &= ~np.uint64(1 << 31)  # V
    found = many.agrees(which, va, range(0, 3000, 37))
    assert ((found["action"] == 0) == (which % 2 == 0)).all()
    many.cds[1::2, 0] |= np.uint64(1 << 31)
    many.cds[:, 1] += np.uint64(0)
    many.cds[::4, 1] ^= np.uint64(PAGES) ^ np.uint64(PAGES + 0x4000)
    many.agrees(which, va, range(0, 3000, 37))


@pytest.mark.parametrize("streams, two_level", [(False, True), (True, False)])
@pytest.mark.parametrize("record", ["cds", "stes"])
@REGIONS
def test_every_bit_of_a_structure_counts(streams, two_level, record, regions):
    many = Many(streams, two_level, regions=regions)
    table = getattr(many, record)
    rng = random.Random(5)
    which, va = requests(rng, 400, upper=0.3)
    for bit in range(512):
        one = int(which[rng.randrange(100, 400)]) if record == "cds" or streams else 0
        before = table[one].copy()
        table[one, bit // 64] ^= np.uint64(1 << bit % 64)
        rows = np.flatnonzero(which == one)[:2] if one else [3, 399]
        many.agrees(which, va, rows, write=bool(bit & 1), priv=bool(bit & 2))
        table[one] = before


@pytest.mark.parametrize("two_level", [False, True])
def test_every_bit_of_a_level_1_descriptor_counts(two_level):
    for streams in (False, True):
        many = Many(streams, True)
        level1 = many.words(BASE + (4 << 20), 32)
        rng = random.Random(6)
        which, va = requests(rng, 300)
        for bit in range(64):
            one = (int(which[250]) >> (8 if streams else 10)) if two_level else 0
            before = int(level1[one])
            level1[one] = before ^ 1 << bit
            rows = np.flatnonzero(which >> (8 if streams else 10) == one)[:2]
            many.agrees(which, va, rows)
            level1[one] = before


def test_substreams_that_are_none_among_many():
    many = Many(False, True)
    rng = random.Random(7)
    which, va = requests(rng, 3000)
    odd = {10: 0xFFFFFFFF, 11: 0, 500: 1 << 13, 501: (1 << 20) - 1, 2990: 0xFFFFFFFF, 2999: 0}
    for i, value in odd.items():
        which[i] = value
    for dss in range(4):
        before = many.stes[0].copy()
        many.stes[0] = words("STE", V=1, Config=5, S1CDMax=13, S1Fmt=2, S1DSS=dss,
                             S1ContextPtr=BASE + (4 << 20))  # fmt: skip
        many.agrees(which, va, [*odd, 12, 1000])
        many.stes[0] = before


def test_structures_beyond_the_output_size_fault_though_there_is_memory():
    half, end = 2 << 20, 1 << 32
    ram = np.zeros(2 * half // 8, np.uint64)
    memory = Memory()
    memory.add(ram, end - half)
    for level in range(3):
        ram[512 * level] = end - half + 0x1000 * (level + 1) | 3
    ram[1536:2048] = np.arange(512, dtype=np.uint64) << np.uint64(12) | np.uint64(0x743)
    # L1CDs of SMMUv3.0, which need not name an output address: the leaves of odd ones do not
    ram[4096:4160] = np.uint64(end - half + 0x10000) + (
        np.arange(64, dtype=np.uint64) % np.uint64(2) * np.uint64(half) | np.uint64(1)
    )
    cd = words("CD", V=1, AA64=1, A=1, R=1, T0SZ=32, IPS=0, EPD1=1, TTB0=end - half + 0x1000)
    for leaf in (0x10000, half + 0x10000):
        ram[leaf // 8 : leaf // 8 + 512].reshape(64, 8)[:] = cd
    ram[2048:2056] = words("STE", V=1, Config=5, S1Fmt=1, S1CDMax=12,
                           S1ContextPtr=end - half + 0x8000)  # fmt: skip
    smmu = Smmu(memory, Features(oas=0, arch_minor=0), strtab_base=end - half + 0x4000)
    ssid = np.arange(1, 4096, dtype=np.uint32)
    found = smmu.translate_batch(0, np.zeros(4095, np.uint64), ssid=ssid, columns=COLUMNS)
    assert ((found["action"] == 0) == (ssid >> 6 & 1 == 0)).all()
    assert smmu.translate(0, 0, ssid=64).fault is not None


def test_streams_of_both_kinds_of_table_whose_parts_lie_in_other_regions():
    many = Many(True, True, regions=(1 << 16, 2 << 20, 4 << 20, 8 << 20))
    level1 = BASE + (5 << 20)
    for i in range(8):
        many.put(level1 + 8 * i, BASE + (i << 16) | 1)
    many.stes[::3] = words("STE", V=1, Config=5, S1CDMax=12, S1Fmt=2, S1DSS=2, S1ContextPtr=level1)
    which = np.array([random.Random(1).randrange(COUNT) for _ in range(3000)], np.uint32)
    va = np.arange(3000, dtype=np.uint64) % np.uint64(7) << np.uint64(12)
    found = many.agrees(which, va, range(0, 3000, 7))
    assert (found["action"] == 0).any()
    ssid = np.where(which % 3 == 0, np.arange(3000) % 4000, 0xFFFFFFFF).astype(np.uint32)
    batch = many.smmu.translate_batch(which, va, ssid=ssid, columns=COLUMNS)
    for i in range(0, 3000, 7):
        one = many.smmu.translate_batch(which[i : i + 1], va[i : i + 1], ssid=ssid[i : i + 1],
                                        columns=COLUMNS)  # fmt: skip
        assert batch[i] == one[0]


@pytest.mark.parametrize("more", [{}, {"EPD1": 1}, {"EPD0": 1}, {"EPD0": 1, "EPD1": 1}])
def test_halves_without_tables_say_nothing(more):
    many = Many(False, False)
    for i in range(COUNT):
        many.cds[i] = words(
            "CD", V=1, AA64=1, A=1, R=1, T0SZ=16, T1SZ=16, TG1=2, IPS=5, ASID=i,
            MAIR0=0xFF if i % 2 else 0x44,
            TTB0=PAGES + i % 3 * 0x4000 if "EPD0" not in more else i * 0x7FF0 & ~0xF,
            TTB1=PAGES + i % 3 * 0x4000 if "EPD1" not in more else i * 0x7FF0 & ~0xF,
            HAD0=1, HAD1=1, **more,  # the bit beside the address that tells two shapes apart
        )  # fmt: skip
    rng = random.Random(10)
    which, va = requests(rng, 1500, upper=0.5)
    which = np.concatenate([which, which, which[::-1]])  # found, remembered, remembered
    va = np.concatenate([va, va, va[::-1]])
    many.agrees(which, va, rng.sample(range(4500), 400), instr=True)


def test_a_bypass_is_that_of_a_legal_entry():
    many = Many(True, False, features=Features(oas=4))
    which = np.arange(1, 400, dtype=np.uint32)
    va = np.zeros(399, np.uint64)
    many.stes[:] = words("STE", V=1, Config=5, S1CDMax=3, S1DSS=1, S1ContextPtr=BASE)
    many.stes[200, 0] |= np.uint64(1 << 46)
    found = many.agrees(which, va, [0, 198, 199, 200])
    assert ACTIONS[found["action"][0]] == "bypass"
    assert ACTIONS[found["action"][199]] == "abort"


def test_streams_that_are_none_among_many():
    for two_level in (False, True):
        many = Many(True, two_level)
        which, va = requests(random.Random(8), 2500)
        which[[5, 6, 2400]] = 1 << 13, 0xFFFFFFFF, COUNT + 1
        many.agrees(which, va, [4, 5, 6, 7, 2400, 2401])


def test_contexts_of_more_kinds_than_are_told_apart():
    many = Many(False, False)
    kinds = [{"HAD0": 1}, {"AFFD": 1}, {"T0SZ": 25}, {"WXN": 1}, {"PAN": 1}, {"EPD0": 1},
             {"S": 1}, {"TBI0": 1}, {"AA64": 0}, {"IPS": 0}, {"MAIR0": 4}, {"ENDI": 1}]  # fmt: skip
    same = {"V": 1, "AA64": 1, "A": 1, "R": 1, "T0SZ": 16, "T1SZ": 16, "TG1": 2, "IPS": 5}
    for i in range(COUNT):
        fields = same | {"MAIR0": 0xFF, "ASID": i, "TTB0": PAGES + i % 3 * 0x4000}
        many.cds[i] = words("CD", **fields | kinds[i % 13 - 1] if i % 13 else fields)
    rng = random.Random(9)
    which, va = requests(rng, 4000)
    many.agrees(which, va, rng.sample(range(4000), 300), priv=True)
