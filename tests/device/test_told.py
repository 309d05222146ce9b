"""Hosts that keep translations are told what is invalidated, and CMD_SYNC waits for accesses."""

import threading

import pytest

from smmufast import Caches, Features, Invalidated, Memory, Smmu, layout

STE, CD, TABLES, CMDQ, LEAVES = 0x4000_0000, 0x4001_0000, 0x4002_0000, 0x4010_0000, 0x4004_0000


def system(caches=None, features=None, **more):
    memory = Memory()
    memory.add_private(0x4000_0000, 0x100_0000)
    memory.write(STE, layout.to_bytes("STE", layout.pack("STE", V=1, Config=5, S1ContextPtr=CD)))
    memory.write(CD, layout.to_bytes("CD", layout.pack(
        "CD", V=1, AA64=1, A=1, R=1, T0SZ=25, IPS=2, EPD1=1, TTB0=TABLES, ASID=7)))  # fmt: skip
    memory.write_u64(TABLES, TABLES + 0x1_0003)
    memory.write_u64(TABLES + 0x1_0000, LEAVES | 3)
    for i in range(4):
        memory.write_u64(LEAVES + 8 * i, (i + 1) << 12 | 0xF43)
    return Smmu(memory, features, strtab_base=STE, strtab_base_cfg=4, cmdq_base=CMDQ | 6,
                cr0=0b1101, caches=caches, **more)  # fmt: skip


COMMANDS = {
    "CFGI_STE": ({"StreamID": 5, "Leaf": 1}, {"configuration": True, "sids": (5, 5), "leaf": True}),
    "CFGI_STE_RANGE": ({"StreamID": 5, "Range": 2}, {"configuration": True, "sids": (0, 7)}),
    "CFGI_ALL": ({}, {"configuration": True}),
    "CFGI_CD": ({"StreamID": 5, "SubstreamID": 9},
                {"configuration": True, "sids": (5, 5), "ssid": 9}),
    "CFGI_CD_ALL": ({"StreamID": 5}, {"configuration": True, "sids": (5, 5)}),
    "TLBI_NH_ALL": ({"VMID": 3}, {"vmid": 3}),
    "TLBI_NH_ASID": ({"VMID": 3, "ASID": 7}, {"vmid": 3, "asid": 7}),
    "TLBI_NH_VA": ({"VMID": 3, "ASID": 7, "Address": 0x5000, "Leaf": 1},
                   {"vmid": 3, "asid": 7, "addresses": (0x5000, 0x5FFF), "leaf": True}),
    "TLBI_NH_VAA": ({"VMID": 3, "Address": 0x5000},
                    {"vmid": 3, "addresses": (0x5000, 0x5FFF)}),
    "TLBI_S2_IPA": ({"VMID": 3, "IPA": 0x5000}, {"vmid": 3, "addresses": (0x5000, 0x5FFF)}),
    "TLBI_S12_VMALL": ({"VMID": 3}, {"vmid": 3}),
    "TLBI_NSNH_ALL": ({}, {}),
    "TLBI_EL2_ALL": ({}, {}),
}  # fmt: skip


@pytest.mark.parametrize("caches", [False, True])
@pytest.mark.parametrize("name", COMMANDS)
def test_the_scope_of_each_command_is_told(name, caches):
    told = []
    smmu = system(Caches.small() if caches else None, Features.full())
    smmu.on_invalidate = told.append
    fields, scope = COMMANDS[name]
    before = smmu.generation
    smmu.command(name, **fields)
    smmu.command("SYNC")
    (found,) = told
    assert isinstance(found, Invalidated) and found.source == name
    wanted = {"configuration": False, "sids": None, "ssid": None, "vmid": None, "asid": None,
              "addresses": None, "leaf": False} | scope  # fmt: skip
    assert {key: getattr(found, key) for key in wanted} == wanted
    assert found.translations is not wanted["configuration"]
    assert smmu.generation > before


def test_only_what_invalidates_is_told_and_counted():
    told = []
    smmu = system(Caches.server())
    smmu.on_invalidate = told.append
    before = smmu.generation
    for i in range(4):
        smmu.translate(0, i << 12)
    smmu.translate(0, 1 << 40)
    smmu.command("SYNC")
    smmu.command("PREFETCH_CONFIG", StreamID=0)
    assert told == [] and smmu.generation == before
    smmu.write("CR0", 0b1100)
    assert told == [Invalidated("CR0", True, True)] and smmu.generation > before
    before = smmu.generation
    smmu.write("CR0", 0b1101)
    assert len(told) == 1 and smmu.generation > before


def test_it_is_told_after_the_caches_and_before_cons_moves():
    smmu = system(Caches.server())
    smmu.translate(0, 0)
    seen = []

    def told(scope):
        seen.append((scope.source, len(smmu.caches.tlb), smmu.read("CMDQ_CONS")))
        smmu.translate(0, 0x1000)  # a callback may call back

    smmu.on_invalidate = told
    assert len(smmu.caches.tlb) == 1
    smmu.command("TLBI_NH_ALL")
    assert seen == [("TLBI_NH_ALL", 0, 0)]
    assert smmu.read("CMDQ_CONS") == 1


