"""The library against its brute-force twin (reference.py), over random systems (tablegen.py).

Run as a program for long comparisons::

    python -P tests/twin.py 100000000 --jobs 2

Every face is compared: batches (mixed, and one for each stream) with every translation of the
twin, and for some of the requests also translate, its trace, a resumable walk and pa.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import random
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # python -P leaves this folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import reference
import tablegen

import smmufast

PER_SYSTEM = 400
DETAILED = 7  # every so many requests are also compared face by face
FEATURES = [field.name for field in fields(smmufast.Features)]


def smmu_of(system):
    """A Smmu over the very bytes of a random system."""
    memory = smmufast.Memory()
    for base, data in system.regions():
        memory.add(data, base)
    features = smmufast.Features(**{name: getattr(system.features, name) for name in FEATURES})
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
        outcome.event or bytes(32),
    )


def row_of(row):
    """A row of batch columns in the same form."""
    success = row["action"] <= 2
    return (
        *(int(row[name]) for name in ("pa", "action", "event", "fault", "perm", "level")),
        int(row["page_lg2"]),
        (int(row["attr"]), int(row["sh"])) if success else None,
        bytes(row["record"]),
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
        result.event.record if result.event else bytes(32),
    )


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
    traced = smmu.translate(sid, iova, trace=True, **call)
    assert result_row(traced) == row, "translate(trace=True)"
    assert [tuple(fetch) for fetch in traced.fetches] == list(outcome.fetches), "fetches"
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


def check_systems(first, last):
    """Compare the systems of a range of seeds; how many translations they made."""
    return sum(check_system(seed) for seed in range(first, last))


def run(count, jobs, seed=0, progress=None):
    """Compare at least `count` translations in `jobs` processes; how many were made."""
    systems = -(-count // PER_SYSTEM)
    step = max(1, min(50, systems // (4 * jobs)))
    starts = range(seed, seed + systems, step)
    done = 0
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        last = seed + systems
        waiting = set()
        for start in starts:
            waiting.add(pool.submit(check_systems, start, min(start + step, last)))
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
    parser.add_argument("count", type=int, help="translations to compare")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    options = parser.parse_args()
    start = time.time()

    def progress(done):
        rate = done / (time.time() - start)
        print(f"\r{done:,} of {options.count:,}, {rate:,.0f} a second", end="", file=sys.stderr)

    done = run(options.count, options.jobs, options.seed, progress)
    print(f"\n{done:,} translations agree", file=sys.stderr)


if __name__ == "__main__":
    main()
