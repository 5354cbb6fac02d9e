"""From a call to launches: features, tiles, lists of blocks, and one differentiable whole.

Letters: B batch · T query tokens · S key tokens · N heads · K kv heads · G = N / K · H d_head.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from isoflop.attention import philox
from isoflop.attention.kernels import backward, forward, tile
from isoflop.attention.kernels.lists import BlockLists
from isoflop.attention.options import Options, four_axes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

#: Rows, keys, warps and stages that are tried on a GPU, by the bytes of a head's row. The last
#: of each fits 99 KiB of shared memory in every pass, and runs where nothing is tuned.
_TILES = {
    128: ((128, 64, 4, 3), (128, 128, 8, 3), (64, 64, 4, 2)),
    256: ((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2)),
    512: ((128, 64, 8, 2), (64, 64, 8, 1), (64, 64, 4, 2), (32, 32, 4, 1)),
    1024: ((32, 32, 4, 1), (16, 32, 4, 1)),
}
#: What the interpreter takes: small, so that few tokens make several tiles.
_SMALL = 32


def attend(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """As `reference.attend`; scores and softmax in float32."""
    sink_N, bias = options.sinks.logits, options.bias
    return _attention(q_BTNH, k_BSKH, v_BSKH, sink_N, bias, options)


class _Attention(torch.autograd.Function):
    """Keeps its inputs, the output and one number per row."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTNH: Tensor,
        k_BSKH: Tensor,
        v_BSKH: Tensor,
        sink_N: Tensor | None,
        bias: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x.contiguous() for x in (q_BTNH, k_BSKH, v_BSKH))
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        call = _Call.of(q, k, v, options)
        sink = q if sink_N is None else sink_N.detach().contiguous()
        call.launch(forward.forward, "rows", q, k, v, out, lse, sink)
        ctx.save_for_backward(q, k, v, out, lse, sink_N, bias)
        ctx.options = options.without_inputs()
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse, sink_N, bias = ctx.saved_tensors
        options = ctx.options.with_inputs(sink_N, bias)
        d_out = torch.zeros_like(out) if d_out is None else d_out.contiguous()
        call = _Call.of(q, k, v, options)
        base, flow = _base_and_flow(out, d_out, lse, d_lse, call)
        d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
        d_scores = None
        if bias is not None and ctx.needs_input_grad[4]:
            d_scores = q.new_zeros(call.pairs, dtype=torch.float32)
            call = replace(call, features=call.features | tile.D_BIAS.value)
        call.launch(backward.backward_kv, "keys", q, k, v, d_out, base, flow, d_k, d_v)
        scores = q if d_scores is None else d_scores
        call.launch(backward.backward_q, "rows", q, k, v, d_out, base, flow, d_q, scores)
        d_bias = None
        if d_scores is not None:
            d_bias = d_scores.sum_to_size(bias.shape).to(bias.dtype)
        return d_q, d_k, d_v, _sink_gradient(sink_N, lse, flow), d_bias, None


_attention: Callable[..., tuple[Tensor, Tensor]] = _Attention.apply


