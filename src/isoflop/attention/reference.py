"""Attention as it is written on paper: every score in memory, in the dtype given.

The oracle of the other backends (in float64), and the path of what they cannot do.

Letters: B batch · T query tokens · S key tokens · N heads · K kv heads · G = N / K · H d_head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
    dropout_p: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v for each head; a query that sees no key gives zeros.

    `mask` is boolean (true: seen) or added to the scores, broadcast to [B, N, T, S].
    """
    n_kv_heads = k_BSKH.shape[2]
    q_BTKGH = torch.unflatten(q_BTNH, 2, (n_kv_heads, -1))
    scores_BKGTS = torch.einsum("btkgh,bskh->bkgts", q_BTKGH * scale, k_BSKH)
    if softcap is not None:
        scores_BKGTS = softcap * torch.tanh(scores_BKGTS / softcap)
    scores_BNTS = scores_BKGTS.flatten(1, 2)
    weights_BNTS = _softmax(scores_BNTS, mask)
    weights_BKGTS = torch.unflatten(F.dropout(weights_BNTS, dropout_p), 1, (n_kv_heads, -1))
    out_BTKGH = torch.einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BSKH)
    return out_BTKGH.flatten(2, 3)


def _softmax(scores_BNTS: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the seen keys, zeros where none is seen."""
    if mask is None:
        return scores_BNTS.softmax(-1)
    if mask.dtype == torch.bool:
        scores_BNTS = scores_BNTS.masked_fill(~mask, -torch.inf)
    else:
        scores_BNTS = scores_BNTS + mask
    # A row of -inf would give 0 / 0 in value and gradient; a finite row is zeroed instead.
    blind = (scores_BNTS == -torch.inf).all(-1, keepdim=True)
    return scores_BNTS.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
