"""Every public method with every wrong kind of self and argument: an error, never a crash or hang.

Each class is a child process of its own, for a crash must end nothing but that.
"""

import inspect
import subprocess
import sys
import textwrap

import pytest

import smmufast
from smmufast._device import registers, smmu
from smmufast._driver import pasid, ring, tables
from smmufast._engine import memory, tlb

CLASSES = [
    cls
    for module in (memory, pasid, registers, ring, smmu, tables, tlb)
    for cls in vars(module).values()
    if inspect.isclass(cls) and cls.__module__ == module.__name__ and not issubclass(
        cls, BaseException) and not hasattr(cls, "_fields")
]  # fmt: skip

CHILD = textwrap.dedent(
    """
    import faulthandler, inspect, sys
    faulthandler.enable()
    faulthandler.dump_traceback_later(50, exit=True)
    import numpy as np
    from smmufast import Memory, Smmu, PasidAllocator, Caches
    import importlib

    module, name = sys.argv[1:]
    cls = getattr(importlib.import_module(module), name)

    class Odd:
        def __bool__(self): raise RuntimeError("bool")
        def __index__(self): raise RuntimeError("index")
        def __len__(self): return -1
        def __eq__(self, other): raise RuntimeError("eq")
        __hash__ = object.__hash__

    def selves():
        yield from (None, 1, "text", object(), [], Memory(), Smmu(Memory()), PasidAllocator(8),
                    Caches(tlb=(4, 4)), cls, np.zeros(3), Odd())
        try:
            yield cls.__new__(cls)
        except TypeError:
            pass

    VALUES = (None, -1, 0, 1, 2**64, 2**70, "text", b"bytes", 1.5, [], (1, 2), {}, object(), Odd(),
              np.zeros(3), np.ma.array([1], mask=[True]), True, float("nan"), print)

    def arguments():
        yield ()
        for value in VALUES:
            yield (value,)
        for value in VALUES:
            yield (value, value)
            yield (0, value)
            yield (value, 0)
        for value in VALUES:
            yield (0, 0, value)
            yield (0, value, value, value)

    # what would end, replace or block this process; and what makes 2^52 bytes on purpose
    LEFT = {"__class__", "__init_subclass__", "__subclasshook__", "__getattribute__", "__new__"}
    calls = 0
    for self in selves():
        kind = type(self) is cls
        for attribute in sorted(set(dir(cls)) - LEFT):
            try:
                found = inspect.getattr_static(cls, attribute)
            except AttributeError:
                continue
            if inspect.isgetsetdescriptor(found) or inspect.ismemberdescriptor(found):
                for get in (lambda: found.__get__(self, type(self)),
                            lambda: found.__set__(self, Odd()), lambda: found.__set__(self, None),
                            lambda: found.__delete__(self)):
                    try:
                        get()
                    except BaseException:
                        pass
                    calls += 1
                continue
            method = getattr(cls, attribute)
            if not callable(method):
                continue
            for given in arguments():
                try:
                    done = method(self, *given)
                    if inspect.isgenerator(done) or hasattr(done, "__next__"):
                        for _, item in zip(range(3), done):
                            pass
                except BaseException as error:
                    if isinstance(error, SystemError):
                        raise
                calls += 1
            parameters = {}
            try:
                parameters = inspect.signature(method).parameters
            except (ValueError, TypeError):
                pass
            for parameter in parameters:
                for value in VALUES:
                    try:
                        method(self, **{parameter: value})
                    except BaseException as error:
                        if isinstance(error, SystemError):
                            raise
                    calls += 1
    print("calls", calls)
    """
)


def child(*arguments, timeout=100):
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", CHILD, *arguments],
        capture_output=True, text=True, timeout=timeout)  # fmt: skip
    assert done.returncode == 0, f"{done.returncode}: {done.stdout[-500:]}{done.stderr[-2000:]}"
    return int(done.stdout.split()[-1])


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_wrong_selves_and_arguments_end_in_errors(cls):
    assert child(cls.__module__, cls.__name__) > 100


def test_there_are_all_compiled_classes():
    names = {cls.__name__ for cls in CLASSES}
    assert {"Memory", "Smmu", "Registers", "Stall", "Result", "Segments", "Walk"} <= names
    assert {"Caches", "Cache", "Pages", "PageTable", "Gather", "PasidAllocator"} <= names


def test_a_method_wants_an_object_of_its_class():
    for call in (
        lambda: smmufast.Smmu.pa(None, 1, 2),
        lambda: smmufast.Smmu.translate(smmufast.Memory(), 1, 2),
        lambda: smmufast.Memory.read(object(), 0, 8),
        lambda: tables.PageTable.map(None, 0, 0, 0x1000),
        lambda: tlb.Caches.lookup(1, 0),
        lambda: smmufast.PasidAllocator.alloc(None),
    ):
        with pytest.raises(TypeError, match=r"descriptor '\w+' for '[\w.]+' objects doesn't apply"):
            call()


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_method_tells_its_signature(cls):
    for name, member in vars(cls).items():
        if not name.startswith("_") and callable(getattr(cls, name)):
            assert inspect.signature(getattr(cls, name)), member
            assert getattr(cls, name).__doc__, name
