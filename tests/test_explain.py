"""explain() is true to the walk, names a reason for each fault, and never raises."""

import re

import captures
import pytest
import tablegen

import smmufast
from smmufast import layout
from smmufast.capture import Capture
from smmufast.explain import cd_faults, describe_cd, describe_ste, explain, memory_type, ste_faults


def drawn(maker, seed, systems, requests):
    """(Smmu, traced Result) of random systems."""
    for smmu, system in captures.random_systems(maker, seed, systems):
        for request in system.requests(requests):
            access = request._asdict()
            sid, iova = access.pop("sid"), access.pop("iova")
            yield smmu, smmu.translate(sid, iova, trace=True, **access), access


@pytest.mark.parametrize("maker", [tablegen.random_system, tablegen.random_bytes_system])
def test_every_end_is_explained_by_every_form_of_a_result(maker):
    ends = set()
    for smmu, result, access in drawn(maker, 31, 60, 60):
        name = result.fault.name if result.fault else result.action
        ends.add(name)
        text = explain(result, smmu)
        alone = explain(result)
        plain = explain(smmu.translate(result.sid, result.iova, **access))
        for words in (text, alone, plain):
            assert f"{result.iova:#x} by stream {result.sid:#x}" in words.splitlines()[0]
            assert all(len(line) <= 110 for line in words.splitlines())
            if result.fault:
                assert f"Outcome: {name} (" in words
            if result:
                assert f"{result.pa:#x}" in words.partition("Outcome: ")[2]
        for fetch in result.fetches:
            assert f"at {fetch.address:#x}:" in text
        assert len(re.findall(r"^\d+\. ", text, re.MULTILINE)) == len(result.fetches)
        assert not re.search(r"^\d+\. ", plain, re.MULTILINE)
        if result.fault:
            assert "  Because " in text, text
            assert ("Nothing is recorded" in text) == (result.event is None)
            if result.event is None:
                assert re.search(r"Nothing is recorded \(.*=0", text), text
        if e0pd := re.search(r"unprivileged, and E0PD([01])=1", text):
            cd = layout.unpack("CD", result.fetches[-1].data)
            assert cd[f"E0PD{e0pd[1]}"] == 1
            assert result.fault.fields["PnU"] == 0
            ends.add("E0PD")
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


@pytest.mark.parametrize("maker", [tablegen.random_system, tablegen.random_bytes_system])
def test_an_ste_or_cd_has_a_fault_exactly_when_it_is_refused(maker):
    refused = 0
    for smmu, result, _access in drawn(maker, 32, 80, 40):
        data = {fetch.kind: fetch.data for fetch in result.fetches if fetch.data is not None}
        name = result.fault.name if result.fault else result.action
        if "STE" not in data:
            continue
        ste = layout.unpack("STE", data["STE"])
        if not ste["V"] or not ste["Config"] & 4:
            assert name in ("C_BAD_STE", "abort")
            continue
        assert bool(ste_faults(ste, smmu.features)) == (name == "C_BAD_STE"), (ste, name)
        if "CD" in data:
            cd = layout.unpack("CD", data["CD"])
            hyp = smmu.features.hyp and ste["Config"] == 5 and ste["STRW"] == 2
            two = not hyp or bool(smmu.cr2 & 1)
            illegal = not cd["V"] or bool(cd_faults(cd, ste, smmu.features, two))
            assert illegal == (name == "C_BAD_CD"), (cd, name)
        refused += name in ("C_BAD_STE", "C_BAD_CD")
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
        text = explain(smmu.translate(sid, iova, trace=True, **access), smmu)
        return re.findall(r"Because (.*)\.$", text.replace("\n    ", " "), re.MULTILINE)

    sid = captures.SID
    assert why(16, 0) == [
        "StreamID 0x10 is not below 2^4, the size of the stream table (STRTAB_BASE_CFG)"
    ]
    assert why(9, 0) == ["it has V=0"]
    assert why(4, 1 << 44) == [
        "0x100000000000 is beyond the physical address size of 44 bits (IDR5.OAS)"
    ]
    assert why(4, 0, ssid=1) == ["a stream without stage 1 has no substreams"]
    assert why(sid, 0, ssid=1) == ["this SMMU has no substreams (IDR1.SSIDSIZE=0)"]
    assert why(sid, 0, write=True) == ["an unprivileged write is not permitted"]
    assert why(sid, 0x3000, priv=True) == [
        "the page's descriptor has AF=0, and neither AFFD nor the SMMU sets it"
    ]
    assert why(sid, 0x9000) == ["the level 3 descriptor is invalid"]
    assert why(sid, 1 << 39) == [
        "bits 63 to 39 of the address are not all 0: it is outside the 39 bits that TTB0 "
        "translates (T0SZ=25)"
    ]
    assert why(sid, 1 << 55) == ["TTB1 is disabled (EPD1=1)"]


def test_an_end_without_a_trace_says_what_may_have_been():
    smmu = captures.small_system()
    text = smmu.translate(5, 0).explain()
    assert "Either the STE blocks the stream, or the SMMU is disabled" in text
    off = smmufast.Smmu(smmu.memory, smmu.features, cr0=0, gbpa=1 << 20)
    for result, given, words in (
        (smmu.translate(5, 0, trace=True), smmu, "The STE blocks the stream."),
        (off.translate(5, 0, trace=True), off, "and GBPA.ABORT says so."),
        (off.translate(5, 1 << 50), off, "beyond the physical address size."),
        (off.translate(5, 0, trace=True), None, "Nothing was read: the SMMU is disabled"),
    ):
        text = explain(result, given)
        assert words in text
        assert "Outcome: abort, without an event." in text


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
    assert "Because the read of the translation table descriptor at 0x40101000 ended" in text
    assert text == explain(walk.result)


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
        "Config=0b110 (STAGE_2) S2TTB=0x2000 S2T0SZ=24 S2SL0=1 S2TG=4K S2PS=0 S2VMID=0x5"
    )
    cd = layout.to_bytes(
        "CD",
        layout.pack(
            "CD", V=1, AA64=1, A=1, EPD1=1, T0SZ=25, TG0=2, TTB0=0x3000, IPS=5, ASID=9, ENDI=1
        ),
    )
    assert describe_cd(cd) == "TTB0=0x3000 16K T0SZ=25 EPD1=1 IPS=48 bits ASID=0x9 AA64 A ENDI"
    assert describe_cd(bytes(64)) == "V=0 (invalid)"
