"""Columns of a batch: numpy arrays and flags in, fields of outcomes out."""

cimport numpy as cnp
from cpython.dict cimport PyDict_CheckExact, PyDict_Next, PyDict_Size
from cpython.long cimport PyLong_CheckExact
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy, memset

from smmufast._facts.bits cimport likely, unlikely
from smmufast._engine.cache cimport ctz64
from smmufast._engine.core cimport Core
from smmufast._facts.layout cimport cr0_smmuen
from smmufast._engine.memory cimport Port, out_of_range, port_open, to_address, to_flag
from smmufast._engine.batch_nested cimport translate_each, translate_plain
from smmufast._engine.batch cimport translate_hits
from smmufast._engine.vector cimport vector_on, vector_switch
from smmufast._facts.types cimport NO_SSID, BatchC, ColumnC

from collections.abc import Iterable
import numpy as np

from smmufast._arguments import either, in_words, must_be


def vectors(on=None):
    """Whether batches use the processor's vectors; with an argument, let them or not.

    Results do not depend on it.  Batches do where the processor has AVX-512, unless the
    environment says SMMUFAST_VECTOR=0.

    Parameters
    ----------
    on : bool, optional

    Returns
    -------
    bool
        What holds from now on: False where the processor has none.
    """
    if on is not None:
        vector_switch(to_flag("on", on))
    return bool(vector_on)


# --- columns ---

cdef int refuse_mask(str name, value) except -1:
    """What is masked has no value, and a translation needs one."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(must_be(name, "an array without a mask", type(value)))
    return 0


cdef object as_array(str name, value, dtype):
    """A sequence as an array; of large integers too, which numpy would make floats or objects."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if array.dtype.kind in "fO" and array.ndim == 1 and array.size and not isinstance(
            value, np.ndarray):
        last = 1 if dtype.kind == "b" else np.iinfo(dtype).max
        numbers = []
        for item in value:
            numbers.append(to_address(name, item, last))
        array = np.array(numbers, dtype)
    return array


cdef cnp.ndarray column_in(str name, value, dtype, Py_ssize_t* n):
    """An input as a 1-D array of one dtype, or None for a scalar; `n` is the common length."""
    cdef cnp.ndarray array
    if PyLong_CheckExact(value):
        return None
    if cnp.PyArray_CheckExact(value):
        array = value
    else:
        if isinstance(value, (int, np.integer)) and not isinstance(value, np.ndarray):
            return None
        refuse_mask(name, value)
        array = as_array(name, value, dtype)
    if cnp.PyArray_NDIM(array) == 0:
        return None
    if cnp.PyArray_NDIM(array) != 1:
        raise ValueError(must_be(f"{name}.ndim", "1", array.ndim))
    if <PyObject*>cnp.PyArray_DESCR(array) != <PyObject*>dtype and array.dtype != dtype:
        if array.size == 0 and not isinstance(value, np.ndarray):
            array = array.astype(dtype)  # an empty sequence says nothing of its kind
        if array.dtype.kind not in "biu":
            raise TypeError(in_words(
                f"{name}.dtype", f"{dtype} or another integer", str(array.dtype)))
        last = 1 if dtype.kind == "b" else np.iinfo(dtype).max
        if array.size and (array.dtype.kind == "i" and array.min() < 0 or array.max() > last):
            at = int(array.argmin() if array.min() < 0 else array.argmax())
            raise out_of_range(f"{name}[{at}]", int(array[at]), last)
        array = array.astype(dtype)
    if n[0] >= 0 and cnp.PyArray_DIM(array, 0) != n[0]:
        raise ValueError(must_be(f"len({name})", f"{n[0]} as of the others", array.shape[0]))
    n[0] = cnp.PyArray_DIM(array, 0)
    return array


# The columns of a batch, in the order of COLUMNS and of BatchC: borrowed from DTYPES.
cdef PyObject* column_name[OUT_COLUMNS]
cdef PyObject* column_dtype[OUT_COLUMNS]
cdef dict COLUMN_INDEX = {}


cdef void open_columns() noexcept:
    cdef int k
    for k, name in enumerate(DTYPES):
        column_name[k] = <PyObject*>name
        column_dtype[k] = <PyObject*>DTYPES[name]
        COLUMN_INDEX[name] = k


