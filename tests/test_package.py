"""The package as a whole: lint, types, examples in docstrings, what a build says and ships."""

import doctest
import importlib
import inspect
import json
import os
import pkgutil
import re
import shlex
import shutil
import site
import subprocess
import sys
import tomllib
import typing
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import smmufast

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGE = Path(smmufast.__file__).parent
SOURCES = sorted((ROOT / "smmufast").rglob("*.p[yx]*"))
SOURCES = [path for path in SOURCES if path.suffix in (".py", ".pyx", ".pxd", ".pyi")]
OTHERS = [*sorted((ROOT / "smmufast").glob("*.h")), ROOT / "smmufast" / "py.typed"]
MODULES = sorted(m.name for m in pkgutil.iter_modules(smmufast.__path__) if m.name != "__main__")
COMPILED = sorted(path.stem for path in SOURCES if path.suffix == ".pyx")


def run(*command, cwd=ROOT, **environment):
    """Run a program with the tools of this Python on the path; its output if it succeeds."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | {"PATH": tools} | environment,
        capture_output=True, text=True,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


def python(*arguments, **more):
    return run(sys.executable, "-P", *arguments, **more)


def tool(name):
    """A program that the `test` extra installs beside this Python."""
    path = Path(sys.executable).parent / name
    assert path.exists(), f"{path} is missing: install the extra 'test'"
    return path


# --- lint and types ---


def test_ruff_finds_nothing():
    run(tool("ruff"), "check", "--no-cache", ".")


@pytest.mark.slow
def test_cython_lint_finds_nothing():
    sources = [path for path in SOURCES if path.suffix in (".pyx", ".pxd")]
    assert len(sources) > 8
    run(tool("cython-lint"), *sources)


@pytest.fixture
def typed(tmp_path):
    """Where and how mypy sees the package that is tested, wherever it lies."""
    where = {"cwd": tmp_path}
    installed = [*site.getsitepackages(), site.getusersitepackages()]
    if str(PACKAGE.parent) not in installed:
        where |= {"MYPYPATH": str(PACKAGE.parent), "PYTHONPATH": str(PACKAGE.parent)}
    return where


@pytest.mark.slow
def test_stubs_say_what_the_compiled_modules_hold(typed, tmp_path):
    allowed = tmp_path / "allowed"
    allowed.write_text(r"smmufast\._\w+\.__pyx_capi__" + "\n")  # what Cython users import
    modules = [f"smmufast.{name}" for name in COMPILED]
    said = python("-m", "mypy.stubtest", "--allowlist", allowed, *modules, **typed)
    assert f"no issues found in {len(modules)} modules" in said


CONFIG = ("--config-file", ROOT / "pyproject.toml")
USES = """\
from typing import assert_type

import numpy as np
from numpy.typing import NDArray

from smmufast import Event, Fault, Features, Memory, Perm, Result, Segments, Smmu, Walk

memory = Memory()
memory.add(bytearray(64), 0, readonly=True)
memory.add(np.zeros(8, np.uint64), np.uint64(0x1000))
memory.add_callback(1 << 32, 64, lambda address, n: bytes(n) if n else None)
assert_type(memory.read(0, 8), bytes)
assert_type(memory.inject_error(kind="CD", nth=3), int)
smmu = Smmu(memory, Features(oas=5), strtab_base=0x1000)
result = smmu.translate(0, 1, ssid=None, write=True, trace=True)
assert_type(result, Result)
assert_type(result.pa, int | None)
assert_type(result.perm, Perm)
if result.event:
    assert_type(result.event, Event)
try:
    assert_type(smmu.pa(np.uint32(1), 2), int)
except Fault as fault:
    assert_type(fault.result, Result)
out = np.zeros(3, [("pa", "u8")])
iova = np.zeros(3, np.uint64)
assert_type(smmu.translate_batch(0, iova, columns=["pa", "event"]), NDArray[np.void])
columns: dict[str, NDArray[np.uint64]] = {"pa": iova}
assert_type(smmu.translate_batch([0, 1, 2], iova, write=iova == 0, out=columns),
            dict[str, NDArray[np.uint64]])
