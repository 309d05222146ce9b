"""Stage 2 in pure Python, and stage 1 over memory that lies behind it.

IHI 0070 5.2, 5.5; DDI 0487 D8.2 to D8.4. Stage 1 is that of walk_python.py, which sees addresses
before stage 2. Written apart from baseline_nested.c, for the same streams.
"""

from dataclasses import dataclass

import walk_python
from walk_python import (
    ABORT,
    F_ACCESS,
    F_ADDR_SIZE,
    F_PERMISSION,
    F_TRANSLATION,
    F_WALK_EABT,
    OAS_BITS,
    OK,
    OUTPUT_BITS,
    Words,
    aligned,
    field,
    override,
)

DATA, INSTRUCTION, TABLES = range(3)


class Stage2Fault(Exception):  # noqa: N818 - the term of the architecture
    """Stage 2 refuses to say where a table or a CD lies."""


@dataclass(frozen=True, slots=True)
class Stage2:
    """Stage 2 of an STE with tables of 4 KiB granule."""

    table: int
    input_bits: int
    output_bits: int
    start_shift: int
    affd: bool
    ptw: bool
    record: bool

    def denies(self, leaf, what, write, priv):
        """Whether a leaf refuses an access: of data, of instructions, or to stage-1 tables."""
        if what == INSTRUCTION:
            return leaf >> 53 & 3 in ((1, 2) if priv else (2, 3))
        if what == TABLES and self.ptw and leaf >> 2 & 15 in (0, 1, 2, 3, 4, 8, 12):
            return True
        return not leaf & (0x80 if write else 0x40)

    def translate(self, words, base, ipa, what, write=False, priv=False):
        """Return an event number and 0, or 0 and the output address."""
        if ipa >> self.input_bits:
            return F_TRANSLATION, 0
        shift = self.start_shift
        index = (self.table - base >> 3) + (ipa >> shift)
        end = len(words)
        while True:
            if not 0 <= index < end:
                return F_WALK_EABT, 0
            descriptor = words[index]
            if not descriptor & 1:
                return F_TRANSLATION, 0
            output = descriptor & 0xFFFF_FFFF_F000
            if shift == 12 or not descriptor & 2:
                break
            if output >> self.output_bits:
                return F_ADDR_SIZE, 0
            shift -= 9
            index = (output - base >> 3) + (ipa >> shift & 511)
        if shift > 30 or (shift == 12 and not descriptor & 2):
            return F_TRANSLATION, 0
        output = aligned(output, shift)
        if output >> self.output_bits:
            return F_ADDR_SIZE, 0
        if not descriptor & 0x400 and not self.affd:
            return F_ACCESS, 0
        if self.denies(descriptor, what, write, priv):
            return F_PERMISSION, 0
        return 0, output | ipa & (1 << shift) - 1


@dataclass(frozen=True, slots=True)
class Behind:
    """64-bit words of memory behind stage 2, by their address before it divided by eight."""

    memory: Words
    stage2: Stage2

    def __len__(self):
        return 1 << OAS_BITS - 3

    def __getitem__(self, index):
        words, base = self.memory.words, self.memory.base
        event, address = self.stage2.translate(words, base, index << 3, TABLES)
        if event:
            raise Stage2Fault(event)
        index = address - base >> 3
        if not 0 <= index < len(words):
            raise IndexError(address)
        return words[index]


def configure(memory, registers, sid):
    """Return the Stage2 of a legal STE in a linear stream table."""
    _, ste = walk_python.find_ste(memory, registers, sid)
    start_shift = {0: 21, 1: 30, 2: 39}[field(ste, 167, 166)]
    input_bits = 64 - field(ste, 165, 160)
    return Stage2(
        table=aligned(field(ste, 243, 196) << 4, input_bits - start_shift + 3),
        input_bits=input_bits,
        output_bits=OUTPUT_BITS[field(ste, 178, 176)],
        start_shift=start_shift,
        affd=bool(field(ste, 181, 181)),
        ptw=bool(field(ste, 182, 182)),
        record=bool(field(ste, 186, 186)),
    )


def translate(memory, stage2, context, iova, write=False, priv=False, instr=False):
    """Translate one address by stage 1, if there is a context of it, and by stage 2.

    Parameters
    ----------
    memory : Words
    stage2 : Stage2
    context : Context or None
        Stage 1, whose table lies behind stage 2; None for streams with stage 2 alone.
    iova : int
    write, priv, instr : bool

    Returns
    -------
    (int, int, int)
        pa, action and event, as walk_python.translate() has them.
    """
    ipa = iova
    if context is not None:
        behind = Words(Behind(memory, stage2), 0)
        try:
            ipa, action, event = walk_python.translate(behind, context, iova, write, priv, instr)
        except Stage2Fault as fault:
            return 0, ABORT, fault.args[0] * (stage2.record or fault.args[0] == F_WALK_EABT)
        except IndexError:
            return 0, ABORT, F_WALK_EABT
        if action != OK:
            return 0, action, event
        write, priv, instr = override(context, write, priv, instr)
    elif iova >> OAS_BITS:
        return 0, ABORT, F_ADDR_SIZE
    what = INSTRUCTION if instr and not write else DATA
    event, pa = stage2.translate(memory.words, memory.base, ipa, what, write, priv)
    if event:
        return 0, ABORT, event * (stage2.record or event == F_WALK_EABT)
    return pa, OK, 0


def translate_batch(
    memory, stage2, context, iova, pa, action, event, write=False, priv=False, instr=False
):
    """Translate each address of a sequence, filling three sequences."""
    for i, address in enumerate(iova):
        pa[i], action[i], event[i] = translate(memory, stage2, context, address, write, priv, instr)
