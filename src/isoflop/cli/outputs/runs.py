"""JSON of calibrate, check, train, export, generate and demo."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from isoflop.cli.outputs.base import Command, Out
from isoflop.cli.outputs.laws import FitBody


class Row(Out):
    """`agrees`: equal, or no further apart than is allowed; `reason`: why the two differ."""

    path: str
    derived: int
    built: int
    equal: bool
    agrees: bool
    reason: str


class Agreement(Out):
    """One model of --zoo: its sums, and the paths that disagree."""

    model: str
    numbers: int
    disagreements: int
    refused: str
    totals: list[Row]
    wrong: list[Row]


class Compared(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    predicted: float
    measured: float
    error: float


class Cut(Out):
    """One number of the spec, and what it was made for the run."""

    field: str
    whole: int
    cut: int


class RunCheck(Out):
    """`chosen`: what of batch and seq_len nobody asked for; `cut`: empty, or the model that ran
    is smaller than the one named. `untimed`: kernels that an older profile lacks.
    """

    seconds_step: Compared
    bytes_peak: Compared
    batch: int
    seq_len: int
    chosen: list[str]
    cut: list[Cut]
    pace: float
    steps: int
    seconds_cpu: float
    peak_source: str
    untimed: list[str]


class OperatorSeconds(Out):
    """Seconds of one operator in a step, all copies; measured under a profiler."""

    path: str
    predicted: float
    measured: float


class Learnt(Out):
    """One uncertain number before and after; `told`: share of its variance taken away."""

    name: str
    prior: float
    value: float
    low: float
    high: float
    told: float


class Step(Out):
    row_id: str
    measured: float
    before: float
    after: float


class Stack(Out):
    """With --from: the stack that the steps ran under, and what they said."""

    name: str
    numbers: list[Learnt]
    steps: list[Step]
    skipped: list[str]


class Calibrate(Command):
    output: str
    profile: dict[str, Any] | None = None
    stack: Stack | None = None


class Check(Command):
    """Of one model (`model`, `rows`), or with --zoo of all (`models`, `refused`)."""

    model: str | None = None
    rows: list[Row] | None = None
    disagreements: int
    models: list[Agreement] | None = None
    refused: int | None = None
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


class File(Out):
    name: str
    bytes: int


class Export(Command):
    run_dir: str
    output: str
    to: str
    step: int
    files: list[File]


class Text(Out):
    """What followed one prompt; `text` is null where prompts are token numbers."""

    prompt_tokens: list[int]
    tokens: list[int]
    text: str | None
    reason: Literal["length", "token", "text"]


class Generate(Command):
    source: str
    origin: Literal["run", "folder", "spec"]
    precision: str
    texts: list[Text]
    seconds_prefill: float
    seconds_per_token: float | None
    bytes_kv_cache: int


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
