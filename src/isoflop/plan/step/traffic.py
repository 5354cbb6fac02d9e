"""Seconds of a step's messages on its fabric, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property

from isoflop.count.memory_saved import Recompute
from isoflop.hardware.fabric import Fabric, fabric_of
from isoflop.hardware.stack import Stack
from isoflop.plan.network.exchange import Exchange
from isoflop.plan.network.group import Dimension, Group, Ways, groups
from isoflop.plan.schedule import ScheduleName
from isoflop.plan.step.constants import Constants
from isoflop.plan.step.job import Job
from isoflop.plan.step.message import Message, between, once, within
from isoflop.plan.step.setting import Setting
from isoflop.quantity import Expr, total


@dataclass(frozen=True)
class Traffic:
    """What ranks send in the steps of a setting, whatever its ZeRO, recomputation and schedule.

    Seconds are of all messages one after the other; each is timed once for all steps that have it.
    """

    setting: Setting
    stack: Stack
    use: Constants

    @cached_property
    def fabric(self) -> Fabric:
        """The cluster's, at the rates that collectives reach beside other kernels."""
        return self.use.beside_kernels(fabric_of(self.setting.cluster))

    @cached_property
    def around(self) -> dict[Dimension, Group]:
        layout = self.setting.layout
        return groups(Ways.of(layout), self.fabric, layout.n_accelerators)

    @cached_property
    def _any_job(self) -> Job:
        exchange = Exchange(
            bytes_grad=self.stack.bytes_grad,
            once_per_domain=self.stack.once_per_domain,
            imbalance=self.stack.expert_imbalance,
        )
        return Job.of(self.setting, exchange)

    def _job(self, schedule: ScheduleName, zero: int = 0, again: bool = False) -> Job:
        layout = replace(self.setting.layout, schedule=schedule, zero=zero)  # type: ignore[arg-type]  # 0 to 3
        recompute: Recompute = "full" if again else "none"
        setting = replace(self.setting, layout=layout, recompute=recompute)
        return replace(self._any_job, setting=setting)

    def _timed(self, sent: Iterable[Message]) -> Iterator[tuple[str, Expr]]:
        """Paths of the messages to anyone, and the seconds of all that a step has of each."""
        for m in sent:
            if self.around[m.dimension].size.value != 1:
                yield m.path, m.times * m.seconds(self.around, self.fabric)

    @cached_property
    def within(self) -> Callable[[ScheduleName, bool], tuple[tuple[str, Expr], ...]]:
        """Those of each micro-batch among the ranks of a stage; `again` where layers are."""
        return cache(
            lambda schedule, again: tuple(self._timed(within(self._job(schedule, again=again))))
        )

    @cached_property
    def between(self) -> Callable[[ScheduleName], Expr]:
        """Those from stage to stage."""
        return cache(
            lambda schedule: total(size for _, size in self._timed(between(self._job(schedule))))
        )

    @cached_property
    def once(self) -> Callable[[ScheduleName, int], Expr]:
        """Those over data-parallel copies."""
        return cache(
            lambda schedule, zero: total(
                size for _, size in self._timed(once(self._job(schedule, zero)))
            )
        )
