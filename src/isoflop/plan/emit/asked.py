"""What every writer asks of a plan, and how it refuses."""

from __future__ import annotations

from collections.abc import Iterable

from isoflop.count.stages import layers_of_stage
from isoflop.errors import InputError, Problem
from isoflop.plan.training.plan import TrainPlan


def refuse(trainer: str, problems: Iterable[Problem]) -> None:
    if bad := list(problems):
        raise InputError(f"plan train --emit {trainer}", bad)


def n_steps(plan: TrainPlan) -> int:
    """Steps that read all tokens; the last may read some more."""
    return -(-plan.ask.work.tokens // (plan.ask.global_batch * plan.ask.work.seq_len))


def layers_by_chunk(plan: TrainPlan) -> list[int]:
    """Layers of each chunk of the pipeline, in the order of the model."""
    n, layout = plan.ask.work.arch.n_layers, plan.layout
    total = layout.pp * layout.virtual
    return [len(layers_of_stage(n, total, chunk)) for chunk in range(total)]


def toml_value(value: str | int) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
