"""What a training run costs: FLOPs, accelerator-hours, days, energy, money, memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from isoflop.arch import Arch
from isoflop.count import (
    TRAINING_STATES,
    Precision,
    TrainingState,
    Workload,
    flops_6n,
    flops_forward,
    params,
)
from isoflop.count.blocks import beside
from isoflop.count.flops import BACKWARD
from isoflop.errors import InputError, Problem
from isoflop.hardware import Chip, Cluster
from isoflop.hardware.chip import Precision as Format
from isoflop.plan.ask import at_most, one_of, whole
from isoflop.plan.assumed import UTILIZATION, assumption_json, choose
from isoflop.plan.economics import dollars, energy_mwh, price_of, unstated
from isoflop.plan.layout import Layout, Refusal
from isoflop.plan.place import place
from isoflop.plan.roofline import Rates, Stored, seconds_forward
from isoflop.plan.shard import Recompute, Trained
from isoflop.quantity import Basis, Expr, Node, Symbol, branch, leaf, number
from isoflop.quantity.node import plain

#: Which work "the FLOPs of a run" counts. `model`: every matrix product and all scores, as
#: in PaLM's MFU (Chowdhery 2022, appendix B). `causal`: only the scores that the causal
#: mask leaves. `6nd`: 6 x active parameters x tokens, no scores (Kaplan 2020, 2.1).
Counting: TypeAlias = Literal["model", "causal", "6nd"]
COUNTINGS: tuple[Counting, ...] = ("model", "causal", "6nd")
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")

#: How a run stores its state, by the precision it computes in.
STATES: dict[Format, TrainingState] = {
    "fp32": TRAINING_STATES["fp32"],
    "tf32": TRAINING_STATES["fp32"],
    "bf16": TRAINING_STATES["bf16"],
    "fp16": replace(TRAINING_STATES["bf16"], name="fp16", activation=Precision.FP16),
    "fp8": TRAINING_STATES["bf16"],
}


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """A training run on a cluster, with what it refused and what it assumed.

    `flops` is the model's own work by the named convention; `flops_hardware` adds what is
    recomputed; `flops_6nd` is the rule of thumb, whatever the convention.
    """

    model: str
    cluster: Cluster
    tokens: int
    seq_len: int
    global_batch: int
    precision: Format
    recompute: Recompute
    convention: Counting
    layout: Layout
    flops: Node
    flops_hardware: Node
    flops_6nd: Node
    accelerator_hours: Node
    days: Node
    energy_mwh: Node
    dollars: Node
    bytes_per_accelerator: Node
    refused: tuple[Refusal, ...]
    binding: str

    def nodes(self) -> dict[str, Node]:
        """Every number of the plan, by its name in JSON."""
        names = ("flops", "flops_hardware", "flops_6nd", "accelerator_hours", "days",
                 "energy_mwh", "dollars", "bytes_per_accelerator")  # fmt: skip
        return {name: getattr(self, name) for name in names}

    @property
    def assumptions(self) -> tuple[Symbol, ...]:
        """Every default in the plan that the user may override, once."""
        found = {s.name: s for node in self.nodes().values() for s in node.assumptions}
        return tuple(found.values())

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data: numbers by name, then ranges and trees beside them."""
        nodes = self.nodes()
        ranges = {name: node.interval for name, node in nodes.items()}
        return {
            "model": self.model,
            "cluster": self.cluster.to_json(),
            "tokens": self.tokens,
            "seq_len": self.seq_len,
            "global_batch": self.global_batch,
            "precision": self.precision,
            "recompute": self.recompute,
            "convention": self.convention,
            **{name: plain(node.value) for name, node in nodes.items()},
            "layout": self.layout.to_json(),
            "n_idle": self.cluster.count - self.layout.n_accelerators,
            "binding": self.binding,
            "intervals": {name: r.to_json() for name, r in ranges.items() if r is not None},
            "assumptions": [assumption_json(s) for s in self.assumptions],
            "refused": [r.to_json() for r in self.refused],
            "breakdown": {name: node.to_json() for name, node in nodes.items()},
        }


