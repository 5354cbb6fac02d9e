"""A model in the words of Megatron-LM, and what of it has no words there.

Names and meanings are those of Megatron-Core 0.16: the fields of TransformerConfig and
MLATransformerConfig (megatron/core/transformer/transformer_config.py), whose flags its parser
makes, and what that adds (megatron/training/arguments.py, February 2026).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import TypeAlias

from isoflop.arch.spec import (
    Arch,
    Attention,
    Dense,
    Experts,
    LatentAttention,
    Layer,
    LayerNorm,
    Learned,
    LinearScaling,
    Llama3Scaling,
    Rope,
    Window,
    YarnScaling,
)
from isoflop.plan.layout import divisors

Flags: TypeAlias = dict[str, str | int | float | None]

#: What the vocabulary is rounded up to a multiple of when nothing is said.
PADDING = 128

#: Arguments of a feed-forward by its activation and whether it is gated. GELU with its bias is
#: one kernel, in tanh's form; each on its own, it is the exact one (megatron/core/transformer/
#: mlp.py, fusions/fused_bias_gelu.py).
ACTIVATIONS: Mapping[tuple[str, bool], Flags] = {
    ("gelu_tanh", False): {},
    ("gelu", False): {"--no-bias-gelu-fusion": None},
    ("relu_squared", False): {"--squared-relu": None, "--no-bias-gelu-fusion": None},
    ("silu", True): {"--swiglu": None},
    ("gelu_quick", True): {"--quick-geglu": None, "--no-bias-gelu-fusion": None},
    ("silu_clamped", True): {"--quick-geglu": None, "--no-bias-gelu-fusion": None,
                             "--activation-func-clamp-value": 7.0, "--glu-linear-offset": 1.0},
}  # fmt: skip


def model_flags(arch: Arch, tp: int) -> Flags:
    """The model's own arguments, of a model that `unsaid_model` finds nothing wrong with."""
    return {
        **_whole(arch, tp),
        **_attention(arch.layers[0]),
        **_spans(arch),
        **_positions(arch),
        **_norm(arch.layers[0]),
        **_biases(arch.layers[0]),
        **_feed_forwards(arch),
    }


# --- the whole ----------------------------------------------------------------------------------


def _whole(arch: Arch, tp: int) -> Flags:
    learned = arch.embedding.position
    longest = learned.n_positions if isinstance(learned, Learned) else arch.max_seq_len
    return {
        "--num-layers": arch.n_layers,
        "--hidden-size": arch.d_model,
        "--max-position-embeddings": longest,
        "--vocab-size": arch.vocab_size,
        "--make-vocab-size-divisible-by": padding(arch.vocab_size, arch.embedding.n_rows, tp),
        **({} if arch.head.tied else {"--untie-embeddings-and-output-weights": None}),
        "--attention-dropout": arch.layers[0].attention.dropout,
        "--hidden-dropout": arch.layers[0].dropout,
    }


