"""Captures: memory images and registers on disk, with what another implementation made of them.

Not architectural, except for the notes on fair comparison below.  A capture is a directory of one
of two kinds.  Numbers in JSON are integers or strings: ``0x`` and hexadecimal digits, or decimal
ones.  A member that is not described here is refused, so that nothing is left out unseen; those
that only tell how a line came about are ``age``, ``type``, ``fam``, ``tag``, ``feats``, ``nrec``
and ``landed``.

Kind "linux": one configuration
-------------------------------
``meta.json``
    An object.  ``regs``: registers by name; STRTAB_BASE, STRTAB_BASE_CFG, CR0, IDR0, IDR1, IDR3
    and IDR5 are needed, AIDR (default 1), CR2 (default 0) and GBPA (default 0x1000) are read,
    others are kept.  The RAM: ``ram_base`` and ``ram_size`` in bytes, or ``regions``, a list of
    [base, size].  ``counts``, an object: how many ``requests``, ``events``, ``pages`` and
    ``queue_pages`` the other files hold; so do the numbers ``truth`` or ``requests``, ``events``
    and ``pages`` beside it.  A file that holds more or fewer is refused.  Anything else is kept.
``pages.npz``
    ``page_addr`` uint64[N], multiples of 4096; ``pages`` uint8[N, 4096].  RAM that no page covers
    reads as zero; outside RAM a read is an external abort.
``requests.jsonl.gz``
    One successful translation a line: ``sid``, ``iova``, ``pa``, ``perm``, ``stage``, ``level``,
    ``page_shift``; ``bypass`` true for one that was not translated.  ``perm`` is what the page
    permits: 1 read, 2 write, 4 execute.  The line is replayed as a read if bit 0 is set, else as a
    write, and each access that ``perm`` denies must give F_PERMISSION.  ``stage`` is 1, 2, or 3
    where both translate.
``events.jsonl.gz``
    One event a line: ``sid``, ``iova``, ``rnw``, ``hex`` (the record in memory order);
    ``action`` is "abort" if absent, "raz_wi" or "stall".
``queues.npz``
    As ``pages.npz``: pages of the command, event and page request queues.  May be absent.  The
    queues are rings in mid-history (`Queue`), at CMDQ_BASE, EVENTQ_BASE and PRIQ_BASE, and their
    registers are among ``regs``.

Lines of both lists may have ``ssid``, ``instr`` and ``priv``.  Where ``priv`` is given, records
are compared to the last bit, and ``perm`` has three bits.  Where it is absent, the implementation
that was recorded took every access as privileged data although its records say PnU=0: such lines
are replayed so, and PnU and InD are not compared.

Kind "cases": many configurations
---------------------------------
``pages.npz``
    ``pages`` uint8[K, 4096].
``cases.jsonl.gz``
    First ``{"header": {"idr": {...}, "ram": [lo, hi], ...}}``, then a configuration a line:
    ``id``, ``cr0``, ``regs``, ``pages`` ([address, index] pairs) and ``reqs``.  A request has
    ``sid``, ``iova``, ``rnw``, and ``out``: ``k`` is "ok" (pa, perm, stage), "event" (name, rec),
    "fault_silent", "abort", "bypass" or "disable".  ``arch_differs`` {cause, arch, why} replaces
    ``out``; ``rec_differs`` lists fields of the record, "NAME:VALUE", to replace.  ``ssid``,
    ``instr`` and ``priv`` are as in the lists of kind "linux".

Command batches
---------------
A file of lines like the lists above, ``queues.jsonl.gz``.  First ``{"header": ..., "idr": {...}}``,
then lines with ``kind``; those of kind "cmds" have ``id``, ``cmds`` (16 bytes each, hexadecimal, in
memory order), the indices ``start`` and ``prod``, and what was read back: ``cons`` (CMDQ_CONS) and
``err`` (its ERR).

Comparing fairly
----------------
These apply to lines without ``priv``; they undo what the recorded implementation does otherwise
than the architecture (IHI 0070 7.3).  PnU and InD are not compared.  Records of class CD and TT
may hold RnW=1 for a write: RnW is that of the transaction.  F_CD_FETCH holds its address in bits
[191:128]: it is moved to FetchAddr.  IPA[11:0] and TTRnW are not compared, nor is IPA where S2=0,
for it is UNKNOWN there.  Configurations of kind "cases" run with CR2.RECINVSID=1, and ignore
STE.S2PTW, since their implementation has no memory attributes.  ``perm`` of a translation by both
stages is what stage 1 permits.  "disable" is recorded for
addresses beyond OAS too, where the architecture has an abort without an event (6.3.14): such
requests have the cause "bypass_oas (SMMUEN=0)".

Each request is taken alone, whatever the others are: hardware updates of tables are not kept, a
transaction that stalls is terminated, and the STAG of its record is not compared.

Limits
------
A capture has at most MAX_REQUESTS requests, MAX_CONFIGURATIONS configurations and MAX_PAGES pages;
a list unpacks to MAX_TEXT bytes and one line of it to MAX_LINE.  What is larger is refused before
it is unpacked any further, whatever the size of the file.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from smmufast._arguments import in_words, integer, must_be
from smmufast._device.smmu import Smmu
from smmufast._engine.memory import Memory
from smmufast._files import refuse_taken, replacing_directory
from smmufast._tools.capture_files import (
    EVENTQEN,
    MAX_CONFIGURATIONS,
    NEEDED,
    PAGE,
    RECINVSID,
    SMMUEN,
    U32,
    U64,
    CaptureError,
    Line,
    Watch,
    check_counts,
    check_pages,
    check_regions,
    features_of,
    kind_of,
    line_registers,
    npy_header,
    read_arrays,
    read_lines,
    read_meta,
    read_pages,
)
from smmufast._tools.capture_outcomes import (
    ANY,
    REQUEST,
    UNTOLD,
    Expected,
    Requests,
    translate_alone,
)
from smmufast._tools.capture_queues import (
    Batch,
    Filling,
    Queue,
    held_queues,
    load_batches,
    load_events,
    load_fillings,
    load_queue,
    queue_pages,
)
from smmufast._tools.capture_writing import (
    answer,
    contents_of,
    description_of,
    is_unused,
    plain_number,
    registers_of,
    smmu_of,
    write_lines,
    write_pages,
)
from smmufast.features import Features, modelled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from smmufast._engine.tlb import Caches

__all__ = [
    "ANY",
    "REQUEST",
    "UNTOLD",
    "Batch",
    "Capture",
    "CaptureError",
    "Configuration",
    "Expected",
    "Filling",
    "Queue",
    "held_queues",
    "load_batches",
    "load_events",
    "load_fillings",
    "load_queue",
    "npy_header",
    "translate_alone",
]

for _public in (Batch, CaptureError, Expected, Filling, Queue):
    _public.__module__ = __name__  # where users find them, and pickles too


class Configuration:
    """Memory, registers and requests of one state of an SMMU.

    Attributes
    ----------
    id : str
    registers : dict of str to int
        By name, as recorded.
    features : Features
        As recorded.
    masked : dict of str to int
        Features that were recorded and that this version does not model, with the codes recorded;
        `smmu` leaves them out.
    regions : tuple of (int, int)
        Base and size of the RAM, in bytes, ascending.
    ignore_s2ptw : bool
        For `Smmu`: the recorded implementation has no memory attributes.
    page_addresses : uint64[N]
    requests : array of REQUEST
        Read-only.
    expected : list of Expected
        One for each request.
    source : str
        The file that the requests come from.
    """

    def __init__(
        self,
        id: str,
        registers: dict[str, int],
        features: Features,
        regions: tuple[tuple[int, int], ...],
        page_addresses: NDArray[np.uint64],
        pages: NDArray[np.uint8],
        rows: NDArray[np.intp] | None,
        requests: Requests,
        source: str,
        sources: Sequence[tuple[int, str]] = (),
        ignore_s2ptw: bool = False,
    ) -> None:
        """Take what `Capture.load` has read and checked."""
        self.id = id
        self.registers = registers
        self.features = features
        self.masked: dict[str, int] = modelled(features)[1]
        self.regions = regions
        self.ignore_s2ptw = ignore_s2ptw
        self.page_addresses = page_addresses
        self.requests = requests.array()
        self.expected = requests.expected
        self.source = source
        self._sources = sources
        self._pages = pages
        self._rows = rows

    def where(self, index: int) -> str:
        """Return the file and line that a request stands in."""
        path = self.source
        for first, other in self._sources:
            if index >= first:
                path = other
        return f"{os.path.basename(path)}:{self.expected[index].line}"

    def _move(self, id: str, directory: str) -> None:
        """Follow the directory that it was read from."""
        self.id = id
        self.source = os.path.join(directory, os.path.basename(self.source))
        self._sources = [
            (first, os.path.join(directory, os.path.basename(other)))
            for first, other in self._sources
        ]

    def page(self, index: int) -> NDArray[np.uint8]:
        """Return the contents of the page at ``page_addresses[index]``: uint8[4096]."""
        page: NDArray[np.uint8] = self._pages[index if self._rows is None else self._rows[index]]
        return page

    def memory(self) -> Memory:
        """Return a new Memory that holds the pages; other RAM reads as zero."""
        memory = Memory()
        for base, size in self.regions:
            memory.add_private(base, size)
        starts = [base for base, _ in self.regions]
        for i, address in enumerate(self.page_addresses.tolist()):
            page = self.page(i)
            if not page.any():
                continue
            k = bisect_left(starts, address + PAGE)
            while k > 0 and sum(self.regions[k - 1]) > address:
                k -= 1
                base, size = self.regions[k]
                first, end = max(base, address), min(base + size, address + PAGE)
                memory.write(first, page[first - address : end - address])
        return memory

    def smmu(self, memory: Memory | None = None, caches: Caches | None = None) -> Smmu:
        """Return a Smmu with the recorded registers, by default over a new `memory()`.

        Its features are those recorded without `masked`, its caches those given.
        """
        return Smmu(
            self.memory() if memory is None else memory,
            modelled(self.features)[0],
            strtab_base=self.registers["STRTAB_BASE"],
            strtab_base_cfg=self.registers["STRTAB_BASE_CFG"],
            cr0=self.registers["CR0"],
            cr2=self.registers["CR2"],
            gbpa=self.registers["GBPA"],
            ignore_s2ptw=self.ignore_s2ptw,
            caches=caches,
        )

    def __repr__(self) -> str:
        """Name it and say how large it is."""
        masked = "".join(f" masked {name}={value}" for name, value in self.masked.items())
        return (
            f"<Configuration {self.id}: {len(self.page_addresses)} pages, "
            f"{len(self.requests)} requests{masked}>"
        )


class Capture:
    """A capture: a sequence of configurations with what is expected of them.

    Attributes
    ----------
    path : str
    kind : str
        "linux" (one configuration) or "cases" (many).
    meta : dict
        ``meta.json``, or the header of the list.
    """

    def __init__(
        self, path: str, kind: str, meta: dict[str, Any], configurations: list[Configuration]
    ) -> None:
        """Take what `load` has read."""
        self.path = path
        self.kind = kind
        self.meta = meta
        self._configurations = configurations

    @property
    def name(self) -> str:
        """Last part of the path."""
        return os.path.basename(os.path.abspath(self.path))

    @property
    def masked(self) -> dict[str, int]:
        """Features recorded that this version does not model, as in `Configuration.masked`."""
        return self._configurations[0].masked

    def __len__(self) -> int:
        """Count the configurations."""
        return len(self._configurations)

    def __getitem__(self, index: int) -> Configuration:
        """Return one configuration."""
        return self._configurations[index]

    def __iter__(self) -> Iterator[Configuration]:
        """Iterate over the configurations."""
        return iter(self._configurations)

    def configuration(self, id: str) -> Configuration:
        """Return the configuration of that id, KeyError if there is none."""
        for configuration in self._configurations:
            if configuration.id == id:
                return configuration
        raise KeyError(id)

    def _repr_html_(self) -> str:
        from smmufast._html import table

        pairs = [("path", self.path), ("kind", self.kind), ("configurations", list(self))]
        return table("Capture", pairs)

    def __repr__(self) -> str:
        """Name it and say how large it is."""
        requests = sum(len(c.requests) for c in self)
        return f"<Capture {self.name}: {len(self)} configurations, {requests} requests>"

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        progress: Callable[[int, int], object] | None = None,
    ) -> Capture:
        """Read a capture of either kind.

        Parameters
        ----------
        path : path
        progress : callable, optional
            Called now and then with the bytes read of its files, and all their bytes.

        Raises
        ------
        CaptureError
            It cannot be read: the message names the file, the line and what is wrong.
        """
        path = os.fspath(path)
        if os.path.exists(os.path.join(path, "cases.jsonl.gz")):
            return cls._load_cases(path, Watch(path, progress))
        if os.path.exists(os.path.join(path, "meta.json")):
            return cls._load_linux(path, Watch(path, progress))
        if not os.path.exists(path):
            raise CaptureError(path or "''", None, "there is no such directory")
        if not os.path.isdir(path):
            raise CaptureError(path, None, in_words("a capture", "a directory", "a file"))
        raise CaptureError(path, None, "no capture: neither meta.json nor cases.jsonl.gz is there")

    @classmethod
    def _load_linux(cls, path: str, watch: Watch) -> Capture:
        """Load a capture of kind "linux"."""
        meta = read_meta(os.path.join(path, "meta.json"))
        registers = line_registers(meta, meta.inner("regs").values, NEEDED)
        features = features_of(meta, registers)
        if "regions" in meta.values:
            pairs = []
            for item in meta.list("regions"):
                if not isinstance(item, list) or len(item) != 2:
                    meta.bad(in_words("regions", "lists of base and size", kind_of(item)))
                base, size = (meta.number_of("regions", value, U64) for value in item)
                pairs.append((base, size))
        else:
            pairs = [(meta.integer("ram_base", U64), meta.integer("ram_size", U64))]
        regions = check_regions(meta, pairs)
        where = os.path.join(path, "pages.npz")
        addresses, pages = read_pages(where, watch)
        check_pages(where, None, addresses, regions)
        where = os.path.join(path, "queues.npz")
        queue_addresses = np.empty(0, np.uint64)
        if os.path.exists(where):
            queue_addresses, _ = read_pages(where, watch)
            check_pages(where, None, queue_addresses, regions)
        requests = Requests()
        source = os.path.join(path, "requests.jsonl.gz")
        for line in read_lines(source, watch):
            requests.add_translation(line, bool(registers["CR0"] & SMMUEN))
        events = os.path.join(path, "events.jsonl.gz")
        translations = len(requests.rows)
        sources = [(translations, events)]
        for line in read_lines(events, watch):
            requests.add_event(line)
        check_counts(
            meta,
            requests=translations,
            events=len(requests.rows) - translations,
            pages=len(addresses),
            queue_pages=len(queue_addresses),
        )
        name = os.path.basename(os.path.abspath(path))
        configuration = Configuration(
            name, registers, features, regions, addresses, pages, None, requests, source, sources
        )
        return cls(path, "linux", meta.values, [configuration])

    @classmethod
    def _load_cases(cls, path: str, watch: Watch) -> Capture:
        """Load a capture of kind "cases"."""
        where = os.path.join(path, "pages.npz")
        (pages,) = read_arrays(where, watch, pages=("u1", PAGE))
        where = os.path.join(path, "cases.jsonl.gz")
        lines = read_lines(where, watch)
        first = next(lines, None)
        if first is None:
            raise CaptureError(where, None, in_words("the first line", "a header", "missing"))
        header = first.inner("header")
        identification = header.inner("idr").values
        registers = line_registers(header, identification, ("IDR0", "IDR1", "IDR3", "IDR5"))
        features = features_of(header, registers)
        low, high = (header.number_of("ram", v, U64) for v in header.list("ram", 2))
        regions = check_regions(header, [(low, high - low)])
        configurations = []
        ids: set[str] = set()
        count = 0
        for line in lines:
            line.only("id", "cr0", "regs", "meta", "pages", "reqs")
            id = line.text("id")
            if id in ids:
                line.bad(f"id: {id!r} is that of an earlier configuration")
            if len(ids) == MAX_CONFIGURATIONS:
                line.bad(f"more than {MAX_CONFIGURATIONS} configurations")
            ids.add(id)
            mine = {"CR0": line.integer("cr0", U32), "CR2": RECINVSID}
            mine = line_registers(line, identification | line.inner("regs").values | mine, NEEDED)
            pairs = line.list("pages")
            addresses = np.empty(len(pairs), np.uint64)
            rows = np.empty(len(pairs), np.intp)
            for i, pair in enumerate(pairs):
                if not isinstance(pair, list) or len(pair) != 2:
                    line.bad(in_words("pages", "lists of address and index", kind_of(pair)))
                addresses[i] = line.number_of("pages", pair[0], U64)
                rows[i] = line.number_of("pages", pair[1], len(pages) - 1)
            check_pages(where, line.number, addresses, regions)
            requests = Requests(count)
            queue = bool(mine["CR0"] & EVENTQEN)
            for request in line.list("reqs"):
                requests.add_case(line, request, queue, features.oas_bits)
            count += len(requests.rows)
            configurations.append(
                Configuration(
                    id,
                    mine,
                    features,
                    regions,
                    addresses,
                    pages,
                    rows,
                    requests,
                    where,
                    ignore_s2ptw=True,
                )
            )
        if not configurations:
            raise CaptureError(where, None, "a header and no configuration")
        return cls(path, "cases", header.values, configurations)

    @classmethod
    def save(
        cls,
        path: str | os.PathLike[str],
        *,
        smmu: Smmu | None = None,
        memory: Memory | None = None,
        registers: Mapping[str, int] | None = None,
        requests: Iterable[Mapping[str, Any]] = (),
        events: Iterable[Mapping[str, Any]] = (),
        pages: Iterable[int] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> Capture:
        """Write a capture of kind "linux" into a new directory, and return it as `load` does.

        Parameters
        ----------
        path : path
            A directory that does not exist or is empty.
        smmu : Smmu, optional
            Whose memory, registers, features and queues are written.
        memory, registers : Memory, mapping, optional
            In place of `smmu`: registers by name, as the format needs them.
        requests, events : iterable of mapping
            Lines of the format.  A request without ``pa`` is translated now, by itself, and what
            comes of it is written: it needs ``sid`` and ``iova`` and may have ``ssid``, ``write``,
            ``priv`` and ``instr``.
        pages : iterable of int, optional
            Addresses of the pages to write.  By default those that the registers lead to: stream
            table, context descriptors and the tables of both stages.  Pages of zeros are left out.
        meta : mapping, optional
            More members of ``meta.json``.

        The directory takes its name when all of it is written and can be read: a save that is
        interrupted, or has no space, leaves nothing of that name.

        Raises
        ------
        FileExistsError
            The directory holds something, or there is a file of that name.
        OSError
            It cannot be written.
        CaptureError
            A line with ``pa``, an event or a register is none of the format.
        ValueError
            The pages cannot be found because the tables are of a kind that is not modelled or are
            larger than 1 GiB; or a request ends without an event, which the format cannot hold.
        """
        from smmufast import streams

        path = os.fspath(path)
        refuse_taken(path)
        if smmu is None:
            if memory is None or registers is None:
                raise TypeError("save() needs smmu, or memory and registers")
            given = line_registers(Line("registers", None, {}), registers, NEEDED)
            smmu, masked = smmu_of(memory, given)
        else:
            if memory is not None or registers is not None:
                raise TypeError("memory and registers must not be given beside smmu")
            memory = smmu.memory
            given = registers_of(smmu)
            masked = {}
        translated, terminated = answer(smmu, requests)
        if pages is None:
            pages = streams.pages(smmu, masked)
        addresses = sorted({integer("pages", page, U64) for page in pages})
        for address in addresses:
            if address % PAGE:
                raise ValueError(must_be("pages", f"multiples of {PAGE}", address))
        tables = contents_of(memory, addresses)
        queues = contents_of(memory, queue_pages(given))
        terminated = [*events, *terminated]
        counts = {
            "requests": len(translated),
            "events": len(terminated),
            "pages": len(tables[0]),
            "queue_pages": len(queues[0]),
        }
        with replacing_directory(path) as partial:
            with open(os.path.join(partial, "meta.json"), "w", encoding="utf-8") as file:
                values = description_of(meta or {}, counts, given, memory)
                json.dump(values, file, indent=1, default=plain_number)
            write_pages(os.path.join(partial, "pages.npz"), *tables)
            if queues[0] or is_unused(given):
                write_pages(os.path.join(partial, "queues.npz"), *queues)
            write_lines(os.path.join(partial, "requests.jsonl.gz"), translated)
            write_lines(os.path.join(partial, "events.jsonl.gz"), terminated)
            try:
                saved = cls.load(partial)
            except CaptureError as error:
                where = os.path.join(path, os.path.basename(error.path))
                raise CaptureError(where, error.line, error.problem) from None
        saved._move(path)
        return saved

    def _move(self, path: str) -> None:
        """Follow the directory, which has another name now."""
        self.path = path
        for configuration in self:
            configuration._move(self.name, path)
