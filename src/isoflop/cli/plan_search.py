"""The options and the screen of isoflop plan train --search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cyclopts import Parameter

from isoflop.cli.options import Real
from isoflop.errors import InputError, Problem
from isoflop.plan.schedule import ScheduleName
from isoflop.plan.training.ask import TrainAsk
from isoflop.quantity.units import format_count, format_seconds
from isoflop.report.text import table, tree

if TYPE_CHECKING:
    from isoflop.plan.search import Choice, Found

#: Rows shown in text; JSON has them all.
MOST_FRONT, MOST_SWAYS = 6, 5


@Parameter(name="*", group="Search")
@dataclass(frozen=True, slots=True)
class Hunt:
    """A search for the best layout; sizes of the layout that are given stay as they are.

    Parameters
    ----------
    search
        Search all legal layouts, recomputation too, and the schedules that --stack can run; --tp
        and the other options of a layout hold what they fix.
    minimize
        What the best layout takes least of; time when not given.
    max_days
        Longest run.
    max_dollars
        Most money.
    max_mw
        Most power of all accelerators, in megawatts.
    memory_margin
        Share of each accelerator's memory that is left free.
    """

    search: bool = False
    minimize: Literal["time", "money", "energy", "accelerators"] | None = None
    max_days: Real | None = None
    max_dollars: Real | None = None
    max_mw: Real | None = None
    memory_margin: Real | None = None

    def check(self) -> None:
        """Raise InputError where something is said of a search and none is asked for."""
        said = {name: getattr(self, name) for name in self.__slots__ if name != "search"}
        bad = [Problem(f"--{name.replace('_', '-')}", value, "is given with --search")
               for name, value in said.items() if value is not None]  # fmt: skip
        if bad and not self.search:
            raise InputError("plan train", bad)

    def found(
        self,
        ask: TrainAsk,
        fixed: dict[str, int | str],
        schedule: ScheduleName | None,
        *,
        recompute_too: bool,
    ) -> Found:
        from isoflop.plan.search import Limits, search

        limits = Limits(self.max_days, self.max_dollars, self.max_mw, self.memory_margin or 0.0)
        return search(ask, fixed=fixed, recompute_too=recompute_too,
                      schedules=schedule and (schedule,), minimize=self.minimize or "time", limits=limits)  # fmt: skip


NO_HUNT = Hunt()


def render_found(found: Found) -> str:
    """What a search found: the step, its runner-up, the front, what was refused and why."""
    return "\n".join([
        *_best(found),
        *_runner_up(found),
        *_front(found),
        *(f"refused {refused}" for refused in found.refused),
        f"binding: {found.binding}",
        *_sensitivity(found),
        *_counters(found),
    ])  # fmt: skip


def _best(found: Found) -> list[str]:
    plan, choice = found.best, found.choice
    step = plan.seconds_step
    assert step is not None
    gap = round(choice.gap or 0.0, 3) + 0.0  # never -0.0 %
    return [
        f"least {found.minimize}: {choice}",
        f"  {format_seconds(choice.seconds_best)} a step with its pipeline simulated, "
        f"{format_seconds(choice.seconds)} by formula ({gap:+.1%}; at most {found.gap_most:.1%} "
        f"among the best {len(found.ranked)}), MFU {float(plan.mfu.value):.1%} by formula",
        tree(step, depth=1),
    ]


def _runner_up(found: Found) -> list[str]:
    runner = found.runner_up
    return [] if runner is None else [f"runner-up {runner}: {found.why}"]


def _front(found: Found) -> list[str]:
    rows = [_row(choice) for choice in found.front[:MOST_FRONT]]
    heads = ["  accelerators", "days", "dollars", "layout"]
    left = len(found.front) - len(rows)
    more = [f"  and {left} more (--json lists them)"] if left else []
    return [
        "by formula, none is both faster and cheaper than these:",
        table(rows, heads, "rrrl"),
        *more,
    ]


def _row(choice: Choice) -> list[str]:
    return [
        f"  {choice.n_accelerators:,}",
        f"{choice.days:.1f}",
        f"{choice.dollars:,.0f}",
        str(choice),
    ]


def _sensitivity(found: Found) -> list[str]:
    rows = [
        [f"  {s.name}", f"{s.low:.3g} to {s.high:.3g}",
         f"{format_seconds(s.seconds_low)} to {format_seconds(s.seconds_high)}",
         "" if s.elasticity is None else f"{s.elasticity:+.2f}",
         "same" if s.changes_best is None else s.changes_best]
        for s in found.sensitivity[:MOST_SWAYS]
    ]  # fmt: skip
    heads = ["  what is uncertain", "range", "a step", "elasticity", "best layout at an end"]
    return ["what moves the step most:", table(rows, heads, "lllrl")]


def _counters(found: Found) -> list[str]:
    c = found.counters
    return [
        f"searched {c.evaluated:,} legal layouts in {format_seconds(c.seconds)} "
        f"({format_count(round(c.plans_per_second_per_core))} a second on one core): "
        f"{c.fit:,} fit, {c.simulated} run event by event in {format_seconds(c.seconds_simulation)}"
    ]
