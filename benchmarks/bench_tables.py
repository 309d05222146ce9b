"""Page tables of the driver half, beside bare stores in plain C and methods that do nothing."""

import functools
from functools import partial

import baseline
import numpy as np
from questions import LIBRARY, Question, Run

TABLES = 0x8000_0000
PAGE = 4096
SPAN = 512 * PAGE  # of a leaf table
RANGES = 48  # a call is of so many ranges; fewer than the empty tables that are given back
CALLS = 4096  # or of so many pages
GIB = 1 << 30
PA = 0x1_0000_1000  # no block fits


@functools.cache
def module():
    """Return _stores."""
    return baseline.load("_stores", "baseline_stores")


def table(size=1 << 24, **keywords):
    """Return a PageTable in memory of its own."""
    from smmufast import Memory
    from smmufast.iommu import Pages, PageTable

    memory = Memory()
    memory.add_private(TABLES, size)
    return PageTable(Pages(memory, TABLES, size), **keywords)


def stores(pages):
    """Return bare tables for so many pages."""
    return module().Stores(np.ones(pages, np.uint64))


def three(call, arguments):
    """Call with each of some triples."""
    for a, b, c in arguments:
        call(a, b, c)


def two(call, arguments):
    """Call with each of some pairs."""
    for a, b in arguments:
        call(a, b)


def one(call, arguments):
    """Call with each of some integers."""
    for a in arguments:
        call(a)


def checked(run, there, found):
    """Return run, unless the call leaves something else mapped than it should."""
    if run.reset is not None:
        run.reset()
    run.call()
    if found() != there:
        raise AssertionError("the tables hold something else")
    return run


# ---- many pages -------------------------------------------------------------------------------


