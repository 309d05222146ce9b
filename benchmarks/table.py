"""Prints library ÷ baseline as a Markdown table.

From the repository's root, with the package installed::

    python benchmarks/table.py --rounds 15

A minute on an idle machine. `--main` or `--only TEXT` ask fewer questions, `--markdown FILE` writes
the table to a file too.

The process pins itself to one processor. In each round everything that answers one question is
timed in turn, baseline included, in another order each time, and a ratio is taken within the
round, so that a machine whose speed drifts changes both sides. Times are processor time of the
process, which leaves out the time that other processes held the processor; a run that used
several threads would be charged for all of them. The ratio shown is the median over rounds with
its quartiles, then the ratio of the shortest times. A baseline's row has the quartiles of its own
times ÷ their median, and is marked where they are far apart.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

import bench_cached
import bench_domains
import bench_nested
import bench_pasid
import bench_queues
import bench_start
import bench_tables
import bench_tlb
import bench_translate
from questions import LIBRARY, Workbench
from timing import MIN_ROUNDS, elapsed, idlest_cpu, interleaved, machine, repeats

from smmufast._files import write_text

MODULES = (
    bench_translate,
    bench_nested,
    bench_cached,
    bench_tlb,
    bench_queues,
    bench_pasid,
    bench_start,
    bench_tables,
    bench_domains,
)
QUESTIONS = sorted(
    (question for module in MODULES for question in module.QUESTIONS),
    key=lambda question: not question.main,
)

SPREAD = 0.1  # between a baseline's quartiles; a larger one is marked
MARK = "†"


def rows(question, names, samples):
    """Yield the lines of one question: first its baseline."""
    base = samples[0]
    for i, (name, taken) in enumerate(zip(names, samples, strict=True)):
        figures = f"{format_time(statistics.median(taken))} | {format_time(min(taken))}"
        if i == 0:
            low, middle, high = statistics.quantiles(base, n=4)
            mark = MARK if high - low >= SPREAD * middle else ""
            what = f"{question.group}; per {question.unit} | {name}"
            ratio = f"1 ({low / middle:.2f}–{high / middle:.2f}){mark} | 1"
        else:
            ratios = [a / b for a, b in zip(taken, base, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            bold = "**" if LIBRARY in name else ""
            what = f" | {bold}{name}{bold}"
            ratio = f"{bold}{middle:.2f}{bold} ({low:.2f}–{high:.2f})"
            ratio += f" | {min(taken) / min(base):.2f}"
        yield f"| {what} | {figures} | {ratio} |"


def format_time(seconds):
    """Return a time with three digits and its unit."""
    for unit, scale in (("ns", 1e-9), ("µs", 1e-6), ("ms", 1e-3)):
        if seconds < 999.5 * scale or unit == "ms":
            return f"{seconds / scale:.3g} {unit}"


def measure(question, bench, rounds, library):
    """Return the lines of one question."""
    names = [name for name in question.runs if library or LIBRARY not in name]
    runs = [question.runs[name](bench) for name in names]

    def sampler(run):
        times = repeats(run, question.clock)
        return lambda: elapsed(run, question.clock, times) / times / run.items

    return rows(question, names, interleaved([sampler(run) for run in runs], rounds))


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Print library ÷ baseline as a Markdown table.")
    parser.add_argument("--rounds", type=int, default=15, help="at least 7 (default 15)")
    parser.add_argument("--only", default="", help="only questions whose name has this text")
    parser.add_argument("--main", action="store_true", help="only the questions to look at first")
    parser.add_argument("--cpu", type=int, help="the processor to run on (default: the idlest)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument(
        "--baselines", action="store_true", help="leave the library out: it need not be installed"
    )
    options = parser.parse_args()
    rounds = max(options.rounds, MIN_ROUNDS)
    asked = [
        question
        for question in QUESTIONS
        if options.only in question.group and (question.main or not options.main)
    ]
    if not asked:
        parser.error(f"--only {options.only}: no question has that in its name")
    bench = Workbench()
    cpu = idlest_cpu() if options.cpu is None else options.cpu
    os.sched_setaffinity(0, {cpu})
    lines = []

    def emit(line):
        lines.append(line + "\n")
        print(line, flush=True)

    emit(f"{machine()}; {rounds} rounds, interleaved, processor time.")
    emit(
        f"{MARK}: the baseline's quartiles are {SPREAD * 100:.0f} % of its median apart or more.\n"
    )
    emit("| question | what | median | min | ÷ baseline: median (quartiles) | by min |")
    emit("|---|---|---:|---:|---:|---:|")
    for question in asked:
        for line in measure(question, bench, rounds, not options.baselines):
            emit(line)
    if options.markdown:
        write_text(options.markdown, "".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
