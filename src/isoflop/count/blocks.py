"""What each kind of block is made of: the one description that everything is folded from.

`describe(arch, workload)` gives a tree of `Part`s. A leaf part has the weights it
trains, the operator it runs forward and the tensors it keeps for backward; sizes are
expressions over the spec's letters. Parameters, FLOPs, memory and the operator list
are folds over this tree, so a new kind of block is described here once and then counts,
plans and prices by itself.

The paths (`layer/attention/k`) are those of the built module, which is written
independently; `isoflop check` holds the two against each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from isoflop.arch.spec import (
    Arch,
    Attention,
    BlockSparse,
    Chunked,
    Dense,
    Experts,
    FeedForward,
    LatentAttention,
    Layer,
    LayerNorm,
    Learned,
    Norm,
    QkNorm,
    RelativeBias,
    RmsNorm,
    Rope,
    Window,
    Wiring,
)
from isoflop.count.operators import Core, Gather, Loss, Matmul, Operator, Pointwise
from isoflop.count.workload import Workload
from isoflop.errors import InputError, Problem
from isoflop.quantity import Expr, Symbol, minimum, number
from isoflop.quantity.expr import product


@dataclass(frozen=True, slots=True)
class Weight:
    """A trained tensor; its axes have logical names, which sharding rules speak of."""

    name: str
    axes: tuple[tuple[str, Expr], ...]

    @property
    def size(self) -> Expr:
        return product(size for _, size in self.axes)


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor kept from forward to backward.

    `kind` says how it is stored, `axis` what its width is, in the words of weights' axes.
    """

    name: str
    size: Expr
    kind: str = "activation"
    axis: str = "model"


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a model: a leaf that does one thing, or a group of parts.

    `times` copies exist, `active` of them work on a given token (they differ only for
    experts). `saved` is what every kernel keeps, `kept_by_some` what only some do: scores
    and dropout masks.
    """

    name: str
    weights: tuple[Weight, ...] = ()
    operator: Operator | None = None
    saved: tuple[Saved, ...] = ()
    parts: tuple[Part, ...] = ()
    times: Expr = field(default_factory=lambda: number(1))
    active: Expr | None = None
    kept_by_some: tuple[Saved, ...] = ()


class Scope:
    """Symbols of one model: a name means one value, a second value gets a second name."""

    def __init__(self, label: str = "", taken: dict[str, int] | None = None) -> None:
        self.label = label
        self.taken: dict[str, int] = {} if taken is None else taken

    def within(self, label: str) -> Scope:
        return Scope(label, self.taken)

    def __call__(self, name: str, value: int, meaning: str = "") -> Symbol:
        if self.taken.setdefault(name, value) != value:
            name = f"{name}_{self.label}"
            self.taken[name] = value
        return Symbol(name, value, meaning=meaning)


@dataclass(frozen=True, slots=True)
class Ground:
    """What every block's description stands on: the workload, the width, the names."""

    scope: Scope
    work: Workload
    D: Expr

    @property
    def tokens(self) -> Expr:
        return self.work.tokens


def describe(arch: Arch, workload: Workload, scope: Scope | None = None) -> Part:
    """The whole model as parts; `scope` learns the names that it uses.

    Raises:
        InputError: the spec holds a kind of block that is not described yet.
    """
    _refuse_undescribed(arch)
    scope = Scope() if scope is None else scope
    ground = Ground(scope, workload, scope("d_model", arch.d_model, "width of the residual stream"))
    vocabulary = scope("vocab_size", arch.vocab_size, "tokens that can be read and written")
    rows = vocabulary
    if arch.embedding.n_rows != arch.vocab_size:
        rows = scope("n_rows", arch.embedding.n_rows, "rows of the embedding, padding included")
    layers = [
        _layer(ground, layer, arch.times(layer.name), alone=len(arch.kinds) == 1)
        for layer in arch.kinds.values()
    ]
    return Part(
        arch.name,
        parts=(
            _embedding(ground, arch, rows),
            *layers,
            *(
                []
                if arch.final_norm is None
                else [norm_part(ground, "final_norm", arch.final_norm)]
            ),
            _head(ground, arch, rows),
            _loss(ground, vocabulary),
        ),
    )


