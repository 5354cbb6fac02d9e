"""A found layout's pipeline run event by event, with stages of their own lengths."""

from __future__ import annotations

from isoflop.count.stages import layers_of_stage
from isoflop.plan.schedule import Durations, Interleaved, OneFOneB, Schedule, orders, simulate
from isoflop.plan.setting import Setting
from isoflop.plan.step import Passes, Pieces, step_pieces

#: A pipeline repeats itself once it is full: after so many micro-batches per stage each more
#: takes as long as those before it, and only that many are run.
FULL_AFTER = 3


def schedule_of(setting: Setting) -> Schedule:
    virtual = setting.layout.virtual
    return Interleaved(virtual) if virtual > 1 else OneFOneB()


def seconds_simulated(setting: Setting) -> float:
    """Seconds of a step whose pipeline is simulated; the rest is that of `step_time`."""
    pieces = step_pieces(setting)
    pp, n_micro = setting.layout.pp, setting.n_micro_batches
    durations, schedule = durations_of(setting, pieces), schedule_of(setting)

    def run(n: int) -> float:
        return float(simulate(orders(schedule, pp, n), durations).seconds)

    full = FULL_AFTER * pp
    if n_micro <= full + pp:
        pipeline = run(n_micro)
    else:
        earlier, later = run(full), run(full + pp)
        pipeline = later + (n_micro - full - pp) * (later - earlier) / pp
    return float(pieces.error.value) * (pipeline + float(pieces.once.value))


def durations_of(setting: Setting, pieces: Pieces) -> Durations:
    """Seconds of one micro-batch through each chunk of layers.

    Traffic goes with forward and backward in the proportion of their work.
    """
    arch, n_chunks = setting.arch, setting.layout.pp * setting.layout.virtual
    layers = {
        name: _seconds(passes, float(pieces.traffic.value))
        for name, passes in pieces.layers.items()
    }
    rows = []
    for chunk in range(n_chunks):
        own = [layers[arch.layers[i].name] for i in layers_of_stage(arch.n_layers, n_chunks, chunk)]
        own += [_seconds(pieces.first)] if chunk == 0 else []
        own += [_seconds(pieces.last)] if chunk == n_chunks - 1 else []
        rows.append((sum(f for f, _ in own), sum(b for _, b in own)))
    forward, backward = zip(*rows, strict=True)
    return Durations(forward, backward, (0.0,) * n_chunks, float(pieces.send.value))


def _seconds(passes: Passes, traffic: float = 0.0) -> tuple[float, float]:
    forward, backward = float(passes.forward.value), float(passes.backward.value)
    whole = forward + backward
    more = 1 + traffic / whole if whole else 1.0
    return more * forward, more * backward
