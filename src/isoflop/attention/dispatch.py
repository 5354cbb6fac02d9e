"""One attention function, and the table of the code that computes it.

Letters: B batch · T query tokens · S key tokens · N heads · K kv heads · H d_head.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any, Literal, overload

import torch
from torch import Tensor

from isoflop.attention import blockwise, flash3, reference, sdpa, triangle
from isoflop.attention.arguments import read_options
from isoflop.attention.choice import BACKENDS, Backend, Choice, choose, refusals
from isoflop.attention.options import BlockMask, Options, Sinks
from isoflop.attention.packed import Attend, by_sequence

#: Backends that are here anyway; they take packed sequences one at a time.
_HERE: dict[Backend, Attend] = {
    "reference": by_sequence(reference.attend),
    "blockwise": by_sequence(blockwise.attend),
    "triangle": by_sequence(triangle.attend),
    "sdpa": by_sequence(sdpa.attend),
    "flash3": by_sequence(flash3.attend),
}
#: Those that load more; they read packed sequences themselves.
_MODULES: dict[Backend, str] = {
    "flex": "isoflop.attention.flex",
    "triton": "isoflop.attention.kernels.launch",
}


@overload
def attention(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    *,
    causal: bool,
    window: int | None = None,
    sinks: int | Tensor | Sinks | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    return_lse: Literal[False] = False,
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def attention(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    *,
    causal: bool,
    window: int | None = None,
    sinks: int | Tensor | Sinks | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    return_lse: Literal[True],
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...


def attention(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    *,
    causal: bool,
    window: int | None = None,
    sinks: int | Tensor | Sinks | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention of N query heads over K key-value heads: [B, T, N, H].

    K = N is multi-head, K = 1 multi-query, between them grouped-query attention. Values may
    have another head size than keys.

    Args:
        causal: a query sees no later key. The last query stands at the last key, so
            T < S continues a cache.
        window: a query sees the `window` latest keys, its own included; needs `causal`.
        sinks: a whole number keeps that many first keys visible beside the window; [N]
            numbers are learned logits that join each head's softmax without a value;
            `Sinks` says both.
        softcap: c replaces a score s by c tanh(s / c), before ALiBi and bias.
        alibi: [N] slopes; a score loses its head's slope times the distance.
        bias: added to the scores, or boolean (true: seen); broadcast to [B, N, T, S].
        cu_seqlens: where sequences packed into one row (B = 1) begin, with the end: whole
            numbers, or a pair for queries and keys. The call is then the batch of those
            sequences without padding; `bias` and `block_mask` keep that batch's axes.
        block_mask: which blocks of keys each block of queries may look at.
        scale: of the scores; None means H ** -0.5.
        dropout_p: the share of weights dropped, in training and evaluation alike.
        dropout_seed: the same seed drops the same weights on every backend but sdpa;
            None draws one from PyTorch's generator.
        return_lse: also return the log of each row's denominator [B, T, N], learned sinks in
            it, with a gradient: what joins results over several stretches of keys.
        backend: "auto" takes the fastest that can do the job; `explain_dispatch` says why.

    A query that sees no key gives zeros, and -inf as its log.

    >>> q = k = v = torch.ones(1, 3, 2, 4)
    >>> attention(q, k, v, causal=True).shape
    torch.Size([1, 3, 2, 4])
    >>> _, lse_BTN = attention(q, k, v, causal=True, return_lse=True)
    >>> lse_BTN[0, :, 0]
    tensor([2.0000, 2.6931, 3.0986])

    Raises:
        InputError: arguments that do not fit together, or that the backend asked for
            cannot do; all are listed.
    """
    options = read_options(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        causal=causal,
        window=window,
        sinks=sinks,
        softcap=softcap,
        alibi=alibi,
        bias=bias,
        cu_seqlens=cu_seqlens,
        block_mask=block_mask,
        scale=scale,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
    )
    taken = choose(backend, q_BTNH, k_BSKH, options).backend
    attend = _HERE.get(taken) or _loaded(taken)
    out_BTNH, lse_BTN = attend(q_BTNH, k_BSKH, v_BSKH, _seeded(options, taken))
    if not return_lse:
        return out_BTNH
    assert lse_BTN is not None
    return out_BTNH, lse_BTN


def explain_dispatch(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, *, backend: Backend = "auto", **options: Any
) -> Choice:
    """Which backend `attention` would take for this call and why, and why not the others.

    >>> q = k = v = torch.ones(1, 3, 2, 4)
    >>> print(explain_dispatch(q, k, v, causal=True, softcap=30.0))
    reference: at most 65536 scores a head: cheapest all at once
    not triangle: softcap: it knows the causal triangle alone
    not sdpa: softcap: no fused kernel of PyTorch has one
    not flex: device: FlexAttention has no backward on cpu
    ...

    Raises:
        InputError: as `attention`.
    """
    read = read_options(q_BTNH, k_BSKH, v_BSKH, **options)
    choice = choose(backend, q_BTNH, k_BSKH, read)
    refused = (r for name in BACKENDS for r in refusals(name, q_BTNH, k_BSKH, read))
    return replace(choice, refused=tuple(refused))


@cache
def _loaded(backend: Backend) -> Attend:
    attend: Attend = import_module(_MODULES[backend]).attend
    return attend


def _seeded(options: Options, backend: Backend) -> Options:
    """With a seed for dropout, drawn where none was given and ours is to be used."""
    dropout = options.dropout
    if dropout is None or dropout.seed is not None or backend == "sdpa":
        return options
    seed = int(torch.randint(1 << 62, ()))
    return replace(options, dropout=replace(dropout, seed=seed))