def names_of(arch: Arch, workload: Workload) -> Scope:
    """The names that the description uses, so that a formula beside it means the same by them."""
    scope = Scope()
    describe(arch, workload, scope)
    return scope


def _refuse_undescribed(arch: Arch) -> None:
    missing = {"encoder": arch.encoder, "vision": arch.vision}
    bad = [
        Problem(
            field, type(value).__name__, "is a kind of block that isoflop counts", "coming next"
        )
        for field, value in missing.items()
        if value is not None
    ]
    if bad:
        raise InputError(arch.name, bad)


# --- ends of the model ------------------------------------------------------------------


def _embedding(ground: Ground, arch: Arch, rows: Expr) -> Part:
    spec, D = arch.embedding, ground.D
    width = (
        D if spec.d_embed in (None, arch.d_model) else ground.scope("d_embed", spec.d_embed or 0)
    )
    parts = [
        Part(
            "tokens",
            (Weight("weight", (("vocab", rows), ("embed", width))),),
            Gather(ground.tokens, width),
            (Saved("token ids", ground.tokens, "index"),),
            kept_by_some=dropped(spec.dropout, ground.tokens * D),
        )
    ]
    if isinstance(spec.position, Learned):
        count = ground.scope(
            "n_positions", spec.position.n_positions + spec.position.offset, "learned positions"
        )
        parts.append(
            Part(
                "positions",
                (Weight("weight", (("position", count), ("embed", D))),),
                Pointwise("add", reads=2 * ground.tokens * D, writes=ground.tokens * D),
            )
        )
    if width is not D:
        parts.append(linear(ground, "project", ("embed", width), ("model", D), bias=False))
    if spec.norm is not None:
        parts.append(norm_part(ground, "norm", spec.norm))
    return Part("embedding", parts=tuple(parts))


def _head(ground: Ground, arch: Arch, rows: Expr) -> Part:
    weights = [] if arch.head.tied else [Weight("weight", (("vocab", rows), ("embed", ground.D)))]
    if arch.head.bias:
        weights.append(Weight("bias", (("vocab", rows),)))
    saved = Saved("input", ground.tokens * ground.D)
    return Part("head", tuple(weights), Matmul(ground.tokens, ground.D, rows), (saved,))


def _loss(ground: Ground, vocabulary: Expr) -> Part:
    """Cross entropy over the logits; its log-softmax is kept in fp32."""
    logits = ground.tokens * vocabulary
    return Part(
        "loss",
        (),
        Loss(ground.tokens, vocabulary),
        (Saved("log probabilities", logits, "fp32", "vocab"),),
    )


# --- layers -----------------------------------------------------------------------------


def _layer(ground: Ground, layer: Layer, times: int, *, alone: bool) -> Part:
    name = "n_layers" if alone else f"n_layers_{layer.name}"
    inside = Ground(ground.scope.within(layer.name), ground.work, ground.D)
    count = ground.scope(name, times, f"layers of the kind {layer.name}")
    return Part(layer.name, parts=tuple(_wire(inside, layer)), times=count)


