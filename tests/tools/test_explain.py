"""explain() is true to the walk, names a reason for each fault, and never raises."""

import re

import captures
import nested
import pytest
import tablegen
import twin
from bench import CONTEXT_TABLE, SID, nested_system
from nested import NESTED, SECOND, small_nested
from rawfeatures import raw

import smmufast
from smmufast import layout
from smmufast.capture import Capture
from smmufast.explain import (
    _ips,
    describe_cd,
    describe_ste,
    explain,
    memory_type,
    stage2_memory_type,
)

MAKERS = [tablegen.random_system, tablegen.random_nested_system, tablegen.random_bytes_system]
# A line that says where something was fetched: a step, one of stage 2, or the end of these.
FETCHED = re.compile(r"^(?:\d+\.| {5}\d+\.\d+\.| {5}Stage 2 puts it) .*?at (0x\w+):$", re.MULTILINE)


def drawn(maker, seed, systems, requests):
    """(Smmu, traced Result) of random systems."""
    for smmu, system in captures.random_systems(maker, seed, systems):
        for request in system.requests(requests):
            access = request._asdict()
            sid, iova = access.pop("sid"), access.pop("iova")
            yield smmu, smmu.translate(sid, iova, trace=True, **access), access


@pytest.mark.parametrize("maker", MAKERS)
def test_every_end_is_explained_by_every_form_of_a_result(maker):
    ends = set()
    for smmu, result, access in drawn(maker, 31, 60, 60):
        name = result.fault.name if result.fault else result.action
        ends.add(name)
        if result.fault and result.fault.fields.get("S2"):
            ends.add((name, result.fault.fields["CLASS"]))
        text = explain(result, smmu)
        alone = explain(result)
        plain = explain(smmu.translate(result.sid, result.iova, **access))
        for words in (text, alone, plain):
            assert f"{result.iova:#x} by stream {result.sid:#x}" in words.splitlines()[0]
            assert all(len(line) <= 110 for line in words.splitlines())
            if result.fault:
                assert f"Outcome: {name}; " in words
            if result:
                assert f"{result.pa:#x}" in words.partition("Outcome: ")[2]
        told = [int(address, 16) for address in FETCHED.findall(text)]
        assert told == [fetch.address for fetch in result.fetches]
        if not (result.stage & 2 or any(fetch.kind == "S2TT" for fetch in result.fetches)):
            assert len(re.findall(r"^\d+\. ", text, re.MULTILINE)) == len(result.fetches)
        assert not re.search(r"^\d+\. ", plain, re.MULTILINE)
        if result.fault:
            assert "  Because " in text, text
            assert ("Nothing is recorded" in text) == (result.event is None)
            if result.event is None:
                assert re.search(r"Nothing is recorded \(.*=0", text), text
            if result.fault.number >= 0x10:
                assert check_control(text, result), text
        if e0pd := re.search(r"unprivileged, and E0PD([01])=1", text):
            cd = layout.unpack("CD", result.fetches[-1].data)
            assert cd[f"E0PD{e0pd[1]}"] == 1
            assert result.fault.fields["PnU"] == 0
            ends.add("E0PD")
    if maker is tablegen.random_nested_system:
        faults = ("F_TRANSLATION", "F_ADDR_SIZE", "F_ACCESS", "F_PERMISSION", "F_WALK_EABT")
        wanted = {(name, where) for name in faults for where in range(3)}
        assert len(ends & wanted) >= 9, ends  # some are rare
    if maker is tablegen.random_system:
        assert ends >= {
            "ok",
            "bypass",
            "abort",
            "C_BAD_STREAMID",
            "C_BAD_STE",
            "C_BAD_CD",
            "C_BAD_SUBSTREAMID",
            "F_STREAM_DISABLED",
            "F_STE_FETCH",
            "E0PD",
            "F_CD_FETCH",
            "F_WALK_EABT",
            "F_TRANSLATION",
            "F_ADDR_SIZE",
            "F_ACCESS",
            "F_PERMISSION",
        }


def check_control(text, result):
    """Whether the control that is named gives the outcome."""
    found = re.search(r"Fault control: (?:A=(\d), )?(?:S2)?R=(\d), (?:S2)?S=(\d): (\w+)", text)
    if found is None:
        return "always aborts, and is recorded" in text and result.action == "abort"
    a, r, stalls = (None if bit is None else int(bit) for bit in found.groups()[:3])
    assert ("S2R" in found[0]) == bool(result.fault.fields["S2"]) == (a is None)
    action = "stall" if stalls else "raz_wi" if a == 0 else "abort"
    assert found[4] == {"raz_wi": "read"}.get(action, action)
    return result.action == action and (r or stalls or result.event is None)


