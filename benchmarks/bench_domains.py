"""Attach, bind, map and look up in systems of few and of many domains, beside plain C stores.

A system of so many domains has all of them attached: up to 60000 of stage 1, each on a PASID of one
device (an ASID has 16 bits), the others of stage 2, each on a device of its own behind a second
SMMU.  What is timed goes round SOME of them that lie far apart.

The baselines are the stores alone: the dwords of the descriptors that the call writes, put into
memory by a loop in plain C.  Checks, allocations, commands and what the SMMU does with them are
the library's.
"""

import functools
from functools import partial

import baseline
import numpy as np
from questions import LIBRARY, Question, Run

PAGE = 4096
RAM = 0x8000_0000
STAGE1 = 60000
SOME = 256
COUNTS = {"1 domain": 1, "10^3 domains": 1000, "10^5 domains": 100_000}


class Domains:
    """A system of so many domains; SOME of them map a page."""

    def __init__(self, count):
        from smmufast.iommu import AddressSpace, System

        self.system = System(2)
        self.device = self.system.device(1, pasid_bits=20, stall=True)
        self.first = [self.device.paging_domain() for _ in range(min(count, STAGE1))]
        for pasid, domain in enumerate(self.first, 1):
            self.device.attach_pasid(domain, pasid)
            self.system.pasids.alloc()  # for what is bound, it is in use
        for sid in range(count - len(self.first)):
            device = self.system.device(0x1000 + sid, iommu=1)
            device.attach(device.paging_domain(stage=2))
        step = max(1, len(self.first) // SOME)
        some = [(domain, pasid) for pasid, domain in enumerate(self.first, 1)][::step][:SOME]
        for domain, _ in some:
            domain.map(PAGE, RAM, PAGE)
        self.some = some * (SOME // len(some))
        self.main = self.device.paging_domain(), self.device.paging_domain()
        self.spaces = [AddressSpace.of(self.system) for _ in range(SOME)]


domains = functools.cache(Domains)


@functools.cache
def stores():
    """Return bare tables of 512 descriptors."""
    return baseline.load("_stores", "baseline_stores").Stores(np.ones(512, np.uint64))


def bare(dwords):
    """Store, and clear, so many dwords."""

    def run(fill, clear, count):
        for _ in range(count):
            fill(0, RAM, dwords * PAGE)
            clear(0, dwords * PAGE)

    def build(_bench):
        own = stores()
        return Run(partial(run, own.map, own.unmap, SOME), SOME)

    return build


def empty(_bench):
    """Call a method that takes an integer and gives one back."""
    kind = baseline.load("_stores", "baseline_stores").Empty
    return Run(partial(one_each, [kind().one_int for _ in range(SOME)]), SOME)


def one_each(calls):
    """Look a page up by each of some methods."""
    for call in calls:
        call(PAGE)


def two_each(calls):
    """Map and unmap a page by each of some pairs of methods."""
    for first, second in calls:
        first(2 * PAGE, RAM, PAGE)
        second(2 * PAGE, PAGE)


def pasids(count):
    """Detach and attach a PASID."""

    def run(device, some):
        for domain, pasid in some:
            device.detach_pasid(domain, pasid)
            device.attach_pasid(domain, pasid)

    def build(_bench):
        many = domains(count)
        run(many.device, many.some)
        _, pasid = many.some[-1]
        if many.device.translate(PAGE, pasid=pasid).pa != RAM:
            raise AssertionError("a PASID does not translate")
        return Run(partial(run, many.device, many.some), len(many.some))

    return build


def mains(count):
    """Attach and detach a main domain."""

    def run(device, domain):
        for _ in range(SOME):
            device.attach(domain)
            device.detach(domain)

    def build(_bench):
        many = domains(count)
        run(many.device, many.main[0])
        return Run(partial(run, many.device, many.main[0]), SOME)

    return build


def binds(count):
    """Bind and unbind a process."""

    def run(device, spaces):
        for space in spaces:
            device.bind(space).unbind()

    def build(_bench):
        many = domains(count)
        run(many.device, many.spaces)
        if many.device.max_pasids <= max(space.pasid for space in many.spaces):
            raise AssertionError("a PASID is beyond the device")
        return Run(partial(run, many.device, many.spaces), SOME)

    return build


def creations(count):
    """Make a domain and free it."""

    def run(device):
        for _ in range(SOME):
            device.paging_domain().free()

    def build(_bench):
        return Run(partial(run, domains(count).device), SOME)

    return build


def pages(count):
    """Map and unmap a page of attached domains: with the commands that invalidate it."""

    def build(_bench):
        many = domains(count)
        calls = [(domain.map, domain.unmap) for domain, _ in many.some]
        two_each(calls)
        if any(domain.mapped != PAGE for domain, _ in many.some):
            raise AssertionError("a page is left")
        return Run(partial(two_each, calls), len(calls))

    return build


def look_ups(count):
    """Ask where a page of each of some domains goes."""

    def build(_bench):
        calls = [domain.iova_to_phys for domain, _ in domains(count).some]
        if {call(PAGE) for call in calls} != {RAM}:
            raise AssertionError("iova_to_phys() gives a wrong address")
        return Run(partial(one_each, calls), len(calls))

    return build


def question(what, unit, baseline_name, baseline_run, build, main=False):
    """Ask the same at each number of domains."""
    runs = {baseline_name: baseline_run}
    runs |= {f"{LIBRARY}, {name}": build(count) for name, count in COUNTS.items()}
    return Question(what, unit, runs, main=main)


QUESTIONS = (
    question(
        "domains, detach_pasid() and attach_pasid()", "pair",
        "C stores of a CD", bare(8), pasids, main=True,
    ),
    question(
        "domains, attach() and detach() of a main domain", "pair",
        "C stores of an STE and a CD", bare(16), mains,
    ),
    question("domains, bind() and unbind()", "pair", "C stores of a CD", bare(8), binds),
    question(
        "domains, paging_domain() and free()", "pair",
        "C stores of a first table", bare(512), creations,
    ),
    question(
        "domains, map() and unmap() of a page, attached", "pair",
        "C stores of a leaf", bare(1), pages,
    ),
    question(
        "domains, iova_to_phys()", "call", "empty method, one integer", empty, look_ups
    ),
)  # fmt: skip


def test_domains(measure, question, run):
    """Time calls among few and among many domains."""
    measure(question, run)
