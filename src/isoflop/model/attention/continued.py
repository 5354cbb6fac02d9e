"""What a pass tells attention where keys come from a cache: in any order, texts of any lengths.

The same positions, spans and biases as in context.py, told pair by pair: a bias is added to each
score, minus infinity where a key is not seen.

Letters: B batch · T query tokens · S keys that are read · D d_model · N n_heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from isoflop.arch.spec import (
    Alibi,
    Arch,
    Attention,
    Full,
    LatentAttention,
    RelativeBias,
    RelativeProjection,
    Span,
)
from isoflop.attention.masks import sees
from isoflop.errors import Fault
from isoflop.model.attention.context import (
    Context,
    as_blocks,
    block_seen,
    rotations,
    slopes_of,
)
from isoflop.model.attention.grouped import window_of
from isoflop.model.parts import sinusoids
from isoflop.model.relative_bias import RelativeBiasModule


@dataclass(frozen=True, slots=True)
class Keys:
    """Where the keys that are read stand in their texts, and whether every query sees them all.

    A negative position is an empty place. One row serves all texts where they are as long.
    """

    position_BS: Tensor  # noqa: N815 - shape suffix
    all_seen: bool


def continued_contexts(
    arch: Arch,
    x_BTD: Tensor,
    query_BT: Tensor,
    keys: Mapping[str, Keys],
    table: RelativeBiasModule | None = None,
) -> dict[str, Context]:
    """The context of each kind of layer, by its name, for vectors at positions `query_BT`.

    `keys` says by kind where what its layers read stands; `table` is the stack's relative bias.
    """
    rotation = rotations(arch, x_BTD, query_BT)
    told = {}
    for name, kind in arch.kinds.items():
        spec, read = kind.attention, keys[name]
        bias, waves = _told(spec, query_BT, read, x_BTD, table)
        told[name] = Context(rotation(spec), waves=waves, bias=bias, unordered=True)
    return told


def span_of(spec: Attention | LatentAttention) -> Span:
    """What a kind of attention sees; by latents it sees all."""
    return Full() if isinstance(spec, LatentAttention) else spec.span


def seen_pairs(span: Span, query_BT: Tensor, key_BS: Tensor) -> Tensor:
    """[B, T, S], true where the key is there, not later than the query, and in its span.

    >>> from isoflop.arch.spec import Window
    >>> seen_pairs(Window(2), torch.tensor([[5]]), torch.tensor([[4, 5, -2, 3]])).int()
    tensor([[[1, 1, 0, 0]]], dtype=torch.int32)
    """
    query_BT1, key_B1S = query_BT[..., None], key_BS[:, None]
    seen_BTS = (key_B1S >= 0) & sees(query_BT1, key_B1S, window_of(span))
    blocks = as_blocks(span)
    if blocks is None:
        return seen_BTS
    return seen_BTS & block_seen(blocks, query_BT1 // blocks.block - key_B1S // blocks.block)


def _told(
    spec: Attention | LatentAttention,
    query_BT: Tensor,
    keys: Keys,
    x_BTD: Tensor,
    table: RelativeBiasModule | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Bias [B, N, T, S], or boolean, and the waves of each pair [B, T, S, D], where there are any."""
    seen_B1TS = None
    if not keys.all_seen:
        seen_B1TS = seen_pairs(span_of(spec), query_BT, keys.position_BS)[:, None]
    if isinstance(spec, LatentAttention):
        return seen_B1TS, None
    distance_BTS = keys.position_BS[:, None] - query_BT[..., None]
    match spec.position:
        case RelativeProjection():
            return seen_B1TS, sinusoids(-distance_BTS, x_BTD.shape[-1]).to(x_BTD.dtype)
        case Alibi() as alibi:
            slope_N = slopes_of(alibi, spec.n_heads, x_BTD.device)
            bias_BNTS = slope_N[:, None, None] * distance_BTS[:, None]
        case RelativeBias():
            if table is None:
                raise Fault("relative biases have a table")
            bias_BNTS = table.of(distance_BTS)
        case _:
            return seen_B1TS, None
    if seen_B1TS is not None:
        bias_BNTS = bias_BNTS.masked_fill(~seen_B1TS, -torch.inf)
    return bias_BNTS, None
