"""isoflop plan train"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter

from isoflop.arch.foreign import parse_toml, read_file
from isoflop.cli.options import Count, Json, Real, Whole, load_model
from isoflop.cli.output import emit as to_json
from isoflop.cli.output import say
from isoflop.cli.plan import Failures, On, risk_text
from isoflop.cli.plan_search import NO_HUNT, Hunt, render_found
from isoflop.cli.plan_written import NOTHING, Written
from isoflop.count.memory_split import ContextBy, Offload
from isoflop.errors import Infeasible, InputError, Problem
from isoflop.hardware import Cluster, parse_cluster
from isoflop.hardware.fitted import OwnSteps
from isoflop.hardware.stack import find_stack
from isoflop.plan import Layout, TrainPlan
from isoflop.plan.schedule import ScheduleName
from isoflop.plan.shown import LABELS, labelled
from isoflop.plan.training.ask import TrainAsk
from isoflop.plan.training.plan import planned
from isoflop.plan.training.quoted import Figure, Quoted, machines
from isoflop.plan.training.relief import relieved
from isoflop.plan.training.work import Work, sequences_per_step
from isoflop.quantity import Node
from isoflop.quantity.text import numbers, table, tree
from isoflop.quantity.units import format_bytes, format_count, format_value
from isoflop.report.text import footer

if TYPE_CHECKING:
    from isoflop.plan.search import Found

#: Refused layouts shown in text; JSON has them all.
MOST_REFUSED = 3


@Parameter(name="*", group="Layout")
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
    cp_by
        How context-parallel ranks meet each other's tokens; all_to_all is Ulysses.
    ep
        Expert parallelism: ranks out of dp x cp that the experts are dealt over.
    dp
        Data-parallel copies.
    zero
        ZeRO stage: 1 splits the optimizer's state over the copies, 2 gradients too, 3 weights too.
    shard
        Ranks of dp x cp that ZeRO splits one copy over, the others being replicas (HSDP); all
        when not given.
    offload
        What waits in the host's memory.
    virtual
        Chunks of layers on each pipeline stage (interleaving).
    schedule
        The order in which stages work: zb-* put weights' gradients off, in dualpipe* work enters
        at both ends.
    sequence_parallel
        Split what lies between tensor-parallel matrices over the sequence.
    """

    tp: Count | None = None
    pp: Count | None = None
    cp: Count | None = None
    cp_by: ContextBy | None = None
    ep: Count | None = None
    dp: Count | None = None
    zero: Whole | None = None
    shard: Count | None = None
    offload: Offload | None = None
    virtual: Count | None = None
    schedule: ScheduleName | None = None
    sequence_parallel: bool = True

    def said(self, micro_batch: int | None) -> dict[str, int | str]:
        """What a search must keep."""
        given = {**asdict(self), "micro_batch": micro_batch}
        del given["schedule"]
        if self.sequence_parallel:
            del given["sequence_parallel"]
        kept = {name: size for name, size in given.items() if size is not None}
        return {n: size if isinstance(size, str) else int(size) for n, size in kept.items()}

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


