"""Prints what a domain costs in memory, as a Markdown table.

From the repository's root, with the package installed::

    python benchmarks/domain_memory.py

Each row is measured in a process of its own: the domains of `bench_domains.Domains`, all attached.
Host memory is what the process grows by, tables in simulated memory included; tables are what the
driver took for them: a first table of 4 KiB for each, CD tables, and some pages of a few.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

COUNTS = (1, 1000, 100_000)


def measure(count):
    """Print bytes of the process and bytes of tables, of so many domains."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from bench_domains import Domains

    Domains(1)  # what is imported and made once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    many = Domains(count)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    empty = sum(iommu._strtab_size for iommu in many.system.iommus)
    print(grown * 1024, many.system.pages.in_use - empty)


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, metavar="DOMAINS")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        measure(options.one)
        return
    print("| domains | host memory, each | tables, each |")
    print("|---:|---:|---:|")
    for count in options.counts:
        command = [sys.executable, "-P", __file__, "--one", str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        host, tables = (int(word) / count / 1024 for word in done.stdout.split())
        print(f"| {count} | {host:.1f} KiB | {tables:.1f} KiB |", flush=True)


if __name__ == "__main__":
    main()
