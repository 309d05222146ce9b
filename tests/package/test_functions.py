"""Every function of the package that is longer than ten lines says what it does.

By a docstring, or by a comment right above it or at its head.
"""

import re

import pytest
from project import ROOT

PACKAGE = ROOT / "smmufast"
LONGEST = 10  # lines that may go without a word
# no `=` before the name's parenthesis: that would be a variable
DEF = re.compile(
    r"^( *)(?:def|cdef|cpdef)\b(?!\s+(?:class|struct|extern|enum|union|packed))[^=(]*\w\("
)
SOURCES = sorted(
    path for kind in ("py", "pyx", "pxi", "pxd") for path in PACKAGE.rglob(f"*.{kind}")
    if not path.read_text(encoding="utf-8").startswith("# Generated")
)  # fmt: skip


def functions(text):
    """Yield each function: its line, its lines, and what says what it does, or None."""
    lines = text.split("\n")
    for at, line in enumerate(lines):
        if not (match := DEF.match(line)):
            continue
        head = at
        while head < len(lines) and not re.search(r":\s*(#.*)?$", lines[head]):
            if re.search(r"\)\s*(noexcept|nogil|except|\s|[-?*\d])*(#.*)?$", lines[head]):
                break  # a declaration
            head += 1
        else:
            indent = len(match[1])
            end = head + 1
            while end < len(lines) and (
                not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > indent
            ):
                end += 1
            while not lines[end - 1].strip():
                end -= 1
            above = lines[at - 1].strip()
            while above.startswith("@"):
                at -= 1
                above = lines[at - 1].strip()
            first = next((one.strip() for one in lines[head + 1 : end] if one.strip()), "")
            says = first if first.startswith(('"""', 'r"""', "#")) else None
            if says is None and above.startswith("#"):
                says = above
            yield at + 1, end - at, says


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_long_function_says_what_it_does(path):
    silent = [
        at for at, length, says in functions(path.read_text(encoding="utf-8"))
        if length > LONGEST and says is None
    ]  # fmt: skip
    assert silent == []


def test_a_silent_function_is_found():
    body = "".join(f"    x = {i}\n" for i in range(11))
    assert [says for _, _, says in functions(f"def f(x):\n{body}")] == [None]
    split = f"cdef int f(\n    int x) noexcept nogil:\n{body}"
    assert [says for _, _, says in functions(split)] == [None]
    assert list(functions(f"cdef int f(\n    int x) noexcept nogil\n\n{body}")) == []
    assert next(functions(f'def f(x):\n    """Do."""\n{body}'))[2] == '"""Do."""'
    assert next(functions(f"# Does.\ncdef int f(int x):\n{body}"))[2] == "# Does."
