"""One attention function, and the choice of the code that computes it.

Letters: B batch · T query tokens · S key tokens · N heads · K kv heads · H d_head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from isoflop.attention import reference, sdpa
from isoflop.attention.arguments import check_arguments
from isoflop.attention.masks import visible_keys
from isoflop.errors import InputError, Problem, UnknownName

Backend: TypeAlias = Literal["auto", "reference", "sdpa"]


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend, and why it was taken."""

    backend: Backend
    reason: str


def choose_backend(backend: Backend = "auto", *, softcap: float | None = None) -> Choice:
    """The backend that will run.

    >>> choose_backend(softcap=30.0).reason
    'a softcap on the scores: no fused kernel of PyTorch has one'

    Raises:
        UnknownName: no such backend.
        InputError: the backend asked for cannot do what is asked of it.
    """
    if backend not in get_args(Backend):
        raise UnknownName("attention backend", str(backend), get_args(Backend))
    if backend == "sdpa" and softcap is not None:
        rule = "is None for the backend sdpa: no fused kernel of PyTorch has one"
        raise InputError("attention", [Problem("softcap", softcap, rule, "use backend auto")])
    if backend != "auto":
        return Choice(backend, "asked for")
    if softcap is not None:
        return Choice("reference", "a softcap on the scores: no fused kernel of PyTorch has one")
    return Choice("sdpa", "the fused kernel of this device")


def attention(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    *,
    causal: bool,
    window: int | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """Scaled dot-product attention of N query heads over K key-value heads: [B, T, N, H].

    K = N is multi-head, K = 1 multi-query, between them grouped-query attention.

    Args:
        causal: a query sees no later key. The last query stands at the last key, so
            T < S continues a cache.
        window: a query sees the `window` latest keys, its own included; needs `causal`.
        mask: boolean (true: seen) or added to the scores; broadcast to [B, N, T, S].
        scale: of the scores; None means H ** -0.5.
        softcap: c replaces a score s by c tanh(s / c).
        dropout_p: the share of weights dropped, in training and evaluation alike.
        backend: "auto" lets `choose_backend` choose.

    A query that sees no key gives zeros.

    >>> q = k = v = torch.ones(1, 3, 2, 4)
    >>> attention(q, k, v, causal=True).shape
    torch.Size([1, 3, 2, 4])

    Raises:
        InputError: shapes or options that do not fit together; all are listed.
    """
    check_arguments(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        causal=causal,
        window=window,
        mask=mask,
        scale=scale,
        dropout_p=dropout_p,
    )
    choice = choose_backend(backend, softcap=softcap)
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    n_queries = q_BTNH.shape[1]
    if window is not None and mask is None:
        # Keys that have left every query's window need not be read at all.
        n_near = n_queries + window - 1
        k_BSKH, v_BSKH = k_BSKH[:, -n_near:], v_BSKH[:, -n_near:]
    n_keys = k_BSKH.shape[1]
    windowed = window is not None and window < n_keys
    # The square triangle is left to the fused kernels, which then skip its empty half.
    triangle = causal and not windowed and mask is None and n_queries == n_keys
    triangle = triangle and choice.backend == "sdpa"
    if windowed or (causal and n_queries > 1 and not triangle):
        seen_TS = visible_keys(n_queries, n_keys, window, q_BTNH.device)
        mask = seen_TS if mask is None else _both(mask, seen_TS)
    if choice.backend == "sdpa":
        return sdpa.attend(
            q_BTNH, k_BSKH, v_BSKH, mask=mask, causal=triangle, scale=scale, dropout_p=dropout_p
        )
    return reference.attend(
        q_BTNH, k_BSKH, v_BSKH, mask=mask, scale=scale, dropout_p=dropout_p, softcap=softcap
    )


def _both(mask: Tensor, seen_TS: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask & seen_TS
    return mask.masked_fill(~seen_TS, -torch.inf)
