"""What the library is measured against: a walk in plain C, and methods that do nothing."""

cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t


cdef extern from "baseline_walk.h" nogil:
    struct memory:
        const uint8_t* bytes
        uint64_t base
        uint64_t size

    struct registers:
        uint64_t strtab_base
        uint32_t strtab_base_cfg
        uint32_t cr0
        uint32_t cr2

    struct context:
        int kind

    enum:
        ACCESS_WRITE
        ACCESS_PRIVILEGED
        ACCESS_INSTRUCTION
        CONTEXT_UNSUPPORTED
        NO_SSID

    void baseline_configure(const memory*, const registers*, uint32_t, uint32_t,
                            context*) noexcept
    int64_t baseline_walk(const memory*, const context*, const uint64_t*, size_t, unsigned,
                          uint64_t*, uint8_t*, uint8_t*) noexcept
    unsigned baseline_translate(const memory*, const registers*, uint32_t, uint32_t, uint64_t,
                                unsigned, uint64_t*, uint8_t*) noexcept
    int64_t baseline_requests(const memory*, const registers*, const uint32_t*, const uint32_t*,
                              const uint64_t*, size_t, unsigned,
                              uint64_t*, uint8_t*, uint8_t*) noexcept


cdef inline unsigned access_bits(bint write, bint priv, bint instr) noexcept:
    return ((ACCESS_WRITE if write else 0) | (ACCESS_PRIVILEGED if priv else 0)
            | (ACCESS_INSTRUCTION if instr else 0))


cdef check_out(size_t n, uint64_t[::1] pa, uint8_t[::1] action, uint8_t[::1] event):
    if <size_t>pa.shape[0] < n or <size_t>action.shape[0] < n or <size_t>event.shape[0] < n:
        raise ValueError("an out array is shorter than iova")


@cython.final
@cython.auto_pickle(False)
cdef class Walker:
    """The plain C walk over one region of memory.

    Parameters
    ----------
    buffer
        Contiguous bytes, at least 64, which must stay alive and unmoved.
    base
        The physical address of the first byte.
    strtab_base, strtab_base_cfg, cr0, cr2
        Register values, as Smmu takes them.
    """

    cdef memory memory
    cdef registers registers
    cdef const uint8_t[::1] buffer

    def __init__(self, const uint8_t[::1] buffer not None, uint64_t base, *,
                 uint64_t strtab_base, uint32_t strtab_base_cfg, uint32_t cr0=0b101,
                 uint32_t cr2=0b10):
        if buffer.shape[0] < 64:
            raise ValueError("the region is shorter than 64 bytes")
        self.buffer = buffer
        self.memory.bytes = &buffer[0]
        self.memory.base = base
        self.memory.size = buffer.shape[0]
        self.registers.strtab_base = strtab_base
        self.registers.strtab_base_cfg = strtab_base_cfg
        self.registers.cr0 = cr0
        self.registers.cr2 = cr2

    def batch(self, uint32_t sid, const uint64_t[::1] iova not None, uint64_t[::1] pa not None,
              uint8_t[::1] action not None, uint8_t[::1] event not None, *, ssid=None,
              bint write=False, bint priv=False, bint instr=False):
        """Decode the STE and the CD once, walk every address; return how many succeeded."""
        cdef context decoded
        cdef size_t n = iova.shape[0]
        cdef uint32_t substream = NO_SSID if ssid is None else ssid
        cdef unsigned access = access_bits(write, priv, instr)
        check_out(n, pa, action, event)
        if n == 0:
            return 0
        baseline_configure(&self.memory, &self.registers, sid, substream, &decoded)
        if decoded.kind == CONTEXT_UNSUPPORTED:
            raise ValueError("the baseline reads little-endian descriptors only")
        return baseline_walk(&self.memory, &decoded, &iova[0], n, access, &pa[0], &action[0],
                             &event[0])

    def requests(self, const uint32_t[::1] sid not None, const uint32_t[::1] ssid,
                 const uint64_t[::1] iova not None, uint64_t[::1] pa not None,
                 uint8_t[::1] action not None, uint8_t[::1] event not None, *,
                 bint write=False):
        """Decode whenever the StreamID or SubstreamID changes; ssid may be None."""
        cdef size_t n = iova.shape[0]
        cdef const uint32_t* substream = NULL
        check_out(n, pa, action, event)
        if <size_t>sid.shape[0] != n or (ssid is not None and <size_t>ssid.shape[0] != n):
            raise ValueError("sid, ssid and iova differ in length")
        if n == 0:
            return 0
        if ssid is not None:
            substream = &ssid[0]
        return baseline_requests(&self.memory, &self.registers, &sid[0], substream, &iova[0], n,
                                 access_bits(write, False, False), &pa[0], &action[0], &event[0])

    def one_by_one(self, uint32_t sid, const uint64_t[::1] iova not None,
                   uint64_t[::1] pa not None, uint8_t[::1] action not None,
                   uint8_t[::1] event not None, *, ssid=None, bint write=False):
        """Translate every address from the registers on: STE, CD and walk each time."""
        cdef size_t n = iova.shape[0]
        cdef size_t i
        cdef uint32_t substream = NO_SSID if ssid is None else ssid
        cdef unsigned access = access_bits(write, False, False)
        check_out(n, pa, action, event)
        for i in range(n):
            action[i] = baseline_translate(&self.memory, &self.registers, sid, substream, iova[i],
                                           access, &pa[i], &event[i])


@cython.final
@cython.freelist(64)
@cython.auto_pickle(False)
cdef class Row:
    """The cheapest object that could carry a result: C fields only, from a free list."""

    cdef uint64_t number
    cdef uint64_t address
    cdef int kind


@cython.final
@cython.auto_pickle(False)
cdef class Empty:
    """Methods that take three integers and do nothing: what a Python call costs by itself."""

    cdef uint64_t value

    def __cinit__(self):
        self.value = 1 << 19

    def three(self, uint32_t a, uint64_t b, int c):
        """Return a new Row."""
        cdef Row row = Row.__new__(Row)
        row.number = a
        row.address = b
        row.kind = c
        return row

    def three_int(self, uint32_t a, uint64_t b, int c):
        """Return b, as a new int."""
        return b

    def three_none(self, uint32_t a, uint64_t b, int c):
        """Return None."""
        return None

    def draw(self):
        """Take nothing, return an integer that is not one of those Python keeps ready."""
        return self.value

    def drop(self, value, /):
        """Take one object, return None."""
