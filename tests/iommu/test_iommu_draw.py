"""Pictures of tables: what they say is what the SMMU does, and they draw any bytes."""

import random
import re
from itertools import pairwise

import pytest

from smmufast import layout
from smmufast.iommu import IDENTITY, AddressSpace, InvalidArgument, NoDevice, Prot, System, Viommu
from smmufast.iommu.device import Device
from smmufast.iommu.draw import MOST_LINES

RAM = 0x8000_0000
PAGE = 0x1000
LEAVES = re.compile(
    r"(0x[0-9a-f]+) to (0x[0-9a-f]+) -> (0x[0-9a-f]+), (\d+) of (\d+[KMGT]), (read write|read)"
)


def drawn(device, **more):
    """{PASID or None: [(first, last, output, writable)]} as a picture says."""
    found = {}
    pasid = None
    for line in device.draw(**more).splitlines():
        if context := re.search(r"CD (\d+) at 0x[0-9a-f]+: ", line):
            pasid = int(context[1]) or None
            found[pasid] = []
        if leaves := LEAVES.search(line):
            first, last, output = (int(word, 16) for word in leaves.groups()[:3])
            found.setdefault(pasid, []).append((first, last, output, leaves[6] == "read write"))
    return found


def agree(device, found):
    """The SMMU translates what a picture shows, and nothing around it."""
    for pasid, rows in found.items():
        rows = [*rows, None]
        before = None
        for row, after in pairwise(rows):
            first, last, output, writable = row
            for at in (first, (first + last) // 2, last):
                assert device.translate(at, pasid=pasid).pa == output + at - first
                assert bool(device.translate(at, pasid=pasid, write=True)) == writable
            if first and before != first - 1:
                assert not device.translate(first - 1, pasid=pasid)
            if after is None or after[0] != last + 1:
                assert not device.translate(last + 1, pasid=pasid)
            before = last


@pytest.mark.parametrize("granule", [4096, 65536])  # whose first tables are whole pages
def test_tables_that_lead_to_themselves_end_a_picture(granule):
    system = System()
    device = system.device(8)
    domain = device.paging_domain(granule=granule)
    device.attach(domain)
    domain.map(0, RAM, granule)
    text = device.draw()
    table = int(re.search(r"TTB0 (0x[0-9a-f]+)", text)[1], 16)
    memory = device.iommu.memory
    memory.write(table, (table | 3).to_bytes(8, "little") * (granule // 8))
    lines = device.draw(limit=10**9).splitlines()
    assert len(lines) == MOST_LINES + 1
    assert lines[-1] == f"… more is left out: a picture has {MOST_LINES} lines at most"


@pytest.mark.parametrize("granule", [4096, 16384, 65536])
@pytest.mark.parametrize("bits", [3, 14])
def test_what_a_picture_shows_is_what_the_smmu_does(systems, granule, bits):
    rng = random.Random(bits)
    device = systems().device(8, pasid_bits=bits)
    wanted = {}
    for pasid in (None, 1, 5, (1 << bits) - 1):
        domain = device.paging_domain(granule=granule, contiguous=pasid == 5)
        if pasid is None:
            device.attach(domain)
        else:
            device.attach_pasid(domain, pasid)
        total = 0
        for slot in range(4):
            size = rng.choice([1, 3, 40, 700, 3000]) * granule
            domain.map(
                (slot << 36) + rng.randrange(100) * granule, (slot << 33) + RAM, size,
                rng.choice([Prot.READ, Prot.READ | Prot.WRITE]),
            )  # fmt: skip
            total += size
        wanted[pasid] = total
    found = drawn(device, limit=1000)
    sizes = {
        pasid: sum(last + 1 - first for first, last, _, _ in rows) for pasid, rows in found.items()
    }
    assert sizes == wanted
    agree(device, found)


def test_stage_2_and_guests_are_drawn(systems):
    system = systems()
    device = system.device(8)
    host = device.paging_domain(nest_parent=True)
    device.attach(host)
    host.map(0x4000_0000, RAM, 0x40_0000)
    found = drawn(device)
    assert found == {None: [(0x4000_0000, 0x403F_FFFF, RAM, True)]}
    agree(device, found)
    # the guest's CD and tables lie at IPAs: each is put where its page of the host is
    context = {"V": 1, "AA64": 1, "EPD1": 1, "R": 1, "A": 1, "T0SZ": 25, "IPS": 5, "ASID": 7,
               "TTB0": 0x4000_1000, "MAIR0": 0xFF}  # fmt: skip
    guest = {0x4000_0000: ("CD", context)}
    for at, fields in ((0x4000_1000, 0x4000_2000), (0x4000_2000, 0x4000_3000)):
        guest[at] = "PTE_S1_TABLE", {"Valid": 1, "Type": 1, "Addr_4K": fields}
    guest[0x4000_3008] = (
        "PTE_S1", {"Valid": 1, "Type": 1, "AF": 1, "AP": 1, "nG": 1, "Addr_4K": 0x4000_5000}
    )  # fmt: skip
    for ipa, (record, fields) in guest.items():
        word = layout.pack(record, **fields)
        system.memory.write(RAM + ipa - 0x4000_0000, layout.to_bytes(record, word))
    viommu = Viommu(host)
    viommu.add(1, device)
    device.replace(viommu.domain((0b1011 | 0x4000_0000, 0)))
    text = device.draw()
    assert "both stages" in text and "CD table at IPA 0x40000000, 1 CD" in text
    assert "[1] 0x1000 to 0x1fff -> 0x40005000, 1 of 4K, read write" in text
    assert device.translate(0x1008).pa == RAM + 0x5008


def test_plain_entries_and_quiet_cds_are_drawn(systems):
    system = systems()
    device, other = system.device(8, pasid_bits=4), system.device(9)
    assert re.fullmatch(r"sid 0x8: STE at 0x[0-9a-f]+: abort", device.draw())
    device.attach(IDENTITY)
    assert device.draw().endswith(": bypass")
    space = AddressSpace.of(system)
    device.bind(space)
    assert "stage 1, without PASID bypass" in device.draw()
    assert device.draw().splitlines()[-1].strip(" └─│") == "nothing is mapped"
    space.exit()
    assert device.draw().endswith("quiet (EPD0)")
    assert system.draw() == device.draw() + "\n" + other.draw()


def test_a_limit_counts_what_it_leaves_out(systems):
    device = systems().device(8, pasid_bits=4)
    domain = device.paging_domain()
    device.attach(domain)
    for page in range(0, 40, 2):
        domain.map(page * PAGE, RAM, PAGE)
    lines = device.draw(limit=3).splitlines()
    assert sum("->" in line for line in lines) == 3
    assert lines[-1].strip(" └─│") == "… 17 more"
    with pytest.raises(InvalidArgument, match="limit must be 1 or more, not 0"):
        device.draw(limit=0)
    with pytest.raises(NoDevice):
        Device(3).draw()


def test_any_bytes_are_drawn(systems):
    """Tables that something overwrote: a picture ends, and is one."""
    rng = random.Random(3)
    system = systems()
    device = system.device(8, pasid_bits=12)
    domain = device.paging_domain()
    device.attach(domain)
    device.attach_pasid(domain, 1100)
    domain.map(0, RAM, 0x40_0000)
    memory, pages = system.memory, system.pages
    ste = device.iommu.ste_address(8)
    places = [ste, device.cd_table.base, device.cd_table.address(0), domain.root]
    kept = {at: memory.read(at, 64) for at in places}
    for _ in range(300):
        at = rng.choice(places) + 8 * rng.randrange(8)
        memory.write_u64(at, memory.read_u64(at) ^ 1 << rng.randrange(64))
        if rng.random() < 0.2:
            memory.write_u64(at, rng.choice([domain.root, pages.base, ste]) | rng.randrange(8))
        assert device.draw(limit=2).startswith("sid 0x8: STE at")
        if rng.random() < 0.1:
            for place, data in kept.items():
                memory.write(place, data)
    for place, data in kept.items():
        memory.write(place, data)
