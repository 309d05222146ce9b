"""Build smmufast with sanitizers (address and undefined behaviour, or threads) and run a program.

    python -P tests/sanitize.py                                  # fuzz_bytes.py, 200 systems
    python -P tests/sanitize.py -- tests/fuzz_bytes.py --seconds 600 --seed 12345
    python -P tests/sanitize.py -- -m pytest tests/engine/test_memory.py
    python -P tests/sanitize.py --threads -- -m pytest tests/device/test_locks.py

What follows -- is given to Python, which imports the instrumented build; it is made apart from the
sources and thrown away (--keep DIRECTORY keeps it, and uses what is there).  Any finding ends the
program with a report and an exit status that is not 0.  The `test` extra and gcc with its
sanitizers are needed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


class Sanitizer(NamedTuple):
    """Its flags, the libraries that the interpreter must load first, and what the code calls."""

    flags: str
    libraries: tuple[str, ...]
    calls: tuple[bytes, ...]
    options: dict[str, str]


MEMORY = Sanitizer(
    "-fsanitize=address,undefined -fno-sanitize-recover=all",
    ("libasan.so", "libubsan.so"),
    (b"__asan_report_load8", b"__ubsan_handle_"),
    {
        # Python leaks by design; a request for 2^52 bytes is to fail as it does without sanitizers
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1"
        ":allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # else small objects have no red zones
    },
)
THREADS = Sanitizer(
    "-fsanitize=thread",
    ("libtsan.so",),
    (b"__tsan_read8",),
    {"TSAN_OPTIONS": "allocator_may_return_null=1", "PYTHONMALLOC": "malloc"},
)


def build(directory, sanitizer, optimise=1):
    """Install an instrumented build into directory/site, from a copy of the sources."""
    flags = f"-O{optimise} -g1 -fno-omit-frame-pointer {sanitizer.flags}"
    sources = directory / "sources"
    shutil.copytree(
        ROOT / "smmufast", sources / "smmufast",
        ignore=shutil.ignore_patterns("*.c", "*.so", "__pycache__"),
    )  # fmt: skip
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    subprocess.run(
        [
            sys.executable, "-P", "-m", "pip", "install", "--quiet", "--no-build-isolation",
            "--no-deps", "--no-index", "--disable-pip-version-check", "--no-warn-script-location",
            "--target", directory / "site", sources,
        ],
        env=os.environ | {"CFLAGS": flags, "LDFLAGS": flags, "SMMUFAST_DEBUG": "1"}, check=True,
        cwd=directory, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def check_instrumented(site, sanitizer):
    """Every compiled module calls the sanitizers; else a run would prove nothing."""
    modules = list((site / "smmufast").rglob("*.so"))
    if not modules:
        raise SystemExit(f"sanitize: no compiled module in {site}")
    for path in modules:
        code = path.read_bytes()
        for name in sanitizer.calls:
            if name not in code:
                raise SystemExit(f"sanitize: {path.name} does not call {name.decode()}")


def libraries(sanitizer):
    """The sanitizers' run-time libraries, which the interpreter must load first."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC")).split()[0]
    found = []
    for name in sanitizer.libraries:
        path = subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if not Path(path).is_absolute():
            raise SystemExit(f"sanitize: {compiler} has no {name}")
        found.append(path)
    return found


def environment(site, sanitizer):
    """Variables of a Python that runs the instrumented build."""
    return os.environ | sanitizer.options | {
        "LD_PRELOAD": " ".join(libraries(sanitizer)),
        "PYTHONPATH": os.pathsep.join((str(site), str(TESTS), str(TESTS / "support"))),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="keep or reuse the build")
    parser.add_argument(
        "--optimise", type=int, choices=range(4), default=1, metavar="N",
        help="build with -ON: 0 is built in less than half the time, and runs half as fast",
    )  # fmt: skip
    parser.add_argument(
        "--threads", action="store_true",
        help="ThreadSanitizer, which looks for data races, instead of the others",
    )  # fmt: skip
    parser.add_argument("program", nargs="*", help="arguments of Python, after --")
    arguments = parser.parse_args()
    sanitizer = THREADS if arguments.threads else MEMORY
    program = arguments.program or [str(TESTS / "fuzz_bytes.py")]
    with tempfile.TemporaryDirectory(prefix="smmufast-sanitize-") as temporary:
        directory = (arguments.keep or Path(temporary)).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "site").exists():
            build(directory, sanitizer, arguments.optimise)
        check_instrumented(directory / "site", sanitizer)
        # the shadow memory of threads has no place for what is mapped at random
        fixed = ["setarch", "-R"] if arguments.threads else []
        done = subprocess.run(
            [*fixed, sys.executable, "-P", *program],
            env=environment(directory / "site", sanitizer), cwd=ROOT,
        )  # fmt: skip
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
