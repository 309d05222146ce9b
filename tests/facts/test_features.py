"""Features: the identification registers both ways, and what is refused."""

import copy
import dataclasses
import doctest
import importlib
import json
import pickle
import random
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from project import ROOT
from rawfeatures import raw

from smmufast import Memory, Smmu, layout
from smmufast import features as features_module
from smmufast.features import Features

PACKAGE = ROOT / "smmufast"
REGISTERS = ("IDR0", "IDR1", "IDR3", "IDR5", "AIDR")


def registers(features):
    return tuple(getattr(features, name.lower()) for name in REGISTERS)


FIELD_OF = {
    f.name.lower(): name
    for name in REGISTERS
    for f in layout.REGISTERS[name].fields
    if f.name != "ARCH_MAJOR"
}
#: The codes of each feature that are not reserved; of sizes some.
CODES = dict.fromkeys(FIELD_OF, (0, 1)) | {
    "ttf": (1, 2, 3), "httu": (0, 1, 2, 3), "ttendian": (0, 2, 3), "stall_model": (0, 1, 2),
    "bbml": (0, 1, 2), "vax": (0, 1, 2), "oas": range(8), "arch_minor": range(5),
    "sidsize": (0, 1, 6, 7, 16, 32), "ssidsize": (0, 1, 20), "priqs": (0, 19), "cmdqs": (0, 19),
    "eventqs": (0, 19), "stall_max": (0, 1, 0xFFFF),
}  # fmt: skip


def named_bits(name):
    return sum(((1 << f.width) - 1) << f.lsb for f in layout.REGISTERS[name].fields)


def words_with_known_codes(seed):
    """Random register words, with random RES0 bits, of codes that there are."""
    rng = random.Random(seed)
    words = {name: rng.getrandbits(32) for name in REGISTERS}
    for name, register in FIELD_OF.items():
        f = layout.REGISTERS[register].field(name.upper())
        words[register] &= ~f.mask
        words[register] |= rng.choice(CODES[name]) << f.lsb
    words["AIDR"] &= ~layout.REGISTERS["AIDR"].field("ARCH_MAJOR").mask
    return words


@pytest.mark.rule("S6.3.1-2", "S6.3.4-2")
def test_every_identification_field_is_a_feature_of_that_name():
    table = [f.name.lower() for name in REGISTERS for f in layout.REGISTERS[name].fields]
    table.remove("arch_major")
    assert [f.name for f in dataclasses.fields(Features)] == table


def test_the_defaults_are_what_this_version_models():
    f = Features()
    ones = {"s2p", "s1p", "cohacc", "hyp", "ats", "asid16", "msi", "sev", "pri", "vmw", "vmid16",
            "cd2l", "atsrecerr", "st_level", "attr_perms_ovr", "attr_types_ovr", "had", "xnx",
            "fwb", "stt", "ril", "e0pd", "ptwnnc", "pasidtt", "epan", "gran4k", "gran16k",
            "gran64k", "ds", "vax"}  # fmt: skip
    others = {"ttf": 2, "httu": 2, "sidsize": 32, "ssidsize": 20, "priqs": 19, "eventqs": 19,
              "cmdqs": 19, "bbml": 2, "oas": 6, "stall_max": 0xFFFF, "arch_minor": 3}  # fmt: skip
    for name, value in dataclasses.asdict(f).items():
        assert value == (1 if name in ones else others.get(name, 0)), name
    assert f.oas_bits == 52
    assert registers(f) == (0x088F769B, 0x0E739D20, 0x00037714, 0xFFFF04F6, 3)


@pytest.mark.parametrize("seed", range(200))
def test_registers_make_features_and_features_make_registers(seed):
    words = words_with_known_codes(seed)
    f = Features.from_idr(*words.values())
    for name, word in words.items():
        assert getattr(f, name.lower()) == word & named_bits(name), name
        for field in layout.REGISTERS[name].fields:
            if field.name != "ARCH_MAJOR":
                code = word >> field.lsb & (1 << field.msb - field.lsb + 1) - 1
                assert getattr(f, field.name.lower()) == code
    assert Features.from_idr(*registers(f)) == f


