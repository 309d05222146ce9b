"""Rules of how an SMMU operates that no other test states alone.

Follows IHI 0070G.b 3.2 to 3.5, 3.11 to 3.13, 3.17, 3.18, 3.21, 16.7.
"""

import itertools

import nested as guest
import numpy as np
import ptwriter
import pytest
import reference
import small
import twin
from atssystems import nested_system as ats_system
from atssystems import rights
from bench import (
    CONTEXT_TABLE,
    SID,
    STREAM_TABLE,
    VMID,
    Bench,
    Nested,
    nested_system,
    stage2_features,
)
from reference import AF, default_features

from smmufast import Caches, Memory, Smmu, layout

IOVA = 0x1234_5000
QUEUE = 0x9000_0000


def smmu_over(bench, **more):
    """A Smmu over the bytes of a Bench, with caches or what else is given."""
    plain = twin.smmu_of(bench)
    return Smmu(plain.memory, plain.features, **vars(bench.regs) | more)


def outcome(smmu, iova=IOVA, sid=SID, **more):
    """The name of a fault, or the address."""
    result = smmu.translate(sid, iova, **more)
    return result.fault.name if result.fault else result.pa


# ------------------------------------------------------------------------------------------------
# Streams and substreams (3.2, 3.3.2)


@pytest.mark.rule("S3.2-3")
def test_substreams_select_a_stage_1_and_all_share_stage_2():
    bench, iova, ipa = nested_system()
    bench.write_ste(s1cdmax=2, s1dss=2)
    bench.write_cd(0, asid=3)
    bench.write_cd(1, asid=4)
    bench.write_cd(2, epd0=1)
    smmu = smmu_over(bench, caches=Caches.server(nested="split"))
    assert outcome(smmu, iova) == outcome(smmu, iova, ssid=1) == 0x5000
    assert outcome(smmu, iova, ssid=2) == "F_TRANSLATION"
    found = [entry for entry in smmu.caches.tlb if entry.start == ipa]
    assert [(entry.kind, entry.vmid, entry.lg2) for entry in found] == [("stage 2", VMID, 12)]
    slot = bench.second.slot(ipa, 3)
    bench.second.write_descriptor(slot, 0)
    assert outcome(smmu, iova, ssid=1) == 0x5000
    assert outcome(smmu, iova, ssid=2) == "F_TRANSLATION"


@pytest.mark.rule("S3.2-2")
@pytest.mark.parametrize("ssidsize", [4, 20])
def test_every_bit_of_a_substream_counts(ssidsize):
    bench = Bench(default_features(ssidsize=ssidsize))
    bench.map(IOVA, 0x5000)
    bench.write_ste(s1cdmax=4)
    bench.write_cd(3)
    assert bench.translate(IOVA, ssid=3).pa == 0x5000
    for bit in range(4, 20):
        assert bench.fault(IOVA, ssid=3 | 1 << bit) == "C_BAD_SUBSTREAMID"


@pytest.mark.rule("S3.3-2")
def test_streams_of_one_vmid_share_stage_2():
    bench = Nested(config=0b110)
    slot = bench.map2(IOVA, 0x5000)
    bench.write_ste(SID + 1)
    bench.write_ste(SID + 2, s2vmid=VMID + 1)
    smmu = smmu_over(bench, caches=Caches.small())
    assert outcome(smmu) == 0x5000
    bench.second.write_descriptor(slot, 0)
    assert outcome(smmu, sid=SID + 1) == 0x5000
    assert outcome(smmu, sid=SID + 2) == "F_TRANSLATION"


@pytest.mark.rule("S3.3.2-5")
@pytest.mark.parametrize("stages", [1, 2])
def test_without_a_substream_a_stream_may_be_as_if_it_had_no_stage_1(stages):
    bench = Nested(stage2_features(oas=3)) if stages == 2 else Bench(default_features(oas=3))
    overrides = {
        "mtcfg": 1, "memattr": 0b1010, "shcfg": 2, "alloccfg": 0b1100, "privcfg": 3, "instcfg": 2,
    }  # fmt: skip
    if stages == 2:
        bench.map2(IOVA, 0x5000, s2ap=1, memattr=0b1111)
    requests = [
        {"iova": iova, "write": write, "instr": instr}
        for iova, write, instr in itertools.product(
            (IOVA, IOVA + 0x1000, 1 << 40, 1 << 42, 1 << 56, 1 << 63), (False, True), (False, True)
        )
    ]

    def rows():
        return [twin.expected_row(bench.translate(**request)) for request in requests]

    for more in ({}, overrides):
        bench.write_ste(config=0b101 | stages - 1 << 1, s1cdmax=4, s1dss=1, **more)
        skipped = rows()
        bench.write_ste(config=0b100 | stages - 1 << 1, s1cdmax=0)
        assert skipped == rows()
        assert {row[2] for row in skipped} >= {0, 0x11}


