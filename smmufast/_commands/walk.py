"""`smmufast walk`: translate one access of a capture and explain every step."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from smmufast._commands.captures import chosen, load, masked_text
from smmufast._commands.output import print_json
from smmufast._commands.words import AGREES, Add, check_bits, number

if TYPE_CHECKING:
    from smmufast import Result, Smmu


def add(command: Add) -> None:
    """Add `walk`."""
    made = command("walk", "Translate one access and explain every step.")
    made.add_argument("--sid", type=number, required=True, metavar="S", help="StreamID")
    made.add_argument("--ssid", type=number, metavar="P", help="SubstreamID (PASID)")
    made.add_argument("--iova", type=number, required=True, metavar="A", help="input address")
    made.add_argument("--write", action="store_true", help="a write instead of a read")
    made.add_argument("--priv", action="store_true", help="a privileged access")
    made.add_argument("--instr", action="store_true", help="an instruction read")
    made.add_argument("--config", metavar="ID", help="configuration, if the capture has several")
    made.set_defaults(run=_walk)


def _walk(arguments: argparse.Namespace) -> int:
    """Run `walk`."""
    from smmufast.explain import explain

    check_bits(sid=(arguments.sid, 32), ssid=(arguments.ssid, 20), iova=(arguments.iova, 64))
    configuration = chosen(load(arguments.capture), arguments.config)
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
            print(masked_text(configuration.masked) + "\n")
        print(explain(result, smmu))
        for text in _neighbours(result, smmu).values():
            print(text)
        return AGREES
    fault = result.fault
    print_json(
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
            "nearest": _neighbours(result, smmu),
        }
    )
    return AGREES


def _neighbours(result: Result, smmu: Smmu) -> dict[str, str]:
    """Say what is mapped below and above an address that is not."""
    from smmufast.mappings import mappings

    if result.fault is None or result.fault.name != "F_TRANSLATION":
        return {}
    try:
        below, above = mappings(smmu, result.sid, result.ssid).near(result.iova)
    except ValueError:  # the substream has no context: the explanation says so
        return {}
    found = {}
    if below is not None:
        found["below"] = f"The nearest range below: {below}"
    if above is not None:
        found["above"] = f"The nearest range above: {above}"
    return found or {"none": "Nothing is mapped."}
