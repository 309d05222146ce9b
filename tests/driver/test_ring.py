"""The compiled queue, entry writer and invalidations beside their twin; refused commands."""

import copy
import pickle
import random
import threading

import pytest
import ringtwin

from smmufast import Features, Memory, Smmu, Why, layout
from smmufast._driver.ring import record_waits
from smmufast.errors import CommandError, InputOutput, InvalidArgument
from smmufast.iommu.smmu.invalidations import Invalidations
from smmufast.iommu.smmu.queue import CommandQueue
from smmufast.iommu.smmu.writer import EntryWriter, cd_used, ste_used

BASE = 0x8000_0000
ENTRY = 0x9000_0000
MASK = (1 << 64) - 1
ILLEGAL = 0xEE
ASID = layout.pack("TLBI_NH_ASID", ASID=1)
CD_ALL = layout.pack("CFGI_CD_ALL", StreamID=1)
NO_RANGE = layout.pack("TLBI_NH_VA", TG=1, Address=0x1000)  # without NUM, SCALE and TTL


def queue_of(kind=CommandQueue, size_lg2=8, features=None, memory=None):
    memory = memory or Memory()
    if not memory.regions:
        memory.add_private(0, 1 << 40)
    smmu = Smmu(memory, features or Features.full(), cr0=0)
    queue = kind(smmu, BASE, size_lg2)
    queue.start()
    smmu.write("CR0", layout.pack("CR0", SMMUEN=1, CMDQEN=1))
    return queue


def outcome(call, *arguments):
    """What a call gives, or what it raises."""
    try:
        return call(*arguments)
    except InputOutput as error:
        return type(error), str(error), getattr(error, "refused", None)


def seen(queue, size_lg2):
    smmu = queue.smmu
    return (
        queue.prod, queue.issued, queue.syncs, queue.log,
        queue.memory.read(BASE, 16 << size_lg2), smmu.read("CMDQ_CONS"), smmu.gerror, smmu.gerrorn,
    )  # fmt: skip


# --- the queues of records ---


class Registers:
    """An SMMU that is known by its registers alone."""

    def __init__(self, smmu):
        self.read = smmu.read


@pytest.mark.parametrize("name", ["EVENTQ", "PRIQ"])
def test_a_record_waits_where_prod_and_cons_differ(name):
    rng = random.Random(name)
    smmu = Smmu(Memory(), Features.full(), cr0=0)
    smmu.write(f"{name}_BASE", 3, 8)
    found = set()
    for _ in range(200):
        for index in ("PROD", "CONS"):
            smmu.write(f"{name}_{index}", rng.choice([0, 1]) << 31 | rng.choice([1, 2, 9]))
        wanted = smmu.read(f"{name}_PROD") != smmu.read(f"{name}_CONS")
        assert record_waits(smmu, name) == record_waits(Registers(smmu), name) == wanted
        found.add(wanted)
    assert found == {True, False}


# --- the queue ---


def random_words(rng, count):
    """Commands, some of them illegal."""
    choice = [ASID, CD_ALL, layout.pack("CFGI_ALL"), ASID, CD_ALL, ILLEGAL, NO_RANGE]
    odds = rng.choice([5, 5, 7])
    return [rng.choice(choice[:odds]) for _ in range(count)]


@pytest.mark.parametrize("size_lg2", [0, 1, 2, 3, 8])
def test_random_batches_go_as_those_of_the_twin(size_lg2):
    rng = random.Random(size_lg2)
    one, two = queue_of(size_lg2=size_lg2), queue_of(ringtwin.Queue, size_lg2)
    for round_ in range(150):
        one.log, two.log = rng.choice([(None, None), ([], [])])
        words = random_words(rng, rng.randrange(1 + (12 if round_ % 10 else 600)))
        if rng.random() < 0.3:
            for word in words:
                one.put(word & MASK, word >> 64)
                two.put(word)
            words = random_words(rng, rng.randrange(3))
        assert outcome(one.run, words) == outcome(two.run, words)
        assert seen(one, size_lg2) == seen(two, size_lg2)


@pytest.mark.parametrize("nth", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 1 << 40])
def test_aborted_fetches_go_as_those_of_the_twin(nth, count):
    one, two = queue_of(size_lg2=2), queue_of(ringtwin.Queue, 2)
    for queue in (one, two):
        queue.memory.inject_error(address=BASE, size=64, kind="CMD", nth=nth, count=count)
    for words in ([ASID] * 3, [ASID] * 7, [], [ILLEGAL, ASID]):
        assert outcome(one.run, words) == outcome(two.run, words)
        assert seen(one, 2) == seen(two, 2)


