"""Fit the uncertain numbers of a step to measured steps, starting from what was believed.

Each number moves along its prior's own scale: z = 0 is its middle, z = 1.645 the end of its
90 % range. The likeliest numbers under both, rows with heavy tails; what the rows do
not identify stays at its prior. Ranges are those of the normal approximation at the minimum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from isoflop.arch import Experts
from isoflop.check.step_formula import Array, formula_of
from isoflop.hardware.fitted import PRIORS, SOURCE, Beliefs
from isoflop.plan.step.setting import Setting
from isoflop.quantity import Symbol
from isoflop.quantity.basis import NORMAL_90

#: What rows may move: the rest is left at benchmarks of its own, or no row identifies it.
MOVED = ("share_", "serial_", "residual_", "seconds_host_experts_", "share_sorting_")
KEPT = ("share_elementwise_",)
#: Spread of single rows about a good model, in logarithms: neighbouring releases of one
#: trainer differ by 1 to 4 % on dense models and by about 10 % on experts.
SPREAD = {False: 0.05, True: 0.10}
#: Degrees of freedom of a row's error (Student's t): a single odd row moves nothing.
TAIL = 4
#: As good as a normal distribution: steps of one hand that are all slow are no odd rows.
NORMAL = 1e6
#: Share of the rows whose distance from the fit is the range of a single step; the constants'
#: own ranges come on top.
COVERED = 0.85
#: Rows of one source, chip and format after which more of them do not count more: their
#: errors are alike.
ALIKE = 12
#: Shares of what cannot be exceeded.
MOST = {"share_matmul_": 1.0, "share_shown_": 1.0}


@dataclass(frozen=True, slots=True)
class Row:
    """A measured step: its setting, its seconds and the source that published it."""

    setting: Setting
    seconds: float
    family: str

    @property
    def sparse(self) -> bool:
        return any(isinstance(k.feed_forward, Experts) for k in self.setting.arch.kinds.values())

    @property
    def group(self) -> tuple[str, str, str, bool]:
        chip = self.setting.cluster.chip.name
        return self.family, chip, self.setting.compute, self.sparse


@dataclass(frozen=True, slots=True)
class Fitted:
    """The outcome of a fit.

    `moved` says by how many standard deviations of its prior each number went, `told` what
    share of its prior's variance the rows took away: near 0, they did not identify it.
    """

    beliefs: Beliefs
    moved: Mapping[str, float]
    told: Mapping[str, float]
    errors: tuple[float, ...]


class Problem:
    """Measured steps as formulas over the numbers that a fit moves, priors beside them."""

    def __init__(
        self,
        rows: Sequence[Row],
        beliefs: Beliefs = PRIORS,
        moved: Callable[[str], bool] | None = None,
    ) -> None:
        self.rows = tuple(rows)
        self.beliefs = beliefs
        self.moved = moves if moved is None else moved
        self.formulas = [formula_of(row.setting) for row in self.rows]
        symbols = [formula.symbols(beliefs) for formula in self.formulas]
        self.priors = {n: s for own in symbols for n, s in own.items() if self.moved(n)}
        # By row, for a link's latency is another number on another chip.
        self.fixed = [
            {n: float(s.value) for n, s in own.items() if n not in self.priors} for own in symbols
        ]

    def seconds(self, values: Mapping[str, float], which: Sequence[int]) -> Array:
        """Predicted seconds of the rows `which`."""
        return np.array(
            [float(self.formulas[i].seconds({**self.fixed[i], **values})) for i in which]
        )

    def slopes(
        self, names: Sequence[str], z: Array, which: Sequence[int], step: float = 1e-6
    ) -> Array:
        """Derivatives of the logarithm of seconds by each number's z, a row per step."""
        here = [at(self.priors[name], x) for name, x in zip(names, z, strict=True)]
        there = [at(self.priors[name], x + step) for name, x in zip(names, z, strict=True)]
        out = np.zeros((len(which), len(names)))
        columns = {name: i for i, name in enumerate(names)}
        known = dict(zip(names, here, strict=True))
        for row, i in enumerate(which):
            own = [n for n in self.formulas[i].names if n in columns]
            values: dict[str, float | Array] = {**self.fixed[i], **known}
            for k, name in enumerate(own, start=1):
                moved = np.full(len(own) + 1, here[columns[name]])
                moved[k] = there[columns[name]]
                values[name] = moved
            logs = np.log(self.formulas[i].seconds(values))
            if own:
                out[row, [columns[n] for n in own]] = (logs[1:] - logs[0]) / step
        return out

    def names(self, which: Sequence[int]) -> list[str]:
        return sorted({n for i in which for n in self.formulas[i].names if n in self.priors})

    def values(self, z: Mapping[str, float]) -> dict[str, float]:
        return {name: at(s, z.get(name, 0.0)) for name, s in self.priors.items()}


