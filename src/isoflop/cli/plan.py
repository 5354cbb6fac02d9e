"""What the plans of training and serving share on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from cyclopts import Parameter

from isoflop.quantity import Basis, Node
from isoflop.quantity.units import format_exact, format_rounded, format_value
from isoflop.report.text import table

On = Annotated[str, Parameter(name="--on", help="Accelerators, such as 1024xa100-sxm-80gb.")]


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
    if node.interval is None:
        return "exact"
    low, high = (format_rounded(end, node.unit) for end in (node.interval.low, node.interval.high))
    first, _, unit = low.partition(" ")
    return f"{first if unit and high.endswith(f' {unit}') else low} to {high}"
