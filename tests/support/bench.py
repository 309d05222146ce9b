"""One stream, one context, one mapping of which anything can be changed; with a stage 2, or caches.

What a Bench is asked goes through the twin and every face of the library.
"""

from types import SimpleNamespace

import ptwriter
import reference
import tablegen
import twin
from rawfeatures import raw_of
from reference import PR, PW, PX, UR, UW, UX, default_features, event_record, translate

from smmufast import Caches, Memory, Smmu

SID = 5
STREAM_TABLE = 0x10_0000
CONTEXT_TABLE = 0x20_0000
TABLES = 0x100_0000


class Bench:
    """A system with one stream, built from fields."""

    def __init__(self, features=None, cr2=0b10, granule_lg2=12, tsz=16, ttb=0, ds=0, endi=0):
        self.features = features or default_features()
        self.memory = ptwriter.Memory()
        self.memory.add(STREAM_TABLE, 0x1000)
        self.memory.add(CONTEXT_TABLE, 0x10000)
        self.allocate = ptwriter.BumpAllocator(self.memory, TABLES, 0x100000)
        self.regs = SimpleNamespace(
            strtab_base=STREAM_TABLE, strtab_base_cfg=4, cr0=0b101, cr2=cr2, gbpa=0x1000
        )
        self.tables = ptwriter.PageTables(
            self.memory, self.allocate, granule_lg2, tsz, ds=bool(ds), big_endian=bool(endi)
        )
        self.ste = {"v": 1, "config": 0b101, "s1contextptr": CONTEXT_TABLE, "shcfg": 1}
        self.cd = {
            "v": 1, "aa64": 1, "a": 1, "r": 1, "ips": 6, "ds": ds, "endi": endi,
            f"t{ttb}sz": tsz, f"ttb{ttb}": self.tables.base, f"epd{1 - ttb}": 1,
            f"tg{ttb}": (ptwriter.TG0_CODES, ptwriter.TG1_CODES)[ttb][granule_lg2],
            "mair": 0x04_F4_BB_00_0C_04_FF_44,
        }  # fmt: skip
        self.write_ste()
        self.write_cd()

    def write_ste(self, sid=SID, **fields):
        self.ste.update(fields)
        self.memory.write(STREAM_TABLE + 64 * sid, ptwriter.encode_ste(**self.ste))

    def write_cd(self, index=0, **fields):
        self.cd.update(fields)
        self.memory.write(CONTEXT_TABLE + 64 * index, ptwriter.encode_cd(**self.cd))

    def map(self, va, pa, level=3, **flags):
        return self.tables.map(va, pa, level, **{"ap": 1, **flags})

    def translate(self, iova=0, sid=SID, **access):
        """The twin's outcome, once the library has given the same by every face."""
        outcome = translate(self.memory.read, self.features, self.regs, sid, iova, **access)
        request = {"ssid": None, "write": False, "priv": False, "instr": False} | access
        request = tablegen.Request(sid=sid, iova=iova, **request)
        row = twin.expected_row(outcome)
        smmu = twin.smmu_of(self)
        assert twin.row_of(twin.batch(smmu, [request])[0]) == row
        twin.check_pairs(smmu, [request], [row])
        twin.check_faces(smmu, self, request, outcome, row)
        return outcome

    def regions(self):
        return self.memory.regions()

    def read(self, address, size):
        return self.memory.read(address, size)

    def fault(self, iova=0, **access):
        return self.translate(iova, **access).fault


def six(bench, iova=0):
    """Mask of the accesses that succeed, by trying each."""
    mask = 0
    for bit, write, priv, instr in (
        (UR, False, False, False),
        (UW, True, False, False),
        (UX, False, False, True),
        (PR, False, True, False),
        (PW, True, True, False),
        (PX, False, True, True),
    ):
        if bench.translate(iova, write=write, priv=priv, instr=instr).success:
            mask |= bit
    return mask


VMID = 0x1234


def stage2_features(**fields):
    """Everything, of both stages."""
    everything = {"s2p": 1, "httu": 2, "stall_model": 0, "stall_max": 64, "xnx": 1, "fwb": 1}
    return default_features(**everything | fields)


