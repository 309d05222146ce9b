"""`smmufast capture`: make a capture of a dump, for which all other commands are."""

from __future__ import annotations

import argparse
import re

from smmufast._commands.output import plural, print_json
from smmufast._commands.words import AGREES, Add, UsageError, number
from smmufast._files import as_number


def add(command: Add) -> None:
    """Add `capture`."""
    made = command("capture", "Make a capture of a memory dump and the SMMU's registers.", "")
    made.add_argument("dump", metavar="DUMP", help="an ELF core, or a raw image with --base")
    made.add_argument("directory", metavar="DIRECTORY", help="a new directory for the capture")
    made.add_argument("--base", type=number, metavar="A", help="where a raw image begins")
    made.add_argument("--registers", metavar="FILE", help="lines of a register and its value")
    made.add_argument(
        "--mmio", type=number, metavar="A", help="where the dump has the SMMU's own pages"
    )
    made.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a register, such as STRTAB_BASE=0x4000; may be given again",
    )
    made.set_defaults(run=_capture)


def _capture(arguments: argparse.Namespace) -> int:
    """Run `capture`."""
    from smmufast.capture import Capture
    from smmufast.dumps import complete, memory_of, registers_at, registers_of

    try:
        memory = memory_of(arguments.dump, arguments.base)
        registers: dict[str, int] = {}
        if arguments.mmio is not None:
            registers |= registers_at(memory, arguments.mmio)
        if arguments.registers is not None:
            registers |= registers_of(arguments.registers)
        for text in arguments.register:
            parts = re.fullmatch(r"(?i:SMMU_)?(\w+)=(\w+)", text)
            value = None if parts is None else as_number(parts[2])
            if parts is None or value is None:
                raise UsageError(f"--register: {text[:60]!r} is not NAME=VALUE")
            registers[parts[1].upper()] = value
        saved = Capture.save(arguments.directory, memory=memory, registers=complete(registers))
    except (ValueError, ImportError) as error:
        raise UsageError(error) from None
    pages = len(saved[0].page_addresses)
    if arguments.json:
        print_json({"capture": saved.path, "pages": pages, "masked": saved[0].masked})
    else:
        print(f"{saved.path}: {plural(pages, 'page')}")
    return AGREES
