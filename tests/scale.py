"""Many PASIDs on one device, and many domains in one system: they work, and an attach costs alike.

Run as a script it takes minutes and gigabytes::

    python -P tests/scale.py

`tests/iommu/test_iommu_scale.py` does the same with fewer of both.
"""

import argparse
import statistics
import time

from smmufast.iommu import System

RAM = 0x8000_0000
PAGE = 0x1000
ASIDS = 60000  # of 65535: stage-1 domains of one system


def many_pasids(pasids_lg2, *, ats=False):
    """Attach every PASID of a device to one domain, use some, detach all; return seconds of each.

    Returns
    -------
    (float, float)
        Processor time of an attach and of a detach.
    """
    system = System()
    device = system.device(1, pasid_bits=pasids_lg2, ats=ats)
    domain = device.paging_domain()
    domain.map(PAGE, RAM, PAGE)
    before = system.pages.in_use
    count = (1 << pasids_lg2) - 1
    start = time.process_time()
    for pasid in range(1, count + 1):
        device.attach_pasid(domain, pasid)
    middle = time.process_time()
    assert device.pasids_in_use == domain.users == count
    for pasid in (1, 1023, 1024, count // 2, count):
        if pasid <= count:
            assert device.translate(PAGE + 5, pasid=pasid).pa == RAM + 5
            assert not device.translate(0, pasid=pasid)
    assert domain.unmap(PAGE, PAGE) == PAGE
    assert not device.translate(PAGE, pasid=count)
    between = time.process_time()
    for pasid in range(1, count + 1):
        device.detach_pasid(domain, pasid)
    end = time.process_time()
    assert device.pasids_in_use == domain.users == 0
    device.release()
    domain.free()
    assert system.pages.in_use <= before
    assert len(system.asids) == 0
    return (middle - start) / count, (end - between) / count


class Domains:
    """A system of so many domains, all of them attached and mapping a page.

    Up to 60000 are of stage 1, each on a PASID of one device; the others are of stage 2, each on a
    device of its own.
    """

    def __init__(self, count):
        self.system = System(2)
        self.device = self.system.device(1, pasid_bits=20)
        self.first = [self.device.paging_domain() for _ in range(min(count, ASIDS))]
        self.devices = [
            self.system.device(0x1000 + n, iommu=1) for n in range(count - len(self.first))
        ]
        self.second = [device.paging_domain(stage=2) for device in self.devices]
        for number, domain in enumerate(self.first):
            domain.map(PAGE, RAM + number * PAGE, PAGE)
            self.device.attach_pasid(domain, number + 1)
        for number, (device, domain) in enumerate(zip(self.devices, self.second, strict=True)):
            domain.map(PAGE, RAM + number * PAGE, PAGE)
            device.attach(domain)

    def check(self):
        """Every domain translates to its own page, and to nothing else."""
        for number in range(len(self.first)):
            found = self.device.translate(PAGE + 8, pasid=number + 1).pa
            assert found == RAM + number * PAGE + 8
        for number, device in enumerate(self.devices):
            assert device.translate(PAGE + 8).pa == RAM + number * PAGE + 8
        assert self.device.translate(PAGE, pasid=len(self.first) + 1).event.name in (
            "C_BAD_CD", "F_CD_FETCH",
        )  # fmt: skip

    def attach_again(self, count):
        """Detach and attach so many of stage 1; return processor seconds of an attach."""
        some = list(enumerate(self.first, 1))[:: max(1, len(self.first) // count)][:count]
        for pasid, domain in some:
            self.device.detach_pasid(domain, pasid)
        start = time.process_time()
        for pasid, domain in some:
            self.device.attach_pasid(domain, pasid)
        return (time.process_time() - start) / len(some)


def growth(few, many, rounds=7):
    """Return how many times an attach takes among many domains, of what it takes among few."""
    both = Domains(few), Domains(many)
    for one in both:
        one.check()
    times = [[one.attach_again(100) for one in both] for _ in range(rounds)]
    return statistics.median(after / before for before, after in times)


def main():
    """Run everything in full."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    for ats in (False, True):
        attach, detach = many_pasids(20, ats=ats)
        print(f"2^20 PASIDs, ATS {ats}: attach {attach * 1e6:.1f} µs, detach {detach * 1e6:.1f} µs")
    print(f"attach among 10^5 domains ÷ among 10^2: {growth(100, 100_000):.2f}")


if __name__ == "__main__":
    main()
