"""Files that are whole or absent, and numbers as people write them.

Not architectural.  What is written lies beside its place, under a name of its own, and takes its
name when it is complete and on the disk: whoever is interrupted, killed or out of space leaves
what was there before.  A name is never used twice, so what a killed process left behind stops
nobody.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

__all__ = ["as_number", "refuse_taken", "replacing", "replacing_directory", "write_text"]

_NUMBER = re.compile(r"0[xX][0-9a-fA-F]{1,4096}|[0-9]{1,4096}", re.A)


def as_number(text: str) -> int | None:
    """Return the number that a text stands for: 0x and hexadecimal digits, or decimal ones.

    None where it is no number.  Wherever text is read as numbers, it is read so.

    >>> as_number("0x10"), as_number("10"), as_number("010"), as_number("ten")
    (16, 10, 10, None)
    """
    if not _NUMBER.fullmatch(text):
        return None
    return int(text, 16 if text[:2] in ("0x", "0X") else 10)


def _beside(path: str) -> str:
    """Return a name beside a path that nothing has."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name[:100]}.{os.getpid()}-{os.urandom(6).hex()}.part")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file whose contents take the place of `path` when the block ends without an error.

    A link is followed: the file that it leads to is replaced.  What is no regular file, such as
    /dev/null or a pipe, is written to in place.

    Raises
    ------
    OSError
        It cannot be written, or `path` is a directory; `path` is as it was.
    """
    path = os.path.realpath(os.fspath(path))
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        with open(path, "wb") as file:
            yield file
        return
    partial = _beside(path)
    file = open(partial, "xb")  # noqa: SIM115
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, which is whole or as it was before."""
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def replacing_directory(path: str | os.PathLike[str]) -> Iterator[str]:
    """Make a directory that takes the name `path` when the block ends without an error.

    Its name until then is what the block gets.

    Raises
    ------
    FileExistsError
        There is something at `path` other than an empty directory.
    OSError
        It cannot be written.
    """
    path = os.path.realpath(os.fspath(path))
    refuse_taken(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    partial = _beside(path)
    os.mkdir(partial)
    try:
        yield partial
        for name in os.listdir(partial):
            descriptor = os.open(os.path.join(partial, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        refuse_taken(path)
        if os.name == "nt" and os.path.isdir(path):  # elsewhere an empty directory is replaced
            os.rmdir(path)
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def refuse_taken(path: str | os.PathLike[str]) -> None:
    """Raise a FileExistsError unless a new directory can have this name."""
    if os.path.isdir(path):
        if os.listdir(path):
            raise FileExistsError(f"{path}: the directory is not empty")
    elif os.path.lexists(path):
        raise FileExistsError(f"{path}: there is a file of that name")
