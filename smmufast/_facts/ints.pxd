"""Python ints as arguments: the digits read in place.  Not architectural."""

from libc.stdint cimport uint64_t


cdef extern from *:
    """
    /* An int of one or two digits, not negative: read in place, since a call costs more. */
    static inline int smmufast_digits(PyObject *object, uint64_t *value)
    {
        const PyLongObject *number = (const PyLongObject *)object;
    #if PY_VERSION_HEX >= 0x030C0000
        const digit *digits = number->long_value.ob_digit;
        const uintptr_t tag = number->long_value.lv_tag;
        const Py_ssize_t count = (tag & 3) ? 0 : (Py_ssize_t)(tag >> 3);
    #else
        const digit *digits = number->ob_digit;
        const Py_ssize_t count = Py_SIZE(number);
    #endif
        if (count != 1 && count != 2)
            return 0;
        *value = digits[0];
        if (count == 2)
            *value |= (uint64_t)digits[1] << PyLong_SHIFT;
        return 1;
    }
    """
    # False: the value is another int, 0 among them
    bint digits_of "smmufast_digits"(object value, uint64_t* number) noexcept
