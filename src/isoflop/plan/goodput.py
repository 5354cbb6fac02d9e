"""Goodput: the share of wall time that advances training, under failures and checkpoints.

Failures strike at random, at a constant rate. Between them a run trains for an interval,
stalls while a checkpoint is taken, and goes on; the checkpoint counts once it is written,
`seconds_lag` after the stall. A failure loses what was trained since the state of the last
checkpoint that counts, and the time of the restart. With M the mean time between failures
of the whole run, tau the interval, delta the stall, l the lag and R the restart,

    goodput = tau e^(-(R + l) / M) / (M (e^((tau + delta) / M) - 1)).

Blocking checkpoints have no lag; that is Daly 2006 (Future Generation Computer Systems 22,
303), equation 20. With a lag: an attempt that follows a failure must last l longer before its
first checkpoint counts, so the mean number of checkpoints per failure is e^(-l / M) as large.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

from isoflop.errors import Infeasible, InputError, Problem
from isoflop.plan.assumed import (
    HOST_RATE,
    HOURS_BETWEEN_FAILURES,
    OVERRUN,
    SECONDS_RESTART,
    STORAGE_RATE,
    choose,
)
from isoflop.quantity import (
    Basis,
    Expr,
    Interval,
    Node,
    Symbol,
    alias,
    branch,
    expm1,
    leaf,
    maximum,
    number,
    sqrt,
    where,
)
from isoflop.quantity.basis import NORMAL_90
from isoflop.quantity.units import format_seconds

#: How lucky a run is with its failures: the number of standard deviations above the mean.
LUCK = Symbol(
    "failure_luck",
    0,
    Basis.MODELLED,
    Interval(-NORMAL_90, NORMAL_90),
    meaning="chance in the number and the moments of failures, in standard deviations",
)


#: Beyond this many times the time between failures, under 1 % of the time trains.
MOST_LOST = 5.0


class NeverEnds(Infeasible):
    """Failures come faster than training gets on."""


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How a run goes on between failures; every field in seconds.

    between_failures: mean, of the whole run. interval: training from one checkpoint to the
    next. stall: training waits for each checkpoint. lag: from the end of the stall until the
    checkpoint is safe. restart: from a failure until training goes on.

    >>> hour = Rhythm(number(8 * 3600), number(1800), number(60), number(0), number(600))
    >>> round(hour.goodput.value, 3)
    0.918
    """

    between_failures: Expr
    interval: Expr
    stall: Expr
    lag: Expr
    restart: Expr

    @property
    def goodput(self) -> Expr:
        """Share of wall time that advances training, in the mean over long runs."""
        return 1 / self.slowdown

    @property
    def slowdown(self) -> Expr:
        """Wall time over training time: one over goodput, a product that never rounds to 0."""
        M, period = self.between_failures, self.interval + self.stall
        tries = 1 + expm1((self.restart + self.lag) / M)
        return M * expm1(period / M) * tries / self.interval

    def check(self) -> None:
        """Refuse a run that hardly gets on.

        Raises:
            NeverEnds: what one failure costs is `MOST_LOST` times what lies between two or more.
        """
        between = float(self.between_failures.value)
        lost = float((self.restart + self.lag + self.interval + self.stall).value)
        if lost > MOST_LOST * between:
            raise NeverEnds(
                f"the run never ends: a failure every {format_seconds(between)}, and each takes up "
                f"to {format_seconds(lost)}; what would help: fewer accelerators, more hours between "
                "failures, or a faster restart"
            )

    def seconds_wall(self, seconds_training: Expr) -> Expr:
        """Wall time of a run that trains for `seconds_training`, chance included.

        The middle is `seconds_training` over goodput.
        """
        kept = seconds_training + self.seconds_stalled(seconds_training)
        return kept + self.seconds_failing(seconds_training)

    def seconds_stalled(self, seconds_training: Expr) -> Expr:
        """What checkpoints cost a run that trains for `seconds_training`."""
        return seconds_training * (self.stall / self.interval)

    def seconds_failing(self, seconds_training: Expr) -> Expr:
        """What failures cost a run that trains for `seconds_training`.

        Chance is that of a compound Poisson process, taken as normal: each failure costs the
        restart, the lag and a uniform share of a period. First order: right where failures are
        many and much rarer than checkpoints. The luckiest run has none; none gives time back.
        """
        mean = seconds_training * self.slowdown
        fixed, period = self.restart + self.lag, self.interval + self.stall
        square = fixed * fixed + fixed * period + period * period / 3
        chance = LUCK * sqrt(mean / self.between_failures * square)
        expected = mean - seconds_training - self.seconds_stalled(seconds_training)
        return maximum(expected + chance, 0)

    def wall(self, seconds_training: Expr) -> Node:
        """`seconds_wall` as a tree: the steps, the stalls of checkpoints, and what failures cost.

        >>> hour = Rhythm(number(8 * 3600), number(1800), number(60), number(0), number(600))
        >>> [round(float(child.value)) for child in hour.wall(number(10**6)).children]
        [1000000, 33333, 56570]
        """
        parts = {
            "steps": seconds_training,
            "checkpoints": self.seconds_stalled(seconds_training),
            "failures": self.seconds_failing(seconds_training),
        }
        return branch("seconds_wall", "seconds", [
            leaf(name, "seconds", size, basis=Basis.MODELLED) for name, size in parts.items()
        ])  # fmt: skip

    def nodes(self, days: Node) -> dict[str, Node]:
        """What a run of so many days of wall time meets, by name."""
        wall = 86_400 * alias("days", days.total)
        modelled: dict[str, tuple[str, Expr]] = {
            "goodput": ("", self.goodput),
            "failures": ("failures", self.failures(wall)),
            "probability_of_failure": ("", self.probability_of_failure(wall)),
            "seconds_checkpoint_interval": ("seconds", self.interval),
        }
        return {n: leaf(n, u, e, basis=Basis.MODELLED) for n, (u, e) in modelled.items()}

    def failures(self, seconds_wall: Expr) -> Expr:
        """Expected number of failures in `seconds_wall`."""
        return seconds_wall / self.between_failures

    def probability_of_failure(self, seconds_wall: Expr) -> Expr:
        """The probability of at least one failure."""
        return -1 * expm1(-1 * self.failures(seconds_wall))


