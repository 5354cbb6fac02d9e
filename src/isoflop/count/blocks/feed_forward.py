"""Feed-forwards: dense ones and mixtures of experts."""

from __future__ import annotations

from dataclasses import replace

from isoflop.arch.spec import Activation, Dense, Experts, FeedForward
from isoflop.count.blocks.part import Ground, Part, Saved, Weight, dropped, linear
from isoflop.count.operators import Pointwise
from isoflop.quantity import Expr, number

#: What some functions keep on the way beside input, factor and second input of a gate:
#: x * sigmoid(1.702 x), and GPT-OSS's, which clamps both first (2508.10925, section 2.2).
ON_THE_WAY: dict[Activation, tuple[str, ...]] = {
    "gelu_quick": ("sigmoid",),
    "silu_clamped": ("clamped gate", "sigmoid", "clamped up"),
}


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
    # The gradient of relu reads its output, which is what `down` reads: kept once.
    once = spec.activation == "relu" and not spec.gated and not spec.dropout
    last = linear(ground, "down", *down, bias=spec.bias, rows=rows, keep_input=not once)
    return (*first, _activation(spec, rows * F), last)


def _activation(spec: Dense, hidden: Expr) -> Part:
    """The activation keeps its input; a gate also keeps both factors of its product.

    Relu keeps its output in the input's place, which with a gate is the factor.
    """
    kind: str = spec.activation
    reads, kept = hidden, ["input"]
    if spec.gated:
        kind, reads, kept = f"{spec.activation}_gate", 2 * hidden, ["input", "gate", "up"]
    if spec.gated and spec.activation == "relu":
        kept.remove("gate")
    kept += ON_THE_WAY.get(spec.activation, ())
    saved = tuple(Saved(name, hidden, axis="ff") for name in kept)
    masks = dropped(spec.dropout, hidden, "ff")
    return Part("activation", (), Pointwise(kind, reads, hidden), saved, kept_by_some=masks)


def _experts(ground: Ground, spec: Experts) -> Part:
    """A router, `n_experts` feed-forwards of which `n_active` work on a token, shared ones."""
    scope, D, tokens = ground.scope, ground.D, ground.tokens
    E = scope("n_experts", spec.n_experts, "experts")
    k = scope("n_active", spec.n_active, "experts per token")
    F = scope("d_ff_expert", spec.expert.d_ff, "width of one expert")
    router = _router(ground, spec, E, k)
    # Balanced routing: each expert works on tokens * k / E rows.
    expert = dense_parts(ground, spec.expert, F, tokens * k / E)
    parts = [router, Part("experts", parts=expert, times=E, active=k)]
    if spec.shared is not None:
        width = scope("d_ff_shared", spec.shared.d_ff, "width of the shared experts")
        first, *others = dense_parts(ground, spec.shared, width, tokens)
        # It reads what the router reads, which has kept an fp32 copy.
        kept = tuple(replace(saved, kind="beside fp32") for saved in first.saved)
        parts.append(Part("shared", parts=(replace(first, saved=kept), *others)))
    if spec.shared_gate:
        one = ("one", number(1))
        parts.append(linear(ground, "shared_gate", ("model", D), one, bias=False, keep_input=False))
    parts.append(_sum(ground, spec, k))
    return Part("feed_forward", parts=tuple(parts))


def _sum(ground: Ground, spec: Experts, k: Expr) -> Part:
    """What experts said, times gates, added up: a gate's gradient reads what its expert said."""
    said = ground.tokens * ground.D * (k + 1 if spec.shared_gate else k)
    rows = ground.tokens * k
    # Whose a row is: its choice, its token, and with biases its expert, for each matrix again.
    n_ids = 2 + (2 + spec.expert.gated if spec.expert.bias else 0)
    kept = Saved("outputs", said), Saved("gates", rows, "fp32"), Saved("ids", n_ids * rows, "index")
    return Part("sum", saved=kept)


def _router(ground: Ground, spec: Experts, E: Expr, k: Expr) -> Part:
    """It works in fp32 whatever the activations are (Fedus 2021, 2101.03961, section 2.4)."""
    into, out = ("model", ground.D), ("expert", E)
    part = linear(ground, "router", into, out, bias=spec.router_bias, kind="fp32")
    correction = (Weight("correction", (out,)),) if spec.score_correction else ()
    scores = (
        Saved("scores", ground.tokens * E, "fp32"),
        Saved("choices", ground.tokens * k, "index"),
    )
    return replace(part, saved=(*part.saved, *scores), buffers=correction)