@Parameter(name="*", group="What you know of the machine and its site")
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
AS_PLANNED, AS_ASSUMED, AS_USUAL = Split(), Terms(), Failures()


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
    micro_batch: Count | None = None,
    precision: str = "bf16",
    recompute: str | None = None,
    convention: str = "model",
    split: Split = AS_PLANNED,
    terms: Terms = AS_ASSUMED,
    failures: Failures = AS_USUAL,
    stack: str | None = None,
    hunt: Hunt = NO_HUNT,
    written: Written = NOTHING,
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
        Sequences per step; about 0.58 D^0.571 tokens of them (Step Law) when not given.
    micro_batch
        Sequences that one model copy works on at once; the quickest when not given.
    precision
        fp32, bf16 or another that the accelerator computes in.
    recompute
        none, selective or full; the quickest when not given.
    convention
        How FLOPs are counted: model (every product of the spec), causal (only the scores that
        the mask leaves) or 6nd (the rule of thumb).
    stack
        The trainer's software whose steps are timed, such as megatron-2022 or torchtitan
        (`unknown`, which is taken when not given, stands for any other), or the stack.toml of
        `isoflop calibrate --from`.
    """
    hunt.check()
    written.check()
    arch, cluster = load_model(model), parse_cluster(on)
    each = micro_batch or 1
    length = seq_len or arch.max_seq_len
    batch = global_batch or each * sequences_per_step(tokens, length * each, cluster.count)
    work = Work(arch, tokens, length,
                convention,  # type: ignore[arg-type]  # checked by the plan, which lists the choices
                recompute or "none",  # type: ignore[arg-type]
                source_len, images)  # fmt: skip
    ask = TrainAsk(work, cluster, batch,
                   precision,  # type: ignore[arg-type]
                   micro_batch, **read_stack(stack), **asdict(terms), trouble=failures.said,
                   may_recompute=recompute is None,
                   chosen=_chosen(seq_len, global_batch, length, batch))  # fmt: skip
    if hunt.search:
        fixed = split.said(micro_batch)
        found = hunt.found(ask, fixed, split.schedule, recompute_too=recompute is None)
        return _tell(found.best, found, written, as_json=as_json)
    ask = replace(ask, layout=split.layout(cluster, each))
    try:
        plan = planned(ask)
    except Infeasible as error:
        raise relieved(ask.tightest, error) from None
    return _tell(plan, None, written, as_json=as_json)


def read_stack(text: str | None) -> dict[str, Any]:
    """A stack by name as isoflop knows it, or by file as a user's own steps told.

    Raises:
        InputError: the file cannot be read, or is not what `calibrate --from` writes.
    """
    if text is None or not text.endswith(".toml"):
        return {"stack": text}
    own = OwnSteps.from_table(parse_toml(read_file(Path(text)), text), text)
    return {"stack": own.stack, "beliefs": own.beliefs}


def _chosen(
    seq_len: int | None, global_batch: int | None, length: int, batch: int
) -> tuple[str, ...]:
    """What the user left open and is said for them, with the option that changes it."""
    said = []
    if seq_len is None:
        said.append(f"context {length:,}, the model's longest: --seq-len")
    if global_batch is None:
        said.append(
            f"batch {batch:,} x {length:,} tokens, about what trains best on so many "
            "(Step Law, 2503.04715): --global-batch"
        )
    return tuple(said)


def _tell(plan: TrainPlan, found: Found | None, written: Written, *, as_json: bool) -> None:
    """What is asked for instead of the plan, or the plan as JSON or as text."""
    if written.tell(plan, as_json=as_json):
        return None
    if as_json:
        search = {} if found is None else {"search": found.to_json()}
        return to_json("plan train", {**plan.to_json(), **search})
    return say(render_train(plan, found))


def render_train(plan: TrainPlan, found: Found | None = None) -> str:
    """A training plan as text: numbers with ranges, memory, what was refused, assumptions."""
    work = plan.ask.work
    lines = [
        plan.title,
        "",
        numbers(dict(labelled(plan.nodes()))),
        *([] if plan.rhythm is None else [risk_text(plan.rhythm, plan.days)]),
        "",
    ]
    lines += [_step(plan), ""] if found is None and plan.seconds_step is not None else []
    lines += [render_found(found), ""] if found is not None else []
    lines += [
        plan.placed,
        tree(plan.bytes_per_accelerator, depth=1),
        *([] if plan.bytes_per_host is None else _on_host(plan, plan.bytes_per_host)),
    ]
    lines += [] if plan.ranking is None else [plan.ranking.why]
    lines += [] if plan.stack is None else [f"stack {plan.stack}: {find_stack(plan.stack).source}"]
    lines += plan.notes
    lines += _refused(plan) if found is None else []
    lines += ["", footer(plan.nodes().values())]
    if plan.quoted and found is None:
        lines += ["", render_quoted(work.arch.name, plan.quoted)]
    return "\n".join(lines)


def _step(plan: TrainPlan) -> str:
    assert plan.seconds_step is not None
    tokens = plan.ask.global_batch * plan.ask.work.seq_len
    rate = float(tokens / plan.seconds_step.value)
    return (
        f"one step of {format_count(tokens)} tokens: {format_count(rate)} tokens/s, "
        f"{format_count(rate / plan.layout.n_accelerators)} per accelerator, "
        f"{float(plan.mfu.value):.1%} of peak (MFU)\n{tree(plan.seconds_step, depth=1)}"
    )


def _on_host(plan: TrainPlan, held: Node) -> list[str]:
    host = plan.cluster.chip.host
    assert host is not None
    room = format_bytes(host.bytes_memory.value)
    return [f"in each host's memory: {format_bytes(held.value)} of {room}", tree(held, depth=1)]


def _refused(plan: TrainPlan) -> list[str]:
    others = [refusal for refusal in plan.refused if str(refusal) not in plan.binding]
    lines = [f"binding: {plan.binding}", *(f"refused {r}" for r in others[:MOST_REFUSED])]
    left = len(others) - MOST_REFUSED
    return [*lines, f"refused {left} more (--json lists them)"] if left > 0 else lines


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