def test_registers_of_a_real_model_come_back_unchanged():
    """The identification registers that QEMU's SMMUv3 presents."""
    words = (0x0D44101B, 0x02730010, 0x00001414, 0x00000074, 1)
    f = Features.from_idr(*words)
    assert registers(f) == words
    assert (f.s1p, f.s2p, f.sidsize, f.ssidsize, f.oas_bits) == (1, 1, 16, 0, 44)
    assert (f.ttendian, f.stall_model, f.term_model, f.ril, f.bbml) == (2, 1, 1, 1, 2)


@pytest.mark.rule("S6.3.6-2")
@pytest.mark.parametrize(
    "minor, bits",
    [
        (0, [32, 36, 40, 42, 44, 48, 48, 48]),
        (1, [32, 36, 40, 42, 44, 48, 52, 52]),
        (2, [32, 36, 40, 42, 44, 48, 52, 52]),
        (3, [32, 36, 40, 42, 44, 48, 52, 52]),
        (4, [32, 36, 40, 42, 44, 48, 52, 56]),
    ],
)
def test_the_output_address_size_depends_on_the_version(minor, bits):
    assert [raw(oas=oas, ttf=2, arch_minor=minor).oas_bits for oas in range(8)] == bits


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ttf": 0}, "ttf must be .* or .*, not 0$"),
        ({"ttendian": 1}, "ttendian must be .* or .*, not 1$"),
        ({"stall_model": 3}, "stall_model must be .* or .*, not 3$"),
        ({"st_level": 2}, "st_level must be .* or .*, not 2$"),
        ({"st_level": 3}, "st_level must be .* or .*, not 3$"),
        ({"bbml": 3}, "bbml must be .* or .*, not 3$"),
        ({"vax": 3}, "vax must be .* or .*, not 3$"),
        ({"sidsize": 33}, "sidsize must be 0 to 32, not 33"),
        ({"ssidsize": 21}, "ssidsize must be 0 to 20, not 21"),
        ({"priqs": 20}, "priqs must be 0 to 19, not 20"),
        ({"eventqs": 20}, "eventqs must be 0 to 19, not 20"),
        ({"cmdqs": 20}, "cmdqs must be 0 to 19, not 20"),
        ({"oas": 8}, "oas must be 0 to 7, not 8"),
        ({"arch_minor": 5}, "arch_minor must be 0 to 4, not 5"),
        ({"stall_max": 1 << 16}, "stall_max must be 0 to 65535, not 0x10000"),
        ({"s2p": 2}, "s2p must be 0 to 1, not 2"),
        ({"s2p": -1}, "s2p must be 0 to 1, not -1"),
    ],
)
def test_codes_that_no_version_has_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Features(**changes)
    with pytest.raises(ValueError, match=f"^{message}"):
        Features().replace(**changes)


# --- contradictions ---


