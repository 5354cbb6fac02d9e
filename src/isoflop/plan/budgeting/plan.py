"""What a budget is asked for, and the plan that answers; settle.py finds it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from isoflop.arch import Arch
from isoflop.errors import InputError
from isoflop.hardware import Cluster
from isoflop.hardware.chip import Precision as Format
from isoflop.laws import Demand, Law
from isoflop.laws.form import FLOPS_PER_PARAM_TOKEN, require
from isoflop.plan.ask import one_of, whole
from isoflop.plan.assumed import assumption_json
from isoflop.plan.economics import price_of, unstated
from isoflop.plan.goodput import Rhythm
from isoflop.plan.memory.shard import Recompute
from isoflop.plan.training.plan import RECOMPUTES, TrainPlan
from isoflop.plan.training.work import STATES
from isoflop.quantity import Basis, Expr, Interval, Node, Symbol, leaf
from isoflop.quantity.node import plain

#: What a budget is counted in. FLOPs are 6 x parameters x tokens, as laws count them.
Kind: TypeAlias = Literal["flops", "dollars", "gpu_hours"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Ask:
    """A budget and what it is for.

    `recompute` None is the least that fits; `global_batch` None follows the tokens.
    `mtbf_hours` lie between the failures of one accelerator, in the mean, and
    `seconds_restart` pass until the run trains again. `price` is in dollars per accelerator-hour; `mfu`, `tflops`, `watts`, `pue`, `carbon` as in `plan_train`.

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
    days: float | None = None

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
    rhythm: Rhythm

    @property
    def seconds_wall(self) -> Expr:
        """Wall time of the run: steps, stalls, failures, and their chance."""
        return self.rhythm.seconds_wall(86_400 * self.run.days.total)

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
        return leaf("days", "days", self.chosen.seconds_wall / 86_400, basis=Basis.MODELLED)

    @property
    def accelerator_hours(self) -> Node:
        """Hours paid for: every accelerator of the cluster for the whole wall time."""
        hours = self.chosen.seconds_wall / 3600 * self.ask.cluster.n_accelerators
        return leaf("accelerator_hours", "hours", hours, basis=Basis.MODELLED)

    @property
    def probability_in_time(self) -> float | None:
        days = self.ask.days
        return None if days is None else self.days.total.probability_below(days)

    def nodes(self) -> dict[str, Node]:
        """Every number of the plan that has a formula, by its name in JSON."""
        run, rhythm = self.chosen.run, self.chosen.rhythm
        wall, used = self.chosen.seconds_wall, rhythm.goodput
        price = price_of(self.ask.cluster.chip, self.ask.price)
        modelled: dict[str, tuple[str, Expr]] = {
            "energy_mwh": ("MWh", run.energy_mwh.total / used),
            "tonnes_co2e": ("tonnes", run.tonnes_co2e.total / used),
            "dollars": ("dollars", self.accelerator_hours.total * price),
            "goodput": ("", used),
            "failures": ("failures", rhythm.failures(wall)),
            "probability_of_failure": ("", rhythm.probability_of_failure(wall)),
            "seconds_checkpoint_interval": ("seconds", rhythm.interval),
        }
        derived = {n: leaf(n, u, e, basis=Basis.MODELLED) for n, (u, e) in modelled.items()}
        return {
            "flops": run.flops,
            "accelerator_hours": self.accelerator_hours,
            "days": self.days,
            **derived,
            "bytes_per_accelerator": run.bytes_per_accelerator,
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
            "layout": chosen.run.layout.to_json(),
            "n_idle": chosen.run.n_idle,
            "intervals": {name: r.to_json() for name, r in spans.items() if r is not None},
            "assumptions": [assumption_json(s) for s in self.assumptions],
            "breakdown": {name: node.to_json() for name, node in nodes.items()},
        }


def finite(value: float) -> float | None:
    """The value, None where it is endless, which JSON cannot say."""
    return value if math.isfinite(value) else None
