"""How well a published law is known: laws as likely as itself, and where its runs end."""

from __future__ import annotations

import math
import random
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from isoflop.laws.form import Law
from isoflop.laws.published import published_laws
from isoflop.quantity import Interval


@dataclass(frozen=True, slots=True)
class Spread:
    """A law's uncertainty.

    Attributes:
        laws: fits of resamples of the runs that the law was fitted to.
        rms_log_loss: how far one run lies from the law, in the log of its loss.
        flops_largest: compute of the largest of those runs.
    """

    laws: tuple[Law, ...]
    rms_log_loss: float
    flops_largest: float
    source: str

    def interval(self, of: Callable[[Law], float]) -> Interval:
        """The 90 % range of a number that follows from the law."""
        return _middle([of(law) for law in self.laws])

    def interval_of_run(self, loss: Callable[[Law], float]) -> Interval:
        """The 90 % range of the loss that one run measures."""
        draw = random.Random("isoflop:run")
        noise = (math.exp(draw.gauss(0, self.rms_log_loss)) for _ in self.laws)
        return _middle([loss(law) * n for law, n in zip(self.laws, noise, strict=True)])


def _middle(values: list[float]) -> Interval:
    ordered = sorted(values)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.05, 0.95))
    return Interval(low, high)


def spread_of(law: Law) -> Spread | None:
    """The spread of a published law; None where nobody published one.

    >>> from isoflop.laws.published import find_law
    >>> spread = spread_of(find_law("besiroglu-2024-minimum"))
    >>> span = spread.interval(lambda law: law.optimum(1e22).params)
    >>> span.low < find_law("besiroglu-2024-minimum").optimum(1e22).params < span.high
    True
    >>> spread_of(find_law("hoffmann-2022")) is None
    True
    """
    if law.name not in _rows() or published_laws().get(law.name) != law:
        return None
    return _spread(law.name)


@cache
def _rows() -> dict[str, dict[str, Any]]:
    text = files("isoflop.laws").joinpath("spread.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@cache
def _spread(name: str) -> Spread:
    row = _rows()[name]
    laws = tuple(Law(A, B, E, alpha, beta, name=name) for A, B, E, alpha, beta in row["draws"])
    return Spread(laws, row["rms_log_loss"], row["flops_largest"], row["source"])
