"""`smmufast streams`: the streams of a capture with their STEs and CDs, equal ones as one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from smmufast._commands.captures import chosen, load
from smmufast._commands.output import Progress, print_json
from smmufast._commands.words import AGREES, Add, add_limit

if TYPE_CHECKING:
    from smmufast.capture import Configuration


def add(command: Add) -> None:
    """Add `streams`."""
    made = command("streams", "List the streams with their STEs and CDs, equal ones as one.")
    made.add_argument("--config", metavar="ID", help="one configuration only")
    add_limit(made)
    made.set_defaults(run=_streams)


def _span(first: int, last: int) -> str:
    return f"{first:#x}" if first == last else f"{first:#x}-{last:#x}"


def _streams_of(
    configuration: Configuration, left: int, progress: Progress
) -> tuple[dict[str, Any], int]:
    """Return the streams of a configuration as plain values, and how many lines are left."""
    from smmufast import layout, streams
    from smmufast.explain import describe_cd, describe_ste

    smmu = configuration.smmu()
    present = sorted(configuration.page_addresses.tolist())
    table = streams.stream_table(smmu)
    budget = streams.Budget()
    runs: list[dict[str, Any]] = []
    more = False
    for run in streams.streams(smmu, present, budget):
        progress(len(runs))
        if more := left <= 0:
            break
        left -= 1
        found = []
        for context in streams.contexts(smmu, run, present, budget):
            if more := left <= 0:
                break
            left -= 1
            text = None if context.cd is None else describe_cd(context.cd)
            found.append(
                {
                    "first_ssid": context.first,
                    "last_ssid": context.last,
                    "address": context.address,
                    "cd": text,
                    "problem": context.problem,
                    "data": None if context.cd is None else context.cd.hex(),
                }
            )
        runs.append(
            {
                "first_sid": run.first,
                "last_sid": run.last,
                "address": run.address,
                "ste": None if run.ste is None else describe_ste(run.ste),
                "problem": run.problem,
                "data": None if run.ste is None else run.ste.hex(),
                "contexts": found,
            }
        )
    return {
        "configuration": configuration.id,
        "enabled": bool(smmu.cr0 & layout.mask("CR0", "SMMUEN")),
        "table": None if table is None else table._asdict(),
        "streams": runs,
        "more": more,
    }, left


def _print_streams(found: dict[str, Any]) -> None:
    """Print the streams of a configuration, as `_streams_of` has them."""
    table = found["table"]
    if table is None:
        print(f"{found['configuration']}: the stream table is beyond the physical address size")
        return
    shape = f"two levels, split {table['split']}" if table["two_level"] else "linear"
    print(
        f"{found['configuration']}: stream table at {table['base']:#x}, {shape}, "
        f"2^{table['log2size']} StreamIDs"
        f"{'' if found['enabled'] else '; not used: CR0.SMMUEN=0'}"
    )
    for run in found["streams"]:
        where = "" if run["address"] is None else f"at {run['address']:#x}  "
        span = _span(run["first_sid"], run["last_sid"])
        print(f"{span:<16} STE {where}{run['ste'] or run['problem']}")
        for context in run["contexts"]:
            ssid = ""
            if context["first_ssid"] is not None:
                ssid = f"ssid {_span(context['first_ssid'], context['last_ssid'])} "
            where = "" if context["address"] is None else f"at {context['address']:#x}  "
            print(f"{'':16} {ssid}CD {where}{context['cd'] or context['problem']}")
    if found["more"]:
        print("There are more: see --limit.")


def _streams(arguments: argparse.Namespace) -> int:
    """Run `streams`."""
    capture = load(arguments.capture)
    configurations = capture if arguments.config is None else [chosen(capture, arguments.config)]
    left = arguments.limit
    documents = []
    for i, configuration in enumerate(configurations):
        with Progress("streams") as progress:
            found, left = _streams_of(configuration, left, progress)
        if arguments.json:
            documents.append(found)
        else:
            if i:
                print()
            _print_streams(found)
        if found["more"]:
            break
    if arguments.json:
        print_json({"capture": capture.path, "configurations": documents})
    return AGREES
