"""isoflop plan train"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from cyclopts import Parameter

from isoflop.cli.options import Count, Json, Real, load_model
from isoflop.cli.output import emit, say
from isoflop.cli.plan import On, numbers
from isoflop.errors import InputError, Problem
from isoflop.hardware import Cluster, parse_cluster
from isoflop.plan import Layout, TrainPlan, plan_train
from isoflop.plan.quoted import Figure, Quoted, machines
from isoflop.quantity.units import format_bytes, format_exact, format_value
from isoflop.report.text import footer, table, tree

#: Refused layouts shown in text; JSON has them all.
MOST_REFUSED = 3


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Split:
    """The layout; any of these fixes it whole: sizes not given are then 1.

    Parameters
    ----------
    tp
        Tensor parallelism. This or another size of a layout fixes it whole: sizes not given
        are then 1, and --dp takes the accelerators that are left.
    pp
        Pipeline stages.
    cp
        Context parallelism: ranks that share each sequence.
    ep
        Expert parallelism: ranks out of dp x cp that the experts are dealt over.
    dp
        Data-parallel copies.
    zero
        ZeRO stage: 1 splits the optimizer's state over the copies, 2 gradients too, 3 weights too.
    virtual
        Chunks of layers on each pipeline stage (interleaving).
    sequence_parallel
        Split what lies between tensor-parallel matrices over the sequence.
    """

    tp: int | None = None
    pp: int | None = None
    cp: int | None = None
    ep: int | None = None
    dp: int | None = None
    zero: Literal[0, 1, 2, 3] | None = None
    virtual: int | None = None
    sequence_parallel: bool = True

    def layout(self, cluster: Cluster, micro_batch: int) -> Layout | None:
        """The layout that the user fixed, None when nothing was said."""
        if self == Split():
            return None
        given = {name: size for name, size in asdict(self).items() if size is not None}
        layout = Layout(**given, micro_batch=micro_batch)
        if self.dp is not None:
            return layout
        one_copy = layout.n_accelerators
        if one_copy < 1 or cluster.count % one_copy:
            rule = f"divides the {cluster.count} accelerators when --dp is not given"
            raise InputError("plan train", [Problem("tp x pp x cp", one_copy, rule, "give --dp")])
        return replace(layout, dp=cluster.count // one_copy)


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Terms:
    """What the user knows of the machine and its site, in place of assumptions.

    Parameters
    ----------
    mfu
        Share of the peak that the model's own FLOPs reach.
    tflops
        Achieved rate of one accelerator, in 10^12 hardware FLOPs per second.
    price
        Dollars per accelerator-hour.
    watts
        Watts per accelerator, its part of the host included.
    pue
        Power usage effectiveness of the data centre.
    carbon
        Kilograms of CO2e per kWh of the electricity.
    """

    mfu: Real | None = None
    tflops: Real | None = None
    price: Real | None = None
    watts: Real | None = None
    pue: Real | None = None
    carbon: Real | None = None


#: Nothing said: the planner chooses, and assumes.
AS_PLANNED, AS_ASSUMED = Split(), Terms()


def plan_train_command(
    model: str,
    /,
    *,
    tokens: Count,
    on: On,
    seq_len: Count | None = None,
    source_len: Count | None = None,
    images: Count = 1,
    global_batch: Count | None = None,
    micro_batch: Count = 1,
    precision: str = "bf16",
    recompute: str = "none",
    convention: str = "model",
    split: Split = AS_PLANNED,
    terms: Terms = AS_ASSUMED,
    as_json: Json = False,
) -> None:
    """Plan a training run: time, energy, money, memory, layout.

    Parameters
    ----------
    model
        A zoo name, a config.json or its folder, a TOML spec, or hf:ORG/NAME.
    tokens
        Training tokens that the decoder reads, such as 300e9 or 300B.
    seq_len
        Tokens per sequence; the model's longest context when not given.
    source_len
        Tokens per sequence that an encoder reads; --seq-len when not given.
    images
        Images per sequence that a vision tower reads.
    global_batch
        Sequences per step; one micro-batch for each accelerator when not given.
    micro_batch
        Sequences that one model copy works on at once.
    precision
        fp32, bf16 or another that the accelerator computes in.
    recompute
        none, selective or full.
    convention
        How FLOPs are counted: model (every product of the spec), causal (only the scores that
        the mask leaves) or 6nd (the rule of thumb).
    """
    arch, cluster = load_model(model), parse_cluster(on)
    plan = plan_train(
        arch, tokens, cluster, seq_len=seq_len or arch.max_seq_len,
        global_batch=global_batch or cluster.count * micro_batch, source_len=source_len, images=images,
        precision=precision,  # type: ignore[arg-type]  # checked by plan_train, which lists the choices
        recompute=recompute,  # type: ignore[arg-type]
        convention=convention,  # type: ignore[arg-type]
        micro_batch=micro_batch, layout=split.layout(cluster, micro_batch), **asdict(terms),
    )  # fmt: skip
    if as_json:
        return emit("plan train", plan.to_json())
    return say(render_train(plan))


def render_train(plan: TrainPlan) -> str:
    """A training plan as text: numbers with ranges, memory, what was refused, assumptions."""
    work = plan.ask.work
    lines = [
        f"{work.arch.name} on {format_exact(work.tokens)} tokens, {plan.cluster}",
        "",
        numbers({label: getattr(plan, name) for name, label in LABELS.items()}),
        "",
        f"layout {plan.layout}{_idle(plan)}: "
        f"{format_bytes(plan.bytes_per_accelerator.value)} per accelerator "
        f"of {format_bytes(plan.cluster.chip.bytes_memory.value)}",
        tree(plan.bytes_per_accelerator, depth=1),
        f"binding: {plan.binding}",
    ]
    lines += [f"refused {r}" for r in plan.refused[:MOST_REFUSED]]
    if len(plan.refused) > MOST_REFUSED:
        lines.append(f"refused {len(plan.refused) - MOST_REFUSED} more (--json lists them)")
    lines += ["", footer(plan.nodes().values())]
    if plan.quoted:
        lines += ["", render_quoted(work.arch.name, plan.quoted)]
    return "\n".join(lines)


#: How the numbers of a plan are called in text.
LABELS = {
    "flops": "FLOPs",
    "flops_6nd": "6 N D",
    "accelerator_hours": "accelerator-hours",
    "days": "days",
    "energy_mwh": "energy, MWh",
    "tonnes_co2e": "CO2e, tonnes",
    "dollars": "dollars",
}


def _idle(plan: TrainPlan) -> str:
    return f", {plan.n_idle} accelerators idle" if plan.n_idle else ""


# --- quoted figures -----------------------------------------------------------------------------


def render_quoted(model: str, runs: Sequence[Quoted]) -> str:
    """What others quote for a model, run by run, each figure beside what its inputs give."""
    lines = [f"quoted for {model}, and what each source's own inputs give:"]
    for run in runs:
        lines += [f"  {run.stated.by}: {_machine(run)}", table([_row(f) for f in run.figures])]
    different = machines(runs)
    if different > 1:
        lines.append(f"These are {different} different machines: no run had all of these figures.")
    return "\n".join(lines)


def _machine(run: Quoted) -> str:
    """The machine and the inputs that a source states."""
    stated = run.stated
    passes = 8 if stated.recompute == "full" else 6
    said = [
        stated.on or "no machine",
        "" if stated.flops is None else f"{format_value(stated.flops, 'flops')} by its own count",
        "" if stated.tflops is None else f"{stated.tflops:g} TFLOP/s",
        "" if stated.accelerator_hours is None else
        f"{format_value(stated.accelerator_hours, 'accelerator-hours')}",
        "" if run.mfu is None else f"so {float(run.mfu.value):.0%} of peak by 6 N D",
        "" if stated.watts is None else f"{stated.watts:g} W",
        "" if stated.pue is None else f"PUE {stated.pue:g}",
        "" if stated.carbon is None else f"{stated.carbon:g} kg per kWh",
        "" if stated.price is None else f"${stated.price:g} per hour",
        f"{passes} N D" if stated.flops is None and stated.accelerator_hours is None else "",
    ]  # fmt: skip
    return ", ".join(filter(None, said))


def _row(figure: Figure) -> list[str]:
    label, unit = LABELS[figure.name], {"flops": "flops", "dollars": "dollars"}.get(figure.name, "")
    quoted = f"quoted {format_value(figure.quoted, unit)}"
    if figure.derived is None:
        return [f"    {label}", quoted, f"not derived: {' and '.join(figure.missing)} not stated"]
    derived = f"derived {format_value(figure.derived.value, unit)}"
    return [f"    {label}", quoted, derived, f"{figure.difference:+.1%}"]
