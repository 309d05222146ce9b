"""The rooms of the package know each other one way, and no file imports in a circle.

Read from the sources, Cython's `cimport` included.  What a function imports when it is called
(`Result.explain` needs the tools) is not counted, nor what types alone need.
"""

import graphlib
import re

import pytest
from project import ROOT

PACKAGE = ROOT / "smmufast"
#: Which rooms and which files of other rooms a room may import.
ALLOWED = {
    "_facts": set(),
    "_rules": {"_facts"},
    "values": {"_facts"},  # public names without behaviour, and arguments
    "_engine": {"_facts", "_rules", "values"},
    "_device": {"_facts", "_rules", "values", "_engine"},
    # the two halves meet in memory, and the command queue rings the bell of an Smmu
    "_driver": {
        "_facts", "values", "_engine.memory", "_engine.host", "_engine.core", "_device.smmu",
    },
    # `ats` is a device; a picture names fields as an explanation does
    "iommu": {"_facts", "values", "_engine.memory", "_driver", "_device", "ats", "explain"},
    "tools": {"_facts", "values", "_engine", "_device"},
}  # fmt: skip
VALUES = {"_arguments", "errors", "faults", "features", "layout", "why"}
IMPORT = re.compile(
    r"^(?:from smmufast(?:\.(?P<module>[\w.]+))? c?import (?P<names>\([^)]*\)|[^\n]+)"
    r"|c?import smmufast\.(?P<whole>[\w.]+))", re.M)  # fmt: skip


def module_of(path):
    """A part that is included (`smmu_walk.pxi`) is of the module whose name it begins with."""
    if path.suffix == ".pxi":
        path = path.with_name(path.stem.partition("_")[0] + ".pyx")
        assert path.exists()
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


KINDS = (".py", ".pyx", ".pxi", ".pxd")
SOURCES = [path for path in sorted(PACKAGE.rglob("*.p[yx]*")) if path.suffix in KINDS]
MODULES = {module_of(path) for path in SOURCES}


def room_of(module):
    first = module.partition(".")[0]
    if first in ALLOWED:
        return first
    return "values" if first in VALUES else "tools"


def imports(path):
    """The modules of the package that a file imports when it is imported."""
    found = set()
    for match in IMPORT.finditer(path.read_text(encoding="utf-8")):
        if match["whole"]:
            found.add(match["whole"])
            continue
        home = match["module"] or ""
        for name in re.findall(r"\w+", match["names"] or ""):
            inner = f"{home}.{name}".lstrip(".")
            if inner in MODULES:
                found.add(inner)
            elif home:
                found.add(home)
    return found


def graph():
    found = {}
    for path in SOURCES:
        module = module_of(path)
        if module not in ("__init__", "__main__"):
            found.setdefault(module, set()).update(imports(path) - {module})
    return found


GRAPH = graph()


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_what_is_below_it_alone(room):
    mine = {module: others for module, others in GRAPH.items() if room_of(module) == room}
    assert mine
    wrong = [
        (module, other)
        for module, others in mine.items()
        for other in others
        if room_of(other) != room and not {room_of(other), other} & ALLOWED[room]
    ]
    assert wrong == []


def test_no_file_imports_in_a_circle():
    order = list(graphlib.TopologicalSorter(GRAPH).static_order())
    assert order.index("_facts.layout") < order.index("_rules.vmsa") < order.index("_device.smmu")
    assert len(order) > 60


def test_rules_import_facts_alone():
    """Said once more by name: it is what makes a rule readable by itself."""
    rules = {module: others for module, others in GRAPH.items() if module.startswith("_rules.")}
    assert len(rules) >= 3
    for others in rules.values():
        assert all(other.startswith(("_facts.", "_rules.")) for other in others)


@pytest.mark.parametrize("line", [
    "from smmufast._engine.memory cimport Port",
    "from smmufast._engine.memory cimport (\n    Port, Ram,\n)",
    "cimport smmufast._engine.memory",
    "from smmufast._engine import memory",
    "import smmufast._engine.memory as memory",
])  # fmt: skip
def test_each_form_of_an_import_is_found(tmp_path, line):
    path = tmp_path / "x.pyx"
    path.write_text(f"cimport cython\n{line}\n\nfrom libc.stdint cimport uint64_t\n")
    assert imports(path) == {"_engine.memory"}
    path.write_text(f"def f():\n    {line.partition('(')[0]}\n")
    assert imports(path) == set()
