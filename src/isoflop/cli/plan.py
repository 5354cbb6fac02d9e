"""isoflop plan serve, and what both plans print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from cyclopts import Parameter

from isoflop.cli.options import Count, Duration, Json, Real, Stored, load_model
from isoflop.cli.output import emit, note, say
from isoflop.count import Precision
from isoflop.errors import Infeasible
from isoflop.hardware import parse_cluster
from isoflop.plan import ServePlan, plan_serve
from isoflop.quantity import Node
from isoflop.quantity.units import format_exact, format_seconds, format_value
from isoflop.report.text import footer, table, tree

On = Annotated[str, Parameter(name="--on", help="Accelerators, such as 1024xa100-sxm-80gb.")]


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
    bare = node.unit in ("hours", "days", "MWh", "mwh", "tokens_per_second", "accelerators",
                         "tonnes")  # fmt: skip
    return format_value(value, "" if bare else node.unit)


def plan_serve_command(
    model: str,
    /,
    *,
    on: On,
    input_: Annotated[Count, Parameter(name="--input")] = 1024,
    output: Annotated[Count, Parameter(name="--output")] = 256,
    batch: Count | None = None,
    precision: Stored = Precision.BF16,
    kv_precision: Stored | None = None,
    tp: int | None = None,
    ttft: Duration | None = None,
    tpot: Duration | None = None,
    price: Real | None = None,
    as_json: Json = False,
) -> None:
    """Plan a server: memory, accelerators, times, money.

    Parameters
    ----------
    model
        A zoo name, a config.json or its folder, a TOML spec, or hf:ORG/NAME.
    input_
        Tokens of a prompt.
    output
        Tokens of an answer.
    batch
        Sequences that one copy works on at once; as many as fit when not given.
    precision
        How weights are stored: fp32, bf16, fp16, fp8, int8, int4.
    kv_precision
        How keys and values are stored; like the weights, but at least 16 bit, when not given.
    tp
        Tensor parallelism; the largest even split within a node when not given.
    ttft
        Limit on the time to the first token, such as 500ms; exit 3 when missed.
    tpot
        Limit on the time per output token, such as 30ms; exit 3 when missed.
    price
        Dollars per accelerator-hour.
    """
    plan = plan_serve(
        load_model(model),
        parse_cluster(on),
        input_tokens=input_,
        output_tokens=output,
        batch=batch,
        precision=precision,
        kv_precision=kv_precision,
        tp=tp,
        price=price,
    )
    if as_json:
        emit("plan serve", plan.to_json())
    else:
        say(render_serve(plan))
    check_limits(plan, ttft, tpot)


def check_limits(plan: ServePlan, ttft: float | None, tpot: float | None) -> None:
    """Raise Infeasible for each stated limit that the plan misses."""
    missed = [
        f"{name} {format_seconds(node.value)} exceeds the limit of {format_seconds(limit)}"
        for name, node, limit in (
            ("time to the first token", plan.seconds_prefill, ttft),
            ("time per output token", plan.seconds_per_token, tpot),
        )
        if limit is not None and float(node.value) > limit
    ]
    if missed:
        raise Infeasible("\n".join(missed))
    if ttft is not None or tpot is not None:
        note("the stated limits are met, at the plan's middle values")


def render_serve(plan: ServePlan) -> str:
    """A server plan as text."""
    nodes = plan.nodes()
    shown = {
        "time to first token": nodes["seconds_prefill"],
        "time per output token": nodes["seconds_per_token"],
        "output tokens per second": nodes["tokens_per_second"],
        "dollars per million tokens": nodes["dollars_per_million_tokens"],
    }
    tensor = plan.accelerators_min_tensor
    fewest = f"fewest accelerators: {format_exact(plan.accelerators_min.value)} by memory"
    fewest += (
        f", {tensor} by even tensor parallelism" if tensor else ", no even tensor split in a node"
    )
    return "\n".join(
        [
            f"{plan.model} on {plan.cluster}: {plan.n_copies} x (tp={plan.tp} pp={plan.pp}), "
            f"batch {plan.batch} of at most {plan.batch_max}, "
            f"{plan.input_tokens} in, {plan.output_tokens} out, {plan.precision.value}",
            "",
            numbers(shown),
            "",
            fewest,
            tree(plan.memory, depth=1),
            "",
            footer([plan.memory, *nodes.values()]),
        ]
    )
