"""Nothing is cached between calls: each sees memory as it is, whatever was translated before."""

import random

import ptwriter
import pytest
import tablegen
import twin

import smmufast


@pytest.mark.parametrize("seed", range(40))
def test_every_call_sees_the_bytes_of_the_moment(seed):
    rng = random.Random(seed)
    system = tablegen.random_system(rng)
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
