"""What an implementation has: the identification registers as one immutable value.

Encodes IHI 0070 6.3 (IDR0, IDR1, IDR3, IDR5, AIDR). Positions are those of the register records
in `smmufast.layout`; the rules here are those on codes and on their combination.
"""

import operator
from dataclasses import dataclass, fields
from dataclasses import replace as _replace
from typing import Any, Self

from smmufast import layout

__all__ = ["Features", "modelled"]

_REGISTERS = ("IDR0", "IDR1", "IDR3", "IDR5", "AIDR")
#: The register and the field of each feature. ARCH_MAJOR is 0 for every SMMUv3: not a feature.
_FIELDS = {
    f.name.lower(): (register, f)
    for register in _REGISTERS
    for f in layout.REGISTERS[register].fields
    if f.name != "ARCH_MAJOR"
}


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Features:
    """The features of an SMMUv3 implementation, under their architectural names.

    Each attribute is the code in the field of that name of IDR0, IDR1, IDR3, IDR5 or AIDR, so
    ``oas=5`` means 48 bits and ``ttf=2`` AArch64 tables. One-bit fields also take a bool. The
    defaults are all that this library models. What each means is in the table:
    ``print(layout.format("IDR0", features.idr0, zeros=True))``.

    What an architecture version makes mandatory is not required: an SMMUv3.2 without range
    invalidation can be described.

    >>> Features(oas=5, sidsize=16)
    Features(sidsize=16, oas=5)
    >>> hex(Features().idr5)
    '0xffff04f6'
    >>> Features.from_idr(0xd44101b, 0x2730010, 0x1414, 0x74, 0).oas_bits
    44

    Raises
    ------
    TypeError
        If a value is not an integer, or a feature of several bits is a bool.
    ValueError
        If a code is reserved, or features contradict each other.
    """

    # IDR0
    s2p: int = 1
    s1p: int = 1
    ttf: int = 2
    cohacc: int = 1
    btm: int = 0
    httu: int = 2
    dormhint: int = 0
    hyp: int = 1
    ats: int = 1
    ns1ats: int = 0
    asid16: int = 1
    msi: int = 1
    sev: int = 1
    atos: int = 0
    pri: int = 1
    vmw: int = 1
    vmid16: int = 1
    cd2l: int = 1
    vatos: int = 0
    ttendian: int = 0
    atsrecerr: int = 1
    stall_model: int = 0
    term_model: int = 0
    st_level: int = 1
    rme_impl: int = 0
    # IDR1
    sidsize: int = 32
    ssidsize: int = 20
    priqs: int = 19
    eventqs: int = 19
    cmdqs: int = 19
    attr_perms_ovr: int = 1
    attr_types_ovr: int = 1
    rel: int = 0
    queues_preset: int = 0
    tables_preset: int = 0
    ecmdq: int = 0
    # IDR3
    had: int = 1
    pbha: int = 0
    xnx: int = 1
    pps: int = 0
    mpam: int = 0
    fwb: int = 1
    stt: int = 1
    ril: int = 1
    bbml: int = 2
    e0pd: int = 1
    ptwnnc: int = 1
    dpt: int = 0
    pasidtt: int = 1
    epan: int = 1
    s1pi: int = 0
    s2pi: int = 0
    s2po: int = 0
    the: int = 0
    mteperm: int = 0
    aie: int = 0
    # IDR5
    oas: int = 6
    gran4k: int = 1
    gran16k: int = 1
    gran64k: int = 1
    ds: int = 1
    d128: int = 0
    vax: int = 1
    stall_max: int = 0xFFFF
    # AIDR
    arch_minor: int = 3

    def __post_init__(self) -> None:
        for name, (_, field) in _FIELDS.items():
            value = getattr(self, name)
            if isinstance(value, bool) and field.width > 1:
                raise TypeError(f"{name}: {field.doc}: an integer is wanted, not {value}")
            try:
                code = operator.index(value)
            except TypeError:
                raise TypeError(
                    f"{name}: {field.doc}: an integer is wanted, not {type(value).__name__}"
                ) from None
            limit = _LIMITS.get(name, (1 << field.width) - 1)
            if not 0 <= code <= limit:
                raise ValueError(f"{name}: {field.doc}: {code} is not within 0 to {limit}")
            if field.name_of(code).startswith("reserved"):
                raise ValueError(f"{name}: {field.doc}: {code} is a reserved code")
            object.__setattr__(self, name, code)
        for broken, message in (
            (
                self.sidsize >= 7 and self.st_level == 0,
                f"st_level=0 but sidsize={self.sidsize}: from 7 bits on, two-level stream tables "
                "are needed",
            ),
            (
                self.ttf & 1 and not self.gran4k,
                f"gran4k=0 but ttf={self.ttf}: VMSAv8-32 LPAE tables have the 4K granule",
            ),
            (
                self.ttf & 2 and not (self.gran4k or self.gran16k or self.gran64k),
                f"ttf={self.ttf} but gran4k=gran16k=gran64k=0: VMSAv8-64 tables need a granule",
            ),
            (
                self.ds and not (self.gran4k or self.gran16k),
                "ds=1 but gran4k=gran16k=0: the 52-bit format is of those granules",
            ),
            (
                self.ds and self.vax == 0,
                "ds=1 but vax=0: the 52-bit format needs 52-bit virtual addresses",
            ),
        ):
            if broken:
                raise ValueError(message)

    def __repr__(self) -> str:
        changed = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return f"Features({', '.join(f'{f.name}={getattr(self, f.name)}' for f in changed)})"

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

    @classmethod
    def from_idr(cls, idr0: int, idr1: int, idr3: int, idr5: int, aidr: int) -> Self:
        """Return the features that the identification registers tell; RES0 bits are ignored.

        Raises
        ------
        ValueError
            If a value has more than 32 bits, AIDR is not that of an SMMUv3, a code is reserved,
            or features contradict each other.
        """
        values: dict[str, int] = {}
        for register, word in zip(_REGISTERS, (idr0, idr1, idr3, idr5, aidr), strict=True):
            values |= layout.unpack(register, word)
        if major := values.pop("ARCH_MAJOR"):
            raise ValueError(f"aidr: ARCH_MAJOR is {major}; 0 is SMMUv3")
        return cls(**{name.lower(): value for name, value in values.items()})

    def _register(self, register: str) -> int:
        mine = {name: getattr(self, name) for name, (of, _) in _FIELDS.items() if of == register}
        return layout.pack(register, **mine)

    @property
    def idr0(self) -> int:
        """The register IDR0."""
        return self._register("IDR0")

    @property
    def idr1(self) -> int:
        """The register IDR1."""
        return self._register("IDR1")

    @property
    def idr3(self) -> int:
        """The register IDR3."""
        return self._register("IDR3")

    @property
    def idr5(self) -> int:
        """The register IDR5."""
        return self._register("IDR5")

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

        >>> Features().replace(ds=0, vax=0, oas=5).oas_bits
        48

        Raises
        ------
        TypeError
            If there is no such feature, or a value is not an integer.
        ValueError
            If a code is reserved, or features contradict each other.
        """
        return _replace(self, **changes)


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


def modelled(features: Features) -> tuple[Features, dict[str, int]]:
    """What this version models of some features, and what it leaves out.

    Returns
    -------
    (Features, dict)
        The features with unmodelled ones taken away, and the fields taken: name to old value.
    """
    wanted = UNMODELLED | {"vax": min(features.vax, 1), "httu": min(features.httu, 2)}
    taken = {
        name: getattr(features, name)
        for name, value in wanted.items()
        if getattr(features, name) != value
    }
    return features.replace(**{name: wanted[name] for name in taken}), taken
