"""FlashAttention as it is taught: tiles, a running softmax, memory that grows with N.

Letters: B batch · T query tokens · S key tokens · N heads · K kv heads · H head size.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from isoflop.attention import blockwise
from isoflop.attention.arguments import is_whole, read_options
from isoflop.errors import InputError, Problem


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int = 128,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int = 128,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int = 128,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention in tiles of `block_size` queries by `block_size` keys: [B, T, N, H].

    No more than one tile of scores per head is in memory, in backward too. `attention` with
    its backend "auto" is the same mathematics by the fastest code at hand.

    Args:
        q: [B, T, N, H].
        k: [B, S, K, H]; K divides N, each kv head serves N / K query heads.
        v: [B, S, K, value head size].
        causal: a query sees no later key; the last query stands at the last key.
        window: a query sees the `window` latest keys, its own included; needs `causal`.
        scale: of the scores; None means H ** -0.5.
        return_lse: also return the log of each row's softmax denominator [B, T, N].

    >>> import torch
    >>> from isoflop.attention import attention
    >>> q = k = v = torch.randn(1, 300, 2, 8)
    >>> whole = attention(q, k, v, causal=True, backend="reference")
    >>> torch.allclose(flash_attention(q, k, v, 64, causal=True), whole, atol=1e-5)
    True

    Raises:
        InputError: arguments that do not fit together; all are listed.
    """
    if not is_whole(block_size, least=1):
        rule = "is a whole number of at least 1"
        raise InputError("flash_attention", [Problem("block_size", block_size, rule)])
    options = read_options(
        q, k, v, causal=causal, window=window, scale=scale, return_lse=return_lse
    )
    out_BTNH, lse_BTN = blockwise.attend(q, k, v, options, (block_size, block_size))
    return (out_BTNH, lse_BTN) if return_lse else out_BTNH
