"""Rules of the registers that no other test states alone (IHI 0070 6.2, 6.3)."""

import pytest
import small
from bench import SID, cached, nested_system

from smmufast import Caches, Features, layout

QUEUE = small.QUEUES
PAGES = 0x9100_0000
COMMANDS = 0x9200_0000
MSI = 0x9300_0000
FULL = Features.full()
SYNC = layout.pack("SYNC").to_bytes(16, "little")


def system(features=FULL, cr0=0, **more):
    """(Smmu, names of wired interrupts): the small system and memory for queues; CR0 is 0."""
    return small.device(features=features, irqs=0, **{"cr0": cr0, "cr2": 0} | more)


def cr0(*names):
    return sum(layout.REGISTERS["CR0"].field(name).mask for name in names)


# --- CR0 and IRQ_CTRL ---


@pytest.mark.rule("S6.3.10-2", "S6.3.18-2")
def test_fields_that_are_not_there_are_not_acknowledged():
    smmu, _ = system()
    smmu.write("CR0", 0xFFFF_FFFF & ~cr0("CMDQEN"))
    assert smmu.read("CR0") == smmu.read("CR0ACK") == 0x1D7
    smmu.write("IRQ_CTRL", 0xFFFF_FFFF)
    assert smmu.read("IRQ_CTRL") == smmu.read("IRQ_CTRLACK") == 7
    smmu, _ = system(FULL.replace(pri=0))
    smmu.write("IRQ_CTRL", 7)
    assert smmu.read("IRQ_CTRL") == smmu.read("IRQ_CTRLACK") == 5


@pytest.mark.rule("S6.3.9.5-2", "S6.3.9.5-3")
def test_priqen_is_acknowledged_as_written_and_counts_with_smmuen():
    smmu, _ = system(priq_base=PAGES | 2)
    smmu.write("CR0", cr0("PRIQEN"))
    assert smmu.read("CR0ACK") == cr0("PRIQEN")
    assert smmu.page_request(1, 0x1000, read=True).action == "failure"
    smmu.write("PRIQ_BASE", PAGES + 0x1000 | 3)  # guarded by the field itself
    assert smmu.read("PRIQ_BASE") == PAGES | 2
    smmu.write("CR0", cr0("PRIQEN", "SMMUEN"))
    assert smmu.page_request(1, 0x1000, read=True).action == "queued"


@pytest.mark.rule("S6.3.16-4")
def test_enabling_an_interrupt_tells_nothing_of_before():
    smmu, wires = system(eventq_base=0xA000_0000, priq_base=PAGES | 2, cr0=cr0("EVENTQEN") | 3)
    smmu.translate(small.INVALID, 0)  # its record has no memory
    smmu.page_request(1, 0x1000, read=True)
    assert smmu.gerror == 4 and smmu.read("PRIQ_PROD") == 1
    smmu.write("IRQ_CTRL", 7)
    assert wires == []
    smmu.write("GERRORN", 4)
    smmu.translate(small.INVALID, 0)
    assert wires == ["gerror"]


@pytest.mark.rule("S6.3.9-6", "S6.3.9.1-1")
def test_the_vmid_wildcard_is_for_invalidation_alone():
    bench, iova, _ = nested_system()
    bench.features.vmw = 1
    bench.regs.cr0 |= 4 << 6
    bench.map(iova, 0x5000)
    bench.write_ste(config=5, s2vmid=4)
    bench.write_ste(SID + 1, s2vmid=5)
    smmu = cached(bench)
    assert smmu.translate(SID, iova).pa == 0x5000
    bench.tables.write_descriptor(bench.tables.slot(iova, 3), 0)
    assert smmu.translate(SID + 1, iova).fault.name == "F_TRANSLATION"
    smmu.command("TLBI_NH_ALL", VMID=15)
    assert smmu.translate(SID, iova).fault.name == "F_TRANSLATION"


@pytest.mark.rule("S6.3.9.2-1")
@pytest.mark.parametrize("with_caches", [False, True])
def test_atschk_counts_for_the_next_transaction(with_caches):
    smmu, _ = system(cr0=1, caches=Caches.small() if with_caches else None)
    for atschk in (0, 1, 0, 1):
        smmu.write("CR0", 1 | atschk * cr0("ATSCHK"))
        result = smmu.ats_translated(small.STAGE1, 0x5000_0000)  # EATS is 0b00
        assert result.action == ("abort" if atschk else "bypass")