@pytest.mark.rule("S3.21.3-2")
def test_nothing_is_read_behind_a_structure_that_is_not_valid():
    bench, iova, _ = nested_system()
    bench.write_ste(s1cdmax=8, s1fmt=1, s1dss=2)

    def kinds():
        found = bench.translate(iova)
        assert not found.success
        return [fetch[0] for fetch in found.fetches if fetch[0] != "S2TT"]

    assert kinds() == ["STE", "L1CD"]  # V=0
    at = CONTEXT_TABLE + 0x1000
    bench.map_self(at)
    bench.memory.write(CONTEXT_TABLE, ptwriter.encode_l1cd(at))
    assert kinds() == ["STE", "L1CD", "CD"]  # V=0
    for bad in ({"v": 0}, {"config": 0}, {"s2tg": 3}, {"s1cdmax": 21}):
        good = {name: bench.ste[name] for name in bad}
        bench.write_ste(**bad)
        assert kinds() == ["STE"]
        bench.write_ste(**good)
    bench.regs.strtab_base_cfg = 1 << 16 | 6 << 6 | 6
    bench.memory.write(STREAM_TABLE, bytes(8))  # Span=0
    assert kinds() == ["L1STD"]
    bench.regs.cr0 = 0b100
    bench.regs.gbpa = 1 << 20
    assert kinds() == []


@pytest.mark.rule("S3.3.5-1")
@pytest.mark.parametrize("config", [0b110, 0b111])
def test_reserved_bits_of_stage_2_descriptors_change_nothing(config):
    bench, iova, ipa = nested_system()
    bench.write_ste(config=config)
    if config == 0b110:
        iova = ipa
    leaf, table = (bench.second.slot(ipa, level) for level in (3, 2))
    expected = twin.expected_row(bench.translate(iova))
    for at, first in ((leaf, 55), (table, 51)):
        sound = bench.second.read_descriptor(at)
        for bit in range(first, 64):
            bench.second.write_descriptor(at, sound | 1 << bit)
            assert twin.expected_row(bench.translate(iova)) == expected, bit
        bench.second.write_descriptor(at, sound)


# ------------------------------------------------------------------------------------------------
# Address sizes (3.4)


@pytest.mark.rule("S3.4-11", "S3.4-12")
@pytest.mark.parametrize("s1p", [0, 1])
def test_the_top_byte_counts_where_stage_1_does_not_translate(s1p):
    tagged = 0x5A << 56 | IOVA
    bench = Nested(stage2_features(s1p=s1p, hyp=s1p), config=0b110)
    bench.map2(IOVA, 0x5000)
    bench.write_cd(tbi0=1)
    streams = [{"config": 0b100}, {"config": 0b110}]
    if s1p:
        streams += [{"config": config, "s1cdmax": 4, "s1dss": 1} for config in (0b101, 0b111)]
    for fields in streams:
        bench.write_ste(**{"s1cdmax": 0} | fields)
        assert bench.translate(IOVA).success
        found = bench.translate(tagged)
        assert (found.action, found.fault) == ("abort", "F_ADDR_SIZE")
        # marked as of stage 1, also where there is none
        assert found.event == reference.event_record(
            "F_ADDR_SIZE", SID, write=False, event_class=reference.CLASS_IN, iova=tagged
        )


LARGE = [
    # granule, level of a block, its size, IPS or S2PS and its bits
    (12, 0, 39, 1, 36), (12, 0, 39, 0, 32), (14, 1, 36, 0, 32), (16, 1, 42, 2, 40),
]  # fmt: skip


def with_large_block(stage, granule_lg2, level, ps):
    """A Bench that one block translates, of more bytes than its stage may give out."""
    ds = granule_lg2 != 16
    if stage == 1:
        bench = Bench(granule_lg2=granule_lg2, tsz=16, ds=int(ds))
        bench.map(0, 0, level)
        bench.write_cd(ips=ps)
        return bench
    second = {"granule_lg2": granule_lg2, "tsz": 16, "start_level": 0 if ds else 1, "ds": ds}
    if granule_lg2 == 14:
        second |= {"tsz": 20, "start_level": 1}
    bench = Nested(config=0b110, second=second)
    slot = bench.second.slot(0, level)
    leaf = ptwriter.stage2_leaf_descriptor(granule_lg2, level, 0, ds=ds, s2ap=3, memattr=15)
    bench.second.write_descriptor(slot, leaf)
    bench.write_ste(s2ps=ps)
    return bench


@pytest.mark.rule("S3.4-18", "V8.1.7-4")
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("granule_lg2", "level", "size_lg2", "ps", "bits"), LARGE)
def test_what_comes_out_of_a_block_must_fit_the_output_size(
    stage, granule_lg2, level, size_lg2, ps, bits
):
    bench = with_large_block(stage, granule_lg2, level, ps)
    last = (1 << bits) - 1
    for iova in (0, 0x1234, last):
        found = bench.translate(iova)
        assert (found.pa, found.level, found.page_lg2) == (iova, level, bits)
    beyond = [last + 1, last + 0x1235, (1 << size_lg2) - 1]
    for iova in beyond:
        found = bench.translate(iova, write=True)
        assert (found.fault, bool(found.event[12] & 0x80)) == ("F_ADDR_SIZE", stage == 2)
    smmu = smmu_over(bench)
    iova = np.tile(np.array([0x1234, last, *beyond], np.uint64), 20)
    rows = smmu.translate_batch(SID, iova, columns=["pa", "fault"])
    assert rows["fault"].tolist() == [0, 0, 0x11, 0x11, 0x11] * 20
    assert rows["pa"].tolist() == [0x1234, last, 0, 0, 0] * 20
    burst = smmu.translate_range(SID, last - 0xFFF, 0x2000)
    assert [tuple(part) for part in burst] == [(last - 0xFFF, last - 0xFFF, 0x1000)]
    assert burst.result.fault.name == "F_ADDR_SIZE"


