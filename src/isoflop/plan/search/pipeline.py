"""Found layouts' pipelines run event by event, with stages of their own lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from isoflop.count.stages import layers_of_stage
from isoflop.plan.schedule import Durations, n_stages, orders, simulate
from isoflop.plan.search.alike import evaluated
from isoflop.plan.step.rank_work import DIRECTIONS
from isoflop.plan.step.seconds import step_pieces
from isoflop.plan.step.setting import Setting
from isoflop.quantity import Expr

#: A pipeline repeats itself once it is full: after so many micro-batches per stage each more
#: takes as long as those before it, and only that many are run. Where stages differ it fills
#: more slowly: seven stages with short ends are then 6e-5 off a run of all 96.
FULL_AFTER = 3

#: Seconds forward, backward, and of backward those of the weights' gradients.
Passed: TypeAlias = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Seconds:
    """`isoflop.plan.step.seconds.Pieces` in numbers."""

    layers: Mapping[str, Passed]
    first: Passed
    last: Passed
    traffic: float
    send: float
    hidden: float
    once: float
    error: float


def seconds_simulated(settings: Sequence[Setting]) -> list[float]:
    """Seconds of each step with its pipeline simulated; the rest is that of `step_time`."""
    numbers = [
        _numbers(s, run()) for s, run in zip(settings, evaluated(settings, _flat), strict=True)
    ]
    return [_whole(setting, seconds) for setting, seconds in zip(settings, numbers, strict=True)]


def _flat(setting: Setting) -> list[Expr]:
    """The pieces of a step in a row, those of layers in the order of the kinds."""
    pieces = step_pieces(setting)
    passes = [*(pieces.layers[kind] for kind in setting.arch.kinds), pieces.first, pieces.last]
    rows = [p.of(direction) for p in passes for direction in DIRECTIONS]
    return [*rows, pieces.traffic, pieces.send, pieces.hidden, pieces.once, pieces.error]


def _numbers(setting: Setting, flat: Sequence[float]) -> Seconds:
    """The row read back."""
    *rows, traffic, send, hidden, once, error = map(float, flat)
    *layers, first, last = zip(rows[::3], rows[1::3], rows[2::3], strict=True)
    kinds = dict(zip(setting.arch.kinds, layers, strict=True))
    return Seconds(kinds, first, last, traffic, send, hidden, once, error)


def _whole(setting: Setting, seconds: Seconds) -> float:
    """A step: its pipeline, and what comes once."""
    pp, n_micro = setting.layout.pp, setting.n_micro_batches
    schedule, durations = setting.layout.pipeline, durations_of(setting, seconds)

    def run(n: int) -> float:
        return float(simulate(orders(schedule, pp, n), durations).seconds)

    full = FULL_AFTER * pp + n_micro % pp
    if n_micro <= full + pp:
        pipeline = run(n_micro)
    else:
        earlier, later = run(full), run(full + pp)
        pipeline = later + (n_micro - full - pp) * (later - earlier) / pp
    return seconds.error * (pipeline + seconds.once)


def durations_of(setting: Setting, seconds: Seconds) -> Durations:
    """Seconds of one micro-batch through each stage of the schedule.

    Traffic goes with forward and backward in the proportion of their work.
    """
    arch, count = setting.arch, n_stages(setting.layout.pipeline, setting.layout.pp)
    layers = {kind: _with_traffic(row, seconds.traffic) for kind, row in seconds.layers.items()}
    rows = []
    for stage in range(count):
        own = [layers[arch.layers[i].name] for i in layers_of_stage(arch.n_layers, count, stage)]
        own += [seconds.first] if stage == 0 else []
        own += [seconds.last] if stage == count - 1 else []
        rows.append([sum(row[i] for row in own) for i in range(len(DIRECTIONS))])
    forward, backward, weights = zip(*rows, strict=True)
    return Durations(forward, backward, weights, seconds.send, seconds.hidden)


def _with_traffic(passed: Passed, traffic: float) -> Passed:
    forward, backward, weights = passed
    more = 1 + traffic / (forward + backward)
    return more * forward, more * backward, weights
