"""Bytes that one accelerator holds: the description's tensors, split by a layout.

Sharding is a rule on the logical axes of a weight, so a new kind of block is sharded by
the names of its axes alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from isoflop.arch import Arch, Attention
from isoflop.count import TrainingState, Workload, bytes_saved
from isoflop.count.blocks import Part, Weight, describe
from isoflop.plan.assumed import BYTES_RUNTIME
from isoflop.plan.layout import Layout
from isoflop.quantity import (
    Basis,
    Expr,
    Node,
    Symbol,
    branch,
    ceil_div,
    leaf,
    maximum,
    number,
    total,
)
from isoflop.quantity.expr import product

Recompute: TypeAlias = Literal["none", "selective", "full"]

#: Axes that tensor parallelism splits; key-value heads only as far as there are any.
SPLIT = frozenset({"heads", "kv_heads", "ff", "vocab"})


@dataclass(frozen=True, slots=True)
class Split:
    """The ways in which one kind of layer is split: `kv` of `tp` for key-value heads."""

    tp: Symbol
    kv: Symbol

    def of(self, weight: Weight) -> Expr:
        """Numbers of the weight that one accelerator holds.

        An axis of sub-units (heads, feed-forward width) splits evenly by the rules of a
        layout; the vocabulary is padded to do so.
        """
        axes = [name for name, _ in weight.axes if name in SPLIT]
        if not axes or self.tp.value == 1:
            return weight.size
        if axes[0] == "vocab":
            sizes = dict(weight.axes)
            rows = ceil_div(sizes.pop("vocab"), self.tp)
            return product([rows, *sizes.values()])
        return weight.size / (self.kv if axes[0] == "kv_heads" else self.tp)


def split_of(arch: Arch, kind: str, tp: int) -> Split:
    """How `tp` splits the layers of one kind; other parts have no key-value heads."""
    ways = Symbol("tp", tp, meaning="tensor parallel accelerators")
    layer = arch.kinds.get(kind)
    if layer is None or not isinstance(layer.attention, Attention):
        return Split(ways, ways)
    kv = min(tp, layer.attention.n_kv_heads)
    if kv == tp:
        return Split(ways, ways)
    return Split(ways, Symbol(f"tp_kv_{kind}", kv, meaning="ways that key-value heads split"))


def params_held(part: Part, split: Split) -> Expr:
    """Weights of one copy of `part` that one accelerator holds."""
    own = [split.of(weight) for weight in part.weights]
    below = [product((p.times, params_held(p, split))) for p in part.parts]
    return total(own + below)


def stage_parts(arch: Arch, root: Part, pp: int, stage: int) -> Iterator[tuple[Part, Expr]]:
    """The parts of one pipeline stage with how many copies of each it runs.

    The embedding is on the first stage; final norm, head and loss are on the last, which
    holds its own copy of a tied embedding matrix.
    """
    per = arch.n_layers // pp
    kinds = Counter(layer.name for layer in arch.layers[stage * per : (stage + 1) * per])
    for part in root.parts:
        if part.name in arch.kinds:
            if part.name in kinds:
                meaning = f"layers of the kind {part.name} in one stage"
                yield part, Symbol(f"n_{part.name}_stage", kinds[part.name], meaning=meaning)
        elif part.name == "embedding":
            if stage == 0:
                yield part, number(1)
            elif stage == pp - 1 and arch.head.tied:
                yield _table(part), number(1)
        elif stage == pp - 1:
            yield part, number(1)


def _table(embedding: Part) -> Part:
    """The embedding matrix alone, as the last stage's head reads it."""
    tokens = next(p for p in embedding.parts if p.name == "tokens")
    return Part("embedding", weights=tokens.weights)


def weights_held(arch: Arch, parts: Iterable[tuple[Part, Expr]], tp: int) -> list[Node]:
    """Parameters that one accelerator of a stage holds, by part."""
    return [
        leaf(part.name, "params", params_held(part, split_of(arch, part.name, tp)), times=copies)
        for part, copies in parts
    ]


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training step works on: the model, one micro-batch, how it is stored."""

    arch: Arch
    work: Workload
    state: TrainingState
    recompute: Recompute


def memory_training_stage(job: Trained, layout: Layout, n_micro: int, stage: int) -> Node:
    """Bytes that one accelerator of pipeline stage `stage` holds, as a tree."""
    root = describe(job.arch, job.work)
    parts = list(stage_parts(job.arch, root, layout.pp, stage))
    held = weights_held(job.arch, parts, layout.tp)
    state, copies = job.state, Symbol("dp", layout.dp, meaning="data-parallel copies")

    def store(name: str, bytes_each: Symbol, over: Expr | int = 1) -> Node:
        kept = [
            leaf(p.name, "bytes", p.size * bytes_each / over, times=p.times, source=state.source)
            for p in held
        ]
        return branch(name, "bytes", kept)

    return branch(
        "bytes_per_accelerator",
        "bytes",
        [
            store("bytes_weights", Symbol("bytes_per_weight", state.weights)),
            store("bytes_grads", Symbol("bytes_per_grad", state.grads)),
            store("bytes_optimizer", Symbol("bytes_per_param_optimizer", state.optimizer),
                  copies if layout.zero else 1),
            _activations(job, layout, n_micro, stage, parts),
            leaf("bytes_overhead", "bytes", BYTES_RUNTIME, source=BYTES_RUNTIME.source),
        ],
    )  # fmt: skip


def _activations(
    job: Trained, layout: Layout, n_micro: int, stage: int, parts: list[tuple[Part, Expr]]
) -> Node:
    """What forward leaves for backward: 1F1B keeps pp - stage micro-batches in flight.

    Scores are never stored: flash attention recomputes them. `selective` also rebuilds the
    outputs of activation functions, so no matrix product is done twice; `full` keeps each
    layer's input and, while it goes backward, one layer's tensors.
    """
    saved = {n.name: n.size for n in bytes_saved(job.arch, job.work, job.state.activation).children}
    tp = Symbol("tp", layout.tp, meaning="tensor parallel accelerators")
    flight = Symbol(
        "n_in_flight", min(n_micro, layout.pp - stage), meaning="micro-batches in flight"
    )
    children = []
    for part, copies in parts:
        if part.name not in saved:
            continue
        if part.name in job.arch.kinds:
            size = _kept_per_layer(job, part, saved[part.name])
            children.append(_leaf(part.name, size / tp, flight * copies))
        else:
            children.append(_leaf(part.name, saved[part.name] / tp, 1))
    if job.recompute == "full":
        widest = maximum(*(saved[p.name] for p, _ in parts if p.name in job.arch.kinds))
        children.append(_leaf("layer_going_backward", widest / tp, 1))
    return branch("bytes_activations", "bytes", children)


def _leaf(name: str, size: Expr, times: Expr | int) -> Node:
    return leaf(name, "bytes", size, times=times, basis=Basis.MODELLED)


def _kept_per_layer(job: Trained, part: Part, saved: Expr) -> Expr:
    each = job.state.activation.bytes_each
    match job.recompute:
        case "none":
            return saved
        case "full":
            return job.work.tokens * Symbol("d_model", job.arch.d_model) * each
        case "selective":
            return saved - _rebuilt(part) * each


def _rebuilt(part: Part) -> Expr:
    """Saved numbers that an activation function gives again: its output and its factor."""
    below = [product((p.times, _rebuilt(p))) for p in part.parts]
    gone = [
        saved.size
        for saved in part.saved
        if (part.name, saved.name) in {("down", "input"), ("activation", "gate")}
    ]
    return total(gone + below)
