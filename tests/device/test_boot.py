"""A driver that knows registers, memory and the architecture, and nothing else of this library.

What it does, and in which order, is what operating systems do to an SMMUv3: identify, disable,
program tables and queues, invalidate everything, enable one thing after the other.
"""

import pytest
import small

from smmufast import Features, Memory, Smmu, layout

STRTAB = small.BASE
CMDQ = 0x9000_0000
EVENTQ = 0x9010_0000
PRIQ = 0x9020_0000
SYNC_MSI = 0x9030_0000

IDR0, IDR1, IDR5, AIDR = 0x00, 0x04, 0x14, 0x1C
CR0, CR0ACK, CR1, CR2, GBPA = 0x20, 0x24, 0x28, 0x2C, 0x44
IRQ_CTRL, IRQ_CTRLACK, GERROR, GERRORN = 0x50, 0x54, 0x60, 0x64
STRTAB_BASE, STRTAB_BASE_CFG = 0x80, 0x88
CMDQ_BASE, CMDQ_PROD, CMDQ_CONS = 0x90, 0x98, 0x9C
EVENTQ_BASE, EVENTQ_PROD, EVENTQ_CONS = 0xA0, 0x100A8, 0x100AC
PRIQ_BASE, PRIQ_PROD, PRIQ_CONS = 0xC0, 0x100C8, 0x100CC
SMMUEN, PRIQEN, EVENTQEN, CMDQEN, ATSCHK = 1, 2, 4, 8, 16


