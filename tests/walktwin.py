"""Walks that a host performs, against translate(): over memory that races and aborts, and at once.

    python -P tests/walktwin.py 100000 --jobs 2

check_alone(seed): a walk that is alone makes the fetches that translate() makes, with the same
    outcome, and leaves memory and caches alike: through any caches or none, over memory where
    accesses abort and descriptors change just before they are updated.
check_together(seed): walks under way at once, between which commands come and stream tables, CDs
    and descriptors change.  None uses what it read before a CMD_SYNC that follows an invalidation;
    the one that holds CMD_SYNC ends before it.  Each start of a walk is counted once.
"""

import argparse
import collections
import os
import sys
import zlib
from pathlib import Path

if __name__ == "__main__":  # python -P leaves this folder out
    sys.path[:0] = [str(Path(__file__).resolve().parent / name) for name in ("", "support")]

import cachetwin
import twin
from rawfeatures import raw_of

import smmufast

REQUESTS = 40
STEPS = 400
UNDER_WAY = 5


class Host:
    """Memory as a host has it: it may abort an access, or lose the race against an update.

    What happens to an access follows from the seed, its address and how often that was accessed,
    so that two hosts that are asked for the same do the same.
    """

    def __init__(self, regions, seed, aborts=0.0, races=0.0):
        self.regions = [(base, bytearray(data)) for base, data in regions]
        self.seed, self.aborts, self.races = seed, aborts, races
        self.seen = collections.Counter()

    def memory(self):
        """A Memory whose accesses this performs."""
        memory = smmufast.Memory()
        for base, data in self.regions:
            memory.add_callback(base, len(data), self.read, self.write, self.swap)
        return memory

    def chance(self, address):
        """A number below 1."""
        self.seen[address] += 1
        text = f"{self.seed} {address} {self.seen[address]}"
        return zlib.crc32(text.encode()) / (1 << 32)

    def at(self, address, size):
        """(bytearray, offset) of some bytes, None where there are none."""
        for base, data in self.regions:
            if base <= address and address + size <= base + len(data):
                return data, address - base
        return None

    def peek(self, address, size):
        """Bytes as they are, None where there are none."""
        place = self.at(address, size)
        return None if place is None else bytes(place[0][place[1] :][:size])

    def read(self, address, size):
        """Bytes, or None for an external abort."""
        return None if self.chance(address) < self.aborts else self.peek(address, size)

    def write(self, address, data):
        """Store bytes; whether it was done."""
        place = self.at(address, len(data))
        if place is not None:
            place[0][place[1] : place[1] + len(data)] = data
        return True if place is not None else None

    def swap(self, address, expected, desired):
        """Compare and swap 8 bytes, of which somebody may have changed one before."""
        chance = self.chance(address)
        place = self.at(address, 8)
        if place is None or chance < self.aborts:
            return None
        data, at = place
        if chance < self.aborts + self.races:
            # bit 55 of either byte order, a bit of the address, or the valid bit of one
            byte, bit = ((6, 7), (1, 7), (2, 4), (0, 0))[int(chance * 4096) % 4]
            data[at + byte] ^= 1 << bit
        found = bytes(data[at : at + 8])
        if found == expected:
            data[at : at + 8] = desired
        return found

    def answer(self, fetch):
        """Perform what a walk asks for."""
        if fetch.swap is None:
            return self.read(fetch.address, fetch.size)
        return self.swap(fetch.address, *(word.to_bytes(8, "little") for word in fetch.swap))


def smmu_over(system, memory, caches):
    """A Smmu with the system's features and registers over a Memory."""
    return smmufast.Smmu(memory, raw_of(system.features), caches=caches, **vars(system.regs))


def told(result):
    """Everything that a Result says."""
    return twin.result_row(result), twin.extra_result_row(result), result.why, result.fetches


def check_alone(seed):
    """One random system; how many translations were compared."""
    rng, system = cachetwin.make_system(seed)
    requests = list(dict.fromkeys(system.requests(REQUESTS)))
    make = cachetwin.random_caches(rng) if rng.random() < 0.7 else lambda: None
    aborts = rng.choice((0, 0, 0.02, 0.1))
    races = rng.choice((0, 0.3, 0.9))
    hosts = [Host(system.regions(), seed, aborts, races) for _ in range(2)]
    smmus = [smmu_over(system, host.memory(), make()) for host in hosts]
    for request in rng.choices(requests, k=3 * len(requests)):
        sid, iova, call = cachetwin.arguments(request)
        traced = smmus[0].translate(sid, iova, trace=True, **call)
        walk = smmus[1].start_walk(sid, iova, **call)
        while (fetch := walk.request) is not None:
            walk.supply(hosts[1].answer(fetch))
        where = f"seed {seed}: {request}"
        assert told(walk.result) == told(traced), f"{where}: {walk.result.fetches}"
        assert hosts[0].regions == hosts[1].regions, where
        if smmus[0].caches is not None:
            states = [smmu.caches.__getstate__() for smmu in smmus]
            if states[0] != states[1]:
                twin.same(smmus[1].caches.counters, smmus[0].caches.counters, where)
                raise AssertionError(f"{where}: the contents of the caches differ")
    assert len(smmus[0].stalls) == len(smmus[1].stalls)
    return 3 * len(requests)


# ------------------------------------------------------------------------------------------------
# Walks at once


