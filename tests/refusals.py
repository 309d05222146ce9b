"""Page tables in memory that refuses a store: every store of a scenario in its turn.

What must hold behind each call, whether it raised or not: `mapped` is what is mapped, hardware
that has cached everything reaches nothing that is not mapped, a call that raised has changed
nothing, the call can be made again, and close() gives every table back.

    python -P tests/refusals.py            every store of every scenario, in every way
"""

import struct
import sys

from smmufast import Memory
from smmufast._driver.tables import Pages, PageTable

BASE = 0x4000_0000
SIZE = 1 << 22
RAM = 0x8000_0000_0000

# How a store may fail: it is refused once, twice in a row, or always from then on; the callback
# raises before it has stored, or after.
WAYS = ("once", "twice", "always", "raises", "stores and raises", "read once", "read raises")


class Medium:
    """Memory behind callbacks; `fail(n, way)` lets the access number n fail."""

    def __init__(self):
        self.ram = bytearray(SIZE)
        self.memory = Memory()
        self.memory.add_callback(BASE, SIZE, self.read, self.write)
        self.fail(None, None)

    def fail(self, nth, way):
        self.nth, self.way, self.stores, self.reads, self.hit = nth, way, 0, 0, False

    def read(self, address, n):
        self.reads += 1
        if self.way and self.way.startswith("read") and self.reads - 1 == self.nth:
            self.hit = True
            if self.way == "read raises":
                raise OSError("planted")
            return None
        return bytes(self.ram[address - BASE : address - BASE + n])

    def write(self, address, data):
        self.stores += 1
        way, late = self.way, self.nth is not None and self.stores - 1 - self.nth
        if way in ("once", "raises", "stores and raises", "twice", "always") and (
            late == 0 or (late == 1 and way == "twice") or (late >= 0 and way == "always")
        ):
            self.hit = True
            if way == "stores and raises":
                self.ram[address - BASE : address - BASE + len(data)] = data
            if "raises" in way:
                raise OSError("planted")
            return None
        self.ram[address - BASE : address - BASE + len(data)] = data
        return True


class Table(PageTable):
    """A page table beside hardware that caches all that it can."""

    def __init__(self, medium, active, **keywords):
        super().__init__(Pages(medium.memory, BASE, SIZE), **keywords)
        self.active = active
        self.tlb = {}
        self.spans = []

    def flush(self, first, last, page_lg2, tables):
        for page in [page for page in self.tlb if first <= page <= last]:
            del self.tlb[page]
        self.fill()

    def pages_of(self):
        """{address: where it goes} of every granule in the spans, straight from the bytes."""
        found = {}
        lg2 = self.granule.bit_length() - 1
        for base, size in self.spans:
            at = base
            while at < base + size:
                table, level = self.root, self.start_level
                while True:
                    shift = lg2 + (3 - level) * (lg2 - 3)
                    entries = 1 << (self.ias - shift if level == self.start_level else lg2 - 3)
                    first = at >> shift & entries - 1
                    offset = table - BASE + 8 * first
                    d = int.from_bytes(self.medium.ram[offset : offset + 8], "little")
                    if level == 3 or d & 3 != 3:
                        break
                    table, level = self.address(d), level + 1
                if level == 3:
                    n = min(entries - first, (base + size - at) >> lg2)
                    words = struct.unpack_from(f"<{n}Q", self.medium.ram, offset)
                    for k, d in enumerate(words):
                        if d & 3 == 3:
                            found[at + (k << lg2)] = self.address(d)
                    at += n << lg2
                    continue
                end = min((at | (1 << shift) - 1) + 1, base + size)
                if d & 1:
                    pa = self.address(d) & -1 << shift
                    for page in range(at, end, self.granule):
                        found[page] = pa | page & (1 << shift) - 1
                at = end
        return found

    def address(self, d):
        address = d & 0xFFFF_FFFF_F000 & -self.granule
        return address | (d >> 12 & 15) << 48 if self.granule == 65536 else address

    def fill(self):
        if self.active:
            for page, pa in self.pages_of().items():
                self.tlb.setdefault(page, pa)

    def check(self):
        now = self.pages_of()
        assert self.mapped == self.granule * len(now), (hex(self.mapped), len(now))
        stale = {hex(page) for page, pa in self.tlb.items() if now.get(page) != pa}
        assert not stale, stale
        return now


def spans_of(granule):
    """A block's size, and the pages of a contiguous run."""
    return {4096: (2 << 20, 16), 16384: (32 << 20, 128), 65536: (512 << 20, 32)}[granule]


