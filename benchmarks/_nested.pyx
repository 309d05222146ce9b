"""The nested walk in plain C that stage 2 is measured against."""

cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t


cdef extern from "baseline_nested.h" nogil:
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

    struct nested:
        context context

    enum:
        ACCESS_WRITE
        ACCESS_PRIVILEGED
        ACCESS_INSTRUCTION
        CONTEXT_UNSUPPORTED

    void nested_configure(const memory*, const registers*, uint32_t, nested*) noexcept
    int64_t nested_walk(const memory*, const nested*, const uint64_t*, size_t, unsigned,
                        uint64_t*, uint8_t*, uint8_t*) noexcept
    unsigned nested_translate(const memory*, const registers*, uint32_t, uint64_t, unsigned,
                              uint64_t*, uint8_t*) noexcept


@cython.final
@cython.auto_pickle(False)
cdef class Walker:
    """The plain C walk of streams with stage 2, over one region of memory.

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

    cdef nested decoded(self, uint32_t sid):
        cdef nested found
        nested_configure(&self.memory, &self.registers, sid, &found)
        if found.context.kind == CONTEXT_UNSUPPORTED:
            raise ValueError("the baseline does not know this kind of stream")
        return found

    def batch(self, uint32_t sid, const uint64_t[::1] iova not None, uint64_t[::1] pa not None,
              uint8_t[::1] action not None, uint8_t[::1] event not None, *,
              bint write=False, bint priv=False, bint instr=False, bint each=False):
        """Translate every address; decode the STE and the CD once, or with `each` each time."""
        cdef nested found = self.decoded(sid)
        cdef size_t n = iova.shape[0]
        cdef size_t i
        cdef unsigned access = (
            (ACCESS_WRITE if write else 0) | (ACCESS_PRIVILEGED if priv else 0)
            | (ACCESS_INSTRUCTION if instr else 0))
        if <size_t>pa.shape[0] < n or <size_t>action.shape[0] < n or <size_t>event.shape[0] < n:
            raise ValueError("an out array is shorter than iova")
        if n == 0:
            return
        if not each:
            nested_walk(&self.memory, &found, &iova[0], n, access, &pa[0], &action[0], &event[0])
            return
        for i in range(n):
            action[i] = nested_translate(
                &self.memory, &self.registers, sid, iova[i], access, &pa[i], &event[i])
