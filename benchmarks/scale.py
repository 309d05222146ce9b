"""Prints what an item costs as their number grows, in time and in memory, and draws it.

From the repository's root, with the package installed::

    python benchmarks/scale.py --markdown scale.md --svg docs/performance.svg

Five minutes and 6 GiB of memory; up to 10^8 requests, in a file of 1.6 GB in the directory of
temporary files. `--largest` has 10^9 (16 GB, two minutes more). `--only NAME` measures one thing,
`--most N` leaves out what is larger.

Each size is measured in a process of its own, pinned to one processor. Times are processor time.
What can be repeated is, and the median is shown; what is built (maps, attachments, domains) is
timed once, as a whole. Bytes are growth of the resident set (VmRSS) while the items were made: it
counts what Python, C and the simulated memory hold, and whole pages, so that few items look
larger than they are.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import workload
from timing import idlest_cpu, machine

from smmufast._files import write_text

ROUNDS = 7
BATCH = 1 << 18
IOVA = 1 << 40
PA = 0x1000  # of a page, never of a block: no range of 2 MiB is mapped onto another


def status(name):
    """Return a figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise KeyError(name)


def build(make):
    """Return what make() returns, its processor time, and how the resident set has grown."""
    before, start = status("VmRSS"), time.process_time()
    made = make()
    return made, time.process_time() - start, status("VmRSS") - before


def batch_seconds(smmu, sid, iova, **access):
    """Return the median time of a batch, all of whose requests must go on to memory."""
    out = {"pa": np.zeros(len(iova), np.uint64), "action": np.full(len(iova), 9, np.uint8)}
    taken = []
    for _ in range(ROUNDS):
        start = time.process_time()
        smmu.translate_batch(sid, iova, out=out, **access)
        taken.append(time.process_time() - start)
    if out["action"].any():
        raise AssertionError("a request was not translated")
    return statistics.median(taken), out["pa"]


def random(n, last, dtype):
    """Return n numbers below last."""
    return np.random.default_rng(n).integers(0, last, n, dtype=dtype)


# --- what is measured -----------------------------------------------------------------------------


def requests(n):
    """A trace in a file, at random in 64 K pages whose tables lie in L2."""
    from smmufast.trace import translate_trace

    image = workload.Image(16)
    smmu = workload.smmu(image, workload.STRTAB_LINEAR)
    dtype = np.dtype([("sid", "<u4"), ("ssid", "<u4"), ("iova", "<u8")])
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(file, header | {"shape": (n,)})
        for start in range(0, n, 1 << 20):
            rows = np.zeros(min(n - start, 1 << 20), dtype)
            rows["sid"], rows["ssid"] = workload.SID, 0xFFFF_FFFF
            rows["iova"] = image.random(len(rows), seed=start)
            file.write(rows.view(np.uint8).data)
        file.flush()
        del rows
        translate_trace(smmu, np.zeros(1, dtype))  # what is loaded once
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, start = status("VmRSS"), time.process_time()
        found = translate_trace(smmu, file.name)
        seconds = time.process_time() - start
    if found.actions != {"ok": n}:
        raise AssertionError(found)
    return {
        "a request": seconds,
        "a request, wall clock": found.seconds,
        "peak growth": status("VmHWM") - before,
    }


def streams(n):
    """A linear stream table of n valid STEs, one CD and 1 K pages; a batch mixed over them all."""
    from smmufast import Memory, Smmu

    image = workload.Image(10)
    lg2 = max(1, (n - 1).bit_length())
    memory = Memory()
    memory.add(image.buffer, workload.BASE)
    base = 1 << 40

    def make():
        table = np.zeros((1 << lg2, 8), np.uint64)
        table[:n] = workload.pack_ste(workload.BASE + workload.CDS + 64 * workload.SID)
        memory.add(table.view(np.uint8).reshape(-1), base)
        return Smmu(memory, strtab_base=base, strtab_base_cfg=lg2)

    smmu, _, grown = build(make)
    iova = image.random(BATCH)
    sid = random(BATCH, n, np.uint32)
    seconds, pa = batch_seconds(smmu, sid, iova)
    if (pa != image.expected(iova)).any():
        raise AssertionError("a wrong address")
    return {"translation": seconds * n / BATCH, "memory": grown}


