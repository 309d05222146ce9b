"""An encoder of stream tables, context descriptors and page tables, for tests only.

Follows IHI 0070G.b 5.1 (L1STD), 5.2 (STE), 5.3 (L1CD), 5.4 (CD), 6.3 (STRTAB_BASE,
STRTAB_BASE_CFG), and DDI 0487 D8.3 (VMSAv8-64 descriptors).  It imports nothing from the library
and shares no bit position with it, nor with the reference twin.

Memory is pages of bytes; whoever else wants to read it takes Memory.regions() without a copy.
"""

PAGE_LG2 = 12
PAGE = 1 << PAGE_LG2

# Field: (msb, lsb) in the whole structure.  Address fields take the address itself.
_STE = {
    "v": (0, 0),
    "config": (3, 1),
    "s1fmt": (5, 4),
    "s1cdmax": (63, 59),
    "s1dss": (65, 64),
    "s1cir": (67, 66),
    "s1cor": (69, 68),
    "s1csh": (71, 70),
    "cont": (80, 77),
    "mev": (83, 83),
    "s2fwb": (89, 89),
    "s1stalld": (91, 91),
    "eats": (93, 92),
    "strw": (95, 94),
    "memattr": (99, 96),
    "mtcfg": (100, 100),
    "alloccfg": (104, 101),
    "shcfg": (109, 108),
    "nscfg": (111, 110),
    "privcfg": (113, 112),
    "instcfg": (115, 114),
    "s2vmid": (143, 128),
    "s2t0sz": (165, 160),
    "s2sl0": (167, 166),
    "s2ir0": (169, 168),
    "s2or0": (171, 170),
    "s2sh0": (173, 172),
    "s2tg": (175, 174),
    "s2ps": (178, 176),
    "s2aa64": (179, 179),
    "s2endi": (180, 180),
    "s2affd": (181, 181),
    "s2ptw": (182, 182),
    "s2hd": (183, 183),
    "s2ha": (184, 184),
    "s2s": (185, 185),
    "s2r": (186, 186),
    "s2haft": (187, 187),
    "s2sl0_2": (194, 194),
    "s2ds": (195, 195),
}
_STE_ADDRESSES = {"s1contextptr": (0, 55, 6), "s2ttb": (192, 55, 4)}

_CD = {
    "t0sz": (5, 0),
    "tg0": (7, 6),
    "ir0": (9, 8),
    "or0": (11, 10),
    "sh0": (13, 12),
    "epd0": (14, 14),
    "endi": (15, 15),
    "t1sz": (21, 16),
    "tg1": (23, 22),
    "ir1": (25, 24),
    "or1": (27, 26),
    "sh1": (29, 28),
    "epd1": (30, 30),
    "v": (31, 31),
    "ips": (34, 32),
    "affd": (35, 35),
    "wxn": (36, 36),
    "uwxn": (37, 37),
    "tbi0": (38, 38),
    "tbi1": (39, 39),
    "pan": (40, 40),
    "aa64": (41, 41),
    "hd": (42, 42),
    "ha": (43, 43),
    "s": (44, 44),
    "r": (45, 45),
    "a": (46, 46),
    "aset": (47, 47),
    "asid": (63, 48),
    "nscfg0": (64, 64),
    "had0": (65, 65),
    "e0pd0": (66, 66),
    "haft": (67, 67),
    "epan": (123, 123),
    "nscfg1": (128, 128),
    "had1": (129, 129),
    "e0pd1": (130, 130),
    "aie": (131, 131),
    "ds": (186, 186),
    "pie": (187, 187),
    "mair": (255, 192),
}
_CD_ADDRESSES = {"ttb0": (64, 55, 4), "ttb1": (128, 55, 4)}

TG0_CODES = {12: 0b00, 16: 0b01, 14: 0b10}
TG1_CODES = {14: 0b01, 12: 0b10, 16: 0b11}
S2TG_CODES = {12: 0b00, 16: 0b01, 14: 0b10}

# (S2SL0_2, S2SL0) of each start level.
S2SL0_CODES = {
    12: {-1: (1, 0b00), 0: (0, 0b10), 1: (0, 0b01), 2: (0, 0b00), 3: (0, 0b11)},
    14: {0: (0, 0b11), 1: (0, 0b10), 2: (0, 0b01), 3: (0, 0b00)},
    16: {1: (0, 0b10), 2: (0, 0b01), 3: (0, 0b00)},
}