@dataclass(frozen=True, slots=True)
class Trouble:
    """What is known of all that keeps a run from its steps; None is as assumed.

    `mtbf_hours` lie between failures of one accelerator, in the mean, and `seconds_restart` pass
    until the run trains again; `overrun` is what the run takes over steps, checkpoints and
    failures.
    """

    mtbf_hours: float | None = None
    seconds_restart: float | None = None
    overrun: float | None = None

    def rhythm(self, bytes_checkpoint: Expr, n_accelerators: Symbol) -> Rhythm:
        """The rhythm of a run under this trouble.

        Raises:
            NeverEnds: the run hardly gets on.
        """
        beat = rhythm(
            bytes_checkpoint,
            n_accelerators,
            hours_between_failures=choose(HOURS_BETWEEN_FAILURES, self.mtbf_hours),
            seconds_restart=choose(SECONDS_RESTART, self.seconds_restart),
        )
        beat.check()
        return beat

    def wall(self, beat: Rhythm, seconds_training: Expr) -> Node:
        """Wall time as a tree: that of the rhythm, and what the run takes beyond it."""
        planned = beat.wall(seconds_training)
        more = alias("seconds_planned", planned.total) * (choose(OVERRUN, self.overrun) - 1)
        beyond = leaf("overrun", "seconds", more, basis=Basis.MODELLED)
        return branch(planned.name, "seconds", [*planned.children, beyond])


def interval_young(stall: Expr, between_failures: Expr) -> Expr:
    """The best checkpoint interval to first order (Young 1974, CACM 17, 530).

    >>> round(interval_young(number(30), number(2.8 * 3600)).value)
    778
    """
    return sqrt(2 * stall * between_failures)


def interval_daly(stall: Expr, between_failures: Expr) -> Expr:
    """The best checkpoint interval to higher order (Daly 2006, equation 37).

    >>> round(interval_daly(number(30), number(2.8 * 3600)).value)
    758
    """
    half = stall / (2 * between_failures)
    best = interval_young(stall, between_failures) * (1 + sqrt(half) / 3 + half / 9) - stall
    return where(2 * between_failures - stall, best, between_failures)


def rhythm(
    bytes_checkpoint: Expr,
    n_accelerators: Symbol,
    *,
    blocking: bool = False,
    hours_between_failures: Symbol = HOURS_BETWEEN_FAILURES,
    seconds_restart: Symbol = SECONDS_RESTART,
) -> Rhythm:
    """The rhythm of a run whose accelerators each write their part of a checkpoint.

    `hours_between_failures` is for one accelerator: a run stops where any of them does. A
    checkpoint is copied to the host's memory while training waits, and written from there
    while it goes on; `blocking` makes training wait for storage. The interval is Daly's, and
    no shorter than a write takes.

    >>> run = rhythm(number(5.7e12), Symbol("n_accelerators_used", 16384))
    >>> round(float(run.between_failures.value) / 3600, 2), round(run.goodput.value, 2)
    (2.75, 0.93)
    """
    part = bytes_checkpoint / n_accelerators
    between = 3600 * hours_between_failures / n_accelerators
    write = part / STORAGE_RATE
    stall, lag = (write, number(0)) if blocking else (part / HOST_RATE, write)
    interval = maximum(interval_daly(stall, between), lag)
    return Rhythm(between, interval, stall, lag, seconds_restart)


def slowdown_stragglers(n_accelerators: int, deviation: Expr) -> Expr:
    """How much longer a step takes because it waits for the slowest of `n_accelerators`.

    `deviation` is the standard deviation of one accelerator's time over its mean, taken as
    normal; the largest of n is Blom's approximation (Blom 1958). For the time of one healthy
    accelerator only: a step measured on a whole cluster holds its stragglers already.

    Raises:
        InputError: `n_accelerators` is below 1.

    >>> round(slowdown_stragglers(1024, number(0.01)).value, 3)
    1.032
    """
    if n_accelerators < 1:
        raise InputError("stragglers", [Problem("n_accelerators", n_accelerators, "is at least 1")])
    rank = (n_accelerators - 0.375) / (n_accelerators + 0.25)
    slowest = Symbol(
        "slowest_of_all",
        NormalDist().inv_cdf(rank),
        Basis.MODELLED,
        meaning=f"mean of the largest of {n_accelerators} standard normal values",
    )
    return 1 + slowest * deviation
