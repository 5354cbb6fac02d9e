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
    sort: str
    known: bool | None


class Score(Out):
    """Relative errors of `n` rows; null where there are none, or no ranges."""

    name: str
    n: int
    mape: float | None
    median: float | None
    p90: float | None
    max: float | None
    bias: float | None
    bias_error: float | None
    coverage: float | None
    coverage_p: float | None
    width: float | None


class Miss(Out):
    """A mean error above its aim, or a bias beyond twice its standard error."""

    what: Literal["mean", "bias"]
    of: str
    n: int
    value: float
    beyond: float


class Missing(Out):
    """What predictions are known to lack, with the rows that show it; "not known" where nothing is."""

    what: str
    source: str
    rows: int
    bias: float


class WidthPart(Out):
    """An uncertain number's share of the squared width of ranges, and what would pin it."""

    name: str
    share: float
    pinned_by: str


class Family(Score):
    """`misses` and `missing` are empty where the family meets its aim without a bias."""

    misses: list[Miss]
    missing: list[Missing]
    width_from: list[WidthPart]


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
    headline: Literal[
        "as shipped", "in-sample", "source left out", "chip left out", "model left out"
    ]
    rows: list[Row]
    families: list[Family]
    chips: list[Score]
    overall: Score
    stacks: list[Score]
    methods: list[Score]
    baselines: list[Score]
    noise_floor: list[Noise]
    assumed: list[Assumed]