def _wire(ground: Ground, layer: Layer) -> list[Part]:
    """The layer's parts in the order in which they run."""

    def norm(name: str) -> Part:
        return norm_part(ground, name, layer.norm)

    # In a parallel layer attention and feed-forward read one norm's output, kept once.
    shares_input = layer.wiring is Wiring.PARALLEL
    attention = _attention(ground, layer)
    feed_forward = _feed_forward(ground, layer.feed_forward, keep_input=not shares_input)
    add = Part(
        "residual",
        (),
        Pointwise("add", reads=2 * ground.tokens * ground.D, writes=ground.tokens * ground.D),
        times=number(2),
        kept_by_some=dropped(layer.dropout, ground.tokens * ground.D),
    )
    match layer.wiring:
        case Wiring.PRE | Wiring.PARALLEL_TWO_NORMS:
            order = [norm("norm_attention"), attention, norm("norm_feed_forward"), feed_forward]
        case Wiring.POST:
            order = [attention, norm("norm_attention"), feed_forward, norm("norm_feed_forward")]
        case Wiring.OUTPUT:
            order = [
                attention,
                norm("norm_attention_out"),
                feed_forward,
                norm("norm_feed_forward_out"),
            ]
        case Wiring.SANDWICH:
            order = [
                *(norm("norm_attention"), attention, norm("norm_attention_out")),
                *(norm("norm_feed_forward"), feed_forward, norm("norm_feed_forward_out")),
            ]
        case Wiring.PARALLEL:
            order = [norm("norm"), attention, feed_forward]
    return [*order, add]


def dropped(dropout: float, size: Expr, axis: str = "model") -> tuple[Saved, ...]:
    """The mask of a dropout, where there is one."""
    return (Saved("mask", size, "mask", axis),) if dropout else ()


def norm_part(
    ground: Ground,
    name: str,
    norm: Norm,
    width: Expr | None = None,
    rows: Expr | None = None,
    *,
    axis: str = "model",
) -> Part:
    """A normalisation: its vectors, one pass over the data, input and statistics kept."""
    width = ground.D if width is None else width
    rows = ground.tokens if rows is None else rows
    match norm:
        case LayerNorm(weight=weight, bias=bias):
            names = ["weight"] * weight + ["bias"] * bias
            kind, statistics = "layer_norm", 2
        case RmsNorm():
            names, kind, statistics = ["weight"], "rms_norm", 1
    return Part(
        name,
        tuple(Weight(n, (("norm", width),)) for n in names),
        Pointwise(kind, reads=rows * width, writes=rows * width, rows=rows),
        (
            Saved("input", rows * width, axis=axis),
            Saved("statistics", statistics * rows, "fp32", axis),
        ),
    )


def linear(
    ground: Ground,
    name: str,
    into: tuple[str, Expr],
    out: tuple[str, Expr],
    *,
    bias: bool,
    rows: Expr | None = None,
    keep_input: bool = True,
) -> Part:
    """A matrix with an optional bias; the input is kept unless a sibling keeps the same one."""
    rows = ground.tokens if rows is None else rows
    weights = [Weight("weight", (into, out))]
    if bias:
        weights.append(Weight("bias", (out,)))
    saved = (Saved("input", rows * into[1], axis=into[0]),) if keep_input else ()
    return Part(name, tuple(weights), Matmul(rows, into[1], out[1], bias=bias), saved)


# --- attention --------------------------------------------------------------------------


def _attention(ground: Ground, layer: Layer) -> Part:
    match layer.attention:
        case Attention() as spec:
            return _grouped_attention(ground, spec)
        case LatentAttention() as spec:
            return _latent_attention(ground, spec)