def test_a_fetch_that_is_aborted_once_loses_no_command():
    queue = queue_of(size_lg2=4)
    device = Device()
    queue.smmu.devices[1] = device
    queue.memory.inject_error(address=BASE, size=16, kind="CMD", count=1)
    with pytest.raises(CommandError, match="abort of a command fetch") as caught:
        queue.run([layout.pack("ATC_INV", StreamID=1, Size=52)])
    assert (caught.value.index, caught.value.refused[0].error) == (0, 2)
    assert device.told == 1


class Device:
    """Counts invalidations of its ATC; they fail while `broken`."""

    def __init__(self, broken=False):
        self.told, self.broken = 0, broken

    def atc_invalidate(self, ssid, address, size, global_):
        self.told += 1
        return not self.broken


def test_a_queue_that_stays_aborted_says_so_each_time_and_loses_nothing():
    queue = queue_of(size_lg2=2)
    number = queue.memory.inject_error(address=BASE, size=64, kind="CMD")
    for _ in range(5):
        with pytest.raises(CommandError, match="abort"):
            queue.run([ASID])
    queue.memory.remove_error(number)
    queue.smmu.write("GERRORN", queue.smmu.gerror)
    queue.sync()
    assert queue.smmu.read("CMDQ_CONS") & 7 == queue.prod


# --- which command was refused, and why ---


def test_the_error_has_the_index_and_the_rule_of_the_refused_command():
    queue = queue_of()
    queue.run([ASID])
    with pytest.raises(CommandError) as caught:
        queue.run([ASID, CD_ALL, NO_RANGE, ASID])
    error = caught.value
    (refused,) = error.refused
    assert (error.index, refused.index, refused.command, refused.error) == (2, 2, NO_RANGE, 1)
    assert isinstance(refused.why, Why)
    assert refused.why is queue.smmu.check_command(NO_RANGE.to_bytes(16, "little"))
    assert error.reason == f"illegal command: {refused.why.sentence()}" == refused.reason
    assert (error.argument, error.value, error.errno) == ("command", NO_RANGE, 5)
    assert str(error) == f"command 2, 0x12 ({NO_RANGE:#034x}) was refused: {error.reason}"


def test_every_refused_command_of_a_batch_is_named_and_the_others_are_done():
    queue = queue_of(size_lg2=2)
    device = Device()
    queue.smmu.devices[1] = device
    good = layout.pack("ATC_INV", StreamID=1, Size=52)
    words = [ILLEGAL, good, NO_RANGE, ILLEGAL, *[good] * 7, NO_RANGE, good]
    with pytest.raises(CommandError) as caught:
        queue.run(words)
    assert [one.index for one in caught.value.refused] == [0, 2, 3, 11]
    assert [one.command for one in caught.value.refused] == [ILLEGAL, NO_RANGE, ILLEGAL, NO_RANGE]
    assert device.told == 9
    assert not (queue.smmu.gerror ^ queue.smmu.gerrorn) & 1
    queue.run([good])
    assert device.told == 10


def test_what_was_put_one_by_one_is_counted_from_the_last_sync():
    queue = queue_of()
    queue.run([ASID, ASID])
    queue.put(ASID & MASK, ASID >> 64)
    queue.issue("CFGI_ALL")
    queue.put(ILLEGAL, 0)
    with pytest.raises(CommandError) as caught:
        queue.sync()
    assert caught.value.index == 2
    queue.put(ILLEGAL, 0)
    with pytest.raises(CommandError) as caught:
        queue.submit([ILLEGAL])
    assert [one.index for one in caught.value.refused] == [0, 1]
    assert queue.syncs == 2


def test_a_full_queue_leaves_its_errors_to_the_sync():
    queue = queue_of(size_lg2=1)
    queue.put(ILLEGAL, 0)
    for _ in range(7):
        queue.issue("TLBI_NH_ASID", ASID=1)
    with pytest.raises(CommandError) as caught:
        queue.sync()
    assert caught.value.index == 0
    queue.sync()


def test_an_atc_that_does_not_answer_is_told_at_the_sync_behind_it():
    queue = queue_of()
    queue.smmu.devices[1] = Device(broken=True)
    with pytest.raises(CommandError, match="ATC timeout") as caught:
        queue.run([ASID, layout.pack("ATC_INV", StreamID=1, Size=52), ASID])
    assert (caught.value.index, caught.value.refused[0].error) == (3, 3)
    assert caught.value.refused[0].why is None
    queue.sync()


