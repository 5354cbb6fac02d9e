"""FlexAttention: PyTorch compiles the same mask functions into a kernel; for GPUs.

Letters: B batch · T query tokens · S key tokens · N heads · K kv heads · H d_head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from isoflop.attention import masks
from isoflop.attention.options import Options, Packed, four_axes

#: (sequence, head, query, key), each a whole number in a tensor -> whether the pair is seen.
Seen: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
#: The same after a score -> the score.
Score: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def attend(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, options: Options
) -> tuple[Tensor, Tensor | None]:
    """As `reference.attend`, but for dropout and the gradient of a bias."""
    q_BNTH, k_BKSH, v_BKSH = (x.transpose(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    score, seen = _functions_of(options, q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.device)
    attend_with, block_mask = _compiled(q_BTNH.device.type)
    whole = q_BNTH.shape[0], q_BNTH.shape[1], q_BNTH.shape[2], k_BKSH.shape[2]
    sink_N = options.sinks.logits
    wants_log = AuxRequest(lse=options.return_lse or sink_N is not None)
    out_BNTH, aux = attend_with(
        q_BNTH,
        k_BKSH,
        v_BKSH,
        score_mod=score,
        block_mask=block_mask(seen, *whole, device=q_BTNH.device),
        scale=options.scale,
        enable_gqa=k_BKSH.shape[1] != q_BNTH.shape[1],
        return_aux=wants_log,
    )
    lse_BNT = aux.lse
    if sink_N is not None:
        out_BNTH, lse_BNT = _with_sinks(out_BNTH, lse_BNT, sink_N)
    return out_BNTH.transpose(1, 2), None if lse_BNT is None else lse_BNT.transpose(1, 2)


@cache
def _compiled(device_type: str) -> tuple[Any, Any]:
    """Compiled where there is something to gain; a CPU takes them as they are."""
    if device_type == "cpu":
        return flex_attention, create_block_mask
    return torch.compile(flex_attention), torch.compile(create_block_mask)


def _with_sinks(out_BNTH: Tensor, lse_BNT: Tensor, sink_N: Tensor) -> tuple[Tensor, Tensor]:
    """A sink joins the denominator afterwards: every share shrinks by the same factor."""
    joined_BNT = torch.logaddexp(lse_BNT, sink_N.to(lse_BNT.dtype)[:, None])
    shrink_BNT1 = (lse_BNT - joined_BNT).exp()[..., None].to(out_BNTH.dtype)
    return out_BNTH * shrink_BNT1, joined_BNT


def _functions_of(
    options: Options, n_queries: int, n_keys: int, device: torch.device
) -> tuple[Score, Seen]:
    """What FlexAttention compiles; plain functions, since it counts their arguments."""
    bias = None if options.bias is None else four_axes(options.bias)
    added = None if bias is None or bias.dtype == torch.bool else bias
    hidden = bias if added is None else None
    mask = options.block_mask
    blocks = None if mask is None else four_axes(mask.seen)
    size = 1 if mask is None else mask.size
    starts = None if options.packed is None else _starts(options.packed, device)

    def local(b: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | int]:
        """Sequence, query and key inside it, and how far the queries begin behind the keys."""
        if starts is None:
            return b, t, s, n_keys - n_queries
        sequence_T, _, query_T, key_S, offset_T = starts
        return sequence_T[t], query_T[t], key_S[s], offset_T[t]

    def seen(b: Tensor, n: Tensor, t: Tensor, s: Tensor) -> Tensor:
        together = t >= 0 if starts is None else starts[0][t] == starts[1][s]
        i, query, key, offset = local(b, t, s)
        if options.causal:
            near = masks.sees(query + offset, key, options.window, options.sinks.tokens)
            together = together & near
        if blocks is not None:
            together = together & _at(blocks, i, n, query // size, key // size)
        if hidden is not None:
            together = together & _at(hidden, i, n, query, key)
        return together

    def score(score: Tensor, b: Tensor, n: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if options.softcap is not None:
            score = options.softcap * torch.tanh(score / options.softcap)
        i, query, key, offset = local(b, t, s)
        if options.alibi is not None:
            score = score - options.alibi[n] * (query + offset - key).abs()
        if added is not None:
            score = score + _at(added, i, n, query, key)
        return score

    return score, seen


def _at(x: Tensor, *places: Tensor) -> Tensor:
    """An entry of a tensor whose axes may be one; packed indices may run over its edge."""
    return x[tuple(i.clamp(max=n - 1) for i, n in zip(places, x.shape, strict=True))]


def _starts(packed: Packed, device: torch.device) -> tuple[Tensor, ...]:
    """Sequence of each query and key, both's places inside it, and each query's offset."""
    n_queries, n_keys = (torch.tensor(n, device=device) for n in packed.lengths())
    number = torch.arange(packed.n_sequences, device=device)
    sequence_T, sequence_S = (number.repeat_interleave(n) for n in (n_queries, n_keys))
    query_T, key_S = (
        torch.arange(len(sequence), device=device)
        - torch.tensor(starts[:-1], device=device)[sequence]
        for sequence, starts in ((sequence_T, packed.query), (sequence_S, packed.key))
    )
    return sequence_T, sequence_S, query_T, key_S, (n_keys - n_queries)[sequence_T]
