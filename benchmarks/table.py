"""Prints library ÷ baseline as a Markdown table.

From the repository's root, with the package installed::

    python benchmarks/table.py [--rounds N] [--only TEXT] [--cpu N]

The process pins itself to one processor. In each round everything that answers one question is
timed in turn, baseline included, starting elsewhere each time, and a ratio is taken within the
round, so that a machine whose speed drifts changes both sides. Times are processor time of the
process, which leaves out the time that other processes held the processor; a run that used
several threads would be charged for all of them. The ratio shown is the median over rounds with
its quartiles, then the ratio of the shortest times.
"""

import argparse
import contextlib
import gc
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy
from imports import IMPORTS, children_seconds, fresh_import
from questions import LIBRARY, QUESTIONS, Workbench

SAMPLE_NS = 10_000_000
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


def elapsed(call, times):
    """Return the processor time in ns that a number of calls take."""
    start = time.process_time_ns()
    for _ in range(times):
        call()
    return time.process_time_ns() - start


def repeats(call):
    """Return how many calls make a sample long enough for the clock, after warming up."""
    call()
    times = 1
    while (taken := elapsed(call, times)) < SAMPLE_NS // 2:
        times = max(times * 2, times * SAMPLE_NS // max(taken, SAMPLE_NS // 64))
    return times


def interleaved(samplers, rounds):
    """Call each sampler once in each round; return the samples of each."""
    samples = [[] for _ in samplers]
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for j in range(len(samplers)):
                j = (i + j) % len(samplers)
                samples[j].append(samplers[j]())
    finally:
        gc.enable()
    return samples


def rows(group, names, samples, unit):
    """Yield the lines of one question: first its baseline."""
    base = samples[0]
    for i, (name, taken) in enumerate(zip(names, samples, strict=True)):
        ratios = [a / b for a, b in zip(taken, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        by_min = min(taken) / min(base)
        bold = "**" if LIBRARY in name else ""
        figures = f"{format_ns(statistics.median(taken))} | {format_ns(min(taken))}"
        if i == 0:
            yield f"| {group}; per {unit} | {name} | {figures} | 1 | 1 |"
        else:
            yield (
                f"| | {bold}{name}{bold} | {figures} "
                f"| {bold}{middle:.2f}{bold} ({low:.2f}–{high:.2f}) | {by_min:.2f} |"
            )


def format_ns(value):
    """Return a time with three digits and its unit."""
    for unit, scale in (("ns", 1), ("µs", 1e3), ("ms", 1e6)):
        if value < 1000 * scale or unit == "ms":
            return f"{value / scale:.3g} {unit}"


def measure(question, bench, rounds, library):
    """Return the lines of one question."""
    names = [name for name in question.runs if library or not name.startswith(LIBRARY)]
    runs = [question.runs[name](bench) for name in names]

    def sampler(run):
        times = repeats(run.call)
        return lambda: elapsed(run.call, times) / times / run.items

    samples = interleaved([sampler(run) for run in runs], rounds)
    return rows(question.group, names, samples, question.unit)


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


def import_ns(module):
    """Return the processor time in ns of an interpreter that imports a module."""
    start = children_seconds()
    fresh_import(module)
    return (children_seconds() - start) * 1e9


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Print library ÷ baseline as a Markdown table.")
    parser.add_argument("--rounds", type=int, default=15, help="at least 7 (default 15)")
    parser.add_argument("--only", default="", help="only questions whose name has this text")
    parser.add_argument("--cpu", type=int, help="the processor to run on (default: the idlest)")
    parser.add_argument(
        "--baselines", action="store_true", help="leave the library out: it need not be installed"
    )
    options = parser.parse_args()
    rounds = max(options.rounds, MIN_ROUNDS)
    bench = Workbench()
    cpu = idlest_cpu() if options.cpu is None else options.cpu
    os.sched_setaffinity(0, {cpu})
    print(f"{machine()}; {rounds} rounds, interleaved, processor time.\n")
    print("| question | what | median | min | ÷ baseline: median (quartiles) | by min |")
    print("|---|---|---:|---:|---:|---:|", flush=True)
    for question in QUESTIONS:
        if options.only in question.group:
            for line in measure(question, bench, rounds, not options.baselines):
                print(line, flush=True)
    group = "import in a fresh interpreter"
    if options.only in group:
        names = [name for name in IMPORTS if not (options.baselines and name == LIBRARY)]
        samplers = [lambda name=name: import_ns(name) for name in names]
        samples = interleaved(samplers, rounds)
        for line in rows(group, [f"import {name}" for name in names], samples, "process"):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
