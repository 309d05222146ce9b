# cython: binding=False, embedsignature=True, embedsignature.format=clinic
"""Registers: what software programs an SMMU by: registers, queues, interrupts, stalls, commands.

Sections: IHI 0070 6 (memory map and registers), 3.5 and 7.2 (queues), 7.5 (global errors), 3.18
(interrupts), 4 (commands), 5.5 and 3.12.2 (stalls), 8 (page requests).
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport int8_t, uint32_t, uint64_t
from libc.stdlib cimport free

from smmufast._facts.bits cimport le64, low_mask
from smmufast._rules.command cimport (
    EFFECT_ATC_INV, EFFECT_CFGI_ALL, EFFECT_CFGI_CD, EFFECT_CFGI_CD_ALL, EFFECT_CFGI_RANGE,
    EFFECT_CFGI_STE, EFFECT_PREFETCH, EFFECT_PRI_RESP, EFFECT_RESUME, EFFECT_STALL_TERM,
    EFFECT_SYNC, EFFECT_TLBI, Effect, command_decode,
)
from smmufast._rules.config cimport (
    pointer_mask, size_bits, split_of, strtab_linear_base, strtab_two_level_base,
)
from smmufast._engine.core cimport (
    IRQ_CMDQ_SYNC, IRQ_EVENTQ, IRQ_GERROR, IRQ_PRIQ, IRQ_SEV, Msi, Queues, Ring, caches_give,
    caches_take_gil,
)
from smmufast._facts.layout cimport (
    CMD_CS_IRQ, CMD_CS_SEV, CMDQ_CONS_ERR_ABT, CMDQ_CONS_ERR_ATC_INV_SYNC, cmdq_cons_err,
    EVENT_F_PERMISSION, EVENT_F_TRANSLATION, PRIQ_IRQ_CFG2_LO, cr0_cmdqen, cr0_eventqen, cr0_priqen,
    cr0_smmuen, event_set_stag,
)
from smmufast._engine.memory cimport (
    ACCESS_CMD, FETCH_OK, FETCH_RAISED, Memory, Mutex, Port, aside, look_for_signals, port_open,
    port_raised, port_read, raise_port, resume, to_address, to_flag,
)
from smmufast._engine.queue cimport (
    GERROR_CMDQ_ERR, GERROR_EVENTQ_ABT_ERR, GERROR_MSI_CMDQ_ABT_ERR, GERROR_MSI_EVENTQ_ABT_ERR,
    GERROR_MSI_GERROR_ABT_ERR, GERROR_MSI_PRIQ_ABT_ERR, GERROR_PRIQ_ABT_ERR, PUT_CLOSED, PUT_FIRST,
    PUT_FULL, PUT_LAST, PUT_STATUS, PUT_WRITTEN, event_put, event_signal, gerror_acknowledge,
    gerror_active, gerror_raise, lock_give, lock_take, overtake, overtake_all, ring_after,
    ring_bits, ring_entry, ring_full, ring_place, ring_put, ring_reset, ring_set_cons,
    ring_set_prod, ring_signal, ring_stop, ring_writable, signal, sync_done, sync_waits,
)
from smmufast._engine.tlb cimport (
    Caches, CachesC, cfgi_all, cfgi_cd, cfgi_cd_all, cfgi_range, cfgi_ste, state_of, tlbi,
)
from smmufast._rules.scope cimport Invalidation, cfgi_last
from smmufast._facts.hw cimport Hw, hw_features
from smmufast._facts.types cimport (
    ACTION_ABORT, ACTION_RAZ_WI, ACTION_STALL, NO_SSID, Outcome, Request,
)
from smmufast._rules.vmsa cimport entering_attr, shareability
from smmufast._facts.why cimport why_event

import json
from collections import OrderedDict, deque, namedtuple
from dataclasses import fields
from operator import attrgetter
from zlib import crc32

from smmufast import layout
from smmufast.faults import Invalidated
from smmufast._arguments import in_words, must_be
from smmufast.features import Features, modelled
from smmufast.why import Why

RegisterWarning = namedtuple("RegisterWarning", "register text", module="smmufast")
RegisterWarning.__doc__ = """What software probably did not mean: the register, and why."""

PageAnswer = namedtuple("PageAnswer", "action ssid", module="smmufast")
PageAnswer.__doc__ = """What a device learns of its page request at once: action, ssid.

`action` is "queued"; "dropped", without an answer; or an automatic response, "success" or
"failure", which carries the PASID `ssid` unless that is None.
"""

cdef tuple IRQ_NAMES = ("eventq", "priq", "gerror", "cmdq_sync", "sev")

cdef str HELD = "CMD_SYNC waits for walks that an invalidation overtook"

include "registers_map.pxi"


include "registers_state.pxi"


# --- what the queues ask of their owner ---

cdef inline uint64_t cmdq_cons_of(const Queues* q, uint32_t cerror) noexcept:
    """The value of CMDQ_CONS."""
    return q.commands.cons | <uint64_t>cerror << 24


cdef int wire_gil(Registers self, Port* port, int irq) noexcept with gil:
    """Call on_interrupt: 0, or FETCH_RAISED with its exception in the port."""
    if self._on_interrupt is None:
        return 0
    self.core.ram.users += 1
    try:
        self._on_interrupt(IRQ_NAMES[irq])
        return 0
    except BaseException as error:
        return port_raised(port, error)
    finally:
        self.core.ram.users -= 1


cdef int hold_gil(
        Registers self, Port* port, const Request* request, Outcome* outcome) noexcept with gil:
    """Hold a transaction that stalls: 0, or FETCH_RAISED."""
    self.core.ram.users += 1
    try:
        self._hold(request, outcome)
        return 0
    except BaseException as error:
        return port_raised(port, error)
    finally:
        self.core.ram.users -= 1


cdef int consume_gil(Registers self, Port* port) noexcept with gil:
    """Go on with commands: 0, or FETCH_RAISED."""
    try:
        self._consume()
        return 0
    except BaseException as error:
        return port_raised(port, error)


# The same as Queues has them: they let go of the caches before they wait for the GIL.

cdef int wire(void* owner, Port* port, int irq) noexcept nogil:
    cdef Mutex* had = aside()
    cdef int status = wire_gil(<Registers>owner, port, irq)
    resume(had)
    return status


cdef int hold(void* owner, Port* port, const Request* request, Outcome* outcome) noexcept nogil:
    cdef Mutex* had = aside()
    cdef int status = hold_gil(<Registers>owner, port, request, outcome)
    resume(had)
    return status


cdef int consume(void* owner, Port* port) noexcept nogil:
    cdef Mutex* had = aside()
    cdef int status = consume_gil(<Registers>owner, port)
    resume(had)
    return status


cdef object call_host(function, tuple arguments):
    """Call something of the host's."""
    cdef Mutex* had = aside()
    try:
        return function(*arguments)
    finally:
        resume(had)


cdef bytes le_bytes(const uint64_t* words):
    """A command as it lies in memory."""
    return (<object>words[0] | (<object>words[1] << 64)).to_bytes(16, "little")


cdef list strings(dict values):
    """The items of a dict as pairs of strings."""
    return list(zip(values, map(str, values.values()), strict=True))


cdef str cerror_text(unsigned int cerror, int why, fields=None):
    """A command error in words, with the reason where one rule refused the command."""
    name, _, text = layout.REGISTERS["CMDQ_CONS"].field("ERR").name_of(cerror).partition(": ")
    if why:
        text = Why(why).sentence(fields)
    return f"CERROR_{name}: {text}"


include "registers_pace.pxi"


include "registers_stall.pxi"


# --- registers ---


