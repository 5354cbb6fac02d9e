"""What one rank holds in training: the parts of its stage, split as memory_split.py says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from isoflop.arch.spec import Arch
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
from isoflop.count.memory_split import Shards, held_by, split_of, ways_of
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
    leaf,
    maximum,
    number,
)
from isoflop.quantity.expr import product


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

    Its layers are those of `layers_of_stage`. The embedding is on the first stage; final norm,
    head and loss are on the last, which holds its own copy of a tied embedding matrix. Biases
    that layers share are on every one.
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
    check_stage(job.arch, shards, stage)
    root = describe(job.arch, job.work)
    parts = list(stage_parts(job.arch, root, shards.pp, stage, shards.virtual))
    flight = shards.in_flight(stage, n_micro)
    kept = {part.name: flight * copies for part, copies in parts if part.is_layer}
    kept["embedding"] = shards.embedded(n_micro)
    active = activations_held(job, shards, parts, kept)
    return branch("bytes_per_rank", "bytes", [*state_held(job, shards, parts), active])


def state_held(job: Trained, shards: Shards, parts: list[tuple[Part, Expr]]) -> list[Node]:
    """Weights, gradients and the optimizer's state of a rank that holds `parts`."""
    state, zero = job.state, shards.zero
    return [
        _stored(job, shards, parts, "bytes_weights", state.bytes_weights, zero >= 3),
        _stored(job, shards, parts, "bytes_grads", state.bytes_grads, zero >= 2),
        _stored(job, shards, parts, "bytes_optimizer", state.bytes_optimizer, zero >= 1),
        *_gathered(job, shards, parts),
    ]


def check_stage(arch: Arch, shards: Shards, stage: int) -> None:
    """Raise InputError where a model has no such stage under these shards."""
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
    copies = product([Symbol("dp", shards.dp, meaning="data-parallel copies"), *shards.context])
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


def activations_held(
    job: Trained,
    shards: Shards,
    parts: list[tuple[Part, Expr]],
    kept: Mapping[str, Expr],
) -> Node:
    """What forward leaves for backward; `kept` says how often a part's activations are held.

    That is micro-batches in flight times layers of a kind, and micro-batches whose embedding
    waits for backward; parts that are not in `kept` hold those of one.
    """
    children = []
    layers: list[tuple[Part, Keeping]] = []
    for part, _ in parts:
        if not keeps(part):
            continue
        split = split_of(job.arch, part.name, shards)
        keeping = Keeping(job.state.activation, job.kernels, job.recompute, ways_of(split, shards))
        children.append(_leaf(part.name, keeping.tree(part).size, kept.get(part.name, 1)))
        if any(layers_in([part])):
            layers.append((part, keeping))
    if job.recompute == "full":
        loss = loss_of(children)
        again = [going_backward([part], loss, keeping).size for part, keeping in layers]
        largest = maximum(*again) if len(again) > 1 else again[0]
        children.append(_leaf("layer_going_backward", largest, 1))
    return branch("bytes_activations", "bytes", children)


def _leaf(name: str, size: Expr, times: Expr | int) -> Node:
    return leaf(name, "bytes", size, times=times, basis=Basis.MODELLED)
