"""`smmufast trace`: translate a file of requests and count what becomes of them."""

from __future__ import annotations

import argparse
import os

from smmufast._arguments import must_be
from smmufast._commands.captures import chosen, load, masked_text
from smmufast._commands.output import Progress, plural, print_json, print_table, rate_text
from smmufast._commands.words import AGREES, Add, UsageError, check_bits, number, positive


def add(command: Add) -> None:
    """Add `trace`."""
    made = command("trace", "Translate a file of requests and count what becomes of them.")
    made.add_argument(
        "requests",
        metavar="REQUESTS",
        nargs="?",
        help="an .npy file: rows with iova, sid and, as needed, ssid, write, priv and instr; or "
        "addresses alone (default: the requests of the capture)",
    )
    made.add_argument(
        "--out", metavar="FILE", help="write the results as an .npy file, once they are complete"
    )
    made.add_argument(
        "--columns",
        metavar="NAMES",
        help="of the results, with commas between (default pa,action,event)",
    )
    made.add_argument("--sid", type=number, metavar="S", help="StreamID, if the file has none")
    made.add_argument("--ssid", type=number, metavar="P", help="SubstreamID, likewise")
    made.add_argument("--write", action="store_true", help="writes, if the file does not say")
    made.add_argument(
        "--threads", type=positive, default=1, metavar="N", help="share the work among N threads"
    )
    made.add_argument(
        "--caches", choices=("small", "server"), help="model these caches, and show their counters"
    )
    made.add_argument("--config", metavar="ID", help="configuration, if the capture has several")
    made.set_defaults(run=_trace)


def _check_out(out: str | None, capture: str) -> None:
    """Raise for a file of results that would replace a part of the capture."""
    if out is None:
        return
    place = os.path.realpath(out)
    if os.path.dirname(place) == os.path.realpath(capture) and os.path.exists(place):
        raise UsageError(f"--out: {out} is a part of the capture")


def _trace(arguments: argparse.Namespace) -> int:
    """Run `trace`."""
    from smmufast._device.smmu import COLUMNS
    from smmufast._engine.tlb import Caches
    from smmufast.trace import TraceError, translate_trace

    check_bits(sid=(arguments.sid, 32), ssid=(arguments.ssid, 20), threads=(arguments.threads, 16))
    columns = None
    if arguments.columns is not None:
        if arguments.out is None:
            raise UsageError("--columns: of the results, which need --out")
        columns = arguments.columns.split(",")
        if not set(columns) <= set(COLUMNS) or len(set(columns)) != len(columns):
            known = f"names of {', '.join(COLUMNS)}, each once"
            raise UsageError(must_be("--columns", known, arguments.columns))
    _check_out(arguments.out, arguments.capture)
    configuration = chosen(load(arguments.capture), arguments.config)
    requests = arguments.requests
    if requests is None:
        if arguments.sid is not None or arguments.ssid is not None or arguments.write:
            raise UsageError("--sid, --ssid, --write: for a file of REQUESTS, which is missing")
        if not len(configuration.requests):
            raise UsageError(f"{arguments.capture}: no requests are recorded, name REQUESTS")
        requests = configuration.requests
    caches: Caches | None = None
    if arguments.caches is not None:
        caches = Caches.small() if arguments.caches == "small" else Caches.server()
    try:
        with Progress("translating") as progress:
            found = translate_trace(
                configuration.smmu(caches=caches),
                requests,
                arguments.out,
                sid=arguments.sid,
                ssid=arguments.ssid,
                write=arguments.write,
                columns=columns,
                threads=arguments.threads,
                progress=progress,
            )
    except TraceError as error:
        raise UsageError(error) from None
    if arguments.json:
        files = {"trace": arguments.requests, "out": arguments.out}
        print_json(
            {"configuration": configuration.id, "masked": configuration.masked}
            | files
            | found.as_dict()
            | {"caches": None if caches is None else caches.counters}
        )
        return AGREES
    if configuration.masked:
        print(masked_text(configuration.masked) + "\n")
    print_table(
        ("outcome", "requests"),
        [*((name, str(n)) for name, n in found.actions.items()),
         *((f"  {name}", str(n)) for name, n in found.events.items())],
    )  # fmt: skip
    if caches is not None:
        counters = caches.counters
        print()
        print_table(
            ("cache", *next(iter(counters.values()))),
            ((name, *map(str, counts.values())) for name, counts in counters.items()),
        )
    print(f"\n{plural(found.requests, 'request')}: {rate_text(found.rate) or '-'} million/s")
    return AGREES
