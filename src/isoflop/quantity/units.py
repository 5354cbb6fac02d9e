"""Sizes, counts and durations, printed and read as people write them.

Inside isoflop a byte is a byte and a count an integer; GB (10^9) and GiB (2^30)
exist only here, and the text always says which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from isoflop.errors import InputError, Problem
from isoflop.quantity.expr import Value

_MILLIONS = (("M", 6), ("B", 9), ("T", 12), ("Qa", 15), ("Qi", 18))
_SI = (("", 0), ("k", 3), ("M", 6), ("G", 9), ("T", 12), ("P", 15), ("E", 18), ("Z", 21), ("Y", 24))
_COUNT = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_BYTES = {f"{p}B": 1000**i for i, p in enumerate(["", *"kMGTPE"])} | {
    f"{p}iB": 1024**i for i, p in enumerate("KMGTPE", start=1)
}
_SECONDS = {
    "": Fraction(1),
    "ns": Fraction(1, 10**9), "us": Fraction(1, 10**6), "ms": Fraction(1, 1000),
    "s": Fraction(1), "min": Fraction(60), "h": Fraction(3600), "d": Fraction(86400),
}  # fmt: skip
#: from how many seconds on, in units of how many, called what
_DURATIONS = (
    (172_800.0, 86_400.0, "days"), (7200.0, 3600.0, "h"), (120.0, 60.0, "min"), (1.0, 1.0, "s"),
    (1e-3, 1e-3, "ms"), (1e-6, 1e-6, "µs"),
)  # fmt: skip
#: Digits, whole or in threes: 2,5 is no number, for it may be meant as two and a half.
GROUPED = r"(?:[0-9]{1,3}(?:[,_][0-9]{3}){1,13}|[0-9]{1,41})"
_NUMBER = re.compile(
    rf"([+-]?{GROUPED}(?:\.[0-9]{{0,20}})?(?:e[+-]?[0-9]{{1,3}})?)\s*([a-zµ]*)", re.IGNORECASE
)


def format_count(value: Value) -> str:
    """A count in four digits; a suffix from a million on.

    >>> format_count(174_604_259_328), format_count(184_832), format_count(96)
    ('174.6 B', '184,800', '96')
    """
    count = float(value)
    if 1000 <= abs(count) < 0.99995e6:
        return f"{float(f'{count:.4g}'):,.0f}"
    return _scaled(count, _MILLIONS) if abs(count) >= 1000 else _digits(count)


def format_si(value: Value, unit: str) -> str:
    """A value with a unit and a decimal prefix.

    >>> format_si(3.143e23, "FLOP"), format_si(989.4e12, "FLOP/s")
    ('314.3 ZFLOP', '989.4 TFLOP/s')
    """
    text = _scaled(float(value), _SI)
    return f"{text}{unit}" if text[-1].isalpha() else f"{text} {unit}"


def format_bytes(value: Value) -> str:
    """Bytes in decimal units.

    >>> format_bytes(349_208_518_656)
    '349.2 GB'
    """
    return format_si(value, "B")


def format_seconds(value: Value) -> str:
    """A duration in the unit a person would pick.

    >>> format_seconds(0.0213), format_seconds(2_930_000)
    ('21.3 ms', '33.91 days')
    """
    seconds = float(value)
    for least, unit, name in _DURATIONS:
        if abs(seconds) >= least:
            return f"{_digits(seconds / unit)} {name}"
    return f"{_digits(seconds * 1e9)} ns"


def format_value(value: Value, unit: str) -> str:
    """A value with its unit, the way tables print it.

    >>> format_value(12_000, "params"), format_value(1.5, "dollars"), format_value(39_012, "dollars")
    ('12,000 params', '$1.50', '$39,010')
    """
    match unit:
        case "bytes":
            return format_bytes(value)
        case "seconds":
            return format_seconds(value)
        case "flops":
            return format_si(value, "FLOP")
        case "dollars":
            dollars = float(value)
            return f"${dollars:,.2f}" if abs(dollars) < 1e3 else f"${format_count(dollars)}"
        case "joules":
            return f"{_digits(float(value) / 3.6e9)} MWh"
        case _:
            return f"{format_count(value)} {unit}".rstrip()


def format_rounded(value: Value, unit: str) -> str:
    """A modelled number in the three digits that it deserves.

    >>> format_rounded(0.01, "seconds"), format_rounded(5164.5, "tokens/s")
    ('10.0 ms', '5,160')
    >>> format_rounded(12.99, "dollars"), format_rounded(4.282e6, "hours"), format_rounded(0.351, "dollars")
    ('$13.0', '4.28 M', '$0.35')
    """
    rounded = float(f"{float(value):.3g}")
    if unit == "dollars":
        return f"${rounded:.2f}" if 0.1 <= rounded < 10 else f"${_rounded(rounded)}"
    if unit != "seconds":
        return _rounded(rounded)
    steps = (*_DURATIONS, (0.0, 1e-9, "ns"))
    size, name = next((size, name) for least, size, name in steps if rounded >= least)
    return f"{_three(rounded / size)} {name}"


def _rounded(value: float) -> str:
    power, suffix = max(((p, s) for s, p in _MILLIONS if value >= 10**p), default=(0, ""))
    return f"{_three(value / 10**power)} {suffix}".rstrip()


def _three(value: float) -> str:
    """Three digits with their zeros, no more than are known."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def format_exact(value: Value) -> str:
    """All digits of a whole number, grouped; six significant digits of anything else.

    >>> format_exact(8030261248)
    '8,030,261,248'
    """
    if isinstance(value, float) or value.denominator != 1:
        return f"{float(value):,.6g}"
    return f"{int(value):,}"


