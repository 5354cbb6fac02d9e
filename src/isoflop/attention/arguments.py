"""Whether the arguments of `attention` fit together.

Letters: B batch · T query tokens · S key tokens · N heads · K kv heads · H d_head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from isoflop.errors import InputError, Problem


def check_arguments(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    *,
    causal: bool,
    window: int | None,
    mask: Tensor | None,
    scale: float | None,
    dropout_p: float,
) -> None:
    """Raise `InputError` with everything that is wrong."""
    problems = list(_options(causal, window, scale, dropout_p))
    if q_BTNH.dim() == k_BSKH.dim() == v_BSKH.dim() == 4:
        problems += _shapes(q_BTNH, k_BSKH, v_BSKH)
        problems += [] if mask is None else _mask(q_BTNH, k_BSKH, mask)
    else:
        shapes = [tuple(x.shape) for x in (q_BTNH, k_BSKH, v_BSKH)]
        rule = "have four axes: batch, tokens, heads, head size"
        problems.append(Problem("q, k, v", shapes, rule))
    if problems:
        raise InputError("attention", problems)


def _options(
    causal: bool, window: int | None, scale: float | None, dropout_p: float
) -> Iterator[Problem]:
    if window is not None and (window < 1 or not causal):
        rule = "is at least 1 and needs causal=True"
        yield Problem("window", window, rule, "give a mask for another pattern")
    if scale is not None and not scale > 0:
        yield Problem("scale", scale, "is above 0")
    if not 0 <= dropout_p < 1:
        yield Problem("dropout_p", dropout_p, "lies from 0 up to, not including, 1")


def _shapes(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor) -> Iterator[Problem]:
    batch, _, n_heads, d_head = q_BTNH.shape
    n_kv_heads = k_BSKH.shape[2]
    for name, x in (("k_BSKH", k_BSKH), ("v_BSKH", v_BSKH)):
        if (x.dtype, x.device) != (q_BTNH.dtype, q_BTNH.device):
            rule = f"is {q_BTNH.dtype} on {q_BTNH.device}, as the queries"
            yield Problem(name, f"{x.dtype} on {x.device}", rule)
    if k_BSKH.shape[0] != batch or k_BSKH.shape[3] != d_head:
        rule = f"has the queries' batch {batch} and head size {d_head}"
        yield Problem("k_BSKH", tuple(k_BSKH.shape), rule)
    if v_BSKH.shape[:3] != k_BSKH.shape[:3]:
        rule = f"has the keys' batch, tokens and heads {tuple(k_BSKH.shape[:3])}"
        yield Problem("v_BSKH", tuple(v_BSKH.shape), rule)
    if n_kv_heads == 0 or n_heads % n_kv_heads:
        yield Problem("n_kv_heads", n_kv_heads, f"divides n_heads={n_heads}")


def _mask(q_BTNH: Tensor, k_BSKH: Tensor, mask: Tensor) -> Iterator[Problem]:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        hint = "mask != 0 makes it boolean"
        yield Problem("mask", mask.dtype, "is boolean (true: seen) or floating (added)", hint)
    whole = [q_BTNH.shape[0], q_BTNH.shape[2], q_BTNH.shape[1], k_BSKH.shape[1]]
    given = [1] * (4 - mask.dim()) + list(mask.shape)
    if len(given) != 4 or any(m not in (1, n) for m, n in zip(given, whole, strict=True)):
        rule = f"broadcasts to [batch, heads, queries, keys] = {whole}"
        hint = "a mask per sequence needs an axis for heads: mask[:, None]"
        yield Problem("mask", tuple(mask.shape), rule, hint)