def _grouped_attention(ground: Ground, spec: Attention) -> Part:
    """Multi-head, grouped-query and multi-query attention: K = N, 1 < K < N, K = 1."""
    scope, D = ground.scope, ground.D
    N = scope("n_heads", spec.n_heads, "query heads")
    K = (
        N
        if spec.n_kv_heads == spec.n_heads
        else scope("n_kv_heads", spec.n_kv_heads, "key-value heads")
    )
    H = scope("d_head", spec.d_head, "size of a head")
    queries, keys = ground.tokens * N * H, ground.tokens * K * H
    model, bias = ("model", D), spec.bias_qkv
    parts = [
        linear(ground, "q", model, ("heads", N * H), bias=bias),
        linear(ground, "k", model, ("kv_heads", K * H), bias=bias, keep_input=False),
        linear(ground, "v", model, ("kv_heads", K * H), bias=bias, keep_input=False),
        *_qk_norms(ground, spec.qk_norm, N, K, H),
    ]
    if isinstance(spec.position, Rope):
        parts.append(Part("rotary", (), Pointwise("rotary", queries + keys, queries + keys)))
    if isinstance(spec.position, RelativeBias):
        buckets = scope("n_buckets", spec.position.n_buckets)
        parts.append(Part("bias", (Weight("weight", (("bucket", buckets), ("heads", N))),)))
    if spec.sinks:
        parts.append(Part("sinks", (Weight("weight", (("heads", N),)),)))
    core = Core(ground.work.B, N, K, ground.work.T, keys_seen(ground, spec), ground.work.S, H, H)
    kept = (
        Saved("queries", queries, axis="heads"),
        Saved("keys and values", 2 * keys, axis="kv_heads"),
        Saved("output", queries, axis="heads"),
        Saved("log-sum-exp", ground.tokens * N, "fp32", "heads"),
    )
    parts.append(Part("core", (), core, kept, kept_by_some=scores(ground, N, spec.dropout)))
    # The core's output is the projection's input: one tensor, kept once.
    parts.append(
        linear(ground, "out", ("heads", N * H), model, bias=spec.bias_out, keep_input=False)
    )
    return Part("attention", parts=tuple(parts))


def scores(ground: Ground, N: Expr, dropout: float) -> tuple[Saved, ...]:
    """What attention without flash keeps: every pair's probability, and again after dropout."""
    pairs = ground.tokens * N * ground.work.S
    kept = Saved("probabilities", pairs, "scores", "heads")
    if not dropout:
        return (kept,)
    mask = Saved("mask of probabilities", pairs, "mask_scores", "heads")
    return (kept, mask, Saved("dropped probabilities", pairs, "scores", "heads"))


def _qk_norms(ground: Ground, spec: QkNorm | None, N: Expr, K: Expr, H: Expr) -> list[Part]:
    if spec is None:
        return []
    tokens = ground.tokens
    if spec.per == "all_heads":
        return [
            norm_part(ground, "q_norm", spec.norm, N * H, axis="heads"),
            norm_part(ground, "k_norm", spec.norm, K * H, axis="kv_heads"),
        ]
    return [
        norm_part(ground, "q_norm", spec.norm, H, tokens * N, axis="heads"),
        norm_part(ground, "k_norm", spec.norm, H, tokens * K, axis="kv_heads"),
    ]


def keys_seen(ground: Ground, spec: Attention) -> Expr:
    """Keys per query that scores are computed for, on average over the queries.

    With `causal_skip`, query i of T over S keys sees S - T + i of them: S - (T - 1)/2 on
    average. A window w caps that; the ramp at the start of a sequence is counted as full
    windows, an upper bound that is exact once S - T >= w.
    """
    work = ground.work
    seen: Expr = work.S
    if work.causal_skip:
        seen = (work.S + 1) / 2 if work.S == work.T else work.S - (work.T - 1) / 2
    match spec.span:
        case Window(window=w):
            return minimum(seen, ground.scope("window", w, "latest keys that a query sees"))
        case Chunked(chunk=c):
            return minimum(seen, ground.scope("chunk", c, "tokens of an attention chunk"))
        case BlockSparse(block=block, n_local=n, stride=stride):
            local = ground.scope("d_local", block * n, "keys in a query's local blocks")
            far = seen / stride if stride else number(0)
            return minimum(seen, local + far)
    return seen


