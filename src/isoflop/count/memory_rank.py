"""What one rank holds: the description's tensors, split by rules on their logical axes.

A new kind of block is sharded by the names of its axes alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from isoflop.arch.spec import Arch, Attention
from isoflop.count.blocks import Part, Weight, beside, describe
from isoflop.count.memory_saved import (
    FLASH,
    Keeping,
    Kernels,
    Recompute,
    going_backward,
    keeps,
    layers_in,
    loss_of,
)
from isoflop.count.memory_state import Held, TrainingState
from isoflop.count.memory_weights import UNQUANTISED, Stored, format_of
from isoflop.count.stages import layers_of_stage, pipeline_rules
from isoflop.count.workload import Workload
from isoflop.errors import InputError, Problem
from isoflop.quantity import (
    Basis,
    Expr,
    Node,
    Symbol,
    branch,
    ceil_div,
    leaf,
    maximum,
    minimum,
    number,
    total,
    where,
)
from isoflop.quantity.expr import product

#: Axes that tensor parallelism splits; key-value heads only as far as there are any.
SPLIT = frozenset({"heads", "kv_heads", "ff", "vocab"})


@dataclass(frozen=True, slots=True)
class Shards:
    """How many ranks share one model's state and work, and how.

    tp: tensor; with `sequence_parallel`, what lies between the sharded matrices is split
    over the sequence (Korthikanti 2022, 2205.05198, section 4.2). pp: pipeline, each rank
    with `virtual` chunks of layers (Narayanan 2021, 2104.04473, section 2.2). cp: context;
    dp: data; ep: experts, spread over dp x cp. zero: 1 splits the optimizer's state over
    dp x cp, 2 gradients too, 3 weights too (Rajbhandari 2020, 1910.02054).
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    zero: Literal[0, 1, 2, 3] = 0
    sequence_parallel: bool = True
    virtual: int = 1

    def __post_init__(self) -> None:
        names = ("tp", "pp", "dp", "cp", "ep", "virtual")
        bad = [Problem(n, getattr(self, n), "is at least 1") for n in names if getattr(self, n) < 1]
        if self.zero not in (0, 1, 2, 3):
            bad.append(Problem("zero", self.zero, "is 0, 1, 2 or 3"))
        if not bad and self.dp * self.cp % self.ep:
            bad.append(Problem("ep", self.ep, f"divides dp * cp = {self.dp * self.cp}"))
        if bad:
            raise InputError("shards", bad)

    def in_flight(self, stage: int, n_micro: int) -> Expr:
        """Micro-batches whose activations a stage holds at most.

        1F1B keeps pp - stage; interleaved, 2 (pp - stage - 1) + (v - 1) pp + 1 chunks of one
        v-th of a stage (Korthikanti 2022, section 4.2.3: L (1 + (p - 1) / (p v)) at stage 0).
        Where layers do not divide, chunks of a stage differ by a layer; here they are equal.
        """
        pp = Symbol("pp", self.pp, meaning="pipeline stages")
        n = Symbol("n_micro_batches", n_micro, meaning="micro-batches per pipeline and step")
        behind = pp - Symbol("stage", stage, meaning="the pipeline stage, counted from 0")
        plain = minimum(behind, n)
        if self.virtual == 1:
            return plain
        chunks = Symbol("virtual_pp", self.virtual, meaning="chunks of layers on each stage")
        held = minimum(2 * (behind - 1) + (chunks - 1) * pp + 1, n * chunks)
        return where(chunks - 1, held / chunks, plain)

    def embedded(self, n_micro: int) -> Expr:
        """Micro-batches whose embedding waits for backward on the first stage, at most.

        As many as are in flight (Korthikanti 2022, section 4.3: s b h p / t). Interleaved, the
        first chunk has begun a second round of pp before it goes back on the first.
        """
        if self.pp == 1:
            return number(1)
        pp = Symbol("pp", self.pp, meaning="pipeline stages")
        n = Symbol("n_micro_batches", n_micro, meaning="micro-batches per pipeline and step")
        if self.virtual == 1:
            return minimum(pp, n)
        chunks = Symbol("virtual_pp", self.virtual, meaning="chunks of layers on each stage")
        return minimum(where(chunks - 1, 2 * pp, pp), n)


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


