"""Every example of the driver half runs and prints what it promises; the list of them is whole."""

import re
import runpy

import pytest
from project import ROOT

EXAMPLES = ROOT / "examples"
ELSEWHERE = {"replay_capture.py", "dma_burst.py", "nested.py", "ats_device.py"}  # other tests
PRINTED = {
    "auxiliary.py": """\
pasid 1: 0x90000000
pasid 2: 0x90001000
pasid 3: 0x90002000
no pasid: 0x80000000
refused: device has auxiliary domains under its main domain
C_BAD_CD []
""",
    "two_accelerators.py": """\
per device: the devices have [1048576, 16, 4] PASIDs
  narrow: PasidOverflow: pasid must be 1 to 15, not 16
  tiny: PasidOverflow: pasid must be 1 to 3, not 16
system wide: the devices have [16, 16, 4] PASIDs
  refused early: pasid: fewer than 1 are free in 0x1 to 0xf
  narrow: pasid 1 reaches 0x80000000
  tiny: pasid 1 reaches 0x80000000
system wide, strict: the devices have [16, 16, 0] PASIDs
  refused early: pasid: fewer than 1 are free in 0x1 to 0xf
  narrow: pasid 1 reaches 0x80000000
  tiny: NoSpace: device: policy 'system wide, strict': the device has 4 PASIDs (2 bits), \
fewer than the system's 16 PASIDs (4 bits)
""",
    "sva_faults.py": """\
pasid 1 on both
sid 8: write at 0x7f0000000008: mapped
gpu writes 0x80000008
nic reads 0x80000010
sid 9: write at 0x7f0000003000: mapped
nic writes 0x80003000
sid 8: read at 0x7effffffffff: refused
gpu beyond the heap: abort
sid 8: read at 0x7f0000000000: mapped
gpu again 0x80000000, stale: []
after the end: abort
pasids in use: 0
""",
    "dma_map.py": """\
packet at 0xfffff123, ring at 0xffff8000
packet's last byte: 0x800006fe
write to it: F_PERMISSION
afterwards: F_TRANSLATION; stale: []
left mapped: 0, IOVAs in use: 0
refused: size: no 0x200000000 bytes aligned to 0x200000000 are free up to 0xffffffff
""",
}


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_prints_what_it_promises(name, capsys):
    runpy.run_path(str(EXAMPLES / name))
    assert capsys.readouterr().out == PRINTED[name]


def test_a_checkpoint_is_ended_in_two_ways(capsys):
    runpy.run_path(str(EXAMPLES / "checkpoint.py"))
    printed = capsys.readouterr().out
    assert "aborted: [] 0 TLB hits" in printed
    assert "retried: <Result ok sid=0x3 iova=0x1234 pa=0x50008234>" in printed


def test_every_example_is_listed_and_tested():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == {*PRINTED, *ELSEWHERE, "checkpoint.py"}
    text = (EXAMPLES / "README.md").read_text()
    assert set(re.findall(r"^\| `(\w+\.py)`", text, re.MULTILINE)) == names
    assert set(re.findall(r"examples/(\w+\.py)", text)) == names
