"""The command queue as hardware consumes it: order, errors, completion, hostile positions."""

import itertools
import random

import pytest
import small

from smmufast import ExternalAbort, Features, Memory, Smmu, layout

QUEUE = small.QUEUES
MSI = 0x9100_0000
ILL, ABT, ATC_INV_SYNC = 1, 2, 3
CFGI_ALL = layout.pack("CFGI_ALL")
SYNC = layout.pack("SYNC")
BAD = 0xFF  # no command has this opcode
ENABLED = 0xD  # CR0: SMMUEN, EVENTQEN, CMDQEN


class Device:
    """What the commands told it; what it answers."""

    def __init__(self):
        self.told = []
        self.answer = None

    def atc_invalidate(self, ssid, address, size, global_):
        self.told.append(("atc", ssid, address, size, global_))
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def pri_response(self, ssid, prg_index, code):
        self.told.append(("pri", ssid, prg_index, code))


def system(log2size=3, features=None, base=QUEUE, **registers):
    """(Smmu, interrupts) with a command queue."""
    registers = {"cr0": ENABLED, "cmdq_base": base | log2size} | registers
    return small.device(features=features or Features.full(), **registers)


def put(smmu, position, word, log2size=3):
    index = position % (1 << log2size)
    smmu.memory.write(QUEUE + 16 * index, word.to_bytes(16, "little"))


def state(smmu):
    """(CONS, its ERR, whether CMDQ_ERR is active)."""
    cons = smmu.read("CMDQ_CONS")
    return cons & 0xFFFFF, cons >> 24, (smmu.gerror ^ smmu.gerrorn) & 1


# --- order and errors ---


@pytest.mark.rule("S3.5.1-9", "S4.1.1-1", "S4.1.2-1", "S4.1.2-3", "S4.7.3-1", "S6.3.27-1")
def test_commands_are_consumed_in_order_when_prod_moves():
    smmu, _ = system()
    device = smmu.devices[5] = Device()
    for i in range(6):
        put(smmu, i, layout.pack("PRI_RESP", StreamID=5, PRGIndex=i))
    smmu.write("CMDQ_PROD", 2)
    assert [group for _, _, group, _ in device.told] == [0, 1]
    smmu.write("CMDQ_PROD", 6)
    assert [group for _, _, group, _ in device.told] == list(range(6))
    assert state(smmu) == (6, 0, 0)


@pytest.mark.rule("S3.5.1-2", "S3.5.1-5", "S4.1.4-1", "S6.3.28-2")
def test_a_full_queue_is_consumed_in_one_go_and_wraps():
    smmu, _ = system()
    device = smmu.devices[5] = Device()
    for i in range(8):
        put(smmu, i, layout.pack("PRI_RESP", StreamID=5, PRGIndex=i))
    for turn in range(5):
        smmu.write("CMDQ_PROD", (8 * turn + 8) % 16)
        assert state(smmu) == ((8 * turn + 8) % 16, 0, 0)
        assert len(device.told) == 8 * turn + 8


@pytest.mark.rule(
    "S4.1.3-5", "S6.3.19-5", "S6.3.27-4", "S6.3.28-1", "S7.1-1", "S7.1-4", "S7.1-5", "S7.1-91",
)
def test_an_illegal_command_stops_the_queue_until_it_is_acknowledged():
    smmu, wires = system()
    device = smmu.devices[5] = Device()
    put(smmu, 0, CFGI_ALL)
    put(smmu, 1, BAD)
    put(smmu, 2, layout.pack("PRI_RESP", StreamID=5))
    smmu.write("CMDQ_PROD", 3)
    assert state(smmu) == (1, ILL, 1)
    assert wires == ["gerror"] and device.told == []
    smmu.write("CMDQ_PROD", 3)
    assert state(smmu) == (1, ILL, 1) and wires == ["gerror"]
    smmu.write("GERRORN", 1)  # and nothing was repaired
    assert state(smmu) == (1, ILL, 1)
    assert (smmu.gerror, smmu.gerrorn) == (0, 1) and wires == ["gerror"] * 2
    put(smmu, 1, SYNC)
    smmu.write("GERRORN", 0)
    assert state(smmu) == (3, ILL, 0) and len(device.told) == 1


@pytest.mark.rule("S7.1-6", "S7.1-92")
def test_prod_may_go_back_to_cons_during_an_error():
    smmu, _ = system()
    put(smmu, 0, BAD)
    smmu.write("CMDQ_PROD", 4)
    smmu.write("CMDQ_PROD", 0)
    smmu.write("GERRORN", 1)
    assert state(smmu) == (0, ILL, 0)