def weights_held(
    arch: Arch, parts: Iterable[tuple[Part, Expr]], shards: Shards, stored: Stored
) -> Node:
    """Stored weights that one rank of a server's stage holds, by part."""
    how = format_of(stored)

    def measure(weight: Weight, held: Held) -> Expr:
        return how.bytes_of(weight, held.size, inside=held.part not in UNQUANTISED)

    kept = [
        leaf(part.name, "bytes", held_by(part, split_of(arch, part.name, shards), measure),
             times=times, basis=how.basis, source=how.source)
        for part, times in parts
    ]  # fmt: skip
    return branch("bytes_weights", "bytes", kept, source=how.source)


def stage_parts(
    arch: Arch, root: Part, pp: int, stage: int, virtual: int = 1
) -> Iterator[tuple[Part, Expr]]:
    """The parts of one pipeline stage with how many copies of each it runs.

    Its layers are those of `layers_of_stage`. The embedding is on the first stage; final norm, head and loss are on the last, which
    holds its own copy of a tied embedding matrix. Biases that layers share are on every one.
    """
    own = layers_of_stage(arch.n_layers, pp, stage, virtual)
    kinds = Counter(arch.layers[i].name for i in own)
    return parts_held(arch, root, kinds, first=stage == 0, last=stage == pp - 1)


def parts_held(
    arch: Arch, root: Part, kinds: Mapping[str, int], *, first: bool, last: bool
) -> Iterator[tuple[Part, Expr]]:
    """The parts of a stage that runs so many layers of each kind, by the rule of `stage_parts`."""
    for part in root.parts:
        if part.name in arch.kinds:
            if part.name in kinds:
                meaning = f"layers of the kind {part.name} in one stage"
                yield part, Symbol(f"n_{part.name}_stage", kinds[part.name], meaning=meaning)
        elif part.name == "embedding":
            if first:
                yield part, number(1)
            elif last and arch.head.tied:
                yield _table(part), number(1)
        elif last or part.name.startswith("relative_bias"):
            yield part, number(1)