burst = smmu.translate_range(0, 1, 2)
assert_type(burst, Segments)
for start, address, length in burst:
    assert_type(start + address + length, int)
walk = smmu.start_walk(0, 1)
assert_type(walk, Walk)
while walk.request:
    walk.supply(bytes(walk.request.size) if walk.request.level is None else None)
"""

MISUSES = (
    "Memory(5)",
    "Memory().add('text', 0)",
    "Memory().inject_error(kind='PTE')",
    "Memory().regions[0].base = 5",
    "Smmu(Memory(), strtab_base='x')",
    "Smmu(Memory()).translate(0, 1.5)",
    "Smmu(Memory()).translate_batch(0, [1], columns=['colour'])",
    "Smmu(Memory()).cr0 = 5",
    "Smmu(Memory()).pa(0, 0) + 'x'",
    "len(Smmu(Memory()).translate(0, 0).pa)",
)


@pytest.mark.slow
def test_types_hold_within_the_package_and_for_its_users(typed, tmp_path):
    (tmp_path / "uses.py").write_text(USES)
    python("-m", "mypy", *CONFIG, "--strict", "-p", "smmufast", "-m", "uses", **typed)


@pytest.mark.slow
def test_types_tell_mistakes(typed, tmp_path):
    # an ignore that is not needed is an error: each line must be one
    lines = [f"{line}  # type: ignore" for line in MISUSES]
    (tmp_path / "misuses.py").write_text("\n".join(["from smmufast import *", *lines]))
    python("-m", "mypy", *CONFIG, "--warn-unused-ignores", "-m", "misuses", **typed)


# --- quick and slow tests ---

COLLECT = """\
import json, shlex, sys
import pytest

class Names:
    def pytest_collection_finish(self, session):
        self.names = [item.nodeid for item in session.items]

found = []
for arguments in json.loads(sys.argv[1]):
    plugin = Names()
    status = pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *arguments], [plugin])
    assert status == 0
    # pytest doubles the backslashes of a name each time that it collects it
    found.append([name.replace("\\\\", "") for name in plugin.names])
