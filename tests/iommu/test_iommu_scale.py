"""Many PASIDs and many domains; tests/scale.py has 2^20 and 10^5 of them."""

import os
import resource
import subprocess
import sys

import pytest
import scale


@pytest.mark.parametrize("ats", [False, True])
def test_every_pasid_of_a_device_can_be_attached(ats):
    scale.many_pasids(13, ats=ats)


def test_the_last_of_2_to_the_20_pasids_can_be_attached(systems):
    system = systems()
    device = system.device(1, pasid_bits=20)
    domain = device.paging_domain()
    domain.map(0x1000, 0x8000_0000, 0x1000)
    before = system.pages.in_use
    device.attach_pasid(domain, (1 << 20) - 1)
    assert device.translate(0x1234, pasid=(1 << 20) - 1).pa == 0x8000_0234
    assert not device.translate(0x1234, pasid=(1 << 20) - 2)
    # a level-1 table of 1024 entries, and one leaf
    assert system.pages.in_use - before == 8 * 1024 + 64 * 1024


# --- addresses of the host ---

ALIVE = """
from smmufast.iommu import System
systems = []
for _ in range({count}):
    system = System()
    nic = system.device(8, pasid_bits=16)
    domain = nic.paging_domain()
    nic.attach(domain)
    domain.map(0x10000, 0x8000_0000, 0x4000)
    system.memory.write(0x8000_2345, b"data")
    assert nic.translate(0x12345).pa == 0x8000_2345
    systems.append(system)
print(len(systems), systems[-1].pages.in_place, systems[-1].pages.size >> 30)
"""


def alive(count, limit=None):
    """What a process says that has so many systems at once, and so much address space."""
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("the sanitizer takes terabytes of addresses itself")

    def confine():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    # numpy's threads take addresses, too
    done = subprocess.run([sys.executable, "-P", "-c", ALIVE.format(count=count)],
                          capture_output=True, text=True, timeout=300, preexec_fn=confine,
                          env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("count", [350, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_systems_are_alive_at_once(count):
    assert alive(count) == [str(count), "True", "64"]


@pytest.mark.parametrize(("gib", "room"), [(100, "64"), (4, "2")])
def test_a_host_that_grants_few_addresses_gives_less_room(gib, room):
    assert alive(1, gib << 30) == ["1", "True", room]


def test_where_no_room_is_granted_in_one_piece_it_is_made_of_pieces():
    assert alive(1, 600 << 20) == ["1", "False", "1"]
