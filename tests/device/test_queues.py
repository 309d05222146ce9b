"""Queues in memory against an obvious model: rings, overflow, aborts, interrupts, GERROR."""

import random
import re
import threading
import time

import numpy as np
import pytest
import small
from small import Wires

from smmufast import Event, Features, Memory, PageAnswer, Smmu, layout

QUEUE = small.QUEUES
PAGES = 0x9100_0000
COMMANDS = 0x9200_0000
MSI = 0x9300_0000
ABT_ERR = {"EVENTQ": 1 << 2, "PRIQ": 1 << 3}
FAULTS = [small.EVENTS[event] for event in (0x02, 0x04, 0x08, 0x10, 0x13)]
CR0 = {name: layout.REGISTERS["CR0"].field(name).mask for name in
       ("SMMUEN", "PRIQEN", "EVENTQEN", "CMDQEN")}  # fmt: skip
IRQS = 0b111  # IRQ_CTRL: all


class Patch:
    """Memory of queues behind a callback, which may refuse writes."""

    def __init__(self, size):
        self.data = bytearray(size)
        self.refuse = False

    def add(self, memory, base):
        def read(address, n):
            return bytes(self.data[address - base : address - base + n])

        def write(address, data):
            if self.refuse:
                return None
            self.data[address - base : address - base + len(data)] = data
            return True

        memory.add_callback(base, len(self.data), read, write)


def system(log2size=3, features=None, **registers):
    """(Smmu, Wires): the small system, with memory for queues and an event queue."""
    return small.device(features=features, **{"eventq_base": QUEUE | log2size} | registers)


def fault(smmu, request=FAULTS[0]):
    return smmu.translate(request.sid, request.iova, **request.access)


def records(smmu, base, size, first, count, log2size):
    """Entries of a queue, from a position on."""
    return [
        smmu.memory.read(base + size * ((first + i) % (1 << log2size)), size) for i in range(count)
    ]


# --- the model ---


class Model:
    """A queue that the SMMU writes, with plain Python integers and no shortcuts."""

    def __init__(self, log2size, blocks):
        self.size = 1 << log2size
        self.blocks = blocks
        self.prod = self.cons = 0  # index and wrap, as one number below 2 * size
        self.ovflg = self.ovackflg = 0
        self.enabled = True
        self.error = False
        self.memory = {}

    def put(self, record, aborts):
        """Whether it is written, or why not; and whether the queue was empty before."""
        if not self.enabled or self.error:
            return "closed", False
        if self.blocks and self.ovflg != self.ovackflg:
            return "full", False
        index, wrap = self.prod % self.size, self.prod // self.size
        read_index, read_wrap = self.cons % self.size, self.cons // self.size
        # CONS ahead of PROD, or more entries than there are slots, is nonsense: full
        if index < read_index if wrap == read_wrap else index >= read_index:
            if self.ovflg == self.ovackflg:
                self.ovflg ^= 1
            return "full", False
        if aborts:
            self.error = True
            return "aborted", False
        was_empty = self.prod == self.cons
        self.memory[index] = record
        self.prod = (self.prod + 1) % (2 * self.size)
        return "written", was_empty


def check(smmu, name, model, patch, size):
    assert smmu.read(f"{name}_PROD") == model.prod | model.ovflg << 31
    assert smmu.read(f"{name}_CONS") == model.cons | model.ovackflg << 31
    active = (smmu.gerror ^ smmu.gerrorn) & ABT_ERR[name]
    assert bool(active) == model.error
    for index, record in model.memory.items():
        assert bytes(patch.data[size * index : size * index + size]) == record


def random_step(rng, smmu, name, model, patch, enables):
    """Anything that software may do to a queue; also what it should not."""
    step = rng.choice(("cons", "cons", "empty", "nonsense", "ack", "refuse", "error", "off"))
    if step == "cons":
        count = (model.prod - model.cons) % (2 * model.size)
        model.cons = (model.cons + rng.randint(0, count)) % (2 * model.size)
        smmu.write(f"{name}_CONS", model.cons | model.ovackflg << 31)
    elif step == "empty":
        model.cons, model.ovackflg = model.prod, model.ovflg
        smmu.write(f"{name}_CONS", model.cons | model.ovackflg << 31)
    elif step == "nonsense" and rng.random() < 0.3:
        value = rng.getrandbits(32)
        smmu.write(f"{name}_CONS", value)
        model.cons, model.ovackflg = value % (2 * model.size), value >> 31
    elif step == "ack":
        model.ovackflg = model.ovflg
        smmu.write(f"{name}_CONS", model.cons | model.ovackflg << 31)
    elif step == "refuse":
        patch.refuse = rng.random() < 0.3
    elif step == "error":
        smmu.write("GERRORN", smmu.gerror)
        model.error = False
    elif step == "off" and rng.random() < 0.5:
        smmu.write("CR0", smmu.cr0 & ~enables)
        model.enabled = False
        if rng.random() < 0.5:
            value = rng.getrandbits(32)
            smmu.write(f"{name}_PROD", value)
            model.prod, model.ovflg = value % (2 * model.size), value >> 31
    if rng.random() < 0.6 and not model.enabled:
        smmu.write("CR0", smmu.cr0 | enables)
        model.enabled = True


@pytest.mark.rule(
    "S3.5.1-1", "S3.5.1-6", "S3.5.1-8", "S3.5.1-10", "S3.5.3-3", "S3.12-2", "S3.18.2-1",
    "S4.7.3-14", "S6.3.9.4-1", "S6.3.95-1", "S6.3.95-2", "S6.3.96-1", "S7.2.1-1", "S7.2.1-2",
    "S7.2.2-2", "S7.4-1", "S7.4-5", "S7.5-2",
)
@pytest.mark.parametrize("seed", range(40))
def test_the_event_queue_is_that_of_the_model(seed):
    rng = random.Random(seed)
    log2size = rng.choice((0, 0, 1, 2, 3, 5))
    patch = Patch(32 << log2size)
    smmu, wires = system(log2size, eventq_base=COMMANDS + 0x1000_0000 | log2size)
    patch.add(smmu.memory, COMMANDS + 0x1000_0000)
    model = Model(log2size, blocks=False)
    for _ in range(300):
        if rng.random() < 0.7:
            result = fault(smmu, rng.choice(FAULTS))
            status, first = model.put(result.fault.record, patch.refuse)
            assert (result.event is not None) == (status == "written")
            expected = ["eventq"] if first else ["gerror"] if status == "aborted" else []
            assert wires.take() == expected
        else:
            random_step(rng, smmu, "EVENTQ", model, patch, CR0["EVENTQEN"])
            assert wires.take() == []
        check(smmu, "EVENTQ", model, patch, 32)


