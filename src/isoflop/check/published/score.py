"""How far predictions were off: errors, their spread, and whether the ranges held.

Errors are signed and relative, predicted / measured - 1.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

#: The share of measurements that a range promises to hold.
LEVEL = 0.9


@dataclass(frozen=True, slots=True)
class Judged:
    """One measurement beside its prediction; the numbers are None where `skipped` says why.

    `unit` is that of measured, predicted, low and high. `group` is what it was measured on and
    in: a chip and a number format, or a kind of memory; `sort` of what: dense, experts, memory, runs.
    `widths` and `known` are a `Predicted`'s: where the range comes from, whether others' steps of
    the same software were read.
    """

    row_id: str
    family: str
    group: str
    model: str
    unit: str
    measured: float | None
    predicted: float | None = None
    low: float | None = None
    high: float | None = None
    skipped: str = ""
    sort: str = ""
    widths: tuple[tuple[str, float], ...] = ()
    known: bool | None = None

    @property
    def error(self) -> float | None:
        if self.measured is None or self.predicted is None:
            return None
        return self.predicted / self.measured - 1

    @property
    def inside(self) -> bool | None:
        """Whether the range holds the measurement; None where there is no range."""
        if self.measured is None or self.low is None or self.high is None:
            return None
        return self.low <= self.measured <= self.high

    @property
    def half_width(self) -> float | None:
        """Of the range, relative to the prediction."""
        if self.predicted is None or self.low is None or self.high is None:
            return None
        return (self.high - self.low) / 2 / self.predicted

    def to_json(self) -> dict[str, Any]:
        data = {**asdict(self), "error": self.error, "skipped": self.skipped or None}
        del data["widths"]  # summed up by family
        return data


@dataclass(frozen=True, slots=True)
class Score:
    """What a set of predictions was worth.

    Attributes:
        mape, median, p90, max: of the sizes of the errors.
        bias: the mean of the signed errors; below zero the predictions are too small.
        bias_error: its standard error; None of a single row.
        coverage: share of the rows with a range whose range holds the measurement.
        coverage_p: probability of a coverage as far from 0.9 or farther, were 0.9 true.
        width: median half-width of the ranges, relative to the predictions.
    """

    name: str
    n: int
    mape: float | None = None
    median: float | None = None
    p90: float | None = None
    max: float | None = None
    bias: float | None = None
    bias_error: float | None = None
    coverage: float | None = None
    coverage_p: float | None = None
    width: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def score(name: str, rows: Sequence[Judged]) -> Score:
    """The score of the rows that have a prediction.

    >>> rows = [Judged("a", "f", "g", "m", "seconds", 2.0, 2.2, 1.9, 2.5),
    ...         Judged("b", "f", "g", "m", "seconds", 4.0, 3.0, 2.0, 3.9)]
    >>> found = score("f", rows)
    >>> found.n, round(found.mape, 3), round(found.bias, 3), found.coverage
    (2, 0.175, -0.075, 0.5)
    """
    errors = [r.error for r in rows if r.error is not None]
    if not errors:
        return Score(name, 0)
    sizes = sorted(map(abs, errors))
    inside = [r.inside for r in rows if r.inside is not None]
    widths = [r.half_width for r in rows if r.half_width is not None]
    return Score(
        name=name,
        n=len(errors),
        mape=statistics.fmean(sizes),
        median=statistics.median(sizes),
        p90=quantile(sizes, 0.9),
        max=sizes[-1],
        bias=statistics.fmean(errors),
        bias_error=statistics.stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else None,
        coverage=sum(inside) / len(inside) if inside else None,
        coverage_p=binomial_p(sum(inside), len(inside), LEVEL) if inside else None,
        width=statistics.median(widths) if widths else None,
    )


def scores(rows: Sequence[Judged], key: Callable[[Judged], str]) -> tuple[Score, ...]:
    """A score per value of `key`, in order of first appearance."""
    return tuple(
        score(name, [r for r in rows if key(r) == name]) for name in dict.fromkeys(map(key, rows))
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between the order statistics.

    >>> quantile([0.0, 1.0, 2.0, 3.0], 0.9)
    2.7
    """
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def binomial_p(k: int, n: int, share: float) -> float:
    """Two-sided exact binomial test: outcomes no likelier than `k` of `n`.

    Source: Clopper and Pearson's setting; two sides by likelihood, as R's binom.test.

    >>> round(binomial_p(4, 10, 0.9), 6), binomial_p(9, 10, 0.9)
    (0.000147, 1.0)
    """
    logs = [_log_binomial(i, n, share) for i in range(n + 1)]
    likely = logs[k] + 1e-7
    return min(1.0, math.fsum(math.exp(log) for log in logs if log <= likely))


def _log_binomial(k: int, n: int, share: float) -> float:
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return ways + k * math.log(share) + (n - k) * math.log1p(-share)
