"""Random systems: memory full of tables, the features and registers to read them with, requests.

random_system and random_nested_system build tables that mostly make sense and damage some of them;
random_bytes_system fills memory with noise.  All depend on their random.Random alone, so a seed
names a system.

The tables follow the same sections as ptwriter.py, through which they are written.
"""

import random
from types import SimpleNamespace
from typing import NamedTuple

from ptwriter import (
    TG0_CODES,
    TG1_CODES,
    ContextTable,
    Memory,
    PageTables,
    Stage2Tables,
    StreamTable,
    encode_cd,
    encode_l1std,
    encode_ste,
    leaf_descriptor,
    table_descriptor,
)

GRANULES = {12: "gran4k", 14: "gran16k", 16: "gran64k"}
ALL_ONES = (1 << 64) - 1

# Memory types that Linux uses, and one of each kind besides.
_MAIR = (0x44, 0xFF, 0x04, 0xF4, 0x00, 0x0C, 0xBB, 0x4F, 0x37, 0x7F, 0xF0, 0x05, 0x40, 0xA8)


class Request(NamedTuple):
    """One transaction to translate."""

    sid: int
    ssid: int | None
    iova: int
    write: bool
    priv: bool
    instr: bool


class System:
    """Memory, features and registers, and an endless supply of requests.

    memory: ptwriter.Memory.  read: its read method.  features: feature codes as attributes.
    regs: strtab_base, strtab_base_cfg, cr0, cr2, gbpa.
    """

    def __init__(self, memory, features, regs, draw):
        self.memory = memory
        self.read = memory.read
        self.features = features
        self.regs = regs
        self._draw = draw

    def regions(self):
        """(base, bytearray) of each run of memory, not copied."""
        return self.memory.regions()

    def with_memory(self, memory):
        """The same system over other memory."""
        return System(memory, self.features, self.regs, self._draw)

    def requests(self, count):
        """The next count requests."""
        return [self._draw() for _ in range(count)]


# ------------------------------------------------------------------------------------------------
# Features and room


def all_features():
    """Everything that stage 1 offers."""
    return SimpleNamespace(
        s2p=0, s1p=1, ttf=2, cohacc=1, btm=0, httu=0, dormhint=0, hyp=1, ats=0, ns1ats=0,
        asid16=1, msi=0, sev=0, atos=0, pri=0, vmw=0, vmid16=1, cd2l=1, vatos=0, ttendian=0,
        atsrecerr=0, stall_model=1, term_model=0, st_level=1, rme_impl=0,
        sidsize=32, ssidsize=20, priqs=0, eventqs=19, cmdqs=19, attr_perms_ovr=1,
        attr_types_ovr=1, rel=0, queues_preset=0, tables_preset=0, ecmdq=0,
        had=1, pbha=0, xnx=0, pps=0, mpam=0, fwb=0, stt=1, ril=1, bbml=2, e0pd=1, ptwnnc=0,
        dpt=0, pasidtt=0, epan=1, s1pi=0, s2pi=0, s2po=0, the=0, mteperm=0, aie=0,
        oas=6, gran4k=1, gran16k=1, gran64k=1, ds=1, d128=0, vax=1, stall_max=0,
        arch_minor=3,
    )  # fmt: skip


_SWITCHES = (
    "hyp", "asid16", "vmid16", "cd2l", "term_model", "st_level", "attr_perms_ovr",
    "attr_types_ovr", "had", "stt", "e0pd", "epan", "ds", "vax", "cohacc",
    "gran4k", "gran16k", "gran64k",
)  # fmt: skip


def add_stage2(rng, features):
    """Give features of stage 1 a stage 2, and what comes with it."""
    features.httu = rng.choices((0, 1, 2), (35, 15, 50))[0]
    features.stall_model = rng.choices((1, 0, 2), (45, 40, 15))[0]
    features.stall_max = 0 if features.stall_model == 1 else 0xFFFF
    features.xnx = rng.getrandbits(1)
    features.fwb = rng.getrandbits(1)
    features.ptwnnc = rng.getrandbits(1)
    features.ats = int(rng.random() < 0.25)
    features.ns1ats = int(rng.random() < 0.3)
    features.s1p = int(rng.random() < 0.997)
    features.s2p = int(rng.random() < 0.997)
    if features.oas < 2 and rng.random() < 0.8:
        features.oas = rng.choice((3, 4, 5, 6))
    return features


def random_features(rng):
    """Everything, or a part of it."""
    features = all_features()
    if rng.random() < 0.35:
        return features
    for name in _SWITCHES:
        if rng.random() < 0.2:
            setattr(features, name, 1 - getattr(features, name))
    if not (features.gran4k or features.gran16k or features.gran64k):
        features.gran4k = 1
    if not (features.gran4k or features.gran16k):
        features.ds = 0
    if features.ds:
        features.vax = 1
    if rng.random() < 0.01:
        features.s1p = 0
    if rng.random() < 0.5:
        features.oas = rng.randrange(8)
    if rng.random() < 0.3:
        features.ttendian = rng.choice((2, 3))
    if rng.random() < 0.5:
        features.arch_minor = rng.randrange(5)
    if rng.random() < 0.3:
        features.sidsize = rng.choice((1, 4, 6, 7, 8, 9, 16, 24, rng.randrange(33)))
    if features.st_level == 0:
        features.sidsize = min(features.sidsize, 6)
    if rng.random() < 0.4:
        features.ssidsize = rng.choice((0, 0, 1, 4, 5, 6, 8, 10, 16, 19, 20))
    return features


def size_bits(code, arch_minor):
    """Address bits of an OAS or IPS code in one version."""
    known = 6 if arch_minor == 0 else 7 if arch_minor < 4 else 8
    return (32, 36, 40, 42, 44, 48, 52, 56)[:known][min(code, known - 1)]


