"""Reasons of refusals: their numbers, their sentences, and how they reach every face."""

import importlib
import re
import subprocess
import sys

import pytest
import small
from project import ROOT

from smmufast import Features, Memory, Smmu, Why, layout

PACKAGE = ROOT / "smmufast"


def test_the_generated_file_is_current():
    module = importlib.import_module("smmufast.why")
    assert module._pxd() == (PACKAGE / "_facts/why.pxd").read_text(encoding="utf-8")


def test_the_generator_prints_what_it_writes():
    done = subprocess.run(
        [sys.executable, "-m", "smmufast.why"], cwd=PACKAGE.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, (PACKAGE / "_facts/why.pxd").read_text())
    wrong = [sys.executable, "-m", "smmufast.why", "--wrong"]
    assert subprocess.run(wrong, cwd=PACKAGE.parent, capture_output=True).returncode == 1


def test_a_number_holds_its_event():
    assert len({int(why) for why in Why}) == len(Why)
    for why in Why:
        assert 0 < why < 1 << 16
        assert why.event == (layout.Event(why & 0xFF) if why & 0xFF else None)
        assert why >> 8 > 0


@pytest.mark.parametrize("why", Why, ids=lambda why: why.name)
def test_a_sentence_names_what_it_is_about(why):
    assert "[" not in why.sentence()
    assert why.sentence()[-1] not in ".:"
    assert re.fullmatch(r"[SV][\d.]+-\d+", why.rule)
    assert re.fullmatch(r"D?[\d.]+", why.section)
    named = why.sentence({"Span": 1, "Config": 5, "S2PS": 2}, Features())
    assert "[" not in named


def test_values_are_written_as_the_architecture_writes_them():
    fields = {"EATS": 2, "Config": 6, "S2TTB": 1 << 44, "S2PS": 3, "S1CDMax": 9, "ASID": 300}
    assert Why.STE_EATS_STAGES.sentence(fields).startswith("EATS=0b10 (split-stage ATS)")
    assert Why.STE_S2TTB.sentence(fields) == (
        "S2TTB=0x100000000000 is beyond the output size of stage 2 (S2PS=0b011, IDR5.OAS)"
    )
    assert Why.CD_ASID.sentence(fields).startswith("ASID=0x12c:")
    assert Why.STE_S1CDMAX.sentence(fields, Features(ssidsize=8)) == (
        "S1CDMax=9 is more than the SubstreamID has bits (IDR1.SSIDSIZE=8)"
    )


@pytest.mark.parametrize("first", ["S1_INVALID", "S1_RESERVED", "S1_TABLE", "S1_ABORT",
                                   "S1_UPDATE_ABORT"])  # fmt: skip
def test_reasons_of_both_stages_follow_each_other(first):
    assert Why[first.replace("S1", "S2")] == Why[first] + 0x100


@pytest.mark.parametrize("name", ["CD_TG{}", "CD_T{}SZ", "CD_TTB{}", "CD_TTB{}_48", "EPD{}",
                                  "T{}SZ_RANGE", "E0PD{}"])  # fmt: skip
def test_reasons_of_both_halves_follow_each_other(name):
    assert Why[name.format(1)] == Why[name.format(0)] + 0x100


def test_an_exception_says_why():
    smmu, _ = small.system()
    with pytest.raises(LookupError, match=r"F_TRANSLATION: sid .* iova .*its bit 0 is 0") as caught:
        smmu.pa(1, small.UNMAPPED)
    assert caught.value.result.why is Why.S1_INVALID


def test_success_has_no_reason():
    smmu, _ = small.system()
    assert smmu.translate(1, small.RW).why is None


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        ("check_ste", (bytes(63),)),
        ("check_cd", (bytes(64), bytes(65))),
        ("check_command", (b"",)),
    ],
)
def test_a_record_of_the_wrong_size_is_refused(call, wrong):
    with pytest.raises(ValueError, match=r"must be \d+ bytes, not \d+"):
        getattr(Smmu(Memory()), call)(*wrong)
    with pytest.raises(TypeError, match=r"must be .* bytes, not int"):
        getattr(Smmu(Memory()), call)(*(7 for _ in wrong))


def test_a_live_smmu_says_why_a_command_is_illegal():
    memory = Memory()
    memory.add_private(0, 1 << 40)
    smmu = Smmu(memory, Features(oas=5), cr0=0)
    smmu.write("CMDQ_BASE", 0x40000 | 4)
    smmu.write("CR0", layout.mask("CR0", "CMDQEN"))
    smmu.command("TLBI_NH_VA", TG=1, Address=0x1000)
    reason = Why.CMD_RANGE.sentence()
    assert [tuple(warning) for warning in smmu.warnings] == [("CMDQ_CONS", f"CERROR_ILL: {reason}")]
    with pytest.raises(RuntimeError, match=f"stopped by CERROR_ILL: {reason}"):
        smmu.sync()
    direct = Smmu(Memory(), Features(oas=5))
    with pytest.raises(ValueError, match=f"TLBI_NH_VA: CERROR_ILL: {reason}"):
        direct.command("TLBI_NH_VA", TG=1, Address=0x1000)


def test_ats_answers_say_why():
    smmu = Smmu(Memory(), Features(ats=0, pri=0, atsrecerr=0, ns1ats=0))
    answer = smmu.ats_request(1, 0x1000)
    assert (answer.status, answer.why) == ("UR", Why.ATS_ABSENT)
    assert smmu.ats_translated(1, 0x1000).why is Why.ATS_ABSENT
