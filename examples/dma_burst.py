"""Build the tables of one device by hand, translate a DMA burst and explain a fault."""

from smmufast import Features, Memory, Smmu, layout
from smmufast.explain import explain

STREAM_TABLE, CONTEXT, TABLES = 0x4000_0000, 0x4001_0000, 0x4010_0000
SID = 3

memory = Memory()
memory.add_private(0x4000_0000, 0x4000_0000)  # 1 GiB of RAM, which costs what is touched


def write(record: str, address: int, **fields: int) -> None:
    """Put a record into memory."""
    memory.write(address, layout.to_bytes(record, layout.pack(record, **fields)))


# A linear stream table of 16 entries; stream 3 has stage 1 and one context descriptor.
write("STE", STREAM_TABLE + 64 * SID, V=1, Config=0b101, S1ContextPtr=CONTEXT, SHCFG=1)
# 4K pages, 39 bits of input address, so that the walk starts at level 1; no upper half.
write("CD", CONTEXT, V=1, AA64=1, A=1, R=1, T0SZ=25, TG0=0, IPS=2, EPD1=1, ASID=7, TTB0=TABLES,
      MAIR0=0xFF)  # fmt: skip
# Levels 1 and 2: one entry each.  Level 3: four pages, of which the last two lie side by side.
write("PTE_S1_TABLE", TABLES, Valid=1, Type=1, Addr_4K=TABLES + 0x1000)
write("PTE_S1_TABLE", TABLES + 0x1000, Valid=1, Type=1, Addr_4K=TABLES + 0x2000)
for i, page in enumerate((0x5000_3000, 0x5000_1000, 0x5000_8000, 0x5000_9000)):
    write("PTE_S1", TABLES + 0x2000 + 8 * i, Valid=1, Type=1, AF=1, AP=1, SH=3, nG=1, Addr_4K=page)

smmu = Smmu(memory, Features(oas=5), strtab_base=STREAM_TABLE, strtab_base_cfg=4)
print(smmu.translate(SID, 0x1234))

segments = smmu.translate_range(SID, 0x800, 0x4000, write=True)
for iova, pa, length in segments:
    print(f"  {length:#6x} bytes at {iova:#6x} go to {pa:#x}")
print("then:", segments.result)
print()
print(explain(smmu.translate(SID, 0x4000, write=True, trace=True), smmu))