class Driver:
    """State of the driver: where its queues are, and what interrupted."""

    def __init__(self, smmu):
        self.smmu = smmu
        self.interrupts = []
        self.gerrors = []
        smmu.on_interrupt = self.interrupts.append
        self.cmdq_bits = self.eventq_bits = self.priq_bits = 0
        self.prod = 0

    def write(self, offset, value, size=4):
        self.smmu.write(offset, value, size)

    def read(self, offset, size=4):
        return self.smmu.read(offset, size)

    def update(self, value, register, acknowledge):
        """Write an enable register and poll its acknowledgement."""
        self.write(register, value)
        for _ in range(10):
            if self.read(acknowledge) == value:
                return
        raise TimeoutError("no acknowledgement")

    def update_gbpa(self, clear, put):
        value = self.read(GBPA)
        assert not value >> 31
        self.write(GBPA, value & ~clear | put | 1 << 31)
        assert not self.read(GBPA) >> 31

    def issue(self, first, second=0):
        """Put one command behind the others, and tell the SMMU."""
        size = 1 << self.cmdq_bits
        cons = self.read(CMDQ_CONS) & (2 * size - 1)
        assert (self.prod - cons) % (2 * size) < size, "the command queue is full"
        data = first.to_bytes(8, "little") + second.to_bytes(8, "little")
        self.smmu.memory.write(CMDQ + 16 * (self.prod % size), data)
        self.prod = (self.prod + 1) % (2 * size)
        self.write(CMDQ_PROD, self.prod)

    def poll(self):
        for _ in range(10):
            if self.read(CMDQ_CONS) & (2 << self.cmdq_bits) - 1 == self.prod:
                return
        raise TimeoutError("CMD_SYNC does not complete")

    def sync(self, how):
        """CMD_SYNC, and wait for it by polling, by an event or by a message to memory."""
        if how == "poll":
            self.issue(0x46)
        elif how == "sev":
            self.issue(0x46 | 2 << 12)
            assert self.interrupts.pop() == "sev"
        elif how == "irq":
            self.issue(0x46 | 1 << 12)
            assert self.interrupts.pop() == "cmdq_sync"
        else:
            self.smmu.memory.write(SYNC_MSI, b"\xff\xff\xff\xff")
            self.issue(0x46 | 1 << 12 | 3 << 22 | 0xF << 24, SYNC_MSI)
            assert self.smmu.memory.read(SYNC_MSI, 4) == bytes(4)
            assert self.interrupts.pop() == "cmdq_sync"  # the wire, which nobody listens to
        self.poll()

    def probe(self):
        idr0, idr1 = self.read(IDR0), self.read(IDR1)
        assert idr0 >> 1 & 1 and idr0 >> 2 & 2, "stage 1 with AArch64 tables"
        assert not idr1 >> 29, "no preset tables or queues"
        self.has_pri, self.has_ats = idr0 >> 16 & 1, idr0 >> 10 & 1
        self.has_sev, self.has_msi = idr0 >> 14 & 1, idr0 >> 13 & 1
        self.has_hyp = idr0 >> 9 & 1
        self.cmdq_bits = min(8, idr1 >> 21 & 31)
        self.eventq_bits = min(7, idr1 >> 16 & 31)
        self.priq_bits = min(9, idr1 >> 11 & 31)

    def boot(self, how):
        """Bring the device up."""
        smmu = self.smmu
        self.probe()
        if self.read(CR0) & SMMUEN:
            self.update_gbpa(0, 1 << 20)  # abort, while it is disabled
        self.update(0, CR0, CR0ACK)
        self.write(CR1, 3 << 10 | 1 << 8 | 1 << 6 | 3 << 4 | 1 << 2 | 1)
        self.write(CR2, 1 << 2 | 1 << 1 | (1 if self.has_hyp else 0))
        self.write(STRTAB_BASE, STRTAB | 1 << 62, 8)
        self.write(STRTAB_BASE_CFG, 12)
        self.write(CMDQ_BASE, CMDQ | 1 << 62 | self.cmdq_bits, 8)
        self.write(CMDQ_PROD, 0)
        self.write(CMDQ_CONS, 0)
        self.update(CMDQEN, CR0, CR0ACK)
        self.issue(0x04, 31)  # CFGI_ALL
        self.sync(how)
        if self.has_hyp:
            self.issue(0x20)  # TLBI_EL2_ALL
        self.issue(0x30)  # TLBI_NSNH_ALL
        self.sync(how)
        self.write(EVENTQ_BASE, EVENTQ | 1 << 62 | self.eventq_bits, 8)
        self.write(EVENTQ_PROD, 0)
        self.write(EVENTQ_CONS, 0)
        enables = CMDQEN | EVENTQEN
        self.update(enables, CR0, CR0ACK)
        if self.has_pri:
            self.write(PRIQ_BASE, PRIQ | 1 << 62 | self.priq_bits, 8)
            self.write(PRIQ_PROD, 0)
            self.write(PRIQ_CONS, 0)
            enables |= PRIQEN
            self.update(enables, CR0, CR0ACK)
        if self.has_ats:
            enables |= ATSCHK
            self.update(enables, CR0, CR0ACK)
        self.update(0, IRQ_CTRL, IRQ_CTRLACK)
        for config in (0x68, 0xB0, 0xD0):
            self.write(config, 0, 8)
        self.update(7 if self.has_pri else 5, IRQ_CTRL, IRQ_CTRLACK)
        enables |= SMMUEN
        self.update(enables, CR0, CR0ACK)
        assert smmu.read(GERROR) == smmu.read(GERRORN) == 0

    def events(self):
        """Take every record from the event queue, as an interrupt thread does."""
        found = []
        size = 1 << self.eventq_bits
        cons = self.read(EVENTQ_CONS)
        while (prod := self.read(EVENTQ_PROD)) & (2 * size - 1) != cons & (2 * size - 1):
            while cons & (2 * size - 1) != prod & (2 * size - 1):
                found.append(self.smmu.memory.read(EVENTQ + 32 * (cons % size), 32))
                cons = (cons + 1) % (2 * size)
            cons |= prod & 1 << 31  # acknowledges an overflow
            self.write(EVENTQ_CONS, cons)
        return found

    def gerror(self):
        """The interrupt of global errors, and the repair of an illegal command."""
        active = self.read(GERROR) ^ self.read(GERRORN)
        self.gerrors.append(active)
        if active & 1:
            cons = self.read(CMDQ_CONS)
            at = CMDQ + 16 * (cons % (1 << self.cmdq_bits))
            if cons >> 24 & 0x7F == 1:
                self.smmu.memory.write(at, bytes([0x46]) + bytes(15))
        self.write(GERRORN, self.read(GERROR))


PRESETS = {
    "default": Features, "minimal": Features.minimal, "v3_0": Features.v3_0,
    "v3_2": Features.v3_2, "qemu": Features.qemu, "full": Features.full,
}  # fmt: skip


def machine(features, **registers):
    memory = Memory()
    memory.add(small.build(), small.BASE)
    memory.add_private(CMDQ, 0x100_0000)
    return Smmu(memory, features, **{"cr0": 0} | registers)


