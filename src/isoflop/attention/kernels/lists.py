"""Lists of the tiles that a block mask leaves, for kernels that visit no other.

Letters: B batch · T query tokens · S key tokens · N heads · K kv heads · G = N / K ·
R tiles of packed rows · W tiles of keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isoflop.attention.options import Options, four_axes


@dataclass(frozen=True, slots=True)
class BlockLists:
    """For each tile of one side, the tiles of the other that it visits.

    `places` [B, K, tiles, most] holds them in order, `counts` [B, K, tiles] how many count.
    """

    places: Tensor
    counts: Tensor

    @classmethod
    def of(
        cls,
        options: Options,
        pairs: tuple[int, int, int, int],
        n_kv_heads: int,
        tile: tuple[int, int],
        over: str,
    ) -> BlockLists:
        """Over tiles of `rows` or of `keys`, `tile` = (rows, keys) in size."""
        visited_BKRW = _visited(options, pairs, n_kv_heads, tile)
        visited = visited_BKRW if over == "rows" else visited_BKRW.transpose(2, 3)
        order = torch.argsort((~visited).byte(), dim=-1, stable=True)
        return cls(order.int().contiguous(), visited.sum(-1).int())


def _visited(
    options: Options, pairs: tuple[int, int, int, int], n_kv_heads: int, tile: tuple[int, int]
) -> Tensor:
    """[B, K, R, W], true where any row of a tile may see any of its keys."""
    assert options.block_mask is not None
    (batch, n_heads, n_queries, n_keys), (rows, width) = pairs, tile
    size, group = options.block_mask.size, n_heads // n_kv_heads
    seen = four_axes(options.block_mask.seen)
    seen = seen.expand(batch, n_heads, *seen.shape[2:])
    seen = torch.unflatten(seen, 1, (n_kv_heads, group)).any(2)
    n_tiles = -(-n_queries * group // rows)
    row_R = torch.arange(n_tiles, device=seen.device) * rows
    first_R = row_R // group
    last_R = ((row_R + rows - 1) // group).clamp(max=n_queries - 1)
    # Rows of a tile divide `size`, so a tile stays inside one row of blocks.
    seen = seen[:, :, first_R // size]
    seen = seen.repeat_interleave(size // width, -1)[..., : -(-n_keys // width)]
    if options.causal and options.packed is None:
        key_W = torch.arange(seen.shape[-1], device=seen.device) * width
        seen = seen & (key_W <= last_R[:, None] + n_keys - n_queries)
    return seen
