"""Buffers mapped as a kernel's DMA API does it: an IOVA is chosen, mapped, and given back."""

from smmufast import Caches
from smmufast.iommu import DmaMapper, IovaAllocator, NoSpace, Prot, System

system = System(caches=Caches.server)
nic = system.device(8)
domain = nic.paging_domain()
nic.attach(domain)

# a device of 32 bits, and a doorbell that must stay free
iovas = IovaAllocator(0x1_0000, (1 << 48) - 1, 4096)
iovas.reserve(0xFEE0_0000, 0xFEEF_FFFF)
mapper = DmaMapper(domain, iovas, limit=(1 << 32) - 1)

packet = mapper.dma_map(0x8000_0123, 1500, Prot.READ)
ring = mapper.dma_map(0x9000_0000, 0x4000)
print(f"packet at {packet:#x}, ring at {ring:#x}")
print(f"packet's last byte: {nic.translate(packet + 1499).pa:#x}")
print(f"write to it: {nic.translate(packet, write=True).event.name}")

mapper.dma_unmap(packet, 1500)
print(f"afterwards: {nic.translate(packet).event.name}; stale: {system.stale()}")
mapper.dma_unmap(ring, 0x4000)
print(f"left mapped: {domain.mapped}, IOVAs in use: {len(iovas)}")
try:
    mapper.dma_map(0, 1 << 33)
except NoSpace as error:
    print(f"refused: {error}")
