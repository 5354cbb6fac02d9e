"""Bytes of a whole model at work on one device: a forward pass, or a training step.

What is exact (weights, cache, optimizer state) is exact; what stays alive in a forward
pass without gradients is modelled, and says so. The pieces have files of their own:
memory_weights.py, memory_cache.py, memory_state.py, memory_saved.py; memory_rank.py says
what one of many ranks holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Literal, TypeAlias

from isoflop.arch.spec import Arch, Attention, Dense, Experts, LatentAttention
from isoflop.count.blocks import Part, describe, names_of
from isoflop.count.memory_cache import bytes_kv_cache
from isoflop.count.memory_saved import FLASH, Kernels, Recompute, bytes_saved
from isoflop.count.memory_split import Split, held_by
from isoflop.count.memory_state import Held, TrainingState
from isoflop.count.memory_weights import Stored, bytes_weights, format_of
from isoflop.count.workload import Precision, Workload
from isoflop.quantity import Basis, Expr, Interval, Node, Symbol, branch, leaf, maximum, number

Logits: TypeAlias = Literal["last", "all"]

#: Not in a count of the model's own bytes unless asked for; every serving plan holds it.
#: Trainers' software is taken apart in memory_stack.py.
BYTES_RUNTIME = Symbol(
    "bytes_runtime",
    2 * 10**9,
    Basis.ASSUMED,
    Interval(10**9, 4 * 10**9),
    meaning=(
        "memory of each accelerator held by its context, libraries, communication buffers "
        "and fragments"
    ),
    source="1 to 2 GB for the context and libraries, the rest for buffers and fragments",
)


def memory_inference(
    arch: Arch,
    workload: Workload,
    stored: Stored,
    kv_precision: Precision | None = None,
    *,
    page: int | None = None,
    logits: Logits = "last",
    overhead: bool = False,
) -> Node:
    """Memory of a forward pass without gradients: weights, cache, activations, logits.

    `workload.seq_len` tokens per sequence are read at once against `context` cached ones;
    `page` rounds the cache up to whole pages. Logits are fp32, of the last position as a
    server samples from them, or of all. `overhead` adds what the runtime holds, an
    assumption with a range.

    Raises:
        UnknownName: `stored` names no format.
    """
    name = format_of(stored).name
    plain = Precision(name) if name in tuple(Precision) else Precision.BF16
    kv_precision = kv_precision or (plain if plain.value[:2] in ("fp", "bf") else Precision.BF16)
    working = Precision.FP32 if plain is Precision.FP32 else Precision.BF16
    rows = workload.B if logits == "last" else workload.tokens
    children = [
        bytes_weights(arch, stored),
        bytes_kv_cache(arch, workload, kv_precision, page=page),
        leaf(
            "bytes_activations",
            "bytes",
            _widest(arch, workload) * working.bytes_each,
            basis=Basis.MODELLED,
            source="widest moment of a layer with flash attention, two residual streams",
        ),
        leaf(
            "bytes_logits",
            "bytes",
            rows * Symbol("vocab_size", arch.vocab_size) * Precision.FP32.bytes_each,
            source=f"fp32, {logits} position{'s' * (logits == 'all')}",
        ),
    ]
    if overhead:
        children.append(leaf("bytes_overhead", "bytes", BYTES_RUNTIME, source=BYTES_RUNTIME.source))
    return branch("memory", "bytes", children)


def _widest(arch: Arch, workload: Workload) -> Expr:
    """Numbers alive at the widest moment of any layer: two streams and the widest block."""
    scope = names_of(arch, workload)
    D = scope("d_model", arch.d_model, "width of the residual stream")
    widths: list[Expr] = []
    # A vision tower is far narrower than the decoder behind it and runs before it.
    beside = {layer.name: layer for layer in (arch.encoder.layers if arch.encoder else ())}
    for layer in (*arch.kinds.values(), *beside.values()):
        inside = scope.within(layer.name)
        match layer.attention:
            case Attention() as a:
                N, H = inside("n_heads", a.n_heads), inside("d_head", a.d_head)
                widths.append(2 * N * H + 2 * inside("n_kv_heads", a.n_kv_heads) * H)
            case LatentAttention() as a:
                wide = a.n_heads * (2 * (a.d_head_nope + a.d_head_rope) + 2 * a.d_head_value)
                widths.append(number(wide))
        match layer.feed_forward:
            case Dense() as f:
                widths.append((2 + f.gated) * inside("d_ff", f.d_ff))
            case Experts() as e:
                widths.append(
                    (2 + e.expert.gated) * e.n_active * inside("d_ff_expert", e.expert.d_ff)
                )
    return workload.tokens * (2 * D + reduce(maximum, widths))


def memory_training(
    arch: Arch,
    workload: Workload,
    state: TrainingState,
    *,
    kernels: Kernels = FLASH,
    recompute: Recompute = "none",
) -> Node:
    """Everything a training step keeps on one device, nothing sharded.

    The sum holds gradients beside all activations, as trainers that keep gradient
    buffers do; `isoflop.plan.memory.peak` follows the moments of our own trainer.

    >>> from isoflop.arch import gpt
    >>> from isoflop.count.memory_state import TRAINING_STATES
    >>> gpt2 = gpt("gpt2", d_model=768, n_layers=12, n_heads=12, vocab_size=50257, max_seq_len=1024)
    >>> tree = memory_training(gpt2, Workload.train(1, 1024), TRAINING_STATES["bf16"])
    >>> tree.find("bytes_grads").value
    248879616
    """
    root = describe(arch, workload)
    return branch(
        "memory",
        "bytes",
        [
            _stored("bytes_weights", root, state.bytes_weights, state.source),
            _stored("bytes_grads", root, state.bytes_grads, state.source),
            _stored("bytes_optimizer", root, state.bytes_optimizer, state.source),
            bytes_saved(arch, workload, state.activation, kernels, recompute),
        ],
    )


def _stored(name: str, root: Part, each: Callable[[Held], Expr], source: str) -> Node:
    whole = Split(Symbol("tp", 1), Symbol("tp", 1))
    kept = [
        leaf(
            p.name,
            "bytes",
            held_by(p, whole, lambda _, held: each(held)),
            times=p.times,
            source=source,
        )
        for p in root.parts
    ]
    return branch(name, "bytes", kept)
