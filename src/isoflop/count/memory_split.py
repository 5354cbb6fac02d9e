"""How ranks share one model: ways of splitting, as rules on the logical axes of its tensors.

A new kind of block is sharded by the names of its axes alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from isoflop.arch.spec import Arch, Attention
from isoflop.count.blocks import Part, Weight
from isoflop.count.memory_state import Held
from isoflop.errors import InputError, Problem
from isoflop.quantity import Expr, Symbol, ceil_div, minimum, number, total, where
from isoflop.quantity.expr import product

#: Axes that tensor parallelism splits; key-value heads only as far as there are any.
SPLIT = frozenset({"heads", "kv_heads", "ff", "vocab"})


#: What is kept in the host's memory. optimizer: its state with the fp32 weights, updated there
#: (ZeRO-Offload, Ren 2021, 2101.06840; gradients stay on the accelerator until they are summed,
#: as in Megatron-Core); activations: what layers keep from forward to backward.
Offload: TypeAlias = Literal["none", "optimizer", "activations", "optimizer+activations"]
OFFLOADS: tuple[Offload, ...] = get_args(Offload)


#: How attention meets the tokens of other context-parallel ranks. ring: keys and values go around,
#: a block at a time, beside the work on the last one (Liu 2023, 2310.01889); gather: they are
#: gathered first (Llama 3, 2407.21783, section 3.3.2); all_to_all: heads are dealt out instead, each
#: rank meets all tokens with some of them (Ulysses, Jacobs 2023, 2309.14509, section 3.1).
ContextBy: TypeAlias = Literal["ring", "gather", "all_to_all"]
CONTEXTS_BY: tuple[ContextBy, ...] = get_args(ContextBy)


@dataclass(frozen=True, slots=True)
class Shards:
    """How many ranks share one model's state and work, and how.

    tp: tensor; with `sequence_parallel`, what lies between the sharded matrices is split
    over the sequence (Korthikanti 2022, 2205.05198, section 4.2). pp: pipeline, each rank
    with `virtual` chunks of layers (Narayanan 2021, 2104.04473, section 2.2). cp: context;
    dp: data; ep: experts, spread over dp x cp. zero: 1 splits the optimizer's state over
    dp x cp, 2 gradients too, 3 weights too (Rajbhandari 2020, 1910.02054). shard: of these
    ranks, how many one copy of what is split is spread over; None: all of them. offload: what
    waits in the host's memory. cp_by: how context-parallel ranks meet each other's tokens.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    zero: Literal[0, 1, 2, 3] = 0
    sequence_parallel: bool = True
    virtual: int = 1
    shard: int | None = None
    offload: Offload = "none"
    cp_by: ContextBy = "ring"

    def __post_init__(self) -> None:
        names = ("tp", "pp", "dp", "cp", "ep", "virtual")
        bad = [Problem(n, getattr(self, n), "is at least 1") for n in names if getattr(self, n) < 1]
        if self.zero not in (0, 1, 2, 3):
            bad.append(Problem("zero", self.zero, "is 0, 1, 2 or 3"))
        if not bad and self.dp * self.cp % self.ep:
            bad.append(Problem("ep", self.ep, f"divides dp * cp = {self.dp * self.cp}"))
        if not bad and self.shard is not None:
            bad += shard_rules(self.shard, self.dp * self.cp, self.ep)
        if self.offload not in OFFLOADS:
            bad.append(Problem("offload", self.offload, f"is one of {', '.join(OFFLOADS)}"))
        if self.cp_by not in CONTEXTS_BY:
            bad.append(Problem("cp_by", self.cp_by, f"is one of {', '.join(CONTEXTS_BY)}"))
        if bad:
            raise InputError("shards", bad)

    def in_flight(self, stage: int, n_micro: int) -> Expr:
        """Micro-batches whose activations a stage holds at most.

        1F1B keeps pp - stage; interleaved, 2 (pp - stage - 1) + (v - 1) pp + 1 chunks of one
        v-th of a stage (Korthikanti 2022, section 4.2.3: L (1 + (p - 1) / (p v)) at stage 0).
        Where layers do not divide, chunks of a stage differ by a layer; here they are equal.
        """
        pp, chunks, n = self._pipeline(n_micro)
        behind = pp - Symbol("stage", stage, meaning="the pipeline stage, counted from 0")
        plain = minimum(behind, n)
        if self.virtual == 1:
            return plain
        held = minimum(2 * (behind - 1) + (chunks - 1) * pp + 1, n * chunks)
        return where(chunks - 1, held / chunks, plain)

    def embedded(self, n_micro: int) -> Expr:
        """Micro-batches whose embedding waits for backward on the first stage, at most.

        As many as are in flight (Korthikanti 2022, section 4.3: s b h p / t). Interleaved, the
        first chunk has begun a second round of pp before it goes back on the first.
        """
        if self.pp == 1:
            return number(1)
        pp, chunks, n = self._pipeline(n_micro)
        rounds = pp if self.virtual == 1 else where(chunks - 1, 2 * pp, pp)
        return minimum(rounds, n)

    def _pipeline(self, n_micro: int) -> tuple[Symbol, Symbol, Symbol]:
        return (
            Symbol("pp", self.pp, meaning="pipeline stages"),
            Symbol("virtual_pp", self.virtual, meaning="chunks of layers on each stage"),
            Symbol("n_micro_batches", n_micro, meaning="micro-batches per pipeline and step"),
        )

    @property
    def among(self) -> Expr:
        """Ranks that one copy of what ZeRO splits is spread over."""
        if self.shard is not None:
            return Symbol("shard", self.shard, meaning="ranks that one copy is sharded over")
        return product([Symbol("dp", self.dp, meaning="data-parallel copies"), *self.context])

    @property
    def context(self) -> list[Expr]:
        """The context-parallel ranks, where there are several."""
        meaning = "context-parallel ranks"
        return [Symbol("cp", self.cp, meaning=meaning)] if self.cp > 1 else []