@pytest.mark.rule(
    "S6.3.36-2", "S6.3.97-1", "S6.3.98-1", "S7.5-3", "S8-3", "S8-4", "S8.1-1", "S8.1-4",
    "S8.2-6",
)
@pytest.mark.parametrize("seed", range(40))
def test_the_page_request_queue_is_that_of_the_model(seed):
    rng = random.Random(seed)
    log2size = rng.choice((0, 1, 2, 3, 5))
    patch = Patch(max(32, 16 << log2size))
    features = Features.full().replace(pps=1)
    smmu, wires = system(
        features=features, cr0=0xF, priq_base=COMMANDS + 0x1000_0000 | log2size,
    )  # fmt: skip
    patch.add(smmu.memory, COMMANDS + 0x1000_0000)
    model = Model(log2size, blocks=True)
    for _ in range(300):
        if rng.random() < 0.7:
            ssid = rng.choice((None, 0, 5, 0xFFFFF))
            asked = {name: rng.random() < 0.6 for name in ("read", "write", "execute", "priv")}
            last = rng.random() < 0.6
            group, page, sid = rng.randrange(512), rng.getrandbits(52) << 12, rng.getrandbits(32)
            answer = smmu.page_request(sid, page, ssid=ssid, last=last, prg_index=group, **asked)
            tail = (
                sid | (ssid or 0) << 32 | (asked["priv"] and ssid is not None) << 58
                | (asked["execute"] and ssid is not None) << 59 | asked["read"] << 60
                | asked["write"] << 61 | last << 62 | (ssid is not None) << 63
                | (group | page) << 64
            )  # fmt: skip
            status, first = model.put(tail.to_bytes(16, "little"), patch.refuse)
            marker = last and ssid is not None and not asked["read"] and not asked["write"]
            if status == "written":
                expected = PageAnswer("queued", None)
            elif marker or (status == "full" and not last):
                expected = PageAnswer("dropped", None)
            elif status == "full":
                expected = PageAnswer("success", ssid)
            else:
                expected = PageAnswer("failure", None)
            assert answer == expected
            assert wires.take() == (
                ["priq"] if first else ["gerror"] if status == "aborted" else []
            )
        else:
            random_step(rng, smmu, "PRIQ", model, patch, CR0["PRIQEN"])
            assert wires.take() == []
        check(smmu, "PRIQ", model, patch, 16)


# --- where a queue lies ---


@pytest.mark.rule("S6.3.26-3")
@pytest.mark.parametrize("log2size", [0, 1, 3, 7, 19])
def test_a_queue_is_aligned_to_its_size(log2size):
    smmu, _ = system(eventq_base=QUEUE | 0x1F_FFE0 | log2size)
    base = (QUEUE | 0x1F_FFE0) & ~((32 << log2size) - 1)
    expected = fault(smmu).event.record
    assert smmu.memory.read(base, 32) == expected
    texts = [warning.text for warning in smmu.warnings if warning.register == "EVENTQ_BASE"]
    assert len(texts) == (log2size > 0)
    assert all(f"{base:#x} is used" in text for text in texts)


@pytest.mark.rule("S3.5.1-3", "S6.3.2-2", "S6.3.29-1")
def test_a_queue_has_no_more_entries_than_the_implementation():
    features = Features(eventqs=2)
    smmu, _ = system(eventq_base=QUEUE | 9, features=features)
    assert [fault(smmu).event is not None for _ in range(6)] == [True] * 4 + [False] * 2
    assert smmu.read("EVENTQ_PROD") == 0x8000_0004
    assert "IDR1.EVENTQS, 2, is used" in smmu.warnings[0].text


@pytest.mark.rule("S3.5.4-2", "S6.3.19-2", "S7.2.2-1", "S7.5-1", "S16.7.4-5")
@pytest.mark.parametrize("where", ["outside", "read-only"])
def test_a_queue_that_cannot_be_written_is_an_error(where):
    base = {"outside": 0xA000_0000, "read-only": 0xB000_0000}[where]
    smmu, wires = system(0, features=Features(oas=4), eventq_base=base)
    smmu.memory.add(bytes(64), 0xB000_0000)
    first = fault(smmu)
    assert first.fault is not None and first.event is None
    assert smmu.gerror == 1 << 2 and wires.take() == ["gerror"]
    assert fault(smmu).event is None
    assert smmu.gerror == 1 << 2 and wires.take() == []
    smmu.write("GERRORN", 1 << 2)
    assert fault(smmu).event is None
    assert smmu.gerror == 0 and wires.take() == ["gerror"]
    assert smmu.read("EVENTQ_PROD") == 0


@pytest.mark.rule("S3.4.3-6", "S6.3.21-2", "S6.3.26-2")
@pytest.mark.parametrize("high", [1 << 44, 1 << 51, 0xFF << 44])
def test_addresses_of_queues_and_messages_are_truncated_to_oas(high):
    features = Features.full().replace(oas=4)
    smmu, wires = system(
        0, features=features, eventq_base=high | QUEUE, priq_base=high | PAGES | 1,
        cmdq_base=high | COMMANDS | 2, cr0=0xF,
    )  # fmt: skip
    smmu.write("IRQ_CTRL", 0)
    for i, name in enumerate(("EVENTQ", "PRIQ", "GERROR")):
        smmu.write(f"{name}_IRQ_CFG0", high | MSI + 16 * i)
        smmu.write(f"{name}_IRQ_CFG1", 0x1000 + i)
        assert smmu.read(f"{name}_IRQ_CFG0") == high | MSI + 16 * i
        assert re.search(f"beyond .* 44 bits: {MSI + 16 * i:#x} is used", smmu.warnings[-1].text)
    smmu.write("IRQ_CTRL", IRQS)
    assert fault(smmu).event.record == smmu.memory.read(QUEUE, 32)
    assert smmu.page_request(1, 0x7000, read=True).action == "queued"
    assert smmu.memory.read(PAGES, 8) != bytes(8)
    smmu.command("SYNC", CS=1, MSIAddress=high | MSI + 48, MSIData=0x1003)
    smmu.command("SYNC", CS=3)  # illegal: GERROR
    assert smmu.memory.read(COMMANDS, 1) == b"\x46"
    assert (smmu.read("CMDQ_CONS") & 0xFFFFF, smmu.gerror) == (1, 1)
    assert [smmu.memory.read_u64(MSI + 16 * i) for i in range(4)] == [
        0x1000, 0x1001, 0x1002, 0x1003,
    ]  # fmt: skip
    assert wires == ["eventq", "priq", "cmdq_sync", "gerror"]


