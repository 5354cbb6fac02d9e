"""isoflop plan serve"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

from cyclopts import Parameter

from isoflop.cli.options import Count, Duration, Json, Real, Stored, load_model
from isoflop.cli.output import emit, note, say
from isoflop.count import params
from isoflop.count.memory_weights import format_of
from isoflop.errors import Infeasible
from isoflop.hardware import parse_cluster
from isoflop.plan import ServePlan, plan_serve
from isoflop.plan.serving.step import Server
from isoflop.plan.serving.tables import attentions, batches, knee, quantizations, tables_json
from isoflop.quantity import Node
from isoflop.quantity.text import span_text, table, tree
from isoflop.quantity.units import format_bytes, format_count, format_rounded
from isoflop.report.text import footer

TableName: TypeAlias = Literal["batch", "quantization", "attention", "none"]


def plan_serve_command(
    model: str,
    /,
    *,
    on: Annotated[str, Parameter(name="--on", help="Accelerators, such as 8xh100-sxm.")],
    input_: Annotated[Count, Parameter(name="--input")] = 1024,
    output: Annotated[Count, Parameter(name="--output")] = 256,
    batch: Count | None = None,
    precision: str = "bf16",
    kv_precision: Stored | None = None,
    page: Count | None = None,
    tp: Count | None = None,
    ttft: Duration | None = None,
    tpot: Duration | None = None,
    price: Real | None = None,
    table: TableName = "batch",
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
        Sequences that one copy works on at once; as many as fit and --tpot allows when not given.
    precision
        How weights are stored: fp32, bf16, fp16, fp8, int8, int4, int4-zero, nf4, nf4-dq.
    kv_precision
        How keys and values are stored; in 16 bits (32 for fp32 weights) when not given.
    page
        Tokens in a page of the cache, such as 16; no pages when not given.
    tp
        Tensor parallelism; the largest even split within a node when not given.
    ttft
        Limit on the time to the first token with no queue, such as 500ms; exit 3 when missed.
    tpot
        Limit on the time per output token, such as 30ms; exit 3 when missed.
    price
        Dollars per accelerator-hour.
    table
        What to set beside the plan: batch, quantization, attention or none; --json has all.
    """
    plan = plan_serve(
        load_model(model), parse_cluster(on), input_tokens=input_, output_tokens=output,
        batch=batch, precision=format_of(precision.lower()), kv_precision=kv_precision, page=page,
        tp=tp, ttft=ttft, tpot=tpot, price=price,
    )  # fmt: skip
    if as_json:
        emit("plan serve", plan.to_json() | {"tables": tables_json(plan)})
    else:
        say(render_serve(plan, table))
    say_limits(plan)


def say_limits(plan: ServePlan) -> None:
    """Raise Infeasible for each stated limit that the plan misses; else say how safely it is met."""
    if plan.missed:
        raise Infeasible("\n".join(plan.missed))
    limits = ((plan.seconds_prefill, plan.asked.ttft), (plan.seconds_per_token, plan.asked.tpot))
    stated = [(node, limit) for node, limit in limits if limit is not None]
    if not stated:
        return
    slow = [node for node, limit in stated if node.interval and node.interval.high > limit]
    end = "the slow ends of their ranges do not keep to them" if slow else "and at the slow ends"
    joint = "; " if slow else " "
    note(f"the stated limits are met at the plan's middle values{joint}{end}")


def render_serve(plan: ServePlan, beside: TableName = "batch") -> str:
    """A server plan as text."""
    sides = {"batch": _batches, "quantization": _quantizations, "attention": _attentions}
    paragraphs = [
        str(plan),
        *([sides[beside](plan)] if beside != "none" else []),
        f"{_fewest(plan)}\n{tree(plan.memory, depth=1)}",
        *(["\n".join(plan.notes)] if plan.notes else []),
        footer([plan.memory, *plan.nodes().values()]),
    ]
    return "\n\n".join(paragraphs)


