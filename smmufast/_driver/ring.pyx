# cython: binding=False, embedsignature=True, embedsignature.format=clinic
# cython: language_level=3
"""What the driver half does with the memory of an SMMU in almost every call, compiled.

The command queue as a driver sees it (IHI 0070 3.5 and 4), the writer of STEs and CDs (5.2, 5.4),
and the commands that invalidate a range (4.3 to 4.5).  Beside them is what surrounds every change:
the lock of a system, and what takes back the beginning of a call that fails.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.pythread cimport PyThread_get_thread_ident
cimport cython
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcmp, memcpy

from smmufast._facts.bits cimport le64
from smmufast._engine.core cimport Ring
from smmufast._facts.layout cimport (
    CMDQ_CONS_ERR_ABT, STE_CONFIG_BYPASS, STE_CONFIG_NESTED, STE_CONFIG_STAGE_1, STE_CONFIG_STAGE_2,
    STE_S1DSS_BYPASS, cd_epd0, cd_v, ste_config, ste_s1dss, ste_v,
)
from smmufast._engine.memory cimport (
    ACCESS_HOST, FETCH_OK, Memory, Port, port_open, port_read, port_write,
)
from smmufast._device.smmu cimport Smmu

import threading
from typing import NamedTuple

from smmufast import layout
from smmufast.errors import Busy, CommandError, InputOutput, InvalidArgument, Refused
from smmufast.why import Why

# --- memory ---


cdef int load(Memory memory, uint64_t address, uint64_t* words, size_t count) except -1:
    """Dwords of memory, as numbers."""
    cdef Port port
    cdef size_t i
    cdef bytes data
    port_open(&port, &memory.ram, NULL)
    if not memory.ram.plain or port_read(&port, ACCESS_HOST, address, words, 8 * count) != FETCH_OK:
        data = memory.read(address, 8 * count)  # which says what is wrong
        memcpy(words, <const char*>data, 8 * count)
    for i in range(count):
        words[i] = le64(words[i])
    return 0


cdef int store(Memory memory, uint64_t address, const void* data, size_t size) except -1:
    """Write bytes into memory."""
    cdef Port port
    port_open(&port, &memory.ram, NULL)
    if not memory.ram.plain or port_write(&port, ACCESS_HOST, address, data, size) != FETCH_OK:
        memory.write(address, PyBytes_FromStringAndSize(<const char*>data, size))
    return 0


# --- fields ---


# Where a field of a command is: `mask` are its bits in place.
cdef struct Place:
    int dword
    int shift
    uint64_t mask


cdef Place place_of(str record, str name):
    cdef Place p
    field = layout.command_record(record).field(name)
    p.dword, p.shift, p.mask = field.dword, field.shift, field.mask
    return p


cdef struct Command:
    uint64_t[2] words


cdef Command command_of(word):
    cdef Command c
    c.words[0] = word & MASK
    c.words[1] = word >> 64
    return c


cdef inline void fill_in(Command* c, const Place* p, uint64_t value) noexcept:
    """Put a value that fits into a field."""
    c.words[p.dword] |= value << p.shift & p.mask


cdef uint64_t ALL = 0xFFFFFFFFFFFFFFFF
cdef object MASK = ALL
cdef Command SYNC = command_of(layout.pack("SYNC"))
cdef Command CFGI_STE = command_of(layout.pack("CFGI_STE", Leaf=1))
cdef Command CFGI_CD = command_of(layout.pack("CFGI_CD", Leaf=1))
cdef Command PREFETCH_CONFIG = command_of(layout.pack("PREFETCH_CONFIG"))
cdef Command ATC_INV = command_of(layout.pack("ATC_INV"))
cdef Command ATC_INV_PASID = command_of(layout.pack("ATC_INV", SSV=1))
cdef Command TLBI_NH_ALL = command_of(layout.pack("TLBI_NH_ALL"))

# All commands with a StreamID, or a SubstreamID, have it in the same place; so have all TLBI
# commands their tag and what describes a range.
cdef Place STREAM_ID = place_of("CFGI_CD", "StreamID")
cdef Place SUBSTREAM_ID = place_of("CFGI_CD", "SubstreamID")
cdef Place ATC_ADDRESS = place_of("ATC_INV", "Address")
cdef Place ATC_SIZE = place_of("ATC_INV", "Size")
cdef Place ASID = place_of("TLBI_NH_VA", "ASID")
cdef Place VMID = place_of("TLBI_S2_IPA", "VMID")
cdef Place VA = place_of("TLBI_NH_VA", "Address")
cdef Place IPA = place_of("TLBI_S2_IPA", "IPA")
cdef Place LEAF = place_of("TLBI_NH_VA", "Leaf")
cdef Place SCALE = place_of("TLBI_NH_VA", "Scale")
cdef Place NUM = place_of("TLBI_NH_VA", "Num")
cdef Place TG = place_of("TLBI_NH_VA", "TG")
cdef Place TTL = place_of("TLBI_NH_VA", "TTL")
cdef uint64_t E2H = layout.mask("CR2", "E2H")
cdef uint64_t CMDQ_ERR = layout.mask("GERROR", "CMDQ_ERR")
cdef uint64_t CMDQ_RA = layout.mask("CMDQ_BASE", "RA")
cdef int ERR = layout.REGISTERS["CMDQ_CONS"].field("ERR").shift
cdef uint64_t ERR_MASK = layout.mask("CMDQ_CONS", "ERR")


# --- commands that go into a queue together ---

cdef enum:
    FEW = 16  # so many need no allocation


cdef struct Batch:
    Command* commands
    Py_ssize_t count
    Py_ssize_t room
    Command[FEW] few


cdef inline void batch_open(Batch* b) noexcept:
    b.commands = b.few
    b.count = 0
    b.room = FEW


cdef inline void batch_close(Batch* b) noexcept:
    if b.commands != b.few:
        free(b.commands)


cdef int batch_add(Batch* b, const Command* c) except -1:
    """Append a command, as it lies in memory."""
    cdef Command* more
    if b.count == b.room:
        more = <Command*>realloc(NULL if b.commands == b.few else b.commands,
                                 2 * b.room * sizeof(Command))
        if more == NULL:
            raise MemoryError()
        if b.commands == b.few:
            memcpy(more, b.few, sizeof(b.few))
        b.commands = more
        b.room *= 2
    b.commands[b.count].words[0] = le64(c.words[0])
    b.commands[b.count].words[1] = le64(c.words[1])
    b.count += 1
    return 0


cdef object batch_word(const Batch* b, Py_ssize_t i):
    """A command as one number."""
    return <object>le64(b.commands[i].words[0]) | <object>le64(b.commands[i].words[1]) << 64


cdef list batch_words(const Batch* b):
    """All commands as numbers."""
    cdef list words = []
    cdef Py_ssize_t i
    for i in range(b.count):
        words.append(batch_word(b, i))
    return words


# --- what invalidates a range ---

#: Kinds of what may have cached a domain, in the order in which it is told (F58)
S1_ASID, S2_VMID, S2_VMID_S1_CLEAR, ATS, ATS_FULL = range(5)

cdef enum:
    KIND_S1_ASID
    KIND_S2_VMID
    KIND_S2_VMID_S1_CLEAR
    KIND_ATS
    KIND_ATS_FULL

    ATC_ALL = 52    # Size of a CMD_ATC_INV of everything
    SCALE_MOST = 31
    NUM_MOST = 32


# TLBI commands of a stage: of one address, and of a whole tag.
cdef struct Tlbi:
    Command some
    Command whole
    Place tag
    Place address


cdef Tlbi tlbi_of(some, whole, tag, address):
    cdef Tlbi t
    t.some = command_of(layout.pack(some))
    t.whole = command_of(layout.pack(whole))
    t.tag = place_of(some, tag)
    t.address = place_of(some, address)
    return t


cdef Tlbi TLBI_NH = tlbi_of("TLBI_NH_VA", "TLBI_NH_ASID", "ASID", "Address")
cdef Tlbi TLBI_EL2 = tlbi_of("TLBI_EL2_VA", "TLBI_EL2_ASID", "ASID", "Address")
cdef Tlbi TLBI_S2 = tlbi_of("TLBI_S2_IPA", "TLBI_S12_VMALL", "VMID", "IPA")


# Addresses of which something was removed, `last` included.
cdef struct Span:
    uint64_t first
    uint64_t last
    int granule_lg2   # of the page table
    int page_lg2      # of the entries that were removed
    bint leaf         # no table was


cdef Span span_of(first, last, int granule_lg2, int page_lg2, bint leaf):
    """A range of addresses for the command queue, checked."""
    cdef Span s
    if granule_lg2 != 12 and granule_lg2 != 14 and granule_lg2 != 16:
        raise InvalidArgument("granule_lg2", granule_lg2, "12, 14 or 16")
    if not granule_lg2 <= page_lg2 < 52:
        raise InvalidArgument("page_lg2", page_lg2, f"{granule_lg2} to 51")
    try:
        s.first = first
        s.last = last
    except OverflowError:
        raise InvalidArgument("first, last", (first, last), "0 to 2^64 - 1") from None
    if s.first > s.last:
        raise InvalidArgument("last", last, f"{first:#x} to 2^64 - 1")
    s.granule_lg2 = granule_lg2
    s.page_lg2 = page_lg2
    s.leaf = leaf
    return s


cpdef int check_cached(kind, number, ssid) except -1:
    """Refuse what has cached nothing: a wrong kind, or a number with too many bits."""
    cdef Place p = STREAM_ID if kind >= KIND_ATS else ASID
    if kind not in (S1_ASID, S2_VMID, S2_VMID_S1_CLEAR, ATS, ATS_FULL):
        raise InvalidArgument("kind", kind, "S1_ASID to ATS_FULL")
    if not 0 <= number <= p.mask >> p.shift:
        raise InvalidArgument("number", number, f"0 to {p.mask >> p.shift:#x}")
    if not 0 <= ssid <= SUBSTREAM_ID.mask >> SUBSTREAM_ID.shift:
        raise InvalidArgument("ssid", ssid, "0 to 0xfffff")
    return 0


cdef int bits_of(uint64_t value) noexcept:
    """How many bits a number has."""
    cdef int n = 0
    while value:
        value >>= 1
        n += 1
    return n


cdef bint names_tag(const Span* s, bint ranges) noexcept:
    """Whether a range is so large that the whole tag goes instead (F60)."""
    cdef int step_lg2 = s.page_lg2 if s.leaf else s.granule_lg2
    cdef uint64_t most = <uint64_t>1 << step_lg2 + s.granule_lg2 - 3  # of as many as a table has
    cdef uint64_t size_1 = s.last - s.first  # the size less 1: it may be 2^64
    return size_1 >= (<uint64_t>1 << 52) - 1 or not ranges and size_1 >= most - 1


cdef int tlbi_range(Batch* b, const Tlbi* t, Command tagged, const Span* s,
                    bint ranges) except -1:
    """The commands that drop a range, by addresses one after another or by ranges (4.4.1)."""
    cdef Command c
    cdef uint64_t address, step, pages, number
    cdef int scale
    fill_in(&tagged, &LEAF, s.leaf)
    if not ranges:
        step = <uint64_t>1 << (s.page_lg2 if s.leaf else s.granule_lg2)
        address = s.first & -step
        while True:
            c = tagged
            address_in(&c, t, address)
            batch_add(b, &c)
            if s.last - address < step:
                return 0
            address += step
    address = s.first >> s.granule_lg2 << s.granule_lg2
    pages = (s.last - address >> s.granule_lg2) + 1
    if not s.leaf and pages & 31 == 1:
        pages += 1
    fill_in(&tagged, &TG, (s.granule_lg2 - 10) // 2)
    if s.leaf:
        fill_in(&tagged, &TTL, 4 - (s.page_lg2 - 3) // (s.granule_lg2 - 3))
    while pages:
        scale = min(bits_of(pages & -pages) - 1, SCALE_MOST)
        number = pages >> scale
        number = number & NUM_MOST - 1 if scale < SCALE_MOST else min(number, <uint64_t>NUM_MOST)
        c = tagged
        address_in(&c, t, address)
        fill_in(&c, &SCALE, scale)
        fill_in(&c, &NUM, number - 1)
        batch_add(b, &c)
        address += number << scale + s.granule_lg2
        pages -= number << scale
    return 0


cdef int address_in(Command* c, const Tlbi* t, uint64_t address) except -1:
    if address & ~t.address.mask:
        raise InvalidArgument("address", address, f"0 to {t.address.mask:#x}")
    fill_in(c, &t.address, address)
    return 0


cdef int atc_size(uint64_t first, uint64_t last) noexcept:
    """log2, in pages of 4 KiB, of the one power-of-two span that covers a range (F59)."""
    return min(bits_of(first >> 12 ^ last >> 12), ATC_ALL)


cdef uint64_t atc_base(uint64_t first, int size) noexcept:
    return 0 if size == ATC_ALL else first >> 12 + size << 12 + size


cdef int invalidation(Batch* b, int kind, uint32_t number, uint32_t ssid, const Span* s,
                      bint ranges, bint e2h) except -1:
    """The commands that one entry needs."""
    cdef Command c = ATC_INV
    cdef const Tlbi* t
    cdef int size = ATC_ALL
    if kind == KIND_ATS or kind == KIND_ATS_FULL:
        if kind == KIND_ATS:
            size = atc_size(s.first, s.last)
            if ssid:
                c = ATC_INV_PASID
                fill_in(&c, &SUBSTREAM_ID, ssid)
            fill_in(&c, &ATC_ADDRESS, atc_base(s.first, size))
        fill_in(&c, &STREAM_ID, number)
        fill_in(&c, &ATC_SIZE, size)
        return batch_add(b, &c)
    if kind == KIND_S2_VMID_S1_CLEAR:
        if names_tag(s, ranges):  # TLBI_S12_VMALL has done it
            return 0
        c = TLBI_NH_ALL
        fill_in(&c, &VMID, number)
        return batch_add(b, &c)
    t = &TLBI_S2 if kind == KIND_S2_VMID else &TLBI_EL2 if e2h else &TLBI_NH
    if names_tag(s, ranges):
        c = t.whole
        fill_in(&c, &t.tag, number)
        return batch_add(b, &c)
    c = t.some
    fill_in(&c, &t.tag, number)
    return tlbi_range(b, t, c, s, ranges)


# --- the command queue ---


cdef class CommandQueue:
    """The driver's end of a command queue: commands gather until one CMD_SYNC.

    A command that the SMMU refuses does not stop those behind it: a CMD_SYNC takes its place, and
    whoever waits for the batch gets a CommandError that says which one it was, and why.

    Parameters
    ----------
    smmu : Smmu
    base : int
        Address of the ring in the SMMU's memory, aligned to its size.
    size_lg2 : int
        log2 of the number of commands of 16 bytes.

    Attributes
    ----------
    memory : Memory
        Of the SMMU.
    prod : int
        What CMDQ_PROD is to be, or is.
    issued, syncs : int
        Commands so far, and how many of them were CMD_SYNC.
    log : list or None
        A list gets (name, fields) of every command.
    lock : RLock
        Held from a batch's first command to its CMD_SYNC.
    """

    cdef object _smmu        # what is told: of any class
    cdef Smmu _real          # the same, if it is a Smmu
    cdef readonly Memory memory
    cdef readonly uint64_t base
    cdef readonly int size_lg2
    cdef readonly uint32_t prod
    cdef readonly uint64_t issued
    cdef readonly uint64_t syncs
    cdef public list log
    cdef readonly object lock
    cdef object _acquire     # its methods
    cdef object _release
    cdef uint32_t _size
    cdef uint32_t _mask      # of an index and its wrap bit
    cdef uint32_t _free      # entries that the SMMU is known to have consumed
    cdef uint64_t _began     # `issued` where the batch began
    cdef list _refused       # commands of the batch
    cdef bint _ranges        # range invalidation

    def __cinit__(self, smmu, base, size_lg2):
        # A queue at `base` of 2^size_lg2 commands, which `smmu` consumes.
        if not 0 <= size_lg2 <= 19:
            raise InvalidArgument("size_lg2", size_lg2, "0 to 19")
        self.smmu = smmu
        self.memory = smmu.memory
        self.base = base
        self.size_lg2 = size_lg2
        self.lock = threading.RLock()
        self._acquire = self.lock.acquire
        self._release = self.lock.release
        self._size = <uint32_t>1 << self.size_lg2
        self._mask = 2 * self._size - 1
        self._free = self._size
        self._refused = []
        self._ranges = bool(smmu.features.ril)

    @property
    def smmu(self):
        """The Smmu, or what has its `read` and `write`."""
        return self._smmu

    @smmu.setter
    def smmu(self, value):
        self._smmu = value
        self._real = value if isinstance(value, Smmu) else None

    def __reduce__(self):
        made = type(self), (self._smmu, self.base, self.size_lg2)
        more = getattr(self, "__dict__", {})
        return *made, (self.prod, self._free, self.issued, self._began, self.syncs, self.log, more)

    def __setstate__(self, state):
        self.prod, self._free, self.issued, self._began, self.syncs, self.log, more = state
        for name, value in more.items():
            setattr(self, name, value)

    def start(self):
        """Tell the SMMU where the queue is; CR0.CMDQEN must be 0."""
        self._smmu.write("CMDQ_BASE", self.base | CMDQ_RA | self.size_lg2, 8)
        self._smmu.write("CMDQ_PROD", 0)
        self._smmu.write("CMDQ_CONS", 0)
        self.prod = 0
        self._free = self._size

    # --- what is put ---

    def issue(self, name, **fields):
        """Put a command into the queue, by its name and fields in `smmufast.layout`.

        Raises
        ------
        ValueError
            No such command or field, or a value that does not fit.
        """
        record = layout.command_record(name)
        word = layout.pack(record, **fields)
        cdef Command c = command_of(word)
        if self.log is not None:
            self.log.append((name, layout.unpack(record, word)))
        self._put_one(&c)

    def put(self, word0, word1):
        """Put a command of two dwords into the queue."""
        cdef Command c
        if not (0 <= word0 <= MASK and 0 <= word1 <= MASK):
            raise InvalidArgument("word0", word0, "dwords of 64 bits")
        c.words[0] = word0
        c.words[1] = word1
        self._put_one(&c)

    cdef int _put_one(self, const Command* c) except -1:
        cdef Batch b
        batch_open(&b)
        batch_add(&b, c)
        with self.lock:
            self._put(&b)
        return 0

    def submit(self, words=()):
        """Put commands, and let the SMMU consume what was issued, without CMD_SYNC.

        Errors are those of `sync`.
        """
        cdef Batch b
        batch_open(&b)
        try:
            for word in words:
                self._take(&b, word)
            self.push(&b)
        finally:
            batch_close(&b)

    def sync(self):
        """Issue CMD_SYNC and wait until everything before it is done.

        Raises
        ------
        CommandError
            The SMMU refused commands since the last CMD_SYNC; the others are done.
        InputOutput
            The SMMU does not consume commands.
        Exception
            Whatever a host's callback raises while commands are consumed.
        """
        self.run(())

    def run(self, words):
        """Put commands into the queue, then CMD_SYNC; wait and raise as `sync`."""
        cdef Batch b
        batch_open(&b)
        try:
            for word in words:
                self._take(&b, word)
            self.tell(&b)
        finally:
            batch_close(&b)

    def drop(self, kind, number, ssid=0):
        """Drop all that may be cached of something, then CMD_SYNC; as `run`.

        Parameters
        ----------
        kind, number, ssid : int
            As `Invalidations.insert` has them: a tag of TLBs, or the ATC of a stream.
        """
        cdef Batch b
        cdef Span s
        check_cached(kind, number, ssid)
        s.first, s.last, s.granule_lg2, s.page_lg2, s.leaf = 0, ALL, 12, 12, False
        batch_open(&b)
        invalidation(&b, kind, number, ssid, &s, self._ranges, self._e2h())
        if b.count:
            self.tell(&b)

    cdef int _take(self, Batch* b, word) except -1:
        cdef Command c = command_of(word)
        return batch_add(b, &c)

    cdef int tell(self, Batch* b) except -1:
        """As `run`; the batch is left as it was."""
        batch_add(b, &SYNC)
        try:
            self.push(b, 1)
        finally:
            b.count -= 1
        return 0

    cdef int push(self, const Batch* b, int syncs=0) except -1:
        """As `submit`; so many of the commands are CMD_SYNC."""
        self._acquire()
        try:
            self._put(b)
            self._note(b)
            self.syncs += syncs
            self._finish()
        finally:
            self._release()
        return 0

    cdef int _note(self, const Batch* b) except -1:
        """Tell the log."""
        cdef Py_ssize_t i
        if self.log is not None:
            for i in range(b.count):
                word = batch_word(b, i)
                try:
                    record = layout.command_record(word & 0xFF)
                except ValueError:
                    self.log.append((f"{word & 0xFF:#x}", {}))  # no such command
                else:
                    self.log.append((record.name, layout.unpack(record, word)))
        return 0

    # --- with the lock held ---

    cdef int _put(self, const Batch* b) except -1:
        """Commands into the queue, one write for what lies side by side."""
        cdef Py_ssize_t done = 0
        cdef uint32_t slot
        cdef Py_ssize_t n
        while done < b.count:
            if not self._free:
                self._ring()
            if not self._free:  # it does not get past a command
                self._close()
            slot = self.prod & self._mask >> 1
            n = min(b.count - done, <Py_ssize_t>self._free, <Py_ssize_t>(self._size - slot))
            store(self.memory, self.base + slot * sizeof(Command), &b.commands[done],
                  n * sizeof(Command))
            self.prod = self.prod + <uint32_t>n & self._mask
            self._free -= <uint32_t>n
            self.issued += n
            done += n
        return 0

    cdef int _finish(self) except -1:
        """See that all is consumed: the end of a batch."""
        try:
            self._ring()
        except BaseException:
            self._refused.clear()  # what was raised is what is told
            raise
        finally:
            self._began = self.issued
        return self._close()

    cdef int _close(self) except -1:
        """Raise what was refused."""
        refused = self._refused
        if refused:
            self._refused = []
            raise CommandError.of(refused)
        return 0

    cdef bint _e2h(self) except -1:
        """Whether TLB entries of stage 1 are those of EL2."""
        return (self._real.core.hw.cr2 if self._real else self._smmu.cr2) & E2H != 0

    cdef uint64_t _tell_prod(self) except? -1:
        """Write CMDQ_PROD, and return CMDQ_CONS."""
        if self._real is not None:  # the same as through its methods
            return self._real._put_commands(self.prod)
        self._smmu.write("CMDQ_PROD", self.prod)
        return self._smmu.read("CMDQ_CONS")

    cdef int _ring(self) except -1:
        """Write PROD, and see that the SMMU has consumed everything."""
        cdef uint64_t cons = self._tell_prod()
        if cons & self._mask != self.prod:
            cons = self._recover(cons)
        self._free = self._size - (self.prod - <uint32_t>cons & self._mask)
        return 0

    cdef uint64_t _recover(self, uint64_t cons) except? -1:
        """Get past commands that are refused, and remember them; return the last CMDQ_CONS.

        A CMD_SYNC takes the place of what is illegal, and of a CMD_SYNC that ends in an error; a
        fetch that is aborted is tried once more, as in Linux.
        """
        cdef uint64_t last = 0
        cdef uint64_t address
        cdef uint64_t[2] words
        cdef int64_t index
        while cons & self._mask != self.prod:
            if not (self._smmu.read("GERROR") ^ self._smmu.read("GERRORN")) & CMDQ_ERR:
                raise InputOutput(
                    "queue", self, text="the SMMU does not consume commands: CMDQEN?")
            if cons == last:
                break
            last = cons
            error = (cons & ERR_MASK) >> ERR
            address = self.base + (cons & self._mask >> 1) * sizeof(Command)
            load(self.memory, address, words, 2)
            index = self.issued - (self.prod - cons & self._mask) - self._began
            self._refused.append(Refused(
                None if index < 0 else index, <object>words[0] | <object>words[1] << 64, error,
                Why(self._real._command_why) if self._real and self._real._command_why else None))
            if error != CMDQ_CONS_ERR_ABT:
                words[0], words[1] = le64(SYNC.words[0]), le64(SYNC.words[1])
                store(self.memory, address, words, sizeof(Command))
            self._smmu.write("GERRORN", self._smmu.read("GERRORN") ^ CMDQ_ERR)
            cons = self._tell_prod()
        return cons


# --- the queues of records ---


def record_waits(smmu, str name):
    """Whether "EVENTQ" or "PRIQ" is not as software left it: it has a record, or overflowed.

    That is when PROD and CONS differ, in an index or in OVFLG and OVACKFLG (IHI 0070 7.4 and 8.1).
    """
    cdef const Ring* ring
    if isinstance(smmu, Smmu):  # the same as through its method
        ring = &(<Smmu>smmu).queues.events if name == "EVENTQ" else &(<Smmu>smmu).queues.pages
        return ring.prod != ring.cons or ring.ovflg != ring.ovackflg
    return smmu.read(f"{name}_PROD") != smmu.read(f"{name}_CONS")


# --- STEs and CDs ---

cdef struct Entry:
    uint64_t[8] words


cdef Entry entry_of(word):
    """An entry from one number."""
    cdef Entry e
    cdef int i
    for i in range(8):
        e.words[i] = word >> 64 * i & MASK
    return e


cdef object entry_word(const Entry* e):
    """An entry as one number."""
    cdef int i
    word = 0
    for i in range(8):
        word |= <object>e.words[i] << 64 * i
    return word


cdef tuple entry_dwords(const Entry* e):
    return (e.words[0], e.words[1], e.words[2], e.words[3], e.words[4], e.words[5], e.words[6],
            e.words[7])


cdef Entry mask_of(record, names):
    """The bits that some fields of a record take."""
    return entry_of(layout.mask(record, *names.split()))


cdef Entry STE_V = mask_of("STE", "V")
cdef Entry STE_CONFIG = mask_of("STE", "V Config")
cdef Entry STE_S1 = mask_of(
    "STE", "S1Fmt S1ContextPtr S1CDMax S1DSS S1CIR S1COR S1CSH S1STALLD STRW EATS MEV S2VMID")
cdef Entry STE_S2 = mask_of(
    "STE", "S2FWB EATS SHCFG MEV S2VMID S2T0SZ S2SL0 S2IR0 S2OR0 S2SH0 S2TG S2PS S2AA64 S2ENDI "
    "S2PTW S2S S2R S2TTB")
cdef Entry STE_SHCFG = mask_of("STE", "SHCFG")
cdef Entry STE_MEV = mask_of("STE", "MEV")
cdef Entry STE_MEV_EATS = mask_of("STE", "MEV")  # and the lower bit of EATS, below
cdef Entry STE_EATS = mask_of("STE", "EATS")
cdef Entry STE_EATS_S2S = mask_of("STE", "EATS S2S")  # without that bit
cdef Entry CD_V = mask_of("CD", "V")
cdef Entry CD_ALL = entry_of((1 << 512) - 1)
cdef Entry CD_NO_TTB0 = entry_of(
    (1 << 512) - 1 & ~layout.mask("CD", "T0SZ", "TG0", "IR0", "OR0", "SH0", "TTB0"))


cdef int split_eats() except -1:
    cdef int i
    cdef uint64_t low
    for i in range(8):
        low = STE_EATS.words[i] & -STE_EATS.words[i]
        STE_MEV_EATS.words[i] |= low
        STE_EATS_S2S.words[i] &= ~low
    return 0


split_eats()


cdef inline void join(Entry* e, const Entry* more) noexcept:
    cdef int i
    for i in range(8):
        e.words[i] |= more.words[i]


cdef inline bint any_of(const Entry* e, const Entry* mask) noexcept:
    """Whether any of these bits is set."""
    cdef uint64_t found = 0
    cdef int i
    for i in range(8):
        found |= e.words[i] & mask.words[i]
    return found != 0


cdef Entry used_of_ste(const Entry* ste) noexcept:
    """The bits of an STE that the SMMU reads."""
    cdef uint64_t config = ste_config(ste.words)
    cdef Entry used = STE_CONFIG
    if not ste_v(ste.words):
        return STE_V
    if config in (STE_CONFIG_STAGE_1, STE_CONFIG_NESTED):
        join(&used, &STE_S1)
        if ste_s1dss(ste.words) == STE_S1DSS_BYPASS:
            join(&used, &STE_SHCFG)
    if config in (STE_CONFIG_STAGE_2, STE_CONFIG_NESTED):
        join(&used, &STE_S2)
    if config == STE_CONFIG_BYPASS:
        join(&used, &STE_SHCFG)
    return used


cdef Entry safe_of_ste(const Entry* old, const Entry* new) noexcept:
    """The bits of an STE that may change at any time, though both values use them."""
    if any_of(old, &STE_EATS_S2S) or any_of(new, &STE_EATS_S2S):
        return STE_MEV
    return STE_MEV_EATS


cdef Entry used_of_cd(const Entry* cd) noexcept:
    """The bits of a CD that the SMMU reads."""
    if not cd_v(cd.words):
        return CD_V
    return CD_NO_TTB0 if cd_epd0(cd.words) else CD_ALL


def ste_used(ste):
    """The bits of an STE, as one number, that the SMMU reads."""
    cdef Entry e = entry_of(ste)
    e = used_of_ste(&e)
    return entry_word(&e)


def cd_used(cd):
    """The bits of a CD, as one number, that the SMMU reads."""
    cdef Entry e = entry_of(cd)
    e = used_of_cd(&e)
    return entry_word(&e)


class Update(NamedTuple):
    """How an entry was changed: CMD_SYNCs that it took, and whether it was valid throughout."""

    syncs: int
    hitless: bool


cdef list UPDATES = [[Update(syncs, hitless) for hitless in (False, True)] for syncs in range(4)]


cdef class EntryWriter:
    """Changes STEs and CDs so that the SMMU, which may read them at any time, sees no torn one.

    Parameters
    ----------
    queue : CommandQueue
    memory : Memory
    safe_bits : bool
        Use the bits that may change at any time.
    call : callable, optional
        Calls the observer, with it and its arguments; to let it raise at a better time.

    Attributes
    ----------
    observer : callable or None
        Called as ``observer(address, index, old_words)`` after each store of a dword.
    """

    cdef readonly CommandQueue queue
    cdef readonly Memory memory
    cdef readonly bint safe_bits
    cdef readonly object call
    cdef public object observer
    cdef bint _overridden    # the queue is of a class of somebody's, with methods of its own

    def __cinit__(self, CommandQueue queue not None, Memory memory not None, *, safe_bits=True,
                  call=None):
        self.queue = queue
        self.memory = memory
        self.safe_bits = safe_bits
        self.call = call
        self._overridden = type(queue) is not CommandQueue

    def __reduce__(self):
        return rebuilt, (type(self), self.queue, self.memory, self.safe_bits, self.call,
                         self.observer)

    def read(self, address):
        """The eight dwords of the entry at `address`."""
        cdef Entry e
        load(self.memory, address, e.words, 8)
        return entry_dwords(&e)

    def write_ste(self, address, words, sid):
        """Make the STE at `address`, of stream `sid`, eight dwords; CFGI_STE at each step.

        PREFETCH_CONFIG follows, without CMD_SYNC.
        """
        cdef Batch commands
        cdef Command c = CFGI_STE
        batch_open(&commands)
        place("CFGI_STE", "StreamID", &c, &STREAM_ID, sid)
        batch_add(&commands, &c)
        update = self._write(address, words, True, &commands)
        # Linux: it is likely to be used soon
        c = PREFETCH_CONFIG
        fill_in(&c, &STREAM_ID, sid)
        commands.count = 0
        batch_add(&commands, &c)
        if self._overridden:
            self.queue.submit([batch_word(&commands, 0)])
        else:
            self.queue.push(&commands)
        return update

    def write_cd(self, address, words, sids, ssid):
        """Make the CD at `address` eight dwords; CFGI_CD of each stream at each step."""
        cdef Batch commands
        cdef Command c
        cdef Command named = CFGI_CD
        place("CFGI_CD", "SubstreamID", &named, &SUBSTREAM_ID, ssid)
        batch_open(&commands)
        try:
            for sid in sids:
                c = named
                place("CFGI_CD", "StreamID", &c, &STREAM_ID, sid)
                batch_add(&commands, &c)
            return self._write(address, words, False, &commands)
        finally:
            batch_close(&commands)

    cdef object _write(self, uint64_t address, words, bint ste, Batch* commands):
        """Change an entry in few steps; after each that stores anything, the commands."""
        cdef Entry now, target, ahead, used, now_used, safe
        cdef unsigned int critical = 0  # dwords, as bits
        cdef int i, syncs = 0
        cdef bint hitless = True
        target = dwords_of(words)
        self.queue._acquire()
        try:
            load(self.memory, address, now.words, 8)
            if memcmp(&now, &target, sizeof(Entry)) == 0:
                return UPDATES[0][1]
            now_used = used_of_ste(&now) if ste else used_of_cd(&now)
            used = used_of_ste(&target) if ste else used_of_cd(&target)
            if ste and self.safe_bits:
                safe = safe_of_ste(&now, &target)
                for i in range(8):
                    now_used.words[i] &= ~(safe.words[i] & used.words[i])
            for i in range(8):
                # all that can change before anybody sees it
                ahead.words[i] = now.words[i] & now_used.words[i]
                ahead.words[i] |= target.words[i] & ~now_used.words[i]
                if (ahead.words[i] ^ target.words[i]) & used.words[i]:
                    critical |= 1 << i
            if critical == 0:
                self._step(address, 0xFF, &now, &target, commands, &syncs, &hitless)
            elif critical & critical - 1 == 0:
                self._step(address, 0xFF & ~critical, &now, &ahead, commands, &syncs, &hitless)
                self._step(address, critical, &now, &target, commands, &syncs, &hitless)
                self._step(address, 0xFF, &now, &target, commands, &syncs, &hitless)
            else:
                ahead.words[0] = 0
                self._step(address, 1, &now, &ahead, commands, &syncs, &hitless)
                self._step(address, 0xFE, &now, &target, commands, &syncs, &hitless)
                self._step(address, 1, &now, &target, commands, &syncs, &hitless)
            return UPDATES[syncs][hitless]
        finally:
            self.queue._release()

    cdef int _step(self, uint64_t address, unsigned int dwords, Entry* now, const Entry* wanted,
                   Batch* commands, int* syncs, bint* hitless) except -1:
        """Store some dwords in order, those that change; then tell the SMMU if any did."""
        cdef bint changed = False
        cdef Entry old
        cdef uint64_t data
        cdef int i
        for i in range(8):
            if not dwords >> i & 1 or now.words[i] == wanted.words[i]:
                continue
            old = now[0]
            now.words[i] = wanted.words[i]
            data = le64(wanted.words[i])
            store(self.memory, address + 8 * i, &data, 8)
            changed = True
            if self.observer is not None:
                self._look(address, i, entry_dwords(&old))
        if changed:
            if self._overridden:
                self.queue.run(batch_words(commands))
            else:
                self.queue.tell(commands)
            syncs[0] += 1
            hitless[0] = hitless[0] and now.words[0] != 0
        return 0

    cdef int _look(self, uint64_t address, int index, tuple old) except -1:
        if self.call is not None:
            self.call(self.observer, address, index, old)
        else:
            self.observer(address, index, old)
        return 0


def rebuilt(kind, queue, memory, safe_bits, call, observer):
    """An EntryWriter out of a pickle."""
    made = kind(queue, memory, safe_bits=safe_bits, call=call)
    made.observer = observer
    return made


cdef Entry dwords_of(words):
    """An entry from its eight dwords."""
    cdef Entry e
    cdef int i
    try:
        if len(words) == 8:
            for i in range(8):
                e.words[i] = words[i]
            return e
    except OverflowError:
        pass
    raise InvalidArgument("words", words, "eight dwords of 64 bits")


cdef int place(name, field, Command* c, const Place* p, value) except -1:
    """Put a value into a field, or say that it does not fit."""
    if not 0 <= value <= p.mask >> p.shift:
        layout.pack(name, **{field: value})
    fill_in(c, p, value)
    return 0


# --- what a range needs, in Python ---


def invalidate(parts, first, last, granule_lg2, page_lg2, leaf):
    """Tell queues what to invalidate, and wait.

    Parameters
    ----------
    parts : list of (CommandQueue, list of (int, int, int, int))
        Told one after another; of each entry, the kind, number and SubstreamID are from the second
        element on.
    first, last, granule_lg2, page_lg2, leaf
        As `Invalidations.invalidate` has them.
    """
    cdef Batch b
    cdef Span s = span_of(first, last, granule_lg2, page_lg2, leaf)
    cdef CommandQueue queue
    cdef bint e2h
    for queue, keys in parts:
        if queue is None:
            raise InvalidArgument("parts", parts, "pairs of a CommandQueue and a list")
        e2h = queue._e2h()
        batch_open(&b)
        try:
            for _, kind, number, ssid in keys:
                invalidation(&b, kind, number, ssid, &s, queue._ranges, e2h)
            if b.count and type(queue) is CommandQueue:
                queue.tell(&b)
            elif b.count:
                queue.run(batch_words(&b))
        finally:
            batch_close(&b)


def atc_span(first, last):
    """The one power-of-two span of an ATC_INV that covers a range: address, Size field (F59)."""
    cdef int size = atc_size(first, last)
    return atc_base(first, size), size


def tlb_ranges(first, last, granule_lg2, page_lg2, leaf, ranges):
    """The address fields of the TLBI commands that cover a range; None: the whole tag (F60)."""
    cdef Batch b
    cdef Span s = span_of(first, last, granule_lg2, page_lg2, leaf)
    cdef list made = []
    names = {"Address": "Address", "Leaf": "Leaf"}
    if ranges:
        names |= {"Scale": "SCALE", "Num": "NUM", "TG": "TG", "TTL": "TTL"}
    if names_tag(&s, ranges):
        return None
    batch_open(&b)
    try:
        tlbi_range(&b, &TLBI_NH, TLBI_NH.some, &s, ranges)
        for word in batch_words(&b):
            fields = layout.unpack("TLBI_NH_VA", word)
            one = {}
            for name, field in names.items():
                one[name] = fields[field]
            made.append(one)
        return made
    finally:
        batch_close(&b)


# --- what surrounds a change ---


@cython.auto_pickle(False)
cdef class SystemLock:
    """Held by each call that attaches, detaches, binds or frees.

    A thread may take it again while it has it, but not from an observer, which is called in the
    middle of a change: Busy.  What an observer raises is raised when the outermost call that holds
    the lock is done, so that no change stays half made.
    """

    cdef object _lock
    cdef object _acquire     # its methods
    cdef object _release
    cdef int _depth
    cdef int _closed
    cdef unsigned long _owner
    cdef list _raised

    def __cinit__(self):
        self._lock = threading.RLock()
        self._acquire = self._lock.acquire
        self._release = self._lock.release
        self._raised = []

    def __enter__(self):
        self._acquire()
        if self._closed:
            self._release()
            text = "a callback may not change the system while it is being changed"
            raise Busy("system", self, text=text)
        self._depth += 1
        self._owner = PyThread_get_thread_ident()
        return self

    def __exit__(self, kind, error, traceback):
        cdef list raised = None
        self._depth -= 1
        if not self._depth:
            self._owner = 0
            if self._raised:
                raised, self._raised = self._raised, []
        self._release()
        if raised is not None and kind is None:
            raise raised[0]

    @property
    def between_changes(self):
        """Held by whoever must not meet a change in its middle: another thread's is waited for."""
        return self._lock

    @property
    def closed(self):
        """Held while a callback is called that may change nothing."""
        return Closed(self)

    def call(self, callback, *arguments):
        """Call an observer; without the lock, it is only called."""
        if self._owner != <unsigned long>PyThread_get_thread_ident():
            callback(*arguments)
            return
        with Closed(self):
            self.defer(callback, *arguments)

    def defer(self, callback, *arguments):
        """Make a call whose exception is raised when the lock is let go of."""
        try:
            callback(*arguments)
        except BaseException as error:
            self._raised.append(error)

    def insist(self, step, *arguments):
        """Take a step without which a change stays half made; one that fails is taken once more.

        As with `defer`, what it raises is raised when the lock is let go of.
        """
        try:
            step(*arguments)
        except BaseException as error:
            self._raised.append(error)
            try:
                step(*arguments)
            except BaseException:  # the first is raised
                return

    def __repr__(self):
        """Whether it is held."""
        return f"<SystemLock: {'held' if self._depth else 'free'}>"