def a_device(**more):
    """Return a system, and a device with a domain that has a page."""
    from smmufast.iommu import System

    system = System()
    device = system.device(8, **more)
    domain = device.paging_domain()
    device.attach(domain)
    domain.map(IOVA, PA, 4096)
    return system, device, domain


def devices(n):
    """Devices of one StreamID each, attached to one domain."""
    from smmufast.iommu import System

    system = System()
    domain = system.device(0).paging_domain()

    def make():
        made = [system.device(sid) for sid in range(1, n + 1)]
        for device in made:
            device.attach(domain)
        return made

    made, taken, grown = build(make)
    domain.map(IOVA, PA, 4096)
    sid = random(BATCH, n, np.uint32) + np.uint32(1)
    seconds, _ = batch_seconds(system.smmu, sid, np.full(BATCH, IOVA, np.uint64))
    start = time.process_time()
    for device in made:
        device.detach(domain)
    return {
        "probe and attach": taken,
        "translation": seconds * n / BATCH,
        "detach": time.process_time() - start,
        "memory": grown,
    }


def pasids(n, **more):
    """PASIDs of one device, attached to one domain; a batch mixed over them all."""
    system, device, domain = a_device(pasid_bits=20, **more)
    last = min(n, (1 << 20) - 1)  # PASID 0 is the device's own

    def make():
        for pasid in range(1, last + 1):
            device.attach_pasid(domain, pasid)

    _, taken, grown = build(make)
    ssid = random(BATCH, last, np.uint32) + np.uint32(1)
    iova = np.full(BATCH, IOVA, np.uint64)
    seconds, _ = batch_seconds(system.smmu, 8, iova, ssid=ssid)
    start = time.process_time()
    for pasid in range(1, last + 1):
        device.detach_pasid(domain, pasid)
    return {
        "attach": taken,
        "translation": seconds * n / BATCH,
        "detach": time.process_time() - start,
        "memory": grown,
    }


def pages(n):
    """Pages of 4 KiB mapped by one call; a batch at random over them all."""
    system, _, domain = a_device()
    domain.unmap(IOVA, 4096)
    _, taken, grown = build(lambda: domain.map(IOVA, PA, n << 12))
    if domain.table_bytes < 8 * n:
        raise AssertionError("blocks were mapped")
    iova = random(BATCH, n << 12, np.uint64) + np.uint64(IOVA)
    seconds, pa = batch_seconds(system.smmu, 8, iova)
    if (pa != iova - np.uint64(IOVA - PA)).any():
        raise AssertionError("a wrong address")
    start = time.process_time()
    domain.unmap(IOVA, n << 12)
    return {
        "map": taken,
        "translation": seconds * n / BATCH,
        "unmap": time.process_time() - start,
        "memory": grown,
    }


def domains(n):
    """Paging domains of stage 1 with one page each; there are 2^16 - 1 ASIDs."""
    system, device, _ = a_device()

    def make():
        made = [device.paging_domain() for _ in range(n)]
        for domain in made:
            domain.map(IOVA, PA, 4096)
        return made

    made, taken, grown = build(make)
    start = time.process_time()
    for domain in made:
        device.replace(domain)
        system.smmu.pa(8, IOVA)
    attached = time.process_time() - start
    return {"make and map": taken, "replace": attached, "memory": grown}


def tens(first, last):
    """Return powers of ten."""
    return [10**i for i in range(first, last + 1)]


SIZES = {
    requests: [*tens(5, 8), 10**9],
    streams: tens(2, 6),
    devices: tens(2, 5),
    pasids: [*tens(2, 5), 1 << 20],
    pages: [1 << lg2 for lg2 in (10, 13, 17, 20, 23, 27, 28)],
    domains: [*tens(2, 4), 60_000],
}
LARGEST = 10**9  # that take --largest
WHAT = {
    requests: "requests of a trace in a file",
    streams: "streams",
    devices: "devices",
    pasids: "PASIDs on one device",
    pages: "mapped 4K pages",
    domains: "paging domains",
}


# --- memory ---------------------------------------------------------------------------------------


