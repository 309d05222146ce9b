"""What the host's system gives: maps of memory that cost what is touched."""

cdef extern from "<sys/mman.h>" nogil:
    """
    /* Hints of Linux, which other systems do without. */
    #ifndef MAP_NORESERVE
    #define MAP_NORESERVE 0
    #endif
    #ifndef MADV_HUGEPAGE
    #define MADV_HUGEPAGE MADV_NORMAL
    #endif
    #ifndef MADV_DONTDUMP
    #define MADV_DONTDUMP MADV_NORMAL
    #endif
    """
    void* mmap(void* addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void* addr, size_t length)
    int madvise(void* addr, size_t length, int advice)
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE
    int MADV_HUGEPAGE, MADV_DONTDUMP
    void* MAP_FAILED


cdef inline void* map_zeros(size_t length) noexcept nogil:
    """So many bytes that read as zero, which no core dump has: MAP_FAILED if there are none."""
    cdef void* data = mmap(NULL, length, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if data != MAP_FAILED:
        madvise(data, length, MADV_DONTDUMP)
    return data
