"""What a step's formulas are written over: the sizes of a layout, and what is fixed beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from isoflop.plan.layout import Layout
from isoflop.plan.step.setting import Setting
from isoflop.quantity import Expr, Symbol
from isoflop.quantity.expr import product

#: Sizes that a search varies, and what they mean: each is a symbol of every formula of a step.
_MEANING = {
    "tp": "tensor parallel accelerators",
    "pp": "pipeline stages",
    "dp": "data-parallel copies",
    "cp": "context-parallel ranks",
    "ep": "ranks that the experts are spread over",
    "virtual_pp": "chunks of layers on each stage",
    "batch": "sequences in a micro-batch",
    "n_micro_batches": "micro-batches per pipeline and step",
    "shard": "ranks that one copy is sharded over",
}
SIZES = tuple(_MEANING)


def sizes_of(layout: Layout, global_batch: int) -> dict[str, int]:
    """The sizes of a layout, by the names of their symbols, in the order of `SIZES`."""
    return {
        "tp": layout.tp,
        "pp": layout.pp,
        "dp": layout.dp,
        "cp": layout.cp,
        "ep": layout.ep,
        "virtual_pp": layout.virtual,
        "batch": layout.micro_batch,
        "n_micro_batches": layout.n_micro_batches(global_batch),
        "shard": layout.dp * layout.cp if layout.shard is None else layout.shard,
    }


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a layout as symbols; `above_one` are those that are not 1."""

    tp: Symbol
    pp: Symbol
    dp: Symbol
    cp: Symbol
    ep: Symbol
    virtual_pp: Symbol
    batch: Symbol
    n_micro_batches: Symbol
    shard: Symbol
    above_one: frozenset[str]

    @classmethod
    def of(cls, setting: Setting) -> Self:
        values = sizes_of(setting.layout, setting.global_batch)
        symbols = {name: Symbol(name, v, meaning=_MEANING[name]) for name, v in values.items()}
        return cls(**symbols, above_one=frozenset(n for n, v in values.items() if v > 1))

    def __contains__(self, name: str) -> bool:
        return name in self.above_one

    def ways(self, *names: str) -> Expr:
        """The product of those sizes that are not 1."""
        return product(getattr(self, name) for name in names if name in self)
