"""The library against its brute-force twin (reference.py), over random systems (tablegen.py).

Run as a program for long comparisons::

    python -P tests/twin.py 100000000 --jobs 2

Half of the translations are of systems with stage 1 alone.  There every face is compared: batches
(mixed, and one for each stream) with every translation of the twin, and for some of the requests
also translate, its trace, a resumable walk and pa.

The other half are of systems whose streams have a stage 2, mostly nested, and whose tables may be
updated.  There the twin, the batches and the calls one by one each have a copy of memory of their
own, and every written descriptor is compared after each call.
"""

import argparse
import concurrent.futures
import itertools
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # python -P leaves this folder out
    sys.path[:0] = [str(Path(__file__).resolve().parent / name) for name in ("", "support")]

import rawfeatures
import reference
import tablegen

import smmufast

PER_SYSTEM = 400
PER_NESTED_SYSTEM = 100  # new tables often: updates come with the first accesses
DETAILED = 7  # every so many requests are also compared face by face


def smmu_of(system):
    """A Smmu over the very bytes of a random system."""
    memory = smmufast.Memory()
    for base, data in system.regions():
        memory.add(data, base)
    features = rawfeatures.raw_of(system.features)
    registers = {name: getattr(system.regs, name) for name in vars(system.regs)}
    return smmufast.Smmu(memory, features, **registers)


def expected_row(outcome):
    """An outcome of the twin as a row of batch columns."""
    number = reference.EVENT_NUMBERS
    return (
        outcome.pa if outcome.success else 0,
        smmufast.ACTIONS.index(outcome.action),
        number[outcome.fault] if outcome.event else 0,
        number[outcome.fault] if outcome.fault else 0,
        outcome.perm,
        4 if outcome.level is None else outcome.level,
        outcome.page_lg2 or 0,
        (outcome.attr, outcome.sh) if outcome.success else None,
        outcome.ipa,
        outcome.stage,
        outcome.event or bytes(32),
    )


def without_stag(record):
    """A record of a stall without its STAG, which depends on the stalls before."""
    return record[:8] + bytes(2) + record[10:] if record[11] & 0x80 else record


def row_of(row):
    """A row of batch columns in the same form."""
    success = row["action"] <= 2
    return (
        *(int(row[name]) for name in ("pa", "action", "event", "fault", "perm", "level")),
        int(row["page_lg2"]),
        (int(row["attr"]), int(row["sh"])) if success else None,
        int(row["ipa"]),
        int(row["stage"]),
        without_stag(bytes(row["record"])),
    )


def result_row(result):
    """A Result in the same form."""
    return (
        result.pa if result else 0,
        smmufast.ACTIONS.index(result.action),
        result.event.number if result.event else 0,
        result.fault.number if result.fault else 0,
        int(result.perm),
        4 if result.level is None else result.level,
        result.page_lg2 or 0,
        (result.attr, result.shareability) if result else None,
        result.ipa or 0,
        result.stage,
        without_stag(result.event.record) if result.event else bytes(32),
    )


def fetch_row(fetch):
    """A Fetch as the twin writes it."""
    return tuple(fetch) if fetch.swap is not None else tuple(fetch[:5])


def batch(smmu, requests, **more):
    """One batch of requests, every column unless told otherwise."""
    return smmu.translate_batch(
        np.array([r.sid for r in requests], np.uint32),
        np.array([r.iova for r in requests], np.uint64),
        ssid=np.array(
            [smmufast.NO_SUBSTREAM if r.ssid is None else r.ssid for r in requests], np.uint32
        ),
        write=np.array([r.write for r in requests]),
        priv=np.array([r.priv for r in requests]),
        instr=np.array([r.instr for r in requests]),
        **(more or {"columns": list(smmufast.COLUMNS)}),
    )


def check_pairs(smmu, requests, rows):
    """One batch for each pair and access, in order and sorted: they reuse what is decoded."""
    groups = {}
    for request, row in zip(requests, rows, strict=True):
        key = (request.sid, request.ssid, request.write, request.priv, request.instr)
        groups.setdefault(key, []).append((request.iova, row))
    for (sid, ssid, write, priv, instr), members in groups.items():
        if len(members) > 3:
            members = members + sorted(members, key=lambda member: member[0])
        out = {
            "pa": np.empty(len(members), np.uint64),
            "action": np.empty(len(members), np.uint8),
            "event": np.empty(len(members), np.uint8),
        }
        iova = np.array([iova for iova, _ in members], np.uint64)
        smmu.translate_batch(sid, iova, ssid=ssid, write=write, priv=priv, instr=instr, out=out)
        found = list(zip(*(out[name].tolist() for name in out), strict=True))
        wanted = [row[:3] for _, row in members]
        assert found == wanted, f"batch of {(sid, ssid, write, priv, instr)}"


