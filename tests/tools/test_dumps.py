"""A dump of a machine gives what the capture it was made of gives."""

import contextlib
import struct

import captures
import pytest
from command import run, run_json

from smmufast import Capture, Memory
from smmufast.dumps import DumpError, complete, memory_of, registers_at, registers_of

SHIPPED = Capture.load(captures.SHIPPED)
BASE = min(SHIPPED[0].page_addresses.tolist())
END = max(SHIPPED[0].page_addresses.tolist()) + 4096


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """Raw memory with the shipped capture's tables: as QEMU's pmemsave writes it."""
    path = tmp_path_factory.mktemp("dump") / "memory.raw"
    memory = SHIPPED[0].memory()
    with open(path, "wb") as file:
        for address in SHIPPED[0].page_addresses.tolist():
            file.seek(address - BASE)
            file.write(memory.read(address, 4096))
        file.truncate(END - BASE)
    return path


def elf(path, segments):
    """A 64-bit core of segments (address, bytes): a header, program headers, contents."""
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    offset = 64 + 56 * len(segments)
    with open(path, "wb") as file:
        file.write(ident + struct.pack("<HHIQQQIHHHHHH", 4, 183, 1, 0, 64, 0, 0, 64, 56,
                                       len(segments), 0, 0, 0))  # fmt: skip
        for address, data in segments:
            file.write(struct.pack("<IIQQQQQQ", 1, 6, offset, 0, address, len(data), len(data), 0))
            offset += len(data)
        for _, data in segments:
            file.write(data)
    return path


def registers_file(path):
    names = ("STRTAB_BASE", "STRTAB_BASE_CFG", "CR0", "CR2", "IDR0", "IDR1", "IDR3", "IDR5")
    values = {name: SHIPPED[0].registers[name] for name in names if name in SHIPPED[0].registers}
    text = "# of the machine\n" + "".join(f"SMMU_{n} = {v:#x}\n" for n, v in values.items())
    path.write_text(text)
    return path


def agrees(saved):
    """The capture of a dump translates as the one that the dump was made of."""
    one, other = SHIPPED[0].smmu(), saved[0].smmu()
    for request in SHIPPED[0].requests[::40]:
        sid, iova = int(request["sid"]), int(request["iova"])
        assert one.translate(sid, iova, priv=True).pa == other.translate(sid, iova, priv=True).pa


def test_a_raw_image_gives_the_captures_answers(image, tmp_path):
    registers = registers_of(registers_file(tmp_path / "registers"))
    before = image.read_bytes()
    saved = Capture.save(
        tmp_path / "capture", memory=memory_of(image, BASE), registers=complete(registers)
    )
    agrees(saved)
    assert image.read_bytes() == before


def test_an_elf_core_gives_the_captures_answers(image, tmp_path):
    pytest.importorskip("elftools")
    data = image.read_bytes()
    middle = len(data) // 2 & ~4095
    core = elf(tmp_path / "core", [(BASE + middle, data[middle:]), (BASE, data[:middle])])
    registers_file(tmp_path / "registers")
    out = run("capture", core, tmp_path / "capture", "--registers", tmp_path / "registers")
    assert out.endswith(" pages\n")
    agrees(Capture.load(tmp_path / "capture"))
    run("streams", tmp_path / "capture")


def test_the_command_takes_registers_one_by_one(image, tmp_path):
    registers = SHIPPED[0].registers
    names = ("STRTAB_BASE", "STRTAB_BASE_CFG", "IDR0", "IDR1", "IDR3", "IDR5")
    given = [f"--register={name}={registers[name]:#x}" for name in names]
    document = run_json("capture", image, tmp_path / "capture", "--base", hex(BASE), *given)
    assert document["pages"] > 10
    agrees(Capture.load(tmp_path / "capture"))
    assert "the directory is not empty" in run(
        "capture", image, tmp_path / "capture", "--base", hex(BASE), *given, status=2)  # fmt: skip


def test_registers_are_read_from_the_smmus_own_pages():
    memory = Memory()
    memory.add_private(0x900_0000, 0x2_0000)
    memory.write(0x900_0080, (0x1234_5640).to_bytes(8, "little"))
    memory.write(0x901_00A8, (7).to_bytes(4, "little"))
    found = registers_at(memory, 0x900_0000)
    assert found["STRTAB_BASE"] == 0x1234_5640 and found["EVENTQ_PROD"] == 7
    with pytest.raises(ValueError, match="address must be"):
        registers_at(memory, 0x1000)


def test_forms_of_registers(tmp_path):
    path = tmp_path / "registers"
    path.write_text("0x80: 0x5000\n0x84: 1\ncr0 1 # on\nSMMU_CR2=2\n\n")
    assert registers_of(path) == {"STRTAB_BASE": 1 << 32 | 0x5000, "CR0": 1, "CR2": 2}


BAD = {
    "no register": ("XYZ 5", "no register of an SMMU is called 'XYZ'"),
    "no value": ("CR0", "line 1 must be a register and its value"),
    "no number": ("CR0 = on", "line 1 must be a register and its value"),
    "too large": ("CR0 0x100000000", "CR0 must be 4 bytes"),
    "too large a half": ("0x84 0x100000000", "STRTAB_BASE must be 8 bytes"),
}


@pytest.mark.parametrize("text, problem", BAD.values(), ids=BAD)
def test_what_is_no_list_of_registers_is_refused(tmp_path, image, text, problem):
    path = tmp_path / "registers"
    path.write_text(text)
    with pytest.raises(DumpError) as caught:
        registers_of(path)
    assert problem in str(caught.value)
    assert problem in run("capture", image, tmp_path / "c", "--base", "0", "--registers", path,
                          status=2)  # fmt: skip
    assert not (tmp_path / "c").exists()


def test_what_is_no_dump_is_refused(tmp_path, image):
    with pytest.raises(DumpError, match="base must be given"):
        memory_of(image)
    with pytest.raises(DumpError, match="a multiple of 8"):
        memory_of(image, 3)
    with pytest.raises(FileNotFoundError):
        memory_of(tmp_path / "nowhere", 0)
    (tmp_path / "empty").touch()
    with pytest.raises(DumpError, match="it holds no memory"):
        memory_of(tmp_path / "empty", 0)
    with pytest.raises(ValueError, match="STRTAB_BASE is missing"):
        complete({})
    assert "STRTAB_BASE is missing" in run(
        "capture", image, tmp_path / "c", "--base", "0", status=2)  # fmt: skip
    assert "is not NAME=VALUE" in run(
        "capture", image, tmp_path / "c", "--base", "0", "--register", "x", status=2)  # fmt: skip


def test_cores_that_are_damaged_are_refused(tmp_path):
    pytest.importorskip("elftools")
    whole = elf(tmp_path / "core", [(0x1000, bytes(4096)), (0x8000, bytes(4096))])
    memory = memory_of(whole)
    assert [(r.base, r.size) for r in memory.regions] == [(0x1000, 4096), (0x8000, 4096)]
    with pytest.raises(DumpError, match="base must be absent"):
        memory_of(whole, 0)
    data = whole.read_bytes()
    path = tmp_path / "cut"
    for size in (4, 17, 63, 65, 100, 170, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(DumpError):
            memory_of(path)
    overlapping = elf(tmp_path / "both", [(0x1000, bytes(4096)), (0x1800, bytes(4096))])
    with pytest.raises(DumpError, match="segment at"):
        memory_of(overlapping)
    for seed in range(200):  # any byte of the headers
        at = seed % 176
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55 + seed & 0xFF]) + data[at + 1 :])
        with contextlib.suppress(DumpError, MemoryError):
            memory_of(path)
