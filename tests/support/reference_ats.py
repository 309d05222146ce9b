"""The slow, obvious twin of ATS: translation requests and Translated transactions.

Follows IHI 0070G.b 3.9.1.1 to 3.9.1.3 (addresses, answers, Translated transactions), 3.13.7.1
(updates), 5.2 (STE.EATS), 7.3.6 and 7.3.8 (records), 13.6.3 to 13.6.5 (split-stage ATS, stage 1
that is skipped), 13.7.1 (what an answer grants) and table 13.4 (overrides), over the stages of
reference.py.  It imports nothing from the library.

Where the architecture leaves a choice it makes the library's: a request with No Write is not
granted the write, one for split-stage ATS updates the stage-2 leaf of the page, a Translated
address beyond the output size aborts, no CD is read for a Translated transaction.
"""

from dataclasses import dataclass
from typing import NamedTuple

import reference
from reference import CLASS_IN, NSH, PR, PW, PX, UR, UW, UX, bits

UNSUPPORTED, ABORTED, SUCCESS = "UR", "CA", "success"


class Overlay:
    """Memory as it would be after some writes of 8 bytes."""

    def __init__(self, memory):
        self.memory = memory
        self.written = {}

    def read(self, address, size):
        data = self.memory.read(address, size)
        if data is None:
            return None
        data = bytearray(data)
        for at, word in self.written.items():
            if address <= at < address + size:
                data[at - address : at - address + 8] = word
        return bytes(data)

    def write(self, address, data):
        self.written[address] = data


class Rights(NamedTuple):
    """What an answer grants."""

    read: bool = False
    write: bool = False
    execute: bool = False


class Answer(NamedTuple):
    """The answer to a translation request.

    address, kind: None where nothing is granted; kind is (attr, sh).  ipa: the address is one.
    fault: name of what refused; record: its 32 bytes, None where it is not recorded; why: the rule,
    by the library's name for it.
    """

    status: str
    address: int | None = None
    size: int = 0
    granted: Rights = Rights()
    priv: bool = False
    ipa: bool = False
    kind: tuple | None = None
    fault: str | None = None
    record: bytes | None = None
    why: str | None = None


class End(NamedTuple):
    """How a Translated transaction ends; fault, record and why as in an Answer."""

    action: str
    pa: int | None = None
    fault: str | None = None
    record: bytes | None = None
    kind: tuple | None = None
    why: str | None = None


def fetcher(memory):
    return reference.Fetcher(memory.read, memory.write, reference.ContextCache())


def effective_eats(regs, ste):
    """STE.EATS as it counts: 0b00, 0b01 or 0b10 (5.2)."""
    if bits(ste, 3, 1) == 0b100:
        return 0b00
    eats = bits(ste, 93, 92)
    if eats == 0b10 and not bits(regs.cr0, 4, 4):  # CR0.ATSCHK
        return 0b00
    return 0b00 if eats == 0b11 else eats


def events_on(regs):
    return bool(bits(regs.cr0, 2, 2))


def errors_recorded(features, regs):
    """CR2.REC_CFG_ATS, which is RES0 without IDR0.ATSRECERR."""
    return bool(features.atsrecerr and bits(regs.cr2, 3, 3)) and events_on(regs)


# ------------------------------------------------------------------------------------------------
# Translation requests


def bad_request_record(regs, sid, iova, ssid, no_write, execute, priv):
    """F_BAD_ATS_TREQ, for one smallest translation unit (7.3.6)."""
    if not events_on(regs):
        return None
    record = 0x05 | sid << 32 | 1 << 64 | (iova >> 12) << 140
    if ssid is not None:
        record |= 1 << 11 | ssid << 12
    record |= priv << 92 | execute << 93 | (not no_write) << 94 | 1 << 95
    return record.to_bytes(32, "little")


def request_error(features, regs, error, sid, ssid):
    """The answer to a request whose configuration lookup fails (3.9.1.2)."""
    if error.name is None:  # STE.Config=0b000
        return Answer(UNSUPPORTED, why=error.why)
    recorded = errors_recorded(features, regs)
    if error.name == "C_BAD_STREAMID":
        recorded = recorded and bits(regs.cr2, 1, 1)  # RECINVSID
    record = None
    if recorded:
        effective = reference.effective_features(features)
        address = reference.fetch_reported(effective, error.fetch_address)
        record = reference.event_record(error.name, sid, ssid, fetch_address=address)
    return Answer(ABORTED, fault=error.name, record=record, why=error.why)


