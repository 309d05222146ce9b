"""The driver half's files know each other one way: each imports only what stands before it."""

import ast
from pathlib import Path

import smmufast.iommu

ROOT = Path(smmufast.iommu.__file__).parent
#: From values to the whole.  What only names types (TYPE_CHECKING) is not counted.
ORDER = [
    "undo", "lock", "ids", "iova", "pasid",
    "smmu.queue", "smmu.writer", "smmu.entry", "smmu.invalidations",
    "attachment", "domain", "smmu.cdtable", "profile", "smmu.iommu", "smmu.master",
    "group", "aux", "sva", "mediated", "draw", "device", "nested", "fault",
    "save", "check", "system",
]  # fmt: skip


def imports(path):
    """The modules of the driver half that a file imports when it runs."""
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.ImportFrom) and node.module.startswith("smmufast.iommu"):
            rest = node.module.removeprefix("smmufast.iommu").lstrip(".")
            for name in node.names:
                inner = f"{rest}.{name.name}".lstrip(".")
                found.add(inner if known(inner) else rest)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found - {""}


def known(name):
    """A name of `ORDER`, or within one that is a package."""
    return next((one for one in ORDER if name == one or name.startswith(one + ".")), None)


def test_each_file_imports_only_what_stands_before_it():
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name in ("__init__", "smmu"):
            continue
        mine = known(name)
        assert mine is not None, f"{name} has no place in the order"
        for other in imports(path):
            its = known(other)
            assert its is not None, (name, other)
            assert its == mine or ORDER.index(its) < ORDER.index(mine), f"{name} imports {other}"
