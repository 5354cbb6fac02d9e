"""What a forward pass tells attention: where tokens stand, and which of them are seen.

It depends on the kind of layer and the length of the text alone, so it is computed once for
all layers of a kind.

Letters: B batch · T tokens, queries and keys alike · D d_model · N n_heads · J blocks of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

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


class Memory(Protocol):
    """What one layer keeps of earlier tokens: its place in a key-value cache."""

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Keep what new tokens made, and give all that is to be read now.

        Each [B, T, heads, width] in, [B, S, heads, width] out.
        """


@dataclass(frozen=True, slots=True)
class Context:
    """What the attentions of one kind of layer are told; None where it has no such thing.

    rotation: the turn of each position. slopes: ALiBi's. waves: sines and cosines of the
    distances T - 1 to 0. blocks: which blocks of keys each block of queries sees. bias: added to
    the scaled scores, or boolean (true: seen). memory: where new keys and values go.
    unordered: what is read stands in no order, so `bias` alone says what is seen (continued.py);
    waves are then those of each pair, [B, T, S, D].
    """

    rotation: Rotation | None = None
    slopes: Tensor | None = None  # [N]
    waves: Tensor | None = None  # [T, D]
    blocks: BlockMask | None = None
    bias: Tensor | None = None  # broadcasts to [B, N, T, S]
    memory: Memory | None = None
    unordered: bool = False


def contexts(
    arch: Arch, x_BTD: Tensor, bias: Tensor | None = None, positions: Tensor | None = None
) -> dict[str, Context]:
    """The context of each kind of layer, by its name, for the vectors of a text.

    `bias` is what all layers add to their scores (T5's positions). `positions`, [B, T], say
    where each text's tokens stand where padding follows some: it stands where the last one does.
    """
    rotation = rotations(arch, x_BTD, positions)
    return {
        name: replace(_context(kind.attention, rotation, x_BTD), bias=bias)
        for name, kind in arch.kinds.items()
    }


def rotations(
    arch: Arch, x_BTD: Tensor, positions: Tensor | None = None
) -> Callable[[Attention | LatentAttention], Rotation | None]:
    """The turns that a kind of attention gives its queries and keys."""
    if positions is None:
        positions = torch.arange(x_BTD.shape[1], device=x_BTD.device)

    @cache  # kinds that differ elsewhere often turn alike
    def turned(rope: Rope, d_head: int) -> Rotation:
        return Rotation.of(rope, d_head, positions, x_BTD.dtype, arch.max_seq_len)

    def rotation(spec: Attention | LatentAttention) -> Rotation | None:
        if isinstance(spec, LatentAttention):
            return turned(spec.position, spec.d_head_rope)
        return turned(spec.position, spec.d_head) if isinstance(spec.position, Rope) else None

    return rotation


def _context(
    spec: Attention | LatentAttention,
    rotation: Callable[[Attention | LatentAttention], Rotation | None],
    x_BTD: Tensor,
) -> Context:
    if isinstance(spec, LatentAttention):
        return Context(rotation(spec))
    n_tokens, device = x_BTD.shape[1], x_BTD.device
    blocks = blocks_seen(spec.span, n_tokens, device)
    match spec.position:
        case Alibi() as alibi:
            return Context(slopes=slopes_of(alibi, spec.n_heads, device), blocks=blocks)
        case RelativeProjection():
            distances_T = torch.arange(n_tokens, device=device).flip(0)
            waves_TD = sinusoids(distances_T, x_BTD.shape[-1]).to(x_BTD.dtype)
            return Context(waves=waves_TD, blocks=blocks)
        case _:
            return Context(rotation(spec), blocks=blocks)


def slopes_of(alibi: Alibi, n_heads: int, device: torch.device) -> Tensor:
    """What a head's score loses for each token between query and key, [N]."""
    return torch.tensor(alibi_slopes(n_heads), device=device) * alibi.scale


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
    sparse = as_blocks(span)
    if sparse is None:
        return None
    n_blocks = -(-n_tokens // sparse.block)
    if n_blocks <= sparse.n_local:
        return None
    block_J = torch.arange(n_blocks, device=device)
    away_JJ = block_J[:, None] - block_J
    return BlockMask(block_seen(sparse, away_JJ) & (away_JJ >= 0), sparse.block)


def as_blocks(span: Span) -> BlockSparse | None:
    """A span that goes by blocks; a chunk is one local block."""
    match span:
        case Chunked(chunk=chunk):
            return BlockSparse(chunk, n_local=1)
        case BlockSparse():
            return span
    return None


def block_seen(span: BlockSparse, away: Tensor) -> Tensor:
    """Whether a block so many blocks back is seen."""
    near = away < span.n_local
    return near | (away % span.stride == 0) if span.stride else near
