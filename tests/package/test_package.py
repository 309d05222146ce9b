"""The package as a whole: lint, types, examples in docstrings, what a build says and ships."""

import doctest
import importlib
import importlib.util
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
import sysconfig
import tarfile
import tomllib
import typing
import zipfile
from importlib import metadata
from pathlib import Path

import numpy
import pytest
from project import ROOT, TESTS
from setuptools import Distribution

import smmufast

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGE = Path(smmufast.__file__).parent
SOURCES = sorted((ROOT / "smmufast").rglob("*.p[yx]*"))
SOURCES = [path for path in SOURCES if path.suffix in (".py", ".pyx", ".pxi", ".pxd", ".pyi")]
OTHERS = [*sorted((ROOT / "smmufast").rglob("*.h")), ROOT / "smmufast" / "py.typed"]
MODULES = sorted(m.name for m in pkgutil.walk_packages(smmufast.__path__, "smmufast."))
MODULES = [name.removeprefix("smmufast.") for name in MODULES if name != "smmufast.__main__"]
MODULES = [name for name in MODULES if not name.startswith("iommu.")]
COMPILED = sorted(
    ".".join(path.relative_to(ROOT / "smmufast").with_suffix("").parts)
    for path in SOURCES
    if path.suffix == ".pyx"
)


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
    sources = [path for path in SOURCES if path.suffix in (".pyx", ".pxi", ".pxd")]
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
    allowed.write_text(r"smmufast\.[\w.]+\.__pyx_capi__" + "\n")  # what Cython users import
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
from setuptools import Distribution

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
        str(path.relative_to(ROOT)) for path in TESTS.rglob("test_*.py")
    }


# --- docstrings ---


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_are_true(name):
    module = importlib.import_module(f"smmufast.{name}")
    tried = doctest.testmod(module)
    assert tried.failed == 0


@pytest.mark.parametrize(("name", "least"), [
    ("_engine.memory", 3), ("_device.smmu", 5), ("features", 3),
])  # fmt: skip
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


DRIVER_ATTRIBUTES = {
    # of Pages and PageTable
    "memory", "pages", "contiguous", "dirty", "coherent", "fwb", "stage", "ias", "oas", "table",
    # of the rings
    "base", "size_lg2", "prod", "issued", "syncs", "log", "lock", "queue", "safe_bits", "call",
    "observer",
}  # fmt: skip


def test_everything_public_has_a_docstring():
    things = dict(public_things())
    assert len(things) > 60
    without = [
        name
        for name, thing in things.items()
        if not (inspect.getdoc(thing) or "").strip()
        # attributes that the docstring of their class describes
        and not (
            name.startswith("smmufast._device.smmu.Smmu.") and name.split(".")[-1] in REGISTERS)
        and not name.startswith("smmufast._device.smmu.Segments.")
        and not name.startswith("smmufast._engine.memory.MemoryRegion.")
        and not (name.startswith("smmufast._driver.") and name.split(".")[-1] in DRIVER_ATTRIBUTES)
    ]  # fmt: skip
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
    "_facts/bits.pxd", "_facts/layout.pxd", "_rules/vmsa.pxd", "_rules/config.pxd",
    "_rules/command.pxd", "_rules/scope.pxd", "_engine/chain.pxd", "_engine/stage.pxd",
    "_engine/stage1.pxd", "_engine/stage2.pxd", "_engine/lookup.pxd", "_engine/translate.pxd",
    "_engine/cached.pxd", "_engine/batch_block.pxd", "_engine/batch_contexts.pxd",
    "_engine/batch_rows.pxd", "_engine/batch_nested.pxd", "_engine/batch.pxd",
    "_engine/queue.pxd", "_engine/ats.pxd", "_engine/cache.pxd",
)  # fmt: skip


@pytest.mark.parametrize("name", HOT)
def test_every_rule_is_noexcept_and_nogil(name):
    text = (ROOT / "smmufast" / name).read_text()
    found = FUNCTION.findall(text)
    assert len(found) == len(re.findall(r"^cdef inline ", text, re.M)) > 0
    slow = [function for function, _, ends in found if ends.split() != ["noexcept", "nogil"]]
    assert slow == []


@pytest.mark.parametrize("path", [p for p in SOURCES if p.suffix in (".pyx", ".pxi", ".pxd")],
                         ids=lambda path: path.name)  # fmt: skip
def test_no_function_asks_for_the_lock_after_each_call(path):
    # nogil without noexcept takes the lock to look for an exception
    found = FUNCTION.findall(path.read_text())
    slow = [name for name, _, ends in found if "nogil" in ends and "noexcept" not in ends]
    assert slow == []


# --- what building asks for ---


