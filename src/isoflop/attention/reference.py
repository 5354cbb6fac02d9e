"""Attention as it is written on paper: every score in memory.

The oracle of the other backends (in float64); it can do everything. Half precision is computed
in float32: a score past 65,504 is no number in float16, and a softmax in bfloat16 has two digits.

Letters: B batch · T query tokens · S key tokens · N heads · K kv heads · G = N / K · H d_head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isoflop.attention import masks, philox
from isoflop.attention.options import Dropout, Options, no_autocast, score_dtype


def attend(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v for each head, and the log of the softmax's denominator [B, T, N].

    A query that sees no key gives zeros, and -inf as its log.
    """
    dtype, wide = q_BTNH.dtype, score_dtype(q_BTNH.dtype)
    with no_autocast(q_BTNH.device):
        q_BTNH, k_BSKH, v_BSKH = (x.to(wide) for x in (q_BTNH, k_BSKH, v_BSKH))
        out_BTNH, lse_BTN = _attend(q_BTNH, k_BSKH, v_BSKH, options)
    return out_BTNH.to(dtype), lse_BTN


def _attend(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    n_kv_heads = k_BSKH.shape[2]
    weights_BNTS, lse_BNT = _softmax(_scores(q_BTNH, k_BSKH, options), options.sinks.logits)
    if options.dropout is not None:
        keep_BNTS = _kept(options.dropout, weights_BNTS)
        weights_BNTS = weights_BNTS * keep_BNTS * philox.keep_scale(options.dropout.p)
    weights_BKGTS = torch.unflatten(weights_BNTS, 1, (n_kv_heads, -1))
    out_BTKGH = torch.einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BSKH)
    return out_BTKGH.flatten(2, 3), lse_BNT.transpose(1, 2)


def _scores(q_BTNH: Tensor, k_BSKH: Tensor, options: Options) -> Tensor:
    """[B, N, T, S]; -inf where a key is not seen."""
    n_queries, n_keys, n_kv_heads = q_BTNH.shape[1], k_BSKH.shape[1], k_BSKH.shape[2]
    q_BTKGH = torch.unflatten(q_BTNH, 2, (n_kv_heads, -1)) * options.scale
    scores_BNTS = torch.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH).flatten(1, 2)
    if options.softcap is not None:
        scores_BNTS = options.softcap * torch.tanh(scores_BNTS / options.softcap)
    added = masks.added_scores(options, n_queries, n_keys, scores_BNTS)
    if added is not None:
        scores_BNTS = scores_BNTS + added
    seen = masks.visible_pairs(options, n_queries, n_keys, scores_BNTS.device)
    return scores_BNTS if seen is None else scores_BNTS.masked_fill(~seen, -torch.inf)


def _softmax(scores_BNTS: Tensor, sink_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """Shares of the seen keys, and the log of their denominator, a sink's share in it."""
    n_keys = scores_BNTS.shape[-1]
    if sink_N is not None:
        sink_BNT1 = sink_N.to(scores_BNTS.dtype)[:, None, None].expand(*scores_BNTS.shape[:-1], 1)
        scores_BNTS = torch.cat([scores_BNTS, sink_BNT1], -1)
    # A row of -inf would give 0 / 0 in value and gradient; a finite row is zeroed instead.
    blind_BNT = (scores_BNTS == -torch.inf).all(-1)
    safe_BNTS = scores_BNTS.masked_fill(blind_BNT[..., None], 0.0)
    weights_BNTS = safe_BNTS.softmax(-1).masked_fill(blind_BNT[..., None], 0.0)
    return weights_BNTS[..., :n_keys], safe_BNTS.logsumexp(-1).masked_fill(blind_BNT, -torch.inf)


def _kept(dropout: Dropout, weights_BNTS: Tensor) -> Tensor:
    batch, n_heads, n_queries, n_keys = weights_BNTS.shape
    count = (torch.arange(n, device=weights_BNTS.device) for n in (batch, n_heads, n_queries))
    sequence, head, query = count
    return philox.kept(
        dropout, sequence[:, None, None, None], head[:, None, None], query[:, None], 0, n_keys
    )