@pytest.mark.rule("S3.4-19", "V8.1.7-5", "V8.7.1.2-1")
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("nested", ["combined", "split"])
def test_an_entry_of_a_large_block_answers_for_what_fits_alone(stage, nested):
    bench = with_large_block(stage, 12, 0, 1)
    smmu = smmu_over(bench, caches=Caches.server(nested=nested))
    last = (1 << 36) - 1
    for _ in range(2):
        assert outcome(smmu, last) == last
        assert outcome(smmu, last + 1) == outcome(smmu, 1 << 38) == "F_ADDR_SIZE"
    (entry,) = smmu.caches.tlb
    assert (entry.start, entry.lg2, max(entry.lg2_s1, entry.lg2_s2)) == (0, 36, 39)
    rows = smmu.translate_batch(SID, np.tile(np.array([5, 1 << 38], np.uint64), 40),
                                columns=["fault"])["fault"]  # fmt: skip
    assert rows.tolist() == [0, 0x11] * 40
    # the block is one: it goes with any of its addresses
    if stage == 1:
        smmu.command("TLBI_NH_VAA", Address=1 << 38)
    else:
        smmu.command("TLBI_S2_IPA", VMID=VMID, IPA=1 << 38)
    assert len(smmu.caches.tlb) == 0


@pytest.mark.parametrize("ps", [(1, 6), (6, 1), (1, 0), (0, 1)])
def test_large_blocks_of_both_stages_give_what_fits_both(ps):
    bench = Nested(
        tsz=16, ds=1, second={"granule_lg2": 12, "tsz": 16, "start_level": 0, "ds": True}
    )
    slot = bench.tables.slot(0, 0)
    bench.second.write_descriptor(
        bench.second.slot(0, 0), ptwriter.stage2_leaf_descriptor(
            12, 0, 0, ds=True, s2ap=3, memattr=15
        ))  # fmt: skip
    bench.tables.write_descriptor(slot, ptwriter.leaf_descriptor(12, 0, 0, ds=True, ap=1))
    bench.write_cd(ips=ps[0])
    bench.write_ste(s2ps=ps[1])
    of_stage_1, of_stage_2 = ({0: 32, 1: 36, 6: 39}[code] for code in ps)
    bits = min(of_stage_1, of_stage_2)
    for iova in (0x1234, (1 << bits) - 1):
        found = bench.translate(iova)
        assert (found.pa, found.page_lg2, found.level) == (iova, bits, 0)
    smmu = smmu_over(bench, caches=Caches.server())
    for iova in (0x1234, 1 << bits, 0x5678, (1 << 39) - 1):
        found = bench.translate(iova)
        assert found.fault == (None if iova < 1 << bits else "F_ADDR_SIZE")
        assert outcome(smmu, iova) == (found.fault or iova)
        if found.fault:
            assert bool(found.event[12] & 0x80) == (iova < 1 << of_stage_1)


@pytest.mark.rule("S3.4.3-2", "S3.4.3-4", "S5.3-4")
def test_pointers_of_contexts_beyond_ias_are_a_matter_of_stage_2():
    bench, iova, _ = nested_system(features=stage2_features(oas=4))
    bench.write_ste(s1cdmax=8, s1fmt=1, s1dss=2)
    for ipa in (1 << 43, 1 << 44, 1 << 51):
        bench.memory.write(CONTEXT_TABLE, ptwriter.encode_l1cd(ipa))
        found = bench.translate(iova)
        assert (found.fault, found.stage) == ("F_TRANSLATION", 2)
    bench.write_ste(s1cdmax=0)
    for ipa in (1 << 43, 1 << 44, 1 << 51):
        bench.write_ste(s1contextptr=ipa)
        found = bench.translate(iova)
        assert (found.fault, found.stage) == ("F_TRANSLATION", 2)


@pytest.mark.rule("S3.4.3-11")
@pytest.mark.parametrize("config", [0b101, 0b111])
def test_a_context_lies_where_it_does_whatever_its_own_output_size_is(config):
    bench, iova, _ = nested_system()
    bench.map(iova, 0x5000)
    bench.map_self(0x5000)
    at = 0x12_3456_7000
    bench.memory.add(at, 0x1000)
    bench.map_self(at)
    bench.write_cd(ips=0)  # 32 bits
    bench.memory.write(at, ptwriter.encode_cd(**bench.cd))
    bench.write_ste(config=config, s1contextptr=at)
    assert bench.translate(iova).pa == 0x5000


