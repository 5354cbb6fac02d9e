"""Search: all legal layouts weighed and timed, the best run event by event."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from time import perf_counter, process_time
from typing import Any

from isoflop.errors import Infeasible, InputError, Problem
from isoflop.hardware import Cluster
from isoflop.hardware.stack import Stack, find_stack
from isoflop.plan.layout import Layout, broken_rules, divisors
from isoflop.plan.schedule import SCHEDULES, ScheduleName
from isoflop.plan.search.found import (
    Choice,
    Counters,
    Found,
    Limits,
    Objective,
    cost,
    why_lost,
)
from isoflop.plan.search.pipeline import seconds_simulated
from isoflop.plan.search.scores import Scores
from isoflop.plan.search.space import Space
from isoflop.plan.search.sway import sensitivity
from isoflop.plan.search.weigh import Room, weigh
from isoflop.plan.step.setting import Setting
from isoflop.plan.training.ask import UNKNOWN, TrainAsk, problems_of
from isoflop.plan.training.plan import TrainPlan, planned

#: The best by closed form that are run event by event and ranked again.
SIMULATED = 50


def search(
    ask: TrainAsk,
    *,
    fixed: Mapping[str, int | str] | None = None,
    recompute_too: bool = True,
    schedules: Sequence[ScheduleName] | None = None,
    minimize: Objective = "time",
    limits: Limits | None = None,
    n_simulated: int = SIMULATED,
) -> Found:
    """The best layout of a training run among all legal ones.

    `ask` says what to train on what; its `stack` names the trainer's software, its layout is
    not read. `fixed` is what the user said, by field of `Layout`. Recomputation is
    searched too unless `recompute_too` is off, and so are `schedules`: those that the stack can
    run unless given. The whole cluster is used, or a divisor of its
    nodes, whatever is least by `minimize`. The `n_simulated` best by formula are run event by
    event and ranked by that.

    Raises:
        InputError: a question that `plan_train` would not answer, or limits out of bounds.
        Infeasible: nothing fits, or nothing keeps the limits; the nearest is named.

    >>> from isoflop.arch import gpt
    >>> from isoflop.hardware import parse_cluster
    >>> from isoflop.plan.training.work import Work
    >>> small = gpt("gpt2", d_model=768, n_layers=12, n_heads=12, vocab_size=50257, max_seq_len=1024)
    >>> ask = TrainAsk(Work(small, 10**10, 1024), parse_cluster("8xa100-sxm-80gb"), 512)
    >>> found = search(ask, recompute_too=False)
    >>> found.best.layout.n_accelerators, found.counters.evaluated > 100
    (8, True)
    """
    kept = limits or Limits()
    known = replace(ask, stack=ask.stack or UNKNOWN, layout=None)
    if bad := [*problems_of(known), *kept.problems()]:
        raise InputError("plan train", bad)
    tried = tuple(schedules or _schedules(find_stack(known.setting(Layout()).stack)))
    asked = _Search(known, dict(fixed or {}), recompute_too, tried, minimize, kept)
    return asked.found(n_simulated)


def _schedules(stack: Stack) -> Iterator[ScheduleName]:
    """The schedules that a trainer's software can run."""
    return (name for name in SCHEDULES if name in stack.schedules)


def sub_counts(cluster: Cluster) -> tuple[int, ...]:
    """Accelerators that a search may use: all, or a divisor of the nodes.

    >>> from isoflop.hardware import parse_cluster
    >>> sub_counts(parse_cluster("96xh100-sxm")), sub_counts(parse_cluster("12xh100-sxm"))
    ((8, 16, 24, 32, 48, 96), (12,))
    """
    nodes, left = divmod(cluster.count, cluster.size_node)
    return (cluster.count,) if left else tuple(cluster.size_node * n for n in divisors(nodes))


