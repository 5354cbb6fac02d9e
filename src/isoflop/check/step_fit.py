"""Fit the uncertain numbers of a step to measured steps, starting from what was believed.

Each number moves along its prior's own scale: z = 0 is its middle, z = 1.645 the end of its
90 % range. The likeliest numbers under both, rows with heavy tails; what the rows do
not identify stays at its prior. Ranges are those of the normal approximation at the minimum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from isoflop.arch import Experts
from isoflop.hardware.fitted import PRIORS, SOURCE, Beliefs
from isoflop.plan.setting import Setting
from isoflop.plan.step import step_time
from isoflop.quantity import Symbol
from isoflop.quantity.basis import NORMAL_90
from isoflop.quantity.compile import compile_expressions

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
Array = NDArray[np.float64]


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


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A step's seconds over the numbers that move."""

    run: Callable[..., tuple[Any, ...]]
    numbers: Mapping[str, Symbol]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.numbers)


@lru_cache(maxsize=4096)
def _compiled(setting: Setting, beliefs: Beliefs, moved: Callable[[str], bool]) -> _Compiled:
    formula = step_time(setting, beliefs).total
    found = {n: s for n, s in formula.symbols().items() if s.spread and moved(n)}
    return _Compiled(compile_expressions([formula], list(found)), found)


class Problem:
    """Rows compiled over the numbers that a fit moves, priors beside them."""

    def __init__(
        self,
        rows: Sequence[Row],
        beliefs: Beliefs = PRIORS,
        moved: Callable[[str], bool] | None = None,
    ) -> None:
        self.rows = tuple(rows)
        self.beliefs = beliefs
        self.moved = moves if moved is None else moved
        self.compiled = [_compiled(row.setting, beliefs, self.moved) for row in self.rows]
        self.priors = {n: s for c in self.compiled for n, s in c.numbers.items()}

    def seconds(self, values: Mapping[str, float], which: Sequence[int]) -> Array:
        chosen = (self.compiled[i] for i in which)
        return np.array([float(c.run(*(values[n] for n in c.names))[0]) for c in chosen])

    def names(self, which: Sequence[int]) -> list[str]:
        return sorted({n for i in which for n in self.compiled[i].names})

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


def fit(problem: Problem, which: Sequence[int] | None = None, tail: float = TAIL) -> Fitted:
    """The numbers that best explain the rows `which` (all where None).

    `tail`: degrees of freedom of a row's error.
    """
    which = range(len(problem.rows)) if which is None else which
    rows = [problem.rows[i] for i in which]
    names, measured = problem.names(which), np.log([row.seconds for row in rows])
    spread = np.array([SPREAD[row.sparse] for row in rows])
    weight = _weights(rows)

    def residuals(z: Array) -> Array:
        values = problem.values(dict(zip(names, z, strict=True)))
        off = (np.log(problem.seconds(values, which)) - measured) / spread
        far = np.sign(off) * np.sqrt((tail + 1) * np.log1p(off**2 / tail))
        return np.concatenate([weight * far, z])

    found = least_squares(residuals, np.zeros(len(names)), max_nfev=60)
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
