"""What each layout of a search costs, and which are best, on the front, or refused."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from isoflop.plan.economics import dollars, energy_mwh, price_of
from isoflop.plan.search.found import Limits, Objective, Refused
from isoflop.plan.search.space import Space, n_accelerators
from isoflop.plan.search.weigh import Rows, Timed
from isoflop.plan.training.ask import TrainAsk
from isoflop.plan.training.plan import wall_over_steps
from isoflop.quantity import Symbol
from isoflop.quantity.units import format_bytes


@dataclass(frozen=True)
class Scores:
    """What every timed layout costs, by name, and which keep the limits."""

    ask: TrainAsk
    space: Space
    timed: Timed
    minimize: Objective
    limits: Limits

    @cached_property
    def rates(self) -> tuple[float, float]:
        """Dollars and MWh of one accelerator-hour."""
        ask, hour = self.ask, Symbol("accelerator_hours", 1)
        chip = ask.cluster.chip
        rent = dollars(hour, price_of(chip, ask.price))
        energy = energy_mwh(hour, chip, watts=ask.watts, pue=ask.pue)
        return float(rent.value), float(energy.value)

    @cached_property
    def n_accelerators(self) -> NDArray[np.int64]:
        return n_accelerators(self.space.columns)[self.timed.row]

    @cached_property
    def measures(self) -> dict[str, NDArray[np.float64]]:
        """Of each timed layout: days with checkpoints and failures, dollars, MWh and megawatts."""
        n = self.n_accelerators
        used, place = np.unique(n, return_inverse=True)
        wall = np.array([wall_over_steps(self.ask, int(count)) for count in used])[place]
        hours = self.timed.seconds * wall * (float(self.ask.n_steps.value) / 3600)
        per_hour, mwh = self.rates
        return {
            "days": hours / 24,
            "dollars": hours * n * per_hour,
            "energy_mwh": hours * n * mwh,
            "megawatts": (n * mwh).astype(np.float64),
        }

    @cached_property
    def cost(self) -> NDArray[np.float64]:
        """What is made least; among equally many accelerators the fastest."""
        match self.minimize:
            case "time":
                return self.timed.seconds
            case "money":
                return self.measures["dollars"]
            case "energy":
                return self.measures["energy_mwh"]
            case "accelerators":
                slowest = self.timed.seconds.max(initial=0.0)
                return np.asarray(self.n_accelerators + self.timed.seconds / (1 + slowest))

    @cached_property
    def over(self) -> dict[str, NDArray[np.bool_]]:
        """Which layouts break each limit that was given, memory first."""
        t = self.timed
        broken = {
            "memory": t.bytes_held > t.room.accelerator,
            "host memory": t.bytes_host > t.room.host,
        }
        for name, limit in self.limits.given.items():
            broken[name] = self.measures[name] > limit
        return broken

    @cached_property
    def left(self) -> Rows:
        return np.flatnonzero(~np.logical_or.reduce(list(self.over.values())))

    def best(self, n: int) -> Rows:
        """The n least, in order; ties in the order of the space."""
        left, cost = self.left, self.cost
        if left.size > n:
            left = left[cost[left] <= np.partition(cost[left], n - 1)[n - 1]]
        t = self.timed
        return left[np.lexsort((t.variation[left], t.row[left], cost[left]))][:n]

    def front(self) -> Rows:
        """Choices of which no other is both faster and cheaper, fastest first."""
        seconds, money = self.timed.seconds[self.left], self.measures["dollars"][self.left]
        order = self.left[np.lexsort((money, seconds))]
        money = self.measures["dollars"][order]
        least = (
            np.minimum.accumulate(np.concatenate([[np.inf], money[:-1]])) if money.size else money
        )
        return order[money < least]

    @cached_property
    def refused(self) -> tuple[Refused, ...]:
        """By memory, then by each limit that what fits does not keep, with the nearest."""
        timed, found = self.timed, []
        for reason, large, room in (
            ("memory", timed.too_large, timed.room.accelerator),
            ("host memory", timed.too_large_host, timed.room.host),
        ):
            if large.count:
                nearest = self.name(large.row, large.variation)
                found.append(
                    Refused(reason, large.count, nearest, large.bytes_needed, room, "bytes")
                )
        for name, limit in self.limits.given.items():
            over = np.flatnonzero(self.over[name] & self.timed.fits)
            if over.size:
                i = int(over[self.measures[name][over].argmin()])
                value = float(self.measures[name][i])
                found.append(Refused(name, int(over.size), self.called(i), value, limit, name))
        return tuple(found)

    def binding(self) -> str:
        """What alone keeps a better layout out, among those whose time is known."""
        least = float(self.cost[self.left].min())
        alone = np.sum(list(self.over.values()), axis=0) == 1
        better = alone & (self.cost < least)
        if not better.any():
            return "compute: nothing that one limit alone refused is better"
        i = int(np.where(better, self.cost, np.inf).argmin())
        reason = next(name for name, over in self.over.items() if over[i])
        less = 1 - float(self.cost[i]) / least
        text = f"{reason}: {self.called(i)} would take {less:.1%} less {self.minimize}"
        if reason != "memory":
            return text
        needs = format_bytes(round(float(self.timed.bytes_held[i])))
        return f"{text}, but needs {needs} of {format_bytes(round(self.timed.room.accelerator))}"

    def called(self, i: int) -> str:
        return self.name(int(self.timed.row[i]), int(self.timed.variation[i]))

    def name(self, row: int, variation: int) -> str:
        varied = self.space.variations[variation]
        return f"{self.space.layout(row, varied)} recompute={varied.recompute}"
