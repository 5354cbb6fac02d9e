"""The textbook's multi-head attention, on tensors that are already projected.

Letters: B batch · T query tokens · S key tokens · D = N * H width of the queries ·
N heads · K kv heads · H head size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from isoflop.attention.arguments import is_whole
from isoflop.attention.dispatch import attention
from isoflop.errors import InputError, Problem


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    num_kv_heads: int | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Attention of `num_heads` heads, without projections: [B, T, num_heads * value head size].

    Args:
        query: [B, T, num_heads * H].
        key: [B, S, num_kv_heads * H]; S may differ from T.
        value: [B, S, num_kv_heads * value head size].
        mask: boolean (true: seen) or added to the scores; broadcast to [B, N, T, S].
        causal: a query sees no later key; the last query stands at the last key.
        num_kv_heads: None means `num_heads`; fewer is grouped-query attention.
        dropout_p: the share of attention weights dropped.
        scale: of the scores; None means H ** -0.5.

    >>> x = torch.randn(2, 5, 12)
    >>> multi_head_attention(x, x, x, num_heads=3, causal=True).shape
    torch.Size([2, 5, 12])

    Raises:
        InputError: arguments that do not fit together; all are listed.
    """
    n_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    problems = _problems(query, key, value, num_heads, n_kv_heads)
    if problems:
        raise InputError("multi_head_attention", problems)
    q_BTNH = torch.unflatten(query, -1, (num_heads, -1))
    k_BSKH = torch.unflatten(key, -1, (n_kv_heads, -1))
    v_BSKH = torch.unflatten(value, -1, (n_kv_heads, -1))
    try:
        out_BTNH = attention(
            q_BTNH, k_BSKH, v_BSKH, causal=causal, bias=mask, scale=scale, dropout_p=dropout_p
        )
    except InputError as error:
        raise InputError("multi_head_attention", [_as_named(p) for p in error.problems]) from None
    return out_BTNH.flatten(-2)


#: What `attention` calls our arguments.
_NAMES = {
    "q_BTNH": "query",
    "k_BSKH": "key",
    "v_BSKH": "value",
    "bias": "mask",
    "n_kv_heads": "num_kv_heads",
}


def _as_named(problem: Problem) -> Problem:
    return replace(problem, field=_NAMES.get(problem.field, problem.field))


def _problems(
    query: Tensor, key: Tensor, value: Tensor, n_heads: int, n_kv_heads: int
) -> list[Problem]:
    tensors = {"query": query, "key": key, "value": value}
    problems = [
        Problem(name, tuple(getattr(x, "shape", ())), "is a tensor of batch, tokens, width")
        for name, x in tensors.items()
        if not isinstance(x, Tensor) or x.dim() != 3
    ]
    heads = {"num_heads": n_heads, "num_kv_heads": n_kv_heads}
    problems += [
        Problem(name, n, "is a whole number of at least 1")
        for name, n in heads.items()
        if not is_whole(n, least=1)
    ]
    if problems:
        return problems
    parts = {"query": n_heads, "key": n_kv_heads, "value": n_kv_heads}
    for name, n in parts.items():
        width = tensors[name].shape[-1]
        if width % n or not width:
            hint = f"{name} is cut into {n} heads"
            problems.append(Problem(f"{name} width", width, f"is a multiple of {n}", hint))
    return problems
