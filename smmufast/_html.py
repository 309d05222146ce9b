"""What a notebook shows of a value: a small table, or lines of text.

Imported when a notebook asks.  Every text goes through `_cell`: values may come from hostile
bytes, paths and logs.  There are no colours, so that it is readable on a light and a dark page.
"""

from __future__ import annotations

import dataclasses
import enum
import html
import inspect
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, cast

from smmufast.why import Why

if TYPE_CHECKING:
    from smmufast._device.smmu import Segments
    from smmufast._engine.tlb import Cache, Caches
    from smmufast.iommu.smmu.iommu import Iommu

MOST_ROWS: Final = 20
"""Rows of a table of entries, and elements of one value."""
MOST_TEXT: Final = 200
"""Characters of one element of a value."""
MOST_LINES: Final = 100
"""Lines of a text or picture."""

#: The fields whose numbers are shown in hexadecimal.
_HEX: Final = frozenset((
    "address", "attr", "base", "ipa", "iova", "length", "output", "pa", "page_size", "sid", "size",
    "ssid", "stag", "start", "swap", "table",
    # registers
    "aidr", "cmdq_base", "cr0", "cr1", "cr2", "eventq_base", "gbpa", "gerror", "gerrorn", "idr0",
    "idr1", "idr3", "idr5", "irq_ctrl", "priq_base", "strtab_base", "strtab_base_cfg",
))  # fmt: skip


def fields(value: object, title: str = "") -> str:
    """Return a table of the public fields of a value."""
    names = _names(type(value))
    return table(title or type(value).__name__, ((name, getattr(value, name)) for name in names))


def table(title: str, pairs: Iterable[tuple[str, object]]) -> str:
    """Return a table of fields with their values."""
    rows = (f"<th>{_cell(name)}</th><td>{_cell(_text(name, value))}</td>" for name, value in pairs)
    return _table(title, ("field", "value"), rows)


def entries(title: str, names: Sequence[str], found: Iterable[Iterable[object]], count: int) -> str:
    """Return a table with a row for each of the first entries; `count` is how many there are."""
    texts = (map(_text, names, entry) for entry in islice(found, MOST_ROWS))
    rows = ["".join(f"<td>{_cell(text)}</td>" for text in row) for row in texts]
    if count > len(rows):
        rows.append(f'<td colspan="{len(names)}">… {count - len(rows):,} more</td>')
    return _table(title, names, rows)


def segments(value: Segments) -> str:
    """Return a table of the first segments, and below it what ended the burst."""
    names = cast("tuple[str, ...]", value.array.dtype.names)
    shown = entries("Segments", names, value.array[:MOST_ROWS].tolist(), len(value))
    return shown if value.result is None else shown + fields(value.result, "then")


def caches(value: Caches) -> str:
    """Return a table of the caches that there are, with their counters."""
    counters = value.counters
    names = ("cache", "sets", "ways", "policy", "entries", *next(iter(counters.values()), ()))
    rows = []
    for name, numbers in counters.items():
        cache: Cache = getattr(value, name)
        rows.append((name, *cache.geometry[:3], len(cache), *numbers.values()))
    return entries("Caches", names, rows, len(rows))


def lines(text: str) -> str:
    """Return lines of text as they are."""
    found = text.split("\n", MOST_LINES)
    if len(found) > MOST_LINES:
        found[MOST_LINES] = f"… {found[MOST_LINES].count(chr(10)) + 1:,} more lines"
    return f"<pre>{html.escape(_plain(chr(10).join(found)))}</pre>"


def picture(owner: object, streams: Iterable[tuple[Iommu, int]]) -> str:
    """Return what the STEs of some streams lead to, as `Device.draw` draws it, below its owner."""
    from smmufast.iommu.draw import draw

    text = f"{owner!r}\n{draw(streams, 16, MOST_LINES - 2)}"
    return lines(text.rstrip())


def _table(title: str, names: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{_cell(name)}</th>" for name in names)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f"<table><caption>{_cell(title)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _names(kind: type) -> Iterable[str]:
    """The public fields of a class, in the order in which it has them."""
    if issubclass(kind, tuple):
        return cast("tuple[str, ...]", kind._fields)  # type: ignore[attr-defined]
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    return dict.fromkeys(
        name
        for base in reversed(kind.__mro__)
        for name, what in vars(base).items()
        if name[0] != "_" and inspect.isdatadescriptor(what)
    )


def _text(name: str, value: object) -> str:
    """Return a value as a line, a list or mapping as a line for each of its elements."""
    found: Iterator[Any]
    if isinstance(value, Mapping):
        found = (f"{_text('', key)}: {_text('', one)}" for key, one in value.items())
    elif isinstance(value, (list, tuple, deque)) and not hasattr(value, "_fields"):
        found = (_text(name, one) for one in value)
    else:
        return _line(name, value)
    shown = list(islice(found, MOST_ROWS))
    left = len(cast("Sized", value)) - len(shown)
    return "\n".join([*shown, *([f"… {left:,} more"] if left else [])])


def _line(name: str, value: object) -> str:
    """Return a value in one line, without markup."""
    if isinstance(value, Why):
        return f"{value.name} ({value.rule}): {value.sentence()}"
    if isinstance(value, enum.Enum):
        return value.name or "none"
    if isinstance(value, bytes):
        left = len(value) - MOST_TEXT // 2
        return value[: MOST_TEXT // 2].hex(" ", -8) + (f"… {left:,} more bytes" if left > 0 else "")
    if isinstance(value, int) and not isinstance(value, bool) and name in _HEX:
        return f"{value:#x}"
    if isinstance(value, tuple):  # a named one
        pairs = zip(_names(type(value)), value, strict=True)
        return " ".join(f"{field}={_text(field, one)}" for field, one in pairs)
    text = value if isinstance(value, str) else repr(value)
    if len(text) <= MOST_TEXT:
        return text
    return f"{text[:MOST_TEXT]}… {len(text) - MOST_TEXT:,} more characters"


def _plain(text: str) -> str:
    """Return a text without control characters, and without what UTF-8 does not have."""
    return "".join(
        one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode()
        for one in text
    )


def _cell(text: str) -> str:
    return html.escape(_plain(text)).replace("\n", "<br>")
