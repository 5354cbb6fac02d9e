"""Which keys a query may see, as a boolean mask.

Letters: T query tokens · S key tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible_keys(
    n_queries: int, n_keys: int, window: int | None = None, device: torch.device | None = None
) -> Tensor:
    """[T, S], true where query t may see key s: not later, and within the window.

    The last query stands at the last key, so queries that continue a cache see all of it.

    >>> visible_keys(2, 4, window=2).int()
    tensor([[0, 1, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    query_T1 = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    key_1S = torch.arange(n_keys, device=device)
    seen_TS = key_1S <= query_T1
    if window is not None:
        seen_TS &= key_1S > query_T1 - window
    return seen_TS
