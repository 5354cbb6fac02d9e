"""Found layouts' pipelines run event by event, with stages of their own lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from isoflop.count.stages import layers_of_stage
from isoflop.plan.schedule import Durations, Interleaved, OneFOneB, Schedule, orders, simulate
from isoflop.plan.search.alike import evaluated
from isoflop.plan.step.seconds import step_pieces
from isoflop.plan.step.setting import Setting
from isoflop.quantity import Expr

#: A pipeline repeats itself once it is full: after so many micro-batches per stage each more
#: takes as long as those before it, and only that many are run. Where stages differ it fills
#: more slowly: seven stages with short ends are then 6e-5 off a run of all 96.
FULL_AFTER = 3

#: Seconds forward and backward.
Pair: TypeAlias = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Seconds:
    """`isoflop.plan.step.seconds.Pieces` in numbers."""

    layers: Mapping[str, Pair]
    first: Pair
    last: Pair
    traffic: float
    send: float
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
    pairs = [seconds for p in passes for seconds in (p.forward, p.backward)]
    return [*pairs, pieces.traffic, pieces.send, pieces.once, pieces.error]


def _numbers(setting: Setting, flat: Sequence[float]) -> Seconds:
    """The row read back."""
    *pairs, traffic, send, once, error = map(float, flat)
    *layers, first, last = zip(pairs[::2], pairs[1::2], strict=True)
    kinds = dict(zip(setting.arch.kinds, layers, strict=True))
    return Seconds(kinds, first, last, traffic, send, once, error)


def _whole(setting: Setting, seconds: Seconds) -> float:
    """A step: its pipeline, and what comes once."""
    pp, n_micro = setting.layout.pp, setting.n_micro_batches
    schedule, durations = schedule_of(setting), durations_of(setting, seconds)

    def run(n: int) -> float:
        return float(simulate(orders(schedule, pp, n), durations).seconds)

    full = FULL_AFTER * pp + n_micro % pp
    if n_micro <= full + pp:
        pipeline = run(n_micro)
    else:
        earlier, later = run(full), run(full + pp)
        pipeline = later + (n_micro - full - pp) * (later - earlier) / pp
    return seconds.error * (pipeline + seconds.once)


def schedule_of(setting: Setting) -> Schedule:
    virtual = setting.layout.virtual
    return Interleaved(virtual) if virtual > 1 else OneFOneB()


def durations_of(setting: Setting, seconds: Seconds) -> Durations:
    """Seconds of one micro-batch through each chunk of layers.

    Traffic goes with forward and backward in the proportion of their work.
    """
    arch, n_chunks = setting.arch, setting.layout.pp * setting.layout.virtual
    layers = {kind: _with_traffic(pair, seconds.traffic) for kind, pair in seconds.layers.items()}
    rows = []
    for chunk in range(n_chunks):
        own = [layers[arch.layers[i].name] for i in layers_of_stage(arch.n_layers, n_chunks, chunk)]
        own += [seconds.first] if chunk == 0 else []
        own += [seconds.last] if chunk == n_chunks - 1 else []
        rows.append((sum(f for f, _ in own), sum(b for _, b in own)))
    forward, backward = zip(*rows, strict=True)
    return Durations(forward, backward, (0.0,) * n_chunks, seconds.send)


def _with_traffic(pair: Pair, traffic: float) -> Pair:
    forward, backward = pair
    more = 1 + traffic / (forward + backward)
    return more * forward, more * backward
