"""What people meet at a prompt: completion, help, signatures."""

import ast
import importlib
import inspect
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import smmufast

HOME = Path(smmufast.__file__).resolve().parent.parent
MODULES = ("ats", "capture", "cli", "decode", "errors", "explain", "faults", "features", "iommu",
           "layout", "replay", "streams", "trace", "why")  # fmt: skip


def in_a_new_process(code):
    """What code prints in a process that has imported nothing yet."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env={"PYTHONPATH": str(HOME)}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_every_public_module_is_completed_before_it_is_imported():
    code = "import smmufast; print(*dir(smmufast))"
    names = in_a_new_process(code).split()
    assert set(MODULES) | set(smmufast.__all__) <= set(names)
    assert names == sorted(names)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_loads_when_it_is_named(name):
    code = f"import smmufast; print(smmufast.{name}.__name__)"
    assert in_a_new_process(code) == f"smmufast.{name}"


def test_completion_imports_nothing():
    code = "import sys, smmufast; dir(smmufast); print('numpy' in sys.modules)"
    assert in_a_new_process(code) == "False"


def test_names_that_there_are_not_are_told():
    with pytest.raises(AttributeError, match="module 'smmufast' has no attribute 'Smu'"):
        _ = smmufast.Smu


def public(name):
    """The public functions and classes of a module that are written in Python, and methods."""
    module = importlib.import_module(f"smmufast.{name}")
    for attribute in getattr(module, "__all__", ()):
        value = getattr(module, attribute)
        home = inspect.getmodule(value)
        if not callable(value) or not str(getattr(home, "__file__", "")).endswith(".py"):
            continue
        # that of a builtin exception is known from Python 3.13 on
        builtin = inspect.isclass(value) and issubclass(value, BaseException)
        if not builtin or "__init__" in vars(value):
            yield attribute, value
        if inspect.isclass(value):
            for method in vars(value):
                if not method.startswith("_") and callable(getattr(value, method)):
                    yield method, getattr(value, method)


@pytest.mark.parametrize("name", MODULES)
def test_signatures_and_help_are_there(name):
    for attribute, value in public(name):
        assert str(inspect.signature(value)).startswith("("), attribute
        assert attribute in pydoc.render_doc(value)


def compiled():
    """The public classes that are compiled."""
    for module in (smmufast, smmufast.iommu):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) and value.__module__.rpartition(".")[2].startswith("_"):
                yield value


def test_there_are_compiled_classes():
    assert {"Smmu", "Memory", "Caches", "PageTable", "PasidAllocator"} <= {
        cls.__name__ for cls in compiled()
    }


def of_stub(cls):
    """The arguments of a class's __new__ or __init__ and its defaults, as its stub has them."""
    for base in cls.__mro__[:-1]:
        tree = ast.parse((HOME / f"{base.__module__.replace('.', '/')}.pyi").read_text())
        for node in tree.body:
            if not isinstance(node, ast.ClassDef) or node.name != base.__name__:
                continue
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name in ("__new__", "__init__"):
                    if method.args.vararg is not None:  # nobody makes one
                        return {}
                    given = method.args
                    defaults = [None] * (len(given.args) - len(given.defaults)) + given.defaults
                    pairs = [*zip(given.args, defaults, strict=True),
                             *zip(given.kwonlyargs, given.kw_defaults, strict=True)]  # fmt: skip
                    return {
                        a.arg: inspect.Parameter.empty if d is None else value_of(d)
                        for a, d in pairs[1:]
                    }
    return {}


def value_of(node):
    return eval(compile(ast.Expression(node), "stub", "eval"), {})


@pytest.mark.parametrize("cls", list(compiled()), ids=lambda cls: cls.__name__)
def test_compiled_classes_have_the_signature_of_their_stub(cls):
    if issubclass(cls, tuple):
        return
    found = inspect.signature(cls)
    assert {p.name: p.default for p in found.parameters.values()} == of_stub(cls)
    assert "--" not in inspect.getdoc(cls).splitlines()[:3]


def test_help_of_the_package_names_what_it_has():
    text = pydoc.plain(pydoc.render_doc(smmufast))
    for name in ("class Smmu", "class Memory", "class Capture", "class Features", "get_include"):
        assert name in text