def bare_map(size):
    """Store a descriptor for each page of the ranges."""

    def build(_bench):
        count = max(1, RANGES * SPAN // size)
        bare = stores(count * size // PAGE)
        ranges = [(i * size, PA + i * size, size) for i in range(count)]
        three(bare.map, ranges)
        return Run(partial(three, bare.map, ranges), count * size // PAGE)

    return build


def bare_unmap(size):
    """Clear the descriptor of each page of the ranges."""

    def build(_bench):
        count = max(1, RANGES * SPAN // size)
        bare = stores(count * size // PAGE)
        ranges = [(i * size, size) for i in range(count)]
        two(bare.unmap, ranges)
        return Run(partial(two, bare.unmap, ranges), count * size // PAGE)

    return build


def mapping(size, keep):
    """Map the ranges; `keep`: their leaf tables are there already."""

    def build(_bench):
        own = table()
        count = max(1, RANGES * SPAN // size)
        ranges = [(i * size, PA + i * size, size) for i in range(count)]
        pieces = [(i * size, size) for i in range(count)]
        if keep:  # no unmap covers a whole table
            pieces = [(i * SPAN // 2, SPAN // 2) for i in range(2 * count * size // SPAN)]

        def reset():
            two(own.unmap, pieces)

        three(own.map, ranges)
        tables = own.table_bytes
        reset()
        if keep != (own.table_bytes == tables):
            raise AssertionError("other tables stay than should")
        return checked(
            Run(partial(three, own.map, ranges), count * size // PAGE, reset),
            (count * size, PA + count * size - 1),
            lambda: (own.mapped, own.iova_to_phys(count * size - 1)),
        )

    return build


def unmapping(size, whole):
    """Unmap the ranges; not `whole`: their leaf tables stay."""

    def build(_bench):
        own = table()
        count = max(1, RANGES * SPAN // size)
        ranges = [(i * size, PA + i * size, size) for i in range(count)]
        pieces = [(i * size, size) for i in range(count)]
        if not whole:
            pieces = [(i * SPAN // 2, SPAN // 2) for i in range(2 * count * size // SPAN)]

        def reset():
            three(own.map, ranges)

        reset()
        tables = own.table_bytes
        two(own.unmap, pieces)
        if whole == (own.table_bytes == tables):
            raise AssertionError("other tables stay than should")
        return checked(
            Run(partial(two, own.unmap, pieces), count * size // PAGE, reset),
            (0, 0),
            lambda: (own.mapped, own.iova_to_phys(0)),
        )

    return build


def blocks(which):
    """Map, or unmap, 1 GiB at a time by blocks of 2 MiB."""

    def build(_bench):
        own = table()
        maps = [(i * GIB, (i + 1) * GIB + SPAN, GIB) for i in range(RANGES)]  # no larger block fits
        unmaps = [(iova, size) for iova, _, size in maps]
        run, back = partial(three, own.map, maps), partial(two, own.unmap, unmaps)
        found = (RANGES * GIB, (RANGES + 1) * GIB + SPAN - 1)
        if which == "unmap":
            run, back, found = back, run, (0, 0)
        return checked(Run(run, RANGES * 512, back), found,
                       lambda: (own.mapped, own.iova_to_phys(RANGES * GIB - 1)))  # fmt: skip

    return build


# ---- dirty state ------------------------------------------------------------------------------

DIRTY = 1 << 51 | 0x403  # DBM, and not read-only
CLEAN = DIRTY | 1 << 7


def bare_dirty(clear):
    """Look at the descriptors of RANGES tables, all dirty; `clear`: make them clean."""

    def build(_bench):
        entries = np.full(RANGES * 512, DIRTY, np.uint64)
        bare = module().Stores(entries)
        out = np.zeros(RANGES * 512, np.uint8)
        bare.read_dirty(out, clear)
        if not out.all() or (entries == CLEAN).all() != clear:
            raise AssertionError("other pages are dirty than should be")
        reset = partial(entries.fill, DIRTY) if clear else None
        return Run(partial(bare.read_dirty, out, clear), RANGES * 512, reset)

    return build


def dirty(clear):
    """Ask which pages of RANGES tables are dirty, which all are; `clear`: make them clean."""

    def build(_bench):
        own = table(dirty=True)
        size = RANGES * SPAN
        out = np.zeros(size // PAGE, bool)
        call = partial(own.read_dirty, 0, size, clear=clear, out=out)

        def reset():
            own.unmap(0, size)
            own.map(0, PA, size)

        reset()
        call()
        if not out.all() or call().any() == clear:
            raise AssertionError("other pages are dirty than should be")
        return Run(call, size // PAGE, reset if clear else None)

    return build


# ---- one page ---------------------------------------------------------------------------------


def arguments():
    """Return (iova, pa, size) of pages that one leaf table after the other holds."""
    return [(i * PAGE, PA + i * 2 * PAGE, PAGE) for i in range(CALLS)]


def empty(name, loop):
    """Call a method that does nothing."""

    def build(_bench):
        iova, _, size = zip(*arguments(), strict=True)
        given = {one: iova, two: list(zip(iova, size, strict=True)), three: arguments()}[loop]
        return Run(partial(loop, getattr(module().Empty(), name), given), CALLS)

    return build


def one_page(which):
    """Map, or unmap, one page at a time, in tables that are there."""

    def build(_bench):
        own = table()
        maps = arguments()
        unmaps = [(iova, size) for iova, _, size in maps]
        if which == "unmap":
            run = Run(partial(two, own.unmap, unmaps), CALLS, partial(three, own.map, maps))
            return checked(run, 0, lambda: own.mapped)
        run = Run(partial(three, own.map, maps), CALLS, partial(two, own.unmap, unmaps))
        return checked(run, (CALLS * PAGE, maps[-1][1]),
                       lambda: (own.mapped, own.iova_to_phys(maps[-1][0])))  # fmt: skip

    return build


def look_up(mapped):
    """Ask where pages go."""

    def build(_bench):
        own = table()
        maps = arguments()
        if mapped:
            three(own.map, maps)
        else:
            own.map(0, PA, PAGE)
            own.unmap(0, PAGE)
        wanted = [pa if mapped else 0 for _, pa, _ in maps]
        if [own.iova_to_phys(iova) for iova, _, _ in maps] != wanted:
            raise AssertionError("iova_to_phys() gives a wrong address")
        return Run(partial(one, own.iova_to_phys, [iova for iova, _, _ in maps]), CALLS)

    return build


QUESTIONS = (
    Question(
        "page tables, map() of 512 pages",
        "page",
        {
            "C loop of stores": bare_map(SPAN),
            f"{LIBRARY}, table there": mapping(SPAN, keep=True),
            f"{LIBRARY}, table to be made": mapping(SPAN, keep=False),
        },
        main=True,
    ),
    Question(
        "page tables, unmap() of 512 pages",
        "page",
        {
            "C loop of stores": bare_unmap(SPAN),
            f"{LIBRARY}, table goes": unmapping(SPAN, whole=True),
            f"{LIBRARY}, 256 at a time, table stays": unmapping(SPAN, whole=False),
        },
    ),
    Question(
        "page tables, 1 GiB of 4 KiB pages in one call",
        "page",
        {
            "C loop of stores": bare_map(GIB),
            f"{LIBRARY} map()": mapping(GIB, keep=False),
            f"{LIBRARY} unmap()": unmapping(GIB, whole=True),
        },
    ),
    Question(
        "page tables, 1 GiB of 2 MiB blocks in one call",
        "block",
        {
            "C loop of stores": bare_map(SPAN),
            f"{LIBRARY} map()": blocks("map"),
            f"{LIBRARY} unmap()": blocks("unmap"),
        },
    ),
    Question(
        "page tables, read_dirty(clear=False) of 96 MiB, all of it dirty",
        "page",
        {"C loop of loads": bare_dirty(False), LIBRARY: dirty(False)},
    ),
    Question(
        "page tables, read_dirty() of 96 MiB, all of it dirty",
        "page",
        {"C loop of loads and atomic stores": bare_dirty(True), LIBRARY: dirty(True)},
    ),
    Question(
        "page tables, map() of one page",
        "call",
        {
            "empty method, three integers": empty("three_none", three),
            LIBRARY: one_page("map"),
        },
        main=True,
    ),
    Question(
        "page tables, unmap() of one page",
        "call",
        {
            "empty method, three integers": empty("three_int", three),
            "empty method, two integers": empty("two_int", two),
            LIBRARY: one_page("unmap"),
        },
        main=True,
    ),
    Question(
        "page tables, iova_to_phys()",
        "call",
        {
            "empty method, one integer": empty("one_int", one),
            LIBRARY: look_up(mapped=True),
            f"{LIBRARY}, nothing mapped": look_up(mapped=False),
        },
        main=True,
    ),
)


def test_tables(measure, question, run):
    """Time calls for one page and for many."""
    measure(question, run)