def scenarios(granule):
    """(name, spans to look at, what is done before, the call)."""
    block, run = spans_of(granule)
    g = granule

    def before_none(t):
        pass

    def some(t):
        t.map(0, RAM, 4 * g)

    def emptied(t):
        """Two empty tables where blocks are to be."""
        t.map(block, RAM, g)
        t.map(2 * block, RAM, g)
        t.unmap(block, g)
        t.unmap(2 * block, g)

    def one_run(t):
        t.map(0, RAM, run * g)

    def two_sizes(t):
        t.map(0, RAM, g)
        t.map(g, RAM + 4 * g, (run - 1) * g)
        t.map(block, RAM, block)

    def full_table(t):
        t.map(block - 2 * g, RAM, 2 * g)
        t.map(block, RAM + g, block)  # pages: not aligned

    def dirty(t):
        t.map(0, RAM, 6 * g)
        if t.stage == 1:
            t.read_dirty(g, g)

    near = [(0, 2 * run * g)]
    wide = [(0, 4 * g), (block - 4 * g, 12 * g), (2 * block - 4 * g, 8 * g)]
    yield "map pages", near, before_none, lambda t: t.map(0, RAM + g, 5 * g)
    yield "map beside", near, some, lambda t: t.map(6 * g, RAM, 3 * g)
    yield "map far", [*near, (5 << 33, 4 * g)], some, lambda t: t.map(5 << 33, RAM, 3 * g)
    yield "map a run", near, some, lambda t: t.map(run * g, RAM, run * g)
    pieces = [(RAM, g), (RAM + 4 * g, 2 * g), (RAM, g)]
    yield "map_sg", near, some, lambda t: t.map_sg(4 * g, pieces)
    yield "unmap pages", near, some, lambda t: t.unmap(0, 3 * g)
    yield "unmap all", near, some, lambda t: t.unmap(0, 4 * g)
    yield "unmap a table", near, some, lambda t: t.unmap(0, block)
    yield "split a run", near, one_run, lambda t: t.unmap(g, 2 * g)
    yield "dirty", near, dirty, lambda t: t.stage == 1 and t.read_dirty(0, 6 * g)
    if granule == 4096:
        spans = [(block, 2 * block)]
        yield "blocks over tables", spans, emptied, lambda t: t.map(block, RAM, 2 * block)
        yield "pages over tables", wide, emptied, lambda t: t.map(block, RAM + g, 3 * g)
        spans = [(0, 2 * run * g), (block, block)]
        yield "two sizes", spans, two_sizes, lambda t: t.unmap(0, run * g)
        spans = [(block - 4 * g, block + 8 * g)]
        yield "full table", spans, full_table, lambda t: t.unmap(block - 2 * g, block + 2 * g)


def open_table(scenario, granule, stage, active):
    _, spans, before, _ = scenario
    medium = Medium()
    table = Table(
        medium, False, stage=stage, granule=granule, contiguous=True, dirty=stage == 1,
        ias=42 if granule != 65536 else 48, oas=48,
    )  # fmt: skip
    table.medium = medium
    table.spans = spans
    before(table)
    table.active = active
    table.fill()
    return medium, table


def dirty_of(table):
    """Which pages memory says are dirty."""
    return table.stage == 1 and tuple(table.read_dirty(0, 6 * table.granule, clear=False))


def play(scenario, granule, stage, active, nth, way):
    """One refusal; whether there was such an access."""
    call = scenario[3]
    medium, table = open_table(scenario, granule, stage, active)
    was = table.check()
    dirt = dirty_of(table)
    medium.fail(nth, way)
    raised = None
    try:
        call(table)
    except Exception as error:
        raised = error
    hit = medium.hit
    medium.fail(None, None)
    now = table.check()
    if raised is not None and way != "always":
        assert now == was, f"{raised!r}: it changed something"
        assert dirt == dirty_of(table)
    call(table)  # with nothing in its way; it may find what is there
    table.check()
    for base, size in table.spans:
        at = base
        while at < base + size:
            at += table.unmap(at, base + size - at) or table.granule
        table.check()
    assert table.mapped == 0
    table.close()
    assert table.pages.in_use == 0
    return hit


def again(call):
    """The call, which may find that it was done."""

    def tried(table):
        try:
            return call(table)
        except ValueError as error:
            if "mapped already" not in str(error):
                raise

    return tried


def play_all(granules=(4096, 16384, 65536), ways=WAYS, step=1):
    """How many refusals were played."""
    count = 0
    for granule in granules:
        for name, spans, before, call in scenarios(granule):
            scenario = name, spans, before, again(call)
            for stage in (1, 2):
                for active in (True, False):
                    for way in ways:
                        nth = 0
                        while True:
                            try:
                                hit = play(scenario, granule, stage, active, nth, way)
                            except BaseException as error:
                                error.add_note(
                                    f"{name}, granule {granule}, stage {stage}, "
                                    f"active {active}, access {nth}: {way}")
                                raise
                            count += 1
                            if not hit:
                                break
                            nth += step * (29 if way.startswith("read") else 1)
    return count


if __name__ == "__main__":
    print(play_all(step=int(sys.argv[1]) if len(sys.argv) > 1 else 1), "refusals, nothing lost")