def smmus(n, caches=None, streams_lg2=None):
    """Return what an Smmu takes, over one Memory; with streams, after a batch mixed over them."""
    from smmufast import Caches, Memory, Smmu

    lg2 = streams_lg2 or 0
    table = np.zeros((1 << lg2, 8), np.uint64)
    table[:, 0] = 0b1001  # bypass
    memory = Memory()
    memory.add(table.view(np.uint8).reshape(-1), 0)
    sid = np.arange(1 << lg2, dtype=np.uint32)
    out = {"pa": np.empty(1 << lg2, np.uint64)}

    def make():
        made = []
        for _ in range(n):
            how = caches and getattr(Caches, caches)()
            smmu = Smmu(memory, strtab_base=0, strtab_base_cfg=lg2, caches=how)
            smmu.pa(0, 0)
            if streams_lg2 is not None:
                smmu.translate_batch(sid, 0, out=out)
            made.append(smmu)
        return made

    return build(make)[2] / n


def allocators(n):
    """Return what a PasidAllocator of 2^20 takes with every PASID handed out."""
    from smmufast import PasidAllocator

    def make():
        made = [PasidAllocator() for _ in range(n)]
        for one in made:
            one.alloc_many((1 << 20) - 1)
        return made

    return build(make)[2] / n


def touched(n):
    """Return what a page of private memory takes that was written to."""
    from smmufast import Memory

    memory = Memory()
    memory.add_private(0, 1 << 40)

    def make():
        for page in range(n):
            memory.write_u64(page << 12, 1)

    return build(make)[2] / n


# What, how, and what of it the architecture's own records take.
MEMORY = {
    "`Smmu`, no caches": (smmus, (2000,), ""),
    "the same after batches over 8192 streams": (smmus, (500, None, 13), ""),
    "`Smmu(caches=Caches.small())`": (smmus, (1000, "small"), ""),
    "`Smmu(caches=Caches.server())`": (smmus, (200, "server"), ""),
    "`Memory`, a private page that was written": (touched, (1 << 16,), "4096"),
    "`PasidAllocator` of 2^20, all handed out": (allocators, (100,), ""),
    "stream: its STE": (streams, (10**6,), "64"),
    "`Device`: one stream, attached": (devices, (20_000,), "64"),
    "PASID, attached": (pasids, (1 << 17,), "64"),
    "mapped 4K page": (pages, (1 << 24,), "8.02"),
    "paging domain with one page": (domains, (10_000,), "16384"),
}


def memory_of(what):
    """Return the bytes of one thing."""
    call, arguments, _ = MEMORY[what]
    found = call(*arguments)
    return found["memory"] / arguments[0] if isinstance(found, dict) else found


# --- output ---------------------------------------------------------------------------------------


