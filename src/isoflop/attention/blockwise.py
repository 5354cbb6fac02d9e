"""FlashAttention-2 in PyTorch operations: O(N) memory on any device, forward and backward.

Dao 2023 (2307.08691), algorithms 1 and 2: the score matrix is made one tile at a time and
never kept; backward makes it again from the saved log of each row's denominator. Nothing is
added in an order that a scheduler chooses, so equal calls give equal bits.

Letters: B batch · T query tokens · S key tokens · N heads · K kv heads · G = N / K · H d_head ·
R = T * G packed rows (tiles.py says why).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from isoflop.attention.options import Options, four_axes, no_autocast, score_dtype
from isoflop.attention.tiles import Grid, Part, Scores

#: Queries and keys of a tile (benchmarks/attention_cpu.md): half a MiB of float32, so that the
#: two tiles of backward stay in a core's own cache.
ROWS, WIDTH = 256, 512


def attend(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    options: Options,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.attend`; softmax in float32 at least. `tile`: rows and keys at a time."""
    tile = (ROWS, WIDTH) if tile is None else tile
    sink_N, bias = options.sinks.logits, options.bias
    return _blockwise(q_BTNH, k_BSKH, v_BSKH, sink_N, bias, options, tile)


class _Blockwise(torch.autograd.Function):
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
        tile: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        grid = _grid(q_BTNH, k_BSKH, options, tile)
        with no_autocast(q_BTNH.device):
            out_BTNH, lse_BKR = _forward(q_BTNH, k_BSKH, v_BSKH, options, grid)
        ctx.save_for_backward(q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse_BKR, sink_N, bias)
        ctx.options, ctx.grid = options.without_inputs(), grid
        ctx.set_materialize_grads(False)
        return out_BTNH, _unpack(lse_BKR[..., None], grid)[..., 0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_BTNH: Tensor | None, d_lse_BTN: Tensor | None) -> tuple[Any, ...]:
        q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse_BKR, sink_N, bias = ctx.saved_tensors
        options, bias_too = ctx.options.with_inputs(sink_N, bias), ctx.needs_input_grad[4]
        flows = out_BTNH, lse_BKR, d_out_BTNH, d_lse_BTN
        with no_autocast(q_BTNH.device):
            grads = _backward(q_BTNH, k_BSKH, v_BSKH, *flows, options, ctx.grid, bias_too)
        return *grads, None, None


_blockwise: Callable[..., tuple[Tensor, Tensor]] = _Blockwise.apply