@pytest.mark.rule("S3.4.3-7", "S4.7.3-9")
def test_only_bits_beyond_oas_make_no_message_in_a_register_and_one_in_a_command():
    # 4.7.3 says of CMD_SYNC that the check for zero is of all bits; elsewhere they are RES0
    smmu, wires = system(features=Features.full().replace(oas=4), cr0=0xD, cmdq_base=COMMANDS | 2)
    smmu.memory.add(bytearray(b"\xff" * 64), 0)
    smmu.write("IRQ_CTRL", 0)
    smmu.write("EVENTQ_IRQ_CFG0", 1 << 44)
    smmu.write("EVENTQ_IRQ_CFG1", 0x55)
    smmu.write("IRQ_CTRL", IRQS)
    fault(smmu)
    assert smmu.memory.read(0, 4) == b"\xff" * 4 and wires.take() == ["eventq"]
    smmu.command("SYNC", CS=1, MSIAddress=1 << 44, MSIData=0x66)
    assert smmu.memory.read(0, 8) == b"\x66\0\0\0" + b"\xff" * 4
    assert wires.take() == ["cmdq_sync"]


def test_without_an_event_queue_events_are_in_results_alone():
    memory = Memory()
    memory.add(small.build(), small.BASE)
    wires = Wires()
    smmu = Smmu(memory, on_interrupt=wires, **small.registers())
    smmu.write("IRQ_CTRL", IRQS)
    for request in FAULTS:
        assert fault(smmu, request).event is not None
    assert smmu.read("EVENTQ_PROD") == 0 and wires == []
    assert smmu.gerror == 0


@pytest.mark.rule("S3.5.3-1", "S3.5.3-5")
def test_every_face_records():
    smmu, _ = system(5)
    request = FAULTS[3]
    expected = fault(smmu, request).event.record
    smmu.translate(request.sid, request.iova, **request.access, trace=True)
    with pytest.raises(LookupError):
        smmu.pa(request.sid, request.iova, **request.access)
    smmu.translate_range(request.sid, request.iova, 64, **request.access)
    n = 3
    found = smmu.translate_batch(
        request.sid, np.full(n, request.iova, np.uint64), priv=request.priv,
        columns=["event", "record"],
    )  # fmt: skip
    assert [bytes(row) for row in found["record"]] == [expected] * n
    assert smmu.read("EVENTQ_PROD") == 7
    assert records(smmu, QUEUE, 32, 0, 7, 5) == [expected] * 7


@pytest.mark.rule("S3.5.3-2", "S3.12.1-4")
def test_a_batch_loses_what_does_not_fit():
    smmu, _ = system(2)
    request = FAULTS[3]
    found = smmu.translate_batch(
        request.sid, np.full(9, request.iova, np.uint64), columns=["event", "fault"]
    )
    assert found["event"].tolist() == [0x10] * 4 + [0] * 5
    assert found["fault"].tolist() == [0x10] * 9
    assert smmu.read("EVENTQ_PROD") == 0x8000_0004


# --- interrupts ---


@pytest.mark.rule(
    "S3.18-101", "S3.18.1-1", "S3.18.2-5", "S3.18.2-6", "S6.3.16-1", "S6.3.16-5", "S6.3.30-1",
    "S6.3.31-1",
)
def test_interrupts_are_wired_or_messages_and_only_if_enabled():
    features = Features.full()
    smmu, wires = system(features=features)
    smmu.write("IRQ_CTRL", 0)
    fault(smmu)
    assert wires == []  # and it is lost: the queue is not empty any more
    smmu.write("EVENTQ_IRQ_CFG0", MSI, 8)
    smmu.write("EVENTQ_IRQ_CFG1", 0x1234_5678)
    smmu.write("IRQ_CTRL", IRQS)
    fault(smmu)
    assert smmu.memory.read(MSI, 8) == bytes(8)
    smmu.write("EVENTQ_CONS", 2)
    fault(smmu)
    assert smmu.memory.read(MSI, 8) == bytes.fromhex("7856341200000000")
    assert wires.take() == ["eventq"]  # the wire is asserted too
    smmu.write("EVENTQ_IRQ_CFG0", 0)  # ignored: the interrupt is enabled
    assert smmu.read("EVENTQ_IRQ_CFG0") == MSI
    smmu.write("IRQ_CTRL", 0)
    smmu.write("EVENTQ_IRQ_CFG0", 0)
    smmu.write("IRQ_CTRL", 4)
    smmu.write("EVENTQ_CONS", 3)
    fault(smmu)
    assert wires == ["eventq"]


@pytest.mark.rule("S3.18.2-4", "S7.5-4", "S7.5.1-1")
def test_a_message_that_aborts_is_an_error_of_its_own():
    smmu, wires = system(features=Features.full())
    smmu.write("IRQ_CTRL", 0)
    smmu.write("EVENTQ_IRQ_CFG0", 0xA000_0000)
    smmu.write("IRQ_CTRL", IRQS)
    assert fault(smmu).event is not None
    assert smmu.gerror == 1 << 5 and wires.take() == ["gerror", "eventq"]
    smmu.write("IRQ_CTRL", 0)
    smmu.write("GERROR_IRQ_CFG0", 0xA000_0000)
    smmu.write("IRQ_CTRL", IRQS)
    smmu.write("GERRORN", 1 << 5)
    smmu.write("EVENTQ_CONS", 1)
    fault(smmu)  # the message aborts, and so does that of the error, which has no interrupt
    assert smmu.gerror == 1 << 7 and smmu.gerrorn == 1 << 5
    assert wires == ["gerror", "eventq"]


