"""How the uncertain constants of a step move the best plan, one at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from isoflop.plan.search.alike import evaluated, structure
from isoflop.plan.search.found import Choice, Objective, Sway, cost
from isoflop.plan.step.seconds import step_time
from isoflop.quantity import Symbol


def sensitivity(ranked: Sequence[Choice], minimize: Objective) -> tuple[Sway, ...]:
    """Every uncertain constant of the best, the one that moves its time most first.

    The other layouts of `ranked` are timed at the ends of each range too, each with its own
    gap between closed form and simulation, to see whether one of them is then the best.
    """
    times = _Times.of(ranked, minimize)
    found = [times.sway(name) for name in times.own]
    return tuple(sorted(found, key=lambda s: -abs(s.seconds_high - s.seconds_low)))


@dataclass(frozen=True)
class _Times:
    """The step times of choices as functions of all uncertain constants."""

    ranked: Sequence[Choice]
    minimize: Objective
    symbols: dict[str, Symbol]
    own: tuple[str, ...]
    run: Any = field(repr=False)

    @classmethod
    def of(cls, ranked: Sequence[Choice], minimize: Objective) -> _Times:
        trees = {structure(c.setting): step_time(c.setting).total for c in reversed(ranked)}
        symbols: dict[str, Symbol] = {}
        for tree in trees.values():
            symbols.update((n, s) for n, s in tree.symbols().items() if s.spread is not None)
        settings = [choice.setting for choice in ranked]
        own = tuple(n for n in trees[structure(settings[0])].symbols() if n in symbols)
        runs = evaluated(settings, lambda setting: [trees[structure(setting)]], list(symbols))
        return cls(ranked, minimize, symbols, own, runs)

    def at(self, name: str, value: float) -> list[float]:
        """Seconds of every choice with one constant moved."""
        row = [value if n == name else float(s.value) for n, s in self.symbols.items()]
        gaps = [(c.seconds_simulated or c.seconds) / c.seconds for c in self.ranked]
        return [float(run(*row)[0]) * gap for run, gap in zip(self.run, gaps, strict=True)]

    def best(self, seconds: Sequence[float]) -> int:
        """The choice that is least by what the search minimized."""
        costs = [
            cost(self.minimize, choice.n_accelerators, s)
            for choice, s in zip(self.ranked, seconds, strict=True)
        ]
        return costs.index(min(costs))

    def sway(self, name: str) -> Sway:
        symbol = self.symbols[name]
        assert symbol.spread is not None
        low, high = symbol.spread.low, symbol.spread.high
        ends = self.at(name, low), self.at(name, high)
        first = {self.best(end) for end in ends} - {0}
        return Sway(
            name=name,
            value=float(symbol.value),
            low=low,
            high=high,
            seconds_low=ends[0][0],
            seconds_high=ends[1][0],
            elasticity=_elasticity(low, high, ends[0][0], ends[1][0]),
            changes_best=str(self.ranked[min(first)]) if first else None,
            meaning=symbol.meaning,
        )


def _elasticity(low: float, high: float, at_low: float, at_high: float) -> float | None:
    """Relative change of time over that of the constant; None where a range begins at 0."""
    if low <= 0 or low == high:
        return None
    return math.log(at_high / at_low) / math.log(high / low)
