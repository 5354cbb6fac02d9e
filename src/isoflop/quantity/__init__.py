"""Sizes as expressions, numbers as trees, and the kind of truth each number is.

Three values carry everything isoflop derives:

* `Expr` (expr.py): a size written once. It is evaluated exactly (integers and
  fractions), rendered for `explain`, or compiled for many evaluations.
  Its named leaf is `Symbol`, with value, `Basis`, source and, where the value is
  uncertain, an `Interval`.
* `Basis`, `Interval` (basis.py): what kind of truth a number is.
* `Node` (node.py): a breakdown tree. Its value is computed, never stored, so a
  total cannot disagree with its parts.

`units.py` prints and reads sizes as people write them. Nothing of ours is
imported here but `errors`.
"""

from isoflop.quantity.basis import Basis, Interval
from isoflop.quantity.expr import (
    Expr,
    Number,
    Symbol,
    alias,
    ceil_div,
    expm1,
    maximum,
    minimum,
    number,
    sqrt,
    total,
    where,
)
from isoflop.quantity.node import Node, branch, leaf

__all__ = [
    "Basis",
    "Expr",
    "Interval",
    "Node",
    "Number",
    "Symbol",
    "alias",
    "branch",
    "ceil_div",
    "expm1",
    "leaf",
    "maximum",
    "minimum",
    "number",
    "sqrt",
    "total",
    "where",
]
