"""What a fit knows and what it does not, and predictions that carry both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np

from isoflop.errors import InputError, Problem
from isoflop.laws.fit.minimise import Array, Surface
from isoflop.laws.form import (
    FLOPS_PER_PARAM_TOKEN,
    LARGEST_LOG,
    PARAMETERS,
    Allocation,
    Law,
    require,
)
from isoflop.quantity import Interval

#: Fewer draws than this do not hold a 90 % interval's ends.
FEWEST_DRAWS = 40
NO_DRAWS = f"no interval: fit with bootstrap of at least {FEWEST_DRAWS}"


@dataclass(frozen=True, slots=True)
class Dropped:
    """A run that was not fitted, by its place among those given, and why."""

    row: int
    params: float
    tokens: float
    loss: float
    reason: str


@dataclass(frozen=True, slots=True)
class Centre:
    """The runs' mean log N and log D, about which the fit's coordinates are taken."""

    log_params: float
    log_tokens: float

    def table(self, points: Array) -> Array:
        """(A, B, E, alpha, beta) of each point, [S, 5]; terms past e^690 read e^690."""
        alpha, beta = np.exp(points[:, 3]), np.exp(points[:, 4])
        logs = [points[:, 0] + alpha * self.log_params, points[:, 1] + beta * self.log_tokens]
        terms = [np.exp(np.minimum(log, LARGEST_LOG)) for log in (*logs, points[:, 2])]
        return np.column_stack([*terms, alpha, beta])

    def law(self, point: Array, name: str) -> Law:
        A, B, E, alpha, beta = (float(x) for x in self.table(point[None])[0])
        return Law(
            A, B, E, alpha, beta, name, source="isoflop.laws.fit", params_convention="unstated"
        )

    def points(self, laws: Sequence[Law]) -> Array:
        """The five coordinates of each law, [S, 5]."""
        return np.array([
            [
                math.log(law.A) - law.alpha * self.log_params,
                math.log(law.B) - law.beta * self.log_tokens,
                *(math.log(x) for x in (law.E, law.alpha, law.beta)),
            ]
            for law in laws
        ])  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prediction:
    """A predicted loss.

    Attributes:
        interval: holds one new run's loss; None where `interval_reason` says why.
        extrapolation_params, _tokens, _flops: how many times outside the span of the
            fitted runs, 1 inside it.
    """

    params: float
    tokens: float
    loss: float
    interval: Interval | None
    interval_reason: str
    extrapolation_params: float
    extrapolation_tokens: float
    extrapolation_flops: float

    def to_json(self) -> dict[str, object]:
        interval = self.interval.to_json() if self.interval else None
        names = self.__dataclass_fields__
        return {name: getattr(self, name) for name in names} | {"interval": interval}


@dataclass(frozen=True, slots=True)
class Optimum:
    """The compute-optimal split under a fit. The intervals hold the law's uncertainty alone:
    where the optimum lies, not what one run there would measure.
    """

    flops: float
    allocation: Allocation
    params: Interval | None
    tokens: Interval | None
    loss: Interval | None
    interval_reason: str
    extrapolation_flops: float

    def to_json(self) -> dict[str, object]:
        spans = {"params": self.params, "tokens": self.tokens, "loss": self.loss}
        return {
            "flops": self.flops,
            **self.allocation.to_json(),
            "intervals": {name: span and span.to_json() for name, span in spans.items()},
            "interval_reason": self.interval_reason,
            "extrapolation_flops": self.extrapolation_flops,
        }


@dataclass(frozen=True, slots=True, eq=False)
class FitResult:
    """A fitted law and its confession. Every field is always present.

    Attributes:
        objective: the sum of Huber losses at the optimum.
        slope: the largest component of the objective's gradient there, in the logs of the
            terms and exponents.
        starts_agreeing: starts that converged to within 0.1 % of the best objective.
        tied: which parameters were given: "none", "ratio" (beta / alpha) or "exponents".
        tied_reason: why.
        condition: condition number of the least-squares normal matrix, scaled to unit diagonal.
        identifiable: what these runs cannot tell, in words.
        dropped: runs left out, each with its reason.
        rms_log_residual, rms_left_out: of log loss, by the fit and by fits of the other runs.
        resampling: what the draws resampled: "runs", "scatter" around the fit, or "none".
        points, noise: the draws, in the fit's coordinates [S, 5], and one run's noise [S].
    """

    law: Law
    objective: float
    delta: float
    slope: float
    converged: bool
    starts_tried: int
    starts_agreeing: int
    tied: str
    tied_reason: str
    condition: float
    identifiable: str
    n_points: int
    dropped: tuple[Dropped, ...]
    params_span: tuple[float, float]
    tokens_span: tuple[float, float]
    flops_span: tuple[float, float]
    rms_log_residual: float
    rms_left_out: float
    resampling: Literal["runs", "scatter", "none"]
    seed: int
    centre: Centre = field(repr=False)
    points: Array = field(repr=False)
    noise: Array = field(repr=False)

    @property
    def draws(self) -> Array:
        """(A, B, E, alpha, beta) of each resample, [S, 5]."""
        return self.centre.table(self.points)

    @property
    def intervals(self) -> dict[str, Interval | None]:
        """Each parameter's 90 % percentile interval; None where there are too few draws."""
        if not self._enough:
            return dict.fromkeys(PARAMETERS)
        columns = zip(PARAMETERS, self.draws.T, strict=True)
        return {name: _percentiles(column, 0.9) for name, column in columns}

    @property
    def intervals_reason(self) -> str:
        return "" if self._enough else NO_DRAWS

    @property
    def _enough(self) -> bool:
        return len(self.points) >= FEWEST_DRAWS

    def predict(self, params: float, tokens: float, level: float = 0.9) -> Prediction:
        """The loss of a run, with an interval that holds one new run's measured loss.

        The interval joins the law's uncertainty (the draws) and the noise from run to run.
        """
        require("predict", params=params, tokens=tokens)
        _check_level(level)
        interval = None
        if self._enough:
            log_loss = self._log_losses(np.log([params]), np.log([tokens])) + self.noise
            interval = _percentiles(np.exp(log_loss), level)
        return Prediction(
            params=params,
            tokens=tokens,
            loss=self.law.loss(params, tokens),
            interval=interval,
            interval_reason=self.intervals_reason,
            extrapolation_params=_outside(params, self.params_span),
            extrapolation_tokens=_outside(tokens, self.tokens_span),
            extrapolation_flops=_outside(FLOPS_PER_PARAM_TOKEN * params * tokens, self.flops_span),
        )

    def optimum(self, flops: float, level: float = 0.9) -> Optimum:
        """The compute-optimal split of a training budget, with intervals."""
        _check_level(level)
        allocation = self.law.optimum(flops)
        spans: tuple[Interval | None, Interval | None, Interval | None] = (None, None, None)
        if self._enough:
            log_product = math.log(flops / FLOPS_PER_PARAM_TOKEN)
            log_params = self._log_optima(log_product)
            log_tokens = log_product - log_params
            logs = (log_params, log_tokens, self._log_losses(log_params, log_tokens))
            capped = (np.exp(np.clip(x, -LARGEST_LOG, LARGEST_LOG)) for x in logs)
            sizes, amounts, losses = (_percentiles(x, level) for x in capped)
            spans = (sizes, amounts, losses)
        return Optimum(
            flops, allocation, *spans, self.intervals_reason, _outside(flops, self.flops_span)
        )

    def _log_optima(self, log_product: float) -> Array:
        """log N* of each draw: `Law.optimum` in the fit's coordinates, where no term overflows."""
        alpha, beta = np.exp(self.points[:, 3]), np.exp(self.points[:, 4])
        log_tilt = self.points[:, 0] + self.points[:, 3] - self.points[:, 1] - self.points[:, 4]
        at_centre = log_product - self.centre.log_params - self.centre.log_tokens
        log_params: Array = self.centre.log_params + (log_tilt + beta * at_centre) / (alpha + beta)
        return log_params

    def _log_losses(self, log_params: Array, log_tokens: Array) -> Array:
        """Log loss under each draw, [S]; sizes are one for all or one per draw."""
        surface = Surface(
            (log_params - self.centre.log_params)[:, None],
            (log_tokens - self.centre.log_tokens)[:, None],
            np.zeros(1), np.ones(1), 1.0,
        )  # fmt: skip
        return surface.predicted(self.points)[:, 0]

    def to_json(self) -> dict[str, object]:
        spans = {name: span and span.to_json() for name, span in self.intervals.items()}
        hidden = ("centre", "points", "noise", "law", "dropped")
        plain = {n: getattr(self, n) for n in self.__dataclass_fields__ if n not in hidden}
        return {
            "law": self.law.to_json(),
            "intervals": spans,
            "intervals_reason": self.intervals_reason,
            "bootstrap": len(self.points),
            "dropped": [asdict(run) for run in self.dropped],
            **plain,
            "condition": self.condition if math.isfinite(self.condition) else None,
        }


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError("interval", [Problem("level", level, "lies between 0 and 1")])


def _percentiles(draws: Array, level: float) -> Interval:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level)


def _outside(value: float, span: tuple[float, float]) -> float:
    """How many times past the nearer end of `span`; 1 inside."""
    return max(1.0, value / span[1], span[0] / value)
