"""Registers as software sees them: the map, access sizes, guards, acknowledgements, warnings."""

import random
import re

import pytest
import small
from rawfeatures import raw_of

from smmufast import Features, Memory, Smmu, layout

FULL = Features.full()
ALL = {
    record.offset: record for record in layout.REGISTERS.values()
}  # those that some implementation has
ONES = (1 << 64) - 1


def device(features=FULL, cr0=0, **more):
    """A device that was reset, over the small system's memory."""
    memory = Memory()
    memory.add(small.build(), small.BASE)
    memory.add_private(0x9000_0000, 0x100_0000)
    return Smmu(memory, features, cr0=cr0, cr2=0, **more)


# --- the map ---


@pytest.mark.rule(
    "S2.1-1", "S3.10-1", "S3.15-2", "S3.16-2", "S6.2-6", "S6.2-13", "S6.3.1-1", "S6.3.1-3",
    "S6.3.2-1", "S6.3.3-1", "S6.3.4-1", "S6.3.5-1", "S6.3.6-1", "S6.3.7-1", "S6.3.8-1",
    "S6.3.170-1",
)
def test_identification_registers_tell_the_features():
    smmu = device()
    for offset, expected in (
        (0x00, FULL.idr0), (0x04, FULL.idr1), (0x08, 0), (0x0C, FULL.idr3), (0x10, 0),
        (0x14, FULL.idr5), (0x18, 0), (0x1C, FULL.aidr), (0xFE0, 0),
        (0xFF0, 0x0D), (0xFF4, 0xF0), (0xFF8, 0x05), (0xFFC, 0xB1),
    ):  # fmt: skip
        assert smmu.read(offset) == expected
        smmu.write(offset, 0xFFFF_FFFF)
        assert smmu.read(offset) == expected
        assert "ignored" in smmu.warnings[-1].text
    for bit, name in ((4, "cohacc"), (8, "dormhint")):  # what they say changes nothing else
        for value in (0, 1):
            assert device(FULL.replace(**{name: value})).read(0) >> bit & 1 == value


@pytest.mark.rule("S3.7-1", "S3.10.2-1", "S6.2-1", "S6.2-2", "S6.2-3", "S6.2-5", "S6.2.2-1")
def test_every_word_reads_as_its_register_or_as_zero():
    smmu = device(cr0=0xF, **small.registers())
    for offset in range(0, 0x20000, 4):
        record, below = ALL.get(offset), ALL.get(offset - 4)
        page1 = ALL.get(offset + 0x10000)
        if record is not None:
            expected = smmu.read(record.name) & 0xFFFF_FFFF
        elif below is not None and below.bytes == 8:
            expected = smmu.read(below.name) >> 32
        elif page1 is not None:
            expected = smmu.read(page1.name)
        elif 0xFF0 <= offset < 0x1000:
            expected = (0x0D, 0xF0, 0x05, 0xB1)[offset - 0xFF0 >> 2]
        else:
            expected = 0
        assert smmu.read(offset) == expected, hex(offset)
        if offset % 8 == 0 and (record is None or record.bytes == 4):
            assert smmu.read(offset, 8) == 0, hex(offset)


@pytest.mark.rule("S6.2-4")
def test_registers_of_both_pages_are_those_of_page_0_too():
    smmu = device()
    for name in ("EVENTQ", "PRIQ"):
        smmu.write(f"{name}_BASE", 0x9000_0000 | 5)
        for which in ("PROD", "CONS"):
            offset = layout.REGISTERS[f"{name}_{which}"].offset
            smmu.write(offset - 0x10000, 0x8000_0007)
            assert smmu.read(offset) == smmu.read(offset - 0x10000) == 0x8000_0007