def shard_rules(shard: int, copies: int, ep: int) -> list[Problem]:
    """What sharding over fewer than all `copies` ranks asks: equal groups, each with all experts.

    >>> [str(problem) for problem in shard_rules(3, copies=8, ep=2)]
    ['shard=3: must divide dp * cp = 8', 'shard=3: must be divided by ep=2']
    """
    if shard < 1:
        return [Problem("shard", shard, "is at least 1")]
    rules = [(f"divides dp * cp = {copies}", copies % shard == 0),
             (f"is divided by ep={ep}", shard % ep == 0)]  # fmt: skip
    return [Problem("shard", shard, rule) for rule, holds in rules if not holds]


@dataclass(frozen=True, slots=True)
class Split:
    """The ways in which one kind of layer is split: `kv` of `tp` for key-value heads."""

    tp: Symbol
    kv: Expr
    ep: Symbol = field(default_factory=lambda: Symbol("ep", 1))

    def sizes(self, weight: Weight) -> tuple[Expr, ...]:
        """The sizes of the piece of a weight that one rank holds.

        The first axis of sub-units (heads, feed-forward width) splits evenly by the rules
        of a layout; the vocabulary is padded to do so.
        """
        cut = next((name for name, _ in weight.axes if name in SPLIT), None)
        if cut is None or self.tp.value == 1:
            return tuple(size for _, size in weight.axes)
        return tuple(self._cut(n, size) if n == cut else size for n, size in weight.axes)

    def _cut(self, axis: str, size: Expr) -> Expr:
        if axis == "vocab":
            return ceil_div(size, self.tp)
        return size / (self.kv if axis == "kv_heads" else self.tp)

    def copies(self, part: Part) -> Expr:
        """Copies of a part on one rank: experts are dealt out."""
        spread = part.name == "experts" and self.ep.value != 1
        return ceil_div(part.times, self.ep) if spread else part.times


def split_of(arch: Arch, kind: str, shards: Shards) -> Split:
    """How the layers of one kind are split; other parts have no key-value heads."""
    ways = Symbol("tp", shards.tp, meaning="tensor parallel accelerators")
    experts = Symbol("ep", shards.ep, meaning="ranks that the experts are spread over")
    layer = arch.kinds.get(kind)
    if layer is None or not isinstance(layer.attention, Attention):
        return Split(ways, ways, experts)
    attention = layer.attention
    if attention.n_kv_heads == attention.n_heads:
        return Split(ways, ways, experts)
    heads = Symbol(f"n_kv_heads_{kind}", attention.n_kv_heads, meaning=f"key-value heads of {kind}")
    return Split(ways, minimum(ways, heads), experts)


Measure: TypeAlias = Callable[[Weight, Held], Expr]


def held_by(
    part: Part, split: Split, measure: Measure, top: str = "", *, dealt: bool = False
) -> Expr:
    """The sum of `measure` over the weights of one copy of `part` that one rank holds.

    `top` is the model's own part that `part` belongs to, `dealt` whether it is an expert.
    """
    top, dealt = top or part.name, dealt or part.name == "experts"
    own = [measure(w, Held(split.sizes(w), top, dealt)) for w in part.weights]
    below = [
        product((split.copies(p), held_by(p, split, measure, top, dealt=dealt))) for p in part.parts
    ]
    return total(own + below)


def ways_of(split: Split, shards: Shards) -> Callable[[str], Expr]:
    """Pieces of a kept tensor by its axis.

    Outside the sharded matrices the width is whole: sequence parallelism cuts the
    sequence there, without it each rank keeps all. Context parallelism cuts every sequence.
    """
    cp = shards.context

    def ways(axis: str) -> Expr:
        if split.tp.value == 1 or (axis not in SPLIT and not shards.sequence_parallel):
            return product(cp)
        return product([split.kv if axis == "kv_heads" else split.tp, *cp])

    return ways
