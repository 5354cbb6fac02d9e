"""Which tiles of the score matrix are worked on, and what is done to each one's scores.

Rows of a tile are (query, head of the group) pairs: the G query heads that share a kv head
are packed beside each other, so its keys and values are read once for all of them.

Letters: B batch · T query tokens · S key tokens · N heads · K kv heads · G = N / K ·
R = T * G packed rows · W keys of a tile · b, k, t, w: the shares of B, K, T, W in one tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from isoflop.attention import masks, philox
from isoflop.attention.options import Options, four_axes


def _length(run: slice) -> int:
    return int(run.stop - run.start)


@dataclass(frozen=True, slots=True)
class Part:
    """A rectangle of work: a slice of batch and kv heads, of queries and of keys."""

    batch: slice
    heads: slice
    queries: slice
    keys: slice

    def of(self, x_BKGTS: Tensor) -> Tensor:
        """This part of a tensor whose axes may be one."""
        places = self.batch, self.heads, slice(None), self.queries, self.keys
        cut = (s if n > 1 else slice(None) for s, n in zip(places, x_BKGTS.shape, strict=True))
        return x_BKGTS[tuple(cut)]

    @property
    def n_rows(self) -> int:
        return _length(self.queries)

    @property
    def n_keys(self) -> int:
        return _length(self.keys)


@dataclass(frozen=True, slots=True)
class Grid:
    """The score matrix of one call, and how it is cut.

    `rows` and `width` are the queries and keys of one tile, `together` how many pairs of
    sequence and kv head are worked on at once.
    """

    batch: int
    n_queries: int
    n_keys: int
    n_kv_heads: int
    group: int
    rows: int
    width: int
    together: int

    def shares(self) -> Iterator[tuple[slice, slice]]:
        """Batch and kv heads, cut so that both flatten to one axis without a copy."""
        if self.together >= self.n_kv_heads:
            step = self.together // self.n_kv_heads
            for b in range(0, self.batch, step):
                yield slice(b, min(b + step, self.batch)), slice(0, self.n_kv_heads)
            return
        for b in range(self.batch):
            for k in range(0, self.n_kv_heads, self.together):
                yield slice(b, b + 1), slice(k, min(k + self.together, self.n_kv_heads))

    def queries(self) -> Iterator[slice]:
        for t in range(0, self.n_queries, self.rows):
            yield slice(t, min(t + self.rows, self.n_queries))

    def keys(self, queries: slice, options: Options) -> Iterator[slice]:
        """The runs of keys that some of these queries may see, in order; the rest is skipped."""
        first, last = (t + self.n_keys - self.n_queries for t in (queries.start, queries.stop - 1))
        end = min(self.n_keys, last + 1) if options.causal else self.n_keys
        start = 0 if options.window is None else max(0, first - options.window + 1)
        for lo, hi in ((0, min(options.sinks.tokens, start, end)), (start, end)):
            for near in self._seen_blocks(queries, lo, hi, options):
                for s in range(near.start, near.stop, self.width):
                    yield slice(s, min(s + self.width, near.stop))

    def _seen_blocks(
        self, queries: slice, start: int, end: int, options: Options
    ) -> Iterator[slice]:
        """What a block mask leaves of a range of keys: neighbouring blocks are joined.

        On the meta device nobody knows which those are: all are taken.
        """
        if start >= end:
            return
        if options.block_mask is None or options.block_mask.seen.is_meta:
            yield slice(start, end)
            return
        size = options.block_mask.size
        rows = options.block_mask.seen[..., queries.start // size : -(-queries.stop // size), :]
        wanted = rows.reshape(-1, rows.shape[-1]).any(0).tolist()
        run = start
        for j in range(start // size, -(-end // size)):
            if not wanted[j]:
                if run < j * size:
                    yield slice(run, j * size)
                run = (j + 1) * size
        if run < end:
            yield slice(run, end)


class Scores:
    """What is done to the scores of a tile between the two products, in place.

    A tile is [b * k, t * G, w] in memory; here it is seen as [b, k, t, G, w].
    """

    def __init__(
        self, options: Options, grid: Grid, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.options, self.grid = options, grid
        self.position_T = masks.positions(grid.n_queries, grid.n_keys, device)
        self.key_S = torch.arange(grid.n_keys, device=device)
        self.head_KG = torch.arange(grid.n_kv_heads * grid.group, device=device).view(
            -1, grid.group
        )
        self.sequence_B = torch.arange(grid.batch, device=device)
        self.slope_KG = None
        if options.alibi is not None:
            self.slope_KG = options.alibi.to(dtype).view(-1, grid.group)
        self.bias_BKGTS = None if options.bias is None else self.by_group(four_axes(options.bias))
        if self.bias_BKGTS is not None and self.bias_BKGTS.dtype != torch.bool:
            self.bias_BKGTS = self.bias_BKGTS.to(dtype)
        self.blocks_BKGTS = None
        if options.block_mask is not None:
            self.blocks_BKGTS = self.by_group(four_axes(options.block_mask.seen))

    def by_group(self, x_BNTS: Tensor) -> Tensor:
        """A view with the heads cut into K groups of G; an axis of one stays one."""
        cut = (1, 1) if x_BNTS.shape[1] == 1 else (self.grid.n_kv_heads, self.grid.group)
        return torch.unflatten(x_BNTS, 1, cut)

    def tile(self, s: Tensor, part: Part) -> Tensor:
        """[b, k, t, G, w] view of a tile."""
        return s.view(_length(part.batch), -1, part.n_rows, self.grid.group, part.n_keys)

    def adjust(self, s: Tensor, part: Part, *, slope_too: bool = False) -> Tensor | None:
        """Softcap, ALiBi, bias; -inf where a key is not seen.

        Returns d (c tanh(x / c)) / dx where it is wanted and there is a softcap c.
        """
        options, s_bktGw, slope = self.options, self.tile(s, part), None
        if options.softcap is not None:
            s.div_(options.softcap).tanh_()
            slope = 1 - s.square() if slope_too else None
            s.mul_(options.softcap)
        if self.slope_KG is not None:
            distance_tw = (self.position_T[part.queries, None] - self.key_S[part.keys]).abs()
            slope_ktGw = self.slope_KG[part.heads, None, :, None]
            s_bktGw.sub_(slope_ktGw * distance_tw[:, None, :])
        if self.bias_BKGTS is not None:
            bias_bktGw = part.of(self.bias_BKGTS).transpose(2, 3)
            if bias_bktGw.dtype == torch.bool:
                s_bktGw.masked_fill_(~bias_bktGw, -torch.inf)
            else:
                s_bktGw.add_(bias_bktGw)
        if self.blocks_BKGTS is not None:
            self._hide_blocks(s_bktGw, part)
        if options.causal:
            self._hide_band(s_bktGw, part)
        return slope

    def _hide_band(self, s_bktGw: Tensor, part: Part) -> None:
        """Later keys and those before the window; only columns that hold one are touched."""
        options, grid = self.options, self.grid
        first, last = (
            t + grid.n_keys - grid.n_queries for t in (part.queries.start, part.queries.stop - 1)
        )
        columns = [slice(max(part.keys.start, first + 1), part.keys.stop)]
        if options.window is not None:
            start = max(part.keys.start, options.sinks.tokens)
            columns.append(slice(start, min(part.keys.stop, last - options.window + 1)))
        for keys in columns:
            if keys.start < keys.stop:
                query_t1 = self.position_T[part.queries, None]
                seen_tw = masks.sees(
                    query_t1, self.key_S[keys], options.window, options.sinks.tokens
                )
                start = part.keys.start
                view = s_bktGw[..., keys.start - start : keys.stop - start]
                view.masked_fill_(~seen_tw[:, None, :], -torch.inf)

    def _hide_blocks(self, s_bktGw: Tensor, part: Part) -> None:
        mask = self.options.block_mask
        assert mask is not None
        assert self.blocks_BKGTS is not None
        size, (queries, keys) = mask.size, (part.queries, part.keys)
        blocks = replace(
            part,
            queries=slice(queries.start // size, -(-queries.stop // size)),
            keys=slice(keys.start // size, -(-keys.stop // size)),
        )
        seen = blocks.of(self.blocks_BKGTS)
        if not seen.is_meta and bool(seen.all()):
            return
        seen = seen.repeat_interleave(size, 3).repeat_interleave(size, 4)
        t, w = queries.start % size, keys.start % size
        seen = seen[..., t : t + part.n_rows, w : w + part.n_keys]
        s_bktGw.masked_fill_(~seen.transpose(2, 3), -torch.inf)

    def kept(self, part: Part, like: Tensor) -> Tensor | None:
        """What dropout multiplies a tile's weights by, or what flows back through them."""
        dropout = self.options.dropout
        if dropout is None:
            return None
        kept_bktGw = philox.kept(
            dropout,
            self.sequence_B[part.batch, None, None, None, None],
            self.head_KG[part.heads, None, :, None],
            torch.arange(part.queries.start, part.queries.stop, device=like.device)[:, None, None],
            part.keys.start,
            part.keys.stop,
        )
        return kept_bktGw.view(like.shape).to(like.dtype) * philox.keep_scale(dropout.p)
