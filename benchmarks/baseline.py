"""Builds and imports _baseline, in <repository>/build/benchmarks. Nothing of it is installed."""

import importlib.util
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "benchmarks"

# The library's own (setup.py), as a test checks: the compilers must differ in nothing.
FLAGS = [
    "-O3",
    "--param=max-inline-insns-single=1500",
    "--param=large-function-growth=2000",
    "--param=inline-unit-growth=300",
    "--param=large-stack-frame-growth=10000",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wno-unused-function",
]
DIRECTIVES = {
    "language_level": 3,
    "binding": True,
    "embedsignature": False,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
    "autotestdict": False,
}


def load():
    """Return the module _baseline, built first where a source is newer than it."""
    extension = Extension(
        "_baseline",
        [str(HERE / "_baseline.pyx"), str(HERE / "baseline_walk.c")],
        include_dirs=[str(HERE)],
        depends=[str(HERE / "baseline_walk.h")],
        extra_compile_args=FLAGS,
    )
    modules = cythonize(
        [extension], build_dir=str(BUILD), compiler_directives=DIRECTIVES, quiet=True
    )
    command = build_ext(Distribution({"name": "benchmarks", "ext_modules": modules}))
    command.build_lib = str(BUILD)
    command.build_temp = str(BUILD / "objects")
    command.ensure_finalized()
    command.run()
    path = command.get_ext_fullpath("_baseline")
    spec = importlib.util.spec_from_file_location("_baseline", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