def granted(stream, allowed, no_write, execute, priv):
    """What pages that allow these accesses grant (13.7.1)."""
    if stream.privcfg & 0b10:
        priv = stream.privcfg == 0b11
    readable = bool(allowed & (PR if priv else UR))
    writable = bool(allowed & (PW if priv else UW))
    executable = bool(allowed & (PX if priv else UX))
    if stream.instcfg == 0b11:  # reads are instruction fetches
        read, run = executable, executable
    elif stream.instcfg == 0b10:  # instruction fetches are reads
        read, run = readable, readable
    else:
        read, run = readable, readable and executable
    return Rights(read, writable and not no_write, execute and run)


@dataclass
class Pages:
    """What the stages found: permissions of all of them, the size of the smaller page."""

    pa: int
    ipa: int
    size: int
    allowed: int
    kind: tuple


def both_stages(memory, features, stream, iova, asked, write=False):
    """What the stages that there are say of an address; a write marks the page dirty.

    asked: (no_write, execute, priv).  Raises TranslationError, unless it is the page itself that
    lacks a permission.
    """
    while True:
        try:
            return try_stages(fetcher(memory), features, stream, iova, asked, write)
        except reference.DescriptorChangedError:
            continue


def try_stages(fetch, features, stream, iova, asked, write):
    access = write, *stream.overridden(write, asked[2], False)
    allowed = reference.ALL_ACCESSES
    memory, sh = stream.entering, stream.entering_sh
    ipa, sizes = iova, []
    if stream.context is None:
        if iova >> features.oas_bits:
            raise reference.TranslationError("F_ADDR_SIZE", "BYPASS_ADDRESS", bypassed=True)
    else:
        try:
            page, region = reference.stage1_access(fetch, stream, iova, *access)
        except reference.TranslationError as fault:
            if fault.stage2 or fault.name != "F_PERMISSION":
                raise
            page, region = fault.page, fault.region
        allowed = page.allowed
        ipa = page.pa
        sizes.append(1 << page.shift)
        memory = stream.context.memory[bits(page.descriptor, 4, 2)]
        sh = region.sh if region.ds else bits(page.descriptor, 9, 8)

    pa = ipa
    # where stage 1 grants nothing the IPA is not translated
    if stream.stage2 is not None and any(granted(stream, allowed, *asked)):
        stage2 = stream.stage2
        try:
            second = reference.stage2_access(fetch, stage2, ipa, CLASS_IN, *access)
        except reference.TranslationError as fault:
            if fault.name != "F_PERMISSION":
                raise
            second = fault.page
        allowed &= second.allowed
        pa = second.pa
        sizes.append(1 << second.shift)
        leaf = second.descriptor
        memory = reference.stage2_memory(memory, bits(leaf, 5, 2), stage2.fwb)
        sh = reference.combined_sh(sh, stage2.region.sh if stage2.region.ds else bits(leaf, 9, 8))
    kind = reference.memory_to_mair(memory), reference.consistent_sh(memory, sh)
    return Pages(pa, ipa, min(sizes), allowed, kind)


def ats_request(
    memory, features, regs, sid, iova, ssid=None, no_write=False, execute=False, priv=False,
    stu=4096,
):  # fmt: skip
    """Answer a translation request for one page, which may update memory."""
    if ssid is None:
        execute = priv = False
    refused = Answer(
        UNSUPPORTED, fault="F_BAD_ATS_TREQ",
        record=bad_request_record(regs, sid, iova, ssid, no_write, execute, priv),
    )  # fmt: skip
    if not features.ats:
        return Answer(UNSUPPORTED, why="ATS_ABSENT")
    if not bits(regs.cr0, 0, 0):  # SMMUEN
        return refused._replace(why="ATS_DISABLED")
    effective = reference.effective_features(features)
    fetch = fetcher(memory)
    try:
        ste = reference.find_ste(fetch, effective, regs, sid)
        reference.check_ste(effective, ste)
        eats = effective_eats(regs, ste)
        if eats == 0b00:
            return refused._replace(why="ATS_EATS")
        stream = reference.configure(fetch, effective, regs, sid, ssid)
    except reference.ConfigurationError as error:
        return request_error(features, regs, error, sid, ssid)

    def failed(fault):
        if fault.name != "F_WALK_EABT":
            return Answer(SUCCESS, size=stu, priv=priv, fault=fault.name, why=fault.why)
        record = None
        if errors_recorded(features, regs):
            seen_priv, seen_instr = stream.overridden(False, priv, False)
            record = reference.event_record(
                fault.name, sid, ssid, write=False, priv=seen_priv, instr=seen_instr, iova=iova,
                event_class=fault.event_class, stage2=fault.stage2,
                fetch_address=reference.fetch_reported(effective, fault.fetch_address),
            )  # fmt: skip
        return Answer(ABORTED, fault=fault.name, record=record, why=fault.why)

    if stream.cd_fault is not None:
        return failed(stream.cd_fault)
    if stream.context is None and stream.stage2 is None:
        if iova >> effective.oas_bits:
            return failed(
                reference.TranslationError("F_ADDR_SIZE", "BYPASS_ADDRESS", bypassed=True)
            )
        kind = (
            reference.memory_to_mair(stream.entering),
            reference.consistent_sh(stream.entering, stream.entering_sh),
        )
        return Answer(SUCCESS, iova & -stu, stu, Rights(read=True, write=True), priv, kind=kind)

    asked = no_write, execute, priv
    try:
        found = both_stages(memory, effective, stream, iova, asked)
        rights = granted(stream, found.allowed, *asked)
        if rights.write:
            both_stages(memory, effective, stream, iova, asked, write=True)
    except reference.TranslationError as fault:
        return failed(fault)
    if not any(rights):
        return Answer(SUCCESS, size=stu, priv=priv)
    split = eats == 0b10
    address = found.ipa if split else found.pa
    return Answer(
        SUCCESS, address & -found.size, found.size, rights, priv, ipa=split, kind=found.kind
    )


