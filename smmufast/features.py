"""What an implementation has: the identification registers as one immutable value.

Encodes IHI 0070 2.9 and 6.3.1 to 6.3.6 (IDR0, IDR1, IDR3, IDR5) with AIDR. Positions are those of
the register records in `smmufast.layout`; the rules here are those on codes and on their
combination.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

from smmufast import layout
from smmufast._arguments import integer, must_be, one_of

__all__ = ["Contradiction", "Features", "modelled"]

_REGISTERS = ("IDR0", "IDR1", "IDR3", "IDR5", "AIDR")
#: The register and the field of each feature. ARCH_MAJOR is 0 for every SMMUv3: not a feature.
_FIELDS = {
    f.name.lower(): (register, f)
    for register in _REGISTERS
    for f in layout.REGISTERS[register].fields
    if f.name != "ARCH_MAJOR"
}


class Contradiction(NamedTuple):
    """What two or more features say against each other.

    >>> from smmufast import Features
    >>> wrong = Features.from_idr(0xd45101b, 0x2730010, 0x1414, 0x74, 1)
    >>> for contradiction in wrong.contradictions:
    ...     print(contradiction)
    pri=1 but ats=0: page requests need ATS (IHI 0070 6.3.1)
    """

    section: str
    """The section of IHI 0070 that has the rule."""
    names: tuple[str, ...]
    """The features: first the one that the rule is about, then those that it depends on."""
    text: str
    """What is wrong, with the codes."""

    def __str__(self) -> str:
        return f"{self.text} (IHI 0070 {self.section})"


# ------------------------------------------------------------------------------------------------
# The rules


class _Rule(NamedTuple):
    """What no implementation can have, and what follows where one side was not named."""

    section: str
    #: The feature that the rule is about, then those that it depends on.
    names: tuple[str, ...]
    broken: Callable[[Mapping[str, int]], Any]
    why: str
    #: What mends it: the first feature here that nobody named gets that code.
    follow: tuple[tuple[str, int], ...]

    def contradiction(self, codes: Mapping[str, int]) -> Contradiction:
        first, *others = (f"{name}={codes[name]}" for name in self.names)
        text = f"{first} but {', '.join(others)}: {self.why}"
        return Contradiction(self.section, self.names, text)


def _needs(section: str, name: str, needed: str, why: str) -> _Rule:
    """RES0 where another feature is absent."""
    return _Rule(section, (name, needed), lambda f: f[name] and not f[needed], why, ((name, 0),))


def _brings(section: str, name: str, other: str, why: str) -> _Rule:
    """Never without another feature, which follows when this one was named."""
    return _needs(section, name, other, why)._replace(follow=((name, 0), (other, 1)))


def _version(minor: int) -> str:
    return f"SMMUv3.{minor}"


def _since(name: str, minor: int, first: int = 1, below: int = 0) -> _Rule:
    """A feature of a version is in that version and the one before it alone (2.9)."""
    return _Rule(
        "2.9",
        (name, "arch_minor"),
        lambda f: f[name] >= first and f["arch_minor"] < minor - 1,
        f"it is of {_version(minor)}, and an implementation has no features of more than one "
        "version later",
        ((name, below),),
    )


def _res0_in_v3_0(section: str, name: str) -> _Rule:
    return _Rule(
        section,
        (name, "arch_minor"),
        lambda f: f[name] and not f["arch_minor"],
        "the field is RES0 in SMMUv3.0",
        ((name, 0),),
    )


def _mandatory(section: str, name: str, minor: int, *stages: str) -> _Rule:
    """A feature that every implementation from a version on has, if it has some stages."""
    where = f" with {' and '.join(stage.upper() for stage in stages)}" if stages else ""
    return _Rule(
        section,
        (name, "arch_minor", *stages),
        lambda f: f["arch_minor"] >= minor and all(f[s] for s in stages) and not f[name],
        f"it is mandatory from {_version(minor)} on{where}",
        ((name, 1), ("arch_minor", minor - 1)),
    )


def _d128_brings(name: str, stage: str) -> _Rule:
    return _Rule(
        "6.3.6",
        ("d128", name, stage),
        lambda f: f["d128"] and f[stage] and not f[name],
        f"128-bit descriptors come with {name.upper()}",
        (("d128", 0), (name, 1)),
    )


#: The names that belong to versions, and the version of each (2.4, 2.5, 2.6, 2.7, 2.8).
_VERSIONS = {
    2: ("bbml", "ril", "stt", "mpam", "fwb"),
    3: ("e0pd", "ptwnnc", "ecmdq", "atsrecerr", "rme_impl", "dpt"),
    4: ("ds", "epan", "the", "s1pi", "s2pi", "s2po", "d128", "aie", "mteperm", "pasidtt"),
}

_RULES: tuple[_Rule, ...] = (
    # Granules come first: without one nothing else can be right.
    _Rule(
        "6.3.6", ("ttf", "gran4k", "gran16k", "gran64k"),
        lambda f: f["ttf"] & 2 and not (f["gran4k"] or f["gran16k"] or f["gran64k"]),
        "VMSAv8-64 tables need a granule", (),
    ),
    _Rule(
        "6.3.6", ("gran4k", "ttf"), lambda f: f["ttf"] & 1 and not f["gran4k"],
        "VMSAv8-32 LPAE tables have the 4K granule", (("gran4k", 1), ("ttf", 2)),
    ),
    _Rule(
        "2.2", ("s1p", "s2p"), lambda f: not f["s1p"] and not f["s2p"],
        "an SMMU has at least one stage", (),
    ),
    # IDR0
    _needs("6.3.1", "atsrecerr", "ats", "there is no request to record an error of without ATS"),
    _brings("6.3.1", "vatos", "atos", "VATOS needs ATOS"),
    _needs("6.3.1", "vatos", "s1p", "VATOS needs both stages"),
    _needs("6.3.1", "vatos", "s2p", "VATOS needs both stages"),
    _needs("6.3.1", "vmw", "s2p", "VMIDs need stage 2"),
    _needs("6.3.1", "pri", "ats", "page requests need ATS"),
    _needs("6.3.1", "ns1ats", "ats", "the field is about ATS of stage 1 alone"),
    _needs("6.3.1", "ns1ats", "s1p", "stages can be split where there are both"),
    _needs("6.3.1", "ns1ats", "s2p", "stages can be split where there are both"),
    _needs("6.3.1", "hyp", "s1p", "EL2 contexts need both stages"),
    _needs("6.3.1", "hyp", "s2p", "EL2 contexts need both stages"),
    _mandatory("6.3.1", "hyp", 2, "s1p", "s2p"),
    _Rule(
        "6.3.1", ("ttf", "dpt"), lambda f: f["ttf"] & 1 and f["dpt"],
        "an SMMU with a device permission table has no VMSAv8-32 LPAE tables",
        (("dpt", 0), ("ttf", 2)),
    ),
    # IDR1
    _brings("6.3.2", "ecmdq", "cohacc", "enhanced command queues need coherent access"),
    _brings("6.3.2", "ecmdq", "msi", "enhanced command queues need MSIs"),
    _Rule(
        "6.3.2", ("queues_preset", "ecmdq"), lambda f: f["queues_preset"] and f["ecmdq"],
        "preset queues cannot be with enhanced command queues",
        (("ecmdq", 0), ("queues_preset", 0)),
    ),
    _Rule(
        "6.3.2", ("rel", "tables_preset", "queues_preset"),
        lambda f: f["rel"] and not f["tables_preset"] and not f["queues_preset"],
        "only preset bases can be relative", (("rel", 0),),
    ),
    _Rule(
        "6.3.2", ("st_level", "sidsize"), lambda f: f["sidsize"] >= 7 and f["st_level"] == 0,
        "from 7 bits on, two-level stream tables are needed", (("st_level", 1), ("sidsize", 6)),
    ),
    # IDR3
    _needs("6.3.4", "aie", "s1p", "attribute indices are of stage 1"),
    _needs("6.3.4", "mteperm", "s2p", "NoTagAccess is an encoding of stage 2"),
    _mandatory("6.3.4", "mteperm", 4, "s2p"),
    _needs("6.3.4", "the", "s1p", "translation hardening is of stage 1"),
    _Rule(
        "6.3.4", ("the", "s2pi", "s2p"), lambda f: f["the"] and f["s2p"] and not f["s2pi"],
        "with stage 2, translation hardening comes with permission indirection",
        (("the", 0), ("s2pi", 1)),
    ),
    _brings("6.3.4", "s2po", "s2pi", "permission overlays come with permission indirection"),
    _needs("6.3.4", "s2pi", "s2p", "it is of stage 2"),
    _needs("6.3.4", "s1pi", "s1p", "it is of stage 1"),
    _mandatory("6.3.4", "epan", 4),
    _needs("6.3.4", "pasidtt", "ats", "PASIDs of Translated transactions need ATS"),
    _needs("6.3.4", "pasidtt", "ssidsize", "PASIDs need SubstreamIDs"),
    _brings("6.3.4", "dpt", "ats", "a device permission table is for ATS"),
    _needs("6.3.4", "ptwnnc", "s2p", "it is about walks through stage 2"),
    _mandatory("6.3.4", "ptwnnc", 3, "s2p"),
    _mandatory("6.3.4", "e0pd", 3),
    _mandatory("6.3.4", "bbml", 2),
    _mandatory("6.3.4", "ril", 2),
    _mandatory("6.3.4", "fwb", 2),
    _needs("6.3.4", "pps", "pri", "automatic answers need page requests"),
    _needs("6.3.4", "pps", "ssidsize", "PASIDs need SubstreamIDs"),
    _res0_in_v3_0("6.3.4", "xnx"),
    _mandatory("6.3.4", "xnx", 1, "s2p"),
    _res0_in_v3_0("6.3.4", "pbha"),
    _brings("6.3.4", "pbha", "had", "page-based attributes come with HAD"),
    _needs("6.3.4", "had", "s1p", "hierarchical attributes are of stage 1"),
    _mandatory("6.3.4", "had", 1, "s1p"),
    # IDR5
    _Rule(
        "6.3.6", ("stall_max", "stall_model"), lambda f: f["stall_max"] and f["stall_model"] == 1,
        "nothing stalls", (("stall_max", 0),),
    ),
    _res0_in_v3_0("6.3.6", "vax"),
    _Rule(
        "6.3.6", ("vax", "d128"), lambda f: f["vax"] == 2 and not f["d128"],
        "56-bit addresses need 128-bit descriptors", (("vax", 1), ("d128", 1)),
    ),
    _Rule(
        "6.3.6", ("ds", "gran4k", "gran16k"),
        lambda f: f["ds"] and not f["gran4k"] and not f["gran16k"],
        "the 52-bit format is of those granules", (("ds", 0),),
    ),
    _brings("6.3.6", "ds", "vax", "the 52-bit format needs 52-bit virtual addresses"),
    _Rule(
        "6.3.6", ("vax", "gran64k", "ds"), lambda f: f["vax"] and not f["gran64k"] and not f["ds"],
        "52-bit virtual addresses need the 64K granule or DS", (("vax", 0),),
    ),
    _Rule(
        "6.3.6", ("d128", "ttf"), lambda f: f["d128"] and f["ttf"] != 2,
        "128-bit descriptors come with VMSAv8-64 tables, and with no VMSAv8-32 LPAE tables",
        (("d128", 0), ("ttf", 2)),
    ),
    _d128_brings("s1pi", "s1p"),
    _d128_brings("aie", "s1p"),
    _d128_brings("s2pi", "s2p"),
    _d128_brings("s2po", "s2p"),
    _d128_brings("mteperm", "s2p"),
    _Rule(
        "6.3.6", ("oas", "arch_minor"), lambda f: f["oas"] == 7 and f["arch_minor"] < 4,
        "56-bit addresses are of SMMUv3.4", (("oas", 6),),
    ),
    _Rule(
        "6.3.6", ("oas", "d128"), lambda f: f["oas"] == 7 and not f["d128"],
        "56-bit addresses need 128-bit descriptors", (("oas", 6), ("d128", 1)),
    ),
    _Rule(
        "6.3.6", ("oas", "arch_minor"), lambda f: f["oas"] == 6 and not f["arch_minor"],
        "the code is reserved in SMMUv3.0", (("oas", 5),),
    ),
    _Rule(
        "6.3.6", ("oas", "gran64k", "ds", "d128"),
        lambda f: f["oas"] == 6 and not f["gran64k"] and not f["ds"] and not f["d128"],
        "52-bit addresses need the 64K granule, DS or 128-bit descriptors", (("oas", 5),),
    ),
    # Versions
    *(_since(name, minor) for minor, names in _VERSIONS.items() for name in names),
    _since("httu", 4, first=3, below=2),
)  # fmt: skip


class _Default(int):
    """A code that nobody named: it follows from those that were."""


def _follow(codes: dict[str, int], named: Iterable[str], rules: Iterable[_Rule]) -> str | None:
    """Change codes that nobody named until no rule is broken.

    Returns
    -------
    str or None
        What the named codes contradict, if they do.
    """
    fixed = set(named)
    because: dict[str, _Rule] = {}
    # A code that was raised stays, and one can be lowered a few times: this ends.
    while broken := [rule for rule in rules if rule.broken(codes)]:
        for rule in broken:
            mend = next((each for each in rule.follow if each[0] not in fixed), None)
            if mend is not None:
                break
        else:
            return _refusal(codes, broken[0], because)
        name, code = mend
        if code > codes[name]:
            fixed.add(name)
        codes[name] = code
        because[name] = rule
    return None


def _refusal(codes: Mapping[str, int], rule: _Rule, because: Mapping[str, _Rule]) -> str:
    """Say what a rule refuses, and why codes that nobody named are what they are."""
    text = str(rule.contradiction(codes))
    told: set[str] = set()
    waiting = list(rule.names)
    while waiting:
        name = waiting.pop(0)
        if name in because and name not in told:
            told.add(name)
            others = [other for other in because[name].names if other != name]
            causes = " and ".join(f"{other}={codes[other]}" for other in others)
            text += f"; {name}={codes[name]} follows from {causes}"
            waiting += others
    return text


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Features:
    """The features of an SMMUv3 implementation, under their architectural names.

    Each attribute is the code in the field of that name of IDR0, IDR1, IDR3, IDR5 or AIDR, so
    ``oas=5`` means 48 bits and ``ttf=2`` AArch64 tables. One-bit fields also take a bool. What
    each means is in the table: ``print(layout.format("IDR0", features.idr0, zeros=True))``.

    What is named is kept, and what is not named follows from it: by default it is all that this
    library models, without what a feature that was named excludes. Without ATS there are no page
    requests; an SMMU without range invalidation is an SMMUv3.1, for from v3.2 on it is mandatory.
    Features that were named and contradict each other (2.9, 6.3.1 to 6.3.6) are refused.

    >>> Features(oas=5, sidsize=16)
    Features(sidsize=16, oas=5)
    >>> Features(ats=0)
    Features(ats=0, pri=0, atsrecerr=0, pasidtt=0)
    >>> Features(ril=0).arch_minor
    1
    >>> Features(ats=0, pri=1)
    Traceback (most recent call last):
    ValueError: pri=1 but ats=0: page requests need ATS (IHI 0070 6.3.1)
    >>> hex(Features().idr5)
    '0xffff04f6'
    >>> Features.from_idr(0xd44101b, 0x2730010, 0x1414, 0x74, 0).oas_bits
    44

    Raises
    ------
    TypeError
        If a value is not an integer, or a feature of several bits is a bool.
    ValueError
        If a code is reserved, or features that were named contradict each other.
    """

    # IDR0
    s2p: int = _Default(1)
    s1p: int = _Default(1)
    ttf: int = _Default(2)
    cohacc: int = _Default(1)
    btm: int = _Default(0)
    httu: int = _Default(2)
    dormhint: int = _Default(0)
    hyp: int = _Default(1)
    ats: int = _Default(1)
    ns1ats: int = _Default(0)
    asid16: int = _Default(1)
    msi: int = _Default(1)
    sev: int = _Default(1)
    atos: int = _Default(0)
    pri: int = _Default(1)
    vmw: int = _Default(1)
    vmid16: int = _Default(1)
    cd2l: int = _Default(1)
    vatos: int = _Default(0)
    ttendian: int = _Default(0)
    atsrecerr: int = _Default(1)
    stall_model: int = _Default(0)
    term_model: int = _Default(0)
    st_level: int = _Default(1)
    rme_impl: int = _Default(0)
    # IDR1
    sidsize: int = _Default(32)
    ssidsize: int = _Default(20)
    priqs: int = _Default(19)
    eventqs: int = _Default(19)
    cmdqs: int = _Default(19)
    attr_perms_ovr: int = _Default(1)
    attr_types_ovr: int = _Default(1)
    rel: int = _Default(0)
    queues_preset: int = _Default(0)
    tables_preset: int = _Default(0)
    ecmdq: int = _Default(0)
    # IDR3
    had: int = _Default(1)
    pbha: int = _Default(0)
    xnx: int = _Default(1)
    pps: int = _Default(0)
    mpam: int = _Default(0)
    fwb: int = _Default(1)
    stt: int = _Default(1)
    ril: int = _Default(1)
    bbml: int = _Default(2)
    e0pd: int = _Default(1)
    ptwnnc: int = _Default(1)
    dpt: int = _Default(0)
    pasidtt: int = _Default(1)
    epan: int = _Default(1)
    s1pi: int = _Default(0)
    s2pi: int = _Default(0)
    s2po: int = _Default(0)
    the: int = _Default(0)
    mteperm: int = _Default(0)
    aie: int = _Default(0)
    # IDR5
    oas: int = _Default(6)
    gran4k: int = _Default(1)
    gran16k: int = _Default(1)
    gran64k: int = _Default(1)
    ds: int = _Default(1)
    d128: int = _Default(0)
    vax: int = _Default(1)
    stall_max: int = _Default(0xFFFF)
    # AIDR
    arch_minor: int = _Default(3)

    # S3.3.1.2-5, S6.3.1-5, S6.3.1-6, S6.3.1-8, S6.3.1-9, S6.3.1-10, S6.3.1-12, S6.3.1-13,
    # S6.3.1-14, S6.3.1-15, S6.3.2-3, S6.3.2-4, S6.3.2-7, S6.3.2-11, S6.3.4-5, S6.3.4-6, S6.3.4-7,
    # S6.3.4-8, S6.3.4-9, S6.3.4-10, S6.3.4-11, S6.3.4-12, S6.3.4-13, S6.3.4-15, S6.3.4-16,
    # S6.3.4-17, S6.3.6-4, S6.3.6-5, S6.3.6-6, S6.3.6-7, S6.3.6-8, S6.3.6-9, S6.3.6-10, S6.3.6-11
    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in _FIELDS}
        named = {name for name, value in given.items() if type(value) is not _Default}
        codes = {name: _code(name, value) for name, value in given.items()}
        refusal = _follow(codes, named, _RULES)
        if refusal:
            raise ValueError(refusal)
        self._set(codes)

    def _set(self, codes: Mapping[str, int]) -> None:
        for name, code in codes.items():
            object.__setattr__(self, name, code)

    @classmethod
    def _raw(cls, codes: Mapping[str, int]) -> Self:
        """Features with these codes, whatever they say against each other."""
        made = object.__new__(cls)
        made._set(codes)
        return made

    # S2.9-1, S2.9-2, S3.3.2-24, S3.21.1.1-1
    @property
    def contradictions(self) -> tuple[Contradiction, ...]:
        """What the features say against each other: only `from_idr` makes such Features.

        >>> Features().contradictions
        ()
        """
        codes = self._codes()
        return tuple(rule.contradiction(codes) for rule in _RULES if rule.broken(codes))

    def _codes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in _FIELDS}

    def _changed(self) -> list[str]:
        """The names of the features that are not those of ``Features()``."""
        return [f.name for f in fields(self) if getattr(self, f.name) != f.default]

    def _repr_html_(self) -> str:
        from smmufast._html import table

        names = (*(register.lower() for register in _REGISTERS), *self._changed())
        pairs = [(name, getattr(self, name)) for name in names]
        said = [("contradiction", str(one)) for one in self.contradictions]
        return table("Features", [*pairs, *said])

    def __repr__(self) -> str:
        if self.contradictions:
            words = (self._register(register) for register in _REGISTERS)
            return f"Features.from_idr({', '.join(f'{word:#x}' for word in words)})"
        changed = (f"{name}={getattr(self, name)}" for name in self._changed())
        return f"Features({', '.join(changed)})"

    @classmethod
    def minimal(cls) -> Self:
        """Return an SMMUv3.0 with as little as the architecture admits.

        Stage 1 with 4K tables, 6-bit StreamIDs in a linear table, no substreams, 32-bit output
        addresses, faults that always abort.

        >>> Features.minimal().oas_bits
        32
        """
        return cls(
            **dict.fromkeys(_FIELDS, 0)
            | {"s1p": 1, "ttf": 2, "ttendian": 2, "stall_model": 1, "term_model": 1,
               "sidsize": 6, "gran4k": 1},
        )  # fmt: skip

    @classmethod
    def v3_0(cls) -> Self:
        """Return an SMMUv3.0 server: both stages, PCIe ATS and PRI, stalls; 48-bit addresses."""
        return cls.full().replace(
            httu=2, ril=0, bbml=0, had=0, xnx=0, fwb=0, stt=0, e0pd=0, epan=0, ptwnnc=0,
            pasidtt=0, pps=0, atsrecerr=0, oas=5, ds=0, vax=0, arch_minor=0,
        )  # fmt: skip

    @classmethod
    def v3_2(cls) -> Self:
        """Return an SMMUv3.2: as v3.0, with 52-bit addresses, range invalidation, S2FWB, XNX."""
        return cls.full().replace(e0pd=0, epan=0, ptwnnc=0, pasidtt=0, ds=0, arch_minor=2)

    @classmethod
    def qemu(cls) -> Self:
        """Return what the SMMUv3 of QEMU 11 presents with both stages.

        >>> hex(Features.qemu().idr0)
        '0xd44101b'
        """
        return cls.from_idr(0x0D44_101B, 0x0273_0010, 0x1414, 0x74, 1)

    @classmethod
    def full(cls) -> Self:
        """Return an SMMUv3.3 with everything that this library models."""
        return cls()

    # S6.3.8-3
    @classmethod
    def from_idr(cls, idr0: int, idr1: int, idr3: int, idr5: int, aidr: int) -> Self:
        """Return the features that the identification registers tell; RES0 bits are ignored.

        Registers are kept as they are given, as those of an implementation that has to be
        described however wrong it is: `contradictions` lists what is.

        Raises
        ------
        ValueError
            If a value has more than 32 bits, AIDR is not that of an SMMUv3, or a code is reserved.
        """
        values: dict[str, int] = {}
        for register, word in zip(_REGISTERS, (idr0, idr1, idr3, idr5, aidr), strict=True):
            values |= layout.unpack(register, word)
        if major := values.pop("ARCH_MAJOR"):
            raise ValueError(must_be("ARCH_MAJOR of aidr", "0 (SMMUv3)", major))
        return cls._raw({n.lower(): _code(n.lower(), value) for n, value in values.items()})

    def _register(self, register: str) -> int:
        mine = {name: getattr(self, name) for name, (of, _) in _FIELDS.items() if of == register}
        return layout.pack(register, **mine)

    # S3.15-2, S6.3.1-1, S6.3.1-3
    @property
    def idr0(self) -> int:
        """The register IDR0."""
        return self._register("IDR0")

    # S3.16-2, S6.3.2-1
    @property
    def idr1(self) -> int:
        """The register IDR1."""
        return self._register("IDR1")

    # S6.3.4-1, S6.3.4-3
    @property
    def idr3(self) -> int:
        """The register IDR3."""
        return self._register("IDR3")

    # S6.3.6-1
    @property
    def idr5(self) -> int:
        """The register IDR5."""
        return self._register("IDR5")

    # S2.1-1, S6.3.8-1
    @property
    def aidr(self) -> int:
        """The register AIDR."""
        return self._register("AIDR")

    @property
    def oas_bits(self) -> int:
        """Output address size in bits: codes an architecture version lacks act as its largest."""
        largest = 7 if self.arch_minor >= 4 else 6 if self.arch_minor >= 1 else 5
        return layout.OUTPUT_BITS[min(self.oas, largest)]

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values for some features.

        The others stay, unless what is named here excludes them: then they follow, as in the
        constructor.

        >>> Features().replace(ds=0, vax=0, oas=5).oas_bits
        48
        >>> Features.qemu().replace(s2p=0).vmid16, Features.v3_0().replace(s2p=0).vmw
        (1, 0)

        Raises
        ------
        TypeError
            If there is no such feature, or a value is not an integer.
        ValueError
            If a code is reserved, or features that were named contradict each other or what
            cannot follow.
        """
        for name in changes:
            if name not in _FIELDS:
                raise TypeError(f"{name!r} is not a feature: the names are those of the attributes")
        others = {name: _Default(code) for name, code in self._codes().items()}
        return type(self)(**others | changes)