def plan_train(
    arch: Arch,
    tokens: int,
    cluster: Cluster,
    *,
    seq_len: int,
    global_batch: int,
    precision: Format = "bf16",
    recompute: Recompute = "none",
    micro_batch: int = 1,
    layout: Layout | None = None,
    mfu: float | None = None,
    tflops: float | None = None,
    price: float | None = None,
    watts: float | None = None,
    pue: float | None = None,
    convention: Counting = "model",
) -> TrainPlan:
    """Plan a training run.

    `global_batch` is in sequences. `tflops` is the achieved rate of one accelerator in
    10^12 hardware FLOPs per second, recomputation counted; `mfu` the share of peak that
    the model's own FLOPs reach. With neither, the roofline times an assumed utilization.
    `price` is in dollars per accelerator-hour, `watts` per accelerator with its host. A
    `layout` given brings its own micro-batch.

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
    if layout is not None:
        micro_batch = layout.micro_batch
    bad = [
        *beside(arch, "is none: plans are made for decoders"),
        *_check_work(arch, tokens=tokens, seq_len=seq_len,
                     global_batch=global_batch, micro_batch=micro_batch),
        *one_of("precision", precision, STATES),
        *one_of("recompute", recompute, RECOMPUTES),
        *one_of("convention", convention, COUNTINGS),
        *_check_rate(cluster.chip, precision, mfu, tflops),
        *unstated(cluster.chip, price=price, watts=watts),
        *([] if pue is None or pue >= 1 else [Problem("pue", pue, "is at least 1, all energy over the machines' own")]),
    ]  # fmt: skip
    if bad:
        raise InputError("plan train", bad)
    state = STATES[precision]
    job = Trained(arch, Workload.train(micro_batch, seq_len), state, recompute)
    chosen, memory, refused, binding = place(job, cluster, global_batch, layout)
    flops = _flops(arch, tokens, seq_len, convention, "none")
    hardware = _flops(arch, tokens, seq_len, convention, recompute)
    work = _Work(named("flops", flops), named("flops_hardware", hardware))
    seconds = _accelerator_seconds(job, cluster.chip, precision, work, mfu=mfu, tflops=tflops)
    hours = seconds / 3600
    used = Symbol("n_accelerators_used", chosen.n_accelerators)
    return TrainPlan(
        model=arch.name,
        cluster=cluster,
        tokens=tokens,
        seq_len=seq_len,
        global_batch=global_batch,
        precision=precision,
        recompute=recompute,
        convention=convention,
        layout=chosen,
        flops=flops,
        flops_hardware=hardware,
        flops_6nd=leaf("flops_6nd", "flops", flops_6n(arch, Symbol("tokens", tokens))),
        accelerator_hours=leaf("accelerator_hours", "hours", hours, basis=Basis.MODELLED),
        days=leaf("days", "days", hours / (24 * used), basis=Basis.MODELLED),
        energy_mwh=energy_mwh(hours, cluster.chip, watts=watts, pue=pue),
        dollars=dollars(hours, price_of(cluster.chip, price)),
        bytes_per_accelerator=memory,
        refused=refused,
        binding=binding,
    )


def named(name: str, node: Node) -> Symbol:
    """A finished number under its own name, so that what is built on it stays readable.

    Only for nodes without uncertain parts: a name carries no range.
    """
    assert node.interval is None, f"{name} is uncertain"
    return Symbol(name, node.value, source=f"the tree {node.name!r} of this plan")


# --- FLOPs and time ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Work:
    model: Symbol
    hardware: Symbol


def _flops(
    arch: Arch, tokens: int, seq_len: int, convention: Counting, recompute: Recompute
) -> Node:
    """Forward, backward and what is run again, over all tokens."""
    tokens_all = Symbol("tokens", tokens, meaning="tokens trained on")
    again = recompute == "full"
    if convention == "6nd":
        forward = leaf(
            "forward", "flops", 2 * params(arch, active=True).total, source="2 N per token"
        )
        steps = [forward, replace(forward, name="backward", times=number(BACKWARD))]
        steps += [replace(forward, name="recompute")] if again else []
        return branch("flops", "flops", steps, times=tokens_all)
    work = Workload.train(1, seq_len, causal_skip=convention == "causal")
    forward = replace(flops_forward(arch, work), name="forward")
    steps = [forward, replace(forward, name="backward", times=number(BACKWARD))]
    if again:  # each layer once more; the head's input is kept, so the head is not
        steps.append(
            branch("recompute", "flops", [c for c in forward.children if c.name in arch.kinds])
        )
    return branch("flops", "flops", steps, times=tokens_all / work.T)


def _accelerator_seconds(
    job: Trained,
    chip: Chip,
    precision: Format,
    work: _Work,
    *,
    mfu: float | None,
    tflops: float | None,
) -> Expr:
    peak = chip.peak(precision)
    if tflops is not None:
        rate = Symbol("flops_per_second_achieved", tflops * 1e12, source="given")
        return work.hardware / rate
    if mfu is not None:
        return work.model / (Symbol("mfu", mfu, source="given") * peak)
    stored = Stored(*3 * (job.state.activation,))
    rates = Rates(peak, chip.bytes_per_second_memory)
    roofline = seconds_forward(job.arch, job.work, rates, stored).total
    per_pass = named("flops_forward", flops_forward(job.arch, job.work))
    return work.hardware / per_pass * roofline / choose(UTILIZATION, None)


# --- checks -----------------------------------------------------------------------------


def _check_work(
    arch: Arch, *, tokens: int, seq_len: int, global_batch: int, micro_batch: int
) -> list[Problem]:
    bad = [
        *whole("tokens", tokens, 10**18),
        *whole("seq_len", seq_len, arch.max_seq_len),
        *whole("global_batch", global_batch, 10**9),
        *whole("micro_batch", micro_batch, 10**9),
    ]
    if not bad and global_batch % micro_batch:
        bad.append(Problem("micro_batch", micro_batch, f"divides global_batch={global_batch}"))
    return bad


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
