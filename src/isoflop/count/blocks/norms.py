"""Normalisations."""

from __future__ import annotations

from isoflop.arch.spec import LayerNorm, Norm, RmsNorm
from isoflop.count.blocks.part import Ground, Part, Saved, Weight
from isoflop.count.operators import Pointwise
from isoflop.quantity import Expr


def norm_part(
    ground: Ground,
    name: str,
    norm: Norm,
    width: Expr | None = None,
    rows: Expr | None = None,
    copies: Expr | None = None,
    *,
    axis: str = "model",
    keep_input: bool = True,
) -> Part:
    """A normalisation: its vectors, one pass over the data, input and statistics kept.

    `copies` is set where each head has vectors of its own; `axis` is that of the input, which is
    kept unless a sibling keeps the same one.
    """
    width = ground.D if width is None else width
    rows = ground.tokens if rows is None else rows
    axes: tuple[tuple[str, Expr], ...] = (("norm", width),)
    if copies is not None:
        axes = ((axis, copies), *axes)
    match norm:
        case LayerNorm(weight=weight, bias=bias):
            names = ["weight"] * weight + ["bias"] * bias
            kind, statistics = "layer_norm", 2
        case RmsNorm():
            names, kind, statistics = ["weight"], "rms_norm", 1
    kept = [Saved("input", rows * width, axis=axis)] if keep_input else []
    if (
        copies is not None and "weight" in names
    ):  # no kernel has weights of two axes: they are multiplied with apart
        kept.append(Saved("normalised", rows * width, axis=axis))
    kept.append(Saved("statistics", statistics * rows, "fp32", axis))
    work = Pointwise(kind, reads=rows * width, writes=rows * width, rows=rows)
    return Part(name, tuple(Weight(n, axes) for n in names), work, tuple(kept))
