"""What an uncertain number could be: the same draws from its spread in every process."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

from isoflop.quantity.basis import Interval

#: Draws behind a sampled interval; its ends then have a standard error of about a
#: tenth of a standard deviation.
DRAWS = 401


@lru_cache(maxsize=256)
def draws(name: str, middle: float, spread: Interval) -> tuple[float, ...]:
    """`DRAWS` values about `middle`, from a stream that the name seeds.

    >>> draws("rate", 2.0, Interval(1.0, 4.0)) == draws("rate", 2.0, Interval(1.0, 4.0))
    True
    """
    stream = random.Random(f"isoflop:{name}")
    return tuple(spread.quantile(middle, stream.gauss(0, 1)) for _ in range(DRAWS))


def middle_90(ascending: Sequence[float]) -> Interval:
    """The range of all but the lowest and the highest 5 % of `DRAWS` values."""
    low, high = (round(share * (DRAWS - 1)) for share in (0.05, 0.95))
    return Interval(ascending[low], ascending[high])
