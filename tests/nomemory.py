"""Every allocation of a scripted scenario fails in its turn: an error, and all goes on.

Each failure has a child process of its own.  There, the scenario is played with the nth allocation
failing, of Python (`_testcapi.set_nomemory`) or of C (a shim around malloc and mmap); then
everything that is left is used and let go of, and the scenario is played again, whole.

    python -P tests/nomemory.py [--step N] [--only python|c]
"""

import argparse
import contextlib
import copy
import ctypes
import faulthandler
import gc
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":  # python -P leaves this folder out
    sys.path[:0] = [str(Path(__file__).resolve().parent / name) for name in ("", "support")]

import numpy as np
import small

from smmufast import Caches, Memory, PasidAllocator, Smmu
from smmufast.iommu import Pages, PageTable

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <stddef.h>
#include <sys/mman.h>

static long left = -1, seen;
void shim_fail(long n) { seen = 0; left = n; }
long shim_seen(void) { left = -1; return seen; }
static int refused(void) { if (left < 0) return 0; seen++; return left-- == 0; }

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t), *__libc_memalign(size_t, size_t);
#define ALLOCATOR(name, arguments, call) \
    void *name arguments { if (refused()) { errno = ENOMEM; return NULL; } return call; }
ALLOCATOR(malloc, (size_t n), __libc_malloc(n))
ALLOCATOR(calloc, (size_t n, size_t k), __libc_calloc(n, k))
ALLOCATOR(realloc, (void *p, size_t n), __libc_realloc(p, n))
ALLOCATOR(aligned_alloc, (size_t a, size_t n), __libc_memalign(a, n))
void *mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset)
{
    static void *(*real)(void *, size_t, int, int, int, off_t);
    if (!real)
        real = (void *(*)(void *, size_t, int, int, int, off_t))dlsym(RTLD_NEXT, "mmap");
    if (refused()) { errno = ENOMEM; return MAP_FAILED; }
    return real(at, n, prot, flags, fd, offset);
}
"""


def scenario(kept):
    """A bit of everything; what is made is kept, so that it can be used after a failure."""
    memory = Memory()
    kept.append(memory)
    memory.add(bytearray(small.build()), small.BASE)
    memory.add_private(1 << 40, 1 << 20)
    memory.add_private(1 << 51, 1 << 50)
    memory.add_callback(1 << 41, 4096, lambda address, n: bytes(n))
    memory.remove(1 << 41)
    memory.write(1 << 40, b"text")
    memory.write(1 << 51, b"text")
    number = memory.inject_error(address=0)
    memory.remove_error(number)
    for caches in (None, Caches.small()):
        smmu = Smmu(memory, **small.registers(), caches=caches, eventq_base=1 << 40 | 5)
        kept.append(smmu)
        for request in small.REQUESTS[:24]:
            kept.append(smmu.translate(request.sid, request.iova, **request.access))
        traced = smmu.translate(small.STAGE1, small.RW, trace=True)
        traced.fetches, traced.why, repr(traced)
        iova = np.full(100, small.RW, np.uint64)
        iova[::7] = small.UNMAPPED
        smmu.translate_batch(small.STAGE1, iova)
        smmu.translate_batch(np.full(100, small.NESTED, np.uint32), iova, columns=["pa", "record"])
        smmu.translate_range(small.STAGE1, small.RUN, 0x4000)
        walk = smmu.start_walk(small.STAGE1, small.RW)
        while (fetch := walk.request) is not None:
            walk.supply(memory.read(fetch.address, fetch.size))
        smmu.command("CFGI_STE", StreamID=1)
        smmu.command("TLBI_NSNH_ALL")
        smmu.ats_request(small.STAGE1, small.RW)
        kept.append(Smmu.restore(smmu.save(), memory))
        if caches is not None:
            list(caches.tlb), caches.counters, smmu.stale()
            copy.copy(caches)
    pickle.loads(pickle.dumps(kept[-3]))
    pages = Pages(memory, 1 << 40, 1 << 20)
    table = PageTable(pages, contiguous=True)
    kept.append(table)
    table.map(0, 0x8000_0000, 64 << 12)
    table.map(1 << 30, 0x8000_0000, 4 << 20)
    table.map_sg(1 << 32, [(0x9000_0000, 8192), (0xA000_0000, 4096)])
    table.unmap(1 << 12, 5 << 12)
    table.unmap(0, 64 << 12)
    table.unmap(1 << 30, 4 << 20)
    table.close()
    pasids = PasidAllocator(64)
    kept.append(pasids)
    for _ in range(8):
        pasids.alloc()
    pasids.free(3)
    list(pasids)


def use(kept):
    """What a failure left can be used."""
    for one in kept:
        repr(one)
        if isinstance(one, Smmu):
            one.translate(small.STAGE1, small.RW)
            one.translate_batch(small.STAGE1, [small.RW] * 100)
        elif isinstance(one, PageTable):
            if one.ready:
                one.unmap(0, 1 << 40)
            one.close()
        elif isinstance(one, Memory):
            for region in one.regions:
                one.read(region.base, 8)


def one_failure(kind, n, shim):
    """In a child: 0 when the nth allocation failed, 2 when there were not so many."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(60, exit=True)
    kept, failed = [], False
    if kind == "python":
        import _testcapi

        _testcapi.set_nomemory(n, n + 1)
    else:
        seen_by = shim.shim_seen  # found before memory runs out
        shim.shim_fail(ctypes.c_long(n))
    try:
        scenario(kept)
    except MemoryError:
        failed = True
    except Exception as error:  # numpy and others have their own words for it
        failed = True
        text = f"{type(error).__name__}: {error}"
        if kind == "python" and not isinstance(
            error, (SystemError, BufferError, pickle.PicklingError)
        ):
            raise AssertionError(text) from error
    finally:
        if kind == "python":
            _testcapi.remove_mem_hooks()
        else:
            try:
                seen = seen_by()
            except MemoryError:  # this call's own
                seen = seen_by()
    use(kept)
    kept.clear()
    gc.collect()
    again = []
    scenario(again)
    use(again)
    over = n > 400 if kind == "python" else seen <= n
    return 2 if over and not failed else 0


