"""The objective of a law's fit, its exact derivatives, and a minimiser of many fits at once.

The objective is Hoffmann 2022 (2203.15556), section 3.3 and appendix D.3: the *sum*,
over runs, of Huber_delta(log L_predicted - log L_measured), with
log L_predicted = logsumexp(log A - alpha log N, log B - beta log D, log E).
(The mean, n times smaller, stops general optimisers early: they test absolute change.)

Everything here works on S fits of the same n runs at once: the starts of one fit,
or its resamples. Shapes: S fits, n runs, 5 coordinates, k of them free.

The five coordinates are the log of each term at the runs' geometric mean and the log
exponents: (log A - alpha mean log N, log B - beta mean log D, log E, log alpha,
log beta). Centred terms do not trade off against the exponents, and logs keep
every parameter positive, so no bounds are needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

#: The most iterations; a fit still moving after them is reported as not converged.
MOST_STEPS = 400
#: A fit has converged when a Newton step would lower the objective by less than this
#: share of it, or by this much times delta^2 where the law fits without residuals.
SMALLEST_GAIN, SMALLEST_FALL = 1e-13, 1e-18
#: No coordinate moves further in one step; all are logs.
LONGEST_STEP = 2.0
#: S x n of one slice of a batch, so that its temporaries stay in cache.
SLICE_CELLS = 32_768


class Derivatives(NamedTuple):
    """Objective [S], gradient [S, 5], exact Hessian [S, 5, 5] and `curvature` [S, 5, 5]:
    the positive curvature of the quadratic that touches the Huber loss from above.
    """

    value: Array
    gradient: Array
    hessian: Array
    curvature: Array


@dataclass(frozen=True, slots=True)
class Surface:
    """The runs, in logs about their mean, and the width of the Huber loss.

    Attributes:
        log_params, log_tokens: centred, [n].
        log_loss: [n], or [S, n] where each fit has its own losses.
        weights: how often each run counts, [n] or [S, n].
    """

    log_params: Array
    log_tokens: Array
    log_loss: Array
    weights: Array
    delta: float

    def rows(self, chosen: NDArray[np.intp]) -> Surface:
        """The surface of some of the S fits."""
        log_loss = self.log_loss[chosen] if self.log_loss.ndim == 2 else self.log_loss
        weights = self.weights[chosen] if self.weights.ndim == 2 else self.weights
        return replace(self, log_loss=log_loss, weights=weights)

    def terms(self, points: Array) -> tuple[Array, Array, Array]:
        """The three terms of the law, each [S, n] (the last [S, 1]), at `points` [S, 5]."""
        a, b, e, log_alpha, log_beta = (points[:, i : i + 1] for i in range(5))
        by_params = np.exp(a - np.exp(log_alpha) * self.log_params)
        by_tokens = np.exp(b - np.exp(log_beta) * self.log_tokens)
        return by_params, by_tokens, np.exp(e)

    def predicted(self, points: Array) -> Array:
        """Log loss, [S, n]."""
        by_params, by_tokens, floor = self.terms(points)
        return np.log(by_params + by_tokens + floor)

    def value(self, points: Array) -> Array:
        """The objective, [S]."""
        size = np.abs(self.predicted(points) - self.log_loss)
        inner = np.minimum(size, self.delta)
        return np.sum(self.weights * inner * (size - 0.5 * inner), axis=1)  # type: ignore[no-any-return]

    def derivatives(self, points: Array) -> Derivatives:
        """The objective with its first and second derivatives."""
        terms = self.terms(points)
        loss = terms[0] + terms[1] + terms[2]
        residual = np.log(loss) - self.log_loss
        size = np.abs(residual)
        inner = np.minimum(size, self.delta)
        pull = self.weights * np.clip(residual, -self.delta, self.delta)
        slopes, bend = self._slopes(points, terms, loss, pull)
        return Derivatives(
            value=np.sum(self.weights * inner * (size - 0.5 * inner), axis=1),
            gradient=(slopes @ pull[:, :, None])[:, :, 0],
            hessian=_gram(slopes, self.weights * (size <= self.delta) - pull) + bend,
            curvature=_gram(slopes, self.weights * (self.delta / np.maximum(size, self.delta))),
        )

    def slopes(self, points: Array) -> Array:
        """The derivative of each log prediction by each coordinate, [S, 5, n]."""
        terms = self.terms(points)
        loss = terms[0] + terms[1] + terms[2]
        return self._slopes(points, terms, loss, np.zeros_like(loss))[0]

    def _slopes(
        self, points: Array, terms: tuple[Array, Array, Array], loss: Array, pull: Array
    ) -> tuple[Array, Array]:
        """`slopes`, and the part of the Hessian that comes from the terms' own curvature."""
        by_params, by_tokens, floor = (term / loss for term in terms)
        turn_params = -np.exp(points[:, 3:4]) * self.log_params
        turn_tokens = -np.exp(points[:, 4:5]) * self.log_tokens
        along_params, along_tokens = by_params * turn_params, by_tokens * turn_tokens
        bend = np.zeros((len(points), 5, 5))
        for own, exponent, share, along, turn in (
            (0, 3, by_params, along_params, turn_params),
            (1, 4, by_tokens, along_tokens, turn_tokens),
        ):
            bend[:, own, own] = np.sum(pull * share, axis=1)
            bend[:, own, exponent] = bend[:, exponent, own] = np.sum(pull * along, axis=1)
            bend[:, exponent, exponent] = np.sum(pull * along * (1 + turn), axis=1)
        bend[:, 2, 2] = np.sum(pull * floor, axis=1)
        slopes = np.stack([by_params, by_tokens, floor, along_params, along_tokens], axis=1)
        return slopes, bend