@pytest.mark.rule("S6.2-7", "S6.2-8")
def test_64_bit_registers_are_two_halves_or_one_access():
    smmu = device()
    for name in ("STRTAB_BASE", "CMDQ_BASE", "EVENTQ_BASE", "PRIQ_BASE", "GERROR_IRQ_CFG0"):
        record = layout.REGISTERS[name]
        fields = sum(field.mask for field in record.fields)
        smmu.write(record.offset, ONES, 8)
        assert smmu.read(record.offset, 8) == fields
        smmu.write(record.offset + 4, 0)
        assert smmu.read(record.offset, 8) == fields & 0xFFFF_FFFF
        smmu.write(record.offset + 4, 0x4000_0012)
        smmu.write(record.offset, 0)
        assert smmu.read(record.offset, 8) == 0x4000_0012 << 32 & fields
        assert smmu.read(record.offset + 4) == (0x4000_0012 << 32 & fields) >> 32


@pytest.mark.rule("S6.2-9", "S6.2-10")
@pytest.mark.parametrize(
    ("offset", "size"),
    [(0x20, 1), (0x20, 2), (0x21, 4), (0x22, 4), (0x20, 8), (0x28, 8), (0x84, 8), (0x98, 8),
     (0x82, 8), (0x3C, 4), (0x50, 8), (0x1_0000, 4)],
)  # fmt: skip
def test_accesses_of_other_sizes_read_as_zero_and_are_ignored(offset, size):
    smmu = device(cr0=1)
    before = {name: smmu.read(name) for name in layout.REGISTERS}
    assert smmu.read(offset, size) == 0
    smmu.write(offset, (1 << 8 * size) - 1, size)
    assert {name: smmu.read(name) for name in layout.REGISTERS} == before
    row = "S6.2-9" if size < 4 or offset % size else "S6.2-10" if size == 8 else "S6.2-2"
    row = "S6.2-3" if offset >= 0x10000 else row
    assert smmu.warnings[-1] == (
        f"{offset:#x}", f"write of {size} bytes ignored: no register ({row})"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("writes", "row"),
    [
        ([("CR0", 1 << 31)], "S6.2-7"),
        ([("IDR0", 0)], "S6.2-13"),
        ([("S2PII", 1)], "S6.2-7"),
        ([("CR0", 1), ("STRTAB_BASE", 64)], "S6.2-11"),
        ([("GBPA", 1)], "S6.3.14.1-1"),
        ([("CR0", 1), ("CR1", 0xFFF)], "S6.3.11.1-1"),
        ([("CR0", 8), ("CR1", 0xFFF)], "S6.3.11.2-1"),
        ([("GERROR_IRQ_CFG0", 1 << 48)], "S6.3.21-2"),
        ([("GERRORN", 1)], "S6.3.20-1"),
        ([("STRTAB_BASE_CFG", 17), ("CR0", 1)], "S6.3.25-7"),
        ([("STRTAB_BASE_CFG", 2 << 16), ("CR0", 1)], "S6.3.25-3"),
        ([("STRTAB_BASE_CFG", 1 << 16 | 7 << 6 | 8), ("CR0", 1)], "S6.3.25-4"),
        ([("STRTAB_BASE", 0x9000_0040), ("STRTAB_BASE_CFG", 4), ("CR0", 1)], "S6.3.24-3"),
        ([("STRTAB_BASE", 0x9000_0040), ("STRTAB_BASE_CFG", 1 << 16 | 8 << 6 | 12), ("CR0", 1)],
         "S6.3.24-4"),
        ([("STRTAB_BASE", 1 << 50), ("CR0", 1)], "S3.4.3-5"),
        ([("CMDQ_BASE", 31), ("CR0", 8)], "S6.3.26-5"),
        ([("CMDQ_BASE", 1 << 50), ("CR0", 8)], "S6.3.26-2"),
        ([("CMDQ_BASE", 0x9000_0020 | 4), ("CR0", 8)], "S6.3.26-3"),
    ],
)  # fmt: skip
def test_every_warning_names_its_row(writes, row):
    smmu = device(FULL.replace(oas=5, sidsize=16))
    for name, value in writes:
        smmu.write(name, value)
    assert row in [re.search(r"\((S[\d.]+-\d+)\)$", each.text)[1] for each in smmu.warnings]


