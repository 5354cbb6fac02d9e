"""The baseline a trained model must beat: counts of the last few bytes, smoothed.

A byte model of order k looks at k bytes of context. Orders are interpolated by Witten and
Bell's rule (1991, IEEE Trans. Inf. Theory 37(4), method C): where c is how often a context was seen and t how many different bytes followed it,

    p_k(b) = (c(b) + t p_{k-1}(b)) / (c + t),   p_{-1}(b) = 1/256.

Nothing is tuned, so nothing can leak from the validation bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from isoflop.errors import InputError, Problem

#: Contexts and their next byte are packed into 32 bits.
HIGHEST_ORDER = 3
BYTE = np.uint32(8)

Codes = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Counts:
    """What was seen of one order: sorted codes, how often, and of how many kinds."""

    codes: Codes
    times: Floats
    contexts: Codes
    times_context: Floats
    kinds_context: Floats

    @classmethod
    def of(cls, grams: Codes) -> _Counts:
        """Count grams of order + 1 bytes, the last of them the byte that followed."""
        codes, times = _runs(np.sort(grams))
        starts = np.flatnonzero(np.diff(codes >> BYTE, prepend=~codes[:1] >> BYTE))
        kinds = np.diff(starts, append=len(codes)).astype(np.float64)
        return cls(codes, times, codes[starts] >> BYTE, np.add.reduceat(times, starts), kinds)

    def mix(self, grams: Codes, below: Floats) -> Floats:
        """p_k of each gram's last byte, from p_{k-1}."""
        times = _look_up(self.codes, self.times, grams)
        contexts = grams >> BYTE
        seen = _look_up(self.contexts, self.times_context, contexts)
        kinds = _look_up(self.contexts, self.kinds_context, contexts)
        known = seen > 0
        mixed = (times + kinds * below) / np.where(known, seen + kinds, 1)
        return np.where(known, mixed, below)


@dataclass(frozen=True, slots=True)
class Markov:
    """A fitted byte model of order `len(counts) - 1`.

    >>> import torch
    >>> text = torch.frombuffer(bytearray(b"abababab" * 8), dtype=torch.uint8)
    >>> Markov.fit(text, order=1).nats_per_byte(text) < Markov.fit(text, order=0).nats_per_byte(text)
    True
    """

    counts: tuple[_Counts, ...]

    @classmethod
    def fit(cls, text: Tensor, order: int = HIGHEST_ORDER) -> Markov:
        """Count a one-dimensional uint8 tensor.

        Raises:
            InputError: an order other than 0 to 3, or a text too short for it.
        """
        if type(order) is not int or not 0 <= order <= HIGHEST_ORDER:
            raise InputError("markov", [Problem("order", order, "is 0, 1, 2 or 3")])
        if len(text) <= order:
            rule = f"has more than {order} bytes"
            raise InputError("markov", [Problem("text", f"{len(text)} bytes", rule)])
        return cls(tuple(_Counts.of(_grams(text, k)) for k in range(order + 1)))

    def nats_per_byte(self, text: Tensor) -> float:
        """Mean of -ln p over the bytes of a text; its first bytes have shorter contexts.

        Raises:
            InputError: the text is empty.
        """
        return float(self.nats(text).mean())

    def nats(self, text: Tensor) -> Floats:
        """-ln p of each byte of a text; raises as `nats_per_byte`."""
        if len(text) == 0:
            raise InputError("markov", [Problem("text", "0 bytes", "has at least one byte")])
        p = np.full(len(text), 1 / 256)
        for order, counts in enumerate(self.counts):
            p[order:] = counts.mix(_grams(text, order), p[order:])
        nats: Floats = -np.log(p)
        return nats


def _grams(text: Tensor, order: int) -> Codes:
    """Each byte that has `order` bytes before it, packed behind them: the last byte lowest."""
    data = text.numpy()
    n_grams = max(len(data) - order, 0)
    code = np.zeros(n_grams, np.uint32)
    for shift in range(order + 1):
        code = (code << BYTE) | data[shift : shift + n_grams]
    return code


def _runs(ordered: Codes) -> tuple[Codes, Floats]:
    starts = np.flatnonzero(np.diff(ordered, prepend=~ordered[:1]))
    return ordered[starts], np.diff(starts, append=len(ordered)).astype(np.float64)


def _look_up(keys: Codes, values: Floats, wanted: Codes) -> Floats:
    """The value of each wanted key, 0 where there is none."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0.0)
