"""JSON of plan train and plan serve."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from isoflop.cli.outputs.base import Command, Interval, Node, Number, Out


class Assumption(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    name: str
    value: Number | None
    meaning: str


class Layout(Out):
    tp: int
    pp: int
    dp: int
    zero: int
    micro_batch: int
    cp: int
    ep: int
    virtual: int
    sequence_parallel: bool


class Refusal(Out):
    layout: Layout
    bytes_needed: int
    bytes_available: int
    largest: str
    largest_share: float
    text: str


class QuotedFigure(Out):
    name: str
    quoted: Number
    derived: Number | None
    difference: float | None
    not_stated: list[str]
    formula: str | None
    numbers: str | None


class Quoted(Out):
    """What one source says that training the model takes."""

    by: str
    source: str
    machine: str | None
    inputs: dict[str, Number | str]
    flops: Number
    mfu_implied: float | None
    figures: list[QuotedFigure]


class PlanTrain(Command):
    model: str
    cluster: dict[str, Any]
    tokens: int
    seq_len: int
    global_batch: int
    precision: str
    recompute: str
    convention: str
    flops: Number
    flops_hardware: Number
    flops_6nd: Number
    accelerator_hours: float
    days: float
    energy_mwh: float
    tonnes_co2e: float
    dollars: float
    bytes_per_accelerator: Number
    layout: Layout
    n_idle: int
    binding: str
    intervals: dict[str, Interval]
    assumptions: list[Assumption]
    refused: list[Refusal]
    quoted: list[Quoted]
    breakdown: dict[str, Node]


class PlanServe(Command):
    model: str
    cluster: dict[str, Any]
    input_tokens: int
    output_tokens: int
    batch: int
    batch_max: int
    precision: str
    kv_precision: str
    precision_compute: str
    tp: int
    pp: int
    n_copies: int
    accelerators_min: int
    accelerators_min_tensor: int | None
    memory: Node
    shares: dict[str, float]
    bytes_per_accelerator: Number
    seconds_prefill: float
    seconds_per_token: float
    tokens_per_second: float
    tokens_per_second_decode: float
    dollars_per_million_tokens: float
    intervals: dict[str, Interval]
    assumptions: list[Assumption]
    breakdown: dict[str, Node]
