"""`fit`: from runs to a law with everything the fit does not know."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from isoflop.errors import InputError, Problem
from isoflop.laws.fit.choose import (
    EXPONENT_SPREAD,
    RATIO_SPREAD,
    Chosen,
    choose,
    start_grid,
    tied_points,
    unknown,
)
from isoflop.laws.fit.minimise import EXPONENTS_GIVEN, FREE, RATIO_GIVEN, Array, Surface, minimise
from isoflop.laws.fit.result import Centre, Dropped, FitResult
from isoflop.laws.form import FLOPS_PER_PARAM_TOKEN, Law
from isoflop.laws.table import shown

#: One more than the fewest free parameters, so that the scatter can be judged at all.
FEWEST_RUNS = EXPONENTS_GIVEN.n_free + 1
#: From this many runs on they are resampled themselves; below, their scatter is.
FEWEST_FOR_PAIRS = 50
#: A start agrees when its objective is within this share of the best one.
AGREEMENT = 1e-3
#: bootstrap x runs: the memory of the resampling weights, 160 MB.
MOST_CELLS = 20_000_000
#: log N and log D nearer to one line than this cannot be told apart.
LARGEST_CORRELATION = 0.9999


def fit(
    params: ArrayLike,
    tokens: ArrayLike,
    loss: ArrayLike,
    *,
    delta: float = 1e-3,
    starts: Sequence[Law] | None = None,
    bootstrap: int = 0,
    seed: int = 0,
    drop_worst: int = 0,
) -> FitResult:
    """Fit L = E + A / N^alpha + B / D^beta to runs; see `minimise` for the objective.

    Args:
        params, tokens, loss: one entry per run, all above 0. An exact copy of an earlier run is
            dropped; several losses at one size are kept, they show the noise.
        delta: width of the Huber loss in log loss; a large one (1.0) is least squares.
        starts: laws to start from; None is a grid of 108.
        bootstrap: resamples behind the intervals; 0 gives no intervals.
        seed: of the resampling; one seed gives one result.
        drop_worst: leave out that many of the highest losses.

    Raises:
        InputError: runs that are too few, not numbers above 0, all of one size or one token
            count, or on one line of log N and log D; an option out of range.

    >>> law = Law(A=5.0, B=60.0, E=1.2, alpha=0.35, beta=0.4)
    >>> sizes = [(n, d) for n in (1e4, 1e5, 1e6) for d in (1e5, 1e6, 1e7)]
    >>> runs = [(n, d, law.loss(n, d)) for n, d in sizes]
    >>> result = fit(*zip(*runs))
    >>> round(result.law.alpha, 6), round(result.law.E, 6), result.tied
    (0.35, 1.2, 'none')
    """
    _check_options(delta=delta, bootstrap=bootstrap, seed=seed, drop_worst=drop_worst)
    runs, dropped = _kept(_columns(params, tokens, loss), drop_worst)
    _check_runs(runs, bootstrap)
    logs = np.log(runs)
    centre = Centre(float(np.mean(logs[:, 0])), float(np.mean(logs[:, 1])))
    surface = Surface(
        logs[:, 0] - centre.log_params,
        logs[:, 1] - centre.log_tokens,
        logs[:, 2],
        np.ones(len(runs)),
        delta,
    )
    grid = start_grid(logs[:, 2]) if starts is None else centre.points(_some(starts))
    chosen = choose(surface, grid)
    draws, noise = _resample(surface, chosen, bootstrap, np.random.default_rng(seed))
    return _result(
        surface,
        chosen,
        runs=runs,
        dropped=dropped,
        centre=centre,
        draws=draws,
        noise=noise,
        seed=seed,
    )


def _result(
    surface: Surface,
    chosen: Chosen,
    *,
    runs: Array,
    dropped: tuple[Dropped, ...],
    centre: Centre,
    draws: Array,
    noise: Array,
    seed: int,
) -> FitResult:
    values, best = chosen.minima.value, chosen.best
    near = values[best] * (1 + AGREEMENT) + 1e-12 * surface.delta**2
    residuals = _residuals(surface, chosen)
    span = [(float(np.min(column)), float(np.max(column))) for column in _sizes(runs).T]
    return FitResult(
        law=centre.law(chosen.point, f"fit of {len(runs)} runs"),
        objective=float(values[best]),
        delta=surface.delta,
        slope=float(chosen.minima.slope[best]),
        converged=bool(chosen.minima.converged[best]),
        starts_tried=len(values),
        starts_agreeing=int(np.sum(chosen.minima.converged & (values <= near))),
        tied=chosen.tie.name,
        tied_reason=chosen.reason,
        condition=chosen.condition,
        identifiable=_verdict(chosen),
        n_points=len(runs),
        dropped=dropped,
        params_span=span[0],
        tokens_span=span[1],
        flops_span=span[2],
        rms_log_residual=float(np.sqrt(np.mean(residuals**2))),
        rms_left_out=float(np.sqrt(np.mean(_left_out(surface, chosen) ** 2))),
        resampling=("runs" if len(runs) >= FEWEST_FOR_PAIRS else "scatter")
        if len(draws)
        else "none",
        seed=seed,
        centre=centre,
        points=draws,
        noise=noise,
    )


def _resample(
    surface: Surface, chosen: Chosen, bootstrap: int, stream: np.random.Generator
) -> tuple[Array, Array]:
    """Coordinates [bootstrap, 5] refitted to resamples, and one run's noise [bootstrap] for each.

    With many runs the runs themselves are drawn with replacement, and the noise is drawn
    from their leave-one-out residuals. With few, new losses are drawn around the fit:
    normal, with a standard deviation that is itself drawn as s sqrt(nu / chi^2_nu),
    nu = n - k, which makes a prediction Student's t with nu degrees of freedom.
    What the tie gives is drawn from the spread of published laws.
    """
    n_runs = len(surface.log_loss)
    begin = np.repeat(chosen.point[None], bootstrap, axis=0)
    if not bootstrap:
        return begin, np.zeros(0)
    if n_runs >= FEWEST_FOR_PAIRS:
        noise = stream.choice(_left_out(surface, chosen), size=bootstrap)
        counts = stream.multinomial(n_runs, np.full(n_runs, 1 / n_runs), size=bootstrap)
        drawn = replace(surface, weights=counts.astype(np.float64))
    else:
        freedom = n_runs - chosen.tie.n_free
        squares = float(np.sum(_residuals(surface, chosen) ** 2))
        scale = np.sqrt(squares / stream.chisquare(freedom, bootstrap))
        scatter = scale[:, None] * stream.standard_normal((bootstrap, n_runs))
        noise = scale * stream.standard_normal(bootstrap)
        drawn = replace(surface, log_loss=surface.predicted(chosen.point[None]) + scatter)
    log_ratio = RATIO_SPREAD * stream.standard_normal(bootstrap)
    log_alpha = chosen.point[3] + EXPONENT_SPREAD * stream.standard_normal(bootstrap)
    begin = tied_points(begin, chosen.tie, log_ratio, log_alpha)
    return minimise(drawn, begin, chosen.tie).points, noise


def _residuals(surface: Surface, chosen: Chosen) -> Array:
    """Measured less fitted log loss, [n]."""
    fitted: Array = surface.predicted(chosen.point[None])[0]
    return surface.log_loss - fitted


def _left_out(surface: Surface, chosen: Chosen) -> Array:
    """Measured less predicted log loss of each run by a fit of the others, [n].

    Refitted where runs are few; where they are many, residual / (1 - leverage).
    """
    n_runs = len(surface.log_loss)
    if n_runs < FEWEST_FOR_PAIRS:
        others = replace(surface, weights=1.0 - np.eye(n_runs))
        begin = np.repeat(chosen.point[None], n_runs, axis=0)
        points = minimise(others, begin, chosen.tie).points
        return surface.log_loss - np.diag(surface.predicted(points))
    slopes = chosen.tie.matrix.T @ surface.slopes(chosen.point[None])[0]
    basis = np.linalg.qr(slopes.T)[0]
    leverage = np.sum(basis**2, axis=1)
    left_out: Array = _residuals(surface, chosen) / np.maximum(1 - leverage, 1 / n_runs)
    return left_out


def _verdict(chosen: Chosen) -> str:
    parts = {
        FREE.name: [],
        RATIO_GIVEN.name: ["beta / alpha is not identified and was tied to 1"],
        EXPONENTS_GIVEN.name: [
            "alpha and beta are not identified and were taken from published laws"
        ],
    }[chosen.tie.name]
    for name, error in unknown(chosen):
        size = f"a standard error of {error:.0%}" if math.isfinite(error) else "no finite error"
        parts.append(f"{name} is not identified: {size}")
    return "; ".join(parts) or "all five parameters are identified"


def _columns(params: ArrayLike, tokens: ArrayLike, loss: ArrayLike) -> Array:
    """The three columns as one array [n, 3] of numbers above 0."""
    given = {"params": params, "tokens": tokens, "loss": loss}
    try:
        columns = {name: np.asarray(column, dtype=np.float64) for name, column in given.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise _refusal("runs", "a column", "holds only numbers", str(error)) from None
    shapes = {name: column.shape for name, column in columns.items()}
    if len(set(shapes.values())) > 1 or columns["loss"].ndim != 1:
        raise _refusal("runs", shapes, "are three flat columns of one length")
    problems = [
        Problem(f"{name}[{row}]", float(column[row]), "is a number above 0 and below 1e40")
        for name, column in columns.items()
        for row in np.flatnonzero(~((column > 0) & (column < 1e40)))
    ]
    if problems:
        raise InputError("runs", shown(problems))
    return np.stack(list(columns.values()), axis=1)


def _kept(runs: Array, drop_worst: int) -> tuple[Array, tuple[Dropped, ...]]:
    """The runs that are fitted, and why each of the others is not."""
    first = np.sort(np.unique(runs, axis=0, return_index=True)[1])
    reasons = dict.fromkeys(set(range(len(runs))) - set(first.tolist()), "a copy of an earlier run")
    worst = first[np.argsort(-runs[first, 2], kind="stable")[:drop_worst]]
    reasons |= dict.fromkeys(worst.tolist(), f"one of the {drop_worst} highest losses")
    kept = [row for row in range(len(runs)) if row not in reasons]
    dropped = tuple(
        Dropped(row, float(runs[row, 0]), float(runs[row, 1]), float(runs[row, 2]), reasons[row])
        for row in sorted(reasons)
    )
    return runs[kept], dropped


def _sizes(runs: Array) -> Array:
    """N, D and training FLOPs of each run, [n, 3]."""
    flops = FLOPS_PER_PARAM_TOKEN * runs[:, 0] * runs[:, 1]
    return np.column_stack([runs[:, :2], flops])


def _check_runs(runs: Array, bootstrap: int) -> None:
    """Refuse runs that cannot hold a fit at all."""
    distinct = np.unique(runs[:, :2], axis=0)
    problems = [
        Problem(name, float(runs[0, column]), "takes at least two values over the runs")
        for column, name in enumerate(("params", "tokens"))
        if len(runs) and np.ptp(runs[:, column]) == 0
    ]
    if len(distinct) < FEWEST_RUNS:
        hint = "3 parameters are free at least, and one run must be left to judge the scatter"
        rule = f"is at least {FEWEST_RUNS} runs of different size or tokens"
        problems.append(Problem("n_points", len(distinct), rule, hint))
    if problems:
        raise InputError("fit", problems)
    slant = abs(float(np.corrcoef(np.log(distinct).T)[0, 1]))
    if slant > LARGEST_CORRELATION:
        hint = "add a run of one of these sizes on other tokens"
        raise _refusal("tokens", "one power of params", "varies apart from params", hint)
    if bootstrap * len(runs) > MOST_CELLS:
        raise _refusal("bootstrap", bootstrap, f"times {len(runs)} runs is at most {MOST_CELLS:,}")


def _check_options(*, delta: float, bootstrap: int, seed: int, drop_worst: int) -> None:
    problems = [
        Problem(name, value, "is a whole number of at least 0")
        for name, value in (("bootstrap", bootstrap), ("seed", seed), ("drop_worst", drop_worst))
        if isinstance(value, bool) or not isinstance(value, int) or value < 0
    ]
    if not 1e-6 <= delta <= 1e3:
        problems.append(Problem("delta", delta, "lies from 1e-6 to 1e3"))
    if problems:
        raise InputError("fit", problems)


def _some(starts: Sequence[Law]) -> Sequence[Law]:
    if not starts:
        raise _refusal("starts", "none", "holds at least one law")
    return starts


def _refusal(field: str, value: object, rule: str, hint: str = "") -> InputError:
    return InputError("fit", [Problem(field, value, rule, hint)])
