"""Build of the compiled modules; everything else is in pyproject.toml.

SMMUFAST_DEBUG=1 builds with Cython's bounds checks, with C assertions and with debug information.
An -O or -g in CFLAGS is kept (the build for sanitizers has both).  One module is compiled at a
time for each processor that the process may use, so `taskset -c 0 pip install .` takes the least
memory.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

DEBUG = os.environ.get("SMMUFAST_DEBUG") == "1"
DIRECTIVES = {
    "language_level": 3,
    "binding": True,
    "embedsignature": False,
    "boundscheck": DEBUG,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": DEBUG,
    "autotestdict": False,
}
PYTHON_DIRECTIVES = {"language_level": 3, "binding": True, "annotation_typing": False}
FLAGS = ["-fno-strict-aliasing", "-Wall", "-Wno-unused-function"]
# gcc alone: it takes what a failing rule does not set for something that its caller reads.
QUIET = ["-Wno-maybe-uninitialized"]
# The rules are small functions with constant arguments: a driver is fast when all of them are
# inlined into it, which exceeds what gcc allows itself by default.
INLINE = [
    "--param=max-inline-insns-single=1500",
    "--param=large-function-growth=2000",
    "--param=inline-unit-growth=300",
    "--param=large-stack-frame-growth=10000",
]
# Python that an installed package has compiled as it stands: no handler of a signal runs in the
# middle of a change there, and calls cost less.  A build in place leaves it out, so that whoever
# works on it runs what they edit, and so does a build for debugging, which takes long enough.
DRIVER = [
    "attachment", "aux", "device", "domain", "fault", "group", "ids", "mediated", "nested",
    "profile", "sva", "system", "pasid/backends", "pasid/notifiers", "pasid/picked", "pasid/sets",
    "pasid/space", "smmu/cdtable", "smmu/entry", "smmu/invalidations", "smmu/iommu",
    "smmu/master",
]  # fmt: skip


def flags(kind, python):
    """The flags for a compiler of this kind, "gcc" or "clang"; for `python` it need not inline."""
    given = os.environ.get("CFLAGS", "").split()
    optimise = ["-O1"] if python else ["-O3", *(INLINE if kind == "gcc" else [])]
    debug = ["-g"] if DEBUG else ["-g0"]  # Python's own flags may have a -g
    return [
        *(optimise if not any(flag.startswith("-O") for flag in given) else []),
        *(debug if not any(flag.startswith("-g") for flag in given) else []),
        *FLAGS,
        *(QUIET if kind == "gcc" else []),
    ]


KIND = """
#if defined __clang__
clang
#elif defined __GNUC__
gcc
#endif
"""
HEADERS = {
    "stdlib.h": "of the C library (Debian: libc6-dev, Fedora: glibc-devel, Alpine: musl-dev)",
    "Python.h": "of this Python (Debian: python{0}-dev, Fedora: python{0}-devel)".format(
        "{}.{}".format(*sys.version_info)
    ),
}


def compiler_kind(compiler, include_dirs):
    """Return "gcc" or "clang", or end with one sentence that says what is missing.

    Parameters
    ----------
    compiler : distutils.ccompiler.CCompiler
    include_dirs : iterable of str
        Where the headers of Python are.
    """
    if compiler.compiler_type != "unix":
        raise SystemExit(
            "smmufast does not run on Windows: it needs POSIX threads, mmap, and gcc or clang, "
            "which the Windows Subsystem for Linux has"
        )
    words = compiler.compiler_so
    name = " ".join(words[: 1 + words[0].endswith("ccache")])

    def preprocess(text):
        command = [*words, *(f"-I{path}" for path in include_dirs), "-E", "-P", "-x", "c", "-"]
        return subprocess.run(command, input=text, capture_output=True, text=True)

    try:
        kind = preprocess(KIND)
    except OSError:
        raise SystemExit(
            f"smmufast needs a C compiler, and there is no {name}: install gcc or clang "
            "(Debian and Fedora: the package gcc; macOS: xcode-select --install), or set CC"
        ) from None
    if kind.returncode:
        raise SystemExit(f"smmufast needs a C compiler, and {name} fails: {kind.stderr.strip()}")
    if not kind.stdout.strip():
        raise SystemExit(f"smmufast needs gcc or clang, and {name} is neither: set CC")
    for header, whose in HEADERS.items():
        if preprocess(f"#include <{header}>\n").returncode:
            raise SystemExit(
                f"smmufast needs C headers, and {name} finds no {header}: install those {whose}"
            )
    return kind.stdout.strip()


def processors():
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Build(build_ext):
    """Translates and compiles when extensions are asked for, and not for metadata or an sdist."""

    translation: ClassVar[dict] = {}  # further arguments of cythonize

    def finalize_options(self):
        if not (self.inplace or self.editable_mode or DEBUG):
            paths = [Path(f"smmufast/iommu/{name}.py") for name in DRIVER]
            self.distribution.ext_modules += [extension(path) for path in paths]
        super().finalize_options()

    def build_extensions(self):
        kind = compiler_kind(self.compiler, self.include_dirs)

        import numpy
        from Cython.Build import cythonize

        sources = {}
        for python in (False, True):
            # Python's own annotations are not C types
            directives = PYTHON_DIRECTIVES if python else DIRECTIVES
            given = [each for each in self.extensions if is_python(each) is python]
            translated = cythonize(given, compiler_directives=directives, **self.translation)
            sources |= {each.name: (each.sources, flags(kind, python)) for each in translated}
        for each in self.extensions:
            each.sources, each.extra_compile_args = sources[each.name]
            each.include_dirs.append(numpy.get_include())
        self.parallel = self.parallel or processors()
        super().build_extensions()


def extension(path):
    """The extension module of a source."""
    return Extension(
        ".".join(path.with_suffix("").parts),
        [str(path)],
        include_dirs=["smmufast"],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
        undef_macros=["NDEBUG"] if DEBUG else [],
        depends=sorted(map(str, Path("smmufast").rglob("*.h"))),
    )


def is_python(extension):
    """Whether an extension module is made of Python."""
    return extension.sources[0].endswith(".py")


def main():
    setup(
        cmdclass={"build_ext": Build},
        ext_modules=[extension(path) for path in sorted(Path("smmufast").rglob("*.pyx"))],
    )


if __name__ == "__main__":
    main()
