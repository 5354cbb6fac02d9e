"""The causal triangle some queries at a time, each with the keys up to them; shares are kept.

For short texts in half precision on a CPU, where PyTorch's fused kernel gains nothing from it.
Forward and backward, 4 sequences of 256, 5 heads of 64, one thread, medians of 11: 20.1 ms fused,
17.1 fused in single precision, 11.3 here; 2 of 512, 8 heads: 52, 54 and 27. Errors are those of
the fused kernel, since scores and their gradients are in single precision here too.

Letters: B batch · T tokens · N heads · K kv heads · H d_head · X = B N · t some queries ·
s the keys up to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from isoflop.attention.options import Options, no_autocast, score_dtype

#: Queries at a time: fewer waste less above the diagonal, more fill the products.
QUERIES = 64


def attend(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, options: Options) -> tuple[Tensor, None]:
    """As `reference.attend`, without the log."""
    group = q_BTNH.shape[2] // k_BTKH.shape[2]
    if group > 1:
        k_BTKH, v_BTKH = (x.repeat_interleave(group, 2) for x in (k_BTKH, v_BTKH))
    return _triangle(q_BTNH, k_BTKH, v_BTKH, options.scale), None


class _Triangle(torch.autograd.Function):
    """Keeps its inputs, the output and the shares, half of which are zero and not there."""

    @staticmethod
    def forward(ctx: Any, q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor, scale: float) -> Tensor:
        q, k, v = (_by_head(x) for x in (q_BTNH, k_BTNH, v_BTNH))
        wide = score_dtype(q.dtype)
        with no_autocast(q.device):
            q_wide, k_wide = q.to(wide) * scale, k.to(wide)
            out_XTH, shares = torch.empty_like(v), []
            for now, past in _rows(q.shape[1]):
                score_Xts = torch.bmm(q_wide[:, now], k_wide[:, past].mT)
                share_Xts = _softmax_(score_Xts).to(q.dtype)
                out_XTH[:, now] = torch.bmm(share_Xts, v[:, past])
                shares.append(share_Xts)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, out_XTH, *shares)
        return _by_token(out_XTH, q_BTNH.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTNH: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *shares = ctx.saved_tensors
        wide, grad = score_dtype(q.dtype), _by_head(grad_BTNH)
        with no_autocast(q.device):
            grad_wide, v_wide = grad.to(wide), v.to(wide)
            mean_XT1 = (grad_wide * out).sum(-1, keepdim=True)
            dq, dk, dv = torch.empty_like(q), *(torch.zeros_like(x, dtype=wide) for x in (k, v))
            for (now, past), share_Xts in zip(_rows(q.shape[1]), shares, strict=True):
                d_share_Xts = torch.bmm(grad_wide[:, now], v_wide[:, past].mT)
                d_score_Xts = d_share_Xts.sub_(mean_XT1[:, now]).mul_(share_Xts).to(q.dtype)
                dq[:, now] = torch.bmm(d_score_Xts, k[:, past])
                dk[:, past] += torch.bmm(d_score_Xts.mT, q[:, now])
                dv[:, past] += torch.bmm(share_Xts.mT, grad[:, now])
            grads = dq.mul_(ctx.scale), dk.mul_(ctx.scale).to(k.dtype), dv.to(v.dtype)
        return *(_by_token(x, grad_BTNH.shape[2]) for x in grads), None


_triangle: Callable[..., Tensor] = _Triangle.apply


def _rows(n_tokens: int) -> Iterator[tuple[slice, slice]]:
    """Some queries, and the keys up to the last of them."""
    for first in range(0, n_tokens, QUERIES):
        last = min(first + QUERIES, n_tokens)
        yield slice(first, last), slice(0, last)


def _softmax_(score_Xts: Tensor) -> Tensor:
    """In place, with what lies above the diagonal hidden: the corner at the end."""
    n_queries = score_Xts.shape[1]
    hidden_tt = score_Xts.new_full((n_queries, n_queries), -torch.inf).triu_(1)
    score_Xts[..., -n_queries:] += hidden_tt
    return torch.softmax(score_Xts, -1, out=score_Xts)


def _by_head(x_BTNH: Tensor) -> Tensor:
    """[X, T, H], one matrix after the other."""
    return x_BTNH.transpose(1, 2).flatten(0, 1).contiguous()


def _by_token(x_XTH: Tensor, n_heads: int) -> Tensor:
    return torch.unflatten(x_XTH, 0, (-1, n_heads)).transpose(1, 2)