@pytest.mark.parametrize("how", ["poll", "irq", "sev", "msi"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_driver_brings_the_device_up_and_serves_faults(preset, how):
    features = PRESETS[preset]()
    if how in ("sev", "msi") and not getattr(features, how):
        how = "irq"
    if features.sidsize < 12:
        features = features.replace(sidsize=12, st_level=1)
    smmu = machine(features)
    driver = Driver(smmu)
    assert smmu.translate(small.STAGE1, small.RW).action == "disabled"
    driver.boot(how)
    assert driver.interrupts == []
    assert list(smmu.warnings) == []
    served = set(range(small.TWO_LEVEL_CD + 1))
    if features.ssidsize < 8:
        served = {small.STAGE1, small.BYPASSED, small.INVALID, small.BAD_CD}
    for request, pa in small.PHYSICAL.items():
        if request.sid in served:
            assert smmu.translate(request.sid, request.iova, **request.access).pa == pa
    expected, found = [], []
    for number, request in small.EVENTS.items():
        if number and request.sid in served:
            result = smmu.translate(request.sid, request.iova, **request.access)
            assert result.event.number == number
            expected.append(result.event.record)
            if len(expected) % (1 << driver.eventq_bits) == 0:
                found += driver.events()
    found += driver.events()
    assert found == expected and len(expected) > 6
    assert driver.interrupts == ["eventq"] * (len(expected) if driver.eventq_bits == 0 else 1)
    assert driver.events() == []


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("messages", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_what_every_boot_of_linux_writes_leaves_no_warning(preset, messages, enabled):
    features = PRESETS[preset]()
    smmu = machine(features, cr0=5 if enabled else 0)
    smmu.warnings.clear()
    driver = Driver(smmu)
    driver.probe()
    if smmu.read(CR0) & SMMUEN:
        driver.update_gbpa(0, 1 << 20)
    driver.update(0, CR0, CR0ACK)
    driver.write(CR1, 0xD75)
    # CR2: PTM and RECINVSID always, E2H where there is EL2
    driver.write(CR2, 1 << 2 | 1 << 1 | (1 if driver.has_hyp else 0))
    two_level = features.st_level and features.sidsize > 8
    bits = min(25, features.sidsize) if two_level else features.sidsize
    driver.write(STRTAB_BASE, STRTAB | 1 << 62, 8)
    driver.write(STRTAB_BASE_CFG, bits | (1 << 16 | 8 << 6 if two_level else 0))
    rings = [(CMDQ_BASE, CMDQ, driver.cmdq_bits, CMDQ_PROD, CMDQ_CONS, CMDQEN),
             (EVENTQ_BASE, EVENTQ, driver.eventq_bits, EVENTQ_PROD, EVENTQ_CONS, EVENTQEN)]
    if driver.has_pri:
        rings.append((PRIQ_BASE, PRIQ, driver.priq_bits, PRIQ_PROD, PRIQ_CONS, PRIQEN))
    enables = 0
    for base, address, lg2, prod, cons, enable in rings:
        driver.write(base, address | 1 << 62 | lg2, 8)
        driver.write(prod, 0)
        driver.write(cons, 0)
        enables |= enable
        driver.update(enables, CR0, CR0ACK)
        if enable == CMDQEN:
            driver.issue(0x04, 31)
            driver.sync("poll")
            if driver.has_hyp:
                driver.issue(0x20)
            driver.issue(0x30)
            driver.sync("poll")
    if driver.has_ats:
        enables |= ATSCHK
        driver.update(enables, CR0, CR0ACK)
    driver.update(0, IRQ_CTRL, IRQ_CTRLACK)
    # zeros, also where there are no messages
    configs = [0x68, 0xB0, *([0xD0] if driver.has_pri else [])]
    for config in configs:
        driver.write(config, 0, 8)
    if messages and driver.has_msi:
        for config in configs:
            driver.write(config, SYNC_MSI + 64, 8)
            driver.write(config + 8, 0x20)
            driver.write(config + 12, 1)
    driver.update(7 if driver.has_pri else 5, IRQ_CTRL, IRQ_CTRLACK)
    driver.update(enables | SMMUEN, CR0, CR0ACK)
    assert list(smmu.warnings) == []
    driver.write(CR2, 1 << 2 | 1 << 1 | 1 << 5)
    assert "bits 0x20 are ignored" in smmu.warnings[0].text  # others still are told


@pytest.mark.parametrize("features", [Features(msi=0), Features(pri=0)])
def test_zero_is_the_one_value_that_an_absent_register_takes_silently(features):
    smmu = machine(features)
    for name in ("PRIQ_IRQ_CFG0", "PRIQ_IRQ_CFG1", "PRIQ_IRQ_CFG2"):
        smmu.write(name, 0)
        assert list(smmu.warnings) == []
        smmu.write(name, 4)
        assert smmu.warnings.pop().text == "write of 0x4 ignored: not implemented (S6.2-7)"
        assert smmu.read(name) == 0


def test_a_device_that_firmware_left_enabled_is_quiet_while_it_is_taken_over():
    smmu = machine(Features(), cr0=5, eventq_base=EVENTQ | 7, **small.registers())
    assert smmu.translate(small.STAGE1, small.RW).pa == 0x4000_1000
    driver = Driver(smmu)
    update = driver.update
    seen = []

    def watch(value, register, acknowledge):
        update(value, register, acknowledge)
        seen.append(smmu.translate(small.STAGE1, small.RW).action)

    driver.update = watch
    driver.boot("poll")
    assert seen[:-1] == ["abort"] * (len(seen) - 1)
    assert seen[-1] == "ok"


def test_the_driver_survives_an_overflow():
    smmu = machine(Features())
    driver = Driver(smmu)
    driver.boot("poll")
    iovas = [(1 << 30) + 4096 * i for i in range(300)]
    for iova in iovas[:200]:
        smmu.translate(small.STAGE1, iova)
    assert smmu.read(EVENTQ_PROD) == 1 << 31 | 128
    found = driver.events()
    assert [int.from_bytes(r[16:24], "little") for r in found] == iovas[:128]
    assert smmu.read(EVENTQ_CONS) == 1 << 31 | 128
    for iova in iovas[200:]:
        smmu.translate(small.STAGE1, iova)
    found = driver.events()
    assert [int.from_bytes(r[16:24], "little") for r in found] == iovas[200:]
    assert driver.interrupts == ["eventq", "eventq"]
    # and around once more: index and wrap bit
    for turn in range(5):
        for iova in iovas[:100]:
            smmu.translate(small.STAGE1, iova)
        assert len(driver.events()) == 100, turn


def test_the_driver_repairs_an_illegal_command():
    smmu = machine(Features(ats=0, pri=0))
    driver = Driver(smmu)
    driver.boot("irq")
    driver.issue(0x40)  # ATC_INV without ATS
    driver.issue(0x03 | small.STAGE1 << 32)
    assert driver.interrupts == ["gerror"]
    assert smmu.read(CMDQ_CONS) == 1 << 24 | (driver.prod - 2)
    with pytest.raises(TimeoutError):
        driver.poll()
    driver.gerror()
    driver.poll()
    assert driver.gerrors == [1]
    assert smmu.read(GERROR) == smmu.read(GERRORN) == 1
    driver.sync("poll")


def test_queues_go_around_many_times():
    smmu = machine(Features(cmdqs=2))
    driver = Driver(smmu)
    driver.boot("poll")
    for _ in range(50):
        driver.issue(0x30)
    driver.sync("poll")
    assert driver.prod == smmu.read(CMDQ_PROD) == smmu.read(CMDQ_CONS) & 7


def test_page_requests_are_answered_by_commands():
    class Device:
        def __init__(self):
            self.told = []

        def pri_response(self, *arguments):
            self.told.append(arguments)

        def atc_invalidate(self, *arguments):
            self.told.append(arguments)

    smmu = machine(Features.full())
    driver = Driver(smmu)
    driver.boot("msi")
    device = smmu.devices[small.STAGE1] = Device()
    asked = [(small.STAGE1, page << 12, page) for page in range(3)]
    for sid, address, group in asked:
        assert smmu.page_request(sid, address, ssid=7, write=True, prg_index=group).action == (
            "queued"
        )
    assert driver.interrupts == ["priq"]
    while (cons := smmu.read(PRIQ_CONS)) != smmu.read(PRIQ_PROD):
        first, second = (
            int.from_bytes(smmu.memory.read(PRIQ + 16 * (cons % 512) + half, 8), "little")
            for half in (0, 8)
        )
        sid, ssid, flags = first & 0xFFFF_FFFF, first >> 32 & 0xFFFFF, first >> 58
        assert (sid, ssid, flags) == (small.STAGE1, 7, 0b111000)
        assert second >> 12 == second & 0x1FF
        driver.issue(0x41 | 1 << 11 | ssid << 12 | sid << 32, second & 0x1FF | 2 << 12)
        smmu.write(PRIQ_CONS, (cons + 1) % 1024)
    driver.sync("msi")
    assert device.told == [(7, group, 2) for _, _, group in asked]
    driver.issue(0x40 | 1 << 11 | 7 << 12 | small.STAGE1 << 32, 0x1234_5000)
    driver.issue(0x40 | small.STAGE1 << 32, 52)
    assert device.told[3:] == [(7, 0x1234_5000, 4096, False), (None, 0, 1 << 64, False)]


def test_words_of_the_registers_are_those_of_the_table_of_records():
    names = {name: value for name, value in globals().items() if name in layout.REGISTERS}
    assert len(names) > 20
    for name, offset in names.items():
        assert layout.REGISTERS[name].offset == offset
