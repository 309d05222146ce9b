"""Where captures are, and small ones made by hand."""

import gzip
import json
import random

import numpy as np
import ptwriter
from project import CAPTURES, ROOT
from twin import smmu_of

import smmufast
from smmufast.capture import Capture

SHIPPED = ROOT / "examples" / "linux-7.3-4k-s1"

QEMU_IDR = {"IDR0": "0xd44101b", "IDR1": "0x2730010", "IDR3": "0x1414", "IDR5": "0x74"}
STREAM_TABLE, CONTEXTS, TABLES = 0x4000_0000, 0x4001_0000, 0x4010_0000
RAM = (0x4000_0000, 0x1000_0000)
SID = 3


def found():
    """Directories of all captures: the shipped one, and those beside the repository."""
    others = sorted(CAPTURES.iterdir()) if CAPTURES.is_dir() else []
    return [SHIPPED] + [
        path
        for path in others
        if (path / "meta.json").exists() or (path / "cases.jsonl.gz").exists()
    ]


def read_lines(path):
    """The objects of a compressed list."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_lines(path, lines):
    """A compressed list; a line may be text, which is written as it is."""
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for line in lines:
            file.write((line if isinstance(line, str) else json.dumps(line)) + "\n")


def small_system(**ste):
    """A Smmu with one stage-1 stream of four 4K pages: read-only, two writable, AF=0."""
    memory = ptwriter.Memory()
    memory.add(STREAM_TABLE, 0x1000)
    memory.add(CONTEXTS, 0x1000)
    allocate = ptwriter.BumpAllocator(memory, TABLES, 0x10_0000)
    tables = ptwriter.PageTables(memory, allocate, 12, 25)
    for i, flags in enumerate(({"ap": 3}, {"ap": 1}, {"ap": 1}, {"ap": 1, "af": 0})):
        tables.map(i << 12, 0x5000_0000 + (i << 12), attrindx=1, sh=3, ng=1, **flags)
    fields = {"v": 1, "config": 0b101, "s1contextptr": CONTEXTS, "shcfg": 1} | ste
    memory.write(STREAM_TABLE + 64 * SID, ptwriter.encode_ste(**fields))
    memory.write(STREAM_TABLE + 64 * 4, ptwriter.encode_ste(v=1, config=0b100))
    memory.write(STREAM_TABLE + 64 * 5, ptwriter.encode_ste(v=1))
    cd = ptwriter.encode_cd(
        v=1, aa64=1, a=1, r=1, ips=2, t0sz=25, epd1=1, ttb0=tables.base, asid=7, mair=0x44FF
    )
    memory.write(CONTEXTS, cd)
    real = smmufast.Memory()
    real.add_private(*RAM)
    for base, data in memory.regions():
        real.write(base, data)
    words = [int(QEMU_IDR[name], 16) for name in ("IDR0", "IDR1", "IDR3", "IDR5")]
    features = smmufast.modelled(smmufast.Features.from_idr(*words, 1))[0]
    return smmufast.Smmu(real, features, strtab_base=STREAM_TABLE, strtab_base_cfg=4)


SMALL_REQUESTS = [
    {"sid": SID, "iova": 0x0123},
    {"sid": SID, "iova": 0x1456, "write": True, "priv": True},
    {"sid": SID, "iova": 0x2456, "instr": True},
    {"sid": SID, "iova": 0x0123, "write": True},
    {"sid": SID, "iova": 0x3000},
    {"sid": SID, "iova": 0x9000, "priv": True},
    {"sid": 4, "iova": 0x1234},
    {"sid": 9, "iova": 0x1234},
]  # two translations, an instruction read, three faults, a bypass, a bad STE


def small_capture(path):
    """Save small_system with SMALL_REQUESTS; the capture as read back."""
    return Capture.save(path, smmu=small_system(), requests=SMALL_REQUESTS)


def cases(path, *configurations, idr=None, ram=("0x40000000", "0x50000000")):
    """Write a capture of kind "cases".

    Each configuration is a Smmu and its requests, or None in place of the Smmu: nothing but RAM.
    """
    path.mkdir()
    contents = [np.zeros(4096, np.uint8)]
    lines = [{"header": {"idr": (idr or QEMU_IDR) | {"AIDR": "0x1"}, "ram": list(ram)}}]
    for number, (smmu, requests, more) in enumerate(configurations):
        pages = []
        if smmu is not None:
            for base in (STREAM_TABLE, CONTEXTS, *range(TABLES, TABLES + 0x8000, 4096)):
                data = smmu.memory.read(base, 4096)
                if any(data):
                    pages.append([hex(base), len(contents)])
                    contents.append(np.frombuffer(data, np.uint8))
        lines.append(
            {
                "id": f"case-{number}",
                "cr0": "0xd",
                "meta": {},
                "pages": pages,
                "reqs": requests,
                "regs": {"STRTAB_BASE": hex(STREAM_TABLE), "STRTAB_BASE_CFG": "0x4", "GBPA": "0x0"},
            }
            | more
        )
    np.savez_compressed(path / "pages.npz", pages=np.array(contents))
    write_lines(path / "cases.jsonl.gz", lines)
    return path


def random_systems(maker, seed, count):
    """(Smmu, System) of `count` random systems."""
    rng = random.Random(seed)
    for _ in range(count):
        system = maker(rng)
        yield smmu_of(system), system
