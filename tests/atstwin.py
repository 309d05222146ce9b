"""ATS of the library against its twin (reference_ats.py), over random systems.

Run as a program for long comparisons::

    python -P tests/atstwin.py 1000000 --jobs 2

Two kinds of systems: those of tablegen.py, and grids.  A grid has 64 streams with every EATS,
S1DSS, INSTCFG and PRIVCFG, eight contexts with every WXN, PAN and hardware update, and pages of
every permission in leaves of every size, of stage 1 and of stage 2 apart.  What a request is
granted is used by Translated transactions, at both ends of the range too.  Memory is compared
after each request: the twin and the library have one each.
"""

import argparse
import collections
import concurrent.futures
import multiprocessing
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":  # python -P leaves this folder out
    sys.path[:0] = [str(Path(__file__).resolve().parent / name) for name in ("", "support")]

import ptwriter
import reference
import reference_ats
import tablegen
import twin
from rawfeatures import raw_of
from reference import bits
from reference_ats import Answer, End, Rights

from smmufast import Memory, Smmu
from smmufast._engine.tlb import Caches

ATSCHK, REC_CFG_ATS = 1 << 4, 1 << 3
PER_SYSTEM = 60
PER_GRID = 150


# ------------------------------------------------------------------------------------------------
# The library in the form of the twin


def request_row(response):
    kind = None if response.address is None else (response.attr, response.shareability)
    return Answer(
        response.status, response.address, response.size,
        Rights(response.read, response.write, response.execute), response.priv, response.ipa, kind,
        response.fault and response.fault.name, response.event and response.event.record,
        response.why and response.why.name,
    )  # fmt: skip


def translated_row(result):
    return End(
        result.action, result.pa, result.fault and result.fault.name,
        result.event and result.event.record,
        (result.attr, result.shareability) if result else None, result.why and result.why.name,
    )  # fmt: skip


def smmu_over(system, memory, caches=None):
    """A Smmu over other memory of a random system."""
    real = Memory()
    for base, data in memory.regions():
        real.add(data, base)
    return Smmu(real, raw_of(system.features), caches=caches, **vars(system.regs))


def caches_of(seed):
    return Caches.small(nested=("combined", "split")[seed % 2])


class Pair:
    """The twin and the library side by side, over copies of one memory."""

    def __init__(self, system, caches=None):
        self.system = system
        self.caches = caches
        self.mine = system.memory.copy()
        self.smmu = smmu_over(system, self.mine, caches)
        self.compared = 0

    def same_memory(self):
        return self.mine.regions() == self.system.memory.regions()

    def request(self, sid, iova, **asked):
        """Compare a translation request, with caches a second time too; the answer."""
        system = self.system
        for _ in range(2 if self.caches else 1):
            wanted = reference_ats.ats_request(
                system.memory, system.features, system.regs, sid, iova, **asked
            )
            found = request_row(self.smmu.ats_request(sid, iova, **asked))
            assert found == wanted, (sid, hex(iova), asked, found, wanted)
            assert self.same_memory(), (sid, hex(iova), asked)
            self.compared += 1
        return wanted

    def translated(self, sid, address, **access):
        """Compare a Translated transaction likewise; how it ended."""
        system = self.system
        for _ in range(2 if self.caches else 1):
            wanted = reference_ats.ats_translated(
                system.memory, system.features, system.regs, sid, address, **access
            )
            found = translated_row(self.smmu.ats_translated(sid, address, **access))
            assert found == wanted, (sid, hex(address), access, found, wanted)
            assert self.same_memory(), (sid, hex(address), access)
            self.compared += 1
        return wanted

    def translation(self, request):
        """Compare an ordinary access: what ATS left in the caches serves it too."""
        system = self.system
        outcome = reference.translate(
            system.read, system.features, system.regs, store=system.memory.write,
            **request._asdict(),
        )  # fmt: skip
        call = request._asdict()
        result = self.smmu.translate(call.pop("sid"), call.pop("iova"), **call)
        assert twin.result_row(result) == twin.expected_row(outcome), request
        assert self.same_memory(), request

    def forget(self):
        """Empty the caches: the twin has none."""
        if self.caches:
            self.caches.invalidate_all()


# ------------------------------------------------------------------------------------------------
# Random systems


