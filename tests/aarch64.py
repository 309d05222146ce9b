r"""Cross-compile the package for aarch64 and test it there under user emulation.

    apt-get install gcc-aarch64-linux-gnu qemu-user-static proot mmdebstrap
    mmdebstrap --arch=arm64 --variant=extract --skip=check/qemu \
        --include=python3,libpython3-dev bookworm ROOT
    python -P tests/aarch64.py ROOT                          # the tests of the portable path
    python -P tests/aarch64.py ROOT tests/engine/test_batch.py -k random

ROOT holds an aarch64 Python of this Python's version; nothing in it is run to make it.  numpy,
pytest and hypothesis come as wheels for aarch64, so pip must reach an index.  What follows ROOT is
given to pytest.  Emulation takes some twenty times as long.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
PACKAGES = ("numpy", "pytest", "pytest-benchmark", "hypothesis")
TESTS = (
    "test_vector.py", "test_leaves.py", "test_hits.py", "test_batch.py", "test_nested_batch.py",
    "test_threads.py", "test_memory.py", "test_pasid.py", "test_tables.py", "test_twin.py",
    "test_walk.py", "test_cached.py", "test_state.py",
)  # fmt: skip


def wheels(directory):
    """Unpack wheels for aarch64."""
    platforms = [f"--platform=manylinux_2_{n}_aarch64" for n in (28, 27, 26, 17)]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--target", directory,
         "--only-binary=:all:", "--platform=manylinux2014_aarch64", *platforms,
         f"--python-version={VERSION}", "--implementation=cp", *PACKAGES],
        check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def build(tree, root, site):
    """Compile a copy of the sources in place, with the settings of the Python in `root`."""
    made = shutil.ignore_patterns(
        ".*_cache", ".git", ".venv", "build", "dist", "__pycache__", "*.egg-info", "*.so"
    )
    shutil.copytree(ROOT, tree, ignore=made)
    settings = tree / "build" / "settings"
    settings.mkdir(parents=True)
    name = "_sysconfigdata__aarch64-linux-gnu"
    shutil.copy(root / "usr" / "lib" / f"python{VERSION}" / f"{name}.py", settings)
    headers = root / "usr" / "include"
    compiler = os.environ.get("CC", "aarch64-linux-gnu-gcc")
    flags = [
        os.environ.get("CFLAGS", "-O1"),
        f"-I{headers / f'python{VERSION}'}",
        f"-I{site / 'numpy' / '_core' / 'include'}",
        f"-idirafter{headers}",  # Debian's pyconfig.h includes <aarch64-linux-gnu/…/pyconfig.h>
    ]
    subprocess.run(
        [sys.executable, "-P", "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, check=True,
        env=os.environ | {
            "PYTHONPATH": str(settings), "_PYTHON_SYSCONFIGDATA_NAME": name,
            "_PYTHON_HOST_PLATFORM": "linux-aarch64", "CFLAGS": " ".join(flags),
            "CC": compiler, "LDSHARED": f"{compiler} -shared",
        },
    )  # fmt: skip
    (found,) = {path.name.split(".", 1)[1] for path in (tree / "smmufast").rglob("*.so")}
    assert found.endswith("aarch64-linux-gnu.so"), found


def emulated(tree, root, site, arguments):
    """Run pytest there; proot lets the tests start programs of their own."""
    return subprocess.run(
        ["proot", "-q", "qemu-aarch64-static", root / "usr" / "bin" / f"python{VERSION}", "-P",
         "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *arguments],
        cwd=tree, stdin=subprocess.DEVNULL,
        env=os.environ | {
            # a map takes the emulator memory for each of its pages, so large ones are to fail
            "QEMU_RESERVED_VA": "0x1000000000", "QEMU_LD_PREFIX": str(root),
            "PYTHONPATH": os.pathsep.join((str(tree), str(site))),
        },
    ).returncode  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="keep or reuse the build")
    parser.add_argument("root", type=Path, metavar="ROOT")
    parser.add_argument("pytest", nargs=argparse.REMAINDER, help="arguments of pytest")
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    files = (path for name in TESTS for path in (ROOT / "tests").rglob(name))
    quick = ["-m", "not slow", "-k", "not costs_only", *(path.relative_to(ROOT) for path in files)]
    chosen = arguments.pytest or quick  # without what asks the host how much memory is used
    with tempfile.TemporaryDirectory(prefix="smmufast-aarch64-") as temporary:
        directory = (arguments.keep or Path(temporary)).resolve()
        if not (directory / "tree").exists():
            wheels(directory / "site")
            build(directory / "tree", root, directory / "site")
        sys.exit(emulated(directory / "tree", root, directory / "site", chosen))


if __name__ == "__main__":
    main()
