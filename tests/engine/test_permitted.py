"""Caches against the set of answers that the invalidations permit: short runs of permitted.py."""

import itertools

import permitted
import pytest
from permitted import ALWAYS, Command, Model, Pte, Until, Value


@pytest.mark.parametrize("first", [0, *(pytest.param(k, marks=pytest.mark.slow)
                                        for k in range(4, 24, 4))])  # fmt: skip
def test_every_answer_is_one_that_the_invalidations_permit(first):
    old = 0
    for seed in range(first, first + 4):
        counts = permitted.run(seed)
        assert counts["translations"] > permitted.PROGRAM // 2
        old += counts["old"]
    assert old > 100


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("TLBI_NSNH_ALL", 0), ("TLBI_EL2_VAA", 49), ("TLBI_EL2_VA", 36), ("TLBI_EL2_ASID", 12),
        ("TLBI_EL2_ALL", 0), ("TLBI_S12_VMALL", 0), ("TLBI_NH_VA", 9), ("TLBI_NH_VAA", 0),
        ("TLBI_NH_ALL", 9), ("CFGI_CD", 0), ("CFGI_STE", 0), ("CFGI_STE_RANGE", 0),
        ("CFGI_ALL", 0),
    ],
)  # fmt: skip
def test_a_command_that_does_nothing_is_found_out(name, first):
    """The search begins near a program that shows it; others take longer (--without)."""
    with pytest.raises(AssertionError, match="permitted are"):
        for seed in range(first, first + 60):
            permitted.run(seed, without=name)


# --- the model ---


def command(name, issue, complete, **fields):
    made = Command(name, fields, issue, 0xFFFF)
    made.complete = complete
    return made


def test_what_a_value_was_good_for_ends_with_a_command_that_came_later():
    model = Model()
    covers = Command.ste
    early = command("CFGI_STE", 3, 9, StreamID=1)
    late = command("CFGI_STE", 6, 9, StreamID=1)
    other = command("CFGI_STE", 6, 9, StreamID=2)
    for given, ends in (([], None), ([early], None), ([other], None), ([early, late], late)):
        model.commands = given
        found = model.kept(Until(5), lambda c: covers(c, 1))
        assert found == (ALWAYS if ends is None else Until(9, frozenset([ends])))
    assert model.kept(ALWAYS, lambda c: True) == ALWAYS


def test_a_translation_may_outlive_the_table_that_it_was_made_of():
    """A table ends at 9; only a command after that, or the one that ended it, ends a page of it."""
    model = Model()
    table = command("TLBI_NH_VA", 6, 9, VMID=4, ASID=1, Address=0x20_0000, Leaf=0)
    page = command("TLBI_NH_VA", 7, 9, VMID=4, ASID=1, Address=0x1000, Leaf=1)
    both = command("TLBI_NH_ASID", 6, 9, VMID=4, ASID=1)
    after = command("TLBI_NH_VA", 11, 12, VMID=4, ASID=1, Address=0x1000, Leaf=1)
    tag = "NS", 4, 1
    for given, good in (([table, page], True), ([both], False), ([table, page, after], False)):
        model.commands = given
        until = model.kept(Until(5), lambda c: c.stage1(tag, True, 0x1000, 1))
        assert until.step == 9
        until = model.kept(until, lambda c: c.stage1(tag, False, 0x1000, 3))
        assert (until == ALWAYS) == good, given


@pytest.mark.parametrize("world", ["NS", "EL2", "E2H"])
def test_what_stage_1_commands_cover(world):
    """By VMID with its wildcard, by ASID but for what is global, by address, leaves or all."""
    spread = itertools.product((4, 5), (1, 2), (0x1000, 0x5000), (0, 1), (True, False), (2, 3))
    for vmid, asid, address, leaf, ng, level in spread:
        fields = {"VMID": vmid, "ASID": asid, "Address": address, "Leaf": leaf}
        tag = ("NS", 4, 1) if world == "NS" else (world, None, 1 if world == "E2H" else None)

        def hit(name, table, fields=fields, tag=tag, level=level, ng=ng):
            return Command(name, fields, 0, 0xFFFF).stage1(tag, table, 0x1000, level, ng)

        there = address == 0x1000 or level == 2
        mine = world == "EL2" or asid == 1
        if world == "NS":
            names, of_vmid = ("NH_ALL", "NH_ASID", "NH_VA", "NH_VAA"), vmid == 4
        else:
            names, of_vmid = ("EL2_ALL", "EL2_ASID", "EL2_VA", "EL2_VAA"), True
        everything, by_asid, by_va, by_vaa = (f"TLBI_{name}" for name in names)
        for table in (False, True):
            walked = not (table and leaf)
            assert hit(everything, table) == of_vmid
            assert hit(by_asid, table) == (of_vmid and ng and asid == 1 and world != "EL2")
            assert hit(by_va, table) == (of_vmid and (mine or not ng) and there and walked)
            assert hit(by_vaa, table) == (of_vmid and there and walked)
        assert not hit("TLBI_S2_IPA", False)
        assert hit("TLBI_NSNH_ALL", False) == (world == "NS")
    wild = Command("TLBI_NH_ALL", {"VMID": 5}, 0, 0xFFFE)
    assert wild.stage1(("NS", 4, 1), False, 0, 3)
    assert not wild.stage1(("NS", 6, 1), False, 0, 3)


def test_a_fault_is_not_cached():
    assert not Pte("none").cached
    assert not Pte("leaf", af=False).cached
    assert Pte("leaf", write=False).cached
    assert Value(Pte("none"), 3).end > 1 << 60
