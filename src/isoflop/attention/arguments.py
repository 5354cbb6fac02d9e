"""From the arguments of `attention` to checked `Options`.

Letters: B batch · T query tokens · S key tokens · N heads · K kv heads · H d_head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from isoflop.attention.options import BlockMask, Dropout, Options, Packed, Sinks
from isoflop.errors import InputError, Problem

#: What scores can be made of; others would be rounded or wrap.
DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64


def read_options(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    *,
    causal: bool,
    window: int | None = None,
    sinks: int | Tensor | Sinks | None = None,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    return_lse: bool = False,
) -> Options:
    """One value of what was asked.

    Raises:
        InputError: arguments that do not fit together; all are listed.
    """
    sinks = _sinks(sinks)
    problems = list(_numbers(window, sinks, softcap, scale, dropout_p, dropout_seed, causal))
    packed = None
    if all(isinstance(x, Tensor) and x.dim() == 4 for x in (q_BTNH, k_BSKH, v_BSKH)):
        problems += _tensors(q_BTNH, k_BSKH, v_BSKH)
        wrong = list(_strays(q_BTNH, sinks.logits, alibi, bias, block_mask))
        wrong += _sequences(q_BTNH, k_BSKH, cu_seqlens)
        if not wrong:
            packed = _packed(cu_seqlens)
            wrong += _per_head(q_BTNH, sinks.logits, alibi)
            wrong += _pairs(q_BTNH, k_BSKH, packed, bias, block_mask)
        problems += wrong
    else:
        given = q_BTNH, k_BSKH, v_BSKH
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in given]
        rule = "are tensors of four axes: batch, tokens, heads, head size"
        problems.append(Problem("q, k, v", shapes, rule))
    if problems:
        raise InputError("attention", problems)
    return Options(
        causal=causal,
        scale=q_BTNH.shape[-1] ** -0.5 if scale is None else scale,
        window=window,
        sinks=sinks,
        softcap=softcap,
        alibi=alibi,
        bias=bias,
        block_mask=block_mask,
        packed=packed,
        dropout=Dropout(dropout_p, dropout_seed) if dropout_p > 0 else None,
        return_lse=return_lse,
    )


def _sinks(sinks: int | Tensor | Sinks | None) -> Sinks:
    if isinstance(sinks, Sinks):
        return sinks
    if isinstance(sinks, Tensor):
        return Sinks(logits=sinks)
    return Sinks() if sinks is None else Sinks(tokens=sinks)


def _numbers(
    window: int | None,
    sinks: Sinks,
    softcap: float | None,
    scale: float | None,
    dropout_p: float,
    dropout_seed: int | None,
    causal: bool,
) -> Iterator[Problem]:
    if not isinstance(causal, bool):
        yield Problem("causal", causal, "is True or False")
    if window is not None and not (is_whole(window, least=1) and causal):
        rule = "is a whole number of at least 1, and needs causal=True"
        yield Problem("window", window, rule, "give a bias for another pattern")
    if not is_whole(sinks.tokens) or (sinks.tokens and window is None):
        rule = "counts first tokens that stay visible beside a window"
        yield Problem("sinks", sinks.tokens, rule, "give a window, or one learned logit per head")
    for name, factor in (("softcap", softcap), ("scale", scale)):
        if factor is not None and not (_is_real(factor) and factor > 0):
            yield Problem(name, factor, "is a number above 0")
    if not (_is_real(dropout_p) and 0 <= dropout_p < 1):
        yield Problem("dropout_p", dropout_p, "lies from 0 up to, not including, 1")
    if dropout_seed is not None and not is_whole(dropout_seed):
        yield Problem("dropout_seed", dropout_seed, "is a whole number from 0 to 2**63 - 1")


def is_whole(x: object, least: int = 0) -> bool:
    """Whether a size or a count: True is none."""
    return isinstance(x, int) and not isinstance(x, bool) and least <= x < 1 << 63


def _is_real(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _tensors(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor) -> Iterator[Problem]:
    batch, _, n_heads, d_head = q_BTNH.shape
    n_kv_heads = k_BSKH.shape[2]
    if q_BTNH.dtype not in DTYPES:
        yield Problem("q_BTNH", q_BTNH.dtype, f"is one of {', '.join(map(str, DTYPES))}")
    if d_head == 0:
        yield Problem("d_head", d_head, "is at least 1")
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


def _per_head(q_BTNH: Tensor, sink_N: Tensor | None, alibi_N: Tensor | None) -> Iterator[Problem]:
    n_heads = q_BTNH.shape[2]
    for name, x in (("sinks", sink_N), ("alibi", alibi_N)):
        if x is not None and (x.shape != (n_heads,) or not x.is_floating_point()):
            yield Problem(name, tuple(x.shape), f"is one floating number per head: [{n_heads}]")
    if alibi_N is not None and alibi_N.requires_grad:
        hint = "give learned slopes as a bias, or detach them"
        yield Problem("alibi", "a tensor with a gradient", "is constant", hint)


def _strays(
    q_BTNH: Tensor,
    sink_N: Tensor | None,
    alibi_N: Tensor | None,
    bias: Tensor | None,
    block_mask: BlockMask | None,
) -> Iterator[Problem]:
    """What is no tensor on the queries' device."""
    if not isinstance(block_mask, BlockMask | None):
        yield Problem("block_mask", type(block_mask).__name__, "is a BlockMask")
        block_mask = None
    named = {"sinks": sink_N, "alibi": alibi_N, "bias": bias}
    given = {name: x for name, x in named.items() if x is not None}
    given |= {} if block_mask is None else {"block_mask.seen": block_mask.seen}
    for name, x in given.items():
        where = x.device if isinstance(x, Tensor) else type(x).__name__
        if where != q_BTNH.device:
            yield Problem(name, where, f"is a tensor on {q_BTNH.device}, as the queries")


