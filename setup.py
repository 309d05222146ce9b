"""Build of the compiled modules; everything else is in pyproject.toml.

SMMUFAST_DEBUG=1 builds with Cython's bounds checks and with C assertions.  An -O in CFLAGS is
kept (the build for sanitizers has one).
"""

import glob
import os

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("SMMUFAST_DEBUG") == "1"
MODULES = ["_memory", "_pasid", "_registers", "_ring", "_smmu", "_stale", "_tables", "_tlb"]

# The rules are small functions with constant arguments: a driver is fast when all of them are
# inlined into it, which exceeds what the compiler allows itself by default.
INLINE = [
    "--param=max-inline-insns-single=1500",
    "--param=large-function-growth=2000",
    "--param=inline-unit-growth=300",
    "--param=large-stack-frame-growth=10000",
]
# An -O in CFLAGS is kept, as sanitizer and coverage builds want.
OPTIMISE = [] if "-O" in os.environ.get("CFLAGS", "") else ["-O3", *INLINE]

extensions = [
    Extension(
        f"smmufast.{name}",
        [f"smmufast/{name}.pyx"],
        include_dirs=[numpy.get_include(), "smmufast"],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
        undef_macros=["NDEBUG"] if DEBUG else [],
        extra_compile_args=[*OPTIMISE, "-fno-strict-aliasing", "-Wall", "-Wno-unused-function"],
        depends=sorted(glob.glob("smmufast/*.h")),
    )
    for name in MODULES
    if os.path.exists(f"smmufast/{name}.pyx")
]

setup(
    options={"build_ext": {"parallel": os.cpu_count()}},
    ext_modules=cythonize(
        extensions,
        compiler_directives={
            "language_level": 3,
            "binding": True,
            "embedsignature": False,
            "boundscheck": DEBUG,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": DEBUG,
            "autotestdict": False,
        },
    )
)
