"""Auxiliary domains as the 2018 proposal had them: one device, one address space for each guest."""

from smmufast import Caches
from smmufast.iommu import AUX, Busy, System

system = System(profile=AUX, caches=Caches.server)
nic = system.device(8, pasid_bits=16, ats=True)
main = system.paging_domain()
nic.attach(main)  # the non-PASID address space, and the CD table of all
main.map(0x1000, 0x8000_0000, 0x1000)
nic.enable_feature("AUX")

guests = []
for number in range(3):
    guest = nic.mediated()
    domain = system.paging_domain()
    guest.attach(domain)  # takes a PASID, an ASID and a page table; writes one CD
    domain.map(0x1000, 0x9000_0000 + 0x1000 * number, 0x1000)
    guests.append(guest)

for guest in guests:
    print(f"pasid {guest.pasid}: {guest.translate(0x1000).pa:#x}")
print(f"no pasid: {nic.translate(0x1000).pa:#x}")
try:
    nic.detach(main)
except Busy as error:
    print(f"refused: {error}")
guests[0].detach()
print(nic.translate(0x1000, pasid=1).event.name, system.stale())
