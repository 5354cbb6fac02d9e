"""What a budget is asked for, and the plan that answers; settle.py finds it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from isoflop.arch import Arch
from isoflop.count.memory_saved import RECOMPUTES, Recompute
from isoflop.errors import InputError
from isoflop.hardware import Cluster
from isoflop.hardware.chip import Precision as Format
from isoflop.hardware.fitted import Beliefs, shipped
from isoflop.laws import Demand, Law
from isoflop.laws.form import FLOPS_PER_PARAM_TOKEN, require
from isoflop.plan.ask import one_of, whole
from isoflop.plan.assumed import assumption_json
from isoflop.plan.economics import dollars, price_of, unstated
from isoflop.plan.goodput import Rhythm
from isoflop.plan.training.plan import TrainPlan
from isoflop.plan.training.work import STATES
from isoflop.quantity import Basis, Interval, Node, Symbol, alias, leaf
from isoflop.quantity.node import plain

#: What a budget is counted in. FLOPs are 6 x parameters x tokens, as laws count them.
Kind: TypeAlias = Literal["flops", "dollars", "gpu_hours"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Ask:
    """A budget and what it is for.

    `recompute` None is the quickest that fits; `global_batch` None follows the tokens.
    `mtbf_hours` lie between the failures of one accelerator, in the mean, and
    `seconds_restart` pass until the run trains again; `overrun` is what it takes beyond: all on
    top of a rate given too. `price` is in
    dollars per accelerator-hour; `mfu`, `tflops`, `stack`, `watts`, `pue`, `carbon` as in
    `plan_train`; `beliefs` as in a `Setting`.

    Raises:
        InputError: an amount, length, vocabulary or name out of bounds, or an unstated price.
    """

    kind: Kind
    amount: float
    cluster: Cluster
    law: Law
    demand: Demand = field(default_factory=Demand)
    seq_len: int = 4096
    vocab_size: int = 32_000
    family: str = "llama"
    global_batch: int | None = None
    precision: Format = "bf16"
    recompute: Recompute | None = None
    mfu: float | None = None
    tflops: float | None = None
    price: float | None = None
    watts: float | None = None
    pue: float | None = None
    carbon: float | None = None
    mtbf_hours: float | None = None
    seconds_restart: float | None = None
    overrun: float | None = None
    days: float | None = None
    stack: str | None = None
    beliefs: Beliefs = field(default_factory=shipped)

    def __post_init__(self) -> None:
        require("plan budget", **{self.kind: self.amount})
        if self.days is not None:
            require("plan budget", days=self.days)
        bad = [
            *one_of("budget", self.kind, KINDS),
            *whole("seq_len", self.seq_len, 10**8),
            *whole("vocab_size", self.vocab_size, 10**8),
            *one_of("precision", self.precision, STATES),
            *one_of("recompute", self.recompute or "none", RECOMPUTES),
            *unstated(self.cluster.chip, price=self.price, watts=self.watts),
        ]
        if bad:
            raise InputError("plan budget", bad)

    @property
    def hours(self) -> float | None:
        """Accelerator-hours that the budget pays for, idle ones too; None for FLOPs."""
        if self.kind == "flops":
            return None
        price = float(price_of(self.cluster.chip, self.price).value)
        return self.amount / price if self.kind == "dollars" else self.amount


@dataclass(frozen=True, slots=True)
class Choice:
    """One size of model, and what the budget trains of it.

    `n_law` are its parameters as the law counts them; `flops` what the budget comes to at
    this model's rate, 6 per parameter and token, serving included.
    """

    arch: Arch
    n_params: int
    n_law: float
    tokens: int
    loss: float
    flops: float
    run: TrainPlan

    @property
    def rhythm(self) -> Rhythm:
        """How the run goes on between failures, which a budget always counts."""
        assert self.run.rhythm is not None
        return self.run.rhythm

    def to_json(self) -> dict[str, Any]:
        return {"params": self.n_params, "tokens": self.tokens, "loss": self.loss}


@dataclass(frozen=True, slots=True)
class Refused:
    """A size that cannot be had, and why."""

    n_params: float
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {"params": self.n_params, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class BudgetPlan:
    """The best model for a budget, how flat the best is, and the run that makes it.

    Attributes:
        loss_interval: of one run's loss; None where the law's uncertainty is not published.
        params_interval: where the best size lies, as far as the law is known: how much its
            optimum moves between laws as likely, about the size chosen.
        half, double: the same budget spent on half and on twice the size.
        extrapolation: compute over that of the largest run behind the law.
        probability_in_time: of ending within the days asked for, by the ranges of the plan.
    """

    ask: Ask
    chosen: Choice
    half: Choice | Refused
    double: Choice | Refused
    loss_interval: Interval | None
    params_interval: Interval | None
    extrapolation: float | None

    @property
    def days(self) -> Node:
        return self.chosen.run.days

    @property
    def accelerator_hours(self) -> Node:
        """Hours paid for: every accelerator of the cluster for the whole wall time."""
        hours = 24 * self.ask.cluster.n_accelerators * alias("days", self.days.total)
        return leaf("accelerator_hours", "hours", hours, basis=Basis.MODELLED)

    @property
    def probability_in_time(self) -> float | None:
        days = self.ask.days
        return None if days is None else self.days.total.probability_below(days)

    def nodes(self) -> dict[str, Node]:
        """Every number of the plan that has a formula, by its name in JSON."""
        run, hours = self.chosen.run, self.accelerator_hours
        price = price_of(self.ask.cluster.chip, self.ask.price)
        step = {} if run.seconds_step is None else {"seconds_step": run.seconds_step}
        return {
            "flops": run.flops,
            "accelerator_hours": hours,
            "days": self.days,
            "energy_mwh": run.energy_mwh,
            "tonnes_co2e": run.tonnes_co2e,
            "dollars": dollars(alias("accelerator_hours", hours.total), price),
            **self.chosen.rhythm.nodes(self.days),
            "bytes_per_accelerator": run.bytes_per_accelerator,
            **step,
        }

    @property
    def assumptions(self) -> tuple[Symbol, ...]:
        """Every default in the plan that the user may override, once."""
        found = {s.name: s for node in self.nodes().values() for s in node.assumptions}
        return tuple(found.values())

    @property
    def epochs(self) -> float:
        """How often each unique token is seen; at most 1 where there are enough."""
        return max(1.0, self.chosen.tokens / self.ask.demand.tokens_unique)

    @property
    def share_served(self) -> float:
        """Share of the budget's FLOPs that goes to serving."""
        trained = FLOPS_PER_PARAM_TOKEN * self.chosen.n_params * self.chosen.tokens
        return 1 - trained / self.ask.demand.flops(self.chosen.n_params, self.chosen.tokens)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data: the answer, then how it was reached."""
        ask, chosen, nodes = self.ask, self.chosen, self.nodes()
        spans = {name: node.interval for name, node in nodes.items()}
        spans |= {"loss": self.loss_interval, "params": self.params_interval}
        return {
            "budget": {"kind": ask.kind, "amount": ask.amount},
            "cluster": ask.cluster.to_json(),
            "law": ask.law.to_json(),
            "model": chosen.arch.name,
            **chosen.to_json(),
            "tokens_per_param": chosen.tokens / chosen.n_params,
            "tokens_served": ask.demand.tokens_served,
            "share_served": self.share_served,
            "tokens_unique": finite(ask.demand.tokens_unique),
            "epochs": self.epochs,
            **{name: plain(node.value) for name, node in nodes.items()},
            "days_limit": ask.days,
            "probability_in_time": self.probability_in_time,
            "extrapolation": self.extrapolation,
            "half": self.half.to_json(),
            "double": self.double.to_json(),
            "seq_len": ask.seq_len,
            "global_batch": chosen.run.ask.global_batch,
            "precision": ask.precision,
            "recompute": chosen.run.ask.work.recompute,
            "stack": chosen.run.stack,
            "notes": list(chosen.run.notes),
            "layout": chosen.run.layout.to_json(),
            "n_idle": chosen.run.n_idle,
            "intervals": {name: r.to_json() for name, r in spans.items() if r is not None},
            "assumptions": [assumption_json(s) for s in self.assumptions],
            "breakdown": {name: node.to_json() for name, node in nodes.items()},
        }


def finite(value: float) -> float | None:
    """The value, None where it is endless, which JSON cannot say."""
    return value if math.isfinite(value) else None
