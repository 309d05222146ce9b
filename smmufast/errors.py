"""Errors of the driver half: one class for each errno of the kernel, each a builtin as well.

`errno` is positive, as in the module of that name.  A message names the argument, what was given
and what is allowed; these three are attributes too.
"""

# The causes are named for what they are; all are errors.
# ruff: noqa: N818
from __future__ import annotations

import errno as _errno
import operator as _operator
from dataclasses import dataclass as _dataclass
from typing import TYPE_CHECKING as _TYPE_CHECKING

from smmufast._arguments import must_be as _must_be
from smmufast._arguments import shown as _shown

if _TYPE_CHECKING:
    from collections.abc import Sequence

    from smmufast.why import Why


class IommuError(Exception):
    """A call of the driver half that was refused, or could not be done; it changed nothing.

    Parameters
    ----------
    argument
        The name of the argument, or of what stands in the way.
    value
        What was given.
    limit
        What is allowed.
    text
        The whole message, where "ARGUMENT must be LIMIT, not VALUE" does not say it.

    Attributes
    ----------
    errno
        The number that Linux returns, positive.
    """

    errno: int = 0
    argument: str
    value: object
    limit: object

    def __init__(
        self, argument: str, value: object = None, limit: object = None, *, text: str | None = None
    ) -> None:
        """Name the argument, what was given and what is allowed."""
        self.argument = argument
        self.value = value
        self.limit = limit
        if text is None:
            text = f"{argument} is {_shown(value)}"
            if limit is not None:
                text = _must_be(argument, limit if isinstance(limit, str) else _shown(limit), value)
        super().__init__(text)

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (type(self), self.argument, self.value, self.limit, str(self))


def _restore(
    kind: type[IommuError], argument: str, value: object, limit: object, text: str
) -> IommuError:
    return kind(argument, value, limit, text=text)


class InvalidArgument(IommuError, ValueError):
    """EINVAL: the value is not allowed.  From an attach it is soft: try another domain."""

    errno = _errno.EINVAL


class WrongType(IommuError, TypeError):
    """EINVAL: no integer, or an object of another kind."""

    errno = _errno.EINVAL


class OutOfRange(IommuError, ValueError):
    """ERANGE: an address or a StreamID beyond what the hardware has."""

    errno = _errno.ERANGE


class TooBig(IommuError, ValueError):
    """E2BIG: a SubstreamID beyond the CD table."""

    errno = _errno.E2BIG


class Exists(IommuError, ValueError):
    """EEXIST: something is mapped, registered or initialised there already."""

    errno = _errno.EEXIST


class PasidOverflow(IommuError, OverflowError):
    """EOVERFLOW: a PASID that exists already is too large for this device."""

    errno = _errno.EOVERFLOW


class NoDevice(IommuError, LookupError):
    """ENODEV: no such device, SMMU or feature."""

    errno = _errno.ENODEV


class NoEntry(IommuError, LookupError):
    """ENOENT: nothing has this number."""

    errno = _errno.ENOENT


class NoProcess(IommuError, LookupError):
    """ESRCH: the address space has no ASID to share."""

    errno = _errno.ESRCH


class WrongSmmu(IommuError, LookupError):
    """ENXIO: the domain lives on another SMMU."""

    errno = _errno.ENXIO


class Busy(IommuError, RuntimeError):
    """EBUSY: it is in use, or all numbers are."""

    errno = _errno.EBUSY


class NoSpace(IommuError, RuntimeError):
    """ENOSPC: no PASID, quota or IOVA is left."""

    errno = _errno.ENOSPC


class TryAgain(IommuError, RuntimeError):
    """EAGAIN: not while IDs are outstanding."""

    errno = _errno.EAGAIN


class NotSupported(IommuError, RuntimeError):
    """EOPNOTSUPP: this hardware, domain or profile does not do it."""

    errno = _errno.EOPNOTSUPP


class InputOutput(IommuError, RuntimeError):
    """EIO: the SMMU did not do what it was told."""

    errno = _errno.EIO


@_dataclass(frozen=True)
class Refused:
    """A command that an SMMU refused.

    Attributes
    ----------
    index : int or None
        Its place among the commands since the last CMD_SYNC, from 0; None if it was put before.
    command : int
        The command, 128 bits.
    error : int
        CMDQ_CONS.ERR: 1 illegal, 2 an aborted fetch, 3 an ATC that did not answer in time, which
        the CMD_SYNC behind it tells.
    why : Why or None
        The rule that it does not meet, as the model of the SMMU says it.
    """

    index: int | None
    command: int
    error: int
    why: Why | None

    @property
    def reason(self) -> str:
        """The error in words."""
        text = {1: "illegal command", 2: "abort of a command fetch", 3: "ATC timeout"}
        reason = text.get(self.error, "unknown error")
        return f"{reason}: {self.why.sentence()}" if self.why else reason

    def __str__(self) -> str:
        """Which one, and why."""
        which = "" if self.index is None else f" {self.index},"
        opcode = self.command & 0xFF
        return f"command{which} {opcode:#x} ({self.command:#034x}) was refused: {self.reason}"


class CommandError(InputOutput):
    """EIO: an SMMU refused commands, and did the others.

    Attributes
    ----------
    refused : tuple of Refused
        In the order of the queue, one at least.
    """

    refused: tuple[Refused, ...] = ()

    @classmethod
    def of(cls, refused: Sequence[Refused]) -> CommandError:
        """Make the error of some commands; `value` is the first of them."""
        error = cls("command", refused[0].command, text="; ".join(map(str, refused)))
        error.refused = tuple(refused)
        return error

    @property
    def index(self) -> int | None:
        """Which command was the first to be refused, counted from the last CMD_SYNC."""
        return self.refused[0].index if self.refused else None

    @property
    def reason(self) -> str:
        """Why that one was."""
        return self.refused[0].reason if self.refused else ""

    def __reduce__(self) -> tuple[object, ...]:
        return *super().__reduce__(), self.__dict__


class OutOfMemory(IommuError, MemoryError):
    """ENOMEM: no page is left for a table."""

    errno = _errno.ENOMEM


class NotPermitted(IommuError, PermissionError):
    """EPERM: not in this mode of the device."""

    errno = _errno.EPERM


class AccessDenied(IommuError, PermissionError):
    """EACCES: it belongs to another set."""

    errno = _errno.EACCES


def integer(name: str, value: object) -> int:
    """Return an argument that must be an integer, or raise a WrongType that names it."""
    try:
        return _operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        text = _must_be(name, "an integer", type(value))
        raise WrongType(name, value, text=text) from None


def instance(name: str, value: object, *kinds: type) -> None:
    """Raise a WrongType that names an argument unless it is of one of some types."""
    if not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise WrongType(name, value, text=_must_be(name, f"of type {wanted}", type(value)))
