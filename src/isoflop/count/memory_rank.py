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
from isoflop.count.operators import Core
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
    minimum,
    number,
    total,
    where,
)


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
    parts, kept = _parts_kept(job, shards, n_micro, stage)
    active = activations_held(job, shards, parts, kept)
    return branch("bytes_per_rank", "bytes", [*state_held(job, shards, parts), active])


def state_held(job: Trained, shards: Shards, parts: list[tuple[Part, Expr]]) -> list[Node]:
    """Weights, gradients and the optimizer's state of a rank that holds `parts`.

    And what is whole for a while: gathered weights, gathered keys and values.
    """
    zero = shards.zero
    return [
        _stored(job, shards, parts, "bytes_weights", zero >= 3),
        _stored(job, shards, parts, "bytes_grads", zero >= 2),
        *([] if "optimizer" in shards.offload else [_optimizer(job, shards, parts)]),
        *_gathered(job, shards, parts),
        *_keys_whole(job, shards, parts),
    ]


def host_held(
    job: Trained, shards: Shards, parts: list[tuple[Part, Expr]], kept: Mapping[str, Expr]
) -> Node:
    """Bytes that a rank of `parts` keeps in its host's memory.

    Beside the optimizer's state the gradients that it reads, split as it is; of activations, what
    is not on the accelerator. `kept` is that of `activations_held`.
    """
    away = []
    if "optimizer" in shards.offload:
        away.append(_optimizer(job, shards, parts))
        away.append(_stored(job, shards, parts, "bytes_grads", shards.zero >= 1))
    if "activations" in shards.offload:
        layers = [leaf for _, leaf in _layers(job, shards, parts, kept)]
        size = total(layer.total for layer in layers) - _resident(layers)
        away.append(_leaf("bytes_activations", size, 1))
    return branch("bytes_host_per_rank", "bytes", away)


def host_rank(job: Trained, shards: Shards, *, n_micro: int = 1, stage: int = 0) -> Node:
    """Bytes that a rank of pipeline stage `stage` keeps in its host's memory, as a tree.

    >>> from isoflop.arch import gpt
    >>> from isoflop.count.memory_state import TRAINING_STATES
    >>> small = gpt("gpt2", d_model=768, n_layers=12, n_heads=12, vocab_size=50257, max_seq_len=1024)
    >>> job = Trained(small, Workload.train(1, 1024), TRAINING_STATES["bf16"])
    >>> host_rank(job, Shards(offload="optimizer")).value // 124_439_808
    14
    """
    parts, kept = _parts_kept(job, shards, n_micro, stage)
    return host_held(job, shards, parts, kept)


def _parts_kept(
    job: Trained, shards: Shards, n_micro: int, stage: int
) -> tuple[list[tuple[Part, Expr]], dict[str, Expr]]:
    """The parts of a stage of 1F1B with their copies, and how many are kept of each."""
    check_stage(job.arch, shards, stage)
    root = describe(job.arch, job.work)
    parts = list(stage_parts(job.arch, root, shards.pp, stage, shards.virtual))
    flight = shards.in_flight(stage, n_micro)
    kept = {part.name: flight * copies for part, copies in parts if part.is_layer}
    return parts, {**kept, "embedding": shards.embedded(n_micro)}


def _optimizer(job: Trained, shards: Shards, parts: Iterable[tuple[Part, Expr]]) -> Node:
    return _stored(job, shards, parts, "bytes_optimizer", shards.zero >= 1)


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
    zero: bool,
) -> Node:
    """One piece of the state by part; `zero` splits it over the ranks that share the weight."""
    each: Callable[[Held], Expr] = getattr(job.state, name)
    among = shards.among if zero else number(1)
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
    if shards.zero < 3 or shards.among.value == 1:
        return []
    found = [(part.name, [layer for _, layer in layers_in([part])] or [part]) for part, _ in parts]
    sizes = [_whole_unit(job, shards, kind, unit) for kind, units in found for unit in units]
    widest = maximum(*sizes) if len(sizes) > 1 else sizes[0]
    return [
        leaf("bytes_gathered", "bytes", widest, basis=Basis.MODELLED, source="two units in flight")
    ]


