"""Builds and imports the baselines, in <repository>/build/benchmarks; installs nothing."""

import importlib.util
import runpy
from pathlib import Path

from setuptools import Distribution, Extension

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "benchmarks"

# The library's own: the compilers must differ in nothing.
LibraryBuild = runpy.run_path(str(HERE.parent / "setup.py"))["Build"]


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
    extension = Extension(
        name,
        [str(folder / f"{name}.pyx"), *(str(folder / f"{source}.c") for source in plain)],
        include_dirs=[str(folder), *([] if package is None else [str(package)])],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
        depends=[*map(str, folder.glob("*.[ch]"))],
    )
    command = LibraryBuild(Distribution({"name": "benchmarks", "ext_modules": [extension]}))
    command.translation = {
        "build_dir": str(BUILD),
        "include_path": [] if package is None else [str(Path(package).parent)],
        "quiet": True,
    }
    command.build_lib = str(BUILD)
    command.build_temp = str(BUILD / "objects")
    command.ensure_finalized()
    command.run()
    path = command.get_ext_fullpath(name)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