@pytest.mark.rule("S3.18.2-7", "S4.7.3-5")
@pytest.mark.parametrize("wired", [True, False])
def test_every_source_asserts_its_wire_beside_its_message_where_there_are_wires(wired):
    smmu, wires = system(
        0, features=Features.full(), cr0=0xF, priq_base=PAGES | 3, cmdq_base=COMMANDS | 3,
        wired=wired,
    )  # fmt: skip
    assert smmu.wired is wired
    asserted = []
    for enables in (0, IRQS):
        smmu.write("IRQ_CTRL", 0)
        for address in (0, MSI):
            for i, name in enumerate(("EVENTQ", "PRIQ", "GERROR")):
                smmu.write("IRQ_CTRL", 0)
                smmu.write(f"{name}_IRQ_CFG0", address and address + 16 * i)
                smmu.write(f"{name}_IRQ_CFG1", 0x1000 + i)
                smmu.write("IRQ_CTRL", enables)
            smmu.memory.write(MSI, bytes(64))
            fault(smmu)
            smmu.page_request(1, 0x7000, read=True)
            smmu.command("SYNC", CS=1, MSIAddress=address and address + 48, MSIData=0x1003)
            smmu.command("SYNC", CS=2)
            smmu.command("SYNC", CS=3)
            smmu.memory.write(COMMANDS, bytes([0x46]) + bytes(15))
            asserted.append(wires.take())
            sent = [smmu.memory.read_u64(MSI + 16 * i) for i in range(4)]
            on = enables != 0
            assert sent == ([0x1000 * on, 0x1001 * on, 0x1002 * on, 0x1003] if address else [0] * 4)
            smmu.write("CR0", smmu.cr0 & ~CR0["CMDQEN"])
            smmu.write("CMDQ_PROD", 0)
            smmu.write("CMDQ_CONS", 0)
            smmu.write("GERRORN", smmu.gerror)
            smmu.write("CR0", smmu.cr0 | CR0["CMDQEN"])
            smmu.write("EVENTQ_CONS", smmu.read("EVENTQ_PROD"))
            smmu.write("PRIQ_CONS", smmu.read("PRIQ_PROD"))
    if wired:
        some, every = ["cmdq_sync", "sev"], ["eventq", "priq", "cmdq_sync", "sev", "gerror"]
    else:
        some = every = ["sev"]  # no interrupt
    assert asserted == [some, some, every, every]


def test_without_wires_there_must_be_messages():
    memory = Memory()
    for features in (Features(msi=0), Features.minimal()):
        assert Smmu(memory, features, strtab_base_cfg=6).wired
        with pytest.raises(ValueError, match=r"^wired must be True with msi=0.*, not False"):
            Smmu(memory, features, strtab_base_cfg=6, wired=False)


@pytest.mark.parametrize("raises", ["message", "wire", "both"])
def test_an_exception_of_one_way_does_not_keep_the_other_quiet(raises):
    smmu, _ = system(features=Features.full())
    seen = []

    def write(address, data):
        seen.append("message")
        if raises != "wire":
            raise KeyError("message")
        return True

    def wire(name):
        seen.append(name)
        if raises != "message":
            raise KeyError("wire")

    smmu.memory.add_callback(0xA000_0000, 64, lambda a, n: bytes(n), write)
    smmu.on_interrupt = wire
    smmu.write("IRQ_CTRL", 0)
    smmu.write("EVENTQ_IRQ_CFG0", 0xA000_0000)
    smmu.write("IRQ_CTRL", IRQS)
    with pytest.raises(KeyError, match="wire" if raises == "wire" else "message"):
        fault(smmu)
    assert seen == ["message", "eventq"] and smmu.read("EVENTQ_PROD") == 1


@pytest.mark.rule("S3.18-5", "S6.3.21-4")
def test_without_msi_support_all_interrupts_are_wired():
    smmu, wires = system(features=Features(msi=0))
    smmu.write("IRQ_CTRL", 0)
    smmu.write("EVENTQ_IRQ_CFG0", MSI, 8)
    assert smmu.read("EVENTQ_IRQ_CFG0", 8) == 0
    smmu.write("IRQ_CTRL", IRQS)
    fault(smmu)
    assert wires == ["eventq"]


@pytest.mark.rule("S3.18-8", "S3.18.2-2", "S6.3.36-1")
def test_page_requests_may_interrupt_for_the_last_of_a_group_only():
    smmu, wires = system(features=Features.full(), cr0=7, priq_base=PAGES | 4)
    smmu.write("IRQ_CTRL", 0)
    smmu.write("PRIQ_IRQ_CFG2", 1 << 31)
    smmu.write("IRQ_CTRL", IRQS)
    told = []
    for last in (False, False, True, False, True):
        smmu.page_request(1, 0x1000, read=True, last=last)
        told.append(wires.take())
    assert told == [[], [], ["priq"], [], ["priq"]]


@pytest.mark.rule("S6.3.36-4")
def test_a_lost_last_message_interrupts_with_lo():
    smmu, wires = system(features=Features.full(), cr0=7, priq_base=PAGES | 1)
    smmu.write("IRQ_CTRL", 0)
    smmu.write("PRIQ_IRQ_CFG2", 1 << 31)
    smmu.write("IRQ_CTRL", IRQS)

    def asked(**more):
        answer = smmu.page_request(1, 0x1000, **more)
        return answer.action, wires.take()

    assert asked(read=True, last=False) == ("queued", [])
    assert asked(ssid=3, last=True) == ("queued", ["priq"])  # a stop marker has Last
    # full, and then in overflow with room
    for _ in range(2):
        assert asked(read=True, last=False) == ("dropped", [])
        assert asked(read=True, last=True) == ("success", ["priq"])
        assert asked(ssid=3, last=True) == ("dropped", ["priq"])
        smmu.write("PRIQ_CONS", 2)
    # lost for other reasons
    smmu.write("PRIQ_CONS", 2 | 1 << 31)
    smmu.write("CR0", 5)
    assert asked(read=True, last=True) == ("failure", [])
    smmu.write("PRIQ_BASE", 0xA000_0000)
    smmu.write("CR0", 7)
    assert asked(read=True, last=True) == ("failure", ["gerror"])
    assert asked(read=True, last=True) == ("failure", [])


def test_a_lost_message_interrupts_without_lo_never():
    smmu, wires = system(features=Features.full(), cr0=7, priq_base=PAGES)
    assert smmu.page_request(1, 0x1000, read=True).action == "queued"
    assert wires.take() == ["priq"]
    assert smmu.page_request(1, 0x1000, read=True).action == "success"
    assert wires.take() == []


# --- global errors ---


@pytest.mark.rule("S6.3.19-1", "S6.3.20-1")
def test_gerrorn_ends_active_errors_only():
    smmu, wires = system(eventq_base=0xA000_0000)
    fault(smmu)
    assert (smmu.gerror, smmu.gerrorn, wires.take()) == (4, 0, ["gerror"])
    smmu.write("GERROR", 0)
    assert smmu.gerror == 4 and "read-only" in smmu.warnings[-1].text
    fault(smmu)
    assert (smmu.gerror, smmu.gerrorn, wires.take()) == (4, 0, [])
    smmu.write("GERRORN", 4)
    assert (smmu.gerror, smmu.gerrorn) == (4, 4)
    fault(smmu)
    assert (smmu.gerror, smmu.gerrorn, wires.take()) == (0, 4, ["gerror"])
    assert len(smmu.warnings) == 1


