"""Whether the driver half grows: threads that bind and exit, many systems, many attachments.

    python -P tests/growth.py [--cycles 26000] [--systems 1000] [--pasids 1000000]

Prints what each leaves behind, and ends with 1 if it is anything.
"""

import argparse
import gc
import resource
import sys
import threading

from smmufast import Caches, Memory
from smmufast.iommu import IDENTITY, AddressSpace, System


def resident():
    """Peak memory of the process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def taken(system):
    """What is handed out: pages, PASIDs, ASIDs, VMIDs."""
    vmids = sum(len(iommu.vmids) for iommu in system.iommus)
    return system.pages.in_use, len(system.pasids), len(system.asids), vmids


def processes(cycles, threads=4):
    """Processes are bound, touch memory, exit and are unbound, in threads of their own."""
    system = System(caches=Caches.server)
    devices = [system.device(8 + n, pasid_bits=16, ats=n % 2 == 1) for n in range(threads)]
    for device in devices:
        device.attach(IDENTITY)
        AddressSpace.of(system)  # the first pages
    before, wrong = None, []

    def run(device, count):
        for n in range(count):
            space = AddressSpace.of(system)
            space.table.map(0x1000, 0x8000_0000 + (n << 12), 0x1000)
            bond = device.bind(space)
            pasid = space.pasid
            if device.access(0x1000, pasid=pasid).pa != 0x8000_0000 + (n << 12):
                wrong.append((device, n))
            if n % 2:
                space.exit()
                bond.unbind()
            else:
                bond.unbind()
                space.exit()
            space.table.close()

    for device in devices:  # CD leaves that the first cycles need stay
        run(device, 50)
    before = taken(system)
    workers = [
        threading.Thread(target=run, args=(device, cycles // threads)) for device in devices
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    problems = [str(each) for each in system.check()]
    return taken(system) == before and not wrong and not problems, (before, taken(system), problems)


def systems(count):
    """Systems over memory of their own, all alive at once."""
    memory = Memory()
    memory.add_private(0, count << 24)
    alive = []
    for n in range(count):
        if n % 2:
            system = System(memory=memory, pages=(n << 24, 1 << 23))
        else:
            own = Memory()
            own.add_private(0, 1 << 24)
            system = System(memory=own, pages=(0, 1 << 23))
        device = system.device(8, pasid_bits=4)
        domain = device.paging_domain()
        device.attach(domain)
        domain.map(0x1000, 0xC0_0000 + n % 256 * 0x1000, 0x1000)
        alive.append((device, 0xC0_0000 + n % 256 * 0x1000))
    good = all(device.translate(0x1000).pa == pa for device, pa in alive)
    return good, f"{count} systems, {resident()} MiB at most"


def pasids(count):
    """One domain on one PASID after another."""
    system = System(caches=Caches.server)
    device = system.device(8, pasid_bits=20)
    domain = device.paging_domain()
    most = device.max_pasids
    for pasid in range(1, most, 1024):  # every leaf of the CD table
        device.attach_pasid(domain, pasid)
        device.detach_pasid(domain, pasid)
    gc.collect()
    before, memory, objects = taken(system), resident(), len(gc.get_objects())
    for n in range(count):
        pasid = 1 + n * 7919 % (most - 1)
        device.attach_pasid(domain, pasid)
        device.detach_pasid(domain, pasid)
    gc.collect()
    grown = len(gc.get_objects()) - objects
    problems = [str(each) for each in system.check()]
    good = taken(system) == before and grown < 100 and not problems
    return good, (before, taken(system), f"{grown} objects, {resident() - memory} MiB", problems)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cycles", type=int, default=26_000)
    parser.add_argument("--systems", type=int, default=1000)
    parser.add_argument("--pasids", type=int, default=1_000_000)
    options = parser.parse_args()
    good = True
    for what, count in (
        (processes, options.cycles), (systems, options.systems), (pasids, options.pasids)
    ):  # fmt: skip
        fine, figures = what(count)
        print(f"{what.__name__}, {count}: {'well' if fine else 'NOT WELL'}, {figures}", flush=True)
        good = good and fine
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
