"""Counts the instructions of the hot loops, which do not depend on how busy the machine is.

From the repository's root, with the package and its `test` extra installed, and valgrind::

    python benchmarks/instructions.py

The loops run under callgrind, on the portable path (SMMUFAST_VECTOR=0: valgrind 3.19 does not know
AVX-512).  A count is the difference between runs of N and of 2 N items, divided by N.  It is that
of the installed library, as it was built: build without -march in CFLAGS.

instructions.json holds the counts, keyed by what they depend on: the compiler and the Cython that
built the library, which are read from its compiled modules, and the Python that runs the loops.
Where it has counts under the same key, they are compared: when one is more than 3 % away, the exit
status is 1.  `--write` puts the new ones in their place.  Where it has none, the counts are
printed and written.  Without valgrind the exit status is 2.
"""

import argparse
import gc
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

FILE = Path(__file__).resolve().with_suffix(".json")
ITEMS = 1 << 12
WITHIN = 0.03
MARK = "limits_mark"  # a function of _limits, at which callgrind begins a new part


def versions():
    """Return what the counts depend on."""
    import smmufast
    import smmufast._device.smmu

    module = Path(smmufast._device.smmu.__file__).read_bytes()
    gcc = re.findall(rb"GCC: \([^)]*\) ([\d.]+)", module)
    clang = re.findall(rb"clang version ([\d.]+)", module)
    compilers = {f"GCC {number.decode()}" for number in gcc}
    compilers |= {f"clang {number.decode()}" for number in clang}
    # a module without Python functions of its own does not name it: one of the others may
    names = b"".join(each.read_bytes() for each in Path(smmufast.__file__).parent.rglob("*.so"))
    found = re.findall(rb"_cython_(\d+(?:_\d+)+)", names)
    cython = {number.decode().replace("_", ".") for number in found}
    return ", ".join(
        [
            " and ".join(sorted(compilers)) or "unknown compiler",
            "Cython " + (" and ".join(sorted(cython)) or "unknown"),
            f"{platform.python_implementation()} {platform.python_version()}",
        ]
    )


def child(path, only):
    """Run the loops between marks, under callgrind, and print which were run; return 0."""
    import hot

    spec = importlib.util.spec_from_file_location("_limits", path)  # without the compiler
    limits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(limits)
    names = []
    gc.disable()
    for name, build in hot.HOT.items():
        if only not in name:
            continue
        for items in (ITEMS, 2 * ITEMS):
            run = build(items)
            for _ in range(2):  # what happens once has happened
                if run.reset:
                    run.reset()
                limits.mark()
                run.call()
                limits.mark()
            names.append(name)
    print(json.dumps(names))
    return 0


def totals(folder):
    """Return the instructions of each part, in order."""
    found = {}
    for path in Path(folder).glob("counts*"):
        text = path.read_text(encoding="utf-8", errors="replace")
        part, total = (
            re.search(r"^part: (\d+)$", text, re.M),
            re.search(r"^totals: (\d+)", text, re.M),
        )
        if part and total:
            found[int(part[1])] = int(total[1])
    return [found[part] for part in sorted(found)]


def count(valgrind, only=""):
    """Return the instructions an item of each loop whose name has a text."""
    import bench_limits

    library = bench_limits.module().__file__
    environment = os.environ | {"SMMUFAST_VECTOR": "0", "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryDirectory() as folder:
        tool = ("--tool=callgrind", f"--dump-before={MARK}")
        where = f"--callgrind-out-file={folder}/counts"
        python = (sys.executable, "-P", __file__, "--child", library, only)
        done = subprocess.run(
            [valgrind, *tool, where, *python],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        names = json.loads(done.stdout)
        parts = totals(folder)
    if len(parts) != 4 * len(names) + 1:
        raise SystemExit(f"callgrind wrote {len(parts)} parts for {len(names)} runs")
    counts = dict.fromkeys(names, 0)
    for i, name in enumerate(names):
        # parts: before the first mark, then after each of four a run; N first, then 2 N
        counts[name] += parts[4 * i + 3] * (1 if i % 2 else -1)
    return {name: round(total / ITEMS, 2) for name, total in counts.items()}


def judge(key, counts, file, write):
    """Print counts beside those of a file, and write what it lacks; return the exit status."""
    from smmufast._files import write_text

    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    before = kept.get(key, {})
    beyond = {
        name
        for name, now in counts.items()
        if name in before and abs(now - before[name]) > WITHIN * before[name]
    }
    print(f"{key}; instructions an item.\n\n| loop | kept | now | ÷ | |\n|---|---:|---:|---:|---|")
    for name, now in counts.items():
        was = before.get(name)
        ratio = f"{was:g} | {now:g} | {now / was:.3f}" if was else f" | {now:g} | "
        print(f"| {name} | {ratio} | {'**beyond**' if name in beyond else ''} |")
    if write or not counts.keys() <= before.keys():
        kept[key] = before | counts if write else counts | before
        text = json.dumps(kept, indent=1, sort_keys=True, ensure_ascii=False)
        write_text(file, text + "\n")
        print(f"\nWritten to {file.name}.")
    return 1 if beyond and not write else 0


def main():
    """Count, then compare or write; return the exit status."""
    parser = argparse.ArgumentParser(description="Count the instructions of the hot loops.")
    parser.add_argument("--only", default="", help="only loops whose name has this text")
    parser.add_argument("--write", action="store_true", help="keep the counts, whatever they were")
    parser.add_argument("--file", type=Path, default=FILE, help=f"default: {FILE.name}, here")
    options = parser.parse_args()
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        print("valgrind is not installed: nothing is counted", file=sys.stderr)
        return 2
    counts = count(valgrind, options.only)
    if not counts:
        parser.error(f"--only {options.only}: no loop has that in its name")
    return judge(versions(), counts, options.file, options.write)


if __name__ == "__main__":
    sys.exit(child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main())
