"""One process on two accelerators behind SMMUs of different PASID widths, under each policy.

PER_DEVICE gives it a PASID that the narrow accelerator cannot have, and the second bind fails.
SYSTEM_WIDE never hands out such a PASID; SYSTEM_WIDE_STRICT also does without narrower devices.
"""

from smmufast import Features
from smmufast.iommu import (
    PER_DEVICE,
    SYSTEM_WIDE,
    SYSTEM_WIDE_STRICT,
    AddressSpace,
    IommuError,
    NoSpace,
    System,
)

BUFFER, MEMORY = 0x7F00_0000_0000, 0x8000_0000

for policy in (PER_DEVICE, SYSTEM_WIDE, SYSTEM_WIDE_STRICT):
    system = System(
        features=[Features.full(), Features.full().replace(ssidsize=4)], pasid_policy=policy
    )
    wide = system.device(0x10, pasid_bits=20)
    narrow = system.device(0x10, pasid_bits=20, iommu=1)
    tiny = system.device(0x20, pasid_bits=2, iommu=1)
    print(f"{policy.name}: the devices have {[d.max_pasids for d in (wide, narrow, tiny)]} PASIDs")
    others = [AddressSpace.of(system) for _ in range(15)]
    for other in others:
        wide.bind(other).unbind()  # a PASID stays with its process
    process = AddressSpace.of(system)
    process.table.map(BUFFER, MEMORY, 0x1000)
    try:
        wide.bind(process)
    except NoSpace as error:
        print(f"  refused early: {error}")
        others[0].exit()
        wide.bind(process)
    for name, device in (("narrow", narrow), ("tiny", tiny)):
        try:
            device.bind(process)
            result = device.translate(BUFFER, pasid=process.pasid)
            print(f"  {name}: pasid {process.pasid} reaches {result.pa:#x}")
        except IommuError as error:
            print(f"  {name}: {type(error).__name__}: {error}")