def check_faces(smmu, system, request, outcome, row):
    """translate, its trace, the resumable walk and pa of one request."""
    call = request._asdict()
    sid, iova = call.pop("sid"), call.pop("iova")
    result = smmu.translate(sid, iova, **call)
    assert result_row(result) == row, "translate"
    assert (result.why and result.why.name) == outcome.why, "why"
    traced = smmu.translate(sid, iova, trace=True, **call)
    assert result_row(traced) == row, "translate(trace=True)"
    assert [fetch_row(fetch) for fetch in traced.fetches] == outcome.fetches, "fetches"
    walk = smmu.start_walk(sid, iova, **call)
    while walk.request is not None:
        walk.supply(system.read(walk.request.address, walk.request.size))
    assert result_row(walk.result) == row, "walk"
    assert walk.result.fetches == traced.fetches, "fetches of the walk"
    try:
        assert smmu.pa(sid, iova, **call) == outcome.pa, "pa"
    except smmufast.Fault as error:
        assert not outcome.success, "pa raised"
        assert result_row(error.result) == row, "result of pa's exception"
    segments = smmu.translate_range(sid, iova, 1, **call)
    if outcome.success:
        assert list(segments) == [(iova, outcome.pa, 1)], "range"
    else:
        assert len(segments) == 0, "range of a fault"
        assert result_row(segments.result) == row, "result of the range"


def check_system(seed, count=PER_SYSTEM):
    """Compare one random system; AssertionError names the seed and the request."""
    rng = random.Random(seed)
    make = tablegen.random_bytes_system if seed % 10 == 9 else tablegen.random_system
    system = make(rng)
    smmu = smmu_of(system)
    requests = system.requests(count)
    cache = reference.ContextCache()
    outcomes = [
        reference.translate(
            system.read, system.features, system.regs, cache=cache, **request._asdict()
        )
        for request in requests
    ]
    rows = [expected_row(outcome) for outcome in outcomes]
    for request, row, found in zip(requests, rows, batch(smmu, requests), strict=True):
        assert row_of(found) == row, f"seed {seed}: {request}: batch"
    check_pairs(smmu, requests, rows)
    for request, outcome, row in zip(
        requests[::DETAILED], outcomes[::DETAILED], rows[::DETAILED], strict=True
    ):
        try:
            # without the cache, for the list of fetches
            outcome = reference.translate(
                system.read, system.features, system.regs, **request._asdict()
            )
            check_faces(smmu, system, request, outcome, row)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {request}: {error}") from error
    return len(requests)


def extra_row(outcome):
    """What of a translation is in no column: of the twin."""
    if outcome.action != "ok":
        return outcome.perm_s1
    return (
        outcome.perm_s1, outcome.vmid, outcome.asid if outcome.stage & 1 else None,
        not outcome.ng, bool(outcome.contiguous),
    )  # fmt: skip


def extra_result_row(result):
    """The same of a Result."""
    if result.action != "ok":
        return int(result.perm_s1)
    return (
        int(result.perm_s1), result.vmid, result.asid, result.is_global, result.contiguous,
    )  # fmt: skip


def by_pair(request):
    """What the requests of one batch have in common."""
    ssid = -1 if request.ssid is None else request.ssid
    return request.sid, ssid, request.write, request.priv, request.instr


def host_walk(smmu, memory, sid, iova, **access):
    """A resumable walk; the host makes the updates."""
    walk = smmu.start_walk(sid, iova, **access)
    while walk.request is not None:
        fetch = walk.request
        data = memory.read(fetch.address, fetch.size)
        if fetch.swap and data is not None:
            expected, desired = (number.to_bytes(8, "little") for number in fetch.swap)
            if data == expected:
                memory.write(fetch.address, desired)
        walk.supply(data)
    return walk.result


def same(ours, theirs, face):
    """Compare what the library gave with the twin's."""
    assert ours == theirs, f"{face}: {ours}, not {theirs}"


def check_nested_call(number, smmu, memory, twins, request, outcome):
    """One request by one of the faces, over memory that it may update, as the twin did its own."""
    call = request._asdict()
    sid, iova = call.pop("sid"), call.pop("iova")
    kind = ("translate", "trace", "walk", "pa")[number % 4]
    if kind == "translate":
        result = smmu.translate(sid, iova, **call)
    elif kind == "trace":
        result = smmu.translate(sid, iova, trace=True, **call)
    elif kind == "walk":
        result = host_walk(smmu, memory, sid, iova, **call)
    else:
        try:
            assert smmu.pa(sid, iova, **call) == outcome.pa, "pa"
            return
        except smmufast.Fault as error:
            result = error.result
    same(result_row(result), expected_row(outcome), kind)
    same(extra_result_row(result), extra_row(outcome), kind)
    if kind in ("trace", "walk"):
        same([fetch_row(fetch) for fetch in result.fetches], outcome.fetches, kind)
    written = {fetch[2] for fetch in outcome.fetches if len(fetch) > 5}
    for address in written:
        ours = smmu.memory.read(address, 8)
        theirs = twins.read(address, 8)
        assert ours == theirs, f"{kind}: [{address:#x}] is {ours.hex()}, not {theirs.hex()}"