def _keys_whole(job: Trained, shards: Shards, parts: Iterable[tuple[Part, Expr]]) -> list[Node]:
    """One layer's keys and values of all tokens, and their gradient, where ranks gather them.

    Llama 3 (2407.21783), section 3.3.2. Around a ring they are a block at a time, and not counted.
    """
    if shards.cp == 1 or shards.cp_by != "gather":
        return []
    sizes = []
    for part, _ in parts:
        for core in cores_of(part):
            heads = core.kv_heads / split_of(job.arch, part.name, shards).kv
            sizes.append(core.batch * core.keys * heads * (core.d_key + core.d_value))
    if not sizes:
        return []
    widest = maximum(*sizes) if len(sizes) > 1 else sizes[0]
    size = 2 * widest * job.state.activation.bytes_each
    return [leaf("bytes_keys_values", "bytes", size, basis=Basis.MODELLED, source="Llama 3, 3.3.2")]


def cores_of(layer: Part) -> list[Core]:
    """The scores of a layer's own attention."""
    own = [part for part in layer.parts if part.name == "attention"]
    return [p.operator for part in own for p in part.parts if isinstance(p.operator, Core)]


def _whole_unit(job: Trained, shards: Shards, kind: str, unit: Part) -> Expr:
    split, state = split_of(job.arch, kind, shards), job.state
    experts = Symbol("ep", shards.ep)

    def measure(_weight: Weight, held: Held) -> Expr:
        whole = 2 * state.bytes_weights(held) + state.bytes_grads(held)
        dealt = held.dealt and shards.ep > 1
        return where(shards.among - experts, whole, 0) if dealt else whole

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
    of_layers = {part.name: leaf for part, leaf in _layers(job, shards, parts, kept)}
    for part, _ in parts:
        if not keeps(part):
            continue
        keeping = keeping_of(job, shards, part)
        own = of_layers.get(part.name) or _leaf(
            part.name, keeping.tree(part).size, kept.get(part.name, 1)
        )
        if part.name not in of_layers or "activations" not in shards.offload:
            children.append(own)
        if any(layers_in([part])):
            layers.append((part, keeping))
    if of_layers and "activations" in shards.offload:
        children.append(_leaf("layers_resident", _resident(list(of_layers.values())), 1))
    if job.recompute == "full":
        loss = loss_of(children)
        again = [going_backward([part], loss, keeping).size for part, keeping in layers]
        largest = maximum(*again) if len(again) > 1 else again[0]
        children.append(_leaf("layer_going_backward", largest, 1))
    return branch("bytes_activations", "bytes", children)


def keeping_of(job: Trained, shards: Shards, part: Part) -> Keeping:
    """What a part of a rank keeps of one micro-batch, and how it is split."""
    split = split_of(job.arch, part.name, shards)
    return Keeping(job.state.activation, job.kernels, job.recompute, ways_of(split, shards))


def _layers(
    job: Trained, shards: Shards, parts: Iterable[tuple[Part, Expr]], kept: Mapping[str, Expr]
) -> Iterator[tuple[Part, Node]]:
    """What the layers of each kind keep, of all micro-batches in flight."""
    for part, _ in parts:
        if part.is_layer and keeps(part):
            size = keeping_of(job, shards, part).tree(part).size
            yield part, _leaf(part.name, size, kept[part.name])


def _resident(layers: list[Node]) -> Expr:
    """Of offloaded layers two are on the accelerator: one at work, one on its way."""
    widest = maximum(*(layer.size for layer in layers)) if len(layers) > 1 else layers[0].size
    return minimum(2 * widest, total(layer.total for layer in layers))


def _leaf(name: str, size: Expr, times: Expr | int) -> Node:
    return leaf(name, "bytes", size, times=times, basis=Basis.MODELLED)