@pytest.mark.parametrize("maker", MAKERS)
def test_an_ste_or_cd_is_refused_for_the_reason_that_the_rules_alone_give(maker):
    refused = 0
    for smmu, result, _access in drawn(maker, 32, 80, 40):
        data = {fetch.kind: fetch.data for fetch in result.fetches if fetch.data is not None}
        if "STE" not in data:
            continue
        why = smmu.check_ste(data["STE"])
        if why is None and "CD" in data:
            why = smmu.check_cd(data["CD"], data["STE"])
        structure = result.why is not None and result.why.name.startswith(("STE_", "CD_"))
        fetched = structure and result.why.name.endswith(("_ADDRESS", "_ABORT"))
        assert why == (result.why if structure and not fetched else None)
        refused += why is not None
    assert refused > 50


def test_tables_and_entries_are_those_of_the_walk():
    tables = pages = 0
    for smmu, result, _access in drawn(tablegen.random_system, 33, 60, 40):
        text = explain(result, smmu)
        steps = [fetch for fetch in result.fetches if fetch.kind == "TT"]
        named = [int(m, 16) for m in re.findall(r"a table, the next one, at (0x\w+)\.", text)]
        entries = [
            (int(index), int(table, 16))
            for index, table in re.findall(
                r"Entry (\d+) \(bit.*?\) of the table at (0x\w+)\.", text
            )
        ]
        assert len(entries) == sum(step.data is not None for step in steps)
        for (index, table), step in zip(entries, steps, strict=False):
            assert table + 8 * index == step.address
        for address, (_, table) in zip(named, entries[1:], strict=False):
            assert address == table
            tables += 1
        if result.action == "ok":
            (base,) = re.findall(r"(?:page|block) of \d+ \w+ at (0x\w+)\.", text)
            assert int(base, 16) == result.pa & -result.page_size
            pages += 1
            permitted = re.search(r"Permitted: unprivileged: (.*); privileged: (.*)\.", text)
            perm = 0
            for group, words in enumerate(permitted.groups()):
                for bit, word in enumerate(("read", "write", "execute")):
                    perm |= (word in words) << bit + 3 * group
            assert perm == result.perm
    assert tables > 200
    assert pages > 200


def entries_of(text):
    """What is told of the entries of stage-2 tables: index, bits, number of the table."""
    line = (
        r"Entry (\d+) \(bits? (\d+)(?: to (\d+))? of the IPA\) of the table at (0x\w+)"
        r"(?:, number (\d+) of \d+ side by side \(bits? (\d+)(?: to (\d+))?\))?\."
    )
    return re.findall(line, text)


def test_walks_of_stage_2_translate_the_ipas_that_are_named():
    compared = concatenated = failed = stage1 = 0
    for smmu, result, _access in drawn(tablegen.random_nested_system, 34, 60, 40):
        text = re.sub(r"\n {11,}(?=\S)", " ", explain(result, smmu)).replace("\n       ", " ")
        steps = re.split(r"^(?=\d+\. )", text.partition("\nOutcome:")[0], flags=re.MULTILINE)
        before = None
        for step in steps:
            head = re.match(r"\d+\. .*IPA (0x\w+)", step)
            if head is None:
                continue
            ipa = int(head[1], 16)
            if before is not None and "Translation table descriptor" in head[0]:
                for index, table in re.findall(
                    r"Entry (\d+) .*of the address.* at IPA (0x\w+)\.", step
                ):
                    assert int(table, 16) + 8 * int(index) == ipa
                    assert int(table, 16) == before
                    stage1 += 1
            following = re.findall(r"next one, at IPA (0x\w+)\.", step)
            before = int(following[0], 16) if following else None
            walk = entries_of(step)
            addresses = [
                int(address, 16)
                for address in re.findall(r"Stage-2 descriptor, level -?\d, at (0x\w+):", step)
            ]
            ends = re.findall(r"a (?:page|block) of (\d+) (\w+) at (0x\w+)\.", step)
            seen = lowest = 0
            for (index, high, low, table, number, _, above), address in zip(
                walk, addresses, strict=False
            ):
                assert int(table, 16) + 8 * int(index) == address
                lowest = int(low or high)
                seen |= int(index) << lowest
                if number:
                    concatenated += number != "0"
                    seen |= int(number) << int(above or int(high) + 1)
            if walk and "starts again" not in step and len(walk) == len(addresses):
                assert seen == ipa >> lowest << lowest, step
                compared += 1
            place = re.search(r"Stage 2 puts it at (0x\w+):", step)
            if place and ends:
                assert int(place[1], 16) & (1 << lowest) - 1 == ipa & (1 << lowest) - 1
        named = re.search(r"Stage 2 of the access, IPA (0x\w+)", text)
        if result.action == "ok" and result.stage & 2:
            assert int(named[1], 16) == result.ipa
        if result.fault and result.fault.fields.get("S2") and "IPA" in result.fault.fields:
            (at,) = re.findall(r"at IPA (0x\w+) \(S2=1", text)
            assert int(at, 16) & -4096 == result.fault.fields["IPA"]
            failed += 1
    assert compared > 2000
    assert concatenated > 50
    assert stage1 > 500
    assert failed > 100