def test_a_command_of_a_batch_that_a_callback_broke_off_has_no_index():
    queue = queue_of()

    def fail(name):
        raise ValueError(name)

    queue.smmu.write("IRQ_CTRL", 1)
    queue.smmu.on_interrupt = fail
    with pytest.raises(ValueError, match="gerror"):
        queue.run([ILLEGAL, ASID])
    queue.smmu.on_interrupt = None
    with pytest.raises(CommandError) as caught:
        queue.run([NO_RANGE])
    assert [(one.index, one.command) for one in caught.value.refused] == [
        (None, ILLEGAL), (0, NO_RANGE),
    ]  # fmt: skip
    assert str(caught.value).startswith(f"command {ILLEGAL:#x} (")


def test_the_error_can_be_pickled():
    queue = queue_of()
    with pytest.raises(CommandError) as caught:
        queue.run([NO_RANGE])
    for error in (pickle.loads(pickle.dumps(caught.value)), copy.deepcopy(caught.value)):
        assert type(error) is CommandError and str(error) == str(caught.value)
        assert error.refused == caught.value.refused and error.value == NO_RANGE
    assert CommandError("command", 5).index is None


# --- the writer ---


def stepping(writer, queue, memory):
    """Every store and every CMD_SYNC that a writer makes, in a list."""
    steps = []
    writer.observer = lambda *told: steps.append((told, memory.read(ENTRY, 64)))
    queue.log = []
    return steps


def random_entry(rng, record):
    """Eight dwords: random ones, or a plausible structure with some bits flipped."""
    if rng.random() < 0.2:
        return tuple(rng.getrandbits(64) for _ in range(8))
    word = layout.pack("CD", V=1, AA64=1, ASID=rng.choice([1, 2]), TTB0=0x1000, A=1, R=1)
    if record == "STE":
        word = layout.pack(
            "STE", V=1, Config=rng.choice([0, 4, 5, 6, 7]), S1DSS=rng.randrange(3),
            EATS=rng.choice([0, 1, 1, 2]), S2S=rng.randrange(5) == 0, SHCFG=1,
            S1ContextPtr=0x40 * rng.randrange(2), S2TTB=0x1000, S2VMID=1,
        )  # fmt: skip
    word = 0 if rng.random() < 0.1 else word
    for _ in range(rng.randrange(3)):
        word ^= 1 << rng.randrange(512)
    return tuple(word >> 64 * i & MASK for i in range(8))


@pytest.mark.parametrize("record", ["STE", "CD"])
@pytest.mark.parametrize("safe_bits", [True, False])
def test_random_entries_are_written_as_the_twin_writes_them(record, safe_bits):
    rng = random.Random(int(safe_bits))
    first, second = queue_of(), queue_of(ringtwin.Queue)
    one = EntryWriter(first, first.memory, safe_bits=safe_bits)
    two = ringtwin.Writer(second, safe_bits=safe_bits)
    for _ in range(500):
        words = random_entry(rng, record)
        steps = [stepping(writer, writer.queue, writer.memory) for writer in (one, two)]
        if record == "STE":
            sid = rng.getrandbits(32)
            updates = [writer.write_ste(ENTRY, words, sid) for writer in (one, two)]
        else:
            sids = [rng.getrandbits(32) for _ in range(rng.randrange(20))]
            ssid = rng.getrandbits(20)
            updates = [writer.write_cd(ENTRY, words, sids, ssid) for writer in (one, two)]
        assert updates[0] == updates[1]
        assert steps[0] == steps[1]
        assert seen(first, 8) == seen(second, 8)
        assert one.read(ENTRY) == words


def test_the_used_bits_are_those_of_the_twin():
    rng = random.Random(3)
    for _ in range(2000):
        ste = sum(word << 64 * i for i, word in enumerate(random_entry(rng, "STE")))
        cd = sum(word << 64 * i for i, word in enumerate(random_entry(rng, "CD")))
        assert ste_used(ste) == ringtwin.ste_used(ste)
        assert cd_used(cd) == ringtwin.cd_used(cd)
        assert cd_used(cd | 1 << 14) == ringtwin.cd_used(cd | 1 << 14)


