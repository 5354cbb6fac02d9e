"""What of a model Megatron-LM has no arguments for, field by field."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TypeAlias

from isoflop.arch.spec import (
    Arch,
    Attention,
    Dense,
    Experts,
    Full,
    LatentAttention,
    Layer,
    LayerNorm,
    Learned,
    LinearScaling,
    Llama3Scaling,
    Norm,
    Rope,
    Window,
    Wiring,
    YarnScaling,
)
from isoflop.count.blocks import beside
from isoflop.errors import Problem
from isoflop.plan.emit.megatron_model import ACTIVATIONS, PADDING, biased, biases, window_of

#: Field, value, rule, and whether it holds.
Rule: TypeAlias = tuple[str, object, str, bool]

#: Llama 3.1's scaling but for its factor, as Megatron has it (rotary_pos_embedding.py).
LLAMA_3 = Llama3Scaling(8.0, 1.0, 4.0, 8192)
#: YaRN's ramp, as Megatron's latent attention has it (MLATransformerConfig); no argument sets it.
YARN = YarnScaling(40.0, 4096, beta_fast=32.0, beta_slow=1.0)

NO_WORD = "no argument says another"


def unsaid_model(arch: Arch, tp: int) -> Iterator[Problem]:
    """Every field that Megatron cannot follow."""
    yield from beside(arch, "is None: pretrain_gpt.py trains decoders")
    if (rows := arch.embedding.n_rows) % tp:
        more = -(-rows // (PADDING * tp)) * PADDING * tp
        hint = f"give a spec with n_rows={more}, to which Megatron would pad the vocabulary"
        yield Problem("embedding.n_rows", rows, f"is a multiple of tp={tp}", hint)
    rules = [*_ends(arch), *_alike(arch)]
    for layer in arch.kinds.values():
        rules += [(f"{layer.name}.{f}", value, rule, ok) for f, value, rule, ok in _layer(layer)]
    yield from (Problem(field, value, rule) for field, value, rule, holds in rules if not holds)


def _ends(arch: Arch) -> Iterator[Rule]:
    embedding, head, position = arch.embedding, arch.head, arch.embedding.position
    norm = arch.layers[0].norm
    yield ("embedding.position", _kind(position), "is learned, without offset, or None",
           position is None or (isinstance(position, Learned) and not position.offset))  # fmt: skip
    yield "embedding.norm", _kind(embedding.norm), "is None", embedding.norm is None
    yield "embedding.d_embed", embedding.d_embed, "is None", embedding.d_embed is None
    yield "embedding.scale", embedding.scale, f"is 1: {NO_WORD}", embedding.scale == 1
    yield ("embedding.dropout", embedding.dropout, "is the layers': one argument sets both",
           embedding.dropout == arch.layers[0].dropout)  # fmt: skip
    yield "head.bias", head.bias, "is False", not head.bias
    yield "head.scale", head.scale, f"is 1: {NO_WORD}", head.scale == 1
    yield "head.softcap", head.softcap, "is None: no argument caps logits", head.softcap is None
    yield ("final_norm", _kind(arch.final_norm), "is the layers' own: one argument sets all norms",
           arch.final_norm == norm)  # fmt: skip


#: What all layers share, where an argument speaks of all of them at once.
SHARED: Mapping[str, Callable[[Layer], object]] = {
    "attention": lambda layer: _heads(layer.attention),
    "attention.position": lambda layer: layer.attention.position,
    "attention.span": window_of,
    "norm": lambda layer: layer.norm,
    "dropout": lambda layer: layer.dropout,
    "d_ff": lambda layer: layer.feed_forward if isinstance(layer.feed_forward, Dense) else None,
    "experts": lambda layer: layer.feed_forward if isinstance(layer.feed_forward, Experts) else None,
}  # fmt: skip


def _alike(arch: Arch) -> Iterator[Rule]:
    """What some layers have, all that have it have alike; activations are of one kind."""
    layers = arch.kinds.values()
    for field, of in SHARED.items():
        found = {of(layer) for layer in layers} - {None}
        yield field, ", ".join(arch.kinds), "is one in all layers that have it", len(found) < 2
    acts = {(dense.activation, dense.gated) for layer in layers for dense in _dense(layer)}
    yield (
        "activation",
        ", ".join(a for a, _ in sorted(acts)),
        "is one in all layers",
        len(acts) == 1,
    )


def _heads(attention: Attention | LatentAttention) -> object:
    """An attention but for what may differ between layers."""
    if isinstance(attention, LatentAttention):
        return attention
    return replace(attention, position=None, span=Full())


def _layer(layer: Layer) -> Iterator[Rule]:
    yield "wiring", layer.wiring, "is pre", layer.wiring is Wiring.PRE
    yield "residual_scale", layer.residual_scale, f"is 1: {NO_WORD}", layer.residual_scale == 1
    yield from _norm(layer.norm)
    match layer.attention:
        case Attention() as attention:
            yield from _attention(attention, layer.norm)
        case LatentAttention() as latent:
            yield from _latent(latent, layer.norm)
    has, full = biases(layer), biased(layer)
    qkv = {"qkv"} & full
    yield ("bias", ", ".join(sorted(has)), f"is in none of {', '.join(sorted(full))}, in all, "
           "or in qkv alone", has in (set(), full, qkv))  # fmt: skip
    yield from _feed_forward(layer)


def _norm(norm: Norm) -> Iterator[Rule]:
    whole = not isinstance(norm, LayerNorm) or (norm.weight and norm.bias)
    yield "norm", _kind(norm), "has weights and biases if it is a LayerNorm", whole


def _attention(attention: Attention, norm: Norm) -> Iterator[Rule]:
    qk_norm, span, position = attention.qk_norm, attention.span, attention.position
    usual = attention.scale is None or attention.scale == attention.d_head**-0.5
    cap = attention.logit_softcap
    yield "attention.scale", attention.scale, f"is None: {NO_WORD}", usual
    yield "attention.logit_softcap", cap, "is None: no argument caps scores", cap is None
    yield ("attention.span", span.kind, "is full or a window", isinstance(span, Full | Window))
    yield ("attention.position", _kind(position), "is rope or None",
           position is None or isinstance(position, Rope))  # fmt: skip
    if qk_norm is not None:
        yield ("attention.qk_norm", qk_norm.per, "is over a head, with the layer's norm",
               qk_norm.per == "head" and qk_norm.norm == norm)  # fmt: skip
    if isinstance(position, Rope):
        yield from _rope(position, attention.d_head)
        kind = None if position.scaling is None else position.scaling.kind
        yield ("attention.position.scaling", kind, "is None, llama3 or linear: the parser has "
               "yarn for latent attention alone", kind in (None, "llama3", "linear"))  # fmt: skip


def _latent(latent: LatentAttention, norm: Norm) -> Iterator[Rule]:
    rope = latent.position
    yield "attention.scale", latent.scale, f"is None: {NO_WORD}", latent.scale is None
    yield "attention.norm", _kind(latent.norm), "is the layer's own", latent.norm == norm
    yield "attention.bias_qkv", latent.bias_qkv, "is False", not latent.bias_qkv
    yield "attention.position.interleaved", rope.interleaved, "is True", rope.interleaved
    yield from _rope(rope, latent.d_head_rope)
    match rope.scaling:
        case None:
            return
        case YarnScaling() as yarn:
            ramp = replace(yarn, factor=YARN.factor, mscale=None, mscale_all_dim=None)
            both = bool(yarn.mscale) == bool(yarn.mscale_all_dim)
            yield ("attention.position.scaling", yarn, "has DeepSeek's ramp and temperature",
                   ramp == YARN and both)  # fmt: skip
        case other:
            yield "attention.position.scaling", other.kind, "is None or yarn", False


def _rope(rope: Rope, d_head: int) -> Iterator[Rule]:
    whole = float(rope.theta).is_integer()
    yield "attention.position.theta", rope.theta, "is a whole number", whole
    turned = rope.d_rotary or d_head
    yield ("attention.position.d_rotary", rope.d_rotary, "is what its share of the head, cut to a "
           "whole number, gives", int(d_head * (turned / d_head)) == turned)  # fmt: skip
    yield "attention.position.sections", rope.sections, f"is None: {NO_WORD}", rope.sections is None
    match rope.scaling:
        case Llama3Scaling() as llama:
            same = replace(llama, factor=LLAMA_3.factor) == LLAMA_3
            yield "attention.position.scaling", llama, "is Llama 3.1's but for its factor", same
        case LinearScaling(factor=factor):
            yield ("attention.position.scaling.factor", factor, "is a whole number",
                   float(factor).is_integer())  # fmt: skip


def _feed_forward(layer: Layer) -> Iterator[Rule]:
    for dense in _dense(layer):
        said = sorted(a + " gated" * gated for a, gated in ACTIVATIONS)
        mine = dense.activation + " gated" * dense.gated
        yield "feed_forward.activation", mine, f"is one of {', '.join(said)}", mine in said
        yield "feed_forward.dropout", dense.dropout, f"is 0: {NO_WORD}", dense.dropout == 0
        fused = dense.bias and isinstance(layer.feed_forward, Dense)
        yield ("feed_forward.activation", mine, "has a bias and no experts: elsewhere Megatron's "
               "GELU is the exact one", fused or mine != "gelu_tanh")  # fmt: skip
    if isinstance(layer.feed_forward, Experts):
        yield from _experts(layer.feed_forward)


def _experts(block: Experts) -> Iterator[Rule]:
    biased_shared = block.shared is not None and block.shared.bias
    several = block.n_active > 1
    best = 2 if block.score_correction else 1
    yield "feed_forward.shared.bias", biased_shared, "is False", not biased_shared
    yield ("feed_forward.normalize", block.normalize, "is False where one expert is active, True "
           "where several have sigmoid scores",
           block.normalize == several if block.score == "sigmoid" else several or not block.normalize)  # fmt: skip
    yield ("feed_forward.score_correction", block.score_correction, "comes with sigmoid scores",
           block.score == "sigmoid" or not block.score_correction)  # fmt: skip
    yield ("feed_forward.n_active", block.n_active, f"is {best} times n_active_groups: Megatron "
           "judges a group by as many experts as are taken from it",
           block.n_groups == 1 or block.n_active // block.n_active_groups == best)  # fmt: skip


def _dense(layer: Layer) -> list[Dense]:
    match layer.feed_forward:
        case Dense() as dense:
            return [dense]
        case Experts(expert=expert, shared=shared):
            return [expert] if shared is None else [expert, shared]


def _kind(value: object) -> object:
    return getattr(value, "kind", value)