def test_hardware_updates_say_what_was_swapped_and_why():
    updates = {}
    for smmu, result, _access in drawn(tablegen.random_nested_system, 35, 80, 40):
        text = explain(result, smmu)
        told = re.findall(
            r"Hardware update of the (stage-2 )?descriptor.*?\n +(0x\w+) becomes (0x\w+)\n"
            r"((?: +\S+=[01] .*\n)+)",
            text,
        )
        swaps = [fetch for fetch in result.fetches if fetch.swap is not None]
        assert len(told) == len(swaps)
        for (second, before, after, changes), fetch in zip(told, swaps, strict=True):
            assert bool(second) == (fetch.kind == "S2TT update")
            orders = [
                tuple(int.from_bytes(word.to_bytes(8, "little"), order) for word in fetch.swap)
                for order in ("little", "big")
            ]
            assert (int(before, 16), int(after, 16)) in orders
            bits = int(before, 16) ^ int(after, 16)
            assert bool(bits >> 10 & 1) == ("AF=1" in changes)
            assert bool(bits >> 7 & 1) == (("S2AP[1]=1" if second else "AP[2]=0") in changes)
            assert bits & ~(1 << 10 | 1 << 7) == 0
            updates[bool(second), bits] = updates.get((bool(second), bits), 0) + 1
    assert len(updates) == 6, updates  # both stages: access flag, dirty, both


def test_a_descriptor_that_changes_meanwhile_is_walked_to_again():
    smmu = small_nested({"httu": 2}, s2ha=1, s2hd=1, cd={"ha": 1}, stage1={"af": 0})
    walk = smmu.start_walk(NESTED, nested.RW)
    changed = False
    while (fetch := walk.request) is not None:
        data = smmu.memory.read(fetch.address, fetch.size)
        if fetch.swap is not None and not changed:
            changed = True
            data = (fetch.swap[0] | 1 << 55).to_bytes(8, "little")
        walk.supply(data)
    text = explain(walk.result, smmu)
    assert walk.result.pa == nested.PAGES + nested.RW
    assert text.count("is there by now: the walk starts again.") == 1
    assert text.count("Hardware update of the descriptor") == 2
    assert text.count("Translation table descriptor, level 1") == 2
    assert FETCHED.findall(text) == [hex(fetch.address) for fetch in walk.result.fetches]


def test_no_host_makes_a_walk_start_again_without_end():
    smmu = small_nested({"httu": 2}, s2ha=1, s2hd=1, cd={"ha": 1}, stage1={"af": 0})
    walk = smmu.start_walk(NESTED, nested.RW)
    changes = 0
    while (fetch := walk.request) is not None:
        data = smmu.memory.read(fetch.address, fetch.size)
        if fetch.swap is not None and changes < 300:
            changes += 1
            data = (fetch.swap[0] ^ changes << 55).to_bytes(8, "little")
        walk.supply(data)
    assert changes < 300  # the SMMU gives up before
    text = explain(walk.result, smmu)
    assert text.count("is there by now: the walk starts again.") == changes
    assert len(text.splitlines()) < 20 * len(walk.result.fetches) < 10_000


def test_explain_takes_results_and_smmus_alone():
    smmu = small_nested()
    with pytest.raises(TypeError, match="result must be a Result, not 5"):
        explain(5)
    with pytest.raises(TypeError, match="smmu must be a Smmu or None, not 'x'"):
        explain(smmu.translate(NESTED, 0), "x")


def test_stage_2_alone_reads_like_this():
    smmu = small_nested()
    assert explain(smmu.translate(SECOND, nested.DATA + 0x5010, trace=True), smmu) == STAGE2.strip()


