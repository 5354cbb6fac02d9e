"""Attention: grouped, latent, and across to an encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from isoflop.arch.spec import (
    Alibi,
    Attention,
    BlockSparse,
    Chunked,
    LatentAttention,
    QkNorm,
    RelativeBias,
    RelativeProjection,
    Rope,
    Rope2d,
    Window,
)
from isoflop.count.blocks.norms import norm_part
from isoflop.count.blocks.part import Ground, Part, Saved, Weight, linear
from isoflop.count.operators import BesideScores, Core, Pointwise
from isoflop.quantity import Expr, ceil_div, maximum, minimum, number


def attention_part(ground: Ground, spec: Attention | LatentAttention) -> Part:
    """Self-attention of one layer."""
    match spec:
        case Attention():
            return _grouped_attention(ground, spec)
        case LatentAttention():
            return _latent_attention(ground, spec)


def _grouped_attention(ground: Ground, spec: Attention) -> Part:
    """Multi-head, grouped-query and multi-query attention: K = N, 1 < K < N, K = 1."""
    D = ground.D
    N, K, H = _heads(ground, spec)
    queries, keys = ground.tokens * N * H, ground.tokens * K * H
    model, bias = ("model", D), spec.bias_qkv
    parts: list[Part] = [
        linear(ground, "q", model, ("heads", N * H), bias=bias),
        linear(ground, "k", model, ("kv_heads", K * H), bias=bias, keep_input=False),
        linear(ground, "v", model, ("kv_heads", K * H), bias=bias, keep_input=False),
        *_qk_norms(ground, spec.qk_norm, N, K, H),
    ]
    if isinstance(spec.position, Rope | Rope2d):
        parts.append(Part("rotary", (), Pointwise("rotary", queries + keys, queries + keys)))
    parts += _told_positions(ground, spec, N, H)
    parts.append(_core_part(ground, spec, N, K, H, keys_seen(ground, spec), keys))
    # The core's output is the projection's input: one tensor, kept once.
    parts.append(
        linear(ground, "out", ("heads", N * H), model, bias=spec.bias_out, keep_input=False)
    )
    return Part("attention", parts=tuple(parts))


def _core_part(
    ground: Ground, spec: Attention, N: Expr, K: Expr, H: Expr, seen: Expr, keys: Expr
) -> Part:
    """Scores and weighted values. Transformer-XL scores each key twice: itself and its distance."""
    queries = ground.tokens * N * H
    scored = 2 * H if isinstance(spec.position, RelativeProjection) else H
    kept = [
        Saved("queries", queries, axis="heads"),
        Saved("keys and values", 2 * keys, axis="kv_heads"),
        Saved("output", queries, axis="heads"),
        Saved("log-sum-exp", ground.tokens * N, "fp32", "heads"),
    ]
    if isinstance(spec.position, RelativeProjection):
        kept += _by_distance(ground, N, H)
    core = Core(ground.B, N, K, ground.T, seen, ground.S, scored, H, tuple(_beside_scores(spec)))
    return Part("core", (), core, tuple(kept), kept_by_some=scores(ground, N, spec.dropout))


def _beside_scores(spec: Attention) -> Iterator[BesideScores]:
    """What is done to scores beside scaling them and the softmax."""
    if spec.logit_softcap is not None:
        yield "softcap"
    if spec.sinks:
        yield "sinks"
    match spec.position:
        case Alibi():
            yield "alibi"
        case RelativeBias():
            yield "bias"
        case RelativeProjection():
            yield "distances"
    if spec.dropout:
        yield "dropout"


def scores(ground: Ground, N: Expr, dropout: float) -> tuple[Saved, ...]:
    """What attention without flash keeps: every pair's probability, and again after dropout."""
    pairs = ground.tokens * N * ground.S
    kept = Saved("probabilities", pairs, "scores", "heads")
    if not dropout:
        return (kept,)
    mask = Saved("mask of probabilities", pairs, "mask_scores", "heads")
    return (kept, mask, Saved("dropped probabilities", pairs, "scores", "heads"))


def _told_positions(ground: Ground, spec: Attention, N: Expr, H: Expr) -> list[Part]:
    """What attention itself trains for positions, and its sinks; a shared bias is the stack's."""
    parts: list[Part] = []
    match spec.position:
        case RelativeBias(shared=False):
            parts.append(bias_table(ground, "bias", spec.position, N))
        case RelativeProjection():
            into, heads = ("model", ground.D), ("heads", N * H)
            vectors = (Weight("u", (heads,)), Weight("v", (heads,)))
            # Sines and cosines are constants, made once for all layers: the map's weights have a
            # gradient, its input none.
            parts.append(
                linear(ground, "distances", into, heads, bias=False, rows=ground.S,
                       keep_input=False, input_fixed=True)
            )  # fmt: skip
            parts.append(Part("distance_biases", vectors))
    if spec.sinks:
        parts.append(Part("sinks", (Weight("weight", (("heads", N),)),)))
    return parts


