# cython: binding=False, embedsignature=True, embedsignature.format=clinic
# cython: language_level=3, freethreading_compatible=True
"""PASID allocation: the class that owns the bitmaps of pasid.pxd, and its errors."""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.dict cimport PyDict_Size
from cpython.exc cimport PyErr_Clear
from cpython.long cimport PyLong_CheckExact
from cpython.number cimport PyIndex_Check, PyNumber_Index
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
cimport numpy as cnp

from smmufast._engine.memory cimport to_flag

import errno as _errno

import numpy as np

from smmufast._arguments import in_words, must_be, shown

cdef extern from "Python.h":
    # -1 with OverflowError set is taken for the number -1, which is as much out of range.
    Py_ssize_t PyLong_AsSsize_t(object) noexcept

cnp.import_array()


class PasidError(Exception):
    """Base of the errors of PasidAllocator.

    Attributes
    ----------
    value : int
        The argument's value, or the ID, that the message is about.
    errno : int
        The number of the cause in the module of that name, positive; 0 for this base.
    """

    errno = 0

    def __init__(self, message, value):
        super().__init__(message, value)
        self.value = value

    def __str__(self):
        return self.args[0]


class PasidExhausted(PasidError, RuntimeError):
    """Not as many free IDs in the range as were asked for; `value` is how many there are."""

    errno = _errno.ENOSPC


class PasidNotAllocated(PasidError, KeyError):
    """The ID is free."""

    errno = _errno.ENOENT


class PasidAllocated(PasidError, ValueError):
    """The ID is allocated, so it cannot be reserved."""

    errno = _errno.EBUSY


class PasidReserved(PasidError, ValueError):
    """The ID is reserved: not to be freed, looked up, or reserved again."""

    errno = _errno.EBUSY


class PasidNotReserved(PasidError, ValueError):
    """The ID is not reserved, so its reservation cannot be given back."""

    errno = _errno.EINVAL


class PasidDuplicate(PasidError, ValueError):
    """The same ID is in the array twice."""

    errno = _errno.EINVAL


class PasidOutOfRange(PasidError, ValueError):
    """Not an ID of this allocator: negative, or not below its size."""

    errno = _errno.ERANGE


class PasidRangeEmpty(PasidError, ValueError):
    """The range's first ID is above its last."""

    errno = _errno.EINVAL


cdef object no_integer(str name, object value):
    return TypeError(must_be(name, "an integer", type(value)))


cdef object integer(object value, str name):
    """An int of exactly that type, from anything that is usable as an index."""
    if PyLong_CheckExact(value):
        return value
    if not PyIndex_Check(value):
        raise no_integer(name, value)
    return PyNumber_Index(value)


cdef object out_of_range(str name, uint32_t size, object value):
    return PasidOutOfRange(must_be(name, f"0 to {shown(size - 1)}", value), value)


cdef Py_ssize_t id_slow(object value, str name, uint32_t size) except -1:
    cdef Py_ssize_t n
    PyErr_Clear()
    value = integer(value, name)
    n = PyLong_AsSsize_t(value)
    PyErr_Clear()
    if 0 <= n < size:
        return n
    raise out_of_range(name, size, value)


cdef inline Py_ssize_t id_of(object value, str name, uint32_t size) except -1:
    """An ID below size from a Python argument; `name` is for the error."""
    cdef Py_ssize_t n
    if PyLong_CheckExact(value):
        n = PyLong_AsSsize_t(value)
        if 0 <= n < size:
            return n
    return id_slow(value, name, size)


cdef int range_of(
    const Pasids* p, object min, object max, str min_name, str max_name,
    uint32_t* first, uint32_t* last
) except -1:
    """A range from two Python arguments, of which None means the end of the IDs."""
    first[0] = 0 if min is None else <uint32_t>id_of(min, min_name, p.size)
    last[0] = p.size - 1 if max is None else <uint32_t>id_of(max, max_name, p.size)
    if first[0] > last[0]:
        raise PasidRangeEmpty(
            must_be(min_name, f"0 to {shown(last[0])} ({max_name})", first[0]), first[0])
    return 0


cdef object exhausted(const Pasids* p, object count, uint32_t first, uint32_t last):
    cdef uint32_t n = pasid_count(p, first, last, p.size)
    limit = f"0 to {shown(n)}, the number of free IDs in {first}..{last}"
    return PasidExhausted(must_be("count", limit, count), n)


