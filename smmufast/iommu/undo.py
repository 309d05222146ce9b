"""What takes back the beginning of a call that fails."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable


class Undo:
    """What takes back the preparations of a call, should it fail: a context manager."""

    def __init__(self) -> None:
        self._calls: list[tuple[Callable[..., object], tuple[object, ...]]] = []

    def add(self, call: Callable[..., object], *arguments: object) -> None:
        """Remember a call; the last one is made first."""
        self._calls.append((call, arguments))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *more: object) -> None:
        for call, arguments in reversed(self._calls) if kind is not None else ():
            with contextlib.suppress(Exception):  # what failed first is what is raised
                call(*arguments)
