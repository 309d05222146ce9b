"""Arguments of Caches, and entries as Python has them."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int8_t, uint8_t, uint64_t
from libc.string cimport memcpy, memset

from smmufast._facts.bits cimport le64, low_mask
from smmufast._engine.cache cimport PLRU_WAYS_MAX, POLICY_PLRU
from smmufast._facts.layout cimport WORLD_NS_EL1
from smmufast._engine.memory cimport to_address, to_flag, to_integer
from smmufast._rules.scope cimport KIND_COMBINED, KIND_S1

from smmufast._arguments import either, in_words, must_be
from smmufast.faults import Perm
from smmufast.layout import Opcode, StreamWorld


cdef int number_of(str what, object value, tuple names) except -1:
    if isinstance(value, str) and value in names and value:
        return names.index(value)
    raise ValueError(must_be(what, either(names), value))


cdef int world_of(object world) except -1:
    try:
        return StreamWorld[world] if isinstance(world, str) else StreamWorld(world)
    except (KeyError, ValueError):
        raise ValueError(must_be("world", either(StreamWorld.__members__), world)) from None


cdef uint64_t field(str name, object value, uint64_t last) except? -1:
    return to_address(name, value, last)


cdef int8_t level_of(str name, object value) except? 99:
    number = to_integer(name, value)
    if not -1 <= number <= 3:
        raise ValueError(must_be(name, "-1 to 3", number))
    return number


cdef int check_kind(int kind, int world) except -1:
    if kind != KIND_S1 and world != WORLD_NS_EL1:
        raise ValueError(must_be("kind", "'stage 1' outside of the world NS_EL1", KINDS[kind]))
    return 0


cdef int check_start(uint64_t start, unsigned int lg2) except -1:
    if start & low_mask(lg2):
        raise ValueError(must_be(
            "start", f"a multiple of {<uint64_t>1 << lg2:#x} (lg2 {lg2})", start))
    return 0


cdef unsigned int lg2_of(object value) except? 99:
    cdef uint64_t lg2 = field("lg2", value, LG2_MAX)
    if lg2 < LG2_MIN:
        raise ValueError(must_be("lg2", f"{LG2_MIN} to {LG2_MAX}", lg2))
    return lg2


cdef unsigned int page_lg2_of(str name, object value) except? 99:
    """log2 of a stage's page, 0 without the stage."""
    cdef uint64_t lg2 = field(name, value, LG2_MAX)
    if 0 < lg2 < LG2_MIN:
        raise ValueError(must_be(name, f"0 or {LG2_MIN} to {LG2_MAX}", lg2))
    return lg2


def _geometry_of(name, given):
    """A Geometry of checked numbers, or None."""
    if given is None:
        return None
    try:
        given = Geometry(*given)
    except TypeError:
        raise TypeError(must_be(
            name, "a Geometry (sets, ways, policy, seed) or None", given)) from None
    cdef uint64_t sets = field(f"{name}.sets", given.sets, SLOTS_MAX)
    cdef uint64_t ways = field(f"{name}.ways", given.ways, SLOTS_MAX)
    cdef uint64_t seed = field(f"{name}.seed", given.seed, ~<uint64_t>0)
    cdef int policy = number_of(f"{name}.policy", given.policy, POLICIES)
    if sets == 0 or sets & (sets - 1):
        raise ValueError(must_be(f"{name}.sets", "a power of two", sets))
    if ways == 0 or sets * ways > SLOTS_MAX:
        raise ValueError(must_be(
            f"{name}.ways", f"1 to {SLOTS_MAX // sets} with {sets} sets", ways))
    if policy == POLICY_PLRU and (ways & (ways - 1) or ways > PLRU_WAYS_MAX):
        raise ValueError(must_be(
            f"{name}.ways", f"a power of two up to {PLRU_WAYS_MAX} with the policy 'plru'", ways))
    return Geometry(sets, ways, POLICIES[policy], seed)


cdef int read_extra(object given, uint8_t* extra, Py_ssize_t n) except -1:
    if type(given) is not bytes or len(given) != n:
        raise ValueError(must_be("extra", f"{n} bytes", given))
    memcpy(extra, PyBytes_AS_STRING(given), n)
    return 0


