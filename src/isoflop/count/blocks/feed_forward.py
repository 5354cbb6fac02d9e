"""Feed-forwards: dense ones and mixtures of experts."""

from __future__ import annotations

from isoflop.arch.spec import Dense, Experts, FeedForward
from isoflop.count.blocks.part import Ground, Part, Saved, dropped, linear
from isoflop.count.operators import Pointwise
from isoflop.quantity import Expr, number


def feed_forward_part(ground: Ground, spec: FeedForward, *, keep_input: bool) -> Part:
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
