"""Streams and contexts listed from tables are those that translations meet."""

from itertools import islice, pairwise

import captures
import nested
import ptwriter
import pytest
import tablegen
from nested import NESTED, SECOND, small_nested

import smmufast
from smmufast import Why, layout, streams

S2_INVALID = Why.S2_INVALID.sentence()
S2_DEVICE = Why.S2_DEVICE.sentence()
S2_RANGE = Why.S2T0SZ_RANGE.sentence()
MAKERS = [tablegen.random_system, tablegen.random_nested_system, tablegen.random_bytes_system]


def fetched(smmu, sid, kind, **access):
    """What a translation reads of one kind: address and data; None if it reads none."""
    found = None
    for fetch in smmu.translate(sid, 0, trace=True, **access).fetches:
        if fetch.kind == kind:
            found = (fetch.address, fetch.data)
    return found


@pytest.mark.parametrize("maker", MAKERS)
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
    if maker is not tablegen.random_bytes_system:
        assert contexts > 100


def check_contexts(smmu, run):
    """Compare the first contexts of a run with what translations of its first stream fetch."""
    compared = 0
    expected = 0
    listed = list(islice(streams.contexts(smmu, run), 50))
    for context in listed:
        if context.first is None:
            found = fetched(smmu, run.first, "CD")
            if context.address is None:  # stage 2 refuses
                assert found is None
                assert context.problem.startswith("stage 2 refuses")
            else:
                assert found == (context.address, context.cd)
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
        ste = layout.to_bytes("STE", layout.pack("STE", **({"V": 1, "Config": 5} | ste)))
        data = None if cd is None else layout.to_bytes("CD", layout.pack("CD", V=1, **cd))
        return streams.unmodelled(ste, data, masked)

    assert needs({"ttf": 3}, {}) == "VMSAv8-32 tables"
    assert needs({"ttf": 3}, {"AA64": 1}) is None
    assert needs({"ttf": 3}, {}, V=0) is None
    assert needs({"ttf": 3}, {}, Config=2) is None
    assert needs({"ttf": 3}, {}, Config=4) is None
    assert needs({"ttf": 3}, Config=5) is None
    assert needs({"ttf": 3}, Config=6) == needs({"ttf": 3}, Config=7) == "VMSAv8-32 tables"
    assert needs({"ttf": 3}, {}, Config=7, S2AA64=1) == "VMSAv8-32 tables"
    assert needs({"ttf": 3}, {}, Config=6, S2AA64=1) is None
    assert needs({}, {}, Config=7) is None
    assert needs({"d128": 1}, {}) == needs({"d128": 1}, Config=6) == "VMSAv9-128 tables"
    aa64 = {"AA64": 1}
    assert needs({"s1pi": 1}, aa64 | {"PIE": 1}) == "indirect permissions"
    assert needs({"s2pi": 1}, aa64 | {"PIE": 1}) is None
    assert needs({"s2pi": 1}, Config=6, S2AA64=1, S2PIE=1) == "indirect permissions"
    assert needs({"s2po": 1}, Config=6, S2AA64=1, S2POE=1) == "permission overlays"
    assert needs({"aie": 1}, aa64 | {"AIE": 1}) == "the extension of attribute indices"
    assert needs({"mpam": 1}, aa64 | {"PIE": 1, "AIE": 1}) is None


# --- stage 2 --------------------------------------------------------------------------------------


def reached(smmu, requests):
    """Addresses of what translations read."""
    return {
        fetch.address
        for sid, iova, access in requests
        for fetch in smmu.translate(sid, iova, trace=True, **access).fetches
    }


def test_the_context_of_a_nested_stream_is_read_through_stage_2():
    smmu = small_nested()
    runs = {run.first: run for run in streams.streams(smmu)}
    (context,) = streams.contexts(smmu, runs[NESTED])
    place = nested.physical(nested.CONTEXT)
    assert (context.first, context.address, context.problem) == (None, place, None)
    assert context.cd == smmu.memory.read(place, 64)
    assert list(streams.contexts(smmu, runs[SECOND])) == []


def test_contexts_that_stage_2_refuses_say_why():
    refused = small_nested(tables={"memattr": 1}, s2ptw=1)
    absent = small_nested(s1contextptr=0x7000_0000)
    far = small_nested(s1contextptr=1 << 44)
    for smmu, problem in (
        (refused, f"stage 2 refuses its IPA 0x80000000 (F_PERMISSION: {S2_DEVICE})"),
        (absent, f"stage 2 refuses its IPA 0x70000000 (F_TRANSLATION: {S2_INVALID})"),
        (far, f"stage 2 refuses the IPA of the context descriptor (F_TRANSLATION: {S2_RANGE})"),
    ):
        (run,) = [run for run in streams.streams(smmu) if run.first == NESTED]
        assert [(c.address, c.cd, c.problem) for c in streams.contexts(smmu, run)] == [
            (None, None, problem)
        ]
        result = smmu.translate(NESTED, 0)
        assert result.fault.name in problem