def _table(embedding: Part) -> Part:
    """The embedding matrix alone, as the last stage's head reads it."""
    tokens = next(p for p in embedding.parts if p.name == "tokens")
    return Part("embedding", weights=tokens.weights)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training step works on: the model, one micro-batch, how all is stored."""

    arch: Arch
    work: Workload
    state: TrainingState
    recompute: Recompute = "none"
    kernels: Kernels = FLASH


def memory_rank(job: Trained, shards: Shards, *, n_micro: int = 1, stage: int = 0) -> Node:
    """Bytes that a rank of pipeline stage `stage` holds in training, as a tree.

    Raises:
        InputError: a pipeline of more chunks than layers, or without such a stage; a tower
            beside the decoder that would have to be split.

    >>> from isoflop.arch import gpt
    >>> from isoflop.count.memory_state import TRAINING_STATES
    >>> small = gpt("gpt2", d_model=768, n_layers=12, n_heads=12, vocab_size=50257, max_seq_len=1024)
    >>> job = Trained(small, Workload.train(1, 1024), TRAINING_STATES["bf16"])
    >>> rank = memory_rank(job, Shards(dp=64, zero=3))
    >>> sum(rank.find(n).value for n in ("bytes_weights", "bytes_grads", "bytes_optimizer")) * 64
    1991036928
    """
    _check_stage(job.arch, shards, stage)
    root = describe(job.arch, job.work)
    parts = list(stage_parts(job.arch, root, shards.pp, stage, shards.virtual))
    flight, embedded = shards.in_flight(stage, n_micro), shards.embedded(n_micro)
    return memory_held(job, shards, parts, flight, embedded)


def memory_held(
    job: Trained, shards: Shards, parts: list[tuple[Part, Expr]], flight: Expr, embedded: Expr
) -> Node:
    """Bytes of a rank that holds `parts`, with `flight` micro-batches of its layers.

    `embedded` micro-batches wait for the embedding's backward, where it is among the parts.
    """
    state = job.state
    return branch(
        "bytes_per_rank",
        "bytes",
        [
            _stored(job, shards, parts, "bytes_weights", state.bytes_weights, shards.zero >= 3),
            _stored(job, shards, parts, "bytes_grads", state.bytes_grads, shards.zero >= 2),
            _stored(job, shards, parts, "bytes_optimizer", state.bytes_optimizer, shards.zero >= 1),
            *_gathered(job, shards, parts),
            _activations(job, shards, parts, flight, embedded),
        ],
    )


def _check_stage(arch: Arch, shards: Shards, stage: int) -> None:
    bad = pipeline_rules(arch.n_layers, shards.pp, shards.virtual)
    if not 0 <= stage < shards.pp:
        bad.append(Problem("stage", stage, f"lies between 0 and pp - 1 = {shards.pp - 1}"))
    if max(shards.tp, shards.pp, shards.cp, shards.ep) > 1:
        bad += beside(arch, "is none where tp, pp, cp or ep splits the model")
    if bad:
        raise InputError("shards", bad)


def _stored(
    job: Trained,
    shards: Shards,
    parts: Iterable[tuple[Part, Expr]],
    name: str,
    each: Callable[[Held], Expr],
    zero: bool,
) -> Node:
    """One piece of the state by part; `zero` splits it over the ranks that share the weight."""
    copies = product([Symbol("dp", shards.dp, meaning="data-parallel copies"), *_cp(shards)])
    among = copies if zero else number(1)
    experts = among / Symbol("ep", shards.ep) if zero and shards.ep > 1 else among

    def measure(_weight: Weight, held: Held) -> Expr:
        return each(held) / (experts if held.dealt else among)

    kept = [
        leaf(
            part.name,
            "bytes",
            held_by(part, split_of(job.arch, part.name, shards), measure),
            times=times,
            source=job.state.source,
        )
        for part, times in parts
    ]
    return branch(name, "bytes", kept)


def _gathered(job: Trained, shards: Shards, parts: Iterable[tuple[Part, Expr]]) -> list[Node]:
    """What ZeRO-3 makes whole for a while: the weights of two units, the gradient of one.

    A unit is a layer, or another part of the model; the next one is gathered while one is at
    work (Zhao 2023, 2304.11277, section 3.4: at most two all-gathers in flight). Experts that
    no other rank shares are whole already.
    """
    if shards.zero < 3 or shards.dp * shards.cp == 1:
        return []
    found = [(part.name, [layer for _, layer in layers_in([part])] or [part]) for part, _ in parts]
    sizes = [_whole_unit(job, shards, kind, unit) for kind, units in found for unit in units]
    widest = maximum(*sizes) if len(sizes) > 1 else sizes[0]
    return [
        leaf("bytes_gathered", "bytes", widest, basis=Basis.MODELLED, source="two units in flight")
    ]


def _whole_unit(job: Trained, shards: Shards, kind: str, unit: Part) -> Expr:
    split, state = split_of(job.arch, kind, shards), job.state
    alone = shards.dp * shards.cp == shards.ep

    def measure(_weight: Weight, held: Held) -> Expr:
        whole_already = held.dealt and alone
        return (
            number(0) if whole_already else 2 * state.bytes_weights(held) + state.bytes_grads(held)
        )

    return held_by(unit, split, measure)


def _cp(shards: Shards) -> list[Expr]:
    return [Symbol("cp", shards.cp, meaning="context-parallel ranks")] if shards.cp > 1 else []


def _activations(
    job: Trained,
    shards: Shards,
    parts: list[tuple[Part, Expr]],
    flight: Expr,
    embedded: Expr,
) -> Node:
    """What forward leaves for backward, in as many micro-batches as are in flight."""
    children = []
    layers: list[tuple[Part, Keeping]] = []
    for part, copies in parts:
        if not keeps(part):
            continue
        split = split_of(job.arch, part.name, shards)
        keeping = Keeping(job.state.activation, job.kernels, job.recompute, ways_of(split, shards))
        once = embedded if part.name == "embedding" else number(1)
        times = flight * copies if part.is_layer else once
        children.append(_leaf(part.name, keeping.tree(part).size, times))
        if any(layers_in([part])):
            layers.append((part, keeping))
    if job.recompute == "full":
        loss = loss_of(children)
        again = [going_backward([part], loss, keeping).size for part, keeping in layers]
        largest = maximum(*again) if len(again) > 1 else again[0]
        children.append(_leaf("layer_going_backward", largest, 1))
    return branch("bytes_activations", "bytes", children)


def ways_of(split: Split, shards: Shards) -> Callable[[str], Expr]:
    """Pieces of a kept tensor by its axis.

    Outside the sharded matrices the width is whole: sequence parallelism cuts the
    sequence there, without it each rank keeps all. Context parallelism cuts every sequence.
    """
    cp = _cp(shards)

    def ways(axis: str) -> Expr:
        if split.tp.value == 1 or (axis not in SPLIT and not shards.sequence_parallel):
            return product(cp)
        return product([split.kv if axis == "kv_heads" else split.tp, *cp])

    return ways


def _leaf(name: str, size: Expr, times: Expr | int) -> Node:
    return leaf(name, "bytes", size, times=times, basis=Basis.MODELLED)
