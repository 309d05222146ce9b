"""Builds and imports the baselines, in <repository>/build/benchmarks; installs nothing."""

import importlib.util
from pathlib import Path

import numpy
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


def load(name, *plain, package=None, folder=HERE):
    """Return a compiled module, built first where a source is newer than it.

    Parameters
    ----------
    name : str
        Of the module, and of its .pyx.
    *plain : str
        Names of its plain C sources and headers.
    package : path-like, optional
        The directory of a package whose .pxd files it takes.
    folder : Path, optional
        Where all of these are.
    """
    include = [str(folder), numpy.get_include()]
    if package is not None:
        include.append(str(package))
    extension = Extension(
        name,
        [str(folder / f"{name}.pyx"), *(str(folder / f"{source}.c") for source in plain)],
        include_dirs=include,
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
        depends=[*map(str, folder.glob("*.[ch]"))],
        extra_compile_args=FLAGS,
    )
    modules = cythonize(
        [extension],
        build_dir=str(BUILD),
        compiler_directives=DIRECTIVES,
        include_path=[] if package is None else [str(Path(package).parent)],
        quiet=True,
    )
    command = build_ext(Distribution({"name": "benchmarks", "ext_modules": modules}))
    command.build_lib = str(BUILD)
    command.build_temp = str(BUILD / "objects")
    command.ensure_finalized()
    command.run()
    path = command.get_ext_fullpath(name)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
