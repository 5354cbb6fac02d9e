"""The seconds of one step as a function of the uncertain numbers in it, compiled once.

`step_time` prints and explains; this is the same formula over arrays, for fits and for
judging hundreds of measured steps, each under many values of the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isoflop.hardware.fitted import PRIORS, Beliefs
from isoflop.plan.search.formula import compiled
from isoflop.plan.step.seconds import step_time
from isoflop.plan.step.setting import Setting
from isoflop.quantity import Interval, Symbol
from isoflop.quantity.draws import middle_90

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Predicted:
    """Seconds of a step and their 90 % range; what a Node of them says.

    `widths` are the squared half-widths, in logarithms, that each number alone would make;
    `known` says whether steps of this trainer's software were among those that were read.
    """

    value: float
    interval: Interval | None
    widths: tuple[tuple[str, float], ...] = ()
    known: bool | None = None


@dataclass(frozen=True, slots=True)
class StepFormula:
    """`run` gives seconds from the numbers in `priors`, in their order."""

    run: Callable[..., Any]
    priors: tuple[Symbol, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(symbol.name for symbol in self.priors)

    def seconds(self, values: Mapping[str, float | Array]) -> Array:
        """Seconds where the numbers have these values."""
        return np.asarray(self.run(*(values[name] for name in self.names))[0], dtype=float)

    def symbols(self, beliefs: Beliefs) -> dict[str, Symbol]:
        """The numbers as they are believed to be."""
        return {prior.name: believed(prior, beliefs) for prior in self.priors}

    def predict(self, beliefs: Beliefs) -> Predicted:
        """What `step_time` under these beliefs says.

        >>> from isoflop.arch import gpt
        >>> from isoflop.hardware import parse_cluster
        >>> from isoflop.plan import Layout
        >>> small = gpt("s", d_model=768, n_layers=12, n_heads=12, vocab_size=50304, max_seq_len=1024)
        >>> one = Setting(small, parse_cluster("8xh100-sxm"), Layout(dp=8, micro_batch=8), 1024, 512)
        >>> node = step_time(one, PRIORS)
        >>> round(formula_of(one).predict(PRIORS).interval.low / node.interval.low, 9)
        1.0
        """
        symbols = self.symbols(beliefs)
        value = float(self.seconds({n: float(s.value) for n, s in symbols.items()}))
        drawn = self.seconds({n: draws_of(s) for n, s in symbols.items()})
        known = any(name.startswith("residual_") for name in symbols.keys() & beliefs.posterior)
        range_ = middle_90(np.sort(drawn).tolist())
        return Predicted(value, range_, tuple(self.widths(symbols)), known)

    def widths(self, symbols: Mapping[str, Symbol]) -> Iterator[tuple[str, float]]:
        """What each number's range alone does to the logarithm of seconds: half of it, squared."""
        n = len(symbols)
        middle = {name: float(symbol.value) for name, symbol in symbols.items()}
        moved: dict[str, Array] = {name: np.full(2 * n, x) for name, x in middle.items()}
        uncertain = [(name, s.spread) for name, s in symbols.items() if s.spread is not None]
        for i, (name, spread) in enumerate(uncertain):
            moved[name][2 * i : 2 * i + 2] = spread.low, spread.high
        logs = np.log(np.broadcast_to(self.seconds(moved), 2 * n))
        for i, (name, _) in enumerate(uncertain):
            yield name, float((logs[2 * i + 1] - logs[2 * i]) / 2) ** 2


@cache
def formula_of(setting: Setting) -> StepFormula:
    """The formula of a setting, whatever is believed of its numbers.

    Raises:
        InputError: the chip does not compute in the setting's precision.
        UnknownName: no such stack.
    """
    formula = step_time(setting, PRIORS).total
    uncertain = tuple(s for s in formula.symbols().values() if s.spread is not None)
    return StepFormula(compiled([formula], [s.name for s in uncertain]), uncertain)


def believed(prior: Symbol, beliefs: Beliefs) -> Symbol:
    """A number of a formula under other beliefs than the priors."""
    assert prior.spread is not None
    spread = (float(prior.value), prior.spread.low, prior.spread.high)
    return beliefs.symbol(prior.name, spread, prior.basis, prior.source, prior.meaning)


@lru_cache(maxsize=4096)
def draws_of(symbol: Symbol) -> Array:
    return np.array(symbol.draws())