def wrong(f):
    """What is wrong with some codes: the sections and the features that the rules are about.

    The slow list of what 2.2, 2.6, 2.9 and 6.3.1 to 6.3.6 say, a sentence at a time.
    """
    found = set()

    def rule(section, subject, broken):
        if broken:
            found.add((section, subject))

    v3_1, v3_2, v3_3, v3_4 = (f.arch_minor >= minor for minor in (1, 2, 3, 4))
    both = f.s1p == 1 and f.s2p == 1
    # 6.3.1, from bit 30 down
    rule("6.3.1", "atsrecerr", f.atsrecerr == 1 and f.ats == 0)
    rule("6.3.1", "vatos", f.vatos == 1 and not (f.atos == 1 and both))
    rule("6.3.1", "vmw", f.vmw == 1 and f.s2p == 0)
    rule("6.3.1", "pri", f.pri == 1 and f.ats == 0)
    rule("6.3.1", "ns1ats", f.ns1ats == 1 and (f.ats == 0 or f.s1p == 0 or f.s2p == 0))
    rule("6.3.1", "hyp", f.hyp == 1 and (f.s1p == 0 or f.s2p == 0))
    rule("6.3.1", "hyp", f.hyp == 0 and v3_2 and both)
    rule("6.3.1", "ttf", f.ttf in (1, 3) and f.dpt == 1)
    # 6.3.2, from bit 31 down
    rule("6.3.2", "ecmdq", f.ecmdq == 1 and (f.cohacc == 0 or f.msi == 0))
    rule("6.3.2", "queues_preset", f.ecmdq == 1 and f.queues_preset == 1)
    rule("6.3.2", "rel", f.rel == 1 and f.tables_preset == 0 and f.queues_preset == 0)
    rule("6.3.2", "st_level", f.sidsize >= 7 and f.st_level == 0)
    # 6.3.4, from bit 23 down
    rule("6.3.4", "aie", f.aie == 1 and f.s1p == 0)
    rule("6.3.4", "mteperm", f.mteperm == 1 and f.s2p == 0)
    rule("6.3.4", "mteperm", f.mteperm == 0 and f.s2p == 1 and v3_4)
    rule("6.3.4", "the", f.the == 1 and f.s2p == 1 and f.s2pi == 0)
    rule("6.3.4", "the", f.the == 1 and f.s1p == 0)
    rule("6.3.4", "s2po", f.s2po == 1 and f.s2pi == 0)
    rule("6.3.4", "s2pi", f.s2pi == 1 and f.s2p == 0)
    rule("6.3.4", "s1pi", f.s1pi == 1 and f.s1p == 0)
    rule("6.3.4", "epan", f.epan == 0 and v3_4)
    rule("6.3.4", "pasidtt", f.pasidtt == 1 and (f.ats == 0 or f.ssidsize == 0))
    rule("6.3.4", "dpt", f.dpt == 1 and f.ats == 0)
    rule("6.3.4", "ptwnnc", f.ptwnnc == 0 and v3_3 and f.s2p == 1)
    rule("6.3.4", "ptwnnc", f.ptwnnc == 1 and f.s2p == 0)
    rule("6.3.4", "e0pd", f.e0pd == 0 and v3_3)
    rule("6.3.4", "bbml", f.bbml == 0 and v3_2)
    rule("6.3.4", "ril", f.ril == 0 and v3_2)
    rule("6.3.4", "fwb", f.fwb == 0 and v3_2)
    rule("6.3.4", "pps", f.pps == 1 and (f.pri == 0 or f.ssidsize == 0))
    rule("6.3.4", "xnx", f.xnx == 1 and not v3_1)
    rule("6.3.4", "xnx", f.xnx == 0 and v3_1 and f.s2p == 1)
    rule("6.3.4", "pbha", f.pbha == 1 and (not v3_1 or f.had == 0))
    rule("6.3.4", "had", f.had == 0 and v3_1 and f.s1p == 1)
    rule("6.3.4", "had", f.had == 1 and f.s1p == 0)
    # 6.3.6, from bit 31 down
    rule("6.3.6", "stall_max", f.stall_max > 0 and f.stall_model == 1)
    rule("6.3.6", "vax", f.vax > 0 and not v3_1)
    rule("6.3.6", "vax", f.vax > 0 and f.gran64k == 0 and f.ds == 0)
    rule("6.3.6", "vax", f.vax == 2 and f.d128 == 0)
    rule("6.3.6", "d128", f.d128 == 1 and f.ttf != 2)
    rule("6.3.6", "d128", f.d128 == 1 and f.s1p == 1 and (f.s1pi == 0 or f.aie == 0))
    rule("6.3.6", "d128", f.d128 == 1 and f.s2p == 1 and 0 in (f.s2pi, f.s2po, f.mteperm))
    rule("6.3.6", "ds", f.ds == 1 and f.gran4k == 0 and f.gran16k == 0)
    rule("6.3.6", "ds", f.ds == 1 and f.vax == 0)
    rule("6.3.6", "gran4k", f.gran4k == 0 and f.ttf in (1, 3))
    rule("6.3.6", "ttf", f.ttf in (2, 3) and f.gran4k == f.gran16k == f.gran64k == 0)
    rule("6.3.6", "oas", f.oas == 6 and f.arch_minor == 0)
    rule("6.3.6", "oas", f.oas == 6 and f.gran64k == f.ds == f.d128 == 0)
    rule("6.3.6", "oas", f.oas == 7 and (f.d128 == 0 or not v3_4))
    # 2.2, 2.9
    rule("2.2", "s1p", f.s1p == 0 and f.s2p == 0)
    for name in ("bbml", "ril", "stt", "mpam", "fwb"):
        rule("2.9", name, getattr(f, name) and not v3_1)
    for name in ("e0pd", "ptwnnc", "ecmdq", "atsrecerr", "rme_impl", "dpt"):
        rule("2.9", name, getattr(f, name) and not v3_2)
    for name in ("ds", "epan", "the", "s1pi", "s2pi", "s2po", "d128", "aie", "mteperm", "pasidtt"):
        rule("2.9", name, getattr(f, name) and not v3_3)
    rule("2.9", "httu", f.httu == 3 and not v3_3)
    return found