@pytest.mark.rule("S6.3.20-2", "S6.3.20-3")
@pytest.mark.parametrize(
    ("features", "bits"),
    [({}, 0x1FD), ({"pri": 0}, 0x1B5), ({"msi": 0}, 0x10D), ({"msi": 0, "pri": 0}, 0x105)],
)
def test_gerrorn_reads_what_was_last_written(features, bits):
    smmu, wires = system(features=Features.full().replace(**features))
    for value in (0xFFFF_FFFF, 0, 0x155, 0x0AA):
        smmu.write("GERRORN", value)
        assert smmu.gerrorn == smmu.read("GERRORN") == value & bits
        assert smmu.gerror == 0
    assert wires == []
    assert any("not active, and are so now" in warning.text for warning in smmu.warnings)


def test_an_error_that_software_alone_made_active_is_active():
    # 6.3.20 leaves it open; 7.5 says that an error is active where the two registers differ
    smmu, wires = system(cr0=0xD, cmdq_base=COMMANDS | 2)
    smmu.write("GERRORN", 1 | 4)
    assert fault(smmu).event is None and smmu.read("EVENTQ_PROD") == 0
    smmu.command("SYNC", CS=1)
    assert smmu.read("CMDQ_CONS") == 0 and wires == []
    smmu.write("GERRORN", 0)
    assert smmu.read("CMDQ_CONS") == 1 and wires == ["cmdq_sync"]
    assert fault(smmu).event is not None


def test_an_exception_of_on_interrupt_reaches_the_caller_and_harms_nothing():
    smmu, _ = system()

    def fails(name):
        raise KeyError(name)

    smmu.on_interrupt = fails
    with pytest.raises(KeyError, match="eventq"):
        fault(smmu)
    assert smmu.read("EVENTQ_PROD") == 1
    assert fault(smmu).event is not None  # no interrupt: the queue is not empty
    smmu.write("EVENTQ_CONS", 2)
    with pytest.raises(KeyError):
        smmu.translate_batch(FAULTS[3].sid, np.full(3, FAULTS[3].iova, np.uint64))
    assert smmu.read("EVENTQ_PROD") == 3


def test_memory_cannot_change_while_an_interrupt_is_told():
    smmu, _ = system()
    smmu.on_interrupt = lambda name: smmu.memory.remove(small.BASE)
    with pytest.raises(BufferError):
        fault(smmu)
    smmu.on_interrupt = None
    assert fault(smmu, small.Request(small.STAGE1, small.RW)).pa == 0x4000_1000


# --- several at once ---


def test_a_callback_that_holds_the_queue_may_fault_itself():
    smmu, wires = system(eventq_base=0xA000_0000 | 4)
    data = bytearray(0x200)
    depth = 0

    def write(address, record):
        nonlocal depth
        depth += 1
        if depth < 4:
            assert fault(smmu).event is not None
            assert smmu.read("EVENTQ_PROD") == 0  # the outermost record is not there yet
        data[address - 0xA000_0000 : address - 0xA000_0000 + 32] = record
        return True

    smmu.memory.add_callback(0xA000_0000, 0x200, lambda a, n: bytes(n), write)
    expected = fault(smmu, FAULTS[4]).event.record
    assert smmu.read("EVENTQ_PROD") == 4 and wires == ["eventq"]
    assert bytes(data[:32]) == expected
    assert all(data[32 * i] == 0x02 for i in range(1, 4)) and not any(data[128:])


def test_a_record_whose_callback_raises_leaves_the_queue_as_it_was():
    smmu, wires = system(eventq_base=0xA000_0000 | 4)
    fails = True

    def write(address, record):
        if fails:
            raise OSError("no")
        return True

    smmu.memory.add_callback(0xA000_0000, 0x200, lambda a, n: bytes(n), write)
    with pytest.raises(OSError, match="no"):
        fault(smmu)
    assert smmu.read("EVENTQ_PROD") == 0 and smmu.gerror == 0 and wires == []
    fails = False
    assert fault(smmu).event is not None
    assert smmu.read("EVENTQ_PROD") == 1 and wires == ["eventq"]


@pytest.mark.rule("S6.3.9.4-2")
def test_a_queue_set_up_anew_meanwhile_is_not_touched_by_older_writers():
    smmu, _ = system(eventq_base=0xA000_0000 | 4)

    def write(address, record):
        smmu.write("CR0", smmu.cr0 & ~CR0["EVENTQEN"])
        smmu.write("EVENTQ_BASE", QUEUE | 2)
        smmu.write("EVENTQ_PROD", 3)
        smmu.write("EVENTQ_CONS", 3)
        smmu.write("CR0", smmu.cr0 | CR0["EVENTQEN"])
        return True

    smmu.memory.add_callback(0xA000_0000, 0x200, lambda a, n: bytes(n), write)
    fault(smmu)
    assert smmu.read("EVENTQ_PROD") == 3
    record = fault(smmu).event.record
    assert smmu.read("EVENTQ_PROD") == 4
    assert smmu.memory.read(QUEUE + 32 * 3, 32) == record


@pytest.mark.rule("S3.5.2-101", "S7.2.1-6")
def test_threads_lose_no_record():
    smmu, _ = system(19, eventq_base=QUEUE | 19)
    n, threads = 3000, 4
    iovas = [np.arange(n, dtype=np.uint64) * 4096 + (1 << 30) * (1 + i) for i in range(threads)]

    def run(i):
        smmu.translate_batch(small.STAGE1, iovas[i])

    workers = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert smmu.read("EVENTQ_PROD") == n * threads
    raw = smmu.memory.read(QUEUE, 32 * n * threads)
    found = np.frombuffer(raw, layout.dtype("EVENT"))
    addresses = layout.get(found, "EVENT", "InputAddr")
    assert sorted(addresses.tolist()) == sorted(np.concatenate(iovas).tolist())
    for i in range(threads):  # those of one thread are in its order
        own = addresses[(addresses >= iovas[i][0]) & (addresses <= iovas[i][-1])]
        assert (np.diff(own.astype(np.int64)) > 0).all()


