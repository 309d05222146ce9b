"""Features with any codes, as raw ID registers have them: what random tests read tables with."""

from dataclasses import fields

from smmufast import Features, layout

NAMES = [field.name for field in fields(Features)]
_REGISTERS = ("IDR0", "IDR1", "IDR3", "IDR5", "AIDR")


def raw(**codes):
    """Features with these codes, 0 where none is given, whatever they say against each other."""
    words = []
    for register in _REGISTERS:
        names = {f.name.lower(): f.name for f in layout.REGISTERS[register].fields}
        of_it = {real: codes.pop(name) for name, real in names.items() if name in codes}
        words.append(layout.pack(register, **of_it))
    assert not codes, f"no such feature: {', '.join(codes)}"
    return Features.from_idr(*words)


def raw_of(features, **changes):
    """Features with the codes that another object has as attributes, some of them changed."""
    return raw(**{name: getattr(features, name) for name in NAMES} | changes)