# --- what is there ---


@pytest.mark.rule("S6.3.1-11")
def test_registers_of_page_requests_are_not_there_without_pri():
    smmu, _ = system(FULL.replace(pri=0))
    for name, record in layout.REGISTERS.items():
        if name.startswith("PRIQ"):
            smmu.write(name, (1 << 8 * record.bytes) - 1)
            assert smmu.read(name) == 0, name
    for offset in (0xC8, 0xCC, 0x100C8, 0x100CC):
        smmu.write(offset, 0xFFFF_FFFF)
        assert smmu.read(offset) == 0
    assert smmu.page_request(1, 0x1000, read=True).action == "failure"


@pytest.mark.rule("S6.3.13-1")
def test_the_dormant_hint_is_never_given():
    smmu, _ = system(FULL.replace(dormhint=1), caches=Caches.small())
    assert smmu.read("STATUSR") == 0
    smmu.write("CR0", 1)
    assert smmu.translate(small.STAGE1, small.RW)
    assert smmu.read("STATUSR") == 0


@pytest.mark.rule("S6.2-12")
def test_a_guard_holds_for_each_half_of_a_register():
    smmu, _ = system()
    smmu.write("STRTAB_BASE", 0x4000_0012_8000_0000)
    smmu.write("CR0", 1)
    smmu.write(0x84, 0)
    smmu.write(0x80, 0x9000_0000)
    smmu.write(0x80, 0, 8)
    assert smmu.read(0x80, 8) == 0x4000_0012_8000_0000


@pytest.mark.rule("S6.3.11.1-2")
def test_attributes_of_preset_tables_and_queues_are_kept():
    features = FULL.replace(tables_preset=1, queues_preset=1)
    smmu, _ = system(features, eventq_base=QUEUE | 2)
    smmu.write("CR1", 0xFFF)
    assert smmu.read("CR1") == 0xFFF
    smmu.write("CR0", 5)
    assert smmu.translate(small.INVALID, 0).event.name == "C_BAD_STE"


@pytest.mark.rule("S6.3.2-8")
@pytest.mark.parametrize("types", [0, 1])
def test_gbpa_overrides_what_the_implementation_lets_it(types):
    smmu, _ = system(FULL.replace(attr_types_ovr=types))
    value = 0b11 << 12 | 1 << 4 | 0b0001  # ISH, Device-nGnRE
    smmu.write("GBPA", 1 << 31 | value)
    assert smmu.read("GBPA") == value
    result = smmu.translate(1, 0x1000, ssid=3)
    assert (result.action, result.attr) == ("disabled", 0x04 if types else 0xFF)


# --- sizes and places of tables and queues ---


@pytest.mark.rule("S6.3.25-8", "S6.3.26-5", "S6.3.33-1")
def test_sizes_beyond_the_limit_are_read_as_written():
    smmu, _ = system(FULL.replace(sidsize=8, cmdqs=3, eventqs=2, priqs=1))
    smmu.write("STRTAB_BASE_CFG", 40)
    assert smmu.read("STRTAB_BASE_CFG") == 40
    for queue, log2size in (("CMDQ", 3), ("EVENTQ", 2), ("PRIQ", 1)):
        smmu.write(f"{queue}_BASE", QUEUE | 25)
        assert smmu.read(f"{queue}_BASE") == QUEUE | 25
        smmu.write(f"{queue}_PROD", 0xF_FFFF)
        assert smmu.read(f"{queue}_PROD") == (2 << log2size) - 1


@pytest.mark.rule("S6.3.27-3")
def test_a_smaller_queue_truncates_its_positions_and_a_larger_one_keeps_them():
    for queue in ("CMDQ", "EVENTQ", "PRIQ"):
        smmu, _ = system()
        smmu.write(f"{queue}_BASE", QUEUE | 8)
        smmu.write(f"{queue}_PROD", 0x1A6)
        smmu.write(f"{queue}_CONS", 0x0B5)
        smmu.write(f"{queue}_BASE", QUEUE | 3)
        assert (smmu.read(f"{queue}_PROD"), smmu.read(f"{queue}_CONS")) == (0x6, 0x5)
        smmu.write(f"{queue}_BASE", QUEUE | 9)
        assert (smmu.read(f"{queue}_PROD"), smmu.read(f"{queue}_CONS")) == (0x6, 0x5)