def _gram(slopes: Array, weights: Array) -> Array:
    """Sum over runs of weight x slope slope^T, [S, 5, 5]."""
    return (slopes * weights[:, None, :]) @ slopes.transpose(0, 2, 1)


@dataclass(frozen=True, slots=True)
class Tie:
    """Which coordinates are free: points = free @ matrix.T + offset.

    `matrix` is [5, k]. The offset holds what the free ones do not set.
    """

    name: str
    matrix: Array

    @property
    def n_free(self) -> int:
        return int(self.matrix.shape[1])


FREE = Tie("none", np.eye(5))
#: alpha / beta is given by the offset.
RATIO_GIVEN = Tie("ratio", np.vstack([np.eye(4), [0.0, 0.0, 0.0, 1.0]]))
#: alpha and beta are both given by the offset.
EXPONENTS_GIVEN = Tie("exponents", np.vstack([np.eye(3), np.zeros((2, 3))]))


class Minimum(NamedTuple):
    """Where S fits ended: all five coordinates [S, 5], objective [S], the largest
    component of the gradient in the free coordinates [S], converged or not [S].
    """

    points: Array
    value: Array
    slope: Array
    converged: NDArray[np.bool_]


def minimise(surface: Surface, start: Array, tie: Tie = FREE) -> Minimum:
    """Descend from each row of `start` [S, 5] to a local minimum, all at once.

    A damped Newton method with the exact Hessian. The damping is the curvature of
    the quadratic that touches the Huber loss from above: heavily damped, a step is one of
    iteratively reweighted least squares, which always descends; undamped, it
    converges quadratically. Rows of `start` outside the tie keep their offset.
    """
    rows = len(start)
    width = max(1, SLICE_CELLS // len(surface.log_params))
    slices = [np.arange(i, min(i + width, rows)) for i in range(0, rows, width)]
    parts = [_descend(surface.rows(chosen), start[chosen], tie) for chosen in slices]
    return Minimum(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _descend(surface: Surface, start: Array, tie: Tie) -> Minimum:
    """`minimise` on one slice. `active` numbers the fits that still move."""
    points, damping = start.copy(), np.ones(len(start))
    value, slope = np.full(len(start), np.inf), np.full(len(start), np.inf)
    active = np.arange(len(start))
    for _ in range(MOST_STEPS):
        here = surface.rows(active)
        at = here.derivatives(points[active])
        gradient = at.gradient @ tie.matrix
        value[active], slope[active] = at.value, np.max(np.abs(gradient), axis=1)
        step, gain = _newton_step(at, gradient, damping[active], tie)
        moving = gain > SMALLEST_GAIN * at.value + SMALLEST_FALL * surface.delta**2
        if not moving.any():
            return Minimum(points, value, slope, _all_but(len(start), active[moving]))
        moved = points[active] + step
        better = moving & (here.value(moved) < at.value)
        points[active[better]] = moved[better]
        damping[active] *= np.where(better, 0.2, 6.0)
        np.clip(damping, 1e-12, 1e12, out=damping)
        active = active[moving]
    return Minimum(points, value, slope, _all_but(len(start), active))


def _all_but(rows: int, left_out: NDArray[np.intp]) -> NDArray[np.bool_]:
    kept = np.ones(rows, dtype=bool)
    kept[left_out] = False
    return kept


def _newton_step(at: Derivatives, gradient: Array, damping: Array, tie: Tie) -> tuple[Array, Array]:
    """The damped step in all five coordinates [S, 5], and the fall it promises [S]."""
    hessian = tie.matrix.T @ at.hessian @ tie.matrix
    curvature = tie.matrix.T @ at.curvature @ tie.matrix
    values, axes = np.linalg.eigh(hessian + damping[:, None, None] * curvature)
    least = 1e-14 * np.max(np.abs(values), axis=1, keepdims=True) + 1e-300
    bends = np.maximum(np.abs(values), least)
    along = (axes.transpose(0, 2, 1) @ gradient[:, :, None])[:, :, 0]
    step = -(axes @ (along / bends)[:, :, None])[:, :, 0] @ tie.matrix.T
    longest = np.max(np.abs(step), axis=1, keepdims=True)
    step *= np.minimum(1.0, LONGEST_STEP / np.maximum(longest, 1e-300))
    return step, 0.5 * np.sum(along**2 / bends, axis=1)