def moves(name: str) -> bool:
    """Whether a fit moves the number of this name.

    >>> moves("share_link"), moves("seconds_call")
    (True, False)
    """
    return name.startswith(MOVED) and not name.startswith(KEPT)


def at(symbol: Symbol, z: float) -> float:
    """The value z standard deviations along a number's prior."""
    assert symbol.spread is not None
    assert symbol.given is not None
    value = symbol.spread.quantile(float(symbol.given), z)
    most = next((m for prefix, m in MOST.items() if symbol.name.startswith(prefix)), None)
    return value if most is None else min(value, most)


def fit(
    problem: Problem,
    which: Sequence[int] | None = None,
    tail: float = TAIL,
    nearer: float = 1.0,
) -> Fitted:
    """The numbers that best explain the rows `which` (all where None).

    `tail`: degrees of freedom of a row's error; `nearer`: its spread over `SPREAD`.
    """
    which = range(len(problem.rows)) if which is None else which
    rows = [problem.rows[i] for i in which]
    names, measured = problem.names(which), np.log([row.seconds for row in rows])
    spread = nearer * np.array([SPREAD[row.sparse] for row in rows])
    weight = _weights(rows)

    def distances(z: Array) -> Array:
        values = problem.values(dict(zip(names, z, strict=True)))
        away: Array = (np.log(problem.seconds(values, which)) - measured) / spread
        return away

    def residuals(z: Array) -> Array:
        return np.concatenate([weight * robust(distances(z), tail), z])

    def jacobian(z: Array) -> Array:
        outer = weight * robust_slope(distances(z), tail) / spread
        return np.vstack([outer[:, None] * problem.slopes(names, z, which), np.eye(len(names))])

    found = least_squares(residuals, np.zeros(len(names)), jacobian, max_nfev=60)
    deviation = np.sqrt(np.diag(np.linalg.inv(found.jac.T @ found.jac)))
    deviation = np.minimum(deviation, 1.0)
    z = dict(zip(names, found.x, strict=True))
    off = np.log(problem.seconds(problem.values(z), which)) - measured
    posterior = {
        name: _range(problem.priors[name], float(x), float(d))
        for name, x, d in zip(names, found.x, deviation, strict=True)
    }
    posterior |= _errors(rows, off)
    return Fitted(
        Beliefs({**problem.beliefs.posterior, **posterior}, SOURCE),
        {n: float(x) for n, x in z.items()},
        {n: float(1 - d**2) for n, d in zip(names, deviation, strict=True)},
        tuple(map(float, np.expm1(off))),
    )


def robust(off: Array, tail: float) -> Array:
    """A residual whose square is twice what Student's t takes off the likelihood."""
    grown: Array = np.sign(off) * np.sqrt((tail + 1) * np.log1p(off**2 / tail))
    return grown


def robust_slope(off: Array, tail: float) -> Array:
    """The derivative of `robust`."""
    grown = np.abs(robust(off, tail))
    near = np.abs(off) < 1e-6
    slope: Array = (tail + 1) * np.abs(off) / (tail + off**2) / np.where(near, 1.0, grown)
    return np.where(near, np.sqrt((tail + 1) / tail), slope)


def _weights(rows: Sequence[Row]) -> Array:
    counts = Counter(row.group for row in rows)
    return np.array([min(1.0, ALIKE / counts[row.group]) ** 0.5 for row in rows])


def _range(prior: Symbol, z: float, deviation: float) -> tuple[float, float, float]:
    middle = at(prior, z)
    low, high = (at(prior, z + side * NORMAL_90 * deviation) for side in (-1, 1))
    return middle, min(low, middle), max(high, middle)


def _errors(rows: Sequence[Row], off: Array) -> dict[str, tuple[float, float, float]]:
    """How far single rows lie from the fit, for dense models and for experts."""
    out = {}
    for name, sparse in (("error_of_model", False), ("error_of_experts", True)):
        chosen = np.array([row.sparse is sparse for row in rows])
        if chosen.sum() >= ALIKE:
            wide = float(np.quantile(np.abs(off[chosen]), COVERED))
            out[name] = (1.0, float(np.exp(-wide)), float(np.exp(wide)))
    return out
