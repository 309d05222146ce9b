"""Compares two builds of the library on this machine: pairwise ratios of the hot loops.

From the repository's root::

    python benchmarks/compare.py BEFORE AFTER

Each is a virtual environment in which the package is installed, or a directory that
``pip install --target DIRECTORY .`` has filled.  Both are measured in turn, in child processes on
one processor.  A pair is a time of each, one directly after the other, AFTER first in every second
pair; the children are started anew several times, for where things lie in memory makes a
difference too.  Shown are the median times and the least, median and greatest AFTER ÷ BEFORE.
The loops are those of this directory's hot.py, whatever the builds.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # run with -P, as the children are

import timing

ITEMS = 1 << 14


def child():
    """Answer each line, the name of a loop, with seconds an item; return 0 at the end."""
    import hot

    import smmufast

    runs = {}
    print(json.dumps([str(Path(smmufast.__file__).parent), list(hot.HOT)]), flush=True)
    gc.disable()
    for line in sys.stdin:
        name = line.rstrip("\n")
        if name not in runs:
            gc.collect()
            run = hot.HOT[name](ITEMS)
            runs[name] = run, timing.repeats(run, time.process_time)
        run, times = runs[name]
        taken = timing.elapsed(run, time.process_time, times)
        print(taken / times / run.items, flush=True)
    return 0


class Build:
    """One build, and the child process that measures it.

    Parameters
    ----------
    path : Path
        A virtual environment, or a directory of packages.
    cpu : int
    """

    def __init__(self, path, cpu):
        python, environment = path / "bin" / "python", dict(os.environ)
        environment.pop("PYTHONPATH", None)
        if not python.exists():
            if not (path / "smmufast").is_dir():
                raise SystemExit(f"{path}: neither bin/python nor smmufast is in it")
            python, environment["PYTHONPATH"] = sys.executable, str(path.resolve())
        self.process = subprocess.Popen(
            [python, "-P", __file__, "--child"],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
        )
        try:
            self.where, self.names = json.loads(self._answer())
        except ValueError:
            raise SystemExit(f"{path}: the loops do not run there") from None

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise ValueError("the child has ended")
        return line

    def measure(self, name):
        """Return seconds an item of a loop."""
        try:
            self.process.stdin.write(name + "\n")
            self.process.stdin.flush()
            return float(self._answer())
        except (ValueError, BrokenPipeError):
            raise SystemExit(f"{self.where}: {name}: does not run") from None

    def close(self):
        """End the child."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def measure(paths, cpu, names, starts, rounds):
    """Return for each loop the times of both builds, in pairs; and where the builds are."""
    taken, where = {}, []
    for start in range(starts):
        order = (0, 1) if start % 2 == 0 else (1, 0)
        builds = dict(zip(order, [Build(paths[i], cpu) for i in order], strict=True))
        where = [builds[i].where for i in (0, 1)]
        for name in builds[0].names:
            if names not in name:
                continue
            for build in builds.values():  # made ready
                build.measure(name)
            for k in range(rounds):
                pair = {i: builds[i].measure(name) for i in ((0, 1), (1, 0))[k % 2]}
                taken.setdefault(name, []).append((pair[0], pair[1]))
        for build in builds.values():
            build.close()
    return taken, where


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Print AFTER ÷ BEFORE of the hot loops.")
    parser.add_argument("before", type=Path, help="a virtual environment, or pip's --target")
    parser.add_argument("after", type=Path, help="likewise")
    parser.add_argument("--only", default="", help="only loops whose name has this text")
    parser.add_argument("--starts", type=int, default=3, help="of the child processes (default 3)")
    parser.add_argument("--rounds", type=int, default=7, help="pairs for each start (default 7)")
    parser.add_argument("--cpu", type=int, help="the processor to run on (default: the idlest)")
    options = parser.parse_args()
    cpu = timing.idlest_cpu() if options.cpu is None else options.cpu
    taken, where = measure(
        (options.before, options.after),
        cpu,
        options.only,
        max(options.starts, 1),
        max(options.rounds, 2),
    )
    if not taken:
        parser.error(f"--only {options.only}: no loop has that in its name")
    print(f"{timing.machine()}; BEFORE is {where[0]}, AFTER is {where[1]};")
    print(f"{options.starts} starts of {options.rounds} pairs, processor time, ns an item.\n")
    print("| loop | BEFORE | AFTER | ÷: min | median | max |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, pairs in taken.items():
        before, after = (statistics.median(side) * 1e9 for side in zip(*pairs, strict=True))
        ratios = [b / a for a, b in pairs]
        print(
            f"| {name} | {before:.3g} | {after:.3g} | {min(ratios):.3f}"
            f" | {statistics.median(ratios):.3f} | {max(ratios):.3f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(child() if sys.argv[1:] == ["--child"] else main())
