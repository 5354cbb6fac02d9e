"""JSON of validate."""

from __future__ import annotations

from typing import Literal

from isoflop.cli.outputs.base import Command, Out


class Row(Out):
    """One measurement; `error` is predicted / measured - 1, null where `skipped` says why."""

    row_id: str
    family: str
    group: str
    model: str
    unit: str
    measured: float | None
    predicted: float | None
    low: float | None
    high: float | None
    error: float | None
    skipped: str | None


class Score(Out):
    """Relative errors of `n` rows; null where there are none, or no ranges."""

    name: str
    n: int
    mape: float | None
    median: float | None
    p90: float | None
    max: float | None
    bias: float | None
    coverage: float | None
    coverage_p: float | None
    width: float | None


class Noise(Out):
    name: str
    n_configurations: int
    n_pairs: int
    median: float
    mean: float


class Assumed(Out):
    what: str
    rows: int


class Validate(Command):
    """`rows`, `families`, `chips` and `overall` are by the method `headline`."""

    source: str
    kind: Literal["step", "memory", "run"]
    headline: Literal["as shipped", "in-sample", "source left out", "chip left out"]
    rows: list[Row]
    families: list[Score]
    chips: list[Score]
    overall: Score
    methods: list[Score]
    baselines: list[Score]
    noise_floor: list[Noise]
    assumed: list[Assumed]
