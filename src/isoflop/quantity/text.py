"""Plain text tables and trees: no colour, fixed layout, the same in a pipe and a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from isoflop.quantity.basis import Basis
from isoflop.quantity.expr import Value
from isoflop.quantity.units import format_exact, format_rounded, format_value

if TYPE_CHECKING:
    from isoflop.quantity.node import Node


def table(rows: Iterable[Sequence[str]], header: Sequence[str] = (), align: str = "") -> str:
    """Rows in columns; `align` has a letter per column, r for right, anything else left.

    >>> print(table([["gpt2", "124"], ["gpt3-175b", "174,604"]], ["model", "params"], "lr"))
    model       params
    gpt2           124
    gpt3-175b  174,604
    """
    lines = [list(header), *map(list, rows)] if header else [list(r) for r in rows]
    if not lines:
        return ""
    widths = [
        max(len(line[i]) for line in lines if i < len(line)) for i in range(max(map(len, lines)))
    ]
    sides = align.ljust(len(widths), "l")
    return "\n".join(
        "  ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(line, widths, sides, strict=False)
        ).rstrip()
        for line in lines
    )


def tree(node: Node, *, depth: int = 3, exact: bool = False, formulas: bool = False) -> str:
    """A breakdown, indented; every number is for all copies, so that they add up.

    >>> from isoflop.quantity import branch, leaf
    >>> print(tree(branch("params", "params", [leaf("up", "params", 6), leaf("down", "params", 2)])))
    params  8 params
      up    6 params  75.0 %
      down  2 params  25.0 %
    """
    whole = node.value
    rows: list[list[str]] = []
    _collect(node, 1, 0, depth, whole, exact, formulas, rows)
    return table(rows, align="lrrl")


def _collect(
    node: Node,
    copies: Value,
    level: int,
    depth: int,
    whole: Value,
    exact: bool,
    formulas: bool,
    rows: list[list[str]],
) -> None:
    value = node.value * copies
    times = "" if node.times.value == 1 else f" x{format_exact(node.times.value)}"
    shown = format_exact(value) if exact else format_value(value, node.unit)
    share = f"{100 * float(value) / float(whole):.1f} %" if level and whole else ""
    text = node.size.text if formulas and not node.children else ""
    rows.append(["  " * level + node.name + times, shown, share, text])
    if level < depth:
        for child in node.children:
            _collect(
                child, copies * node.times.value, level + 1, depth, whole, exact, formulas, rows
            )


def numbers(nodes: Mapping[str, Node]) -> str:
    """Values with their 90 % ranges, one per line: three digits of what is modelled."""
    rows = [[f"  {name}", _value(node), span_text(node)] for name, node in nodes.items()]
    return table(rows, ["  number", "value", "90 % range"], "lrl")


def _value(node: Node) -> str:
    """Three digits of what is modelled; counts in full, those of FLOPs with their prefix."""
    if node.bases != {Basis.EXACT}:
        return format_rounded(node.value, node.unit)
    return format_value(node.value, "flops") if node.unit == "flops" else format_exact(node.value)


def span_text(node: Node) -> str:
    """The 90 % range of a number, a unit that both ends share said once.

    >>> from isoflop.quantity import Basis, Interval, Symbol, leaf
    >>> rate = Symbol("rate", 0.03, Basis.ASSUMED, Interval(0.02, 0.04))
    >>> span_text(leaf("x", "seconds", rate))
    '20.9 to 40.3 ms'
    """
    span = node.interval
    if span is None:
        return "exact"
    low, high = (format_rounded(end, node.unit) for end in (span.low, span.high))
    first, _, unit = low.partition(" ")
    return f"{first if unit and high.endswith(f' {unit}') else low} to {high}"
