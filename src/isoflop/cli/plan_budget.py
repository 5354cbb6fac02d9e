"""isoflop plan budget"""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from isoflop.arch import Attention
from isoflop.cli.laws import read_law
from isoflop.cli.options import Count, Json, Real
from isoflop.cli.output import emit, say
from isoflop.cli.plan import Failures, On, percent, risk_text
from isoflop.cli.plan_train import AS_ASSUMED, Terms, read_stack
from isoflop.errors import MISSING, Infeasible, InputError, Problem
from isoflop.hardware import parse_cluster
from isoflop.laws import Demand, Law
from isoflop.plan.budgeting.plan import KINDS, Ask, BudgetPlan, Choice, Kind, Refused
from isoflop.plan.budgeting.settle import plan_budget
from isoflop.plan.shown import labelled
from isoflop.quantity.text import numbers, table
from isoflop.quantity.units import (
    format_bytes,
    format_count,
    format_exact,
    format_si,
    format_value,
)
from isoflop.report.text import footer

#: The law of a budget where none is named, and where data are few.
LAW, LAW_REPEATED = "besiroglu-2024-minimum", "muennighoff-2023"


@Parameter(name="*", group="The budget, in one of three ways")
@dataclass(frozen=True, slots=True)
class Amount:
    """The budget, in one of three ways.

    Parameters
    ----------
    flops
        The budget in FLOPs, 6 x parameters x tokens.
    dollars
        The budget in dollars: all accelerators for the whole run, idle and broken time too.
    gpu_hours
        The budget in accelerator-hours, idle and broken time too.
    """

    flops: Real | None = None
    dollars: Real | None = None
    gpu_hours: Real | None = None

    def one(self) -> tuple[Kind, float]:
        """The one given."""
        given = {kind: getattr(self, kind) for kind in KINDS}
        said = [kind for kind, amount in given.items() if amount is not None]
        if len(said) != 1:
            rule = "is given as one of --flops, --dollars and --gpu-hours"
            raise InputError("plan budget", [Problem("budget", ", ".join(said) or MISSING, rule)])
        return said[0], given[said[0]]


@Parameter(name="*", group="What the model is for")
@dataclass(frozen=True, slots=True)
class Purpose:
    """What the model is for, and the law that says what it is worth.

    Parameters
    ----------
    law
        A published law's name (`isoflop laws`), or a JSON file that `isoflop fit -o` wrote;
        besiroglu-2024-minimum when not given, muennighoff-2023 with --unique-tokens.
    serve_tokens
        Tokens that the model will serve in its life; the budget pays their forward pass too,
        at the rate of training.
    unique_tokens
        Unique tokens there are; more are repeats, and worth less.
    """

    law: str | None = None
    serve_tokens: Real | None = None
    unique_tokens: Real | None = None

    @property
    def demand(self) -> Demand:
        endless = float("inf") if self.unique_tokens is None else self.unique_tokens
        return Demand(self.serve_tokens or 0.0, endless)

    @property
    def form(self) -> Law:
        return read_law(self.law or (LAW if self.unique_tokens is None else LAW_REPEATED))


#: Nothing said: nothing served, data without end, failures as assumed.
NO_AMOUNT, ANY_PURPOSE, AS_USUAL = Amount(), Purpose(), Failures()


def plan_budget_command(
    *,
    on: On,
    amount: Amount = NO_AMOUNT,
    purpose: Purpose = ANY_PURPOSE,
    days: Annotated[Real | None, Parameter(name=("--max-days", "--days"))] = None,
    seq_len: Count = 4096,
    vocab_size: Count = 32_000,
    family: str = "llama",
    global_batch: Count | None = None,
    precision: str = "bf16",
    recompute: str | None = None,
    terms: Terms = AS_ASSUMED,
    trouble: Failures = AS_USUAL,
    stack: str | None = None,
    as_json: Json = False,
) -> None:
    """Find the best model that a budget trains, and plan its run.

    Parameters
    ----------
    days
        Limit on the wall time; exit 3 when missed.
    seq_len
        Tokens per sequence.
    vocab_size
        Rows of the embedding; the default law's own runs had 32,000.
    family
        llama or gpt: the family whose shape the model takes.
    global_batch
        Sequences per step; grows with the tokens when not given.
    precision
        fp32, bf16 or another that the accelerator computes in.
    recompute
        none, selective or full; the quickest when not given.
    stack
        The trainer's software whose steps are timed, by name or by file, as in plan train.
    """
    kind, size = amount.one()
    ask = Ask(
        kind, size, parse_cluster(on), purpose.form, purpose.demand,
        seq_len=seq_len, vocab_size=vocab_size, family=family, global_batch=global_batch, days=days,
        precision=precision,  # type: ignore[arg-type]  # checked by Ask, which lists the choices
        recompute=recompute,  # type: ignore[arg-type]
        **asdict(terms), **asdict(trouble), **read_stack(stack),
    )  # fmt: skip
    plan = plan_budget(ask)
    if as_json:
        emit("plan budget", {**plan.to_json(), "spec": spec_json(plan)})
    else:
        say(render_budget(plan))
    check_days(plan)


def check_days(plan: BudgetPlan) -> None:
    """Raise Infeasible where the middle of the run's days exceeds the limit."""
    limit, days = plan.ask.days, float(plan.days.value)
    if limit is None or days <= limit:
        return
    share = limit / days
    raise Infeasible(
        f"{days:.4g} days exceed the limit of {limit:g}\n"
        f"what would help: {format_share(share)} of this budget, or about "
        f"{format_count(plan.ask.cluster.count / share)} such accelerators"
    )


