"""Build of the two consumers; all that it needs of smmufast is get_include()."""

from Cython.Build import cythonize
from setuptools import Extension, setup

import smmufast

setup(
    name="consumer",
    ext_modules=cythonize(
        [
            Extension(
                "cython_consumer",
                ["cython_consumer.pyx"],
                include_dirs=[smmufast.get_include()],
            ),
            Extension(
                "plain_consumer",
                ["plain_consumer.c"],
                include_dirs=[smmufast.get_include()],
                extra_compile_args=["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror",
                                    "-Wno-missing-field-initializers"],
                libraries=["pthread"],
            ),
        ],
        language_level=3,
    ),
)