def told(features):
    """The same as `wrong`, of what Features list."""
    return {(each.section, each.names[0]) for each in features.contradictions}


def kept(features, named):
    return all(getattr(features, name) == code for name, code in named.items())


def random_codes(rng, share):
    return {name: rng.choice(codes) for name, codes in CODES.items() if rng.random() < share}


def neighbours(rng, features):
    """Codes that differ in each feature alone, and in many pairs of two."""
    codes = dataclasses.asdict(features)
    singles = [{n: c} for n, choice in CODES.items() for c in choice if c != codes[n]]
    yield from (codes | one for one in singles)
    for i, one in enumerate(singles):
        for two in singles[i + 1 :]:
            if one.keys() != two.keys() and rng.random() < 0.3:
                yield codes | one | two


PRESETS = ("minimal", "v3_0", "v3_2", "qemu", "full")


@pytest.mark.parametrize("preset", PRESETS)
def test_raw_registers_are_kept_and_list_what_contradicts(preset):
    seen = set()
    for codes in neighbours(random.Random(preset), getattr(Features, preset)()):
        features = raw(**codes)
        assert dataclasses.asdict(features) == codes
        assert told(features) == wrong(features), codes
        seen |= told(features)
    assert len(seen) > 25


@pytest.mark.rule(
    "S3.3.1.2-5", "S6.3.1-6", "S6.3.1-8", "S6.3.1-9", "S6.3.1-10", "S6.3.1-12", "S6.3.1-13",
    "S6.3.1-14", "S6.3.1-15", "S6.3.2-4", "S6.3.2-7", "S6.3.2-11", "S6.3.4-6", "S6.3.4-7",
    "S6.3.4-8", "S6.3.4-9", "S6.3.4-10", "S6.3.4-11", "S6.3.4-12", "S6.3.4-13", "S6.3.4-15",
    "S6.3.4-16", "S6.3.4-17", "S6.3.6-4", "S6.3.6-6", "S6.3.6-7", "S6.3.6-8", "S6.3.6-9",
    "S6.3.6-10", "S6.3.6-11",
)
def test_random_registers_list_what_contradicts():
    rng = random.Random(0)
    seen = set()
    for _ in range(2000):
        features = raw(**{name: rng.choice(codes) for name, codes in CODES.items()})
        assert told(features) == wrong(features), features
        seen |= told(features)
    assert seen == {(rule.section, rule.names[0]) for rule in features_module._RULES}


def test_a_contradiction_names_its_section_and_the_codes():
    features = raw(**dataclasses.asdict(Features()) | {"ats": 0, "stall_model": 1})
    assert [str(each) for each in features.contradictions] == [
        "atsrecerr=1 but ats=0: there is no request to record an error of without ATS "
        "(IHI 0070 6.3.1)",
        "pri=1 but ats=0: page requests need ATS (IHI 0070 6.3.1)",
        "pasidtt=1 but ats=0: PASIDs of Translated transactions need ATS (IHI 0070 6.3.4)",
        "stall_max=65535 but stall_model=1: nothing stalls (IHI 0070 6.3.6)",
    ]
    assert Features().contradictions == ()


