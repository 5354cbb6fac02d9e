"""A breakdown tree: what a number is made of.

A branch sums its children and multiplies by `times`; a leaf holds one formula.
The total is computed from the formula each time it is asked for, so it cannot
disagree with its parts. A path such as `layer/attention/k` names the same thing in
every tree, in JSON, in `isoflop explain` and in test ids.

>>> from isoflop.quantity import Symbol
>>> D, F = Symbol("d_model", 8), Symbol("d_ff", 32)
>>> tree = branch("params", "params", [
...     branch("layer", "params", [leaf("up", "params", D * F), leaf("down", "params", F * D)],
...            times=Symbol("n_layers", 3)),
... ])
>>> tree.value, tree.find("layer/up").value
(1536, 256)
>>> print(tree.find("layer").total.text)
n_layers * (d_model * d_ff + d_ff * d_model)

A tree prints as one, and shows itself so in a notebook.

>>> print(tree)
params      1,536
  layer x3  1,536  100.0 %
    up        768   50.0 %
    down      768   50.0 %
>>> tree.find("layer/up")
<Node up: 256 params>
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from isoflop.errors import UnknownName
from isoflop.quantity.basis import Basis, Interval
from isoflop.quantity.expr import Expr, Number, Symbol, Value, number, product, total
from isoflop.quantity.text import tree
from isoflop.quantity.units import format_value

ONE = Number(1)


@dataclass(frozen=True, slots=True)
class Node:
    """One number of a breakdown. Build it with `leaf` and `branch`.

    `times` is how many copies there are: children are per copy, the node's own value
    is for all copies. `basis` says what kind of truth the formula itself is; the bases
    of its symbols come on top.
    """

    name: str
    unit: str
    size: Expr
    children: tuple[Node, ...] = ()
    times: Expr = ONE
    basis: Basis = Basis.EXACT
    source: str = ""

    @property
    def total(self) -> Expr:
        """The formula of this node, all copies."""
        return product((self.times, self.size))

    @property
    def value(self) -> Value:
        return self.total.value

    @property
    def interval(self) -> Interval | None:
        return self.total.interval()

    @property
    def bases(self) -> frozenset[Basis]:
        """Every kind of truth in this number; exact only where nothing weaker is in it."""
        found = {n.basis for _, n in self.walk()}
        found |= {s.basis for s in self.total.symbols().values()}
        return frozenset(found - {Basis.EXACT}) or frozenset({Basis.EXACT})

    @property
    def assumptions(self) -> tuple[Symbol, ...]:
        """The symbols that are defaults which the user may override."""
        symbols = self.total.symbols().values()
        return tuple(s for s in symbols if s.basis is Basis.ASSUMED)

    def walk(self, path: str = "") -> Iterator[tuple[str, Node]]:
        """Every node with its path; the root's path is empty."""
        yield path, self
        for child in self.children:
            yield from child.walk(f"{path}/{child.name}" if path else child.name)

    def leaves(self) -> dict[str, Node]:
        """The leaves by path."""
        return {path: node for path, node in self.walk() if not node.children}

    def find(self, path: str) -> Node:
        """The node at `path`.

        Raises:
            UnknownName: no such child; the message lists the names that are there.
        """
        node = self
        for name in filter(None, path.split("/")):
            below = {child.name: child for child in node.children}
            if name not in below:
                there = ", ".join(below) or "nothing: it is a leaf"
                raise UnknownName(f"path under {node.name!r}", name, below, hint=f"it has {there}")
            node = below[name]
        return node

    def copies(self, path: str) -> Value:
        """How many copies of the node at `path` there are, counting those of its parents.

        A node's own `value` holds its own copies but not its parents': multiply the
        two to get the node's part of the root.
        """
        node, count = self, self.times.value
        names = [name for name in path.split("/") if name]
        for depth, name in enumerate(names):
            node = node.find(name)
            if depth < len(names) - 1:
                count *= node.times.value
        return count if names else 1

    def __str__(self) -> str:
        """The tree, counts of parameters in full."""
        return tree(self, exact=self.unit == "params")

    def __repr__(self) -> str:
        free = any(s.given is None for s in self.total.symbols().values())
        return f"<Node {self.name}: {self.total.text if free else format_value(self.value, self.unit)}>"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """What IPython and Jupyter show."""
        printer.text(str(self))

    def to_json(self) -> dict[str, Any]:
        """The tree as plain data, the form that `isoflop schema` publishes."""
        out: dict[str, Any] = {
            "name": self.name,
            "unit": self.unit,
            "value": plain(self.value),
            "basis": sorted(b.value for b in self.bases),
        }
        if self.times != ONE:
            out["times"] = plain(self.times.value)
        if (interval := self.interval) is not None:
            out["interval"] = interval.to_json()
        if self.source:
            out["source"] = self.source
        if self.children:
            out["children"] = [child.to_json() for child in self.children]
        else:
            out["formula"], out["numbers"] = self.size.text, self.size.digits
        return out


def leaf(
    name: str,
    unit: str,
    size: Expr | Value,
    *,
    times: Expr | Value = 1,
    basis: Basis = Basis.EXACT,
    source: str = "",
) -> Node:
    """A node with one formula."""
    return Node(name, unit, number(size), (), number(times), basis, source)


def branch(
    name: str,
    unit: str,
    children: Iterable[Node],
    *,
    times: Expr | Value = 1,
    source: str = "",
) -> Node:
    """A node that is the sum of its children, `times` over."""
    kept = tuple(children)
    size = total(child.total for child in kept)
    return Node(name, unit, size, kept, number(times), Basis.EXACT, source)


def plain(value: Value) -> int | float:
    """An exact value as JSON can hold it: whole numbers stay integers."""
    if isinstance(value, int):
        return value
    exact = value.denominator == 1 if not isinstance(value, float) else False
    return int(value) if exact else float(value)
