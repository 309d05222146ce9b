"""The register map, from layout.REGISTERS (IHI 0070 6.1, 6.2)."""

from libc.stdint cimport uint32_t, uint64_t

from smmufast._engine.core cimport Queues, Ring

from operator import attrgetter

from smmufast import layout


cdef dict OFFSETS = {}  # of each 32-bit word: the register, and how far up in it the word is
cdef dict WHOLE = {}    # bits that are fields
cdef dict NAMED = {}    # name and width

for _record in layout.REGISTERS.values():
    NAMED[_record.name] = _record.name, 8 * _record.bytes
    WHOLE[_record.name] = sum(map(attrgetter("mask"), _record.fields))
    for _word in range(0, _record.bytes, 4):
        OFFSETS[_record.offset + _word] = (_record.name, 8 * _word)
        if _record.offset >= 0x10000:
            OFFSETS[_record.offset - 0x10000 + _word] = (_record.name, 8 * _word)
for _word in range(4):
    OFFSETS[0xFF0 + 4 * _word] = (f"CIDR{_word}", 0)
    WHOLE[f"CIDR{_word}"] = 0xFF

cdef frozenset READ_ONLY = frozenset((
    "IDR0", "IDR1", "IDR2", "IDR3", "IDR5", "IDR6", "IIDR", "AIDR", "CR0ACK", "STATUSR",
    "IRQ_CTRLACK", "GERROR", "CIDR0", "CIDR1", "CIDR2", "CIDR3"))
cdef frozenset WIDE = frozenset(
    record.name for record in layout.REGISTERS.values() if record.bytes == 8)
cdef dict PRESET = {
    "STRTAB_BASE": "tables_preset", "STRTAB_BASE_CFG": "tables_preset",
    "CMDQ_BASE": "queues_preset", "EVENTQ_BASE": "queues_preset", "PRIQ_BASE": "queues_preset",
}


# Writes are ignored while one of these bits is set: register, the register and bits of the guard.
cdef dict GUARDS = {
    "CR2": ("CR0", layout.mask("CR0", "SMMUEN")),
    "STRTAB_BASE": ("CR0", layout.mask("CR0", "SMMUEN")),
    "STRTAB_BASE_CFG": ("CR0", layout.mask("CR0", "SMMUEN")),
    "CMDQ_BASE": ("CR0", layout.mask("CR0", "CMDQEN")),
    "CMDQ_CONS": ("CR0", layout.mask("CR0", "CMDQEN")),
    "EVENTQ_BASE": ("CR0", layout.mask("CR0", "EVENTQEN")),
    "EVENTQ_PROD": ("CR0", layout.mask("CR0", "EVENTQEN")),
    "PRIQ_BASE": ("CR0", layout.mask("CR0", "PRIQEN")),
    "PRIQ_PROD": ("CR0", layout.mask("CR0", "PRIQEN")),
}
for _queue in ("GERROR", "EVENTQ", "PRIQ"):
    for _word in range(3):
        GUARDS[f"{_queue}_IRQ_CFG{_word}"] = (
            "IRQ_CTRL", layout.mask("IRQ_CTRL", f"{_queue}_IRQEN"))
# RES0 bits that drivers set whatever the implementation has: no mistake.
cdef dict HARMLESS = {"CR2": layout.mask("CR2", "PTM")}
cdef uint64_t CR1_TABLES = layout.mask("CR1", "TABLE_IC", "TABLE_OC", "TABLE_SH")
cdef uint64_t QUEUES_ENABLED = layout.mask("CR0", "CMDQEN", "EVENTQEN", "PRIQEN")
cdef uint64_t GBPA_UPDATE = layout.mask("GBPA", "Update")
cdef uint64_t GBPA_RESET = 0x1000  # SHCFG: incoming


cdef Ring* ring_in(Queues* q, str name) noexcept:
    """The queue that a register belongs to."""
    if name.startswith("CMDQ"):
        return &q.commands
    if name.startswith("EVENTQ"):
        return &q.events
    return &q.pages


cdef inline Ring* ring_of(Registers self, str name) noexcept:
    return ring_in(&self.queues, name)
