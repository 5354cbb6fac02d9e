"""What every writer asks of a plan, and how it refuses."""

from __future__ import annotations

from collections.abc import Iterable

from isoflop.count.stages import layers_of_stage
from isoflop.errors import InputError, Problem
from isoflop.plan.layout import Layout
from isoflop.plan.schedule import n_stages
from isoflop.plan.training.learning_rate import suggested
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
    total = n_stages(layout.pipeline, layout.pp)
    return [len(layers_of_stage(n, total, chunk)) for chunk in range(total)]


def nodes(trainer: str, plan: TrainPlan) -> tuple[int, int]:
    """Nodes, and processes on each."""
    used, node = plan.layout.n_accelerators, plan.cluster.size_node
    if used <= node:
        return 1, used
    rule = f"fills nodes of {node}: torchrun starts as many processes on each"
    refuse(trainer, [Problem("accelerators", used, rule)] if used % node else [])
    return used // node, node


def on_every_node(trainer: str, plan: TrainPlan) -> list[str]:
    """How torchrun is called; HEAD_NODE is the address of one of the nodes."""
    n, each = nodes(trainer, plan)
    return ["torchrun", f"--nnodes {n}", f"--nproc-per-node {each}", "--rdzv-backend c10d",
            '--rdzv-endpoint "$HEAD_NODE:29500"']  # fmt: skip


def about_learning_rate(plan: TrainPlan, learning_rate: float | None) -> list[str]:
    """Comments on a learning rate that nobody said: what published laws would give."""
    if learning_rate is not None:
        return []
    laws = [f"{s.learning_rate:.2e} ({s.by})" for s in suggested(plan.ask.work)]
    said = f" gives {laws[0]}" if len(laws) == 1 else f" give {' and '.join(laws)}"
    known = f"; published laws{said}" if laws else "; published laws are of dense decoders"
    return [f"# learning rate: a plan does not say it, --learning-rate does{known}"]


def n_replicas(layout: Layout) -> int:
    """How often what ZeRO splits is there."""
    return 1 if layout.shard is None else layout.dp * layout.cp // layout.shard


def shards_contexts(layout: Layout) -> tuple[str, int | None, str, bool]:
    """Trainers shard over whole context-parallel groups."""
    held = layout.shard is None or layout.shard % layout.cp == 0
    return "shard", layout.shard, f"is divided by cp={layout.cp}", held
