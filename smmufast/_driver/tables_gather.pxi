"""Gather: tables and ranges that go when an invalidation is done."""

cimport cython
from libc.string cimport memset

from smmufast.errors import InvalidArgument


@cython.final
@cython.auto_pickle(False)
@cython.no_gc_clear  # as the page table
cdef class Gather:
    """Gather(table)\n--\n
    What unmaps have removed and is not flushed yet; a context manager that flushes at its end.

    A range that does not continue what was gathered, or that has pages of another size, flushes
    what was there first.

    Parameters
    ----------
    table : PageTable

    Examples
    --------
    >>> from smmufast import Memory
    >>> from smmufast._driver.tables import Gather, Pages, PageTable
    >>> class Domain(PageTable):
    ...     def flush(self, first, last, page_lg2, tables):
    ...         print(hex(first), hex(last), page_lg2, tables)
    >>> memory = Memory()
    >>> memory.add_private(0x8000_0000, 1 << 20)
    >>> domain = Domain(Pages(memory, 0x8000_0000, 1 << 20))
    >>> domain.map(0x1000, 0x4000_0000, 0x3000)
    >>> domain.active = True
    >>> with Gather(domain) as gather:
    ...     total = domain.unmap(0x1000, 0x1000, gather) + domain.unmap(0x2000, 0x2000, gather)
    0x1000 0x3fff 12 False
    """

    def __init__(self, PageTable table not None):
        if self.table is not None:
            raise InvalidArgument("table", text="the gather has its page table already")
        self.table = table
        self.epoch = table.epoch

    def __dealloc__(self):
        # what was not flushed is flushed with what the table removes next
        if self.table is not None and self.epoch == self.table.epoch:
            self.table._merge(&self.table.own, &self.batch)
            self.table._owe()

    cdef void _renew(self) noexcept:
        """Forget what a page table has given back on its own."""
        if self.epoch != self.table.epoch:
            self.epoch = self.table.epoch
            memset(&self.batch, 0, sizeof(Batch))

    def sync(self):
        """Flush what was gathered, and give back the tables that were removed.

        If `flush` raises, it stays gathered.
        """
        if self.table is None:
            raise InvalidArgument("table", text="the gather has no page table")
        self._renew()
        self.table._wait()
        self.table._sync(&self.batch)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.sync()