class Nested(Bench):
    """A Bench with a stage 2 that maps CDs and stage-1 tables to themselves, page by page.

    second: keywords of the stage-2 tables; 4K pages and two concatenated tables by default.
    """

    def __init__(self, features=None, config=0b111, second=None, **stage1):
        super().__init__(features or stage2_features(), **stage1)
        shape = {"granule_lg2": 12, "tsz": 24, "start_level": 1} | (second or {})
        self.second = ptwriter.Stage2Tables(self.memory, self.allocate, **shape)
        self.ste |= {"s2ps": 6, "s2r": 1, "s2vmid": VMID, **self.second.ste_fields()}
        self.write_ste(config=config)
        self.map_self(CONTEXT_TABLE)
        for page in range(TABLES, self.allocate.next, 0x1000):
            self.map_self(page)

    def map2(self, ipa, pa, level=3, **flags):
        return self.second.map(ipa, pa, level, **{"s2ap": 3, "memattr": 15, **flags})

    def map_self(self, address, **flags):
        return self.map2(address, address, **flags)

    def map(self, va, pa, level=3, **flags):
        """Map stage 1, and in stage 2 the tables that are made on the way."""
        slot = self.tables.slot(va, level)
        for at in range(self.tables.start_level, level + 1):
            table = self.tables.slot(va, at) & ~0xFFF
            if not self.second.read_descriptor(self.second.slot(table, 3)):
                self.map_self(table)
        super().map(va, pa, level, **flags)
        return slot

    def copied(self):
        """The same system over a copy of memory."""
        return tablegen.System(self.memory.copy(), self.features, self.regs, None)

    def translate(self, iova=0, sid=SID, **access):
        """The twin's outcome, once the library has given the same by every face."""
        request = {"ssid": None, "write": False, "priv": False, "instr": False} | access
        request = tablegen.Request(sid=sid, iova=iova, **request)
        called = [self.copied() for _ in range(4)]
        batched = self.copied()
        outcome = translate(
            self.memory.read, self.features, self.regs, sid, iova, store=self.memory.write, **access
        )
        for number, system in enumerate(called):
            smmu = twin.smmu_of(system)
            twin.check_nested_call(number, smmu, system.memory, self.memory, request, outcome)
            assert system.regions() == self.regions()
        row = twin.batch(twin.smmu_of(batched), [request])[0]
        twin.same(twin.row_of(row), twin.expected_row(outcome), "batch")
        assert batched.regions() == self.regions()
        return outcome

    def descriptor(self, address):
        return int.from_bytes(self.memory.read(address, 8), "little")


def stage2_record(name, event_class, *, ipa=0, iova=0, **more):
    """The record of a read's fault in stage 2."""
    return event_record(
        name, SID, **{"write": False} | more, stage2=True, event_class=event_class, ipa=ipa,
        iova=iova,
    )  # fmt: skip


def stage2_ste(**fields):
    """A stage-2-only STE as a number: 4K, 40 bits of IPA, from level 1 on."""
    ste = {"v": 1, "config": 0b110, "s2aa64": 1, "s2t0sz": 24, "s2sl0": 1, "s2ps": 6} | fields
    return int.from_bytes(ptwriter.encode_ste(**ste), "little")


def is_illegal(features, **fields):
    """Whether the twin refuses such an STE."""
    try:
        reference.check_ste(reference.effective_features(features), stage2_ste(**fields))
    except reference.ConfigurationError:
        return True
    return False


def nested_system(**more):
    """A nested Bench with one page; (bench, IPAs of what a request fetches, iova, IPA of data)."""
    bench = Nested(**more)
    iova, ipa = 0x1234_5000, 0x66_7788_9000
    bench.map(iova, ipa)
    bench.map2(ipa, 0x5000)
    return bench, iova, ipa


IOVA = 0x1234_5000


def cached(bench, caches=None):
    """A Smmu with caches over the bytes of a Bench."""
    memory = Memory()
    for base, data in bench.regions():
        memory.add(data, base)
    features = raw_of(bench.features)
    caches = Caches.small() if caches is None else caches
    return Smmu(memory, features, caches=caches, **vars(bench.regs))


def mapped(features=None, **flags):
    """(Bench with one page, its Smmu with caches, address of the leaf)."""
    bench = Bench(features)
    slot = bench.tables.slot(IOVA, 3)
    bench.map(IOVA, 0x5000, **flags)
    return bench, cached(bench), slot


def outcome(smmu, iova=IOVA, **more):
    """The name of a fault, or the address."""
    result = smmu.translate(SID, iova, **more)
    return result.fault.name if result.fault else result.pa
