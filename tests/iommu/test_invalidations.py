"""Invalidation arrays and the commands that they send (F57 to F60, F67)."""

import itertools
import random

import pytest

from smmufast import Features, Memory, Smmu, layout
from smmufast.errors import InputOutput, InvalidArgument
from smmufast.iommu.smmu.invalidations import (
    ATS,
    ATS_FULL,
    S1_ASID,
    S2_VMID,
    S2_VMID_S1_CLEAR,
    Invalidations,
    atc_span,
    tlb_ranges,
)
from smmufast.iommu.smmu.queue import CommandQueue


def queue_of(features=None, base=0x8000_0000, size_lg2=8):
    memory = Memory()
    memory.add_private(0, 1 << 40)
    smmu = Smmu(memory, features, cr0=0)
    queue = CommandQueue(smmu, base, size_lg2)
    queue.start()
    smmu.write("CR0", 8)
    return queue


def array(queue, *entries):
    return Invalidations((queue, kind, number, ssid) for kind, number, ssid in entries)


def state(invalidations):
    rows = invalidations.entries
    return [row.id for row in rows], [row.users for row in rows], invalidations.trash


def test_f67_the_eleven_steps():
    queue = queue_of()
    a = array(queue, (S2_VMID, 1, 0), (S2_VMID_S1_CLEAR, 1, 0), (ATS, 3, 0))
    b = array(queue, (S2_VMID, 1, 0), (ATS, 4, 0), (ATS, 5, 0))
    c = array(queue, (S2_VMID, 1, 0), (ATS, 5, 0), (ATS, 6, 0))
    d = array(queue, (ATS, 10, 1), (ATS, 10, 3), (ATS, 12, 1))
    e = array(queue, (ATS, 10, 2), (ATS, 10, 3), (ATS, 12, 2))
    now = Invalidations().merge(a)
    assert state(now) == ([1, 1, 3], [1, 1, 1], 0)
    before, now = now, now.merge(b)
    assert state(before) == ([1, 1, 3], [1, 1, 1], 0)  # merge makes a new one
    assert state(now) == ([1, 1, 3, 4, 5], [2, 1, 1, 1, 1], 0)
    assert now.unref(b) == 0
    assert state(now) == ([1, 1, 3], [1, 1, 1], 0)
    assert now.purge() is None
    now = now.merge(c)
    assert state(now) == ([1, 1, 3, 5, 6], [2, 1, 1, 1, 1], 0)
    assert now.unref(a) == 2
    assert state(now) == ([1, 1, 3, 5, 6], [1, 0, 0, 1, 1], 2)
    now = now.purge()
    assert state(now) == ([1, 5, 6], [1, 1, 1], 0)
    assert now.unref(c) == 0
    assert state(now) == ([], [], 0)
    now = now.merge(d)
    assert (state(now)[0], [row.ssid for row in now.entries]) == ([10, 10, 12], [1, 3, 1])
    now = now.merge(e)
    assert state(now) == ([10, 10, 10, 12, 12], [1, 1, 2, 1, 1], 0)
    assert [row.ssid for row in now.entries] == [1, 2, 3, 1, 2]
    assert now.unref(e) == 1
    assert state(now) == ([10, 10, 10, 12], [1, 0, 1, 1], 1)
    assert [row.ssid for row in now.entries] == [1, 2, 3, 1]
    now = now.purge()
    assert (state(now)[0], [row.ssid for row in now.entries]) == ([10, 10, 12], [1, 3, 1])


def test_f67_random_users_against_a_dictionary():
    rng = random.Random(5)
    queue = queue_of()
    made, model = Invalidations(), {}
    for _ in range(4000):
        key = rng.randrange(5), rng.randrange(1, 9), rng.randrange(3)
        if rng.random() < 0.55:
            model[key] = model.get(key, 0) + 1
            assert made.insert(queue, *key) == model[key]
        elif key in model:
            model[key] -= 1
            assert made.remove(queue, *key) == model[key]
            if not model[key]:
                del model[key]
        else:
            with pytest.raises(InvalidArgument):
                made.remove(queue, *key)
        if not _ % 100:
            rows = [((row.kind, row.id, row.ssid), row.users) for row in made.entries]
            assert rows == sorted(model.items())