open(sys.argv[2], "w").write(json.dumps(found))
"""


@pytest.mark.slow
def test_the_readme_runs_every_test_once(tmp_path):
    commands = re.findall(r"\.venv/bin/pytest (.*)", (ROOT / "README.md").read_text())
    assert len(commands) == 2
    options = [shlex.split(command) for command in commands]
    chosen = [words[words.index("-m") :] for words in options]
    assert [words[:-2] for words in options] == [["-n", "2", "--dist", "loadfile"]] * 2
    everything = ["-o", "addopts="]
    names = tmp_path / "names"
    python("-c", COLLECT, json.dumps([*chosen, everything]), names,
           PYTHONPATH=str(PACKAGE.parent))  # fmt: skip
    quick, slow, whole = json.loads(names.read_text())
    assert 0 < len(slow) < len(quick)
    assert sorted(quick + slow) == sorted(whole)
    assert {name.split("::")[0] for name in whole} == {
        f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")
    }


# --- docstrings ---


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_are_true(name):
    module = importlib.import_module(f"smmufast.{name}")
    tried = doctest.testmod(module)
    assert tried.failed == 0


@pytest.mark.parametrize(("name", "least"), [("_memory", 3), ("_smmu", 5), ("features", 3)])
def test_examples_of_compiled_modules_are_found(name, least):
    module = importlib.import_module(f"smmufast.{name}")
    assert doctest.testmod(module).attempted >= least


def public_things():
    """Everything public, by its full name."""
    for name in ["", *MODULES]:
        module = importlib.import_module(f"smmufast.{name}".rstrip("."))
        yield module.__name__, module
        for key, thing in vars(module).items():
            own = getattr(thing, "__module__", None) == module.__name__
            if key.startswith("_") or not own or not callable(thing):
                continue
            yield f"{module.__name__}.{key}", thing
            if inspect.isclass(thing):
                for member, value in vars(thing).items():
                    if not member.startswith("_") and (
                        callable(value) or isinstance(value, (property, classmethod, staticmethod))
                        or inspect.isgetsetdescriptor(value)
                    ):  # fmt: skip
                        yield f"{module.__name__}.{key}.{member}", value


REGISTERS = {"memory", "features", "strtab_base", "strtab_base_cfg", "cr0", "cr2", "gbpa"}


TABLE_ATTRIBUTES = {
    "memory", "pages", "contiguous", "dirty", "coherent", "fwb", "stage", "ias", "oas", "table",
}  # fmt: skip


RING_ATTRIBUTES = {
    "memory", "base", "size_lg2", "prod", "issued", "syncs", "log", "lock", "queue", "safe_bits",
    "call", "observer",
}  # fmt: skip


def test_everything_public_has_a_docstring():
    things = dict(public_things())
    assert len(things) > 60
    without = [
        name
        for name, thing in things.items()
        if not (inspect.getdoc(thing) or "").strip()
        # attributes that the docstring of their class describes
        and not (name.startswith("smmufast._smmu.Smmu.") and name.split(".")[-1] in REGISTERS)
        and not name.startswith("smmufast._smmu.Segments.")
        and not name.startswith("smmufast._memory.MemoryRegion.")
        and not (name.startswith("smmufast._tables.") and name.split(".")[-1] in TABLE_ATTRIBUTES)
        and not (name.startswith("smmufast._ring.") and name.split(".")[-1] in RING_ATTRIBUTES)
    ]
    assert without == []


def test_what_the_package_offers_is_what_it_names():
    assert sorted(smmufast.__all__) == smmufast.__all__ or len(set(smmufast.__all__)) > 10
    for name in smmufast.__all__:
        assert getattr(smmufast, name) is not None
    public = {
        key for key, value in vars(smmufast).items()
        if not key.startswith("_") and not inspect.ismodule(value) and key not in vars(typing)
    }  # fmt: skip
    assert public <= set(smmufast.__all__)


# --- the hot path ---

#: a function of Cython, up to its colon or the end of a declaration; arguments may span lines
FUNCTION = re.compile(r"^[ ]*cdef (?:inline )?[\w\[\]* ]*?(\w+)\(([^()]*)\)([^:\n(]*)(?::|$)", re.M)
HOT = (
    "_bits.pxd", "_vmsa.pxd", "_config.pxd", "_translate.pxd", "_cached.pxd", "_batch.pxd",
    "_queue.pxd", "_command.pxd", "_ats.pxd", "_cache.pxd", "_layout.pxd",
)  # fmt: skip


@pytest.mark.parametrize("name", HOT)
def test_every_rule_is_noexcept_and_nogil(name):
    text = (ROOT / "smmufast" / name).read_text()
    found = FUNCTION.findall(text)
    assert len(found) == len(re.findall(r"^cdef inline ", text, re.M)) > 0
    slow = [function for function, _, ends in found if ends.split() != ["noexcept", "nogil"]]
    assert slow == []


@pytest.mark.parametrize("path", [p for p in SOURCES if p.suffix in (".pyx", ".pxd")],
                         ids=lambda path: path.name)  # fmt: skip
def test_no_function_asks_for_the_lock_after_each_call(path):
    # nogil without noexcept takes the lock to look for an exception
    found = FUNCTION.findall(path.read_text())
    slow = [name for name, _, ends in found if "nogil" in ends and "noexcept" not in ends]
    assert slow == []


# --- a build, and what it ships ---


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """(wheel, what the build said), from a copy of the sources alone."""
    directory = tmp_path_factory.mktemp("wheel")
    sources = directory / "sources"
    (sources / "smmufast").mkdir(parents=True)
    for path in SOURCES + OTHERS:
        target = sources / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    said = python(
        "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index",
        "--disable-pip-version-check", "--wheel-dir", directory, sources, cwd=directory,
        CFLAGS="-O0",  # what is looked at does not depend on it, and this takes a quarter
    )  # fmt: skip
    (built,) = directory.glob("*.whl")
    return built, said


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Where the wheel was installed, apart from everything else."""
    directory = tmp_path_factory.mktemp("installed")
    python(
        "-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check",
        "--target", directory, wheel[0], cwd=directory,
    )  # fmt: skip
    return directory