def ats_system(seed):
    """A random system whose SMMU has ATS, and whose streams mostly may use it."""
    rng = random.Random(seed)
    makes = (
        tablegen.random_system, tablegen.random_nested_system, tablegen.random_nested_system,
        tablegen.random_nested_bytes_system if seed % 8 == 3 else tablegen.random_nested_system,
    )  # fmt: skip
    system = makes[seed % 4](rng)
    features, regs = system.features, system.regs
    features.ats = int(rng.random() < 0.97)
    features.ns1ats = int(rng.random() < 0.05)
    features.atsrecerr = int(rng.random() < 0.8)
    features.pasidtt = int(features.ssidsize and rng.random() < 0.7)
    features.attr_perms_ovr = int(rng.random() < 0.9)
    regs.cr0 |= ATSCHK * (rng.random() < 0.8)
    regs.cr2 |= REC_CFG_ATS * (rng.random() < 0.6)
    requests = system.requests(PER_SYSTEM)
    effective = reference.effective_features(features)
    for sid in sorted({request.sid for request in requests}):
        fetch = reference.Fetcher(system.read, None, None)
        try:
            reference.find_ste(fetch, effective, regs, sid)
        except reference.ConfigurationError:
            continue
        if rng.random() < 0.1:
            continue
        # Full ATS, or with both stages split-stage ATS; stage 2 does not stall.
        _, _, address, _, data = fetch.fetches[-1]
        ste = int.from_bytes(data, "little")
        config = bits(ste, 3, 1)
        eats = rng.choice((1, 2)) if config == 0b111 and not features.ns1ats else 1
        ste = ste & ~(3 << 92) | eats << 92
        if rng.random() < 0.5:  # PRIVCFG and INSTCFG
            ste = ste & ~(15 << 112) | rng.getrandbits(4) << 112
        if rng.random() < 0.25:  # S1DSS: skip stage 1
            ste = ste & ~(3 << 64) | 1 << 64
        if config & 0b010 and features.stall_model != 2:
            ste &= ~(1 << 185)
        system.memory.write(address, ste.to_bytes(64, "little"))
    return rng, system, requests