@pytest.mark.rule("S3.4-16")
@pytest.mark.parametrize("s2tg", [0, 1, 2])
def test_stage_2_takes_52_bits_at_most_whatever_oas_is(s2tg):
    bench = Nested(stage2_features(arch_minor=4, oas=7), config=0b110)
    s2sl0, s2sl0_2, tables = {0: (0, 1, 0x4000_0000), 1: (2, 0, 0x4000_0000),
                              2: (3, 0, 0x4000_0000)}[s2tg]  # fmt: skip
    bench.write_ste(s2tg=s2tg, s2ds=int(s2tg != 1), s2sl0=s2sl0, s2sl0_2=s2sl0_2, s2ttb=tables,
                    s2ps=6)  # fmt: skip
    for s2t0sz, end in ((12, "F_WALK_EABT"), (11, "C_BAD_STE"), (8, "C_BAD_STE")):
        bench.write_ste(s2t0sz=s2t0sz)
        assert bench.fault() == end


# ------------------------------------------------------------------------------------------------
# Queues and interrupts (3.5, 3.18, 3.21.2, 16.7.4)


@pytest.mark.rule("S3.21.2-1")
def test_the_command_queue_is_only_read():
    memory = Memory()
    commands = b"".join(layout.to_bytes(layout.command_record(name), layout.pack(name))
                        for name in ("CFGI_ALL", "TLBI_NSNH_ALL", "SYNC", "SYNC"))  # fmt: skip
    memory.add(commands, QUEUE)  # bytes: nothing can be written there
    smmu = Smmu(memory, cmdq_base=QUEUE | 2, cr0=0b1001)
    smmu.write("CMDQ_PROD", 4)
    assert (smmu.read("CMDQ_CONS"), smmu.gerror) == (4, 0)


@pytest.mark.rule("S3.21.2-2", "S3.21.2-3")
def test_commands_may_be_replaced_while_they_are_not_consumed():
    memory = Memory()
    memory.add_private(QUEUE, 0x1000)
    wires = []
    smmu = Smmu(memory, cmdq_base=QUEUE | 2, cr0=0b0001, on_interrupt=wires.append)
    sync, wake = (layout.pack("SYNC", CS=cs).to_bytes(16, "little") for cs in (1, 2))
    memory.write(QUEUE, b"\xff" * 16)
    smmu.write("CMDQ_PROD", 1)
    memory.write(QUEUE, sync)
    smmu.write("CR0", 0b1001)
    assert (smmu.read("CMDQ_CONS"), smmu.gerror, wires) == (1, 0, ["cmdq_sync"])
    memory.write(QUEUE, wake + sync * 3)  # once around: what lies there now
    smmu.write("CMDQ_PROD", 5)
    # the first sev is the room that the full queue gets
    wires_of_a_full_queue = ["cmdq_sync", "sev", "cmdq_sync", "cmdq_sync", "sev"]
    assert (smmu.read("CMDQ_CONS"), wires) == (5, ["cmdq_sync", *wires_of_a_full_queue])


@pytest.mark.rule("S3.18-1", "S3.18-2", "S3.18-3")
@pytest.mark.parametrize("by", ["wire", "message"])
def test_what_an_interrupt_tells_is_there_when_it_comes(by):
    smmu, _ = small.system(
        cr0=0b1111, eventq_base=QUEUE | 2, priq_base=QUEUE + 0x1000 | 2,
        cmdq_base=QUEUE + 0x2000 | 2,
    )  # fmt: skip
    smmu.memory.add_private(QUEUE, 0x4000)
    seen = []

    def look():
        seen.append((
            smmu.read("EVENTQ_PROD"), smmu.memory.read(QUEUE, 1)[0], smmu.read("PRIQ_PROD"),
            any(smmu.memory.read(QUEUE + 0x1000, 16)), smmu.gerror, smmu.read("CMDQ_CONS"),
        ))  # fmt: skip

    def write(address, data):
        look()
        return True

    target = 0
    if by == "message":
        target = QUEUE + 0x8000
        smmu.memory.add_callback(target, 0x1000, lambda address, n: bytes(n), write)
        for name in ("EVENTQ", "PRIQ", "GERROR"):
            smmu.write(f"{name}_IRQ_CFG0", target)
    else:
        smmu.on_interrupt = lambda name: look()
    smmu.write("IRQ_CTRL", 0b111)
    smmu.translate(small.STAGE1, small.UNMAPPED)
    assert set(seen) == {(1, 0x10, 0, False, 0, 0)}
    seen.clear()
    smmu.page_request(small.STAGE1, 0x1000, read=True)
    assert set(seen) == {(1, 0x10, 1, True, 0, 0)}
    seen.clear()
    smmu.command("SYNC", CS=1, MSIAddress=target)
    assert set(seen) == {(1, 0x10, 1, True, 0, 1)}
    seen.clear()
    smmu.memory.write(QUEUE + 0x2010, b"\xff")
    smmu.write("CMDQ_PROD", 2)
    assert set(seen) == {(1, 0x10, 1, True, 1, 1 << 24 | 1)}