@pytest.mark.rule("S6.3.26-4")
def test_a_queue_of_one_entry_lies_at_any_multiple_of_32():
    smmu, _ = system(cmdq_base=COMMANDS + 0x60, priq_base=PAGES + 0x60, cr0=0xF)
    smmu.page_request(7, 0x1000, read=True)
    assert smmu.memory.read(PAGES + 0x60, 4) == (7).to_bytes(4, "little")
    smmu.memory.write(COMMANDS + 0x60, SYNC)
    for position in (1, 0, 1):  # the position is the wrap bit alone
        smmu.write("CMDQ_PROD", position)
        assert smmu.read("CMDQ_CONS") == position and smmu.gerror == 0
    assert not [w for w in smmu.warnings if "multiple" in w.text]


@pytest.mark.rule("S6.3.25-6")
@pytest.mark.parametrize(("code", "split"), [(8, 8), (10, 10)])
def test_a_table_smaller_than_a_leaf_has_one_level_1_descriptor(code, split):
    smmu, _ = system(strtab_base=QUEUE + 0x40, strtab_base_cfg=1 << 16 | code << 6 | 4)
    leaf = QUEUE + 0x10_0000
    span = split + 1
    smmu.memory.write(
        QUEUE + 0x40, layout.pack("L1STD", Span=span, L2Ptr=leaf).to_bytes(8, "little")
    )
    ste = layout.pack("STE", V=1, Config=0b100).to_bytes(64, "little")
    for sid in (0, 15, 16):
        smmu.memory.write(leaf + 64 * sid, ste)
    smmu.write("CR0", 1)
    assert [smmu.translate(sid, 0x123).action for sid in (0, 15)] == ["bypass"] * 2
    assert smmu.translate(16, 0x123).fault.name == "C_BAD_STREAMID"


@pytest.mark.rule("S6.3.25-3")
@pytest.mark.parametrize("fmt", [0, 2, 3])
def test_a_format_that_is_reserved_is_linear(fmt):
    smmu, _ = system(strtab_base_cfg=fmt << 16 | 6 << 6 | 12)
    smmu.write("CR0", 1)
    assert smmu.translate(small.STAGE1, small.RW).pa == 0x4000_1000


# --- the command queue ---


@pytest.mark.rule("S6.3.9.3-3", "S6.3.28-4")
def test_an_enable_neither_ends_nor_hides_an_error_of_the_command_queue():
    smmu, _ = system(cmdq_base=COMMANDS | 3, cr0=cr0("CMDQEN"))
    smmu.memory.write(COMMANDS, bytes([0xFF]) + bytes(15) + SYNC * 7)
    smmu.write("CMDQ_PROD", 2)
    assert smmu.read("CMDQ_CONS") == 1 << 24 and smmu.gerror == 1
    for value in (0, cr0("CMDQEN")):
        smmu.write("CR0", value)
        assert smmu.read("CMDQ_CONS") == 1 << 24
        assert (smmu.gerror, smmu.gerrorn) == (1, 0)
    smmu.memory.write(COMMANDS, SYNC)
    smmu.write("CR0", 0)
    smmu.write("GERRORN", 1)
    assert smmu.read("CMDQ_CONS") & 0xFFFFF == 0  # acknowledged, but disabled
    smmu.write("CR0", cr0("CMDQEN"))
    assert smmu.read("CMDQ_CONS") & 0xFFFFF == 2


@pytest.mark.rule("S7.1-3")
def test_the_code_of_a_command_error_is_there_before_the_error_is_told():
    smmu, _ = system(cmdq_base=COMMANDS | 3, cr0=cr0("CMDQEN"))
    smmu.memory.write(COMMANDS, SYNC + bytes([0xFF]))
    smmu.write("IRQ_CTRL", 1)
    seen = []

    def interrupt(name):
        seen.append((name, smmu.read("CMDQ_CONS"), smmu.gerror))

    smmu.on_interrupt = interrupt
    smmu.write("CMDQ_PROD", 2)
    assert seen == [("gerror", 1 << 24 | 1, 1)]


# --- messages ---