@pytest.mark.rule("S2.9-2", "S3.3.2-24", "S3.21.1.1-1")
def test_whatever_is_named_is_kept_or_refused_and_the_rest_follows():
    """Each code that is named alone, many in pairs and at random; from presets and from none."""
    rng = random.Random(1)
    singles = [{name: code} for name, codes in CODES.items() for code in codes]
    asked = list(singles)
    asked += [a | b for i, a in enumerate(singles) for b in rng.sample(singles[:i], i // 8)]
    asked += [random_codes(rng, rng.choice((0.05, 0.2, 0.5, 1))) for _ in range(1000)]
    outcomes = {True: 0, False: 0}
    for named in asked:
        for make in (Features, getattr(Features, rng.choice(PRESETS))().replace):
            try:
                features = make(**named)
            except ValueError as error:
                outcomes[False] += 1
                assert "(IHI 0070 " in str(error)
            else:
                outcomes[True] += 1
                assert kept(features, named), (named, features)
                assert not wrong(features), (named, features)
                assert features.contradictions == ()
    assert min(outcomes.values()) > 500


@pytest.mark.rule("S2.9-1")
def test_what_is_consistent_is_accepted_as_it_is_named():
    """Nothing more is refused than what the list says: naming all codes gives just these."""
    rng = random.Random(2)
    accepted = 0
    for _ in range(1000):
        start = getattr(Features, rng.choice(PRESETS))()
        codes = dataclasses.asdict(start) | random_codes(rng, 0.06)
        if wrong(raw(**codes)):
            with pytest.raises(ValueError, match=r"\(IHI 0070 "):
                Features(**codes)
        else:
            accepted += 1
            assert dataclasses.asdict(Features(**codes)) == codes
            assert Features().replace(**codes) == Features(**codes) == raw(**codes)
    assert accepted > 200


@pytest.mark.parametrize(
    "named, follows",
    [
        ({}, {}),
        ({"ats": 0}, {"pri": 0, "atsrecerr": 0, "pasidtt": 0}),
        ({"s2p": 0}, {"hyp": 0, "vmw": 0, "ptwnnc": 0}),
        ({"s1p": 0}, {"hyp": 0, "had": 0}),
        ({"stall_model": 1}, {"stall_max": 0}),
        ({"ssidsize": 0}, {"pasidtt": 0}),
        ({"st_level": 0}, {"sidsize": 6}),
        ({"vax": 0}, {"ds": 0}),
        ({"gran4k": 0, "gran16k": 0}, {"ds": 0}),
        ({"gran64k": 0, "ds": 0}, {"oas": 5, "vax": 0}),
        ({"gran64k": 0}, {}),
        ({"hyp": 0}, {"arch_minor": 1, "ds": 0, "epan": 0, "pasidtt": 0, "e0pd": 0, "ptwnnc": 0,
                      "atsrecerr": 0}),
        ({"e0pd": 0}, {"arch_minor": 2, "ds": 0, "epan": 0, "pasidtt": 0}),
        ({"e0pd": 0, "gran64k": 0},
         {"arch_minor": 2, "ds": 0, "epan": 0, "pasidtt": 0, "vax": 0, "oas": 5}),
        ({"arch_minor": 2}, {"ds": 0, "epan": 0, "pasidtt": 0}),
        ({"arch_minor": 0},
         {"atsrecerr": 0, "xnx": 0, "fwb": 0, "stt": 0, "ril": 0, "bbml": 0, "e0pd": 0,
          "ptwnnc": 0, "pasidtt": 0, "epan": 0, "oas": 5, "ds": 0, "vax": 0}),
        ({"arch_minor": 4}, {"mteperm": 1}),
        ({"d128": 1}, {"s1pi": 1, "s2pi": 1, "s2po": 1, "aie": 1, "mteperm": 1}),
        ({"vax": 2}, {"d128": 1, "s1pi": 1, "s2pi": 1, "s2po": 1, "aie": 1, "mteperm": 1}),
        ({"vatos": 1}, {"atos": 1}),
    ],
)  # fmt: skip
def test_defaults_follow_from_what_was_named(named, follows):
    expected = dataclasses.asdict(Features()) | named | follows
    assert dataclasses.asdict(Features(**named)) == expected
    assert Features().replace(**named) == Features(**named)


@pytest.mark.rule("S6.3.1-5", "S6.3.2-3", "S6.3.4-5", "S6.3.6-5")
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ats": 0, "pri": 1}, r"pri=1 but ats=0: page requests need ATS \(IHI 0070 6\.3\.1\)$"),
        ({"ats": 0, "atsrecerr": 1}, "atsrecerr=1 but ats=0: .*6.3.1"),
        ({"s2p": 0, "vmw": 1}, "vmw=1 but s2p=0: .*6.3.1"),
        ({"s1p": 0, "hyp": 1}, "hyp=1 but s1p=0: .*6.3.1"),
        ({"stall_model": 1, "stall_max": 4}, "stall_max=4 but stall_model=1: .*6.3.6"),
        ({"oas": 6, "gran64k": 0, "ds": 0}, "oas=6 but gran64k=0, ds=0, d128=0: .*6.3.6"),
        ({"vax": 1, "gran64k": 0, "ds": 0}, "vax=1 but gran64k=0, ds=0: .*6.3.6"),
        ({"pasidtt": 1, "ssidsize": 0}, "pasidtt=1 but ssidsize=0: .*6.3.4"),
        ({"st_level": 0, "sidsize": 7}, "st_level=0 but sidsize=7: .*two-level.*6.3.2"),
        ({"ttf": 3, "gran4k": 0}, "gran4k=0 but ttf=3: .*4K granule"),
        ({"gran4k": 0, "gran16k": 0, "gran64k": 0}, "ttf=2 but gran4k=0.* need a granule"),
        ({"gran4k": 0, "gran16k": 0, "ds": 1}, "ds=1 but gran4k=0, gran16k=0"),
        ({"vax": 0, "ds": 1}, "ds=1 but vax=0"),
        ({"s1p": 0, "s2p": 0}, "s1p=0 but s2p=0: an SMMU has at least one stage .*2.2"),
        ({"rel": 1}, "rel=1 but tables_preset=0, queues_preset=0"),
        ({"oas": 7}, "oas=7 but arch_minor=3"),
        ({"ril": 0, "arch_minor": 2}, "ril=0 but arch_minor=2: it is mandatory from SMMUv3.2 on"),
        ({"ril": 1, "arch_minor": 0}, "ril=1 but arch_minor=0: it is of SMMUv3.2.*2.9"),
        ({"ril": 0, "ds": 1}, "ds=1 but arch_minor=1: .*; arch_minor=1 follows from ril=0$"),
        ({"vax": 1, "gran64k": 0, "e0pd": 0},
         "vax=1 but .*; ds=0 follows from arch_minor=2; arch_minor=2 follows from e0pd=0$"),
    ],
)  # fmt: skip
def test_what_contradicts_the_architecture_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Features(**changes)
    with pytest.raises(ValueError, match=f"^{message}"):
        Features().replace(**changes)