@dataclass(frozen=True, slots=True)
class _Call:
    """Sizes and features of a call, ready to be launched several times."""

    options: Options
    features: int
    #: sequences, heads, and tokens of the longest sequence
    pairs: tuple[int, int, int, int]
    n_kv_heads: int
    d_head: int
    d_value: int
    #: of the wider head, padded
    bytes_row: int
    starts: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, options: Options) -> _Call:
        (batch, n_queries, n_heads, d_head), (n_keys, n_kv_heads) = q.shape, k.shape[1:3]
        starts = q, q
        if options.packed is not None:
            batch = options.packed.n_sequences
            n_queries, n_keys = (max(n) for n in options.packed.lengths())
            bounds = options.packed.query, options.packed.key
            start_q, start_k = (torch.tensor(x, dtype=torch.int32, device=q.device) for x in bounds)
            starts = start_q, start_k
        pairs = batch, n_heads, n_queries, n_keys
        features = _features(options, q.dtype)
        d_value = v.shape[-1]
        bytes_row = max(_padded(d_head), _padded(d_value)) * q.element_size()
        return cls(options, features, pairs, n_kv_heads, d_head, d_value, bytes_row, starts)

    @property
    def group(self) -> int:
        return self.pairs[1] // self.n_kv_heads

    def launch(self, kernel: Any, over: str, *tensors: Tensor) -> None:
        """One launch over tiles of `rows` or of `keys`."""
        batch, _, n_queries, n_keys = self.pairs
        n = n_queries * self.group if over == "rows" else n_keys
        mask = self.options.block_mask
        bm, bn, warps, stages = self._tile()
        lists = None
        if mask is not None:
            lists = BlockLists.of(self.options, self.pairs, self.n_kv_heads, (bm, bn), over)
        size = {"rows": "BM", "keys": "BN"}[over]

        def grid(chosen: dict[str, int]) -> tuple[int, int, int]:
            return triton.cdiv(n, chosen[size]), self.n_kv_heads, batch

        arguments = (*tensors, *self._arguments(tensors[0], lists))
        # A product and a sum in one instruction: said, since Triton's default is to change.
        fused = {} if INTERPRETED else {"enable_fp_fusion": True}
        with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
            if INTERPRETED or lists is not None:
                kernel[grid](*arguments, BM=bm, BN=bn, num_warps=warps, num_stages=stages, **fused)
            else:
                _tuned(kernel, self.bytes_row)[grid](*arguments, **fused)

    def _tile(self) -> tuple[int, int, int, int]:
        """Rows, keys, warps and stages where nothing is tuned; inside the blocks of a mask."""
        bm, bn, warps, stages = _tiles(self.bytes_row)[-1]
        if INTERPRETED:
            bm = bn = _SMALL
        if self.options.block_mask is not None:
            size = self.options.block_mask.size
            bm, bn = min(bm, size), min(bn, size)
        return bm, bn, warps, stages

    def _arguments(self, like: Tensor, lists: BlockLists | None) -> tuple[Any, ...]:
        """Everything after the tensors of tokens, in the kernels' order."""
        options, dropout = self.options, self.options.dropout
        bias, bias_strides = _broadcast(options.bias, like)
        mask = options.block_mask
        seen, seen_strides = _broadcast(None if mask is None else mask.seen, like)
        slope = like if options.alibi is None else options.alibi.float().contiguous()
        p, seed = (0.0, 0) if dropout is None else (dropout.p, dropout.seed)
        _, n_heads, n_queries, n_keys = self.pairs
        high = torch.get_float32_matmul_precision() != "highest"
        return (
            *(slope, bias, seen),
            *((like, like) if lists is None else (lists.places, lists.counts)),
            *self.starts,
            *(n_queries, n_keys, n_heads, options.scale, options.softcap or 1.0),
            *(options.window or 0, options.sinks.tokens),
            *(seed, philox.threshold(p), philox.keep_scale(p)),
            *(*bias_strides, *seen_strides),
            *(1 if mask is None else mask.size, 1 if lists is None else lists.places.shape[-1]),
            triton.next_power_of_2(max(n_queries, n_keys)),
            *(self.group, self.d_head, self.d_value),
            *(_padded(self.d_head), _padded(self.d_value)),
            *("tf32" if high and like.is_cuda else "ieee", self.features),
        )


def _features(options: Options, dtype: torch.dtype) -> int:
    bias, dropout = options.bias, options.dropout
    given = (
        (tile.CAUSAL, options.causal),
        (tile.WINDOW, options.window is not None),
        (tile.SOFTCAP, options.softcap is not None),
        (tile.ALIBI, options.alibi is not None),
        (tile.BIAS, bias is not None and bias.dtype != torch.bool),
        (tile.HIDE, bias is not None and bias.dtype == torch.bool),
        (tile.BLOCKS, options.block_mask is not None),
        (tile.PACKED, options.packed is not None),
        (tile.DROPOUT, dropout is not None),
        (tile.SINKS, options.sinks.logits is not None),
        (tile.UPCAST, INTERPRETED and dtype == torch.bfloat16),
    )
    return sum(bit.value for bit, is_given in given if is_given)


def _padded(size: int) -> int:
    """The power of two that holds a head, wide enough for the hardware's products."""
    return max(16, int(triton.next_power_of_2(size)))


def _tiles(bytes_row: int) -> tuple[tuple[int, int, int, int], ...]:
    return _TILES[next(n for n in _TILES if bytes_row <= n)]


@cache
def _tuned(kernel: Any, bytes_row: int) -> Any:
    """The kernel with the fastest of its tiles, found once per shape on this GPU."""
    configs = [
        triton.Config({"BM": bm, "BN": bn}, num_warps=warps, num_stages=stages)
        for bm, bn, warps, stages in _tiles(bytes_row)
    ]
    return triton.autotune(configs, key=["LENGTH", "G", "H", "HV", "F"])(kernel)


def _broadcast(x: Tensor | None, like: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor over [B, N, T, S] and its strides, nought where an axis is one."""
    if x is None:
        return like, (0, 0, 0, 0)
    x = four_axes(x.detach())
    strides = (s if n > 1 else 0 for s, n in zip(x.stride(), x.shape, strict=True))
    return x.view(torch.uint8) if x.dtype == torch.bool else x, tuple(strides)


def _base_and_flow(
    out: Tensor, d_out: Tensor, lse: Tensor, d_lse: Tensor | None, call: _Call
) -> tuple[Tensor, Tensor]:
    base, flow = torch.empty_like(lse), torch.empty_like(lse)
    d_lse = torch.zeros_like(lse) if d_lse is None else d_lse.float().contiguous()
    n_rows, rows = lse.numel(), 64
    with torch.cuda.device_of(out):
        backward.row_flow[(triton.cdiv(n_rows, rows),)](
            *(out, d_out, lse, d_lse, flow, base, n_rows),
            *(out.shape[-1], _padded(out.shape[-1]), call.features, rows),
        )
    return base, flow


def _sink_gradient(sink_N: Tensor | None, lse: Tensor, flow: Tensor) -> Tensor | None:
    """A sink gives no value, so its share only takes from the others."""
    if sink_N is None:
        return None
    share = (sink_N.detach().float() - lse).exp()
    return -(share * flow).sum((0, 1)).to(sink_N.dtype)
