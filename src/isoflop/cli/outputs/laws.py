"""JSON of laws, fit and predict."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from isoflop.cli.outputs.base import Command, Interval, Out


class Law(Out):
    name: str
    A: float
    B: float
    E: float
    alpha: float
    beta: float
    source: str
    params_convention: str
    note: str


class Optimum(Out):
    params: float
    tokens: float
    loss: float
    tokens_per_param: float
    flops: float


class PublishedLaw(Law):
    optima: list[Optimum]


class Laws(Command):
    laws: list[PublishedLaw]


class Dropped(Out):
    row: int
    params: float
    tokens: float
    loss: float
    reason: str


class Prediction(Out):
    params: float
    tokens: float
    loss: float
    interval: Interval | None
    interval_reason: str
    extrapolation_params: float
    extrapolation_tokens: float
    extrapolation_flops: float


class FitBody(BaseModel):
    """A fitted law and its confession."""

    model_config = ConfigDict(extra="forbid")
    law: Law
    objective: float
    delta: float
    slope: float
    converged: bool
    intervals: dict[str, Interval | None]
    intervals_reason: str
    bootstrap: int
    starts_tried: int
    starts_agreeing: int
    tied: str
    tied_reason: str
    condition: float | None
    identifiable: str
    n_points: int
    dropped: list[Dropped]
    params_span: tuple[float, float]
    tokens_span: tuple[float, float]
    flops_span: tuple[float, float]
    rms_log_residual: float
    rms_left_out: float
    resampling: str
    seed: int


class Fit(FitBody):
    schema_: Literal["isoflop/1"] = Field(alias="schema")
    command: str
    tokens_source: str
    predictions: list[Prediction]


class Predict(Command):
    law: Law
    loss: float
    params: float
    tokens: float
    flops: float | None = None
    tokens_per_param: float | None = None