STAGE2 = """
A read of 0x8090005010 by stream 0x4.

1. Stream table entry (STE), at 0x40000100:
     0x000000008000000d 0x0000100000000000 0x040a005800000009 0x0000000041000000
     0x0000000000000000 0x0000000000000000 0x0000000000000000 0x0000000000000000
     V=1                       the entry is valid
     Config=0b110              stage 2 translates, stage 1 is bypassed
     S2VMID=0x9                the virtual machine
     S2TG=0b00                 granule of stage 2: 4 KiB
     S2T0SZ=24                 stage 2 takes 40 bits of IPA: 0x0 to 0xffffffffff
     S2SL0=0b01                its walk starts at level 1, in 2 tables side by side
     S2TTB=0x41000000          where the first stage-2 table lies
     S2PS=2                    output addresses of stage 2 have at most 40 bits
     S2R, S2S=1, 0             on a fault of stage 2: abort, record an event

2. Stage 2 of the access, IPA 0x8090005010 (the input address):
     2.1. Stage-2 descriptor, level 1, at 0x41001010:
          0x0000000041004003
          Entry 2 (bits 38 to 30 of the IPA) of the table at 0x41001000, number 1 of 2 side by side
            (bit 39).
          Bits 1 to 0 are 0b11: a table, the next one, at 0x41004000.

     2.2. Stage-2 descriptor, level 2, at 0x41004400:
          0x0000000041005003
          Entry 128 (bits 29 to 21 of the IPA) of the table at 0x41004000.
          Bits 1 to 0 are 0b11: a table, the next one, at 0x41005000.

     2.3. Stage-2 descriptor, level 3, at 0x41005028:
          0x00000000490054c7
          Entry 5 (bits 20 to 12 of the IPA) of the table at 0x41005000.
          Bits 1 to 0 are 0b11: a page of 4 KiB at 0x49005000.
          AF=1                      access flag: the page may be used
          S2AP=0b11                 read and write
          XN=0b00                   all may execute
          MemAttr=0b0001            Device-nGnRE
          SH=0b00                   non-shareable

Outcome: physical address 0x49005010.
  It is 0x10 into the 4 KiB page at 0x49005000 (level 3).
  Permitted: unprivileged: read, write, execute; privileged: read, write, execute.
  Memory type: Device-nGnRE; outer shareable.
  (Stage 2 says: Device-nGnRE; of this and what the device and the STE say the stricter counts.)
"""


def test_nested_ends_say_what_each_stage_gives():
    smmu = small_nested()
    text = explain(smmu.translate(NESTED, nested.RW + 8, trace=True), smmu)
    assert "Stage 2 of the access, IPA 0x8090001008 (the output of stage 1):" in text
    assert "  Stage 1 maps 4 KiB, stage 2 4 KiB: the smaller counts." in text
    assert "Stage 1 permits: unprivileged: read, write, execute; privileged: read, write." in text
    assert "(Stage 2 says: Normal, write-back; of this and stage 1's the stricter counts.)" in text
    smmu = small_nested({"fwb": 1, "arch_minor": 3}, s2fwb=1, tables={"memattr": 6})
    text = explain(smmu.translate(NESTED, nested.DEVICE, trace=True), smmu)
    assert "MemAttr=0b0110            Normal, write-back, whatever stage 1 says (S2FWB=1)" in text
    assert "(Stage 2 says: Device-nGnRE; by S2FWB=1.)" in text


