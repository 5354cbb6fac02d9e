"""Options as people write them: 300e9, 300B, 80GB, 500ms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeAlias

from cyclopts import Parameter, Token

from isoflop.arch import Arch
from isoflop.count import Precision
from isoflop.errors import UnknownName
from isoflop.quantity.units import (
    parse_bytes,
    parse_count,
    parse_real,
    parse_seconds,
    parse_whole,
)


def _reader(parse: Callable[[str, str], Any], metavar: str) -> Parameter:
    def convert(_type: Any, tokens: Sequence[Token]) -> Any:
        token = tokens[0]
        return parse(token.value, token.keyword or "argument")

    return Parameter(converter=convert, metavar=metavar)


def parse_precision(text: str, field: str = "precision") -> Precision:
    """A precision by name.

    >>> parse_precision("bf16")
    <Precision.BF16: 'bf16'>
    """
    try:
        return Precision(text.lower())
    except ValueError:
        raise UnknownName(
            field, text, list(Precision), f"choose one of {', '.join(Precision)}"
        ) from None


#: A whole number with an optional suffix: 300e9, 300B, 2048.
Count: TypeAlias = Annotated[int, _reader(parse_count, "COUNT")]
#: A whole number from 0, in the same words. A plain `int` would take 2.5 for 2.
Whole: TypeAlias = Annotated[int, _reader(parse_whole, "COUNT")]
#: A positive real number: 3.15e23, 0.4, 2.5M.
Real: TypeAlias = Annotated[float, _reader(parse_real, "NUMBER")]
#: A size: 80GB, 512MiB.
Bytes: TypeAlias = Annotated[int, _reader(parse_bytes, "SIZE")]
#: A duration: 500ms, 30s.
Duration: TypeAlias = Annotated[float, _reader(parse_seconds, "TIME")]
#: fp32, bf16, fp16, fp8, int8, int4.
Stored: TypeAlias = Annotated[Precision, _reader(parse_precision, "FORMAT")]
#: Print one JSON object on stdout instead of text.
Json: TypeAlias = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")]


def load_model(text: str) -> Arch:
    """The spec of what the user named; what is open about it goes to stderr."""
    from isoflop.arch.load import load
    from isoflop.cli.output import note

    loaded = load(text)
    for line in loaded.notes:
        note(line)
    return loaded.arch
