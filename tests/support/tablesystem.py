"""A page table of the driver half, and the SMMU that walks it: one stream, STE and CD by hand."""

import numpy as np
from ptwriter import encode_cd, encode_ste

from smmufast import Features, Memory, Smmu
from smmufast._driver.tables import Pages, PageTable
from smmufast.layout import OUTPUT_BITS

STREAMS = 0x4000_0000  # the stream table of 16 entries, and a CD
CD = STREAMS + 0x800
TABLES = 0x8000_0000
SID = 3
ASID = 5
VMID = 6
RW = 3


def pages(size=1 << 24, base=TABLES):
    """(Memory, Pages) of private memory."""
    memory = Memory()
    memory.add_private(STREAMS, 0x1000)
    memory.add_private(base, size)
    return memory, Pages(memory, base, size)


def point(memory, table, sid=SID, **cd):
    """Write the STE, and the CD, that lead to a page table."""
    walk = {"ir0": table.irgn, "or0": table.orgn, "sh0": table.sh}
    if table.stage == 1:
        ste = encode_ste(v=1, config=5, s1contextptr=CD)
        fields = {
            "v": 1, "aa64": 1, "a": 1, "r": 1, "aset": 1, "epd1": 1, "asid": ASID,
            "t0sz": table.t0sz, "tg0": table.tg, "ips": table.ps, "ttb0": table.root,
            "mair": table.mair, **walk,
        }  # fmt: skip
        memory.write(CD, encode_cd(**fields | cd))
    else:
        ste = encode_ste(
            v=1, config=6, s2vmid=VMID, s2aa64=1, s2r=1, s2t0sz=table.t0sz, s2sl0=table.sl0,
            s2tg=table.tg, s2ps=table.ps, s2ttb=table.root, s2ir0=table.irgn, s2or0=table.orgn,
            s2sh0=table.sh, s2fwb=int(table.fwb), shcfg=1,
        )  # fmt: skip
    memory.write(STREAMS + 64 * sid, ste)


def features(oas=48, **changes):
    """Everything but small translation tables, with so many bits of output address."""
    return Features(oas=OUTPUT_BITS.index(oas), stt=0, **changes)


def smmu_of(memory, table, **other):
    """The SMMU that judges what a page table wrote."""
    other = {"features": features(table.oas), "strtab_base": STREAMS, "strtab_base_cfg": 4} | other
    return Smmu(memory, other.pop("features"), **other)


class System:
    """A page table in memory of its own, and its SMMU."""

    def __init__(self, *, size=1 << 24, smmu=None, cd=None, kind=PageTable, **table):
        self.memory, self.pages = pages(size)
        self.table = kind(self.pages, **table)
        self.cd = cd or {}
        self.point()
        self.smmu = smmu_of(self.memory, self.table, **(smmu or {}))

    def point(self):
        """Write STE and CD again."""
        if self.table.root:
            point(self.memory, self.table, **self.cd)

    def translate(self, iova, **access):
        """The Result of one access."""
        return self.smmu.translate(SID, iova, **access)

    def pa(self, iova, **access):
        """Where an access goes, None if nowhere."""
        return self.translate(iova, **access).pa

    def many(self, iovas, **access):
        """pa, page_lg2 and event of many accesses, as arrays."""
        found = self.smmu.translate_batch(
            SID, np.array(iovas, np.uint64), columns=("pa", "page_lg2", "event"), **access
        )
        return found["pa"], found["page_lg2"], found["event"]


def words(memory, address, size):
    """Memory as numbers."""
    return np.frombuffer(memory.read(address, size), "<u8")


def live_tables(memory, table):
    """{address: (level, bytes)} of every table that the root leads to."""
    lg2 = table.granule.bit_length() - 1
    found = {}

    def visit(address, level, size):
        data = words(memory, address, size)
        found[address] = (level, data.tobytes())
        if level < 3:
            for d in data[data & 3 == 3].tolist():
                low = d & 0xFFFF_FFFF_F000 & -(1 << lg2)
                visit(low | (d >> 12 & 15) << 48 if lg2 == 16 else low, level + 1, 1 << lg2)

    visit(table.root, table.start_level, max(64, 8 * root_entries(table)))
    return found


def root_entries(table):
    """How many entries the first table has."""
    lg2 = table.granule.bit_length() - 1
    return 1 << table.ias - lg2 - (3 - table.start_level) * (lg2 - 3)


def same(memory, table, twin):
    """Memory holds what the twin holds, bit for bit, and nothing else is a table."""

    def compare(node, address):
        entries = twin.root_entries if node is twin.root else twin.granule // 8
        wanted = np.zeros(entries, np.uint64)
        found = words(memory, address, 8 * entries).copy()
        for index, entry in node.entries.items():
            if hasattr(entry, "entries"):
                d = int(found[index])
                below = d & 0xFFFF_FFFF_FFFF & -twin.granule
                if twin.granule == 65536:
                    below |= (d >> 12 & 15) << 48
                assert twin.pointer(below) == d, (hex(d), index, node.level)
                compare(entry, below)
                found[index] = 0
            else:
                wanted[index] = twin.descriptor(entry)
        assert np.array_equal(found, wanted), (node.level, hex(node.iova))

    compare(twin.root, table.root)
    assert table.mapped == twin.mapped
    assert table.table_bytes == twin.table_bytes