open_columns()


# Accesses of a batch: the bits of all requests, and arrays of bool for the others, by bit.
cdef struct Flags:
    uint8_t always
    bint by_row
    ColumnC[3] column


# The arrays of a batch, owned: the caller may drop them while the lock is released.  First the
# output columns, then inputs.
cdef struct Held:
    unsigned int columns            # a bit for each that is there
    PyObject* array[OUT_COLUMNS + IN_COLUMNS]


cdef inline void let_go(Held* held) noexcept:
    cdef unsigned int left = held.columns
    while left:
        Py_DECREF(<object>held.array[ctz64(left)])
        left &= left - 1


cdef inline bint fits(PyObject* value, PyObject* dtype, Py_ssize_t n) noexcept:
    """It is a 1-D array of this very dtype and of n elements, or of any number if n is negative."""
    return (
        cnp.PyArray_CheckExact(<object>value)
        and <PyObject*>cnp.PyArray_DESCR(<cnp.ndarray>value) == dtype
        and cnp.PyArray_NDIM(<cnp.ndarray>value) == 1
        and (n < 0 or cnp.PyArray_DIM(<cnp.ndarray>value, 0) == n)
    )


cdef inline bint point_in(ColumnC* column, Held* held, int k, str name, value, dtype,
                          Py_ssize_t* n) except -1:
    """Let an input column point into an array; false for a scalar."""
    cdef cnp.ndarray array
    if PyLong_CheckExact(value):
        return False
    if likely(fits(<PyObject*>value, <PyObject*>dtype, n[0])):
        array = <cnp.ndarray>value
        n[0] = cnp.PyArray_DIM(array, 0)
    else:
        array = column_in(name, value, dtype, n)
        if array is None:
            return False
    Py_INCREF(array)
    held.array[OUT_COLUMNS + k] = <PyObject*>array
    held.columns |= 1U << (OUT_COLUMNS + k)
    column.data = cnp.PyArray_DATA(array)
    column.stride = cnp.PyArray_STRIDE(array, 0)
    return True


cdef inline int flag_in(Flags* flags, Held* held, int bit, str name, value,
                        Py_ssize_t* n) except -1:
    """A bit of every access, or of those that an array says."""
    flags.column[bit].data = NULL
    if value is False:
        return 0
    if value is True:
        flags.always |= 1 << bit
    elif point_in(&flags.column[bit], held, 3 + bit, name, value, BOOL, n):
        flags.by_row = True
    elif to_flag(name, value):
        flags.always |= 1 << bit
    return 0


cdef inline void batch_open(BatchC* batch) noexcept:
    """A batch without columns; those that are pointed somewhere are the same for every row."""
    cdef ColumnC* column = &batch.sid
    while column <= &batch.why:
        column.data = NULL
        column.stride = 0
        column += 1


cdef inline void point_column(BatchC* batch, Held* held, int k, cnp.ndarray array) noexcept:
    """Let an output column point into an array that fits."""
    cdef ColumnC* column = &batch.pa + k
    if unlikely(held.columns >> k & 1):  # a name that equals another, and is not the same
        Py_DECREF(<object>held.array[k])
    Py_INCREF(array)
    held.array[k] = <PyObject*>array
    held.columns |= 1U << k
    column.data = cnp.PyArray_DATA(array)
    column.stride = cnp.PyArray_STRIDE(array, 0)


cdef inline bint point_at_once(
        BatchC* batch, Held* held, PyObject* name, PyObject* array, Py_ssize_t n) noexcept:
    """point_out(), if the name and the dtype are the very objects that are known here."""
    cdef int k = 0
    while column_name[k] != name:
        k += 1
        if k == OUT_COLUMNS:
            return False
    if not fits(array, column_dtype[k], n) or not cnp.PyArray_ISWRITEABLE(<cnp.ndarray>array):
        return False
    point_column(batch, held, k, <cnp.ndarray>array)
    return True