def _by_distance(ground: Ground, N: Expr, H: Expr) -> tuple[Saved, ...]:
    """Scores of distances have a gradient, so no kernel makes them again: they wait, as does what
    they were made of.
    """
    scored = Saved("scores of distances", ground.tokens * N * ground.S, axis="heads")
    queries = Saved("queries for distances", ground.tokens * N * H, axis="heads")
    return (scored, queries, Saved("distances", ground.S * N * H, axis="heads"))


def bias_table(ground: Ground, name: str, position: RelativeBias, N: Expr) -> Part:
    """T5's bias per distance bucket and head."""
    buckets = ground.scope("n_buckets", position.n_buckets, "buckets of distance")
    # Every pair of a sequence has a bucket and biases, the same in all of a batch.
    pairs = ground.T * ground.S
    kept = Saved("buckets", pairs, "index"), Saved("biases", pairs * N, axis="heads")
    return Part(name, (Weight("weight", (("bucket", buckets), ("heads", N))),), saved=kept)


def cross_part(ground: Ground, spec: Attention, source: Expr, *, cached: bool) -> Part:
    """Attention to `source` tokens of an encoder; `cached`: their keys and values are held.

    The encoder's output is kept once, by the encoder, and read by every layer.
    """
    D = ground.D
    N, K, H = _heads(ground, spec)
    rows = number(0) if cached else ground.B * source
    across = replace(ground, S=source, causal_skip=False)
    model, values, bias = ("model", D), ("kv_heads", K * H), spec.bias_qkv
    parts: list[Part] = [
        linear(ground, "q", model, ("heads", N * H), bias=bias),
        linear(ground, "k", model, values, bias=bias, rows=rows, keep_input=False),
        linear(ground, "v", model, values, bias=bias, rows=rows, keep_input=False),
        *_qk_norms(ground, spec.qk_norm, N, K, H),
        *_told_positions(across, spec, N, H),
        _core_part(across, spec, N, K, H, source, ground.B * source * K * H),
        linear(ground, "out", ("heads", N * H), model, bias=spec.bias_out, keep_input=False),
    ]
    return Part("cross", parts=tuple(parts))


def _heads(ground: Ground, spec: Attention) -> tuple[Expr, Expr, Expr]:
    """N, K and H; K is N where every head has keys and values of its own."""
    N = ground.scope("n_heads", spec.n_heads, "query heads")
    shared = spec.n_kv_heads != spec.n_heads
    K = ground.scope("n_kv_heads", spec.n_kv_heads, "key-value heads") if shared else N
    return N, K, ground.scope("d_head", spec.d_head, "size of a head")


def _qk_norms(ground: Ground, spec: QkNorm | None, N: Expr, K: Expr, H: Expr) -> list[Part]:
    if spec is None:
        return []
    tokens = ground.tokens
    if spec.per == "all_heads":
        return [
            norm_part(ground, "q_norm", spec.norm, N * H, axis="heads"),
            norm_part(ground, "k_norm", spec.norm, K * H, axis="kv_heads"),
        ]
    copies = (N, K) if spec.per == "each_head" else (None, None)
    return [
        norm_part(ground, "q_norm", spec.norm, H, tokens * N, copies[0], axis="heads"),
        norm_part(ground, "k_norm", spec.norm, H, tokens * K, copies[1], axis="kv_heads"),
    ]


def keys_seen(ground: Ground, spec: Attention) -> Expr:
    """Keys per query that scores are computed for, on average over the queries.

    With `causal_skip`, those that the mask leaves: of a window or a chunk exactly, of sparse
    blocks an upper bound, as the ramp at the start of a sequence is counted as full.
    """
    seen = _keys_in_span(ground, spec)
    if ground.ahead is None or not ground.causal_skip:
        return seen
    return seen + ground.ahead / ground.T


