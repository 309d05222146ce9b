"""Nothing is cached between calls: each sees memory as it is, whatever was translated before."""

import random

import ptwriter
import pytest
import small
import tablegen
import twin
from bench import CONTEXT_TABLE, SID, Bench, nested_system

import smmufast


@pytest.mark.rule("S3.3.3-1", "S16.2-1", "L-2")
@pytest.mark.parametrize("seed", [k if k < 10 else pytest.param(k, marks=pytest.mark.slow)
                                  for k in range(40)])  # fmt: skip
@pytest.mark.parametrize("maker", [tablegen.random_system, tablegen.random_nested_system])
def test_every_call_sees_the_bytes_of_the_moment(maker, seed):
    rng = random.Random(seed)
    system = maker(rng)
    kept = twin.smmu_of(system)
    requests = system.requests(12)
    regions = [data for _, data in system.regions()]
    for step in range(400):
        request = rng.choice(requests)
        call = request._asdict()
        sid, iova = call.pop("sid"), call.pop("iova")
        fetches = twin.smmu_of(system).translate(sid, iova, trace=True, **call).fetches
        if fetches and step % 3 == 0:
            # a bit of something that this very translation reads, most often one that matters
            fetch = rng.choice(fetches)
            if fetch.data is not None:
                bit = rng.choice((0, 1, 2, 3, 14, 31, 41, 45, 46, rng.randrange(64)))
                system.memory.flip(fetch.address + 8 * rng.randrange(fetch.size // 8), bit)
        else:
            data = rng.choice(regions)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        fresh = twin.result_row(twin.smmu_of(system).translate(sid, iova, **call))
        assert twin.result_row(kept.translate(sid, iova, **call)) == fresh, (seed, step)


def test_level_1_tables_at_address_0_are_read_again():
    memory = smmufast.Memory()
    memory.add_private(0, 1 << 20)
    memory.write(0, ptwriter.encode_l1std(7, 0x1000))
    memory.write(0x1000, ptwriter.encode_ste(v=1, config=0b101, s1contextptr=0x3000))
    memory.write(0x2000, ptwriter.encode_ste(v=1, config=0b100))
    memory.write(
        0x3000,
        ptwriter.encode_cd(v=1, aa64=1, a=1, r=1, t0sz=25, epd1=1, ips=5, ttb0=0x4000, mair=0xFF),
    )
    memory.write_u64(0x4000, 0x4000_0000 | 1 << 10 | 1 << 6 | 1)  # a block of 1 GiB
    smmu = smmufast.Smmu(memory, strtab_base=0, strtab_base_cfg=1 << 16 | 6 << 6 | 6)
    assert smmu.pa(0, 0x123) == 0x4000_0123
    memory.write(0, ptwriter.encode_l1std(7, 0x2000))
    assert smmu.translate(0, 0x123).action == "bypass"
    memory.write(0, bytes(8))
    assert smmu.translate(0, 0x123).fault.name == "C_BAD_STREAMID"


@pytest.mark.parametrize("merged", [False, True])
def test_level_1_context_descriptors_are_read_again(merged):
    bench = Bench()
    bench.map(0, 0x5000)
    if merged:
        bench.memory.merge()
    leaves = [CONTEXT_TABLE + 0x4000, CONTEXT_TABLE + 0x8000]
    for leaf, asid in zip(leaves, (3, 4), strict=True):
        bench.memory.write(leaf, ptwriter.encode_cd(**bench.cd | {"asid": asid}))
    bench.memory.write(CONTEXT_TABLE, ptwriter.encode_l1cd(leaves[0]))
    bench.write_ste(s1fmt=1, s1cdmax=8, s1dss=2)
    smmu = twin.smmu_of(bench)
    assert smmu.translate(SID, 0).asid == 3
    bench.memory.write(CONTEXT_TABLE, ptwriter.encode_l1cd(leaves[1]))
    assert smmu.translate(SID, 0).asid == 4
    bench.memory.write(CONTEXT_TABLE, bytes(8))
    assert smmu.translate(SID, 0).fault.name == "C_BAD_SUBSTREAMID"


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("s1fmt", [0, 1])
def test_context_descriptors_lie_where_stage_2_puts_them_now(s1fmt, merged):
    """Stage 2 moves the page of the CD, and that of the level-1 descriptor."""
    bench, iova, _ = nested_system()
    if s1fmt:
        bench.write_ste(s1fmt=1, s1cdmax=8, s1dss=2)
        bench.write_cd(0x40)
        bench.memory.write(CONTEXT_TABLE, ptwriter.encode_l1cd(CONTEXT_TABLE + 0x1000))
        bench.map_self(CONTEXT_TABLE + 0x1000)
    moved = 0x600_0000
    bench.memory.add(moved, 0x3000)
    where = CONTEXT_TABLE + (0x1000 if s1fmt else 0)
    if merged:
        bench.memory.merge()
    smmu = twin.smmu_of(bench)
    first = smmu.translate(SID, iova)
    assert first
    bench.memory.write(moved, ptwriter.encode_cd(**bench.cd | {"asid": first.asid ^ 5}))
    assert smmu.translate(SID, iova).asid == first.asid
    bench.map2(where, moved)
    assert smmu.translate(SID, iova).asid == first.asid ^ 5
    if s1fmt:
        bench.memory.write(moved + 0x1000, ptwriter.encode_l1cd(CONTEXT_TABLE + 0x2000))
        bench.memory.write(moved + 0x2000, ptwriter.encode_cd(**bench.cd | {"asid": 77}))
        bench.map2(CONTEXT_TABLE + 0x2000, moved + 0x2000)
        bench.map2(CONTEXT_TABLE, moved + 0x1000)
        assert smmu.translate(SID, iova).asid == 77


QUEUE = 0x9000_0000
OTHER_TABLE = 0xC000_0000


def reprogrammed(caches, register, value, event):
    """The small system, one of whose events makes software write a register with SMMUEN=0."""
    image = small.build()
    entry = bytes(image[64 * small.STAGE1 : 64 * small.STAGE1 + 64])
    image[64 * TWIN : 64 * TWIN + 64] = entry
    memory = smmufast.Memory()
    memory.add(image, small.BASE)
    memory.add_private(QUEUE, 0x1000)
    memory.add_private(OTHER_TABLE, small.SIZE * 4)
    memory.write(OTHER_TABLE + 64 * small.STAGE1, entry)
    memory.write(OTHER_TABLE + 64 * TWIN, ptwriter.encode_ste(v=1, config=4))
    told = []

    def interrupt(name):
        told.append(name)
        smmu.write("EVENTQ_CONS", smmu.read("EVENTQ_PROD"))
        if len(told) == event:
            smmu.write("CR0", 4)
            smmu.write(register, value)
            smmu.write("CR0", 5)

    smmu = smmufast.Smmu(
        memory, eventq_base=QUEUE | 4, on_interrupt=interrupt, caches=caches, **small.registers()
    )
    smmu.write("IRQ_CTRL", 4)
    return smmu


TWIN = 16  # of small.STAGE1's slot in a batch: what comes second in a block goes one by one
FAULT = (TWIN, small.UNMAPPED)
REPROGRAMS = {
    "the same stream follows": [(TWIN, small.RW), FAULT, (TWIN, small.RW)],
    "another is between": [
        (small.STAGE1, small.RW), (TWIN, small.RW), FAULT, (small.STAGE1, small.RW),
        (TWIN, small.RW),
    ],
    "a record came before": [
        (TWIN, small.RW), FAULT, (TWIN, small.RW), FAULT, (TWIN, small.RW),
    ],
}  # fmt: skip


@pytest.mark.parametrize("requests", REPROGRAMS.values(), ids=REPROGRAMS)
@pytest.mark.parametrize("before", [0, 12])  # the second are so many that blocks are set out
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("register", "value", "last"),
    [("STRTAB_BASE", OTHER_TABLE, "bypass"), ("STRTAB_BASE_CFG", 2, "abort")],
)
def test_a_batch_sees_registers_that_an_interrupt_writes(
    requests, before, cached, register, value, last
):
    requests = [requests[0]] * before + requests

    def run(face):
        caches = smmufast.Caches(ste=(16, 4), cd=(16, 4), tlb=(16, 4)) if cached else None
        return face(reprogrammed(caches, register, value, requests.count(FAULT)))

    def by_batch(smmu):
        sids, iovas = (list(column) for column in zip(*requests, strict=True))
        actions = smmu.translate_batch(sids, iovas)["action"]
        return [smmufast.ACTIONS[action] for action in actions]

    single = run(lambda smmu: [smmu.translate(*request).action for request in requests])
    if cached and register == "STRTAB_BASE":
        last = "ok"  # the STE is cached
    for request, action in zip(requests[:-1], single, strict=False):
        assert action == ("abort" if request == FAULT else "ok")
    assert single[-1] == last
    assert run(by_batch) == single