cdef int point_out(BatchC* batch, Held* held, name, array, Py_ssize_t n) except -1:
    """Let one output column point into an array, once its shape and dtype are right."""
    cdef cnp.ndarray found
    if point_at_once(batch, held, <PyObject*>name, <PyObject*>array, n):
        return 0
    if name not in COLUMN_INDEX:
        raise ValueError(must_be("a column of out", either(COLUMNS), name))
    if not isinstance(array, np.ndarray):
        raise TypeError(must_be(f"out[{name!r}]", "a numpy array", type(array)))
    refuse_mask(f"out[{name!r}]", array)
    found = array
    dtype = DTYPES[name]
    if found.dtype != dtype:
        raise TypeError(in_words(f"out[{name!r}].dtype", str(dtype), str(found.dtype)))
    if found.ndim != 1 or found.shape[0] != n:
        raise ValueError(must_be(f"out[{name!r}].shape", f"({n},)", array.shape))
    if not cnp.PyArray_ISWRITEABLE(found):
        raise ValueError(f"out[{name!r}]: the array is read-only")
    point_column(batch, held, COLUMN_INDEX[name], found)
    return 0


# Where a structured array has its columns, by what the last dtype that was checked has.  A dtype's
# names can be assigned to, but then it has another tuple and another dict.
cdef struct Rows:
    int count
    unsigned int columns        # a bit for each
    int[OUT_COLUMNS] column
    Py_ssize_t[OUT_COLUMNS] offset

cdef Rows rows
cdef object rows_names = None
cdef object rows_fields = None


cdef int point_rows(BatchC* batch, Held* held, cnp.ndarray out, Py_ssize_t n) except -1:
    """Let the output columns point into the fields of a structured array: a bit for each."""
    global rows_names, rows_fields
    cdef cnp.dtype dtype = <cnp.dtype><PyObject*>cnp.PyArray_DESCR(out)
    cdef PyObject* names = cnp.PyDataType_NAMES(dtype)
    cdef ColumnC* column
    cdef int k
    if (names == <PyObject*>rows_names
            and cnp.PyDataType_FIELDS(dtype) == <PyObject*>rows_fields
            and cnp.PyArray_CheckExact(out) and cnp.PyArray_NDIM(out) == 1
            and cnp.PyArray_DIM(out, 0) == n and cnp.PyArray_ISWRITEABLE(out)):
        for k in range(rows.count):
            column = &batch.pa + rows.column[k]
            column.data = <char*>cnp.PyArray_DATA(out) + rows.offset[k]
            column.stride = cnp.PyArray_STRIDE(out, 0)
        return rows.columns
    if names == NULL:
        raise TypeError(in_words("out.dtype", "a structured one", str(out.dtype)))
    names_now = <object>names
    fields_now = <object>cnp.PyDataType_FIELDS(dtype)
    for name in names_now:
        point_out(batch, held, name, out[name], n)
    if cnp.PyArray_CheckExact(out):
        rows_names = names_now
        rows_fields = fields_now
        rows.count = 0
        rows.columns = held.columns & OUT_MASK
        for k in range(OUT_COLUMNS):
            column = &batch.pa + k
            if column.data != NULL:
                rows.column[rows.count] = k
                rows.offset[rows.count] = <char*>column.data - <char*>cnp.PyArray_DATA(out)
                rows.count += 1
    return held.columns & OUT_MASK


cdef int point_each(BatchC* batch, Held* held, out, Py_ssize_t n) except -1:
    """Let the output columns point into the arrays of a dict: a bit for each."""
    cdef PyObject* key
    cdef PyObject* value
    cdef Py_ssize_t at = 0, left
    if not PyDict_CheckExact(out):
        for name, array in out.items():
            point_out(batch, held, name, array, n)
        return held.columns & OUT_MASK
    left = PyDict_Size(out)
    while left > 0 and PyDict_Next(out, &at, &key, &value):
        left -= 1
        if likely(point_at_once(batch, held, key, value, n)):
            continue
        name = <object>key
        array = <object>value
        point_out(batch, held, name, array, n)
    return held.columns & OUT_MASK


