"""The command `smmufast`: replay captures, walk them, list their streams and queues; decode words.

`trace` translates a file of requests through the tables of a capture.

Exit statuses: 0 done, and every outcome agrees; 1 some outcome differs; 2 bad input or usage, or
output that cannot be written; 3 nothing differs, but requests were left out as unsupported;
130 interrupted; 141 the reader of the output went away.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from smmufast._arguments import must_be
from smmufast._files import as_number

if TYPE_CHECKING:
    from smmufast.capture import Capture, Configuration
    from smmufast.decode import Decoded
    from smmufast.features import Features
    from smmufast.replay import Difference, Replay, Tally

__all__ = ["main"]

# Modules that need numpy or are compiled are imported where they are used: --help needs none.

MOST_NAMES = 24  # of a summary in words
MAX_INPUT = 1 << 28  # bytes of standard input

AGREES, DIFFERS, BAD_INPUT, UNSUPPORTED, INTERRUPTED, NO_READER = 0, 1, 2, 3, 130, 141

_STATUSES = """\
exit status:
  0  done, and every outcome agrees
  1  some outcome differs
  2  bad input or usage, or output that cannot be written
  3  nothing differs, but requests were left out as unsupported
"""


class UsageError(Exception):
    """Arguments that do not go with the capture."""


def _number(text: str) -> int:
    number = as_number(text)
    if number is None:
        if text[:1] == "-" and as_number(text[1:]) is not None:
            raise argparse.ArgumentTypeError(f"{_short(text)} is negative")
        raise argparse.ArgumentTypeError(
            f"{_short(text)!r} is not a number (0x... is hexadecimal, else decimal)"
        )
    return number


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."


def _positive(text: str) -> int:
    if number := _count(text):
        return number
    raise argparse.ArgumentTypeError(must_be("it", "1 or more", 0))


def _count(text: str) -> int:
    """Return how often something is to be done."""
    if _number(text) >> 63:
        raise argparse.ArgumentTypeError(must_be("it", "0 to 2^63 - 1", _number(text)))
    return _number(text)


def _level(text: str) -> int:
    return -1 if text == "-1" else _number(text)


class _Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit."""
        _note(f"error: {message} ({self.prog} --help says more)")
        sys.exit(BAD_INPUT)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help; argparse would not tell that it could not."""
        if message:
            print(message, end="", file=file)


class _Version(argparse.Action):
    """Print the version, which is looked up only then."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from smmufast import __version__

        print(f"smmufast {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="smmufast",
        description="An Arm SMMUv3 model: replay captures, walk them, list their streams and "
        "queues, decode records and logs.",
        epilog=_STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, text: str, capture: str = "directory of the capture"
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=text[0].lower() + text[1:].rstrip("."),
            description=text,
            epilog=_STATUSES if name == "replay" else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if capture:
            made.add_argument("capture", metavar="CAPTURE", help=capture)
        made.add_argument("--json", action="store_true", help="print one JSON document")
        return made

    made = command(
        "replay",
        "Translate every recorded request and compare each outcome.",
        "directory of the capture, or a queues.jsonl.gz with batches of commands",
    )
    made.add_argument(
        "--repeat",
        type=_positive,
        default=1,
        metavar="N",
        help="translate each stream's requests N times in batches",
    )
    made.add_argument(
        "--random",
        type=_count,
        default=0,
        metavar="N",
        help="translate N more addresses at random places of the pages hit",
    )
    made.add_argument("--seed", type=_number, default=1, metavar="N", help="of --random")
    made.add_argument(
        "--differences",
        type=_count,
        default=3,
        metavar="N",
        help="explain the first N differences (default 3)",
    )
    made.add_argument(
        "--allow-unsupported",
        action="store_true",
        help="do not fail on requests that this version cannot do",
    )

    made = command("walk", "Translate one access and explain every step.")
    made.add_argument("--sid", type=_number, required=True, metavar="S", help="StreamID")
    made.add_argument("--ssid", type=_number, metavar="P", help="SubstreamID (PASID)")
    made.add_argument("--iova", type=_number, required=True, metavar="A", help="input address")
    made.add_argument("--write", action="store_true", help="a write instead of a read")
    made.add_argument("--priv", action="store_true", help="a privileged access")
    made.add_argument("--instr", action="store_true", help="an instruction read")
    made.add_argument("--config", metavar="ID", help="configuration, if the capture has several")

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
    made.add_argument("--sid", type=_number, metavar="S", help="StreamID, if the file has none")
    made.add_argument("--ssid", type=_number, metavar="P", help="SubstreamID, likewise")
    made.add_argument("--write", action="store_true", help="writes, if the file does not say")
    made.add_argument(
        "--threads", type=_positive, default=1, metavar="N", help="share the work among N threads"
    )
    made.add_argument(
        "--caches", choices=("small", "server"), help="model these caches, and show their counters"
    )
    made.add_argument("--config", metavar="ID", help="configuration, if the capture has several")

    made = command("streams", "List the streams with their STEs and CDs, equal ones as one.")
    made.add_argument("--config", metavar="ID", help="one configuration only")
    _add_limit(made)

    _add_limit(command("events", "List the event records of a capture, oldest first."))
    _add_limit(
        command(
            "commands",
            "List the command queue of a capture, oldest first.",
            "directory of the capture, or a queues.jsonl.gz with batches of commands",
        )
    )

    made = command("decode", "Decode records, kernel messages or a QEMU trace into words.", "")
    made.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help="numbers, first word first: 0x... or decimal, or those of a dump, in which each has "
        "2, 8, 16 or more digits; or a log line (default: standard input)",
    )
    made.add_argument(
        "--kind",
        metavar="K",
        help="event, command, pri, ste, cd, l1std, l1cd or pte (default: by the size)",
    )
    made.add_argument(
        "--unit",
        type=_number,
        metavar="BITS",
        help="64, 32 or 8 (bytes in memory order) a number (default: by its digits)",
    )
    made.add_argument(
        "--stage", type=_number, default=1, metavar="N", help="of a pte: 1 (default) or 2"
    )
    made.add_argument(
        "--granule", default="4K", metavar="G", help="of a pte: 4K (default), 16K or 64K"
    )
    made.add_argument("--level", type=_level, metavar="L", help="of a pte: -1 to 3")
    made.add_argument(
        "--raw", action="store_true", help="standard input is records in memory order"
    )
    made.add_argument("--brief", action="store_true", help="one line each")
    _add_limit(made, "findings")
    return parser


