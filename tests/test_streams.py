"""Streams and contexts listed from tables are those that translations meet."""

from itertools import islice, pairwise

import captures
import ptwriter
import pytest
import tablegen

import smmufast
from smmufast import streams


def fetched(smmu, sid, kind, **access):
    """What a translation reads of one kind: address and data; None if it reads none."""
    found = None
    for fetch in smmu.translate(sid, 0, trace=True, **access).fetches:
        if fetch.kind == kind:
            found = (fetch.address, fetch.data)
    return found


@pytest.mark.parametrize("maker", [tablegen.random_system, tablegen.random_bytes_system])
def test_runs_are_the_entries_that_translations_fetch(maker):
    compared = contexts = 0
    for smmu, _system in captures.random_systems(maker, 21, 25):
        if not smmu.cr0 & 1:
            assert list(streams.streams(smmu)) != []
            continue
        table = streams.stream_table(smmu)
        runs = list(streams.streams(smmu))
        if table is None:
            assert runs == []
            continue
        # the runs cover the table, without gaps
        assert runs[0].first == 0
        assert runs[-1].last == (1 << table.log2size) - 1
        for before, after in pairwise(runs):
            assert before.last + 1 == after.first
            assert (before.ste, before.problem) != (after.ste, after.problem)
        # runs of noise are many: some of each system
        for run in runs[:: 1 + len(runs) // 40]:
            for sid in {run.first, run.last, (run.first + run.last) // 2}:
                found = fetched(smmu, sid, "STE")
                if run.ste is not None:
                    assert found[1] == run.ste
                    if sid == run.first:
                        assert found[0] == run.address
                else:
                    assert found is None or found[1] is None
                    assert run.problem
                compared += 1
        translating = [run for run in runs if run.ste is not None and run.ste[0] & 1]
        for run in translating[:6]:
            contexts += check_contexts(smmu, run)
    assert compared > 100
    if maker is tablegen.random_system:
        assert contexts > 100


def check_contexts(smmu, run):
    """Compare the first contexts of a run with what translations of its first stream fetch."""
    compared = 0
    expected = 0
    listed = list(islice(streams.contexts(smmu, run), 50))
    for context in listed:
        if context.first is None:
            address, data = fetched(smmu, run.first, "CD")
            assert (address, data) == (context.address, context.cd)
            return compared + 1
        assert context.first == expected
        expected = context.last + 1
        for ssid in {context.first, context.last, (context.first + context.last) // 2}:
            found = fetched(smmu, run.first, "CD", ssid=ssid)
            if found is None and ssid == 0:  # S1DSS keeps CD 0 to those without a SubstreamID
                found = fetched(smmu, run.first, "CD")
            if context.cd is not None:
                assert found[1] == context.cd
                assert ssid != context.first or found[0] == context.address
            else:
                assert found is None or found[1] is None
                assert context.problem
            compared += 1
    if 0 < len(listed) < 50:
        result = smmu.translate(run.first, 0, ssid=expected if expected < 1 << 20 else None)
        assert expected == 1 << 20 or result.fault.name == "C_BAD_SUBSTREAMID"
    return compared


def table_of(log2size, split, memory, **features):
    return smmufast.Smmu(
        memory,
        smmufast.Features(**features),
        strtab_base=0x1_0000_0000_0000,
        strtab_base_cfg=log2size | (1 << 16 | split << 6 if split else 0),
    )


@pytest.mark.parametrize(("split", "shift"), [(None, 0), (6, 6), (8, 8), (10, 10)])
def test_tables_of_every_stream_id_are_listed_from_the_pages_that_hold_something(split, shift):
    memory = smmufast.Memory()
    memory.add_private()
    smmu = table_of(32, split, memory)
    sid = 0xFEDC_BA98
    base = 0x1_0000_0000_0000
    ste = ptwriter.encode_ste(v=1, config=0b100)
    if split is None:
        address = base + 64 * sid
        present = [address & -4096]
    else:
        leaf = 0x5_0000_0000
        address = leaf + 64 * (sid & ((1 << split) - 1))
        entry = base + 8 * (sid >> split)
        memory.write(entry, ptwriter.encode_l1std(split + 1, leaf))
        present = sorted([entry & -4096, address & -4096])
    memory.write(address, ste)
    table = streams.stream_table(smmu)
    assert table == (split is not None, base, 32, split)
    runs = list(streams.streams(smmu, present))
    first = sid >> shift << shift if split else 0
    last = first + (1 << shift) - 1 if split else (1 << 32) - 1
    (found,) = [run for run in runs if run.ste == ste]
    assert (found.first, found.last, found.address) == (sid, sid, address)
    assert [(run.first, run.last) for run in runs if run.ste == bytes(64)] == [
        (first, sid - 1),
        (sid + 1, last),
    ]
    if split is not None:
        assert [(run.first, run.last) for run in runs if run.ste is None] == [
            (0, first - 1),
            (last + 1, (1 << 32) - 1),
        ]
    assert list(streams.contexts(smmu, found)) == []
    if split is None:
        with pytest.raises(ValueError, match="name the pages to look at"):
            next(streams.streams(smmu))


def test_pages_outside_memory_are_runs_that_cannot_be_read():
    memory = smmufast.Memory()
    memory.add(bytearray(0x400 + 8), 0x1_0000_0000_0000)  # 16 entries and a bit
    memory.add(bytearray(0x400), 0x1_0000_0000_0800)
    smmu = table_of(6, None, memory)
    assert [(run.first, run.last, run.problem) for run in streams.streams(smmu)] == [
        (0, 15, None),
        (16, 31, "the entry cannot be read (F_STE_FETCH)"),
        (32, 47, None),
        (48, 63, "the entry cannot be read (F_STE_FETCH)"),
    ]


def test_a_callback_that_refuses_some_entries_is_read_entry_by_entry():
    memory = smmufast.Memory()
    base = 0x1_0000_0000_0000
    memory.add_callback(
        base, 0x1000, lambda address, n: None if address <= base + 640 < address + n else bytes(n)
    )
    runs = list(streams.streams(table_of(5, None, memory)))
    assert [(run.first, run.last, run.ste is None) for run in runs] == [
        (0, 9, False),
        (10, 10, True),
        (11, 31, False),
    ]


def test_a_stream_table_beyond_the_address_size_has_no_entries():
    memory = smmufast.Memory()
    memory.add_private()
    smmu = table_of(4, None, memory, oas=4)
    assert streams.stream_table(smmu) is None
    assert list(streams.streams(smmu)) == []
    assert streams.pages(smmu) == []


def test_what_needs_a_feature_that_was_masked_is_named():
    def needs(masked, cd=None, **ste):
        ste = ptwriter.encode_ste(**({"v": 1, "config": 0b101} | ste))
        data = None if cd is None else ptwriter.encode_cd(**cd)
        return streams.unmodelled(ste, data, masked)

    assert needs({"s2p": 1}, config=0b110) == needs({"s2p": 1}, config=0b111) == "stage 2"
    assert needs({}, config=0b110) is None
    assert needs({"s2p": 1}, config=0b110, v=0) is None
    assert needs({"s2p": 1}, config=0b010) is None
    assert needs({"s2p": 1, "httu": 2}, {"v": 1}) is None
    assert needs({"httu": 2}, {"v": 1, "aa64": 1, "ha": 1}) == "hardware updates of tables"
    assert needs({"stall_model": 0}, {"v": 1, "s": 1}) == "stalls"
    assert needs({"stall_model": 0}, {"v": 1, "s": 0, "aa64": 1}) is None
    assert needs({"stall_model": 2}, {"v": 1, "s": 0}) == "stalls"
    assert needs({"stall_model": 0}, s1stalld=1) == "stalls"
    assert needs({"ttf": 3}, {"v": 1}) == "VMSAv8-32 tables"
    assert needs({"ats": 1}, eats=2) == "ATS"
    assert needs({"ats": 1}, eats=1) is None
