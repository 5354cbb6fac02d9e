"""Attention through PyTorch's fused kernels: scores never stand in memory where one fits.

Letters: B batch · T query tokens · S key tokens · N heads · K kv heads · H d_head.
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
    causal: bool,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """As `reference.attend`; `causal` is the plain triangle of T = S.

    It is kept out of `mask` because kernels skip the empty half only when told of it.
    """
    q_BNTH, k_BKSH, v_BKSH = (x.transpose(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    n_heads, n_kv_heads = q_BNTH.shape[1], k_BKSH.shape[1]
    if n_kv_heads != n_heads and mask is not None and q_BNTH.is_cuda:
        # Of the CUDA kernels only flash groups heads, and flash takes no mask.
        k_BKSH, v_BKSH = (_repeat_heads(x, n_heads // n_kv_heads) for x in (k_BKSH, v_BKSH))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q_BNTH.dtype)
    out_BNTH = F.scaled_dot_product_attention(
        q_BNTH,
        k_BKSH,
        v_BKSH,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=causal,
        scale=scale,
        enable_gqa=k_BKSH.shape[1] != n_heads,
    )
    return out_BNTH.transpose(1, 2)


def _repeat_heads(x_BKSH: Tensor, times: int) -> Tensor:
    return torch.repeat_interleave(x_BKSH, times, dim=1)
