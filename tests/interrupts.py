"""Interrupt driver calls at random instants, and look whether anything is held or half made.

    python -P tests/interrupts.py [--rounds 10000] [--seed 1]

A signal's handler raises, as that of Ctrl-C does, somewhere in each call of a life of attaches,
detaches, binds, maps, resets and releases.  Afterwards the system's lock is free, the call was
done or undone, and `System.check()` finds nothing.
"""

import argparse
import contextlib
import random
import signal
import sys
import threading

from smmufast import Caches
from smmufast.iommu import AUX, BLOCKED, IDENTITY, NOW, AddressSpace, IommuError, System
from smmufast.iommu.smmu import master

COMPILED = not master.__file__.endswith(".py")


class Stop(BaseException):
    """What the handler raises."""


def quietly(call):
    with contextlib.suppress(IommuError):
        call()


def free(lock):
    """Whether another thread gets the lock."""
    got = []

    def take():
        with lock:
            got.append(True)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    thread.join(5)
    return bool(got)


class Life:
    """A system, and the calls that are interrupted."""

    def __init__(self, profile, rng):
        self.rng = rng
        self.system = system = System(profile=profile, caches=Caches.server)
        self.nic = system.device(8, pasid_bits=12, ats=True, pri=True)
        self.gpu = system.device(9, pasid_bits=4)
        if profile is AUX:
            self.nic.attach(system.paging_domain())
            self.nic.init(["AUX", "IOPF"])
            self.domains = [system.paging_domain() for _ in range(3)]
        else:
            self.domains = [self.nic.paging_domain() for _ in range(3)]
        self.space = AddressSpace.of(system)
        self.aux = profile is AUX
        self.extra = []

    def call(self):
        """One call, at random."""
        rng, nic = self.rng, self.nic
        domain = rng.choice(self.domains)
        pasid = rng.choice([1, 2, 3, 2000])
        calls = [
            lambda: nic.bind(self.space), lambda: nic.bonds[0].unbind() if nic.bonds else None,
            lambda: domain.map(rng.randrange(8) << 12, 0x8000_0000, 0x1000),
            lambda: domain.unmap(0, 0x8000),
            lambda: domain.change_asid(),
            lambda: self.system.service(),
            self.hotplug, self.unplug,
            lambda: self.space.table.map(rng.randrange(8) << 12, 0x9000_0000, 0x1000),
            lambda: self.space.table.unmap(0, 0x8000),
        ]
        if self.aux:
            calls += [lambda: nic.attach_aux(domain), lambda: nic.detach_aux(domain)] * 3
        else:
            calls += [
                lambda: nic.attach_pasid(domain, pasid), lambda: nic.detach_pasid(domain, pasid),
                lambda: nic.replace(domain), lambda: nic.replace(IDENTITY),
                lambda: nic.replace(BLOCKED), nic.reset_prepare, nic.reset_done,
            ] * 2
        return rng.choice(calls)

    def hotplug(self):
        sid = 100 + self.rng.randrange(600)
        self.extra.append(self.system.device(sid, pasid_bits=4))

    def unplug(self):
        if self.extra:
            device = self.extra[-1]
            if device._master is not None:
                device.release()
            self.extra.remove(device)


def run(rounds, seed):
    """Interrupt so many calls; a list of what was found."""
    rng = random.Random(seed)
    armed = [False]

    def handler(*_):
        if armed[0]:
            armed[0] = False
            raise Stop

    before = signal.signal(signal.SIGALRM, handler)
    found, hit = [], 0
    life = None
    try:
        for n in range(rounds):
            if n % 200 == 0:
                life = Life(rng.choice([AUX, NOW]), rng)
            call = life.call()
            try:
                armed[0] = True
                signal.setitimer(signal.ITIMER_REAL, rng.random() ** 2 * 3e-4 + 1e-6)
                try:
                    quietly(call)
                finally:
                    armed[0] = False
            except Stop:
                hit += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            if not free(life.system.lock):
                found.append((n, "the lock is held"))
                break
            problems = life.system.check()
            if problems:
                found.append((n, problems[0].text))
                life = Life(rng.choice([AUX, NOW]), rng)
    finally:
        signal.signal(signal.SIGALRM, before)
    return found, hit


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found, hit = run(options.rounds, options.seed)
    for n, what in found:
        print(f"call {n}: {what}")
    print(f"{options.rounds} calls, {hit} interrupted, {len(found)} findings"
          f"{'' if COMPILED else ' (the driver half is not compiled here)'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
