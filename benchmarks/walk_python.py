"""A stage 1 walk in pure Python, and the decoding of an STE and a CD that it starts from.

IHI 0070 3.3, 3.4, 5.2, 5.4; DDI 0487 D8.2 to D8.4. Written apart from baseline_walk.c, for the
same implementation (smmufast.Features(httu=0, stall_model=1, s2p=0)), so that the two can be
compared.
"""

from dataclasses import dataclass, replace

C_BAD_STREAMID = 0x02
F_STE_FETCH = 0x03
C_BAD_STE = 0x04
F_STREAM_DISABLED = 0x06
C_BAD_SUBSTREAMID = 0x08
F_CD_FETCH = 0x09
C_BAD_CD = 0x0A
F_WALK_EABT = 0x0B
F_TRANSLATION = 0x10
F_ADDR_SIZE = 0x11
F_ACCESS = 0x12
F_PERMISSION = 0x13

OK, BYPASS, DISABLED, ABORT, RAZ_WI = range(5)

GRANULES0 = {0: 12, 1: 16, 2: 14}
GRANULES1 = {1: 14, 2: 12, 3: 16}
OUTPUT_BITS = (32, 36, 40, 42, 44, 48, 52, 52)
OAS_BITS = 52
SSIDSIZE = 20


def field(words, msb, lsb):
    """Bits [msb:lsb] of a record, numbered over the whole record."""
    return words[lsb // 64] >> lsb % 64 & (1 << msb - lsb + 1) - 1


def aligned(address, lg2):
    """Round down to a multiple of 2**lg2."""
    return address >> lg2 << lg2


@dataclass(frozen=True, slots=True)
class Words:
    """Physical memory: 64-bit little-endian words (a memoryview of format Q) from a base on."""

    words: memoryview
    base: int

    def read(self, address, n):
        """Return n words, or None where one of them is outside."""
        first = address - self.base >> 3
        if first < 0 or first + n > len(self.words):
            return None
        return self.words[first : first + n].tolist()


@dataclass(frozen=True, slots=True)
class Registers:
    """The registers that a translation reads."""

    strtab_base: int
    strtab_base_cfg: int
    cr0: int = 0b101
    cr2: int = 0b10


@dataclass(frozen=True, slots=True)
class Half:
    """One half of the input range."""

    epd: bool
    e0pd: bool
    had: bool
    tbi: bool
    input_bits: int = 48
    granule: int = 12
    ds: bool = False
    ttb: int = 0
    start_shift: int = 0


@dataclass(frozen=True, slots=True)
class Context:
    """An STE and a CD, decoded; action is OK where stage 1 translates."""

    action: int
    event: int = 0
    privcfg: int = 0
    instcfg: int = 0
    events_enabled: bool = True
    halves: tuple = ()
    output_bits: int = 0
    affd: bool = False
    wxn: bool = False
    pan: bool = False
    epan: bool = False
    fault_action: int = ABORT
    record: bool = True


def find_ste(memory, registers, sid):
    """Return (event, None) or (0, STE)."""
    config = registers.strtab_base_cfg
    base = aligned(registers.strtab_base & (1 << 52) - 1, 6)
    log2size = config & 63
    if sid >= 1 << min(log2size, 32):
        return C_BAD_STREAMID, None
    if config >> 16 & 3 == 1:
        split = config >> 6 & 31
        if split not in (6, 8, 10):
            split = 6
        l1std = memory.read(aligned(base, max(5, log2size - split + 2) + 1) + (sid >> split) * 8, 1)
        if l1std is None:
            return F_STE_FETCH, None
        span = l1std[0] & 31
        index = sid & (1 << split) - 1
        if not 1 <= span <= split + 1 or index >= 1 << span - 1:
            return C_BAD_STREAMID, None
        address = aligned(l1std[0] & (1 << 52) - 1, 6 + span - 1) + index * 64
    else:
        address = aligned(base, min(log2size, 32) + 6) + sid * 64
    ste = memory.read(address, 8)
    return (F_STE_FETCH, None) if ste is None else (0, ste)


def find_cd(memory, ste, ssid):
    """Return (event, CD); (0, None) where S1DSS bypasses stage 1."""
    base = field(ste, 51, 6) << 6
    s1cdmax = field(ste, 63, 59)
    s1dss = field(ste, 65, 64)
    if ssid is not None and (s1cdmax == 0 or ssid >= 1 << s1cdmax):
        return C_BAD_SUBSTREAMID, None
    if s1cdmax and ssid is None and s1dss != 2:
        return (0, None) if s1dss == 1 else (F_STREAM_DISABLED, None)
    if ssid == 0 and s1dss == 2:
        return F_STREAM_DISABLED, None
    index = ssid or 0
    split = {1: 6, 2: 10}.get(field(ste, 5, 4))
    if s1cdmax == 0:
        address = base
    elif split is None:
        address = aligned(base, s1cdmax + 6) + index * 64
    else:
        size = max(s1cdmax - split, 3) + 3
        l1cd = memory.read(aligned(base, size) + (index >> split) * 8, 1)
        if l1cd is None:
            return F_CD_FETCH, None
        if not l1cd[0] & 1:
            return C_BAD_SUBSTREAMID, None
        address = aligned(l1cd[0] & (1 << 52) - 1, split + 6) + (index & (1 << split) - 1) * 64
    cd = memory.read(address, 8)
    return (F_CD_FETCH, None) if cd is None else (0, cd)


def decode_half(half, txsz, granule, ds, ttb, output_bits):
    """Return the half completed, or None where the CD is illegal."""
    if half.epd:
        return half
    if granule is None:
        return None
    wide = ds or granule == 16
    if not (12 if wide else 16) <= txsz <= (47 if granule == 16 else 48):
        return None
    if ttb >= 1 << output_bits or (not wide and ttb >= 1 << 48):
        return None
    input_bits = 64 - txsz
    start_shift = granule
    while start_shift + granule - 3 < input_bits:
        start_shift += granule - 3
    alignment = input_bits - start_shift + 3
    if output_bits == 52 or (ds and granule != 16):
        alignment = max(alignment, 6)
    return replace(
        half,
        input_bits=input_bits,
        granule=granule,
        ds=ds,
        ttb=aligned(ttb, alignment),
        start_shift=start_shift,
    )


def configure(memory, registers, sid, ssid=None):
    """Decode the STE and the CD of a stream.

    Parameters
    ----------
    memory : Words
    registers : Registers
    sid : int
    ssid : int or None

    Returns
    -------
    Context
    """
    enabled = bool(registers.cr0 & 4)

    def refused(event):
        if not enabled or (event == C_BAD_STREAMID and not registers.cr2 & 2):
            event = 0
        return Context(ABORT, event, events_enabled=enabled)

    event, ste = find_ste(memory, registers, sid)
    if event:
        return refused(event)
    if not ste[0] & 1:
        return refused(C_BAD_STE)
    config = field(ste, 3, 1)
    if config < 4:
        return refused(0)
    if config > 5:
        return refused(C_BAD_STE)
    strw = field(ste, 95, 94)
    if config == 5 and (strw & 1 or field(ste, 91, 91) or field(ste, 63, 59) > SSIDSIZE):
        return refused(C_BAD_STE)
    context = Context(
        BYPASS,
        privcfg=field(ste, 113, 112),
        instcfg=field(ste, 115, 114),
        events_enabled=enabled,
    )
    if config == 4:
        return context if ssid is None else refused(C_BAD_SUBSTREAMID)
    event, cd = find_cd(memory, ste, ssid)
    if event:
        return refused(event)
    if cd is None:
        return context
    v, s, aa64, hd_ha = field(cd, 31, 31), field(cd, 44, 44), field(cd, 41, 41), field(cd, 43, 42)
    if not v or s or not aa64 or hd_ha:
        return refused(C_BAD_CD)
    two = strw == 0 or bool(registers.cr2 & 1)
    ds = bool(field(cd, 186, 186))
    output_bits = OUTPUT_BITS[field(cd, 34, 32)]
    half = Half(
        epd=two and bool(field(cd, 14, 14)),
        e0pd=two and bool(field(cd, 66, 66)),
        had=bool(field(cd, 65, 65)),
        tbi=bool(field(cd, 38, 38)),
    )
    granule = GRANULES0.get(field(cd, 7, 6))
    ttb = field(cd, 115, 68) << 4
    halves = [decode_half(half, field(cd, 5, 0), granule, ds, ttb, output_bits)]
    if two:
        half = Half(
            epd=bool(field(cd, 30, 30)),
            e0pd=bool(field(cd, 130, 130)),
            had=bool(field(cd, 129, 129)),
            tbi=bool(field(cd, 39, 39)),
        )
        granule = GRANULES1.get(field(cd, 23, 22))
        ttb = field(cd, 179, 132) << 4
        halves.append(decode_half(half, field(cd, 21, 16), granule, ds, ttb, output_bits))
    if None in halves:
        return refused(C_BAD_CD)
    if field(cd, 15, 15):
        raise ValueError("the baseline reads little-endian descriptors only")
    return replace(
        context,
        action=OK,
        halves=tuple(halves),
        output_bits=output_bits,
        affd=bool(field(cd, 35, 35)),
        wxn=bool(field(cd, 36, 36)),
        pan=two and bool(field(cd, 40, 40)),
        epan=bool(field(cd, 123, 123)),
        fault_action=ABORT if field(cd, 46, 46) else RAZ_WI,
        record=bool(field(cd, 45, 45)),
    )


def override(context, write, priv, instr):
    """The access (write, priv, instr) after the STE's overrides."""
    priv = {2: False, 3: True}.get(context.privcfg, priv)
    instr = {2: False, 3: True}.get(context.instcfg, instr)
    return write, priv, instr and not write


def first_block_shift(granule, ds):
    """The input bits below the largest legal block, which is all that its size depends on."""
    if granule == 12:
        return 39 if ds else 30
    if granule == 14:
        return 36 if ds else 25
    return 42


def refused_access(context, write, priv, instr, ap1, ap2, uxn, pxn):
    """Whether a leaf with these effective bits denies the access."""
    if len(context.halves) == 1:
        if instr:
            return uxn or (context.wxn and not ap2)
        return write and ap2
    unprivileged_write = ap1 and not ap2
    if instr:
        if priv:
            return pxn or unprivileged_write or (context.wxn and not ap2)
        return uxn or (context.wxn and unprivileged_write)
    if priv:
        if context.pan and (ap1 or (context.epan and not uxn)):
            return True
    elif not ap1:
        return True
    return write and ap2


def walk(words, base, context, half, iova, write, priv, instr):
    """Stage 1 of one address in a half that may be used.

    Parameters
    ----------
    words : memoryview
        Physical memory as 64-bit words (format Q) from base on.
    base : int
    context : Context
    half : Half
    iova : int
        Canonical.
    write, priv, instr : bool
        The access after override().

    Returns
    -------
    (int, int)
        An event number and 0, or 0 and the output address.
    """
    granule = half.granule
    ds = half.ds
    stride = granule - 3
    index_mask = (1 << stride) - 1
    output_bits = context.output_bits
    iova &= (1 << half.input_bits) - 1
    table = half.ttb
    tables = 0
    shift = half.start_shift
    end = len(words)
    while True:
        index = (table - base >> 3) + (iova >> shift & index_mask)
        if not 0 <= index < end:
            return F_WALK_EABT, 0
        descriptor = words[index]
        if not descriptor & 1:
            return F_TRANSLATION, 0
        if granule == 16:
            output = descriptor & 0xFFFF_FFFF_0000 | (descriptor & 0xF000) << 36
        elif ds:
            output = descriptor >> granule << granule & (1 << 50) - 1
            output |= (descriptor & 0x300) << 42
        else:
            output = descriptor >> granule << granule & (1 << 48) - 1
        if shift == granule or not descriptor & 2:
            break
        if output >> output_bits:
            return F_ADDR_SIZE, 0
        tables |= descriptor
        table = output
        shift -= stride
    if shift == granule:
        if not descriptor & 2:
            return F_TRANSLATION, 0
    elif shift > first_block_shift(granule, ds):
        return F_TRANSLATION, 0
    output = output >> shift << shift
    if output >> output_bits:
        return F_ADDR_SIZE, 0
    if not descriptor & 0x400 and not context.affd:
        return F_ACCESS, 0
    if half.had:
        tables = 0
    if refused_access(
        context,
        write,
        priv,
        instr,
        descriptor >> 6 & ~(tables >> 61) & 1,
        (descriptor >> 7 | tables >> 62) & 1,
        (descriptor >> 54 | tables >> 60) & 1,
        (descriptor >> 53 | tables >> 59) & 1,
    ):
        return F_PERMISSION, 0
    return 0, output | iova & (1 << shift) - 1


def translate(memory, context, iova, write=False, priv=False, instr=False):
    """Translate one address with a decoded context.

    Parameters
    ----------
    memory : Words
    context : Context
    iova : int
        64 bits.
    write, priv, instr : bool

    Returns
    -------
    (int, int, int)
        pa, action and event: 0 for no address, 0 for no recorded event.
    """
    if context.action == BYPASS:
        if iova >> OAS_BITS:
            return 0, ABORT, F_ADDR_SIZE if context.events_enabled else 0
        return iova, BYPASS, 0
    if context.action == ABORT:
        return 0, ABORT, context.event
    write, priv, instr = override(context, write, priv, instr)
    upper = len(context.halves) == 2 and iova >> 55 & 1
    half = context.halves[upper]
    significant = (iova & (1 << 56) - 1 if half.tbi else iova) >> half.input_bits
    ones = (1 << (56 if half.tbi else 64) - half.input_bits) - 1
    if significant != (ones if upper else 0) or half.epd or (half.e0pd and not priv):
        event, pa = F_TRANSLATION, 0
    else:
        event, pa = walk(memory.words, memory.base, context, half, iova, write, priv, instr)
    if not event:
        return pa, OK, 0
    if event == F_WALK_EABT:
        return 0, ABORT, event if context.events_enabled else 0
    return 0, context.fault_action, event if context.events_enabled and context.record else 0


def translate_batch(memory, context, iova, pa, action, event, write=False, priv=False, instr=False):
    """Translate each address of a sequence, filling three sequences."""
    for i, address in enumerate(iova):
        pa[i], action[i], event[i] = translate(memory, context, address, write, priv, instr)