def test_what_does_not_fit_changes_nothing():
    queue = queue_of()
    writer = EntryWriter(queue, queue.memory)
    before = seen(queue, 8), queue.memory.read(ENTRY, 64)
    for words in ([0] * 7, [0] * 9, [1 << 64] + [0] * 7, [-1] + [0] * 7):
        with pytest.raises(InvalidArgument, match="words"):
            writer.write_ste(ENTRY, words, 1)
        with pytest.raises(InvalidArgument, match="words"):
            writer.write_cd(ENTRY, words, [1], 1)
    for call, *arguments in (
        (writer.write_ste, 1 << 32), (writer.write_ste, -1), (writer.write_cd, [1 << 32], 1),
        (writer.write_cd, [1], 1 << 20), (writer.write_cd, [-1], 1), (writer.write_cd, [1], -1),
        (queue.run, [-1]), (queue.run, [1 << 128]), (queue.put, -1, 0), (queue.put, 0, 1 << 64),
    ):  # fmt: skip
        if call in (queue.run, queue.put):
            with pytest.raises((ValueError, OverflowError)):
                call(*arguments)
        else:
            with pytest.raises(ValueError, match=r" must be .*, not "):
                call(ENTRY, [1] + [0] * 7, *arguments)
    for call, value in ((writer.write_ste, None), (writer.write_cd, 5), (queue.run, 5)):
        with pytest.raises(TypeError):
            call(ENTRY, value, 1) if call != queue.run else call(value)
    assert (seen(queue, 8), queue.memory.read(ENTRY, 64)) == before


def test_a_queue_and_a_writer_are_of_something():
    for kind, *arguments in (
        (CommandQueue,), (EntryWriter,), (EntryWriter, None, Memory()), (EntryWriter, 5, Memory()),
        (EntryWriter, queue_of(), None),
    ):  # fmt: skip
        with pytest.raises(TypeError):
            kind(*arguments)
        with pytest.raises(TypeError):
            kind.__new__(kind, *arguments)
    for size_lg2 in (-1, 20, 1 << 70):
        with pytest.raises(InvalidArgument, match="size_lg2"):
            CommandQueue(Smmu(Memory()), BASE, size_lg2)


def test_memory_that_is_not_there_is_named():
    memory = Memory()
    memory.add(bytearray(4096), BASE)
    memory.add(bytes(4096), ENTRY, readonly=True)
    queue = queue_of(memory=memory)
    writer = EntryWriter(queue, memory)
    with pytest.raises(PermissionError, match="read-only"):
        writer.write_ste(ENTRY, [1] + [0] * 7, 1)
    with pytest.raises(Exception, match="no region"):
        writer.read(ENTRY + 4096)
    assert queue.issued == 0 and writer.read(ENTRY) == (0,) * 8


def test_memory_of_callbacks_sees_each_store():
    memory, stores = Memory(), []
    data = bytearray(0x20_0000)

    def write(address, piece):
        stores.append((address, bytes(piece)))
        data[address : address + len(piece)] = piece
        return True

    memory.add_callback(0, len(data), lambda address, n: bytes(data[address : address + n]), write)
    smmu = Smmu(memory, cr0=0)
    queue = CommandQueue(smmu, 0x1000, 4)
    queue.start()
    smmu.write("CR0", 8)
    EntryWriter(queue, memory).write_ste(0x2000, [1] + [0] * 7, 5)
    assert stores[0] == (0x2000, (1).to_bytes(8, "little"))
    commands = [layout.pack("CFGI_STE", StreamID=5, Leaf=1), layout.pack("SYNC")]
    assert stores[1:] == [
        (0x1000, b"".join(command.to_bytes(16, "little") for command in commands)),
        (0x1020, layout.pack("PREFETCH_CONFIG", StreamID=5).to_bytes(16, "little")),
    ]


# --- ranges ---


@pytest.mark.parametrize("ril", [0, 1])
@pytest.mark.parametrize("e2h", [0, 1])
@pytest.mark.parametrize("granule_lg2", [12, 14, 16])
def test_random_ranges_are_told_as_the_twin_tells_them(ril, e2h, granule_lg2):
    rng = random.Random(4 * granule_lg2 + 2 * ril + e2h)
    queue = queue_of(features=Features.full().replace(ril=ril))
    queue.smmu.write("CR0", layout.pack("CR0", CMDQEN=1))
    queue.smmu.write("CR2", layout.pack("CR2", E2H=e2h))
    for _ in range(200):
        entries = {
            (kind, rng.getrandbits(16 if kind < 3 else 32), rng.getrandbits(20) * (kind == 3))
            for kind in rng.choices(range(5), k=rng.randrange(1, 5))
        }
        made = Invalidations((queue, *entry) for entry in entries)
        page_lg2 = rng.choice([granule_lg2, 2 * granule_lg2 - 3, 3 * granule_lg2 - 6])
        first = rng.getrandbits(rng.randrange(1, 50)) >> 12 << 12
        size = rng.choice([1 << page_lg2, rng.getrandbits(rng.randrange(13, 34)) | 1])
        span = first, first + size - 1, granule_lg2, page_lg2, rng.random() < 0.5
        if rng.random() < 0.1:
            span = 0, MASK, granule_lg2, page_lg2, span[4]
        wanted = ringtwin.batches(entries, span, ril, e2h)
        if len(wanted) > 1000:
            continue
        queue.log = []
        made.invalidate(*span)
        assert [layout.pack(name, **fields) for name, fields in queue.log] == wanted


