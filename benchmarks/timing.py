"""How runs are timed: on one processor, in turn, each sample long enough for the clock."""

import contextlib
import gc
import os
import platform
import time
from pathlib import Path

import numpy

SAMPLE_SECONDS = 0.01
MIN_ROUNDS = 7


def idlest_cpu():
    """Return the allowed processor that was idle most during a short while."""

    def idle():
        times = {}
        for line in Path("/proc/stat").read_text().splitlines():
            name, *values = line.split()
            if name[:3] == "cpu" and name[3:].isdigit():
                times[int(name[3:])] = int(values[3])
        return times

    allowed = os.sched_getaffinity(0)
    before = idle()
    time.sleep(0.5)
    after = idle()
    return max(allowed, key=lambda cpu: after.get(cpu, 0) - before.get(cpu, 0))


def elapsed(run, clock, times):
    """Return the processor time in seconds that a number of calls take."""
    if run.reset is None:
        start = clock()
        for _ in range(times):
            run.call()
        return clock() - start
    total = 0
    for _ in range(times):
        run.reset()
        start = clock()
        run.call()
        total += clock() - start
    return total


def repeats(run, clock):
    """Return how many calls make a sample long enough for the clock, after warming up."""
    elapsed(run, clock, 1)
    times = 1
    while (taken := elapsed(run, clock, times)) < SAMPLE_SECONDS / 2:
        times = max(times * 2, int(times * SAMPLE_SECONDS / max(taken, SAMPLE_SECONDS / 64)))
    return times


def interleaved(samplers, rounds):
    """Call each sampler once in each round, in varying order; return the samples of each."""
    samples = [[] for _ in samplers]
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for k in range(len(samplers)):
                j = (i + k if i % 2 else i - k) % len(samplers)
                samples[j].append(samplers[j]())
    finally:
        gc.enable()
    return samples


def machine():
    """Describe in one line what this was measured on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{model}, {python}, numpy {numpy.__version__}"
