"""A process shares its memory with two devices: one stalls at faults, one makes page requests.

Nothing is mapped ahead: the process maps a page when a device first asks for it.
"""

from smmufast import Caches
from smmufast.iommu import AddressSpace, PageFault, Prot, System

system = System(caches=Caches.server)
gpu = system.device(8, pasid_bits=16, stall=True)
nic = system.device(9, pasid_bits=16, ats=True, pri=True)
HEAP, PAGE, RAM = 0x7F00_0000_0000, 0x1000, 0x8000_0000


def handler(fault: PageFault) -> bool:
    """Map a page of the heap; refuse what is no memory of the process."""
    page = fault.iova & -PAGE
    how = "write" if fault.write else "read"
    if not HEAP <= page < HEAP + 16 * PAGE:
        print(f"sid {fault.device.sid}: {how} at {fault.iova:#x}: refused")
        return False
    if not process.table.iova_to_phys(page):
        process.table.map(page, RAM + page - HEAP, PAGE, Prot.READ | Prot.WRITE)
    print(f"sid {fault.device.sid}: {how} at {fault.iova:#x}: mapped")
    return True


process = AddressSpace.of(system, handler=handler)
bonds = [device.bind(process) for device in (gpu, nic)]
print(f"pasid {process.pasid} on both")

print(f"gpu writes {gpu.translate(HEAP + 8, pasid=process.pasid, write=True).pa:#x}")
print(f"nic reads {nic.access(HEAP + 16, pasid=process.pasid).pa:#x}")
print(f"nic writes {nic.access(HEAP + 3 * PAGE, pasid=process.pasid, write=True).pa:#x}")
print(f"gpu beyond the heap: {gpu.translate(HEAP - 1, pasid=process.pasid).action}")

process.table.unmap(HEAP, PAGE)  # TLBs and ATCs are told
print(f"gpu again {gpu.translate(HEAP, pasid=process.pasid).pa:#x}, stale: {system.stale()}")

process.exit()
print(f"after the end: {gpu.translate(HEAP, pasid=process.pasid).action}")
for bond in bonds:
    bond.unbind()
print(f"pasids in use: {len(system.pasids)}")
