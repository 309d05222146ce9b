"""Bursts are what translating page after page gives, in whatever memory the tables lie."""

import random
import signal

import numpy as np
import pytest
import tablegen
import twin
from ptwriter import encode_cd, encode_ste

from smmufast import ExternalAbort, Features, Memory, Smmu

BASE = 0x8000_0000
CD = 0x1000
LEVEL2 = 0x2000
LEVEL3 = 0x1_0000
TABLES = 32
PAGES = TABLES * 512  # several times as many as burst_run() takes at a time
RUN = 3  # pages that follow each other in physical memory


def page_by_page(smmu, sid, iova, size, **access):
    """Segments and last Result, from translate() alone."""
    segments = []
    before = None
    oas = smmu.features.oas_bits
    while size:
        result = smmu.translate(sid, iova, **access)
        if not result:
            return segments, result
        page = result.page_size or 1 << oas
        room = min(size, page - iova % page)
        kind = result.perm, result.attr, result.shareability
        if before == (result.pa, kind):
            segments[-1] = (*segments[-1][:2], segments[-1][2] + room)
        else:
            segments.append((iova, result.pa, room))
        before = result.pa + room, kind
        iova += room
        size -= room
    return segments, None


def assert_same(smmu, found, wanted):
    """Segments are those of page_by_page()."""
    segments, result = wanted
    assert list(found) == segments
    assert bool(found) == (result is None)
    if result is None:
        assert found.result is None
    else:
        assert twin.result_row(found.result) == twin.result_row(result)
        assert found.result.iova == result.iova


@pytest.mark.rule("S15.2-2", "S16.7.1-1")
def test_bursts_over_random_tables_are_those_of_page_after_page():
    lengths = set()
    for seed in range(60):
        rng = random.Random(seed)
        system = tablegen.random_system(rng)
        smmu = twin.smmu_of(system)
        for request in system.requests(40):
            call = request._asdict()
            sid, iova = call.pop("sid"), call.pop("iova")
            size = min(rng.randrange(1, 1 << rng.randrange(1, 22)), (1 << 64) - iova)
            wanted = page_by_page(smmu, sid, iova, size, **call)
            found = smmu.translate_range(sid, iova, size, **call)
            assert_same(smmu, found, wanted)
            lengths.add((len(found), bool(found)))
    assert lengths >= {(0, False), (1, False), (1, True), (2, False), (2, True)}


def image():
    """A stream table, a CD and tables of 4 KiB pages, the last page but one unmapped."""
    words = np.zeros((LEVEL3 + TABLES * 4096) // 8, np.uint64)
    words[:8] = np.frombuffer(encode_ste(v=1, config=0b101, s1contextptr=BASE + CD), np.uint64)
    cd = encode_cd(
        v=1, t0sz=64 - 26, tg0=0, epd1=1, aa64=1, ips=5, ttb0=BASE + LEVEL2, affd=1, r=1, a=1,
        mair=0xBBFF,
    )  # fmt: skip
    words[CD // 8 :][:8] = np.frombuffer(cd, np.uint64)
    tables = np.arange(TABLES, dtype=np.uint64) * np.uint64(4096)
    words[LEVEL2 // 8 :][:TABLES] = tables + np.uint64(BASE + LEVEL3 | 3)
    page = np.arange(PAGES, dtype=np.uint64)
    address = (page // np.uint64(RUN) * np.uint64(RUN + 1) + page % np.uint64(RUN)) << np.uint64(12)
    # the middle of a run may differ in AP[2], memory type or shareability
    differ = np.array([0, 1 << 7, 1 << 2, 3 << 8], np.uint64)[page // np.uint64(RUN) % np.uint64(4)]
    differ[page % np.uint64(RUN) != 1] = 0
    words[LEVEL3 // 8 :] = address | differ | np.uint64(0x443)  # AF, AP[1], page
    words[-2] = 0
    return words.view(np.uint8)


def plain(data):
    """Memory that holds an image."""
    memory = Memory()
    memory.add(data, BASE)
    return memory


def smmu_over(memory):
    """A Smmu of one stream."""
    return Smmu(memory, Features(), strtab_base=BASE, strtab_base_cfg=0)


def test_a_long_burst_is_that_of_page_after_page():
    smmu = smmu_over(plain(image()))
    whole = PAGES << 12
    for iova, size in ((0, whole), (0x1234, whole), (0x5000, 4096 << 12), (0x5FFF, 4095 << 12)):
        wanted = page_by_page(smmu, 0, iova, size)
        assert len(wanted[0]) > 1300
        assert_same(smmu, smmu.translate_range(0, iova, size), wanted)


def test_a_burst_over_callbacks_makes_every_fetch_of_every_page():
    data = image()
    reads = []

    def read(address, size):
        reads.append((address, size))
        return data[address - BASE :][:size].tobytes()

    memory = Memory()
    memory.add_callback(BASE, len(data), read)
    smmu = smmu_over(memory)
    size = 5000 << 12
    found = smmu.translate_range(0, 0x1000, size)
    mine, reads[:] = list(reads), []
    assert_same(smmu, found, page_by_page(smmu, 0, 0x1000, size))
    assert mine == reads
    assert len(mine) == 5000 * 4  # STE, CD and two levels


@pytest.mark.parametrize("nth", [1, 2, 3, 4, 4096 * 4 + 3, 4097 * 4 + 2, 20_000])
def test_an_injected_error_hits_the_same_fetch_of_a_burst(nth):
    data = image()
    smmus = []
    for _ in range(2):
        memory = plain(data)
        memory.inject_error(nth=nth)
        smmus.append(smmu_over(memory))
    wanted = page_by_page(smmus[0], 0, 0, 6000 << 12)
    assert wanted[1].event.name in ("F_STE_FETCH", "F_CD_FETCH", "F_WALK_EABT")
    assert_same(smmus[1], smmus[1].translate_range(0, 0, 6000 << 12), wanted)


def test_what_a_callback_raises_ends_the_burst_and_lets_memory_go():
    data = image()
    reads = []

    def read(address, size):
        reads.append(address)
        if len(reads) == 4096 * 4 + 10:
            raise ZeroDivisionError
        return data[address - BASE :][:size].tobytes()

    memory = Memory()
    memory.add_callback(BASE, len(data), read)
    with pytest.raises(ZeroDivisionError):
        smmu_over(memory).translate_range(0, 0, PAGES << 12)
    memory.remove(BASE)
    with pytest.raises(ExternalAbort):
        memory.read(BASE, 8)


def test_a_signal_is_handled_within_a_burst():
    data = image()
    smmu = smmu_over(plain(data))
    seen = []

    def handler(_number, _frame):
        seen.append(1)
        raise InterruptedError

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        with pytest.raises(InterruptedError):
            while True:
                smmu.translate_range(0, 0, (PAGES - 2) << 12)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert seen == [1]
    smmu.memory.remove(BASE)
    assert smmu.translate_range(0, 0, 1).event.name == "F_STE_FETCH"


def test_fields_renamed_in_one_result_keep_their_names_in_the_next():
    smmu = smmu_over(plain(image()))
    for _ in range(2):
        array = smmu.translate_range(0, 0, 0x1000).array
        rows = smmu.translate_batch(0, np.zeros(1, np.uint64))
        assert array.dtype.names == ("iova", "pa", "length")
        assert rows.dtype.names == ("pa", "action", "event")
        array.dtype.names = rows.dtype.names = ("a", "b", "c")
