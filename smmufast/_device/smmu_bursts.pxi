"""Bursts: a range of addresses as physical segments."""

from libc.stdint cimport uint64_t
from libc.stdlib cimport realloc

from smmufast._facts.bits cimport noinline, low_mask
from smmufast._engine.core cimport Core
from smmufast._engine.memory cimport Port
from smmufast._engine.cached cimport deliver, translate_request
from smmufast._engine.lookup cimport Memo
from smmufast._engine.translate cimport translate_known
from smmufast._facts.types cimport ACTION_DISABLED, Outcome, Request


cdef enum:
    BURST_PAGES = 4096   # pages between looks for signals

# How burst_run ends, besides negative stops.
cdef enum:
    BURST_DONE = 0
    BURST_MORE = 1
    BURST_STOPPED = 2    # at a page that fails
    BURST_NO_ROOM = 3


# A row of Segments.array.
cdef struct Row:
    uint64_t iova
    uint64_t pa
    uint64_t length


# A burst under way: the segments so far; of the last page's outcome perm, attr and sh, or all of
# it if it failed.
cdef struct Burst:
    uint64_t rest       # bytes to go
    Row* rows
    size_t count
    size_t capacity
    Outcome outcome


cdef int burst_add(Burst* burst, uint64_t iova, const Outcome* page,
                   uint64_t length) noexcept nogil:
    """Append a page to the last segment, or as a new one: BURST_MORE, or BURST_NO_ROOM."""
    cdef Row* row
    cdef Row* grown
    cdef size_t capacity
    if (burst.count and burst.outcome.perm == page.perm and burst.outcome.attr == page.attr
            and burst.outcome.sh == page.sh):
        row = &burst.rows[burst.count - 1]
        if row.pa + row.length == page.pa:
            row.length += length
            return BURST_MORE
    if burst.count == burst.capacity:
        capacity = 2 * burst.capacity + 8
        grown = <Row*>realloc(burst.rows, capacity * sizeof(Row))
        if grown == NULL:
            return BURST_NO_ROOM
        burst.rows = grown
        burst.capacity = capacity
    row = &burst.rows[burst.count]
    row.iova = iova
    row.pa = page.pa
    row.length = length
    burst.count += 1
    return BURST_MORE


ctypedef int (*ScalarPath)(Core*, Port*, const Request*, Memo*, Outcome*) noexcept nogil


# S15.2-2, S16.7.1-1
cdef int burst_run(Core* core, Port* port, Memo* memo, Request* request,
                   Burst* burst, Looking* looking) noexcept nogil:
    """Translate the next pages of a burst; `request` is that of the next page.

    In plain memory the context is looked up once for all of them; elsewhere every page makes
    all its fetches.  With `looking` each page is looked at.
    """
    cdef Outcome page
    cdef uint64_t room
    cdef bint known = False
    cdef int status, _page
    for _page in range(BURST_PAGES):
        if burst.rest == 0:
            return BURST_DONE
        if looking != NULL:
            status = look_one(core, looking, port, request, &page)
        elif known and not port.wrote:
            status = deliver(
                core, port, request, translate_known(&core.hw, port, request, memo, &page), &page)
        else:
            port.wrote = False
            status = (<ScalarPath>noinline(<void*>translate_request))(
                core, port, request, memo, &page)
            known = core.caches == NULL and port.ram.plain and memo.whole
        if status:
            return status
        if page.action > ACTION_DISABLED:
            burst.outcome = page
            return BURST_STOPPED
        if page.page_lg2:
            room = (<uint64_t>1 << page.page_lg2) - (request.iova & low_mask(page.page_lg2))
        else:  # untranslated as far as addresses are legal
            room = ~core.hw.oas_over - request.iova + 1
        if room > burst.rest:
            room = burst.rest
        status = burst_add(burst, request.iova, &page, room)
        if status != BURST_MORE:
            return status
        # what burst_add compares; a whole copy would wait for the stores just made
        burst.outcome.perm = page.perm
        burst.outcome.attr = page.attr
        burst.outcome.sh = page.sh
        request.iova += room
        burst.rest -= room
    return BURST_MORE