@pytest.mark.slow
def test_cython_has_no_performance_hints_and_no_warnings(wheel):
    said = wheel[1].splitlines()
    assert any("Cythonizing smmufast/_smmu.pyx" in line for line in said)
    assert [line for line in said if "performance hint" in line] == []
    assert [line for line in said if re.search(r"\.(pyx|pxd):\d+:\d+:", line)] == []


@pytest.mark.slow
def test_a_wheel_holds_what_python_and_cython_users_need_and_no_more(wheel):
    names = {name for name in zipfile.ZipFile(wheel[0]).namelist() if ".dist-info/" not in name}
    expected = {str(path.relative_to(ROOT)) for path in SOURCES if path.suffix != ".pyx"}
    expected |= {str(path.relative_to(ROOT)) for path in OTHERS}
    compiled = {name for name in names if name.endswith((".so", ".pyd"))}
    assert {Path(name).name.split(".")[0] for name in compiled} == set(COMPILED)
    assert names - compiled == expected


@pytest.mark.slow
def test_a_wheel_says_what_the_project_says(installed):
    (found,) = metadata.distributions(path=[str(installed)])
    assert found.metadata["Name"] == PROJECT["name"] == "smmufast"
    assert found.version == PROJECT["version"] == smmufast.__version__
    needed = [name for name in found.requires if "extra ==" not in name]
    assert [re.match(r"\w+", name)[0] for name in needed] == ["numpy"]
    assert found.metadata["License-Expression"] == "Apache-2.0"
    assert any(path.name == "LICENSE" for path in found.files)
    (script,) = found.entry_points.select(group="console_scripts")
    assert (script.name, script.value) == ("smmufast", "smmufast.cli:main")


WITNESS = """\
import atexit, os, sys

@atexit.register
def tell():
    if "smmufast" in sys.modules:
        with open(os.environ["WITNESS"], "w") as file:
            file.write(sys.modules["smmufast"].__file__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", ["smmufast", "pytest", "python -P"])
def test_programs_run_from_the_sources_use_the_installed_package(installed, tmp_path, program):
    # The sources lie in a folder that is named as the package is.
    (tmp_path / "sitecustomize.py").write_text(WITNESS)
    commands = {
        "smmufast": [installed / "bin" / "smmufast", "--help"],
        "pytest": [tool("pytest"), "-q", "--collect-only", "-p", "no:cacheprovider",
                   "tests/test_memory.py"],
        "python -P": [sys.executable, "-P", "-c", "import smmufast"],
    }  # fmt: skip
    witness = tmp_path / "witness"
    run(
        *commands[program], WITNESS=str(witness),
        PYTHONPATH=os.pathsep.join(map(str, (tmp_path, installed))),
    )  # fmt: skip
    assert Path(witness.read_text()).parent == installed / "smmufast"


@pytest.mark.slow
def test_nothing_but_numpy_is_imported(installed, tmp_path):
    said = python(
        "-c", "import sys; old = set(sys.modules); from smmufast import *;"
        "print(*sorted({n.split('.')[0] for n in set(sys.modules) - old}"
        " - set(sys.stdlib_module_names)))",
        cwd=tmp_path, PYTHONPATH=str(installed),
    )  # fmt: skip
    names = {name for name in said.split() if not name.startswith(("_cython_", "cython_runtime"))}
    assert names == {"numpy", "smmufast"}