def child(*arguments):
    """Measure in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-P", __file__, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout)


def short(value):
    """Return three digits."""
    for unit, factor in (("ns", 1e9), ("µs", 1e6), ("ms", 1e3)):
        if value * factor < 1000:
            return f"{value * factor:#.3g}".rstrip(".") + f" {unit}"
    return f"{value:.3g} s"


def count(n):
    """Return a number as people write it."""
    if n & n - 1 == 0:
        return f"2^{n.bit_length() - 1}"
    exponent = int(math.log10(n))
    return f"10^{exponent}" if n == 10**exponent else f"{n}"


def bytes_text(n):
    """Return a number of bytes."""
    if n < 1 << 20:
        return f"{n:.3g}" if n < 100 else f"{n:.0f}"
    return f"{n / (1 << 20):.1f} Mi"


def table(found):
    """Yield the lines of a Markdown table: a row for each thing measured, a column each size."""
    for name, by_size in found.items():
        yield f"| {name} | {' | '.join(count(n) for n in by_size)} |"
        yield "|---|" + "---:|" * len(by_size)
        for row in next(iter(by_size.values())):
            cells = []
            for n, figures in by_size.items():
                if row == "peak growth":
                    cells.append(bytes_text(max(0, figures[row])))
                elif row == "memory":
                    cells.append(bytes_text(max(0, figures[row] / n)))
                else:
                    cells.append(short(figures[row] / n))
            label = {"memory": "bytes, resident", "peak growth": "bytes, peak, in all"}.get(
                row, row
            )
            yield f"| {label} | {' | '.join(cells)} |"
        yield ""


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 520, 60, 250, 20, 50
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def drawing(found):
    """Return an SVG of every time an item takes over how many there are, both by logarithm."""
    lines = []
    for i, (name, by_size) in enumerate(found.items()):
        for row in next(iter(by_size.values())):
            if row not in ("memory", "peak growth", "a request, wall clock"):
                points = [(n, figures[row] / n * 1e9) for n, figures in by_size.items()]
                dash = "" if row in ("translation", "a request") else ' stroke-dasharray="5 3"'
                lines.append((f"{name}: {row}", COLOURS[i % len(COLOURS)], dash, points))
    xs = [math.log10(n) for line in lines for n, _ in line[3]]
    ys = [math.log10(y) for line in lines for _, y in line[3]]
    x0, x1, y0, y1 = (
        math.floor(min(xs)),
        math.ceil(max(xs)),
        math.floor(min(ys)),
        math.ceil(max(ys)),
    )

    def x(n):
        return LEFT + (math.log10(n) - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def y(value):
        return HEIGHT - BOTTOM - (math.log10(value) - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for e in range(x0, x1 + 1):
        at = x(10**e)
        out.append(f'<path d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#ddd"/>')
        out.append(
            f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">10<tspan dy="-4" '
            f'font-size="9">{e}</tspan></text>'
        )
    for e in range(y0, y1 + 1):
        at = y(10**e)
        out.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        text = short(10**e * 1e-9).replace(".00", "").replace(".0", "")
        out.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    out.append(f'<text x="{LEFT}" y="{HEIGHT - 10}">how many items; processor time an item</text>')
    # each name at the end of its line, moved down until it is below the one before
    labels = sorted((y(line[3][-1][1]), line) for line in lines)
    floor = 0.0
    spare = HEIGHT - 8 - 14 * len(labels)
    for at, (name, colour, dash, points) in labels:
        spare += 14
        place = min(max(at + 4, floor), spare)
        floor = place + 14
        path = "L".join(f"{x(n):.1f} {y(value):.1f}" for n, value in points)
        out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        for n, value in points:
            out.append(f'<circle cx="{x(n):.1f}" cy="{y(value):.1f}" r="2.5" fill="{colour}"/>')
        end = x(points[-1][0])
        out.append(
            f'<path d="M{end + 4:.1f} {at:.1f}L{WIDTH - RIGHT + 8} {place - 4:.1f}" '
            f'stroke="{colour}" stroke-width="0.5" fill="none"/>'
        )
        out.append(f'<text x="{WIDTH - RIGHT + 12}" y="{place:.1f}" fill="{colour}">{name}</text>')
    return "\n".join((*out, "</svg>", ""))


def main():
    """Measure and print."""
    by_name = {call.__name__: call for call in SIZES}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--largest", action="store_true", help="10^9 requests too")
    parser.add_argument("--only", choices=[*by_name, "memory"], action="append")
    parser.add_argument("--most", type=int, default=1 << 62, metavar="N", help="items at most")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--svg", type=Path, metavar="FILE")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, size = arguments.measure
        print(json.dumps(memory_of(size) if name == "memory" else by_name[name](int(size))))
        return
    os.sched_setaffinity(0, {idlest_cpu()})  # the children's too
    found = {}
    for call, sizes in SIZES.items():
        if arguments.only and call.__name__ not in arguments.only:
            continue
        for n in sizes:
            if n <= arguments.most and (n < LARGEST or arguments.largest):
                print(f"{WHAT[call]}: {count(n)}", file=sys.stderr)
                found.setdefault(WHAT[call], {})[n] = child("--measure", call.__name__, n)
    lines = [machine(), "", *table(found)]
    if not arguments.only or "memory" in arguments.only:
        lines += ["| | bytes, resident | of them records of the architecture |", "|---|---:|---:|"]
        for what, (_, _, records) in MEMORY.items():
            print(f"memory: {what}", file=sys.stderr)
            figure = child("--measure", "memory", what)
            lines.append(f"| {what} | {bytes_text(figure)} | {records} |")
    text = "\n".join(lines).rstrip() + "\n"
    print(text, end="")
    if arguments.markdown:
        write_text(arguments.markdown, text)
    if arguments.svg:
        write_text(arguments.svg, drawing(found))


if __name__ == "__main__":
    main()