@pytest.fixture
def setup_script():
    """setup.py as a module, of which nothing has run."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


#: a program that is given as CC, and the sentence that the build ends with
NO_HEADERS = "smmufast needs C headers, and {0} finds no {1}.h: install those of "
COMPILERS = {
    "none": ("", "smmufast needs a C compiler, and there is no {0}: install gcc or clang"),
    "fails": ("echo broken >&2; exit 3", "smmufast needs a C compiler, and {0} fails: broken"),
    "another kind": ("cat >/dev/null", "smmufast needs gcc or clang, and {0} is neither"),
    "no headers of C": ('exec {1} -nostdinc "$@"', NO_HEADERS.format("{0}", "stdlib") + "the C"),
    "no headers of Python": (
        'for a; do shift; case "$a" in -I*) ;; *) set -- "$@" "$a" ;; esac; done; exec {1} "$@"',
        NO_HEADERS.format("{0}", "Python") + "this Python (Debian: python3.",
    ),
}


@pytest.mark.parametrize("case", COMPILERS)
def test_a_build_without_what_it_needs_ends_with_one_sentence(tmp_path, case):
    does, sentence = COMPILERS[case]
    compiler = tmp_path / "compiler"
    if does:
        real = sysconfig.get_config_var("CC").split()[0]
        compiler.write_text(f"#!/bin/sh\n{does.replace('{1}', real)}\n")
        compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-P", "setup.py", "-q", "build_ext", "--build-lib", tmp_path,
         "--build-temp", tmp_path],
        cwd=ROOT, env=os.environ | {"CC": str(compiler)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(sentence.replace("{0}", str(compiler)))


def test_a_build_on_windows_says_what_is_missing(setup_script):
    class Microsoft:
        compiler_type = "msvc"

    with pytest.raises(SystemExit, match="does not run on Windows: it needs POSIX threads"):
        setup_script.compiler_kind(Microsoft, [])


def test_flags_follow_the_compiler_and_the_environment(monkeypatch, setup_script):
    def flags(kind, given="", debug=False, python=False):
        monkeypatch.setenv("CFLAGS", given)
        monkeypatch.setattr(setup_script, "DEBUG", debug)
        return [flag for flag in setup_script.flags(kind, python) if flag not in setup_script.FLAGS]

    assert flags("clang") == ["-O3", "-g0"]
    assert flags("gcc", python=True) == ["-O1", "-g0", *setup_script.QUIET]
    assert flags("gcc") == ["-O3", *setup_script.INLINE, "-g0", *setup_script.QUIET]
    assert all(flag.startswith("--param=") for flag in setup_script.INLINE)
    assert flags("clang", "-fpic -O0") == ["-g0"]
    assert flags("gcc", "-fpic -O1") == ["-g0", *setup_script.QUIET]
    assert flags("clang", "-g1 -march=native") == ["-O3"]
    assert flags("clang", "-O1", debug=True) == ["-g"]


@pytest.mark.parametrize(("asked", "jobs"), [(None, 3), (1, 1)])
def test_a_build_has_a_job_for_each_processor_that_it_may_use(
    monkeypatch, setup_script, asked, jobs
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 4, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(setup_script, "compiler_kind", lambda *a: "gcc")
    monkeypatch.setattr(setup_script.build_ext, "build_extensions", lambda self: None)
    command = setup_script.Build(Distribution({"ext_modules": []}))
    command.ensure_finalized()
    command.compiler, command.parallel = None, asked
    command.build_extensions()
    assert command.parallel == jobs


# --- a build, and what it ships ---


def source_files():
    """Every file of the sources: as git knows them, or as an sdist lists them."""
    made = {"PKG-INFO", "setup.cfg"}
    if (ROOT / ".git").exists():
        listed = run("git", "ls-files", "-z").split("\0")
        return {name for name in listed if name and (ROOT / name).exists()}
    listed = (ROOT / "smmufast.egg-info" / "SOURCES.txt").read_text().split("\n")
    return {name for name in listed if name and ".egg-info/" not in name} - made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """An sdist, made from a copy of the sources alone."""
    directory = tmp_path_factory.mktemp("sdist")
    for name in source_files():
        target = directory / "sources" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    python(
        "-c", f"from setuptools.build_meta import build_sdist; build_sdist({str(directory)!r})",
        cwd=directory / "sources",
    )  # fmt: skip
    (built,) = directory.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """(wheel, what the build said), from the sdist."""
    directory = tmp_path_factory.mktemp("wheel")
    said = python(
        "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index",
        "--disable-pip-version-check", "--wheel-dir", directory, sdist, cwd=directory,
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


def test_an_sdist_holds_every_file_of_the_sources_and_no_other(sdist):
    with tarfile.open(sdist) as archive:
        top = sdist.name.removesuffix(".tar.gz")
        names = {member.name.removeprefix(f"{top}/") for member in archive if member.isfile()}
    made = {name for name in names if name.startswith("smmufast.egg-info/")}
    made |= {"PKG-INFO", "setup.cfg"}
    assert {"smmufast/_device/smmu.pyx", "tests/twin.py", "docs/rules.md", ".ci/run"} <= names
    assert sorted(names - made) == sorted(source_files())


@pytest.mark.slow
def test_what_is_installed_from_an_sdist_in_a_new_environment_replays_a_capture(
    sdist, wheel, tmp_path
):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    venv = tmp_path / "venv"
    python("-m", "venv", "--without-pip", venv)
    python("-m", "pip", "--python", venv, "--disable-pip-version-check", "install", "--no-deps",
           "--no-index", wheel[0])  # fmt: skip
    (site_packages,) = venv.glob("lib/python*/site-packages")
    # numpy of this environment, behind what the new one holds
    (site_packages / "numpy.pth").write_text(f"{Path(numpy.__file__).parents[1]}\n")
    assert (site_packages / "smmufast" / "__init__.py").exists()
    said = run(venv / "bin" / "smmufast", "replay", "examples/linux-7.3-4k-s1", "--json",
               cwd=unpacked, PYTHONPATH="")  # fmt: skip
    found = json.loads(said)
    assert found["agreeing"] == found["requests"] > 7000


@pytest.mark.slow
def test_a_wheel_holds_no_debug_information(wheel, setup_script):
    with zipfile.ZipFile(wheel[0]) as archive:
        compiled = [name for name in archive.namelist() if name.endswith(".so")]
        assert len(compiled) == len(COMPILED) + len(setup_script.DRIVER)
        assert [name for name in compiled if b".debug_info" in archive.read(name)] == []


@pytest.mark.slow
def test_cython_has_no_performance_hints_and_no_warnings(wheel):
    said = wheel[1].splitlines()
    assert any("Cythonizing smmufast/_device/smmu.pyx" in line for line in said)
    assert [line for line in said if "performance hint" in line] == []
    assert [line for line in said if re.search(r"\.(pyx|pxd):\d+:\d+:", line)] == []


@pytest.mark.slow
def test_a_wheel_holds_what_python_and_cython_users_need_and_no_more(wheel, setup_script):
    names = {name for name in zipfile.ZipFile(wheel[0]).namelist() if ".dist-info/" not in name}
    compiles = (".pyx", ".pxi")
    expected = {str(path.relative_to(ROOT)) for path in SOURCES if path.suffix not in compiles}
    expected |= {str(path.relative_to(ROOT)) for path in OTHERS}
    compiled = {name for name in names if name.endswith((".so", ".pyd"))}
    python = {name.rsplit("/")[-1] for name in setup_script.DRIVER}
    mine = {name.rpartition(".")[2] for name in COMPILED}
    assert {Path(name).name.split(".")[0] for name in compiled} == mine | python
    assert names - compiled == expected


@pytest.mark.slow
def test_a_wheel_says_what_the_project_says(installed):
    (found,) = metadata.distributions(path=[str(installed)])
    assert found.metadata["Name"] == PROJECT["name"] == "smmufast"
    assert found.version == smmufast.__version__
    needed = [name for name in found.requires if "extra ==" not in name]
    assert [re.match(r"\w+", name)[0] for name in needed] == ["numpy"]
    assert found.metadata["License-Expression"] == "Apache-2.0"
    assert found.metadata["Author"] == "The smmufast authors"
    for place in ("Author-email", "Home-page", "Project-URL"):
        assert found.metadata[place] is None
    versions = {
        line.rsplit(" ", 1)[1] for line in found.metadata.get_all("Classifier")
        if line.startswith("Programming Language :: Python :: 3.")
    }  # fmt: skip
    assert versions == {"3.11", "3.12", "3.13", "3.14"}
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
                   "tests/engine/test_memory.py"],
        "python -P": [sys.executable, "-P", "-c", "import smmufast"],
    }  # fmt: skip
    witness = tmp_path / "witness"
    run(
        *commands[program], WITNESS=str(witness),
        PYTHONPATH=os.pathsep.join(map(str, (tmp_path, installed))),
    )  # fmt: skip
    assert Path(witness.read_text()).parent == installed / "smmufast"


@pytest.mark.parametrize(
    "line",
    [
        "from smmufast import Smmu",
        "from smmufast.iommu import System",
        "import smmufast._driver.pasid",
    ],
)
@pytest.mark.parametrize("sources", [True, False])
def test_a_folder_that_is_not_compiled_says_what_to_do(tmp_path, line, sources):
    shutil.copytree(PACKAGE, tmp_path / "smmufast",
                    ignore=shutil.ignore_patterns("*.so", "*.pyx", "*.pxd", "*.c", "*.h"))
    if sources:
        (tmp_path / "smmufast" / "_engine/memory.pyx").touch()
    done = subprocess.run(
        [sys.executable, "-c", line], cwd=tmp_path, capture_output=True, text=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip
    told = done.stderr.splitlines()[-1]
    start = f"ModuleNotFoundError: {tmp_path / 'smmufast'} is not compiled for cpython 3."
    assert told.startswith(start)
    assert ("start it elsewhere or with -P" in told) == sources
    assert ("Install it with this Python." in told) == (not sources)


def test_a_package_that_is_compiled_adds_no_finder():
    python("-c", "import sys; old = list(sys.meta_path); import smmufast, smmufast.iommu;"
           "assert old == sys.meta_path", cwd=ROOT.parent,
           PYTHONPATH=str(PACKAGE.parent))  # fmt: skip


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
