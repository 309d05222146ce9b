"""Install the sdist on other Pythons, and with other compilers, numpy and Cython, and test it.

    python -P tests/pythons.py python3.11 python3.12 python3.13 python3.14
    python -P tests/pythons.py python3.11 --numpy '2.0.*' --cython '3.1.*'
    python -P tests/pythons.py python3.13 --cc clang --cflags=-O3 --tests tests/engine/test_batch.py

For each Python: a new virtual environment, the newest build requirements that pip finds (or the
versions named), an sdist and what is installed from it, a replay of the shipped capture, and tests
(the quick ones, but for lint and types, unless others are named; --tests alone runs none).  Only
the standard library is needed here; pip must reach an index.  The exit status is 1 if anything
fails or a compiler warns.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARNING = re.compile(
    r"(?:[.]\w+:\d+:\d+|clang|gcc): warning:|performance hint|[.]p[yx][xd]:\d+:\d+:"
)
SDIST = "from setuptools.build_meta import build_sdist; build_sdist('..')"
#: folders and files that building leaves in the sources
MADE = shutil.ignore_patterns(
    ".*_cache", ".git", ".venv", "build", "dist", "__pycache__", "*.egg-info", "*.so", "_*.c"
)
FACTS = """\
import sys, sysconfig, numpy, Cython
free = " free-threaded" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
print(f"Python {sys.version.split()[0]}{free}, numpy {numpy.__version__}", end=", ")
print(f"Cython {Cython.__version__}")
"""


class FailedError(Exception):
    """A step that ended with another status than 0."""


class Place:
    """A directory with a virtual environment, and a log of what ran."""

    def __init__(self, directory, arguments):
        self.directory = directory
        self.arguments = arguments
        self.python = directory / "venv" / "bin" / "python"
        self.constraints = directory / "constraints"
        self.log = directory / "log"

    def run(self, *command, cwd=None):
        """Run a command; return what it said."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        environment |= {
            "PIP_CONSTRAINT": str(self.constraints), "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "CFLAGS": self.arguments.cflags,
        }  # fmt: skip
        if self.arguments.cc:
            environment["CC"] = self.arguments.cc
        done = subprocess.run(
            list(map(str, command)), cwd=cwd or self.directory, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        with open(self.log, "a") as log:
            print("$", *command, file=log)
            print(done.stdout, file=log)
        if done.returncode:
            print("", *done.stdout.splitlines()[-25:], sep="\n    ")
            raise FailedError(" ".join(map(str, command[:5])))
        return done.stdout

    def pip(self, *arguments):
        return self.run(self.python, "-m", "pip", *arguments)

    def prepare(self, python):
        """Make the environment, with what building needs; return the versions in words."""
        self.run(python, "-m", "venv", self.directory / "venv")
        wanted = {"numpy": self.arguments.numpy, "Cython": self.arguments.cython}
        pins = [f"{name}=={version}" for name, version in wanted.items() if version]
        self.constraints.write_text("\n".join([*pins, ""]))
        self.pip("install", "--quiet", "setuptools>=77.0.3", "Cython>=3.1,<4", "numpy>=2.0")
        return self.run(self.python, "-c", FACTS).strip()

    def install(self):
        """Install what an sdist holds; return (the unpacked sdist, warnings of the build)."""
        shutil.copytree(ROOT, self.directory / "sources", ignore=MADE)
        self.run(self.python, "-c", SDIST, cwd=self.directory / "sources")
        shutil.rmtree(self.directory / "sources")  # the sdist alone is used
        (sdist,) = self.directory.glob("*.tar.gz")
        said = self.pip("install", "-v", "--no-build-isolation", "--no-deps", sdist)
        with tarfile.open(sdist) as archive:
            archive.extractall(self.directory, filter="data")
        warnings = [line.strip() for line in said.splitlines() if WARNING.search(line)]
        return self.directory / sdist.name.removesuffix(".tar.gz"), warnings

    def test(self, unpacked):
        """Replay the capture and run the tests; return their last line."""
        replayed = self.run(
            self.python.with_name("smmufast"), "replay", "examples/linux-7.3-4k-s1", cwd=unpacked
        )
        if self.arguments.tests == []:
            return replayed.splitlines()[-1]
        self.pip("install", "--quiet", "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis",
                 "rich", "setuptools", "cython")  # fmt: skip
        chosen = self.arguments.tests or [
            "-m", "not slow", "--ignore", "tests/package/test_package.py"
        ]  # fmt: skip
        said = self.run(
            self.python, "-P", "-m", "pytest", "-q", "-n", self.arguments.jobs, "--dist",
            "loadfile", "-p", "no:cacheprovider", "-o", "addopts=", *chosen, cwd=unpacked,
        )  # fmt: skip
        return said.splitlines()[-1]


def tried(python, directory, arguments):
    """Try one Python; whether all is well."""
    directory.mkdir(parents=True)
    place = Place(directory, arguments)
    try:
        print(place.prepare(python), end=": ", flush=True)
        unpacked, warnings = place.install()
        print(f"{len(warnings)} warnings", end=", ", flush=True)
        print(place.test(unpacked), flush=True)
    except FailedError as error:
        print(f"FAILED: {error}", flush=True)
        return False
    for line in warnings[:10]:
        print(f"    {line[:150]}")
    return not warnings


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pythons", nargs="+", metavar="PYTHON", help="a command or a path")
    parser.add_argument("--numpy", metavar="VERSION", help="such as 2.0.* (default: the newest)")
    parser.add_argument("--cython", metavar="VERSION", help="such as 3.1.* (default: the newest)")
    parser.add_argument("--cc", metavar="COMPILER", help="default: the one of each Python")
    parser.add_argument("--cflags", default="-O1", help="default: %(default)s")
    parser.add_argument("--jobs", default="2", metavar="N", help="test processes")
    parser.add_argument("--tests", nargs="*", metavar="ARGUMENT", help="of pytest")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="keep what is made here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="smmufast-pythons-") as temporary:
        top = (arguments.keep or Path(temporary)).resolve()
        good = [
            tried(python, top / f"{number}-{Path(python).name}", arguments)
            for number, python in enumerate(arguments.pythons)
        ]
        if not all(good):
            print(f"{good.count(False)} of {len(good)} failed", file=sys.stderr)
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
