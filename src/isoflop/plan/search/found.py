"""What a search finds, and what it says about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from isoflop.errors import Problem
from isoflop.plan.layout import Layout
from isoflop.plan.step.seconds import step_time
from isoflop.plan.step.setting import Setting
from isoflop.plan.training.plan import TrainPlan
from isoflop.quantity.units import format_bytes

#: What is made least. Money and energy are both proportional to accelerator-hours.
Objective: TypeAlias = Literal["time", "money", "energy", "accelerators"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan must keep: the longest run, the most money and power, memory left free."""

    days: float | None = None
    dollars: float | None = None
    megawatts: float | None = None
    memory_margin: float = 0.0

    @property
    def given(self) -> dict[str, float]:
        """The limits on costs that were given, by the name of the cost."""
        known = {"days": self.days, "dollars": self.dollars, "megawatts": self.megawatts}
        return {name: limit for name, limit in known.items() if limit is not None}

    def problems(self) -> list[Problem]:
        bad = [Problem(f"most {n}", v, "is above 0") for n, v in self.given.items() if not v > 0]
        if not 0 <= self.memory_margin < 1:
            bad.append(Problem("memory_margin", self.memory_margin, "is a share from 0 to below 1"))
        return bad


@dataclass(frozen=True, slots=True)
class Choice:
    """One layout with its numbers; `seconds_simulated` where its pipeline was run event by event."""

    setting: Setting
    seconds: float
    days: float
    dollars: float
    energy_mwh: float
    megawatts: float
    seconds_simulated: float | None = None

    @property
    def layout(self) -> Layout:
        return self.setting.layout

    @property
    def n_accelerators(self) -> int:
        return self.layout.n_accelerators

    @property
    def seconds_best(self) -> float:
        """The simulated seconds where there are any."""
        return self.seconds if self.seconds_simulated is None else self.seconds_simulated

    @property
    def gap(self) -> float | None:
        """The closed form's error against the simulation."""
        simulated = self.seconds_simulated
        return None if simulated is None else self.seconds / simulated - 1

    def __str__(self) -> str:
        return f"{self.layout} recompute={self.setting.recompute}"

    def to_json(self) -> dict[str, Any]:
        return {
            "layout": self.layout.to_json(),
            "recompute": self.setting.recompute,
            "n_accelerators": self.n_accelerators,
            "seconds_step": self.seconds,
            "seconds_step_simulated": self.seconds_simulated,
            "days": self.days,
            "dollars": self.dollars,
            "energy_mwh": self.energy_mwh,
            "megawatts": self.megawatts,
        }


@dataclass(frozen=True, slots=True)
class Refused:
    """Layouts refused for one reason, and the nearest of them."""

    reason: str
    count: int
    nearest: str
    value: float
    limit: float
    unit: str = ""

    @property
    def over(self) -> float:
        return self.value - self.limit

    def __str__(self) -> str:
        def text(value: float) -> str:
            return (
                format_bytes(round(value)) if self.unit == "bytes" else f"{value:,.4g} {self.unit}"
            )

        return (
            f"{self.count:,} by {self.reason}, the nearest by {text(self.over)}: "
            f"{self.nearest}: {text(self.value)} > {text(self.limit)}"
        )

    def to_json(self) -> dict[str, Any]:
        return {"reason": self.reason, "count": self.count, "nearest": self.nearest,
                "value": self.value, "limit": self.limit, "unit": self.unit, "text": str(self)}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sway:
    """How one uncertain constant moves the best plan's step time.

    `elasticity` is the relative change of time over that of the constant, from one end of
    its range to the other; `changes_best` whether another layout of the best is faster there.
    """

    name: str
    value: float
    low: float
    high: float
    seconds_low: float
    seconds_high: float
    elasticity: float | None
    changes_best: str | None
    meaning: str = ""

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Counters:
    """What a search did with the legal layouts.

    Of `evaluated` memory and time were both computed; `fit` of them fit, the others are `refused`.
    `seconds` are from the question to the ranked layouts, `seconds_cpu` those of the one core that worked; `seconds_simulation` come on top.
    """

    evaluated: int
    fit: int
    seconds: float
    seconds_cpu: float
    simulated: int
    seconds_simulation: float

    @property
    def refused(self) -> int:
        return self.evaluated - self.fit

    @property
    def plans_per_second_per_core(self) -> float:
        return self.evaluated / self.seconds_cpu

    def to_json(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self.__slots__}
        named = ("refused", "plans_per_second_per_core")
        return {**own, **{name: getattr(self, name) for name in named}}


@dataclass(frozen=True, slots=True)
class Found:
    """The answer of a search.

    `ranked` are the best by simulation, best first; `front` are the choices of which none is
    both faster and cheaper; `refused` comes by reason. `gap_most` is the largest difference
    between closed form and simulation among `ranked`.
    """

    minimize: Objective
    best: TrainPlan
    ranked: tuple[Choice, ...]
    why: str
    front: tuple[Choice, ...]
    refused: tuple[Refused, ...]
    binding: str
    sensitivity: tuple[Sway, ...]
    counters: Counters

    @property
    def choice(self) -> Choice:
        return self.ranked[0]

    @property
    def runner_up(self) -> Choice | None:
        return self.ranked[1] if len(self.ranked) > 1 else None

    @property
    def gap_most(self) -> float:
        return max((abs(c.gap) for c in self.ranked if c.gap is not None), default=0.0)

    def to_json(self) -> dict[str, Any]:
        runner = self.runner_up
        return {
            **self.counters.to_json(),
            "minimize": self.minimize,
            "best": self.choice.to_json(),
            "runner_up": None if runner is None else {**runner.to_json(), "why": self.why},
            "gap_best": self.choice.gap,
            "gap_most": self.gap_most,
            "front": [c.to_json() for c in self.front],
            "refusals": [r.to_json() for r in self.refused],
            "binding": self.binding,
            "sensitivity": [s.to_json() for s in self.sensitivity],
        }


def cost(minimize: Objective, n_accelerators: int, seconds: float) -> tuple[float, ...]:
    """What choices are ranked by; among equally many accelerators the fastest comes first."""
    match minimize:
        case "time":
            return (seconds,)
        case "accelerators":
            return (n_accelerators, seconds)
        case "money" | "energy":
            return (n_accelerators * seconds,)


def why_lost(minimize: Objective, best: Choice, other: Choice) -> str:
    """The part of a step that costs the runner-up most over the best, from their trees.

    Where money or energy counts, times are those of as many accelerators as the best has.
    """
    ours, theirs = (cost(minimize, c.n_accelerators, c.seconds_best) for c in (best, other))
    if ours[0] != theirs[0] and minimize == "accelerators":
        return f"{other.n_accelerators} accelerators against {best.n_accelerators}"
    scale = (
        1.0 if minimize in ("time", "accelerators") else other.n_accelerators / best.n_accelerators
    )
    mine, its = _parts(best.setting), _parts(other.setting)
    more = {name: scale * its.get(name, 0.0) - mine.get(name, 0.0) for name in {**mine, **its}}
    name = max(more, key=lambda part: (more[part], part))
    return (
        f"{theirs[-1] / ours[-1] - 1:.1%} more {'time' if minimize == 'accelerators' else minimize}, "
        f"mostly {name}: {scale * its.get(name, 0.0):.3g} s a step against {mine.get(name, 0.0):.3g} s"
    )


def _parts(setting: Setting) -> dict[str, float]:
    step = step_time(setting)
    times = float(step.times.value)
    return {child.name: times * float(child.value) for child in step.children}
