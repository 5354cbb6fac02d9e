"""What the plans of training and serving share on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from cyclopts import Parameter

from isoflop.quantity import Node
from isoflop.quantity.units import format_value
from isoflop.report.text import table

On = Annotated[str, Parameter(name="--on", help="Accelerators, such as 1024xa100-sxm-80gb.")]


def numbers(nodes: Mapping[str, Node]) -> str:
    """Values with their 90 % ranges, one per line."""
    rows = []
    for name, node in nodes.items():
        span = node.interval
        range_ = f"{_value(node, span.low)} to {_value(node, span.high)}" if span else "exact"
        rows.append([f"  {name}", _value(node, node.value), range_])
    return table(rows, ["  number", "value", "90 % range"], "lrl")


def _value(node: Node, value: Any) -> str:
    """A value in the unit of its node; counts that the label already names stay bare."""
    bare = node.unit in ("hours", "days", "MWh", "mwh", "tokens_per_second", "accelerators",
                         "tonnes")  # fmt: skip
    return format_value(value, "" if bare else node.unit)