@pytest.mark.rule("S3.18-4")
def test_a_message_is_32_bits_in_little_endian():
    smmu, _ = small.system(cr0=0b101, eventq_base=QUEUE | 2)
    smmu.memory.add_private(QUEUE, 0x2000)
    target = QUEUE + 0x1004
    smmu.write("EVENTQ_IRQ_CFG0", target)
    smmu.write("EVENTQ_IRQ_CFG1", 0x1234_5678)
    smmu.write("IRQ_CTRL", 0b100)
    smmu.memory.write(target - 4, b"\xaa" * 12)
    smmu.translate(small.STAGE1, small.UNMAPPED)
    expected = b"\xaa" * 4 + bytes.fromhex("78563412") + b"\xaa" * 4
    assert smmu.memory.read(target - 4, 12) == expected
    smmu.memory.write(target - 4, b"\xaa" * 12)
    smmu.command("SYNC", CS=1, MSIAddress=target, MSIData=0x1234_5678)
    assert smmu.memory.read(target - 4, 12) == expected


@pytest.mark.rule("S3.18.1-3", "S16.7.4-7")
def test_a_message_of_the_page_request_queue_that_aborts_has_its_own_error():
    smmu, _ = small.system(cr0=0b111, priq_base=QUEUE | 2)
    smmu.memory.add_private(QUEUE, 0x1000)
    smmu.write("PRIQ_IRQ_CFG0", 0xA000_0000)
    smmu.write("IRQ_CTRL", 0b111)
    assert smmu.page_request(small.STAGE1, 0x1000, read=True).action == "queued"
    assert smmu.gerror == 1 << 6


# ------------------------------------------------------------------------------------------------
# Reset and initialization (3.11)


WORLDS = [
    # STE and CR2 fields of each kind of entry that a Non-secure stream can leave
    ({"config": 0b101}, 0b10),
    ({"config": 0b101, "strw": 2}, 0b10),
    ({"config": 0b101, "strw": 2}, 0b11),
    ({"config": 0b110}, 0b10),
    ({"config": 0b111, "s2vmid": VMID + 1}, 0b10),  # stage 1 is not that of the first
]


def worlds(nested):
    """A Smmu that has met every kind of entry, and whose tables are gone."""
    bench, iova, ipa = nested_system()
    bench.map2(iova, 0x5000)
    smmu = smmu_over(bench, caches=Caches.server(nested=nested))
    for ng in (0, 1):
        for fields, cr2 in WORLDS:
            bench.map(iova, 0x5000 if fields["config"] == 0b101 else ipa, ng=ng)
            bench.write_ste(**{"strw": 0, "s2vmid": VMID} | fields)
            smmu.command("CFGI_ALL")
            smmu.write("CR0", 0)
            smmu.write("CR2", cr2)
            smmu.write("CR0", 1)
            assert outcome(smmu, iova) == 0x5000
    return smmu


@pytest.mark.rule("S3.3.3-5", "S3.11-14")
@pytest.mark.parametrize("nested", ["combined", "split"])
def test_two_commands_leave_nothing_in_the_tlb(nested):
    smmu = worlds(nested)
    assert {entry.world.name for entry in smmu.caches.tlb} == {"NS_EL1", "EL2", "EL2_E2H"}
    assert len(smmu.caches.walk1) > 0 and len(smmu.caches.walk2) > 0
    smmu.command("TLBI_NSNH_ALL")
    assert {entry.world.name for entry in smmu.caches.tlb} == {"EL2", "EL2_E2H"}
    smmu.command("TLBI_EL2_ALL")
    assert [len(getattr(smmu.caches, name)) for name in ("tlb", "walk1", "walk2")] == [0, 0, 0]


@pytest.mark.rule("S3.11-12")
def test_a_reset_leaves_the_caches_to_be_invalidated():
    smmu, image = small.system(caches=Caches.small())
    assert outcome(smmu, small.RW, small.STAGE1) == 0x4000_1000
    held = len(smmu.caches)
    smmu.reset()
    assert len(smmu.caches) == held > 0
    image[small.CDS : small.CDS + 64] = bytes(64)
    for name, value in small.registers().items():
        smmu.write(name, value)
    smmu.write("CR0", 1)
    assert outcome(smmu, small.RW, small.STAGE1) == 0x4000_1000
    smmu.command("CFGI_ALL")
    assert outcome(smmu, small.RW, small.STAGE1) == "C_BAD_CD"


@pytest.mark.rule("S3.21.1-6", "S3.21.3-3")
def test_nothing_enters_the_caches_while_the_smmu_is_off():
    smmu, _ = small.system(cr0=0b100, caches=Caches.small())
    for sid in (small.STAGE1, small.NESTED):
        assert smmu.translate(sid, small.RW).action == "disabled"
        smmu.command("PREFETCH_CONFIG", StreamID=sid)
        smmu.command("PREFETCH_ADDR", StreamID=sid, Address=small.RW)
        smmu.ats_request(sid, small.RW)
    assert len(smmu.caches) == 0
    smmu.write("CR0", 0b101)
    smmu.command("PREFETCH_ADDR", StreamID=small.STAGE1, Address=small.RW)
    assert len(smmu.caches.tlb) == 1


# ------------------------------------------------------------------------------------------------
# Faults (3.12)


