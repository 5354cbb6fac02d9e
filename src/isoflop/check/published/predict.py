"""Predictors of a step's seconds, and how one is refitted to a set of measured rows.

`PREDICT` and `REFIT` are what `isoflop validate` judges.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias, cast

from isoflop.arch import Arch
from isoflop.check.published.rates import PEAK
from isoflop.check.published.score import quantile
from isoflop.check.published.step import Measured
from isoflop.check.step_fit import Problem, Row, fit
from isoflop.check.step_formula import Predicted, formula_of
from isoflop.count import FLOPS_CONVENTIONS, Precision, Workload, flops_forward, flops_training
from isoflop.count.memory_saved import Recompute
from isoflop.errors import InputError
from isoflop.hardware.chip import Precision as Format
from isoflop.hardware.fitted import shipped
from isoflop.plan.assumed import UTILIZATION
from isoflop.plan.roofline import Rates, Stored, seconds_forward
from isoflop.plan.step.setting import Setting
from isoflop.quantity import Basis, Interval, Node, Symbol, leaf

#: Seconds of a step with their range; InputError where the setting cannot be predicted.
Predictor: TypeAlias = Callable[[Setting], Node | Predicted]
#: A predictor whose constants were chosen on the rows given and on no others.
Refit: TypeAlias = Callable[[Sequence[Measured]], Predictor]
#: Seconds of a step at full rate.
Ideal: TypeAlias = Callable[[Setting], float]

#: Fewer rows than this have no range of their own.
FEWEST_FOR_RANGE = 8


def at_peak(setting: Setting) -> float:
    """Seconds of the model's own FLOPs at the chip's peak: what MFU is a share of."""
    rate = float(setting.cluster.chip.peak(_format(setting)).value)
    flops = setting.tokens_per_step * _flops_per_token(setting.arch, setting.seq_len)
    return flops / (rate * setting.cluster.count)


def at_roofline(setting: Setting) -> float:
    """Seconds with each operator at its roofline (plan/roofline.py), recomputation included.

    Raises:
        InputError: the chip does not compute in this format.
    """
    chip, layout = setting.cluster.chip, setting.layout
    rate = float(chip.peak(_format(setting)).value)
    memory = float(chip.bytes_per_second_memory.value)
    per_pass = _roofline(setting.arch, layout.micro_batch, setting.seq_len, rate, memory)
    passes = setting.global_batch / layout.micro_batch
    again = _passes(setting.arch, setting.seq_len, setting.recompute)
    return per_pass * again * passes / setting.cluster.count


def _format(setting: Setting) -> Format:
    return PEAK.get(setting.compute, cast(Format, setting.compute))


@cache
def _flops_per_token(arch: Arch, seq_len: int) -> float:
    count = FLOPS_CONVENTIONS["exact-causal"].count(arch, Workload.train(1, seq_len))
    return float(count.value) / seq_len


@cache
def _passes(arch: Arch, seq_len: int, recompute: Recompute) -> float:
    """FLOPs of a step over those of its forward pass."""
    work = Workload.train(1, seq_len)
    whole = flops_training(arch, work, recompute)
    return float(whole.value) / float(flops_forward(arch, work).value)


@cache
def _roofline(arch: Arch, batch: int, seq_len: int, rate: float, memory: float) -> float:
    rates = Rates(Symbol("flops_per_second", rate), Symbol("bytes_per_second", memory))
    stored = Stored(*3 * (Precision.BF16,))
    return float(seconds_forward(arch, Workload.train(batch, seq_len), rates, stored).value)


def roofline(setting: Setting) -> Node:
    """The roofline over the utilization that a first-order plan assumes."""
    return _seconds(at_roofline(setting), UTILIZATION)


def constant(share: float) -> Predictor:
    """The chip's peak times one share for everything, without a range."""
    used = Symbol("mfu", share, Basis.ASSUMED)
    return lambda setting: _seconds(at_peak(setting), used)


def _seconds(ideal: float, used: Symbol) -> Node:
    at_full = Symbol("seconds_at_full_rate", ideal, Basis.MODELLED)
    return leaf("seconds_step", "seconds", at_full / used, basis=used.basis)


# --- constants fitted to rows --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shares:
    """Shares of a full rate, by chip and format; for others by format, then over all rows."""

    by_chip: Mapping[tuple[str, str], Symbol]
    by_format: Mapping[str, Symbol]
    overall: Symbol

    def of(self, setting: Setting) -> Symbol:
        by_format = self.by_format.get(setting.compute, self.overall)
        return self.by_chip.get((setting.cluster.chip.name, setting.compute), by_format)


def best_constant(rows: Sequence[Measured], ideal: Ideal) -> Predictor:
    """One share per chip and format that makes the mean error of the rows smallest.

    Its range is where the middle 90 % of the rows' own shares lie.
    """
    shares = fit_shares(rows, ideal)
    return lambda setting: _seconds(ideal(setting), shares.of(setting))


def refit_roofline(rows: Sequence[Measured]) -> Predictor:
    """`best_constant` over the roofline."""
    return best_constant(rows, at_roofline)


def fit_shares(rows: Sequence[Measured], ideal: Ideal) -> Shares:
    """The shares that the rows reached, summed up by group."""
    groups: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in rows:
        if row.setting is None or row.measured_seconds is None:
            continue
        setting = row.setting
        reached = ideal(setting) / row.measured_seconds
        for key in ((setting.cluster.chip.name, setting.compute), (setting.compute,), ()):
            groups[key].append(reached)
    fitted = {key: _share(values, groups[()]) for key, values in groups.items()}
    return Shares(
        by_chip={(k[0], k[1]): v for k, v in fitted.items() if len(k) == 2},
        by_format={k[0]: v for k, v in fitted.items() if len(k) == 1},
        overall=fitted[()],
    )


def _share(reached: list[float], everything: list[float]) -> Symbol:
    best = best_share(reached)
    few = len(reached) < FEWEST_FOR_RANGE
    around = sorted(everything if few else reached)
    scale = best / best_share(around) if few else 1.0
    spread = Interval(
        min(best, scale * quantile(around, 0.05)), max(best, scale * quantile(around, 0.95))
    )
    return Symbol(
        "share_of_full_rate", best, Basis.FITTED, spread, source="fitted to published steps"
    )


def best_share(reached: Sequence[float]) -> float:
    """The share u with the smallest mean of |reached / u - 1|, the error of predicting by u.

    It is one of the values: the median of them, each weighing as much as itself.

    >>> best_share([0.2, 0.5, 0.5, 0.6])
    0.5
    """
    ordered, half = sorted(reached), math.fsum(reached) / 2
    weight = 0.0
    for value in ordered:
        weight += value
        if weight >= half:
            return value
    return ordered[-1]


def operators(setting: Setting) -> Predicted:
    """The step-time model as shipped (plan/step/seconds.py)."""
    return formula_of(setting).predict(shipped())


def refit_operators(rows: Sequence[Measured]) -> Predictor:
    """The step-time model with its uncertain numbers fitted to the rows given alone."""
    beliefs = fit(Problem([row for measured in rows for row in _known(measured)])).beliefs
    return lambda setting: formula_of(setting).predict(beliefs)


def _known(row: Measured) -> Iterator[Row]:
    """The row, if its setting has a formula: judging says why where it has none."""
    if row.setting is None or row.measured_seconds is None:
        return
    with suppress(InputError):
        formula_of(row.setting)
        yield Row(row.setting, row.measured_seconds, row.family)


#: What the command judges, and how it is refitted when a source is left out.
PREDICT: Predictor = operators
REFIT: Refit = refit_operators
