"""Where a training run goes, and how long its step takes there."""

from __future__ import annotations

from dataclasses import dataclass, replace

from isoflop.count.blocks import beside
from isoflop.count.memory_saved import RECOMPUTES
from isoflop.errors import Infeasible, InputError
from isoflop.plan.layout import Layout
from isoflop.plan.memory.place import place
from isoflop.plan.memory.refusal import Refusal
from isoflop.plan.step.seconds import step_time
from isoflop.plan.training.ask import TrainAsk
from isoflop.plan.training.quickest import Ranking, quickest
from isoflop.quantity import Node


@dataclass(frozen=True, slots=True)
class Put:
    """A run under one layout; `ask` has the recomputation that was chosen.

    `step` is None where a rate was given, and where no step can be timed, which `untimed` says.
    `ranking` is where the layout was the planner's choice by its time.
    """

    ask: TrainAsk
    layout: Layout
    memory: Node
    refused: tuple[Refusal, ...]
    binding: str
    step: Node | None = None
    ranking: Ranking | None = None
    untimed: str = ""


def put(ask: TrainAsk) -> Put:
    """Under the layout given, else the quickest of those listed, else the smallest that fits.

    Raises:
        InputError: an illegal layout, or a stack was named whose step cannot be timed.
        Infeasible: no legal layout fits the memory; the closest is named.
    """
    if ask.rate_given:
        return _smallest(ask)
    if towers := beside(ask.work.arch, "is none where a step is timed"):
        return replace(_smallest(ask), untimed=str(towers[0]))
    if ask.layout is not None:
        return _timed(ask, _smallest(ask))
    try:
        ranking = quickest(ask)
    except InputError as error:
        return _untimed(ask, _smallest(ask), error)
    return _timed(ask, _smallest(ask)) if ranking is None else _quickest(ask, ranking)


def _quickest(ask: TrainAsk, ranking: Ranking) -> Put:
    best = ranking.best
    known = replace(ask, work=replace(ask.work, recompute=best.recompute), layout=best.layout)
    found = _smallest(known)
    return replace(
        found,
        ask=replace(known, layout=None),
        refused=ranking.refused,
        binding=ranking.binding,
        step=step_time(known.setting(best.layout)),
        ranking=ranking,
    )


def _timed(ask: TrainAsk, found: Put) -> Put:
    try:
        return replace(found, step=step_time(found.ask.setting(found.layout)))
    except InputError as error:
        return _untimed(ask, found, error)


def _untimed(ask: TrainAsk, found: Put, error: InputError) -> Put:
    if ask.stack is not None:
        raise error
    return replace(found, untimed=str(error.problems[0]))


def _smallest(ask: TrainAsk) -> Put:
    """The layout given, or the smallest that fits, with the least recomputation that fits."""
    open_ = ask.may_recompute and ask.layout is None
    *tried, last = RECOMPUTES if open_ else (ask.work.recompute,)
    for recompute in tried:
        try:
            return _placed(replace(ask, work=replace(ask.work, recompute=recompute)))
        except Infeasible:
            continue
    return _placed(replace(ask, work=replace(ask.work, recompute=last)))


def _placed(ask: TrainAsk) -> Put:
    return Put(ask, *place(ask.job, ask.cluster, ask.global_batch, ask.layout))