cdef object make_out(Py_ssize_t n, columns):
    """A structured array with the columns that are wanted."""
    if columns is None:
        return np.empty(n, PyArray_DescrNew(DEFAULT_ROW))
    if isinstance(columns, (str, bytes)) or not isinstance(columns, Iterable):
        raise TypeError(must_be("columns", "names", type(columns)))
    names = tuple(columns)
    for name in names:
        if name not in COLUMNS:
            raise ValueError(must_be("each of columns", either(COLUMNS), name))
    if len(set(names)) != len(names):
        raise ValueError(must_be("columns", "names, each once", names))
    return np.empty(n, row_dtype(names))


cdef void shift_columns(BatchC* batch, size_t by) noexcept nogil:
    """Let every column start `by` rows later."""
    cdef ColumnC* column = &batch.sid
    while column <= &batch.why:
        if column.data != NULL:
            column.data = <char*>column.data + <ptrdiff_t>by * column.stride
        column += 1


cdef Py_ssize_t ssid_wrong(const BatchC* batch) noexcept nogil:
    """Where the first SubstreamID is that is neither one of 20 bits nor none; -1 without."""
    cdef size_t i
    cdef uint32_t ssid
    cdef size_t n = batch.n if batch.ssid.stride else (batch.n > 0)
    for i in range(n):
        memcpy(&ssid, <const char*>batch.ssid.data + <ptrdiff_t>i * batch.ssid.stride, 4)
        if ssid > 0xFFFFF and ssid != NO_SSID:
            return i
    return -1


cdef object ssid_error(const BatchC* batch, Py_ssize_t i):
    cdef uint32_t ssid
    memcpy(&ssid, <const char*>batch.ssid.data + i * batch.ssid.stride, 4)
    return ValueError(must_be(
        f"ssid[{i}]", f"0 to 0xfffff, or {<uint32_t>NO_SSID:#x} for none", ssid))


# Two functions, so that a callback which starts another batch finds no slots on the stack.

cdef int batch_plain(Core* core, Port* port, const BatchC* batch) noexcept nogil:
    return translate_plain(core, port, batch)


cdef int batch_each(Core* core, Port* port, const BatchC* batch) noexcept nogil:
    return translate_each(core, port, batch)


cdef int batch_cached(Core* core, Port* port, const BatchC* batch) noexcept nogil:
    return translate_hits(core, port, batch)


ctypedef int (*BatchPath)(Core*, Port*, const BatchC*) noexcept nogil

cdef BatchPath cached = batch_cached

cdef BatchPath each = batch_each
cdef BatchPath plain = batch_plain


cdef extern from *:
    """
    /* Batches in plain memory that this thread is in: an interrupt may start one inside another. */
    static __thread int smmufast_deep;
    #define smmufast_deep_set(n) (smmufast_deep = (n))
    """
    const int deep "smmufast_deep"
    void deep_set "smmufast_deep_set"(int n) noexcept nogil

cdef enum:
    DEEP = 8           # any more find no room for their blocks on the stack, and go one by one


cdef int batch_run(Core* core, Port* port, const BatchC* batch) noexcept nogil:
    """Translate a batch: 0, or FETCH_RAISED with the exception in the port.

    The caller has the caches.
    """
    cdef int status
    port_open(port, core.ram, NULL)
    if (core.caches == NULL and core.ram.plain and cr0_smmuen(core.hw.cr0) and batch.n != 0
            and deep < DEEP):
        deep_set(deep + 1)
        status = plain(core, port, batch)
        deep_set(deep - 1)
        return status
    if core.caches == NULL:
        return each(core, port, batch)
    return cached(core, port, batch)


cdef enum:
    PIECE = 1 << 20    # requests between looks for signals
    FLAGS = 512        # requests whose access bytes are made at a time
    SHORT = 64         # requests that take less time than giving up the GIL
    FEW = 12           # requests that the scalar path does in less time than a batch path


cdef void join_flags(const Flags* flags, size_t first, size_t n, uint8_t* access) noexcept nogil:
    """The access bytes of n requests."""
    cdef const ColumnC* column
    cdef size_t i
    cdef int k
    memset(access, flags.always, n)
    for k in range(3):
        column = &flags.column[k]
        if column.data != NULL:
            for i in range(n):
                # no jump: which it is cannot be predicted
                access[i] |= <unsigned int>((<const uint8_t*>column.data + <ptrdiff_t>(
                    first + i) * column.stride)[0] != 0) << k