cdef object not_allocated(const Pasids* p, str what, uint32_t pasid):
    if pasid_state(p, pasid) == PASID_RESERVED:
        return PasidReserved(f"{what} is reserved; it must be an allocated ID", pasid)
    return PasidNotAllocated(f"{what} is free; it must be an allocated ID", pasid)


cdef int check_out(object out, object count) except -1:
    if not cnp.PyArray_Check(out):
        raise TypeError(must_be("out", "a numpy.ndarray", type(out)))
    if cnp.PyArray_TYPE(out) != cnp.NPY_UINT32:
        raise TypeError(in_words("out.dtype", "uint32", str(out.dtype)))
    if not cnp.PyArray_ISCARRAY(out):
        raise ValueError("out must be C-contiguous, aligned, writable and of native byte order")
    if cnp.PyArray_NDIM(out) != 1 or cnp.PyArray_DIM(out, 0) != count:
        raise ValueError(must_be("out.shape", f"({shown(count)},)", out.shape))
    return 0


cdef cnp.ndarray array_of(object pasids):
    if not cnp.PyArray_CheckExact(pasids):
        pasids = np.asarray(pasids)
    if cnp.PyArray_NDIM(pasids) != 1:
        raise ValueError(must_be("pasids.ndim", "1", pasids.ndim))
    if not cnp.PyArray_ISINTEGER(pasids) and cnp.PyArray_SIZE(pasids):
        raise TypeError(in_words("pasids.dtype", "an integer", str(pasids.dtype)))
    return pasids


cdef cnp.ndarray ids_of(cnp.ndarray array, uint32_t size):
    """As contiguous uint32, in which an ID that is out of range stays out of range."""
    if cnp.PyArray_TYPE(array) == cnp.NPY_UINT32 and cnp.PyArray_ISCARRAY_RO(array):
        return array
    if cnp.PyArray_TYPE(array) != cnp.NPY_UINT32 and cnp.PyArray_SIZE(array):
        array = np.where((array < 0) | (array >= size), np.uint32(PASID_NONE), array)
    return np.ascontiguousarray(array, np.uint32)


