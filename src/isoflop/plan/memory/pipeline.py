"""What every rank of a pipeline holds, and when: its timelines on the clock of one step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from isoflop.count.blocks import beside
from isoflop.errors import InputError
from isoflop.plan.memory.timeline import Moment, Timeline, memory_timeline
from isoflop.plan.schedule import (
    Durations,
    Simulation,
    orders,
    simulate,
)
from isoflop.plan.schedule.kinds import n_stages
from isoflop.plan.step.setting import Setting
from isoflop.quantity.expr import Value

#: Forwards that a backward takes: two products for one (Kaplan 2020, 2.1).
BACKWARD = 2


class Held(NamedTuple):
    """What a rank holds from when to when, in forwards of one micro-batch on one stage."""

    start: Value
    end: Value
    moment: Moment


@dataclass(frozen=True, slots=True)
class PipelineMemory:
    """A step of all ranks, each rank's moments in order, the optimizer's step last.

    Times suppose stages that take equally long, a backward as two forwards; what is held when
    depends on the order of work alone.
    """

    ranks: tuple[tuple[Held, ...], ...]
    bytes_available: Value

    @property
    def end(self) -> Value:
        return max(row[-1].end for row in self.ranks)

    @property
    def peak(self) -> tuple[int, Held]:
        """The rank that holds the most, and its first moment that does."""
        best = [max(row, key=lambda held: held.moment.bytes) for row in self.ranks]
        rank = max(range(len(best)), key=lambda r: best[r].moment.bytes)
        return rank, best[rank]

    def to_json(self) -> dict[str, Any]:
        rank, held = self.peak
        return {
            "unit": "bytes",
            "unit_of_time": "forwards of one micro-batch on one stage",
            "bytes_available": float(self.bytes_available),
            "peak": {"rank": rank, **_json(held)},
            "ranks": [[_json(h) for h in row] for row in self.ranks],
        }


def _json(held: Held) -> dict[str, Any]:
    parts = {name: float(size) for name, size in held.moment.parts}
    return {
        "when": held.moment.when,
        "start": float(held.start),
        "end": float(held.end),
        "bytes": float(held.moment.bytes),
        "parts": parts,
    }


def without_gaps(row: tuple[Held, ...]) -> tuple[Held, ...]:
    """A rank's moments with what it holds while it waits: the less of before and after.

    It has begun nothing before its first moment, and what a backward used is gone after it.
    """
    idle = Held(0, 0, row[-1].moment)  # the optimizer's step holds no activations
    found: list[Held] = []
    for before, after in pairwise([idle, *row]):
        if after.start > before.end:
            less = min(before.moment, after.moment, key=lambda moment: moment.bytes)
            found.append(Held(before.end, after.start, less))
        found.append(after)
    return tuple(found)


def memory_of_pipeline(setting: Setting) -> PipelineMemory:
    """What every rank holds through a step of `setting`.

    Raises:
        InputError: a model with a tower beside its decoder, or fewer layers than stages.

    >>> from isoflop.arch import gpt
    >>> from isoflop.hardware import parse_cluster
    >>> from isoflop.plan.layout import Layout
    >>> small = gpt("small", d_model=64, n_layers=4, n_heads=4, vocab_size=99, max_seq_len=64)
    >>> setting = Setting(small, parse_cluster("2xa100-sxm-80gb"), Layout(pp=2), 64, 3)
    >>> rank, held = memory_of_pipeline(setting).peak
    >>> rank, held.moment.when, held.start
    (0, 'F1', 1)
    """
    if towers := beside(setting.arch, "is None: a pipeline is of a decoder's layers"):
        raise InputError("timeline", towers)
    schedule, pp = setting.layout.pipeline, setting.layout.pp
    step = simulate(
        orders(schedule, pp, setting.n_micro_batches),
        Durations.equal(n_stages(schedule, pp), 1, BACKWARD),
    )
    lines = [memory_timeline(setting, rank) for rank in range(pp)]
    available = setting.cluster.chip.bytes_memory.value
    return PipelineMemory(tuple(_placed(line, step) for line in lines), available)


def _placed(line: Timeline, step: Simulation) -> tuple[Held, ...]:
    """A rank's moments at the times of its slots; the optimizer waits for all ranks."""
    *moments, last = line.moments
    spans = step.spans[line.rank]
    held = [Held(s.start, s.end, moment) for s, moment in zip(spans, moments, strict=True)]
    return (*held, Held(step.seconds, step.seconds + 1, last))