@dataclass(frozen=True)
class _Search:
    ask: TrainAsk
    fixed: Mapping[str, int | str]
    recompute_too: bool
    schedules: tuple[ScheduleName, ...]
    minimize: Objective
    limits: Limits

    @cached_property
    def space(self) -> Space:
        ask, policy = self.ask, None if self.recompute_too else self.ask.work.recompute
        counts = sub_counts(ask.cluster)
        return Space(ask.work.arch, ask.cluster, ask.work.seq_len, ask.global_batch,
                     self.fixed, policy, counts, self.schedules)  # fmt: skip

    @cached_property
    def room(self) -> Room:
        chip = self.ask.cluster.chip
        own = float(chip.bytes_memory.value) * (1 - self.limits.memory_margin)
        if chip.host is None:
            return Room(own)
        return Room(own, float(chip.host.bytes_memory.value) / chip.host.chips)

    def found(self, n_simulated: int) -> Found:
        started, worked = perf_counter(), process_time()
        if not self.space.size:
            raise InputError("plan train", self._unmet())
        timed = weigh(self.space, self.ask.job, self.setting(0, 0), self.room)
        scores = Scores(self.ask, self.space, timed, self.minimize, self.limits)
        best, front = scores.best(n_simulated), scores.front()
        middle, worked = perf_counter(), process_time() - worked
        if not best.size:
            raise Infeasible(self._nothing(scores))
        ranked = self._simulated([self._choice(scores, int(i)) for i in best])
        counters = Counters(
            timed.evaluated, int(timed.fits.sum()), middle - started, worked, len(ranked), perf_counter() - middle,
        )  # fmt: skip
        return self._told(
            ranked, tuple(self._choice(scores, int(i)) for i in front), scores, counters
        )

    def setting(self, row: int, variation: int) -> Setting:
        """One layout of the space, on as few whole nodes as hold it."""
        varied = self.space.variations[variation]
        layout = self.space.layout(row, varied)
        count = min(n for n in sub_counts(self.ask.cluster) if n >= layout.n_accelerators)
        cluster = replace(self.ask.cluster, count=count)
        return replace(self.ask.setting(layout), cluster=cluster, recompute=varied.recompute)

    def _choice(self, scores: Scores, i: int) -> Choice:
        setting = self.setting(int(scores.timed.row[i]), int(scores.timed.variation[i]))
        costs = {name: float(column[i]) for name, column in scores.measures.items()}
        return Choice(setting, float(scores.timed.seconds[i]), **costs)

    def _simulated(self, choices: Sequence[Choice]) -> tuple[Choice, ...]:
        """The choices ranked again by what the objective is under simulated pipelines."""
        seconds = seconds_simulated([choice.setting for choice in choices])
        again = [replace(c, seconds_simulated=s) for c, s in zip(choices, seconds, strict=True)]
        return tuple(
            sorted(again, key=lambda c: cost(self.minimize, c.n_accelerators, c.seconds_best))
        )

    def _told(
        self, ranked: tuple[Choice, ...], front: tuple[Choice, ...], scores: Scores,
        counters: Counters,
    ) -> Found:  # fmt: skip
        best = self._plan(ranked[0])
        return Found(
            minimize=self.minimize,
            best=best,
            ranked=ranked,
            why=why_lost(self.minimize, ranked[0], ranked[1]) if len(ranked) > 1 else "",
            front=front,
            refused=scores.refused,
            binding=scores.binding(),
            sensitivity=sensitivity(ranked, self.minimize),
            counters=counters,
        )  # fmt: skip

    def _plan(self, choice: Choice) -> TrainPlan:
        """The whole plan of a choice, by the formulas that print; its layout is legal."""
        setting = choice.setting
        assert not broken_rules(setting.layout, setting.arch, setting.cluster,
                                setting.global_batch, setting.seq_len)  # fmt: skip
        work = replace(self.ask.work, recompute=setting.recompute)
        return planned(replace(self.ask, work=work, cluster=setting.cluster, layout=setting.layout))

    def _unmet(self) -> list[Problem]:
        """Why what the user fixed leaves no legal layout."""
        ask, sizes = self.ask, dict[str, Any](self.fixed)
        if len(self.schedules) == 1:
            sizes["schedule"] = self.schedules[0]
        layout = Layout(**sizes)
        broken = broken_rules(
            layout, ask.work.arch, ask.cluster, ask.global_batch, ask.work.seq_len
        )
        said = " ".join(f"{name}={size}" for name, size in sizes.items()) or "nothing"
        return broken or [Problem("fixed", said, f"leaves a legal layout on {ask.cluster}")]

    def _nothing(self, scores: Scores) -> str:
        where = f"{self.ask.work.arch.name} on {self.ask.cluster}"
        reasons = "; ".join(map(str, scores.refused)) or "no layout is legal"
        return f"{where}: no layout is left: {reasons}"
