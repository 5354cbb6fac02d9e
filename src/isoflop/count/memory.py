"""Bytes: weights, key-value cache, activations, gradients and optimizer state.

What is exact (weights, cache, optimizer state) is exact; what stays alive in a forward
pass without gradients is modelled, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from isoflop.arch.spec import (
    Arch,
    Attention,
    Chunked,
    Dense,
    Experts,
    LatentAttention,
    Layer,
    Window,
)
from isoflop.count.blocks import Part, Saved, Scope, describe
from isoflop.count.params import has_weights, params
from isoflop.count.workload import Precision, Workload
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
)


def bytes_weights(arch: Arch, precision: Precision) -> Node:
    """Stored weights by path.

    >>> from isoflop.arch import gpt
    >>> gpt2 = gpt("gpt2", d_model=768, n_layers=12, n_heads=12, vocab_size=50257, max_seq_len=1024)
    >>> bytes_weights(gpt2, Precision.FP16).value
    248879616
    """

    def fold(part: Part, name: str) -> Node:
        if part.parts:
            kept = [fold(p, p.name) for p in part.parts if has_weights(p)]
            return branch(name, "bytes", kept, times=part.times)
        size = total(w.size for w in part.weights) * precision.bytes_each
        return leaf(name, "bytes", size, times=part.times)

    return fold(describe(arch, Workload(1, 1, 1)), "bytes_weights")


def bytes_kv_cache(arch: Arch, workload: Workload, precision: Precision) -> Node:
    """The key-value cache of `batch` sequences of `context` tokens, by kind of layer.

    Keys and values of every cached token; a windowed layer keeps its window only, latent
    attention keeps the latent and the shared rotated key. A decoder behind an encoder also
    keeps the keys and values of what the encoder read.

    >>> from isoflop.arch import llama
    >>> l3 = llama("l3", d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14336,
    ...            vocab_size=128256, max_seq_len=8192)
    >>> bytes_kv_cache(l3, Workload.decode(1, 8192), Precision.BF16).value
    1073741824
    """
    scope = Scope()
    children = [
        leaf(
            name,
            "bytes",
            workload.B
            * _tokens_kept(layer, workload, scope)
            * _numbers_of(layer.attention, scope.within(name))
            * precision.bytes_each,
            times=scope.within(name)("n_layers", arch.times(name), f"layers of the kind {name}"),
        )
        for name, layer in arch.kinds.items()
    ]
    children += [
        leaf(
            f"{name}_cross",
            "bytes",
            workload.B
            * workload.source
            * _numbers_of(layer.cross, scope.within(f"{name}_cross"))
            * precision.bytes_each,
            times=scope.within(name)("n_layers", arch.times(name), f"layers of the kind {name}"),
        )
        for name, layer in arch.kinds.items()
        if layer.cross is not None
    ]
    return branch("bytes_kv_cache", "bytes", children)


def _tokens_kept(layer: Layer, workload: Workload, scope: Scope) -> Expr:
    inside = scope.within(layer.name)
    match layer.attention:
        case Attention(span=Window(window=w)):
            return minimum(workload.S, inside("window", w, "latest keys that a query sees"))
        case Attention(span=Chunked(chunk=c)):
            return minimum(workload.S, inside("chunk", c, "tokens of an attention chunk"))
    return workload.S


def _numbers_of(attention: Attention | LatentAttention, inside: Scope) -> Expr:
    """Numbers cached per token."""
    match attention:
        case Attention() as spec:
            kv = inside("n_kv_heads", spec.n_kv_heads, "key-value heads")
            return 2 * kv * inside("d_head", spec.d_head, "size of a head")
        case LatentAttention() as spec:
            latent = inside("d_kv_latent", spec.d_kv_latent, "size of the cached latent")
            return latent + inside("d_head_rope", spec.d_head_rope, "rotated head size")


def memory_inference(
    arch: Arch, workload: Workload, precision: Precision, kv_precision: Precision | None = None
) -> Node:
    """Memory of a forward pass without gradients: weights, cache, activations, logits.

    `workload.seq_len` tokens per sequence are read at once against `context` cached ones.
    Logits are those of the last position, in fp32, as a server samples from them.
    """
    kv_precision = kv_precision or (
        precision if precision.value[:2] in ("fp", "bf") else Precision.BF16
    )
    working = Precision.FP32 if precision is Precision.FP32 else Precision.BF16
    vocabulary = Symbol("vocab_size", arch.vocab_size)
    logits = workload.B * vocabulary * Precision.FP32.bytes_each
    return branch(
        "memory",
        "bytes",
        [
            bytes_weights(arch, precision),
            bytes_kv_cache(arch, workload, kv_precision),
            leaf(
                "bytes_activations",
                "bytes",
                _widest(arch, workload) * working.bytes_each,
                basis=Basis.MODELLED,
                source="widest moment of a layer with flash attention, two residual streams",
            ),
            leaf("bytes_logits", "bytes", logits),
        ],
    )


def _widest(arch: Arch, workload: Workload) -> Expr:
    """Numbers alive at the widest moment of any layer: two streams and the widest block."""
    scope = Scope()
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


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Bytes per parameter of weights, gradients and optimizer, by storage recipe."""

    name: str
    weights: int
    grads: int
    optimizer: int
    activation: Precision
    source: str


