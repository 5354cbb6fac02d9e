"""Packed sequences for backends that know only batches: one call each, side by side.

Letters: B batch (1 here) · T query tokens · S key tokens · N heads · K kv heads · H d_head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from isoflop.attention.options import Options

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Options], tuple[Tensor, Tensor | None]]


def by_sequence(attend: Attend) -> Attend:
    """`attend`, taught to split a packed call and to join what comes back.

    `split` and `cat` undo each other in backward without a copy per sequence.
    """

    def attend_each(
        q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, options: Options
    ) -> tuple[Tensor, Tensor | None]:
        if options.packed is None:
            return attend(q_BTNH, k_BSKH, v_BSKH, options)
        n_queries, n_keys = options.packed.lengths()
        parts = (
            torch.split(x, lengths, 1)
            for x, lengths in ((q_BTNH, n_queries), (k_BSKH, n_keys), (v_BSKH, n_keys))
        )
        done = [
            attend(q, k, v, options.of_sequence(i, q.shape[1], k.shape[1]))
            for i, (q, k, v) in enumerate(zip(*parts, strict=True))
        ]
        outs, logs = zip(*done, strict=True)
        return torch.cat(outs, 1), None if logs[0] is None else torch.cat(logs, 1)

    return attend_each