def commands(queue, call, *arguments):
    queue.log = []
    call(*arguments)
    log, queue.log = queue.log, None
    return log


@pytest.mark.parametrize(
    ("opcode", "name"),
    [(3, "CFGI_STE"), (4, "CFGI_ALL"), (5, "CFGI_CD"), (6, "CFGI_CD_ALL"), (0x10, "TLBI_NH_ALL"),
     (0x11, "TLBI_NH_ASID"), (0x12, "TLBI_NH_VA"), (0x21, "TLBI_EL2_ASID"), (0x22, "TLBI_EL2_VA"),
     (0x28, "TLBI_S12_VMALL"), (0x2A, "TLBI_S2_IPA"), (0x30, "TLBI_NSNH_ALL"), (0x40, "ATC_INV"),
     (0x41, "PRI_RESP"), (0x44, "RESUME"), (0x46, "SYNC"), (1, "PREFETCH_CONFIG")],
)  # fmt: skip
def test_f57_opcodes(opcode, name):
    assert layout.pack(layout.command_record(name)) & 0xFF == opcode
    queue = queue_of()
    queue.issue(name)
    assert queue.memory.read_u64(queue.base) & 0xFF == opcode


@pytest.mark.parametrize(
    ("first", "last", "span"),
    [(8, 11, (8, 2)), (7, 10, (0, 4)), (5, 5, (5, 0)), (0, (1 << 52) - 1, (0, 52)), (6, 7, (6, 1))],
)
def test_f59_an_atc_span_is_one_power_of_two(first, last, span):
    address, size = atc_span(first << 12, (last << 12) + 0xFFF)
    assert (address >> 12, size) == span


def test_f59_spans_cover_and_are_the_smallest_aligned_ones():
    rng = random.Random(2)
    for _ in range(3000):
        first = rng.randrange(1 << rng.randrange(1, 52))
        last = min(first + rng.randrange(1 << rng.randrange(1, 40)), (1 << 52) - 1)
        address, size = atc_span(first << 12, (last << 12) + 0xFFF)
        start = address >> 12
        assert start % (1 << size) == 0 and start <= first and last < start + (1 << size)
        assert size == 0 or first >> (size - 1) != last >> (size - 1)


def test_f59_without_a_pasid_no_substream_is_named():
    queue = queue_of()
    log = commands(queue, array(queue, (ATS, 9, 0), (ATS, 9, 4), (ATS_FULL, 8, 0)).invalidate,
                   0x7000, 0xAFFF, 12, 12, True)  # fmt: skip
    sent = [(f["StreamID"], f["SSV"], f["SubstreamID"], f["Address"], f["Size"])
            for name, f in log if name == "ATC_INV"]  # fmt: skip
    assert sent == [(9, 0, 0, 0, 4), (9, 1, 4, 0, 4), (8, 0, 0, 0, 52)]


@pytest.mark.parametrize("granule_lg2", [12, 14, 16])
def test_f60_without_ranges_the_threshold_is_the_whole_asid(granule_lg2):
    most = 1 << (2 * granule_lg2 - 3)
    assert tlb_ranges(0, most - 1, granule_lg2, granule_lg2, True, False) is None
    few = tlb_ranges(0, most - 2, granule_lg2, granule_lg2, True, False)
    assert len(few) == most >> granule_lg2
    assert tlb_ranges(0, (1 << 64) - 1, granule_lg2, granule_lg2, True, True) is None


@pytest.mark.parametrize("granule_lg2", [12, 14, 16])
def test_f60_blocks_are_told_one_by_one_up_to_as_many_as_a_table_has(granule_lg2):
    block_lg2 = 2 * granule_lg2 - 3
    (one,) = tlb_ranges(0, (1 << block_lg2) - 1, granule_lg2, block_lg2, True, False)
    assert one == {"Address": 0, "Leaf": 1}
    most = 1 << block_lg2 + granule_lg2 - 3
    few = tlb_ranges(0, most - (1 << block_lg2) - 1, granule_lg2, block_lg2, True, False)
    assert len(few) == (1 << granule_lg2 - 3) - 1
    assert tlb_ranges(0, most - 1, granule_lg2, block_lg2, True, False) is None
    # a table that was removed is no block
    assert tlb_ranges(0, (1 << block_lg2) - 1, granule_lg2, block_lg2, False, False) is None


