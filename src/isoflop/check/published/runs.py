"""Whole published runs: accelerator-hours and energy, predicted as `plan train` does.

What a row or its recipe states of the run is an input (layout, batch, software, accelerators);
the rest is the planner's choice. A rate, a utilization and the hours themselves never are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

from isoflop.arch.zoo import entry
from isoflop.check.published.machines import read_cluster, read_compute
from isoflop.check.published.run_recipes import with_run_recipe
from isoflop.check.published.score import Judged
from isoflop.check.published.shapes import Skip, zoo_name
from isoflop.check.published.step import LARGEST_BATCH, LARGEST_SEQ_LEN, read_layout, read_recompute
from isoflop.check.published.table import Cells, Table, shown
from isoflop.errors import Infeasible, InputError, Problem
from isoflop.hardware.chip import Precision
from isoflop.hardware.node import MOST_CHIPS
from isoflop.hardware.stack import stack_names
from isoflop.plan.training.ask import TrainAsk
from isoflop.plan.training.plan import TrainPlan, planned
from isoflop.plan.training.work import Work, sequences_per_step
from isoflop.quantity import Node

HOURS_PER_DAY = 24
#: What a run is taken to have where nobody says: accelerators, and tokens of a sequence at most.
ACCELERATORS, LONGEST = 1024, 8192


@dataclass(frozen=True, slots=True)
class Runs:
    """The rows judged, and what was filled in where they say nothing."""

    rows: tuple[Judged, ...]
    assumed: tuple[str, ...]


def judge_runs(table: Table) -> Runs:
    """Each run's hours beside its prediction, and its energy where that is stated.

    Raises:
        InputError: cells that cannot be read, by row and column.
    """
    found: list[Judged] = []
    bad: list[Problem] = []
    assumed: list[str] = []
    for plain in table.cells():
        cells = with_run_recipe(plain)
        try:
            found += judge_run(cells)
            assumed += cells.assumed
        except (Skip, Infeasible) as why:
            found.append(_unpredicted(cells, str(why).splitlines()[0]))
        except InputError as error:  # sizes that make no plan
            bad += [
                Problem(f"row {cells.line}, {p.field}", p.value, p.rule, p.hint)
                for p in error.problems
            ]
        bad += cells.problems
    if bad:
        raise InputError(table.name, shown(bad))
    return Runs(tuple(found), tuple(assumed))


def judge_run(cells: Cells) -> Iterator[Judged]:
    """The run's hours, then its energy; nothing where a cell is bad.

    Raises:
        Skip: the run cannot be predicted, or nothing measured is stated.
        Infeasible: it does not fit its accelerators.
    """
    stated, energy = hours_stated(cells), cells.real("energy_MWh")
    if stated is None and energy is None:
        raise Skip("neither hours nor energy are stated")
    ask = read_run(cells)
    if cells.problems:
        return
    plan = planned(ask)
    if stated is not None:
        yield _judged(cells, "hours", stated, plan.accelerator_hours)
    if energy is not None:
        yield _judged(cells, "MWh", energy, plan.energy_mwh)


def plan_of(cells: Cells) -> TrainPlan:
    """The plan of a run, from its row and recipe.

    Raises:
        Skip: the run cannot be predicted.
        Infeasible: it does not fit its accelerators.
    """
    return planned(read_run(with_run_recipe(cells)))


def read_run(cells: Cells) -> TrainAsk:
    """The run as a question to the planner.

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
    count = cells.or_assume("num_gpus", ACCELERATORS, most=MOST_CHIPS)
    cluster = read_cluster(cells, "hardware", count)
    if cluster is None:
        raise Skip("the accelerator is not known")
    arch = entry(name).arch
    usual = min(arch.max_seq_len, LONGEST)
    seq_len = cells.or_assume("seq_len", usual, "the model's longest", most=LARGEST_SEQ_LEN)
    batch = cells.whole("global_batch_seqs", LARGEST_BATCH)
    if batch is None:
        batch = sequences_per_step(tokens, seq_len, count)
        cells.assume("global_batch_seqs: about what trains best on so many tokens (Step Law)")
    layout = read_layout(cells, count) if cells.text("tp") or cells.text("pp") else None
    again = read_recompute(cells) if cells.text("recompute") else None
    return TrainAsk(
        Work(arch, tokens, seq_len, recompute=again or "none"), cluster, batch,
        _precision(cells, "bf16" if "bf16" in cluster.chip.peaks else "fp16"),
        cells.whole("micro_batch"), layout, pue=cells.real("pue"), stack=_stack(cells),
        may_recompute=again is None,
    )  # fmt: skip


def _precision(cells: Cells, usual: Precision) -> Precision:
    return cast(Precision, read_compute(cells) or usual) if cells.text("precision") else usual


def _stack(cells: Cells) -> str | None:
    """The software that is stated; None, which is timed as `unknown`, where none is."""
    stack = cells.text("stack")
    if stack and stack.casefold() not in stack_names():
        raise Skip(f"stack {stack} is not known; `unknown` stands for any other")
    return stack or None


def hours_stated(cells: Cells) -> float | None:
    """Accelerator-hours as stated, or as many accelerators for as many days."""
    stated, days, count = (cells.real(c) for c in ("gpu_hours", "wall_days", "num_gpus"))
    if stated is None and days is not None and count is not None:
        return days * HOURS_PER_DAY * count
    return stated


def _judged(cells: Cells, unit: str, measured: float, predicted: Node) -> Judged:
    span = predicted.interval
    assert span is not None
    base = _unpredicted(cells, "")
    return replace(base, family=f"whole runs, {unit}", unit=unit, measured=measured, sort="runs",
                   predicted=float(predicted.value), low=span.low, high=span.high)  # fmt: skip


def _unpredicted(cells: Cells, why: str) -> Judged:
    return Judged(cells.text("row_id"), "whole runs", cells.text("hardware"), cells.text("model"),
                  "hours", None, skipped=why)  # fmt: skip