@pytest.mark.rule("S4.1.3-4", "S7.1-2", "S7.1-8", "S16.7.4-4")
def test_a_fetch_that_aborts_stops_the_queue():
    smmu, wires = system(base=0xA000_0000)
    smmu.write("CMDQ_PROD", 1)
    assert state(smmu) == (0, ABT, 1) and wires == ["gerror"]
    smmu.memory.add(bytearray(SYNC.to_bytes(16, "little") * 8), 0xA000_0000)
    smmu.write("CMDQ_PROD", 1)
    assert state(smmu) == (0, ABT, 1)  # repaired, but not acknowledged
    smmu.write("GERRORN", 1)
    assert state(smmu) == (1, ABT, 0)


@pytest.mark.rule("S4.1.2-2", "S6.3.9.3-1", "S6.3.28-3")
def test_a_disabled_queue_waits():
    smmu, _ = system(cr0=5)
    put(smmu, 0, CFGI_ALL)
    smmu.write("CMDQ_PROD", 1)
    assert state(smmu) == (0, 0, 0)
    smmu.write("CR0", ENABLED)
    assert state(smmu) == (1, 0, 0)
    smmu.write("CR0", 5)
    smmu.write("CMDQ_CONS", 0x7F00_0000)
    assert state(smmu) == (0, 0x7F, 0)


@pytest.mark.rule("S3.11-9", "S4.5.1-8", "S4.5.2-5", "S6.3.9.6-4", "S6.3.9.6-11")
def test_commands_run_while_translation_is_disabled():
    smmu, wires = system(cr0=8)
    device = smmu.devices[5] = Device()
    for i, word in enumerate((
        CFGI_ALL, layout.pack("TLBI_NSNH_ALL"), layout.pack("ATC_INV", StreamID=5, Size=52),
        layout.pack("PRI_RESP", StreamID=5), layout.pack("SYNC", CS=1),
    )):  # fmt: skip
        put(smmu, i, word)
    smmu.write("CMDQ_PROD", 5)
    assert state(smmu) == (5, 0, 0)
    assert device.told == [] and wires == ["cmdq_sync"]


@pytest.mark.rule("S3.21.2-4")
@pytest.mark.parametrize("seed", range(20))
def test_any_positions_and_any_bytes_end(seed):
    rng = random.Random(seed)
    log2size = rng.choice((0, 1, 3, 8))
    smmu, wires = system(log2size)
    opcodes = [record.fixed["Opcode"] for record in layout.COMMANDS.values()]
    for _ in range(60):
        for i in range(1 << log2size):
            word = rng.getrandbits(128)
            if rng.random() < 0.9:
                word = word & ~0xFF | rng.choice(opcodes)
            put(smmu, i, word, log2size)
        smmu.write("CMDQ_PROD", rng.getrandbits(32))
        cons, error, _ = state(smmu)
        assert cons < 2 << log2size and error in (0, ILL, ATC_INV_SYNC)
        if rng.random() < 0.8:
            smmu.write("GERRORN", smmu.gerror)
    assert set(wires) <= {"gerror", "cmdq_sync", "sev"}
    assert smmu.translate(small.STAGE1, small.RW).pa == 0x4000_1000


@pytest.mark.rule("S3.5.1-7")
def test_a_position_that_makes_no_sense_consumes_no_more_than_the_queue_holds():
    smmu, _ = system(cr0=5)
    for i in range(8):
        put(smmu, i, layout.pack("PRI_RESP", StreamID=5, PRGIndex=i))
    device = smmu.devices[5] = Device()
    smmu.write("CMDQ_CONS", 3)
    smmu.write("CMDQ_PROD", 2)  # 15 commands, as it seems
    smmu.write("CR0", ENABLED)
    assert len(device.told) == 8
    assert state(smmu) == (11, 0, 0)


# --- completion ---


@pytest.mark.rule("S3.18.1-2", "S3.18.2-3", "S4.7.3-3", "S4.7.3-4")
def test_sync_signals_as_it_is_asked_to():
    smmu, wires = system()
    for cs, address, expected in (
        (0, 0, []), (1, 0, ["cmdq_sync"]), (2, 0, ["sev"]), (1, MSI, ["cmdq_sync"]),
    ):  # fmt: skip
        smmu.command("SYNC", CS=cs, MSIAddress=address, MSIData=0xCAFE_F00D)
        assert wires == expected
        wires.clear()
    assert smmu.memory.read(MSI - 4, 12) == bytes(4) + bytes.fromhex("0df0feca") + bytes(4)


