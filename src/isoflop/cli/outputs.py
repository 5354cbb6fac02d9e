"""The published form of every command's JSON; `isoflop schema` prints it as JSON Schema.

Commands build plain dicts and never import this module; tests validate what they print
against it, so neither can drift from the other.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Number: TypeAlias = int | float
Basis: TypeAlias = Literal["exact", "datasheet", "measured", "fitted", "modelled", "assumed"]


class Out(BaseModel):
    """A JSON object with these keys and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Command(Out):
    """What every command's output begins with."""

    schema_: Literal["isoflop/1"] = Field(alias="schema")
    command: str


class Interval(Out):
    low: float
    high: float
    level: float


class Node(Out):
    """One number of a breakdown: a branch has children per copy, a leaf a formula."""

    name: str
    unit: str
    value: Number
    basis: list[Basis]
    times: Number | None = None
    interval: Interval | None = None
    source: str | None = None
    children: list[Node] | None = None
    formula: str | None = None
    numbers: str | None = None


# --- models, show, count, explain, hardware -----------------------------------------------


class Model(Out):
    name: str
    params: int
    published: int | None
    source: str
    published_source: str
    note: str


class Models(Command):
    models: list[Model]


class Show(Command):
    model: str
    spec: dict[str, Any]


class CountWorkload(Out):
    batch: int
    seq_len: int
    precision: str


class CountParams(Out):
    total: int
    active: int
    embedding: int
    conventions: dict[str, int]
    tree: Node


class CountMemory(BaseModel):
    """Bytes by part; which parts depends on inference or training."""

    model_config = ConfigDict(extra="allow", strict=True)
    bytes_total: Number
    bytes_kv_cache: Number
    bytes_weights: Number
    tree: Node


class CountFlops(Out):
    forward: Number
    training: Number
    training_6n: Number
    convention: str
    conventions: dict[str, Number]
    tree: Node


class CountFinetune(Out):
    rank: int
    targets: list[str]
    base: str | None
    params_trained: int
    share_trained: float
    tree: Node


class Count(Command):
    model: str
    workload: CountWorkload
    params: CountParams
    memory: CountMemory
    flops: CountFlops
    finetune: CountFinetune | None = None


class Quantity(Out):
    quantity: str
    path: str
    unit: str
    value: Number
    formula: str
    numbers: str
    copies: Number
    share: float
    basis: list[Basis]
    source: str
    letters: dict[str, str]


class Explain(Command):
    model: str
    path: str
    quantities: list[Quantity]


class ChipNumber(Out):
    value: Number
    basis: Basis
    source: str
    interval: Interval | None = None
    note: str | None = None


class Chip(Out):
    name: str
    vendor: str
    year: int
    per_node: int
    numbers: dict[str, ChipNumber]
    not_stated: list[str]


class Machine(Out):
    """A node: chips in one machine, and the chips that its fast link joins."""

    name: str
    chip: str
    chips: int
    domain: int
    bytes_per_second_network: ChipNumber | None
    source: str


class Hardware(Command):
    hardware: list[Chip]
    nodes: list[Machine]


# --- plans ------------------------------------------------------------------------------


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


class Refusal(Out):
    layout: Layout
    bytes_needed: int
    bytes_available: int
    largest: str
    largest_share: float
    text: str


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
    dollars: float
    bytes_per_accelerator: Number
    layout: Layout
    n_idle: int
    binding: str
    intervals: dict[str, Interval]
    assumptions: list[Assumption]
    refused: list[Refusal]
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


# --- laws -------------------------------------------------------------------------------


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


# --- check, train, demo -----------------------------------------------------------------


class Row(Out):
    path: str
    derived: int
    built: int
    equal: bool


class Compared(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    predicted: float
    measured: float
    error: float


class RunCheck(Out):
    seconds_step: Compared
    bytes_peak: Compared
    pace: float
    steps: int
    seconds_cpu: float
    peak_source: str


class OperatorSeconds(Out):
    """Seconds of one operator in a step, all copies; measured under a profiler."""

    path: str
    predicted: float
    measured: float


class Calibrate(Command):
    output: str
    profile: dict[str, Any]


class Check(Command):
    model: str
    rows: list[Row]
    disagreements: int
    run: RunCheck | None = None
    operators: list[OperatorSeconds] | None = None


class Train(Command):
    run_dir: str
    state: str
    reason: str
    step: int
    tokens: int
    loss: float | None
    val_loss: float | None
    seconds_step: float | None
    skipped: int
    bytes_peak_rss: int | None


class Span(Compared):
    low: float | None
    high: float | None
    inside: bool | None


class Rung(Out):
    name: str
    params: int
    tokens: int
    flops: int
    steps: int
    loss: float
    seconds: Span
    bytes_peak: Span
    run_dir: str


class Target(Rung):
    loss_predicted: Span


class Demo(Command):
    directory: str
    machine: dict[str, Any]
    seconds_total: float
    gpt3: dict[str, Any]
    rungs: list[Rung]
    law: FitBody
    target: Target
    baseline_markov2: float
    beats_baseline: bool
    figures: list[str]


class Beside(Out):
    name: str
    params: int
    params_active: int
    n_layers: int
    d_model: int
    max_seq_len: int
    flops_forward_per_token: Number
    flops_training_per_token: Number
    bytes_weights: Number
    bytes_kv_cache: Number


class Compare(Command):
    seq_len: int
    batch: int
    precision: str
    models: list[Beside]


OUTPUTS: dict[str, type[BaseModel]] = {
    "models": Models,
    "show": Show,
    "count": Count,
    "explain": Explain,
    "compare": Compare,
    "hardware": Hardware,
    "plan train": PlanTrain,
    "plan serve": PlanServe,
    "laws": Laws,
    "fit": Fit,
    "predict": Predict,
    "calibrate": Calibrate,
    "check": Check,
    "train": Train,
    "demo": Demo,
}


def schemas() -> dict[str, Any]:
    """JSON Schema (2020-12) of each command's output, by command."""
    return {name: TypeAdapter(form).json_schema() for name, form in OUTPUTS.items()}


def validate(command: str, text: str) -> None:
    """Raise pydantic's ValidationError where `text` is not what `command` may print."""
    OUTPUTS[command].model_validate_json(text)
