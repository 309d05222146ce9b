"""Translation through caches is translation without, as long as software invalidates."""

import os
import pickle
import threading

import cachetwin
import nested
import numpy as np
import pytest
import small
import twin

import smmufast
from smmufast import Caches, Memory, Smmu

SEEDS = int(os.environ.get("SMMUFAST_CACHETWIN", "160"))
PART = 20  # systems a test


def parts(seeds):
    """First seeds of some systems each; the first ones are tried in the short run too."""
    rest = (pytest.param(first, marks=pytest.mark.slow) for first in range(PART, seeds, PART))
    return [0, *rest]


# --- random systems ---


@pytest.mark.rule("S3.3.3-10", "S16.2-5")
@pytest.mark.parametrize("first", parts(SEEDS))
def test_caches_change_nothing_while_tables_stay(first):
    made, hits, looked = np.sum([cachetwin.check_same(first + i) for i in range(PART)], axis=0)
    assert made > 5000
    assert 2 * hits > looked


@pytest.mark.rule("S3.20.1-3", "S3.21.1-3", "S3.21.1-5", "S3.21.3-12")
@pytest.mark.parametrize("first", parts(SEEDS // 2))
def test_invalidation_makes_up_for_every_change(first):
    found = np.sum([cachetwin.check_changes(first + i) for i in range(PART)], axis=0)
    made, changes, commands, by_old_tables = found
    assert made > 5000
    assert changes > 3 * PART
    assert commands > changes
    assert by_old_tables > 0  # of one change a system that was not invalidated


LEFT_OUT = {
    "configuration": ("CFGI_STE", "CFGI_STE_RANGE", "CFGI_ALL", "CFGI_CD", "CFGI_CD_ALL"),
    "stage 1": (
        "TLBI_NH_VA", "TLBI_NH_VAA", "TLBI_NH_ASID", "TLBI_NH_ALL", "TLBI_NSNH_ALL",
        "TLBI_S12_VMALL",
    ),
    "stage 2": ("TLBI_S2_IPA", "TLBI_S12_VMALL", "TLBI_NSNH_ALL"),
    "combined": ("TLBI_NH_ALL", "TLBI_S12_VMALL", "TLBI_NSNH_ALL"),
    "EL2": ("TLBI_EL2_VA", "TLBI_EL2_VAA", "TLBI_EL2_ASID", "TLBI_EL2_ALL"),
}  # fmt: skip


@pytest.mark.parametrize("what", LEFT_OUT)
def test_a_missing_invalidation_is_noticed(what):
    for seed in range(60):
        try:
            cachetwin.check_changes(seed, without=LEFT_OUT[what])
        except AssertionError as error:
            assert "stale" in str(error)
            return
    pytest.fail(f"60 systems did without invalidation of {what}")


@pytest.mark.slow
def test_outcomes_tell_of_a_missing_invalidation_where_stale_would_not(monkeypatch):
    monkeypatch.setattr(cachetwin.Changing, "check_stale", lambda changing: None)
    caught = 0
    for seed in range(40):
        try:
            cachetwin.check_changes(seed, without=sum(LEFT_OUT.values(), ()))
        except AssertionError:
            caught += 1
    assert caught >= 5


def test_a_tlb_that_keeps_too_much_is_noticed(monkeypatch):
    """As if the commands by address hit another address than they name."""
    issue = cachetwin.issue

    def elsewhere(rng, smmu, commands):
        issue(rng, smmu, [
            (name, {**fields, "Address": fields["Address"] ^ 1 << 40} if "Address" in fields
             else fields) for name, fields in commands
        ])  # fmt: skip

    monkeypatch.setattr(cachetwin, "issue", elsewhere)
    with pytest.raises(AssertionError, match="stale"):
        for seed in range(60):
            cachetwin.check_changes(seed)


# --- a small system ---


# without the stream whose CD has the ASID of another one, and other tables
LAWFUL = [request for request in small.REQUESTS if request.sid != small.NO_TABLE]


def caches(**other):
    return Caches(**{"ste": (1, 4), "cd": (1, 4), "tlb": (4, 2), "walk1": (2, 2)} | other)


@pytest.mark.parametrize("made", [caches, Caches.small, Caches.server, Caches])
def test_the_small_system_is_the_same_through_caches(made):
    bare, _ = small.system()
    expected = [small.row(result) for result in small.translate_each(bare, LAWFUL)]
    smmu, _ = small.system(caches=made())
    other, _ = small.system(caches=made())
    for _ in range(3):
        found = [small.row(result) for result in small.translate_each(smmu, LAWFUL)]
        assert found == expected
        assert small.batch_rows(other, LAWFUL) == expected
        assert pickle.dumps(smmu.caches) == pickle.dumps(other.caches)
    assert smmu.stale() == []


def test_a_hit_fetches_nothing_and_a_forgotten_page_is_found_in_memory():
    smmu, _ = small.system(caches=caches())
    first = smmu.translate(1, small.RW, trace=True)
    assert len(first.fetches) > 2
    again = smmu.translate(1, small.RW, trace=True)
    assert again.fetches == []
    assert small.row(again) == small.row(first)
    smmu.command("TLBI_NH_ALL")
    assert [fetch.kind for fetch in smmu.translate(1, small.RW, trace=True).fetches] == (
        ["TT"] * (len(first.fetches) - sum(f.kind != "TT" for f in first.fetches))
    )


@pytest.mark.parametrize("how", smmufast._engine.tlb.NESTED)
@pytest.mark.parametrize("walk2", [None, (1, 1), (1, 2), (1, 8)])
def test_a_resumable_walk_leaves_what_translate_leaves(how, walk2):
    """What a walk fills and evicts decides about its own later fetches."""
    states = []
    for resumable in (False, True):
        bare = nested.small_nested()
        smmu = smmufast.Smmu(
            bare.memory, bare.features, strtab_base=bare.strtab_base,
            strtab_base_cfg=bare.strtab_base_cfg,
            caches=caches(tlb=(1, 2), walk1=None, walk2=walk2, nested=how),
        )  # fmt: skip
        rows = []
        for page in (nested.RW, nested.READ_ONLY, nested.RW, nested.NO_AF, nested.UNMAPPED):
            if resumable:
                result = twin.host_walk(smmu, bare.memory, nested.NESTED, page)
            else:
                result = smmu.translate(nested.NESTED, page)
            rows.append(twin.result_row(result))
        states.append((rows, smmu.caches.__getstate__()))
    assert states[0] == states[1]


# --- threads ---


@pytest.mark.rule("S4.3.8-3")
def test_threads_share_one_smmu_with_caches():
    bare, _ = small.system()
    found = zip(small.REQUESTS, small.translate_each(bare), strict=True)
    requests = [r for r, result in found if result.action == "ok" and result.stage == 1]
    rows = [small.row(result) for result in small.translate_each(bare, requests)]
    smmu, _ = small.system(caches=caches())
    start = threading.Barrier(4)
    wrong, made = [], []

    def batches():
        start.wait()
        for _ in range(60):
            many = small.batch_rows(smmu, requests * 20)
            made.append(len(many))
            wrong.extend(number for number, row in enumerate(many) if row != rows[
                number % len(rows)])  # fmt: skip

    def singles():
        start.wait()
        for _ in range(150):
            found = [small.row(result) for result in small.translate_each(smmu, requests)]
            made.append(len(found))
            wrong.extend([] if found == rows else ["translate"])

    def walks():
        start.wait()
        for number in range(150):
            request = requests[number % len(requests)]
            result = twin.host_walk(smmu, smmu.memory, request.sid, request.iova, **request.access)
            made.append(1)
            wrong.extend([] if small.row(result) == rows[number % len(rows)] else ["walk"])
            if number % 10 == 0:
                smmu.command("TLBI_NSNH_ALL")
                wrong.extend(smmu.stale())

    workers = [threading.Thread(target=work) for work in (batches, batches, singles, walks)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    counters = smmu.caches.counters
    looked = {name: one["hits"] + one["misses"] for name, one in counters.items()}
    assert looked["ste"] == looked["cd"] == looked["tlb"] == sum(made)
    assert looked["walk1"] == counters["tlb"]["misses"]
    for one in (smmu.caches.ste, smmu.caches.cd, smmu.caches.tlb, smmu.caches.walk1):
        gone = one.evictions + one.replacements + one.invalidations
        assert len(one) == one.fills - gone


def test_caches_of_an_smmu_take_no_state():
    memory = Memory()
    caches = Caches.small()
    state = caches.__getstate__()
    Smmu(memory, caches=caches)
    with pytest.raises(RuntimeError, match="an Smmu has them"):
        caches.__setstate__(state)
    with pytest.raises(ValueError, match="those of another Smmu"):
        Smmu(memory, caches=caches)
    Smmu(memory, caches=caches.copy())


def test_a_walk_that_began_before_an_invalidation_is_not_kept():
    plain = small.system()[0]
    memory = plain.memory
    before = plain.pa(1, small.RW)
    smmu = Smmu(memory, plain.features, **small.registers(), caches=Caches.small())
    walk = smmu.start_walk(1, small.RW)
    while not walk.done:
        fetch = walk.request
        data = memory.read(fetch.address, fetch.size)
        if fetch.level == 3:
            descriptor = int.from_bytes(data, "little")
            memory.write_u64(fetch.address, descriptor ^ 1 << 20)
            smmu.command("TLBI_NSNH_ALL")
        walk.supply(data)
    assert walk.result.pa == before
    assert smmu.pa(1, small.RW) == before ^ 1 << 20
    assert smmu.stale() == []


def test_a_translation_whose_callback_invalidates_is_not_kept():
    image = bytearray(small.build())
    smmu = None

    def read(address, n):
        data = bytes(image[address - small.BASE :][:n])
        if smmu is not None and n == 8:
            smmu.command("TLBI_NSNH_ALL")
            smmu.command("CFGI_ALL")
        return data

    memory = Memory()
    memory.add_callback(small.BASE, len(image), read)
    smmu = Smmu(memory, **small.registers(), caches=Caches.small())
    smmu.translate(1, small.RW)
    assert len(smmu.caches.tlb) == len(smmu.caches.walk1) == 0