#: Adam keeps two moments in fp32; mixed precision adds an fp32 master copy.
TRAINING_STATES = {
    s.name: s
    for s in (
        TrainingState("fp32", 4, 4, 8, Precision.FP32, "weights, gradients, m, v: all fp32"),
        TrainingState("bf16", 2, 2, 12, Precision.BF16,
                      "bf16 weights and gradients; fp32 master, m, v (Rajbhandari 2020, 1910.02054, 3.1)"),
        TrainingState("bf16-fp32-grads", 2, 4, 12, Precision.BF16,
                      "bf16 weights; fp32 gradients, master, m, v (Megatron-Core dist_optimizer.md)"),
    )
}  # fmt: skip


def memory_training(arch: Arch, workload: Workload, state: TrainingState) -> Node:
    """Everything a training step keeps, on one device, nothing recomputed or sharded.

    The sum holds gradients beside all activations, as trainers that keep gradient
    buffers do; `isoflop.plan.peak` follows the moments of our own trainer.
    """
    N = params(arch).total
    return branch(
        "memory",
        "bytes",
        [
            leaf("bytes_weights", "bytes", N * Symbol("bytes_per_weight", state.weights), source=state.source),
            leaf("bytes_grads", "bytes", N * Symbol("bytes_per_grad", state.grads), source=state.source),
            leaf("bytes_optimizer", "bytes", N * Symbol("bytes_per_param_optimizer", state.optimizer),
                 source=state.source),
            bytes_saved(arch, workload, state.activation),
        ],
    )  # fmt: skip


def bytes_saved(arch: Arch, workload: Workload, activation: Precision) -> Node:
    """Tensors kept from forward to backward, by path: flash attention, eager kernels, no dropout."""
    sizes: dict[str, Callable[[], Expr]] = {
        "activation": lambda: activation.bytes_each,
        "fp32": lambda: Precision.FP32.bytes_each,
        "index": lambda: Symbol("bytes_index", 8, meaning="bytes of a token id"),
    }

    def held(saved: Saved) -> Expr:
        return saved.size * sizes[saved.kind]()

    def fold(part: Part, name: str) -> Node:
        if part.parts:
            return branch(
                name, "bytes", [fold(p, p.name) for p in part.parts if _keeps(p)], times=part.times
            )
        size = total(map(held, part.saved))
        return leaf(name, "bytes", size, times=part.times, basis=Basis.MODELLED)

    return fold(describe(arch, workload), "bytes_activations")


def _keeps(part: Part) -> bool:
    return bool(part.saved) or any(map(_keeps, part.parts))