@cython.auto_pickle(False)
cdef class Registers:
    """The programming interface of an Smmu (IHI 0070 6): both register pages and what they start.

    Writes that the architecture guards by an enable are ignored while it is set.  Updates of CR0,
    GBPA and IRQ_CTRL are complete when the write returns, and so are commands.  What software
    probably did not mean is told by `warnings`, beside the architected behaviour.
    """

    def __cinit__(self, Memory memory not None, features=None, *, strtab_base=0, strtab_base_cfg=0,
                  cr0=0b101, cr2=0b10, gbpa=0x1000, eventq_base=None, cmdq_base=None,
                  priq_base=None, Caches caches=None, ignore_s2ptw=False, wired=True,
                  on_interrupt=None):
        # Every argument is checked before the first one has an effect.
        cdef Queues* q = &self.queues
        cdef bint ignores_s2ptw = to_flag("ignore_s2ptw", ignore_s2ptw)
        cdef bint has_wires = to_flag("wired", wired)
        if type(self) is Registers:
            raise TypeError("Registers are a part of Smmu")
        if features is None:
            features = Features()
        if not isinstance(features, Features):
            raise TypeError(must_be("features", "Features or None", type(features)))
        taken = modelled(features)[1]
        if taken:
            raise ValueError(in_words(
                "features", "what this version models (see smmufast.modelled)",
                ", ".join(map("=".join, strings(taken)))))
        if not has_wires and not features.msi:
            raise ValueError(must_be(
                "wired", "True with msi=0, where no other interrupts are", wired))
        self._memory = memory
        self._features = features
        self._warnings = deque(maxlen=1000)
        self._devices = {}
        self._stalls = {}
        self._tagged = {}
        self._waiting = OrderedDict()
        self._retried = []
        self._resumed = []
        self._last_stag = 0xFFFF
        self.core.ram = &memory.ram
        self.core.owner = <void*>self
        self.core.queues = q
        core_enter(&self.core)
        if caches is not None:
            if caches.taken:
                raise ValueError(in_words(
                    "caches", "of no Smmu yet (copy.copy() makes such)", "those of another Smmu"))
            caches.taken = True
            self._caches = caches
            self.core.caches = caches.c
        q.owner = <void*>self
        q.wired = has_wires
        q.wire = wire
        q.stall = hold
        q.consume = consume
        q.commands.entry_lg2 = 4
        q.commands.error = GERROR_CMDQ_ERR
        q.events.entry_lg2 = 5
        q.events.error = GERROR_EVENTQ_ABT_ERR
        q.pages.entry_lg2 = 4
        q.pages.error = GERROR_PRIQ_ABT_ERR
        q.pages.blocks = True
        q.msi[IRQ_EVENTQ].error = GERROR_MSI_EVENTQ_ABT_ERR
        q.msi[IRQ_PRIQ].error = GERROR_MSI_PRIQ_ABT_ERR
        q.msi[IRQ_GERROR].error = GERROR_MSI_GERROR_ABT_ERR
        self.on_interrupt = on_interrupt
        self._digest_features()
        self.core.hw.ignore_s2ptw = ignores_s2ptw
        given = {
            "STRTAB_BASE": to_address("strtab_base", strtab_base),
            "STRTAB_BASE_CFG": to_address("strtab_base_cfg", strtab_base_cfg, 0xFFFFFFFF),
            "CR0": to_address("cr0", cr0, 0xFFFFFFFF),
            "CR2": to_address("cr2", cr2, 0xFFFFFFFF),
            "GBPA": to_address("gbpa", gbpa, 0xFFFFFFFF) & ~GBPA_UPDATE,
        }
        if eventq_base is not None:
            given["EVENTQ_BASE"] = to_address("eventq_base", eventq_base)
        if cmdq_base is not None:
            given["CMDQ_BASE"] = to_address("cmdq_base", cmdq_base)
        if priq_base is not None:
            given["PRIQ_BASE"] = to_address("priq_base", priq_base)
        for name, value in given.items():
            self._values[name] = value & self._masks[name]
            if value & ~self._masks[name]:
                self._warn(name, f"bits {value & ~self._masks[name]:#x} are ignored", "S6.2-7")
        for name in ("EVENTQ_BASE", "CMDQ_BASE", "PRIQ_BASE"):
            if name in given:
                self._place(name)
        self._digest()
        if cr0_smmuen(self.core.hw.cr0):
            self._check_stream_table()
        if q.events.enabled and q.events.placed:
            self._check_queue("EVENTQ")
        if cr0_cmdqen(self.core.hw.cr0) and q.commands.placed:
            self._check_queue("CMDQ")
        if q.pages.enabled and q.pages.placed:
            self._check_queue("PRIQ")

    def __dealloc__(self):
        free(self.core.pairs)
        free(self.core.reuse)
        core_leave(&self.core)

    # --- what Smmu overrides ---

    cdef int _retry(self, const Request* request, Outcome* outcome) except -1:
        """Translate a transaction again, from the start."""
        raise TypeError("Registers are a part of Smmu")

    cdef object _result(self, const Request* request, const Outcome* outcome):
        """The Result of an outcome."""
        raise TypeError("Registers are a part of Smmu")

    cdef int _prefetch(self, const Effect* effect) except -1:
        """PREFETCH_*: fill the caches with what the effect names, or with nothing."""
        return 0

    # S5.2-29, S8.1-6, S8.1-7, S8.1-8
    cdef int _ppar(self, uint32_t sid, uint32_t ssid) except? -2:
        """STE.PPAR: whether automatic responses carry the PASID; -1 when no STE is legal."""
        raise TypeError("Registers are a part of Smmu")

    cdef void _forget(self) noexcept:
        """The registers changed: drop what was derived from them."""

    # S3.3.3-9, S3.21.3-12, S4.1.7-1, S4.3-1, S4.3-101, S4.3.8-1, S4.7.3-12
    cdef int _invalidate(self, const Effect* effect) except -1:
        """CFGI_* and TLBI_*: drop from the caches what the effect names."""
        cdef CachesC* c = self.core.caches
        cdef Invalidation inv
        overtake(&self.core)
        if c == NULL:
            return 0
        caches_take_gil(&self.core)
        if effect.kind == EFFECT_CFGI_STE:
            cfgi_ste(c, effect.sid, effect.leaf)
        elif effect.kind == EFFECT_CFGI_RANGE:
            cfgi_range(c, effect.sid, effect.range_lg2)
        elif effect.kind == EFFECT_CFGI_ALL:
            cfgi_all(c)
        elif effect.kind == EFFECT_CFGI_CD:
            cfgi_cd(c, effect.sid, effect.ssid, effect.leaf)
        elif effect.kind == EFFECT_CFGI_CD_ALL:
            cfgi_cd_all(c, effect.sid)
        else:
            inv.op = effect.op
            inv.vmid = effect.vmid
            inv.vmid_mask = effect.vmid_mask
            inv.asid = effect.asid
            inv.leaf = effect.leaf
            inv.all_addresses = effect.all_addresses
            inv.first = effect.first
            inv.last = effect.last
            inv.granule = effect.granule
            inv.level = <int8_t>effect.level
            tlbi(c, &inv)
        caches_give(&self.core)
        return 0

    cdef int _tell_scope(self, const Effect* effect) except -1:
        """Call on_invalidate with what a command covers, or with NULL with all there is."""
        cdef uint64_t last
        if self._on_invalidate is None:
            return 0
        if effect == NULL:
            call_host(self._on_invalidate, (Invalidated("CR0", True, True),))
            return 0
        name = layout.Opcode(effect.op).name if effect.kind != EFFECT_CFGI_ALL else "CFGI_ALL"
        sids = ssid = vmid = asid = addresses = None
        configuration = effect.kind != EFFECT_TLBI
        if effect.kind == EFFECT_CFGI_RANGE:
            last = cfgi_last(effect.sid, effect.range_lg2)
            sids = (effect.sid & ~cfgi_last(0, effect.range_lg2), last)
        elif configuration and effect.kind != EFFECT_CFGI_ALL:
            sids = (effect.sid, effect.sid)
            ssid = effect.ssid if effect.kind == EFFECT_CFGI_CD else None
        elif not configuration:
            tags = set(map(attrgetter("name"), layout.COMMANDS[name].fields))
            vmid = effect.vmid if effect.vmid_mask and "VMID" in tags else None
            asid = effect.asid if "ASID" in tags else None
            addresses = None if effect.all_addresses else (effect.first, effect.last)
        call_host(self._on_invalidate, (Invalidated(
            name, configuration, not configuration, sids, ssid, vmid, asid, addresses,
            effect.leaf != 0),))
        return 0

    # --- attributes ---

    @property
    def caches(self):
        """The Caches, None without."""
        return self._caches

    @property
    def ignore_s2ptw(self):
        """Whether STE.S2PTW is ignored, as implementations without memory attributes do."""
        return self.core.hw.ignore_s2ptw != 0

    @property
    def wired(self):
        """Whether interrupts have wires, which are asserted beside messages."""
        return self.queues.wired != 0

    @property
    def memory(self):
        """The Memory."""
        return self._memory

    @property
    def features(self):
        """The Features, which the identification registers tell."""
        return self._features

    @property
    def strtab_base(self):
        """STRTAB_BASE."""
        return self._values["STRTAB_BASE"]

    @property
    def strtab_base_cfg(self):
        """STRTAB_BASE_CFG."""
        return self._values["STRTAB_BASE_CFG"]

    @property
    def cr0(self):
        """CR0."""
        return self._values["CR0"]

    @property
    def cr1(self):
        """CR1."""
        return self._values["CR1"]

    @property
    def cr2(self):
        """CR2."""
        return self._values["CR2"]

    @property
    def gbpa(self):
        """GBPA."""
        return self._values["GBPA"]

    @property
    def irq_ctrl(self):
        """IRQ_CTRL."""
        return self._values["IRQ_CTRL"]

    @property
    def gerror(self):
        """GERROR; an error is active where it differs from GERRORN."""
        return self.queues.gerror

    @property
    def gerrorn(self):
        """GERRORN."""
        return self.queues.gerrorn

    @property
    def eventq_base(self):
        """EVENTQ_BASE."""
        return self._values["EVENTQ_BASE"]

    @property
    def cmdq_base(self):
        """CMDQ_BASE."""
        return self._values["CMDQ_BASE"]

    @property
    def priq_base(self):
        """PRIQ_BASE."""
        return self._values["PRIQ_BASE"]

    @property
    def on_interrupt(self):
        """What is called with the name of each wire that is asserted, or None.

        The names are "eventq", "priq", "gerror" and "cmdq_sync", which `wired` admits, and "sev":
        the event that wakes processors from WFE, of a CMD_SYNC or because a full command queue
        has room again.  An exception that it raises reaches the caller of what interrupted; the
        state of the SMMU is complete by then, but commands behind stay until CMDQ_PROD is written
        again.
        """
        return self._on_interrupt

    @on_interrupt.setter
    def on_interrupt(self, value):
        if value is not None and not callable(value):
            raise TypeError(must_be("on_interrupt", "a callable or None", type(value)))
        self._on_interrupt = value

    @property
    def on_invalidate(self):
        """What is called with an Invalidated for each invalidation, or None.

        It is called when the caches have dropped what a CFGI or TLBI command names, and before
        CMDQ_CONS moves past the command; and when CR0.SMMUEN is cleared.  Also without caches.  An
        exception that it raises leaves the command in the queue, to be consumed again when
        CMDQ_PROD is written.
        """
        return self._on_invalidate

    @on_invalidate.setter
    def on_invalidate(self, value):
        if value is not None and not callable(value):
            raise TypeError(must_be("on_invalidate", "a callable or None", type(value)))
        self._on_invalidate = value

    @property
    def on_command(self):
        """What is called with the 16 bytes of each legal command that is consumed, or None.

        For hosts that forward commands.  It is called before the command is executed; an exception
        leaves the command in the queue.
        """
        return self._on_command

    @on_command.setter
    def on_command(self, value):
        if value is not None and not callable(value):
            raise TypeError(must_be("on_command", "a callable or None", type(value)))
        self._on_command = value

    @property
    def generation(self):
        """A number that grows with each invalidation, and each write that sets up translation.

        A host that keeps translations of its own may look at it instead of being told: while it is
        the same, what `translate` gave still holds, as far as software invalidates what it
        changes.  That is so without caches too.
        """
        return self.core.overtaking.commands + self.core.hw.generation

    @property
    def on_resume(self):
        """What is called with each Stall that is done, or None."""
        return self._on_resume

    @on_resume.setter
    def on_resume(self, value):
        if value is not None and not callable(value):
            raise TypeError(must_be("on_resume", "a callable or None", type(value)))
        self._on_resume = value

    @property
    def stalls(self):
        """The Stall of every outstanding transaction, in the order in which they stalled."""
        return list(self._stalls)

    @property
    def devices(self):
        """Devices by StreamID, a dict: what CMD_ATC_INV and CMD_PRI_RESP reach.

        A device has ``atc_invalidate(ssid, address, size, global_)``, which returns False or
        raises TimeoutError when the invalidation failed, and ``pri_response(ssid, prg_index,
        code)`` with the code of CMD_PRI_RESP: 0 failure, 1 invalid request, 2 success.  `ssid` is
        None without a substream; addresses and sizes are in bytes.  A StreamID without a device
        has nothing to invalidate and asked for nothing.
        """
        return self._devices

    @property
    def warnings(self):
        """What software probably did not mean, the latest 1000: a deque of RegisterWarning.

        Such as a stream table that is not aligned to its size, a write that a guard ignored, or
        an access to no register.
        """
        return self._warnings

    cdef int _warn(self, str name, str text, str row) except -1:
        """Tell of a register; `row`, of docs/rules.md, where the text does not have it."""
        self._warnings.append(RegisterWarning(name, f"{text} ({row})" if row else text))
        return 0

    # --- MMIO ---

    # S3.7-1, S3.10-1, S3.10.2-1, S6.1-1, S6.2-1, S6.2-2, S6.2-3, S6.2-4, S6.2-5, S6.2-8, S6.2-9,
    # S6.2-10, S6.2.2-1, S6.3.5-1, S6.3.170-1
    cdef str _locate(self, offset, size, int* shift, int* bits):
        """The register of an access, and its part; None when there is none."""
        cdef uint64_t at
        if isinstance(offset, str):
            found = NAMED.get(offset) or NAMED.get(offset.upper())
            if found is None:
                raise ValueError(f"offset: no register is called {offset!r}")
            shift[0] = 0
            name, bits[0] = found
            return name
        at = to_address("offset", offset, 0x1FFFF)
        if to_address("size", size) not in (1, 2, 4, 8):
            raise ValueError(must_be("size", "1, 2, 4 or 8 bytes", size))
        bits[0] = 8 * size
        found = OFFSETS.get(at)
        if found is None or size < 4 or at % size:
            return None
        name, shift[0] = found
        if size == 8 and (shift[0] or name not in WIDE):
            return None
        return name

    def read(self, offset, size=4):
        """Read a register as software does.

        Parameters
        ----------
        offset : int or str
            In bytes from the start of page 0, up to 0x1FFFF; or the name of a register, one of
            `smmufast.layout.REGISTERS`, which is then read whole.
        size : int
            In bytes: 4, or 8 for a 64-bit register; others read as zero, as do unaligned
            accesses and offsets without a register.

        Returns
        -------
        int
        """
        cdef int shift = 0, bits = 0
        cdef str name = self._locate(offset, size, &shift, &bits)
        if name is None:
            return 0
        return self._load(name) >> shift & (0xFFFFFFFFFFFFFFFF if bits == 64 else 0xFFFFFFFF)

    def write(self, offset, value, size=4):
        """Write a register as software does, and do all that follows from it.

        Parameters
        ----------
        offset, size : int
            As for `read`; what would read as zero ignores writes.
        value : int
            Of `size` bytes.

        Raises
        ------
        ValueError, TypeError
            An argument is not possible on a bus.  What software may do wrong is no exception.
        Exception
            Whatever on_interrupt, on_resume, a device or a Python memory callback raises.
        """
        cdef int shift = 0, bits = 0
        cdef str name = self._locate(offset, size, &shift, &bits)
        cdef uint64_t field = <uint64_t>0xFFFFFFFFFFFFFFFF if bits == 64 else low_mask(bits)
        cdef uint64_t whole = to_address("value", value, field)
        if name is None:
            row = "S6.2-2" if offset < 0x10000 else "S6.2-3"
            if size < 4 or offset % size:
                row = "S6.2-9"
            elif size == 8 and offset in OFFSETS:
                row = "S6.2-10"
            self._warn(f"{offset:#x}", f"write of {size} bytes ignored: no register", row)
            return
        if bits == 32 and name in WIDE:
            whole = self._load(name) & ~(field << shift) | whole << shift
        self._store(name, whole)

    # S6.3.3-1, S6.3.7-1
    cdef uint64_t _load(self, str name) except? -1:
        """The value of a register."""
        return self._load_from(&self.queues, name)

    # S6.3.9.5-2, S6.3.10-1, S6.3.10-2, S6.3.13-1, S6.3.18-1, S6.3.18-2, S6.3.28-1, S6.3.45-1
    cdef uint64_t _load_from(self, Queues* q, str name) except? -1:
        """The value of a register, with the queues as they were."""
        cdef const Ring* ring
        if name == "CR0ACK":
            return self._values["CR0"]
        if name == "IRQ_CTRLACK":
            return self._values["IRQ_CTRL"]
        if name == "GERROR":
            return q.gerror
        if name == "GERRORN":
            return q.gerrorn
        if name == "CMDQ_CONS":
            return cmdq_cons_of(q, self._cerror)
        if name.endswith("Q_PROD"):
            ring = ring_in(q, name)
            return ring.prod | <uint64_t>ring.ovflg << 31
        if name.endswith("Q_CONS"):
            ring = ring_in(q, name)
            return ring.cons | <uint64_t>ring.ovackflg << 31
        return self._values[name]

    # S3.16-1, S6.2-11, S6.2-12, S6.3-1, S6.3.2-5, S6.3.9.5-3, S6.3.12-2, S6.3.16-3, S6.3.24-5,
    # S6.3.26-6, S6.3.28-3, S6.3.29-2, S6.3.33-2, S6.3.95-3, S6.3.97-2
    cdef bint _guarded(self, str name, uint64_t value) except -1:
        """Whether an enable keeps a register from being written."""
        if PRESET.get(name) is not None and getattr(self._features, PRESET[name]):
            self._warn(name, "write ignored: the register is preset", "S3.16-1")
            return True
        if name not in GUARDS:
            return False
        guard, bits = GUARDS[name]
        if not self._values[guard] & bits:
            return False
        if value != self._load(name):
            self._warn(name, f"write of {value:#x} ignored: {guard} is {self._values[guard]:#x}",
                       "S6.2-11")
        return True

    # S3.11-8, S6.2-6, S6.2-7, S6.2-13, S6.3.11-1, S6.3.11.1-1, S6.3.11.1-2, S6.3.11.2-1, S6.3.14-2,
    # S6.3.14.1-1, S6.3.14.1-2, S6.3.21-3, S6.3.23-1, S6.3.24-2, S6.3.25-8, S6.3.27-4, S6.3.32-1,
    # S7.1-6, S7.1-92
    cdef int _store(self, str name, uint64_t value) except -1:
        """Write a register: the one place where writes have their effects."""
        cdef uint64_t ignored, kept = 0
        if name in READ_ONLY:
            self._warn(name, f"write of {value:#x} ignored: read-only", "S6.2-13")
            return 0
        if not self._masks[name]:
            if value:  # drivers write 0 to what is not there
                self._warn(name, f"write of {value:#x} ignored: not implemented", "S6.2-7")
            return 0
        ignored = value & ~<uint64_t>(self._masks[name] | HARMLESS.get(name, 0))
        if ignored:
            self._warn(name, f"bits {ignored:#x} are ignored", "S6.2-7")
        value &= self._masks[name]
        if self._guarded(name, value):
            return 0
        if name == "CR0":
            return self._set_cr0(value)
        if name == "GERRORN":
            return self._acknowledge(value)
        if name == "GBPA":
            if not value & GBPA_UPDATE:
                self._warn(name, f"write of {value:#x} ignored: Update is 0", "S6.3.14.1-1")
                return 0
            value &= ~GBPA_UPDATE
        elif name == "CR1":
            if cr0_smmuen(self.core.hw.cr0):
                kept = CR1_TABLES
            if self._values["CR0"] & QUEUES_ENABLED:
                kept |= ~CR1_TABLES
            if (value ^ <uint64_t>self._values[name]) & kept:
                self._warn(name, f"bits {kept & WHOLE[name]:#x} stay: CR0 is {self.cr0:#x}",
                           "S6.3.11.2-1" if kept & ~CR1_TABLES else "S6.3.11.1-1")
            value = value & ~kept | self._values[name] & kept
        elif name == "CMDQ_CONS":
            self._cerror = <uint32_t>cmdq_cons_err(value)
            self._restarts += 1
            ring_set_cons(&self.queues, &self.queues.commands, <uint32_t>value)
            return 0
        elif name == "CMDQ_PROD":
            self._put_commands(<uint32_t>value)
            return 0
        elif name.endswith("Q_PROD"):
            ring_set_prod(&self.queues, ring_of(self, name), <uint32_t>value)
            return 0
        elif name.endswith("Q_CONS"):
            ring_set_cons(&self.queues, ring_of(self, name), <uint32_t>value)
            return self._settle()
        self._values[name] = value
        if name.endswith("Q_BASE"):
            self._place(name)
            return 0
        if name.endswith("IRQ_CFG0") and value & self.core.hw.oas_over:
            self._warn(name, f"ADDR is {value:#x}: beyond the output address size of "
                             f"{self.core.hw.oas} bits: {value & ~self.core.hw.oas_over:#x} is "
                             "used", "S6.3.21-2")
        self._digest()
        return 0

    # S3.11-13, S6.3.9-3, S6.3.9-4, S6.3.9.3-3, S6.3.9.6-13, S6.3.9.6-15
    cdef int _set_cr0(self, uint32_t value) except -1:
        """CR0, which is complete at once: CR0ACK follows."""
        cdef uint32_t old = self._values["CR0"]
        cdef uint32_t begun = value & ~old
        self._values["CR0"] = value
        self._digest()
        if cr0_smmuen(begun):
            self._check_stream_table()
        if cr0_eventqen(begun):
            self._check_queue("EVENTQ")
        if cr0_priqen(begun):
            self._check_queue("PRIQ")
        if cr0_cmdqen(begun):
            self._check_queue("CMDQ")
        if cr0_smmuen(old & ~value):
            overtake_all(&self.core)
            self._terminate(None)
            self._tell_scope(NULL)
        try:
            self._stop_queues()
        finally:
            try:
                self._settle()
            finally:
                self._consume()
        return 0

    cdef int _stop_queues(self) except -1:
        """Errors that wait in queues which are disabled by now show (7.2.1)."""
        cdef Queues* q = &self.queues
        cdef Port port
        cdef int status
        port_open(&port, self.core.ram, NULL)
        self.core.ram.users += 1
        status = ring_signal(q, &port, IRQ_EVENTQ, ring_stop(q, &q.events), 0)
        if ring_signal(q, &port, IRQ_PRIQ, ring_stop(q, &q.pages), 0) < 0:
            status = FETCH_RAISED
        self.core.ram.users -= 1
        return self._end(&port, status)

    # S7.1-5, S7.1-91
    cdef int _acknowledge(self, uint32_t value) except -1:
        """GERRORN: what waited for an error to end goes on."""
        cdef uint32_t idle = (value ^ self.queues.gerrorn) & ~(
            self.queues.gerror ^ self.queues.gerrorn)
        if idle:
            self._warn("GERRORN", f"bits {idle:#x}: their errors were not active, and are so now",
                       "S6.3.20-1")
        if gerror_acknowledge(&self.queues, value):
            try:
                self._settle()
            finally:
                self._consume()
        return 0

    # S3.11-1, S3.11-2, S3.11-12, S3.11-101
    def reset(self):
        """Let the device be as after a reset: everything disabled, all registers 0.

        GBPA is 0x1000: transactions pass with their own attributes.  Preset registers stay.
        Stalled transactions are terminated with an abort.
        """
        cdef str name
        keep = {}
        placed = []
        for name, feature in PRESET.items():
            if getattr(self._features, feature):
                keep[name] = self._values[name]
                if name.endswith("Q_BASE") and ring_of(self, name).placed:
                    placed.append(name)
        try:
            self._set_cr0(0)
        finally:
            for name in WHOLE:
                if name not in READ_ONLY:
                    self._values[name] = 0
            self._values["GBPA"] = GBPA_RESET
            self._values.update(keep)
            ring_reset(&self.queues, &self.queues.commands)
            ring_reset(&self.queues, &self.queues.events)
            ring_reset(&self.queues, &self.queues.pages)
            self.queues.gerror = self.queues.gerrorn = 0
            self._cerror = 0
            self._restarts += 1
            self._atc_failed = False
            for name in placed:
                self._place(name)
            self._digest()

    # --- the digest that rules read ---

    # S3.3.1.1-2, S3.18-5, S3.18-6, S6.3.1-2, S6.3.1-7, S6.3.1-11, S6.3.1-18, S6.3.2-2, S6.3.4-2,
    # S6.3.6-2, S6.3.9-1, S6.3.16-2, S6.3.20-3, S6.3.21-4, S6.3.25-2
    cdef int _digest_features(self) except -1:
        """The features, the constant registers, and which bits of the others there are."""
        cdef Hw* hw = &self.core.hw
        features = self._features
        hw_features(hw, features)
        hw.minor = features.arch_minor
        hw.oas = size_bits(features.oas, hw.minor)
        hw.oas_over = ~low_mask(hw.oas)
        hw.pointer_mask = pointer_mask(hw.minor)
        hw.granules = features.gran4k << 12 | features.gran16k << 14 | features.gran64k << 16
        masks = dict(WHOLE)
        masks["CR0"] = layout.mask("CR0", "SMMUEN", "EVENTQEN", "CMDQEN")
        if features.pri:
            masks["CR0"] |= layout.mask("CR0", "PRIQEN")
        else:
            masks["IRQ_CTRL"] &= ~layout.mask("IRQ_CTRL", "PRIQ_IRQEN")
        if features.ats:
            masks["CR0"] |= layout.mask("CR0", "ATSCHK")
        if features.vmw:
            masks["CR0"] |= layout.mask("CR0", "VMW")
        if not features.hyp:
            masks["CR2"] &= ~layout.mask("CR2", "E2H")
        if not features.atsrecerr:
            masks["CR2"] &= ~layout.mask("CR2", "REC_CFG_ATS")
        if not features.btm:
            masks["CR2"] &= ~layout.mask("CR2", "PTM")
        if not features.st_level:
            masks["STRTAB_BASE_CFG"] = layout.mask("STRTAB_BASE_CFG", "LOG2SIZE")
        masks["S2PII"] = 0
        masks["GERRORN"] = layout.mask("GERRORN", "CMDQ_ERR", "EVENTQ_ABT_ERR", "SFM_ERR")
        if features.pri:
            masks["GERRORN"] |= layout.mask("GERRORN", "PRIQ_ABT_ERR")
        if features.msi:
            masks["GERRORN"] |= layout.mask(
                "GERRORN", "MSI_CMDQ_ABT_ERR", "MSI_EVENTQ_ABT_ERR", "MSI_GERROR_ABT_ERR")
        if features.msi and features.pri:
            masks["GERRORN"] |= layout.mask("GERRORN", "MSI_PRIQ_ABT_ERR")
        for name in masks:
            if "IRQ_CFG" in name and not features.msi:
                masks[name] = 0
            if name.startswith("PRIQ") and not features.pri:
                masks[name] = 0
        self._masks = masks
        self._values = dict.fromkeys(WHOLE, 0)
        self._values.update({
            "IDR0": features.idr0, "IDR1": features.idr1, "IDR3": features.idr3,
            "IDR5": features.idr5, "AIDR": features.aidr,
            "CIDR0": 0x0D, "CIDR1": 0xF0, "CIDR2": 0x05, "CIDR3": 0xB1,
        })
        return 0

    # S2.10-1, S3.11-6, S6.3.9.5-1, S6.3.9.6-5, S6.3.9.6-12, S6.3.12-1
    cdef int _digest(self) except -1:
        """Let the digest say what the registers hold."""
        cdef Hw* hw = &self.core.hw
        hw.generation += 1
        hw.cr0 = self._values["CR0"]
        hw.cr2 = self._values["CR2"]
        self._digest_stream_table()
        self._digest_gbpa()
        self._digest_interrupts()
        self.queues.commands.enabled = cr0_cmdqen(hw.cr0)
        self.queues.events.enabled = cr0_eventqen(hw.cr0)
        self.queues.pages.enabled = cr0_priqen(hw.cr0) and cr0_smmuen(hw.cr0)
        self._forget()
        return 0

    # S6.3.24-1, S6.3.25-1, S6.3.25-3, S6.3.25-7, S6.3.25-91
    cdef int _digest_stream_table(self) except -1:
        cdef Hw* hw = &self.core.hw
        cdef uint64_t address
        config = layout.unpack("STRTAB_BASE_CFG", self._values["STRTAB_BASE_CFG"])
        address = layout.unpack("STRTAB_BASE", self._values["STRTAB_BASE"])["ADDR"]
        address &= hw.pointer_mask
        hw.log2size = min(config["LOG2SIZE"], self._features.sidsize)
        hw.two_level = config["FMT"] == 1
        hw.split = split_of(config["SPLIT"])
        if hw.two_level:
            hw.strtab = strtab_two_level_base(address, config["LOG2SIZE"], hw.split)
        else:
            hw.strtab = strtab_linear_base(address, config["LOG2SIZE"])
        return 0

    # S3.11-4, S6.3.2-8, S6.3.14-1, S6.3.14-4, S13.2-1, S13.2-2
    cdef int _digest_gbpa(self) except -1:
        cdef Hw* hw = &self.core.hw
        cdef unsigned int attr = 0xFF, sh = 0
        gbpa = layout.unpack("GBPA", self._values["GBPA"])
        hw.gbpa_abort = gbpa["ABORT"]
        if hw.attr_types_ovr:
            attr = entering_attr(gbpa["MTCFG"], gbpa["MemAttr"], gbpa["ALLOCCFG"])
            sh = 0 if gbpa["SHCFG"] == 1 else gbpa["SHCFG"]
        hw.gbpa_attr = attr
        hw.gbpa_sh = shareability(attr, sh)
        return 0

    # S3.4.3-7, S3.18.1-1, S6.3.16-4, S6.3.16-5, S6.3.21-2
    cdef int _digest_interrupts(self) except -1:
        cdef Msi* msi
        enables = layout.unpack("IRQ_CTRL", self._values["IRQ_CTRL"])
        for irq, name in ((IRQ_EVENTQ, "EVENTQ"), (IRQ_PRIQ, "PRIQ"), (IRQ_GERROR, "GERROR")):
            msi = &self.queues.msi[<int>irq]
            msi.enabled = enables[name + "_IRQEN"]
            # bits beyond OAS are RES0 here, other than in CMD_SYNC (6.3.21)
            msi.address = self._values[name + "_IRQ_CFG0"] & ~self.core.hw.oas_over
            msi.sent = msi.address != 0
            msi.data = self._values[name + "_IRQ_CFG1"]
        return 0

    cdef int _place(self, str name) except -1:
        """A queue's BASE: where it lies."""
        cdef unsigned int largest = getattr(
            self._features, name.removesuffix("_BASE").lower() + "s")
        if name == "CMDQ_BASE":
            self._restarts += 1
        ring_place(&self.queues, ring_of(self, name), self._values[name], largest,
                   self.core.hw.pointer_mask & ~self.core.hw.oas_over)
        return 0

    # --- what is probably a mistake ---

    cdef int _check_stream_table(self) except -1:
        """Warn of a stream table that is not where or what its registers seem to say."""
        cdef Hw* hw = &self.core.hw
        config = layout.unpack("STRTAB_BASE_CFG", self._values["STRTAB_BASE_CFG"])
        address = layout.unpack("STRTAB_BASE", self._values["STRTAB_BASE"])["ADDR"]
        if config["LOG2SIZE"] > self._features.sidsize:
            self._warn("STRTAB_BASE_CFG", f"LOG2SIZE is {config['LOG2SIZE']}: IDR1.SIDSIZE, "
                                          f"{self._features.sidsize}, is used", "S6.3.25-7")
        if config["FMT"] > 1:
            self._warn("STRTAB_BASE_CFG", f"FMT is {config['FMT']}, a reserved code: linear",
                       "S6.3.25-3")
        if hw.two_level and config["SPLIT"] != hw.split:
            self._warn("STRTAB_BASE_CFG", f"SPLIT is {config['SPLIT']}, a reserved code: "
                                          f"{hw.split} is used", "S6.3.25-4")
        if address != hw.strtab:
            self._warn("STRTAB_BASE", f"ADDR is {address:#x}, not a multiple of the table's size: "
                                      f"{<uint64_t>hw.strtab:#x} is used",
                       "S6.3.24-4" if hw.two_level else "S6.3.24-3")
        if hw.strtab & hw.oas_over:
            self._warn("STRTAB_BASE", f"ADDR is {address:#x}: beyond the output address size of "
                                      f"{hw.oas} bits", "S3.4.3-5")
        return 0

    cdef int _check_queue(self, str queue) except -1:
        """Warn of a queue that is not where or what its register seems to say."""
        cdef const Ring* ring = ring_of(self, queue)
        name = queue + "_BASE"
        base = layout.unpack(name, self._values[name])
        if base["LOG2SIZE"] > ring.log2size:
            self._warn(name, f"LOG2SIZE is {base['LOG2SIZE']}: IDR1.{queue}S, {ring.log2size}, "
                             "is used", "S6.3.26-5")
        if base["ADDR"] & self.core.hw.oas_over:
            self._warn(name, f"ADDR is {base['ADDR']:#x}: beyond the output address size of "
                             f"{self.core.hw.oas} bits: {<uint64_t>ring.base:#x} is used",
                       "S6.3.26-2")
        elif base["ADDR"] != ring.base:
            self._warn(name, f"ADDR is {base['ADDR']:#x}, not a multiple of the queue's size: "
                             f"{<uint64_t>ring.base:#x} is used", "S6.3.26-3")
        return 0

    cdef int _end(self, Port* port, int status) except -1:
        """Raise what a callback left in a port."""
        if status < 0:
            raise_port(port)
        return 0

    # --- stalls (3.12.2, 4.7, 5.5, 7.2.1) ---

    # S3.12.2-1, S3.12.2-5, S3.12.2-13, S3.12.2.1-1, S3.12.2.1-3, S5.5-7, S6.3.9.6-14, S7.3.21-3
    cdef int _hold(self, const Request* request, Outcome* outcome) except -1:
        """Hold a transaction until software resumes it; a retry that stalls again keeps its Stall.

        The outcome gets the record's STAG, or is the final one if that comes meanwhile.
        """
        cdef Stall stall = None
        cdef Stall other
        cdef bint fresh
        for other in self._retried:
            if &other.request == request:
                stall = other
                break
        fresh = stall is None
        if fresh:
            stall = Stall.__new__(Stall)
            stall.request = request[0]
        elif stall not in self._stalls:  # it ended while it was translated again
            outcome[0] = stall.ended
            return 0
        elif stall not in self._waiting:  # CMD_RESUME makes it a new transaction
            self._release(stall)
        outcome.event = 0
        stall.outcome = outcome[0]
        stall.waited = False
        self._stalls[stall] = None
        self._waiting[stall] = None
        if not fresh:
            self._record()
        else:
            try:
                self._settle()
            except BaseException:
                if not stall._recorded and not stall._done:
                    self._release(stall)
                raise
        stall.waited = True
        outcome[0] = stall.ended if stall._done else stall.outcome
        return 0

    cdef bint _writable(self) noexcept:
        """Whether a record can be written; without a queue it is in the outcome (7.2.1)."""
        cdef Queues* q = &self.queues
        return ring_writable(q, &q.events) if q.events.placed else q.events.enabled

    # S3.5.3-4, S3.12.2-12, S6.3.6-3, S7.2.1-3, S7.2.1-4
    cdef int _record(self) except -1:
        """Record the stalls that wait, in order, as far as STALL_MAX and the event queue admit.

        What has waited is translated anew first, since what it found may be invalid by now: so
        nothing old is recorded after an invalidation and CMD_SYNC (3.12.2, 4.7.3).  Called
        again by a callback, this returns at once, for the first call goes on: also after records
        that the queue did not take, but for no more of these than the queue has entries.
        """
        cdef Py_ssize_t most = max(1, self._features.stall_max)
        cdef uint64_t budget = <uint64_t>1 << self.queues.events.log2size
        cdef Stall stall
        if self._recording:
            return 0
        self._recording = True
        try:
            while (self._waiting and len(self._stalls) - len(self._waiting) < most
                   and self._writable()):
                stall = next(iter(self._waiting))
                if stall.waited:
                    self._again(stall)
                    if stall not in self._waiting:
                        continue
                if not self._record_first(stall):
                    stall.waited = True
                    if budget == 0:
                        break
                    budget -= 1
        finally:
            self._recording = False
        return 0

    # S3.5.4-1, S3.12.2-8, S3.12.2-10, S3.12.2-11, S4.7.1-9, S7.3.13-6, S7.4-3, L-6
    cdef bint _record_first(self, Stall stall) except -1:
        """Write the record of one stall; no when the event queue does not take it.

        Its STAG is good before the record is there: who reads the record may be fast.
        """
        cdef Queues* q = &self.queues
        cdef uint32_t stag = self._last_stag
        cdef uint32_t turn
        cdef int status = 0, put = PUT_CLOSED
        cdef Port port
        cdef bint written
        while True:  # one is free: STALL_MAX is less than there are values
            stag = (stag + 1) & 0xFFFF
            if stag not in self._tagged:
                break
        self._tag(stall, stag)
        stall.turn += 1
        turn = stall.turn
        event_set_stag(stall.outcome.record, stag)
        stall.outcome.stag = <unsigned short>stag
        port_open(&port, self.core.ram, NULL)
        self.core.ram.users += 1
        if q.events.placed:
            status = ring_put(q, &q.events, &port, stall.outcome.record, False, False, &put)
        elif q.events.enabled:
            put = PUT_WRITTEN  # the record is in the outcome
        written = put & PUT_STATUS == PUT_WRITTEN
        if written:
            self._last_stag = stag
        if stall.turn == turn and not stall._done:
            if written:
                stall._recorded = True
                stall.outcome.event = stall.outcome.fault
                del self._waiting[stall]
            else:
                self._untag(stall)
                stall.outcome.stag = 0
                event_set_stag(stall.outcome.record, 0)
        if event_signal(q, &port, put) < 0:
            status = FETCH_RAISED
        self.core.ram.users -= 1
        self._end(&port, status)
        return written

    cdef int _tag(self, Stall stall, uint32_t stag) except -1:
        """Let a stall have a STAG, which nobody else gets until it is free (3.12.2)."""
        self._tagged.setdefault(stag, {})[stall.request.sid] = stall
        stall._stag = stag
        return 0

    cdef int _untag(self, Stall stall) except -1:
        """Let the STAG of a stall be free, if it is the last one that has it."""
        cdef dict holders = self._tagged.get(stall._stag)
        if holders is not None and holders.get(stall.request.sid) is stall:
            del holders[stall.request.sid]
            if not holders:
                del self._tagged[stall._stag]
        stall._stag = None
        return 0

    # S4.7.2.1-1, S4.7.3-15
    cdef int _again(self, Stall stall) except -1:
        """Translate a transaction as though it had just arrived; unless it stalls again, it ends.

        Its event, if there is one now, is that of what it meets now (7.2.1).
        """
        cdef Outcome outcome
        stall.retrying = True
        self._retried.append(stall)
        try:
            self._retry(&stall.request, &outcome)
        finally:
            self._retried.remove(stall)
            stall.retrying = False
        if stall not in self._stalls or outcome.action == ACTION_STALL:
            return 0  # a callback ended it meanwhile, or it stalls
        stall.ended = outcome
        return self._finish(stall)

    cdef int _release(self, Stall stall) except -1:
        """Let a stall be outstanding no more, and its STAG be free."""
        self._stalls.pop(stall, None)
        self._waiting.pop(stall, None)
        self._untag(stall)
        stall._recorded = False
        stall.turn += 1
        return 0

    cdef int _finish(self, Stall stall) except -1:
        """A stall has its final outcome; `_settle` tells the host."""
        stag, recorded = stall._stag, stall._recorded
        self._release(stall)
        stall._stag, stall._recorded = stag, recorded
        stall._done = True
        stall._result = self._result(&stall.request, &stall.ended)
        self._resumed.append(stall)
        return 0

    cdef int _kill(self, Stall stall, unsigned int action) except -1:
        """End a stall without a retry: with an abort, or RAZ/WI."""
        stall.ended = stall.outcome
        stall.ended.pa = 0
        stall.ended.action = action
        return self._finish(stall)

    # S3.12.2-3, S3.12.2-4, S3.12.2-9, S3.12.2.2-2, S3.12.2.3-1, S3.12.3-1, S4.3.8-2, S4.6-101,
    # S4.6-103, S4.7.1-2, S4.7.1-5, S4.7.1-7, S4.7.1-8
    cdef int _resume(self, uint32_t sid, uint32_t stag, bint retry, bint abort) except -1:
        """CMD_RESUME; without effect when no such transaction is stalled."""
        cdef Stall stall = self._tagged.get(stag, {}).get(sid)
        if stall is None or stall.retrying:
            return 0
        if retry:
            return self._again(stall)
        return self._kill(stall, ACTION_ABORT if abort else ACTION_RAZ_WI)

    # S3.12.2-7, S4.6-104, S4.7.2-1, S4.7.2-2, S4.7.2-3
    cdef int _terminate(self, object sid) except -1:
        """End every stall of a StreamID, or of all, with an abort."""
        cdef Stall stall
        for stall in list(self._stalls):
            if sid is None or stall.request.sid == sid:
                self._kill(stall, ACTION_ABORT)
        return 0

    cdef int _settle(self) except -1:
        """Record the stalls that wait for room, and tell the host which stalls are done."""
        error = None
        if not self._resumed and not self._waiting:
            return 0
        while True:
            try:
                if self._resumed:
                    self._tell(self._resumed.pop(0))
                else:
                    self._record()
                    if not self._resumed:
                        break
            except BaseException as raised:
                error = error or raised
                if not self._resumed:
                    break
        if error is not None:
            raise error
        return 0

    cdef int _tell(self, Stall stall) except -1:
        """Call on_resume with a stall that is done."""
        if self._on_resume is None:
            return 0
        self._calling += 1
        try:
            call_host(self._on_resume, (stall,))
        finally:
            self._calling -= 1
        return 0

    # --- commands (4) ---

    cdef uint64_t _put_commands(self, uint32_t prod) except? -1:
        """Write CMDQ_PROD, for which commands are consumed; return CMDQ_CONS."""
        ring_set_prod(&self.queues, &self.queues.commands, prod)
        # during a command there is more to consume; an acknowledged error alone is not
        self._budget = <uint64_t>1 << self.queues.commands.log2size
        self._consume()
        return cmdq_cons_of(&self.queues, self._cerror)

    # S3.5.1-7, S3.5.1-9, S3.11-9, S3.18-3, S3.21.2-1, S3.21.2-2, S3.21.2-3, S3.21.2-4, S4.1.1-1,
    # S4.1.2-1, S4.1.2-2, S4.1.2-3, S4.1.3-4, S4.1.4-1, S6.3.9.3-1, S6.3.9.3-2, S6.3.9.6-11,
    # S6.3.27-1, S6.3.28-4, S7.1-1, S7.1-2, S7.1-4, S7.1-8, S16.7.4-4
    cdef int _consume(self) except -1:
        """Consume commands until the queue is empty, an error stops it, or once around.

        Called again by a callback, it returns at once, for the first call goes on.  A long run
        looks for signals about every millisecond, and gives up the GIL every 8.
        """
        cdef Ring* ring = &self.queues.commands
        cdef uint64_t[2] words
        cdef uint32_t restarts, cerror
        cdef Effect effect
        cdef Port port
        cdef int status
        cdef bint room
        cdef Pace pace = pace_begin()
        if self._consuming:
            return 0
        self._budget = <uint64_t>1 << ring.log2size
        self._consuming = True
        self._consumer = <unsigned long>PyThread_get_thread_ident()
        try:
            while (self._budget and ring.enabled and ring.prod != ring.cons
                   and not gerror_active(&self.queues, GERROR_CMDQ_ERR)):
                pace.left -= 1
                if pace.left < 0:
                    pace_look(&pace)
                    continue
                self._budget -= 1
                restarts = self._restarts
                port_open(&port, self.core.ram, NULL)
                self.core.ram.users += 1
                status = port_read(&port, ACCESS_CMD, ring_entry(ring, ring.cons), words, 16)
                self.core.ram.users -= 1
                self._end(&port, status)
                cerror = CMDQ_CONS_ERR_ABT
                effect.why = 0
                if status == FETCH_OK:
                    words[0] = le64(words[0])
                    words[1] = le64(words[1])
                    cerror = command_decode(&self.core.hw, words, &effect)
                    if self._sync_waits(&effect):
                        break
                    if cerror == 0 and self._on_command is not None:
                        call_host(self._on_command, (le_bytes(words),))
                    if cerror == 0:
                        cerror = self._execute(&effect)
                room = False
                if restarts == self._restarts:
                    if cerror:
                        self._command_error(cerror, <int>effect.why)
                        continue
                    room = ring_full(ring.prod, ring.cons, ring.log2size)
                    ring.cons = ring_after(ring.cons, ring.log2size)
                    room = room and not ring_full(ring.prod, ring.cons, ring.log2size)
                if cerror == 0:
                    try:
                        self._complete(&effect, room)
                    finally:
                        self._settle()
        finally:
            self._consuming = False
        return 0

    # S3.9.1-8, S4.7.3-1, S4.7.3-13, S4.7.3-18, S4.7.3-19, S4.8-1, S7.1-9
    cdef int _execute(self, const Effect* effect) except -1:
        """Do what a legal command does but for its completion: 0, or a CERROR code."""
        if effect.kind in (EFFECT_CFGI_STE, EFFECT_CFGI_RANGE, EFFECT_CFGI_ALL, EFFECT_CFGI_CD,
                           EFFECT_CFGI_CD_ALL, EFFECT_TLBI):
            self._invalidate(effect)
            self._tell_scope(effect)
        elif effect.kind == EFFECT_PREFETCH:
            self._prefetch(effect)
        elif effect.kind == EFFECT_ATC_INV:
            self._atc_inv(effect)
        elif effect.kind == EFFECT_PRI_RESP:
            device = self._devices.get(effect.sid)
            if device is not None:
                call_host(device.pri_response, (
                    effect.ssid if effect.ssv else None, effect.prg_index, effect.resp))
        elif effect.kind == EFFECT_RESUME:
            self._resume(effect.sid, effect.stag, effect.retry, effect.abort)
        elif effect.kind == EFFECT_STALL_TERM:
            self._terminate(effect.sid)
        elif effect.kind == EFFECT_SYNC and self._atc_failed:
            self._atc_failed = False
            return CMDQ_CONS_ERR_ATC_INV_SYNC
        elif effect.kind == EFFECT_SYNC:
            sync_done(&self.core)
        return 0

    cdef bint _sync_waits(self, const Effect* effect) except -1:
        """Whether a command is a CMD_SYNC that walks hold, and so not consumed yet (4.7.3)."""
        return effect.kind == EFFECT_SYNC and sync_waits(&self.core)

    # S3.9.1.4-1, S3.9.1.5-1, S4.5-1, S4.5.1-4, S4.5.1-9
    cdef int _atc_inv(self, const Effect* effect) except -1:
        """CMD_ATC_INV to the device of its StreamID; a failure is the next SYNC's."""
        device = self._devices.get(effect.sid)
        if device is None:
            return 0
        ssid = effect.ssid if effect.ssv else None  # with G too: the PASID prefix (4.5.1)
        size = (<object>effect.last) - effect.first + 1
        try:
            if call_host(device.atc_invalidate, (
                    ssid, effect.first, size, effect.global_ != 0)) is False:
                self._atc_failed = True
        except TimeoutError:
            self._atc_failed = True
        return 0

    # S3.18.1-2, S3.18.2-3, S4.1.2-4, S4.7.3-2, S4.7.3-3, S4.7.3-4, S4.7.3-11, S4.7.3-16
    cdef int _complete(self, const Effect* effect, bint room) except -1:
        """Signal what a command that is consumed by now completes: a CMD_SYNC, or `room`.

        Room in a queue that was full wakes processors from WFE: somebody may have looked while it
        was full, if only a callback or another thread (4.1.2).
        """
        cdef Queues* q = &self.queues
        cdef Port port
        cdef Msi msi
        cdef int status = 0
        cdef bint wakes = room and self.core.hw.sev
        if effect.kind == EFFECT_SYNC and effect.cs == CMD_CS_SEV:
            wakes = True
        port_open(&port, self.core.ram, NULL)
        if effect.kind == EFFECT_SYNC and effect.cs == CMD_CS_IRQ:
            msi.sent = effect.msi_address != 0
            msi.address = effect.msi_address & ~self.core.hw.oas_over
            msi.data = effect.msi_data
            msi.error = GERROR_MSI_CMDQ_ABT_ERR
            self.core.ram.users += 1
            status = signal(q, &port, IRQ_CMDQ_SYNC, &msi)
            self.core.ram.users -= 1
        if wakes and wire(<void*>self, &port, IRQ_SEV) < 0:
            status = FETCH_RAISED
        return self._end(&port, status)

    # S4.1.3-5, S6.3.19-5, S7.1-3
    cdef int _command_error(self, uint32_t cerror, int why) except -1:
        """CMDQ_CONS.ERR first, then GERROR.CMDQ_ERR, which stops the queue."""
        cdef Port port
        self._cerror = cerror
        self._command_why = why
        self._warn("CMDQ_CONS", cerror_text(cerror, why), None)
        port_open(&port, self.core.ram, NULL)
        self.core.ram.users += 1
        status = gerror_raise(&self.queues, &port, GERROR_CMDQ_ERR)
        self.core.ram.users -= 1
        return self._end(&port, status)

    def command(self, str name not None, **fields):
        """Issue one command: into the command queue if software placed one, else directly.

        Parameters
        ----------
        name : str
            As the architecture spells it, without CMD_: "CFGI_STE", "TLBI_NH_VA", "RESUME".
        **fields : int
            Fields of the command as `smmufast.layout` names them; others are 0.

        Raises
        ------
        ValueError
            There is no such command or field, a value does not fit, or the command is executed
            directly and ends in a CERROR code.  In a queue, that stops the queue instead.
        RuntimeError
            A CMD_SYNC is executed directly, and a walk holds it.  In a queue, it waits instead.
        BufferError
            The command queue is full.
        ExternalAbort, PermissionError
            The command queue lies where no memory can be written.

        >>> from smmufast import Memory, Smmu
        >>> Smmu(Memory()).command("CFGI_STE", StreamID=3, Leaf=1)
        """
        cdef Ring* ring = &self.queues.commands
        cdef Effect effect
        cdef uint64_t[2] words
        cdef uint32_t cerror
        record = layout.command_record(name)
        word = layout.pack(record, **fields)
        if ring.placed:
            if ring_full(ring.prod, ring.cons, ring.log2size):
                raise BufferError(f"command queue: full, {1 << ring.log2size} commands wait")
            self._memory.write(ring_entry(ring, ring.prod), layout.to_bytes(record, word))
            self._put_commands(ring_after(ring.prod, ring.log2size))
            return
        words[0] = word & 0xFFFFFFFFFFFFFFFF
        words[1] = word >> 64
        cerror = command_decode(&self.core.hw, words, &effect)
        if self._sync_waits(&effect):
            raise RuntimeError(f"{name}: {HELD}")
        if cerror == 0:
            self._calling += 1
            try:
                cerror = self._execute(&effect)
            finally:
                self._calling -= 1
        if cerror:
            raise ValueError(f"{name}: {cerror_text(cerror, effect.why, fields)}")
        try:
            self._complete(&effect, False)
        finally:
            self._settle()

    def sync(self):
        """Issue CMD_SYNC and see that it completed.

        Raises
        ------
        RuntimeError
            It waits in the command queue: disabled, stopped by an error, or held by a walk.
        ValueError, BufferError, ExternalAbort, PermissionError
            As for `command`.
        """
        cdef const Ring* ring = &self.queues.commands
        self.command("SYNC")
        while (ring.prod != ring.cons and self._consuming
               and self._consumer != <unsigned long>PyThread_get_thread_ident()):
            with nogil:
                nap()  # another thread is at work on a long run
            look_for_signals()
        if ring.prod == ring.cons:
            return
        reason = "CR0.CMDQEN is 0"
        if gerror_active(&self.queues, GERROR_CMDQ_ERR):
            reason = f"stopped by {cerror_text(self._cerror, self._command_why)}"
        elif self._consuming:
            reason = "commands before it are not complete"
        elif ring.enabled and sync_waits(&self.core):
            reason = HELD
        raise RuntimeError(f"command queue: {reason}")

    # S3.12-1, S3.12.4.1-1, S7.3.2-1, S7.3.2-2, S7.3.19-1, S16.7.1-2
    def record(self, str name not None, **fields):
        """Put an event of the host's own into the event queue (IHI 0070 7.3).

        For what the model has no cause for: F_UUT, a transaction that the host's bus cannot
        carry, and E_PAGE_REQUEST, a hint of a device.  Such as any, it may be discarded.

        Parameters
        ----------
        name : str
            As the architecture spells it.
        **fields : int
            Fields of the record as `smmufast.layout` names them; others are 0.

        Returns
        -------
        bool
            Whether it was recorded; False while no event queue is placed.

        Raises
        ------
        ValueError
            There is no such event or field, or a value does not fit.
        """
        cdef uint64_t[4] words
        cdef bint written = False
        cdef Port port
        cdef int i, status
        word = layout.pack(layout.event_record(name), **fields)
        for i in range(4):
            words[i] = word >> 64 * i & 0xFFFFFFFFFFFFFFFF
        if not self.queues.events.placed:
            return False
        port_open(&port, self.core.ram, NULL)
        self.core.ram.users += 1
        status = event_put(&self.core, &port, words, &written)
        self.core.ram.users -= 1
        self._end(&port, status)
        return written

    # --- page requests (8) ---

    # S3.18.2-2, S6.3.4-14, S6.3.36-1, S6.3.36-2, S6.3.36-4, S6.3.36-5, S8-1, S8-2, S8-3, S8.1-3,
    # S8.1-4, S8.1-5, S8.1-9, S8.2-1, S8.2-2, S8.2-3, S8.2-4, S8.2-5, S8.2-6, S16.7.4-6
    def page_request(self, sid, address, *, ssid=None, read=False, write=False, execute=False,
                     priv=False, last=True, prg_index=0):
        """Take a PCIe page request message into the page request queue.

        Parameters
        ----------
        sid : int
            StreamID of the device.
        address : int
            Of the page: a multiple of 4096.
        ssid : int, optional
            PASID, 20 bits; None without one.  Then execute and priv count as False.  An SMMU
            without substreams takes every message as one without a PASID.
        read, write, execute, priv, last : bool
            What is asked for, and whether it is the last request of its group.  A request with a
            PASID that is last and asks for neither read nor write is a stop marker.
        prg_index : int
            Page request group, 9 bits.

        Returns
        -------
        PageAnswer
            What the device learns at once.  Of a request that is queued, the answer is a
            CMD_PRI_RESP, which reaches ``devices[sid].pri_response``.
        """
        cdef Queues* q = &self.queues
        cdef uint64_t[4] words
        cdef uint32_t stream = <uint32_t>to_address("sid", sid, 0xFFFFFFFF)
        cdef uint64_t page = to_address("address", address)
        cdef int status, ppar, wanted, put = PUT_CLOSED
        cdef Port port
        cdef bint marker
        if page & 0xFFF:
            raise ValueError(must_be("address", "a multiple of 0x1000", page))
        read, write = to_flag("read", read), to_flag("write", write)
        execute, priv = to_flag("execute", execute), to_flag("priv", priv)
        last = to_flag("last", last)
        group = to_address("prg_index", prg_index, 0x1FF)
        if ssid is not None:
            ssid = to_address("ssid", ssid, 0xFFFFF)
            if not self.core.hw.ssidsize:
                ssid = None
        marker = ssid is not None and last and not read and not write
        word = layout.pack(
            "PRI", StreamID=stream, Last=last, R=read, W=write, PRGIndex=group, Address=page,
            SubstreamID=ssid or 0, SSV=ssid is not None, X=execute and ssid is not None,
            Priv=priv and ssid is not None)
        words[0] = word & 0xFFFFFFFFFFFFFFFF
        words[1] = word >> 64
        words[2] = words[3] = 0
        port_open(&port, self.core.ram, NULL)
        status = 0
        self.core.ram.users += 1
        if q.pages.enabled and q.pages.placed:
            status = ring_put(q, &q.pages, &port, words, True, last, &put)
        # with LO the last of a group interrupts, written or lost to overflow (6.3.36)
        wanted = PUT_LAST if self._values["PRIQ_IRQ_CFG2"] & PRIQ_IRQ_CFG2_LO else PUT_FIRST
        if ring_signal(q, &port, IRQ_PRIQ, put, wanted) < 0:
            status = FETCH_RAISED
        self.core.ram.users -= 1
        self._end(&port, status)
        put &= PUT_STATUS
        if put == PUT_WRITTEN:
            return PageAnswer("queued", None)
        if marker or put == PUT_FULL and not last:
            return PageAnswer("dropped", None)
        if put != PUT_FULL:
            return PageAnswer("failure", None)
        ppar = 1
        if ssid is not None and not self.core.hw.pps:
            ppar = self._ppar(stream, ssid)
        if ppar < 0:
            return PageAnswer("failure", None)
        return PageAnswer("success", ssid if ppar else None)

    # --- save and restore ---

    cdef int _check_still(self, const Queues* q) except -1:
        """Refuse while anything is under way: it would be lost."""
        if self.core.ram.users > self.core.ram.handles:
            raise RuntimeError("save: a translation or a callback is under way in this memory; "
                               "save between calls")
        if self._consuming or self._recording or self._calling or self._retried or self._resumed:
            raise RuntimeError("save: a command is under way; save between calls")
        if q.commands.writers or q.events.writers or q.pages.writers:
            raise RuntimeError("save: a record is being written; save between calls")
        if q.commands.enabled and q.commands.prod != q.commands.cons and sync_waits(&self.core):
            raise RuntimeError(f"save: {HELD}; end those walks first")
        return 0

    cdef dict _state(self, Queues* q):
        """What save() writes, but for the contents of the caches; with the queues as they were."""
        cdef Stall stall
        cdef list stalls = [], placed = []
        cdef dict registers = {}
        for stall in self._stalls:
            stalls.append({
                "sid": stall.request.sid, "ssid": stall.request.ssid, "iova": stall.request.iova,
                "access": stall.request.access,
                "recorded": int(stall._recorded), "outcome": stall.outcome,
            })
        for name in REGISTERS:
            registers[name] = self._load_from(q, name)
        for name in QUEUES:
            placed.append(int(ring_in(q, name).placed))
        return {
            "features": features_saved(self._features),
            "ignore_s2ptw": int(self.core.hw.ignore_s2ptw != 0),
            "wired": int(self.queues.wired != 0),
            "registers": registers,
            "placed": placed,
            "atc_failed": int(self._atc_failed),
            "last_stag": self._last_stag,
            "stalls": stalls,
            "warnings": list(map(list, self._warnings)),
            "caches": None,
        }

    def save(self):
        """Return the whole state as bytes, for `restore`; equal states give equal bytes.

        That is the features, every register, the positions of the queues, errors, stalls,
        warnings, and the caches with their counters and replacement state.  What lies in the
        memory, callbacks and devices are the host's.  So is a Walk that is not done.

        Raises
        ------
        RuntimeError
            A translation, a command or a record is under way: in another thread, because a
            callback of one saves, or because a walk holds a CMD_SYNC.

        >>> from smmufast import Memory, Smmu
        >>> smmu = Smmu(Memory(), gbpa=0x10_1000)
        >>> hex(Smmu.restore(smmu.save(), Memory()).gbpa)
        '0x101000'
        """
        cdef dict state
        cdef Queues q
        cdef bytes contents = b""
        cdef uint64_t size = 0
        cdef char* cached = NULL
        # queues and caches of one instant
        caches_take_gil(&self.core)
        try:
            lock_take(&self.queues.lock)
            q = self.queues
            lock_give(&self.queues.lock)
            if self.core.caches != NULL:
                cached = state_of(self.core.caches, &size)
        finally:
            caches_give(&self.core)
        try:
            self._check_still(&q)
            if cached != NULL:
                contents = PyBytes_FromStringAndSize(cached, <Py_ssize_t>size)
        finally:
            free(cached)
        state = self._state(&q)
        if self._caches is not None:
            geometries = []
            for each in (<Caches>self._caches).geometries:
                geometries.append(each and list(each))
            state["caches"] = {"geometries": geometries, "nested": self._caches.nested}
        text = json.dumps(state, sort_keys=True, separators=(",", ":")).encode()
        data = STATE_HEADER.pack(STATE_MARK, STATE_VERSION, len(text)) + text + contents
        return data + crc32(data).to_bytes(4, "little")

    @classmethod
    def restore(cls, state, Memory memory not None, *, on_interrupt=None, on_resume=None):
        """Make an Smmu that goes on as the saved one would have.

        Parameters
        ----------
        state : bytes-like
            What `save` returned: by a version of the same format, on a host of the same byte
            order if there are caches.
        memory : Memory
            Where its tables and queues lie: that of the saved one or a copy as of then.
        on_interrupt, on_resume : callable, optional
            As the attributes; devices are to be given anew, and stalls that are outstanding are
            other objects: see `stalls`.

        Returns
        -------
        Smmu

        Raises
        ------
        ValueError
            The bytes are damaged, or of no state that can be.
        TypeError
            An argument is of another type.
        """
        cdef Registers self
        saved, contents = state_parts(state)
        features = saved_features(saved["features"])
        self = cls(
            memory, features, cr0=0, cr2=0, gbpa=0,
            caches=saved_caches(saved["caches"], contents),
            ignore_s2ptw=saved_number("ignore_s2ptw", saved["ignore_s2ptw"], 1),
            wired=saved_number("wired", saved["wired"], 1, 1 - features.msi),
            on_interrupt=on_interrupt)
        self.on_resume = on_resume
        self._take_state(saved)
        return self

    cdef int _take_state(self, dict state) except -1:
        """Let a new object have a saved state."""
        cdef dict values = saved_dict("registers", state["registers"], REGISTERS)
        for name, value in values.items():
            mask = self._masks[name] if name != "GERROR" else WHOLE[name]
            if name == "GBPA":
                mask &= ~GBPA_UPDATE
            saved_number(name, value, 0xFFFFFFFFFFFFFFFF)
            if value & ~mask:
                raise state_error(must_be(name, f"bits of {mask:#x}", value))
        for name, value in values.items():
            if not name.endswith(("Q_PROD", "Q_CONS")) and name not in ("GERROR", "GERRORN"):
                self._values[name] = value
        self.queues.gerror = values["GERROR"]
        self.queues.gerrorn = values["GERRORN"]
        self._take_rings(values, saved_list("placed", state["placed"], len(QUEUES)))
        self._atc_failed = saved_number("atc_failed", state["atc_failed"], 1)
        self._last_stag = saved_number("last_stag", state["last_stag"], 0xFFFF)
        for saved in saved_list("stalls", state["stalls"]):
            self._take_stall(saved)
        recorded = len(self._stalls) - len(self._waiting)
        if recorded > max(1, self._features.stall_max):
            raise state_error(must_be(
                "recorded stalls", f"at most {max(1, self._features.stall_max)}", recorded))
        for saved in saved_list("warnings", state["warnings"]):
            if list(map(type, saved_list("warnings", saved, 2))) != [str, str]:
                raise state_error(must_be("warnings", "lists of two strings", saved))
            self._warnings.append(RegisterWarning(*saved))
        return self._digest()

    cdef int _take_rings(self, dict values, placed) except -1:
        """Where the queues lie, which follows from BASE, and their positions."""
        cdef Ring* ring
        for name, there in zip(QUEUES, placed, strict=True):
            ring = ring_of(self, name)
            if saved_number("placed", there, 1):
                self._place(f"{name}_BASE")
            prod, cons = values[f"{name}_PROD"], values[f"{name}_CONS"]
            saved_number(f"{name}_PROD", prod & 0xFFFFF, ring_bits(ring.log2size))
            saved_number(f"{name}_CONS", cons & 0xFFFFF, ring_bits(ring.log2size))
            ring_set_prod(&self.queues, ring, prod)
            ring_set_cons(&self.queues, ring, cons)
        self._cerror = <uint32_t>cmdq_cons_err(values["CMDQ_CONS"])
        return 0

    cdef int _take_stall(self, saved) except -1:
        """One more outstanding stall: with a tag, or waiting for one."""
        cdef Stall stall = Stall.__new__(Stall)
        cdef Outcome outcome
        saved_dict("stall", saved, STALL)
        for name, last in STALL.items():
            if last is not None:
                saved_number(f"{name} of a stall", saved[name], last)
        if 0xFFFFF < saved["ssid"] < <uint32_t>NO_SSID:
            raise state_error(must_be(
                "ssid of a stall", f"0 to 0xfffff, or {<uint32_t>NO_SSID:#x} for none",
                saved["ssid"]))
        if type(saved["outcome"]) is dict:
            saved["outcome"].setdefault("why", 0)  # states of version 0.2 have none
        members = saved_dict("outcome of a stall", saved["outcome"], OUTCOME)
        for name, last in OUTCOME.items():
            if last is not None:
                saved_number(f"{name} of a stall", members[name], last, -(name == "level"))
        for word in saved_list("record of a stall", members["record"], 4):
            saved_number("record of a stall", word, 0xFFFFFFFFFFFFFFFF)
        outcome = members
        stall.outcome = outcome
        stall.request.sid = saved["sid"]
        stall.request.ssid = saved["ssid"]
        stall.request.iova = saved["iova"]
        stall.request.access = saved["access"]
        stall._recorded = saved["recorded"]
        if (outcome.action != ACTION_STALL or outcome.fault != outcome.record[0] & 0xFF
                or not EVENT_F_TRANSLATION <= outcome.fault <= EVENT_F_PERMISSION
                or outcome.event != (outcome.fault if stall._recorded else 0)
                or outcome.why and (outcome.why not in REASONS
                                    or why_event(outcome.why) != outcome.fault)
                or outcome.stag and not stall._recorded):
            raise state_error("outcome of a stall: not that of a fault that stalls")
        self._stalls[stall] = None
        if not stall._recorded:
            stall.waited = True
            self._waiting[stall] = None
            return 0
        if stall.request.sid in self._tagged.get(outcome.stag, ()):
            raise state_error(f"stalls: sid {saved['sid']:#x} has STAG {outcome.stag:#x} twice")
        self._tag(stall, outcome.stag)  # in states of version 0.2 several streams may have it
        return 0
