"""Attention through PyTorch's fused kernels: scores never stand in memory where one fits.

Letters: B batch · T query tokens · S key tokens · N heads · K kv heads · G = N / K · H d_head.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from isoflop.attention import masks
from isoflop.attention.options import Options, four_axes

#: On Hopper and later cuDNN's kernel is the fastest of PyTorch's own; the others stand in.
HOPPER_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attend(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, options: Options) -> tuple[Tensor, None]:
    """As `reference.attend`, without the log; what is not a triangle becomes a dense mask.

    Dropout draws PyTorch's own random numbers.
    """
    k_BSKH, v_BSKH = _near(q_BTNH, k_BSKH, v_BSKH, options)
    # The square triangle is kept out of the mask: kernels skip the empty half only when told.
    triangle = triangle_alone(q_BTNH.shape[1], k_BSKH.shape[1], options)
    mask = None if triangle else _mask(q_BTNH, k_BSKH, options)
    if q_BTNH.shape[1] == 1 and k_BSKH.shape[2] != q_BTNH.shape[2]:
        return _attend_by_group(q_BTNH, k_BSKH, v_BSKH, mask, options), None
    q_BNTH, k_BKSH, v_BKSH = (x.transpose(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    n_heads, n_kv_heads = q_BNTH.shape[1], k_BKSH.shape[1]
    if n_kv_heads != n_heads and mask is not None and q_BNTH.is_cuda:
        # Of the CUDA kernels only flash groups heads, and flash takes no mask.
        k_BKSH, v_BKSH = (_repeat_heads(x, n_heads // n_kv_heads) for x in (k_BKSH, v_BKSH))
    with _preferred(q_BTNH):
        out_BNTH = F.scaled_dot_product_attention(
            q_BNTH,
            k_BKSH,
            v_BKSH,
            attn_mask=mask,
            dropout_p=0.0 if options.dropout is None else options.dropout.p,
            is_causal=triangle,
            scale=options.scale,
            enable_gqa=k_BKSH.shape[1] != n_heads,
        )
    return out_BNTH.transpose(1, 2), None


def _attend_by_group(
    q_B1NH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask: Tensor | None, options: Options
) -> Tensor:
    """One query of each head: heads that share a key are as many queries of one head.

    So a shared key is read once; told to group heads, PyTorch's kernel for a CPU reads it for
    each: 12 heads over one of 64 numbers, 2048 keys: 0.36 ms and 0.11 (one thread, median of 15).
    """
    n_kv_heads = k_BSKH.shape[2]
    q_BKGH = torch.unflatten(q_B1NH[:, 0], 1, (n_kv_heads, -1))
    if mask is not None and mask.shape[1] > 1:
        mask = torch.unflatten(mask[:, :, 0], 1, (n_kv_heads, -1))
    k_BKSH, v_BKSH = k_BSKH.transpose(1, 2), v_BSKH.transpose(1, 2)
    dropout_p = 0.0 if options.dropout is None else options.dropout.p
    with _preferred(q_B1NH):
        out_BKGH = F.scaled_dot_product_attention(
            q_BKGH, k_BKSH, v_BKSH, attn_mask=mask, dropout_p=dropout_p, scale=options.scale
        )
    return out_BKGH.flatten(1, 2)[:, None]


def triangle_alone(n_queries: int, n_keys: int, options: Options) -> bool:
    """Whether the square causal triangle is all that hides keys."""
    square = options.causal and n_queries == n_keys
    return square and not _windowed(n_keys, options) and not _shaped(options)


def needs_mask(n_queries: int, n_keys: int, options: Options) -> bool:
    """Whether a mask of T * S entries will stand in memory."""
    hides = options.causal and (n_queries > 1 or _windowed(n_keys, options))
    hides = hides or _shaped(options)
    return hides and not triangle_alone(n_queries, n_keys, options)


def _windowed(n_keys: int, options: Options) -> bool:
    return options.window is not None and options.window < n_keys


def _shaped(options: Options) -> bool:
    shapes = options.alibi, options.bias, options.block_mask
    return any(x is not None for x in shapes)


def _near(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Without the keys that have left every query's window: they need not be read at all."""
    if options.window is None or options.sinks.tokens or _shaped(options):
        return k_BSKH, v_BSKH
    first = max(0, k_BSKH.shape[1] - (q_BTNH.shape[1] + options.window - 1))
    return k_BSKH[:, first:], v_BSKH[:, first:]


def _mask(q_BTNH: Tensor, k_BSKH: Tensor, options: Options) -> Tensor | None:
    """Boolean where nothing is added to the scores, else floating."""
    n_queries, n_keys = q_BTNH.shape[1], k_BSKH.shape[1]
    if not needs_mask(n_queries, n_keys, options):
        return None
    seen = masks.visible_pairs(options, n_queries, n_keys, q_BTNH.device)
    added = masks.added_scores(options, n_queries, n_keys, q_BTNH)
    if added is None:
        return None if seen is None else four_axes(seen)
    return four_axes(added if seen is None else added.masked_fill(~seen, -torch.inf))


def _preferred(q_BTNH: Tensor) -> AbstractContextManager[None]:
    if q_BTNH.is_cuda and torch.cuda.get_device_capability(q_BTNH.device) >= (9, 0):
        return sdpa_kernel(HOPPER_FIRST, set_priority=True)
    return nullcontext()


def _repeat_heads(x_BKSH: Tensor, times: int) -> Tensor:
    return torch.repeat_interleave(x_BKSH, times, dim=1)
