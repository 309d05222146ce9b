"""Features: the identification registers both ways, and what is refused."""

import copy
import dataclasses
import doctest
import pickle
import random

import numpy as np
import pytest

from smmufast import features as features_module
from smmufast import layout
from smmufast.features import Features

REGISTERS = ("IDR0", "IDR1", "IDR3", "IDR5", "AIDR")


def registers(features):
    return tuple(getattr(features, name.lower()) for name in REGISTERS)


def named_bits(name):
    return sum(((1 << f.width) - 1) << f.lsb for f in layout.REGISTERS[name].fields)


def legal_words(seed):
    """Random register words, with random RES0 bits, whose codes are legal together."""
    rng = random.Random(seed)
    words = {name: rng.getrandbits(32) for name in REGISTERS}

    def put(register, **values):
        for field, value in values.items():
            f = layout.REGISTERS[register].field(field)
            words[register] &= ~(((1 << f.width) - 1) << f.lsb)
            words[register] |= value << f.lsb

    ttf = rng.choice((1, 2, 3))
    granules = rng.choice([(1, 0, 0), (1, 1, 1), (1, 0, 1)] + [(0, 1, 0), (0, 0, 1)] * (ttf == 2))
    sidsize = rng.randint(0, 32)
    put("IDR0", TTF=ttf, TTENDIAN=rng.choice((0, 2, 3)), STALL_MODEL=rng.choice((0, 1, 2)),
        ST_LEVEL=1 if sidsize >= 7 else rng.choice((0, 1)))  # fmt: skip
    put("IDR1", SIDSIZE=sidsize, SSIDSIZE=rng.randint(0, 20), PRIQS=rng.randint(0, 19),
        EVENTQS=rng.randint(0, 19), CMDQS=rng.randint(0, 19))  # fmt: skip
    put("IDR3", BBML=rng.choice((0, 1, 2)))
    vax = rng.choice((0, 1, 2))
    put("IDR5", GRAN4K=granules[0], GRAN16K=granules[1], GRAN64K=granules[2], VAX=vax,
        DS=rng.choice((0, 1)) if vax and granules[:2] != (0, 0) else 0)  # fmt: skip
    put("AIDR", ARCH_MAJOR=0, ARCH_MINOR=rng.randint(0, 4))
    return words


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
    words = legal_words(seed)
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
    assert [Features(oas=oas, arch_minor=minor).oas_bits for oas in range(8)] == bits


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ttf": 0}, "ttf: table formats: 0 is a reserved code"),
        ({"ttendian": 1}, "ttendian: .*: 1 is a reserved code"),
        ({"stall_model": 3}, "stall_model: stalls: 3 is a reserved code"),
        ({"st_level": 2}, "st_level: stream table: 2 is a reserved code"),
        ({"st_level": 3}, "st_level: stream table: 3 is a reserved code"),
        ({"bbml": 3}, "bbml: .*: 3 is a reserved code"),
        ({"vax": 3}, "vax: .*: 3 is a reserved code"),
        ({"sidsize": 33}, "sidsize: .*: 33 is not within 0 to 32"),
        ({"ssidsize": 21}, "ssidsize: .*: 21 is not within 0 to 20"),
        ({"priqs": 20}, "priqs: .*: 20 is not within 0 to 19"),
        ({"eventqs": 20}, "eventqs: .*: 20 is not within 0 to 19"),
        ({"cmdqs": 20}, "cmdqs: .*: 20 is not within 0 to 19"),
        ({"oas": 8}, "oas: .*: 8 is not within 0 to 7"),
        ({"arch_minor": 5}, "arch_minor: .*: 5 is not within 0 to 4"),
        ({"stall_max": 1 << 16}, "stall_max: .*: 65536 is not within 0 to 65535"),
        ({"s2p": 2}, "s2p: stage 2: 2 is not within 0 to 1"),
        ({"s2p": -1}, "s2p: stage 2: -1 is not within 0 to 1"),
        ({"st_level": 0, "sidsize": 7}, "st_level=0 but sidsize=7: .*two-level"),
        ({"ttf": 3, "gran4k": 0}, "gran4k=0 but ttf=3: .*4K granule"),
        ({"gran4k": 0, "gran16k": 0, "gran64k": 0, "ds": 0}, "ttf=2 but .* need a granule"),
        ({"gran4k": 0, "gran16k": 0}, "ds=1 but gran4k=gran16k=0"),
        ({"vax": 0}, "ds=1 but vax=0"),
    ],
)
def test_what_contradicts_the_architecture_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Features(**changes)
    with pytest.raises(ValueError, match=f"^{message}"):
        Features().replace(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"st_level": 0, "sidsize": 6},
        {"gran4k": 0, "gran16k": 0, "ds": 0},
        {"gran4k": 0},
        {"ds": 0, "vax": 0},
        {"sidsize": 0, "ssidsize": 0, "eventqs": 0},
        {"ril": 0, "bbml": 0},
        {"vax": 2, "oas": 7, "arch_minor": 4},
    ],
)
def test_what_is_legal_at_the_edges_is_accepted(changes):
    f = Features(**changes)
    assert {name: getattr(f, name) for name in changes} == changes
    assert Features.from_idr(*registers(f)) == f


def test_reserved_codes_in_registers_are_refused():
    good = registers(Features())
    for index, word, message in [
        (0, good[0] & ~0b1100, "ttf: .* reserved"),
        (1, good[1] | 0x3F, "sidsize: .*63 is not within 0 to 32"),
        (4, 0x13, "aidr: ARCH_MAJOR is 1; 0 is SMMUv3"),
        (3, 1 << 32, "0x100000000 is not a IDR5: it has 4 bytes"),
    ]:
        with pytest.raises(ValueError, match=message):
            Features.from_idr(*good[:index], word, *good[index + 1 :])


@pytest.mark.parametrize("value", [6.0, "6", None, True])
def test_a_feature_of_several_bits_is_an_integer(value):
    with pytest.raises(TypeError, match="oas: output address size: an integer is wanted"):
        Features(oas=value)


def test_one_bit_features_take_a_bool_and_all_become_plain_ints():
    f = Features(s2p=True, oas=np.int8(5))
    assert f == Features(s2p=1, oas=5)
    assert all(type(value) is int for value in dataclasses.asdict(f).values())
    with pytest.raises(TypeError, match="s2p: stage 2: an integer is wanted, not float"):
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
    assert repr(Features(arch_minor=2, s2p=0)) == "Features(s2p=0, arch_minor=2)"
    for seed in range(20):
        f = Features.from_idr(*legal_words(seed).values())
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
        assert features_module.modelled(f) == (f, {})
        assert Features.from_idr(*registers(f)) == f


def test_docstring_examples_hold():
    result = doctest.testmod(features_module)
    assert result.attempted >= 4
    assert result.failed == 0
