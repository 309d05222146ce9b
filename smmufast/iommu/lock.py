"""The lock of a system: one call at a time, and what observers may do meanwhile."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self

from smmufast.errors import Busy

if TYPE_CHECKING:
    from collections.abc import Callable


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

    @property
    def between_changes(self) -> threading.RLock:
        """Held by whoever must not meet a change in its middle: another thread's is waited for."""
        return self._lock

    @property
    def closed(self) -> _Closed:
        """Held while a callback is called that may change nothing."""
        return _Closed(self)

    def call(self, callback: Callable[..., object], *arguments: object) -> None:
        """Call an observer; without the lock, it is only called."""
        if self._owner != threading.get_ident():
            callback(*arguments)
            return
        with self.closed:
            self.defer(callback, *arguments)

    def defer(self, callback: Callable[..., object], *arguments: object) -> None:
        """Make a call whose exception is raised when the lock is let go of."""
        try:
            callback(*arguments)
        except BaseException as error:
            self._raised.append(error)

    def insist(self, step: Callable[..., object], *arguments: object) -> None:
        """Take a step without which a change stays half made; one that fails is taken once more.

        As with `defer`, what it raises is raised when the lock is let go of.
        """
        try:
            step(*arguments)
        except BaseException as error:
            self._raised.append(error)
            try:
                step(*arguments)
            except BaseException:  # the first is raised
                return

    def __repr__(self) -> str:
        """Whether it is held."""
        return f"<SystemLock: {'held' if self._depth else 'free'}>"


class _Closed:
    def __init__(self, lock: SystemLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._lock._closed += 1

    def __exit__(self, *raised: object) -> None:
        self._lock._closed -= 1