def child(kind, n, shim):
    pid = os.fork()
    if pid == 0:
        status = 3
        with contextlib.suppress(BaseException):
            try:
                status = one_failure(kind, n, shim)
            except BaseException:
                import traceback

                traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def play(kind, step, most):
    shim = ctypes.CDLL(None) if kind == "c" else None
    n = count = quiet = 0
    bad = 0
    start = time.time()
    while n < most:
        status = child(kind, n, shim)
        if status not in (0, 2):
            bad += 1
            print(f"{kind}: allocation {n} failed: status {status}", flush=True)
        count += 1
        quiet = quiet + 1 if status == 2 else 0
        if quiet == 20:
            break
        n += step
    print(f"{kind}: {count} failures up to number {n}, {bad} of them lost something, "
          f"{time.time() - start:.0f} s", flush=True)  # fmt: skip
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--most", type=int, default=100_000)
    parser.add_argument("--only", choices=("python", "c"))
    parser.add_argument("--shimmed", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    scenario([])
    scenario([])  # what is made once is made by now
    if arguments.shimmed:
        raise SystemExit(play("c", arguments.step, arguments.most) > 0)
    bad = arguments.only != "c" and play("python", arguments.step, arguments.most)
    if arguments.only != "python":
        with tempfile.TemporaryDirectory() as folder:
            source, shim = Path(folder, "shim.c"), Path(folder, "shim.so")
            source.write_text(SHIM)
            subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-w", "-o", shim, source, "-ldl"],
                           check=True)  # fmt: skip
            command = [sys.executable, "-P", __file__, "--shimmed", "--step", str(arguments.step),
                       "--most", str(arguments.most)]  # fmt: skip
            environment = {**os.environ, "LD_PRELOAD": str(shim), "PYTHONMALLOC": "malloc"}
            bad += subprocess.run(command, env=environment).returncode
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
