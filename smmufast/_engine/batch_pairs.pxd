"""Contexts of many pairs: the way to a CD, a pass for each structure, for all rows of a block.

L1STD, STE, L1CD, CD: each pass asks for what the next one reads, so that a block waits for memory
once a structure and not once a row.  Nothing is decoded here.  A context is recognised by the
bytes of its STE and its CD: those that are not a pointer to a CD, a table or the ASID are those
of a Shape.  Each pass has a window of its own, for structures of different kinds may lie in
different regions.  What is not recognised, faults on its way or lies elsewhere is left.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from smmufast._facts.bits cimport le64, likely, load64, low_mask, prefetch, unlikely
from smmufast._engine.cache cimport ctz64
from smmufast._engine.memory cimport Port, Window, alike64, open_window, port_open, reads64
from smmufast._facts.hw cimport Hw
from smmufast._facts.layout cimport (
    cd_set_asid, cd_set_ttb0, cd_set_ttb1, cd_ttb0, cd_ttb1, cr0_smmuen, ste_set_s1contextptr,
)
from smmufast._facts.types cimport Half
from smmufast._rules.config cimport (
    STAGE1_BYPASS, cd_entry, cd_leaf_lg2, cd_table, l1cd_leaf, l1std_next, stream_first, substream,
    substreams_of,
)
from smmufast._rules.vmsa cimport entry_address, half_of
from smmufast._engine.vector cimport Rows
from smmufast._engine.batch_block cimport LEFT, ROWS, Run, Shape


cdef enum:
    NOT_THERE = 0xFFFFFFFFFFFFFFFF  # Ways.at: the row is left, or done


# Rows one after another that are of one stream.
cdef struct Stream:
    uint32_t sid
    unsigned int end          # the first row behind them
    unsigned int shapes       # its STE can be read; then bit k: that is the STE of shape k
    uint64_t at               # where the next structure lies, from the window's begin
    uint64_t table            # of CDs or L1CDs
    int leaf                  # lg2 of the CDs below an L1CD; 0: the table holds CDs
    uint64_t[8] ste


# The ways of rows to their CDs.
cdef struct Ways:
    unsigned int streams
    unsigned int count
    Window window             # in which `at` is counted
    Stream[ROWS] stream
    uint8_t[ROWS] row         # of the block
    uint32_t[ROWS] index      # of the CD
    uint64_t[ROWS] at         # where the next structure lies, from the window's begin


cdef inline uint64_t free_table(const Half* half) noexcept nogil:
    """Bits of a TTB that say where the table is, and nothing else.

    Those beyond the output size may make the CD ILLEGAL; a half without tables ignores them all.
    """
    if not half.enabled:
        return ~<uint64_t>0
    return half.table_mask & low_mask(half.output_bits if half.output_bits < 48 else 48)


cdef inline void shape_keeps(const Hw* hw, Shape* shape) noexcept nogil:
    """Which bits of STE and CD the pairs of a shape have in common."""
    cdef uint64_t[8] free
    cdef int i
    memset(&free[0], 0, sizeof(free))
    ste_set_s1contextptr(&free[0], hw.pointer_mask & ~hw.oas_over)
    for i in range(8):
        shape.keep_ste[i] = ~free[i]
    memset(&free[0], 0, sizeof(free))
    cd_set_ttb0(&free[0], free_table(&shape.memo.context.half[0]))
    cd_set_ttb1(&free[0], free_table(&shape.memo.context.half[1]))
    # of a half without tables the dword says nothing, and of others the low bits are other fields
    for i in range(2):
        shape.free_table[i] = 0
        if shape.memo.context.half[i].enabled:
            shape.free_table[i] = cd_ttb0(&free[0]) if i == 0 else cd_ttb1(&free[0])
    cd_set_asid(&free[0], 0xFFFF if hw.asid16 or not shape.memo.context.two_ttbs else 0xFF)
    for i in range(8):
        shape.keep_cd[i] = ~free[i]


cdef inline void look_at(Run* run, Window* window, uint64_t address) noexcept nogil:
    """Let a window be one that holds an address, if there is memory."""
    cdef Port port
    if address - window.base > window.span:
        port_open(&port, run.port.ram, NULL)
        open_window(&port, address)
        window[0] = port.window


cdef inline uint64_t ask(
        const Hw* hw, const Window* window, uint64_t address, bint whole) noexcept nogil:
    """Ask for a dword, or with `whole` for 64 bytes; how far they lie from the window's begin.

    NOT_THERE if that is no output address, or not all of it lies in the window.
    """
    cdef uint64_t at = address - window.base
    if unlikely(address & hw.oas_over
                or (not reads64(window, at) if whole else at > window.span)):
        return NOT_THERE
    prefetch(window.data + at)
    return at


cdef inline void streams_find(Run* run, const Rows* rows, Ways* ways) noexcept nogil:
    """L1STD and STE of each stream: which shapes' STE it has, and where its table of CDs is."""
    cdef const Hw* hw = &run.core.hw
    cdef Window first = ways.window, second = ways.window
    cdef const Window* window = &first
    cdef Stream* stream = NULL
    cdef unsigned int i, k
    cdef uint64_t address = 0
    ways.streams = 0
    for i in range(ways.count if run.batch.sid.stride else 1):
        if stream == NULL or stream.sid != rows.sid[ways.row[i]]:
            stream = &ways.stream[ways.streams]
            ways.streams += 1
            stream.sid = rows.sid[ways.row[i]]
            stream.at = NOT_THERE
            if stream_first(hw, stream.sid, &address):
                if ways.streams == 1:
                    look_at(run, &first, address)
                stream.at = ask(hw, window, address, not hw.two_level)
        stream.end = i + 1
    stream.end = ways.count
    if hw.two_level:
        k = 0
        for i in range(ways.streams):
            stream = &ways.stream[i]
            if stream.at == NOT_THERE:
                continue
            if likely(l1std_next(hw, le64(load64(first.data + stream.at)), stream.sid,
                                 &address) == 0):
                if k == 0:
                    look_at(run, &second, address)
                k = 1
                stream.at = ask(hw, &second, address, True)
            else:
                stream.at = NOT_THERE
        window = &second
    for i in range(ways.streams):
        stream = &ways.stream[i]
        stream.shapes = 0
        stream.leaf = 0
        if stream.at == NOT_THERE:
            continue
        for k in range(8):
            stream.ste[k] = le64(load64(window.data + stream.at + 8 * k))
        for k in range(run.shapes):
            if alike_words(stream.ste, run.shape[k].memo.ste, run.shape[k].keep_ste):
                stream.shapes |= 1U << k
        stream.leaf = cd_leaf_lg2(hw, stream.ste)
        stream.table = cd_table(hw, stream.ste, stream.leaf)