def _code(name: str, value: Any) -> int:
    """The code of a feature as a plain int, once it is one that there is."""
    field = _FIELDS[name][1]
    if field.width == 1 and isinstance(value, bool):
        return int(value)
    limit = _LIMITS.get(name, (1 << field.width) - 1)
    code = integer(name, value, limit)
    if field.name_of(code).startswith("reserved"):
        codes = (other for other in range(limit + 1) if other != code)
        one_of(name, code, [o for o in codes if not field.name_of(o).startswith("reserved")])
    return code


#: Largest codes, where the field could hold more.
_LIMITS = {
    "sidsize": 32,
    "ssidsize": 20,
    "priqs": 19,
    "eventqs": 19,
    "cmdqs": 19,
    "arch_minor": 4,
}


#: What this version does not model: field, the value it must have.
UNMODELLED = {
    "ttf": 2, "mpam": 0, "btm": 0, "atos": 0, "vatos": 0, "ecmdq": 0, "rme_impl": 0, "d128": 0,
    "s1pi": 0, "s2pi": 0, "s2po": 0, "the": 0, "aie": 0, "dpt": 0, "mteperm": 0,
}  # fmt: skip


# S6.3.2-6
def modelled(features: Features) -> tuple[Features, dict[str, int]]:
    """What this version models of some features, and what it leaves out.

    What depends on something left out goes with it. Contradictions of raw registers stay as they
    are.

    Returns
    -------
    (Features, dict)
        The features with unmodelled ones taken away, and the fields taken: name to old value.
    """
    before = features._codes()
    wanted = UNMODELLED | {"vax": min(features.vax, 1), "httu": min(features.httu, 2)}
    codes = before | wanted
    if codes == before:
        return features, {}
    rules = [rule for rule in _RULES if not rule.broken(before)]
    _follow(codes, wanted.keys() - {"vax"}, rules)
    taken = {name: code for name, code in before.items() if codes[name] != code}
    return type(features)._raw(codes), taken


