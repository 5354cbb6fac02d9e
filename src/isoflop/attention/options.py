"""What a call of `attention` asks for, in one value that every backend reads.

Letters: B batch · T query tokens · S key tokens · N heads.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockMask:
    """Which blocks of keys each block of queries may look at; backends skip the others.

    `seen` is boolean and broadcasts to [B, N, ceil(T / size), ceil(S / size)]; blocks are
    counted from the first query and the first key. It is joined with `causal`, `window`
    and `bias`: a pair must be allowed by all of them.

    >>> BlockMask(torch.eye(2, dtype=torch.bool), size=2).tokens(3, 4).int()
    tensor([[1, 1, 0, 0],
            [1, 1, 0, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """

    seen: Tensor
    size: int = 128

    def tokens(self, n_queries: int, n_keys: int) -> Tensor:
        """[..., T, S], true where a pair of tokens lies in a block that is seen."""
        rows = self.seen.repeat_interleave(self.size, -2)[..., :n_queries, :]
        return rows.repeat_interleave(self.size, -1)[..., :n_keys]


@dataclass(frozen=True, slots=True)
class Sinks:
    """Where attention can go when nothing near deserves it.

    `tokens`: this many first keys stay visible beside a window (StreamingLLM, 2309.17453).
    `logits`: one learned score per head that takes its share of the softmax and gives no
    value (gpt-oss); it has a gradient.
    """

    tokens: int = 0
    logits: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Dropout:
    """A share `p` of weights dropped; which ones depends on `seed` and a weight's place alone.

    The place is (sequence, head, query, key), so every backend and tile size drops the same
    weights. Without a seed, one is drawn. `first_sequence` is what batch row 0 stands for.
    """

    p: float
    seed: int | None
    first_sequence: int = 0


@dataclass(frozen=True, slots=True)
class Packed:
    """Sequences laid end to end in one row of a batch: where each begins, and the end."""

    query: tuple[int, ...]
    key: tuple[int, ...]

    @property
    def n_sequences(self) -> int:
        return len(self.query) - 1

    def lengths(self) -> tuple[list[int], list[int]]:
        """Queries and keys of each sequence."""
        return [b - a for a, b in pairwise(self.query)], [b - a for a, b in pairwise(self.key)]


@dataclass(frozen=True, slots=True)
class Options:
    """Everything about a call but its tensors of tokens; checked by `arguments.check`."""

    causal: bool
    scale: float
    window: int | None = None
    sinks: Sinks = Sinks()
    softcap: float | None = None
    alibi: Tensor | None = None
    bias: Tensor | None = None
    block_mask: BlockMask | None = None
    packed: Packed | None = None
    dropout: Dropout | None = None
    return_lse: bool = False

    def without_inputs(self) -> Options:
        """Without the tensors that autograd keeps itself."""
        return self.with_inputs(None, None)

    def with_inputs(self, sink_N: Tensor | None, bias: Tensor | None) -> Options:
        return replace(self, sinks=replace(self.sinks, logits=sink_N), bias=bias)

    def of_sequence(self, i: int, n_queries: int, n_keys: int) -> Options:
        """The same for sequence i of a batch alone."""
        bias, block_mask, dropout = self.bias, self.block_mask, self.dropout
        if bias is not None:
            bias = _row(bias, i)
            bias = bias[..., :n_queries, :] if bias.shape[-2] > 1 else bias
            bias = bias[..., :n_keys] if bias.shape[-1] > 1 else bias
        if block_mask is not None:
            block_mask = replace(block_mask, seen=_row(block_mask.seen, i))
        if dropout is not None:
            dropout = replace(dropout, first_sequence=dropout.first_sequence + i)
        return replace(self, bias=bias, block_mask=block_mask, dropout=dropout, packed=None)


def four_axes(x: Tensor) -> Tensor:
    """With leading axes of one until there are four."""
    return x[(None,) * (4 - x.dim())]


def _row(x: Tensor, i: int) -> Tensor:
    x = four_axes(x)
    return x[i : i + 1] if x.shape[0] > 1 else x


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off; nothing on a device that knows none, as the meta device."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """What softmax is computed in: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32
