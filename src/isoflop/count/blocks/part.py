"""The pieces of a description: weights, what is kept, parts, and what they stand on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

from isoflop.count.operators import Matmul, Operator
from isoflop.count.workload import Workload
from isoflop.quantity import Expr, Symbol, number
from isoflop.quantity.expr import product

#: Axes of what has two axes and multiplies nothing: a norm's per head, tables of positions.
LOOKED_UP = frozenset({"norm", "bucket", "position"})


@dataclass(frozen=True, slots=True)
class Weight:
    """A trained tensor; its axes have logical names, which sharding rules speak of."""

    name: str
    axes: tuple[tuple[str, Expr], ...]

    @property
    def size(self) -> Expr:
        return product(size for _, size in self.axes)

    @property
    def multiplies(self) -> bool:
        """Whether it is a matrix in a product: tables are looked up, norms' vectors scale."""
        return len(self.axes) == 2 and not any(name in LOOKED_UP for name, _ in self.axes)


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor kept from forward to backward.

    `kind` says how it is stored, `axis` what its width is, in the words of weights' axes. One
    "beside fp32" has a copy in fp32 that another part keeps, and is it where activations are fp32.
    """

    name: str
    size: Expr
    kind: str = "activation"
    axis: str = "model"


def dropped(dropout: float, size: Expr, axis: str = "model") -> tuple[Saved, ...]:
    """The mask of a dropout, where there is one."""
    return (Saved("mask", size, "mask", axis),) if dropout else ()


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a model: a leaf that does one thing, or a group of parts.

    `times` copies exist, `active` of them work on a given token (they differ only for
    experts). `saved` is what every kernel keeps, `kept_by_some` what only some do: scores
    and dropout masks. `buffers` are stored with the weights, always in fp32, and not trained.
    """

    name: str
    weights: tuple[Weight, ...] = ()
    operator: Operator | None = None
    saved: tuple[Saved, ...] = ()
    parts: tuple[Part, ...] = ()
    times: Expr = field(default_factory=lambda: number(1))
    active: Expr | None = None
    kept_by_some: tuple[Saved, ...] = ()
    buffers: tuple[Weight, ...] = ()

    @property
    def is_layer(self) -> bool:
        """Whether it is one kind of layer: what its blocks give is added to a stream."""
        return any(part.name == "residual" for part in self.parts)


class Scope:
    """Symbols of one model: a name means one value, a second value gets a second name."""

    def __init__(self, label: str = "", taken: dict[str, int] | None = None) -> None:
        self.label = label
        self.taken: dict[str, int] = {} if taken is None else taken

    def within(self, label: str) -> Scope:
        return Scope(label, self.taken)

    def __call__(self, name: str, value: int, meaning: str = "") -> Symbol:
        tried, again = name, 2
        while self.taken.setdefault(tried, value) != value:
            tried = f"{name}_{self.label}" if again == 2 else f"{name}_{self.label}_{again - 1}"
            again += 1
        return Symbol(tried, value, meaning=meaning)


@dataclass(frozen=True, slots=True)
class Ground:
    """What a block's description stands on: the tokens it works on, the width, the names.

    `B` sequences of `T` tokens see `S` keys each. `ahead` are a sequence's pairs of a token and a
    later one that it sees all the same: those within images.
    """

    scope: Scope
    B: Expr
    T: Expr
    S: Expr
    D: Expr
    causal_skip: bool = False
    ahead: Expr | None = None

    @classmethod
    def of(cls, scope: Scope, work: Workload, D: Expr) -> Self:
        """The ground of a decoder's blocks."""
        return cls(scope, work.B, work.T, work.S, D, work.causal_skip)

    @property
    def tokens(self) -> Expr:
        return self.B * self.T

    def within(self, label: str) -> Ground:
        """The same ground where a second value of a name is called after `label`."""
        return replace(self, scope=self.scope.within(label))


def linear(
    ground: Ground,
    name: str,
    into: tuple[str, Expr],
    out: tuple[str, Expr],
    *,
    bias: bool,
    rows: Expr | None = None,
    keep_input: bool = True,
    input_fixed: bool = False,
    kind: str = "activation",
) -> Part:
    """A matrix with an optional bias; the input is kept unless a sibling keeps the same one.

    `input_fixed`: the input depends on no weight. `kind` is how the input is kept.
    """
    rows = ground.tokens if rows is None else rows
    weights = [Weight("weight", (into, out))]
    if bias:
        weights.append(Weight("bias", (out,)))
    saved = (Saved("input", rows * into[1], kind, into[0]),) if keep_input else ()
    operator = Matmul(rows, into[1], out[1], bias=bias, input_fixed=input_fixed)
    return Part(name, tuple(weights), operator, saved)
