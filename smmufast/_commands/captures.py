"""A capture that a command is given: loaded, one of its configurations chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smmufast._commands.output import Progress
from smmufast._commands.words import UsageError

if TYPE_CHECKING:
    from smmufast.capture import Capture, Configuration


def load(path: str) -> Capture:
    """Load a capture, with progress on a terminal."""
    from smmufast.capture import Capture

    with Progress("reading") as progress:
        return Capture.load(path, progress)


def masked_text(masked: dict[str, int]) -> str:
    """Say which features of the recorded SMMU are left out."""
    names = ", ".join(f"{name.upper()}={value}" for name, value in masked.items())
    return f"The recorded SMMU has {names}, which this version does not model: left out."


def chosen(capture: Capture, id: str | None) -> Configuration:
    """Return the configuration that `--config` names, or the only one."""
    if id is not None:
        try:
            return capture.configuration(id)
        except KeyError:
            raise UsageError(f"--config: {capture.name} has no configuration {id!r}") from None
    if len(capture) > 1:
        raise UsageError(
            f"--config is needed: {capture.name} has {len(capture)} configurations, "
            f"{capture[0].id} to {capture[-1].id}"
        )
    return capture[0]