# Changes of features, fields, and what must be said of them.
ILLEGAL = [
    ({}, {"s2aa64": 0}, "STE_S2AA64"),
    ({}, {"s2s": 1}, "STE_S2S_NEVER"),
    ({"stall_model": 2, "stall_max": 1}, {}, "STE_S2S_ALWAYS"),
    ({}, {"s2endi": 1}, "STE_S2ENDI"),
    ({}, {"s2ha": 1}, "STE_S2HTTU"),
    ({}, {"s2hd": 1}, "STE_S2HTTU"),
    ({"httu": 1}, {"s2ha": 1, "s2hd": 1}, "STE_S2HTTU"),
    ({}, {"s2tg": 3}, "STE_S2TG"),
    ({"gran16k": 0}, {"s2tg": 2}, "STE_S2TG"),
    ({}, {"s2t0sz": 19, "s2sl0": 2}, "STE_S2T0SZ"),
    ({}, {"s2t0sz": 40, "s2sl0": 0}, "STE_S2T0SZ"),
    ({}, {"s2sl0": 3}, "STE_S2SL0"),
    ({"oas": 3}, {"s2sl0": 2}, "STE_S2SL0"),
    ({"ds": 1, "vax": 1, "oas": 6}, {"s2ds": 1, "s2sl0": 1, "s2sl0_2": 1}, "STE_S2SL0"),
    ({}, {"s2sl0": 0}, "STE_S2SL0_SIZE"),
    ({}, {"s2t0sz": 34}, "STE_S2SL0_SIZE"),
    ({}, {"s2tg": 1, "s2sl0": 2}, "STE_S2SL0_SIZE"),
    ({}, {"s2ttb": 1099511627776}, "STE_S2TTB"),
    ({"oas": 6}, {"s2ps": 6, "s2ttb": 281474976710656}, "STE_S2TTB_48"),
    ({"vmid16": 0}, {"s2vmid": 256}, "STE_S2VMID"),
    ({"s2p": 0}, {}, "STE_S2P"),
    ({"ats": 1}, {"eats": 2, "config": 6}, "STE_EATS_STAGES"),
    ({"ats": 1, "ns1ats": 1}, {"eats": 2}, "STE_EATS_NS1ATS"),
    ({"ats": 1, "stall_model": 0, "stall_max": 1}, {"eats": 1, "s2s": 1}, "STE_EATS_S2S"),
]


@pytest.mark.parametrize(("has", "fields", "name"), ILLEGAL)
def test_each_illegal_stage_2_is_named_and_refused(has, fields, name):
    smmu = small_nested(has, **fields)
    result = smmu.translate(NESTED, nested.RW, trace=True)
    assert (result.fault.name, result.why.name) == ("C_BAD_STE", name)
    ste = smmu.memory.read(captures.STREAM_TABLE + 64 * NESTED, 64)
    sentence = result.why.sentence(layout.unpack("STE", ste), smmu.features)
    unwrapped = explain(result, smmu).replace("\n    ", " ")
    assert f"  Because {sentence} ({result.why.rule})." in unwrapped
    assert unwrapped.count("  Because ") == 1
    assert smmu.check_ste(ste) is result.why
    untraced = smmu.translate(NESTED, nested.RW).explain().replace("\n    ", " ")
    assert f"  Because {result.why.sentence()} ({result.why.rule})." in untraced
    # and those of stage 2 do not count where it is not enabled
    if name.startswith("STE_S2") and name not in ("STE_S2VMID", "STE_S2P"):
        word = int.from_bytes(ste, "little") & ~layout.mask("STE", "Config")
        assert smmu.check_ste((word | layout.pack("STE", Config=5)).to_bytes(64, "little")) is None


def because(result, smmu):
    """The reason as it is told, once it is seen to be the sentence of result.why."""
    text = explain(result, smmu)
    (told,) = re.findall(r"Because (.*)\.$", re.sub(r"\n {4}(?=\S)", " ", text), re.MULTILINE)
    assert told.endswith(f" ({result.why.rule})")
    return told.removesuffix(f" ({result.why.rule})")


def test_the_reason_of_each_fault_of_stage_2_is_named():
    def why(has=None, *, sid=NESTED, iova=nested.RW, write=False, **system):
        smmu = small_nested(has, **system)
        result = smmu.translate(sid, iova, trace=True, write=write)
        text = re.sub(r"\n {4}(?=\S)", " ", explain(result, smmu))
        (whose,) = re.findall(r"^  Stage (\d found it.*)\.$", text, re.MULTILINE)
        assert because(result, smmu)
        return result.why.name, whose

    access = "2 found it, for the access itself, at IPA"
    assert why(iova=nested.UNMAPPED) == (
        "S2_INVALID",
        f"{access} 0x8090004000 (S2=1, CLASS=IN)",
    )
    assert why(sid=SECOND, iova=1 << 40) == (
        "S2T0SZ_RANGE",
        f"{access} 0x10000000000 (S2=1, CLASS=IN)",
    )
    assert why(iova=nested.NO_AF)[0] == "S2_AF"
    assert why(iova=nested.READ_ONLY_OUTSIDE, write=True)[0] == "S2_PERMISSION"
    assert why(iova=nested.READ_ONLY, write=True) == (
        "S1_PERMISSION",
        "1 found it, for the access itself (S2=0, CLASS=IN)",
    )
    smmu = small_nested()
    last = smmu.translate(SECOND, nested.DATA, trace=True).fetches[-1]
    smmu.memory.write(last.address, (last.value | 1 << 43).to_bytes(8, "little"))
    assert because(smmu.translate(NESTED, 0, trace=True), smmu) == (
        "the output of stage 2 is beyond the output size (S2PS=0b010, IDR5.OAS)"
    )
    assert why(tables={"memattr": 1}, s2ptw=1) == (
        "S2_DEVICE",
        "2 found it, for the fetch of a context descriptor, at IPA 0x80000000 (S2=1, CLASS=CD)",
    )
    assert why(tables={"s2ap": 2})[0] == "S2_PERMISSION"
    assert why({"httu": 1}, cd={"ha": 1}, stage1={"af": 0}, tables={"s2ap": 1}) == (
        "S2_UPDATE",
        "2 found it, for the walk of stage 1, at IPA 0x80102008 (S2=1, CLASS=TT)",
    )
    assert why(s1contextptr=1 << 41) == (
        "S2T0SZ_RANGE",
        "2 found it, for the fetch of a context descriptor, at IPA 0x20000000000 (S2=1, CLASS=CD)",
    )


