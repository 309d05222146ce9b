"""Dumps: the memory of a machine in a file, as the memory of an SMMU.

Not architectural.  `memory_of` opens what debuggers write: an ELF core (a crash dump, QEMU's
dump-guest-memory, /proc/vmcore), whose segments say where they lie, or a raw image (QEMU's
pmemsave, a part of /dev/mem) that begins at an address.  `registers_of` reads the SMMU's registers
from a file, `registers_at` from the dump itself, if it has the SMMU's own pages.  `Capture.save`
makes a capture of both, for which all commands are; `smmufast capture` does the three in one::

    memory = memory_of("vmcore")
    registers = registers_of("registers.txt")
    capture = Capture.save("capture", memory=memory, registers=registers)

Reading an ELF core needs pyelftools (``pip install 'smmufast[dump]'``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import numpy as np

from smmufast import layout
from smmufast._arguments import integer, must_be
from smmufast._engine.memory import Memory
from smmufast._files import as_number
from smmufast.features import Features

__all__ = ["DumpError", "complete", "memory_of", "registers_at", "registers_of"]

MOST = 4096
"""Segments of an ELF core, and lines of a file of registers."""
_NAMES = {record.offset: record.name for record in layout.REGISTERS.values()}


class DumpError(ValueError):
    """A dump, or a file of registers, that cannot be read: which file, and what is wrong."""

    def __init__(self, path: str, problem: str) -> None:
        """Name the file and the problem."""
        self.path = path
        self.problem = problem
        super().__init__(f"{path}: {problem}")


def memory_of(path: str | os.PathLike[str], base: int | None = None) -> Memory:
    """Return the memory that a dump holds, mapped from the file; it is not written to.

    Parameters
    ----------
    path : path
        An ELF core or a raw image.
    base : int, optional
        Where a raw image begins, a multiple of 8.

    Raises
    ------
    DumpError
        The file is neither, or `base` is missing for a raw image, or given for a core.
    OSError
        It cannot be read.
    ImportError
        It is a core, and pyelftools is not there.
    """
    path = os.fspath(path)
    with open(path, "rb") as file:
        core = file.read(4) == b"\x7fELF"
        size = file.seek(0, os.SEEK_END)
    if core:
        if base is not None:
            raise DumpError(path, "an ELF core, whose segments have addresses: base must be absent")
        segments = _segments(path, size)
    elif base is None:
        raise DumpError(path, "no ELF core, so base must be given: where the image begins")
    else:
        segments = [(integer("base", base, (1 << 64) - 8), 0, size)]
    memory = Memory()
    for address, offset, length in segments:
        if address % 8:
            raise DumpError(path, must_be("the address of an image", "a multiple of 8", address))
        length -= length % 8
        if not length:
            continue
        try:
            memory.add(np.memmap(path, np.uint8, "c", offset, (length,)), address)
        except (ValueError, ArithmeticError, OSError) as error:
            raise DumpError(path, f"segment at {address:#x}: {error}") from None
    if not memory.regions:
        raise DumpError(path, "it holds no memory")
    return memory


def _segments(path: str, size: int) -> list[tuple[int, int, int]]:
    """Return address, offset and bytes of each loaded segment of a core."""
    try:
        from elftools.common.exceptions import ELFError
        from elftools.elf.elffile import ELFFile
    except ImportError:
        raise ImportError(
            "reading an ELF core needs pyelftools: pip install 'smmufast[dump]'"
        ) from None
    found = []
    with open(path, "rb") as file:
        try:
            elf = ELFFile(file)
            if elf.num_segments() > MOST:
                raise DumpError(path, f"more than {MOST} segments")
            for segment in elf.iter_segments("PT_LOAD"):
                header = segment.header
                if header.p_offset + header.p_filesz > size:
                    raise DumpError(path, f"the segment at {header.p_paddr:#x} is cut off")
                if header.p_filesz:
                    found.append((header.p_paddr, header.p_offset, header.p_filesz))
        except DumpError:
            raise
        except (ELFError, OSError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise DumpError(path, f"a damaged ELF file: {error}") from None
    return found


def registers_of(path: str | os.PathLike[str]) -> dict[str, int]:
    """Read registers from a file of lines: a name or an offset, and a value.

    Between them may stand ``=``, ``:`` or spaces; numbers are 0x... or decimal; ``#`` begins a
    remark.  Two halves of a 64-bit register at two offsets become one.

    Raises
    ------
    DumpError
        A line is none of these, or names no register.
    """
    path = os.fspath(path)
    found: dict[str, int] = {}
    high: dict[str, int] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            if number > MOST:
                raise DumpError(path, f"more than {MOST} lines")
            text = text.partition("#")[0].strip()
            if not text:
                continue
            parts = re.fullmatch(r"(\w+)\s*[=:\s]\s*(\w+)", text)
            value = None if parts is None else as_number(parts[2])
            if parts is None or value is None:
                problem = must_be(f"line {number}", "a register and its value", text[:60])
                raise DumpError(path, problem)
            name, offset = parts[1].upper().removeprefix("SMMU_"), as_number(parts[1])
            if offset in _NAMES:
                name = _NAMES[offset]
            elif offset is not None and offset - 4 in _NAMES:
                high[_NAMES[offset - 4]] = value
                continue
            _check(path, number, name, value)
            found[name] = value
    for name, value in high.items():
        found[name] = found.get(name, 0) & 0xFFFF_FFFF | value << 32
        _check(path, 0, name, found[name])
    return found


def _check(path: str, number: int, name: str, value: int) -> None:
    where = f"line {number}: " if number else ""
    record = layout.REGISTERS.get(name)
    if record is None:
        raise DumpError(path, f"{where}no register of an SMMU is called {name[:40]!r}")
    if value >> 8 * record.bytes:
        raise DumpError(path, f"{where}{must_be(name, f'{record.bytes} bytes', value)}")


def registers_at(memory: Memory, address: int) -> dict[str, int]:
    """Read the registers of an SMMU from its own pages, which begin at an address of memory.

    Those that the memory does not hold are left out.

    Raises
    ------
    ValueError
        None of them is there.
    """
    integer("address", address, (1 << 64) - 1)
    found = {}
    for name, record in layout.REGISTERS.items():
        if record.offset is None or name not in _WANTED:
            continue
        where = address + record.offset
        for region in memory.regions:
            if region.base <= where and where + record.bytes <= region.base + region.size:
                found[name] = int.from_bytes(memory.read(where, record.bytes), "little")
    if not found:
        raise ValueError(must_be("address", "that of pages which the memory holds", address))
    return found


_WANTED = frozenset(
    (
        *("IDR0", "IDR1", "IDR3", "IDR5", "AIDR", "CR0", "CR2", "GBPA", "STRTAB_BASE"),
        *("STRTAB_BASE_CFG", "CMDQ_BASE", "CMDQ_PROD", "CMDQ_CONS", "EVENTQ_BASE", "EVENTQ_PROD"),
        *("EVENTQ_CONS", "PRIQ_BASE", "PRIQ_PROD", "PRIQ_CONS"),
    )
)


def complete(registers: Mapping[str, int]) -> dict[str, int]:
    """Return registers with what a capture needs and nobody told.

    Identification registers are those of `Features()`, CR0 is SMMUEN=1, STRTAB_BASE_CFG that of a
    linear table of 2^16 streams.  STRTAB_BASE has no such value.

    Raises
    ------
    ValueError
        STRTAB_BASE is missing.
    """
    if "STRTAB_BASE" not in registers:
        raise ValueError("STRTAB_BASE is missing: where the stream table is")
    usual = Features()
    defaults = {
        "IDR0": usual.idr0, "IDR1": usual.idr1, "IDR3": usual.idr3, "IDR5": usual.idr5,
        "AIDR": usual.aidr, "CR0": 1, "CR2": 2, "GBPA": 0x1000, "STRTAB_BASE_CFG": 16,
    }  # fmt: skip
    return defaults | dict(registers)
