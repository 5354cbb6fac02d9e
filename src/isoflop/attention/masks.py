"""Which keys a query may see.

Letters: B batch · T query tokens · S key tokens · N heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isoflop.attention.options import Options


def sees(query: Tensor, key: Tensor, window: int | None = None, sink_tokens: int = 0) -> Tensor:
    """Whether a query at position `query` may see the key at `key`, causally.

    The `window` latest keys, its own included, and the first `sink_tokens`.
    """
    seen = key <= query
    if window is not None:
        seen = seen & ((key > query - window) | (key < sink_tokens))
    return seen


def visible_keys(
    n_queries: int,
    n_keys: int,
    window: int | None = None,
    device: torch.device | None = None,
    sink_tokens: int = 0,
) -> Tensor:
    """[T, S], true where query t may see key s: not later, and within the window.

    The last query stands at the last key, so queries that continue a cache see all of it.

    >>> visible_keys(2, 4, window=2).int()
    tensor([[0, 1, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    query_T1 = positions(n_queries, n_keys, device)[:, None]
    return sees(query_T1, torch.arange(n_keys, device=device), window, sink_tokens)


def positions(n_queries: int, n_keys: int, device: torch.device | None = None) -> Tensor:
    """[T], where each query stands among the keys: the last at the last key.

    >>> positions(2, 5)
    tensor([3, 4])
    """
    return torch.arange(n_keys - n_queries, n_keys, device=device)


def visible_pairs(
    options: Options, n_queries: int, n_keys: int, device: torch.device
) -> Tensor | None:
    """What causality, window, blocks and a boolean bias leave, broadcast to [B, N, T, S].

    None where every query sees every key.
    """
    parts = []
    if options.causal:
        span = options.window, device, options.sinks.tokens
        parts.append(visible_keys(n_queries, n_keys, *span))
    if options.block_mask is not None:
        parts.append(options.block_mask.tokens(n_queries, n_keys))
    if options.bias is not None and options.bias.dtype == torch.bool:
        parts.append(options.bias)
    seen = parts[0] if parts else None
    for part in parts[1:]:
        seen = part if seen is None else seen & part
    return seen


def added_scores(options: Options, n_queries: int, n_keys: int, like: Tensor) -> Tensor | None:
    """ALiBi and a floating bias, broadcast to [B, N, T, S]; None where neither is there.

    ALiBi (2108.12409, section 3) takes its slope times the distance off a score.
    """
    added = None
    if options.alibi is not None:
        query_T1 = positions(n_queries, n_keys, like.device)[:, None]
        distance_TS = (query_T1 - torch.arange(n_keys, device=like.device)).abs()
        added = -options.alibi.to(like.dtype)[:, None, None] * distance_TS
    if options.bias is not None and options.bias.dtype != torch.bool:
        bias = options.bias.to(like.dtype)
        added = bias if added is None else added + bias
    return added