cdef int read_entry(object given, Entry* e) except -1:
    """A TLB entry from a TlbEntry, checked."""
    if not isinstance(given, TlbEntry):
        raise TypeError(must_be("entry", "a TlbEntry", type(given)))
    memset(e, 0, sizeof(Entry))
    e.kind = number_of("kind", given.kind, KINDS)
    e.world = world_of(given.world)
    check_kind(e.kind, e.world)
    e.lg2 = lg2_of(given.lg2)
    e.page = field("start", given.start, ~<uint64_t>0)
    check_start(e.page, e.lg2)
    e.page >>= e.lg2
    e.address = field("output", given.output, ~<uint64_t>0)
    e.ipa = field("ipa", given.ipa, ~<uint64_t>0)
    e.sid = field("sid", given.sid, 0xFFFFFFFF)
    e.ssid = field("ssid", given.ssid, 0xFFFFFFFF)
    e.asid = field("asid", given.asid, 0xFFFF)
    e.vmid = field("vmid", given.vmid, 0xFFFF)
    e.is_global = to_flag("is_global", given.is_global)
    e.level = level_of("level", given.level)
    e.perm1 = field("perm1", int(given.perm1), 0x3F)
    e.perm2 = field("perm2", int(given.perm2), 0x3F)
    e.attr = field("attr", given.attr, 0xFF)
    e.sh = field("sh", given.sh, 3)
    e.flags = (
        (ENTRY_CLEAN1 if to_flag("clean1", given.clean1) else 0)
        | (ENTRY_CLEAN2 if to_flag("clean2", given.clean2) else 0)
        | (ENTRY_CONTIGUOUS if to_flag("contiguous", given.contiguous) else 0)
    )
    e.lg2_s1 = page_lg2_of("lg2_s1", given.lg2_s1)
    e.lg2_s2 = page_lg2_of("lg2_s2", given.lg2_s2)
    e.level_s1 = level_of("level_s1", given.level_s1)
    e.level_s2 = level_of("level_s2", given.level_s2)
    e.granule_s1 = field("granule_s1", given.granule_s1, 16)
    e.granule_s2 = field("granule_s2", given.granule_s2, 16)
    e.aset = to_flag("aset", given.aset)
    read_extra(given.extra, e.extra, sizeof(e.extra))
    return 0


cdef object entry_shown(const Entry* e):
    return TlbEntry(
        start=e.page << e.lg2, output=e.address, lg2=e.lg2, kind=KINDS[e.kind],
        world=StreamWorld(e.world), vmid=e.vmid, asid=e.asid, is_global=e.is_global != 0,
        ipa=e.ipa, sid=e.sid, ssid=e.ssid, level=e.level, perm1=Perm(e.perm1),
        perm2=Perm(e.perm2), attr=e.attr, sh=e.sh, clean1=e.flags & ENTRY_CLEAN1 != 0,
        clean2=e.flags & ENTRY_CLEAN2 != 0, contiguous=e.flags & ENTRY_CONTIGUOUS != 0,
        lg2_s1=e.lg2_s1, lg2_s2=e.lg2_s2, level_s1=e.level_s1, level_s2=e.level_s2,
        granule_s1=e.granule_s1, granule_s2=e.granule_s2, aset=e.aset,
        extra=(<const uint8_t*>e.extra)[:sizeof(e.extra)])


cdef bint translation_possible(const Entry* e) noexcept nogil:
    """Such an entry a walk may leave in the TLB."""
    return (KIND_S1 <= e.kind <= KIND_COMBINED and e.world < 3 and LG2_MIN <= e.lg2 <= LG2_MAX
            and (e.lg2_s1 == 0 or LG2_MIN <= e.lg2_s1 <= LG2_MAX)
            and (e.lg2_s2 == 0 or LG2_MIN <= e.lg2_s2 <= LG2_MAX)
            and -1 <= e.level <= 3 and -1 <= e.level_s1 <= 3 and -1 <= e.level_s2 <= 3
            and e.perm1 < 64 and e.perm2 < 64 and e.sh < 4
            and e.aset < 2 and not e.page >> (64 - e.lg2))


