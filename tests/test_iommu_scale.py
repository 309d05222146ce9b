"""Many PASIDs and many domains; tests/scale.py has 2^20 and 10^5 of them."""

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


def test_an_attach_among_many_domains_takes_as_long_as_among_few():
    assert scale.growth(100, 10_000) < 2
