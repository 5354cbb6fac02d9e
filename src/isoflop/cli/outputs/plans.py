"""JSON of plan train, plan serve and plan budget."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from isoflop.cli.outputs.base import Command, Interval, Node, Number, Out
from isoflop.cli.outputs.laws import Law


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
    shard: int | None
    offload: str
    cp_by: str
    schedule: str


class Refusal(Out):
    layout: Layout
    recompute: str
    bytes_needed: int
    bytes_available: int
    largest: str
    largest_share: float
    of: str
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


class Choice(Out):
    """One layout that a search found, by formula, and simulated where it is among the best."""

    layout: Layout
    recompute: str
    n_accelerators: int
    seconds_step: float
    seconds_step_simulated: float | None
    days: float
    dollars: float
    energy_mwh: float
    megawatts: float
    why: str | None = None


class RefusedFor(Out):
    reason: str
    count: int
    nearest: str
    value: float
    limit: float
    unit: str
    text: str


class Sway(Out):
    """The best's seconds at the two ends of one uncertain constant's range."""

    name: str
    value: float
    low: float
    high: float
    seconds_low: float
    seconds_high: float
    elasticity: float | None
    changes_best: str | None
    meaning: str


class Search(Out):
    """What a search did and found; `evaluated` had memory and time computed."""

    evaluated: int
    fit: int
    refused: int
    seconds: float
    seconds_cpu: float
    simulated: int
    seconds_simulation: float
    plans_per_second_per_core: float
    minimize: str
    best: Choice
    runner_up: Choice | None
    gap_best: float | None
    gap_most: float
    front: list[Choice]
    refusals: list[RefusedFor]
    binding: str
    sensitivity: list[Sway]


class RankedLayout(Out):
    layout: Layout
    recompute: str
    seconds_step: float


class Ranking(Out):
    """Of the layouts timed the quickest that fits, and the next; how many quicker ones do not."""

    timed: int
    quicker_refused: int
    best: RankedLayout
    runner_up: RankedLayout | None


class Moved(Out):
    name: str
    a: Any
    b: Any


class MovedNumber(Out):
    name: str
    unit: str
    a: Number
    b: Number
    change: float | None
    parts: list[Moved]


class PlanDiff(Command):
    a: str
    b: str
    inputs: list[Moved]
    assumptions: list[Moved]
    numbers: list[MovedNumber]


class Held(Out):
    """What a rank holds from when to when."""

    when: str
    start: float
    end: float
    bytes: float
    parts: dict[str, float]


class Peak(Held):
    rank: int


class Timeline(Out):
    """What every pipeline rank holds through a step, its moments in order."""

    unit: str
    unit_of_time: str
    bytes_available: float
    peak: Peak
    ranks: list[list[Held]]


class PlanTrain(Command):
    model: str
    cluster: dict[str, Any]
    tokens: int
    seq_len: int
    global_batch: int
    precision: str
    recompute: str
    convention: str
    stack: str | None
    mfu: float
    seconds_step: Number | None = None
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
    notes: list[str]
    intervals: dict[str, Interval]
    assumptions: list[Assumption]
    refused: list[Refusal]
    ranking: Ranking | None
    goodput: float | None = None
    failures: float | None = None
    probability_of_failure: float | None = None
    seconds_checkpoint_interval: float | None = None
    quoted: list[Quoted]
    breakdown: dict[str, Node]
    search: Search | None = None
    timeline: Timeline | None = None


class ServeRow(Out):
    """One server in a table beside a plan."""

    batch: int
    batch_max: int
    tp: int
    pp: int
    seconds_first_tokens: float
    seconds_per_token: float
    tokens_per_second: float
    tokens_per_second_copy: float
    dollars_per_million_tokens: float
    dollars_interval: Interval | None
    share_weights: float


class ServeAlternative(Out):
    """The same model stored in another way; no plan where it does not fit."""

    name: str
    own: bool
    params: int
    bytes_weights: int
    bytes_kv_per_token: float
    accelerators_min: int
    plan: ServeRow | None


class ServeAttention(ServeAlternative):
    """The same model with another attention."""

    gain_by_bytes: float


class ServeTables(Out):
    batch: list[ServeRow]
    quantization: list[ServeAlternative]
    attention: list[ServeAttention]


class Budget(Out):
    kind: str
    amount: float


class OtherSize(Out):
    """The same budget at another size, or why that cannot be."""

    params: Number
    tokens: int | None = None
    loss: float | None = None
    reason: str | None = None


class PlanBudget(Command):
    budget: Budget
    cluster: dict[str, Any]
    law: Law
    model: str
    params: int
    tokens: int
    loss: float
    tokens_per_param: float
    tokens_served: float
    share_served: float
    tokens_unique: float | None
    epochs: float
    flops: Number
    accelerator_hours: float
    days: float
    energy_mwh: float
    tonnes_co2e: float
    dollars: float
    goodput: float
    failures: float
    probability_of_failure: float
    seconds_checkpoint_interval: float
    seconds_step: Number | None = None
    bytes_per_accelerator: Number
    days_limit: float | None
    probability_in_time: float | None
    extrapolation: float | None
    half: OtherSize
    double: OtherSize
    seq_len: int
    global_batch: int
    precision: str
    recompute: str
    stack: str | None
    notes: list[str]
    layout: Layout
    n_idle: int
    intervals: dict[str, Interval]
    assumptions: list[Assumption]
    breakdown: dict[str, Node]
    spec: dict[str, Any]


class PlanServe(Command):
    model: str
    cluster: dict[str, Any]
    input_tokens: int
    output_tokens: int
    batch: int
    batch_max: int
    precision: str
    kv_precision: str
    page: int | None
    precision_compute: str
    ttft: float | None
    tpot: float | None
    missed: list[str]
    notes: list[str]
    tp: int
    pp: int
    n_copies: int
    accelerators_min: int
    accelerators_min_tensor: int | None
    memory: Node
    shares: dict[str, float]
    bytes_per_accelerator: Number
    seconds_prefill: float
    seconds_first_tokens: float
    seconds_per_token: float
    tokens_per_second: float
    tokens_per_second_decode: float
    dollars_per_million_tokens: float
    intervals: dict[str, Interval]
    assumptions: list[Assumption]
    breakdown: dict[str, Node]
    tables: ServeTables