def _grid(q_BTNH: Tensor, k_BSKH: Tensor, options: Options, tile: tuple[int, int]) -> Grid:
    batch, n_queries, n_heads, _ = q_BTNH.shape
    n_keys, n_kv_heads = k_BSKH.shape[1:3]
    group = n_heads // n_kv_heads
    rows, width = max(1, tile[0] // group), tile[1]
    if options.block_mask is not None:  # a tile stays inside one row of blocks
        size = options.block_mask.size
        rows = min(rows, size) if rows >= size or size % rows == 0 else size
    most = tile[0] * tile[1] * (torch.get_num_threads() if q_BTNH.device.type == "cpu" else 64)
    entries = min(rows, n_queries) * group * min(width, n_keys)
    together = max(1, min(batch * n_kv_heads, most // max(1, entries)))
    return Grid(batch, n_queries, n_keys, n_kv_heads, group, rows, width, together)


def _pack(x_BTNH: Tensor, grid: Grid) -> Tensor:
    """[B, K, R, H], contiguous, in the dtype of the scores."""
    x_BTKGH = torch.unflatten(x_BTNH, 2, (grid.n_kv_heads, -1)).to(score_dtype(x_BTNH.dtype))
    return x_BTKGH.transpose(1, 2).contiguous().flatten(2, 3)


def _unpack(x_BKRH: Tensor, grid: Grid) -> Tensor:
    """[B, T, N, H] again."""
    return torch.unflatten(x_BKRH, 2, (-1, grid.group)).transpose(1, 2).flatten(2, 3)


class _Tiles:
    """Two buffers that every tile of a call is made in, and its products."""

    def __init__(self, grid: Grid, like: Tensor, n_buffers: int) -> None:
        rows = min(grid.rows, grid.n_queries) * grid.group
        n = grid.together * rows * min(grid.width, grid.n_keys)
        self.buffers = [like.new_empty(n) for _ in range(n_buffers)]

    def product(self, a: Tensor, b: Tensor, buffer: int) -> Tensor:
        """a b^T of each head: [b * k, rows of a, rows of b]."""
        shape = a.shape[0], a.shape[1], b.shape[1]
        out = self.buffers[buffer][: shape[0] * shape[1] * shape[2]].view(shape)
        return torch.bmm(a, b.transpose(1, 2), out=out)


def _rows_of(x_BKRH: Tensor, batch: slice, heads: slice) -> Tensor:
    """[b * k, R, H], a view: `Grid.shares` cuts so that it is one."""
    return x_BKRH[batch, heads].flatten(0, 1)


def _forward(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, options: Options, grid: Grid
) -> tuple[Tensor, Tensor]:
    q, k, v = (_pack(x, grid) for x in (q_BTNH, k_BSKH, v_BSKH))
    q = q * options.scale  # not in place: packing need not have copied
    out, lse = q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3])
    scores, tiles = Scores(options, grid, q.device, q.dtype), _Tiles(grid, q, 1)
    for batch, heads in grid.shares():
        q_h, k_h, v_h, out_h, lse_h = (_rows_of(x, batch, heads) for x in (q, k, v, out, lse))
        for queries in grid.queries():
            rows = slice(queries.start * grid.group, queries.stop * grid.group)
            acc = out_h[:, rows].zero_()
            peak, total = _start(lse_h[:, rows], options, heads, batch, grid)
            for keys in grid.keys(queries, options):
                part = Part(batch, heads, queries, keys)
                s = tiles.product(q_h[:, rows], k_h[:, keys], 0)
                scores.adjust(s, part)
                higher = torch.maximum(peak, s.amax(-1))
                # A row that has seen nothing yet has no peak to take off.
                base = higher.masked_fill(higher == -torch.inf, 0.0)
                s.sub_(base[..., None]).exp_()
                shrink = peak.sub_(base).exp_()
                total = total.mul_(shrink).add_(s.sum(-1))
                _drop(s, scores.kept(part, s))
                acc.mul_(shrink[..., None]).baddbmm_(s, v_h[:, keys])
                peak = higher
            acc.div_(total.masked_fill(total == 0, 1.0)[..., None])
            lse_h[:, rows] = peak.add_(total.log_())
    # Laid out by token, so that whoever reads the heads side by side keeps no copy of it.
    return _unpack(out, grid).to(q_BTNH.dtype).contiguous(), lse


def _start(
    like: Tensor, options: Options, heads: slice, batch: slice, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Peak and total of rows before any key: a learned sink has been seen already."""
    sink_N = options.sinks.logits
    if sink_N is None:
        return torch.full_like(like, -torch.inf), torch.zeros_like(like)
    sink_kG = sink_N.detach().to(like.dtype).view(-1, grid.group)[heads]
    n_rows = like.shape[-1] // grid.group
    peak = sink_kG.repeat(batch.stop - batch.start, n_rows)
    return peak, torch.ones_like(like)


def _backward(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    out_BTNH: Tensor,
    lse: Tensor,
    d_out_BTNH: Tensor | None,
    d_lse_BTN: Tensor | None,
    options: Options,
    grid: Grid,
    bias_too: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, learned sinks and bias."""
    d_out_BTNH = torch.zeros_like(out_BTNH) if d_out_BTNH is None else d_out_BTNH
    q, k, v, d_out = (_pack(x, grid) for x in (q_BTNH, k_BSKH, v_BSKH, d_out_BTNH))
    q = q * options.scale  # not in place: packing need not have copied
    flow, lse = _flow(d_out, _pack(out_BTNH, grid), d_lse_BTN, lse, grid)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    scores, tiles = Scores(options, grid, q.device, q.dtype), _Tiles(grid, q, 2)
    d_bias = d_bias_view = None
    if bias_too and options.bias is not None:
        d_bias = torch.zeros_like(options.bias, dtype=q.dtype)
        d_bias_view = scores.by_group(four_axes(d_bias))
    for batch, heads in grid.shares():
        q_h, k_h, v_h, do_h, lse_h, flow_h, dq_h, dk_h, dv_h = (
            _rows_of(x, batch, heads) for x in (q, k, v, d_out, lse, flow, dq, dk, dv)
        )
        for queries in grid.queries():
            rows = slice(queries.start * grid.group, queries.stop * grid.group)
            for keys in grid.keys(queries, options):
                part = Part(batch, heads, queries, keys)
                p = tiles.product(q_h[:, rows], k_h[:, keys], 0)
                slope = scores.adjust(p, part, slope_too=True)
                p.sub_(lse_h[:, rows, None]).exp_()
                ds = tiles.product(do_h[:, rows], v_h[:, keys], 1)
                kept = _drop(ds, scores.kept(part, ds))
                ds.sub_(flow_h[:, rows, None]).mul_(p)
                _drop(p, kept)
                dv_h[:, keys].baddbmm_(p.transpose(1, 2), do_h[:, rows])
                if d_bias_view is not None:
                    target = part.of(d_bias_view)
                    target += scores.tile(ds, part).transpose(2, 3).sum_to_size(target.shape)
                if slope is not None:
                    ds.mul_(slope)
                dq_h[:, rows].baddbmm_(ds, k_h[:, keys])
                dk_h[:, keys].baddbmm_(ds.transpose(1, 2), q_h[:, rows])
    dq *= options.scale
    d_sink = _sink_gradient(options.sinks.logits, lse, flow, grid)
    dq, dk, dv = _unpack(dq, grid), dk.transpose(1, 2), dv.transpose(1, 2)
    grads = (x.to(q_BTNH.dtype) for x in (dq, dk, dv))
    return *grads, d_sink, d_bias  # autograd casts a gradient to its input's dtype


def _drop(x: Tensor, kept: Tensor | None) -> Tensor | None:
    if kept is not None:
        x.mul_(kept)
    return kept


def _flow(
    d_out: Tensor, out: Tensor, d_lse_BTN: Tensor | None, lse: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """What each row takes off its weights' gradients, and a log that leaves blind rows at zero."""
    flow = (d_out * out).sum(-1)
    if d_lse_BTN is not None:
        flow -= _pack(d_lse_BTN[..., None], grid)[..., 0]
    blind = lse == -torch.inf
    return flow.masked_fill_(blind, 0.0), lse.masked_fill(blind, torch.inf)


def _sink_gradient(sink_N: Tensor | None, lse: Tensor, flow: Tensor, grid: Grid) -> Tensor | None:
    """A sink gives no value, so its share only takes from the others."""
    if sink_N is None:
        return None
    sink_KG = sink_N.detach().to(lse.dtype).view(-1, grid.group)
    lse_BKTG, flow_BKTG = (torch.unflatten(x, 2, (-1, grid.group)) for x in (lse, flow))
    taken_BKTG = (sink_KG[:, None] - lse_BKTG).exp() * flow_BKTG
    return -taken_BKTG.sum((0, 2)).flatten().to(sink_N.dtype)