# --- the generated Cython declarations -----------------------------------------------------------

_HW = '''\
"""What rules ask of an implementation: its features, and what its registers say.

Generated by "python -m smmufast.features --write" from features.py; do not edit.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef struct Hw:
    uint64_t strtab        # first address of the stream table, aligned
    uint64_t oas_over      # address bits beyond the output address size
    uint64_t pointer_mask  # address bits of a structure's pointer field, from bit 6
    uint64_t generation    # how often registers were written: what was decoded before is old
    uint32_t cr0, cr2
    uint8_t gbpa_abort, gbpa_attr, gbpa_sh
    uint8_t two_level      # stream table format
    uint8_t log2size       # StreamIDs covered, effective
    uint8_t split
    uint8_t ignore_s2ptw   # as implementations without memory attributes do
    uint8_t oas            # bits, effective
    uint8_t minor          # architecture version 3.minor
    uint32_t granules      # bit 12, 14, 16: the granule is implemented
    # the codes of Features
'''

#: What `Hw` has in another form, which `Registers` works out, and what is wider than a byte.
_OTHERWISE = ("oas", "gran4k", "gran16k", "gran64k", "arch_minor", "stall_max")


def _pxd() -> str:
    """Return the text of _facts/hw.pxd."""
    names = [each.name for each in fields(Features) if each.name not in _OTHERWISE]
    parts = [_HW, *(f"    uint8_t {name}\n" for name in names)]
    parts.append("\n\ncdef inline int hw_features(Hw* hw, object features) except -1:\n")
    parts.append('    """Take the codes of Features as they are."""\n')
    parts += [f"    hw.{name} = features.{name}\n" for name in names]
    return "".join([*parts, "    return 0\n"])


def _main(arguments: list[str]) -> None:
    from pathlib import Path

    if arguments not in ([], ["--write"]):
        raise SystemExit("usage: python -m smmufast.features [--write]")
    if arguments:
        Path(__file__).parent.joinpath("_facts/hw.pxd").write_text(_pxd(), encoding="utf-8")
    else:
        print(_pxd(), end="")


if __name__ == "__main__":
    import sys

    _main(sys.argv[1:])