def _keys_in_span(ground: Ground, spec: Attention) -> Expr:
    seen = _keys_before(ground)
    match spec.span:
        case Window(window=w):
            window = ground.scope("window", w, "latest keys that a query sees")
            if not ground.causal_skip:
                return minimum(seen, window)
            return _mean_of(
                ground, lambda n: _triangle(minimum(n, window)) + maximum(n - window, 0) * window
            )
        case Chunked(chunk=c):
            chunk = ground.scope("chunk", c, "tokens of an attention chunk")
            if not ground.causal_skip:
                return minimum(seen, chunk)
            return _mean_of(ground, lambda n: _in_chunks(n, chunk))
        case BlockSparse(block=block, n_local=n, stride=stride):
            local = ground.scope("d_local", block * n, "keys in a query's local blocks")
            far = maximum(seen - local, 0) / stride if stride else number(0)
            return minimum(seen, local) + far
    return seen


def _keys_before(ground: Ground) -> Expr:
    """Keys per query without a span: query i of T over S keys has S - T + i before it, or at it."""
    S, T = ground.S, ground.T
    if not ground.causal_skip:
        return S
    return (S + 1) / 2 if S == T else S - (T - 1) / 2


def _mean_of(ground: Ground, pairs: Callable[[Expr], Expr]) -> Expr:
    """Pairs per query, where the first n tokens of a sequence have `pairs(n)` among them."""
    S, T = ground.S, ground.T
    return pairs(S) / T if S == T else (pairs(S) - pairs(S - T)) / T


def _triangle(n: Expr) -> Expr:
    """Pairs of n tokens under a causal mask."""
    return n * (n + 1) / 2


def _in_chunks(n: Expr, chunk: Expr) -> Expr:
    """Pairs of n tokens, each in its own chunk: whole chunks, and the one begun."""
    whole = ceil_div(n + 1, chunk) - 1
    return whole * _triangle(chunk) + _triangle(n - whole * chunk)


def _norm_of_part(norm: Part, beside: Expr) -> Part:
    """A norm that reads a part of a tensor keeps what stands beside it too."""
    wide = (replace(s, size=s.size + beside) if s.name == "input" else s for s in norm.saved)
    return replace(norm, saved=tuple(wide))


def _latent_attention(ground: Ground, spec: LatentAttention) -> Part:
    """Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1).

    Whole sequences rebuild keys and values. Tokens against a cache meet the latents themselves:
    `kv_up` is absorbed into queries and output (section 2.1.2), which takes the same FLOPs per
    token as to rebuild that token's own keys and values.
    """
    scope, D = ground.scope, ground.D
    N = scope("n_heads", spec.n_heads, "query heads")
    nope = scope("d_head_nope", spec.d_head_nope, "head size without position")
    rope = scope("d_head_rope", spec.d_head_rope, "rotated head size")
    value = scope("d_head_value", spec.d_head_value, "head size of values")
    latent = scope("d_kv_latent", spec.d_kv_latent, "size of the cached latent")
    model, heads = ("model", D), ("heads", N * (nope + rope))
    if spec.d_q_latent is None:
        parts = [linear(ground, "q", model, heads, bias=False)]
    else:
        q_latent = scope("d_q_latent", spec.d_q_latent, "size of the query latent")
        parts = [
            linear(ground, "q_down", model, ("latent", q_latent), bias=spec.bias_qkv),
            norm_part(ground, "q_norm", spec.norm, q_latent),
            linear(ground, "q_up", ("latent", q_latent), heads, bias=False),
        ]
    turned = ground.tokens * (N + 1) * rope
    parts += [
        linear(
            ground,
            "kv_down",
            model,
            ("latent", latent + rope),
            bias=spec.bias_qkv,
            keep_input=False,
        ),
        _norm_of_part(norm_part(ground, "kv_norm", spec.norm, latent), ground.tokens * rope),
        linear(ground, "kv_up", ("latent", latent), ("heads", N * (nope + value)), bias=False),
        Part("rotary", (), Pointwise("rotary", turned, turned)),
    ]
    tokens, S, seen = ground.tokens, ground.S, _keys_before(ground)
    beside: tuple[BesideScores, ...] = ("dropout",) if spec.dropout else ()
    core = Core(ground.B, N, N, ground.T, seen, S, nope + rope, value, beside)
    if S != ground.T:  # against a cache of latents: maps out of them join queries and output
        core = Core(ground.B, N, number(1), ground.T, seen, S, latent + rope, latent)
    kept = (
        Saved("queries and keys", 2 * tokens * N * (nope + rope), axis="heads"),
        Saved("values and output", 2 * tokens * N * value, axis="heads"),
        Saved("log-sum-exp", tokens * N, "fp32", "heads"),
    )
    parts.append(Part("core", (), core, kept, kept_by_some=scores(ground, N, spec.dropout)))
    parts.append(
        linear(ground, "out", ("heads", N * value), model, bias=spec.bias_out, keep_input=False)
    )
    return Part("attention", parts=tuple(parts))