def test_a_wrong_entry_or_range_is_refused():
    queue, other = queue_of(), queue_of()
    made = Invalidations([(queue, 0, 1, 0)])
    for entry in ((0, 1 << 16, 0), (1, -1, 0), (3, 1 << 32, 0), (3, 1, 1 << 20), (5, 1, 0)):
        with pytest.raises(InvalidArgument):
            made.insert(queue, *entry)
    with pytest.raises(InvalidArgument, match="another"):
        made.insert(other, 0, 1, 0)
    assert len(made) == 1
    issued = queue.issued
    for span in ((1, 0, 12, 12, True), (-1, 0, 12, 12, True), (0, 1 << 64, 12, 12, True),
                 (0, 5, 3, 12, True), (0, 5, 12, 11, True), (0, 5, 12, 64, True)):  # fmt: skip
        with pytest.raises(InvalidArgument):
            made.invalidate(*span)
    beyond = Invalidations([(queue, 1, 1, 0)])
    with pytest.raises(InvalidArgument, match="address"):
        beyond.invalidate(1 << 56, (1 << 56) + 4095, 12, 12, True)
    assert queue.issued == issued


def test_a_tag_is_dropped_by_one_command():
    queue = queue_of()
    for entry, word in (
        ((0, 7), layout.pack("TLBI_NH_ASID", ASID=7)),
        ((1, 8), layout.pack("TLBI_S12_VMALL", VMID=8)),
        ((3, 9), layout.pack("ATC_INV", StreamID=9, Size=52)),
        ((3, 9, 5), layout.pack("ATC_INV", StreamID=9, SSV=1, SubstreamID=5, Size=52)),
    ):  # fmt: skip
        queue.log = []
        queue.drop(*entry)
        assert [layout.pack(*one[:1], **one[1]) for one in queue.log] == [word, ringtwin.SYNC]
    issued = queue.issued
    queue.drop(2, 8)  # its TLBI_S12_VMALL does it
    for entry in ((0, 1 << 16), (4, -1), (5, 1), (-1, 1), (3, 1, 1 << 20), (3, 1, -1)):
        with pytest.raises(InvalidArgument):
            queue.drop(*entry)
    assert queue.issued == issued


def test_stage_2_is_dropped_before_what_was_cached_through_it():
    queue = queue_of()
    made = Invalidations([(queue, kind, 1, 0) for kind in range(5)])
    queue.log = []
    made.invalidate(0, 4095, 12, 12, True)
    names = [name for name, _ in queue.log]
    assert names.index("TLBI_S2_IPA") < names.index("SYNC") < names.index("TLBI_NH_ALL")
    assert "SYNC" in names[names.index("TLBI_NH_ALL") : names.index("ATC_INV")]
    queue.log = []
    made.invalidate_all()
    assert "TLBI_NH_ALL" not in [name for name, _ in queue.log]


# --- copies, threads ---


def test_a_queue_and_its_writer_are_saved_with_their_smmu():
    queue = queue_of(size_lg2=3)
    writer = EntryWriter(queue, queue.memory, safe_bits=False)
    queue.run([ASID] * 5)
    queue.put(ASID & MASK, ASID >> 64)
    other = pickle.loads(pickle.dumps(writer))
    assert other.queue.smmu is not queue.smmu and other.memory is other.queue.memory
    assert not other.safe_bits and other.observer is None
    for one in (queue, other.queue):
        with pytest.raises(CommandError) as caught:
            one.run([ASID, ILLEGAL])
        assert caught.value.index == 2
    assert seen(queue, 3) == seen(other.queue, 3)


def test_batches_of_threads_do_not_mix():
    queue = queue_of(size_lg2=2)
    queue.log = []

    def work(number):
        for _ in range(200):
            queue.run([layout.pack("TLBI_NH_ASID", ASID=number)] * 6)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tags = [fields.get("ASID") for _, fields in queue.log]
    assert len(tags) == 4 * 200 * 7
    assert all(len({*tags[i : i + 6]}) == 1 and tags[i + 6] is None for i in range(0, len(tags), 7))
