"""What a step's formulas are written over: the sizes of a layout, and what is fixed beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

from isoflop.arch import Arch
from isoflop.count.memory_saved import Recompute
from isoflop.hardware import Chip
from isoflop.hardware.stack import Stack, find_stack
from isoflop.plan.setting import Compute, Setting
from isoflop.quantity import Expr, Symbol, minimum
from isoflop.quantity.expr import product

#: Sizes that a search varies; each is a symbol of every formula of a step.
SIZES = ("tp", "pp", "dp", "cp", "ep", "virtual_pp", "batch", "n_micro_batches")

_MEANING = {
    "tp": "tensor parallel accelerators",
    "pp": "pipeline stages",
    "dp": "data-parallel copies",
    "cp": "context-parallel ranks",
    "ep": "ranks that the experts are spread over",
    "virtual_pp": "chunks of layers on each stage",
    "batch": "sequences in a micro-batch",
    "n_micro_batches": "micro-batches per pipeline and step",
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
    above_one: frozenset[str]

    @classmethod
    def of(cls, setting: Setting) -> Self:
        layout = setting.layout
        values = {
            "tp": layout.tp,
            "pp": layout.pp,
            "dp": layout.dp,
            "cp": layout.cp,
            "ep": layout.ep,
            "virtual_pp": layout.virtual,
            "batch": layout.micro_batch,
            "n_micro_batches": setting.n_micro_batches,
        }
        symbols = {name: Symbol(name, v, meaning=_MEANING[name]) for name, v in values.items()}
        return cls(**symbols, above_one=frozenset(n for n, v in values.items() if v > 1))

    def __contains__(self, name: str) -> bool:
        return name in self.above_one

    def ways(self, *names: str) -> Expr:
        """The product of those sizes that are not 1."""
        return product(getattr(self, name) for name in names if name in self)


@dataclass(frozen=True, slots=True)
class Structure:
    """What a formula's shape depends on, sizes apart: one formula serves all its layouts."""

    arch: Arch
    chip: Chip
    per_node: int
    seq_len: int
    compute: Compute
    recompute: Recompute
    stack: Stack
    zero: Literal[0, 1, 2, 3]
    sequence_parallel: bool

    @classmethod
    def of(cls, setting: Setting) -> Self:
        return cls(
            arch=setting.arch,
            chip=setting.cluster.chip,
            per_node=setting.cluster.size_node,
            seq_len=setting.seq_len,
            compute=setting.compute,
            recompute=setting.recompute,
            stack=find_stack(setting.stack),
            zero=setting.layout.zero,
            sequence_parallel=setting.layout.sequence_parallel,
        )
