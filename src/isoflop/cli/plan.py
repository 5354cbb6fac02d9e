"""isoflop plan train"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from isoflop.cli.options import Count, Json, Real, load_model
from isoflop.cli.output import emit, say
from isoflop.errors import InputError, Problem
from isoflop.hardware import Cluster, parse_cluster
from isoflop.plan import Layout, TrainPlan, plan_train
from isoflop.quantity import Node
from isoflop.quantity.units import format_bytes, format_exact, format_value
from isoflop.report.text import footer, table, tree

#: Refused layouts shown in text; JSON has them all.
MOST_REFUSED = 3

On = Annotated[str, Parameter(name="--on", help="Accelerators, such as 1024xa100-sxm-80gb.")]


def plan_train_command(
    model: str,
    /,
    *,
    tokens: Count,
    on: On,
    seq_len: Count | None = None,
    global_batch: Count | None = None,
    micro_batch: Count = 1,
    precision: str = "bf16",
    recompute: str = "none",
    tp: int | None = None,
    pp: int | None = None,
    dp: int | None = None,
    zero: Literal[0, 1] | None = None,
    mfu: Real | None = None,
    tflops: Real | None = None,
    price: Real | None = None,
    watts: Real | None = None,
    pue: Real | None = None,
    convention: str = "model",
    as_json: Json = False,
) -> None:
    """Plan a training run: time, energy, money, memory, layout.

    Parameters
    ----------
    model
        A zoo name, a config.json or its folder, a TOML spec, or hf:ORG/NAME.
    tokens
        Training tokens, such as 300e9 or 300B.
    seq_len
        Tokens per sequence; the model's longest context when not given.
    global_batch
        Sequences per step; one for each accelerator when not given.
    micro_batch
        Sequences that one model copy works on at once.
    precision
        fp32, bf16 or another that the accelerator computes in.
    recompute
        none, selective or full.
    tp
        Tensor parallelism; with --pp, --dp or --zero it fixes the layout.
    pp
        Pipeline stages.
    dp
        Data-parallel copies; the accelerators left by --tp and --pp when not given.
    zero
        ZeRO stage, 0 or 1.
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
    convention
        How FLOPs are counted: model (every product of the spec), causal (only the scores that
        the mask leaves) or 6nd (the rule of thumb).
    """
    arch, cluster = load_model(model), parse_cluster(on)
    length = seq_len or arch.max_seq_len
    plan = plan_train(
        arch,
        tokens,
        cluster,
        seq_len=length,
        global_batch=global_batch or cluster.count * micro_batch,
        precision=precision,  # type: ignore[arg-type]  # checked by plan_train, which lists the choices
        recompute=recompute,  # type: ignore[arg-type]
        micro_batch=micro_batch,
        layout=layout_asked(cluster, tp, pp, dp, zero),
        mfu=mfu,
        tflops=tflops,
        price=price,
        watts=watts,
        pue=pue,
        convention=convention,  # type: ignore[arg-type]
    )
    if as_json:
        return emit("plan train", plan.to_json())
    return say(render_train(plan))


def layout_asked(
    cluster: Cluster, tp: int | None, pp: int | None, dp: int | None, zero: Literal[0, 1] | None
) -> Layout | None:
    """The layout that the user fixed, None when nothing was said."""
    if (tp, pp, dp, zero) == (None, None, None, None):
        return None
    tp, pp = (1 if n is None else n for n in (tp, pp))
    if dp is None:
        if tp * pp < 1 or cluster.count % (tp * pp):
            rule = f"divides the {cluster.count} accelerators when --dp is not given"
            raise InputError("plan train", [Problem("tp x pp", tp * pp, rule, "give --dp")])
        dp = cluster.count // (tp * pp)
    return Layout(tp=tp, pp=pp, dp=dp, zero=zero or 0)


def render_train(plan: TrainPlan) -> str:
    """A training plan as text: numbers with ranges, memory, what was refused, assumptions."""
    nodes = plan.nodes()
    shown = {
        "FLOPs": nodes["flops"],
        "6 N D": nodes["flops_6nd"],
        "accelerator-hours": nodes["accelerator_hours"],
        "days": nodes["days"],
        "energy, MWh": nodes["energy_mwh"],
        "dollars": nodes["dollars"],
    }
    lines = [
        f"{plan.model} on {format_exact(plan.tokens)} tokens, {plan.cluster}",
        "",
        numbers(shown),
        "",
        f"layout {plan.layout}: {format_bytes(plan.bytes_per_accelerator.value)} per accelerator "
        f"of {format_bytes(plan.cluster.chip.bytes_memory.value)}",
        tree(plan.bytes_per_accelerator, depth=1),
        f"binding: {plan.binding}",
    ]
    lines += [f"refused {r}" for r in plan.refused[:MOST_REFUSED]]
    if len(plan.refused) > MOST_REFUSED:
        lines.append(f"refused {len(plan.refused) - MOST_REFUSED} more (--json lists them)")
    return "\n".join([*lines, "", footer(nodes.values())])


def numbers(nodes: Mapping[str, Node]) -> str:
    """Values with their 90 % ranges, one per line."""
    rows = []
    for name, node in nodes.items():
        span = node.interval
        range_ = f"{_value(node, span.low)} to {_value(node, span.high)}" if span else "exact"
        rows.append([f"  {name}", _value(node, node.value), range_])
    return table(rows, ["  number", "value", "90 % range"], "lrl")


def _value(node: Node, value: Any) -> str:
    """A value in the unit of its node; counts that the label already names stay bare."""
    bare = node.unit in ("hours", "days", "MWh", "mwh", "tokens_per_second", "accelerators")
    return format_value(value, "" if bare else node.unit)
