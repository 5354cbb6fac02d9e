"""Bytes that one accelerator holds in training under a layout: its rank, and the software's."""

from __future__ import annotations

from collections.abc import Mapping

from isoflop.count.blocks import Part
from isoflop.count.made import Made
from isoflop.count.memory_rank import (
    Trained,
    host_held,
    memory_held,
    memory_rank,
    parts_held,
)
from isoflop.count.memory_saved import Recompute
from isoflop.count.memory_split import Shards
from isoflop.count.memory_stack import ERROR_OF_MEMORY, overhead, stack_of
from isoflop.plan.layout import Layout
from isoflop.quantity import Expr, Node, Symbol, branch, where
from isoflop.quantity.expr import product

__all__ = [
    "Recompute",
    "Trained",
    "bytes_boundary",
    "host_training_held",
    "memory_training_held",
    "memory_training_stage",
    "shards_of",
    "with_overhead",
]


def shards_of(layout: Layout) -> Shards:
    """A layout as the ways in which it splits memory."""
    return Shards(
        tp=layout.tp,
        pp=layout.pp,
        dp=layout.dp,
        cp=layout.cp,
        ep=layout.ep,
        zero=layout.zero,
        sequence_parallel=layout.sequence_parallel,
        virtual=layout.virtual,
        shard=layout.shard,
        offload=layout.offload,
        cp_by=layout.cp_by,
    )


def memory_training_stage(
    job: Trained, layout: Layout, n_micro: int, stage: int, stack: str = "unknown"
) -> Node:
    """Bytes that one accelerator of pipeline stage `stage` holds at its peak, as a tree.

    `stack` names the trainer's software; what it holds beside the model is `bytes_overhead`.
    """
    shards = shards_of(layout)
    rank = memory_rank(job, shards, n_micro=n_micro, stage=stage)
    return with_overhead(rank, job, shards, shards.in_flight(stage, n_micro), stack)


def memory_training_held(
    job: Trained,
    root: Part,
    layout: Layout,
    kinds: Mapping[str, int],
    *,
    first: bool,
    last: bool,
    stack: str = "unknown",
    made: Made | None = None,
) -> Node:
    """The same for any stage that holds so many layers of each kind; `root` describes the job."""
    shards = shards_of(layout)
    parts = list(parts_held(job.arch, root, kinds, first=first, last=last))
    flight, embedded = shards.in_flight(0, 1), shards.embedded(1)
    held = memory_held(job, shards, parts, flight, embedded, made)
    return with_overhead(held, job, shards, flight, stack)


def host_training_held(
    job: Trained,
    root: Part,
    layout: Layout,
    kinds: Mapping[str, int],
    *,
    first: bool,
    last: bool,
    made: Made | None = None,
) -> Node:
    """What each rank of such a stage keeps in its host's memory."""
    shards = shards_of(layout)
    parts = list(parts_held(job.arch, root, kinds, first=first, last=last))
    return host_held(job, shards, parts, shards.in_flight(0, 1), made)


def with_overhead(
    rank: Node, job: Trained, shards: Shards, flight: Expr, stack: str = "unknown"
) -> Node:
    """A rank's tree with what the software holds, `flight` micro-batches being under way."""
    outputs = where(Symbol("pp", shards.pp) - 1, flight, 0) * bytes_boundary(job, shards)
    beside = overhead(stack_of(stack), rank, shards, outputs)
    held = [*rank.children, beside]
    return branch("bytes_per_accelerator", "bytes", held, times=ERROR_OF_MEMORY)


def bytes_boundary(job: Trained, shards: Shards) -> Expr:
    """What one micro-batch hands from stage to stage, the piece of one rank."""
    width = Symbol("d_model", job.arch.d_model, meaning="width of the residual stream")
    split: list[Expr] = [Symbol("cp", shards.cp)]
    if shards.sequence_parallel:
        split.append(Symbol("tp", shards.tp))
    return job.work.tokens * width * job.state.activation.bytes_each / product(split)
