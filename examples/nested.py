"""A guest's device behind both stages: where its addresses go, and what the hypervisor refuses."""

from smmufast import Features, Memory, Smmu, layout
from smmufast.explain import explain

STREAM_TABLE, STAGE2, GUEST = 0x4000_0000, 0x4010_0000, 0x8000_0000
CONTEXT, TABLES = 0x1_0000, 0x2_0000  # addresses of the guest (IPAs): it lies at GUEST
SID = 3

memory = Memory()
memory.add_private(STREAM_TABLE, 0x1_0000_0000)


def write(record: str, address: int, **fields: int) -> None:
    """Put a record into memory."""
    memory.write(address, layout.to_bytes(record, layout.pack(record, **fields)))


# The hypervisor: both stages.  Stage 2 takes 39 bits from level 1 on, and one block of 1 GiB maps
# the guest's memory.
write("STE", STREAM_TABLE + 64 * SID, V=1, Config=0b111, S1ContextPtr=CONTEXT, SHCFG=1, S2VMID=9,
      S2AA64=1, S2TG=0, S2T0SZ=25, S2SL0=1, S2PS=2, S2R=1, S2TTB=STAGE2)  # fmt: skip
write("PTE_S2", STAGE2, Valid=1, AF=1, S2AP=0b11, MemAttr=0b1111, SH=3, Addr_4K=GUEST)
# The guest: 39 bits, two blocks of 2 MiB at level 2, of which stage 2 maps the first alone.
write("CD", GUEST + CONTEXT, V=1, AA64=1, A=1, R=1, T0SZ=25, TG0=0, IPS=2, EPD1=1, ASID=7,
      TTB0=TABLES, MAIR0=0xFF)  # fmt: skip
write("PTE_S1_TABLE", GUEST + TABLES, Valid=1, Type=1, Addr_4K=TABLES + 0x1000)
for i, ipa in enumerate((0x20_0000, 0x1_0000_0000)):
    write("PTE_S1", GUEST + TABLES + 0x1000 + 8 * i, Valid=1, AF=1, AP=1, SH=3, nG=1, Addr_4K=ipa)

smmu = Smmu(memory, Features(s2p=1, oas=5), strtab_base=STREAM_TABLE, strtab_base_cfg=4)
result = smmu.translate(SID, 0x1234)
print(f"{result.iova:#x} is IPA {result.ipa:#x}, and that is {result.pa:#x}")
print(smmu.translate(SID, 0x20_0000))
print()
print(explain(smmu.translate(SID, 0x20_0000, write=True, trace=True), smmu))