def _pack(fields, addresses, values, size):
    word = 0
    for name, value in values.items():
        if name in addresses:
            first, msb, lsb = addresses[name]
            if value & ~((1 << msb + 1) - (1 << lsb)):
                raise ValueError(f"{name}={value:#x} does not fit in [{msb}:{lsb}]")
            word |= value << first
        else:
            msb, lsb = fields[name]
            if value >> (msb - lsb + 1):
                raise ValueError(f"{name}={value:#x} does not fit in [{msb}:{lsb}]")
            word |= value << lsb
    return word.to_bytes(size, "little")


def encode_ste(**fields):
    """64 bytes of an STE; fields not named are 0."""
    return _pack(_STE, _STE_ADDRESSES, fields, 64)


def encode_cd(**fields):
    """64 bytes of a CD; fields not named are 0.  mair is MAIR0 and MAIR1 together."""
    return _pack(_CD, _CD_ADDRESSES, fields, 64)


def encode_l1std(span, l2ptr):
    """8 bytes of a level-1 stream table descriptor."""
    return _pack({"span": (4, 0)}, {"l2ptr": (0, 55, 6)}, {"span": span, "l2ptr": l2ptr}, 8)


def encode_l1cd(l2ptr, v=1):
    """8 bytes of a level-1 context descriptor."""
    return _pack({"v": (0, 0)}, {"l2ptr": (0, 55, 12)}, {"v": v, "l2ptr": l2ptr}, 8)


def _descriptor_address(granule_lg2, ds, address):
    """Address bits as a descriptor holds them."""
    if granule_lg2 == 16:
        return address & 0x0000_FFFF_FFFF_0000 | (address >> 48 & 0xF) << 12
    if ds:
        return address & 0x0003_FFFF_FFFF_F000 | (address >> 50 & 0x3) << 8
    return address & 0x0000_FFFF_FFFF_F000


def table_descriptor(
    granule_lg2, address, *, ds=False, pxntable=0, xntable=0, aptable=0, ignored=0
):
    """A table descriptor.  aptable: bit 0 takes unprivileged access away, bit 1 writes.

    ignored is ORed in: bits that stage 1 does not look at in a table descriptor.
    """
    return (
        0b11
        | _descriptor_address(granule_lg2, ds, address)
        | pxntable << 59
        | xntable << 60
        | aptable << 61
        | ignored
    )


def leaf_descriptor(
    granule_lg2, level, address, *, ds=False, attrindx=0, ap=0, sh=0, af=1, ng=0, pxn=0, uxn=0,
    contiguous=0, dbm=0, ignored=0,
):  # fmt: skip
    """A page (level 3) or block descriptor of stage 1.

    ap is AP[2:1]: 1 = unprivileged access too, 2 = read-only.  With ds there is no SH field.
    ignored is ORed in: bits that stage 1 does not look at in a leaf.
    """
    descriptor = 0b11 if level == 3 else 0b01
    descriptor |= _descriptor_address(granule_lg2, ds, address)
    if not ds:
        descriptor |= sh << 8
    return (
        descriptor
        | attrindx << 2
        | ap << 6
        | af << 10
        | ng << 11
        | dbm << 51
        | contiguous << 52
        | pxn << 53
        | uxn << 54
        | ignored
    )


def stage2_leaf_descriptor(
    granule_lg2, level, address, *, ds=False, memattr=0, s2ap=0, sh=0, af=1, xn=0, contiguous=0,
    dbm=0, ignored=0,
):  # fmt: skip
    """A page (level 3) or block descriptor of stage 2.

    s2ap: bit 0 is read, bit 1 write.  xn is XN[1:0]: bit 1 alone where XNX is not supported.
    ignored is ORed in: bits that stage 2 does not look at in a leaf.
    """
    descriptor = 0b11 if level == 3 else 0b01
    descriptor |= _descriptor_address(granule_lg2, ds, address)
    if not ds:
        descriptor |= sh << 8
    return (
        descriptor
        | memattr << 2
        | s2ap << 6
        | af << 10
        | dbm << 51
        | contiguous << 52
        | xn << 53
        | ignored
    )