def test_a_copy_keeps_what_can_stay():
    v3_0 = Features.v3_0()
    assert v3_0.replace(cmdqs=4) == raw(**dataclasses.asdict(v3_0) | {"cmdqs": 4})
    assert v3_0.replace(arch_minor=2) == raw(
        **dataclasses.asdict(v3_0) | {"arch_minor": 2, "ril": 1, "bbml": 1, "fwb": 1, "xnx": 1,
                                      "had": 1})  # fmt: skip
    with pytest.raises(ValueError, match="pasidtt=1 but arch_minor=0"):  # no version rises
        v3_0.replace(pasidtt=1)
    with pytest.raises(ValueError, match="pri=1 but ats=0"):  # nor is ATS switched on
        Features.minimal().replace(pri=1)
    without = Features(ats=0)
    assert without.replace(ats=1) == raw(**dataclasses.asdict(without) | {"ats": 1})


def test_what_is_modelled_of_raw_registers_stays_as_it_contradicts():
    rng = random.Random(3)
    for _ in range(1000):
        codes = {name: rng.choice(choice) for name, choice in CODES.items()}
        if rng.random() < 0.5:
            codes = dataclasses.asdict(Features()) | random_codes(rng, 0.1)
        features = raw(**codes)
        fewer, taken = features_module.modelled(features)
        assert {n: c for n, c in codes.items() if getattr(fewer, n) != c} == taken
        new = wrong(fewer) - wrong(features)
        if codes["gran4k"] or not codes["ttf"] & 1:  # else 4K was missing before, and still is
            assert not new, (codes, taken)
        assert features_module.modelled(fewer) == (fewer, {})
        known = {n for n, c in features_module.UNMODELLED.items() if codes[n] != c}
        assert known <= taken.keys()
        if not known and codes["vax"] < 2 and codes["httu"] < 3:
            assert not taken