@pytest.mark.rule("S3.5.2-1")
def test_threads_behind_a_callback_lose_no_record():
    smmu, _ = system(eventq_base=0xA000_0000 | 10)
    data = bytearray(32 << 10)
    published = []

    def write(address, record):
        time.sleep(1e-5)  # somebody else's turn
        data[address - 0xA000_0000 : address - 0xA000_0000 + 32] = record
        prod = smmu.read("EVENTQ_PROD")
        published.append(all(data[32 * i] for i in range(prod)))
        return True

    smmu.memory.add_callback(0xA000_0000, len(data), lambda a, n: bytes(n), write)
    n, threads = 60, 4

    def run(i):
        for k in range(n):
            fault(smmu, small.Request(small.STAGE1, (1 << 30) + 4096 * (n * i + k)))

    workers = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert smmu.read("EVENTQ_PROD") == n * threads and all(published)
    found = np.frombuffer(bytes(data), layout.dtype("EVENT"))[: n * threads]
    addresses = layout.get(found, "EVENT", "InputAddr")
    assert sorted(addresses.tolist()) == [(1 << 30) + 4096 * i for i in range(n * threads)]


@pytest.mark.parametrize("behind", [1, 2])
@pytest.mark.parametrize("aborts", [True, False])
def test_records_behind_one_that_was_not_written_are_lost_and_nobody_is_told_of_them(
    aborts, behind
):
    """The first record's write ends while the others are being written."""
    smmu, _ = system(eventq_base=0xA000_0000 | 4)
    data = bytearray(32 << 4)
    busy = [threading.Event() for _ in range(behind + 1)]
    ended = threading.Event()
    addresses = []

    def write(address, record):
        index = (address - 0xA000_0000) // 32
        addresses.append(index)
        busy[index].set()
        if index == 0:
            for other in busy:
                other.wait(60)
            return None if aborts else True
        ended.wait(60)
        data[32 * index : 32 * index + 32] = record
        return True

    smmu.memory.add_callback(0xA000_0000, len(data), lambda a, n: bytes(n), write)
    results = {}

    def run(i):
        results[i] = fault(smmu, small.Request(small.STAGE1, (1 << 30) + 4096 * i))
        if i == 0:
            ended.set()

    workers = []
    for i in range(behind + 1):  # one after the other, so that each has the slot of its number
        workers.append(threading.Thread(target=run, args=(i,)))
        workers[i].start()
        assert busy[i].wait(60)
    for worker in workers:
        worker.join()
    assert addresses == list(range(behind + 1))
    written = 0 if aborts else behind + 1
    assert smmu.read("EVENTQ_PROD") == written
    assert sum(result.event is not None for result in results.values()) == written
    assert all(result.fault.name == "F_TRANSLATION" for result in results.values())
    assert bool(smmu.read("GERROR") & ABT_ERR["EVENTQ"]) == aborts


# --- what shows while records are being written: 3.18, 6.3.36, 7.2.2, 7.4, 8.1 ---


class UnderWay:
    """A queue some of whose records are being written: plain lists, by the text."""

    def __init__(self, name, log2size, only_last):
        self.name, self.size, self.only_last = name, 1 << log2size, only_last
        self.prod = self.cons = self.ovflg = self.ovackflg = 0
        self.error = False
        self.slots = []  # beyond PROD, as [how it ended or "busy", Last]
        self.lost = []  # of the records that overflow while these are busy, whether Last
        self.told = []  # (interrupt, PROD.WR at that time)

    def take(self, last):
        """A new slot, or why there is none."""
        if self.error or any(how not in ("busy", True) for how, _ in self.slots):
            return "closed"
        overflow = self.ovflg != self.ovackflg
        used = (self.prod - self.cons) % (2 * self.size) + len(self.slots)
        if used >= self.size or (self.name == "PRIQ" and (overflow or self.lost)):
            if not self.slots or overflow:
                self.ovflg = 1 - self.ovackflg
                if last and self.only_last:
                    self.told.append(("priq", self.prod))
            else:
                self.lost.append(last)
            return "full"
        self.slots.append(["busy", last])
        return self.slots[-1]

    def give(self, slot, how):
        """A write ended: True, "abort" or "raise".  Whether its record is there by now or later."""
        slot[0] = how
        # by identity: two slots may look the same
        index = next(i for i, each in enumerate(self.slots) if each is slot)
        before = [each for each, _ in self.slots[:index]]
        if all(each != "busy" for each, _ in self.slots):
            self.show()
        return how is True and all(each in ("busy", True) for each in before)

    def show(self):
        good = 0
        while good < len(self.slots) and self.slots[good][0] is True:
            good += 1
        lasts = [last for _, last in self.slots[:good]]
        if good == len(self.slots):
            lasts += self.lost
            if self.lost:
                self.ovflg = 1 - self.ovackflg
        was_empty = self.prod == self.cons
        self.prod = (self.prod + good) % (2 * self.size)
        if any(lasts) if self.only_last else was_empty and good:
            self.told.append((self.name.lower(), self.prod))
        if any(how == "abort" for how, _ in self.slots):
            self.error = True
            self.told.append(("gerror", self.prod))
        self.slots, self.lost = [], []


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize(("name", "lo"), [("EVENTQ", 0), ("PRIQ", 0), ("PRIQ", 1)])
def test_callbacks_see_what_the_text_says_while_records_are_being_written(name, lo, seed):
    rng = random.Random(seed)
    log2size = rng.choice((0, 1, 1, 2, 3))
    smmu, _ = system(features=Features.full(), cr0=7, **{
        "eventq_base": QUEUE | 4, f"{name.lower()}_base": 0xA000_0000 | log2size,
    })  # fmt: skip
    smmu.write("IRQ_CTRL", 0)
    smmu.write("PRIQ_IRQ_CFG2", lo << 31)
    smmu.write("IRQ_CTRL", IRQS)
    twin = UnderWay(name, log2size, lo)
    told, ends, depth = [], [], 0
    smmu.on_interrupt = lambda irq: told.append((irq, smmu.read(f"{name}_PROD") & 0xFFFFF))

    def check():
        assert smmu.read(f"{name}_PROD") == twin.prod | twin.ovflg << 31
        assert bool((smmu.gerror ^ smmu.gerrorn) & ABT_ERR[name]) == twin.error
        assert told == twin.told

    def put():
        last = rng.random() < 0.5
        slot = twin.take(last)
        count = len(ends)
        try:
            if name == "EVENTQ":
                written = fault(smmu).event is not None
            else:
                answer = smmu.page_request(1, 0x1000, read=True, last=last).action
                written = answer == "queued"
                if slot == "full":
                    assert answer == ("success" if last else "dropped")
                elif not written:
                    assert answer == "failure"
        except OSError:
            assert ends[-1] == "raise"
            written = False
        if type(slot) is list:
            assert twin.give(slot, ends.pop()) == written
        else:
            assert not written
        assert len(ends) == count
        check()

    def software():
        used = (twin.prod - twin.cons) % (2 * twin.size)
        twin.cons = (twin.cons + rng.randint(0, used)) % (2 * twin.size)
        if rng.random() < 0.5:
            twin.ovackflg = twin.ovflg
        smmu.write(f"{name}_CONS", twin.cons | twin.ovackflg << 31)
        if rng.random() < 0.5:
            smmu.write("GERRORN", smmu.gerror)
            twin.error = False
        check()

    def write(address, data):
        nonlocal depth
        check()
        depth += 1
        for _ in range(rng.choice((0, 1, 1, 2)) if depth < 6 else 0):
            rng.choice((put, put, put, software))()
        depth -= 1
        ends.append(rng.choice((True, True, True, True, "abort", "raise")))
        if ends[-1] == "raise":
            raise OSError
        return True if ends[-1] is True else None

    smmu.memory.add_callback(0xA000_0000, 0x1000, lambda a, n: bytes(n), write)
    for _ in range(60):
        rng.choice((put, put, software))()
    assert told