@pytest.mark.rule("S4.7.3-2")
def test_sync_is_consumed_before_it_signals():
    smmu, _ = system()
    seen = []
    smmu.on_interrupt = lambda name: seen.append((name, *state(smmu)))
    smmu.command("SYNC", CS=1)
    assert seen == [("cmdq_sync", 1, 0, 0)]


@pytest.mark.rule("S4.7.3-11")
def test_a_message_of_sync_that_aborts_is_an_error_but_sync_completes():
    smmu, wires = system()
    smmu.command("SYNC", CS=1, MSIAddress=0xA000_0000)
    assert state(smmu) == (1, 0, 0)
    assert smmu.gerror == 1 << 4 and wires == ["gerror", "cmdq_sync"]


@pytest.mark.rule("S4.1.2-4")
@pytest.mark.parametrize("sev", [0, 1])
def test_a_full_queue_that_gets_room_is_an_event(sev):
    smmu, wires = system(2, features=Features.full().replace(sev=sev), cr0=5)
    device = smmu.devices[5] = Device()
    sizes = []
    device.pri_response = lambda *_: sizes.append((smmu.read("CMDQ_CONS"), list(wires)))
    for i in range(4):
        put(smmu, i, layout.pack("PRI_RESP", StreamID=5), 2)
    smmu.write("CMDQ_PROD", 3)
    smmu.write("CR0", ENABLED)
    assert state(smmu) == (3, 0, 0) and wires == []  # it never was full
    smmu.write("CR0", 5)
    sizes.clear()
    put(smmu, 3, CFGI_ALL, 2)
    smmu.write("CMDQ_PROD", 7)
    assert wires == []
    smmu.write("CR0", ENABLED)
    event = ["sev"] if sev else []
    assert sizes == [(4, event), (5, event), (6, event)]  # with the first command consumed
    assert state(smmu) == (7, 0, 0) and wires == event


def test_the_event_of_room_is_one_with_that_of_sync_and_behind_what_sync_signals():
    smmu, wires = system(0, cr0=5)
    for cs, expected in ((0, ["sev"]), (1, ["cmdq_sync", "sev"]), (2, ["sev"])):
        smmu.command("SYNC", CS=cs, MSIAddress=MSI, MSIData=cs)
        assert wires == []
        smmu.write("CR0", ENABLED)
        assert wires == expected
        wires.clear()
        smmu.write("CR0", 5)
    assert smmu.memory.read(MSI, 4) == b"\1\0\0\0"


def test_a_queue_that_an_error_kept_full_wakes_once_it_goes_on():
    smmu, wires = system(1)
    put(smmu, 0, BAD, 1)
    put(smmu, 1, CFGI_ALL, 1)
    smmu.write("CMDQ_PROD", 2)
    assert wires == ["gerror"] and state(smmu) == (0, ILL, 1)
    put(smmu, 0, CFGI_ALL, 1)
    smmu.write("GERRORN", 1)
    assert wires == ["gerror", "sev"] and state(smmu) == (2, ILL, 0)
    smmu.command("SYNC")
    assert wires == ["gerror", "sev"]


def test_an_exception_at_the_event_of_room_leaves_the_rest_for_later():
    smmu, _ = system(1, cr0=5)
    put(smmu, 0, layout.pack("SYNC", CS=1, MSIAddress=MSI, MSIData=9), 1)
    put(smmu, 1, SYNC, 1)
    smmu.write("CMDQ_PROD", 2)

    def wakes(name):
        if name == "sev":
            raise KeyError(name)

    smmu.on_interrupt = wakes
    with pytest.raises(KeyError, match="sev"):
        smmu.write("CR0", ENABLED)
    assert state(smmu) == (1, 0, 0) and smmu.memory.read(MSI, 1) == b"\x09"
    smmu.write("CMDQ_PROD", 2)
    assert state(smmu) == (2, 0, 0)


@pytest.mark.rule("S4.7.3-6", "S4.7.3-7", "S6.3.1-19")
def test_sync_without_msi_or_sev_support():
    smmu, wires = system(features=Features.full().replace(msi=0, sev=0))
    smmu.command("SYNC", CS=1, MSIAddress=MSI)
    smmu.command("SYNC", CS=2)
    assert wires == ["cmdq_sync"]
    assert smmu.memory.read(MSI, 4) == bytes(4)