def covered(fields, granule_lg2):
    """What the range commands cover, as (first, last) in granules."""
    spans = []
    for one in fields:
        start = one["Address"] >> granule_lg2
        spans.append((start, start + ((one["Num"] + 1) << one["Scale"]) - 1))
    return spans


@pytest.mark.parametrize("granule_lg2", [12, 14, 16])
def test_f60_ranges_cover_exactly_what_was_asked(granule_lg2):
    rng = random.Random(granule_lg2)
    for _ in range(2000):
        first = rng.randrange(1 << 20)
        count = rng.randrange(1, 1 << rng.randrange(1, 22))
        leaf = rng.random() < 0.5
        fields = tlb_ranges(
            first << granule_lg2, (first + count << granule_lg2) - 1, granule_lg2, granule_lg2,
            leaf, True,
        )  # fmt: skip
        spans = covered(fields, granule_lg2)
        assert spans[0][0] == first
        for before, after in itertools.pairwise(spans):
            assert after[0] == before[1] + 1
        more = not leaf and count & 31 == 1
        assert spans[-1][1] == first + count - 1 + more
        for one in fields:
            assert 0 <= one["Num"] <= 31 and 0 <= one["Scale"] <= 31
            assert one["TTL"] == (3 if leaf else 0) and one["TG"] == (granule_lg2 - 10) // 2


def test_f60_a_block_is_told_with_its_level():
    for page_lg2, ttl in ((12, 3), (21, 2), (30, 1)):
        (one,) = tlb_ranges(0, (1 << page_lg2) - 1, 12, page_lg2, True, True)
        assert one["TTL"] == ttl


@pytest.mark.parametrize("ril", [0, 1])
def test_f58_tlbs_come_before_atcs_and_each_ends_with_one_sync(ril):
    queue = queue_of(Features.full().replace(ril=ril))
    both = array(queue, (S1_ASID, 7, 0), (ATS, 3, 0), (S2_VMID, 5, 0), (S2_VMID_S1_CLEAR, 5, 0))
    log = commands(queue, both.invalidate, 0x1000, 0x1FFF, 12, 12, True)
    assert [name for name, _ in log] == [
        "TLBI_NH_VA", "TLBI_S2_IPA", "SYNC", "TLBI_NH_ALL", "SYNC", "ATC_INV", "SYNC",
    ]  # fmt: skip
    assert log[0][1]["ASID"] == 7 and log[1][1]["VMID"] == 5 and log[0][1]["Leaf"] == 1
    log = commands(queue, both.invalidate, 0x1000, 0x1FFF, 12, 12, False)
    assert log[0][1]["Leaf"] == 0
    names = [name for name, _ in commands(queue, both.invalidate_all)]
    assert names == ["TLBI_NH_ASID", "TLBI_S12_VMALL", "SYNC", "ATC_INV", "SYNC"]


@pytest.mark.parametrize("ril", [0, 1])
@pytest.mark.parametrize("granule_lg2", [12, 14, 16])
def test_f60_commands_of_short_and_long_ranges_are_those_of_their_fields(ril, granule_lg2):
    queue = queue_of(Features.full().replace(ril=ril))
    rng = random.Random(granule_lg2)
    for _ in range(400):
        kind = rng.choice([S1_ASID, S2_VMID])
        page_lg2 = rng.choice([granule_lg2, granule_lg2, 2 * granule_lg2 - 3])
        leaf = rng.random() < 0.7
        shift = rng.choice([granule_lg2, page_lg2])
        first = rng.choice([rng.getrandbits(48), (1 << 51) - (rng.randrange(1, 40) << shift)])
        first = first >> shift << shift
        size = rng.choice([rng.randrange(1, 3), rng.randrange(1, 40)]) << shift
        last = first + size - 1
        number = rng.randrange(1, 1 << 16)
        fields = tlb_ranges(first, last, granule_lg2, page_lg2, leaf, bool(ril))
        one = array(queue, (kind, number, 0))
        log = commands(queue, one.invalidate, first, last, granule_lg2, page_lg2, leaf)
        assert log.pop()[0] == "SYNC"
        if fields is None:
            assert [name for name, _ in log] == [
                "TLBI_NH_ASID" if kind == S1_ASID else "TLBI_S12_VMALL"
            ]
            continue
        tag, address = ("ASID", "Address") if kind == S1_ASID else ("VMID", "IPA")
        assert len(log) == len(fields)
        for (name, found), some in zip(log, fields, strict=True):
            assert name == ("TLBI_NH_VA" if kind == S1_ASID else "TLBI_S2_IPA")
            wanted = {tag: number, address: some["Address"]}
            wanted |= {key: some[key] for key in some if key != "Address"}
            values = {key.lower(): value for key, value in found.items() if value}
            del values["opcode"]
            assert values == {key.lower(): value for key, value in wanted.items() if value}


