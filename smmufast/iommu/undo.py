"""What takes back the beginning of a call that fails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable


class Undo:
    """What takes back the preparations of a call, should it fail: a context manager.

    Where that fails too, what was prepared before stays, also that of an Undo further out:
    something may still lead there.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Callable[..., object], tuple[object, ...]]] = []

    def add(self, call: Callable[..., object], *arguments: object) -> None:
        """Remember a call; the last one is made first."""
        self._calls.append((call, arguments))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *more: object
    ) -> None:
        if error is None:
            return
        for call, arguments in reversed(self._calls):
            if "stuck" in error.__dict__:
                break
            try:
                call(*arguments)
            except Exception:  # what failed first is what is raised
                error.__dict__["stuck"] = True
            except BaseException:  # an interrupt, which is raised once
                self._again(error, call, arguments)

    @staticmethod
    def _again(
        error: BaseException, call: Callable[..., object], arguments: tuple[object, ...]
    ) -> None:
        try:
            call(*arguments)
        except BaseException:
            error.__dict__["stuck"] = True