@pytest.mark.parametrize("s1fmt", [0, 1, 2])
def test_tables_of_contexts_whose_ipas_are_apart_are_one_table(s1fmt):
    # 2^12 substreams; stage 2 puts every page of the guest somewhere else
    smmu = small_nested({"ssidsize": 12, "cd2l": 1}, s1cdmax=12, s1fmt=s1fmt, s1dss=2)
    good = smmu.memory.read(nested.physical(nested.CONTEXT), 64)
    # the tables of stage 2 again, with pages in reverse
    memory = ptwriter.Memory()
    first, count = 0x8800_0000, 256
    outer = ptwriter.Stage2Tables(
        memory, ptwriter.BumpAllocator(memory, 0x4200_0000, 0x10_0000), 12, 24, start_level=1
    )

    def place(ipa):
        return 0x4600_0000 + (count - 1 - (ipa - first) // 4096) * 4096 + ipa % 4096

    for ipa in range(first, first + count * 4096, 4096):
        if ipa != first + 5 * 4096:  # one page is missing
            outer.map(ipa, place(ipa), memattr=15, s2ap=3)
    for base, data in memory.regions():
        smmu.memory.write(base, data)
    fields = layout.unpack("STE", smmu.memory.read(captures.STREAM_TABLE + 64 * NESTED, 64))
    fields |= {"S2TTB": outer.base, "S1ContextPtr": first}
    ste = layout.to_bytes("STE", layout.pack("STE", **fields))
    smmu.memory.write(captures.STREAM_TABLE + 64 * NESTED, ste)
    ssids = (0, 1, 63, 64, 1023, 1024, 4095)
    if s1fmt == 0:
        for ssid in ssids:
            smmu.memory.write(place(first + 64 * ssid), good)
        missing = (5 * 64, 6 * 64 - 1)
    else:
        leaf = 64 if s1fmt == 1 else 1024
        leaves = first + 0x1_0000
        for number in {ssid // leaf for ssid in ssids}:
            entry = ptwriter.encode_l1cd(leaves + number * leaf * 64)
            smmu.memory.write(place(first + 8 * number), entry)
        for ssid in ssids:
            smmu.memory.write(place(leaves + 64 * ssid), good)
        missing = None
    (run,) = [run for run in streams.streams(smmu) if run.first == NESTED]
    found = list(streams.contexts(smmu, run))
    assert (found[0].first, found[-1].last) == (0, 4095)
    for before, after in pairwise(found):
        assert before.last + 1 == after.first
    given = {ssid for c in found if c.cd == good for ssid in range(c.first, c.last + 1)}
    assert given == set(ssids)
    for context in found:
        if context.cd is not None:
            at = fetched(smmu, NESTED, "CD", ssid=context.first or None)
            assert at == (context.address, context.cd)
    if missing is not None:
        (hole,) = [context for context in found if context.cd is None]
        assert (hole.first, hole.last) == missing
        ipa = first + 5 * 4096
        assert hole.problem == f"stage 2 refuses its IPA {ipa:#x} (F_TRANSLATION: {S2_INVALID})"
    # what the pages name is all that these walks read
    pages = set(streams.pages(smmu))
    requests = [(NESTED, 0, {"ssid": ssid or None}) for ssid in ssids]
    assert {address & -4096 for address in reached(smmu, requests)} <= pages


@pytest.mark.parametrize("maker", MAKERS[:2])
def test_pages_hold_all_that_translations_read(maker):
    checked = 0
    for smmu, system in captures.random_systems(maker, 22, 25):
        if not smmu.cr0 & 1:
            continue
        pages = set(streams.pages(smmu))
        for request in system.requests(60):
            access = request._asdict()
            sid, iova = access.pop("sid"), access.pop("iova")
            for fetch in smmu.translate(sid, iova, trace=True, **access).fetches:
                if fetch.data is not None and fetch.data.strip(b"\0"):
                    assert fetch.address & -4096 in pages, fetch
                    checked += 1
    assert checked > 2000


def test_what_is_asked_leaves_no_trace_in_queues():
    whole = small_nested({"stall_model": 0, "stall_max": 4}, s2s=1, s1contextptr=0x7000_0000)
    queue = nested.STAGE2 + 0x80_0000
    smmu = smmufast.Smmu(
        whole.memory,
        whole.features,
        strtab_base=whole.strtab_base,
        strtab_base_cfg=whole.strtab_base_cfg,
        eventq_base=queue | 4,
    )
    for run in streams.streams(smmu):
        list(streams.contexts(smmu, run))
    streams.pages(smmu)
    assert smmu.memory.read(queue, 512) == bytes(512)
    assert smmu.stalls == []
    assert smmu.translate(NESTED, 0).action == "stall"
    assert smmu.memory.read(queue, 512) != bytes(512)


# --- content that asks for endless work ---


def repeated(word, size):
    """Memory that holds one dword everywhere, as a callback; real memory behind it."""
    memory = smmufast.Memory()
    memory.add_callback(1 << 40, size, lambda address, n: word.to_bytes(8, "little") * (n // 8))
    memory.add_private(0, 1 << 20)
    return memory


def test_equal_level_1_descriptors_are_looked_into_once():
    """2^20 of them lead to one table of 2^8 entries, of which one is valid."""
    l1std = layout.pack("L1STD", Span=9, L2Ptr=0x1_0000)
    memory = repeated(l1std, 8 << 20)
    cfg = layout.pack("STRTAB_BASE_CFG", LOG2SIZE=28, SPLIT=8, FMT=1)
    smmu = smmufast.Smmu(memory, strtab_base=1 << 40, strtab_base_cfg=cfg)
    budget = streams.Budget(8)  # pieces of 1 MiB of the table are told apart
    (run,) = streams.streams(smmu, budget=budget)
    assert (run.first, run.last, run.ste) == (0, (1 << 28) - 1, bytes(64))
    assert budget.left == 0
    memory.write_u64(0x1_0000 + 64 * 5, 0b1001)
    found = list(streams.streams(smmu, budget=streams.Budget(4)))
    assert [(run.first, run.last) for run in found[:4]] == [(0, 4), (5, 5), (6, 260), (261, 261)]
    assert (found[-1].first, found[-1].last) == (4 << 8, (1 << 28) - 1)
    assert found[-1].problem == "left out: 4 tables were looked into"
    assert len(streams.pages(smmu)) == (8 << 20) // 4096 + 1


def test_equal_level_1_descriptors_of_contexts_are_looked_into_once():
    memory = smmufast.Memory()
    memory.add_private(0, 1 << 24)
    memory.write(0x40, layout.to_bytes("STE", layout.pack(
        "STE", V=1, Config=5, S1ContextPtr=0x10_0000, S1CDMax=20, S1Fmt=1)))  # fmt: skip
    l1cd = layout.pack("L1CD", V=1, L2Ptr=0x20_0000).to_bytes(8, "little")
    memory.write(0x10_0000, l1cd * (1 << 14))
    smmu = smmufast.Smmu(memory, strtab_base=0, strtab_base_cfg=1)
    run = list(streams.streams(smmu))[1]
    budget = streams.Budget(1)
    (context,) = streams.contexts(smmu, run, budget=budget)
    assert (context.first, context.last, context.cd) == (0, (1 << 20) - 1, bytes(64))
    assert budget.left == 0
    memory.write(0x20_0000 + 64, layout.to_bytes("CD", layout.pack("CD", V=1)))
    found = list(streams.contexts(smmu, run, budget=streams.Budget(2)))
    assert found[-1].problem == "left out: 2 tables were looked into"
    assert (found[-1].first, found[-1].last) == (128, (1 << 20) - 1)


@pytest.mark.parametrize("granule", [12, 14, 16])
def test_tables_that_lead_to_themselves_are_pages_once(granule):
    """Every entry of a table leads to the table, at every level."""
    memory = smmufast.Memory()
    memory.add_private(0, 1 << 24)
    table, size = 0x10_0000, 1 << granule
    entry = layout.pack("PTE_S1_TABLE", Valid=1, Type=1) | table
    memory.write(table, entry.to_bytes(8, "little") * (size // 8))
    code = {12: 0, 14: 2, 16: 1}[granule]
    cd = layout.pack("CD", V=1, AA64=1, A=1, R=1, IPS=5, T0SZ=16, TG0=code, EPD1=1, TTB0=table)
    memory.write(0x4000, layout.to_bytes("CD", cd))
    memory.write(0, layout.to_bytes("STE", layout.pack("STE", V=1, Config=5, S1ContextPtr=0x4000)))
    smmu = smmufast.Smmu(memory, strtab_base=0, strtab_base_cfg=0)
    assert streams.pages(smmu) == [0, 0x4000, *range(table, table + size, 4096)]


def test_tables_beyond_the_limit_are_refused_by_pages(monkeypatch):
    smmu = captures.small_system()
    assert len(streams.pages(smmu)) > 3
    with monkeypatch.context() as patch:
        patch.setattr("smmufast.streams.MOST_PAGES", 3)
        with pytest.raises(ValueError, match="more than 3 pages; name the pages to look at"):
            streams.pages(smmu)
    monkeypatch.setattr("smmufast.streams.Budget.__init__.__defaults__", (1,))
    with pytest.raises(ValueError, match="more than 1 tables; name the pages to look at"):
        streams.pages(smmu)


def test_a_budget_is_a_number():
    for bad in (-1, "5", None, 1.5):
        with pytest.raises((TypeError, ValueError), match="tables must be"):
            streams.Budget(bad)