# ------------------------------------------------------------------------------------------------
# Translated transactions


def ats_translated(
    memory, features, regs, sid, address, ssid=None, write=False, priv=False, instr=False
):
    """What becomes of a Translated transaction."""
    if not features.pasidtt:
        ssid = None
    if ssid is None:
        priv = instr = False
    effective = reference.effective_features(features)

    def passed():
        if address >> effective.oas_bits:
            return End("abort", why="TRANSLATED_ADDRESS")
        return End("bypass", address, kind=(0xFF, NSH))

    def forbidden(why):
        record = 0x07 | sid << 32 | (not write) << 99 | address << 128
        return End(
            "abort", fault="F_TRANSL_FORBIDDEN",
            record=record.to_bytes(32, "little") if events_on(regs) else None, why=why,
        )  # fmt: skip

    if not features.ats:
        return End("abort", why="ATS_ABSENT")
    if not bits(regs.cr0, 0, 0):  # SMMUEN
        return forbidden("TRANSLATED_DISABLED")
    if not bits(regs.cr0, 4, 4):  # ATSCHK
        return passed()
    try:
        ste = reference.find_ste(fetcher(memory), effective, regs, sid)
        reference.check_ste(effective, ste)
        eats = effective_eats(regs, ste)
        if eats == 0b00:
            return forbidden("TRANSLATED_EATS")
        if features.pasidtt:
            reference.choose_substream(effective, ste, ssid)
    except reference.ConfigurationError as error:
        record = None
        if error.name is not None and errors_recorded(features, regs):  # RECINVSID is not asked
            address = reference.fetch_reported(effective, error.fetch_address)
            record = reference.event_record(error.name, sid, ssid, fetch_address=address)
        return End("abort", fault=error.name, record=record, why=error.why)
    if eats == 0b01:
        return passed()

    # Split-stage: the overrides of privilege and instruction apply, those of attributes do not.
    entering, sh = reference.input_attributes(False, 0, 0, 0, 0)
    overrides = features.attr_perms_ovr
    stream = reference.Stream(
        privcfg=bits(ste, 113, 112) if overrides else 0,
        instcfg=bits(ste, 115, 114) if overrides else 0,
        entering=entering, entering_sh=sh, vmid=0,
        stage2=reference.decode_stage2(effective, ste),
    )  # fmt: skip
    priv, instr = stream.overridden(write, priv, instr)
    while True:
        try:
            outcome, fault = reference.translate_address(
                fetcher(memory), effective, stream, address, write, priv, instr
            )
            break
        except reference.DescriptorChangedError:
            continue
    if fault is None:
        return End(outcome.action, outcome.pa, kind=(outcome.attr, outcome.sh))
    action, recorded = reference.fault_action(stream, fault)
    record = None
    if recorded and events_on(regs):
        aborted = fault.name == "F_WALK_EABT"
        record = reference.event_record(
            fault.name, sid, ssid, write=write, priv=priv, instr=instr, iova=address,
            event_class=fault.event_class, stage2=fault.stage2,
            fetch_address=reference.fetch_reported(effective, fault.fetch_address),
            ipa=0 if aborted else reference.in_place(fault.ipa, effective.oas_bits - 1, 12),
        )  # fmt: skip
    return End(action, fault=fault.name, record=record, why=fault.why)
