"""What numbers rest on, in words; tables and trees are of `quantity`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from isoflop.quantity import Basis, Node, Symbol
from isoflop.quantity.expr import Value
from isoflop.quantity.text import table, tree
from isoflop.quantity.units import format_seconds, format_si

__all__ = ["describe_bases", "footer", "symbol_text", "table", "tree"]


def footer(nodes: Iterable[Node]) -> str:
    """What the numbers rest on, read off their symbols.

    >>> from isoflop.quantity import Interval, leaf
    >>> mfu = Symbol("mfu", 0.4, Basis.ASSUMED, Interval(0.3, 0.5), meaning="share of the peak reached")
    >>> print(footer([leaf("seconds", "seconds", 1 / mfu)]))
    1 assumption:
      mfu = 0.4  (0.3 to 0.5)  share of the peak reached
    """
    used = {s.name: s for node in nodes for s in node.total.symbols().values()}
    assumed = [s for s in used.values() if s.basis is Basis.ASSUMED]
    stated = [s for s in used.values() if s.basis is Basis.DATASHEET]
    lines = [_assumed(assumed)] if assumed else []
    if stated:
        lines.append(f"from the catalogue: {', '.join(map(_stated, stated))}")
    return "\n".join(lines) or "no assumptions: exact arithmetic on the spec"


def _assumed(symbols: Sequence[Symbol]) -> str:
    rows = [
        [f"  {s.name} = {symbol_text(s, s.given)}", _spread(s), s.meaning or s.source]
        for s in symbols
    ]
    count = f"{len(symbols)} assumption{'s' if len(symbols) > 1 else ''}:"
    return f"{count}\n{table(rows)}"


def _stated(symbol: Symbol) -> str:
    return f"{symbol.name} = {symbol_text(symbol, symbol.given)} {_spread(symbol)}".rstrip()


#: The unit of a symbol, by how its name begins; the longer beginning first.
UNITS = {"flops_per_second_": "FLOP/s", "bytes_per_second_": "B/s", "bytes_": "B"}


def symbol_text(symbol: Symbol, value: Value | None) -> str:
    """A value of a symbol, in the unit that its name begins with.

    >>> symbol_text(Symbol("bytes_per_second_link", 4.5e11), 4.5e11)
    '450 GB/s'
    >>> symbol_text(Symbol("seconds_call", 2e-5), 2e-5)
    '20 µs'
    """
    if value is None:
        return "free"
    if symbol.name.startswith("seconds_"):
        return format_seconds(value)
    units = (unit for start, unit in UNITS.items() if symbol.name.startswith(start))
    unit = "W" if symbol.name == "watts" else next(units, "")
    return format_si(value, unit) if unit else f"{float(value):,.6g}"


def _spread(symbol: Symbol) -> str:
    if symbol.spread is None:
        return ""
    return (
        f"({symbol_text(symbol, symbol.spread.low)} to {symbol_text(symbol, symbol.spread.high)})"
    )


def describe_bases(bases: Iterable[Basis]) -> str:
    """What kind of truth, in words.

    >>> describe_bases({Basis.ASSUMED})
    'assumed (a default you may override)'
    """
    return ", ".join(f"{b.value} ({b.meaning})" for b in sorted(bases))
