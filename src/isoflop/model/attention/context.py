"""What a forward pass tells attention: where tokens stand, and which of them are seen.

It depends on the kind of layer and the length of the text alone, so it is computed once for
all layers of a kind.

Letters: B batch · T tokens, queries and keys alike · D d_model · N n_heads · J blocks of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from isoflop.arch.spec import (
    Alibi,
    Arch,
    Attention,
    BlockSparse,
    Chunked,
    LatentAttention,
    RelativeProjection,
    Rope,
    Span,
)
from isoflop.attention.options import BlockMask
from isoflop.model.parts import sinusoids
from isoflop.model.rotary import Rotation


@dataclass(frozen=True, slots=True)
class Context:
    """What the attentions of one kind of layer are told; None where it has no such thing.

    rotation: the turn of each position. slopes: ALiBi's. waves: sines and cosines of the
    distances T - 1 to 0. blocks: which blocks of keys each block of queries sees. bias: added to
    the scaled scores, or boolean (true: seen).
    """

    rotation: Rotation | None = None
    slopes: Tensor | None = None  # [N]
    waves: Tensor | None = None  # [T, D]
    blocks: BlockMask | None = None
    bias: Tensor | None = None  # broadcasts to [B, N, T, S]


def contexts(arch: Arch, x_BTD: Tensor, bias: Tensor | None = None) -> dict[str, Context]:
    """The context of each kind of layer, by its name, for the vectors of a text.

    `bias` is what all layers add to their scores (T5's positions).
    """
    positions_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)

    @cache  # kinds that differ elsewhere often turn alike
    def rotation(rope: Rope, d_head: int) -> Rotation:
        return Rotation.of(rope, d_head, positions_T, x_BTD.dtype, arch.max_seq_len)

    return {
        name: replace(_context(kind.attention, rotation, x_BTD), bias=bias)
        for name, kind in arch.kinds.items()
    }


def _context(
    spec: Attention | LatentAttention, rotation: Callable[[Rope, int], Rotation], x_BTD: Tensor
) -> Context:
    if isinstance(spec, LatentAttention):
        return Context(rotation(spec.position, spec.d_head_rope))
    n_tokens, device = x_BTD.shape[1], x_BTD.device
    blocks = blocks_seen(spec.span, n_tokens, device)
    match spec.position:
        case Rope() as rope:
            return Context(rotation(rope, spec.d_head), blocks=blocks)
        case Alibi(scale=scale):
            slope_N = torch.tensor(alibi_slopes(spec.n_heads), device=device)
            return Context(slopes=slope_N * scale, blocks=blocks)
        case RelativeProjection():
            distances_T = torch.arange(n_tokens, device=device).flip(0)
            waves_TD = sinusoids(distances_T, x_BTD.shape[-1]).to(x_BTD.dtype)
            return Context(waves=waves_TD, blocks=blocks)
        case _:
            return Context(blocks=blocks)


def alibi_slopes(n_heads: int) -> list[float]:
    """Each head's slope (Press 2021, 2108.12409, section 3).

    Powers of two from 2^(-8 / N) to 2^-8. Where N is no power of two: those of the next
    lower one, then every other slope of the next higher one (the paper's code).

    >>> alibi_slopes(3)
    [0.0625, 0.00390625, 0.25]
    """
    lower = 1 << (n_heads.bit_length() - 1)
    whole = [2 ** (-8 * (i + 1) / lower) for i in range(lower)]
    between = [2 ** (-8 * (i + 0.5) / lower) for i in range(n_heads - lower)]
    return whole + between


def blocks_seen(span: Span, n_tokens: int, device: torch.device) -> BlockMask | None:
    """The blocks that a span leaves, on top of causality; None where that hides nothing.

    Sparse blocks are Child 2019's strided pattern (1904.10509, section 4.3) over blocks: the
    `n_local` latest, and those a multiple of `stride` blocks away.

    >>> blocks_seen(BlockSparse(block=2, n_local=1, stride=2), 7, torch.device("cpu")).seen.int()
    tensor([[1, 0, 0, 0],
            [0, 1, 0, 0],
            [1, 0, 1, 0],
            [0, 1, 0, 1]], dtype=torch.int32)
    """
    match span:
        case Chunked(chunk=size):
            n_local, stride = 1, 0
        case BlockSparse(block=size, n_local=n_local, stride=stride):
            pass
        case _:
            return None
    n_blocks = -(-n_tokens // size)
    if n_blocks <= n_local:
        return None
    block_J = torch.arange(n_blocks, device=device)
    away_JJ = block_J[:, None] - block_J
    seen_JJ = away_JJ < n_local
    if stride:
        seen_JJ = seen_JJ | (away_JJ % stride == 0)
    return BlockMask(seen_JJ & (away_JJ >= 0), size)