@pytest.mark.rule("S3.12-5")
def test_each_context_of_a_stream_has_its_own_fault_control():
    bench = Bench(default_features(stall_model=0, stall_max=8))
    bench.write_ste(s1cdmax=2, s1dss=2)
    ends = {
        0: ({"a": 1, "r": 1, "s": 0}, ("abort", True)),
        1: ({"a": 0, "r": 0, "s": 0}, ("raz_wi", False)),
        2: ({"a": 1, "r": 0, "s": 1}, ("stall", True)),
        3: ({"a": 1, "r": 0, "s": 0}, ("abort", False)),
    }
    for index, (fields, _) in ends.items():
        bench.write_cd(index, **fields)
    smmu = smmu_over(bench)
    for index, (_, (action, recorded)) in ends.items():
        for ssid in [index] if index else [None]:
            result = smmu.translate(SID, IOVA, ssid=ssid)
            assert (result.action, result.fault.name) == (action, "F_TRANSLATION")
            assert (result.event is not None) == recorded


@pytest.mark.rule("S3.12-13", "S3.12.2-13")
def test_a_stall_holds_up_nobody_else():
    bench = Bench(default_features(stall_model=0, stall_max=8))
    bench.map(IOVA, 0x5000)
    bench.write_cd(s=1)
    smmu = smmu_over(bench)
    assert smmu.translate(SID, 0).action == "stall"
    assert outcome(smmu) == 0x5000
    (held,) = smmu.stalls
    assert not held.done


@pytest.mark.rule("S3.12.2.3-1")
@pytest.mark.parametrize("cached", [False, True])
def test_a_stalled_context_fetch_goes_on_without_a_configuration_command(cached):
    bench, iova, _ = nested_system()
    bench.write_ste(s2s=1)
    slot = bench.second.slot(CONTEXT_TABLE, 3)
    sound = bench.second.read_descriptor(slot)
    bench.second.write_descriptor(slot, 0)
    smmu = smmu_over(bench, caches=Caches.small() if cached else None)
    result = smmu.translate(SID, iova)
    assert (result.action, result.fault.name, result.fault.class_) == (
        "stall", "F_TRANSLATION", "CD",
    )  # fmt: skip
    (held,) = smmu.stalls
    bench.second.write_descriptor(slot, sound)
    smmu.command("RESUME", StreamID=SID, STAG=held.stag, Ac=1)
    assert held.result.pa == 0x5000


# ------------------------------------------------------------------------------------------------
# Hardware update (3.13)


@pytest.mark.parametrize("stage", [1, 2])
def test_affd_does_not_keep_the_access_flag_from_being_set(stage):
    bench, iova, ipa = nested_system()
    if stage == 1:
        bench.write_cd(affd=1)
        slot = bench.map(iova, ipa, af=0)
        enable = lambda: bench.write_cd(ha=1)  # noqa: E731
    else:
        bench.write_ste(s2affd=1)
        slot = bench.map2(ipa, 0x5000, af=0)
        enable = lambda: bench.write_ste(s2ha=1)  # noqa: E731
    assert bench.translate(iova).pa == 0x5000
    assert not bench.descriptor(slot) & AF
    enable()
    assert bench.translate(iova).pa == 0x5000
    assert bench.descriptor(slot) & AF


@pytest.mark.rule("S3.13.2-2")
@pytest.mark.parametrize("config", [0b101, 0b110, 0b111])
@pytest.mark.parametrize("ha", [0, 1])
def test_a_batch_sets_access_flags_in_spite_of_affd(config, ha):
    bench = Nested(config=config)
    bench.write_cd(affd=1, ha=ha)
    bench.write_ste(s2affd=1, s2ha=ha)
    slots = []
    for i in range(64):
        va, ipa = IOVA + 0x1000 * i, 0x5000_0000 + 0x1000 * (i * 5 % 64)
        if config & 1:
            slots.append(bench.map(va, ipa, af=0))
        if config & 2:
            slots.append(bench.map2(ipa if config & 1 else va, 0x40_0000 + 0x1000 * i, af=0))
    smmu = smmu_over(bench)
    iova = IOVA + 0x1000 * np.arange(64, dtype=np.uint64)
    found = smmu.translate_batch(SID, iova, columns=["fault"])
    assert not found["fault"].any()
    assert {bool(bench.descriptor(slot) & AF) for slot in slots} == {bool(ha)}


@pytest.mark.rule("S3.13.2-3", "S3.13.3.1-8")
@pytest.mark.parametrize("two_level", [False, True])
def test_a_context_fetch_sets_the_access_flag_and_never_marks_its_page_dirty(two_level):
    bench, iova, _ = nested_system()
    bench.write_ste(s2ha=1, s2hd=1)
    at = CONTEXT_TABLE
    if two_level:
        bench.write_ste(s1cdmax=8, s1fmt=1, s1dss=2, s1contextptr=at + 0x1000)
        bench.memory.write(at + 0x1000, ptwriter.encode_l1cd(at))
    pages = [at, at + 0x1000][: 1 + two_level]
    slots = [bench.map_self(page, s2ap=1, dbm=1, af=0) for page in pages]
    before = [bench.descriptor(slot) for slot in slots]
    assert bench.translate(iova, write=True).pa == 0x5000
    assert [bench.descriptor(slot) for slot in slots] == [value | AF for value in before]


