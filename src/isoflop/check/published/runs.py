"""Whole published runs: accelerator-hours and energy, predicted as a first-order plan does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from isoflop.arch.zoo import entry
from isoflop.check.published.machines import read_cluster
from isoflop.check.published.predict import at_roofline
from isoflop.check.published.score import Judged
from isoflop.check.published.shapes import Skip, zoo_name
from isoflop.check.published.table import Cells, Table, shown
from isoflop.errors import InputError, Problem
from isoflop.plan.assumed import UTILIZATION
from isoflop.plan.economics import energy_mwh
from isoflop.plan.layout import Layout
from isoflop.plan.step.setting import Setting
from isoflop.quantity import Basis, Expr, Node, Symbol, leaf

SECONDS_PER_HOUR, HOURS_PER_DAY = 3600, 24


def judge_runs(table: Table) -> tuple[Judged, ...]:
    """Each run's hours beside its prediction, and its energy where that is stated.

    Raises:
        InputError: cells that cannot be read, by row and column.
    """
    found: list[Judged] = []
    bad: list[Problem] = []
    for cells in table.cells():
        try:
            found += judge_run(cells)
        except Skip as why:
            found.append(_unpredicted(cells, str(why)))
        bad += cells.problems
    if bad:
        raise InputError(table.name, shown(bad))
    return tuple(found)


def judge_run(cells: Cells) -> Iterator[Judged]:
    """The run's hours, then its energy.

    Raises:
        Skip: the run cannot be predicted, or nothing measured is stated.
    """
    stated, energy, pue = _hours(cells), cells.real("energy_MWh"), cells.real("pue")
    if stated is None and energy is None:
        raise Skip("neither hours nor energy are stated")
    setting, tokens = read_run(cells)
    hours = hours_of(setting, tokens)
    if stated is not None:
        yield _judged(cells, "hours", stated, leaf("accelerator_hours", "hours", hours))
    if energy is not None:
        chip = setting.cluster.chip
        yield _judged(cells, "MWh", energy, energy_mwh(hours, chip, watts=None, pue=pue))


def read_run(cells: Cells) -> tuple[Setting, int]:
    """The run as steps of one sequence per accelerator, and its tokens.

    Raises:
        Skip: the model, the accelerator or the tokens are unknown, or several.
    """
    name, tokens = zoo_name(cells.text("model")), cells.whole("tokens", 10**18)
    if tokens is None:
        raise Skip("the tokens are not stated")
    if name is None:
        raise Skip("the model is not in the zoo")
    if re.search(r"/|then", cells.text("hardware")):
        raise Skip("more than one kind of accelerator, shares not stated")
    if "distilled" in cells.text("notes"):
        raise Skip("pruned and distilled: a teacher ran beside it")
    cluster = read_cluster(cells, "hardware", 1)
    if cluster is None:
        raise Skip("the accelerator is not known")
    compute = "bf16" if "bf16" in cluster.chip.peaks else "fp16"
    arch = entry(name).arch
    return Setting(arch, cluster, Layout(), arch.max_seq_len, 1, compute), tokens  # type: ignore[arg-type]


def hours_of(setting: Setting, tokens: int) -> Expr:
    """Accelerator-hours: the roofline over the utilization that plans assume."""
    seconds = Symbol("seconds_at_full_rate", at_roofline(setting) * tokens / setting.tokens_per_step,
                     Basis.MODELLED)  # fmt: skip
    return seconds / UTILIZATION / SECONDS_PER_HOUR


def _hours(cells: Cells) -> float | None:
    stated, days, count = (cells.real(c) for c in ("gpu_hours", "wall_days", "num_gpus"))
    if stated is None and days is not None and count is not None:
        return days * HOURS_PER_DAY * count
    return stated


def _judged(cells: Cells, unit: str, measured: float, predicted: Node) -> Judged:
    span = predicted.interval
    assert span is not None
    base = _unpredicted(cells, "")
    return replace(base, family=f"whole runs, {unit}", unit=unit, measured=measured,
                   predicted=float(predicted.value), low=span.low, high=span.high)  # fmt: skip


def _unpredicted(cells: Cells, why: str) -> Judged:
    return Judged(cells.text("row_id"), "whole runs", cells.text("hardware"), cells.text("model"),
                  "hours", None, skipped=why)  # fmt: skip