class Memory:
    """Regions of bytes, found by page."""

    def __init__(self):
        self._regions = []
        self._pages = {}

    def add(self, base, size):
        """Back [base, base + size) with zeros; both are multiples of 4096."""
        if base % PAGE or size % PAGE or size <= 0:
            raise ValueError(f"base {base:#x} and size {size:#x} are not whole pages")
        pages = range(base >> PAGE_LG2, base + size >> PAGE_LG2)
        if any(page in self._pages for page in pages):
            raise ValueError(f"[{base:#x}, +{size:#x}) overlaps memory")
        data = bytearray(size)
        self._regions.append((base, data))
        for page in pages:
            self._pages[page] = (base, data)

    def ensure(self, address, size=1):
        """Back the pages that hold [address, address + size) where they are not yet."""
        for page in range(address >> PAGE_LG2, (address + size - 1 >> PAGE_LG2) + 1):
            if page not in self._pages:
                self.add(page << PAGE_LG2, PAGE)

    def merge(self):
        """Become one region, zeros between those that there were: all that is read in place."""
        base = min(base for base, _ in self._regions)
        end = max(base + len(data) for base, data in self._regions)
        whole = bytearray(end - base)
        for start, data in self._regions:
            whole[start - base : start - base + len(data)] = data
        self._regions = [(base, whole)]
        pages = range(base >> PAGE_LG2, end >> PAGE_LG2)
        self._pages = dict.fromkeys(pages, (base, whole))

    def copy(self):
        """The same bytes again."""
        copy = Memory()
        for base, data in self._regions:
            copy.add(base, len(data))
            copy.write(base, data)
        return copy

    def regions(self):
        """(base, bytearray) of each region, by base.  Not copies: writes are seen."""
        return sorted(self._regions, key=lambda region: region[0])

    def __contains__(self, address):
        """Whether an address is backed."""
        return address >> PAGE_LG2 in self._pages

    def free(self, base, size):
        """Whether no page of [base, base + size) is backed."""
        first, last = base >> PAGE_LG2, base + size - 1 >> PAGE_LG2
        if last - first < len(self._pages):
            return not any(page in self._pages for page in range(first, last + 1))
        return not any(first <= page <= last for page in self._pages)

    def read(self, address, size):
        """Bytes, or None where no region holds them all."""
        found = self._pages.get(address >> PAGE_LG2)
        if found is None:
            return None
        base, data = found
        offset = address - base
        if offset + size > len(data):
            return None
        return bytes(data[offset : offset + size])

    def write(self, address, data):
        """Store bytes inside one region."""
        base, region = self._pages[address >> PAGE_LG2]
        offset = address - base
        if offset + len(data) > len(region):
            raise ValueError(f"{address:#x}, +{len(data):#x} leaves its region")
        region[offset : offset + len(data)] = data

    def flip(self, address, bit):
        """Invert one bit of the little-endian number at an address."""
        base, region = self._pages[address + bit // 8 >> PAGE_LG2]
        region[address + bit // 8 - base] ^= 1 << bit % 8


class BumpAllocator:
    """Backed, aligned pieces of one range of addresses, one after the other."""

    def __init__(self, memory, base, size):
        self.memory = memory
        self.next = base
        self.end = base + size
        memory.add(base, size)

    def __call__(self, size, alignment):
        address = -(-self.next // alignment) * alignment
        if address + size > self.end:
            raise MemoryError(f"no room for {size:#x} bytes")
        self.next = address + size
        return address


class PageTables:
    """Stage-1 tables of one TTB.

    allocate: (size, alignment) -> address of backed memory.
    tsz: TxSZ; addresses given to map() count by their low 64 - tsz bits only.
    start_level: where the first table is, which may then be several; None: where TxSZ says.
    """

    leaf_descriptor = staticmethod(leaf_descriptor)

    def __init__(
        self, memory, allocate, granule_lg2, tsz, *, ds=False, big_endian=False, start_level=None
    ):
        self.memory = memory
        self.allocate = allocate
        self.granule_lg2 = granule_lg2
        self.input_bits = 64 - tsz
        self.ds = ds and granule_lg2 != 16
        self.byteorder = "big" if big_endian else "little"
        index_bits = granule_lg2 - 3
        if start_level is None:
            # Levels needed: the ceiling of the bits above the page offset over those of a level.
            start_level = 4 - -(-(self.input_bits - granule_lg2) // index_bits)
        self.start_level = start_level
        entries_lg2 = self.input_bits - self.shift(self.start_level)
        # 64 bytes where the base needs more than 48 bits, which is harmless elsewhere.
        self.base = allocate(max(8 << entries_lg2, 64), max(8 << entries_lg2, 64))

    def shift(self, level):
        """Lowest address bit that a level resolves: log2 of a leaf there."""
        return self.granule_lg2 + (3 - level) * (self.granule_lg2 - 3)

    def index(self, va, level):
        """Entry of a table that an address selects; the start level has the bits that are left."""
        va &= (1 << self.input_bits) - 1
        index = va >> self.shift(level)
        return index if level == self.start_level else index & ((1 << self.granule_lg2 - 3) - 1)

    def read_descriptor(self, address):
        """A descriptor as a number."""
        return int.from_bytes(self.memory.read(address, 8), self.byteorder)

    def write_descriptor(self, address, descriptor):
        """Store a descriptor in the tables' byte order."""
        self.memory.write(address, descriptor.to_bytes(8, self.byteorder))

    def slot(self, va, level, **table_flags):
        """Address of the descriptor of va at a level; missing tables are made.

        Returns None where a descriptor on the way is not a table in memory.
        """
        table = self.base
        at = self.start_level
        while at < level:
            address = table + 8 * self.index(va, at)
            descriptor = self.read_descriptor(address)
            if descriptor == 0:
                table = self.allocate(1 << self.granule_lg2, 1 << self.granule_lg2)
                self.write_descriptor(
                    address, table_descriptor(self.granule_lg2, table, ds=self.ds, **table_flags)
                )
            elif descriptor & 0b11 == 0b11:
                table = self._next_table(descriptor)
                if self.memory.read(table, 1 << self.granule_lg2) is None:
                    return None
            else:
                return None
            at += 1
        return table + 8 * self.index(va, level)

    def _next_table(self, descriptor):
        address = descriptor & 0x0000_FFFF_FFFF_FFFF & -(1 << self.granule_lg2)
        if self.granule_lg2 == 16:
            return address | (descriptor >> 12 & 0xF) << 48
        if self.ds:
            high = descriptor & 0x0003_0000_0000_0000
            return address | high | (descriptor >> 8 & 0x3) << 50
        return address

    def map(self, va, pa, level=3, *, table_flags=None, **leaf):
        """Map the leaf that holds va at a level to the one that holds pa.

        table_flags: keywords of table_descriptor for tables made on the way.
        leaf: keywords of the stage's leaf descriptor.  Returns the descriptor's address, or None
        where an earlier descriptor is in the way.
        """
        address = self.slot(va, level, **(table_flags or {}))
        if address is not None:
            pa &= -(1 << self.shift(level))
            self.write_descriptor(
                address, self.leaf_descriptor(self.granule_lg2, level, pa, ds=self.ds, **leaf)
            )
        return address


class Stage2Tables(PageTables):
    """Stage-2 tables of one STE; tsz is S2T0SZ."""

    leaf_descriptor = staticmethod(stage2_leaf_descriptor)

    def ste_fields(self):
        """The STE fields that say where and what these tables are."""
        s2sl0_2, s2sl0 = S2SL0_CODES[self.granule_lg2][self.start_level]
        return {
            "s2aa64": 1, "s2ttb": self.base, "s2t0sz": 64 - self.input_bits, "s2sl0": s2sl0,
            "s2sl0_2": s2sl0_2, "s2tg": S2TG_CODES[self.granule_lg2], "s2ds": int(self.ds),
            "s2endi": int(self.byteorder == "big"),
        }  # fmt: skip


class StreamTable:
    """A stream table; only the pages that hold something are backed.

    reserve: (size, alignment) -> address of a range that nothing else uses, backed or not.
    log2size: what STRTAB_BASE_CFG.LOG2SIZE says; sidsize caps it.
    split: None for a linear table, else 6, 8 or 10.
    """

    def __init__(self, memory, reserve, log2size, sidsize=32, split=None):
        self.memory = memory
        self.reserve = reserve
        self.log2size = log2size
        self.split = split
        sids_lg2 = min(log2size, sidsize)
        if split is None:
            size = 64 << sids_lg2
            alignment = 64 << log2size
        else:
            size = max(64, 8 << max(0, sids_lg2 - split))
            alignment = max(64, 8 << max(0, log2size - split))
        self.base = reserve(size, alignment)

    @property
    def strtab_base_cfg(self):
        """STRTAB_BASE_CFG."""
        if self.split is None:
            return self.log2size
        return 1 << 16 | self.split << 6 | self.log2size

    def l1std_address(self, sid):
        """Where the L1STD of a StreamID is."""
        return self.base + (sid >> self.split) * 8

    def set_l1std(self, sid, span, l2ptr):
        """Write the L1STD of a StreamID."""
        address = self.l1std_address(sid)
        self.memory.ensure(address, 8)
        self.memory.write(address, encode_l1std(span, l2ptr))

    def ste_address(self, sid, span=None):
        """Where the STE of a StreamID is; a missing leaf table is made, for 2^(span-1) STEs."""
        if self.split is None:
            return self.base + sid * 64
        index = sid & ((1 << self.split) - 1)
        l1std = self.memory.read(self.l1std_address(sid), 8)
        l1std = int.from_bytes(l1std, "little") if l1std else 0
        if l1std:
            return (l1std & 0x00FF_FFFF_FFFF_FFC0) + index * 64
        span = self.split + 1 if span is None else span
        size = 64 << max(0, span - 1)
        leaf = self.reserve(size, size)
        self.set_l1std(sid, span, leaf)
        return leaf + index * 64

    def set_ste(self, sid, ste, span=None):
        """Write an STE.  Returns its address."""
        address = self.ste_address(sid, span)
        self.memory.ensure(address, 64)
        self.memory.write(address, ste)
        return address


class ContextTable:
    """A table of CDs; only the pages that hold something are backed.

    s1fmt: 0 linear, 1 two-level with 64 CDs a leaf, 2 with 1024.  s1cdmax 0: a single CD.
    """

    def __init__(self, memory, reserve, s1cdmax=0, s1fmt=0):
        self.memory = memory
        self.reserve = reserve
        self.s1cdmax = s1cdmax
        self.s1fmt = s1fmt
        self.leaf_lg2 = {1: 6, 2: 10}.get(s1fmt) if s1cdmax else None
        if self.leaf_lg2 is None:
            size = 64 << s1cdmax
        else:
            size = max(64, 8 << max(0, s1cdmax - self.leaf_lg2))
        self.base = reserve(size, size)

    def ste_fields(self):
        """The STE fields that say where and what this table is."""
        return {"s1contextptr": self.base, "s1cdmax": self.s1cdmax, "s1fmt": self.s1fmt}

    def l1cd_address(self, ssid):
        """Where the L1CD of a SubstreamID is."""
        return self.base + (ssid >> self.leaf_lg2) * 8

    def set_l1cd(self, ssid, l2ptr, v=1):
        """Write the L1CD of a SubstreamID."""
        address = self.l1cd_address(ssid)
        self.memory.ensure(address, 8)
        self.memory.write(address, encode_l1cd(l2ptr, v))

    def cd_address(self, ssid):
        """Where the CD of a SubstreamID is; a missing leaf table is made."""
        if self.leaf_lg2 is None:
            return self.base + ssid * 64
        l1cd = self.memory.read(self.l1cd_address(ssid), 8)
        leaf = int.from_bytes(l1cd, "little") & 0x00FF_FFFF_FFFF_F000 if l1cd else 0
        if not leaf:
            leaf = self.reserve(64 << self.leaf_lg2, 64 << self.leaf_lg2)
            self.set_l1cd(ssid, leaf)
        return leaf + (ssid & ((1 << self.leaf_lg2) - 1)) * 64

    def set_cd(self, ssid, cd):
        """Write a CD.  Returns its address."""
        address = self.cd_address(ssid)
        self.memory.ensure(address, 64)
        self.memory.write(address, cd)
        return address