@pytest.mark.rule("S7.4-2")
@pytest.mark.parametrize("name", ["EVENTQ", "PRIQ"])
def test_an_overflow_shows_only_once_the_queue_is_seen_full(name):
    smmu, _ = system(features=Features.full(), cr0=7, **{f"{name.lower()}_base": 0xA000_0000 | 2})
    seen = []

    def put():
        if name == "EVENTQ":
            fault(smmu)
        else:
            smmu.page_request(1, 0x1000, read=True)

    def look():
        prod, cons = smmu.read(f"{name}_PROD"), smmu.read(f"{name}_CONS")
        seen.append((prod >> 31, (prod - cons) & 7))

    def write(address, data):
        look()
        time.sleep(1e-4)  # somebody else's turn
        look()
        return True

    smmu.memory.add_callback(0xA000_0000, 0x1000, lambda a, n: bytes(n), write)
    workers = [threading.Thread(target=lambda: [put() for _ in range(4)]) for _ in range(4)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        look()
    for worker in workers:
        worker.join()
    look()
    assert seen[-1] == (1, 4)  # nobody consumed
    assert {used for overflow, used in seen if overflow} == {4}


def test_an_overflow_shows_also_if_software_made_room_meanwhile():
    smmu, _ = system(eventq_base=0xA000_0000 | 1)
    seen = []

    def write(address, data):
        if address == 0xA000_0020:
            assert fault(smmu).event is None  # both slots are taken: it is lost
            smmu.write("EVENTQ_CONS", 1)
            seen.append(smmu.read("EVENTQ_PROD"))
        return True

    smmu.memory.add_callback(0xA000_0000, 64, lambda a, n: bytes(n), write)
    fault(smmu)
    fault(smmu)
    assert seen == [1] and smmu.read("EVENTQ_PROD") == 2 | 1 << 31


@pytest.mark.parametrize("ends", ["abort", "raise"])
def test_without_a_full_queue_there_is_no_overflow(ends):
    smmu, wires = system(features=Features.full(), cr0=7, priq_base=0xA000_0000)
    smmu.write("IRQ_CTRL", 0)
    smmu.write("PRIQ_IRQ_CFG2", 1 << 31)
    smmu.write("IRQ_CTRL", IRQS)

    def write(address, data):
        assert smmu.page_request(1, 0x2000, read=True, last=True).action == "success"
        if ends == "raise":
            raise OSError
        return None

    smmu.memory.add_callback(0xA000_0000, 64, lambda a, n: bytes(n), write)
    if ends == "raise":
        with pytest.raises(OSError):
            smmu.page_request(1, 0x1000, read=True, last=True)
    else:
        assert smmu.page_request(1, 0x1000, read=True, last=True).action == "failure"
    assert smmu.read("PRIQ_PROD") == 0
    assert wires == (["gerror"] if ends == "abort" else [])


def threads_in_order(ends):
    """Two records, each by a thread; the writes end in the order 0, 1: (Smmu, told, raised).

    `ends` says how: True, None for an abort, or an exception.
    """
    smmu, _ = system(eventq_base=0xA000_0000 | 4)
    told, raised = [], []
    smmu.on_interrupt = lambda irq: told.append((irq, smmu.read("EVENTQ_PROD"), smmu.gerror))
    busy = [threading.Event() for _ in ends]
    first_done = threading.Event()

    def write(address, data):
        index = (address - 0xA000_0000) // 32
        busy[index].set()
        (busy[1] if index == 0 else first_done).wait(60)
        if index == 1:
            told.append("second ends")
        if isinstance(ends[index], Exception):
            raise ends[index]
        return ends[index]

    def run(index):
        try:
            fault(smmu)
        except OSError as error:
            raised.append(error)
        if index == 0:
            first_done.set()

    smmu.memory.add_callback(0xA000_0000, 512, lambda a, n: bytes(n), write)
    workers = []
    for index in range(2):
        workers.append(threading.Thread(target=run, args=(index,)))
        workers[-1].start()
        assert busy[index].wait(60)
    for worker in workers:
        worker.join()
    return smmu, told, raised


@pytest.mark.rule("S7.2.2-4")
@pytest.mark.parametrize(
    ("ends", "shows"),
    [
        ((True, True), [("eventq", 2, 0)]),
        ((True, None), [("eventq", 1, 4), ("gerror", 1, 4)]),
        ((None, True), [("gerror", 0, 4)]),
        ((None, None), [("gerror", 0, 4)]),
        ((OSError("no"), True), []),
        ((True, OSError("no")), [("eventq", 1, 0)]),
        ((None, OSError("no")), [("gerror", 0, 4)]),
        ((OSError("no"), None), [("gerror", 0, 4)]),
    ],
)
def test_the_thread_whose_record_ends_last_tells_what_all_of_them_did(ends, shows):
    smmu, told, raised = threads_in_order(ends)
    assert told == ["second ends", *shows]
    assert raised == [end for end in ends if isinstance(end, Exception)]
    smmu.memory.remove(0xA000_0000)
    smmu.memory.add_private(0xA000_0000, 512)
    assert (fault(smmu).event is not None) == (None not in ends)


def test_an_exception_of_the_interrupt_of_others_records_is_the_second():
    smmu, _ = system(eventq_base=0xA000_0000 | 4)

    def write(address, data):
        if address == 0xA000_0000:
            with pytest.raises(OSError, match="second"):
                fault(smmu)
            return True
        raise OSError("second")

    smmu.memory.add_callback(0xA000_0000, 512, lambda a, n: bytes(n), write)

    def interrupt(irq):
        raise KeyError(irq)

    smmu.on_interrupt = interrupt
    with pytest.raises(KeyError, match="eventq"):
        fault(smmu)
    assert smmu.read("EVENTQ_PROD") == 1


@pytest.mark.parametrize("name", ["EVENTQ", "PRIQ"])
@pytest.mark.parametrize("when", ["before", "after", "never"])
def test_an_error_shows_by_the_time_that_its_queue_is_disabled(name, when):
    smmu, wires = system(
        features=Features.full(), cr0=7, **{f"{name.lower()}_base": 0xA000_0000 | 4}
    )
    seen = []

    def put():
        if name == "EVENTQ":
            return fault(smmu).event is not None
        return smmu.page_request(1, 0x1000, read=True).action == "queued"

    def off():
        smmu.write("CR0", smmu.cr0 & ~CR0[name + "EN" if name == "EVENTQ" else "SMMUEN"])

    def write(address, data):
        if address != 0xA000_0000:
            if when == "before":
                off()
            return None
        assert not put()
        seen.append(smmu.gerror)
        if when == "after":
            off()
        seen.append((smmu.gerror, wires.take()))
        return True

    smmu.memory.add_callback(0xA000_0000, 0x1000, lambda a, n: bytes(n), write)
    put()
    error = ABT_ERR[name]
    shows = {
        "before": [error, (error, ["gerror"])],
        "after": [0, (error, ["gerror"])],
        "never": [0, (0, [])],
    }
    assert seen == shows[when]
    assert smmu.gerror == error and smmu.read(f"{name}_PROD") == 1
    assert ("gerror" in wires) == (when == "never")


def test_an_abort_of_a_queue_that_was_set_up_anew_shows_at_once():
    smmu, wires = system(eventq_base=0xA000_0000 | 4)

    def write(address, record):
        smmu.write("CR0", smmu.cr0 & ~CR0["EVENTQEN"])
        smmu.write("EVENTQ_BASE", QUEUE | 2)
        smmu.write("CR0", smmu.cr0 | CR0["EVENTQEN"])
        return None

    smmu.memory.add_callback(0xA000_0000, 0x200, lambda a, n: bytes(n), write)
    assert fault(smmu).event is None
    assert smmu.gerror == 4 and wires == ["gerror"] and smmu.read("EVENTQ_PROD") == 0


# --- page requests ---


@pytest.mark.rule("S8.1-5")
def test_an_automatic_answer_carries_the_pasid_if_the_stream_asks_for_it():
    image = small.build()
    image[small.STES + 64 * small.STAGE1 + 10] |= 1 << 2  # STE.PPAR is bit 82
    memory = Memory()
    memory.add(image, small.BASE)
    memory.add_private(QUEUE, 0x400_0000)
    registers = small.registers() | {"cr0": 7, "priq_base": PAGES}

    def answers(pps, sid, **more):
        features = Features.full().replace(pps=pps)
        smmu = Smmu(memory, features, **registers)
        assert smmu.page_request(sid, 0x1000, read=True, **more).action == "queued"
        return smmu.page_request(sid, 0x1000, read=True, **more)

    assert answers(0, small.STAGE1, ssid=3) == ("success", 3)
    assert answers(0, small.BYPASSED, ssid=3) == ("success", None)
    assert answers(1, small.BYPASSED, ssid=3) == ("success", 3)
    assert answers(0, small.INVALID, ssid=3) == ("failure", None)
    assert answers(0, small.BEYOND_MEMORY, ssid=3) == ("failure", None)
    assert answers(0, small.BEYOND_TABLE, ssid=3) == ("failure", None)
    assert answers(0, small.INVALID) == ("success", None)
    assert answers(0, small.STAGE1, ssid=3, last=False) == ("dropped", None)


@pytest.mark.rule("S3.11-6", "S8.2-5")
@pytest.mark.parametrize("cr0", [0, 2, 5, 7])
def test_page_requests_fail_while_the_queue_is_disabled(cr0):
    smmu, _ = system(features=Features.full(), cr0=cr0, priq_base=PAGES | 2)
    expected = "queued" if cr0 & 3 == 3 else "failure"
    assert smmu.page_request(1, 0x1000, read=True).action == expected
    marker = smmu.page_request(1, 0, ssid=5)
    assert marker.action == ("queued" if cr0 & 3 == 3 else "dropped")


def test_page_requests_are_checked():
    smmu, _ = system(features=Features.full(), cr0=7, priq_base=PAGES | 2)
    for bad, arguments in (
        ("sid", (1 << 32, 0)),
        ("address", (0, 0x1001)),
        ("address", (0, 1 << 64)),
    ):
        with pytest.raises(ValueError, match=f"^{bad}(:| must be) "):
            smmu.page_request(*arguments)
    with pytest.raises(ValueError, match=r"^prg_index must be 0 to 0x1ff, not 0x200"):
        smmu.page_request(0, 0, prg_index=512)
    with pytest.raises(ValueError, match=r"^ssid must be 0 to 0xfffff, not 0x100000"):
        smmu.page_request(0, 0, ssid=1 << 20)
    assert smmu.read("PRIQ_PROD") == 0


@pytest.mark.rule("S3.12-1", "S3.12.4.1-1", "S7.3.2-1", "S7.3.19-1", "S16.7.1-2")
def test_a_host_puts_events_of_its_own_into_the_queue():
    memory = Memory()
    memory.add_private(0, 1 << 30)
    smmu = Smmu(memory, eventq_base=0x1_0000 | 1)
    assert smmu.record("F_UUT", StreamID=7, Reason=0x21, RnW=1, InputAddr=0x1234_5000)
    event = Event(memory.read(0x1_0000, 32))
    assert (event.name, event.sid, event.iova, event.write) == ("F_UUT", 7, 0x1234_5000, False)
    assert smmu.read("EVENTQ_PROD") == 1
    assert smmu.record("E_PAGE_REQUEST", StreamID=7)
    assert not smmu.record("F_UUT", StreamID=8)  # full
    assert smmu.read("EVENTQ_PROD") == 1 << 31 | 2
    assert not Smmu(memory).record("F_UUT")
    for name, fields, text in (
        ("F_NONE", {}, "F_NONE"),
        ("F_UUT", {"StreamID": 1 << 32}, "StreamID"),
        ("F_UUT", {"Colour": 1}, "Colour"),
    ):
        with pytest.raises(ValueError, match=text):
            smmu.record(name, **fields)
    assert smmu.read("EVENTQ_PROD") == 1 << 31 | 2
