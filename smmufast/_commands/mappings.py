"""`smmufast mappings`: what a stream reaches, as ranges of addresses."""

from __future__ import annotations

import argparse

from smmufast._commands.captures import chosen, load, masked_text
from smmufast._commands.output import Progress, plural, print_json
from smmufast._commands.words import AGREES, Add, UsageError, add_limit, check_bits, number


def add(command: Add) -> None:
    """Add `mappings`."""
    made = command("mappings", "List what a stream reaches, as ranges of addresses.")
    made.add_argument("--sid", type=number, required=True, metavar="S", help="StreamID")
    made.add_argument("--ssid", type=number, metavar="P", help="SubstreamID (PASID)")
    made.add_argument("--config", metavar="ID", help="configuration, if the capture has several")
    add_limit(made)
    made.set_defaults(run=_mappings)


def _mappings(arguments: argparse.Namespace) -> int:
    """Run `mappings`."""
    from smmufast.mappings import mappings

    check_bits(sid=(arguments.sid, 32), ssid=(arguments.ssid, 20))
    configuration = chosen(load(arguments.capture), arguments.config)
    try:
        with Progress("looking"):
            found = mappings(configuration.smmu(), arguments.sid, arguments.ssid)
    except ValueError as error:
        raise UsageError(error) from None
    rows = found.rows[: arguments.limit]
    if arguments.json:
        print_json(
            {
                "configuration": configuration.id,
                "masked": configuration.masked,
                "sid": arguments.sid,
                "ssid": arguments.ssid,
                "mappings": [row._asdict() | {"perm": int(row.perm)} for row in rows],
                "more": len(rows) < len(found),
                "stopped": found.stopped,
            }
        )
        return AGREES
    if configuration.masked:
        print(masked_text(configuration.masked) + "\n")
    for row in rows:
        print(row)
    if len(rows) < len(found):
        print("There are more: see --limit.")
    if found.stopped is not None:
        print(f"The search ended at {found.stopped:#x}: the tables are too large.")
    print(plural(len(found), "range"))
    return AGREES
