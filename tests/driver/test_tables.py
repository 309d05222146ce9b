"""Pages, PageTable and Gather, rule by rule; what is mapped is judged by the SMMU.

Follows F49 to F56 of docs/domains.md; DDI 0487 D8.2, D8.3.
"""

import errno
import gc
import itertools
import pickle
import random

import numpy as np
import pytest
from ptwriter import leaf_descriptor, stage2_leaf_descriptor
from tablesystem import SID, STREAMS, TABLES, System, live_tables, pages

from smmufast import Memory
from smmufast._driver.tables import (
    CACHE,
    MMIO,
    NOEXEC,
    PRIV,
    READ,
    WRITE,
    Pages,
    PageTable,
)
from smmufast.errors import (
    Busy,
    Exists,
    InvalidArgument,
    NotSupported,
    OutOfMemory,
    OutOfRange,
)

K4, K16, K64, M2, M32, M512, G1, T4 = (
    1 << 12, 1 << 14, 1 << 16, 1 << 21, 1 << 25, 1 << 29, 1 << 30, 1 << 42,
)  # fmt: skip
RW = READ | WRITE


class Domain(PageTable):
    """A page table that records its flushes, and what is there while they run."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.flushes = []
        self.watch = None
        self.error = None
        self.active = True

    def flush(self, first, last, page_lg2, tables):
        assert isinstance(tables, bool)
        self.flushes.append((first, last, page_lg2, tables))
        if self.watch:
            self.watch()
        if self.error:
            raise self.error

    def taken(self):
        """The flushes since the last time."""
        flushes, self.flushes = self.flushes, []
        return flushes


def domain(size=1 << 22, **keywords):
    """A Domain in memory of its own."""
    return Domain(pages(size)[1], **keywords)


def descriptor(table, iova):
    """(level, descriptor, its address) of what translates an address."""
    lg2 = table.granule.bit_length() - 1
    address, level = table.root, table.start_level
    while True:
        shift = lg2 + (3 - level) * (lg2 - 3)
        index = iova >> shift
        if level != table.start_level:
            index &= (1 << lg2 - 3) - 1
        d = table.pages.memory.read_u64(address + 8 * index)
        if level == 3 or d & 3 != 3:
            return level, d, address + 8 * index
        address = d & 0xFFFF_FFFF_F000 & -(1 << lg2)
        if lg2 == 16:
            address |= (d >> 12 & 15) << 48
        level += 1


# --- Pages ---


def test_blocks_are_aligned_zeroed_and_apart():
    memory, own = pages(1 << 20)
    memory.write(TABLES, b"\xff" * (1 << 20))
    sizes = [1, 64, 65, 100, 4096, 4097, 16384, 65536, 64, 8192, 2048]
    blocks = [(own.alloc(size), max(64, 1 << (size - 1).bit_length())) for size in sizes]
    for address, size in blocks:
        assert address % size == 0 and memory.read(address, size) == bytes(size)
        assert address >= TABLES and address + size <= TABLES + (1 << 20)
    blocks.sort()
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(blocks))
    assert (own.in_use, own.blocks) == (sum(size for _, size in blocks), len(blocks))
    for address, size in blocks:
        own.free(address, size)
    assert (own.in_use, own.blocks) == (0, 0)
    assert own.alloc(1 << 20) == TABLES


@pytest.mark.parametrize(
    ("base", "size"), [(0x8000_0000, 1 << 16), (0x8000_1040, 0x1_2340), (64, 64), (0xFC0, 0x1080)]
)
def test_every_byte_is_handed_out_and_comes_together_again(base, size):
    memory = Memory()
    memory.add(bytearray(1 << 18), base & ~0xFFF)
    own = Pages(memory, base, size)
    found = []
    with pytest.raises(OutOfMemory) as raised:
        while True:
            found.append(own.alloc(64))
    assert raised.value.errno == errno.ENOMEM and isinstance(raised.value, MemoryError)
    assert sorted(found) == list(range(base, base + size, 64))
    assert own.in_use == size
    random.Random(1).shuffle(found)
    for address in found:
        own.free(address, 64)
    largest = 1 << size.bit_length() - 1
    while not any(at + largest <= base + size for at in range(-(-base // largest) * largest,
                                                              base + size, largest)):
        largest >>= 1  # fmt: skip
    assert base <= own.alloc(largest) <= base + size - largest


def test_random_blocks_never_overlap():
    _, own = pages(1 << 18)
    rng = random.Random(2)
    held = {}
    for _ in range(4000):
        if held and rng.random() < 0.5:
            address = rng.choice(list(held))
            own.free(address, held.pop(address))
            continue
        size = 1 << rng.randrange(6, 16)
        try:
            address = own.alloc(size)
        except OutOfMemory:
            # no aligned piece of that size is free of blocks
            for at in range(TABLES, TABLES + (1 << 18), size):
                assert any(a < at + size and at < a + n for a, n in held.items())
            continue
        assert address % size == 0
        assert all(a + n <= address or address + size <= a for a, n in held.items())
        held[address] = size
        assert own.in_use == sum(held.values())


def test_a_block_is_taken_back_once_and_with_its_size():
    _, own = pages(1 << 16)
    address = own.alloc(4096)
    for at, size in [
        (address, 2048), (address, 8192), (address + 64, 64), (address + 4096, 4096), (address, 0),
        (0, 4096), (TABLES - 4096, 4096), (1 << 63, 4096), (address, 1 << 40),
    ]:  # fmt: skip
        with pytest.raises(InvalidArgument):
            own.free(at, size)
    assert own.blocks == 1
    own.free(address, 2049)
    with pytest.raises(InvalidArgument, match="no such block"):
        own.free(address, 4096)
    assert (own.in_use, own.blocks) == (0, 0)


def test_pages_say_what_they_do_not_take():
    memory = Memory()
    memory.add(bytearray(8192), 0x1000)
    memory.add(bytearray(4096), 0x3000)
    memory.add(bytes(4096), 0x8000)
    for base, size in [
        (0x1000, 0), (0x1020, 64), (0x1000, 100), (0x1000, 1 << 45), (0x2000, 0x2000), (0, 4096),
        (0x8000, 64), (-64, 64), (0x1000, 1 << 70),
    ]:  # fmt: skip
        with pytest.raises(InvalidArgument):
            Pages(memory, base, size)
    with pytest.raises(TypeError):
        Pages(memory, 0x1000, 64.0)
    with pytest.raises(TypeError):
        Pages(None, 0x1000, 64)
    own = Pages(memory, np.uint64(0x1000), 8192)
    assert (own.base, own.size, own.memory) == (0x1000, 8192, memory)
    for size in (0, -1):
        with pytest.raises(InvalidArgument, match="size"):
            own.alloc(size)
    with pytest.raises(OutOfMemory):
        own.alloc(8193)
    with pytest.raises(TypeError, match="size"):
        own.alloc("1")
    with pytest.raises(InvalidArgument):
        own.__init__(memory, 0x3000, 4096)
    with pytest.raises(TypeError):
        pickle.dumps(own)


def test_memory_keeps_its_regions_while_pages_lie_there():
    memory = Memory()
    memory.add(bytearray(4096), 0x1000)
    own = Pages(memory, 0x1000, 4096)
    with pytest.raises(BufferError):
        memory.remove(0x1000)
    del own
    gc.collect()
    memory.remove(0x1000)
    assert memory.regions == []


def test_an_allocation_fails_when_told_and_only_that():
    _, own = pages(1 << 16)
    own.fail_after(2)
    for fails in (False, False, True, False, False):
        if fails:
            with pytest.raises(OutOfMemory):
                own.alloc(64)
        else:
            own.alloc(64)
    own.fail_after(0)
    own.fail_after(None)
    assert own.alloc(64) and own.blocks == 5
    with pytest.raises(InvalidArgument):
        own.fail_after(-1)


def test_private_memory_of_tables_is_copied():
    system = System()
    system.table.map(0x1000, 0x5000, K4)
    twin = system.memory.copy()
    assert twin.read(TABLES, 1 << 20) == system.memory.read(TABLES, 1 << 20)
    assert any(twin.read(TABLES, 1 << 16))


# --- F49: geometry ---


@pytest.mark.parametrize(
    ("granule", "oas", "sizes"),
    [
        (K4, 48, K4 | M2 | G1),
        (K16, 48, K16 | M32),
        (K64, 48, K64 | M512),
        (K64, 52, K64 | M512 | T4),
    ],
)
def test_f49_granules_have_their_block_sizes(granule, oas, sizes):
    system = System(granule=granule, oas=oas)
    assert system.table.page_sizes == sizes
    for lg2 in (bit for bit in range(64) if sizes >> bit & 1):
        size = 1 << lg2
        system.table.map(size * 3, size * 2, size)
        assert system.translate(size * 3 + 5).page_size == size
        assert system.pa(size * 3 + 5) == size * 2 + 5
        assert system.table.unmap(size * 3, size) == size


@pytest.mark.parametrize(
    ("granule", "ias", "start", "entries"),
    [
        (K4, 48, 0, 512), (K4, 40, 0, 2), (K4, 39, 1, 512), (K4, 31, 1, 2), (K4, 30, 2, 512),
        (K4, 25, 2, 16), (K16, 48, 0, 2), (K16, 47, 1, 2048), (K16, 37, 1, 2), (K16, 36, 2, 2048),
        (K16, 26, 2, 2), (K16, 25, 3, 2048), (K64, 48, 1, 64), (K64, 52, 1, 1024),
        (K64, 43, 1, 2), (K64, 42, 2, 8192), (K64, 30, 2, 2), (K64, 29, 3, 8192), (K64, 25, 3, 512),
    ],
)  # fmt: skip
def test_f49_levels_follow_from_the_input_size(granule, ias, start, entries):
    system = System(granule=granule, ias=ias)
    table = system.table
    assert (table.start_level, table.t0sz) == (start, 64 - ias)
    assert table.table_bytes == system.pages.in_use == max(64, 8 * entries)
    last = (1 << ias) - granule
    table.map(last, granule, granule)
    assert system.pa(last + 7) == granule + 7
    assert system.translate(1 << ias).event.number == 0x10
    first = system.translate(last, trace=True).fetches[2]
    assert first.level == start
    assert first.address == table.root + 8 * (entries - 1)


@pytest.mark.parametrize(
    ("granule", "ias", "oas", "start", "side_by_side", "sl0"),
    [
        (K4, 48, 48, 0, 1, 2), (K4, 44, 44, 0, 1, 2), (K4, 42, 42, 1, 8, 1), (K4, 40, 42, 1, 2, 1),
        (K4, 40, 40, 1, 2, 1), (K4, 39, 40, 1, 1, 1), (K4, 32, 40, 1, 1, 1), (K4, 30, 32, 2, 1, 0),
        (K16, 48, 48, 1, 2, 2), (K16, 47, 48, 1, 1, 2), (K16, 42, 42, 1, 1, 2),
        (K16, 40, 40, 2, 16, 1), (K16, 37, 40, 2, 2, 1), (K16, 36, 36, 2, 1, 1),
        (K16, 25, 32, 3, 1, 0), (K64, 52, 52, 1, 1, 2), (K64, 44, 44, 1, 1, 2),
        (K64, 42, 42, 2, 1, 1), (K64, 44, 42, 2, 4, 1), (K64, 29, 32, 3, 1, 0),
    ],
)  # fmt: skip
def test_f49_stage_2_concatenates_first_tables(granule, ias, oas, start, side_by_side, sl0):
    system = System(stage=2, granule=granule, ias=ias, oas=oas)
    table = system.table
    assert (table.start_level, table.sl0) == (start, sl0)
    bits = granule.bit_length() - 4
    below = granule.bit_length() - 1 + (3 - start) * bits
    assert max(1, 1 << max(0, ias - below - bits)) == side_by_side
    assert table.root % system.pages.in_use == 0
    if ias > oas:
        return  # no SMMU of that output size takes it
    for at in range(0, 1 << ias, (1 << ias) // 16):
        table.map(at, granule, granule)
        assert system.pa(at + 9) == granule + 9
        assert system.translate(at).stage == 2
        assert table.iova_to_phys(at + 9) == granule + 9
    assert system.translate(1 << ias).pa is None


@pytest.mark.parametrize(
    ("keywords", "argument"),
    [
        ({"stage": 3}, "stage"), ({"stage": 0}, "stage"), ({"granule": 8192}, "granule"),
        ({"ias": 49}, "ias"), ({"ias": 24}, "ias"), ({"granule": K64, "ias": 53}, "ias"),
        ({"ias": -1}, "ias"), ({"oas": 52}, "oas"), ({"oas": 39}, "oas"),
        ({"granule": K16, "oas": 52}, "oas"), ({"page_sizes": 0}, "page_sizes"),
        ({"page_sizes": K16}, "page_sizes"), ({"ias": 30, "page_sizes": G1}, "page_sizes"),
        ({"stage": 2, "ias": 48, "oas": 42}, "ias"),
        ({"stage": 2, "granule": K64, "ias": 48, "oas": 42}, "ias"),
    ],
)  # fmt: skip
def test_what_is_no_page_table_is_refused(keywords, argument):
    _, own = pages()
    with pytest.raises(InvalidArgument) as raised:
        PageTable(own, **keywords)
    assert raised.value.argument == argument and raised.value.errno == errno.EINVAL
    assert own.blocks == 0


def test_codes_are_those_of_cd_and_vtcr():
    _, own = pages()
    for granule, tg in ((K4, 0), (K16, 2), (K64, 1)):
        for ps, oas in enumerate((32, 36, 40, 42, 44, 48)):
            table = PageTable(own, granule=granule, oas=oas, ias=40)
            assert (table.tg, table.ps, table.t0sz, table.sl0) == (tg, ps, 24, 0)
    assert PageTable(own, granule=K64, oas=52).ps == 6
    table = PageTable(own)
    assert table.mair == 0xF404FF44
    assert (table.irgn, table.orgn, table.sh) == (1, 1, 3)
    loose = PageTable(own, coherent=False, stage=2)
    assert (loose.irgn, loose.orgn, loose.sh, loose.mair) == (0, 0, 2, 0)
    assert (table.stage, table.granule, table.ias, table.oas) == (1, K4, 48, 48)
    assert (loose.coherent, loose.dirty, loose.contiguous, loose.fwb) == (False,) * 4


def test_page_sizes_are_those_that_the_smmu_has():
    system = System(page_sizes=K4 | K64 | M2 | M32)
    assert system.table.page_sizes == K4 | M2
    system.table.map(G1, 0, G1)
    assert system.translate(G1 + 5).page_size == M2
    big = System(page_sizes=M2 | G1)
    with pytest.raises(InvalidArgument, match="0x200000"):
        big.table.map(K4, 0, M2)
    assert big.table.unmap(0, K4) == 0
    big.table.map(M2, M2, M2)
    assert big.translate(M2).page_size == M2


# --- the contents of leaves ---


def stage1(prot):
    """ap, attrindx, sh, xn of a leaf, from appendix A."""
    ap = (0 if prot & PRIV else 1) | (0 if prot & WRITE else 2)
    attrindx = 2 if prot & MMIO else 1 if prot & CACHE else 0
    return ap, attrindx, 3 if prot & CACHE else 2, int(prot & NOEXEC > 0)


ATTRIBUTES = {0: 0x44, 1: 0xFF, 2: 0x04}


@pytest.mark.parametrize("prot", [prot for prot in range(64) if prot & 3])
def test_every_permission_is_written_and_judged_at_stage_1(prot):
    system = System()
    system.table.map(M2, M2, M2 + K4, prot)
    ap, attrindx, sh, xn = stage1(prot)
    for iova, level in ((M2, 2), (2 * M2, 3)):
        wanted = leaf_descriptor(
            12, level, iova, attrindx=attrindx, ap=ap, sh=sh, ng=1, pxn=xn, uxn=xn
        )
        assert descriptor(system.table, iova)[:2] == (level, wanted)
        for priv in (False, True):
            mine = priv or not prot & PRIV
            assert bool(system.translate(iova, priv=priv)) == mine
            assert bool(system.translate(iova, priv=priv, write=True)) == (
                mine and prot & WRITE > 0
            )
            # what is writable without privilege is not executed with it
            runs = not prot & NOEXEC and not (priv and prot & WRITE and not prot & PRIV)
            runs = runs or (not priv and not prot & NOEXEC)
            assert bool(system.translate(iova, priv=priv, instr=True)) == runs
        found = system.translate(iova, priv=True)
        assert found.attr == ATTRIBUTES[attrindx]
        assert found.shareability == (sh if attrindx == 1 else 2)
        assert found.is_global is False


@pytest.mark.parametrize("fwb", [False, True])
@pytest.mark.parametrize("prot", [prot for prot in range(64) if prot & 3])
def test_every_permission_is_written_and_judged_at_stage_2(prot, fwb):
    system = System(stage=2, fwb=fwb)
    system.table.map(M2, M2, M2 + K4, prot)
    cached = 6 if fwb else 15
    memattr = 1 if prot & MMIO else cached if prot & CACHE else 5
    for iova, level in ((M2, 2), (2 * M2, 3)):
        wanted = stage2_leaf_descriptor(
            12, level, iova, memattr=memattr, s2ap=prot & 3, sh=3 if prot & CACHE else 2,
            xn=2 if prot & NOEXEC else 0,
        )  # fmt: skip
        assert descriptor(system.table, iova)[:2] == (level, wanted)
        for priv in (False, True):
            assert bool(system.translate(iova, priv=priv)) == (prot & READ > 0)
            assert bool(system.translate(iova, priv=priv, write=True)) == (prot & WRITE > 0)
            assert bool(system.translate(iova, priv=priv, instr=True)) == (not prot & NOEXEC)
    found = system.translate(M2, write=not prot & READ)
    assert found.attr == (0x04 if prot & MMIO else 0xFF if prot & CACHE else 0x44)


# --- F50: map refuses ---


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        ((0x1001, 0, K4), InvalidArgument, "iova"),
        ((0, 0x800, K4), InvalidArgument, "pa"),
        ((0, 0, 0x1800), InvalidArgument, "size"),
        ((1 << 40, 0, K4), OutOfRange, "iova"),
        (((1 << 40) - K4, 0, 2 * K4), OutOfRange, "iova"),
        ((0, 0, 1 << 41), OutOfRange, "iova"),
        ((-K4 % (1 << 64), 0, K4), OutOfRange, "iova"),
        ((0, 1 << 42, K4), OutOfRange, "pa"),
        ((0, (1 << 42) - K4, 2 * K4), OutOfRange, "pa"),
        ((0, -K4 % (1 << 64), K4), OutOfRange, "pa"),
        ((0, 0, K4, 0), InvalidArgument, "prot"),
        ((0, 0, K4, CACHE | NOEXEC | MMIO | PRIV), InvalidArgument, "prot"),
        ((0, 0, K4, RW | 64), InvalidArgument, "prot"),
        ((-K4, 0, K4), InvalidArgument, "iova"),
        ((0, 1 << 64, K4), InvalidArgument, "pa"),
        ((0, 0, 1 << 64), InvalidArgument, "size"),
    ],
)
def test_f50_map_refuses_what_the_kernel_refuses(stage, call, error, argument):
    system = System(stage=stage, ias=40, oas=42)
    before = live_tables(system.memory, system.table)
    with pytest.raises(error) as raised:
        system.table.map(*call)
    assert type(raised.value) is error and raised.value.argument == argument
    assert raised.value.errno == {InvalidArgument: errno.EINVAL, OutOfRange: errno.ERANGE}[error]
    assert live_tables(system.memory, system.table) == before
    assert system.table.mapped == 0
    iova, pa, size, *prot = call
    if argument != "iova" or iova % K4 or iova < 0:
        with pytest.raises(error):
            system.table.map_sg(iova, [(pa, size)], *prot)
    with pytest.raises(error):
        system.table.map_sg(iova, [(0, K4), (pa, size)], *prot)
    assert live_tables(system.memory, system.table) == before


def test_f50_messages_name_what_was_given_and_what_is_allowed():
    table = System(ias=40).table
    with pytest.raises(InvalidArgument, match=r"iova must be a multiple of 0x1000, not 0x1001"):
        table.map(0x1001, 0, K4)
    with pytest.raises(OutOfRange, match=r"0x10000000000.*beyond 0xffffffffff, the last of 40"):
        table.map(1 << 40, 0, K4)
    with pytest.raises(InvalidArgument, match=r"prot must be 0 to 0x3f with READ.*not 4"):
        table.map(0, 0, K4, CACHE)
    with pytest.raises(TypeError, match="size must be an integer, not float"):
        table.map(0, 0, 4096.0)
    with pytest.raises(TypeError, match="prot must be an integer, not NoneType"):
        table.map(0, 0, K4, None)
    table.map(0, 0, K4)
    with pytest.raises(Exists, match="iova 0x0 is mapped already") as raised:
        table.map(0, 0, K4)
    assert raised.value.errno == errno.EEXIST


def test_f50_nothing_is_mapped_by_zero_bytes():
    system = System()
    before = live_tables(system.memory, system.table)
    assert system.table.map(0, 0, 0) is None
    assert system.table.map_sg(0, []) == 0
    assert system.table.map_sg(K4, [(0, 0), (K4, 0)]) == 0
    assert live_tables(system.memory, system.table) == before
    with pytest.raises(InvalidArgument):
        system.table.map(1, 0, 0)
    with pytest.raises(OutOfRange):
        system.table.map(1 << 48, 0, 0)


@pytest.mark.parametrize("granule", [K4, K16, K64])
@pytest.mark.parametrize("stage", [1, 2])
def test_f50_a_leaf_in_the_way_undoes_all_of_a_map(granule, stage):
    system = System(stage=stage, granule=granule)
    table = system.table
    block = granule * granule // 8
    for at in (0, granule, block - granule, block, 2 * block, 3 * block + 5 * granule):
        table.map(at, granule, granule if at < 2 * block else 2 * granule)
        before = live_tables(system.memory, table), table.mapped, system.pages.in_use
        for iova, size in (
            (0, 4 * block), (at, granule), (at & -block, block), (max(0, at - granule), 3 * granule)
        ):  # fmt: skip
            with pytest.raises(Exists) as raised:
                table.map(iova, iova, size)
            assert raised.value.value & -block <= at <= raised.value.value | (block - 1)
            with pytest.raises(Exists):
                table.map_sg(iova, [(0, granule), (block, size)])
            found = live_tables(system.memory, table), table.mapped, system.pages.in_use
            assert found == before
        assert table.unmap(at, 2 * granule) >= granule


def test_f50_a_page_under_a_block_is_in_the_way_of_both():
    system = System()
    system.table.map(G1, G1, G1)
    for iova, size in ((G1, K4), (G1 + M2, M2), (G1 + K4, M2), (2 * G1 - K4, K4)):
        with pytest.raises(Exists):
            system.table.map(iova, 0, size)
    assert system.pa(2 * G1 - 1) == 2 * G1 - 1


# --- F51: a block where a table is ---


@pytest.mark.parametrize("stage", [1, 2])
def test_f51_an_empty_table_gives_way_to_a_block_after_a_flush(stage):
    table = domain(stage=stage)
    for i in range(512):
        table.map(M2 + i * K4, i * K4, K4)
    for i in range(512):
        assert table.unmap(M2 + i * K4, K4) == K4
    assert descriptor(table, M2)[0] == 3
    table.taken()
    blocks = table.pages.blocks
    _, _, at = descriptor(table, 0)
    seen = []
    # at the flush: the entry is clear, the block is not there yet, the table is not given back
    table.watch = lambda: seen.append(
        (table.pages.memory.read_u64(at + 8), table.pages.blocks == blocks)
    )
    table.map(M2, M2, M2)
    assert seen == [(0, True)]
    assert table.taken() == [(M2, 2 * M2 - 1, 12, True)]
    assert table.pages.blocks == blocks - 1
    assert descriptor(table, M2)[:2] == (2, descriptor(table, M2)[1])
    assert table.iova_to_phys(M2 + 5) == M2 + 5 and table.mapped == M2


def test_f51_a_live_page_keeps_a_table():
    table = domain()
    table.map(G1 + 5 * M2 + K4, 0, K4)
    table.map(G1 + 7 * M2, 0, K4)
    table.unmap(G1 + 7 * M2, K4)
    table.taken()
    before = live_tables(table.pages.memory, table)
    with pytest.raises(Exists):
        table.map(G1, 0, G1)
    assert live_tables(table.pages.memory, table) == before and table.taken() == []
    table.unmap(G1 + 5 * M2 + K4, K4)
    table.taken()
    table.map(0, 0, 3 * G1)  # the whole subtree goes: one table of level 2, two of level 3
    assert table.taken() == [(G1, 2 * G1 - 1, 12, True)]
    assert table.table_bytes == 2 * K4
    assert table.pages.in_use == 2 * K4


def test_f51_a_flush_that_raises_puts_the_table_back():
    table = domain()
    for at in (M2, 5 * M2):
        table.map(at + K4, 0, K4)
        table.unmap(at + K4, K4)
    before = live_tables(table.pages.memory, table), table.table_bytes, table.mapped
    table.error = KeyError("flush")
    with pytest.raises(KeyError):
        table.map(0, 0, 8 * M2)
    assert (live_tables(table.pages.memory, table), table.table_bytes, table.mapped) == before
    table.error = None
    table.map(M2 + K4, K4, K4)
    assert table.iova_to_phys(M2 + K4) == K4
    assert table.unmap(M2 + K4, K4) == K4
    table.taken()
    table.map(0, 0, 8 * M2)
    assert table.taken() == [(M2, 6 * M2 - 1, 12, True)]
    table.close()
    assert table.pages.blocks == 0


def test_f51_a_table_that_is_not_active_is_not_flushed():
    table = domain()
    table.active = False
    table.map(0, 0, K4)
    table.unmap(0, K4)
    table.map(0, 0, M2)
    assert table.flushes == [] and descriptor(table, 0)[0] == 2


# --- F52: unmap ---


def test_f52_unmap_returns_bytes_up_to_the_first_hole():
    system = System()
    table = system.table
    table.map(0, 0, 8 * K4)
    table.map(9 * K4, 9 * K4, K4)
    assert table.unmap(10 * K4, K4) == 0
    assert table.unmap(2 * K4, 100 * K4) == 6 * K4
    assert table.unmap(2 * K4, 100 * K4) == 0
    assert [system.pa(i * K4) is None for i in range(10)] == [False] * 2 + [True] * 7 + [False]
    assert table.mapped == 3 * K4


def test_f52_unmap_of_what_is_not_aligned_does_nothing():
    table = System().table
    table.map(0, 0, 2 * K4)
    for iova, size in (
        (1, K4), (0, 1), (0, 0x1001), (0x800, 0x800), (0, 0), (1 << 48, K4), (-K4 % 2**64, K4),
    ):  # fmt: skip
        assert table.unmap(iova, size) == 0
    assert table.mapped == 2 * K4
    assert table.unmap(0, -K4 % 2**64) == 2 * K4
    with pytest.raises(InvalidArgument):
        table.unmap(-K4, K4)
    with pytest.raises(TypeError, match="iova"):
        table.unmap(None, K4)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("granule", "block"), [(K4, M2), (K4, G1), (K16, M32), (K64, M512), (K64, T4)]
)
def test_f52_unmap_of_part_of_a_block_takes_all_of_it(granule, block, stage):
    sizes = {"ias": 52, "oas": 52} if block == T4 else {}
    table = domain(stage=stage, granule=granule, **sizes)
    table.map(block, block, 2 * block)
    assert table.unmap(block, granule) == block
    assert table.taken() == [(block, 2 * block - 1, block.bit_length() - 1, False)]
    assert table.iova_to_phys(2 * block) == 2 * block
    # a block that begins below the range stays
    assert table.unmap(2 * block + granule, granule) == 0
    assert table.mapped == block
    table.map(2 * block - granule, 0, granule)
    assert table.unmap(2 * block - granule, 2 * granule) == granule + block
    assert table.mapped == 0


def test_f52_unmap_crosses_tables_and_page_sizes():
    table = domain()
    table.map(M2 - 3 * K4, M2 - 3 * K4, 3 * K4 + M2 + 2 * K4)
    table.taken()
    assert table.unmap(M2 - 3 * K4, 3 * K4 + M2 + 2 * K4) == 5 * K4 + M2
    assert table.taken() == [
        (M2 - 3 * K4, M2 - 1, 12, False),
        (M2, 2 * M2 - 1, 21, False),
        (2 * M2, 2 * M2 + 2 * K4 - 1, 12, False),
    ]


# --- tables that become empty ---


def test_a_table_that_an_unmap_covers_goes_after_its_flush():
    table = domain()
    table.map(0, K4, G1)
    assert table.table_bytes == (3 + 512) * K4
    alive = []
    table.watch = lambda: alive.append(table.pages.blocks)
    assert table.unmap(0, G1) == G1
    assert table.taken() == [(0, G1 - 1, 12, True)]
    assert alive == [3 + 512]
    # the first table of level 1 covers more than was unmapped
    assert table.table_bytes == table.pages.in_use == 2 * K4
    table.map(0, K4, 2 * M2)
    table.unmap(K4, 2 * M2 - K4)
    assert table.table_bytes == 4 * K4  # that of the first page stays
    table.unmap(0, 512 * G1)
    assert table.table_bytes == K4  # the root alone


def test_a_table_that_is_empty_at_a_hole_goes_if_it_is_covered():
    table = domain()
    table.map(M2, 0, 2 * K4)
    table.unmap(M2, K4)
    table.unmap(M2 + K4, K4)
    assert table.table_bytes == 4 * K4
    table.taken()
    assert table.unmap(M2, M2 - K4) == 0
    assert table.table_bytes == 4 * K4 and table.taken() == []
    assert table.unmap(M2, M2) == 0
    assert table.taken() == [(M2, 2 * M2 - 1, 12, True)]
    assert table.table_bytes == 3 * K4


def test_tables_that_become_empty_in_pieces_are_bounded():
    table = domain(1 << 24)
    for i in range(1000):
        table.map(i * M2, 0, K4)
        assert table.unmap(i * M2, K4) == K4
        assert table.table_bytes <= (64 + 8) * K4
    assert table.mapped == 0
    freed = [flush for flush in table.taken() if flush[3]]
    assert len(freed) <= 1000 // 60 + 1
    for first, last, page_lg2, _ in freed:
        assert page_lg2 == 12 and first % M2 == 0 and (last + 1) % M2 == 0


def test_tables_that_become_empty_in_pieces_serve_the_next_map():
    table = domain()
    table.map(0, 0, K4)
    for _ in range(200):
        table.unmap(0, K4)
        table.map(0, 0, K4)
    assert table.table_bytes == 4 * K4
    assert not any(tables for _, _, _, tables in table.taken())


# --- F53: the choice of page sizes ---


def leaves(system, iova, size):
    """(iova, page size) of the leaves of a range, as the SMMU finds them."""
    found = []
    end = iova + size
    while iova < end:
        result = system.translate(iova)
        found.append((iova, result.page_size))
        iova += result.page_size
    return found


def test_f53_the_largest_page_that_fits_is_taken():
    system = System()
    base = G1 - M2 - K4
    system.table.map(base, base, G1 + 2 * M2 + 3 * K4)
    assert leaves(system, base, G1 + 2 * M2 + 3 * K4) == [
        (base, K4), (G1 - M2, M2), (G1, G1), (2 * G1, M2), (2 * G1 + M2, K4),
        (2 * G1 + M2 + K4, K4),
    ]  # fmt: skip


def test_f53_addresses_that_disagree_take_smaller_pages():
    system = System()
    system.table.map(G1, M2, G1)
    assert {size for _, size in leaves(system, G1, G1)} == {M2}
    system.table.map(2 * G1, K4, M2)
    assert {size for _, size in leaves(system, 2 * G1, M2)} == {K4}


def test_f53_pieces_that_continue_each_other_are_one():
    system = System()
    pieces = [(G1 + i * K64, K64) for i in range(32)]
    assert system.table.map_sg(M2, pieces) == M2
    assert system.translate(M2).page_size == M2
    pieces.reverse()
    assert system.table.map_sg(2 * M2, iter(pieces)) == M2
    assert system.translate(2 * M2).page_size == K4
    assert [system.pa(2 * M2 + i * K64) for i in range(32)] == [pa for pa, _ in pieces]


def test_f53_a_terabyte_takes_one_call():
    system = System()
    system.table.map(1 << 40, 1 << 40, 2 << 40)
    assert system.table.table_bytes == (1 + 4) * K4
    assert system.translate(3 << 39).page_size == G1
    assert system.table.unmap(1 << 40, 2 << 40) == 2 << 40
    assert system.table.table_bytes == K4


# --- F54: iova_to_phys ---


@pytest.mark.parametrize("granule", [K4, K16, K64])
def test_f54_iova_to_phys_gives_the_base_and_the_offset(granule):
    system = System(granule=granule)
    block = granule * granule // 8
    system.table.map(block, 3 * block, block + granule)
    for offset in (0, 1, granule - 1, granule, block - 1, block, block + granule - 1):
        assert system.table.iova_to_phys(block + offset) == 3 * block + offset
        assert system.pa(block + offset) == 3 * block + offset
    for iova in (0, block - 1, 2 * block + granule, 1 << 48, (1 << 64) - 1):
        assert system.table.iova_to_phys(iova) == 0
    with pytest.raises(InvalidArgument):
        system.table.iova_to_phys(1 << 64)
    with pytest.raises(TypeError, match="iova"):
        system.table.iova_to_phys("0")


def test_memory_is_the_only_truth():
    system = System()
    system.table.map(0, K4, 4 * K4)
    _, d, at = descriptor(system.table, K4)
    system.memory.write_u64(at, 0)
    assert system.table.iova_to_phys(K4) == 0
    assert system.table.unmap(0, 4 * K4) == K4
    system.memory.write_u64(at, d)
    assert system.table.iova_to_phys(K4) == 2 * K4
    with pytest.raises(Exists):
        system.table.map(K4, 0, K4)
    assert system.table.unmap(K4, 4 * K4) == 3 * K4


# --- F55: dirty state ---


def dirty_system(**keywords):
    return System(dirty=True, cd={"ha": 1, "hd": 1}, **keywords)


def test_f55_a_leaf_is_dirty_with_dbm_and_without_ap2():
    system = dirty_system()
    table = system.table
    table.map(0, 0, 4 * K4)
    table.map(4 * K4, 0, K4, READ)
    _, d, _ = descriptor(table, 0)
    assert d == leaf_descriptor(12, 3, 0, ap=1, sh=2, ng=1, dbm=1)
    assert descriptor(table, 4 * K4)[1] == leaf_descriptor(12, 3, 0, ap=3, sh=2, ng=1)
    # what was just mapped counts as written
    found = table.read_dirty(0, 6 * K4)
    assert found.tolist() == [True] * 4 + [False] * 2 and found.dtype == bool
    assert descriptor(table, 0)[1] == leaf_descriptor(12, 3, 0, ap=3, sh=2, ng=1, dbm=1)
    assert not table.read_dirty(0, 6 * K4).any()
    assert system.translate(K4) and system.translate(2 * K4, write=True)
    assert not system.translate(4 * K4, write=True)
    assert table.read_dirty(0, 6 * K4, clear=False).tolist() == [False] * 2 + [True] + [False] * 3
    assert table.read_dirty(0, 6 * K4).sum() == 1
    assert not table.read_dirty(0, 6 * K4).any()


@pytest.mark.parametrize(("granule", "block"), [(K4, M2), (K16, M32), (K64, M512)])
def test_f55_a_block_is_dirty_as_a_whole(granule, block):
    system = dirty_system(granule=granule)
    table = system.table
    table.map(block, block, 2 * block)
    n = block // granule
    assert table.read_dirty(block, 2 * block).all()
    assert system.translate(block + 5 * granule, write=True)
    found = table.read_dirty(block - granule, 2 * block)
    assert not found[0] and found[1 : n + 1].all() and not found[n + 1 :].any()
    assert system.translate(2 * block, write=True)
    # not made clean by those who ask for a part
    assert table.read_dirty(2 * block + granule, granule).tolist() == [True]
    assert table.read_dirty(2 * block, block - granule).all()
    assert table.read_dirty(2 * block, block).all()
    assert not table.read_dirty(2 * block, block).any()


def test_f55_what_was_made_clean_is_flushed():
    table = domain(dirty=True)
    table.map(M2 - 2 * K4, M2 - 2 * K4, M2 + 2 * K4)
    table.read_dirty(0, 2 * M2, clear=False)
    assert table.taken() == []
    table.read_dirty(0, 3 * M2)
    assert table.taken() == [(M2 - 2 * K4, 2 * M2 - 1, 12, False)]
    table.read_dirty(0, 3 * M2)
    assert table.taken() == []


def test_f55_read_dirty_refuses_what_the_kernel_refuses():
    table = System(dirty=True, ias=40).table
    for iova, size in ((0, 0), (0, 100), (5, K4), (1 << 40, K4), ((1 << 40) - K4, 2 * K4)):
        with pytest.raises(InvalidArgument):
            table.read_dirty(iova, size)
    with pytest.raises(InvalidArgument, match="stage 1"):
        System(stage=2).table.read_dirty(0, K4)
    with pytest.raises(NotSupported):
        System().table.read_dirty(0, K4)
    with pytest.raises(NotSupported) as raised:
        System(stage=2, dirty=True)
    assert raised.value.errno == errno.EOPNOTSUPP
    for out in (
        np.zeros(2, bool), np.zeros(1, np.uint8), np.zeros((1, 1), bool), [False],
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match="out"):
            table.read_dirty(0, K4, out=out)
    frozen = np.zeros(2, bool)
    frozen.flags.writeable = False
    for out in (np.zeros(4, bool)[::2], frozen):
        with pytest.raises(InvalidArgument, match="out"):
            table.read_dirty(0, 2 * K4, out=out)
    out = np.ones(3, bool)
    assert table.read_dirty(0, 3 * K4, out=out) is out and not out.any()


# --- F56: what the walker honours ---


def test_f56_the_walker_honours_t0sz():
    for ias in (36, 39, 42, 48):
        system = System(ias=ias)
        system.table.map((1 << ias) - K4, K4, K4)
        assert system.pa((1 << ias) - 1) == 2 * K4 - 1
        for iova in (1 << ias, 1 << 55, (1 << 64) - K4):
            fault = system.translate(iova).event
            assert fault.number == 0x10


def test_f56_the_walker_honours_epd0():
    system = System(cd={"epd0": 1})
    system.table.map(0, 0, K4)
    assert system.translate(0).event.number == 0x10


@pytest.mark.parametrize(
    ("flip", "access", "event"),
    [
        (1 << 10, {}, 0x12), (1 << 6, {}, 0x13), (1 << 7, {"write": True}, 0x13),
        (1 << 54, {"instr": True}, 0x13), (1 << 0, {}, 0x10), (1 << 1, {}, 0x10),
    ],
)  # fmt: skip
def test_f56_the_walker_honours_af_ap_xn_and_types(flip, access, event):
    system = System()
    system.table.map(0, 0, K4)
    assert system.translate(0, **access)
    _, d, at = descriptor(system.table, 0)
    system.memory.write_u64(at, d ^ flip)
    found = system.translate(0, **access).event
    assert found.number == event
    # where the walk found fault: CLASS is IN, the input address
    if event != 0x10:
        assert found.fields["CLASS"] == 0b10


def test_f56_the_walker_honours_block_and_page_types():
    system = System()
    system.table.map(G1, 3 * G1, G1)
    level, d, at = descriptor(system.table, G1)
    assert (level, d & 3) == (1, 1) and system.pa(G1 + 5) == 3 * G1 + 5
    system.memory.write_u64(at, d | 2)  # a table in memory that is not there
    assert system.translate(G1).event.number == 0x0B
    system.table.map(0, 0, K4)
    level, d, at = descriptor(system.table, 0)
    assert (level, d & 3) == (3, 3)


@pytest.mark.parametrize("stage", [1, 2])
def test_f56_64k_packs_the_highest_address_bits(stage):
    memory = Memory()
    memory.add_private(STREAMS, 0x1000)
    system = System(stage=stage, granule=K64, ias=52, oas=52)
    system.table.map(0, 0xF_0000_0000_0000 + 5 * K64, 2 * K64)
    d = descriptor(system.table, K64)[1]
    assert d & 0xFFFF_FFFF_F000 == 0x6_F000
    assert system.pa(K64 + 1) == 0xF_0000_0006_0001 == system.table.iova_to_phys(K64 + 1)
    # across a multiple of 2^48 descriptors do not ascend
    system.table.map(4 * K64, (1 << 48) - 2 * K64, 4 * K64)
    for i in range(4):
        assert system.pa((4 + i) * K64) == (1 << 48) + (i - 2) * K64
    system.table.map(T4, 9 * T4, T4)
    assert system.translate(T4 + 77).page_size == T4 and system.pa(T4 + 77) == 9 * T4 + 77


def test_f56_tables_beyond_48_bits_are_found():
    memory = Memory()
    memory.add_private(STREAMS, 0x1000)
    base = 0xA_0000_0000_0000
    memory.add_private(base, 1 << 22)
    table = PageTable(Pages(memory, base, 1 << 22), granule=K64, ias=52, oas=52)
    from tablesystem import point, smmu_of

    point(memory, table)
    table.map(0x123 * K64, 7 * K64, K64)
    smmu = smmu_of(memory, table)
    assert smmu.translate(SID, 0x123 * K64 + 9).pa == 7 * K64 + 9
    assert smmu.translate(SID, 0x123 * K64, trace=True).fetches[-1].address >= base
    assert table.unmap(0, 1 << 52) == 0
    assert table.unmap(0x123 * K64, K64) == K64


@pytest.mark.parametrize("stage", [1, 2])
def test_f56_an_address_beyond_ips_is_reported_as_such(stage):
    system = System(stage=stage, ias=40, oas=40)
    with pytest.raises(OutOfRange):
        system.table.map(0, 1 << 40, K4)
    system.table.map(0, 0, K4)
    _, d, at = descriptor(system.table, 0)
    system.memory.write_u64(at, d | 1 << 40)
    found = system.translate(0)
    assert found.event.number == 0x11 and found.stage == stage


# --- the contiguous hint ---

RUNS = {K4: (16, 16), K16: (128, 32), K64: (32, 32)}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("granule", [K4, K16, K64])
@pytest.mark.parametrize("which", [0, 1])
def test_whole_aligned_runs_have_the_hint(granule, stage, which):
    system = System(stage=stage, granule=granule, contiguous=True)
    page = granule if which == 0 else granule * granule // 8
    run = RUNS[granule][which]
    base = 4 * run * page
    # two pages before, a run, and one page less than another run
    first, count = base - 2 * page, 2 + run + run - 1
    system.table.map(first, first, count * page)
    hints = [
        bool(descriptor(system.table, first + i * page)[1] >> 52 & 1) for i in range(count)
    ]
    assert hints == [False] * 2 + [True] * run + [False] * (run - 1)
    for i in range(count):
        result = system.translate(first + i * page + 3)
        assert (result.pa, result.contiguous) == (first + i * page + 3, hints[i])
    assert system.table.unmap(first, count * page) == count * page
    # an output address that is not aligned as much, and pieces
    system.table.map(base, base + page, run * page)
    assert not descriptor(system.table, base)[1] >> 52 & 1
    system.table.unmap(base, run * page)
    system.table.map(base, base, page)
    system.table.map(base + page, base + page, (run - 1) * page)
    assert not descriptor(system.table, base + page)[1] >> 52 & 1


def test_the_largest_blocks_have_the_hint_where_it_is():
    table = System(contiguous=True).table
    table.map(16 * G1, 16 * G1, 16 * G1)
    assert descriptor(table, 17 * G1)[1] >> 52 & 1
    wide = System(contiguous=True, granule=K64, ias=52, oas=52).table
    wide.map(32 * T4, 32 * T4, 32 * T4)
    assert not descriptor(wide, 33 * T4)[1] >> 52 & 1


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("granule", [K4, K16, K64])
@pytest.mark.parametrize("active", [True, False])
def test_part_of_a_run_breaks_it_before_it_is_made_anew(granule, stage, active):
    table = domain(stage=stage, granule=granule, contiguous=True)
    table.active = active
    run = RUNS[granule][0]
    lg2 = granule.bit_length() - 1
    base = run * granule
    table.map(base, base, 3 * base, RW | CACHE)
    at = [descriptor(table, base + i * granule)[2] for i in range(3 * run)]
    before = [descriptor(table, base + i * granule)[1] for i in range(3 * run)]
    seen = []
    table.watch = lambda: seen.append([table.pages.memory.read_u64(each) for each in at])
    # the last two of the first run, all of the second, the first three of the third
    assert table.unmap(2 * base - 2 * granule, (2 + run + 3) * granule) == (5 + run) * granule
    gone = range(run - 2, 2 * run + 3)
    plain = [d & ~(1 << 52) for d in before]
    wanted = [0 if i in gone else d for i, d in enumerate(plain)]
    assert [table.pages.memory.read_u64(each) for each in at] == wanted
    if not active:
        assert table.taken() == []
        return
    assert table.taken() == [
        (base, 2 * base - 1, lg2, False),
        (3 * base, 4 * base - 1, lg2, False),
        (2 * base - 2 * granule, 3 * base + 3 * granule - 1, lg2, False),
    ]
    # while a run is flushed, none of its entries is there
    assert seen[0] == [0] * run + before[run:]
    assert seen[1] == plain[:run] + before[run : 2 * run] + [0] * run
    assert seen[2] == wanted


def test_a_whole_run_goes_without_being_broken():
    table = domain(contiguous=True)
    table.map(K64, K64, K64)
    assert table.unmap(K64, K64) == K64
    assert table.taken() == [(K64, 2 * K64 - 1, 12, False)]


def test_a_flush_that_raises_leaves_a_run_as_it_was():
    table = domain(contiguous=True)
    table.map(K64, K64, 2 * K64)
    before = live_tables(table.pages.memory, table)
    table.error = KeyError("flush")
    with pytest.raises(KeyError):
        table.unmap(K64 + K4, K4)
    assert live_tables(table.pages.memory, table) == before and table.mapped == 2 * K64
    table.error = None
    assert table.unmap(K64 + K4, K4) == K4


def test_calls_from_within_the_flush_of_a_run_meet_it_at_work():
    table = domain(contiguous=True)
    table.map(K64, K64, K64)
    met = []

    def call():
        table.watch = None
        for each in (
            lambda: table.map(0, 0, K4), lambda: table.unmap(K64, K4), table.close,
            lambda: table.iova_to_phys(K64), lambda: setattr(table, "active", False),
        ):  # fmt: skip
            with pytest.raises(Busy) as raised:
                each()
            met.append(raised.value.errno)

    table.watch = call
    assert table.unmap(K64, K64 // 2) == K64 // 2
    assert met == [errno.EBUSY] * 5