def test_what_depends_on_something_that_is_not_modelled_goes_with_it():
    fewer, taken = features_module.modelled(Features(oas=7, arch_minor=4))
    assert fewer == Features()
    assert taken == {"s1pi": 1, "s2pi": 1, "s2po": 1, "mteperm": 1, "aie": 1, "oas": 7, "d128": 1,
                     "arch_minor": 4}  # fmt: skip


def test_a_state_of_raw_features_is_restored_and_a_contradicting_one_refused():
    features = raw(**dataclasses.asdict(Features()) | {"ats": 0})
    smmu = Smmu(Memory(), features)
    assert smmu.read("IDR0") == features.idr0
    state = smmu.save()
    assert Smmu.restore(state, Memory()).features == features
    assert Smmu.restore(state, Memory()).save() == state
    good = Smmu(Memory()).save()
    header = struct.Struct("<8sII")
    mark, version, size = header.unpack_from(good)
    text = json.loads(good[header.size : header.size + size])
    for change, message in [
        ({"features": text["features"] | {"ats": 0}}, "features: atsrecerr=1 but ats=0"),
        ({"features": [0] * 5}, "features: ttf must be 1, 2 or 3, not 0"),
        ({"features": [0] * 4}, "features must be a list of 5, not one of 4"),
        ({"features": [1 << 32] * 5}, "features must be 0 to 0xffffffff, not 0x100000000"),
        ({"features": [None] * 5}, "features must be a number, not NoneType"),
    ]:
        changed = json.dumps(text | change, sort_keys=True, separators=(",", ":")).encode()
        data = header.pack(mark, version, len(changed)) + changed
        data += zlib.crc32(data).to_bytes(4, "little")
        with pytest.raises(ValueError, match=f"^state: {message}"):
            Smmu.restore(data, Memory())


@pytest.mark.parametrize(
    "changes",
    [
        {"st_level": 0, "sidsize": 6},
        {"gran4k": 0, "gran16k": 0, "ds": 0},
        {"gran4k": 0},
        {"ds": 0, "vax": 0},
        {"sidsize": 0, "ssidsize": 0, "eventqs": 0},
        {"ril": 0, "bbml": 0},
        {"vax": 2, "oas": 7, "arch_minor": 4, "d128": 1},
    ],
)
def test_what_is_legal_at_the_edges_is_accepted(changes):
    f = Features(**changes)
    assert {name: getattr(f, name) for name in changes} == changes
    assert Features.from_idr(*registers(f)) == f


@pytest.mark.rule("S6.3.8-3")
def test_reserved_codes_in_registers_are_refused():
    good = registers(Features())
    for index, word, message in [
        (0, good[0] & ~0b1100, "ttf must be 1, 2 or 3, not 0"),
        (1, good[1] | 0x3F, "sidsize must be 0 to 32, not 63"),
        (4, 0x13, r"ARCH_MAJOR of aidr must be 0 \(SMMUv3\), not 1"),
        (3, 1 << 32, "data must be a number of 4 bytes, as IDR5 is, not 0x100000000"),
    ]:
        with pytest.raises(ValueError, match=message):
            Features.from_idr(*good[:index], word, *good[index + 1 :])


@pytest.mark.parametrize("value", [6.0, "6", None, True])
def test_a_feature_of_several_bits_is_an_integer(value):
    with pytest.raises(TypeError, match="oas must be an integer, not "):
        Features(oas=value)


def test_one_bit_features_take_a_bool_and_all_become_plain_ints():
    f = Features(s2p=True, oas=np.int8(5))
    assert f == Features(s2p=1, oas=5)
    assert all(type(value) is int for value in dataclasses.asdict(f).values())
    with pytest.raises(TypeError, match="s2p must be an integer, not float"):
        Features(s2p=1.0)