@pytest.mark.rule("S4.5.1-1", "S4.7.3-18", "S4.7.3-19", "S7.1-9")
@pytest.mark.parametrize("answer", [False, TimeoutError("no answer")])
def test_sync_after_an_invalidation_that_failed(answer):
    smmu, _ = system()
    device = smmu.devices[5] = Device()
    device.answer = answer
    smmu.command("ATC_INV", StreamID=5, Address=0x7000, Size=1)
    assert device.told == [("atc", None, 0x6000, 0x2000, False)]
    assert state(smmu) == (1, 0, 0)
    smmu.command("SYNC")
    assert state(smmu) == (1, ATC_INV_SYNC, 1)
    smmu.write("GERRORN", 1)
    assert state(smmu) == (2, ATC_INV_SYNC, 0)


# --- devices ---


@pytest.mark.rule("S4.1.6-1", "S4.5-1", "S4.5.1-4", "S4.5.1-5", "S4.5.1-9", "S4.5.2-1")
def test_devices_are_told_what_the_commands_say():
    smmu, _ = system()
    device = smmu.devices[5] = Device()
    smmu.command("ATC_INV", StreamID=5, SSV=1, SubstreamID=9, Address=0x1234_5000)
    smmu.command("ATC_INV", StreamID=5, SSV=1, SubstreamID=9, G=1, Size=52)
    smmu.command("ATC_INV", StreamID=6, Size=52)
    smmu.command("PRI_RESP", StreamID=5, SSV=1, SubstreamID=9, PRGIndex=0x1FF, Resp=2)
    smmu.command("PRI_RESP", StreamID=5, SubstreamID=9, PRGIndex=3, Resp=1)
    assert device.told == [
        ("atc", 9, 0x1234_5000, 4096, False), ("atc", 9, 0, 1 << 64, True),
        ("pri", 9, 0x1FF, 2), ("pri", None, 3, 1),
    ]  # fmt: skip


def test_an_exception_of_a_device_leaves_its_command_in_the_queue():
    smmu, _ = system()
    device = smmu.devices[5] = Device()
    device.answer = OSError("broken")
    with pytest.raises(OSError, match="broken"):
        smmu.command("ATC_INV", StreamID=5)
    assert state(smmu) == (0, 0, 0)
    device.answer = None
    smmu.command("SYNC")
    assert state(smmu) == (2, 0, 0) and len(device.told) == 2


def test_a_device_may_issue_commands_itself():
    smmu, _ = system()

    class Busy(Device):
        def atc_invalidate(self, *arguments):
            super().atc_invalidate(*arguments)
            if len(self.told) < 6:
                smmu.command("ATC_INV", StreamID=5)
                with pytest.raises(RuntimeError, match="commands before it are not complete"):
                    smmu.sync()

    device = smmu.devices[5] = Busy()
    smmu.command("ATC_INV", StreamID=5)
    assert len(device.told) == 6
    assert smmu.read("CMDQ_PROD") == smmu.read("CMDQ_CONS")
    smmu.sync()


@pytest.mark.rule("S6.3.9.3-2", "S6.3.26-1")
def test_a_device_may_set_the_queue_up_anew():
    smmu, _ = system()

    class Rude(Device):
        def atc_invalidate(self, *arguments):
            smmu.write("CR0", 5)
            smmu.write("CMDQ_BASE", QUEUE + 0x1000 | 2)
            smmu.write("CMDQ_PROD", 1)
            smmu.write("CMDQ_CONS", 1)

    smmu.devices[5] = Rude()
    smmu.command("ATC_INV", StreamID=5)
    assert state(smmu) == (1, 0, 0)


def test_a_callback_memory_that_raises_leaves_the_command():
    smmu, _ = system(base=0xA000_0000)
    fails = [True]

    def read(address, n):
        if fails:
            raise KeyError(address)
        return SYNC.to_bytes(16, "little")

    smmu.memory.add_callback(0xA000_0000, 0x80, read)
    with pytest.raises(KeyError):
        smmu.write("CMDQ_PROD", 2)
    assert state(smmu) == (0, 0, 0)
    fails.clear()
    smmu.write("CMDQ_PROD", 2)
    assert state(smmu) == (2, 0, 0)


# --- command() and sync() ---


