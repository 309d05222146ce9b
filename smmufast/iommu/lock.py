"""The lock of a system: one call at a time, and what observers may do meanwhile."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from smmufast.errors import Busy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class SystemLock:
    """Held by each call that attaches, detaches, binds or frees.

    A thread may take it again while it has it, but not from an observer, which is called in the
    middle of a change: Busy.  What an observer raises is raised when the outermost call that holds
    the lock is done, so that no change stays half made.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._closed = 0
        self._owner = 0
        self._raised: list[BaseException] = []

    def __enter__(self) -> Self:
        self._lock.acquire()
        if self._closed:
            self._lock.release()
            text = "a callback may not change the system while it is being changed"
            raise Busy("system", self, text=text)
        self._depth += 1
        self._owner = threading.get_ident()
        return self

    def __exit__(self, kind: type[BaseException] | None, *more: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = 0
        raised: list[BaseException] = []
        if not self._depth:
            raised, self._raised = self._raised, raised
        self._lock.release()
        if raised and kind is None:
            raise raised[0]

    @contextmanager
    def between_changes(self) -> Iterator[None]:
        """Wait for the end of a change that another thread makes."""
        with self._lock:
            yield

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Let nothing be changed from a callback."""
        self._closed += 1
        try:
            yield
        finally:
            self._closed -= 1

    def call(self, callback: Callable[..., object], *arguments: object) -> None:
        """Call an observer; without the lock, it is only called."""
        if self._owner != threading.get_ident():
            callback(*arguments)
            return
        with self.closed():
            self.defer(callback, *arguments)

    def defer(self, callback: Callable[..., object], *arguments: object) -> None:
        """Make a call whose exception is raised when the lock is let go of."""
        try:
            callback(*arguments)
        except BaseException as error:
            self._raised.append(error)

    def __repr__(self) -> str:
        """Whether it is held."""
        return f"<SystemLock: {'held' if self._depth else 'free'}>"