def parse_count(text: str, field: str = "count") -> int:
    """A whole number as people write it.

    >>> parse_count("300e9"), parse_count("300B"), parse_count("1.5M"), parse_count("8,192")
    (300000000000, 300000000000, 1500000, 8192)
    """
    value = _parse(text, field, _COUNT, "300e9 or 300B")
    if value.denominator != 1:
        raise _wrong(text, field, "is a whole number", "300e9 or 300B")
    return int(value)


def parse_whole(text: str, field: str = "number") -> int:
    """A whole number from 0, as people write it.

    >>> parse_whole("0"), parse_whole("1e3")
    (0, 1000)
    """
    if text.strip() == "0":
        return 0
    try:
        return parse_count(text, field)
    except InputError:
        raise _wrong(text, field, "is a whole number from 0 to 1e60", "0, 300e9 or 300B") from None


def parse_bytes(text: str, field: str = "bytes") -> int:
    """Bytes with a unit.

    >>> parse_bytes("80GB"), parse_bytes("80 GiB")
    (80000000000, 85899345920)
    """
    value = _parse(text, field, _BYTES, "80GB or 80GiB")
    return int(value)


def parse_seconds(text: str, field: str = "seconds") -> float:
    """A duration with a unit.

    >>> parse_seconds("500ms"), parse_seconds("2h")
    (0.5, 7200.0)
    """
    return float(_parse(text, field, _SECONDS, "500ms, 30s or 2h"))


def parse_real(text: str, field: str = "value") -> float:
    """A positive real number, with the suffixes of a count.

    >>> parse_real("3.15e23"), parse_real("2.5M")
    (3.15e+23, 2500000.0)
    """
    return float(_parse(text, field, _COUNT, "3.15e23"))


def _parse(text: str, field: str, units: Mapping[str, int | Fraction], example: str) -> Fraction:
    match = _NUMBER.fullmatch(text.strip()) if len(text) <= 80 else None
    if match is None:
        raise _wrong(text, field, "is a number with an optional unit", f"write it like {example}")
    digits, unit = match[1].replace(",", "").replace("_", ""), match[2].replace("µ", "u")
    factors = {name.casefold(): factor for name, factor in units.items()}
    if unit.casefold() not in factors:
        raise _wrong(
            text,
            field,
            f"has a unit of {', '.join(u for u in units if u)}",
            f"write it like {example}",
        )
    try:
        value = Fraction(Decimal(digits)) * factors[unit.casefold()]
    except InvalidOperation:
        raise _wrong(text, field, "is a number", f"write it like {example}") from None
    if not 0 < value < 10**60:
        raise _wrong(text, field, "lies above 0 and below 1e60", f"write it like {example}")
    return value


def _wrong(text: str, field: str, rule: str, hint: str) -> InputError:
    return InputError("command line", [Problem(field, text, rule, hint)])


def _scaled(value: float, steps: tuple[tuple[str, int], ...]) -> str:
    if value == 0:
        return "0"
    suffix, power = steps[0]
    for suffix, power in reversed(steps):  # noqa: B007 - the last pair tried is the result
        if abs(value) >= 0.99995 * 10**power:
            break
    return f"{_digits(value / 10**power)} {suffix}".rstrip()


def _digits(value: float) -> str:
    """Four significant digits, no trailing zeros, no exponent for what people print."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.4g}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