def test_a_walk_of_the_kernels_tables_reads_like_this():
    (configuration,) = Capture.load(captures.SHIPPED)
    smmu = configuration.smmu()
    assert explain(smmu.translate(0x10, 0xFFFE0FC0, trace=True), smmu) == WALK.strip()


WALK = """
A read of 0xfffe0fc0 by stream 0x10.

1. Level-1 stream table descriptor (L1STD), at 0x44d23000:
     0x000000005be20009
     Span=9                    the level-2 table has 256 entries
     L2Ptr=0x5be20000          where it lies

2. Stream table entry (STE), at 0x5be20400:
     0x0000000044ee600b 0x00000000000000d6 0x0000000000000000 0x0000000000000000
     0x0000000000000000 0x0000000000000000 0x0000000000000000 0x0000000000000000
     V=1                       the entry is valid
     Config=0b101              stage 1 translates, stage 2 is bypassed
     S1ContextPtr=0x44ee6000   where the context descriptor lies
     S1CDMax=0                 one context descriptor; the stream has no substreams

3. Context descriptor (CD), at 0x44ee6000:
     0x0002e204c0003510 0x0000000044ee5000 0x0000000000000000 0xfffffffff404ff44
     0x0000000000000000 0x0000000000000000 0x0000000000000000 0x0000000000000000
     V=1                       the descriptor is valid
     Bit 55 of the address is 0: TTB0, the lower half, translates it.
     T0SZ=16                   48 bits of address: 0x0 to 0xffffffffffff
     TG0=0b00                  granule (size of a page): 4 KiB
     TTB0=0x44ee5000           where the first table lies
     IPS=4                     output addresses have at most 44 bits
     ASID=0x2                  the address space
     A, R=1, 1                 on a fault: abort, record an event

4. Translation table descriptor, level 0, at 0x44ee5000:
     0x0000000044b00003
     Entry 0 (bits 47 to 39 of the address) of the table at 0x44ee5000.
     Bits 1 to 0 are 0b11: a table, the next one, at 0x44b00000.

5. Translation table descriptor, level 1, at 0x44b00018:
     0x0000000044b0d003
     Entry 3 (bits 38 to 30 of the address) of the table at 0x44b00000.
     Bits 1 to 0 are 0b11: a table, the next one, at 0x44b0d000.

6. Translation table descriptor, level 2, at 0x44b0dff8:
     0x0000000044b68003
     Entry 511 (bits 29 to 21 of the address) of the table at 0x44b0d000.
     Bits 1 to 0 are 0b11: a table, the next one, at 0x44b68000.

7. Translation table descriptor, level 3, at 0x44b68f00:
     0x0000000048005f47
     Entry 480 (bits 20 to 12 of the address) of the table at 0x44b68000.
     Bits 1 to 0 are 0b11: a page of 4 KiB at 0x48005000.
     AF=1                      access flag: the page may be used
     AP[2:1]=0b01              all: read and write
     PXN=0                     execution by privileged code is not forbidden
     UXN=0                     execution by unprivileged code is not forbidden
     AttrIndx=1                MAIR byte 0xff: Normal, write-back, read and write allocate
     SH=0b11                   inner shareable
     nG=1                      of this ASID alone

Outcome: physical address 0x48005fc0.
  It is 0xfc0 into the 4 KiB page at 0x48005000 (level 3).
  Permitted: unprivileged: read, write, execute; privileged: read, write.
  (What unprivileged code may write, privileged code may not execute.)
  Memory type: Normal, write-back, read and write allocate; inner shareable.
"""