@cython.final
@cython.auto_pickle(False)
# The collector can clear the dict by itself, which breaks every cycle through an owner. Clearing
# the allocator as well would only replace `owners` by None, which the methods do not expect.
@cython.no_gc_clear
cdef class PasidAllocator:
    """PasidAllocator(size=1048576, *, first=1, cyclic=False)\n--\n
    Hands out PASIDs: integers from 0 to `size` - 1, the lowest free one first.

    Each ID is free, allocated or reserved. 0 means "no PASID" and the allocator starts with it
    reserved; `first` says otherwise. `len()`, `in` and iteration are about allocated IDs.

    Parameters
    ----------
    size : int
        Number of IDs, reserved ones included: 1 to 2**20. A device with `max_pasids` n has
        the IDs of size n.
    first : int
        The IDs below it are reserved from the start, as by ``reserve(0, first - 1)``: 0 for
        none, up to `size` for all.
    cyclic : bool
        Next fit instead of lowest first: the search starts after the ID that was handed out last,
        and begins again at the lowest one. A freed ID then stays unused for as long as possible.
        There is one starting point for all ranges; when it is outside the range asked for, the
        search starts at the range's beginning.

    Raises
    ------
    TypeError, ValueError
        If an argument is not an integer or not in its range.

    Notes
    -----
    An operation that raises has changed nothing.

    Several Python threads may share an allocator: whatever changes it is one atomic step, under
    the GIL or, without one, under the allocator's own lock. Iterating is a step per ID. From C,
    see ``pasid.pxd``: its functions rely on their caller to hold the GIL or a lock.

    Iterating yields allocated IDs in ascending order and is not disturbed by changes: the iterator
    remembers only its place, and each time yields the lowest ID above it that is allocated
    at that moment.

    Examples
    --------
    >>> from smmufast import PasidAllocator
    >>> pasids = PasidAllocator(1 << 16)
    >>> pasids.alloc()
    1
    >>> pasids.alloc(min=0x100, owner="process 7")
    256
    >>> pasids.find(256)
    'process 7'
    >>> pasids.alloc_many(3)
    array([2, 3, 4], dtype=uint32)
    >>> list(pasids), len(pasids), 5 in pasids
    ([1, 2, 3, 4, 256], 5, False)
    >>> pasids.free(2)
    >>> pasids.alloc()
    2
    """

    def __cinit__(self, size=1 << 20, *, first=1, cyclic=False):
        # The bitmaps are one block of memory: free IDs and reserved ones, then a summary of both.
        cdef Pasids* p = &self.pasids
        cdef size_t words, filled
        cdef uint64_t* memory
        size = integer(size, "size")
        if not 1 <= size <= PASID_SIZE_MAX:
            raise ValueError(must_be("size", f"1 to {shown(PASID_SIZE_MAX)}", size))
        first = integer(first, "first")
        if not 0 <= first <= size:
            raise ValueError(must_be("first", f"0 to {shown(size)} (size)", first))
        p.cyclic = to_flag("cyclic", cyclic)
        p.size = size
        words = (p.size + 63) // 64
        filled = (words + 63) // 64
        p.n_regions = <uint32_t>(filled + 63) // 64
        memory = <uint64_t*>calloc(2 * words + filled + p.n_regions, sizeof(uint64_t))
        if memory is NULL:
            raise MemoryError(f"no memory for {size} PASIDs")
        p.free = memory
        p.reserved = memory + words
        p.filled = memory + 2 * words
        p.regions = p.filled + filled
        self.owners = {}

        # All is "allocated" now. Reserve the IDs beyond the last, then free the others.
        if p.size & 63:
            p.reserved[words - 1] = ~<uint64_t>0 << (p.size & 63)
        memset(p.free, 0xFF, words * sizeof(uint64_t))
        p.free[words - 1] &= ~p.reserved[words - 1]
        pasid_summarise(p)
        if first:
            pasid_reserve(p, 0, <uint32_t>first - 1)

    def __dealloc__(self):
        free(self.pasids.free)

    @cython.critical_section
    def alloc(self, min=None, max=None, owner=None):
        """Allocate one ID.

        Parameters
        ----------
        min, max : int, optional
            First and last ID to choose from, both included. Default: all.
        owner : object, optional
            What `find()` shall return for this ID. Held until the ID is freed.

        Returns
        -------
        int
            The lowest free ID of the range; with `cyclic`, the next one.

        Raises
        ------
        PasidExhausted
            If no ID of the range is free.
        PasidOutOfRange, PasidRangeEmpty, TypeError
            If `min` or `max` is no ID of this allocator, `min` is above `max`, or one of them
            is not an integer.
        """
        cdef uint32_t first = 0
        cdef uint32_t last = self.pasids.size - 1
        cdef uint32_t pasid
        cdef object result
        if min is not None or max is not None:
            range_of(&self.pasids, min, max, "min", "max", &first, &last)
        pasid = pasid_choose(&self.pasids, first, last)
        if pasid == PASID_NONE:
            raise PasidExhausted(f"no ID is free in {first}..{last}", 0)
        # Whatever may lack memory comes first.
        result = pasid
        if owner is not None:
            self.owners[result] = owner
        pasid_take(&self.pasids, pasid)
        return result

    @cython.critical_section
    def alloc_many(self, count, min=None, max=None, owner=None, *, out=None):
        """Allocate several IDs: those that as many calls of `alloc()` would return, or none.

        Parameters
        ----------
        count : int
            How many; 0 is allowed.
        min, max, owner
            As for `alloc()`; the owner is that of every ID.
        out : numpy.ndarray, optional
            Where to put them: `count` writable, contiguous uint32.

        Returns
        -------
        numpy.ndarray
            `out`, or a new uint32 array of shape (count,), in the order of allocation: ascending,
            unless `cyclic` went round.

        Raises
        ------
        PasidExhausted
            If fewer than `count` IDs of the range are free; `value` is how many are.
        PasidOutOfRange, PasidRangeEmpty
            As for `alloc()`.
        ValueError, TypeError
            If `count` is negative or an argument has the wrong type, or `out` the wrong shape,
            dtype or flags. `out` keeps its contents.

        Examples
        --------
        >>> import numpy as np
        >>> from smmufast import PasidAllocator
        >>> pasids = PasidAllocator(64)
        >>> out = np.empty(4, np.uint32)
        >>> pasids.alloc_many(4, min=10, out=out) is out
        True
        >>> pasids.free_many(out[::2])
        >>> list(pasids)
        [11, 13]
        """
        cdef uint32_t first, last, n, i
        cdef uint32_t cursor
        cdef uint32_t* ids
        cdef cnp.npy_intp length
        cdef list keys = []
        range_of(&self.pasids, min, max, "min", "max", &first, &last)
        count = integer(count, "count")
        if count < 0:
            raise ValueError(must_be("count", "0 or more", count))
        if out is not None:
            check_out(out, count)
        if count > self.pasids.size:
            raise exhausted(&self.pasids, count, first, last)
        n = count
        length = n
        if out is None:
            out = cnp.PyArray_EMPTY(1, &length, cnp.NPY_UINT32, 0)
        ids = <uint32_t*>cnp.PyArray_DATA(out)
        # From here on nothing is made that could start a garbage collection: finalisers would see
        # the IDs without their owner.
        cursor = self.pasids.cursor
        if not pasid_alloc_many(&self.pasids, first, last, n, ids):
            raise exhausted(&self.pasids, count, first, last)
        if owner is not None:
            try:
                for i in range(n):
                    keys.append(ids[i])
                for key in keys:
                    self.owners[key] = owner
            except MemoryError:
                for key in keys:
                    if key in self.owners:
                        del self.owners[key]
                pasid_free_many(&self.pasids, ids, n)
                self.pasids.cursor = cursor
                raise
        return out

    @cython.critical_section
    def free(self, pasid, /):
        """Give an allocated ID back, and let go of its owner.

        Parameters
        ----------
        pasid : int
            An allocated ID.

        Raises
        ------
        PasidNotAllocated
            If it is free: never allocated, or freed before.
        PasidReserved
            If it is reserved; `unreserve()` makes it free.
        PasidOutOfRange, TypeError
            If it is no ID of this allocator, or not an integer.
        """
        cdef uint32_t n = <uint32_t>id_of(pasid, "pasid", self.pasids.size)
        # An owner that goes away may run code that uses this allocator, so it goes last.
        if PyDict_Size(self.owners):
            _owner = self.owners.pop(n, None)
        if not pasid_free(&self.pasids, n):
            raise not_allocated(&self.pasids, f"pasid {n}", n)

    @cython.critical_section
    def free_many(self, pasids, /):
        """Give several allocated IDs back, in any order: all of them or, with an error, none.

        Parameters
        ----------
        pasids : array_like of int
            One dimension, any integer dtype; contiguous uint32 is used as it is.

        Raises
        ------
        PasidNotAllocated, PasidReserved, PasidOutOfRange
            As for `free()`, for the first ID that cannot be freed.
        PasidDuplicate
            If an ID is there twice.
        TypeError, ValueError
            If `pasids` has not one dimension or does not hold integers.
        """
        cdef list keys = []
        cdef list owners = []
        cdef cnp.ndarray given = array_of(pasids)
        cdef cnp.ndarray array = ids_of(given, self.pasids.size)
        cdef const uint32_t* ids = <const uint32_t*>cnp.PyArray_DATA(array)
        cdef size_t n = <size_t>cnp.PyArray_DIM(array, 0)
        cdef size_t i
        cdef object key
        # Collect the owners first: then what follows needs no memory, and lets go of them last.
        if PyDict_Size(self.owners):
            for i in range(n):
                key = ids[i]
                if key in self.owners:
                    keys.append(key)
                    owners.append(self.owners[key])
        i = pasid_free_many(&self.pasids, ids, n)
        if i < n:
            what = f"pasids[{i}] = {ids[i]}"
            if ids[i] >= self.pasids.size:
                raise out_of_range(f"pasids[{i}]", self.pasids.size, int(given[i]))
            if pasid_state(&self.pasids, ids[i]) == PASID_ALLOCATED:
                raise PasidDuplicate(f"{what} is in the array twice", ids[i])
            raise not_allocated(&self.pasids, what, ids[i])
        for key in keys:
            del self.owners[key]

    @cython.critical_section
    def find(self, pasid, /):
        """Return the owner of an allocated ID, None if it was allocated without one.

        Parameters
        ----------
        pasid : int
            An allocated ID.

        Raises
        ------
        PasidNotAllocated, PasidReserved, PasidOutOfRange, TypeError
            As for `free()`.
        """
        cdef uint32_t n
        pasid = integer(pasid, "pasid")
        n = <uint32_t>id_of(pasid, "pasid", self.pasids.size)
        if pasid_state(&self.pasids, n) != PASID_ALLOCATED:
            raise not_allocated(&self.pasids, f"pasid {n}", n)
        return self.owners.get(pasid)

    @cython.critical_section
    def set_owner(self, pasid, owner, /):
        """Replace the owner of an allocated ID.

        Parameters
        ----------
        pasid : int
            An allocated ID.
        owner : object
            What `find()` shall return from now on; None for no owner.

        Raises
        ------
        PasidNotAllocated, PasidReserved, PasidOutOfRange, TypeError
            As for `free()`.
        """
        cdef uint32_t n = <uint32_t>id_of(pasid, "pasid", self.pasids.size)
        if pasid_state(&self.pasids, n) != PASID_ALLOCATED:
            raise not_allocated(&self.pasids, f"pasid {n}", n)
        # The old owner goes last, as in free().
        _old = self.owners.get(n)
        if owner is None:
            self.owners.pop(n, None)
        else:
            self.owners[n] = owner

    @cython.critical_section
    def reserve(self, first, last):
        """Withhold a range of free IDs: all of them or, with an error, none.

        Reserved IDs are not handed out, and `free()` refuses them.

        Parameters
        ----------
        first, last : int
            The range, both ends included.

        Raises
        ------
        PasidAllocated, PasidReserved
            If an ID of the range is allocated or already reserved; `value` is the lowest.
        PasidOutOfRange, PasidRangeEmpty, TypeError
            If `first` or `last` is no ID of this allocator, `first` is above `last`, or one of
            them is not an integer.

        Examples
        --------
        >>> from smmufast import PasidAllocator
        >>> pasids = PasidAllocator(1 << 20)
        >>> pasids.reserve(1, 0x3ff)
        >>> pasids.reserved
        [(0, 1023)]
        >>> pasids.alloc()
        1024
        >>> pasids.reserve(1000, 2000)
        Traceback (most recent call last):
        ...
        smmufast._driver.pasid.PasidReserved: cannot reserve 1000..2000: 1000 is reserved
        """
        cdef uint32_t low, high, obstacle
        range_of(&self.pasids, integer(first, "first"), integer(last, "last"), "first", "last",
                 &low, &high)
        obstacle = pasid_reserve(&self.pasids, low, high)
        if obstacle == PASID_NONE:
            return
        if pasid_state(&self.pasids, obstacle) == PASID_RESERVED:
            raise PasidReserved(f"cannot reserve {low}..{high}: {obstacle} is reserved", obstacle)
        raise PasidAllocated(f"cannot reserve {low}..{high}: {obstacle} is allocated", obstacle)

    @cython.critical_section
    def unreserve(self, first, last):
        """Make a range of reserved IDs free: all of them or, with an error, none.

        Parameters
        ----------
        first, last : int
            The range, both ends included; it may be a part of what was reserved.

        Raises
        ------
        PasidNotReserved
            If an ID of the range is not reserved; `value` is the lowest.
        PasidOutOfRange, PasidRangeEmpty, TypeError
            As for `reserve()`.
        """
        cdef uint32_t low, high, obstacle
        range_of(&self.pasids, integer(first, "first"), integer(last, "last"), "first", "last",
                 &low, &high)
        obstacle = pasid_unreserve(&self.pasids, low, high)
        if obstacle != PASID_NONE:
            raise PasidNotReserved(
                f"cannot unreserve {low}..{high}: {obstacle} is not reserved", obstacle)

    @cython.critical_section
    def __contains__(self, pasid):
        """Whether an ID is allocated; False for any other integer."""
        cdef Py_ssize_t n = PyLong_AsSsize_t(integer(pasid, "pasid"))
        if n < 0:
            PyErr_Clear()
            return False
        return n < self.pasids.size and (
            pasid_state(&self.pasids, <uint32_t>n) == PASID_ALLOCATED)

    @cython.critical_section
    def __len__(self):
        """Return the number of allocated IDs."""
        return self.pasids.n_allocated

    def __bool__(self):
        return True

    def __iter__(self):
        """Iterate over the allocated IDs in ascending order; see Notes for changes meanwhile."""
        cdef uint32_t pasid = self._allocated_from(0)
        while pasid != PASID_NONE:
            yield pasid
            pasid = self._allocated_from(pasid + 1)

    cdef uint32_t _allocated_from(self, uint32_t first) noexcept:
        """The lowest allocated ID from `first` on."""
        with cython.critical_section(self):
            return pasid_next(&self.pasids, first, self.pasids.size - 1, PASID_ALLOCATED)

    @property
    def size(self):
        """Number of IDs, in whatever state."""
        return self.pasids.size

    @property
    @cython.critical_section
    def available(self):
        """Number of free IDs."""
        return self.pasids.n_free

    @property
    def cyclic(self):
        """Whether the next ID is searched from the last one on."""
        return self.pasids.cyclic != 0

    @property
    @cython.critical_section
    def reserved(self):
        """The reserved IDs, as a new list of ranges (first, last), both included, ascending."""
        cdef Pasids* p = &self.pasids
        cdef uint32_t last = p.size - 1
        cdef uint32_t first = pasid_next(p, 0, last, PASID_RESERVED)
        cdef uint32_t end
        cdef list ranges = []
        while first != PASID_NONE:
            end = pasid_next(p, first, last, PASID_FREE | PASID_ALLOCATED)
            if end == PASID_NONE:
                end = p.size
            ranges.append((first, end - 1))
            first = pasid_next(p, end, last, PASID_RESERVED)
        return ranges

    @cython.critical_section
    def __repr__(self):
        cdef Pasids* p = &self.pasids
        return (f"<PasidAllocator of {p.size} IDs: {p.n_allocated} allocated, "
                f"{p.size - p.n_allocated - p.n_free} reserved, {p.n_free} free>")

    @cython.critical_section
    def copy(self):
        """Return an independent allocator in the same state, with the same owner objects."""
        cdef PasidAllocator other = PasidAllocator(self.pasids.size, first=0)
        cdef Pasids* p = &self.pasids
        cdef Pasids* q = &other.pasids
        other.owners = self.owners.copy()
        memcpy(q.free, p.free, <size_t>(p.regions + p.n_regions - p.free) * sizeof(uint64_t))
        q.n_allocated = p.n_allocated
        q.n_free = p.n_free
        q.cursor = p.cursor
        q.cyclic = p.cyclic
        return other

    @cython.critical_section
    def __reduce__(self):
        # The state: cyclic, cursor, bits of free and of reserved IDs, owners.
        cdef Pasids* p = &self.pasids
        cdef Py_ssize_t length = (p.size + 63) // 64 * sizeof(uint64_t)
        owners = self.owners.copy()
        state = (
            p.cyclic != 0,
            p.cursor,
            PyBytes_FromStringAndSize(<char*>p.free, length),
            PyBytes_FromStringAndSize(<char*>p.reserved, length),
            owners,
        )
        return PasidAllocator, (p.size,), state

    @cython.critical_section
    def __setstate__(self, state):
        """Take the state of a pickled allocator of the same size.

        Raises
        ------
        ValueError, TypeError
            If it is no such state.
        """
        cdef Pasids* p = &self.pasids
        cdef Pasids new = p[0]
        cdef Py_ssize_t words = (p.size + 63) // 64
        cdef Py_ssize_t length = words * <Py_ssize_t>sizeof(uint64_t)
        cdef uint64_t tail = 0
        cdef Py_ssize_t i
        cdef bytes free_bits, reserved_bits
        cdef dict owners
        cyclic, cursor, free_bits, reserved_bits, owners = state
        cyclic = to_flag("cyclic", cyclic)
        cursor = integer(cursor, "cursor")
        owners = dict(owners)
        if not 0 <= cursor <= p.size:
            raise ValueError(must_be("cursor", f"0 to {shown(p.size)}", cursor))
        for bits in (free_bits, reserved_bits):
            if len(bits) != length:
                raise ValueError(must_be(
                    "a bitmap", f"{length} bytes for {p.size} IDs", len(bits)))
        new.free = <uint64_t*><char*>free_bits
        new.reserved = <uint64_t*><char*>reserved_bits
        if p.size & 63:
            tail = ~<uint64_t>0 << (p.size & 63)
        for i in range(words):
            if new.free[i] & new.reserved[i]:
                raise ValueError("an ID is both free and reserved")
        if new.reserved[words - 1] & tail != tail:
            raise ValueError(f"an ID above {p.size - 1} is not reserved")
        for key in owners:
            if not PyLong_CheckExact(key):
                raise no_integer("an owner's ID", key)
            if pasid_state(&new, <uint32_t>id_of(key, "an owner's ID", p.size)) != PASID_ALLOCATED:
                raise ValueError(f"{key} has an owner and is not allocated")
        # From here on nothing fails, and the old owners go last.
        p.cyclic = cyclic
        p.cursor = cursor
        memcpy(p.free, new.free, length)
        memcpy(p.reserved, new.reserved, length)
        pasid_summarise(p)
        self.owners = owners
