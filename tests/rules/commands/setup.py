"""Build of the wrapper by which the tests reach the command rules."""

from Cython.Build import cythonize
from setuptools import Extension, setup

import smmufast

setup(
    name="commands",
    ext_modules=cythonize(
        [
            Extension(
                "command_effect",
                ["command_effect.pyx"],
                include_dirs=[smmufast.get_include()],
            )
        ],
        language_level=3,
    ),
)