def format_share(share: float) -> str:
    """A share in whole percent, in two digits where that would be none.

    >>> format_share(0.5), format_share(0.000123)
    ('50%', '0.012%')
    """
    return f"{share:.0%}" if share >= 0.01 else f"{100 * share:.2g}%"


def render_budget(plan: BudgetPlan) -> str:
    """A budget's plan as text: the answer, the run, its risk, how flat the best is."""
    ask, chosen = plan.ask, plan.chosen
    lines = [
        f"{_amount(ask)} on {ask.cluster}: {format_count(chosen.n_params)} parameters, "
        f"{format_count(chosen.tokens)} tokens ({chosen.tokens / chosen.n_params:.3g} per parameter)",
        "",
        f"loss {chosen.loss:.3f}{_loss_range(plan)}, by {ask.law.name}{_reach(plan)}",
        *_demands(plan),
        "",
        numbers(dict(labelled(plan.nodes()))),
        "",
        _model(chosen),
        _run(plan),
        _risk(plan),
        *(f"note    {note}" for note in plan.chosen.run.notes),
        "",
        "the same budget at another size:",
        table([_size(c, chosen) for c in (plan.half, chosen, plan.double)], align="lrrr"),
        *_best(plan),
        "",
        footer(plan.nodes().values()),
    ]
    return "\n".join(lines)


def _amount(ask: Ask) -> str:
    match ask.kind:
        case "flops":
            return f"{format_si(ask.amount, 'FLOP')} (6 N D)"
        case "dollars":
            return format_value(ask.amount, "dollars")
        case _:
            return f"{format_count(ask.amount)} accelerator-hours"


def _loss_range(plan: BudgetPlan) -> str:
    span = plan.loss_interval
    if span is None:
        return " (no range: how well this law is known is not stated)"
    return f" ({span.low:.3f} to {span.high:.3f})"


def _reach(plan: BudgetPlan) -> str:
    """What the loss is measured in, and how far the law is stretched."""
    text = ": nats per token of its own data and tokenizer"
    if plan.extrapolation is None or plan.extrapolation <= 1:
        return text
    return f"{text},\n  at {plan.extrapolation:.3g} times the compute of its largest run"


def _demands(plan: BudgetPlan) -> list[str]:
    demand, lines = plan.ask.demand, []
    if demand.tokens_served:
        lines.append(
            f"serving {format_count(demand.tokens_served)} tokens takes "
            f"{plan.share_served:.0%} of the budget, at training's cost per FLOP; decoding costs more"
        )
    if plan.epochs > 1:
        lines.append(
            f"each of {format_count(demand.tokens_unique)} unique tokens is seen "
            f"{plan.epochs:.3g} times (how repeats wear out: Muennighoff 2023)"
        )
    return lines


def _model(chosen: Choice) -> str:
    arch = chosen.arch
    layer = arch.layers[0]
    assert isinstance(layer.attention, Attention)
    heads = f"{layer.attention.n_heads} heads ({layer.attention.n_kv_heads} key-value)"
    tied = "tied" if arch.head.tied else "untied"
    return (
        f"model   {arch.name}: {arch.n_layers} layers, d_model {arch.d_model}, {heads} of "
        f"{layer.attention.d_head}, d_ff {layer.feed_forward.d_ff}, "  # type: ignore[union-attr]
        f"vocabulary {format_exact(arch.vocab_size)}, {tied}"
    )


def _run(plan: BudgetPlan) -> str:
    run = plan.chosen.run
    idle = f", {run.n_idle} accelerators idle" if run.n_idle else ""
    return (
        f"layout  {run.layout}{idle}, recompute {run.ask.work.recompute}, batch of "
        f"{format_exact(run.ask.global_batch)} x {format_exact(plan.ask.seq_len)} tokens: "
        f"{format_bytes(run.bytes_per_accelerator.value)} per accelerator of "
        f"{format_bytes(run.cluster.chip.bytes_memory.value)}"
    )


def _risk(plan: BudgetPlan) -> str:
    text = f"risk    {risk_text(plan.chosen.rhythm, plan.days)}"
    if plan.probability_in_time is None:
        return text
    return (
        f"{text};\n        "
        f"done within {plan.ask.days:g} days with {percent(plan.probability_in_time)}"
    )


def _size(size: Choice | Refused, chosen: Choice) -> list[str]:
    if isinstance(size, Refused):
        return [f"  {format_count(size.n_params)} parameters", "", "", size.reason]
    more = "" if size is chosen else f"{size.loss - chosen.loss:+.4f}"
    return [
        f"  {format_count(size.n_params)} parameters",
        f"{format_count(size.tokens)} tokens",
        f"loss {size.loss:.3f}",
        more,
    ]


def _best(plan: BudgetPlan) -> list[str]:
    span = plan.params_interval
    if span is None:
        return []
    low, high = format_count(span.low), format_count(span.high)
    return [f"  the best size lies between {low} and {high}, as far as the law is known"]


def spec_json(plan: BudgetPlan) -> dict[str, Any]:
    """The chosen model's spec, as `isoflop show --json` prints it."""
    from isoflop.arch.toml import write_spec

    return tomllib.loads(write_spec(plan.chosen.arch))