def padding(vocab_size: int, n_rows: int, tp: int) -> int:
    """Of which `n_rows` is the least multiple, times `tp`, that has room for the vocabulary.

    >>> padding(50257, 50304, tp=1), padding(128256, 128256, tp=8)
    (128, 1)
    """
    fitting = [each for each in divisors(n_rows // tp) if each * tp > n_rows - vocab_size]
    return PADDING if PADDING in fitting else fitting[0]


def pattern(bits: list[int]) -> str:
    """One number for each layer, as Megatron's parser reads them.

    >>> pattern([0, 1, 1, 1]), pattern([1, 0, 1, 0])
    ('[0]*1+[1]*3', '([1]*1+[0]*1)*2')
    """
    period = next(p for p in divisors(len(bits)) if bits[:p] * (len(bits) // p) == bits)
    runs = [f"[{bit}]*{len(list(alike))}" for bit, alike in groupby(bits[:period])]
    once = "+".join(runs)
    return once if period == len(bits) else f"({once})*{len(bits) // period}"


# --- a layer ------------------------------------------------------------------------------------


def _attention(layer: Layer) -> Flags:
    """Heads; a latent attention's norms are what --qk-layernorm says there."""
    match layer.attention:
        case Attention() as heads:
            grouped = heads.n_kv_heads < heads.n_heads
            return {
                "--num-attention-heads": heads.n_heads,
                "--kv-channels": heads.d_head,
                **({"--group-query-attention": None, "--num-query-groups": heads.n_kv_heads}
                   if grouped else {}),
                **({"--qk-layernorm": None} if heads.qk_norm is not None else {}),
                **({"--softmax-type": "learnable"} if heads.sinks else {}),
            }  # fmt: skip
        case LatentAttention() as latent:
            return {
                "--multi-latent-attention": None,
                "--num-attention-heads": latent.n_heads,
                "--kv-channels": latent.d_head_value,
                **({"--q-lora-rank": latent.d_q_latent} if latent.d_q_latent is not None else {}),
                "--kv-lora-rank": latent.d_kv_latent,
                "--qk-head-dim": latent.d_head_nope,
                "--qk-pos-emb-head-dim": latent.d_head_rope,
                "--v-head-dim": latent.d_head_value,
                "--qk-layernorm": None,
            }


def _spans(arch: Arch) -> Flags:
    """A window's first number is how many keys before the query's own are seen."""
    windows = [window_of(layer) for layer in arch.layers]
    seen = [window for window in windows if window is not None]
    if not seen:
        return {}
    flags: Flags = {"--window-size": f"{seen[0].window - 1},0"}
    if len(seen) < arch.n_layers:
        flags["--window-attn-skip-freq"] = pattern([int(w is not None) for w in windows])
    return flags


def window_of(layer: Layer) -> Window | None:
    span = layer.attention.span if isinstance(layer.attention, Attention) else None
    return span if isinstance(span, Window) else None


def _norm(layer: Layer) -> Flags:
    flags: Flags = {
        "--normalization": "LayerNorm" if isinstance(layer.norm, LayerNorm) else "RMSNorm",
        "--norm-epsilon": layer.norm.eps,
    }
    one_more = not isinstance(layer.norm, LayerNorm) and layer.norm.unit_offset
    return {**flags, "--apply-layernorm-1p": None} if one_more else flags


def biases(layer: Layer) -> set[str]:
    """The places that have a bias, of those that Megatron gives one."""
    attention, feed_forward = layer.attention, layer.feed_forward
    inner = feed_forward.expert if isinstance(feed_forward, Experts) else feed_forward
    has = {
        "qkv": attention.bias_qkv,
        "out": attention.bias_out,
        "feed_forward": inner.bias,
        "router": isinstance(feed_forward, Experts) and feed_forward.router_bias,
    }
    return {place for place, there in has.items() if there}


def biased(layer: Layer) -> set[str]:
    """The places that have a bias when Megatron's linear maps have: a latent has none."""
    router = {"router"} if isinstance(layer.feed_forward, Experts) else set()
    qkv = {"qkv"} if isinstance(layer.attention, Attention) else set()
    return {"out", "feed_forward"} | qkv | router


def _biases(layer: Layer) -> Flags:
    has = biases(layer)
    if has == biased(layer):
        return {}
    flags: Flags = {"--disable-bias-linear": None}
    return {**flags, "--add-qkv-bias": None} if has else flags


# --- positions ----------------------------------------------------------------------------------


def _positions(arch: Arch) -> Flags:
    if isinstance(arch.embedding.position, Learned):
        return {"--position-embedding-type": "learned_absolute"}
    turned = [isinstance(attention.position, Rope) for attention in arch.attentions()]
    if not any(turned):
        return {"--position-embedding-type": "none"}
    attention = next(a for a in arch.attentions() if isinstance(a.position, Rope))
    rope = attention.position
    assert isinstance(rope, Rope)
    flags: Flags = {"--position-embedding-type": "rope", "--rotary-base": int(rope.theta)}
    if isinstance(attention, Attention):
        if rope.d_rotary is not None:
            flags["--rotary-percent"] = rope.d_rotary / attention.d_head
        if rope.interleaved:
            flags["--rotary-interleaved"] = None
    if not all(turned):
        flags["--no-rope-freq"] = pattern([int(not there) for there in turned])
    return {**flags, **_scaling(rope, latent=isinstance(attention, LatentAttention))}


def _scaling(rope: Rope, *, latent: bool) -> Flags:
    """Slower turns. A latent attention has YaRN unless told, whose fused kernel is all it has."""
    match rope.scaling:
        case Llama3Scaling(factor=factor):
            return {"--use-rope-scaling": None, "--rope-scaling-factor": factor}
        case LinearScaling(factor=factor):
            return {"--rotary-seq-len-interpolation-factor": int(factor)}
        case YarnScaling() as yarn:
            return {
                "--rope-type": "yarn",
                "--rotary-scaling-factor": yarn.factor,
                "--mscale": yarn.mscale or 1.0,
                "--mscale-all-dim": yarn.mscale_all_dim or 0.0,
            }
        case _:
            return {"--rope-type": "rope", "--no-rope-fusion": None} if latent else {}


# --- feed-forwards ------------------------------------------------------------------------------


def _feed_forwards(arch: Arch) -> Flags:
    blocks = [layer.feed_forward for layer in arch.layers]
    dense = next((block for block in blocks if isinstance(block, Dense)), None)
    experts = next((block for block in blocks if isinstance(block, Experts)), None)
    first = dense or (experts.expert if experts is not None else None)
    assert first is not None
    flags: Flags = {"--ffn-hidden-size": first.d_ff, **ACTIVATIONS[first.activation, first.gated]}
    if experts is None:
        return flags
    if dense is not None:
        mixed = [int(isinstance(block, Experts)) for block in blocks]
        flags["--moe-layer-freq"] = pattern(mixed)
    return {**flags, **_experts(experts), **_router(experts)}


def _experts(block: Experts) -> Flags:
    flags: Flags = {"--num-experts": block.n_experts, "--moe-ffn-hidden-size": block.expert.d_ff}
    if block.shared is not None:
        flags["--moe-shared-expert-intermediate-size"] = block.shared.d_ff
    if block.shared_gate:
        flags["--moe-shared-expert-gate"] = None
    return flags


def _router(block: Experts) -> Flags:
    """Softmax is over the chosen experts, which is normalized, or over all of them before."""
    flags: Flags = {
        "--moe-router-topk": block.n_active,
        "--moe-router-score-function": block.score,
    }
    if block.score == "softmax" and not block.normalize:
        flags["--moe-router-pre-softmax"] = None
    if block.scale != 1:
        flags["--moe-router-topk-scaling-factor"] = block.scale
    if block.n_groups > 1:
        flags["--moe-router-num-groups"] = block.n_groups
        flags["--moe-router-group-topk"] = block.n_active_groups
    if block.score_correction:
        flags["--moe-router-enable-expert-bias"] = None
    return flags