def _latent_attention(ground: Ground, spec: LatentAttention) -> Part:
    """Multi-head latent attention, keys and values rebuilt (DeepSeek-V2, equations 9 to 19)."""
    scope, D = ground.scope, ground.D
    N = scope("n_heads", spec.n_heads, "query heads")
    nope = scope("d_head_nope", spec.d_head_nope, "head size without position")
    rope = scope("d_head_rope", spec.d_head_rope, "rotated head size")
    value = scope("d_head_value", spec.d_head_value, "head size of values")
    latent = scope("d_kv_latent", spec.d_kv_latent, "size of the cached latent")
    model, heads = ("model", D), ("heads", N * (nope + rope))
    if spec.d_q_latent is None:
        parts = [linear(ground, "q", model, heads, bias=spec.bias_qkv)]
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
        norm_part(ground, "kv_norm", spec.norm, latent),
        linear(ground, "kv_up", ("latent", latent), ("heads", N * (nope + value)), bias=False),
        Part("rotary", (), Pointwise("rotary", turned, turned)),
    ]
    tokens, work = ground.tokens, ground.work
    seen: Expr = (work.S + 1) / 2 if work.causal_skip and work.S == work.T else work.S
    core = Core(work.B, N, N, work.T, seen, work.S, nope + rope, value)
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


# --- feed-forward -----------------------------------------------------------------------


def _feed_forward(ground: Ground, spec: FeedForward, *, keep_input: bool) -> Part:
    match spec:
        case Dense():
            F = ground.scope("d_ff", spec.d_ff, "width of the feed-forward")
            parts = dense_parts(ground, spec, F, ground.tokens, keep_input=keep_input)
            return Part("feed_forward", parts=parts)
        case Experts():
            return _experts(ground, spec)


def dense_parts(
    ground: Ground, spec: Dense, F: Expr, rows: Expr, *, keep_input: bool = True
) -> tuple[Part, ...]:
    """Two matrices around an activation, or three when gated."""
    up, down = (("model", ground.D), ("ff", F)), (("ff", F), ("model", ground.D))
    names = ("gate", "up") if spec.gated else ("up",)
    first = tuple(
        linear(ground, name, *up, bias=spec.bias, rows=rows, keep_input=keep_input and not i)
        for i, name in enumerate(names)
    )
    last = linear(ground, "down", *down, bias=spec.bias, rows=rows)
    return (*first, _activation(spec, rows * F), last)


def _activation(spec: Dense, hidden: Expr) -> Part:
    """The activation keeps its input; a gate also keeps both factors of its product."""
    kind: str = spec.activation
    reads, kept = hidden, ["input"]
    if spec.gated:
        kind, reads, kept = f"{spec.activation}_gate", 2 * hidden, ["input", "gate", "up"]
    saved = tuple(Saved(name, hidden, axis="ff") for name in kept)
    masks = dropped(spec.dropout, hidden, "ff")
    return Part("activation", (), Pointwise(kind, reads, hidden), saved, kept_by_some=masks)


def _experts(ground: Ground, spec: Experts) -> Part:
    """A router, `n_experts` feed-forwards of which `n_active` work on a token, shared ones."""
    scope, D, tokens = ground.scope, ground.D, ground.tokens
    E = scope("n_experts", spec.n_experts, "experts")
    k = scope("n_active", spec.n_active, "experts per token")
    F = scope("d_ff_expert", spec.expert.d_ff, "width of one expert")
    router = linear(ground, "router", ("model", D), ("expert", E), bias=spec.router_bias)
    # Balanced routing: each expert works on tokens * k / E rows.
    expert = dense_parts(ground, spec.expert, F, tokens * k / E)
    parts = [router, Part("experts", parts=expert, times=E, active=k)]
    if spec.shared is not None:
        width = scope("d_ff_shared", spec.shared.d_ff, "width of the shared experts")
        parts.append(Part("shared", parts=dense_parts(ground, spec.shared, width, tokens)))
    if spec.shared_gate:
        parts.append(linear(ground, "shared_gate", ("model", D), ("one", number(1)), bias=False))
    return Part("feed_forward", parts=tuple(parts))