@pytest.mark.rule("S3.13.4-2")
def test_reading_a_stage_1_table_never_marks_its_page_dirty():
    bench, iova, ipa = nested_system()
    bench.write_ste(s2ha=1, s2hd=1)
    bench.write_cd(ha=1, hd=1)
    slot = bench.map_self(bench.tables.slot(iova, 3) & ~0xFFF, s2ap=1, dbm=1)
    before = bench.descriptor(slot)
    assert bench.translate(iova, write=True).pa == 0x5000
    assert bench.descriptor(slot) == before
    bench.map(iova, ipa, af=0)
    assert bench.translate(iova).pa == 0x5000
    assert bench.descriptor(slot) == before | reference.S2AP1


@pytest.mark.rule("S3.13.3.1-4")
def test_a_write_that_tables_above_refuse_marks_nothing_dirty():
    for had, end in ((0, "F_PERMISSION"), (1, None)):
        bench, iova, ipa = nested_system()
        bench.write_cd(ha=1, hd=1, had0=had)
        slot = bench.map(iova, ipa, ap=3, dbm=1)
        middle = bench.tables.slot(iova, 2)
        bench.tables.write_descriptor(middle, bench.tables.read_descriptor(middle) | 1 << 62)
        before = bench.descriptor(slot)
        assert bench.fault(iova, write=True) == end
        assert bench.descriptor(slot) == (before if end else before & ~reference.AP2)


def test_of_contiguous_descriptors_the_one_that_is_accessed_is_updated():
    bench, iova, _ = nested_system()
    bench.write_cd(ha=1, hd=1)
    bench.write_ste(s2ha=1, s2hd=1)
    first = iova & ~0xFFFF
    slots = []
    for i in range(16):
        slots.append(bench.map(first + 0x1000 * i, 0x66_7789_0000 + 0x1000 * i, af=0, ap=3, dbm=1,
                               contiguous=1))  # fmt: skip
        slots.append(bench.map2(0x66_7789_0000 + 0x1000 * i, 0x5_0000 + 0x1000 * i, af=0, s2ap=1,
                                dbm=1, contiguous=1))  # fmt: skip
    before = [bench.descriptor(slot) for slot in slots]
    assert bench.translate(first + 0x5000, write=True).pa == 0x5_5000
    after = [bench.descriptor(slot) for slot in slots]
    assert [i for i in range(32) if after[i] != before[i]] == [10, 11]


@pytest.mark.rule("S3.13.7.1-3", "S3.13.7.1-4")
@pytest.mark.parametrize("kind", [None, "combined", "split"])
def test_a_request_marks_a_page_dirty_only_if_both_stages_can_grant_the_write(kind):
    updates = {"ha": 1, "hd": 1}
    for cd, stage1, data, granted, marked in (
        ({"ha": 1}, {"ap": 3, "dbm": 1}, {"s2ap": 3}, "r", False),  # HD=0
        (updates, {"ap": 3, "dbm": 1}, {"s2ap": 3}, "rw", True),
        (updates, {"ap": 3}, {"s2ap": 1, "dbm": 1}, "r", False),  # read-only in stage 1
        (updates, {"ap": 1}, {"s2ap": 1, "dbm": 1}, "rw", True),
    ):
        smmu = ats_system(1, cd=cd, stage1=stage1, s2ha=1, s2hd=1)
        # the page of the data, as `data` says
        at = leaf_of_stage_2(smmu, guest.DATA + guest.RW)
        leaf = ptwriter.stage2_leaf_descriptor(
            12, 3, guest.physical(guest.DATA + guest.RW), memattr=15, sh=3, **data
        )
        smmu.memory.write_u64(at, leaf)
        if kind is not None:
            smmu = Smmu(
                smmu.memory, smmu.features, caches=Caches.small(nested=kind),
                strtab_base=smmu.strtab_base, strtab_base_cfg=smmu.strtab_base_cfg, cr0=smmu.cr0,
            )  # fmt: skip

        def tables(smmu=smmu):
            return (smmu.memory.read(guest.STAGE2, 0x10_0000)
                    + smmu.memory.read(guest.physical(guest.TABLES), 0x4000))  # fmt: skip

        before = tables()
        assert rights(smmu.ats_request(guest.NESTED, guest.RW, no_write=True)) == "r"
        assert tables() == before
        assert rights(smmu.ats_request(guest.NESTED, guest.RW)) == granted
        assert (tables() != before) == marked


def leaf_of_stage_2(smmu, ipa):
    """Where the stage-2 leaf of an IPA lies, in the small nested system."""
    found = smmu.translate(guest.SECOND, ipa, trace=True)
    return [fetch.address for fetch in found.fetches if fetch.kind == "S2TT"][-1]


# ------------------------------------------------------------------------------------------------
# Tags of the TLB (3.17)