COMMANDS = (
    "TLBI_NSNH_ALL", "TLBI_NH_ALL", "TLBI_NH_VA", "TLBI_S12_VMALL", "CFGI_STE", "CFGI_CD",
    "CFGI_STE_RANGE",
)  # fmt: skip


class Together:
    """Walks under way at once, and what is known of each."""

    def __init__(self, seed):
        self.rng, self.system = cachetwin.make_system(seed)
        rng = self.rng
        self.requests = list(dict.fromkeys(self.system.requests(REQUESTS)))
        make = cachetwin.random_caches(rng) if rng.random() < 0.7 else lambda: None
        self.host = Host(self.system.regions(), seed, rng.choice((0, 0.02)))
        self.smmu = smmu_over(self.system, self.host.memory(), make())
        self.queue = 0  # commands that wait are in a list; the Smmu has none of its own
        self.walks = []
        self.now = 0
        self.invalidated = self.synced = -1  # when, last; synced: such that walks start again
        self.ended = self.restarts = self.held = 0

    def start(self):
        """Start a walk."""
        request = self.rng.choice(self.requests)
        sid, iova, call = cachetwin.arguments(request)
        holds = self.rng.random() < 0.2
        walk = self.smmu.start_walk(sid, iova, holds_sync=holds, **call)
        self.walks.append([walk, holds, self.now, []])
        self.settle(self.walks[-1])

    def step(self):
        """Let the host look at a walk and answer it, or only do one of the two."""
        one = self.rng.choice(self.walks)
        walk, holds, begun, times = one
        old = begun <= self.synced and not holds
        how = self.rng.choice(("look", "answer", "both", "both"))
        if how == "answer" and old:
            # to what it asked before it was overtaken: that is dropped
            walk.supply(self.rng.choice((None, 0)))
        elif how == "answer":
            fetch = walk.request
            walk.supply(self.host.answer(fetch))
            times.append(self.now)
        if how == "look" or old:
            assert walk.done or walk.request is not None
        if old:
            self.restarts += 1
            one[2], times[:] = self.now, []
        if how == "both" and (fetch := walk.request) is not None:
            walk.supply(self.host.answer(fetch))
            times.append(self.now)
        self.settle(one)

    def settle(self, one):
        """Check a walk that is done."""
        walk, holds, begun, times = one
        if not walk.done:
            return
        self.walks.remove(one)
        self.ended += 1
        result = walk.result
        assert len(result.fetches) == min(len(times), 128)
        assert not times or times[0] >= begun
        # nothing of before the SYNC, or nothing that a SYNC was let pass for
        if times and not holds:
            assert times[0] > self.synced
        if holds:
            assert begun > self.synced

    def command(self):
        """Invalidate, or synchronize."""
        name = self.rng.choice((*COMMANDS, *["SYNC"] * 6))
        if name != "SYNC":
            try:
                self.smmu.command(name, **({"Range": 31} if name == "CFGI_STE_RANGE" else {}))
            except ValueError:
                return  # there is no such stage
            self.invalidated = self.now
            return
        waits = any(holds and begun <= self.invalidated for _, holds, begun, _ in self.walks)
        try:
            self.smmu.sync()
        except RuntimeError:
            assert waits
            self.held += 1
            return
        assert not waits
        self.synced = max(self.synced, self.invalidated)

    def change(self):
        """Change a byte of memory; nobody is told."""
        _, data = self.rng.choice(self.host.regions)
        data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)

    def drop(self):
        """Close a walk, or forget it."""
        one = self.rng.choice(self.walks)
        if self.rng.random() < 0.5:
            one[0].close()
            assert (one[0].done, one[0].request, one[0].result) == (True, None, None)
        self.walks.remove(one)


def check_together(seed):
    """One random system; (walks that ended, that started again, CMD_SYNC that waited)."""
    all_ = Together(seed)
    rng = all_.rng
    started = 0
    for _ in range(STEPS):
        all_.now += 1
        what = rng.choices(
            ("start", "step", "command", "change", "drop"), (20, 100, 12, 4, 1)
        )[0]  # fmt: skip
        if len(all_.walks) == (UNDER_WAY if what == "start" else 0):
            continue
        started += what == "start"
        getattr(all_, what)()
    caches = all_.smmu.caches
    if caches is not None and caches.ste is not None:
        looked = caches.ste.hits + caches.ste.misses
        assert looked <= started + all_.restarts
        assert looked or not caches.ste.fills
    return all_.ended, all_.restarts, all_.held


def check_seeds(check, first, last):
    """The systems of a range of seeds; how many translations they made."""
    made = 0
    for seed in range(first, last):
        found = check(seed)
        made += found if isinstance(found, int) else found[0]
    return made


def main():
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, help="translations of each kind")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    options = parser.parse_args()
    made = 0
    for check, each in ((check_alone, 3 * REQUESTS), (check_together, 40)):
        parts = list(twin.ranges(options.count, each, options.jobs, options.seed))
        with twin.concurrent.futures.ProcessPoolExecutor(
            options.jobs, mp_context=twin.multiprocessing.get_context("spawn")
        ) as pool:
            made += sum(pool.map(check_seeds, [check] * len(parts), *zip(*parts, strict=True)))
    print(f"{made:,} translations agree", file=sys.stderr)


if __name__ == "__main__":
    main()