def test_commands_are_told_as_they_lie_in_memory():
    told = []
    smmu = system()
    smmu.on_command = told.append
    smmu.command("TLBI_NH_VA", ASID=7, Address=0x5000)
    smmu.command("SYNC")
    want = [layout.pack("TLBI_NH_VA", ASID=7, Address=0x5000), layout.pack("SYNC")]
    assert [int.from_bytes(command, "little") & 0x7F for command in told] == [
        word & 0x7F for word in want]
    assert told[0] == want[0].to_bytes(16, "little")


@pytest.mark.parametrize("name", ["on_invalidate", "on_command"])
def test_an_exception_leaves_the_command_in_the_queue(name):
    smmu = system()

    def fail(_):
        raise ZeroDivisionError

    setattr(smmu, name, fail)
    with pytest.raises(ZeroDivisionError):
        smmu.command("TLBI_NH_ALL")
    assert smmu.read("CMDQ_CONS") == 0 and smmu.read("CMDQ_PROD") == 1
    setattr(smmu, name, None)
    smmu.write("CMDQ_PROD", 1)
    assert smmu.read("CMDQ_CONS") == 1
    with pytest.raises(TypeError, match=f"{name} must be a callable or None"):
        setattr(smmu, name, 5)


# --- transactions ---


def put(smmu, *names):
    """Put commands into the queue without waiting for them."""
    for name in names:
        prod = smmu.read("CMDQ_PROD")
        command = layout.pack(name).to_bytes(16, "little")
        smmu.memory.write(CMDQ + 16 * (prod & 63), command)
        smmu.write("CMDQ_PROD", prod + 1)


def test_a_sync_waits_for_the_transactions_that_began_before_the_invalidation():
    smmu = system(Caches.small())
    first, second = smmu.transaction(), smmu.transaction()
    with first:
        second.__enter__()
        put(smmu, "TLBI_NH_ALL", "SYNC", "CFGI_ALL")
        assert smmu.read("CMDQ_CONS") == 1  # at the CMD_SYNC
        with smmu.transaction():  # which began behind the invalidation
            second.end()
            assert smmu.read("CMDQ_CONS") == 1
            first.end()
            assert smmu.read("CMDQ_CONS") == 3
    assert repr(first) == "<Transaction closed>"


def test_a_sync_alone_waits_for_nobody_and_a_disabled_smmu_neither():
    smmu = system()
    with smmu.transaction() as one:
        assert repr(one) == "<Transaction open>"
        put(smmu, "SYNC")
        assert smmu.read("CMDQ_CONS") == 1
        put(smmu, "TLBI_NH_ALL", "SYNC")
        assert smmu.read("CMDQ_CONS") == 2
        smmu.write("CR0", 0b1100)  # SMMUEN=0 ends every transaction's hold
        assert smmu.read("CMDQ_CONS") == 3
    put(smmu, "TLBI_NH_ALL", "SYNC")
    assert smmu.read("CMDQ_CONS") == 5


def test_a_transaction_is_opened_once_at_a_time_and_may_be_dropped():
    smmu = system()
    one = smmu.transaction()
    with one, pytest.raises(RuntimeError, match="open already"):
        one.__enter__()
    with one:
        put(smmu, "TLBI_NH_ALL", "SYNC")
    assert smmu.read("CMDQ_CONS") == 2
    one.end()
    one.__enter__()
    put(smmu, "TLBI_NH_ALL", "SYNC")
    assert smmu.read("CMDQ_CONS") == 3
    del one
    assert smmu.read("CMDQ_CONS") == 4
    with pytest.raises(TypeError, match=r"made by Smmu\.transaction"):
        type(smmu.transaction())()


@pytest.mark.parametrize("held", [True, False])
def test_an_access_of_another_thread_never_meets_memory_that_was_given_back(held):
    """What breaks without: a page is unmapped, synchronised and reused between the two."""
    smmu = system(Caches.small())
    translated, reused = threading.Event(), threading.Event()
    page = {"owner": "device"}
    met = []

    def device():
        section = smmu.transaction() if held else None
        if held:
            section.__enter__()
        smmu.pa(0, 0)
        translated.set()
        reused.wait(0.2 if held else 10)  # the access takes its time
        met.append(page["owner"])
        if held:
            section.end()

    thread = threading.Thread(target=device)
    thread.start()
    assert translated.wait(10)
    smmu.memory.write_u64(LEAVES, 0)
    put(smmu, "TLBI_NH_ALL", "SYNC")
    while smmu.read("CMDQ_CONS") != smmu.read("CMDQ_PROD"):
        pass
    page["owner"] = "somebody else"
    reused.set()
    thread.join()
    assert met == ["device" if held else "somebody else"]
