"""Predicted against measured: a step's seconds and its memory peak, and each operator's part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isoflop.arch.spec import Arch
from isoflop.check.measure import REFERENCE, Measured, Task, measure_steps
from isoflop.count.workload import Workload
from isoflop.hardware.profile import Profile
from isoflop.plan.cost import step_cost, untimed
from isoflop.plan.memory.peak import peak_memory
from isoflop.quantity import Interval, Node

#: Steps are timed for at most this long, and at least three of them.
SECONDS_MOST = 10.0


@dataclass(frozen=True, slots=True)
class Line:
    """One number, predicted and measured. `error` is (predicted - measured) / measured.

    >>> Line(9.0, 10.0).error
    -0.1
    """

    predicted: float
    measured: float
    interval: Interval | None = None

    @property
    def error(self) -> float:
        return (self.predicted - self.measured) / self.measured

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "predicted": self.predicted,
            "measured": self.measured,
            "error": self.error,
        }
        return out if self.interval is None else out | {"interval": self.interval.to_json()}


@dataclass(frozen=True, slots=True)
class RunCheck:
    """A real run beside its prediction.

    Attributes:
        run: `seconds_step` and `bytes_peak`, the latter above PyTorch just imported.
        rows: seconds of each operator by `phase/path`; measured under a profiler, which
            adds about a microsecond to each operation. Paths that the description does
            not have (`gradients`, adding up in place) are predicted 0.
        pace: how much slower the machine was than when calibrated, by reference kernels
            timed between the steps; the predicted seconds are at that pace.
        cost, peak: the predictions as trees.
        untimed: kernels that the model runs and the profile, made by an earlier version, lacks:
            attention is then predicted as fused, dropout as nothing, which is too little.
        measured: everything that was measured.
    """

    run: Mapping[str, Line]
    rows: Mapping[str, Line]
    pace: float
    cost: Node
    peak: Node
    measured: Measured
    untimed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "run": {name: line.to_json() for name, line in self.run.items()},
            "rows": {
                path: {"predicted": line.predicted, "measured": line.measured}
                for path, line in self.rows.items()
            },
            "pace": self.pace,
            "steps": len(self.measured.seconds_steps),
            "seconds_cpu": self.measured.seconds_cpu,
            "peak_source": self.measured.peak_source,
            "untimed": list(self.untimed),
        }


def check_run(
    arch: Arch,
    *,
    batch: int,
    seq_len: int,
    profile: Profile,
    steps: int = 400,
    seconds_most: float = SECONDS_MOST,
) -> RunCheck:
    """Predict a training step, then run it in a fresh process with the profile's threads.

    Raises:
        InputError: the spec holds what isoflop does not describe or build.
        UnknownName: the profile lacks a curve that the model needs.
        Fault: the measuring process failed.
    """
    workload = Workload.train(batch, seq_len)
    peak = peak_memory(arch, workload, profile)
    task = Task(arch, batch, seq_len, profile.machine.n_threads, steps, seconds_most, traced=True)
    (measured,) = measure_steps(task)
    pace = pace_of(measured.reference, profile)
    cost = step_cost(arch, workload, profile, pace)
    return RunCheck(
        run={
            "seconds_step": Line(float(cost.value), measured.seconds_step, cost.interval),
            "bytes_peak": Line(float(peak.value), measured.bytes_peak, peak.interval),
        },
        rows=_rows(predicted_seconds(cost), measured.rows),
        pace=pace,
        cost=cost,
        peak=peak,
        measured=measured,
        untimed=untimed(arch, workload, profile),
    )


def pace_of(reference: Mapping[str, float], profile: Profile) -> float:
    """How much slower the machine was during the run than while it was calibrated.

    The geometric mean over kernels that know nothing of the model, timed between its steps.
    """
    ratios = [
        reference[kernel + phase] / profile.curve(kernel + phase).at(*sizes)
        for kernel, sizes in REFERENCE.items()
        for phase in ("_forward", "_backward")
    ]
    return math.prod(ratios) ** (1 / len(ratios))


def predicted_seconds(cost: Node) -> dict[str, float]:
    """Seconds of each leaf of a step's cost, all copies; the optimizer as one."""
    found: dict[str, float] = {}
    for path, node in cost.leaves().items():
        name = "optimizer" if path.startswith("optimizer/") else path
        found[name] = found.get(name, 0.0) + float(node.value * cost.copies(path))
    return found


def _rows(predicted: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, Line]:
    paths = [*predicted, *(path for path in measured if path not in predicted)]
    return {path: Line(predicted.get(path, 0.0), measured.get(path, 0.0)) for path in paths}