def _sequences(
    q_BTNH: Tensor, k_BSKH: Tensor, cu_seqlens: Tensor | tuple[Tensor, Tensor] | None
) -> Iterator[Problem]:
    if cu_seqlens is None:
        return
    if q_BTNH.shape[0] != 1:
        hint = "lay the sequences end to end in one row"
        yield Problem("batch", q_BTNH.shape[0], "is 1 where cu_seqlens is given", hint)
    pair = cu_seqlens if isinstance(cu_seqlens, tuple) else (cu_seqlens, cu_seqlens)
    if len(pair) != 2 or not all(isinstance(x, Tensor) and not x.is_meta for x in pair):
        given = [x.device.type if isinstance(x, Tensor) else type(x).__name__ for x in pair]
        yield Problem("cu_seqlens", given, "is a tensor with its numbers, or a pair of them")
        return
    for bounds, x in zip(pair, (q_BTNH, k_BSKH), strict=True):
        places = [] if bounds.dim() != 1 or bounds.is_floating_point() else bounds.tolist()
        if (
            len(places) < 2
            or places != sorted(places)
            or (places[0], places[-1]) != (0, x.shape[1])
        ):
            rule = f"are whole numbers that rise from 0 to the {x.shape[1]} tokens"
            yield Problem("cu_seqlens", places or tuple(bounds.shape), rule)
    if len(pair[0]) != len(pair[1]):
        rule = "has as many sequences of keys as of queries"
        yield Problem("cu_seqlens", [len(x) - 1 for x in pair], rule)


def _packed(cu_seqlens: Tensor | tuple[Tensor, Tensor] | None) -> Packed | None:
    if cu_seqlens is None:
        return None
    pair = cu_seqlens if isinstance(cu_seqlens, tuple) else (cu_seqlens, cu_seqlens)
    return Packed(tuple(pair[0].tolist()), tuple(pair[1].tolist()))


def _pairs(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    packed: Packed | None,
    bias: Tensor | None,
    block_mask: BlockMask | None,
) -> Iterator[Problem]:
    """What is said of pairs of tokens; packed sequences count as a padded batch."""
    n_queries, n_keys = q_BTNH.shape[1], k_BSKH.shape[1]
    batch = q_BTNH.shape[0]
    if packed is not None:
        n_queries, n_keys = (max(lengths) for lengths in packed.lengths())
        batch = packed.n_sequences
    whole = [batch, q_BTNH.shape[2], n_queries, n_keys]
    if bias is not None and bias.dtype != torch.bool and not bias.is_floating_point():
        hint = "bias != 0 makes it boolean"
        yield Problem("bias", bias.dtype, "is boolean (true: seen) or floating (added)", hint)
    if bias is not None and not _broadcasts(bias, whole):
        rule = f"broadcasts to [batch, heads, queries, keys] = {whole}"
        hint = "a mask per sequence needs an axis for heads: mask[:, None]"
        yield Problem("bias", tuple(bias.shape), rule, hint)
    if block_mask is None:
        return
    if not is_whole(block_mask.size, least=1):
        yield Problem("block_mask.size", block_mask.size, "is at least 1")
        return
    whole[2:] = [-(-n // block_mask.size) for n in (n_queries, n_keys)]
    seen = block_mask.seen
    if (
        seen.dtype != torch.bool
        or not _broadcasts(seen, whole)
        or list(seen.shape[-2:]) != whole[2:]
    ):
        rule = f"is boolean and broadcasts to [batch, heads, blocks, blocks] = {whole}"
        yield Problem("block_mask.seen", tuple(seen.shape), rule)


def _broadcasts(x: Tensor, whole: Sequence[int]) -> bool:
    given = [1] * (4 - x.dim()) + list(x.shape)
    return len(given) == 4 and all(n in (1, m) for n, m in zip(given, whole, strict=True))
