"""What `Capture.save` writes: registers, pages, lines of requests with their outcomes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from smmufast._arguments import flag, integer, must_be
from smmufast._device.smmu import Smmu
from smmufast._engine.memory import Memory
from smmufast._tools.capture_files import COUNTED, PAGE, RAM, U32, U64, Line, features_of
from smmufast._tools.capture_outcomes import translate_alone
from smmufast._tools.capture_queues import QUEUE_PARTS, QUEUES
from smmufast.features import modelled

if TYPE_CHECKING:
    from numpy.typing import NDArray

def registers_of(smmu: Smmu) -> dict[str, int]:
    """Return the registers that the format needs, and those of the queues that there are."""
    features = smmu.features
    queues: dict[str, int] = {}
    for name, _, _ in QUEUES.values():
        if name == "PRIQ" and not features.pri:
            continue
        mine = {f"{name}_{part}": smmu.read(f"{name}_{part}") for part in QUEUE_PARTS}
        if any(mine.values()):
            queues |= mine
    return queues | {
        "CR0": smmu.cr0,
        "CR2": smmu.cr2,
        "GBPA": smmu.gbpa,
        "STRTAB_BASE": smmu.strtab_base,
        "STRTAB_BASE_CFG": smmu.strtab_base_cfg,
        "IDR0": features.idr0,
        "IDR1": features.idr1,
        "IDR3": features.idr3,
        "IDR5": features.idr5,
        "AIDR": features.aidr,
    }


def smmu_of(memory: Memory, given: Mapping[str, int]) -> tuple[Smmu, dict[str, int]]:
    """Return an SMMU with these registers, and the features that it leaves out."""
    kept, masked = modelled(features_of(Line("registers", None, {}), given))
    smmu = Smmu(
        memory,
        kept,
        strtab_base=given["STRTAB_BASE"],
        strtab_base_cfg=given["STRTAB_BASE_CFG"],
        cr0=given["CR0"],
        cr2=given["CR2"],
        gbpa=given["GBPA"],
    )
    return smmu, masked


def description_of(
    meta: Mapping[str, Any], counts: Mapping[str, int], given: Mapping[str, int], memory: Memory
) -> dict[str, Any]:
    """Return ``meta.json``: what the files hold, registers and RAM, and more members."""
    values = {name: value for name, value in meta.items() if name not in RAM}
    for name in COUNTED:  # those of another capture
        if type(values.get(name)) is int:
            del values[name]
    values["counts"] = dict(counts)
    values["regs"] = {name: hex(value) for name, value in given.items()}
    regions = [(region.base, region.size) for region in memory.regions]
    if len(regions) == 1:
        return values | {"ram_base": hex(regions[0][0]), "ram_size": regions[0][1]}
    return values | {"regions": [[hex(base), hex(size)] for base, size in regions]}


def is_unused(given: Mapping[str, int]) -> bool:
    """Whether there are queues, and nothing was ever put into one.

    A ring that was used and has no pages would be taken for one of zeros.
    """
    queues = [name for name, _, _ in QUEUES.values() if f"{name}_BASE" in given]
    return bool(queues) and not any(given.get(f"{name}_PROD") for name in queues)


def _page(memory: Memory, address: int) -> bytes:
    """Return a page of memory; what no region holds is zero."""
    data = bytearray(PAGE)
    for region in memory.regions:
        first = max(region.base, address)
        end = min(region.base + region.size, address + PAGE)
        if first < end:
            data[first - address : end - address] = memory.read(first, end - first)
    return bytes(data)


def contents_of(
    memory: Memory, addresses: Iterable[int]
) -> tuple[list[int], list[NDArray[np.uint8]]]:
    """Return the pages at some addresses, without those of zeros."""
    kept = []
    contents = []
    for address in addresses:
        data = _page(memory, address)
        if data.strip(b"\0"):
            kept.append(address)
            contents.append(np.frombuffer(data, np.uint8))
    return kept, contents


def write_pages(path: str, addresses: list[int], contents: list[NDArray[np.uint8]]) -> None:
    """Write pages and their addresses as npz."""
    np.savez_compressed(
        path,
        page_addr=np.array(addresses, np.uint64),
        pages=np.array(contents, np.uint8).reshape(-1, PAGE),
    )


def plain_number(value: Any) -> Any:
    """Return a number of numpy's as one of Python's, for JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def write_lines(path: str, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write lines of JSON, the same bytes for the same lines."""
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        for line in lines:
            file.write(json.dumps(dict(line), default=plain_number).encode() + b"\n")


def answer(
    smmu: Smmu, requests: Iterable[Mapping[str, Any]]
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Translate the requests that have no outcome; lines of requests and of events."""
    from smmufast.streams import bare

    smmu = bare(smmu)
    translated: list[Mapping[str, Any]] = []
    terminated: list[Mapping[str, Any]] = []
    for number, request in enumerate(requests):
        if not isinstance(request, Mapping):
            raise TypeError(must_be(f"requests[{number}]", "a dict", request))
        if "pa" in request:
            translated.append(request)
            continue
        for name in ("sid", "iova"):
            if name not in request:
                raise ValueError(f"requests[{number}] has no {name}")
        unknown = set(request) - {"sid", "iova", "ssid", "write", "priv", "instr"}
        if unknown:
            raise ValueError(
                f"requests[{number}] has {min(unknown)!r}; sid, iova, ssid, write, priv and "
                "instr are known, or pa with what was recorded"
            )
        sid = integer("sid", request["sid"], U32)
        iova = integer("iova", request["iova"], U64)
        ssid = request.get("ssid")
        ssid = None if ssid is None else integer("ssid", ssid, 0xFFFFF)
        write, priv, instr = (
            flag(name, request.get(name, False)) for name in ("write", "priv", "instr")
        )
        instr &= not write  # a write is always data
        result = translate_alone(smmu, sid, iova, ssid=ssid, write=write, priv=priv, instr=instr)
        line = {"sid": sid, "iova": hex(iova), "priv": int(priv), "instr": int(instr)}
        if ssid is not None:
            line["ssid"] = ssid
        if result.pa is not None:
            translated.append(
                line
                | {
                    "pa": hex(result.pa),
                    "perm": int(result.perm) >> (3 if priv else 0) & 7,
                    "stage": result.stage,
                    "level": -1 if result.level is None else result.level,
                    "page_shift": result.page_lg2 or 0,
                    "bypass": int(result.action != "ok"),
                }
            )
        elif result.event is None:
            raise ValueError(
                f"requests: {result!r} ends without an event; such an outcome cannot be written"
            )
        else:
            line |= {"rnw": int(not write), "hex": result.event.record.hex()}
            if result.action != "abort":
                line["action"] = result.action
            terminated.append(line)
    return translated, terminated