def random_pair(seed, cached):
    rng, system, requests = ats_system(seed)
    return rng, Pair(system, caches_of(seed // 4) if cached else None), requests


def check_requests(seed, cached=False):
    """Compare the requests of one random system; the Pair, and the answers that there were."""
    rng, pair, requests = random_pair(seed, cached)
    seen = set()
    for drawn in requests:
        request = drawn._replace(ssid=None) if rng.random() < 0.15 else drawn
        pair.forget()
        if cached and rng.random() < 0.3:
            pair.translation(request)
        answer = pair.request(
            request.sid, request.iova, ssid=request.ssid, priv=request.priv,
            execute=rng.random() < 0.5, no_write=rng.random() < 0.4,
            stu=4096 << rng.choice((0, 0, 0, 4)),
        )  # fmt: skip
        seen.add((answer.status, answer.granted, answer.fault, answer.record is not None))
        if cached:
            pair.translation(request)
    return pair, seen


def check_translated(seed, cached=False):
    """Compare Translated transactions in one random system; the Pair, and how they ended."""
    rng, pair, requests = random_pair(seed, cached)
    system = pair.system
    seen = set()
    for request in requests:
        ssid = request.ssid if rng.random() < 0.6 else None
        # what a device would send, mostly: an address that it was given
        found = reference_ats.ats_request(
            reference_ats.Overlay(system.memory), system.features, system.regs, request.sid,
            request.iova, ssid,
        )  # fmt: skip
        address = request.iova if found.address is None or rng.random() < 0.2 else found.address
        end = pair.translated(
            request.sid, address ^ rng.getrandbits(11), ssid=ssid, write=request.write,
            priv=request.priv, instr=rng.random() < 0.4,
        )  # fmt: skip
        seen.add((end.action, end.fault, end.record is not None))
        pair.forget()
    return pair, seen


# ------------------------------------------------------------------------------------------------
# Grids

STREAMS_LG2, CONTEXTS_LG2 = 6, 3
STREAM_TABLE, STAGE2_TABLES = 0x1000_0000, 0x2000_0000
GUEST = 1 << 47  # tables of stage 1 and CDs: as IPAs and, identically, as physical addresses
LEAVES = 20
MAIR = 0x0C_04_00_BB_4F_F4_44_FF


class Tables:
    """Backed, aligned pieces of memory, each a region of its own."""

    def __init__(self, memory, base):
        self.memory = memory
        self.next = base
        self.pieces = []

    def __call__(self, size, alignment):
        size = max(size, ptwriter.PAGE)
        address = -(-self.next // alignment) * alignment
        address = -(-address // ptwriter.PAGE) * ptwriter.PAGE
        self.memory.add(address, size)
        self.pieces.append((address, size))
        self.next = address + size
        return address


def block_levels(granule_lg2, ds):
    """The levels that have leaves, with 52 bits of output addresses."""
    if granule_lg2 == 12:
        return (0, 1, 2, 3) if ds else (1, 2, 3)
    if granule_lg2 == 14:
        return (1, 2, 3) if ds else (2, 3)
    return (1, 2, 3)


def grid_features(rng, **given):
    features = tablegen.all_features()
    vars(features).update(
        s2p=1, ats=1, atsrecerr=1, httu=rng.choice((0, 1, 2, 2, 2)), xnx=int(rng.random() < 0.7),
        fwb=rng.getrandbits(1), pasidtt=int(rng.random() < 0.7),
        attr_perms_ovr=int(rng.random() < 0.9), ds=rng.getrandbits(1), epan=rng.getrandbits(1),
        stall_model=0, stall_max=0xFFFF, ssidsize=8,
    )  # fmt: skip
    features.vax = features.ds
    vars(features).update(given)
    return features


def updates(rng, features):
    """(HA, HD) of a stage."""
    if features.httu == 0:
        return 0, 0
    return rng.choice(((0, 0), (1, 0), (1, 1), (1, 1)) if features.httu == 2 else ((0, 0), (1, 0)))


def grid_stage1(rng, memory, features, ds):
    """Stage-1 tables, and (address, size, output) of each leaf."""
    allocate = Tables(memory, GUEST)
    granule_lg2 = rng.choice((12, 14, 16))
    tables = ptwriter.PageTables(memory, allocate, granule_lg2, 16, ds=ds)
    leaves = []
    for _ in range(LEAVES):
        level = rng.choice(block_levels(granule_lg2, tables.ds))
        size = 1 << tables.shift(level)
        va = rng.getrandbits(47) & -size
        ipa = rng.getrandbits(49 if rng.random() < 0.03 else 47) & -size
        at = tables.map(
            va, ipa, level, attrindx=rng.randrange(8), ap=rng.randrange(4), sh=rng.randrange(4),
            af=rng.random() < 0.85, ng=rng.getrandbits(1), pxn=rng.random() < 0.3,
            uxn=rng.random() < 0.3, dbm=rng.random() < 0.5,
        )  # fmt: skip
        if at is not None:
            leaves.append((va, size, ipa))
    return tables, leaves, allocate


def grid_stage2(rng, memory, leaves, guest, ds):
    """Stage-2 tables: the guest's own pages, and one leaf somewhere in each stage-1 leaf."""
    granule_lg2 = rng.choice((12, 14, 16))
    start = 0 if granule_lg2 == 12 else 1
    tables = ptwriter.Stage2Tables(
        memory, Tables(memory, STAGE2_TABLES), granule_lg2, 16, ds=ds, start_level=start
    )
    for address, size in guest:
        for page in range(address & -(1 << granule_lg2), address + size, 1 << granule_lg2):
            tables.map(
                page, page, memattr=15, af=rng.random() < 0.97, dbm=rng.random() < 0.3,
                s2ap=rng.choices((3, 1, 0), (80, 19, 1))[0],
            )  # fmt: skip
    probes = []
    for va, size, ipa in leaves:
        for _ in range(2):
            offset = rng.choice((0, size - 1, rng.randrange(size)))
            if rng.random() < 0.9 and not ipa >> 47:
                level = rng.choice(block_levels(granule_lg2, tables.ds))
                tables.map(
                    ipa + offset, rng.getrandbits(48), level, memattr=rng.randrange(16),
                    s2ap=rng.choice((3, 3, 2, 1, 1, 0)), sh=rng.randrange(4),
                    af=rng.random() < 0.85, xn=rng.randrange(4), dbm=rng.random() < 0.5,
                )  # fmt: skip
            probes.append((va, size, va + offset))
    return tables, probes


def grid_streams(rng, memory, features, contexts, stage2):
    """The stream table: 64 streams with fields of every kind."""
    memory.add(STREAM_TABLE, 64 << STREAMS_LG2)
    for sid in range(1 << STREAMS_LG2):
        config = rng.choice((7, 7, 7, 7, 6, 5, 5, 4 if rng.random() < 0.2 else 5))
        eats = rng.choices((1, 2, 0, 3), (45, 45, 6, 4))[0]
        if eats == 2 and config != 7 and rng.random() < 0.9:
            eats = 1
        ha, hd = updates(rng, features)
        ste = ptwriter.encode_ste(
            v=1, config=config, s1contextptr=contexts, s1cdmax=rng.choice((3, 3, 3, 0)),
            s1dss=rng.choices(range(4), (15, 45, 30, 10))[0], eats=eats,
            strw=2 * (rng.random() < 0.4), privcfg=rng.randrange(4), instcfg=rng.randrange(4),
            mtcfg=rng.getrandbits(1), memattr=rng.randrange(16), alloccfg=rng.randrange(16),
            shcfg=rng.randrange(4), s2fwb=rng.getrandbits(1), s2vmid=sid, s2ps=6, s2ha=ha, s2hd=hd,
            s2affd=rng.random() < 0.3, s2r=rng.random() < 0.7, s2s=rng.random() < 0.03,
            **stage2.ste_fields(),
        )  # fmt: skip
        memory.write(STREAM_TABLE + 64 * sid, ste)


def grid_contexts(rng, memory, features, stage1):
    """The table of CDs, all of them over the same tables; its address."""
    at = stage1.allocate(64 << CONTEXTS_LG2, ptwriter.PAGE)
    for ssid in range(1 << CONTEXTS_LG2):
        ha, hd = updates(rng, features)
        cd = ptwriter.encode_cd(
            v=rng.random() < 0.97, aa64=1, a=1, r=1, s=rng.random() < 0.1, ips=6, t0sz=16,
            tg0=ptwriter.TG0_CODES[stage1.granule_lg2], epd1=1, t1sz=16, tg1=2, ttb0=stage1.base,
            asid=ssid + 1, mair=MAIR, ds=int(stage1.ds), ha=ha, hd=hd, affd=rng.random() < 0.3,
            wxn=rng.random() < 0.3, pan=rng.random() < 0.4, epan=rng.getrandbits(1),
            e0pd0=rng.random() < 0.1, sh0=rng.randrange(4),
        )  # fmt: skip
        memory.write(at + 64 * ssid, cd)
    return at


def grid_system(rng, **given):
    """A grid, with (address, size, probe) of its leaves as `probes`; given: some features."""
    features = grid_features(rng, **given)
    memory = ptwriter.Memory()
    ds = features.ds and rng.getrandbits(1)
    stage1, leaves, allocate = grid_stage1(rng, memory, features, ds)
    contexts = grid_contexts(rng, memory, features, stage1)
    ds = features.ds and rng.getrandbits(1)
    stage2, probes = grid_stage2(rng, memory, leaves, allocate.pieces, ds)
    grid_streams(rng, memory, features, contexts, stage2)
    regs = SimpleNamespace(
        strtab_base=STREAM_TABLE, strtab_base_cfg=STREAMS_LG2,
        cr0=0b101 | ATSCHK * (rng.random() < 0.95), cr2=rng.randrange(16) & 0b1011, gbpa=0,
    )  # fmt: skip
    system = SimpleNamespace(
        memory=memory, read=memory.read, features=features, regs=regs, probes=probes,
        granules=(stage1.granule_lg2, stage2.granule_lg2),
    )  # fmt: skip
    system.usable = usable_streams(system)
    return system


def usable_streams(system):
    """(StreamID, SubstreamID or None) that may ask."""
    found = []
    effective = reference.effective_features(system.features)
    for sid in range(1 << STREAMS_LG2):
        ste = int.from_bytes(system.read(STREAM_TABLE + 64 * sid, 64), "little")
        if not reference_ats.effective_eats(system.regs, ste):
            continue
        for ssid in (None, None, None, *range(1 << CONTEXTS_LG2)):
            fetch = reference_ats.fetcher(reference_ats.Overlay(system.memory))
            try:
                reference.configure(fetch, effective, system.regs, sid, ssid)
            except reference.ConfigurationError:
                continue
            found.append((sid, ssid))
    return found


def grid_fields(system, sid):
    """What a stream of a grid is, for the counts of a comparison."""
    ste = int.from_bytes(system.memory.read(STREAM_TABLE + 64 * sid, 64), "little")
    overrides = system.features.attr_perms_ovr
    return {
        "Config": bits(ste, 3, 1), "EATS": bits(ste, 93, 92), "S1DSS": bits(ste, 65, 64),
        "PRIVCFG": bits(ste, 113, 112) * overrides, "INSTCFG": bits(ste, 115, 114) * overrides,
        "S2HA+S2HD": bits(ste, 184, 183),
    }  # fmt: skip


def check_use(rng, pair, sid, ssid, iova, counts):
    """Compare a request, and what the device does with the answer."""
    priv, execute = rng.random() < 0.5, rng.random() < 0.5
    answer = pair.request(
        sid, iova, ssid=ssid, priv=priv, execute=execute, no_write=rng.random() < 0.5,
        stu=4096 << rng.choice((0, 0, 4)),
    )  # fmt: skip
    at = iova if answer.address is None else answer.address
    offset = rng.choice((0, answer.size - 1, rng.randrange(max(1, answer.size))))
    end = pair.translated(
        sid, at + max(0, offset), ssid=ssid if rng.random() < 0.8 else None,
        write=rng.random() < 0.4, priv=priv, instr=rng.random() < 0.5,
    )  # fmt: skip
    if counts is None:
        return
    counts["Translated", (end.action, end.fault)] += 1
    if sid >> STREAMS_LG2:
        return
    system = pair.system
    fields = grid_fields(system, sid)
    keys = {"granules": system.granules, "XNX": system.features.xnx, **fields}
    keys["skips stage 1"] = ssid is None and fields["S1DSS"] == 1, fields["EATS"]
    keys["answer"] = answer.status, "".join(
        letter for letter, has in zip("rwx", answer.granted, strict=True) if has
    )
    keys["size"] = answer.size.bit_length() - 1 if answer.address is not None else None
    counts.update(keys.items())


def check_grid(seed, cached=False, counts=None, count=PER_GRID):
    """Compare some requests of one grid, and what the device does with the answers; the Pair."""
    rng = random.Random(seed)
    system = grid_system(rng)
    pair = Pair(system, caches_of(seed) if cached else None)
    while pair.compared < 2 * count * (2 if cached else 1):
        va, size, probe = rng.choice(system.probes)
        sid, ssid = rng.randrange((1 << STREAMS_LG2) + 1), rng.randrange((1 << CONTEXTS_LG2) + 1)
        if rng.random() < 0.2:
            ssid = None
        if rng.random() < 0.85 and system.usable:
            sid, ssid = rng.choice(system.usable)
        pair.forget()
        for _ in range(rng.choice((1, 3))):  # what one leaves in the caches the next one meets
            iova = rng.choice((probe, probe, va, va + size - 1, va + rng.randrange(size)))
            if rng.random() < 0.03:
                iova = rng.getrandbits(rng.randint(1, 64))
            check_use(rng, pair, sid, ssid, iova, counts)
    return pair


# ------------------------------------------------------------------------------------------------
# Many of them


def check_range(first, last):
    """Compare the systems of some seeds, without caches and with; (how many, counts)."""
    counts = collections.Counter()
    compared = 0
    for seed in range(first, last):
        for cached in (False, True):
            try:
                compared += check_grid(seed, cached, counts).compared
                compared += check_requests(seed, cached)[0].compared
                compared += check_translated(seed, cached)[0].compared
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, caches {cached}: {error}") from error
    return compared, counts


def main():
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, help="requests and transactions to compare")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--counts", action="store_true", help="print how often each value was met")
    options = parser.parse_args()
    per_seed = 3 * (2 * PER_GRID + 2 * PER_SYSTEM)
    seeds = -(-options.count // per_seed)
    compared = 0
    counts = collections.Counter()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        waiting = [
            pool.submit(check_range, seed, min(seed + 5, options.seed + seeds))
            for seed in range(options.seed, options.seed + seeds, 5)
        ]
        for future in concurrent.futures.as_completed(waiting):
            some, met = future.result()
            compared += some
            counts.update(met)
            print(f"\r{compared:,}", end="", file=sys.stderr)
    print(f"\n{compared:,} requests and Translated transactions agree", file=sys.stderr)
    if options.counts:
        for (name, value), times in sorted(counts.items(), key=str):
            print(f"{name} {value}: {times:,}")


if __name__ == "__main__":
    main()
