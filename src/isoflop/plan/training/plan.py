"""What a training run costs: FLOPs, accelerator-hours, days, energy, money, memory, carbon."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from isoflop.arch import Arch
from isoflop.count import Recompute, params
from isoflop.errors import InputError, Problem
from isoflop.hardware import Cluster
from isoflop.hardware.chip import Precision as Format
from isoflop.plan.assumed import assumption_json
from isoflop.plan.economics import dollars, energy_mwh, price_of, tonnes_co2e
from isoflop.plan.goodput import NeverEnds, Rhythm, Trouble
from isoflop.plan.layout import Layout
from isoflop.plan.memory.place import barely, bytes_per_host
from isoflop.plan.memory.refusal import Refusal
from isoflop.plan.shown import labelled
from isoflop.plan.training.ask import UNKNOWN, TrainAsk, problems_of
from isoflop.plan.training.put import Put, put
from isoflop.plan.training.quickest import Ranking
from isoflop.plan.training.quoted import Quoted, quoted_for
from isoflop.plan.training.work import STATES, Counting, Work, accelerator_seconds, named
from isoflop.quantity import Basis, Expr, Node, Symbol, alias, branch, leaf, number
from isoflop.quantity.node import plain
from isoflop.quantity.text import numbers
from isoflop.quantity.units import format_bytes, format_count


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """A training run on a cluster, with what it refused and what it assumed.

    `flops` is the model's own work by the named convention; `flops_hardware` adds what is
    recomputed; `flops_6nd` is the rule of thumb, whatever the convention. `days` are of wall
    time: its parts are the steps, the stalls of checkpoints, what failures cost by `rhythm`,
    and what a run takes beyond these; hours, energy and money follow from it. `ranking` is of the layouts timed where
    the planner chose. `quoted` is what others have said that training this model takes.
    """

    ask: TrainAsk
    layout: Layout
    flops: Node
    flops_hardware: Node
    flops_6nd: Node
    accelerator_hours: Node
    days: Node
    energy_mwh: Node
    tonnes_co2e: Node
    dollars: Node
    bytes_per_accelerator: Node
    refused: tuple[Refusal, ...]
    binding: str
    quoted: tuple[Quoted, ...]
    seconds_step: Node | None = None
    bytes_per_host: Node | None = None
    rhythm: Rhythm | None = None
    ranking: Ranking | None = None
    untimed: str = ""

    @property
    def days_steps(self) -> Node:
        """The days that train, without checkpoints and failures."""
        return self.days if self.rhythm is None else self.days.find("steps")

    @property
    def mfu(self) -> Expr:
        """Share of the peak that the model's own FLOPs reach in its steps (Chowdhery 2022, appendix B)."""
        seconds = 86_400 * self.days_steps.total * self.layout.n_accelerators
        return named("flops", self.flops) / (seconds * self.cluster.chip.peak(self.ask.precision))

    @property
    def cluster(self) -> Cluster:
        return self.ask.cluster

    @property
    def stack(self) -> str | None:
        """The software that the step's time is of; None where no step was timed."""
        return None if self.seconds_step is None else self.ask.stack or UNKNOWN

    @property
    def title(self) -> str:
        """What is trained, on what."""
        by = "" if self.stack is None else f", stack {self.stack}"
        work = self.ask.work
        return f"{work.arch.name} on {format_count(work.tokens)} tokens, {self.cluster}{by}"

    @property
    def placed(self) -> str:
        """The layout, the batch, and what of each accelerator's memory they take."""
        work, idle = self.ask.work, f", {self.n_idle} accelerators idle" if self.n_idle else ""
        return (
            f"layout {self.layout}{idle}, recompute {work.recompute}, "
            f"batch of {self.ask.global_batch:,} x {work.seq_len:,} tokens: "
            f"{format_bytes(self.bytes_per_accelerator.value)} per accelerator "
            f"of {format_bytes(self.cluster.chip.bytes_memory.value)}"
        )

    def __str__(self) -> str:
        """The numbers with their ranges, and the layout."""
        return f"{self.title}\n\n{numbers(dict(labelled(self.nodes())))}\n\n{self.placed}"

    def __repr__(self) -> str:
        return f"<TrainPlan {self.title}, {self.layout}: {self.days!r}>"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """What IPython and Jupyter show."""
        printer.text(str(self))

    @property
    def n_idle(self) -> int:
        """Accelerators that the layout leaves out."""
        return self.cluster.count - self.layout.n_accelerators

    def nodes(self) -> dict[str, Node]:
        """Every number of the plan, by its name in JSON."""
        names = ("flops", "flops_hardware", "flops_6nd", "accelerator_hours", "days",
                 "energy_mwh", "tonnes_co2e", "dollars", "bytes_per_accelerator")  # fmt: skip
        known = {name: getattr(self, name) for name in names}
        some = ("bytes_per_host", "seconds_step")
        known |= {name: node for name in some if (node := getattr(self, name)) is not None}
        return known if self.rhythm is None else {**known, **self.rhythm.nodes(self.days)}

    @property
    def assumptions(self) -> tuple[Symbol, ...]:
        """Every default in the plan that the user may override, once."""
        found = {s.name: s for node in self.nodes().values() for s in node.assumptions}
        return tuple(found.values())

    @property
    def notes(self) -> tuple[str, ...]:
        """What was filled in, what could not be timed, whether the run fits by a hair only."""
        share = (
            f"a share of the roofline's rate is assumed, for no step can be timed: {self.untimed}"
        )
        untimed = [share] if self.untimed else []
        return (
            *self.ask.chosen,
            *untimed,
            *barely(self.bytes_per_accelerator, self.cluster.chip),
        )

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data: numbers by name, then ranges and trees beside them."""
        nodes, work = self.nodes(), self.ask.work
        ranges = {name: node.interval for name, node in nodes.items()}
        return {
            "model": work.arch.name,
            "cluster": self.cluster.to_json(),
            "tokens": work.tokens,
            "seq_len": work.seq_len,
            "global_batch": self.ask.global_batch,
            "precision": self.ask.precision,
            "recompute": work.recompute,
            "convention": work.convention,
            "stack": self.stack,
            "mfu": float(self.mfu.value),
            **{name: plain(node.value) for name, node in nodes.items()},
            "layout": self.layout.to_json(),
            "n_idle": self.n_idle,
            "binding": self.binding,
            "notes": list(self.notes),
            "intervals": {name: r.to_json() for name, r in ranges.items() if r is not None},
            "assumptions": [assumption_json(s) for s in self.assumptions],
            "refused": [r.to_json() for r in self.refused],
            "ranking": None if self.ranking is None else self.ranking.to_json(),
            "quoted": [q.to_json() for q in self.quoted],
            "breakdown": {name: node.to_json() for name, node in nodes.items()},
        }


def plan_train(
    arch: Arch,
    tokens: int,
    cluster: Cluster,
    *,
    seq_len: int,
    global_batch: int,
    source_len: int | None = None,
    images: int = 1,
    precision: Format = "bf16",
    recompute: Recompute | None = None,
    micro_batch: int | None = None,
    layout: Layout | None = None,
    mfu: float | None = None,
    tflops: float | None = None,
    price: float | None = None,
    watts: float | None = None,
    pue: float | None = None,
    carbon: float | None = None,
    convention: Counting = "model",
    stack: str | None = None,
    mtbf_hours: float | None = None,
    seconds_restart: float | None = None,
    overrun: float | None = None,
) -> TrainPlan:
    """Plan a training run.

    `tokens` are those that the decoder reads. `global_batch` is in sequences; beside each an
    encoder reads `source_len` tokens (None: seq_len), a vision tower `images`. A step is timed
    operator by operator (plan/step), as the software `stack` of `hardware/stacks.toml` runs it
    (None: `unknown`). Of `layout`, `recompute` and `micro_batch` what is None is chosen, by that
    time; a `layout` given brings its own micro-batch. Where no step can be timed, the run goes
    at an assumed share of the roofline, under the smallest layout that fits.

    A rate given stands instead: `tflops` is that of one accelerator in 10^12 hardware FLOPs per
    second, recomputation counted, `mfu` the share of peak that the model's own FLOPs reach.
    It is taken as that of the whole run, so nothing comes on top of it unless something is said
    of failures (`mtbf_hours` between those of one accelerator, `seconds_restart` after each) or
    of `overrun`, what the run takes over steps, checkpoints and failures. On top of timed steps
    all of these come. `price` is in dollars per accelerator-hour, `watts` per accelerator with its
    host, `carbon` in kg of CO2e per kWh.

    Raises:
        InputError: a number out of bounds, an illegal layout, a precision the chip lacks, a
            price or watts that nobody states and that was not given.
        Infeasible: no legal layout fits the memory; the closest is named.

    >>> from isoflop.arch import gpt
    >>> from isoflop.hardware import parse_cluster
    >>> small = gpt("gpt2", d_model=768, n_layers=12, n_heads=12, vocab_size=50257, max_seq_len=1024)
    >>> plan = plan_train(small, 10 * 10**9, parse_cluster("8xa100-sxm-80gb"), seq_len=1024,
    ...                   global_batch=512, mfu=0.4)
    >>> print(plan.layout, round(float(plan.accelerator_hours.value), 1))
    tp=1 pp=1 dp=8 zero=0 19.0
    """
    work = Work(arch, tokens, seq_len, convention, recompute or "none", source_len, images)
    said = Trouble(mtbf_hours, seconds_restart, overrun)
    ask = TrainAsk(work, cluster, global_batch, precision, micro_batch, layout, mfu=mfu,
                   tflops=tflops, price=price, watts=watts, pue=pue, carbon=carbon, stack=stack,
                   trouble=None if said == Trouble() else said,
                   may_recompute=recompute is None)  # fmt: skip
    return planned(ask)


def what_if(plan: TrainPlan, **changes: Any) -> TrainPlan:
    """The same run planned again with other answers: fields of `TrainAsk` or of its `Work`.

    The layout is kept unless it is among the changes; None lets the planner choose.

    Raises:
        InputError: no such field, or what `plan_train` raises.

    >>> from isoflop.arch import gpt
    >>> from isoflop.hardware import parse_cluster
    >>> small = gpt("gpt2", d_model=768, n_layers=12, n_heads=12, vocab_size=50257, max_seq_len=1024)
    >>> plan = plan_train(small, 10**10, parse_cluster("8xa100-sxm-80gb"), seq_len=1024,
    ...                   global_batch=512, mfu=0.4)
    >>> round(float(what_if(plan, mfu=0.2).days.value / plan.days.value), 6)
    2.0
    """
    of_ask, of_work = ({f.name for f in fields(kind)} for kind in (TrainAsk, Work))
    unknown = [Problem(name, value, "is a field of a plan's question", ", ".join(sorted(of_ask | of_work)))
               for name, value in changes.items() if name not in of_ask | of_work]  # fmt: skip
    if unknown:
        raise InputError("what if", unknown)
    work = replace(plan.ask.work, **{n: v for n, v in changes.items() if n in of_work})
    kept = {"layout": plan.layout, "work": work,
            "may_recompute": plan.ask.may_recompute and "recompute" not in changes}  # fmt: skip
    return planned(
        replace(plan.ask, **{**kept, **{n: v for n, v in changes.items() if n in of_ask}})
    )


def planned(ask: TrainAsk) -> TrainPlan:
    """The plan that answers a question, as `plan_train` asks it."""
    if bad := problems_of(ask):
        raise InputError("plan train", bad)
    found = put(ask)
    ask, work, chip = found.ask, found.ask.work, ask.cluster.chip
    used = Symbol("n_accelerators_used", found.layout.n_accelerators)
    beat = None if ask.failures is None else ask.failures.rhythm(bytes_checkpoint(ask), used)
    days = _days(_seconds(found, used), ask.failures, beat)
    hours = leaf("accelerator_hours", "hours", 24 * used * alias("days", days.total),
                 basis=Basis.MODELLED)  # fmt: skip
    paid = alias("accelerator_hours", hours.total)
    energy = energy_mwh(paid, chip, watts=ask.watts, pue=ask.pue)
    return TrainPlan(
        ask=ask,
        layout=found.layout,
        flops=work.flops,
        flops_hardware=work.flops_hardware,
        flops_6nd=work.flops_6nd,
        accelerator_hours=hours,
        days=days,
        energy_mwh=energy,
        tonnes_co2e=tonnes_co2e(energy, ask.carbon),
        dollars=dollars(paid, price_of(chip, ask.price)),
        bytes_per_accelerator=found.memory,
        refused=found.refused,
        binding=found.binding,
        quoted=quoted_for(work.arch),
        seconds_step=found.step,
        bytes_per_host=bytes_per_host(ask.job, found.layout, ask.cluster, ask.global_batch),
        rhythm=beat,
        ranking=found.ranking,
        untimed=found.untimed,
    )


def wall_over_steps(ask: TrainAsk, n_accelerators: int) -> float:
    """Wall time of a run on so many accelerators over that of its steps; inf if it never ends."""
    if ask.failures is None:
        return 1.0
    used = Symbol("n_accelerators_used", n_accelerators)
    try:
        beat = ask.failures.rhythm(bytes_checkpoint(ask), used)
    except NeverEnds:
        return math.inf
    return float(ask.failures.wall(beat, number(1)).value)


def bytes_checkpoint(ask: TrainAsk) -> Expr:
    """A checkpoint holds the weights, their fp32 copies and Adam's two moments."""
    state = STATES[ask.precision]
    per_param = Symbol("bytes_checkpoint_per_param", state.weights + state.master + 8)
    return per_param * Symbol("n_params", params(ask.work.arch).value)


def _seconds(found: Put, used: Symbol) -> Expr:
    """What all steps of the run take."""
    ask = found.ask
    if found.step is not None:
        return ask.n_steps * alias("seconds_step", found.step.total)
    return accelerator_seconds(ask.work, ask.cluster.chip, ask.precision,
                               micro_batch=found.layout.micro_batch,
                               mfu=ask.mfu, tflops=ask.tflops) / used  # fmt: skip


def _days(seconds: Expr, trouble: Trouble | None, beat: Rhythm | None) -> Node:
    """Wall time, of which steps, checkpoints, failures and what overruns are the parts."""
    if trouble is None or beat is None:
        return leaf("days", "days", seconds / 86_400, basis=Basis.MODELLED)
    parts = trouble.wall(beat, alias("seconds_steps", seconds)).children
    return branch("days", "days", [
        leaf(part.name, "days", part.total / 86_400, basis=Basis.MODELLED) for part in parts
    ])  # fmt: skip
