"""Where fits start, and which parameters a set of runs is able to tell apart.

Five parameters from a handful of small runs are often not identified. The rule here
is one sentence: *a direction that the runs know less well than the literature does is
given by the literature, and drawn from its spread in every resample*. So a tie costs
width in the intervals, where it belongs, and disappears as runs are added:

1. all five parameters are free where log(beta / alpha) has a standard error below
   `RATIO_SPREAD`;
2. otherwise beta / alpha is given, and alpha is fitted where log(alpha) then has a
   standard error below `EXPONENT_SPREAD`;
3. otherwise both exponents are given, and A, B and E are fitted.

Each level needs one run more than it has free parameters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from isoflop.laws.fit.minimise import (
    EXPONENTS_GIVEN,
    FREE,
    RATIO_GIVEN,
    Array,
    Minimum,
    Surface,
    Tie,
    minimise,
)

#: Centre and spread (standard deviation of the log) of published exponents. Assumed, from:
#: alpha .34 Hoffmann 2022, .35 Besiroglu 2024, .35 Muennighoff 2023, .18 to .25 Olmo Hybrid;
#: beta / alpha .82 to 1.25 over the same fits, about 2 in one ladder of tiny models. The
#: spreads are wider than these laws' own, since a small ladder is unlike all of them.
PUBLISHED_EXPONENT = 0.34
EXPONENT_SPREAD, RATIO_SPREAD = 0.35, 0.30

#: Starts: exponents, and E as a share of the lowest loss; A and B split what is left.
START_EXPONENTS = (0.1, 0.2, 0.35, 0.5, 0.8, 1.2)
START_FLOORS = (0.3, 0.6, 0.9)

#: Past this condition number a direction is not determined at all.
WORST_CONDITION = 1e13


@dataclass(frozen=True, slots=True)
class Chosen:
    """The best minimum under the tie that the runs can bear.

    Attributes:
        point: the five coordinates, [5].
        covariance: of the five coordinates, [5, 5]; infinite where not determined.
        reason: why these parameters were tied, or why none was.
    """

    tie: Tie
    point: Array
    minima: Minimum
    covariance: Array
    condition: float
    reason: str

    @property
    def best(self) -> int:
        return int(np.argmin(self.minima.value))


def choose(surface: Surface, starts: Array) -> Chosen:
    """Fit under the loosest tie that the runs bear; `starts` is [S, 5]."""
    n_runs = len(surface.log_loss)
    if n_runs > FREE.n_free:
        free = _fitted(surface, starts, FREE, "the runs tell alpha and beta apart")
        error = _error(free, np.array([0, 0, 0, -1.0, 1.0]))
        if error <= RATIO_SPREAD:
            return free
        why = f"the runs know beta / alpha to {_percent(error)}"
    else:
        why = f"{n_runs} runs are too few for 5 free parameters"
    why += f", published laws to {_percent(RATIO_SPREAD)}"
    if n_runs > RATIO_GIVEN.n_free:
        tied = _fitted(surface, starts, RATIO_GIVEN, why)
        error = _error(tied, np.array([0, 0, 0, 1.0, 0]))
        if error <= EXPONENT_SPREAD:
            return tied
        why += f"; even with beta / alpha given they know alpha to {_percent(error)}"
    else:
        why += f"; {n_runs} runs are too few for 4 free parameters"
    why += f", published laws to {_percent(EXPONENT_SPREAD)}"
    return _fitted(surface, starts, EXPONENTS_GIVEN, why)


def tied_points(
    points: Array, tie: Tie, log_ratio: Array | float, log_alpha: Array | float
) -> Array:
    """`points` [S, 5] with what the tie gives put in."""
    given = points.copy()
    if tie is EXPONENTS_GIVEN:
        given[:, 3] = log_alpha
    if tie is not FREE:
        given[:, 4] = given[:, 3] + log_ratio
    return given


def start_grid(log_loss: Array) -> Array:
    """108 starts in the five coordinates, [108, 5], from the losses' level alone."""
    lowest, middle = math.exp(np.min(log_loss)), math.exp(np.mean(log_loss))
    grid = itertools.product(START_EXPONENTS, START_EXPONENTS, START_FLOORS)
    rows = []
    for alpha, beta, share in grid:
        term = math.log((middle - share * lowest) / 2)
        rows.append([term, term, math.log(share * lowest), math.log(alpha), math.log(beta)])
    return np.array(rows)


def covariance_of(surface: Surface, point: Array, tie: Tie) -> tuple[Array, float]:
    """Least-squares covariance of the five coordinates, and the condition number behind it.

    The residual variance is the residual sum of squares over n - k.
    """
    slopes = tie.matrix.T @ surface.slopes(point[None])[0]
    residuals = (surface.predicted(point[None]) - surface.log_loss)[0]
    variance = float(residuals @ residuals) / (len(residuals) - tie.n_free)
    lengths = np.sqrt(np.sum(slopes**2, axis=1))
    if np.min(lengths) == 0:
        return np.full((5, 5), math.inf), math.inf
    scaled = slopes / lengths[:, None]
    condition = float(np.linalg.cond(scaled)) ** 2
    if condition > WORST_CONDITION:
        return np.full((5, 5), math.inf), condition
    inverse = np.linalg.inv(scaled @ scaled.T) / np.outer(lengths, lengths)
    return variance * tie.matrix @ inverse @ tie.matrix.T, condition


def unknown(chosen: Chosen) -> Sequence[tuple[str, float]]:
    """The quantities whose standard error is above a half, with that error, as a share."""
    names = ("E", "alpha", "beta")
    errors = [_error(chosen, np.eye(5)[i]) for i in (2, 3, 4)]
    return [(n, error) for n, error in zip(names, errors, strict=True) if error > 0.5]


def _fitted(surface: Surface, starts: Array, tie: Tie, reason: str) -> Chosen:
    tied = tied_points(starts, tie, 0.0, math.log(PUBLISHED_EXPONENT))
    kept = np.sort(np.unique(tied, axis=0, return_index=True)[1])  # starts that the tie made equal
    minima = minimise(surface, tied[kept], tie)
    point = minima.points[np.argmin(minima.value)]
    return Chosen(tie, point, minima, *covariance_of(surface, point, tie), reason)


def _error(chosen: Chosen, direction: Array) -> float:
    """The standard error of a sum of log coordinates: a relative error."""
    if not np.isfinite(chosen.covariance).all():
        return math.inf
    return math.sqrt(max(0.0, float(direction @ chosen.covariance @ direction)))


def _percent(error: float) -> str:
    return f"±{error:.0%}" if error < 2 else "no useful precision"