def test_the_reason_of_each_fault_is_named():
    smmu = captures.small_system()

    def why(sid, iova, **access):
        return because(smmu.translate(sid, iova, trace=True, **access), smmu)

    sid = captures.SID
    assert why(16, 0) == (
        "StreamID=0x10 is not below 2^LOG2SIZE, the size of the stream table (STRTAB_BASE_CFG)"
    )
    assert why(9, 0) == "the stream table entry has V=0"
    assert why(4, 1 << 44) == (
        "no stage 1 translates the address, and it is beyond the physical address size (IDR5.OAS)"
    )
    assert why(4, 0, ssid=1) == "a stream without stage 1 has no substreams (Config=0b100)"
    assert why(sid, 0, ssid=1) == "the stream has no substreams (S1CDMax=0, IDR1.SSIDSIZE=0)"
    assert why(sid, 0, write=True) == "stage 1 does not permit the access"
    assert why(sid, 0x3000, priv=True) == (
        "the page's stage-1 descriptor has AF=0, and neither AFFD nor the SMMU sets it"
    )
    assert why(sid, 0x9000) == "the stage-1 descriptor (Level=3) is invalid: its bit 0 is 0"
    assert why(sid, 1 << 39) == (
        "the address is outside of the 64-T0SZ bits that TTB0 translates (T0SZ=25, TBI0=0)"
    )
    assert why(sid, 1 << 55) == "TTB1 is disabled (EPD1=1)"


def test_a_silent_abort_says_why_with_and_without_a_trace_and_its_smmu():
    smmu = captures.small_system()
    off = smmufast.Smmu(smmu.memory, smmu.features, cr0=0, gbpa=1 << 20)
    beyond = smmufast.Smmu(smmu.memory, smmu.features, cr0=0)
    for given, iova, name in (
        (smmu, 0, "STE_CONFIG"),
        (off, 0, "GBPA_ABORT"),
        (beyond, 1 << 50, "GBPA_ADDRESS"),
    ):
        for trace in (False, True):
            result = given.translate(5, iova, trace=trace)
            assert (result.why.name, result.why.event) == (name, None)
            for told in (None, given):
                text = explain(result, told)
                assert "Outcome: abort, without an event." in text
                assert because(result, told)


def test_what_passes_untranslated_says_why():
    smmu = captures.small_system()
    text = explain(smmu.translate(4, 0x1234, trace=True), smmu)
    assert "it passes untranslated, as 0x1234: the STE bypasses both stages." in text
    off = smmufast.Smmu(smmu.memory, smmu.features, cr0=0)
    text = explain(off.translate(4, 0x1234, trace=True))
    assert "the SMMU is disabled (CR0.SMMUEN=0), it passes as 0x1234." in text
    system = captures.small_system(s1cdmax=2, s1dss=1)
    features = system.features.replace(ssidsize=4)
    smmu = smmufast.Smmu(system.memory, features, strtab_base=system.strtab_base, strtab_base_cfg=4)
    text = explain(smmu.translate(captures.SID, 0x1234, trace=True), smmu)
    assert "as 0x1234: without a substream, S1DSS bypasses stage 1." in text


def test_resumable_walks_are_explained_as_they_went():
    smmu = captures.small_system()
    walk = smmu.start_walk(captures.SID, 0x1000, write=True)
    while walk.request is not None:
        data = smmu.memory.read(walk.request.address, walk.request.size)
        walk.supply(None if walk.request.level == 2 else data)
    text = explain(walk.result, smmu)
    assert "the read ended in an external abort" in text
    reason = "the read of a stage-1 descriptor ended in an external abort (S7.3.12-2)"
    assert f"Because {reason}." in text
    assert text == explain(walk.result)


def test_memory_types_of_stage_2():
    assert stage2_memory_type(0b0001, False) == "Device-nGnRE"
    assert stage2_memory_type(0b0101, False) == "Normal, non-cacheable"
    assert stage2_memory_type(0b1011, False) == "Normal, inner write-back; outer write-through"
    assert stage2_memory_type(0b1100, False) == "reserved, acts as Device-nGnRnE"
    assert stage2_memory_type(0b0111, True) == stage2_memory_type(0b1111, True)
    assert len({stage2_memory_type(code, False) for code in range(16)}) == 14
    assert len({stage2_memory_type(code, True) for code in range(16)}) == 8


