"""What a training run costs: FLOPs, accelerator-hours, days, energy, money, memory, carbon."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from isoflop.arch import Arch
from isoflop.count.blocks import beside
from isoflop.count.memory_saved import FLASH, KERNELS
from isoflop.errors import InputError, Problem
from isoflop.hardware import Chip, Cluster
from isoflop.hardware.chip import Precision as Format
from isoflop.hardware.fitted import Beliefs, shipped
from isoflop.hardware.stack import find_stack
from isoflop.plan.ask import at_most, one_of, whole
from isoflop.plan.assumed import assumption_json
from isoflop.plan.economics import dollars, energy_mwh, price_of, tonnes_co2e, unstated
from isoflop.plan.layout import Layout, Refusal
from isoflop.plan.memory.place import barely, bytes_per_host, place
from isoflop.plan.memory.shard import Recompute, Trained
from isoflop.plan.step.seconds import step_time
from isoflop.plan.step.setting import Setting
from isoflop.plan.training.quoted import Quoted, quoted_for
from isoflop.plan.training.work import COUNTINGS, STATES, Counting, Work, accelerator_seconds, named
from isoflop.quantity import Basis, Expr, Node, Symbol, leaf
from isoflop.quantity.node import plain

#: The stack whose constants have the widest ranges.
UNKNOWN = "unknown"

RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True, slots=True)
class TrainAsk:
    """What a training plan is asked for; `plan_train` says what each field means.

    `chosen` says in words what was left open and filled in by whoever asks.
    """

    work: Work
    cluster: Cluster
    global_batch: int
    precision: Format = "bf16"
    micro_batch: int = 1
    layout: Layout | None = None
    mfu: float | None = None
    tflops: float | None = None
    price: float | None = None
    watts: float | None = None
    pue: float | None = None
    carbon: float | None = None
    stack: str | None = None
    beliefs: Beliefs = field(default_factory=shipped)
    chosen: tuple[str, ...] = ()

    def setting(self, layout: Layout) -> Setting:
        """One step under a layout, as its time is computed."""
        return Setting(self.work.arch, self.cluster, layout, self.work.seq_len, self.global_batch,
                       compute=self.precision,  # type: ignore[arg-type]  # problems_of lists what may be computed in
                       recompute=self.work.recompute,
                       stack=self.stack or UNKNOWN,
                       beliefs=self.beliefs)  # fmt: skip

    @property
    def n_steps(self) -> Expr:
        """Steps of the run, the last of which may be part of one."""
        per_step = self.global_batch * self.work.seq_len
        return Symbol("tokens", self.work.tokens) / Symbol("tokens_per_step", per_step)

    @property
    def job(self) -> Trained:
        """One micro-batch, as memory sees it; a layout given brings its own, a stack its kernels."""
        n = self.layout.micro_batch if self.layout is not None else self.micro_batch
        work = self.work
        unfused = self.stack is not None and find_stack(self.stack).attention == "unfused"
        return Trained(work.arch, work.batch(n), STATES[self.precision], work.recompute,
                       KERNELS["korthikanti"] if unfused else FLASH)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """A training run on a cluster, with what it refused and what it assumed.

    `flops` is the model's own work by the named convention; `flops_hardware` adds what is
    recomputed; `flops_6nd` is the rule of thumb, whatever the convention. `quoted` is what
    others have said that training this model takes.
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

    @property
    def mfu(self) -> Expr:
        """Share of the peak that the model's own FLOPs reach (Chowdhery 2022, appendix B)."""
        seconds = 3600 * self.accelerator_hours.total
        return named("flops", self.flops) / (seconds * self.cluster.chip.peak(self.ask.precision))

    @property
    def cluster(self) -> Cluster:
        return self.ask.cluster

    @property
    def n_idle(self) -> int:
        """Accelerators that the layout leaves out."""
        return self.cluster.count - self.layout.n_accelerators

    def nodes(self) -> dict[str, Node]:
        """Every number of the plan, by its name in JSON."""
        names = ("flops", "flops_hardware", "flops_6nd", "accelerator_hours", "days",
                 "energy_mwh", "tonnes_co2e", "dollars", "bytes_per_accelerator")  # fmt: skip
        some = ("bytes_per_host", "seconds_step")
        there = {name: node for name in some if (node := getattr(self, name)) is not None}
        return {**{name: getattr(self, name) for name in names}, **there}

    @property
    def assumptions(self) -> tuple[Symbol, ...]:
        """Every default in the plan that the user may override, once."""
        found = {s.name: s for node in self.nodes().values() for s in node.assumptions}
        return tuple(found.values())

    @property
    def notes(self) -> tuple[str, ...]:
        """What was filled in, and whether the run fits by a hair only."""
        return (*self.ask.chosen, *barely(self.bytes_per_accelerator, self.cluster.chip))

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
            "stack": self.ask.stack,
            "mfu": float(self.mfu.value),
            **{name: plain(node.value) for name, node in nodes.items()},
            "layout": self.layout.to_json(),
            "n_idle": self.n_idle,
            "binding": self.binding,
            "notes": list(self.notes),
            "intervals": {name: r.to_json() for name, r in ranges.items() if r is not None},
            "assumptions": [assumption_json(s) for s in self.assumptions],
            "refused": [r.to_json() for r in self.refused],
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
    recompute: Recompute = "none",
    micro_batch: int = 1,
    layout: Layout | None = None,
    mfu: float | None = None,
    tflops: float | None = None,
    price: float | None = None,
    watts: float | None = None,
    pue: float | None = None,
    carbon: float | None = None,
    convention: Counting = "model",
    stack: str | None = None,
) -> TrainPlan:
    """Plan a training run.

    `tokens` are those that the decoder reads. `global_batch` is in sequences; beside each an
    encoder reads `source_len` tokens (None: seq_len), a vision tower `images`. `tflops` is
    the achieved rate of one accelerator in 10^12 hardware FLOPs per second, recomputation
    counted; `mfu` the share of peak that the model's own FLOPs reach. With neither, the
    roofline times an assumed utilization; a `stack` (of `hardware/stacks.toml`) says how long a
    step takes operator by operator instead. `price` is in dollars per accelerator-hour, `watts`
    per accelerator with its host, `carbon` in kg of CO2e per kWh. A `layout` given brings its
    own micro-batch.

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
    work = Work(arch, tokens, seq_len, convention, recompute, source_len, images)
    ask = TrainAsk(work, cluster, global_batch, precision, micro_batch, layout, mfu=mfu,
                   tflops=tflops, price=price, watts=watts, pue=pue, carbon=carbon, stack=stack)  # fmt: skip
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
    kept = {"layout": plan.layout, "work": work}
    return planned(
        replace(plan.ask, **{**kept, **{n: v for n, v in changes.items() if n in of_ask}})
    )


def planned(ask: TrainAsk) -> TrainPlan:
    """The plan that answers a question, as `plan_train` asks it."""
    if bad := problems_of(ask):
        raise InputError("plan train", bad)
    work, chip = ask.work, ask.cluster.chip
    layout, memory, refused, binding = place(ask.job, ask.cluster, ask.global_batch, ask.layout)
    used = Symbol("n_accelerators_used", layout.n_accelerators)
    step = None if ask.stack is None else step_time(ask.setting(layout))
    seconds = (
        accelerator_seconds(work, chip, ask.precision, micro_batch=layout.micro_batch,
                            mfu=ask.mfu, tflops=ask.tflops)
        if step is None
        else used * ask.n_steps * step.total
    )  # fmt: skip
    hours = seconds / 3600
    energy = energy_mwh(hours, chip, watts=ask.watts, pue=ask.pue)
    return TrainPlan(
        ask=ask,
        layout=layout,
        flops=work.flops,
        flops_hardware=work.flops_hardware,
        flops_6nd=work.flops_6nd,
        accelerator_hours=leaf("accelerator_hours", "hours", hours, basis=Basis.MODELLED),
        days=leaf("days", "days", hours / (24 * used), basis=Basis.MODELLED),
        energy_mwh=energy,
        tonnes_co2e=tonnes_co2e(energy, ask.carbon),
        dollars=dollars(hours, price_of(chip, ask.price)),
        bytes_per_accelerator=memory,
        refused=refused,
        binding=binding,
        quoted=quoted_for(work.arch),
        seconds_step=step,
        bytes_per_host=bytes_per_host(ask.job, layout, ask.cluster, ask.global_batch),
    )


# --- checks -----------------------------------------------------------------------------


def problems_of(ask: TrainAsk) -> list[Problem]:
    """What is wrong with a question, its layout aside."""
    chip, pue = ask.cluster.chip, ask.pue
    return [
        *_check_work(ask),
        *_check_towers(ask.work),
        *one_of("precision", ask.precision, STATES),
        *one_of("recompute", ask.work.recompute, RECOMPUTES),
        *one_of("convention", ask.work.convention, COUNTINGS),
        *_check_rate(chip, ask.precision, ask.mfu, ask.tflops),
        *_check_stack(ask),
        *unstated(chip, price=ask.price, watts=ask.watts),
        *([] if pue is None or pue >= 1 else [Problem("pue", pue, "is at least 1, all energy over the machines' own")]),
    ]  # fmt: skip


def _check_work(ask: TrainAsk) -> list[Problem]:
    work = ask.work
    micro_batch = ask.layout.micro_batch if ask.layout is not None else ask.micro_batch
    bad = [
        *whole("tokens", work.tokens, 10**18),
        *whole("seq_len", work.seq_len, work.arch.max_seq_len),
        *whole("global_batch", ask.global_batch, 10**9),
        *whole("micro_batch", micro_batch, 10**9),
    ]
    if not bad and ask.global_batch % micro_batch:
        bad.append(Problem("micro_batch", micro_batch, f"divides global_batch={ask.global_batch}"))
    return bad


def _check_towers(work: Work) -> list[Problem]:
    """Lengths of what a tower reads are given where there is one."""
    bad = []
    encoder, vision = work.arch.encoder, work.arch.vision
    if encoder is not None:
        bad += whole("source_len", work.source_len or work.seq_len, encoder.max_seq_len)
    elif work.source_len is not None:
        bad.append(Problem("source_len", work.source_len, "is given where there is an encoder"))
    if vision is not None:
        bad += whole("images", work.images, 10**6)
    elif work.images != 1:
        bad.append(Problem("images", work.images, "is given where there is a vision tower"))
    return bad


def _check_stack(ask: TrainAsk) -> list[Problem]:
    """A stack's step times stand alone, and are those of a decoder."""
    if ask.stack is None:
        return []
    bad = []
    if ask.mfu is not None or ask.tflops is not None:
        bad.append(Problem("stack", ask.stack, "is not given together with mfu or tflops"))
    find_stack(ask.stack)
    return [*bad, *beside(ask.work.arch, "is none where a stack's step time is asked for")]


def _check_rate(
    chip: Chip, precision: Format, mfu: float | None, tflops: float | None
) -> list[Problem]:
    if mfu is not None and tflops is not None:
        return [Problem("mfu", mfu, "is not given together with tflops", "give one of them")]
    if precision not in chip.peaks:
        return []  # `Chip.peak` says it better
    peak = float(chip.peaks[precision].value) / 1e12
    return [
        *at_most("mfu", mfu, 1, "all of the peak"),
        *at_most("tflops", tflops, peak, f"the peak of {chip.name} in {precision}"),
    ]