def _add_limit(parser: argparse.ArgumentParser, what: str = "lines") -> None:
    parser.add_argument(
        "--limit",
        type=_positive,
        default=100_000,
        metavar="N",
        help=f"stop after N {what} (default 100000)",
    )


# --- output ---------------------------------------------------------------------------------------


def _print_json(value: Any) -> None:
    import json

    json.dump(value, sys.stdout, indent=1)
    print()


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table, its first column to the left; by rich on a terminal."""
    rows = list(rows)
    if sys.stdout.isatty():
        try:
            from rich.console import Console  # type: ignore[import-not-found,unused-ignore]
            from rich.table import Table  # type: ignore[import-not-found,unused-ignore]
            from rich.text import Text  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            pass
        else:
            table = Table(box=None, pad_edge=False, header_style="bold")
            for i, name in enumerate(head):
                table.add_column(name, justify="right" if i else "left", overflow="fold")
            for row in rows:
                table.add_row(*map(Text, row))
            Console().print(table)
            return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


class _Progress:
    """A line on the terminal that appears when work takes long, and goes when it is done.

    It is called with the work done, and with all work where that is known.
    """

    WIDTH = 40

    def __init__(self, what: str) -> None:
        self.what = what
        self.stream = sys.stderr if sys.stderr is not None and sys.stderr.isatty() else None
        self.due = time.monotonic() + 0.5
        self.shown = 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self.write("")

    def __call__(self, done: int, work: int = 0) -> None:
        if self.stream is None or (now := time.monotonic()) < self.due:
            return
        self.due = now + 0.1
        if work:
            filled = min(self.WIDTH * done // work, self.WIDTH)
            bar = "#" * filled + "." * (self.WIDTH - filled)
            self.write(f"{self.what} [{bar}] {100 * done // work:3d} %")
        else:
            self.write(f"{self.what}: {done}")

    def write(self, text: str) -> None:
        if self.stream is not None:
            self.stream.write(f"\r{text.ljust(self.shown)}" + "\r" * (not text))
            self.stream.flush()
        self.shown = len(text)


def _load(path: str) -> Capture:
    from smmufast.capture import Capture

    with _Progress("reading") as progress:
        return Capture.load(path, progress)


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _masked_text(masked: dict[str, int]) -> str:
    names = ", ".join(f"{name.upper()}={value}" for name, value in masked.items())
    return f"The recorded SMMU has {names}, which this version does not model: left out."


# --- replay ---------------------------------------------------------------------------------------


def _replay(arguments: argparse.Namespace) -> int:
    from smmufast.replay import replay

    if os.path.isfile(arguments.capture):
        return _replay_queues(arguments)
    capture = _load(arguments.capture)
    if not any(len(configuration.requests) for configuration in capture):
        raise UsageError(f"{arguments.capture}: no requests are recorded, nothing to replay")
    with _Progress("replaying") as progress:
        found = replay(
            capture,
            repeat=arguments.repeat,
            random=arguments.random,
            seed=arguments.seed,
            keep=arguments.differences,
            progress=progress,
        )
    if found.total.differing or found.random_differing:
        status = DIFFERS
    else:
        left_out = found.total.unsupported and not arguments.allow_unsupported
        status = UNSUPPORTED if left_out else AGREES
    if arguments.json:
        _print_json(found.as_dict() | {"status": status})
    else:
        _print_replay(found)
        if arguments.random and not found.random:
            print("No request hits a page: no random translations were made.")
    return status


def _replay_queues(arguments: argparse.Namespace) -> int:
    from smmufast.replay import replay_queues

    with _Progress("replaying") as progress:
        found = replay_queues(arguments.capture, progress)
    if not found.total.requests:
        raise UsageError(f"{arguments.capture}: no batches are recorded, nothing to replay")
    status = DIFFERS if found.total.differing else AGREES
    if arguments.json:
        _print_json(found.as_dict() | {"status": status})
        return status
    if found.causes:
        _print_causes(found.causes)
        print()
    for difference in found.differences[: arguments.differences]:
        print(f"Difference: {difference}")
    total = found.total
    print(
        f"{os.path.basename(arguments.capture)}: {total.requests} batches and runs: "
        f"{total.agreeing} agree, {total.differing} differ"
    )
    return status


def _page_sizes(tally: Tally) -> str:
    units = ("", "K", "M", "G", "T", "P")
    return ", ".join(
        f"{1 << lg2 % 10}{units[lg2 // 10]}: {count}"
        for lg2, count in sorted(tally.page_lg2.items())
    )


_COUNTS = ("requests", "agreeing", "differing", "unsupported")


def _print_causes(causes: dict[str, Tally]) -> None:
    """Print the verdicts on what the recorded implementation does otherwise."""
    rows = ((cause, *_counts(tally)) for cause, tally in sorted(causes.items()))
    _table(("cause", *_COUNTS), rows)


def _counts(tally: Tally) -> tuple[str, str, str, str]:
    return (str(tally.requests), str(tally.agreeing), str(tally.differing), str(tally.unsupported))


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate / 1e6:.1f}"


def _stream_rate(tally: Tally) -> str:
    """Millions a second, where there were enough to tell."""
    return _rate(tally.rate) if tally.translations >= 1000 else "-"


def _print_replay(found: Replay) -> None:
    capture, total = found.capture, found.total
    print(
        f"{capture.name}: {_plural(len(capture), 'configuration')}, "
        f"{_plural(total.requests, 'request')}"
    )
    if capture.masked:
        print(_masked_text(capture.masked))
    print()
    _table(
        ("stream", *_COUNTS, "page sizes", "million/s"),
        (
            (f"{sid:#x}", *_counts(tally), _page_sizes(tally), _stream_rate(tally))
            for sid, tally in sorted(found.streams.items())
        ),
    )
    if found.causes:
        print()
        _print_causes(found.causes)
    for difference in found.differences:
        _print_difference(difference)
    print()
    if found.random:
        rate = _rate(found.random / found.random_seconds) if found.random_seconds else "?"
        print(
            f"{_plural(found.random, 'random translation')}: {found.random_differing} differ; "
            f"{rate} million/s"
        )
    needs = "".join(f"; {count} need {need}" for need, count in sorted(found.unsupported.items()))
    print(
        f"{_plural(total.requests, 'request')}: {total.agreeing} agree, {total.differing} differ, "
        f"{total.unsupported} unsupported{needs}"
    )


def _print_difference(difference: Difference) -> None:
    shown = difference.as_dict()
    cause = f" (cause {shown['cause']})" if shown["cause"] else ""
    print(f"\nDifference: configuration {shown['configuration']}, {shown['where']}{cause}")
    for reason in shown["reasons"]:
        print(f"  {reason}")
    for line in shown["explain"].splitlines():
        print(f"  | {line}".rstrip())


# --- walk -----------------------------------------------------------------------------------------


def _chosen(capture: Capture, id: str | None) -> Configuration:
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


def _check_bits(**values: tuple[int | None, int]) -> None:
    """Raise for an option whose number is too large."""
    for name, (value, bits) in values.items():
        if value is not None and value >> bits:
            shown = f"{value:#x}" if value.bit_length() <= 128 else "a number of many digits"
            raise UsageError(f"--{name}: {shown} does not fit {bits} bits")


def _walk(arguments: argparse.Namespace) -> int:
    from smmufast.explain import explain

    _check_bits(sid=(arguments.sid, 32), ssid=(arguments.ssid, 20), iova=(arguments.iova, 64))
    configuration = _chosen(_load(arguments.capture), arguments.config)
    smmu = configuration.smmu()
    result = smmu.translate(
        arguments.sid,
        arguments.iova,
        ssid=arguments.ssid,
        write=arguments.write,
        priv=arguments.priv,
        instr=arguments.instr,
        trace=True,
    )
    if not arguments.json:
        if configuration.masked:
            print(_masked_text(configuration.masked) + "\n")
        print(explain(result, smmu))
        return AGREES
    fault = result.fault
    _print_json(
        {
            "configuration": configuration.id,
            "masked": configuration.masked,
            "request": {
                "sid": arguments.sid,
                "ssid": arguments.ssid,
                "iova": arguments.iova,
                "write": arguments.write,
                "priv": arguments.priv,
                "instr": arguments.instr,
            },
            "fetches": [
                {
                    "kind": f.kind,
                    "level": f.level,
                    "address": f.address,
                    "size": f.size,
                    "data": None if f.data is None else f.data.hex(),
                    "swap": f.swap,
                }
                for f in result.fetches or ()
            ],
            "action": result.action,
            "pa": result.pa,
            "ipa": result.ipa,
            "stage": result.stage,
            "vmid": result.vmid,
            "asid": result.asid,
            "stag": result.stag,
            "level": result.level,
            "page_size": result.page_size,
            "perm": int(result.perm),
            "perm_s1": int(result.perm_s1),
            "memory_type": result.memory_type,
            "fault": None
            if fault is None
            else {
                "name": fault.name,
                "recorded": result.event is not None,
                "record": fault.record.hex(),
                "fields": fault.fields,
            },
            "explain": explain(result, smmu),
        }
    )
    return AGREES


# --- trace ----------------------------------------------------------------------------------------


def _check_out(out: str | None, capture: str) -> None:
    """Raise for a file of results that would replace a part of the capture."""
    if out is None:
        return
    place = os.path.realpath(out)
    if os.path.dirname(place) == os.path.realpath(capture) and os.path.exists(place):
        raise UsageError(f"--out: {out} is a part of the capture")


def _trace(arguments: argparse.Namespace) -> int:
    from smmufast._device.smmu import COLUMNS
    from smmufast._engine.tlb import Caches
    from smmufast.trace import TraceError, translate_trace

    _check_bits(sid=(arguments.sid, 32), ssid=(arguments.ssid, 20), threads=(arguments.threads, 16))
    columns = None
    if arguments.columns is not None:
        if arguments.out is None:
            raise UsageError("--columns: of the results, which need --out")
        columns = arguments.columns.split(",")
        if not set(columns) <= set(COLUMNS) or len(set(columns)) != len(columns):
            known = f"names of {', '.join(COLUMNS)}, each once"
            raise UsageError(must_be("--columns", known, arguments.columns))
    _check_out(arguments.out, arguments.capture)
    configuration = _chosen(_load(arguments.capture), arguments.config)
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
        with _Progress("translating") as progress:
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
        _print_json(
            {"configuration": configuration.id, "masked": configuration.masked}
            | files
            | found.as_dict()
            | {"caches": None if caches is None else caches.counters}
        )
        return AGREES
    if configuration.masked:
        print(_masked_text(configuration.masked) + "\n")
    _table(
        ("outcome", "requests"),
        [*((name, str(n)) for name, n in found.actions.items()),
         *((f"  {name}", str(n)) for name, n in found.events.items())],
    )  # fmt: skip
    if caches is not None:
        counters = caches.counters
        print()
        _table(
            ("cache", *next(iter(counters.values()))),
            ((name, *map(str, counts.values())) for name, counts in counters.items()),
        )
    print(f"\n{_plural(found.requests, 'request')}: {_rate(found.rate) or '-'} million/s")
    return AGREES


# --- streams --------------------------------------------------------------------------------------


def _span(first: int, last: int) -> str:
    return f"{first:#x}" if first == last else f"{first:#x}-{last:#x}"


def _streams_of(
    configuration: Configuration, left: int, progress: _Progress
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
    capture = _load(arguments.capture)
    chosen = capture if arguments.config is None else [_chosen(capture, arguments.config)]
    left = arguments.limit
    documents = []
    for i, configuration in enumerate(chosen):
        with _Progress("streams") as progress:
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
        _print_json({"capture": capture.path, "configurations": documents})
    return AGREES


# --- events and commands --------------------------------------------------------------------------


def _counts_text(counts: dict[str, int], what: str) -> str:
    """Return how many there are of each name, the most frequent first."""
    total = _plural(sum(counts.values()), what)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    names = [f"{count} {name}" for name, count in ordered[:MOST_NAMES]]
    if rest := sum(count for _, count in ordered[MOST_NAMES:]):
        names.append(f"{rest} others")
    return f"{total}: {', '.join(names)}" if names else total


def _counted(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def _queue_head(name: str, what: str, queue: Any) -> str:
    return (
        f"{name}: {what} queue of {1 << queue.log2size} slots at "
        f"{queue.base & 0xFF_FFFF_FFFF_FFE0:#x}, PROD={queue.prod:#x}, CONS={queue.cons:#x}"
    )


def _queue_json(queue: Any) -> dict[str, int]:
    return {
        "log2size": queue.log2size,
        "base": queue.base,
        "prod": queue.prod,
        "cons": queue.cons,
        "first_slot": queue.first,
    }


def _check_directory(path: str) -> None:
    """Raise as loading does for a path that is no capture at all."""
    from smmufast.capture import Capture

    if not os.path.exists(os.path.join(path, "meta.json")):
        Capture.load(path)


def _events(arguments: argparse.Namespace) -> int:
    from smmufast.capture import held_queues, load_events, load_queue
    from smmufast.faults import Event

    path = arguments.capture
    if os.path.isfile(path):
        raise UsageError(f"{path}: a file; event records are in the directory of a capture")
    head = queue = None
    records: list[tuple[str, bytes]] = []
    if "events" in held_queues(path):
        queue = load_queue(path, "events")
        slots = 1 << queue.log2size
        records = [
            (f"{(queue.first + i) % slots:#x}", record) for i, record in enumerate(queue.records)
        ]
        head = _queue_head(os.path.basename(os.path.abspath(path)), "event", queue)
    if not records:  # those that the requests ended in are listed beside them
        if not os.path.exists(os.path.join(path, "cases.jsonl.gz")):
            _check_directory(path)
        records = load_events(path)
    found = []
    with _Progress("decoding") as progress:
        for i, (where, record) in enumerate(records):
            if not i % 1024:
                progress(i, len(records))
            found.append((where, Event(record)))
    counts = _counted(event.name for _, event in found)
    more = len(found) > arguments.limit
    shown = found[: arguments.limit]
    if arguments.json:
        _print_json(
            {
                "capture": path,
                "queue": None if queue is None else _queue_json(queue),
                "events": [
                    {
                        "where": where,
                        "name": event.name,
                        "record": event.record.hex(),
                        "fields": event.fields,
                    }
                    for where, event in shown
                ],
                "counts": counts,
                "more": more,
            }
        )
        return AGREES
    if head is not None:
        print(head)
    for where, event in shown:
        print(f"{where:<8} {repr(event)[len('<Event ') : -1]}")
    if more:
        print("There are more: see --limit.")
    print(_counts_text(counts, "event"))
    return AGREES


def _commands(arguments: argparse.Namespace) -> int:
    from smmufast.capture import load_batches, load_queue

    path = arguments.capture
    if os.path.isfile(path):
        return _command_batches(arguments, *load_batches(path))
    if os.path.exists(os.path.join(path, "cases.jsonl.gz")):
        raise UsageError(f"{path}: this kind of capture has no command queue")
    _check_directory(path)
    queue = load_queue(path, "commands")
    commands, counts = _decoded_commands(queue.records, queue.features, arguments.limit)
    slots = 1 << queue.log2size
    more = len(queue.records) > arguments.limit
    if arguments.json:
        _print_json(
            {
                "capture": path,
                "queue": _queue_json(queue),
                "commands": [
                    {"slot": (queue.first + i) % slots} | _command_json(command)
                    for i, command in enumerate(commands)
                ],
                "counts": counts,
                "more": more,
            }
        )
        return AGREES
    print(_queue_head(os.path.basename(os.path.abspath(path)), "command", queue))
    for i, command in enumerate(commands):
        print(f"{(queue.first + i) % slots:<#8x} {_command_line(command)}")
    if more:
        print("There are more: see --limit.")
    print(_counts_text(counts, "command"))
    return AGREES


def _decoded_commands(
    records: Sequence[bytes], features: Features, limit: int
) -> tuple[list[Decoded], dict[str, int]]:
    """Return the first commands decoded, and how many there are of each among all."""
    from smmufast.decode import decode

    known: dict[bytes, Decoded] = {}
    names = []
    with _Progress("decoding") as progress:
        for i, record in enumerate(records):
            if not i % 256:
                progress(i, len(records))
            if record not in known:
                (known[record],) = decode(record, "command", features=features)
            names.append(known[record].name)
    return [known[record] for record in records[:limit]], _counted(names)


def _command_line(command: Decoded) -> str:
    return "; ".join((f"{command.name}: {command.text}", *command.meaning))


def _command_json(command: Decoded) -> dict[str, Any]:
    shown = command.as_dict()
    return {name: shown[name] for name in ("name", "record", "fields", "text", "meaning")}


def _command_batches(
    arguments: argparse.Namespace, features: Features, batches: Sequence[Any]
) -> int:
    left = arguments.limit
    documents = []
    names: dict[str, int] = {}
    more = False
    for batch in batches:
        commands, counts = _decoded_commands(batch.commands, features, left)
        for name, count in counts.items():
            names[name] = names.get(name, 0) + count
        if left <= 0 and batch.commands:
            more = True
            continue
        left -= len(commands)
        more |= len(commands) < len(batch.commands)
        if arguments.json:
            documents.append(
                {
                    "id": batch.id,
                    "start": batch.start,
                    "prod": batch.prod,
                    "cons": batch.cons,
                    "err": batch.err,
                    "commands": [_command_json(command) for command in commands],
                }
            )
            continue
        print(
            f"batch {batch.id}: from index {batch.start:#x} to {batch.prod:#x}; "
            f"CMDQ_CONS became {batch.cons:#x} (ERR={batch.err})"
        )
        for i, command in enumerate(commands):
            print(f"  {i:<6} {_command_line(command)}")
    if arguments.json:
        _print_json(
            {"capture": arguments.capture, "batches": documents, "counts": names, "more": more}
        )
        return AGREES
    if more:
        print("There are more: see --limit.")
    print(_counts_text(names, "command"))
    return AGREES


# --- decode ---------------------------------------------------------------------------------------


def _decode(arguments: argparse.Namespace) -> int:
    from smmufast.decode import DecodeError, decode

    data: str | bytes
    more = False
    if arguments.words:
        if arguments.raw:
            raise UsageError("--raw: reads standard input, but words are given too")
        data = " ".join(arguments.words)
    else:
        data, more = _standard_input()
        if not arguments.raw:
            data = data.decode("utf-8", "replace")
    try:
        with _Progress("decoding") as progress:
            found = decode(
                data,
                arguments.kind,
                unit=arguments.unit,
                stage=arguments.stage,
                granule=arguments.granule,
                level=arguments.level,
                limit=arguments.limit,
                progress=progress,
            )
    except DecodeError as error:
        raise UsageError(error) from None
    if more:
        _note(f"only the first {MAX_INPUT >> 20} MiB of standard input were read")
    if not found:
        raise UsageError(
            "nothing to decode: neither numbers, nor messages of arm-smmu-v3, nor a trace of QEMU's"
        )
    if arguments.json:
        _print_json([decoded.as_dict() for decoded in found])
        return AGREES
    for i, (decoded, times) in enumerate(_runs(found)):
        again = f" ({times} times)" if times > 1 else ""
        if arguments.brief:
            where = "" if decoded.line is None else f"{decoded.line}: "
            print(f"{where}{decoded.name}: {decoded.text}{again}")
            continue
        if i:
            print()
        print(decoded)
        if again:
            print(f"  {again.strip()}")
    if len(found) > 1:
        found = [decoded for decoded in found if decoded.kind != "limit"]
        print(
            ("" if arguments.brief else "\n")
            + _counts_text(_counted(decoded.name for decoded in found), "finding")
        )
    return AGREES


def _standard_input() -> tuple[bytes, bool]:
    """Return what standard input holds, and whether there is more than is read of it."""
    if sys.stdin is None:
        raise UsageError("standard input is closed, and no words are given")
    if sys.stdin.isatty():
        _note("reading standard input, up to Ctrl-D; --help says what else can be given")
    data = sys.stdin.buffer.read(MAX_INPUT + 1)
    return data[:MAX_INPUT], len(data) > MAX_INPUT


def _runs(found: Iterable[Decoded]) -> Iterable[tuple[Decoded, int]]:
    """Yield each finding with how often it comes in a row; their lines do not count."""
    from dataclasses import replace

    first: Decoded | None = None
    times = 0
    for decoded in found:
        if first is not None and replace(decoded, line=first.line) == first:
            times += 1
            continue
        if first is not None:
            yield first, times
        first, times = decoded, 1
    if first is not None:
        yield first, times


# --- main -----------------------------------------------------------------------------------------


def _say(problem: object) -> None:
    """Print one line that says what is wrong."""
    _note("error: " + " ".join(str(problem).split()))


def _note(text: str) -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"smmufast: {text}", file=sys.stderr, flush=True)


def _discard_output() -> None:
    """Write no more: what is left in the buffer must not fail again when Python exits."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_streams() -> None:
    """Make standard output and error able to show every text, and there at all."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before the command started
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; `argv` are the words after its name."""
    try:
        _open_streams()
        try:
            status = _run(_parser().parse_args(argv))
        except SystemExit as end:  # of argparse: bad usage, or help
            status = BAD_INPUT if end.code else AGREES
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return NO_READER
    except OSError as error:  # of standard output: what is read and written else names its file
        _discard_output()
        _say(f"standard output: {error.strerror or error}")
        return BAD_INPUT


_COMMANDS = {
    "replay": _replay,
    "walk": _walk,
    "trace": _trace,
    "streams": _streams,
    "events": _events,
    "commands": _commands,
    "decode": _decode,
}


def _run(arguments: argparse.Namespace) -> int:
    expected: tuple[type[Exception], ...] = (UsageError,)
    try:
        if arguments.command != "decode":  # which needs no numpy, and nothing that is compiled
            from smmufast.capture import CaptureError

            expected = (UsageError, CaptureError)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("smmufast._"):
            raise
        _say(
            f"{os.path.dirname(__file__)} is not compiled: install it, and run it outside of the "
            "source directory or with python -P"
        )
        return BAD_INPUT
    try:
        return _COMMANDS[arguments.command](arguments)
    except expected as error:
        _say(error)
    except MemoryError:
        _say("not enough memory for this input")
    except OSError as error:
        if error.filename is None or isinstance(error, BrokenPipeError):
            raise
        _say(f"{os.fspath(error.filename)}: {error.strerror or error}")
    return BAD_INPUT