def test_without_a_queue_commands_are_executed_directly():
    memory = Memory()
    wires = []
    smmu = Smmu(memory, Features.full(), on_interrupt=wires.append)
    device = smmu.devices[5] = Device()
    smmu.command("pri_resp", streamid=5, prgindex=4)
    assert device.told == [("pri", None, 4, 0)]
    smmu.command("SYNC", CS=2)
    assert wires == ["sev"]
    smmu.sync()
    with pytest.raises(ValueError, match=r"^SYNC: CERROR_ILL: CS=0b11 is reserved"):
        smmu.command("SYNC", CS=3)
    device.answer = False
    smmu.command("ATC_INV", StreamID=5)
    with pytest.raises(ValueError, match=r"^SYNC: CERROR_ATC_INV_SYNC"):
        smmu.sync()
    smmu.sync()
    assert smmu.gerror == 0


def test_commands_are_packed_by_the_table_of_records():
    smmu, _ = system(4, cr0=5)
    smmu.command("TLBI_NH_VA", VMID=1, ASID=0x12, Leaf=1, Address=0x1234_5000)
    smmu.command("RESUME", Ac=1, StreamID=1, STAG=5)
    assert smmu.memory.read(QUEUE, 32) == b"".join(
        word.to_bytes(8, "little")
        for word in (0x0012_0001_0000_0012, 0x1234_5001, 0x1_0000_1044, 5)
    )
    assert smmu.read("CMDQ_PROD") == 2
    for name, fields, message in (
        ("NOTHING", {}, "command must be the opcode or name of one, not 'NOTHING'"),
        ("SYNC", {"Leaf": 1}, "SYNC has no field 'Leaf'"),
        ("RESUME", {"STAG": 1 << 16}, "must be 0 to 0xffff, not 0x10000"),
    ):
        with pytest.raises(ValueError, match=message):
            smmu.command(name, **fields)
    assert smmu.read("CMDQ_PROD") == 2


def test_sync_tells_why_it_does_not_complete():
    smmu, _ = system(cr0=5)
    with pytest.raises(RuntimeError, match=r"CR0\.CMDQEN is 0"):
        smmu.sync()
    smmu.write("CR0", ENABLED)
    smmu.sync()
    smmu.command("SYNC", CS=3)
    with pytest.raises(RuntimeError, match="stopped by CERROR_ILL"):
        smmu.sync()
    for _ in range(6):
        smmu.command("SYNC")
    with pytest.raises(BufferError, match="full, 8 commands wait"):
        smmu.command("SYNC")


def test_a_queue_that_cannot_be_written_refuses_commands():
    smmu, _ = system(base=0xA000_0000)
    with pytest.raises(ExternalAbort):
        smmu.command("SYNC")
    smmu.memory.add(bytes(128), 0xA000_0000)
    with pytest.raises(PermissionError):
        smmu.command("SYNC")
    assert smmu.read("CMDQ_PROD") == 0


@pytest.mark.rule("S2.2-8", "S6.3.1-20")
@pytest.mark.parametrize(
    ("missing", "name"),
    [({"ats": 0, "pri": 0}, "ATC_INV"), ({"pri": 0}, "PRI_RESP"), ({"s2p": 0}, "TLBI_S12_VMALL"),
     ({"stall_model": 1}, "RESUME"), ({"hyp": 0}, "TLBI_EL2_ALL")],
)  # fmt: skip
def test_commands_of_absent_features_are_illegal(missing, name):
    for features, error in ((Features.full(), 0), (Features.full().replace(**missing), ILL)):
        smmu, _ = system(features=features)
        smmu.command(name)
        assert state(smmu)[1:] == (error, error)


def test_every_command_of_the_table_is_legal_or_not_and_nothing_else():
    for name, features in itertools.product(
        layout.COMMANDS, (Features.full(), Features.minimal().replace(cmdqs=3), Features.qemu())
    ):
        smmu, _ = system(features=features, strtab_base_cfg=6)
        smmu.command(name)
        assert state(smmu) in ((1, 0, 0), (0, ILL, 1)), name


def test_an_error_that_is_acknowledged_and_not_repaired_does_not_go_on_for_ever():
    smmu, wires = system()

    def acknowledge(name):
        wires.append(name)
        smmu.write("GERRORN", smmu.gerror)

    smmu.on_interrupt = acknowledge
    put(smmu, 0, BAD)
    smmu.write("CMDQ_PROD", 1)
    assert wires == ["gerror"] * 8  # as often as the queue has entries
    assert smmu.read("CMDQ_CONS") == ILL << 24