@pytest.mark.rule("S6.1-1")
def test_what_no_bus_can_do_is_an_error():
    smmu = device()
    for arguments, message in (
        ((0x20000,), "offset must be 0 to 0x1ffff, not 0x20000"),
        ((-4,), "offset must be 0 to 0x1ffff, not -4"),
        ((0, 3), "size must be 1, 2, 4 or 8 bytes, not 3"),
        (("CR9",), "offset: no register is called 'CR9'"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            smmu.read(*arguments)
    with pytest.raises(ValueError, match=r"^value must be 0 to 0xffffffff, not 0x100000000"):
        smmu.write(0x20, 1 << 32)
    with pytest.raises(ValueError, match=r"^value must be 0 to 0xffff, not 0x10000"):
        smmu.write(0x20, 1 << 16, 2)
    with pytest.raises(TypeError, match=r"^offset must be an integer, not float"):
        smmu.read(1.5)
    with pytest.raises(TypeError, match=r"^value must be an integer, not str"):
        smmu.write("CR0", "1")
    assert smmu.cr0 == 0


# --- which bits there are ---


@pytest.mark.rule("S3.18-6", "S6.3.1-18", "S6.3.9-1", "S6.3.12-1", "S6.3.16-2", "S6.3.25-2")
@pytest.mark.parametrize(
    ("missing", "register", "bits"),
    [
        ({"pri": 0}, "CR0", 1 << 1),
        ({"ats": 0}, "CR0", 1 << 4),
        ({"vmw": 0}, "CR0", 7 << 6),
        ({"hyp": 0}, "CR2", 1 << 0),
        ({"atsrecerr": 0}, "CR2", 1 << 3),
        ({"pri": 0}, "IRQ_CTRL", 1 << 1),
        ({"msi": 0}, "GERROR_IRQ_CFG0", (1 << 56) - 4),
        ({"msi": 0}, "EVENTQ_IRQ_CFG1", (1 << 32) - 1),
        ({"msi": 0}, "PRIQ_IRQ_CFG2", 1 << 31 | 0x3F),
        ({"pri": 0}, "PRIQ_IRQ_CFG2", 1 << 31 | 0x3F),
        ({"pri": 0}, "GERRORN", 0x48),
        ({"msi": 0}, "GERRORN", 0xF0),
        ({"pri": 0}, "PRIQ_BASE", 1 << 62 | (1 << 56) - 32 | 31),
        ({"st_level": 0, "sidsize": 6}, "STRTAB_BASE_CFG", 3 << 16 | 31 << 6),
    ],
)
def test_bits_of_absent_features_are_not_there(missing, register, bits):
    size = layout.REGISTERS[register].bytes
    ones = (1 << 8 * size) - 1
    found = []
    for features in (FULL, raw_of(FULL, **missing)):
        smmu = device(features)
        smmu.write(register, ones & ~1 if register == "CR0" else ones)
        found.append(smmu.read(register))
    assert found[0] & bits == bits
    assert found[1] & bits == 0
    assert found[0] & ~bits == found[1] & ~bits


@pytest.mark.rule("S3.5.1-4", "S6.3.27-2", "S8-5")
def test_bits_above_the_wrap_bit_are_not_there():
    smmu = device()
    for queue in ("CMDQ", "EVENTQ", "PRIQ"):
        for log2size in (0, 3, 19):
            smmu.write(f"{queue}_BASE", 0x9000_0000 | log2size)
            mask = (2 << log2size) - 1
            smmu.write(f"{queue}_PROD", 0xFFFF_FFFF)
            flag = 0 if queue == "CMDQ" else 1 << 31
            assert smmu.read(f"{queue}_PROD") == mask | flag
            smmu.write(f"{queue}_CONS", 0xFFFF_FFFF)
            assert smmu.read(f"{queue}_CONS") == mask | (flag or 0x7F << 24)
    smmu.write("EVENTQ_BASE", 0x9000_0000 | 2)
    assert smmu.read("EVENTQ_PROD") == 7 | 1 << 31


# --- updates ---


@pytest.mark.rule("S6.3.9-3", "S6.3.9-4", "S6.3.10-1", "S6.3.18-1")
def test_updates_are_acknowledged():
    smmu = device()
    smmu.write("CR0", 0x1F | 4 << 6)
    assert smmu.read("CR0") == smmu.read("CR0ACK") == 0x1F | 4 << 6
    smmu.write("CR0", 0)
    assert smmu.read("CR0ACK") == 0
    smmu.write("IRQ_CTRL", 7)
    assert smmu.read("IRQ_CTRL") == smmu.read("IRQ_CTRLACK") == 7


@pytest.mark.rule("S6.3.14.1-1", "S6.3.14.1-2")
def test_gbpa_is_written_with_update_only():
    smmu = device(gbpa=0x1000)
    assert smmu.read("GBPA") == 0x1000
    smmu.write("GBPA", 1 << 20)
    assert smmu.read("GBPA") == 0x1000 and "Update is 0" in smmu.warnings[-1].text
    assert smmu.translate(0, 0x1234).action == "disabled"
    smmu.write("GBPA", 1 << 31 | 1 << 20)
    assert smmu.read("GBPA") == 1 << 20
    assert smmu.translate(0, 0x1234).action == "abort"


GUARDED = [
    ("STRTAB_BASE", 0x8000_0040, "CR0", 1),
    ("STRTAB_BASE_CFG", 5, "CR0", 1),
    ("CR2", 2, "CR0", 1),
    ("EVENTQ_BASE", 0x9000_0005, "CR0", 4),
    ("EVENTQ_PROD", 1, "CR0", 4),
    ("CMDQ_BASE", 0x9000_0005, "CR0", 8),
    ("CMDQ_CONS", 1, "CR0", 8),
    ("PRIQ_BASE", 0x9000_0005, "CR0", 2),
    ("PRIQ_PROD", 1, "CR0", 2),
    ("GERROR_IRQ_CFG0", 0x1000, "IRQ_CTRL", 1),
    ("GERROR_IRQ_CFG1", 7, "IRQ_CTRL", 1),
    ("GERROR_IRQ_CFG2", 7, "IRQ_CTRL", 1),
    ("PRIQ_IRQ_CFG0", 0x1000, "IRQ_CTRL", 2),
    ("PRIQ_IRQ_CFG2", 7, "IRQ_CTRL", 2),
    ("EVENTQ_IRQ_CFG0", 0x1000, "IRQ_CTRL", 4),
    ("EVENTQ_IRQ_CFG1", 7, "IRQ_CTRL", 4),
]


@pytest.mark.rule("S6.2-11", "S6.3-1", "S6.3.12-2", "S6.3.16-3", "S6.3.95-3", "S6.3.97-2")
@pytest.mark.parametrize(("register", "value", "guard", "bit"), GUARDED)
def test_guarded_registers_keep_their_value_while_enabled(register, value, guard, bit):
    smmu = device()
    others = 0x1F & ~bit if guard == "CR0" else 7 & ~bit
    smmu.write("CMDQ_PROD", 1)
    smmu.write("CMDQ_CONS", 1)  # no command waits
    smmu.write(guard, others)  # the other enables do not guard it
    smmu.write(register, value)
    assert smmu.read(register) == value
    smmu.write(guard, bit)
    smmu.write(register, 0)
    assert smmu.read(register) == value
    (text,) = [w.text for w in smmu.warnings if w.register == register and "ignored" in w.text]
    assert f"{guard} is {bit:#x}" in text
    smmu.write(register, value)  # the same again is no mistake
    assert sum(w.register == register and "ignored" in w.text for w in smmu.warnings) == 1
    smmu.write(guard, 0)
    smmu.write(register, 0)
    assert smmu.read(register) == 0


@pytest.mark.rule("S6.3.11-1", "S6.3.11.1-1", "S6.3.11.2-1")
def test_the_parts_of_cr1_are_guarded_apart():
    smmu = device()
    smmu.write("CR1", 0xFFF)
    assert smmu.cr1 == 0xFFF
    smmu.write("CR0", 1)
    smmu.write("CR1", 0)
    assert smmu.cr1 == 0xFC0
    for enable in (2, 4, 8):
        smmu.write("CR0", enable)
        smmu.write("CR1", 0x03F)
        assert smmu.cr1 == 0
        smmu.write("CR0", 0)
        smmu.write("CR1", 0xFFF)
        smmu.write("CR0", enable)
        smmu.write("CR1", 0)
        assert smmu.cr1 == 0x03F
        smmu.write("CR0", 0)
        smmu.write("CR1", 0xFC0)
        smmu.write("CR1", 0)


@pytest.mark.rule("S3.16-1", "S6.3.2-5", "S6.3.24-5", "S6.3.26-6", "S6.3.29-2", "S6.3.33-2")
def test_preset_registers_are_read_only():
    features = FULL.replace(tables_preset=1, queues_preset=1)
    smmu = device(features, eventq_base=0x9000_0005, **small.registers())
    for name in ("STRTAB_BASE", "STRTAB_BASE_CFG", "CMDQ_BASE", "EVENTQ_BASE", "PRIQ_BASE"):
        before = smmu.read(name)
        smmu.write(name, 0)
        assert smmu.read(name) == before and "preset" in smmu.warnings[-1].text
    smmu.reset()
    assert smmu.strtab_base == small.BASE and smmu.eventq_base == 0x9000_0005
    smmu.write("CR0", 5)
    assert smmu.translate(small.STAGE1, small.UNMAPPED).event.name == "F_TRANSLATION"
    assert smmu.read("EVENTQ_PROD") == 1


# --- what registers do to translation ---


@pytest.mark.rule("S3.11-8", "S3.11-11", "S6.3.9.6-12", "S6.3.24-1", "S6.3.25-1")
def test_translation_follows_the_registers():
    smmu = device()
    request = small.Request(small.STAGE1, small.RW)
    assert smmu.translate(request.sid, request.iova).action == "disabled"
    for name, value in small.registers().items():
        smmu.write(name.upper(), value)
    smmu.write("CR0", 5)
    for _ in range(3):
        assert smmu.translate(request.sid, request.iova).pa == 0x4000_1000
    smmu.write("CR0", 0)
    # elsewhere there is another stream table: what was decoded before is not used
    smmu.memory.write(0x9010_0000 + 64 * small.STAGE1, (1 | 4 << 1).to_bytes(8, "little"))
    smmu.write("STRTAB_BASE", 0x9010_0000)
    smmu.write("CR0", 5)
    assert smmu.translate(request.sid, request.iova).action == "bypass"
    # two levels, of which the second is where the L1STD of 2^SPLIT streams says
    leaf, at = 0x9012_0000, {6: 3, 8: 2, 10: 5}
    for split, index in at.items():
        smmu.write("CR0", 0)
        smmu.memory.write(0x9010_0000, bytes(64))
        smmu.memory.write_u64(0x9010_0000 + 8 * index, leaf | split + 1)
        smmu.memory.write(leaf + 64 * small.STAGE1, (1 | 4 << 1).to_bytes(8, "little"))
        smmu.write("STRTAB_BASE_CFG", 1 << 16 | split << 6 | 13)
        smmu.write("CR0", 5)
        for other in range(8):
            found = smmu.translate(other << split | small.STAGE1, request.iova)
            assert (found.action == "bypass") == (other == index)
    smmu.write("CR0", 0)
    smmu.write("STRTAB_BASE_CFG", 0)
    smmu.write("CR2", 0)
    smmu.write("CR0", 5)
    found = smmu.translate(request.sid, request.iova)
    assert found.fault.name == "C_BAD_STREAMID" and found.event is None
    smmu.write("CR0", 4)
    smmu.write("CR2", 2)
    smmu.write("CR0", 5)
    assert smmu.translate(request.sid, request.iova).event.name == "C_BAD_STREAMID"
    smmu.write("CR0", 1)
    assert smmu.translate(request.sid, request.iova).event is None


def test_registers_of_the_constructor_are_registers():
    smmu = device(
        cr0=5, gbpa=1 << 31 | 1 << 20, eventq_base=0x9000_0005, cmdq_base=0x9001_0006,
        priq_base=0x9002_0007, **small.registers(),
    )  # fmt: skip
    expected = {
        "CR0": 5, "CR0ACK": 5, "CR2": 0, "GBPA": 1 << 20, "STRTAB_BASE": small.BASE,
        "STRTAB_BASE_CFG": 12, "EVENTQ_BASE": 0x9000_0005, "CMDQ_BASE": 0x9001_0006,
        "PRIQ_BASE": 0x9002_0007,
    }  # fmt: skip
    assert {name: smmu.read(name) for name in expected} == expected
    assert (smmu.cr0, smmu.cr1, smmu.cr2, smmu.gbpa) == (5, 0, 0, 1 << 20)
    assert (smmu.strtab_base, smmu.strtab_base_cfg) == (small.BASE, 12)
    assert (smmu.eventq_base, smmu.cmdq_base, smmu.priq_base) == (
        0x9000_0005, 0x9001_0006, 0x9002_0007,
    )  # fmt: skip
    assert (smmu.irq_ctrl, smmu.gerror, smmu.gerrorn) == (0, 0, 0)
    for name in ("eventq_base", "cmdq_base", "priq_base"):
        with pytest.raises(ValueError, match=rf"^{name} must be 0 to 0x\w+, not -1"):
            device(**{name: -1})
        with pytest.raises(TypeError, match=f"^{name} must be an integer, not str"):
            device(**{name: "1"})
    with pytest.raises(TypeError, match=r"^on_interrupt must be a callable or None, not int"):
        device(on_interrupt=5)


@pytest.mark.rule("S3.11-1", "S3.11-2", "S3.11-101")
def test_a_reset_device_is_as_a_new_one():
    smmu = device(cr0=0xF, gbpa=0, eventq_base=0x9000_0001, **small.registers())
    fresh = Smmu(smmu.memory, FULL, cr0=0, cr2=0)
    smmu.write("IRQ_CTRL", 7)
    for _ in range(3):
        smmu.translate(small.STAGE1, small.UNMAPPED)
    assert smmu.read("EVENTQ_PROD") >> 31
    smmu.memory.remove(0x9000_0000)
    smmu.write("EVENTQ_CONS", 2)
    smmu.translate(small.STAGE1, small.UNMAPPED)
    assert smmu.gerror
    smmu.reset()
    for name in layout.REGISTERS:
        assert smmu.read(name) == fresh.read(name), name
    assert smmu.translate(0, 0).action == "disabled"
    smmu.write("CR2", 2)
    smmu.write("CR0", 5)  # no event queue is placed any more
    assert smmu.translate(1, 0).event.name == "C_BAD_STREAMID"
    assert smmu.gerror == 0


# --- warnings ---


@pytest.mark.parametrize(
    ("registers", "features", "register", "text"),
    [
        ({"strtab_base": 0x8000_0040, "strtab_base_cfg": 4}, {}, "STRTAB_BASE",
         "ADDR is 0x80000040, not a multiple of the table's size: 0x80000000 is used"),
        ({"strtab_base": 0x8000_0040, "strtab_base_cfg": 1 << 16 | 6 << 6 | 12}, {},
         "STRTAB_BASE", "0x80000000 is used"),
        ({"strtab_base": 1 << 46}, {"oas": 4}, "STRTAB_BASE", "beyond .* 44 bits"),
        ({"strtab_base_cfg": 33}, {}, "STRTAB_BASE_CFG", "LOG2SIZE is 33: IDR1.SIDSIZE, 32"),
        ({"strtab_base_cfg": 9}, {"sidsize": 8}, "STRTAB_BASE_CFG", "LOG2SIZE is 9: .* 8, is used"),
        ({"strtab_base_cfg": 2 << 16}, {}, "STRTAB_BASE_CFG", "FMT is 2, a reserved code"),
        ({"strtab_base_cfg": 1 << 16 | 7 << 6}, {}, "STRTAB_BASE_CFG", "SPLIT is 7, .* 6 is used"),
        ({"cr0": 1 << 9 | 1}, {}, "CR0", "bits 0x200 are ignored"),
        ({"cmdq_base": 0x9000_0000 | 20, "cr0": 9}, {}, "CMDQ_BASE", "LOG2SIZE is 20: .* 19"),
        ({"priq_base": 0x9000_0100 | 5, "cr0": 3}, {}, "PRIQ_BASE", "0x90000000 is used"),
        ({"eventq_base": 1 << 46, "cr0": 5}, {"oas": 4}, "EVENTQ_BASE", "beyond .* 44 bits"),
    ],
)  # fmt: skip
def test_what_is_probably_a_mistake_is_told(registers, features, register, text):
    features = FULL.replace(**features)
    given = {"cr0": 1} | registers
    smmu = device(features, **given)
    found = [w for w in smmu.warnings if re.search(text, w.text)]
    assert [w.register for w in found] == [register]
    # and as much when software programs it, once it enables what uses it
    smmu = device(features)
    for name, value in given.items():
        if name != "cr0":
            smmu.write(name, value)
    assert not any(re.search(text, w.text) for w in smmu.warnings)
    smmu.write("CR0", given["cr0"])
    found = [w for w in smmu.warnings if re.search(text, w.text)]
    assert [w.register for w in found] == [register]


@pytest.mark.rule("S6.3.24-2")
def test_nothing_is_told_of_a_device_that_is_programmed_well():
    smmu = device()
    for name, value in {
        "CR1": 0xD75, "CR2": 2, "STRTAB_BASE": 1 << 62 | small.BASE, "STRTAB_BASE_CFG": 12,
        "CMDQ_BASE": 1 << 62 | 0x9001_0008, "EVENTQ_BASE": 1 << 62 | 0x9002_0007,
        "PRIQ_BASE": 1 << 62 | 0x9003_0009, "CR0": 0xF, "IRQ_CTRL": 7,
    }.items():  # fmt: skip
        smmu.write(name, value)
    assert list(smmu.warnings) == []


def test_warnings_do_not_grow_without_end():
    smmu = device()
    for i in range(1500):
        smmu.write(0x1000, i)
    assert len(smmu.warnings) == 1000


# --- anything at all ---


@pytest.mark.parametrize("seed", range(30))
def test_any_writes_leave_a_device_that_works(seed):
    rng = random.Random(seed)
    features = FULL if rng.random() < 0.5 else Features.qemu()
    smmu = device(features)
    names = [name for name in layout.REGISTERS if name not in ("CMDQ_PROD",)]
    for _ in range(400):
        if rng.random() < 0.7:
            record = layout.REGISTERS[rng.choice(names)]
            value = rng.choice((0, 1, 5, 0x9000_0000 | rng.randrange(8), rng.getrandbits(64)))
            smmu.write(record.name, value & (1 << 8 * record.bytes) - 1)
        else:
            size = rng.choice((1, 2, 4, 4, 8))
            offset = rng.choice((rng.randrange(0x200), rng.randrange(0x20000)))
            if offset & ~3 != 0x98:
                smmu.write(offset, rng.getrandbits(8 * size), size)
        for name in ("CR0", "IRQ_CTRL"):
            assert smmu.read(name) == smmu.read(name + "ACK")
        for name in layout.REGISTERS:
            assert 0 <= smmu.read(name) < 1 << 8 * layout.REGISTERS[name].bytes
        smmu.translate(rng.getrandbits(4), rng.getrandbits(40))
        smmu.page_request(rng.getrandbits(4), 0x1000, read=True)
    smmu.reset()
    for name, value in small.registers().items():
        smmu.write(name, value)
    smmu.write("CR0", 5)
    assert smmu.translate(small.STAGE1, small.RW).pa == 0x4000_1000