cdef inline bint alike_words(
        const uint64_t* words, const uint64_t* known, const uint64_t* keep) noexcept nogil:
    """Two structures are one but for bits that need not be kept."""
    cdef uint64_t differ = 0
    cdef int i
    for i in range(8):
        differ |= (words[i] ^ known[i]) & keep[i]
    return differ == 0


cdef inline int way_other(
        Run* run, Rows* rows, const Stream* stream, unsigned int row) noexcept nogil:
    """The index of the CD of a row that has no SubstreamID; -1 if there is nothing to be read."""
    cdef unsigned int k
    cdef int index = 0
    if substream(&run.core.hw, stream.ste, rows.ssid[row], &index):
        return -1
    if index != STAGE1_BYPASS:
        return index
    for k in range(run.shapes):
        if stream.shapes >> k & 1 and not run.shape[k].walks:
            rows.first[row] = 0
            rows.shape[row] = <uint8_t>(2 * k)
    return -1


cdef inline void ways_begin(Run* run, Rows* rows, Ways* ways) noexcept nogil:
    """Ask for the L1CD, or for the CD, of each row."""
    cdef const Hw* hw = &run.core.hw
    cdef const Stream* stream
    cdef uint32_t least = 0, count = 0, ssid
    cdef uint64_t table
    cdef int leaf, index
    cdef bint looked = False
    cdef unsigned int i = 0, s, end
    for s in range(ways.streams):
        stream = &ways.stream[s]
        end = stream.end
        if not stream.shapes:
            while i < end:
                ways.at[i] = NOT_THERE
                i += 1
            continue
        substreams_of(hw, stream.ste, &least, &count)
        leaf = stream.leaf
        table = stream.table
        if not looked:
            look_at(run, &ways.window, table)
            looked = True
        while i < end:
            ssid = rows.ssid[ways.row[i]]
            if unlikely(ssid - least >= count):
                index = way_other(run, rows, stream, ways.row[i])
                if index < 0:
                    ways.at[i] = NOT_THERE
                    i += 1
                    continue
                ssid = <uint32_t>index
            ways.index[i] = ssid
            ways.at[i] = ask(hw, &ways.window, cd_entry(table, leaf, ssid), not leaf)
            i += 1


