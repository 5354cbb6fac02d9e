"""The ends of a model: embedding, head, loss."""

from __future__ import annotations

from isoflop.arch.spec import Arch, Learned
from isoflop.count.blocks.norms import norm_part
from isoflop.count.blocks.part import Ground, Part, Saved, Weight, dropped, linear
from isoflop.count.operators import Gather, Loss, Matmul, Pointwise
from isoflop.quantity import Expr

#: What the soft cap of logits keeps: their tanh.
CAPPED = "capped logits"


def embedding_part(ground: Ground, arch: Arch, rows: Expr) -> Part:
    spec, D = arch.embedding, ground.D
    width = (
        D
        if spec.d_embed in (None, arch.d_model)
        else ground.scope("d_embed", spec.d_embed or 0, "width of the embedding")
    )
    parts = [
        Part(
            "tokens",
            (Weight("weight", (("vocab", rows), ("embed", width))),),
            Gather(ground.tokens, width, rows),
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


def head_part(ground: Ground, arch: Arch, rows: Expr) -> Part:
    """Vectors to logits. Tied to an embedding of another width, it projects to that first."""
    width = arch.embedding.d_embed
    if arch.head.tied and width not in (None, arch.d_model):
        narrow = ground.scope("d_embed", width or 0, "width of the embedding")
        project = linear(ground, "project", ("model", ground.D), ("embed", narrow), bias=False)
        return Part("head", parts=(project, _logits("logits", ground, arch, narrow, rows)))
    return _logits("head", ground, arch, ground.D, rows)


def _logits(name: str, ground: Ground, arch: Arch, width: Expr, rows: Expr) -> Part:
    weights = [] if arch.head.tied else [Weight("weight", (("vocab", rows), ("embed", width)))]
    if arch.head.bias:
        weights.append(Weight("bias", (("vocab", rows),)))
    axis = "model" if width is ground.D else "embed"
    saved = [Saved("input", ground.tokens * width, axis=axis)]
    if arch.head.softcap is not None:
        saved.append(Saved(CAPPED, ground.tokens * rows, axis="vocab"))
    return Part(name, tuple(weights), Matmul(ground.tokens, width, rows), tuple(saved))


def loss_part(ground: Ground, vocabulary: Expr) -> Part:
    """Cross entropy over the logits; its log-softmax is kept in fp32."""
    logits = ground.tokens * vocabulary
    return Part(
        "loss",
        (),
        Loss(ground.tokens, vocabulary),
        (Saved("log probabilities", logits, "fp32", "vocab"),),
    )