def _fewest(plan: ServePlan) -> str:
    tensor = plan.accelerators_min_tensor
    even = f"{tensor} by even tensor parallelism" if tensor else "no even tensor split in a node"
    return f"fewest accelerators: {plan.accelerators_min.value} by memory, {even}"


# --- tables beside the plan -------------------------------------------------------------------


def _batches(plan: ServePlan) -> str:
    many, servers = plan.n_copies > 1, batches(plan)
    rows = [
        [f"  {s.batch:,}", _seconds(s.first_tokens), *_rates(s), *([_per_copy(s)] if many else []),
         *_money(s), f"{_share(s):.0%}"]
        for s in servers
    ]  # fmt: skip
    header = ["  batch", "first tokens", "per token", "tokens/s", *(["per copy"] if many else []),
              "$ per M out", "90 % range", "weights"]  # fmt: skip
    align = "rrrr" + "r" * many + "rlr"
    why = "first tokens: of a batch that comes at once, its prompts read one after the other"
    best = knee(servers)
    limit = f"batch {best.batch:,} makes 95 % of the most tokens/s, each token in {_seconds(best.decode)}"
    if best.batch == plan.batch_max:
        limit = "tokens/s still grow at the largest batch: memory is the limit"
    return f"{table(rows, header, align)}\n  {why}\n  {limit}"


def _quantizations(plan: ServePlan) -> str:
    rows = [
        [f"  {_named(r.name, r.own)}", format_bytes(r.bytes_weights), str(r.accelerators_min),
         *_outcome(r.server)]
        for r in quantizations(plan)
    ]  # fmt: skip
    header = ["  weights in", "bytes", "fewest", *_OUTCOME]
    return f"{table(rows, header, 'lrr' + _ALIGN)}\n  {_at(plan)}; scales of groups of 128 counted"


def _attentions(plan: ServePlan) -> str:
    rows = [
        [f"  {_named(r.name, r.own)}", format_count(params(r.asked.arch).value),
         format_bytes(r.bytes_kv_per_token), *_outcome(r.server), f"{_digits(r.gain)}x"]
        for r in attentions(plan)
    ]  # fmt: skip
    header = ["  attention", "params", "cache per token", *_OUTCOME, "fewer bytes"]
    why = (
        f"fewer bytes: a step's with MHA over a step's with this, weights alike, at batch "
        f"{plan.batch:,} and {plan.asked.request.mean_context:,} tokens of context"
    )
    return (
        f"{table(rows, header, 'lrr' + _ALIGN + 'r')}\n  {_at(plan)}; MLA keeps 512 + 64\n  {why}"
    )


#: Columns of `_outcome`.
_OUTCOME = ["batch", "per token", "tokens/s", "$ per M out", "90 % range"]
_ALIGN = "rrrrl"


def _outcome(server: Server | None) -> Sequence[str]:
    if server is None:
        return ["does not fit", "", "", "", ""]
    return [f"{server.batch:,}", *_rates(server), *_money(server)]


def _rates(server: Server) -> list[str]:
    rate = server.tokens_per_second
    return [_seconds(server.decode), format_rounded(float(rate.value), rate.unit)]


def _per_copy(server: Server) -> str:
    return format_rounded(float(server.tokens_per_second.value) / server.n_copies, "tokens/s")


def _money(server: Server) -> list[str]:
    node = server.dollars_per_million_tokens
    return [format_rounded(float(node.value), node.unit), span_text(node)]


def _seconds(node: Node) -> str:
    return format_rounded(float(node.value), "seconds")


def _share(server: Server) -> float:
    return float(server.memory.find("bytes_weights").value / server.memory.value)


def _digits(value: float) -> str:
    return f"{value:#.3g}"


def _named(name: str, own: bool) -> str:
    return f"{name} (this)" if own else name


def _at(plan: ServePlan) -> str:
    if plan.asked.batch is None:
        return f"tp={plan.tp}, each at its own largest batch"
    return f"tp={plan.tp}, each at batch {plan.batch:,}"
