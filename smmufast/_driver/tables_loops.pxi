"""Loops that go down tables: find, remove, map, dirty state."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport realloc
from libc.string cimport memchr, memset

from smmufast._facts.bits cimport le64, likely, low_mask, unlikely
from smmufast._driver.leaves cimport leaves_alike, leaves_each, leaves_fill, leaves_union
from smmufast._driver.pages cimport (
    ACCESS_NO_MEMORY, FRAME_LG2, Frame, access_drop, holds, load_slow, pages_alloc, pages_free,
    pages_zero, store_slow, store_twice,
)


cdef uint32_t table_new(Tree* t) noexcept nogil:
    """A table with any contents that nothing leads to: its frame + 1; 0 when none is left."""
    cdef uint64_t table = 0
    cdef uint32_t i
    cdef Frame* frame
    if pages_alloc(t.pages, t.granule, &table):
        return 0
    i = <uint32_t>((table - t.origin) >> FRAME_LG2)
    frame = &t.frames[i]
    frame.owner = t.tag + UNLINKED
    frame.before = 0
    frame.after = t.tables
    if t.tables:
        t.frames[t.tables - 1].before = i + 1
    t.tables = i + 1
    frame.next = 0
    frame.entries = 0
    frame.level = UNLINKED
    frame.noted = False
    t.table_bytes += <uint64_t>1 << t.granule
    return i + 1


cdef void table_give(Tree* t, uint32_t i) noexcept nogil:
    """Give the table of frame i - 1 back."""
    cdef Frame* frame = &t.frames[i - 1]
    if frame.before:
        t.frames[frame.before - 1].after = frame.after
    else:
        t.tables = frame.after
    if frame.after:
        t.frames[frame.after - 1].before = frame.before
    frame.owner = 0
    pages_free(t.pages, t.origin + (<uint64_t>(i - 1) << FRAME_LG2), t.granule)
    t.table_bytes -= <uint64_t>1 << t.granule


cdef void tables_give(Tree* t, uint32_t list_) noexcept nogil:
    """Give the tables of a list back."""
    cdef uint32_t after
    while list_:
        after = t.frames[list_ - 1].next
        table_give(t, list_)
        list_ = after


cdef inline bint refused(const Tree* t) noexcept nogil:
    """An access to memory failed, and none was made since."""
    return not t.plain and t.access.status != 0


cdef inline bint vacant(const Tree* t, uint64_t table, uint64_t first, uint64_t n) noexcept nogil:
    """No entry of some is valid; unknown is not so."""
    cdef uint64_t i, found = 0
    if likely(t.plain):
        # what is found is not used, so these need not be single loads
        return not leaves_union(t.host + table + 8 * first, n) & PTE_S1_VALID
    for i in range(first, first + n):
        found |= load_slow(t.access, table + 8 * i)
    return not (found & PTE_S1_VALID or t.access.status)


cdef inline uint64_t fill(const Tree* t, uint64_t entry, uint64_t n, uint64_t d,
                          uint64_t step) noexcept nogil:
    """Write descriptors one after the other; how many memory has, which are less if it fails."""
    cdef uint64_t k
    if likely(t.plain):
        leaves_fill(t.host + entry, n, d, step)
        return n
    if refused(t):
        return 0
    for k in range(n):
        store_twice(t.access, entry + 8 * k, d)
        if refused(t):
            return k + holds(t.access, entry + 8 * k, d)
        d += step
    return n


cdef inline bint put_refused(const Tree* t, uint64_t entry, uint64_t d) noexcept nogil:
    """Write a descriptor; true when memory does not have it then."""
    put(t, entry, d)
    return unlikely(refused(t)) and not holds(t.access, entry, d)


cdef bint journal_room(Journal* journal) noexcept nogil:
    """There is room for one more; no without host memory."""
    cdef Taken* grown
    if journal.count == journal.capacity:
        journal.capacity = 2 * journal.capacity + 64
        grown = <Taken*>realloc(journal.taken, journal.capacity * sizeof(Taken))
        if grown == NULL:
            journal.capacity = journal.count
            return False
        journal.taken = grown
    return True


cdef bint take_away(Tree* t, uint64_t table, int level, uint64_t iova,
                    uint64_t mapped) noexcept nogil:
    """Write 0 over the descriptor of an address; no when memory has it still."""
    cdef uint64_t entry = table + offset_of(t, iova, level), d
    cdef Taken* taken
    if t.journal == NULL:
        return not put_refused(t, entry, 0)
    d = get(t, entry)
    if not refused(t) and not journal_room(t.journal):
        t.access.status = ACCESS_NO_MEMORY
    if refused(t) or put_refused(t, entry, 0):
        return False
    taken = &t.journal.taken[t.journal.count]
    taken.table, taken.level, taken.entry, taken.d = table, level, entry, d
    taken.iova, taken.mapped = iova, mapped
    t.journal.count += 1
    return True


cdef inline uint64_t take_leaves(
        Tree* t, uint64_t table, int level, uint64_t iova, uint64_t n) noexcept nogil:
    """Write 0 over the leaves from an address on; how many memory has no longer."""
    cdef uint64_t k
    if likely(t.plain):
        leaves_fill(t.host + table + offset_of(t, iova, level), n, 0, 0)
        return n
    for k in range(n):
        if not take_away(t, table, level, iova + (k << t.shift[level]),
                         <uint64_t>1 << t.shift[level]):
            return k
        if refused(t):
            return k + 1
    return n


cdef void give_back(Tree* t, Journal* journal, Batch* gone) noexcept nogil:
    """Put back what an unmap took away.  What is lost in spite of that goes into a batch."""
    cdef Taken* taken
    cdef bint leads
    while journal.count:
        journal.count -= 1
        taken = &journal.taken[journal.count]
        leads = kind_of(t, taken.d, taken.level) == KIND_TABLE
        if (taken.level != t.start and foreign(t, taken.table, taken.level)
                or get(t, taken.entry) or refused(t)
                or not settle(t, taken.entry, taken.d)):
            # memory refuses, or somebody has used it while the flush of a piece ran
            access_drop(t.access)
            batch_cover(t, gone, taken.iova, taken.iova | low_mask(t.shift[taken.level]))
            if leads:
                retire(t, address_of(t, taken.d), gone)
            continue
        count_in(t, taken.table, taken.level, 1)
        t.mapped += taken.mapped
        if leads:
            frame_of(t, address_of(t, taken.d)).owner = t.tag + <uint32_t>(taken.level + 1)


cdef uint32_t tables_join(Tree* t, uint32_t first, uint32_t second) noexcept nogil:
    """One list of two."""
    cdef uint32_t each = first
    if first == 0:
        return second
    while t.frames[each - 1].next:
        each = t.frames[each - 1].next
    t.frames[each - 1].next = second
    return first


cdef inline uint64_t alike(const Tree* t, uint64_t entry, uint64_t n, uint64_t kind) noexcept nogil:
    """How many descriptors from one on are of a kind."""
    cdef uint64_t k = 0
    if likely(t.plain):
        return leaves_alike(t.host + entry, n, TABLE, kind)
    while k < n and load_slow(t.access, entry + 8 * k) & TABLE == kind:
        k += 1
    return k


cdef inline void count_in(Tree* t, uint64_t table, int level, uint64_t n) noexcept nogil:
    if level != t.start:
        frame_of(t, table).entries += <unsigned short>n


cdef inline bint count_out(Tree* t, uint64_t table, int level, uint64_t n) noexcept nogil:
    """Entries are gone; true if, as far as is known, none is left."""
    cdef Frame* frame
    if level == t.start:
        return False
    frame = frame_of(t, table)
    # somebody else may have written more entries than are known
    frame.entries = <unsigned short>(frame.entries - n) if frame.entries > n else 0
    return frame.entries == 0


cdef void note(Tree* t, uint64_t table, uint64_t iova, int level) noexcept nogil:
    """Remember a table that seems to be empty."""
    cdef Frame* frame = frame_of(t, table)
    if not frame.noted and t.n_notes < NOTES:
        frame.noted = True
        t.notes[t.n_notes].iova = iova
        t.notes[t.n_notes].level = level
        t.n_notes += 1


# --- removing ---

cdef inline void batch_cover(Tree* t, Batch* b, uint64_t first, uint64_t last) noexcept nogil:
    """Let the flush of a batch, if there is to be one, cover a range as well."""
    if not t.active:
        return
    if b.page_lg2 == 0:
        b.first, b.last, b.page_lg2 = first, last, t.granule
        return
    b.first = min(b.first, first)
    b.last = max(b.last, last)


cdef inline bint batch_takes(
        Batch* b, uint64_t first, uint64_t last, unsigned int lg2) noexcept nogil:
    """Let it cover pages of one size, if they continue what it covers."""
    if b.page_lg2 == 0:
        b.first, b.last, b.page_lg2 = first, last, lg2
        return True
    # a range ends at most at 2^52
    if b.page_lg2 != lg2 or first > b.last + 1 or last + 1 < b.first:
        return False
    b.first = min(b.first, first)
    b.last = max(b.last, last)
    return True


cdef inline void retire(Tree* t, uint64_t table, Batch* b) noexcept nogil:
    """Nothing leads to a table any more: it is given back after the flush of the batch."""
    cdef Frame* frame = frame_of(t, table)
    frame.owner = t.tag + UNLINKED
    frame.next = b.tables
    b.tables = <uint32_t>((table - t.origin) >> FRAME_LG2) + 1
    b.unlinked = True


cdef void drop_empty(Tree* t, const Path* p, int level, uint64_t at, uint64_t first, uint64_t last,
                     Batch* b) noexcept nogil:
    """Unlink the table of `at` at a level if it is empty and first .. last covers it; then those
    above it.  An empty one that is not covered is noted."""
    cdef uint64_t table, span
    while level > t.start:
        table = p.table[level]
        if frame_of(t, table).entries:
            return
        span = span_mask(t, level)
        if at & ~span < first or at | span > last or refused(t):
            note(t, table, at & ~span, level)
            return
        if not vacant(t, table, 0, entries_of(t, level)):
            return
        if not take_away(t, p.table[level - 1], level - 1, at & ~span, 0):
            note(t, table, at & ~span, level)
            return
        batch_cover(t, b, at & ~span, at | span)
        level -= 1
        retire(t, table, b)
        count_out(t, p.table[level], level, 1)


cdef inline bint cut_at(const Tree* t, uint64_t table, int level, uint64_t i, uint64_t boundary,
                        uint64_t* first) noexcept nogil:
    """Entry i belongs to a run that a boundary beside it cuts in two; where the run begins."""
    cdef uint64_t within = low_mask(t.run_lg2[level])
    first[0] = i & ~within
    return boundary & within and get(t, table + 8 * i) & PTE_S1_CONTIGUOUS


cdef bint run_break(Tree* t, const Run* run) noexcept nogil:
    """Take the hint from the leaves of a run that are there: from all of them, or from none."""
    cdef uint64_t[LONGEST_RUN] kept
    cdef uint64_t i, k
    for i in range(run.n):
        kept[i] = get(t, run.entry + 8 * i)
    for i in range(run.n):
        if refused(t):
            break
        if kept[i] & PTE_S1_VALID and put_refused(
                t, run.entry + 8 * i, kept[i] & ~PTE_S1_CONTIGUOUS):
            for k in range(i):
                settle(t, run.entry + 8 * k, kept[k])
            break
    return not refused(t)


cdef int remove(Tree* t, uint64_t first, uint64_t end, uint64_t* at, Batch* b,
                Run* run) noexcept nogil:
    """Unmap from `at` on, which is `first` at the first call, up to `end`.

    DONE, STOPPED at a hole; FULL when the batch must be flushed before it goes on, CUT when the
    run must be broken up.  Any of them may come after pages were removed: `at` tells.
    """
    cdef Path p
    cdef int level, kind
    cdef unsigned int shift
    cdef uint64_t i, n, k, entries, table, want, begin, last
    cdef bint whole, is_near = False
    while at[0] < end:
        kind = find_next(t, at[0], 3, is_near, &p)
        level = p.level
        shift = t.shift[level]
        table = p.table[level]
        if unlikely(kind == KIND_FOREIGN):
            return STRAY
        if unlikely(refused(t)):
            return STOPPED
        if unlikely(kind == KIND_HOLE):
            drop_empty(t, &p, level, at[0], first, end - 1, b)
            return STOPPED
        if unlikely(at[0] & low_mask(shift)):
            return STOPPED  # a block that begins below
        entries = entries_of(t, level)
        i = (p.entry - table) >> 3
        n = min(entries - i, ((end - at[0] - 1) >> shift) + 1)
        want = TABLE if level == 3 else PTE_S1_VALID
        if n > 1:
            n = alike(t, p.entry + 8, n - 1, want) + 1
        # twice at most, for a memory that does not keep what is written
        if t.run_lg2[level] and (run.at != at[0] or run.cuts < 2):
            if cut_at(t, table, level, i, i, &k) or cut_at(t, table, level, i + n - 1, i + n, &k):
                run.table = table
                run.level = level
                run.entry = table + 8 * k
                run.n = min(<uint64_t>1 << t.run_lg2[level], entries - k)  # the root may be shorter
                run.shift = shift
                run.iova = at[0] - (i << shift) + (k << shift)
                run.cuts = run.cuts + 1 if run.at == at[0] else 1
                run.at = at[0]
                if t.active:
                    return CUT
                if not run_break(t, run):
                    return STOPPED
                is_near = False
                continue  # the other end may cut another one
        begin = at[0]
        last = begin + (n << shift) - 1
        if t.active and not batch_takes(b, begin, last, shift):
            return FULL
        whole = n == entries and level > t.start
        if whole:  # what the table holds does not matter
            level -= 1
            if not take_away(t, p.table[level], level, begin, last + 1 - begin):
                return STOPPED
        else:
            n = take_leaves(t, table, level, begin, n)
            if unlikely(n == 0):
                return STOPPED
            last = begin + (n << shift) - 1
        at[0] = last + 1
        t.mapped -= min(t.mapped, last + 1 - begin)
        if whole:
            retire(t, table, b)
            n = 1
            table = p.table[level]
        is_near = near(t, &p, begin, at[0])
        if count_out(t, table, level, n):
            drop_empty(t, &p, level, begin, first, max(end - 1, last), b)
            is_near = False  # that may have been the table
        if unlikely(refused(t)):
            return STOPPED
    return DONE


cdef int all_tables(
        const Tree* t, uint64_t* at, uint64_t end, bint stop, Path* p) noexcept nogil:
    """STRAY if a table on the way to `at` .. `end` is none; with `stop`, up to the first hole."""
    cdef int kind, level
    cdef unsigned int shift
    cdef uint64_t before, n
    cdef bint is_near = False
    while at[0] < end:
        before = at[0]
        kind = find_next(t, before, 3, is_near, p)
        if kind == KIND_FOREIGN:
            return STRAY
        if kind == KIND_HOLE and stop:
            return DONE
        level = min(p.level, 2)
        shift = t.shift[level]
        at[0] = (before | low_mask(shift)) + 1
        # the blocks beside it, in the same table
        n = entries_of(t, level) - 1 - (offset_of(t, before, level) >> 3)
        if kind == KIND_LEAF and p.level == level and n and at[0] < end:
            n = min(n, ((end - at[0] - 1) >> shift) + 1)
            at[0] += alike(t, p.entry + 8, n, PTE_S1_VALID) << shift
        is_near = near(t, p, before, at[0])
    return DONE


cdef void reclaim(Tree* t, Batch* b) noexcept nogil:
    """Unlink the noted tables that are empty, and what becomes empty by that."""
    cdef Path p
    cdef Note each
    cdef uint64_t table
    cdef int level
    while t.n_notes:
        t.n_notes -= 1
        each = t.notes[t.n_notes]
        level = each.level
        find(t, each.iova, level, &p)
        if refused(t):
            t.n_notes += 1
            return
        if p.level != level:
            continue
        table = p.table[level]
        frame_of(t, table).noted = False
        if frame_of(t, table).entries:
            continue
        if (not vacant(t, table, 0, entries_of(t, level))
                or not take_away(t, p.table[level - 1], level - 1, each.iova, 0)):
            if refused(t):
                note(t, table, each.iova, level)
                return
            continue
        batch_cover(t, b, each.iova, each.iova | span_mask(t, level))
        level -= 1
        retire(t, table, b)
        if count_out(t, p.table[level], level, 1):
            note(t, p.table[level], each.iova & ~span_mask(t, level), level)
        if refused(t):
            return


# --- mapping ---

cdef inline uint64_t write_leaves(
        const Tree* t, uint64_t table, int level, uint64_t i, uint64_t n, uint64_t pa,
        uint64_t d) noexcept nogil:
    """Write n leaves from entry i on, with the hint where it may be; how many memory has."""
    cdef uint64_t entry = table + 8 * i, step = <uint64_t>1 << t.shift[level]
    cdef unsigned int run = t.run_lg2[level]
    cdef uint64_t head, runs, done
    d |= address_bits(t, pa) | (TABLE if level == 3 else PTE_S1_VALID)
    if t.hints and run:
        head = (0 - i) & low_mask(run)
        if head <= n and n - head >> run and not (
                pa + (head << t.shift[level]) & low_mask(run + t.shift[level])):
            runs = (n - head) >> run << run
            done = fill(t, entry, head, d, step)
            if done == head:
                done += fill(
                    t, entry + 8 * head, runs, (d + head * step) | PTE_S1_CONTIGUOUS, step)
            head += runs
            if done == head:
                done += fill(t, entry + 8 * head, n - head, d + head * step, step)
            return done
    return fill(t, entry, n, d, step)


cdef inline bint map_here(Tree* t, uint64_t iova, uint64_t pa, uint64_t size,
                          uint64_t attributes) noexcept nogil:
    """Map what one table takes that is there, where nothing is; false: it is not so simple."""
    cdef Path p
    cdef int level = leaf_level(t, iova, pa, size)
    cdef uint64_t n = size >> t.shift[level], i
    if n << t.shift[level] != size or n > run_length(t, iova, pa, size, level):
        return False
    if find(t, iova, level, &p) != KIND_HOLE or p.level != level:
        return False
    i = (p.entry - p.table[level]) >> 3
    if n > 1 and not vacant(t, p.table[level], i, n):
        return False
    write_leaves(t, p.table[level], level, i, n, pa, attributes)
    count_in(t, p.table[level], level, n)
    t.mapped += size
    return True


cdef int live(const Tree* t, uint64_t table, int level, Path* p) noexcept nogil:
    """TAKEN if something is mapped in a table or below; STRAY, which p names; DONE."""
    cdef uint64_t i, d
    cdef int kind, status
    for i in range(entries_of(t, level)):
        d = get(t, table + 8 * i)
        kind = kind_of(t, d, level)
        if kind == KIND_LEAF:
            return TAKEN
        if kind == KIND_TABLE:
            status = below(t, d, level, p)
            if status:
                return status
    return DONE


cdef int below(const Tree* t, uint64_t d, int level, Path* p) noexcept nogil:
    """What `live` says of the table that a descriptor of this level names."""
    if foreign(t, address_of(t, d), level + 1):
        p.d, p.level = d, level
        return STRAY
    return live(t, address_of(t, d), level + 1, p)


cdef int plan_entries(const Tree* t, uint64_t at, int level, uint64_t i, uint64_t n,
                      Plan* plan) noexcept nogil:
    """Look at entries that are to hold leaves."""
    cdef uint64_t table = plan.path.table[level], d, k
    cdef int kind, status
    cdef Conversion* grown
    for k in range(n):
        d = get(t, table + 8 * (i + k))
        kind = kind_of(t, d, level)
        if kind == KIND_HOLE:
            continue
        plan.where = at + (k << t.shift[level])
        if kind == KIND_LEAF:
            return TAKEN
        status = below(t, d, level, &plan.path)
        if status:
            return status
        if plan.n_conversions == plan.capacity:
            plan.capacity = 2 * plan.capacity + 8
            grown = <Conversion*>realloc(plan.conversions, plan.capacity * sizeof(Conversion))
            if grown == NULL:
                return NO_HOST_MEMORY
            plan.conversions = grown
        grown = &plan.conversions[plan.n_conversions]
        grown.table, grown.level, grown.entry = table, level, table + 8 * (i + k)
        grown.d, grown.iova = d, plan.where
        plan.n_conversions += 1
    return DONE


cdef int plan_segments(const Tree* t, uint64_t at, const Segment* segments, size_t count,
                       Plan* plan) noexcept nogil:
    """Find out whether nothing is mapped there, and which tables it takes."""
    cdef uint64_t pa, rest, i, n
    cdef size_t k
    cdef int level, below, kind, status
    cdef bint is_near = False
    for k in range(count):
        pa, rest = segments[k].pa, segments[k].size
        while rest:
            level = leaf_level(t, at, pa, rest)
            n = run_length(t, at, pa, rest, level)
            kind = find_next(t, at, level, is_near, &plan.path)
            plan.where = at
            if kind == KIND_FOREIGN:
                return STRAY
            if plan.path.level == level:
                i = offset_of(t, at, level) >> 3
                if not vacant(t, plan.path.table[level], i, n):
                    status = plan_entries(t, at, level, i, n, plan)
                    if status:
                        return status
            elif kind == KIND_LEAF:
                return TAKEN
            else:
                for below in range(plan.path.level + 1, level + 1):
                    if at >= plan.reached[below]:
                        plan.n_tables += 1
                        plan.reached[below] = (at | span_mask(t, below)) + 1
                if plan.n_tables > t.pages.size >> t.granule:
                    return NO_PAGES
            n <<= t.shift[level]
            is_near = near(t, &plan.path, at, at + n)
            at += n
            pa += n
            rest -= n
    return DONE


cdef int allocate(Tree* t, Plan* plan) noexcept nogil:
    """Have all tables that a plan takes, before anything is written."""
    cdef uint64_t _
    cdef uint32_t i
    for _ in range(plan.n_tables):
        i = table_new(t)
        if i == 0:
            return NO_PAGES
        t.frames[i - 1].next = plan.tables
        plan.tables = i
    return DONE


cdef int write_segments(Tree* t, uint64_t at, const Segment* segments, size_t count,
                        uint64_t attributes, Plan* plan) noexcept nogil:
    """Write what was planned.  CHANGED if the tables are not as they were, or cannot be written.

    What is written then lies below plan.where.
    """
    cdef uint64_t pa, rest, i, n, table, d, written = 0
    cdef size_t k
    cdef int level, below, kind
    cdef bint is_near = False
    cdef Frame* frame
    cdef Path p
    for k in range(count):
        pa, rest = segments[k].pa, segments[k].size
        while rest:
            level = leaf_level(t, at, pa, rest)
            n = run_length(t, at, pa, rest, level)
            i = offset_of(t, at, level) >> 3
            kind = find_next(t, at, level, is_near, &p)
            below = p.level
            plan.where = at
            if kind == KIND_FOREIGN or below < level and kind != KIND_HOLE:
                return CHANGED
            while below < level:
                if plan.tables == 0:
                    return CHANGED
                frame = &t.frames[plan.tables - 1]
                table = t.origin + (<uint64_t>(plan.tables - 1) << FRAME_LG2)
                plan.tables = frame.next
                below += 1
                # contents before the entry that leads there
                if below < level or n != entries_of(t, level):
                    pages_zero(t.pages, t.access, table, <uint64_t>1 << t.granule)
                if below == level:
                    written = write_leaves(t, table, level, i, n, pa, attributes)
                frame.level = <uint8_t>below
                frame.owner = t.tag + <uint32_t>below
                d = address_bits(t, table) | TABLE
                publish(t, p.entry, d)
                if refused(t) and not holds(t.access, p.entry, d):
                    plan.where = at + (n << t.shift[level])
                    frame.owner = t.tag + UNLINKED
                    frame.next = plan.tables
                    plan.tables = <uint32_t>((table - t.origin) >> FRAME_LG2) + 1
                    return CHANGED
                count_in(t, p.table[below - 1], below - 1, 1)
                p.table[below] = table
                p.entry = table + offset_of(t, at, below)
                p.level = below - 1
            if p.level == level:
                written = write_leaves(t, p.table[level], level, i, n, pa, attributes)
            count_in(t, p.table[level], level, written)
            t.mapped += written << t.shift[level]
            n <<= t.shift[level]
            is_near = near(t, &p, at, at + n)
            at += n
            pa += n
            rest -= n
            if refused(t):
                plan.where = at
                return CHANGED
    return DONE


cdef void undo(Tree* t, uint64_t iova, uint64_t end, Batch* b) noexcept nogil:
    """Take out what a map that failed wrote from one address to another, where nothing was.

    What the memory does not let be taken out stays, and is counted.
    """
    cdef Path p
    cdef uint64_t at = iova, unread = end
    cdef int kind, level
    cdef unsigned int shift
    while at < end:
        kind = find(t, at, 3, &p)
        if refused(t):
            if unread == at:
                return
            unread = at
            access_drop(t.access)
            continue
        level = p.level
        shift = t.shift[level]
        if kind == KIND_LEAF and not at & low_mask(shift) and settle(t, p.entry, 0):
            batch_cover(t, b, at, at | low_mask(shift))
            t.mapped -= min(t.mapped, <uint64_t>1 << shift)
            count_out(t, p.table[level], level, 1)
        if kind != KIND_FOREIGN:
            drop_empty(t, &p, level, at, 0, t.input_last, b)
            access_drop(t.access)
        at = (at | low_mask(shift)) + 1


cdef void collect(Tree* t, uint64_t table, int level, Batch* b) noexcept nogil:
    """Retire a table and those below."""
    cdef uint64_t i, d
    for i in range(entries_of(t, level)):
        d = get(t, table + 8 * i)
        if kind_of(t, d, level) == KIND_TABLE and not foreign(t, address_of(t, d), level + 1):
            collect(t, address_of(t, d), level + 1, b)
    retire(t, table, b)


# --- dirty state ---

cdef struct Dirty:
    uint64_t first         # of what was cleared
    uint64_t last
    unsigned int page_lg2  # the smallest page that was; 0: nothing was


cdef inline void clean(Tree* t, uint64_t entry, uint64_t d, Dirty* cleared, uint64_t at,
                       unsigned int shift) noexcept nogil:
    """Make a leaf clean; hardware may change other bits of it meanwhile."""
    if t.plain:
        or64(t.host + entry, le64(PTE_S1_AP2))
    else:
        store_slow(t.access, entry, d | PTE_S1_AP2)
    if cleared.page_lg2 == 0:
        cleared.first, cleared.page_lg2 = at, shift
    cleared.page_lg2 = min(cleared.page_lg2, shift)
    cleared.last = at | low_mask(shift)


cdef void read_dirty_pages(Tree* t, uint64_t entry, uint64_t n, uint64_t at, bint clear,
                           uint8_t* out, Dirty* cleared) noexcept nogil:
    """Tell of entries of one table of level 3, in plain memory; make the dirty ones clean.

    What is not found dirty is not touched, and stays so if hardware makes it dirty meanwhile.
    """
    cdef const uint8_t* found = out
    leaves_each(t.host + entry, n, TABLE | PTE_S1_DBM | PTE_S1_AP2, TABLE | PTE_S1_DBM, out)
    if not clear:
        return
    while found < out + n:
        if not found[0]:
            found = <const uint8_t*>memchr(found, 1, out + n - found)
            if found == NULL:
                return
        clean(t, entry + 8 * (found - out), 0, cleared,
              at + (<uint64_t>(found - out) << t.granule), t.granule)
        found += 1


cdef void read_dirty_bits(Tree* t, uint64_t iova, uint64_t end, bint clear, uint8_t* out,
                          Dirty* cleared) noexcept nogil:
    """Fill `out` with a byte for each granule; make clean the dirty leaves within the range."""
    cdef Path p
    cdef uint64_t at = iova, beyond, k, n
    cdef int kind
    cdef unsigned int shift
    cdef bint is_near = False
    memset(out, 0, (end - iova) >> t.granule)
    while at < end:
        kind = find_next(t, at, 3, is_near, &p)
        shift = t.shift[p.level]
        if t.plain and p.level == 3:
            n = entries_of(t, 3) - (offset_of(t, at, 3) >> 3)
            n = min(n, (end - at) >> t.granule)
            read_dirty_pages(t, p.entry, n, at, clear, out + ((at - iova) >> t.granule), cleared)
            is_near = near(t, &p, at, at + (n << t.granule))
            at += n << t.granule
            continue
        is_near = False
        if kind != KIND_LEAF:
            at = (at | low_mask(shift)) + 1
            continue
        # the leaves of a table, one after the other
        while True:
            beyond = (at | low_mask(shift)) + 1
            if p.d & (PTE_S1_DBM | PTE_S1_AP2) == PTE_S1_DBM:
                k = (at - iova) >> t.granule
                memset(out + k, 1, ((min(beyond, end) - 1 - iova) >> t.granule) + 1 - k)
                if clear and not at & low_mask(shift) and beyond <= end:
                    clean(t, p.entry, p.d, cleared, at, shift)
            at = beyond
            if at >= end or offset_of(t, at, p.level) == 0:
                break
            p.entry += 8
            p.d = get(t, p.entry)
            if kind_of(t, p.d, p.level) != KIND_LEAF:
                break


cdef void dirty_again(Tree* t, uint64_t iova, uint64_t end, const uint8_t* told) noexcept nogil:
    """Let what was told to be dirty be so again, in memory that is not plain."""
    cdef Path p
    cdef uint64_t at = iova
    while at < end:
        p.level = 3
        if (told[(at - iova) >> t.granule] and find(t, at, 3, &p) == KIND_LEAF
                and p.d & (PTE_S1_DBM | PTE_S1_AP2) == PTE_S1_DBM | PTE_S1_AP2):
            settle(t, p.entry, p.d & ~PTE_S1_AP2)
        access_drop(t.access)
        at = (at | low_mask(t.shift[p.level])) + 1