def test_memory_types_are_the_words_of_the_architecture():
    assert memory_type(0x00) == "Device-nGnRnE"
    assert memory_type(0x05) == "Device-nGnRE, reserved code"
    assert memory_type(0x44) == "Normal, non-cacheable"
    assert memory_type(0xF4) == (
        "Normal, inner non-cacheable; outer write-back, read and write allocate"
    )
    assert memory_type(0x77) == "Normal, write-back transient, read and write allocate"
    assert memory_type(0x88) == "Normal, write-through, no allocate"
    assert memory_type(0xA0).endswith("inner 0b0000 is reserved")
    assert len({memory_type(attr) for attr in range(256)}) > 200


def test_lines_of_stream_lists_hold_what_counts():
    ste = layout.to_bytes(
        "STE", layout.pack("STE", V=1, Config=5, S1ContextPtr=0x1000, S1CDMax=3, S1DSS=2, PRIVCFG=2)
    )
    assert describe_ste(ste) == (
        "Config=0b101 (STAGE_1) S1ContextPtr=0x1000 S1CDMax=3 S1Fmt=0 S1DSS=0b10 PRIVCFG=0x2"
    )
    assert describe_ste(bytes(64)) == "V=0 (invalid)"
    ste = layout.to_bytes(
        "STE", layout.pack("STE", V=1, Config=6, S2TTB=0x2000, S2T0SZ=24, S2SL0=1, S2VMID=5)
    )
    assert describe_ste(ste) == (
        "Config=0b110 (STAGE_2) S2TTB=0x2000 S2T0SZ=24 S2SL0=1 S2TG=4K S2PS=32 bits S2VMID=0x5"
    )
    flags = {name: 1 for name in ("S2AA64", "S2R", "S2PTW", "S2HA", "S2FWB")}
    ste = layout.to_bytes("STE", layout.pack("STE", V=1, Config=7, S1ContextPtr=0x40, **flags))
    assert describe_ste(ste) == (
        "Config=0b111 (NESTED) S1ContextPtr=0x40 S1CDMax=0 S2TTB=0x0 S2T0SZ=0 S2SL0=0 S2TG=4K "
        "S2PS=32 bits S2AA64 S2R S2PTW S2HA S2FWB"
    )
    cd = layout.to_bytes(
        "CD",
        layout.pack(
            "CD", V=1, AA64=1, A=1, EPD1=1, T0SZ=25, TG0=2, TTB0=0x3000, IPS=5, ASID=9, ENDI=1
        ),
    )
    assert describe_cd(cd) == "TTB0=0x3000 16K T0SZ=25 EPD1=1 IPS=48 bits ASID=0x9 AA64 A ENDI"
    assert describe_cd(bytes(64)) == "V=0 (invalid)"


def test_pointers_of_v3_0_have_48_bits():
    bench, iova, _ = nested_system()
    bench.features.arch_minor, bench.features.ds, bench.features.vax = 0, 0, 0
    bench.features.oas = 5
    beyond = 1 << 50
    bench.write_ste(s1contextptr=CONTEXT_TABLE | beyond, s2ps=5)
    bench.write_cd(ttb0=bench.tables.base | beyond, ips=5)
    smmu = twin.smmu_of(bench)
    result = smmu.translate(SID, iova, trace=True)
    assert result.pa == 0x5000
    told = [int(ipa, 16) for ipa in re.findall(r"IPA (0x\w+)", explain(result, smmu))]
    assert len(told) > 8 and max(told) < 1 << 48


@pytest.mark.parametrize(
    ("code", "oas", "minor", "bits"),
    [(5, 5, 3, 48), (6, 5, 3, 48), (6, 6, 3, 52), (3, 6, 3, 42), (6, 3, 1, 42), (7, 5, 0, 48)],
)
def test_output_sizes_are_limited_by_oas(code, oas, minor, bits):
    features = raw(oas=oas, arch_minor=minor, gran64k=1, ttf=2, s1p=1)
    assert _ips(code, features) == bits


def test_an_error_of_a_translated_transaction_is_recorded_if_asked():
    smmu = small_nested({"ats": 1})
    smmu.write("CR0", smmu.cr0 | layout.mask("CR0", "ATSCHK"))
    smmu.memory.write_u64(captures.STREAM_TABLE + 64 * NESTED, 0)
    result = smmu.ats_translated(NESTED, 0x1000)
    assert (result.fault.name, result.event) == ("C_BAD_STE", None)
    assert "CR2.REC_CFG_ATS=0" in explain(result, smmu)
    assert "CR2.REC_CFG_ATS" not in explain(smmu.translate(NESTED, 0), smmu)