class Room:
    """Places things in physical memory.

    Tables sit in arenas, which are few; sparse ranges are only promised.
    """

    oddity = 1.0  # of contexts that lie in it, against the usual

    def __init__(self, rng, memory):
        self.rng = rng
        self.memory = memory
        self.arenas = []  # [next, end]
        self.promised = []  # (first, last)

    def somewhere(self, size, alignment, address_bits):
        """A free, aligned range below 2^address_bits.  None where none was found."""
        for _ in range(20):
            # Half of the picks are high, the others spread over the magnitudes.
            top = address_bits
            if self.rng.random() < 0.5:
                top = self.rng.randint(min(28, address_bits), address_bits)
            slots = (1 << top) // alignment
            if slots * alignment < size:
                continue
            base = self.rng.randrange(slots) * alignment
            last = base + size - 1
            if last >> address_bits or not self.memory.free(base, size):
                continue
            if all(last < low or high < base for low, high in self.promised):
                return base
        return None

    def backed(self, size, alignment, address_bits):
        """Address of backed memory below 2^address_bits."""
        for arena in self.arenas:
            address = -(-arena[0] // alignment) * alignment
            if address + size <= arena[1] and not (arena[1] - 1) >> address_bits:
                arena[0] = address + size
                return address
        alignment = max(alignment, 0x10000)
        arena_size = max(0x40000, 2 * size)
        base = self.somewhere(arena_size, alignment, address_bits)
        if base is None:
            raise MemoryError(f"no room below 2^{address_bits}")
        self.memory.add(base, arena_size)
        self.arenas.append([base + size, base + arena_size])
        return base

    def reserve(self, size, alignment, address_bits):
        """Address of a range that is not backed yet."""
        if size < 0x1000 and alignment <= 0x1000:
            return self.backed(size, alignment, address_bits)
        base = self.somewhere(size, alignment, address_bits)
        if base is None:
            raise MemoryError(f"no room below 2^{address_bits}")
        self.promised.append((base & -0x1000, (base + size - 1) | 0xFFF))
        return base

    def hole(self, alignment, address_bits):
        """An aligned address below 2^address_bits that is not backed."""
        for _ in range(20):
            address = self.rng.randrange((1 << address_bits) // alignment) * alignment
            if self.memory.free(address, alignment):
                return address
        return 0

    def target(self, address_bits, size_lg2):
        """(address for a leaf to map to, parts of the leaf to be asked for: offset, log2 size)."""
        return self.rng.getrandbits(address_bits), [(0, size_lg2)]


# ------------------------------------------------------------------------------------------------
# Stage 2


# Legal S2T0SZ by granule and start level: the first and last with one table, and how many smaller
# ones are legal with 2, 4, 8, 16 tables side by side.
STAGE2_SHAPES = {
    (12, -1): (12, 15, 0),
    (12, 0): (16, 24, 4),
    (12, 1): (25, 33, 4),
    (12, 2): (34, 42, 4),
    (12, 3): (43, 48, 4),
    (14, 0): (12, 16, 0),
    (14, 1): (17, 27, 4),
    (14, 2): (28, 38, 4),
    (14, 3): (39, 48, 4),
    (16, 1): (12, 21, 0),
    (16, 2): (22, 34, 4),
    (16, 3): (35, 47, 4),
}


def legal_stage2_shape(features, granule_lg2, level, t0sz, ds):
    """Whether a granule, a start level and S2T0SZ go together."""
    if not getattr(features, GRANULES[granule_lg2]) or (granule_lg2, level) not in STAGE2_SHAPES:
        return False
    first, last, concatenated = STAGE2_SHAPES[granule_lg2, level]
    if not first - concatenated <= t0sz <= last:
        return False
    oas_bits = size_bits(features.oas, features.arch_minor)
    ds = ds and features.ds and granule_lg2 != 16
    if t0sz > 39 and not features.stt:
        return False
    if t0sz < 16 and not (ds or granule_lg2 == 16):
        return False
    if 64 - t0sz > oas_bits:
        return False
    if (granule_lg2, level) in ((12, 0), (16, 1)) and oas_bits < 44:
        return False
    if (granule_lg2, level) == (14, 1) and oas_bits < 42:
        return False
    if (granule_lg2, level) in ((12, -1), (14, 0)):
        return bool(ds) and oas_bits >= 52
    return (granule_lg2, level) != (12, 3) or bool(features.stt)


class Guest:
    """An IPA space: the tables of a stage 2, and stage-1 tables and CDs that lie in it.

    For what lies in it, it is both the room and the memory that Room and Memory are otherwise:
    addresses are IPAs, and a page is mapped when it is first written.
    """

    oddity = 0.25  # a nested request has many more places to end early

    def __init__(self, rng, features, room):
        self.rng = rng
        self.features = features
        self.room = room
        self.memory = self
        self.oas_bits = size_bits(features.oas, features.arch_minor)
        self.identity = rng.random() < 0.3
        ps = features.oas if rng.random() < 0.8 else rng.randrange(8)
        self.output_bits = min(size_bits(ps, features.arch_minor), self.oas_bits)
        big_endian = {2: False, 3: True}.get(features.ttendian, rng.random() < 0.3)
        granule_lg2, level, t0sz, ds = self._choose_shape()
        self.wide = 52 if granule_lg2 == 16 or ds else 48
        table_bits = min(self.output_bits, self.wide, 48 if features.arch_minor == 0 else 52)
        self.tables = Stage2Tables(
            room.memory,
            lambda size, alignment: room.backed(size, alignment, table_bits),
            granule_lg2,
            t0sz,
            ds=ds,
            big_endian=big_endian,
            start_level=level,
        )
        self.ipa_bits = 64 - t0sz
        self.arenas = []  # [next, end]
        self.taken = []  # (first, last)
        self.mapped = {}  # (level, IPA >> shift) -> physical address
        self.leaves = []  # (IPA, log2 size)
        self.contexts = []
        self.ha = features.httu >= 1 and rng.random() < 0.7
        self.hd = features.httu >= 2 and self.ha and rng.random() < 0.8
        self.fields = {
            "s2ps": ps, "s2affd": rng.random() < 0.2, "s2ha": self.ha, "s2hd": self.hd,
            "s2ptw": rng.random() < 0.5, "s2fwb": rng.random() < 0.5, "s2sh0": rng.randrange(4),
            "s2ir0": rng.randrange(4), "s2or0": rng.randrange(4), **self.tables.ste_fields(),
        }  # fmt: skip
        for _ in range(rng.randint(2, 6)):
            self.target(self.ipa_bits, granule_lg2)

    def _choose_shape(self):
        """(granule_lg2, start level, S2T0SZ, S2DS): any that is legal, mostly of many bits."""
        rng, features = self.rng, self.features
        largest = 64 - rng.choices((12, 17, 30), (25, 30, 45))[0]
        ds = bool(features.ds and rng.getrandbits(1))
        for granule_lg2, level in rng.sample(sorted(STAGE2_SHAPES), len(STAGE2_SHAPES)):
            first, last, concatenated = STAGE2_SHAPES[granule_lg2, level]
            legal = [
                t0sz
                for t0sz in range(first - concatenated, min(last, largest) + 1)
                if legal_stage2_shape(features, granule_lg2, level, t0sz, ds)
            ]
            if legal:
                return granule_lg2, level, rng.choice(legal), ds
        raise MemoryError("no shape of stage 2")

    # As a room

    def backed(self, size, alignment, address_bits):
        """IPA of a free range below 2^address_bits; its pages are mapped when written."""
        address_bits = min(address_bits, self.ipa_bits)
        for arena in self.arenas:
            address = -(-arena[0] // alignment) * alignment
            if address + size <= arena[1] and not (arena[1] - 1) >> address_bits:
                arena[0] = address + size
                return address
        arena_size = max(0x20000, 2 * size)
        base = self._range(arena_size, max(alignment, 0x10000), address_bits)
        self.arenas.append([base + size, base + arena_size])
        return base

    def reserve(self, size, alignment):
        """IPA of a free range anywhere."""
        bits = min(self.ipa_bits, 48 if self.features.arch_minor == 0 else 52)
        if size < 0x1000 and alignment <= 0x1000:
            return self.backed(size, alignment, bits)
        return self._range(size, alignment, bits)

    def _range(self, size, alignment, address_bits):
        if self.identity:
            base = self.room.somewhere(size, alignment, address_bits)
            if base is None:
                raise MemoryError(f"no room below 2^{address_bits}")
            self.room.promised.append((base & -0x1000, (base + size - 1) | 0xFFF))
            return base
        for _ in range(20):
            top = self.rng.randint(min(24, address_bits), address_bits)
            slots = (1 << top) // alignment
            if slots * alignment < size:
                continue
            base = self.rng.randrange(slots) * alignment
            last = base + size - 1
            if last >> address_bits:
                continue
            if all(end < base or last < first for first, end in self.taken):
                self.taken.append((base, last))
                return base
        raise MemoryError(f"no room in 2^{address_bits} of IPA space")

    def hole(self, alignment, address_bits):
        """An aligned IPA below 2^address_bits, mapped by accident only."""
        bits = min(address_bits, self.ipa_bits + (self.rng.random() < 0.2))
        return self.rng.randrange(max(1, (1 << bits) // alignment)) * alignment

    # As memory

    def _leaf_levels(self):
        levels = {12: [2, 1], 14: [2], 16: [2]}[self.tables.granule_lg2]
        if self.tables.ds:
            levels.append({12: 0, 14: 1}[self.tables.granule_lg2])
        if self.tables.granule_lg2 == 16 and self.oas_bits >= 52:
            levels.append(1)
        return [3, 3, 3] + [level for level in levels if level >= self.tables.start_level]

    def _mapping(self, ipa):
        """(physical address, log2 size of the leaf) of an IPA, or None."""
        for level in range(self.tables.start_level, 4):
            shift = self.tables.shift(level)
            base = self.mapped.get((level, ipa >> shift))
            if base is not None:
                return base + (ipa & (1 << shift) - 1), shift
        return None

    def _physical(self, ipa):
        found = self._mapping(ipa)
        return found and found[0]

    def _map(self, ipa, level, pa, **attributes):
        """Map the leaf of a level that holds an IPA, or else a page, where nothing is.

        Returns the log2 size of the leaf that holds the IPA then, or None.
        """
        if ipa >> self.ipa_bits:
            return None
        found = self._mapping(ipa)
        if found:
            return found[1]
        for at in (level, 3):
            slot = self.tables.slot(ipa, at)
            if slot is not None and not self.tables.read_descriptor(slot):
                shift = self.tables.shift(at)
                self.tables.map(ipa, pa, at, **attributes)
                self.mapped[at, ipa >> shift] = pa >> shift << shift
                self.leaves.append((ipa >> shift << shift, shift))
                return shift
        return None

    def _attributes(self, for_tables):
        rng = self.rng
        sound = 0.993 if for_tables else 0.9
        attributes = {
            "s2ap": 3 if rng.random() < sound else rng.choice((1, 1, 1, 2, 0)),
            "af": int(rng.random() < (0.5 if self.ha else 0.99)),
            "memattr": 15 if rng.random() < 0.6 else rng.choice((5, 7, 13, 14, 6)),
            "sh": rng.randrange(4),
            "xn": 0 if rng.random() < 0.8 else rng.randrange(4),
            "contiguous": int(rng.random() < 0.2),
            "dbm": rng.getrandbits(1) if self.hd else int(rng.random() < 0.1),
            "ignored": rng.choice((0, rng.getrandbits(4) << 55 | rng.getrandbits(1) << 11)),
        }
        if rng.random() < (0.006 if for_tables else 0.3):
            attributes["memattr"] = rng.randrange(16)
        if self.hd and rng.random() < 0.5:
            attributes.update(s2ap=1, dbm=int(rng.random() < 0.9))
        return attributes

    def ensure(self, ipa, size=1):
        """Map the pages that hold [ipa, ipa + size), and back them."""
        for address in {ipa, ipa + size - 1}:
            if self._physical(address) is None:
                self._map_somewhere(address)
            pa = self._physical(address)
            if pa is not None and not pa >> self.oas_bits:
                self.room.memory.ensure(pa)

    def _map_somewhere(self, ipa):
        rng = self.rng
        level = rng.choice(self._leaf_levels())
        output_bits = min(self.output_bits, self.wide)
        shift = self.tables.shift(level)
        if shift > output_bits - 2:
            level, shift = 3, self.tables.granule_lg2
        if self.identity:
            pa = ipa >> shift << shift
            if pa >> output_bits:
                raise MemoryError("an identity map that does not fit")
        elif level == 3:
            pa = self.room.backed(1 << shift, 1 << shift, output_bits)
        else:
            pa = self.room.reserve(1 << shift, 1 << shift, output_bits)
        if self._map(ipa, level, pa, **self._attributes(True)) is None:
            raise MemoryError(f"{ipa:#x} cannot be mapped")

    def __contains__(self, ipa):
        pa = self._physical(ipa)
        return pa is not None and pa in self.room.memory

    def read(self, ipa, size):
        """Bytes; zeros for what is not mapped yet."""
        pa = self._physical(ipa)
        data = None if pa is None or size > 64 else self.room.memory.read(pa, size)
        return bytes(size) if data is None else data

    def write(self, ipa, data):
        """Store bytes, at most 64."""
        self.ensure(ipa, len(data))
        pa = self._physical(ipa)
        if pa in self.room.memory:
            self.room.memory.write(pa, data)

    def flip(self, ipa, bit):
        """Invert one bit."""
        pa = self._physical(ipa + bit // 8)
        if pa is not None and pa in self.room.memory:
            self.room.memory.flip(pa, bit % 8)

    # For devices

    def target(self, address_bits, size_lg2):
        """(IPA for a leaf to map to, parts of the leaf that stage 2 maps: offset, log2 size)."""
        rng = self.rng
        pick = rng.random()
        if pick < 0.01:
            return rng.getrandbits(address_bits), [(0, size_lg2)]
        bits = min(address_bits, self.ipa_bits)
        if pick < 0.2 and self.leaves:
            ipa, _ = rng.choice(self.leaves)
            ipa &= (1 << bits) - 1
        else:
            ipa = rng.getrandbits(rng.randint(min(bits, 30), bits))
        base = ipa >> size_lg2 << size_lg2
        parts = []
        for _ in range(rng.randint(1, 3)):
            level = rng.choice(self._leaf_levels())
            inside = rng.getrandbits(size_lg2) if parts else ipa - base
            pa = rng.getrandbits(min(self.output_bits, self.wide))
            if self.identity and rng.random() < 0.7:
                pa = base + inside
                if pa >> min(self.output_bits, self.wide):
                    continue
            shift = self._map(base + inside, level, pa, **self._attributes(False))
            if shift is not None:
                smaller = min(shift, size_lg2)
                parts.append((inside >> smaller << smaller, smaller))
        if not parts or rng.random() < 0.01:
            parts.append((0, size_lg2))
        return base, parts

    def damage(self):
        """Put something wrong into the tables, mostly on the way to what is mapped."""
        rng, tables = self.rng, self.tables
        granule_lg2 = tables.granule_lg2
        pick = rng.random()
        if self.leaves and pick < 0.9:
            # A leaf, or rarely the table that it is in.
            ipa, size_lg2 = rng.choice(self.leaves)
            levels = [at for at in range(tables.start_level, 4) if tables.shift(at) >= size_lg2]
            level = levels[-1]
            if pick < 0.03:
                level = max(levels[0], level - 1)
        else:
            ipa, size_lg2 = rng.getrandbits(self.ipa_bits), granule_lg2
            level = rng.randint(tables.start_level, 3)
        address = tables.slot(ipa, level)
        if address is None or (pick >= 0.9 and tables.read_descriptor(address)):
            return
        too_large = rng.getrandbits(self.wide) | 1 << min(self.output_bits, self.wide - 1)
        kind = rng.randrange(6)
        if kind == 0:
            # Reserved at level 3; a block, perhaps one that is not allowed, elsewhere.
            descriptor = 0b01 | rng.getrandbits(min(self.output_bits, 40)) & -0x10000 | 0x4C0
        elif kind == 1 and level < 3:
            # A table that no memory holds.
            hole = self.room.hole(1 << granule_lg2, min(self.output_bits, self.wide))
            descriptor = table_descriptor(granule_lg2, hole, ds=tables.ds)
        elif kind in (1, 2):
            # A table or page whose address is often too large.
            base = too_large & -(1 << granule_lg2)
            descriptor = table_descriptor(granule_lg2, base, ds=tables.ds) | 0x4C0
        elif kind == 3:
            descriptor = rng.getrandbits(64) | 0b11
        elif kind == 4:
            descriptor = rng.getrandbits(64) & ~1
        else:
            descriptor = tables.read_descriptor(address) ^ 1 << rng.randrange(64)
        tables.write_descriptor(address, descriptor)
        self.leaves.append((ipa, size_lg2))

    def random_iova(self, lower_only=False):
        """An IPA, mostly one that is mapped.  lower_only has no meaning here."""
        rng = self.rng
        pick = rng.random()
        if self.leaves and pick < 0.93:
            ipa, size_lg2 = rng.choice(self.leaves)
            first = ipa >> size_lg2 << size_lg2
            return first + rng.choice((0, (1 << size_lg2) - 1, rng.getrandbits(size_lg2)))
        if pick < 0.96:
            return rng.getrandbits(self.ipa_bits)
        if pick < 0.98:
            return rng.choice((1 << self.ipa_bits, rng.getrandbits(self.oas_bits)))
        return rng.choice((1 << self.oas_bits, rng.getrandbits(64)))

    def ste_fields(self, vmid):
        """The fields of stage 2 of an STE."""
        rng, features = self.rng, self.features
        stall = {0: rng.random() < 0.35, 1: 0, 2: 1}[features.stall_model]
        fields = self.fields | {"s2r": rng.random() < 0.85, "s2s": stall, "s2vmid": vmid}
        if rng.random() < 0.2:
            fields |= {"s2ptw": rng.random() < 0.5, "s2affd": rng.random() < 0.5}
        if rng.random() < 0.04:
            name, values = rng.choice((
                ("s2aa64", (0,)), ("s2tg", (0, 1, 2, 3)), ("s2t0sz", range(64)),
                ("s2sl0", range(4)), ("s2sl0_2", (0, 1)), ("s2ds", (0, 1)), ("s2endi", (0, 1)),
                ("s2ttb", (rng.getrandbits(52) & ~0xF, 1 << 51)), ("s2ps", range(8)),
                ("s2s", (0, 1)), ("s2ha", (0, 1)), ("s2hd", (0, 1)), ("s2haft", (1,)),
                ("s2vmid", (0x8001,)), ("s1stalld", (1,)),
            ))  # fmt: skip
            fields[name] = rng.choice(values)
        return fields


# ------------------------------------------------------------------------------------------------
# Contexts


class MappedRegion:
    """One TTB of a context: where its addresses are, and some that are mapped."""

    def __init__(self, upper, tables, tbi):
        self.upper = upper
        self.tables = tables
        self.tbi = tbi
        self.leaves = []  # (va within the region, log2 size)

    def canonical(self, va):
        """The 64-bit address of an offset in the region."""
        bits = self.tables.input_bits
        va &= (1 << bits) - 1
        return va | (ALL_ONES >> bits << bits) if self.upper else va


class RandomContext:
    """A CD and its tables."""

    def __init__(self, rng, features, room):
        self.rng = rng
        self.features = features
        self.room = room
        self.odd = lambda probability: rng.random() < probability * room.oddity
        self.oas_bits = size_bits(features.oas, features.arch_minor)
        ips = rng.randrange(8) if rng.random() < 0.3 else 7 if rng.random() < 0.3 else features.oas
        self.ips_bits = min(size_bits(ips, features.arch_minor), self.oas_bits)
        self.big_endian = self._choose_endianness()
        self.ds = rng.random() < (0.5 if features.ds else 0.1)
        self.ha = rng.random() < 0.7 if features.httu else self.odd(0.004)
        self.hd = rng.random() < 0.6 if features.httu == 2 else self.odd(0.004)
        self.regions = []

        fields = {
            "v": 1, "aa64": 1, "ips": ips, "endi": int(self.big_endian), "ds": int(self.ds),
            "affd": rng.random() < 0.3, "wxn": self.odd(0.15), "pan": self.odd(0.07),
            "epan": rng.random() < 0.5, "r": rng.random() < 0.9,
            "a": features.term_model or rng.random() < 0.7,
            "asid": rng.randrange(1 << (16 if features.asid16 or self.odd(0.05) else 8)),
            "aset": rng.getrandbits(1), "uwxn": rng.random() < 0.1,
            "s": self._choose_stall(), "ha": self.ha, "hd": self.hd,
            "haft": rng.random() < 0.05, "nscfg0": rng.random() < 0.1, "aie": rng.random() < 0.05,
            "mair": sum(self._choose_mair() << 8 * index for index in range(8)),
        }  # fmt: skip
        epds = (60, 28, 9, 3 * room.oddity)
        epd0, epd1 = rng.choices(((0, 0), (0, 1), (1, 0), (1, 1)), epds)[0]
        fields.update(self._choose_region(0, epd0))
        fields.update(self._choose_region(1, epd1))
        self.cd = encode_cd(**{name: int(value) for name, value in fields.items()})

    def _choose_endianness(self):
        if self.odd(0.02):
            return self.rng.random() < 0.5
        return {2: False, 3: True}.get(self.features.ttendian, self.rng.random() < 0.4)

    def _choose_stall(self):
        odd = self.odd(0.006)
        return {0: self.rng.random() < 0.35, 1: odd, 2: not odd}[self.features.stall_model]

    def _choose_mair(self):
        return self.rng.choice(_MAIR) if self.rng.random() < 0.7 else self.rng.getrandbits(8)

    def _choose_region(self, number, epd):
        rng, features = self.rng, self.features
        supported = [lg2 for lg2, name in GRANULES.items() if getattr(features, name)]
        granule_lg2 = rng.choice(supported)
        ds = bool(features.ds and self.ds)
        smallest = 12 if features.vax and (granule_lg2 == 16 or ds) else 16
        largest = 39 if not features.stt else 47 if granule_lg2 == 16 else 48
        pick = rng.random()
        if pick < 0.4:
            tsz = rng.randint(smallest, largest)
        elif pick < 0.75:
            tsz = rng.choice((16, 16, 16, 24, 25, 28, 32, 39))
        else:
            tsz = rng.choice((smallest, smallest, smallest, largest, 12, 15, 17))
        tsz = min(max(tsz, smallest), largest)

        table_bits = self.ips_bits if granule_lg2 == 16 or ds else min(self.ips_bits, 48)
        table_bits = min(table_bits, 48 if features.arch_minor == 0 else 52)
        tables = PageTables(
            self.room.memory,
            lambda size, alignment: self.room.backed(size, alignment, table_bits),
            granule_lg2,
            tsz,
            ds=ds,
            big_endian=self.big_endian,
        )
        tbi = rng.getrandbits(1)
        region = MappedRegion(number == 1, tables, tbi)
        if not epd:
            self._fill(region)
            self.regions.append(region)

        # The base's low bits are RES0 up to the table's alignment.
        ttb = tables.base
        if rng.random() < 0.1:
            ttb |= 0x10
        code = (TG0_CODES, TG1_CODES)[number][granule_lg2]
        if self.odd(0.01) or epd:
            code = rng.randrange(4)
        if self.odd(0.012) or epd:
            tsz = rng.choice((smallest - 1, largest + 1, 0, 63, rng.randrange(64)))
        if self.odd(0.012) or (epd and rng.random() < 0.5):
            ttb = rng.getrandbits(56) & ~0xF
        return {
            f"t{number}sz": tsz & 63, f"tg{number}": code, f"epd{number}": epd,
            f"ttb{number}": ttb, f"tbi{number}": tbi, f"sh{number}": rng.randrange(4),
            f"ir{number}": rng.randrange(4), f"or{number}": rng.randrange(4),
            f"had{number}": rng.random() < 0.3, f"e0pd{number}": self.odd(0.07),
        }  # fmt: skip

    def _leaf_levels(self, tables):
        """Levels at which a leaf is legal."""
        levels = {12: [2, 1], 14: [2], 16: [2]}[tables.granule_lg2]
        if tables.ds:
            levels.append({12: 0, 14: 1}[tables.granule_lg2])
        if tables.granule_lg2 == 16 and self.oas_bits >= 52:
            levels.append(1)
        return [3, 3, 3] + [level for level in levels if level >= tables.start_level]

    def _leaf_attributes(self):
        rng = self.rng
        updated = self.features.httu and self.ha
        return {
            "attrindx": rng.randrange(8),
            "ap": rng.choice((0, 1, 2, 3)) if self.odd(0.28) else 1,
            "sh": rng.randrange(4),
            "af": int(rng.random() < 0.5 if updated else not self.odd(0.03)),
            "ng": rng.getrandbits(1),
            "pxn": int(rng.random() < 0.15),
            "uxn": int(rng.random() < 0.15),
            "contiguous": int(rng.random() < 0.2),
            "dbm": rng.getrandbits(1),
            # Software's bits, NS, GP.
            "ignored": rng.choice((0, rng.getrandbits(4) << 55 | rng.getrandbits(1) << 50 | 32)),
        }

    def _table_flags(self):
        rng = self.rng
        if rng.random() < 0.8:
            return {}
        return {
            "pxntable": rng.getrandbits(1),
            "xntable": rng.getrandbits(1),
            "aptable": rng.randrange(4) if self.odd(1) else 0,
            "ignored": rng.choice((0, 1 << 63, rng.getrandbits(6) << 2, 0x7F << 52)),
        }

    def _fill(self, region):
        rng, tables = self.rng, region.tables
        output_bits = min(self.ips_bits, 52 if tables.ds or tables.granule_lg2 == 16 else 48)
        levels = self._leaf_levels(tables)
        top = 1 << tables.input_bits
        va = 0
        for number in range(rng.randint(3, 9)):
            pick = rng.random()
            if pick < 0.4 or number == 0:
                va = rng.randrange(top)
            elif pick < 0.5:
                va = 0
            elif pick < 0.6:
                va = top - 1
            elif pick < 0.8:
                va = (va + (1 << tables.granule_lg2)) % top
            else:
                va ^= 1 << rng.randrange(tables.granule_lg2, tables.input_bits)
            level = rng.choice(levels)
            shift = tables.shift(level)
            slot = tables.slot(va, level, **self._table_flags())
            if slot is None or (tables.read_descriptor(slot) and not self.odd(1)):
                continue
            pa, parts = self.room.target(output_bits, shift)
            if rng.random() < 0.015:
                pa = rng.getrandbits(52 if tables.ds or tables.granule_lg2 == 16 else 48)
            attributes = self._leaf_attributes()
            if attributes["dbm"] and self.hd and rng.random() < 0.5:
                attributes["ap"] |= 2
            if self.odd(0.08):
                self._damage(region, va, level)
            elif tables.map(va, pa, level, **attributes):
                for offset, size_lg2 in parts:
                    region.leaves.append(((va >> shift << shift) + offset, size_lg2))

    def _damage(self, region, va, level):
        """Put something wrong at a level on the way to an address."""
        rng, tables = self.rng, region.tables
        granule_lg2 = tables.granule_lg2
        level = rng.randint(tables.start_level, level)
        address = tables.slot(va, level)
        if address is None or (level < 3 and tables.read_descriptor(address)):
            return
        wide = 52 if tables.ds or granule_lg2 == 16 else 48
        kind = rng.randrange(6)
        if kind == 0:
            # Reserved at level 3; a block, often not allowed, elsewhere.
            descriptor = leaf_descriptor(granule_lg2, 2, rng.getrandbits(self.ips_bits), ap=1)
        elif kind == 1 and level < 3:
            # A table that no memory holds.
            hole = self.room.hole(1 << granule_lg2, min(self.ips_bits, wide))
            descriptor = table_descriptor(granule_lg2, hole, ds=tables.ds)
        elif kind in (1, 2):
            # A table or page whose address is often too large.
            too_large = rng.getrandbits(wide) | 1 << min(self.ips_bits, wide - 1)
            descriptor = table_descriptor(granule_lg2, too_large & -(1 << granule_lg2))
        elif kind == 3:
            descriptor = rng.getrandbits(64) | 0b11
        elif kind == 4:
            descriptor = leaf_descriptor(granule_lg2, level, rng.getrandbits(wide), af=0)
        else:
            descriptor = rng.getrandbits(64) & ~1
        tables.write_descriptor(address, descriptor)
        region.leaves.append((va, tables.shift(level)))

    def random_iova(self, lower_only=False):
        """An address, mostly inside something mapped.

        lower_only: from the region of TTB0, the only one of an EL2 stream.
        """
        rng = self.rng
        regions = self.regions
        if lower_only:
            regions = [region for region in regions if not region.upper]
        if not regions:
            return rng.getrandbits(64)
        region = rng.choice(regions)
        tables = region.tables
        bits = tables.input_bits
        pick = rng.random()
        if not self.odd(1):
            pick *= 0.9
        if region.leaves and pick < 0.92:
            va, size_lg2 = rng.choice(region.leaves)
            first = va >> size_lg2 << size_lg2
            offset = rng.choice((0, (1 << size_lg2) - 1, rng.getrandbits(size_lg2)))
            iova = region.canonical(first + offset)
            if pick > 0.9:
                iova = region.canonical(first + rng.choice((-1, 1 << size_lg2)))
        elif pick < 0.945:
            iova = region.canonical(rng.choice((0, (1 << bits) - 1, rng.getrandbits(bits))))
        elif pick < 0.965:
            # The first address outside, on either side of the hole.
            iova = (region.canonical(0) - 1 if region.upper else 1 << bits) & ALL_ONES
        elif pick < 0.985:
            iova = region.canonical(rng.getrandbits(bits)) ^ 1 << rng.randrange(bits, 64)
        else:
            iova = rng.getrandbits(rng.randint(1, 64))
        if rng.random() < (0.5 if region.tbi else 0.01):
            iova = iova & ALL_ONES >> 8 | rng.getrandbits(8) << 56
        return iova


# ------------------------------------------------------------------------------------------------
# Streams


class _Builder:
    """Puts one system together."""

    def __init__(self, rng, nested=False):
        self.rng = rng
        self.nested = nested
        self.memory = Memory()
        self.room = Room(rng, self.memory)
        self.features = random_features(rng)
        if nested:
            add_stage2(rng, self.features)
        self.guests = []
        self.oas_bits = size_bits(self.features.oas, self.features.arch_minor)
        # Pointers to configuration tables.
        self.pointer_bits = min(self.oas_bits, 48 if self.features.arch_minor == 0 else 52)
        self.endpoints = []  # (sid, ssid, context or None, whether it has TTB0 alone)
        self.e2h = rng.random() < 0.6
        self.flippable = []  # (memory, address, bits)

    def reserve(self, size, alignment):
        return self.room.reserve(size, alignment, self.pointer_bits)

    def build(self):
        rng = self.rng
        self.contexts = [
            RandomContext(rng, self.features, self.room)
            for _ in range(1 if self.nested else rng.randint(2, 4))
        ]
        if self.nested:
            self.guests = [
                Guest(rng, self.features, self.room) for _ in range(rng.choice((1, 1, 2)))
            ]
            for guest in self.guests:
                if guest.ipa_bits >= 30:
                    guest.contexts = [
                        RandomContext(rng, self.features, guest) for _ in range(rng.randint(1, 3))
                    ]
        table = self._stream_table()
        sids = self._choose_sids(table)
        for sid in sids:
            self._stream(table, sids, sid)
        for guest in self.guests:
            for _ in range(rng.choice((0, 0, 0, 1, 2))):
                guest.damage()
        if rng.random() < (0.25 if self.nested else 0.4):
            self._flip()
        return System(self.memory, self.features, self._registers(table), self.request)

    def _stream_table(self):
        rng, features = self.rng, self.features
        split = None
        if features.st_level and rng.random() < 0.6:
            split = rng.choice((6, 8, 10))
        room_lg2 = self.pointer_bits - 2
        sids_lg2 = rng.choice((4, 6, 7, 8, 10, 12, 16, 24, 32, rng.randrange(33)))
        sids_lg2 = min(sids_lg2, room_lg2 - 6 if split is None else room_lg2 - 3 + split)
        log2size = sids_lg2
        if sids_lg2 >= features.sidsize and rng.random() < 0.7:
            # LOG2SIZE may say more than SIDSIZE; the table is aligned to what it says.
            cap = room_lg2 - 6 if split is None else room_lg2 - 3 + split
            log2size = rng.randint(features.sidsize, max(features.sidsize, cap))
        return StreamTable(self.memory, self.reserve, log2size, features.sidsize, split)

    def _choose_sids(self, table):
        rng = self.rng
        self.sid_bits = min(table.log2size, self.features.sidsize)
        count = 1 << self.sid_bits
        sids = {0, count - 1}
        near = rng.randrange(count)
        for _ in range(rng.randint(2, 6)):
            pick = rng.random()
            sids.add(rng.randrange(count) if pick < 0.4 else (near + rng.randrange(8)) % count)
        return sorted(sids)

    def _registers(self, table):
        rng = self.rng
        base, cfg = table.base, table.strtab_base_cfg
        if rng.random() < 0.3:
            # Below the table's alignment, and above the address: no effect.
            base |= 0x20 if table.split is None else 0x30
            base |= 1 << 62
            if table.split is None and self.sid_bits:
                base |= 1 << rng.randrange(6, 6 + self.sid_bits)
        if table.split is None:
            cfg |= rng.randrange(32) << 6
            if rng.random() < 0.3:
                cfg |= rng.choice((2, 3)) << 16
            if not self.features.st_level:
                cfg |= rng.getrandbits(2) << 16
        elif table.split == 6 and rng.random() < 0.3:
            cfg = cfg & ~(31 << 6) | rng.choice((0, 5, 7, 9, 16, 31)) << 6
        off = rng.random() < 0.03
        return SimpleNamespace(
            strtab_base=base,
            strtab_base_cfg=cfg,
            cr0=(0 if off else 1) | (4 if rng.random() < 0.95 else 0) | 8,
            cr2=(2 if rng.random() < 0.8 else 0) | self.e2h,
            gbpa=rng.getrandbits(20) & 0xF3F1F | (rng.random() < 0.2) << 20,
        )

    def _stream(self, table, sids, sid):
        rng = self.rng
        span = None
        if table.split is not None:
            leaf = [other for other in sids if other >> table.split == sid >> table.split]
            if len(leaf) == 1 and rng.random() < 0.08:
                self._bad_l1std(table, sid)
                return
            last_index = max(leaf) & ((1 << table.split) - 1)
            span = table.split + 1
            if rng.random() < 0.3:
                # As small as the last StreamID of the leaf table allows.
                span = rng.randint(last_index.bit_length() + 1, table.split + 1)
        address = table.ste_address(sid, span)
        ste = {
            "v": 1, "config": 0b101, "mev": rng.getrandbits(1), "cont": rng.choice((0, 0, 3)),
            "strw": rng.choices((0, 2, 1, 3), (76, 22, 1, 1))[0],
            "memattr": rng.randrange(16), "mtcfg": rng.random() < 0.3,
            "alloccfg": rng.randrange(16), "shcfg": rng.choice((0, 1, 1, 1, 2, 3)),
            "privcfg": rng.choice((0, 0, 0, 1, 2, 3)), "instcfg": rng.choice((0, 0, 0, 1, 2, 3)),
            "eats": rng.choice((0, 0, 0, 1, 1, 1, 2, 3) if self.features.ats else (0, 1, 2, 3)),
            "nscfg": rng.choice((0, 3)),
            "s1cir": rng.randrange(4), "s1cor": rng.randrange(4), "s1csh": rng.randrange(4),
            "s2vmid": rng.choice((0, 5, 0x1234)) if self.features.vmid16 else 5,
            "s1stalld": rng.random() < (0.02 if self.features.stall_model == 0 else 0.01),
        }  # fmt: skip
        kind = rng.random()
        if self.nested and 0.02 < kind < 0.85:
            self._guest_stream(sid, ste)
        elif kind < 0.09:
            ste["config"] = 0b100
            ste["s1cdmax"], ste["s1fmt"], ste["strw"] = rng.randrange(32), rng.randrange(4), 3
            ste["s1stalld"] = 1
            self.endpoints.append((sid, None, None, False))
        elif kind < 0.12:
            ste["config"] = rng.choice((0, 1, 2, 3))
            self.endpoints.append((sid, None, None, False))
        elif kind < 0.14:
            ste["config"] = rng.choice((0b110, 0b111))
            self.endpoints.append((sid, None, None, False))
        elif kind < 0.15:
            ste["v"] = 0
            self.endpoints.append((sid, None, None, False))
        else:
            lower_only = self.features.hyp and ste["strw"] == 2 and not self.e2h
            ste.update(self._contexts_of(sid, lower_only))
        if kind < 0.97:
            self.memory.ensure(address, 64)
        if address in self.memory:
            self.memory.write(
                address, encode_ste(**{name: int(value) for name, value in ste.items()})
            )
            self.flippable.append((self.memory, address, 248 if self.nested else 120))

    def _guest_stream(self, sid, ste):
        """Give a stream a stage 2, and mostly a stage 1 in its IPA space."""
        rng = self.rng
        guest = rng.choice(self.guests)
        vmid = 1 + sid % 0xFE
        ste.update(guest.ste_fields(vmid))
        if not guest.contexts or rng.random() < 0.2:
            ste["config"] = 0b110
            ste["s1cdmax"], ste["s1fmt"], ste["strw"] = rng.randrange(32), rng.randrange(4), 3
            self.endpoints += [(sid, None, guest, False)] * 2
            return
        ste["config"] = 0b111
        ste["strw"] = rng.choice((0, 0, 3))
        if rng.random() < 0.85:
            ste["instcfg"] = ste["privcfg"] = 0
        ste.update(self._contexts_of(sid, False, guest))

    def _bad_l1std(self, table, sid):
        rng = self.rng
        address = table.l1std_address(sid)
        self.endpoints.append((sid, None, None, False))
        if rng.random() < 0.3 and address not in self.memory:
            return  # external abort
        self.memory.ensure(address, 8)
        pointer = self.room.hole(64, self.pointer_bits) if rng.getrandbits(1) else 0
        if rng.random() < 0.3:
            pointer = rng.getrandbits(52) & ~0x3F
        span = rng.choice((0, 1, table.split + 1, table.split + 2, 11, 12, 31))
        self.memory.write(address, encode_l1std(span, pointer))

    def _contexts_of(self, sid, lower_only, guest=None):
        """Make a CD table for a stream and return its STE fields."""
        rng, features = self.rng, self.features
        memory, reserve, contexts = self.memory, self.reserve, self.contexts
        pointer_bits, bypassed = self.pointer_bits, None
        if guest is not None:
            memory, reserve, contexts = guest, guest.reserve, guest.contexts
            pointer_bits, bypassed = min(pointer_bits, guest.ipa_bits), guest
        if not features.ssidsize or rng.random() < 0.45:
            # Without substreams S1Fmt has no meaning, nor has S1DSS.
            context = rng.choice(contexts)
            table = ContextTable(memory, reserve)
            fields = table.ste_fields()
            self._put_context(table, 0, context)
            self.endpoints += [(sid, None, context, lower_only)] * 2
            fields["s1fmt"], fields["s1dss"] = rng.randrange(4), rng.randrange(4)
            if not features.ssidsize and rng.random() < 0.3:
                fields["s1cdmax"] = rng.randrange(32)
            return self._bad_pointer(fields, self.room if guest is None else guest)

        s1fmt = rng.choice((0, 1, 2, 3)) if features.cd2l or rng.random() < 0.05 else 0
        s1cdmax = rng.choice((1, 4, 6, 7, 10, 12, 16, 20, rng.randint(1, 20)))
        s1cdmax = min(s1cdmax, features.ssidsize)
        room = self.room if guest is None else guest
        if rng.random() < 0.02 * room.oddity:
            s1cdmax = min(31, features.ssidsize + 1)
        table_lg2 = s1cdmax + 6 if s1fmt in (0, 3) else max(6, s1cdmax - 3)
        if table_lg2 > pointer_bits - 2:
            s1cdmax = 1
        table = ContextTable(memory, reserve, s1cdmax, s1fmt)
        fields = table.ste_fields()
        weights = (50, 25, 20 * room.oddity, 5)
        s1dss = fields["s1dss"] = rng.choices((2, 1, 0, 3), weights)[0]
        ssids = {0, (1 << s1cdmax) - 1}
        ssids |= {rng.randrange(1 << s1cdmax) for _ in range(rng.randint(1, 4))}
        for ssid in sorted(ssids):
            context = rng.choice(contexts)
            if ssid == 0:
                first = context
            if rng.random() > 0.02 * room.oddity:
                self._put_context(table, ssid, context)
            elif table.leaf_lg2 is not None and table.l1cd_address(ssid) not in memory:
                pointer = rng.choice((
                    room.hole(0x10000, pointer_bits), rng.getrandbits(52) & ~0xFFF
                ))  # fmt: skip
                table.set_l1cd(ssid, pointer, v=int(rng.random() < 0.7))
            if ssid or s1dss != 2:
                self.endpoints += [(sid, ssid, context, lower_only)] * 2
        if s1dss == 2:
            # CD 0, which a SubstreamID of 0 may not use.
            self.endpoints += [(sid, None, first, lower_only)] * 3
        if s1dss == 1 and bypassed is not None:
            context = bypassed
        self.endpoints.append((sid, None, context, lower_only))
        if rng.random() < 0.1 and s1fmt in (0, 3):
            # Bits below the table's alignment.
            fields["s1contextptr"] |= 64 << rng.randrange(s1cdmax)
        return self._bad_pointer(fields, room)

    def _put_context(self, table, ssid, context):
        address = table.set_cd(ssid, context.cd)
        self.flippable.append((table.memory, address, 192))
        if context.odd(0.01):
            table.memory.write(address, bytes(64))

    def _bad_pointer(self, fields, room):
        pick = self.rng.random() / room.oddity
        if pick < 0.015:
            fields["s1contextptr"] = self.rng.getrandbits(56) & ~0x3F
        elif pick < 0.022:
            fields["s1contextptr"] = room.hole(0x1000, self.pointer_bits)
        return fields

    def _flip(self):
        """Invert some bits of STEs, CDs and descriptors."""
        rng = self.rng
        for _ in range(rng.randint(1, 3)):
            if self.flippable:
                memory, address, bits = rng.choice(self.flippable)
                memory.flip(address, rng.randrange(bits))
        leaves = [
            (region.tables, va, size_lg2)
            for context in self.contexts + [c for guest in self.guests for c in guest.contexts]
            for region in context.regions
            for va, size_lg2 in region.leaves
        ]
        for tables, va, size_lg2 in rng.sample(leaves, min(2, len(leaves))):
            level = rng.randint(tables.start_level, 3)
            if tables.shift(level) >= size_lg2:
                address = tables.slot(va, level)
                if address is not None:
                    tables.memory.flip(address, rng.randrange(64))

    def request(self):
        rng = self.rng
        context, lower_only = None, False
        pick = rng.random()
        if self.endpoints and pick < 0.97:
            sid, ssid, context, lower_only = rng.choice(self.endpoints)
            if pick > 0.95:
                limit = max(1, self.features.ssidsize)
                ssid = rng.choice((None, 0, 1, (1 << limit) - 1, rng.getrandbits(limit)))
        else:
            wide = min(32, self.sid_bits + 1)
            sid = rng.choice((
                rng.getrandbits(32), rng.getrandbits(wide), min(1 << self.sid_bits, 0xFFFF_FFFF)
            ))  # fmt: skip
            ssid = rng.choice((None, rng.getrandbits(20)))
        if context is None or rng.random() < 0.02:
            iova = rng.choice((
                rng.getrandbits(self.oas_bits), rng.getrandbits(self.oas_bits),
                (1 << self.oas_bits) - 1, 1 << self.oas_bits, rng.getrandbits(64),
            ))  # fmt: skip
        else:
            iova = context.random_iova(lower_only and rng.random() < 0.9)
        weights = (66, 30, 3, 1) if self.nested else (62, 28, 8, 2)
        write, instr = rng.choices(
            ((False, False), (True, False), (False, True), (True, True)), weights
        )[0]
        if ssid is not None:
            ssid &= 0xF_FFFF
        return Request(sid, ssid, iova, write, rng.random() < 0.6, instr)


def random_system(rng):
    """Tables of all kinds, most of them sound.

    rng: random.Random.  The system's requests come from a generator of their own.
    """
    return _build(rng, nested=False)


def random_nested_system(rng):
    """Most streams with a stage 2, most of these with stage 1 too; with updates and stalls.

    rng: random.Random.  The system's requests come from a generator of their own.
    """
    return _build(rng, nested=True)


def _build(rng, nested):
    while True:
        try:
            return _Builder(random.Random(rng.getrandbits(64)), nested).build()
        except MemoryError:
            # 32 bits of address space can be too few for what was drawn.
            continue


# ------------------------------------------------------------------------------------------------
# Noise


def random_bytes_system(rng):
    """Random bytes as stream table, CDs and page tables at once.

    In a third of the systems the bytes are noise alone.  In the others pointers stay inside and
    the bits that make a structure illegal are put right, mostly, so that more is read.
    """
    return _noise(rng, nested=False)


def random_nested_bytes_system(rng):
    """As random_bytes_system; the STEs have stage 2, and the tables are those of both stages."""
    return _noise(rng, nested=True)


def _noise(rng, nested):
    rng = random.Random(rng.getrandbits(64))
    features = random_features(rng)
    if nested:
        add_stage2(rng, features)
    features.s1p = 1
    features.sidsize = 32
    features.st_level = 1
    size = 0x20000
    base = rng.choice((0, 0x20000, 0x1_0000_0000 - size))
    words = [rng.getrandbits(64) for _ in range(0x1000)] * (size // 0x8000)
    if rng.random() < 0.7:
        inside = size - 1
        for first in range(0, len(words), 8):
            # Of four 64-byte slots the first is an STE, the second a CD, mostly.
            kind = first // 8 % 4
            if rng.random() < 0.1:
                kind = 3
            if kind == 0:
                cd = base + 0x40 + (rng.getrandbits(24) & inside & ~0xFF)
                words[first] = cd | 0b1011
                words[first + 1] &= ~(1 << 30 | 1 << 27)
                if nested:
                    words[first] = cd | rng.choice((0b1101, 0b1111, 0b1111))
                    # 4K tables from level 2 or 1 on, or 64K ones from level 2; AArch64.
                    s2tg, s2sl0, smallest = rng.choice(((0, 0, 30), (0, 1, 24), (1, 1, 24)))
                    second = 1 << 51 | 5 << 48 | s2tg << 46 | s2sl0 << 38
                    second |= rng.randint(smallest, 32) << 32
                    second |= (features.ttendian == 3) << 52
                    if features.stall_model != 1:
                        second |= max(features.stall_model >> 1, rng.getrandbits(1)) << 57
                    if features.httu:
                        second |= rng.choice((0, 2, 2 if features.httu == 1 else 3)) << 55
                    # S2R, S2PTW, S2AFFD, the walks' attributes, VMID
                    words[first + 2] = second | words[first + 2] & (0x0460_3F00 << 32 | 0xFF)
                    words[first + 3] = base + (rng.getrandbits(24) & inside & ~0xFFF)
            elif kind == 1:
                low = 0x6205_8000_0000 | rng.choice((0, 0x40, 0x80)) | rng.randint(16, 39)
                low |= rng.choice((1, 2, 3)) << 22 | rng.randint(16, 39) << 16
                words[first] = low | words[first] & 0xFF_01F8_0000_3F00
                words[first + 1] = base + (rng.getrandbits(24) & inside & ~0xF) | 0b10
                words[first + 2] = base + (rng.getrandbits(24) & inside & ~0xF)
            else:
                for index in range(first, first + 8):
                    if rng.random() < 0.9:
                        attributes = words[index] & (0xFFF0 << 48 | 0xFFC)
                        address = base + (words[index] >> 16 & inside & ~0xFFF)
                        words[index] = address | attributes | rng.choice((3, 3, 3, 1))
    data = b"".join(word.to_bytes(8, "little") for word in words)
    memory = Memory()
    memory.add(base, size)
    memory.write(base, data)

    log2size = rng.choice((8, 11, 11, 11, rng.randrange(64)))
    two_level = features.st_level and rng.random() < 0.15
    regs = SimpleNamespace(
        strtab_base=base,
        strtab_base_cfg=log2size | rng.randrange(32) << 6 | (1 << 16 if two_level else 0),
        cr0=0b101,
        cr2=rng.randrange(4),
        gbpa=rng.getrandbits(20),
    )

    def draw():
        ssid = None if rng.random() < 0.8 else rng.getrandbits(rng.randint(1, 20))
        iova = rng.getrandbits(rng.randint(1, 64))
        if rng.random() < 0.3:
            iova ^= ALL_ONES
        sid = rng.getrandbits(min(11, max(1, log2size)))
        if rng.random() < 0.8:
            sid &= ~3
        if rng.random() < 0.05:
            sid = rng.getrandbits(32)
        return Request(sid, ssid, iova, rng.random() < 0.4, rng.random() < 0.5, rng.random() < 0.2)

    return System(memory, features, regs, draw)
