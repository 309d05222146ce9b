"""A PCIe device with an ATC: it asks for translations and for a missing page, and forgets."""

from smmufast import Memory, Smmu, layout
from smmufast.ats import AtsDevice, PageRequest

STREAM_TABLE, CONTEXTS, TABLES, COMMANDS, PAGES = (
    0x4000_0000, 0x4001_0000, 0x4010_0000, 0x4020_0000, 0x4030_0000,
)  # fmt: skip
SID, PASID = 3, 5

memory = Memory()
memory.add_private(0x4000_0000, 0x4000_0000)


def write(record: str, address: int, **fields: int) -> None:
    """Put a record into memory."""
    memory.write(address, layout.to_bytes(record, layout.pack(record, **fields)))


def map_page(iova: int, pa: int) -> None:
    """Map a page of the first 2 MiB for read and write."""
    write("PTE_S1", TABLES + 0x2000 + 8 * (iova >> 12), Valid=1, Type=1, AF=1, AP=1, nG=1,
          Addr_4K=pa)  # fmt: skip


# Stream 3 may use ATS, and has CDs for PASIDs up to 7; without a PASID it is not translated.
write("STE", STREAM_TABLE + 64 * SID, V=1, Config=0b101, S1ContextPtr=CONTEXTS, S1CDMax=3,
      S1DSS=1, EATS=1, SHCFG=1)  # fmt: skip
write("CD", CONTEXTS + 64 * PASID, V=1, AA64=1, A=1, R=1, T0SZ=25, TG0=0, IPS=2, EPD1=1, ASID=7,
      TTB0=TABLES, MAIR0=0xFF)  # fmt: skip
write("PTE_S1_TABLE", TABLES, Valid=1, Type=1, Addr_4K=TABLES + 0x1000)
write("PTE_S1_TABLE", TABLES + 0x1000, Valid=1, Type=1, Addr_4K=TABLES + 0x2000)
map_page(0x1000, 0x5000_3000)

smmu = Smmu(memory, strtab_base=STREAM_TABLE, strtab_base_cfg=4, cmdq_base=COMMANDS | 4,
            priq_base=PAGES | 4, cr0=0b11111)  # fmt: skip


def serve(asked: PageRequest) -> None:
    """What software does with a page request: map the page, answer the group."""
    at = PAGES + 16 * (smmu.read("PRIQ_CONS") & 15)
    print("software reads:", layout.unpack("PRI", memory.read(at, 16)))
    smmu.write("PRIQ_CONS", smmu.read("PRIQ_CONS") + 1)
    map_page(asked.address, 0x5000_8000)
    smmu.command("PRI_RESP", StreamID=SID, SSV=1, SubstreamID=PASID, PRGIndex=asked.prg_index,
                 Resp=2)  # fmt: skip
    smmu.sync()


device = AtsDevice(smmu, SID, on_page_request=serve)
for iova in (0x1000, 0x1008, 0x2000, 0x2010):
    print(f"write at {iova:#x} goes to {device.access(iova, ssid=PASID, write=True).pa:#x}")
print(f"{device.hits} hits, {device.misses} misses, {device.requests} requests, {device!r}")

# Software moves a page: the TLB and the ATC are told.
map_page(0x1000, 0x5000_9000)
smmu.command("TLBI_NH_VA", ASID=7, Address=0x1000, Leaf=1)
smmu.command("ATC_INV", StreamID=SID, SSV=1, SubstreamID=PASID, Address=0x1000)
smmu.sync()
print(f"read at 0x1000 comes from {device.access(0x1000, ssid=PASID).pa:#x}")
