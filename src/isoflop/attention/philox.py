"""Random numbers by counter: any weight's fate can be known without the others.

Philox4x32 (Salmon et al. 2011, 'Parallel random numbers: as easy as 1, 2, 3', section 3.3)
maps a counter of four 32-bit words and a key of two to four random words. Here the counter is
(query, key // 4, head, sequence), so one call serves four neighbouring keys; kernels/tile.py
computes the same on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isoflop.attention.options import Dropout

#: Seven rounds are the fewest that pass all of BigCrush (Salmon et al., table 2).
ROUNDS = 7
#: A weight is kept when the upper 24 bits of its word reach p times this.
RESOLUTION = 1 << 24
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], seed: int, rounds: int = ROUNDS) -> tuple[Tensor, ...]:
    """Four words of 32 bits, in int64, for counters that broadcast to one shape.

    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> [f"{int(word):08x}" for word in philox((zero,) * 4, seed=0, rounds=10)]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    key = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(rounds):
        # The product of two 32-bit words wraps in a signed 64-bit one, and keeps every bit.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((b >> 32) & _LOW) ^ c1 ^ key[0]
        c2 = ((a >> 32) & _LOW) ^ c3 ^ key[1]
        c1, c3 = b & _LOW, a & _LOW
        key = [(k + step) & _LOW for k, step in zip(key, _KEY_STEPS, strict=True)]
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    """Of `RESOLUTION` equally likely values, how many drop a weight; one at least keeps it."""
    return min(round(p * RESOLUTION), RESOLUTION - 1)


def keep_scale(p: float) -> float:
    """What a kept weight is multiplied by, so that the mean stays."""
    return RESOLUTION / (RESOLUTION - threshold(p))


def kept(
    dropout: Dropout, sequence: Tensor, head: Tensor, query: Tensor, first_key: int, last_key: int
) -> Tensor:
    """True where a weight is kept: [..., keys from `first_key` up to, not with, `last_key`].

    `sequence`, `head` and `query` broadcast with a last axis of one for the keys.
    """
    assert dropout.seed is not None, "drawn by the dispatch"
    quads = torch.arange(first_key // 4, -(-last_key // 4), device=query.device)
    counter = (query, quads, head, sequence + dropout.first_sequence)
    words = torch.stack(philox(counter, dropout.seed), -1).flatten(-2)  # all are mixed by now
    start = first_key % 4
    words = words[..., start : start + last_key - first_key]
    return (words >> 8) >= threshold(dropout.p)