@cython.auto_pickle(False)
cdef class Closed:
    """What `SystemLock.closed` gives."""

    cdef SystemLock _lock

    def __cinit__(self, SystemLock lock not None):
        self._lock = lock

    def __enter__(self):
        self._lock._closed += 1

    def __exit__(self, kind, error, traceback):
        self._lock._closed -= 1


@cython.auto_pickle(False)
cdef class Undo:
    """What takes back the preparations of a call, should it fail: a context manager.

    Where that fails too, what was prepared before stays, also that of an Undo further out:
    something may still lead there.
    """

    cdef list _calls

    def __cinit__(self):
        self._calls = []

    def add(self, call, *arguments):
        """Remember a call; the last one is made first."""
        self._calls.append((call, arguments))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        # Undo what was done, the last first; a step that cannot be undone leaves the rest alone.
        if error is None:
            return
        for call, arguments in reversed(self._calls):
            if "stuck" in error.__dict__:
                break
            try:
                call(*arguments)
            except Exception:  # what failed first is what is raised
                error.__dict__["stuck"] = True
            except BaseException:  # an interrupt, which is raised once
                make_again(error, call, arguments)


cdef int make_again(error, call, tuple arguments) except -1:
    """Make a call of an Undo that was interrupted."""
    try:
        call(*arguments)
    except BaseException:
        error.__dict__["stuck"] = True
    return 0