@pytest.mark.rule("S6.3.19-4")
def test_messages_go_on_while_the_error_of_one_is_active():
    smmu, _ = system(eventq_base=QUEUE | 3, cr0=5)
    smmu.write("EVENTQ_IRQ_CFG0", 0xA000_0000)
    smmu.write("EVENTQ_IRQ_CFG1", 0x1234)
    smmu.write("IRQ_CTRL", 4)
    smmu.translate(small.INVALID, 0)
    assert smmu.gerror == 1 << 5
    smmu.memory.add_private(0xA000_0000, 0x1000)
    smmu.write("EVENTQ_CONS", 1)
    smmu.translate(small.INVALID, 0)
    assert smmu.memory.read_u64(0xA000_0000) == 0x1234
    assert (smmu.gerror, smmu.gerrorn) == (1 << 5, 0)


@pytest.mark.rule("S6.3.21-3")
@pytest.mark.parametrize("low", [0, 1, 2, 3])
def test_a_message_is_written_to_a_whole_word(low):
    smmu, _ = system(eventq_base=QUEUE | 3, cr0=5)
    smmu.write("EVENTQ_IRQ_CFG0", MSI + low)
    assert smmu.read("EVENTQ_IRQ_CFG0") == MSI
    smmu.write("EVENTQ_IRQ_CFG1", 0xCAFE)
    smmu.write("IRQ_CTRL", 4)
    smmu.translate(small.INVALID, 0)
    assert smmu.memory.read(MSI - 4, 12) == bytes(4) + (0xCAFE).to_bytes(8, "little")


@pytest.mark.rule("S6.3.36-5")
def test_last_only_counts_for_messages_too():
    smmu, _ = system(priq_base=PAGES | 4, cr0=cr0("SMMUEN", "PRIQEN"))
    smmu.write("PRIQ_IRQ_CFG0", MSI)
    smmu.write("PRIQ_IRQ_CFG2", 1 << 31)
    told = []
    for count, last in enumerate((False, True, False, True), 1):
        smmu.write("IRQ_CTRL", 0)
        smmu.write("PRIQ_IRQ_CFG1", count)
        smmu.write("IRQ_CTRL", 2)
        smmu.page_request(1, 0x1000, read=True, last=last)
        told.append(smmu.memory.read_u64(MSI))
    assert told == [0, 2, 2, 4]


# --- SMMUEN=0 ---


@pytest.mark.rule("S7.2.1-7", "S7.3.2-2", "S7.4-4")
def test_events_of_the_host_are_recorded_while_translation_is_off():
    smmu, _ = system(eventq_base=QUEUE | 0)
    assert not smmu.record("F_UUT", StreamID=1)
    smmu.write("CR0", cr0("EVENTQEN"))
    assert smmu.record("F_UUT", StreamID=2)
    assert smmu.read("EVENTQ_PROD") == 1
    smmu.write("CR0", 0)
    assert not smmu.record("F_UUT", StreamID=3)
    assert smmu.read("EVENTQ_PROD") == 1  # lost without an overflow: the queue is disabled


@pytest.mark.rule("S8.2-4")
def test_page_requests_ask_neither_eats_nor_atschk():
    smmu, _ = system(priq_base=PAGES | 4, cr0=cr0("SMMUEN", "PRIQEN", "ATSCHK"))
    for sid in (small.STAGE1, small.ABORTED, small.INVALID, small.BEYOND_TABLE):
        assert smmu.page_request(sid, 0x1000, read=True).action == "queued"


def test_page_requests_fail_before_their_queue_is_placed():
    smmu, _ = system(cr0=cr0("SMMUEN", "PRIQEN"))
    assert smmu.page_request(1, 0x1000, read=True).action == "failure"
    assert smmu.page_request(1, 0, ssid=3).action == "dropped"
    assert smmu.read("PRIQ_PROD") == 0 and smmu.gerror == 0


def test_a_stop_marker_is_the_last_of_its_group_for_interrupts():
    smmu, wires = system(priq_base=PAGES | 4, cr0=cr0("SMMUEN", "PRIQEN"))
    smmu.write("PRIQ_IRQ_CFG2", 1 << 31)
    smmu.write("IRQ_CTRL", 2)
    smmu.page_request(1, 0x1000, ssid=3, read=True, last=False)
    assert wires == []
    assert smmu.page_request(1, 0, ssid=3).action == "queued"
    assert wires == ["priq"]