def test_features_are_named_and_known():
    with pytest.raises(TypeError):
        Features(1)
    with pytest.raises(TypeError, match="nested"):
        Features(nested=1)
    with pytest.raises(TypeError, match="nested"):
        Features().replace(nested=1)


def test_features_cannot_be_changed():
    f = Features()
    with pytest.raises(dataclasses.FrozenInstanceError):
        f.oas = 5
    changed = f.replace(oas=5)
    assert (f.oas, changed.oas) == (6, 5)
    assert changed.replace(oas=6) == f


def test_features_can_be_keys_and_can_be_copied():
    f = Features(oas=5, sidsize=16)
    again = pickle.loads(pickle.dumps(f))
    assert f == again == copy.deepcopy(f)
    assert {f: "x"}[again] == "x"
    assert f != Features()
    assert len({f, again, Features()}) == 2


def test_the_repr_names_what_differs_and_reads_back():
    assert repr(Features()) == "Features()"
    assert repr(Features(pri=0, sidsize=8)) == "Features(pri=0, sidsize=8)"
    assert repr(Features(arch_minor=2, s2p=0)) == (
        "Features(s2p=0, hyp=0, vmw=0, ptwnnc=0, pasidtt=0, epan=0, ds=0, arch_minor=2)"
    )
    assert repr(raw(ttf=2)) == "Features.from_idr(0x8, 0x0, 0x0, 0x0, 0x0)"
    for seed in range(20):
        f = Features.from_idr(*words_with_known_codes(seed).values())
        assert eval(repr(f), {"Features": Features}) == f


def test_presets_are_what_they_are_named_for():
    minimal, full = Features.minimal(), Features.full()
    assert (minimal.s1p, minimal.s2p, minimal.arch_minor, minimal.oas_bits) == (1, 0, 0, 32)
    assert not any((minimal.ats, minimal.pri, minimal.msi, minimal.cd2l, minimal.ssidsize))
    assert registers(Features.qemu()) == (0x0D44101B, 0x02730010, 0x00001414, 0x00000074, 1)
    v3_0, v3_2 = Features.v3_0(), Features.v3_2()
    assert (v3_0.arch_minor, v3_0.oas_bits, v3_0.ril, v3_0.bbml, v3_0.ds) == (0, 48, 0, 0, 0)
    assert (v3_2.arch_minor, v3_2.oas_bits, v3_2.ril, v3_2.fwb, v3_2.xnx) == (2, 52, 1, 1, 1)
    for f in (v3_0, v3_2, full):
        assert (f.s1p, f.s2p, f.httu, f.ats, f.pri, f.stall_model) == (1, 1, 2, 1, 1, 0)
        assert f.stall_max > 0 and f.priqs == f.eventqs == f.cmdqs == 19
    assert full == Features()
    for f in (minimal, v3_0, v3_2, Features.qemu(), full):
        assert f.contradictions == ()
        assert features_module.modelled(f) == (f, {})
        assert Features.from_idr(*registers(f)) == f


def test_docstring_examples_hold():
    result = doctest.testmod(features_module)
    assert result.attempted >= 4
    assert result.failed == 0


# --- the generated declarations ---


def test_the_generated_file_is_current():
    module = importlib.import_module("smmufast.features")
    assert module._pxd() == (PACKAGE / "_facts/hw.pxd").read_text(encoding="utf-8")


def test_the_generator_prints_what_it_writes():
    program = [sys.executable, "-m", "smmufast.features"]
    done = subprocess.run(program, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, (PACKAGE / "_facts/hw.pxd").read_text())
    wrong = subprocess.run([*program, "--wrong"], cwd=PACKAGE.parent, capture_output=True)
    assert wrong.returncode == 1


def test_rules_have_every_feature_that_fits_a_byte():
    text = (PACKAGE / "_facts/hw.pxd").read_text()
    names = {each.name for each in dataclasses.fields(Features)}
    kept = set(re.findall(r"^    hw\.(\w+) = features\.\1$", text, re.M))
    assert kept <= names
    assert names - kept == {"oas", "gran4k", "gran16k", "gran64k", "arch_minor", "stall_max"}