cdef uint64_t table_lg2(unsigned int granule, int level) noexcept nogil:
    """log2 of what a table of a level translates, 0 for no such table."""
    if granule not in (12, 14, 16) or not 0 <= level <= 3:
        return 0
    return granule + (4 - level) * (granule - 3)


# Where a walk goes on from: a table of another reach would let it index beyond levels or tables.
cdef bint table_possible(const Table* e) noexcept nogil:
    """Such a table a walk may leave in a walk cache."""
    return (KIND_S1 <= e.kind <= KIND_COMBINED and e.world < 3
            and e.lg2 == table_lg2(e.granule, e.level) and LG2_MIN <= e.lg2 <= LG2_MAX
            and not (e.table | e.output) & low_mask(e.granule)
            and not e.prefix >> (64 - e.lg2))


cdef int read_walk_entry(object given, Table* e) except -1:
    """Take a WalkEntry as a Table, every field checked."""
    if not isinstance(given, WalkEntry):
        raise TypeError(must_be("entry", "a WalkEntry", type(given)))
    memset(e, 0, sizeof(Table))
    e.kind = number_of("kind", given.kind, KINDS)
    e.world = world_of(given.world)
    check_kind(e.kind, e.world)
    e.lg2 = lg2_of(given.lg2)
    e.prefix = field("start", given.start, ~<uint64_t>0)
    check_start(e.prefix, e.lg2)
    e.prefix >>= e.lg2
    e.table = field("table", given.table, ~<uint64_t>0)
    e.output = field("output", given.output, ~<uint64_t>0)
    e.bits = field("bits", given.bits, ~<uint64_t>0)
    e.sid = field("sid", given.sid, 0xFFFFFFFF)
    e.ssid = field("ssid", given.ssid, 0xFFFFFFFF)
    e.asid = field("asid", given.asid, 0xFFFF)
    e.vmid = field("vmid", given.vmid, 0xFFFF)
    e.level = level_of("level", given.level)
    e.granule = field("granule", given.granule, 16)
    read_extra(given.extra, e.extra, sizeof(e.extra))
    if e.lg2 != table_lg2(e.granule, e.level):
        raise ValueError(must_be(
            "lg2", f"what a table of level {e.level} translates with granule {e.granule}, "
            f"{table_lg2(e.granule, e.level) or 'of which there is none'}", e.lg2))
    if not table_possible(e):
        raise ValueError(in_words(
            "table, output", f"multiples of 2**{e.granule} (granule)",
            f"{e.table:#x}, {e.output:#x}"))
    return 0


cdef object walk_entry_shown(const Table* e):
    return WalkEntry(
        start=e.prefix << e.lg2, table=e.table, lg2=e.lg2, kind=KINDS[e.kind],
        world=StreamWorld(e.world), vmid=e.vmid, asid=e.asid, output=e.output, bits=e.bits,
        sid=e.sid, ssid=e.ssid, level=e.level, granule=e.granule,
        extra=(<const uint8_t*>e.extra)[:sizeof(e.extra)])


cdef int read_record(str name, object given, uint64_t* words) except -1:
    """The 64 bytes of an STE or CD, as dwords in host byte order."""
    data = bytes(given) if isinstance(given, (bytes, bytearray, memoryview)) else None
    if data is None or len(data) != 64:
        raise ValueError(must_be(
            name, "64 bytes", type(given) if data is None else len(data)))
    for i in range(8):
        words[i] = int.from_bytes(data[8 * i:8 * i + 8], "little")
    return 0


cdef int opcode_of(object op) except -1:
    try:
        return Opcode[op.upper()] if isinstance(op, str) else Opcode(op)
    except (KeyError, ValueError):
        raise ValueError(must_be("op", "an Opcode or its name", op)) from None


cdef bytes record_shown(const uint64_t* words):
    cdef uint64_t[8] little
    cdef int i
    for i in range(8):
        little[i] = le64(words[i])
    return PyBytes_FromStringAndSize(<char*>little, 64)