@pytest.mark.rule("S3.17.6-1", "S3.17.6-2")
def test_vmids_that_a_wildcard_groups_go_together_and_answer_apart():
    bench = Nested(config=0b110)
    slot = bench.map2(IOVA, 0x5000)
    vmids = (0x20, 0x21, 0x2F, 0x30)
    for i, vmid in enumerate(vmids):
        bench.write_ste(i, s2vmid=vmid)
    bench.features.vmw = 1
    smmu = smmu_over(bench, caches=Caches.server())
    smmu.write("CR0", 1 | 4 << 6)
    assert outcome(smmu, sid=0) == 0x5000
    bench.second.write_descriptor(slot, 0)
    assert outcome(smmu, sid=1) == "F_TRANSLATION"  # no entry of another VMID answers
    bench.map2(IOVA, 0x5000)
    for i in range(4):
        assert outcome(smmu, sid=i) == 0x5000
    smmu.command("TLBI_S2_IPA", VMID=0x25, IPA=IOVA)
    assert [entry.vmid for entry in smmu.caches.tlb] == [0x30]


@pytest.mark.rule("S3.17.5-2")
def test_el2_entries_with_and_without_e2h_are_told_apart():
    bench = Bench()
    bench.write_ste(strw=2)
    slot = bench.tables.slot(IOVA, 3)
    bench.map(IOVA, 0x5000)
    for cr2 in (0b10, 0b11):
        bench.regs.cr2 = cr2
        smmu = smmu_over(bench, caches=Caches.small())
        bench.map(IOVA, 0x5000)
        assert outcome(smmu) == 0x5000
        bench.tables.write_descriptor(slot, 0)
        assert outcome(smmu) == 0x5000
        smmu.write("CR0", 0)
        smmu.write("CR2", cr2 ^ 1)
        smmu.write("CR0", 1)
        assert outcome(smmu) == "F_TRANSLATION"


# ------------------------------------------------------------------------------------------------
# Structures in caches (3.21.3)


@pytest.mark.rule("S3.21.3-9")
def test_a_structure_that_could_not_be_fetched_is_fetched_again():
    bench, iova, _ = nested_system()
    at = CONTEXT_TABLE
    for page in (at, at + 0x1000):
        bench.map_self(page)
    bench.write_ste(s1cdmax=8, s1fmt=1, s1dss=2, s1contextptr=at + 0x1000)
    bench.memory.write(at + 0x1000, ptwriter.encode_l1cd(at))
    bench.regs.strtab_base_cfg = 1 << 16 | 6 << 6 | 6
    leaf = bench.allocate(0x1000, 0x1000)
    bench.memory.write(leaf + 64 * SID, bench.memory.read(STREAM_TABLE + 64 * SID, 64))
    bench.memory.write(STREAM_TABLE, ptwriter.encode_l1std(7, leaf))
    for kind, end in (("L1STD", "F_STE_FETCH"), ("STE", "F_STE_FETCH"), ("L1CD", "F_CD_FETCH"),
                      ("CD", "F_CD_FETCH")):  # fmt: skip
        smmu = smmu_over(bench, caches=Caches.server())
        smmu.memory.inject_error(kind=kind)
        assert outcome(smmu, iova) == outcome(smmu, iova) == end
        smmu.memory.clear_errors()
        assert outcome(smmu, iova) == 0x5000
    for page in (at, at + 0x1000):  # CD and L1CD, which stage 2 hides for a while
        slot = bench.second.slot(page, 3)
        sound = bench.second.read_descriptor(slot)
        smmu = smmu_over(bench, caches=Caches.server())
        bench.second.write_descriptor(slot, 0)
        assert outcome(smmu, iova) == outcome(smmu, iova) == "F_TRANSLATION"
        bench.second.write_descriptor(slot, sound)
        assert outcome(smmu, iova) == 0x5000


@pytest.mark.rule("S3.3.3-9", "S3.21.3-10")
def test_a_stream_is_cached_until_its_own_command_whatever_the_registers_say():
    smmu, _ = small.system(caches=Caches.small())
    assert outcome(smmu, small.RW, small.STAGE1) == 0x4000_1000
    smmu.write("CR0", 0)
    smmu.write("STRTAB_BASE", 0xA000_0000)  # no memory there
    smmu.write("CR0", 0b101)
    assert outcome(smmu, small.RW, small.STAGE1) == 0x4000_1000
    for command in ("TLBI_NSNH_ALL", "TLBI_EL2_ALL"):
        smmu.command(command)
        assert outcome(smmu, small.RW, small.STAGE1) == 0x4000_1000
    smmu.command("CFGI_STE", StreamID=small.STAGE1)
    assert outcome(smmu, small.RW, small.STAGE1) == "F_STE_FETCH"


@pytest.mark.rule("S3.3.2-12")
def test_a_pointer_to_a_context_is_a_physical_address_without_stage_2():
    bench, iova, _ = nested_system()
    bench.map(iova, 0x5000)
    bench.second.write_descriptor(bench.second.slot(CONTEXT_TABLE, 3), 0)
    assert bench.fault(iova) == "F_TRANSLATION"
    bench.write_ste(config=0b101)
    assert bench.translate(iova).pa == 0x5000