def check_nested_system(seed):
    """Compare one random system with stage 2; AssertionError names the seed and the request."""
    rng = random.Random(seed)
    noise = seed % 20 == 19
    make = tablegen.random_nested_bytes_system if noise else tablegen.random_nested_system
    system = make(rng)
    requests = system.requests(PER_NESTED_SYSTEM)
    pairs = seed % 4 > 1
    if pairs:
        requests.sort(key=by_pair)
    batched = system.with_memory(system.memory.copy())
    called = system.with_memory(system.memory.copy())
    one_by_one = smmu_of(called)
    cache = reference.ContextCache()
    rows = []
    for number, request in enumerate(requests):
        outcome = reference.translate(
            system.read, system.features, system.regs, cache=cache, store=system.memory.write,
            **request._asdict(),
        )  # fmt: skip
        rows.append(expected_row(outcome))
        try:
            check_nested_call(
                seed + number, one_by_one, called.memory, system.memory, request, outcome
            )
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {request}: {error}") from error
    assert called.regions() == system.regions(), f"seed {seed}: memory after the calls"

    smmu = smmu_of(batched)
    if pairs:
        found = []
        for key, members in itertools.groupby(requests, by_pair):
            members = list(members)
            sid, _, write, priv, instr = key
            iova = np.array([request.iova for request in members], np.uint64)
            part = smmu.translate_batch(
                sid, iova, ssid=members[0].ssid, write=write, priv=priv, instr=instr,
                columns=list(smmufast.COLUMNS),
            )  # fmt: skip
            found.extend(part)
            # enough of them for the passes over blocks, which write these columns alone
            times = 1 + 40 // len(members)
            tiled = np.tile(iova, times)
            many = smmu.translate_batch(
                sid, tiled, ssid=members[0].ssid, write=write, priv=priv, instr=instr
            )
            for name in many.dtype.names:
                assert (many[name] == np.tile(part[name], times)).all(), f"seed {seed}: {key}"
    else:
        found = batch(smmu, requests)
    for request, row, one in zip(requests, rows, found, strict=True):
        same(row_of(one), row, f"seed {seed}: {request}: batch")
    assert batched.regions() == system.regions(), f"seed {seed}: memory after the batch"
    return len(requests)


def check_systems(check, first, last):
    """Compare the systems of a range of seeds; how many translations they made."""
    return sum(check(seed) for seed in range(first, last))


def ranges(count, per_system, jobs, seed):
    """Ranges of seeds that together make at least `count` translations."""
    systems = -(-count // per_system)
    step = max(1, min(50, systems // (4 * jobs)))
    for start in range(seed, seed + systems, step):
        yield start, min(start + step, seed + systems)


def run(count, jobs, seed=0, progress=None, nested=True, alone=True):
    """Compare at least `count` translations of each kind in `jobs` processes; how many were made.

    nested: systems with stage 2.  alone: systems with stage 1 alone.
    """
    work = []
    if alone:
        work += [(check_system, *one) for one in ranges(count, PER_SYSTEM, jobs, seed)]
    if nested:
        parts = ranges(count, PER_NESTED_SYSTEM, jobs, seed)
        work += [(check_nested_system, *one) for one in parts]
    done = 0
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = set()
        for one in work:
            waiting.add(pool.submit(check_systems, *one))
            if len(waiting) > 4 * jobs:
                ready, waiting = concurrent.futures.wait(
                    waiting, return_when=concurrent.futures.FIRST_COMPLETED
                )
                done += sum(future.result() for future in ready)
                if progress:
                    progress(done)
        done += sum(future.result() for future in waiting)
    return done


def main():
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, help="translations of each kind to compare")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--only", choices=("nested", "alone"), help="systems with stage 2, or not")
    options = parser.parse_args()
    start = time.time()

    def progress(done):
        rate = done / (time.time() - start)
        print(f"\r{done:,} of {total:,}, {rate:,.0f} a second", end="", file=sys.stderr)

    total = options.count * (1 if options.only else 2)
    nested, alone = options.only != "alone", options.only != "nested"
    done = run(options.count, options.jobs, options.seed, progress, nested, alone)
    print(f"\n{done:,} translations agree", file=sys.stderr)


if __name__ == "__main__":
    main()
