"""The rules of commands: every opcode, worked words, recorded queues, and a slow twin.

Follows IHI 0070 4 (commands) and 6.3.9 (CR0.VMW).
"""

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import captures
import pytest
from rawfeatures import raw
from reference import bits, features_from_idr, in_place, pointer_msb

import smmufast
from smmufast import Why, layout
from smmufast.capture import load_batches, load_queue
from smmufast.decode import command_why

SOURCES = Path(__file__).parent / "commands"
NONE, ILL = 0, 1
EVERY_BYTE = (1 << 64) - 1


@pytest.fixture(scope="module")
def decode(tmp_path_factory):
    """The rules, compiled as a user of the header would compile them."""
    directory = tmp_path_factory.mktemp("commands") / "build"
    shutil.copytree(SOURCES, directory)
    path = [str(Path(smmufast.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=directory, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "CFLAGS": "-O0"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    name = "command_effect"
    file = directory / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.decode


# --- the twin ---

SCALARS = (
    "stall_model", "term_model", "s1p", "s2p", "hyp", "asid16", "vmid16", "ds", "ats", "pri",
    "ril", "vmw", "sev", "msi", "ssidsize",
)  # fmt: skip
EVERYTHING = {
    "s1p": 1, "s2p": 1, "hyp": 1, "asid16": 1, "vmid16": 1, "ds": 1, "ats": 1, "pri": 1, "ril": 1,
    "vmw": 1, "sev": 1, "msi": 1, "ssidsize": 20, "stall_model": 0, "term_model": 0,
    "arch_minor": 3, "cr0": 1,
}  # fmt: skip


def hardware(**changes):
    """What the rules look at, everything being there; keywords change single features."""
    hw = EVERYTHING | changes
    return hw | {"pointer_mask": in_place(EVERY_BYTE, pointer_msb(hw["arch_minor"]), 6)}


NOTHING = {
    "why": 0, "leaf": False, "ssv": False, "global_": False, "abort": False, "retry": False,
    "sid": 0, "ssid": 0, "range_lg2": 0, "vmid": 0, "vmid_mask": 0, "asid": 0, "first": 0,
    "last": 0, "all_addresses": False, "granule": 0, "level": 0, "stag": 0, "prg_index": 0,
    "resp": 0, "cs": 0, "size_lg2": 0, "msi_address": 0, "msi_data": 0,
}  # fmt: skip

TLBI = {  # opcode: compares VMIDs, compares ASIDs, which address
    0x10: (1, 0, None), 0x11: (1, 1, None), 0x12: (1, 1, "VA"), 0x13: (1, 0, "VA"),
    0x20: (0, 0, None), 0x21: (0, 1, None), 0x22: (0, 1, "VA"), 0x23: (0, 0, "VA"),
    0x28: (1, 0, None), 0x2A: (1, 0, "IPA"), 0x30: (0, 0, None),
}  # fmt: skip


def refused(hw, op, c):
    """Why a command is illegal as far as no more than one field says it; None when it is not."""
    if op in (0x05, 0x06, *range(0x10, 0x14), *range(0x20, 0x24)) and not hw["s1p"]:
        return "CMD_S1P"
    if op in (0x20, 0x21, 0x22, 0x23) and not hw["hyp"]:
        return "CMD_HYP"
    if op in (0x28, 0x2A) and not hw["s2p"]:
        return "CMD_S2P"
    if op == 0x40 and not hw["ats"]:
        return "CMD_ATS"
    if op == 0x41 and not hw["pri"]:
        return "CMD_PRI"
    if op in (0x44, 0x45) and hw["stall_model"] == 1:
        return "CMD_STALL"
    if op in (0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x44, 0x45) and bits(c, 10, 10):
        return "CMD_SSEC"
    if op == 0x40 and bits(c, 69, 64) > 52:
        return "CMD_SIZE"
    if op == 0x41 and bits(c, 77, 76) == 3:
        return "CMD_RESP"
    if op == 0x46 and bits(c, 13, 12) == 3:
        return "CMD_CS"
    if op == 0x07:
        return "CMD_MPAM"
    if op in (0x70, 0x73):
        return "CMD_DPT"
    if op in (0x18, 0x1A, 0x50, 0x51, 0x52, 0x53, 0x58, 0x5A, 0x60):
        return "CMD_SECURE"
    if op in (*range(0x01, 0x07), *TLBI, 0x40, 0x41, 0x44, 0x45, 0x46):
        return None
    return "CMD_IMPDEF" if op >> 4 == 8 else "CMD_RESERVED"


def expected(hw, c):
    """(CERROR, effect) of a command, a 128-bit integer."""
    op = bits(c, 7, 0)
    effect = NOTHING | {"kind": "NONE", "op": op}
    if why := refused(hw, op, c):
        return ILL, effect | {"why": Why[why]}
    sid, ssid = bits(c, 63, 32), bits(c, 31, 12)
    more = {}
    if op in TLBI:
        more = tlbi(hw, op, c)
        if more is None:
            return ILL, effect | {"why": Why.CMD_RANGE}
    if op == 0x03:
        more = {"kind": "CFGI_STE", "sid": sid, "leaf": bool(bits(c, 64, 64))}
    if op == 0x04:
        span = bits(c, 68, 64) + 1
        more = {"kind": "CFGI_RANGE", "sid": sid >> span << span, "range_lg2": span}
        if span == 32:
            more = {"kind": "CFGI_ALL", "range_lg2": 32}
    if op == 0x05:
        more = {"kind": "CFGI_CD", "sid": sid, "ssid": ssid, "leaf": bool(bits(c, 64, 64))}
    if op == 0x06:
        more = {"kind": "CFGI_CD_ALL", "sid": sid}
    if op == 0x44:
        retry = bool(bits(c, 12, 12))
        abort = not retry and bool(bits(c, 13, 13) or hw["term_model"])
        more = {"kind": "RESUME", "sid": sid, "stag": bits(c, 79, 64)}
        more |= {"retry": retry, "abort": abort}
    if op == 0x45:
        more = {"kind": "STALL_TERM", "sid": sid}
    if op == 0x46:
        cs = bits(c, 13, 12)
        more = {"kind": "SYNC", "cs": 0 if cs == 2 and not hw["sev"] else cs}
        if cs == 1 and hw["msi"]:
            more |= {"msi_address": in_place(c >> 64, 55, 2), "msi_data": bits(c, 63, 32)}
    if op in (0x01, 0x02, 0x40, 0x41):
        ssv = bool(bits(c, 11, 11)) and hw["ssidsize"] > 0
        more = {"sid": sid, "ssv": ssv, "ssid": ssid if ssv else 0}
        address = bits(c, 127, 76) << 12
        if op in (0x01, 0x02):
            more["kind"] = "PREFETCH"
        if op == 0x02:
            more |= {"first": address, "last": address + 0xFFF, "size_lg2": bits(c, 68, 64)}
        if op == 0x40:
            span = 4096 << bits(c, 69, 64)
            first = address // span * span
            more |= {"kind": "ATC_INV", "global_": ssv and bool(bits(c, 9, 9))}
            more |= {"size_lg2": 12 + bits(c, 69, 64), "first": first, "last": first + span - 1}
            more["all_addresses"] = span == 1 << 64
        if op == 0x41:
            more |= {"kind": "PRI_RESP", "prg_index": bits(c, 72, 64), "resp": bits(c, 77, 76)}
        if op in (0x40, 0x41) and not hw["cr0"] & 1:
            more = {}
    return NONE, effect | more


def tlbi(hw, op, c):
    """The scope of a TLB invalidation, or None for an illegal range."""
    has_vmid, has_asid, address = TLBI[op]
    effect = {"kind": "TLBI"}
    if has_vmid and hw["s2p"]:
        mask = 0xFFFF if hw["vmid16"] else 0xFF
        wild = bits(hw["cr0"], 8, 6)
        if hw["vmw"] and wild in (1, 2, 3, 4):
            mask -= (1 << wild) - 1
        effect |= {"vmid_mask": mask, "vmid": bits(c, 47, 32) & mask}
    if has_asid:
        effect["asid"] = bits(c, 63 if hw["asid16"] else 55, 48)
    if address is None:
        return effect | {"all_addresses": True, "last": EVERY_BYTE}
    effect["leaf"] = bool(bits(c, 64, 64))
    first = in_place(c >> 64, 63 if address == "VA" else pointer_msb(hw["arch_minor"]), 12)
    tg, ttl, num = bits(c, 75, 74), bits(c, 73, 72), bits(c, 16, 12)
    scale = min(bits(c, 25, 20), 39) if hw["ds"] else bits(c, 24, 20)
    if not hw["ril"] or tg == 0:
        return effect | {"first": first, "last": first + 0xFFF}
    granule = {1: 12, 2: 14, 3: 16}[tg]
    if granule == 14 and ttl == 1 and not hw["ds"]:
        ttl = 0
    if num == scale == ttl == 0:
        return None
    last = min(first + (num + 1) * 2**scale * 2**granule - 1, EVERY_BYTE)
    return effect | {"first": first, "last": last, "granule": granule, "level": ttl}


# --- the rules ---


def random_hardware(rng):
    """Features with everything, with little, or at random."""
    share = rng.choice((0.9, 0.5, 0.1))
    changes = {name: int(rng.random() < share) for name in SCALARS}
    changes["ssidsize"] *= 20
    changes["stall_model"] = rng.choice((0, 1, 2))
    return hardware(**changes, arch_minor=rng.randrange(5), cr0=rng.getrandbits(9))


def random_words(rng):
    """A command without its opcode: uniform, sparse, or with the rare values of single fields."""
    word = rng.getrandbits(128)
    if rng.random() < 0.5:
        word &= rng.getrandbits(128) & rng.getrandbits(128)
    if rng.random() < 0.3:  # an empty range
        word &= ~(0x1F << 12 | 0x3F << 20 | rng.choice((0, 3 << 72)))
    if rng.random() < 0.2:
        word |= (1 << 128) - (1 << rng.randrange(76, 128))
    if rng.random() < 0.3:
        word &= ~(1 << 10)
    return word & ~0xFF


@pytest.mark.rule(
    "S4.1.1-2", "S4.1.1-3", "S4.1.5-1", "S4.1.6-3", "S4.1.6-4", "S4.1.6-5", "S4.2.2-3",
    "S4.4-1", "S4.4.1.1-2", "S4.4.2-2", "S4.4.2.5-1", "S4.4.4.1-2", "S4.5.1-6", "S4.5.2-3",
    "S6.3.1-17", "S7.1-7",
)
@pytest.mark.parametrize("op", range(256))
def test_every_opcode_is_decoded_as_the_specification_reads(decode, op):
    rng = random.Random(op)
    found = {NONE: 0, ILL: 0}
    for _ in range(400):
        hw = random_hardware(rng)
        command = random_words(rng) | op
        assert decode(hw, command) == expected(hw, command), (hw, hex(command))
        found[expected(hw, command)[0]] += 1
    assert found[ILL] or op == 0x30
    known = {*range(1, 7), *TLBI, 0x40, 0x41, 0x44, 0x45, 0x46}
    assert bool(found[NONE]) == (op in known)


@pytest.mark.parametrize("op", range(256))
def test_what_is_illegal_has_a_reason(decode, op):
    rng = random.Random(op)
    for _ in range(60):
        hw = random_hardware(rng)
        features = raw(
            **{name: hw[name] for name in SCALARS}, arch_minor=hw["arch_minor"], ttf=2, gran4k=1
        )
        command = random_words(rng) | op
        cerror, _ = decode(hw, command)
        data = command.to_bytes(16, "little")
        why = command_why(data, features)
        assert (why is not None) == (cerror == ILL), (hw, hex(command), why)
        if command_why(data):  # what no SMMU accepts
            assert cerror == ILL or not hw["ril"]


@pytest.mark.rule("S4.3.2-1", "S4.3.6-1", "S4.4.1.1-4", "S4.5.1-2", "S4.7.1-1")
@pytest.mark.parametrize(
    ("dwords", "effect"),
    [
        ((0x0000004200000003, 1), {"kind": "CFGI_STE", "sid": 0x42, "leaf": True}),
        ((0x0000000000000004, 0x1F), {"kind": "CFGI_ALL", "range_lg2": 32}),
        ((0x0000004700000004, 2), {"kind": "CFGI_RANGE", "sid": 0x40, "range_lg2": 3}),
        (
            (0x0000004200003005, 1),
            {"kind": "CFGI_CD", "sid": 0x42, "ssid": 3, "leaf": True},
        ),
        (
            (0x0012000100000012, 0x12345001),
            {"kind": "TLBI", "vmid": 1, "vmid_mask": 0xFFFF, "asid": 0x12, "leaf": True,
             "first": 0x1234_5000, "last": 0x1234_5FFF},
        ),
        (
            (0x0012000100300012, 0x12340701),
            {"kind": "TLBI", "vmid": 1, "vmid_mask": 0xFFFF, "asid": 0x12, "leaf": True,
             "first": 0x1234_0000, "last": 0x1234_7FFF, "granule": 12, "level": 3},
        ),
        (
            (0x000000050000002A, 0x40001001),
            {"kind": "TLBI", "vmid": 5, "vmid_mask": 0xFFFF, "leaf": True,
             "first": 0x4000_1000, "last": 0x4000_1FFF},
        ),
        ((0x0000000100001044, 5), {"kind": "RESUME", "sid": 1, "stag": 5, "retry": True}),
        ((0x0000000100002044, 5), {"kind": "RESUME", "sid": 1, "stag": 5, "abort": True}),
        ((0x000000000FC01046, 0x1000), {"kind": "SYNC", "cs": 1, "msi_address": 0x1000}),
        (
            (0x0000004200003840, 0x34),
            {"kind": "ATC_INV", "sid": 0x42, "ssv": True, "ssid": 3, "size_lg2": 64,
             "all_addresses": True, "last": EVERY_BYTE},
        ),
        (
            (0x0000004200000041, 0x2007),
            {"kind": "PRI_RESP", "sid": 0x42, "prg_index": 7, "resp": 2},
        ),
    ],
)  # fmt: skip
def test_worked_encodings(decode, dwords, effect):
    command = dwords[0] | dwords[1] << 64
    assert decode(hardware(), command) == (NONE, NOTHING | {"op": command & 0xFF} | effect)


def command_of(name, **fields):
    """A command by the names of its fields."""
    return layout.pack(name, **fields)


@pytest.mark.rule(
    "S4.1.3-2", "S4.1.3-3", "S4.3.3-3", "S4.3.4-2", "S4.4.1.1-8", "S4.4.2-1", "S4.4.2.7-2",
    "S4.4.3.1-4", "S4.5.1-7", "S4.5.2-4", "S4.7.1-6",
)
@pytest.mark.parametrize(
    ("name", "fields", "feature"),
    [
        ("CFGI_CD", {}, {"s1p": 0}),
        ("CFGI_CD_ALL", {}, {"s1p": 0}),
        ("TLBI_NH_ALL", {}, {"s1p": 0}),
        ("TLBI_NH_ASID", {}, {"s1p": 0}),
        ("TLBI_NH_VA", {}, {"s1p": 0}),
        ("TLBI_NH_VAA", {}, {"s1p": 0}),
        ("TLBI_EL2_ALL", {}, {"s1p": 0}),
        ("TLBI_EL2_ASID", {}, {"s1p": 0}),
        ("TLBI_EL2_VA", {}, {"s1p": 0}),
        ("TLBI_EL2_VAA", {}, {"s1p": 0}),
        ("TLBI_EL2_ALL", {}, {"hyp": 0}),
        ("TLBI_EL2_ASID", {}, {"hyp": 0}),
        ("TLBI_EL2_VA", {}, {"hyp": 0}),
        ("TLBI_EL2_VAA", {}, {"hyp": 0}),
        ("TLBI_S12_VMALL", {}, {"s2p": 0}),
        ("TLBI_S2_IPA", {}, {"s2p": 0}),
        ("ATC_INV", {}, {"ats": 0}),
        ("ATC_INV", {}, {"ats": 0, "cr0": 0}),
        ("PRI_RESP", {}, {"pri": 0}),
        ("RESUME", {}, {"stall_model": 1}),
        ("STALL_TERM", {}, {"stall_model": 1}),
        ("TLBI_NH_VA", {"TG": 2, "TTL": 1}, {"ds": 0}),
    ],
)
def test_a_command_without_its_feature_is_illegal(decode, name, fields, feature):
    command = command_of(name, **fields)
    assert decode(hardware(), command)[0] == NONE
    assert decode(hardware(**feature), command)[0] == ILL


@pytest.mark.rule(
    "S3.10.2.1-1", "S4.1.3-1", "S4.1.6-2", "S4.4.1.1-10", "S4.5.1-3", "S4.5.2-2", "S4.7.3-8",
)
@pytest.mark.parametrize(
    ("name", "fields", "bad"),
    [
        *((name, {}, {"SSec": 1}) for name in (
            "PREFETCH_CONFIG", "PREFETCH_ADDR", "CFGI_STE", "CFGI_STE_RANGE", "CFGI_ALL",
            "CFGI_CD", "CFGI_CD_ALL", "RESUME", "STALL_TERM")),
        ("SYNC", {"CS": 2}, {"CS": 3}),
        ("PRI_RESP", {"Resp": 2}, {"Resp": 3}),
        ("ATC_INV", {"Size": 52}, {"Size": 53}),
        ("TLBI_NH_VAA", {"TG": 1, "NUM": 1}, {"TG": 1, "NUM": 0}),
        ("TLBI_S2_IPA", {"TG": 3, "SCALE": 1}, {"TG": 3, "SCALE": 0}),
        ("TLBI_EL2_VA", {"TG": 2, "TTL": 2}, {"TG": 2, "TTL": 0}),
    ],
)  # fmt: skip
def test_an_illegal_parameter_is_cerror_ill(decode, name, fields, bad):
    reasons = {"SSec": "CMD_SSEC", "CS": "CMD_CS", "Resp": "CMD_RESP", "Size": "CMD_SIZE"}
    why = reasons.get(next(iter(bad)), "CMD_RANGE")
    assert decode(hardware(), command_of(name, **fields))[0] == NONE
    assert decode(hardware(), command_of(name, **bad)) == (
        ILL,
        NOTHING | {"kind": "NONE", "op": layout.Opcode[name], "why": Why[why]},
    )  # fmt: skip


@pytest.mark.rule("S4.4.1.1-3")
@pytest.mark.parametrize(
    ("ds", "scale", "last"),
    [
        (1, 39, (1 << 52) - 1),
        (1, 40, (1 << 52) - 1),
        (1, 63, (1 << 52) - 1),
        (1, 31, (1 << 44) - 1),
        (0, 31, (1 << 44) - 1),
        (0, 33, (1 << 14) - 1),
    ],
)
def test_the_scale_of_a_range_is_capped(decode, ds, scale, last):
    command = command_of("TLBI_NH_VA", TG=1, NUM=1, SCALE=scale)
    assert decode(hardware(ds=ds), command)[1]["last"] == last


@pytest.mark.rule("S4.4.1.1-5")
def test_a_range_ends_with_the_address_space(decode):
    command = command_of("TLBI_NH_VA", TG=1, NUM=1, Address=EVERY_BYTE - 0xFFF)
    effect = decode(hardware(), command)[1]
    assert (effect["first"], effect["last"]) == (EVERY_BYTE - 0xFFF, EVERY_BYTE)


@pytest.mark.rule("S2.4-3", "S4.4.1.1-1")
def test_without_ril_an_address_is_one_page(decode):
    command = command_of("TLBI_NH_VA", TG=1, NUM=7, SCALE=3, TTL=2, Address=0x5000)
    effect = decode(hardware(ril=0), command)[1]
    assert (effect["first"], effect["last"], effect["granule"]) == (0x5000, 0x5FFF, 0)


@pytest.mark.rule("S4.4-5", "S6.3.1-16", "S6.3.9-5")
@pytest.mark.parametrize(
    ("vmw", "mask"), [(0, 0xFFFF), (1, 0xFFFE), (4, 0xFFF0), (5, 0xFFFF), (7, 0xFFFF)]
)
def test_the_vmid_wildcard_masks_low_bits(decode, vmw, mask):
    command = command_of("TLBI_S12_VMALL", VMID=0x1235)
    wild = hardware(cr0=1 | vmw << 6)
    assert decode(wild, command)[1]["vmid_mask"] == mask
    assert decode(wild, command)[1]["vmid"] == 0x1235 & mask
    assert decode(wild | {"vmw": 0}, command)[1]["vmid_mask"] == 0xFFFF
    assert decode(wild | {"vmid16": 0}, command)[1]["vmid"] == 0x35 & mask
    assert decode(wild | {"s2p": 0}, command_of("TLBI_NH_ALL", VMID=5))[1]["vmid_mask"] == 0


# --- what others' software did ---


def recorded_hardware(idr, cr0=1):
    words = [int(idr[name], 16) for name in ("IDR0", "IDR1", "IDR3", "IDR5")]
    features = vars(features_from_idr(*words, 1))
    names = (*SCALARS, "arch_minor")
    return hardware(**{name: features[name] for name in names}, cr0=cr0)


LINUX = [
    pytest.param(path, id=path.name)
    for path in captures.found()
    if (path / "meta.json").exists() and (path / "queues.npz").exists()
]


@pytest.mark.skipif(not LINUX, reason="no capture has queues")
@pytest.mark.parametrize("path", LINUX)
def test_the_commands_of_a_kernel_are_all_legal(decode, path):
    registers = json.loads((path / "meta.json").read_text())["regs"]
    hw = recorded_hardware(registers, int(registers["CR0"], 16))
    commands = [int.from_bytes(r, "little") for r in load_queue(path, "commands").records]
    kinds = {}
    for command in commands:
        cerror, effect = decode(hw, command)
        assert cerror == NONE, hex(command)
        assert layout.command_record(command & 0xFF).name
        kinds[effect["kind"]] = kinds.get(effect["kind"], 0) + 1
    assert len(commands) > 80
    assert {"TLBI", "SYNC"} <= set(kinds)


def batches():
    """Where the recorded batches of commands are, or None."""
    for directory in {path.parent for path in captures.found()}:
        if (directory / "queues.jsonl.gz").exists():
            return directory / "queues.jsonl.gz"
    return None


def accepted_by_qemu(command):
    """A command that QEMU accepts and that is illegal for its ID registers."""
    op = command & 0xFF
    return (
        op in (0x18, 0x1A, 0x20, 0x21, 0x22, 0x23, 0x40, 0x41, 0x44, 0x45)
        or (op == 0x46 and bits(command, 13, 12) == 3)
        or (op in (1, 2) and bits(command, 10, 10) == 1)
    )


def test_recorded_batches_stop_where_qemu_stopped(decode):
    path = batches()
    if path is None:
        pytest.skip("no queues.jsonl.gz beside the captures")
    hw = recorded_hardware(captures.QEMU_IDR)
    features, found = load_batches(path)
    assert (features.idr0, features.idr3) == tuple(
        int(captures.QEMU_IDR[name], 16) for name in ("IDR0", "IDR3")
    )
    wrap = (1 << 9) - 1  # LOG2SIZE is 8
    compared = {NONE: 0, ILL: 0, "refused here only": 0}
    for batch in found:
        done, cerror = 0, NONE
        for record in batch.commands:
            command = int.from_bytes(record, "little")
            cerror, _ = decode(hw, command)
            if cerror != NONE:
                break
            done += 1
        consumed = ((batch.cons & 0xFFFFF) - batch.start) & wrap
        if cerror != NONE and accepted_by_qemu(command):
            assert consumed > done or batch.err == NONE
            compared["refused here only"] += 1
            continue
        assert (consumed, batch.err, batch.cons >> 24) == (done, cerror, cerror), batch.id
        compared[cerror] += 1
    assert sum(compared.values()) == len(found)
    assert min(compared.values()) > 10, compared