cdef inline void ways_down(Run* run, Ways* ways) noexcept nogil:
    """From the L1CDs to the CDs, whose window is that of the first one."""
    cdef const Hw* hw = &run.core.hw
    cdef Window above = ways.window
    cdef uint64_t address = 0
    cdef bint looked = False
    cdef unsigned int i = 0, s, end
    cdef int leaf
    for s in range(ways.streams):
        end = ways.stream[s].end
        leaf = ways.stream[s].leaf
        if leaf == 0:
            i = end
        while i < end:
            if likely(ways.at[i] != NOT_THERE):
                if likely(l1cd_leaf(hw, False, leaf, le64(load64(above.data + ways.at[i])),
                                    ways.index[i], &address) == 0):
                    if not looked:
                        look_at(run, &ways.window, address)
                        looked = True
                    ways.at[i] = ask(hw, &ways.window, address, True)
                else:
                    ways.at[i] = NOT_THERE
            i += 1
    if ways.window.base == above.base:
        return
    i = 0
    for s in range(ways.streams):  # CDs of linear tables, which were asked for by the other window
        end = ways.stream[s].end
        if ways.stream[s].leaf:
            i = end
        while i < end:
            if ways.at[i] != NOT_THERE:
                ways.at[i] = ask(hw, &ways.window, above.base + ways.at[i], True)
            i += 1


cdef inline void ways_end(Run* run, Rows* rows, const Ways* ways) noexcept nogil:
    """The CDs: a row whose context is that of a shape is found; ask for where its walk begins."""
    cdef const Window* window = &ways.window
    cdef const Window* tables = &run.port.window
    cdef const Shape* shape
    cdef const Half* half
    cdef const uint8_t* cd
    cdef uint64_t first, before = 0, at
    cdef unsigned int i = 0, j, k, s, upper, shapes
    for s in range(ways.streams):
        while i < ways.stream[s].end:
            if unlikely(ways.at[i] == NOT_THERE):
                i += 1
                continue
            cd = window.data + ways.at[i]
            shapes = ways.stream[s].shapes
            j = ways.row[i]
            i += 1
            while shapes:
                k = ctz64(shapes)
                shapes &= shapes - 1
                shape = &run.shape[k]
                if unlikely(not shape.walks
                            or not alike64(cd, shape.memo.cd, shape.keep_cd)):
                    continue
                upper = half_of(rows.va[j], shape.memo.context.two_ttbs)
                half = &shape.memo.context.half[upper]
                # bits that need not be kept are all that is read once more: they may change
                first = le64(load64(cd + (16 if upper else 8))) & shape.free_table[upper]
                first |= half.table & ~shape.free_table[upper]
                rows.first[j] = first
                rows.shape[j] = <uint8_t>(2 * k + upper)
                if first != before:
                    before = first
                    at = entry_address(half, first, rows.va[j] & half.index_mask, half.shift)
                    at -= tables.base
                    if at <= tables.span:
                        prefetch(tables.data + at)
                break


cdef inline void pairs_find(Run* run, Rows* rows, Ways* ways) noexcept nogil:
    """Find the contexts of those rows of a block that are in `ways`: Rows.first and Rows.shape.

    Rows.shape stays LEFT where none is found.
    """
    if unlikely(run.shapes == 0 or not cr0_smmuen(run.core.hw.cr0)
                or run.shape[0].memo.hw_generation != run.core.hw.generation):
        return
    ways.window = run.port.window
    streams_find(run, rows, ways)
    ways_begin(run, rows, ways)
    ways_down(run, ways)
    ways_end(run, rows, ways)
