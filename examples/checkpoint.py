"""Save an Smmu with a stalled transaction, restore it twice, and let two hosts end it otherwise."""

import pickle

from smmufast import Caches, Features, Memory, Smmu, layout

STREAM_TABLE, CONTEXT, TABLES, EVENTS = 0x4000_0000, 0x4001_0000, 0x4010_0000, 0x4020_0000
SID = 3

memory = Memory()
memory.add_private(0x4000_0000, 0x4000_0000)


def write(record: str, address: int, memory: Memory = memory, **fields: int) -> None:
    """Put a record into memory."""
    memory.write(address, layout.to_bytes(record, layout.pack(record, **fields)))


# Stream 3 stalls at faults (S=1).  Its table maps the page at 0, and not that at 0x1000.
write("STE", STREAM_TABLE + 64 * SID, V=1, Config=0b101, S1ContextPtr=CONTEXT, SHCFG=1)
write("CD", CONTEXT, V=1, AA64=1, A=1, R=1, S=1, T0SZ=25, TG0=0, IPS=2, EPD1=1, ASID=7,
      TTB0=TABLES, MAIR0=0xFF)  # fmt: skip
write("PTE_S1_TABLE", TABLES, Valid=1, Type=1, Addr_4K=TABLES + 0x1000)
write("PTE_S1_TABLE", TABLES + 0x1000, Valid=1, Type=1, Addr_4K=TABLES + 0x2000)
leaf = {"Valid": 1, "Type": 1, "AF": 1, "AP": 1, "SH": 3, "nG": 1}
write("PTE_S1", TABLES + 0x2000, Addr_4K=0x5000_3000, **leaf)

smmu = Smmu(memory, Features(oas=5), strtab_base=STREAM_TABLE, strtab_base_cfg=4,
            eventq_base=EVENTS | 4, caches=Caches.small())  # fmt: skip
smmu.translate(SID, 0x234)
print("before:", smmu.translate(SID, 0x1234), smmu.stalls)

# The state alone, for a host that keeps its memory by itself.
state = smmu.save()
again = Smmu.restore(state, memory.copy())
again.command("RESUME", StreamID=SID, STAG=again.stalls[0].stag, Ab=1)
print("aborted:", again.stalls, again.caches.tlb.hits, "TLB hits")

# The Smmu with its memory; large buffers go out of band, without a copy.
buffers: list[pickle.PickleBuffer] = []
data = pickle.dumps(smmu, protocol=5, buffer_callback=buffers.append)
size = sum(memoryview(buffer).nbytes for buffer in buffers)
print(f"a pickle of {len(buffers)} buffers, {size >> 10} KiB, of 1 GiB of memory")
other = pickle.loads(data, buffers=[bytes(buffer) for buffer in buffers])
(stall,) = other.stalls
write("PTE_S1", TABLES + 0x2008, other.memory, Addr_4K=0x5000_8000, **leaf)
other.command("RESUME", StreamID=SID, STAG=stall.stag, Ac=1)
print("retried:", stall.result)
print("the first one still has", smmu.stalls)
