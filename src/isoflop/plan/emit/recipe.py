"""A plan as a recipe of isoflop's own trainer."""

from __future__ import annotations

from isoflop.arch.zoo import entry, names
from isoflop.errors import Problem
from isoflop.plan.emit.asked import about_learning_rate, n_steps, refuse
from isoflop.plan.training.plan import TrainPlan


def recipe(plan: TrainPlan, learning_rate: float | None = None) -> str:
    """A recipe of `isoflop train`, whole once it has a learning rate."""
    refuse("recipe", _unsaid_recipe(plan))
    ask = plan.ask
    values: dict[str, str | int | float] = {
        "model": ask.work.arch.name,
        "seq_len": ask.work.seq_len,
        "batch_size": ask.global_batch,
        "steps": n_steps(plan),
        "precision": ask.precision,
    }
    if learning_rate is not None:
        values["learning_rate"] = learning_rate
    lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
    return "\n".join([*lines, *about_learning_rate(plan, learning_rate), ""])


def _toml(value: str | float) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _unsaid_recipe(plan: TrainPlan) -> list[Problem]:
    """What the single-process trainer does not do."""
    ask, layout = plan.ask, plan.layout
    name = ask.work.arch.name
    n_micro = layout.n_micro_batches(ask.global_batch)
    rules = [
        ("model", name, "is a name of the zoo, as recipes read it",
         name in names() and entry(name).arch == ask.work.arch),
        ("accelerators", layout.n_accelerators, "is 1: the trainer runs one process",
         layout.n_accelerators == 1),
        ("micro-batches per step", n_micro, "is 1: the trainer runs a batch at once", n_micro == 1),
        ("recompute", ask.work.recompute, "is none", ask.work.recompute == "none"),
        ("offload", layout.offload, "is none", layout.offload == "none"),
        ("precision", ask.precision, "is fp32 or bf16", ask.precision in ("fp32", "bf16")),
    ]  # fmt: skip
    return [Problem(field, value, rule) for field, value, rule, holds in rules if not holds]