def test_what_is_removed_is_told_no_more_and_what_is_inserted_is():
    queue = queue_of()
    made = array(queue, (S1_ASID, 1, 0), (S1_ASID, 2, 0), (ATS, 3, 0))

    def told():
        log = commands(queue, made.invalidate_all)
        return [(name, f.get("ASID", f.get("StreamID"))) for name, f in log if name != "SYNC"]

    assert told() == [("TLBI_NH_ASID", 1), ("TLBI_NH_ASID", 2), ("ATC_INV", 3)]
    made.remove(queue, S1_ASID, 1)
    assert told() == [("TLBI_NH_ASID", 2), ("ATC_INV", 3)]
    made.insert(queue, S1_ASID, 4)
    assert told() == [("TLBI_NH_ASID", 2), ("TLBI_NH_ASID", 4), ("ATC_INV", 3)]
    made.unref(array(queue, (S1_ASID, 4, 0), (ATS, 3, 0)))
    assert told() == [("TLBI_NH_ASID", 2)]


def test_a_batch_larger_than_the_queue_goes_round():
    queue = queue_of(size_lg2=2)
    told = []
    run = queue.smmu.write

    class Told:
        """The SMMU, and each PROD that it is told."""

        read = queue.smmu.read

        def write(self, name, value):
            told.append(value)
            run(name, value)

    queue.smmu = Told()
    words = [layout.pack("TLBI_NH_ASID", ASID=asid) for asid in range(1, 11)]
    queue.run(words)
    assert told == [4, 0, 3] and (queue.issued, queue.syncs) == (11, 1)
    assert queue.memory.read_u64(queue.base + 16) == words[9] & (1 << 64) - 1


def test_one_array_serves_several_smmus():
    one, two = queue_of(), queue_of(base=0x9000_0000)
    both = Invalidations([(one, S1_ASID, 1, 0), (two, S1_ASID, 2, 0)])
    log = commands(one, commands, two, both.invalidate, 0, 0xFFF, 12, 12, True)
    assert [fields.get("ASID") for _, fields in log] == [1, None]


def test_a_full_queue_is_consumed_and_goes_on():
    queue = queue_of(size_lg2=2)
    for asid in range(1, 30):
        queue.issue("TLBI_NH_ASID", ASID=asid)
    queue.sync()
    assert (queue.issued, queue.syncs) == (30, 1)
    assert queue.smmu.read("CMDQ_CONS") & 7 == queue.prod


def test_an_illegal_command_is_named_and_the_queue_works_again():
    queue = queue_of()
    queue.put(0xEE, 0)
    queue.issue("TLBI_NH_ASID", ASID=1)
    with pytest.raises(InputOutput, match=r"0xee.*illegal"):
        queue.sync()
    queue.issue("TLBI_NH_ASID", ASID=2)
    queue.sync()
    assert (queue.smmu.read("GERROR") ^ queue.smmu.read("GERRORN")) & 1 == 0
    with pytest.raises(InvalidArgument):
        queue.put(1 << 64, 0)
    with pytest.raises(ValueError, match="command must be the opcode or name of one, not"):
        queue.issue("no such command")


def test_a_queue_that_is_not_enabled_says_so():
    queue = queue_of()
    queue.smmu.write("CR0", 0)
    with pytest.raises(InputOutput, match="CMDQEN"):
        queue.sync()
